"""YOLO data sets: a data.yaml that names folders of pictures and classes, and a text file of boxes beside each picture.

A row is ``class cx cy w h``: the class by its number from 0, then the box's centre and size as fractions of the
picture's width and height as seen. A row with more numbers is the outline ``class x1 y1 x2 y2 ...`` of an object.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Comes with huggingface-hub; it has no annotations of its own.
import yaml  # type: ignore[import-untyped]

from refinedet_cli.core.config import Classes
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import OUTLINED, SPLIT_NAMES, Dataset, Split, listed
from refinedet_cli.data.images import image_size, is_empty, is_file, open_regular, real_path
from refinedet_cli.data.listing import find_images
from refinedet_cli.data.records import Objects, Pictures, make_records, picture_ids, unused_classes
from refinedet_cli.errors import DataError

_NONE = ("", "~", "null", "Null", "NULL")
_NAN = float("nan")
# Of numbers of classes and their count; no list of names is longer, and Python refuses to read thousands of digits.
_DIGITS = 6


@dataclass(frozen=True)
class YoloFile:
    """A data.yaml, read and checked; folders and pictures are not yet looked at.

    Attributes:
        path: the file.
        root: the folder that its entries are relative to.
        classes: in the order of their numbers, which are the category ids.
        entries: for each part that the file names, its folders and lists as written.
        notes: what looks odd.
    """

    path: Path
    root: Path
    classes: Classes
    entries: tuple[tuple[Split, tuple[str, ...]], ...]
    notes: tuple[str, ...] = ()

    def part(self, name: str) -> tuple[str, ...] | None:
        """Find the entries of a part by its name, or by another common one (``valid`` for ``val``)."""
        return next((entries for split, entries in self.entries if name in SPLIT_NAMES[split]), None)


def find_yolo(folder: Path) -> Path | None:
    """Find the file that describes a folder's data set: data.yaml, or the only YAML file with class names."""
    for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml"):
        if (folder / name).is_file():
            return folder / name
    found = [f for pattern in ("*.yaml", "*.yml") for f in folder.glob(pattern) if f.is_file() and _has_names(f)]
    return found[0] if len(found) == 1 else None


def load_yolo(path: Path, root: Path | None = None) -> YoloFile:
    """Read a data.yaml.

    Args:
        path: the file.
        root: where a relative ``path`` in it is looked for too, after the file's own folder.

    Raises:
        DataError: it is missing, no YAML, or its names and numbers of classes do not fit.
    """
    document = _load(path)
    if "kpt_shape" in document:
        raise DataError(f"{path} describes key points (kpt_shape), which are not read", "export plain boxes")
    classes, notes = _classes(path, document)
    entries = []
    for split, names in SPLIT_NAMES.items():
        key = next((name for name in names if _strings(document.get(name))), None)
        if key is not None:
            entries.append((split, _strings(document[key])))
    if not entries:
        raise DataError(f"{path} names no train, val or test", "add the folders of pictures, as: train: images/train")
    return YoloFile(path, _root(path, document, root), classes, tuple(entries), notes)


def read_yolo(described: YoloFile, part: str) -> Dataset:
    """Read one part: the header of each picture, and its label file.

    The label file of ``images/a.jpg`` is ``labels/a.txt``: the last ``images`` in the path makes way for ``labels``;
    without such a folder it lies beside the picture. A picture whose label file is empty or missing has no objects;
    missing ones are counted in the notes. An outline becomes the box around it, with the outline's area.

    Boxes that are impossible or reach out are dropped or clipped as by ``read_coco``.

    Args:
        described: what ``load_yolo`` gave.
        part: one of those it names.

    Returns:
        the records sorted by folder and name, or in the order of the lists. ``image_id`` is the number that is the
        picture's name, where all names of the part are different numbers, else 1, 2, ... in this order. ``file_name``
        is relative to the data set's folder (or one above, where pictures lie outside it), with forward slashes.

    Raises:
        DataError: a folder, list or picture is missing or broken; a row has no known class or no numbers; or not one
            label file, or not one box inside its picture, was found.
    """
    entries = described.part(part)
    if entries is None:
        raise DataError(f"{described.path} names no {part} part", f"add {part}: and its folder of pictures")
    sources = [resolve_entry(described, entry) for entry in entries]
    paths = [path for source in sources for path in list_pictures(source, described.root)]
    unique = list(dict.fromkeys(paths))
    notes = list(described.notes) + _same_as_training(described, part, entries)
    if len(unique) < len(paths):
        notes.append(f"{counted(len(paths) - len(unique), 'picture is', 'pictures are')} listed more than once")
    reader = YoloColumns(described)
    reader.read(unique)
    records, checked, altered = make_records(reader.pictures, reader.objects, reader.describe)
    if reader.objects.ids and not any(len(record) for record in records):
        raise DataError(
            f"of {counted(len(reader.objects.ids), 'box', 'boxes')} of {described.path} ({part}), none lies in its "
            "picture",
            "boxes are fractions of the picture's width and height, between 0 and 1; are these pixels?",
        )
    notes += [*reader.notes(), *checked, *unused_classes(described.classes, reader.objects.labels)]
    if reader.outlines:
        altered[OUTLINED] = reader.outlines
    return Dataset(f"{described.root.resolve().name}/{part}", described.classes, records, tuple(notes), altered)


