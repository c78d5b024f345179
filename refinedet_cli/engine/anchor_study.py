"""`refinedet anchors` from options to findings: coverage, refinement, and the search for better anchors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from refinedet_cli.core.anchor_alternatives import Alternative, alternatives
from refinedet_cli.core.anchor_design import Proposal, design
from refinedet_cli.core.anchors import level_sizes
from refinedet_cli.core.config import AnchorConfig, DetectorConfig, TrainConfig
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, Record, remap
from refinedet_cli.data.source import find_splits, hold_out, open_joined
from refinedet_cli.engine.anchor_refinement import Refinement, measure_refinement
from refinedet_cli.engine.anchors import AnchorReport, Objects, explain, gather, percent, report_anchors
from refinedet_cli.engine.device import DeviceName, select_device
from refinedet_cli.engine.predict import default_batch
from refinedet_cli.engine.run_file import read_run_file
from refinedet_cli.engine.start import resolve_config
from refinedet_cli.errors import ConfigError, UsageError
from refinedet_cli.zoo.checkpoint import LoadedDetector, load_detector
from refinedet_cli.zoo.hub import resolve_weights

HELD_OUT = 0.15
# A look that costs so many times as much must reach so many times this share more of the objects.
_LEAST_GAIN = 0.02
_SIDES = ("the remaining", "the held-out")


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What is asked for; the names are those of the command's options.

    Attributes:
        datasets: joined where they are several.
        weights: None for anchors without a network.
        pictures: that the network looks at.
        seed: None for that of the config.
    """

    datasets: Sequence[str]
    images: Path | None = None
    root: Path | None = None
    weights: str | None = None
    preset: str | None = None
    config: Path | None = None
    settings: Sequence[str] = ()
    search: bool = True
    budget: int | None = None
    pictures: int = 200
    device: DeviceName = "auto"
    batch: int | None = None
    workers: int = 4
    seed: int | None = None


class StudyProgress(NamedTuple):
    """What is being done; ``total`` is None where that is not known."""

    doing: str
    done: int = 0
    total: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """What was found out.

    Attributes:
        dataset: what was looked at.
        detector: whose anchors; its classes are those of the data.
        objects: of the data, as the detector sees them.
        report: how its anchors cover them.
        weights: the file of the network; None without one.
        refinement: what that network makes of its anchors; None without one.
        search: for better anchors; None where there was none.
        looks: other ways to show the pictures, the present one first; measured on the held-out objects if there was a
            search, else on all.
        seed: of every choice.
        notes: what was left out or looks odd, one line each.
    """

    dataset: Dataset
    detector: DetectorConfig
    objects: Objects
    report: AnchorReport
    weights: Path | None
    refinement: Refinement | None
    search: Search | None
    looks: tuple[Look, ...]
    seed: int
    notes: tuple[str, ...]

    @property
    def anchors(self) -> AnchorConfig:
        """The anchors to train with: those proposed, or those there are."""
        return self.detector.require_anchors() if self.search is None else self.search.proposal.anchors

    @property
    def verdict(self) -> tuple[str, ...]:
        """What it all means, in plain sentences."""
        lines = [explain(self.report)]
        if self.refinement is not None:
            lines.append(self.refinement.verdict)
        if self.search is not None:
            lines.append(self.search.verdict)
        proposed = self.search is not None and self.search.proposal.accepted
        advice = advise([look._replace(now=look.found or 0.0) for look in self.looks] if proposed else self.looks)
        return (*lines, advice) if advice else tuple(lines)


class Parts(NamedTuple):
    """The pictures that anchors are fitted to, and those that judge them.

    Attributes:
        fitted: most of the data.
        held_out: the rest.
        how: they were parted, for people.
        notes: of what those that judge lost when they were read.
    """

    fitted: Dataset
    held_out: Dataset
    how: str
    notes: tuple[str, ...] = ()


