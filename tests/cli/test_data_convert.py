from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from refinedet_cli.data.source import open_dataset

Run = Callable[..., Any]


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """A COCO data set of two parts with one picture and object each; its names look like markup."""
    folder = tmp_path / "[signs]"
    (folder / "images").mkdir(parents=True)
    for i, part in enumerate(("train", "val"), start=1):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / "images" / f"{part}.png")
        document = {
            "images": [{"id": i, "file_name": f"images/{part}.png", "width": 40, "height": 30}],
            "annotations": [{"id": 1, "image_id": i, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0, "why": "x"}],
            "categories": [{"id": 7, "name": "[stop]"}],
        }
        (folder / f"{part}.json").write_text(json.dumps(document))
    return folder


def test_a_table_tells_parts_and_losses(run: Run, signs: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run("data", "convert", signs, "--to", "yolo", "--out", tmp_path / "new")
    assert code == 0, stderr
    lines = [line.split() for line in stdout.splitlines()]
    assert ["train", "1", "1"] in lines
    assert ["val", "1", "1"] in lines
    assert "fields of objects: why" in stdout
    assert f"wrote {tmp_path / 'new'}: 2 pictures copied" in stderr
    assert open_dataset(str(tmp_path / "new"), split="val").classes.names == ("[stop]",)


def test_nothing_is_lost_between_coco_files(run: Run, signs: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        "data", "convert", signs, "--to", "coco", "--out", tmp_path / "new", "--picture-files", "stay"
    )
    assert code == 0, stderr
    assert "Nothing is lost" in stdout
    assert "pictures stay where they are" in stderr


def test_the_document(run: Run, signs: Path, tmp_path: Path) -> None:
    code, stdout, _ = run("data", "convert", f"{signs}:train", "--to", "voc", "--out", tmp_path / "new", "--json", "-q")
    assert code == 0
    document = json.loads(stdout)
    assert document["command"] == "data convert"
    assert document["format"] == "voc"
    assert document["parts"] == [{"name": "train", "pictures": 1, "objects": 1}]
    assert document["classes"] == ["[stop]"]
    assert [(loss["what"], loss["number"]) for loss in document["losses"]] == [
        ("class ids", 1),
        ("fields of objects: why", 1),
    ]
    assert document["pictures"] == {"copied": 1, "linked": 0}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--to", "voc", "--out", "{signs}/new"), 2, "belongs to the data set"),
        (("--to", "voc", "--out", "{signs}"), 2, "is not empty"),
        (("--to", "tfrecord", "--out", "{signs}-new"), 2, "--to"),
        (("--out", "{signs}-new"), 2, "--to"),
    ],
)
def test_mistakes(run: Run, signs: Path, arguments: tuple[str, ...], code: int, told: str) -> None:
    found = run("data", "convert", signs, *(word.format(signs=signs) for word in arguments))
    assert found.code == code
    assert told in found.stderr or "belongs to the data set" in found.stderr


def test_no_such_data(run: Run, tmp_path: Path) -> None:
    found = run("data", "convert", tmp_path / "none", "--to", "coco", "--out", tmp_path / "new", "--json")
    assert found.code == 4
    assert "does not exist" in json.loads(found.stdout)["error"]["message"]
