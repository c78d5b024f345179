"""The command `refinedet data split`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.options import (
    DATA,
    RUNTIME,
    DataArg,
    ImagesOpt,
    JsonOpt,
    OutOpt,
    QuietOpt,
    RootOpt,
)
from refinedet_cli.cli.output import Output
from refinedet_cli.core.words import counted

if TYPE_CHECKING:
    from refinedet_cli.data.split import Divided


def data_split(
    data: DataArg,
    parts: Annotated[
        str,
        typer.Option(
            "--parts",
            metavar="NAME=SHARE,...",
            help="Shares of train, val and test that add up to 1, as train=0.8,val=0.1,test=0.1.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ],
    out: OutOpt,
    group: Annotated[
        str | None,
        typer.Option(
            "--group",
            metavar="folder|REGEX",
            help="Keep pictures together: those of a folder, or whose file names share what a regular expression "
            "finds in them (its parentheses, if it has some).",
            show_default="each picture by itself",
            rich_help_panel=DATA,
        ),
    ] = None,
    images: ImagesOpt = None,
    root: RootOpt = None,
    picture_files: Annotated[
        Literal["copy", "link", "stay"] | None,
        typer.Option(
            "--picture-files",
            help="Let them stay, with one link to their folder in --out; or copy or link them there.",
            show_default="stay",
            rich_help_panel=DATA,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            metavar="N",
            help="Another one gives another split.",
            show_default="0",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Divide a data set into train, val and test.

    Copies of a picture, whatever their names, fall into one part. The classes are balanced: the rarest goes first, each
    picture that has it going to the part that lacks most of its objects; then the next rarest; empty pictures last.
    The result depends on pictures, objects and seed alone, not on names or order. Parts that DATA has are joined first.
    --out gets a COCO JSON for each part, for refinedet train --data.
    """
    output = Output(json=json, quiet=quiet)

    from refinedet_cli.data.split import read_shares, split

    with output.progress("Split:") as bars:
        task = bars.add_task("", total=None)
        divided = split(
            data,
            read_shares(parts),
            out,
            seed=seed or 0,
            group=group,
            transfer=picture_files or "stay",
            images=images,
            root=root,
            show=lambda doing, done, total: bars.update(task, description=doing, completed=done, total=total),
        )
    for note in divided.notes:
        output.note(note)
    for note in _remarks(divided):
        output.note(note)
    output.result(_document(divided, data, seed or 0, group), *_renderables(divided, data))
    output.note(f"wrote {out}")


def _remarks(divided: Divided) -> list[str]:
    from refinedet_cli.data.dataset import listed

    notes = []
    if divided.copies:
        copies = counted(divided.copies, "picture is a copy of another", "pictures are copies of others")
        notes.append(f"{copies}, byte for byte, and in the same part")
    if divided.alone:
        lonely = counted(divided.alone, "picture does not", "pictures do not")
        notes.append(f"{lonely} match --group, each on its own")
    unused = [name for name, total in zip(divided.classes.names, divided.totals, strict=True) if not total]
    if unused:
        classes = counted(len(divided.classes), "class", "classes")
        notes.append(f"{len(unused):,} of {classes} without object: {listed(unused, 10)}")
    absent = [
        f"{part.name} has no {name}"
        for part, counts in zip(divided.parts, divided.counts, strict=True)
        for name, count, total in zip(divided.classes.names, counts, divided.totals, strict=True)
        if total and not count
    ]
    if absent:
        notes.append(f"not every class is in every part: {listed(absent, 5)}")
    return notes


def _document(divided: Divided, source: str, seed: int, group: str | None) -> dict[str, Any]:
    return {
        "source": source,
        "out": divided.out,
        "seed": seed,
        "group": group,
        "units": divided.units,
        "copies": divided.copies,
        "alone": divided.alone,
        "parts": [
            {
                "name": part.name,
                "asked": share,
                "pictures": len(part.dataset),
                "objects": part.dataset.objects,
                "classes": dict(zip(divided.classes.names, counts, strict=True)),
            }
            for part, share, counts in zip(divided.parts, divided.shares, divided.counts, strict=True)
        ],
        "pictures": divided.pictures._asdict(),
        "notes": [*divided.notes, *_remarks(divided)],
    }


def _renderables(divided: Divided, source: str) -> Iterator[RenderableType]:
    pictures = sum(len(part.dataset) for part in divided.parts)
    together = f", in {divided.units:,} units that stay together" if divided.units < pictures else ""
    yield Text(f"{source}: {counted(pictures, 'picture')}{together}", style="bold")
    table = FittedTable()
    table.add_text("")
    for part, share in zip(divided.parts, divided.shares, strict=True):
        table.add_number(f"{part.name} {100 * share:g} %")
        table.add_number("", beside=True)
    table.add_number("all")
    table.add_row("pictures", *_cells([len(part.dataset) for part in divided.parts]))
    table.add_row("objects", *_cells([part.dataset.objects for part in divided.parts]))
    table.add_section()
    table.add_row(Text("Objects of", style="bold"))
    for label, name in enumerate(divided.classes.names):
        if divided.totals[label]:
            table.add_row(f"  {name}", *_cells([counts[label] for counts in divided.counts]))
    yield table


def _cells(counts: list[int]) -> list[str]:
    total = sum(counts)
    cells = []
    for count in counts:
        cells += [f"{count:,}", f"{100 * count / total:.1f} %" if total else "-"]
    return [*cells, f"{total:,}"]
