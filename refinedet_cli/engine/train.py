"""Training: one loop for every detector family, resumable at any step."""

from __future__ import annotations

import copy
import hashlib
import math
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinedet_cli import __version__
from refinedet_cli.core.config import DetectorConfig, TrainConfig, from_dict, to_dict
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.structures import LossParts, Targets
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.files import make_folder, write_json
from refinedet_cli.data.loading import Batch, Draw, TrainingSet, lost_worker, make_loader
from refinedet_cli.data.sampling import repeat_factors
from refinedet_cli.engine.capture import remove_captures
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.diagnosis import Diagnosis
from refinedet_cli.engine.distributed import ALONE, Processes
from refinedet_cli.engine.evaluate import Evaluation, evaluate
from refinedet_cli.engine.gradients import Gradients
from refinedet_cli.engine.health import Health
from refinedet_cli.engine.lanes import lanes_for
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.recipe import (
    Average,
    fewest_frozen,
    freeze,
    frozen_stages,
    learning_rate,
    make_optimizer,
    make_plan,
)
from refinedet_cli.engine.run_folder import RunFolder
from refinedet_cli.engine.run_log import RunLog, StepReport
from refinedet_cli.engine.run_record import BEST_FILE, CONFIG_FILE, LAST_FILE, STATE_FILE
from refinedet_cli.engine.run_state import RunState, load_state, save_state
from refinedet_cli.engine.watch import HealthReport
from refinedet_cli.errors import ConfigError
from refinedet_cli.files import claimed, remove_leftovers
from refinedet_cli.metrics.coco import CocoResult
from refinedet_cli.zoo.checkpoint import LoadedDetector, save_checkpoint

SAVE_EVERY_SECONDS = 300.0


@dataclass(frozen=True)
class EvaluationReport:
    """The averaged weights on the validation pictures after a number of steps.

    Attributes:
        step, epoch: done.
        result: the metric's numbers.
        is_best: whether no evaluation before reached this AP; always, as long as none has one.
        best: the highest AP so far; None where the validation pictures show no object.
        without_gain: evaluations in a row, this one included, that did not raise it.
        ends_run: whether the run stops here, for these were as many as `TrainConfig.patience` allows.
    """

    step: int
    epoch: float
    result: CocoResult
    is_best: bool
    best: float | None = None
    without_gain: int = 0
    ends_run: bool = False


@dataclass(frozen=True)
class CacheReport:
    """How many training pictures are decoded into memory."""

    done: int
    total: int


@dataclass(frozen=True)
class ResumeReport:
    """Where a run goes on.

    Attributes:
        step, steps: optimiser steps that are done, and those of the whole run.
        epoch, epochs: the same as passes over the data.
        is_done: whether nothing is left to train.
    """

    step: int
    steps: int
    epoch: float
    epochs: float
    is_done: bool


