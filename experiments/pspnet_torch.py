"""The authors' PSPNet, stated independently in PyTorch: oracle of goldens, yardstick of speed.

* Architecture, loss, optimizer and state_dict keys are those of hszhao/semseg. Nothing in the
  package imports this file, and it imports nothing of the package.
* `width` is the planes of the first stage (64 published); all other channels scale with it.
* Depths 10, 18 and 34 and the 7x7 stem, which the authors' code does not offer, follow the same
  rules. Both 3x3 convolutions of a basic block are dilated.
* `load_parameters` fills a network from the nested dictionaries of `pspnet_jax`, strictly.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

IGNORE_LABEL = 255
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int, dilation: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, planes, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = make_downsample(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same rank."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with stride and dilation), 1x1 to four times the planes, and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, *, stride: int, dilation: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride=stride, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = make_downsample(in_channels, 4 * planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same rank."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


DEPTHS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class PyramidPooling(nn.Module):
    """[x, level 1, 2, 3, 6]: pooled, reduced and stretched copies beside the map."""

    def __init__(self, channels: int, bins: tuple[int, ...]):
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(num_bins),
                nn.Conv2d(channels, channels // len(bins), 1, bias=False),
                nn.BatchNorm2d(channels // len(bins)),
                nn.ReLU(),
            )
            for num_bins in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> twice the channels (once with no bins at all)."""
        return torch.cat([x] + [stretch(level(x), x.shape[2:]) for level in self.features], dim=1)


class PSPNet(nn.Module):
    """The authors' network at output stride 8.

    Args:
        backbone: a key of `DEPTHS`.
        stem: 'deep' or '7x7'.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        width: int = 64,
        stem: str = "deep",
        bins: tuple[int, ...] = (1, 2, 3, 6),
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        block, num_blocks = DEPTHS[backbone]
        channels = 2 * width if stem == "deep" else width
        self.layer0 = make_deep_stem(width) if stem == "deep" else make_plain_stem(width)
        strides, dilations = (1, 2, 1, 1), (1, 1, 2, 4)
        firsts = (1, 1, 2, 4)
        for i in range(4):
            planes = width * 2**i
            rates = [(strides[i], firsts[i])] + [(1, dilations[i])] * (num_blocks[i] - 1)
            blocks = []
            for stride, dilation in rates:
                blocks.append(block(channels, planes, stride=stride, dilation=dilation))
                channels = planes * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.ppm = PyramidPooling(channels, bins)
        self.cls = make_head(
            2 * channels if bins else channels, 8 * width, num_classes, dropout_rate
        )
        self.aux = make_head(channels // 2, 4 * width, num_classes, dropout_rate)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of both heads at image size from normalized images with sides of 8n + 1 pixels.

        Args:
            images: [batch, 3, height, width].

        Returns:
            Main and auxiliary logits [batch, classes, height, width]; in evaluation the latter is
            None.
        """
        x = self.layer2(self.layer1(self.layer0(images)))
        stage3 = self.layer3(x)
        logits = stretch(self.cls(self.ppm(self.layer4(stage3))), images.shape[2:])
        if not self.training:
            return logits, None
        return logits, stretch(self.aux(stage3), images.shape[2:])


