"""Try to make training fail: runs of the `tiny` preset from random weights, with every step checked.

Usage: python benchmarks/stability.py --json stability.json --threads 1

Each of 20 seeds trains for 1,000 steps under every learning rate (1e-3, 4e-3) and precision (fp32, bf16): 80 runs. The
batch sizes, 1 to 32, follow each other through the seeds, so that each rate and precision meets every size three or
four times and all sizes occur equally often, but for one run. The backbone's normalisation is frozen (the preset's) and
learned (what `train --weights none` does) by turns, in such a way that every size meets both.

The pictures are drawn here, one class: a quarter shows nothing, a quarter is crowded (boxes that repeat exactly, a
sliver, a speck and boxes of the whole picture among them), the rest holds up to three squares. A seed changes each of
its 24 pictures 32 times by the project's own augmentation, once for all its runs, and a batch is drawn from these 768
samples. Network, loss, gradients, optimiser, schedule and warm-up are those of `train`.

A row of the table is one batch size, precision and rate; its columns count, over its runs, the steps whose loss,
gradients, decoded boxes of ARM and ODM, or resulting weights were not finite. A run ends at its first such step.

With --json, finished runs are kept in that file and not done again, so that the whole can be done in pieces; --minutes
ends a piece. --time measures a few steps of each batch size instead.

Exit code 1 if any count is not 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.boxes import decode
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.core.structures import Target
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.files import write_json
from refinedet_cli.data.loading import Draw, TrainingSet, collate
from refinedet_cli.engine.device import DeviceName, Precision, select_device
from refinedet_cli.engine.distributed import ALONE
from refinedet_cli.engine.gradients import Gradients
from refinedet_cli.engine.recipe import freeze, learning_rate, make_optimizer

CLASSES = Classes(names=("square",), category_ids=(1,))
PICTURES, TURNS = 24, 32
WIDTH, HEIGHT = 96, 80
BATCHES = (1, 2, 4, 8, 16, 32)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
RATES = (1e-3, 4e-3)
TIMED, WARM_UP = 10, 3

Sample = tuple[Tensor, Target, int]


class Combination(NamedTuple):
    """One run."""

    seed: int
    batch: int
    precision: Precision
    lr: float
    norm: str

    def __str__(self) -> str:
        return f"seed {self.seed}, lr {self.lr:g}, {self.precision}, batch {self.batch}, normalisation {self.norm}"


@dataclass
class Tally:
    """What happened in a run, or in several.

    Attributes:
        runs: how many.
        steps: done.
        loss, gradients, boxes, weights: steps that were not finite in these.
        first, last: sums over the runs of the mean loss of their first and of their last tenth.
        seconds: of the processor, in all steps.
    """

    runs: int = 0
    steps: int = 0
    loss: int = 0
    gradients: int = 0
    boxes: int = 0
    weights: int = 0
    first: float = 0.0
    last: float = 0.0
    seconds: float = 0.0

    @property
    def failures(self) -> int:
        """Counts of everything that was not finite, together."""
        return self.loss + self.gradients + self.boxes + self.weights

    def add(self, other: Tally) -> None:
        """Take the runs of another in."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def combinations(seeds: int) -> Iterator[Combination]:
    """List the runs: all of a seed together, so that the first seeds are a fair part of the whole."""
    cells = [(lr, precision) for lr in RATES for precision in PRECISIONS]
    for seed in range(seeds):
        for cell, (lr, precision) in enumerate(cells):
            # Steps of two through the sizes share what 20 seeds have over three rounds out among them.
            batch = BATCHES[(seed + 2 * cell) % len(BATCHES)]
            yield Combination(seed, batch, precision, lr, "learned" if seed // len(BATCHES) % 2 else "frozen")


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


def recipe(combination: Combination) -> Preset:
    """Give the `tiny` preset as a combination changes it; warm-up and everything else stay the preset's."""
    base = tiny(CLASSES)
    train = replace(
        base.train,
        batch=combination.batch,
        lr=combination.lr,
        freeze_norm=combination.norm == "frozen",
        seed=combination.seed,
    )
    return replace(base, train=train)


def make_samples(dataset: Dataset, seed: int) -> list[Sample]:
    """Change every picture many times, as the epochs of a run would."""
    preset = tiny(CLASSES)
    samples = TrainingSet(dataset, preset.train.augment, seed)
    samples.fill_cache(1, lambda: None)
    return [samples[Draw(i, turn, preset.detector.preprocess)] for turn in range(TURNS) for i in range(PICTURES)]


class Run:
    """One training run, a step at a time."""

    def __init__(self, combination: Combination, samples: Sequence[Sample], device: torch.device, steps: int) -> None:
        preset = recipe(combination)
        torch.manual_seed(combination.seed)
        self.detector = build(preset.detector)
        self.network = self.detector.network.to(device).to(memory_format=torch.channels_last)
        self.config, self.steps = preset.train, steps
        freeze(self.network, self.config, self.config.freeze_stages)
        self.optimizer = make_optimizer(self.network, self.config)
        self.gradients = Gradients(self.detector, precision=combination.precision, micro_batches=1, processes=ALONE)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.state = [t for t in self.network.state_dict().values() if t.is_floating_point()]
        self.samples, self.generator = samples, np.random.default_rng(combination.seed)
        self.size = combination.batch
        size, anchors = preset.detector.preprocess, preset.detector.require_anchors()
        self.anchors, self.variances = tile_anchors(anchors, size.height, size.width).to(device), anchors.variances

    def step(self, index: int, tally: Tally) -> float:
        """Train on a batch, count what is not finite, and return the loss."""
        chosen = self.generator.choice(len(self.samples), self.size, replace=False)
        batch = collate([self.samples[i] for i in chosen])
        begin = time.process_time()
        factor = learning_rate(self.config, index, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        pulled = self.gradients(batch)
        loss, raw = pulled.loss, pulled.raw
        # A norm is finite only if all it is computed from is finite.
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        self.optimizer.step()
        tally.seconds += time.process_time() - begin
        tally.steps += 1
        tally.loss += not all(bool(term.isfinite()) for term in (loss.total, *loss.parts.values()))
        tally.gradients += not bool(norm.isfinite())
        refined = decode(raw.arm_offsets.float(), self.anchors, self.variances)
        boxes = decode(raw.odm_offsets.float(), refined, self.variances)
        tally.boxes += not bool(refined.isfinite().all() & boxes.isfinite().all())
        tally.weights += not bool(nn.utils.get_total_norm(self.state).isfinite())
        return float(loss.total.detach())

    def train(self) -> Tally:
        """Train to the end or to the first step that is not finite."""
        tally = Tally(runs=1)
        losses: list[float] = []
        while len(losses) < self.steps and not tally.failures:
            losses.append(self.step(len(losses), tally))
        tenth = max(1, self.steps // 10)
        tally.first, tally.last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
        return tally


class Store:
    """Finished runs, in a file if there is one.

    Args:
        path: the file, or None.
        steps: of each run; those of the file must be as long.
    """

    def __init__(self, path: Path | None, steps: int) -> None:
        self.path, self.steps = path, steps
        self.done: dict[str, Tally] = {}
        if path is not None and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["steps"] != steps:
                raise SystemExit(f"{path}: its runs have {content['steps']:,} steps, not {steps:,}")
            self.done = {name: Tally(**tally) for name, tally in content["runs"].items()}

    def add(self, combination: Combination, tally: Tally) -> None:
        """Keep a run."""
        self.done[str(combination)] = tally
        if self.path is not None:
            runs = {name: asdict(tally) for name, tally in self.done.items()}
            write_json(self.path, {"torch": str(torch.__version__), "steps": self.steps, "runs": _plain(runs)})


def _plain(runs: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Leave out the losses of runs that failed, which JSON has no form for."""
    return {n: {k: v if np.isfinite(v) else 0.0 for k, v in run.items()} for n, run in runs.items()}


def measure(wanted: Sequence[Combination], store: Store, device: torch.device, minutes: float) -> None:
    """Do the runs that are not done yet, as long as there is time, and print to stderr how far it is."""
    begin, seed, samples = time.process_time(), -1, list[Sample]()
    with tempfile.TemporaryDirectory() as folder:
        for number, combination in enumerate(wanted, start=1):
            if str(combination) in store.done:
                continue
            if combination.seed != seed:
                seed = combination.seed
                samples = make_samples(draw_pictures(Path(folder), seed), seed)
            tally = Run(combination, samples, device, store.steps).train()
            store.add(combination, tally)
            print(
                f"{number} of {len(wanted)}: {combination}: {tally.failures} not finite in {tally.steps:,} steps, "
                f"{1000 * tally.seconds / tally.steps:.0f} ms a step",
                file=sys.stderr,
                flush=True,
            )
            if time.process_time() - begin > minutes * 60:
                return


def table(wanted: Sequence[Combination], store: Store) -> str:
    """Lay the counts of the finished runs out, one batch size, precision and rate a line."""
    rows: dict[tuple[int, Precision, float], Tally] = {}
    for c in sorted(wanted, key=lambda c: (c.batch, PRECISIONS.index(c.precision), c.lr)):
        if str(c) in store.done:
            rows.setdefault((c.batch, c.precision, c.lr), Tally()).add(store.done[str(c)])
    head = (
        f"{'batch':>5}  {'precision':9}  {'lr':>6}  {'runs':>4}  {'steps':>7}  {'loss':>5}  {'gradients':>9}  "
        f"{'boxes':>5}  {'weights':>7}  {'loss from':>9}  {'to':>6}  {'ms/step':>7}"
    )
    lines = [
        f"{batch:5}  {precision:9}  {lr:6g}  {t.runs:4}  {t.steps:7,}  {t.loss:5}  {t.gradients:9}  {t.boxes:5}  "
        f"{t.weights:7}  {t.first / t.runs:9.2f}  {t.last / t.runs:6.2f}  {1000 * t.seconds / t.steps:7.1f}"
        for (batch, precision, lr), t in rows.items()
    ]
    return "\n".join([head, *lines])


def time_steps(wanted: Sequence[Combination], device: torch.device, steps: int) -> str:
    """Measure a few steps of each batch size and precision, and say how long all runs together would take."""
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(draw_pictures(Path(folder), 0), 0)
    cost: dict[tuple[int, Precision], float] = {}
    for batch in BATCHES:
        for precision in PRECISIONS:
            run, tally = Run(Combination(0, batch, precision, RATES[0], "learned"), samples, device, steps), Tally()
            for index in range(WARM_UP + TIMED):
                if index == WARM_UP:
                    begin = time.process_time()
                run.step(index, tally)
            cost[batch, precision] = (time.process_time() - begin) / TIMED
    lines = [f"{batch:5}  {precision:9}  {1000 * seconds:7.1f}" for (batch, precision), seconds in cost.items()]
    total = sum(cost[c.batch, c.precision] for c in wanted) * steps
    head = f"{'batch':>5}  {'precision':9}  {'ms/step':>7}"
    return "\n".join(
        [head, *lines, f"{len(wanted)} runs of {steps:,} steps: {total / 60:.0f} minutes of the processor"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, measure, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="Count steps of training that are not finite.")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000, help="of each run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep finished runs here, and do them once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of the processor; then begin no other run")
    parser.add_argument("--time", action="store_true", help="measure a few steps of each batch size, and do no run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu")
    options = parser.parse_args(argv)
    if min(options.seeds, options.steps, options.threads) < 1:
        parser.error("--seeds, --steps and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    name: DeviceName = options.device
    wanted = list(combinations(options.seeds))
    if options.time:
        print(time_steps(wanted, select_device(name), options.steps))
        return 0
    store = Store(options.json, options.steps)
    measure(wanted, store, select_device(name), options.minutes)
    print(table(wanted, store))
    whole = Tally()
    for combination in wanted:
        whole.add(store.done.get(str(combination), Tally()))
    print(
        f"{whole.failures} not finite in {whole.steps:,} steps of {whole.runs} runs out of {len(wanted)}; "
        f"{whole.seconds / 60:.0f} minutes of the processor"
    )
    return 1 if whole.failures else 0


if __name__ == "__main__":
    sys.exit(main())
