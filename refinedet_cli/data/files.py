"""Files and folders that are either there in full or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from refinedet_cli.errors import DataError, UsageError
from refinedet_cli.files import cannot_write, placing, sync_folder, sync_tree, temporary_beside, whole_file


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
        raise cannot_write(path, error) from error


def require_writable(*paths: Path) -> None:
    """Make sure that files can be written, before work that would be lost if not; nothing is made or changed.

    Args:
        paths: of the files; they may be there, and the folders above them need not.

    Raises:
        DataError: one cannot be written, as far as can be told now.
    """
    for path in paths:
        with placing(path):
            target = path.resolve()
            if target.exists() and not target.is_file():
                raise DataError(f"cannot write {path}: it is not an ordinary file", "choose another name")
            probe = temporary_beside(next(folder for folder in target.parents if folder.exists()) / target.name)
            try:
                probe.write_bytes(b"\0")
            finally:
                with contextlib.suppress(OSError):
                    probe.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file with ``whole_file``.

    Args:
        path: the file to write or replace.
        content: bytes, or text that is written as UTF-8.

    Raises:
        DataError: the file cannot be written; what was at ``path`` before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path, size=len(data)) as file:
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
    with placing(out):
        target = out.resolve()
        _refuse_occupied(out, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        temporary.mkdir()
    try:
        yield temporary
        with placing(out):
            sync_tree(temporary)
            if target.exists():
                target.rmdir()
            temporary.rename(target)
            sync_folder(target.parent)
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(temporary)):
            raise cannot_write(out, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_occupied(out: Path, target: Path) -> None:
    if target == Path.cwd():
        raise UsageError(f"--out {out} is the current folder", "name a new folder in it")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder")
    if target.is_dir() and next(target.iterdir(), None) is not None:
        raise UsageError(f"--out {out} is not empty", "name a new folder, or empty this one first")
