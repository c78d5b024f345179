"""Where the pictures of a data set go when it is written anew, and how they get there."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, Record, Split, listed
from refinedet_cli.data.images import is_picture_name, open_regular
from refinedet_cli.errors import DataError

Transfer = Literal["copy", "link", "stay"]
# Bytes of a file name that every file system holds, less the longest extension of annotations and a number.
_LONGEST = 240
# What cannot stand in a list of names, or in XML.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_COPY = "let the pictures be copied"


class Part(NamedTuple):
    """A part of a data set; the name is None where it is not divided."""

    name: Split | None
    dataset: Dataset


class FolderLink(NamedTuple):
    """A symbolic link to a folder of pictures; the name is relative to the folder that is written."""

    name: str
    target: Path


class Placement(NamedTuple):
    """Where pictures go under the folder that is written.

    Attributes:
        names: for each part, the path of each record's picture, with forward slashes. It leads nowhere else, and
            different pictures have different ones.
        file_names: the same, as the annotations call them.
        links: what has to be linked where pictures stay.
    """

    names: tuple[tuple[str, ...], ...]
    file_names: tuple[tuple[str, ...], ...]
    links: tuple[FolderLink, ...] = ()


class Transferred(NamedTuple):
    """Numbers of picture files."""

    copied: int
    linked: int


def place_for_coco(parts: Sequence[Part], transfer: Transfer) -> Placement:
    """Keep the names that the source uses; only where two pictures then had one name are folders added.

    Raises:
        DataError: pictures that should stay have no folder in common.
    """
    names = [[_within(record.file_name) for record in part.dataset.records] for part in parts]
    if transfer == "stay":
        return _stay_for_coco(parts, names)
    if _fit(parts, names):
        # What has a folder of its own goes there, so that names are relative to the annotation file.
        bases = ["" if all("/" in name for these in names for name in these) else "images/"] * len(parts)
    elif all(_fit([part], [these]) for part, these in zip(parts, names, strict=True)):
        bases = [f"images/{part.name}/" for part in parts]
    else:
        names, bases = _below(parts, _common_folder(parts)), ["images/"] * len(parts)
    placed = [[base + name for name in these] for base, these in zip(bases, names, strict=True)]
    return Placement(_tuples(placed), _tuples(names))


def place_for_voc(parts: Sequence[Part], transfer: Transfer) -> Placement:
    """Bring all pictures into one folder, each with a stem of its own, case aside.

    Pictures whose names would be equal get the names of their folders in front, or a number behind.

    Raises:
        DataError: pictures that should stay would need other names or are in several folders.
    """
    records = [record for part in parts for record in part.dataset.records]
    fitting = [_fitting(_within(record.file_name)) for record in records]
    leaves = [name.rpartition("/")[2] for name in fitting]
    stems = Counter(_stem(leaf) for leaf in leaves)
    wanted = [
        name.replace("/", "_") if stems[_stem(leaf)] > 1 else leaf for name, leaf in zip(fitting, leaves, strict=True)
    ]
    names = _distinct(wanted)
    links: tuple[FolderLink, ...] = ()
    if transfer == "stay":
        folders = {record.path.parent.resolve() for record in records}
        if len(folders) > 1:
            raise DataError(f"VOC keeps all pictures in one folder; these are in {len(folders):,}", _COPY)
        _refuse_renamed("VOC", [record.path.name for record in records], names)
        links = (FolderLink("JPEGImages", folders.pop()),)
    placed = _shared_out(parts, [f"JPEGImages/{name}" for name in names])
    return Placement(placed, placed, links)


def place_for_yolo(parts: Sequence[Part], transfer: Transfer) -> Placement:
    """Give each part a folder, with the folders that its pictures had, and each picture a stem of its own in it.

    Raises:
        DataError: pictures that should stay would need other names.
    """
    if transfer == "stay":
        root = _common_folder(parts)
        stay = [name for names in _below(parts, root) for name in names]
        _refuse_renamed("YOLO", stay, _distinct(_for_yolo(stay)))
        placed = _shared_out(parts, [f"images/{name}" for name in stay])
        return Placement(placed, placed, (FolderLink("images", root),))
    found = []
    for part in parts:
        names = _distinct(_for_yolo(_below([part], _common_folder([part]))[0]))
        found.append([f"images/{part.name or 'train'}/{name}" for name in names])
    return Placement(_tuples(found), _tuples(found))


def transfer_pictures(
    parts: Sequence[Part], placement: Placement, out: Path, transfer: Transfer, show: Callable[[], None]
) -> Transferred:
    """Bring the pictures to their places.

    A picture that cannot be linked, because it lies on another disk or its owner forbids it, is copied.

    Args:
        parts: of the source; nothing of it is changed.
        placement: for these parts.
        out: the folder that is written.
        transfer: how.
        show: is called for each record.

    Raises:
        DataError: a picture is missing or no ordinary file, or two names differ only in a way that this disk ignores.
    """
    for link in placement.links:
        place = out / link.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(link.target, place.parent), target_is_directory=True)
    copied = linked = 0
    done: set[str] = set()
    for record, name in _all(parts, placement):
        if transfer != "stay" and name not in done:
            done.add(name)
            place = out / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if transfer == "link" and _link(record.path, place):
                linked += 1
            else:
                _copy(record.path, place)
                copied += 1
        show()
    return Transferred(copied, linked)


def _all(parts: Sequence[Part], placement: Placement) -> Iterator[tuple[Record, str]]:
    for part, names in zip(parts, placement.names, strict=True):
        yield from zip(part.dataset.records, names, strict=True)


def _link(picture: Path, place: Path) -> bool:
    with open_regular(picture):  # It exists, and is neither a device nor empty.
        pass
    try:
        place.hardlink_to(picture.resolve())
    except FileExistsError:
        raise _taken(picture, place) from None
    except OSError:
        return False
    return True


def _copy(picture: Path, place: Path) -> None:
    with open_regular(picture) as source:
        try:
            with place.open("xb") as file:
                shutil.copyfileobj(source, file)
        except FileExistsError:
            raise _taken(picture, place) from None


def _taken(picture: Path, place: Path) -> DataError:
    return DataError(
        f"{picture} and another picture would both be {place.name} in the new folder",
        "give them names that differ in more than case",
    )


# Names ---------------------------------------------------------------------------------------------------------------


def _within(file_name: str) -> str:
    """A path with forward slashes that leads nowhere but down."""
    words = [word for word in file_name.replace("\\", "/").split("/") if word not in ("", ".")]
    if not words or ".." in words:
        raise DataError(f"the file name {file_name!r} leads out of its folder", "use names without ..")
    return "/".join(words)


def _fitting(name: str) -> str:
    """A path that lists and XML files can hold, and that finders of pictures do not pass over."""
    words = [_UNFIT.sub("_", word).strip() or "_" for word in name.split("/")]
    return "/".join(f"_{word}" if word.startswith(".") else word for word in words)


def _for_yolo(names: Sequence[str]) -> list[str]:
    """Fitting paths without a folder called images, which would make way for labels."""
    words = [_fitting(name).split("/") for name in names]
    return ["/".join([*("images_" if w == "images" else w for w in folders), leaf]) for *folders, leaf in words]


def _distinct(names: Sequence[str]) -> list[str]:
    """Shorten leaves that are too long, and number those whose stem another has in the same folder, case aside."""
    short = [_short(name, "") for name in names]
    own = {_stem(name) for name in short}
    taken: set[str] = set()
    counts: Counter[str] = Counter()
    found = []
    for name, plain in zip(names, short, strict=True):
        if not is_picture_name(name.rpartition("/")[2]):
            raise DataError(
                f"the picture {name} has no extension of pictures, by which this format finds them",
                "rename it, as to .jpg or .png",
            )
        candidate = plain
        while _stem(candidate) in taken or (candidate != plain and _stem(candidate) in own):
            counts[_stem(plain)] += 1
            candidate = _short(name, f"-{counts[_stem(plain)] + 1}")
        taken.add(_stem(candidate))
        found.append(candidate)
    return found


def _short(name: str, mark: str) -> str:
    folder, slash, leaf = name.rpartition("/")
    path = Path(leaf)
    room = _LONGEST - len(path.suffix.encode())
    stem = path.stem.encode()[:room].decode(errors="ignore").strip()
    return f"{folder}{slash}{stem}{mark}{path.suffix}"


def _stem(name: str) -> str:
    """What must differ: a path without its extension, case aside."""
    folder, _, leaf = name.rpartition("/")
    return f"{folder}/{Path(leaf).stem}".casefold()


def _refuse_renamed(kind: str, own: Sequence[str], needed: Sequence[str]) -> None:
    changed = [name for name, other in zip(own, needed, strict=True) if name != other]
    if changed:
        more = ", ..." if len(changed) > 3 else ""
        raise DataError(
            f"{counted(len(changed), 'picture')} cannot stay, for {kind} needs other names: "
            f"{listed(changed[:3])}{more}",
            _COPY,
        )


# Folders -------------------------------------------------------------------------------------------------------------


def _stay_for_coco(parts: Sequence[Part], names: list[list[str]]) -> Placement:
    """Link the folder that names are relative to; one for each part where these differ."""
    roots = [
        {_root(record, name) for record, name in zip(part.dataset.records, these, strict=True)}
        for part, these in zip(parts, names, strict=True)
    ]
    if len(set().union(*roots)) == 1 and None not in roots[0]:
        bases, targets = ["images"] * len(parts), [_only(roots[0])]
    elif len(parts) > 1 and all(len(these) == 1 and None not in these for these in roots):
        bases, targets = [f"images/{part.name}" for part in parts], [_only(these) for these in roots]
    else:
        root = _common_folder(parts)
        names, bases, targets = _below(parts, root), ["images"] * len(parts), [root]
    links = (FolderLink(base, target) for base, target in zip(bases, targets, strict=False))
    placed = [[f"{base}/{name}" for name in these] for base, these in zip(bases, names, strict=True)]
    return Placement(_tuples(placed), _tuples(names), tuple(links))


def _root(record: Record, name: str) -> Path | None:
    """The folder that a name is relative to, if it is the end of the picture's path."""
    words = name.split("/")
    path = record.path.absolute()
    return path.parents[len(words) - 1].resolve() if list(path.parts[-len(words) :]) == words else None


