"""What `refinedet eval` shows: one document and its tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.core.presets import POSTPROCESS_PRESETS
from refinedet_cli.core.words import counted, pace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from refinedet_cli.core.config import PostprocessConfig
    from refinedet_cli.data.dataset import Dataset
    from refinedet_cli.engine.evaluate import Collected
    from refinedet_cli.engine.predict import AnyPredictor
    from refinedet_cli.engine.reasons import Reasons
    from refinedet_cli.engine.results import Origin, SavedDetections
    from refinedet_cli.metrics.coco import CocoResult
    from refinedet_cli.metrics.intervals import Estimate, Estimates
    from refinedet_cli.metrics.voc import VocResult, VocRules

MetricName = Literal["coco", "voc2007", "voc2012"]

# The twelve numbers in their order, in four groups.
_COCO_MEANINGS = (
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
_TITLES: dict[MetricName, str] = {"coco": "COCO metric", "voc2007": "VOC 2007 metric", "voc2012": "VOC 2012 metric"}
_COCO_CONVENTIONS = {
    "average_precision": "mean precision at 101 recalls",
    "iou": "at least 0.50 to 0.95 in steps of 0.05",
    "detections": "the best 100 of each class in each picture",
    "difficult": "count like all others",
    "crowds": "count neither as found nor as missed",
}
_VOC_AVERAGES = {"11-point": "mean of the best precision at 11 recalls", "area": "area under the monotone curve"}
_VOC_PIXELS = {"inclusive": "xmax - xmin + 1 px wide", "continuous": "xmax - xmin px wide"}
_VOC_OVERLAPS = {"at-least": "at least 0.5", "above": "above 0.5"}


class Detector(NamedTuple):
    """How detections were made: by a detector, here and now."""

    predictor: AnyPredictor
    origin: Origin
    device: str


class Comparison(NamedTuple):
    """Other detections of the same pictures: their file and numbers, and the measured numbers minus theirs."""

    saved: SavedDetections
    other: Estimates
    differences: Estimates


class Measured(NamedTuple):
    """What was measured, and how.

    Attributes:
        source, split: as the user named the data; None where it has no parts.
        dataset: what was read.
        metric: its name.
        rules: of a VOC metric.
        engine: what computed the COCO metric.
        made: the detector, or the file that the detections are from.
        collected: what was found.
        result: the metric's numbers.
        intervals: of the numbers; None where nobody asked.
        comparison: with other detections; None where nobody asked.
        seed: of the drawings behind both.
    """

    source: str
    split: str | None
    dataset: Dataset
    metric: MetricName
    rules: VocRules | None
    engine: str
    made: Detector | SavedDetections
    collected: Collected
    result: CocoResult | VocResult
    intervals: Estimates | None
    comparison: Comparison | None
    seed: int
    notes: tuple[str, ...]


def document_of(measured: Measured) -> dict[str, Any]:
    """Lay out the JSON document, without the names of written files."""
    collected = measured.collected
    speed, seconds = collected.pictures_per_second, collected.seconds
    return {
        "dataset": {
            "source": measured.source,
            "split": measured.split,
            "name": measured.dataset.name,
            "fingerprint": measured.dataset.fingerprint,
            "pictures": measured.result.pictures,
            "objects": collected.objects,
            "crowds": _crowds(measured.dataset),
            "difficult": sum(int(record.difficult.sum()) for record in measured.dataset.records),
        },
        **_origin(measured.made),
        "metric": measured.metric,
        "conventions": _conventions(measured),
        "complete": collected.complete,
        "metrics": _overall(measured),
        "classes": _classes(measured),
        "bootstrap": _bootstrap(measured),
        "comparison": _comparison(measured),
        "notes": list(measured.notes),
        "seconds": None if seconds is None else round(seconds, 3),
        "pictures_per_second": None if speed is None else round(speed, 2),
    }


def reasons_document(reasons: Reasons) -> dict[str, Any]:
    """Lay out what lies behind a score."""
    return {
        "iou": 0.5,
        "findings": list(reasons.findings),
        "errors": [asdict(kind) for kind in reasons.errors.kinds],
        "thresholds": {
            name: None if best is None else best._asdict()
            for name, best in zip(reasons.names, reasons.thresholds, strict=True)
        },
        "confusion": {"classes": ["background", *reasons.names], "objects_by_detections": reasons.confusion.tolist()},
        "calibration": [asdict(part) for part in reasons.calibration],
        "calibration_error": reasons.calibration_error,
        "by_size": [part._asdict() for part in reasons.sizes],
        "by_aspect": [part._asdict() for part in reasons.aspects],
    }


def tables_of(measured: Measured) -> list[RenderableType]:
    """Lay out what a person reads."""
    blank = Text("")
    parts: list[RenderableType] = [_setting_table(measured), blank, _summary_table(measured), blank]
    parts.append(_class_table(measured))
    if measured.comparison is not None:
        parts += [
            blank,
            _comparison_table(measured, measured.comparison),
            Text(_verdict(measured, measured.comparison)),
        ]
    if measured.intervals is not None:
        parts.append(
            Text(
                f"Intervals: bias-corrected, from {measured.intervals.rounds:,} drawings of as many pictures with "
                "repetition; they do not tell how far another training run would move a number."
            )
        )
    return [*parts, *_speed(measured)]


def scope_of(measured: Measured) -> str:
    """Say what the numbers are of."""
    title = _TITLES[measured.metric]
    if measured.collected.complete:
        return title
    shared, listed = len(measured.collected.scored_classes), len(measured.dataset.classes)
    return f"{title} over {shared:,} shared of {counted(listed, 'class', 'classes')}, not the data set's AP"


# The document --------------------------------------------------------------------------------------------------------


def _origin(made: Detector | SavedDetections) -> dict[str, Any]:
    if isinstance(made, Detector):
        config = made.predictor.config
        return {
            "origin": asdict(made.origin),
            "from": None,
            "input_size": {"height": config.preprocess.height, "width": config.preprocess.width},
            "postprocess": {"preset": _preset_of(config.postprocess), **asdict(config.postprocess)},
            "device": made.device,
        }
    return {
        "origin": dict(made.info) or None,
        "from": _file(made),
        "input_size": None,
        "postprocess": None,
        "device": None,
    }


def _file(saved: SavedDetections) -> dict[str, Any]:
    return {"file": str(saved.path), "sha256": saved.sha256, "format": saved.format, "detections": len(saved)}


def _conventions(measured: Measured) -> dict[str, str]:
    rules = measured.rules
    if rules is None:
        return {**_COCO_CONVENTIONS, "engine": measured.engine}
    return {
        "average_precision": f"{rules.average}: {_VOC_AVERAGES[rules.average]}",
        "iou": _VOC_OVERLAPS[rules.overlap],
        "pixels": f"{rules.pixels}: a box from pixel xmin to xmax is {_VOC_PIXELS[rules.pixels]}",
        "detections": "all",
        "difficult": "count neither as found nor as missed",
        "crowds": "count as difficult",
    }


def _named(name: str, metric: MetricName) -> str:
    """The name of a number, never to be taken for that of another metric."""
    return name if metric == "coco" else f"{name}_{metric}"


def _overall(measured: Measured) -> dict[str, float | None]:
    names = [name for group in _COCO_MEANINGS for name in group] if measured.rules is None else ["mAP"]
    return {_named(name, measured.metric): getattr(measured.result, name) for name in names}


def _class_names(measured: Measured) -> tuple[str, ...]:
    """The numbers and counts of each class, as attributes of its result."""
    if measured.rules is None:
        return ("AP", "AP50", "AP75", "AR100", "objects", "detections")
    return ("AP", "objects", "difficult", "detections", "right", "wrong", "passed_over")


def _classes(measured: Measured) -> list[dict[str, Any]]:
    collected = measured.collected
    ids = dict(zip(collected.classes.names, collected.classes.category_ids, strict=True))
    return [
        {
            "name": name,
            "category_id": ids[name],
            **{_named(n, measured.metric) if n == "AP" else n: getattr(scored, n) for n in _class_names(measured)},
        }
        for name, scored in zip(collected.scored_classes, measured.result.per_class, strict=True)
    ]


def _bootstrap(measured: Measured) -> dict[str, Any] | None:
    if measured.intervals is None:
        return None
    return {**_drawings(measured, measured.intervals), **_estimates(measured, measured.intervals, "value")}


def _comparison(measured: Measured) -> dict[str, Any] | None:
    comparison = measured.comparison
    if comparison is None:
        return None
    drawings = _drawings(measured, comparison.differences)
    return {
        **_file(comparison.saved),
        **drawings,
        "direction": "this minus other",
        "other": {_named(e.name, measured.metric): e.value for e in comparison.other.overall},
        **_estimates(measured, comparison.differences, "difference"),
    }


def _drawings(measured: Measured, estimates: Estimates) -> dict[str, Any]:
    from refinedet_cli.metrics.intervals import CONFIDENCE

    return {"rounds": estimates.rounds, "seed": measured.seed, "drawn": "pictures", "confidence": CONFIDENCE}


def _estimates(measured: Measured, estimates: Estimates, name: str) -> dict[str, Any]:
    def plain(numbers: tuple[Estimate, ...]) -> dict[str, Any]:
        return {
            _named(e.name, measured.metric): {
                name: e.value,
                "low": e.low,
                "high": e.high,
                **({"excludes_zero": e.excludes_zero} if name == "difference" else {}),
                "rounds": e.rounds,
            }
            for e in numbers
        }

    return {
        "metrics": plain(estimates.overall),
        "classes": [
            {"name": class_name, **plain(numbers)}
            for class_name, numbers in zip(measured.collected.scored_classes, estimates.per_class, strict=True)
        ],
    }


# The tables ----------------------------------------------------------------------------------------------------------


def _setting_table(measured: Measured) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in settings_of(measured):
        table.add_row(name, value)
    return table


def settings_of(measured: Measured) -> list[tuple[str, str]]:
    """Name what was measured and by which rules, as pairs of name and value."""
    part = f", split {measured.split}" if measured.split else ""
    contents = f"{counted(measured.result.pictures, 'picture')}, {counted(measured.collected.objects, 'object')}"
    crowds = _crowds(measured.dataset)
    among = f", {counted(crowds, 'crowd')} among them" if crowds else ""
    settings = [("Data", f"{measured.source}{part}: {contents}{among}")]
    if isinstance(measured.made, Detector):
        settings += _detector_settings(measured.made)
    else:
        saved, info = measured.made, measured.made.info
        settings.append(("From", f"{saved.path}: {counted(len(saved), 'detection')}, sha256 {saved.sha256[:12]}"))
        if isinstance(info.get("weights"), str):
            told = [f"{key} {info[key]}" for key in ("preset", "precision") if isinstance(info.get(key), str)]
            settings.append(("Weights", ", ".join([info["weights"], *told])))
        settings += _saved_looks(info)
    if measured.rules is None:
        settings.append(("Engine", measured.engine))
    else:
        rules = measured.rules
        settings.append(
            (
                "Rules",
                f"{rules.average} average, found at IoU {_VOC_OVERLAPS[rules.overlap]}, {rules.pixels} pixels "
                f"({_VOC_PIXELS[rules.pixels]})",
            )
        )
    return settings


def _detector_settings(made: Detector) -> list[tuple[str, str]]:
    config, origin = made.predictor.config, made.origin
    post, size = config.postprocess, config.preprocess
    named = _preset_of(post)
    return [
        ("Weights", f"{origin.weights}, preset {origin.preset}, sha256 {origin.sha256[:12]}"),
        ("Input", f"{size.width} x {size.height} px, {origin.precision} on {made.device}"),
        (
            "Kept",
            f"{f'preset {named}: ' if named else ''}scores above {post.score_threshold:g}, {post.candidates:,} "
            f"candidates a {post.candidates_per}, NMS at IoU {post.nms_iou:g}, best {post.keep:,} a picture",
        ),
        *_looks(origin),
    ]


def _looks(origin: Origin) -> list[tuple[str, str]]:
    """Tell how pictures were looked at, where it was not once and as a whole."""
    schedule, tiles = origin.multi_scale, origin.tiles
    settings = []
    if schedule is not None:
        count = counted(schedule.count, "pass", "passes")
        settings.append(("Multi-scale", f"{schedule.name}, {count} a {'picture' if tiles is None else 'tile'}"))
    if tiles is not None:
        whole = ", and the whole picture" if tiles.whole else ""
        settings.append(("Tiles", f"{tiles.size} px that overlap by {tiles.shared} px{whole}"))
    return settings


def _saved_looks(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tell the same of saved detections, as far as their file says it."""
    schedule, tiles = info.get("multi_scale"), info.get("tiles")
    settings = []
    if isinstance(schedule, dict) and isinstance(schedule.get("name"), str):
        settings.append(("Multi-scale", schedule["name"]))
    if isinstance(tiles, dict) and isinstance(tiles.get("size"), int):
        settings.append(("Tiles", f"{tiles['size']} px"))
    return settings


