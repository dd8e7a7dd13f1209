"""ADE20K scene parsing (150 classes), PSPNet-152: the authors' recipe at the paper's third depth.

    python -m pspnet_jax.main --config=configs/ade20k_resnet152.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet152_v2.pth

The target, mIoU in % on the 2,000 validation images, was not reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    the paper (Caffe), table 3        42.62         43.51

The authors' PyTorch code has no figure for it. resnet152_v2.pth holds the ImageNet weights with the deep stem that
the authors distribute (github.com/hszhao/semseg). Multi-scale is `pspnet evaluate` with
--scales=0.5,0.75,1,1.25,1.5,1.75. Hardware: eight GPUs of 12 GB or more took PSPNet-101 20 hours at the authors'.

DIR is ADEChallengeData2016.zip of the scene parsing challenge (sceneparsing.csail.mit.edu), unpacked: 20,210
training images, masks as they come (0 = void, 1..150), not the authors' converted ones. 100 epochs at batch 16
are 126,300 steps, as in the authors' code; the paper took 150,000.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet152"

    config.model.backbone = "resnet152"

    config.evaluate.protocol = "semseg"
    config.evaluate.batch_size = 2  # windows; an image of 512 x 384 has two
    return config
