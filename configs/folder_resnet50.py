"""Your own images and masks, PSPNet-50 from ImageNet weights: a start to change.

    pspnet check --config=configs/folder_resnet50.py --config.data.root=DIR --config.data.labels=mine.csv
    python -m pspnet_jax.main --config=configs/folder_resnet50.py \
        --config.data.root=DIR --config.data.labels=mine.csv --config.init_from=initmodel/resnet50_v2.pth

DIR holds images/train, masks/train, images/val and masks/val, an image and its mask under the same name; mine.csv
names the classes (see the README). The expected mIoU is for you to find: nothing is published for your data.

A whole PSPNet is a better start than a backbone where the pictures are like those it has seen:
--config.init_from=train_epoch_100.pth, whose classifiers start anew. Hardware: one GPU of 16 GB takes 16 crops of
473; on a smaller one --config.train.global_batch_size=8 --config.train.recipe_batch_size=16 changes learning rate and
steps with it, --config.train.accumulate_steps=2 keeps both. Steps: about 50 epochs of 2,000 images.
"""

from pspnet_jax.config import default_config


def get_config():
    config = default_config()
    config.name = "folder_resnet50"

    config.data.layout = "pairs"
    config.data.labels = "mine.csv"
    config.data.train_split = "train"
    config.data.val_split = "val"

    config.train.num_steps = 6_250
    config.train.evaluate_every_steps = 1_250
    config.train.checkpoint_every_steps = 250
    return config
