"""How well anchors cover the objects of a data set by the training's own rule, and where they fall short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.anchor_coverage import Coverage, ObjectSet, coverage
from refinedet_cli.core.anchors import level_sizes
from refinedet_cli.core.config import AnchorConfig, Classes, DetectorConfig
from refinedet_cli.core.words import counted, joined
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.engine.network_facts import multiply_adds, receptive_fields
from refinedet_cli.errors import DataError

IOUS = (0.3, 0.5, 0.7)
MATCHED = 0.5
# Below this overlap an object is as good as missed: its one forced anchor shares little with it.
MISSED = 0.3

# COCO's limits, square px-img.
_SMALL, _LARGE = 32.0**2, 96.0**2
_SIDES = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_RATIOS = ((1 / 5, "1:5"), (1 / 3, "1:3"), (2 / 3, "2:3"), (3 / 2, "3:2"), (3.0, "3:1"), (5.0, "5:1"))

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects that anchors have to cover: those that training sees.

    Attributes:
        boxes: as the network sees them, px-in.
        areas: float64[N], square px-img; COCO's small, medium and large are told by them.
        classes: the names of the labels.
        name: of the data.
        records: int64[pictures], the place of each picture in the data set.
        crowds: boxes around groups, which are left out.
    """

    boxes: ObjectSet
    areas: Floats
    classes: Classes
    name: str
    records: NDArray[np.int64]
    crowds: int

    def __len__(self) -> int:
        return len(self.boxes.labels)

    @property
    def sides(self) -> Floats:
        """Width and height, float64[N, 2], px-in."""
        sides: Floats = self.boxes.boxes[:, 2:] - self.boxes.boxes[:, :2]
        return sides


class Group(NamedTuple):
    """Some of the objects, and how well they are covered.

    Attributes:
        name: what they have in common.
        objects: how many they are; of none, the other numbers are 0.
        shares: of them that reach an IoU of 0.3, 0.5 and 0.7 with an anchor.
        forced: share that has no anchor but the one it is given whatever the overlap.
        unmatched: share without any anchor.
        positives: anchors that learn from an object, on average.
    """

    name: str
    objects: int
    shares: tuple[float, float, float]
    forced: float
    unmatched: float
    positives: float


class LevelUse(NamedTuple):
    """What the anchors of one level are used for.

    Attributes:
        stride: of the level, px-in.
        shapes: (width, height) of each anchor of a cell, px-in.
        anchors: of the whole level.
        positives: for each shape, how often an anchor of it is matched to an object of the data.
        best: objects whose best anchor is of this level.
        receptive_field: width of what the first head sees, px-in; None where it is not known.
    """

    stride: int
    shapes: tuple[tuple[float, float], ...]
    anchors: int
    positives: tuple[int, ...]
    best: int
    receptive_field: int | None

    @property
    def unused(self) -> tuple[tuple[float, float], ...]:
        """The shapes that are never matched."""
        return tuple(shape for shape, count in zip(self.shapes, self.positives, strict=True) if not count)

    @property
    def largest(self) -> float:
        """The longest side of an anchor, px-in."""
        return max(max(shape) for shape in self.shapes)


class Shortfall(NamedTuple):
    """Why objects stay below IoU 0.5; each is counted once, for the first reason that holds.

    Attributes:
        too_small: objects of less than half the area of the smallest anchor.
        too_large: objects of more than twice the area of the largest anchor.
        shape: objects that no anchor would reach even if it were centred on them: in between sizes, or elongated.
        position: objects that an anchor would reach if it were centred on them, but cells lie too far apart.
        smallest, largest: square roots of the two limiting areas, px-in.
    """

    too_small: int
    too_large: int
    shape: int
    position: int
    smallest: float
    largest: float

    @property
    def total(self) -> int:
        """Objects below IoU 0.5."""
        return self.too_small + self.too_large + self.shape + self.position


