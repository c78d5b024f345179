"""What a data set is made of: the kinds that are recognised, and where each keeps its parts and their pictures."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

from refinedet_cli.data.coco import read_coco
from refinedet_cli.data.dataset import SPLIT_NAMES, Dataset, Split, listed
from refinedet_cli.data.locate import READ, Place
from refinedet_cli.data.public import data_root, describe_archive, refuse_hidden
from refinedet_cli.data.voc import VocFolder, VocPart, find_voc, find_years, read_voc
from refinedet_cli.data.yolo import YoloFile, find_yolo, load_yolo, read_yolo
from refinedet_cli.errors import DataError, UsageError

Format = Literal["coco", "voc", "yolo"]

_ROBOFLOW = "_annotations.coco.json"


class CocoSource(NamedTuple):
    """A COCO JSON, and the folders to search for its pictures where they are not beside it."""

    file: Path
    search: tuple[Path, ...]


class Kind(Protocol):
    """A data set of some format."""

    format: ClassVar[Format]

    def splits(self) -> tuple[Split, ...]:
        """The parts of its own."""

    def others(self) -> tuple[str, ...]:
        """Parts that have other names."""

    def annotations(self, part: str, *, named: bool) -> Path:
        """The file or folder that holds the annotations of a part."""

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read a part; ``named`` if the user named it, so that what is not divided has to refuse."""


def recognise(place: Place, root: Path | None) -> Kind:
    """Tell of what kind a data set is, by the files that are there.

    Args:
        place: what ``locate`` found.
        root: where the folder that a data.yaml names is looked for too.

    Raises:
        DataError: it is of no kind that is read, or its data.yaml is broken.
    """
    path = place.path
    if place.public == "coco":
        return CocoFolder(path)
    if path.is_dir():
        return _recognise_folder(path, root)
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml"):
        return Yolo(load_yolo(path, data_root(root)))
    if kind in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        raise DataError(f"{path} is an archive", "unpack it and name the folder")
    if kind == ".xml":
        raise DataError(f"{path} is the annotation of one picture", "name the folder of the data set")
    if not path.is_file():
        raise DataError(f"{path} is not an ordinary file", "save it as a file first")
    return JsonFile(path)


def _recognise_folder(folder: Path, root: Path | None) -> Kind:
    if any(_annotations(folder, names) for names in SPLIT_NAMES.values()):
        return JsonFolder(folder)
    voc = find_voc(folder) or _one_year(folder)
    if voc is not None:
        return Voc(voc)
    described = find_yolo(folder)
    if described is not None:
        return Yolo(load_yolo(described, data_root(root)))
    files = _all_json(folder)
    if len(files) == 1:
        return JsonFile(files[0])
    if files:
        return JsonFolder(folder)  # Its files are no known parts, but may be named.
    if any((folder / inner).is_dir() for inner in ("labels", "train/labels")):
        raise DataError(
            f"{folder} has label files as YOLO's, but no data.yaml", "write one with names, train and val into it"
        )
    raise DataError(f"{folder} has no annotations that are read", READ)


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
class JsonFile:
    """A single COCO JSON."""

    path: Path
    format: ClassVar[Format] = "coco"

    def splits(self) -> tuple[Split, ...]:
        """None: it is one part."""
        return ()

    def others(self) -> tuple[str, ...]:
        """None."""
        return ()

    def annotations(self, part: str, *, named: bool) -> Path:
        """The file itself."""
        return self.source(part, named=named).file

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read the whole file."""
        file, search = self.source(part, named=named)
        return read_coco(file, images, search=search)

    def source(self, part: str, *, named: bool) -> CocoSource:
        """Give the file itself; a part by its name is refused.

        Raises:
            DataError: ``named``.
        """
        if named:
            raise DataError(f"{self.path} is not divided, so it has no part {part}", f"leave out :{part}")
        return CocoSource(self.path, _around(self.path, _names(part)))


@dataclass(frozen=True)
class JsonFolder:
    """A folder with a COCO JSON for each part."""

    path: Path
    format: ClassVar[Format] = "coco"

    def splits(self) -> tuple[Split, ...]:
        """The parts whose files have usual names."""
        return tuple(split for split, names in SPLIT_NAMES.items() if _annotations(self.path, names))

    def others(self) -> tuple[str, ...]:
        """None: files of other names are opened by their paths."""
        return ()

    def annotations(self, part: str, *, named: bool) -> Path:
        """The only file of a part."""
        return self._only(part, named=named).file

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read the file of a part."""
        file, search = self._only(part, named=named)
        dataset = read_coco(file, images, search=search)
        return dataclasses.replace(dataset, name=f"{self.path.resolve().name}/{part}")

    def sources(self, part: str, *, named: bool) -> tuple[CocoSource, ...]:
        """Find all files that may be a part; there should be one alone.

        Raises:
            DataError: there is none.
        """
        names = (part,) if named and _annotations(self.path, (part,)) else _names(part)
        found = _annotations(self.path, names)
        if not found:
            raise self._missing(part)
        return tuple(CocoSource(file, (*_around(file, names), *_inside(self.path, names))) for file in found)

    def loose(self) -> tuple[CocoSource, ...]:
        """List the JSON files of the folder, of whatever name."""
        return tuple(CocoSource(file, _around(file, (file.stem,))) for file in _all_json(self.path))

    def _only(self, part: str, *, named: bool) -> CocoSource:
        found = self.sources(part, named=named)
        if len(found) > 1:
            choices = listed([str(source.file.relative_to(self.path)) for source in found])
            raise DataError(f"{self.path} has more than one {part} part: {choices}", "name the JSON file itself")
        return found[0]

    def _missing(self, part: str) -> DataError:
        others = self.splits()
        if others:
            return DataError(f"{self.path} has no {part} part, only {listed(others)}", "name the JSON file itself")
        loose = [str(f.relative_to(self.path)) for f in _all_json(self.path)]
        return DataError(
            f"{self.path} has no {part} part; its JSON files are {listed(loose, 10)}", "name the JSON file itself"
        )


