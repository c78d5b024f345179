"""From scored anchors to detections: the best candidates, exact greedy NMS, the best of what is left.

Everything up to `suppress` runs on the device of its input, for a whole batch, in shapes that do not depend on the
values; what comes after works on the few detections of one picture. NMS has two forms with the same result: on CPUs
torchvision's kernel, class by class; elsewhere rounds of one rule over all pairs of a batch, which wait for no value.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import nms

from refinedet_cli.core.boxes import cxcywh_to_xyxy, decode, pair_iou
from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.structures import BatchDetections, Candidates, Detections

# Overlaps that are held in memory at once; more rows are worked off in turns.
_MAX_PAIRS = 1 << 24
# After so many the rule of `greedy_keep` has settled on all but made-up cases, where it goes on.
_ROUNDS = 8


class Attempt(NamedTuple):
    """Suppression after a number of rounds.

    Attributes:
        found: the detections.
        settled: bool[], whether they are those of greedy NMS; if not, it takes more rounds.
    """

    found: BatchDetections
    settled: Tensor


class Best(NamedTuple):
    """The best scored anchors of each group: the picture, or each of its classes.

    Attributes:
        scores: float32[B, G, K], descending; 0 where fewer than K are above the threshold.
        anchors: int64[B, G, K].
        labels: int64[B, G, K], in 1..C-1.
    """

    scores: Tensor
    anchors: Tensor
    labels: Tensor


def top_candidates(scores: Tensor, config: PostprocessConfig) -> Best:
    """Choose the candidates that enter NMS.

    Args:
        scores: float32[B, A, C-1], foreground scores of every anchor.
        config: threshold (exclusive), number, and whether it counts per picture or per class.

    Returns:
        `Best`, with G = 1 or G = C-1.
    """
    batch, anchors, classes = scores.shape
    scores = torch.where(scores > config.score_threshold, scores, scores.new_zeros(()))
    if config.candidates_per == "picture":
        best = scores.reshape(batch, 1, anchors * classes).topk(min(config.candidates, anchors * classes))
        return Best(best.values, best.indices // classes, best.indices % classes + 1)
    best = scores.transpose(1, 2).topk(min(config.candidates, anchors))
    labels = torch.arange(1, classes + 1, device=scores.device)[:, None].expand_as(best.indices)
    return Best(best.values, best.indices, labels)


def decode_best(
    scores: Tensor,
    anchors: Tensor,
    moves: Sequence[Tensor],
    variances: tuple[float, float],
    config: PostprocessConfig,
) -> Candidates:
    """Choose the candidates that enter NMS, and decode only those.

    Args:
        scores: float32[B, A, C-1], foreground scores of every anchor.
        anchors: float32[A, 4], cxcywh, norm.
        moves: float[B, A, 4] each, offsets that move the anchors one after the other.
        variances: of the offset coding.
        config: as `top_candidates`.

    Returns:
        `Candidates`, computed in float32.
    """
    best = top_candidates(scores, config)
    boxes = anchors[best.anchors]  # [B, G, K, 4]
    for offsets in moves:
        boxes = decode(pick(offsets.float(), best.anchors), boxes, variances)
    return to_candidates(best, boxes, config)


def to_candidates(best: Best, boxes: Tensor, config: PostprocessConfig) -> Candidates:
    """Join the best with their boxes float32[B, G, K, 4], cxcywh, norm, clipped where the config asks for it."""
    corners = cxcywh_to_xyxy(boxes)
    return Candidates(corners.clamp(0, 1) if config.clip_first else corners, best.scores, best.labels)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Gather float[B, A, 4] at int64[B, G, K] along A."""
    batch, groups, count = index.shape
    flat = index.reshape(batch, groups * count, 1).expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(batch, groups, count, values.shape[-1])


def suppress(candidates: Candidates, config: PostprocessConfig) -> BatchDetections:
    """Drop candidates that overlap a better one of their class, and keep the best of the rest.

    Args:
        candidates: scores descending in their last dimension, 0 in empty places.
        config: ``nms_iou`` (a pair at exactly this overlap survives) and ``keep``.

    Returns:
        `BatchDetections` with ``min(keep, G * K)`` places; no two boxes of one label in a picture overlap by more than
        ``nms_iou``, and every dropped candidate overlaps a kept one of its label by more or ranks behind ``keep``.

    Source: paper, "Inference".
    """
    if candidates.scores.device.type == "cpu":
        batch, groups, _ = candidates.scores.shape
        kept = torch.empty_like(candidates.scores, dtype=torch.bool)
        for place in itertools.product(range(batch), range(groups)):
            row = (values[place] for values in candidates)
            kept[place] = _keep_by_class(*row, nms_iou=config.nms_iou)
        return best_kept(candidates, kept, config.keep)
    attempt = try_suppress(candidates, config)
    # The first moment at which the device is waited for; the detections are to be fetched next.
    while not attempt.settled:
        attempt = try_suppress(candidates, config, rounds=candidates.scores.shape[2])
    return attempt.found


