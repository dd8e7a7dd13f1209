"""The variant with image-level supervision, stated independently in PyTorch: oracle of goldens.

* Architecture, losses and state_dict keys are those of Lextal/pspnet-pytorch, written from a description
  of them. Nothing in the package imports this file, and it imports nothing of the package.
* Residual blocks and their table are those of `pspnet_torch`.
* `width` is the channels of the stem (64 published); all other channels scale with it.
* Resizing maps corners onto corners, as PyTorch did when that code was written. Ignored pixels, which it
  does not know, count in neither loss.
* The network returns class scores; log_softmax is part of the loss.
* `load_parameters` fills a network from the nested dictionaries of `pspnet_jax`, strictly.
"""

import re
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pspnet_torch import DEPTHS, IGNORE_LABEL, fill, flatten, stretch
from torch import Tensor, nn


class ResNet(nn.Module):
    """Stages 3 and 4 keep their size and are dilated by 2 and 4, but for the first block of each."""

    def __init__(self, backbone: str, *, width: int):
        super().__init__()
        block, num_blocks = DEPTHS[backbone]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for i, (stride, dilation) in enumerate(((1, 1), (2, 1), (1, 2), (1, 4))):
            blocks = []
            for k in range(num_blocks[i]):
                rates = (
                    {"stride": 1, "dilation": dilation} if k else {"stride": stride, "dilation": 1}
                )
                blocks.append(block(channels, width * 2**i, **rates))
                channels = width * 2**i * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.deep_channels, self.channels = channels // 2, channels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of stages 3 and 4."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        deep = self.layer3(self.layer2(self.layer1(x)))
        return deep, self.layer4(deep)


