"""Tolerant readers: what the strict ones refuse becomes a finding, and the rest of the file is read on.

They are made of the strict readers' own parts, so that both mean the same. Every fault of an entry is found, not only
the first, and no picture is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.data.check import (
    CLASS_TWICE,
    CLASS_UNKNOWN,
    FROM_ZERO,
    ID_TWICE,
    LEADS_OUT,
    LEFT_OUT,
    LISTED_TWICE,
    MALFORMED,
    NO_LABELS,
    NO_PICTURES,
    ORPHAN,
    PART_MISSING,
    PICTURE_MISSING,
    PICTURE_UNKNOWN,
    SIZE_ABSENT,
    UNLABELLED,
    UNREADABLE,
    Findings,
    Kind,
    Listed,
)
from refinedet_cli.data.coco import list_entries, load_document, read_box, read_file_name, read_flag, read_size
from refinedet_cli.data.images import is_file, real_path
from refinedet_cli.data.json_entries import get, shown, whole
from refinedet_cli.data.listing import links_out
from refinedet_cli.data.records import Objects
from refinedet_cli.data.voc import (
    VOC_CLASSES,
    PictureFolder,
    VocColumns,
    VocFolder,
    VocPart,
    are_official,
    find_labels,
    find_xml,
    number_classes,
    read_labels,
    read_list,
)
from refinedet_cli.data.voc_xml import VocAnnotation, load_xml, read_object
from refinedet_cli.data.voc_xml import read_file_name as read_xml_file_name
from refinedet_cli.data.voc_xml import read_size as read_xml_size
from refinedet_cli.data.yolo import LabelFolder, YoloColumns, YoloFile, list_pictures, read_rows, resolve_entry
from refinedet_cli.errors import DataError

Ints = NDArray[np.int64]
_NO_PICTURE = -1


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """What one part of a data set lists, as far as it can be understood.

    Attributes:
        name: of the part, as ``train``; empty where the data set is not divided.
        file: what describes it.
        classes: label ``i`` is ``classes[i - 1]``; may be empty.
        category_ids: of the classes.
        pictures: with faults or without.
        boxes: float64[N, 4], left, top, width, height; px-img, or fractions of the picture if ``relative``.
        picture: int64[N], place among the pictures; -1 for none.
        label: int64[N]; 0 for an unknown class.
        crowd, difficult: bool[N].
        relative: whether boxes are fractions.
        place: file and entry of an object.
        uncertain: places of pictures with entries that could not be understood.
    """

    name: str
    file: Path
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    pictures: list[Listed]
    boxes: NDArray[np.float64]
    picture: Ints
    label: Ints
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    relative: bool
    place: Callable[[int], tuple[Path, str]]
    uncertain: frozenset[int]


def _part(
    name: str,
    file: Path,
    classes: dict[int, str],
    pictures: list[Listed],
    objects: Objects,
    place: Callable[[int], tuple[Path, str]],
    uncertain: Iterable[int],
    *,
    relative: bool = False,
) -> Part:
    return Part(
        name=name,
        file=file,
        classes=tuple(classes.values()),
        category_ids=tuple(classes),
        pictures=pictures,
        boxes=np.array(objects.boxes, dtype=np.float64).reshape(-1, 4),
        picture=np.array(objects.pictures, dtype=np.int64),
        label=np.array(objects.labels, dtype=np.int64),
        crowd=np.array(objects.crowd, dtype=bool),
        difficult=np.array(objects.difficult, dtype=bool),
        relative=relative,
        place=place,
        uncertain=frozenset(uncertain),
    )


# COCO JSON -----------------------------------------------------------------------------------------------------------


def scan_coco(name: str, path: Path, images: Path | None, search: Sequence[Path], findings: Findings) -> Part | None:
    """Read all entries of a COCO annotation file that can be understood.

    Args:
        name: of the part.
        path: the JSON file.
        images: as for ``read_coco``.
        search: as for ``read_coco``.
        findings: receives what is wrong.

    Returns:
        the part; None where the file is no JSON object.
    """
    try:
        document = load_document(path)
    except DataError as error:
        findings.fault(UNREADABLE, path, "", error)
        return None
    lists = {}
    for key in ("categories", "images", "annotations"):
        try:
            lists[key] = list_entries(path, document, key)
        except DataError as error:
            findings.fault(UNREADABLE, path, "", error)
            lists[key] = []
    scan = _CocoScan(path, findings)
    scan.read_categories(lists["categories"])
    scan.read_pictures(lists["images"], _coco_root(path, images, lists["images"], search))
    scan.read_objects(lists["annotations"])
    numbers = np.array(scan.numbers, dtype=np.int64)
    identities = np.array(scan.objects.ids, dtype=np.int64)

    def place(i: int) -> tuple[Path, str]:
        return path, f"annotations[{numbers[i]}] (id {identities[i]})"

    return _part(name, path, scan.classes, scan.pictures, scan.objects, place, scan.uncertain)


def _coco_root(path: Path, images: Path | None, entries: list[Any], search: Sequence[Path]) -> Path:
    """The folder that names are relative to: where the first picture with a sound name lies."""
    if images is not None:
        return images
    for entry in entries:
        try:
            name = read_file_name(entry, "")
        except DataError:
            continue
        return next((folder for folder in (path.parent, *search) if is_file(folder / name)), path.parent)
    return path.parent


@dataclass
class _CocoScan:
    path: Path
    findings: Findings
    classes: dict[int, str] = field(default_factory=dict)
    pictures: list[Listed] = field(default_factory=list)
    objects: Objects = field(default_factory=Objects)
    numbers: list[int] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    uncertain: set[int] = field(default_factory=set)

    def fault(self, kind: Kind, where: str, error: DataError) -> None:
        self.findings.fault(kind, self.path, where, error)

    def read_categories(self, entries: list[Any]) -> None:
        found: dict[int, str] = {}
        for index, entry in enumerate(entries):
            where = f"categories[{index}]"
            try:
                identity, name = whole(entry, "id", where), get(entry, "name", where)
                if not isinstance(name, str) or not name.strip():
                    raise DataError(f"{where} (id {identity}): name is {shown(name)}", "give the class a name")
            except DataError as error:
                self.fault(MALFORMED, where, error)
                continue
            if identity in found:
                self.findings.add(ID_TWICE, self.path, where, f"category id {identity} is {found[identity]!r} already")
            elif name in found.values():
                # Its id stays known, so that its objects are not reported as well.
                self.findings.add(CLASS_TWICE, self.path, where, f"the name {name!r} is there already")
                found[identity] = f"{name} (id {identity})"
            else:
                found[identity] = name
        if not found:
            self.findings.add(UNREADABLE, self.path, "categories", "no class is listed", cure="list the classes")
        self.classes = {identity: found[identity] for identity in sorted(found)}

    def read_pictures(self, entries: list[Any], root: Path) -> None:
        names = [self._name(entry, f"images[{index}]") for index, entry in enumerate(entries)]
        self._find_links_out(names, root)
        for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
            where = f"images[{index}]"
            self._identify(entry, where, index)
            path = None if name is None else root / name
            self.pictures.append(Listed(path, self._size(entry, where), self.path, where))
            if path is None:
                self.uncertain.add(index)
        if not entries:
            self.findings.add(NO_PICTURES, self.path, "images", "the list is empty")
        places = {name: index for index, name in reversed(list(enumerate(names))) if name is not None}
        for index, name in enumerate(names):
            if name is not None and places[name] != index:
                detail = f"{shown(name)} is images[{places[name]}] already"
                self.findings.add(LISTED_TWICE, self.path, f"images[{index}]", detail)

    def _name(self, entry: object, where: str) -> str | None:
        try:
            return read_file_name(entry, where)
        except DataError as error:
            name = entry.get("file_name") if isinstance(entry, dict) else None
            is_name = isinstance(name, str) and name != "" and "\0" not in name
            self.fault(LEADS_OUT if is_name else MALFORMED, where, error)
            return None

    def _find_links_out(self, names: list[str | None], root: Path) -> None:
        """Take away the names of pictures that are links to somewhere outside the folder, or lie behind one."""
        folders: dict[str, list[tuple[str, int]]] = {}
        for index, name in enumerate(names):
            if name is not None:
                folder, _, leaf = name.rpartition("/")
                folders.setdefault(folder, []).append((leaf, index))
        for _, index in links_out(root, folders):
            detail = f"{names[index]} is a link out of {root}"
            self.findings.add(LEADS_OUT, self.path, f"images[{index}]", detail, cure="copy the picture itself")
            names[index] = None

    def _identify(self, entry: object, where: str, index: int) -> None:
        try:
            identity = whole(entry, "id", where)
        except DataError as error:
            if isinstance(entry, dict):  # Else it was reported with its name.
                self.fault(MALFORMED, where, error)
            return
        known = self.positions.setdefault(identity, index)
        if known != index:
            self.findings.add(ID_TWICE, self.path, where, f"picture id {identity} is that of images[{known}] already")

    def _size(self, entry: object, where: str) -> tuple[int, int] | None:
        if not isinstance(entry, dict):
            return None
        try:
            size = read_size(entry, where)
        except DataError as error:
            self.fault(MALFORMED, where, error)
            return None
        if size is None:
            self.findings.add(SIZE_ABSENT, self.path, where)
        return size

    def read_objects(self, entries: list[Any]) -> None:
        labels = {identity: label for label, identity in enumerate(self.classes, start=1)}
        seen: dict[int, int] = {}
        for index, entry in enumerate(entries):
            where = f"annotations[{index}]"
            if not isinstance(entry, dict):
                self._attempt(get, entry, "bbox", where)
                continue
            identity = self._attempt(whole, entry, "id", where)
            if identity is not None and seen.setdefault(identity, index) != index:
                detail = f"annotation id {identity} is that of annotations[{seen[identity]}] already"
                self.findings.add(ID_TWICE, self.path, where, detail)
            picture = self._known(entry, "image_id", self.positions, PICTURE_UNKNOWN, where)
            label = self._known(entry, "category_id", labels, CLASS_UNKNOWN, where)
            flags = [key in entry and self._attempt(read_flag, entry, key, where) for key in _FLAGS]
            box = self._attempt(read_box, entry, where)
            if box is None:
                self.uncertain.add(_NO_PICTURE if picture is None else picture)
                continue
            self.numbers.append(index)
            self.objects.ids.append(-1 if identity is None else identity)
            self.objects.pictures.append(_NO_PICTURE if picture is None else picture)
            self.objects.labels.append(label or 0)
            self.objects.boxes.append(box)
            crowd, difficult, ignore = (bool(flag) for flag in flags)
            self.objects.crowd.append(crowd)
            self.objects.difficult.append(difficult or (ignore and not crowd))

    def _attempt(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """What ``read`` gives; None, and a finding, where it refuses. The last argument is the entry's place."""
        try:
            return read(*arguments)
        except DataError as error:
            self.fault(MALFORMED, arguments[-1], error)
            return None

    def _known(self, entry: dict[str, Any], key: str, known: dict[int, int], kind: Kind, where: str) -> int | None:
        identity = self._attempt(whole, entry, key, where)
        if identity is None:
            return None
        if identity not in known:
            if known:  # Of an empty list, it was said already.
                self.findings.add(kind, self.path, where, f"{key} is {identity}, which is not listed")
            return None
        return known[identity]


