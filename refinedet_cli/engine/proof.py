"""The proof that two detectors find the same: their boxes are matched one to one, and the differences measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.boxes import pair_iou
from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.words import counted


class Tolerance(NamedTuple):
    """How far two detectors may differ.

    Attributes:
        above: boxes that score no more need no counterpart; they decide little, and come and go by rounding.
        iou: the least overlap of a box with its counterpart.
        score: the largest difference of their scores.
        unmatched: the largest share of boxes without a counterpart.
        ap: the largest loss of AP, where there are annotations.
    """

    above: float
    iou: float
    score: float
    unmatched: float
    ap: float


# fp16 and int8 round by design, so that boxes on the edge of a decision fall either way; a wrong step in front of the
# network or behind it costs far more boxes than that. With int8 single scores can go anywhere, and only AP tells.
TOLERANCES = {
    "fp32": Tolerance(above=0.05, iou=0.999, score=1e-4, unmatched=0.0, ap=0.0005),
    "fp16": Tolerance(above=0.05, iou=0.75, score=0.1, unmatched=0.03, ap=0.005),
    "int8": Tolerance(above=0.3, iou=0.5, score=1.0, unmatched=0.05, ap=0.015),
}
# An overlap this near to the threshold of NMS, or a score this near to a rival's or to the last that is kept: the
# rounding of an engine alone decides.
TIE = 1e-5
# Boxes whose edges all lie this near are equal, px-img: of a sliver at the border of a picture IoU tells nothing.
SAME = 0.01


@dataclass(frozen=True)
class Agreement:
    """How far the detections of two detectors differ, over pictures.

    Attributes:
        pictures: compared.
        boxes: of both detectors, that score enough to need a counterpart.
        unmatched: of these, those without a counterpart of their class that overlaps them by the tolerated IoU or
            coincides with them.
        ties: of the unmatched, those that NMS kept or dropped by rounding alone, and those that hang on them.
        least_iou: of matched pairs; None without any.
        box_shift: largest distance of an edge from its counterpart, px-img.
        score_shift: largest difference of scores.
        worst: the picture of the worst difference: of an unmatched box if there is one, else of the score shift.
    """

    pictures: int = 0
    boxes: int = 0
    unmatched: int = 0
    ties: int = 0
    least_iou: float | None = None
    box_shift: float = 0.0
    score_shift: float = 0.0
    worst: str | None = None

    @property
    def unmatched_share(self) -> float:
        """Share of the boxes that have no counterpart, ties aside."""
        return (self.unmatched - self.ties) / max(1, self.boxes)


@dataclass(frozen=True)
class Accuracy:
    """AP of both detectors on annotated pictures.

    Attributes:
        dataset: its name.
        reference, candidate: the AP; both None where no object can be scored.
        complete: whether every object of the data set is scored as the class it has there; see `Collected`.
    """

    dataset: str
    reference: float | None
    candidate: float | None
    complete: bool

    @property
    def change(self) -> float | None:
        """AP gained; below 0 where it was lost."""
        return None if self.candidate is None or self.reference is None else self.candidate - self.reference


@dataclass(frozen=True)
class Proof:
    """What was compared and what came of it.

    Attributes:
        agreement: of the detections.
        accuracy: AP of both; None without annotations.
        tolerance: that was asked for.
        failures: what exceeds it, one line each; empty where everything holds.
    """

    agreement: Agreement
    accuracy: Accuracy | None
    tolerance: Tolerance
    failures: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether nothing exceeds the tolerance."""
        return not self.failures


def judge(agreement: Agreement, accuracy: Accuracy | None, tolerance: Tolerance) -> Proof:
    """Hold differences against what is tolerated."""
    failures = []
    if not agreement.boxes:
        failures.append(
            f"nothing was proven: no box scores above {tolerance.above:g} in {counted(agreement.pictures, 'picture')}; "
            "name pictures in which the detector finds something"
        )
    if agreement.unmatched_share > tolerance.unmatched:
        failures.append(
            f"{agreement.unmatched - agreement.ties:,} of {counted(agreement.boxes, 'box', 'boxes')} without "
            f"counterpart at IoU {tolerance.iou:g} (worst picture: {agreement.worst})"
        )
    if agreement.score_shift > tolerance.score:
        failures.append(
            f"scores differ by up to {agreement.score_shift:.2g}, more than {tolerance.score:g} "
            f"(worst picture: {agreement.worst})"
        )
    loss = 0.0 if accuracy is None or accuracy.change is None else -accuracy.change
    if loss > tolerance.ap:
        failures.append(f"AP falls by {loss:.4f}, more than {tolerance.ap:g}")
    return Proof(agreement, accuracy, tolerance, tuple(failures))


def compare(
    pairs: Iterable[tuple[str, Detections, Detections]], tolerance: Tolerance, limits: PostprocessConfig | None = None
) -> Agreement:
    """Match the detections of two detectors one to one.

    A box of either that scores above ``tolerance.above`` looks for a counterpart of its class among all boxes of the
    other, whatever these score, so that a score that crosses the line by rounding is no difference. Pairs are formed
    from the largest overlap down, and pairs that overlap less than ``tolerance.iou`` are none.

    Args:
        pairs: name of a picture, what the reference found in it, and what the other found.
        tolerance: what is looked at, and what counts as a pair.
        limits: the post-processing of both, for its limits; None knows no ties.
    """
    total = Agreement()
    worst = (0, 0.0)
    for name, reference, other in pairs:
        seen = _compare(reference, other, tolerance, limits)
        if (seen.unmatched, seen.score_shift) > worst or total.worst is None:
            worst = (seen.unmatched, seen.score_shift)
            total = replace(total, worst=name)
        ious = [iou for iou in (total.least_iou, seen.least_iou) if iou is not None]
        total = replace(
            total,
            pictures=total.pictures + 1,
            boxes=total.boxes + seen.boxes,
            unmatched=total.unmatched + seen.unmatched,
            ties=total.ties + seen.ties,
            least_iou=min(ious, default=None),
            box_shift=max(total.box_shift, seen.box_shift),
            score_shift=max(total.score_shift, seen.score_shift),
        )
    return total


