"""Cityscapes (19 classes), PSPNet-101: the authors' recipe.

    python -m pspnet_jax.main --config=configs/cityscapes_resnet101.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet101_v2.pth

The target, mIoU in % on the 500 images of val, was not reproduced here (no data and weights at hand):

                                  single scale   multi-scale
    the authors' PyTorch code         78.63         79.29     eight RTX 2080 Ti, 10 h

The paper: 78.4 on the test server, 80.2 with the coarse masks (table 7), at several scales; none for val.

resnet101_v2.pth holds the ImageNet weights with the deep stem that the authors distribute
(github.com/hszhao/semseg); the figures presume it. Multi-scale is `pspnet evaluate` with
--scales=0.5,0.75,1,1.25,1.5,1.75.

DIR holds leftImg8bit/ and gtFine/ of leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip
(cityscapes-dataset.com, after registering): 2,975 training images, masks *_labelIds.png as they come; for
*_labelTrainIds.png say --config.data.labels=cityscapes_train_ids. 200 epochs at batch 16 are 37,000 steps, as
in the authors' code; the paper took 90,000, and rotated and blurred only ADE20K and VOC.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "cityscapes_resnet101"

    config.data.layout = "cityscapes"
    config.data.labels = "cityscapes"  # crop 713 x 713, base size 2048
    config.data.train_split = "train"
    config.data.val_split = "val"

    config.model.backbone = "resnet101"

    config.train.num_steps = 37_000  # 200 epochs of 2,975 // 16
    config.evaluate.protocol = "semseg"
    config.evaluate.batch_size = 8  # windows; an image of 2048 x 1024 has eight
    return config
