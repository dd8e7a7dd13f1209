"""Scalars of a run -> progress line, `metrics.jsonl`, TensorBoard.

* One JSON object a line, with its `step`; what depends on the clock stands under `timing`, so that two
  runs can be compared line by line.
* On resume the lines after the restored step are dropped, and TensorBoard forgets them too.
* Only the first process writes.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar as scalar_summary

from pspnet_jax.progress import duration
from pspnet_jax.whole_files import write_whole

log = logging.getLogger("pspnet_jax")
_protos: Any = event_pb2  # classes made at run time


class MetricWriter:
    """Writes the scalars of one run into its folder.

    Args:
        workdir: of the run.
        first_step: steps after this one are forgotten (0 for a new run).
        redoes_evaluation: what was found at the first step is forgotten, too (TensorBoard shows it twice).
        is_writer: False for all processes but one.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        redoes_evaluation: bool = False,
        is_writer: bool = True,
    ):
        self._file = None
        self.is_writer = is_writer
        if not is_writer:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _drop_rows_after(path, first_step, evaluation_too=redoes_evaluation)
        self._file = path.open("a")
        self._tensorboard = _EventFile(workdir / "tensorboard", purge_step=first_step + 1)

    def write(
        self, step: int, scalars: Mapping[str, float], *, timing: Mapping[str, float]
    ) -> None:
        """Append one row; values that are not finite become null in the JSON."""
        if self._file is None:
            return
        row = {"step": step, **_finite(scalars), "timing": _finite(timing)}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._tensorboard.write(step, {**scalars, **timing})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tensorboard.close()
            self._file = None


class _EventFile:
    """Scalars for TensorBoard, which forgets those from `purge_step` on.

    Written at once by whoever asks: the thread of tensorboardX's SummaryWriter dies where the disk is full, and
    then everybody waits for it.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        purge = _protos.SessionLog(status=_protos.SessionLog.START)
        self._events.write_event(_protos.Event(step=purge_step, session_log=purge))
        self._events.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            if not math.isfinite(value):  # no point of a curve, and tensorboardX warns of each
                continue
            summary = scalar_summary(name, value)
            event = _protos.Event(wall_time=time.time(), step=step, summary=summary)
            self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class TrainingProgress:
    """What a training says while it goes on; a context manager that closes its writer.

    Args:
        writer: takes the rows.
        first_step: the step at which the run starts or resumes.
        num_steps: of the whole run.
        log_every_steps: of rows and progress lines.
        images_per_step: over all devices.
    """

    def __init__(
        self,
        writer: MetricWriter,
        *,
        first_step: int,
        num_steps: int,
        log_every_steps: int,
        images_per_step: int,
    ):
        self._writer = writer
        self._num_steps, self._every, self._images = num_steps, log_every_steps, images_per_step
        self._first_step = first_step
        self._last_step, self._last_time = first_step, time.monotonic()

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> bool:
        """Every `log_every_steps` steps and at the last: one row and one line. Returns whether it was now.

        The first step of a process compiles: it is timed by itself and counts in no rate.
        """
        if step == self._first_step + 1:
            float(metrics["loss"])  # waits for the device
            seconds = time.monotonic() - self._last_time
            log.info("the first step took %.1f s, with reading, tracing and compiling", seconds)
            self._last_step, self._last_time = step, time.monotonic()
        if step % self._every != 0 and step != self._num_steps:
            return False
        # Reading the values waits for the device, so the clock is read after them.
        scalars = {name: float(value) for name, value in metrics.items()}
        timing = {}
        if step > self._last_step:
            steps_per_second = (step - self._last_step) / (time.monotonic() - self._last_time)
            timing["images_per_second"] = steps_per_second * self._images
            timing["seconds_left"] = (self._num_steps - step) / steps_per_second
        self._writer.write(step, scalars, timing=timing)
        log.info("%s", progress_line(step, self._num_steps, scalars, timing))
        self._last_step, self._last_time = step, time.monotonic()
        return True

    def log_evaluation(
        self, step: int, scalars: Mapping[str, float], message: str, *, seconds: float
    ) -> None:
        """One row and a message; the time it took is left out of the training rate."""
        self._writer.write(step, scalars, timing={"evaluation_seconds": seconds})
        if self._writer.is_writer:
            log.info("step %d: %s", step, message)
        self._last_step, self._last_time = step, time.monotonic()


def progress_line(
    step: int, num_steps: int, scalars: Mapping[str, float], timing: Mapping[str, float]
) -> str:
    """Step, losses, learning rate, images per second and time left (where known), for people."""
    parts = f"main {scalars['main_loss']:.4f}"
    if "aux_loss" in scalars:
        parts += f", aux {scalars['aux_loss']:.4f}"
    if "presence_loss" in scalars:
        parts += f", presence {scalars['presence_loss']:.4f}"
        parts += f" with accuracy {scalars['presence_accuracy']:.3f}"
    line = (
        f"step {step:>{len(str(num_steps))}}/{num_steps}  loss {scalars['loss']:.4f} ({parts})  "
        f"learning rate {scalars['learning_rate']:.2e}"
    )
    if timing:
        left = duration(timing["seconds_left"])
        line += f"  {timing['images_per_second']:.1f} images/s  {left} left"
    return line


def _drop_rows_after(path: Path, step: int, *, evaluation_too: bool) -> None:
    if not path.exists():
        return
    # A killed process may have left half a line; whatever does not parse was never read by anybody.
    rows, num_damaged = [], 0
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            is_redone = evaluation_too and "evaluation_seconds" in row["timing"]
            if row["step"] < step or (row["step"] == step and not is_redone):
                rows.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            num_damaged += 1
    if num_damaged:
        log.warning("%s: dropped %d damaged rows, as a killed process leaves", path, num_damaged)
    write_whole(path, "".join(rows))


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
