"""Trainings of the tiny network: in processes of their own, and the rows that they leave."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The learning rate does not depend on the last step; one evaluation.
SHORT = {"optimizer__schedule": "multistep", "train__evaluate_every_steps": 6}
ENDLESS = {
    "train__num_steps": 100_000,
    "train__evaluate_every_steps": 1_000_000,
    "train__checkpoint_every_steps": 1_000_000,
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(
    data, workdir, *, index=0, count=1, devices=2, port=0, before="", **options
) -> subprocess.Popen:
    """One process of a training of the tiny network; `before`: Python that runs in it first."""
    environment = os.environ | {
        # Compiled in half the time.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    if count > 1:
        environment |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{before}\nimport os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
            "-m",
            "pspnet_jax.main",
            f"--config={ROOT / 'tests' / 'tiny_config.py'}",
            f"--config.data.root={data}",
            f"--workdir={workdir}",
            *(f"--config.{name.replace('__', '.')}={value}" for name, value in options.items()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )


def start_two(data, workdir, **options) -> list[subprocess.Popen]:
    port = free_port()
    return [start(data, workdir, index=i, count=2, port=port, **options) for i in range(2)]


def finish(running, *, seconds=180) -> list[tuple[int, str]]:
    """Exit code and output of each; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in running]
        return [(process.returncode, text) for process, text in zip(running, outputs, strict=True)]
    finally:
        for process in running:
            process.kill()


def rows(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


def wait_for_step(workdir, step, *, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in rows(workdir)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no step {step} within {seconds} s")
