"""This project beside PyTorch on the machine at hand: one network, one run, columns taking turns.

    python experiments/benchmark.py --output=runs/benchmark [--semseg=CHECKOUT] [--evaluation] [--data]

where jax, flax, optax and this package are importable (PYTHONPATH=.), and torch, if PyTorch is to be
compared (else --ours_only). --small runs tiny shapes in a minute (without torch.compile, which takes
that long by itself). --semseg adds the authors' own module (github.com/hszhao/semseg).

* Forward: normalized images to logits at image size (without softmax). Training step: 8-bit images
  and labels, both losses, all gradients, SGD with momentum. --evaluation: the class map of one photograph
  at six scales with mirror images by the protocol `semseg` (minutes on a CPU; three rounds at most).
  --data: images a second of the input pipeline at the crop of the training step.
* Columns: PyTorch eager (NCHW and channels-last) and compiled, here and by the authors' module; ours
  with the operations of the device, and plain. float32 on a CPU, bfloat16 on a GPU (autocast in
  PyTorch; logits of both sides are bfloat16, too).
* Every column is a process of its own. All are prepared; then each is measured once in every round, after a call
  that is not timed (its memory and caches are cold after the turns of the others).
  Ratios are those of one round; their median, lowest and highest are told. The machine must be idle:
  PyTorch's threads wait for each other, and lose far more to other processes than XLA's do.
* The highest memory is that of one more process for each column, which finds compilations in a cache.
* results.json and results.md are written again after every group: what is stopped leaves what it has.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
from pathlib import Path

import benchmark_report
from benchmark_worker import Task, Worker, WorkerError, serve
from checkout import commit_of_checkout

OURS, PLAIN = "ours", "ours, plain"
FORMS = ("eager NCHW", "eager channels-last", "compiled")
EVALUATION_ROUNDS = 3


def main() -> None:
    """The command line; with --task the body of one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--ours_only", action="store_true", help="without PyTorch")
    parser.add_argument("--semseg", default="", help="checkout of github.com/hszhao/semseg")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=64, help="planes of the first stage")
    parser.add_argument("--num_classes", type=int, default=150)
    parser.add_argument("--crop", type=int, default=473, help="of the forward pass, pixels")
    parser.add_argument("--batches", default="1", help="of the forward pass, e.g. 1,4")
    parser.add_argument("--step_batch", type=int, help="default: 4 on a CPU, 16 on a GPU")
    parser.add_argument("--step_crop", type=int, help="default: 233 on a CPU, 473 on a GPU")
    parser.add_argument("--evaluation", action="store_true")
    parser.add_argument("--data", action="store_true")
    parser.add_argument("--columns", default="", help="only these, separated by ';'")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        values = json.loads(arguments.task)
        serve(Task(**values | {"image_size": tuple(values["image_size"])}))
        return
    if arguments.small:
        make_small(arguments)
    run_all(arguments)


def make_small(arguments: argparse.Namespace) -> None:
    """Tiny shapes for everything."""
    arguments.backbone, arguments.width, arguments.num_classes = "resnet10", 4, 5
    arguments.crop = arguments.step_crop = 33
    arguments.batches, arguments.step_batch, arguments.rounds = "1", 2, 2


class Launcher:
    """Starts processes with what the machine and the output folder ask for.

    Args:
        output: holds the logs and, in `cache`, compilations.
        small: optimizes nothing, on the CPU.
        platform: 'cpu', 'gpu', or '' while that is not known.
    """

    def __init__(self, output: Path, *, small: bool, platform: str = ""):
        self.output, self.small, self.platform = output, small, platform

    def start(self, task: Task, seconds: float | None = None, **environment: str) -> Worker:
        """The process of a task. Raises WorkerError where it fails, or is not ready after the seconds."""
        # One for each column: compile seconds of one must not profit from another.
        # Without spaces: PyTorch hands the path to a C++ compiler as it is.
        name = re.sub(r"\W+", "_", f"{task.what} {task.column}")
        cache = (self.output / "cache").absolute() / name
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the device
            **environment,
        }
        if self.small or self.platform == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        if self.small:
            # Compiles in half the time.
            flags = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
            environment["XLA_FLAGS"] = flags.strip()
        side = task.module.removeprefix("benchmark_")
        names = (task.what, task.column, f"{task.batch}x{task.crop}", f"{task.devices}_{side}")
        name = "-".join(names).replace(", ", "_").replace(" ", "_")
        log = self.output / "logs" / f"{name}.log"
        return Worker(task, log=log, environment=environment, seconds=seconds)


