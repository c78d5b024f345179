"""Files that are there in full or not at all, and errors that say why one could not be written, or not be read."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from refinedet_cli.errors import CheckpointError, DataError, UsageError

try:
    import fcntl
except ImportError:  # Windows has none; there, folders are not claimed.
    fcntl = None  # type: ignore[assignment]

# Failures of the file system that are no fault of the program that meets them.
DISK_ERRNOS = frozenset(
    {
        errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EPERM, errno.EROFS, errno.ESTALE,
    }
)  # fmt: skip

_PERMISSION = "choose a folder that you may write to, or change its permissions"
_BROKEN = "the disk, or the connection to it, failed: write to another disk"
_CURES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "your disk quota is used up: free some space, or write to another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or write to another disk",
    errno.EIO: _BROKEN,
    errno.ESTALE: _BROKEN,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another name",
    errno.EEXIST: "a part of the path is a file: choose another name",
    errno.EISDIR: "a folder of that name is in the way: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "name a folder that does not exist yet",
}

_ANOTHER = "choose another name or folder"

# Free space from which a disk that calls itself full must mean something else.
_LARGE = 1 << 30
# Free space with which any file that a library writes may not fit.
_LITTLE = 1 << 20
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))

# A name of its own, not one made from the target's, so that a long name stays within the limit.
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


class _Recording(io.FileIO):
    """A file that keeps why it could not be written: libraries that write to it may say something else instead."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write as any file does."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextlib.contextmanager
def whole_file(path: Path, *, size: int = 0) -> Iterator[BinaryIO]:
    """Open a file to write so that nobody ever sees half of it; missing folders are made.

    What is written goes to a temporary name in the same folder, which is renamed when the block has ended well and all
    is safely on disk. A symbolic link is followed, and what it points to is replaced. Only a process that is killed
    leaves the temporary file behind: see `remove_leftovers`.

    Args:
        path: the file to write or replace.
        size: bytes that it will about have, where they are known, to say when the disk is full.

    Yields:
        a file for bytes.

    Raises:
        DataError: the file cannot be written; what was at ``path`` before is untouched, as it is when the block raises.
    """
    target = file_target(path)
    temporary = temporary_beside(target)
    raw: _Recording | None = None
    try:
        raw = _Recording(temporary, "x")
        file = io.BufferedWriter(raw)
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
    except BaseException as error:
        if raw is not None:
            # Not through the buffer, which would try once more to write what it holds.
            raw.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        failure = (raw and raw.failure) or error
        if isinstance(failure, OSError) and not _is_of_another_file(failure, temporary):
            raise cannot_write(path, failure, size) from error
        if isinstance(error, Exception) and isinstance(error.__context__, KeyboardInterrupt):
            # torch.save, interrupted, goes on to say that its file has no end.
            raise error.__context__ from None
        raise


def append_whole(path: Path, content: str) -> None:
    """Add to the end of a file: all of it, or nothing where the disk refuses.

    Args:
        path: a file, which is made where it is missing.
        content: text that is written as UTF-8, at one go.

    Raises:
        DataError: it cannot be written.
    """
    data = content.encode()
    try:
        with _Recording(path, "ab") as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(data):  # A disk that fills up takes a part, and refuses the rest.
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise cannot_write(path, error, len(data)) from error


def sync_folder(folder: Path) -> None:
    """Make sure that the names of what was written in a folder outlast a power cut, where the file system can.

    Raises:
        DataError: the disk failed.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folder.
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise cannot_write(folder, error) from error
    finally:
        os.close(handle)


def require_file(path: Path, cure: str) -> None:
    """Make sure that a file of weights, or one that goes with them, can be read and is not empty.

    Libraries that open it themselves call a file that may not be read missing, or damaged.

    Args:
        path: of the file.
        cure: what to do where there is none.

    Raises:
        CheckpointError: says why it cannot be.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{path}: this is a folder, not a file", "name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not an ordinary file", "save it as a file first")
        path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: there is no such file", cure) from None
    except PermissionError:
        raise CheckpointError(f"{path}: cannot be read: permission denied", "change its permissions") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CheckpointError(f"{path}: cannot be read: {reason}", "check the path") from error
    if not status.st_size:
        raise CheckpointError(f"{path}: the file is empty", "get the file again")


