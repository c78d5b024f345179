"""Presets: they build, they go to JSON and back, and those of the paper hold its numbers."""

from __future__ import annotations

import json

import pytest
import torch

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig, TrainConfig, from_dict, to_dict
from refinedet_cli.core.presets import DEFAULT_PRESET, PRESETS, VOC_CLASSES, get_preset, paper_anchors
from refinedet_cli.errors import ConfigError

ONE = Classes(names=("only",), category_ids=(42,))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("classes", [ONE, VOC_CLASSES], ids=["one class", "voc"])
def test_every_preset_builds_and_fits_its_anchors(name, classes):
    config = get_preset(name, classes).detector
    height, width = config.preprocess.height, config.preprocess.width
    with torch.device("meta"):
        raw = build(config).network(torch.empty(1, 3, height, width))
    if config.family == "yolo":
        assert config.anchors is None
        return
    anchors = tile_anchors(config.require_anchors(), height, width)
    logits = raw.logits if config.family == "ssd" else raw.odm_logits
    assert tuple(logits.shape) == (1, len(anchors), len(classes) + 1)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_goes_to_json_and_back(name):
    preset = get_preset(name, VOC_CLASSES)
    assert preset.detector.preset == name
    assert preset.detector.classes == VOC_CLASSES
    for config, kind in ((preset.detector, DetectorConfig), (preset.train, TrainConfig)):
        assert from_dict(kind, json.loads(json.dumps(to_dict(config)))) == config


def test_the_paper_s_anchors():
    anchors = paper_anchors()
    assert anchors.strides == (8, 16, 32, 64)
    assert anchors.variances == (0.1, 0.2)
    for size, stride, shapes in zip((32, 64, 128, 256), anchors.strides, anchors.shapes, strict=True):
        assert size == 4 * stride
        assert [w / h for w, h in shapes] == pytest.approx([1, 2, 0.5])
        assert [w * h for w, h in shapes] == pytest.approx([size**2] * 3)


@pytest.mark.parametrize(("name", "side"), [("refinedet320_vgg16", 320), ("refinedet512_vgg16", 512)])
def test_the_paper_s_numbers(name, side):
    preset = get_preset(name, VOC_CLASSES)
    network, loss, train = preset.detector.network, preset.detector.loss, preset.train
    assert (preset.detector.preprocess.height, preset.detector.preprocess.width) == (side, side)
    assert preset.detector.preprocess.mean == (123.0, 117.0, 104.0)
    assert preset.detector.preprocess.std == (1.0, 1.0, 1.0)
    assert (network.backbone, network.tcb_channels, network.tcb_norm) == ("vgg16", 256, "none")
    assert (network.arm, network.tcb) == (True, True)
    assert preset.detector.anchors == paper_anchors()
    assert {loss.arm_positive_iou, loss.arm_negative_iou, loss.odm_positive_iou, loss.odm_negative_iou} == {0.5}
    assert (loss.neg_ratio, loss.arm_filter, loss.loc_weight) == (3.0, 0.01, 1.0)
    assert (train.optimizer, train.lr, train.momentum, train.weight_decay) == ("sgd", 1e-3, 0.9, 5e-4)
    assert (train.batch, train.schedule, train.gamma, train.bias_lr) == (32, "multistep", 0.1, 2.0)
    # 07+12 has 16,551 pictures: 120k steps, the rate drops at 80k and 100k.
    steps = train.epochs * (16551 // 32)
    assert steps == pytest.approx(120_000, rel=0.005)
    assert [m * steps for m in train.milestones] == pytest.approx([80_000, 100_000], rel=0.005)


@pytest.mark.parametrize(
    ("name", "side", "batch", "steps", "drops"),
    [
        ("refinedet320_resnet101", 320, 32, 400_000, (280_000, 360_000)),
        ("refinedet512_resnet101", 512, 20, 540_000, (400_000, 480_000)),
    ],
)
def test_the_official_resnets(name, side, batch, steps, drops):
    preset = get_preset(name, VOC_CLASSES)
    network, pixels, train = preset.detector.network, preset.detector.preprocess, preset.train
    assert (network.backbone, network.tcb_channels, network.tcb_norm) == ("resnet101", 256, "batch")
    assert (network.arm, network.tcb, network.head_blocks) == (True, True, True)
    assert (network.stride_in, network.stem_pool) == ("1x1", "ceil")
    assert preset.detector.anchors == paper_anchors()
    assert (pixels.height, pixels.width, pixels.channel_order) == (side, side, "bgr")
    # In RGB order: Caffe subtracts (104, 117, 123) from BGR.
    assert (pixels.mean, pixels.std) == ((123.0, 117.0, 104.0), (1.0, 1.0, 1.0))
    assert (train.optimizer, train.lr, train.momentum, train.weight_decay) == ("sgd", 1e-3, 0.9, 5e-4)
    assert (train.batch, train.schedule, train.gamma, train.bias_lr) == (batch, "multistep", 0.1, 2.0)
    assert (train.freeze_stages, train.freeze_norm) == (0, False)
    # trainval35k has 118,287 pictures.
    planned = train.epochs * (118_287 // batch)
    assert planned == pytest.approx(steps, rel=0.005)
    assert [m * planned for m in train.milestones] == pytest.approx(drops, rel=0.005)


@pytest.mark.parametrize(("name", "head_blocks"), [("refinedet320_resnet18", False), ("refinedet320_resnet50", True)])
def test_the_lighter_resnets_take_torchvision_s_weights(name, head_blocks):
    detector = get_preset(name, VOC_CLASSES).detector
    assert (detector.network.stride_in, detector.network.stem_pool) == ("3x3", "padded")
    assert detector.network.head_blocks == head_blocks
    pixels = detector.preprocess
    assert pixels.channel_order == "rgb"
    assert pixels.mean == pytest.approx([255 * m for m in (0.485, 0.456, 0.406)])
    assert pixels.std == pytest.approx([255 * s for s in (0.229, 0.224, 0.225)])


def test_the_official_augmentation_is_the_default():
    augment = TrainConfig().augment
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (32.0, 0.5, 0.5, 36.0)
    assert (augment.expand_probability, augment.expand_max) == (0.5, 4.0)
    assert (augment.crop_probability, augment.crop_min_scale, augment.mirror_probability) == (1.0, 0.3, 0.5)


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="no preset is called 'refinedet300'") as caught:
        get_preset("refinedet300", ONE)
    assert all(name in (caught.value.hint or "") for name in PRESETS)


def test_the_default_exists():
    assert DEFAULT_PRESET in PRESETS
