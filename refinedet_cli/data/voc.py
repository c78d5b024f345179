"""PASCAL VOC folders: one XML file a picture, and lists of pictures as parts.

A VOC box names its corner pixels, counted from 1 and both inside: ``xmin = xmax = 1`` is the first column, one pixel
wide. As xyxy in pixels, edges counted from 0, it is ``(xmin - 1, ymin - 1, xmax, ymax)``; so the area that the VOC
devkit computes, ``(xmax - xmin + 1) * (ymax - ymin + 1)``, is exactly width times height here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from refinedet_cli.core.config import Classes
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import SPLIT_NAMES, Dataset, listed
from refinedet_cli.data.images import image_size, is_empty, is_file, is_picture_name, open_regular
from refinedet_cli.data.records import Objects, Pictures, make_records, picture_ids, unused_classes
from refinedet_cli.data.voc_xml import VocAnnotation, VocObject, read_annotation
from refinedet_cli.errors import DataError

# In the devkit's order, which is also the alphabet's.
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_YEAR = re.compile(r"VOC20[0-9]{2}")
_ANNOTATIONS, _PICTURES = ("Annotations", "annotations"), ("JPEGImages", "images", "Images")
_LABEL_FILES = ("labels.txt", "classes.txt", "labelmap.txt")


@dataclass(frozen=True)
class VocPart:
    """One list of pictures.

    Attributes:
        name: of the list; empty where the folder is not divided.
        annotations: the folder of XML files.
        pictures: the folder of pictures; may be the same.
        listing: the file with one name a line; None takes every XML file of the folder.
    """

    name: str
    annotations: Path
    pictures: Path
    listing: Path | None = None


@dataclass(frozen=True)
class VocFolder:
    """A folder in VOC's layout, with all its parts; at least one."""

    root: Path
    parts: tuple[VocPart, ...]

    def part(self, name: str) -> VocPart | None:
        """Find a part by its name, or by another common one (``valid`` for ``val``)."""
        alike = next((names for names in SPLIT_NAMES.values() if name in names), ())
        return next((part for wanted in (name, *alike) for part in self.parts if part.name == wanted), None)


def find_voc(folder: Path) -> VocFolder | None:
    """Recognise a folder in VOC's layout.

    It holds Annotations and JPEGImages (or images), with lists of pictures in ImageSets/Main or none; or pictures with
    an XML file beside each; or sub-folders train, valid, test of either kind.

    Returns:
        the folder and its parts; a part without lists has an empty name. None where it is nothing of this.

    Raises:
        DataError: a list of pictures cannot be read.
    """
    found = _layout(folder)
    if found is not None:
        listings = [listing for listing in _listings(folder) if _is_part(listing)]
        named = [VocPart(f.stem, found.annotations, found.pictures, f) for f in listings]
        return VocFolder(folder, tuple(named) or (found,))
    below = []
    for name in (name for names in SPLIT_NAMES.values() for name in names):
        inner = _layout(folder / name)
        if inner is not None:
            below.append(VocPart(name, inner.annotations, inner.pictures))
    return VocFolder(folder, tuple(below)) if below else None


def find_years(folder: Path) -> tuple[Path, ...]:
    """List the VOC20xx folders of a VOCdevkit, oldest first."""
    return tuple(sorted(Path(entry) for entry in _scan(folder) if _YEAR.fullmatch(entry.name) and entry.is_dir()))


def read_voc(folder: VocFolder, part: VocPart, images: Path | None = None) -> Dataset:
    """Read the annotations of one part; of the pictures, only headers, and these only where a size is not in the XML.

    Labels are the same in all parts. Where the folder has a labels.txt, classes.txt or labelmap.txt (one name a line),
    they are in its order. Else they are the names in the XML files of all parts, sorted; in a folder named VOC20xx that
    has no others than the official twenty, all of these.

    Difficult objects are kept and marked. VOC itself knows neither groups nor areas of masks; ``iscrowd`` and ``area``
    of an object are taken where ``write_voc`` or another tool has added them. Parts of objects, poses and truncation
    are not read. Boxes whose left or top is 0 are from files that count from 0; they begin at the picture's edge and
    are counted in the notes. Other boxes that are impossible or reach out are dropped or clipped as by ``read_coco``.

    Args:
        folder: what ``find_voc`` found.
        part: one of its parts.
        images: the folder of the pictures; that of the part if None.

    Returns:
        the records in the list's order, or sorted by name. ``image_id`` is the number that is the picture's name, where
        all names of the folder are different numbers, else its place among all annotations of the folder; so it is the
        same in all parts. ``file_name`` is relative to the folder, with forward slashes.

    Raises:
        DataError: an XML file or a picture is missing, broken or contradictory, naming it.
    """
    files = {path: find_xml(path) for path in sorted({part.annotations for part in folder.parts})}
    own = _annotations_of(part, files[part.annotations])
    annotations = {path: read_annotation(path) for path in own.paths}
    classes, notes = _classes(folder, files, annotations)
    reader = VocColumns(
        folder.root, PictureFolder.scan(part.pictures if images is None else _existing(images)), classes
    )
    identities = _identities(files)
    for path, annotation in annotations.items():
        reader.add(identities[path], path, annotation)
    records, checked, altered = make_records(reader.pictures, reader.objects, reader.describe)
    if part.listing is None:
        notes += _left_out(reader.folder, len(records))
    notes += own.notes + reader.notes() + checked + unused_classes(classes, reader.objects.labels)
    return Dataset(f"{folder.root.resolve().name}/{part.name}".rstrip("/"), classes, records, notes, altered)