def _only(roots: set[Path | None]) -> Path:
    (root,) = roots
    if root is None:
        raise ValueError("expected a folder")
    return root


def _common_folder(parts: Sequence[Part]) -> Path:
    """The deepest folder that holds all pictures."""
    folders = {record.path.parent for part in parts for record in part.dataset.records}
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    if common == Path(common.anchor) and len(folders) > 1:
        raise DataError("the pictures have no folder in common", "bring them under one folder")
    return common


def _below(parts: Sequence[Part], root: Path) -> list[list[str]]:
    """The paths of the pictures relative to a folder that holds them all."""
    folders: dict[Path, str] = {}

    def relative(path: Path) -> str:
        parent = path.parent
        if parent not in folders:
            own = parent.resolve().relative_to(root).as_posix()
            folders[parent] = "" if own == "." else f"{own}/"
        return folders[parent] + path.name

    return [[relative(record.path) for record in part.dataset.records] for part in parts]


def _fit(parts: Sequence[Part], names: Sequence[Sequence[str]]) -> bool:
    """Whether equal names mean the same picture."""
    known: dict[str, Path] = {}
    return all(
        known.setdefault(name, record.path) == record.path
        for part, these in zip(parts, names, strict=True)
        for record, name in zip(part.dataset.records, these, strict=True)
    )


def _shared_out(parts: Sequence[Part], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Names of all parts in a row, part by part."""
    rest = iter(names)
    return tuple(tuple(next(rest) for _ in part.dataset.records) for part in parts)


def _tuples(names: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(these) for these in names)
