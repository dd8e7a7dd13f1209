"""Writes published.pth and published.npz: a checkpoint as the authors' training script leaves it.

    python tests/goldens/make_published.py

in an environment with this package and torch; the tests that read the files need no torch.

* PSPNet-50 of width 2 with random weights and statistics, in half precision to stay small, in the
  older layout: {'epoch', 'state_dict', 'optimizer'}, every key with the prefix 'module.'.
* The .npz holds an image and the logits that PyTorch computes for it in float32.
"""

import collections
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
NUM_CLASSES = 11
WIDTH = 2
SIZE = (49, 65)  # a map of 7 x 9
EVERY = 4  # pixels, of the stored logits


def main() -> None:
    """Write both files."""
    sys.path.insert(0, str(FOLDER.parent.parent / "experiments"))
    import pspnet_torch
    import torch

    torch.manual_seed(0)
    model = pspnet_torch.PSPNet("resnet50", NUM_CLASSES, width=WIDTH)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            module.num_batches_tracked.fill_(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = model.half().state_dict()
    model.float().eval()
    checkpoint = {
        "epoch": 100,
        "state_dict": collections.OrderedDict(("module." + k, v) for k, v in state.items()),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, FOLDER / "published.pth", _use_new_zipfile_serialization=False)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    with torch.no_grad():
        logits, _ = model(pspnet_torch.normalize(torch.from_numpy(image)[None]))
    values = logits[0].permute(1, 2, 0).numpy()[::EVERY, ::EVERY]
    np.savez_compressed(FOLDER / "published.npz", image=image, logits=values)


if __name__ == "__main__":
    main()
