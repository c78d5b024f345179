from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Run = Callable[..., Any]
PARTS = "train=0.5,val=0.25,test=0.25"


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Twelve pictures of four clips, two of them equal; every other one has an object; one class has none."""
    folder = tmp_path / "frames"
    folder.mkdir()
    names = [f"clip{i % 4}_{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i if i != 4 else 0, 0, 0)).save(folder / name)
    document = {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(names, start=1)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 2, 2]} for i in range(1, 13, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "[dog]"}],
    }
    (tmp_path / "frames.json").write_text(json.dumps(document))
    return tmp_path / "frames.json"


def test_a_table_tells_counts(run: Run, frames: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    code, stdout, stderr = run("data", "split", frames, "--images", tmp_path / "frames", "--parts", PARTS, "--out", out)
    assert code == 0, stderr
    assert "12 pictures, in 11 units that stay together" in stdout
    lines = [line.split() for line in stdout.splitlines()]
    assert ["pictures", "6", "50.0", "%", "3", "25.0", "%", "3", "25.0", "%", "12"] in lines
    assert "1 picture is a copy of another" in stderr
    assert "1 of 2 classes without object: [dog]" in stderr
    assert sorted(path.name for path in out.iterdir()) == ["images", "test.json", "train.json", "val.json"]


def test_the_document(run: Run, frames: Path, tmp_path: Path) -> None:
    arguments = ("--images", tmp_path / "frames", "--parts", PARTS, "--group", "clip[0-9]", "--seed", 3, "--json")
    code, stdout, _ = run("data", "split", frames, *arguments, "--out", tmp_path / "new")
    assert code == 0
    document = json.loads(stdout)
    assert (document["seed"], document["group"], document["units"], document["copies"]) == (3, "clip[0-9]", 4, 1)
    assert [(part["name"], part["asked"], part["pictures"]) for part in document["parts"]] == [
        ("train", 0.5, 6),
        ("val", 0.25, 3),
        ("test", 0.25, 3),
    ]
    assert sum(part["classes"]["cat"] for part in document["parts"]) == 6
    assert document["pictures"] == {"copied": 0, "linked": 0}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--parts", "train=0.5"), "add up to 0.5"),
        (("--parts", "train=0.5,dev=0.5"), "dev=0.5"),
        (("--parts", PARTS, "--group", "["), "is no pattern"),
        (("--parts", PARTS, "--group", "video"), "matches no file name"),
    ],
)
def test_mistakes(run: Run, frames: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    found = run("data", "split", frames, "--images", tmp_path / "frames", *arguments, "--out", tmp_path / "new")
    assert found.code == 2
    assert told in found.stderr
    assert not (tmp_path / "new").exists()
