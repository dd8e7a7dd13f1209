"""Files of images and masks: what is read, and what a fault says."""

import shlex

import cv2
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import headers
from pspnet_jax.data.folders import decode_image, decode_mask, read_image, read_mask
from pspnet_jax.data.layouts import DataError

from pictures import (
    CMYK_JPEG,
    open_folder,
    write_mask,
    write_palette_mask,
    write_photograph,
    write_png,
    write_split,
    write_turned_photograph,
    write_voc,
)

BUDGET_SECONDS = 15

CAMVID = load_label_set("camvid")
VOC = load_label_set("voc2012")


def test_reads_pairs_in_order(tmp_path):
    write_split(tmp_path, "train", 3)
    source = open_folder(tmp_path)
    assert len(source) == 3
    read = source[2]
    assert source.names[2] == "train_0002"
    assert (read.image.shape, read.labels.shape) == ((40, 50, 3), (40, 50))
    assert (read.image.dtype, read.labels.dtype, int(read.index)) == (np.uint8, np.uint8, 2)


def test_images_are_red_green_blue(tmp_path):
    assert cv2.imwrite(str(tmp_path / "red.png"), np.full((4, 4, 3), (0, 0, 255), np.uint8))
    np.testing.assert_array_equal(read_image(tmp_path / "red.png")[0, 0], [255, 0, 0])


def test_ade20k_layout_maps_raw_ids(tmp_path):
    write_split(tmp_path, "training", 1, raw_offset=1)
    raw = read_mask(tmp_path / "annotations/training/training_0000.png")
    source = open_folder(tmp_path, "training", "ade20k", load_label_set("ade20k"))
    np.testing.assert_array_equal(source[0].labels, raw - 1)


def test_size_mismatch_names_both_files(tmp_path):
    write_split(tmp_path, "train", 1)
    cv2.imwrite(str(tmp_path / "annotations/train/train_0000.png"), np.zeros((40, 49), np.uint8))
    with pytest.raises(DataError, match=r"train_0000\.jpg is 40x50 .*train_0000\.png is 40x49"):
        open_folder(tmp_path)[0]


def test_id_out_of_range_names_the_file_and_the_id(tmp_path):
    write_split(tmp_path, "train", 1)
    cv2.imwrite(str(tmp_path / "annotations/train/train_0000.png"), np.full((40, 50), 77, np.uint8))
    with pytest.raises(DataError, match=r"train_0000\.png: mask values 77 are out of range"):
        open_folder(tmp_path)[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((40, 50, 4), np.uint8, "uint8 with 4 channels"),
        ((40, 50), np.uint16, "uint16 with 1 channels"),
        ((40, 50, 3), np.uint16, "uint16 with 3 channels"),
    ],
)
def test_mask_of_another_kind_is_refused(tmp_path, shape, dtype, message):
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros(shape, dtype))
    with pytest.raises(DataError, match=rf"mask\.png: a mask must be an 8-bit PNG .* is {message}"):
        read_mask(tmp_path / "mask.png")


def test_voc2012_reads_official_masks_by_their_palette(tmp_path):
    write_voc(tmp_path, "val", ["2007_000033", "2007_000032"], "SegmentationClass")
    ids = np.array([[0, 1, 15], [20, 255, 0]], np.uint8)
    colors = dict(enumerate(VOC.colors)) | {255: (224, 224, 192)}
    write_palette_mask(tmp_path / "SegmentationClass/2007_000033.png", ids, colors)
    write_photograph(tmp_path / "JPEGImages/2007_000033.jpg", ids.shape)
    source = open_folder(tmp_path, "val", "voc2012", VOC)
    assert source.names == ["2007_000033", "2007_000032"]  # in the order of the list
    np.testing.assert_array_equal(source[0].labels, ids)
    assert (source[1].labels == 1).all()  # one channel: as it is


