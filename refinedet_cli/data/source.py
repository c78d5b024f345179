"""From what a user calls a data set to a `Dataset`, and the part of it that is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from refinedet_cli.data.coco import read_coco
from refinedet_cli.data.dataset import SPLIT_NAMES, Dataset, Split, listed
from refinedet_cli.data.images import open_regular
from refinedet_cli.data.public import PUBLIC_SETS, data_root, describe_archive, find_public, refuse_hidden
from refinedet_cli.data.voc import VocFolder, find_voc, find_years, read_voc
from refinedet_cli.data.yolo import YoloFile, find_yolo, load_yolo, read_yolo
from refinedet_cli.errors import DataError, UsageError

_ROBOFLOW = "_annotations.coco.json"
_READ = (
    "read are COCO JSON files, folders with train, val and test, VOC folders (Annotations and JPEGImages), a YOLO "
    f"data.yaml, and the names {listed(PUBLIC_SETS)}"
)


def open_dataset(source: str, *, split: Split, images: Path | None = None, root: Path | None = None) -> Dataset:
    """Open one part of a data set.

    What has no parts (a single JSON file, VOC annotations without lists) is every part; ``find_splits`` tells whether
    there is a part of its own. Of VOC, train is ``train.txt`` alone, so that nothing of val is in it; what has another
    name, as ``trainval``, is opened by that name.

    Args:
        source: a COCO JSON; a folder with parts; a VOC folder; a YOLO data.yaml or its folder; or the name of a public
            data set. With ``:PART`` at its end, that part is opened whatever ``split`` says.
        split: which part.
        images: the folder that file names are relative to; None looks where exporters put the pictures.
        root: where public data sets lie; None takes $REFINEDET_DATA, else ./datasets.

    Raises:
        DataError: the source does not exist, is of a format that is not read, or has no such part, or two of them.
        UsageError: ``images`` is given for a format that names its own folders.
    """
    place = _locate(source, root, split)
    return _recognise(place, root).open(place.part or split, images, named=place.part is not None)


def find_splits(source: str, root: Path | None = None) -> tuple[Split, ...]:
    """Tell which parts a data set has of its own; one that is not divided, or one part by its name, has none.

    Raises:
        DataError: the source does not exist or is of a format that is not read.
    """
    place = _locate(source, root)
    kind = _recognise(place, root)
    return () if place.part is not None else kind.splits()


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


# Where it lies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """What a user named: a file or folder that exists, the part, and the name if it is a public data set."""

    path: Path
    part: str | None = None
    public: str | None = None


def _locate(source: str, root: Path | None, split: Split | None = None) -> _Place:
    """Find what is meant; a file or folder of that very name goes first, colon and all."""
    if _exists(source):
        return _Place(Path(source))
    name, part = _parted(source)
    if part is not None and _exists(name):
        return _Place(Path(name), part)
    if name.lower() in PUBLIC_SETS:
        public = name.lower()
        refuse_hidden(public, part or split or "")  # First of all, before gigabytes are fetched in vain.
        return _Place(find_public(public, root), part, public)
    raise DataError(f"the data set {source} does not exist", f"check the path; {_READ}")


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{source!r} cannot be read: {error}", "check the path") from error


def _parted(source: str) -> tuple[str, str | None]:
    """Take the part off the end; a colon in the middle of a path, or behind a drive's letter, begins none."""
    name, _, part = source.rpartition(":")
    is_drive = len(name) == 1 and name.isalpha() and not Path(name).exists()
    if not name or not part or is_drive or "/" in part or "\\" in part:
        return source, None
    return name, part


# What it is ----------------------------------------------------------------------------------------------------------