_FLAGS = ("iscrowd", "difficult", "ignore")


# VOC -----------------------------------------------------------------------------------------------------------------


def scan_voc(folder: VocFolder, parts: Sequence[VocPart], images: Path | None, findings: Findings) -> list[Part]:
    """Read all XML files of some parts that can be understood.

    Args:
        folder: in VOC's layout.
        parts: of it.
        images: the folder of the pictures; that of each part if None.
        findings: receives what is wrong.

    Returns:
        the parts, with one list of classes.
    """
    listings = {}
    parsed: dict[Path, VocAnnotation | None] = {}
    faulty: set[Path] = set()
    for part in parts:
        listings[part.name] = paths = _listed_xml(part, findings)
        parsed |= {path: _read_xml(path, findings, faulty) for path in paths if path not in parsed}
    # Where no file lists the classes, training takes them from all parts, and refuses what is at fault in any.
    unasked = [] if find_labels(folder.root) else [part for part in folder.parts if part not in parts]
    others = [path for part in unasked for path in _of_other_part(part, findings)]
    parsed |= {path: _read_xml(path, findings, faulty) for path in others if path not in parsed}
    classes = _voc_classes(folder, parsed.values(), findings)
    return [
        _VocScan(folder, part, images, classes, findings, faulty).read({p: parsed[p] for p in listings[part.name]})
        for part in parts
    ]


