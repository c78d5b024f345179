from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.coco import read_coco
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.json_entries import shown
from refinedet_cli.errors import DataError


def document() -> dict[str, Any]:
    """Two pictures with objects and one without, in an order that is not that of the ids."""
    return {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 100, "height": 50},
            {"id": 3, "file_name": "sub/a.jpg", "width": 40, "height": 30},
            {"id": 5, "file_name": "c.jpg", "width": 10, "height": 10},
        ],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 10, 20], "area": 150, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0.5, 0, 50, 50], "iscrowd": 1},
            {"id": 4, "image_id": 3, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 1200, "difficult": 1},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 4, "name": "gnu"}],
    }


def write(folder: Path, content: object, name: str = "set.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(folder: Path, content: object) -> Dataset:
    return read_coco(write(folder, content))


def with_box(box: object, **more: object) -> dict[str, Any]:
    """One object in a picture of 100 x 50."""
    changed = document()
    changed["annotations"] = [{"id": 1, "image_id": 7, "category_id": 2, "bbox": box, **more}]
    return changed


def test_everything_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, document())
    data = read_coco(path)
    assert data.name == f"{tmp_path.name}/set"
    assert data.classes.names == ("cat", "gnu", "dog")
    assert data.classes.category_ids == (2, 4, 9)
    assert [r.image_id for r in data.records] == [7, 3, 5]
    assert [(r.width, r.height) for r in data.records] == [(100, 50), (40, 30), (10, 10)]
    assert [r.file_name for r in data.records] == ["b.jpg", "sub/a.jpg", "c.jpg"]
    assert [r.path for r in data.records] == [tmp_path / "b.jpg", tmp_path / "sub" / "a.jpg", tmp_path / "c.jpg"]
    first, second, third = data.records
    assert first.boxes.tolist() == [[0.5, 0, 50.5, 50]]
    assert second.boxes.tolist() == [[1, 2, 11, 22], [0, 0, 40, 30]]
    assert third.boxes.shape == (0, 4)
    assert second.labels.tolist() == [3, 1]
    assert first.areas.tolist() == [2500]
    assert second.areas.tolist() == [150, 1200]
    assert first.crowd.tolist() == [True]
    assert first.difficult.tolist() == [False]
    assert second.difficult.tolist() == [False, True]
    assert second.annotation_ids.tolist() == [1, 4]
    types = [first.boxes.dtype, first.labels.dtype, first.areas.dtype, first.crowd.dtype, third.difficult.dtype]
    assert types == [np.float64, np.int64, np.float64, np.bool_, np.bool_]
    assert data.notes == ("1 of 3 classes without object: gnu",)


def test_set_without_objects(tmp_path: Path) -> None:
    changed = document()
    changed["annotations"] = []
    data = read(tmp_path, changed)
    assert (len(data), data.objects) == (3, 0)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([-10, 5, 30, 10], [0, 5, 20, 15]),
        ([90, 40, 30, 30], [90, 40, 100, 50]),
        ([-5, -5, 1000, 1000], [0, 0, 100, 50]),
        ([99.5, 49.5, 5, 5], [99.5, 49.5, 100, 50]),
        ([0, 0, 1e308, 1e308], [0, 0, 100, 50]),
    ],
)
def test_boxes_that_reach_out_are_clipped_and_counted(tmp_path: Path, box: list[float], expected: list[float]) -> None:
    data = read(tmp_path, with_box(box))
    record = data.records[0]
    assert record.boxes.tolist() == [expected]
    assert record.areas.tolist() == [(expected[2] - expected[0]) * (expected[3] - expected[1])]
    assert data.notes[0] == "1 boxes reach out of their picture and are clipped (annotation ids 1)"


def test_clipping_lowers_an_area_that_no_longer_fits(tmp_path: Path) -> None:
    assert read(tmp_path, with_box([-10, 0, 20, 10], area=200)).records[0].areas.tolist() == [100]
    assert read(tmp_path, with_box([-10, 0, 20, 10], area=60)).records[0].areas.tolist() == [60]


def test_rounding_is_clipped_in_silence(tmp_path: Path) -> None:
    data = read(tmp_path, with_box([50, 0, 50.01, 50.004], area=77))
    assert data.records[0].boxes.tolist() == [[50, 0, 100, 50]]
    assert data.records[0].areas.tolist() == [77]
    assert not any("clipped" in note for note in data.notes)


