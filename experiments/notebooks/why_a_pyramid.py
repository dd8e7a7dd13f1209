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
# # Why a pyramid: how far a dilated network really looks
#
# A pixel's class often hangs on what lies far away. On paper a dilated ResNet sees far: each of its features is connected
# with hundreds of pixels. Measured by gradients it looks at a small spot in the middle of that
# (Luo et al., NeurIPS 2016; Zhou et al., ICLR 2015). The pyramid pooling module hands every pixel a summary of the
# whole picture. This notebook measures the one and looks at what the other changes.

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
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import pspnet_jax
from pspnet_jax import passes, stored_model
from pspnet_jax.config import default_config
from pspnet_jax.config import load as load_config
from pspnet_jax.data.scenes import SPLITS, render
from pspnet_jax.models.families import ModelOptions
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train import train
from pspnet_jax.train_step import normalize, split_model
from pspnet_jax.visualize import colorize

# %% [markdown]
# ## The effective receptive field
#
# The gradient of the feature in the middle with respect to the pixels, its size averaged over images. Where it is not zero
# at all is the theoretical field; the effective one is where it is more than 4.55 % of its largest value (two standard deviations
# of a Gaussian, as Luo et al. count). Both as sides of squares of the same area.


# %%
def gradient_map(outputs_of, images):
    """Mean size of the gradient of the middle of a map: [height, width]."""

    def middle(images):
        y = outputs_of(images)
        return y[:, y.shape[1] // 2, y.shape[2] // 2].sum()

    return np.asarray(jnp.abs(jax.jit(jax.grad(middle))(images)).sum(axis=-1).mean(axis=0))


def sides(gradients):
    """Of squares as large as the theoretical and the effective field, in pixels."""
    effective = gradients > 0.0455 * gradients.max()
    return tuple(round(float(np.sqrt(field.sum()))) for field in (gradients > 0, effective))


def picture(gradients):
    """Brighter where the gradient is larger, on a scale of square roots."""
    return np.sqrt(gradients / gradients.max())


# %%
WIDTH = int(os.environ.get("WIDTH", 64))  # of ResNet-50; the published one is 64
chosen = {"family": "semseg", "backbone": "resnet50", "width": WIDTH}
options = ModelOptions.resolve(default_config().model.to_dict() | chosen)
network = PSPNet(options, 150, rng=np.random.default_rng(0))
graphdef, params, batch_stats = split_model(network)
SIDE = int(os.environ.get("SIDE", 473))
noise = jax.random.normal(jax.random.key(0), (1, SIDE, SIDE, 3))


def backbone_of(graphdef, params, batch_stats, images):
    """The last map of the backbone."""
    return nnx.merge(graphdef, params, batch_stats).backbone(images, train=False).last


resnet50 = gradient_map(functools.partial(backbone_of, graphdef, params, batch_stats), noise)
theoretical, effective = sides(resnet50)
print(
    f"dilated ResNet-50, random weights, image of {SIDE}: field of {theoretical} pixels, effective {effective}"
)

# %% [markdown]
# The same of the small network that comes with the package, trained on `scenes` (images of 129 pixels, objects at least 40 away from
# the strip that names them): its backbone, and its logits behind the pyramid.

# %%
stored = stored_model.read("scenes", step="best")
structure, _, _ = passes.structure(stored.description.network())
trained = stored.part["params"], stored.part["batch_stats"]
pictures = np.stack([render(0, index)[0] for index in list(SPLITS["val"])[:16]])
images = normalize(jnp.asarray(pictures), stored.description.normalization, dtype=jnp.float32)


def part_of(what, images):
    """The last map of the backbone, or the logits."""
    model = nnx.merge(structure, *trained)
    return model.backbone(images, train=False).last if what == "backbone" else model(images).logits


fields = {
    what: gradient_map(functools.partial(part_of, what), images) for what in ("backbone", "logits")
}
for what, gradients in fields.items():
    theoretical, effective = sides(gradients)
    print(f"scenes, {what}: field of {theoretical} pixels, effective {effective}")

# %%
_, axes = plt.subplots(1, 3, figsize=(10, 3.6))
titles = ["ResNet-50, random weights", "scenes: backbone", "scenes: logits, with the pyramid"]
for axis, gradients, title in zip(axes, [resnet50, *fields.values()], titles, strict=True):
    axis.imshow(picture(gradients), cmap="magma")
    axis.set_title(title, fontsize=10)
    axis.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Before and after the pyramid
#
# The data set holds the three observations of the paper: mismatched relationship (a boat on a road), confusion categories
# (tower or house), inconspicuous classes (a pillow on a quilt). The same network without pyramid is trained here
# and put beside the shipped one; both saw pictures of the same kind.

# %%
config = load_config("configs/scenes.py")
config.model.pyramid_bins = ()
config.train.num_steps = int(os.environ.get("NUM_STEPS", config.train.num_steps))
config.train.evaluate_every_steps = config.train.num_steps
workdir = Path(os.environ.get("WORKDIR", "runs/notebook_fcn"))
train(config, workdir)
without, with_pyramid = pspnet_jax.load(workdir), pspnet_jax.load("scenes")

# %%
label_set = with_pyramid.label_set


def names_in(labels):
    """Names of the ambiguous classes that occur."""
    found = [i for i in np.unique(labels[labels != 255]) if label_set.groups[i]]
    return ", ".join(label_set.names[i] for i in found) or "none"


def first_of(group):
    """The first validation image with a class of the group."""
    for index in SPLITS["val"]:
        image, labels = render(0, index)
        if any(label_set.groups[i] == group for i in np.unique(labels[labels != 255])):
            return image, labels
    raise ValueError(f"no image of {group}")


groups = list(dict.fromkeys(group for group in label_set.groups if group))
_, axes = plt.subplots(len(groups), 4, figsize=(12, 3.2 * len(groups)))
for row, group in zip(axes, groups, strict=True):
    image, labels = first_of(group)
    maps = [labels, without.class_map(image), with_pyramid.class_map(image)]
    row[0].imshow(image)
    row[0].set_title(group, fontsize=10)
    for axis, class_map, title in zip(
        row[1:], maps, ["truth", "without", "with pyramid"], strict=True
    ):
        axis.imshow(colorize(class_map, label_set.palette))
        axis.set_title(f"{title}: {names_in(class_map)}", fontsize=9)
    for axis in row:
        axis.axis("off")
plt.tight_layout()
plt.show()