def try_suppress(candidates: Candidates, config: PostprocessConfig, rounds: int = _ROUNDS) -> Attempt:
    """Do as `suppress` in a fixed number of operations that never wait for a value, as a CUDA graph needs it.

    Args:
        candidates: as for `suppress`.
        config: as for `suppress`.
        rounds: of `greedy_keep`'s rule; as many as there are places settle every case.
    """
    batch, groups, places = candidates.scores.shape
    boxes, scores, labels = (t.reshape(batch * groups, places, *t.shape[3:]) for t in candidates)
    turns = max(1, _MAX_PAIRS // places**2)
    settled, kept = [], []
    for rows in zip(boxes.split(turns), scores.split(turns), labels.split(turns), strict=True):
        alive = rows[1] > 0
        keep, is_settled = _settle(alive, suppression_matrix(rows[0], rows[2], config.nms_iou), alive, rounds)
        kept.append(keep)
        settled.append(is_settled)
    found = best_kept(candidates, torch.cat(kept).view_as(candidates.scores), config.keep)
    return Attempt(found, torch.stack(settled).all())


def _keep_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_iou: float) -> Tensor:
    """Do as `greedy_keep` for one row, boxes float32[K, 4], on the CPU."""
    kept = torch.zeros_like(labels, dtype=torch.bool)
    count = int((scores > 0).sum())
    order = labels[:count].sort(stable=True)
    lengths = torch.unique_consecutive(order.values, return_counts=True)[1].tolist()
    # torchvision compares in float64, all else here in float32.
    limit = torch.tensor(nms_iou, dtype=torch.float32).item()
    columns = (column.split(lengths) for column in (order.indices, boxes[order.indices], scores[order.indices]))
    for places, *of_class in zip(*columns, strict=True):
        kept[places[nms(*of_class, limit)]] = True
    return kept


def best_kept(candidates: Candidates, kept: Tensor, keep: int) -> BatchDetections:
    """Take the best of the candidates that suppression has left.

    Args:
        candidates: of B pictures.
        kept: bool[B, G, K], those that are left.
        keep: the most detections of one picture.

    Returns:
        `BatchDetections` with ``min(keep, G * K)`` places.
    """
    batch, groups, places = candidates.scores.shape
    scores = torch.where(kept, candidates.scores, candidates.scores.new_zeros(()))
    best = scores.reshape(batch, -1).topk(min(keep, groups * places))
    filled = best.values > 0
    boxes = candidates.boxes.reshape(batch, -1, 4).gather(1, best.indices[..., None].expand(-1, -1, 4))
    labels = candidates.labels.reshape(batch, -1).gather(1, best.indices)
    return BatchDetections(
        boxes=boxes * filled[..., None], scores=best.values, labels=labels * filled, counts=filled.sum(dim=1)
    )


def greedy_keep(boxes: Tensor, scores: Tensor, labels: Tensor, nms_iou: float) -> Tensor:
    """Decide greedy class-wise NMS for many rows at once.

    A candidate stays if no better candidate that stays suppresses it. Starting from "all stay", this rule is applied to
    all candidates together until nothing changes; the first k candidates are right after k rounds at the latest, so the
    result is the greedy one, and in practice a handful of rounds suffice.

    Args:
        boxes: float32[R, K, 4], xyxy.
        scores: float32[R, K], descending, 0 in empty places.
        labels: int64[R, K].
        nms_iou: overlap above which a better candidate suppresses.

    Returns:
        bool[R, K], False in empty places.
    """
    alive = scores > 0
    suppresses = suppression_matrix(boxes, labels, nms_iou)
    keep, settled = _settle(alive, suppresses, alive, _ROUNDS)
    while not settled:
        keep, settled = _settle(alive, suppresses, keep, _ROUNDS)
    return keep


