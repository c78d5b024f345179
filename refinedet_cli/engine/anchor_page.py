"""What `refinedet anchors` writes: anchors as a file, charts and pictures as PNG, and one page that holds it all."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined

from refinedet_cli.core.words import counted
from refinedet_cli.data.files import write_whole
from refinedet_cli.engine.anchor_file import ANCHORS_NAME, anchor_toml
from refinedet_cli.engine.anchor_gallery import Chart, Example, Named, make_charts, make_examples
from refinedet_cli.engine.anchor_study import Study
from refinedet_cli.engine.anchors import AnchorReport, Group, LevelUse, percent, shape_text

PAGE_NAME = "anchors.html"
REPORT_NAME = "anchors.json"
EXAMPLES = 6
_TEMPLATE = "anchors.html.jinja"


class Row(NamedTuple):
    """A row of a table of groups, as text; ``empty`` ones are of no object."""

    cells: tuple[str, ...]
    empty: bool


class Section(NamedTuple):
    """A table of the page: its title, headings and rows."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[Row, ...]


def write_anchors(out: Path, study: Study) -> Path:
    """Write the anchors to train with as ``anchors.toml``.

    Raises:
        DataError: the file cannot be written.
    """
    path = out / ANCHORS_NAME
    size = study.report.input_size
    write_whole(path, anchor_toml(study.anchors, size, _remarks(study)))
    return path


def write_gallery(out: Path, study: Study, on_progress: Callable[[str], None]) -> tuple[list[Path], int]:
    """Draw charts and pictures, and write them as files and as one page.

    Args:
        out: the folder.
        study: what to show.
        on_progress: called with what is drawn next.

    Returns:
        the files written, the page first; and how many of them are pictures of the data.

    Raises:
        DataError: a file cannot be written, or a picture cannot be read.
    """
    reports = [Named("now", study.report)]
    proposed = _proposed(study)
    if proposed is not None:
        reports.append(Named("proposed", proposed))
    on_progress("drawing charts")
    charts = list(make_charts(study.objects, reports, study.refinement))
    on_progress("drawing pictures")
    examples = list(make_examples(study.dataset, study.objects, reports, study.refinement, count=EXAMPLES))
    written = [out / PAGE_NAME]
    write_whole(written[0], render_page(study, charts, examples))
    for name, content in [*((c.name, c.light) for c in charts), *((e.name, e.png) for e in examples)]:
        written.append(out / f"{name}.png")
        write_whole(written[-1], content)
    return written, len(examples)


def render_page(study: Study, charts: Sequence[Chart], examples: Sequence[Example]) -> str:
    """Make one HTML page that needs no other file and no network."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["uri"] = _uri
    template = environment.from_string(files("refinedet_cli.engine").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    height, width = study.report.input_size
    return template.render(
        study=study,
        name=study.dataset.name,
        size=f"{width} x {height}",
        charts=charts,
        examples=examples,
        several=study.refinement is not None or _proposed(study) is not None,
        levels=list_levels(study),
        looks=list_looks(study),
        sections=list_sections(study),
        percent=percent,
        counted=counted,
    )


def list_sections(study: Study) -> list[Section]:
    """The tables of the page."""
    report = study.report
    groups = (
        ("By size in the picture, as COCO does", report.by_area),
        ("By size at the network's input (square root of the area)", report.by_side),
        ("By aspect ratio (width : height) at the network's input", report.by_ratio),
        ("By level of the best anchor", report.by_level),
        ("By class", tuple(sorted(report.by_class, key=lambda g: (not g.objects, g.shares[1])))),
    )
    return [
        Section(
            title,
            ("", "Objects", "IoU 0.3", "IoU 0.5", "IoU 0.7", "Only forced", "Anchors each"),
            tuple(_group_row(group) for group in (report.overall, *rows)),
        )
        for title, rows in groups
    ]


def _proposed(study: Study) -> AnchorReport | None:
    return study.search.found if study.search is not None and study.search.proposal.accepted else None


def list_levels(study: Study) -> list[Section]:
    """The tables of what each level's anchors are and do: those of now, and those proposed."""
    named = [("Now", study.report)]
    proposed = _proposed(study)
    if proposed is not None:
        named.append(("Proposed", proposed))
    headings = ("Stride", "Anchors of a cell, px", "In a picture", "Best for", "Matched", "Head sees")
    return [Section(title, headings, tuple(_level_row(level) for level in report.levels)) for title, report in named]


def list_looks(study: Study) -> Section:
    """The table of other ways to show the pictures to the network."""
    headings = ("Shown as", "Cost", "Present anchors", "Anchors found")
    rows = [
        (look.name, f"{look.cost:.2f} x", percent(look.now), "-" if look.found is None else percent(look.found))
        for look in study.looks
    ]
    return Section("Other ways to show the pictures", headings, tuple(Row(row, empty=False) for row in rows))


def _level_row(level: LevelUse) -> Row:
    shapes = ", ".join(shape_text(shape) for shape in level.shapes)
    seen = "not known" if level.receptive_field is None else f"{level.receptive_field} px"
    matched = counted(sum(level.positives), "time")
    return Row(
        (str(level.stride), shapes, f"{level.anchors:,}", counted(level.best, "object"), matched, seen), empty=False
    )


def _group_row(group: Group) -> Row:
    if not group.objects:
        return Row((group.name, "0", *["-"] * 5), empty=True)
    shares = [percent(share) for share in (*group.shares, group.forced)]
    return Row((group.name, f"{group.objects:,}", *shares, f"{group.positives:.1f}"), empty=False)


def _uri(image: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _remarks(study: Study) -> list[str]:
    data, search = study.dataset, study.search
    height, width = study.report.input_size
    lines = [
        f"Anchors for {data.name}: {counted(len(data), 'picture')}, {counted(len(study.objects), 'object')}, at an "
        f"input of {width} x {height} px.",
    ]
    if search is None:
        lines.append("They were not searched for: these are the detector's own.")
    else:
        lines.append(search.verdict)
        lines.append(f"Held-out pictures: {search.how}. Seed {study.seed}.")
    lines.append(f"To train with them: refinedet train --data DATA --anchors {ANCHORS_NAME}")
    return lines
