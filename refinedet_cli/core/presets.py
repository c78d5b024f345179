"""Named detectors and training recipes; a preset is a function, a variant changes the preset it comes from.

Sizes and thresholds are those of the official RefineDet code and paper (arXiv:1711.06897) where a preset bears their
name. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from refinedet_cli.core.config import (
    AnchorConfig,
    AugmentConfig,
    Classes,
    DetectorConfig,
    NetworkConfig,
    PostprocessConfig,
    PreprocessConfig,
    TrainConfig,
)
from refinedet_cli.errors import ConfigError

DEFAULT_PRESET = "refinedet320_mobilenetv2"

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOC_CLASSES = Classes(names=VOC_NAMES, category_ids=tuple(range(1, 21)))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A detector and the recipe that trains it."""

    detector: DetectorConfig
    train: TrainConfig


def paper_anchors() -> AnchorConfig:
    """One size per level, four times its stride, in the ratios 1, 2 and 1/2 (paper, "Anchors Design and Matching")."""
    return AnchorConfig.from_sizes(sizes=(32, 64, 128, 256), ratios=(1, 2, 0.5), strides=(8, 16, 32, 64))


def paper_postprocess() -> PostprocessConfig:
    """400 candidates a picture, 200 kept: the numbers of the paper's inference section."""
    return PostprocessConfig()


def caffe_postprocess() -> PostprocessConfig:
    """1000 candidates a class, 500 kept: the numbers of the official scripts, meant for scoring."""
    return PostprocessConfig(candidates=1000, candidates_per="class", keep=500)


def torchvision_preprocess() -> PreprocessConfig:
    """Mean and deviation of the colours of ImageNet, which torchvision's classifiers expect."""
    return PreprocessConfig(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))


POSTPROCESS_PRESETS: dict[str, Callable[[], PostprocessConfig]] = {
    "paper": paper_postprocess,
    "caffe": caffe_postprocess,
}


def refinedet320_vgg16(classes: Classes) -> Preset:
    """RefineDet320 with VGG-16 as published; 232 epochs of 07+12 at batch 32 are about 120k steps.

    Differs in the recipe: a warm-up, averaged weights and clipping, against the divergence that users of the official
    code met. Differs in the channel order: RGB where official weights want BGR (``preprocess.channel_order``).
    """
    return Preset(
        detector=DetectorConfig(
            preset="refinedet320_vgg16",
            classes=classes,
            network=NetworkConfig(backbone="vgg16"),
            anchors=paper_anchors(),
        ),
        train=TrainConfig(epochs=232, schedule="multistep"),
    )


def refinedet512_vgg16(classes: Classes) -> Preset:
    """RefineDet512 with VGG-16 as published: the same network and anchors on a larger input."""
    base = refinedet320_vgg16(classes)
    detector = replace(
        base.detector,
        preset="refinedet512_vgg16",
        preprocess=replace(base.detector.preprocess, height=512, width=512),
    )
    return replace(base, detector=detector)


def refinedet320_resnet101(classes: Classes) -> Preset:
    """RefineDet320 with ResNet-101 as published, heads behind residual blocks; batch normalisation learns.

    108 epochs of COCO's trainval35k at batch 32 are about 400k steps. Differs in the recipe as the one of VGG-16 does.
    """
    return Preset(
        detector=DetectorConfig(
            preset="refinedet320_resnet101",
            classes=classes,
            network=NetworkConfig(
                backbone="resnet101", tcb_norm="batch", head_blocks=True, stride_in="1x1", stem_pool="ceil"
            ),
            anchors=paper_anchors(),
            preprocess=PreprocessConfig(channel_order="bgr"),
        ),
        train=TrainConfig(epochs=108, schedule="multistep", milestones=(0.7, 0.9), freeze_norm=False, decay_norm=True),
    )


