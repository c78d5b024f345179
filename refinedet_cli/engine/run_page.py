"""run.html: one page in the folder of a run that tells what was trained, how it went, and what to do next."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined, Template

from refinedet_cli import __version__
from refinedet_cli.core.words import counted, joined
from refinedet_cli.data.files import write_whole
from refinedet_cli.engine.environment import Start
from refinedet_cli.engine.run_figures import Chart, draw_training, draw_validation
from refinedet_cli.engine.run_file import read_run_file
from refinedet_cli.engine.run_record import (
    CONFIG_FILE,
    STATE_FILE,
    VALIDATION_FOLDER,
    VALIDATION_REPORT,
    RunRecord,
    read_run,
)
from refinedet_cli.errors import ConfigError

PAGE_NAME = "run.html"
HELD_OUT = "(held out)"

_TEMPLATE = "run.html.jinja"
_CLASSES_NAMED = 6
_CARDS = {"AP": "mean over IoU 0.50 to 0.95", "AP50": "at IoU 0.50", "AP75": "at IoU 0.75"}


class Command(NamedTuple):
    """A command line to go on with, and what it is for."""

    purpose: str
    line: str


class Card(NamedTuple):
    """A number that stands out."""

    name: str
    value: str
    meaning: str


class StartRow(NamedTuple):
    """A start as a row of a table, and its command line."""

    cells: tuple[str, ...]
    command: str
    folder: str
    facts: tuple[tuple[str, str], ...]


def write_run_page(folder: Path) -> Path:
    """Write the page of a run from what is in its folder.

    Returns:
        the page, which shows the same whoever writes it and however often, but for the time of writing.

    Raises:
        DataError: it cannot be written.
    """
    path = folder / PAGE_NAME
    write_whole(path, render_run_page(read_run(folder)))
    return path


def render_run_page(run: RunRecord) -> str:
    """Make the HTML of the page; it needs no network, no server and no other file."""
    epochs = max((float(t.columns["epoch"].max()) for t in (run.steps, run.evaluations) if len(t)), default=0.0)
    resumed = [epoch for start in run.starts[1:] if (epoch := epochs_of(run, start.from_step)) is not None]
    name = run.folder.resolve().name
    report = f"{VALIDATION_FOLDER}/{VALIDATION_REPORT}"
    return _template().render(
        run=run,
        name=name,
        story=list(tell(run)),
        cards=list(list_cards(run)),
        commands=list(list_commands(run)),
        validation=draw_validation(run.evaluations, epochs, resumed),
        training=draw_training(run.steps, epochs, resumed),
        columns=[column for column in run.evaluations.columns if column != "epoch"],
        rows=_rows(run),
        classes=sorted(run.classes, key=lambda c: (c.AP is None, -(c.AP or 0.0))),
        starts=[_start_row(start) for start in run.starts],
        report=report if run.has(report) else None,
        unread=run.steps.unread + run.evaluations.unread,
        settings=json.dumps(run.config, indent=2) if run.config else "",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["size"] = _size
    environment.filters["read_off"] = _read_off
    return environment.from_string(files("refinedet_cli.engine").joinpath(_TEMPLATE).read_text(encoding="utf-8"))


# In words -------------------------------------------------------------------------------------------------------------


def tell(run: RunRecord) -> Iterator[str]:
    """Tell the run in sentences: what was trained on what, from which start, how long, and how good it became."""
    yield _what(run)
    if start := _origin(run.provenance.get("start")):
        yield start
    yield _how_long(run)
    yield _how_good(run)


def _what(run: RunRecord) -> str:
    preset = run.setting("detector", "preset") or "a detector"
    height, width = (run.setting("detector", "preprocess", side) for side in ("height", "width"))
    names = run.setting("detector", "classes", "names") or []
    sentence = f"This is {preset}" + (f" at {width} x {height}" if height and width else "")
    data = run.provenance.get("data") or {}
    if data:
        sentence += f", trained on {data.get('name')} ({counted(data.get('pictures', 0), 'picture')})"
    if names:
        named = [str(name) for name in names[:_CLASSES_NAMED]]
        rest = len(names) - len(named)
        listed = joined([*named, f"{rest:,} more"] if rest else named)
        sentence += f", for {counted(len(names), 'class', 'classes')}: {listed}"
    return sentence + "."


def _origin(start: Any) -> str | None:
    """Tell which weights it began with."""
    if not isinstance(start, dict):
        return None
    if start.get("random"):
        return "It started from random weights."
    if isinstance(start.get("backbone"), dict):
        return f"It started from a backbone of {start['backbone'].get('file')}; all behind it was random."
    known = start.get("classes_taken_over") or []
    named = [str(name) for name in known[:_CLASSES_NAMED]]
    listed = joined([*named, f"{len(known) - len(named):,} more"] if len(known) > len(named) else named)
    taken = f"class outputs taken over by name: {listed}" if known else "no class was known to it by name"
    return f"It started from {start.get('weights')}; {taken}."


def _how_long(run: RunRecord) -> str:
    """Tell whether it has ended, after how many epochs and how much time, and where."""
    done = epochs_of(run, run.step)
    asked, steps = run.setting("train", "epochs"), run.setting("train", "steps")
    batch = run.setting("train", "batch")
    length = counted(run.step, "step") + (f" of {counted(batch, 'picture')}" if isinstance(batch, int) else "")
    reached = _epochs(done)
    if steps:
        reached = f"{run.step:,} of {counted(steps, 'step')}"
    elif asked and done is not None:
        reached = f"{round(done, 2):g} of {counted(asked, 'epoch')}"
    state = _state(run)
    if state == "finished" and run.step < (planned_steps(run) or 0):
        state = "early"
    words = {
        "finished": f"It went to its end, {_epochs(done)} ({length})",
        "early": f"It ended early, after {reached} ({length}), for AP no longer rose",
        "stopped": f"It was stopped after {reached} ({length}), to be resumed",
        "failed": f"It failed after {reached} ({length})",
        "running": f"It was running when this page was written, after {reached} ({length})",
    }
    return f"{words[state]}{_time(run)}."


def _time(run: RunRecord) -> str:
    if not run.starts:
        seconds = _seconds_of_steps(run)
        return "" if seconds is None else f", about {duration(seconds)} of training without evaluations"
    seconds = sum(start.seconds for start in run.starts)
    machines = list(dict.fromkeys(_machine(start) for start in run.starts))
    starts = f" in {len(run.starts)} starts" if len(run.starts) > 1 else ""
    return f", in {duration(seconds)}{starts}, on {joined(machines)}"


def _how_good(run: RunRecord) -> str:
    """Tell the best average precision and where it was reached."""
    validation = run.provenance.get("validation")
    name = f" on {validation.get('name')} ({counted(validation.get('pictures', 0), 'picture')})" if validation else ""
    if run.best is None:
        return f"It has not been evaluated{name} yet." if validation else "There are no validation data, so no AP."
    values = {key: float(column[run.best]) for key, column in run.evaluations.columns.items()}
    others = joined([f"{key} {_number(values.get(key))}" for key in ("AP50", "AP75")])
    last = float(run.evaluations.columns["AP"][-1])
    sentence = f"Best AP{name}: {_number(values['AP'])} at epoch {values['epoch']:g} ({others})"
    if run.best == len(run.evaluations) - 1 or np.isnan(last):
        return sentence + ", the last evaluation."
    return f"{sentence}; the last evaluation, at epoch {run.evaluations.columns['epoch'][-1]:g}, gave {_number(last)}."


def list_cards(run: RunRecord) -> Iterator[Card]:
    """The numbers that stand out."""
    if run.best is not None:
        for key, meaning in _CARDS.items():
            if key in run.evaluations.columns:
                yield Card(key, _number(float(run.evaluations.columns[key][run.best])), meaning)
        yield Card("at epoch", f"{run.evaluations.columns['epoch'][run.best]:g}", "of the best weights")
    if run.step:
        planned = planned_steps(run)
        yield Card("steps", f"{run.step:,}", f"of {planned:,}" if planned else "done")
    if run.starts:
        yield Card("time", duration(sum(start.seconds for start in run.starts)), "training and evaluating")
    if "pictures_per_second" in run.steps.columns and len(run.steps):
        speed = float(np.nanmedian(run.steps.columns["pictures_per_second"]))
        if np.isfinite(speed):
            yield Card("speed", f"{speed:.3g}", "pictures a second, median")


# What next ------------------------------------------------------------------------------------------------------------


def list_commands(run: RunRecord) -> Iterator[Command]:
    """The commands to go on with, to be typed in the folder in which the run was started."""
    last = run.starts[-1] if run.starts else None
    if last is not None and last.command and _state(run) != "finished" and run.has(STATE_FILE):
        again = [argument for argument in last.command if argument not in ("--resume", "--overwrite")]
        yield Command("Go on with this run", shlex.join([*again, "--resume"]))
    if run.weights is None:
        return
    weights = str(_from(run.weights, last))
    sources, others = _validation_sources(run, last)
    for source in sources:
        line = ["refinedet", "eval", "--dataset", *source, "--weights", weights]
        yield Command("Measure it, on these or other data", shlex.join(line))
    if not sources:
        purpose = "Measure it" + (" on data that training has not seen" if others else "")
        yield Command(purpose, f"refinedet eval --dataset TEST-DATA --weights {shlex.quote(weights)}")
    yield Command("Find objects", f"refinedet detect PICTURES --weights {shlex.quote(weights)} --out found")
    yield Command("Ship it", f"refinedet export --weights {shlex.quote(weights)} --out shipped")


def _validation_sources(run: RunRecord, start: Start | None) -> tuple[list[list[str]], bool]:
    """Name the validation data as eval takes them, with its options; and whether there were any at all."""
    validation = run.provenance.get("validation")
    if not validation or str(validation.get("name", "")).endswith(HELD_OUT):
        return [], bool(validation)
    try:
        wanted = read_run_file(run.folder / CONFIG_FILE)
    except ConfigError:
        return [], True
    options = []
    for option, value in (("--images", wanted.images), ("--root", wanted.root)):
        options += [option, str(_from(value, start))] if value is not None else []
    return [[_source(source, start), *options] for source in wanted.val or wanted.data], True


def _source(source: str, start: Start | None) -> str:
    """Write a data set, which may be a name, as it is found from the folder of a start."""
    return str(_from(Path(source), start)) if os.sep in source or Path(source).exists() else source


def _from(path: Path, start: Start | None) -> Path:
    """Write a path as it is found from the working folder of a start: relative where it lies in there."""
    here = Path(start.folder) if start is not None else Path.cwd()
    whole = path.resolve()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


# Numbers --------------------------------------------------------------------------------------------------------------


def epochs_of(run: RunRecord, step: int) -> float | None:
    """Turn a number of steps into epochs; None where nothing is logged yet."""
    return None if run.steps_each is None else step / run.steps_each


def planned_steps(run: RunRecord) -> int | None:
    """Tell how many steps the run was to have; None where that is not known yet."""
    steps, epochs = run.setting("train", "steps"), run.setting("train", "epochs")
    if steps:
        return int(steps)
    return None if not epochs or run.steps_each is None else round(epochs * run.steps_each)


def duration(seconds: float) -> str:
    """Write a time as a person would say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _state(run: RunRecord) -> str:
    if run.starts:
        return run.starts[-1].outcome
    planned = planned_steps(run)
    return "stopped" if planned and run.step < planned else "finished"


