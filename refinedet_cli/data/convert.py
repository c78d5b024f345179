"""One data set in another format: written, read back, compared, and what the format cannot hold counted."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import CLIPPED, DROPPED, OUTLINED, SPLIT_NAMES, Dataset, Record, listed
from refinedet_cli.data.files import whole_folder
from refinedet_cli.data.images import image_size
from refinedet_cli.data.kinds import Format
from refinedet_cli.data.placement import (
    Part,
    Placement,
    Transfer,
    Transferred,
    place_for_coco,
    place_for_voc,
    place_for_yolo,
    transfer_pictures,
)
from refinedet_cli.data.records import unused_classes
from refinedet_cli.data.source import Source, describe_source, find_annotations, open_dataset
from refinedet_cli.data.unread import Unread, read_extras, unread_in_coco, unread_in_voc
from refinedet_cli.data.write_coco import Extras, write_coco
from refinedet_cli.data.write_voc import write_voc
from refinedet_cli.data.write_yolo import write_yolo
from refinedet_cli.errors import DataError, UsageError

FORMAT_NAMES: dict[Format, str] = {"coco": "COCO", "voc": "VOC", "yolo": "YOLO"}
# Of a file that holds a data set that is not divided.
WHOLE = "annotations"
_CLOSE = 1e-6  # px
_ROUNDED = 0.05  # square px; areas are commonly written with two decimals
_BLANKS = re.compile("[\t-\r\x1c-\x1f\x85\u2028\u2029\ufeff]+")
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

# What readers do to any data, then what each format lacks, by what is counted when the written data are read back.
_WHY: dict[str, str] = {
    DROPPED: "impossible, without area or outside their picture: they are not read",
    CLIPPED: "they reached out of their picture, and end at its edge now",
    OUTLINED: "they became the boxes around them when they were read",
    "picture ids": "{} has none: pictures are numbered when they are read",
    "object ids": "{} has none: objects are numbered when they are read",
    "class ids": "{} has none: classes are numbered in their order",
    "crowd boxes": "{} has no flag for groups: they are left out, for as objects they would mislead",
    "difficult flags": "{} has no such flag: these are ordinary objects now",
    "areas": "{} has none: an object's area is that of its box now",
    "file names": "{} needs a name for each picture, which tells it from all others",
    "folders": "{} keeps all pictures in one folder",
    "names of classes": "{} has one name a line: line breaks and white space around them are gone",
    "lists of classes": "{} has one list for all parts: it is the union",
}


class Loss(NamedTuple):
    """What the new data set does not hold.

    Attributes:
        what: the kind of thing.
        number: how many.
        why: for people.
    """

    what: str
    number: int
    why: str


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        out: the folder.
        format: of its annotations.
        classes: of all parts.
        parts: each with its name and what was read from the source.
        losses: what it does not hold; empty where nothing is lost.
        notes: of the source, each once.
        pictures: how their files came there.
    """

    out: Path
    format: Format
    classes: Classes
    parts: tuple[Part, ...]
    losses: tuple[Loss, ...]
    notes: tuple[str, ...]
    pictures: Transferred


