"""From what a user calls weights to a file: bundled weights by name, or a path."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from refinedet_cli.core.presets import DEFAULT_PRESET
from refinedet_cli.errors import CheckpointError

DEFAULT_WEIGHTS = DEFAULT_PRESET


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