# data.yaml -----------------------------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        content = file.read()
    try:
        # Leaves every value a string: of the class names, "no" is not false and "010" not 8. It makes no objects.
        document = yaml.load(content, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}: {getattr(error, 'problem', '')})" if mark is not None else ""
        raise DataError(f"{path} is not valid YAML{place}", "mend it, or export it again") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} is not a YOLO data set", "expected train, val and names")
    return document


def _has_names(path: Path) -> bool:
    try:
        return "names" in _load(path)
    except DataError:
        return False


def _strings(value: object) -> tuple[str, ...]:
    """A string, or a list of them; empty for anything else."""
    found = value if isinstance(value, list) else [value]
    return tuple(v for v in found if isinstance(v, str) and v not in _NONE)


def _shown(value: object) -> str:
    # Never what lies inside a list: by references to itself, a short file can make it endless.
    return repr(value if len(value) <= 80 else f"{value[:77]}...") if isinstance(value, str) else "a list"


def _classes(path: Path, document: dict[str, Any]) -> tuple[Classes, tuple[str, ...]]:
    count = document.get("nc")
    if count is not None and not (isinstance(count, str) and _is_class_number(count) and int(count) > 0):
        raise DataError(f"{path}: nc is {_shown(count)}", "it must be the number of classes")
    given = document.get("names")
    if given is None:
        if count is None:
            raise DataError(f"{path} has no names", "list the classes, as: names: [cat, dog]")
        names = {number: f"class {number}" for number in range(int(count))}
        return _numbered(names), (f"{path.name} has no names: classes are called class 0, class 1, ...",)
    names = _names(path, given)
    if count is not None and int(count) != len(names):
        raise DataError(f"{path}: nc is {count}, but there are {len(names)} names", "correct one of them")
    return _numbered(names), ()


def _is_class_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _DIGITS


def _numbered(names: dict[int, str]) -> Classes:
    ordered = sorted(names)
    return Classes(names=tuple(names[number] for number in ordered), category_ids=tuple(ordered))


def _names(path: Path, given: object) -> dict[int, str]:
    """The name of each class by its number."""
    names: dict[int, str] = {}
    for key, name in _named(path, given):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: the name of class {key} is {_shown(name)}", "give the class a name")
        if not _is_class_number(key):
            raise DataError(f"{path}: names has {key[:80]!r}", "number the classes from 0, as: 0: cat")
        if name.strip() in names.values():
            raise DataError(f"{path}: the name {name!r} is there twice", "name each class once")
        names[int(key)] = name.strip()
    return names


def _named(path: Path, given: object) -> list[tuple[str, object]]:
    if isinstance(given, dict) and given:
        return [(str(key), name) for key, name in given.items()]
    if isinstance(given, list) and given:
        return [(str(number), name) for number, name in enumerate(given)]
    raise DataError(f"{path}: names is no list of classes", "write it as: names: [cat, dog]")


def _root(path: Path, document: dict[str, Any], root: Path | None) -> Path:
    """The folder that the entries are relative to."""
    value = document.get("path")
    if value is None or value in _NONE:
        return path.parent
    if not isinstance(value, str):
        raise DataError(f"{path}: path is {_shown(value)}", "it must be the folder of the data set")
    candidates = [path.parent / value] + ([root / value] if root is not None else [])
    for candidate in dict.fromkeys(candidates):
        if os.path.isdir(candidate):  # noqa: PTH112 - Path.is_dir raises for names that are too long
            return candidate
    raise DataError(
        f"{path}: the folder {value} (path) does not exist; looked at {listed([str(c) for c in candidates])}",
        "correct path, or remove it where the pictures lie beside the file",
    )


