"""What annotation files hold beside boxes, so that it can be kept or its loss be named."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refinedet_cli.data.dataset import listed
from refinedet_cli.data.write_coco import Extras

_KNOWN = {
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "difficult", "ignore"},
    "categories": {"id", "name"},
}
_KNOWN_TAGS = {"name", "bndbox", "difficult", "iscrowd", "area"}
_SAYS_NOTHING = ("", "0", "unspecified")


class Unread(NamedTuple):
    """Entries with fields that are not read.

    Attributes:
        what: the entries and the names of the fields.
        number: of entries that have one.
    """

    what: str
    number: int


def read_extras(path: Path) -> Extras:
    """Take all fields out of a COCO JSON that ``read_coco`` has no use for.

    Args:
        path: a file that ``read_coco`` has read.
    """
    document = json.loads(path.read_bytes())
    found = {key: _by_id(document[key], known) for key, known in _KNOWN.items()}
    rest = {key: value for key, value in document.items() if key not in _KNOWN}
    return Extras(rest, found["images"], found["annotations"], found["categories"])


def unread_in_coco(extras: Extras) -> list[Unread]:
    """Name and count what would be lost with the extras."""
    found = [
        _summary("pictures", extras.images.values()),
        _summary("objects", extras.annotations.values()),
        _summary("classes", extras.categories.values()),
        Unread(f"of the data set: {listed(sorted(extras.document), 10)}", len(extras.document)),
    ]
    return [one for one in found if one.number]


def unread_in_voc(files: Iterable[Path]) -> list[Unread]:
    """Name and count what the objects of VOC's XML files hold beside name, box and difficult.

    Args:
        files: that ``read_voc`` has read; those that are absent are passed over.
    """
    count = 0
    tags: Counter[str] = Counter()
    for file in files:
        if not file.is_file():
            continue
        for node in ET.fromstring(file.read_bytes()).iterfind("object"):
            own = {child.tag for child in node if child.tag not in _KNOWN_TAGS and _says(child)}
            count += bool(own)
            tags.update(own)
    return [Unread(f"of objects: {listed(sorted(tags), 10)}", count)] if count else []


def _says(node: ET.Element) -> bool:
    return len(node) > 0 or (node.text or "").strip().lower() not in _SAYS_NOTHING


def _by_id(entries: list[dict[str, Any]], known: set[str]) -> dict[int, dict[str, Any]]:
    found = {}
    for entry in entries:
        rest = {key: value for key, value in entry.items() if key not in known}
        if rest:
            found[int(entry["id"])] = rest
    return found


def _summary(kind: str, entries: Iterable[Mapping[str, Any]]) -> Unread:
    # Empty values, as "segmentation": [], are no loss.
    filled = [{key for key, value in entry.items() if value not in (None, "", [], {})} for entry in entries]
    keys = sorted(set().union(*filled)) if filled else []
    return Unread(f"of {kind}: {listed(keys, 10)}", sum(1 for these in filled if these))
