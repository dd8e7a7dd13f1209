"""What to measure first on a GPU, in a few minutes: which convolutions JAX loses time with, and against PyTorch.

    python experiments/gpu_first.py --output=gpu_first [--minutes=4] [--tasks=dilated,pointwise]

where jax and this package (or PYTHONPATH=.) are installed, and torch, if PyTorch is to
be compared. `--small` runs everything on tiny shapes on the CPU in under a minute.

* Part 1: 3x3 convolutions of the dilated stages: forward, input gradient and kernel gradient apart,
  the kernel gradient in four forms, and three convolutions in a row with all gradients. XLA turns
  the kernel gradient of a dilated convolution into a convolution with a window as large as the
  map: is that slow, and which form is not?
* Part 2: 1x1 convolutions as convolutions and as matrix products, with what follows them.
* Part 1 runs a second time with XLA's fusion of convolutions switched on.
* The whole network is measured by `benchmark_gpu.py`, its kernels by `kernel_times.py`.

Every task is a process of its own: XLA reads its flags once, frameworks do not share memory, and
what fails, fails alone. A failure is a line of the report. results.json and results.md are written
again after every line, so a run that is stopped leaves what it measured.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from checkout import commit_of_checkout

from pspnet_jax.models.convolution import batch_to_space, convolve, space_to_batch

CONV_FUSION = "--xla_gpu_experimental_enable_conv_fusion=true"
LARGEST_DIFFERENCE = 1e-4  # between forms of the kernel gradient, relative, float32


@dataclass(frozen=True)
class Sizes:
    """Shapes of everything that is measured, and how often."""

    batch: int
    side: int
    """Of the feature maps."""
    dilated: tuple[tuple[int, int], ...]
    """(channels, dilation)."""
    pointwise: tuple[tuple[int, int], ...]
    """(input, output channels)."""
    repetitions: int
    group_seconds: float
    """Calls are timed in groups that last about this long."""


FULL = Sizes(
    batch=16,
    side=60,
    dilated=((256, 2), (512, 4)),
    pointwise=((1024, 256), (256, 1024)),
    repetitions=7,
    group_seconds=0.03,
)
SMALL = Sizes(
    batch=2,
    side=12,
    dilated=((4, 2),),
    pointwise=((16, 4),),
    repetitions=2,
    group_seconds=0.0,
)


# Rows and timing


def emit(part: int | str, line: str, column: str, **values: object) -> None:
    """Hand a row of the report to the process that collects them."""
    print(json.dumps({"part": part, "line": line, "column": column, **values}), flush=True)


@contextlib.contextmanager
def recorded(part: int, line: str, column: str) -> Iterator[dict]:
    """What is put into the dictionary becomes a row; so does the error that ends the block."""
    values: dict[str, object] = {}
    try:
        yield values
    except Exception as error:  # out of memory, not supported, refused: the other lines still count
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        values = {"error": f"{type(error).__name__}: {first_line}"[:200]}
    emit(part, line, column, **values)


def seconds_per_call(call: Callable[[], object], wait: Callable, sizes: Sizes) -> float:
    """Median over groups of calls that are enqueued together and waited for at their end."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    count = max(1, min(50, int(sizes.group_seconds / once)))
    groups = []
    for _ in range(sizes.repetitions):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        groups.append((time.perf_counter() - start) / count)
    return statistics.median(groups)


def seconds_of_jax(function: Callable, *arguments: jax.Array, sizes: Sizes) -> float:
    """Of one call of the jitted function; compilation is not counted."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return seconds_per_call(lambda: compiled(*arguments), jax.block_until_ready, sizes)


def random_array(shape: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16) -> jax.Array:
    """Normal values; zeros would run faster than data does."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
    return jnp.asarray(values, dtype)


# Part 1: the dilated 3x3 convolutions