def _settle(alive: Tensor, suppresses: Tensor, keep: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Apply the rule of `greedy_keep` some times; gives who stays, and bool[] whether the last changed nothing."""
    before = keep
    for _ in range(rounds):
        before, keep = keep, still_alive(alive, suppresses, keep)
    return keep, (keep == before).all()


def suppression_matrix(boxes: Tensor, labels: Tensor, nms_iou: float) -> Tensor:
    """Tell for rows of candidates, best first, which better one (second dimension) would suppress which worse (third).

    Arguments are those of `greedy_keep`; returns bool[R, K, K].
    """
    overlap = pair_iou(boxes[:, :, None], boxes[:, None]) > nms_iou
    return (overlap & (labels[:, :, None] == labels[:, None])).triu(diagonal=1)


def still_alive(alive: Tensor, suppresses: Tensor, keep: Tensor) -> Tensor:
    """Apply the rule of `greedy_keep` once: who stays if exactly those in ``keep``, bool[R, K], stay and suppress."""
    return alive & ~(suppresses & keep[:, :, None]).any(dim=1)


def to_detections(batch: BatchDetections, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
    """Cut a batch into one `Detections` per picture.

    Args:
        batch: detections of B pictures.
        sizes: B (height, width) pairs, px-img.

    Returns:
        B `Detections` on the CPU, clipped to their pictures. A box of which nothing lies inside is left out.
    """
    boxes, scores, labels = batch.boxes.cpu(), batch.scores.cpu(), batch.labels.cpu()
    found = []
    for i, ((height, width), count) in enumerate(zip(sizes, batch.counts.tolist(), strict=True)):
        scaled = boxes[i, :count] * torch.tensor([width, height, width, height])
        limit = torch.tensor([width, height, width, height], dtype=scaled.dtype)
        scaled = torch.minimum(scaled.clamp(min=0), limit)
        inside = (scaled[:, 2] > scaled[:, 0]) & (scaled[:, 3] > scaled[:, 1])
        found.append(Detections(scaled[inside], scores[i, :count][inside], labels[i, :count][inside]))
    return found


def soften(found: Detections, iou: float, score_threshold: float) -> Detections:
    """Lower the scores of boxes by their overlap with better ones of their class: linear soft-NMS.

    Best first, by the scores as they are by then, each box multiplies the score of every box of its class that is still
    to come, and overlaps it by more than ``iou``, by one minus that overlap.

    Args:
        found: what was found in one picture, after ordinary NMS.
        iou: overlap (`pixel_iou`) above which a score is lowered.
        score_threshold: a box that falls below this goes. It could only have lowered boxes that score even less.

    Returns:
        the boxes that stay, best first by their new scores, none of which is above its old one. Nothing changes where
        no two boxes of a class overlap by more than ``iou``.

    Source: official test code, which does this for COCO alone, with ``iou`` 0.3, on the detections of one scale.
    """
    boxes, scores = found.boxes.double().numpy(), found.scores.double().numpy().copy()
    labels = found.labels.numpy()
    overlap = pixel_iou(boxes[:, None], boxes)
    touches = (overlap > iou) & (labels[:, None] == labels)
    np.fill_diagonal(touches, val=False)
    factors = np.where(touches, 1 - overlap, 1.0)
    # Most boxes touch no other; only those that do have to be taken in turn.
    waiting = np.flatnonzero(touches.any(axis=1))
    while len(waiting):
        best = waiting[scores[waiting].argmax()]
        waiting = waiting[waiting != best]
        scores[waiting] *= factors[best, waiting]
    stays = np.flatnonzero((scores >= score_threshold) & (scores > 0))
    order = torch.from_numpy(stays[np.argsort(-scores[stays], kind="stable")])
    return Detections(found.boxes[order], torch.from_numpy(scores)[order].float(), found.labels[order])


def pixel_iou(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the overlap of boxes whose edges are counted as pixels: every side is one longer.

    Args:
        first: float64[..., 4], xyxy, px-img.
        second: float64[..., 4], broadcastable with ``first``.

    Returns:
        float64[...], in [0, 1]; exactly 1 for equal boxes.

    Source: official test code. Differs from `pair_iou` for small boxes only: two that touch overlap here.
    """
    ax0, ay0, ax1, ay1 = np.moveaxis(first, -1, 0)
    bx0, by0, bx1, by1 = np.moveaxis(second, -1, 0)
    width = np.maximum(np.minimum(ax1, bx1) - np.maximum(ax0, bx0) + 1, 0)
    height = np.maximum(np.minimum(ay1, by1) - np.maximum(ay0, by0) + 1, 0)
    intersection = width * height
    union = (ax1 - ax0 + 1) * (ay1 - ay0 + 1) + (bx1 - bx0 + 1) * (by1 - by0 + 1) - intersection
    return np.asarray(intersection / union)
