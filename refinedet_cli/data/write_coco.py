"""COCO annotation files, written entry by entry so that memory does not grow with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.data.dataset import Dataset, Record

_DECIMALS = 6


@dataclass(frozen=True)
class Extras:
    """Fields that the detector has no use for and that go from one COCO file to another as they are.

    Attributes:
        document: top-level fields.
        images, annotations, categories: fields of each entry, by its id.
    """

    document: Mapping[str, Any] = field(default_factory=dict)
    images: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    annotations: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    categories: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def write_coco(path: Path, dataset: Dataset, names: Sequence[str], extras: Extras | None = None) -> None:
    """Write a data set as a COCO JSON that ``read_coco`` reads back as it is, boxes to the last bit.

    Args:
        path: a file in an existing folder.
        dataset: left as it is.
        names: ``file_name`` of each record.
        extras: further fields; those that are written anyway win.
    """
    extras = extras or Extras()
    with path.open("w", encoding="utf-8") as file:
        file.write("{")
        for key, value in extras.document.items():
            file.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
        _write_list(file, "categories", _categories(dataset, extras))
        file.write(",\n")
        _write_list(file, "images", _images(dataset, names, extras))
        file.write(",\n")
        _write_list(file, "annotations", _annotations(dataset, extras))
        file.write("}\n")


def side_lengths(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find lengths that lead from one edge exactly to the other, and of such the one with few decimals.

    Args:
        low: float64[N], not negative.
        high: float64[N], above ``low``.

    Returns:
        float64[N], with ``low + length == high`` in floating point, where any number does.
    """
    exact = high - low
    found = exact
    # Last wins. The difference is rounded, and so is the sum; a neighbour makes up for it where both went one way.
    for candidate in (np.nextafter(exact, 0), np.nextafter(exact, np.inf), exact, np.round(exact, _DECIMALS)):
        found = np.where(low + candidate == high, candidate, found)
    return found


def _write_list(file: TextIO, key: str, entries: Iterable[Mapping[str, Any]]) -> None:
    file.write(f'"{key}": [')
    for number, entry in enumerate(entries):
        file.write(",\n" if number else "\n")
        file.write(json.dumps(entry))
    file.write("]")


def _categories(dataset: Dataset, extras: Extras) -> Iterator[dict[str, Any]]:
    for identity, name in zip(dataset.classes.category_ids, dataset.classes.names, strict=True):
        yield {**extras.categories.get(identity, {}), "id": identity, "name": name}


def _images(dataset: Dataset, names: Sequence[str], extras: Extras) -> Iterator[dict[str, Any]]:
    for record, name in zip(dataset.records, names, strict=True):
        own = {"id": record.image_id, "file_name": name, "width": record.width, "height": record.height}
        yield {**extras.images.get(record.image_id, {}), **own}


def _annotations(dataset: Dataset, extras: Extras) -> Iterator[dict[str, Any]]:
    ids = dataset.classes.category_ids
    for record in dataset.records:
        boxes = _xywh(record)
        columns = zip(
            record.annotation_ids.tolist(),
            record.labels.tolist(),
            boxes.tolist(),
            record.areas.tolist(),
            record.crowd.tolist(),
            record.difficult.tolist(),
            strict=True,
        )
        for identity, label, box, area, crowd, difficult in columns:
            own = {
                "id": identity,
                "image_id": record.image_id,
                "category_id": ids[label - 1],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            # Neither is a field of COCO's own; some tools know the one, some the other.
            flag = {"difficult": 1, "ignore": 1} if difficult else {}
            yield {**extras.annotations.get(identity, {}), **own, **flag}


def _xywh(record: Record) -> NDArray[np.float64]:
    left, top, right, bottom = record.boxes.T
    return np.stack([left, top, side_lengths(left, right), side_lengths(top, bottom)], axis=1)
