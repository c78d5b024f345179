"""What tiles are worth: large pictures with small objects, and ordinary pictures, with and without --tile.

Usage: python benchmarks/tiling.py DATA [--weights NAME|FILE] [--grid 3] [--mosaics 60] [--tile 400] [--pictures 120]

The large pictures are mosaics: grid x grid pictures of DATA (a fixed draw) side by side, at their own size, with all
their boxes, so that every object is small in its picture although it is not in its own pixels. For ordinary pictures a
tile is half of their longer side. Every look is computed once; the rows differ in which looks count and how they become
one result. "nms" merges by overlap alone (IoU above 0.45), "ios" by the part of the smaller box that lies in the better
one (above 0.5), as other tools do; "merge" is what refinedet does. "twice" counts, for 100 objects, detections of at
least 0.3 that find an object which a better one has found already, and that have half of themselves in it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.preprocess import Window
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.tiling import Tiling, merge, moved
from refinedet_cli.data.dataset import Dataset, Record, remap
from refinedet_cli.data.loading import read_record
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.open_predictor import open_predictor
from refinedet_cli.engine.predict import AnyPredictor, default_batch
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, evaluate_coco

HEAD = f"{'pictures':10}  {'looks at':22}  {'merged by':9}  {'looks':>6}  {'AP':>5}  {'AP50':>5}  {'twice':>5}"
SCORE = 0.3


class Picture(NamedTuple):
    """Pixels uint8[H, W, 3] with boxes float64[N, 4] (xyxy, px-img), labels int64[N] and crowds bool[N]."""

    pixels: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class Looked(NamedTuple):
    """A picture's height and width and objects, and what was found in each window of it, px-img."""

    size: tuple[int, int]
    truth: PictureTruth
    windows: tuple[Window, ...]
    found: tuple[Detections, ...]

    def only(self, *, tiles: bool, whole: bool) -> Looked:
        """The same with some of the looks left out."""
        everything = Window(0, 0, self.size[1], self.size[0])
        chosen = [i for i, w in enumerate(self.windows) if (whole if w == everything else tiles)]
        windows, found = tuple(self.windows[i] for i in chosen), tuple(self.found[i] for i in chosen)
        return self._replace(windows=windows, found=found)


Merge = Callable[[Looked, float], Detections]


def merge_ours(looked: Looked, iou: float) -> Detections:
    """Merge as refinedet does."""
    return merge(looked.found, looked.windows, looked.size, iou)


def merge_by_iou(looked: Looked, iou: float) -> Detections:
    """Greedy NMS over all looks together."""
    return greedy(looked, lambda common, area, others: common / (area + others - common) > iou)


def merge_by_ios(looked: Looked, iou: float) -> Detections:
    """Greedy suppression by the part of the smaller box that is shared."""
    return greedy(looked, lambda common, area, others: common / np.minimum(area, others) > 0.5)


def greedy(looked: Looked, same: Callable[[NDArray, float, NDArray], NDArray]) -> Detections:
    """Keep, best first and class by class, what is not the same as something kept."""
    boxes = np.concatenate([d.boxes.double().numpy() for d in looked.found])
    scores = np.concatenate([d.scores.double().numpy() for d in looked.found])
    labels = np.concatenate([d.labels.numpy() for d in looked.found])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    waiting, kept = np.argsort(-scores, kind="stable"), []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(best)
        sides = np.minimum(boxes[best, 2:], boxes[waiting, 2:]) - np.maximum(boxes[best, :2], boxes[waiting, :2])
        gone = same(sides.clip(0).prod(axis=1), areas[best], areas[waiting]) & (labels[waiting] == labels[best])
        waiting = waiting[~gone]
    order = np.array(kept, dtype=np.int64)
    rows = (torch.from_numpy(column[order]) for column in (boxes, scores, labels))
    return Detections(*rows)


def mosaics(records: Sequence[Record], grid: int, count: int) -> Iterator[Picture]:
    """Draw pictures without replacement and lay them side by side; what they do not fill is grey."""
    drawn = list(records)
    random.Random(0).shuffle(drawn)
    for start in range(0, min(count * grid**2, len(drawn) - grid**2 + 1), grid**2):
        part = [ordinary(record) for record in drawn[start : start + grid**2]]
        height, width = (max(picture.pixels.shape[axis] for picture in part) for axis in (0, 1))
        canvas = np.full((grid * height, grid * width, 3), 114, dtype=np.uint8)
        boxes = []
        for place, picture in enumerate(part):
            top, left = place // grid * height, place % grid * width
            canvas[top : top + picture.pixels.shape[0], left : left + picture.pixels.shape[1]] = picture.pixels
            boxes.append(picture.boxes + np.array([left, top, left, top]))
        yield Picture(
            canvas,
            np.concatenate(boxes),
            np.concatenate([picture.labels for picture in part]),
            np.concatenate([picture.crowd for picture in part]),
        )