class Fire(nn.Module):
    """Squeeze by a 1x1 convolution, expand by a 1x1 and a 3x3 convolution side by side."""

    def __init__(self, in_channels: int, squeeze: int, expand: int, *, dilation: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> twice `expand` channels."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 whose third pool is gone; stages 3 and 4 are dilated by 2 and 4."""

    def __init__(self, *, width: int):
        super().__init__()

        def fire(in_channels: int, squeeze: int, expand: int, dilation: int) -> Fire:
            """From the numbers of channels at width 64."""
            scaled = (number * width // 64 for number in (in_channels, squeeze, expand))
            return Fire(*scaled, dilation=dilation)

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2, padding=1)

        self.feat_1 = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU())
        self.feat_2 = nn.Sequential(pool(), fire(64, 16, 64, 1), fire(128, 16, 64, 1))
        self.feat_3 = nn.Sequential(pool(), fire(128, 32, 128, 2), fire(256, 32, 128, 2))
        self.feat_4 = nn.Sequential(
            fire(256, 48, 192, 4),
            fire(384, 48, 192, 4),
            fire(384, 64, 256, 4),
            fire(512, 64, 256, 4),
        )
        self.deep_channels, self.channels = 4 * width, 8 * width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of stages 3 and 4."""
        deep = self.feat_3(self.feat_2(self.feat_1(images)))
        return deep, self.feat_4(deep)


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; the result stands behind the input.

    Children of children give the keys `norm.1`, `conv.1`, `norm.2`, `conv.2`.
    """

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        inner = 4 * growth
        self.norm = nn.ModuleDict({"1": nn.BatchNorm2d(in_channels), "2": nn.BatchNorm2d(inner)})
        self.conv = nn.ModuleDict(
            {
                "1": nn.Conv2d(in_channels, inner, 1, bias=False),
                "2": nn.Conv2d(inner, growth, 3, padding=1, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> `growth` more channels."""
        y = self.conv["1"](F.relu(self.norm["1"](x)))
        return torch.cat([x, self.conv["2"](F.relu(self.norm["2"](y)))], dim=1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to half the channels, mean over squares of `stride` pixels."""

    def __init__(self, in_channels: int, *, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> half the channels."""
        return self.pool(self.conv(F.relu(self.norm(x))))


class DenseNet(nn.Module):
    """DenseNet-121 whose second and third transition keep the size, without its last norm and ReLU.

    As in the published files each block is there under two names, `blocks.<k>` and its own.
    """

    def __init__(self, *, width: int):
        super().__init__()
        self.start_features = nn.Sequential()
        conv = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.start_features.add_module("conv0", conv)
        self.start_features.add_module("norm0", nn.BatchNorm2d(width))
        self.start_features.add_module("relu0", nn.ReLU())
        self.start_features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        self.blocks = nn.ModuleList()
        channels, growth = width, width // 2
        for k, num_layers in enumerate((6, 12, 24, 16), start=1):
            block = nn.Sequential()
            for i in range(num_layers):
                block.add_module(f"denselayer{i + 1}", DenseLayer(channels, growth))
                channels += growth
            self.blocks.append(block)
            self.add_module(f"denseblock{k}", block)
            if k < 4:
                transition = Transition(channels, stride=2 if k == 1 else 1)
                channels //= 2
                self.blocks.append(transition)
                self.add_module(f"transition{k}", transition)
        self.deep_channels, self.channels = channels // 2, channels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the third transition gives, and the last block."""
        x = self.start_features(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return x, self.blocks[-1](x)


class PyramidPooling(nn.Module):
    """[level 1, 2, 3, 6, x], each level a 1x1 convolution of the pooled map, then a fusing one."""

    def __init__(self, channels: int, out_channels: int, bins: tuple[int, ...]):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(num_bins), nn.Conv2d(channels, channels, 1, bias=False)
            )
            for num_bins in bins
        )
        self.bottleneck = nn.Conv2d(channels * (len(bins) + 1), out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> `out_channels`."""
        levels = [stretch(stage(x), x.shape[2:]) for stage in self.stages]
        return F.relu(self.bottleneck(torch.cat([*levels, x], dim=1)))


class Upsample(nn.Module):
    """Twice the size, then 3x3 convolution, norm and PReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.PReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, out_channels, 2 height, 2 width]."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class PSPNet(nn.Module):
    """The variant: pyramid without reduction, progressive upsampling, and which classes are present.

    Args:
        backbone: a ResNet of `DEPTHS` but resnet10, squeezenet or densenet121.
        dropout_rates: of the fused map, and after each of the three blocks.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        width: int = 64,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        dropout_rates: tuple[float, float] = (0.3, 0.15),
    ):
        super().__init__()
        if backbone == "squeezenet":
            self.feats = SqueezeNet(width=width)
        elif backbone == "densenet121":
            self.feats = DenseNet(width=width)
        else:
            self.feats = ResNet(backbone, width=width)
        self.psp = PyramidPooling(self.feats.channels, 16 * width, bins)
        self.drop_1, self.drop_2 = (nn.Dropout2d(rate) for rate in dropout_rates)
        self.up_1 = Upsample(16 * width, 4 * width)
        self.up_2 = Upsample(4 * width, width)
        self.up_3 = Upsample(width, width)
        self.final = nn.Sequential(nn.Conv2d(width, num_classes, 1))
        self.classifier = nn.Sequential(
            nn.Linear(self.feats.deep_channels, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at image size and of presence, from normalized images with sides of 8n pixels.

        Args:
            images: [batch, 3, height, width].

        Returns:
            [batch, classes, height, width] and [batch, classes].
        """
        deep, x = self.feats(images)
        x = self.drop_1(self.psp(x))
        for up in (self.up_1, self.up_2, self.up_3):
            x = self.drop_2(up(x))
        return self.final(x), self.classifier(F.adaptive_max_pool2d(deep, 1).flatten(1))


def variant_loss(
    logits: Tensor,
    presence_logits: Tensor,
    labels: Tensor,
    *,
    presence_weight: float = 1.0,
    class_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(main + presence_weight * presence, main, presence), nats.

    The main loss is divided by the class weights of the valid pixels, as PyTorch does; the other is the
    mean over images and classes of the weighted binary cross-entropies.
    """
    scores = F.log_softmax(logits, dim=1)
    main = F.nll_loss(scores, labels, weight=class_weights, ignore_index=IGNORE_LABEL)
    classes = torch.arange(logits.shape[1])
    present = (labels.flatten(1)[:, :, None] == classes).any(dim=1).to(logits.dtype)
    presence = F.binary_cross_entropy_with_logits(presence_logits, present, weight=class_weights)
    return main + presence_weight * presence, main, presence


# Our path -> their key, without the last word. The first group of digits keeps its meaning.
_WITHIN_BLOCK = {f"conv{k}": f"conv{k}" for k in (1, 2, 3)}
_WITHIN_BLOCK |= {f"norm{k}": f"bn{k}" for k in (1, 2, 3)}
_WITHIN_BLOCK |= {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_WITHIN_LAYER = {f"{name}{k}": f"{name}.{k}" for name in ("norm", "conv") for k in (1, 2)}
_WITHIN_FIRE = {"squeeze": "squeeze", "expand1": "expand1x1", "expand3": "expand3x3"}
_WITHIN_UP = {"conv": 0, "norm": 1, "activation": 2}
_HEADS = {
    "head.fuse": "psp.bottleneck",
    "head.classifier": "final.0",
    "presence_head.hidden": "classifier.0",
    "presence_head.classifier": "classifier.2",
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "slope": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}


def torch_key(path: str, backbone: str, bins: tuple[int, ...]) -> str:
    """Where a parameter or statistic of `pspnet_jax` lives in the state_dict.

    Args:
        path: dotted, e.g. 'backbone.layer3_0.shortcut.norm.scale' or 'head.up1.activation.slope'.
        backbone: a ResNet of `DEPTHS` but resnet10, squeezenet or densenet121; the three kinds name their blocks differently.
        bins: of the pyramid; a level's place among them is its index in the state_dict.

    Raises:
        KeyError: for a path that no such network has.
    """
    module, _, leaf = path.rpartition(".")
    return f"{_torch_module(module, backbone, bins)}.{_LEAVES[leaf]}"


def to_torch(array: np.ndarray) -> np.ndarray:
    """Our axes -> PyTorch's: [.., in, out] of kernels becomes [out, in, ..]; vectors stay."""
    return array.transpose({1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[array.ndim])


def from_torch(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    return array.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[array.ndim])


def _torch_module(module: str, backbone: str, bins: tuple[int, ...]) -> str:
    if module in _HEADS:
        return _HEADS[module]
    if match := re.fullmatch(r"head\.up([123])\.(conv|norm|activation)", module):
        return f"up_{match[1]}.conv.{_WITHIN_UP[match[2]]}"
    if (match := re.fullmatch(r"pyramid\.level(\d+)\.conv", module)) and int(match[1]) in bins:
        return f"psp.stages.{bins.index(int(match[1]))}.1"
    prefix, _, rest = module.partition(".")
    if prefix != "backbone":
        raise KeyError(f"no module of this network corresponds to '{module}'")
    if backbone == "squeezenet":
        return f"feats.{_squeezenet_module(rest)}"
    if backbone == "densenet121":
        return f"feats.{_densenet_module(rest)}"
    return f"feats.{_resnet_module(rest)}"


def _resnet_module(module: str) -> str:
    if module in ("stem.conv1", "stem.norm1"):
        return {"stem.conv1": "conv1", "stem.norm1": "bn1"}[module]
    stage, block, within = _numbered(module)
    return f"layer{stage}.{block}.{_WITHIN_BLOCK[within]}"


def _squeezenet_module(module: str) -> str:
    if module == "conv1":
        return "feat_1.0"
    stage, block, within = _numbered(module)
    # Stages 2 and 3 begin with a pool.
    return f"feat_{stage}.{block + (stage < 4)}.{_WITHIN_FIRE[within]}"


def _densenet_module(module: str) -> str:
    if module in ("stem.conv1", "stem.norm1"):
        return {"stem.conv1": "start_features.conv0", "stem.norm1": "start_features.norm0"}[module]
    if match := re.fullmatch(r"transition(\d)\.(conv|norm)", module):
        return f"blocks.{2 * int(match[1]) - 1}.{match[2]}"
    stage, layer, within = _numbered(module)
    return f"blocks.{2 * stage - 2}.denselayer{layer + 1}.{_WITHIN_LAYER[within]}"


def _numbered(module: str) -> tuple[int, int, str]:
    """'layer3_0.conv1' -> (3, 0, 'conv1')."""
    match = re.fullmatch(r"layer(\d)_(\d+)\.(.+)", module)
    if match is None:
        raise KeyError(f"no module of this network corresponds to '{module}'")
    return int(match[1]), int(match[2]), match[3]


def load_parameters(
    model: PSPNet,
    params: Mapping,
    batch_stats: Mapping,
    *,
    backbone: str,
    bins: tuple[int, ...] = (1, 2, 3, 6),
) -> None:
    """Fill every parameter and running statistic from nested dictionaries of `pspnet_jax`.

    Raises:
        KeyError: for a path without a counterpart.
        ValueError: for keys that are filled twice or not at all, or that the model does not have.
        RuntimeError: for shapes that differ (from `load_state_dict`).
    """
    entries = [
        (torch_key(path, backbone, bins), path, to_torch(array))
        for path, array in [*flatten(params), *flatten(batch_stats)]
    ]
    # DenseNet's blocks have second names.
    fill(model, entries, left_out=r"feats\.(denseblock|transition)\d\..*")
