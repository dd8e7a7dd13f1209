"""Processes that measure when asked: one network of one side each, and one at work at a time.

* A process of its own for every column: XLA reads its flags once, the peak of memory is that of a
  process, and what fails, fails alone.
* A process prepares (compiles, runs a few times) and then waits; each request is one measurement. So the
  runs of several columns can take turns on a machine whose speed drifts.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

COMMAND = Path(__file__).with_name("benchmark.py")
WIDE = "ours, float32 logits"  # a column
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of evaluations, each with the mirror image
LONG_SECONDS = 30.0  # calls below that are preceded by one that is not timed
GROUP_SECONDS = 0.3  # on a GPU one measurement is as many calls as take about this long
LARGEST_GROUP = 50


@dataclass(frozen=True)
class Task:
    """What one process prepares and measures."""

    module: str
    """Of this folder; its `prepare` takes the task."""
    column: str
    what: str
    """'forward', 'training step', 'evaluation' or something else that the module knows."""
    platform: str
    """'cpu' or 'gpu'."""
    backbone: str = "resnet50"
    width: int = 64
    num_classes: int = 150
    batch: int = 1
    crop: int = 473
    """Side of the images, pixels."""
    labels: str = ""
    """Label set of an evaluation."""
    image_size: tuple[int, int] = (0, 0)
    """(height, width) of the image of an evaluation, pixels."""
    base_size: int = 0
    """Long side of the image at scale 1, pixels."""
    semseg: str = ""
    """Checkout of the authors' code, for their module."""
    rounds: int = 1
    """Of what takes its turns within one process: the input pipeline."""
    is_counted: bool = True
    """Whether operations of the compiled program are counted, which takes memory."""
    devices: int = 1
    """Over which the batch is split."""

    @property
    def dtype(self) -> str:
        """What is computed in."""
        return "bfloat16" if self.platform == "gpu" else "float32"

    @property
    def product_sides(self) -> tuple[int, ...]:
        """Of the square matrices whose products give the ceiling."""
        if self.crop < 100:
            return (64,)
        return (4096, 8192, 16384) if self.platform == "gpu" else (1024, 2048, 4096)


class Prepared(NamedTuple):
    """What a process has ready."""

    call: Callable[[], object]
    """Enqueues the work once."""
    wait: Callable[[object], object]
    """Until the result of `call` is there."""
    facts: Callable[[], dict]
    """What is known besides seconds; asked for after every measurement."""


def random_batch(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[batch, height, width, 3] and labels u8[batch, height, width], a tenth ignored."""
    rng, shape = np.random.default_rng(0), (task.batch, task.crop, task.crop)
    images = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = rng.integers(0, min(task.num_classes, 255), shape, dtype=np.uint8)
    return images, np.where(rng.random(shape) < 0.1, np.uint8(255), labels)


def random_image(task: Task) -> np.ndarray:
    """u8[height, width, 3] of an evaluation."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (*task.image_size, 3), dtype=np.uint8)


@contextlib.contextmanager
def its_turn() -> Iterator[None]:
    """Of one process at a time where BENCHMARK_TURNS names a file: XLA and cuDNN choose kernels by timing them."""
    if not os.environ.get("BENCHMARK_TURNS"):
        yield
        return
    with Path(os.environ["BENCHMARK_TURNS"]).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def best_rate(call: Callable[[], object], wait: Callable, flops: float) -> float:
    """The best of five groups of four calls, floating-point operations a second."""
    wait(call())
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            result = call()
        wait(result)
        best = max(best, 4 * flops / (time.perf_counter() - start))
    return best


class WorkerError(Exception):
    """A process that could not do what it was asked for."""


class Worker:
    """A process with a prepared task; a context manager that ends it.

    Args:
        task: what it prepares.
        log: file that receives its standard error.
        environment: variables on top of this process's.
        seconds: it may take to prepare; None is no limit.

    Raises:
        WorkerError: with the last line of the log where the task fails; where it takes longer, with the seconds.
    """

    def __init__(
        self,
        task: Task,
        *,
        log: Path,
        environment: dict[str, str],
        seconds: float | None = None,
    ):
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(COMMAND), f"--task={json.dumps(asdict(task))}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | environment,
            )
        timer = threading.Timer(seconds or threading.TIMEOUT_MAX, self._process.kill)
        timer.daemon = True
        timer.start()
        start = time.monotonic()
        try:
            self.facts = self._reply()
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerError) and seconds and time.monotonic() - start >= seconds:
                raise WorkerError(f"not ready after {seconds:.3g} s") from None
            raise
        finally:
            timer.cancel()

    def measure(self) -> dict:
        """One measurement: 'seconds' of a call, and the facts at its end."""
        try:
            self._process.stdin.write("measure\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_line()) from None
        return self._reply()

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _reply(self) -> dict:
        for line in self._process.stdout:
            if line.startswith('{"reply"'):  # libraries print, too
                reply = json.loads(line)["reply"]
                if "error" in reply:
                    raise WorkerError(reply["error"])
                return reply
        raise WorkerError(self._last_line())

    def _last_line(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text().strip().splitlines()
        return f"exit status {code}: {lines[-1] if lines else 'no message'}"[:300]


def serve(task: Task) -> None:
    """The body of a process: prepare, then measure once for every line of standard input."""
    if task.module == "benchmark_jax":
        # Where PyTorch is installed some libraries import it, which takes memory; who uses ours has none.
        sys.modules["torch"] = None
    try:
        prepared = importlib.import_module(task.module).prepare(task)
        first_call, later_call = (_seconds(prepared, 1) for _ in range(2))
        count = 1
        if task.platform == "gpu":
            count = max(1, min(LARGEST_GROUP, int(GROUP_SECONDS / later_call)))
            # A longer group holds two results at a time, to which memory grows once.
            _seconds(prepared, min(count, 3))
        _send({"first_call_seconds": first_call, **_facts(prepared)})
        for _ in sys.stdin:
            if later_call < LONG_SECONDS:
                # Its caches and memory are cold from the turns of others, in training they never are.
                _seconds(prepared, 1)
            _send({"seconds": _seconds(prepared, count), **_facts(prepared)})
    except (
        Exception
    ) as error:  # out of memory, not supported, refused: the other columns still count
        first_line = (str(error).strip() or "no message").splitlines()[0]
        _send({"error": f"{type(error).__name__}: {first_line}"[:300]})
        raise


def _seconds(prepared: Prepared, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        result = prepared.call()
    prepared.wait(result)
    return (time.perf_counter() - start) / count


def _facts(prepared: Prepared) -> dict:
    """Those of the task, with the highest memory of this process so far, bytes."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_bytes": kibibytes * 1024, **prepared.facts()}


def _send(reply: dict) -> None:
    print(json.dumps({"reply": reply}), flush=True)
