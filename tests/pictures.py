"""Small photographs and masks in the layouts that the package reads."""

import base64
import struct
import types
import zlib
from pathlib import Path

import cv2
import numpy as np

from pspnet_jax.arrays import Example
from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import default_config
from pspnet_jax.data import transforms
from pspnet_jax.data.folders import FolderSource

# The default augmentation, to crops of 33x33.
AUGMENT = transforms.make_augment(
    transforms.resolve(default_config().augment.to_dict()), (33, 33), fill=(124, 116, 104)
)
CAMVID = load_label_set("camvid")


def example(height=40, width=50, *, num_classes=11, seed=0) -> Example:
    """Smooth color blobs whose class is their color."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_classes, (4, 5)).astype(np.uint8)
    labels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    colors = np.random.default_rng(99).integers(40, 216, (num_classes, 3))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Example((colors[labels] + noise).astype(np.uint8), labels, np.int32(seed))


class ExampleSource:
    """A few examples in memory."""

    def __init__(self, num_examples=6, *, sizes=((40, 50),), num_classes=11):
        self._examples = [
            example(*sizes[i % len(sizes)], num_classes=num_classes, seed=i)
            for i in range(num_examples)
        ]

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        return self._examples[index]


def write_split(
    root: Path, split: str, num_images: int, *, size=(40, 50), raw_offset=0, masks="annotations"
) -> None:
    """Images and masks of one split; masks hold class + raw_offset (ADE20K's raw ids start at 1)."""
    for folder in ("images", masks):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        made = example(*size, seed=i)
        write_image(root / "images" / split / f"{split}_{i:04d}.jpg", made.image)
        mask = made.labels + np.uint8(raw_offset)
        assert cv2.imwrite(str(root / masks / split / f"{split}_{i:04d}.png"), mask)


def open_folder(root, split="train", layout="camvid", label_set=CAMVID) -> FolderSource:
    return FolderSource(str(root), layout=layout, split=split, label_set=label_set)


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])


def write_photograph(path, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))


def write_mask(path, value=0, size=(4, 6)):
    """Of one raw id, or of the given ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = value if isinstance(value, np.ndarray) else np.full(size, value, np.uint8)
    assert cv2.imwrite(str(path), mask)


def write_palette_mask(path, ids, colors):
    """A PNG with a palette, as PASCAL VOC's, from the PNG specification: OpenCV writes none."""
    palette = np.zeros((256, 3), np.uint8)
    palette[list(colors)] = list(colors.values())
    write_png(path, ids, color_type=3, between={b"PLTE": palette.tobytes()})


def write_png(path, values, *, color_type, between=types.MappingProxyType({}), bits=8):
    """A PNG of one channel, given by the bytes of its rows, with further chunks in front of its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = {
        b"IHDR": struct.pack(
            ">IIBBBBB", values.shape[1] * 8 // bits, len(values), bits, color_type, 0, 0, 0
        ),
        **between,
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks.items()
        )
    )


def write_voc(root, split, names, masks, text=None):
    """Photographs, gray masks of the aeroplane (1) and the list of one split."""
    for name in names:
        write_photograph(root / f"JPEGImages/{name}.jpg")
        write_mask(root / f"{masks}/{name}.png", 1)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text(text or "".join(f"{name}\n" for name in names))


def write_cityscapes(root, city, number, *endings):
    stem = f"{city}_{number:06d}_000019"
    write_photograph(root / f"leftImg8bit/train/{city}/{stem}_leftImg8bit.png")
    for ending in endings:
        value = 26 if ending == "labelIds" else 13  # a car
        write_mask(root / f"gtFine/train/{city}/{stem}_gtFine_{ending}.png", value)


# An 8x8 JPEG of one CMYK color, which OpenCV cannot write: Pillow 13.0.0,
# Image.new("CMYK", (8, 8), (0, 128, 255, 0)).save(file, "JPEG", quality=90, optimize=True)
CMYK_JPEG = base64.b64decode(
    "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwADAgIDAgIDAwMDBAMDBAUIBQUEBAUKBwcGCAwKDAwLCgsLDQ4SEA0OEQ4L"
    "CxAWEBETFBUVFQwPFxgWFBgSFBUU/8AAFAgACAAIBEMRAE0RAFkRAEsRAP/EABUAAQEAAAAAAAAAAAAAAAAAAAkC"
    "/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/aAA4EQwBNAFkASwAAPwBU0CqKm//Z"
)


def write_turned_photograph(path: Path, shown: np.ndarray, orientation: int) -> None:
    """A JPEG that is shown as `shown`, its pixels stored otherwise, as the Exif orientation says."""
    undo = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    stored = np.ascontiguousarray(undo[orientation](shown))
    encoded = cv2.imencode(".jpg", stored[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])[1].tobytes()
    tiff = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, orientation, 0)
    segment = b"Exif\0\0" + tiff
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        encoded[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + encoded[2:]
    )
