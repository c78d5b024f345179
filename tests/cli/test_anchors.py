from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import AnchorConfig, Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.engine.anchor_file import anchor_toml, read_anchor_file
from refinedet_cli.zoo.checkpoint import save_checkpoint

Run = Callable[..., Any]


def write(path: Path, objects: list[tuple[int, list[float]]], pictures: int) -> Path:
    """A COCO data set of 64-px pictures; objects are (picture, xywh)."""
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(1, pictures + 1)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": 1 + k % 2, "bbox": box} for k, (i, box) in enumerate(objects, 1)
        ],
        "categories": [{"id": 1, "name": "[dog]"}, {"id": 2, "name": "cat"}],
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts train and val, without pictures; most objects are wide and flat, as no anchor is."""
    folder = tmp_path_factory.mktemp("signs")
    draw = np.random.default_rng(0)
    for part, pictures in (("train", 40), ("val", 20)):
        objects = []
        for _ in range(3 * pictures):
            width, height = draw.uniform(26, 34), draw.uniform(4, 6)
            left, top = draw.uniform(0, 64 - width), draw.uniform(0, 64 - height)
            objects.append((int(draw.integers(1, pictures + 1)), [left, top, width, height]))
        objects.append((1, [16, 16, 8, 8]))
        write(folder / f"{part}.json", objects, pictures)
    return folder


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose pictures are there."""
    folder = tmp_path_factory.mktemp("pictured")
    draw = np.random.default_rng(0)
    for i in (1, 2, 3):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return write(folder / "pets.json", [(i, [8.0 * i, 8, 10, 12]) for i in (1, 2, 3)], 3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = get_preset("tiny", Classes(names=("cat", "dog"), category_ids=(1, 2))).detector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_checkpoint(path, config, build(config).network.state_dict(), {})
    return path


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinedet_cli.engine.charts.DPI", 40)


@pytest.fixture
def anchors(run: Run) -> Run:
    return lambda dataset, *args: run("anchors", "--dataset", dataset, "--preset", "tiny", *args)


def test_tables_and_document_agree(anchors: Run, data: Path) -> None:
    code, stdout, stderr = anchors(data)
    assert code == 0
    assert "warning" not in stderr
    assert f"{data}: 40 pictures, 121 objects" in stdout
    assert "of preset tiny" in stdout
    assert "64 x 64 px" in stdout
    assert " 61 objects, those of " in stdout
    for title in ("Coverage", "Levels", "Classes", "Now and proposed", "Proposed anchors"):
        assert f"\n{title}" in stdout
    assert "[dog]" in stdout

    as_json = anchors(data, "--json", "--quiet")
    assert (as_json.code, as_json.stderr) == (0, "")
    document = json.loads(as_json.stdout)
    assert (document["schema_version"], document["command"]) == (1, "anchors")
    assert all(line in stdout for line in document["verdict"])
    assert document["dataset"]["objects"] == document["coverage"]["overall"]["objects"] == 121
    assert document["recall"] == document["coverage"]["overall"]["iou_50"]
    assert document["search"]["accepted"] is True
    after = document["search"]["held_out_after"]
    assert after["matched"] > document["search"]["held_out_before"]["matched"]
    assert f"{100 * after['matched']:.1f} %" in stdout
    assert document["search"]["anchors_after"] <= document["search"]["anchors_before"]
    assert document["refinement"] is None
    assert document["looks"][0]["cost"] == 1
    assert document["files"] == []


def test_several_data_sets_are_one(anchors: Run, data: Path, pictured: Path) -> None:
    document = anchors(data, "--dataset", pictured, "--json").document()
    assert document["dataset"]["source"] == f"{data} + {pictured}"
    assert (document["dataset"]["pictures"], document["dataset"]["objects"]) == (43, 124)
    # As in training, the pictures that judge are the val parts of those that have one.
    assert document["search"]["held_out"].startswith("those of ")
    assert document["search"]["held_out_before"]["objects"] == 61


def test_the_search_can_be_left_out(anchors: Run, data: Path, tmp_path: Path) -> None:
    code, stdout, _ = anchors(data, "--no-search", "--out", tmp_path, "--json")
    assert code == 0
    assert json.loads(stdout)["search"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchors.json"]


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    anchors: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinedet_cli.engine.anchor_study.study_anchors", lambda *_: pytest.fail("it began"))
    (tmp_path / "file").touch()
    code, _, stderr = anchors(data, "--out", tmp_path / "file" / "below")
    assert (code, "cannot write" in stderr) == (4, True)


def test_help_tells_where_pictures_are_drawn(run: Run) -> None:
    told = " ".join(run("anchors", "--help").stdout.replace("│", " ").split())
    assert "nothing is written, or anchors/ with --visualize" in told


def test_a_part_can_be_named(anchors: Run, data: Path) -> None:
    document = json.loads(anchors(f"{data}:val", "--no-search", "--json").stdout)
    assert document["dataset"]["objects"] == 61


def test_the_anchors_written_are_those_proposed_and_can_be_measured(anchors: Run, data: Path, tmp_path: Path) -> None:
    first = anchors(data, "--out", tmp_path, "--json")
    document = json.loads(first.stdout)
    assert document["files"] == [str(tmp_path / "anchors.json"), str(tmp_path / "anchors.toml")]
    written = json.loads((tmp_path / "anchors.json").read_text())
    assert written["search"] == document["search"]
    file = read_anchor_file(tmp_path / "anchors.toml")
    assert [[list(shape) for shape in level] for level in file.anchors.shapes] == document["search"]["shapes"]
    assert file.input_size == (64, 64)
    again = json.loads(anchors(data, "--config", tmp_path / "anchors.toml", "--no-search", "--json").stdout)
    assert again["recall"] == pytest.approx(document["search"]["train_after"]["matched"], abs=0.01)
    assert again["recall"] == document["search"]["coverage"]["overall"]["iou_50"]


def test_the_gate_speaks_after_the_report(anchors: Run, data: Path) -> None:
    recall = json.loads(anchors(data, "--no-search", "--json").stdout)["recall"]
    assert anchors(data, "--no-search", "--min-recall", recall).code == 0
    code, stdout, stderr = anchors(data, "--no-search", "--min-recall", 0.95)
    assert code == 7
    assert "Coverage" in stdout
    assert "of the objects reach IoU 0.5, less than --min-recall 0.95" in stderr
    code, stdout, _ = anchors(data, "--no-search", "--min-recall", 0.95, "--json")
    assert code == 7
    assert json.loads(stdout)["recall"] == recall


def test_weights_show_what_refinement_buys(run: Run, pictured: Path, weights: Path) -> None:
    call = ["anchors", "--dataset", pictured, "--weights", weights, "--device", "cpu", "--pictures", 2, "--no-search"]
    code, stdout, _ = run(*call)
    assert code == 0
    assert "Refinement, on 2 pictures with 2 objects" in stdout
    assert "of weights tiny.safetensors" in stdout
    document = json.loads(run(*call, "--json").stdout)
    assert [step["name"] for step in document["refinement"]["steps"]] == ["anchors", "after the ARM", "after the ODM"]
    assert document["refinement"]["pictures_with_objects"] == 3


def test_everything_is_drawn(run: Run, pictured: Path, weights: Path, tmp_path: Path) -> None:
    code, _, stderr = run(
        "anchors", "--dataset", pictured, "--weights", weights, "--device", "cpu", "--visualize", "--out", tmp_path
    )
    assert code == 0
    assert "anchors.html" in stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"anchors.html", "anchors.json", "anchors.toml", "coverage-map.png", "refinement-by-iou.png"} <= names
    assert {"picture-1.png", "picture-2.png", "picture-3.png"} <= names
    assert "What refinement buys" in (tmp_path / "anchors.html").read_text()


def test_absent_pictures_are_told(anchors: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = anchors(data, "--visualize", "--no-search")
    assert code == 0
    assert "warning: no picture of the data is on disk, so none is drawn" in stderr
    assert (tmp_path / "anchors" / "anchors.html").is_file()
    assert f"wrote {Path('anchors') / 'anchors.json'}" in stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--budget", "3"], 2, "--budget 3 is less than one anchor in every cell"),
        (["--budget", "many"], 2, "--budget"),
        (["--min-recall", "95"], 2, "--min-recall"),
        (["--weights", "x.safetensors"], 2, "--preset and --weights exclude each other"),
        (["--set", "anchors.shapes=[]"], 3, "anchors.strides and anchors.shapes differ in length"),
        (["--config", "absent.toml"], 3, "absent.toml"),
    ],
)
def test_mistakes_are_told(anchors: Run, data: Path, args: list[str], code: int, words: str) -> None:
    finished = anchors(data, *args)
    assert (finished.code, finished.stdout) == (code, "")
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_file_is_no_folder(anchors: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert anchors(data, "--out", tmp_path / "file").code == 2


@pytest.mark.parametrize(
    ("objects", "pictures", "code", "line"),
    [
        ([], 2, 4, "has no object for anchors to cover"),
        ([(1, [5, 5, 0, 9])], 2, 4, "has no object for anchors to cover"),
        ([(1, [5, 5, 9, 9])], 1, 0, "there is no second picture to judge them by"),
        ([(1, [5, 5, 9, 9]), (1, [5, 5, 9, 0])], 1, 0, "1 boxes are dropped: without area"),
        ([(1, [5, 5, 9, 9]), (1, [70, 70, 9, 9])], 1, 0, "1 boxes are dropped: outside their picture"),
    ],
    ids=["no-boxes", "only-zero-size", "one-box", "zero-size", "outside"],
)
def test_odd_data_gets_a_line(
    anchors: Run, tmp_path: Path, objects: list[tuple[int, list[float]]], pictures: int, code: int, line: str
) -> None:
    finished = anchors(write(tmp_path / "odd.json", objects, pictures))
    assert finished.code == code
    assert sum(line in row for row in finished.stderr.splitlines()) == 1
    assert "Traceback" not in finished.stderr


def test_training_takes_the_anchors(run: Run, pictured: Path, tmp_path: Path) -> None:
    shapes = (((9.0, 9.0), (5.0, 20.0)), ((16.0, 16.0),), ((32.0, 32.0),), ((64.0, 64.0),))
    file = tmp_path / "anchors.toml"
    file.write_text(anchor_toml(AnchorConfig(shapes=shapes), (128, 64), []))
    code, stdout, stderr = run(
        "train", "--data", pictured, "--preset", "tiny", "--weights", "none", "--anchors", file, "--device", "cpu",
        "--epochs", 1, "--batch", 2, "--workers", 0, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    assert json.loads(stdout)["config"]["detector"]["anchors"]["shapes"] == [
        [list(s) for s in level] for level in shapes
    ]
    assert "was fitted to an input of 64 x 128 px, but this detector takes 64 x 64" in stderr
    again = run(
        "anchors", "--dataset", pictured, "--weights", tmp_path / "run" / "last.safetensors", "--device", "cpu",
        "--no-search", "--json",
    )  # fmt: skip
    assert json.loads(again.stdout)["coverage"]["levels"][0]["shapes"] == [[9, 9], [5, 20]]


def test_training_refuses_a_file_without_anchors(run: Run, pictured: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nepochs = 1\n")
    code, _, stderr = run("train", "--data", pictured, "--anchors", tmp_path / "run.toml", "--out", tmp_path / "run")
    assert code == 3
    assert "has no table [anchors]" in stderr
