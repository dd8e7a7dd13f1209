"""Training: takes a run to its last step, or to the step after which it is told to end."""

from contextlib import closing, nullcontext
from pathlib import Path

import jax
from ml_collections import ConfigDict

from pspnet_jax import folder_lock, parallel
from pspnet_jax.compose import compose
from pspnet_jax.run import Run
from pspnet_jax.termination import Terminated, Termination
from pspnet_jax.train_step import TrainState


def train(config: ConfigDict, workdir: Path) -> Path:
    """Take a run to its last step, resuming what its folder holds.

    Args:
        config: as `config.default_config`, with what a config file and the command line changed.
        workdir: the run's folder.

    Returns:
        The folder of the last evaluation.

    Raises:
        ValueError: for a fault in the config or the data, a folder that holds another network or that
            another process writes to.
        Terminated: where SIGTERM told the process to end; what was learned is saved.
    """
    run = compose(config, workdir)
    with folder_lock.held(workdir) if jax.process_index() == 0 else nullcontext("") as killed:
        run.open_log()
        if killed:
            run.tell_killed(killed)
        run.look_at_data()
        state = run.resume_or_start()
        run.write_config()
        run.announce()
        _take_steps(run, state)
    return run.evaluation_folder(run.config.train.num_steps)


def _take_steps(run: Run, state: TrainState) -> None:
    """From the state to the last step."""
    first_step, skipped = int(state.step), run.skipped_steps(state)
    with (
        Termination() as termination,
        run.watchdog() as watchdog,
        run.checkpoints,
        run.logging(first_step=first_step) as progress,
        closing(run.batches(first_step=first_step)) as batches,
    ):

        def evaluate(step: int) -> float:
            with termination.raised():
                return run.evaluate(step, state, progress, heard=watchdog.hear)

        if run.lacks_report(first_step):
            evaluate(first_step)
        for step in range(first_step + 1, run.config.train.num_steps + 1):
            batch = next(batches)
            state, metrics = run.train_step(state, parallel.shard_batch(batch, run.mesh))
            progress.log(step, metrics)
            skipped.hear(step, metrics, batch.index)
            if run.logs_at(step):
                skipped.tell()
            watchdog.hear()
            ends = termination.stops_after(step)
            mean_iou = evaluate(step) if run.evaluates_at(step) and not ends else None
            if ends or run.saves_at(step):
                run.save(step, state, mean_iou)
            if ends:
                raise Terminated(f"after step {step}, which is saved")
