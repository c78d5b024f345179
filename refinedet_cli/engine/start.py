"""How a training run begins: its resolved config, and the weights it starts from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import (
    Classes,
    DetectorConfig,
    NetworkConfig,
    PreprocessConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.presets import DEFAULT_PRESET, Preset, get_preset
from refinedet_cli.data.dataset import match_classes
from refinedet_cli.engine.recipe import input_sizes
from refinedet_cli.engine.run_file import RunFile
from refinedet_cli.engine.warm_start_notes import explain, parts_line
from refinedet_cli.errors import CheckpointError, ConfigError, UsageError
from refinedet_cli.zoo.backbone_weights import BackboneFile, load_backbone
from refinedet_cli.zoo.checkpoint import load_detector, read_header
from refinedet_cli.zoo.hub import bundled_for, is_bundled, resolve_weights
from refinedet_cli.zoo.warm_start import WarmStart, copy_detector

NO_WEIGHTS = "none"
_DECIDED = {"family", "preset", "classes"}
# Tables that only some families have.
_OF_FAMILY = ("anchors", "grid")


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
    classes: Classes,
    preset: str | None,
    weights: str | None,
    run_file: RunFile,
    settings: Sequence[str],
    *,
    backbone: BackboneFile | None = None,
) -> Preset:
    """Resolve a run's config: preset, then what its starting weights ask for, then run file, then settings.

    ImageNet weights ask for their input normalisation, random ones that nothing is frozen, also where a run file that
    was made for others freezes layers. A setting that is a table changes what it names alone.

    Args:
        classes: those of the data.
        preset: its name; None takes that of the run file, else the detector of the weights with its preset's recipe.
        weights: what the run starts from; may be None (bundled) or "none".
        run_file: settings in tables.
        settings: ``name=value`` pairs; ``train.lr=0.01``, ``loss.neg_ratio=2``.
        backbone: ImageNet weights that the run starts from.

    Raises:
        ConfigError: an unknown name, or a value that does not fit.
        UsageError: a pair that is none.
    """
    if preset is not None and run_file.preset not in (None, preset) and "network" in run_file.settings:
        raise ConfigError(
            f"--preset {preset} does not go with {run_file.path}, whose network is of {run_file.preset}",
            "leave out one of the two",
        )
    named = preset or run_file.preset
    resolved = get_preset(named, classes) if named is not None else _preset_of(weights, classes)
    if backbone is not None:
        detector = replace(resolved.detector, preprocess=_wanted_input(backbone, resolved.detector.preprocess))
        resolved = replace(resolved, detector=detector)
    # What is drawn at random has to be learned: no frozen layers of a preset, or of a run file made for other weights,
    # would ever be of use.
    learn_all = [("train.freeze_stages", 0), ("train.freeze_norm", False), ("train.unfreeze", [])]
    at_random = weights == NO_WEIGHTS and backbone is None
    of_file = _flat(run_file.settings.items())
    pairs = [*learn_all, *of_file] if run_file.weights == NO_WEIGHTS else [*of_file, *learn_all]
    try:
        resolved = _change(resolved, pairs if at_random else of_file)
    except ConfigError as error:
        raise ConfigError(f"{run_file.path}: {error.message}", error.hint) from None
    return _change(resolved, _flat(_split(setting) for setting in settings))


def _wanted_input(file: BackboneFile, config: PreprocessConfig) -> PreprocessConfig:
    """Change the normalisation, not the size, to what ImageNet weights are made for."""
    return replace(config, mean=file.mean, std=file.std, channel_order=file.channel_order)


def _preset_of(weights: str | None, classes: Classes) -> Preset:
    """Take the detector of the weights, whatever was set for it, with the recipe of its preset.

    That of bundled weights is the preset's own, named or not: they were trained in other ways, one after the other.
    """
    if weights == NO_WEIGHTS:
        return get_preset(DEFAULT_PRESET, classes)
    path = resolve_weights(weights)
    config, _ = read_header(path)
    preset = get_preset(config.preset, classes)
    return preset if is_bundled(path) else replace(preset, detector=replace(config, classes=classes))


def _flat(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Part tables into their settings: what a table does not name stays as it is."""
    flat: list[tuple[str, Any]] = []
    for name, value in pairs:
        inner = [(f"{name}.{key}", part) for key, part in value.items()] if isinstance(value, dict) else None
        flat += [(name, value)] if inner is None else _flat(inner)
    return flat


