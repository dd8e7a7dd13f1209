"""Small networks, and what describes them, for the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import default_config
from pspnet_jax.models.families import IMAGENET_8BIT, ModelOptions
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.protocols import PROTOCOLS, Protocol, choose, override
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.stored_model import Description
from pspnet_jax.train_step import split_model

CAMVID = load_label_set("camvid")
MEMORY = Provenance("memory", 0, "")


def random(*shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def options(**overrides) -> ModelOptions:
    """A ResNet-10 of width 8, in the authors' numerics."""
    section = {**default_config().model.to_dict(), "backbone": "resnet10", "width": 8}
    return ModelOptions.resolve(section | overrides)


def network(num_classes=5, *, seed=0, platform=None, **overrides) -> PSPNet:
    rng = np.random.default_rng(seed)
    return PSPNet(options(**overrides), num_classes, rng=rng, platform=platform)


def small_protocol(name="semseg", **options) -> Protocol:
    """Windows of 33 x 41 over images of 64 pixels."""
    return override(PROTOCOLS[name], **{"crop_size": (33, 41), "base_size": 64} | options)


def description(protocol: Protocol | None = None, **overrides) -> Description:
    """Of a network for CamVid, whose own protocol takes whole images."""
    protocol = choose("whole", CAMVID) if protocol is None else protocol
    return Description(options(**overrides), CAMVID, IMAGENET_8BIT, protocol)


def segmenter(
    *,
    seed=0,
    sureness=1.0,
    protocol: Protocol | None = None,
    provenance=MEMORY,
    mesh: Mesh | None = None,
    **overrides,
) -> Segmenter:
    """For CamVid; `sureness` is a factor of its logits: as initialized it is sure of nothing."""
    _, params, batch_stats = split_model(network(CAMVID.num_classes, seed=seed, **overrides))
    classifier = params["head"]["classifier"]
    classifier["kernel"] = sureness * classifier["kernel"]
    described = description(protocol, **overrides)
    return Segmenter(described, params, batch_stats, provenance=provenance, mesh=mesh)
