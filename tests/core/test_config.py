"""Settings: to plain data and back, and every way in which a value may not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import pytest

from refinedet_cli.core.config import (
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
    from_dict,
    to_dict,
)
from refinedet_cli.errors import ConfigError

# Every setting, at a value that is not its default.
DETECTOR = DetectorConfig(
    preset="mine",
    classes=Classes(names=("zebra", "émeu"), category_ids=(7, 3)),
    network=NetworkConfig(
        backbone="timm/regnety_002", tcb_channels=48, tcb_norm="group", arm=False, tcb=False, head_blocks=True,
        odm_reads_arm=True, stride_in="1x1", stem_pool="ceil", fc6_dilation=6, tcb_up="3x3", tcb_top="linear",
        head_init="prior",
    ),
    anchors=AnchorConfig(
        shapes=(((1 / 3, 2.5),), ((4.0, 5.0), (6.0, 7.0)), ((8.0, 9.0),), ((1e-3, 1e3),)), variances=(0.3, 0.7)
    ),
    loss=LossConfig(
        arm_positive_iou=0.7, arm_negative_iou=0.3, odm_positive_iou=0.6, odm_negative_iou=0.4,
        neg_ratio=2.5, arm_filter=0.1, loc_weight=0.1, background_negatives=9,
        odm_box="giou", odm_box_weight=2.0, quality=0.5, cascade_gradient=True,
    ),
    preprocess=PreprocessConfig(
        height=128, width=192, mean=(1.5, 2.5, 3.5), std=(0.1, 0.2, 0.3), channel_order="bgr"
    ),
    postprocess=PostprocessConfig(
        score_threshold=0.05, arm_filter=0.02, candidates=77, candidates_per="class", nms_iou=0.6, keep=33,
        clip_first=True, soft_nms_iou=0.3,
    ),
)  # fmt: skip
GRID = GridConfig(stride=32, boxes=3, layers=2, channels=48, norm="group", coord_weight=2.5, no_object_weight=0.25)
TRAIN = TrainConfig(
    batch=3, accumulate=2, epochs=4, steps=50, optimizer="adamw", lr=0.1, momentum=0.5, backbone_lr=0.25, bias_lr=3.0,
    weight_decay=0.5, decay_norm=True, warmup_steps=6, schedule="multistep", final_lr=0.5, milestones=(0.1, 0.9),
    gamma=0.5, balance=0.25, ema_decay=0.0, clip_norm=1.0, precision="bf16", freeze_stages=2, freeze_norm=False,
    unfreeze=((0.3, 1), (0.6, 0)), small_input=((0.5, 0.6), (0.8, 0.9)), evaluate_every=2, patience=3, seed=2**63 - 1,
    augment=AugmentConfig(
        brightness=1.0, contrast=0.1, saturation=0.2, hue=5.0, expand_probability=0.1, expand_max=2.0,
        crop_probability=0.2, crop_min_scale=0.4, mirror_probability=0.3,
        mosaic_probability=0.4, mosaic_until=0.5, min_size=3.0,
    ),
)  # fmt: skip


def settings_of(config: Any, where: str = "") -> list[tuple[str, Any]]:
    """The dotted name and the value of every setting."""
    found = []
    for field in dataclasses.fields(config):
        name, value = f"{where}{field.name}", getattr(config, field.name)
        found += settings_of(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
    return found


@pytest.mark.parametrize("config", [DETECTOR, TRAIN, GRID], ids=["detector", "train", "grid"])
def test_every_setting_goes_to_json_and_back(config):
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


def test_the_configs_above_leave_no_setting_at_its_default():
    plain = TrainConfig()
    assert [n for n, v in settings_of(TRAIN) if v == dict(settings_of(plain))[n]] == []
    defaults = DetectorConfig(
        preset="", classes=DETECTOR.classes, network=NetworkConfig(backbone="vgg16"), anchors=DETECTOR.anchors
    )
    same = {n for n, v in settings_of(DETECTOR) if v == dict(settings_of(defaults))[n]}
    # Two are of other families; the others have no default.
    given = {f"anchors.{n}" for n in ("strides", "shapes", "variances")} | {"classes.names", "classes.category_ids"}
    assert same == {"family", "grid", *given}
    assert [n for n, v in settings_of(GRID) if v == dict(settings_of(GridConfig()))[n]] == []


def changed(config: Any, name: str, value: Any) -> dict[str, Any]:
    document = to_dict(config)
    *path, last = name.split(".")
    table: Any = document
    for part in path:
        table = table[part]
    table[last] = value
    return document


WRONG: list[tuple[str, Any]] = [
    # Wrong types.
    ("network.tcb_channels", 12.5), ("network.tcb_channels", "64"), ("network.tcb_channels", True),
    ("network.tcb_channels", None), ("network.arm", 1), ("network.arm", "yes"), ("network.backbone", 5),
    ("network.backbone", "resnet"), ("network.backbone", ["vgg16"]), ("network.tcb_norm", "layer"),
    ("preset", 3), ("loss.neg_ratio", "3"), ("loss.neg_ratio", True), ("loss.neg_ratio", [3]), ("loss.neg_ratio", {}),
    ("loss", 3), ("loss", [1]), ("classes.names", "zebra"), ("classes.names", [1, 2]), ("classes.names", {"a": 1}),
    ("preprocess.mean", [1, 2]), ("preprocess.mean", [1, 2, "3"]), ("preprocess.mean", 5), ("preprocess.height", 64.0),
    ("anchors.shapes", [[[1, 2, 3]]] * 4), ("anchors.shapes", [[1, 2]] * 4), ("postprocess.keep", 10.0),
    ("postprocess.candidates_per", "image"),
    # Not finite.
    *((name, value) for name in ("loss.neg_ratio", "loss.loc_weight", "postprocess.nms_iou", "loss.arm_positive_iou")
      for value in (math.nan, math.inf, -math.inf)),
    ("preprocess.mean", [math.nan, 0, 0]), ("preprocess.std", [math.inf, 1, 1]), ("loss.neg_ratio", 10**400),
    ("loss.neg_ratio", -(10**400)), ("anchors.variances", [math.nan, 0.2]),
    # Out of range.
    ("network.fc6_dilation", 0), ("network.fc6_dilation", 33), ("network.tcb_up", "4x4"), ("network.tcb_top", "gelu"),
    ("network.tcb_channels", 0), ("network.tcb_channels", 40), ("preprocess.height", 0), ("preprocess.height", 300),
    ("preprocess.width", -64), ("preprocess.std", [1, 0, 1]), ("postprocess.keep", 0), ("postprocess.candidates", -1),
    ("postprocess.score_threshold", 1.1), ("postprocess.nms_iou", -0.1), ("postprocess.arm_filter", 2),
    ("loss.neg_ratio", -1), ("loss.loc_weight", -1), ("loss.arm_filter", 1), ("loss.arm_positive_iou", 1.5),
    ("loss.arm_negative_iou", 0), ("loss.odm_negative_iou", 0.9), ("loss.odm_positive_iou", 0.1),
    ("loss.odm_box", "iou"), ("loss.odm_box_weight", -1), ("loss.quality", 1.5), ("loss.cascade_gradient", 1),
    ("anchors.variances", [0, 0.2]), ("anchors.strides", [8, 16, 32]), ("anchors.strides", [8, 16, 32, 128]),
    ("anchors.strides", [0, 16, 32, 64]), ("anchors.shapes", [[[1, 1]]] * 3), ("anchors.shapes", [[[0, 1]]] * 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_do_not_fit_name_their_setting(name, value):
    with pytest.raises(ConfigError) as caught:
        from_dict(DetectorConfig, changed(DETECTOR, name, value))
    assert name in caught.value.message
    assert "\n" not in caught.value.message


WRONG_TRAIN: list[tuple[str, Any]] = [
    ("batch", 0), ("epochs", 0), ("batch", 2.5), ("lr", 0), ("lr", math.nan), ("lr", "fast"), ("momentum", 1),
    ("accumulate", 0),
    ("backbone_lr", -1), ("bias_lr", -1), ("weight_decay", -1), ("warmup_steps", -1), ("clip_norm", -1),
    ("freeze_stages", -1), ("evaluate_every", -1), ("ema_decay", 1), ("final_lr", 2), ("gamma", 0),
    ("milestones", [0, 0.5]), ("milestones", [1.5]), ("milestones", 0.5), ("small_input", [[0.5]]),
    ("small_input", [[0.5, 0]]), ("small_input", [[1.5, 0.5]]), ("small_input", [0.5, 0.5]), ("seed", -1),
    ("seed", 2**63), ("optimizer", "adam"), ("schedule", "step"), ("precision", "fp16"), ("freeze_norm", 0),
    ("augment.expand_probability", 1.1), ("augment.crop_probability", -0.1), ("augment.mirror_probability", 2),
    ("augment.contrast", 1), ("augment.saturation", -0.1), ("augment.brightness", 256), ("augment.hue", 181),
    ("augment.expand_max", 0.9), ("augment.crop_min_scale", 0), ("augment.crop_min_scale", 1.1),
    ("augment.hue", math.inf), ("augment", "off"), ("balance", 1.5),
    ("augment.mosaic_probability", 2), ("augment.mosaic_until", -1), ("augment.min_size", -1),
    ("patience", -1), ("patience", 1.5), ("unfreeze", [[0.5]]), ("unfreeze", [[0, 1]]), ("unfreeze", [[1, 1]]),
    ("unfreeze", [[0.5, 2]]), ("unfreeze", [[0.5, -1]]), ("unfreeze", [[0.5, 1], [0.5, 0]]),
    ("unfreeze", [[0.5, 1], [0.6, 1]]), ("unfreeze", [[0.5, 0.5]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_TRAIN)
def test_recipe_values_that_do_not_fit_name_their_setting(name, value):
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, changed(TRAIN, name, value), where="train")
    assert f"train.{name}" in caught.value.message


def test_settings_that_need_another_say_which():
    with pytest.raises(ConfigError, match=r"with train\.patience 3 train\.evaluate_every must be at least 1"):
        TrainConfig(patience=3, evaluate_every=0)
    with pytest.raises(ConfigError, match=r"the first below train\.freeze_stages \(0\)"):
        TrainConfig(unfreeze=((0.5, 0),))


def test_integers_stand_for_numbers_but_not_the_other_way_round():
    assert from_dict(LossConfig, {"neg_ratio": 2}).neg_ratio == 2.0
    assert isinstance(from_dict(LossConfig, {"neg_ratio": 2}).neg_ratio, float)
    with pytest.raises(ConfigError, match="keep must be int"):
        from_dict(PostprocessConfig, {"keep": 2.0})


@pytest.mark.parametrize("data", [None, [], "x", 5, [["preset", "x"]]])
def test_only_tables_are_configs(data):
    with pytest.raises(ConfigError, match="config must be a table of settings"):
        from_dict(DetectorConfig, data)


@pytest.mark.parametrize(
    ("path", "missing"),
    [(("preset",), "preset"), (("network", "backbone"), "network.backbone"), (("classes", "names"), "classes.names")],
)
def test_missing_settings_are_named(path, missing):
    document = to_dict(DETECTOR)
    table = document
    for part in path[:-1]:
        table = table[part]
    del table[path[-1]]
    with pytest.raises(ConfigError, match=f"setting '{missing}' is missing"):
        from_dict(DetectorConfig, document)


def test_unknown_names_in_a_table_are_named_with_what_is_known():
    with pytest.raises(ConfigError, match=r"unknown setting 'loss\.ratio'") as caught:
        from_dict(DetectorConfig, {**to_dict(DETECTOR), "loss": {"ratio": 3}})
    assert "neg_ratio" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        ((), (), "at least one class"),
        (("a", "b"), (1,), "differ in number"),
        (("a", "a"), (1, 2), "names repeat"),
        (("a", "b"), (1, 1), "ids repeat"),
    ],
)
def test_class_lists_that_contradict_themselves(names, ids, message):
    with pytest.raises(ConfigError, match=message):
        Classes(names=names, category_ids=ids)


def test_classes_count_background_where_asked():
    assert (len(DETECTOR.classes), DETECTOR.classes.with_background) == (2, 3)


def test_shapes_from_sizes_keep_the_area():
    config = AnchorConfig.from_sizes(sizes=(4, 10), ratios=(1, 4), strides=(8, 16))
    assert config.shapes == (((4, 4), (8, 2)), ((10, 10), (20, 5)))


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DETECTOR.loss.neg_ratio = 1.0  # type: ignore[misc]
    assert hash(DETECTOR) == hash(from_dict(DetectorConfig, to_dict(DETECTOR)))


def test_settings_import_no_torch():
    code = (
        "import sys, refinedet_cli.core.config, refinedet_cli.core.presets\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
