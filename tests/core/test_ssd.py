"""SSD: against torchvision's on the same weights, against RefineDet without its two steps, and as published."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.detection import ssd300_vgg16

from refinedet_cli.core import refinedet
from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.build import build
from refinedet_cli.core.config import (
    AnchorConfig,
    Classes,
    DetectorConfig,
    LossConfig,
    NetworkConfig,
    PreprocessConfig,
    from_dict,
    map_sides,
    to_dict,
)
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.postprocess import suppress, to_detections
from refinedet_cli.core.presets import (
    POSTPROCESS_PRESETS,
    VOC_CLASSES,
    get_preset,
    ssd300_anchors,
    ssd300_coco_anchors,
)
from refinedet_cli.core.structures import Target, Targets
from refinedet_cli.errors import CheckpointError, ConfigError
from refinedet_cli.zoo.importers.torchvision_ssd import convert_ssd300, count_classes, torchvision_config

TWO = Classes(names=("a", "b"), category_ids=(1, 2))
THREE = Classes(names=("a", "b", "c"), category_ids=(1, 2, 3))


def small(backbone: str = "mobilenet_v2", **changes: Any) -> DetectorConfig:
    base = get_preset("ssd320_mobilenetv2", TWO).detector
    network = replace(base.network, backbone=backbone)
    return replace(base, network=network, preprocess=replace(base.preprocess, height=64, width=128), **changes)


def seeded(config: DetectorConfig, seed: int = 0) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config)


def on_meta(config: DetectorConfig) -> nn.Module:
    with torch.device("meta"):
        return build(config).network


def target(*boxes: tuple[float, float, float, float]) -> Target:
    return Target(torch.tensor(boxes).reshape(-1, 4), torch.arange(len(boxes)) % 2 + 1)


# As published.


def test_ssd300_has_the_published_size():
    config = get_preset("ssd300_vgg16", VOC_CLASSES).detector
    network = on_meta(config)
    assert sum(p.numel() for p in network.parameters()) == 26_285_486
    maps = network.backbone(torch.empty(1, 3, 300, 300, device="meta"))  # type: ignore[operator]
    assert [tuple(m.shape[2:]) for m in maps] == [(s, s) for s in (38, 19, 10, 5, 3, 1)]
    raw = network(torch.empty(2, 3, 300, 300, device="meta"))
    assert tuple(raw.logits.shape) == (2, 8732, 21)
    assert tuple(raw.offsets.shape) == (2, 8732, 4)
    assert len(tile_anchors(config.require_anchors(), 300, 300)) == 8732
    assert config.postprocess == replace(
        POSTPROCESS_PRESETS["paper"](), candidates=400, candidates_per="class", nms_iou=0.45, keep=200
    )


@pytest.mark.parametrize(
    ("anchors", "first", "sizes"),
    [
        (ssd300_anchors(), 30, (30, 60, 111, 162, 213, 264, 315)),
        (ssd300_coco_anchors(), 21, (21, 45, 99, 153, 207, 261, 315)),
    ],
    ids=["voc", "coco"],
)
def test_default_boxes_by_hand(anchors, first, sizes):
    assert anchors.variances == (0.1, 0.2)
    assert [len(level) for level in anchors.shapes] == [4, 6, 6, 6, 4, 4]
    assert [level[0] for level in anchors.shapes] == [(s, s) for s in sizes[:-1]]
    between = (first * sizes[1]) ** 0.5
    wide, tall = first * 2**0.5, first / 2**0.5
    assert anchors.shapes[0][1:] == (
        (between, between),
        (pytest.approx(wide), pytest.approx(tall)),
        (pytest.approx(tall), pytest.approx(wide)),
    )
    assert [w / h for w, h in anchors.shapes[1]] == pytest.approx([1, 1, 2, 1 / 2, 3, 1 / 3])
    assert [w * h for w, h in anchors.shapes[1][2:]] == pytest.approx([sizes[1] ** 2] * 4)


def test_sides_of_maps_are_those_of_the_network():
    network = on_meta(get_preset("ssd300_vgg16", TWO).detector)
    for side in (257, 300, 321, 384, 401):
        maps = network.backbone(torch.empty(1, 3, side, 300, device="meta"))  # type: ignore[operator]
        assert tuple(m.shape[2] for m in maps) == map_sides("vgg16_ssd", side)
        assert tuple(m.shape[3] for m in maps) == (38, 19, 10, 5, 3, 1)
    for backbone in ("vgg16", "mobilenet_v2", "resnet18"):
        with torch.device("meta"):
            maps = build(small(backbone)).network.backbone(torch.empty(1, 3, 64, 192))  # type: ignore[operator]
        assert [tuple(m.shape[2:]) for m in maps] == list(
            zip(map_sides(backbone, 64), map_sides(backbone, 192), strict=True)
        )


def test_stages_hold_the_five_blocks_and_fc6_its_dilation():
    network: Any = on_meta(get_preset("ssd300_vgg16", TWO).detector)
    assert [sum(p.ndim == 4 for p in s.parameters()) for s in network.backbone.stages()] == [2, 2, 3, 3, 3]
    assert network.backbone.fc6[0].dilation == network.backbone.fc6[0].padding == (6, 6)
    config = get_preset("ssd300_vgg16", TWO).detector
    other: Any = on_meta(replace(config, network=replace(config.network, fc6_dilation=3)))
    assert other.backbone.fc6[0].dilation == (3, 3)


# Against torchvision.


def lively_torchvision(images: Tensor, outputs: int) -> Any:
    """Draw a network whose scores and boxes differ widely from place to place, whatever level they come from."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=outputs).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        nn.init.normal_(model.backbone.scale_weight, 20.0, 2.0)
        maps = list(model.backbone(model.transform(list(images))[0].tensors).values())
        for level, features in enumerate(maps):
            for part, spread in ((model.head.classification_head, 2.0), (model.head.regression_head, 1.0)):
                layer = part.module_list[level]
                layer.weight.mul_(spread / layer(features).std())
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Detector, Tensor]:
    """A network of torchvision, ours with the same weights, and two pictures of 300 x 300, 0..1."""
    images = torch.rand(2, 3, 300, 300, generator=torch.Generator().manual_seed(1))
    theirs = lively_torchvision(images, 4)
    ours = seeded(torchvision_config(THREE))
    ours.network.load_state_dict(convert_ssd300(theirs.state_dict()))
    ours.network.eval()
    return theirs, ours, images


