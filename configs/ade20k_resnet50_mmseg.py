"""ADE20K scene parsing (150 classes), PSPNet-50 by mmsegmentation's recipe.

    python -m pspnet_jax.main --config=configs/ade20k_resnet50_mmseg.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet50_v2.pth

The target, mIoU in % on the 2,000 validation images by their protocol (whole image, short side 512), was not
reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    mmsegmentation, 80k steps         41.13         41.94     four GPUs, 8.5 GB each
    mmsegmentation, 160k steps        42.48         43.44

The recipe is theirs: keep-ratio resize, crops that no class fills, changes of color, weight decay 5e-4, one learning
rate for all, falling to 1e-4, a loss divided by all pixels, batches of 16. The network is the authors' (deep stem
64/64/128, dilation from the first block on, corners aligned), with crops of 513 instead of 512 because its sides
are 8n + 1; evaluation is by their protocol `mmseg-whole`. resnet50_v2.pth holds the ImageNet weights that the authors distribute
(github.com/hszhao/semseg).

DIR is ADEChallengeData2016.zip of the scene parsing challenge (sceneparsing.csail.mit.edu), unpacked: 20,210
training images, masks as they come (0 = void, 1..150), not the authors' converted ones.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet50_mmseg"

    config.data.crop_size = (513, 513)

    config.augment.recipe = "mmseg"

    config.loss.normalizer = "all"

    config.optimizer.weight_decay = 5e-4
    config.optimizer.minimum_learning_rate = 1e-4
    config.optimizer.head_multiplier = 1.0

    config.train.num_steps = 80_000
    config.evaluate.protocol = "mmseg-whole"
    return config
