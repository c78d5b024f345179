"""The files made of records: labels, tables, crops; their names; and the choice of classes."""

from __future__ import annotations

import csv
import os
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.detect_classes import select_labels
from refinedet_cli.engine.detect_copies import Copies, Targets
from refinedet_cli.engine.detect_names import UniqueNames, class_folders
from refinedet_cli.engine.detect_outputs import write_outputs
from refinedet_cli.engine.results import Origin, PictureRecord, Row, detection_rows
from refinedet_cli.errors import DataError, UsageError

CLASSES = Classes(names=("person", "traffic light", "a/b"), category_ids=(1, 10, 7))
ORIGIN = Origin("w.safetensors", "00", "tiny", "torch", "fp32", "x", 0.3)
RECORDS = (
    PictureRecord(
        1,
        Path("/p/a.jpg"),
        "s/a.jpg",
        200,
        100,
        rows=(Row([20.0, 10.0, 40.0, 60.0], 0.875, 10), Row([0.0, 0.0, 200.0, 100.0], 0.5, 1)),
    ),
    PictureRecord(2, Path("/p/bad.jpg"), "bad.jpg", 0, 0, problem="is empty"),
    PictureRecord(3, Path("/p/a.png"), "s/a.png", 10, 10),
    PictureRecord(4, Path("/p/q"), 'two\nlines, "quoted".jpg', 8, 8, rows=(Row([1.0, 2.0, 3.0, 4.5], 0.75, 7),)),
)


def written(tmp_path: Path, *formats: str) -> set[str]:
    files = write_outputs(tmp_path, RECORDS, CLASSES, ORIGIN, formats, complete=True)
    assert files[0] == tmp_path / "detections.json"
    assert all(path.exists() for path in files)
    return {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}


def test_coco_is_always_written_and_nothing_else_unasked(tmp_path):
    assert written(tmp_path) == {"detections.json"}


def test_labels_are_fractions_of_the_picture_with_class_and_score(tmp_path):
    names = written(tmp_path, "yolo")
    assert names == {
        "detections.json",
        "classes.txt",
        "labels/s/a.txt",
        "labels/s/a.png.txt",
        'labels/two\nlines, "quoted".txt',
    }
    assert (tmp_path / "labels/s/a.txt").read_text() == (
        "1 0.200000 0.400000 0.200000 0.600000 0.875000\n0 0.500000 0.500000 1.000000 1.000000 0.500000\n"
    )
    assert (tmp_path / "labels/s/a.png.txt").read_text() == ""
    assert (tmp_path / "classes.txt").read_text() == "person\ntraffic light\na/b\n"


def test_labels_do_not_leave_their_folder_by_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "s").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads out"):
        written(tmp_path, "yolo")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_table_has_a_row_for_each_object_and_keeps_odd_names(tmp_path):
    assert written(tmp_path, "csv") == {"detections.json", "detections.csv"}
    with (tmp_path / "detections.csv").open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == [
        "file_name", "image_id", "width", "height", "class", "category_id", "score",
        "box_left", "box_top", "box_width", "box_height",
    ]  # fmt: skip
    assert rows == [
        ["s/a.jpg", "1", "200", "100", "traffic light", "10", "0.875", "20.0", "10.0", "40.0", "60.0"],
        ["s/a.jpg", "1", "200", "100", "person", "1", "0.5", "0.0", "0.0", "200.0", "100.0"],
        ['two\nlines, "quoted".jpg', "4", "8", "8", "a/b", "7", "0.75", "1.0", "2.0", "3.0", "4.5"],
    ]


def test_a_name_that_is_no_text_is_escaped_in_the_table(tmp_path):
    record = PictureRecord(1, Path("x"), os.fsdecode(b"caf\xe9.jpg"), 8, 8, rows=(Row([1.0, 2.0, 3.0, 4.0], 0.5, 1),))
    write_outputs(tmp_path, [record], CLASSES, ORIGIN, ["csv"], complete=True)
    assert "caf\\udce9.jpg,1,8,8," in (tmp_path / "detections.csv").read_text(encoding="utf-8")


# --- crops