def resolve_entry(described: YoloFile, entry: str) -> Path:
    """Find a folder or list: as written, else by the habits of exporters.

    Roboflow writes ``../train/images``, or the folder's own name in front, for what lies beside the file.

    Raises:
        DataError: it does not exist, or is a folder that the data set lies in.
    """
    parts = Path(entry.replace("\\", "/")).parts
    candidates = [described.root / Path(*parts)]
    if len(parts) > 1 and parts[0] in ("..", described.root.resolve().name):
        candidates.append(described.root / Path(*parts[1:]))
    for candidate in candidates:
        if os.path.exists(candidate):  # noqa: PTH110 - as above
            return _refuse_above(described, entry, candidate)
    raise DataError(
        f"{described.path} names {entry}, which does not exist; looked at {listed([str(c) for c in candidates])}",
        "correct the entry, or path, or remove the line if there is no such part",
    )


def _refuse_above(described: YoloFile, entry: str, source: Path) -> Path:
    """Refuse a folder that the data set lies in: a whole disk may be searched for pictures then."""
    top, real = real_path(described.root), real_path(source)
    if top != real and top.is_relative_to(real):
        raise DataError(
            f"{described.path} names {entry}, which is a folder above the data set", "name the folder of the pictures"
        )
    return source


def _same_as_training(described: YoloFile, part: str, entries: tuple[str, ...]) -> list[str]:
    same = described.part("train") == entries and part not in SPLIT_NAMES["train"]
    return [f"{described.path.name} names the same pictures for train and {part}"] if same else []


# Pictures ------------------------------------------------------------------------------------------------------------


def list_pictures(source: Path, root: Path) -> list[Path]:
    """List the pictures of a folder, with all its folders, or of a list of pictures.

    Args:
        source: the folder, or the list.
        root: what paths in a list may be relative to besides the list's own folder.

    Raises:
        DataError: it is neither, or cannot be read, or a picture of the list does not exist.
    """
    if source.is_dir():
        return [image.path for image in find_images([str(source)])]
    if source.suffix.lower() == ".txt":
        return list(_listed_pictures(source, root))
    raise DataError(f"{source} is neither a folder nor a list of pictures (.txt)", "name the folder of the pictures")


def _listed_pictures(listing: Path, root: Path) -> Iterator[Path]:
    for number, line in read_rows(listing):
        path = Path(line.replace("\\", "/"))
        # Lists are written relative to themselves or to the data set's folder; absolute paths stay what they are.
        candidates = [listing.parent / path, root / path]
        found = next((candidate for candidate in candidates if is_file(candidate)), None)
        if found is None:
            raise DataError(
                f"{listing}:{number} lists {line}, which does not exist",
                "write paths that are relative to the list, or to the data set's folder",
            )
        yield found


