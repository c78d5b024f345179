"""The rebuilding of mix20: the list of ids, and the rules on miniature archives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.data.coco import read_coco

IDS = {
    "mix20-train": {
        "voc2012": ["2007_000001"],
        "coco_train2017": [9],
        "coco_val2017": [],
        "coco_val2017_short": [139],
    },
    "mix20-dev": {"voc2012": [], "coco_train2017": [], "coco_val2017": [25], "coco_val2017_short": []},
    "mix20-val": {"voc2012": ["2008_000002"], "coco_train2017": [], "coco_val2017": [], "coco_val2017_short": [42]},
}
# A COCO picture's size and its boxes: category, bbox, iscrowd. VOC knows no zebra.
CATEGORIES = [{"id": 3, "name": "car"}, {"id": 7, "name": "tv"}, {"id": 5, "name": "zebra"}]
TRAIN = {9: ((640, 480), [(3, [10.5, 20, 100, 60], 0), (5, [0, 0, 9, 9], 0), (7, [1, 2, 300, 40], 1)])}
VAL = {
    25: ((300, 200), [(3, [4, 5, 60, 70], 0)]),
    42: ((400, 330), [(3, [0, 0, 400, 330], 0)]),
    139: ((640, 400), [(7, [600, 300, 40, 100], 0), (3, [5, 5, 1, 30], 0)]),
    777: ((320, 320), [(3, [1, 1, 5, 5], 0)]),
}


@pytest.fixture(scope="module")
def mix20(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/mix20.py")


def draw(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 30, 90)).save(path)


def voc_picture(root: Path, name: str, size: tuple[int, int], objects: list[tuple[str, tuple[int, ...], int]]) -> None:
    draw(root / "JPEGImages" / f"{name}.jpg", size)
    entries = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin>"
        f"<ymax>{y1}</ymax><ymin>{y0}</ymin></bndbox><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
        f"<xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
        for label, (x0, y0, x1, y1), difficult in objects
    )
    path = root / "Annotations" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{entries}</annotation>"
    )


def coco_part(root: Path, year: str, pictures: dict[int, tuple[tuple[int, int], list[Any]]]) -> None:
    images, annotations = [], []
    for key, (size, objects) in pictures.items():
        name = f"{key:012d}.jpg"
        draw(root / year / name, size)
        images.append({"id": key, "file_name": name, "width": size[0], "height": size[1], "license": 4})
        annotations += [
            {"id": len(annotations) + n, "image_id": key, "category_id": c, "bbox": b, "iscrowd": crowd, "area": 1}
            for n, (c, b, crowd) in enumerate(objects)
        ]
    path = root / "annotations" / f"instances_{year}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))


@pytest.fixture
def archives(tmp_path: Path, mix20: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for miniature archives, with a list of ids that fits them."""
    voc, coco = tmp_path / "VOC2012", tmp_path / "coco"
    voc_picture(voc, "2007_000001", (500, 400), [("sofa", (1, 1, 500, 400), 0), ("tvmonitor", (101, 51, 200, 150), 1)])
    voc_picture(voc, "2008_000002", (300, 500), [("person", (31, 41, 60, 90), 0)])
    coco_part(coco, "train2017", TRAIN)
    coco_part(coco, "val2017", VAL)
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(IDS))
    monkeypatch.setattr(mix20, "IDS", ids)
    return ["--voc", str(voc), "--coco", str(coco), "--out", str(tmp_path / "out")]


def boxes(document: dict[str, Any], image_id: int) -> list[tuple[int, list[float], int, int]]:
    return [
        (a["category_id"], a["bbox"], a["iscrowd"], a["difficult"])
        for a in document["annotations"]
        if a["image_id"] == image_id
    ]


