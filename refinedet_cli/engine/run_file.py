"""Run files: data, start and settings of a training run as TOML, or as the config.json of an earlier run."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refinedet_cli.data.images import missing_cure
from refinedet_cli.errors import ConfigError

_DECIDED = {"family", "preset", "classes"}
_DATA = ("train", "val", "images", "root")
_START = ("preset", "weights", "backbone_weights")
# Names that mean the same wherever a run file lies, whatever stands beside it.
_NAMES = {"coco", "voc2007", "voc2012", "none", "imagenet"}


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """What a run file says; whatever it leaves out is empty or None.

    Attributes:
        path: the file; None where there is none.
        preset: its name.
        data: training data, to be joined.
        val: validation data, to be joined.
        images: folder of the pictures that an annotation file names.
        root: folder in which known data sets are looked up by name.
        weights: what the run starts from, as ``--weights`` takes it.
        backbone_weights: as ``--backbone-weights`` takes them.
        settings: tables of settings: network, anchors, loss, preprocess, postprocess, train. Unchecked.
    """

    path: Path | None = None
    preset: str | None = None
    data: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    images: Path | None = None
    root: Path | None = None
    weights: str | None = None
    backbone_weights: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_run_file(path: Path | None) -> RunFile:
    """Read a run file: TOML with any of the tables, or the config.json of a run.

    Paths in ``[data]`` and ``[start]`` are relative to the file where they exist there, else to the working folder.

    Args:
        path: of the file; None gives an empty `RunFile`.

    Returns:
        `RunFile`. Its paths need not exist; its settings need not be known.

    Raises:
        ConfigError: the file cannot be read, or ``[data]`` or ``[start]`` holds what does not belong there.
    """
    if path is None:
        return RunFile()
    content = _load(path)
    detector, data, start = (_table(path, content, name) for name in ("detector", "data", "start"))
    for name, table, known in (("data", data, _DATA), ("start", start, _START)):
        for key in table:
            if key not in known:
                raise ConfigError(f"{path}: unknown setting '{name}.{key}'", f"known here: {', '.join(known)}")
    images, root = (_text(path, data, "data", key) for key in ("images", "root"))
    weights, backbone = (_text(path, start, "start", key) for key in ("weights", "backbone_weights"))
    recorded = detector.get("preset")
    return RunFile(
        path=path,
        preset=_text(path, start, "start", "preset") or (recorded if isinstance(recorded, str) else None),
        data=tuple(_locate(path, source) for source in _texts(path, data, "train")),
        val=tuple(_locate(path, source) for source in _texts(path, data, "val")),
        images=None if images is None else Path(_locate(path, images)),
        root=None if root is None else Path(_locate(path, root)),
        weights=None if weights is None else _locate(path, weights),
        backbone_weights=None if backbone is None else _locate(path, backbone),
        # A replayed config.json names what the data and the preset decide; those are not settings.
        settings={**{k: v for k, v in detector.items() if k not in _DECIDED}, **content},
    )


def relative_to_run(value: str, folder: Path) -> str:
    """Write a path or name so that a run file in ``folder`` finds it from any working folder.

    Absolute paths stay absolute, so that the run's folder may be moved; relative ones become relative to the folder, so
    that everything may be moved together. What names nothing on disk is a name and stays as it is.
    """
    if value in _NAMES or Path(value).is_absolute():
        return value
    place, part = _existing(Path(), value)
    if place is None:
        return value
    try:
        found = os.path.relpath(place.resolve(), folder.resolve())
    except ValueError:  # another drive
        return str(place.resolve()) + part
    return Path(found).as_posix() + part


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", _cure(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}", "run files are TOML; the config.json of a run works too") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected tables of settings")
    return content


def _cure(path: Path, error: OSError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return missing_cure(path)
    if isinstance(error, IsADirectoryError):
        return "it is a folder; name the TOML file, or the config.json of a run, that is in it"
    return "check the path and its permissions"


def _table(path: Path, content: dict[str, Any], name: str) -> dict[str, Any]:
    table = content.pop(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {name} must be a table of settings, not {table!r}")
    return table


def _text(path: Path, table: Mapping[str, Any], where: str, key: str) -> str | None:
    value = table.get(key)
    if value is None or (isinstance(value, str) and value):
        return value
    raise ConfigError(f"{path}: {where}.{key} must be a text, not {value!r}")


def _texts(path: Path, table: Mapping[str, Any], key: str) -> list[str]:
    value = table.get(key, [])
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list) and all(isinstance(v, str) and v for v in values):
        return values
    raise ConfigError(
        f"{path}: data.{key} must be a list of texts, not {value!r}", f'write it as {key} = ["voc2007:trainval"]'
    )


def _locate(path: Path, value: str) -> str:
    """Take a path from beside the run file if it exists there; else leave it for the working folder."""
    if value in _NAMES or Path(value).is_absolute():
        return value
    place, part = _existing(path.parent, value)
    return value if place is None else str(place) + part


def _existing(folder: Path, value: str) -> tuple[Path | None, str]:
    """Find a path, with or without a ``:PART`` at its end, in a folder; give it and the part."""
    name, colon, part = value.rpartition(":")
    if colon and name in _NAMES:
        return None, ""
    if (folder / value).exists():
        return folder / value, ""
    if colon and (folder / name).exists():
        return folder / name, colon + part
    return None, ""