class _Kind(Protocol):
    """A data set of some format."""

    def splits(self) -> tuple[Split, ...]:
        """The parts of its own."""

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read a part; ``named`` if the user named it, so that what is not divided has to refuse."""


def _recognise(place: _Place, root: Path | None) -> _Kind:
    path = place.path
    if place.public == "coco":
        return _Coco(path)
    if path.is_dir():
        return _recognise_folder(path, root)
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml"):
        return _Yolo(load_yolo(path, data_root(root)))
    if kind in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        raise DataError(f"{path} is an archive", "unpack it and name the folder")
    if kind == ".xml":
        raise DataError(f"{path} is the annotation of one picture", "name the folder of the data set")
    if not path.is_file():
        raise DataError(f"{path} is not an ordinary file", "save it as a file first")
    return _JsonFile(path)


def _recognise_folder(folder: Path, root: Path | None) -> _Kind:
    if any(_annotations(folder, names) for names in SPLIT_NAMES.values()):
        return _JsonFolder(folder)
    voc = find_voc(folder) or _one_year(folder)
    if voc is not None:
        return _Voc(voc)
    described = find_yolo(folder)
    if described is not None:
        return _Yolo(load_yolo(described, data_root(root)))
    files = _all_json(folder)
    if len(files) == 1:
        return _JsonFile(files[0])
    if files:
        return _JsonFolder(folder)  # Its files are no known parts, but may be named.
    if any((folder / inner).is_dir() for inner in ("labels", "train/labels")):
        raise DataError(
            f"{folder} has label files as YOLO's, but no data.yaml", "write one with names, train and val into it"
        )
    raise DataError(f"{folder} has no annotations that are read", _READ)


def _one_year(folder: Path) -> VocFolder | None:
    """The only VOC20xx folder of a VOCdevkit, or of the folder that holds it."""
    years = find_years(folder) or find_years(folder / "VOCdevkit")
    found = [voc for year in years if (voc := find_voc(year)) is not None]
    if years and not found:
        raise DataError(f"{years[0]} has no Annotations folder with XML files", "was the archive unpacked whole?")
    if len(found) > 1:
        raise DataError(
            f"{folder} holds {listed([voc.root.name for voc in found])}",
            f"name one of them, as {found[0].root}; train joins several --data",
        )
    return found[0] if found else None


@dataclass(frozen=True)
class _JsonFile:
    """A single COCO JSON."""

    path: Path

    def splits(self) -> tuple[Split, ...]:
        return ()

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        if named:
            raise DataError(f"{self.path} is not divided, so it has no part {part}", f"leave out :{part}")
        return read_coco(self.path, images, search=_around(self.path, _names(part)))


@dataclass(frozen=True)
class _JsonFolder:
    """A folder with a COCO JSON for each part."""

    path: Path

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split, names in SPLIT_NAMES.items() if _annotations(self.path, names))

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        names = (part,) if named and _annotations(self.path, (part,)) else _names(part)
        found = _annotations(self.path, names)
        if not found:
            raise self._missing(part)
        if len(found) > 1:
            choices = listed([str(f.relative_to(self.path)) for f in found])
            raise DataError(f"{self.path} has more than one {part} part: {choices}", "name the JSON file itself")
        dataset = read_coco(found[0], images, search=(*_around(found[0], names), *_inside(self.path, names)))
        return dataclasses.replace(dataset, name=f"{self.path.resolve().name}/{part}")

    def _missing(self, part: str) -> DataError:
        others = self.splits()
        if others:
            return DataError(f"{self.path} has no {part} part, only {listed(others)}", "name the JSON file itself")
        loose = [str(f.relative_to(self.path)) for f in _all_json(self.path)]
        return DataError(
            f"{self.path} has no {part} part; its JSON files are {listed(loose, 10)}", "name the JSON file itself"
        )


@dataclass(frozen=True)
class _Coco:
    """COCO in its official layout."""

    path: Path

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in ("train", "val") if self._file(f"{split}2017").is_file())

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        # The usual parts are those of 2017; other files of the folder, as val2014, go by their own names.
        own = f"{part}2017" if part in ("train", "val") else part
        file = self._file(own)
        if not file.is_file():
            others = _json_files(self.path / "annotations", r"instances_.*\.json")
            raise _no_part(self.path, part, [other.stem.removeprefix("instances_") for other in others])
        dataset = read_coco(file, images, search=_around(file, (own,)))
        if images is None and not dataset.records[0].path.is_file():
            archive = describe_archive(f"{own}.zip")
            raise DataError(
                f"the pictures of coco {own} are neither in {self.path / own} nor in {self.path / 'images' / own}",
                f"unpack {archive} in {self.path}, or name their folder with --images",
            )
        return dataclasses.replace(dataset, name=f"coco/{own}")

    def _file(self, part: str) -> Path:
        return self.path / "annotations" / f"instances_{part}.json"


@dataclass(frozen=True)
class _Voc:
    """A folder in VOC's layout."""

    folder: VocFolder

    def splits(self) -> tuple[Split, ...]:
        if not self._is_divided:
            return ()
        return tuple(split for split in SPLIT_NAMES if self.folder.part(split) is not None)

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        root = self.folder.root
        if not self._is_divided and not named:
            return read_voc(self.folder, self.folder.parts[0], images)
        found = self.folder.part(part)
        if found is not None:
            return read_voc(self.folder, found, images)
        if root.name == "VOC2012":
            refuse_hidden("voc2012", part)
        raise _no_part(root, part, [p.name for p in self.folder.parts if p.name])

    @property
    def _is_divided(self) -> bool:
        return self.folder.parts[0].name != ""


