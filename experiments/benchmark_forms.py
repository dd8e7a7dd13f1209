"""Forms of the same operation beside each other: the measurements behind `models/convolution` and its like.

    python experiments/benchmark_forms.py --output=runs/benchmark_forms [--small]

Every row is one operation at the shape it has in PSPNet-50 (473 crop at batch 1, 233 crop at batch 4), every
column a form of it; forms take turns, nine rounds, on the machine at hand in float32. "Value" is the forward pass,
"kernel" the gradient of the kernel alone, "map" that of the map. The largest
difference from the first form, over its largest value, stands beside the times.

results.json and results.md go to the output folder.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax.losses import LossOptions, stretched_cross_entropy
from pspnet_jax.models.convolution import (
    direct,
    interleaved,
    matrix_product,
    winograd,
)
from pspnet_jax.models.layers import max_pool
from pspnet_jax.resample import resize

# Batch, side, channels in and out, dilation.
CONVOLUTIONS = (
    (1, 60, 2048, 512, 1),
    (1, 60, 512, 512, 4),
    (1, 60, 256, 256, 2),
    (1, 60, 128, 128, 1),
    (1, 119, 64, 64, 1),
    (1, 237, 64, 128, 1),
    (4, 30, 2048, 512, 1),
    (4, 30, 512, 512, 4),
    (4, 30, 256, 256, 2),
    (4, 30, 128, 128, 1),
    (4, 59, 64, 64, 1),
    (4, 117, 64, 128, 1),
    (4, 117, 32, 32, 1),
)
POINTWISE = ((1, 60, 1024, 256), (1, 60, 256, 1024), (1, 119, 64, 256), (4, 30, 2048, 512))
SMALL = (((2, 6, 8, 8, 2),), ((2, 6, 8, 4),))
Operation = tuple[str, dict[str, Callable], tuple[jax.Array, ...]]
"""Name, forms, arguments."""


def random(*shape: int, seed: int = 0) -> jax.Array:
    """Normal values."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def gradient_of(form: Callable, index: int) -> Callable:
    """(x, kernel, g) -> the gradient for x (index 0) or the kernel (1)."""

    def gradient(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
        operands = [x, kernel]

        def function(operand: jax.Array) -> jax.Array:
            return form(*operands[:index], operand, *operands[index + 1 :])

        return jax.vjp(function, operands[index])[1](g)[0]

    return gradient


def convolutions(shapes: tuple) -> list[Operation]:
    """3x3: value and both gradients of the plain form, Winograd's and the interleaved one."""
    found: list[Operation] = []
    for batch, side, channels, out, dilation in shapes:
        x, kernel = random(batch, side, side, channels), random(3, 3, channels, out, seed=1)
        g = random(batch, side, side, out, seed=2)
        forms = {
            form.__name__: functools.partial(form, dilation=dilation)
            for form in (direct, winograd, interleaved)
        }
        if dilation == 1:
            del forms["interleaved"]
        name = f"3x3, {channels} to {out}, {batch} x {side}, dilation {dilation}"
        found.append((f"{name}: value", forms, (x, kernel)))
        kernels = {key: gradient_of(form, 1) for key, form in forms.items()}
        found.append((f"{name}: kernel", kernels, (x, kernel, g)))
        maps = {key: gradient_of(form, 0) for key, form in forms.items()}
        mirrored = functools.partial(winograd, dilation=dilation, mirrored=True)
        maps["winograd"] = lambda x, kernel, g, form=mirrored: form(g, kernel)
        found.append((f"{name}: map", maps, (x, kernel, g)))
    return found


def pointwise(shapes: tuple) -> list[Operation]:
    """1x1: as a convolution and as a matrix product."""
    found: list[Operation] = []
    for batch, side, channels, out in shapes:
        x, kernel = random(batch, side, side, channels), random(1, 1, channels, out, seed=1)
        g = random(batch, side, side, out, seed=2)
        forms = {"direct": functools.partial(direct, dilation=1), "matrix_product": matrix_product}
        name = f"1x1, {channels} to {out}, {batch} x {side}"
        found.append((f"{name}: value", forms, (x, kernel)))
        kernels = {key: gradient_of(form, 1) for key, form in forms.items()}
        found.append((f"{name}: kernel", kernels, (x, kernel, g)))
    return found


def others(batch: int, side: int, num_classes: int) -> list[Operation]:
    """Max pool, resizing and the loss with its gradient, of maps of `side` and images of 8 (side - 1) + 1."""
    size = 8 * (side - 1) + 1
    pooled = random(batch, 4 * side, 4 * side, 16)
    logits = random(batch, side, side, num_classes)
    labels = np.random.default_rng(3).integers(0, num_classes, (batch, size, size), np.uint8)

    def scattered(x: jax.Array) -> jax.Array:
        window, padding = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), padding)

    def loss(logits: jax.Array, *, tile_mib: float | None, platform: str | None) -> jax.Array:
        options = LossOptions(tile_mib=tile_mib)
        return stretched_cross_entropy(
            logits, jnp.asarray(labels), options, align_corners=True, platform=platform
        )

    stretch = functools.partial(resize, size=(size, size), align_corners=True)
    pools = {"XLA's gradient": scattered, "without scatter": max_pool}
    sums = {key: jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2)) for key, f in pools.items()}
    losses = {
        "at once": functools.partial(loss, tile_mib=None, platform=None),
        "at once, by rows": functools.partial(loss, tile_mib=None, platform="cpu"),
        "tiles of 64 MiB": functools.partial(loss, tile_mib=64.0, platform="cpu"),
        "tiles of 16 MiB": functools.partial(loss, tile_mib=16.0, platform="cpu"),
        "tiles of 4 MiB": functools.partial(loss, tile_mib=4.0, platform="cpu"),
    }
    resizes = {"one product": stretch, "by rows": functools.partial(stretch, platform="cpu")}
    shape = f"{batch} x {side} to {size}, {num_classes} classes"
    return [
        (f"max pool of {batch} x {4 * side}, 16 channels: value and gradient", sums, (pooled,)),
        (f"stretching logits, {shape}", resizes, (logits,)),
        (
            f"loss of stretched logits with its gradient, {shape}",
            {key: jax.grad(function) for key, function in losses.items()},
            (logits,),
        ),
    ]


