"""ADE20K scene parsing (150 classes), PSPNet-50: the authors' recipe.

    python -m pspnet_jax.main --config=configs/ade20k.py --config.data.root=ADEChallengeData2016

Zhao et al. 2017, table 3: mIoU 41.68 (Caffe); the authors' PyTorch code: 41.89. Both start from a backbone
trained on ImageNet and are evaluated on sliding windows at one scale; this config, for now, starts from random
weights and evaluates whole images, so it will not reach them. 100 epochs of 20,210 images at batch 16 are 126,300 steps; 14 hours on
eight RTX 2080 Ti in the authors' PyTorch code.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet50"
    config.data.root = "data/ADEChallengeData2016"
    return config
