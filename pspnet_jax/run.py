"""A run: its parts, its folder, and what it does besides taking steps.

* A run is a folder. The same command on the same folder resumes from the newest good checkpoint, and
  ends bit for bit where an uninterrupted run ends (on the CPU).
* A checkpoint is written every `checkpoint_every_steps`, at every evaluation and after the last step.
* Evaluation is that of the verb `evaluate`, on the parameters at hand.
"""

import dataclasses
import functools
import json
import logging
import os
import platform
import shlex
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pspnet_jax import check, evaluate, parallel, passes
from pspnet_jax import config as config_module
from pspnet_jax.arrays import Batch
from pspnet_jax.catalog import shortened
from pspnet_jax.checkpoint import CheckpointFolder, CorruptCheckpointError
from pspnet_jax.data import transforms, unreadable
from pspnet_jax.data.layouts import DataError
from pspnet_jax.data.pipeline import Source, name_of, training_batches
from pspnet_jax.metric_writer import MetricWriter, TrainingProgress
from pspnet_jax.models.families import ModelOptions
from pspnet_jax.models.layers import NoRandomNumbers, RandomNumbers
from pspnet_jax.pretrained import start_from
from pspnet_jax.progress import log_to
from pspnet_jax.report import FILES, summary, write_report
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.skipped_steps import SkippedSteps
from pspnet_jax.stored_model import Description, model_part
from pspnet_jax.train_step import TrainState, TrainStep
from pspnet_jax.trees import Tree, check_same_shapes, digest, flatten
from pspnet_jax.version import __version__
from pspnet_jax.watchdog import Watchdog
from pspnet_jax.whole_files import write_whole

log = logging.getLogger("pspnet_jax")

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# How a network is computed, not what it is: these may change when a run goes on.
_CHANGEABLE_OPTIONS = ("dtype", "remat", "frozen_norm", "initializer", "dropout_rate")


