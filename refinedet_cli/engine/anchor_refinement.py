"""What refinement buys: how well a trained detector's anchors cover objects before and after each step moves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.boxes import cxcywh_to_xyxy, decode, pair_iou
from refinedet_cli.core.detector import Step as Move
from refinedet_cli.core.matching import match
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.core.structures import Targets
from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import read_record
from refinedet_cli.engine.anchors import MATCHED, Objects, gather, percent
from refinedet_cli.errors import ConfigError
from refinedet_cli.zoo.checkpoint import LoadedDetector


class Moves(NamedTuple):
    """For each object, the anchor whose box covers it best in the end; float32[N, 4], xyxy, px-in.

    Attributes:
        anchors: where it lay; ``refined`` and ``final`` are that anchor after the ARM and after the ODM.
        refined: equals ``anchors`` without an ARM.
        final: the box that is detected if its score suffices.
    """

    anchors: NDArray[np.float32]
    refined: NDArray[np.float32]
    final: NDArray[np.float32]


class Step(NamedTuple):
    """How well boxes cover objects at one step.

    Attributes:
        name: for people.
        best_iou: float64[N], best overlap of each object with any box.
        positives: int64[N], boxes that learn from each object by the training's rule; None for detections, from
            which nothing learns.
    """

    name: str
    best_iou: NDArray[np.float64]
    positives: NDArray[np.int64] | None

    def share(self, iou: float) -> float:
        """Of objects that reach an overlap."""
        return float((self.best_iou >= iou).mean())


@dataclass(frozen=True, eq=False)
class Refinement:
    """What each step of a trained detector does to the coverage of objects; scores and classes play no part.

    Attributes:
        objects: of the pictures that were looked at.
        dataset: these pictures.
        of: pictures with objects there are.
        steps: the anchors, then then what each module that moves them makes of that.
        moves: one anchor of each object on its way.
    """

    objects: Objects
    dataset: Dataset
    of: int
    steps: tuple[Step, ...]
    moves: Moves

    @property
    def refines(self) -> bool:
        """Whether the anchors are moved twice."""
        return len(self.steps) > 2

    @property
    def heading(self) -> str:
        """What all this answers."""
        return f"What {'refinement' if self.refines else 'moving the anchors'} buys"

    @property
    def verdict(self) -> str:
        """What refinement buys, in plain words."""
        first, *rest = self.steps
        told = " and ".join(f"{percent(step.share(MATCHED))} {step.name}" for step in rest)
        looked_at = len(self.dataset)
        of = "" if looked_at == self.of else f"{looked_at:,} of "
        return (
            f"On {of}{counted(self.of, 'picture')}, {percent(first.share(MATCHED))} of the objects reach IoU 0.5 with "
            f"an anchor, {told}."
        )


def choose_pictures(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Draw pictures that have objects, in their order; all of them where there are no more."""
    usable = np.array([i for i, r in enumerate(dataset.records) if (~r.crowd).any()], dtype=np.int64)
    if len(usable) > count:
        usable = np.sort(np.random.default_rng(seed).choice(usable, count, replace=False))
    return replace(dataset, records=tuple(dataset.records[i] for i in usable))


