"""What PNG and JPEG files say about their pixels before any is decoded.

OpenCV hands out 8-bit RGB whatever a file holds; these few facts tell what it had to change for that.
From the PNG specification (third edition, chapter 11), ITU-T T.81 (annex B) and Exif 2.3 (section 4.6.4).
"""

import struct
from typing import NamedTuple

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type; 3 is a palette
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_ORIENTATION_TAG = 0x0112


class Header(NamedTuple):
    """Facts about one image file."""

    kind: str
    """png | jpeg"""
    height: int
    width: int
    bits: int
    """Of each channel, as stored."""
    channels: int
    """As stored: 1 for gray and palettes, 4 for RGBA in a PNG and CMYK in a JPEG."""
    has_palette: bool = False
    has_alpha: bool = False
    orientation: int = 1
    """Of Exif, 1..8: how the stored pixels are turned for display; 1 is as stored."""

    @property
    def is_turned_aside(self) -> bool:
        """Whether height and width change places when the image is shown."""
        return self.orientation >= 5


def parse(encoded: bytes) -> Header | None:
    """The header of a PNG or JPEG file; None where it is neither, or too damaged to tell."""
    try:
        if encoded.startswith(_PNG_SIGNATURE):
            return _parse_png(encoded)
        return _parse_jpeg(encoded) if encoded.startswith(b"\xff\xd8") else None
    except (struct.error, IndexError, KeyError):
        return None


def has_oversized_chunk(encoded: bytes) -> bool:
    """Whether a chunk of a PNG says that it is longer than the file: a reader would reserve memory for it."""
    if not encoded.startswith(_PNG_SIGNATURE):
        return False
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(encoded):
        size, name = struct.unpack_from(">I4s", encoded, position)
        position += 12 + size
        if name == b"IEND":  # what follows is nobody's business
            return False
    return position > len(encoded) + 12


def _parse_png(encoded: bytes) -> Header:
    width, height, bits, color_type = struct.unpack_from(">IIBB", encoded, 16)
    has_alpha, orientation = color_type in (4, 6), 1
    position = len(_PNG_SIGNATURE)
    while position + 8 <= len(encoded):
        size, name = struct.unpack_from(">I4s", encoded, position)
        if name == b"tRNS":
            has_alpha = True
        elif name == b"eXIf":
            orientation = _orientation(encoded[position + 8 : position + 8 + size])
        elif name == b"IDAT":
            break
        position += size + 12
    channels = _PNG_CHANNELS[color_type]
    return Header("png", height, width, bits, channels, color_type == 3, has_alpha, orientation)


def _parse_jpeg(encoded: bytes) -> Header | None:
    orientation, position = 1, 2
    while encoded[position] == 0xFF:
        while encoded[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker, size = struct.unpack_from(">xBH", encoded, position)
        start = position + 4
        if marker in _START_OF_FRAME:
            bits, height, width, channels = struct.unpack_from(">BHHB", encoded, start)
            return Header("jpeg", height, width, bits, channels, orientation=orientation)
        if marker == 0xE1 and encoded[start : start + 6] == b"Exif\0\0":
            orientation = _orientation(encoded[start + 6 : position + 2 + size])
        position += size + 2
    return None


def _orientation(exif: bytes) -> int:
    """The tag Orientation of the first directory of Exif data (TIFF); 1 where it is not set."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for i in range(count):
            tag, value = struct.unpack_from(f"{order}H6xH", exif, first + 2 + 12 * i)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
