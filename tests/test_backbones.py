"""Every row of the table of backbones keeps what the table promises; a new one is tested from the start."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pspnet_jax.models.backbones import BACKBONES
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.models.resnet import DEPTHS
from pspnet_jax.train_step import split_model

from networks import options

BUDGET_SECONDS = 30

# What other backbones than ResNets may be given in vain; of ResNets those with other blocks, too.
OF_BLOCKS = {"bottleneck_stride", "basic_block_dilation"}
LONGER = ("resnet101", "resnet152", "resnet269")  # than resnet50, and nothing else
OTHERS = [name for name in BACKBONES if name not in DEPTHS]


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in LONGER])
def test_maps_have_the_stride_and_the_channels_that_are_declared(backbone):
    rng = NoRandomNumbers()
    model = nnx.eval_shape(lambda: PSPNet(options(backbone=backbone), 2, rng=rng)).backbone
    graphdef, *arrays = split_model(model)

    def features_of(params, batch_stats, images):
        return nnx.merge(graphdef, params, batch_stats)(images, train=False)

    # DenseNet's average pool leaves an odd row out.
    odd = 0 if backbone.startswith("densenet") else 1
    for height, width, small in ((64, 65, (8, 8 + odd)), (121, 40, (15 + odd, 5))):
        images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        found = jax.eval_shape(features_of, *arrays, images)
        assert found.last.shape == (1, *small, model.last_channels)
        assert found.auxiliary.shape == (1, *small, model.auxiliary_channels)


@pytest.mark.parametrize("backbone", OTHERS)
def test_options_of_resnets_are_taken_or_have_one_value(backbone):
    kind = BACKBONES[backbone]
    of_resnets = set(BACKBONES["resnet50"].takes)
    assert of_resnets - OF_BLOCKS - {"frozen_norm", "norm_momentum"} <= {*kind.takes, *kind.fixed}


@pytest.mark.parametrize("backbone", OTHERS)
def test_a_config_for_a_resnet_is_refused_with_all_that_would_be_right(backbone):
    given = {"stem": "deep", "output_stride": 16, "first_block_dilation": (1, 2)}
    with pytest.raises(ValueError, match=f"not possible with backbone={backbone}") as caught:
        options(backbone=backbone, **given)
    fixed = BACKBONES[backbone].fixed
    for flag in (
        f"--config.model.stem={fixed['stem']}",
        "--config.model.output_stride=8",
        "--config.model.first_block_dilation=1,1",
    ):
        assert flag in str(caught.value)
    options(backbone=backbone, **{name: fixed[name] for name in given})
