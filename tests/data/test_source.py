from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.images import read_image
from refinedet_cli.data.source import find_splits, hold_out, open_dataset
from refinedet_cli.errors import DataError, UsageError


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
        ([], "data.yaml", "does not exist"),
        (["data.yaml"], "data.yaml", "is empty"),
        (["data.yaml", "train/images/a.jpg"], ".", "data.yaml is empty"),
        (["train/images/a.jpg", "train/labels/a.txt"], ".", "label files as YOLO's, but no data.yaml"),
        (["Annotations/a.xml", "JPEGImages/a.jpg"], ".", "a.xml is empty"),
        (["VOCdevkit/VOC2007/JPEGImages/a.jpg"], ".", "VOC2007 has no Annotations"),
        (["VOC2007/JPEGImages/a.jpg"], ".", "VOC2007 has no Annotations"),
        (["a.xml"], "a.xml", "annotation of one picture"),
        (["a.xml"], "a.xml:train", "annotation of one picture"),
        ([], "gone:train", "gone:train does not exist"),
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


# --- parts by name


@pytest.mark.parametrize(
    ("annotations", "part"),
    [
        ("train.json", "train"),
        ("valid.json", "val"),
        ("valid.json", "valid"),
        ("fold1.json", "fold1"),
        ("fold1/_annotations.coco.json", "fold1"),
        ("annotations/instances_minival2014.json", "minival2014"),
        ("annotations/instances_train2017.json", "train2017"),
    ],
)
def test_part_behind_a_colon(tmp_path: Path, annotations: str, part: str) -> None:
    annotate(tmp_path / annotations, identity=4)
    annotate(tmp_path / "test.json", identity=5)
    source = f"{tmp_path}:{part}"
    data = open_dataset(source, split="test")
    assert data.records[0].image_id == 4
    assert data.name == f"{tmp_path.name}/{part}"
    assert find_splits(source) == ()


def test_exact_part_goes_before_its_other_names(tmp_path: Path) -> None:
    annotate(tmp_path / "val.json", identity=1)
    annotate(tmp_path / "valid.json", identity=2)
    assert open_dataset(f"{tmp_path}:valid", split="train").records[0].image_id == 2
    with pytest.raises(DataError, match="more than one val part"):
        open_dataset(str(tmp_path), split="val")


@pytest.mark.parametrize("name", ["a:b", "a:train", "c:", "1:2:3"])
def test_folder_with_a_colon_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    annotate(tmp_path / name / "train.json", identity=3)
    annotate(tmp_path / "a" / "train.json", identity=4)
    monkeypatch.chdir(tmp_path)
    for source in (name, f"{name}:train", str(tmp_path / name), f"{tmp_path / name}:train"):
        assert open_dataset(source, split="train").records[0].image_id == 3


@pytest.mark.parametrize("source", ["C:\\data", "C:/data", "C:data", "http://a/b", ":train", "x:", "a:b/c", "x:y\\z"])
def test_other_colons_begin_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    for name in ("x", "http", "a"):
        annotate(tmp_path / name / "train.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist") as caught:
        open_dataset(source, split="train")
    assert source in caught.value.message


def test_one_letter_folder_has_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotate(tmp_path / "d" / "val.json", identity=3)
    monkeypatch.chdir(tmp_path)
    assert open_dataset("d:val", split="train").records[0].image_id == 3


def test_what_is_not_divided_has_no_parts(tmp_path: Path) -> None:
    annotate(tmp_path / "json" / "set.json")
    annotate_voc(tmp_path / "voc", "a")
    for source in (tmp_path / "json", tmp_path / "json" / "set.json", tmp_path / "voc"):
        assert find_splits(str(source)) == ()
        with pytest.raises(DataError, match="not divided, so it has no part val") as caught:
            open_dataset(f"{source}:val", split="val")
        assert caught.value.hint == "leave out :val"


# --- VOC


def annotate_voc(folder: Path, stem: str, name: str = "cat", *parts: str) -> None:
    """Add a picture with one object to a VOC folder, and to some of its lists."""
    for inner in ("Annotations", "JPEGImages", *(["ImageSets/Main"] if parts else [])):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages" / f"{stem}.jpg").touch()
    (folder / "Annotations" / f"{stem}.xml").write_text(
        "<annotation><size><width>9</width><height>9</height></size><object><name>" + name + "</name>"
        "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>"
    )
    for part in parts:
        with (folder / "ImageSets" / "Main" / f"{part}.txt").open("a") as file:
            file.write(stem + "\n")


