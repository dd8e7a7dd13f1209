"""The paper's released Caffe networks, stated independently in PyTorch: oracles of goldens.

* Architecture as in the prototxt files of hszhao/PSPNet, which `caffe_prototxt` runs line by line. Nothing
  in the package imports this file, and it imports nothing of the package.
* Keys of the state_dict are `LAYER.BLOB`, each blob in the shape it has in a caffemodel: kernels [out, in,
  height, width] with channels in the order BGR; of a norm slope, bias, mean and variance, [1, channels, 1, 1].
* Norms are frozen in the released files, so there is no training mode here, nor is there an auxiliary head.
* Pyramid levels are pooled adaptively, which at sizes that the bins divide equals Caffe's fixed kernels.
* `width` is the planes of the first stage (64 published); all other channels scale with it.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from pspnet_torch import DEPTHS, stretch
from torch import Tensor, nn

BINS = (6, 3, 2, 1)  # in the order in which they stand behind the map
MEAN_BGR = (103.939, 116.779, 123.68)
EPSILON = 1e-5
ZOOM = 8


class Convolution(nn.Module):
    """Blob 0 is the kernel, blob 1 the bias."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        has_bias: bool = False,
    ):
        super().__init__()
        kernel = torch.zeros(channels, in_channels, kernel_size, kernel_size)
        self.register_parameter("0", nn.Parameter(kernel))
        if has_bias:
            self.register_parameter("1", nn.Parameter(torch.zeros(channels)))
        self.rates = {"stride": stride, "dilation": dilation}
        self.padding = dilation * (kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same rank."""
        blobs = dict(self.named_parameters())
        return F.conv2d(x, blobs["0"], blobs.get("1"), padding=self.padding, **self.rates)


class Norm(nn.Module):
    """Blobs 0 to 3 are slope, bias, mean and variance."""

    def __init__(self, channels: int):
        super().__init__()
        shape = (1, channels, 1, 1)
        self.register_parameter("0", nn.Parameter(torch.ones(shape)))
        self.register_parameter("1", nn.Parameter(torch.zeros(shape)))
        self.register_buffer("2", torch.zeros(shape))
        self.register_buffer("3", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same size."""
        slope, bias, mean, variance = (getattr(self, name) for name in "0123")
        return slope * (x - mean) / torch.sqrt(variance + EPSILON) + bias


class PSPNet(nn.Module):
    """Bottlenecks dilated by 2 and 4, first blocks included, under the names of the Caffe layers.

    Args:
        backbone: 'resnet50', which strides in the 1x1 reduction, or 'resnet101', in the 3x3 convolution.
    """

    def __init__(self, backbone: str, num_classes: int, *, width: int = 64):
        super().__init__()
        self.num_blocks = DEPTHS[backbone][1]
        strides = (2, 1) if backbone == "resnet50" else (1, 2)
        self._add("conv1_1_3x3_s2", 3, width, 3, stride=2)
        self._add("conv1_2_3x3", width, width, 3)
        self._add("conv1_3_3x3", width, 2 * width, 3)
        channels = 2 * width
        for i, dilation in enumerate((1, 1, 2, 4)):
            planes = width * 2**i
            for k in range(self.num_blocks[i]):
                name, is_strided = f"conv{i + 2}_{k + 1}", i == 1 and k == 0
                reduce, middle = strides if is_strided else (1, 1)
                self._add(f"{name}_1x1_reduce", channels, planes, 1, stride=reduce)
                self._add(f"{name}_3x3", planes, planes, 3, stride=middle, dilation=dilation)
                self._add(f"{name}_1x1_increase", planes, 4 * planes, 1)
                if k == 0:
                    self._add(f"{name}_1x1_proj", channels, 4 * planes, 1, stride=reduce * middle)
                channels = 4 * planes
        for num_bins in BINS:
            self._add(f"conv5_3_pool{num_bins}_conv", channels, 8 * width, 1)
        self._add("conv5_4", channels + len(BINS) * 8 * width, 8 * width, 3)
        self.add_module("conv6", Convolution(8 * width, num_classes, 1, has_bias=True))

    def _add(self, name: str, in_channels: int, channels: int, kernel_size: int, **rates: int):
        self.add_module(name, Convolution(in_channels, channels, kernel_size, **rates))
        self.add_module(f"{name}/bn", Norm(channels))

    def _run(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"{name}/bn")(self.get_submodule(name)(x))

    def forward(self, images: Tensor) -> Tensor:
        """Logits at head resolution from 8-bit RGB [batch, 3, height, width] with sides of 8n + 1 pixels."""
        x = prepare(images, self.get_parameter("conv6.0").dtype)
        for name in ("conv1_1_3x3_s2", "conv1_2_3x3", "conv1_3_3x3"):
            x = F.relu(self._run(name, x))
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        for i, num_blocks in enumerate(self.num_blocks):
            for k in range(num_blocks):
                x = self._run_block(f"conv{i + 2}_{k + 1}", x)
        maps = [x]
        for num_bins in BINS:
            pooled = F.adaptive_avg_pool2d(x, num_bins)
            maps.append(
                stretch(F.relu(self._run(f"conv5_3_pool{num_bins}_conv", pooled)), x.shape[2:])
            )
        x = F.relu(self._run("conv5_4", torch.cat(maps, dim=1)))
        return self.get_submodule("conv6")(x)

    def _run_block(self, name: str, x: Tensor) -> Tensor:
        y = F.relu(self._run(f"{name}_1x1_reduce", x))
        y = F.relu(self._run(f"{name}_3x3", y))
        y = self._run(f"{name}_1x1_increase", y)
        shortcut = self._run(f"{name}_1x1_proj", x) if name.endswith("_1") else x
        return F.relu(y + shortcut)

    def at_image_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """Stretched by `ZOOM`, corners onto corners; `size` is what that has to give."""
        height, width = logits.shape[2:]
        found = ((height - 1) * ZOOM + 1, (width - 1) * ZOOM + 1)
        if found != size:
            raise ValueError(f"{found} is not {size}")
        return stretch(logits, torch.Size(found))


def prepare(images: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit RGB [batch, 3, height, width] -> BGR less the mean, on the scale of 0 to 255."""
    mean = torch.tensor(MEAN_BGR, dtype=dtype)[:, None, None]
    return images.flip(1).to(dtype) - mean
