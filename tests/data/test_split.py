from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.source import find_splits, open_dataset
from refinedet_cli.data.split import Divided, deal, read_shares, split
from refinedet_cli.errors import DataError, UsageError

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def build(folder: Path, names: Sequence[str], colours: Sequence[int] | None = None, *, file: str = "all.json") -> Path:
    """Pictures that differ in colour, the class of whose one object follows the colour: 8 of 10 are cats."""
    colours = range(len(names)) if colours is None else colours
    images, annotations = [], []
    for i, (name, colour) in enumerate(zip(names, colours, strict=True), start=1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (colour % 256, colour // 256, 7)).save(path)
        images.append({"id": i, "file_name": name, "width": 8, "height": 8, "camera": name})
        box = {"id": i, "image_id": i, "category_id": 1 + (colour % 5 == 0), "bbox": [1, 1, 4, 4], "note": name}
        annotations.append(box)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    source = folder / file
    source.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return source


def sides(divided: Divided) -> dict[str, str]:
    """The part of each picture, by its name."""
    return {record.path.name: str(part.name) for part in divided.parts for record in part.dataset.records}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "data", [f"pictures/{i:02}.png" for i in range(50)])


@pytest.mark.parametrize("transfer", ["copy", "link", "stay"])
def test_parts_are_read_and_balanced(source: Path, tmp_path: Path, transfer) -> None:
    out = tmp_path / "new"
    divided = split(str(source), SHARES, out, transfer=transfer)
    assert [(part.name, len(part.dataset)) for part in divided.parts] == [("train", 30), ("val", 10), ("test", 10)]
    assert divided.counts == ((24, 6), (8, 2), (8, 2))
    assert divided.totals == (40, 10)
    assert find_splits(str(out)) == ("train", "val", "test")
    for part in divided.parts:
        back = open_dataset(str(out), split=part.name)
        assert back.fingerprint == part.dataset.fingerprint
        assert all(record.path.is_file() for record in back.records)
    document = json.loads((out / "val.json").read_text())
    assert all(image["camera"] == image["file_name"] for image in document["images"])
    assert len({entry["note"] for entry in document["annotations"]}) == 10
    assert (out / "images").is_symlink() == (transfer == "stay")


def test_names_and_order_do_not_matter_but_the_seed_does(source: Path, tmp_path: Path) -> None:
    first = sides(split(str(source), SHARES, tmp_path / "first"))
    assert sides(split(str(source), SHARES, tmp_path / "again")) == first
    shuffled = np.random.default_rng(0).permutation(50).tolist()
    other = build(tmp_path / "other", [f"x{i:02}.png" for i in shuffled], shuffled)
    assert {name[1:]: side for name, side in sides(split(str(other), SHARES, tmp_path / "b")).items()} == first
    assert sides(split(str(source), SHARES, tmp_path / "c", seed=1)) != first


def test_copies_stay_together(tmp_path: Path) -> None:
    names = [f"{i:02}.png" for i in range(30)]
    source = build(tmp_path / "data", names, [i % 10 for i in range(30)])
    divided = split(str(source), SHARES, tmp_path / "new")
    assert (divided.units, divided.copies) == (10, 20)
    found = sides(divided)
    assert all(found[f"{i:02}.png"] == found[f"{i + 10:02}.png"] == found[f"{i + 20:02}.png"] for i in range(10))


@pytest.mark.parametrize("group", ["folder", r"^(.*)/\d+\.png$", r"clip\d/"])
def test_groups_stay_together(tmp_path: Path, group: str) -> None:
    names = [f"clip{i % 10}/{i:02}.png" for i in range(40)]
    source = build(tmp_path / "data", names)
    divided = split(str(source), SHARES, tmp_path / "new", group=group)
    assert divided.units == 10
    found = sides(divided)
    for clip in range(10):
        assert len({found[f"{i:02}.png"] for i in range(clip, 40, 10)}) == 1
    assert [len(part.dataset) for part in divided.parts] == [24, 8, 8]


def test_a_copy_joins_two_groups(tmp_path: Path) -> None:
    names = ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "c/5.png", "d/6.png", "e/7.png"]
    source = build(tmp_path / "data", names, [1, 2, 2, 4, 5, 6, 7])
    divided = split(str(source), {"train": 0.5, "val": 0.5}, tmp_path / "new", group="folder")
    assert divided.units == 4
    assert len({sides(divided)[f"{i}.png"] for i in (1, 2, 3, 4)}) == 1


