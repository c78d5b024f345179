"""The command `refinedet bench`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.downloads import on_disk
from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.options import (
    DATA,
    RUNTIME,
    DeviceOpt,
    ImagesOpt,
    JsonOpt,
    OfflineOpt,
    OptionalOutOpt,
    PrecisionOpt,
    QuietOpt,
    RootOpt,
    SplitOpt,
    refuse_file,
    remarks_on_split,
)
from refinedet_cli.cli.output import SCHEMA_VERSION, Output
from refinedet_cli.core.words import counted
from refinedet_cli.errors import CheckpointError, PartialError, RefineDetError

if TYPE_CHECKING:
    from refinedet_cli.engine.benchmark import (
        Asked,
        Benchmark,
        BenchmarkProgress,
        Change,
        Failed,
        Latency,
        Measured,
    )

REPORT_NAME = "bench.json"


def bench(
    weights: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WEIGHTS",
            help="What --weights takes elsewhere: .safetensors files, names of published weights, exported files. With "
            ":bf16 or :fp32 at its end, one is computed so. The others are compared with the first.",
            show_default="the bundled detector",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            metavar="DATA",
            help="Look at pictures of this data, and score on all of it. DATA as for eval; DATA:PART takes that part. "
            "Repeat to join several.",
            show_default="pictures alone, and no accuracy",
            rich_help_panel=DATA,
        ),
    ] = None,
    split: SplitOpt = "val",
    images: ImagesOpt = None,
    root: RootOpt = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="SOURCE",
            help="Look at these pictures: a file, folder or glob pattern. Repeatable.",
            show_default="drawn pictures",
            rich_help_panel=DATA,
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            min=1,
            metavar="N",
            help="Timed runs of each detector, of --batch pictures each.",
            rich_help_panel=RUNTIME,
        ),
    ] = 100,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="CPU threads of each detector.",
            show_default="$OMP_NUM_THREADS, or all cores",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=1,
            metavar="N",
            help="Pictures computed together, when timing and when scoring.",
            show_default="1",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    offline: OfflineOpt = False,
    out: OptionalOutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Compare the speed, memory and accuracy of detectors and of their exported files.

    Each detector has a process of its own and the same number of threads. All are loaded and warm before the first is
    timed; then they take short turns on the same pictures, so that what else the machine does falls on all alike. With
    --dataset, the very same detector, precision and batch are scored with the COCO metric. --precision is that of
    checkpoints; an exported file has its own. A detector that cannot be measured is listed and the rest goes on; the
    exit code is then 8. With --out, that folder gets bench.json, with the time of every run.
    """
    output = Output(json=json, quiet=quiet)
    refuse_file(out)

    from refinedet_cli.data.files import require_writable
    from refinedet_cli.engine.benchmark import BenchmarkOptions, ask, benchmark

    for remark in remarks_on_split(dataset or (), split, root):
        output.note(remark)
    if out is not None:
        require_writable(out / REPORT_NAME)
    options = BenchmarkOptions(
        detectors=tuple(_on_disk(output, asked, offline=offline) for asked in ask(weights or (), precision)),
        datasets=tuple(dataset or ()),
        split=split,
        images=images,
        root=root,
        sources=tuple(source or ()),
        device=device,
        batch=batch or 1,
        runs=rounds,
        threads=threads,
    )
    with output.progress("Benchmark:") as bars:
        task = bars.add_task("", total=None)

        def show(progress: BenchmarkProgress) -> None:
            bars.update(task, description=progress.doing, completed=progress.done, total=progress.total)

        result = benchmark(options, on_progress=show)
    _report(output, result, out)
    _judge(result)


def _on_disk(output: Output, asked: Asked, *, offline: bool) -> Asked:
    """Fetch weights here, where it can be seen; what cannot be had becomes a row of the result."""
    try:
        return asked._replace(weights=on_disk(output, asked.weights, offline=offline) or asked.weights)
    except CheckpointError:
        if offline:
            raise
        return asked


def _report(output: Output, result: Benchmark, out: Path | None) -> None:
    if result.reference is None:
        # The first one's error is that of the command.
        for failed in result.failed[1:]:
            output.warn(f"{failed.asked.name}: {failed.error}")
        return
    document = _document(result)
    written = None
    if out is not None:
        from refinedet_cli.data.files import write_json

        written = out / REPORT_NAME
        times = {"runs": [_runs(row) for row in result.measured]}
        write_json(written, {"schema_version": SCHEMA_VERSION, "command": "bench", **document, **times})
    for note in result.notes:
        output.note(note)
    if any(row.accuracy is not None and not row.accuracy.complete for row in result.measured):
        output.warn(f"not every object was scored: {_scope(result)}")
    output.result({**document, "report_file": written}, *_renderables(result))
    if written is not None:
        output.note(f"wrote {written}")


