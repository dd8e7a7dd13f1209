"""CamVid (11 classes, 360 x 480), PSPNet on ResNet-18 from scratch: in under two hours of two CPU cores, in minutes of a GPU.

Most of the training at 16 image pixels per feature pixel, where a step costs less than half:

    python -m pspnet_jax.main --config=configs/camvid_resnet18.py --config.data.root=DIR \
        --config.name=camvid_resnet18_stride16 --config.model.output_stride=16

From there at 8, with larger crops:

    python -m pspnet_jax.main --config=configs/camvid_resnet18.py --config.data.root=DIR \
        --config.init_from=runs/camvid_resnet18_stride16 --config.data.crop_size=289,289 \
        --config.optimizer.learning_rate=0.01 --config.optimizer.warmup_steps=50 \
        --config.train.num_steps=900 --config.train.evaluate_every_steps=300

On the 101 validation photographs: mean IoU 0.659, pixel accuracy 0.920 (without mirror images 0.644, 0.915; with
--config.seed=1 and other names 0.651, 0.918); after the first part 0.609. Published from-scratch figures of other networks, 46 to 67 on the
test split, come from 500 to 1000 epochs; this is 161.

One H200 gives 0.696 (second seed 0.677) in 2:15 minutes (bfloat16, 5,000 steps of 16 crops of 353, all at 8): the command stands in
experiments/README.md, "CamVid on an H200".

CamVid's validation split is one clip of a drive that the training split shows, too: expect less on its test split.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "camvid_resnet18"

    config.data.layout = "camvid"
    config.data.labels = "camvid"
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.crop_size = (225, 225)
    config.augment.scale_min = 0.6
    config.augment.scale_max = 1.6
    config.augment.rotation_probability = 0.0
    config.augment.blur_probability = 0.0

    config.model.backbone = "resnet18"
    config.model.stem = "7x7"  # the stem of the published ResNet-18, and the faster one

    # Roots of the median-frequency weights. A mean of IoUs gains where a class of IoU j is said from odds of about j on,
    # which is early for the rare ones.
    config.loss.class_weights = (0.51, 0.43, 2.14, 0.38, 0.95, 0.62, 3.11, 1.36, 0.83, 2.50, 2.71)

    config.optimizer.learning_rate = 0.03
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 5e-4
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained

    config.train.global_batch_size = 8
    config.train.num_steps = 6_500
    config.train.log_every_steps = 25
    config.train.evaluate_every_steps = 1_300
    config.train.checkpoint_every_steps = 325
    config.evaluate.batch_size = 4
    return config