class Look(NamedTuple):
    """Another way to show pictures to the network, and the share of objects that would reach IoU 0.5 then.

    Attributes:
        name: for people.
        input_size: (height, width), px-in.
        passes: of the network over one picture.
        cost: relative to now.
        now: with the present anchors.
        found: with those of the search; None without one.
    """

    name: str
    input_size: tuple[int, int]
    passes: int
    cost: float
    now: float
    found: float | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Search:
    """What came of a search.

    Attributes:
        proposal: what was found, and whether it wins.
        found: how the anchors found cover the objects of the report on the present ones.
        how: the judging pictures were chosen, for people.
        multiply_adds: of the network with the anchors found, as a factor of what it takes now.
    """

    proposal: Proposal
    found: AnchorReport
    how: str
    multiply_adds: float

    @property
    def verdict(self) -> str:
        """What the search is worth, in plain words."""
        before, after, gain = self.proposal.held_out_before, self.proposal.held_out_after, self.proposal.gain
        reach = f"{percent(after.matched)} of the {after.objects:,} held-out objects"
        interval = f"95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
        if not self.proposal.accepted:
            return (
                f"No better anchors were found: the best of the search reach {reach}, the present ones "
                f"{percent(before.matched)} ({100 * gain.gain:+.1f} points, {interval}). The present anchors stay."
            )
        return (
            f"Better anchors reach {reach} instead of {percent(before.matched)} ({100 * gain.gain:+.1f} points, "
            f"{interval}), with {counted(self.proposal.anchors_after, 'anchor')} a picture instead of "
            f"{self.proposal.anchors_before:,}."
        )


def study_anchors(options: StudyOptions, on_progress: Callable[[StudyProgress], None]) -> Study:
    """Find out how well anchors cover the objects of a data set, and whether others would do better.

    No picture is opened unless weights are given, or a val part has to be held out of pictures that are on disk.

    Args:
        options: what is asked for.
        on_progress: called at each step, and after every batch of pictures.

    Raises:
        UsageError, ConfigError, DataError, CheckpointError, DeviceError: as the parts raise them.
    """
    on_progress(StudyProgress("reading annotations"))
    dataset = open_joined(options.datasets, split="train", images=options.images, root=options.root)
    loaded = None if options.weights is None else load_detector(resolve_weights(options.weights))
    if loaded is None:
        file = read_run_file(options.config)
        resolved = resolve_config(dataset.classes, options.preset, file.weights, file, options.settings)
        detector, seed = resolved.detector, resolved.train.seed
    else:
        detector, seed = replace(loaded.config, classes=dataset.classes), TrainConfig().seed
    seed = seed if options.seed is None else options.seed
    _refuse_grid(detector)
    if options.budget is not None and options.budget < least_budget(detector):
        raise UsageError(
            f"--budget {options.budget:,} is less than one anchor in every cell",
            f"give at least {least_budget(detector):,}",
        )
    on_progress(StudyProgress("matching"))
    objects = gather(dataset, (detector.preprocess.height, detector.preprocess.width))
    report = report_anchors(objects, detector)
    notes = [*dataset.notes, *report.notes]
    if objects.crowds:
        notes.append(
            f"{counted(objects.crowds, 'box around a crowd is', 'boxes around crowds are')} left out, as in training"
        )
    refinement = None if loaded is None else _refine(loaded, dataset, options, seed, on_progress)
    search, judged = None, (objects, dataset)
    if options.search:
        on_progress(StudyProgress("searching better anchors"))
        searched = _search(objects, dataset, detector, report, options, seed)
        search, judged = searched.search, searched.judged or judged
        notes += searched.notes
    on_progress(StudyProgress("comparing inputs"))
    looks = compare_looks(*judged, detector, None if search is None else search.proposal.found)
    return Study(
        dataset=dataset,
        detector=detector,
        objects=objects,
        report=report,
        weights=None if loaded is None else loaded.path,
        refinement=refinement,
        search=search,
        looks=tuple(looks),
        seed=seed,
        notes=tuple(notes),
    )


def _refuse_grid(detector: DetectorConfig) -> None:
    if detector.grid is not None:
        raise UsageError(
            f"{detector.preset} has no anchors: a YOLO predicts boxes from the cells of a grid",
            "refinedet data check with the same --preset or --weights counts the objects that share a cell",
        )


