"""The files of an evaluation, which `refinedet eval` writes, and `refinedet train` at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from refinedet_cli.cli.eval_page import page_of
from refinedet_cli.cli.eval_tables import Detector, Measured, document_of, reasons_document
from refinedet_cli.cli.output import SCHEMA_VERSION, Output

if TYPE_CHECKING:
    from refinedet_cli.engine.reasons import Reasons

METRICS_NAME = "metrics.json"
# Of what a report draws at random, and threads that read its pictures.
SEED = 0
WORKERS = 4
# Pictures on which a report looks at the anchors before and after they move.
_REFINEMENT_PICTURES = 200


class Written(NamedTuple):
    """Files that were written; no detections where saved ones were scored."""

    detections: Path | None
    metrics: Path


def full_document(measured: Measured, reasons: Reasons | None) -> dict[str, Any]:
    """Lay out the JSON document, with what lies behind the score where that was looked for."""
    return {**document_of(measured), "reasons": None if reasons is None else reasons_document(reasons)}


def require_files(out: Path | None, page: Path | None, *, detects: bool) -> None:
    """Make sure, before the work, that what an evaluation writes can be written.

    Args:
        out: folder for `write_files`.
        page: for `write_page`.
        detects: whether there will be detections to write.

    Raises:
        DataError: names the file that cannot.
    """
    from refinedet_cli.data.files import require_writable
    from refinedet_cli.engine.results import RESULTS_NAME

    names = (METRICS_NAME, *((RESULTS_NAME,) if detects else ()))
    require_writable(*(() if out is None else (out / name for name in names)), *(() if page is None else (page,)))


def write_files(out: Path, measured: Measured, reasons: Reasons | None) -> Written:
    """Write metrics.json and, of a detector, detections.json.

    Raises:
        DataError: a file cannot be written.
    """
    from refinedet_cli.data.files import write_json
    from refinedet_cli.engine.results import RESULTS_NAME, write_results

    detections, metrics = out / RESULTS_NAME, out / METRICS_NAME
    made, collected = measured.made, measured.collected
    is_new = isinstance(made, Detector)
    if isinstance(made, Detector):
        write_results(detections, collected.pictures, collected.classes, made.origin)
    document = full_document(measured, reasons)
    write_json(metrics, {"schema_version": SCHEMA_VERSION, "command": "eval", **document})
    return Written(detections if is_new else None, metrics)


def write_page(output: Output, measured: Measured, path: Path) -> Reasons:
    """Write the page that explains a score, and tell what lies behind it.

    Raises:
        DataError: a picture cannot be read, or the file not be written.
    """
    from refinedet_cli.engine.predict import Predictor, default_batch
    from refinedet_cli.engine.report import write_report

    with output.progress("Explaining") as bars:
        task = bars.add_task("", total=None)
        refinement = None
        made = measured.made
        predictor = made.predictor if isinstance(made, Detector) else None
        # An exported file gives detections alone, not what its network made of the anchors.
        if (
            isinstance(predictor, Predictor)
            and predictor.loaded.detector.steps is not None
            and measured.dataset.objects
        ):
            from refinedet_cli.engine.anchor_refinement import measure_refinement

            refinement = measure_refinement(
                predictor.loaded,
                measured.dataset,
                pictures=_REFINEMENT_PICTURES,
                seed=SEED,
                device=predictor.device,
                batch=default_batch(predictor.device),
                workers=WORKERS,
                on_progress=lambda done, total: bars.update(task, completed=done, total=total),
            )
        page = page_of(measured, refinement)
        write_report(path, page)
    return page.reasons