def _speed(measured: Measured) -> list[Text]:
    speed = measured.collected.pictures_per_second
    if speed is None or not isinstance(measured.made, Detector):
        return []
    schedule = measured.made.predictor.schedule
    passes = (
        f", {counted(schedule.count, 'pass', 'passes')} a picture (multi-scale {schedule.name})" if schedule else ""
    )
    return [Text(f"{pace(speed)} pictures/s{passes}")]


def _summary_table(measured: Measured) -> Table:
    table = Table(title=scope_of(measured), title_justify="left")
    table.add_column("Number", no_wrap=True)
    table.add_column("Value", justify="right", no_wrap=True)
    intervals = None
    if measured.intervals is not None:
        table.add_column("95 % interval", no_wrap=True)
        intervals = {_named(e.name, measured.metric): _interval(e) for e in measured.intervals.overall}
    table.add_column("Meaning")
    values = _overall(measured)
    for group in _groups(measured):
        for name, meaning in group.items():
            between = [] if intervals is None else [intervals.get(name, "")]
            table.add_row(name, _number(values[name]), *between, meaning)
        table.add_section()
    return table


def meanings_of(measured: Measured) -> dict[str, str]:
    """Say in a few words what each number of all classes together is."""
    return {name: meaning for group in _groups(measured) for name, meaning in group.items()}


