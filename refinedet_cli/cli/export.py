"""The command `refinedet export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from refinedet_cli.cli.downloads import on_disk
from refinedet_cli.cli.options import (
    DATA,
    OUTPUT,
    ImagesOpt,
    JsonOpt,
    OfflineOpt,
    PostprocessOpt,
    QuietOpt,
    RootOpt,
    SplitName,
    SplitOpt,
    WeightsOpt,
    out_folder,
    remarks_on_split,
)
from refinedet_cli.cli.output import Output
from refinedet_cli.core.presets import POSTPROCESS_PRESETS
from refinedet_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.data.dataset import Dataset
    from refinedet_cli.engine.export import ExportResult, Stage
    from refinedet_cli.engine.proof import Proof
    from refinedet_cli.engine.sidecar import CheckResult

PROOF = "Proof"


def export(
    format_name: Annotated[
        Literal["onnx", "openvino", "torch-export"],
        typer.Option("--format", help="onnx and openvino run without torch.", rich_help_panel=OUTPUT),
    ] = "onnx",
    out: Annotated[Path | None, out_folder(default="required, unless --check is given")] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"] | None,
        typer.Option(
            "--precision",
            help="Number format of the network; what is around it stays fp32. int8 needs --calibrate.",
            show_default="fp32",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", min=1, metavar="N", help="Pictures computed together.", show_default="1", rich_help_panel=OUTPUT
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Take any number of pictures of one size.", rich_help_panel=OUTPUT)
    ] = False,
    nms: Annotated[
        Literal["inside", "none"],
        typer.Option(
            "--nms",
            help="none leaves non-maximum suppression to the runtime: candidates with one score a class.",
            rich_help_panel=OUTPUT,
        ),
    ] = "inside",
    raw: Annotated[
        bool,
        typer.Option("--raw", help="The bare network, without preprocessing and decoding.", rich_help_panel=OUTPUT),
    ] = False,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    weights: WeightsOpt = None,
    offline: OfflineOpt = False,
    postprocess: PostprocessOpt = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate",
            metavar="SOURCES",
            help="Pictures, or folders of them, from which int8 takes its ranges: some 100 as the detector will see. "
            "Repeatable.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            "--verify",
            metavar="SOURCES",
            help="Pictures, or folders of them, to prove the file on. Repeatable.",
            show_default="three photographs",
            rich_help_panel=PROOF,
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            metavar="DATA",
            help="Annotated pictures to prove the file on: the change of AP counts too. Repeat to join several.",
            show_default=False,
            rich_help_panel=PROOF,
        ),
    ] = None,
    split: SplitOpt = "val",
    images: ImagesOpt = None,
    root: RootOpt = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="FILE",
            help="Write nothing: prove an exported file again with what the .json beside it keeps.",
            show_default=False,
            rich_help_panel=PROOF,
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Open a .pt2 for --check; it can run code, so do so with your own alone.",
            rich_help_panel=PROOF,
        ),
    ] = False,
) -> None:
    """Write a detector as one file for other runtimes, proven to find what the checkpoint finds.

    The file takes pictures as bytes, of any size, and gives boxes in their pixels: resize, decoding and non-maximum
    suppression are inside. It runs on real pictures before it gets its name; if a box or score differs by more than
    tolerated, the exit code is 7 and nothing is left. Beside it, a .json keeps hashes, classes, versions and up to
    three of the pictures, shrunk, with which --check proves it again anywhere. detect, eval and bench take .onnx and
    OpenVINO files as --weights.
    """
    output = Output(json=json, quiet=quiet)
    if check is not None:
        _refuse_with_check({
            "--out": out,
            "--weights": weights,
            "--precision": precision,
            "--batch": batch,
            "--dynamic-batch": dynamic_batch or None,
            "--raw": raw or None,
            "--postprocess": postprocess,
            "--calibrate": calibrate,
            "--verify": verify,
            "--dataset": dataset,
        })  # fmt: skip
        _check(output, check, trusted=trust)
        return
    if out is None:
        raise UsageError("--out is missing", "name a folder, or prove a file with --check FILE")
    content = _content(nms, raw=raw, batch=batch, dynamic_batch=dynamic_batch)

    from refinedet_cli.data.listing import find_images
    from refinedet_cli.engine.export import ExportOptions
    from refinedet_cli.engine.export import export as run
    from refinedet_cli.zoo.hub import resolve_weights

    options = ExportOptions(
        format=format_name,
        precision=precision or "fp32",
        content=content,
        batch=None if dynamic_batch else batch or 1,
        postprocess=None if postprocess is None else POSTPROCESS_PRESETS[postprocess](),
        pictures=find_images(verify) if verify else (),
        dataset=_open(output, dataset, split, images, root),
        calibration=find_images(calibrate) if calibrate else (),
    )
    chosen = resolve_weights(on_disk(output, weights, offline=offline))
    with output.progress("Exporting") as bars:
        task = bars.add_task("", total=None)

        def show(stage: Stage) -> None:
            bars.update(task, description=stage.name, completed=stage.done, total=stage.total)

        result = run(chosen, out, options, show)
    if result.golden:
        pictures = f"{result.golden} of the pictures, shrunk" if result.golden > 1 else "one of the pictures, shrunk"
        output.note(f"{result.files[-1].name} keeps {pictures}, to prove the file again with --check")
    elif result.proof.holds:
        output.warn("none of the pictures could be kept shrunk, so --check will have nothing to prove the file on")
    if (accuracy := result.proof.accuracy) is not None:
        if accuracy.change is None:
            output.warn(f"there is no AP on {accuracy.dataset}: none of its objects can be scored")
        elif not accuracy.complete:
            output.warn(f"not every object of {accuracy.dataset} was scored: the AP is not the data set's")
    output.result(_document(result), *_tables(result))
    _judge(result.proof, "nothing was written")


def _content(
    nms: str, *, raw: bool, batch: int | None, dynamic_batch: bool
) -> Literal["detections", "candidates", "network"]:
    if raw and nms == "none":
        raise UsageError("--raw has no NMS to leave out", "leave --nms out")
    if batch is not None and dynamic_batch:
        raise UsageError("--batch and --dynamic-batch contradict each other", "take one of them")
    if raw:
        return "network"
    return "candidates" if nms == "none" else "detections"


def _refuse_with_check(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} does not go with --check, which uses what the .json keeps", f"leave {option} out"
            )


def _open(
    output: Output, datasets: list[str] | None, split: SplitName, images: Path | None, root: Path | None
) -> Dataset | None:
    if datasets is None:
        return None
    from refinedet_cli.data.source import open_joined

    opened = open_joined(datasets, split=split, images=images, root=root)
    for note in (*remarks_on_split(datasets, split, root), *opened.notes):
        output.note(note)
    return opened


def _check(output: Output, path: Path, *, trusted: bool) -> None:
    from refinedet_cli.engine.sidecar import check

    result = check(path, trusted=trusted)
    for name, then, now in result.made_with:
        output.note(f"written with {name} {then}, proven with {now}")
    output.result(
        _check_document(path, result), _proof_table(result.proof), _verdict(result.proof, f"{path}, {result.engine}")
    )
    _judge(result.proof, f"{path} does not do what it did")


def _judge(proof: Proof, consequence: str) -> None:
    if not proof.holds:
        raise GateError(f"{consequence}: {'; '.join(proof.failures)}", "the result shows what was measured")


def _document(result: ExportResult) -> dict[str, Any]:
    info = result.info
    return {
        "format": info.format,
        "precision": info.precision,
        "content": info.content,
        "batch": info.batch,
        "weights": info.weights,
        "preset": info.config.preset,
        "files": result.files,
        "bytes": sum(path.stat().st_size for path in result.files[:-1]),
        **_proof_document(result.proof),
    }


def _check_document(path: Path, result: CheckResult) -> dict[str, Any]:
    return {
        "file": path,
        "engine": result.engine,
        "precision": result.info.precision,
        "versions_changed": [{"name": n, "then": then, "now": now} for n, then, now in result.made_with],
        **_proof_document(result.proof),
    }


def _proof_document(proof: Proof) -> dict[str, Any]:
    accuracy = proof.accuracy
    return {
        "holds": proof.holds,
        "failures": proof.failures,
        "agreement": proof.agreement,
        "tolerance": proof.tolerance._asdict(),
        "accuracy": None
        if accuracy is None
        else {
            "dataset": accuracy.dataset,
            "AP_checkpoint": accuracy.reference,
            "AP_exported": accuracy.candidate,
            "change": accuracy.change,
            "complete": accuracy.complete,
        },
    }


def _tables(result: ExportResult) -> list[RenderableType]:
    info, proof = result.info, result.proof
    what = {"detections": "pictures to detections", "candidates": "pictures to candidates", "network": "bare network"}
    together = "any number" if info.batch is None else f"{info.batch:,}"
    name = str(result.files[0]) if result.files else info.weights
    table = Table(title="Files", title_justify="left", show_header=False)
    for path in result.files:
        table.add_row(str(path), f"{path.stat().st_size / 1e6:,.1f} MB")
    verdict = _verdict(proof, f"{name}: {info.format} {info.precision}, {what[info.content]}, {together} at a time")
    return [*([table] if result.files else []), _proof_table(proof), verdict]


def _proof_table(proof: Proof) -> Table:
    agreement, tolerance = proof.agreement, proof.tolerance
    table = Table(title="Proof: against the checkpoint in PyTorch, fp32", title_justify="left")
    for heading in ("Measure", "Measured", "Tolerated"):
        table.add_column(heading, justify="left" if heading == "Measure" else "right")
    table.add_row("Pictures", f"{agreement.pictures:,}", "")
    table.add_row(f"Boxes above {tolerance.above:g}, of both", f"{agreement.boxes:,}", "")
    table.add_row(
        f"Without counterpart at IoU {tolerance.iou:g}",
        f"{agreement.unmatched - agreement.ties:,}",
        "0" if not tolerance.unmatched else f"{tolerance.unmatched:.0%}",
    )
    if agreement.ties:
        table.add_row("Decided by rounding alone, at a limit", f"{agreement.ties:,}", "")
    if agreement.least_iou is not None:
        table.add_row("Lowest IoU of a pair", f"{agreement.least_iou:.6f}", f"{tolerance.iou:g}")
        table.add_row("Largest box shift, px", f"{agreement.box_shift:.2g}", "")
        limit = f"{tolerance.score:g}" if tolerance.score < 1 else ""
        table.add_row("Largest score shift", f"{agreement.score_shift:.2g}", limit)
    if proof.accuracy is not None:
        accuracy = proof.accuracy
        what = "AP" if accuracy.complete else "AP of the shared classes"
        table.add_row(f"{what} on {accuracy.dataset}, checkpoint", _number(accuracy.reference, ".4f"), "")
        table.add_row(
            f"{what} on {accuracy.dataset}, exported", _number(accuracy.candidate, ".4f"), f"{-tolerance.ap:+g}"
        )
        table.add_row("Change of AP", _number(accuracy.change, "+.5f"), "")
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _verdict(proof: Proof, what: str) -> Text:
    if proof.holds:
        return Text.assemble(("proven  ", "green"), what)
    return Text.assemble(("not proven  ", "red"), what)
