"""Files of images and masks -> examples by position.

* Every fault of a file (unreadable, of another kind, another size, values that the label set does not list)
  is an error that names the file and what to do.
* Masks are 8-bit PNG files: one channel of raw values, or a picture in the colors of the label set, which is
  what OpenCV makes of a PNG with a palette. The label set turns either into train ids.
* Images are RGB of 8 bits, turned as their Exif orientation says, in training as in prediction. A mask has no
  orientation of its own: it must match the image as it is shown.
* Gray and CMYK images (without their color profile) and opaque alpha channels become RGB; transparency and
  16-bit channels are refused, because what they should look like is not ours to guess.
"""

import shlex
from pathlib import Path

import cv2
import numpy as np

from pspnet_jax.arrays import Example, LabelMap, RawImage
from pspnet_jax.catalog import LabelSet
from pspnet_jax.data import headers
from pspnet_jax.data.layouts import DataError, Pair, find_pairs

MOST_PIXELS = 2**28
"""Of one PNG or JPEG file: more would take gigabytes, as a damaged or a malicious one does. (Of other files OpenCV
refuses 2^30.)"""

# What turns a mask like its image, by the image's Exif orientation.
_TURNS = {
    5: "cv2.transpose(m)",
    6: "cv2.rotate(m, cv2.ROTATE_90_CLOCKWISE)",
    7: "cv2.flip(cv2.transpose(m), -1)",
    8: "cv2.rotate(m, cv2.ROTATE_90_COUNTERCLOCKWISE)",
}


class FolderSource:
    """Examples of one split of a folder.

    Args:
        root: the data set's folder.
        layout: a key of `layouts.LAYOUTS`.
        split: name of the split in that layout.
        label_set: maps mask values to train ids.

    Raises:
        DataError: for a missing folder or list, an image without mask, a mask without image, a name
            without file, no images at all.
    """

    def __init__(self, root: str | None, *, layout: str, split: str, label_set: LabelSet):
        self.pairs = find_pairs(root, layout=layout, split=split, label_set=label_set)
        self.names = [pair.name for pair in self.pairs]
        self._label_set = label_set

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        image, mask = read_bytes(pair.image), read_bytes(pair.mask)
        return decode_example(image, mask, index, files=pair, label_set=self._label_set)


def decode_example(
    image: bytes, mask: bytes, index: int, *, files: Pair, label_set: LabelSet
) -> Example:
    """The contents of an image file and of its mask file as an example.

    Args:
        index: position in the data set.
        files: what errors name.

    Raises:
        DataError: where one cannot be decoded, sizes differ, or the label set does not list a value.
    """
    photograph, raw_mask = decode_image(files.image, image), decode_mask(files.mask, mask)
    check_sizes(files, photograph, raw_mask, headers.parse(image))
    labels = to_labels(files.mask, raw_mask, label_set, headers.parse(mask))
    return Example(photograph, labels, np.int32(index))


def read_image(path: Path | str) -> RawImage:
    """An image file as RGB uint8 [height, width, 3], turned as its Exif orientation says.

    Raises:
        DataError: naming the file, where it is missing, empty, truncated or no image, and where it has
            transparent pixels or more than 8 bits per channel.
    """
    return decode_image(path, read_bytes(path))


def read_mask(path: Path | str) -> LabelMap | RawImage:
    """A mask file as it is: uint8 [height, width] of raw values or RGB [height, width, 3].

    Raises:
        DataError: where it cannot be read or is not an 8-bit PNG of one or three channels.
    """
    return decode_mask(path, read_bytes(path))