# The XML files of each folder, by the names of their pictures.
_Files = dict[Path, dict[str, Path]]


class _Annotations(NamedTuple):
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()


# Layout --------------------------------------------------------------------------------------------------------------


def _layout(folder: Path) -> VocPart | None:
    """The folders of XML files and of pictures, or None."""
    for name in _ANNOTATIONS:
        if _has_xml(folder / name):
            pictures = [folder / other for other in _PICTURES if (folder / other).is_dir()]
            return VocPart("", folder / name, pictures[0] if pictures else folder / _PICTURES[0])
    if _has_xml(folder):
        names = [entry.name for entry in _scan(folder)]
        pictures_of = {Path(name).stem for name in names if is_picture_name(name)}
        if any(_is_xml(name) and Path(name).stem in pictures_of for name in names):
            return VocPart("", folder, folder)
    return None


def _scan(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in a folder; nothing where it is none."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}", "change its permissions") from error


def _has_xml(folder: Path) -> bool:
    return any(_is_xml(entry.name) for entry in _scan(folder))


def _is_xml(name: str) -> bool:
    return name.lower().endswith(".xml") and not name.startswith(".")


def _listings(folder: Path) -> list[Path]:
    """The text files that may list pictures."""
    sets = folder / "ImageSets"
    main = sets / "Main" if (sets / "Main").is_dir() else sets
    return sorted(
        Path(e) for e in _scan(main) if e.name.endswith(".txt") and not e.name.startswith(".") and e.is_file()
    )


def _is_part(listing: Path) -> bool:
    """Whether a file lists pictures; the devkit has others beside, of one class each: ``cat_train.txt``, and empty."""
    first = next(iter(read_list(listing)), None)
    of_class = re.fullmatch(r".+_(train|val|trainval|test)", listing.stem) is not None
    return first is not None and not (of_class and re.fullmatch(r"\S+\s+(-1|0|1)", first[1]))


def read_list(listing: Path) -> Iterator[tuple[int, str]]:
    """Read each line that is not blank, with its number; an empty file has none.

    Raises:
        DataError: the file is not UTF-8, or cannot be read.
    """
    if is_empty(listing):
        return
    with open_regular(listing) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                raise DataError(f"{listing}:{number} is not UTF-8", "save the list as UTF-8") from None
            if text:
                yield number, text


def _existing(images: Path) -> Path:
    if not images.is_dir():
        raise DataError(f"the folder of pictures {images} does not exist", "check --images")
    return images


# Which files ---------------------------------------------------------------------------------------------------------


def find_xml(folder: Path) -> dict[str, Path]:
    """List the XML files of a folder, sorted, by the names of their pictures."""
    names = sorted(entry.name for entry in _scan(folder) if _is_xml(entry.name))
    return {Path(name).stem: folder / name for name in names}


def _annotations_of(part: VocPart, there: dict[str, Path]) -> _Annotations:
    """The XML files of a part, each once, in its order."""
    if part.listing is None:
        return _Annotations(tuple(there.values()))
    found: dict[Path, None] = {}
    lines = 0
    for number, name in read_list(part.listing):
        if name not in there:
            raise _no_annotation(part, number, name)
        found[there[name]] = None
        lines += 1
    repeated = lines - len(found)
    notes = (
        (f"{counted(repeated, 'picture is', 'pictures are')} listed more than once in {part.listing.name}",)
        if repeated
        else ()
    )
    return _Annotations(tuple(found), notes)


