"""The command `refinedet eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer
from rich.progress import TaskID

from refinedet_cli.cli.downloads import on_disk
from refinedet_cli.cli.eval_files import SEED, WORKERS, full_document, require_files, write_files, write_page
from refinedet_cli.cli.eval_tables import Comparison, Detector, Measured, MetricName, scope_of, tables_of
from refinedet_cli.cli.options import (
    DATA,
    OUTPUT,
    BatchOpt,
    DatasetOpt,
    DeviceName,
    DeviceOpt,
    ImagesOpt,
    JsonOpt,
    MultiScaleOpt,
    OfflineOpt,
    OptionalOutOpt,
    PostprocessOpt,
    PrecisionName,
    PrecisionOpt,
    QuietOpt,
    RootOpt,
    SplitOpt,
    TileOpt,
    TileOverlapOpt,
    WeightsOpt,
    WorkersOpt,
    refuse_file,
    remarks_on_split,
)
from refinedet_cli.cli.output import Output
from refinedet_cli.cli.together import processes, together
from refinedet_cli.core.presets import POSTPROCESS_PRESETS
from refinedet_cli.errors import UsageError

if TYPE_CHECKING:
    from refinedet_cli.data.dataset import Dataset
    from refinedet_cli.engine.evaluate import Collected, EvaluationProgress
    from refinedet_cli.engine.reasons import Reasons
    from refinedet_cli.engine.results import SavedDetections
    from refinedet_cli.metrics.coco import CocoResult
    from refinedet_cli.metrics.intervals import Estimates
    from refinedet_cli.metrics.voc import Overlap, Pixels, VocResult, VocRules

NUMBERS = "Numbers"

_DEFAULT_ROUNDS = 1000

EngineName = Literal["auto", "pycocotools", "hotcoco"]


@together
def evaluate(
    dataset: DatasetOpt,
    split: SplitOpt = "val",
    images: ImagesOpt = None,
    root: RootOpt = None,
    saved: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE.json",
            help="Score saved detections instead of running a detector: a detections.json, or a list of COCO results.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    metric: Annotated[
        MetricName,
        typer.Option(
            "--metric",
            help="coco: AP over IoU 0.50 to 0.95; voc2007: mAP at IoU 0.5, 11-point; voc2012: the same by area. The "
            "format of the data does not matter.",
            rich_help_panel=NUMBERS,
        ),
    ] = "coco",
    voc_pixels: Annotated[
        Literal["inclusive", "continuous"] | None,
        typer.Option(
            "--voc-pixels",
            help="Width of a VOC box: xmax - xmin + 1, as in the PASCAL devkit, or xmax - xmin.",
            show_default="inclusive",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    voc_overlap: Annotated[
        Literal["at-least", "above"] | None,
        typer.Option(
            "--voc-overlap",
            help="A VOC object is found at an IoU of at least 0.5, as in the PASCAL devkit, or above 0.5, as in the "
            "evaluator behind the RefineDet paper.",
            show_default="at-least",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    bootstrap: Annotated[
        int | None,
        typer.Option(
            "--bootstrap",
            min=0,
            metavar="N",
            help="Put 95 % intervals around AP, AP50 and AP75, and around AP and AP50 of each class (of VOC metrics, "
            "around mAP and each AP), by drawing the pictures anew N times; 1000 is usual.",
            show_default="0, or 1000 with --compare",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="FILE.json",
            help="Other saved detections of the same pictures: print the difference with its 95 % interval.",
            show_default=False,
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            "--engine",
            help="What computes the COCO metric: auto takes hotcoco, the extra fast-eval, where it is installed and "
            "proves equal to pycocotools.",
            rich_help_panel=NUMBERS,
        ),
    ] = "auto",
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch coco, voc2007 or voc2012 from its official server if it is not there.",
            rich_help_panel=DATA,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            help="Write a page that explains the score: errors, curves, confusions, worst pictures.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: OptionalOutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    weights: WeightsOpt = None,
    offline: OfflineOpt = False,
    postprocess: PostprocessOpt = None,
    multi_scale: MultiScaleOpt = None,
    tile: TileOpt = None,
    tile_overlap: TileOverlapOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    batch: BatchOpt = None,
    workers: WorkersOpt = None,
) -> None:
    """Measure a detector, or saved detections, on a data set with the COCO or a VOC metric.

    All detections above the detector's own threshold count, not only those that detect would draw. Classes are matched
    by name; where the detector knows only some, only these are scored, and the result says so. Several --dataset are
    joined. With --out, that folder
    gets metrics.json and, of a detector, detections.json: a COCO data set with scores, which leads pycocotools and
    --from to the same numbers.

    Several processes share the pictures when torchrun starts them: torchrun --nproc-per-node 4 --no-python refinedet
    eval ...
    """
    output = Output(json=json, quiet=quiet)
    refuse_file(out)
    if saved is not None:
        _refuse_without_detector(
            {
                "--weights": weights,
                "--postprocess": postprocess,
                "--multi-scale": multi_scale,
                "--tile": tile,
                "--tile-overlap": tile_overlap,
                "--device": None if device == "auto" else device,
                "--precision": precision,
                "--batch": batch,
                "--workers": workers,
            }
        )
    if metric == "coco":
        _refuse_without_voc({"--voc-pixels": voc_pixels, "--voc-overlap": voc_overlap})
    elif engine != "auto":
        raise UsageError(f"--engine {engine} is about COCO numbers", "leave it out, or add --metric coco")
    if report is not None and report.is_dir():
        raise UsageError(f"--report {report} is a folder", "name a file, such as report.html")
    asked = _Asked(metric, voc_pixels, voc_overlap, _rounds(bootstrap, compare), engine)

    from refinedet_cli.data.source import find_splits, open_joined

    if download:
        _download(output, dataset, split, root)
    data = open_joined(dataset, split=split, images=images, root=root)
    for remark in remarks_on_split(dataset, split, root):
        output.note(remark)
    part = split if any(find_splits(name, root) for name in dataset) else None

    if saved is not None and not processes().first:
        return
    require_files(out, report, detects=saved is None)
    other = None if compare is None else _read(compare, data)
    if saved is not None:
        found = _Found(*_read(saved, data))
    else:
        detector = _load(
            output,
            on_disk(output, weights, offline=offline),
            postprocess,
            multi_scale,
            (tile, tile_overlap),
            device,
            precision,
            batch,
        )
        found = _Found(detector, _detect(output, data, detector, batch, workers))
    if not processes().first:
        return
    with output.progress("Computing numbers") as bars:
        bars.add_task("", total=None)
        measured = _measure((" + ".join(dataset), part, data), asked, found, other)
    reasons = None if report is None else write_page(output, measured, report)
    _report(output, measured, out, report, reasons)


class _Asked(NamedTuple):
    """The numbers that were asked for."""

    metric: MetricName
    pixels: Pixels | None
    overlap: Overlap | None
    rounds: int
    engine: EngineName

    def rules(self) -> VocRules | None:
        """Those of a VOC metric; None for COCO's."""
        if self.metric == "coco":
            return None
        from refinedet_cli.metrics.voc import VOC2007, VOC2012

        rules = VOC2007 if self.metric == "voc2007" else VOC2012
        return replace(rules, pixels=self.pixels or rules.pixels, overlap=self.overlap or rules.overlap)


