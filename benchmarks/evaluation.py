"""How fast scoring is: both COCO engines on detections of the size of COCO val2017, and the bootstrap.

    python benchmarks/evaluation.py [--pictures 5000] [--objects 36781] [--detections 187000] [--rounds 1000]

Boxes are drawn at random in the proportions of COCO (80 classes, few large objects); the detections are jittered copies
of objects and stray boxes. Prints a table; the arrays of both engines are compared to the bit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from refinedet_cli.metrics.coco import CocoResult, PictureDetections, PictureTruth, evaluate_coco
from refinedet_cli.metrics.fast_coco import evaluate_coco_fast, probe
from refinedet_cli.metrics.intervals import draw_pictures, estimates, resample_coco

T = TypeVar("T")
CLASSES = 80
ARRAYS = ("precision", "recall", "scores")


def drawn(pictures: int, objects: int, detections: int) -> tuple[list[PictureTruth], list[PictureDetections]]:
    """Draw pictures of 640 x 480 px with objects and detections spread unevenly over them and over the classes."""
    draw = np.random.default_rng(0)
    popularity = 1 / np.arange(1, CLASSES + 1)
    popularity /= popularity.sum()
    crowding = draw.gamma(0.8, size=pictures)
    counts = np.bincount(draw.choice(pictures, objects, p=crowding / crowding.sum()), minlength=pictures)
    truths, found = [], []
    share = detections / max(1, objects)
    for image_id, count in enumerate(counts.tolist(), start=1):
        side = np.exp(draw.normal(4.0, 1.0, (count, 2))).clip(4, 470)
        corner = draw.random((count, 2)) * (np.array([640.0, 480.0]) - side).clip(1)
        boxes = np.concatenate([corner, corner + side], axis=1)
        labels = draw.choice(CLASSES, count, p=popularity) + 1
        truths.append(PictureTruth(image_id, boxes, labels, side.prod(axis=1) * 0.6, draw.random(count) < 0.01))
        copies = draw.integers(0, count, round(share * count)) if count else np.zeros(0, np.int64)
        noise = draw.normal(0, 0.15, (len(copies), 4)) * np.tile(side[copies], 2)
        near = boxes[copies] + noise
        near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:]) + 1], axis=1)
        kinds = np.where(draw.random(len(copies)) < 0.7, labels[copies], draw.integers(1, CLASSES + 1, len(copies)))
        found.append(PictureDetections(image_id, near, draw.random(len(copies)).round(4), kinds))
    return truths, found


def same_arrays(one: CocoResult, other: CocoResult) -> bool:
    """Compare to the bit."""
    return all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in ARRAYS)


def agree(truths: list[PictureTruth], found: list[PictureDetections], classes: int) -> bool:
    """Tell whether both engines give the same arrays."""
    return same_arrays(evaluate_coco(truths, found, classes), evaluate_coco_fast(truths, found, classes))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Run once and tell the seconds."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36_781)
    parser.add_argument("--detections", type=int, default=187_000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--cases", type=int, default=1000, help="random cases that both engines must agree on")
    options = parser.parse_args()
    truths, found = drawn(options.pictures, options.objects, options.detections)
    console, table = Console(), Table(title="Scoring", title_justify="left")
    for heading in ("Work", "Seconds", "Ratio", "Arrays"):
        table.add_column(heading)
    slow_seconds, slow = timed(lambda: evaluate_coco(truths, found, CLASSES))
    fast_seconds, fast = timed(lambda: evaluate_coco_fast(truths, found, CLASSES))
    is_equal = same_arrays(slow, fast)
    boxes, reported = sum(len(t.labels) for t in truths), sum(len(d.labels) for d in found)
    table.add_row(f"pycocotools, {boxes:,} objects, {reported:,} detections", f"{slow_seconds:.2f}", "1", "")
    table.add_row(
        "hotcoco, the same", f"{fast_seconds:.2f}", f"{slow_seconds / fast_seconds:.0f} x as fast",
        "equal" if is_equal else "DIFFERENT",
    )  # fmt: skip
    seconds, _ = timed(
        lambda: estimates(resample_coco(truths, found, CLASSES, draw_pictures(len(truths), options.rounds, 0)))
    )
    table.add_row(f"{options.rounds:,} bootstrap rounds, the same", f"{seconds:.2f}", "", "")
    different = sum(not agree(*probe(seed), 3) for seed in range(options.cases))
    table.add_row(f"{options.cases:,} random cases with ties, crowds and empty pictures", "", "", f"{different} differ")
    console.print(table)


if __name__ == "__main__":
    main()