def annotate_year(folder: Path) -> None:
    annotate_voc(folder, "000001", "cat", "train", "trainval")
    annotate_voc(folder, "000002", "dog", "val", "trainval")


@pytest.mark.parametrize("below", [".", "VOC2007", "VOCdevkit/VOC2007"])
def test_voc_folder_and_those_above(tmp_path: Path, below: str) -> None:
    annotate_year(tmp_path / below)
    assert find_splits(str(tmp_path)) == ("train", "val")
    train, val = (open_dataset(str(tmp_path), split=split) for split in ("train", "val"))
    assert (ids(train), ids(val)) == ([1], [2])
    assert train.classes == val.classes
    both = open_dataset(f"{tmp_path}:trainval", split="train")
    assert ids(both) == [1, 2]
    assert both.name.endswith("/trainval")
    assert find_splits(f"{tmp_path}:trainval") == ()


@pytest.mark.parametrize("above", [".", "VOCdevkit"])
def test_several_years_are_listed(tmp_path: Path, above: str) -> None:
    for year in ("VOC2007", "VOC2012"):
        annotate_year(tmp_path / above / year)
    with pytest.raises(DataError, match="holds VOC2007, VOC2012") as caught:
        open_dataset(str(tmp_path), split="train")
    assert str(Path(above, "VOC2007")) in (caught.value.hint or "")
    assert ids(open_dataset(str(tmp_path / above / "VOC2012"), split="train")) == [1]


def test_voc_part_that_is_not_there(tmp_path: Path) -> None:
    annotate_voc(tmp_path / "VOC2007", "1", "cat", "trainval")
    with pytest.raises(DataError, match="has no train part, only trainval") as caught:
        open_dataset(str(tmp_path / "VOC2007"), split="train")
    assert "VOC2007:trainval" in (caught.value.hint or "")
    with pytest.raises(DataError, match="has no test part") as caught:
        open_dataset(str(tmp_path / "VOC2007"), split="test")
    assert "VOCtest_06-Nov-2007.tar (451 MB)" in (caught.value.hint or "")
    annotate_year(tmp_path / "VOC2012")
    with pytest.raises(DataError, match="voc2012 test are not public") as caught:
        open_dataset(str(tmp_path / "VOC2012"), split="test")
    assert "val" in (caught.value.hint or "")


def test_undivided_voc_is_every_part(tmp_path: Path) -> None:
    annotate_voc(tmp_path, "a")
    assert [len(open_dataset(str(tmp_path), split=split)) for split in ("train", "val", "test")] == [1, 1, 1]


# --- public data sets by name


def annotate_coco(folder: Path, pictures: str) -> None:
    for identity, split in enumerate(("train", "val")):
        annotate(folder / "annotations" / f"instances_{split}2017.json", identity=identity)
        annotate(folder / "annotations" / f"instances_{split}2014.json", identity=10 + identity)
        for year in (2017, 2014):
            place(folder / pictures / f"{split}{year}" / "a.jpg")


@pytest.mark.parametrize("below", ["coco", "coco2017", "."])
@pytest.mark.parametrize("pictures", [".", "images"])
def test_coco_by_name(tmp_path: Path, below: str, pictures: str) -> None:
    annotate_coco(tmp_path / below, pictures)
    assert find_splits("coco", tmp_path) == ("train", "val")
    train, val = (open_dataset("coco", split=split, root=tmp_path) for split in ("train", "val"))
    assert (ids(train), ids(val), train.name) == ([0], [1], "coco/train2017")
    assert val.records[0].path.resolve() == (tmp_path / below / pictures / "val2017" / "a.jpg").resolve()
    assert ids(open_dataset("COCO:val2014", split="train", root=tmp_path)) == [11]
    with pytest.raises(DataError, match="has no minival part, only train2014, train2017, val2014, val2017"):
        open_dataset("coco:minival", split="train", root=tmp_path)
    with pytest.raises(DataError, match="coco test are not public") as caught:
        open_dataset("coco", split="test", root=tmp_path)
    assert caught.value.hint == "measure on coco:val"


