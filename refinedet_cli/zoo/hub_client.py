"""The Hugging Face Hub's own client, set as we want it, and its errors told in our words.

The Hub is reached through its client alone, so that its cache, login, HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE mean here what they mean everywhere.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refinedet_cli.errors import CheckpointError

# Read by the client at every call. Its telemetry is more requests and more about the machine in each; the Xet protocol
# keeps threads and a second cache, which a process that forks its data loaders is better off without.
_CLIENT_SETTINGS = {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True}


class Transfer(NamedTuple):
    """How far a file has come on its way from or to the Hub.

    Attributes:
        file: its name.
        done: bytes so far.
        total: bytes there are; None where the Hub does not say.
    """

    file: str
    done: int
    total: int | None


class MissingFileError(CheckpointError):
    """The repository is there, and the file is not in it."""


def ignore(transfer: Transfer) -> None:
    """Take no notice of progress."""


@dataclass(frozen=True)
class _Network:
    offline: bool = False
    on_progress: Callable[[Transfer], None] = ignore


_network: ContextVar[_Network | None] = ContextVar("network", default=None)


@contextmanager
def network(*, offline: bool = False, on_progress: Callable[[Transfer], None] = ignore) -> Iterator[None]:
    """Decide for the length of a ``with`` block how the Hub is used, by this thread.

    Args:
        offline: what is not on this disk is refused, as with HF_HUB_OFFLINE=1.
        on_progress: called while a file is sent or received. Without it nothing is shown, the client's bars included.
    """
    token = _network.set(_Network(offline, on_progress))
    try:
        yield
    finally:
        _network.reset(token)


def _current() -> _Network:
    return _network.get() or _Network()


def report_progress(transfer: Transfer) -> None:
    """Tell whoever watches this thread's transfers."""
    _current().on_progress(transfer)


class _Bar:
    """Stands in for the client's progress bar, and passes on what it is told."""

    file = ""

    def __init__(self, *, total: int | None = None, initial: int = 0, **_: Any) -> None:
        self._total, self._done = total, initial

    def update(self, n: int = 1) -> None:
        """Count bytes; a download that begins anew takes some back."""
        self._done += n
        report_progress(Transfer(self.file, self._done, self._total))

    def close(self) -> None:
        """Do nothing; there is no bar."""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def bar_of(file: str) -> Any:
    """Make what the client may use as its ``tqdm_class`` while it downloads a file."""
    # The client itself knows but the address, whose last part is a hash.
    return type("FileBar", (_Bar,), {"file": file})


@contextmanager
def client(repo: str, file: str | None, revision: str | None = None) -> Iterator[None]:
    """Set the client as we want it for a call, and turn its errors into ours.

    Args:
        repo: ``org/repo``.
        file: what is wanted of it, for messages; None where something is sent.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        CheckpointError: the client failed; the hint says what would help.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    settings = _CLIENT_SETTINGS | ({"HF_HUB_OFFLINE": True} if _current().offline else {})
    before = {name: getattr(constants, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(constants, name, value)
        yield
    # HTTPError is that of the client's own HTTP library, which differs between its versions.
    except (HTTPError, EntryNotFoundError, OSError) as error:
        place = repo if revision is None else f"{repo}@{revision}"
        # "Neither on the Hub nor in the cache" hides what went wrong on the Hub.
        hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        reason = hidden if isinstance(hidden, Exception) else error
        raise refusal(reason, place, file) or _failure(reason, place, file) from None
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def refusal(error: Exception, place: str, file: str | None) -> CheckpointError | None:
    """Explain what the Hub answered; None if the error is something else."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{place.partition('@')[0]}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{place}: its owner grants access on request", f"ask for it at {page}, then {login}")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{place}: the Hub has no such repository, or it is private", f"check the name; if it is private, {login}"
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{place}: the repository has no such revision", f"see {page}/commits/main")
    if isinstance(error, RemoteEntryNotFoundError):
        return MissingFileError(
            f"{place}: the repository has no file {file!r}", f"see {page}/tree/main; name one of its files as REPO:FILE"
        )
    if not isinstance(error, HfHubHTTPError):
        return None
    status = error.response.status_code
    if status in (401, 403):
        return CheckpointError(
            f"{place}: the Hub refuses access ({status})", f"{login}; a token that has expired is refused too"
        )
    return CheckpointError(f"{place}: the Hub answered {status}", "try again later")


def _failure(error: Exception, place: str, file: str | None) -> CheckpointError:
    """Explain why there was no answer, or why it could not be kept."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HTTPError  # type: ignore[attr-defined]

    cache = constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        return _forbidden(place, file, cache)
    if isinstance(error, FileMetadataError):
        return CheckpointError(
            f"{place}: {constants.ENDPOINT} does not answer as a Hub", "check HF_ENDPOINT, the proxy and the firewall"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if file is None:
        return CheckpointError(
            f"{place}: publishing failed, for the connection to {constants.ENDPOINT} did ({reason})",
            "check the network and the proxy, and run the command again",
        )
    if isinstance(error, HTTPError):
        return CheckpointError(
            f"{place}: {file} is not in the cache, and the connection to {constants.ENDPOINT} failed ({reason})",
            "check the network and the proxy, or get the file elsewhere and name it by its path",
        )
    number = getattr(error, "errno", None)
    if number is None:
        return CheckpointError(f"{place}: {file} arrived incomplete ({reason})", "run the command again")
    cure = "free some space" if errno.errorcode.get(number) in ("ENOSPC", "EDQUOT") else "make it writable"
    return CheckpointError(
        f"{place}: {file} cannot be stored in {cache} ({os.strerror(number)})",
        f"{cure}, or set HF_HOME to another folder",
    )


def _forbidden(place: str, file: str | None, cache: str) -> CheckpointError:
    forbids, cure = ("--offline", "leave out --offline") if _current().offline else ("HF_HUB_OFFLINE", "unset it")
    if file is None:
        return CheckpointError(f"{place}: publishing needs the network, which {forbids} forbids", cure)
    return CheckpointError(
        f"{place}: {file} is not in the cache ({cache}), and {forbids} forbids the network",
        f"{cure}, or copy the cache from a machine that has the file",
    )


def check_space(repo: str, file: str, size: int | None) -> None:
    """Refuse a download that the disk has no room for.

    Raises:
        CheckpointError: it takes more than is free.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size is not None and size > free:
        raise CheckpointError(
            f"{repo}: {file} takes {size / 1e6:,.0f} MB, and {cache} has {free / 1e6:,.0f} MB free",
            "free some space, or set HF_HOME to a folder on another disk",
        )
