"""Which kernels a GPU spends its time on, from a trace by `jax.profiler`."""

import collections
import re
from pathlib import Path

from jax.profiler import ProfileData

# The first pattern that is found names the family. Names are those of cuDNN, cuBLAS and XLA.
FAMILIES = {
    "kernel gradients of convolutions": r"wgrad|bwdfilter|bprop_filter|backward_filter",
    "input gradients of convolutions": r"dgrad|bwddata|backward_data|bprop",
    "convolutions": r"fprop|convolve|conv2d|implicit_gemm|implicit_convolve|winograd|xmma_(?!gemm)|cudnn",
    "matrix products": r"gemm|cutlass|nvjet|matmul|dot",
    "copies and transposes": r"memcpy|memset|copy|transpose|nchw|nhwc|concatenate|slice|pad|gather|scatter",
    "reductions": r"reduce|reduction",
    "elementwise": r"fusion|loop|add|multiply|convert|select|maximum|broadcast|wrapped",
}


def family_of(kernel: str) -> str:
    """Of a kernel by its name."""
    name = kernel.lower()
    return next(
        (family for family, pattern in FAMILIES.items() if re.search(pattern, name)), "other"
    )


def read(folder: Path, *, num_calls: int, num_longest: int = 40) -> dict[str, object]:
    """Seconds of one call by family and by kernel, where `num_calls` calls were traced into the folder.

    Returns:
        'families': name -> seconds; 'kernels': the longest as (name, operation of XLA, times, seconds);
        'busy_seconds': of all kernels together. All are 0 or empty where no GPU was traced.
    """
    seconds: collections.Counter = collections.Counter()
    times: collections.Counter = collections.Counter()
    for path in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue  # other lines say the same by operation and by module
                for event in line.events:
                    stats = dict(event.stats)
                    key = (event.name, str(stats.get("hlo_op", "")))
                    seconds[key] += event.duration_ns * 1e-9 / num_calls
                    times[key] += 1
    families: collections.Counter = collections.Counter()
    for (name, _), value in seconds.items():
        families[family_of(name)] += value
    longest = [
        (name[:120], operation, times[name, operation] / num_calls, value)
        for (name, operation), value in seconds.most_common(num_longest)
    ]
    return {
        "families": dict(families.most_common()),
        "kernels": longest,
        "busy_seconds": sum(seconds.values()),
    }
