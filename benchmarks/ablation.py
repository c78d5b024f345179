"""Train variants of a detector under the same budget and compare them: the paper's ablation, and recipes.

Usage: python benchmarks/ablation.py --table modules --train bccd/train.json --val bccd/val.json --test bccd/test.json \
           --steps 480 --batch 24 --seeds 3 --out runs/ablation
       python benchmarks/ablation.py --table recipe ... --start mobilenet_v2.pth

Every variant is `refinedet train` with the same data, steps, batch and start, and settings of its own; its last
averaged weights are scored on the test data. --start is an ImageNet backbone, or a detector ("bundled" or a file) of
which each variant takes what fits. The table tells each variant's AP50 and AP, mean over seeds and each seed, and the
difference to the first row with a 95 % interval over pictures, drawn together for all seeds. A second table and
curve.png follow AP on the validation data over the pictures seen, and say where rows cross the first.

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
    "network.tcb_norm=none", "network.head_init=xavier", "train.optimizer=sgd", "train.lr=0.001", "train.bias_lr=2",
    "train.backbone_lr=1", "train.weight_decay=0.0005", "train.augment.expand_max=4", *_ODM_05, _BLIND,
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
    "xavier": Variant("heads begin as in the paper", settings=("network.head_init=xavier",)),
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


class Curve(NamedTuple):
    """The evaluations of a variant on the validation data.

    Attributes:
        title: of the variant.
        seen: int64[points], pictures.
        scores: float64[seeds, points, 2], AP and AP50.
    """

    title: str
    seen: NDArray[np.int64]
    scores: NDArray[np.float64]


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


def read_curves(variants: Mapping[str, Variant], runs: Sequence[Run], batch: int) -> list[Curve]:
    """Read the evaluations of all finished runs, variant by variant."""
    curves = []
    for name, variant in variants.items():
        size = int(dict(s.split("=", 1) for s in variant.settings).get("train.batch", batch))
        steps, scores = [], []
        for run in runs:
            if run.name == name and run.finished:
                with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
                steps = [int(row["step"]) for row in rows]
                scores.append([(float(row["AP"] or 0), float(row["AP50"] or 0)) for row in rows])
        if scores:
            curves.append(Curve(variant.title, np.array(steps) * size, np.array(scores)))
    return curves


def follow(curves: Sequence[Curve]) -> list[str]:
    """Lay AP out over the pictures seen, the mean of the seeds and from least to most, and name who leads where.

    Variants evaluated at other points than the first are left to the plot.
    """
    first = curves[0]
    alike = [curve for curve in curves if np.array_equal(curve.seen, first.seen)]
    lines = [f"| pictures seen | {' | '.join(curve.title for curve in alike)} |", "| --- |" + " --- |" * len(alike)]
    for i, seen in enumerate(first.seen):
        points = [curve.scores[:, i, 0] for curve in alike]
        cells = [f"{p.mean():.3f} ({p.min():.3f} to {p.max():.3f})" for p in points]
        lines.append(f"| {seen:,} | {' | '.join(cells)} |")
    for curve in alike[1:]:
        lead = first.scores[..., 0].mean(axis=0) - curve.scores[..., 0].mean(axis=0)
        crossings = [f"{first.seen[i]:,}" for i in range(1, len(lead)) if (lead[i] > 0) != (lead[i - 1] > 0)]
        ahead = first.title if lead[0] > 0 else curve.title
        turns = f", the lead changes at {', '.join(crossings)}" if crossings else " and stays there"
        lines += ["", f"Mean AP, {first.title} against {curve.title}: {ahead} begins ahead{turns}."]
    return lines


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


def plot(curves: Sequence[Curve], out: Path) -> None:
    """Draw AP and AP50 on the validation data over the pictures seen: the mean of the seeds, and from least to most."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for column, (axes, metric) in enumerate(zip(panels, ("AP", "AP50"), strict=True)):
        for i, curve in enumerate(curves):
            values = curve.scores[..., column]
            axes.plot(curve.seen, values.mean(axis=0), "o-", color=f"C{i}", label=curve.title, markersize=3)
            if len(values) > 1:
                axes.fill_between(curve.seen, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15)
        axes.set(xlabel="pictures seen", ylabel=f"{metric} on the validation data", xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize="small", loc="best")
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
    curves = read_curves(variants, runs, options.batch)
    lines = [*table(variants, runs, options.test), "", *follow(curves)]
    budget = {k: str(getattr(options, k)) for k in ("train", "val", "test", "start", "steps", "batch", "seeds", "set")}
    (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (options.out / "budget.json").write_text(json.dumps(budget, indent=1), encoding="utf-8")
    plot(curves, options.out / "curve.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
