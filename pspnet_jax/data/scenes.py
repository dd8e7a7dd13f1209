"""The embedded data set `scenes`: misty pictures in which only far-away context names an object.

A strip along one side shows water, a road, grass or a quilt; far from it, one to three copies of
one shape stand in the mist. The shapes are the three observations of the paper (Zhao et al., CVPR
2017, section 3.1), and nothing but the strip tells the two meanings of each apart:

    shape   where the strip shows ...      observation
    hull    water: boat     road: car      mismatched relationship
    block   road: tower     grass: house   confusion categories
    lump    grass: rock     quilt: pillow  inconspicuous classes

* Every image is a pure function of (seed, index): nothing is downloaded, stored or remembered.
* The six (strip, shape) pairs are equally likely, and one image holds one shape only, so that no
  neighbor gives the class away. Colors, sizes and places are drawn without looking at the strip.
* Each layer has its own random stream: a road that draws more numbers than a lake moves nothing
  else. So `render(..., swapped=True)` changes the strip and not one pixel outside it.
* At least 40 pixels lie between strip and objects: farther than a small network without a pyramid
  learns to look within this data set's budget, though not farther than it could.
* Local color must not solve it: birds and balloons distract; cast, gain, light and grain vary.
"""

import operator
from typing import SupportsIndex

import cv2
import numpy as np
from numpy.random import PCG64, Generator

from pspnet_jax.arrays import IGNORE_LABEL, Example, LabelMap, RawImage

IMAGE_SIZE = 129  # pixels, height and width
STRIP_DEPTH = (24, 34)  # pixels from the image border to the strip's wavy edge, least and most
GAP = 40  # pixels between the strip and any object, at least
OBJECT_SIZE = (30, 42)  # pixels, the longer side of an object
SPLITS = {"train": range(16_384), "val": range(16_384, 16_584)}  # indices for `render`

MIST, WATER, ROAD, GRASS, QUILT, BOAT, CAR, TOWER, HOUSE, ROCK, PILLOW, BALLOON = range(12)

# Colors tell hulls from walls and both from red balloons; they never tell a boat from a car.
HULLS = np.reshape([*bytes.fromhex("e8a830 2a98a4 8058b0 e4d44c 3c70c0")], (-1, 3))
WALLS = np.reshape([*bytes.fromhex("e6dac0 dac0ae bab4c6 cac8bc c0aa90")], (-1, 3))
ROOFS = np.reshape([*bytes.fromhex("7a5646 505c74 66664e")], (-1, 3))
DARK_GLASS, WARM_GLASS, RUBBER, STEEL = (62, 76, 94), (250, 224, 150), (52, 50, 54), (190, 188, 180)


# Tools. A canvas is uint8[size, size, 4]: RGB and the silhouette of the objects painted so far.
# A box is (left, top, width, height) in pixels; a negative width mirrors what it holds.

ANGLE = np.linspace(0, 2 * np.pi, 32, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLE), np.sin(ANGLE)], axis=1)


def _place(points, box) -> np.ndarray:
    """Points of the unit square, [n, 2] as (x, y), to pixels of the image."""
    return np.asarray(points) * box[2:] + box[:2]


def _fixed_point(points) -> np.ndarray:
    """Pixel coordinates as OpenCV wants them: sixteenths, counted from the first pixel's center."""
    return np.round((points - 0.5) * 16).astype(np.int32)


def _fill(canvas: np.ndarray, outline, color) -> None:
    """Paints an anti-aliased polygon, [n, 2] as (x, y) in pixels, into picture and silhouette."""
    cv2.fillPoly(canvas, [_fixed_point(outline)], (*color, 255), cv2.LINE_AA, shift=4)


def _strokes(canvas: np.ndarray, lines, color) -> None:
    """Paints thin lines, [lines, points, 2], that belong to no silhouette."""
    cv2.polylines(canvas, [*_fixed_point(lines)], False, (*color, 0), 1, cv2.LINE_AA, shift=4)


