"""What is in a data set: numbers of pictures and objects, their sizes, and which classes come together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import DEFAULT_PRESET, get_preset
from refinedet_cli.data.convert import notes_of, open_parts
from refinedet_cli.data.dataset import Dataset, join
from refinedet_cli.data.placement import Part
from refinedet_cli.data.source import describe_source

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
# Areas in square px of the picture, as COCO parts them.
_SMALL, _MEDIUM = 32**2, 96**2


class PartStats(NamedTuple):
    """Numbers of one part.

    Attributes:
        name: of the part; "all" where the data set is not divided.
        pictures: all of them.
        empty: pictures without an object.
        objects: boxes that are no crowds.
        crowds: boxes around groups.
        difficult: objects that are marked so.
        most: the most objects in a picture.
    """

    name: str
    pictures: int
    empty: int
    objects: int
    crowds: int
    difficult: int
    most: int


class ClassStats(NamedTuple):
    """Numbers of one class; crowds do not count.

    Attributes:
        name: of the class.
        objects: of this class.
        pictures: that have such an object.
        by_part: objects in each part.
        side: median of the square root of the area at the input, px-in; NaN without objects.
    """

    name: str
    objects: int
    pictures: int
    by_part: tuple[int, ...]
    side: float


class Pair(NamedTuple):
    """Two classes, and the number of pictures that show both."""

    first: str
    second: str
    pictures: int


class Spread(NamedTuple):
    """How a quantity is spread: its values at `QUANTILES`."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class DataStats:
    """A data set in numbers.

    Attributes:
        name: for people.
        classes: of all parts.
        preset: whose input the sizes at the input are for.
        input_size: (height, width), px-in.
        parts: in order.
        by_class: in the order of the classes.
        objects_each: int64[P], objects of each picture.
        picture_sizes: int64[P, 2], width and height, px-img.
        sides: float64[N, 2], width and height of each object, px-img; crowds left out.
        input_sides: the same at the input, px-in.
        pairs: of classes that come together, most often first.
        notes: what was odd.
    """

    name: str
    classes: Classes
    preset: str
    input_size: tuple[int, int]
    parts: tuple[PartStats, ...]
    by_class: tuple[ClassStats, ...]
    objects_each: NDArray[np.int64]
    picture_sizes: NDArray[np.int64]
    sides: NDArray[np.float64]
    input_sides: NDArray[np.float64]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    @property
    def total(self) -> PartStats:
        """The sum of all parts."""
        parts = self.parts
        return PartStats(
            name="all",
            pictures=sum(part.pictures for part in parts),
            empty=sum(part.empty for part in parts),
            objects=sum(part.objects for part in parts),
            crowds=sum(part.crowds for part in parts),
            difficult=sum(part.difficult for part in parts),
            most=max(part.most for part in parts),
        )

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """How sizes are spread; empty without objects."""
        width, height = self.picture_sizes.T.astype(np.float64)
        pictures = (("picture width", width), ("picture height", height), ("picture width : height", width / height))
        found = [_spread(name, values) for name, values in pictures]
        found.append(_spread("objects in a picture", self.objects_each.astype(np.float64)))
        if len(self.sides):
            w, h = self.sides.T
            found += [
                _spread("object width", w),
                _spread("object height", h),
                _spread("object width : height", w / h),
                _spread("square root of the area", np.sqrt(w * h)),
                _spread("square root of the area, at the input", np.sqrt(self.input_sides.prod(axis=1))),
            ]
        return tuple(found)

    @property
    def by_area(self) -> tuple[int, int, int]:
        """Numbers of small, medium and large objects as COCO parts them, by the area of the box in the picture."""
        areas = self.sides.prod(axis=1)
        small, medium = int((areas < _SMALL).sum()), int((areas < _MEDIUM).sum())
        return small, medium - small, len(areas) - medium

    @property
    def common_sizes(self) -> tuple[tuple[int, int, int], ...]:
        """Width, height and number of the sizes of pictures, most common first."""
        sizes, counts = np.unique(self.picture_sizes, axis=0, return_counts=True)
        order = np.lexsort((*sizes.T[::-1], -counts))
        return tuple((int(sizes[i, 0]), int(sizes[i, 1]), int(counts[i])) for i in order)