@pytest.mark.parametrize(
    ("box", "note"),
    [
        ("[NaN, 0, 5, 5]", "not finite"),
        ("[0, 0, Infinity, 5]", "not finite"),
        ("[null, 0, 5, 5]", "not finite"),
        ("[0, 0, 1e999, 5]", "not finite"),
        ("[1, 1, 0, 5]", "without area"),
        ("[1, 1, 5, 1e-9]", "without area"),
        ("[20, 20, -10, 5]", "without area"),
        ("[20, 20, -10, -5]", "without area"),
        ("[100, 0, 5, 5]", "outside"),
        ("[-5, 0, 5, 5]", "outside"),
        ("[0, 60, 5, 5]", "outside"),
        ("[1e308, 0, 1e308, 5]", "outside"),
    ],
)
def test_impossible_boxes_are_dropped_and_counted(tmp_path: Path, box: str, note: str) -> None:
    text = json.dumps(with_box("BOX")).replace('"BOX"', box)
    data = read(tmp_path, text)
    assert data.objects == 0
    assert data.notes[0].startswith("1 boxes are dropped")
    assert note in data.notes[0]
    assert "annotation ids 1" in data.notes[0]


def test_notes_name_three_examples(tmp_path: Path) -> None:
    changed = document()
    changed["annotations"] = [{"id": i, "image_id": 7, "category_id": 2, "bbox": [0, 0, 0, 0]} for i in range(5)]
    assert "5 boxes are dropped" in (note := read(tmp_path, changed).notes[0])
    assert note.endswith("(annotation ids 0, 1, 2, ...)")


@pytest.mark.parametrize(
    ("flags", "crowd", "difficult"),
    [
        ({}, False, False),
        ({"iscrowd": 1}, True, False),
        ({"iscrowd": True, "ignore": 1}, True, False),
        ({"ignore": 1}, False, True),
        ({"difficult": 1.0}, False, True),
        ({"difficult": None, "ignore": 0, "iscrowd": False}, False, False),
    ],
)
def test_flags(tmp_path: Path, flags: dict[str, object], crowd: bool, difficult: bool) -> None:
    record = read(tmp_path, with_box([0, 0, 5, 5], **flags)).records[0]
    assert (record.crowd.tolist(), record.difficult.tolist()) == ([crowd], [difficult])


@pytest.mark.parametrize("area", [None, 0, -3, "12", [1]])
def test_area_that_is_none_is_that_of_the_box(tmp_path: Path, area: object) -> None:
    assert read(tmp_path, with_box([0, 0, 5, 4], area=area)).records[0].areas.tolist() == [20]


def test_whole_floats_pass_for_ids(tmp_path: Path) -> None:
    changed = with_box([0, 0, 5, 4])
    changed["annotations"][0].update(id=1.0, image_id=7.0, category_id=2.0)
    assert read(tmp_path, changed).records[0].labels.tolist() == [1]


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(document()).encode())
    assert len(read_coco(path)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not valid JSON \(line 1"),
        ("", "is empty"),
        ("[]", "JSON list"),
        ('[{"image_id": 1, "score": 0.5}]', "list of COCO results"),
        ("3", "JSON number"),
        ("[" * 100_000, "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("{}", "has no 'categories'"),
        ('{"categories": {}}', "categories is a JSON object"),
        ('{"categories": []}', "has no categories"),
        ('{"categories": [3]}', r"categories\[0\] is a JSON number"),
        ('{"categories": [{"id": 1, "name": ""}]}', "name is"),
    ],
    ids=range(12),
)
def test_wrong_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content)
    assert "set.json" in caught.value.message
    assert caught.value.hint


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match="not valid JSON"):
        read_coco(tmp_path / "set.json")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_coco(tmp_path / "set.json")


GONE = object()