class _Saved(NamedTuple):
    """Saved detections laid beside the objects of the data."""

    file: SavedDetections
    collected: Collected


class _Found(NamedTuple):
    """What is to be scored, and where it comes from."""

    made: Detector | SavedDetections
    collected: Collected


def _refuse_without_detector(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} does not go with --from: saved detections need no detector", f"leave {option} out"
            )


def _refuse_without_voc(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} is about VOC numbers", "add --metric voc2007 or --metric voc2012")


def _rounds(bootstrap: int | None, compare: Path | None) -> int:
    if bootstrap is None:
        return 0 if compare is None else _DEFAULT_ROUNDS
    if bootstrap == 0 and compare is not None:
        raise UsageError("--compare needs drawings for its intervals", "leave --bootstrap 0 out")
    from refinedet_cli.metrics.intervals import MIN_ROUNDS

    if 0 < bootstrap < MIN_ROUNDS:
        raise UsageError(
            f"--bootstrap {bootstrap} is too few for a 95 % interval", f"take {MIN_ROUNDS} or more; 1000 is usual"
        )
    return bootstrap


def _read(path: Path, data: Dataset) -> _Saved:
    from refinedet_cli.engine.evaluate import collect_saved
    from refinedet_cli.engine.results import read_results

    saved = read_results(path)
    return _Saved(saved, collect_saved(saved, data))


def _load(
    output: Output,
    weights: str | None,
    postprocess: Literal["paper", "caffe"] | None,
    multi_scale: str | None,
    tile: tuple[int | None, float | None],
    device: DeviceName,
    precision: PrecisionName | None,
    batch: int | None,
) -> Detector:
    from refinedet_cli.engine.device import describe_device, select_device
    from refinedet_cli.engine.lanes import lanes_for
    from refinedet_cli.engine.multi_scale import remark_on_passes
    from refinedet_cli.engine.open_predictor import open_predictor
    from refinedet_cli.engine.results import origin_of
    from refinedet_cli.engine.tiling import make_tiling

    chosen = processes().device(select_device(device))
    predictor = open_predictor(
        weights,
        device=chosen,
        precision=precision,
        multi_scale=multi_scale,
        postprocess=None if postprocess is None else POSTPROCESS_PRESETS[postprocess](),
        tiles=make_tiling(*tile),
        batch=batch,
        lanes=lanes_for(chosen),
    )
    if remark := remark_on_passes(predictor):
        output.note(remark)
    origin = origin_of(predictor, score_threshold=predictor.config.postprocess.score_threshold)
    return Detector(predictor, origin, describe_device(chosen))


