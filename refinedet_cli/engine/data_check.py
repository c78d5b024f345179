"""Everything that is wrong with a data set: entries, pictures, classes, boxes, and what a detector cannot learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.anchor_coverage import ObjectSet, best_ious, coverage
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.words import counted
from refinedet_cli.data.check import OUT_OF_REACH, SAME_CELL, Finding, Findings, Listed, Severity, Tally
from refinedet_cli.data.check_boxes import Judged, judge_boxes, judge_classes, judge_empty, report_objects
from refinedet_cli.data.check_entries import Part
from refinedet_cli.data.check_pictures import Depth, ListedPart, judge_pictures
from refinedet_cli.data.check_source import find_base, scan_source
from refinedet_cli.data.dataset import Dataset, Split
from refinedet_cli.engine.anchors import MATCHED, Shortfall, find_shortfall, gather, percent
from refinedet_cli.engine.cores import usable_cores
from refinedet_cli.engine.grid_cells import SharedCells, grid_size, sharing
from refinedet_cli.engine.run_file import RunFile
from refinedet_cli.engine.start import resolve_config
from refinedet_cli.errors import DataError

# Overlaps this near to the limit are computed once more as training rounds them.
_NEAR = 1e-4
_MOST_THREADS = 8

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is asked for.

    Attributes:
        data: a data set, as ``open_dataset`` takes it; all of its parts, but for one that it names.
        val: others to validate on; then ``data`` is its train part alone.
        split: of ``data``, the only part to look at.
        images: folder of the pictures.
        root: folder of public data sets.
        depth: how far to look into pictures.
        weights: whose anchors (or grid) and input size; None takes those of the preset.
        preset: whose anchors (or grid) and input size; None takes the default.
        threads: that read pictures; None fits the machine.
        keep: whether every single finding is wanted, or one of each kind.
    """

    data: str
    val: tuple[str, ...] = ()
    split: Split | None = None
    images: Path | None = None
    root: Path | None = None
    depth: Depth = "pixels"
    weights: str | None = None
    preset: str | None = None
    threads: int | None = None
    keep: bool = False


class CheckProgress(NamedTuple):
    """What is being done; ``total`` is None where that is not known."""

    doing: str
    done: int = 0
    total: int | None = None


class PartSummary(NamedTuple):
    """What one part holds, faulty entries included."""

    name: str
    file: Path
    pictures: int
    objects: int
    classes: int


class Reach(NamedTuple):
    """The objects that no anchor reaches.

    Attributes:
        preset: of the detector.
        input_size: (height, width), px-in.
        objects: all sound boxes of pictures whose size is known, crowds left out as in training.
        missed: of these, why they stay below IoU 0.5.
    """

    preset: str
    input_size: tuple[int, int]
    objects: int
    missed: Shortfall

    def __str__(self) -> str:
        height, width = self.input_size
        total = self.missed.total
        share = percent(total / self.objects) if self.objects else "0.0 %"
        head = (
            f"{total:,} of {counted(self.objects, 'box', 'boxes')} ({share}) cannot reach IoU {MATCHED:g} with an "
            f"anchor of {self.preset} at {width} x {height}"
        )
        causes = (
            (self.missed.too_small, f"smaller than {self.missed.smallest:.3g} px there"),
            (self.missed.too_large, f"larger than {self.missed.largest:.3g} px"),
            (self.missed.shape, "of a shape that no anchor has"),
            (self.missed.position, "between the anchors"),
        )
        told = [f"{count:,} {'is' if count == 1 else 'are'} {cause}" for count, cause in causes if count]
        return f"{head}: {', '.join(told)}" if told else head


@dataclass(frozen=True, eq=False, kw_only=True)
class DataCheck:
    """What was found.

    Attributes:
        parts: those that could be read.
        tallies: one for each kind of finding, the severe ones first.
        findings: every one, in the order found, where they were asked for; else none.
        reach: what no anchor reaches; None where there is no sound box, and for a detector without anchors.
        cells: what has no cell of its own; None where there is no sound box, and for a detector without a grid.
        depth: how far pictures were looked into.
    """

    parts: tuple[PartSummary, ...]
    tallies: tuple[Tally, ...]
    findings: tuple[Finding, ...]
    reach: Reach | None
    cells: SharedCells | None
    depth: Depth

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(tally.count for tally in self.tallies if tally.kind.severity == severity)


