"""A network that is ready to use: weights, label set, normalization and protocol in one object.

* `load(PATH)` reads a run (or a converted model) and needs nothing else: the checkpoint's `model` part
  describes itself.
* Images of any size are accepted: they are padded at the bottom and right with the mean to the network's
  size rule, and the result is cropped back.
* One compilation for each image size (and batch size); they are kept. Under a protocol with windows
  there is one for all sizes.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float16, Float32, UInt8

from pspnet_jax import parallel, windows
from pspnet_jax.arrays import (
    AnyArray,
    Images,
    LabelMap,
    Labels,
    Logits,
    Probabilities,
    RawImage,
    RawImages,
)
from pspnet_jax.catalog import LabelSet
from pspnet_jax.checkpoint import CheckpointFolder, Tree, check_same_shapes
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import FAMILIES, ModelOptions, Normalization, PSPNet
from pspnet_jax.resample import resize
from pspnet_jax.train_step import normalize, split_model
from pspnet_jax.windows import Protocol

FORMAT = 1
"""Of the description in checkpoints; counts up when an old one cannot be read any more."""


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself beside its arrays."""

    model: ModelOptions
    label_set: LabelSet
    normalization: Normalization
    protocol: Protocol

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
class Provenance:
    """Where weights come from, for reports."""

    path: str
    step: int
    digest: str


class Prediction(NamedTuple):
    """What is predicted of one image, on the host."""

    class_map: LabelMap
    """The most probable class of each pixel, as train ids."""
    confidence: Float32[np.ndarray, "height width"] | None = None
    """Probability of that class, 0 .. 1."""
    entropy: Float32[np.ndarray, "height width"] | None = None
    """Of the class probabilities, divided by its largest possible value log(classes): 0 .. 1."""
    probabilities: Float16[np.ndarray, "height width classes"] | None = None


