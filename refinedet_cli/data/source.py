"""From what a user calls a data set to a `Dataset`, and the part of it that is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from refinedet_cli.data.coco import read_coco
from refinedet_cli.data.dataset import Dataset, listed
from refinedet_cli.data.images import open_regular
from refinedet_cli.errors import DataError

Split = Literal["train", "val", "test"]

_ALIASES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}
_ROBOFLOW = "_annotations.coco.json"
_READ = (
    "read are COCO JSON files, and folders with train, val and test as COCO JSON files or as folders that hold one "
    "(as Roboflow and CVAT export them)"
)
_NAMED = ("coco", "voc2007", "voc2012")


def open_dataset(source: str, *, split: Split, images: Path | None = None) -> Dataset:
    """Open one part of a data set.

    A single JSON file is every part, named itself or by the folder that holds no other; ``find_splits`` tells whether
    there is a part of its own.

    Args:
        source: a COCO JSON file, or a folder with parts.
        split: which part.
        images: the folder that file names are relative to; None looks where exporters put the pictures.

    Raises:
        DataError: the source does not exist, is of a format that is not read, or has no such part, or two of them.
    """
    path = _existing(source)
    if path.is_file():
        return read_coco(path, images, search=_around(path, split))
    found = _annotations(path, split)
    if not found:
        raise _missing_split(path, split)
    if len(found) > 1:
        choices = listed([str(f.relative_to(path)) for f in found])
        raise DataError(f"{path} has more than one {split} part: {choices}", "name the JSON file itself")
    dataset = read_coco(found[0], images, search=(*_around(found[0], split), *_inside(path, split)))
    return dataclasses.replace(dataset, name=f"{path.resolve().name}/{split}")


def find_splits(source: str) -> tuple[Split, ...]:
    """Tell which parts a data set has of its own; a single JSON file has none.

    Raises:
        DataError: the source does not exist or is of a format that is not read.
    """
    path = _existing(source)
    return () if path.is_file() else tuple(split for split in _ALIASES if _annotations(path, split))


def hold_out(dataset: Dataset, *, fraction: float = 0.15, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Part a data set into what is trained on and what is held out to validate.

    The side of a picture depends on the bytes of its file and the seed alone. So copies of a picture, under whatever
    name, fall on one side; the order does not count; and pictures that are added later move none from one side to the
    other, except where a side would have been empty.

    Args:
        dataset: its picture files are read.
        fraction: of the distinct pictures that is held out, on average; between 0 and 1.
        seed: another seed gives another choice.

    Returns:
        the rest and the held-out part, neither empty; together they have every record once.

    Raises:
        DataError: a picture cannot be read, the fraction is out of range, or there are not two distinct pictures.
    """
    if not 0 < fraction < 1:
        raise DataError(f"{fraction} of the pictures cannot be held out", "give a fraction between 0 and 1")
    draws = [_draw(record.path, seed) for record in dataset.records]
    distinct = sorted(set(draws))
    if len(distinct) < 2:
        raise DataError(
            f"{dataset.name} has {len(distinct)} distinct pictures, of which none can be held out to validate",
            "add pictures, or name other data to validate on",
        )
    # The lowest draw is always held out and the highest never, so that neither side is empty.
    limit = min(max(int(fraction * 2**256), distinct[0] + 1), distinct[-1])
    held = [draw < limit for draw in draws]
    note = f"{sum(held):,} of {len(held):,} pictures are held out by content, seed {seed}"
    rest, out = (
        tuple(r for r, is_held in zip(dataset.records, held, strict=True) if is_held is side) for side in (False, True)
    )
    return (
        dataclasses.replace(dataset, records=rest, notes=(*dataset.notes, note)),
        dataclasses.replace(dataset, name=f"{dataset.name} (held out)", records=out, notes=(note,)),
    )


def _draw(picture: Path, seed: int) -> int:
    """A number in [0, 2**256) that is even over pictures and decided by content and seed."""
    with open_regular(picture) as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + content).digest(), "big")