def _refine(
    loaded: LoadedDetector,
    dataset: Dataset,
    options: StudyOptions,
    seed: int,
    on_progress: Callable[[StudyProgress], None],
) -> Refinement:
    device = select_device(options.device)
    return measure_refinement(
        loaded,
        dataset,
        pictures=options.pictures,
        seed=seed,
        device=device,
        batch=options.batch or default_batch(device),
        workers=options.workers,
        on_progress=lambda done, total: on_progress(StudyProgress("refining", done, total)),
    )


class _Searched(NamedTuple):
    """A search with the objects that judged it, and their data; or neither, and why."""

    search: Search | None
    judged: tuple[Objects, Dataset] | None
    notes: list[str]


def _search(
    objects: Objects, dataset: Dataset, detector: DetectorConfig, report: AnchorReport, options: StudyOptions, seed: int
) -> _Searched:
    """Search, or say in one line why there can be no search."""
    parts = part_data(dataset, options.datasets, images=options.images, root=options.root, seed=seed)
    if parts is None:
        return _Searched(None, None, ["no search for better anchors: there is no second picture to judge them by"])
    usable = [part for part in (parts.fitted, parts.held_out) if any((~r.crowd).any() for r in part.records)]
    if len(usable) < len(_SIDES):
        side = _SIDES[0] if usable == [parts.held_out] else _SIDES[1]
        return _Searched(None, None, [f"no search for better anchors: {side} pictures have no object ({parts.how})"])
    fitted, held_out = (gather(part, report.input_size) for part in usable)
    found = search_anchors(
        fitted,
        held_out,
        detector,
        now=report,
        shown=objects,
        how=parts.how,
        budget=options.budget,
        seed=seed,
    )
    notes = [f"{parts.held_out.name}: {note}" for note in parts.notes]
    return _Searched(found, (held_out, parts.held_out), notes)


def compare_looks(
    objects: Objects, dataset: Dataset, detector: DetectorConfig, found: AnchorConfig | None
) -> list[Look]:
    """Measure larger inputs, inputs shaped like the pictures, and tiles; inputs that the network takes.

    Args:
        objects: to measure on.
        dataset: they were gathered from it.
        detector: its anchors and input size.
        found: other anchors to measure too.
    """
    shapes = [math.log(dataset.records[i].width / dataset.records[i].height) for i in objects.records]
    aspect, size = math.exp(sum(shapes) / len(shapes)), (detector.preprocess.height, detector.preprocess.width)
    with_now = alternatives(objects.boxes, detector.require_anchors(), size, aspect=aspect)
    shares: list[float | None] = [None] * len(with_now)
    if found is not None:
        shares = [other.fit.matched for other in alternatives(objects.boxes, found, size, aspect=aspect)]
    return [
        Look(_look_name(one), one.input_size, one.passes, one.cost, one.fit.matched, share)
        for one, share in zip(with_now, shares, strict=True)
        if _takes(detector, one.input_size)
    ]


def _takes(detector: DetectorConfig, size: tuple[int, int]) -> bool:
    try:
        replace(detector, preprocess=replace(detector.preprocess, height=size[0], width=size[1]))
    except ConfigError:
        return False
    return True


def _look_name(one: Alternative) -> str:
    size = f"an input of {one.input_size[1]} x {one.input_size[0]} px"
    return {
        "now": "the present input",
        "larger": size,
        "shaped": f"{size}, shaped like the pictures",
        "tiles": "four tiles of each picture",
        "tiles+whole": "each picture and four tiles of it",
    }[one.cure]


def advise(looks: Sequence[Look]) -> str | None:
    """Name the cheapest other look that is worth its cost, and the best one; None where none is.

    Args:
        looks: the present one first; their shares ``now`` are compared.
    """
    present, *others = looks
    worth = [look for look in others if look.now - present.now >= _LEAST_GAIN * max(1.0, look.cost)]
    if not worth:
        return None
    cheapest, best = min(worth, key=lambda look: look.cost), max(worth, key=lambda look: look.now)
    told = [f"{cheapest.name} would raise {percent(present.now)} of the objects to {_at_cost(cheapest)}"]
    if best.now >= cheapest.now + _LEAST_GAIN:
        told.append(f"{best.name} to {_at_cost(best)}")
    return f"Beyond anchors: {', and '.join(told)}."