def inputs_of(config: DetectorConfig, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.preprocess.mean, config.preprocess.std))
    return (images * 255 - mean) / std


def test_default_boxes_are_torchvision_s(pair):
    theirs, ours, images = pair
    batch, _ = theirs.transform(list(images))
    boxes = theirs.anchor_generator(batch, list(theirs.backbone(batch.tensors).values()))[0]
    tiled = tile_anchors(ours.config.anchors, 300, 300)
    corners = torch.cat([tiled[:, :2] - tiled[:, 2:] / 2, tiled[:, :2] + tiled[:, 2:] / 2], dim=1)
    assert_close(corners * 300, boxes, rtol=0, atol=1e-4)
    assert not torch.equal(tiled, tile_anchors(ssd300_coco_anchors(), 300, 300))  # some are cut to the picture's side


@torch.no_grad()
def test_the_forward_pass_is_torchvision_s(pair):
    theirs, ours, images = pair
    expected = theirs.head(list(theirs.backbone(theirs.transform(list(images))[0].tensors).values()))
    raw = ours.network(inputs_of(ours.config, images))
    assert float(raw.logits.std()) > 1.5
    assert_close(raw.logits, expected["cls_logits"], rtol=0, atol=1e-4)
    assert_close(raw.offsets, expected["bbox_regression"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_detections_are_torchvision_s(pair):
    theirs, ours, images = pair
    raw = ours.network(inputs_of(ours.config, images))
    found = to_detections(suppress(ours.decoder(raw), ours.config.postprocess), [(300, 300)] * 2)
    for mine, expected in zip(found, theirs(list(images)), strict=True):
        assert len(mine) == 200
        assert len(set(mine.labels.tolist())) == 3
        assert_close(mine.labels, expected["labels"])
        assert_close(mine.scores, expected["scores"], rtol=0, atol=1e-4)
        assert_close(mine.boxes, expected["boxes"], rtol=0, atol=3e-3)  # px; 1e-5 of the sides


@torch.no_grad()
def test_clipping_first_matters(pair):
    theirs, ours, images = pair
    config = replace(ours.config, postprocess=replace(ours.config.postprocess, clip_first=False))
    candidates = seeded(config).decoder(ours.network(inputs_of(ours.config, images)))
    found = to_detections(suppress(candidates, config.postprocess), [(300, 300)] * 2)
    assert not torch.equal(found[0].boxes, theirs(list(images))[0]["boxes"])


def test_some_of_the_classes_can_be_taken(pair):
    theirs, _, images = pair
    config = torchvision_config(TWO)
    fewer = seeded(config)
    fewer.network.load_state_dict(convert_ssd300(theirs.state_dict(), labels=[3, 1]))
    fewer.network.eval()
    with torch.no_grad():
        raw = fewer.network(inputs_of(config, images))
        maps = list(theirs.backbone(theirs.transform(list(images))[0].tensors).values())
        expected = theirs.head(maps)["cls_logits"][..., [0, 3, 1]]
    assert_close(raw.logits, expected, rtol=0, atol=1e-4)


def test_other_state_dicts_are_refused(pair):
    state = pair[0].state_dict()
    assert count_classes(state) == 4
    name = "backbone.extra.4.2.bias"
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        convert_ssd300({n: t for n, t in state.items() if n != name})
    with pytest.raises(CheckpointError, match=r"no place for tensor 'backbone\.extra\.5\.0\.weight'"):
        convert_ssd300({**state, "backbone.extra.5.0.weight": torch.zeros(1)})
    odd = "head.regression_head.module_list.0.weight"
    with pytest.raises(CheckpointError, match=f"'{odd}' has 12 outputs, not 4 x 4"):
        convert_ssd300({**state, odd: state[odd][:12]})


def test_the_imported_config_goes_to_json_and_back():
    config = torchvision_config(THREE)
    assert from_dict(DetectorConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config.preprocess.mean == pytest.approx((123.0, 117.0, 104.0), abs=0.01)


# Against RefineDet.


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "vgg16", "resnet18", "timm/regnetx_002"])
def test_it_is_refinedet_without_arm_and_tcb(backbone):
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    config = small(backbone, loss=LossConfig(loc_weight=0.5, quality=0.5, odm_box="giou", odm_box_weight=2.0))
    ssd, other = seeded(config), seeded(replace(config, family="refinedet"))
    ssd.network.backbone.load_state_dict(other.network.backbone.state_dict())  # type: ignore[union-attr, operator]
    ssd.network.head.load_state_dict(other.network.odm.state_dict())  # type: ignore[union-attr, operator]
    images = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    targets = Targets.pack([target((0.1, 0.2, 0.4, 0.9), (0.5, 0.5, 0.6, 0.7)), target()])
    ours, theirs = (d.network.eval()(images) for d in (ssd, other))
    assert isinstance(theirs, refinedet.RawOutput)
    assert torch.equal(ours.logits, theirs.odm_logits)
    assert torch.equal(ours.offsets, theirs.odm_offsets)
    losses = [d.criterion(raw, targets) for d, raw in ((ssd, ours), (other, theirs))]
    assert_close(losses[0].total, losses[1].total)
    for name in ("conf", "loc"):
        assert torch.equal(losses[0].parts[name], losses[1].parts[f"odm_{name}"])
    assert losses[0].positives == {"head": losses[1].positives["odm"]}
    for mine, expected in zip(ssd.decoder(ours), other.decoder(theirs), strict=True):
        assert torch.equal(mine, expected)
    assert ssd.steps is not None
    (step,) = ssd.steps(config, ours)
    assert (step.name, step.positive_iou, step.kept) == ("head", 0.5, None)


def test_the_comparison_is_fair():
    plain, refined = (get_preset(name, VOC_CLASSES) for name in ("ssd320_mobilenetv2", "refinedet320_mobilenetv2"))
    assert plain.train == refined.train
    same = replace(
        plain.detector,
        family="refinedet",
        preset=refined.detector.preset,
        network=replace(plain.detector.network, arm=True, tcb=True, odm_reads_arm=True),
        # What is matched is another thing: anchors there, refined anchors here.
        loss=refined.detector.loss,
    )
    assert same == refined.detector
    paper = LossConfig()
    assert plain.detector.loss == paper
    assert refined.detector.loss == replace(paper, odm_positive_iou=0.7, odm_negative_iou=0.7)
    count = sum(p.numel() for p in on_meta(plain.detector).parameters())
    assert count < sum(p.numel() for p in on_meta(refined.detector).parameters())


# Training.


def test_at_the_prior_background_is_as_likely_as_among_mined_anchors():
    config = small()
    with torch.no_grad():
        raw = seeded(replace(config, network=replace(config.network, head_init="prior"))).network(
            torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
        )
    likely = raw.logits.softmax(dim=-1).mean(dim=(0, 1))
    assert float(likely[0]) == pytest.approx(0.75, abs=0.02)
    assert likely[1:].tolist() == pytest.approx([0.25 / (len(likely) - 1)] * (len(likely) - 1), abs=0.02)


def test_every_parameter_is_pulled():
    detector = seeded(small())
    images = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    objects = [target((0.1, 0.1, 0.4, 0.6), (0.4, 0.1, 0.9, 0.9)), target((0.0, 0.0, 1.0, 1.0))]
    loss = detector.criterion(detector.network(images), Targets.pack(objects))
    loss.total.backward()
    for name, parameter in detector.network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


def test_no_pictures_cost_nothing_and_count_as_often():
    detector = seeded(small())
    calls = []

    def over_all(number: Tensor) -> Tensor:
        calls.append(float(number))
        return number + 10

    raw = detector.network.eval()(torch.randn(2, 3, 64, 128))
    some = Targets.pack([target((0.1, 0.1, 0.4, 0.6)), target()])
    detector.criterion(raw, some, over_all=over_all)
    often = len(calls)
    none = raw._replace(logits=raw.logits[:0], offsets=raw.offsets[:0])
    nothing = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0)
    loss = detector.criterion(none, nothing, over_all=over_all)
    assert float(loss.total.detach()) == 0
    assert loss.total.requires_grad
    assert len(calls) == 2 * often


