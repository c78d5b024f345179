"""YOLO data sets: a data.yaml, and a text file of boxes for each picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Record
from refinedet_cli.data.placement import Placement

# Half a unit of the last is less than 1e-6 px of the largest picture there is.
_DECIMALS = 15


def write_yolo(
    out: Path, parts: Sequence[tuple[str, Sequence[Record]]], classes: Classes, placement: Placement
) -> None:
    """Write data.yaml and a label file for each picture, also where it is empty.

    Args:
        out: the folder; it exists.
        parts: name (train, val or test) and records of each. Crowds must have been left out, for they would be objects;
            the size of a record must be that of its picture.
        classes: of all parts; they are numbered from 0 in their order.
        placement: from ``place_for_yolo``. Where it has links, parts are lists of pictures, else folders.
    """
    entries = {}
    for (name, records), pictures in zip(parts, placement.names, strict=True):
        for record, picture in zip(records, pictures, strict=True):
            target = (out / "labels" / Path(picture).relative_to("images")).with_suffix(".txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(_rows(record)), encoding="ascii")
        entries[name] = f"images/{name}"
        if placement.links:
            entries[name] = f"{name}.txt"
            (out / entries[name]).write_text("".join(f"./{picture}\n" for picture in pictures), encoding="utf-8")
    document = {**entries, "names": dict(enumerate(classes.names))}
    (out / "data.yaml").write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _rows(record: Record) -> list[str]:
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    size = (record.width, record.height)
    centres, fractions = (record.boxes[:, :2] + sides / 2) / size, sides / size
    return [
        f"{label - 1} {' '.join(_number(value) for value in (*centre, *fraction))}\n"
        for label, centre, fraction in zip(record.labels.tolist(), centres.tolist(), fractions.tolist(), strict=True)
    ]


def _number(value: float) -> str:
    """Without an exponent, which some readers do not know."""
    return f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".") or "0"
