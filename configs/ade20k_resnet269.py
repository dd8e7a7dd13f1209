"""ADE20K scene parsing (150 classes), PSPNet-269: the paper's best single network.

    python -m pspnet_jax.main --config=configs/ade20k_resnet269.py \
        --config.data.root=DIR --config.init_from=resnet269.safetensors

The target, mIoU in % on the 2,000 validation images, was not reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    the paper (Caffe), table 3        43.81         44.94

ImageNet weights of a ResNet-269 with this stem (3, 30, 48 and 8 blocks) are not distributed by the authors' PyTorch
code: train them, or start a longer training without --config.init_from. Hardware: the GPUs of the paper are not
named; blocks are computed again in the backward pass (model.remat), so that it fits where PSPNet-101 does.

DIR is ADEChallengeData2016.zip of the scene parsing challenge (sceneparsing.csail.mit.edu), unpacked: 20,210
training images, masks as they come (0 = void, 1..150), not the authors' converted ones. 150,000 steps at
batch 16, as in the paper.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet269"

    config.model.backbone = "resnet269"
    config.model.remat = True

    config.train.num_steps = 150_000
    config.evaluate.protocol = "semseg"
    config.evaluate.batch_size = 2  # windows; an image of 512 x 384 has two
    return config
