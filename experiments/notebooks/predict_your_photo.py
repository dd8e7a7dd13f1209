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
# # Predict on your own photograph
#
# A network with its label set, normalization and protocol is one object, `pspnet_jax.load(PATH)`. `"scenes"` is a small
# one that comes with the package: it knows the misty pictures of the data set `scenes` and nothing else, so it is here
# to show the way. For photographs of the world, convert published weights first (the README says how) and put
# the folder into `CHECKPOINT`.

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
import matplotlib.pyplot as plt
import numpy as np

import pspnet_jax
from pspnet_jax.data.folders import read_image
from pspnet_jax.data.scenes import SPLITS, render
from pspnet_jax.visualize import colorize

CHECKPOINT = "scenes"  # or the folder of a run or a converted model, or a file of `pspnet export --format=pspnet_jax`
PHOTO = os.environ.get("PHOTO", "")  # path of a photograph; empty: a painted scene

# %%
segmenter = pspnet_jax.load(CHECKPOINT)
print(
    f"{segmenter.description.model.backbone}, {segmenter.label_set.num_classes} classes of '{segmenter.label_set.name}'"
)
image = read_image(PHOTO) if PHOTO else render(0, SPLITS["val"][7])[0]
print("image", image.shape)

# %% [markdown]
# ## Classes, confidence
#
# `class_map` gives train ids at the size of the image, `probabilities` all classes of every pixel. Images of any size are
# taken; where the protocol has windows and scales, so has this.


# %%
def show(pictures, titles):
    """Pictures side by side."""
    _, axes = plt.subplots(1, len(pictures), figsize=(3.2 * len(pictures), 3.4), squeeze=False)
    for axis, picture, title in zip(axes[0], pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    plt.tight_layout()
    plt.show()


names, palette = segmenter.label_set.names, segmenter.label_set.palette
class_map = segmenter.class_map(image)
probabilities = np.asarray(segmenter.probabilities(image))
colors = colorize(class_map, palette)
overlay = (0.5 * image + 0.5 * colors).astype(np.uint8)
show(
    [image, colors, overlay, probabilities.max(axis=-1)],
    ["input", "classes", "overlay", "confidence"],
)

# %%
ids, counts = np.unique(class_map, return_counts=True)
for i in np.argsort(-counts):
    share, sure = counts[i] / class_map.size, probabilities[class_map == ids[i], ids[i]].mean()
    print(f"{names[ids[i]]:12} {share:6.1%} of the image, probability {sure:.2f} on average")

# %% [markdown]
# ## Other protocols
#
# The same network under the authors' protocol, with windows, mirror images and several scales.

# %%
protocol = segmenter.choose_protocol(
    "semseg", base_size=max(image.shape), scales=(0.75, 1.0, 1.25), flip=True
)
(found,) = segmenter.predict([image], protocol=protocol)
show([colors, colorize(found.class_map, palette)], ["its own protocol", "semseg, three scales"])
print(f"equal: {np.mean(found.class_map == class_map):.1%} of the pixels")

# %% [markdown]
# Many files, on the command line: `pspnet predict --checkpoint=scenes --output=DIR PHOTOS...` writes class maps, overlays and a
# legend, and goes on where it was stopped (`--resume`).