def _compare(
    reference: Detections, other: Detections, tolerance: Tolerance, limits: PostprocessConfig | None
) -> Agreement:
    overlap = _overlaps(reference, other)
    here, there = _pair_off(overlap, (overlap >= tolerance.iou) | ((overlap >= 0) & _coincide(reference, other)))
    scores = reference.scores.double().numpy(), other.scores.double().numpy()
    # Said so that a score that is no number matters.
    matters = ~(scores[0] <= tolerance.above), ~(scores[1] <= tolerance.above)
    boxes = int(matters[0].sum() + matters[1].sum())
    alone = np.setdiff1d(np.flatnonzero(matters[0]), here), np.setdiff1d(np.flatnonzero(matters[1]), there)
    unmatched = len(alone[0]) + len(alone[1])
    ties = _count_ties(reference, other, alone, limits) if unmatched and limits is not None else 0
    # A pair counts if either of its boxes does.
    counts = matters[0][here] | matters[1][there]
    here, there = here[counts], there[counts]
    if not len(here):
        return Agreement(boxes=boxes, unmatched=unmatched, ties=ties)
    edges = reference.boxes.double().numpy()[here] - other.boxes.double().numpy()[there]
    return Agreement(
        boxes=boxes,
        unmatched=unmatched,
        ties=ties,
        least_iou=float(overlap[here, there].min()),
        box_shift=float(np.abs(edges).max()),
        score_shift=float(np.nan_to_num(np.abs(scores[0][here] - scores[1][there]), nan=np.inf).max()),
    )


def _count_ties(
    reference: Detections,
    other: Detections,
    alone: tuple[NDArray[np.intp], NDArray[np.intp]],
    limits: PostprocessConfig,
) -> int:
    """Count the boxes without counterpart that rounding explains.

    One whose overlap with a better box of its class lies on the threshold is kept by one engine and dropped by the
    other. So is one of two that overlap and score alike, as in plain parts of a picture, where a network says the same
    everywhere. What it suppresses then hangs on it, and so on. And where as many were kept as may be, one that scores
    like the last of them may be the next.
    """
    loose = [(reference, i) for i in alone[0]] + [(other, i) for i in alone[1]]
    boxes = torch.stack([found.boxes[i] for found, i in loose])
    labels, scores = (torch.stack([getattr(found, name)[i] for found, i in loose]) for name in ("labels", "scores"))
    these = Detections(boxes, scores, labels)
    absent = [other] * len(alone[0]) + [reference] * len(alone[1])
    explained = np.array(
        [
            len(found) == limits.keep and bool(score <= found.scores[-1] + TIE)
            for found, score in zip(absent, scores, strict=True)
        ]
    )
    for found in (reference, other):
        overlaps, lead = _overlaps(these, found), found.scores.numpy()[None] - scores.numpy()[:, None]
        explained |= ((np.abs(overlaps - limits.nms_iou) < TIE) & (lead > 0)).any(axis=1)
        rival = ((overlaps > limits.nms_iou) & (np.abs(lead) < TIE)).any(axis=1)
        explained |= rival & np.array([lacking is found for lacking in absent])
    hangs_on = _overlaps(these, these) > limits.nms_iou - TIE
    while (spread := explained | hangs_on[:, explained].any(axis=1)).sum() > explained.sum():
        explained = spread
    return int(explained.sum())


def _overlaps(reference: Detections, other: Detections) -> NDArray[np.float64]:
    """IoU of every box with every box, float64[N, M]; -1 between classes."""
    iou = pair_iou(reference.boxes.double()[:, None], other.boxes.double()[None]).numpy()
    return np.where(reference.labels.numpy()[:, None] == other.labels.numpy()[None], iou, -1.0)


def _coincide(reference: Detections, other: Detections) -> NDArray[np.bool_]:
    """Tell of every box with every box, bool[N, M], whether no edge lies apart by more than `SAME`."""
    edges = reference.boxes.double().numpy()[:, None] - other.boxes.double().numpy()[None]
    near: NDArray[np.bool_] = (np.abs(edges) <= SAME).all(axis=2)
    return near


def _pair_off(overlap: NDArray[np.float64], allowed: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pair rows with columns where it is allowed, the largest overlap first; returns int[P] rows and int[P] columns."""
    rows, columns = np.nonzero(allowed)
    order = np.argsort(-overlap[rows, columns], kind="stable")
    free_rows, free_columns = np.ones(len(overlap), bool), np.ones(overlap.shape[1], bool)
    chosen: list[int] = []
    for i in order:
        if free_rows[rows[i]] and free_columns[columns[i]]:
            free_rows[rows[i]] = free_columns[columns[i]] = False
            chosen.append(int(i))
    return rows[chosen], columns[chosen]
