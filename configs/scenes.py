"""The embedded data set `scenes`, a ResNet-10 of width 16: nothing to download, minutes on a laptop.

    python -m pspnet_jax.main --config=configs/scenes.py

Every image is painted on the fly; only far-away context tells a boat from a car. The dilated-FCN
baseline, which does not learn to look that far at this budget:

    python -m pspnet_jax.main --config=configs/scenes.py --config.name=scenes_fcn --config.model.pyramid_bins='()'
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "scenes"

    config.data.source = "scenes"
    config.data.labels = "scenes"
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.augment.recipe = "none"  # every image is new

    config.model.backbone = "resnet10"
    config.model.width = 16
    config.model.stem = "7x7"
    config.model.first_block_dilation = (1, 2)  # one block a stage: the whole dilation of the stage

    config.optimizer.learning_rate = 0.05
    config.optimizer.warmup_steps = 20
    config.optimizer.head_multiplier = 1.0  # nothing is pretrained

    config.train.global_batch_size = 16
    config.train.num_steps = 500
    config.train.log_every_steps = 20
    config.train.evaluate_every_steps = 250
    config.train.checkpoint_every_steps = 100
    config.evaluate.batch_size = 20
    return config
