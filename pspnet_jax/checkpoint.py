"""Checkpoints of a run: `checkpoints/<8-digit step>/{model,optimizer}`, written by Orbax.

* A step is visible only when it is complete: Orbax writes to a temporary folder and renames it.
* `model` is all that is needed to use a network: parameters, batch statistics and a JSON description
  (model options, label set, normalization, protocol). `optimizer` is what only training needs.
* The arrays of a part are written as one run of bytes (`packing`) in pieces of 64 MiB: TensorStore loses some
  memory with every array that it opens, and takes a millisecond for each.
* Every part carries a digest (SHA-256 over names, shapes and values), checked on every load, because
  neither the disk nor the array format promises that what is read is what was written.
* The latest two steps and the best one are kept; older ones go only after the new one was read back.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from pspnet_jax.packing import Packed, pack, size, unpack
from pspnet_jax.trees import Tree, digest
from pspnet_jax.whole_files import write_whole

log = logging.getLogger("pspnet_jax")
NUM_LATEST = 2
_PIECE_BYTES = 64 * 2**20
_RECORD_FILE = "_CHECKPOINT_METADATA"  # Orbax's; JSON
_STEP_FOLDER = re.compile(r"\d{8}")


class CorruptCheckpointError(Exception):
    """A checkpoint cannot be read, or its values are not those that were written."""


@dataclass(frozen=True)
class StepRecord:
    """What is known of a saved step without reading its arrays."""

    digests: Mapping[str, str]
    """Part -> SHA-256 in hexadecimal."""
    mean_iou: float | None
    """Of the evaluation at that step, where there was one."""
    evaluation: str | None
    """Which one: split, protocol, label set; None where that is not known."""
    layouts: Mapping[str, Tree]
    """Part -> what `packing` says of its bytes."""


class CheckpointFolder:
    """The `checkpoints` folder of one run.

    Saving is asynchronous; `wait` (called by the next save, too) finishes it, verifies the new step and
    prunes the old ones. As a context manager it waits at the end, also where an exception passes.
    All processes of a distributed run must make the same calls.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self._pending: tuple[int, ocp.AsyncResponse] | None = None

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        if not self.path.is_dir():
            return []
        names = (entry.name for entry in self.path.iterdir() if entry.is_dir())
        return sorted(int(name) for name in names if _STEP_FOLDER.fullmatch(name))

    def folder(self, step: int) -> Path:
        return self.path / f"{step:08d}"

    def record(self, step: int) -> StepRecord:
        """Digests and score of a step.

        Raises:
            CorruptCheckpointError: where they cannot be read.
        """
        # Not by Orbax, which opens every array for it, and so loses 10 KB each in TensorStore's `to_json`:
        # gigabytes in a week of checkpoints.
        try:
            text = (self.folder(step) / _RECORD_FILE).read_text()
            metadata = json.loads(text)["custom_metadata"]
            layouts = metadata.get("layouts", {})
            score = metadata["mean_iou"], metadata.get("evaluation")  # older ones do not name it
            if layouts and metadata["score_digest"] != _score_digest(step, *score):
                raise ValueError("its score differs from the digest")
            record = StepRecord(metadata["digests"], *score, layouts)
        except Exception as error:
            raise CorruptCheckpointError(f"{self.folder(step)}: {error}") from error
        if not layouts:
            raise ValueError(
                f"{self.folder(step)} was written by an older version; read it with that"
            )
        return record

    def best_step(self) -> int:
        """The step with the highest mean IoU (the later of equals) of those evaluated as the last of them was; the
        latest where none was."""
        records = [(step, self._readable(step)) for step in self._existing_steps()]
        scored = [
            (r.mean_iou, step, r.evaluation) for step, r in records if r and r.mean_iou is not None
        ]
        if not scored:
            return self.latest_step()
        last = scored[-1][2]
        return max((score, step) for score, step, of in scored if of in (last, None))[1]

    def latest_step(self) -> int:
        return self._existing_steps()[-1]

    def save(self, step: int, parts: Mapping[str, Tree], *, mean_iou: float | None) -> None:
        """Start writing a step, after the previous one was finished."""
        self.wait()
        if mean_iou is not None and math.isnan(mean_iou):
            mean_iou = None  # nothing to judge: no best step
        # Copies, because the caller's next step may reuse the buffers while this is being written.
        packed = {name: pack(part) for name, part in parts.items()}
        self._check_can_write(sum(len(part.stream) for part in packed.values()))
        response = ocp.save_checkpointables_async(
            str(self.folder(step)),
            {name: _pieces(part.stream) for name, part in packed.items()},
            overwrite=True,
            custom_metadata={
                "digests": {name: digest(unpack(part)) for name, part in packed.items()},
                "mean_iou": mean_iou,
                "score_digest": _score_digest(step, mean_iou),
                "layouts": {name: part.layout for name, part in packed.items()},
            },
        )
        self._pending = (step, response)

    def set_score(self, step: int, mean_iou: float, *, evaluation: str) -> None:
        """Write down what an evaluation of a saved step gave.

        Args:
            evaluation: split, protocol and label set; others give other scores.
        """
        self.wait()
        if jax.process_index() != 0 or math.isnan(mean_iou):
            return
        path = self.folder(step) / _RECORD_FILE
        content = json.loads(path.read_text())
        score_digest = _score_digest(step, mean_iou, evaluation)
        content["custom_metadata"].update(
            mean_iou=mean_iou, evaluation=evaluation, score_digest=score_digest
        )
        write_whole(path, json.dumps(content))

    def wait(self) -> None:
        """Finish, verify and prune; nothing where nothing is being written."""
        if self._pending is None:
            return
        step, response = self._pending
        handled = sys.exc_info()[1]
        try:
            response.result()  # a signal that raises here leaves it pending
        except Exception as error:
            self._pending = None
            raise OSError(
                f"{self.folder(step)} could not be saved: {_root_cause(error, handled=handled)}; what was saved before is "
                "untouched, and the same command goes on from there"
            ) from error
        self._pending = None
        for part in self.record(step).digests:
            self.load(step, part)
        log.debug("step %d is saved and was read back", step)
        self._prune()

    def load(self, step: int, part: str) -> Tree:
        """One part as host arrays (and strings); whoever uses them places them on devices.

        Raises:
            CorruptCheckpointError: where it cannot be read or its digest differs.
        """
        record = self.record(step)
        try:
            layout = record.layouts[part]
            target = _pieces(np.empty(size(layout), np.uint8))
            pieces = ocp.load_checkpointables(str(self.folder(step)), {part: target})[part]
            tree = unpack(Packed(np.concatenate([pieces[name] for name in sorted(pieces)]), layout))
        except (PermissionError, MemoryError):
            raise  # the machine's trouble, not the checkpoint's
        except Exception as error:
            raise CorruptCheckpointError(
                f"{self.folder(step) / part} cannot be read: {_root_cause(error)}"
            ) from error
        if digest(tree) != record.digests.get(part):
            raise CorruptCheckpointError(
                f"{self.folder(step) / part}: values differ from its digest"
            )
        return tree

    def set_aside(self, step: int) -> Path:
        """Rename a step that cannot be used, so that it is neither listed nor lost."""
        target = self.folder(step).with_suffix(".corrupt")
        while target.exists():
            target = target.with_name(target.name + "_")
        return self.folder(step).rename(target)

    def remove_unfinished(self) -> None:
        """Remove what a killed process left half written."""
        for entry in self.path.glob("*.orbax-checkpoint-tmp*") if self.path.is_dir() else ():
            shutil.rmtree(entry, ignore_errors=True)

    def _check_can_write(self, num_bytes: int) -> None:
        """Raise OSError where a step will not be written: Orbax's own end would be long and unclear."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{os.strerror(errno.ENOSPC)}: {num_bytes / 1e9:.2f} GB are to be saved, {free / 1e9:.2f} "
                "GB are free",
                str(self.path),
            )

    def _existing_steps(self) -> list[int]:
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.path} holds no checkpoint")
        return steps

    def _readable(self, step: int) -> StepRecord | None:
        try:
            return self.record(step)
        except CorruptCheckpointError as error:
            # An old step that cannot be read must not stop the run that is writing new ones.
            log.warning("%s\nIt is left out of the choice of the best step.", error)
            return None

    def _prune(self) -> None:
        if jax.process_index() != 0:
            return
        steps = self.steps()
        kept = {*steps[-NUM_LATEST:], self.best_step()}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.folder(step))


def _root_cause(error: BaseException, *, handled: BaseException | None = None) -> str:
    """First line of the exception that started a chain; Orbax's outermost one speaks of handlers.

    Args:
        handled: what was being handled already; it did not start this.
    """
    while True:
        cause = error.__cause__ or error.__context__
        if cause is None or cause is handled:
            break
        error = cause
    text = str(error).strip().split("\n")[0].split(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"


def _pieces(stream: np.ndarray) -> dict[str, np.ndarray]:
    starts = range(0, len(stream), _PIECE_BYTES)
    return {f"{i:04d}": stream[start : start + _PIECE_BYTES] for i, start in enumerate(starts)}


def _score_digest(step: int, mean_iou: float | None, evaluation: str | None = None) -> str:
    named = "" if evaluation is None else f" {evaluation}"
    return hashlib.sha256(f"{step} {mean_iou!r}{named}".encode()).hexdigest()
