"""Hard negative mining and the two-term loss that ARM and ODM share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

from refinedet_cli.core.boxes import cxcywh_to_xyxy, decode, encode, pair_iou
from refinedet_cli.core.config import LossConfig
from refinedet_cli.core.matching import match
from refinedet_cli.core.structures import Targets

OverAll = Callable[[Tensor], Tensor]


def alone(count: Tensor) -> Tensor:
    """Sum a count over all processes where there is one."""
    return count


class ModuleLoss(NamedTuple):
    """Loss of one module; float32 scalars.

    Attributes:
        conf: softmax cross-entropy over positives and mined negatives, divided by the positives (negatives of pictures
            without objects: see `multibox_loss`).
        loc: the box cost of positives, divided by the positives.
        positives: number of matched anchors in this process's pictures.
    """

    conf: Tensor
    loc: Tensor
    positives: Tensor


BoxCost = Callable[[Tensor, Tensor, Tensor, tuple[float, float]], Tensor]
"""From offsets float32[P, 4], the anchors they start from (cxcywh, norm), the objects (xyxy, norm) and the variances of
the coding to one cost, summed over the P positives."""


def smooth_l1_cost(offsets: Tensor, anchors: Tensor, boxes: Tensor, variances: tuple[float, float]) -> Tensor:
    """Compare offsets with those of the objects, as the paper does; a `BoxCost`."""
    return functional.smooth_l1_loss(offsets, encode(boxes, anchors, variances), reduction="sum")


def giou_cost(offsets: Tensor, anchors: Tensor, boxes: Tensor, variances: tuple[float, float]) -> Tensor:
    """Compare boxes by one minus their generalised IoU (arXiv:1902.09630); a `BoxCost`."""
    decoded = cxcywh_to_xyxy(decode(offsets, anchors, variances))
    return generalized_box_iou_loss(decoded, boxes, reduction="sum")  # type: ignore[no-any-return]


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
    box_cost: BoxCost = smooth_l1_cost,
    quality: float = 0.0,
    over_all: OverAll = alone,
) -> ModuleLoss:
    """Match, mine and sum for a batch; sums are divided by the positives of the batch, or by 1 if there are none.

    Negatives of pictures without objects weigh as much as others, but together at most ``neg_ratio`` times (once, if
    that is more) their mean cost, which is what negatives weigh in a batch that has objects only. So a batch of few
    positives among many such pictures, or of none, has a loss of the usual size.

    Args:
        logits: float32[B, A, classes], background first.
        offsets: float32[B, A, 4], from the anchors.
        anchors: float32[A, 4] or float32[B, A, 4], cxcywh, norm; matching sends no gradient into them.
        targets: objects with labels below ``classes``.
        positive_iou: overlap from which an anchor is positive.
        negative_iou: overlap below which an unmatched anchor may be mined as a negative.
        neg_ratio: mined negatives for each positive of the same picture.
        variances: of the offset coding.
        may_be_negative: bool[B, A]; anchors where it is False are never mined. Positives are not affected.
        background_negatives: mined negatives of each picture without objects; with 0 such pictures contribute nothing.
        box_cost: of positives.
        quality: how much of a positive's class target is the IoU that its box reaches, the rest of it being 1; what
            is missing to 1 goes to background.
        over_all: sums a count over the processes that share the batch, of which ``logits`` hold some pictures or none.

    Returns:
        `ModuleLoss`, finite for finite input; summed over the processes it is that of the whole batch in one.

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
    normaliser = over_all(total).clamp(min=1).float()

    picture, anchor = positive.nonzero(as_tuple=True)
    rows = matches.target[picture, anchor]
    matched_anchors = anchors[picture, anchor] if anchors.ndim == 3 else anchors[anchor]
    matched_offsets = offsets[picture, anchor]
    loc = box_cost(matched_offsets, matched_anchors, targets.boxes[rows], variances)

    chosen = positive | negative
    labels = torch.zeros_like(matches.target)
    labels[picture, anchor] = targets.labels[rows]
    conf = functional.cross_entropy(logits[chosen], labels[chosen], reduction="sum") / normaliser
    if quality:
        with torch.no_grad():
            reached = pair_iou(cxcywh_to_xyxy(decode(matched_offsets, matched_anchors, variances)), targets.boxes[rows])
        matched_logits = logits[picture, anchor]
        # Moves this part of the target's weight from the class to background.
        to_background = matched_logits.gather(1, labels[picture, anchor, None])[:, 0] - matched_logits[:, 0]
        conf = conf + (quality * (1 - reached) * to_background).sum() / normaliser
    if background_negatives:
        empty = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        empty[targets.image] = False
        mined = _hardest(cost, eligible & empty[:, None], empty * background_negatives)
        background = functional.cross_entropy(logits[mined], labels[mined], reduction="sum")
        conf = conf + background / torch.maximum(normaliser, over_all(mined.sum()) / max(neg_ratio, 1.0))
    return ModuleLoss(conf=conf, loc=loc / normaliser, positives=total.float())


def detection_loss(
    logits: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    targets: Targets,
    config: LossConfig,
    *,
    variances: tuple[float, float],
    may_be_negative: Tensor | None = None,
    over_all: OverAll = alone,
) -> ModuleLoss:
    """Compute the loss of a head that tells classes, with the ODM's settings; see `multibox_loss`.

    Returns:
        `ModuleLoss`, its box term already weighted by ``odm_box_weight``.
    """
    loss = multibox_loss(
        logits.float(),
        offsets.float(),
        anchors,
        targets,
        positive_iou=config.odm_positive_iou,
        negative_iou=config.odm_negative_iou,
        neg_ratio=config.neg_ratio,
        variances=variances,
        may_be_negative=may_be_negative,
        background_negatives=config.background_negatives,
        box_cost=giou_cost if config.odm_box == "giou" else smooth_l1_cost,
        quality=config.quality,
        over_all=over_all,
    )
    return loss._replace(loc=config.odm_box_weight * loss.loc)


def _hardest(cost: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Mark, in each row, the ``count`` eligible places of the highest cost; among equals the earlier."""
    ranked = torch.where(eligible, cost, cost.new_full((), -torch.inf))
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(cost.shape[1], device=cost.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return eligible & (rank < count[:, None])
