"""What to measure first on a GPU, in about ten minutes: where JAX loses time, and against PyTorch.

    python experiments/gpu_first.py --output=gpu_first [--minutes=12] [--tasks=dilated,pointwise]

where jax, flax, optax and this package (or PYTHONPATH=.) are installed, and torch, if PyTorch is to
be compared. `--small` runs everything on tiny shapes on the CPU in under a minute.

* Part 1: 3x3 convolutions of the dilated stages: forward, input gradient and kernel gradient apart,
  the kernel gradient in four forms, and three convolutions in a row with all gradients. XLA turns
  the kernel gradient of a dilated convolution into a convolution with a window as large as the
  map: is that slow, and which form is not?
* Part 2: 1x1 convolutions as convolutions and as matrix products, with what follows them.
* Part 3: the whole network, forward and training step, beside `pspnet_torch.py` (eager, compiled).
* Parts 1 and 3 run a second time with XLA's fusion of convolutions switched on.

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
from flax import nnx

from pspnet_jax.arrays import Batch
from pspnet_jax.losses import LossOptions, tile_mib_of
from pspnet_jax.models.convolution import batch_to_space, convolve, space_to_batch
from pspnet_jax.models.families import ModelOptions
from pspnet_jax.models.pspnet import PSPNet, is_head
from pspnet_jax.optimizer import poly_schedule, sgd
from pspnet_jax.resample import resize
from pspnet_jax.train_step import create_train_state, make_train_step, split_model

CONV_FUSION = "--xla_gpu_experimental_enable_conv_fusion=true"
H200_BFLOAT16_FLOPS = 989e12  # per second, dense, by the data sheet
# Multiply-accumulates of PSPNet-50 with 150 classes, per image of 473 x 473.
FORWARD_MACS, AUX_MACS = 161.9e9, 8.6e9
LARGEST_DIFFERENCE = 1e-4  # between forms of the kernel gradient, relative, float32


@dataclass(frozen=True)
class Sizes:
    """Shapes of everything that is measured, and how often."""

    batch: int
    side: int
    """Of the feature maps of parts 1 and 2."""
    dilated: tuple[tuple[int, int], ...]
    """(channels, dilation)."""
    pointwise: tuple[tuple[int, int], ...]
    """(input, output channels)."""
    backbone: str
    width: int
    crop: int
    num_classes: int
    forward_batches: tuple[int, ...]
    step_batches: tuple[int, ...]
    repetitions: int
    group_seconds: float
    """Calls are timed in groups that last about this long."""


FULL = Sizes(
    batch=16,
    side=60,
    dilated=((256, 2), (512, 4)),
    pointwise=((1024, 256), (256, 1024)),
    backbone="resnet50",
    width=64,
    crop=473,
    num_classes=150,
    forward_batches=(1, 16),
    step_batches=(16, 32),
    repetitions=7,
    group_seconds=0.03,
)
SMALL = Sizes(
    batch=2,
    side=12,
    dilated=((4, 2),),
    pointwise=((16, 4),),
    backbone="resnet10",
    width=4,
    crop=33,
    num_classes=5,
    forward_batches=(1,),
    step_batches=(2,),
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


def with_kernel_gradient(gradient: Callable) -> Callable:
    """A dilated convolution (x, kernel, dilation) -> y whose kernel gradient is computed so."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def convolution(x, kernel, dilation):
        return convolve(x, kernel, dilation=dilation)

    def forward(x, kernel, dilation):
        return convolution(x, kernel, dilation), (x, kernel)

    def backward(dilation, saved, g):
        x, kernel = saved
        return input_gradient(x, kernel, g, dilation), gradient(x, g, dilation)

    convolution.defvjp(forward, backward)
    return convolution


def input_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """As autodiff has it."""
    return jax.vjp(lambda x: convolve(x, kernel, dilation=dilation), x)[1](g)[0]