@dataclass(frozen=True)
class Run:
    """The parts of a run, put together by `compose`."""

    config: ConfigDict
    what_was_scaled: str | None
    """By `train.recipe_batch_size`, in words."""
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
        data = self.config.data
        color = self.description.normalization.mean_color
        source = unreadable.Tolerant(self.source, size=data.crop_size, color=color)
        batches = training_batches(
            source,
            self.augment,
            global_batch_size=self.config.train.global_batch_size,
            seed=self.config.seed,
            first_step=first_step,
            num_workers=data.num_workers,
        )
        with closing(batches):
            yield from unreadable.watched(batches, source, share_max=data.unreadable_share_max)

    def logging(self, *, first_step: int, redoes_evaluation: bool) -> TrainingProgress:
        options = self.config.train
        return TrainingProgress(
            MetricWriter(
                self.workdir,
                first_step=first_step,
                redoes_evaluation=redoes_evaluation,
                is_writer=jax.process_index() == 0,
            ),
            first_step=first_step,
            num_steps=options.num_steps,
            log_every_steps=options.log_every_steps,
            images_per_step=options.global_batch_size,
        )

    def skipped_steps(self, state: TrainState) -> SkippedSteps:
        return SkippedSteps(
            int(state.skipped_steps),
            most_in_a_row=self.config.train.skipped_in_a_row_max,
            name_of=functools.partial(name_of, self.source),
        )

    def watchdog(self) -> Watchdog:
        return Watchdog(
            60 * self.config.train.watchdog_minutes,
            advice="the same command goes on from the last checkpoint (train.watchdog_minutes)",
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

    def lacks_evaluation(self, step: int) -> bool:
        """Whether a step was to be evaluated and was not, or not to the end: the process ended before. Every
        process is told what the first one sees."""
        if step == 0 or not self.evaluates_at(step):
            return False
        is_scored = self.checkpoints.record(step).mean_iou is not None
        found = is_scored and (self.evaluation_folder(step) / "report.json").exists()
        return parallel.gather(bytes([found]))[0] == b"\x00"

    def evaluate(
        self,
        step: int,
        state: TrainState,
        progress: TrainingProgress,
        *,
        heard: Callable[[], None],
    ) -> None:
        """Write the report of the parameters at hand, which were saved, and their score beside them."""
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
            heard=heard,
        )
        folder = self.evaluation_folder(step)
        try:
            write_report(
                folder,
                result,
                segmenter.provenance,
                self.validation,
                split=self.config.evaluate.split,
                origin=evaluate.data_origin(self.config.data, self.description.label_set),
            )
        except DataError as error:  # of an image that was read before; only the first process knows
            raise OSError(f"the report of step {step} could not be written: {error}") from error
        message = f"{summary(result)}\nreport: {folder / FILES['report']}"
        progress.log_evaluation(step, result.scalars, message, seconds=result.seconds)
        _, _, name = folder.name.partition("-")  # split and protocol, without the step
        evaluation = f"{name} {self.description.label_set.digest}"
        self.checkpoints.set_score(step, result.scores.mean_iou, evaluation=evaluation)

    def what_is_saved(self) -> str:
        """For whoever interrupted the run."""
        steps = self.checkpoints.steps()
        if steps:
            return f"the same command goes on from step {steps[-1]}"
        every = self.config.train.checkpoint_every_steps
        return f"nothing is saved yet (train.checkpoint_every_steps={every}): the same command starts anew"

    def save(self, step: int, state: TrainState) -> None:
        """Start writing a checkpoint.

        Raises:
            ValueError: where batch statistics are not finite. Loss and gradient still may be, so that no step was
                skipped: an infinite variance only makes a channel 0.
        """
        statistics = flatten(state.batch_stats)
        wrong = [name for name, x in statistics.items() if not np.isfinite(np.asarray(x)).all()]
        if wrong:
            raise ValueError(
                f"after step {step} {len(wrong)} batch statistics are not finite ({', '.join(wrong[:3])}"
                f"{', ...' * (len(wrong) > 3)}): feature maps overflow. Nothing of it was saved; go on from the last "
                "checkpoint with a lower --config.optimizer.learning_rate or a longer warmup_steps (one of an older "
                "version may hold such values itself: then move its folder away)"
            )
        parts = {
            "model": model_part(self.description, state.params, state.batch_stats),
            "optimizer": _optimizer_part(state),
        }
        self.checkpoints.save(step, parts, mean_iou=None)

    def resume_or_start(self) -> TrainState:
        """The newest good checkpoint, else the initial state; what cannot be read is set aside."""
        is_first = jax.process_index() == 0
        if is_first:
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
            log.info("a new run: %s holds no checkpoint yet", self.checkpoints.path)
            state = self._started()
        if len(set(parallel.gather(str(int(state.step)).encode()))) > 1:
            raise ValueError(
                f"the processes read different steps of {self.checkpoints.path}: it must be on a file system "
                "that all of them see"
            )
        for step in corrupt if is_first else ():
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
            model=self.description.model,
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
        try:
            opt_state = serialization.from_state_dict(opt_state, optimizer["opt_state"])
        except ValueError:
            name = self.config.optimizer.name
            raise ValueError(
                f"{folder} holds the state of another optimizer than optimizer.name={name}: choose the one it was trained "
                f"with, or another --workdir (or --config.name) and --config.init_from={self.workdir}"
            ) from None
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

    def open_log(self) -> None:
        """Of the first process log.txt and the terminal; of each other a file of its own."""
        number = jax.process_index()
        if number == 0:
            log_to(self.workdir / "log.txt")
        else:
            log_to(self.workdir / f"log-{number}.txt", console_level=logging.WARNING)

    def tell_killed(self, process: str) -> None:
        log.warning(
            "%s, which wrote here before, was ended from outside: kill -9, want of memory, the machine, another "
            "of its processes, or the watchdog (exit code 75), whose words stand above",
            process,
        )

    def look_at_data(self) -> None:
        """Read a few images of both splits: most faults of data show at once, not hours later."""
        data, label_set = self.config.data, self.description.label_set
        check.first_look(
            self.source,
            label_set,
            split=data.train_split,
            unreadable_share_max=data.unreadable_share_max,
        )
        check.first_look(self.validation, label_set, split=self.config.evaluate.split)

    def announce(self, *, first_step: int) -> None:
        """Say what is trained on what; the first step is silent for as long as it compiles."""
        log.debug("command: %s", shlex.join(sys.argv))
        log.debug("config: %s", json.dumps(self.config.to_dict()))
        log.debug(
            "process %d of %d (%d on %s); Python %s, pspnet_jax %s, %s",
            jax.process_index(),
            jax.process_count(),
            os.getpid(),
            socket.gethostname(),
            platform.python_version(),
            __version__,
            ", ".join(f"{name} {metadata.version(name)}" for name in _LIBRARIES),
        )
        if self.what_was_scaled:
            log.info("%s", self.what_was_scaled)
        warmup_steps, num_steps = self.config.optimizer.warmup_steps, self.config.train.num_steps
        if warmup_steps >= num_steps:
            log.warning(
                "the learning rate still rises at the end: optimizer.warmup_steps=%d of train.num_steps=%d",
                warmup_steps,
                num_steps,
            )
        options, device = self.description.model, jax.devices()[0]
        network = self.description.network(platform=parallel.platform_of(self.mesh))
        _, params, _ = passes.structure(network)
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        log.info(
            "%s: %s %s of width %d, %s parameters; %d classes of '%s'; %d images, %d to evaluate on; "
            "%d x %s; %s",
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
            "the first step compiles"
            if first_step < self.config.train.num_steps
            else f"all {first_step} steps are done",
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
            try:
                old, new = (flatten(json.loads(t)) for t in (path.read_text(), text))
            except ValueError as error:
                raise ValueError(
                    f"{path} is damaged ({error}); without it, this run goes on"
                ) from None
            # An option that did not exist then has its default now, or is new to this command.
            before = flatten(config_module.default_config().to_dict()) | old
            changed = [
                f"{name}: {before[name]} -> {new[name]}"
                for name in new
                if before[name] != new[name] and name != "init_from"  # read at step 0 only
            ]
            if changed:
                log.warning(
                    "going on with changed options (another --config.name or --workdir begins a new run):\n  %s",
                    "\n  ".join(changed),
                )
        if jax.process_index() == 0:
            write_whole(path, text)


def _optimizer_part(state: TrainState) -> Tree:
    return {
        "opt_state": serialization.to_state_dict(state.opt_state),
        "step": state.step,
        "skipped_steps": state.skipped_steps,
    }


def _check_continues(stored: Description, wanted: Description, folder: Path) -> None:
    """Raise where a checkpoint's network is not the one to be trained; listing all differences."""
    faults = []
    there, here = stored.label_set, wanted.label_set
    changes = there.changes_to(here)
    if there.names != here.names:
        faults.append(
            f"label set '{there.name}' with {there.num_classes} classes there, '{here.name}' with "
            f"{here.num_classes} here: {shortened(changes)}"
        )
    elif changes:
        log.warning("going on with a changed label set: %s", shortened(changes))
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
