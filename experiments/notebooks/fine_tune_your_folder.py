# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tune on your own folder
#
# Images and masks in a folder, a CSV that names the classes, a network to start from: that is all. Without a folder of
# yours this notebook paints one: night scenes with two classes, which the shipped network has never seen.

# %% [markdown]
# ## Install
#
# Set `REPOSITORY` to the address of the git repository to clone and install it (on Colab, say). While it is
# empty, the checkout around this notebook is used as it is. JAX finds a GPU or TPU of the machine by itself.

# %%
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = ""

if REPOSITORY:
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "pspnet_jax_checkout"], check=True)
    os.chdir("pspnet_jax_checkout")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
else:
    while not Path("configs/scenes.py").exists() and Path.cwd() != Path.cwd().parent:
        os.chdir("..")
sys.path.insert(0, os.getcwd())

# %%
import csv
import json

import cv2
import matplotlib.pyplot as plt
import numpy as np

import pspnet_jax
from pspnet_jax import check
from pspnet_jax.config import default_config
from pspnet_jax.train import train
from pspnet_jax.visualize import colorize

FOLDER = os.environ.get(
    "FOLDER", ""
)  # with images/SPLIT, masks/SPLIT for train and val, and labels.csv
workdir = Path(os.environ.get("WORKDIR", "runs/notebook_finetune"))

# %% [markdown]
# ## The folder
#
# `images/train/NAME.jpg` (or .png) with `masks/train/NAME.png`, the same for `val`. A mask has one channel of raw ids (or the colors
# of the classes); `labels.csv` says what they mean.


# %%
def paint(rng):
    """A dark picture with lamps and windows, u8[97, 97, 3], and its mask of raw ids 0, 10, 20."""
    image = rng.normal(40, 8, (97, 97, 3)) + rng.uniform(-15, 15, 3)
    mask = np.zeros((97, 97), np.uint8)
    for _ in range(rng.integers(2, 5)):
        x, y, size = *rng.integers(12, 85, 2), int(rng.integers(8, 15))
        where, color = np.zeros((97, 97), np.uint8), rng.uniform(150, 240)
        raw_id = int(rng.choice([10, 20]))
        if raw_id == 10:
            cv2.circle(where, (int(x), int(y)), size, 1, -1)
        else:
            cv2.rectangle(
                where, (int(x) - size, int(y) - size), (int(x) + size, int(y) + size), 1, -1
            )
        image[where == 1] += (color, 0.9 * color, 0.5 * color)
        mask[where == 1] = raw_id
    return np.clip(image, 0, 255).astype(np.uint8), mask


if FOLDER:
    folder = Path(FOLDER)
else:
    folder = workdir.parent / (workdir.name + "_data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 12)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = paint(rng)
            cv2.imwrite(str(folder / "images" / split / f"{i:03d}.png"), image[..., ::-1])
            cv2.imwrite(str(folder / "masks" / split / f"{i:03d}.png"), mask)
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("id", "name", "red", "green", "blue", "raw_ids"),
                (0, "night", 30, 30, 60, 0),
                (1, "lamp", 255, 220, 120, 10),
                (2, "window", 230, 120, 60, 20),
            ]
        )

# %% [markdown]
# ## The config
#
# Everything that is not said here has its default; `pspnet_jax/config.py` is the page of all of them. The network must be that of the
# weights: the shipped one is a ResNet-10 of width 16. Its classifiers start anew, because the classes are others.

# %%
config = default_config()
config.name = "my_folder"
config.data.layout = "pairs"
config.data.root = str(folder)
config.data.labels = str(folder / "labels.csv")
config.data.train_split, config.data.val_split = "train", "val"
config.data.crop_size = (97, 97)
config.data.num_workers = 0
config.init_from = "scenes"
config.model.backbone, config.model.width, config.model.stem = "resnet10", 16, "7x7"
config.model.first_block_dilation = (1, 2)
config.augment.scale_min, config.augment.scale_max = 0.75, 1.5  # the pictures are small
config.optimizer.learning_rate = 0.03
config.train.global_batch_size = 8
config.train.num_steps = int(os.environ.get("NUM_STEPS", 150))
config.train.evaluate_every_steps = config.train.num_steps
config.train.log_every_steps = 10

# %% [markdown]
# ## Look before you train
#
# The same as `pspnet check`: every image and mask is read, and what would spoil a training is named.

# %%
check.run(config, output=str(folder / "check.json"))
found = json.loads((folder / "check.json").read_text())
print(list(found))

# %%
report_folder = train(config, workdir)
report = json.loads((report_folder / "report.json").read_text())
print(f"mean IoU {report['mean_iou']:.3f}")
for row in report["classes"]:
    print(f"  {row['name']:8} {row['iou']:.3f}")

# %%
segmenter = pspnet_jax.load(workdir)
path = sorted((folder / "images" / "val").iterdir())[0]
image = cv2.imread(str(path))[..., ::-1]
class_map = segmenter.class_map(image)
_, axes = plt.subplots(1, 2, figsize=(6.4, 3.4))
for axis, picture in zip(
    axes, [image, colorize(class_map, segmenter.label_set.palette)], strict=True
):
    axis.imshow(picture)
    axis.axis("off")
plt.show()

# %% [markdown]
# On the command line: `pspnet --config=configs/folder_resnet50.py --config.data.root=DIR --config.data.labels=DIR/labels.csv
# --config.init_from=WEIGHTS`. The same command goes on where it was stopped.
