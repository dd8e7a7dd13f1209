"""Feeds broken and random input to everything that reads files or text from outside.

    python experiments/fuzz.py --output=runs/fuzz --inputs=20000

Each input must give a result or an error of a kind that the command line turns into a sentence, within
seconds and without gigabytes. Seeds are files of every kind; an input is a seed with bytes or words changed,
cut, doubled or drawn anew. Inputs go through processes of a few hundred, so that a crash is seen and its
number is kept.
"""

import argparse
import io
import json
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from checkout import commit_of_checkout

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
# What the command line turns into a sentence; `DataError` and the like are ValueErrors.
NAMED_ERRORS = (ValueError, OSError)
SECONDS = 10  # for one input
MOST_BYTES = 2**30  # that a process may grow by
INPUTS_PER_PROCESS = 250
Target = Callable[[bytes, random.Random, Path], object]


class TooSlowError(BaseException):
    """An input that takes longer than `SECONDS`."""


def mutate(seed: bytes, rng: random.Random) -> bytes:
    """Between one and thirty changes of a file."""
    content = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 30))):
        if not content:
            break
        place, length = rng.randrange(len(content)), rng.choice((1, 1, 2, 4, 64))
        match rng.randrange(7):
            case 0:
                content[place] ^= 1 << rng.randrange(8)
            case 1:
                content[place : place + length] = rng.randbytes(length)
            case 2:
                del content[place : place + length]
            case 3:
                content[place:place] = content[place : place + 16 * length]
            case 4:
                content[place : place + length] = (
                    bytes([rng.choice((0, 1, 127, 128, 255))]) * length
                )
            case 5:
                del content[place:]
            case 6:  # four bytes that may be a size
                content[place : place + 4] = rng.choice((0, 2**31 - 1, 2**32 - 1, 65536)).to_bytes(
                    4
                )
    return bytes(content)


