"""Files that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from refinedet_cli.errors import DataError, UsageError

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
    errno.EBUSY: "name a folder that does not exist yet",
}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write so that nobody ever sees half of it; missing folders are made.

    What is written goes to a temporary name in the same folder, which is renamed when the block has ended well and all
    is safely on disk. A symbolic link is followed, and what it points to is replaced.

    Args:
        path: the file to write or replace.

    Yields:
        a file for bytes.

    Raises:
        DataError: the file cannot be written; what was at ``path`` before is untouched, as it is when the block raises.
    """
    with _writing(path):
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise DataError(f"cannot write {path}: it is not an ordinary file", "choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _replacing(target) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot write {path}: {_reason(error)}", _cure(error)) from error


def make_folder(path: Path) -> None:
    """Make a folder for output, with those above it; it may be there already.

    Raises:
        UsageError: it, or a part of its path, is a file.
        DataError: it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and the output goes into a folder", "name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise UsageError(f"{path} cannot be made: a part of it is a file", "name another folder") from None
    except OSError as error:
        raise DataError(f"{path} cannot be made: {error.strerror}", "name another folder") from error


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file with ``whole_file``.

    Args:
        path: the file to write or replace.
        content: bytes, or text that is written as UTF-8.

    Raises:
        DataError: the file cannot be written; what was at ``path`` before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, document: object) -> None:
    """Write a document as JSON with ``write_whole``.

    Raises:
        ValueError: the document holds NaN or an infinity, which JSON does not know.
        DataError: the file cannot be written.
    """
    write_whole(path, json.dumps(document, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a new folder to fill, which becomes ``out`` when the block ends well, and vanishes when it does not.

    It lies beside ``out``, so that relative links in it are the same before and after.

    Args:
        out: does not exist yet, or is an empty folder; missing folders above it are made.

    Raises:
        UsageError: there is something at ``out``.
        DataError: it cannot be written.
    """
    with _writing(out):
        target = out.resolve()
        _refuse_occupied(out, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        temporary.mkdir()
    try:
        yield temporary
        with _writing(out):
            if target.exists():
                target.rmdir()
            temporary.rename(target)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(temporary)):
            raise DataError(f"cannot write {out}: {_reason(error)}", _cure(error)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: a loop of links; ValueError: a NUL in the name.
        raise DataError(f"cannot write {path}: {_reason(error)}", _cure(error)) from error


def _refuse_occupied(out: Path, target: Path) -> None:
    if target == Path.cwd():
        raise UsageError(f"--out {out} is the current folder", "name a new folder in it")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder")
    if target.is_dir() and next(target.iterdir(), None) is not None:
        raise UsageError(f"--out {out} is not empty", "name a new folder, or empty this one first")


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    # A name of its own, not one made from the target's, so that a long name stays within the limit.
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
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
