"""The command `refinedet eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.options import (
    MODEL,
    BatchOpt,
    DatasetOpt,
    DeviceOpt,
    ImagesOpt,
    JsonOpt,
    OptionalOutOpt,
    PrecisionOpt,
    QuietOpt,
    SplitOpt,
    WeightsOpt,
    WorkersOpt,
)
from refinedet_cli.cli.output import SCHEMA_VERSION, Output
from refinedet_cli.core.presets import POSTPROCESS_PRESETS
from refinedet_cli.errors import UsageError

if TYPE_CHECKING:
    from refinedet_cli.core.config import PostprocessConfig
    from refinedet_cli.data.dataset import Dataset
    from refinedet_cli.engine.evaluate import Evaluation, EvaluationProgress
    from refinedet_cli.engine.predict import Predictor
    from refinedet_cli.engine.results import Origin

METRICS_NAME = "metrics.json"

_DEFAULT_WORKERS = 4

# The twelve numbers in their order, in four groups.
_MEANINGS = (
    {
        "AP": "mean over IoU 0.50 to 0.95, the number to compare",
        "AP50": "at IoU 0.50",
        "AP75": "at IoU 0.75",
    },
    {
        "AP_small": "objects below 32 x 32 px",
        "AP_medium": "objects from 32 x 32 to 96 x 96 px",
        "AP_large": "objects above 96 x 96 px",
    },
    {
        "AR1": "recall with 1 detection of each class in a picture",
        "AR10": "with 10",
        "AR100": "with 100",
    },
    {
        "AR_small": "AR100 of objects below 32 x 32 px",
        "AR_medium": "AR100 of objects from 32 x 32 to 96 x 96 px",
        "AR_large": "AR100 of objects above 96 x 96 px",
    },
)


class _Measured(NamedTuple):
    """What was measured, and how."""

    source: str
    split: str | None
    dataset: Dataset
    predictor: Predictor
    origin: Origin
    device: str
    evaluation: Evaluation


def evaluate(
    dataset: DatasetOpt,
    split: SplitOpt = "val",
    images: ImagesOpt = None,
    out: OptionalOutOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    weights: WeightsOpt = None,
    postprocess: Annotated[
        Literal["paper", "caffe"] | None,
        typer.Option(
            "--postprocess",
            help="paper: 400 candidates a picture, 200 kept; caffe: 1000 a class, 500 kept.",
            show_default="that of the weights",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    batch: BatchOpt = None,
    workers: WorkersOpt = None,
) -> None:
    """Measure a detector on a data set with the COCO metric.

    All detections above the detector's own threshold count, not only those that detect would draw. Classes are matched
    by name; where the detector knows only some, only these are scored, and the result says so. With --out, that folder
    gets detections.json (a COCO data set with scores, which leads pycocotools to the same numbers) and metrics.json.
    """
    from refinedet_cli.data.source import find_splits, open_dataset

    output = Output(json=json, quiet=quiet)
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file", "name a folder")
    data = open_dataset(dataset, split=split, images=images)

    from refinedet_cli.engine.device import describe_device, select_device, select_precision
    from refinedet_cli.engine.evaluate import evaluate as run
    from refinedet_cli.engine.evaluate import with_postprocess
    from refinedet_cli.engine.predict import Predictor, default_batch
    from refinedet_cli.engine.results import origin_of
    from refinedet_cli.zoo.checkpoint import load_detector
    from refinedet_cli.zoo.hub import resolve_weights

    chosen = select_device(device)
    loaded = load_detector(resolve_weights(weights))
    if postprocess is not None:
        loaded = with_postprocess(loaded, POSTPROCESS_PRESETS[postprocess]())
    predictor = Predictor(loaded, device=chosen, precision=select_precision(precision or "fp32", chosen))
    with output.progress("Evaluating") as bars:
        task = bars.add_task("", total=len(data))

        def show(progress: EvaluationProgress) -> None:
            is_last = progress.done == progress.total
            bars.update(task, completed=progress.done, description="scoring" if is_last else "")

        evaluation = run(
            predictor,
            data,
            batch=batch or default_batch(chosen),
            workers=_DEFAULT_WORKERS if workers is None else workers,
            on_progress=show,
        )
    threshold = loaded.config.postprocess.score_threshold
    measured = _Measured(
        source=dataset,
        split=split if find_splits(dataset) else None,
        dataset=data,
        predictor=predictor,
        origin=origin_of(loaded, precision=predictor.precision, score_threshold=threshold),
        device=describe_device(chosen),
        evaluation=evaluation,
    )
    _report(output, measured, out)


def _report(output: Output, measured: _Measured, out: Path | None) -> None:
    """Write the files, the remarks and the result."""
    evaluation = measured.evaluation
    document = _document(measured)
    files: dict[str, str | None] = {"detections_file": None, "metrics_file": None}
    if out is not None:
        files = _write(out, measured, document)
    for note in evaluation.notes:
        output.note(note)
    if not evaluation.complete:
        output.warn(f"not every object was scored: {_scope(measured)}")
    output.result({**document, **files}, *_renderables(measured))
    if out is not None:
        output.note(f"wrote {' and '.join(path for path in files.values() if path)}")


def _write(out: Path, measured: _Measured, document: dict[str, Any]) -> dict[str, str | None]:
    from refinedet_cli.data.files import write_json
    from refinedet_cli.engine.results import RESULTS_NAME, write_results

    detections_file, metrics_file = out / RESULTS_NAME, out / METRICS_NAME
    write_results(detections_file, measured.evaluation.pictures, measured.predictor.classes, measured.origin)
    write_json(metrics_file, {"schema_version": SCHEMA_VERSION, "command": "eval", **document})
    return {"detections_file": str(detections_file), "metrics_file": str(metrics_file)}


def _document(measured: _Measured) -> dict[str, Any]:
    evaluation, config = measured.evaluation, measured.predictor.config
    ids = dict(zip(config.classes.names, config.classes.category_ids, strict=True))
    return {
        "dataset": {
            "source": measured.source,
            "split": measured.split,
            "name": measured.dataset.name,
            "fingerprint": measured.dataset.fingerprint,
            "pictures": evaluation.result.pictures,
            "objects": evaluation.objects,
            "crowds": _crowds(measured.dataset),
        },
        "origin": asdict(measured.origin),
        "input_size": {"height": config.preprocess.height, "width": config.preprocess.width},
        "postprocess": {"preset": _preset_of(config.postprocess), **asdict(config.postprocess)},
        "device": measured.device,
        "metric": "coco",
        "complete": evaluation.complete,
        "metrics": {name: getattr(evaluation.result, name) for group in _MEANINGS for name in group},
        "classes": [
            {
                "name": name,
                "category_id": ids[name],
                "AP": scored.AP,
                "AP50": scored.AP50,
                "AP75": scored.AP75,
                "AR100": scored.AR100,
                "objects": scored.objects,
                "detections": scored.detections,
            }
            for name, scored in zip(evaluation.scored_classes, evaluation.result.per_class, strict=True)
        ],
        "notes": list(evaluation.notes),
        "seconds": round(evaluation.seconds, 3),
        "pictures_per_second": round(evaluation.pictures_per_second, 2),
    }


def _renderables(measured: _Measured) -> list[RenderableType]:
    evaluation = measured.evaluation
    speed = f"{evaluation.pictures_per_second:.1f} pictures/s"
    blank = Text("")
    return [_setting_table(measured), blank, _summary_table(measured), blank, _class_table(evaluation), Text(speed)]


def _setting_table(measured: _Measured) -> Table:
    config, origin, result = measured.predictor.config, measured.origin, measured.evaluation.result
    post, size = config.postprocess, config.preprocess
    named = _preset_of(post)
    part = f", split {measured.split}" if measured.split else ""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    contents = f"{_count(result.pictures, 'picture')}, {_count(measured.evaluation.objects, 'object')}"
    crowds = _crowds(measured.dataset)
    among = f", {_count(crowds, 'crowd')} among them" if crowds else ""
    table.add_row("Data", f"{measured.source}{part}: {contents}{among}")
    table.add_row("Weights", f"{origin.weights}, preset {origin.preset}, sha256 {origin.sha256[:12]}")
    table.add_row("Input", f"{size.width} x {size.height} px, {origin.precision} on {measured.device}")
    table.add_row(
        "Kept",
        f"{f'preset {named}: ' if named else ''}scores above {post.score_threshold:g}, {post.candidates:,} candidates "
        f"a {post.candidates_per}, NMS at IoU {post.nms_iou:g}, best {post.keep:,} a picture",
    )
    return table


def _summary_table(measured: _Measured) -> Table:
    table = Table(title=_scope(measured), title_justify="left")
    table.add_column("Number", no_wrap=True)
    table.add_column("Value", justify="right", no_wrap=True)
    table.add_column("Meaning")
    for group in _MEANINGS:
        for name, meaning in group.items():
            table.add_row(name, _number(getattr(measured.evaluation.result, name)), meaning)
        table.add_section()
    return table


def _class_table(evaluation: Evaluation) -> Table:
    table = Table(title="Classes", title_justify="left")
    table.add_column("Class", overflow="fold")
    for heading in ("AP", "AP50", "AP75", "AR100", "Objects", "Detections"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, scored in zip(evaluation.scored_classes, evaluation.result.per_class, strict=True):
        numbers = (_number(value) for value in (scored.AP, scored.AP50, scored.AP75, scored.AR100))
        table.add_row(
            name,
            *numbers,
            f"{scored.objects:,}",
            f"{scored.detections:,}",
            style=None if scored.objects else "dim",
        )
    return table


def _scope(measured: _Measured) -> str:
    """What the numbers are of."""
    evaluation = measured.evaluation
    if evaluation.complete:
        return "COCO metric"
    shared, listed = len(evaluation.scored_classes), len(measured.dataset.classes)
    return f"COCO metric over {shared} shared of {listed} classes, not the data set's AP"


def _crowds(dataset: Dataset) -> int:
    return sum(int(record.crowd.sum()) for record in dataset.records)


def _preset_of(postprocess: PostprocessConfig) -> str | None:
    return next((name for name, preset in POSTPROCESS_PRESETS.items() if preset() == postprocess), None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