def _no_annotation(part: VocPart, number: int, name: str) -> DataError:
    if part.name == "test" and part.annotations.parent.name == "VOC2012":
        return DataError(
            f"{part.annotations} has no {name}.xml: the annotations of VOC2012 test are not public",
            "measure on voc2012:val or voc2007:test",
        )
    cure = "copy the file there, or remove the line"
    if "/" in name or is_picture_name(name):
        cure = "a list has one name a line, without folder and extension"
    return DataError(f"{part.listing}:{number} lists {name}, but {part.annotations} has no {name}.xml", cure)


def _identities(files: _Files) -> dict[Path, int]:
    """The number of each picture, whatever part it is in."""
    stems = [stem for there in files.values() for stem in there]
    paths = [path for there in files.values() for path in there.values()]
    return dict(zip(paths, picture_ids(stems), strict=True))


def _left_out(pictures: PictureFolder, count: int) -> tuple[str, ...]:
    more = len(pictures.names) - count
    return (f"{counted(more, 'picture')} of {pictures.path} left out, without XML file",) if more > 0 else ()


# Classes -------------------------------------------------------------------------------------------------------------


def _classes(
    folder: VocFolder, files: _Files, annotations: dict[Path, VocAnnotation]
) -> tuple[Classes, tuple[str, ...]]:
    """The classes of all parts, and where they come from."""
    file = find_labels(folder.root)
    if file is not None:
        return number_classes(file, read_labels(file)), (f"classes are those of {file.name}",)
    names = {thing.name for annotation in annotations.values() for thing in annotation.objects}
    for path in _other_annotations(folder, files, annotations):
        names.update(thing.name for thing in read_annotation(path).objects)
    if are_official(folder.root, names):
        return number_classes(folder.root, VOC_CLASSES), ()
    if not names:
        raise DataError(f"{folder.root}: no XML file has an object", "list the classes in a labels.txt, one a line")
    ordered = tuple(sorted(names))
    return number_classes(folder.root, ordered), (f"classes are the names in the XML files: {listed(ordered)}",)


def find_labels(root: Path) -> Path | None:
    """Find the file that lists the classes of a folder: labels.txt, classes.txt or labelmap.txt."""
    return next((root / name for name in _LABEL_FILES if is_file(root / name)), None)


def are_official(root: Path, names: Set[str]) -> bool:
    """Tell whether the names in the XML files stand for the official twenty: in a VOC20xx folder with no others."""
    return _YEAR.fullmatch(root.resolve().name) is not None and names <= set(VOC_CLASSES)


def number_classes(source: Path, names: Sequence[str]) -> Classes:
    """Number classes from 1 in the order given.

    Raises:
        DataError: there is none, or one is there twice; ``source`` is named.
    """
    if not names:
        raise DataError(f"{source} has no class names", "write one name a line")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{source} has a name twice: {listed(repeated)}", "name each class once")
    return Classes(names=tuple(names), category_ids=tuple(range(1, len(names) + 1)))


def read_labels(file: Path) -> tuple[str, ...]:
    """Read the names of a labels file, or of CVAT's labelmap.txt: ``name:colour:parts:actions``, and background.

    Raises:
        DataError: the file is not UTF-8, or cannot be read.
    """
    lines = [line for _, line in read_list(file)]
    if file.name != "labelmap.txt":
        return tuple(lines)
    names = [line.split(":")[0].strip() for line in lines if not line.startswith("#")]
    return tuple(name for name in names if name != "background")


def _other_annotations(folder: VocFolder, files: _Files, known: dict[Path, VocAnnotation]) -> list[Path]:
    """The XML files of the other parts; what these list and lack is not missed here."""
    others: dict[Path, None] = {}
    for part in folder.parts:
        there = files[part.annotations]
        if part.listing is None:
            others |= dict.fromkeys(there.values())
        else:
            others |= dict.fromkeys(there[name] for _, name in read_list(part.listing) if name in there)
    return [path for path in others if path not in known]


# Columns -------------------------------------------------------------------------------------------------------------