def test_color_that_is_no_class_names_the_file_and_the_color(tmp_path):
    write_voc(tmp_path, "val", ["a"], "SegmentationClass")
    ids = np.full((4, 6), 3, np.uint8)
    write_palette_mask(tmp_path / "SegmentationClass/a.png", ids, {3: (128, 128, 1)})
    with pytest.raises(DataError, match=r"Class/a\.png: .* \(128, 128, 1\) .* label set 'voc2012'"):
        open_folder(tmp_path, "val", "voc2012", VOC)[0]


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_photograph_is_named(tmp_path, keep):
    write_split(tmp_path, "train", 1, size=(200, 300))
    path = tmp_path / "images/train/train_0000.jpg"
    encoded = path.read_bytes()
    path.write_bytes(encoded[: int(len(encoded) * keep)])
    with pytest.raises(DataError, match=r"train_0000\.jpg: (the file is empty|cannot be decoded)"):
        open_folder(tmp_path)[0]


def test_what_is_no_image_or_not_there(tmp_path):
    (tmp_path / "text.jpg").write_text("not a photograph")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "none.jpg")


def repair(error):
    """Run the Python command that an error recommends."""
    exec(shlex.split(str(error).partition("python -c ")[2])[0], {})


def quadrants():
    """A photograph of four colors, 30x40, and its classes."""
    labels = np.repeat(np.repeat(np.uint8([[0, 1], [2, 3]]), 15, axis=0), 20, axis=1)
    colors = np.uint8([(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 220)])
    return colors[labels], labels


def assert_shown(image, expected):
    """Equal but for the borders between the quadrants, which JPEG blurs."""
    assert image.shape == expected.shape
    for rows in (np.s_[:13], np.s_[17:]):
        for columns in (np.s_[:18], np.s_[22:]):
            found = image[rows, columns].astype(int)
            np.testing.assert_allclose(found, expected[rows, columns], atol=12)


def test_cmyk_becomes_rgb(tmp_path):
    (tmp_path / "print.jpg").write_bytes(CMYK_JPEG)
    image = read_image(tmp_path / "print.jpg")
    np.testing.assert_allclose(image.astype(int), np.full((8, 8, 3), (255, 127, 0)), atol=4)
    assert headers.parse(CMYK_JPEG) == headers.Header("jpeg", 8, 8, 8, 4)


def test_gray_image_and_opaque_alpha_become_rgb(tmp_path):
    image, _ = quadrants()
    opaque = np.dstack([image[..., ::-1], np.full((30, 40), 255, np.uint8)])
    assert cv2.imwrite(str(tmp_path / "opaque.png"), opaque)
    np.testing.assert_array_equal(read_image(tmp_path / "opaque.png"), image)
    assert cv2.imwrite(str(tmp_path / "gray.png"), image[..., 0])
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), np.dstack([image[..., 0]] * 3))


def test_transparent_image_is_refused_and_the_command_repairs_it(tmp_path):
    image, labels = quadrants()
    alpha = np.where(labels == 0, 0, 255).astype(np.uint8)
    assert cv2.imwrite(str(tmp_path / "cut.png"), np.dstack([image[..., ::-1], alpha]))
    with pytest.raises(DataError, match=r"cut\.png: 25\.0% of the image is transparent") as caught:
        read_image(tmp_path / "cut.png")
    repair(caught.value)
    np.testing.assert_array_equal(read_image(tmp_path / "cut.png"), image)


def test_gray_image_with_a_transparent_value_is_refused_and_the_command_repairs_it(tmp_path):
    image, _ = quadrants()
    path = tmp_path / "stamp.png"
    write_png(path, image[..., 0], color_type=0, between={b"tRNS": b"\x00\x05"})
    with pytest.raises(
        DataError, match=r"stamp\.png: one gray value of the image is transp"
    ) as caught:
        read_image(path)
    repair(caught.value)
    np.testing.assert_array_equal(read_image(path), np.dstack([image[..., 0]] * 3))


def test_image_of_16_bits_is_refused_and_the_command_repairs_it(tmp_path):
    image, _ = quadrants()
    assert cv2.imwrite(str(tmp_path / "deep.png"), image[..., ::-1].astype(np.uint16) * 257)
    with pytest.raises(
        DataError, match=r"deep\.png: an image must have 8 bits per channel, this one has 16"
    ) as caught:
        read_image(tmp_path / "deep.png")
    repair(caught.value)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), image)


