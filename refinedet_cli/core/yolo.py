r"""YOLO: a grid of cells, each of which predicts a few boxes and one class for what has its centre in it.

Source: Redmon et al., "You Only Look Once: Unified, Real-Time Object Detection", arXiv:1506.02640, CVPR 2016. Where the
    paper is silent, the authors' code (darknet, ``detection_layer``) is followed.
Differs: the paper ends in two fully connected layers, which fix the size of the input. Here a convolution predicts the
    :math:`5B + C` numbers of a cell, at linear outputs as there, so that any input size serves; what a cell knows of
    the rest of the picture comes through the receptive field alone, and there is no dropout. The backbone is any of
    ours in place of the paper's first 20 convolutions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from refinedet_cli.core.backbones import build_backbone, keep_to_stride_32
from refinedet_cli.core.boxes import cxcywh_to_xyxy, pair_iou, xyxy_to_cxcywh
from refinedet_cli.core.config import DetectorConfig, GridConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.layers import caffe_init, conv
from refinedet_cli.core.loss import OverAll, alone
from refinedet_cli.core.postprocess import pick, to_candidates, top_candidates
from refinedet_cli.core.structures import Candidates, LossParts, Targets

# The paper's leaky rectifier.
_SLOPE = 0.1
# A predicted centre further from its cell than this, in cells, is no longer told apart, nor is a side longer than this,
# in pictures: boxes stay finite, and so does their overlap.
_FARTHEST = 1000.0
_LONGEST = 1000.0
# Errors beyond this cost in proportion, no longer by their square, which would overflow; the numbers predicted are of
# the order of 1.
_LARGEST_ERROR = 1000.0
# Where boxes begin: at the middle of their cell, a quarter of the picture wide and high.
_FIRST_BOX = (0.5, 0.5, 0.5, 0.5, 0.0)


class RawOutput(NamedTuple):
    """What the network predicts for each of h x w cells.

    Attributes:
        classes: float[B, h, w, C-1], probability of each class if there is an object; not limited to [0, 1].
        boxes: float[B, h, w, boxes, 5]: centre in the cell (0 is its left or upper edge, 1 the other), square roots of
            width and height as fractions of the picture, confidence; none limited.
    """

    classes: Tensor
    boxes: Tensor


class YOLO(nn.Module):
    """The network, with fresh weights drawn from torch's global generator.

    A head of a few convolutions reads the backbone's map at stride 32. For a grid at stride 64 its second convolution
    halves the resolution, as in the paper.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        grid = config.require_grid()
        self.backbone = build_backbone(config.network)
        keep_to_stride_32(self.backbone)
        halving = min(1, grid.layers - 1) if grid.stride == 64 else -1
        inputs = self.backbone.channels[2]
        self.head = nn.Sequential()
        for i in range(grid.layers):
            layers = conv(inputs, grid.channels, 3, stride=2 if i == halving else 1, norm=grid.norm)
            self.head.append(nn.Sequential(*layers, nn.LeakyReLU(_SLOPE, inplace=True)))
            inputs = grid.channels
        self.classes = nn.Conv2d(inputs, len(config.classes), 1)
        self.boxes = nn.Conv2d(inputs, grid.boxes * len(_FIRST_BOX), 1)
        self._draw_weights(grid)

    def _draw_weights(self, grid: GridConfig) -> None:
        """Draw the head. Differs: predictions start near the same plain box, so that early steps are small."""
        caffe_init(self.head)
        for layer in (self.classes, self.boxes):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.boxes.bias.copy_(torch.tensor(_FIRST_BOX).repeat(grid.boxes))  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> RawOutput:
        """Map preprocessed pictures float[B, 3, H, W], H and W multiples of 64, to `RawOutput`."""
        features = self.head(self.backbone(images)[2])
        classes, boxes = (layer(features).permute(0, 2, 3, 1) for layer in (self.classes, self.boxes))
        return RawOutput(classes, boxes.unflatten(-1, (-1, len(_FIRST_BOX))))


