"""`refinedet weights import`: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.presets import VOC_NAMES
from refinedet_cli.zoo.checkpoint import file_sha256, read_header


@pytest.fixture(scope="module")
def others(load_script) -> Any:
    return load_script("tests/zoo/other_projects.py")


@pytest.fixture(scope="module")
def weights(others, tmp_path_factory) -> Path:
    """Weights of two classes."""
    path = tmp_path_factory.mktemp("other") / "ships320.pth"
    torch.save(others.luuuyi(3), path)
    return path


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_imported_detector_detects(run, weights, tmp_path):
    (tmp_path / "names.txt").write_text("__background__\nship\n\nboat  \n", encoding="utf-8-sig")
    code, stdout, stderr = run("weights", "import", weights, "--classes", "names.txt", "--size", "64")
    assert code == 0
    out = tmp_path / "ships320.safetensors"
    assert stdout.splitlines()[0].rstrip() == f"Imported {weights.name}"
    rows = {line[:13].strip(): line[13:].strip() for line in stdout.splitlines()[1:]}
    assert rows["from"] == "luuuyi/RefineDet.PyTorch"
    assert rows["2 classes"] == "ship, boat"
    assert rows["input"] == "64 x 64 px, RGB less (123, 117, 104)"
    assert rows["written"] == f"ships320.safetensors, {out.stat().st_size / 1e6:.1f} MB"
    assert "'__background__' in its first line is left out" in stderr
    assert "refinedet detect PICTURES --weights ships320.safetensors --out found" in stderr
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)).save("a.png")
    code, stdout, _ = run("detect", "a.png", "--weights", out, "--score", "0", "--json")
    assert code == 0
    assert json.loads(stdout)["origin"]["sha256"] == file_sha256(out)
    told = run("weights", "info", out).stdout
    assert "luuuyi/RefineDet.PyTorch, imported from ships320.pth" in told
    assert "trained with" not in told


def test_json_tells_everything(run, weights, tmp_path):
    code, stdout, stderr = run("weights", "import", weights, "--out", "new/x.safetensors", "--json", "--quiet")
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["command"] == "weights import"
    assert (document["project"], document["tensors"], document["tensors_left_out"]) == (
        "luuuyi/RefineDet.PyTorch",
        98,
        0,
    )
    assert document["sha256"] == file_sha256(tmp_path / "new" / "x.safetensors")
    assert document["file_sha256"] == file_sha256(weights)
    config, provenance = read_header(tmp_path / "new" / "x.safetensors")
    assert list(config.classes.names) == document["config"]["classes"]["names"] == ["class1", "class2"]
    assert provenance["imported"]["assumed"] == document["assumed"]


def test_a_dry_run_writes_nothing(run, weights, tmp_path):
    code, stdout, _ = run("weights", "import", weights, "--dry-run", "--channel-order", "bgr")
    assert code == 0
    assert stdout.startswith("Recognised ")
    assert "turned to BGR" in stdout
    assert "written" not in stdout
    assert list(tmp_path.iterdir()) == []


def test_classes_of_a_coco_file_by_rising_id(run, weights, tmp_path):
    categories = [{"id": 7, "name": "ship"}, {"id": 3, "name": "boat"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    document = json.loads(run("weights", "import", weights, "--classes", "coco.json", "--dry-run", "--json").stdout)
    assert document["config"]["classes"] == {"names": ["boat", "ship"], "category_ids": [3, 7]}


@pytest.mark.parametrize(
    ("classes", "code", "says"),
    [
        ("voc", 2, f"--classes has {len(VOC_NAMES)} names, and"),
        ("nowhere.txt", 2, "--classes 'nowhere.txt': there is no such file"),
        ("empty.txt", 4, "empty.txt: no class names in it"),
        ("binary.txt", 4, "binary.txt: not a text file"),
        ("twice.txt", 3, "class names repeat"),
        ("broken.json", 4, "broken.json is not valid JSON"),
    ],
)
def test_class_lists_that_do_not_fit(run, weights, tmp_path, classes, code, says):
    (tmp_path / "empty.txt").write_text("background\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "twice.txt").write_text("ship\nship\n")
    (tmp_path / "broken.json").write_text("{")
    found, _, stderr = run("weights", "import", weights, "--classes", classes)
    assert (found, says in stderr) == (code, True), stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--size", "100"), "--size 100 is not a multiple of 64"),
        (("--out", "x.pth"), "a checkpoint ends in .safetensors"),
        (("--out", "."), "--out . is a folder"),
        (("--out", "there.safetensors"), "there.safetensors exists and is not replaced"),
    ],
)
def test_options_that_do_not_fit(run, weights, tmp_path, options, says):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    code, _, stderr = run("weights", "import", weights, *options)
    assert code == 2
    assert says in stderr
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


def test_what_cannot_be_imported_leaves_nothing(run, weights, tmp_path):
    content = weights.read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    for name, says in (("half.pth", "cannot be read"), ("nowhere.pth", "there is no such file")):
        code, stdout, stderr = run("weights", "import", name, "--json")
        assert code == 5
        assert says in stderr
        assert json.loads(stdout)["error"]["type"] == "checkpoint"
    assert [path.name for path in tmp_path.iterdir()] == ["half.pth"]
