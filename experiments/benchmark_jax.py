"""Our side of `benchmark.py`: the network of its device and the plain one, compiled for one shape."""

import dataclasses
import functools
import importlib.metadata
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import benchmark_counts
import jax
import jax.numpy as jnp
import numpy as np
from benchmark_worker import (
    SCALES,
    WIDE,
    Prepared,
    Task,
    best_rate,
    its_turn,
    random_batch,
    random_image,
)

from pspnet_jax import parallel, passes, programs, protocols
from pspnet_jax.arrays import Batch
from pspnet_jax.catalog import load_label_set
from pspnet_jax.compose import jit_over_mesh
from pspnet_jax.config import default_config
from pspnet_jax.losses import LossOptions, tile_mib_of
from pspnet_jax.models.families import FAMILIES, ModelOptions
from pspnet_jax.models.pspnet import PSPNet, is_head
from pspnet_jax.optimizer import poly_schedule, sgd
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.stored_model import Description
from pspnet_jax.train_step import TrainState, create_train_state, make_train_step, split_model

PLAIN = "ours, plain"


def prepare(task: Task) -> Prepared:
    """By what the task asks for."""
    return {
        "forward": forward,
        "training step": training_step,
        "collectives": collectives,
        "evaluation": evaluation,
        "matrix product": matrix_product,
        "data": data,
        "counts": counts,
        "profile of forward": profile,
        "profile of training step": profile,
    }[task.what](task)


def make_options(task: Task) -> ModelOptions:
    """The authors' network."""
    given = {"family": "semseg", "backbone": task.backbone, "width": task.width}
    return ModelOptions.resolve(given | {"dtype": task.dtype, "remat": False, "frozen_norm": False})


def make_model(task: Task) -> PSPNet:
    """With the operations of the device, or plain ones."""
    rng = np.random.default_rng(0)
    return PSPNet(make_options(task), task.num_classes, rng=rng, platform=platform_of(task))


def platform_of(task: Task) -> str | None:
    """Of the operations; None is the plain form of each."""
    return None if task.column == PLAIN else task.platform


def make_loss(task: Task) -> LossOptions:
    """The authors' losses, computed as training computes them by default."""
    section = default_config().loss
    names = {field.name for field in dataclasses.fields(LossOptions)} & set(section)
    values = {name: section[name] for name in names}
    chosen = {"tile_mib": tile_mib_of(task.platform), "aux_weight": 0.4, "presence_weight": 0.0}
    return LossOptions(**values | chosen)


def forward(task: Task) -> Prepared:
    """Normalized float32 images -> logits at image size, as `Segmenter.logits` makes them.

    They are rounded to what is computed in, which is what PyTorch's autocast gives; on a CPU both are float32.
    """
    options = make_options(task)
    normalization = FAMILIES[options.family].normalization
    network = passes.Network(options, task.num_classes, normalization, platform_of(task))
    weights = passes.prepare(split_model(make_model(task))[1:], network=network)
    shape = (task.batch, task.crop, task.crop, 3)
    images = jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    dtype = "float32" if task.column == WIDE else task.dtype

    def logits_of(weights, images):
        return passes.logits(weights, images, network=network).astype(dtype)

    arguments = (weights, images)
    compiled, facts = compile_(task, jax.jit(logits_of), *arguments)
    return Prepared(
        functools.partial(compiled, *arguments), jax.block_until_ready, lambda: facts | peak()
    )


def training_step(task: Task) -> Prepared:
    """8-bit images and labels -> the next state: both losses, all gradients, SGD."""
    compiled, facts, state, batch = _compiled_step(task)

    def call():
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    def all_facts() -> dict:
        # Skipped steps above 0 mean that something is wrong.
        return facts | peak() | {"skipped_steps": int(state.skipped_steps)}

    return Prepared(call, jax.block_until_ready, all_facts)