def _epochs(done: float | None) -> str:
    if done is None:
        return "no epoch"
    return "1 epoch" if done == 1 else f"{round(done, 2):g} epochs"


def _seconds_of_steps(run: RunRecord) -> float | None:
    """Estimate the time of a run that did not write it down, from its speed."""
    batch, speed = run.setting("train", "batch"), run.steps.columns.get("pictures_per_second")
    if speed is None or not isinstance(batch, int):
        return None
    steps = np.diff(run.steps.columns["step"], prepend=0.0)
    known = speed > 0
    return float(batch * (steps[known] / speed[known]).sum()) if known.any() else None


def _rows(run: RunRecord) -> list[tuple[bool, str, list[str]]]:
    """The evaluations: whether it is the best one, its epoch, and its numbers."""
    table = run.evaluations
    columns = {name: column for name, column in table.columns.items() if name != "epoch"}
    return [
        (
            row == run.best,
            f"{table.columns['epoch'][row]:g}",
            [f"{c[row]:,.0f}" if name == "step" else _number(float(c[row])) for name, c in columns.items()],
        )
        for row in range(len(table))
    ]


def _start_row(start: Start) -> StartRow:
    here = start.environment
    ended = {"running": "not known to have ended", "stopped": "stopped, to be resumed"}.get(
        start.outcome, start.outcome
    )
    memory = [f"{here.memory_bytes / 1e9:.0f} GB memory"] if here.memory_bytes else []
    facts = [
        ("Machine", ", ".join([here.host, here.platform])),
        ("Processor", ", ".join([here.cpu, counted(here.cores, "core"), counted(here.threads, "thread"), *memory])),
        ("Versions", f"refinedet {here.refinedet}, {here.python}, torch {here.torch}, torchvision {here.torchvision}, "
         f"numpy {here.numpy}"),
    ]  # fmt: skip
    if here.gpu is not None:
        memory = [f"{here.gpu_memory_bytes / 1e9:.0f} GB"] if here.gpu_memory_bytes else []
        cudnn = [f"cuDNN {here.cudnn}"] if here.cudnn else []
        facts.insert(2, ("GPU", ", ".join([here.gpu, *memory, f"CUDA {here.cuda}", *cudnn])))
    if here.processes > 1:
        facts.append(("Processes", f"{here.processes:,}"))
    if here.commit is not None:
        facts.append(("Commit", here.commit))
    cells = (
        start.started.replace("T", " ").removesuffix("+00:00"),
        _machine(start),
        f"{start.from_step:,} to {start.to_step:,}",
        duration(start.seconds),
        ended,
    )
    return StartRow(cells, shlex.join(start.command), start.folder, tuple(facts))


def _machine(start: Start) -> str:
    """Name what a start computed on."""
    here = start.environment
    parts = [counted(here.threads, "thread")] if here.gpu is None else []
    parts += [counted(here.processes, "process", "processes")] if here.processes > 1 else []
    return (here.gpu or here.cpu) + (f" ({', '.join(parts)})" if parts else "") + f" in {here.precision}"


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _read_off(chart: Chart) -> str:
    """Write what a pointer on a chart reads off, as JSON."""
    document: Mapping[str, Sequence[Any]] = {
        "step": chart.steps,
        "epoch": chart.epochs,
        "place": chart.places,
        "values": [line.values for line in chart.lines],
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False)