def _judge(result: Benchmark) -> None:
    """Raise the error that tells scripts how much went wrong."""
    for failed in result.failed:
        if result.reference is None or not isinstance(failed.error, RefineDetError):
            raise failed.error
    if result.failed:
        count = f"{len(result.failed)} of {counted(len(result.rows), 'detector')} could not be measured"
        raise PartialError(count, "the result lists the reasons")


# The document --------------------------------------------------------------------------------------------------------


def _document(result: Benchmark) -> dict[str, Any]:
    from refinedet_cli.engine.benchmark import QUANTILE_RULE, RUNS_A_TURN, WARM_UP_RUNS, Measured

    pictures, machine, options = result.pictures, result.machine, result.options
    reference = result.reference
    return {
        "pictures": {
            "from": pictures.kind,
            "source": pictures.source or None,
            "split": pictures.part,
            "timed": len(pictures.paths),
            "mean_megapixels": pictures.megapixels,
            "scored": None if pictures.dataset is None else len(pictures.dataset),
            "fingerprint": None if pictures.dataset is None else pictures.dataset.fingerprint,
        },
        "machine": {
            **machine._asdict(),
            "device": None if reference is None else reference.opened.device,
            "threads": None if reference is None else reference.opened.threads,
        },
        "settings": {
            "batch": options.batch,
            "runs": options.runs,
            "warm_up_runs": WARM_UP_RUNS,
            "runs_a_turn": RUNS_A_TURN,
            "percentiles": QUANTILE_RULE,
        },
        "reference": None if reference is None else reference.asked.name,
        "detectors": [
            _measured(row, change) if isinstance(row, Measured) else _failed(row)
            for row, change in zip(result.rows, result.changes, strict=True)
        ],
        "notes": list(result.notes),
    }


def _measured(row: Measured, change: Change | None) -> dict[str, Any]:
    opened, memory, accuracy = row.opened, row.memory, row.accuracy
    return {
        "name": row.asked.name,
        "weights": row.asked.weights,
        "file": str(opened.path),
        "file_bytes": opened.file_bytes,
        "engine": opened.engine,
        "precision": opened.precision,
        "load_seconds": opened.seconds,
        "first_run_ms": row.first_ms,
        "memory": {
            "peak_bytes": memory.peak,
            "libraries_bytes": memory.libraries,
            "device_peak_bytes": memory.device_peak,
        },
        "in_memory": row.in_memory._asdict(),
        "from_file": row.from_file._asdict(),
        "accuracy": None
        if accuracy is None
        else {
            "AP": accuracy.ap,
            "AP50": accuracy.ap50,
            "complete": accuracy.complete,
            "scored_classes": accuracy.scored_classes,
        },
        "against_reference": None
        if change is None
        else {
            "speed": change.speed._asdict(),
            "speed_from_file": change.speed_from_file._asdict(),
            "AP": change.ap,
            "AP50": change.ap50,
        },
        "failure": None,
    }


def _failed(row: Failed) -> dict[str, Any]:
    known = isinstance(row.error, RefineDetError)
    return {
        "name": row.asked.name,
        "weights": row.asked.weights,
        "failure": {
            "code": row.error.exit_code if isinstance(row.error, RefineDetError) else 1,
            "message": str(row.error),
            "hint": getattr(row.error, "hint", None) if known else None,
        },
    }


def _runs(row: Measured) -> dict[str, Any]:
    """Every counted time, in milliseconds; one list a turn."""
    return {
        "name": row.asked.name,
        "reading_ms": [[1e3 * run.reading for run in turn] for turn in row.turns],
        "detecting_ms": [[1e3 * run.detecting for run in turn] for turn in row.turns],
    }


# What is shown -------------------------------------------------------------------------------------------------------


def _renderables(result: Benchmark) -> Iterator[RenderableType]:
    yield _speed_table(result)
    if len(result.measured) > 1:
        yield Text("")
        yield _change_table(result)
    yield Text("")
    yield _cost_table(result)
    if result.failed:
        yield Text("")
        yield _failure_table(result)
    for line in _conditions(result):
        yield Text("")
        yield Text(line, style="dim")


def _table(title: str, *headings: str) -> FittedTable:
    table = FittedTable(title)
    table.add_text("Detector")
    table.add_number(*headings)
    return table


def _speed_table(result: Benchmark) -> Table:
    batch = result.options.batch
    scored = result.pictures.dataset is not None
    what = "a picture" if batch == 1 else counted(batch, "picture")
    table = _table(f"Milliseconds for {what}", "p50", "p90", "p99", "Per s", "File p50")
    table.add_number("Per s", beside=True)
    if scored:
        table.add_number("AP", "AP50")
    for row in result.measured:
        accuracy = () if row.accuracy is None else (_score(row.accuracy.ap), _score(row.accuracy.ap50))
        in_memory, from_file = row.in_memory, row.from_file
        times = (_ms(in_memory.p50_ms), _ms(in_memory.p90_ms), _ms(in_memory.p99_ms), _rate(in_memory))
        table.add_row(row.asked.name, *times, _ms(from_file.p50_ms), _rate(from_file), *accuracy)
    table.caption = (
        "From pixels in memory to detections; under File, from the picture file, so with decoding. Per s: pictures a "
        "second."
    )
    return table


