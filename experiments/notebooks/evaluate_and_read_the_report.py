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
# # Evaluate, and read the report
#
# `pspnet evaluate` scores a network on a split and writes `report.json`, `report.md`, `report.html` and pictures. Here it is
# called as a function on the small network that comes with the package; on your own data, give the config that says where
# they lie.

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
import json

import matplotlib.pyplot as plt

from pspnet_jax import evaluate
from pspnet_jax.config import load as load_config

CHECKPOINT = "scenes"  # or the folder of a run or a converted model

# %%
folder = Path(os.environ.get("WORKDIR", "runs/notebook_evaluate"))
report = evaluate.run(CHECKPOINT, config=load_config("configs/scenes.py"), output=str(folder))
print(
    f"mean IoU {report['mean_iou']:.4f}, mean accuracy {report['mean_accuracy']:.4f}, pixel accuracy {report['pixel_accuracy']:.4f}"
)

# %% [markdown]
# ## What was done
#
# A figure without its protocol says little: scales, mirror images and windows change it by points. The report
# names every option, the data, and the digest of the weights.

# %%
print(json.dumps({key: report[key] for key in ("protocol", "data", "checkpoint")}, indent=1))

# %% [markdown]
# ## Classes
#
# The IoU of a class is intersection over union of its pixels in all images together; the mean is over classes. A class
# that is rare weighs as much as the sky.

# %%
classes = sorted(report["classes"], key=lambda c: c["iou"] or 0)
plt.figure(figsize=(7, 0.3 * len(classes) + 1))
plt.barh([c["name"] for c in classes], [c["iou"] or 0 for c in classes], color="tab:blue")
plt.xlim(0, 1)
plt.xlabel("IoU")
plt.tight_layout()
plt.show()
for group, iou in report["groups"].items():
    print(f"{group:26} {iou:.3f}")

# %% [markdown]
# ## Pictures
#
# Input, truth, prediction and where they differ, of images spread over the split.

# %%
plt.figure(figsize=(9, 16))
plt.imshow(plt.imread(folder / "panels" / "overview.png"))
plt.axis("off")
plt.show()

# %% [markdown]
# `report.html` in the same folder is one page with all of it, for a browser.
