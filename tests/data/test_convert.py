from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.convert import Converted, convert
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.images import image_size
from refinedet_cli.data.source import find_splits, open_dataset
from refinedet_cli.errors import DataError, UsageError
from refinedet_cli.metrics.coco import CocoResult, PictureDetections, PictureTruth, evaluate_coco

FORMATS = ("coco", "voc", "yolo")


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, colour // 256 % 256, 9)).save(path)
    return path


def write(path: Path, pictures: dict[str, list[dict[str, Any]]], names: Sequence[str] = ("cat", "dog")) -> Path:
    """A COCO JSON of 40 x 30 pictures; objects have category_id and bbox, or more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": 10 + i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(pictures)]
    boxes = [(10 + i, thing) for i, things in enumerate(pictures.values()) for thing in things]
    document = {
        "images": images,
        "annotations": [{"id": 5 + k, "image_id": i, **thing} for k, (i, thing) in enumerate(boxes)],
        "categories": [{"id": 3 + i, "name": name} for i, name in enumerate(names)],
    }
    path.write_text(json.dumps(document))
    return path


def thing(box: Sequence[float] = (1, 2, 10, 20), category: int = 3, **more: Any) -> dict[str, Any]:
    return {"category_id": category, "bbox": list(box), **more}


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """Two parts with fractions of pixels, an empty picture and a class that is not used."""
    folder = tmp_path / "signs"
    for number, name in enumerate(("a b.png", "sub/ü.png", "c.png")):
        picture(folder / "images" / name, colour=number)
    write(
        folder / "train.json",
        {"images/a b.png": [thing(), thing((0.1, 0.2, 3.3, 7.77), 4)], "images/sub/ü.png": []},
        ("cat", "dog", "gnu"),
    )
    write(folder / "val.json", {"images/c.png": [thing((0, 0, 40, 30), 4)]}, ("cat", "dog", "gnu"))
    return folder


def tree(folder: Path) -> dict[str, str]:
    """The content of every file and link below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = str(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def by_stem(dataset: Dataset) -> dict[str, Record]:
    return {record.path.stem: record for record in dataset.records}


def assert_equal(one: Dataset, other: Dataset, *, places: float = 1e-6) -> None:
    """Pictures by name, objects in order."""
    assert one.classes.names == other.classes.names
    a, b = by_stem(one), by_stem(other)
    assert a.keys() == b.keys()
    for stem, record in a.items():
        back = b[stem]
        assert (record.width, record.height) == (back.width, back.height)
        np.testing.assert_array_equal(record.labels, back.labels)
        np.testing.assert_allclose(record.boxes, back.boxes, rtol=0, atol=places)
        assert record.path.read_bytes() == back.path.read_bytes()


def lost(converted: Converted) -> dict[str, int]:
    return {loss.what: loss.number for loss in converted.losses}


@pytest.mark.parametrize("transfer", ["copy", "link", "stay"])
@pytest.mark.parametrize("to", FORMATS)
def test_what_is_written_reads_like_the_source(signs: Path, tmp_path: Path, to, transfer) -> None:
    if (to, transfer) == ("voc", "stay"):
        (signs / "images" / "sub" / "ü.png").rename(signs / "images" / "ü.png")
        file = signs / "train.json"
        file.write_text(file.read_text().replace("images/sub/", "images/"))
    before = tree(signs)
    out = tmp_path / "new" / to
    steps: list[tuple[int, int]] = []
    converted = convert(str(signs), to, out, transfer=transfer, show=lambda *step: steps.append(step))
    assert tree(signs) == before
    assert find_splits(str(out)) == ("train", "val")
    for split in ("train", "val"):
        assert_equal(open_dataset(str(signs), split=split), open_dataset(str(out), split=split))
    assert converted.format == to
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert (converted.pictures.copied, converted.pictures.linked) == {
        "copy": (3, 0),
        "link": (0, 3),
        "stay": (0, 0),
    }[transfer]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [to]


@pytest.mark.parametrize("to", FORMATS)
def test_a_converted_set_may_be_moved(signs: Path, tmp_path: Path, to) -> None:
    convert(str(signs), to, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "moved")
    signs.rename(tmp_path / "gone")
    assert_equal(
        open_dataset(str(tmp_path / "gone"), split="train"), open_dataset(str(tmp_path / "moved"), split="train")
    )


def test_coco_keeps_everything(signs: Path, tmp_path: Path) -> None:
    file = signs / "train.json"
    document = json.loads(file.read_text())
    document["info"] = {"year": 2026}
    document["images"][0]["camera"] = "left"
    document["annotations"][1] |= {"segmentation": [[0.1, 0.2, 3, 4, 5, 6]], "iscrowd": 1, "area": 7.5, "score": 0.25}
    document["annotations"][0] |= {"difficult": 1}
    document["categories"][2]["supercategory"] = "animal"
    file.write_text(json.dumps(document))
    converted = convert(str(signs), "coco", tmp_path / "new")
    assert converted.losses == ()
    for split in ("train", "val"):
        old, new = (open_dataset(str(folder), split=split) for folder in (signs, tmp_path / "new"))
        assert old.fingerprint == new.fingerprint
        assert [r.image_id for r in old.records] == [r.image_id for r in new.records]
        for one, other in zip(old.records, new.records, strict=True):
            np.testing.assert_array_equal(one.areas, other.areas)
            np.testing.assert_array_equal(one.annotation_ids, other.annotation_ids)
    again = json.loads((tmp_path / "new" / "train.json").read_text())
    assert again["info"] == {"year": 2026}
    assert again["images"][0]["camera"] == "left"
    assert again["annotations"][1]["segmentation"] == [[0.1, 0.2, 3, 4, 5, 6]]
    assert again["annotations"][1]["bbox"] == [0.1, 0.2, 3.3, 7.77]
    assert again["categories"][2]["supercategory"] == "animal"


def test_losses_are_named_and_counted(signs: Path, tmp_path: Path) -> None:
    write(
        signs / "train.json",
        {
            "images/a b.png": [thing(iscrowd=1), thing((0, 0, 4, 4), 4, difficult=1), thing(segmentation=[[1, 2, 3]])],
            "images/sub/ü.png": [thing((5, 5, 4, 4), area=3.5)],
        },
        ("cat", "dog", "gnu"),
    )
    voc = convert(str(signs), "voc", tmp_path / "voc")
    assert lost(voc) == {
        "picture ids": 3,
        "object ids": 5,
        "class ids": 3,
        "folders": 2,
        "fields of objects: segmentation": 1,
    }
    back = by_stem(open_dataset(str(tmp_path / "voc"), split="train"))
    assert back["a b"].crowd.tolist() == [True, False, False]
    assert back["a b"].difficult.tolist() == [False, True, False]
    assert back["ü"].areas.tolist() == [3.5]
    yolo = convert(str(signs), "yolo", tmp_path / "yolo")
    assert lost(yolo) == {
        "picture ids": 3,
        "object ids": 4,
        "class ids": 3,
        "crowd boxes": 1,
        "difficult flags": 1,
        "areas": 1,
        "fields of objects: segmentation": 1,
    }
    assert len(by_stem(open_dataset(str(tmp_path / "yolo"), split="train"))["a b"]) == 2


def test_fields_of_voc_that_are_not_read_are_counted(signs: Path, tmp_path: Path) -> None:
    convert(str(signs), "voc", tmp_path / "voc")
    file = tmp_path / "voc" / "Annotations" / "a b.xml"
    file.write_text(file.read_text().replace("<pose>Unspecified", "<pose>Left", 1))
    assert lost(convert(str(tmp_path / "voc"), "coco", tmp_path / "coco")) == {}
    assert lost(convert(str(tmp_path / "voc"), "yolo", tmp_path / "yolo"))["fields of objects: pose"] == 1


def test_other_parts_of_voc_are_named(signs: Path, tmp_path: Path) -> None:
    convert(str(signs), "voc", tmp_path / "voc")
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text("a b\nc\n")
    converted = convert(str(tmp_path / "voc"), "coco", tmp_path / "coco")
    assert [part.name for part in converted.parts] == ["train", "val"]
    assert any("trainval" in note for note in converted.notes)
    one = convert(f"{tmp_path / 'voc'}:trainval", "coco", tmp_path / "one")
    assert [part.name for part in one.parts] == [None]
    assert len(open_dataset(str(tmp_path / "one"), split="val")) == 2
    for name in ("train", "val"):
        (lists / f"{name}.txt").unlink()
    with pytest.raises(DataError, match="only trainval"):
        convert(str(tmp_path / "voc"), "coco", tmp_path / "none")


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_not_divided_stays_so(signs: Path, tmp_path: Path, to) -> None:
    source = signs / "train.json"
    converted = convert(str(source), to, tmp_path / "new")
    assert [part.name for part in converted.parts] == [None]
    # YOLO's file has to name a part.
    assert find_splits(str(tmp_path / "new")) == (("train",) if to == "yolo" else ())
    assert_equal(open_dataset(str(source), split="train"), open_dataset(str(tmp_path / "new"), split="train"))


@pytest.mark.parametrize("to", FORMATS)
def test_one_part_alone(signs: Path, tmp_path: Path, to) -> None:
    convert(f"{signs}:val", to, tmp_path / "new")
    assert find_splits(str(tmp_path / "new")) == ("val",)


def test_parts_with_different_classes_share_one_list(signs: Path, tmp_path: Path) -> None:
    write(signs / "val.json", {"images/c.png": [thing(category=3), thing(category=4)]}, ("emu", "dog"))
    voc = convert(str(signs), "voc", tmp_path / "voc")
    assert voc.classes.names == ("cat", "dog", "gnu", "emu")
    assert lost(voc)["lists of classes"] == 2
    assert by_stem(open_dataset(str(tmp_path / "voc"), split="val"))["c"].labels.tolist() == [4, 2]
    coco = convert(str(signs), "coco", tmp_path / "coco")
    assert coco.losses == ()
    assert open_dataset(str(tmp_path / "coco"), split="val").classes.names == ("emu", "dog")


def test_names_of_classes_that_need_care(tmp_path: Path) -> None:
    names = (" cat ", "two\nlines", "no", "<a & b>", "#1", "null", "0: x", "日本", "'")
    picture(tmp_path / "data" / "a.png")
    source = write(tmp_path / "data" / "all.json", {"a.png": [thing(category=3 + i) for i in range(9)]}, names)
    for to in ("voc", "yolo"):
        converted = convert(str(source), to, tmp_path / to)
        back = open_dataset(str(tmp_path / to), split="train")
        assert back.classes.names == ("cat", "two lines", *names[2:])
        assert lost(converted)["names of classes"] == 2
    convert(str(source), "coco", tmp_path / "coco")
    assert open_dataset(str(tmp_path / "coco"), split="train").classes.names == names


@pytest.mark.parametrize(("names", "told"), [(("cat", " cat"), "same name"), (("cat", "a\x01b"), "cannot be written")])
def test_names_of_classes_that_cannot_be_written(tmp_path: Path, names, told: str) -> None:
    picture(tmp_path / "data" / "a.png")
    source = write(tmp_path / "data" / "all.json", {"a.png": [thing()]}, names)
    with pytest.raises(DataError, match=told):
        convert(str(source), "voc", tmp_path / "voc")
    assert not (tmp_path / "voc").exists()


def test_an_occupied_folder_is_refused(signs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    out.mkdir()
    convert(str(signs), "coco", out)
    before = tree(out)
    with pytest.raises(UsageError, match="not empty"):
        convert(str(signs), "yolo", out)
    assert tree(out) == before


@pytest.mark.parametrize("inside", ["yolo", "images/yolo", "images/sub", "."])
def test_the_source_is_not_written_into(signs: Path, inside: str) -> None:
    before = tree(signs)
    with pytest.raises(UsageError, match="belongs to the data set"):
        convert(str(signs), "yolo", signs / inside)
    assert tree(signs) == before


@pytest.mark.parametrize("transfer", ["copy", "link", "stay"])
def test_a_missing_picture_leaves_nothing_behind(signs: Path, tmp_path: Path, transfer) -> None:
    (signs / "images" / "c.png").unlink()
    with pytest.raises(DataError, match=r"c\.png does not exist"):
        convert(str(signs), "yolo", tmp_path / "new", transfer=transfer)
    assert [path.name for path in tmp_path.iterdir()] == ["signs"]


def test_annotations_of_another_size_are_refused_where_boxes_are_fractions(signs: Path, tmp_path: Path) -> None:
    picture(signs / "images" / "c.png", (30, 40))
    with pytest.raises(DataError, match=r"c\.png is 30 x 40, not 40 x 30"):
        convert(str(signs), "yolo", tmp_path / "yolo")


@pytest.mark.parametrize("to", FORMATS)
def test_turned_pictures_keep_pixels_and_boxes(tmp_path: Path, to) -> None:
    """Stored 40 x 30, seen 30 x 40; boxes belong to what is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "data" / "images" / "a.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(path, exif=exif)
    source = tmp_path / "data" / "all.json"
    document = json.loads(write(source, {"images/a.jpg": [thing((20, 30, 10, 10))]}).read_text())
    document["images"][0] |= {"width": 30, "height": 40}
    source.write_text(json.dumps(document))
    convert(str(source), to, tmp_path / "new")
    back = open_dataset(str(tmp_path / "new"), split="train")
    (record,) = back.records
    np.testing.assert_allclose(record.boxes, [[20, 30, 30, 40]], atol=1e-9)
    assert (record.width, record.height) == image_size(record.path) == (30, 40)
    assert record.path.read_bytes() == path.read_bytes()


def test_hostile_names_lead_nowhere(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret.png")
    folder = tmp_path / "data"
    picture(folder / "a.png")
    for name in ("../secret.png", str(secret), "..\\secret.png", "sub/../../secret.png"):
        source = write(folder / "all.json", {name: [thing()]})
        with pytest.raises(DataError, match="leads out"):
            convert(str(source), "coco", tmp_path / "new")
    (folder / "link.png").symlink_to(secret)
    source = write(folder / "all.json", {"a.png": [], "link.png": [thing()]})
    for to in FORMATS:
        with pytest.raises(DataError, match="link out of"):
            convert(str(source), to, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "secret.png"]


@settings(max_examples=12, deadline=None)
@given(
    boxes=st.lists(
        st.lists(
            st.tuples(st.integers(1, 3), st.floats(0, 30), st.floats(0, 20), st.floats(0.02, 64), st.floats(0.02, 64)),
            max_size=4,
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**16),
)
def test_there_and_back_scores_the_same(boxes: list[list[tuple[int, float, float, float, float]]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = {f"p{i}.png": [thing(box, 2 + c) for c, *box in own] for i, own in enumerate(boxes)}
        for number, leaf in enumerate(pictures):
            picture(folder / "data" / leaf, colour=number)
        source = write(folder / "data" / "all.json", pictures, ("a", "b", "c"))
        first = open_dataset(str(source), split="train")
        for to in ("voc", "yolo"):
            convert(str(source), to, folder / to)
            convert(str(folder / to), "coco", folder / f"{to}-coco")
            back = open_dataset(str(folder / f"{to}-coco"), split="train")
            assert_equal(first, back)
            assert_same_scores(score(first, seed), score(back, seed))


def assert_same_scores(one: CocoResult, other: CocoResult) -> None:
    assert one.AP == other.AP
    np.testing.assert_array_equal(one.precision, other.precision)
    np.testing.assert_array_equal(one.recall, other.recall)


def score(dataset: Dataset, seed: int) -> CocoResult:
    """Score the same made-up detections: near objects and anywhere, whatever order the pictures have."""
    draw = np.random.default_rng(seed)
    truths, found = [], []
    for number, (_, record) in enumerate(sorted(by_stem(dataset).items()), start=1):
        truths.append(PictureTruth(number, record.boxes, record.labels, record.areas, record.crowd))
        count = len(record) + 2
        low = draw.uniform(0, 20, (2, 2))
        # Rounded, so that the detections are equal although boxes came back a billionth of a pixel off.
        boxes = np.concatenate([np.round(record.boxes, 2), np.concatenate([low, low + 9], axis=1)])
        boxes[:, 2:] += draw.uniform(0, 6, (count, 2)).round(2)
        labels = np.concatenate([record.labels, [1, 2]])
        found.append(PictureDetections(number, boxes, draw.uniform(0.1, 1, count), labels))
    return evaluate_coco(truths, found, len(dataset.classes))


def test_the_comparison_of_scores_can_fail(signs: Path, tmp_path: Path) -> None:
    data = open_dataset(str(signs), split="train")
    with pytest.raises(AssertionError):
        assert_same_scores(score(data, 0), score(data, 1))


def test_a_difference_would_be_noticed(signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinedet_cli.data.write_yolo._DECIMALS", 3)
    with pytest.raises(RuntimeError, match="reads differently"):
        convert(str(signs), "yolo", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_link_that_cannot_be_made_is_a_copy(signs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(os.strerror(18))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert convert(str(signs), "coco", tmp_path / "new", transfer="link").pictures == (3, 0)


@pytest.mark.parametrize("to", FORMATS)
def test_what_the_reader_dropped_and_clipped_is_lost(signs: Path, tmp_path: Path, to) -> None:
    boxes = [thing(), thing((5, 5, 0, 4)), thing((90, 5, 4, 4)), thing((30, 20, 20, 20))]
    write(signs / "train.json", {"images/a b.png": boxes}, ("cat", "dog", "gnu"))
    told = lost(convert(str(signs), to, tmp_path / "new"))
    assert (told["boxes dropped"], told["boxes clipped"]) == (2, 1)


def test_outlines_that_became_boxes_are_lost(tmp_path: Path) -> None:
    picture(tmp_path / "old" / "images" / "a.png")
    (tmp_path / "old" / "labels").mkdir()
    (tmp_path / "old" / "labels" / "a.txt").write_text("0 0.1 0.2 0.5 0.2 0.5 0.8\n0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "old" / "data.yaml").write_text("names: [cat]\ntrain: images\n")
    assert lost(convert(str(tmp_path / "old"), "coco", tmp_path / "new"))["outlines"] == 1