def measure_group(
    launcher: Launcher, tasks: dict[str, Task], rounds: int, *, with_peak: bool = True
) -> dict[str, dict]:
    """Column -> 'seconds' of every round, facts, and the highest memory; or its 'error'."""
    found: dict[str, dict] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for column, task in tasks.items():
            try:
                workers[column] = stack.enter_context(launcher.start(task))
                found[column] = {**workers[column].facts, "seconds": []}
            except WorkerError as error:
                found[column] = {"error": str(error)}
            _tell(task, column, found[column].get("error", "ready"))
        for number in range(rounds):
            for column, worker in list(workers.items()):
                try:
                    seconds = worker.measure()["seconds"]
                    found[column]["seconds"].append(seconds)
                    _tell(tasks[column], column, f"round {number + 1}: {seconds:.4g} s")
                except WorkerError as error:
                    found[column] = {"error": str(error)}
                    del workers[column]
    for column in workers:
        found[column].pop("process_bytes")
        found[column]["peak_bytes"] = peak_of(launcher, tasks[column]) if with_peak else None
    return found


def peak_of(launcher: Launcher, task: Task) -> int | None:
    """The highest memory, bytes, of a process that finds everything compiled: of the device's
    allocator where there is one, else of the process; None where it failed."""
    try:
        with launcher.start(dataclasses.replace(task, is_counted=False)) as worker:
            facts = worker.measure()
    except WorkerError as error:
        _tell(task, task.column, f"memory is not known: {error}")
        return None
    return facts.get("device_bytes") or facts["process_bytes"]


def groups(arguments: argparse.Namespace, device: str) -> dict[str, dict[str, Task]]:
    """What is compared -> column -> task."""
    on_gpu = device == "gpu"
    step_batch = arguments.step_batch or (16 if on_gpu else 4)
    step_crop = arguments.step_crop or (473 if on_gpu else 233)
    shape = {"backbone": arguments.backbone, "width": arguments.width, "platform": device}
    shape["num_classes"] = arguments.num_classes
    found = {}
    for batch in map(int, arguments.batches.split(",")):
        found[f"forward, {batch} x {arguments.crop}"] = columns(
            arguments, what="forward", batch=batch, crop=arguments.crop, **shape
        )
    found[f"training step, {step_batch} x {step_crop}"] = columns(
        arguments, what="training step", batch=step_batch, crop=step_crop, **shape
    )
    if arguments.evaluation:
        labels, size, base_size = ("ade20k", (512, 683), 512)
        if arguments.small:
            labels, size, base_size = ("camvid", (40, 53), 40)
        shape |= {"num_classes": {"ade20k": 150, "camvid": 11}[labels], "labels": labels}
        shape |= {"image_size": size, "base_size": base_size}
        tasks = columns(arguments, what="evaluation", crop=arguments.crop, **shape)
        tasks.pop(PLAIN, None)  # a Segmenter takes the operations of its devices
        found[f"evaluation, {size[0]} x {size[1]}"] = tasks
    return found


def columns(arguments: argparse.Namespace, **shape) -> dict[str, Task]:
    """Every way to do one thing."""
    found = {
        column: Task(module="benchmark_jax", column=column, **shape) for column in (OURS, PLAIN)
    }
    sides = {} if arguments.ours_only else {"PyTorch": ""}
    if arguments.semseg and not arguments.ours_only:
        sides["authors' module"] = str(Path(arguments.semseg).absolute())
    for side, semseg in sides.items():
        for form in FORMS[:2] if arguments.small else FORMS:
            column = f"{side}, {form}"
            found[column] = Task("benchmark_torch", column, semseg=semseg, **shape)
    wanted = [name.strip() for name in arguments.columns.split(";") if name.strip()]
    unknown = sorted(set(wanted) - set(found))
    if unknown:
        raise SystemExit(f"--columns={unknown} are not among {list(found)}")
    return {name: task for name, task in found.items() if not wanted or name in wanted}


