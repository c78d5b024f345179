"""From columns of pictures and objects, as any format gives them, to checked `Record`s."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import CLIPPED, DROPPED, Record, listed

# Files commonly round coordinates to two decimals; what reaches out by no more than that is not worth a note.
ROUNDING = 0.02
# A narrower box has no width left as a float32 fraction of a large picture, and training takes its logarithm.
MIN_SIDE = 0.01
# Ids of at most so many digits fit into 64 bits, and into the whole numbers that JSON readers keep.
_ID_DIGITS = 15


@dataclass
class Pictures:
    """Pictures as columns, in the order of the data set.

    Attributes:
        ids: for `Record.image_id`.
        names: for `Record.file_name`.
        paths: where they lie.
        sizes: (width, height) as seen, px-img.
    """

    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Objects:
    """Objects as columns, in the order of their files.

    Attributes:
        ids: for `Record.annotation_ids`.
        pictures: the place of each object's picture among the pictures.
        labels: in 1..C-1.
        boxes: left, top, width, height, px-img, as given: they may be impossible.
        areas: square px-img; NaN where it is to be computed from the box.
        crowd, difficult: as in `Record`.
    """

    ids: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)


class Checked(NamedTuple):
    """Records, and what had to be said about their objects.

    Attributes:
        records: of all pictures.
        notes: for people.
        altered: as in `Dataset`.
    """

    records: tuple[Record, ...]
    notes: tuple[str, ...]
    altered: dict[str, int]


class _Clipped(NamedTuple):
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    keep: NDArray[np.bool_]
    notes: list[str]
    altered: dict[str, int]


def make_records(pictures: Pictures, objects: Objects, describe: Callable[[Sequence[int]], str]) -> Checked:
    """Sort the objects to their pictures.

    Boxes that are not finite, have no area or lie wholly outside their picture are dropped; others are clipped to it.
    Both are counted in the notes.

    Args:
        pictures: left as they are.
        objects: left as they are.
        describe: names the objects at some places, for people to find them in their files.

    Returns:
        a record for each picture, in order, the objects of each in the order given; every box has positive width and
        height inside its picture.
    """
    of_picture = np.array(objects.pictures, dtype=np.int64)
    sizes = np.array(pictures.sizes, dtype=np.float64).reshape(-1, 2)
    clipped = _clip(objects, sizes[of_picture], describe)
    kept = np.flatnonzero(clipped.keep)
    order = kept[np.argsort(of_picture[kept], kind="stable")]
    ends = np.cumsum(np.bincount(of_picture[order], minlength=len(pictures.ids))).tolist()
    boxes, areas = clipped.boxes[order], clipped.areas[order]
    labels = np.array(objects.labels, dtype=np.int64)[order]
    crowd, difficult = np.array(objects.crowd, dtype=bool)[order], np.array(objects.difficult, dtype=bool)[order]
    ids = np.array(objects.ids, dtype=np.int64)[order]
    records = []
    start = 0
    for i, end in enumerate(ends):
        part = slice(start, end)
        records.append(
            Record(
                image_id=pictures.ids[i],
                path=pictures.paths[i],
                width=pictures.sizes[i][0],
                height=pictures.sizes[i][1],
                boxes=boxes[part],
                labels=labels[part],
                areas=areas[part],
                crowd=crowd[part],
                difficult=difficult[part],
                annotation_ids=ids[part],
                file_name=pictures.names[i],
            )
        )
        start = end
    return Checked(tuple(records), tuple(clipped.notes), clipped.altered)


def unused_classes(classes: Classes, labels: Sequence[int]) -> tuple[str, ...]:
    """Note the classes that no object has; nothing where each has one.

    Args:
        classes: of the data set.
        labels: of all objects, in 1..C-1.
    """
    used = set(labels)
    unused = [name for label, name in enumerate(classes.names, start=1) if label not in used]
    return (
        (f"{len(unused):,} of {counted(len(classes), 'class', 'classes')} without object: {listed(unused)}",)
        if unused
        else ()
    )


def picture_ids(stems: Sequence[str]) -> list[int]:
    """Number pictures whose format has names but no numbers.

    Returns:
        for each name the number in its digits (``000012`` is 12, ``2008_000123`` is 2008000123) where all names are
        such numbers and none are equal; else 1, 2, ... in the order given. Ids are distinct if the names are.
    """
    if all(re.fullmatch(r"[0-9]+(_[0-9]+)?", stem) for stem in stems):
        digits = [stem.replace("_", "").lstrip("0") or "0" for stem in stems]
        numbers = [int(d) for d in digits if len(d) <= _ID_DIGITS]
        if len(set(numbers)) == len(stems):
            return numbers
    return list(range(1, len(stems) + 1))


def every(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell of which rows everything holds: bool[N] of bool[N, K]."""
    result: NDArray[np.bool_] = np.logical_and.reduce(holds, axis=1)
    return result


def _clip(objects: Objects, sizes: NDArray[np.float64], describe: Callable[[Sequence[int]], str]) -> _Clipped:
    """Turn xywh into xyxy inside pictures of ``sizes``, float64[N, 2] (width, height), and tell which remain boxes."""
    given = np.array(objects.boxes, dtype=np.float64).reshape(-1, 4)
    areas = np.array(objects.areas, dtype=np.float64)
    finite = every(np.isfinite(given))
    # An overflow of left + width is clipped like any other; boxes that are not finite are dropped below.
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
        corner = np.concatenate([sizes, sizes], axis=1)
        boxes = np.clip(np.where(finite[:, None], whole, 0.0), 0.0, corner)
        positive = every(given[:, 2:] >= MIN_SIDE)
        inside = every(boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE)
        moved = ~every(np.abs(boxes - whole) <= ROUNDING)
    keep = finite & positive & inside
    sides = boxes[:, 2:] - boxes[:, :2]
    own = sides[:, 0] * sides[:, 1]
    # A box that lost a part lost of its object's area too; what is left fits into the box.
    areas = np.where(np.isnan(areas), own, np.where(moved, np.minimum(areas, own), areas))
    kinds = (
        ("boxes are dropped: not finite numbers", ~finite),
        ("boxes are dropped: without area (width or height not positive)", finite & ~positive),
        ("boxes are dropped: outside their picture", finite & positive & ~inside),
        ("boxes reach out of their picture and are clipped", keep & moved),
    )
    notes = [f"{int(which.sum()):,} {text} ({_examples(which, describe)})" for text, which in kinds if which.any()]
    altered = {DROPPED: int((~keep).sum()), CLIPPED: int((keep & moved).sum())}
    return _Clipped(boxes, areas, keep, notes, {what: number for what, number in altered.items() if number})


def _examples(which: NDArray[np.bool_], describe: Callable[[Sequence[int]], str]) -> str:
    first = np.flatnonzero(which)[:3].tolist()
    return describe(first) + (", ..." if which.sum() > len(first) else "")