def _listed_xml(part: VocPart, findings: Findings, faults: Findings | None = None) -> list[Path]:
    there = find_xml(part.annotations)
    if part.listing is None:
        return list(there.values())
    found: dict[Path, None] = {}
    try:
        for number, name in read_list(part.listing):
            if name not in there:
                detail = f"{name}.xml is not in {part.annotations.name}"
                findings.add(PART_MISSING, part.listing, f"line {number}", detail, cure="copy it, or remove the line")
            elif there[name] in found:
                findings.add(LISTED_TWICE, part.listing, f"line {number}", name)
            else:
                found[there[name]] = None
    except DataError as error:
        (faults or findings).fault(UNREADABLE, part.listing, "", error)
    return list(found)


def _of_other_part(part: VocPart, findings: Findings) -> list[Path]:
    """The XML files of a part that is not looked at; what its list lacks or has twice is nothing to training."""
    return _listed_xml(part, Findings(findings.base), findings)


def _read_xml(path: Path, findings: Findings, faulty: set[Path]) -> VocAnnotation | None:
    """One XML file, without the objects that are at fault; files with such are put into ``faulty``."""
    try:
        root = load_xml(path)
    except DataError as error:
        faulty.add(path)
        findings.fault(UNREADABLE, path, "", error)
        return None
    size = None
    try:
        size = read_xml_size(path, root)
        if size is None:
            findings.add(SIZE_ABSENT, path)
    except DataError as error:
        faulty.add(path)
        findings.fault(MALFORMED, path, "size", error)
    objects = []
    for number, node in enumerate(root.iterfind("object"), start=1):
        try:
            objects.append(read_object(path, number, node))
        except DataError as error:
            faulty.add(path)
            findings.fault(MALFORMED, path, f"object {number}", error)
    return VocAnnotation(read_xml_file_name(root), size, objects)


