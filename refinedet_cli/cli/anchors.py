"""The command `refinedet anchors`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.downloads import on_disk
from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    RUNTIME,
    BatchOpt,
    ConfigOpt,
    DatasetOpt,
    DeviceOpt,
    ImagesOpt,
    JsonOpt,
    OfflineOpt,
    PresetOpt,
    QuietOpt,
    RootOpt,
    SeedOpt,
    SetOpt,
    WorkersOpt,
    out_folder,
    refuse_file,
)
from refinedet_cli.cli.output import SCHEMA_VERSION, Output
from refinedet_cli.core.words import counted
from refinedet_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.engine.anchor_refinement import Refinement
    from refinedet_cli.engine.anchor_study import Look, Search, Study, StudyProgress
    from refinedet_cli.engine.anchors import AnchorReport, Group, LevelUse

_DEFAULT_WORKERS = 4
# Where --visualize draws without --out.
_DRAWN = "anchors"
_CLASSES_SHOWN = 12


def anchors(
    dataset: DatasetOpt,
    images: ImagesOpt = None,
    root: RootOpt = None,
    min_recall: Annotated[
        float | None,
        typer.Option(
            "--min-recall",
            min=0.0,
            max=1.0,
            help="Exit with code 7 if a smaller share of the objects reaches IoU 0.5 with an anchor.",
            show_default="no limit",
            rich_help_panel=DATA,
        ),
    ] = None,
    out: Annotated[Path | None, out_folder(default=f"nothing is written, or {_DRAWN}/ with --visualize")] = None,
    visualize: Annotated[
        bool,
        typer.Option(
            "--visualize",
            help="Draw charts and pictures, and one page of them, into --out.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="NAME|FILE|ORG/REPO",
            help="Measure too what this detector makes of its anchors; it decides anchors and input size.",
            show_default="anchors alone, without a network",
            rich_help_panel=MODEL,
        ),
    ] = None,
    offline: OfflineOpt = False,
    preset: PresetOpt = None,
    config: ConfigOpt = None,
    settings: SetOpt = None,
    search: Annotated[
        bool,
        typer.Option("--search/--no-search", help="Look for better anchors.", rich_help_panel=MODEL),
    ] = True,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            min=1,
            metavar="N",
            help="The most anchors of a picture that the search may use.",
            show_default="as many as now",
            rich_help_panel=MODEL,
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            "--pictures", min=1, metavar="N", help="Pictures that --weights looks at.", rich_help_panel=RUNTIME
        ),
    ] = 200,
    device: DeviceOpt = "auto",
    batch: BatchOpt = None,
    workers: WorkersOpt = None,
    seed: SeedOpt = None,
) -> None:
    """See how well anchors cover the objects of your data, and find better ones.

    Objects and anchors are matched exactly as in training. It takes boxes alone; pictures are opened for --weights and
    --visualize, and where some must be held out. The train part is looked at; DATA:PART names another, and several
    --dataset are joined. The search fits shapes to it, with no more anchors than now, and proposes them only if they
    win on pictures it has not seen: the val part, or 15 % held out. With --out, that folder gets anchors.toml for train
    --anchors, and the report as anchors.json.
    """
    output = Output(json=json, quiet=quiet)
    if visualize and out is None:
        out = Path(_DRAWN)
    _check(out, weights, preset, config, settings)

    from refinedet_cli.engine.anchor_study import StudyOptions, study_anchors

    if out is not None:
        from refinedet_cli.data.files import require_writable
        from refinedet_cli.engine.anchor_page import REPORT_NAME

        require_writable(out / REPORT_NAME)
    source = " + ".join(dataset)
    options = StudyOptions(
        datasets=dataset,
        images=images,
        root=root,
        weights=on_disk(output, weights, offline=offline),
        preset=preset,
        config=config,
        settings=settings or (),
        search=search,
        budget=budget,
        pictures=pictures,
        device=device,
        batch=batch,
        workers=_DEFAULT_WORKERS if workers is None else workers,
        seed=seed,
    )
    with output.progress("Anchors:") as bars:
        task = bars.add_task("", total=None)

        def show(progress: StudyProgress) -> None:
            bars.update(task, description=progress.doing, completed=progress.done, total=progress.total)

        study = study_anchors(options, show)
        for note in study.notes:
            output.note(note)
        written = [] if out is None else _write(out, study, output, show, source, visualize=visualize)
    output.result({**_document(study, source), "files": written}, *_renderables(study, source))
    if out is not None:
        output.note(f"wrote {_listed(written)}")
    if min_recall is not None and study.report.share < min_recall:
        raise GateError(
            f"{_percent(study.report.share)} of the objects reach IoU 0.5, less than --min-recall {min_recall:g}",
            "train with other anchors or a larger input: the report says which",
        )


def _check(
    out: Path | None,
    weights: str | None,
    preset: str | None,
    config: Path | None,
    settings: Sequence[str] | None,
) -> None:
    refuse_file(out)
    named = {"--preset": preset, "--config": config, "--set": settings}
    given = [option for option, value in named.items() if value]
    if weights is not None and given:
        raise UsageError(
            f"{given[0]} and --weights exclude each other: a trained network has its anchors and input size",
            "leave one of them out",
        )


def _write(out: Path, study: Study, output: Output, show: Any, source: str, *, visualize: bool) -> list[str]:
    from refinedet_cli.data.files import write_json
    from refinedet_cli.engine.anchor_page import REPORT_NAME, write_anchors, write_gallery
    from refinedet_cli.engine.anchor_study import StudyProgress

    written = [out / REPORT_NAME]
    write_json(written[0], {"schema_version": SCHEMA_VERSION, "command": "anchors", **_document(study, source)})
    if study.search is not None:
        written.append(write_anchors(out, study))
    if visualize:
        files, drawn = write_gallery(out, study, lambda doing: show(StudyProgress(doing)))
        written += files
        if not drawn:
            output.warn("no picture of the data is on disk, so none is drawn")
    return [str(path) for path in written]


def _listed(paths: Sequence[str]) -> str:
    first = " and ".join(paths[:3]) if len(paths) < 4 else f"{', '.join(paths[:3])}"
    return first if len(paths) < 4 else f"{first} and {counted(len(paths) - 3, 'picture')} beside them"


# The document --------------------------------------------------------------------------------------------------------


def _document(study: Study, source: str) -> dict[str, Any]:
    config = study.detector
    return {
        "dataset": {
            "source": source,
            "name": study.dataset.name,
            "pictures": len(study.dataset),
            "objects": len(study.objects),
            "crowds": study.objects.crowds,
        },
        "preset": config.preset,
        "weights": None if study.weights is None else str(study.weights),
        "input_size": {"height": config.preprocess.height, "width": config.preprocess.width},
        "seed": study.seed,
        "verdict": list(study.verdict),
        "recall": study.report.share,
        "coverage": _coverage(study.report),
        "refinement": _refinement(study.refinement),
        "search": _search(study.search),
        "looks": [look._asdict() for look in study.looks],
        "notes": list(study.notes),
    }


def _coverage(report: AnchorReport) -> dict[str, Any]:
    return {
        "overall": _group(report.overall),
        "levels": [
            {
                **_group(group),
                "stride": level.stride,
                "shapes": [[round(w, 4), round(h, 4)] for w, h in level.shapes],
                "anchors": level.anchors,
                "matched_times": list(level.positives),
                "receptive_field": level.receptive_field,
            }
            for level, group in zip(report.levels, report.by_level, strict=True)
        ],
        "by_area": [_group(group) for group in report.by_area],
        "by_side": [_group(group) for group in report.by_side],
        "by_ratio": [_group(group) for group in report.by_ratio],
        "by_class": [_group(group) for group in report.by_class],
        "shortfall": {**report.shortfall._asdict(), "total": report.shortfall.total},
        "anchors": report.total,
        "multiply_adds": report.multiply_adds,
    }


def _group(group: Group) -> dict[str, Any]:
    shares: tuple[float | None, ...] = (*group.shares, group.forced, group.unmatched, group.positives)
    if not group.objects:
        shares = (None,) * len(shares)
    names = ("iou_30", "iou_50", "iou_70", "only_forced", "unmatched", "anchors_each")
    return {"name": group.name, "objects": group.objects, **dict(zip(names, shares, strict=True))}


def _refinement(refinement: Refinement | None) -> dict[str, Any] | None:
    if refinement is None:
        return None
    return {
        "pictures": len(refinement.dataset),
        "pictures_with_objects": refinement.of,
        "objects": len(refinement.objects),
        "steps": [
            {
                "name": step.name,
                "iou_50": step.share(0.5),
                "iou_75": step.share(0.75),
                "iou_90": step.share(0.9),
                "mean_iou": float(step.best_iou.mean()),
                "anchors_each": None if step.positives is None else float(step.positives.mean()),
            }
            for step in refinement.steps
        ],
    }


def _search(search: Search | None) -> dict[str, Any] | None:
    if search is None:
        return None
    proposal = search.proposal
    return {
        "accepted": proposal.accepted,
        "held_out": search.how,
        "gain": proposal.gain._asdict(),
        "held_out_before": proposal.held_out_before._asdict(),
        "held_out_after": proposal.held_out_after._asdict(),
        "train_before": proposal.train_before._asdict(),
        "train_after": proposal.train_after._asdict(),
        "anchors_before": proposal.anchors_before,
        "anchors_after": proposal.anchors_after,
        "multiply_adds_factor": search.multiply_adds,
        "strides": proposal.found.strides,
        "shapes": proposal.found.shapes,
        "evaluations": proposal.evaluations,
        "coverage": _coverage(search.found),
    }


# What is shown -------------------------------------------------------------------------------------------------------


def _renderables(study: Study, source: str) -> Iterator[RenderableType]:
    yield _setting_table(study, source)
    for line in study.verdict:
        yield Text("")
        yield Text(line, style="bold")
    yield Text("")
    yield _coverage_table(study.report)
    yield Text("")
    levels = _level_table("Levels", study.report.levels)
    levels.caption = (
        "Best for: objects that overlap no other level more. Matched: times an anchor is given to an object. "
        "Sees: receptive field of the head that judges the anchors, from the layers alone."
    )
    levels.caption_justify = "left"
    yield levels
    if sum(1 for group in study.report.by_class if group.objects) > 1:
        yield Text("")
        yield _class_table(study.report.by_class)
    if study.refinement is not None:
        yield Text("")
        yield _refinement_table(study.refinement)
    if study.search is not None:
        yield Text("")
        yield _search_table(study.search)
        yield Text("")
        title = "Proposed anchors" if study.search.proposal.accepted else "Best anchors found, not proposed"
        yield _level_table(title, study.search.found.levels)
    yield Text("")
    yield _look_table(study.looks)


def _setting_table(study: Study, source: str) -> Table:
    report = study.report
    height, width = report.input_size
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "Data", f"{source}: {counted(len(study.dataset), 'picture')}, {counted(len(study.objects), 'object')}"
    )
    made_for = f"weights {study.weights.name}" if study.weights else f"preset {study.detector.preset}"
    table.add_row("Anchors", f"{report.total:,} a picture, of {made_for}")
    table.add_row("Input", f"{width} x {height} px, {report.multiply_adds / 1e9:.2f} billion multiply-adds a picture")
    if study.search is not None:
        held_out = study.search.proposal.held_out_before.objects
        table.add_row("Held out", f"{counted(held_out, 'object')}, {study.search.how}")
    return table


def _table(title: str, first: str, headings: Iterable[str]) -> Table:
    table = FittedTable(title)
    table.add_text(first)
    table.add_number(*headings)
    return table


def _coverage_table(report: AnchorReport) -> Table:
    table = _table("Coverage", "Objects", ("Number", "IoU 0.3", "IoU 0.5", "IoU 0.7", "Forced", "Anchors"))
    table.add_row(*_group_cells(report.overall))
    sections = (
        ("Size in the picture", report.by_area),
        ("Size at the input", report.by_side),
        ("Width : height", report.by_ratio),
    )
    for title, groups in sections:
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for group in groups:
            if group.objects:
                table.add_row(*_group_cells(group._replace(name=f"  {group.name}")))
    table.caption = "Forced: objects with a single anchor, below IoU 0.5. Anchors: that learn from an object."
    table.caption_justify = "left"
    return table


def _class_table(groups: Sequence[Group]) -> Table:
    known = sorted((group for group in groups if group.objects), key=lambda group: group.shares[1])
    shown = known[:_CLASSES_SHOWN]
    title = "Classes" if len(shown) == len(known) else f"The {len(shown)} worst of {len(known)} classes"
    table = _table(title, "Class", ("Number", "IoU 0.3", "IoU 0.5", "IoU 0.7", "Forced", "Anchors"))
    for group in shown:
        table.add_row(*_group_cells(group))
    return table


def _group_cells(group: Group) -> tuple[str, ...]:
    shares = (_percent(share) for share in (*group.shares, group.forced))
    return (group.name, f"{group.objects:,}", *shares, f"{group.positives:.1f}")


def _level_table(title: str, levels: Sequence[LevelUse]) -> Table:
    from refinedet_cli.engine.anchors import shape_text

    table = FittedTable(title, names=2)
    table.add_number("Stride")
    table.add_text("Shapes, px of the input")
    table.add_number("Anchors", "Best for", "Matched", "Sees")
    for level in levels:
        table.add_row(
            str(level.stride),
            ", ".join(shape_text(shape) for shape in level.shapes),
            f"{level.anchors:,}",
            f"{level.best:,}",
            f"{sum(level.positives):,}",
            "-" if level.receptive_field is None else f"{level.receptive_field} px",
        )
    return table


def _refinement_table(refinement: Refinement) -> Table:
    what = "Refinement" if refinement.refines else "Anchors moved"
    table = _table(
        f"{what}, on {counted(len(refinement.dataset), 'picture')} with {counted(len(refinement.objects), 'object')}",
        "Best box of each object",
        ("IoU 0.5", "IoU 0.75", "IoU 0.9", "Mean IoU", "Anchors"),
    )
    for step in refinement.steps:
        table.add_row(
            step.name,
            *(_percent(step.share(iou)) for iou in (0.5, 0.75, 0.9)),
            f"{step.best_iou.mean():.3f}",
            "-" if step.positives is None else f"{step.positives.mean():.1f}",
        )
    return table


def _search_table(search: Search) -> Table:
    proposal = search.proposal
    title = "Now and proposed" if proposal.accepted else "Now and the best found"
    table = _table(title, "Share that reaches IoU 0.5", ("Now", "Proposed" if proposal.accepted else "Found", "Gain"))
    before, after = proposal.held_out_before, proposal.held_out_after
    rows = (
        ("held-out objects", before.matched, after.matched),
        ("  worst quarter of the classes", before.tail, after.tail),
        ("  smallest fifth of the objects", before.smallest, after.smallest),
        ("objects searched on", proposal.train_before.matched, proposal.train_after.matched),
    )
    for name, old, new in rows:
        table.add_row(name, _percent(old), _percent(new), f"{100 * (new - old):+.1f}")
    table.add_section()
    change = proposal.anchors_after - proposal.anchors_before
    table.add_row("anchors a picture", f"{proposal.anchors_before:,}", f"{proposal.anchors_after:,}", f"{change:+,}")
    extra = 100 * (search.multiply_adds - 1)
    table.add_row("multiply-adds of the network", "1.00 x", f"{search.multiply_adds:.2f} x", f"{extra:+.1f} %")
    return table


def _look_table(looks: Sequence[Look]) -> Table:
    searched = looks[0].found is not None
    table = _table(
        "Share that reaches IoU 0.5 where pictures are shown to the network in another way",
        "Shown as",
        ("Cost", "Now", *(("Found",) if searched else ())),
    )
    for look in looks:
        found = () if look.found is None else (_percent(look.found),)
        table.add_row(look.name, f"{look.cost:.2f} x", _percent(look.now), *found)
    return table


def _percent(share: float) -> str:
    from refinedet_cli.engine.anchors import percent

    return percent(share)
