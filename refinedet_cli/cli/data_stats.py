"""The command `refinedet data stats`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.options import (
    DataArg,
    ImagesOpt,
    JsonOpt,
    OptionalOutOpt,
    PresetOpt,
    QuietOpt,
    RootOpt,
    refuse_file,
)
from refinedet_cli.cli.output import SCHEMA_VERSION, Output

if TYPE_CHECKING:
    from refinedet_cli.engine.data_stats import ClassStats, DataStats, PartStats

_PAIRS_SHOWN = 8
_SIZES_SHOWN = 5
_PAIRS_WRITTEN = 100


def data_stats(
    data: DataArg,
    images: ImagesOpt = None,
    root: RootOpt = None,
    preset: PresetOpt = None,
    out: OptionalOutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Count what is in a data set: pictures, objects, classes and sizes.

    All parts are counted, or the one named as DATA:PART. Sizes at the input are what the detector sees once pictures
    are resized to the input of --preset. With --out, that folder gets stats.json and charts of the classes, of the
    sizes of objects and pictures, and of the objects in a picture.
    """
    output = Output(json=json, quiet=quiet)
    refuse_file(out)

    from refinedet_cli.engine.data_stats import describe_data

    with output.progress("Stats:") as bars:
        bars.add_task("", total=None)
        stats = describe_data(data, preset=preset, images=images, root=root)
        written = [] if out is None else _write(out, stats, data)
    for note in stats.notes:
        output.note(note)
    output.result({**_document(stats, data), "files": written}, *_renderables(stats, data))
    if out is not None:
        output.note(f"wrote {', '.join(written)}")


def _write(out: Path, stats: DataStats, source: str) -> list[str]:
    from refinedet_cli.data.files import write_json, write_whole
    from refinedet_cli.engine.data_figures import draw_stats

    report = out / "stats.json"
    write_json(report, {"schema_version": SCHEMA_VERSION, "command": "data stats", **_document(stats, source)})
    written = [report]
    for name, png in draw_stats(stats):
        write_whole(out / name, png)
        written.append(out / name)
    return [str(path) for path in written]


def _document(stats: DataStats, source: str) -> dict[str, Any]:
    from refinedet_cli.engine.data_stats import QUANTILES

    small, medium, large = stats.by_area
    return {
        "source": source,
        "preset": stats.preset,
        "input_size": {"height": stats.input_size[0], "width": stats.input_size[1]},
        "total": stats.total._asdict(),
        "parts": [part._asdict() for part in stats.parts],
        "classes": [
            {**one._asdict(), "by_part": list(one.by_part), "side": one.side if one.objects else None}
            for one in stats.by_class
        ],
        "quantiles": list(QUANTILES),
        "spreads": [{"name": spread.name, "values": list(spread.values)} for spread in stats.spreads],
        "by_area": {"small": small, "medium": medium, "large": large},
        "picture_sizes": [{"width": w, "height": h, "pictures": n} for w, h, n in stats.common_sizes],
        "together": [pair._asdict() for pair in stats.pairs[:_PAIRS_WRITTEN]],
        "notes": list(stats.notes),
    }


def _renderables(stats: DataStats, source: str) -> Iterator[RenderableType]:
    yield Text(source, style="bold")
    yield _part_table(stats)
    yield Text("")
    yield from _class_table(stats)
    yield Text("")
    yield from _spread_table(stats)
    sizes = stats.common_sizes
    yield Text("")
    yield _counted(
        f"Sizes of pictures, {len(sizes):,} in all",
        "Width x height",
        [(f"{width} x {height}", number) for width, height, number in sizes[:_SIZES_SHOWN]],
        stats.total.pictures,
    )
    if stats.pairs:
        yield Text("")
        yield _counted(
            "Classes most often in one picture",
            "Classes",
            [(f"{pair.first} + {pair.second}", pair.pictures) for pair in stats.pairs[:_PAIRS_SHOWN]],
            stats.total.pictures,
        )


def _table(title: str | None, first: str, headings: Sequence[str]) -> Table:
    table = FittedTable(title)
    table.add_text(first)
    table.add_number(*headings)
    return table


def _part_table(stats: DataStats) -> Table:
    headings = ("Pictures", "Empty", "Objects", "A picture", "At most", "Crowds", "Difficult")
    table = _table(None, "Part", headings)
    for part in stats.parts:
        table.add_row(*_part_cells(part))
    if len(stats.parts) > 1:
        table.add_section()
        table.add_row(*_part_cells(stats.total))
    return table


def _part_cells(part: PartStats) -> tuple[str, ...]:
    numbers = (part.most, part.crowds, part.difficult)
    each = f"{part.objects / part.pictures:.1f}"
    return (part.name, f"{part.pictures:,}", f"{part.empty:,}", f"{part.objects:,}", each, *map(_number, numbers))


def _class_table(stats: DataStats) -> Iterator[RenderableType]:
    names = [part.name for part in stats.parts] if len(stats.parts) > 1 else []
    table = _table("Classes", "Class", ("Objects", "Share", *names, "Pictures", "Side"))
    total = stats.total.objects
    for one in sorted(stats.by_class, key=lambda c: -c.objects):
        table.add_row(*_class_cells(one, total, parts=len(names)))
    height, width = stats.input_size
    yield table
    yield Text(f"Side: median of the square root of the area, px of the {width} x {height} input of {stats.preset}.")


def _class_cells(one: ClassStats, total: int, *, parts: int) -> tuple[str, ...]:
    share = f"{100 * one.objects / total:.1f} %" if total else "-"
    side = f"{one.side:.0f}" if one.objects else "-"
    return (one.name, _number(one.objects), share, *map(_number, one.by_part[:parts]), _number(one.pictures), side)


def _spread_table(stats: DataStats) -> Iterator[RenderableType]:
    table = _table("Sizes, px", "", ("Least", "5 %", "Median", "95 %", "Most"))
    for spread in stats.spreads:
        table.add_row(
            spread.name, *(f"{value:,.2f}" if ":" in spread.name else f"{value:,.0f}" for value in spread.values)
        )
    small, medium, large = stats.by_area
    yield table
    yield Text(
        f"As COCO parts the objects, {small:,} are small (below 32 x 32), {medium:,} medium and {large:,} large "
        "(from 96 x 96)."
    )


def _counted(title: str, first: str, rows: Sequence[tuple[str, int]], total: int) -> Table:
    table = _table(title, first, ("Pictures", "Share"))
    for name, number in rows:
        table.add_row(name, f"{number:,}", f"{100 * number / total:.1f} %")
    return table


def _number(number: int) -> str:
    return f"{number:,}"
