"""The arrays that flow through the program, named as types.

* Shapes are part of the types; the tests check them on every call (jaxtyping with beartype).
* Images travel as uint8 RGB, rows first; they are normalized on the device (a quarter of the bytes).
* Labels are train ids: 0 .. num_classes - 1, and 255 (`IGNORE_LABEL`) for pixels that do not count.
* The containers are plain named tuples: JAX and Grain see a tree of arrays, readers see names.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Shaped, UInt8

IGNORE_LABEL = 255
"""The one ignore label inside the program. Raw ids of data sets are mapped once, in `catalog`."""

AnyArray = jax.Array | np.ndarray

RawImage = UInt8[np.ndarray, "height width 3"]
"""One photograph: RGB, 0 .. 255."""
AnyImage = Shaped[np.ndarray, "_height _width 3"]
"""A photograph at some size, 8 bit or floating, 0 .. 255."""
LabelMap = UInt8[np.ndarray, "height width"]
"""One mask of train ids, or one predicted class map."""

RawImages = UInt8[AnyArray, "batch height width 3"]
Images = Float[AnyArray, "batch height width 3"]
"""Normalized images: (RGB - mean) / standard deviation."""
Labels = UInt8[AnyArray, "batch height width"]
Features = Float[jax.Array, "batch _height _width _channels"]
"""Feature maps; names with an underscore may change within one function."""
Logits = Float[jax.Array, "batch height width classes"]
PresenceLogits = Float[jax.Array, "batch classes"]
Scalar = Shaped[jax.Array, ""]


class Prediction(NamedTuple):
    """What is predicted of one image, on the host."""

    class_map: LabelMap
    """The most probable class of each pixel."""
    confidence: Float32[np.ndarray, "height width"] | None = None
    """Probability of that class, 0 .. 1."""
    entropy: Float32[np.ndarray, "height width"] | None = None
    """Of the class probabilities, divided by its largest possible value log(classes): 0 .. 1."""
    probabilities: Float[np.ndarray, "height width classes"] | None = None


class Example(NamedTuple):
    """One image with its mask, before batching."""

    image: RawImage
    labels: LabelMap
    index: np.int32
    """Position in the data set, so that errors and panels can name the file."""


Indices = Int32[AnyArray, "batch"]
"""Positions in the data set."""


class Batch(NamedTuple):
    """What one step consumes. The leading axis is the global batch, split over the devices."""

    images: RawImages
    labels: Labels
    index: Indices
    valid: Bool[AnyArray, "batch"]
    """False for images that only fill up the last batch of an evaluation."""


class BackboneFeatures(NamedTuple):
    """What every backbone returns: feature maps of its last two stages."""

    auxiliary: Features
    """Of the last stage but one, for auxiliary heads."""
    last: Features
    """For the pyramid."""


class Outputs(NamedTuple):
    """What every network of this package returns, training or not; an absent head is None.

    Logits have the resolution of the head (1/8 of the image at `output_stride` 8);
    `resample.resize` brings them to image size, in the loss and in the segmenter.
    """

    logits: Logits
    aux_logits: Logits | None = None
    presence_logits: PresenceLogits | None = None
