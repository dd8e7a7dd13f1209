"""ADE20K scene parsing (150 classes), PSPNet-50 as the paper trained it, as far as that was published.

    python -m pspnet_jax.main --config=configs/ade20k_resnet50_caffe.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet50_v2.pth

The target, mIoU in % on the 2,000 validation images by the protocol `caffe`, was not reproduced here (no data and
weights at hand):

                                  single scale   multi-scale
    the paper (Caffe), table 3        41.68         42.78

The authors released three networks for evaluation and no code for training them. What the paper and those networks say
is here: the family `caffe` (stride in the 1x1 convolutions of ResNet-50, dropout of single values, RGB less the mean), norms
and biases that do not decay, labels of an eighth of the size, 150,000 steps of 16 images, a loss of 0.4 in the middle.

What is not: their ImageNet weights (the semseg ones, named above, expect RGB over its deviation: the first convolution
adapts), twice the rate for the bias of the classifier (here ten times the backbone's, as its kernel), the rate multiplied
into the momentum, and for how many GPUs a batch was split.

Multi-scale is `pspnet evaluate` with --scales=0.5,0.75,1,1.25,1.5,1.75. DIR is ADEChallengeData2016.zip of the scene parsing
challenge (sceneparsing.csail.mit.edu), unpacked. Several GPUs of 12 GB, or one of 24 GB with bfloat16.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "ade20k_resnet50_caffe"

    config.model.family = "caffe"

    config.loss.resolution = "eighth"

    config.optimizer.decay_norm_and_bias = False

    config.train.num_steps = 150_000
    config.evaluate.protocol = "caffe"
    config.evaluate.batch_size = 2  # windows; an image of 512 x 384 has two
    return config
