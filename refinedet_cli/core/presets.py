"""Named detectors and training recipes; a preset is a function, a variant changes the preset it comes from.

Sizes and thresholds are those of the official RefineDet code and paper (arXiv:1711.06897) where a preset bears their
name. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from refinedet_cli.core.config import (
    SSD_VGG,
    AnchorConfig,
    AugmentConfig,
    Classes,
    DetectorConfig,
    GridConfig,
    LossConfig,
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


def _of_512(base: Preset, name: str) -> Preset:
    """Give a preset another name and an input of 512 x 512; the anchors keep their sizes in pixels, as published."""
    preprocess = replace(base.detector.preprocess, height=512, width=512)
    return replace(base, detector=replace(base.detector, preset=name, preprocess=preprocess))


def refinedet512_vgg16(classes: Classes) -> Preset:
    """RefineDet512 with VGG-16 as published: the same network and anchors on a larger input."""
    return _of_512(refinedet320_vgg16(classes), "refinedet512_vgg16")


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
    train = replace(base.train, batch=20, epochs=91, milestones=(20 / 27, 8 / 9))
    return _of_512(replace(base, train=train), "refinedet512_resnet101")


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
    """The light default: MobileNetV2, a pyramid of 128 channels with group normalisation, a short recipe.

    Differs from the paper in what its ODM learns from, besides: of refined anchors only those that overlap an object by
    0.7 (0.5 there) are positive, else anchors that come from afar score as high as better placed ones; and it reads the
    ARM's outputs. And its heads begin at a prior. benchmarks/ablation.py measures what each is worth.
    """
    return Preset(
        detector=DetectorConfig(
            preset="refinedet320_mobilenetv2",
            classes=classes,
            network=NetworkConfig(
                backbone="mobilenet_v2", tcb_channels=128, tcb_norm="group", odm_reads_arm=True, head_init="prior"
            ),
            anchors=paper_anchors(),
            loss=LossConfig(odm_positive_iou=0.7, odm_negative_iou=0.7),
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


def refinedet512_mobilenetv2(classes: Classes) -> Preset:
    """The light default on a larger input, for small objects; 2.6 times the work of a picture."""
    return _of_512(refinedet320_mobilenetv2(classes), "refinedet512_mobilenetv2")


def ssd300_anchors() -> AnchorConfig:
    """Default boxes of SSD300 for VOC, whose smallest is 30 px; the other sizes go evenly from 60 to 315 px.

    Source: SSD (arXiv:1512.02325), Sec. 2.2 and 3.1: scales from 0.2 to 0.9, and 0.1 for conv4_3.
    """
    return _ssd300_anchors((30, 60, 111, 162, 213, 264, 315))


def ssd300_coco_anchors() -> AnchorConfig:
    """Default boxes of SSD300 for COCO, whose objects are smaller: 21 px, then evenly from 45 to 315 px.

    Source: SSD (arXiv:1512.02325), Sec. 3.4: scales from 0.15 to 0.9, and 0.07 for conv4_3.
    """
    return _ssd300_anchors((21, 45, 99, 153, 207, 261, 315))


def _ssd300_anchors(sizes: tuple[float, ...]) -> AnchorConfig:
    return AnchorConfig.of_ssd(
        sizes=sizes,
        ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        strides=(8, 16, 32, 64, 100, 300),
    )


def ssd300_vgg16(classes: Classes) -> Preset:
    """SSD300 with VGG-16 as published, with the default boxes of VOC; those of COCO: `ssd300_coco_anchors`.

    232 epochs of 07+12 at batch 32 are about 120k steps. Differs in recipe and channel order as `refinedet320_vgg16`
    does; the augmentation is that of the later version (SSD300*), which draws pictures smaller too.
    """
    return Preset(
        detector=DetectorConfig(
            family="ssd",
            preset="ssd300_vgg16",
            classes=classes,
            network=NetworkConfig(backbone=SSD_VGG, arm=False, tcb=False, fc6_dilation=6),
            anchors=ssd300_anchors(),
            preprocess=PreprocessConfig(height=300, width=300),
            postprocess=PostprocessConfig(candidates=400, candidates_per="class"),
        ),
        train=TrainConfig(epochs=232, schedule="multistep"),
    )


def ssd320_mobilenetv2(classes: Classes) -> Preset:
    """The light default without its two steps: one head on the backbone's own maps, all else equal."""
    base = refinedet320_mobilenetv2(classes)
    detector = replace(
        base.detector,
        family="ssd",
        preset="ssd320_mobilenetv2",
        network=replace(base.detector.network, arm=False, tcb=False, odm_reads_arm=False),
        # Its anchors are not refined, and few overlap an object by more than half.
        loss=LossConfig(),
    )
    return replace(base, detector=detector)