class Placed(NamedTuple):
    """The objects that cells learn, at most one a cell.

    Attributes:
        objects: int64[n], rows of the packed targets, in the order of pictures and cells.
        image: int64[n], the picture of each.
        row, column: int64[n], the cell of each.
    """

    objects: Tensor
    image: Tensor
    row: Tensor
    column: Tensor


def place_objects(targets: Targets, rows: int, columns: int) -> Placed:
    """Give each object to the cell that holds its centre.

    Args:
        targets: the objects of a batch.
        rows: of the grid.
        columns: of the grid.

    Returns:
        `Placed`. Of objects whose centres lie in one cell the largest stays, among equals the earliest; the others are
        left out. A centre on the edge between two cells belongs to the right or lower one, one on the right or lower
        edge of the picture to the last.

    Source: paper, Sec. 2; it knows one object a cell and does not say which. Differs: darknet takes the first of a list
        that it shuffles, and leaves out objects narrower or lower than 0.5 % of the picture.
    """
    boxes = xyxy_to_cxcywh(targets.boxes)
    column = (boxes[:, 0] * columns).long().clamp(0, columns - 1)
    row = (boxes[:, 1] * rows).long().clamp(0, rows - 1)
    cell = (targets.image * rows + row) * columns + column
    order = (boxes[:, 2] * boxes[:, 3]).argsort(descending=True, stable=True)
    order = order[cell[order].argsort(stable=True)]
    ordered = cell[order]
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    objects = order[first]
    return Placed(objects, targets.image[objects], row[objects], column[objects])


def to_boxes(predicted: Tensor, cells: Tensor, sides: Tensor) -> Tensor:
    """Turn predictions into boxes.

    Args:
        predicted: float32[..., 4], centre in the cell and roots of the size, as `RawOutput` has them.
        cells: float32[..., 2], column and row of the cell, broadcastable with ``predicted``.
        sides: float32[2], columns and rows of the grid.

    Returns:
        float32[..., 4], cxcywh, norm, not clipped. Finite for finite predictions: a centre is at most 1000 cells from
        its own, a side at most 1000 pictures long. A negative root counts as its opposite, as in darknet.
    """
    centre = (cells + predicted[..., :2].clamp(-_FARTHEST, _FARTHEST)) / sides
    longest = math.sqrt(_LONGEST)
    return torch.cat([centre, predicted[..., 2:].clamp(-longest, longest).square()], dim=-1)


