"""What `refinedet train` leaves at the end of a run: the report of `refinedet eval` on the best weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from refinedet_cli.cli.eval_files import METRICS_NAME, SEED, WORKERS, write_files, write_page
from refinedet_cli.cli.eval_tables import Detector, Measured
from refinedet_cli.cli.output import Output
from refinedet_cli.errors import RefineDetError

if TYPE_CHECKING:
    from refinedet_cli.data.dataset import Dataset
    from refinedet_cli.engine.evaluate import Evaluation, EvaluationProgress
    from refinedet_cli.engine.predict import Predictor
    from refinedet_cli.engine.train import TrainResult
    from refinedet_cli.engine.training_session import TrainingSession


def report_run(output: Output, session: TrainingSession, result: TrainResult) -> Path | None:
    """Write the report of the best weights on the validation data into the folder of a run, and its page anew.

    A report of the same weights and data that is there stays. That it cannot be written is a warning: the run is done.

    Returns:
        the report; None where nothing was validated, or it could not be written.
    """
    from refinedet_cli.engine.run_page import write_run_page

    try:
        report = _report(output, session, result)
        if report is not None:
            write_run_page(session.options.out)
    except RefineDetError as error:
        output.warn(f"the report on the validation data is not written: {error.message}")
        return None
    return report


def _report(output: Output, session: TrainingSession, result: TrainResult) -> Path | None:
    from refinedet_cli.engine.device import describe_device
    from refinedet_cli.engine.lanes import lanes_for
    from refinedet_cli.engine.predict import Predictor
    from refinedet_cli.engine.results import origin_of
    from refinedet_cli.engine.run_record import BEST_FILE, VALIDATION_FOLDER, VALIDATION_REPORT
    from refinedet_cli.files import remove_leftovers
    from refinedet_cli.zoo.checkpoint import file_sha256, load_detector

    options, validation = session.options, session.validation
    best = options.out / BEST_FILE
    if validation is None or not best.is_file():
        return None
    folder = options.out / VALIDATION_FOLDER
    report = folder / VALIDATION_REPORT
    if report.is_file() and _is_of(folder / METRICS_NAME, file_sha256(best), validation):
        return report
    if folder.is_dir():
        remove_leftovers(folder)
    lanes = lanes_for(options.device)
    predictor = Predictor(load_detector(best), device=options.device, precision=options.precision, lanes=lanes)
    evaluation = result.best_evaluation or _evaluate(output, session, predictor, validation)
    origin = origin_of(predictor, score_threshold=predictor.config.postprocess.score_threshold)
    measured = _measured(Detector(predictor, origin, describe_device(options.device)), validation, evaluation)
    reasons = write_page(output, measured, report)
    write_files(folder, measured, reasons)
    return report


def _evaluate(output: Output, session: TrainingSession, predictor: Predictor, validation: Dataset) -> Evaluation:
    """Score weights whose evaluation was that of an earlier start of the run."""
    from refinedet_cli.engine.evaluate import evaluate
    from refinedet_cli.engine.predict import default_batch

    with output.progress("Evaluating") as bars:
        task = bars.add_task("", total=len(validation))

        def show(progress: EvaluationProgress) -> None:
            bars.update(task, completed=progress.done)

        batch = default_batch(session.options.device)
        return evaluate(predictor, validation, batch=batch, workers=WORKERS, on_progress=show)


def _measured(made: Detector, validation: Dataset, evaluation: Evaluation) -> Measured:
    from refinedet_cli.engine.evaluate import PYCOCOTOOLS

    return Measured(
        source=validation.name,
        split=None,
        dataset=validation,
        metric="coco",
        rules=None,
        engine=PYCOCOTOOLS.description,
        made=made,
        collected=evaluation,
        result=evaluation.result,
        intervals=None,
        comparison=None,
        seed=SEED,
        notes=evaluation.notes,
    )


def _is_of(metrics: Path, sha256: str, validation: Dataset) -> bool:
    """Tell whether a metrics.json is of these weights and data."""
    try:
        document = json.loads(metrics.read_text(encoding="utf-8"))
        made_by, measured_on = document["origin"]["sha256"], document["dataset"]["fingerprint"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False
    return bool(made_by == sha256 and measured_on == validation.fingerprint)