def _rectangle(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _rounded(points) -> np.ndarray:
    """Cuts every corner twice (Chaikin): [n, 2] -> [4 n, 2]."""
    for _ in range(2):
        following = np.roll(points, -1, axis=0)
        cuts = [np.multiply(points, 1 - w) + w * following for w in (0.2, 0.8)]
        points = np.stack(cuts, axis=1).reshape(-1, 2)
    return points


# The mist and the strip. Every strip is painted along the bottom and then turned to its side.


def _mist(rng: Generator) -> np.ndarray:
    """An empty canvas: pale, tinted, in slow billows."""
    billows = np.zeros((1, 1))
    for cells, strength in ((4, 14), (9, 7), (24, 3)):
        billows = cv2.resize(billows, (cells, cells), interpolation=cv2.INTER_CUBIC)
        billows += strength * rng.uniform(-1, 1, (cells, cells))
    billows = cv2.resize(billows, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC)
    tint = rng.uniform(150, 185) + rng.uniform(-9, 9, 3)
    channels = [cv2.convertScaleAbs(billows, beta=level) for level in tint]
    return cv2.merge([*channels, np.zeros_like(channels[0])])


def _depth_behind_edge(rng: Generator) -> np.ndarray:
    """Pixels from the strip's wavy edge, [34, size]; negative outside, last row at the border."""
    least, most = STRIP_DEPTH
    along = np.linspace(0, 2 * np.pi, IMAGE_SIZE)
    wave, ripple = (np.sin(rng.uniform(n, 2 * n) * along + rng.uniform(0, 7)) for n in (1, 3))
    depth = rng.uniform(least + 3, most - 3) + 2 * wave + ripple
    return (depth - np.arange(most)[::-1, None]).astype(np.float32)


def _water(rng: Generator, behind: np.ndarray) -> np.ndarray:
    """Blue with broken rows of crests and foam at the shore."""
    row, column = np.indices(behind.shape, np.float32)
    swell = 1.6 * np.sin(column * rng.uniform(0.1, 0.2) + rng.uniform(0, 7))
    crests = np.maximum(np.sin(row * rng.uniform(0.7, 0.95) + swell), 0) ** 6
    crests *= np.sin(column * rng.uniform(0.2, 0.3) + row * 0.5 + rng.uniform(0, 7)) > -0.5
    foam = np.clip(2.5 - np.abs(behind - 2.5), 0, 1)
    blue = np.array((44, 104, 158)) + rng.uniform(-14, 14, 3)
    return blue + (70 * crests + 60 * foam - 0.8 * behind)[..., None]


def _road(rng: Generator, behind: np.ndarray) -> np.ndarray:
    """Asphalt with a curb and a dashed line, both along the edge."""
    period = rng.uniform(16, 24)
    dash = (np.arange(IMAGE_SIZE) + rng.uniform(0, period)) % period < 0.55 * period
    line = np.clip(2 - np.abs(behind - rng.uniform(13, 16)), 0, 1) * dash
    curb = np.clip(2 - np.abs(behind - 2), 0, 1)
    gravel = rng.uniform(-9, 9, behind.shape)
    gray = np.array((78, 78, 84)) + rng.uniform(-12, 12)
    return gray + (gravel + 80 * curb)[..., None] + ((236, 226, 190) - gray) * line[..., None]


def _grass(rng: Generator, behind: np.ndarray) -> np.ndarray:
    """Green blades in three shades, all leaning with one wind."""
    green = np.array((92, 138, 60)) + rng.uniform(-14, 14, 3)
    lawn = np.full((*behind.shape, 3), green, np.uint8)
    wind = rng.uniform(-4, 4)
    for shade in (0.72, 1.18, 1.4):
        roots = rng.uniform((0, 0), (IMAGE_SIZE, STRIP_DEPTH[1] + 4), (70, 2))
        tips = roots + rng.uniform((wind - 2, -9), (wind + 2, -5), (70, 2))
        _strokes(lawn, np.stack([roots, tips], axis=1), shade * green)
    return lawn.astype(np.float32)


def _quilt(rng: Generator, behind: np.ndarray) -> np.ndarray:
    """Padded checks of two colors, with dark seams and a plain hem."""
    row, column = np.indices(behind.shape, np.float32)
    turn, cell = rng.uniform(0.2, 1.3), rng.uniform(8, 11)
    warp = (column * np.cos(turn) + row * np.sin(turn)) / cell
    weft = (row * np.cos(turn) - column * np.sin(turn)) / cell
    checks = (np.floor(warp) + np.floor(weft)) % 2 * (behind > 4)
    seam = 2 * np.maximum(np.abs(warp % 1 - 0.5), np.abs(weft % 1 - 0.5))
    cream, rose = np.array([(238, 224, 206), (176, 92, 128)]) + rng.uniform(-18, 18, (2, 3))
    return (cream + (rose - cream) * checks[..., None]) * (1.04 - 0.34 * seam**5)[..., None]


STRIPS = {WATER: _water, ROAD: _road, GRASS: _grass, QUILT: _quilt}


def _paint_strip(canvas: np.ndarray, labels: np.ndarray, strip: int, side: int, rng: Generator):
    """Paints the strip along one side: 0 bottom, 1 left, 2 top, 3 right."""
    behind = _depth_behind_edge(rng)  # drawn before anything that depends on the strip
    texture = np.clip(STRIPS[strip](rng, behind), 0, 255)
    ground = np.rot90(canvas, side)[-STRIP_DEPTH[1] :, :, :3]  # a view: writing paints the canvas
    ground[:] = ground + np.clip(behind, 0, 1)[..., None] * (texture - ground)
    np.rot90(labels, side)[-STRIP_DEPTH[1] :][behind > 0.5] = strip


# The shapes, drawn in the unit square. No painter knows the strip.

BODY = _rounded([(0, 0.46), (0.7, 0.5), (1, 0.34), (0.82, 0.94), (0.14, 0.94), (0.03, 0.8)])
CABIN = _rounded([(0.15, 0.56), (0.2, 0.15), (0.58, 0.15), (0.72, 0.56)])
STRIPE = np.array([(0.02, 0.62), (0.97, 0.54), (0.94, 0.64), (0.03, 0.73)])
PENNANT = np.array([(0.26, 0), (0.44, 0.06), (0.29, 0.11), (0.29, 0.2), (0.26, 0.2)])
PANES = (_rectangle(0.25, 0.25, 0.4, 0.42), _rectangle(0.45, 0.25, 0.57, 0.42))


def _color(rng: Generator, palette: np.ndarray) -> np.ndarray:
    """One of the palette, a little off: RGB."""
    return palette[rng.integers(len(palette))] + rng.uniform(-14, 14, 3)


def _hull(canvas: np.ndarray, box: np.ndarray, rng: Generator) -> None:
    """A boat hung with tires, or a car with a pennant: body, cabin and two dark discs."""
    color, trim = _color(rng, HULLS), _color(rng, HULLS)
    if rng.random() < 0.5:
        box = box * (1, 1, -1, 1) + (box[2], 0, 0, 0)
    _fill(canvas, _place(PENNANT, box), 0.6 * trim)
    _fill(canvas, _place(CABIN, box), 0.35 * trim + 150)
    _fill(canvas, _place(BODY, box), color)
    _fill(canvas, _place(STRIPE, box), 0.68 * color)
    for pane in PANES:
        _fill(canvas, _place(pane, box), DARK_GLASS)
    for x in (0.26, 0.72):
        disc = 0.155 * box[3] * CIRCLE
        _fill(canvas, _place((x, 0.84), box) + disc, RUBBER)
        _fill(canvas, _place((x, 0.84), box) + 0.4 * disc, STEEL)


def _block(canvas: np.ndarray, box: np.ndarray, rng: Generator) -> None:
    """A tower or a house: a front with windows, a shaded flank, a low roof."""
    color, roof = _color(rng, WALLS), _color(rng, ROOFS)
    flank, eaves = rng.uniform(0.68, 0.82), rng.uniform(0.06, 0.24)
    _fill(canvas, _place(_rectangle(0.04, eaves, 0.96, 1.0), box), color)
    _fill(canvas, _place(_rectangle(flank, eaves, 0.96, 1.0), box), 0.72 * color)
    gable = [(0, eaves + 0.05), (0, eaves), (0.14, 0), (0.86, 0), (1, eaves), (1, eaves + 0.05)]
    _fill(canvas, _place(gable, box), roof)
    for y in np.linspace(eaves + 0.12, 0.86, rng.integers(3, 5)):
        for x in np.linspace(0.18, flank - 0.12, 3):
            pane = _rectangle(x - 0.06, y - 0.05, x + 0.06, y + 0.06)
            _fill(canvas, _place(pane, box), WARM_GLASS if rng.random() < 0.4 else DARK_GLASS)


def _lump(canvas: np.ndarray, box: np.ndarray, rng: Generator) -> None:
    """A rock or a pillow: the mist's own texture, raised by light from the upper left."""
    power = rng.uniform(2.2, 4)  # 2 is an ellipse; more squares it
    outline = CIRCLE / np.linalg.norm(CIRCLE, ord=power, axis=1, keepdims=True)
    for n in (2, 3, 5):
        outline *= 1 + 0.05 * np.sin(n * ANGLE[:, None] + rng.uniform(0, 7))
    outline = (outline - outline.min(axis=0)) / np.ptp(outline, axis=0)
    silhouette = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    _fill(silhouette, _place(outline, box), (255,))
    left, top, width, height = map(int, box)
    patch = np.s_[max(top - 1, 0) : top + height + 3, max(left - 1, 0) : left + width + 3]
    solid = silhouette[patch] / np.float32(255)
    raised = cv2.GaussianBlur(solid, (0, 0), box[3] / 5, borderType=cv2.BORDER_CONSTANT)
    slope = cv2.Sobel(raised, -1, 1, 0) + 1.4 * cv2.Sobel(raised, -1, 0, 1)
    shade = 1 + solid * slope * box[3] * rng.uniform(0.014, 0.022)
    canvas[patch][..., :3] = np.clip(canvas[patch][..., :3] * shade[..., None], 0, 255)
    canvas[..., 3] = np.maximum(canvas[..., 3], silhouette)


SHAPES = (  # painter, whether it is upright, and its two meanings as (strip, object)
    (_hull, False, ((WATER, BOAT), (ROAD, CAR))),
    (_block, True, ((ROAD, TOWER), (GRASS, HOUSE))),
    (_lump, False, ((GRASS, ROCK), (QUILT, PILLOW))),
)


def _boxes(rng: Generator, *, side: int, upright: bool) -> np.ndarray:
    """One to three boxes, [n, 4], in a loose row, away from the strip on this side."""
    count = rng.integers(1, 4)
    longer = rng.uniform(*OBJECT_SIZE, count)
    shorter = longer * rng.uniform(0.62, 0.8, count)
    size = np.stack([shorter, longer] if upright else [longer, shorter])  # as (x, y)
    corner = np.empty_like(size)
    row, across = side % 2, 1 - side % 2  # the axis along the strip, and the other one
    pitch = size[row] + 1  # one pixel between neighbors: three of the largest just fit
    spare = rng.uniform(0, IMAGE_SIZE - pitch.sum(), count)
    corner[row] = np.sort(spare) + np.cumsum(pitch) - pitch
    corner[across] = rng.uniform(0, IMAGE_SIZE - STRIP_DEPTH[1] - GAP - size[across])
    if side in (1, 2):  # the strip lies at the low coordinates
        corner[across] = IMAGE_SIZE - size[across] - corner[across]
    return np.concatenate([corner, size]).T


# Clutter and light.


def _birds(canvas: np.ndarray, rng: Generator) -> None:
    """Two to six thin strokes, each a pair of wings, that carry no label."""
    count = rng.integers(2, 7)
    span, tilt = rng.uniform(3, 6, count), rng.uniform(-2, 2, count)
    wings = np.zeros((count, 3, 2))  # left tip, body, right tip
    wings[:, 0] = np.stack([-span, -0.6 * span + tilt], axis=1)
    wings[:, 2] = np.stack([span, -0.6 * span - tilt], axis=1)
    wings += rng.uniform(6, IMAGE_SIZE - 6, (count, 1, 2))
    _strokes(canvas, wings, [rng.uniform(50, 110)] * 3)


def _balloons(canvas: np.ndarray, rng: Generator) -> None:
    """None to three red balloons anywhere, each with its string, in front of everything."""
    for _ in range(rng.integers(0, 4)):
        radius = rng.uniform(5, 8)
        center = rng.uniform(radius, IMAGE_SIZE - radius, 2)
        red = np.array((208, 44, 40)) + rng.uniform(-16, 16, 3)
        string = center + radius * np.array([(0, 1.1), (0.25, 1.7), (-0.1, 2.5)])
        _strokes(canvas, string[None], (110, 100, 100))
        _fill(canvas, center + radius * CIRCLE * (0.9, 1.08), red)
        _fill(canvas, center - 0.35 * radius + 0.26 * radius * CIRCLE, 0.5 * red + 120)


def _take_silhouette(canvas: np.ndarray, labels: np.ndarray, label: int) -> None:
    """Moves the silhouette from canvas to labels, with a ring of void one pixel wide around it."""
    inside = cv2.inRange(canvas[..., 3], 128, 255)
    labels[cv2.dilate(inside, np.ones((3, 3), np.uint8)) > 0] = IGNORE_LABEL
    labels[inside > 0] = label
    canvas[..., 3] = 0


def _light(canvas: np.ndarray, rng: Generator) -> RawImage:
    """The finished image: color cast, gain, a linear gradient of light, and grain."""
    ramp = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    slope_x, slope_y = rng.uniform(-0.25, 0.25, 2)
    light = (1 + slope_x * ramp + slope_y * ramp[:, None]).astype(np.float32)
    cast = (rng.uniform(0.84, 1.12) * rng.uniform(0.93, 1.07, 3)).astype(np.float32)
    grain = rng.uniform(2, 7) * rng.standard_normal(light.shape, np.float32)
    channels = cv2.split(canvas)[:3]
    lit = [light * c * channel + grain for c, channel in zip(cast, channels, strict=True)]
    return np.clip(cv2.merge(lit), 0, 255).astype(np.uint8)


def render(seed: int, index: int, *, swapped: bool = False) -> tuple[RawImage, LabelMap]:
    """Paints one image with its labels: a pure function of its arguments.

    Args:
      seed: which data set; a negative one is a ValueError.
      index: which image; a negative one is a ValueError.
      swapped: paint the same picture with the other strip that its shape knows, and the labels that
        follow from it. Outside the strip not one pixel of the image changes.

    Returns:
      The image, uint8[129, 129, 3] in RGB, and the labels, uint8[129, 129] with 255 for void.
    """
    # The index goes first: it fills one word, so no two pairs can spell the same entropy.
    root = Generator(PCG64([index, seed]))
    mist_rng, strip_rng, object_rng, clutter_rng, light_rng = root.spawn(5)
    paint_object, upright, meanings = SHAPES[root.integers(3)]
    strip, label = meanings[root.integers(2) ^ swapped]
    side = int(root.integers(4))

    canvas, labels = _mist(mist_rng), np.full((IMAGE_SIZE, IMAGE_SIZE), MIST, np.uint8)
    _paint_strip(canvas, labels, strip, side, strip_rng)
    _birds(canvas, clutter_rng)
    for box in _boxes(object_rng, side=side, upright=upright):
        paint_object(canvas, box, object_rng)
    _take_silhouette(canvas, labels, label)
    _balloons(canvas, clutter_rng)
    _take_silhouette(canvas, labels, BALLOON)
    return _light(canvas, light_rng), labels


class Scenes:
    """A random-access sequence of `Example`, small enough to travel to any worker process.

    The split 'train' has 16,384 images and 'val' 200, none of which is in 'train' for any seed;
    another name is a ValueError.
    """

    def __init__(self, split: str, *, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be 'train' or 'val'")
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return len(SPLITS[self.split])

    def __getitem__(self, index: SupportsIndex) -> Example:
        """One example; IndexError outside 0 .. len - 1, so that a loop over it ends."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in 0 .. {len(self) - 1} for {self.split!r}")
        image, labels = render(self.seed, SPLITS[self.split][index])
        return Example(image, labels, np.int32(index))
