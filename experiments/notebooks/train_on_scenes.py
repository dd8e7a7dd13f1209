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
# # Train PSPNet on `scenes`, look at the pictures, predict
#
# `scenes` is painted while training: nothing is downloaded. A hull in the mist is a *boat* when the strip at
# the border shows water and a *car* when it shows a road, so a network must look far away to name it. That
# is what the pyramid pooling module of PSPNet (Zhao et al., CVPR 2017) is for.
#
# On two CPU cores the default run takes a few minutes.

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
import jax
import matplotlib.pyplot as plt
import numpy as np

import pspnet_jax
from pspnet_jax.data.scenes import Scenes, render
from pspnet_jax.visualize import colorize

print(pspnet_jax.__version__, jax.__version__, jax.devices())

# %% [markdown]
# ## Look at the data
#
# The same image twice: only the strip differs, and with it the name of everything in the mist.

# %%
from pspnet_jax.catalog import load_label_set

label_set = load_label_set("scenes")


def show(pictures, titles):
    """Pictures side by side."""
    _, axes = plt.subplots(1, len(pictures), figsize=(3.2 * len(pictures), 3.4))
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    plt.tight_layout()
    plt.show()


def names_in(labels):
    """Names of the classes that occur."""
    return ", ".join(label_set.names[i] for i in np.unique(labels[labels != 255]))


INDEX = 16_384  # the first image of the validation split
for swapped in (False, True):
    image, labels = render(0, INDEX, swapped=swapped)
    show([image, colorize(labels, label_set.palette)], ["input", names_in(labels)])

# %% [markdown]
# ## Train
#
# The config file states what differs from the defaults; here only the number of steps is taken from the
# environment, so that the tests can run this notebook in seconds.

# %%
from pspnet_jax.config import load as load_config
from pspnet_jax.train import train

config = load_config("configs/scenes.py")
config.train.num_steps = int(os.environ.get("NUM_STEPS", config.train.num_steps))
config.train.global_batch_size = max(config.train.global_batch_size, jax.device_count())
workdir = Path(os.environ.get("WORKDIR", "runs/notebook_scenes"))
report_folder = train(config, workdir)

# %% [markdown]
# ## The curve

# %%
import json

rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
steps = [row["step"] for row in rows if "main_loss" in row]
losses = [row["main_loss"] for row in rows if "main_loss" in row]
plt.figure(figsize=(6, 3))
plt.plot(steps, losses)
plt.xlabel("step")
plt.ylabel("loss (nats per pixel)")
plt.show()

# %% [markdown]
# ## The report
#
# The three groups need the context; the other classes can be told from what lies at the pixel.

# %%
report = json.loads((report_folder / "report.json").read_text())
print(f"mean IoU {report['mean_iou']:.3f}   protocol {report['protocol']}")
for group, iou in report["groups"].items():
    print(f"  {group:26} {iou:.3f}")

# %%
plt.figure(figsize=(9, 16))
plt.imshow(plt.imread(report_folder / "panels" / "overview.png"))
plt.axis("off")
plt.show()

# %% [markdown]
# ## Predict
#
# `load` needs nothing but the run's folder: weights, classes and colors are in the checkpoint.

# %%
segmenter = pspnet_jax.load(workdir)
image = Scenes("val")[7].image
class_map = segmenter.class_map(image)
confidence = np.asarray(segmenter.probabilities(image)).max(axis=-1)
show(
    [image, colorize(class_map, segmenter.label_set.palette), confidence],
    ["input", names_in(class_map), "confidence"],
)

# %% [markdown]
# Does the network read the strip? With the strip swapped, nothing else changed, its names should change too.

# %%
for swapped in (False, True):
    image, labels = render(0, INDEX, swapped=swapped)
    class_map = segmenter.class_map(image)
    show(
        [image, colorize(labels, label_set.palette), colorize(class_map, label_set.palette)],
        ["input", "truth: " + names_in(labels), "prediction: " + names_in(class_map)],
    )
