"""How much of a data set anchors match: the paper's, those of k-means, and those that the search proposes.

Usage: python benchmarks/anchors.py DATA [DATA ...] --seeds 5
       python benchmarks/anchors.py --million

Each DATA needs a train and a val part. Everything is chosen on train; a row tells, in percent, what val makes of it at
320 x 320: objects whose best overlap is at least 0.5 (and of these the gain over the paper's anchors with its 95 %
interval over pictures), their share in the worst quarter of the classes and in the smallest fifth, objects that live on
one forced match, and positives of an object. All rows have at most the 6,375 anchors of the paper, but the last one,
which may have twice as many and shows how much more the rest is worth. "k-means" clusters widths and heights and deals
the clusters out to the levels by area, three each.

--million times coverage and best overlaps of a million drawn boxes in 100,000 pictures. Pictures are never read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from refinedet_cli.core.anchor_coverage import ObjectSet, best_ious, coverage
from refinedet_cli.core.anchor_design import Gain, design, gain_interval, measure_fit
from refinedet_cli.core.config import AnchorConfig
from refinedet_cli.core.presets import paper_anchors
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.anchors import gather

SIZE = (320, 320)
BUDGET = 6375
HEAD = (
    f"{'anchors':22}  {'number':>6}  {'train':>5}  {'val':>5}  {'gain and interval':>20}  {'worst':>5}  {'small':>5}  "
    f"{'forced':>6}  {'positives':>9}  {'s':>5}"
)


class Row(NamedTuple):
    """One set of anchors on one data set; shares in 0..1."""

    name: str
    anchors: AnchorConfig
    train: float
    val: float
    gain: Gain
    worst: float
    small: float
    forced: float
    positives: float
    seconds: float

    def text(self) -> str:
        """Lay the row out below `HEAD`."""
        gain, low, high = (100 * value for value in self.gain)
        interval = f"{gain:+5.1f} [{low:+5.1f}, {high:+5.1f}]"
        train, val, worst, small, forced = (
            100 * share for share in (self.train, self.val, self.worst, self.small, self.forced)
        )
        return (
            f"{self.name:22}  {count(self.anchors):6,}  {train:5.1f}  {val:5.1f}  {interval:>20}  {worst:5.1f}  "
            f"{small:5.1f}  {forced:6.1f}  {self.positives:9.2f}  {self.seconds:5.1f}"
        )


def count(anchors: AnchorConfig) -> int:
    """Anchors of one picture."""
    cells = ((SIZE[0] // stride) * (SIZE[1] // stride) for stride in anchors.strides)
    return sum(n * len(shapes) for n, shapes in zip(cells, anchors.shapes, strict=True))


def cluster(objects: ObjectSet) -> AnchorConfig:
    """Three clusters of widths and heights for every level, by area."""
    sizes = objects.boxes[:, 2:] - objects.boxes[:, :2]
    by_area = sizes[np.argsort(sizes.prod(axis=1))]
    beginnings = by_area[((np.arange(12) + 0.5) / 12 * len(sizes)).astype(int)]
    # Clusters that repeat a size exactly end up empty, which SciPy warns of and leaves where they were.
    found, _ = kmeans2(sizes, beginnings + np.arange(12)[:, None] * 1e-6, minit="matrix", missing="warn")
    found = found[np.argsort(found.prod(axis=1))]
    return replace(
        paper_anchors(),
        shapes=tuple(tuple((float(w), float(h)) for w, h in found[at : at + 3]) for at in range(0, 12, 3)),
    )


def measure(name: str, anchors: AnchorConfig, train: ObjectSet, val: ObjectSet, seconds: float) -> Row:
    """Compare anchors with the paper's on val."""
    before, after = (best_ious(val.boxes, a, SIZE) for a in (paper_anchors(), anchors))
    fit, found = measure_fit(val, after), coverage(val, anchors, SIZE)
    return Row(
        name,
        anchors,
        measure_fit(train, best_ious(train.boxes, anchors, SIZE)).matched,
        fit.matched,
        gain_interval(val, before, after, generator=np.random.default_rng(0)),
        fit.tail,
        fit.smallest,
        float(found.forced.mean()),
        float(found.positives.mean()),
        seconds,
    )


def rows_of(train: ObjectSet, val: ObjectSet, classes: int, seeds: int) -> Iterator[Row]:
    """Measure every kind of anchors on one data set."""
    yield measure("paper", paper_anchors(), train, val, 0.0)
    begin = time.perf_counter()
    clusters = cluster(train)
    yield measure("k-means", clusters, train, val, time.perf_counter() - begin)
    for budget, tries in ((BUDGET, seeds), (2 * BUDGET, 1)):
        for seed in range(tries):
            begin = time.perf_counter()
            proposal = design(train, val, paper_anchors(), SIZE, budget=budget, seed=seed, classes=classes)
            name = "search, twice as many" if budget > BUDGET else f"search, seed {seed}"
            name += "" if proposal.accepted else " (refused)"
            yield measure(name, proposal.found, train, val, time.perf_counter() - begin)


def million(pictures: int = 100_000, each: int = 10) -> str:
    """Time coverage on drawn boxes whose sides are those of common data: 5 to 300 px, most of them small."""
    generator = np.random.default_rng(0)
    number = pictures * each
    size = np.exp(generator.uniform(np.log(5), np.log(300), (number, 1)) + generator.normal(0, 0.3, (number, 2)))
    size = np.minimum(size, SIZE[0])
    corner: NDArray[np.float64] = generator.uniform(0, 1, (number, 2)) * (SIZE[0] - size)
    boxes = np.concatenate([corner, corner + size], axis=1)
    objects = ObjectSet(boxes, np.ones(number, dtype=np.int64), np.repeat(np.arange(pictures), each), pictures)
    begin = time.perf_counter()
    found = coverage(objects, paper_anchors(), SIZE)
    middle = time.perf_counter()
    best = best_ious(boxes, paper_anchors(), SIZE)
    end = time.perf_counter()
    return (
        f"{number:,} boxes, {pictures:,} pictures: coverage {middle - begin:.1f} s, best overlaps alone "
        f"{end - middle:.1f} s; matched {100 * found.share(0.5):.2f} % and {100 * np.mean(best >= 0.5):.2f} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the options, measure, print the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="data sets with a train and a val part")
    parser.add_argument("--seeds", type=int, default=5, help="restarts of the search")
    parser.add_argument("--million", action="store_true", help="time a million boxes")
    options = parser.parse_args(argv)
    if not options.data and not options.million:
        parser.error("name a data set, or --million")
    for source in options.data:
        train, val = (open_dataset(source, split=split) for split in ("train", "val"))
        fitted, judged = gather(train, SIZE).boxes, gather(val, SIZE).boxes
        print(f"{source}: {len(fitted.boxes):,} objects to fit, {len(judged.boxes):,} to judge\n{HEAD}")
        found = []
        for row in rows_of(fitted, judged, train.classes.with_background, options.seeds):
            print(row.text(), flush=True)
            found += [100 * row.val] if row.name.startswith("search, seed") else []
        if found:
            print(f"over {len(found)} seeds: {min(found):.1f} to {max(found):.1f}, mean {np.mean(found):.2f}\n")
    if options.million:
        print(million())
    return 0


if __name__ == "__main__":
    sys.exit(main())