def conv3x3(in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias whose padding keeps the size at stride 1."""
    return nn.Conv2d(
        in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


def make_downsample(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """The projection of a shortcut whose shape changes."""
    if stride == 1 and in_channels == channels:
        return None
    conv = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def make_deep_stem(width: int) -> nn.Sequential:
    """Three 3x3 convolutions (64, 64, 128 channels at width 64) and the max pool: stride 4."""
    layers = []
    for in_channels, channels, stride in ((3, width, 2), (width, width, 1), (width, 2 * width, 1)):
        conv = conv3x3(in_channels, channels, stride=stride)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(3, stride=2, padding=1))


def make_plain_stem(width: int) -> nn.Sequential:
    """The original 7x7 convolution and the max pool: stride 4."""
    conv = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), pool)


def make_head(
    in_channels: int, hidden: int, num_classes: int, dropout_rate: float
) -> nn.Sequential:
    """3x3 convolution, norm, ReLU, dropout of channels, 1x1 classifier with bias."""
    return nn.Sequential(
        conv3x3(in_channels, hidden),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Dropout2d(dropout_rate),
        nn.Conv2d(hidden, num_classes, 1),
    )


def stretch(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear resizing that maps corners onto corners."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def normalize(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """8-bit RGB [batch, height, width, 3] -> normalized [batch, 3, height, width] (a view)."""
    # Plain numbers per channel: a tensor of means would be copied to the GPU, and waited for.
    channels = [(images[..., i].to(dtype) - MEAN[i]) / STD[i] for i in range(3)]
    return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)


def segmentation_loss(
    logits: Tensor, aux_logits: Tensor, labels: Tensor, *, aux_weight: float = 0.4
) -> tuple[Tensor, Tensor, Tensor]:
    """(main + aux_weight * aux, main, aux): cross-entropies, nats per valid pixel of the batch."""
    main = F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL)
    aux = F.cross_entropy(aux_logits, labels, ignore_index=IGNORE_LABEL)
    return main + aux_weight * aux, main, aux


def make_sgd(
    model: PSPNet,
    *,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    head_multiplier: float = 10.0,
) -> torch.optim.SGD:
    """The authors' SGD: heads learn `head_multiplier` times as fast, everything is decayed."""
    groups = {True: [], False: []}
    for key, parameter in model.named_parameters():
        groups[not key.startswith("layer")].append(parameter)
    optimizer = torch.optim.SGD(
        [
            {"params": groups[False], "lr": learning_rate},
            {"params": groups[True], "lr": learning_rate * head_multiplier},
        ],
        momentum=momentum,
        weight_decay=weight_decay,
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def set_poly_learning_rate(
    optimizer: torch.optim.SGD, step: int, *, num_steps: int, power: float = 0.9
) -> None:
    """Give every group its learning rate for `step` (0 is the first and takes the full rate)."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * (1 - step / num_steps) ** power


# Our path -> the authors' key, without the last word. The first group of digits keeps its meaning.
_STEM = re.compile(r"backbone\.stem\.(conv|norm)(\d)")
_BLOCK = re.compile(r"backbone\.layer(\d)_(\d+)\.(.+)")
_LEVEL = re.compile(r"pyramid\.level(\d+)\.(conv|norm)")
_HEAD = re.compile(r"(head|aux_head)\.(conv|norm|classifier)")
_WITHIN_BLOCK = {f"conv{k}": f"conv{k}" for k in (1, 2, 3)}
_WITHIN_BLOCK |= {f"norm{k}": f"bn{k}" for k in (1, 2, 3)}
_WITHIN_BLOCK |= {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_WITHIN_HEAD = {"conv": 0, "norm": 1, "classifier": 4}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}


def torch_key(path: str, bins: tuple[int, ...]) -> tuple[str, tuple[int, ...] | None]:
    """Where a parameter or statistic of `pspnet_jax` lives in the state_dict.

    Args:
        path: dotted, e.g. 'backbone.layer3_0.shortcut.norm.scale' or 'pyramid.level6.conv.kernel'.
        bins: of the pyramid; a level's place among them is its index in the state_dict.

    Returns:
        The key, and the axes for `np.transpose` of our array (None: as it is).

    Raises:
        KeyError: for a path that no network has.
    """
    module, _, leaf = path.rpartition(".")
    axes = (3, 2, 0, 1) if leaf == "kernel" else None
    return f"{_torch_module(module, bins)}.{_LEAVES[leaf]}", axes


def _torch_module(module: str, bins: tuple[int, ...]) -> str:
    if match := _STEM.fullmatch(module):
        return f"layer0.{3 * (int(match[2]) - 1) + (match[1] == 'norm')}"
    if match := _BLOCK.fullmatch(module):
        return f"layer{match[1]}.{match[2]}.{_WITHIN_BLOCK[match[3]]}"
    if (match := _LEVEL.fullmatch(module)) and int(match[1]) in bins:
        return f"ppm.features.{bins.index(int(match[1]))}.{1 + (match[2] == 'norm')}"
    if match := _HEAD.fullmatch(module):
        return f"{'cls' if match[1] == 'head' else 'aux'}.{_WITHIN_HEAD[match[2]]}"
    raise KeyError(f"no module of this network corresponds to '{module}'")


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(dotted path, array) of every leaf of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, np.asarray(value)


def load_parameters(
    model: PSPNet, params: Mapping, batch_stats: Mapping, *, bins: tuple[int, ...]
) -> None:
    """Fill every parameter and running statistic from nested dictionaries of `pspnet_jax`.

    Raises:
        KeyError: for a path without a counterpart.
        ValueError: for keys that are filled twice or not at all, or that the model does not have.
        RuntimeError: for shapes that differ (from `load_state_dict`).
    """
    entries = []
    for path, array in [*flatten(params), *flatten(batch_stats)]:
        key, axes = torch_key(path, bins)
        entries.append((key, path, array if axes is None else array.transpose(axes)))
    fill(model, entries)


def fill(
    model: nn.Module, entries: Iterable[tuple[str, str, np.ndarray]], *, left_out: str = r"(?!)"
) -> None:
    """Give a module all its values, from (key, our path, array in PyTorch's layout).

    Args:
        left_out: pattern of keys of the module that are not filled, beside the counters of norms.

    Raises:
        ValueError: for keys that are filled twice or not at all, or that the module does not have.
        RuntimeError: for shapes that differ (from `load_state_dict`).
    """
    filled: dict[str, Tensor] = {}
    for key, path, array in entries:
        if key in filled:
            raise ValueError(f"'{key}' is filled twice, the second time from '{path}'")
        filled[key] = torch.from_numpy(np.array(array, order="C"))  # a copy: torch writes into it
    # Steps counted by torch's norm layers; nothing reads them at a fixed momentum.
    ignored = re.compile(rf".*\.num_batches_tracked|{left_out}")
    wanted = {key for key in model.state_dict() if not ignored.fullmatch(key)}
    if wanted != set(filled):
        missing, extra = sorted(wanted - set(filled)), sorted(set(filled) - wanted)
        raise ValueError(f"not filled: {missing}; not in the network: {extra}")
    model.load_state_dict(filled, strict=False)