@pytest.mark.parametrize("suffix", [".tiff", ".ppm"])
def test_other_files_of_16_bits_are_refused_too(tmp_path, suffix):
    path = tmp_path / f"it's{suffix}"  # a name that needs quotes in a shell
    assert cv2.imwrite(str(path), np.full((4, 6, 3), 77 * 257, np.uint16))
    with pytest.raises(DataError, match="8 bits per channel, this one has 16") as caught:
        read_image(path)
    repair(caught.value)
    np.testing.assert_array_equal(read_image(path), np.full((4, 6, 3), 77))


@pytest.mark.parametrize("suffix", [".tiff", ".webp", ".bmp"])
def test_other_transparent_files_are_refused_too(tmp_path, suffix):
    path, image = tmp_path / f"cut{suffix}", np.full((4, 6, 4), 255, np.uint8)
    flags = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []  # lossless
    assert cv2.imwrite(str(path), image, flags)
    np.testing.assert_array_equal(read_image(path), image[..., :3])
    image[:2, :, 3] = 0
    assert cv2.imwrite(str(path), image, flags)
    with pytest.raises(DataError, match=r"50\.0% of the image is transparent"):
        read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_is_turned_as_its_exif_orientation_says(tmp_path, orientation):
    image, labels = quadrants()
    path = tmp_path / "images/train/a.jpg"
    write_turned_photograph(path, image, orientation)
    write_mask(tmp_path / "annotations/train/a.png", labels)
    read = open_folder(tmp_path)[0]
    assert_shown(read.image, image)
    np.testing.assert_array_equal(read.labels, labels)
    header = headers.parse(path.read_bytes())
    assert header.orientation == orientation
    assert header.is_turned_aside == ((header.height, header.width) == (40, 30))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_mask_of_the_stored_size_is_refused_and_the_command_turns_it(tmp_path, orientation):
    image, labels = quadrants()
    write_turned_photograph(tmp_path / "images/train/a.jpg", image, orientation)
    stored = cv2.imread(
        str(tmp_path / "images/train/a.jpg"), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    )[..., ::-1]
    colors = image[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    drawn = np.abs(stored[..., None, :] - colors).sum(-1).argmin(-1).astype(np.uint8)
    write_mask(tmp_path / "annotations/train/a.png", drawn)
    with pytest.raises(
        DataError,
        match=rf"a\.jpg is 30x40 \(height x width; stored as 40x30, turned by its Exif orientation "
        rf"{orientation}\), .*a\.png is 40x30: the mask was drawn on the image as it is stored",
    ) as caught:
        open_folder(tmp_path)[0]
    repair(caught.value)
    np.testing.assert_array_equal(open_folder(tmp_path)[0].labels, labels)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 6, 4), np.uint8), ((4, 6), np.uint16), ((4, 6, 3), np.uint16)]
)
def test_the_command_repairs_a_mask_of_another_kind(tmp_path, shape, dtype):
    path = tmp_path / "mask.png"
    assert cv2.imwrite(str(path), np.full(shape, 7, dtype))
    with pytest.raises(DataError, match="makes one of it") as caught:
        read_mask(path)
    repair(caught.value)
    assert (read_mask(path) == 7).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_ids_of_fewer_bits_are_not_multiplied(tmp_path, bits):
    path, ids = tmp_path / "mask.png", np.arange(2**bits, dtype=np.uint8)
    packed = np.packbits(np.unpackbits(ids[:, None], axis=1)[:, -bits:].reshape(1, -1), axis=1)
    write_png(path, packed, color_type=0, bits=bits)
    assert cv2.imread(str(path), -1).max() == 255  # of OpenCV
    with pytest.raises(DataError, match=f"this one has {bits} bits; this gives it 8") as caught:
        read_mask(path)
    repair(caught.value)
    np.testing.assert_array_equal(read_mask(path), ids[None])