def test_coco_without_its_pictures(tmp_path: Path) -> None:
    annotate_coco(tmp_path / "coco", ".")
    (tmp_path / "coco" / "val2017" / "a.jpg").unlink()
    with pytest.raises(DataError, match="pictures of coco val2017 are neither in") as caught:
        open_dataset("coco", split="val", root=tmp_path)
    assert "val2017.zip (816 MB)" in (caught.value.hint or "")
    place(tmp_path / "mine" / "a.jpg")
    assert ids(open_dataset("coco", split="val", root=tmp_path, images=tmp_path / "mine")) == [1]


@pytest.mark.parametrize("year", ["2007", "2012"])
@pytest.mark.parametrize("above", ["VOCdevkit", ".", "VOC/VOCdevkit"])
def test_voc_by_name(tmp_path: Path, year: str, above: str) -> None:
    for each in ("2007", "2012"):
        annotate_voc(tmp_path / above / f"VOC{each}", each, "dog", "train", "trainval")
    name = f"voc{year}"
    assert ids(open_dataset(name, split="train", root=tmp_path)) == [int(year)]
    data = open_dataset(f"VOC{year}:trainval", split="test", root=tmp_path)
    assert (ids(data), data.name, len(data.classes)) == ([int(year)], f"VOC{year}/trainval", 20)
    assert find_splits(name, tmp_path) == ("train",)


def test_root_comes_from_the_option_else_the_variable_else_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for identity, name in enumerate(("option", "variable", "datasets")):
        annotate_voc(tmp_path / name / "VOC2007", str(identity), "dog", "train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFINEDET_DATA", "variable")
    assert ids(open_dataset("voc2007", split="train", root=Path("option"))) == [0]
    assert ids(open_dataset("voc2007", split="train")) == [1]
    monkeypatch.setenv("REFINEDET_DATA", "")
    assert ids(open_dataset("voc2007", split="train")) == [2]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "coco",
            [
                "instances_val2017.json",
                "train2017/",
                "train2017.zip (19.3 GB)",
                "annotations_trainval2017.zip (253 MB)",
            ],
        ),
        (
            "voc2007",
            ["Annotations", "ImageSets", "VOCtrainval_06-Nov-2007.tar (460 MB)", "VOCtest_06-Nov-2007.tar (451 MB)"],
        ),
        ("VOC2012:train", ["JPEGImages", "VOCtrainval_11-May-2012.tar (2.0 GB)"]),
    ],
)
def test_missing_public_set_says_where_it_looked_and_what_to_fetch(
    tmp_path: Path, name: str, wanted: list[str]
) -> None:
    with pytest.raises(DataError, match="is not there: looked at") as caught:
        open_dataset(name, split="train", root=tmp_path)
    text = f"{caught.value.message} {caught.value.hint}"
    assert all(word in text for word in (*wanted, str(tmp_path), "--root", "REFINEDET_DATA"))


@pytest.mark.parametrize("source", ["coco", "voc2012", "voc2012:test", "coco:test-dev2017"])
def test_hidden_parts_are_said_before_anything_is_fetched(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="are not public"):
        open_dataset(source, split="test", root=tmp_path)


# --- YOLO


@pytest.mark.parametrize("source", [".", "data.yaml"])
def test_yolo(tmp_path: Path, source: str) -> None:
    for part in ("train", "valid"):
        Image.new("RGB", (10, 10)).save(make(tmp_path / part / "images") / "7.png")
        (make(tmp_path / part / "labels") / "7.txt").write_text("0 0.5 0.5 0.2 0.2")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]\n")
    path = str(tmp_path / source)
    assert find_splits(path) == ("train", "val")
    assert open_dataset(path, split="val").records[0].file_name == "valid/images/7.png"
    assert open_dataset(f"{path}:valid", split="train").records[0].file_name == "valid/images/7.png"
    with pytest.raises(DataError, match="has no test part, only train, val"):
        open_dataset(path, split="test")
    with pytest.raises(UsageError, match="--images does not go with"):
        open_dataset(path, split="train", images=tmp_path)


