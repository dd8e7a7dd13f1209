"""PASCAL VOC 2012 (21 classes), PSPNet-101: the authors' recipe.

    python -m pspnet_jax.main --config=configs/voc2012_resnet101.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet101_v2.pth

The target, mIoU in % on the 1,449 images of val, was not reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    the authors' PyTorch code         79.07         79.63     eight RTX 2080 Ti, 5 h

The paper: 82.6 on the test server, 85.4 with COCO (table 6), at several scales; none for val.

resnet101_v2.pth holds the ImageNet weights with the deep stem that the authors distribute
(github.com/hszhao/semseg); the figures presume it. Multi-scale is `pspnet evaluate` with
--scales=0.5,0.75,1,1.25,1.5,1.75.

DIR is the folder VOCdevkit/VOC2012 of VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC) with two
things that come apart: SegmentationClassAug/, the masks of Hariharan et al. 2011 (SBD) as class ids, and
ImageSets/Segmentation/train_aug.txt, the list of the 10,582 images. 50 epochs at batch 16 are 33,050 steps, as
in the authors' code; the paper took 30,000.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "voc2012_resnet101"

    config.data.layout = "voc2012"
    config.data.labels = "voc2012"
    config.data.train_split = "train_aug"
    config.data.val_split = "val"

    config.model.backbone = "resnet101"

    config.train.num_steps = 33_050  # 50 epochs of 10,582 // 16
    config.evaluate.protocol = "semseg"
    config.evaluate.batch_size = 2  # windows; an image of 512 x 384 has two
    return config