def _detect(output: Output, data: Dataset, made: Detector, batch: int | None, workers: int | None) -> Collected:
    from refinedet_cli.engine.evaluate import collect
    from refinedet_cli.engine.multi_scale import remark_on_limits
    from refinedet_cli.engine.predict import default_batch
    from refinedet_cli.engine.tiling import remark_on_tiles

    if remark := remark_on_tiles(made.predictor, [(r.height, r.width) for r in data.records]):
        output.note(remark)
    with output.progress("Evaluating") as bars:
        task = bars.add_task("", total=len(data))

        def show(progress: EvaluationProgress) -> None:
            bars.update(task, completed=progress.done)

        collected = collect(
            made.predictor,
            data,
            batch=batch or default_batch(made.predictor.device),
            workers=WORKERS if workers is None else workers,
            on_progress=show,
            processes=processes(),
        )
    if remark := remark_on_limits(made.predictor, [(r.width, r.height) for r in collected.records]):
        output.note(remark)
    return collected


def _measure(source: tuple[str, str | None, Dataset], asked: _Asked, found: _Found, other: _Saved | None) -> Measured:
    from refinedet_cli.engine.evaluate import choose_engine, coco_notes, score_coco, score_voc, voc_notes

    rules, collected = asked.rules(), found.collected
    intervals, comparison = _intervals(asked, found, other)
    result: CocoResult | VocResult
    engine = ""
    if rules is None:
        chosen = choose_engine(asked.engine)
        engine = chosen.description
        result, notes = score_coco(collected, chosen), (*chosen.notes, *coco_notes(collected))
    else:
        result, notes = score_voc(collected, rules), voc_notes(collected)
    return Measured(
        *source,
        metric=asked.metric,
        rules=rules,
        engine=engine,
        made=found.made,
        collected=collected,
        result=result,
        intervals=intervals,
        comparison=comparison,
        seed=SEED,
        notes=(*collected.notes, *notes),
    )


def _intervals(asked: _Asked, found: _Found, other: _Saved | None) -> tuple[Estimates | None, Comparison | None]:
    """Draw the pictures anew, for the detections and for those they are compared with."""
    if not asked.rounds:
        return None, None
    from refinedet_cli.engine.evaluate import in_classes_of, resample
    from refinedet_cli.metrics.intervals import differences, draw_pictures, estimates

    rules, collected = asked.rules(), found.collected
    if other is not None:
        # Before the work: the two may not be comparable.
        theirs = in_classes_of(other.collected, collected)
    drawn = draw_pictures(len(collected.records), asked.rounds, SEED)
    rounds = resample(collected, drawn, rules)
    if other is None:
        return estimates(rounds), None
    others = resample(theirs, drawn, rules)
    return estimates(rounds), Comparison(other.file, estimates(others), differences(rounds, others))


def _download(output: Output, datasets: Sequence[str], split: str, root: Path | None) -> None:
    """Fetch public data sets with a bar for each archive."""
    from refinedet_cli.data.public import PUBLIC_SETS, Archive, fetch_public

    wanted = []
    for dataset in datasets:
        name, _, part = dataset.partition(":")
        if name.lower() not in PUBLIC_SETS:
            raise UsageError(
                f"--download does not know {dataset}",
                f"it fetches {', '.join(PUBLIC_SETS)}; leave it out for other data",
            )
        wanted.append((name.lower(), part or split))
    with output.progress("Downloading") as bars:
        tasks: dict[str, TaskID] = {}

        def show(archive: Archive, done: int) -> None:
            if archive.name not in tasks:
                tasks[archive.name] = bars.add_task(archive.name, total=archive.size)
            bars.update(tasks[archive.name], completed=done)

        fetched = [archive for name, part in wanted for archive in fetch_public(name, part, show, root)]
    for archive in fetched:
        output.note(f"downloaded and unpacked {archive}")


def _report(output: Output, measured: Measured, out: Path | None, page: Path | None, reasons: Reasons | None) -> None:
    """Write the files, the remarks and the result."""
    files: dict[str, str | None] = {"detections_file": None, "metrics_file": None}
    if out is not None:
        written = write_files(out, measured, reasons)
        files = {f"{name}_file": None if path is None else str(path) for name, path in written._asdict().items()}
    files["report_file"] = None if page is None else str(page)
    for note in measured.notes:
        output.note(note)
    if not measured.collected.complete:
        output.warn(f"not every object was scored: {scope_of(measured)}")
    output.result({**full_document(measured, reasons), **files}, *tables_of(measured))
    if names := [path for path in files.values() if path]:
        output.note(f"wrote {' and '.join(names)}")