def read_rows(path: Path) -> list[tuple[int, str]]:
    """Read the lines of a text file that are not blank, with their numbers; an empty file has none.

    Raises:
        DataError: the file is not UTF-8, or cannot be read.
    """
    if is_empty(path):
        return []
    with open_regular(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8") from None
    return [(number, line) for number, raw in enumerate(text.splitlines(), start=1) if (line := raw.strip())]


def _common(root: Path, paths: Sequence[Path]) -> Path:
    """The data set's folder, or the nearest above it that holds all pictures too."""
    top = root.resolve()
    folders = {Path(os.path.normpath(Path.cwd() / path.parent)) for path in paths}
    real = [folder.resolve() if not folder.is_relative_to(top) else folder for folder in folders]
    return Path(os.path.commonpath([top, *real]))


# Labels --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelFolder:
    """The folder of the label files of a folder of pictures, and their names."""

    folder: Path
    names: frozenset[str]

    @classmethod
    def of(cls, pictures: Path) -> LabelFolder:
        """Find where the label files of a folder of pictures lie, and list them."""
        parts = pictures.parts
        folder = pictures
        if "images" in parts:
            last = len(parts) - 1 - parts[::-1].index("images")
            replaced = Path(*parts[:last], "labels", *parts[last + 1 :])
            # An "images" further up, outside the data set, means nothing.
            folder = replaced if replaced.is_dir() else pictures
        return cls(folder, frozenset(entry.name for entry in os.scandir(folder) if entry.name.endswith(".txt")))


@dataclass
class YoloColumns:
    """Gathers pictures and objects as columns.

    Attributes:
        described: the data set.
        pictures, objects: what was gathered.
        places: file and line of each object.
        unlabelled: names of pictures without a label file.
        outlines: objects that were given by an outline.
    """

    described: YoloFile
    pictures: Pictures = field(default_factory=Pictures)
    objects: Objects = field(default_factory=Objects)
    places: list[tuple[Path, int]] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    outlines: int = 0

    def __post_init__(self) -> None:
        ids = self.described.classes.category_ids
        self.labels = {number: label for label, number in enumerate(ids, start=1)}

    def read(self, paths: Sequence[Path]) -> None:
        """Take all pictures with their objects."""
        folders: dict[Path, LabelFolder] = {}
        top = _common(self.described.root, paths)
        ids = picture_ids([path.stem for path in paths])
        for identity, path in zip(ids, paths, strict=True):
            labels = folders.get(path.parent) or folders.setdefault(path.parent, LabelFolder.of(path.parent))
            self._add_picture(identity, path, labels, top)
        if paths and len(self.unlabelled) == len(paths):
            labels = folders[paths[0].parent]
            raise DataError(
                f"no picture of {self.described.path} has a label file; of {paths[0]} it would be "
                f"{labels.folder / (paths[0].stem + '.txt')}",
                "put the label files into labels/, or beside the pictures",
            )

    def _add_picture(self, identity: int, path: Path, labels: LabelFolder, top: Path) -> None:
        name = _relative(path, top)
        size = image_size(path)
        self.pictures.ids.append(identity)
        self.pictures.names.append(name)
        self.pictures.paths.append(path)
        self.pictures.sizes.append(size)
        leaf = path.stem + ".txt"
        if leaf not in labels.names:
            self.unlabelled.append(name)
            return
        file = labels.folder / leaf
        for number, line in read_rows(file):
            self.add_object(file, number, line.split(), size)

    def add_object(self, file: Path, number: int, words: list[str], size: tuple[int, int]) -> None:
        """Take an object of the last picture.

        Args:
            file: the label file.
            number: of the row.
            words: of the row.
            size: (width, height) of the picture, px-img; boxes are fractions if it is (1, 1).

        Raises:
            DataError: the row has no known class, or not the right numbers.
        """
        where = f"{file}:{number}"
        label = self._label(where, words[0])
        values = _values(where, words)
        objects = self.objects
        box, area = (values, _NAN) if len(values) == 4 else _around(values)
        self.outlines += len(values) > 4
        cx, cy, w, h = box
        width, height = size
        self.places.append((file, number))
        objects.ids.append(len(objects.ids) + 1)
        objects.pictures.append(len(self.pictures.ids) - 1)
        objects.labels.append(label)
        objects.boxes.append([(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height])
        objects.areas.append(area * width * height)
        objects.crowd.append(False)
        objects.difficult.append(False)

    def _label(self, where: str, word: str) -> int:
        try:
            number = float(word)
        except ValueError:
            number = _NAN
        # Some tools write 3.0.
        if not number.is_integer():
            raise DataError(f"{where}: the class is {word!r}", "a row begins with the number of its class")
        label = self.labels.get(int(number))
        if label is None:
            known = listed([str(n) for n in self.labels], 20)
            raise DataError(f"{where}: there is no class {word}", f"{self.described.path.name} has the classes {known}")
        return label

    def describe(self, places: Sequence[int]) -> str:
        """Name some objects by file and line."""
        return ", ".join(f"{self.places[place][0].name}:{self.places[place][1]}" for place in places)

    def notes(self) -> tuple[str, ...]:
        """What was odd in the files."""
        notes = []
        if self.unlabelled:
            examples = listed(self.unlabelled[:3]) + (", ..." if len(self.unlabelled) > 3 else "")
            notes.append(
                f"{counted(len(self.unlabelled), 'picture')} without label file, counted as empty ({examples})"
            )
        if self.outlines:
            outlines = counted(
                self.outlines, "outline became the box around it", "outlines became the boxes around them"
            )
            notes.append(outlines)
        return tuple(notes)


def _relative(path: Path, top: Path) -> str:
    own = Path(os.path.normpath(Path.cwd() / path))
    if not own.is_relative_to(top):  # A folder on the way is a link.
        own = own.parent.resolve() / own.name
    return own.relative_to(top).as_posix() if own.is_relative_to(top) else own.name


def _values(where: str, words: list[str]) -> list[float]:
    """The numbers behind the class: 4 of a box, or 6, 8, ... of an outline."""
    count = len(words) - 1
    if count != 4 and (count < 6 or count % 2):
        cure = "a row is class, centre x, centre y, width, height; or class and the points of an outline"
        if count == 5:
            cure += "; is the last one a score? Predictions are no labels"
        raise DataError(f"{where} has {count} numbers behind the class", cure)
    try:
        return [float(word) for word in words[1:]]
    except ValueError:
        wrong = next(word for word in words[1:] if not _is_number(word))
        raise DataError(f"{where}: {wrong!r} is no number", "write fractions such as 0.25") from None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _around(points: list[float]) -> tuple[list[float], float]:
    """The box around an outline (cx, cy, w, h), and the outline's area, NaN where it has none."""
    xs, ys = points[::2], points[1::2]
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    if any(x != x for x in points):  # min and max pass over NaN.
        left = _NAN
    twice = sum(x1 * y2 - x2 * y1 for x1, y1, x2, y2 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True))
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], abs(twice) / 2 or _NAN
