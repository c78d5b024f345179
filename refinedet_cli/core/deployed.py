"""A detector as one graph, from the bytes of pictures to detections in their pixels, for export.

Every shape is fixed but that of the pictures, and every operation has a counterpart in standard ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.postprocess import best_kept, greedy_keep, still_alive, suppression_matrix
from refinedet_cli.core.preprocess import preprocess_batch
from refinedet_cli.core.structures import BatchDetections, Candidates

Keeper = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Class-wise greedy NMS of rows of candidates: arguments and result are those of `greedy_keep`."""


class Deployed(nn.Module):
    """A part of a detector that can be exported; tensors in, a plain tuple of tensors out.

    Attributes:
        input_name: of its one input.
        output_names: of what it gives, in order.
    """

    input_name: str
    output_names: tuple[str, ...]


class _FromPictures(Deployed):
    """The steps that lead from pictures to candidates.

    Args:
        detector: on the CPU; its network is put into evaluation mode and converted to ``dtype``, in place.
        dtype: of the network; everything else computes in float32.
    """

    input_name = "images"

    def __init__(self, detector: Detector, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = _frozen(detector, dtype)
        self.config: DetectorConfig = detector.config
        self._decoder = detector.decoder
        self._dtype = dtype
        # Anchors made here are constants of the graph; made while it is traced, they would be part of its work.
        self._decoder(sample_output(detector, dtype))

    def candidates(self, images: Tensor) -> Candidates:
        """Preprocess uint8[B, H, W, 3], run the network and decode."""
        inputs = preprocess_batch(images, self.config.preprocess)
        return self._decoder(self.network(inputs.to(self._dtype)))


class DeployedDetector(_FromPictures):
    """Pictures in, detections out.

    Args:
        detector: as `_FromPictures`.
        keeper: the form of NMS that the target can hold.
        dtype: of the network.
    """

    output_names = ("boxes", "scores", "labels", "counts")

    def __init__(self, detector: Detector, keeper: Keeper, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(detector, dtype)
        self._keeper = keeper

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Find the objects in pictures of one size.

        Args:
            images: uint8[B, H, W, 3], RGB; H and W may be anything from 1 up.

        Returns:
            boxes float32[B, N, 4], xyxy, px-img, inside their picture; scores float32[B, N], descending; labels
            int64[B, N], in 1..C-1; counts int64[B]. Places from the count on are zeros; N is ``keep``, or the number of
            candidates where these are fewer.
        """
        post = self.config.postprocess
        candidates = self.candidates(images)
        batch, groups, places = candidates.scores.shape
        boxes, scores, labels = (t.reshape(batch * groups, places, *t.shape[3:]) for t in candidates)
        kept = self._keeper(boxes, scores, labels, post.nms_iou)
        best = best_kept(candidates, kept.view(batch, groups, places), post.keep)
        return _in_pixels(best, images.shape[1], images.shape[2])


class DeployedCandidates(_FromPictures):
    """Pictures in, candidates for a foreign NMS out."""

    output_names = ("boxes", "scores")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Find what enters NMS in pictures uint8[B, H, W, 3], RGB, of one size.

        Returns:
            boxes float32[B, K, 4], xyxy, px-img, neither clipped nor suppressed; scores float32[B, K, C-1], in which
            each candidate has one class and is 0 in all others.
        """
        found = self.candidates(images)
        boxes = found.boxes.flatten(1, 2) * _sides(images.shape[1], images.shape[2])
        scores = _by_class(found.scores.flatten(1, 2), found.labels.flatten(1, 2), self.config)
        return boxes, scores.transpose(1, 2)


class DeployedNetwork(Deployed):
    """The bare network: preprocessed input in, the tensors of its family's raw output out.

    Args:
        detector: as `_FromPictures`.
        dtype: of the network; input and outputs are float32.
    """

    input_name = "inputs"

    def __init__(self, detector: Detector, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = _frozen(detector, dtype)
        self._dtype = dtype
        raw = sample_output(detector, dtype)
        self.output_names = tuple(name for name, value in raw._asdict().items() if isinstance(value, Tensor))

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Map float32[B, 3, height, width], preprocessed, to the float32 tensors of ``output_names``."""
        raw = self.network(inputs.to(self._dtype))
        return tuple(getattr(raw, name).float() for name in self.output_names)


def _frozen(detector: Detector, dtype: torch.dtype) -> nn.Module:
    return detector.network.to(dtype).requires_grad_(requires_grad=False).eval()


def sample_output(detector: Detector, dtype: torch.dtype = torch.float32) -> Any:
    """Give the raw output of an empty input: a NamedTuple that is private to the detector's family."""
    size = detector.config.preprocess
    with torch.no_grad():
        return detector.network(torch.zeros(1, 3, size.height, size.width, dtype=dtype))


def keep_in_loop(boxes: Tensor, scores: Tensor, labels: Tensor, nms_iou: float) -> Tensor:
    """Do as `greedy_keep` with a loop that a graph can hold."""
    alive = scores > 0
    suppresses = suppression_matrix(boxes, labels, nms_iou)

    def unsettled(before: Tensor, keep: Tensor) -> Tensor:
        return (before != keep).any()

    def settle(before: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return keep.clone(), still_alive(alive, suppresses, keep)

    keep: Tensor
    _, keep = torch.while_loop(unsettled, settle, (alive.clone(), still_alive(alive, suppresses, alive)))
    return keep


@torch.library.custom_op("refinedet::class_nms", mutates_args=())
def class_nms(boxes: Tensor, scores: Tensor, nms_iou: float) -> Tensor:
    """Do as `greedy_keep` on scores float32[R, L, K] in which each candidate has one class that is not 0.

    An exporter puts the target's own NMS in the place of this operation.
    """
    best = scores.max(dim=1)
    return greedy_keep(boxes, best.values, best.indices, nms_iou)


@class_nms.register_fake
def _(boxes: Tensor, scores: Tensor, nms_iou: float) -> Tensor:
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


class KeepByClass:
    """`greedy_keep` through `class_nms`.

    Args:
        config: says how many classes share a row.
    """

    def __init__(self, config: DetectorConfig) -> None:
        self._config = config

    def __call__(self, boxes: Tensor, scores: Tensor, labels: Tensor, nms_iou: float) -> Tensor:
        """Take and return what `greedy_keep` does."""
        one_class_a_row = self._config.postprocess.candidates_per == "class"
        by_class = scores[:, None] if one_class_a_row else _by_class(scores, labels, self._config)
        kept: Tensor = class_nms(boxes, by_class, nms_iou)
        return kept


def _by_class(scores: Tensor, labels: Tensor, config: DetectorConfig) -> Tensor:
    """Spread scores float32[R, K] over their classes: float32[R, C-1, K]."""
    classes = torch.arange(1, config.classes.with_background)[:, None]
    return torch.where(labels[:, None] == classes, scores[:, None], scores.new_zeros(()))


def _sides(height: int, width: int) -> Tensor:
    return torch.stack([torch.scalar_tensor(side) for side in (width, height, width, height)])


def _in_pixels(best: BatchDetections, height: int, width: int) -> tuple[Tensor, ...]:
    """Scale and clip boxes, and close the gaps of those of which nothing lies in the picture."""
    sides = _sides(height, width)
    boxes = torch.minimum((best.boxes * sides).clamp(min=0), sides)
    inside = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    places = boxes.shape[1]
    # Whole numbers without ties: every engine sorts them alike.
    order = torch.arange(places) + torch.where(inside, 0, places)
    order = order.topk(places, largest=False).indices
    filled = inside.gather(1, order)
    return (
        boxes.gather(1, order[..., None].expand(-1, -1, 4)) * filled[..., None],
        best.scores.gather(1, order) * filled,
        best.labels.gather(1, order) * filled,
        filled.sum(dim=1),
    )
