"""`refinedet train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from refinedet_cli.cli.downloads import downloads
from refinedet_cli.cli.options import (
    MODEL,
    OUTPUT,
    RUNTIME,
    BackboneWeightsOpt,
    ConfigOpt,
    DataOpt,
    DeviceOpt,
    ImagesOpt,
    JsonOpt,
    OfflineOpt,
    PrecisionOpt,
    PresetOpt,
    QuietOpt,
    RootOpt,
    SeedOpt,
    SetOpt,
    TrainBatchOpt,
    ValOpt,
    WeightsOpt,
    WorkersOpt,
    out_folder,
    read_batch,
)
from refinedet_cli.cli.output import Output, current_invocation
from refinedet_cli.cli.together import processes, together
from refinedet_cli.cli.train_progress import Reporter, Stop
from refinedet_cli.cli.train_replay import replay_step
from refinedet_cli.cli.train_report import report_run
from refinedet_cli.cli.train_tables import forecast_table, result_document, result_tables
from refinedet_cli.core.words import counted
from refinedet_cli.errors import UsageError

if TYPE_CHECKING:
    from refinedet_cli.engine.anchor_file import AnchorFile
    from refinedet_cli.engine.training_session import TrainingSession


@together
def train(
    data: DataOpt = None,
    out: Annotated[Path | None, out_folder("Folder of the run; only --dry-run and --preview need none.")] = None,
    val: ValOpt = None,
    images: ImagesOpt = None,
    root: RootOpt = None,
    weights: WeightsOpt = None,
    backbone_weights: BackboneWeightsOpt = None,
    offline: OfflineOpt = False,
    preset: PresetOpt = None,
    config: ConfigOpt = None,
    settings: SetOpt = None,
    anchors: Annotated[
        Path | None,
        typer.Option(
            "--anchors",
            metavar="FILE.toml",
            help="Anchors that refinedet anchors wrote; they override those of --config.",
            show_default="those of the config",
            rich_help_panel=MODEL,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=1,
            metavar="N",
            help="Passes over the data.",
            show_default="of the config",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    batch: TrainBatchOpt = None,
    device: DeviceOpt = "auto",
    precision: PrecisionOpt = None,
    workers: WorkersOpt = None,
    seed: SeedOpt = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="Keep all decoded pictures in memory.",
            show_default="if they take at most a quarter of the free memory",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    stop_after: Annotated[
        float,
        typer.Option(
            "--stop-after",
            min=0.0,
            metavar="MINUTES",
            help="Stop cleanly after so long, to go on with --resume.",
            show_default="run to the end",
            rich_help_panel=RUNTIME,
        ),
    ] = 0.0,
    save_every: Annotated[
        float,
        typer.Option(
            "--save-every",
            min=0.0,
            metavar="MINUTES",
            help="Save what --resume needs so often; 0 saves after every step.",
            rich_help_panel=OUTPUT,
        ),
    ] = 5.0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out from where it stopped.", rich_help_panel=OUTPUT),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=OUTPUT),
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(
            "--replay",
            metavar="FILE",
            help="Compute the step again that a run which was not finite left as nonfinite.pt, and say what is wrong "
            "with it; goes with --precision and --device alone.",
            show_default=False,
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Measure a few steps, say what the run would take, and write nothing but the sheet of --preview.",
            rich_help_panel=RUNTIME,
        ),
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            "--preview",
            metavar="FILE.png",
            help="Draw the first training samples on one sheet, as the network will see them, and train nothing.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard",
            help="Write the numbers for TensorBoard too, into the folder tensorboard of --out; needs "
            'pip install "refinedet\\[tensorboard]".',
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Train a detector on your own pictures.

    It starts from the bundled detector unless told otherwise, so that a few hundred pictures and no network are enough.
    A run file given with --config may name data, start and settings; examples/recipes holds those of the paper.
    The folder receives best.safetensors and last.safetensors for detect, eval and export, the resolved config.json,
    log.csv, metrics.csv, what --resume needs, and run.html, a page that explains the run while it goes on and after.
    At the end, val holds the report of eval on the best weights and the validation data.

    Processes on one machine or several train together when torchrun starts them: torchrun --nproc-per-node 4
    --no-python refinedet train ... The steps are those of one process, --batch the pictures of all together; a run goes
    on with --resume in any number of processes. --set train.accumulate=4 runs each step in four parts, for less memory.
    """
    from refinedet_cli.engine import training_session
    from refinedet_cli.engine.anchor_file import read_anchor_file
    from refinedet_cli.engine.preview import check_name

    if replay is not None:
        others = (
            *(data, val, images, root, weights, backbone_weights, preset, config, settings, anchors, epochs, batch),
            *(workers, seed, cache, stop_after, resume, overwrite, dry_run, preview, tensorboard, out),
        )
        replay_step(replay, Output(json=json, quiet=quiet), device=device, precision=precision, others=others)
        return
    if out is None and not dry_run and preview is None:
        raise UsageError("--out is missing", "name a folder for the run; only --dry-run and --preview need none")
    if preview is not None:
        check_name(preview)
    output = Output(json=json, quiet=quiet)
    pictures = read_batch(batch)
    if pictures == "auto" and not resume:
        output.note("--batch auto: trying out batches")
    # Epochs asked for by name take the place of steps that a run file asks for.
    overrides = {
        "epochs": epochs,
        "steps": epochs and 0,
        "batch": None if pictures == "auto" else pictures,
        "precision": precision,
        "seed": seed,
    }
    fitted = None if anchors is None else read_anchor_file(anchors)
    with downloads(output, offline=offline):
        session = training_session.prepare(
            data=data or [],
            val=val or [],
            images=images,
            root=root,
            # A sheet is no run: there may be one in the folder.
            out=None if preview and not resume else out,
            weights=weights,
            backbone_weights=backbone_weights,
            preset=preset,
            config=config,
            settings=[
                *(fitted.settings if fitted else []),
                *(settings or []),
                *(f"train.{k}={v}" for k, v in overrides.items() if v is not None),
            ],
            device=device,
            workers=workers,
            cache=cache,
            resume=resume,
            overwrite=overwrite,
            save_seconds=save_every * 60,
            find_batch=pictures == "auto",
            processes=processes(),
            command=("refinedet", *current_invocation().arguments),
            tensorboard=tensorboard,
        )
    for note in session.notes:
        output.note(note)
    _report_data(output, session, fitted)
    if out is None or dry_run or preview is not None:
        _look(output, session, preview, forecast=dry_run or preview is None)
        return
    _run(output, session, out, stop_after)


