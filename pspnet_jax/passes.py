"""The compiled passes of a network: images in, class scores, canvases and tiles out.

* Pure functions of weights and images, compiled once for each network, protocol and image size, whoever
  asks: evaluations during training share their compilations.
* A `Network` is plain data and holds no array.
* Weights are those of a checkpoint, or what `prepare` made of them.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pspnet_jax import canvas as canvas_module
from pspnet_jax.arrays import Images, Labels, Logits, RawImages
from pspnet_jax.canvas import AxisTaps, Tile, Wanted
from pspnet_jax.models import marks
from pspnet_jax.models.families import ModelOptions, Normalization
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.marks import Prepared
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.resample import Maps, Platform, resize
from pspnet_jax.train_step import normalize, split_model
from pspnet_jax.trees import Tree

Weights = tuple[Tree, Tree] | Prepared
"""(parameters, batch statistics), or what `prepare` made of them."""


@dataclass(frozen=True)
class Network:
    """What a network computes, without its weights.

    Args:
        platform: where it will run, 'cpu', 'gpu' or 'tpu'; None: anywhere (see `PSPNet`).
    """

    model: ModelOptions
    num_classes: int
    normalization: Normalization
    platform: Platform = None


def check_passes(batch_size: int, canvas_gib: float) -> None:
    """Raise ValueError for numbers that no pass can have."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 0 < canvas_gib <= 2**20:
        raise ValueError(f"canvas_gib={canvas_gib} must be above 0, GiB")


