"""What a training run would do and cost, from a few real steps, before anything is written."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from refinedet_cli.core.config import TrainConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.loading import Plan, TrainingSet, collate
from refinedet_cli.engine.evaluate import evaluate
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.recipe import fewest_frozen, make_plan, milestone_steps
from refinedet_cli.engine.train import Rehearsal, RunOptions, rehearse
from refinedet_cli.zoo.checkpoint import LoadedDetector

WARM_UP = 2
MEASURED = 5
# Once the steps so far have taken this long, what has been measured has to do.
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A run as it would go.

    Attributes:
        pictures, objects, classes: of the training data.
        validation_pictures: None where nothing is validated.
        batch, steps, epochs: of the run; the last steps may end within an epoch.
        milestones: steps after which the rate drops.
        lr: of the heads, before any drop.
        input_size: height and width, px-in.
        parameters, trainable: numbers of the network; what is freed in the course of the run is trainable.
        measured_steps: how many steps the times are of.
        step_seconds: of one step at full input size, with the fewest stages frozen: reading pictures, forward, backward
            and optimiser.
        loading_seconds: of making one batch in a single process, part of which workers take off the step.
        training_hours: of all steps; those on smaller input count by their area.
        evaluations: how often the validation pictures are scored.
        evaluation_hours: of all of them; None where nothing is validated.
        memory_bytes: the most that was in use at once; None where the system does not tell.
        memory_of: what that is the memory of.
        checkpoint_bytes, state_bytes: on disk, of each weights file and of the resume state.
    """

    pictures: int
    objects: int
    classes: int
    validation_pictures: int | None
    batch: int
    steps: int
    epochs: float
    milestones: tuple[int, ...]
    lr: float
    input_size: tuple[int, int]
    parameters: int
    trainable: int
    measured_steps: int
    step_seconds: float
    loading_seconds: float
    training_hours: float
    evaluations: int
    evaluation_hours: float | None
    memory_bytes: int | None
    memory_of: str
    checkpoint_bytes: int
    state_bytes: int


def forecast(
    detector: Detector, data: Dataset, validation: Dataset | None, config: TrainConfig, options: RunOptions
) -> Forecast:
    """Measure a few steps of a run, and part of an evaluation, and say what the whole would take.

    Args:
        detector: ready to train; left as it is.
        data: training pictures.
        validation: pictures to evaluate on.
        config: the recipe.
        options: where and how to run; nothing is written to ``out``.

    Raises:
        GateError: the loss is not finite.
        DataError: a picture cannot be read.
    """
    preprocess = detector.config.preprocess
    plan = make_plan(len(data.records), preprocess, config)
    few = replace(
        config,
        small_input=(),
        steps=min(plan.steps, WARM_UP + MEASURED),
        # What is frozen at first is trained in the end, and costs most then.
        freeze_stages=fewest_frozen(config),
        unfreeze=(),
    )
    excerpt = _excerpt(data, few, detector)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(options.device)
    loading = _loading_seconds(excerpt, few, detector, cached=options.cache)
    rehearsed = replace(detector, network=copy.deepcopy(detector.network))
    rehearsal = rehearse(rehearsed, excerpt, few, options, _is_enough)
    measured, step_seconds = _step_seconds(rehearsal, loading, options.workers)
    evaluations = 0 if validation is None else _evaluations(config, plan)
    evaluation_hours = None
    if validation is not None:
        seconds = _evaluation_seconds(rehearsed, validation, config, options)
        evaluation_hours = evaluations * seconds / 3600
    parameters = list(rehearsed.network.parameters())
    memory, memory_of = _memory(options)
    return Forecast(
        pictures=len(data.records),
        objects=data.objects,
        classes=len(data.classes),
        validation_pictures=None if validation is None else len(validation.records),
        batch=plan.batch,
        steps=plan.steps,
        epochs=plan.epochs,
        milestones=milestone_steps(config, plan.steps),
        lr=config.lr,
        input_size=(preprocess.height, preprocess.width),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        measured_steps=measured,
        step_seconds=step_seconds,
        loading_seconds=loading,
        training_hours=plan.steps * _mean_area(plan) * step_seconds / 3600,
        evaluations=evaluations,
        evaluation_hours=evaluation_hours,
        memory_bytes=memory,
        memory_of=memory_of,
        checkpoint_bytes=rehearsal.weights_bytes,
        state_bytes=rehearsal.state_bytes,
    )


def _is_enough(seconds: Sequence[float]) -> bool:
    # One step is never enough: it holds the start of the workers.
    return len(seconds) > 1 and sum(seconds) > PATIENCE_SECONDS


def _excerpt(data: Dataset, config: TrainConfig, detector: Detector) -> Dataset:
    """Keep the pictures of the run's first steps, so that no others have to be read into memory."""
    plan = make_plan(len(data.records), detector.config.preprocess, config)
    chosen = sorted({draw.picture for draws in plan.batches(0) for draw in draws})
    return replace(data, records=tuple(data.records[i] for i in chosen))


def _loading_seconds(data: Dataset, config: TrainConfig, detector: Detector, *, cached: bool) -> float:
    samples = TrainingSet(data, config.augment, config.seed)
    if cached:
        samples.fill_cache(1, lambda: None)
    plan = make_plan(len(data.records), detector.config.preprocess, config)
    draws = next(plan.batches(0))
    started = time.perf_counter()
    collate([samples[draw] for draw in draws])
    return time.perf_counter() - started


def _step_seconds(rehearsal: Rehearsal, loading: float, workers: int) -> tuple[int, float]:
    """Take the median of the steps after the warm-up, or after the first where there are too few.

    The first batches lie ready when their steps begin, so that few steps do not show workers that are too slow: a step
    takes at least as long as they need for a batch.
    """
    measured = rehearsal.seconds[WARM_UP:] or rehearsal.seconds[1:] or rehearsal.seconds
    return len(measured), max(median(measured), loading / workers if workers else 0.0)


def _evaluations(config: TrainConfig, plan: Plan) -> int:
    every = config.evaluate_every * plan.steps_per_epoch
    return math.ceil(plan.steps / every) if every else 1  # the last step is always followed by one


def _evaluation_seconds(detector: Detector, validation: Dataset, config: TrainConfig, options: RunOptions) -> float:
    """Score one batch of the validation pictures after a first picture that is not counted."""
    predictor = Predictor(LoadedDetector(detector, {}, Path()), device=options.device, precision=options.precision)
    workers = max(1, options.workers)
    evaluate(predictor, replace(validation, records=validation.records[:1]), batch=1, workers=workers)
    some = validation.records[: config.batch]
    started = time.perf_counter()
    evaluate(
        predictor, replace(validation, records=some), batch=max(1, len(some) // config.accumulate), workers=workers
    )
    return (time.perf_counter() - started) / len(some) * len(validation.records)


def _mean_area(plan: Plan) -> float:
    """Average the input area over the run, as a fraction of the full area."""
    full = plan.sizes(1.0)
    count = min(plan.steps, 1000)
    sizes = [plan.sizes(i / count) for i in range(count)]
    return sum(s.height * s.width for s in sizes) / count / (full.height * full.width)


def _memory(options: RunOptions) -> tuple[int | None, str]:
    if options.device.type == "cuda":
        return torch.cuda.max_memory_allocated(options.device), "the GPU"
    if sys.platform == "win32":
        return None, "this process"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "this process"
