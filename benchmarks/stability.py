"""Try to make training fail: short runs of the `tiny` preset from random weights, with every step checked.

Usage: python benchmarks/stability.py --seeds 10 --steps 200

The pictures are drawn here, one class: a quarter shows nothing, a quarter is crowded (boxes that repeat exactly, a
sliver, a speck and boxes of the whole picture among them), the rest holds up to three squares. They go through the
project's own augmentation, network, loss, optimiser and warm-up. A row of the table is one combination of batch,
precision, learning rate and backbone normalisation ("frozen" is the preset's, "learned" updates its statistics); its
columns count, over all seeds, the steps whose loss, gradients or resulting weights were not finite. A run ends at its
first such step.

Exit code 1 if any count is not 0.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, TrainConfig
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import Batch, Plan, TrainingSet, collate
from refinedet_cli.engine.device import DeviceName, Precision, select_device
from refinedet_cli.engine.recipe import freeze, input_sizes, learning_rate, make_optimizer

CLASSES = Classes(names=("square",), category_ids=(1,))
PICTURES = 24
WIDTH, HEIGHT = 96, 80
BATCHES = (1, 8)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
RATES = (1e-3, 4e-3)
NORMS = ("frozen", "learned")


class Combination(NamedTuple):
    """What a row of the table is about."""

    batch: int
    precision: Precision
    lr: float
    norm: str


@dataclass
class Tally:
    """What happened to one combination over all seeds.

    Attributes:
        steps: done.
        loss, gradients, weights: steps that were not finite in these.
        first, last: sums over the seeds of the mean loss of the first and of the last tenth of a run.
        seconds: in all steps.
    """

    steps: int = 0
    loss: int = 0
    gradients: int = 0
    weights: int = 0
    first: float = 0.0
    last: float = 0.0
    seconds: float = 0.0

    @property
    def failures(self) -> int:
        """Counts of everything that was not finite, together."""
        return self.loss + self.gradients + self.weights


def draw_pictures(folder: Path, seed: int) -> Dataset:
    """Draw the pictures of a seed into a folder."""
    generator = np.random.default_rng(seed)
    records = []
    for index in range(PICTURES):
        boxes = _draw_boxes(index, generator)
        pixels = generator.integers(0, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        for left, top, right, bottom in boxes.astype(int):
            pixels[top:bottom, left:right] = generator.integers(120, 256, 3)
        path = folder / f"{seed}-{index}.png"
        Image.fromarray(pixels).save(path)
        count = len(boxes)
        records.append(
            Record(
                image_id=index,
                path=path,
                width=WIDTH,
                height=HEIGHT,
                boxes=boxes,
                labels=np.ones(count, np.int64),
                areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
                crowd=np.zeros(count, bool),
                difficult=np.zeros(count, bool),
                annotation_ids=np.arange(count),
                file_name=path.name,
            )
        )
    return Dataset("squares", CLASSES, tuple(records))


def _draw_boxes(index: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Draw the boxes float64[N, 4], xyxy, px-img, of a picture: none, a crowd, or a few, by turns."""
    if index % 4 == 0:
        return np.zeros((0, 4))
    crowded = index % 4 == 1
    count = int(generator.integers(60, 150)) if crowded else index % 4 - 1 + int(generator.integers(0, 2))
    sides = generator.integers(2, 16, count) if crowded else generator.integers(10, 60, count)
    low = np.stack([generator.integers(0, WIDTH - sides), generator.integers(0, HEIGHT - sides)], axis=1)
    boxes = np.concatenate([low, low + sides[:, None]], axis=1).astype(np.float64)
    if not crowded:
        return boxes
    whole, sliver, speck = (0, 0, WIDTH, HEIGHT), (0, 40, WIDTH, 40.5), (50, 50, 50.25, 50.25)
    return np.concatenate([boxes, boxes[: count // 2], [whole, whole, sliver, speck]])


def recipe(combination: Combination, seed: int) -> Preset:
    """Give the `tiny` preset as a combination changes it; warm-up and everything else stay the preset's."""
    base = tiny(CLASSES)
    train = replace(
        base.train,
        batch=combination.batch,
        lr=combination.lr,
        freeze_norm=combination.norm == "frozen",
        seed=seed,
    )
    return replace(base, train=train)


def make_batches(dataset: Dataset, preset: Preset, steps: int) -> list[Batch]:
    """Make the first batches of a run as training would."""
    config = preset.train
    samples = TrainingSet(dataset, config.augment, config.seed)
    samples.fill_cache(1, lambda: None)
    epochs = -(-steps * config.batch // PICTURES)
    plan = Plan(PICTURES, config.batch, epochs, config.seed, input_sizes(preset.detector.preprocess, config))
    return [collate([samples[draw] for draw in draws]) for draws in itertools.islice(plan.batches(0), steps)]


class Run:
    """One training run, a step at a time."""

    def __init__(self, preset: Preset, device: torch.device, precision: Precision, steps: int) -> None:
        torch.manual_seed(preset.train.seed)
        self.detector = build(preset.detector)
        self.network = self.detector.network.to(device).to(memory_format=torch.channels_last)
        self.config: TrainConfig = preset.train
        self.device, self.precision, self.steps = device, precision, steps
        freeze(self.network, self.config)
        self.optimizer = make_optimizer(self.network, self.config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.state = [t for t in self.network.state_dict().values() if t.is_floating_point()]

    def step(self, batch: Batch, index: int, tally: Tally) -> float:
        """Train on a batch, count what is not finite, and return the loss."""
        factor = learning_rate(self.config, index, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        images = batch.images.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext():
            raw = self.network(images)
        loss = self.detector.criterion(raw, batch.targets.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        # A norm is finite only if all it is computed from is finite.
        norm: Tensor = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        tally.steps += 1
        tally.loss += not all(bool(term.isfinite()) for term in (loss.total, *loss.parts.values()))
        tally.gradients += not bool(norm.isfinite())
        tally.weights += not bool(nn.utils.get_total_norm(self.state).isfinite())
        return float(loss.total.detach())


def train(run: Run, batches: Sequence[Batch], tally: Tally) -> None:
    """Train to the end or to the first step that is not finite."""
    losses: list[float] = []
    before = tally.failures
    begin = time.monotonic()
    for index, batch in enumerate(batches):
        losses.append(run.step(batch, index, tally))
        if tally.failures > before:
            break
    tally.seconds += time.monotonic() - begin
    tenth = max(1, len(batches) // 10)
    tally.first += float(np.mean(losses[:tenth]))
    tally.last += float(np.mean(losses[-tenth:]))


def measure(
    seeds: int, steps: int, device: torch.device, rates: Sequence[float], norms: Sequence[str]
) -> dict[Combination, Tally]:
    """Run every combination for every seed, and print to stderr how far it is."""
    tallies = {Combination(*c): Tally() for c in itertools.product(BATCHES, PRECISIONS, rates, norms)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            dataset = draw_pictures(Path(folder), seed)
            # The samples depend on neither precision, rate nor normalisation.
            batches = {
                size: make_batches(dataset, recipe(Combination(size, "fp32", rates[0], norms[0]), seed), steps)
                for size in BATCHES
            }
            for combination, tally in tallies.items():
                run = Run(recipe(combination, seed), device, combination.precision, steps)
                train(run, batches[combination.batch], tally)
            failures = sum(tally.failures for tally in tallies.values())
            print(f"{seed + 1} of {seeds} seeds: {failures} not finite", file=sys.stderr)
    return tallies


def table(tallies: dict[Combination, Tally], seeds: int) -> str:
    """Lay the counts out, one combination a line."""
    head = (
        f"{'batch':>5}  {'precision':9}  {'lr':>6}  {'norm':7}  {'steps':>6}  {'loss':>5}  {'gradients':>9}  "
        f"{'weights':>7}  {'loss from':>9}  {'to':>6}  {'ms/step':>7}"
    )
    lines = [
        f"{c.batch:5}  {c.precision:9}  {c.lr:6g}  {c.norm:7}  {t.steps:6}  {t.loss:5}  {t.gradients:9}  "
        f"{t.weights:7}  {t.first / seeds:9.2f}  {t.last / seeds:6.2f}  {1000 * t.seconds / t.steps:7.1f}"
        for c, t in tallies.items()
    ]
    return "\n".join([head, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, measure, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="Count steps of training that are not finite.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates")
    parser.add_argument("--norms", choices=NORMS, nargs="+", default=NORMS, help="of the backbone")
    options = parser.parse_args(argv)
    if min(options.seeds, options.steps, options.threads) < 1:
        parser.error("--seeds, --steps and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    name: DeviceName = options.device
    begin = time.monotonic()
    tallies = measure(options.seeds, options.steps, select_device(name), options.rates, options.norms)
    print(table(tallies, options.seeds))
    failures, steps = sum(t.failures for t in tallies.values()), sum(t.steps for t in tallies.values())
    print(f"{failures} not finite in {steps:,} steps; {time.monotonic() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
