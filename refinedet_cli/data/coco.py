"""COCO annotation files, checked entry by entry and read in one pass."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refinedet_cli.core.config import Classes
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, listed
from refinedet_cli.data.images import image_size, is_file, open_regular
from refinedet_cli.data.json_entries import category_names, get, is_number, kind_of, list_of, named, shown, whole
from refinedet_cli.data.listing import links_out
from refinedet_cli.data.records import Objects, Pictures, make_records, unused_classes
from refinedet_cli.errors import DataError


def read_coco(path: Path, images: Path | None = None, *, search: Sequence[Path] = ()) -> Dataset:
    """Read a COCO annotation file; the pictures themselves are not looked at.

    Boxes that are not finite, have no area or lie wholly outside their picture are dropped; others are clipped to it.
    Both are counted in the notes. Classes without objects stay in the list.

    Args:
        path: the JSON file.
        images: the folder that ``file_name`` is relative to; the JSON's own if None.
        search: used where ``images`` is None and the first picture is not in the JSON's own folder but in one of these.

    Returns:
        the records in the file's order, objects of each in the file's order; classes ordered by category id.

    Raises:
        DataError: the file is not what it should be, naming the entry; or a picture would lie outside its folder.
    """
    document = load_document(path)
    classes, labels = _categories(path, list_entries(path, document, "categories"))
    entries = list_entries(path, document, "images")
    root = _root(path, images, entries, search)
    pictures = _pictures(path, entries, root)
    objects = _objects(path, list_entries(path, document, "annotations"), pictures.positions, labels)

    def describe(places: Sequence[int]) -> str:
        return "annotation ids " + ", ".join(str(objects.ids[i]) for i in places)

    records, checked, altered = make_records(pictures, objects, describe)
    notes = (*pictures.notes, *checked, *unused_classes(classes, objects.labels))
    return Dataset(f"{path.resolve().parent.name}/{path.stem}", classes, records, notes, altered)


@dataclass
class _Pictures(Pictures):
    """Entries of ``images``, and the place of each id."""

    positions: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_document(path: Path) -> dict[str, Any]:
    """Read a file as a JSON object.

    Raises:
        DataError: it is missing, no JSON, or no object.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        document = json.loads(content)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(
            f"{path} is not valid JSON ({place}: {error.msg})", "is it a COCO file, and was it copied whole?"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error})", "is it a COCO file, saved as UTF-8?") from None
    if isinstance(document, dict):
        return document
    if isinstance(document, list) and document and isinstance(document[0], dict) and "score" in document[0]:
        raise DataError(f"{path} is a list of COCO results, not a data set", "name the annotation file")
    raise DataError(
        f"{path} holds a JSON {kind_of(document)}, not a COCO data set",
        "expected an object with images, annotations and categories",
    )


def list_entries(path: Path, document: dict[str, Any], key: str) -> list[Any]:
    """Give the list of a document under a key.

    Raises:
        DataError: there is none, or it is no list; ``path`` is named.
    """
    if key not in document:
        raise DataError(
            f"{path} has no {key!r}",
            f"a COCO data set has images, annotations and categories; here are: "
            f"{listed([str(k) for k in document], 10) or 'none'}",
        )
    return list_of(document, key, path)


def _categories(path: Path, entries: list[Any]) -> tuple[Classes, dict[int, int]]:
    """The classes by ascending id, and the label of each id."""
    names = category_names(entries, path)
    ordered = sorted(names)
    classes = Classes(names=tuple(names[i] for i in ordered), category_ids=tuple(ordered))
    return classes, {identity: label for label, identity in enumerate(ordered, start=1)}


def _root(path: Path, images: Path | None, entries: list[Any], search: Sequence[Path]) -> Path:
    """The folder that file names are relative to."""
    if images is not None:
        if not images.is_dir():
            raise DataError(f"the folder of pictures {images} does not exist", "check --images")
        return images
    own = path.parent
    if search and entries:
        name = read_file_name(entries[0], f"{path}: images[0]")
        for folder in (own, *search):
            if is_file(folder / name):
                return folder
    return own


def read_file_name(entry: object, where: str) -> str:
    """Read the path of a picture, relative to the folder of pictures.

    Returns:
        it with forward slashes, not leading upwards.

    Raises:
        DataError: it is absent, malformed, or leads out of the folder; ``where`` is named.
    """
    name = get(entry, "file_name", where)
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: file_name is {shown(name)}", "it must be the path of a picture")
    relative = name.replace("\\", "/")
    if relative.startswith("/") or re.match(r"[A-Za-z]:", relative) or ".." in relative.split("/"):
        raise DataError(
            f"{where}: file_name {shown(name)} leads out of the folder of pictures",
            "use names relative to the JSON's folder, or to the folder given with --images",
        )
    return relative


