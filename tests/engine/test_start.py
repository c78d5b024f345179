"""How a run begins: which setting wins, and which weights it starts from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig, to_dict
from refinedet_cli.core.presets import DEFAULT_PRESET, VOC_CLASSES, Preset, get_preset, tiny
from refinedet_cli.engine import start
from refinedet_cli.engine.run_file import RunFile, read_run_file
from refinedet_cli.engine.start import resolve_config, start_detector
from refinedet_cli.errors import CheckpointError, ConfigError, UsageError
from refinedet_cli.zoo import hub
from refinedet_cli.zoo.backbone_weights import BackboneFile, find_backbone_weights
from refinedet_cli.zoo.checkpoint import file_sha256, read_header, save_checkpoint
from refinedet_cli.zoo.hub import resolve_weights

TWO = Classes(names=("sofa", "dog"), category_ids=(1, 2))
OTHERS = Classes(names=("zebra", "couch", "tvmonitor"), category_ids=(5, 6, 7))


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def resolve(
    *settings: str,
    file: Path | None = None,
    preset: str | None = "tiny",
    weights: str | None = None,
    backbone: BackboneFile | None = None,
) -> Preset:
    return resolve_config(TWO, preset, weights, read_run_file(file), settings, backbone=backbone)


def a_checkpoint(path: Path, classes: Classes = OTHERS, **network: object) -> Path:
    config = tiny(classes).detector
    config = replace(config, network=replace(config.network, **network))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        state = build(config).network.state_dict()
    save_checkpoint(path, config, state, {})
    return path


# Which setting wins.


def test_a_preset_alone():
    assert resolve() == tiny(TWO)


def test_a_file_changes_the_preset_and_settings_change_the_file(tmp_path):
    file = written(
        tmp_path / "run.toml",
        """
        [train]
        lr = 0.5
        epochs = 7
        [train.augment]
        hue = 10
        [loss]
        neg_ratio = 2
        [preprocess]
        mean = [1, 2, 3]
        """,
    )
    resolved = resolve("train.lr=0.25", "loss.neg_ratio=4.5", file=file)
    base = tiny(TWO)
    assert resolved.train == replace(base.train, lr=0.25, epochs=7, augment=replace(base.train.augment, hue=10.0))
    assert resolved.detector == replace(
        base.detector,
        loss=replace(base.detector.loss, neg_ratio=4.5),
        preprocess=replace(base.detector.preprocess, mean=(1.0, 2.0, 3.0)),
    )


def test_the_last_of_equal_settings_wins():
    assert resolve("train.lr=0.1", "train.lr=0.2").train.lr == 0.2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.optimizer=adamw", "adamw"),
        ('train.optimizer="adamw"', "adamw"),
        ("train.epochs = 3", 3),
        ("train.lr=1e-4", 1e-4),
        ("train.lr=1", 1.0),
        ("train.freeze_norm=false", False),
        ("train.milestones=[0.25, 0.5]", (0.25, 0.5)),
        ("train.small_input=[]", ()),
        ("train.small_input=[[0.5,0.6]]", ((0.5, 0.6),)),
    ],
)
def test_settings_are_read_as_toml_or_json_would(text, value):
    name = text.partition("=")[0].strip().removeprefix("train.")
    assert getattr(resolve(text).train, name) == value


def test_settings_that_only_fit_together(tmp_path):
    pairs = ["loss.arm_positive_iou=0.3", "loss.arm_negative_iou=0.2"]
    for order in (pairs, pairs[::-1]):
        loss = resolve(*order).detector.loss
        assert (loss.arm_positive_iou, loss.arm_negative_iou) == (0.3, 0.2)
    file = written(tmp_path / "run.toml", "[network]\ntcb_channels = 40\ntcb_norm = 'none'\n")
    assert resolve(file=file).detector.network.tcb_channels == 40
    with pytest.raises(ConfigError, match=r"network\.tcb_channels must be a multiple of 16"):
        resolve("network.tcb_channels=40")


def test_preset_of_the_weights(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors")
    assert resolve(preset=None, weights=str(path)) == tiny(TWO)
    assert resolve(preset="refinedet320_vgg16", weights=str(path)).detector.preset == "refinedet320_vgg16"
    assert resolve(preset=None, weights="none").detector == get_preset(DEFAULT_PRESET, TWO).detector
    assert resolve(preset=None, weights=None) == get_preset(DEFAULT_PRESET, TWO)
    with pytest.raises(CheckpointError):
        resolve(preset=None, weights=str(tmp_path / "none.safetensors"))


def test_weights_bring_their_own_settings_unless_a_preset_is_named(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", tcb_channels=48)
    assert resolve(preset=None, weights=str(path)).detector.network.tcb_channels == 48
    assert resolve("network.tcb_channels=64", preset=None, weights=str(path)).detector.network.tcb_channels == 64
    assert resolve(preset="tiny", weights=str(path)) == tiny(TWO)


def test_the_bundled_weights_bring_the_recipe_of_their_preset_named_or_not():
    named = resolve(preset=None, weights=DEFAULT_PRESET)
    assert named == resolve(preset=None, weights=None) == get_preset(DEFAULT_PRESET, TWO)
    assert named.detector.loss != read_header(resolve_weights(DEFAULT_PRESET))[0].loss


def test_the_config_of_a_run_replays_it(tmp_path):
    first = resolve(
        "network.tcb_channels=40", "network.tcb_norm=none", "loss.odm_positive_iou=0.4", "loss.odm_negative_iou=0.4",
        "train.lr=0.125", "train.augment.hue=1", "preprocess.width=128", "postprocess.keep=5",
        "anchors.shapes=[[[1,2]],[[3,4]],[[5,6]],[[7,8],[9,9.5]]]",
    )  # fmt: skip
    document = {"detector": to_dict(first.detector), "train": to_dict(first.train)}
    file = written(tmp_path / "config.json", json.dumps(document))
    # No preset is named: it is that of the run, not that of the default weights.
    assert resolve(file=file, preset=None) == first
    assert resolve(file=file, preset="tiny") == first
    assert resolve("train.lr=0.5", file=file, preset=None).train == replace(first.train, lr=0.5)
    # On other data it keeps everything but the classes.
    other = resolve_config(OTHERS, None, None, read_run_file(file), [])
    assert other.detector == replace(first.detector, classes=OTHERS)


CAFFE = BackboneFile(
    path=Path("vgg.pth"), backbone="vgg16", layout="vgg16_reducedfc", tensors=30, mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0), channel_order="bgr", origin="vgg.pth", sha256="00",
)  # fmt: skip


def test_backbone_weights_bring_their_input_and_the_user_has_the_last_word(tmp_path):
    base = tiny(TWO)
    wanted = replace(base.detector.preprocess, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), channel_order="bgr")
    assert resolve(backbone=CAFFE) == replace(base, detector=replace(base.detector, preprocess=wanted))
    file = written(tmp_path / "run.toml", "[preprocess]\nmean = [7, 7, 7]\nwidth = 128\n")
    by_file = resolve(file=file, backbone=CAFFE).detector.preprocess
    assert by_file == replace(wanted, mean=(7.0, 7.0, 7.0), width=128)
    both = resolve("preprocess.mean=[8,8,8]", "preprocess.channel_order=rgb", file=file, backbone=CAFFE)
    assert both.detector.preprocess == replace(by_file, mean=(8.0, 8.0, 8.0), channel_order="rgb")


def test_a_run_file_may_name_the_preset(tmp_path):
    file = written(tmp_path / "run.toml", "[start]\npreset = 'refinedet320_vgg16'\n[train]\nlr = 0.5\n")
    assert resolve(file=file, preset=None).detector.preset == "refinedet320_vgg16"
    assert resolve(file=file, preset=None).train.lr == 0.5
    assert resolve(file=file, preset="tiny").detector.preset == "tiny"


# What does not fit.


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("train.lrr=1", "train.lrr"), ("train=1", "train"),
        ("train.lr.x=1", "train.lr.x"), ("train.augment.hew=1", "train.augment.hew"), ("lr=1", "lr"),
        ("loss.neg_ratio=many", "loss.neg_ratio"), ("train.lr=nan", "train.lr"), ("train.lr=NaN", "train.lr"),
        ("train.lr=-inf", "train.lr"), ("train.lr=", "train.lr"), ("train.augment.hue=400", "train.augment.hue"),
        ("train.seed=-1", "train.seed"), ("train.epochs=1.5", "train.epochs"), ("loss=", "loss"),
        ("anchors.strides=[4,8,16,32]", "anchors.strides"), ("=3", "''"), ("train.epochs=2020-01-01", "train.epochs"),
        ("classes.names=[1]", "classes.names"), ("preset=tiny", "preset"), ("family=ssd", "family"),
        ("no.such.setting=1", "no.such.setting"), ("train..lr=1", "train..lr"),
        ("train.lr=" + "[" * 100_000, "train.lr"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(setting, named):
    with pytest.raises(ConfigError) as caught:
        resolve(setting)
    assert named in caught.value.message


@pytest.mark.parametrize("setting", ["train.lr", ""])
def test_a_setting_without_a_value_is_malformed(setting):
    with pytest.raises(UsageError, match=f"--set '{setting}' has no value"):
        resolve(setting)


def test_unknown_settings_come_with_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        resolve("foo=1")
    hint = caught.value.hint or ""
    assert "train" in hint
    assert "loss" in hint
    assert "classes" not in hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.toml", b"[train\nlr=1"), ("a.toml", b"\xff\xfe\x00"), ("a.json", b"{"), ("a.json", b"[1]"),
        ("a.json", b"3"), ("a.toml", b"detector = 5"), ("a.json", b'{"detector": [1]}'), ("a.toml", b"train = 5"),
        ("a.toml", b"[train]\nlr = 'x'"), ("a.toml", b"[trian]\nlr = 1"), ("a.json", b'{"train": {"lr": NaN}}'),
        ("a.toml", b"[classes]\nnames = ['a']"), ("a.json", b'{"detector": {"loss": 7}}'),
        ("a.json", b'{"detector": {"surplus": 7}}'), ("a.json", b"[" * 100_000),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        resolve(file=path)
    assert str(path) in caught.value.message


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            resolve(file=path)


def test_a_config_of_an_unknown_preset(tmp_path):
    document = {"detector": {**to_dict(tiny(TWO).detector), "preset": "yours"}, "train": {}}
    with pytest.raises(ConfigError, match="no preset is called 'yours'"):
        resolve(file=written(tmp_path / "config.json", json.dumps(document)), preset=None)


# The weights it starts from.


def config_of(classes: Classes = TWO, **network: object) -> DetectorConfig:
    config = tiny(classes).detector
    return replace(config, network=replace(config.network, **network))


def begin(config: DetectorConfig, **how: object):
    return start_detector(config, **{"weights": "none", "backbone": None, "seed": 0, **how})


def test_random_weights_follow_the_seed_and_leave_the_global_generator():
    before = torch.random.get_rng_state()
    first, again, other = (begin(config_of(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    states = [s.detector.network.state_dict() for s in (first, again, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["odm.levels.0.weight"], states[2]["odm.levels.0.weight"])
    assert first.notes == ("start: random weights",)
    assert first.origin == {"random": True}


def test_class_outputs_are_taken_over_by_name(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors")
    begun = begin(config_of(), weights=str(path))
    old = build(tiny(OTHERS).detector)
    old.network.load_state_dict(start.load_detector(path).detector.network.state_dict())
    fresh = begin(config_of()).detector.network.state_dict()
    new = begun.detector.network.state_dict()
    for level in range(4):
        weight, source, random = (
            s[f"odm.levels.{level}.weight"].view(3, -1, 32, 3, 3) for s in (new, old.network.state_dict(), fresh)
        )
        assert torch.equal(weight[:, 0], source[:, 0])  # background
        assert torch.equal(weight[:, 1], source[:, 2])  # a sofa is a couch
        assert torch.equal(weight[:, 2], random[:, 2])  # no dog was known
        assert torch.equal(weight[:, 3:], source[:, 4:])  # boxes
    for name in new:
        if not name.startswith("odm."):
            assert torch.equal(new[name], old.network.state_dict()[name]), name
    assert begun.origin == {"weights": "w.safetensors", "classes_taken_over": ["sofa"]}
    assert begun.notes == (
        "start: w.safetensors: backbone, ARM, TCB kept; ODM remapped",
        "start: class outputs taken over by name: sofa (there couch); new: dog",
    )


def test_the_same_classes_are_taken_over_whole(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    begun = begin(config_of(), weights=str(path), seed=5)
    saved = start.load_detector(path).detector.network.state_dict()
    assert all(torch.equal(t, saved[n]) for n, t in begun.detector.network.state_dict().items())
    assert begun.notes == (
        "start: w.safetensors: backbone, ARM, TCB, ODM kept",
        "start: all class outputs taken over by name",
    )


def test_spellings_of_one_class_are_told(tmp_path):
    names = Classes(names=("zebra", "couch", "tv", "dog"), category_ids=(1, 2, 3, 4))
    path = a_checkpoint(tmp_path / "w.safetensors", names)
    mine = Classes(names=("sofa", "TV monitor", "zebra"), category_ids=(1, 2, 3))
    assert begin(config_of(mine), weights=str(path)).notes == (
        "start: w.safetensors: backbone, ARM, TCB kept; ODM remapped",
        "start: all class outputs taken over by name: sofa (there couch), TV monitor (there tv)",
    )
    # Two classes may begin as one.
    both = Classes(names=("couch", "sofa"), category_ids=(1, 2))
    begun = begin(config_of(both), weights=str(path))
    bias = begun.detector.network.state_dict()["odm.levels.0.bias"].view(3, 7)
    assert torch.equal(bias[:, 1], bias[:, 2])
    assert begun.origin["classes_taken_over"] == ["couch", "sofa"]


def test_a_thousand_classes_make_no_thousand_words(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    many = Classes(names=(*(f"kind {i}" for i in range(998)), "dog", "couch"), category_ids=tuple(range(1000)))
    line = begin(config_of(many), weights=str(path)).notes[1]
    assert line.startswith("start: class outputs taken over by name: dog, couch (there sofa); new: kind 0, kind 1, ")
    assert line.endswith("kind 19 and 978 more")


def test_no_shared_class_is_said(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", Classes(names=("moth",), category_ids=(1,)))
    note = begin(config_of(), weights=str(path)).notes[1]
    assert note == "start: no class output taken over; new: sofa, dog"


def test_a_changed_network_starts_as_far_as_the_weights_fit(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    begun = begin(config_of(tcb_channels=64), weights=str(path))
    assert begun.notes == (
        "start: w.safetensors: backbone, ARM kept; TCB, ODM new",
        "start: no class output taken over; new: sofa, dog",
    )
    assert begun.origin["classes_taken_over"] == []


def test_a_part_that_fits_in_part_is_counted(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO, tcb_norm="none")
    line = begin(config_of(), weights=str(path)).notes[0]
    # Convolutions fit but for biases, and there are no norms to take.
    assert line == "start: w.safetensors: backbone, ARM, ODM kept; TCB (15 of 45 tensors) kept in part"


def test_other_anchors_are_told_and_keep_what_is_nearest(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    config = config_of()
    shapes = ((*config.anchors.shapes[0], (10.0, 10.0)), *config.anchors.shapes[1:])
    begun = begin(replace(config, anchors=replace(config.anchors, shapes=shapes)), weights=str(path))
    assert begun.notes == (
        "start: w.safetensors: backbone, TCB kept; ARM, ODM remapped",
        "start: all class outputs taken over by name",
        "start: anchors are not those of the weights: each begins with the outputs of the nearest shape of its level "
        "(12 of 13 are the same; overlap 0.64 at least)",
    )


def test_another_family_takes_the_backbone_alone(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    begun = begin(replace(config_of(arm=False, tcb=False), family="ssd"), weights=str(path))
    assert begun.notes == (
        "start: w.safetensors: backbone kept; head new",
        "start: no class output taken over; new: sofa, dog",
    )


def test_another_input_is_said(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    config = config_of()
    config = replace(config, preprocess=replace(config.preprocess, height=128))
    note = begin(config, weights=str(path)).notes[-1]
    assert note == "start: differs from the input of the weights: preprocess.height 128 (there 64)"
    assert not any("differs" in note for note in begin(config_of(), weights=str(path)).notes)


def test_weights_of_another_backbone_are_refused(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO)
    with pytest.raises(CheckpointError, match="none of these weights fit the preset 'refinedet320_vgg16'") as caught:
        begin(get_preset("refinedet320_vgg16", TWO).detector, weights=str(path))
    assert str(path) in caught.value.message


def test_a_chance_likeness_of_backbones_is_no_start(tmp_path):
    path = a_checkpoint(tmp_path / "w.safetensors", TWO, backbone="resnet18")
    with pytest.raises(CheckpointError, match=r"only .* of the .* tensors of the backbone of these weights fit"):
        begin(config_of(backbone="resnet50"), weights=str(path))


def test_none_given_means_the_bundled_weights(tmp_path, monkeypatch):
    path = a_checkpoint(tmp_path / "bundled.safetensors", TWO)
    asked = []
    monkeypatch.setattr(start, "resolve_weights", lambda name: asked.append(name) or path)
    assert begin(config_of(), weights=None).origin["weights"] == "bundled.safetensors"
    assert asked == [DEFAULT_PRESET]
    monkeypatch.setattr(hub, "read_manifest", lambda: {"tiny": {}, DEFAULT_PRESET: {}})
    begin(config_of(), weights=None)
    assert asked[1:] == ["tiny"]


def imagenet(path: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = model.state_dict()
        state = {n: torch.randn(t.shape) if t.is_floating_point() else t for n, t in state.items()}
    save_file(state, path)
    return state


@pytest.mark.parametrize("weights", [None, "none"])
def test_an_imagenet_backbone(tmp_path, weights):
    path = tmp_path / "imagenet.safetensors"
    state = imagenet(path, mobilenet_v2(weights=None))
    file = find_backbone_weights(str(path), "mobilenet_v2")
    config = resolve(backbone=file).detector
    begun = begin(config, weights=weights, backbone=file)
    network = begun.detector.network.state_dict()
    assert torch.equal(network["backbone.features.0.0.weight"], state["features.0.0.weight"])
    random = begin(config).detector.network.state_dict()
    assert torch.equal(network["odm.levels.0.weight"], random["odm.levels.0.weight"])
    assert begun.origin == {
        "backbone": {"file": path.name, "sha256": file_sha256(path), "layout": "torchvision_mobilenet_v2"}
    }
    assert begun.notes == (
        f"start: backbone from {path} (312 tensors, 2 unused), the rest random",
        "start: input RGB less 123.675, 116.28, 103.53, over 58.395, 57.12, 57.375, which these weights are made for",
    )


def test_the_origin_of_published_weights_is_kept(tmp_path, hub):
    imagenet(tmp_path / "w", mobilenet_v2(weights=None))
    commit = hub.put("org/repo", {"model.safetensors": (tmp_path / "w").read_bytes()})
    begun = begin(config_of(), backbone=find_backbone_weights("org/repo", "mobilenet_v2"))
    assert begun.origin["backbone"] == {
        "repo": "org/repo",
        "commit": commit,
        "file": "model.safetensors",
        "sha256": file_sha256(tmp_path / "w"),
        "layout": "torchvision_mobilenet_v2",
    }
    assert begun.notes[0].startswith(f"start: backbone from org/repo at {commit[:8]}, model.safetensors (312 tensors")


def test_another_input_than_the_weights_want_is_said(tmp_path):
    imagenet(tmp_path / "w.safetensors", mobilenet_v2(weights=None))
    file = find_backbone_weights(str(tmp_path / "w.safetensors"), "mobilenet_v2")
    assert begin(config_of(), backbone=file).notes[1:] == (
        "start: input RGB less 127.5, 127.5, 127.5, over 127.5, 127.5, 127.5, as set; weights of this kind are mostly "
        "made for RGB less 123.675, 116.28, 103.53, over 58.395, 57.12, 57.375",
    )


def test_the_order_of_channels_that_is_a_guess_is_said(monkeypatch):
    monkeypatch.setattr(start, "load_backbone", lambda network, file: 30)
    config = resolve(backbone=CAFFE).detector
    note = begin(config, backbone=CAFFE).notes[-1]
    assert note.endswith("for RGB: --set preprocess.channel_order=rgb")
    told = resolve("preprocess.channel_order=rgb", backbone=CAFFE).detector
    assert begin(told, backbone=CAFFE).notes[-1].startswith("start: input RGB less 1, 2, 3, over 4, 5, 6, as set; ")


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"stride_in": "1x1"}, "--set network.stride_in=3x3"),
        ({"stem_pool": "ceil"}, "--set network.stem_pool=padded"),
        (
            {"stride_in": "1x1", "stem_pool": "ceil"},
            "--set network.stride_in=3x3 --set network.stem_pool=padded",
        ),
        ({}, None),
    ],
)
def test_a_resnet_with_other_strides_than_its_weights_is_said(monkeypatch, settings, cure):
    monkeypatch.setattr(start, "load_backbone", lambda network, file: 30)
    file = replace(CAFFE, layout="resnet", channel_order="rgb")
    notes = begin(resolve(backbone=file).detector, backbone=file).notes
    assert len(notes) == 2  # strides of what is no ResNet do not matter
    network = replace(config_of().network, backbone="resnet18", **settings)
    notes = begin(replace(resolve(backbone=file).detector, network=network), backbone=file).notes
    assert [n.partition("for the same network: ")[2] for n in notes[2:]] == ([] if cure is None else [cure])


def test_two_kinds_of_weights_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        begin(config_of(), weights="x.safetensors", backbone=CAFFE)


def test_random_weights_are_not_frozen_unless_asked():
    def resolved(weights: str | None, *settings: str):
        return resolve_config(VOC_CLASSES, "refinedet320_mobilenetv2", weights, RunFile(), settings).train

    assert (resolved(None).freeze_stages, resolved(None).freeze_norm) == (2, True)
    assert (resolved("none").freeze_stages, resolved("none").freeze_norm) == (0, False)
    assert resolved("none", "train.freeze_stages=1").freeze_stages == 1


def test_a_run_file_for_other_weights_does_not_freeze_random_ones(tmp_path):
    file = written(tmp_path / "run.toml", "[train]\nfreeze_stages = 2\nlr = 0.5\n")
    assert resolve(weights="none", file=file).train.freeze_stages == 0
    assert resolve(weights="none", file=file).train.lr == 0.5
    assert resolve("train.freeze_stages=1", weights="none", file=file).train.freeze_stages == 1
    assert resolve(weights=None, file=file).train.freeze_stages == 2
    asked = written(tmp_path / "none.toml", "[start]\nweights = 'none'\n[train]\nfreeze_stages = 2\n")
    assert resolve(weights="none", file=asked).train.freeze_stages == 2


def test_a_network_of_one_preset_does_not_go_under_the_name_of_another(tmp_path):
    file = tmp_path / "config.json"
    resolved = get_preset("ssd320_mobilenetv2", TWO)
    file.write_text(json.dumps({"detector": to_dict(resolved.detector), "train": to_dict(resolved.train)}))
    assert resolve(preset=None, file=file) == resolve(preset="ssd320_mobilenetv2", file=file) == resolved
    with pytest.raises(ConfigError, match=r"--preset tiny does not go with .*config\.json, whose network is of ssd320"):
        resolve(preset="tiny", file=file)


def test_a_table_changes_what_it_names_and_nothing_else():
    base = resolve()
    changed = resolve('train={"lr": 0.5, "augment": {"hue": 1}}', "loss={neg_ratio = 2}")
    augment = replace(base.train.augment, hue=1.0)
    assert changed.train == replace(base.train, lr=0.5, augment=augment)
    assert changed.detector == replace(base.detector, loss=replace(base.detector.loss, neg_ratio=2.0))
    with pytest.raises(ConfigError, match=r"unknown setting 'train\.augment\.hues'"):
        resolve("train={augment = {hues = 1}}")