def convert(
    source: str,
    to: Format,
    out: Path,
    *,
    transfer: Transfer = "copy",
    images: Path | None = None,
    root: Path | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Write a data set in another format, with all its parts.

    What was written is read back and compared with the source before it gets its name: boxes are equal within 1e-6 px,
    classes, their order and flags are equal, and what is not is counted as a loss. Nothing of the source is changed.

    Args:
        source: as for ``open_dataset``.
        to: the new format. Between COCO files further fields are kept as they are.
        out: a folder that does not exist yet or is empty, and not inside the source.
        transfer: pictures are copied, or linked hard, or stay where they are and their folder is linked.
        images: as for ``open_dataset``.
        root: as for ``open_dataset``.
        show: is told how many pictures are done, and of how many.

    Raises:
        DataError: the source cannot be read, or holds something that must be settled first.
        UsageError: ``out`` is not empty, or inside the source.
    """
    described = describe_source(source, root)
    parts = open_parts(source, described, images, root)
    refuse_inside(out, described, parts)
    notes = notes_of(described, parts)
    extras = extras_of(source, described, parts, root)
    losses = Counter[str]()
    for part in parts:
        losses.update(part.dataset.altered)
    unread = _unread(source, described, parts, extras, root)
    if to != "coco":
        parts, changed = _one_list(parts)
        losses.update(changed)
    if to == "yolo":
        parts, left_out = _without_crowds(parts)
        losses["crowd boxes"] += left_out
        _refuse_other_sizes(source, parts)
    total = sum(len(part.dataset) for part in parts)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        show(done, total)

    placement = _PLACE[to](parts, transfer)
    with whole_folder(out) as folder:
        pictures = transfer_pictures(parts, placement, folder, transfer, step)
        _write(to, folder, parts, placement, extras)
        losses.update(_compare(to, folder, parts, placement))
    if to == "voc":
        folders = {record.path.parent for part in parts for record in part.dataset.records}
        losses["folders"] += len(folders) if len(folders) > 1 else 0
    told = [Loss(what, losses[what], why.format(FORMAT_NAMES[to])) for what, why in _WHY.items() if losses[what]]
    if to != "coco":
        told += [Loss(f"fields {one.what}", one.number, "not read by refinedet") for one in unread]
    return Converted(
        out=out,
        format=to,
        classes=parts[0].dataset.classes,
        parts=tuple(parts),
        losses=tuple(told),
        notes=tuple(notes),
        pictures=pictures,
    )


def refuse_inside(out: Path, source: Source, parts: Sequence[Part]) -> None:
    """Refuse to write into the data set itself.

    Raises:
        UsageError: ``out`` is in its folder, or in a folder of its pictures.
    """
    target = out.resolve()
    inside = {record.path.parent for part in parts for record in part.dataset.records}
    inside |= {source.path} if source.path.is_dir() else set()
    for folder in sorted(inside):
        if target.is_relative_to(folder.resolve()):
            raise UsageError(
                f"--out {out} lies in {folder}, which belongs to the data set",
                "name a folder elsewhere: data stay as they are",
            )


def open_parts(source: str, described: Source, images: Path | None, root: Path | None) -> list[Part]:
    """Open all parts of a data set, or the one that is named, or the whole where it is not divided.

    Raises:
        DataError: it cannot be read, or has parts of other names alone.
    """
    if described.splits:
        return [Part(split, open_dataset(source, split=split, images=images, root=root)) for split in described.splits]
    if described.others:
        raise DataError(
            f"{source} has no train, val or test part, only {listed(described.others)}",
            f"name one of them, as {source}:{described.others[0]}",
        )
    name = next((split for split, names in SPLIT_NAMES.items() if described.part in names), None)
    return [Part(name, open_dataset(source, split=name or "train", images=images, root=root))]


def notes_of(described: Source, parts: Sequence[Part]) -> list[str]:
    """Gather what was odd in each part, and name the parts that are not among these."""
    several = len(parts) > 1
    # Which classes are absent from a part is better seen in a table.
    absent = {note for part in parts for note in unused_classes(part.dataset.classes, labels_of(part.dataset))}
    told = [(part, note) for part in parts for note in part.dataset.notes if note not in absent]
    notes = [f"{part.name}: {note}" if several else note for part, note in told]
    if described.others:
        notes.append(
            f"only {listed([part.name or '' for part in parts])} are taken; other parts are "
            f"{listed(described.others, 10)}: name one as {described.path}:{described.others[0]}"
        )
    return notes


def extras_of(source: str, described: Source, parts: Sequence[Part], root: Path | None) -> list[Extras]:
    """Take the further fields of each part out of its file, where that is a COCO JSON."""
    if described.format != "coco":
        return [Extras()] * len(parts)
    files = [find_annotations(source, split=part.name or "train", root=root) for part in parts]
    return [read_extras(file) for file in files]


def labels_of(dataset: Dataset) -> list[int]:
    """List the labels of all objects."""
    return [label for record in dataset.records for label in record.labels.tolist()]


# Reading -------------------------------------------------------------------------------------------------------------


def _unread(
    source: str, described: Source, parts: Sequence[Part], extras: Sequence[Extras], root: Path | None
) -> list[Unread]:
    if described.format == "voc":
        files = []
        for part in parts:
            folder = find_annotations(source, split=part.name or "train", root=root)
            files += [folder / f"{record.path.stem}.xml" for record in part.dataset.records]
        return unread_in_voc(files)
    found: dict[str, int] = defaultdict(int)
    for one in extras:
        for unread in unread_in_coco(one):
            found[unread.what] += unread.number
    return [Unread(what, count) for what, count in found.items()]


# Fitting to a format -------------------------------------------------------------------------------------------------


def _one_list(parts: Sequence[Part]) -> tuple[list[Part], Counter[str]]:
    """Give all parts the same classes, with names that stand in a line."""
    changed = Counter[str]()
    names: dict[str, str] = {}
    for part in parts:
        for name in part.dataset.classes.names:
            names.setdefault(name, _line(name))
    changed["names of classes"] = sum(1 for name, line in names.items() if name != line)
    unique = list(names.values())
    repeated = sorted({line for line in unique if unique.count(line) > 1})
    if repeated:
        raise DataError(
            f"classes have the same name but for white space: {listed(repeated)}", "merge or rename them in the source"
        )
    differ = any(part.dataset.classes.names != parts[0].dataset.classes.names for part in parts)
    changed["lists of classes"] = len(parts) if differ else 0
    ids = parts[0].dataset.classes.category_ids
    classes = Classes(names=tuple(unique), category_ids=ids if len(ids) == len(unique) else tuple(range(len(unique))))
    places = {name: label for label, name in enumerate(names, start=1)}
    return [Part(part.name, _relabel(part.dataset, classes, places)) for part in parts], changed


def _line(name: str) -> str:
    line = _BLANKS.sub(" ", name).strip()
    if not line or _UNFIT.search(line):
        raise DataError(f"the class name {name!r} has characters that cannot be written", "rename the class")
    return line


def _relabel(dataset: Dataset, classes: Classes, places: dict[str, int]) -> Dataset:
    labels: NDArray[np.int64] = np.array([0, *(places[name] for name in dataset.classes.names)], dtype=np.int64)
    records = tuple(dataclasses.replace(record, labels=labels[record.labels]) for record in dataset.records)
    return dataclasses.replace(dataset, classes=classes, records=records)


def _without_crowds(parts: Sequence[Part]) -> tuple[list[Part], int]:
    count = sum(int(record.crowd.sum()) for part in parts for record in part.dataset.records)
    if not count:
        return list(parts), 0
    return [
        Part(
            part.name,
            dataclasses.replace(
                part.dataset, records=tuple(record.select(~record.crowd) for record in part.dataset.records)
            ),
        )
        for part in parts
    ], count


def _refuse_other_sizes(source: str, parts: Sequence[Part]) -> None:
    """YOLO's boxes are fractions of the picture as it is, not of the size that other annotations claim."""
    wrong = []
    for part in parts:
        for record in part.dataset.records:
            found = image_size(record.path)
            if found != (record.width, record.height):
                wrong.append(f"{record.path} is {found[0]} x {found[1]}, not {record.width} x {record.height}")
    if wrong:
        raise DataError(
            f"{counted(len(wrong), 'picture is', 'pictures are')} not of the size that the annotations say, so boxes "
            f"would be off: {wrong[0]}",
            f"correct width and height as the picture is seen, EXIF turned; see refinedet data check {source}",
        )


_PLACE: dict[Format, Callable[[Sequence[Part], Transfer], Placement]] = {
    "coco": place_for_coco,
    "voc": place_for_voc,
    "yolo": place_for_yolo,
}


def _write(to: Format, folder: Path, parts: Sequence[Part], placement: Placement, extras: Sequence[Extras]) -> None:
    classes = parts[0].dataset.classes
    if to == "voc":
        write_voc(folder, parts, classes, placement.names)
    elif to == "yolo":
        write_yolo(folder, [(part.name or "train", part.dataset.records) for part in parts], classes, placement)
    else:
        for part, names, more in zip(parts, placement.file_names, extras, strict=True):
            write_coco(folder / f"{part.name or WHOLE}.json", part.dataset, names, more)


# Comparing -----------------------------------------------------------------------------------------------------------


def _compare(to: Format, folder: Path, parts: Sequence[Part], placement: Placement) -> Counter[str]:
    """Read back what was written and count what is not as it was."""
    lost = Counter[str]()
    for part, names in zip(parts, placement.names, strict=True):
        # What is not divided is the training part of YOLO, and any part of the others.
        back = open_dataset(str(folder), split=part.name or "train")
        there: dict[str, list[Record]] = defaultdict(list)
        for record in back.records:
            there[Path(os.path.relpath(record.path, folder)).as_posix()].append(record)
        if back.classes.names != part.dataset.classes.names or len(back) != len(part.dataset):
            raise _not_the_same(f"{len(back):,} pictures and the classes {listed(back.classes.names)}")
        lost["class ids"] = sum(
            a != b for a, b in zip(back.classes.category_ids, part.dataset.classes.category_ids, strict=True)
        )
        for record, name in zip(part.dataset.records, names, strict=True):
            lost.update(_lost(record, there[name].pop(0), to))
            lost["file names"] += record.path.name != name.rpartition("/")[2]
    return lost


def _lost(record: Record, back: Record, to: Format) -> Counter[str]:
    same = (record.width, record.height, len(record)) == (back.width, back.height, len(back))
    if not (
        same
        and np.array_equal(record.labels, back.labels)
        and np.allclose(record.boxes, back.boxes, rtol=0, atol=_CLOSE)
        and np.array_equal(record.crowd, back.crowd)
        and (to == "yolo" or np.array_equal(record.difficult, back.difficult))
    ):
        raise _not_the_same(f"the objects of {record.path}")
    return Counter(
        {
            "picture ids": int(record.image_id != back.image_id),
            "object ids": int((record.annotation_ids != back.annotation_ids).sum()),
            "difficult flags": int((record.difficult != back.difficult).sum()),
            "areas": int((~np.isclose(record.areas, back.areas, rtol=_CLOSE, atol=_ROUNDED)).sum()),
        }
    )


def _not_the_same(what: str) -> RuntimeError:
    return RuntimeError(f"what was written reads differently: {what}")
