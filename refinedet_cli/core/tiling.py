"""Large pictures in tiles: the windows that cover a picture, and what was found in them made one result.

Every window is looked at as if it were a picture of its own, so a tile shows objects as much larger as the picture is
larger than the tile. What makes this hard is to count each object once: tiles overlap, so an object is seen twice, and
borders cut, so a part of it is seen besides.

How `merge` tells one object from two. Overlap of the boxes does not do it: a cut part overlaps the whole by little, and
the part of a box that lies inside another one (intersection over the smaller area) makes a child in front of its mother
a part of her. So a box is called *cut* where it ends at a border of its tile behind which the picture goes on, and then

1. a cut box goes if a neighbouring tile has all of it well inside: that tile sees the same and what is behind the
   border, and is believed. Neighbours overlap, so this is every cut box that is smaller than the overlap;
2. a cut box that is left goes if a box of another look, *seen through the window of the cut one*, is the same box: it
   is the object that the border cut. The one that stays takes the better of the two scores;
3. boxes that are not cut are one object if they overlap as much as two boxes of one look must not: here the better one
   stays.

Boxes of the same look are never compared, for that look had its own NMS. A detector that finds all it is shown, whole
or cut, then reports every object that is smaller than the overlap exactly once and with its own box. What is larger
than the overlap may be cut in all tiles, and is what the look at the whole picture is for, which cuts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.boxes import pair_iou
from refinedet_cli.core.preprocess import Window
from refinedet_cli.core.structures import Detections
from refinedet_cli.errors import ConfigError

SMALLEST_TILE = 32
MOST_OVERLAP = 0.5

# A detector is a few pixels off: a box that ends this near to a border, as a share of the tile, counts as cut.
_NEAR = 0.02

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How pictures are cut into tiles.

    Attributes:
        size: side of a tile, px-img. A picture that is not larger is looked at once, as a whole.
        overlap: of neighbouring tiles, as a share of the tile; those at the right and lower edge overlap more. Objects
            should be smaller than that.
        whole: look at the whole picture too, for what is larger.
    """

    size: int
    overlap: float = 0.2
    whole: bool = True

    def __post_init__(self) -> None:
        if self.size < SMALLEST_TILE:
            raise ConfigError(f"a tile must have a side of {SMALLEST_TILE} px or more, not {self.size}")
        if not 0 <= self.overlap <= MOST_OVERLAP:
            raise ConfigError(f"the overlap of tiles must be in [0, {MOST_OVERLAP:g}], not {self.overlap:g}")

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles have in common, px-img."""
        return round(self.overlap * self.size)

    def windows(self, height: int, width: int) -> list[Window]:
        """Cover a picture.

        Args:
            height: of the picture, px-img.
            width: of the picture, px-img.

        Returns:
            windows inside the picture, row by row, all of one size: a tile, or the picture's where a side of it is
            shorter. Together they hold every pixel; of any two neighbours at least ``shared`` pixels are common.

        Raises:
            ValueError: a side is not positive.
        """
        if height < 1 or width < 1:
            raise ValueError(f"expected a picture with pixels, got {height} x {width}")
        tall, wide = min(self.size, height), min(self.size, width)
        return [
            Window(left, top, left + wide, top + tall) for top in self._starts(height) for left in self._starts(width)
        ]

    def looks(self, height: int, width: int) -> list[Window]:
        """List all windows that are looked at: the tiles, after them the whole picture if it is wanted and no tile."""
        tiles = self.windows(height, width)
        return [*tiles, Window(0, 0, width, height)] if self.whole and len(tiles) > 1 else tiles

    def count(self, height: int, width: int) -> int:
        """Count the looks at a picture without listing them."""
        tiles = len(self._starts(height)) * len(self._starts(width))
        return tiles + 1 if self.whole and tiles > 1 else tiles

    def _starts(self, length: int) -> list[int]:
        """Where tiles begin along a side of this length; the last one ends where the side does."""
        last = max(0, length - self.size)
        return [*range(0, last, self.size - self.shared), last]


def moved(found: Detections, window: Window, scale: float = 1.0) -> Detections:
    """Turn detections of a window into those of the picture.

    Args:
        found: boxes in pixels of the window, or of a reduced copy of it.
        window: where it lies, px-img.
        scale: how much larger the window is than its copy.

    Returns:
        the detections in order; scores and labels are as they were.
    """
    corner = torch.tensor([window.left, window.top, window.left, window.top], dtype=found.boxes.dtype)
    return Detections(found.boxes * scale + corner, found.scores, found.labels)


def merge(found: Sequence[Detections], windows: Sequence[Window], size: tuple[int, int], iou: float) -> Detections:
    """Make one result of what was found in several windows of a picture, each object counted once.

    Args:
        found: of each window, px-img of the picture, inside the window.
        windows: where was looked, the whole picture perhaps among them.
        size: height and width of the picture, px-img.
        iou: overlap above which two boxes are one object; that of the detector's own NMS.

    Returns:
        the boxes that stay, best first, each as one of the windows gave it. Nothing changes if there is one window. The
        module's text says which stay and why.
    """
    if len(windows) == 1:
        return found[0]
    rows = _rows(found, windows, size)
    stays = np.flatnonzero(~(rows.cut & _better_seen(rows, windows, size)))
    rows = rows.chosen(stays)
    # What is not cut comes first; of what is cut, the larger part.
    area = (rows.boxes[:, 2:] - rows.boxes[:, :2]).prod(axis=1)
    rank = np.lexsort((rows.look, np.where(rows.cut, -area, -rows.scores), rows.cut))
    rows = rows.chosen(rank)
    kept, scores = _settle(rows.scores, _same(rows, windows, iou))
    best = kept[np.argsort(-scores[kept], kind="stable")]
    return Detections(
        boxes=torch.from_numpy(rows.boxes[best]).float(),
        scores=torch.from_numpy(scores[best]).float(),
        labels=torch.from_numpy(rows.labels[best]),
    )


class _Rows(NamedTuple):
    """Detections of all looks as columns: boxes float64[N, 4], scores, labels, index of the look, and whether cut."""

    boxes: Floats
    scores: Floats
    labels: Ints
    look: Ints
    cut: NDArray[np.bool_]

    def chosen(self, places: Ints) -> _Rows:
        """These rows in this order."""
        return _Rows(self.boxes[places], self.scores[places], self.labels[places], self.look[places], self.cut[places])


def _rows(found: Sequence[Detections], windows: Sequence[Window], size: tuple[int, int]) -> _Rows:
    boxes = np.concatenate([d.boxes.double().numpy() for d in found])
    look = np.repeat(np.arange(len(found)), [len(d) for d in found])
    inner = _inner(windows, size)[look]
    beyond = np.concatenate([boxes[:, :2] < inner[:, :2], boxes[:, 2:] > inner[:, 2:]], axis=1)
    return _Rows(
        boxes=boxes,
        scores=np.concatenate([d.scores.double().numpy() for d in found]),
        labels=np.concatenate([d.labels.numpy() for d in found]),
        look=look,
        cut=np.asarray(beyond.any(axis=1)),
    )


def _inner(windows: Sequence[Window], size: tuple[int, int]) -> Floats:
    """The part of each window that is not near to a border behind which the picture goes on: float64[W, 4], xyxy."""
    height, width = size
    inner = np.array(windows, dtype=np.float64).reshape(-1, 4)
    near = np.maximum(1.0, _NEAR * (inner[:, 2:] - inner[:, :2]))
    ends = np.array([width, height])
    inner[:, :2] = np.where(inner[:, :2] > 0, inner[:, :2] + near, -np.inf)
    inner[:, 2:] = np.where(inner[:, 2:] < ends, inner[:, 2:] - near, np.inf)
    return inner


def _better_seen(rows: _Rows, windows: Sequence[Window], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether some tile has a box well inside: bool[N]. The whole picture is no tile: it shows less, not more."""
    height, width = size
    inner = _inner(windows, size)
    tiles = [i for i, window in enumerate(windows) if window != Window(0, 0, width, height)]
    seen = np.zeros(len(rows.scores), dtype=bool)
    for boxes, chosen in _parts(rows.boxes, rows.cut):
        low = (boxes[:, None, :2] >= inner[tiles, :2]).all(axis=2)
        high = (boxes[:, None, 2:] <= inner[tiles, 2:]).all(axis=2)
        seen[chosen] = np.asarray(low & high).any(axis=1)
    return seen