def yolo320_mobilenetv2(classes: Classes) -> Preset:
    """The light default with a grid of 10 x 10 cells in place of anchors; backbone, input and recipe are equal."""
    base = refinedet320_mobilenetv2(classes)
    detector = replace(
        base.detector,
        family="yolo",
        preset="yolo320_mobilenetv2",
        network=NetworkConfig(backbone="mobilenet_v2", arm=False, tcb=False),
        anchors=None,
        loss=LossConfig(),
        grid=GridConfig(stride=32, channels=256, norm="group"),
    )
    return replace(base, detector=detector)


def yolo448_vgg16(classes: Classes) -> Preset:
    """YOLO as published, on VGG-16: 448 px, 7 x 7 cells of two boxes, four convolutions of 1024 channels.

    135 epochs of 07+12 and 64 pictures a step, the rate falls after 75 and 105. Differs: a convolution predicts in
    place of two fully connected layers (`core.yolo`); the augmentation is that of RefineDet; a warm-up of 500 steps,
    averaged weights and clipping; biases learn as fast as weights.
    """
    base = refinedet320_vgg16(classes)
    detector = replace(
        base.detector,
        family="yolo",
        preset="yolo448_vgg16",
        network=NetworkConfig(backbone="vgg16", arm=False, tcb=False),
        anchors=None,
        grid=GridConfig(),
        preprocess=replace(base.detector.preprocess, height=448, width=448),
    )
    train = replace(base.train, batch=64, epochs=135, lr=1e-2, bias_lr=1.0, milestones=(75 / 135, 105 / 135))
    return replace(base, detector=detector, train=train)


def tiny(classes: Classes) -> Preset:
    """A 64-pixel network for tests and first tries, its modules as in the paper; it learns little."""
    base = refinedet320_mobilenetv2(classes)
    detector = replace(
        base.detector,
        preset="tiny",
        network=replace(base.detector.network, tcb_channels=32, odm_reads_arm=False, head_init="xavier"),
        loss=LossConfig(),
        anchors=AnchorConfig.from_sizes(sizes=(8, 16, 32, 64), ratios=(1, 2, 0.5), strides=(8, 16, 32, 64)),
        preprocess=replace(base.detector.preprocess, height=64, width=64),
    )
    return replace(base, detector=detector, train=replace(base.train, batch=8, epochs=10, lr=1e-3, freeze_stages=0))


PRESETS: dict[str, Callable[[Classes], Preset]] = {
    "refinedet320_mobilenetv2": refinedet320_mobilenetv2,
    "refinedet512_mobilenetv2": refinedet512_mobilenetv2,
    "refinedet320_resnet18": refinedet320_resnet18,
    "refinedet320_resnet50": refinedet320_resnet50,
    "refinedet320_resnet101": refinedet320_resnet101,
    "refinedet512_resnet101": refinedet512_resnet101,
    "refinedet320_vgg16": refinedet320_vgg16,
    "refinedet512_vgg16": refinedet512_vgg16,
    "ssd320_mobilenetv2": ssd320_mobilenetv2,
    "ssd300_vgg16": ssd300_vgg16,
    "yolo320_mobilenetv2": yolo320_mobilenetv2,
    "yolo448_vgg16": yolo448_vgg16,
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