def measure(operation: Operation, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of each form (low, median, high), and how far its result is from the first one's."""
    name, forms, arguments = operation
    compiled = {key: jax.jit(form).lower(*arguments).compile() for key, form in forms.items()}
    results = {key: np.asarray(run(*arguments)) for key, run in compiled.items()}
    times: dict[str, list[float]] = {key: [] for key in compiled}
    for _ in range(rounds):
        for key, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times[key].append(1000 * (time.perf_counter() - start))
    expected = next(iter(results.values()))
    return {
        "operation": name,
        "forms": {
            key: {
                "milliseconds": [min(values), statistics.median(values), max(values)],
                "difference": float(np.abs(results[key] - expected).max() / np.abs(expected).max()),
            }
            for key, values in times.items()
        },
    }


def table(rows: list[dict]) -> str:
    """Median milliseconds (lowest), and the largest difference from the first form."""
    lines = ["| operation | form: median ms (lowest), difference |", "|---|---|"]
    for row in rows:
        cells = [
            f"{key}: {form['milliseconds'][1]:.1f} ({form['milliseconds'][0]:.1f}), "
            f"{form['difference']:.0e}"
            for key, form in row["forms"].items()
        ]
        lines.append(f"| {row['operation']} | {'; '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_forms"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="tiny shapes, one round")
    arguments = parser.parse_args()
    shapes, points = SMALL if arguments.small else (CONVOLUTIONS, POINTWISE)
    rest = others(2, 5, 4) if arguments.small else [*others(1, 60, 150), *others(4, 30, 150)]
    rows = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for operation in [*convolutions(shapes), *pointwise(points), *rest]:
        rows.append(measure(operation, rounds=1 if arguments.small else arguments.rounds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        (arguments.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        (arguments.output / "results.md").write_text(table(rows))


if __name__ == "__main__":
    main()
