"""Kills a real training again and again, and proves after each time that nothing committed was lost.

    python experiments/interruptions.py --output=runs/kills --interruptions=200
    python experiments/interruptions.py --output=runs/soak --minutes=45 --ways=kill,event,terminate,full

One run of `scenes` by a tiny network goes on and on; each of its processes is ended in one of these ways, at a
moment that the seed draws:

* kill: SIGKILL some time after its first step.
* event: SIGKILL right before the n-th call that touches the folder of checkpoints (open, rename, remove ...).
* terminate: SIGTERM.
* full: from such a call on no file can grow any more, as on a full disk.

After each end: the newest step that is listed is read and its digests agree, it is no older than before; the
next process resumes from it and sweeps away what the dead one left. In the end the rows of metrics.jsonl and the
newest checkpoint are compared with those of a run that nobody touched.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from checkout import commit_of_checkout

from pspnet_jax.checkpoint import CheckpointFolder

ROOT = Path(__file__).parent.parent
WAYS = ("kill", "event", "terminate", "full")
INTERVAL = 10  # steps between checkpoints
MOST_EVENTS = 400
OPTIONS = {
    "model.width": 8,
    "data.crop_size": "33,33",
    "train.global_batch_size": 8,
    "train.log_every_steps": 1,
    "train.checkpoint_every_steps": INTERVAL,
    "train.evaluate_every_steps": 10**9,
    # A learning rate that does not depend on the last step, which nobody knows at the start.
    "optimizer.schedule": "multistep",
}
EXPECTED_CODES = {"kill": (-9,), "event": (-9,), "terminate": (143,), "full": (1,)}


@dataclass
class Life:
    """One process of the training, from its start to its end."""

    way: str
    resumed_from: int
    reached: int
    """The last step in its log."""
    saved: int
    """The newest complete checkpoint after its end."""
    start_seconds: float
    """From the start of the process to the end of its first step."""
    training_seconds: float
    """After that."""
    exit_code: int
    open_files: int
    resident_bytes: int
    faults: list[str] = field(default_factory=list)


class Process:
    """A training process whose output is read while it runs."""

    def __init__(self, workdir: Path, *, num_steps: int, event: int = 0, way: str = "event"):
        self.first_step_at: float | None = None
        self.resumed_from = 0
        self.started_at = time.monotonic()
        self.lines: list[str] = []
        options = [f"--config.{name}={value}" for name, value in OPTIONS.items()]
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__)),
                f"--child={workdir / 'checkpoints'},{way},{event}",
                f"--config={ROOT / 'configs' / 'scenes.py'}",
                f"--workdir={workdir}",
                f"--config.train.num_steps={num_steps}",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if match := re.match(r"resuming from step (\d+)", line):
                self.resumed_from = int(match[1])
            if line.startswith("the first step took"):
                self.first_step_at = time.monotonic()

    def wait_for_first_step(self, seconds: float) -> bool:
        """Whether it came; False where the process ended before or took longer."""
        end = time.monotonic() + seconds
        while self.first_step_at is None and time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        return self.first_step_at is not None

    def wait(self, seconds: float) -> int | None:
        """The exit code; None where it takes longer."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def open_files(self) -> int:
        """Number of file descriptors of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])


def live(workdir: Path, way: str, rng: random.Random, *, longest_seconds: float) -> Life:
    """Start a process, end it, and look at what it left."""
    before, litter = newest(workdir), unfinished(workdir)
    event = rng.randrange(1, MOST_EVENTS) if way in ("event", "full") else 0
    delay = rng.uniform(0, longest_seconds)
    process = Process(workdir, num_steps=10**9, event=event, way=way)
    faults = []
    if not process.wait_for_first_step(120) and way not in ("event", "full"):
        faults.append(f"no first step: {process.lines[-3:]}")
    left = [path for path in litter if path.exists()]
    if process.first_step_at and left:
        faults.append(f"not swept away: {left}")
    open_files = resident = 0
    if way in ("kill", "terminate"):
        time.sleep(delay)
        if process.process.poll() is None:
            open_files, resident = process.open_files(), process.resident_bytes()
            process.process.send_signal(signal.SIGKILL if way == "kill" else signal.SIGTERM)
        else:
            faults.append(f"ended by itself: {process.lines[-3:]}")
    code = process.wait(120)
    if code is None:
        faults.append("did not end")
        process.process.kill()
        code = process.wait(60) or -9
    ended_at = time.monotonic()
    if code not in EXPECTED_CODES[way]:
        faults.append(f"exit code {code}: {process.lines[-3:]}")
    reached, saved = last_row(workdir), newest(workdir)
    if process.first_step_at and process.resumed_from != before:
        faults.append(f"resumed from {process.resumed_from}, not from {before}")
    if saved < before:
        faults.append(f"step {before} was there, now {saved} is the newest")
    if way == "terminate" and saved != reached:
        faults.append(f"ended at step {reached}, saved is {saved}")
    first = process.first_step_at or ended_at
    return Life(
        way=way,
        resumed_from=process.resumed_from,
        reached=reached,
        saved=saved,
        start_seconds=first - process.started_at,
        training_seconds=ended_at - first,
        exit_code=code,
        open_files=open_files,
        resident_bytes=resident,
        faults=faults + unreadable_parts(workdir),
    )


def newest(workdir: Path) -> int:
    """The newest step that is listed; 0 where there is none."""
    return max(CheckpointFolder(workdir / "checkpoints").steps(), default=0)


def unreadable_parts(workdir: Path) -> list[str]:
    """Of the newest step: what cannot be read or has another digest."""
    checkpoints, step = CheckpointFolder(workdir / "checkpoints"), newest(workdir)
    faults = []
    for part in ("model", "optimizer") if step else ():
        try:
            checkpoints.load(step, part)
        except Exception as error:
            faults.append(f"step {step}: {type(error).__name__}: {error}")
    return faults


def unfinished(workdir: Path) -> list[Path]:
    """What a dead process left half written."""
    return [
        path
        for path in [*workdir.glob("*"), *(workdir / "checkpoints").glob("*")]
        if "tmp" in path.name
    ]


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock; a half line at the end is left out."""
    found = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append({k: v for k, v in json.loads(line).items() if k != "timing"})
        except json.JSONDecodeError:
            continue
    return found


