"""Seconds per image of multi-scale evaluation: the authors' test script beside the verb `evaluate`.

    git clone https://github.com/hszhao/semseg
    python experiments/benchmark_evaluation.py --semseg=semseg --images PHOTO... --output=runs/benchmark_evaluation

in an environment with this package, torch, pyyaml, tensorboardX and pillow (their code imports them). Both sides
are whole processes, one after the other on the same machine: they start, read the same weights (PSPNet-50, 150
classes, random, with the statistics of the photographs) and photographs (resized to 512x683, every second one on its side), predict
six scales with their mirror images by the authors' protocol, count, and write what they write. Mean IoU and pixel
accuracy of both are printed, too: they must be equal.

Their script runs as published, in eager PyTorch. So that it runs without a GPU, `.cuda()` and DataParallel leave
things where they are. It resizes 150 channels at once, which OpenCV 5 refuses: `--their_path=DIR` names a folder
with OpenCV 4 and Pillow 12 (pip install --no-deps --target=DIR opencv-python-headless==4.11.0.86 pillow==12.0.0;
Pillow 13 refuses its palettes).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from pspnet_torch import MEAN, STD, PSPNet

from pspnet_jax import convert
from pspnet_jax.data.folders import read_image
from pspnet_jax.progress import log_to

SCALES = "0.5,0.75,1.0,1.25,1.5,1.75"
SIZE = (512, 683)

RUN_THEIRS = """
import collections, collections.abc, runpy, sys
import torch
collections.Iterable = collections.abc.Iterable
torch.Tensor.cuda = lambda self, *_, **__: self
torch.nn.Module.cuda = lambda self, *_, **__: self
class Unwrapped(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
    def forward(self, x):
        return self.module(x)
torch.nn.DataParallel = Unwrapped
sys.path.insert(0, ".")
runpy.run_path("tool/test.py", run_name="__main__")
"""


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--semseg", required=True, help="checkout of github.com/hszhao/semseg")
    parser.add_argument("--images", nargs="+", required=True, help="photographs")
    parser.add_argument("--output", default="runs/benchmark_evaluation")
    parser.add_argument("--scales", default=SCALES)
    parser.add_argument("--batch_size", type=int, default=1, help="windows, on our side")
    parser.add_argument("--their_path", default="", help="put before PYTHONPATH on their side")
    arguments = parser.parse_args()
    log_to(None)
    output = Path(arguments.output).absolute()
    num_images = write_photographs(output / "data", arguments.images)
    weights = output / "weights.pth"
    write_weights(weights, arguments.images)
    for folder in ("model", "ours"):  # of other photographs
        shutil.rmtree(output / folder, ignore_errors=True)
    convert.run([str(weights)], output=str(output / "model"), family="semseg", labels="ade20k")
    found = {
        "theirs": run_theirs(arguments, output, weights),
        "ours": run_ours(arguments, output),
    }
    for row in found.values():
        row["images_per_second"] = num_images / row["seconds"]
    result = {
        "num_images": num_images,
        "scales": arguments.scales,
        **found,
        "ratio": found["ours"]["images_per_second"] / found["theirs"]["images_per_second"],
    }
    (output / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_photographs(root: Path, images: list[str]) -> int:
    """ADE20K's layout with masks of random classes; for the authors' list also converted masks."""
    rng = np.random.default_rng(0)
    lines = []
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("images/validation", "annotations/validation", "converted"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(images):
        size = SIZE if i % 2 == 0 else SIZE[::-1]
        image = cv2.resize(read_image(Path(path)), size[::-1])
        coarse = rng.integers(0, 151, (5, 7)).astype(np.uint8)  # 0 is void
        mask = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
        name = f"photograph_{i:03d}"
        # PNG under the name of JPEG: both sides read the content, and read the same pixels.
        _, encoded = cv2.imencode(".png", image[..., ::-1])
        (root / "images/validation" / f"{name}.jpg").write_bytes(encoded.tobytes())
        cv2.imwrite(str(root / "annotations/validation" / f"{name}.png"), mask)
        cv2.imwrite(str(root / "converted" / f"{name}.png"), mask - 1)  # void wraps to 255
        lines.append(f"images/validation/{name}.jpg converted/{name}.png")
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return len(images)


def write_weights(path: Path, images: list[str]) -> None:
    """A file as the authors' training writes it: random, with the statistics of the photographs."""
    torch.manual_seed(0)
    network = PSPNet("resnet50", 150, dropout_rate=0.0)
    crops = [cv2.resize(read_image(Path(image)), (473, 473)) for image in images]
    batch = torch.from_numpy((np.stack(crops) - MEAN) / STD).permute(0, 3, 1, 2).float()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics become the batch's
    with torch.no_grad():
        network.train()
        network(batch)
        network.eval()
        # Many classes, each somewhere: logits of mean 0 and a few units apart.
        scores = network(batch)[0]
        classifier = network.cls[4]
        means = scores.mean(dim=(0, 2, 3))
        scale = 4 / (scores - means[:, None, None]).std()
        classifier.bias.copy_((classifier.bias - means) * scale)
        classifier.weight.mul_(scale)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 100, "state_dict": state}, path)


