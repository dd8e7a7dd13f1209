"""A stream of images of any sizes through a network, with every pass full.

* `Slider`: windows of all scales of several images share a pass; the images are on the canvas until their
  last window is done. `whole`: consecutive images of equal size share one.
* Every device has a lane of its own; an image stays in one lane. What a lane lacks in a pass is filled up
  and does not count.
* The network is a function; neither weights nor compilation are known here.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from pspnet_jax.arrays import AnyArray, AnyImage, Prediction
from pspnet_jax.canvas import TILE_COLUMNS, TILE_ROWS, AxisTaps, Tile, stack_taps
from pspnet_jax.protocols import Protocol, Size
from pspnet_jax.taps import Taps
from pspnet_jax.windows import (
    Part,
    View,
    Window,
    network_taps,
    plan,
    result_taps,
    view_image,
    views,
)

Color = tuple[float, float, float]
AddFunction = Callable[[jax.Array, np.ndarray, np.ndarray, np.ndarray], jax.Array]
"""(canvas [lane, ...], windows [lane * batch, height, width, 3], places [lane * batch, 4], how many
count in each lane [lane]) -> canvas with the scores of the windows added."""
TileFunction = Callable[[jax.Array, AxisTaps, AxisTaps], Tile]
"""(canvas [lane, ...], rows and columns with a leading lane axis) -> tiles with a leading lane axis."""
ScoreFunction = Callable[[np.ndarray], jax.Array]
"""Images [lane * batch, height, width, 3] -> scores [lane * batch, ...] at the network's resolution."""
StackFunction = Callable[[Sequence[jax.Array]], jax.Array]
"""Scores of each view -> canvas [lane, ...]: all views of a lane's first image below each other, then
those of its second, and so on."""


@dataclass(eq=False)
class _Result:
    """One image's result while its tiles come in."""

    size: Size
    num_parts: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def put(self, tile: dict[str, np.ndarray], target: "_Target", corner: tuple[int, int]) -> None:
        """Take over a tile whose first pixel is at a corner of the target."""
        top, left = (a + b for a, b in zip(target.corner, corner, strict=True))
        rows, columns = (size - first for size, first in zip(target.size, corner, strict=True))
        for name, values in tile.items():
            if name not in self.arrays:
                self.arrays[name] = np.empty((*self.size, *values.shape[2:]), values.dtype)
            cut = values[:rows, :columns]
            self.arrays[name][top : top + cut.shape[0], left : left + cut.shape[1]] = cut

    @property
    def prediction(self) -> Prediction:
        return Prediction(**self.arrays)


@dataclass(eq=False)
class _Piece:
    """A part of a result on the canvas."""

    result: _Result
    part: Part
    row: int
    waiting: int
    """Windows that have not been through the network."""


@dataclass
class _Job:
    """One window in the queue."""

    piece: _Piece
    image: AnyImage
    """The view's."""
    window: Window
    first_row: int
    """Of the view in the canvas."""


@dataclass
class _Lane:
    """What one device is to do. Pieces leave in the order in which they came."""

    num_rows: int
    pieces: deque[_Piece] = field(default_factory=deque)
    jobs: dict[Size, deque[_Job]] = field(default_factory=dict)

    def room(self, height: int) -> int | None:
        """First of `height` free rows of the canvas, which is filled around and around."""
        if not self.pieces:
            return 0 if height <= self.num_rows else None
        first, last = self.pieces[0], self.pieces[-1]
        end = last.row + last.part.height
        if last.row < first.row:
            return end if end + height <= first.row else None
        if end + height <= self.num_rows:
            return end
        return 0 if height <= first.row else None

    def waiting(self, shape: Size) -> int:
        return len(self.jobs.get(shape, ()))

    @property
    def is_ready(self) -> bool:
        """Whether the oldest piece has all its scores."""
        return bool(self.pieces) and not self.pieces[0].waiting