@dataclass(frozen=True)
class _Yolo:
    """A YOLO data set."""

    described: YoloFile

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split, _ in self.described.entries)

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        if images is not None:
            raise UsageError(
                f"--images does not go with {self.described.path}",
                "a YOLO data set names its own folders: leave it out",
            )
        if self.described.part(part) is None:
            raise _no_part(self.described.path, part, [*self.splits()])
        return read_yolo(self.described, part)


def _no_part(path: Path, part: str, others: Sequence[str]) -> DataError:
    if not others:
        return DataError(f"{path} is not divided, so it has no part {part}", f"leave out :{part}")
    cure = f"name another, as {path}:{'trainval' if part == 'train' and 'trainval' in others else others[0]}"
    if path.name == "VOC2007" and part == "test":
        cure += f"; the official test part comes with {describe_archive('VOCtest_06-Nov-2007.tar')}"
    return DataError(f"{path} has no {part} part, only {listed(others)}", cure)


def _names(part: str) -> tuple[str, ...]:
    """What a part may be called."""
    return next((names for names in SPLIT_NAMES.values() if part in names), (part,))


# COCO JSON in folders ------------------------------------------------------------------------------------------------


def _annotations(folder: Path, names: Sequence[str]) -> list[Path]:
    """The annotation files of one part of a folder, wherever exporters put them."""
    found: list[Path] = []
    for name in names:
        found += _json_files(folder, rf"(instances_)?{re.escape(name)}\.json")
        found += _json_files(folder / "annotations", rf"(instances_)?{re.escape(name)}(20\d\d)?\.json")
        roboflow = folder / name / _ROBOFLOW
        found += [roboflow] if roboflow.is_file() else _json_files(folder / name, r".*\.json")
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


def _inside(folder: Path, names: Sequence[str]) -> list[Path]:
    """Where the pictures of one part of a folder may lie."""
    years = tuple(f"{name}{year}" for name in names for year in (2017, 2014))
    below = [folder / "images" / name for name in (*names, *years)]
    return [
        *below,
        *(folder / name / "images" for name in names),
        *(folder / name for name in (*names, *years)),
        folder / "images",
        folder,
    ]


def _around(annotations: Path, names: Sequence[str]) -> Sequence[Path]:
    """Where the pictures of an annotation file may lie, if not beside it."""
    own = annotations.parent
    beside = [own / "images", own / "data", own / annotations.stem]
    if own.name.lower() != "annotations":
        return beside
    stem = annotations.stem.removeprefix("instances_")
    return [*beside, own.parent / "images" / stem, own.parent / stem, *_inside(own.parent, names)]
