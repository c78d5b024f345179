"""One HTML page that explains an evaluation; it needs no network, no server and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinedet_cli.core.words import counted
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.images import read_image
from refinedet_cli.engine.anchor_refinement import Refinement
from refinedet_cli.engine.reasons import Reasons, told
from refinedet_cli.metrics.curves import Curve
from refinedet_cli.metrics.error_kinds import KINDS

# Pictures that are shown for each of the three reasons, and the longer side they are scaled down to, px.
PICTURES_OF_A_REASON = 8
PICTURE_SIDE = 560
# Classes of which the page shows what they are taken for; a table of a thousand would be a million cells.
_CONFUSED = 60

Fault = Literal["missed", "false", "confused"]
# What a wrong detection is to someone who looks at the picture.
_FAULT: dict[str, Fault] = {
    "class": "confused",
    "both": "confused",
    "place": "false",
    "duplicate": "false",
    "background": "false",
}


@dataclass(frozen=True)
class Number:
    """One number of the summary; low and high are its interval, where one was computed."""

    name: str
    meaning: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SourcePicture:
    """Where a picture lies and how large it is."""

    path: Path
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report tells.

    Attributes:
        title: of the page.
        scope: what the numbers are of, one line.
        numbers: the summary, the main one first.
        columns: headings of the numbers of each class.
        rows: for each class of ``reasons.names`` its numbers under those headings.
        reasons: what lies behind them.
        refinement: what moving the anchors does, where it was measured.
        pictures: those that were scored, in the order in which ``reasons`` were found.
        facts: settings and provenance, name and value.
    """

    title: str
    scope: str
    numbers: Sequence[Number]
    columns: Sequence[str]
    rows: Sequence[Sequence[float | None]]
    reasons: Reasons
    refinement: Refinement | None
    pictures: Sequence[SourcePicture]
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Mark:
    """A box on a picture, in per cent of its sides."""

    kind: Literal["found", "missed", "false", "confused"]
    left: float
    top: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery.

    Attributes:
        source: a data URI.
        faults: number of each kind of fault.
        classes: names of the classes that are at fault.
    """

    source: str
    file_name: str
    width: int
    height: int
    marks: tuple[Mark, ...]
    faults: dict[Fault, int]
    classes: tuple[str, ...]


def write_report(path: Path, page: Page) -> None:
    """Write the page as one self-contained HTML file.

    Raises:
        DataError: a picture that is to be shown cannot be read, or the file cannot be written.
    """
    write_whole(path, render(page))


def render(page: Page) -> str:
    """Make the HTML of a page."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    template = environment.from_string(
        resources.files("refinedet_cli.engine").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    reasons = page.reasons
    return template.render(
        page=page,
        reasons=reasons,
        curves=_drawn_curves(reasons),
        gallery=gallery(reasons, page.pictures),
        told=told,
        steps=refinement_steps(page.refinement),
        lowest=min((t.score for t in reasons.thresholds if t is not None), default=None),
        highest=max((t.score for t in reasons.thresholds if t is not None), default=None),
        unfound=int(_unfound(reasons).sum()),
        objects=counted(int((~reasons.errors.matched.objects.ignored).sum()), "object"),
        most_gain=max((k.gain or 0 for k in reasons.errors.kinds), default=0) or 1,
        most_confused=max(1, int(_off_diagonal(reasons.confusion).max(initial=0))),
        confused=_most_confused(reasons.confusion),
    )


@dataclass(frozen=True)
class StepShares:
    """Objects that boxes of one step cover well enough, and those that no earlier step did.

    Attributes:
        name: of the step.
        share50, share75: of all objects, at IoU 0.5 and 0.75.
        gained50, gained75: objects that this step alone brought there, in numbers.
    """

    name: str
    share50: float
    share75: float
    gained50: int
    gained75: int


def refinement_steps(refinement: Refinement | None) -> list[StepShares]:
    """Tell what each step does for the objects, the anchors first; nothing where it was not measured."""
    steps = refinement.steps if refinement is not None else ()
    shares = []
    for i, step in enumerate(steps):
        gained = [
            int(((step.best_iou >= iou) & ~np.any([s.best_iou >= iou for s in steps[:i]], axis=0)).sum()) if i else 0
            for iou in (0.5, 0.75)
        ]
        shares.append(StepShares(step.name, step.share(0.5), step.share(0.75), *gained))
    return shares


def gallery(reasons: Reasons, pictures: Sequence[SourcePicture]) -> list[Shown]:
    """Choose the pictures with the most faults of each kind, read them and mark what is wrong.

    Returns:
        at most `PICTURES_OF_A_REASON` for each kind of fault, no picture twice, the worst first.
    """
    faults = _faults(reasons, len(pictures))
    chosen: dict[int, int] = {}
    for counts in faults.values():
        order = np.argsort(-counts, kind="stable")[:PICTURES_OF_A_REASON]
        chosen |= {int(i): int(sum(c[i] for c in faults.values())) for i in order if counts[i]}
    worst_first = sorted(chosen, key=lambda i: (-chosen[i], i))
    return [
        _shown(reasons, i, pictures[i], {fault: int(counts[i]) for fault, counts in faults.items()})
        for i in worst_first
    ]


