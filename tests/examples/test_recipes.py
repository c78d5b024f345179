"""The run files of the paper: the published numbers, and that each one resolves, starts and trains on stand-ins."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.presets import VOC_CLASSES, caffe_postprocess, get_preset
from refinedet_cli.data.dataset import match_classes
from refinedet_cli.engine.recipe import milestone_steps
from refinedet_cli.engine.run_file import read_run_file
from refinedet_cli.zoo.checkpoint import load_detector, save_checkpoint

VOC07, VOC12 = ("voc2007:trainval", "voc2012:trainval"), ("voc2007:trainval", "voc2007:test", "voc2012:trainval")
# name: data, preset, batch, learning rate, gamma, drops, steps, as the official scripts have them
PUBLISHED = {
    **{f"voc07-{s}-vgg16": (VOC07, f"refinedet{s}_vgg16", 32, 1e-3, 0.1, (80, 100), 120) for s in (320, 512)},
    **{f"voc12-{s}-vgg16": (VOC12, f"refinedet{s}_vgg16", 32, 1e-3, 0.1, (160, 200), 240) for s in (320, 512)},
    **{f"coco-{s}-vgg16": (("coco:train",), f"refinedet{s}_vgg16", 32, 1e-3, 0.1, (280, 360), 400) for s in (320, 512)},
    "coco-320-resnet101": (("coco:train",), "refinedet320_resnet101", 32, 1e-3, 0.1, (280, 360), 400),
    "coco-512-resnet101": (("coco:train",), "refinedet512_resnet101", 20, 1e-3, 0.1, (400, 480), 540),
    **{f"voc07-{s}-vgg16-from-coco": (VOC07, None, 32, 5e-5, 0.2, (80,), 120) for s in (320, 512)},
    **{f"voc12-{s}-vgg16-from-coco": (VOC12, None, 32, 5e-5, 0.2, (120,), 160) for s in (320, 512)},
}
# Of VOC's classes in order: the place among COCO's, from 1; the map that the official code converts its weights with.
COCO_OF_VOC = [5, 2, 15, 9, 40, 6, 3, 16, 57, 20, 61, 17, 18, 4, 1, 59, 19, 58, 7, 63]
# A network in place of the real ones where the network is not what is tested.
SMALL = [
    "network.backbone=mobilenet_v2",
    "network.tcb_channels=32",
    "network.tcb_norm=none",
    "network.head_blocks=false",
    "preprocess.height=64",
    "preprocess.width=64",
    "train.batch=2",
]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("benchmarks/recipes.py")


@pytest.fixture(scope="module")
def datasets(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    script.make_stand_ins(folder)
    return folder


@pytest.fixture(scope="module")
def coco_classes(script):
    return script.COCO_CLASSES


@pytest.fixture(scope="module")
def runs(script, coco_classes, tmp_path_factory):
    """A folder with small detectors of COCO's classes in place of what the COCO runs leave."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for size in (320, 512):
        config = get_preset(f"refinedet{size}_vgg16", coco_classes).detector
        network = replace(config.network, backbone="mobilenet_v2", tcb_channels=32)
        preprocess = replace(config.preprocess, mean=(1.0, 2.0, 3.0), height=64, width=64)
        config = replace(config, network=network, preprocess=preprocess)
        path = folder / f"coco-{size}-vgg16" / "last.safetensors"
        path.parent.mkdir()
        save_checkpoint(path, config, build(config).network.state_dict(), {})
    return folder


