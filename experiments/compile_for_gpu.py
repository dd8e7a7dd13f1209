"""What XLA makes of PSPNet for an H200, compiled without one: calls of libraries, windows, memory.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION    # jaxlib's version
    python experiments/compile_for_gpu.py --output=compile_for_gpu [--cases=step,inference]

XLA compiles for a GPU that is described to it; neither a GPU nor CUDA's libraries are needed, and
nothing is executed. What is found:

* which convolutions become which call of cuDNN, with the size of their window. A window as large as
  the map is what XLA makes of the kernel gradient of a dilated convolution, if it is left to it;
* which of them take bias, shortcut and ReLU along;
* how many operations the device is sent, and how many of them make something of weights alone, which is the same each time;
* the memory that the program needs: arguments, results and everything between. cuDNN's own working
  memory is not in it, because algorithms are chosen by trying them on a GPU.

results.json holds every call, results.md a table of each case.
"""

import argparse
import collections
import dataclasses
import functools
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pspnet_jax import passes
from pspnet_jax.arrays import Batch
from pspnet_jax.losses import LossOptions, tile_mib_of
from pspnet_jax.models.families import FAMILIES, ModelOptions
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet, is_head
from pspnet_jax.optimizer import poly_schedule, sgd
from pspnet_jax.train_step import create_train_state, make_train_step, split_model

PLUGINS = [(f"jax-cuda{cuda}-plugin", f"jax-cuda{cuda}-pjrt") for cuda in (12, 13)]
H200_BYTES = 141e9  # by the data sheet
NUM_CLASSES = 150
# Algorithms and tiles are chosen by timing them, which needs a GPU. Without that choice Triton takes
# tiles that do not fit every matrix product, so these are left to cuBLAS.
NO_DEVICE = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

# The H200 in the words of XLA's GpuTargetConfigProto. The numbers are those of XLA's own description
# (xla/backends/gpu/target_config/specs/h200.txtpb) but for CUDA's version, 12.9; sizes in bytes.
_H200_DEVICE: dict[str, object] = {
    "cuda_compute_capability": {"major": 9, "minor": 0},
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "memory_bandwidth": 4_800_000_000_000,
    "device_memory_size": 141 * 2**30,
    "l2_cache_size": 50 * 2**20,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_block_limit": 2**16,
    "registers_per_core_limit": 2**16,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_core": 228 * 2**10,
    "runtime_version": "12.9.0",
    "driver_version": "12.9.0",
    "dnn_version": "9.10.0",
}
_H200: dict[str, object] = {
    "platform_name": "CUDA",
    "device_description_str": "NVIDIA H200",
    "gpu_device_info": _H200_DEVICE,
    "dnn_version_info": {"major": 9, "minor": 10, "patch": 0},
}


# The device that is not there


def why_not() -> str | None:
    """What is missing to compile for a GPU; None where nothing is."""
    wanted, found = importlib.metadata.version("jaxlib"), []
    for pair in PLUGINS:
        versions = {name: _installed_version(name) for name in pair}
        if set(versions.values()) == {wanted}:
            return None
        found += [f"{name} {version}" for name, version in versions.items() if version]
    install = " ".join(f"{name}=={wanted}" for name in PLUGINS[0])
    return f"installed are {found} beside jaxlib {wanted}: pip install --no-deps {install}"


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def h200() -> SingleDeviceSharding:
    """A device to compile for."""
    jax.config.update("jax_platforms", "cpu")  # the plugin then does not look for CUDA's libraries
    jax.config.update("jax_enable_compilation_cache", False)  # seconds are reported
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_protobuf_text(_H200), topology="1x1x1"
    )
    return SingleDeviceSharding(topology.devices[0])


def _protobuf_text(fields: dict[str, Any]) -> str:
    """{'a': 1, 'b': {'c': 'x'}} -> 'a: 1 b { c: "x" }'."""
    return " ".join(
        f"{name} {{ {_protobuf_text(value)} }}"
        if isinstance(value, dict)
        else f"{name}: {json.dumps(value)}"
        for name, value in fields.items()
    )


# What is compiled


@dataclass(frozen=True)
class Case:
    """A network and what is done with it, on square crops.

    Args:
        what: 'step' (8-bit images and labels -> the next state) or 'inference' (8-bit images -> logits at
            image size).
        platform: of `PSPNet`.
        dtype: what maps are computed in.
        tile_mib: of `LossOptions`.
        is_prepared: whether weights of inference are `passes.prepare`d, as those of a `Segmenter` are.
    """

    what: str
    batch: int
    backbone: str = "resnet50"
    width: int = 64
    crop: int = 473
    platform: str | None = "gpu"
    dtype: str = "bfloat16"
    remat: bool = False
    tile_mib: float | None = tile_mib_of("gpu")
    is_prepared: bool = True