def decode_image(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated photograph."""
    from pspnet_jax.data import folders

    return folders.decode_image("image", content)


def decode_mask(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated mask."""
    from pspnet_jax.data import folders

    return folders.decode_mask("mask.png", content)


def example(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated mask beside a good image, through the label set to train ids and an augmented crop."""
    from pspnet_jax.catalog import load_label_set
    from pspnet_jax.data import folders, headers, transforms

    label_set = load_label_set("camvid")
    mask = folders.decode_mask("mask.png", content)
    labels = folders.to_labels("mask.png", mask, label_set, headers.parse(content))
    image = np.zeros((*labels.shape, 3), np.uint8)
    options = transforms.resolve({"recipe": rng.choice(("semseg", "mmseg", "lextal"))})
    augment = transforms.make_augment(options, (33, 33), fill=(0, 0, 0))
    made = augment(folders.Example(image, labels, np.int32(0)), np.random.default_rng(0))
    assert made.labels.shape == (33, 33)
    assert set(np.unique(made.labels)) <= {*range(label_set.num_classes), 255}
    return made


def label_set(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated CSV of classes."""
    from pspnet_jax.catalog import load_label_set

    path = folder / "labels.csv"
    path.write_bytes(content)
    found = load_label_set(str(path))
    return found.from_raw(np.array([[0]], np.uint8))


def label_mapping(content: bytes, rng: random.Random, folder: Path) -> object:
    """A random label set that may clash with itself, and masks of random ids or colors."""
    from pspnet_jax.catalog import load_label_set
    from pspnet_jax.data import folders

    count, most = rng.randrange(1, 12), rng.choice((12, 256, 256))
    rows = [[rng.randrange(most) for _ in range(rng.choice((4, 4, 4, 6)))] for _ in range(count)]
    lines = ["id,name,red,green,blue,raw_ids"]
    for i, (red, green, blue, *raw) in enumerate(rows):
        lines.append(f"{i},class_{i},{red},{green},{blue},{' '.join(map(str, raw))}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    found = load_label_set(str(folder / "labels.csv"))
    shape = (rng.randrange(1, 9), rng.randrange(1, 9), *rng.choice(((), (3,))))
    places = np.array([rng.randrange(count) for _ in range(shape[0] * shape[1])])
    listed = np.array([row[:3] if len(shape) == 3 else row[3] for row in rows], np.uint8)
    mask = listed[places].reshape(shape)
    if rng.random() < 0.3:
        mask[0, 0] ^= 1 << rng.randrange(8)
    labels = folders.to_labels("mask.png", mask, found, None)
    assert labels.shape == shape[:2]
    assert set(np.unique(labels)) <= {*range(count), 255}
    return labels


def pytorch_file(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated .pth file, all of its arrays read."""
    from pspnet_jax.weights import pytorch

    path = folder / "weights.pth"
    path.write_bytes(content)
    return {name: np.array(array) for name, array in pytorch.read(path).items()}


def caffe_file(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated .caffemodel, all of its arrays read."""
    from pspnet_jax.weights import caffe

    path = folder / "weights.caffemodel"
    path.write_bytes(content)
    caffe.is_caffemodel(path)
    arrays, strides = caffe.read(path)
    assert all(stride > 0 for pair in strides.values() for stride in pair)
    return {name: np.array(array) for name, array in arrays.items()}


def safetensors_file(content: bytes, rng: random.Random, folder: Path) -> object:
    """A mutated file."""
    from pspnet_jax.weights import safetensors

    path = folder / "weights.safetensors"
    path.write_bytes(content)
    return safetensors.read(path)


def overrides(content: bytes, rng: random.Random, folder: Path) -> object:
    """Random values of random options on the command line, as far as a composed run."""
    from absl import flags

    from pspnet_jax import config as config_module
    from pspnet_jax.verbs import VERBS

    values = (
        "",
        "0",
        "-1",
        "1",
        "1e9",
        "nan",
        "inf",
        "x",
        "()",
        "(1,)",
        "3,3",
        "(1,2,3,6)",
        "None",
    )
    values += ("True", "semseg", "10**10", "'", "[", "\x00", "0.5", "resnet50", "9" * 30)
    words = ["--config=" + str(folder / "config.py")]
    scenes = Path(__file__).parent.parent / "configs" / "scenes.py"
    (folder / "config.py").write_text(scenes.read_text())
    for _ in range(rng.randrange(1, 4)):
        words.append(f"--config.{rng.choice(config_module.option_names())}={rng.choice(values)}")
    verb = VERBS["train"]
    found = flags.FlagValues()
    try:
        verb.define(found, ["pspnet", *words])
        found(["pspnet", *words])
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error  # what the command line calls a wrong command
    from pspnet_jax.compose import compose

    return compose(found["config"].value, folder / "run")


def evaluator(content: bytes, rng: random.Random, folder: Path) -> object:
    """Random truth and predictions: what comes out lies in 0 .. 1 or is not a number."""
    from pspnet_jax import metrics

    classes = rng.randrange(2, 255)
    size = (rng.randrange(1, 40), rng.randrange(1, 40))
    numbers = np.random.default_rng(rng.randrange(2**32))
    truth = numbers.integers(0, rng.randrange(1, classes + 1), size).astype(np.uint8)
    truth[numbers.random(size) < rng.choice((0, 0.5, 1))] = 255
    prediction = numbers.integers(0, rng.randrange(1, classes + 1), size).astype(np.uint8)
    confusion = metrics.confusion_matrix(truth, prediction, classes)
    assert confusion.sum() == (truth != 255).sum()
    found = metrics.scores(confusion, absent_class=rng.choice(("skip", "zero")))
    for value in (found.mean_iou, found.mean_accuracy, found.pixel_accuracy, *found.iou):
        assert np.isnan(value) or 0 <= value <= 1
    return found


def seeds() -> dict[str, tuple[Target, list[bytes]]]:
    """Target -> what it is fed, before it is changed."""
    numbers = np.random.default_rng(0)
    photograph = cv2.GaussianBlur(numbers.integers(0, 256, (40, 50, 3), dtype=np.uint8), (5, 5), 0)
    mask = numbers.integers(0, 11, (40, 50), dtype=np.uint8)
    images = [
        cv2.imencode(suffix, image)[1].tobytes()
        for suffix in (".jpg", ".png")
        for image in (photograph, photograph[..., 0], photograph[:3, :7])
    ]
    images.append(cv2.imencode(".png", photograph.astype(np.uint16) * 257)[1].tobytes())
    images.append(cv2.imencode(".png", np.dstack([photograph, photograph[..., :1]]))[1].tobytes())
    images += [b"", b"GIF89a" + bytes(50), photograph.tobytes()]
    masks = [
        cv2.imencode(".png", picture)[1].tobytes()
        for picture in (mask, mask[:1, :1], photograph, mask.astype(np.uint16))
    ]
    sheet = b"id,name,red,green,blue,raw_ids\n0,sky,1,2,3,0\n1,road,4,5,6,1 2\n255,void,,,,9\n"
    buffer = io.BytesIO()
    np.save(buffer, mask)
    from safetensors.numpy import save

    return {
        "images": (decode_image, images),
        "masks": (decode_mask, masks),
        "examples": (example, masks[:2]),
        "label sets": (label_set, [sheet]),
        "label mappings": (label_mapping, [b""]),
        "PyTorch files": (
            pytorch_file,
            [path.read_bytes() for path in sorted(GOLDENS.glob("pytorch_*.pth"))],
        ),
        "Caffe files": (caffe_file, caffe_files(numbers.random((2, 3, 2, 2), np.float32))),
        "safetensors files": (
            safetensors_file,
            [save({"a.kernel": mask, "b": mask[0].astype(np.float32)}, {"kind": "test"})],
        ),
        "options": (overrides, [b""]),
        "evaluator": (evaluator, [b""]),
    }


def caffe_files(kernel: np.ndarray) -> list[bytes]:
    """A small .caffemodel, and one of the first generation: a convolution of two values and stride 2."""
    from pspnet_jax.weights import caffe

    norm = {f"conv/bn.{i}": kernel[0, 0, 0] for i in range(4)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.caffemodel"
        caffe.write(path, {"conv.0": kernel, "conv.1": kernel[0, 0, 0], **norm}, {"conv": (2, 2)})
        whole = path.read_bytes()
    blob = b"\x08\x01\x10\x01\x18\x01\x20\x02\x2a\x08" + kernel[0, 0, 0].tobytes()
    first = b"\x12\x1d\x22\x01a\x28\x04\x32\x12" + blob + b"\x52\x02\x30\x02"
    return [whole, b"\x0a\x03net" + first]


def try_inputs(name: str, first: int, count: int, seed: int, folder: Path) -> None:
    """One process's inputs; writes its outcomes to a file, and the number of the input at hand."""
    target, files = seeds()[name]
    import jax

    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGALRM, _too_slow)
    outcomes, faults = Counter(), []
    for number in range(first, first + count):
        rng = random.Random(f"{seed} {name} {number}")
        content = mutate(rng.choice(files), rng)
        (folder / "at").write_text(str(number))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(SECONDS)
        try:
            target(content, rng, folder)
            outcomes["result"] += 1
        except NAMED_ERRORS as error:
            outcomes["named error"] += 1
            if not str(error).strip():
                faults.append(f"{name} {number}: {type(error).__name__} without a message")
        except TooSlowError:
            faults.append(f"{name} {number}: more than {SECONDS} s")
        except BaseException as error:
            faults.append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.alarm(0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MOST_BYTES:
            faults.append(f"{name} {number}: {grown / 2**30:.1f} GiB")
    (folder / "found").write_text(json.dumps({"outcomes": outcomes, "faults": faults}))


def _too_slow(number: int, frame: object) -> None:
    raise TooSlowError


def fuzz(name: str, count: int, seed: int) -> tuple[Counter, list[str]]:
    """Outcomes and faults of one target."""
    outcomes, faults = Counter(), []
    context = multiprocessing.get_context("spawn")
    for first in range(0, count, INPUTS_PER_PROCESS):
        some = min(INPUTS_PER_PROCESS, count - first)
        with tempfile.TemporaryDirectory() as folder:
            arguments = (name, first, some, seed, Path(folder))
            process = context.Process(target=try_inputs, args=arguments)
            process.start()
            process.join(60 + some * SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            found = Path(folder) / "found"
            if found.exists():
                found = json.loads(found.read_text())
                outcomes += Counter(found["outcomes"])
                faults += found["faults"]
            else:
                at = Path(folder) / "at"
                number = at.read_text() if at.exists() else "none"
                faults.append(f"{name} {number}: the process ended with {process.exitcode}")
    return outcomes, faults


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--inputs", type=int, default=20_000, help="over all targets")
    parser.add_argument("--targets", default="", help="names separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = arguments.targets.split(",") if arguments.targets else list(seeds())
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    found = {"outcomes": {}, "faults": [], "seed": arguments.seed, "commit": commit_of_checkout()}
    for name in names:
        outcomes, faults = fuzz(name, -(-arguments.inputs // len(names)), arguments.seed)
        found["outcomes"][name] = dict(outcomes)
        found["faults"] += faults
        print(f"{name}: {dict(outcomes)}, {len(faults)} faults", flush=True)
    found["minutes"] = (time.monotonic() - start) / 60
    (arguments.output / "results.json").write_text(json.dumps(found, indent=2))
    print("\n".join(found["faults"][:20]))
    sys.exit(min(len(found["faults"]), 1))


if __name__ == "__main__":
    main()
