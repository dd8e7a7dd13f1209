"""CamVid (11 classes, 360 x 480), ResNet-18 from scratch.

python -m pspnet_jax.main --config=configs/camvid_resnet18.py --config.data.root=DIR
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
    config.augment.rotation_probability = 0.0
    config.augment.blur_probability = 0.0

    config.model.backbone = "resnet18"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 50
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained

    config.train.global_batch_size = 8
    config.train.num_steps = 600
    config.train.log_every_steps = 10
    config.train.evaluate_every_steps = 300
    config.train.checkpoint_every_steps = 100
    config.evaluate.batch_size = 4
    return config