def test_ids_above_255_are_not_cut_off(tmp_path):
    assert cv2.imwrite(str(tmp_path / "mask.png"), np.full((4, 6), 1007, np.uint16))
    with pytest.raises(DataError, match=r"values up to 1007: number the classes within 0\.\.254"):
        read_mask(tmp_path / "mask.png")


def test_mask_that_is_a_jpeg_by_another_name(tmp_path):
    assert cv2.imwrite(str(tmp_path / "mask.jpg"), np.zeros((4, 6), np.uint8))
    (tmp_path / "mask.jpg").rename(tmp_path / "mask.png")
    with pytest.raises(DataError, match=r"mask\.png: .* this file is no PNG, whatever its name"):
        read_mask(tmp_path / "mask.png")


def test_mask_of_ids_in_three_channels(tmp_path):
    write_photograph(tmp_path / "images/train/a.jpg")
    path = tmp_path / "annotations/train/a.png"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), np.full((4, 6, 3), 5, np.uint8))
    with pytest.raises(DataError, match="three channels are equal") as caught:
        open_folder(tmp_path)[0]
    repair(caught.value)
    assert (open_folder(tmp_path)[0].labels == 5).all()


def test_palette_of_foreign_colors(tmp_path):
    write_photograph(tmp_path / "images/train/a.jpg")
    ids = np.full((4, 6), 3, np.uint8)
    write_palette_mask(tmp_path / "annotations/train/a.png", ids, {3: (1, 2, 3)})
    with pytest.raises(DataError, match=r"a\.png: .*not its colors but its indexes are the ids"):
        open_folder(tmp_path)[0]


@pytest.mark.parametrize("folder", ["images/train/a.jpg", "annotations/train/a.png"])
def test_symbolic_link_that_leads_nowhere(tmp_path, folder):
    write_photograph(tmp_path / "images/train/a.jpg")
    write_mask(tmp_path / "annotations/train/a.png")
    (tmp_path / folder).unlink()
    (tmp_path / folder).symlink_to(tmp_path / folder)
    with pytest.raises(DataError, match=rf"{folder}: Too many levels of symbolic links"):
        open_folder(tmp_path)[0]
    (tmp_path / folder).unlink()
    (tmp_path / folder).symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"{folder}: No such file"):
        open_folder(tmp_path)[0]


def test_header_of_what_is_damaged_or_foreign(tmp_path):
    write_turned_photograph(tmp_path / "a.jpg", quadrants()[0], 6)
    encoded = (tmp_path / "a.jpg").read_bytes()
    assert headers.parse(encoded).orientation == 6
    for cut in range(0, 150, 7):
        assert headers.parse(encoded[:cut]) is None
    assert headers.parse(b"GIF89a" + bytes(40)) is None
    assert headers.parse(b"\x89PNG\r\n\x1a\n" + bytes(3)) is None
    assert headers.parse(b"\xff\xd8" + bytes(100)) is None
    no_marker = b"\x00\xc0\x00\x11\x08\x00\x10\x00\x10\x03"
    assert headers.parse(b"\xff\xd8" + no_marker) is None
    assert headers.parse(b"\xff\xd8\xff" + no_marker[1:]).width == 16


def test_files_that_would_take_gigabytes_are_refused():
    _, png = cv2.imencode(".png", np.zeros((3, 7), np.uint8))
    content = bytearray(png.tobytes())
    at = content.index(b"IDAT") - 4
    with pytest.raises(DataError, match="corrupt or truncated"):
        decode_mask("mask.png", bytes(content[:at] + b"\x7f\xff\xff\xff" + content[at + 4 :]))
    with pytest.raises(DataError, match="corrupt or truncated"):
        decode_mask("mask.png", bytes(content[: at + 9]))
    assert decode_mask("mask.png", bytes(content) + b"what some program appends").shape == (3, 7)
    _, jpeg = cv2.imencode(".jpg", np.zeros((3, 7), np.uint8))
    content = bytearray(jpeg.tobytes())
    at = content.index(b"\xff\xc0") + 5  # height and width in the start of the frame
    content[at : at + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(DataError, match="65535x65535 pixels are more than the 268,435,456"):
        decode_image("photo.jpg", bytes(content))
