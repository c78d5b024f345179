"""Train variants of a detector under the same budget and compare them: the paper's ablation, and recipes.

Usage: python benchmarks/ablation.py --table modules --train bccd/train.json --val bccd/val.json --test bccd/test.json \
           --steps 480 --batch 24 --seeds 3 --out runs/ablation
       python benchmarks/ablation.py --table recipe ... --start mobilenet_v2.pth

Every variant is `refinedet train` with the same data, steps, batch and start, and settings of its own; its last
averaged weights are scored on the test data. --start is an ImageNet backbone, or a detector ("bundled" or a file) of
which each variant takes what fits. The table tells each variant's AP50 and AP, mean over seeds and each seed, and the
difference to the first row with a 95 % interval over pictures, drawn together for all seeds. curve.png shows AP50 on
the validation data over pictures seen.

Finished runs are kept, an interrupted one goes on where it was: call again with the same options. --report only makes
the table of what is finished. Every run needs what one training needs; seven rows with three seeds at 480 steps of 24
pictures are about six hours of one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot
from numpy.typing import NDArray

from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.evaluate import collect_saved, resample
from refinedet_cli.engine.results import read_results
from refinedet_cli.metrics.intervals import Rounds, differences, draw_pictures

EVALUATIONS = 12
ROUNDS = 1000
COMMAND = (sys.executable, "-c", "from refinedet_cli.cli.app import run; run()")


class Variant(NamedTuple):
    """One row: what it is called and how it differs.

    Attributes:
        title: for people.
        preset: of its detector and recipe.
        settings: on top of the preset's.
    """

    title: str
    preset: str = "refinedet320_mobilenetv2"
    settings: tuple[str, ...] = ()


_ODM_05 = ("loss.odm_positive_iou=0.5", "loss.odm_negative_iou=0.5")
_BLIND = "network.odm_reads_arm=false"
_NO_FILTER = ("loss.arm_filter=0", "postprocess.arm_filter=0")
# Anchors that are not refined hardly ever overlap an object by 0.7.
_NO_CASCADE = (*_NO_FILTER, "network.arm=false", *_ODM_05)
_GIOU = ("loss.odm_box=giou", "loss.odm_box_weight=2")
_PAPER_RECIPE = (
    "network.tcb_norm=none", "train.optimizer=sgd", "train.lr=0.001", "train.bias_lr=2", "train.backbone_lr=1",
    "train.weight_decay=0.0005", "train.augment.expand_max=4", *_ODM_05, _BLIND,
)  # fmt: skip
MODULES: Mapping[str, Variant] = {
    "refinedet": Variant("RefineDet"),
    "no-filter": Variant("without negative anchor filtering", settings=_NO_FILTER),
    "no-cascade": Variant("and without two-step regression", settings=_NO_CASCADE),
    "no-tcb": Variant("and without transfer connections", settings=(*_NO_CASCADE, "network.tcb=false")),
    "ssd": Variant("SSD", "ssd320_mobilenetv2"),
    "yolo": Variant("YOLO", "yolo320_mobilenetv2"),
}
RECIPE: Mapping[str, Variant] = {
    "default": Variant("the default recipe"),
    "paper": Variant("the paper's: SGD, no normalisation in the TCB", settings=_PAPER_RECIPE),
    "ssd": Variant("SSD, the default recipe", "ssd320_mobilenetv2"),
    "arm-0.7-0.3": Variant("ARM matches above 0.7, negatives below 0.3", settings=(
        "loss.arm_positive_iou=0.7", "loss.arm_negative_iou=0.3",
    )),
    "odm-0.5": Variant("ODM matches above 0.5, as in the paper", settings=_ODM_05),
    "odm-0.6": Variant("ODM matches above 0.6", settings=("loss.odm_positive_iou=0.6", "loss.odm_negative_iou=0.6")),
    "blind": Variant("the ODM does not read the ARM, as in the paper", settings=(_BLIND,)),
    "odm-0.5-blind": Variant("both as in the paper", settings=(*_ODM_05, _BLIND)),
    "giou": Variant("GIoU for the ODM's boxes", settings=_GIOU),
    "cascade": Variant("GIoU whose gradient reaches the ARM", settings=(*_GIOU, "loss.cascade_gradient=true")),
    "quality": Variant("class targets by IoU", settings=("loss.quality=0.5",)),
    "mosaic": Variant("mosaic", settings=("train.augment.mosaic_probability=0.5",)),
    "batch-8": Variant("a third of the batch, three times the steps", settings=("train.batch=8",)),
    "lr-2e-3": Variant("twice the rate", settings=("train.lr=0.002",)),
    "backbone-1": Variant("the backbone at the full rate", settings=("train.backbone_lr=1",)),
}  # fmt: skip
TABLES: Mapping[str, Mapping[str, Variant]] = {"modules": MODULES, "recipe": RECIPE}


class Run(NamedTuple):
    """A variant with a seed, and its folder."""

    name: str
    seed: int
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it is trained and scored."""
        return (self.folder / "test" / "metrics.json").is_file()


class Point(NamedTuple):
    """One evaluation on the validation data."""

    step: int
    ap: float
    ap50: float


