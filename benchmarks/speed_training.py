"""Steps of a training, timed: what matching and loss cost in them, and how many pictures they take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from speed_timing import Bench, Finding, milliseconds, number, share, synchronise
from torch import Tensor

from refinedet_cli.core.build import build
from refinedet_cli.core.config import TrainConfig
from refinedet_cli.core.detector import Detector, Loss
from refinedet_cli.core.loss import OverAll, alone
from refinedet_cli.core.presets import VOC_CLASSES, get_preset
from refinedet_cli.core.structures import LossParts, Target, Targets
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import Batch
from refinedet_cli.engine.device import Precision, select_precision
from refinedet_cli.engine.recipe import fewest_frozen
from refinedet_cli.engine.train import RunOptions, rehearse

# Of a picture in turn: about as many as pictures of VOC (2.4) and COCO (7.3) have in the mean.
OBJECTS = (1, 2, 3, 5, 14)
# The first steps make the optimiser's state, and find algorithms.
WARM_UP_STEPS = 3


class Steps(NamedTuple):
    """Steps of a training.

    Attributes:
        seconds: of each step.
        criterion: seconds of matching, loss, and its gradient for the network's output, of each step; empty unless
            asked for.
        precision: of the network.
    """

    seconds: tuple[float, ...]
    criterion: tuple[float, ...]
    precision: Precision


class TimedCriterion:
    """A criterion that goes back to the network's output at once, so that all it costs is in one piece.

    Its loss has the value and the gradients of the criterion's own; beside it a step pays for one product and sum over
    the network's output more.
    """

    def __init__(self, criterion: Loss, bench: Bench) -> None:
        self._criterion, self._bench = criterion, bench
        self.seconds: list[float] = []

    def __call__(self, raw: Any, targets: Targets, *, over_all: OverAll = alone) -> LossParts:
        """Compute the loss of some pictures; see `Loss`."""
        synchronise(self._bench.device)
        start = self._bench.clock()
        leaves = raw._replace(**{n: t.detach().requires_grad_() for n, t in _learning(raw).items()})
        loss = self._criterion(leaves, targets, over_all=over_all)
        pulls = torch.autograd.grad(loss.total, list(_learning(leaves).values()), materialize_grads=True)
        synchronise(self._bench.device)
        self.seconds.append(self._bench.clock() - start)
        pulled = torch.stack([(t * pull).sum() for t, pull in zip(_learning(raw).values(), pulls, strict=True)]).sum()
        return loss._replace(total=pulled + (loss.total - pulled).detach())


def _learning(raw: Any) -> dict[str, Tensor]:
    return {n: t for n, t in raw._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()}


def train_steps(
    bench: Bench, preset: str, batch: int, *, precision: Precision | None = None, criterion: bool = False
) -> Steps:
    """Take steps as `refinedet train` does, by a preset's recipe, on pictures of noise that are in memory already.

    Args:
        bench: its rounds are steps.
        preset: detector and recipe; every stage that is ever trained is.
        batch: pictures a step.
        precision: None leaves it to the device.
        criterion: time matching and loss, too.
    """
    made = get_preset(preset, VOC_CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build(made.detector)
    timed = TimedCriterion(detector.criterion, bench)
    if criterion:
        detector = replace(detector, criterion=timed)
    config = _few_steps(made.train, batch, WARM_UP_STEPS + bench.rounds)
    used = precision or select_precision(config.precision, bench.device)
    options = RunOptions(
        out=bench.folder, device=bench.device, precision=used, workers=0, cache=False, resume=False,
        should_stop=lambda: False, provenance={},
    )  # fmt: skip
    given = noise_batch(detector, batch, pin=bench.device.type == "cuda")
    ends: list[float] = []

    def after_step(seconds: Sequence[float]) -> bool:
        ends.append(bench.clock())
        return len(ends) == config.steps

    data = _nothing_read(detector, batch)
    rehearse(detector, data, config, options, after_step, itertools.repeat(given, config.steps))
    seconds = tuple(end - start for start, end in itertools.pairwise(ends))
    return Steps(seconds[WARM_UP_STEPS - 1 :], tuple(timed.seconds[WARM_UP_STEPS:]), used)


def _few_steps(config: TrainConfig, batch: int, steps: int) -> TrainConfig:
    return replace(
        config, batch=batch, steps=steps, small_input=(), balance=0.0, patience=0, unfreeze=(),
        freeze_stages=fewest_frozen(config),
    )  # fmt: skip


def noise_batch(detector: Detector, batch: int, *, pin: bool) -> Batch:
    """Draw pictures of noise with as many objects as real ones have."""
    generator = torch.Generator().manual_seed(0)
    size = detector.config.preprocess
    targets = []
    for objects in itertools.islice(itertools.cycle(OBJECTS), batch):
        low = torch.rand(objects, 2, generator=generator) * 0.6
        sides = 0.05 + torch.rand(objects, 2, generator=generator) * 0.35
        labels = torch.randint(1, len(detector.config.classes) + 1, (objects,), generator=generator)
        targets.append(Target(torch.cat([low, low + sides], dim=1), labels))
    images = torch.randn(batch, 3, size.height, size.width, generator=generator)
    return Batch(images.pin_memory() if pin else images, Targets.pack(targets), tuple(range(batch)))


def _nothing_read(detector: Detector, count: int) -> Dataset:
    """Stand in for data of which no picture is read."""
    nothing = np.zeros(0)
    record = Record(
        image_id=0, path=Path(), width=1, height=1, boxes=np.zeros((0, 4)), labels=nothing.astype(np.int64),
        areas=nothing, crowd=nothing.astype(bool), difficult=nothing.astype(bool),
        annotation_ids=nothing.astype(np.int64), file_name="noise",
    )  # fmt: skip
    records = tuple(replace(record, image_id=i, file_name=f"noise {i}") for i in range(count))
    return Dataset("noise", detector.config.classes, records)


def criterion_share(bench: Bench, preset: str, batch: int) -> Finding:
    """Tell what part of a training step matching and loss are."""
    steps = train_steps(bench, preset, batch, criterion=True)
    part, whole = (milliseconds(values).median for values in (steps.criterion, steps.seconds))
    size = get_preset(preset, VOC_CLASSES).detector.preprocess
    return Finding(
        work=f"matching and loss in a training step, {preset}, {batch} pictures of {size.width} px, {steps.precision}",
        ours=f"{number(part)} of {number(whole)} ms",
        figure=share(steps.criterion, steps.seconds),
        unit="%",
        target=10.0,
        sense="under",
        seconds={"criterion": steps.criterion, "step": steps.seconds},
        facts={"objects_a_picture": sum(_counts(batch)) / batch},
    )


def _counts(batch: int) -> Sequence[int]:
    return list(itertools.islice(itertools.cycle(OBJECTS), batch))
