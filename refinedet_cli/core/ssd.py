"""SSD: one head on the maps of a backbone classifies the anchors and moves them, in one step.

Source: Liu et al., "SSD: Single Shot MultiBox Detector", arXiv:1512.02325, ECCV 2016.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from refinedet_cli.core.anchors import AnchorCache, anchors_per_cell
from refinedet_cli.core.backbones import build_backbone
from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.detector import Detector, Step
from refinedet_cli.core.layers import AnchorHead, caffe_init
from refinedet_cli.core.loss import OverAll, alone, detection_loss
from refinedet_cli.core.postprocess import decode_best
from refinedet_cli.core.structures import Candidates, LossParts, Targets


class RawOutput(NamedTuple):
    """What the network predicts for each anchor.

    Attributes:
        logits: float[B, A, C].
        offsets: float[B, A, 4], from the anchor.
        input_size: height and width of the input, px-in.
    """

    logits: Tensor
    offsets: Tensor
    input_size: tuple[int, int]


class SSD(nn.Module):
    """The network, with fresh weights drawn from torch's global generator."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.network)
        per_cell = anchors_per_cell(config.require_anchors())
        self.head = AnchorHead(self.backbone.channels, per_cell, config.classes.with_background)
        caffe_init(self.head)
        if config.network.head_init == "prior":
            self.head.begin_at_prior(config.loss.neg_ratio)

    def forward(self, images: Tensor) -> RawOutput:
        """Map preprocessed pictures float[B, 3, H, W], of sides that fit the backbone, to `RawOutput`."""
        logits, offsets = self.head(self.backbone(images))
        return RawOutput(logits, offsets, (images.shape[2], images.shape[3]))


class Criterion:
    """The multi-task loss of a batch, with the ODM's settings of the config."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self.anchors = AnchorCache(config.require_anchors())

    def __call__(self, raw: RawOutput, targets: Targets, *, over_all: OverAll = alone) -> LossParts:
        """Compute the loss in float32, whatever the precision of ``raw``; ``over_all`` as in `Loss`.

        Returns:
            `LossParts` with the terms conf and loc (already divided by the number of positives) and the positives of
            the head. Finite for finite input.

        Source: paper, Sec. 2.2; it is what `refinedet.Criterion` computes without an ARM.
        """
        loss, anchors = self.config.loss, self.anchors(raw.input_size, raw.logits.device)
        head = detection_loss(
            raw.logits, raw.offsets, anchors, targets, loss, variances=self.anchors.config.variances, over_all=over_all
        )
        return LossParts(
            total=head.conf + loss.loc_weight * head.loc,
            parts={"conf": head.conf.detach(), "loc": head.loc.detach()},
            positives={"head": head.positives},
        )


class Decoder:
    """Turns raw output into candidates: score, choose the best, and decode only those."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self.anchors = AnchorCache(config.require_anchors())

    def __call__(self, raw: RawOutput) -> Candidates:
        """Score every anchor and class, and decode the best, in float32."""
        anchors = self.anchors(raw.input_size, raw.logits.device)
        scores = raw.logits.float().softmax(dim=-1)[..., 1:]  # [B, A, C-1]
        return decode_best(scores, anchors, [raw.offsets], self.anchors.config.variances, self.config.postprocess)


def build(config: DetectorConfig) -> Detector:
    """Build an SSD with fresh weights, drawn from torch's global generator."""
    return Detector(
        config=config,
        network=SSD(config),
        criterion=Criterion(config),
        decoder=Decoder(config),
        steps=_steps,
    )


def _steps(config: DetectorConfig, raw: RawOutput) -> tuple[Step, ...]:
    return (Step("head", raw.offsets, config.loss.odm_positive_iou),)
