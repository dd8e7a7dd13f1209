"""ADE20K scene parsing (150 classes), mmsegmentation's PSPNet-50 by its recipe.

    python -m pspnet_jax.main --config=configs/ade20k_resnet50_mmseg.py \
        --config.data.root=DIR --config.init_from=resnet50_v1c.pth

The target, mIoU in % on the 2,000 validation images by their protocol (whole image, short side 512), was not
reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    mmsegmentation, 80k steps         41.13         41.94     four GPUs, 8.5 GB each
    mmsegmentation, 160k steps        42.48         43.44

The recipe is theirs: keep-ratio resize, crops that no class fills, changes of color, weight decay 5e-4, one learning
rate for all, falling to 1e-4, a loss divided by all pixels, batches of 16. So is the network (family `mmseg`: stem 32/32/64,
dilation 1 and 2 in the first blocks, corners not aligned), and evaluation is by their protocol `mmseg-whole`.
resnet50_v1c.pth are the ImageNet weights that they start from (open-mmlab's model zoo).

DIR is ADEChallengeData2016.zip of the scene parsing challenge (sceneparsing.csail.mit.edu), unpacked: 20,210
training images, masks as they come (0 = void, 1..150), not the authors' converted ones.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet50_mmseg"

    config.data.crop_size = (512, 512)

    config.augment.recipe = "mmseg"

    config.model.family = "mmseg"

    config.loss.normalizer = "all"

    config.optimizer.weight_decay = 5e-4
    config.optimizer.minimum_learning_rate = 1e-4
    config.optimizer.head_multiplier = 1.0

    config.train.num_steps = 80_000
    config.evaluate.protocol = "mmseg-whole"
    return config
