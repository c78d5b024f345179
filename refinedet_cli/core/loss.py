"""Hard negative mining and the two-term loss that ARM and ODM share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from refinedet_cli.core.boxes import cxcywh_to_xyxy, encode, pair_iou
from refinedet_cli.core.matching import match
from refinedet_cli.core.structures import Targets


class ModuleLoss(NamedTuple):
    """Loss of one module; float32 scalars.

    Attributes:
        conf: softmax cross-entropy over positives and mined negatives, divided by the positives (negatives of pictures
            without objects: see `multibox_loss`).
        loc: smooth L1 over the offsets of positives, divided by the positives.
        positives: number of matched anchors in the batch.
    """

    conf: Tensor
    loc: Tensor
    positives: Tensor


def multibox_loss(
    logits: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    targets: Targets,
    *,
    positive_iou: float,
    negative_iou: float,
    neg_ratio: float,
    variances: tuple[float, float],
    may_be_negative: Tensor | None = None,
    background_negatives: int = 0,
) -> ModuleLoss:
    """Match, mine and sum for a batch; sums are divided by the positives of the batch, or by 1 if there are none.

    Negatives of pictures without objects weigh as much as others, but together at most ``neg_ratio`` times (once, if
    that is more) their mean cost, which is what negatives weigh in a batch that has objects only. So a batch of few
    positives among many such pictures, or of none, has a loss of the usual size.

    Args:
        logits: float32[B, A, classes], background first.
        offsets: float32[B, A, 4], from the anchors.
        anchors: float32[A, 4] or float32[B, A, 4], cxcywh, norm; no gradient flows into them.
        targets: objects with labels below ``classes``.
        positive_iou: overlap from which an anchor is positive.
        negative_iou: overlap below which an unmatched anchor may be mined as a negative.
        neg_ratio: mined negatives for each positive of the same picture.
        variances: of the offset coding.
        may_be_negative: bool[B, A]; anchors where it is False are never mined. Positives are not affected.
        background_negatives: mined negatives of each picture without objects; with 0 such pictures contribute nothing.

    Returns:
        `ModuleLoss`, finite for finite input.

    Source: paper, "Loss Function" and "Hard Negative Mining"; official multibox_loss_layer, MAX_NEGATIVE, which takes
        nothing from pictures without objects.
    """
    with torch.no_grad():
        corners = cxcywh_to_xyxy(anchors)
        ious = pair_iou(targets.boxes[:, None], corners[targets.image] if corners.ndim == 3 else corners[None])
        matches = match(ious, targets, positive_iou)
        positive = matches.target >= 0
        cost = -logits.log_softmax(dim=-1)[..., 0]
        eligible = ~positive & (matches.best_iou < negative_iou)
        if may_be_negative is not None:
            eligible &= may_be_negative
        negative = _hardest(cost, eligible, (positive.sum(dim=1) * neg_ratio).long())
    total = positive.sum()
    normaliser = total.clamp(min=1).float()

    picture, anchor = positive.nonzero(as_tuple=True)
    rows = matches.target[picture, anchor]
    matched_anchors = (anchors[picture, anchor] if anchors.ndim == 3 else anchors[anchor]).detach()
    wanted = encode(targets.boxes[rows], matched_anchors, variances)
    loc = functional.smooth_l1_loss(offsets[picture, anchor], wanted, reduction="sum")

    chosen = positive | negative
    labels = torch.zeros_like(matches.target)
    labels[picture, anchor] = targets.labels[rows]
    conf = functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum") / normaliser
    if background_negatives:
        empty = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        empty[targets.image] = False
        mined = _hardest(cost, eligible & empty[:, None], empty * background_negatives)
        background = functional.cross_entropy(logits[mined], labels[mined], reduction="sum")
        conf = conf + background / torch.maximum(normaliser, mined.sum() / max(neg_ratio, 1.0))
    return ModuleLoss(conf=conf, loc=loc / normaliser, positives=total.float())


def _hardest(cost: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Mark, in each row, the ``count`` eligible places of the highest cost; among equals the earlier."""
    ranked = torch.where(eligible, cost, cost.new_full((), -torch.inf))
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(cost.shape[1], device=cost.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return eligible & (rank < count[:, None])
