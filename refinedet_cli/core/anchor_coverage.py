"""Which anchors of a grid each object of a data set gets, by the rule of training and without a network.

The rule is that of `matching.match`: objects compete for anchors within their picture. A data set has far more pairs of
object and anchor than can be compared, so `anchor_pairs` finds those that can matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.anchor_pairs import (
    Floats,
    Grid,
    Ints,
    Objects,
    Pairs,
    exact_boxes,
    expand,
    find_pairs,
    list_slots,
    make_grid,
    nearest_overlap,
    overlaps,
    round_boxes,
)
from refinedet_cli.core.anchors import level_sizes
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.core.matching import NO_OVERLAP

Bools = NDArray[np.bool_]

# Objects of one block, entries of its picture x anchor tables, and pairs that are compared at once: bounds of memory.
_BLOCK_OBJECTS = 20_000
_BLOCK_TABLE = 16_000_000
_BLOCK_PAIRS = 4_000_000
# An object that lost its best anchors looks for others down to this fraction of the overlap it looked at so far.
_WIDEN = 0.5
# Coordinates beyond this are a mistake, px-in.
_FARTHEST = 1e9
_NOBODY = np.iinfo(np.int32).max


class ObjectSet(NamedTuple):
    """Objects of many pictures, packed, at the scale of the network input.

    Attributes:
        boxes: float64[N, 4], xyxy, px-in: the picture's coordinates times input side / picture side, for each axis by
            itself, as preprocessing resizes. They may reach out of the picture and be without area; such objects
            overlap less, or nothing.
        labels: int64[N], in 1..C-1.
        picture: int64[N], in 0..pictures-1, ascending.
        pictures: their number, those without objects included.
    """

    boxes: Floats
    labels: Ints
    picture: Ints
    pictures: int


@dataclass(frozen=True, eq=False)
class Coverage:
    """What the anchors of one grid do for each object.

    Attributes:
        best_iou: float64[N], highest overlap with any anchor, as float32 training sees it; 0 where it counts as none.
        best_level, best_shape: int64[N], level and place in the cell of the earliest such anchor; -1 for overlap 0.
        positives: int64[N], anchors that the object gets, its competitors in the picture considered.
        forced: bool[N], the only anchor that it gets is its own of the first pass, below the threshold.
        unmatched: bool[N], it gets none.
        anchor_use: per level and shape, the positives that it gives to all objects; 0 marks a shape never used.
        anchors_per_level: int64[L], anchors of one picture.
        positive_iou: the threshold.
    """

    best_iou: Floats
    best_level: Ints
    best_shape: Ints
    positives: Ints
    forced: Bools
    unmatched: Bools
    anchor_use: tuple[tuple[int, ...], ...]
    anchors_per_level: Ints
    positive_iou: float

    @cached_property
    def positives_per_level(self) -> Ints:
        """int64[L]; sums to the positives of all objects."""
        return np.array([sum(level) for level in self.anchor_use], dtype=np.int64)

    def share(self, iou: float) -> float:
        """The share of objects with an overlap of at least ``iou`` with some anchor; NaN without objects."""
        return float(np.mean(self.best_iou >= iou)) if len(self.best_iou) else float("nan")


class _Block(NamedTuple):
    """Some whole pictures of a data set.

    Attributes:
        objects: N of them.
        picture: int64[N], ascending, counting the pictures that have objects.
        grid: the anchors of each picture.
        positive_iou: the threshold, as float32 has it.
    """

    objects: Objects
    picture: Ints
    grid: Grid
    positive_iou: float

    def key(self, row: Ints, anchor: Ints) -> Ints:
        """The place of an anchor of the row's picture in `_Tables`."""
        return self.picture[row] * self.grid.anchors + anchor


class _Tables(NamedTuple):
    """One entry for each anchor of each picture of a block; made once, and left by each block as it was found.

    Attributes:
        best: highest overlap with any object that reaches the threshold; 0.
        owner: the object that has the anchor; `_NOBODY`.
        taken: it is some object's own; False.
    """

    best: NDArray[np.float32]
    owner: NDArray[np.int32]
    taken: Bools


class _Found(NamedTuple):
    """Columns of `Coverage` for one block, and the anchor of each object's best overlap (-1 for none)."""

    best_iou: NDArray[np.float32]
    best_anchor: Ints
    positives: Ints
    forced: Bools