def last_row(workdir: Path) -> int:
    """The last step that was logged; 0 where there is none."""
    return max((row["step"] for row in rows(workdir)), default=0)


def differences(workdir: Path, untouched: Path) -> list[str]:
    """Between the run that was ended so often and one that was not."""
    step = newest(workdir)
    if step == 0:
        return ["nothing was saved"]
    process = Process(untouched, num_steps=step)
    code = process.wait(3600)
    if code != 0:
        return [f"the untouched run ended with {code}: {process.lines[-3:]}"]
    kept = [row for row in rows(workdir) if row["step"] <= step]
    expected = [row for row in rows(untouched) if "loss" in row]
    faults = []
    if kept != expected:
        faults.append(f"metrics.jsonl: {len(kept)} rows, {len(expected)} expected, or other values")
    digests = [
        CheckpointFolder(folder / "checkpoints").record(step).digests
        for folder in (workdir, untouched)
    ]
    if digests[0] != digests[1]:
        faults.append(f"step {step}: other values than in the untouched run")
    return faults


def run(arguments: argparse.Namespace) -> int:
    """The number of faults."""
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    workdir, rng = output / "run", random.Random(arguments.seed)
    ways = arguments.ways.split(",")
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else None
    lives: list[Life] = []
    start = time.monotonic()
    while (time.monotonic() < end) if end else (len(lives) < arguments.interruptions):
        way = ways[len(lives) % len(ways)] if arguments.in_turn else rng.choice(ways)
        lives.append(live(workdir, way, rng, longest_seconds=arguments.longest_seconds))
        print(len(lives), json.dumps(asdict(lives[-1])), flush=True)
    seconds = time.monotonic() - start
    faults = [fault for life in lives for fault in life.faults]
    faults += differences(workdir, output / "untouched")
    found = summary(lives, seconds) | {
        "seed": arguments.seed,
        "ways": ways,
        "commit": commit_of_checkout(),
        "faults": faults,
    }
    (output / "results.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))
    return len(faults)


def summary(lives: Sequence[Life], seconds: float) -> dict:
    """What the README's table has."""
    later = [life for life in lives if life.resumed_from]
    lost = [life.reached - life.saved for life in lives if life.way != "terminate"]
    watched = [life for life in lives if life.open_files]
    return {
        "ends": dict(Counter(life.way for life in lives)),
        "steps": lives[-1].saved,
        "minutes": seconds / 60,
        "steps_lost_at_most": max(lost, default=0),
        "steps_lost": sum(lost),
        "resume_seconds": _spread([life.start_seconds for life in later]),
        "share_of_time_in_training": sum(life.training_seconds for life in lives) / seconds,
        "open_files": _spread([life.open_files for life in watched]),
        "resident_mib": _spread([life.resident_bytes / 2**20 for life in watched]),
    }


def _spread(values: Sequence[float]) -> list[float]:
    """Lowest, median, highest."""
    if not values:
        return []
    return [round(f(values), 2) for f in (min, statistics.median, max)]


def child(folder: str, way: str, event: int, argv: list[str]) -> NoReturn:
    """The command line, killed (or its disk full) right before its `event`-th call that touches the folder;
    0: never."""
    from pspnet_jax.main import command

    remaining = event

    def hook(name: str, arguments: tuple) -> None:
        nonlocal remaining
        if not name.startswith(("os.", "shutil.", "open")) or not arguments:
            return
        if isinstance(arguments[0], (str, bytes, os.PathLike)) and folder in os.fsdecode(
            arguments[0]
        ):
            remaining -= 1
            if remaining == 0 and way == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            elif remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if event:
        sys.addaudithook(hook)
    sys.argv = ["pspnet", *argv]
    command()


def main() -> None:
    """The command."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("--child="):
        folder, way, event = sys.argv[1].removeprefix("--child=").rsplit(",", 2)
        child(folder, way, int(event), sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/interruptions"))
    parser.add_argument("--interruptions", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=0, help="instead of a number")
    parser.add_argument("--ways", default="kill,event")
    parser.add_argument("--in_turn", action="store_true", help="the ways; else they are drawn")
    parser.add_argument(
        "--longest_seconds", type=float, default=6, help="of training before kill and terminate"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.ways.split(",")) - set(WAYS):
        parser.error(f"--ways={','.join(sorted(unknown))}: known are {', '.join(WAYS)}")
    sys.exit(min(run(arguments), 1))


if __name__ == "__main__":
    main()