def _voc_classes(folder: VocFolder, parsed: Iterable[VocAnnotation | None], findings: Findings) -> dict[int, str]:
    if file := find_labels(folder.root):
        names: tuple[str, ...] = ()
        try:
            names = read_labels(file)
            number_classes(file, names)
        except DataError as error:
            findings.fault(CLASS_TWICE if names else UNREADABLE, file, "", error)
        return dict(enumerate(dict.fromkeys(names), start=1))
    found = {thing.name for annotation in parsed if annotation is not None for thing in annotation.objects}
    official = are_official(folder.root, found)
    return dict(enumerate(VOC_CLASSES if official else sorted(found), start=1))


@dataclass
class _VocScan:
    folder: VocFolder
    part: VocPart
    images: Path | None
    classes: dict[int, str]
    findings: Findings
    faulty: set[Path]

    def read(self, annotations: dict[Path, VocAnnotation | None]) -> Part:
        pictures = PictureFolder.scan(self.part.pictures if self.images is None else self.images)
        names = tuple(self.classes.values())
        # Without a class there is no object either.
        classes = number_classes(self.folder.root, names or ("object",))
        reader = VocColumns(self.folder.root, pictures, classes)
        listed_pictures: list[Listed] = []
        outside = self._outside(pictures)
        for path, annotation in annotations.items():
            reader.pictures.ids.append(len(listed_pictures))
            listed_pictures.append(self._picture(path, annotation, pictures, outside))
            if annotation is not None:
                self._objects(reader, path, annotation)
        if not annotations:
            self.findings.add(NO_PICTURES, self.part.listing or self.part.annotations, "", "no XML file")
        self._odd(reader, annotations, pictures)
        of_picture = reader.objects.pictures
        files = list(annotations)

        def place(i: int) -> tuple[Path, str]:
            return files[of_picture[i]], "object " + reader.places[i].rpartition(" ")[2]

        uncertain = {i for i, path in enumerate(files) if path in self.faulty or listed_pictures[i].path is None}
        file = self.part.listing or self.part.annotations
        return _part(self.part.name, file, self.classes, listed_pictures, reader.objects, place, uncertain)

    def _outside(self, pictures: PictureFolder) -> set[str]:
        leaves = [(name, 0) for name in sorted(pictures.names)]
        return {name for name, _ in links_out(pictures.path, {"": leaves})}

    def _picture(
        self, path: Path, annotation: VocAnnotation | None, pictures: PictureFolder, outside: set[str]
    ) -> Listed:
        try:
            found = pictures.find(path, "" if annotation is None else annotation.file_name)
        except DataError as error:
            self.findings.fault(PICTURE_MISSING, path, "", error)
            return Listed(None, None, path, "")
        if found.name in outside:
            self.findings.add(LEADS_OUT, path, "", f"{found.name} is a link out of {pictures.path}")
            return Listed(None, None, path, "")
        return Listed(found, None if annotation is None else annotation.size, path, "size")

    def _objects(self, reader: VocColumns, path: Path, annotation: VocAnnotation) -> None:
        for number, thing in enumerate(annotation.objects, start=1):
            if thing.name in reader.labels:
                reader.add_object(f"{path.name} object {number}", thing)
            else:
                self.findings.add(CLASS_UNKNOWN, path, f"object {number}", f"class {thing.name!r} is not listed")
                self.faulty.add(path)

    def _odd(self, reader: VocColumns, annotations: Iterable[Path], pictures: PictureFolder) -> None:
        files = list(annotations)
        for i in reader.from_zero:
            where = "object " + reader.places[i].rpartition(" ")[2]
            self.findings.add(FROM_ZERO, files[reader.objects.pictures[i]], where)
        if self.part.listing is None:
            stems = {path.stem for path in files}
            for name in sorted(pictures.names):
                if Path(name).stem not in stems:
                    self.findings.add(LEFT_OUT, pictures.path / name)


