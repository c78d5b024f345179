"""The batch that a device can train with: found by training, on the worst that the data and the recipe can bring."""

from __future__ import annotations

import copy
import gc
import itertools
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import DetectorConfig, TrainConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.structures import Target, Targets
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import PREFETCHED, Batch
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.memory import free_memory, is_out_of_memory, peak_memory
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.recipe import fewest_frozen
from refinedet_cli.engine.train import RunOptions, rehearse
from refinedet_cli.errors import DeviceError, UsageError
from refinedet_cli.zoo.checkpoint import LoadedDetector

# Of the free memory, the part that a run may take: allocations differ a little from step to step.
CUDA_SHARE, CPU_SHARE = 0.9, 0.8
# A batch twice as large has to be so much faster, by pictures a second, to be worth it.
WORTHWHILE = 1.05
# An epoch of fewer steps is no basis for averages, and evaluations come by the epoch.
STEPS_AN_EPOCH = 8
# The first step of a trial makes the optimiser's state and is not timed.
_STEPS = 3
_MOSAIC_PICTURES = 4


class Trial(NamedTuple):
    """How training with some batch went.

    Attributes:
        batch: pictures a step.
        needed: bytes that the run takes with it, beyond what is held before; None where they could not be measured.
        fits: whether that is no more than may be taken.
        pictures_per_second: None where no step was finished.
    """

    batch: int
    needed: int | None
    fits: bool
    pictures_per_second: float | None


