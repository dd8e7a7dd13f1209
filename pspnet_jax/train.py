"""Training: composes a run from its config and takes it to its last step.

* A run is a folder. The same command on the same folder resumes from the newest good checkpoint, and
  ends bit for bit where an uninterrupted run ends (on the CPU).
* A checkpoint is written every `checkpoint_every_steps`, at every evaluation and after the last step.
* Evaluation is that of the verb `evaluate`, on the parameters at hand.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import check, evaluate, parallel, passes, programs, protocols
from pspnet_jax import config as config_module
from pspnet_jax.arrays import Batch
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.checkpoint import (
    CheckpointFolder,
    CorruptCheckpointError,
    Tree,
    check_same_shapes,
    digest,
    flatten,
)
from pspnet_jax.data import transforms
from pspnet_jax.data.pipeline import Source, training_batches
from pspnet_jax.losses import LossOptions
from pspnet_jax.metric_writer import MetricWriter, TrainingProgress, log_to, write_whole
from pspnet_jax.models.layers import NoRandomNumbers, RandomNumbers
from pspnet_jax.models.pspnet import (
    AUX_HEADS,
    FAMILIES,
    ModelOptions,
    PSPNet,
    check_size,
    is_head,
)
from pspnet_jax.optimizer import Schedule, adam, multistep_schedule, poly_schedule, sgd
from pspnet_jax.pretrained import start_from
from pspnet_jax.protocols import Protocol
from pspnet_jax.report import summary, write_report
from pspnet_jax.segmenter import Description, Provenance, Segmenter, model_part
from pspnet_jax.train_step import (
    Metrics,
    TrainState,
    TrainStep,
    create_train_state,
    make_train_step,
)

log = logging.getLogger("pspnet_jax")

# How a network is computed, not what it is: these may change when a run goes on.
_CHANGEABLE_OPTIONS = ("dtype", "remat", "frozen_norm", "initializer", "dropout_rate")


def train(config: ConfigDict, workdir: Path) -> Path:
    """Take a run to its last step, resuming what its folder holds.

    Args:
        config: as `config.default_config`, with what a config file and the command line changed.
        workdir: the run's folder.

    Returns:
        The folder of the last evaluation.

    Raises:
        ValueError: for a fault in the config or the data, or a folder that holds another network.
    """
    run = compose(config, workdir)
    run.look_at_data()
    state = run.resume_or_start()
    run.write_config()
    run.announce()
    num_steps = run.config.train.num_steps
    first_step = int(state.step)
    with (
        run.checkpoints,
        run.logging(first_step=first_step) as progress,
        closing(run.batches(first_step=first_step)) as batches,
    ):
        for step in range(first_step + 1, num_steps + 1):
            batch = parallel.shard_batch(next(batches), run.mesh)
            state, metrics = run.train_step(state, batch)
            progress.log(step, metrics)
            mean_iou = run.evaluate(step, state, progress) if run.evaluates_at(step) else None
            if run.saves_at(step):
                run.save(step, state, mean_iou)
        if not (run.evaluation_folder(num_steps) / "report.json").exists():
            run.evaluate(num_steps, state, progress)
    return run.evaluation_folder(num_steps)


@dataclass(frozen=True)
class Run:
    """The parts of a run, put together by `compose`."""

    config: ConfigDict
    workdir: Path
    description: Description
    mesh: Mesh
    source: Source
    validation: Source
    augment: transforms.RandomView
    initial_state: Callable[[RandomNumbers], TrainState]
    """Draws the state before the first step. A function, so that nothing holds on to its arrays."""
    train_step: TrainStep
    checkpoints: CheckpointFolder

    def batches(self, *, first_step: int) -> Generator[Batch, None, None]:
        return training_batches(
            self.source,
            self.augment,
            global_batch_size=self.config.train.global_batch_size,
            seed=self.config.seed,
            first_step=first_step,
            num_workers=self.config.data.num_workers,
        )

    def logging(self, *, first_step: int) -> TrainingProgress:
        options = self.config.train
        return TrainingProgress(
            MetricWriter(self.workdir, first_step=first_step, is_writer=jax.process_index() == 0),
            first_step=first_step,
            num_steps=options.num_steps,
            log_every_steps=options.log_every_steps,
            images_per_step=options.global_batch_size,
        )

    def evaluates_at(self, step: int) -> bool:
        options = self.config.train
        return step % options.evaluate_every_steps == 0 or step == options.num_steps

    def saves_at(self, step: int) -> bool:
        return step % self.config.train.checkpoint_every_steps == 0 or self.evaluates_at(step)

    def evaluation_folder(self, step: int) -> Path:
        return evaluate.output_folder(
            self.workdir,
            step=step,
            split=self.config.evaluate.split,
            protocol=self.description.protocol,
            label_set=self.description.label_set,
        )

    def evaluate(self, step: int, state: TrainState, progress: TrainingProgress) -> float:
        """Write the report of the parameters at hand; returns the mean IoU.

        Where that fails or is interrupted (an unreadable mask, Ctrl-C), the step is saved first: nothing
        learned is lost.
        """
        try:
            return self._evaluate(step, state, progress)
        except BaseException:
            self.save(step, state, None)
            raise

    def _evaluate(self, step: int, state: TrainState, progress: TrainingProgress) -> float:
        model = model_part(self.description, state.params, state.batch_stats)
        segmenter = Segmenter(
            self.description,
            parallel.on_this_process(state.params),
            parallel.on_this_process(state.batch_stats),
            provenance=Provenance(str(self.workdir), step, digest(model)),
        )
        result = evaluate.evaluate(
            segmenter,
            self.validation,
            protocol=self.description.protocol,
            batch_size=self.config.evaluate.batch_size,
            canvas_gib=self.config.evaluate.canvas_gib,
        )
        folder = self.evaluation_folder(step)
        write_report(
            folder,
            result,
            segmenter.provenance,
            self.validation,
            split=self.config.evaluate.split,
            origin=evaluate.data_origin(self.config.data),
        )
        message = f"{summary(result)}\n{folder / 'report.html'}"
        progress.log_evaluation(step, result.scalars, message, seconds=result.seconds)
        return result.scores.mean_iou

    def save(self, step: int, state: TrainState, mean_iou: float | None) -> None:
        parts = {
            "model": model_part(self.description, state.params, state.batch_stats),
            "optimizer": _optimizer_part(state),
        }
        self.checkpoints.save(step, parts, mean_iou=mean_iou)

    def resume_or_start(self) -> TrainState:
        """The newest good checkpoint, else the initial state; what cannot be read is set aside."""
        self.checkpoints.remove_unfinished()
        corrupt = []
        for step in reversed(self.checkpoints.steps()):
            try:
                state = self._restored(step)
                log.info("resuming from step %d of %s", step, self.workdir)
                if self.config.init_from:
                    log.info("init_from=%s is not read again", self.config.init_from)
                break
            except CorruptCheckpointError as error:
                log.warning("%s\nTrying the step before it.", error)
                corrupt.append(step)
        else:
            if corrupt:
                raise CorruptCheckpointError(
                    f"no step of {self.checkpoints.path} can be read; move the folder away to start anew"
                )
            log.info("starting from step 0: %s holds no checkpoint", self.checkpoints.path)
            state = self._started()
        for step in corrupt:
            log.warning("renamed to %s", self.checkpoints.set_aside(step))
        if int(state.step) > self.config.train.num_steps:
            raise ValueError(
                f"{self.workdir} is at step {int(state.step)}, beyond "
                f"train.num_steps={self.config.train.num_steps}"
            )
        return jax.device_put(state, parallel.replicated(self.mesh))

    def _started(self) -> TrainState:
        """The initial state, with the weights of `init_from` where that is set."""
        state = self.initial_state(np.random.default_rng(self.config.seed))
        if self.config.init_from is None:
            return state
        params, batch_stats = start_from(
            self.config.init_from,
            state.params,
            state.batch_stats,
            bins=self.description.model.pyramid_bins,
            label_set=self.description.label_set,
        )
        return dataclasses.replace(state, params=params, batch_stats=batch_stats)

    def _restored(self, step: int) -> TrainState:
        if "optimizer" not in self.checkpoints.record(step).digests:
            raise ValueError(
                f"{self.checkpoints.folder(step)} is a converted model, there is no training to go on "
                f"with: choose another --workdir and --config.init_from={self.workdir}"
            )
        model = self.checkpoints.load(step, "model")
        optimizer = self.checkpoints.load(step, "optimizer")
        stored = Description.from_json(model["description"])
        folder = self.checkpoints.folder(step)
        _check_continues(stored, self.description, folder)
        wanted, opt_state = jax.eval_shape(self._shapes)
        check_same_shapes({name: model[name] for name in wanted}, wanted, where=str(folder))
        opt_state = serialization.from_state_dict(opt_state, optimizer["opt_state"])
        restored = (
            optimizer["step"],
            model["params"],
            model["batch_stats"],
            opt_state,
            optimizer["skipped_steps"],
        )
        return TrainState(*jax.tree.map(jnp.asarray, restored))

    def _shapes(self) -> tuple[Tree, optax.OptState]:
        state = self.initial_state(NoRandomNumbers())
        return {"params": state.params, "batch_stats": state.batch_stats}, state.opt_state

    def look_at_data(self) -> None:
        """Read a few images of both splits: most faults of data show at once, not hours later."""
        data, label_set = self.config.data, self.description.label_set
        check.first_look(self.source, label_set, split=data.train_split)
        check.first_look(self.validation, label_set, split=self.config.evaluate.split)

    def announce(self) -> None:
        """Say what is trained on what; the first step is silent for as long as it compiles."""
        options, device = self.description.model, jax.devices()[0]
        platform = parallel.platform_of(self.mesh)
        _, params, _ = passes.structure(self.description.network(platform=platform))
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        log.info(
            "%s: %s %s of width %d, %s parameters; %d classes of '%s'; %d images, %d to evaluate on; "
            "%d x %s; the first step compiles",
            self.config.name,
            options.family,
            options.backbone,
            options.width,
            f"{num_parameters:,}",
            self.description.label_set.num_classes,
            self.description.label_set.name,
            len(self.source),
            len(self.validation),
            self.mesh.size,
            device.device_kind,
        )

        num_parts, batch = self.config.train.accumulate_steps, self.config.train.global_batch_size
        if num_parts > 1:
            log.info(
                "%d parts of %d images go through one after the other; the loss is divided by the pixels of "
                "the whole batch, batch statistics are those of a part",
                num_parts,
                batch // num_parts,
            )

    def write_config(self) -> None:
        """Write config.json; say what changed where the folder held another one."""
        path = self.workdir / "config.json"
        text = config_module.to_json(self.config)
        if path.exists():
            old, new = (flatten(json.loads(t)) for t in (path.read_text(), text))
            # An option that did not exist then has its default now, or is new to this command.
            before = flatten(config_module.default_config().to_dict()) | old
            changed = [
                f"{name}: {before[name]} -> {new[name]}"
                for name in new
                if before[name] != new[name] and name != "init_from"  # read at step 0 only
            ]
            if changed:
                log.warning("going on with changed options:\n  %s", "\n  ".join(changed))
        if jax.process_index() == 0:
            write_whole(path, text)


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
        loss=_loss_options(config, label_set, num_devices=mesh.size),
        accumulate_steps=config.train.accumulate_steps,
        seed=config.seed,
    )
    log_to(workdir / "log.txt")
    if what_was_scaled:
        log.info("%s", what_was_scaled)
    return Run(
        config=config,
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
        train_step=compile_step(step, mesh),
        checkpoints=CheckpointFolder(workdir / "checkpoints"),
    )


def split_step(step: TrainStep, mesh: Mesh) -> jax.stages.Wrapped:
    """The step under `jax.jit` over the mesh: state replicated and donated, batch split."""
    everywhere = parallel.replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(everywhere, parallel.split_batch(mesh)),
        out_shardings=(everywhere, everywhere),
    )


def compile_step(step: TrainStep, mesh: Mesh) -> TrainStep:
    """The step over the mesh, compiled when it is first called; batches of another shape are a TypeError."""
    jitted, platform = split_step(step, mesh), parallel.platform_of(mesh)
    compiled: TrainStep | None = None

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal compiled
        if compiled is None:
            compiled = programs.compile_step(jitted, state, batch, platform=platform)
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


def _loss_options(config: ConfigDict, label_set: LabelSet, *, num_devices: int) -> LossOptions:
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
    values["tile_mib"] = options.tile_mib * num_devices
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
        check_size(crop_size, FAMILIES[options.family])
    except ValueError as error:
        raise ValueError(f"data.crop_size: {error}") from None


def _optimizer_part(state: TrainState) -> Tree:
    return {
        "opt_state": serialization.to_state_dict(state.opt_state),
        "step": state.step,
        "skipped_steps": state.skipped_steps,
    }


def _check_continues(stored: Description, wanted: Description, folder: Path) -> None:
    """Raise where a checkpoint's network is not the one to be trained; listing all differences."""
    faults = []
    if stored.label_set != wanted.label_set:
        faults.append(
            f"label set '{stored.label_set.name}' with {stored.label_set.num_classes} classes there, "
            f"'{wanted.label_set.name}' with {wanted.label_set.num_classes} here"
        )
    for field in dataclasses.fields(ModelOptions):
        old, new = getattr(stored.model, field.name), getattr(wanted.model, field.name)
        if old != new and field.name not in _CHANGEABLE_OPTIONS:
            faults.append(f"model.{field.name} is {old} there, {new} here")
    if faults:
        listed = "\n  ".join(faults)
        raise ValueError(
            f"{folder} holds another network:\n  {listed}\n"
            "Choose another --workdir (or --config.name), or the options it was trained with."
        )