def check_objects(objects: ObjectSet) -> None:
    """Refuse arrays that do not belong together.

    Raises:
        ValueError: shapes differ, a coordinate is not finite, a box has its corners swapped, labels are below 1, or
            the pictures do not ascend within 0..pictures-1; the message gives the first offending row.
    """
    boxes, labels, picture, pictures = objects
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != (len(boxes),) or picture.shape != (len(boxes),):
        raise ValueError(
            f"expected boxes [N, 4], labels [N] and picture [N], got {list(boxes.shape)}, {list(labels.shape)} and "
            f"{list(picture.shape)}"
        )
    # False for NaN too; float32 has no room for the square of much larger coordinates.
    broken = ~(np.abs(boxes) < _FARTHEST).all(axis=1) | (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if broken.any():
        row = int(broken.argmax())
        raise ValueError(f"box {row} is {boxes[row].tolist()}: expected finite left <= right and top <= bottom")
    if (labels < 1).any():
        row = int((labels < 1).argmax())
        raise ValueError(f"object {row} has label {int(labels[row])}: labels start at 1")
    if len(picture) and (picture[0] < 0 or picture[-1] >= pictures or (np.diff(picture) < 0).any()):
        raise ValueError(f"the picture of each object must ascend within 0..{pictures - 1}")


def best_ious(boxes: Floats, anchors: AnchorConfig, input_size: tuple[int, int]) -> Floats:
    """Compute the highest overlap of each box with any anchor, in closed form.

    Args:
        boxes: float64[N, 4], xyxy, px-in.
        anchors: strides and shapes.
        input_size: (height, width), px-in.

    Returns:
        float64[N], in [0, 1]; equals ``coverage(...).best_iou`` up to the rounding of float32.

    Raises:
        ValueError: the input does not fit the strides.
    """
    best = np.zeros(len(boxes))
    slots = list_slots(anchors, input_size)
    # Blocks that stay in the cache are several times faster than one sweep over a million boxes.
    for start in range(0, len(boxes), _BLOCK_OBJECTS):
        block = slice(start, start + _BLOCK_OBJECTS)
        best[block] = nearest_overlap(exact_boxes(boxes[block]), slots)
    return best


def coverage(
    objects: ObjectSet, anchors: AnchorConfig, input_size: tuple[int, int], *, positive_iou: float = 0.5
) -> Coverage:
    """Apply the matching rule of training to whole data sets.

    Args:
        objects: N may be 0.
        anchors: strides and shapes.
        input_size: (height, width), px-in.
        positive_iou: second-pass threshold, inclusive, in (0, 1].

    Returns:
        `Coverage`. For each picture, the anchors counted for its objects are those of ``matching.match`` on the
        overlaps of `boxes.pair_iou`, for boxes divided by the input's sides in float64 and then rounded to float32.

    Raises:
        ValueError: see `check_objects`; or the input does not fit the strides, or the threshold is out of range.

    Source: as `matching.match`.
    """
    if not 0 < positive_iou <= 1:
        raise ValueError(f"positive_iou must be in (0, 1], got {positive_iou}")
    check_objects(objects)
    grid = make_grid(anchors, input_size)
    count = len(objects.boxes)
    best_iou, best_anchor = np.zeros(count), np.full(count, -1, dtype=np.int64)
    positives, forced = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.bool_)
    use = np.zeros(grid.anchors, dtype=np.int64)
    threshold = float(np.float32(positive_iou))
    slices = list(_blocks(objects.picture, grid.anchors))
    entries = max((len(np.unique(objects.picture[s])) for s in slices), default=0) * grid.anchors
    tables = _Tables(np.zeros(entries, np.float32), np.full(entries, _NOBODY, np.int32), np.zeros(entries, np.bool_))
    for rows in slices:
        changes = np.diff(objects.picture[rows], prepend=objects.picture[rows.start]) > 0
        picture = np.cumsum(changes, dtype=np.int64)
        block = _Block(round_boxes(objects.boxes[rows], input_size), picture, grid, threshold)
        found = _match(block, tables, use)
        best_iou[rows], best_anchor[rows], positives[rows], forced[rows] = found
    level, shape = _places(anchors, input_size)
    return Coverage(
        best_iou=best_iou,
        best_level=np.where(best_anchor >= 0, level[best_anchor], -1),
        best_shape=np.where(best_anchor >= 0, shape[best_anchor], -1),
        positives=positives,
        forced=forced,
        unmatched=positives == 0,
        anchor_use=tuple(
            tuple(int(use[(level == i) & (shape == k)].sum()) for k in range(len(shapes)))
            for i, shapes in enumerate(anchors.shapes)
        ),
        anchors_per_level=np.bincount(level, minlength=len(anchors.strides)),
        positive_iou=positive_iou,
    )


