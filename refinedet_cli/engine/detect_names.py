"""Names of the files that belong to a picture: none equal to another, none leading out of its folder."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Self

from refinedet_cli.core.config import Classes
from refinedet_cli.data.listing import DiskSet

# File systems take 255 bytes; this leaves room for an extension.
_LONGEST_NAME = 240
_DRAWN_SUFFIXES = (".jpg", ".jpeg", ".png")
# What Windows refuses in a name, and what is not printed; the slash would make a folder.
_NOT_IN_FOLDER_NAMES = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')


class UniqueNames:
    """Gives names that differ also for file systems that do not tell cases or Unicode forms apart; a context manager.

    The same names asked for in the same order give the same answers.
    """

    def __init__(self) -> None:
        self._taken = DiskSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._taken.__exit__()

    def annotated(self, name: str) -> PurePosixPath:
        """Name the drawn copy of a picture.

        A JPEG or PNG keeps its name, ``a.webp`` becomes ``a.webp.jpg``, and a name too long for a file is cut and
        marked with its hash.
        """
        path = relative_name(name)
        if path.suffix.lower() not in _DRAWN_SUFFIXES:
            path = path.with_name(path.name + ".jpg")
        return self._unique(path)

    def stem(self, name: str) -> PurePosixPath:
        """Name a picture without its extension, for files whose names are made of it: ``a.jpg`` becomes ``a``.

        Where that is taken, by ``a.png``, the extension stays: ``a.jpg`` becomes ``a.jpg``.
        """
        path = relative_name(name)
        short = path.with_suffix("") if path.stem else path
        return short if self._taken.add(_folded(short)) else self._unique(path)

    def _unique(self, path: PurePosixPath) -> PurePosixPath:
        unique, number = path, 1
        while not self._taken.add(_folded(unique)):
            number += 1
            unique = path.with_stem(f"{path.stem}-{number}")
        return unique


def relative_name(name: str) -> PurePosixPath:
    """Turn the name of a picture into a path that stays below a folder and fits on the disk."""
    return PurePosixPath(*[_short(part) for part in PurePosixPath(name).parts if part not in ("/", "..")])


def class_folders(classes: Classes) -> dict[int, str]:
    """Name a folder for each category id: its class, without letters that file systems refuse, and unique."""
    folders: dict[int, str] = {}
    with DiskSet() as taken:
        for name, category_id in zip(classes.names, classes.category_ids, strict=True):
            plain = _short(_NOT_IN_FOLDER_NAMES.sub("_", name).strip(" .")) or "class"
            unique = plain if taken.add(_folded(PurePosixPath(plain))) else f"{plain}-{category_id}"
            taken.add(_folded(PurePosixPath(unique)))
            folders[category_id] = unique
    return folders


def _folded(name: PurePosixPath) -> str:
    """The name as file systems compare it that do not tell cases or Unicode forms apart."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def _short(part: str) -> str:
    raw = os.fsencode(part)
    if len(raw) <= _LONGEST_NAME:
        return part
    suffix = PurePosixPath(part).suffix
    suffix = suffix if len(os.fsencode(suffix)) <= 10 else ""
    mark = f"~{hashlib.sha256(raw).hexdigest()[:8]}"
    kept = raw[: _LONGEST_NAME - len(mark) - len(suffix)]
    # A cut through the bytes of one letter would leave something that is no text.
    return kept.decode("utf-8", errors="ignore") + mark + suffix
