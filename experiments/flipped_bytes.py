"""Damages checkpoints byte by byte, and proves that a training never goes on from damaged values.

    python experiments/flipped_bytes.py --output=runs/flips --flips=1000

A run of `scenes` by a tiny network leaves two checkpoints. Each time one file of the newer one is damaged in a
copy (mostly one byte flipped; sometimes the file cut off or gone) and the run is resumed: from the newer one with
every value as it was, because the byte does not matter, or from the older one with a warning that names the file.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from checkout import commit_of_checkout

from pspnet_jax import config as config_module
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.compose import compose
from pspnet_jax.run import Run
from pspnet_jax.train import train

SHARE_CUT, SHARE_GONE = 0.05, 0.05


def tiny_config():
    """Two checkpoints, after steps 1 and 2."""
    config = config_module.default_config()
    config.name = "tiny"
    config.data.source, config.data.labels = "scenes", "scenes"
    config.data.train_split, config.data.val_split = "train", "val"
    config.data.crop_size = (33, 33)
    config.augment.recipe = "none"
    config.model.backbone, config.model.width = "resnet10", 8
    config.train.global_batch_size = 8
    config.train.num_steps = 2
    config.train.checkpoint_every_steps = 1
    config.evaluate.batch_size = 20
    return config


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of three ways; says how."""
    content = bytearray(path.read_bytes())
    draw = rng.random()
    if draw < SHARE_GONE:
        path.unlink()
        return "gone"
    if draw < SHARE_GONE + SHARE_CUT or not content:
        path.write_bytes(content[: rng.randrange(len(content))] if content else b"x")
        return "cut"
    content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return "flipped"


def choose(files: list[Path], rng: random.Random) -> Path:
    """Half of the time any file, else one by its size: small ones describe, large ones hold values."""
    if rng.random() < 0.5:
        return rng.choice(files)
    return rng.choices(files, [path.stat().st_size for path in files])[0]


def resume(run: Run, workdir: Path) -> tuple[int, list[np.ndarray]]:
    """The step from which a run goes on, and all values of its state."""
    import jax

    moved = dataclasses.replace(
        run, workdir=workdir, checkpoints=CheckpointFolder(workdir / "checkpoints")
    )
    state = moved.resume_or_start()
    return int(state.step), [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """To the bit."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(first, second, strict=True)
    )


def run_all(arguments: argparse.Namespace) -> int:
    """The number of faults."""
    output, rng = arguments.output.absolute(), random.Random(arguments.seed)
    shutil.rmtree(output, ignore_errors=True)
    whole = output / "whole"
    train(tiny_config(), whole)
    run = compose(tiny_config(), whole)
    copy = output / "copy"
    expected = {}
    for step in (1, 2):
        shutil.copytree(whole, copy)
        if step == 1:
            shutil.rmtree(copy / "checkpoints" / "00000002")
        found, expected[step] = resume(run, copy)
        assert found == step
        shutil.rmtree(copy)
    outcomes, faults = Counter(), []
    start = time.monotonic()
    for number in range(arguments.flips):
        shutil.copytree(whole, copy)
        files = sorted(
            path for path in (copy / "checkpoints/00000002").rglob("*") if path.is_file()
        )
        path = choose(files, rng)
        how = damage(path, rng)
        what = f"{number}: {path.relative_to(copy)} {how}"
        try:
            step, values = resume(run, copy)
            if not equal(values, expected.get(step, [])):
                faults.append(f"{what}: other values at step {step}")
            outcomes[f"{how}: {'no value changed' if step == 2 else 'detected'}"] += 1
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {error}")
        shutil.rmtree(copy)
    found = {
        "damaged": arguments.flips,
        "outcomes": dict(sorted(outcomes.items())),
        "seconds_each": (time.monotonic() - start) / max(arguments.flips, 1),
        "seed": arguments.seed,
        "commit": commit_of_checkout(),
        "faults": faults,
    }
    (output / "results.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))
    return len(faults)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/flipped_bytes"))
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(min(run_all(parser.parse_args()), 1))


if __name__ == "__main__":
    main()
