"""The other published protocols stated once more: slow, plain NumPy, one window at a time.

Written from what the scripts of hszhao/PSPNet, open-mmlab/mmsegmentation and
CSAILVision/semantic-segmentation-pytorch do, sharing nothing with the package.
"""

import math

import numpy as np
from semseg_protocol import MEAN, STD, resize, softmax, starts


def caffe(network, image, *, crop_size, base_size, scales=(1.0,), flip=True, stride=None):
    """`network`: normalized images -> logits of their size. MATLAB counts in float32."""
    height, width, _ = image.shape
    total = 0.0
    for scale in scales:
        long_side = np.float32(base_size * scale + 1)
        if height > width:
            size = (int(long_side), _away(long_side / np.float32(height) * np.float32(width)))
        else:
            size = (_away(long_side / np.float32(width) * np.float32(height)), int(long_side))
        scaled = imresize_8bit(image, size)
        if max(size) <= min(crop_size):
            padded = np.empty((*crop_size, 3))
            padded[:] = MEAN
            padded[: size[0], : size[1]] = scaled
            score = _caffe_window(network, padded, flip)[: size[0], : size[1]]
        else:
            padded = np.empty((max(size[0], crop_size[0]), max(size[1], crop_size[1]), 3))
            padded[:] = np.rint(MEAN)  # an 8-bit image is padded
            padded[: size[0], : size[1]] = scaled
            score = _slide(
                lambda window: _caffe_window(network, window, flip), padded, crop_size, stride
            )[: size[0], : size[1]]
        resized = imresize(score, (height, width))
        total = total + resized / resized.sum(-1, keepdims=True)
    return total / len(scales)


def mmseg(
    network,
    image,
    *,
    base_size,
    max_size,
    scales=(1.0,),
    flip=False,
    crop_size=None,
    stride=None,
    align_corners=False,
):
    """Whole images without `crop_size`. `network`: normalized images -> logits of their size."""
    resized = resize_corners if align_corners else resize
    height, width, _ = image.shape
    total, count = 0.0, 0
    for scale in scales:
        long_limit, short_limit = int(max_size * scale), int(base_size * scale)
        factor = min(long_limit / max(height, width), short_limit / min(height, width))
        size = (int(height * factor + 0.5), int(width * factor + 0.5))
        scaled = opencv_8bit(image, size)
        for mirrored in (False, True) if flip else (False,):
            turned = scaled[:, ::-1] if mirrored else scaled
            logits = (
                _slide_plain(network, turned, crop_size, stride)
                if crop_size
                else network(((turned - MEAN) / STD)[None])[0]
            )
            logits = logits[:, ::-1] if mirrored else logits
            total = total + softmax(resized(logits, (height, width)))
            count += 1
    return total / count