def _at_cost(look: Look) -> str:
    return f"{percent(look.now)} at {look.cost:.2g} times the cost"


def part_data(
    dataset: Dataset, sources: Sequence[str], *, images: Path | None, root: Path | None, seed: int
) -> Parts | None:
    """Find pictures to judge anchors by: the val parts that the data has of its own, or some held out.

    They are held out by the content of their files, as training does, where these are on disk, and by their names where
    they are not.

    Args:
        dataset: what was opened of the sources.
        sources: as the user named them.
        images: folder of the pictures, as the user named it.
        root: of known data sets.
        seed: of the choice.

    Returns:
        `Parts`, neither empty; None where there is only one picture.

    Raises:
        DataError: a picture cannot be read, or the val part shares no class.
    """
    parted = [source for source in sources if "val" in find_splits(source, root=root)]
    if parted:
        held_out = remap(open_joined(parted, split="val", images=images, root=root), dataset.classes)
        return Parts(dataset, held_out, f"those of {held_out.name}", held_out.notes)
    if len({record.file_name for record in dataset.records}) < 2:
        return None
    if all(record.path.is_file() for record in dataset.records):
        fitted, held_out = hold_out(dataset, fraction=HELD_OUT, seed=seed)
        return Parts(fitted, held_out, "held out by content, as train does")
    fitted, held_out = hold_out_by_name(dataset, fraction=HELD_OUT, seed=seed)
    return Parts(fitted, held_out, "held out by name, for not all pictures are on disk")


def hold_out_by_name(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Part a data set by the names of its pictures, of which none is opened.

    Returns:
        the rest and the held-out part, neither empty; together they have every record once.

    Raises:
        ValueError: there are not two names.
    """
    draws = [_draw(record, seed) for record in dataset.records]
    distinct = sorted(set(draws))
    if len(distinct) < 2:
        raise ValueError("expected pictures of at least two names")
    limit = min(max(int(fraction * 2**256), distinct[0] + 1), distinct[-1])
    rest = tuple(r for r, draw in zip(dataset.records, draws, strict=True) if draw >= limit)
    out = tuple(r for r, draw in zip(dataset.records, draws, strict=True) if draw < limit)
    return replace(dataset, records=rest), replace(dataset, name=f"{dataset.name} (held out)", records=out)


def _draw(record: Record, seed: int) -> int:
    """A number in [0, 2**256) that is even over names."""
    name = f"{seed}:{record.file_name}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest(), "big")


def least_budget(detector: DetectorConfig) -> int:
    """Count the anchors of a picture with one shape on every level."""
    size = detector.preprocess
    return sum(rows * columns for rows, columns in level_sizes(detector.require_anchors(), size.height, size.width))


def search_anchors(
    fitted: Objects,
    held_out: Objects,
    detector: DetectorConfig,
    *,
    now: AnchorReport,
    shown: Objects,
    how: str,
    budget: int | None,
    seed: int,
) -> Search:
    """Search for anchors that cover more of the objects, at no more anchors a picture.

    Args:
        fitted: what the search sees.
        held_out: what decides.
        detector: its anchors are the ones to beat.
        now: the report on them.
        shown: the objects of that report, to compare with.
        how: the judging pictures were chosen, for people.
        budget: the most anchors of a picture, at least `least_budget`; None for as many as there are now.
        seed: of the search.
    """
    proposal = design(
        fitted.boxes,
        held_out.boxes,
        detector.require_anchors(),
        now.input_size,
        budget=budget,
        seed=seed,
        classes=detector.classes.with_background,
    )
    found = report_anchors(shown, replace(detector, anchors=proposal.found))
    return Search(proposal=proposal, found=found, how=how, multiply_adds=found.multiply_adds / now.multiply_adds)
