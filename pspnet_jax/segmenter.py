"""A network that is ready to use: weights, label set, normalization and protocol in one object.

* `load(PATH)` reads a run (or a converted model) and needs nothing else: the checkpoint's `model` part
  describes itself.
* Images of any size are accepted: they are padded at the bottom and right with the mean to the network's
  size rule, and the result is cropped back.
* Compilations are kept. Under a protocol with padded windows there is one for all image sizes, else one
  for each size that the network pads images to.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from pspnet_jax import parallel, passes, protocols, stored_model, stream, windows
from pspnet_jax.arrays import (
    AnyArray,
    AnyImage,
    Images,
    LabelMap,
    Logits,
    Prediction,
    RawImage,
    RawImages,
)
from pspnet_jax.canvas import Wanted
from pspnet_jax.protocols import Protocol
from pspnet_jax.stored_model import Description, StoredModel
from pspnet_jax.stream import NetworkRule
from pspnet_jax.trees import Tree


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, for reports."""

    path: str
    step: int
    digest: str


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
        self._network = description.network(platform=parallel.platform_of(self._mesh))
        everywhere = parallel.replicated(self._mesh)
        weights = jax.device_put((params, batch_stats), everywhere)
        self._weights = jax.device_put(passes.prepare(weights, network=self._network), everywhere)

    def __repr__(self) -> str:
        model, labels = self.description.model, self.label_set
        return (
            f"<Segmenter: {model.family} {model.backbone} of width {model.width}, {labels.num_classes} classes of "
            f"'{labels.name}', protocol {self.protocol.name}>"
        )

    def logits(
        self, images: RawImages | Images
    ) -> Float32[jax.Array, "batch height width classes"]:
        """Class scores at input size. uint8 images are raw RGB, floating ones already normalized."""
        return passes.logits(self._weights, self._place(images), network=self._network)

    def probabilities(
        self, image: RawImage, *, protocol: str | Protocol | None = None, **options: Any
    ) -> Float32[jax.Array, "height width classes"]:
        """Class probabilities of one image under a protocol.

        Args:
            image: RGB, 0 .. 255.
            protocol, options: as of `choose_protocol`.

        Raises:
            ValueError: for an unknown protocol, or an option that it does not have.
        """
        chosen = self.choose_protocol(protocol, **options)
        (prediction,) = self.predict([image], protocol=chosen, probabilities="float32")
        return jnp.asarray(prediction.probabilities)

    def predict(
        self,
        images: Iterable[AnyImage],
        *,
        protocol: str | Protocol | None = None,
        batch_size: int = 1,
        canvas_gib: float = 2.0,
        confidence: bool = False,
        entropy: bool = False,
        probabilities: Literal["float16", "float32"] | None = None,
    ) -> Iterator[Prediction]:
        """Predictions of a stream of images of any sizes, in their order; some are read ahead.

        Args:
            images: RGB, 0 .. 255.
            protocol: a name, or what `choose_protocol` gives; None is the checkpoint's own.
            batch_size: windows, or whole images of equal size, that go through together; on several
                devices rounded up to as many on each.
            canvas_gib: limit of memory of each device for scores of unfinished images under a protocol
                with windows, GiB; the network's own memory comes on top.
            confidence: also the probability of the chosen class.
            entropy: also the entropy.
            probabilities: also all class probabilities, in this precision.

        Raises:
            ValueError: for what is no RGB image, naming its shape, or an impossible number.
        """
        chosen = self.choose_protocol(protocol)
        passes.check_passes(batch_size, canvas_gib)
        tile = functools.partial(
            passes.make_tile,
            of_logits=chosen.rules.averages == "logits",
            wanted=Wanted(confidence, entropy, probabilities),
            mesh=self._mesh,
        )
        checked = map(_checked, images)
        batch_size = -(batch_size // -self._mesh.size)  # of each device
        if chosen.slides:
            return self._slide(checked, chosen, tile, batch_size, canvas_gib)
        return stream.whole(
            checked,
            chosen,
            network=NetworkRule(self.description.model.size_rule.padded, self._resize_rule),
            num_lanes=self._mesh.size,
            batch_size=batch_size,
            score=self._score,
            stack=functools.partial(passes.stack_scores, mesh=self._mesh),
            tile=tile,
        )

    def class_map(
        self, image: RawImage, *, protocol: str | Protocol | None = None, **options: Any
    ) -> LabelMap:
        """The most probable class of each pixel of one image, as train ids; under a protocol, as `probabilities`."""
        (prediction,) = self.predict([image], protocol=self.choose_protocol(protocol, **options))
        return prediction.class_map

    def class_map_by_rows(self, image: AnyImage) -> LabelMap:
        """`class_map` of one image that is too large for one device: whole, at its own size, without its mirror
        image. Each device has a part of the rows of every map; sums differ by rounding.

        Args:
            image: RGB, 0 .. 255.

        Raises:
            ValueError: for what is no RGB image, naming its shape.
        """
        # The forms for CPUs cannot be split by rows.
        platform = None if self._network.platform == "cpu" else self._network.platform
        network = dataclasses.replace(self._network, platform=platform)
        images = jax.device_put(_checked(image)[None], parallel.replicated(self._mesh))
        classes = passes.class_maps_by_rows(self._weights, images, network=network, mesh=self._mesh)
        return np.asarray(classes)[0]

    def choose_protocol(self, protocol: str | Protocol | None = None, **options: Any) -> Protocol:
        """A protocol (None: the checkpoint's own) with every option that is not None.

        Args:
            protocol: a key of `protocols.PROTOCOLS`, or one that was chosen before.
            options: those of `protocols.OPTIONS` that the protocol has: `scales` are factors of `base_size`, `flip`
                averages with the mirror image, `base_size` is the long or short side at scale 1, `max_size` what the
                long side may not pass, `crop_size` (height, width) of windows and `stride` what is between them, all
                in pixels, `absent_class` ('skip' or 'zero') is for the means of scores.

        Raises:
            ValueError: for an unknown protocol, or an option that it does not have.
        """
        if protocol is None or protocol == self.protocol.name:
            return protocols.override(self.protocol, **options)
        if isinstance(protocol, str):
            protocol = protocols.choose(protocol, self.label_set)
        return protocols.override(protocol, **options)

    def _slide(
        self,
        images: Iterable[AnyImage],
        protocol: Protocol,
        tile: stream.TileFunction,
        batch_size: int,
        canvas_gib: float,
    ) -> Iterator[Prediction]:
        rules, num_classes = protocol.rules, self.label_set.num_classes
        samples = int(canvas_gib * 2**30 / (4 * num_classes))
        rows, columns = windows.canvas_size(protocol, batch_size, samples)
        shape = (self._mesh.size, rows, columns, num_classes)

        def add(canvas: jax.Array, batch: AnyArray, places: AnyArray, counts: AnyArray):
            return passes.add_windows(
                self._weights,
                canvas,
                *map(self._split, (batch, places, counts)),
                network=self._network,
                averages=rules.averages,
                flip=protocol.flip,
                mesh=self._mesh,
            )

        slider = stream.Slider(
            protocol,
            rule=self._resize_rule if rules.resizes_result == "network" else rules.resizes_result,
            fill=self.description.normalization.mean,
            batch_size=batch_size,
            canvas=jnp.zeros(shape, jnp.float32, device=parallel.split_batch(self._mesh)),
            add=add,
            tile=tile,
        )
        return slider.run(images)

    def _score(self, images: AnyArray) -> jax.Array:
        """Scores of raw images at the network's resolution; sizes that it pads alike compile once."""
        height, width = images.shape[1:3]
        rule = self.description.model.size_rule
        after = (rule.padded(height) - height, rule.padded(width) - width)
        padded = np.pad(images, ((0, 0), (0, after[0]), (0, after[1]), (0, 0)))
        size = np.array([height, width], np.int32)
        return passes.head_scores(self._weights, self._split(padded), size, network=self._network)

    @property
    def _resize_rule(self) -> str:
        return "align_corners" if self.description.model.align_corners else "half_pixel"

    def _split(self, array: AnyArray) -> jax.Array:
        return jax.device_put(array, parallel.split_batch(self._mesh))

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


def load(path: str | Path, *, step: str | int = "best", dtype: str | None = None) -> Segmenter:
    """The network of a run folder, a converted model, a file that `export` wrote, or a shipped one.

    Args:
        path: the run's folder, the one that holds `checkpoints`; a file of `export --format=pspnet_jax`; or
            'scenes', the network that comes with the package.
        step: 'best' (highest validation mean IoU), 'latest', or a step number.
        dtype: what maps are computed in, 'float32' or 'bfloat16'; None: what the network was trained in.

    Raises:
        FileNotFoundError: where there is no such checkpoint, naming the steps there are.
        ValueError: for a file of weights that does not describe its network, or another dtype.
        checkpoint.CorruptCheckpointError: where it does not hold what was written.
    """
    stored = stored_model.read(path, step=step)
    return Segmenter(
        stored.description.computed_in(dtype),
        stored.part["params"],
        stored.part["batch_stats"],
        provenance=Provenance(path=str(path), step=stored.step, digest=stored.digest),
    )


def logits_function(stored: StoredModel) -> Callable[[RawImages], Logits]:
    """What `Segmenter.logits` computes of uint8 images, as one function that holds the weights."""
    weights = stored.part["params"], stored.part["batch_stats"]

    def logits_of(images: RawImages) -> Logits:
        return passes.logits(weights, images, network=stored.description.network())

    return logits_of


def _checked(image: np.ndarray) -> AnyImage:
    """Floating images may be normalized ones; a protocol that resizes could not tell."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(
            f"the image is {image.dtype}{list(image.shape)}; it must be RGB, uint8 [height, width, 3] as "
            "read from a file (Segmenter.logits takes normalized ones, too)"
        )
    return image
