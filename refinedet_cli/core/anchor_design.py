"""Fit anchors to a data set, and say on objects held out whether that is worth anything.

What counts is the share of objects that overlap some anchor by at least 0.5: the others live on one forced match each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.anchor_coverage import ObjectSet, best_ious, check_objects
from refinedet_cli.core.anchor_pairs import Floats
from refinedet_cli.core.anchor_search import DEFAULT_LIMITS, Limits, Sample, search_shapes
from refinedet_cli.core.anchors import level_sizes
from refinedet_cli.core.config import AnchorConfig

MATCHED = 0.5
# The worst quarter of the classes is the tail; a class of fewer objects than this says nothing about itself.
TAIL = 0.25
CLASS_OBJECTS = 10
SMALLEST = 0.2
RESAMPLES = 1000

# Objects that the search looks at; fewer are repeated up to so often, each time moved by up to so much, px-in.
_SAMPLE = 6000
_COPIES = 8
_MOVE = 32.0


class Fit(NamedTuple):
    """How well anchors fit some objects: shares with an overlap of at least 0.5 with some anchor.

    Attributes:
        matched: of all objects.
        tail: mean over the worst quarter of the classes that have at least 10 objects; ``matched`` if none has.
        smallest: of the smallest fifth by area.
        objects: their number.
    """

    matched: float
    tail: float
    smallest: float
    objects: int


class Gain(NamedTuple):
    """What a proposal adds to the matched share, and the ends of its 95 % interval over resampled pictures."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What the search found and what it is worth.

    Attributes:
        anchors: to be used: those found if accepted, else those of the start.
        accepted: whether those found win on the held-out objects: they match more of them, and either the interval of
            the gain lies above 0, or neither the tail nor the smallest objects lose.
        found: the best of the search on the training objects.
        train_before, train_after, held_out_before, held_out_after: of the start and of ``found``.
        gain: of ``found`` over the start on the held-out objects.
        anchors_before, anchors_after: of one picture, the start and ``found``.
        evaluations: how many shapes were tried on the sample.
        sample: boxes of the sample, copies included.
    """

    anchors: AnchorConfig
    accepted: bool
    found: AnchorConfig
    train_before: Fit
    train_after: Fit
    held_out_before: Fit
    held_out_after: Fit
    gain: Gain
    anchors_before: int
    anchors_after: int
    evaluations: int
    sample: int


def design(
    train: ObjectSet,
    held_out: ObjectSet,
    start: AnchorConfig,
    input_size: tuple[int, int],
    *,
    budget: int | None = None,
    seed: int = 0,
    classes: int,
    limits: Limits = DEFAULT_LIMITS,
) -> Proposal:
    """Fit anchors to the training objects and judge them on others.

    Args:
        train: what the search sees; at least one object with an area.
        held_out: what decides; at least one object. None of its pictures should be in ``train``.
        start: strides, variances, and the anchors to beat.
        input_size: (height, width), px-in.
        budget: the most anchors of one picture; None for as many as ``start`` has.
        seed: of the sample, the search and the interval; equal input and seed give an equal proposal.
        classes: C, background included.
        limits: what a shape may be.

    Returns:
        `Proposal`; ``found`` has at most ``budget`` anchors, with sides in whole tenths of a pixel.

    Raises:
        ValueError: there are no objects on one of the sides, arrays do not belong together (see `check_objects`), a
            label is not below ``classes``, limits leave nothing to search, the budget is less than one shape on every
            level, or the input does not fit the strides.
    """
    for name, objects in (("training", train), ("held-out", held_out)):
        _check(objects, name, classes)
    limits.check()
    cells = [rows * columns for rows, columns in level_sizes(start, *input_size)]
    before = _count(start, cells)
    budget = before if budget is None else budget
    if budget < sum(cells):
        raise ValueError(f"one shape on every level is {sum(cells)} anchors already, more than the budget of {budget}")
    generator = np.random.default_rng(seed)
    sample = draw_sample(train, input_size, generator)
    shapes, evaluations = search_shapes(sample, start, input_size, budget=budget, limits=limits, generator=generator)
    found = replace(start, shapes=shapes)
    ious = [[best_ious(o.boxes, a, input_size) for a in (start, found)] for o in (train, held_out)]
    fits = [[measure_fit(o, u) for u in pair] for o, pair in zip((train, held_out), ious, strict=True)]
    gain = gain_interval(held_out, ious[1][0], ious[1][1], generator=generator)
    accepted = _wins(fits[1][0], fits[1][1], gain)
    return Proposal(
        anchors=found if accepted else start,
        accepted=accepted,
        found=found,
        train_before=fits[0][0],
        train_after=fits[0][1],
        held_out_before=fits[1][0],
        held_out_after=fits[1][1],
        gain=gain,
        anchors_before=before,
        anchors_after=_count(found, cells),
        evaluations=evaluations,
        sample=len(sample.boxes),
    )


def measure_fit(objects: ObjectSet, best_iou: Floats) -> Fit:
    """Sum up best overlaps float64[N] of N > 0 objects."""
    matched = best_iou >= MATCHED
    counts = np.bincount(objects.labels)
    known = counts >= CLASS_OBJECTS
    shares = np.bincount(objects.labels, weights=matched)[known] / counts[known]
    worst = np.sort(shares)[: math.ceil(TAIL * len(shares))]
    share = float(matched.mean())
    return Fit(
        matched=share,
        tail=float(worst.mean()) if len(worst) else share,
        smallest=float(matched[_smallest(objects.boxes)].mean()),
        objects=len(matched),
    )


def gain_interval(objects: ObjectSet, before: Floats, after: Floats, *, generator: np.random.Generator) -> Gain:
    """Compare best overlaps float64[N] of the same N > 0 objects.

    Returns:
        `Gain`; pictures are resampled whole, since objects of one picture are alike. With a single picture that has
        objects the interval is everything, [-1, 1].
    """
    _, picture = np.unique(objects.picture, return_inverse=True)
    counts = np.bincount(picture)
    gains = np.bincount(picture, weights=(after >= MATCHED).astype(np.float64) - (before >= MATCHED))
    gain = float(gains.sum() / counts.sum())
    if len(counts) == 1:
        return Gain(gain, -1.0, 1.0)
    drawn = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        chosen = generator.integers(len(counts), size=len(counts))
        drawn[k] = gains[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Gain(gain, float(low), float(high))


def draw_sample(objects: ObjectSet, input_size: tuple[int, int], generator: np.random.Generator) -> Sample:
    """Choose objects with an area at random, or repeat few ones, moved, mirrored and resized within the picture.

    Where an object stands against the grid is chance, and few objects are a coarse picture of the sizes to come. Copies
    smooth both, by Scott's rule in log width and log height: without them a search on some hundred boxes matches these
    better and others worse than the start did.

    Raises:
        ValueError: no object has an area.
    """
    usable = np.flatnonzero((objects.boxes[:, 2:] > objects.boxes[:, :2]).all(axis=1))
    if not len(usable):
        raise ValueError("no training object has an area")
    if len(usable) > _SAMPLE:
        usable = np.sort(generator.choice(usable, _SAMPLE, replace=False))
    copies = min(_COPIES, math.ceil(_SAMPLE / len(usable)))
    boxes = objects.boxes[usable]
    moved = [_moved(boxes, input_size, generator) for _ in range(copies - 1)]
    labels = objects.labels[usable]
    names, counts = np.unique(labels, return_counts=True)
    boxes = np.concatenate([boxes, *moved])
    groups = labels[:, None] == names[counts >= CLASS_OBJECTS]
    return Sample(boxes, _smallest(boxes), np.tile(groups, (copies, 1)))


def _moved(boxes: Floats, input_size: tuple[int, int], generator: np.random.Generator) -> Floats:
    sides = np.array([input_size[1], input_size[0]], dtype=np.float64)
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    spread = len(boxes) ** (-1 / 6) * np.log(size).std(axis=0)
    size = np.minimum(size * np.exp(generator.normal(0, 1, size.shape) * spread), np.maximum(size, sides))
    centre[:, 0] = np.where(generator.random(len(boxes)) < 0.5, centre[:, 0], sides[0] - centre[:, 0])
    corner = centre + generator.uniform(-_MOVE, _MOVE, centre.shape) - size / 2
    corner = np.clip(corner, 0, np.maximum(sides - size, 0))
    return np.concatenate([corner, corner + size], axis=1)


def _check(objects: ObjectSet, name: str, classes: int) -> None:
    check_objects(objects)
    if not len(objects.boxes):
        raise ValueError(f"there are no {name} objects to fit anchors to")
    if int(objects.labels.max()) >= classes:
        raise ValueError(f"a {name} object has label {int(objects.labels.max())}, expected less than {classes}")


def _smallest(boxes: Floats) -> NDArray[np.bool_]:
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    smallest: NDArray[np.bool_] = area <= np.quantile(area, SMALLEST)
    return smallest


def _wins(before: Fit, after: Fit, gain: Gain) -> bool:
    no_loss = after.tail >= before.tail and after.smallest >= before.smallest
    return gain.gain > 0 and (gain.low > 0 or no_loss)


def _count(anchors: AnchorConfig, cells: Sequence[int]) -> int:
    return sum(n * len(shapes) for n, shapes in zip(cells, anchors.shapes, strict=True))