def kernel_gradient_custom(x: jax.Array, g: jax.Array, dilation: int) -> jax.Array:
    """What autodiff makes of the convolution with a custom gradient."""
    kernel = jnp.zeros((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    convolution = with_kernel_gradient(kernel_gradient_split)
    return jax.vjp(lambda kernel: convolution(x, kernel, dilation), kernel)[1](g)[0]


DEFAULT, CUSTOM, STAGE, PRODUCTS = (
    "default",
    "custom gradient, operands split",
    "stage split once",
    "nine matrix products",
)
KERNEL_GRADIENTS = {
    DEFAULT: kernel_gradient_default,
    CUSTOM: kernel_gradient_custom,
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
        DEFAULT: with_kernel_gradient(kernel_gradient_default),
        CUSTOM: with_kernel_gradient(kernel_gradient_split),
        STAGE: lambda x, kernel, dilation: convolve(x, kernel),
        PRODUCTS: with_kernel_gradient(kernel_gradient_products),
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


# Part 3: the whole network


def random_batch(sizes: Sizes, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[batch, height, width, 3] and labels u8[batch, height, width], some ignored."""
    rng, shape = np.random.default_rng(0), (batch_size, sizes.crop, sizes.crop)
    images = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = rng.integers(0, sizes.num_classes, shape, dtype=np.uint8)
    return images, np.where(rng.random(shape) < 0.1, np.uint8(255), labels)


def make_model(sizes: Sizes, *, is_plain: bool) -> PSPNet:
    """The authors' network in bfloat16, in the forms of this device or the plain ones."""
    given = {"family": "semseg", "backbone": sizes.backbone, "width": sizes.width}
    given |= {"dtype": "bfloat16", "remat": False, "frozen_norm": False}
    options = ModelOptions.resolve(dict.fromkeys(ModelOptions.__dataclass_fields__) | given)
    platform = None if is_plain else jax.default_backend()
    return PSPNet(options, sizes.num_classes, rng=np.random.default_rng(0), platform=platform)


def measure_network(sizes: Sizes, column: str, *, is_plain: bool = False) -> None:
    """Rows of part 3 by JAX, from small to large: the peak of memory is that of the process."""
    make = functools.partial(make_model, sizes, is_plain=is_plain)
    for batch_size in sizes.forward_batches:
        with recorded(3, f"forward, batch {batch_size}", column) as row:
            row.update(images=batch_size, **_forward_of_jax(make(), sizes, batch_size))
    for batch_size in sizes.step_batches:
        with recorded(3, f"training step, batch {batch_size}", column) as row:
            row.update(images=batch_size, **_step_of_jax(make(), sizes, batch_size))


def _forward_of_jax(model: PSPNet, sizes: Sizes, batch_size: int) -> dict[str, object]:
    """Normalized images -> logits at image size."""
    graphdef, params, batch_stats = split_model(model)
    images = random_array((batch_size, sizes.crop, sizes.crop, 3), jnp.float32)

    def forward(params, batch_stats, images):
        outputs = nnx.merge(graphdef, params, batch_stats)(images, train=False)
        return resize(outputs.logits, images.shape[1:3], align_corners=True)

    compiled, compilation = _compile_jax(jax.jit(forward), params, batch_stats, images)
    call = functools.partial(compiled, params, batch_stats, images)
    seconds = seconds_per_call(call, jax.block_until_ready, sizes)
    return {"seconds": seconds, **compilation, **_peak_of_jax()}


def _step_of_jax(model: PSPNet, sizes: Sizes, batch_size: int) -> dict[str, object]:
    """8-bit images and labels -> the next state: both losses, all gradients, SGD."""
    schedule = poly_schedule(0.01, power=0.9, num_steps=100_000)
    optimizer = sgd(
        schedule, momentum=0.9, weight_decay=1e-4, head_multiplier=10.0, is_head=is_head
    )
    loss = LossOptions(aux_weight=0.4, tile_mib=tile_mib_of(jax.default_backend()))
    step = make_train_step(model, optimizer, schedule, loss=loss, seed=0)
    state = create_train_state(model, optimizer)
    images, labels = random_batch(sizes, batch_size)
    index, valid = np.arange(batch_size, dtype=np.int32), np.ones(batch_size, bool)
    batch = jax.device_put(Batch(images, labels, index, valid))
    compiled, compilation = _compile_jax(jax.jit(step, donate_argnums=0), state, batch)

    def call():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    seconds = seconds_per_call(call, jax.block_until_ready, sizes)
    skipped = {"skipped_steps": int(state.skipped_steps)}  # above 0 something is wrong
    return {"seconds": seconds, **compilation, **_peak_of_jax(), **skipped}


def _compile_jax(function: Callable, *arguments: object) -> tuple[Callable, dict[str, object]]:
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    values: dict[str, object] = {"compile_seconds": time.perf_counter() - start}
    plan = compiled.memory_analysis()
    if plan is not None:
        needed = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        values["planned_bytes"] = needed - plan.alias_size_in_bytes
    return compiled, values


def _peak_of_jax() -> dict[str, object]:
    statistics_of_device = jax.local_devices()[0].memory_stats() or {}
    return {"peak_bytes": statistics_of_device.get("peak_bytes_in_use")}


def measure_network_torch(sizes: Sizes) -> None:
    """Rows of part 3 by PyTorch, eager and, on CUDA, compiled."""
    import torch

    torch.backends.cudnn.benchmark = True
    measured = {"forward": sizes.forward_batches, "training step": sizes.step_batches}
    make_call = {"forward": _forward_of_torch, "training step": _step_of_torch}
    for column in ("PyTorch eager", "PyTorch compiled"):
        for operation, batch_sizes in measured.items():
            for batch_size in batch_sizes:
                with recorded(3, f"{operation}, batch {batch_size}", column) as row:
                    is_compiled = column == "PyTorch compiled"
                    if is_compiled and _torch_device() == "cpu":
                        raise RuntimeError("compiled on CUDA only")
                    call = make_call[operation](sizes, batch_size, is_compiled=is_compiled)
                    row.update(images=batch_size, **_measure_torch(call, sizes))


def _measure_torch(call: Callable[[], object], sizes: Sizes) -> dict[str, object]:
    import torch

    is_cuda = _torch_device() == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    _wait_torch(call())
    first_call = time.perf_counter() - start
    seconds = seconds_per_call(call, _wait_torch, sizes)
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    return {"seconds": seconds, "compile_seconds": first_call - seconds, "peak_bytes": peak}


def _model_of_torch(sizes: Sizes):
    import pspnet_torch
    import torch

    model = pspnet_torch.PSPNet(sizes.backbone, sizes.num_classes, width=sizes.width)
    return model.to(_torch_device(), memory_format=torch.channels_last)


def _compile_torch(function: Callable, *, is_compiled: bool) -> Callable:
    import torch

    if not is_compiled:
        return function
    torch.compiler.reset()  # else a second batch size would be compiled for any batch size
    return torch.compile(function, dynamic=False)


def _forward_of_torch(sizes: Sizes, batch_size: int, *, is_compiled: bool) -> Callable[[], object]:
    import torch

    device = _torch_device()
    model = _model_of_torch(sizes).eval()
    images = torch.randn((batch_size, 3, sizes.crop, sizes.crop), device=device)
    images = images.to(memory_format=torch.channels_last)
    run = _compile_torch(model, is_compiled=is_compiled)

    def call():
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            return run(images)[0]

    return call


def _step_of_torch(sizes: Sizes, batch_size: int, *, is_compiled: bool) -> Callable[[], object]:
    import pspnet_torch
    import torch

    device = _torch_device()
    model = _model_of_torch(sizes).train()
    optimizer = pspnet_torch.make_sgd(model)
    images, labels = (torch.from_numpy(a).to(device) for a in random_batch(sizes, batch_size))
    labels, steps_done = labels.long(), 0

    def loss_of(images, labels):
        with torch.autocast(device, torch.bfloat16):
            outputs = model(pspnet_torch.normalize(images))
            return pspnet_torch.segmentation_loss(*outputs, labels)[0]

    run = _compile_torch(loss_of, is_compiled=is_compiled)

    def call():
        nonlocal steps_done
        pspnet_torch.set_poly_learning_rate(optimizer, steps_done, num_steps=100_000)
        loss = run(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps_done += 1
        return loss

    return call


def _torch_device() -> str:
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
    return "cuda" if on_gpu else "cpu"


def _wait_torch(result: object) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    "dilated": _task(1, measure_dilated, "JAX", 0.25),
    "dilated-torch": Task(measure_dilated_torch, 0.1, ("PyTorch",), 1, needs_torch=True),
    "network": _task(3, measure_network, "JAX", 0.4),
    "network-torch": Task(
        measure_network_torch, 0.4, ("PyTorch eager", "PyTorch compiled"), 3, needs_torch=True
    ),
    "network-plain": _task(
        3, functools.partial(measure_network, is_plain=True), "JAX, plain forms", 0.3
    ),
    "pointwise": Task(measure_pointwise, 0.2, ("convolution", "einsum"), 2),
    "dilated-fusion": _task(1, measure_dilated, "JAX, conv fusion", 0.25, CONV_FUSION),
    "network-fusion": _task(3, measure_network, "JAX, conv fusion", 0.4, CONV_FUSION),
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
        versions = [
            f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax")
        ]
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
    else:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile seconds are measured
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
    """The Markdown table of parts 1 and 2: one line per operation, one column per way to do it."""
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


def network_table(rows: list[dict], notes: dict[str, str], *, small: bool) -> list[str]:
    """The Markdown table of part 3: one line per operation and framework."""
    titles = "images/s, of PyTorch's best, ms, peak GiB, planned GiB, compile s, of 989 TFLOP/s"
    text = ["| | by | " + titles.replace(", ", " | ") + " |", "|---" * 9 + "|"]
    rows = [row for row in rows if row["part"] == 3]
    for line in dict.fromkeys(row["line"] for row in rows) or [""]:
        same = sorted((row for row in rows if row["line"] == line), key=lambda row: row["column"])
        rates = [
            _rate(row) for row in same if row["column"].startswith("PyTorch") and "images" in row
        ]
        for row in same:
            cells = _network_cells(row, max(rates, default=None), small=small)
            text.append(f"| {line} | {row['column']} | " + " | ".join(cells) + " |")
        missing = set(columns_of(3)) & set(notes) - {row["column"] for row in same}
        text += [f"| {line} | {column} | {notes[column]} |" for column in sorted(missing)]
    return text


def _rate(row: dict) -> float:
    return row["images"] / row["seconds"]


def _network_cells(row: dict, best_of_torch: float | None, *, small: bool) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "/"), *[""] * 6]
    rate = _rate(row)
    macs = FORWARD_MACS if row["line"].startswith("forward") else 3 * (FORWARD_MACS + AUX_MACS)
    is_known = not small and "H200" in row.get("device", "")
    share = 2 * macs * rate / H200_BFLOAT16_FLOPS

    def gibibytes(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key] / 2**30:.2f}"

    return [
        f"{rate:.1f}",
        f"{rate / best_of_torch:.2f}" if best_of_torch else "",
        f"{row['seconds'] * 1e3:.2f}",
        gibibytes("peak_bytes"),
        gibibytes("planned_bytes"),
        f"{row['compile_seconds']:.1f}",
        f"{share:.1%}" if is_known else "",
    ]


EXPLANATIONS = {
    1: "3x3 convolutions of the dilated stages. 'stage split once' takes operands that are split"
    " already; 'three in a row' counts the splitting. bfloat16; medians.",
    2: "1x1 convolutions as convolutions and as matrix products. bfloat16; medians.",
    3: "PSPNet: forward = normalized images to logits at image size; training step = 8-bit images"
    " to the next state. Peak = of the device's allocator (JAX: of the process so far, lines in"
    " ascending order); planned = by XLA's compiler; compile = PyTorch's first call less one call.",
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
        made = network_table(rows, notes, small=small) if part == 3 else table(part, rows, notes)
        text += [f"## Part {part}", "", explanation, "", *made, ""]
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
    parser.add_argument("--minutes", type=float, default=12, help="at most, all together")
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
