"""Judges boxes and classes of the parts of a data set, all objects at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.words import counted
from refinedet_cli.data.check import (
    BOX_TWICE,
    CLASS_ALIKE,
    CLASS_ELSEWHERE,
    CLASS_GAPS,
    CLASS_UNMEASURED,
    CLASS_UNUSED,
    CLASSES_DIFFER,
    CROWD,
    DIFFICULT,
    EMPTY,
    INVERTED,
    NO_AREA,
    NO_OBJECTS,
    NOT_FINITE,
    OUTSIDE,
    REACHES_OUT,
    REACHES_OUT_LITTLE,
    Findings,
    Kind,
)
from refinedet_cli.data.check_entries import Part
from refinedet_cli.data.dataset import canonical_name
from refinedet_cli.data.records import MIN_SIDE, ROUNDING, every

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

# By so much, px-img, boxes commonly reach out because somebody rounded.
_LITTLE = 1.0
# Stands in for the side of a picture whose size is not known, where boxes are fractions.
_NOMINAL = 1000.0


class Judged(NamedTuple):
    """The objects of a part that training would see.

    Attributes:
        boxes: float64[N, 4], xyxy, px-img, inside their pictures; of any object.
        sizes: float64[N, 2], (width, height) of its picture, px-img; NaN where it is not known.
        good: bool[N], the box is one.
    """

    boxes: Floats
    sizes: Floats
    good: Flags


def judge_boxes(part: Part, sizes: Sequence[tuple[int, int] | None], findings: Findings) -> Judged:
    """Find boxes that are none, that reach out of their picture, or that are there twice.

    Args:
        part: whose objects.
        sizes: (width, height) of each picture, px-img; None where it is not known.
        findings: receives what is wrong.
    """
    size = _sizes(part, sizes)
    with np.errstate(over="ignore", invalid="ignore"):
        given = part.boxes * np.concatenate([size, size], axis=1) if part.relative else part.boxes
    finite = every(np.isfinite(given))
    sound = np.where(finite[:, None], given, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        whole = np.concatenate([sound[:, :2], sound[:, :2] + sound[:, 2:]], axis=1)
        limit = np.where(np.isnan(size), np.inf, size)
        boxes = np.clip(whole, 0.0, np.concatenate([limit, limit], axis=1))
        if not part.relative:
            boxes[np.isnan(size[:, 0])] = whole[np.isnan(size[:, 0])]
        inside = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
        beyond = np.abs(boxes - whole).max(axis=1, initial=0.0)
    inverted = finite & (sound[:, 2:] < 0).any(axis=1)
    flat = finite & ~inverted & (sound[:, 2:] < MIN_SIDE).any(axis=1)
    rest = finite & ~inverted & ~flat
    good: Flags = rest & inside
    kinds: tuple[tuple[Kind, Flags], ...] = (
        (NOT_FINITE, ~finite),
        (INVERTED, inverted),
        (NO_AREA, flat),
        (OUTSIDE, rest & ~inside),
        (REACHES_OUT, good & (beyond > _LITTLE)),
        (REACHES_OUT_LITTLE, good & (beyond > ROUNDING) & (beyond <= _LITTLE)),
        (BOX_TWICE, _repeated(part, good)),
        (CROWD, part.crowd),
        (DIFFICULT, part.difficult),
    )
    shown = _Shown(part, given, size, findings)
    for kind, which in kinds:
        shown.report(kind, which)
    return Judged(boxes, size, good)


def report_objects(part: Part, which: Flags, judged: Judged, kind: Kind, findings: Findings) -> None:
    """Report some objects of a part.

    Args:
        part: whose objects.
        which: bool[N].
        judged: the same part's.
        kind: of the findings.
        findings: receives them.
    """
    given = np.concatenate([judged.boxes[:, :2], judged.boxes[:, 2:] - judged.boxes[:, :2]], axis=1)
    _Shown(part, given, judged.sizes, findings).report(kind, which)


class _Shown(NamedTuple):
    part: Part
    given: Floats
    sizes: Floats
    findings: Findings

    def report(self, kind: Kind, which: Flags) -> None:
        part, findings = self.part, self.findings
        chosen = np.flatnonzero(which)
        for i in chosen[: None if findings.keep else 1].tolist():
            file, where = part.place(i)
            picture = part.pictures[part.picture[i]].path if part.picture[i] >= 0 else None
            box = _corners(self.given[i])
            findings.add(kind, file, where, self._detail(i), picture=picture, box=box)
        if not findings.keep:
            findings.more(kind, len(chosen) - 1)

    def _detail(self, i: int) -> str:
        left, top, width, height = (f"{value:.6g}" for value in self.given[i])
        label = int(self.part.label[i])
        name = f"{self.part.classes[label - 1]}, " if label else ""
        of = "" if np.isnan(self.sizes[i]).any() else " of {:.0f} x {:.0f}".format(*self.sizes[i])
        return f"{name}{width} x {height} px at ({left}, {top}){of}"


def _corners(given: Floats) -> tuple[float, float, float, float] | None:
    left, top, width, height = given.tolist()
    box = (left, top, left + width, top + height)
    return box if np.isfinite(box).all() else None


def _sizes(part: Part, sizes: Sequence[tuple[int, int] | None]) -> Floats:
    """The size of each object's picture, float64[N, 2]; NaN where it is not known."""
    unknown = (_NOMINAL, _NOMINAL) if part.relative else (np.nan, np.nan)
    # The last stands for the picture of objects that have none: place -1.
    table = np.array([*(size or unknown for size in sizes), unknown], dtype=np.float64)
    found: Floats = table[part.picture]
    return found