def test_parts_as_json_go_before_other_formats(tmp_path: Path) -> None:
    annotate(tmp_path / "train.json", identity=8)
    annotate_voc(tmp_path, "000001")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\n")
    assert ids(open_dataset(str(tmp_path), split="train")) == [8]


def test_stray_json_does_not_hide_another_format(tmp_path: Path) -> None:
    annotate_voc(tmp_path, "000001")
    (tmp_path / "info.json").write_text("{}")
    assert ids(open_dataset(str(tmp_path), split="train")) == [1]


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- all formats


BOXES = {
    "000003": ((64, 48), [("dog", (0, 0, 64, 48)), ("cat", (10, 20, 1, 1))]),
    "000011": ((33, 47), [("cat", (5, 7, 20, 31))]),
    "000012": ((20, 30), []),
}


def write_coco(folder: Path) -> None:
    names = ["cat", "dog"]
    content: dict[str, list[object]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    for stem, ((width, height), objects) in BOXES.items():
        content["images"].append({"id": int(stem), "file_name": f"{stem}.png", "width": width, "height": height})
        for name, box in objects:
            identity = len(content["annotations"]) + 1
            entry = {"id": identity, "image_id": int(stem), "category_id": names.index(name) + 1, "bbox": list(box)}
            content["annotations"].append(entry)
    (make(folder) / "train.json").write_text(json.dumps(content))


def write_voc(folder: Path) -> None:
    for stem, ((width, height), objects) in BOXES.items():
        rows = [
            f"<object><name>{name}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for name, (x, y, w, h) in objects
        ]
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (make(folder / "Annotations") / f"{stem}.xml").write_text(f"<annotation>{size}{''.join(rows)}</annotation>")
    (make(folder / "ImageSets" / "Main") / "train.txt").write_text("\n".join(BOXES))


def write_yolo(folder: Path) -> None:
    for stem, ((width, height), objects) in BOXES.items():
        rows = [
            f"{('cat', 'dog').index(name)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}"
            for name, (x, y, w, h) in objects
        ]
        (make(folder / "labels") / f"{stem}.txt").write_text("\n".join(rows))
    (folder / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")


@pytest.mark.parametrize(("write", "pictures"), [(write_coco, "."), (write_voc, "JPEGImages"), (write_yolo, "images")])
def test_formats_agree(tmp_path: Path, write: Callable[[Path], None], pictures: str) -> None:
    for stem, (size, _) in BOXES.items():
        Image.new("RGB", size).save(make(tmp_path / pictures) / f"{stem}.png")
    write(tmp_path)
    data = open_dataset(str(tmp_path), split="train")
    assert data.classes.names == ("cat", "dog")
    assert ids(data) == [3, 11, 12]
    assert not data.notes or data.notes == ("classes are the names in the XML files: cat, dog",)
    exact = write is not write_yolo
    for record, (size, objects) in zip(data.records, BOXES.values(), strict=True):
        assert read_image(record.path).shape[:2] == (record.height, record.width) == size[::-1]
        expected = np.array([(x, y, x + w, y + h) for _, (x, y, w, h) in objects], dtype=np.float64).reshape(-1, 4)
        np.testing.assert_allclose(record.boxes, expected, rtol=0, atol=0 if exact else 1e-12)
        areas = [w * h for _, (_, _, w, h) in objects]
        np.testing.assert_allclose(record.areas, areas, rtol=0, atol=0 if exact else 1e-9)
        assert [data.classes.names[i - 1] for i in record.labels] == [name for name, _ in objects]
    assert len(data.fingerprint) == 64
    assert data.fingerprint == open_dataset(str(tmp_path), split="train").fingerprint


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
    assert rest.notes == ("n", f"{len(held)} of 200 pictures held out by content, seed 0")
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


def test_coco_of_2014_alone_is_found(tmp_path: Path) -> None:
    annotate(tmp_path / "coco" / "annotations" / "instances_val2014.json", identity=11)
    place(tmp_path / "coco" / "val2014" / "a.jpg")
    data = open_dataset("coco:val2014", split="val", root=tmp_path)
    assert (ids(data), data.name) == ([11], "coco/val2014")
    with pytest.raises(DataError, match="has no val part, only val2014"):
        open_dataset("coco", split="val", root=tmp_path)


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotate(tmp_path / "val.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        open_dataset("", split="val")
