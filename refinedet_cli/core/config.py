"""Settings of a detector and of its training, as frozen dataclasses.

`DetectorConfig` travels with the weights and is all that is needed to rebuild a detector; `TrainConfig` is how a run
was made and travels as provenance only. Every field is a number, string, bool, None or nested tuple, so that a config
goes to JSON and back without loss. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from refinedet_cli.errors import ConfigError

T = TypeVar("T")

# SSD300's VGG-16 goes on to a single cell; the others are read at strides 8, 16, 32 and 64.
SSD_VGG = "vgg16_ssd"
BACKBONES = ("vgg16", "mobilenet_v2", "resnet18", "resnet50", "resnet101", SSD_VGG)


def _require(holds: bool, message: str, hint: str | None = None) -> None:
    if not holds:
        raise ConfigError(message, hint)


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The foreground classes of a detector, in the order of its outputs.

    Label 0 is background; ``names[i]`` and ``category_ids[i]`` belong to label ``i + 1``.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(len(self.names) > 0, "a detector needs at least one class")
        _require(len(self.names) == len(self.category_ids), "names and category ids differ in number")
        _require(len(set(self.names)) == len(self.names), f"class names repeat: {self.names}")
        _require(len(set(self.category_ids)) == len(self.category_ids), "category ids repeat")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def with_background(self) -> int:
        """Number of outputs of a softmax classifier: the classes and background."""
        return len(self.names) + 1


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """Anchors of every pyramid level.

    Attributes:
        strides: distance of neighbouring cells of each level, px-in.
        shapes: per level, the (width, height) of each anchor of a cell, px-in.
        variances: divisors of the centre offsets and of the size offsets.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64)
    shapes: tuple[tuple[tuple[float, float], ...], ...]
    variances: tuple[float, float] = (0.1, 0.2)

    def __post_init__(self) -> None:
        _require(len(self.strides) == len(self.shapes), "anchors.strides and anchors.shapes differ in length")
        _require(all(s > 0 for s in self.strides), f"anchors.strides must be positive, not {self.strides}")
        _require(all(level for level in self.shapes), "every level needs at least one anchor")
        _require(
            all(w > 0 and h > 0 for level in self.shapes for w, h in level),
            "anchors.shapes must be positive",
        )
        _require(all(v > 0 for v in self.variances), "anchors.variances must be positive")

    @classmethod
    def from_sizes(cls, sizes: tuple[float, ...], ratios: tuple[float, ...], strides: tuple[int, ...]) -> AnchorConfig:
        """One anchor per aspect ratio (width / height) with the area ``size ** 2``."""
        shapes = tuple(tuple((s * r**0.5, s / r**0.5) for r in ratios) for s in sizes)
        return cls(strides=strides, shapes=shapes)

    @classmethod
    def of_ssd(
        cls, sizes: tuple[float, ...], ratios: tuple[tuple[float, ...], ...], strides: tuple[int, ...]
    ) -> AnchorConfig:
        """Default boxes of SSD: a level's square, the one between it and the next level's, its ratios and inverses.

        ``sizes`` has one more than there are levels.

        Source: SSD (arXiv:1512.02325), Sec. 2.2; the order is that of the official code.
        """
        shapes = tuple(
            (
                (size, size),
                ((size * following) ** 0.5,) * 2,
                *((size * r**0.5, size / r**0.5) for ratio in level for r in (ratio, 1 / ratio)),
            )
            for size, following, level in zip(sizes, sizes[1:], ratios, strict=False)
        )
        return cls(strides=strides, shapes=shapes)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The grid of a YOLO network, its head and its loss; the defaults are those of the paper.

    Attributes:
        stride: side of a cell, px-in: 64 as in the paper (448 px have 7 x 7 cells), or 32.
        boxes: that each cell predicts; at most one of them finds an object.
        layers: 3x3 convolutions between the backbone and the prediction.
        channels: their width.
        norm: normalisation after each of them.
        coord_weight: of the errors of place and size in the loss.
        no_object_weight: of the confidence of boxes that have no object to find.
    """

    stride: Literal[32, 64] = 64
    boxes: int = 2
    layers: int = 4
    channels: int = 1024
    norm: Literal["none", "batch", "group"] = "none"
    coord_weight: float = 5.0
    no_object_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("boxes", "layers", "channels"):
            value = getattr(self, name)
            _require(value >= 1, f"grid.{name} must be at least 1, not {value}")
        _require(
            self.norm != "group" or self.channels % 16 == 0,
            f"grid.channels must be a multiple of 16 with group normalisation, not {self.channels}",
        )
        for name in ("coord_weight", "no_object_weight"):
            value = getattr(self, name)
            _require(value >= 0, f"grid.{name} must not be negative, not {value}")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Layers of a RefineDet network.

    Attributes:
        backbone: which feature extractor: one of `BACKBONES`, or "timm/NAME" for one of the extra ``timm``.
        tcb_channels: width of the transfer connection blocks.
        tcb_norm: normalisation after each of their convolutions.
        arm: predict objectness and a first box refinement (off: one-step regression, no negative filtering).
        tcb: carry features from coarse to fine levels (off: the detection heads read the backbone's maps).
        head_blocks: put a residual block of its own in front of every head (official ResNet networks).
        odm_reads_arm: tell the ODM how the ARM has judged and moved each anchor, if there is one (not in the paper).
        stride_in: the convolution of a ResNet bottleneck that halves the resolution; "1x1" is the official code's,
            "3x3" torchvision's.
        stem_pool: the first pooling of a ResNet; "ceil" is the official code's, "padded" torchvision's.
        fc6_dilation: of VGG's fc6; 3 is the official code's, 6 SSD300's and that of some other implementations.
        tcb_up: the deconvolution between levels; "2x2" is the official code's, "3x3" overlaps.
        tcb_top: whether ReLU follows the last two convolutions of the coarsest transfer connection block, as in the
            official code, or they are "linear".
    """

    backbone: str
    tcb_channels: int = 256
    tcb_norm: Literal["none", "batch", "group"] = "none"
    arm: bool = True
    tcb: bool = True
    head_blocks: bool = False
    odm_reads_arm: bool = False
    stride_in: Literal["1x1", "3x3"] = "3x3"
    stem_pool: Literal["padded", "ceil"] = "padded"
    fc6_dilation: int = 3
    tcb_up: Literal["2x2", "3x3"] = "2x2"
    tcb_top: Literal["relu", "linear"] = "relu"
    head_init: Literal["xavier", "prior"] = "xavier"

    def __post_init__(self) -> None:
        _require(
            self.backbone in BACKBONES or (self.backbone.startswith("timm/") and self.backbone != "timm/"),
            f"network.backbone must be one of {', '.join(BACKBONES)}, or timm/NAME, not {self.backbone!r}",
        )
        _require(self.tcb_channels > 0, f"network.tcb_channels must be positive, not {self.tcb_channels}")
        _require(1 <= self.fc6_dilation <= 32, f"network.fc6_dilation must be in [1, 32], not {self.fc6_dilation}")
        _require(
            self.tcb_norm != "group" or self.tcb_channels % 16 == 0,
            f"network.tcb_channels must be a multiple of 16 with group normalisation, not {self.tcb_channels}",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Matching, hard negative mining and the multi-task loss.

    Attributes:
        arm_positive_iou, arm_negative_iou: an anchor is positive at or above the first, and may be a negative below
            the second.
        odm_positive_iou, odm_negative_iou: the same for refined anchors. What is said of the ODM holds for the one head
            of an SSD, whose anchors are not refined.
        neg_ratio: mined negatives for each positive, per picture.
        arm_filter: negatives whose ARM objectness is below this are too easy for the ODM; 0 switches the filter off.
        loc_weight: weight of the box terms against the class terms.
        background_negatives: negatives mined from a picture without objects, which else contributes nothing.
        odm_box: cost of the ODM's boxes: "smooth_l1" of their offsets, as in the paper, or "giou".
        odm_box_weight: factor on it.
        quality: how much of a positive's ODM class target is the IoU its box reaches; 0, as in the paper, is none.
        cascade_gradient: let the cost of the ODM's boxes move the ARM's too.
    """

    arm_positive_iou: float = 0.5
    arm_negative_iou: float = 0.5
    odm_positive_iou: float = 0.5
    odm_negative_iou: float = 0.5
    neg_ratio: float = 3.0
    arm_filter: float = 0.01
    loc_weight: float = 1.0
    background_negatives: int = 0
    odm_box: Literal["smooth_l1", "giou"] = "smooth_l1"
    odm_box_weight: float = 1.0
    quality: float = 0.0
    cascade_gradient: bool = False

    def __post_init__(self) -> None:
        for part in ("arm", "odm"):
            positive, negative = getattr(self, f"{part}_positive_iou"), getattr(self, f"{part}_negative_iou")
            _require(
                0 < negative <= positive <= 1,
                f"loss.{part}_negative_iou and loss.{part}_positive_iou must satisfy 0 < negative <= positive <= 1, "
                f"not {negative} and {positive}: set both",
            )
        _require(self.neg_ratio >= 0, f"loss.neg_ratio must not be negative, not {self.neg_ratio}")
        _require(0 <= self.arm_filter < 1, f"loss.arm_filter must be in [0, 1), not {self.arm_filter}")
        for name in ("loc_weight", "background_negatives", "odm_box_weight"):
            value = getattr(self, name)
            _require(value >= 0, f"loss.{name} must not be negative, not {value}")
        _require(0 <= self.quality <= 1, f"loss.quality must be in [0, 1], not {self.quality}")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How a picture becomes network input: resize to (height, width), then ``(rgb - mean) / std`` on the 0..255 scale.

    ``mean`` and ``std`` are in RGB order whatever ``channel_order`` the network wants.
    """

    height: int = 320
    width: int = 320
    mean: tuple[float, float, float] = (123.0, 117.0, 104.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            _require(value > 0, f"preprocess.{name} must be positive, not {value}")
        _require(all(s > 0 for s in self.std), "preprocess.std must be positive")


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """From network output to detections.

    Attributes:
        score_threshold: candidates must score above this.
        arm_filter: anchors whose ARM objectness is below this are dropped; 0 switches the filter off.
        candidates: how many of the best candidates enter NMS.
        candidates_per: whether that number is per picture or per class.
        nms_iou: of two boxes of one class that overlap by more than this, the lower scored goes.
        keep: the most detections of one picture.
        clip_first: clip boxes to the picture before NMS, as torchvision does; else what NMS has kept is clipped.
        soft_nms_iou: after NMS, lower the score of a box by the overlap with a better one of its class where that is
            more than this (linear soft-NMS); None leaves scores as they are.
    """

    score_threshold: float = 0.01
    arm_filter: float = 0.01
    candidates: int = 400
    candidates_per: Literal["picture", "class"] = "picture"
    nms_iou: float = 0.45
    keep: int = 200
    clip_first: bool = False
    soft_nms_iou: float | None = None

    def __post_init__(self) -> None:
        for name in ("score_threshold", "arm_filter", "nms_iou"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"postprocess.{name} must be in [0, 1], not {value}")
        _require(self.candidates > 0, f"postprocess.candidates must be positive, not {self.candidates}")
        _require(self.keep > 0, f"postprocess.keep must be positive, not {self.keep}")
        _require(
            self.soft_nms_iou is None or 0 <= self.soft_nms_iou <= 1,
            f"postprocess.soft_nms_iou must be in [0, 1], not {self.soft_nms_iou}",
        )


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Everything that decides what a detector computes, except its weights.

    A "refinedet" and an "ssd" have anchors and no grid, a "yolo" has a grid and no anchors.
    """

    family: Literal["refinedet", "ssd", "yolo"] = "refinedet"
    preset: str
    classes: Classes
    network: NetworkConfig
    anchors: AnchorConfig | None = None
    grid: GridConfig | None = None
    loss: LossConfig = LossConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    def __post_init__(self) -> None:
        has_grid = self.family == "yolo"
        for name, belongs in (("anchors", not has_grid), ("grid", has_grid)):
            given = getattr(self, name) is not None
            _require(given or not belongs, f"setting {name!r} is missing: a {self.family} needs it")
            _require(belongs or not given, f"{name} must be left out: a {self.family} has none")
        _CHECKS[self.family](self)

    def require_anchors(self) -> AnchorConfig:
        """The anchors, where there must be some.

        Raises:
            ConfigError: there are none, as in a YOLO.
        """
        if self.anchors is None:
            raise ConfigError(f"{self.preset} is a {self.family}, which has no anchors")
        return self.anchors

    def require_grid(self) -> GridConfig:
        """The grid, where there must be one.

        Raises:
            ConfigError: there is none; only a YOLO has one.
        """
        if self.grid is None:
            raise ConfigError(f"{self.preset} is a {self.family}, which has no grid")
        return self.grid


def map_sides(backbone: str, side: int) -> tuple[int, ...]:
    """Count the cells along one side of each map that a backbone makes of an input; below 1 if it cannot."""
    if backbone != SSD_VGG:
        return tuple(side // stride for stride in (8, 16, 32, 64))
    halved = [-(-side // stride) for stride in (8, 16, 32, 64)]
    return (*halved, halved[-1] - 2, halved[-1] - 4)


def _check_refinedet(config: DetectorConfig) -> None:
    _require(config.network.backbone != SSD_VGG, f"network.backbone {SSD_VGG} is for the family ssd alone")
    _check_pyramid(config)


def _check_sides(config: DetectorConfig) -> None:
    for name in ("height", "width"):
        value = getattr(config.preprocess, name)
        _require(value % 64 == 0, f"preprocess.{name} must be a positive multiple of 64, not {value}")


def _check_pyramid(config: DetectorConfig) -> None:
    """Demand what networks that read the usual four maps of a backbone need."""
    _check_sides(config)
    strides = config.require_anchors().strides
    _require(
        strides == (8, 16, 32, 64),
        f"anchors.strides must be [8, 16, 32, 64], those of the backbone's maps, not {list(strides)}",
    )


def _check_ssd(config: DetectorConfig) -> None:
    for name in ("arm", "tcb", "head_blocks", "odm_reads_arm"):
        _require(not getattr(config.network, name), f"network.{name} must be false: an SSD has none")
    if config.network.backbone != SSD_VGG:
        _check_pyramid(config)
        return
    strides = config.require_anchors().strides
    for name in ("height", "width"):
        side = getattr(config.preprocess, name)
        cells, tiled = map_sides(SSD_VGG, side), tuple(-(-side // stride) for stride in strides)
        _require(
            cells == tiled and min(cells) > 0,
            f"preprocess.{name} {side} and anchors.strides {list(strides)} do not fit: the maps of {SSD_VGG} have "
            f"{', '.join(str(max(0, n)) for n in cells)} cells, the anchors {', '.join(map(str, tiled))}",
            "SSD300 has 300 x 300 px and strides [8, 16, 32, 64, 100, 300]",
        )


def _check_yolo(config: DetectorConfig) -> None:
    _require(config.network.backbone != SSD_VGG, f"network.backbone {SSD_VGG} is for the family ssd alone")
    _check_sides(config)
    for name in ("arm", "tcb", "head_blocks", "odm_reads_arm"):
        _require(not getattr(config.network, name), f"network.{name} must be false: a YOLO has none")
    _require(
        config.network.head_init == "xavier",
        "network.head_init must be left out: it is of heads with anchors, which a YOLO has not",
    )
    # Said rather than ignored, whatever it was meant to change.
    for field in dataclasses.fields(NetworkConfig):
        _require(
            not field.name.startswith("tcb_") or getattr(config.network, field.name) == field.default,
            f"network.{field.name} is of transfer connection blocks, which a YOLO has not; its head is set in grid",
        )
    for field in dataclasses.fields(LossConfig):
        _require(
            getattr(config.loss, field.name) == field.default,
            f"loss.{field.name} is of detectors with anchors; the loss of a YOLO is weighted by grid.coord_weight and "
            "grid.no_object_weight",
        )


_CHECKS: dict[str, Callable[[DetectorConfig], None]] = {
    "refinedet": _check_refinedet,
    "ssd": _check_ssd,
    "yolo": _check_yolo,
}


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training pictures; the defaults are those of the official code.

    Attributes:
        brightness: largest shift on the 0..255 scale.
        contrast, saturation: factors are drawn from [1 - x, 1 + x].
        hue: largest turn in degrees.
        expand_probability, expand_max: chance and largest factor of placing the picture on a canvas of the mean colour.
        crop_probability: chance of drawing IoU-constrained crops (the whole picture stays one of the choices).
        crop_min_scale: the smallest crop, as a fraction of the picture's sides.
        mirror_probability: chance of a left-right flip.
        mosaic_probability: chance of putting four pictures, each cropped and changed on its own, into one.
        mosaic_until: fraction of the run after which no mosaics are made.
        min_size: objects with a side below this after all changes, in px-in, are left out.
    """

    brightness: float = 32.0
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 36.0
    expand_probability: float = 0.5
    expand_max: float = 4.0
    crop_probability: float = 1.0
    crop_min_scale: float = 0.3
    mirror_probability: float = 0.5
    mosaic_probability: float = 0.0
    mosaic_until: float = 0.9
    min_size: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "expand_probability", "crop_probability", "mirror_probability", "mosaic_probability", "mosaic_until",
        ):  # fmt: skip
            value = getattr(self, name)
            _require(0 <= value <= 1, f"train.augment.{name} must be in [0, 1], not {value}")
        for name in ("contrast", "saturation"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"train.augment.{name} must be in [0, 1), not {value}")
        _require(0 <= self.brightness <= 255, f"train.augment.brightness must be in [0, 255], not {self.brightness}")
        _require(0 <= self.hue <= 180, f"train.augment.hue must be in [0, 180], not {self.hue}")
        _require(self.expand_max >= 1, f"train.augment.expand_max must be at least 1, not {self.expand_max}")
        _require(
            0 < self.crop_min_scale <= 1, f"train.augment.crop_min_scale must be in (0, 1], not {self.crop_min_scale}"
        )
        _require(self.min_size >= 0, f"train.augment.min_size must not be negative, not {self.min_size}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a detector is trained.

    Attributes:
        batch: pictures in one optimiser step.
        accumulate: parts of a step's pictures that a process runs one after the other, to need less memory; the step
            is the same.
        epochs: passes over the data.
        steps: optimiser steps of the run, in place of ``epochs``; 0 leaves it to these.
        balance: show pictures of rare classes more often: a class that is in less than this fraction of the pictures
            repeats them by the root of what is missing (LVIS, arXiv:1908.03195). 0 shows every picture once an epoch.
        optimizer: "sgd" (with momentum) or "adamw".
        lr: learning rate of the heads and the pyramid after warm-up.
        backbone_lr: factor on ``lr`` for the backbone.
        bias_lr: factor on ``lr`` for biases, which are never decayed.
        weight_decay: decay of weights that are not biases or normalisation parameters.
        decay_norm: decay normalisation parameters too, as the official ResNet code does.
        warmup_steps: steps over which the rate rises from near 0 to ``lr``.
        schedule: "cosine" to ``lr * final_lr``, or "multistep" by ``gamma`` at ``milestones``.
        milestones: where the rate drops, as fractions of the run.
        ema_decay: decay of the running average of weights that is evaluated and saved; 0 keeps the raw weights.
        clip_norm: largest norm of all gradients together; 0 switches clipping off.
        precision: "auto" picks bf16 where the device computes it natively.
        freeze_stages: backbone stages, from the input up, that are not trained (a stage halves the resolution).
        freeze_norm: keep the backbone's batch normalisation at its running statistics.
        unfreeze: (fraction of the run, stages) pairs: from that fraction on only so many stages stay frozen.
        small_input: (fraction of the run, scale) pairs: up to that fraction, train at that scale of the input size.
        evaluate_every: epochs between evaluations; 0 evaluates only at the end.
        patience: end the run after so many evaluations in a row without a better AP; 0 never does.
        seed: every random draw of the run derives from it.
    """

    batch: int = 32
    accumulate: int = 1
    epochs: int = 60
    steps: int = 0
    balance: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    backbone_lr: float = 1.0
    bias_lr: float = 2.0
    weight_decay: float = 5e-4
    decay_norm: bool = False
    warmup_steps: int = 500
    schedule: Literal["cosine", "multistep"] = "cosine"
    final_lr: float = 0.01
    milestones: tuple[float, ...] = (2 / 3, 5 / 6)
    gamma: float = 0.1
    ema_decay: float = 0.999
    clip_norm: float = 10.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    freeze_stages: int = 0
    freeze_norm: bool = True
    unfreeze: tuple[tuple[float, int], ...] = ()
    small_input: tuple[tuple[float, float], ...] = ()
    evaluate_every: int = 5
    patience: int = 0
    seed: int = 0
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "epochs"):
            value = getattr(self, name)
            _require(value >= 1, f"train.{name} must be at least 1, not {value}")
        _require(self.lr > 0, f"train.lr must be positive, not {self.lr}")
        for name in ("backbone_lr", "bias_lr", "weight_decay", "warmup_steps", "clip_norm", "freeze_stages", "steps"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name} must not be negative, not {value}")
        _require(0 <= self.seed < 2**63, f"train.seed must be in [0, 2**63), not {self.seed}")
        for name in ("evaluate_every", "patience"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative, not {getattr(self, name)}")
        _require(
            not self.patience or self.evaluate_every > 0,
            f"train.patience counts evaluations, so with train.patience {self.patience} train.evaluate_every must be "
            "at least 1",
        )
        _require(0 <= self.balance <= 1, f"train.balance must be in [0, 1], not {self.balance}")
        _require(0 <= self.momentum < 1, f"train.momentum must be in [0, 1), not {self.momentum}")
        _require(0 <= self.ema_decay < 1, f"train.ema_decay must be in [0, 1), not {self.ema_decay}")
        _require(0 <= self.final_lr <= 1, f"train.final_lr must be in [0, 1], not {self.final_lr}")
        _require(0 < self.gamma <= 1, f"train.gamma must be in (0, 1], not {self.gamma}")
        _require(all(0 < m < 1 for m in self.milestones), f"train.milestones must be in (0, 1), not {self.milestones}")
        _require(
            all(0 < until <= 1 and 0 < scale <= 1 for until, scale in self.small_input),
            f"train.small_input must hold (fraction, scale) pairs in (0, 1], not {self.small_input}",
        )
        self._check_unfreeze()

    def _check_unfreeze(self) -> None:
        fractions = [0.0, *(fraction for fraction, _ in self.unfreeze), 1.0]
        stages = [self.freeze_stages, *(stages for _, stages in self.unfreeze)]
        _require(
            all(a < b for a, b in itertools.pairwise(fractions))
            and all(a > b >= 0 for a, b in itertools.pairwise(stages)),
            "train.unfreeze must hold (fraction, stages) pairs of rising fractions in (0, 1) and falling stages, the "
            f"first below train.freeze_stages ({self.freeze_stages}), not {self.unfreeze}",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a config into plain dicts, lists, numbers and strings; ``from_dict`` turns it back into an equal config."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def from_dict(cls: type[T], data: Any, *, where: str = "") -> T:
    """Build a config dataclass from plain data, checking every name and type.

    Raises:
        ConfigError: names the dotted setting that is unknown, missing, of the wrong type or out of range.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where or 'config'} must be a table of settings, not {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise ConfigError(f"unknown setting {_dotted(where, name)!r}", f"known here: {', '.join(sorted(known))}")
    missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in data]  # type: ignore[arg-type]
    if missing:
        raise ConfigError(f"setting {_dotted(where, missing[0])!r} is missing")
    return cls(**{name: _convert(hints[name], value, _dotted(where, name)) for name, value in data.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert plain data to the annotated type, or say which setting does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        cls = typing.cast("type", hint)
        return value if isinstance(value, cls) else from_dict(cls, value, where=where)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        # False for NaN too; integers beyond it would not convert.
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where} must be a finite number, not {value}")
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r}")


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, not {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{where} must have {len(args)} values, not {len(value)}")
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
