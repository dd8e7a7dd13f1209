"""ADE20K scene parsing (150 classes), PSPNet-50: the authors' recipe.

    python -m pspnet_jax.main --config=configs/ade20k.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet50_v2.pth

Like theirs it computes in float32; with --config.model.dtype=bfloat16 a GPU needs 10.7 GB instead of 18.6.

The target, mIoU in % on the 2,000 validation images, was not reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    the authors' PyTorch code         41.89         42.84     eight RTX 2080 Ti, 14 h
    the paper (Caffe), table 3        41.68         42.78

resnet50_v2.pth holds the ImageNet weights with the deep stem that the authors distribute
(github.com/hszhao/semseg); the figures presume it. Multi-scale is `pspnet evaluate` with
--scales=0.5,0.75,1,1.25,1.5,1.75.

DIR is ADEChallengeData2016.zip of the scene parsing challenge (sceneparsing.csail.mit.edu), unpacked: 20,210
training images, masks as they come (0 = void, 1..150), not the authors' converted ones. 100 epochs at batch 16
are 126,300 steps, as in the authors' code.

Where the paper (Caffe) differs: other ImageNet weights; BGR without division by the standard deviation; 150,000 steps;
the learning rate is multiplied into the momentum; norms and biases do not decay (optimizer.decay_norm_and_bias), the
bias of the classifier learns twice as fast; labels of an eighth of the size (loss.resolution=eighth); ResNet-50 strides
in its 1x1 convolutions; dropout of single values; padding at the bottom and right in evaluation.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet50"

    config.evaluate.protocol = "semseg"
    config.evaluate.batch_size = 2  # windows; an image of 512 x 384 has two
    return config
