"""The command `refinedet data convert`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.options import (
    DATA,
    OUTPUT,
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
    from refinedet_cli.data.convert import Converted

_WHOLE = "all"


def data_convert(
    data: DataArg,
    to: Annotated[
        Literal["coco", "voc", "yolo"],
        typer.Option("--to", help="Format to write.", show_default=False, rich_help_panel=OUTPUT),
    ],
    out: OutOpt,
    images: ImagesOpt = None,
    root: RootOpt = None,
    picture_files: Annotated[
        Literal["copy", "link", "stay"] | None,
        typer.Option(
            "--picture-files",
            help="copy them into --out; link them there, which takes no space (hard links, copies on another disk); "
            "or let them stay, with one link to their folder.",
            show_default="copy",
            rich_help_panel=DATA,
        ),
    ] = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Write a data set as COCO, VOC or YOLO, with all its parts.

    What is written is read back and compared before --out appears: boxes are the same within a millionth of a pixel,
    classes keep their order. What the format cannot hold is named and counted. Between COCO files all fields are kept.
    Nothing of DATA is changed; --out must be new or empty.
    """
    output = Output(json=json, quiet=quiet)

    from refinedet_cli.data.convert import convert

    with output.progress("Convert:") as bars:
        task = bars.add_task("", total=None)
        converted = convert(
            data,
            to,
            out,
            transfer=picture_files or "copy",
            images=images,
            root=root,
            show=lambda done, total: bars.update(task, completed=done, total=total),
        )
    for note in converted.notes:
        output.note(note)
    output.result(_document(converted, data), *_renderables(converted, data))
    output.note(f"wrote {out}: {_files(converted)}")


def _files(converted: Converted) -> str:
    copied, linked = converted.pictures
    told = [f"{counted(number, 'picture')} {how}" for number, how in ((copied, "copied"), (linked, "linked")) if number]
    return ", ".join(told) or "pictures stay where they are, and their folder is linked"


def _document(converted: Converted, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "format": converted.format,
        "out": converted.out,
        "classes": list(converted.classes.names),
        "parts": [
            {"name": part.name, "pictures": len(part.dataset), "objects": part.dataset.objects}
            for part in converted.parts
        ],
        "losses": [loss._asdict() for loss in converted.losses],
        "pictures": converted.pictures._asdict(),
        "notes": list(converted.notes),
    }


def _renderables(converted: Converted, source: str) -> Iterator[RenderableType]:
    from refinedet_cli.data.convert import FORMAT_NAMES

    yield Text(f"{source} as {FORMAT_NAMES[converted.format]}", style="bold")
    table = Table()
    table.add_column("Part")
    for heading in ("Pictures", "Objects"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in converted.parts:
        table.add_row(part.name or _WHOLE, f"{len(part.dataset):,}", f"{part.dataset.objects:,}")
    yield table
    yield Text("")
    if not converted.losses:
        yield Text("Nothing is lost: what was written reads like the source.", style="bold")
        return
    lost = Table(title="Not in what was written", title_justify="left")
    lost.add_column("What", overflow="fold")
    lost.add_column("Number", justify="right", no_wrap=True)
    lost.add_column("Why", overflow="fold")
    for loss in converted.losses:
        lost.add_row(loss.what, f"{loss.number:,}", loss.why)
    yield lost
    yield Text("")
    yield Text("All else reads like the source.", style="bold")
