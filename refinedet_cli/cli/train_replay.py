"""What `refinedet train` says of a step that is not finite: when it happens, and when --replay computes it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from refinedet_cli.cli.output import Output
from refinedet_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.cli.options import DeviceName, PrecisionName
    from refinedet_cli.engine.capture import Replay
    from refinedet_cli.engine.diagnosis import Diagnosis, OutputFact, PartFact

_SHOWN = 8


def replay_step(
    path: Path,
    output: Output,
    *,
    device: DeviceName,
    precision: PrecisionName | None,
    others: Sequence[object],
) -> None:
    """Compute the step of a capture again and show how it went.

    Args:
        path: the capture.
        output: where to.
        device: where to compute.
        precision: of the network; None takes that of the run.
        others: options that have no meaning here, which must not be given.

    Raises:
        UsageError: one of these is given.
        CheckpointError: the file cannot be read.
        GateError: the step is not finite this time either.
    """
    if any(others):
        raise UsageError(
            "--replay takes data and settings from the file", "give it alone, or with --precision and --device"
        )
    from refinedet_cli.engine.capture import load_capture, replay
    from refinedet_cli.engine.device import describe_device, select_device, select_precision

    capture = load_capture(path)
    where = select_device(device)
    chosen = None if precision is None else select_precision(precision, where)
    output.note(
        f"step {capture.step} of a run in {capture.precision} on {capture.device}, with refinedet "
        f"{capture.tool_version} and torch {capture.torch_version}; now {chosen or capture.precision} on "
        f"{describe_device(where)}"
    )
    again = replay(capture, device=where, precision=chosen)
    table = Table(title=f"Step {capture.step}, computed again", show_header=False)
    table.add_column("what")
    table.add_column("figure")
    for what, figure in (*diagnosis_rows(again.diagnosis), *_after_rows(again)):
        table.add_row(what, figure)
    output.result(_document(again), table)
    if not again.finite:
        raise GateError(
            f"step {capture.step} is not finite in {again.diagnosis.precision}", again.diagnosis.cure or None
        )


def diagnosis_lines(diagnosis: Diagnosis) -> str:
    """Lay a diagnosis out in lines under a heading."""
    rows = list(diagnosis_rows(diagnosis))
    width = max(len(what) for what, _ in rows)
    return "\n".join([f"step {diagnosis.step} is not finite", *(f"  {w:{width}}  {figure}" for w, figure in rows)])


def diagnosis_rows(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    """Say what a step tells, from the pictures to the gradients."""
    yield "cause", diagnosis.cause
    yield "step", f"{diagnosis.step:,}, rate {diagnosis.lr:.3g}, {diagnosis.precision}"
    shown = [f"{p.image_id} ({p.file_name}{'' if p.finite else ', not finite'})" for p in diagnosis.pictures[:_SHOWN]]
    more = len(diagnosis.pictures) - len(shown)
    yield "pictures", ", ".join(shown) + (f" and {more} more" if more else "")
    yield "objects", f"{sum(p.objects for p in diagnosis.pictures):,}"
    for output in diagnosis.outputs:
        yield output.name, _output_line(output)
    yield "positives", ", ".join(f"{name} {count:,.0f}" for name, count in diagnosis.positives.items())
    terms = ", ".join(f"{name} {value:.4g}" for name, value in diagnosis.terms.items())
    yield "loss", f"{diagnosis.total:.4g} ({terms})"
    norm = diagnosis.gradient_norm
    yield "gradients", "none" if norm is None else f"norm {norm:.4g}"
    for part in diagnosis.parts:
        yield f"  {part.name}", _part_line(part)


def _output_line(fact: OutputFact) -> str:
    where = "" if fact.stride is None else f" on the level of stride {fact.stride}"
    line = f"at most {fact.largest:.4g}{where}"
    if fact.bad:
        bad_where = "" if fact.bad_stride is None else f", first on the level of stride {fact.bad_stride}"
        line = f"{fact.bad:,} of {fact.values:,} not finite{bad_where}"
        if fact.bad < fact.values:
            line += f"; the rest at most {fact.largest:.4g}{where}"
    if fact.limited:
        line += f"; {fact.limited:,} sizes beyond the limit of decoding"
    return line


def _part_line(part: PartFact) -> str:
    line = "no gradient in this step" if part.gradient_norm is None else f"norm {part.gradient_norm:.4g}"
    if part.bad_gradients:
        line += f", not finite in {len(part.bad_gradients)} of {part.parameters} tensors, first {part.bad_gradients[0]}"
    if part.bad_weights:
        line += f"; weights not finite in {len(part.bad_weights)} tensors, first {part.bad_weights[0]}"
    return line


def _after_rows(again: Replay) -> Iterator[tuple[str, str]]:
    if again.weights_after:
        count = len(again.weights_after)
        yield "weights", f"not finite after the step in {count} tensors, first {again.weights_after[0]}"
    elif again.finite:
        yield "weights", "finite after the step"
    precision, now = again.before[0], again.diagnosis.precision
    if again.finite and precision != now:
        yield "so", f"the rounding of {precision} is to blame: train with --precision {now}"


def _document(again: Replay) -> dict[str, Any]:
    precision, device = again.before
    return {
        "finite": again.finite,
        "diagnosis": again.diagnosis,
        "weights_after": list(again.weights_after),
        "run": {"precision": precision, "device": device},
    }