@pytest.mark.parametrize(
    ("part", "index", "key", "value", "message"),
    [
        ("images", 1, "id", GONE, r"images\[1\] has no 'id'"),
        ("images", 1, "id", "3", r"images\[1\]: id is \"3\""),
        ("images", 1, "id", True, "whole|id is true"),
        ("images", 1, "id", 2**70, "id is"),
        ("images", 1, "id", 7, r"images\[1\]: image id 7 is used by images\[0\]"),
        ("images", 1, "file_name", GONE, r"images\[1\] \(id 3\) has no 'file_name'"),
        ("images", 1, "file_name", 3, "file_name is 3"),
        ("images", 1, "file_name", "", "file_name is"),
        ("images", 1, "width", -4, r"images\[1\] \(id 3\): the size is -4 x 30"),
        ("images", 1, "height", "tall", 'height is "tall"'),
        ("images", 1, "width", 4.5, "width is 4.5"),
        ("annotations", 2, "id", GONE, r"annotations\[2\] has no 'id'"),
        ("annotations", 2, "id", 1, r"annotations\[2\]: annotation id 1 is used by annotations\[0\]"),
        ("annotations", 2, "image_id", GONE, r"annotations\[2\] \(id 4\) has no 'image_id'"),
        ("annotations", 2, "image_id", 99, r"annotations\[2\] \(id 4\): there is no picture with id 99"),
        ("annotations", 2, "image_id", [3], r"image_id is \[3\]"),
        ("annotations", 2, "category_id", GONE, "has no 'category_id'"),
        ("annotations", 2, "category_id", 99, r"\(id 4\): there is no category with id 99"),
        ("annotations", 2, "bbox", GONE, r"annotations\[2\] \(id 4\) has no 'bbox'"),
        ("annotations", 2, "bbox", [1, 2, 3], r"bbox is \[1, 2, 3\]"),
        ("annotations", 2, "bbox", ["1", "2", "3", "4"], "bbox is"),
        ("annotations", 2, "bbox", [10**400, 2, 3, 4], "bbox is"),
        ("annotations", 2, "bbox", {"x": 1}, "bbox is"),
        ("annotations", 2, "iscrowd", 2, r"annotations\[2\] \(id 4\): iscrowd is 2"),
        ("categories", 1, "id", GONE, r"categories\[1\] has no 'id'"),
        ("categories", 1, "id", 9, r"categories\[1\]: id 9 is 'dog' already"),
        ("categories", 1, "name", "dog", r"categories\[1\] \(id 2\): the name 'dog'"),
        ("categories", 1, "name", None, "name is null"),
    ],
)
def test_wrong_entries_are_named(tmp_path: Path, part: str, index: int, key: str, value: object, message: str) -> None:
    changed = document()
    if value is GONE:
        del changed[part][index][key]
    else:
        changed[part][index][key] = value
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, changed)
    assert "set.json" in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.hint


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("entry", [None, 3, "x", []])
def test_entries_that_are_no_objects(tmp_path: Path, part: str, entry: object) -> None:
    changed = document()
    changed[part].append(entry)
    with pytest.raises(DataError, match=rf"{part}\[3\] is a JSON"):
        read(tmp_path, changed)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_missing_parts(tmp_path: Path, part: str) -> None:
    changed = document()
    del changed[part]
    with pytest.raises(DataError, match=f"has no '{part}'"):
        read(tmp_path, changed)


def test_set_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lists no pictures"):
        read(tmp_path, {**document(), "images": [], "annotations": []})


@pytest.mark.parametrize(
    "name",
    ["/etc/a.jpg", "../a.jpg", "sub/../../a.jpg", "sub/../a.jpg", "C:/a.jpg", "C:\\a.jpg", "..\\a.jpg", "\\\\host\\a"],
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    changed = document()
    changed["images"][1]["file_name"] = name
    with pytest.raises(DataError, match=r"images\[1\].*leads out") as caught:
        read(tmp_path, changed)
    assert "--images" in (caught.value.hint or "")


def test_backslashes_part_folders(tmp_path: Path) -> None:
    changed = document()
    changed["images"][1]["file_name"] = "sub\\a.jpg"
    record = read(tmp_path, changed).records[1]
    assert record.path == tmp_path / "sub" / "a.jpg"
    assert record.file_name == "sub\\a.jpg"


def _folder_link(root: Path, outside: Path) -> None:
    (root / "sub").symlink_to(outside)


def _file_link(root: Path, outside: Path) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "a.jpg").symlink_to(outside / "a.jpg")


@pytest.mark.parametrize("link", [_folder_link, _file_link])
def test_links_that_lead_out_are_refused(tmp_path: Path, link) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "a.jpg").touch()
    link(root, outside)
    with pytest.raises(DataError, match=r"images\[1\].*link out") as caught:
        read(root, document())
    assert "--images" in (caught.value.hint or "")


def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.jpg").touch()
    (tmp_path / "sub").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "a.jpg").symlink_to(tmp_path / "real" / "x.jpg")
    assert read(tmp_path, document()).records[1].path == tmp_path / "sub" / "a.jpg"


def test_folder_of_pictures_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(read_coco(write(tmp_path, document()), tmp_path / "link")) == 3


