"""A run of seconds: ResNet-10 of width 8 on 33x33 crops of a folder in the CamVid layout."""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "tiny"
    config.data.layout = "camvid"
    config.data.labels = "camvid"
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.crop_size = (33, 33)
    config.model.backbone = "resnet10"
    config.model.width = 8
    config.train.global_batch_size = 8
    config.train.num_steps = 6
    config.train.log_every_steps = 2
    config.train.evaluate_every_steps = 4
    config.train.checkpoint_every_steps = 2
    config.evaluate.batch_size = 8
    return config