def _change_table(result: Benchmark) -> Table:
    reference = result.reference.asked.name if result.reference else ""
    scored = result.pictures.dataset is not None
    table = _table(f"Against {reference}", "Speed", "8 of 10 turns", "From files")
    if scored:
        table.add_number("AP", "AP50")
    for row, change in zip(result.rows, result.changes, strict=True):
        if change is not None:
            accuracy = (_difference(change.ap), _difference(change.ap50)) if scored else ()
            speed, of_files = change.speed, change.speed_from_file
            spread = f"{speed.low:.2f} to {speed.high:.2f}"
            table.add_row(row.asked.name, _times(speed.median), spread, _times(of_files.median), *accuracy)
    table.caption = "Speed: how many times as fast, in the median of the turns. From files: with decoding."
    return table


def _cost_table(result: Benchmark) -> Table:
    table = FittedTable("What it takes")
    table.add_text("Detector", "Computed by")
    table.add_number("Precision", justify="left")
    on_device = any(row.memory.device_peak is not None for row in result.measured)
    table.add_number("File", "Load", "Memory", "Own", *(("Device",) if on_device else ()))
    for row in result.measured:
        opened, memory = row.opened, row.memory
        device = (_size(memory.device_peak),) if on_device else ()
        own = None if memory.peak is None or memory.libraries is None else memory.peak - memory.libraries
        table.add_row(
            row.asked.name,
            opened.engine,
            opened.precision,
            _size(opened.file_bytes),
            f"{opened.seconds:.2f} s",
            _size(memory.peak),
            _size(own),
            *device,
        )
    table.caption = (
        "Load: from the file to ready. Memory: the most that its process held. Own: of that, what came on top of torch "
        "and this program." + (" Device: the most that torch held there." if on_device else "")
    )
    return table


def _failure_table(result: Benchmark) -> Table:
    table = Table(title="Not measured", title_justify="left", title_style="red")
    table.add_column("Detector", overflow="fold")
    table.add_column("Reason", overflow="fold")
    for failed in result.failed:
        table.add_row(failed.asked.name, str(failed.error))
    return table


def _conditions(result: Benchmark) -> Iterator[str]:
    from refinedet_cli.engine.benchmark import RUNS_A_TURN, RUNS_FOR_P99, WARM_UP_RUNS

    machine, options, pictures = result.machine, result.options, result.pictures
    batch, size = options.batch, pictures.megapixels
    of_so_many = "" if batch == 1 else f" of {counted(batch, 'picture')}"
    yield (
        f"{counted(options.runs, 'run')}{of_so_many} in turns of {min(RUNS_A_TURN, options.runs)}; {WARM_UP_RUNS} to "
        f"warm up and 1 to begin each turn are not counted. {counted(len(pictures.paths), 'picture')} of "
        f"{size:.{1 if size >= 1 else 2}f} megapixels. Percentiles are measured times (nearest rank)"
        + ("." if options.runs >= RUNS_FOR_P99 else f"; of {counted(options.runs, 'run')}, p99 is the longest.")
    )
    if pictures.dataset is not None:
        yield f"AP: {_scope(result)}, {counted(len(pictures.dataset), 'picture')} of {pictures.source}."
    if result.reference is not None:
        opened = result.reference.opened
        device = "" if opened.device.startswith("cpu") else f"computed on {opened.device}; "
        yield (
            f"{device}{machine.processor}, {counted(machine.cpus, 'CPU')}, {counted(opened.threads, 'thread')}; "
            f"{machine.system}; Python {machine.python}."
        )


def _scope(result: Benchmark) -> str:
    """Say what the accuracies are of."""
    data = result.pictures.dataset
    shared = {len(row.accuracy.scored_classes) for row in result.measured if row.accuracy and not row.accuracy.complete}
    if data is None or not shared:
        return "COCO metric"
    fewest = min(shared)
    return (
        f"COCO metric over {fewest:,} shared of {counted(len(data.classes), 'class', 'classes')}, not the data set's AP"
    )


def _ms(milliseconds: float) -> str:
    """Three figures: more would be noise."""
    decimals = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:,.{decimals}f}"


def _rate(latency: Latency) -> str:
    return _ms(latency.pictures_per_second)


def _times(factor: float) -> str:
    return f"{factor:.2f} x"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _difference(value: float | None) -> str:
    if not value:
        return "-" if value is None else "0"
    return f"{value:+.4f}"


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.{1 if size < 1e8 else 0}f} MB"
