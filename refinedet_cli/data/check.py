"""What can be wrong with a data set: the kinds of findings, and the collector that counts them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from refinedet_cli.errors import DataError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

# left, top, right, bottom; px-img as seen.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Kind:
    """One kind of finding.

    Attributes:
        name: for scripts.
        severity: ``error`` where training refuses the data or would learn something false; ``warning`` where it drops
            or changes something, or where a result could deceive; ``note`` for what is good to know.
        title: for people.
        cure: what to do about it.
    """

    name: str
    severity: Severity
    title: str
    cure: str


# Files and entries ---------------------------------------------------------------------------------------------------

UNREADABLE = Kind("file-unreadable", "error", "annotation file cannot be read", "copy or export it again")
PART_MISSING = Kind("part-missing", "error", "file or folder of a part is missing", "correct the name, or copy it")
NO_PICTURES = Kind("no-pictures", "error", "part without pictures", "is it the right file or folder?")
NO_OBJECTS = Kind("no-objects", "error", "part without objects", "check the annotations")
NO_LABELS = Kind("no-label-files", "error", "part without label files", "put them into labels/, or beside the pictures")
MALFORMED = Kind("entry-malformed", "error", "entry that cannot be understood", "correct or remove it")
ID_TWICE = Kind("id-twice", "error", "id used twice", "give each entry its own id")
PICTURE_UNKNOWN = Kind("picture-unknown", "error", "object of a picture not listed", "list it, or fix image_id")
LISTED_TWICE = Kind("picture-listed-twice", "warning", "picture listed twice", "list it once, with all its objects")
SIZE_ABSENT = Kind("size-absent", "note", "picture size not in the file", "none needed: it is read from the picture")
UNLABELLED = Kind("picture-unlabelled", "note", "picture without label file", "none needed if nothing is to be found")
LEFT_OUT = Kind("picture-left-out", "note", "picture without annotation", "annotate it; it is not trained on")
ORPHAN = Kind("label-without-picture", "warning", "label file without picture", "copy the picture, or remove the file")
CROWD = Kind("crowd", "note", "box around a crowd", "none needed: it is neither learnt nor missed")
DIFFICULT = Kind("difficult", "note", "difficult object", "none needed: it is learnt, but not scored")
EMPTY = Kind("picture-empty", "note", "picture without objects", "none needed if nothing is to be found")

# Classes -------------------------------------------------------------------------------------------------------------

CLASS_UNKNOWN = Kind("class-unknown", "error", "object of a class not listed", "list the class, or correct the object")
CLASS_TWICE = Kind("class-twice", "error", "class listed twice", "merge the two")
CLASS_ALIKE = Kind("class-alike", "warning", "classes that differ in spelling", "write them alike if they are one")
CLASS_UNUSED = Kind("class-unused", "warning", "class without objects", "remove it from the list, or add pictures")
CLASS_ELSEWHERE = Kind(
    "class-elsewhere", "warning", "class with objects in another part alone", "move some of its pictures to this part"
)
CLASS_UNMEASURED = Kind(
    "class-unmeasured", "note", "class to train but not to measure", "move some pictures of it there"
)
CLASSES_DIFFER = Kind("classes-differ", "warning", "class that training does not know", "use one list for all parts")
CLASS_GAPS = Kind("class-gaps", "note", "class ids with gaps", "none needed: the ids are kept")

# Boxes ---------------------------------------------------------------------------------------------------------------

NOT_FINITE = Kind("box-not-finite", "error", "box with NaN or infinity", "draw it again, or remove it")
INVERTED = Kind("box-inverted", "error", "box with swapped corners", "swap them back, or remove it")
NO_AREA = Kind("box-no-area", "error", "box without width or height", "draw it again, or remove it")
OUTSIDE = Kind("box-outside", "error", "box outside its picture", "is it of this picture, and in its pixels?")
REACHES_OUT = Kind("box-reaches-out", "warning", "box reaches out of its picture", "check it; training clips it")
REACHES_OUT_LITTLE = Kind("box-rounding", "note", "box reaches out by up to 1 px", "none needed: training clips it")
BOX_TWICE = Kind("box-twice", "warning", "same box and class twice", "remove one")
FROM_ZERO = Kind("box-from-zero", "warning", "VOC box that begins at 0", "add 1 to the corners if they count from 0")
OUT_OF_REACH = Kind(
    "box-out-of-reach",
    "note",
    "box no anchor reaches (IoU 0.5)",
    "refinedet anchors finds better ones; or a larger input",
)
SAME_CELL = Kind("box-same-cell", "note", "box in the cell of a larger one", "a larger input has more cells")

# Pictures ------------------------------------------------------------------------------------------------------------

LEADS_OUT = Kind(
    "picture-leads-out", "error", "name leads out of the folder; not read", "copy the picture in; use relative names"
)
PICTURE_MISSING = Kind("picture-missing", "error", "picture is missing", "copy it, or remove its entry")
PICTURE_UNREADABLE = Kind("picture-unreadable", "error", "picture cannot be read", "copy it again, or remove it")
PICTURE_DAMAGED = Kind("picture-damaged", "error", "picture is cut off or damaged", "copy it again, or remove it")
PICTURE_TOO_LARGE = Kind("picture-too-large", "error", "picture is too large", "make it smaller, or cut it into tiles")
SIZE_TURNED = Kind(
    "size-turned", "error", "size is that before EXIF turned it", "annotate the picture as seen, or remove the EXIF tag"
)
SIZE_DIFFERS = Kind("size-differs", "error", "size is not the picture's", "correct it; are the boxes of this size?")
TURNED = Kind("picture-turned", "warning", "EXIF turns it, size cannot tell", "check that its boxes are as it is seen")
SAME_PICTURE = Kind("picture-twice", "warning", "same picture twice in a part", "keep one, with all its objects")
LEAK = Kind("picture-in-two-parts", "warning", "same picture in two parts", "keep it in one: scores would deceive")

KINDS: tuple[Kind, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Kind))


class Listed(NamedTuple):
    """A picture as a data set lists it.

    Attributes:
        path: where it lies; None where it must not be opened.
        size: (width, height) as stated, px-img; None where it is not.
        file, where: the entry that lists it.
    """

    path: Path | None
    size: tuple[int, int] | None
    file: Path
    where: str


class Finding(NamedTuple):
    """One thing that was found.

    Attributes:
        kind: what it is.
        file: the file to look into, relative to the data set's folder where it lies in it.
        where: the entry in it; may be empty.
        detail: the value, or what is wrong with it; may be empty.
        cure: what to do, where that is more than the kind says; else empty.
        picture: the picture's file, where there is one that may be opened.
        box: the box that is meant, as far as it is finite.
    """

    kind: Kind
    file: str
    where: str
    detail: str
    cure: str = ""
    picture: Path | None = None
    box: Box | None = None

    @property
    def place(self) -> str:
        """File and entry, for people."""
        return f"{self.file}: {self.where}" if self.where else self.file


@dataclass(frozen=True)
class Tally:
    """How often one kind was found, and the first of them."""

    kind: Kind
    count: int
    first: Finding


@dataclass
class Findings:
    """Counts findings by kind; all of them are kept only on demand, so that a million cost no memory.

    Attributes:
        base: the folder that file names are shown relative to.
        keep: whether ``kept`` is filled.
        kept: every finding, in the order found.
    """

    base: Path
    keep: bool = False
    kept: list[Finding] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _first: dict[str, Finding] = field(default_factory=dict)
    _names: dict[Path, str] = field(default_factory=dict)

    def add(
        self,
        kind: Kind,
        file: Path,
        where: str = "",
        detail: str = "",
        *,
        cure: str = "",
        picture: Path | None = None,
        box: Box | None = None,
    ) -> None:
        """Take in one finding; the arguments are as in `Finding`."""
        count = self._counts.get(kind.name, 0)
        self._counts[kind.name] = count + 1
        if count and not self.keep:
            return
        finding = Finding(kind, self._name(file), where, detail, cure, picture, box)
        self._first.setdefault(kind.name, finding)
        if self.keep:
            self.kept.append(finding)

    def more(self, kind: Kind, count: int) -> None:
        """Count findings of a kind of which one was taken in, where not all need be kept."""
        if count > 0:
            self._counts[kind.name] += count

    def fault(self, kind: Kind, file: Path, where: str, error: DataError, *, picture: Path | None = None) -> None:
        """Take in what a reader refuses: its message without the file and the entry, which it repeats."""
        detail = error.message
        for known in (f"{file}:", str(file), f"{where}:", where):
            detail = detail.removeprefix(known).strip() if known else detail
        # Readers name the id of an entry behind its place.
        named = re.match(r"(\(id [^)]*\)):? *", detail) if where else None
        if named is not None:
            where, detail = f"{where} {named[1]}", detail[named.end() :]
        self.add(kind, file, where, detail, cure=error.hint or "", picture=picture)

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(tally.count for tally in self.tallies if tally.kind.severity == severity)

    @property
    def tallies(self) -> tuple[Tally, ...]:
        """One for each kind that was found, the severe ones first."""
        found = [kind for kind in KINDS if kind.name in self._counts]
        ordered = sorted(found, key=lambda kind: SEVERITIES.index(kind.severity))
        return tuple(Tally(kind, self._counts[kind.name], self._first[kind.name]) for kind in ordered)

    def _name(self, file: Path) -> str:
        known = self._names.get(file)
        if known is not None:
            return known
        own, base = os.path.normpath(Path.cwd() / file), os.path.normpath(Path.cwd() / self.base)
        inside = os.path.commonpath([own, base]) == base and own != base
        name = Path(own).relative_to(base).as_posix() if inside else str(file)
        if len(self._names) < 100_000:
            self._names[file] = name
        return name