def _match(block: _Block, tables: _Tables, use: Ints) -> _Found:
    """Match all pictures of a block, adding to ``use``, int64[A], the objects that have each anchor."""
    objects, grid = block.objects, block.grid
    count = len(block.picture)
    rows = np.arange(count)
    # What reaches this includes the best.
    least = np.minimum(nearest_overlap(objects, grid.slots, grid.slack), block.positive_iou)
    pairs = find_pairs(objects, rows, least, grid)
    best_iou = np.zeros(count, np.float32)
    np.maximum.at(best_iou, pairs.row, pairs.iou)
    is_best = pairs.iou == best_iou[pairs.row]
    best_anchor = np.full(count, grid.anchors)
    np.minimum.at(best_anchor, pairs.row[is_best], pairs.anchor[is_best])
    best_anchor[best_anchor == grid.anchors] = -1

    own = _own_anchors(block, _Choices(block, pairs, least, tables.taken), best_anchor)
    own_key = block.key(own.row, own.anchor)
    positive = pairs.iou >= block.positive_iou
    row, iou = pairs.row[positive], pairs.iou[positive]
    key = block.key(row, pairs.anchor[positive])
    # The second pass first: the earliest of the objects that reach the best overlap of the anchor.
    np.maximum.at(tables.best, key, iou)
    wins = iou == tables.best[key]
    np.minimum.at(tables.owner, key[wins], row[wins].astype(np.int32))
    tables.owner[own_key] = own.row
    touched = np.unique(np.concatenate([key, own_key]))
    positives = np.bincount(tables.owner[touched], minlength=count)
    use += np.bincount(touched % grid.anchors, minlength=grid.anchors)
    tables.best[touched], tables.owner[touched], tables.taken[own_key] = 0, _NOBODY, False

    forced = np.zeros(count, dtype=np.bool_)
    # Whatever else overlaps it more is another's own, so this is all it gets.
    forced[own.row] = own.iou < block.positive_iou
    return _Found(best_iou, best_anchor, positives, forced)


def _own_anchors(block: _Block, choices: _Choices, best_anchor: Ints) -> Pairs:
    """Run the greedy one-to-one pass of `matching.match`.

    Like there, each round takes the pairs that are the best of both their object and their anchor. The first round
    settles most objects; only those left over ask for alternatives.

    Args:
        block: the objects.
        choices: knows which anchors are taken, and alternatives.
        best_anchor: int64[N], of each object, or -1.

    Returns:
        `Pairs`, one for each object that gets an anchor of its own.
    """
    rows = np.flatnonzero(best_anchor >= 0)
    proposed = best_anchor[rows]
    rounds = [Pairs(rows[:0], rows[:0], np.empty(0, np.float32))]
    while len(rows):
        wins = _first_of_best(block, rows, proposed)
        row, anchor = rows[wins], proposed[wins]
        won = Pairs(row, anchor, overlaps(block.objects, row, anchor, block.grid))
        rounds.append(won)
        choices.take(won)
        rows, proposed = choices.best_free(rows[~wins])
    return Pairs(*(np.concatenate(column) for column in zip(*rounds, strict=True)))


def _first_of_best(block: _Block, rows: Ints, proposed: Ints) -> Bools:
    """Tell whether none of these objects overlaps the anchor that one proposes more, or as much and comes earlier.

    Args:
        block: the objects; only those of one picture are rivals.
        rows: int64[n], ascending.
        proposed: int64[n], an anchor for each.
    """
    _, proposer, anchor_of = np.unique(block.key(rows, proposed), return_index=True, return_inverse=True)
    picture = block.picture[rows]
    start = np.searchsorted(picture, picture[proposer], side="left")
    counts = np.searchsorted(picture, picture[proposer], side="right") - start
    rivals = np.cumsum(counts)
    winner = np.full(len(proposer), len(rows))
    at = 0
    while at < len(proposer):
        done = rivals[at - 1] if at else 0
        stop = max(at + 1, int(np.searchsorted(rivals, done + _BLOCK_PAIRS, side="right")))
        which, place = expand(counts[at:stop])
        rival = start[at:stop][which] + place
        iou = overlaps(block.objects, rows[rival], proposed[proposer[at:stop]][which], block.grid)
        highest = np.maximum.reduceat(iou, rivals[at:stop] - counts[at:stop] - done)
        best = iou == highest[which]
        np.minimum.at(winner, at + which[best], rival[best])
        at = stop
    wins: Bools = winner[anchor_of] == np.arange(len(rows))
    return wins