def refinedet(arguments: Sequence[str]) -> None:
    """Run one command in a process of its own, with its errors in sight.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)


def train(run: Run, variant: Variant, options: argparse.Namespace) -> None:
    """Train and score one run, from where it was.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    settings = {"train.batch": options.batch}
    settings |= dict(setting.split("=", 1) for setting in variant.settings)
    # Another batch sees as many pictures.
    settings["train.steps"] = options.steps * options.batch // int(settings["train.batch"])
    per_epoch = max(1, len(open_dataset(options.train, split="train").records) // int(settings["train.batch"]))
    settings["train.evaluate_every"] = max(1, round(int(settings["train.steps"]) / per_epoch / EVALUATIONS))
    command = [
        "train", "--data", options.train, "--val", options.val, "--out", str(run.folder), "--preset", variant.preset,
        "--seed", str(run.seed), "--workers", str(options.workers), "--quiet",
    ]  # fmt: skip
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    for setting in options.set:
        command += ["--set", setting]
    if options.start.endswith((".pth", ".pt")) or options.start == "imagenet":
        command += ["--backbone-weights", options.start]
    elif options.start != "bundled":
        command += ["--weights", options.start]
    if (run.folder / "state.pt").is_file():
        command.append("--resume")
    refinedet(command)
    test = [
        "eval", "--dataset", options.test, "--weights", str(run.folder / "last.safetensors"), "--out",
        str(run.folder / "test"), "--workers", "1", "--quiet",
    ]  # fmt: skip
    refinedet(test)


def read_points(folder: Path) -> list[Point]:
    """Read the evaluations of a run."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Point(int(row["step"]), float(row["AP"] or 0), float(row["AP50"] or 0)) for row in rows]


def mean_rounds(runs: Sequence[Run], test: str, drawn: NDArray[np.int64]) -> tuple[Rounds, NDArray[np.float64]]:
    """Score the runs of a variant on the same drawings of the test pictures.

    Returns:
        the mean over the runs, and float64[runs, 3]: AP, AP50 and AP75 of each.
    """
    dataset = open_dataset(test, split="test")
    scored = [
        resample(collect_saved(read_results(run.folder / "test" / "detections.json"), dataset), drawn, None)
        for run in runs
    ]
    overall, classes = (np.mean([getattr(r, name) for r in scored], axis=0) for name in ("overall", "classes"))
    return replace(scored[0], overall=overall, classes=classes), np.stack([r.overall[0] for r in scored])


def table(variants: Mapping[str, Variant], runs: Sequence[Run], test: str) -> list[str]:
    """Lay the finished runs out as a Markdown table; the first variant is what the others are compared with."""
    pictures = len(open_dataset(test, split="test").records)
    drawn = draw_pictures(pictures, ROUNDS, seed=0)
    lines = ["| variant | AP50 | each seed | AP | each seed | AP50 less the first row's | AP less the first row's |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    first: Rounds | None = None
    for name, variant in variants.items():
        finished = [run for run in runs if run.name == name and run.finished]
        if not finished:
            continue
        rounds, each = mean_rounds(finished, test, drawn)
        cells = [variant.title]
        for column in (1, 0):
            cells += [f"{rounds.overall[0, column]:.3f}", ", ".join(f"{value:.3f}" for value in each[:, column])]
        if first is None:
            first = rounds
            cells += ["", ""]
        else:
            gains = differences(rounds, first).overall
            cells += [f"{gains[i].value:+.3f} ({gains[i].low:+.3f} to {gains[i].high:+.3f})" for i in (1, 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(variants: Mapping[str, Variant], runs: Sequence[Run], batch: int, out: Path) -> None:
    """Draw AP50 on the validation data over the pictures seen: the mean of the seeds, and from least to most."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (name, variant) in enumerate(variants.items()):
        curves = [read_points(run.folder) for run in runs if run.name == name and run.finished]
        if not curves:
            continue
        size = int(dict(s.split("=", 1) for s in variant.settings).get("train.batch", batch))
        seen = [p.step * size for p in curves[0]]
        values = np.array([[p.ap50 for p in curve] for curve in curves])
        axes.plot(seen, values.mean(axis=0), "o-", color=f"C{i}", label=variant.title, markersize=3)
        if len(curves) > 1:
            axes.fill_between(seen, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15)
    axes.set(xlabel="pictures seen", ylabel="AP50 on the validation data", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="modules")
    parser.add_argument("--only", nargs="+", default=[], help="names of the rows to train; the first row always is")
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--start", default="bundled", help="bundled, a detector, an ImageNet backbone, or none")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for all rows")
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    variants = TABLES[options.table]
    unknown = set(options.only) - variants.keys()
    if unknown:
        parser.error(f"no row is called {', '.join(sorted(unknown))}; there are {', '.join(variants)}")
    names = [n for i, n in enumerate(variants) if not options.only or n in options.only or i == 0]
    # Seed by seed, so that what is there when time runs out compares all rows.
    runs = [Run(name, seed, options.out / f"{name}-{seed}") for seed in range(options.seeds) for name in names]
    for run in runs:
        if not (options.report or run.finished):
            print(f"{run.name}, seed {run.seed}", file=sys.stderr)
            train(run, variants[run.name], options)
    lines = table(variants, runs, options.test)
    budget = {k: str(getattr(options, k)) for k in ("train", "val", "test", "start", "steps", "batch", "seeds", "set")}
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (options.out / "budget.json").write_text(json.dumps(budget, indent=1), encoding="utf-8")
    plot(variants, runs, options.batch, options.out / "curve.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
