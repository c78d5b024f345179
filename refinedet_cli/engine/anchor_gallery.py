"""Pictures of a data set with the anchors that cover their objects, and the charts beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.boxes import cxcywh_to_xyxy, pair_iou
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import read_record
from refinedet_cli.engine.anchor_figures import (
    Panel,
    Series,
    as_jpeg,
    draw_levels,
    draw_picture,
    draw_reach,
    draw_recall_by_iou,
    draw_recall_by_size,
)
from refinedet_cli.engine.anchor_refinement import Refinement
from refinedet_cli.engine.anchors import MATCHED, AnchorReport, Flags, Floats, Objects
from refinedet_cli.engine.charts import DARK, LIGHT, Theme

# In a picture that is to show something, and to be understood at a glance.
_FEWEST_OBJECTS, _MOST_OBJECTS = 3, 25


class Named(NamedTuple):
    """A report and what to call its anchors."""

    name: str
    report: AnchorReport


class Chart(NamedTuple):
    """A chart in light and in dark colours, as PNG; ``name`` is for its file."""

    name: str
    caption: str
    light: bytes
    dark: bytes
    of_refinement: bool


class Example(NamedTuple):
    """A drawn picture, as PNG for its file and as JPEG for the page; ``name`` is for the file."""

    name: str
    caption: str
    png: bytes
    jpeg: bytes


def make_charts(objects: Objects, reports: Sequence[Named], refinement: Refinement | None) -> Iterator[Chart]:
    """Draw the charts one after the other.

    Args:
        objects: what the reports are about.
        reports: one, or two to be compared.
        refinement: what a network makes of the first report's anchors.
    """
    first = reports[0].report
    series = [Series(name, report.coverage.best_iou) for name, report in reports]
    limit = first.shortfall.smallest

    def both(name: str, caption: str, draw: Callable[[Theme], bytes], *, of_refinement: bool = False) -> Chart:
        return Chart(name, caption, draw(LIGHT), draw(DARK), of_refinement)

    yield both(
        "coverage-map",
        "Objects of every width and height, put all over the picture: where the map is coloured, an anchor reaches IoU "
        f"{MATCHED:g}. Dots that lie outside are objects that training sees through a single forced anchor.",
        lambda theme: draw_reach(reports, objects.sides, theme),
    )
    yield both(
        "recall-by-size",
        "Small objects fall off first: below half the area of the smallest anchor nothing can be reached.",
        lambda theme: draw_recall_by_size(series, objects.sides, theme, limit=limit),
    )
    yield both(
        "recall-by-iou",
        "How closely anchors fit. The higher the curve, the less the network has left to correct.",
        lambda theme: draw_recall_by_iou(series, theme),
    )
    yield both(
        "levels",
        "A level that serves hardly any object costs time for nothing; one that serves most may lack anchors.",
        lambda theme: draw_levels(reports, theme),
    )
    if refinement is not None:
        steps = [Series(step.name, step.best_iou) for step in refinement.steps]
        yield both(
            "refinement-by-size",
            f"{refinement.heading}, on {counted(len(refinement.dataset), 'picture')}: the best box of each object "
            "before and after the network moves the anchors, whatever its score.",
            lambda theme: draw_recall_by_size(steps, refinement.objects.sides, theme, limit=limit),
            of_refinement=True,
        )
        yield both(
            "refinement-by-iou",
            "The same by overlap: each step brings boxes closer to the objects.",
            lambda theme: draw_recall_by_iou(steps, theme),
            of_refinement=True,
        )


def make_examples(
    dataset: Dataset, objects: Objects, reports: Sequence[Named], refinement: Refinement | None, *, count: int
) -> Iterator[Example]:
    """Draw pictures of the data, from the worst covered to the best.

    Args:
        dataset: what ``objects`` were gathered from.
        objects: what the reports are about.
        reports: one, or two to be compared.
        refinement: its pictures are taken, and show how the anchors move.
        count: how many pictures at most. Those that are not on disk are passed over.

    Raises:
        DataError: a picture cannot be read.
    """
    if refinement is None:
        best_iou = reports[0].report.coverage.best_iou
    else:
        dataset, objects, best_iou = refinement.dataset, refinement.objects, refinement.steps[0].best_iou
    there = np.array([dataset.records[i].path.is_file() for i in objects.records])
    for number, picture in enumerate(choose_examples(objects, best_iou, there, count), start=1):
        record = dataset.records[objects.records[picture]]
        boxes = record.boxes[~record.crowd]
        panels = [_panel(name, report, record, boxes) for name, report in reports]
        if refinement is not None:
            panels.append(_moved_panel(refinement, objects.boxes.picture == picture, reports[0].report, record))
        image = draw_picture(read_record(record), boxes, panels)
        yield Example(f"picture-{number}", record.file_name, image, as_jpeg(image))


def choose_examples(objects: Objects, best_iou: Floats, there: Flags, count: int) -> list[int]:
    """Choose pictures that are not too crowded, more of them from the worse covered half.

    Args:
        objects: of all pictures.
        best_iou: float64[N], of each object.
        there: bool[pictures], which pictures can be drawn.
        count: how many are wanted.

    Returns:
        at most ``count`` different pictures, worst covered first.
    """
    pictures = objects.boxes.pictures
    sizes = np.bincount(objects.boxes.picture, minlength=pictures)
    shares = np.bincount(objects.boxes.picture, weights=best_iou >= MATCHED, minlength=pictures) / sizes
    usable = there & (sizes <= _MOST_OBJECTS)
    for wanted in (usable & (sizes >= _FEWEST_OBJECTS), usable, there):
        chosen = np.flatnonzero(wanted)
        if len(chosen) >= count:
            break
    ordered = chosen[np.lexsort((-sizes[chosen], shares[chosen]))]
    steps = np.linspace(0, 1, min(count, len(ordered))) ** 2 * (len(ordered) - 1)
    places = np.maximum(steps.round().astype(int), np.arange(len(steps)))
    return [int(i) for i in ordered[places]]


def _panel(name: str, report: AnchorReport, record: Record, boxes: Floats) -> Panel:
    anchors = cxcywh_to_xyxy(tile_anchors(report.anchors, *report.input_size)).double()
    scale = np.array([record.width, record.height] * 2, dtype=np.float64)
    best = pair_iou(torch.from_numpy(boxes / scale)[:, None], anchors[None]).max(dim=1)
    return Panel(name, best.values.numpy(), anchors[best.indices].numpy() * scale)


def _moved_panel(refinement: Refinement, mine: Flags, report: AnchorReport, record: Record) -> Panel:
    height, width = report.input_size
    scale = np.array([record.width / width, record.height / height] * 2)
    step = refinement.steps[-1]
    moves = refinement.moves
    name = "refined" if refinement.refines else "moved"
    return Panel(name, step.best_iou[mine], moves.anchors[mine] * scale, moves.final[mine] * scale)
