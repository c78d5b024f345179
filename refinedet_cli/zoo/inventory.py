"""What is known of a model: from its own header, the manifest of the bundled ones, and the card of its repository."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.checkpoint import file_sha256, read_header
from refinedet_cli.zoo.hub import CARD_FILE, HUB_FILE, read_manifest, weights_folder

_SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


@dataclass(frozen=True)
class Scores:
    """How well a model did on some data.

    Attributes:
        data: name of the data.
        pictures: how many; None where that is not recorded.
        chosen_by: whether the weights were chosen among others by these very scores, which makes them too good.
        values: score by its name, such as ``("AP50", 0.29)``; never empty.
        of_class: AP50 of each class, by name; may be empty.
    """

    data: str
    pictures: int | None
    chosen_by: bool
    values: tuple[tuple[str, float], ...]
    of_class: tuple[tuple[str, float], ...] = ()

    def value(self, name: str) -> float | None:
        """One score; None where it is not known."""
        return dict(self.values).get(name)


@dataclass(frozen=True)
class Model:
    """A model on this disk, without its weights.

    Attributes:
        name: what --weights takes.
        source: where it is from: "bundled", "cache" of the Hub, or a "file".
        path: the checkpoint.
        bytes, sha256: of that file.
        config: of the detector, its classes included.
        provenance: what the training run recorded.
        facts: the manifest's entry of these very bytes; empty for what is not bundled.
        licence: None where none is stated.
        scores: None where none are recorded.
    """

    name: str
    source: Literal["bundled", "cache", "file"]
    path: Path
    bytes: int
    sha256: str
    config: DetectorConfig
    provenance: Mapping[str, Any]
    facts: Mapping[str, Any]
    licence: str | None
    scores: Scores | None

    @property
    def trained_on(self) -> str | None:
        """The name of the training data; None where it is not recorded."""
        data = _table(self.provenance, "data")
        return str(data["name"]) if "name" in data else None


def describe(path: Path, name: str, source: Literal["bundled", "cache", "file"]) -> Model:
    """Read what is known of a checkpoint, without its weights.

    Raises:
        CheckpointError: it is no checkpoint of ours.
    """
    config, provenance = read_header(path)
    sha256 = file_sha256(path)
    facts = _facts(sha256)
    return Model(
        name=name,
        source=source,
        path=path,
        bytes=path.stat().st_size,
        sha256=sha256,
        config=config,
        provenance=provenance,
        facts=facts,
        licence=facts.get("licence") or _card_licence(path),
        scores=_manifest_scores(facts) or _recorded_scores(provenance),
    )


def bundled_models() -> list[Model]:
    """Describe the models that come with the tool.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    return [describe(weights_folder() / entry["file"], name, "bundled") for name, entry in read_manifest().items()]


def cached_models() -> list[Model]:
    """Describe the models of ours that the Hub's client keeps on this disk; the network is not used.

    Returns:
        sorted by name. Everything else in the cache, and what cannot be read, is left out.
    """
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, ValueError):  # there is none, or a file is in its place
        return []
    models = []
    for repo in cache.repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            for file in revision.files:
                if file.file_path.suffix == ".safetensors":
                    inside = file.file_path.relative_to(revision.snapshot_path).as_posix()
                    name = _hub_name(repo.repo_id, revision.refs, revision.commit_hash, inside)
                    with suppress(CheckpointError, OSError):
                        models.append(describe(file.file_path, name, "cache"))
    return sorted(models, key=lambda model: model.name)


def count_parameters(path: Path) -> int:
    """Count what training changes in a checkpoint, from its header alone; statistics of norms are not counted."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.endswith(_STATISTICS)]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _hub_name(repo: str, refs: frozenset[str], commit: str, file: str) -> str:
    """Write what --weights has to be given for a cached file."""
    revision = "" if "main" in refs else f"@{min(refs, default=commit)}"
    return f"{repo}{revision}" + ("" if file == HUB_FILE else f":{file}")


def _facts(sha256: str) -> Mapping[str, Any]:
    return next((entry for entry in read_manifest().values() if entry.get("sha256") == sha256), {})


def _card_licence(path: Path) -> str | None:
    """Read the licence out of the card beside a checkpoint, as the Hub has it."""
    card = path.with_name(CARD_FILE)
    if not card.is_file():
        return None
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        stated = metadata_load(card)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    licence = stated.get("license") if isinstance(stated, dict) else None
    if licence == "other" and isinstance(stated, dict):
        licence = stated.get("license_name", licence)
    return licence if isinstance(licence, str) else None


def _manifest_scores(facts: Mapping[str, Any]) -> Scores | None:
    values = tuple((name, float(facts[name])) for name in _SCORES if name in facts)
    if not values:
        return None
    of_class = tuple((name, float(value)) for name, value in facts.get("AP50_of_class", {}).items())
    return Scores(str(facts.get("scored_on")), None, chosen_by=False, values=values, of_class=of_class)


def _recorded_scores(provenance: Mapping[str, Any]) -> Scores | None:
    """Take the scores of the run's last validation; a header may hold anything, so what is odd counts as unknown."""
    validation = _table(provenance, "validation")
    values = tuple((n, float(validation[n])) for n in _SCORES if isinstance(validation.get(n), (int, float)))
    if not values:
        return None
    pictures = validation.get("pictures")
    return Scores(
        str(validation.get("name")), pictures if isinstance(pictures, int) else None, chosen_by=True, values=values
    )


def _table(provenance: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = provenance.get(name)
    return found if isinstance(found, Mapping) else {}