def test_it_learns_one_picture():
    config = small(anchors=AnchorConfig.from_sizes(sizes=(8, 16, 32, 64), ratios=(1,), strides=(8, 16, 32, 64)))
    detector = seeded(config)
    images = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    targets = Targets.pack([target((0.25, 0.25, 0.5, 0.75))])
    optimizer = torch.optim.AdamW(detector.network.parameters(), lr=1e-3)
    detector.network.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss = detector.criterion(detector.network(images), targets)
        loss.total.backward()
        optimizer.step()
    with torch.no_grad():
        (found,) = to_detections(suppress(detector.forward(images), config.postprocess), [(64, 128)])
    assert int(found.labels[0]) == 1
    assert float(found.scores[0]) > 0.5
    assert_close(found.boxes[0], torch.tensor([32.0, 16.0, 64.0, 48.0]), rtol=0, atol=6)


# Settings.


@pytest.mark.parametrize("name", ["arm", "tcb", "head_blocks"])
def test_what_an_ssd_has_not_cannot_be_set(name):
    config = small()
    with pytest.raises(ConfigError, match=f"network.{name} must be false: an SSD has none"):
        replace(config, network=replace(config.network, **{name: True}))


def test_sizes_that_do_not_fit_are_told_with_their_cells():
    config = get_preset("ssd300_vgg16", TWO).detector
    with pytest.raises(
        ConfigError, match=r"preprocess.height 320 .* 40, 20, 10, 5, 3, 1 cells, .* 10, 5, 4, 2"
    ) as told:
        replace(config, preprocess=replace(config.preprocess, height=320))
    assert "300 x 300" in (told.value.hint or "")
    with pytest.raises(ConfigError, match=r"preprocess\.width 64"):
        replace(config, preprocess=replace(config.preprocess, width=64))
    with pytest.raises(ConfigError, match=r"anchors\.strides \[8, 16, 32, 64\]"):
        replace(config, anchors=small().anchors)
    # Where the cells agree other sizes are welcome.
    assert replace(config, preprocess=PreprocessConfig(height=290, width=384)).preprocess.width == 384


def test_the_four_maps_keep_their_demands():
    with pytest.raises(ConfigError, match=r"preprocess\.height must be a positive multiple of 64, not 300"):
        replace(small(), preprocess=PreprocessConfig(height=300, width=64))
    with pytest.raises(ConfigError, match=r"anchors\.strides must be \[8, 16, 32, 64\]"):
        replace(small(), anchors=ssd300_anchors())


def test_the_backbone_of_ssd300_is_for_ssd_alone():
    config = get_preset("refinedet320_vgg16", TWO).detector
    with pytest.raises(ConfigError, match="vgg16_ssd is for the family ssd alone"):
        replace(config, network=NetworkConfig(backbone="vgg16_ssd"))