def ordinary(record: Record) -> Picture:
    """Read one picture."""
    return Picture(read_record(record), record.boxes, record.labels, record.crowd)


def look(predictor: AnyPredictor, pictures: Iterator[Picture], tile: int | None) -> list[Looked]:
    """Look at each window of each picture; without a tile, its side is half of the picture's longer one."""
    looked = []
    for place, picture in enumerate(pictures):
        height, width = picture.pixels.shape[:2]
        windows = Tiling(size=tile or max(height, width) // 2).looks(height, width)
        found: list[Detections] = []
        batch = default_batch(predictor.device)
        for start in range(0, len(windows), batch):
            part = windows[start : start + batch]
            seen = predictor.predict([picture.pixels[w.top : w.bottom, w.left : w.right] for w in part])
            found += [moved(detections, window) for detections, window in zip(seen, part, strict=True)]
        areas = (picture.boxes[:, 2:] - picture.boxes[:, :2]).prod(axis=1)
        truth = PictureTruth(place, picture.boxes, picture.labels, areas, picture.crowd)
        looked.append(Looked((height, width), truth, tuple(windows), tuple(found)))
    return looked


def table(name: str, looked: Sequence[Looked], classes: int, iou: float) -> None:
    """Print what comes of the looks."""
    rows: list[tuple[str, bool, bool, str, Merge]] = [
        ("the whole", False, True, "", merge_ours),
        ("tiles", True, False, "nms", merge_by_iou),
        ("tiles", True, False, "ios", merge_by_ios),
        ("tiles", True, False, "merge", merge_ours),
        ("tiles and the whole", True, True, "nms", merge_by_iou),
        ("tiles and the whole", True, True, "ios", merge_by_ios),
        ("tiles and the whole", True, True, "merge", merge_ours),
    ]
    for what, tiles, whole, how, merger in rows:
        chosen = [item.only(tiles=tiles, whole=whole) for item in looked]
        found = [merger(item, iou) for item in chosen]
        detections = [
            PictureDetections(i, d.boxes.double().numpy(), d.scores.double().numpy(), d.labels.numpy())
            for i, d in enumerate(found)
        ]
        result = evaluate_coco([item.truth for item in looked], detections, classes)
        looks = sum(len(item.windows) for item in chosen) / len(chosen)
        again = sum(twice(item.truth, d) for item, d in zip(looked, found, strict=True))
        objects = sum(len(item.truth.labels) for item in looked)
        print(
            f"{name:10}  {what:22}  {how:9}  {looks:6.1f}  {100 * result.AP:5.1f}  {100 * result.AP50:5.1f}  "
            f"{100 * again / objects:5.1f}"
        )


def twice(truth: PictureTruth, found: Detections) -> int:
    """Count detections that lie by half or more in an object of their class that a better one has found."""
    sure = found.above(SCORE)
    boxes, labels = sure.boxes.double().numpy(), sure.labels.numpy()
    low = np.maximum(boxes[:, None, :2], truth.boxes[:, :2])
    sides = (np.minimum(boxes[:, None, 2:], truth.boxes[:, 2:]) - low).clip(0).prod(axis=2)
    areas, objects = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, truth.boxes))
    same = labels[:, None] == truth.labels
    overlap = np.where(same, sides / (areas[:, None] + objects - sides), 0)
    inside = np.where(same, sides / areas[:, None], 0)
    taken = np.zeros(len(objects), dtype=bool)
    again = 0
    for row, part in zip(overlap, inside, strict=True):
        free = np.where(taken, 0, row)
        if len(free) and free.max() >= 0.5:
            taken[free.argmax()] = True
        elif (part[taken] >= 0.5).any():
            again += 1
    return again


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", help="a data set with a val part, or an annotation file")
    parser.add_argument("--weights", help="default: the bundled detector")
    parser.add_argument("--grid", type=int, default=3)
    parser.add_argument("--mosaics", type=int, default=60)
    parser.add_argument("--tile", type=int, default=400, help="for mosaics, px")
    parser.add_argument("--pictures", type=int, default=120, help="ordinary ones")
    given = parser.parse_args(arguments)
    predictor = open_predictor(given.weights, device=torch.device("cpu"), precision=None)
    data: Dataset = remap(open_dataset(given.data, split="val"), predictor.classes)
    iou, classes = predictor.config.postprocess.nms_iou, len(predictor.classes)
    print(HEAD)
    started = time.perf_counter()
    table("mosaics", look(predictor, mosaics(data.records, given.grid, given.mosaics), given.tile), classes, iou)
    some = (ordinary(record) for record in data.records[: given.pictures])
    table("ordinary", look(predictor, some, None), classes, iou)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
