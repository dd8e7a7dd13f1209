"""Scene parsing with the Pyramid Scene Parsing Network in JAX and Flax.

    segmenter = pspnet_jax.load("runs/scenes")
    image = pspnet_jax.read_image("photo.jpg")  # uint8 RGB [height, width, 3]
    class_map = segmenter.class_map(image)  # train ids

The names below are imported when they are first used; importing the package is cheap.
"""

import importlib

from pspnet_jax.version import __version__ as __version__

_HOMES = {
    "load": "segmenter",
    "read_image": "data.folders",
    "Segmenter": "segmenter",
    "PSPNet": "models.pspnet",
}
__all__ = ["PSPNet", "Segmenter", "load", "read_image"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pspnet_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"pspnet_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