def _parts(boxes: Floats, chosen: NDArray[np.bool_], together: int = 256) -> Iterator[tuple[Floats, Ints]]:
    """The chosen boxes a few at a time, with their places."""
    places = np.flatnonzero(chosen)
    for start in range(0, len(places), together):
        part = places[start : start + together]
        yield boxes[part], part


class _Pairs(NamedTuple):
    """Pairs of rows that show one object: the worse, the better, and how well they agree; sorted by the worse."""

    worse: Ints
    better: Ints
    agree: Floats


def _same(rows: _Rows, windows: Sequence[Window], iou: float) -> _Pairs:
    """Find the pairs of different looks that show one object; rows are best first."""
    places = [np.flatnonzero(rows.look == look) for look in range(len(windows))]
    corners = np.array(windows, dtype=np.float64)
    worse, better, agree = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for look, own in enumerate(places):
        meets = (corners[:, :2] < corners[look, 2:]).all(axis=1) & (corners[:, 2:] > corners[look, :2]).all(axis=1)
        for other in np.flatnonzero(meets):
            # Only where windows overlap can their boxes meet.
            ours = own[_meeting(rows.boxes[own], corners[other])]
            theirs = places[other][_meeting(rows.boxes[places[other]], corners[look])]
            if other == look or not len(ours) or not len(theirs):
                continue
            overlap = _seen_overlap(rows.boxes[ours], rows.cut[ours], rows.boxes[theirs], corners[look])
            one = (overlap > iou) & (rows.labels[ours][:, None] == rows.labels[theirs]) & (ours[:, None] > theirs)
            first, second = np.nonzero(one)
            worse.append(ours[first])
            better.append(theirs[second])
            agree.append(overlap[first, second])
    joined = np.concatenate(worse)
    order = np.argsort(joined, kind="stable")
    return _Pairs(joined[order], np.concatenate(better)[order], np.concatenate(agree)[order])


