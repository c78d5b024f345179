"""Where a data set lies that a user names, and the part of it that is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refinedet_cli.data.dataset import Split, listed
from refinedet_cli.data.public import PUBLIC_SETS, find_public, refuse_hidden
from refinedet_cli.errors import DataError

READ = (
    "read are COCO JSON files, folders with train, val and test, VOC folders (Annotations and JPEGImages), a YOLO "
    f"data.yaml, and the names {listed(PUBLIC_SETS)}"
)


@dataclass(frozen=True)
class Place:
    """What a user named.

    Attributes:
        path: a file or folder that exists.
        part: its part, if one was named.
        public: the name, if it is a public data set.
    """

    path: Path
    part: str | None = None
    public: str | None = None


def locate(source: str, root: Path | None, split: Split | None = None) -> Place:
    """Find what is meant; a file or folder of that very name goes first, colon and all.

    Args:
        source: as for ``open_dataset``.
        root: where public data sets lie; None takes $REFINEDET_DATA, else ./datasets.
        split: the part that is wanted where the source names none.

    Raises:
        DataError: nothing of that name exists, or its annotations are not public.
    """
    if not source:  # As of a shell's variable that is not set; to pathlib it is the current folder.
        raise DataError("the name of a data set is empty", f"name a file or folder; {READ}")
    if _exists(source):
        return Place(Path(source))
    name, part = _parted(source)
    if part is not None and _exists(name):
        return Place(Path(name), part)
    if name.lower() in PUBLIC_SETS:
        public = name.lower()
        refuse_hidden(public, part or split or "")  # First of all, before gigabytes are fetched in vain.
        return Place(find_public(public, root, part or split or ""), part, public)
    raise DataError(f"the data set {source} does not exist", f"check the path; {READ}")


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{source!r} cannot be read: {reason}", "check the path and its permissions") from error


def _parted(source: str) -> tuple[str, str | None]:
    """Take the part off the end; a colon in the middle of a path, or behind a drive's letter, begins none."""
    name, _, part = source.rpartition(":")
    is_drive = len(name) == 1 and name.isalpha() and not Path(name).exists()
    if not name or not part or is_drive or "/" in part or "\\" in part:
        return source, None
    return name, part
