"""A config -> the parts of a run, each made and checked before anything is trained."""

import dataclasses
from pathlib import Path

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import config as config_module
from pspnet_jax import evaluate, parallel, passes, programs, protocols
from pspnet_jax.arrays import Batch
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.data import transforms
from pspnet_jax.losses import LossOptions, tile_mib_of
from pspnet_jax.models.families import AUX_HEADS, FAMILIES, ModelOptions, check_size
from pspnet_jax.models.pspnet import PSPNet, is_head
from pspnet_jax.optimizer import Schedule, adam, multistep_schedule, poly_schedule, sgd
from pspnet_jax.protocols import Protocol
from pspnet_jax.run import Run
from pspnet_jax.stored_model import Description
from pspnet_jax.train_step import (
    Metrics,
    TrainState,
    TrainStep,
    create_train_state,
    make_train_step,
)


def compose(config: ConfigDict, workdir: Path) -> Run:
    """Make and check every part of a run before anything is trained."""
    config = config.copy_and_resolve_references()
    config_module.validate(config)
    what_was_scaled = config_module.scale_to_batch(config)
    label_set = load_label_set(config.data.labels)
    options = _resolve_model(config)
    family = FAMILIES[options.family]
    augment_options = transforms.resolve(config.augment.to_dict())
    crop_height, crop_width = config.data.crop_size or label_set.crop_size
    crop_size = (crop_height, crop_width)
    _check_crop_size(crop_size, options)
    # Protocols with windows take their size from the label set: that which the network is trained on.
    label_set = dataclasses.replace(label_set, crop_size=crop_size)
    mesh = parallel.make_mesh()
    parallel.check_batch_size(
        config.train.global_batch_size, mesh, accumulate_steps=config.train.accumulate_steps
    )
    # What was left open is written down, so that config.json says what was done.
    config.model.update(dataclasses.asdict(options))
    config.augment.update(augment_options)
    config.data.crop_size = crop_size
    config.evaluate.split = config.evaluate.split or config.data.val_split
    protocol = _choose_protocol(config, label_set)
    config_module.validate(config)

    source = evaluate.open_split(config.data, split=config.data.train_split, label_set=label_set)
    validation = evaluate.open_split(config.data, split=config.evaluate.split, label_set=label_set)
    description = Description(options, label_set, family.normalization, protocol)
    structure = passes.structure(description.network(platform=parallel.platform_of(mesh)))
    schedule, optimizer = _make_optimizer(config)
    step = make_train_step(
        nnx.merge(*structure),
        optimizer,
        schedule,
        loss=_loss_options(config, label_set, mesh),
        accumulate_steps=config.train.accumulate_steps,
        seed=config.seed,
    )
    return Run(
        config=config,
        what_was_scaled=what_was_scaled,
        workdir=workdir,
        description=description,
        mesh=mesh,
        source=source,
        validation=validation,
        augment=transforms.make_augment(
            augment_options, crop_size, fill=family.normalization.mean_color
        ),
        initial_state=lambda rng: create_train_state(
            PSPNet(options, label_set.num_classes, rng=rng), optimizer
        ),
        train_step=compile_when_called(step, mesh),
        checkpoints=CheckpointFolder(workdir / "checkpoints"),
    )


def jit_over_mesh(step: TrainStep, mesh: Mesh) -> jax.stages.Wrapped:
    """The step under `jax.jit` over the mesh: state replicated and donated, batch split."""
    everywhere = parallel.replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(everywhere, parallel.split_batch(mesh)),
        out_shardings=(everywhere, everywhere),
    )


def compile_when_called(step: TrainStep, mesh: Mesh) -> TrainStep:
    """The step over the mesh, compiled when it is first called; batches of another shape are a TypeError."""
    jitted, platform = jit_over_mesh(step, mesh), parallel.platform_of(mesh)
    compiled: TrainStep | None = None

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal compiled
        if compiled is None:
            compiled = programs.compile_step(jitted, state, batch, platform=platform)
            # Of several processes some find it compiled, some do not; the first collective waits for seconds only.
            parallel.gather(b"")
        return compiled(state, batch)

    return run


def _choose_protocol(config: ConfigDict, label_set: LabelSet) -> Protocol:
    """The protocol of evaluations during training; fills in what the config left open."""
    options = config.evaluate
    protocol = protocols.choose(options.protocol, label_set)
    protocol = protocols.override(protocol, **{name: options[name] for name in protocols.OPTIONS})
    had = [name for name in protocols.OPTIONS if protocols.has_option(protocol, name)]
    options.update({name: getattr(protocol, name) for name in had})
    return protocol


def _resolve_model(config: ConfigDict) -> ModelOptions:
    """Options of the network; heads that a loss needs are added. Fills in the weights of the losses."""
    options = ModelOptions.resolve(config.model.to_dict())
    family, loss = FAMILIES[options.family], config.loss
    for name in ("aux_weight", "presence_weight"):
        if loss[name] is None:
            loss[name] = getattr(family, name)
    weights = {"pixel": loss.aux_weight, "presence": loss.presence_weight}
    heads = [name for name in AUX_HEADS if weights[name] > 0 or name in options.aux_heads]
    return dataclasses.replace(options, aux_heads=tuple(heads))


def _loss_options(config: ConfigDict, label_set: LabelSet, mesh: Mesh) -> LossOptions:
    options, num_parts = config.loss, config.train.accumulate_steps
    weights = options.class_weights
    if weights is not None and len(weights) != label_set.num_classes:
        raise ValueError(
            f"loss.class_weights has {len(weights)} factors, label set '{label_set.name}' has "
            f"{label_set.num_classes} classes"
        )
    if options.resolution == "eighth" and config.model.head == "progressive":
        raise ValueError(
            "loss.resolution=eighth takes labels at the size of the logits, and model.head=progressive gives "
            "logits of image size: leave it out"
        )
    if options.ohem_threshold is not None and num_parts > 1:
        raise ValueError(
            f"loss.ohem_threshold={options.ohem_threshold} chooses the hardest pixels of a whole batch, "
            f"train.accumulate_steps={num_parts} never sees one: leave either out"
        )
    values = {field.name: options[field.name] for field in dataclasses.fields(LossOptions)}
    values["class_weights"] = None if weights is None else tuple(map(float, weights))
    tile_mib = options.tile_mib or tile_mib_of(parallel.platform_of(mesh))
    values["tile_mib"] = tile_mib * mesh.size
    return LossOptions(**values)


def _make_optimizer(config: ConfigDict) -> tuple[Schedule, optax.GradientTransformation]:
    options = config.optimizer
    if options.schedule == "poly":
        schedule = poly_schedule(
            options.learning_rate,
            power=options.power,
            num_steps=config.train.num_steps,
            minimum=options.minimum_learning_rate,
            warmup_steps=options.warmup_steps,
        )
    else:
        schedule = multistep_schedule(
            options.learning_rate,
            milestones=options.milestones,
            decay_factor=options.decay_factor,
            warmup_steps=options.warmup_steps,
        )
    shared = {
        "weight_decay": options.weight_decay,
        "head_multiplier": options.head_multiplier,
        "is_head": is_head,
        "decay_vectors": options.decay_norm_and_bias,
    }
    if options.name == "adam":
        return schedule, adam(schedule, **shared)
    return schedule, sgd(schedule, momentum=options.momentum, **shared)


def _check_crop_size(crop_size: tuple[int, int], options: ModelOptions) -> None:
    try:
        check_size(crop_size, options.size_rule)
    except ValueError as error:
        raise ValueError(f"data.crop_size: {error}") from None