def _existing(source: str) -> Path:
    """The JSON file or folder that is meant."""
    path = Path(source)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{source!r} cannot be read: {error}", "check the path") from error
    if is_folder:
        return _undivided(path) or path
    if path.suffix.lower() in (".yaml", ".yml"):
        raise _not_read(source, "is a YOLO data set" if is_there else "names a YOLO data set")
    if not is_there:
        if source.lower() in _NAMED:
            raise _not_read(source, "names a public data set")
        raise DataError(f"the data set {source} does not exist", f"check the path; {_READ}")
    if path.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        raise DataError(f"{source} is an archive", "unpack it and name the folder")
    if path.suffix.lower() == ".xml":
        raise _not_read(source, "is a VOC annotation")
    if not path.is_file():
        raise DataError(f"{source} is not an ordinary file", "save it as a file first")
    return path


def _not_read(source: object, what: str) -> DataError:
    return DataError(f"{source} {what}, a format that is not read yet", _READ)


def _annotations(folder: Path, split: Split) -> list[Path]:
    """The annotation files of one part of a folder, wherever exporters put them."""
    found: list[Path] = []
    for alias in _ALIASES[split]:
        found += _json_files(folder, rf"{alias}\.json")
        found += _json_files(folder / "annotations", rf"(instances_)?{alias}(20\d\d)?\.json")
        roboflow = folder / alias / _ROBOFLOW
        found += [roboflow] if roboflow.is_file() else _json_files(folder / alias, r".*\.json")
    return found


def _json_files(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(f for f in folder.iterdir() if re.fullmatch(pattern, f.name, re.IGNORECASE) and f.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}", "change its permissions") from error


def _all_json(folder: Path) -> list[Path]:
    return [*_json_files(folder, r".*\.json"), *_json_files(folder / "annotations", r".*\.json")]


def _undivided(folder: Path) -> Path | None:
    """The only annotation file of a folder that has no parts."""
    if any(_annotations(folder, split) for split in _ALIASES):
        return None
    files = _all_json(folder)
    return files[0] if len(files) == 1 else None


def _inside(folder: Path, split: Split) -> list[Path]:
    """Where the pictures of one part of a folder may lie."""
    names = _ALIASES[split]
    years = tuple(f"{name}{year}" for name in names for year in (2017, 2014))
    below = [folder / "images" / name for name in (*names, *years)]
    return [
        *below,
        *(folder / name / "images" for name in names),
        *(folder / name for name in (*names, *years)),
        folder / "images",
        folder,
    ]


def _around(annotations: Path, split: Split) -> Sequence[Path]:
    """Where the pictures of an annotation file may lie, if not beside it."""
    own = annotations.parent
    beside = [own / "images", own / "data", own / annotations.stem]
    if own.name.lower() != "annotations":
        return beside
    stem = annotations.stem.removeprefix("instances_")
    return [*beside, own.parent / "images" / stem, own.parent / stem, *_inside(own.parent, split)]


def _missing_split(folder: Path, split: Split) -> DataError:
    others = [other for other in _ALIASES if other != split and _annotations(folder, other)]
    if others:
        return DataError(f"{folder} has no {split} part, only {listed(others)}", "name the JSON file itself")
    if any((folder / name).is_file() for name in ("data.yaml", "data.yml")):
        return _not_read(folder, "holds a YOLO data set")
    if (folder / "VOCdevkit").is_dir() or ((folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()):
        return _not_read(folder, "is a VOC data set")
    if any(re.fullmatch(r"VOC20\d\d", child.name) for child in folder.iterdir()):
        return _not_read(folder, "holds VOC data sets")
    loose = [str(f.relative_to(folder)) for f in _all_json(folder)]
    if loose:
        return DataError(
            f"{folder} has no {split} part; its JSON files are {listed(loose, 10)}",
            "name the JSON file itself",
        )
    return DataError(f"{folder} has no annotations that are read", _READ)
