"""VOC folders: one XML file a picture, beside the pictures, with lists of pictures as parts."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Record
from refinedet_cli.data.placement import Part

_DECIMALS = 9


def write_voc(out: Path, parts: Sequence[Part], classes: Classes, names: Sequence[Sequence[str]]) -> None:
    """Write Annotations, labels.txt, which keeps the order of the classes, and a list for each part that has a name.

    Crowds and areas that are not those of the boxes are written as ``iscrowd`` and ``area`` into the object, where
    other readers pass them over and ``read_voc`` takes them.

    Args:
        out: the folder; it exists.
        parts: all of the same classes.
        classes: their names can stand in a line and in XML.
        names: of each picture of each part, ``JPEGImages/...``, with a stem of its own.
    """
    (out / "Annotations").mkdir()
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in classes.names), encoding="utf-8")
    for part, these in zip(parts, names, strict=True):
        leaves = [Path(name).name for name in these]
        for record, leaf in zip(part.dataset.records, leaves, strict=True):
            target = out / "Annotations" / f"{Path(leaf).stem}.xml"
            target.write_bytes(_annotation(record, leaf, classes))
        if part.name is not None:
            listing = out / "ImageSets" / "Main" / f"{part.name}.txt"
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(f"{Path(leaf).stem}\n" for leaf in leaves), encoding="utf-8")


def _annotation(record: Record, leaf: str, classes: Classes) -> bytes:
    root = ET.Element("annotation")
    _texts(root, folder="JPEGImages", filename=leaf)
    _texts(ET.SubElement(root, "size"), width=str(record.width), height=str(record.height), depth="3")
    _texts(root, segmented="0")
    sides = record.boxes[:, 2:] - record.boxes[:, :2]
    own = (sides[:, 0] * sides[:, 1]).tolist()
    for i, (left, top, right, bottom) in enumerate(record.boxes.tolist()):
        node = ET.SubElement(root, "object")
        _texts(
            node,
            name=classes.names[record.labels[i] - 1],
            pose="Unspecified",
            truncated="0",
            difficult=str(int(record.difficult[i])),
        )
        if record.crowd[i]:
            _texts(node, iscrowd="1")
        if record.areas[i] != own[i]:
            _texts(node, area=repr(float(record.areas[i])))
        # VOC counts pixels from 1 and both corner pixels belong to the box.
        corners = {"xmin": left + 1, "ymin": top + 1, "xmax": right, "ymax": bottom}
        _texts(ET.SubElement(node, "bndbox"), **{key: _number(value) for key, value in corners.items()})
    ET.indent(root, "\t")
    text: bytes = ET.tostring(root, encoding="utf-8")
    return text + b"\n"


def _texts(parent: ET.Element, **texts: str) -> None:
    for tag, text in texts.items():
        ET.SubElement(parent, tag).text = text


def _number(value: float) -> str:
    return f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".")