def run_all(arguments: argparse.Namespace) -> None:
    """Every group in turn; the report is written again after each."""
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / "cache", ignore_errors=True)  # compile seconds are those of an empty one
    launcher = Launcher(output, small=arguments.small)
    counting = Task(
        "benchmark_jax",
        OURS,
        "counts",
        "cpu",
        arguments.backbone,
        arguments.width,
        arguments.num_classes,
        crop=arguments.crop,
    )
    with launcher.start(counting) as worker:
        facts = worker.facts
    device = launcher.platform = facts["backend"]
    report = {
        "commit": commit_of_checkout(),
        "python": platform.python_version(),
        "machine": machine(),
        "device": facts["device"],
        "platform": device,
        "versions": facts["versions"],
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "agreement": {},
        "ceiling": ceiling(
            launcher,
            dataclasses.replace(counting, platform=device),
            ours_only=arguments.ours_only,
        ),
        "groups": {},
    }
    if not arguments.ours_only:
        report["agreement"] = agreement(launcher, dataclasses.replace(counting, platform=device))
    for name, tasks in groups(arguments, device).items():
        any_task = next(iter(tasks.values()))
        rounds = arguments.rounds
        if any_task.what == "evaluation":
            rounds = min(rounds, EVALUATION_ROUNDS)
        macs, aux_macs = macs_of(launcher, any_task)
        load = os.getloadavg()[0]  # before the group: of others
        report["groups"][name] = {
            "images": any_task.batch,
            "load_before": load,
            "macs": {
                "forward": macs,
                "training step": 3 * (macs + aux_macs),  # two gradients of every product
            }.get(any_task.what),
            "columns": measure_group(launcher, tasks, rounds),
        }
        benchmark_report.write(output, report)
    if arguments.data:
        crop = arguments.step_crop or (473 if device == "gpu" else 233)
        report["data"] = data_rates(launcher, crop=crop, rounds=arguments.rounds)
    benchmark_report.write(output, report)
    print(f"written: {output / 'results.md'}, {output / 'results.json'}")
    benchmark_report.exit_if_failed(report)


def macs_of(launcher: Launcher, task: Task) -> tuple[int, int]:
    """Multiply-accumulates of the published network for one image: forward, auxiliary head."""
    counting = dataclasses.replace(task, module="benchmark_jax", column=OURS, what="counts")
    with launcher.start(counting) as worker:
        return worker.facts["macs"], worker.facts["aux_macs"]


def ceiling(launcher: Launcher, task: Task, *, ours_only: bool) -> dict:
    """Floating-point operations a second of large matrix products: of each side and the best."""
    found: dict = {}
    modules = {"ours": "benchmark_jax", "PyTorch": "benchmark_torch"}
    for side, module in modules.items():
        if side == "PyTorch" and ours_only:
            continue
        product = dataclasses.replace(task, module=module, column=side, what="matrix product")
        try:
            with launcher.start(product) as worker:
                found[side] = worker.facts["flops_per_second"]
        except WorkerError as error:
            found[side] = {"error": str(error)}
    rates = [rate for row in found.values() for rate in row.values() if isinstance(rate, float)]
    return {"sides": found, "best": max(rates, default=None)}


def agreement(launcher: Launcher, task: Task) -> dict[str, dict]:
    """Our column -> how far it is from `pspnet_torch.py` with the same weights on two small crops."""
    found: dict[str, dict] = {}
    for column in (OURS, PLAIN):
        compared = dataclasses.replace(
            task,
            module="benchmark_agreement",
            column=column,
            what="agreement",
            batch=2,
            crop=min(task.crop, 97),
        )
        try:
            with launcher.start(compared, JAX_ENABLE_X64="1") as worker:
                found[column] = worker.facts["differences"]
        except WorkerError as error:
            found[column] = {"error": str(error)}
        _tell(compared, column, str(found[column]))
    return found


def data_rates(launcher: Launcher, *, crop: int, rounds: int) -> dict:
    """Images a second of the input pipeline by number of loader processes, or the error."""
    task = Task("benchmark_jax", OURS, "data", "cpu", rounds=rounds, crop=crop)
    try:
        with launcher.start(task) as worker:
            return {"crop": crop, "images_per_second": worker.facts["images_per_second"]}
    except WorkerError as error:
        return {"crop": crop, "error": str(error)}


def machine() -> str:
    """Processor, number of cores and memory, as far as they can be read."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _tell(task: Task, column: str, said: str) -> None:
    print(f"{task.what} {task.batch} x {task.crop}  {column:<36} {said}", flush=True)


if __name__ == "__main__":
    main()
