"""The command `refinedet data check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.downloads import on_disk
from refinedet_cli.cli.options import (
    DATA,
    MODEL,
    DataArg,
    ImagesOpt,
    JsonOpt,
    OfflineOpt,
    OptionalOutOpt,
    PresetOpt,
    QuietOpt,
    RootOpt,
    WorkersOpt,
    refuse_file,
)
from refinedet_cli.cli.output import SCHEMA_VERSION, Output
from refinedet_cli.core.words import counted
from refinedet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.data.check import Finding, Kind, Severity
    from refinedet_cli.engine.data_check import CheckProgress, DataCheck

FINDINGS_NAME = "findings.json"
_STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}


def data_check(
    data: DataArg,
    val: Annotated[
        list[str] | None,
        typer.Option(
            "--val",
            metavar="DATA",
            help="Other data to validate on; then DATA is what is trained on. Repeatable.",
            show_default="the parts of DATA",
            rich_help_panel=DATA,
        ),
    ] = None,
    images: ImagesOpt = None,
    root: RootOpt = None,
    depth: Annotated[
        Literal["entries", "headers", "pixels"],
        typer.Option(
            "--depth",
            help="How far to look: entries opens no picture, headers reads sizes, pixels decodes every picture.",
            rich_help_panel=DATA,
        ),
    ] = "pixels",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 4 for warnings too.", rich_help_panel=DATA)
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="NAME|FILE",
            help="The detector whose anchors or grid, and input size, boxes are matched with.",
            show_default="those of the preset",
            rich_help_panel=MODEL,
        ),
    ] = None,
    offline: OfflineOpt = False,
    preset: PresetOpt = None,
    workers: WorkersOpt = None,
    out: OptionalOutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Find what is wrong with a data set before you train on it.

    All parts are looked at, and the work always goes to its end: broken files, sizes and EXIF orientation that
    contradict the annotation, impossible boxes, unknown and unused classes, the same picture twice or in two parts, and
    boxes that no anchor can reach, or that share a cell of the grid. The data is never changed. Exit code 4 means
    errors. With --out, that folder gets findings.json with every single finding, and the worst pictures with their
    boxes.
    """
    output = Output(json=json, quiet=quiet)
    if weights is not None and preset is not None:
        raise UsageError("--preset and --weights exclude each other", "leave one of them out")
    refuse_file(out)

    from refinedet_cli.engine.data_check import CheckOptions, check_data

    options = CheckOptions(
        data=data,
        val=tuple(val or ()),
        images=images,
        root=root,
        depth=depth,
        weights=on_disk(output, weights, offline=offline),
        preset=preset,
        threads=workers,
        keep=out is not None,
    )
    with output.progress("Check:") as bars:
        task = bars.add_task("", total=None)

        def show(progress: CheckProgress) -> None:
            bars.update(task, description=progress.doing, completed=progress.done, total=progress.total)

        check = check_data(options, show)
        written = [] if out is None else _write(out, check, data)
    output.result({**_document(check, data), "strict": strict, "files": written}, *_renderables(check, data))
    if written:
        output.note(
            f"wrote {written[0]}" + (f" and {counted(len(written) - 1, 'picture')}" if len(written) > 1 else "")
        )
    _fail(check, data, strict=strict)


def _fail(check: DataCheck, source: str, *, strict: bool) -> None:
    errors, warnings = check.count("error"), check.count("warning")
    if errors or (strict and warnings):
        found = [counted(errors, "error")] if errors else []
        found += [counted(warnings, "warning")] if strict and warnings else []
        raise DataError(f"{' and '.join(found)} in {source}", "each kind of finding comes with its cure")


def _write(out: Path, check: DataCheck, source: str) -> list[str]:
    from refinedet_cli.data.files import write_json
    from refinedet_cli.engine.data_check_pictures import write_worst

    file = out / FINDINGS_NAME
    findings = [_finding(finding) for finding in check.findings]
    head = {"schema_version": SCHEMA_VERSION, "command": "data check"}
    write_json(file, {**head, **_document(check, source), "findings": findings})
    return [str(path) for path in (file, *write_worst(out, check.findings))]


