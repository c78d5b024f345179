"""Archives over HTTP: resumed where they stopped, checked by size, unpacked without leaving their folder."""

from __future__ import annotations

import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from refinedet_cli.errors import DataError

_CHUNK = 1 << 20
_TIMEOUT = 60.0
_RESUME = "run the same command again: it goes on where it stopped"


def download(url: str, target: Path, size: int, on_progress: Callable[[int], None]) -> None:
    """Fetch a file, going on from an earlier attempt where there is one.

    What has arrived lies beside the target under the same name with ``.part`` until it is whole.

    Args:
        url: http or https.
        target: where the file goes; one of the right size is not fetched again.
        size: bytes that it must have.
        on_progress: called with the bytes that are there so far.

    Raises:
        DataError: no connection, the server refuses, the size is another, or the disk is full.
    """
    if target.is_file() and target.stat().st_size == size:
        on_progress(size)
        return
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent, size - _length(part), url)
    try:
        _fetch(url, part, size, on_progress)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url}: the server answers {error.code} {error.reason}", "try again later") from None
    except (urllib.error.URLError, TimeoutError, http.client.HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url}: the connection failed ({reason})", _RESUME) from None
    except OSError as error:
        raise DataError(
            f"cannot write {part}: {error.strerror or error}", "free some space, or choose another folder"
        ) from None
    arrived = _length(part)
    if arrived < size:
        raise DataError(f"{url}: the connection ended after {arrived:,} of {size:,} bytes", _RESUME)
    if arrived > size:
        part.unlink()
        raise DataError(f"{url}: the server sent more than the {size:,} bytes it should have", "try again later")
    part.replace(target)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file.

    Raises:
        DataError: it is damaged, holds a path that leads out of the folder, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)  # drops leading slashes and dots itself
        else:
            with tarfile.open(archive) as packed_tar:
                packed_tar.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} is damaged ({error})", "delete it and download it again") from None
    except OSError as error:
        raise DataError(f"cannot unpack {archive} in {folder}: {error.strerror or error}", "free some space") from None


def _fetch(url: str, part: Path, size: int, on_progress: Callable[[int], None]) -> None:
    start = _length(part)
    if start > size:
        part.unlink()
        start = 0
    if start == size:
        return
    headers = {"User-Agent": "refinedet", **({"Range": f"bytes={start}-"} if start else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        # A server that does not know ranges sends the whole file with 200.
        resumed = answer.status == 206
        with part.open("ab" if resumed else "wb") as file:
            done = start if resumed else 0
            on_progress(done)
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                on_progress(done)


def _length(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_space(folder: Path, missing: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    # The archive and what comes out of it lie there together for a while.
    if free < 2 * missing:
        raise DataError(
            f"{url} needs about {2 * missing / 1e9:.1f} GB while it is unpacked, {folder} has {free / 1e9:.1f} GB free",
            "free some space, or name another folder with --root",
        )
