"""PSPNet: a dilated backbone, pyramid pooling, a head, and auxiliary heads on the stage before the last.

* What it is made of, its options say (`families`).
* The network returns `Outputs` at head resolution, the same structure in training and evaluation.
  Auxiliary heads run only in training; their parameters always exist, as in the authors' checkpoints.
* Images whose sides break the size rule are refused here; `segmenter` pads, the crop of training fits.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pspnet_jax.arrays import Images, Outputs
from pspnet_jax.models.backbones import BACKBONES, Backbone
from pspnet_jax.models.convolution import check_platform
from pspnet_jax.models.families import (
    AUX_HEADS,
    DTYPES,
    INITIALIZERS,
    ModelOptions,
    check_size,
)
from pspnet_jax.models.layers import BatchNorm, Conv, Initializer, Linear, RandomNumbers
from pspnet_jax.models.pyramid import (
    ClassifierHead,
    PresenceHead,
    ProgressiveHead,
    Pyramid,
    PyramidPooling,
)
from pspnet_jax.resample import Platform


class PSPNet(nnx.Module):
    """The Pyramid Scene Parsing Network (Zhao et al., CVPR 2017, figure 3).

    Args:
        options: a resolved `ModelOptions`.
        num_classes: channels of the logits.
        rng: `np.random.default_rng(seed)`; draws the initial parameters.
        platform: where it will run, 'cpu', 'gpu' or 'tpu': operations take the form that is fastest there,
            equal but for rounding. None: the plain form of each.
    """

    def __init__(
        self,
        options: ModelOptions,
        num_classes: int,
        *,
        rng: RandomNumbers,
        platform: Platform = None,
    ):
        check_platform(platform)
        dtype = DTYPES[options.dtype]
        initializers = INITIALIZERS[options.initializer]
        self.options, self.num_classes, self.platform = options, num_classes, platform
        make_backbone = functools.partial(_make_backbone, options, platform=platform, rng=rng)
        self.backbone = make_backbone(initializer=initializers.backbone)
        conv = functools.partial(
            Conv, initializer=initializers.heads, dtype=dtype, platform=platform
        )
        frozen, momentum = options.frozen_norm, options.norm_momentum
        norm = functools.partial(BatchNorm, frozen=frozen, momentum=momentum, platform=platform)
        self.pyramid = _make_pyramid(
            options, self.backbone.last_channels, conv=conv, norm=norm, rng=rng
        )
        make_head = functools.partial(
            ClassifierHead,
            num_classes=num_classes,
            dropout_rate=options.dropout_rate,
            dropout_kind=options.dropout_kind,
            initializer=initializers.classifiers,
            conv=conv,
            norm=norm,
            rng=rng,
        )
        hidden, aux_hidden = (
            units * options.width for units in (options.head_width, options.aux_width)
        )
        if options.head == "fused":
            kernel_sizes = options.head_kernels
            self.head = make_head(self.pyramid.out_channels, hidden, kernel_sizes=kernel_sizes)
        else:
            self.head = ProgressiveHead(
                self.pyramid.out_channels,
                hidden,
                num_classes,
                dropout_rate=options.dropout_rate,
                dropout_kind=options.dropout_kind,
                initializer=initializers.classifiers,
                align_corners=options.align_corners,
                conv=conv,
                norm=norm,
                rng=rng,
            )
        channels = self.backbone.auxiliary_channels
        has_pixel, has_presence = (name in options.aux_heads for name in AUX_HEADS)
        self.aux_head = make_head(channels, aux_hidden) if has_pixel else None
        linear = functools.partial(Linear, initializer=initializers.heads, dtype=dtype)
        make_presence = functools.partial(PresenceHead, channels, aux_hidden, num_classes, rng=rng)
        self.presence_head = make_presence(linear=linear) if has_presence else None

    def __call__(
        self, images: Images, *, train: bool = False, key: jax.Array | None = None
    ) -> Outputs:
        """Class scores of normalized images, at head resolution.

        Args:
            images: [batch, height, width, 3], sides obeying the size rule.
            train: batch statistics and dropout on; the auxiliary head runs.
            key: for dropout; needed in training.

        Returns:
            `Outputs` in float32 (float64 where that is computed in).

        Raises:
            ValueError: for a side that breaks the size rule, with the nearest that obey it.
        """
        check_size((images.shape[1], images.shape[2]), self.options.size_rule)
        head_key, aux_key = (None, None) if key is None else jax.random.split(key)
        features = self.backbone(jnp.asarray(images), train=train)
        pyramid = self.pyramid(features.last, train=train)
        logits = _at_least_float32(self.head(pyramid, train=train, key=head_key))
        if not train:
            return Outputs(logits)
        aux_logits = presence_logits = None
        if self.aux_head is not None:
            aux_logits = self.aux_head(Pyramid(features.auxiliary), train=train, key=aux_key)
            aux_logits = _at_least_float32(aux_logits)
        if self.presence_head is not None:
            presence_logits = _at_least_float32(self.presence_head(features.auxiliary))
        return Outputs(logits, aux_logits, presence_logits)


def _make_backbone(
    options: ModelOptions, *, initializer: Initializer, platform: Platform, rng: RandomNumbers
) -> Backbone:
    kind = BACKBONES[options.backbone]
    return kind.make(
        options.backbone,
        width=options.width,
        remat=options.remat,
        dtype=DTYPES[options.dtype],
        platform=platform,
        rng=rng,
        initializer=initializer,
        **{name: getattr(options, name) for name in kind.takes},
    )


def _make_pyramid(options: ModelOptions, channels: int, *, conv, norm, rng) -> PyramidPooling:
    return PyramidPooling(
        channels,
        bins=options.pyramid_bins,
        pool=options.pyramid_pool,
        reduction=options.pyramid_reduction,
        level_channels=options.pyramid_width * options.width or None,
        linear=options.pyramid_linear,
        bin1_norm=options.pyramid_bin1_norm,
        map_first=options.pyramid_map_first,
        align_corners=options.align_corners,
        conv=conv,
        norm=norm,
        rng=rng,
    )


def is_head(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to a head, by its path (heads learn faster than the backbone)."""
    return path[0] != "backbone"


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