def _meeting(boxes: Floats, window: Floats) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, :2] < window[2:]).all(axis=1) & (boxes[:, 2:] > window[:2]).all(axis=1))


def _seen_overlap(boxes: Floats, cut: NDArray[np.bool_], others: Floats, window: Floats) -> Floats:
    """IoU of boxes of a window with others, which are seen through the window where the box is cut: float64[N, M]."""
    through = np.concatenate([np.maximum(others[:, :2], window[:2]), np.minimum(others[:, 2:], window[2:])], axis=1)
    seen = np.where(cut[:, None, None], through, others)  # [N, M, 4]
    return pair_iou(torch.from_numpy(boxes)[:, None], torch.from_numpy(seen)).numpy()


class _Settled(NamedTuple):
    """The rows that stay, in their order, and the scores of all rows."""

    kept: Ints
    scores: Floats


def _settle(scores: Floats, pairs: _Pairs) -> _Settled:
    """Drop, best first, each row that shows the object of one that stays, which takes the better of both scores."""
    raised = scores.copy()
    stays = np.ones(len(scores), dtype=bool)
    ends = np.flatnonzero(np.diff(pairs.worse, append=-1)) + 1
    start = 0
    for end in ends.tolist():
        row = pairs.worse[start]
        alive = stays[pairs.better[start:end]]
        if alive.any():
            stays[row] = False
            agree = np.where(alive, pairs.agree[start:end], -1.0)
            winner = pairs.better[start + int(agree.argmax())]
            raised[winner] = max(raised[winner], scores[row])
        start = end
    return _Settled(np.flatnonzero(stays), raised)