@dataclass(frozen=True)
class CocoFolder:
    """COCO in its official layout."""

    path: Path
    format: ClassVar[Format] = "coco"

    def splits(self) -> tuple[Split, ...]:
        """The parts of 2017 that are there."""
        return tuple(split for split in ("train", "val") if self._file(f"{split}2017").is_file())

    def others(self) -> tuple[str, ...]:
        """All that is there besides, as ``val2014``."""
        own = {f"{split}2017" for split in self.splits()}
        return tuple(name for name in self._all() if name not in own)

    def annotations(self, part: str, *, named: bool) -> Path:
        """The file of a part."""
        return self.source(part).file

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read a part; its pictures have to be there."""
        own = self._own(part)
        file, search = self.source(part)
        dataset = read_coco(file, images, search=search)
        if images is None and not dataset.records[0].path.is_file():
            archive = describe_archive(f"{own}.zip")
            raise DataError(
                f"the pictures of coco {own} are neither in {self.path / own} nor in {self.path / 'images' / own}",
                f"unpack {archive} in {self.path}, or name their folder with --images",
            )
        return dataclasses.replace(dataset, name=f"coco/{own}")

    def source(self, part: str) -> CocoSource:
        """Find the file of a part.

        Raises:
            DataError: there is none.
        """
        own = self._own(part)
        file = self._file(own)
        if not file.is_file():
            raise _no_part(self.path, part, self._all())
        return CocoSource(file, _around(file, (own,)))

    def _own(self, part: str) -> str:
        # The usual parts are those of 2017; other files of the folder, as val2014, go by their own names.
        return f"{part}2017" if part in ("train", "val") else part

    def _file(self, part: str) -> Path:
        return self.path / "annotations" / f"instances_{part}.json"

    def _all(self) -> list[str]:
        files = _json_files(self.path / "annotations", r"instances_.*\.json")
        return [file.stem.removeprefix("instances_") for file in files]


@dataclass(frozen=True)
class Voc:
    """A folder in VOC's layout."""

    folder: VocFolder
    format: ClassVar[Format] = "voc"

    def splits(self) -> tuple[Split, ...]:
        """The parts that have lists or folders of their own; none where it is not divided."""
        if not self._is_divided:
            return ()
        return tuple(split for split in SPLIT_NAMES if self.folder.part(split) is not None)

    def others(self) -> tuple[str, ...]:
        """Lists of other names, as ``trainval``."""
        taken = {found.name for split in self.splits() if (found := self.folder.part(split)) is not None}
        return tuple(part.name for part in self.folder.parts if part.name and part.name not in taken)

    def annotations(self, part: str, *, named: bool) -> Path:
        """The folder of XML files of a part."""
        return self.find(part, named=named).annotations

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read the XML files of a part."""
        return read_voc(self.folder, self.find(part, named=named), images)

    def find(self, part: str, *, named: bool) -> VocPart:
        """Find a part; what is not divided is every part that the user did not name.

        Raises:
            DataError: there is no such part, or its annotations are not public.
        """
        root = self.folder.root
        if not self._is_divided and not named:
            return self.folder.parts[0]
        found = self.folder.part(part)
        if found is not None:
            return found
        if root.name == "VOC2012":
            refuse_hidden("voc2012", part)
        raise _no_part(root, part, [p.name for p in self.folder.parts if p.name])

    @property
    def _is_divided(self) -> bool:
        return self.folder.parts[0].name != ""


@dataclass(frozen=True)
class Yolo:
    """A YOLO data set."""

    described: YoloFile
    format: ClassVar[Format] = "yolo"

    def splits(self) -> tuple[Split, ...]:
        """The parts that the file names."""
        return tuple(split for split, _ in self.described.entries)

    def others(self) -> tuple[str, ...]:
        """None."""
        return ()

    def annotations(self, part: str, *, named: bool) -> Path:
        """The data.yaml itself; a part that it does not name is refused."""
        if self.described.part(part) is None:
            raise _no_part(self.described.path, part, [*self.splits()])
        return self.described.path

    def open(self, part: str, images: Path | None, *, named: bool) -> Dataset:
        """Read the label files of a part."""
        self.refuse_images(images)
        self.annotations(part, named=named)
        return read_yolo(self.described, part)

    def refuse_images(self, images: Path | None) -> None:
        """Refuse a folder of pictures.

        Raises:
            UsageError: one is given.
        """
        if images is not None:
            raise UsageError(
                f"--images does not go with {self.described.path}",
                "a YOLO data set names its own folders: leave it out",
            )


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


def _around(annotations: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """Where the pictures of an annotation file may lie, if not beside it."""
    own = annotations.parent
    beside = (own / "images", own / "data", own / annotations.stem)
    if own.name.lower() != "annotations":
        return beside
    stem = annotations.stem.removeprefix("instances_")
    return (*beside, own.parent / "images" / stem, own.parent / stem, *_inside(own.parent, names))