def collectives(task: Task) -> Prepared:
    """The training step over `task.devices` devices, compiled and not run; what it exchanges."""
    compiled, facts, state, _ = _compiled_step(task)
    facts["collectives"] = benchmark_counts.collective_bytes(compiled.as_text())
    for name, tree in (("parameter", state.params), ("statistic", state.batch_stats)):
        facts[f"{name}_bytes"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return _nothing_to_run(facts)


def evaluation(task: Task) -> Prepared:
    """The class map of one image by the protocol `semseg` at six scales with mirror images."""
    label_set = load_label_set(task.labels)
    protocol = protocols.override(
        protocols.choose("semseg", label_set),
        scales=SCALES,
        crop_size=(task.crop, task.crop),
        base_size=task.base_size,
    )
    options = make_options(task)
    normalization = FAMILIES[options.family].normalization
    description = Description(options, label_set, normalization, protocol)
    _, params, batch_stats = split_model(make_model(task))
    segmenter = Segmenter(
        description, params, batch_stats, provenance=Provenance("random weights", 0, "")
    )
    image = random_image(task)
    return Prepared(lambda: segmenter.class_map(image), np.asarray, lambda: versions() | peak())


def matrix_product(task: Task) -> Prepared:
    """Floating-point operations a second of square products in the precision of the networks."""
    rates = {}
    for side in task.product_sides:
        values = np.random.default_rng(0).standard_normal((2, side, side), dtype=np.float32)
        a, b = jnp.asarray(values, task.dtype)
        product = jax.jit(jnp.matmul).lower(a, b).compile()
        rates[side] = best_rate(
            functools.partial(product, a, b), jax.block_until_ready, 2 * side**3
        )
    return _nothing_to_run({"flops_per_second": rates} | versions())


def data(task: Task) -> Prepared:
    """Images a second of the input pipeline with 0 and 2 loader processes, in turns."""
    import benchmark_data
    import cv2

    cv2.setNumThreads(1)
    rates: dict[str, list[float]] = {"0": [], "2": []}
    num_batches = 2 if task.crop < 100 else 20
    with tempfile.TemporaryDirectory() as folder:
        benchmark_data.paint(Path(folder), 32)
        for _ in range(task.rounds):
            for workers, found in rates.items():
                crop = (task.crop, task.crop)
                found.append(benchmark_data.rate(folder, int(workers), num_batches, crop=crop))
    return _nothing_to_run({"images_per_second": rates})


def counts(task: Task) -> Prepared:
    """Multiply-accumulates of the published network for one image, and the device."""
    options = make_options(task)
    macs, aux = benchmark_counts.network_macs(options, task.num_classes, task.crop)
    return _nothing_to_run({"macs": macs, "aux_macs": aux} | versions())


def profile(task: Task) -> Prepared:
    """Seconds of the kernels of a training step or a forward pass, and the memory that it takes."""
    import kernel_times

    prepared = {True: training_step, False: forward}[task.what.endswith("step")](task)
    for _ in range(2):
        prepared.wait(prepared.call())
    num_calls = 3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(num_calls):
                result = prepared.call()
            prepared.wait(result)
        found = kernel_times.read(Path(folder), num_calls=num_calls)
    return _nothing_to_run({"profile": found} | prepared.facts())


def lower_and_compile(function: Callable, *arguments: object) -> Callable:
    """Compile a jitted function for these arguments."""
    return function.lower(*arguments).compile()


def compile_(
    task: Task, function: Callable, *arguments: object, compiler: Callable = lower_and_compile
) -> tuple[Callable, dict]:
    """The compiled function, and what XLA says of it."""
    with its_turn():
        start = time.perf_counter()
        compiled = compiler(function, *arguments)
        facts = {"compile_seconds": time.perf_counter() - start} | versions()
    if not task.is_counted:
        return compiled, facts
    plan = compiled.memory_analysis()
    if plan is not None:
        facts["temporary_bytes"] = plan.temp_size_in_bytes
    facts["xla_flops"] = (compiled.cost_analysis() or {}).get("flops")
    facts["traced_macs"] = benchmark_counts.program_macs(function, *arguments)
    return compiled, facts


def versions() -> dict:
    """Of the libraries, and the name of the device."""
    names = ("jax", "jaxlib", "flax", "optax")
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "device": jax.local_devices()[0].device_kind,
        "backend": jax.default_backend(),
    }


def peak() -> dict:
    """The highest memory on an accelerator so far, bytes; of a CPU nothing is known here."""
    found = jax.local_devices()[0].memory_stats() or {}
    return {"device_bytes": found.get("peak_bytes_in_use")}


def _compiled_step(task: Task) -> tuple[Callable, dict, TrainState, Batch]:
    """The step as training compiles it, what XLA says of it, and its arguments."""
    model = make_model(task)
    schedule = poly_schedule(0.01, power=0.9, num_steps=100_000)
    optimizer = sgd(
        schedule, momentum=0.9, weight_decay=1e-4, head_multiplier=10.0, is_head=is_head
    )
    step = make_train_step(model, optimizer, schedule, loss=make_loss(task), seed=0)
    images, labels = random_batch(task)
    index, valid = np.arange(task.batch, dtype=np.int32), np.ones(task.batch, bool)
    mesh = parallel.make_mesh(jax.local_devices()[: task.devices])
    batch = parallel.shard_batch(Batch(images, labels, index, valid), mesh)
    state = jax.device_put(create_train_state(model, optimizer), parallel.replicated(mesh))
    compiler = functools.partial(programs.compile_step, platform=parallel.platform_of(mesh))
    compiled, facts = compile_(task, jit_over_mesh(step, mesh), state, batch, compiler=compiler)
    return compiled, facts, state, batch


def _nothing_to_run(facts: dict) -> Prepared:
    return Prepared(lambda: None, lambda result: None, lambda: facts)
