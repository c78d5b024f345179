"""Training: one loop for every detector family, resumable at any step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinedet_cli import __version__
from refinedet_cli.core.config import DetectorConfig, TrainConfig, from_dict, to_dict
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.structures import LossParts
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.files import write_json
from refinedet_cli.data.loading import Batch, TrainingSet, make_loader
from refinedet_cli.data.sampling import repeat_factors
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.evaluate import evaluate
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.recipe import Average, freeze, learning_rate, make_optimizer, make_plan
from refinedet_cli.engine.run_log import RunLog, StepReport
from refinedet_cli.engine.run_state import RunState, load_state, save_state
from refinedet_cli.errors import ConfigError, GateError
from refinedet_cli.metrics.coco import CocoResult
from refinedet_cli.zoo.checkpoint import LoadedDetector, save_checkpoint

STATE_FILE = "state.pt"
LAST_FILE = "last.safetensors"
BEST_FILE = "best.safetensors"
CONFIG_FILE = "config.json"
SAVE_EVERY_SECONDS = 300.0


@dataclass(frozen=True)
class EvaluationReport:
    """The averaged weights on the validation pictures after a number of steps."""

    step: int
    epoch: float
    result: CocoResult
    is_best: bool


@dataclass(frozen=True)
class CacheReport:
    """How many training pictures are decoded into memory."""

    done: int
    total: int


Report = StepReport | EvaluationReport | CacheReport


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What of a run is not part of its recipe.

    Attributes:
        out: folder of the run.
        device, precision: where and how to compute.
        workers: processes that make samples.
        cache: keep all decoded pictures in memory.
        resume: go on from the folder's state.
        should_stop: asked after every step; if it says so, the run saves its state and stops, to be resumed.
        provenance: plain data for the checkpoints.
        record: what config.json says beyond the settings, plain data.
    """

    out: Path
    device: torch.device
    precision: Precision
    workers: int
    cache: bool
    resume: bool
    should_stop: Callable[[], bool]
    provenance: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        finished: False when it stopped early to be resumed.
        steps: optimiser steps done.
        result: of the last evaluation, if there was one.
        best: best validation AP, if there was an evaluation.
        seconds: of this call.
        pictures: training pictures seen by this call.
    """

    finished: bool
    steps: int
    result: CocoResult | None
    best: float | None
    seconds: float
    pictures: int


@dataclass(frozen=True)
class Rehearsal:
    """What a few real steps cost.

    Attributes:
        seconds: of each step, in order; the first holds the start of the workers too.
        weights_bytes: of a checkpoint's tensors.
        state_bytes: of the resume state's tensors.
    """

    seconds: tuple[float, ...]
    weights_bytes: int
    state_bytes: int


def train(
    detector: Detector,
    data: Dataset,
    validation: Dataset | None,
    config: TrainConfig,
    options: RunOptions,
    on_progress: Callable[[Report], None],
) -> TrainResult:
    """Train a detector and leave its best and last weights, log and resume state in ``options.out``.

    Args:
        detector: built and warm-started; its network is trained in place.
        data: training pictures.
        validation: pictures to measure the averaged weights on; the best AP decides which weights are "best".
        config: the recipe.
        options: where and how to run.
        on_progress: called with every report.

    Returns:
        `TrainResult`. A run that is resumed at any step ends with the same weights as one that never stopped.

    Raises:
        ConfigError: the state to resume was made with another recipe or other data.
        GateError: the loss stopped being finite.
        DataError: a picture cannot be read.
    """
    return _Run(detector, data, validation, config, options, on_progress).run()


def rehearse(
    detector: Detector,
    data: Dataset,
    config: TrainConfig,
    options: RunOptions,
    enough: Callable[[Sequence[float]], bool],
) -> Rehearsal:
    """Take a few steps as `train` would, loading included, and write nothing.

    Args:
        detector: its network is changed in place.
        data: training pictures.
        config: the recipe; its rate and schedule do not count.
        options: where and how to run; ``out``, ``resume`` and ``should_stop`` do not count.
        enough: given the seconds of the steps so far, tells whether to stop before the plan ends.

    Raises:
        GateError: the loss is not finite.
        DataError: a picture cannot be read.
    """
    return _Run(detector, data, None, config, options, _ignore).rehearse(enough)


def _ignore(report: Report) -> None:
    """Take no notice of progress."""


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Run:
    """The moving parts of one call of `train`."""

    def __init__(
        self,
        detector: Detector,
        data: Dataset,
        validation: Dataset | None,
        config: TrainConfig,
        options: RunOptions,
        on_progress: Callable[[Report], None],
    ) -> None:
        self.detector, self.data, self.validation = detector, data, validation
        self.config, self.options, self.on_progress = config, options, on_progress
        self.network = detector.network.to(options.device).to(memory_format=torch.channels_last)
        freeze(self.network, config)
        self.optimizer = make_optimizer(self.network, config)
        self.average = Average(self.network, config.ema_decay)
        self.settings = {"detector": to_dict(detector.config), "train": to_dict(config)}
        weights = repeat_factors(data, config.balance) if config.balance else None
        self.samples = TrainingSet(data, config.augment, config.seed, weights)
        self.plan = make_plan(len(data.records), detector.config.preprocess, config, weights)
        self.step = 0
        self.best: float | None = None
        self.result: CocoResult | None = None
        self.log = RunLog(options.out)

    def run(self) -> TrainResult:
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        if self.options.resume:
            self._resume(load_state(out / STATE_FILE))
        else:
            self.log.restart()
        write_json(out / CONFIG_FILE, {**self.settings, **self.options.record})
        if self.options.cache:
            self._fill_cache()
        start = saved = time.monotonic()
        first = self.step
        finished = True
        for batch in self._batches():
            self._train_step(batch)
            evaluate_now = self._is_evaluation_step()
            if evaluate_now:
                self._evaluate()
            now = time.monotonic()
            if evaluate_now or now - saved > SAVE_EVERY_SECONDS:
                self._save()
                saved = time.monotonic()
            if self.step < self.plan.steps and self.options.should_stop():
                finished = False
                break
        self._save()
        pictures = (self.step - first) * self.plan.batch
        return TrainResult(finished, self.step, self.result, self.best, time.monotonic() - start, pictures)

    def _batches(self) -> Iterator[Batch]:
        pin = self.options.device.type == "cuda"
        yield from make_loader(self.samples, self.plan, self.step, self.options.workers, pin=pin)

    def _train_step(self, batch: Batch) -> None:
        factor = learning_rate(self.config, self.step, self.plan.steps)
        loss, norm, size = self._optimise(batch, factor)
        lr = self.config.lr * factor
        report = self.log.add(loss, norm, batch, step=self.step, plan=self.plan, lr=lr, size=size)
        if report is not None:
            self.on_progress(report)

    def _optimise(self, batch: Batch, factor: float) -> tuple[LossParts, Tensor, torch.Size]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        device = self.options.device
        images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)
        targets = batch.targets.to(device)
        bf16 = self.options.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            raw = self.network(images)
        loss = self.detector.criterion(raw, targets)
        self._refuse_non_finite("loss", loss.total, loss, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
        self._refuse_non_finite("gradient", norm, loss, batch)
        self.optimizer.step()
        self.step += 1
        if self.config.ema_decay:
            self.average.update(self.network, self.step)
        return loss, norm, images.shape[2:]

    def rehearse(self, enough: Callable[[Sequence[float]], bool]) -> Rehearsal:
        if self.options.cache:
            self._fill_cache()
        seconds: list[float] = []
        since = time.perf_counter()
        for batch in self._batches():
            # A rate so small that no step can diverge for want of the warm-up; a step costs the same at any rate.
            self._optimise(batch, 1e-6)
            if self.options.device.type == "cuda":
                torch.cuda.synchronize(self.options.device)
            now = time.perf_counter()
            seconds.append(now - since)
            since = now
            if enough(seconds):
                break
        slots = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        weights, average = (_bytes(tensors.values()) for tensors in (self.network.state_dict(), self.average.tensors))
        return Rehearsal(tuple(seconds), weights, weights + average + _bytes(slots))

    def _refuse_non_finite(self, what: str, value: Tensor, loss: LossParts, batch: Batch) -> None:
        if bool(value.isfinite()):
            return
        pictures = ", ".join(self.data.records[i].file_name for i in batch.indices[:4])
        terms = ", ".join(f"{name} {float(value):.4g}" for name, value in loss.parts.items())
        state = self.options.out / STATE_FILE
        raise GateError(
            f"the {what} is not finite at step {self.step + 1} ({terms}; first pictures: {pictures})",
            f"lower train.lr (now {self.config.lr}) or lengthen train.warmup_steps"
            + (f"; the state of before is in {state}" if state.is_file() else ""),
        )

    def _is_evaluation_step(self) -> bool:
        if self.step == self.plan.steps:
            return True
        every = self.config.evaluate_every * self.plan.steps_per_epoch
        return bool(every) and self.step % every == 0

    def _weights(self) -> dict[str, Tensor]:
        return self.average.tensors if self.config.ema_decay else dict(self.network.state_dict())

    def _evaluate(self) -> None:
        if self.validation is None:
            return
        network = copy.deepcopy(self.network)
        network.load_state_dict(self._weights())
        network.requires_grad_(False)
        loaded = LoadedDetector(replace(self.detector, network=network.eval()), {}, self.options.out / LAST_FILE)
        predictor = Predictor(loaded, device=self.options.device, precision=self.options.precision)
        evaluation = evaluate(predictor, self.validation, batch=self.config.batch, workers=max(1, self.options.workers))
        self.result = evaluation.result
        ap = self.result.AP or 0.0
        is_best = self.best is None or ap > self.best
        if is_best:
            self.best = ap
            self._save_weights(BEST_FILE)
        epoch = self.step / self.plan.steps_per_epoch
        self.log.evaluation(self.step, epoch, self.result)
        self.on_progress(EvaluationReport(self.step, epoch, self.result, is_best))

    def _save(self) -> None:
        self._save_weights(LAST_FILE)
        save_state(
            self.options.out / STATE_FILE,
            RunState(
                step=self.step,
                network=dict(self.network.state_dict()),
                ema=self.average.tensors,
                optimizer=self.optimizer.state_dict(),
                best=self.best,
                settings=self.settings,
                data=self.data.fingerprint,
            ),
        )

    def _save_weights(self, name: str) -> None:
        metrics = {} if self.result is None else {"AP": self.result.AP, "AP50": self.result.AP50}
        provenance = {
            **self.options.provenance,
            "tool_version": __version__,
            "train": to_dict(self.config),
            "step": self.step,
            "pictures_seen": self.step * self.plan.batch,
            "data": {"name": self.data.name, "pictures": len(self.data.records), "sha256": self.data.fingerprint},
            "validation": None
            if self.validation is None
            else {"name": self.validation.name, "pictures": len(self.validation.records), **metrics},
        }
        save_checkpoint(self.options.out / name, self.detector.config, self._weights(), provenance)

    def _resume(self, state: RunState) -> None:
        before = _with_defaults(state.settings)
        if before != self.settings:
            raise ConfigError(
                f"the run in {self.options.out} was started with other settings: "
                f"{_first_difference(before, self.settings)}",
                "give the same options to resume it, or start a new run from its last.safetensors with --weights",
            )
        if state.data != self.data.fingerprint:
            raise ConfigError(
                f"the run in {self.options.out} was started on other training data",
                "give the same data to resume it, or start a new run from its last.safetensors with --weights",
            )
        self.network.load_state_dict(state.network)
        self.optimizer.load_state_dict(state.optimizer)
        self.average.tensors = {n: t.to(self.options.device) for n, t in state.ema.items()}
        self.step, self.best = state.step, state.best
        self.log.cut(self.step)

    def _fill_cache(self) -> None:
        total, done = len(self.data.records), 0

        def count() -> None:
            nonlocal done
            done += 1
            self.on_progress(CacheReport(done, total))

        self.samples.fill_cache(max(1, torch.get_num_threads()), count)


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Add the settings that are newer than a run at their defaults, which are what it did."""
    return {
        "detector": to_dict(from_dict(DetectorConfig, settings["detector"])),
        "train": to_dict(from_dict(TrainConfig, settings["train"], where="train")),
    }


def _first_difference(old: Any, new: Any, where: str = "") -> str:
    """Name the first setting in which two configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    return f"{where} was {old!r} and is {new!r}"
