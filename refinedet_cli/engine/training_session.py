"""One `refinedet train` from its options to a run: data, config, weights, device, and the folder it writes to."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refinedet_cli.core.config import to_dict
from refinedet_cli.core.presets import Preset
from refinedet_cli.data.dataset import Dataset, join, remap
from refinedet_cli.data.source import find_splits, hold_out, open_dataset
from refinedet_cli.engine.device import DeviceName, describe_device, select_device, select_precision
from refinedet_cli.engine.start import Start, resolve_config, start_detector
from refinedet_cli.engine.train import LAST_FILE, STATE_FILE, Report, RunOptions, TrainResult, train
from refinedet_cli.errors import DataError, UsageError

HELD_OUT = 0.15


@dataclass(frozen=True)
class TrainingSession:
    """A run that is ready to begin.

    Attributes:
        preset: the resolved detector and recipe.
        start: the detector with its starting weights.
        data, validation: the pictures.
        options: where and how to run.
        notes: what a user should know before it begins, one line each.
    """

    preset: Preset
    start: Start
    data: Dataset
    validation: Dataset | None
    options: RunOptions
    notes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved config as plain data."""
        return {"detector": to_dict(self.preset.detector), "train": to_dict(self.preset.train)}

    def run(self, on_progress: Callable[[Report], None], should_stop: Callable[[], bool]) -> TrainResult:
        """Train until the end, or until ``should_stop``, which is asked after every step."""
        options = replace(self.options, should_stop=should_stop)
        return train(self.start.detector, self.data, self.validation, self.preset.train, options, on_progress)


def prepare(
    *,
    data: Sequence[str],
    val: str | None,
    images: Path | None,
    out: Path,
    weights: str | None,
    backbone_weights: Path | None,
    preset: str | None,
    config: Path | None,
    settings: Sequence[str],
    device: DeviceName,
    workers: int | None,
    cache: bool | None,
    resume: bool,
    overwrite: bool,
) -> TrainingSession:
    """Check everything that can be checked before the first step.

    Raises:
        UsageError: ``out`` holds a run already and neither ``resume`` nor ``overwrite`` says what to do with it.
        ConfigError, DataError, CheckpointError, DeviceError: as the parts raise them.
    """
    _check_folder(out, resume=resume, overwrite=overwrite)
    training, validation = _open(data, val, images)
    notes: list[str] = []
    if not any(len(r.boxes) for r in training.records):
        raise DataError(f"{training.name}: no picture has an object to learn", "check the annotations")
    resolved = resolve_config(training.classes, preset, None if backbone_weights else weights, config, settings)
    if validation is None:
        training, validation = hold_out(training, fraction=HELD_OUT, seed=resolved.train.seed)
        notes.append(f"validation: {len(validation.records)} pictures held out of {training.name}")
    else:
        validation = remap(validation, training.classes)
        notes.append(f"validation: {validation.name}, {len(validation.records)} pictures")
    where = select_device(device)
    precision = select_precision(resolved.train.precision, where)
    start = start_detector(
        resolved.detector, weights=weights, backbone_weights=backbone_weights, seed=resolved.train.seed
    )
    height, width = resolved.detector.preprocess.height, resolved.detector.preprocess.width
    notes = [
        f"train: {training.name}, {len(training.records)} pictures, {training.objects} objects, "
        f"{len(training.classes)} classes",
        *notes,
        *training.notes,
        *start.notes,
        f"run: preset {resolved.detector.preset} at {height} x {width}, {resolved.train.epochs} epochs of batch "
        f"{min(resolved.train.batch, len(training.records))}, {describe_device(where)}, {precision}",
    ]
    options = RunOptions(
        out=out,
        device=where,
        precision=precision,
        workers=max(0, (os.cpu_count() or 1) - 1) if workers is None else workers,
        cache=_fits_in_memory(training) if cache is None else cache,
        resume=resume,
        should_stop=never,
        provenance={"preset": resolved.detector.preset, "start": start.origin, "seed": resolved.train.seed},
    )
    return TrainingSession(resolved, start, training, validation, options, tuple(notes))


def never() -> bool:
    """Let a run go to its end."""
    return False


def _check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder for the run")
    holds_run = (out / STATE_FILE).is_file() or (out / LAST_FILE).is_file()
    if holds_run and not (resume or overwrite):
        raise UsageError(f"--out {out} holds a run already", "go on with --resume, replace it with --overwrite")


def _open(data: Sequence[str], val: str | None, images: Path | None) -> tuple[Dataset, Dataset | None]:
    """Open training and validation data; None where a part has to be held out."""
    training = join([open_dataset(source, split="train", images=images) for source in data])
    if val is not None:
        return training, open_dataset(val, split="val", images=images)
    parts = [open_dataset(s, split="val", images=images) for s in data if "val" in find_splits(s)]
    return training, join(parts) if parts else None


def _fits_in_memory(dataset: Dataset) -> bool:
    """Tell whether the decoded pictures take at most a quarter of the memory that is free now."""
    needed = sum(r.width * r.height * 3 for r in dataset.records)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return False
    return needed * 4 <= free