Report = StepReport | EvaluationReport | CacheReport | ResumeReport | HealthReport | Diagnosis


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
        interrupted: asked while pictures are cached and weights evaluated; the run stops at once if it says so.
        provenance: plain data for the checkpoints.
        record: what config.json says beyond the settings, plain data.
        save_seconds: how often the state is saved, beside after the first step and around evaluations.
        processes: that train together, each with these options; only the first of them reports and writes.
        command: program and arguments as typed, for environment.json; may be empty.
        tensorboard: also write event files for TensorBoard.
    """

    out: Path
    device: torch.device
    precision: Precision
    workers: int
    cache: bool
    resume: bool
    should_stop: Callable[[], bool]
    interrupted: Callable[[], bool] = lambda: False
    provenance: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    save_seconds: float = SAVE_EVERY_SECONDS
    processes: Processes = ALONE
    command: tuple[str, ...] = ()
    tensorboard: bool = False


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        finished: False when it stopped to be resumed.
        steps: optimiser steps done.
        ended_early: whether it ended before its last step, because AP no longer rose.
        result: of the last evaluation, if there was one.
        best: best validation AP, if there was an evaluation.
        seconds: of this call.
        pictures: training pictures seen by this call.
        best_evaluation: of the best weights, where this call made it.
    """

    finished: bool
    steps: int
    result: CocoResult | None
    best: float | None
    seconds: float
    pictures: int
    ended_early: bool = False
    best_evaluation: Evaluation | None = None


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
        NonFiniteError: a step or the weights after it were not finite.
        DataError: a picture cannot be read.
        DeviceError: a process that loads pictures is lost.
        UsageError: another process trains in ``options.out``.
    """
    run = _Run(detector, data, validation, config, options, on_progress)
    try:
        with run.claimed_folder(), _loading_processes():
            return run.run()
    except BaseException:
        run.folder.end("failed")
        raise


def rehearse(
    detector: Detector,
    data: Dataset,
    config: TrainConfig,
    options: RunOptions,
    enough: Callable[[Sequence[float]], bool],
    batches: Iterable[Batch] | None = None,
) -> Rehearsal:
    """Take a few steps as `train` would, loading included, and write nothing.

    Args:
        detector: its network is changed in place.
        data: training pictures.
        config: the recipe; its rate and schedule do not count.
        options: where and how to run; ``out``, ``resume`` and ``should_stop`` do not count.
        enough: given the seconds of the steps so far, tells whether to stop before the plan ends.
        batches: to train on instead of those of the data, none of which is read then.

    Raises:
        NonFiniteError: a step is not finite.
        DataError: a picture cannot be read.
        DeviceError: a process that loads pictures is lost.
    """
    with _loading_processes():
        return _Run(detector, data, None, config, options, _ignore).rehearse(enough, batches)


def _ignore(report: Report) -> None:
    """Take no notice of progress."""


def _repeatable() -> AbstractContextManager[None]:
    """Take, of cuDNN's algorithms, only those that give the same gradients every time."""
    tf32 = torch.backends.cudnn.allow_tf32
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32)


