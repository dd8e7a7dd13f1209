"""ADE20K scene parsing (150 classes), PSPNet-18 by the authors' recipe: the small one.

    python -m pspnet_jax.main --config=configs/ade20k_resnet18.py \
        --config.data.root=DIR --config.init_from=resnet18-5c106cde.pth

No mIoU of this network is published; it was not trained here (no data and weights at hand). The nearest is CSAIL's
ResNet-18 with the same pyramid, by another recipe and protocol: 38.00 single scale, 38.81 multi-scale, in %.

resnet18-5c106cde.pth holds torchvision's ImageNet weights, whose stem is one 7x7 convolution. Hardware: one GPU of
16 GB takes the batch of 16; time was not measured.

DIR is ADEChallengeData2016.zip of the scene parsing challenge (sceneparsing.csail.mit.edu), unpacked: 20,210
training images, masks as they come (0 = void, 1..150), not the authors' converted ones. 100 epochs at batch 16
are 126,300 steps, as in the authors' recipe of ResNet-50.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet18"

    config.model.backbone = "resnet18"
    config.model.stem = "7x7"

    config.evaluate.protocol = "semseg"
    config.evaluate.batch_size = 2  # windows; an image of 512 x 384 has two
    return config
