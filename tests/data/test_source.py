from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.source import find_splits, hold_out, open_dataset
from refinedet_cli.errors import DataError


def annotate(path: Path, picture: str = "a.jpg", identity: int = 1) -> None:
    """Write an annotation file for one picture, told apart by its id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": identity, "file_name": picture, "width": 10, "height": 10}],
        "annotations": [{"id": 1, "image_id": identity, "category_id": 1, "bbox": [0, 0, 5, 5]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    path.write_text(json.dumps(content))


def place(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    ("annotations", "picture", "split"),
    [
        ("train.json", "a.jpg", "train"),
        ("train.json", "train/a.jpg", "train"),
        ("val.json", "images/a.jpg", "val"),
        ("valid.json", "images/valid/a.jpg", "val"),
        ("validation.json", "a.jpg", "val"),
        ("train/_annotations.coco.json", "train/a.jpg", "train"),
        ("valid/_annotations.coco.json", "valid/a.jpg", "val"),
        ("test/_annotations.coco.json", "test/a.jpg", "test"),
        ("train/labels.json", "train/data/a.jpg", "train"),
        ("train/labels.json", "train/images/a.jpg", "train"),
        ("annotations/instances_train.json", "images/a.jpg", "train"),
        ("annotations/instances_train.json", "images/train/a.jpg", "train"),
        ("annotations/instances_Validation.json", "images/Validation/a.jpg", "val"),
        ("annotations/instances_val2017.json", "val2017/a.jpg", "val"),
        ("annotations/test.json", "test/a.jpg", "test"),
    ],
)
def test_layouts_of_folders(tmp_path: Path, annotations: str, picture: str, split) -> None:
    annotate(tmp_path / annotations)
    place(tmp_path / picture, tmp_path / "README.txt")
    data = open_dataset(str(tmp_path), split=split)
    assert data.records[0].path.resolve() == (tmp_path / picture).resolve()
    assert data.name == f"{tmp_path.name}/{split}"
    assert find_splits(str(tmp_path)) == (split,)


def test_each_split_is_its_own(tmp_path: Path) -> None:
    for identity, name in enumerate(("train", "valid", "test")):
        annotate(tmp_path / name / "_annotations.coco.json", identity=identity)
    opened = [open_dataset(str(tmp_path), split=split).records[0].image_id for split in ("train", "val", "test")]
    assert opened == [0, 1, 2]
    assert find_splits(str(tmp_path)) == ("train", "val", "test")


def test_roboflow_file_goes_before_other_json(tmp_path: Path) -> None:
    annotate(tmp_path / "train" / "_annotations.coco.json", identity=4)
    annotate(tmp_path / "train" / "other.json", identity=5)
    assert open_dataset(str(tmp_path), split="train").records[0].image_id == 4


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_single_file_is_every_split(tmp_path: Path, split) -> None:
    annotate(tmp_path / "set.json", identity=6)
    assert open_dataset(str(tmp_path / "set.json"), split=split).records[0].image_id == 6
    assert find_splits(str(tmp_path / "set.json")) == ()


@pytest.mark.parametrize("name", ["labels.json", "annotations/instances_default.json"])
def test_folder_with_one_file_is_undivided(tmp_path: Path, name: str) -> None:
    annotate(tmp_path / name, identity=6)
    assert open_dataset(str(tmp_path), split="val").records[0].image_id == 6
    assert find_splits(str(tmp_path)) == ()


@pytest.mark.parametrize(
    ("annotations", "picture"),
    [
        ("set.json", "images/a.jpg"),
        ("set.json", "data/a.jpg"),
        ("set.json", "set/a.jpg"),
        ("annotations/instances_default.json", "images/default/a.jpg"),
        ("annotations/instances_train2017.json", "train2017/a.jpg"),
    ],
)
def test_pictures_of_a_single_file_are_found(tmp_path: Path, annotations: str, picture: str) -> None:
    annotate(tmp_path / annotations)
    place(tmp_path / picture)
    assert open_dataset(str(tmp_path / annotations), split="train").records[0].path == tmp_path / picture


def test_images_folder_goes_before_all(tmp_path: Path) -> None:
    annotate(tmp_path / "train.json")
    place(tmp_path / "a.jpg", tmp_path / "mine" / "b.jpg")
    data = open_dataset(str(tmp_path), split="train", images=tmp_path / "mine")
    assert data.records[0].path == tmp_path / "mine" / "a.jpg"


def test_missing_split_names_the_others(tmp_path: Path) -> None:
    annotate(tmp_path / "train.json")
    annotate(tmp_path / "test.json")
    with pytest.raises(DataError, match="has no val part, only train, test"):
        open_dataset(str(tmp_path), split="val")


@pytest.mark.parametrize(
    "names", [("val.json", "valid.json"), ("val.json", "val/a.json"), ("val/a.json", "val/b.json")]
)
def test_two_candidates_are_refused_and_named(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        annotate(tmp_path / name)
    with pytest.raises(DataError, match="more than one val part") as caught:
        open_dataset(str(tmp_path), split="val")
    assert all(str(Path(name)) in caught.value.message for name in names)


def test_unknown_json_names_are_listed(tmp_path: Path) -> None:
    annotate(tmp_path / "one.json")
    annotate(tmp_path / "two.json")
    with pytest.raises(DataError, match=r"one\.json, two\.json"):
        open_dataset(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ([], "coco", "public data set.*not read yet"),
        ([], "voc2007", "not read yet"),
        ([], "VOC2012", "not read yet"),
        ([], "data.yaml", "YOLO.*not read yet"),
        (["data.yaml"], "data.yaml", "YOLO.*not read yet"),
        (["data.yaml", "train/images/a.jpg"], ".", "YOLO.*not read yet"),
        (["Annotations/a.xml", "JPEGImages/a.jpg"], ".", "VOC.*not read yet"),
        (["VOCdevkit/VOC2007/JPEGImages/a.jpg"], ".", "VOC.*not read yet"),
        (["VOC2007/JPEGImages/a.jpg"], ".", "VOC.*not read yet"),
        (["a.xml"], "a.xml", "VOC.*not read yet"),
        (["set.zip"], "set.zip", "archive"),
        (["a.jpg"], ".", "no annotations"),
        ([], "gone", "does not exist"),
        ([], "nul\0", "does not exist|cannot be read"),
        ([], "n" * 300, "cannot be read"),
        (["notes.txt"], "notes.txt", "is empty"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_what_is_not_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], source: str, message: str
) -> None:
    place(*(tmp_path / file for file in files))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(source, split="train")
    assert caught.value.hint


def test_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not an ordinary file"):
        open_dataset(str(tmp_path / "pipe"), split="train")


def test_a_folder_named_coco_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotate(tmp_path / "coco" / "train.json", identity=8)
    monkeypatch.chdir(tmp_path)
    assert open_dataset("coco", split="train").records[0].image_id == 8


def dataset(folder: Path, contents: list[bytes]) -> Dataset:
    records = []
    for i, content in enumerate(contents):
        path = folder / f"{i}.jpg"
        path.write_bytes(content)
        empty, none = np.zeros(0), np.zeros(0, dtype=np.int64)
        flags = np.zeros(0, dtype=bool)
        records.append(Record(i, path, 9, 9, np.zeros((0, 4)), none, empty, flags, flags, none, path.name))
    return Dataset("set", Classes(names=("x",), category_ids=(1,)), tuple(records), ("n",))


def ids(data: Dataset) -> list[int]:
    return [record.image_id for record in data.records]


def test_hold_out_parts_the_set(tmp_path: Path) -> None:
    data = dataset(tmp_path, [b"%d" % i for i in range(200)])
    rest, held = hold_out(data)
    assert sorted(ids(rest) + ids(held)) == list(range(200))
    assert ids(rest) == sorted(ids(rest))
    # 30 expected; 15 to 45 is three standard deviations.
    assert 15 <= len(held) <= 45
    assert rest.notes == ("n", f"{len(held)} of 200 pictures are held out by content, seed 0")
    assert held.classes == rest.classes == data.classes


def test_hold_out_is_decided_by_content_and_seed(tmp_path: Path) -> None:
    data = dataset(tmp_path, [b"%d" % i for i in range(60)])
    first = ids(hold_out(data)[1])
    turned = dataclasses.replace(data, records=data.records[::-1])
    assert ids(hold_out(turned)[1]) == first[::-1]
    assert ids(hold_out(data)[1]) == first
    assert ids(hold_out(data, seed=1)[1]) != first


def test_added_pictures_move_none(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    few = ids(hold_out(dataset(tmp_path, [b"%d" % i for i in range(60)]))[1])
    many = ids(hold_out(dataset(tmp_path / "more", [b"%d" % i for i in range(90)]))[1])
    assert [i for i in many if i < 60] == few


def test_copies_fall_on_one_side(tmp_path: Path) -> None:
    data = dataset(tmp_path, [b"%d" % (i % 20) for i in range(60)])
    rest, held = hold_out(data, fraction=0.5)
    assert not {i % 20 for i in ids(rest)} & {i % 20 for i in ids(held)}


@pytest.mark.parametrize("fraction", [1e-9, 0.15, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_neither_side_is_empty(tmp_path: Path, fraction: float, count: int, seed: int) -> None:
    rest, held = hold_out(dataset(tmp_path, [b"%d" % i for i in range(count)]), fraction=fraction, seed=seed)
    assert len(rest) >= 1
    assert len(held) >= 1
    assert len(rest) + len(held) == count


@pytest.mark.parametrize("contents", [[], [b"a"], [b"a", b"a"]], ids=["none", "one", "copies"])
def test_fewer_than_two_distinct_pictures_are_refused(tmp_path: Path, contents: list[bytes]) -> None:
    with pytest.raises(DataError, match=f"{len(set(contents))} distinct") as caught:
        hold_out(dataset(tmp_path, contents))
    assert caught.value.hint


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_fractions_out_of_range_are_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="cannot be held out"):
        hold_out(dataset(tmp_path, [b"a", b"b"]), fraction=fraction)


def test_missing_picture_is_named(tmp_path: Path) -> None:
    data = dataset(tmp_path, [b"a", b"b"])
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"1\.jpg does not exist"):
        hold_out(data)


def test_real_folder(shared_data: Path) -> None:
    sizes = [len(open_dataset(str(shared_data / "bccd"), split=split)) for split in ("train", "val", "test")]
    assert sizes == [205, 87, 72]