def measure_refinement(
    loaded: LoadedDetector,
    dataset: Dataset,
    *,
    pictures: int,
    seed: int,
    device: torch.device,
    batch: int,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> Refinement:
    """Run a network over pictures, in float32, and compare objects with its anchors before and after they move.

    Args:
        loaded: moved to the device.
        dataset: pictures are read; labels are not compared with the detector's classes.
        pictures: how many to look at, drawn by the seed.
        seed: of the draw.
        device: where to compute.
        batch: pictures computed together.
        workers: threads that read pictures.
        on_progress: called after every batch with the pictures done and all of them.

    Returns:
        `Refinement`. The numbers of its first step are those of the anchors alone.

    Raises:
        DataError: there is no object, or a picture cannot be read.
        ConfigError: the detector's family has no anchors.
    """
    size = loaded.config.preprocess
    chosen = choose_pictures(dataset, pictures, seed)
    objects = gather(chosen, (size.height, size.width))
    anchors = loaded.config.require_anchors()
    tiled = tile_anchors(anchors, size.height, size.width).to(device)
    found: list[_Picture] = []
    names: tuple[str, ...] = ()
    for moves, records in _outputs(loaded, chosen.records, device=device, batch=batch, workers=workers):
        names = ("anchors", *(f"after the {step.name}" for step in moves))
        for i, record in enumerate(records):
            found.append(_look_at(tiled, [_of_picture(step, i) for step in moves], anchors.variances, record))
        on_progress(len(found), len(chosen))
    steps = tuple(
        Step(
            name,
            np.concatenate([picture.best_iou[i] for picture in found]),
            np.concatenate([picture.positives[i] for picture in found]) if i + 1 < len(names) else None,
        )
        for i, name in enumerate(names)
    )
    scale = np.array([size.width, size.height] * 2, dtype=np.float32)
    of_objects = Moves(*(np.concatenate([p.moves[i] for p in found]) * scale for i in range(len(Moves._fields))))
    return Refinement(objects, chosen, sum(bool((~r.crowd).any()) for r in dataset.records), steps, of_objects)


class _Picture(NamedTuple):
    """What was found in one picture: an array for each step that `Step` has of it, and those of `Moves`, norm."""

    best_iou: list[NDArray[np.float64]]
    positives: list[NDArray[np.int64]]
    moves: list[NDArray[np.float32]]


def _outputs(
    loaded: LoadedDetector, records: Sequence[Record], *, device: torch.device, batch: int, workers: int
) -> Iterator[tuple[tuple[Move, ...], Sequence[Record]]]:
    network, moves = loaded.detector.network.to(device).eval(), loaded.detector.steps
    if moves is None:
        raise ConfigError(f"{loaded.path}: a {loaded.config.family} has no anchors, so there is nothing it moves")

    def read(record: Record) -> Tensor:
        return preprocess(torch.from_numpy(read_record(record)), loaded.config.preprocess)

    with ThreadPoolExecutor(max(1, workers)) as pool, torch.inference_mode():
        for start in range(0, len(records), batch):
            part = records[start : start + batch]
            raw = network(torch.stack(list(pool.map(read, part))).to(device))
            yield moves(loaded.config, raw), part


def _of_picture(step: Move, index: int) -> Move:
    return step._replace(offsets=step.offsets[index], kept=None if step.kept is None else step.kept[index])


def _look_at(anchors: Tensor, steps: Sequence[Move], variances: tuple[float, float], record: Record) -> _Picture:
    """Compare the objects of one picture with every anchor at every step, whose tensors are those of this picture."""
    device = anchors.device
    scale = torch.tensor([record.width, record.height] * 2, dtype=torch.float64)
    boxes = (torch.from_numpy(record.boxes[~record.crowd]) / scale).float().to(device)
    zeros = torch.zeros(len(boxes), dtype=torch.int64, device=device)
    targets = Targets(boxes, zeros + 1, zeros, 1)
    ways = [anchors]
    for step in steps:
        ways.append(decode(step.offsets.float(), ways[-1], variances))
    found = _Picture([], [], [])
    for i, way in enumerate(ways):
        ious = pair_iou(boxes[:, None], cxcywh_to_xyxy(way)[None])  # [N, A]
        if i < len(steps):
            best = ious.max(dim=1)
            taken = match(ious, targets, steps[i].positive_iou).target[0]
            found.positives.append(torch.bincount(taken[taken >= 0], minlength=len(boxes)).cpu().numpy())
        else:
            # Where an anchor can never be detected, it must not count as reached in the end.
            kept = steps[-1].kept
            best = (ious if kept is None else ious * kept).max(dim=1)
        found.best_iou.append(best.values.double().cpu().numpy())
    chosen = [ways[0], ways[-2], ways[-1]]
    found.moves.extend(cxcywh_to_xyxy(way[best.indices]).cpu().numpy() for way in chosen)
    return found