# The document --------------------------------------------------------------------------------------------------------


def _document(check: DataCheck, source: str) -> dict[str, Any]:
    reach, cells = check.reach, check.cells
    return {
        "data": source,
        "depth": check.depth,
        "parts": [{**part._asdict(), "file": str(part.file)} for part in check.parts],
        "errors": check.count("error"),
        "warnings": check.count("warning"),
        "notes": check.count("note"),
        "kinds": [
            {**_kind(tally.kind), "count": tally.count, "first": _finding(tally.first)} for tally in check.tallies
        ],
        "reach": None
        if reach is None
        else {
            "preset": reach.preset,
            "input_size": {"height": reach.input_size[0], "width": reach.input_size[1]},
            "objects": reach.objects,
            "missed": reach.missed.total,
            **{name: getattr(reach.missed, name) for name in ("too_small", "too_large", "shape", "position")},
        },
        "cells": None
        if cells is None
        else {
            "preset": cells.preset,
            "input_size": {"height": cells.input_size[0], "width": cells.input_size[1]},
            "grid": {"rows": cells.grid[0], "columns": cells.grid[1]},
            "objects": cells.objects,
            "left_out": cells.left_out,
        },
    }


def _kind(kind: Kind) -> dict[str, Any]:
    return {"kind": kind.name, "severity": kind.severity, "title": kind.title, "cure": kind.cure}


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.name,
        "severity": finding.kind.severity,
        "file": finding.file,
        "where": finding.where,
        "detail": finding.detail,
        "cure": finding.cure or finding.kind.cure,
        "picture": None if finding.picture is None else str(finding.picture),
        "box": None if finding.box is None else [round(value, 3) for value in finding.box],
    }


# What is shown -------------------------------------------------------------------------------------------------------


def _renderables(check: DataCheck, source: str) -> Iterator[RenderableType]:
    yield _setting_table(check, source)
    yield Text("")
    if check.tallies:
        yield _findings_table(check)
        yield Text("")
    yield Text(_verdict(check), style="bold")


def _setting_table(check: DataCheck, source: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Data", source)
    for part in check.parts:
        table.add_row(
            part.name,
            f"{counted(part.pictures, 'picture')}, {counted(part.objects, 'object')}, "
            f"{counted(part.classes, 'class', 'classes')}",
        )
    looked = {
        "entries": "looked for, not opened",
        "headers": "size and EXIF of each read, not its pixels",
        "pixels": "each read in full",
    }
    table.add_row("Pictures", looked[check.depth])
    if check.reach is not None:
        table.add_row("Anchors", str(check.reach))
    if check.cells is not None:
        table.add_row("Grid", str(check.cells))
    return table


def _findings_table(check: DataCheck) -> Table:
    table = Table(title="Findings", title_justify="left", show_lines=True, expand=True)
    table.add_column("Kind", overflow="fold", ratio=7)
    table.add_column("Severity", no_wrap=True)
    table.add_column("Count", justify="right", no_wrap=True)
    table.add_column("First", overflow="fold", ratio=12)
    table.add_column("Cure", overflow="fold", ratio=8)
    for tally in check.tallies:
        kind, first = tally.kind, tally.first
        severity = Text(kind.severity, style=_STYLES[kind.severity])
        detail = f"{first.place}: {first.detail}" if first.detail else first.place
        table.add_row(kind.title, severity, f"{tally.count:,}", detail, first.cure or kind.cure)
    return table


def _verdict(check: DataCheck) -> str:
    counts = [counted(check.count(severity), severity) for severity in _STYLES if check.count(severity)]
    if not counts:
        return "Nothing to find fault with."
    if check.count("error"):
        return f"{', '.join(counts)}: mend the errors before you train."
    return f"{', '.join(counts)}: fit to train on."