def run_theirs(arguments: argparse.Namespace, output: Path, weights: Path) -> dict:
    """Their tool/test.py on all photographs."""
    options = {
        "data_root": output / "data",
        "test_list": output / "data" / "list.txt",
        "split": "val",
        "scales": str([float(scale) for scale in arguments.scales.split(",")]),
        "model_path": weights,
        "save_folder": output / "theirs",
        "workers": 2,
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-c", RUN_THEIRS, "--config", "config/ade20k/ade20k_pspnet50.yaml"]
    path = os.pathsep.join(filter(None, [arguments.their_path, os.environ.get("PYTHONPATH", "")]))
    seconds, text = timed(
        command + words, output / "theirs.log", cwd=arguments.semseg, PYTHONPATH=path
    )
    scores = re.search(r"mIoU/mAcc/allAcc (\d\.\d+)/(\d\.\d+)/(\d\.\d+)", text)
    assert scores, text[-2000:]
    mean_iou, _, pixel_accuracy = map(float, scores.groups())
    return {"seconds": seconds, "mean_iou": mean_iou, "pixel_accuracy": pixel_accuracy}


def run_ours(arguments: argparse.Namespace, output: Path) -> dict:
    """The verb `evaluate` on the same."""
    root = Path(__file__).parent.parent
    command = [
        *(sys.executable, "-m", "pspnet_jax.main", "evaluate"),
        f"--checkpoint={output / 'model'}",
        f"--config={root / 'configs' / 'ade20k.py'}",
        f"--config.data.root={output / 'data'}",
        f"--config.evaluate.batch_size={arguments.batch_size}",
        "--protocol=semseg",
        f"--scales={arguments.scales}",
        f"--output={output / 'ours'}",
    ]
    cache = output / "cache"  # of compiled programs: empty, as at the first evaluation of a network
    shutil.rmtree(cache, ignore_errors=True)
    seconds, _ = timed(command, output / "ours.log", cwd=root, XDG_CACHE_HOME=str(cache))
    again, _ = timed(command, output / "ours.log", cwd=root, XDG_CACHE_HOME=str(cache))
    report = json.loads((output / "ours" / "report.json").read_text())
    return {
        "seconds": seconds,
        "seconds_with_compiled_programs": again,
        "seconds_without_start": report["seconds"],
        **{name: report[name] for name in ("mean_iou", "pixel_accuracy")},
    }


def timed(command: list[str], log: Path, *, cwd, **environment: str) -> tuple[float, str]:
    """Wall time of a process, and what it printed."""
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - start
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}; {log}:\n{done.stderr[-3000:]}")
    return seconds, done.stdout + done.stderr


if __name__ == "__main__":
    main()