def check_data(options: CheckOptions, on_progress: Callable[[CheckProgress], None]) -> DataCheck:
    """Find everything that is wrong with a data set; nothing is written, and no fault ends the work.

    Args:
        options: what is asked for.
        on_progress: called at each step, and after every picture.

    Returns:
        `DataCheck`; it depends neither on the number of threads nor on the order of files on disk.

    Raises:
        DataError: the data set does not exist, is of a format that is not read, or has no such part.
        UsageError, ConfigError, CheckpointError: options do not fit.
    """
    detector = _detector(options)
    findings = Findings(find_base(options.data, options.root), keep=options.keep)
    on_progress(CheckProgress("reading annotations"))
    parts = _scan(options, findings)
    named = [ListedPart(_name(part), part.pictures) for part in parts]
    sizes = judge_pictures(
        named,
        options.depth,
        _threads(options.threads),
        findings,
        lambda done, total: on_progress(CheckProgress("looking at pictures", done, total)),
    )
    on_progress(CheckProgress("judging boxes"))
    judged = [judge_boxes(part, size, findings) for part, size in zip(parts, sizes, strict=True)]
    judge_empty(parts, findings)
    judge_classes(parts, findings)
    on_progress(CheckProgress("matching anchors" if detector.grid is None else "placing boxes in cells"))
    reach = _judge_reach(parts, judged, detector, findings) if detector.grid is None else None
    cells = _judge_cells(parts, judged, detector, findings) if detector.grid is not None else None
    return DataCheck(
        parts=tuple(
            PartSummary(_name(part), part.file, len(part.pictures), len(part.boxes), len(part.classes))
            for part in parts
        ),
        tallies=findings.tallies,
        findings=tuple(findings.kept),
        reach=reach,
        cells=cells,
        depth=options.depth,
    )


class Remark(NamedTuple):
    """One line about a kind of finding, with its cure."""

    severity: Severity
    text: str


def check_training(training: Dataset, validation: Dataset | None, detector: DetectorConfig) -> tuple[Remark, ...]:
    """Look at the pictures' headers, and at what the detector cannot learn, before a training.

    The readers have refused, or dropped and counted, what is wrong with the entries.

    Args:
        training: to learn from.
        validation: to measure on; None where nothing is measured.
        detector: its anchors or grid, and input size.

    Returns:
        a remark for each kind of finding.

    Raises:
        DataError: a picture cannot be read, or is not of the size that its boxes are for.
    """
    findings = Findings(Path())
    parts = [_listed("train", training), *([] if validation is None else [_listed("val", validation)])]
    judge_pictures(parts, "headers", _threads(None), findings, lambda done, total: None)
    errors = [tally for tally in findings.tallies if tally.kind.severity == "error"]
    if errors:
        raise DataError(
            f"{training.name} cannot be trained on: {'; '.join(_line(tally) for tally in errors)}",
            "refinedet data check DATA finds all that is wrong",
        )
    remarks = [Remark(tally.kind.severity, f"{_line(tally)}; {tally.kind.cure}") for tally in findings.tallies]
    size = (detector.preprocess.height, detector.preprocess.width)
    objects = gather(training, size)
    if detector.grid is not None:
        left_out = int(sharing(objects.boxes.boxes, objects.boxes.picture, detector).sum())
        cells = SharedCells(detector.preset, size, grid_size(detector), len(objects), left_out)
        return (*remarks, Remark(SAME_CELL.severity, f"{cells}; {SAME_CELL.cure}")) if left_out else tuple(remarks)
    best = _best(objects.boxes.boxes, detector)
    shortfall = find_shortfall(objects.sides, best, detector.require_anchors())
    reach = Reach(detector.preset, size, len(objects), shortfall)
    if reach.missed.total:
        remarks.append(Remark(OUT_OF_REACH.severity, f"{reach}; {OUT_OF_REACH.cure}"))
    return tuple(remarks)


