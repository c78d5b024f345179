"""From what a user calls weights to a file: a path, bundled weights by name, or a file on the Hugging Face Hub."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from refinedet_cli.core.presets import DEFAULT_PRESET
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.checkpoint import file_sha256
from refinedet_cli.zoo.hub_client import MissingFileError, bar_of, check_space, client

DEFAULT_WEIGHTS = DEFAULT_PRESET
# What a repository is asked for where no file is named. One name, not "the only file there is": what a name means must
# not change when somebody adds a file, nor differ between the Hub and what the cache has of it.
HUB_FILE = "model.safetensors"
CARD_FILE = "README.md"
# What `refinedet train` leaves in a run's folder, the better first.
_RUN_FILES = ("best.safetensors", "last.safetensors")
_HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@:\s]+))?(:(?P<file>[^:\\]+))?", re.ASCII
)
_FILE_SUFFIXES = {".safetensors", ".pth", ".pt", ".pt2", ".bin", ".ckpt", ".tar", ".onnx", ".xml", ".toml", ".json"}
_SHA256 = re.compile("[0-9a-f]{64}")


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


def bundled_for(preset: str) -> str:
    """Name the bundled weights that a detector of a preset starts from: its own where there are some."""
    return preset if preset in read_manifest() else DEFAULT_WEIGHTS


def is_bundled(path: Path) -> bool:
    """Tell whether a file, as `resolve_weights` found it, is one of the bundled ones."""
    return path in {weights_folder() / entry["file"] for entry in read_manifest().values()}


def resolve_weights(name: str | None) -> Path:
    """Find weights: on this disk first, and on the Hub only where nothing here has that name.

    Args:
        name: in this order, a path to a file, of whatever format; the name of bundled weights; a folder, which stands
            for its best.safetensors, else its last.safetensors, else its only .safetensors file; or
            ``org/repo[@revision][:file]`` on the Hub, where the file is ``model.safetensors`` unless it is named. None
            stands for the default bundled weights.

    Returns:
        The path of an existing file. Of the Hub it is a .safetensors file in the client's cache: nothing that could run
        code is ever downloaded.

    Raises:
        CheckpointError: there is nothing of that name, or it cannot be had.
    """
    wanted = name if name is not None else DEFAULT_WEIGHTS
    path = Path(wanted)
    if path.is_file():
        return path
    manifest = read_manifest()
    if wanted in manifest:
        bundled: Path = weights_folder() / manifest[wanted]["file"]
        if not bundled.is_file():
            raise CheckpointError(f"the bundled weights {wanted!r} are missing at {bundled}", "reinstall refinedet")
        return bundled
    if wanted and path.is_dir():
        return _in_folder(wanted, path)
    return fetch_weights(_hub_place(wanted, path, manifest)).path


def _in_folder(wanted: str, folder: Path) -> Path:
    """Find the weights in a folder, such as that of a run."""
    for file in _RUN_FILES:
        if (folder / file).is_file():
            return folder / file
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return folder / found[0]
    if not found:
        raise CheckpointError(
            f"weights {wanted!r}: the folder holds no .safetensors file", "name the folder of a run, or a file"
        )
    raise CheckpointError(
        f"weights {wanted!r}: the folder holds {len(found)} .safetensors files, and none is best or last",
        f"name one of them: {_some(found)}",
    )


def _hub_place(wanted: str, path: Path, manifest: dict[str, Any]) -> HubName:
    """Read a name as one of the Hub; a slip in a path must not reach the network."""
    place = parse_hub_name(wanted)
    if place is None or (place.file is None and path.suffix in _FILE_SUFFIXES):
        raise CheckpointError(
            f"weights {wanted!r}: there is no such file, folder or bundled model",
            f"bundled: {', '.join(manifest)}; on the Hugging Face Hub: org/repo, org/repo@revision, org/repo:file",
        )
    if wanted == place.repo and path.parent.is_dir():
        raise CheckpointError(
            f"weights {wanted!r}: the folder {path.parent} has no {path.name!r}",
            f"check the path; for a repository on the Hugging Face Hub write {wanted}@main",
        )
    return place


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def parse_hub_name(text: str) -> HubName | None:
    """Read ``org/repo[@revision][:file]``; None if it is not written so."""
    match = _HUB_NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["repo"]:
        return None
    return HubName(match["repo"], match["revision"], match["file"])


def fetch_weights(place: HubName, *, renew: bool = False) -> HubFile:
    """Find weights of the Hub in the cache, or download them into it.

    Args:
        place: where they are.
        renew: as for `fetch`.

    Raises:
        CheckpointError: the file is not a .safetensors file by its name, or cannot be had.
    """
    file = place.file or HUB_FILE
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{place.repo}:{file} is not a .safetensors file; no other weights are downloaded, for they could run code",
            "name a .safetensors file of the repository",
        )
    try:
        return fetch(place.repo, file, place.revision, renew=renew)
    except MissingFileError as error:
        found = _safetensors_in(place)
        cure = f"name one that it has: {_some([f'{place.repo}:{name}' for name in found])}" if found else error.hint
        raise MissingFileError(error.message, cure) from None


def _safetensors_in(place: HubName) -> list[str]:
    """List the .safetensors files of a repository; none where it cannot be asked."""
    from huggingface_hub import HfApi

    with suppress(CheckpointError), client(place.repo, "the list of files", place.revision):
        listed = HfApi().list_repo_files(place.repo, revision=place.revision)
        return sorted(name for name in listed if name.endswith(".safetensors"))
    return []


def fetch(repo: str, file: str, revision: str | None = None, *, renew: bool = False) -> HubFile:
    """Find a file of the Hub in the cache, or download it into the cache.

    Args:
        repo: ``org/repo``.
        file: its name in the repository.
        revision: branch, tag or commit; None is the main branch.
        renew: ask the Hub, whatever the cache has of this revision.

    Returns:
        `HubFile`. What the cache has of this revision is taken without asking the network; what was downloaded has the
        SHA-256 that the Hub gives for it, where it gives one.

    Raises:
        CheckpointError: it is not cached and cannot be had; the hint says what would help.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    with client(repo, file, revision):
        path = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(path, str) and not renew:
            return _hub_file(path, repo, file)
        # Asked first and once: the download alone retries for half a minute before it says what is wrong.
        known = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
        check_space(repo, file, known.size)
        path = hf_hub_download(repo, file, revision=revision, tqdm_class=bar_of(file))
        found = _hub_file(path, repo, file)
    if found.commit == known.commit_hash:  # else somebody has just changed it
        _check_content(found, known.etag)
    return found