# YOLO ----------------------------------------------------------------------------------------------------------------


def scan_yolo(described: YoloFile, name: str, findings: Findings) -> Part:
    """Read all label files of a part that can be understood.

    Args:
        described: what ``load_yolo`` gave.
        name: one of the parts that it names.
        findings: receives what is wrong.

    Returns:
        the part; its boxes are fractions, and no size is stated.
    """
    return _YoloScan(described, name, findings).read()


@dataclass
class _YoloScan:
    described: YoloFile
    name: str
    findings: Findings
    pictures: list[Listed] = field(default_factory=list)
    uncertain: set[int] = field(default_factory=set)
    unlabelled: int = 0

    def __post_init__(self) -> None:
        self.reader = YoloColumns(self.described)
        self.labels: dict[Path, LabelFolder] = {}

    def read(self) -> Part:
        described = self.described
        seen: set[Path] = set()
        for entry in described.part(self.name) or ():
            for path, file, where in self._source(entry):
                if path in seen:
                    self.findings.add(LISTED_TWICE, file, where, path.name)
                else:
                    seen.add(path)
                    self._add(path)
        if not self.pictures:
            self.findings.add(NO_PICTURES, described.path, self.name, "it names no picture that is there")
        elif self.unlabelled == len(self.pictures):
            self.findings.add(NO_LABELS, described.path, self.name, "no picture has a label file")
        places = self.reader.places

        def place(i: int) -> tuple[Path, str]:
            return places[i][0], f"line {places[i][1]}"

        classes = dict(zip(described.classes.category_ids, described.classes.names, strict=True))
        objects = self.reader.objects
        return _part(self.name, described.path, classes, self.pictures, objects, place, self.uncertain, relative=True)

    def _source(self, entry: str) -> list[tuple[Path, Path, str]]:
        """The pictures that an entry names, and where it does."""
        file = self.described.path
        try:
            source = resolve_entry(self.described, entry)
            if source.is_dir() or source.suffix.lower() != ".txt":
                found = list_pictures(source, self.described.root)
                self._find_orphans(found)
                return [(path, file, self.name) for path in self._inside(found, source)]
            return list(self._list(source))
        except DataError as error:
            self.findings.fault(PART_MISSING, file, self.name, error)
            return []

    def _list(self, listing: Path) -> Iterator[tuple[Path, Path, str]]:
        tops = {self.described.root.resolve(), listing.parent.resolve()}
        for number, line in read_rows(listing):
            path = Path(line.replace("\\", "/"))
            candidates = [listing.parent / path, self.described.root / path]
            inside = [one for one in candidates if any(real_path(one).is_relative_to(top) for top in tops)]
            found = next((one for one in inside if is_file(one)), None)
            where = f"line {number}"
            if not inside:
                self.findings.add(LEADS_OUT, listing, where, line)
            elif found is None:
                self.findings.add(PICTURE_MISSING, listing, where, line)
            else:
                yield found, listing, where

    def _inside(self, paths: list[Path], source: Path) -> Iterator[Path]:
        """The pictures but for links out of both the folder and the data set."""
        tops = (source.resolve(), self.described.root.resolve())
        folders: dict[Path, list[tuple[str, int]]] = {}
        for i, path in enumerate(paths):
            folders.setdefault(path.parent, []).append((path.name, i))
        outside: set[int] = set()
        for folder, leaves in folders.items():
            away = [{i for _, i in links_out(top, {str(folder.resolve()): leaves})} for top in tops]
            outside |= set.intersection(*away)
        for i, path in enumerate(paths):
            if i in outside:
                self.findings.add(LEADS_OUT, path, "", f"is a link out of {source}")
            else:
                yield path

    def _find_orphans(self, paths: list[Path]) -> None:
        stems: dict[Path, set[str]] = {}
        for path in paths:
            stems.setdefault(path.parent, set()).add(path.stem)
        for folder, known in stems.items():
            labels = self._labels(folder)
            for leaf in sorted(labels.names):
                stem = leaf.removesuffix(".txt")
                if stem not in known and not (labels.folder == folder or stem in ("classes", "labels")):
                    self.findings.add(ORPHAN, labels.folder / leaf)

    def _labels(self, folder: Path) -> LabelFolder:
        return self.labels.get(folder) or self.labels.setdefault(folder, LabelFolder.of(folder))

    def _add(self, path: Path) -> None:
        labels = self._labels(path.parent)
        leaf = path.stem + ".txt"
        file = labels.folder / leaf
        has_labels = leaf in labels.names
        self.reader.pictures.ids.append(len(self.pictures))
        self.pictures.append(Listed(path, None, path, ""))
        if not has_labels:
            self.unlabelled += 1
            self.uncertain.add(len(self.pictures) - 1)
            self.findings.add(UNLABELLED, path)
            return
        rows: list[tuple[int, str]] = []
        tops = (labels.folder, self.described.root)
        if file.is_symlink() and not any(real_path(file).is_relative_to(real_path(top)) for top in tops):
            self.findings.add(LEADS_OUT, file, "", "is a link out of its folder", cure="copy the file itself")
            self.uncertain.add(len(self.pictures) - 1)
        else:
            try:
                rows = read_rows(file)
            except DataError as error:
                self.findings.fault(UNREADABLE, file, "", error)
                self.uncertain.add(len(self.pictures) - 1)
        for number, line in rows:
            words = line.split()
            try:
                # Fractions: sizes are known only once the pictures have been looked at.
                self.reader.add_object(file, number, words, (1, 1))
            except DataError as error:
                detail = error.message.removeprefix(f"{file}:{number}").removeprefix(":").strip()
                kind = CLASS_UNKNOWN if detail.startswith("there is no class") else MALFORMED
                self.findings.add(kind, file, f"line {number}", detail, cure=error.hint or "")
                self.uncertain.add(len(self.pictures) - 1)