def _repeated(part: Part, good: Flags) -> Flags:
    """Objects that are in their picture already, with the same class and box to a hundredth of a pixel."""
    chosen = np.flatnonzero(good & (part.picture >= 0) & ~part.crowd)
    result = np.zeros(len(good), dtype=bool)
    scale = 1e5 if part.relative else 1e2
    keys = np.column_stack(
        [part.picture[chosen], part.label[chosen], np.rint(part.boxes[chosen].clip(-1e9, 1e9) * scale)]
    ).astype(np.int64)
    if len(keys):
        order = np.lexsort(keys.T[::-1])
        same = np.zeros(len(order), dtype=bool)
        same[1:] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
        result[chosen[order[same]]] = True
    return result


# Classes and pictures without objects --------------------------------------------------------------------------------


def judge_classes(parts: Sequence[Part], findings: Findings) -> None:
    """Find classes without objects, of odd ids or spelling, and lists that differ between parts.

    Args:
        parts: the first is the one that is trained on.
        findings: receives what is odd.
    """
    if not parts:
        return
    trained, *others = parts
    _judge_list(trained, findings)
    learnt = _count(trained)
    for name, objects in zip(trained.classes, learnt, strict=True):
        if objects or not any(learnt):
            continue
        if where := _where(name, others):
            findings.add(CLASS_ELSEWHERE, trained.file, _of(trained), f"{name}: {where}")
        else:
            findings.add(CLASS_UNUSED, trained.file, _of(trained), name)
    known = {canonical_name(name): objects for name, objects in zip(trained.classes, learnt, strict=True)}
    for part in others:
        measured = _count(part)
        for name, objects in zip(part.classes, measured, strict=True):
            if canonical_name(name) not in known:
                findings.add(CLASSES_DIFFER, part.file, _of(part), f"{name}, of {counted(objects, 'object')}")
            elif known[canonical_name(name)] and not objects and any(measured):
                findings.add(CLASS_UNMEASURED, part.file, _of(part), name)


def _where(name: str, parts: Sequence[Part]) -> str:
    """Tell which parts have objects of a class, and how many; empty where none has."""
    found = []
    for part in parts:
        counts = zip(part.classes, _count(part), strict=True)
        objects = sum(count for own, count in counts if canonical_name(own) == canonical_name(name))
        found += [f"{objects:,} in {part.name or part.file.name}"] if objects else []
    return ", ".join(found)


def _count(part: Part) -> list[int]:
    """The objects of each class."""
    return [int(count) for count in np.bincount(part.label, minlength=len(part.classes) + 1)[1:]]


def judge_empty(parts: Sequence[Part], findings: Findings) -> None:
    """Find pictures and whole parts without objects."""
    for part in parts:
        count = np.bincount(part.picture[part.picture >= 0], minlength=len(part.pictures))
        if part.pictures and not len(part.boxes):
            findings.add(NO_OBJECTS, part.file, _of(part), f"{counted(len(part.pictures), 'picture')}, no object")
            continue
        for place in sorted({*np.flatnonzero(count == 0).tolist()} - part.uncertain):
            listed = part.pictures[place]
            findings.add(EMPTY, listed.file, listed.where, picture=listed.path)


def _judge_list(part: Part, findings: Findings) -> None:
    spelled: dict[str, str] = {}
    for name in part.classes:
        known = spelled.setdefault(canonical_name(name), name)
        if known != name:
            findings.add(CLASS_ALIKE, part.file, _of(part), f"{known!r} and {name!r}")
    ids = part.category_ids
    if ids and ids != tuple(range(min(ids), min(ids) + len(ids))):
        findings.add(CLASS_GAPS, part.file, _of(part), f"{len(ids):,} ids from {min(ids)} to {max(ids)}")


def _of(part: Part) -> str:
    return "classes" if part.file.suffix else ""
