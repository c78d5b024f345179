"""Files that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path

from refinedet_cli.errors import DataError

_CURES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "your disk quota is used up: free some space, or write to another disk",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another name",
    errno.EEXIST: "a part of the path is a file: choose another name",
    errno.EISDIR: "a folder of that name is in the way: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that nobody ever sees half of it; missing folders are made.

    The content goes to a temporary name in the same folder and is renamed when it is safely on disk. A symbolic link is
    followed, and what it points to is replaced.

    Args:
        path: the file to write or replace.
        content: bytes, or text that is written as UTF-8.

    Raises:
        DataError: the file cannot be written; what was at ``path`` before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise DataError(f"cannot write {path}: it is not an ordinary file", "choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, data)
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: a loop of links; ValueError: a NUL in the name.
        raise DataError(f"cannot write {path}: {_reason(error)}", _cure(error)) from error


def write_json(path: Path, document: object) -> None:
    """Write a document as JSON with ``write_whole``.

    Raises:
        ValueError: the document holds NaN or an infinity, which JSON does not know.
        DataError: the file cannot be written.
    """
    write_whole(path, json.dumps(document, allow_nan=False) + "\n")


def _replace(target: Path, data: bytes) -> None:
    # A name of its own, not one made from the target's, so that a long name stays within the limit.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _cure(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return _CURES.get(number or 0, "choose another name or folder")