def kernel_gradient_default(x: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """As autodiff has it: [3, 3, in, out] from the input and the gradient of the output."""
    kernel = jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    _, transpose = jax.vjp(lambda kernel: convolve(x, kernel, dilation=dilation), kernel)
    return transpose(g)[0]


def kernel_gradient_split(x: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """Of an undilated convolution of the interleaved sub-images: the same sums."""
    return kernel_gradient_default(space_to_batch(x, dilation), space_to_batch(g, dilation), 1)


def convolve_as_on_gpus(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """In the forms that this package takes there, whatever this runs on."""
    return convolve(x, kernel, dilation=dilation, platform="gpu")


def kernel_gradient_of_package(x: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """What autodiff makes of that."""
    kernel = jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.vjp(lambda kernel: convolve_as_on_gpus(x, kernel, dilation), kernel)[1](g)[0]


def kernel_gradient_products(x: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """One matrix product of shifted input and output gradient for each of the nine taps."""
    height, width = g.shape[1:3]
    padded = jnp.pad(x, [(0, 0), (dilation, dilation), (dilation, dilation), (0, 0)])

    def tap(i: int, j: int) -> jax.Array:
        shifted = padded[
            :, i * dilation : i * dilation + height, j * dilation : j * dilation + width
        ]
        return jnp.einsum("nhwi,nhwo->io", shifted, g, preferred_element_type=jnp.float32)

    taps = jnp.stack([jnp.stack([tap(i, j) for j in range(3)]) for i in range(3)])
    return taps.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_with_products(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """A dilated convolution whose kernel gradient is `kernel_gradient_products`."""
    return convolve(x, kernel, dilation=dilation)


def _forward(x: jax.Array, kernel: jax.Array, dilation: int):
    return convolve_with_products(x, kernel, dilation), (x, kernel)


def _backward(dilation: int, saved: tuple[jax.Array, jax.Array], g: jax.Array):
    x, kernel = saved
    return input_gradient(x, kernel, g, dilation), kernel_gradient_products(x, g, dilation)


convolve_with_products.defvjp(_forward, _backward)


def input_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """As autodiff has it."""
    return jax.vjp(lambda x: convolve(x, kernel, dilation=dilation), x)[1](g)[0]


DEFAULT, OURS, STAGE, PRODUCTS = (
    "default",
    "ours: operands split",
    "stage split once",
    "nine matrix products",
)
KERNEL_GRADIENTS = {
    DEFAULT: kernel_gradient_default,
    OURS: kernel_gradient_of_package,
    STAGE: kernel_gradient_split,  # checked with the splitting, timed without it
    PRODUCTS: kernel_gradient_products,
}


def largest_difference(form: str, *, side: int, dilation: int) -> float:
    """Of a form from the default, relative to the largest gradient, in float32 without TF32."""
    x, g = (random_array((2, side, side, c), jnp.float32) for c in (5, 6))
    with jax.default_matmul_precision("highest"):
        expected = kernel_gradient_default(x, g, dilation)
        difference = KERNEL_GRADIENTS[form](x, g, dilation) - expected
    return float(jnp.abs(difference).max() / jnp.abs(expected).max())


def refuse_wrong_form(form: str, *, side: int, dilation: int) -> None:
    """Raise where a form is not the gradient: its speed would mean nothing."""
    difference = largest_difference(form, side=side, dilation=dilation)
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"not timed: differs from the default by {difference:.1e}")


def three_convolutions(form: str, x: jax.Array, kernels: list[jax.Array], dilation: int):
    """Three dilated convolutions with ReLU, with one form of the kernel gradient."""
    convolution = {
        DEFAULT: lambda x, kernel, dilation: convolve(x, kernel, dilation=dilation),
        OURS: convolve_as_on_gpus,
        STAGE: lambda x, kernel, dilation: convolve(x, kernel),
        PRODUCTS: convolve_with_products,
    }[form]
    size = x.shape[1:3]
    x = space_to_batch(x, dilation) if form == STAGE else x
    for kernel in kernels:
        x = jax.nn.relu(convolution(x, kernel, dilation))
    return batch_to_space(x, dilation, size) if form == STAGE else x


def measure_dilated(sizes: Sizes, column: str) -> None:
    """Rows of part 1 by JAX."""
    for channels, dilation in sizes.dilated:
        shape = (sizes.batch, sizes.side, sizes.side, channels)
        x, g, kernel = (
            random_array(shape),
            random_array(shape),
            random_array((3, 3, *shape[3:] * 2)),
        )
        name, flops = f"{channels} channels, d={dilation}", _dilated_flops(sizes, channels)
        seconds = functools.partial(seconds_of_jax, sizes=sizes)
        with recorded(1, f"{name}: forward", column) as row:
            forward = functools.partial(convolve, dilation=dilation)
            row.update(seconds=seconds(forward, x, kernel), flops=flops)
        with recorded(1, f"{name}: input gradient", column) as row:
            gradient = functools.partial(input_gradient, dilation=dilation)
            row.update(seconds=seconds(gradient, x, kernel, g), flops=flops)
        for form in KERNEL_GRADIENTS:
            with recorded(1, f"{name}: kernel gradient, {form}", column) as row:
                refuse_wrong_form(form, side=sizes.side, dilation=dilation)
                row.update(
                    seconds=_kernel_gradient_seconds(form, x, g, dilation, sizes), flops=flops
                )
        for form in KERNEL_GRADIENTS:
            with recorded(1, f"{name}: three in a row, all gradients, {form}", column) as row:
                refuse_wrong_stage(form, side=sizes.side, dilation=dilation)
                stage = functools.partial(_stage_gradients, form, dilation)
                row.update(seconds=seconds(stage, x, [kernel] * 3, g), flops=9 * flops)


def measure_dilated_torch(sizes: Sizes) -> None:
    """Rows of part 1 by PyTorch: what cuDNN itself takes."""
    import torch

    torch.backends.cudnn.benchmark = True
    device = _torch_device()
    for channels, dilation in sizes.dilated:
        shape = (sizes.batch, channels, sizes.side, sizes.side)
        make = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
        x, g = (make(shape).to(memory_format=torch.channels_last) for _ in range(2))
        kernel = make((channels, channels, 3, 3)).to(memory_format=torch.channels_last)
        name, flops = f"{channels} channels, d={dilation}", _dilated_flops(sizes, channels)

        def forward(x=x, kernel=kernel, dilation=dilation):
            return torch.nn.functional.conv2d(x, kernel, padding=dilation, dilation=dilation)

        def backward(mask, g=g, x=x, kernel=kernel, dilation=dilation):
            pair = [dilation, dilation]
            return torch.ops.aten.convolution_backward(
                g, x, kernel, None, [1, 1], pair, pair, False, [0, 0], 1, mask
            )

        calls = {
            "forward": forward,
            "input gradient": functools.partial(backward, [True, False, False]),
            f"kernel gradient, {DEFAULT}": functools.partial(backward, [False, True, False]),
        }
        for operation, call in calls.items():
            with recorded(1, f"{name}: {operation}", "PyTorch") as row:
                row.update(seconds=seconds_per_call(call, _wait_torch, sizes), flops=flops)


def _dilated_flops(sizes: Sizes, channels: int) -> float:
    return 2.0 * sizes.batch * sizes.side**2 * 9 * channels**2


def _kernel_gradient_seconds(form: str, x, g, dilation: int, sizes: Sizes) -> float:
    if form == STAGE:  # the operands of a split stage are split already
        x, g = space_to_batch(x, dilation), space_to_batch(g, dilation)
        gradient = functools.partial(kernel_gradient_default, dilation=1)
    else:
        gradient = functools.partial(KERNEL_GRADIENTS[form], dilation=dilation)
    return seconds_of_jax(gradient, x, g, sizes=sizes)


def _stage_gradients(
    form: str, dilation: int, x: jax.Array, kernels: list[jax.Array], g: jax.Array
):
    y, transpose = jax.vjp(lambda x, k: three_convolutions(form, x, k, dilation), x, kernels)
    return y, transpose(g)


def refuse_wrong_stage(form: str, *, side: int, dilation: int) -> None:
    """Raise where three convolutions of a form do not give what those of the default give.

    A split stage whose side is no multiple of the dilation is wrong from its second convolution on:
    what was filled up is no longer zero.
    """
    x, g = (random_array((1, side, side, 4), jnp.float32) for _ in range(2))
    kernels = [random_array((3, 3, 4, 4), jnp.float32) / 6] * 3
    with jax.default_matmul_precision("highest"):
        expected = jax.tree.leaves(_stage_gradients(DEFAULT, dilation, x, kernels, g))
        values = jax.tree.leaves(_stage_gradients(form, dilation, x, kernels, g))
    pairs = zip(values, expected, strict=True)
    worst = max(float(jnp.abs(v - e).max() / jnp.abs(e).max()) for v, e in pairs)
    if not worst <= LARGEST_DIFFERENCE:
        raise ValueError(f"not timed: differs from the default by {worst:.1e}")


def _torch_device() -> str:
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
    return "cuda" if on_gpu else "cpu"


def _wait_torch(result: object) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Part 2: 1x1 convolutions


def measure_pointwise(sizes: Sizes) -> None:
    """Rows of part 2: the same function as a convolution and as a matrix product."""
    products = {
        "convolution": lambda x, kernel: convolve(x, kernel.reshape(1, 1, *kernel.shape)),
        "einsum": lambda x, kernel: jnp.einsum("nhwi,io->nhwo", x, kernel),
    }
    endings = {
        "alone": lambda y, bias, residual: y,
        "bias, ReLU": lambda y, bias, residual: jax.nn.relu(y + bias),
        "bias, residual, ReLU": lambda y, bias, residual: jax.nn.relu(y + bias + residual),
    }
    for in_channels, out_channels in sizes.pointwise:
        maps = (sizes.batch, sizes.side, sizes.side)
        x, residual, g = (random_array((*maps, c)) for c in (in_channels, *(out_channels,) * 2))
        kernel, bias = (
            random_array((in_channels, out_channels)),
            random_array((1, 1, 1, out_channels)),
        )
        flops = 2.0 * np.prod(maps) * in_channels * out_channels
        for ending, finish in endings.items():
            for column, product in products.items():

                def forward(x, kernel, bias, residual, product=product, finish=finish):
                    return finish(product(x, kernel), bias, residual)

                def training(g, *arguments, forward=forward):
                    y, transpose = jax.vjp(forward, *arguments)
                    return y, transpose(g)

                line, operands = (
                    f"{in_channels} -> {out_channels}, {ending}",
                    (x, kernel, bias, residual),
                )
                with recorded(2, f"{line}: forward", column) as row:
                    row.update(seconds=seconds_of_jax(forward, *operands, sizes=sizes), flops=flops)
                with recorded(2, f"{line}: forward and gradients", column) as row:
                    seconds = seconds_of_jax(training, g, *operands, sizes=sizes)
                    row.update(seconds=seconds, flops=3 * flops)


# Tasks: one process each


@dataclass(frozen=True)
class Task:
    """One process: what it measures, under which XLA flags, for which share of the time at most."""

    run: Callable[[Sizes], None]
    share: float
    columns: tuple[str, ...]
    part: int
    flags: str = ""
    needs_torch: bool = False


def _task(part: int, run: Callable, column: str, share: float, flags: str = "") -> Task:
    return Task(functools.partial(run, column=column), share, (column,), part, flags)


# In this order: what is not reached when the minutes are over matters least.
TASKS = {
    "dilated": _task(1, measure_dilated, "JAX", 0.6),
    "dilated-torch": Task(measure_dilated_torch, 0.25, ("PyTorch",), 1, needs_torch=True),
    "pointwise": Task(measure_pointwise, 0.5, ("convolution", "einsum"), 2),
    "dilated-fusion": _task(1, measure_dilated, "JAX, conv fusion", 0.6, CONV_FUSION),
}


def run_worker(name: str, sizes: Sizes) -> None:
    """The body of a task's process: rows as JSON lines to standard output."""
    task = TASKS[name]
    if task.needs_torch:
        import torch

        is_cuda = _torch_device() == "cuda"
        device = torch.cuda.get_device_name() if is_cuda else platform.machine()
        emit(
            "environment",
            "PyTorch",
            f"torch {torch.__version__}, CUDA {torch.version.cuda}",
            device=device,
        )
    else:
        device = jax.local_devices()[0].device_kind
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]
        emit("environment", "JAX", ", ".join(versions), device=device)
    task.run(sizes)


def run_task(
    name: str, *, small: bool, seconds: float, log: Path, take: Callable[[dict], None]
) -> None:
    """Run a task in a process of its own for at most `seconds`, handing each row to `take`."""
    task = TASKS[name]
    failed = {"part": task.part, "line": "task " + name, "column": task.columns[0]}
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {task.flags}".strip()
    if small:
        environment.setdefault("JAX_PLATFORMS", "cpu")
        environment["XLA_FLAGS"] += (
            " --xla_backend_optimization_level=0"  # compiles in half the time
        )
    command = [sys.executable, __file__, f"--task={name}", *(["--small"] if small else [])]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        for line in process.stdout:
            if line.startswith("{") and line.endswith("}\n"):  # the last one may be cut off
                take(json.loads(line))
        code = process.wait()
        is_over = not timer.is_alive()
        timer.cancel()
    if is_over:
        take(failed | {"error": f"stopped after {seconds:.0f} s"})
    elif code:
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        take(failed | {"error": f"exit status {code}: {last}"[:200]})


# The report


def columns_of(part: int) -> list[str]:
    """The ways to do it that a part compares."""
    return sorted(column for task in TASKS.values() if task.part == part for column in task.columns)


def table(part: int, rows: list[dict], notes: dict[str, str]) -> list[str]:
    """The Markdown table of a part: one line per operation, one column per way to do it."""
    columns = columns_of(part)
    found = {(row["line"], row["column"]): row for row in rows if row["part"] == part}
    text = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for line in dict.fromkeys(line for line, _ in found) or [""]:
        cells = [_cell(found.get((line, column)), notes.get(column, "")) for column in columns]
        text.append(f"| {line} | " + " | ".join(cells) + " |")
    return text


def _cell(row: dict | None, note: str) -> str:
    if row is None:
        return note
    if "error" in row:
        return row["error"].replace("|", "/")
    return f"{row['seconds'] * 1e3:.3f} ms, {row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s"


EXPLANATIONS = {
    1: "3x3 convolutions of the dilated stages. 'stage split once' takes operands that are split"
    " already; 'three in a row' counts the splitting. bfloat16; medians.",
    2: "1x1 convolutions as convolutions and as matrix products. bfloat16; medians.",
}


def write_report(output: Path, report: dict) -> None:
    """results.json with every row, results.md with one table per part."""
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    rows, notes, small = report["rows"], report["notes"], report["small"]
    text = ["# What a GPU says first", ""]
    text += ["Tiny shapes, unoptimized: the numbers below mean nothing.", ""] if small else []
    for row in rows:
        if row["part"] == "environment":
            said = f"{row['line']}: {row['device']}; {row['column']}"
            text += [said, ""] if said not in text else []
    text += [
        f"Commit: {report['commit']}. Python {report['python']}. Sizes: {report['sizes']}.",
        "",
    ]
    for part, explanation in EXPLANATIONS.items():
        text += [f"## Part {part}", "", explanation, "", *table(part, rows, notes), ""]
    (output / "results.md").write_text("\n".join(text))


def run_all(output: Path, names: list[str], *, minutes: float, small: bool) -> None:
    """These tasks in turn until the minutes are over; the report is rewritten after every row."""
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    report = {
        "commit": commit_of_checkout(),
        "python": platform.python_version(),
        "small": small,
        "sizes": str(SMALL if small else FULL),
        "minutes": minutes,
        "notes": {},
        "rows": [],
    }
    devices: dict[bool, str] = {}

    def take(row: dict) -> None:
        if row["part"] == "environment":
            devices[row["line"] == "PyTorch"] = row["device"]
        row["device"] = devices.get("PyTorch" in row["line"] + row["column"], "")
        report["rows"].append(row)
        write_report(output, report)
        milliseconds = f"{row['seconds'] * 1e3:.3f} ms" if "seconds" in row else row["device"]
        said = row.get("error", milliseconds)
        print(f"{row['part']}  {row['column']:<18} {row['line']:<62} {said}", flush=True)

    share_of_all = sum(TASKS[name].share for name in names)
    for name in names:
        task, left = TASKS[name], end - time.monotonic()
        why_not = None
        if task.needs_torch and importlib.util.find_spec("torch") is None:
            why_not = "torch is not installed"
        elif left < 5:
            why_not = f"not reached within {minutes:g} minutes"
        if why_not:
            report["notes"].update(dict.fromkeys(task.columns, why_not))
            print(f"{task.part}  {', '.join(task.columns)}: {why_not}", flush=True)
            continue
        seconds = min(left, max(task.share, task.share / share_of_all) * 60 * minutes)
        run_task(name, small=small, seconds=seconds, log=output / f"{name}.log", take=take)
    write_report(output, report)
    print(f"written: {output / 'results.md'}, {output / 'results.json'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_first"), help="folder")
    parser.add_argument("--minutes", type=float, default=4, help="at most, all together")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--tasks", default=",".join(TASKS), help="in this order; default: all")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run_worker(arguments.task, SMALL if arguments.small else FULL)
        return
    names = arguments.tasks.split(",")
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        parser.error(f"--tasks={','.join(unknown)}: there are {', '.join(TASKS)}")
    run_all(arguments.output, names, minutes=arguments.minutes, small=arguments.small)


if __name__ == "__main__":
    main()
