"""Writes family_*.npz: what PyTorch, in float64, makes of four more published PSPNets.

    python tests/goldens/make_families.py

in an environment with this package and torch; the test that reads the files needs no torch.

* Parameters and running statistics are drawn by the keys of the published files (`draw`), so that a
  reader needs only keys and shapes. CSAIL's two files share no key and count as one.
* Images are drawn, and logits named, as in make_logits.py.
* Each file holds, computed in float64 and stored in float32, logits at image size in evaluation for a
  size whose map every bin divides and for one where most do not; of networks with an auxiliary head also the
  logits of both heads at head resolution in training mode, with batch statistics and without dropout.
* `num_parameters_150` are the trainable scalars of the same network at width 64 with 150 classes: those that
  take part (with the auxiliary head); `..._main` without the auxiliary head.
* The torch side is `experiments/families_torch.py` and `caffe_torch.py`, which
  `experiments/compare_families_torch.py` holds to the original code.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import make_logits
import make_step
import numpy as np

if TYPE_CHECKING:
    import torch

# Rows and columns that are stored, at image size: 11 shares no factor with a stride, so all places between
# the pixels of the map occur. And of maps.
PIXELS = (slice(None, None, 11),) * 2
MAP_PIXELS = (slice(None, None, 2),) * 2
FILE_WIDTH, FILE_CLASSES = 64, 150


@dataclass(frozen=True, kw_only=True)
class Case:
    """One golden file: a network, by the names of our options, and the sizes of its images."""

    family: str
    backbone: str
    stem: str
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of the images, pixels; those in training mode have the first."""
    align_corners: bool
    output_stride: int = 8
    num_stages: int = 4
    """How many stages of the backbone run; the files of smp have the others too."""
    width: int = 8
    num_classes: int = 7
    batch_size: int = 3


_MMSEG = {"family": "mmseg", "sizes": ((96, 96), (75, 62)), "align_corners": False}
_SMP = {"family": "smp", "stem": "7x7", "align_corners": True, "num_stages": 2}
_CSAIL = {"family": "csail", "stem": "deep", "align_corners": False}
_CSAIL["sizes"] = _SMP["sizes"] = ((96, 96), (72, 56))
_CAFFE = {"family": "caffe", "stem": "deep", "align_corners": True, "sizes": ((89, 89), (73, 57))}

CASES = {
    "mmseg_resnet18": Case(backbone="resnet18", stem="v1c", **_MMSEG),
    "mmseg_resnet50": Case(backbone="resnet50", stem="v1c", **_MMSEG),
    "mmseg_resnet50b": Case(backbone="resnet50", stem="7x7", **_MMSEG),
    "mmseg_resnet101": Case(
        backbone="resnet101",
        stem="v1c",
        **_MMSEG | {"align_corners": True, "sizes": ((89, 89), (75, 62))},
    ),
    # Its maps at stride 32: 6 x 6, and 4 x 5. Dilations are those of stride 8.
    "mmseg_resnet50_stride32": Case(
        backbone="resnet50",
        stem="v1c",
        **_MMSEG | {"output_stride": 32, "sizes": ((192, 192), (107, 150))},
    ),
    "smp_resnet34": Case(backbone="resnet34", **_SMP),
    "smp_resnet50": Case(backbone="resnet50", **_SMP),
    # encoder_depth=4.
    "smp_resnet50_stride16": Case(
        backbone="resnet50",
        **_SMP | {"output_stride": 16, "num_stages": 3, "sizes": ((96, 96), (112, 80))},
    ),
    "csail_resnet18": Case(backbone="resnet18", **_CSAIL),
    "csail_resnet50": Case(backbone="resnet50", **_CSAIL),
    "csail_resnet101": Case(backbone="resnet101", **_CSAIL),
    # Its dilations are halved with the stages that keep their stride. A map of 6 x 6, and of 5 x 4.
    "csail_resnet50_stride16": Case(
        backbone="resnet50", **_CSAIL | {"output_stride": 16, "sizes": ((96, 96), (72, 56))}
    ),
    # The strides of the two differ: in the 1x1 reduction, and in the 3x3 convolution.
    "caffe_resnet50": Case(backbone="resnet50", **_CAFFE),
    "caffe_resnet101": Case(backbone="resnet101", **_CAFFE),
}

_AUX = re.compile(r"(auxiliary_head|cbr_deepsup|conv_last_deepsup)\..*")
_COUNTER = re.compile(r".*\.num_batches_tracked")
_VARIANCE = re.compile(r".*(\.running_var|/bn\.3)")
_SCALE = re.compile(r".*/bn\.0")
# Starts small, so that activations do not grow with depth.
_LAST_SCALE = re.compile(r".*layer\d\.\d+\.bn3\.weight|.*_1x1_increase/bn\.0")
_CAFFE_FIRST = "conv1_1_3x3_s2.0"  # sees values of 0..255


def draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The values of parameters and running statistics, float64, by their keys in the published files.

    Kernels are [out, in, height, width]. A norm's values are the same for the shape (channels,) as for the
    (1, channels, 1, 1) of a Caffe file.
    """
    return {key: _draw(key, tuple(shape)) for key, shape in shapes.items()}


def _draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = make_step.generator(key)
    if _VARIANCE.fullmatch(key):
        return rng.uniform(0.5, 1.5, shape)
    values = rng.standard_normal(shape)
    is_norm = "/bn." in key
    if len(shape) == 4 and not is_norm:
        return values * (2 / np.prod(shape[1:])) ** 0.5 * (1 / 64 if key == _CAFFE_FIRST else 1)
    is_scale = bool(_SCALE.fullmatch(key)) or key.endswith(".weight")
    return (is_scale + 0.1 * values) * (0.25 if _LAST_SCALE.fullmatch(key) else 1)


def takes_part(case: Case, key: str) -> bool:
    """Whether anything of the network depends on a key of its file."""
    return not any(key.startswith(f"encoder.layer{k}.") for k in range(case.num_stages + 1, 5))


def is_auxiliary(key: str) -> bool:
    """Whether a key belongs to the auxiliary head."""
    return _AUX.fullmatch(key) is not None


def fingerprint(case: Case, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Sums over all inputs: tells a changed random stream from a changed network.

    Args:
        shapes: by key, of all that takes part, with the auxiliary head.
    """
    state = [np.abs(array).sum() for _, array in sorted(draw(shapes).items())]
    images = [make_logits.draw_images(case, size).sum(dtype=np.int64) for size in case.sizes]
    return np.array([sum(state), *images])


def torch_network(case: Case, *, width: int, num_classes: int) -> "torch.nn.Module":
    """The network as PyTorch starts it, without dropout."""
    import caffe_torch
    from families_torch import CSAILPSPNet, MMSegPSPNet, SMPPSPNet

    common = (case.backbone, num_classes)
    if case.family == "caffe":
        return caffe_torch.PSPNet(*common, width=width)
    if case.family == "smp":
        depth = case.num_stages + 1
        return SMPPSPNet(*common, width=width, encoder_depth=depth, dropout_rate=0.0)
    stride = case.output_stride
    if case.family == "csail":
        return CSAILPSPNet(*common, width=width, output_stride=stride, dropout_rate=0.0)
    return MMSegPSPNet(
        *common,
        width=width,
        stem=case.stem,
        align_corners=case.align_corners,
        output_stride=stride,
        dropout_rate=0.0,
    )


def published(case: Case, tensors: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """Tensors of the network by the keys of its files, without counters: CSAIL's have no prefixes."""
    prefix = r"(encoder|decoder)\." if case.family == "csail" else ""
    return {
        re.sub(f"^{prefix}", "", key): tensor
        for key, tensor in tensors.items()
        if not _COUNTER.fullmatch(key)
    }


def count_parameters(case: Case) -> dict[str, np.ndarray]:
    """At full width: see the head of this file."""
    import torch

    with torch.device("meta"):
        model = torch_network(case, width=FILE_WIDTH, num_classes=FILE_CLASSES)
    sizes = {k: x.numel() for k, x in published(case, dict(model.named_parameters())).items()}
    used = {k: size for k, size in sizes.items() if takes_part(case, k)}
    main = {k: size for k, size in used.items() if not is_auxiliary(k)}
    counts = {"": used, "_main": main}
    return {f"num_parameters_150{name}": np.array(sum(x.values())) for name, x in counts.items()}


def run_torch(case: Case) -> dict[str, np.ndarray]:
    """Everything a golden file holds, by PyTorch in float64."""
    import torch

    model = torch_network(case, width=case.width, num_classes=case.num_classes).double().eval()
    state = published(case, model.state_dict())
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, array in draw(shapes).items():
        state[key].copy_(torch.from_numpy(array))  # a view of the network's own
    golden = {
        "fingerprint": fingerprint(case, {k: x for k, x in shapes.items() if takes_part(case, k)}),
        **count_parameters(case),
    }

    def stored(logits: torch.Tensor, pixels: tuple[slice, slice]) -> np.ndarray:
        return logits.permute(0, 2, 3, 1).numpy()[:, *pixels].astype(np.float32)

    with torch.no_grad():
        for size in case.sizes:
            images = torch.from_numpy(make_logits.draw_images(case, size)).permute(0, 3, 1, 2)
            found = model(images)
            logits = found if case.family == "caffe" else found.logits
            golden[make_logits.key(size)] = stored(model.at_image_size(logits, size), PIXELS)
        if any(map(is_auxiliary, shapes)):
            images = torch.from_numpy(make_logits.draw_images(case, case.sizes[0])).permute(
                0, 3, 1, 2
            )
            scores = model.train()(images)
            golden["training_logits"] = stored(scores.logits, MAP_PIXELS)
            golden["training_aux_logits"] = stored(scores.aux_logits, MAP_PIXELS)
    return golden


def main() -> None:
    """Write every golden file beside this one."""
    sys.path.insert(0, str(make_step.FOLDER.parent.parent / "experiments"))
    for name, case in CASES.items():
        path = make_step.FOLDER / f"family_{name}.npz"
        golden = run_torch(case)
        np.savez_compressed(path, **golden)
        counted = f"{golden['num_parameters_150']:,} parameters at full width"
        print(f"{path.name}: {path.stat().st_size:,} bytes, {counted}")


if __name__ == "__main__":
    main()