def _faults(reasons: Reasons, pictures: int) -> dict[Fault, NDArray[np.int64]]:
    """Count the faults of each picture, int64[pictures] a kind, at the best thresholds."""
    errors, matched = reasons.errors, reasons.errors.matched
    counts: dict[Fault, NDArray[np.int64]] = {
        "missed": np.bincount(matched.objects.picture[_unfound(reasons)], minlength=pictures)
    }
    for fault in ("false", "confused"):
        kinds = [KINDS.index(kind) for kind in KINDS if _FAULT.get(kind) == fault]
        wrong = np.isin(errors.of_detection, kinds) & reasons.counted()
        counts[fault] = np.bincount(matched.picture[wrong], minlength=pictures)
    return counts


def _unfound(reasons: Reasons) -> NDArray[np.bool_]:
    """bool[N]: objects that no detection at or above its threshold found."""
    objects = reasons.errors.matched.objects
    found = (objects.found_by >= 0) & np.append(reasons.counted(), False)[objects.found_by]
    missing: NDArray[np.bool_] = ~found & ~objects.ignored
    return missing


def _shown(reasons: Reasons, place: int, picture: SourcePicture, faults: dict[Fault, int]) -> Shown:
    errors, matched, objects = reasons.errors, reasons.errors.matched, reasons.errors.matched.objects
    marks, classes = [], set()
    unfound = _unfound(reasons)
    for i in np.flatnonzero((objects.picture == place) & ~objects.ignored):
        name = reasons.names[objects.labels[i] - 1]
        kind: Literal["missed", "found"] = "missed" if unfound[i] else "found"
        marks.append(_mark(kind, objects.boxes[i], picture, name if kind == "found" else f"{name} not found"))
        if unfound[i]:
            classes.add(name)
    for i in np.flatnonzero((matched.picture == place) & reasons.counted() & (errors.of_detection >= 0)):
        kind_name = KINDS[errors.of_detection[i]]
        name = reasons.names[matched.labels[i] - 1]
        marks.append(
            _mark(_FAULT[kind_name], matched.boxes[i], picture, f"{name} {matched.scores[i]:.2f}: {kind_name}")
        )
        classes.add(name)
    return Shown(
        source=_data_uri(picture.path),
        file_name=picture.file_name,
        width=picture.width,
        height=picture.height,
        marks=tuple(marks),
        faults=faults,
        classes=tuple(sorted(classes)),
    )


def _mark(
    kind: Literal["found", "missed", "false", "confused"],
    box: NDArray[np.float64],
    picture: SourcePicture,
    text: str,
) -> Mark:
    left, top, right, bottom = (box / [picture.width, picture.height, picture.width, picture.height] * 100).tolist()
    return Mark(kind, round(left, 2), round(top, 2), round(right - left, 2), round(bottom - top, 2), text)


def _data_uri(path: Path) -> str:
    image = Image.fromarray(read_image(path))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class _Drawn:
    """Curves of a class as SVG points in a square of 100 x 100, y downwards."""

    name: str
    precision_recall: str
    f1: str


def _drawn_curves(reasons: Reasons) -> list[_Drawn]:
    present = [c for c in reasons.curves if c.objects]
    recalls = np.linspace(0, 1, 101)
    envelopes = [_envelope(c, recalls) for c in present]
    scores = np.linspace(0, 1, 101)
    f1s = [_f1_at(c, scores) for c in present]
    drawn = []
    if present:
        drawn.append(
            _Drawn("all classes", _points(recalls, np.mean(envelopes, axis=0)), _points(scores, np.mean(f1s, axis=0)))
        )
    for curve, envelope, f1 in zip(present, envelopes, f1s, strict=True):
        drawn.append(_Drawn(reasons.names[curve.label - 1], _points(recalls, envelope), _points(scores, f1)))
    return drawn


def _envelope(curve: Curve, recalls: NDArray[np.float64]) -> NDArray[np.float64]:
    """Best precision at or beyond each recall."""
    best = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0.0)
    values: NDArray[np.float64] = best[np.searchsorted(curve.recall, recalls, side="left")]
    return values


def _f1_at(curve: Curve, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 of the detections at or above each score; 0 where there is none."""
    kept = np.searchsorted(-curve.scores, -scores, side="right")
    values: NDArray[np.float64] = np.append(curve.f1, 0.0)[kept - 1]
    return values


def _points(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return " ".join(f"{100 * a:.1f},{100 - 100 * b:.1f}" for a, b in zip(x, y, strict=True))


def _most_confused(table: NDArray[np.int64]) -> list[int]:
    """Choose the labels whose rows and columns are shown: all, or those that are mixed up most, and 0 for nothing."""
    mixed = _off_diagonal(table)
    mistakes = mixed.sum(axis=0) + mixed.sum(axis=1)
    chosen = 1 + np.argsort(-mistakes[1:], kind="stable")[:_CONFUSED]
    return [0, *sorted(chosen.tolist())]


def _off_diagonal(table: NDArray[np.int64]) -> NDArray[np.int64]:
    rest = table.copy()
    np.fill_diagonal(rest, 0)
    return rest


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