def _change(resolved: Preset, pairs: Sequence[tuple[str, Any]]) -> Preset:
    """Change settings together: what they end up as has to be valid, not each step on the way."""
    document = _document(resolved)
    for name, value in pairs:
        _put(document, name, value)
    train = from_dict(TrainConfig, document.pop("train"), where="train")
    detector = from_dict(DetectorConfig, document)
    _check_small_input(detector, train)
    return Preset(detector=detector, train=train)


def changes_of(resolved: Preset) -> list[str]:
    """List what a config has changed of its preset as ``name=value`` pairs, which ``--set`` would take."""
    usual = dict(_flat(_document(get_preset(resolved.detector.preset, resolved.detector.classes)).items()))
    changed = [(n, v) for n, v in _flat(_document(resolved).items()) if n not in usual or usual[n] != v]
    return [f"{name}={json.dumps(value)}" for name, value in changed]


def _document(resolved: Preset) -> dict[str, Any]:
    return {**to_dict(resolved.detector), "train": to_dict(resolved.train)}


def _check_small_input(detector: DetectorConfig, train: TrainConfig) -> None:
    at = input_sizes(detector.preprocess, train)
    for done in (0.0, *(until for until, _ in train.small_input)):
        try:
            replace(detector, preprocess=at(done))
        except ConfigError as error:
            raise ConfigError(f"train.small_input: {error.message}", "set it to [] for this network") from None


def _put(document: dict[str, Any], name: str, value: Any) -> None:
    *path, last = name.split(".")
    table: Any = document
    if path and path[0] in _OF_FAMILY and document[path[0]] is None:
        raise ConfigError(f"setting {name!r} does not apply: a {document['family']} has no {path[0]}")
    for part in [*path, last]:
        if not isinstance(table, dict):
            raise ConfigError(f"unknown setting {name!r}", f"{'.'.join(path)!r} has no settings of its own")
        if table is document and part in _DECIDED:
            raise ConfigError(f"{name!r} cannot be set", "classes come from the data, the preset from --preset")
        if part not in table:
            known = sorted(k for k in table.keys() - _DECIDED if k not in _OF_FAMILY or table[k] is not None)
            raise ConfigError(f"unknown setting {name!r}", f"known here: {', '.join(known)}")
        parent, table = table, table[part]
    parent[last] = value


def _split(setting: str) -> tuple[str, Any]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise UsageError(f"--set {setting!r} has no value", "write it as name=value, such as train.lr=0.01")
    return name.strip(), _parse(text.strip())


def _parse(text: str) -> Any:
    """Read a value as TOML or JSON would; what is neither is a string."""
    for parse in (json.loads, lambda t: tomllib.loads(f"v = {t}")["v"]):
        try:
            return parse(text)
        except (ValueError, RecursionError):
            continue
    return text