CASES = {
    "step": Case("step", batch=16),
    "step_float32": Case("step", batch=16, dtype="float32"),
    "step_remat": Case("step", batch=16, remat=True),
    "step_resnet101": Case("step", batch=16, backbone="resnet101"),
    "step_tiles": Case("step", batch=16, tile_mib=64),
    "step_remat_tiles": Case("step", batch=16, remat=True, tile_mib=64),
    "step_narrow_plain": Case("step", batch=2, width=8, platform=None),
    "inference": Case("inference", batch=16),
    "inference_one": Case("inference", batch=1),
    "inference_one_unprepared": Case("inference", batch=1, is_prepared=False),
    "inference_plain": Case("inference", batch=16, platform=None),
    "inference_narrow_plain": Case("inference", batch=2, width=8, platform=None),
}


def options_of(case: Case) -> ModelOptions:
    """The authors' network."""
    given = {"family": "semseg", "backbone": case.backbone, "width": case.width}
    given |= {"dtype": case.dtype, "remat": case.remat, "frozen_norm": False}
    return ModelOptions.resolve(given)


def step_of(case: Case) -> tuple[Callable, tuple]:
    """The training step, and the shapes of state and batch."""
    rng, options = NoRandomNumbers(), options_of(case)
    model = nnx.eval_shape(lambda: PSPNet(options, NUM_CLASSES, rng=rng, platform=case.platform))
    schedule = poly_schedule(0.01, power=0.9, num_steps=100_000)
    optimizer = sgd(
        schedule, momentum=0.9, weight_decay=1e-4, head_multiplier=10.0, is_head=is_head
    )
    step = make_train_step(
        model, optimizer, schedule, loss=LossOptions(aux_weight=0.4, tile_mib=case.tile_mib), seed=0
    )
    graphdef, *values = split_model(model)
    state = jax.eval_shape(
        lambda *values: create_train_state(nnx.merge(graphdef, *values), optimizer), *values
    )
    pixels = (case.batch, case.crop, case.crop)
    batch = Batch(
        images=jax.ShapeDtypeStruct((*pixels, 3), jnp.uint8),
        labels=jax.ShapeDtypeStruct(pixels, jnp.uint8),
        index=jax.ShapeDtypeStruct(pixels[:1], jnp.int32),
        valid=jax.ShapeDtypeStruct(pixels[:1], jnp.bool_),
    )
    return jax.jit(step, donate_argnums=0), (state, batch)


def inference_of(case: Case) -> tuple[Callable, tuple]:
    """What `Segmenter.logits` runs, and the shapes of weights and images."""
    options, normalization = options_of(case), FAMILIES["semseg"].normalization
    network = passes.Network(options, NUM_CLASSES, normalization, case.platform)
    weights = passes.structure(network)[1:]
    if case.is_prepared:
        weights = jax.eval_shape(functools.partial(passes.prepare, network=network), weights)
    images = jax.ShapeDtypeStruct((case.batch, case.crop, case.crop, 3), jnp.uint8)
    return jax.jit(functools.partial(passes.logits, network=network)), (weights, images)


def compile_case(case: Case, device: SingleDeviceSharding) -> dict[str, Any]:
    """Its library calls, memory in bytes and seconds of compilation."""
    function, shapes = {"step": step_of, "inference": inference_of}[case.what](case)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    start = time.perf_counter()
    compiled = function.lower(*placed).compile(compiler_options=NO_DEVICE)
    seconds, text = time.perf_counter() - start, compiled.as_text()
    return {
        "seconds": seconds,
        "memory": memory_of(compiled.memory_analysis()),
        "operations": operations(text),
        "calls": [dataclasses.asdict(call) for call in library_calls(text)],
    }


# What came out


@dataclass(frozen=True)
class Call:
    """A call of cuDNN or cuBLAS in a compiled program.

    Args:
        kind: a value of `KINDS`, or XLA's own name for the call.
        window: (height, width) of what is moved over the map; for a kernel gradient, of the kernel.
        stride, dilation: of the window.
        activation: XLA's name for what follows inside the call; 'None' for nothing.
        has_shortcut: another map is added inside.
        result: element type and shape, as 'bf16[16,60,60,256]'.
        operation: where it comes from, as JAX names it.
    """

    kind: str
    window: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    activation: str
    has_shortcut: bool
    result: str
    operation: str


CONVOLUTION, FUSED = "convolution", "convolution, bias, activation"
INPUT_GRADIENT, KERNEL_GRADIENT = "input gradient", "kernel gradient"
MATRIX_PRODUCT = "matrix product"
KINDS = {
    "__cudnn$convForward": CONVOLUTION,
    "__cudnn$convBiasActivationForward": FUSED,
    "__cudnn$convBackwardInput": INPUT_GRADIENT,
    "__cudnn$convBackwardFilter": KERNEL_GRADIENT,
    "__cublas$gemm": MATRIX_PRODUCT,
    "__cublas$lt$matmul": MATRIX_PRODUCT,
}


def library_calls(text: str) -> list[Call]:
    """Of a compiled program, in XLA's notation."""
    return [
        _call(line, target[1])
        for line in text.splitlines()
        if (target := re.search(r'custom_call_target="(__cu[^"]*)"', line))
    ]


NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done"}
"""Opcodes that only name what is there, or wait for it."""


