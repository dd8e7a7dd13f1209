"""CamVid (11 classes, 360 x 480), PSPNet on ResNet-18 from scratch, in about 20 minutes of two CPU cores.

    python -m pspnet_jax.main --config=configs/camvid_resnet18.py --config.data.root=DIR

This is a budget, not a limit: published from-scratch figures come from 500 to 1000 epochs (11 to 46
thousand steps at batch 8 to 16), e.g. with

    --config.train.num_steps=30000 --config.train.evaluate_every_steps=1000 --config.data.crop_size=353,353
    --config.augment.scale_min=0.5 --config.augment.scale_max=2.0
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "camvid_resnet18"

    config.data.layout = "camvid"
    config.data.labels = "camvid"
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.crop_size = (161, 161)
    # Little time to learn in: the narrower the range, the better it is covered.
    config.augment.scale_min = 0.75
    config.augment.scale_max = 1.25
    config.augment.rotation_probability = 0.0
    config.augment.blur_probability = 0.0

    config.model.backbone = "resnet18"
    config.model.stem = "7x7"  # the stem of the published ResNet-18, and the faster one

    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 20
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained

    config.train.global_batch_size = 8
    config.train.num_steps = 340
    config.train.log_every_steps = 10
    config.train.evaluate_every_steps = 340
    config.train.checkpoint_every_steps = 100
    config.evaluate.batch_size = 4
    return config