def test_miniature_archives(mix20: ModuleType, archives: list[str], tmp_path: Path) -> None:
    assert mix20.main(archives) == 0
    out = tmp_path / "out"
    train, dev, val = (json.loads((out / f"mix20-{s}.json").read_text()) for s in ("train", "dev", "val"))
    # Train and dev are numbered together, VOC first, then COCO by id: 9, 25 (dev), 139.
    assert [(i["id"], i["file_name"], i["width"], i["height"]) for i in train["images"]] == [
        (1, "voc/images/voc2012_2007_000001.webp", 400, 320),
        (2, "coco/images/000000000009.webp", 427, 320),
        (4, "coco/images/000000000139.webp", 512, 320),
    ]
    assert [(i["id"], i["width"], i["height"]) for i in dev["images"]] == [(3, 300, 200)]
    assert [(i["id"], i["width"], i["height"]) for i in val["images"]] == [(1, 300, 500), (2, 388, 320)]
    # VOC: 1-based and inclusive; parts of objects are not objects.
    assert boxes(train, 1) == [(18, [0.0, 0.0, 400.0, 320.0], 0, 0), (20, [80.0, 40.0, 80.0, 80.0], 0, 1)]
    assert boxes(val, 1) == [(15, [30.0, 40.0, 30.0, 50.0], 0, 0)]
    # COCO: no zebra; the sides scale by their own rounded factors, 427 / 640 and 320 / 480.
    assert boxes(train, 2) == [(7, [7.01, 13.33, 66.72, 40.0], 0, 0), (20, [0.67, 1.33, 200.16, 26.67], 1, 0)]
    assert boxes(dev, 3) == [(7, [4, 5, 60, 70], 0, 0)]
    # One pixel short, which leaves nothing of a box of one pixel.
    assert boxes(train, 4) == [(20, [480.0, 240.0, 31.2, 79.2], 0, 0)]
    assert boxes(val, 2) == [(7, [0.0, 0.0, 387.03, 319.03], 0, 0)]
    assert [a["ignore"] for a in train["annotations"]] == [0, 1, 0, 1, 0]
    both = [a["id"] for a in train["annotations"] + dev["annotations"]]
    assert len(set(both)) == len(both)
    for image in (i for document in (train, dev, val) for i in document["images"]):
        with Image.open(out / image["file_name"]) as picture:
            assert picture.format == "WEBP"
            assert picture.size == (image["width"], image["height"])
            assert np.abs(np.asarray(picture).mean(axis=(0, 1)) - (200, 30, 90)).max() < 6