def _look(output: Output, session: TrainingSession, preview: Path | None, *, forecast: bool) -> None:
    """Draw the first samples, say what the run would take, or both."""
    document: dict[str, Any] = {}
    shown: list[RenderableType] = []
    if preview is not None:
        sheet = session.preview(preview)
        document["preview"] = {"file": preview, "samples": sheet.samples}
        shown.append(f"{preview}: {counted(len(sheet.samples), 'sample')}")
    if forecast:
        output.note("measuring a few steps")
        document["dry_run"] = session.forecast()
        shown.append(forecast_table(document["dry_run"], drawn=preview is not None))
    output.result({**document, "config": session.settings}, *shown)


def _run(output: Output, session: TrainingSession, out: Path, stop_after: float) -> None:
    """Train, and tell how it ended."""
    with output.progress("train") as bars, Stop(stop_after * 60) as stop:
        result = session.run(Reporter(output, bars), stop.wanted, stop.was_interrupted)
    if processes().any(stop.interrupted) and not result.finished:
        if result.steps:
            output.note(f"stopped after step {result.steps:,}; go on with the same command and --resume")
        else:
            output.note("stopped before the first step; there is nothing to resume")
        raise KeyboardInterrupt
    report = report_run(output, session, result) if result.finished and processes().first else None
    output.result(result_document(result, out, report, session.settings), *result_tables(result, out, report))


def _report_data(output: Output, session: TrainingSession, fitted: AnchorFile | None) -> None:
    from refinedet_cli.engine.data_check import check_training

    for severity, line in check_training(session.data, session.validation, session.preset.detector):
        if severity == "note":
            output.note(f"data: {line}")
        else:
            output.warn(line)
    mismatch = fitted and fitted.mismatch(session.preset.detector)
    if mismatch:
        output.warn(mismatch)