class Segmenter:
    """Scene parsing of images of any size.

    Args:
        description: of the network.
        params: its parameters, nested dictionaries of arrays.
        batch_stats: its batch statistics, likewise.
        provenance: where the weights come from, for reports.
        mesh: devices over which batches are split (default: all of this process).
    """

    def __init__(
        self,
        description: Description,
        params: Tree,
        batch_stats: Tree,
        *,
        provenance: Provenance,
        mesh: Mesh | None = None,
    ):
        self.description, self.provenance = description, provenance
        self.label_set, self.protocol = description.label_set, description.protocol
        self._mesh = parallel.make_mesh(jax.local_devices()) if mesh is None else mesh
        everywhere = parallel.replicated(self._mesh)
        self._state = jax.device_put((params, batch_stats), everywhere)

    def logits(
        self, images: RawImages | Images
    ) -> Float32[jax.Array, "batch height width classes"]:
        """Class scores at input size. uint8 images are raw RGB, floating ones already normalized."""
        return _logits(*self._state, self._place(images), description=self.description)

    def probabilities(
        self,
        image: RawImage,
        *,
        protocol: str | None = None,
        scales: tuple[float, ...] | None = None,
        flip: bool | None = None,
        base_size: int | None = None,
        crop_size: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
    ) -> Float32[jax.Array, "height width classes"]:
        """Class probabilities of one image under a protocol (None: the checkpoint's own).

        Args:
            image: RGB, 0 .. 255.
            protocol: a key of `windows.PROTOCOLS`; the other options override its own.
            scales: factors of `base_size`.
            flip: average with the mirror image.
            base_size: long side at scale 1, pixels.
            crop_size: (height, width) of windows, pixels.
            stride: between windows, down and across, pixels.

        Raises:
            ValueError: for an unknown protocol, or an option that it does not have.
        """
        chosen = self.choose_protocol(
            protocol,
            scales=scales,
            flip=flip,
            base_size=base_size,
            crop_size=crop_size,
            stride=stride,
        )
        image = np.asarray(image)
        _check_raw(image, chosen)
        if chosen.slides:
            canvas = self._sliding_canvas(image, protocol=chosen, windows_per_pass=1)
            return canvas[: image.shape[0], : image.shape[1]]
        batch = self._place(image[None])
        found = _probabilities(*self._state, batch, description=self.description, flip=chosen.flip)
        return found[0]

    def predict(
        self,
        images: Iterable[RawImage],
        *,
        protocol: Protocol | None = None,
        batch_size: int = 1,
        canvas_gib: float = 2.0,
        confidence: bool = False,
        entropy: bool = False,
        probabilities: bool = False,
    ) -> Iterator[Prediction]:
        """Predictions of a stream of images of any sizes, in their order.

        Args:
            images: RGB, 0 .. 255.
            protocol: None is the checkpoint's own.
            batch_size: windows, or whole images of equal size, that go through together.
            canvas_gib: limit of device memory for class scores of unfinished images, GiB; the network's
                own memory comes on top.
            confidence: also the probability of the chosen class.
            entropy: also the entropy.
            probabilities: also all class probabilities.
        """
        chosen = protocol or self.protocol
        for image in images:
            options = {
                k: v
                for k, v in chosen.to_json().items()
                if k not in ("name", "absent_class") and (chosen.slides or k == "flip")
            }
            found = np.asarray(self.probabilities(image, protocol=chosen.name, **options))
            bounded = np.clip(found, 1e-30, 1)
            scaled = -(bounded * np.log(bounded)).sum(-1) / np.log(found.shape[-1])
            yield Prediction(
                found.argmax(-1).astype(np.uint8),
                found.max(-1) if confidence else None,
                scaled.astype(np.float32) if entropy else None,
                found.astype(np.float16) if probabilities else None,
            )

    def class_map(self, image: RawImage) -> LabelMap:
        """The most probable class of each pixel of one image, as train ids."""
        return self.class_maps(np.asarray(image)[None], protocol=self.protocol)[0]

    def class_maps(
        self, images: RawImages, *, protocol: Protocol, windows_per_pass: int = 1
    ) -> UInt8[np.ndarray, "batch height width"]:
        """As `class_map`, for images of equal size.

        Whole images go through together; under a protocol with windows, the windows of one image do,
        `windows_per_pass` at a time.
        """
        if protocol.slides:
            _check_raw(np.asarray(images)[0], protocol)
            height, width = images.shape[1:3]
            canvas_of = functools.partial(
                self._sliding_canvas, protocol=protocol, windows_per_pass=windows_per_pass
            )
            maps = [np.asarray(_most_probable(canvas_of(image))) for image in np.asarray(images)]
            return np.stack(maps)[:, :height, :width]
        batch = self._place(images)
        maps = _class_maps(*self._state, batch, description=self.description, flip=protocol.flip)
        return np.asarray(maps)

    def choose_protocol(self, name: str | None = None, **options: Any) -> Protocol:
        """A protocol by name (None: the checkpoint's own) with every option that is not None."""
        if name is None or name == self.protocol.name:
            return windows.override(self.protocol, **options)
        return windows.override(windows.choose(name, self.label_set), **options)

    def _sliding_canvas(
        self, image: RawImage, *, protocol: Protocol, windows_per_pass: int
    ) -> windows.Canvas:
        # Every device gets as many windows as every other.
        batch_size = -(windows_per_pass // -self._mesh.size) * self._mesh.size
        first_device = self._mesh.devices.flat[0]

        def probabilities_of(batch: np.ndarray) -> Probabilities:
            found = _window_probabilities(
                *self._state,
                self._place(batch),
                description=self.description,
                flip=protocol.flip,
            )
            return jax.device_put(found, first_device)

        return windows.sliding_probabilities(
            probabilities_of,
            image,
            protocol=protocol,
            fill=self.description.normalization.mean,
            batch_size=batch_size,
        )

    def _place(self, images: AnyArray) -> jax.Array:
        is_floating = jnp.issubdtype(images.dtype, jnp.floating)
        if (
            images.ndim != 4
            or images.shape[-1] != 3
            or not (is_floating or images.dtype == np.uint8)
        ):
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}; they must be RGB: uint8 [..., height, "
                "width, 3] as read from a file, or floating and already normalized"
            )
        splits = images.shape[0] % self._mesh.size == 0
        sharding = parallel.split_batch(self._mesh) if splits else parallel.replicated(self._mesh)
        return jax.device_put(images, sharding)


@dataclass(frozen=True)
class StoredModel:
    """The `model` part of a checkpoint, read and checked."""

    description: Description
    part: Tree
    """With 'params' and 'batch_stats', host arrays."""
    step: int
    digest: str