class Slider:
    """Images through windows of a fixed number per pass.

    Args:
        protocol: one that slides.
        rule: how results are resized, a key of `taps.RULES`.
        fill: the mean color, for padding.
        batch_size: windows of a lane that go through together.
        canvas: [lane, rows, columns, classes].
        add: the network and the canvas.
        tile: the canvas and the result.
    """

    def __init__(
        self,
        protocol: Protocol,
        *,
        rule: str,
        fill: Color,
        batch_size: int,
        canvas: jax.Array,
        add: AddFunction,
        tile: TileFunction,
    ):
        self.protocol, self.rule, self.fill, self.batch_size = protocol, rule, fill, batch_size
        self.canvas, self.add, self.tile = canvas, add, tile
        self.lanes = [_Lane(canvas.shape[1]) for _ in range(canvas.shape[0])]

    def run(self, images: Iterable[AnyImage]) -> Iterator[Prediction]:
        """Predictions in the order of the images; some images are read ahead."""
        results: deque[_Result] = deque()
        for image in images:
            size = (image.shape[0], image.shape[1])
            parts = plan(
                size, self.protocol, self.rule, canvas=(self.canvas.shape[1], self.canvas.shape[2])
            )
            results.append(_Result(size, len(parts)))
            found = [view_part.view for view_part in parts[0].views]
            scaled = {view: view_image(image, view, self.protocol, self.fill) for view in found}
            for part in parts:
                self._place(scaled, part, results[-1])
                self._run_full_passes()
            yield from _finished(results)
        while any(lane.pieces for lane in self.lanes):
            self._advance()
            yield from _finished(results)

    def _place(self, scaled: Mapping[View, AnyImage], part: Part, result: _Result) -> None:
        """Put a part into the lane with the least to do, once there is room."""
        while True:
            rooms = [(lane, lane.room(part.height)) for lane in self.lanes]
            free = [(lane, row) for lane, row in rooms if row is not None]
            if free:
                break
            self._advance()
        lane, row = min(free, key=lambda each: sum(map(len, each[0].jobs.values())))
        piece = _Piece(result, part, row, sum(len(view.windows) for view in part.views))
        lane.pieces.append(piece)
        for view_part in part.views:
            view = view_part.view
            jobs = lane.jobs.setdefault((view.rows.window, view.columns.window), deque())
            jobs += [_Job(piece, scaled[view], window, row) for window in view_part.windows]
            row += view_part.rows.length

    def _run_full_passes(self) -> None:
        """As many passes as can be filled in all lanes; then results that are ready in all of them."""
        shapes = {shape for lane in self.lanes for shape in lane.jobs}
        for shape in sorted(shapes):
            while all(lane.waiting(shape) >= self.batch_size for lane in self.lanes):
                self._pass(shape)
                while all(lane.is_ready for lane in self.lanes):
                    self._finish()

    def _advance(self) -> None:
        """Get on without waiting for more images."""
        if any(lane.is_ready for lane in self.lanes):
            self._finish()
            return
        oldest = [(lane.pieces[0], lane) for lane in self.lanes if lane.pieces]
        piece, lane = max(oldest, key=lambda each: each[0].waiting)
        shape = next(s for s, jobs in lane.jobs.items() if any(job.piece is piece for job in jobs))
        self._pass(shape)

    def _pass(self, shape: Size) -> None:
        """One pass of windows of one shape through the network."""
        crops, places, counts = [], [], []
        for lane in self.lanes:
            jobs = lane.jobs.get(shape, deque())
            taken = [jobs.popleft() for _ in range(min(self.batch_size, len(jobs)))]
            crops += [_crop(job, shape) for job in taken]
            places += [_place_of(job) for job in taken]
            counts.append(len(taken))
            missing = self.batch_size - len(taken)
            # What fills up is any window at all: it is computed and not added.
            crops += [crops[-1] if crops else None] * missing
            places += [(0, 0, 0, 0)] * missing
            for job in taken:
                job.piece.waiting -= 1
            if not jobs:
                lane.jobs.pop(shape, None)
        given = next(crop for crop in crops if crop is not None)
        batch = np.stack([given if crop is None else crop for crop in crops])
        self.canvas = self.add(
            self.canvas, batch, np.array(places, np.int32), np.array(counts, np.int32)
        )

    def _finish(self) -> None:
        """Make the results of the oldest pieces of all lanes that have their scores."""
        targets: list[_Target | None] = []
        for lane in self.lanes:
            if not lane.is_ready:
                targets.append(None)
                continue
            piece = lane.pieces.popleft()
            targets.append(_target_of_piece(piece, self.rule))
            piece.result.num_parts -= 1
        _make_tiles(self.tile, self.canvas, targets, (TILE_ROWS, TILE_COLUMNS))