def interval_of(measured: Measured, name: str) -> Estimate | None:
    """Find the interval of a number by its name."""
    overall = () if measured.intervals is None else measured.intervals.overall
    return next((e for e in overall if _named(e.name, measured.metric) == name), None)


def class_numbers(measured: Measured) -> tuple[tuple[str, ...], list[list[float | None]]]:
    """Lay out the numbers of each class: their names, and a row a class."""
    names = [name for name in _class_names(measured) if name not in _HEADINGS]
    rows = [[getattr(scored, name) for name in names] for scored in measured.result.per_class]
    return tuple(_named(name, measured.metric) for name in names), rows


def _groups(measured: Measured) -> tuple[dict[str, str], ...]:
    return _COCO_MEANINGS if measured.rules is None else ({_named("mAP", measured.metric): _VOC_MEANING},)


_VOC_MEANING = "mean AP of the classes at IoU 0.5"
_HEADINGS = {
    "objects": "Objects",
    "detections": "Detections",
    "difficult": "Difficult",
    "right": "Right",
    "wrong": "Wrong",
    "passed_over": "Passed over",
}


def _class_table(measured: Measured) -> Table:
    names = _class_names(measured)
    table = FittedTable("Classes")
    table.add_text("Class")
    sure = {e.name for e in measured.intervals.per_class[0]} if measured.intervals is not None else set()
    for name in names:
        heading = _HEADINGS.get(name) or _named(name, measured.metric)
        table.add_number(heading)
        if name in sure:
            table.add_number("95 % interval", justify="left", beside=True)
    for k, class_name in enumerate(measured.collected.scored_classes):
        scored = measured.result.per_class[k]
        cells = []
        for name in names:
            value = getattr(scored, name)
            cells.append(f"{value:,}" if name in _HEADINGS else _number(value))
            if measured.intervals is not None and name in sure:
                cells += [_interval(e) for e in measured.intervals.per_class[k] if e.name == name]
        table.add_row(class_name, *cells, style=None if scored.objects else "dim")
    return table