def start_detector(config: DetectorConfig, *, weights: str | None, backbone: BackboneFile | None, seed: int) -> Start:
    """Build a detector and give it its starting weights.

    Args:
        config: of the detector to train.
        weights: None for the bundled ones of this preset, else the default; "none" for a random start; else a
            detector's file or bundled name. Class outputs are taken over by class name.
        backbone: ImageNet weights to load instead.
        seed: of the weights that are drawn.

    Raises:
        ConfigError: both kinds of weights are asked for.
        CheckpointError: the weights cannot be read, or nothing of them fits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build(config)
    if backbone is not None:
        if weights not in (None, NO_WEIGHTS):
            raise ConfigError("--weights and --backbone-weights exclude each other", "give one of them")
        return _backbone_start(detector, backbone)
    if weights == NO_WEIGHTS:
        return Start(detector, ("start: random weights",), {"random": True})
    return _warm_start(detector, resolve_weights(bundled_for(config.preset) if weights is None else weights))


def _backbone_start(detector: Detector, file: BackboneFile) -> Start:
    count = load_backbone(detector.network, file)
    unused = f", {file.tensors - count} unused" if file.tensors > count else ""
    notes = [
        f"start: backbone from {file.origin} ({count} tensors{unused}), the rest random",
        *_input_notes(detector.config.preprocess, file),
        *_stride_notes(detector.config.network, file),
    ]
    place = {"repo": file.repo, "commit": file.commit} if file.repo is not None else {}
    origin = {**place, "file": file.path.name, "sha256": file.sha256, "layout": file.layout}
    return Start(detector, tuple(notes), {"backbone": origin})


def _input_notes(config: PreprocessConfig, file: BackboneFile) -> list[str]:
    """Tell which input the network gets, and what to doubt about it."""
    wanted = _wanted_input(file, config)
    if config != wanted:
        return [f"start: input {_input(config)}, as set; weights of this kind are mostly made for {_input(wanted)}"]
    notes = [f"start: input {_input(config)}, which these weights are made for"]
    if file.layout == "vgg16_reducedfc":
        notes.append(
            "start: whether vgg16_reducedfc is made for BGR or RGB is disputed; BGR is that of the Caffe file it "
            "comes from; for RGB: --set preprocess.channel_order=rgb"
        )
    return notes


def _input(config: PreprocessConfig) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (config.mean, config.std))
    return f"{config.channel_order.upper()} less {mean}, over {std}"


def _stride_notes(config: NetworkConfig, file: BackboneFile) -> list[str]:
    """Tell where a ResNet differs from the one that the weights were trained in; they load all the same."""
    if file.layout != "resnet":
        return []
    cures = {"stride_in": "3x3", "stem_pool": "padded"}
    differing = [f"--set network.{name}={value}" for name, value in cures.items() if getattr(config, name) != value]
    if not differing:
        return []
    return [
        "start: these weights come from a network with network.stride_in 3x3 and network.stem_pool padded; "
        f"for the same network: {' '.join(differing)}"
    ]


def _warm_start(detector: Detector, path: Path) -> Start:
    source = load_detector(path)
    old, new = source.config, detector.config
    match = match_classes(old.classes, new.classes)
    label_map = {label: int(match.labels[label]) for label in range(1, len(new.classes) + 1) if match.labels[label]}
    taken = copy_detector(detector, source.detector, label_map)
    _refuse_misfit(taken, detector, path, old)
    kept = label_map if taken.class_outputs else {}
    origin = {"weights": path.name, "classes_taken_over": [new.classes.names[label - 1] for label in kept]}
    notes = [f"start: {path.name}: {parts_line(taken)}", *explain(taken, new, old, kept)]
    return Start(detector, tuple(notes), origin)


def _refuse_misfit(taken: WarmStart, detector: Detector, path: Path, old: DetectorConfig) -> None:
    """Refuse weights of which less than half of the backbone fits: a chance likeness of shapes is worse than none."""
    sizes = {n: t.numel() for n, t in detector.network.state_dict().items() if n.startswith("backbone.")}
    fitting = [n for n in taken.copied if n in sizes]
    if 2 * sum(sizes[n] for n in fitting) < sum(sizes.values()):
        how_many = f"only {len(fitting)} of the {len(sizes)} tensors of the backbone" if fitting else "none"
        new = detector.config
        kind, wanted, given = ("preset", new.preset, old.preset)
        if wanted == given:  # What was set differs, not the preset.
            kind, wanted, given = ("backbone", new.network.backbone, old.network.backbone)
        told = "another network of its kind" if wanted == given else repr(given)
        raise CheckpointError(
            f"{path}: {how_many} of these weights fit the {kind} {wanted!r} (they are of {told})",
            f"name weights of this {kind}, or start with --weights none or --backbone-weights imagenet",
        )
