"""Three more published PSPNets, stated independently in PyTorch: oracles of goldens.

* mmsegmentation, segmentation_models.pytorch (smp) and CSAILVision/semantic-segmentation-pytorch. Keys of
  each state_dict are those of its published files; CSAIL's encoder and decoder are two files. The Caffe
  networks of the paper are in `caffe_torch`.
* Nothing in the package imports this file, and it imports nothing of the package. Bottlenecks and the
  table of depths are those of `pspnet_torch`.
* `width` is the planes of the first stage (64 published); all other channels scale with it.
* Networks take 8-bit RGB and return `Scores` at head resolution; `at_image_size` is the family's way to
  the size of the image. What the families do not share is stated beside each class.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from pspnet_torch import DEPTHS, MEAN, STD, Bottleneck, conv3x3, make_downsample
from torch import Tensor, nn

BINS = (1, 2, 3, 6)
# Of each stage: stride, dilation of the first block, dilation of the other blocks. A stage that gives up
# its stride starts at half its rate; mmseg's networks of stride 32 keep the dilations all the same.
HALF_FIRST = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))
HALF_FIRST_STRIDED = ((1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 4))
LAST_ONLY = ((1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2))
UNDILATED = ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1))


class Scores(NamedTuple):
    """Logits [batch, classes, height, width] at head resolution; None for a head that is not there."""

    logits: Tensor
    aux_logits: Tensor | None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with a dilation of its own, and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int, dilations: tuple[int, int]):
        super().__init__()
        self.conv1 = conv3x3(in_channels, planes, stride=stride, dilation=dilations[0])
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, dilation=dilations[1])
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = make_downsample(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same rank."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The maps of all stages.

    Args:
        backbone: a key of `DEPTHS`.
        stem: 'v1c' (three 3x3 convolutions of 32, 32, 64 channels at width 64), 'deep' (64, 64, 128) or '7x7'.
        stages: stride and dilations, as `HALF_FIRST`.
        second_dilated: whether the second convolution of a basic block has its stage's dilation, or 1.
        num_stages: how many stages run. The others are there all the same, as in smp's files.
    """

    def __init__(
        self,
        backbone: str,
        *,
        width: int,
        stem: str,
        stages: tuple[tuple[int, int, int], ...],
        second_dilated: bool = False,
        num_stages: int = 4,
    ):
        super().__init__()
        num_blocks = DEPTHS[backbone][1]
        is_basic = DEPTHS[backbone][0] is not Bottleneck
        channels = self._make_stem(stem, width)
        self.channels = []
        for i, (stride, first, others) in enumerate(stages):
            planes, blocks = width * 2**i, []
            for k in range(num_blocks[i]):
                rate, step = (others, 1) if k else (first, stride)
                if is_basic:
                    second = others if second_dilated else 1
                    block = BasicBlock(channels, planes, stride=step, dilations=(rate, second))
                else:
                    block = Bottleneck(channels, planes, stride=step, dilation=rate)
                blocks.append(block)
                channels = planes * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)
        self.num_stages = num_stages

    def _make_stem(self, stem: str, width: int) -> int:
        self.is_sequential = stem == "v1c"
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            return width
        inner, out = {"v1c": (width // 2, width), "deep": (width, 2 * width)}[stem]
        layers = []
        for k, (before, after) in enumerate(((3, inner), (inner, inner), (inner, out)), start=1):
            conv, norm = conv3x3(before, after, stride=2 if k == 1 else 1), nn.BatchNorm2d(after)
            layers += [conv, norm, nn.ReLU()]
            if not self.is_sequential:
                self.add_module(f"conv{k}", conv)
                self.add_module(f"bn{k}", norm)
        if self.is_sequential:
            self.stem = nn.Sequential(*layers)
        return out

    def forward(self, images: Tensor) -> list[Tensor]:
        """The map of every stage that runs, from normalized images."""
        x = images
        if self.is_sequential:
            x = self.stem(x)
        else:
            for k in (1, 2, 3):
                if hasattr(self, f"conv{k}"):
                    conv, norm = self.get_submodule(f"conv{k}"), self.get_submodule(f"bn{k}")
                    x = F.relu(norm(conv(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        maps = []
        for i in range(self.num_stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
            maps.append(x)
        return maps


class ConvModule(nn.Module):
    """mmseg's convolution without bias, norm and ReLU, under the names `conv` and `bn`."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = make_conv(in_channels, channels, kernel_size)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same size."""
        return F.relu(self.bn(self.conv(x)))


class MMSegHead(nn.Module):
    """Pyramid, fusing convolution, dropout and classifier: [x, level 1, 2, 3, 6]."""

    def __init__(
        self, in_channels: int, channels: int, num_classes: int, dropout_rate: float, *, corners
    ):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), ConvModule(in_channels, channels, 1))
            for b in BINS
        )
        self.bottleneck = ConvModule(in_channels + len(BINS) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout_rate)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.align_corners = corners

    def forward(self, x: Tensor) -> Tensor:
        """The last map -> logits."""
        size = (x.shape[2], x.shape[3])
        levels = [resize(level(x), size, self.align_corners) for level in self.psp_modules]
        return self.conv_seg(self.dropout(self.bottleneck(torch.cat([x, *levels], dim=1))))


class MMSegAuxHead(nn.Module):
    """3x3 convolution, dropout and classifier on stage 3."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout_rate: float):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout_rate)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The map of stage 3 -> logits."""
        return self.conv_seg(self.dropout(self.convs(x)))


class MMSegPSPNet(nn.Module):
    """mmsegmentation's network, for images of any size.

    512 channels in the head and 256 in the auxiliary head; a quarter of both for basic blocks, as in its
    configs of ResNet-18. Basic blocks dilate their first convolution only.

    Args:
        stem: 'v1c', or '7x7' for what its configs call V1b.
        align_corners: False, but True in its configs for crops of 769 pixels.
        output_stride: 8; or 32, with the dilations of 8.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        width: int = 64,
        stem: str = "v1c",
        align_corners: bool = False,
        output_stride: int = 8,
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        stages = {8: HALF_FIRST, 32: HALF_FIRST_STRIDED}[output_stride]
        self.backbone = ResNet(backbone, width=width, stem=stem, stages=stages)
        stage3, stage4 = self.backbone.channels[2:]
        hidden = stage4 // 4  # 512 of 2048, 128 of 512
        self.decode_head = MMSegHead(
            stage4, hidden, num_classes, dropout_rate, corners=align_corners
        )
        self.auxiliary_head = MMSegAuxHead(stage3, hidden // 2, num_classes, dropout_rate)
        self.align_corners = align_corners

    def forward(self, images: Tensor) -> Scores:
        """From 8-bit RGB [batch, 3, height, width]."""
        maps = self.backbone(normalize(images, dtype_of(self)))
        return Scores(self.decode_head(maps[3]), self.auxiliary_head(maps[2]))

    def at_image_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Stretched to any (height, width)."""
        return resize(logits, size, self.align_corners)


class SMPLevel(nn.Module):
    """A pooled copy of the map, reduced: without norm but with bias where it is a single pixel."""

    def __init__(self, in_channels: int, channels: int, num_bins: int):
        super().__init__()
        is_single = num_bins == 1
        conv = nn.Conv2d(in_channels, channels, 1, bias=is_single)
        norm = nn.Identity() if is_single else nn.BatchNorm2d(channels)
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(num_bins), nn.Sequential(conv, norm, nn.ReLU())
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> `channels` of the same size."""
        return resize(self.pool(x), (x.shape[2], x.shape[3]), align_corners=True)


class SMPDecoder(nn.Module):
    """Levels before the map, [level 1, 2, 3, 6, x], a fusing 1x1 convolution and dropout."""

    def __init__(self, in_channels: int, channels: int, dropout_rate: float):
        super().__init__()
        self.psp = nn.Module()
        self.psp.blocks = nn.ModuleList(
            SMPLevel(in_channels, in_channels // len(BINS), b) for b in BINS
        )
        self.conv = make_fuse(2 * in_channels, channels, 1)
        self.dropout = nn.Dropout2d(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """The deepest map -> what is classified."""
        levels = [block(x) for block in self.psp.get_submodule("blocks")]
        return self.dropout(self.conv(torch.cat([*levels, x], dim=1)))


class SMPPSPNet(nn.Module):
    """smp's network: cut off after a stage instead of dilated, for images whose sides the stride divides.

    Stages that do not run have parameters all the same. The classifier is a 3x3 convolution. There is no
    pixelwise auxiliary head.

    Args:
        encoder_depth: 3 (its default: stage 2 is the last, stride 8), 4 or 5, with `upsampling` to match.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        width: int = 64,
        encoder_depth: int = 3,
        dropout_rate: float = 0.2,
    ):
        super().__init__()
        self.upsampling = 2**encoder_depth
        self.encoder = ResNet(
            backbone, width=width, stem="7x7", stages=UNDILATED, num_stages=encoder_depth - 1
        )
        channels = self.encoder.channels[encoder_depth - 2]
        self.decoder = SMPDecoder(channels, 8 * width, dropout_rate)
        self.segmentation_head = nn.Sequential(nn.Conv2d(8 * width, num_classes, 3, padding=1))

    def forward(self, images: Tensor) -> Scores:
        """From 8-bit RGB [batch, 3, height, width]."""
        maps = self.encoder(normalize(images, dtype_of(self)))
        return Scores(self.segmentation_head(self.decoder(maps[-1])), None)

    def at_image_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Stretched by `upsampling`, corners onto corners; `size` is what that has to give."""
        found = F.interpolate(
            logits, scale_factor=self.upsampling, mode="bilinear", align_corners=True
        )
        if tuple(found.shape[2:]) != size:
            raise ValueError(f"{tuple(found.shape[2:])} is not {size}")
        return found


class CSAILDecoder(nn.Module):
    """[x, level 1, 2, 3, 6] with as many channels in each level as in the head, at any depth."""

    def __init__(
        self, channels: tuple[int, int], hidden: int, num_classes: int, dropout_rate: float
    ):
        super().__init__()
        stage3, stage4 = channels
        self.ppm = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), *make_fuse(stage4, hidden, 1)) for b in BINS
        )
        self.conv_last = nn.Sequential(
            *make_fuse(stage4 + len(BINS) * hidden, hidden, 3),
            nn.Dropout2d(dropout_rate),
            nn.Conv2d(hidden, num_classes, 1),
        )
        self.cbr_deepsup = make_fuse(stage3, stage4 // 4, 3)
        self.dropout_deepsup = nn.Dropout2d(dropout_rate)
        self.conv_last_deepsup = nn.Conv2d(stage4 // 4, num_classes, 1)

    def forward(self, stage3: Tensor, stage4: Tensor) -> Scores:
        """From the last two maps."""
        size = (stage4.shape[2], stage4.shape[3])
        levels = [resize(level(stage4), size, align_corners=False) for level in self.ppm]
        logits = self.conv_last(torch.cat([stage4, *levels], dim=1))
        hidden = self.dropout_deepsup(self.cbr_deepsup(stage3))
        return Scores(logits, self.conv_last_deepsup(hidden))


class CSAILPSPNet(nn.Module):
    """CSAIL's `PPMDeepsup` on a dilated ResNet with the deep stem; `encoder` and `decoder` are its files.

    Both convolutions of a basic block are dilated, half as much where the stride was. Norms give a batch a
    weight of 0.001 in their statistics, as its own do on a single device.

    Args:
        output_stride: 8, or 16 with the last stage dilated by 2.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        *,
        width: int = 64,
        output_stride: int = 8,
        dropout_rate: float = 0.1,
    ):
        super().__init__()
        stages = {8: HALF_FIRST, 16: LAST_ONLY}[output_stride]
        self.encoder = ResNet(
            backbone, width=width, stem="deep", stages=stages, second_dilated=True
        )
        stage3, stage4 = self.encoder.channels[2:]
        self.decoder = CSAILDecoder((stage3, stage4), 8 * width, num_classes, dropout_rate)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.001

    def forward(self, images: Tensor) -> Scores:
        """From 8-bit RGB [batch, 3, height, width]."""
        return self.decoder(*self.encoder(normalize(images, dtype_of(self)))[2:])

    def at_image_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Stretched to any (height, width)."""
        return resize(logits, size, align_corners=False)


def make_conv(in_channels: int, channels: int, kernel_size: int) -> nn.Conv2d:
    """A convolution without bias that keeps the size."""
    return nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)


def make_fuse(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, norm and ReLU."""
    conv = make_conv(in_channels, channels, kernel_size)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def resize(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear, by either rule."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def normalize(images: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit RGB [batch, 3, height, width] by ImageNet's mean and standard deviation: all three do so."""
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (MEAN, STD))
    return (images.to(dtype) - mean) / std


def dtype_of(model: nn.Module) -> torch.dtype:
    """In which a network computes."""
    return next(model.parameters()).dtype


def count(model: nn.Module) -> int:
    """Trainable scalars."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
