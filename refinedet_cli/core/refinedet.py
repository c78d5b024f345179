"""RefineDet: anchors are judged and moved once (ARM), then classified and moved again (ODM).

Source: Zhang et al., "Single-Shot Refinement Neural Network for Object Detection", arXiv:1711.06897, CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from refinedet_cli.core.anchors import AnchorCache, anchors_per_cell
from refinedet_cli.core.backbones import build_backbone
from refinedet_cli.core.boxes import decode
from refinedet_cli.core.config import DetectorConfig, NetworkConfig
from refinedet_cli.core.detector import Detector, Step
from refinedet_cli.core.layers import (
    AnchorHead,
    ArmReader,
    TransferConnectionBlock,
    bottleneck,
    caffe_init,
    gaussian_init,
)
from refinedet_cli.core.loss import OverAll, alone, detection_loss, multibox_loss
from refinedet_cli.core.postprocess import decode_best
from refinedet_cli.core.structures import Candidates, LossParts, Targets

# The blocks in front of the heads narrow to this and widen to four times it, whatever they read.
HEAD_BLOCK_WIDTH = 256


class RawOutput(NamedTuple):
    """What the network predicts for each anchor; without an ARM the first two are None.

    Attributes:
        arm_logits: float[B, A, 2], background and object.
        arm_offsets: float[B, A, 4], from the anchor.
        odm_logits: float[B, A, C].
        odm_offsets: float[B, A, 4], from the refined anchor (from the anchor without an ARM).
        input_size: height and width of the input, px-in.
    """

    arm_logits: Tensor | None
    arm_offsets: Tensor | None
    odm_logits: Tensor
    odm_offsets: Tensor
    input_size: tuple[int, int]


class RefineDet(nn.Module):
    """The network, with fresh weights drawn from torch's global generator."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        network, per_cell = config.network, anchors_per_cell(config.require_anchors())
        self.backbone = build_backbone(network)
        sources = self.backbone.channels
        self.arm = AnchorHead(_head_inputs(network, sources), per_cell, 2) if network.arm else None
        self.tcb = (
            nn.ModuleList(
                TransferConnectionBlock(
                    inputs,
                    network.tcb_channels,
                    coarser=i + 1 < len(sources),
                    norm=network.tcb_norm,
                    up=network.tcb_up,
                    top=network.tcb_top,
                )
                for i, inputs in enumerate(sources)
            )
            if network.tcb
            else None
        )
        widths = (network.tcb_channels,) * len(sources) if network.tcb else sources
        self.odm = AnchorHead(_head_inputs(network, widths), per_cell, config.classes.with_background)
        reads = network.arm and network.odm_reads_arm
        self.arm_reader = ArmReader(config.classes.with_background) if reads else None
        self.arm_blocks = _head_blocks(sources) if network.arm and network.head_blocks else None
        self.odm_blocks = _head_blocks(widths) if network.head_blocks else None
        self._draw_weights(network)
        if network.head_init == "prior":
            for head in (self.arm, self.odm):
                if head is not None:
                    head.begin_at_prior(config.loss.neg_ratio)

    def _draw_weights(self, network: NetworkConfig) -> None:
        """Draw the parts after the backbone as the official code does: what is batch normalised has its own filler."""
        for name, part in self.named_children():
            if name in ("arm_blocks", "odm_blocks") or (name == "tcb" and network.tcb_norm == "batch"):
                gaussian_init(part)
            elif name != "backbone":
                caffe_init(part)

    def forward(self, images: Tensor) -> RawOutput:
        """Map preprocessed pictures float[B, 3, H, W], H and W multiples of 64, to `RawOutput`."""
        maps = self.backbone(images)
        refined: list[Tensor] = maps
        if self.tcb is not None:
            refined, coarser = [], None
            for block, features in zip(reversed(self.tcb), reversed(maps), strict=True):
                coarser = block(features, coarser)
                refined.insert(0, coarser)
        arm_logits, arm_offsets = None, None
        if self.arm is not None:
            arm_logits, arm_offsets = self.arm(_each_through(self.arm_blocks, maps))
        odm_logits, odm_offsets = self.odm(_each_through(self.odm_blocks, refined))
        if self.arm_reader is not None:
            logits, offsets = self.arm_reader(arm_logits, arm_offsets)
            odm_logits, odm_offsets = odm_logits + logits, odm_offsets + offsets
        return RawOutput(arm_logits, arm_offsets, odm_logits, odm_offsets, (images.shape[2], images.shape[3]))


def _head_inputs(network: NetworkConfig, widths: Sequence[int]) -> Sequence[int]:
    return (4 * HEAD_BLOCK_WIDTH,) * len(widths) if network.head_blocks else widths


def _head_blocks(widths: Sequence[int]) -> nn.ModuleList:
    """One residual block a level (official ResNet networks; the paper does not tell of them)."""
    return nn.ModuleList(bottleneck(inputs, HEAD_BLOCK_WIDTH) for inputs in widths)