@dataclass(frozen=True, eq=False, kw_only=True)
class AnchorReport:
    """How well anchors cover objects.

    Attributes:
        anchors: what was laid over the pictures.
        input_size: (height, width), px-in.
        coverage: of each object.
        overall: all objects.
        by_level: grouped by the level of the best anchor.
        by_area: by COCO's sizes, in the picture.
        by_side: by the square root of the area, px-in.
        by_ratio: by width / height, px-in.
        by_class: in the order of the class list, classes without objects included.
        levels: what each level's anchors are used for.
        shortfall: why objects are not reached.
        multiply_adds: of the network for one picture.
    """

    anchors: AnchorConfig
    input_size: tuple[int, int]
    coverage: Coverage
    overall: Group
    by_level: tuple[Group, ...]
    by_area: tuple[Group, ...]
    by_side: tuple[Group, ...]
    by_ratio: tuple[Group, ...]
    by_class: tuple[Group, ...]
    levels: tuple[LevelUse, ...]
    shortfall: Shortfall
    multiply_adds: int

    @property
    def share(self) -> float:
        """Of objects that reach IoU 0.5."""
        return self.overall.shares[1]

    @property
    def total(self) -> int:
        """Number of anchors of a picture."""
        return sum(level.anchors for level in self.levels)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the anchors, one line each."""
        return tuple(_oddities(self))


def gather(dataset: Dataset, input_size: tuple[int, int]) -> Objects:
    """Scale the objects of a data set as the resize of training does; no picture is opened.

    Args:
        dataset: crowds are left out, as in training; difficult objects stay.
        input_size: (height, width), px-in. Pictures are stretched to it.

    Returns:
        `Objects`, pictures without any left out.

    Raises:
        DataError: there is no object.
    """
    kept = [(i, r, ~r.crowd) for i, r in enumerate(dataset.records) if len(r)]
    crowds = sum(int((~keep).sum()) for _, _, keep in kept)
    kept = [(i, r, keep) for i, r, keep in kept if keep.any()]
    if not kept:
        among = (
            f"; the {counted(crowds, 'box there is around a crowd', 'boxes there are around crowds')}" if crowds else ""
        )
        raise DataError(f"{dataset.name} has no object for anchors to cover{among}", "check the annotations")
    counts = np.array([int(keep.sum()) for _, _, keep in kept])
    height, width = input_size
    scales = np.array([[width / r.width, height / r.height] * 2 for _, r, _ in kept])
    boxes = np.concatenate([r.boxes[keep] for _, r, keep in kept]) * np.repeat(scales, counts, axis=0)
    return Objects(
        boxes=ObjectSet(
            boxes=boxes,
            labels=np.concatenate([r.labels[keep] for _, r, keep in kept]),
            picture=np.repeat(np.arange(len(kept), dtype=np.int64), counts),
            pictures=len(kept),
        ),
        areas=np.concatenate([r.areas[keep] for _, r, keep in kept]),
        classes=dataset.classes,
        name=dataset.name,
        records=np.array([i for i, _, _ in kept], dtype=np.int64),
        crowds=crowds,
    )


def report_anchors(objects: Objects, detector: DetectorConfig) -> AnchorReport:
    """Match objects and anchors as training would, and group what comes of it.

    Args:
        objects: scaled to the detector's input size.
        detector: its anchors, input size and layers.

    Returns:
        `AnchorReport`; the objects of ``by_area``, ``by_side``, ``by_ratio`` and ``by_class`` each add up to those of
        ``overall``, and those of ``by_level`` to the ones that overlap an anchor.
    """
    anchors = detector.require_anchors()
    size = (detector.preprocess.height, detector.preprocess.width)
    limit = detector.loss.arm_positive_iou if detector.network.arm else detector.loss.odm_positive_iou
    found = coverage(objects.boxes, anchors, size, positive_iou=limit)
    sides = objects.sides
    strides = [f"stride {stride}" for stride in anchors.strides]
    root, ratio = np.sqrt(sides.prod(axis=1)), sides[:, 0] / sides[:, 1]
    areas = np.digitize(objects.areas, [_SMALL, _LARGE])
    return AnchorReport(
        anchors=anchors,
        input_size=size,
        coverage=found,
        overall=_group("all objects", found, np.ones(len(objects), dtype=bool)),
        by_level=_groups(strides, found.best_level, found),
        by_area=_groups(["small, below 32x32 px", "medium", "large, from 96x96 px"], areas, found),
        by_side=_groups(_side_names(), np.digitize(root, _SIDES), found),
        by_ratio=_groups(_ratio_names(), np.digitize(ratio, [limit for limit, _ in _RATIOS]), found),
        by_class=_groups(list(objects.classes.names), objects.boxes.labels - 1, found),
        levels=_levels(detector, found),
        shortfall=find_shortfall(sides, found.best_iou, anchors),
        multiply_adds=multiply_adds(detector),
    )


def find_shortfall(sides: Floats, best_iou: Floats, anchors: AnchorConfig) -> Shortfall:
    """Find out why objects stay below IoU 0.5.

    Args:
        sides: float64[N, 2], width and height, px-in.
        best_iou: float64[N].
        anchors: their shapes.

    Returns:
        `Shortfall`, whose total is the number of objects below 0.5.
    """
    shapes = np.array([shape for level in anchors.shapes for shape in level], dtype=np.float64)
    sides = sides[best_iou < MATCHED]
    area, sizes = sides.prod(axis=1), shapes.prod(axis=1)
    smallest, largest = float(sizes.min()) * MATCHED, float(sizes.max()) / MATCHED
    centred = np.zeros(len(sides))
    for shape, size in zip(shapes, sizes, strict=True):
        common = np.minimum(sides, shape).prod(axis=1)
        centred = np.maximum(centred, common / (area + size - common))
    small, large = area < smallest, area > largest
    shape_only = ~small & ~large & (centred < MATCHED)
    return Shortfall(
        too_small=int(small.sum()),
        too_large=int(large.sum()),
        shape=int(shape_only.sum()),
        position=int((~small & ~large & ~shape_only).sum()),
        smallest=smallest**0.5,
        largest=largest**0.5,
    )


def explain(report: AnchorReport) -> str:
    """Tell in plain words how many objects are not reached, and why."""
    missed, total = report.shortfall, report.overall.objects
    height, width = report.input_size
    if not missed.total:
        every = "The one object" if total == 1 else f"Every one of the {total:,} objects"
        return f"{every} reaches IoU 0.5 with an anchor at {width} x {height}."
    head = (
        f"{percent(missed.total / total)} of the objects ({missed.total:,} of {total:,}) never reach IoU 0.5 with an "
        f"anchor at {width} x {height}."
    )
    reasons = sorted(
        (
            (missed.too_small, f"smaller than {missed.smallest:.3g} px"),
            (missed.too_large, f"larger than {missed.largest:.3g} px"),
            (missed.shape, "of a size or shape that no anchor has"),
            (missed.position, "between the cells of the level that has their shape"),
        ),
        key=lambda reason: -reason[0],
    )
    if reasons[0][0] == missed.total:
        return f"{head} All of these are {reasons[0][1]}."
    told = [f"{percent(count / missed.total)} are {text}" for count, text in reasons if count]
    return f"{head} Of these, {joined(told)}."


def percent(share: float) -> str:
    """Write a share so that neither all nor none is said of almost all and almost none."""
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1:
        shown = "99.9"
    if shown == "0.0" and share > 0:
        shown = "0.1"
    return f"{shown} %"


def shape_text(shape: tuple[float, float]) -> str:
    """Write an anchor's width and height, px-in."""
    width, height = (round(side, 1) for side in shape)
    return f"{width:g}x{height:g}"


