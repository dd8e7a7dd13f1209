"""Forms of the same operation beside each other: the measurements behind `models/convolution` and its like.

    python experiments/benchmark_forms.py --output=runs/benchmark_forms [--only=WORDS] [--small]

Every row is one operation at the shape it has in PSPNet-50 (473 crop at batch 1, 233 crop at batch 4), every
column a form of it; forms take turns, there and back, nine rounds, on the machine at hand in float32. "Value" is the forward pass,
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
from pspnet_jax.resample import adaptive_average_pool, resize

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


def pools(batch: int, side: int) -> list[Operation]:
    """The max pool of the stem, of maps of 4 `side` - 3, and the pyramid's finest bins, of maps of `side`."""
    pooled = random(batch, 4 * side - 3, 4 * side - 3, 128)
    maps = random(batch, side, side, 2048)

    def windows(x: jax.Array) -> jax.Array:
        window, padding = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), padding)

    def nine(x: jax.Array) -> jax.Array:
        size = x.shape[1]
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        pixels = [x[:, i : i + size : 2, j : j + size : 2] for i in range(3) for j in range(3)]
        return functools.reduce(jnp.maximum, pixels)

    def at_once(x: jax.Array) -> jax.Array:
        count, size, _, channels = x.shape
        cell = size // 6
        return x.reshape(count, 6, cell, 6, cell, channels).mean(axis=(2, 4))

    values = {"XLA's windows": windows, "nine at once": nine, "axis after axis": max_pool}
    sums = {
        key: jax.grad(lambda x, f=form: jnp.sum(f(x) ** 2))
        for key, form in {"XLA's gradient": windows, "without scatter": max_pool}.items()
    }
    bins = {"at once": at_once, "in two steps": lambda x: adaptive_average_pool(x, 6)}
    name = f"max pool of {batch} x {4 * side - 3}, 128 channels"
    return [
        (f"{name}: value", values, (pooled,)),
        (f"{name}: value and gradient", sums, (pooled,)),
        (f"average pool of {batch} x {side} to 6, 2048 channels", bins, (maps,)),
    ]


PLATFORMS = {"one product": None, "for CPUs": "cpu", "for GPUs": "gpu"}


def resizing(batch: int, side: int, new_side: int, channels: int) -> list[Operation]:
    """Value and gradient of a bilinear resizing."""
    maps = random(batch, side, side, channels)
    stretch = functools.partial(resize, size=(new_side, new_side), align_corners=True)
    values = {key: functools.partial(stretch, platform=each) for key, each in PLATFORMS.items()}
    gradients = {
        key: jax.grad(lambda x, f=form: jnp.sum(f(x) ** 2)) for key, form in values.items()
    }
    name = f"resizing {batch} x {side} to {new_side}, {channels} channels"
    return [(f"{name}: value", values, (maps,)), (f"{name}: gradient", gradients, (maps,))]


def stretched_loss(batch: int, side: int, num_classes: int) -> list[Operation]:
    """The loss of logits of `side` at 8 (side - 1) + 1, with its gradient."""
    size = 8 * (side - 1) + 1
    logits = random(batch, side, side, num_classes)
    labels = np.random.default_rng(3).integers(0, num_classes, (batch, size, size), np.uint8)

    def loss(logits: jax.Array, *, tile_mib: float | None, platform: str | None) -> jax.Array:
        options = LossOptions(tile_mib=tile_mib)
        return stretched_cross_entropy(
            logits, jnp.asarray(labels), options, align_corners=True, platform=platform
        )

    at_once = {
        f"at once, {key}": functools.partial(loss, tile_mib=None, platform=each)
        for key, each in PLATFORMS.items()
    }
    in_tiles = {
        f"tiles of {mib:.0f} MiB": functools.partial(loss, tile_mib=mib, platform="cpu")
        for mib in (64.0, 16.0, 4.0, 1.0)
    }
    gradients = {key: jax.grad(function) for key, function in (at_once | in_tiles).items()}
    return [(f"loss of {batch} x {side} at {size}, {num_classes} classes", gradients, (logits,))]


def measure(operation: Operation, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of each form (low, median, high), and how far its result is from the first one's."""
    name, forms, arguments = operation
    compiled = {key: jax.jit(form).lower(*arguments).compile() for key, form in forms.items()}
    results = {key: np.asarray(run(*arguments)) for key, run in compiled.items()}
    times: dict[str, list[float]] = {key: [] for key in compiled}
    for number in range(rounds):
        # There and back: what runs before a form leaves it the caches.
        for key, run in list(compiled.items())[:: 1 if number % 2 else -1]:
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
    parser.add_argument("--only", default="", help="operations whose names have this in them")
    parser.add_argument("--small", action="store_true", help="tiny shapes, one round")
    arguments = parser.parse_args()
    shapes, points = SMALL if arguments.small else (CONVOLUTIONS, POINTWISE)
    rest = [(2, 6, 4)] if arguments.small else [(1, 60, 150), (4, 30, 150)]
    operations = [*convolutions(shapes), *pointwise(points)]
    for batch, side, num_classes in rest:
        operations += pools(batch, side)
        operations += resizing(batch, side, 8 * (side - 1) + 1, num_classes)
        operations += resizing(batch, side, 2 * side, 1024)
        operations += stretched_loss(batch, side, num_classes)
    operations = [each for each in operations if arguments.only in each[0]]
    if not operations:
        parser.error(f"--only={arguments.only}: no operation has this in its name, such as 'pool'")
    rows = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for operation in operations:
        rows.append(measure(operation, rounds=1 if arguments.small else arguments.rounds))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        (arguments.output / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        (arguments.output / "results.md").write_text(table(rows))


if __name__ == "__main__":
    main()