def describe_data(
    source: str, *, preset: str | None = None, images: Path | None = None, root: Path | None = None
) -> DataStats:
    """Count a data set, all its parts together; no picture is opened where annotations tell the sizes.

    Args:
        source: as for ``open_dataset``.
        preset: whose input size counts; None takes that of the default detector.
        images: as for ``open_dataset``.
        root: as for ``open_dataset``.

    Raises:
        DataError: the data set cannot be read.
        ConfigError: there is no such preset.
    """
    described = describe_source(source, root)
    parts = open_parts(source, described, images, root)
    whole = join([part.dataset for part in parts])
    chosen = get_preset(preset or DEFAULT_PRESET, whole.classes)
    size = chosen.detector.preprocess.height, chosen.detector.preprocess.width
    notes = tuple(notes_of(described, parts))
    return measure(_split_again(whole, parts), preset=chosen.detector.preset, input_size=size, notes=notes)


def measure(
    parts: Sequence[Part], *, preset: str, input_size: tuple[int, int], notes: tuple[str, ...] = ()
) -> DataStats:
    """Count parts of a data set.

    Args:
        parts: at least one, all of the same classes.
        preset: for people.
        input_size: (height, width), px-in.
        notes: are passed on.
    """
    records = [record for part in parts for record in part.dataset.records]
    classes = parts[0].dataset.classes
    single = [record.select(~record.crowd) for record in records]
    part_of = np.repeat(np.arange(len(parts)), [len(part.dataset) for part in parts])
    counts = np.zeros((len(records), len(classes)), dtype=np.int64)
    for i, record in enumerate(single):
        counts[i] = np.bincount(record.labels - 1, minlength=len(classes))
    boxes = np.concatenate([record.boxes for record in single])
    sizes = np.array([(record.width, record.height) for record in records], dtype=np.int64)
    sides = boxes[:, 2:] - boxes[:, :2]
    each = np.array([len(record) for record in single], dtype=np.int64)
    input_sides = sides / np.repeat(sizes, each, axis=0) * input_size[::-1]
    labels = np.concatenate([record.labels for record in single])
    return DataStats(
        name=" + ".join(part.dataset.name for part in parts),
        classes=classes,
        preset=preset,
        input_size=input_size,
        parts=tuple(_part(part) for part in parts),
        by_class=_by_class(classes, counts, part_of, labels, np.sqrt(input_sides.prod(axis=1))),
        objects_each=each,
        picture_sizes=sizes,
        sides=sides,
        input_sides=input_sides,
        pairs=_pairs(classes, counts > 0),
        notes=notes,
    )


def _split_again(whole: Dataset, parts: Sequence[Part]) -> list[Part]:
    """The parts of a joined data set, which has one list of classes."""
    found = []
    start = 0
    for part in parts:
        records = whole.records[start : start + len(part.dataset)]
        found.append(Part(part.name, Dataset(part.dataset.name, whole.classes, records)))
        start += len(records)
    return found


def _part(part: Part) -> PartStats:
    records = part.dataset.records
    each = [int((~record.crowd).sum()) for record in records]
    return PartStats(
        name=part.name or "all",
        pictures=len(records),
        empty=sum(1 for record in records if not len(record)),
        objects=sum(each),
        crowds=sum(int(record.crowd.sum()) for record in records),
        difficult=sum(int((record.difficult & ~record.crowd).sum()) for record in records),
        most=max(each, default=0),
    )


def _by_class(
    classes: Classes,
    counts: NDArray[np.int64],
    part_of: NDArray[np.int64],
    labels: NDArray[np.int64],
    sides: NDArray[np.float64],
) -> tuple[ClassStats, ...]:
    found = []
    for i, name in enumerate(classes.names):
        by_part = np.bincount(part_of, weights=counts[:, i]).astype(int).tolist()
        own = sides[labels == i + 1]
        side = float(np.median(own)) if len(own) else float("nan")
        found.append(ClassStats(name, sum(by_part), int((counts[:, i] > 0).sum()), tuple(by_part), side))
    return tuple(found)


def _pairs(classes: Classes, shown: NDArray[np.bool_]) -> tuple[Pair, ...]:
    together = shown.T.astype(np.float64) @ shown.astype(np.float64)
    first, second = np.triu_indices(len(classes), 1)
    numbers = together[first, second].astype(int)
    order = np.argsort(-numbers, kind="stable")
    names = classes.names
    return tuple(Pair(names[first[i]], names[second[i]], int(numbers[i])) for i in order if numbers[i])


def _spread(name: str, values: NDArray[np.float64]) -> Spread:
    return Spread(name, tuple(np.quantile(values, QUANTILES).tolist()))
