"""This project beside PyTorch on a GPU that is at hand for minutes: all programs are compiled at the same time.

    python experiments/benchmark_gpu.py --output=runs/benchmark_gpu [--minutes=7] [--more] [--only=WORDS] [--small]

where jax, flax, optax, torch and this package (PYTHONPATH=.) are importable. What is measured, and how,
is that of `benchmark.py`: a process for each column, columns taking turns. Here all of them are prepared together,
but kernels and algorithms are chosen, by XLA and cuDNN, one process after another, because that is done by timing
them; compile seconds are those of a busy machine. Then, in this order, as far as the minutes reach:

* the training step of PSPNet-50 and PSPNet-101, 16 crops of 473, and the forward pass of PSPNet-50
  for 1 and 32 images: ours, and PyTorch compiled (channels-last, bfloat16 autocast);
* with --more, for PSPNet-50, the same with XLA's fusion of convolutions, the forward pass with logits in float32 (else
  both sides give bfloat16), by PyTorch in CUDA graphs and eager;
* the kernels of our step and forward pass, and the memory they need in a process that finds them compiled;
* the rate of matrix products.

results.json and results.md are written again after every part.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import platform
import shutil
import time
from pathlib import Path

import benchmark_report
from benchmark import OURS, Launcher, ceiling, machine, macs_of
from benchmark_worker import WIDE, Task, Worker, WorkerError
from checkout import commit_of_checkout

FUSION = "ours, conv fusion"
COMPILED, EAGER = "PyTorch, compiled", "PyTorch, eager channels-last"
GRAPHS = "PyTorch, compiled, CUDA graphs"
XLA_FLAGS = {FUSION: "--xla_gpu_experimental_enable_conv_fusion=true"}
MEASURING_SHARE = 0.35  # of the minutes, kept back when programs are compiled
THREADS_OF_PYTORCH = 6  # that compile, of each process
DEVICE_GIB_OF_PYTORCH = 42  # for each process; cuDNN's trials would take more


def groups(backbones: tuple[str, ...], **shape) -> dict[str, dict[str, Task]]:
    """What is compared -> column -> task; the columns that matter most come first."""
    small, large = backbones
    both = (OURS, COMPILED)
    more = (*both, FUSION, WIDE, GRAPHS, EAGER) if shape["more"] else both
    asked = {
        "training step": [(small, shape["batch"], more[:3]), (large, shape["batch"], both)],
        "forward": [(small, batch, more) for batch in (1, shape["forward_batch"])],
    }
    common = {name: shape[name] for name in ("platform", "width", "num_classes", "crop")}
    found = {}
    for what, rows in asked.items():
        for backbone, batch, columns in rows:
            found[f"{what}, {backbone}, {batch} x {shape['crop']}"] = {
                column: Task(
                    "benchmark_jax" if column.startswith("ours") else "benchmark_torch",
                    column,
                    what,
                    backbone=backbone,
                    batch=batch,
                    **common,
                )
                for column in columns
            }
    return found


class Run:
    """The report, and the processes that it comes from."""

    def __init__(self, output: Path, shape: dict, *, small: bool, minutes: float):
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.small = output, small
        self.end = time.monotonic() + 60 * minutes
        self.launcher = Launcher(output, small=small, platform="cpu" if small else "gpu")
        self.workers: dict[tuple[str, str], Worker] = {}
        self.report: dict = {
            "commit": commit_of_checkout(),
            "python": platform.python_version(),
            "machine": machine(),
            "device": "",
            "platform": self.launcher.platform,
            "versions": {},
            "settings": {
                "backbone": "PSPNet",
                "width": shape["width"],
                "num_classes": shape["num_classes"],
                "small": str(small),
            },
            "agreement": {},
            "ceiling": {"sides": {}, "best": None},
            "groups": {},
            "profiles": {},
        }

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def start(self, task: Task, seconds: float) -> Worker:
        """A process that keeps what is compiled in a folder of all of ours."""
        environment = {
            "TORCHINDUCTOR_COMPILE_THREADS": str(THREADS_OF_PYTORCH),
            "BENCHMARK_DEVICE_GIB": str(DEVICE_GIB_OF_PYTORCH),
            "BENCHMARK_TURNS": str((self.output / "turns").absolute()),
        }
        if task.module == "benchmark_jax":
            cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.output / "cache" / "jax"))
            flags = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS.get(task.column, '')}"
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(Path(cache).absolute()),
                "XLA_FLAGS": "" if self.small else flags.strip(),
            }
        return self.launcher.start(task, seconds, **environment)

    def prepare(self, found: dict[str, dict[str, Task]]) -> None:
        """Start every column; those that are not ready in time are left out."""
        until = self.end - MEASURING_SHARE * self.left()
        for name, tasks in found.items():
            any_task = next(iter(tasks.values()))
            self.report["groups"][name] = {
                "images": any_task.batch,
                "load_before": os.getloadavg()[0],
                "macs": None,
                "columns": {},
            }

        def one(name: str, column: str) -> None:
            task = found[name][column]
            row = self.report["groups"][name]["columns"]
            try:
                worker = self.start(task, max(1.0, until - time.monotonic()))
            except WorkerError as error:
                row[column] = {"error": str(error)}
            else:
                self.workers[name, column] = worker
                row[column] = {**worker.facts, "seconds": []}
            said = row[column].get("error", f"ready, {self.left():.0f} s left")
            print(f"{name}: {column}: {said}", flush=True)

        pairs = [(name, column) for name, tasks in found.items() for column in tasks]
        first = [pair for pair in pairs if pair[1] in (OURS, COMPILED)]
        with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
            waiting = [pool.submit(one, *pair) for pair in first]
            macs = {name: pool.submit(self._macs, tasks) for name, tasks in found.items()}
            concurrent.futures.wait(waiting)
            for name, each in macs.items():
                self.report["groups"][name]["macs"] = each.result()
            self.write()
            for pending in [pool.submit(one, *pair) for pair in pairs if pair not in first]:
                pending.result()

    def _macs(self, tasks: dict[str, Task]) -> int | None:
        task = next(iter(tasks.values()))
        try:
            forward, aux = macs_of(self.launcher, task)
        except WorkerError:
            return None
        return 3 * (forward + aux) if task.what == "training step" else forward

    def measure(self, rounds: int) -> None:
        """Columns of a group take turns."""
        for name, group in self.report["groups"].items():
            for _ in range(rounds):
                for column, row in group["columns"].items():
                    worker = self.workers.get((name, column))
                    if worker is None or self.left() < 0:
                        continue
                    try:
                        facts = worker.measure()
                    except WorkerError as error:
                        row.update(error=str(error))
                        self.workers.pop((name, column)).close()
                        continue
                    row["seconds"].append(facts.pop("seconds"))
                    row.update(facts, peak_bytes=facts["device_bytes"])
            for column, row in group["columns"].items():
                print(f"{name}: {column}: {row.get('error', row.get('seconds'))}", flush=True)
            self.write()

    def profile(self, found: dict[str, dict[str, Task]]) -> None:
        """Kernels of ours, and the memory of a process that compiles nothing."""
        for name, tasks in found.items():
            row = self.report["groups"][name]["columns"][OURS]
            if self.left() < 20 or "error" in row:
                continue
            task = dataclasses.replace(tasks[OURS], what=f"profile of {tasks[OURS].what}")
            try:
                with self.start(task, self.left()) as worker:
                    row["peak_bytes"] = (
                        worker.facts["device_bytes"] or worker.facts["process_bytes"]
                    )
                    self.report["profiles"][name] = worker.facts["profile"]
            except WorkerError as error:
                self.report["profiles"][name] = {"error": str(error)}
            print(f"{name}: profile: {self.report['profiles'][name]}", flush=True)
            self.write()

    def write(self) -> None:
        """results.json and results.md as far as they are known."""
        for group in self.report["groups"].values():
            group["columns"] = dict(sorted(group["columns"].items()))
            for row in group["columns"].values():
                versions = row.get("versions", {})
                if "jax" in versions:
                    self.report |= {"device": row["device"], "versions": versions}
        benchmark_report.write(self.output, self.report)

    def close(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_gpu"), help="folder")
    parser.add_argument("--minutes", type=float, default=7, help="at most, all together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--only", default="", help="groups whose names have this in them")
    parser.add_argument("--more", action="store_true", help="more columns, more device memory")
    arguments = parser.parse_args()
    small = arguments.small
    backbones = ("resnet10", "resnet18") if small else ("resnet50", "resnet101")
    shape = {
        "platform": "cpu" if small else "gpu",
        "width": 4 if small else 64,
        "num_classes": 5 if small else 150,
        "crop": 33 if small else 473,
        "batch": 2 if small else 16,
        "forward_batch": 2 if small else 32,
    }
    found = groups(backbones, **shape, more=arguments.more)
    found = {name: tasks for name, tasks in found.items() if arguments.only in name}
    if not found:
        parser.error(f"--only={arguments.only}: no group has this in its name, such as 'forward'")
    if not small and shutil.which("nvidia-smi") is None:
        parser.error("no NVIDIA driver here (nvidia-smi is not found); --small runs on the CPU")
    run = Run(arguments.output, shape, small=small, minutes=arguments.minutes)
    try:
        run.prepare(found)
        run.measure(arguments.rounds)
    finally:
        run.close()
    run.profile(found)
    if run.left() > 30:
        any_task = next(iter(found.values()))[OURS]
        run.report["ceiling"] = ceiling(run.launcher, any_task, ours_only=False)
        run.write()
    print((arguments.output / "results.md").read_text())
    benchmark_report.exit_if_failed(run.report)


if __name__ == "__main__":
    main()
