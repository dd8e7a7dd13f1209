"""Small networks and their options for the tests."""

import numpy as np

from pspnet_jax.config import default_config
from pspnet_jax.models.families import ModelOptions
from pspnet_jax.models.pspnet import PSPNet


def options(**overrides) -> ModelOptions:
    """A ResNet-10 of width 8, in the authors' numerics."""
    section = {**default_config().model.to_dict(), "backbone": "resnet10", "width": 8}
    return ModelOptions.resolve(section | overrides)


def network(num_classes=5, *, seed=0, platform=None, **overrides) -> PSPNet:
    rng = np.random.default_rng(seed)
    return PSPNet(options(**overrides), num_classes, rng=rng, platform=platform)