def csail(head, image, *, base_size, max_size, scales, flip=False):
    """`head`: normalized images -> logits at the network's own resolution."""
    height, width, _ = image.shape
    total, count = 0.0, 0
    for scale in scales:
        short = round(base_size * scale)
        factor = min(short / float(min(height, width)), max_size / float(max(height, width)))
        size = tuple(((int(side * factor) - 1) // 8 + 1) * 8 for side in (height, width))
        scaled = pillow_8bit(image, size)
        for mirrored in (False, True) if flip else (False,):
            turned = scaled[:, ::-1] if mirrored else scaled
            logits = resize(head(((turned - MEAN) / STD)[None])[0], (height, width))
            total = total + softmax(logits[:, ::-1] if mirrored else logits)
            count += 1
    return total / count


def _caffe_window(network, window, flip):
    normalized = ((window - MEAN) / STD)[None]
    logits = network(normalized)[0]
    if flip:
        logits = logits + network(normalized[:, :, ::-1])[0, :, ::-1]
    return softmax(logits)


def _slide(window_score, padded, crop_size, stride):
    total, count = None, np.zeros((*padded.shape[:2], 1))
    for row in starts(padded.shape[0], crop_size[0], stride and stride[0]):
        for column in starts(padded.shape[1], crop_size[1], stride and stride[1]):
            here = np.s_[row : row + crop_size[0], column : column + crop_size[1]]
            found = window_score(padded[here])
            if total is None:
                total = np.zeros((*padded.shape[:2], found.shape[-1]))
            total[here] += found
            count[here] += 1
    return total / count


def _slide_plain(network, image, crop_size, stride):
    """Nothing is padded: windows end with the image."""
    height, width, _ = image.shape
    num_rows = max(height - crop_size[0] + stride[0] - 1, 0) // stride[0] + 1
    num_columns = max(width - crop_size[1] + stride[1] - 1, 0) // stride[1] + 1
    total, count = 0.0, np.zeros((height, width, 1))
    for i in range(num_rows):
        for j in range(num_columns):
            bottom = min(i * stride[0] + crop_size[0], height)
            right = min(j * stride[1] + crop_size[1], width)
            top, left = max(bottom - crop_size[0], 0), max(right - crop_size[1], 0)
            found = network(((image[top:bottom, left:right] - MEAN) / STD)[None])[0]
            if np.isscalar(total):
                total = np.zeros((height, width, found.shape[-1]))
            total[top:bottom, left:right] += found
            count[top:bottom, left:right] += 1
    return total / count


def imresize(image, size):
    """MATLAB's bilinear: a triangle, wider when shrinking; beyond the border the image is mirrored."""
    for axis, new in enumerate(size):
        image = np.moveaxis(image, axis, 0)
        image = np.moveaxis(np.stack([_matlab_line(image, new, i) for i in range(new)]), 0, axis)
    return image


def imresize_8bit(image, size):
    """The axis with the smaller factor first, rounded after each."""
    factors = [new / old for new, old in zip(size, image.shape[:2], strict=True)]
    for axis in np.argsort(factors, kind="stable"):
        lines = np.moveaxis(image.astype(float), axis, 0)
        made = [_matlab_line(lines, size[axis], i) for i in range(size[axis])]
        image = np.moveaxis(np.floor(np.stack(made) + 0.5), 0, axis)
    return image


def _matlab_line(image, new, i):
    old = len(image)
    factor = new / old
    center = (i + 1) / factor + 0.5 * (1 - 1 / factor)  # counted from 1
    slope = min(factor, 1.0)
    total, weights = 0.0, 0.0
    for j in range(math.floor(center - 1 / slope) - 1, math.ceil(center + 1 / slope) + 2):
        weight = max(0.0, 1 - abs(slope * (center - j)))
        mirrored = (j - 1) % (2 * old)
        mirrored = mirrored if mirrored < old else 2 * old - 1 - mirrored
        total = total + weight * image[mirrored]
        weights += weight
    return total / weights


def pillow_8bit(image, size):
    """Pillow's bilinear in whole numbers: across, then down."""
    for axis, new in ((1, size[1]), (0, size[0])):
        if image.shape[axis] != new:
            lines = np.moveaxis(image.astype(np.int64), axis, 0)
            made = [_pillow_line(lines, new, i) for i in range(new)]
            image = np.moveaxis(np.stack(made), 0, axis)
    return image


def _pillow_line(image, new, i):
    ratio = len(image) / new
    support = max(ratio, 1.0)
    center = (i + 0.5) * ratio
    first = max(int(center - support + 0.5), 0)
    last = min(int(center + support + 0.5), len(image))
    weights = [max(0.0, 1 - abs((j - center + 0.5) / support)) for j in range(first, last)]
    total = 1 << 21
    for j, weight in zip(range(first, last), weights, strict=True):
        total = total + int(0.5 + weight / sum(weights) * (1 << 22)) * image[j]
    return np.clip(total >> 22, 0, 255)


def resize_corners(image, size):
    """Bilinear, ends on ends."""
    for axis, new in enumerate(size):
        image = np.moveaxis(image, axis, 0)
        old = len(image)
        lines = []
        for i in range(new):
            position = i * (old - 1) / max(new - 1, 1)
            lower = min(int(position), max(old - 2, 0))
            upper = min(lower + 1, old - 1)
            lines.append(image[lower] + (position - lower) * (image[upper] - image[lower]))
        image = np.moveaxis(np.stack(lines), 0, axis)
    return image


def opencv_8bit(image, size):
    """Within one of what OpenCV makes of 8 bits, whose arithmetic is its own."""
    import cv2

    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR).astype(float)


def _away(value):
    """Rounded, halves away from 0."""
    return math.floor(float(value) + 0.5)