def _listed(name: str, dataset: Dataset) -> ListedPart:
    return ListedPart(name, [Listed(r.path, (r.width, r.height), r.path, "") for r in dataset.records])


def _line(tally: Tally) -> str:
    more = f"{tally.count:,} times, first " if tally.count > 1 else ""
    detail = f" ({tally.first.detail})" if tally.first.detail else ""
    return f"{tally.kind.title}: {more}{tally.first.place}{detail}"


def _detector(options: CheckOptions) -> DetectorConfig:
    # Neither anchors nor input size depend on the classes, which may be what is wrong.
    classes = Classes(names=("object",), category_ids=(1,))
    return resolve_config(classes, options.preset, options.weights, RunFile(), ()).detector


def _scan(options: CheckOptions, findings: Findings) -> list[Part]:
    split: Split | None = options.split
    if not options.val:
        return scan_source(options.data, split, options.images, options.root, findings)
    parts = scan_source(options.data, split or "train", options.images, options.root, findings)
    for source in options.val:
        parts += scan_source(source, "val", options.images, options.root, findings)
    return parts


def _name(part: Part) -> str:
    return part.name or part.file.name


def _threads(wanted: int | None) -> int:
    return min(_MOST_THREADS, usable_cores()) if wanted is None else max(1, wanted)


def _judge_reach(
    parts: Sequence[Part], judged: Sequence[Judged], detector: DetectorConfig, findings: Findings
) -> Reach | None:
    size = (detector.preprocess.height, detector.preprocess.width)
    sides, bests = [], []
    for part, found in zip(parts, judged, strict=True):
        chosen, boxes = _seen(part, found, size)
        best = _best(boxes, detector)
        missed = np.zeros(len(found.good), dtype=bool)
        missed[chosen[best < MATCHED]] = True
        report_objects(part, missed, found, OUT_OF_REACH, findings)
        sides.append(boxes[:, 2:] - boxes[:, :2])
        bests.append(best)
    count = sum(len(best) for best in bests)
    if not count:
        return None
    shortfall = find_shortfall(np.concatenate(sides), np.concatenate(bests), detector.require_anchors())
    return Reach(detector.preset, size, count, shortfall)


def _judge_cells(
    parts: Sequence[Part], judged: Sequence[Judged], detector: DetectorConfig, findings: Findings
) -> SharedCells | None:
    size = (detector.preprocess.height, detector.preprocess.width)
    objects = left_out = 0
    for part, found in zip(parts, judged, strict=True):
        chosen, boxes = _seen(part, found, size)
        shared = np.zeros(len(found.good), dtype=bool)
        shared[chosen] = sharing(boxes, part.picture[chosen].astype(np.int64), detector)
        report_objects(part, shared, found, SAME_CELL, findings)
        objects += len(chosen)
        left_out += int(shared.sum())
    return SharedCells(detector.preset, size, grid_size(detector), objects, left_out) if objects else None


def _seen(part: Part, found: Judged, size: tuple[int, int]) -> tuple[NDArray[np.intp], Floats]:
    """The sound boxes of pictures whose size is known: their places and, float64[N, 4], xyxy, px-in, themselves."""
    chosen = np.flatnonzero(found.good & ~part.crowd & ~np.isnan(found.sizes[:, 0]))
    scale = np.array([size[1], size[0]] * 2, dtype=np.float64)
    return chosen, found.boxes[chosen] / np.tile(found.sizes[chosen], 2) * scale


def _best(boxes: Floats, detector: DetectorConfig) -> Floats:
    """The highest overlap of boxes float64[N, 4], xyxy, px-in, on the side of the limit where training sees it."""
    anchors, size = detector.require_anchors(), (detector.preprocess.height, detector.preprocess.width)
    best = best_ious(boxes, anchors, size)
    near = np.flatnonzero(np.abs(best - MATCHED) < _NEAR)
    one = np.ones(len(near), dtype=np.int64)
    exact = ObjectSet(boxes[near], one, np.arange(len(near), dtype=np.int64), len(near))
    best[near] = coverage(exact, anchors, size).best_iou
    return best
