"""How a training run begins: its resolved config, and the weights it starts from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refinedet_cli.core.config import Classes, DetectorConfig, TrainConfig, from_dict, to_dict
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.presets import DEFAULT_PRESET, Preset, get_preset
from refinedet_cli.core.refinedet import build
from refinedet_cli.data.dataset import match_classes
from refinedet_cli.errors import CheckpointError, ConfigError
from refinedet_cli.zoo.checkpoint import load_detector, read_header
from refinedet_cli.zoo.hub import resolve_weights
from refinedet_cli.zoo.warm_start import copy_detector, load_backbone

NO_WEIGHTS = "none"
_DECIDED = {"family", "preset", "classes"}


@dataclass(frozen=True)
class Start:
    """A detector ready to train.

    Attributes:
        detector: with its starting weights.
        notes: where they came from, one line each.
        origin: the same as plain data, for the checkpoint's provenance.
    """

    detector: Detector
    notes: tuple[str, ...]
    origin: dict[str, Any]


def resolve_config(
    classes: Classes, preset: str | None, weights: str | None, file: Path | None, settings: Sequence[str]
) -> Preset:
    """Resolve a run's config: preset, then run file, then single settings.

    Args:
        classes: those of the data.
        preset: its name; None takes the detector of the weights, with the recipe of its preset.
        weights: what the run starts from; may be None (bundled) or "none".
        file: a TOML with any of the tables ``[train]``, ``[network]``, ``[anchors]``, ``[loss]``, ``[preprocess]``,
            ``[postprocess]``, or the config.json of an earlier run.
        settings: ``name=value`` pairs; ``train.lr=0.01``, ``loss.neg_ratio=2``.

    Raises:
        ConfigError: an unknown name, a value that does not fit, or an unreadable file.
    """
    recorded, tables = (None, {}) if file is None else _read_settings(file)
    named = preset or recorded
    resolved = get_preset(named, classes) if named is not None else _preset_of(weights, classes)
    try:
        resolved = _change(resolved, _flat(tables))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}", error.hint) from None
    return _change(resolved, [_split(setting) for setting in settings])


def _preset_of(weights: str | None, classes: Classes) -> Preset:
    """Take the detector of the weights, whatever was set for it, with the recipe of its preset."""
    if weights is None or weights == NO_WEIGHTS:
        return get_preset(DEFAULT_PRESET, classes)
    config, _ = read_header(resolve_weights(weights))
    return replace(get_preset(config.preset, classes), detector=replace(config, classes=classes))


def _read_settings(file: Path) -> tuple[str | None, Mapping[str, Any]]:
    """Read tables of settings, and the name of the preset where the file is the config.json of a run."""
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: {error}", "run files are TOML; the config.json of a run works too") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected tables of settings")
    detector = content.pop("detector", {})
    if not isinstance(detector, dict):
        raise ConfigError(f"{file}: detector must be a table of settings, not {detector!r}")
    preset = detector.get("preset")
    # A replayed config.json names what the data and the preset decide; those are not settings.
    tables = {**{k: v for k, v in detector.items() if k not in _DECIDED}, **content}
    return preset if isinstance(preset, str) else None, tables


def _flat(tables: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in tables.items():
        dotted = f"{where}.{name}" if where else name
        pairs += _flat(value, dotted) if isinstance(value, dict) else [(dotted, value)]
    return pairs


def _change(resolved: Preset, pairs: Sequence[tuple[str, Any]]) -> Preset:
    """Change settings together: what they end up as has to be valid, not each step on the way."""
    document = {**to_dict(resolved.detector), "train": to_dict(resolved.train)}
    for name, value in pairs:
        _put(document, name, value)
    train = document.pop("train")
    return Preset(detector=from_dict(DetectorConfig, document), train=from_dict(TrainConfig, train, where="train"))


def _put(document: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    table: Any = document
    for part in [*path, last]:
        if not isinstance(table, dict):
            raise ConfigError(f"unknown setting {name!r}", f"{'.'.join(path)!r} has no settings of its own")
        if table is document and part in _DECIDED:
            raise ConfigError(f"{name!r} cannot be set", "classes come from the data, the preset from --preset")
        if part not in table:
            known = sorted(table.keys() - _DECIDED)
            raise ConfigError(f"unknown setting {name!r}", f"known here: {', '.join(known)}")
        parent, table = table, table[part]
    parent[last] = value


def _split(setting: str) -> tuple[str, Any]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting!r} has no value", "write it as name=value, such as train.lr=0.01")
    return name.strip(), _parse(text.strip())


def _parse(text: str) -> Any:
    """Read a value as TOML or JSON would; what is neither is a string."""
    for parse in (json.loads, lambda t: tomllib.loads(f"v = {t}")["v"]):
        try:
            return parse(text)
        except (ValueError, RecursionError):
            continue
    return text


def start_detector(config: DetectorConfig, *, weights: str | None, backbone_weights: Path | None, seed: int) -> Start:
    """Build a detector and give it its starting weights.

    Args:
        config: of the detector to train.
        weights: None for the bundled default, "none" for a random start, else a detector's file or bundled name. Class
            outputs are taken over by class name.
        backbone_weights: an ImageNet backbone to load instead.
        seed: of the weights that are drawn.

    Raises:
        ConfigError: both kinds of weights are asked for.
        CheckpointError: the weights cannot be read, or nothing of them fits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build(config)
    if backbone_weights is not None:
        if weights not in (None, NO_WEIGHTS):
            raise ConfigError("--weights and --backbone-weights exclude each other", "give one of them")
        count = load_backbone(detector.network, backbone_weights)
        note = f"start: backbone from {backbone_weights} ({count} tensors), the rest random"
        return Start(detector, (note,), {"backbone": backbone_weights.name})
    if weights == NO_WEIGHTS:
        return Start(detector, ("start: random weights",), {"random": True})
    return _warm_start(detector, resolve_weights(weights))


def _warm_start(detector: Detector, path: Path) -> Start:
    source = load_detector(path)
    old, new = source.config, detector.config
    match = match_classes(old.classes, new.classes)
    label_map = {label: int(match.labels[label]) for label in range(1, len(new.classes) + 1) if match.labels[label]}
    taken = copy_detector(
        detector.network,
        source.detector.network.state_dict(),
        label_map,
        new.classes.with_background,
        old.classes.with_background,
    )
    if not any(name.startswith("backbone.") for name in taken.copied):
        raise CheckpointError(
            f"{path}: none of these weights fit the preset {new.preset!r} (they are of {old.preset!r})",
            "name weights of this preset, or start with --weights none or --backbone-weights",
        )
    notes = [f"start: {path.name} ({len(taken.copied) + len(taken.remapped)} tensors)"]
    known = [new.classes.names[label - 1] for label in label_map]
    if len(known) == len(new.classes):
        notes.append("start: all class outputs taken over by name")
    else:
        notes.append(f"start: class outputs taken over by name: {', '.join(known) or 'none'}; the rest are new")
    if taken.fresh:
        notes.append(f"start: {len(taken.fresh)} tensors have other shapes and start at random")
    if to_dict(old.preprocess) != to_dict(new.preprocess):
        notes.append("start: the input size or normalisation differs from that of the weights")
    return Start(detector, tuple(notes), {"weights": path.name, "classes_taken_over": known})