def _each_through(blocks: nn.ModuleList | None, maps: list[Tensor]) -> list[Tensor]:
    return maps if blocks is None else [block(features) for block, features in zip(blocks, maps, strict=True)]


class Criterion:
    """The multi-task loss of a batch: ARM on the anchors, ODM on the anchors as the ARM has moved them."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self.anchors = AnchorCache(config.require_anchors())

    def __call__(self, raw: RawOutput, targets: Targets, *, over_all: OverAll = alone) -> LossParts:
        """Compute the loss in float32, whatever the precision of ``raw``; ``over_all`` as in `Loss`.

        Returns:
            `LossParts` with the terms arm_conf, arm_loc, odm_conf, odm_loc (already divided by the number of positives)
            and the positives of each module. Finite for finite input. No gradient flows from the ODM's terms into the
            ARM's outputs, unless ``loss.cascade_gradient`` lets that of its boxes through.

        Source: paper, "Loss Function"; mining, filter and normaliser as in multibox_loss_layer of the official code.
        """
        loss, variances = self.config.loss, self.anchors.config.variances
        anchors = self.anchors(raw.input_size, raw.odm_logits.device)
        parts: dict[str, Tensor] = {}
        positives: dict[str, Tensor] = {}
        objectness = None
        if raw.arm_logits is not None and raw.arm_offsets is not None:
            arm_logits, arm_offsets = raw.arm_logits.float(), raw.arm_offsets.float()
            any_object = targets._replace(labels=torch.ones_like(targets.labels))
            arm = multibox_loss(
                arm_logits,
                arm_offsets,
                anchors,
                any_object,
                positive_iou=loss.arm_positive_iou,
                negative_iou=loss.arm_negative_iou,
                neg_ratio=loss.neg_ratio,
                variances=variances,
                background_negatives=loss.background_negatives,
                over_all=over_all,
            )
            parts |= {"arm_conf": arm.conf, "arm_loc": arm.loc}
            positives["arm"] = arm.positives
            with torch.no_grad():
                objectness = arm_logits.softmax(dim=-1)[..., 1]
            anchors = decode(arm_offsets if loss.cascade_gradient else arm_offsets.detach(), anchors, variances)
        odm = detection_loss(
            raw.odm_logits,
            raw.odm_offsets,
            anchors,
            targets,
            loss,
            variances=variances,
            may_be_negative=None if objectness is None else objectness >= loss.arm_filter,
            over_all=over_all,
        )
        parts |= {"odm_conf": odm.conf, "odm_loc": odm.loc}
        positives["odm"] = odm.positives
        weighted = [loss.loc_weight * term if name.endswith("loc") else term for name, term in parts.items()]
        return LossParts(
            total=torch.stack(weighted).sum(), parts={k: v.detach() for k, v in parts.items()}, positives=positives
        )


class Decoder:
    """Turns raw output into candidates: score, filter, choose the best, and decode only those."""

    def __init__(self, config: DetectorConfig) -> None:
        self.config = config
        self.anchors = AnchorCache(config.require_anchors())

    def __call__(self, raw: RawOutput) -> Candidates:
        """Score every anchor and class, and decode the best, in float32.

        Source: paper, "Inference"; thresholds and limits come from the config's `PostprocessConfig`.
        """
        post, variances = self.config.postprocess, self.anchors.config.variances
        anchors = self.anchors(raw.input_size, raw.odm_logits.device)
        scores = raw.odm_logits.float().softmax(dim=-1)[..., 1:]  # [B, A, C-1]
        if raw.arm_logits is not None:
            # Of two classes the softmax is the logistic of their difference, in an eighth of the time.
            objectness = raw.arm_logits.float().diff(dim=-1).sigmoid()
            scores = torch.where(objectness >= post.arm_filter, scores, scores.new_zeros(()))
        moves = [offsets for offsets in (raw.arm_offsets, raw.odm_offsets) if offsets is not None]
        return decode_best(scores, anchors, moves, variances, post)


def build(config: DetectorConfig) -> Detector:
    """Build a RefineDet with fresh weights, drawn from torch's global generator."""
    return Detector(
        config=config,
        network=RefineDet(config),
        criterion=Criterion(config),
        decoder=Decoder(config),
        steps=_steps,
    )


def _steps(config: DetectorConfig, raw: RawOutput) -> tuple[Step, ...]:
    odm = Step("ODM", raw.odm_offsets, config.loss.odm_positive_iou)
    if raw.arm_logits is None or raw.arm_offsets is None:
        return (odm,)
    # What the ARM calls background can never be detected.
    kept = raw.arm_logits.float().softmax(dim=-1)[..., 1] >= config.postprocess.arm_filter
    return Step("ARM", raw.arm_offsets, config.loss.arm_positive_iou), odm._replace(kept=kept)