def test_there_is_a_run_file_for_every_published_run(script):
    assert sorted(PUBLISHED) == sorted(script.names_in_order())
    order = script.names_in_order()
    for name in order:
        weights = read_run_file(script.RECIPES / f"{name}.toml").weights
        if name.endswith("-from-coco"):
            source = f"coco-{name.split('-')[1]}-vgg16"
            assert weights == f"runs/{source}/last.safetensors"
            assert order.index(source) < order.index(name)
        else:
            assert weights is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_file_says_what_was_published(script, datasets, runs, name):
    data, preset, batch, lr, gamma, drops, steps = PUBLISHED[name]
    path = script.RECIPES / f"{name}.toml"
    file = read_run_file(path)
    assert (file.data, file.preset) == (data, preset)
    assert file.val == (("none",) if "voc12" in name else ("voc2007:test",) if "voc07" in name else ("coco:val",))
    assert file.backbone_weights == (None if preset is None else "imagenet")
    assert f"examples/recipes/{name}.toml" in path.read_text()
    # Scratch, since there are no ImageNet weights here; the network is replaced where it would take seconds to build.
    session = script.prepare(name, datasets, runs, SMALL[:4], resolve_only=True)
    train, detector = session.preset.train, session.preset.detector
    assert (train.batch, train.steps, train.lr, train.gamma) == (batch, steps * 1000, lr, gamma)
    assert milestone_steps(train, train.steps) == tuple(drop * 1000 for drop in drops)
    assert (train.optimizer, train.momentum, train.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (train.backbone_lr, train.bias_lr, train.freeze_stages, train.small_input) == (1.0, 2.0, 0, ())
    assert (train.warmup_steps, train.ema_decay, train.clip_norm, train.precision) == (0, 0.0, 0.0, "fp32")
    assert train.augment == type(train.augment)()
    assert detector.postprocess == caffe_postprocess()
    assert detector.loss == type(detector.loss)()
    size = int(name.split("-")[1])
    assert (detector.preprocess.height, detector.preprocess.width) == (size, size)
    assert len(detector.classes) == (80 if name.startswith("coco") else 20)
    if "resnet101" in name:
        assert not train.freeze_norm
        assert (detector.network.stride_in, detector.network.stem_pool) == ("3x3", "padded")
    if preset is None:
        assert detector.preprocess.mean == (1.0, 2.0, 3.0)  # of the COCO run


def test_classes_are_taken_over_as_the_official_map_has_them(coco_classes):
    match = match_classes(coco_classes, VOC_CLASSES)
    assert match.labels.tolist() == [0, *COCO_OF_VOC]
    assert match.only_in_data == ()


def test_voc_from_coco_starts_with_the_outputs_of_the_map(script, datasets, runs):
    session = script.prepare("voc07-320-vgg16-from-coco", datasets, runs, [], resolve_only=True)
    assert session.data.classes.names == VOC_CLASSES.names
    before = load_detector(runs / "coco-320-vgg16" / "last.safetensors").detector.network.state_dict()
    after = session.start.detector.network.state_dict()
    # Of each anchor's 81 scores those of the map and background; its 4 offsets stand behind them.
    rows = torch.tensor([0, *COCO_OF_VOC, 81, 82, 83, 84])
    heads = [name for name in before if before[name].shape != after[name].shape]
    assert len(heads) == 8  # weight and bias of four levels
    for name, tensor in before.items():
        if name in heads:
            tensor = tensor.unflatten(0, (3, 85))[:, rows].flatten(0, 1)
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["voc12-512-vgg16", "coco-512-resnet101", "voc12-320-vgg16-from-coco"])
def test_a_dry_run_of_a_recipe(run, script, datasets, runs, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    weights = runs / "coco-320-vgg16" / "last.safetensors" if "from-coco" in name else "none"
    overrides = [argument for setting in SMALL for argument in ("--set", setting)]
    ended = run(
        *("train", "--config", script.RECIPES / f"{name}.toml", "--root", datasets, "--weights", weights),
        *("--workers", 0, "--dry-run", "--json", *overrides),
    )
    assert ended.code == 0, ended.stderr
    found = json.loads(ended.stdout)["dry_run"]
    assert found["pictures"] == {"voc12": 40, "coco-": 8}[name[:5]]
    assert found["validation_pictures"] == (None if "voc12" in name else 8)
    assert found["steps"] == PUBLISHED[name][-1] * 1000
    assert found["milestones"] == [drop * 1000 for drop in PUBLISHED[name][-2]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc07-320-vgg16", "coco-320-resnet101"])
def test_the_real_network_trains_for_twenty_steps(script, datasets, tmp_path, name):
    settings = [*SMALL[4:6], *script.smaller_batch(name, 2), "train.steps=20"]
    tried = script.try_recipe(name, datasets, tmp_path, settings, "cpu")
    assert tried.steps == 20
    assert tried.session.preset.train.lr == 1e-3
    detector = load_detector(tmp_path / name / "last.safetensors")
    assert detector.config.network.backbone == name.split("-")[2]
    assert all(bool(t.isfinite().all()) for t in detector.detector.network.state_dict().values())
    shutil.rmtree(tmp_path)


def test_the_variants_of_the_readme_resolve(script, datasets, runs):
    text = (script.RECIPES / "README.md").read_text()
    variants = re.findall(r"^    (--(?:set|batch) .*)$", text, re.MULTILINE)
    assert len(variants) == 6
    for variant in variants:
        words = shlex.split(variant)
        settings = [w for w in words if "=" in w]
        settings += [f"train.batch={words[words.index('--batch') + 1]}"] if "--batch" in words else []
        session = script.prepare("voc07-320-vgg16", datasets, runs, [*SMALL[:4], *settings], resolve_only=True)
        for setting in settings:
            where, _, value = setting.partition("=")
            table, name = where.split(".")
            held = session.preset.train if table == "train" else getattr(session.preset.detector, table)
            assert str(getattr(held, name)) in (value, str(float(value)) if value[0].isdigit() else value)


def test_the_readme_lists_every_run_file(script):
    listed = re.findall(r"^\| `([\w-]+)` \|", (script.RECIPES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(PUBLISHED)