@dataclass(frozen=True)
class FoundBatch:
    """The batch to take.

    Attributes:
        batch: pictures a step.
        why: why not a larger one, as a half sentence.
        trials: in the order they were made.
        allowed: bytes that a run may take; None where the free memory is not known.
        crowd: objects of the fullest picture that was tried.
    """

    batch: int
    why: str
    trials: tuple[Trial, ...]
    allowed: int | None = None
    crowd: int = 0

    @property
    def note(self) -> str:
        """Say what was found and why, in one line."""
        needed = next((t.needed for t in self.trials if t.batch == self.batch), None)
        memory = ""
        if needed is not None and self.allowed is not None:
            memory = f", which takes {_gigabytes(needed)} of the {_gigabytes(self.allowed)} that may be taken"
        worst = f" with up to {counted(self.crowd, 'object')} a picture" if self.crowd else ""
        return f"batch: {self.batch} found by trial{worst}{memory}; {self.why}"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run asks of the memory beside its network.

    Attributes:
        detector: what is trained, at its largest input size.
        train: the recipe.
        device, precision, workers: where and how to run.
        crowds: objects of each training picture, the fullest first.
        picture_bytes: of each decoded validation picture, the largest first.
        cached_bytes: of decoded training pictures that are kept.
    """

    detector: DetectorConfig
    train: TrainConfig
    device: torch.device
    precision: Precision
    workers: int
    crowds: tuple[int, ...]
    picture_bytes: tuple[int, ...] = ()
    cached_bytes: int = 0

    @classmethod
    def of(
        cls,
        detector: DetectorConfig,
        data: Dataset,
        validation: Dataset | None,
        train: TrainConfig,
        options: RunOptions,
    ) -> Load:
        """Look up what a run has to do with."""
        sizes = [] if validation is None else [r.width * r.height * 3 for r in validation.records]
        return cls(
            detector=detector,
            train=train,
            device=options.device,
            precision=options.precision,
            workers=options.workers,
            crowds=tuple(sorted((int((~r.crowd).sum()) for r in data.records), reverse=True)),
            picture_bytes=tuple(sorted(sizes, reverse=True)),
            cached_bytes=sum(r.width * r.height * 3 for r in data.records) if options.cache else 0,
        )

    def counts(self, batch: int) -> list[int]:
        """Count the objects of the fullest samples that a batch can be made of.

        Pictures come once an epoch, unless classes are balanced; of a mosaic, three pictures may be any.
        """
        fullest = self.crowds[0]
        own = [fullest] * batch if self.train.balance else list(itertools.islice(itertools.cycle(self.crowds), batch))
        others = (_MOSAIC_PICTURES - 1) * fullest if self.train.augment.mosaic_probability else 0
        return [count + others for count in own]

    def loading_bytes(self, batch: int) -> int:
        """Count what the processes that make samples hold ready, and what is decoded to be evaluated."""
        config = self.detector.preprocess
        ready = self.workers * PREFETCHED + 1
        samples = ready * batch * 3 * config.height * config.width * 4
        return samples + self.cached_bytes + sum(self.picture_bytes[: batch + max(1, self.workers)])


def find_batch(
    detector: Detector, data: Dataset, validation: Dataset | None, config: TrainConfig, options: RunOptions
) -> FoundBatch:
    """Find the largest batch that is safe and of use, by training a few steps with batches that double.

    Each is tried at the largest input size of the run, on the fullest pictures, with all that is ever trained, the
    optimiser's state, the average, and an evaluation of as many pictures. Memory bounds the batch everywhere, speed
    only beyond the batch of the recipe, which its learning rate is made for.

    Args:
        detector: left as it is.
        data: training pictures.
        validation: pictures to evaluate on.
        config: the recipe; its batch is where speed begins to count.
        options: where and how to run.

    Raises:
        DeviceError: there is not even memory for one picture.
        UsageError: the device cannot be measured.
    """
    load = Load.of(detector.config, data, validation, config, options)
    pictures = len(data.records)
    most = max(min(config.batch, pictures), pictures // STEPS_AN_EPOCH)
    crowd = max(load.counts(1))
    if options.device.type == "cuda":
        trials = CudaTrials(detector, load)
        return replace(search(trials, wanted=config.batch, most=most), allowed=trials.allowed, crowd=crowd)
    if options.device.type != "cpu":
        raise UsageError(f"--batch auto cannot measure the memory of {options.device.type}", "give a number")
    with CpuTrials(load) as in_process:
        found = search(in_process, wanted=config.batch, most=most)
        return replace(found, allowed=in_process.allowed, crowd=crowd)


def search(attempt: Callable[[int], Trial], *, wanted: int, most: int) -> FoundBatch:
    """Try powers of two until one does not fit, or is not worth it.

    Args:
        attempt: trains with a batch.
        wanted: batch up to which speed does not count.
        most: the largest to try.

    Returns:
        `FoundBatch`. Between the last that fits and the first that does not, the middle is tried too if it is a
        multiple of 8.

    Raises:
        DeviceError: 1 does not fit.
    """
    best, trials, batch = None, [], 1
    why = f"a larger one would leave fewer than {STEPS_AN_EPOCH} steps an epoch"
    while batch <= most:
        trial = attempt(batch)
        trials.append(trial)
        if not trial.fits:
            why = f"{batch} {_too_much(trial)}"
            break
        if best is not None and batch > wanted and not _is_faster(trial, best):
            why = f"{batch} is {_compared(trial, best)} ({_rate(trial)} pictures/s against {_rate(best)})"
            break
        best, batch = trial, 2 * batch
    if best is None:
        raise DeviceError(
            f"there is no memory to train with a batch of 1, which {_too_much(trials[0])}",
            "take a smaller input (--set preprocess.height, preprocess.width), a smaller preset, or another --device",
        )
    middle = best.batch + best.batch // 2
    if not trials[-1].fits and middle % 8 == 0 and middle <= most:
        trials.append(attempt(middle))
        if trials[-1].fits:
            best = trials[-1]
    return FoundBatch(best.batch, why, tuple(trials))


def _is_faster(trial: Trial, than: Trial) -> bool:
    return (trial.pictures_per_second or 0.0) > WORTHWHILE * (than.pictures_per_second or 0.0)


def _compared(trial: Trial, other: Trial) -> str:
    return "hardly faster" if (trial.pictures_per_second or 0.0) > (other.pictures_per_second or 0.0) else "no faster"


def _rate(trial: Trial) -> str:
    return f"{trial.pictures_per_second or 0.0:.3g}"


def _too_much(trial: Trial) -> str:
    return "does not fit into memory" if trial.needed is None else f"would take {_gigabytes(trial.needed)}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


# --- one trial


def worst_batch(load: Load, batch: int) -> Batch:
    """Make a batch of noise with as many objects as can be."""
    generator = torch.Generator().manual_seed(0)
    config = load.detector.preprocess
    classes = len(load.detector.classes)
    targets = []
    for count in load.counts(batch):
        low = torch.rand(count, 2, generator=generator) * 0.8
        sides = 0.03 + torch.rand(count, 2, generator=generator) * 0.17
        labels = torch.randint(1, classes + 1, (count,), generator=generator)
        targets.append(Target(torch.cat([low, low + sides], dim=1), labels))
    images = torch.randn(batch, 3, config.height, config.width, generator=generator)
    return Batch(images, Targets.pack(targets), (0,) * batch)


def train_worst(detector: Detector, load: Load, batch: int) -> float:
    """Train a few steps on the worst batch, and evaluate as many pictures while all of that is in memory.

    Args:
        detector: its network is changed in place.
        load: what the run asks for.
        batch: pictures a step.

    Returns:
        pictures a second of the fastest step.
    """
    config = replace(
        load.train, batch=batch, epochs=1, steps=_STEPS, small_input=(), balance=0.0, patience=0,
        freeze_stages=fewest_frozen(load.train), unfreeze=(),
    )  # fmt: skip

    def enough(seconds: Sequence[float]) -> bool:
        if len(seconds) < _STEPS:
            return False
        _evaluate(detector, load, max(1, batch // config.accumulate))
        return True

    options = RunOptions(
        out=Path(), device=load.device, precision=load.precision, workers=0, cache=False, resume=False,
        should_stop=_never, provenance={},
    )  # fmt: skip
    worst = worst_batch(load, batch)
    rehearsal = rehearse(detector, _one_picture(load), config, options, enough, itertools.repeat(worst, _STEPS))
    return batch / min(rehearsal.seconds[1:])


def _never() -> bool:
    return False


def _evaluate(detector: Detector, load: Load, batch: int) -> None:
    network = copy.deepcopy(detector.network).requires_grad_(False)
    loaded = LoadedDetector(replace(detector, network=network), {}, Path())
    predictor = Predictor(loaded, device=load.device, precision=load.precision)
    predictor.predict([np.zeros((64, 64, 3), dtype=np.uint8)] * batch)


def _one_picture(load: Load) -> Dataset:
    """Stand in for the data: none of its pictures is read."""
    empty = np.zeros(0)
    record = Record(
        image_id=0,
        path=Path(),
        width=1,
        height=1,
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, dtype=np.int64),
        areas=empty,
        crowd=empty.astype(bool),
        difficult=empty.astype(bool),
        annotation_ids=np.zeros(0, dtype=np.int64),
        file_name="noise",
    )
    return Dataset("noise", load.detector.classes, (record,))


# --- on a GPU


class CudaTrials:
    """Trials on a CUDA device, each in memory that is emptied before and after.

    Args:
        detector: left as it is.
        load: what the run asks for.

    Attributes:
        allowed: bytes that a run may hold.
    """

    def __init__(self, detector: Detector, load: Load) -> None:
        self._detector, self._load = detector, load
        self._device = load.device
        self._empty()
        free, _ = torch.cuda.mem_get_info(self._device)
        self.allowed = int(CUDA_SHARE * (free + torch.cuda.memory_reserved(self._device)))

    def __call__(self, batch: int) -> Trial:
        """Train with a batch; that the memory runs out is an answer too."""
        self._empty()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            trained = replace(self._detector, network=copy.deepcopy(self._detector.network))
            speed = train_worst(trained, self._load, batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Trial(batch, None, fits=False, pictures_per_second=None)
        else:
            needed = torch.cuda.max_memory_reserved(self._device)
            return Trial(batch, needed, needed <= self.allowed, speed)
        finally:
            trained = None  # type: ignore[assignment]
            self._empty()

    def _empty(self) -> None:
        # Tracebacks and optimisers form rings that hold on to memory until they are collected.
        gc.collect()
        torch.cuda.empty_cache()


# --- on the CPU


@dataclass
class CpuTrials:
    """Trials in a process of their own, whose peak of resident memory is the run's; batches have to rise.

    Args:
        load: what the run asks for.

    Attributes:
        allowed: bytes that a run may take beyond what this process has; None where the free memory is not known.
    """

    load: Load
    allowed: int | None = None
    _held: int | None = None
    _measured: list[Trial] = field(default_factory=list)

    def __enter__(self) -> CpuTrials:
        free = free_memory()
        self.allowed = None if free is None else int(CPU_SHARE * free)
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_begin, initargs=(torch.get_num_threads(),)
        )
        self._held = self._pool.submit(_held_before, self.load).result()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, batch: int) -> Trial:
        """Train with a batch, unless what the last ones took says that it cannot fit: others need this memory."""
        foreseen = self._foresee(batch)
        if foreseen is not None and self.allowed is not None and foreseen > self.allowed:
            return Trial(batch, foreseen, fits=False, pictures_per_second=None)
        try:
            tried = self._pool.submit(_try, self.load, batch).result()
        except BrokenProcessPool:  # killed, as a system short of memory does
            return Trial(batch, None, fits=False, pictures_per_second=None)
        if tried is None:
            return Trial(batch, None, fits=False, pictures_per_second=None)
        peak, speed = tried
        needed = None if peak is None or self._held is None else peak - self._held + self.load.loading_bytes(batch)
        trial = Trial(batch, needed, self.allowed is None or needed is None or needed <= self.allowed, speed)
        self._measured.append(trial)
        return trial

    def _foresee(self, batch: int) -> int | None:
        """Draw the line through the last two trials on to a larger batch."""
        known = [(t.batch, t.needed) for t in self._measured if t.needed is not None]
        if len(known) < 2:
            return None
        (first, low), (second, high) = known[-2:]
        return high + (high - low) * (batch - second) // (second - first)


def _begin(threads: int) -> None:
    # An interrupt is for the process that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _held_before(load: Load) -> int | None:
    build(load.detector)
    return peak_memory()


def _try(load: Load, batch: int) -> tuple[int | None, float] | None:
    """Train in this process; gives its peak and the speed, or None where the memory ran out."""
    try:
        speed = train_worst(build(load.detector), load, batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    return peak_memory(), speed
