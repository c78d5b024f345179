"""From what a user calls weights to a file: bundled weights by name, a path, or a file on the Hugging Face Hub.

The Hub is reached through its own client alone, so that its cache, HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
mean here what they mean everywhere.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from refinedet_cli.core.presets import DEFAULT_PRESET
from refinedet_cli.errors import CheckpointError

DEFAULT_WEIGHTS = DEFAULT_PRESET
_HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@:\s]+))?(:(?P<file>[^:\\]+))?", re.ASCII
)
# Read by the client at every call. Its telemetry is more requests and more about the machine in each; the Xet protocol
# keeps threads and a second cache, which a process that forks its data loaders is better off without.
_CLIENT_SETTINGS = {"HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_XET": True}


@dataclass(frozen=True)
class HubName:
    """A place on the Hub as a user writes it: ``org/repo``, ``org/repo@revision``, with ``:file`` at the end or not."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True)
class HubFile:
    """A file of the Hub on this disk.

    Attributes:
        path: in the client's cache.
        repo: ``org/repo``.
        file: its name in there.
        commit: the state of the repository that it belongs to.
    """

    path: Path
    repo: str
    file: str
    commit: str


def weights_folder() -> Path:
    """Find the bundled weights: inside an installed package, or beside it in a clone or an editable install.

    Raises:
        CheckpointError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_weights", package.parent / "weights"):
        if (folder / "manifest.toml").is_file():
            return folder
    raise CheckpointError("the bundled weights are missing", "reinstall refinedet, or name a file with --weights")


def read_manifest() -> dict[str, dict[str, Any]]:
    """Read what is known of the bundled weights, by name: file, sha256, data, recipe, metrics, licence."""
    with (weights_folder() / "manifest.toml").open("rb") as file:
        return tomllib.load(file)


def resolve_weights(name: str | None) -> Path:
    """Find weights.

    Args:
        name: a path to a file, the name of bundled weights, or None for the default ones.

    Returns:
        The path of an existing file; a path on disk wins over a bundled name.

    Raises:
        CheckpointError: there is no such file and nothing is bundled under that name.
    """
    wanted = name if name is not None else DEFAULT_WEIGHTS
    path = Path(wanted)
    if path.is_file():
        return path
    manifest = read_manifest()
    if wanted not in manifest:
        what = "is a folder, not a file" if path.is_dir() else "is neither a file nor the name of bundled weights"
        raise CheckpointError(f"weights {wanted!r}: {what}", f"bundled are: {', '.join(manifest)}")
    bundled: Path = weights_folder() / manifest[wanted]["file"]
    if not bundled.is_file():
        raise CheckpointError(f"the bundled weights {wanted!r} are missing at {bundled}", "reinstall refinedet")
    return bundled


def parse_hub_name(text: str) -> HubName | None:
    """Read ``org/repo[@revision][:file]``; None if it is not written so."""
    match = _HUB_NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        return None
    return HubName(match["repo"], match["revision"], match["file"])


def fetch(repo: str, file: str, revision: str | None = None) -> HubFile:
    """Find a file of the Hub in the cache, or download it into the cache.

    Args:
        repo: ``org/repo``.
        file: its name in the repository.
        revision: branch, tag or commit; None is the main branch.

    Returns:
        `HubFile`. What the cache has of this revision is taken without asking the network.

    Raises:
        CheckpointError: it is not cached and cannot be had; the hint says what would help.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    with _client(repo, file, revision):
        path = try_to_load_from_cache(repo, file, revision=revision)
        if not isinstance(path, str):
            # Asked first and once: the download alone retries for half a minute before it says what is wrong.
            _check_space(repo, file, get_hf_file_metadata(hf_hub_url(repo, file, revision=revision)).size)
            path = hf_hub_download(repo, file, revision=revision)
    return _hub_file(path, repo, file)


def fetch_optional(repo: str, file: str, revision: str | None = None) -> HubFile | None:
    """Do as `fetch`, for a file that a repository need not have; None if it has none, which the cache remembers.

    Raises:
        CheckpointError: as `fetch`, but for a missing file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with _client(repo, file, revision):
        path = try_to_load_from_cache(repo, file, revision=revision)
        if path is None:
            with suppress(RemoteEntryNotFoundError):
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
            try:
                path = hf_hub_download(repo, file, revision=revision)
            except RemoteEntryNotFoundError:
                return None
    return _hub_file(path, repo, file) if isinstance(path, str) else None


def _hub_file(path: str, repo: str, file: str) -> HubFile:
    # The cache keeps a file as snapshots/COMMIT/FILE, and the file may lie in folders of its own.
    commit = Path(path).parents[len(PurePosixPath(file).parts) - 1].name
    return HubFile(path=Path(path), repo=repo, file=file, commit=commit)


@contextmanager
def _client(repo: str, file: str, revision: str | None) -> Iterator[None]:
    """Set the client as we want it for a call, and turn its errors into ours."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    before = {name: getattr(constants, name) for name in _CLIENT_SETTINGS}
    try:
        for name, value in _CLIENT_SETTINGS.items():
            setattr(constants, name, value)
        yield
    # HTTPError is that of the client's own HTTP library, which differs between its versions.
    except (HTTPError, EntryNotFoundError, OSError) as error:
        place = repo if revision is None else f"{repo}@{revision}"
        # "Neither on the Hub nor in the cache" hides what went wrong on the Hub.
        hidden = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        reason = hidden if isinstance(hidden, Exception) else error
        raise _refusal(reason, place, file) or _failure(reason, place, file) from None
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


def _refusal(error: Exception, place: str, file: str) -> CheckpointError | None:
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
        return CheckpointError(
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


def _failure(error: Exception, place: str, file: str) -> CheckpointError:
    """Explain why there was no answer, or why it could not be kept."""
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HTTPError  # type: ignore[attr-defined]

    cache = constants.HF_HUB_CACHE
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{place}: {file} is not in the cache ({cache}), and HF_HUB_OFFLINE forbids the network",
            "unset HF_HUB_OFFLINE, or copy the cache from a machine that has the file",
        )
    if isinstance(error, FileMetadataError):
        return CheckpointError(
            f"{place}: {constants.ENDPOINT} does not answer as a Hub", "check HF_ENDPOINT, the proxy and the firewall"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
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


def _check_space(repo: str, file: str, size: int | None) -> None:
    """Refuse a download that the disk has no room for."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size is not None and size > free:
        raise CheckpointError(
            f"{repo}: {file} takes {size / 1e6:,.0f} MB, and {cache} has {free / 1e6:,.0f} MB free",
            "free some space, or set HF_HOME to a folder on another disk",
        )
