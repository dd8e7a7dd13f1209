"""Protocols: how class probabilities of whole images of any size come from a network.

* Everything here is pure JAX over a function Images -> Logits of the same size; no model, no files.
* A protocol is a name with all its options; reports carry it in full, because the same network scores
  differently under another one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pspnet_jax.arrays import Images, Logits, Probabilities

LogitsFunction = Callable[[Images], Logits]


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    `whole`: the image at its own size, one forward pass (padded to the network's size rule, the result
    cropped back), averaged with its mirror image as probabilities where `flip`.
    """

    name: str
    flip: bool
    absent_class: str
    """Whether a class that nobody drew and nobody predicted is left out of means: 'skip' or 'zero'."""

    @property
    def label(self) -> str:
        """The name, with what was overridden: 'whole', 'whole-noflip'."""
        if self.flip == PROTOCOLS[self.name].flip:
            return self.name
        return f"{self.name}-{'flip' if self.flip else 'noflip'}"


PROTOCOLS = {"whole": Protocol("whole", flip=True, absent_class="skip")}


def probabilities(
    logits_of: LogitsFunction, images: Images, *, protocol: Protocol
) -> Probabilities:
    """Class probabilities of whole images, f32[batch, height, width, classes].

    Args:
        logits_of: normalized images -> logits of the same height and width.
        images: normalized.
    """
    upright = _softmax(logits_of(images))
    if not protocol.flip:
        return upright
    mirrored = _softmax(logits_of(images[:, :, ::-1]))[:, :, ::-1]
    return (upright + mirrored) / 2


def _softmax(logits: Logits) -> Probabilities:
    return jax.nn.softmax(logits, axis=-1).astype(jnp.float32)