def _side_names() -> list[str]:
    first, last = f"below {_SIDES[0]:g} px", f"from {_SIDES[-1]:g} px"
    between = [f"{low:g} to {high:g} px" for low, high in pairwise(_SIDES)]
    return [first, *between, last]


def _ratio_names() -> list[str]:
    names = [name for _, name in _RATIOS]
    between = [f"{low} to {high}" for low, high in pairwise(names)]
    return [f"below {names[0]}", *between, f"from {names[-1]}"]


def _groups(names: Sequence[str], index: NDArray[np.int64], found: Coverage) -> tuple[Group, ...]:
    """Sort objects into groups by their index; one pass over the objects however many groups there are."""
    order = np.argsort(index, kind="stable")
    ends = np.searchsorted(index[order], np.arange(len(names) + 1))
    return tuple(_group(name, found, order[ends[i] : ends[i + 1]]) for i, name in enumerate(names))


def _group(name: str, found: Coverage, chosen: NDArray[np.int64] | Flags) -> Group:
    best = found.best_iou[chosen]
    if not len(best):
        return Group(name, 0, (0.0, 0.0, 0.0), 0.0, 0.0, 0.0)
    low, middle, high = (float((best >= iou).mean()) for iou in IOUS)
    forced, unmatched = (float(flags[chosen].mean()) for flags in (found.forced, found.unmatched))
    return Group(name, len(best), (low, middle, high), forced, unmatched, float(found.positives[chosen].mean()))


def _levels(detector: DetectorConfig, found: Coverage) -> tuple[LevelUse, ...]:
    anchors, size = detector.require_anchors(), detector.preprocess
    fields = receptive_fields(detector) or (None,) * len(anchors.strides)
    grids = level_sizes(anchors, size.height, size.width)
    return tuple(
        LevelUse(
            stride=stride,
            shapes=shapes,
            anchors=rows * columns * len(shapes),
            positives=tuple(int(count) for count in found.anchor_use[level]),
            best=int((found.best_level == level).sum()),
            receptive_field=fields[level],
        )
        for level, (stride, shapes, (rows, columns)) in enumerate(
            zip(anchors.strides, anchors.shapes, grids, strict=True)
        )
    )


def _oddities(report: AnchorReport) -> list[str]:
    lines = []
    for level in report.levels:
        if level.unused:
            shapes = ", ".join(shape_text(shape) for shape in level.unused)
            lines.append(f"no object is matched to the anchors {shapes} of stride {level.stride}")
        if level.receptive_field is not None and level.largest > level.receptive_field:
            lines.append(
                f"anchors of stride {level.stride} are up to {level.largest:.0f} px long, but the head that judges "
                f"them sees {level.receptive_field} px"
            )
    unmatched = round(report.overall.unmatched * report.overall.objects)
    if unmatched:
        some = counted(unmatched, "object gets", "objects get")
        lines.append(f"{some} no anchor at all: every one that overlaps goes to another object")
    return lines