class _Choices:
    """For the objects that the first round left over, their anchors from the best down, as far as needed so far."""

    def __init__(self, block: _Block, pairs: Pairs, least: Floats, taken: Bools) -> None:
        """Start from ``pairs``, complete down to ``least`` for each object; ``taken`` is as in `_Tables`."""
        self.block, self.pairs, self.taken = block, pairs, taken
        self.least = least.copy()
        self.anchor = np.empty(0, dtype=np.int64)
        # The part of ``anchor`` that an object has not tried; -1 while it has no list.
        self.at, self.end = np.full((2, len(least)), -1)

    def take(self, won: Pairs) -> None:
        """Let nobody else have these anchors."""
        self.taken[self.block.key(won.row, won.anchor)] = True

    def best_free(self, rows: Ints) -> tuple[Ints, Ints]:
        """Find the best anchor that is not taken, for each object that still overlaps one.

        Args:
            rows: int64[n], ascending.

        Returns:
            int64[m], those objects, ascending; int64[m], the anchor of each.
        """
        self._list(self.pairs, rows[self.at[rows] < 0])
        pending, alive = rows, np.ones(len(self.least), dtype=np.bool_)
        while len(pending):
            ended = self.at[pending] >= self.end[pending]
            # Nonzero overlaps are never below half the limit, so a list that goes so far down is complete.
            complete = ended & (self.least[pending] <= NO_OVERLAP / 2)
            alive[pending[complete]] = False
            self._widen(pending[ended & ~complete])
            held = ended & ~complete
            reading = pending[~ended]
            held[~ended] = self.taken[self.block.key(reading, self.anchor[self.at[reading]])]
            self.at[pending[held & ~ended]] += 1
            pending = pending[held]
        rows = rows[alive[rows]]
        return rows, self.anchor[self.at[rows]]

    def _widen(self, rows: Ints) -> None:
        if len(rows):
            self.least[rows] *= _WIDEN
            self._list(find_pairs(self.block.objects, rows, self.least[rows], self.block.grid), rows)

    def _list(self, pairs: Pairs, rows: Ints) -> None:
        """Make ``pairs`` the lists of some objects."""
        wanted = np.zeros(len(self.least), dtype=np.bool_)
        wanted[rows] = True
        kept = np.flatnonzero(wanted[pairs.row])
        order = kept[np.lexsort((pairs.anchor[kept], -pairs.iou[kept], pairs.row[kept]))]
        counts = np.bincount(pairs.row[kept], minlength=len(wanted))[rows]
        self.end[rows] = len(self.anchor) + np.cumsum(counts)
        self.at[rows] = self.end[rows] - counts
        self.anchor = np.concatenate([self.anchor, pairs.anchor[order]])


def _blocks(picture: Ints, anchors: int) -> Iterator[slice]:
    """Cut the objects into whole pictures, as many as memory should hold; at least one."""
    starts = np.flatnonzero(np.diff(picture, prepend=-1))
    most = max(1, _BLOCK_TABLE // anchors)
    ends = np.append(starts[1:], len(picture))
    at = 0
    while at < len(starts):
        fits = int(np.searchsorted(ends, starts[at] + _BLOCK_OBJECTS, side="right"))
        stop = max(at + 1, min(fits, at + most))
        yield slice(int(starts[at]), int(ends[stop - 1]))
        at = stop


def _places(anchors: AnchorConfig, input_size: tuple[int, int]) -> tuple[Ints, Ints]:
    """Level and place in the cell of each anchor."""
    cells = [rows * columns for rows, columns in level_sizes(anchors, *input_size)]
    levels = [np.full(n * len(s), i) for i, (n, s) in enumerate(zip(cells, anchors.shapes, strict=True))]
    shapes = [np.tile(np.arange(len(s)), n) for n, s in zip(cells, anchors.shapes, strict=True)]
    return np.concatenate(levels).astype(np.int64), np.concatenate(shapes).astype(np.int64)
