"""A training that stops at a step which is not finite, as a user sees it, and that step computed again."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine.capture import load_capture, save_capture
from refinedet_cli.zoo.checkpoint import save_checkpoint

FAST = ("--epochs", 2, "--precision", "bf16", "--workers", 0, "--val", "none", "--set", "train.warmup_steps=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three pictures with a square each; nothing is a triangle."""
    folder = tmp_path_factory.mktemp("data")
    images, annotations = [], []
    for i in range(3):
        pixels = np.full((64, 64, 3), 40, np.uint8)
        pixels[16:48, 16:48] = 200
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 7 + i, "file_name": f"{i}.png", "width": 64, "height": 64})
        box = {"bbox": [16, 16, 32, 32], "area": 1024, "iscrowd": 0}
        annotations.append({"id": i, "image_id": 7 + i, "category_id": 1, **box})
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "triangle"}]
    path = folder / "squares.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture
def far_weights(tmp_path):
    """A detector whose ARM asks for boxes beyond the range of float32."""
    torch.manual_seed(0)
    config = tiny(Classes(names=("square", "triangle"), category_ids=(1, 2))).detector
    network = build(config).network
    network.get_parameter("arm.levels.0.bias").data.view(3, 6)[:, 2] = 3e38
    network.get_parameter("arm.levels.0.weight").data.mul_(1e3)
    path = tmp_path / "far.safetensors"
    save_checkpoint(path, config, network.state_dict(), {})
    return path


def test_a_step_that_is_not_finite_is_explained_and_replayed(run, data, far_weights, tmp_path):
    out = tmp_path / "run"
    ended = run("train", "--data", data, "--out", out, "--weights", far_weights, *FAST, "--quiet")
    assert ended.code == 7, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "warning: step 1 is not finite" in ended.stderr
    for said in (
        "(0.png)",
        "arm_offsets",
        "on the level of stride 8",
        "backbone",
        "positives",
        "error: training is not",
    ):
        assert said in ended.stderr, said
    capture = out / "nonfinite.pt"
    assert f"refinedet train --replay {capture} computes this step again" in ended.stderr
    assert not (out / "last.safetensors").exists()

    again = run("train", "--replay", capture)
    assert again.code == 7
    assert "step 1 of a run in bf16 on cpu" in again.stderr
    assert "step 1 is not finite in bf16" in again.stderr
    rows = [line.strip().split("  ")[0] for line in again.stdout.splitlines()]
    assert {"cause", "pictures", "arm_offsets", "odm_logits", "loss", "gradients"} <= set(rows)
    as_json = run("train", "--replay", capture, "--precision", "fp32", "--json")
    assert as_json.code == 7
    document = json.loads(as_json.stdout)
    assert document["finite"] is False
    assert document["diagnosis"]["precision"] == "fp32"
    assert document["run"] == {"precision": "bf16", "device": "cpu"}

    # With the weights mended, as by another precision, it is finite, and that is said.
    step = load_capture(capture)
    step.network["arm.levels.0.bias"].zero_()
    step.network["arm.levels.0.weight"].div_(1e3)
    save_capture(capture, step)
    mended = run("train", "--replay", capture, "--precision", "fp32")
    assert mended.code == 0, mended.stderr
    assert "the rounding of bf16 is to blame: train with --precision fp32" in mended.stdout


def test_replay_goes_alone(run, data, tmp_path):
    refused = run("train", "--replay", tmp_path / "x.pt", "--data", data)
    assert refused.code == 2
    assert "takes data and settings from the file" in refused.stderr
    missing = run("train", "--replay", tmp_path / "x.pt")
    assert missing.code == 5
    assert "there is no such file" in missing.stderr


def test_warnings_are_shown_and_kept(run, data, tmp_path):
    out = tmp_path / "run"
    ended = run("train", "--data", data, "--out", out, "--weights", "none", "--preset", "tiny", *FAST, "--quiet")
    assert ended.code == 0, ended.stderr
    warning = "no training picture has an object of the class triangle"
    assert ended.stderr.count(warning) == 1
    assert f"warning: step 1: {warning}; add pictures" in ended.stderr
    with (out / "health.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["step"], row["kind"], row["message"]) == ("1", "classes-without-objects", warning)