def load(path: str | Path, *, step: str | int = "best") -> Segmenter:
    """The network of a run folder or converted model.

    Args:
        path: the run's folder, the one that holds `checkpoints`.
        step: 'best' (highest validation mean IoU), 'latest', or a step number.

    Raises:
        FileNotFoundError: where there is no such checkpoint, naming the steps there are.
        checkpoint.CorruptCheckpointError: where it does not hold what was written.
    """
    stored = read_checkpoint(path, step=step)
    return Segmenter(
        stored.description,
        stored.part["params"],
        stored.part["batch_stats"],
        provenance=Provenance(path=str(path), step=stored.step, digest=stored.digest),
    )


def read_checkpoint(path: str | Path, *, step: str | int) -> StoredModel:
    """As `load`, without placing anything on devices."""
    folder = CheckpointFolder(Path(path) / "checkpoints")
    number = choose_step(folder, step)
    part = folder.load(number, "model")
    description = Description.from_json(part["description"])
    where = str(folder.folder(number))
    _, params, batch_stats = structure(description)
    wanted = {"params": params, "batch_stats": batch_stats}
    check_same_shapes({name: part[name] for name in wanted}, wanted, where=where)
    return StoredModel(description, part, number, folder.record(number).digests["model"])


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


def _check_raw(image: np.ndarray, protocol: Protocol) -> None:
    """Floating images may be normalized ones; a protocol that resizes could not tell."""
    is_photograph = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    if protocol.slides and not (is_photograph and image.size):
        raise ValueError(
            f"the image is {image.dtype}{list(image.shape)}; protocol '{protocol.name}' resizes images, it "
            "needs uint8 [height, width, 3] as read from a file"
        )


@functools.lru_cache(maxsize=16)
def structure(description: Description) -> tuple[nnx.GraphDef, Tree, Tree]:
    """The definition of a network with the shapes of its parameters and statistics, without values."""
    num_classes = description.label_set.num_classes
    model = nnx.eval_shape(lambda: PSPNet(description.model, num_classes, rng=NoRandomNumbers()))
    return split_model(model)


def model_part(description: Description, params: Tree, batch_stats: Tree) -> Tree:
    """What a checkpoint's `model` part holds."""
    return {"params": params, "batch_stats": batch_stats, "description": description.to_json()}


# Compiled once for each description, protocol and image size, whichever segmenter asks: evaluations
# during training share their compilations.


def _logits_of(
    params: Tree, batch_stats: Tree, images: Images, *, description: Description
) -> Logits:
    """Logits of normalized images, at their own size."""
    options = description.model
    height, width = images.shape[1:3]
    family = FAMILIES[options.family]
    padded = (family.padded(height), family.padded(width))
    # Normalized, the mean color is 0.
    images = jnp.pad(images, ((0, 0), (0, padded[0] - height), (0, padded[1] - width), (0, 0)))
    model = nnx.merge(structure(description)[0], params, batch_stats)
    logits = model(images, train=False).logits
    return resize(logits, padded, align_corners=options.align_corners)[:, :height, :width]


def _normalized(images: RawImages | Images, description: Description) -> Images:
    if images.dtype != jnp.uint8:
        return images
    return normalize(images, description.normalization, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="description")
def _logits(params: Tree, batch_stats: Tree, images, *, description: Description) -> Logits:
    return _logits_of(
        params, batch_stats, _normalized(images, description), description=description
    )


@functools.partial(jax.jit, static_argnames=("description", "flip"))
def _probabilities(
    params: Tree, batch_stats: Tree, images, *, description: Description, flip: bool
) -> Probabilities:
    logits_of = functools.partial(_logits_of, params, batch_stats, description=description)
    return windows.probabilities(logits_of, _normalized(images, description), flip=flip)


@functools.partial(jax.jit, static_argnames=("description", "flip"))
def _window_probabilities(
    params: Tree, batch_stats: Tree, crops, *, description: Description, flip: bool
) -> Probabilities:
    """Of crops of a resized image: RGB 0 .. 255, but no whole numbers any more."""
    logits_of = functools.partial(_logits_of, params, batch_stats, description=description)
    images = normalize(crops, description.normalization, dtype=jnp.float32)
    return windows.probabilities(logits_of, images, flip=flip)


@functools.partial(jax.jit, static_argnames=("description", "flip"))
def _class_maps(
    params: Tree, batch_stats: Tree, images, *, description: Description, flip: bool
) -> Labels:
    scores = _probabilities(params, batch_stats, images, description=description, flip=flip)
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)


@jax.jit
def _most_probable(canvas: windows.Canvas) -> UInt8[jax.Array, "_height _width"]:
    return jnp.argmax(canvas, axis=-1).astype(jnp.uint8)