def choose_responsible(predicted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the box of a cell that is to predict its object.

    Args:
        predicted: float32[n, boxes, 4], cxcywh, norm.
        wanted: float32[n, 4], xyxy, norm.

    Returns:
        the box, int64[n], and its IoU with the object, float32[n]. The box is that of the highest IoU; where none
        overlaps, that of the lowest root of the mean squared error of centre and size; among equals the earlier.

    Source: paper, Sec. 2.2 for the first rule, darknet for the second.
    """
    ious = pair_iou(cxcywh_to_xyxy(predicted), wanted[:, None])
    # The mean and the root do not change the order.
    errors = (predicted - xyxy_to_cxcywh(wanted)[:, None]).square().sum(dim=-1)
    chosen = torch.where(ious.amax(dim=1) > 0, ious.argmax(dim=1), errors.argmin(dim=1))
    return chosen, ious.gather(1, chosen[:, None])[:, 0]


class Criterion:
    """The sum of squared errors of a batch."""

    def __init__(self, config: DetectorConfig) -> None:
        self.grid = config.require_grid()

    def __call__(self, raw: RawOutput, targets: Targets, *, over_all: OverAll = alone) -> LossParts:
        """Compute the loss in float32, whatever the precision of ``raw``.

        Args:
            raw: of B pictures.
            targets: their objects.
            over_all: as `Loss` says; here it counts the pictures.

        Returns:
            `LossParts` with the terms box (centre and roots of the size), object (confidence of responsible boxes
            against their IoU), no_object (confidence of all others against 0) and class, each the mean over the
            pictures of its sum, before its weight. As positives it counts the objects that were learned, and those left
            out because a larger one has its centre in the same cell. Finite for finite input up to 1e30. No gradient
            flows through the IoU that the confidence has to learn.

        Source: paper, Sec. 2.2, formula (3). Differs: the paper sums over a batch; here the sum is divided by its
            pictures, as darknet does with the learning rate, so that a rate fits any batch. An error beyond 1000 costs
            in proportion instead of by its square.
        """
        classes, boxes = raw.classes.float(), raw.boxes.float()
        rows, columns = boxes.shape[1:3]
        placed = place_objects(targets, rows, columns)
        cells = torch.stack([placed.column, placed.row], dim=-1)
        sides = cells.new_tensor([columns, rows]).float()
        wanted = targets.boxes[placed.objects]
        predicted = boxes[placed.image, placed.row, placed.column]  # [n, boxes, 5]
        with torch.no_grad():
            responsible, iou = choose_responsible(to_boxes(predicted[..., :4], cells[:, None], sides), wanted)
            form = xyxy_to_cxcywh(wanted)
            form = torch.cat([form[:, :2] * sides - cells, form[:, 2:].clamp(min=0).sqrt()], dim=-1)
            label = functional.one_hot(targets.labels[placed.objects] - 1, classes.shape[-1]).float()
        own = predicted[torch.arange(len(predicted), device=boxes.device), responsible]  # [n, 5]
        confidence = boxes[..., 4]
        idle = torch.ones_like(confidence)
        idle[placed.image, placed.row, placed.column, responsible] = 0
        parts = {
            "box": _squared(own[:, :4], form),
            "object": _squared(own[:, 4], iou),
            "no_object": _squared(confidence * idle, torch.zeros_like(confidence)),
            "class": _squared(classes[placed.image, placed.row, placed.column], label),
        }
        pictures = over_all(boxes.new_tensor(float(targets.batch))).clamp(min=1)
        parts = {name: term / pictures for name, term in parts.items()}
        weights = {"box": self.grid.coord_weight, "no_object": self.grid.no_object_weight}
        learned = len(placed.objects)
        counts = {"objects": learned, "left_out": len(targets.labels) - learned}
        return LossParts(
            total=torch.stack([weights.get(name, 1.0) * term for name, term in parts.items()]).sum(),
            parts={name: term.detach() for name, term in parts.items()},
            positives={name: boxes.new_tensor(float(count)) for name, count in counts.items()},
        )


def _squared(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Sum squared errors, those beyond `_LARGEST_ERROR` in proportion."""
    return 2 * functional.huber_loss(predicted, wanted, reduction="sum", delta=_LARGEST_ERROR)


class Decoder:
    """Turns raw output into candidates."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config

    def __call__(self, raw: RawOutput) -> Candidates:
        """Score every box for every class, and take the best, in float32.

        A score is the class probability times the confidence (the paper's class-specific confidence), each of them
        first limited to [0, 1].

        Source: paper, Sec. 2, formula (1). Differs: the paper does not limit its linear outputs; there, two below 0
            would make a score above it.
        """
        classes, boxes = raw.classes.float(), raw.boxes.float()
        rows, columns = boxes.shape[1:3]
        confidence = boxes[..., 4:].clamp(0, 1)
        scores = (confidence * classes.clamp(0, 1)[..., None, :]).flatten(1, 3)  # [B, h * w * boxes, C-1]
        best = top_candidates(scores, self.config.postprocess)
        row, column = (torch.arange(n, device=boxes.device) for n in (rows, columns))
        cells = torch.stack([column.expand(rows, columns), row[:, None].expand(rows, columns)], dim=-1)
        sides = torch.tensor([columns, rows], dtype=boxes.dtype, device=boxes.device)
        decoded = to_boxes(boxes[..., :4], cells[:, :, None].to(boxes.dtype), sides).flatten(1, 3)
        return to_candidates(best, pick(decoded, best.anchors), self.config.postprocess)


def build(config: DetectorConfig) -> Detector:
    """Build a YOLO with fresh weights, drawn from torch's global generator."""
    return Detector(config=config, network=YOLO(config), criterion=Criterion(config), decoder=Decoder(config))
