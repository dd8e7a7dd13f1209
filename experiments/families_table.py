"""Prints "which published PSPNet does what" for the README, from the families table.

    python experiments/families_table.py

`tests/test_families.py` asserts that the README holds what this prints.
"""

from collections.abc import Callable
from typing import Any

from pspnet_jax.models.families import FAMILIES, Family, ModelOptions
from pspnet_jax.models.resnet import DEPTHS, STEMS, BasicBlock

PROJECTS = {
    "semseg": "hszhao/semseg",
    "caffe": "hszhao/PSPNet (Caffe)",
    "mmseg": "mmsegmentation",
    "smp": "segmentation_models_pytorch",
    "csail": "CSAILVision/semantic-segmentation-pytorch",
    "lextal": "Lextal/pspnet-pytorch",
}
# ResNets and files that each publishes, or writes.
PUBLISHED = {
    "semseg": ((50, 101, 152), "`.pth`"),
    "caffe": ((50, 101), "`.caffemodel`"),
    "mmseg": ((18, 50, 101), "`.pth`"),
    "smp": ((18, 34, 50, 101, 152), "`.pth`, safetensors"),
    "csail": ((18, 50, 101), "two `.pth`"),
    "lextal": ((18, 34, 50, 101, 152), "`.pth`"),
}
NOT_SUPPORTED = {
    "PaddleSeg": "ResNet-vd (averages in front of its shortcuts), convolutions with bias and norm, inputs within -1 .. 1",
    "GluonCV": "files of MXNet; the network itself is `semseg` with `first_block_dilation=(1, 2)`, "
    "`dropout_kind=element` and sides of 8n",
    "PSPNet-Keras-tensorflow": "files of Keras, made of the Caffe models: convert those (its 101 layers stride in the "
    "1x1 convolution, unlike the originals)",
    "torchvision, keras-hub, scenic, eqxvision": "have no PSPNet",
}

Cell = Callable[[Family, dict[str, ModelOptions]], str]


def by_depth(options: dict[str, ModelOptions], show: Callable[[ModelOptions], Any]) -> str:
    """One value, or what differs between depths."""
    shown = {name: str(show(o)) for name, o in options.items()}
    usual = shown["resnet101"]
    others = {name.removeprefix("resnet"): text for name, text in shown.items() if text != usual}
    groups: dict[str, list[str]] = {}
    for depth, text in others.items():
        groups.setdefault(text, []).append(depth)
    said = [f"{text} ({', '.join(depths)})" for text, depths in groups.items()]
    return "; ".join([usual, *said])


def stem(options: ModelOptions) -> str:
    """Kernels and channels."""
    if not STEMS[options.stem]:
        return "7x7: 64"
    return "3x3: " + ", ".join(str(32 * halves) for halves in STEMS[options.stem])


def blocks_of(options: ModelOptions) -> str:
    """Where a residual block has its stride, or which of its convolutions are dilated."""
    if DEPTHS[options.backbone][0] is not BasicBlock:
        return f"stride in the {options.bottleneck_stride}"
    dilated = {"both": "both", "first": "the first", "stage": "both, the second as the stage"}
    return f"dilated: {dilated[options.basic_block_dilation]}"


def dilations(options: ModelOptions) -> str:
    """Of the first blocks, then of the others, in stages 3 and 4."""
    if options.num_stages < 4:
        return f"none: {options.num_stages} stages"
    first = [min(a, b) for a, b in zip(options.first_block_dilation, (2, 4), strict=True)]
    return f"{first[0]}, {first[1]}, then 2, 4"


def order(options: ModelOptions) -> str:
    """In front of the head."""
    parts = [str(n) for n in options.pyramid_bins]
    parts.insert(0 if options.pyramid_map_first else len(parts), "map")
    return ", ".join(parts)


def level(options: ModelOptions) -> str:
    """Channels and layers of a level of the pyramid."""
    channels = str(64 * options.pyramid_width) if options.pyramid_width else "1/4"
    channels = channels if options.pyramid_reduction else "all"
    if options.pyramid_linear:
        return f"{channels}, linear"
    return channels if options.pyramid_bin1_norm else f"{channels}, bin 1 without norm"


def head(options: ModelOptions) -> str:
    """Kernels and hidden channels."""
    hidden = 64 * options.head_width
    if options.head == "progressive":
        return f"1x1: {hidden}, three doublings, 1x1"
    first, second = options.head_kernels
    return f"{first}x{first}: {hidden}, {second}x{second}"


def auxiliary(options: ModelOptions) -> str:
    """Kind and hidden channels."""
    kinds = {"pixel": "pixels", "presence": "presence of classes"}
    named = [f"{kinds[name]}: {64 * options.aux_width}" for name in options.aux_heads]
    return ", ".join(named) or "none"


def size_rule(options: ModelOptions) -> str:
    """Of the sides of images."""
    rule = options.size_rule
    if rule.multiple == 1:
        return "any"
    return f"{rule.multiple}n" + (f" + {rule.remainder}" if rule.remainder else "")


ROWS: dict[str, Cell] = {
    "stem": lambda family, o: by_depth(o, stem),
    "dilation of stages 3 and 4": lambda family, o: by_depth(o, dilations),
    "residual blocks": lambda family, o: by_depth(o, blocks_of),
    "order of the pyramid": lambda family, o: by_depth(o, order),
    "channels of a level": lambda family, o: by_depth(o, level),
    "head": lambda family, o: by_depth(o, head),
    "auxiliary head": lambda family, o: by_depth(o, auxiliary),
    "corners aligned": lambda family, o: "yes" if o["resnet101"].align_corners else "no",
    "dropout": lambda family, o: "{0.dropout_rate:g} of {0.dropout_kind}s".format(o["resnet101"]),
    "norm keeps": lambda family, o: f"{1 - o['resnet101'].norm_momentum:g}",
    "input": lambda family, o: (
        "RGB, mean and deviation" if family.normalization.std[0] > 1 else "mean only (BGR)"
    ),
    "sides": lambda family, o: by_depth(o, size_rule),
    "protocol after `convert`": lambda family, o: f"`{family.protocol}`",
}


def table() -> str:
    """Markdown: a column a family, then what is not supported."""
    columns = {
        name: {
            f"resnet{depth}": ModelOptions.resolve(
                {
                    "family": name,
                    "backbone": f"resnet{depth}",
                    "width": 64,
                    "dtype": "float32",
                    **_COMPUTED,
                }
            )
            for depth in PUBLISHED[name][0]
        }
        for name in FAMILIES
    }
    lines = ["| | " + " | ".join(f"`{name}`" for name in FAMILIES) + " |"]
    lines.append("|---" * (len(FAMILIES) + 1) + "|")
    lines.append("| of | " + " | ".join(PROJECTS[name] for name in FAMILIES) + " |")
    files = (
        f"{', '.join(map(str, depths))}; {kinds}"
        for depths, kinds in (PUBLISHED[name] for name in FAMILIES)
    )
    lines.append("| ResNets, files | " + " | ".join(files) + " |")
    for title, cell in ROWS.items():
        cells = (cell(FAMILIES[name], options) for name, options in columns.items())
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "Not supported:", ""]
    lines += [f"- {name}: {why}." for name, why in NOT_SUPPORTED.items()]
    return "\n".join(lines)


_COMPUTED = {"remat": False, "frozen_norm": False}

if __name__ == "__main__":
    print(table())
