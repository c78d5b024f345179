"""One XML file of a VOC folder: the picture that it names, and its objects as written."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

from refinedet_cli.data.images import open_regular
from refinedet_cli.errors import DataError

_FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True, "unspecified": False}
_NAN = float("nan")


class VocObject(NamedTuple):
    """An object as its file has it.

    Attributes:
        name: of its class.
        corners: xmin, ymin, xmax, ymax, counted from 1: see `voc`; they may be impossible.
        difficult, crowd: as in `Record`.
        area: square px-img; NaN where none is given.
    """

    name: str
    corners: list[float]
    difficult: bool
    crowd: bool = False
    area: float = _NAN


class VocAnnotation(NamedTuple):
    """A file as it is.

    Attributes:
        file_name: of the picture; may be empty or wrong.
        size: (width, height), px-img; None where it is not given.
        objects: in the order of the file.
    """

    file_name: str
    size: tuple[int, int] | None
    objects: list[VocObject]


def read_annotation(path: Path) -> VocAnnotation:
    """Read an XML file with all its objects.

    Raises:
        DataError: it is broken, or an entry of it is, naming the first.
    """
    root = load_xml(path)
    objects = [read_object(path, number, node) for number, node in enumerate(root.iterfind("object"), start=1)]
    return VocAnnotation(read_file_name(root), read_size(path, root), objects)


def load_xml(path: Path) -> ET.Element:
    """Read an XML file to its root, `<annotation>`; nothing within is looked at.

    Raises:
        DataError: it is missing, no XML, no annotation, or has a document type, which could swell without limit.
    """
    with open_regular(path) as file:
        content = file.read()
    # Entities, which can swell without limit, are declared in a document type alone; no VOC file has one. ElementTree
    # fetches no external ones. Two-byte encodings are refused because the declaration would be spelt differently.
    if b"<!DOCTYPE" in content:
        raise DataError(f"{path} declares a document type, which VOC files do not", "remove the <!DOCTYPE ...> part")
    if b"\0" in content:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8")
    try:
        root = ET.fromstring(content)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} is not valid XML ({error})", "was it copied whole?") from None
    if root.tag != "annotation":
        raise DataError(f"{path} is no VOC annotation: it holds <{root.tag}>", "expected <annotation>")
    return root


def read_file_name(root: ET.Element) -> str:
    """Read the name of the picture, as it is written; empty where it is absent."""
    return (root.findtext("filename") or "").strip()


def read_size(path: Path, root: ET.Element) -> tuple[int, int] | None:
    """Read the picture's (width, height), px-img; None where either is absent or 0.

    Raises:
        DataError: they are no whole numbers, or too large; ``path`` is named.
    """
    texts = [(root.findtext(f"size/{key}") or "").strip() or "0" for key in ("width", "height")]
    try:
        width, height = (float(text) for text in texts)
        valid = width.is_integer() and height.is_integer() and 0 <= width < 2**31 and 0 <= height < 2**31
    except ValueError:
        valid = False
    if not valid:
        raise DataError(f"{path}: the size is {' x '.join(texts)}", "give the picture's size in pixels")
    return (int(width), int(height)) if width and height else None


def read_object(path: Path, number: int, node: ET.Element) -> VocObject:
    """Read an object.

    Args:
        path: of the file, for errors.
        number: of the object in the file, from 1, for errors.
        node: ``<object>``.

    Raises:
        DataError: its name, its box or a mark is absent or malformed.
    """
    name = (node.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{path}: object {number} has no name", "name its class")
    # Direct children alone: the parts of a person (head, hand, foot) have boxes too.
    box = node.find("bndbox")
    if box is None:
        raise DataError(f"{path}: object {number} ({name}) has no bndbox", "give it a box, or remove it")
    texts = [(box.findtext(key) or "").strip() for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        corners = [float(text) for text in texts]
    except ValueError:
        raise DataError(
            f"{path}: object {number} ({name}): bndbox is {', '.join(text or 'absent' for text in texts)}",
            "it must have the numbers xmin, ymin, xmax, ymax",
        ) from None
    where = f"{path}: object {number} ({name})"
    return VocObject(name, corners, _flag(where, node, "difficult"), _flag(where, node, "iscrowd"), _area(node))


def _flag(where: str, node: ET.Element, key: str) -> bool:
    text = (node.findtext(key) or "").strip()
    flag = _FLAGS.get(text.lower())
    if flag is None:
        raise DataError(f"{where}: {key} is {text!r}", "it must be 0 or 1")
    return flag


def _area(node: ET.Element) -> float:
    """The area as given, or NaN where it is absent or no area."""
    try:
        area = float(node.findtext("area") or "nan")
    except ValueError:
        return _NAN
    return area if 0 < area < float("inf") else _NAN
