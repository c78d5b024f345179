"""The plain structures that pass between the floors.

Vocabulary, here and everywhere: ``B`` pictures, ``A`` anchors, ``C`` classes including background 0, ``N`` objects or
detections, ``K`` candidates, ``H W`` pixels. Boxes are ``xyxy`` (left, top, right, bottom) or ``cxcywh`` (centre,
size), in ``px-in`` (pixels of the network input), ``px-img`` (pixels of the original picture) or ``norm`` (fractions of
the sides).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """The objects of one picture as training sees them.

    Attributes:
        boxes: float32[N, 4], xyxy, norm, with positive width and height.
        labels: int64[N], in 1..C-1.
    """

    boxes: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4 or self.labels.shape != self.boxes.shape[:1]:
            raise ValueError(
                f"expected boxes [N, 4] and labels [N], got {list(self.boxes.shape)} and {list(self.labels.shape)}"
            )


class Targets(NamedTuple):
    """The objects of a batch, packed: no padding, however unequal the pictures.

    Attributes:
        boxes: float32[N, 4], xyxy, norm.
        labels: int64[N], in 1..C-1.
        image: int64[N], the picture of each object, in 0..B-1 and ascending.
        batch: B.
    """

    boxes: Tensor
    labels: Tensor
    image: Tensor
    batch: int

    @classmethod
    def pack(cls, targets: Sequence[Target]) -> Targets:
        """Join the targets of B pictures, some of which may be without objects."""
        counts = torch.tensor([len(t.labels) for t in targets])
        return cls(
            boxes=torch.cat([t.boxes for t in targets]).float(),
            labels=torch.cat([t.labels for t in targets]),
            image=torch.repeat_interleave(torch.arange(len(targets)), counts),
            batch=len(targets),
        )

    def to(self, device: torch.device) -> Targets:
        """Move the tensors to a device."""
        return Targets(
            self.boxes.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.image.to(device, non_blocking=True),
            self.batch,
        )


class Candidates(NamedTuple):
    """Decoded boxes that may become detections; scores of 0 mark empty places.

    Attributes:
        boxes: float32[B, G, K, 4], xyxy, norm, clipped only with ``postprocess.clip_first``.
        scores: float32[B, G, K], descending in K.
        labels: int64[B, G, K], in 1..C-1.

    Boxes of different groups G never share a label, so they never suppress each other.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class BatchDetections(NamedTuple):
    """Detections of a batch in fixed shapes, best first; places from ``counts`` on are zeros.

    Attributes:
        boxes: float32[B, keep, 4], xyxy, norm, not clipped.
        scores: float32[B, keep], descending.
        labels: int64[B, keep], in 1..C-1.
        counts: int64[B].
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Detections:
    """What was found in one picture, best first.

    Attributes:
        boxes: float32[N, 4], xyxy, px-img, inside the picture.
        scores: float32[N], in (0, 1], descending.
        labels: int64[N], in 1..C-1; label ``i`` is class ``i - 1`` of the detector's list.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.boxes.ndim != 2 or self.boxes.shape[1] != 4:
            raise ValueError(f"expected boxes [N, 4], got {list(self.boxes.shape)}")
        if self.scores.shape != self.boxes.shape[:1] or self.labels.shape != self.boxes.shape[:1]:
            raise ValueError(
                f"expected {len(self.boxes)} scores and labels, got {list(self.scores.shape)} and "
                f"{list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """The detections that score at least this."""
        chosen = self.scores >= score
        return Detections(self.boxes[chosen], self.scores[chosen], self.labels[chosen])


class LossParts(NamedTuple):
    """The terms of the loss and what they were computed from; every field is a float32 scalar tensor."""

    total: Tensor
    parts: dict[str, Tensor]
    positives: dict[str, Tensor]