def fetch_optional(repo: str, file: str, revision: str | None = None) -> HubFile | None:
    """Do as `fetch`, for a file that a repository need not have; None if it has none, which the cache remembers.

    Raises:
        CheckpointError: as `fetch`, but for a missing file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with client(repo, file, revision):
        path = try_to_load_from_cache(repo, file, revision=revision)
        if path is None:
            with suppress(RemoteEntryNotFoundError):
                get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
            try:
                path = hf_hub_download(repo, file, revision=revision, tqdm_class=bar_of(file))
            except RemoteEntryNotFoundError:
                return None
    return _hub_file(path, repo, file) if isinstance(path, str) else None


def pull(name: str, on_unasked: Callable[[], None] = lambda: None) -> Path:
    """Find weights as `resolve_weights` does, and make sure of those of the Hub.

    Args:
        name: as for `resolve_weights`.
        on_unasked: called where the cache has them, and the Hub cannot be asked whether it has newer ones.

    Returns:
        The path of an existing file. What the cache has is replaced where the branch means another commit by now; it is
        compared with its SHA-256, and downloaded again where it differs. The repository's card lies beside it, if it
        has one, for its licence.

    Raises:
        CheckpointError: as `resolve_weights`.
    """
    place = parse_hub_name(name)
    is_new = place is not None and not _is_cached(place)
    path = resolve_weights(name)
    if place is None or not path.is_relative_to(_cache()):
        return path
    found = fetch_weights(place)
    if not is_new and _is_outdated(found, place, on_unasked):
        found = fetch_weights(place, renew=True)
    if not _is_intact(found):
        _forget(found)
        found = fetch_weights(place)
    with suppress(CheckpointError):
        fetch_optional(place.repo, CARD_FILE, found.commit)
    return found.path


def _is_cached(place: HubName) -> bool:
    from huggingface_hub import try_to_load_from_cache

    file = place.file or HUB_FILE
    with client(place.repo, file, place.revision):
        return isinstance(try_to_load_from_cache(place.repo, file, revision=place.revision), str)


def _is_outdated(found: HubFile, place: HubName, on_unasked: Callable[[], None]) -> bool:
    """Ask the Hub whether a branch or tag means another commit than the one in the cache."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if place.revision == found.commit:
        return False
    try:
        with client(found.repo, found.file, place.revision):
            if constants.HF_HUB_OFFLINE:
                return False
            known = get_hf_file_metadata(hf_hub_url(found.repo, found.file, revision=place.revision))
    except CheckpointError:
        on_unasked()
        return False
    return known.commit_hash not in (None, found.commit)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _is_intact(file: HubFile) -> bool:
    """Tell whether a cached file is still what was downloaded; True too where the cache does not know what that was."""
    content = file.path.resolve()
    return _SHA256.fullmatch(content.name) is None or file_sha256(content) == content.name


def _forget(file: HubFile) -> None:
    """Take a file out of the cache, so that the next `fetch` downloads it.

    Raises:
        CheckpointError: it may not be deleted.
    """
    # The cache keeps the content under another name, and a link to it for each commit.
    try:
        file.path.resolve().unlink(missing_ok=True)
        file.path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{file.path} is damaged and cannot be deleted ({error.strerror})", "delete it yourself"
        ) from None


def _check_content(file: HubFile, etag: str | None) -> None:
    """Compare what was downloaded with what the Hub says it is; the client compares sizes alone."""
    if etag is None or _SHA256.fullmatch(etag) is None or file_sha256(file.path) == etag:
        return
    _forget(file)
    raise CheckpointError(
        f"{file.repo}: {file.file} arrived damaged: its SHA-256 is not the one that the Hub states",
        "run the command again; if it stays so, a proxy or mirror (HF_ENDPOINT) changes files",
    )


def _hub_file(path: str, repo: str, file: str) -> HubFile:
    # The cache keeps a file as snapshots/COMMIT/FILE, and the file may lie in folders of its own.
    commit = Path(path).parents[len(PurePosixPath(file).parts) - 1].name
    return HubFile(path=Path(path), repo=repo, file=file, commit=commit)