def test_pictures_outside_of_the_pattern_stand_alone(tmp_path: Path) -> None:
    source = build(tmp_path / "data", ["clip_1.png", "clip_2.png", *(f"x{i}.png" for i in range(8))])
    divided = split(str(source), SHARES, tmp_path / "new", group="clip")
    assert (divided.units, divided.alone) == (9, 8)


@pytest.mark.parametrize("group", ["(", "video"])
def test_a_wrong_pattern_is_refused(source: Path, tmp_path: Path, group: str) -> None:
    with pytest.raises(UsageError, match="--group"):
        split(str(source), SHARES, tmp_path / "new", group=group)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("transfer", ["copy", "stay"])
def test_parts_are_joined_and_divided_anew(tmp_path: Path, transfer) -> None:
    """Both folders have a picture called 0.png, as Roboflow writes them."""
    folder = tmp_path / "data"
    build(folder / "train", [f"{i}.png" for i in range(8)], file="_annotations.coco.json")
    build(folder / "valid", [f"{i}.png" for i in range(8)], range(100, 108), file="_annotations.coco.json")
    divided = split(str(folder), {"train": 0.5, "val": 0.5}, tmp_path / "new", transfer=transfer)
    assert [len(part.dataset) for part in divided.parts] == [8, 8]
    contents = set()
    for part in ("train", "val"):
        document = json.loads((tmp_path / "new" / f"{part}.json").read_text())
        notes = {entry["image_id"]: entry["note"] for entry in document["annotations"]}
        for image in document["images"]:
            assert notes[image["id"]] == image["camera"]
            assert image["file_name"].endswith(image["camera"])
        contents |= {r.path.read_bytes() for r in open_dataset(str(tmp_path / "new"), split=part).records}
    assert len(contents) == 16


def test_the_source_is_left_alone(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(source.parent, kept)
    split(str(source), SHARES, tmp_path / "new")
    for path in kept.rglob("*.*"):
        assert (source.parent / path.relative_to(kept)).read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="belongs to the data set"):
        split(str(source), SHARES, source.parent / "pictures" / "new")


def test_too_few_pictures(tmp_path: Path) -> None:
    source = build(tmp_path / "data", ["a.png", "b.png", "c.png"], [1, 1, 2])
    with pytest.raises(DataError, match="2 pictures or groups that differ cannot be divided into 3 parts"):
        split(str(source), SHARES, tmp_path / "new")


def test_shares_are_read() -> None:
    assert list(read_shares("val=0.25, train=0.75").items()) == [("val", 0.25), ("train", 0.75)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train=0.8", "add up to 0.8"),
        ("train=0.8,val=0.8", "add up to 1.6"),
        ("train=0.5,dev=0.5", "'dev=0.5'"),
        ("train=0.5,train=0.5", "'train=0.5'"),
        ("train=1,val=0", "'train=1'"),
        ("train=x,val=0.5", "'train=x'"),
        ("train=nan,val=0.5", "'train=nan'"),
        ("", "''"),
    ],
)
def test_shares_that_are_wrong(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_shares(text)
    assert told in caught.value.message


def test_dealing_by_hand() -> None:
    """Two dogs go first, to the part that lacks most (1.2 and 0.8, then 0.2 and 0.8), then the cats by what is left."""
    counts = np.array([[1, 0], [2, 0], [0, 1], [1, 1], [0, 0]])
    part = deal(counts, np.ones(5, dtype=np.int64), [50, 40, 30, 20, 10], [0.6, 0.4])
    # Dogs: unit 3 (draw 20) to 0, unit 2 to 1. Cats, 2.4 - 1 and 1.6: unit 1 to 1, unit 0 to 0. Pictures: 1 and 0.
    assert part.tolist() == [0, 1, 1, 0, 0]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_dealing_in_general(data: st.DataObject) -> None:
    count, classes = data.draw(st.integers(3, 30)), data.draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 3), min_size=classes, max_size=classes)
    counts = np.array(data.draw(st.lists(rows, min_size=count, max_size=count)))
    sizes = np.array(data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    draws = data.draw(st.permutations(range(count)))
    shares = data.draw(st.sampled_from([[0.5, 0.5], [0.8, 0.1, 0.1], [0.98, 0.01, 0.01]]))
    part = deal(counts, sizes, draws, shares)
    assert set(part.tolist()) == set(range(len(shares)))
    order = data.draw(st.permutations(range(count)))
    again = deal(counts[order], sizes[order], [draws[i] for i in order], shares)
    np.testing.assert_array_equal(again, part[order])
