"""One `refinedet train` from its options to a run: data, config, weights, device, and the folder it writes to."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refinedet_cli.core.config import to_dict
from refinedet_cli.core.presets import Preset
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, listed, match_classes, remap
from refinedet_cli.data.loading import PREFETCHED
from refinedet_cli.data.source import find_splits, hold_out, open_joined
from refinedet_cli.engine import batch_size
from refinedet_cli.engine.cores import usable_cores
from refinedet_cli.engine.device import DeviceName, describe_device, select_device, select_precision
from refinedet_cli.engine.distributed import ALONE, Processes
from refinedet_cli.engine.dry_run import Forecast, forecast
from refinedet_cli.engine.memory import free_memory, free_shared_memory
from refinedet_cli.engine.preview import Preview, make_preview, save_sheet
from refinedet_cli.engine.recipe import make_plan
from refinedet_cli.engine.run_file import RunFile, read_run_file, relative_to_run
from refinedet_cli.engine.run_record import LAST_FILE, STATE_FILE
from refinedet_cli.engine.run_state import load_state
from refinedet_cli.engine.start import NO_WEIGHTS, Start, changes_of, resolve_config, start_detector
from refinedet_cli.engine.tensorboard import require_tensorboard
from refinedet_cli.engine.train import SAVE_EVERY_SECONDS, Report, RunOptions, TrainResult, train
from refinedet_cli.errors import ConfigError, DataError, DeviceError, UsageError
from refinedet_cli.zoo.backbone_weights import BackboneFile, find_backbone_weights

HELD_OUT = 0.15
NO_VALIDATION = "none"
# More loading processes than these keep no device busier, and each takes memory.
_MOST_WORKERS = 16
# Of the shared memory that is free, what a run takes; the rest is for its neighbours.
_SHARE_OF_SHARED = 0.8


def never() -> bool:
    """Let a run go to its end."""
    return False


@dataclass(frozen=True)
class TrainingSession:
    """A run that is ready to begin.

    Attributes:
        preset: the resolved detector and recipe.
        start: the detector with its starting weights.
        data, validation: the pictures; validation is None where nothing is to be validated.
        options: where and how to run.
        notes: what a user should know before it begins, one line each.
        has_folder: whether there is a folder to write to; without one there is only `forecast`.
    """

    preset: Preset
    start: Start
    data: Dataset
    validation: Dataset | None
    options: RunOptions
    notes: tuple[str, ...]
    has_folder: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved config, data and start as plain data, enough to replay the run."""
        settings = {"detector": to_dict(self.preset.detector), "train": to_dict(self.preset.train)}
        return {**settings, **self.options.record}

    def run(
        self,
        on_progress: Callable[[Report], None],
        should_stop: Callable[[], bool],
        interrupted: Callable[[], bool] = never,
    ) -> TrainResult:
        """Train until the end, or until ``should_stop``, which is asked after every step, or ``interrupted``, at once.

        Raises:
            ValueError: the session was prepared without a folder.
        """
        if not self.has_folder:
            raise ValueError("a session without a folder can only be forecast")
        options = replace(self.options, should_stop=should_stop, interrupted=interrupted)
        return train(self.start.detector, self.data, self.validation, self.preset.train, options, on_progress)

    def preview(self, path: Path) -> Preview:
        """Draw the first training samples on a sheet, which is all that is written.

        Raises:
            DataError: a picture cannot be read, or the sheet not be written.
        """
        preview = make_preview(self.data, self.preset.detector, self.preset.train)
        self.options.processes.from_first(lambda: save_sheet(preview.sheet, path))
        return preview

    def forecast(self) -> Forecast:
        """Measure a few steps and say what the run would take; nothing is written, the start stays as it is."""
        return forecast(self.start.detector, self.data, self.validation, self.preset.train, self.options)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What the options and the run file ask for together; options win."""

    data: tuple[str, ...]
    val: tuple[str, ...]
    images: Path | None
    root: Path | None
    weights: str | None
    backbone_weights: str | None

    def record(self, out: Path) -> dict[str, Any]:
        """Write it as the tables of a run file in the run's folder."""

        def place(value: str | Path | None) -> str | None:
            return None if value is None else relative_to_run(str(value), out)

        data = {
            "train": [place(source) for source in self.data],
            "val": [place(source) for source in self.val],
            "images": place(self.images),
            "root": place(self.root),
        }
        return {
            "data": data,
            "start": {"weights": place(self.weights), "backbone_weights": place(self.backbone_weights)},
        }