def test_images_folder_replaces_the_own(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    data = read_coco(write(tmp_path, document()), tmp_path / "pictures")
    assert data.records[0].path == tmp_path / "pictures" / "b.jpg"


def test_missing_images_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        read_coco(write(tmp_path, document()), tmp_path / "gone")


@pytest.mark.parametrize(
    ("place", "expected"), [("b.jpg", "b.jpg"), ("two/b.jpg", "two/b.jpg"), ("else/b.jpg", "b.jpg")]
)
def test_other_folders_are_tried(tmp_path: Path, place: str, expected: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    data = read_coco(write(tmp_path, document()), search=[tmp_path / "one", tmp_path / "two"])
    assert data.records[0].path == tmp_path / expected


@pytest.mark.parametrize("missing", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}, {"width": 12}])
def test_missing_size_is_read_from_the_picture(tmp_path: Path, missing: dict[str, object]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 100)).save(tmp_path / "b.jpg", exif=exif)
    changed = document()
    changed["images"][0] = {"id": 7, "file_name": "b.jpg", **missing}
    record = read(tmp_path, changed).records[0]
    assert (record.width, record.height) == (100, 50)


def test_missing_size_of_a_missing_picture(tmp_path: Path) -> None:
    changed = document()
    del changed["images"][0]["width"]
    with pytest.raises(DataError, match=r"b\.jpg does not exist"):
        read(tmp_path, changed)


def test_pictures_listed_twice_are_noted(tmp_path: Path) -> None:
    changed = document()
    changed["images"][2]["file_name"] = "b.jpg"
    assert "1 picture is listed more than once, with different ids" in read(tmp_path, changed).notes


def _slots(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place of a JSON document that may be replaced."""
    for key in node if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], (dict, list)):
            _slots(node[key], found)
    return found


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=4
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mangled_documents_raise_nothing_but_data_error(tmp_path: Path, data: st.DataObject) -> None:
    changed = copy.deepcopy(document())
    for _ in range(data.draw(st.integers(1, 3))):
        slots = _slots(changed, [])
        if not slots:
            break
        node, key = slots[data.draw(st.integers(0, len(slots) - 1))]
        if data.draw(st.booleans()):
            node[key] = data.draw(values)
        else:
            del node[key]
    path = write(tmp_path, changed)
    try:
        result = read_coco(path)
    except DataError:
        return
    for record in result.records:
        assert np.isfinite(record.boxes).all()
        assert (record.boxes >= 0).all()
        assert (record.boxes <= [record.width, record.height] * 2).all()
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert (record.areas > 0).all()
        assert ((record.labels >= 1) & (record.labels <= len(result.classes))).all()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=40) | st.text(alphabet='{}[]":,1eInfnulNa ', max_size=30).map(str.encode))
def test_any_bytes_raise_nothing_but_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.json").write_bytes(content)
    with pytest.raises(DataError):
        read_coco(tmp_path / "set.json")


def test_large_set_is_read_quickly(tmp_path: Path) -> None:
    images, boxes = 5_000, 37_000
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)],
        "annotations": [
            {"id": i, "image_id": i * 7 % images, "category_id": 1, "bbox": [i % 600, 1.5, 20.25, 30], "area": 9.5}
            for i in range(boxes)
        ],
        "categories": [{"id": 1, "name": "x"}],
    }
    path = write(tmp_path, content)
    start = time.process_time()
    data = read_coco(path)
    assert data.objects == boxes
    # Processor time, which other work on the machine does not count towards; about 0.3 s when it was written.
    assert time.process_time() - start < 2


def test_real_sets_have_nothing_to_complain_about(shared_data: Path) -> None:
    data = read_coco(shared_data / "bccd" / "test.json")
    assert (len(data), data.classes.names) == (72, ("RBC", "WBC", "Platelets"))
    assert data.notes == ()
    assert all(r.path.is_file() for r in data.records)


# Found by benchmarks/fuzz_readers.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".jpg", "d/" * 3000 + "a.jpg", "\ud800.jpg", "\ud800/a.jpg", "loop.jpg", "round/a.jpg"]
)
@pytest.mark.parametrize("key", ["width", "id"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str, key: str) -> None:
    """Too long, not text, or links that go round: nothing to say as long as the picture need not be read."""
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "round").symlink_to("round")
    content = document()
    content["images"][0]["file_name"] = name
    if key == "id":
        assert len(read_coco(write(tmp_path, content), search=[tmp_path / "images"])) == 3
        return
    del content["images"][0]["width"]
    with pytest.raises(DataError, match=r"cannot be read|does not exist") as caught:
        read_coco(write(tmp_path, content), search=[tmp_path / "images"])
    assert caught.value.hint


def test_a_deep_value_is_named_and_not_written_out() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a deeply nested list"
    while deep:  # Python would go as deep to free it.
        deep = deep.pop()  # type: ignore[assignment]
