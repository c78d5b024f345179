"""What the data check says of anchors, what it tells a training, and what it draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.data.check import INVERTED, LEAK, NO_AREA, OUTSIDE, PICTURE_DAMAGED, SIZE_DIFFERS, Finding
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.anchors import gather, report_anchors
from refinedet_cli.engine.data_check import CheckOptions, check_data, check_training
from refinedet_cli.engine.data_check_pictures import draw_worst, make_sheet, write_worst
from refinedet_cli.errors import DataError

TINY = get_preset("tiny", Classes(names=("cat",), category_ids=(1,))).detector


def quiet(progress):
    pass


@pytest.fixture
def make(tmp_path):
    """Write a COCO data set of random pictures and boxes."""

    def write(name="set", pictures=4, boxes=30, side=64, **size):
        draw = np.random.default_rng(len(name))
        folder = tmp_path / name
        folder.mkdir()
        for i in range(pictures):
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        corner, sides = draw.uniform(0, 40, (boxes, 2)), np.exp(draw.uniform(0.5, 3.2, (boxes, 2)))
        document = {
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": side, "height": side, **size} for i in range(pictures)
            ],
            "annotations": [
                {
                    "id": k,
                    "image_id": k % pictures,
                    "category_id": 1,
                    "bbox": [*corner[k].tolist(), *sides[k].tolist()],
                    "iscrowd": int(k % 7 == 0),
                }
                for k in range(boxes)
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (folder / "set.json").write_text(json.dumps(document))
        return folder / "set.json"

    return write


def test_reach_is_that_of_the_anchors_command(make):
    path = make(boxes=400)
    found = check_data(CheckOptions(data=str(path), preset="tiny", threads=1), quiet)
    dataset = open_dataset(str(path), split="train")
    report = report_anchors(gather(dataset, (64, 64)), TINY)
    assert found.reach.objects == report.overall.objects
    assert 0 < found.reach.missed.total < found.reach.objects
    assert found.reach.missed == report.shortfall
    (tally,) = (t for t in found.tallies if t.kind.name == "box-out-of-reach")
    assert tally.count == report.shortfall.total


def test_findings_depend_neither_on_threads_nor_on_whether_all_are_kept(make):
    path = make(width=50)
    results = [
        check_data(CheckOptions(data=str(path), preset="tiny", threads=threads, keep=keep), quiet)
        for threads, keep in ((1, True), (3, True), (2, False))
    ]
    assert results[0].findings == results[1].findings
    assert results[0].tallies == results[1].tallies == results[2].tallies
    assert len(results[0].findings) == sum(tally.count for tally in results[0].tallies)
    assert results[2].findings == ()


def test_progress_counts_the_pictures(make):
    seen = []
    check_data(CheckOptions(data=str(make()), preset="tiny", threads=1), seen.append)
    assert [p.done for p in seen if p.total] == [1, 2, 3, 4]


# Before training -----------------------------------------------------------------------------------------------------


def test_a_training_is_told_what_anchors_miss_and_what_leaks(make):
    train, val = open_dataset(str(make("one", 3)), split="train"), open_dataset(str(make("three", 3)), split="val")
    (reach,) = check_training(train, None, TINY)
    assert reach.severity == "note"
    assert "cannot reach IoU 0.5 with an anchor of tiny at 64 x 64" in reach.text
    (Path(val.records[1].path)).write_bytes(train.records[2].path.read_bytes())
    leak, _ = check_training(train, val, TINY)
    assert leak.severity == "warning"
    assert leak.text.startswith("same picture in two parts: ")
    assert "(1.png is 2.png of train)" in leak.text


def test_a_training_on_bad_pictures_is_refused_with_all_that_is_wrong(make):
    data = open_dataset(str(make(width=99)), split="train")
    data.records[1].path.unlink()
    data.records[2].path.write_bytes(b"nonsense")
    with pytest.raises(DataError) as refused:
        check_training(data, None, TINY)
    for words in ("picture is missing", "picture cannot be read", "size is not the picture's: 2 times, first "):
        assert words in refused.value.message
    assert "refinedet data check" in refused.value.hint


# Drawn ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (100, 60), (200, 200, 200)).save(path)
    return path


def finding(kind, picture, box=None, where="annotations[1] (id 5)"):
    return Finding(kind, "a.json", where, "", "", picture, box)


def test_the_worst_of_each_kind_are_drawn_once(picture, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (60, 100)).save(other)
    findings = [
        finding(LEAK, other),
        finding(NO_AREA, picture, (20, 20, 20, 40)),
        finding(INVERTED, picture, (50, 50, 20, 20)),
        finding(INVERTED, other, (50, 50, 20, 20)),
        finding(INVERTED, picture, (70, 50, 40, 20)),
        finding(PICTURE_DAMAGED, tmp_path / "gone.png"),
        finding(SIZE_DIFFERS, None),
    ]
    drawn = list(draw_worst(findings))
    assert [d.name for d in drawn] == ["box-inverted-1", "box-inverted-2", "box-no-area-1", "picture-in-two-parts-1"]
    assert [d.place for d in drawn[:2]] == ["photo.png", "other.png"]
    assert drawn[0].title == "box with swapped corners: 2"
    assert all(max(d.image.size) == 640 for d in drawn)
    sheet = make_sheet(drawn)
    assert sheet.width > 4 * 300
    files = write_worst(tmp_path / "out", findings)
    assert [f.name for f in files] == ["worst.jpg", *(f"{d.name}.jpg" for d in drawn)]
    assert write_worst(tmp_path / "none", findings[-2:]) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("box", [(110.0, 10.0, 150.0, 40.0), (-1e300, -1e300, 1e300, 1e300), (10.0, 70.0, 30.0, 80.0)])
def test_boxes_outside_are_seen_on_ground_around_the_picture(picture, box):
    (drawn,) = draw_worst([finding(OUTSIDE, picture, box)])
    scale = 640 / 100
    width, height = drawn.image.size
    assert width > 100 * scale or height > 60 * scale
    assert width <= 1.6 * 100 * scale
    assert height <= 1.6 * 60 * scale


def test_a_narrow_picture_is_drawn(tmp_path):
    path = tmp_path / "thin.png"
    Image.new("RGB", (1, 400)).save(path)
    (drawn,) = draw_worst([finding(NO_AREA, path, (0, 5, 0, 9))])
    assert drawn.image.height == 640