class PictureFolder(NamedTuple):
    """A folder of pictures.

    Attributes:
        path: the folder.
        names: of the pictures in it.
        by_stem: the names that differ in nothing but the extension, by what is before it.
    """

    path: Path
    names: frozenset[str]
    by_stem: dict[str, list[str]]

    @classmethod
    def scan(cls, path: Path) -> PictureFolder:
        """List a folder; one that does not exist has no pictures."""
        names = sorted(entry.name for entry in _scan(path) if is_picture_name(entry.name))
        by_stem: dict[str, list[str]] = {}
        for name in names:
            by_stem.setdefault(Path(name).stem, []).append(name)
        return cls(path, frozenset(names), by_stem)

    def find(self, annotation: Path, file_name: str) -> Path:
        """Find the picture with the XML file's own name, else the one that it names: labelling tools rename at times.

        Args:
            annotation: the XML file.
            file_name: what stands in it; may be empty.

        Raises:
            DataError: there is none, or it may be one of several.
        """
        leaf = re.split(r"[/\\]", file_name)[-1]
        alike = self.by_stem.get(annotation.stem, [])
        if len(alike) == 1:
            return self.path / alike[0]
        if leaf in self.names and (not alike or leaf in alike):
            return self.path / leaf
        if alike:
            raise DataError(
                f"{annotation} may be of {listed([str(self.path / name) for name in alike])}",
                "write the right one into its <filename>, or keep only one",
            )
        raise DataError(
            f"the picture of {annotation} is not in {self.path}: there is no {annotation.stem}.jpg, or .png and so on",
            "copy it there, remove the XML file, or name the folder with --images",
        )


@dataclass
class VocColumns:
    """Gathers pictures and objects as columns.

    Attributes:
        root: the folder that names of pictures are relative to.
        folder: of the pictures.
        classes: objects of others are refused.
        pictures, objects: what was gathered.
        places: file and number of each object, for people.
        from_zero: places of the objects whose boxes begin at 0.
        unsized: pictures whose size is not in their files.
    """

    root: Path
    folder: PictureFolder
    classes: Classes
    pictures: Pictures = field(default_factory=Pictures)
    objects: Objects = field(default_factory=Objects)
    places: list[str] = field(default_factory=list)
    from_zero: list[int] = field(default_factory=list)
    unsized: int = 0

    def __post_init__(self) -> None:
        self.labels = {name: label for label, name in enumerate(self.classes.names, start=1)}
        inside = self.folder.path.is_relative_to(self.root)
        self.prefix = self.folder.path.relative_to(self.root) if inside else Path()

    def add(self, identity: int, path: Path, annotation: VocAnnotation) -> None:
        """Take the objects of one picture."""
        picture = self.folder.find(path, annotation.file_name)
        self.unsized += annotation.size is None
        self.pictures.ids.append(identity)
        self.pictures.names.append((self.prefix / picture.name).as_posix())
        self.pictures.paths.append(picture)
        self.pictures.sizes.append(annotation.size or image_size(picture))
        for number, thing in enumerate(annotation.objects, start=1):
            if thing.name not in self.labels:
                raise DataError(
                    f"{path}: object {number} is of the class {thing.name!r}, which the labels file does not list",
                    f"add it to that file, or rename the object; listed are {listed(self.classes.names)}",
                )
            self.add_object(f"{path.name} object {number}", thing)

    def add_object(self, place: str, thing: VocObject) -> None:
        """Take an object of the last picture; its class has to be known.

        Args:
            place: file and number, for people.
            thing: the object.
        """
        objects = self.objects
        x1, y1, x2, y2 = thing.corners
        left, top = (max(v - 1, 0.0) if 0 <= v < 1 else v - 1 for v in (x1, y1))
        if left > x1 - 1 or top > y1 - 1:
            self.from_zero.append(len(objects.ids))
        self.places.append(place)
        objects.ids.append(len(objects.ids) + 1)
        objects.pictures.append(len(self.pictures.ids) - 1)
        objects.labels.append(self.labels[thing.name])
        objects.boxes.append([left, top, x2 - left, y2 - top])
        objects.areas.append(thing.area)
        objects.crowd.append(thing.crowd)
        objects.difficult.append(thing.difficult)

    def describe(self, places: Sequence[int]) -> str:
        """Name some objects by file and number."""
        return ", ".join(self.places[place] for place in places)

    def notes(self) -> tuple[str, ...]:
        """What was odd in the files."""
        notes = []
        if self.unsized:
            notes.append(f"{self.unsized:,} sizes are not in the XML files and were read from the pictures")
        if self.from_zero:
            more = ", ..." if len(self.from_zero) > 3 else ""
            notes.append(
                f"{counted(len(self.from_zero), 'box begins', 'boxes begin')} at 0, though VOC counts pixels from 1; "
                "their files may count from 0, and boxes be off by one pixel "
                f"({self.describe(self.from_zero[:3])}{more})"
            )
        return tuple(notes)