def operations(text: str) -> dict[str, int]:
    """Of the main computation of a compiled program, in XLA's notation: kernels, calls of libraries, copies.

    Returns:
        'all' of them; 'of_weights': those that depend on arguments, but not on one with images in its name.
    """
    main = text[text.index("\nENTRY ") :]
    line = re.compile(
        r"^ +(?:ROOT )?%(\S+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)", re.MULTILINE
    )
    sources: dict[str, set[str]] = {}  # name -> what it depends on, of 'weights' and 'images'
    counts = {"all": 0, "of_weights": 0}
    for name, opcode, operands in line.findall(main):
        if opcode == "parameter":
            sources[name] = {"images" if "images" in name else "weights"}
        else:
            known = (sources.get(x, set()) for x in re.findall(r"%([^\s,()]+)", operands))
            sources[name] = set().union(*known)
        if opcode not in NOTHING:
            counts["all"] += 1
            counts["of_weights"] += sources[name] == {"weights"}
    return counts


def _call(line: str, target: str) -> Call:
    def found(pattern: str, otherwise: str) -> str:
        match = re.search(pattern, line)
        return match[1] if match else otherwise

    def pair(name: str) -> tuple[int, int]:
        # XLA leaves out what is 1 everywhere.
        height, width = found(rf"window={{[^}}]*\b{name}=(\d+x\d+)", "1x1").split("x")
        return int(height), int(width)

    return Call(
        kind=KINDS.get(target, target),
        window=pair("size"),
        stride=pair("stride"),
        dilation=pair("rhs_dilate"),
        activation=found(r'"activation_mode":"k(\w+)"', "None"),
        has_shortcut=float(found(r'"side_input_scale":([\d.e+-]+)', "0")) != 0,
        result=found(r" = \(?(\w+\[[\d,]*\])", ""),
        operation=found(r'op_name="([^"]*)"', ""),
    )


def memory_of(analysis: Any) -> dict[str, int]:
    """Bytes of the parts of a compiled program's memory, and 'needed' for all of them together."""
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "results": analysis.output_size_in_bytes,
        "shared": analysis.alias_size_in_bytes,  # results that lie where arguments lay
        "temporary": analysis.temp_size_in_bytes,
    }
    needed = parts["arguments"] + parts["results"] - parts["shared"] + parts["temporary"]
    return {**parts, "needed": needed}


# The report


def write_report(output: Path, report: dict[str, Any]) -> None:
    """results.json with every call, results.md with a line and a table of each case."""
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    text = [
        "# PSPNet compiled for an H200, without one",
        "",
        f"jax {report['jax']}, plugin of XLA {report['jaxlib']}. Nothing was executed.",
        "",
        "| case | needed GB | temporary GB | operations: all, of weights alone | largest window | compile s |",
        "|---|---|---|---|---|---|",
    ]
    done = {name: row for name, row in report["cases"].items() if "error" not in row}
    for name, row in done.items():
        memory = " | ".join(f"{row['memory'][key] / 1e9:.2f}" for key in ("needed", "temporary"))
        largest = max((max(call["window"]) for call in row["calls"]), default=0)
        counts = f"{row['operations']['all']}, {row['operations']['of_weights']}"
        text.append(f"| {name} | {memory} | {counts} | {largest} | {row['seconds']:.0f} |")
    text += [
        f"| {name} | {row['error']} |" for name, row in report["cases"].items() if "error" in row
    ]
    for name, row in done.items():
        text += ["", f"## {name}", "", f"{row['case']}", "", *_table(row["calls"])]
    (output / "results.md").write_text("\n".join(text) + "\n")


def _table(calls: list[dict[str, Any]]) -> list[str]:
    """One line for each kind of call."""
    columns = ("kind", "window", "stride", "dilation", "activation", "has_shortcut")
    counts = collections.Counter(tuple(call[column] for column in columns) for call in calls)
    text = ["| count | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key, count in sorted(counts.items()):
        cells = ("x".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for v in key)
        text.append(f"| {count} | " + " | ".join(cells) + " |")
    return text


def run(output: Path, names: Sequence[str]) -> None:
    """Compile the named cases one after the other; the report is rewritten after each."""
    output.mkdir(parents=True, exist_ok=True)
    device = h200()
    report: dict[str, Any] = {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "cases": {},
    }
    for name in names:
        row: dict[str, Any] = {"case": str(CASES[name])}
        try:
            row |= compile_case(CASES[name], device)
        except jax.errors.JaxRuntimeError as error:  # the other cases still count
            row["error"] = str(error).splitlines()[0].replace("|", "/")[:300]
        report["cases"][name] = row
        write_report(output, report)
        print(f"{name}: {row.get('error') or row['memory']}", flush=True)
    print(f"written: {output / 'results.md'}, {output / 'results.json'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("compile_for_gpu"), help="folder")
    parser.add_argument("--cases", default=",".join(CASES), help="some of: %(default)s")
    arguments = parser.parse_args()
    names = arguments.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"--cases={','.join(unknown)} is not one of {', '.join(CASES)}")
    if why_not():
        parser.error(f"nothing to compile with: {why_not()}")
    run(arguments.output, names)


if __name__ == "__main__":
    main()
