"""Plot validation AP over pictures seen, for runs that continue each other.

Usage: python benchmarks/curve.py runs/mix20-192 runs/mix20-320 --out docs/training.png
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot


class Point(NamedTuple):
    """One evaluation: pictures seen by then, and what the averaged weights scored."""

    pictures: int
    ap: float
    ap50: float


def read_points(run: Path, before: int) -> list[Point]:
    """Read the evaluations of a run that began after ``before`` pictures."""
    batch = json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]["batch"]
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [
            Point(before + int(row["step"]) * batch, float(row["AP"] or 0), float(row["AP50"] or 0))
            for row in csv.DictReader(file)
        ]


def main() -> None:
    """Plot the runs that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, in order")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write")
    options = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    before = 0
    for i, run in enumerate(options.runs):
        points = read_points(run, before)
        thousands = [p.pictures / 1000 for p in points]
        colour = f"C{i}"
        axes.plot(thousands, [p.ap50 for p in points], f"{colour}o-", label=f"AP50, {run.name}")
        axes.plot(thousands, [p.ap for p in points], f"{colour}o--", label=f"AP, {run.name}", markersize=3)
        before = points[-1].pictures
        for p in points:
            print(f"{run.name}\t{p.pictures}\tAP {p.ap:.3f}\tAP50 {p.ap50:.3f}")
    axes.set(xlabel="thousand pictures seen", ylabel="on the validation pictures", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main()