def test_the_result_is_data_for_the_commands(mix20: ModuleType, archives: list[str], tmp_path: Path) -> None:
    assert mix20.main(archives) == 0
    dataset = read_coco(tmp_path / "out" / "mix20-train.json")
    assert (len(dataset), dataset.objects, len(dataset.classes)) == (3, 5, 20)
    # The one note is that so small a set lacks classes: no box is dropped or clipped.
    assert [note.split(":")[0] for note in dataset.notes] == ["17 of 20 classes without object"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("VOC2012/JPEGImages", "--voc .* has no folder JPEGImages"),
        ("VOC2012/Annotations/2007_000001.xml", "2007_000001.xml is missing"),
        ("VOC2012/JPEGImages/2008_000002.jpg", "1 of 6 pictures are missing .*2008_000002.jpg"),
        ("coco/val2017", "--coco .* has no folder val2017"),
        ("coco/annotations/instances_train2017.json", "instances_train2017.json is missing"),
        ("coco/train2017/000000000009.jpg", "1 of 6 pictures are missing .*000000000009.jpg"),
    ],
)
def test_what_is_missing_is_named(
    mix20: ModuleType,
    archives: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    message: str,
) -> None:
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    assert mix20.main(archives) == 4
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    with pytest.raises(mix20.DataError, match=message):
        mix20.rebuild(*(Path(value) for value in archives[1::2]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("VOC2012/Annotations/2007_000001.xml", "<annotation>", "cannot be read as a VOC annotation"),
        ("VOC2012/Annotations/2007_000001.xml", "<annotation/>", "no size/width"),
        ("coco/annotations/instances_val2017.json", "{", "cannot be read as JSON"),
        ("coco/annotations/instances_val2017.json", "[]", "is not a COCO annotation file"),
        ("coco/val2017/000000000025.jpg", "JPEG", "000000000025.jpg cannot be read"),
    ],
)
def test_what_is_damaged_is_named(
    mix20: ModuleType, archives: list[str], tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(mix20.DataError, match=message):
        mix20.rebuild(*(Path(value) for value in archives[1::2]))
    assert not (tmp_path / "out" / "mix20-train.json").exists()


def test_pictures_of_another_size_are_refused(mix20: ModuleType, archives: list[str], tmp_path: Path) -> None:
    draw(tmp_path / "coco/val2017/000000000025.jpg", (150, 100))
    with pytest.raises(mix20.DataError, match="is 150 x 100, but its annotation says 300 x 200"):
        mix20.rebuild(*(Path(value) for value in archives[1::2]))


def test_a_picture_unknown_to_coco_is_refused(mix20: ModuleType, archives: list[str], tmp_path: Path) -> None:
    coco_part(tmp_path / "coco", "train2017", {})
    with pytest.raises(mix20.DataError, match=r"does not know 1 of 1 pictures \(first: 9\)"):
        mix20.rebuild(*(Path(value) for value in archives[1::2]))


def test_sizes_and_disjointness_of_the_splits(mix20: ModuleType) -> None:
    splits = mix20.read_ids(mix20.IDS)
    assert {name: sum(map(len, split)) for name, split in splits.items()} == {
        "mix20-train": 4736,
        "mix20-dev": 558,
        "mix20-val": 1434,
    }
    keys = [key for split in splits.values() for key in split.keys]
    assert len(keys) == len(set(keys)) == 4736 + 558 + 1434


def shared(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["mix20-train", "mix20-dev", "mix20-val"])
def test_ids_are_those_of_the_set(mix20: ModuleType, shared_data: Path, name: str) -> None:
    split = mix20.read_ids(mix20.IDS)[name]
    names = {f"voc/images/voc2012_{i}.webp" for i in split.voc2012}
    names |= {f"coco/images/{i:012d}.webp" for part in split[1:] for i in part}
    images = shared(shared_data, name)["images"]
    assert names == {i["file_name"] for i in images}
    official = {i["coco_id"]: i["official_split"] for i in images if "coco_id" in i}
    assert {official[i] for i in split.coco_val2017 + split.coco_val2017_short} == {"val2017"}
    assert {official[i] for i in split.coco_train2017} <= {"train2017"}


def test_boxes_are_those_of_the_set(mix20: ModuleType, shared_data: Path) -> None:
    """Undo the scaling and VOC's and the short boxes' conventions, then let the script do them again."""
    splits = mix20.read_ids(mix20.IDS)
    short = {i for split in splits.values() for i in split.coco_val2017_short}
    stored = {name: shared(shared_data, name) for name in splits}
    pictures = []
    for document in stored.values():
        objects: dict[int, list[Any]] = {i["id"]: [] for i in document["images"]}
        for a in document["annotations"]:
            objects[a["image_id"]].append(a)
        for image in document["images"]:
            across, down = image["width"] / image["orig_width"], image["height"] / image["orig_height"]
            key = image.get("coco_id") or Path(image["file_name"]).stem.removeprefix("voc2012_")
            found = []
            for a in objects[image["id"]]:
                x, y, w, h = (v / f for v, f in zip(a["bbox"], (across, down, across, down), strict=True))
                # Official VOC corners are whole numbers, COCO's have two decimals.
                digits = 2 if "coco_id" in image else 0
                edges = (round(v, digits) for v in (x, y, w, h))
                found.append(mix20.Box(*edges, a["category_id"], bool(a["iscrowd"]), bool(a["difficult"])))
            size = image["orig_width"], image["orig_height"]
            pictures.append(mix20.Picture(key, Path(), image["file_name"], *size, tuple(found)))
    assert short < {p.key for p in pictures}
    pictures.sort(key=lambda p: (isinstance(p.key, int), p.key))
    rebuilt = dict(mix20.documents(splits, pictures))
    for name, document in stored.items():
        assert rebuilt[name]["categories"] == document["categories"]
        for ours, theirs in zip(rebuilt[name]["images"], document["images"], strict=True):
            assert {k: theirs[k] for k in ours} == ours
        for ours, theirs in zip(rebuilt[name]["annotations"], document["annotations"], strict=True):
            for key in ("image_id", "category_id", "iscrowd", "difficult", "ignore"):
                assert ours[key] == theirs[key]
            np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=0.0101)
            # COCO's boxes were undone with an error of half a hundredth a side.
            sides = theirs["bbox"][2] + theirs["bbox"][3]
            assert abs(ours["area"] - theirs["area"]) <= 0.011 * sides + 0.01


def test_the_short_pictures_are_those_whose_boxes_stay_off_the_far_edges(mix20: ModuleType, shared_data: Path) -> None:
    """Official boxes reach the right or lower edge often, short ones never come closer than one original pixel."""
    splits = mix20.read_ids(mix20.IDS)
    short = {i for split in splits.values() for i in split.coco_val2017_short}
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for name in splits:
        document = shared(shared_data, name)
        images = {i["id"]: i for i in document["images"] if "coco_id" in i}
        for a in document["annotations"]:
            image = images.get(a["image_id"])
            if image is not None:
                x, y, w, h = a["bbox"]
                right = (image["width"] - x - w) * image["orig_width"] / image["width"]
                below = (image["height"] - y - h) * image["orig_height"] / image["height"]
                gaps[image["coco_id"] in short].append(min(right, below))
    assert min(gaps[True]) > 0.95
    assert np.mean(np.array(gaps[False]) < 0.05) > 0.05
