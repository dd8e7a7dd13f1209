"""Writes pytorch_*.pth and pytorch_values.npz: files of PyTorch and, by name, what they hold.

    python tests/goldens/make_pytorch_files.py

in an environment with torch; the tests that read the files need none.

* `run_*` hold {'epoch', 'state_dict', 'optimizer', ...}, as training scripts write them, in both
  layouts; the state dict has a tensor of every type, views, shared storages and a Parameter.
* `bare_*` are a state dict alone, small enough to damage each byte in turn.
* Legacy files name storages by address: their bytes differ from run to run, their values do not.
* `pytorch_values.npz` is made from the tensors, not from the files; bfloat16 is in it as uint16.
"""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent
TYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def run_state_dict() -> OrderedDict:
    """Names as DataParallel makes them; one tensor for each thing that can go wrong."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 6, generator=generator)
    layers = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2))
    with torch.no_grad():
        layers[0].weight.copy_(torch.randn(2, 3, 3, 3, generator=generator))
        layers(torch.randn(2, 3, 8, 8, generator=generator))
    state = nn.DataParallel(layers).state_dict()  # an OrderedDict with _metadata
    state["module.parameter"] = nn.Parameter(torch.randn(3, generator=generator))
    state["module.transposed"] = torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1)
    state["module.whole"] = shared
    state["module.whole_again"] = shared
    state["module.row"] = shared[2]
    state["module.every_other"] = shared[1::2, ::3]
    state["module.scalar"] = torch.tensor(2.5)
    state["module.empty"] = torch.zeros(0, 5)
    state["module.bool"] = torch.tensor([True, False, True])
    for name in TYPES:
        numbers = torch.randn(2, 3, generator=generator).mul(50).abs()
        state[f"module.{name}"] = numbers.to(getattr(torch, name))
    return state


def run(state_dict: OrderedDict) -> dict:
    """What stands beside the weights in a training script's file."""
    weight = nn.Parameter(torch.ones(20, 3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "arch": "psp",
        "args": argparse.Namespace(lr=0.1, sizes=[1, 2, 3, 6]),
        "best": np.float64(0.5),
        "shape": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "optimizer": optimizer.state_dict(),
        "state_dict": state_dict,
    }


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy; bfloat16 as its bits."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.uint16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()


def main():
    """Write all files."""
    torch.manual_seed(0)
    state_dict = run_state_dict()
    bare = OrderedDict(weight=torch.arange(6.0).reshape(2, 3).T, count=torch.tensor(7))
    unsigned = {
        name: torch.tensor([1, 200]).to(getattr(torch, name))
        for name in ("uint16", "uint32", "uint64")
    }
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save(run(state_dict), FOLDER / "pytorch_run_zip.pth")
    torch.save(run(state_dict), FOLDER / "pytorch_run_legacy.pth", **legacy)
    torch.save(bare, FOLDER / "pytorch_bare_zip.pth")
    torch.save(bare, FOLDER / "pytorch_bare_legacy.pth", **legacy)
    torch.save(bare, FOLDER / "pytorch_bare_protocol4.pth", pickle_protocol=4, **legacy)
    torch.save(unsigned, FOLDER / "pytorch_unsigned.pth")
    torch.save(nn.Linear(2, 2), FOLDER / "pytorch_module.pth")
    torch.serialization.set_crc32_options(False)
    torch.save(bare, FOLDER / "pytorch_bare_no_checksums.pth")
    values = {f"run/{name}": to_numpy(tensor) for name, tensor in state_dict.items()}
    values |= {f"bare/{name}": to_numpy(tensor) for name, tensor in bare.items()}
    np.savez_compressed(FOLDER / "pytorch_values.npz", **values)


if __name__ == "__main__":
    main()