def cut(tmp_path: Path, boxes: list[list[float]], size: tuple[int, int] = (30, 40)) -> PictureRecord:
    """Cut boxes out of a picture of this height and width, whose pixels tell their place."""
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None] * 4, np.arange(height)[:, None] * 4
    found = Detections(torch.tensor(boxes).float(), torch.full((len(boxes),), 0.5), torch.full((len(boxes),), 3))
    record = PictureRecord(1, Path("a.jpg"), "s/a.jpg", width, height, tuple(detection_rows(found, CLASSES)))
    copies = Copies(tmp_path, CLASSES, annotated=False, crops=True)
    return copies.write(record, Targets(None, PurePosixPath("s/a")), pixels, found)


def test_crops_hold_the_pixels_that_a_box_touches(tmp_path):
    record = cut(tmp_path, [[3.5, 5.25, 20, 9], [0, 0, 40, 30], [39.9, 29.9, 40, 30], [7, 7, 7, 7], [40, 30, 40, 30]])
    assert [crop.relative_to(tmp_path).as_posix() for crop in record.crops] == [
        f"crops/a_b/s/a_{number}.jpg" for number in range(1, 6)
    ]
    pictures = [np.asarray(Image.open(crop)).astype(int) for crop in record.crops]
    assert [picture.shape[:2] for picture in pictures] == [(4, 17), (30, 40), (1, 1), (1, 1), (1, 1)]
    # JPEG moves values by a little; the neighbours are four away.
    assert abs(pictures[0][0, 0, :2] - [12, 20]).max() <= 6
    assert abs(pictures[2][0, 0, :2] - [156, 116]).max() <= 6


def test_a_crop_that_cannot_be_written_is_a_problem_and_the_detections_stay(tmp_path):
    (tmp_path / "crops" / "a_b" / "s" / "a_1.jpg").mkdir(parents=True)
    record = cut(tmp_path, [[3, 5, 20, 9]])
    assert "cannot write" in record.problem
    assert len(record.rows) == 1
    assert record.crops == ()


def test_crops_do_not_leave_their_folder_by_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a_b").symlink_to(tmp_path / "elsewhere")
    assert "leads out" in cut(tmp_path, [[3, 5, 20, 9]]).problem
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- names


def test_stems_are_unique_and_say_which_picture_is_meant():
    with UniqueNames() as names:
        stems = [
            str(names.stem(name)) for name in ("a.jpg", "a.png", "A.webp", "b.tar.jpg", "s/a.jpg", ".hidden", "a.png")
        ]
    assert stems == ["a", "a.png", "A.webp", "b.tar", "s/a", ".hidden", "a-2.png"]


def test_stems_stay_below_their_folder_and_fit():
    with UniqueNames() as names:
        assert str(names.stem("../../etc/a.jpg")) == "etc/a"
        assert str(names.stem("/abs/b.jpg")) == "abs/b"
        assert len(names.stem("n" * 300 + ".jpg").name) <= 240


def test_folders_of_classes_are_safe_and_differ():
    hostile = Classes(
        names=("..", "a/b", "a\\b", "A_B", " x. ", "日本", "c" * 300, "."), category_ids=tuple(range(1, 9))
    )
    folders = class_folders(hostile)
    assert list(folders) == list(range(1, 9))
    assert [folders[i] for i in range(1, 7)] == ["class", "a_b", "a_b-3", "A_B-4", "x", "日本"]
    assert folders[8] == "class-8"
    assert len(folders[7].encode()) <= 240


# --- classes

KNOWN = Classes(names=("person", "airplane", "Traffic Light", "17"), category_ids=(1, 5, 10, 2))


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (["person"], {1}),
        (["Person", "1"], {1}),
        (["aeroplane"], {2}),
        (["traffic_light", "5"], {3, 2}),
        (["10"], {3}),
        # A name goes before an id, and ids are not places.
        (["17"], {4}),
        (["2"], {4}),
    ],
)
def test_classes_are_chosen_by_name_or_id(wanted, labels):
    assert select_labels(KNOWN, wanted) == labels


@pytest.mark.parametrize(
    ("wanted", "told"),
    [("persn", "did you mean person? it knows person, airplane, Traffic Light, 17, or"), ("zebra", "it knows person")],
)
def test_a_class_that_is_not_known(wanted, told):
    with pytest.raises(UsageError, match=f"--class {wanted}") as caught:
        select_labels(KNOWN, ["person", wanted])
    assert caught.value.hint.startswith(told)


def test_a_long_list_of_classes_is_cut():
    many = Classes(names=tuple(f"class {i}" for i in range(365)), category_ids=tuple(range(365)))
    with pytest.raises(UsageError) as caught:
        select_labels(many, ["nothing like it"])
    assert "and 335 more" in caught.value.hint
