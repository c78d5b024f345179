"""Anchors as a file: a run file with the settings that `refinedet train --anchors` takes over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refinedet_cli.core.config import AnchorConfig, DetectorConfig, from_dict
from refinedet_cli.engine.run_file import read_run_file
from refinedet_cli.errors import ConfigError

ANCHORS_NAME = "anchors.toml"


@dataclass(frozen=True)
class AnchorFile:
    """Anchors that were fitted to some data.

    Attributes:
        path: the file.
        anchors: valid ones.
        input_size: (height, width) they were fitted for, px-in; None where the file does not say.
    """

    path: Path
    anchors: AnchorConfig
    input_size: tuple[int, int] | None

    @property
    def settings(self) -> list[str]:
        """The anchors as ``name=value`` settings."""
        return [
            f"anchors.strides={json.dumps(self.anchors.strides)}",
            f"anchors.shapes={json.dumps(self.anchors.shapes)}",
        ]

    def mismatch(self, detector: DetectorConfig) -> str | None:
        """Say that a detector has another input size than the anchors were fitted for; None where it has the same."""
        height, width = detector.preprocess.height, detector.preprocess.width
        if self.input_size in (None, (height, width)):
            return None
        fitted_height, fitted_width = self.input_size or (0, 0)
        return (
            f"{self.path} was fitted to an input of {fitted_width} x {fitted_height} px, but this detector takes "
            f"{width} x {height}: objects will be of other sizes than its anchors"
        )


def anchor_toml(anchors: AnchorConfig, input_size: tuple[int, int], remarks: Sequence[str]) -> str:
    """Write anchors as TOML.

    Args:
        anchors: strides and shapes are written; variances stay the detector's.
        input_size: (height, width) the shapes are for, px-in.
        remarks: lines of the comment at its top.

    Returns:
        a run file: `read_anchor_file` gives the same anchors back, ``--config`` takes it as well.
    """
    comments = [f"# {' '.join(''.join(c if c.isprintable() else ' ' for c in line).split())}" for line in remarks]
    levels = [
        f"    [{', '.join(f'[{w}, {h}]' for w, h in level)}],  # stride {stride}"
        for stride, level in zip(anchors.strides, anchors.shapes, strict=True)
    ]
    lines = [
        *comments,
        "",
        "[anchors]",
        f"strides = {json.dumps(anchors.strides)}",
        "# Width and height of each anchor of a cell, in pixels of the network's input.",
        "shapes = [",
        *levels,
        "]",
        "",
        "[preprocess]",
        f"height = {input_size[0]}",
        f"width = {input_size[1]}",
    ]
    return "\n".join(lines) + "\n"


def read_anchor_file(path: Path) -> AnchorFile:
    """Read anchors from a run file.

    Raises:
        ConfigError: the file cannot be read, has no anchors, or has none that are valid.
    """
    tables = read_run_file(path).settings
    table, size = tables.get("anchors"), tables.get("preprocess", {})
    if table is None:
        raise ConfigError(f"{path} has no table [anchors]", "name the anchors.toml that `refinedet anchors` wrote")
    try:
        anchors = from_dict(AnchorConfig, table, where="anchors")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from None
    height, width = (size.get(name) for name in ("height", "width")) if isinstance(size, dict) else (None, None)
    known = isinstance(height, int) and isinstance(width, int)
    return AnchorFile(path, anchors, (height, width) if known else None)  # type: ignore[arg-type]