def refinedet512_resnet101(classes: Classes) -> Preset:
    """RefineDet512 with ResNet-101 as published; 91 epochs of trainval35k at batch 20 are about 540k steps."""
    base = refinedet320_resnet101(classes)
    detector = replace(
        base.detector,
        preset="refinedet512_resnet101",
        preprocess=replace(base.detector.preprocess, height=512, width=512),
    )
    return replace(base, detector=detector, train=replace(base.train, batch=20, epochs=91, milestones=(20 / 27, 8 / 9)))


def refinedet320_resnet50(classes: Classes) -> Preset:
    """The network with ResNet-101 on half as deep a backbone, made for torchvision's weights.

    It keeps the blocks before the heads, as the ResNet-50 that others published figures of (VoVNet, arXiv:1904.09730).
    """
    base = refinedet320_resnet101(classes)
    detector = replace(
        base.detector,
        preset="refinedet320_resnet50",
        network=replace(base.detector.network, backbone="resnet50", stride_in="3x3", stem_pool="padded"),
        preprocess=torchvision_preprocess(),
    )
    return replace(base, detector=detector)


def refinedet320_resnet18(classes: Classes) -> Preset:
    """The light default on ResNet-18, made for torchvision's weights.

    It has no blocks before the heads: with them the network would nearly double.
    """
    base = refinedet320_mobilenetv2(classes)
    detector = replace(
        base.detector,
        preset="refinedet320_resnet18",
        network=replace(base.detector.network, backbone="resnet18"),
        preprocess=torchvision_preprocess(),
    )
    return replace(base, detector=detector)


def refinedet320_mobilenetv2(classes: Classes) -> Preset:
    """The light default: MobileNetV2, a pyramid of 128 channels with group normalisation, a short recipe."""
    return Preset(
        detector=DetectorConfig(
            preset="refinedet320_mobilenetv2",
            classes=classes,
            network=NetworkConfig(backbone="mobilenet_v2", tcb_channels=128, tcb_norm="group"),
            anchors=paper_anchors(),
            preprocess=PreprocessConfig(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
            # In a crowd each object brings many candidates: the paper's 400 cost blood cells 2 points AP50.
            postprocess=PostprocessConfig(candidates=1000),
        ),
        train=TrainConfig(
            batch=16,
            epochs=60,
            optimizer="adamw",
            lr=1e-3,
            bias_lr=1.0,
            backbone_lr=0.3,
            weight_decay=0.02,
            ema_decay=0.995,
            freeze_stages=2,
            warmup_steps=100,
            augment=AugmentConfig(expand_max=2.0),
        ),
    )


def tiny(classes: Classes) -> Preset:
    """A 64-pixel network for tests and first tries; it learns little."""
    base = refinedet320_mobilenetv2(classes)
    detector = replace(
        base.detector,
        preset="tiny",
        network=replace(base.detector.network, tcb_channels=32),
        anchors=AnchorConfig.from_sizes(sizes=(8, 16, 32, 64), ratios=(1, 2, 0.5), strides=(8, 16, 32, 64)),
        preprocess=replace(base.detector.preprocess, height=64, width=64),
    )
    return replace(base, detector=detector, train=replace(base.train, batch=8, epochs=10, lr=1e-3, freeze_stages=0))


PRESETS: dict[str, Callable[[Classes], Preset]] = {
    "refinedet320_mobilenetv2": refinedet320_mobilenetv2,
    "refinedet320_resnet18": refinedet320_resnet18,
    "refinedet320_resnet50": refinedet320_resnet50,
    "refinedet320_resnet101": refinedet320_resnet101,
    "refinedet512_resnet101": refinedet512_resnet101,
    "refinedet320_vgg16": refinedet320_vgg16,
    "refinedet512_vgg16": refinedet512_vgg16,
    "tiny": tiny,
}


def get_preset(name: str, classes: Classes) -> Preset:
    """Look a preset up by its name.

    Raises:
        ConfigError: no preset is called so; the hint lists those there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}", f"choose from {', '.join(PRESETS)}")
    return PRESETS[name](classes)
