"""Loader processes end with whoever started them, however that ends."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BUDGET_SECONDS = 90

TESTS = Path(__file__).parent
PROGRAM = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, {tests!r})
    from pspnet_jax.data import transforms
    from pspnet_jax.data.pipeline import training_batches
    from pictures import ExampleSource

    if __name__ == "__main__":
        view = transforms.make_augment(
            transforms.resolve({{"recipe": "semseg"}}), (33, 33), fill=(0, 0, 0)
        )
        batches = training_batches(
            ExampleSource(10), view, global_batch_size=4, seed=0, first_step=0, num_workers=2
        )
        next(batches)
        print("ready", flush=True)
        if {fails}:
            sys.stdin.readline()
            raise RuntimeError("as planned")
        while True:
            next(batches)
            time.sleep(0.01)
    """
)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return [*children, *(each for child in children for each in descendants(child))]


@pytest.mark.parametrize(
    "end",
    ["killed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("interrupted", "failed"))],
)
def test_no_worker_is_left_behind(tmp_path, end):
    script = tmp_path / "loads.py"
    script.write_text(PROGRAM.format(tests=str(TESTS), fails=end == "failed"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as program:
        try:
            assert program.stdout.readline() == "ready\n"
            workers = descendants(program.pid)
            assert len(workers) >= 2
            assert all(map(is_alive, workers))
            if end == "failed":
                program.communicate("\n", timeout=30)
            else:
                program.send_signal(signal.SIGINT if end == "interrupted" else signal.SIGKILL)
            assert program.wait(timeout=30) != 0
        finally:
            program.kill()
    deadline = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if is_alive(pid)]