def _pictures(path: Path, entries: list[Any], root: Path) -> _Pictures:
    found = _Pictures()
    folders: dict[str, list[tuple[str, int]]] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: images[{index}]"
        identity, name = whole(entry, "id", where), read_file_name(entry, where)
        if found.positions.setdefault(identity, index) != index:
            raise DataError(
                f"{where}: image id {identity} is used by images[{found.positions[identity]}] already",
                "give each picture its own id",
            )
        folder, _, leaf = name.rpartition("/")
        folders.setdefault(folder, []).append((leaf, index))
        found.ids.append(identity)
        found.names.append(entry["file_name"])
        found.paths.append(root / name)
    if not entries:
        raise DataError(f"{path} lists no pictures", "is it the right file?")
    _refuse_links_out(path, root, folders, found.paths)
    # After the check of links: a size that is not in the file is read from the picture.
    found.sizes = [
        read_size(entry, f"{path}: images[{index}]") or image_size(found.paths[index])
        for index, entry in enumerate(entries)
    ]
    repeated = sum(count - 1 for count in Counter(found.paths).values())
    if repeated:
        found.notes.append(
            f"{counted(repeated, 'picture is', 'pictures are')} listed more than once, with different ids"
        )
    return found


def read_size(entry: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Read the (width, height) of a picture, px-img; None where either is absent, null or 0.

    Raises:
        DataError: they are no whole numbers, or impossible; ``where`` is named.
    """
    if not entry.get("width") or not entry.get("height"):
        return None
    width, height = whole(entry, "width", where), whole(entry, "height", where)
    if not (0 < width < 2**31 and 0 < height < 2**31):
        raise DataError(f"{where}{named(entry)}: the size is {width} x {height}", "give the picture's size in pixels")
    return width, height


def _refuse_links_out(path: Path, root: Path, folders: dict[str, list[tuple[str, int]]], paths: list[Path]) -> None:
    for _, index in links_out(root, folders):
        raise DataError(
            f"{path}: images[{index}]: {paths[index]} is a link out of the folder of pictures {root}",
            "name the folder that really holds the pictures with --images, or copy them",
        )


def _objects(path: Path, entries: list[Any], positions: dict[int, int], labels: dict[int, int]) -> Objects:
    found = Objects()
    seen: dict[int, int] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: annotations[{index}]"
        identity = whole(entry, "id", where)
        picture, category = whole(entry, "image_id", where), whole(entry, "category_id", where)
        if seen.setdefault(identity, index) != index:
            raise DataError(
                f"{where}: annotation id {identity} is used by annotations[{seen[identity]}] already",
                "give each annotation its own id",
            )
        if picture not in positions:
            raise DataError(
                f"{where} (id {identity}): there is no picture with id {picture}", "add it to images, or fix image_id"
            )
        if category not in labels:
            raise DataError(
                f"{where} (id {identity}): there is no category with id {category}",
                f"add it to categories, or fix category_id; known are {listed([str(i) for i in labels], 20)}",
            )
        found.ids.append(identity)
        found.pictures.append(positions[picture])
        found.labels.append(labels[category])
        found.boxes.append(read_box(entry, where))
        found.areas.append(_area(entry.get("area")))
        crowd = read_flag(entry, "iscrowd", where)
        found.crowd.append(crowd)
        # Many writers set "ignore" on every crowd, which says nothing more.
        found.difficult.append(
            read_flag(entry, "difficult", where) or (read_flag(entry, "ignore", where) and not crowd)
        )
    return found


def read_box(entry: dict[str, Any], where: str) -> list[float]:
    """Read a box: left, top, width, height, px-img, as given; NaN for null.

    Raises:
        DataError: it is absent, or not four numbers; ``where`` is named.
    """
    box = get(entry, "bbox", where)
    # null stands for NaN in JSON that was written by the book; such a box is dropped and counted.
    if not isinstance(box, list) or len(box) != 4 or not all(v is None or is_number(v) for v in box):
        raise DataError(
            f"{where}{named(entry)}: bbox is {shown(box)}", "it must be four numbers: left, top, width, height"
        )
    return [float("nan") if v is None else float(v) for v in box]


def _area(value: object) -> float:
    """The area as given, or NaN where it is absent or no area."""
    if is_number(value) and 0 < float(value) < float("inf"):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    return float("nan")


def read_flag(entry: dict[str, Any], key: str, where: str) -> bool:
    """Read a mark; what is absent is not set.

    Raises:
        DataError: it is neither 0 nor 1; ``where`` is named.
    """
    value = entry.get(key)
    if value is None or value is False or value is True:
        return bool(value)
    if type(value) in (int, float) and value in (0, 1):
        return bool(value)
    raise DataError(f"{where}{named(entry)}: {key} is {shown(value)}", "it must be 0 or 1")
