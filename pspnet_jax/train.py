"""Training: takes a run to its last step, or to the step after which it is told to end."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pspnet_jax import folder_lock, parallel
from pspnet_jax.compose import compose
from pspnet_jax.data.layouts import DataError
from pspnet_jax.run import Run
from pspnet_jax.termination import Terminated, Termination
from pspnet_jax.train_step import TrainState

log = logging.getLogger("pspnet_jax")


def train(config: ConfigDict, workdir: Path) -> Path:
    """Take a run to its last step, resuming what its folder holds.

    Args:
        config: as `config.default_config`, with what a config file and the command line changed.
        workdir: the run's folder.

    Returns:
        The folder of the last evaluation.

    Raises:
        ValueError: for a fault in the config or the data, a folder that holds another network or that
            another process writes to. Validation images that cannot be read only stop the last evaluation.
        KeyboardInterrupt: with what is saved.
        Terminated: where SIGTERM told the process to end; what was learned is saved.
    """
    with Termination() as termination, ExitStack() as until_the_end:
        with termination.raised():
            run = compose(config, workdir)
            killed = until_the_end.enter_context(_held_for_all(workdir))
            run.open_log()
            if killed:
                run.tell_killed(killed)
            run.look_at_data()
            state = run.resume_or_start()
            run.write_config()
            run.announce(first_step=int(state.step))
        try:
            _take_steps(run, state, termination)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(run.what_is_saved()) from None
    return run.evaluation_folder(run.config.train.num_steps)


@contextmanager
def _held_for_all(workdir: Path) -> Iterator[str]:
    """`folder_lock.held` by the first process for all of them, which hear what it finds."""
    with ExitStack() as stack:
        killed = fault = ""
        if jax.process_index() == 0:
            try:
                killed = stack.enter_context(folder_lock.held(workdir))
            except ValueError as error:
                fault = str(error)
        fault = parallel.gather(fault.encode())[0].decode()
        if fault:
            raise ValueError(fault)
        yield killed


def _take_steps(run: Run, state: TrainState, termination: Termination) -> None:
    """From the state to the last step."""
    first_step, num_steps = int(state.step), run.config.train.num_steps
    skipped = run.skipped_steps(state)
    lacks_evaluation = run.lacks_evaluation(first_step)
    with (
        run.watchdog() as watchdog,
        run.checkpoints,
        run.logging(first_step=first_step, redoes_evaluation=lacks_evaluation) as progress,
        closing(run.batches(first_step=first_step)) as batches,
    ):

        def evaluate(step: int) -> None:
            try:
                with termination.raised():
                    run.evaluate(step, state, progress, heard=watchdog.hear)
            except DataError as error:
                if step == num_steps:
                    raise
                log.error("step %d is not evaluated, training goes on: %s", step, error)

        if lacks_evaluation:
            evaluate(first_step)
        for step in range(first_step + 1, num_steps + 1):
            batch = next(batches)
            state, metrics = run.train_step(state, parallel.shard_batch(batch, run.mesh))
            skipped.hear(step, metrics, batch.index)
            if progress.log(step, metrics):
                skipped.tell()
            watchdog.hear()
            ends = termination.stops_after(step)
            # What only skips has diverged: it must not take the place of the checkpoints before it.
            saves = run.saves_at(step) and (step == num_steps or not skipped.goes_on())
            if ends or saves:
                run.save(step, state)
            if ends:
                skipped.tell()
                raise Terminated(f"after step {step}, which is saved")
            if saves and run.evaluates_at(step):
                evaluate(step)