def prepare(
    *,
    data: Sequence[str],
    val: Sequence[str],
    images: Path | None,
    root: Path | None,
    out: Path | None,
    weights: str | None,
    backbone_weights: str | None,
    preset: str | None,
    config: Path | None,
    settings: Sequence[str],
    device: DeviceName,
    workers: int | None,
    cache: bool | None,
    resume: bool,
    overwrite: bool,
    save_seconds: float = SAVE_EVERY_SECONDS,
    command: Sequence[str] = (),
    tensorboard: bool = False,
    find_batch: bool = False,
    processes: Processes = ALONE,
) -> TrainingSession:
    """Check everything that can be checked before the first step.

    Options win over the run file ``config``. ``weights`` and ``backbone_weights`` are one choice: giving either leaves
    out both of the run file. ``val`` may be "none" alone: then nothing is held out and nothing validated. Without
    ``out`` the session can only be forecast.

    Raises:
        UsageError: ``out`` holds a run already and neither ``resume`` nor ``overwrite`` says what to do with it,
            nothing names the data, or two options exclude each other.
        ConfigError, DataError, CheckpointError, DeviceError: as the parts raise them.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other", "give one of them")
    if weights not in (None, NO_WEIGHTS) and backbone_weights is not None:
        raise UsageError("--weights and --backbone-weights exclude each other", "give one of them")
    if NO_VALIDATION in val and len(val) > 1:
        raise UsageError("--val none does not go with other validation data", "give one of them")
    if tensorboard:
        require_tensorboard()
    if out is not None:
        _check_folder(out, resume=resume, overwrite=overwrite)
    if find_batch and processes.count > 1:
        raise UsageError("--batch auto tries out one process alone", "with torchrun, name the pictures of a step")
    run_file = read_run_file(config)
    wanted = _choose(run_file, data, val, images, root, weights, backbone_weights)
    training = open_joined(wanted.data, split="train", images=wanted.images, root=wanted.root)
    if not any(len(r.boxes) for r in training.records):
        raise DataError(f"{training.name}: no picture has an object to learn", "check the annotations")
    resolved, backbone = _resolve(training, preset, wanted, run_file, settings)
    training, validation, validation_notes = _part(training, wanted, resolved.train.seed)
    if resolved.train.patience and validation is None:
        raise ConfigError(
            "train.patience counts evaluations, and there is nothing to validate on",
            "name validation data with --val, or set train.patience=0",
        )
    where = processes.device(select_device(device))
    precision = select_precision(resolved.train.precision, where)
    start = start_detector(resolved.detector, weights=wanted.weights, backbone=backbone, seed=resolved.train.seed)
    loading, loading_notes = _loading_processes(workers, resolved, processes)
    notes = [
        f"train: {training.name}, {counted(len(training.records), 'picture')}, "
        f"{counted(training.objects, 'object')}, {counted(len(training.classes), 'class', 'classes')}",
        *validation_notes,
        *training.notes,
        *_note_of_crowds(training),
        *start.notes,
        *_note_of_no_objects(validation),
    ]
    changed = ", ".join(textwrap.shorten(change, 60, placeholder=" ...") for change in changes_of(resolved))
    notes += [f"settings other than the preset's: {changed}"] if changed else []
    folder = out or Path()
    options = RunOptions(
        out=folder,
        device=where,
        precision=precision,
        workers=loading,
        cache=_fits_in_memory(training, processes.on_machine) if cache is None else cache,
        resume=resume,
        should_stop=never,
        provenance={"preset": resolved.detector.preset, "start": start.origin, "seed": resolved.train.seed},
        record=wanted.record(folder),
        save_seconds=save_seconds,
        command=tuple(command),
        tensorboard=tensorboard,
        processes=processes,
    )
    if find_batch:
        resolved, batch_notes = _with_found_batch(resolved, start, training, validation, options)
        loading, loading_notes = _loading_processes(workers, resolved, processes)
        options = replace(options, workers=loading)
        notes += batch_notes
    notes += loading_notes
    notes.append(f"run: {_run_line(resolved, len(training.records))}, {describe_device(where)}, {precision}")
    return TrainingSession(resolved, start, training, validation, options, tuple(notes), out is not None)


def _with_found_batch(
    resolved: Preset, start: Start, training: Dataset, validation: Dataset | None, options: RunOptions
) -> tuple[Preset, list[str]]:
    """Look for the batch, or, where a run is resumed, for the one that it had."""
    config = resolved.train
    if options.resume:
        batch = load_state(options.out / STATE_FILE).settings["train"]["batch"]
        return replace(resolved, train=replace(config, batch=batch)), [f"batch: {batch}, which the run began with"]
    if options.processes.count > 1:
        raise UsageError(
            "--batch auto looks for the batch of one process, and here are several",
            f"look without torchrun, then give --batch {options.processes.count} times what was found",
        )
    found = batch_size.find_batch(start.detector, training, validation, config, options)
    notes = [found.note]
    if found.batch != config.batch:
        notes.append(f"batch: train.lr stays {config.lr:g}, which the recipe pairs with a batch of {config.batch}")
    return replace(resolved, train=replace(config, batch=found.batch)), notes


def _check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder for the run")
    holds_run = (out / STATE_FILE).is_file() or (out / LAST_FILE).is_file()
    if holds_run and not (resume or overwrite):
        raise UsageError(f"--out {out} holds a run already", "go on with --resume, replace it with --overwrite")


def _choose(
    run_file: RunFile,
    data: Sequence[str],
    val: Sequence[str],
    images: Path | None,
    root: Path | None,
    weights: str | None,
    backbone_weights: str | None,
) -> _Wanted:
    if not data and not run_file.data:
        where = "" if run_file.path is None else f", and {run_file.path} names none"
        raise UsageError(f"there is no data to train on: --data is missing{where}", "name it with --data")
    if weights is None and backbone_weights is None:
        weights, backbone_weights = run_file.weights, run_file.backbone_weights
    # Other training data than the run file's is not validated on, or read with, what belongs to the run file's.
    own = run_file if not data else replace(run_file, val=(), images=None)
    return _Wanted(
        data=tuple(data) or run_file.data,
        val=tuple(val) or own.val,
        images=images or own.images,
        root=root or run_file.root,
        weights=weights,
        backbone_weights=backbone_weights,
    )


def _resolve(
    data: Dataset, preset: str | None, wanted: _Wanted, run_file: RunFile, settings: Sequence[str]
) -> tuple[Preset, BackboneFile | None]:
    """Resolve the config, with the input normalisation of the backbone weights where there are some."""
    if wanted.backbone_weights is None:
        return resolve_config(data.classes, preset, wanted.weights, run_file, settings), None
    if wanted.weights not in (None, NO_WEIGHTS):
        raise ConfigError(
            f"{run_file.path}: start.weights and start.backbone_weights exclude each other", "leave out one of them"
        )
    # Which file a name such as "imagenet" stands for depends on the backbone, which the config names.
    first = resolve_config(data.classes, preset, NO_WEIGHTS, run_file, settings)
    backbone = find_backbone_weights(wanted.backbone_weights, first.detector.network.backbone)
    return resolve_config(data.classes, preset, NO_WEIGHTS, run_file, settings, backbone=backbone), backbone


def _part(training: Dataset, wanted: _Wanted, seed: int) -> tuple[Dataset, Dataset | None, list[str]]:
    """Find the validation pictures: those named, those the data has of its own, or some held out of it."""
    if wanted.val == (NO_VALIDATION,):
        return training, None, ["validation: none"]
    sources = wanted.val
    if not sources:
        sources = tuple(s for s in wanted.data if "val" in find_splits(s, root=wanted.root))
    if not sources:
        rest, held_out = hold_out(training, fraction=HELD_OUT, seed=seed)
        held = counted(len(held_out.records), "picture")
        return rest, held_out, [f"validation: {held} held out of {training.name}; --val names other data"]
    found = open_joined(sources, split="val", images=wanted.images, root=wanted.root)
    if not match_classes(training.classes, found.classes).shared:
        raise DataError(
            f"the validation data {found.name} shares no class with the training data {training.name}: it has "
            f"{listed(found.classes.names)}; the training data has {listed(training.classes.names)}",
            "name validation data of the same classes with --val, or --val none to train without any",
        )
    # Scored as it is, so that the score tells what it is of.
    notes = remap(found, training.classes).notes
    line = f"validation: {found.name}, {counted(len(found.records), 'picture')}"
    return training, found, [line, *(f"validation: {note}" for note in notes)]


def _note_of_crowds(training: Dataset) -> list[str]:
    crowds = sum(int(r.crowd.sum()) for r in training.records)
    return (
        [f"{counted(crowds, 'box around a crowd is', 'boxes around crowds are')} left out of training"]
        if crowds
        else []
    )


def _note_of_no_objects(validation: Dataset | None) -> list[str]:
    if validation is None or any(not r.crowd.all() for r in validation.records if len(r)):
        return []
    return [
        f"validation: no object in {validation.name}, so there is no AP and the newest weights count as best; "
        f"name other data with --val"
    ]


def _run_line(resolved: Preset, pictures: int) -> str:
    preprocess, config = resolved.detector.preprocess, resolved.train
    plan = make_plan(pictures, preprocess, config)
    length = (
        f"{counted(plan.steps, 'step')} ({plan.epochs:.1f} epochs)" if config.steps else counted(config.epochs, "epoch")
    )
    return (
        f"preset {resolved.detector.preset} at {preprocess.height} x {preprocess.width}, {length} of batch {plan.batch}"
    )


def _fits_in_memory(dataset: Dataset, times: int) -> bool:
    """Tell whether the decoded pictures take, so many times, at most a quarter of the memory that is free now."""
    needed = times * sum(r.width * r.height * 3 for r in dataset.records)
    free = free_memory()
    return free is not None and needed * 4 <= free


def _loading_processes(wanted: int | None, resolved: Preset, processes: Processes) -> tuple[int, list[str]]:
    """Choose how many processes make samples for each that trains, as many as shared memory has room for.

    Returns:
        their number, and what there is to say of it.

    Raises:
        DeviceError: there is no room for so many as are wanted.
    """
    usual = min(_MOST_WORKERS, max(0, usable_cores() // processes.on_machine - 1))
    free = free_shared_memory()
    if free is None:
        return (usual if wanted is None else wanted), []
    config, size = resolved.train, resolved.detector.preprocess
    # Each batch in turn is in the hands of whoever trains, beside those that wait.
    ready = -(-config.batch // processes.count) * size.height * size.width * 3 * 4
    room = max(0, int(_SHARE_OF_SHARED * free) // processes.on_machine // ready - 1) // PREFETCHED
    told = f"loading processes hand batches over in /dev/shm, where {free / 1e6:,.0f} MB are free"
    cure = "give a container more (docker run --shm-size=2g)"
    if wanted is None:
        return min(usual, room), [f"workers: {room} in place of {usual}; {told}; {cure}"] if room < usual else []
    if wanted > room:
        raise DeviceError(f"--workers {wanted}: {told}, enough for {room}", f"take --workers {room}, or {cure}")
    return wanted, []
