"""torchvision's ``ssd300_vgg16``: its state dict and its numbers as ours.

Where torchvision differs from the official SSD (arXiv:1512.02325), what is set here follows torchvision:

- default boxes are those for COCO, and none is wider or higher than the picture; only sizes are clipped, not places;
- only the third pooling covers the edge of an odd map, the official ones all do; at 300 px no other map is odd;
- boxes are clipped to the picture before NMS, the official ones are not; 400 of each class enter it in both;
- size offsets are limited to a factor of 62.5 (1000 / 16), ours to 1000, the official ones not at all;
- input is RGB less (123.0, 117.0, 104.0) on the 0..255 scale; the official code has the same mean in BGR.

One difference remains: torchvision resizes pictures to 300 x 300 without antialiasing, we with it, so detections of
larger pictures are close but not equal. Its published weights have 91 outputs a box: background and the ids of COCO,
of which ten belong to no class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from refinedet_cli.core.config import Classes, DetectorConfig, PreprocessConfig
from refinedet_cli.core.presets import ssd300_coco_anchors, ssd300_vgg16
from refinedet_cli.errors import CheckpointError

# Tensors that tell a state dict of this network from others.
SIGNS = ("backbone.scale_weight", "backbone.extra.0.7.1.weight", "head.classification_head.module_list.5.weight")
PREPROCESS = PreprocessConfig(height=300, width=300, mean=(0.48235 * 255, 0.45882 * 255, 0.40784 * 255))
_LEVELS = range(6)
# A layer's name there, and in our backbone.
_LAYERS: dict[str, str] = {
    "features.0": "conv1.0.0", "features.2": "conv1.1.0",
    "features.5": "conv2.0.0", "features.7": "conv2.1.0",
    "features.10": "conv3.0.0", "features.12": "conv3.1.0", "features.14": "conv3.2.0",
    "features.17": "conv4.0.0", "features.19": "conv4.1.0", "features.21": "conv4.2.0",
    "extra.0.1": "conv5.0.0", "extra.0.3": "conv5.1.0", "extra.0.5": "conv5.2.0",
    "extra.0.7.1": "fc6.0", "extra.0.7.3": "fc7.0",
    "extra.1.0": "conv6.0.0", "extra.1.2": "conv6.1.0",
    "extra.2.0": "conv7.0.0", "extra.2.2": "conv7.1.0",
    "extra.3.0": "conv8.0.0", "extra.3.2": "conv8.1",
    "extra.4.0": "conv9.0.0", "extra.4.2": "conv9.1",
}  # fmt: skip


def torchvision_config(classes: Classes) -> DetectorConfig:
    """Configure our SSD300 to compute what torchvision's does."""
    config = ssd300_vgg16(classes).detector
    anchors = ssd300_coco_anchors()
    shapes = tuple(
        tuple((min(width, PREPROCESS.width), min(height, PREPROCESS.height)) for width, height in level)
        for level in anchors.shapes
    )
    return replace(
        config,
        anchors=replace(anchors, shapes=shapes),
        preprocess=PREPROCESS,
        postprocess=replace(config.postprocess, clip_first=True),
    )


def count_classes(tensors: Mapping[str, Tensor]) -> int:
    """Count the outputs of each box in a state dict of torchvision's ``ssd300_vgg16``, background included.

    Raises:
        CheckpointError: it is not a state dict of this network.
    """
    _check(tensors)
    return len(tensors[SIGNS[2]]) // 4


def convert_ssd300(tensors: Mapping[str, Tensor], labels: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Rename and rearrange the tensors of torchvision's ``ssd300_vgg16``.

    Args:
        tensors: its state dict.
        labels: which of its class outputs to take, in this order; background, 0, comes first by itself. None takes all.
            Without some of them the scores of the others grow by what those had.

    Returns:
        The state dict of our network, float32: `SSD` of `torchvision_config` with as many classes.

    Raises:
        CheckpointError: a tensor is missing, is one too many or has another shape.
    """
    _check(tensors)
    outputs = count_classes(tensors)
    rows = torch.tensor(range(outputs) if labels is None else [0, *labels])
    converted = {"backbone.norm4.weight": tensors["backbone.scale_weight"].float()}
    for kind in ("weight", "bias"):
        for theirs, ours in _LAYERS.items():
            converted[f"backbone.{ours}.{kind}"] = tensors[f"backbone.{theirs}.{kind}"].float()
        for level in _LEVELS:
            classes = tensors[f"head.classification_head.module_list.{level}.{kind}"].float()
            offsets = tensors[f"head.regression_head.module_list.{level}.{kind}"].float()
            by_anchor = [classes.unflatten(0, (-1, outputs))[:, rows], offsets.unflatten(0, (-1, 4))]
            converted[f"head.levels.{level}.{kind}"] = torch.cat(by_anchor, dim=1).flatten(0, 1)
    return converted


def _check(tensors: Mapping[str, Tensor]) -> None:
    wanted = {"backbone.scale_weight"}
    for kind in ("weight", "bias"):
        wanted |= {f"backbone.{name}.{kind}" for name in _LAYERS}
        wanted |= {
            f"head.{part}_head.module_list.{level}.{kind}"
            for part in ("classification", "regression")
            for level in _LEVELS
        }
    missing, surplus = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing:
        raise CheckpointError(f"not an ssd300_vgg16 of torchvision: tensor {missing[0]!r} is missing")
    if surplus:
        raise CheckpointError(f"not an ssd300_vgg16 of torchvision: it has no place for tensor {surplus[0]!r}")
    anchors = (4, 6, 6, 6, 4, 4)
    outputs = len(tensors[SIGNS[2]]) // anchors[-1]
    for level, count in zip(_LEVELS, anchors, strict=True):
        for part, numbers in (("classification", outputs), ("regression", 4)):
            name = f"head.{part}_head.module_list.{level}.weight"
            if len(tensors[name]) != count * numbers:
                raise CheckpointError(
                    f"not an ssd300_vgg16 of torchvision: {name!r} has {len(tensors[name])} outputs, "
                    f"not {count} x {numbers}"
                )