@functools.lru_cache(maxsize=16)
def structure(network: Network) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Its definition, with the shapes of its parameters and statistics instead of values."""

    def make() -> PSPNet:
        rng, platform = NoRandomNumbers(), network.platform
        return PSPNet(network.model, network.num_classes, rng=rng, platform=platform)

    return split_model(nnx.eval_shape(make))


def prepare(weights: tuple[Tree, Tree], *, network: Network) -> Weights:
    """For many passes: what each would make of kernels and biases is made now. Only on GPUs that is worth it: norms are
    folded into the convolutions before them, kernels rounded and laid out for cuDNN."""
    return _prepare(weights, network=network) if network.platform == "gpu" else weights


@functools.partial(jax.jit, static_argnames="network")
def _prepare(weights: tuple[Tree, Tree], *, network: Network) -> Prepared:
    side = network.model.size_rule.padded(64)  # of any image from which no pool leaves nothing
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return marks.prepare(functools.partial(_run, network), weights, images)


def _run(network: Network, weights: tuple[Tree, Tree], images: Images) -> Maps:
    model = nnx.merge(structure(network)[0], *weights)
    return model(images, train=False).logits


def _scores_of(weights: Weights, images: Images, *, network: Network) -> Maps:
    """Logits of normalized images of a size that the network takes, at its own resolution."""
    run = functools.partial(_run, network)
    if isinstance(weights, Prepared):
        return marks.apply(run, structure(network)[1:], weights, images)
    return run(weights, images)


def _logits_of(weights: Weights, images: Images, *, network: Network) -> Logits:
    """Logits of normalized images, at their own size."""
    height, width = images.shape[1:3]
    rule = network.model.size_rule
    padded = (rule.padded(height), rule.padded(width))
    # Normalized, the mean color is 0.
    images = jnp.pad(images, ((0, 0), (0, padded[0] - height), (0, padded[1] - width), (0, 0)))
    scores = _scores_of(weights, images, network=network)
    resized = resize(
        scores, padded, align_corners=network.model.align_corners, platform=network.platform
    )
    return resized[:, :height, :width]


def _normalized(images: RawImages | Images, network: Network) -> Images:
    if images.dtype != jnp.uint8:
        return images
    return normalize(images, network.normalization, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="network")
def logits(weights: Weights, images, *, network: Network) -> Logits:
    """Of images at their own size; uint8 ones are raw RGB, floating ones normalized."""
    return _logits_of(weights, _normalized(images, network), network=network)


def logits_by_rows(weights: Weights, images, *, network: Network, mesh: Mesh) -> Logits:
    """`logits` where each device has a part of the rows of every map; what they need of their neighbors' rows,
    XLA sends. Inside of a compiled function: numbers of rows that the devices do not divide cannot be placed from
    outside."""
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    images = jax.lax.with_sharding_constraint(_normalized(images, network), rows)
    scores = _logits_of(weights, images, network=network)
    return jax.lax.with_sharding_constraint(scores, rows)


@functools.partial(jax.jit, static_argnames=("network", "mesh"))
def class_maps_by_rows(weights: Weights, images, *, network: Network, mesh: Mesh) -> Labels:
    """The most probable class of each pixel, on every device."""
    scores = logits_by_rows(weights, images, network=network, mesh=mesh)
    classes = jnp.argmax(scores, axis=-1).astype(jnp.uint8)
    return jax.lax.with_sharding_constraint(classes, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames="network")
def head_scores(weights: Weights, images, size, *, network: Network) -> Maps:
    """Of raw images that are larger than `size` = (height, width): what lies beyond is the mean color."""
    images = normalize(images, network.normalization, dtype=jnp.float32)
    rows = jax.lax.broadcasted_iota(jnp.int32, images.shape, 1)
    columns = jax.lax.broadcasted_iota(jnp.int32, images.shape, 2)
    images = jnp.where((rows < size[0]) & (columns < size[1]), images, 0)
    scores = _scores_of(weights, images, network=network)
    return scores.astype(jnp.float32)


# The batch is split over the devices, each of which works on a lane of its own.
_REPLICATED, _LANES = PartitionSpec(), PartitionSpec("data")


@functools.partial(
    jax.jit, static_argnames=("network", "averages", "flip", "mesh"), donate_argnums=1
)
def add_windows(
    weights: Weights,
    canvas,
    crops,
    places,
    counts,
    *,
    network: Network,
    averages: str,
    flip: bool,
    mesh: Mesh,
):
    """Crops of resized images (RGB 0 .. 255, but no whole numbers any more) through the network."""
    logits_of = functools.partial(_logits_of, network=network)

    def lane(weights, canvas, crops, places, counts):
        images = normalize(crops, network.normalization, dtype=jnp.float32)
        scores = canvas_module.window_scores(
            functools.partial(logits_of, weights), images, averages=averages, flip=flip
        )
        return canvas_module.add_windows(canvas[0], scores, places, counts[0])[None]

    specs = (_REPLICATED, _LANES, _LANES, _LANES, _LANES)
    mapped = jax.shard_map(lane, mesh=mesh, in_specs=specs, out_specs=_LANES, check_vma=False)
    return mapped(weights, canvas, crops, places, counts)


@functools.partial(jax.jit, static_argnames="mesh")
def stack_scores(scores, *, mesh: Mesh):
    """`canvas.stack_scores` on each device."""

    def lane(scores):
        return canvas_module.stack_scores(scores)[None]

    return jax.shard_map(lane, mesh=mesh, in_specs=(_LANES,), out_specs=_LANES, check_vma=False)(
        scores
    )


@functools.partial(jax.jit, static_argnames=("of_logits", "wanted", "mesh"))
def make_tile(
    canvas, rows: AxisTaps, columns: AxisTaps, *, of_logits: bool, wanted: Wanted, mesh: Mesh
) -> Tile:
    """`canvas.make_tile` on each device."""

    def lane(canvas, rows, columns):
        first = functools.partial(jax.tree.map, lambda x: x[0])
        tile = canvas_module.make_tile(
            canvas[0], first(rows), first(columns), of_logits=of_logits, wanted=wanted
        )
        return jax.tree.map(lambda x: x[None], tile)

    specs = (_LANES, _LANES, _LANES)
    mapped = jax.shard_map(lane, mesh=mesh, in_specs=specs, out_specs=_LANES, check_vma=False)
    return mapped(canvas, rows, columns)