@contextmanager
def _loading_processes() -> Iterator[None]:
    """Tell what became of a process that makes samples, which torch tells as an error wherever this one just is.

    Raises:
        DeviceError: one of them was killed, or a batch of theirs is lost.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"^DataLoader (worker|timed out)", str(error)):
            raise
        raise lost_worker(error) from None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Stopped(Exception):
    """The run was interrupted where the state on disk is all there is to save."""


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
        self.config, self.options, self.processes = config, options, options.processes
        self.folder = RunFolder(options.out, options.command, tensorboard=options.tensorboard, on_problem=on_progress)
        self.on_progress = self.folder.passing(on_progress) if self.processes.first else _ignore
        self.network = detector.network.to(options.device).to(memory_format=torch.channels_last)
        # The optimiser holds from the start all that is ever trained, so that its state is the same whatever is frozen.
        self.frozen = fewest_frozen(config)
        freeze(self.network, config, self.frozen)
        self.optimizer = make_optimizer(self.network, config)
        self.average = Average(self.network, config.ema_decay)
        self.settings = {"detector": to_dict(detector.config), "train": to_dict(config)}
        self.records = {"provenance": {**options.provenance}, "record": {**options.record}}
        self.order = hashlib.sha256(repr([record.file_name for record in data.records]).encode()).hexdigest()
        self.validated_on = "" if validation is None else validation.fingerprint
        weights = repeat_factors(data, config.balance) if config.balance else None
        self.samples = TrainingSet(data, config.augment, config.seed, weights)
        self.plan = make_plan(len(data.records), detector.config.preprocess, config, weights)
        self.step = 0
        self.best: float | None = None
        self.best_step: int | None = None
        self.without_gain = 0
        self.evaluated = True
        self.scores: dict[str, float | None] = {}
        self.result: CocoResult | None = None
        self.best_evaluation: Evaluation | None = None
        self.log = RunLog(options.out)
        self.gradients = Gradients(
            detector, precision=options.precision, micro_batches=config.accumulate, processes=self.processes
        )
        self.health = Health(
            self.detector,
            config,
            data,
            self.optimizer,
            settings=self.settings,
            precision=options.precision,
            out=options.out,
            state=options.out / STATE_FILE,
            on_report=self._hear,
            processes=self.processes,
        )

    @contextmanager
    def claimed_folder(self) -> Iterator[None]:
        """Keep other runs from the folder, which is made where missing and all processes agree on what to do."""
        self._refuse_differences()
        with ExitStack() as stack:
            self.processes.from_first(lambda: self._claim_folder(stack))
            yield

    def _claim_folder(self, stack: ExitStack) -> None:
        make_folder(self.options.out)
        stack.enter_context(claimed(self.options.out))

    def run(self) -> TrainResult:
        self.processes.from_first(self._prepare_folder)
        if self.options.resume:
            self._resume(self.processes.from_first(lambda: load_state(self.options.out / STATE_FILE)))
            self._report_resumed()
        if self.processes.first:
            write_json(self.options.out / CONFIG_FILE, {**self.settings, **self.records["record"]})
            device, precision = self.options.device, self.options.precision
            self.folder.begin(self.step, device=device, precision=precision, processes=self.processes.count)
        start, first = time.monotonic(), self.step
        try:
            if self.options.cache:
                self._fill_cache()
            start = time.monotonic()
            with _repeatable():
                finished = self._take_steps()
        except _Stopped:
            finished = False
        pictures = (self.step - first) * self.plan.batch
        seconds, ended_early = time.monotonic() - start, self.step < self.plan.steps and self._is_out_of_patience()
        if self.processes.first:
            self.folder.end("finished" if finished else "stopped", self.step)
        best = self.best_evaluation
        return TrainResult(finished, self.step, self.result, self.best, seconds, pictures, ended_early, best)

    def _take_steps(self) -> bool:
        """Train until the end, or until asked to stop; tells which."""
        if not self.evaluated:
            self._evaluate()
        # Closed whatever happens: loading processes that outlive an error would be waited for at the end of this one.
        with closing(self._batches()) as batches:
            # At once after the first step, so that a disk that is full or read-only is found out before it matters.
            saved = -math.inf
            # Asked before a step too: a run that ended so and is resumed has nothing left to do.
            while not self._is_out_of_patience() and (batch := next(batches, None)) is not None:
                self._train_step(batch)
                evaluate_now = self._is_evaluation_step()
                self.evaluated = not evaluate_now or self.validation is None
                if evaluate_now or time.monotonic() - saved >= self.options.save_seconds:
                    self._save()
                    saved = time.monotonic()
                if not self.evaluated:
                    self._evaluate()
                goes_on = self.step < self.plan.steps and not self._is_out_of_patience()
                if goes_on and self.processes.any(self.options.should_stop()):
                    if not evaluate_now:
                        self._save()
                    return False
        return True

    def _batches(self) -> Generator[Batch]:
        """Load this process's share of each batch; one of whose pictures another cannot read ends all."""
        rank, count = self.processes.rank, self.processes.count
        if rank >= self.plan.batch:
            loaded: Iterator[Batch] = (_no_pictures(draws[0]) for draws in self.plan.batches(self.step))
        else:
            pin, share = self.options.device.type == "cuda", slice(rank, None, count)
            loaded = make_loader(self.samples, self.plan, self.step, self.options.workers, pin=pin, share=share)
        for batch in loaded:
            self.processes.meet()
            yield batch

    def _refuse_differences(self) -> None:
        """Demand that all processes do the same: on another machine, folders of one name may hold different data."""
        own = {
            "settings": repr(self.settings),
            "training data": self.data.fingerprint,
            "validation data": self.validated_on,
            "precision": self.options.precision,
            "version of refinedet": __version__,
        }
        first, *others = self.processes.gather(own)
        for rank, other in enumerate(others, start=1):
            for what, value in first.items():
                if other[what] != value:
                    raise ConfigError(
                        f"rank {rank} has another {what} than rank 0"
                        if what in ("precision", "version of refinedet")
                        else f"rank {rank} has other {what} than rank 0",
                        "give all processes the same command and the same files",
                    )

    def _prepare_folder(self) -> None:
        remove_leftovers(self.options.out)
        if not self.options.resume:
            self._clear()

    def _clear(self) -> None:
        """Drop what an earlier run left, in such an order that a process killed here leaves that run, or none."""
        for name in (LAST_FILE, STATE_FILE, BEST_FILE):
            (self.options.out / name).unlink(missing_ok=True)
        remove_captures(self.options.out)
        self.log.restart()
        self.folder.clear()

    def _train_step(self, batch: Batch) -> None:
        self._thaw()
        factor = learning_rate(self.config, self.step, self.plan.steps)
        loss, norm, size = self._optimise(batch, factor)
        if not self.processes.first:
            return
        lr = self.config.lr * factor
        report = self.log.add(loss, norm, batch, step=self.step, plan=self.plan, lr=lr, size=size)
        if report is not None:
            self.on_progress(report)

    def _thaw(self) -> None:
        lowest = frozen_stages(self.config, self.step, self.plan.steps)
        if lowest != self.frozen:
            freeze(self.network, self.config, lowest)
            self.frozen = lowest

    def _hear(self, report: HealthReport | Diagnosis) -> None:
        if isinstance(report, HealthReport):
            self.log.warning(report)
        self.on_progress(report)

    def _optimise(self, batch: Batch, factor: float) -> tuple[LossParts, Tensor, torch.Size]:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.health.begin()
        loss, own_loss, raw = self.gradients(batch)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.health.judge(batch, raw, own_loss, norm, step=self.step + 1, factor=factor, frozen=self.frozen)
        nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm or math.inf, norm)
        self.optimizer.step()
        self.step += 1
        self.scores = {}
        if self.config.ema_decay:
            self.average.update(self.network, self.step)
        return loss, norm, batch.images.shape[2:]

    def rehearse(self, enough: Callable[[Sequence[float]], bool], batches: Iterable[Batch] | None) -> Rehearsal:
        self.health.out, self.health.on_report = None, _ignore  # nothing is written
        if self.options.cache:
            self._fill_cache()
        seconds: list[float] = []
        since = time.perf_counter()
        with _repeatable():
            for batch in self._batches() if batches is None else batches:
                # A rate so small that no step can diverge for want of the warm-up; a step costs the same at any rate.
                self._optimise(batch, 1e-6)
                if self.options.device.type == "cuda":
                    torch.cuda.synchronize(self.options.device)
                now = time.perf_counter()
                seconds.append(now - since)
                since = now
                if self.processes.any(enough(seconds)):
                    break
        slots = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        weights, average = (_bytes(tensors.values()) for tensors in (self.network.state_dict(), self.average.tensors))
        return Rehearsal(tuple(seconds), weights, weights + average + _bytes(slots))

    def _is_out_of_patience(self) -> bool:
        return bool(self.config.patience) and self.without_gain >= self.config.patience

    def _is_evaluation_step(self) -> bool:
        if self.step == self.plan.steps:
            return True
        every = self.config.evaluate_every * self.plan.steps_per_epoch
        return bool(every) and self.step % every == 0

    def _weights(self) -> dict[str, Tensor]:
        return self.average.tensors if self.config.ema_decay else dict(self.network.state_dict())

    def _evaluate(self) -> None:
        """Score the averaged weights, and save what came of it."""
        if self.validation is None:
            return
        self.health.judge_weights()
        network = copy.deepcopy(self.network)
        network.load_state_dict(self._weights())
        network.requires_grad_(False)
        loaded = LoadedDetector(replace(self.detector, network=network.eval()), {}, self.options.out / LAST_FILE)
        device = self.options.device
        predictor = Predictor(loaded, device=device, precision=self.options.precision, lanes=lanes_for(device))
        evaluation = evaluate(
            predictor,
            self.validation,
            # As many as a forward pass of training takes, so that they fit into memory too.
            batch=max(1, self.config.batch // (self.config.accumulate * self.processes.count)),
            workers=max(1, self.options.workers),
            on_progress=self._stop_if_interrupted,
            processes=self.processes,
        )
        self.result = evaluation.result
        self.evaluated, self.scores = True, {"AP": self.result.AP, "AP50": self.result.AP50}
        ap = self.result.AP
        is_best = self.best is None or (ap is not None and ap > self.best)
        self.without_gain = 0 if is_best else self.without_gain + 1
        if is_best:
            self.best, self.best_step, self.best_evaluation = ap, self.step, evaluation
        epoch = self.step / self.plan.steps_per_epoch
        if self.processes.first:
            self.log.evaluation(self.step, epoch, self.result)
            if is_best:
                self.log.best_classes(self.step, evaluation.scored_classes, self.result)
            self.folder.evaluation(self.step, self.result)
        ends_run = self.step < self.plan.steps and self._is_out_of_patience()
        report = EvaluationReport(self.step, epoch, self.result, is_best, self.best, self.without_gain, ends_run)
        self.on_progress(report)
        self._save()

    def _stop_if_interrupted(self, _: object = None) -> None:
        # Others might be done, and wait; together all stop after the next step.
        if self.processes.count == 1 and self.options.interrupted():
            raise _Stopped

    def _save(self) -> None:
        if not self.processes.first:
            return
        self.health.judge_weights()
        # The state first: weights that an end of the process leaves older than it are written anew from it.
        save_state(
            self.options.out / STATE_FILE,
            RunState(
                step=self.step,
                network=dict(self.network.state_dict()),
                ema=self.average.tensors,
                optimizer=self.optimizer.state_dict(),
                best=self.best,
                without_gain=self.without_gain,
                settings=self.settings,
                data=self.data.fingerprint,
                best_step=self.best_step,
                evaluated=self.evaluated,
                scores=self.scores,
                log=self.log.pending(),
                order=self.order,
                validation=self.validated_on,
                start={name: told["start"] for name, told in self.records.items() if "start" in told},
            ),
        )
        self._save_all_weights()
        self.folder.saved(self.step)

    def _save_all_weights(self) -> None:
        if self.best_step == self.step:
            self._save_weights(BEST_FILE)
        self._save_weights(LAST_FILE)

    def _save_weights(self, name: str) -> None:
        provenance = {
            **self.records["provenance"],
            "tool_version": __version__,
            "train": to_dict(self.config),
            "step": self.step,
            "pictures_seen": self.step * self.plan.batch,
            "data": {"name": self.data.name, "pictures": len(self.data.records), "sha256": self.data.fingerprint},
            "validation": None
            if self.validation is None
            else {"name": self.validation.name, "pictures": len(self.validation.records), **self.scores},
        }
        save_checkpoint(self.options.out / name, self.detector.config, self._weights(), provenance)

    def _resume(self, state: RunState) -> None:
        before = _with_defaults(state.settings)
        before["train"]["accumulate"] = self.config.accumulate  # the steps are the same
        if before != self.settings:
            raise ConfigError(
                f"the run in {self.options.out} was started with other settings: "
                f"{_first_difference(before, self.settings)}",
                "give the same options to resume it, or start a new run from its last.safetensors with --weights",
            )
        data = {
            "on other training data": (state.data, self.data.fingerprint),
            "on the training pictures in another order": (state.order, self.order),
            "with other validation data": (state.validation, self.validated_on),
        }
        for what, (then, now) in data.items():
            if then not in (None, now):
                raise ConfigError(
                    f"the run in {self.options.out} was started {what}",
                    "give the same data to resume it, or start a new run from its last.safetensors with --weights",
                )
        # Who resumes a run may leave out what it began from.
        for name, start in state.start.items():
            self.records[name]["start"] = start
        self.network.load_state_dict(state.network)
        self.optimizer.load_state_dict(state.optimizer)
        self.average.tensors = {n: t.to(self.options.device) for n, t in state.ema.items()}
        self.step, self.best, self.without_gain = state.step, state.best, state.without_gain
        self.best_step, self.evaluated, self.scores = state.best_step, state.evaluated, state.scores
        if not self.processes.first:
            return
        on_device = {name: t.to(self.options.device) for name, t in state.log.pop("sums", {}).items()}
        self.log.restore({**state.log, "sums": on_device}, self.step, self.step if self.evaluated else self.step - 1)
        self._save_all_weights()

    def _report_resumed(self) -> None:
        if not self.processes.first:
            return
        plan = self.plan
        is_done = self.evaluated and (self.step >= plan.steps or self._is_out_of_patience())
        epoch = self.step / plan.steps_per_epoch
        self.on_progress(ResumeReport(self.step, plan.steps, epoch, plan.epochs, is_done))

    def _fill_cache(self) -> None:
        total, done = len(self.data.records), 0

        def count() -> None:
            nonlocal done
            done += 1
            self.on_progress(CacheReport(done, total))
            self._stop_if_interrupted()

        self.samples.fill_cache(max(1, torch.get_num_threads()), count)


def _no_pictures(draw: Draw) -> Batch:
    """Make the share of a batch that is smaller than there are processes."""
    objects = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0)
    return Batch(torch.zeros(0, 3, draw.preprocess.height, draw.preprocess.width), objects, ())


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
