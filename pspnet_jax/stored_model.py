"""Networks at rest: the `model` part of a checkpoint, or the same in one safetensors file.

* A file has the arrays by our paths and, as metadata, the description and the step. It needs nothing beside it.
* `SHIPPED` names come with the package, so that a first `predict` needs no training.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pspnet_jax import passes
from pspnet_jax.catalog import LabelSet
from pspnet_jax.checkpoint import CheckpointFolder, CorruptCheckpointError
from pspnet_jax.models.families import ModelOptions, Normalization
from pspnet_jax.passes import Network
from pspnet_jax.protocols import Protocol
from pspnet_jax.resample import Platform
from pspnet_jax.trees import Tree, check_same_shapes, digest, flatten, unflatten
from pspnet_jax.weights import safetensors

FILE_FORMAT = "pspnet_jax"
"""In the metadata of safetensors files that hold our own paths and layout."""
SHIPPED = {"scenes": Path(__file__).parent / "weights" / "scenes.safetensors"}
_PARTS = ("params", "batch_stats")
FORMAT = 1
"""Of descriptions; counts up when an old one cannot be read any more."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself beside its arrays."""

    model: ModelOptions
    label_set: LabelSet
    normalization: Normalization
    protocol: Protocol

    def network(self, *, platform: Platform = None) -> Network:
        """What it computes, on a platform (None: anywhere)."""
        num_classes = self.label_set.num_classes
        return Network(self.model, num_classes, self.normalization, platform)

    def computed_in(self, dtype: str | None) -> "Description":
        """The same with another `model.dtype` (None: its own); ValueError for one that there is not."""
        if dtype is None:
            return self
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} is not one of float32, bfloat16")
        return replace(self, model=ModelOptions.resolve(asdict(self.model) | {"dtype": dtype}))

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "model": asdict(self.model),
                "label_set": self.label_set.to_json(),
                "normalization": asdict(self.normalization),
                "protocol": self.protocol.to_json(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Description":
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise ValueError(
                f"the checkpoint has format {data.get('format')}, this version reads {FORMAT}"
            )
        return cls(
            model=ModelOptions.resolve(data["model"]),
            label_set=LabelSet.from_json(data["label_set"]),
            normalization=Normalization(**{k: tuple(v) for k, v in data["normalization"].items()}),
            protocol=Protocol.from_json(data["protocol"]),
        )


@dataclass(frozen=True)
class StoredModel:
    """The `model` part of a checkpoint, read and checked."""

    description: Description
    part: Tree
    """With 'params' and 'batch_stats', host arrays."""
    step: int
    digest: str


def find(path: str | Path) -> Path:
    """The path, or that of the shipped network of this name."""
    if str(path) in SHIPPED and not Path(path).exists():
        return SHIPPED[str(path)]
    return Path(path)


def describes_itself(path: Path) -> bool:
    """Whether a file is one that `write_file` wrote."""
    if not path.is_file() or not safetensors.is_safetensors(path):
        return False
    metadata = safetensors.read_metadata(path)
    return metadata.get("format") == FILE_FORMAT and {"description", "step"} <= metadata.keys()


def read(path: str | Path, *, step: str | int) -> StoredModel:
    """The network of a run folder, a converted model, a file or a shipped name, checked against its description.

    Args:
        step: 'best', 'latest', or a number; a file has one.

    Raises:
        FileNotFoundError: where there is no such checkpoint, naming the steps there are.
        CorruptCheckpointError: where it does not hold what was written.
        ValueError: for a file of weights that does not describe its network.
    """
    path = find(path)
    if path.is_file():
        return _read_file(path, step)
    folder = CheckpointFolder(path / "checkpoints")
    number = choose_step(folder, step)
    part = folder.load(number, "model")
    description = Description.from_json(part["description"])
    _check(part, description, where=str(folder.folder(number)))
    return StoredModel(description, part, number, folder.record(number).digests["model"])


def write_file(stored: StoredModel, path: Path) -> None:
    """The network in one safetensors file, which `read` reads as it reads a run."""
    leaves = flatten(stored.part["params"]) | flatten(stored.part["batch_stats"])
    metadata = {
        "format": FILE_FORMAT,
        "description": stored.part["description"],
        "step": str(stored.step),
        "digest": stored.digest,
    }
    safetensors.write(path, {name: np.asarray(x) for name, x in leaves.items()}, metadata)


def _read_file(path: Path, step: str | int) -> StoredModel:
    if not describes_itself(path):
        raise ValueError(
            f"{path} does not describe its network: published weights are converted first (pspnet convert), a run is "
            "written into one file by pspnet export --format=pspnet_jax"
        )
    arrays, metadata = safetensors.read(path)
    number = int(metadata["step"])
    if str(step) not in ("best", "latest", str(number)):
        raise FileNotFoundError(f"step={step} is not in {path}, which holds step {number} alone")
    description = Description.from_json(metadata["description"])
    _, *trees = passes.structure(description.network())
    part: Tree = {"description": metadata["description"]}
    for name, tree in zip(_PARTS, trees, strict=True):
        wanted = flatten(tree)
        part[name] = unflatten({key: arrays.pop(key) for key in wanted if key in arrays})
    part["params"] = unflatten(flatten(part["params"]) | arrays)  # what is left over is told below
    _check(part, description, where=str(path))
    if digest(part) != metadata.get("digest"):
        raise CorruptCheckpointError(f"{path}: values differ from its digest")
    return StoredModel(description, part, number, metadata["digest"])


def _check(part: Tree, description: Description, *, where: str) -> None:
    _, *trees = passes.structure(description.network())
    wanted = dict(zip(_PARTS, trees, strict=True))
    check_same_shapes({name: part[name] for name in wanted}, wanted, where=where)


def choose_step(folder: CheckpointFolder, step: str | int) -> int:
    """The number of 'best', 'latest' or of a given step that exists."""
    steps = folder.steps()
    if not steps:
        raise FileNotFoundError(
            f"{folder.path} holds no checkpoint; a run is loaded by its folder (runs/<name>), published "
            "weights are converted first (pspnet convert)"
        )
    if step == "best":
        return folder.best_step()
    if step == "latest":
        return folder.latest_step()
    if str(step).isdecimal() and int(step) in steps:
        return int(step)
    existing = ", ".join(map(str, steps))
    raise FileNotFoundError(
        f"step={step} is not in {folder.path}: there are {existing}, 'best' and 'latest'"
    )


def model_part(description: Description, params: Tree, batch_stats: Tree) -> Tree:
    """What a checkpoint's `model` part holds."""
    return {"params": params, "batch_stats": batch_stats, "description": description.to_json()}