@dataclass(frozen=True)
class NetworkRule:
    """How a network maps sizes."""

    padded: Callable[[int], int]
    """A side of its input -> the side that it pads it to, at the end."""
    resize: str
    """A key of `taps.RULES`, by which its scores are brought to image size."""


def whole(
    images: Iterable[AnyImage],
    protocol: Protocol,
    *,
    network: NetworkRule,
    num_lanes: int,
    batch_size: int,
    score: ScoreFunction,
    stack: StackFunction,
    tile: TileFunction,
) -> Iterator[Prediction]:
    """Predictions under a protocol without windows, in the order of the images.

    Args:
        num_lanes: devices.
        batch_size: images of equal size that go through together in a lane.
        score: the network.
        stack: its scores as a canvas.
        tile: the canvas and the result.
    """

    def run(waiting: list[AnyImage]) -> Iterator[Prediction]:
        size = (waiting[0].shape[0], waiting[0].shape[1])
        found = views(size, protocol)
        missing = num_lanes * batch_size - len(waiting)
        scores = []
        for view in found:
            scaled = [view_image(image, view, protocol, (0.0, 0.0, 0.0)) for image in waiting]
            scores.append(score(np.stack(scaled + scaled[-1:] * missing)))
        canvas = stack(scores)
        results = [_Result(size, 0) for _ in waiting]
        rows, columns = (
            _whole_taps(scores, found, size, protocol, network, axis) for axis in (0, 1)
        )
        heights = [each.shape[1] for each in scores]
        for slot in range(batch_size):
            firsts = np.cumsum([slot * sum(heights), *heights[:-1]]).tolist()
            offsets = [(first, 0) for first in firsts]
            targets = [
                _Target(results[i], (0, 0), rows, columns, offsets) if i < len(results) else None
                for i in range(slot, num_lanes * batch_size, batch_size)
            ]
            _make_tiles(tile, canvas, targets, _tile_shape(size))
        yield from (result.prediction for result in results)

    waiting: list[AnyImage] = []
    for image in images:
        if waiting and (image.shape != waiting[0].shape or len(waiting) == num_lanes * batch_size):
            yield from run(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield from run(waiting)


@dataclass(frozen=True)
class _Target:
    """A rectangle of a result that is to be made, and of what."""

    result: _Result
    corner: tuple[int, int]
    """First row and column in the result."""
    rows: list[Taps]
    """Of each field, for its rows and columns."""
    columns: list[Taps]
    offsets: list[tuple[int, int]]
    """Of each field: where the canvas has its sample 0."""

    @property
    def size(self) -> Size:
        return len(self.rows[0].indices), len(self.columns[0].indices)


def _target_of_piece(piece: _Piece, rule: str) -> _Target:
    (top, bottom), (left, right), parts = piece.part
    height, width = piece.result.size
    firsts = np.cumsum([piece.row, *(part.rows.length for part in parts[:-1])]).tolist()
    return _Target(
        piece.result,
        (top, left),
        rows=[result_taps(part.view.rows, height, rule).rows(top, bottom) for part in parts],
        columns=[
            result_taps(part.view.columns, width, rule, mirrored=part.view.mirrored).rows(
                left, right
            )
            for part in parts
        ],
        # Indices count from the first sample of the view, the canvas has it from its first window on.
        offsets=[
            (first - part.rows.starts[0], -part.columns.starts[0])
            for first, part in zip(firsts, parts, strict=True)
        ],
    )


def _whole_taps(
    scores: Sequence[jax.Array],
    found: Sequence[View],
    size: Size,
    protocol: Protocol,
    network: NetworkRule,
    axis: int,
) -> list[Taps]:
    return [
        network_taps(
            each.shape[1 + axis],
            network.padded(view.size[axis]),
            view.size[axis],
            size[axis],
            network.resize,
            one_step=protocol.rules.one_step,
            mirrored=view.mirrored and axis == 1,
        )
        for each, view in zip(scores, found, strict=True)
    ]


def _make_tiles(
    tile: TileFunction, canvas: jax.Array, targets: Sequence[_Target | None], shape: Size
) -> None:
    """Make the targets of all lanes, tile by tile; what a lane without one makes is thrown away."""
    given = next((target for target in targets if target is not None), None)
    if given is None:
        return
    made = [target or given for target in targets]
    todo = [_tiles(target.size, shape) for target in made]
    pending: list[tuple[Tile, list[tuple[int, int]]]] = []
    for k in range(max(map(len, todo))):
        # A lane that is done makes its last tile again.
        corners = [tiles[min(k, len(tiles) - 1)] for tiles in todo]
        rows, columns = (
            _stack_lanes(
                [_tile_taps(*each, axis, shape) for each in zip(made, corners, strict=True)]
            )
            for axis in (0, 1)
        )
        pending.append((tile(canvas, rows, columns), corners))
        if len(pending) > 1:  # the next tile is made while this one is fetched
            _fetch(*pending.pop(0), targets)
    _fetch(*pending.pop(), targets)


def _tiles(size: Size, shape: Size) -> list[tuple[int, int]]:
    """First row and column of each tile."""
    return [
        (top, left) for top in range(0, size[0], shape[0]) for left in range(0, size[1], shape[1])
    ]


def _tile_taps(target: _Target, corner: tuple[int, int], axis: int, shape: Size) -> AxisTaps:
    first, end = corner[axis], corner[axis] + shape[axis]
    taps = [each.rows(first, end) for each in (target.rows, target.columns)[axis]]
    return stack_taps(taps, [offset[axis] for offset in target.offsets], pixels=shape[axis])


def _fetch(tile: Tile, corners: list[tuple[int, int]], targets: Sequence[_Target | None]) -> None:
    arrays = {
        name: np.asarray(values) for name, values in tile._asdict().items() if values is not None
    }
    for lane, (target, corner) in enumerate(zip(targets, corners, strict=True)):
        if target is not None:
            target.result.put(
                {name: values[lane] for name, values in arrays.items()}, target, corner
            )


def _stack_lanes(taps: list[AxisTaps]) -> AxisTaps:
    """With a leading lane axis, all with as many taps as the one with most."""
    most = max(each.indices.shape[1] for each in taps)

    def padded(array: AnyArray) -> np.ndarray:
        return np.pad(np.asarray(array), ((0, 0), (0, most - array.shape[1]), (0, 0)))

    return AxisTaps(*(np.stack([padded(each[i]) for each in taps]) for i in (0, 1)))


def _tile_shape(size: Size) -> tuple[int, int]:
    """For one image size: as many pixels as in other tiles, no wider than necessary."""
    columns = min(TILE_COLUMNS, -(size[1] // -128) * 128)
    rows = min(TILE_ROWS * TILE_COLUMNS // columns, -(size[0] // -TILE_ROWS) * TILE_ROWS)
    return rows, columns


def _crop(job: _Job, shape: Size) -> np.ndarray:
    top, left = job.window.top, job.window.left
    return job.image[top : top + shape[0], left : left + shape[1]]


def _place_of(job: _Job) -> tuple[int, int, int, int]:
    window = job.window
    return (job.first_row + window.row, window.column, window.rows_seen, window.columns_seen)


def _finished(results: deque[_Result]) -> Iterator[Prediction]:
    while results and not results[0].num_parts:
        yield results.popleft().prediction
