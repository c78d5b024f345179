"""What the folder of a run holds: settings, numbers, starts and files, read back in whatever state they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refinedet_cli.engine.capture import CAPTURE_FILE
from refinedet_cli.engine.environment import ENVIRONMENT_FILE, Start, read_starts
from refinedet_cli.engine.results import RESULTS_NAME
from refinedet_cli.engine.run_figures import best_row
from refinedet_cli.engine.run_log import (
    CLASSES_FILE,
    HEALTH_FILE,
    LOG_FILE,
    METRICS_FILE,
    ClassScores,
    Table,
    read_classes,
    read_table,
    read_warnings,
)
from refinedet_cli.engine.watch import HealthReport
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.checkpoint import read_header

BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
STATE_FILE = "state.pt"
CONFIG_FILE = "config.json"
VALIDATION_FOLDER = "val"
VALIDATION_REPORT = "report.html"
VALIDATION_METRICS = "metrics.json"
EVENTS_FOLDER = "tensorboard"

_MEANINGS = {
    BEST_FILE: "weights with the highest AP on the validation data, for detect, eval and export",
    LAST_FILE: "weights as they were last saved",
    CONFIG_FILE: "all settings, data and start; train --config takes it to do the same again",
    LOG_FILE: "loss, learning rate, positives and speed, a row every few seconds",
    METRICS_FILE: "average precision and recall on the validation data, a row an evaluation",
    CLASSES_FILE: "the best evaluation, class by class",
    HEALTH_FILE: "what the run warned of",
    CAPTURE_FILE: "the step that broke the run off, which train --replay computes again",
    ENVIRONMENT_FILE: "machine, versions, command and times of every start",
    STATE_FILE: "what train --resume goes on from; needed for nothing else",
    f"{VALIDATION_FOLDER}/{VALIDATION_REPORT}": "why the best weights score as they do on the validation data",
    f"{VALIDATION_FOLDER}/{VALIDATION_METRICS}": "the numbers of that page, as eval writes them",
    f"{VALIDATION_FOLDER}/{RESULTS_NAME}": "what the best weights find in the validation pictures, as eval writes it",
    EVENTS_FOLDER: "the numbers of the run for TensorBoard",
}


class RunFile(NamedTuple):
    """A file or folder of a run: its name in there, what it is for, and its size (None of a folder)."""

    name: str
    meaning: str
    size: int | None


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        folder: of the run, as it was named.
        config: config.json; empty where it cannot be read.
        provenance: what the newest weights say of how they were made; empty where there are none.
        steps, evaluations: log.csv and metrics.csv.
        classes: of the best evaluation; may be empty.
        warnings: what it warned of; may be empty.
        starts: of environment.json; empty of a run that was made by an older version.
        files: those that are there.
    """

    folder: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    steps: Table
    evaluations: Table
    classes: tuple[ClassScores, ...]
    warnings: tuple[HealthReport, ...]
    starts: tuple[Start, ...]
    files: tuple[RunFile, ...]

    @property
    def step(self) -> int:
        """Steps that are known to be done."""
        logged = [int(t.columns["step"][-1]) for t in (self.steps, self.evaluations) if len(t)]
        return max([0, *logged, *(start.to_step for start in self.starts[-1:])])

    @property
    def steps_each(self) -> float | None:
        """Steps of an epoch; None where nothing is logged yet."""
        for table in (self.evaluations, self.steps):
            if len(table) and table.columns["epoch"][-1] > 0:
                return float(table.columns["step"][-1] / table.columns["epoch"][-1])
        return None

    @property
    def best(self) -> int | None:
        """The row of ``evaluations`` with the highest AP."""
        return best_row(self.evaluations)

    @property
    def weights(self) -> Path | None:
        """The weights to use; None where none is saved yet."""
        names = {file.name for file in self.files}
        return next((self.folder / name for name in (BEST_FILE, LAST_FILE) if name in names), None)

    def has(self, name: str) -> bool:
        """Tell whether a file is there, by its name in the folder."""
        return any(file.name == name for file in self.files)

    def setting(self, *names: str) -> Any:
        """Look a setting up in config.json, such as ``("train", "batch")``; None where it is not there."""
        value: Any = self.config
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run; nothing in it is needed, and what is broken counts as not there."""
    files = []
    for name, meaning in _MEANINGS.items():
        path = folder / name
        if path.exists():
            files.append(RunFile(name, meaning, None if path.is_dir() else path.stat().st_size))
    return RunRecord(
        folder=folder,
        config=_config(folder / CONFIG_FILE),
        provenance=_provenance(folder),
        steps=read_table(folder / LOG_FILE),
        evaluations=read_table(folder / METRICS_FILE),
        classes=read_classes(folder / CLASSES_FILE),
        warnings=read_warnings(folder / HEALTH_FILE),
        starts=read_starts(folder),
        files=tuple(files),
    )


def _config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _provenance(folder: Path) -> Mapping[str, Any]:
    for name in (LAST_FILE, BEST_FILE):
        try:
            _, provenance = read_header(folder / name)
        except CheckpointError:
            continue
        return provenance
    return {}
