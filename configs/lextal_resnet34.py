"""The variant with image-level supervision (Lextal/pspnet-pytorch), ResNet-34, on any data set here.

    python -m pspnet_jax.main --config=configs/lextal_resnet34.py --config.data.root=DIR \
        [--config.data.layout=... --config.data.labels=... --config.data.train_split=... --config.data.val_split=...]

Beside the pixels it learns which classes are somewhere in the image (weight 1), and its head doubles the map three
times. Adam at 1e-3, divided by ten after 10 of 20 epochs (its milestones 20 and 30 come when all is over), batch 16,
crops of 256 x 256. No accuracy was ever published for it, and its own script never ran. As given it trains
on CamVid (367 images, 22 steps an epoch); for another data set give train.num_steps and optimizer.milestones.

Views (recipe `lextal`): a window of 0.5 to 1 of the image and aspect 3/4 to 4/3, stretched to the crop, mirrored every
second time, turned by -10 to 9 whole degrees. Its code has these steps and never runs them; what it does wrong is done
right here: images are sampled linearly instead of by the nearest pixel, and the corners that the rotation opens are
the mean color and void instead of black and class 0.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "lextal_resnet34"

    config.data.layout = "camvid"
    config.data.labels = "camvid"
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.crop_size = (256, 256)

    config.augment.recipe = "lextal"

    config.model.family = "lextal"
    config.model.backbone = "resnet34"

    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "multistep"
    config.optimizer.milestones = (220,)
    config.optimizer.weight_decay = 0.0
    config.optimizer.head_multiplier = 1.0

    config.train.num_steps = 440
    config.train.evaluate_every_steps = 220
    config.train.checkpoint_every_steps = 100
    return config