def _comparison_table(measured: Measured, comparison: Comparison) -> Table:
    table = FittedTable(f"Compared with {comparison.saved.path}")
    table.add_text("Number")
    table.add_number("This", "Other", "Difference")
    table.add_number("95 % interval", "Excludes 0", justify="left", beside=True)

    def add(of: str, result: object, other: Estimate, difference: Estimate) -> None:
        table.add_row(
            f"{_named(other.name, measured.metric)}{of}",
            _number(getattr(result, other.name)),
            _number(other.value),
            "-" if difference.value is None else f"{difference.value:+.3f}",
            _interval(difference, "+"),
            "yes" if difference.excludes_zero else "no",
        )

    for other, difference in zip(comparison.other.overall, comparison.differences.overall, strict=True):
        add("", measured.result, other, difference)
    table.add_section()
    pairs = zip(comparison.other.per_class, comparison.differences.per_class, strict=True)
    for k, (others, differences) in enumerate(pairs):
        of = f" of {measured.collected.scored_classes[k]}"
        add(of, measured.result.per_class[k], others[0], differences[0])
    return table


def _verdict(measured: Measured, comparison: Comparison) -> str:
    """Say in a sentence what the comparison comes to."""
    main, path = comparison.differences.overall[0], comparison.saved.path
    if main.value is None or main.low is None:
        return "There are no numbers to compare."
    direction = "above" if main.value > 0 else "below"
    relation = f"{abs(main.value):.3f} {direction}" if main.value else "equal to"
    told = "excludes 0" if main.excludes_zero else "does not exclude 0: these pictures do not tell the two apart"
    name, interval = _named(main.name, measured.metric), _interval(main, "+")
    return f"{name} is {relation} that of {path}; the 95 % interval of the difference, {interval}, {told}."


def _interval(estimate: Estimate, sign: Literal["", "+"] = "") -> str:
    if estimate.low is None or estimate.high is None:
        return "-"
    return f"{estimate.low:{sign}.3f} to {estimate.high:{sign}.3f}"


def _crowds(dataset: Dataset) -> int:
    return sum(int(record.crowd.sum()) for record in dataset.records)


def _preset_of(postprocess: PostprocessConfig) -> str | None:
    return next((name for name, preset in POSTPROCESS_PRESETS.items() if preset() == postprocess), None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