def read_bytes(path: Path | str) -> bytes:
    """A file's content; DataError where it is missing or unreadable."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def decode_image(path: Path | str, encoded: bytes) -> RawImage:
    """`read_image` of a file that was read; the path is for its errors."""
    header = headers.parse(encoded)
    if header is None or header.has_alpha:
        # Of other files than PNG and JPEG only the pixels tell what OpenCV would change.
        _check_pixels(path, _decode(path, encoded, cv2.IMREAD_UNCHANGED), header)
    elif header.bits > 8:
        raise _too_deep(path, header.bits)
    return _decode(path, encoded, cv2.IMREAD_COLOR_RGB)


def _check_pixels(path: Path | str, stored: np.ndarray, header: headers.Header | None) -> None:
    """DataError where pixels as they are stored have more than 8 bits, or transparency."""
    if stored.dtype != np.uint8:
        raise _too_deep(path, 8 * stored.itemsize)
    if header is not None and stored.ndim == 2:
        # OpenCV forgets which gray value of a PNG is the transparent one.
        raise DataError(
            f"{path}: one gray value of the image is transparent; this keeps it as a color: {_repair(path)}"
        )
    is_transparent = stored[..., 3:] < 255 if stored.ndim == 3 else np.zeros(1, bool)
    if is_transparent.any():
        raise DataError(
            f"{path}: {is_transparent.mean():.1%} of the image is transparent; this keeps the "
            f"colors that are stored there: {_repair(path)}"
        )


def _too_deep(path: Path | str, bits: int) -> DataError:
    return DataError(
        f"{path}: an image must have 8 bits per channel, this one has {bits}; where it uses "
        f"their whole range, this replaces it by one of 8 bits: {_repair(path)}"
    )


def _repair(path: Path | str) -> str:
    name = repr(str(path))
    return python_command(f"import cv2; cv2.imwrite({name}, cv2.imread({name}))")


def decode_mask(path: Path | str, encoded: bytes) -> LabelMap | RawImage:
    """`read_mask` of a file that was read; the path is for its errors."""
    mask = _decode(path, encoded, cv2.IMREAD_UNCHANGED)
    num_channels = 1 if mask.ndim == 2 else mask.shape[2]
    must = "a mask must be an 8-bit PNG of one channel holding class ids, or of three holding the colors of the classes"
    if not encoded.startswith(b"\x89PNG"):
        raise DataError(f"{path}: {must}; this file is no PNG, whatever its name says")
    header = headers.parse(encoded)
    if header is not None and header.bits in (2, 4) and not header.has_palette:
        # OpenCV multiplies gray values, so that the highest becomes 255 (of masks of 1 bit this is what is meant).
        factor = 255 // (2**header.bits - 1)
        name = repr(str(path))
        fix = python_command(f"import cv2; cv2.imwrite({name}, cv2.imread({name}, -1) // {factor})")
        raise DataError(f"{path}: {must}; this one has {header.bits} bits; this gives it 8: {fix}")
    if num_channels not in (1, 3) or mask.dtype != np.uint8:
        fix = _fix_of_mask(path, mask)
        raise DataError(
            f"{path}: {must}; this one is {mask.dtype} with {num_channels} channels{fix}"
        )
    return mask if mask.ndim == 2 else mask[..., ::-1]


def check_sizes(
    files: Pair, image: RawImage, mask: np.ndarray, header: headers.Header | None
) -> None:
    """DataError where an image, as it is shown, and its mask [height, width, ...] differ in size.

    Args:
        files: what the error names.
        header: of the image file.
    """
    if image.shape[:2] == mask.shape[:2]:
        return
    turned = ""
    if header is not None and header.orientation > 1:
        turned = f"; stored as {header.height}x{header.width}, turned by its Exif orientation {header.orientation}"
    message = (
        f"sizes differ: {files.image} is {image.shape[0]}x{image.shape[1]} (height x width{turned}), "
        f"{files.mask} is {mask.shape[0]}x{mask.shape[1]}"
    )
    if header is not None and header.is_turned_aside and mask.shape[:2] == image.shape[1::-1]:
        path, turn = str(files.mask), _TURNS[header.orientation]
        message += (
            ": the mask was drawn on the image as it is stored; turn it likewise: "
            + python_command(
                f"import cv2; m = cv2.imread({path!r}, -1); cv2.imwrite({path!r}, {turn})"
            )
        )
    raise DataError(message)


def to_labels(
    path: Path | str, mask: LabelMap | RawImage, label_set: LabelSet, header: headers.Header | None
) -> LabelMap:
    """Train ids of a mask; DataError for values or colors that the label set does not list.

    Args:
        path: what the error names.
        header: of the mask file.
    """
    try:
        return label_set.from_raw(mask) if mask.ndim == 2 else label_set.from_colors(mask)
    except ValueError as error:
        hint = _hint_of_colors(path, mask, header) if mask.ndim == 3 else ""
        raise DataError(f"{path}: {error}{hint}") from None


def python_command(code: str) -> str:
    """Code as a command for a shell, with the quotes that it needs."""
    is_plain = not set(code) & set('"$`\\!')
    return f'python -c "{code}"' if is_plain else f"python -c {shlex.quote(code)}"


def _decode(path: Path | str, encoded: bytes, mode: int) -> np.ndarray:
    if not encoded:
        raise DataError(f"{path}: the file is empty")
    if headers.has_oversized_chunk(encoded):
        raise DataError(f"{path}: cannot be decoded (corrupt or truncated)")
    header = headers.parse(encoded)
    if header is not None and header.height * header.width > MOST_PIXELS:
        raise DataError(
            f"{path}: {header.height}x{header.width} pixels are more than the {MOST_PIXELS:,} that are read"
        )
    try:
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), mode)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({error.err})") from None
    if decoded is None:
        raise DataError(f"{path}: cannot be decoded (corrupt, truncated, or not an image)")
    return decoded


def _fix_of_mask(path: Path | str, mask: np.ndarray) -> str:
    """What brings a mask of another kind into shape; nothing where its ids need more than 8 bits."""
    if mask.dtype != np.uint8 and mask.max() > 255:
        return f", of values up to {mask.max()}: number the classes within 0..254 and save 8 bits"
    channels = "" if mask.ndim == 2 else "[..., :3]"
    name = repr(str(path))
    command = python_command(
        f"import cv2; m = cv2.imread({name}, -1); cv2.imwrite({name}, m{channels}.astype('uint8'))"
    )
    return f"; {command} makes one of it"


def _hint_of_colors(path: Path | str, mask: RawImage, header: headers.Header | None) -> str:
    """What a picture in foreign colors probably is."""
    name = repr(str(path))
    if (mask == mask[..., :1]).all():
        command = python_command(f"import cv2; cv2.imwrite({name}, cv2.imread({name})[..., 0])")
        return (
            f". Its three channels are equal, so they may be the ids: {command} keeps one of them"
        )
    if header is not None and header.has_palette:
        return (
            ". The file has a palette: where not its colors but its indexes are the ids, this saves those (pip install "
            "pillow): "
            + python_command(
                f"import numpy; from PIL import Image; Image.fromarray(numpy.array(Image.open({name}))).save({name})"
            )
        )
    return ""