def sync_tree(folder: Path) -> None:
    """Make sure that all files in a folder, and in those in it, are safely on disk before it gets its name.

    Raises:
        DataError: the disk failed.
    """
    for here, folders, names in os.walk(folder):
        for name in names:
            # What is a link, of either kind, was on disk before.
            path = Path(here) / name
            if not path.is_symlink() and path.stat().st_nlink == 1:
                _sync(path)
        for name in folders:
            sync_folder(Path(here) / name)
    sync_folder(folder)


def _sync(path: Path) -> None:
    # Windows syncs no file that is open to read; elsewhere one may be so that is read-only.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        os.close(handle)


def file_target(path: Path) -> Path:
    """Find what a path stands for and make the folders above it, before a file is written there.

    Raises:
        DataError: no file can be written there.
    """
    with placing(path):
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise DataError(f"cannot write {path}: it is not an ordinary file", "choose another name")
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


def temporary_beside(target: Path) -> Path:
    """Make up a name in the same folder that `remove_leftovers` knows."""
    return target.with_name(f".{secrets.token_hex(8)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what `whole_file` left in a folder, and in those in it, when its process was killed.

    Nobody may be writing there now.
    """
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keep other processes that ask the same from a folder within the block.

    Nothing outlives the process, however it ends, but an empty file that the next one takes over. A file system that
    knows no locks refuses nobody, and neither does Windows.

    Args:
        folder: it exists.
        name: of the file in it that is locked.

    Raises:
        UsageError: another process has it.
        DataError: nothing can be written there.
    """
    if fcntl is None:
        yield
        return
    path = folder / name
    with contextlib.ExitStack() as stack:
        while True:
            with placing(path):
                file = path.open("ab")
            stack.callback(file.close)
            try:
                # Not flock, whose locks processes that load pictures inherit and hold a little longer than this one.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break
                raise UsageError(
                    f"{folder}: another process is writing there", "wait until it ends, or choose another folder"
                ) from None
            if _is_at(file, path):
                break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Tell whether a file that is open still has its name; who had it locked before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def placing(path: Path) -> Iterator[None]:
    """Turn what the file system says within the block into a `DataError` about a path that is to be made."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error
    except (RuntimeError, ValueError) as error:
        # RuntimeError: a loop of links; ValueError: a NUL in the name.
        raise DataError(f"cannot write {path}: {error}", _ANOTHER) from error


@contextlib.contextmanager
def written_by_a_library(path: Path) -> Iterator[None]:
    """Turn what goes wrong within the block into a `DataError` if the disk is the reason.

    Libraries that open files themselves say what they like when it is full, or nothing but that it did not work.
    """
    try:
        yield
    except Exception as error:
        failure = error if isinstance(error, OSError) and error.errno in DISK_ERRNOS else None
        if failure is None and _free(path) < _LITTLE:
            failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if failure is None:
            raise
        raise cannot_write(path, failure) from error


def cannot_write(path: Path, error: OSError, size: int = 0) -> DataError:
    """Say why a file or folder cannot be written, and what helps.

    Args:
        path: what was to be written.
        error: what the file system said.
        size: bytes that it would have had, where they are known.
    """
    room = _room(path, size) if error.errno == errno.ENOSPC else ""
    return DataError(f"cannot write {path}: {error.strerror or error}{room}", _CURES.get(error.errno or 0, _ANOTHER))


def _room(path: Path, size: int) -> str:
    """Tell what is needed and what is free."""
    free = _free(path)
    if free == math.inf:
        return ""
    if free > max(size, _LARGE):
        # Space it is not: there are file systems that hold so many files and no more.
        return f" ({_amount(free)} are free, but perhaps no more files fit on it)"
    return f" ({_amount(free)} free)" if not size else f" (it takes {_amount(size)}, and {_amount(free)} are free)"


def _free(path: Path) -> float:
    """Ask for the bytes that are free where a file would be; infinity where nobody knows."""
    try:
        return shutil.disk_usage(path.absolute().parent).free
    except OSError:
        return math.inf


def _amount(count: float) -> str:
    unit, name = next((u, n) for u, n in _UNITS if count >= u or u == 1)
    return f"{count / unit:.3g} {name}"


def _is_of_another_file(error: OSError, temporary: Path) -> bool:
    """Tell whether a block that writes a file failed at something else."""
    return isinstance(error, ConnectionError) or (error.filename is not None and str(error.filename) != str(temporary))
