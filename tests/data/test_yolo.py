from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.yolo import find_yolo, load_yolo, read_yolo
from refinedet_cli.errors import DataError

YAML = "train: images\nnames: [cat, dog]\n"


def picture(path: Path, size: tuple[int, int] = (100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def label(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))
    return path


def describe(folder: Path, text: str = YAML, name: str = "data.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, part: str = "train", **more: Path) -> Dataset:
    return read_yolo(load_yolo(path, **more), part)


def one(folder: Path, *rows: str) -> Dataset:
    """One picture of 100 x 50 with these rows."""
    picture(folder / "images" / "a.png")
    label(folder / "labels" / "a.txt", *rows)
    return read(describe(folder))


def test_everything_is_read(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c"):
        picture(tmp_path / "images" / f"{name}.png")
    label(tmp_path / "labels" / "a.txt", "1 0.5 0.5 0.2 0.4", "", "0 0.25 0.5 0.5 1", "")
    label(tmp_path / "labels" / "b.txt")
    label(tmp_path / "labels" / "sub" / "c.txt", "0.0 0.05 0.05 0.1 0.1")
    label(tmp_path / "labels" / "classes.txt", "cat", "dog")
    data = read(describe(tmp_path))
    assert data.name == f"{tmp_path.name}/train"
    assert data.classes.names == ("cat", "dog")
    assert data.classes.category_ids == (0, 1)
    assert [r.file_name for r in data.records] == ["images/a.png", "images/b.png", "images/sub/c.png"]
    assert [r.path for r in data.records] == [tmp_path / r.file_name for r in data.records]
    assert [r.image_id for r in data.records] == [1, 2, 3]
    first, second, third = data.records
    assert (first.width, first.height) == (100, 50)
    np.testing.assert_allclose(first.boxes, [[40, 15, 60, 35], [0, 0, 50, 50]], atol=1e-9)
    assert first.labels.tolist() == [2, 1]
    np.testing.assert_allclose(first.areas, [400, 2500])
    assert not first.crowd.any()
    assert not first.difficult.any()
    assert first.annotation_ids.tolist() == [1, 2]
    assert second.boxes.shape == (0, 4)
    np.testing.assert_allclose(third.boxes, [[0, 0, 10, 5]], atol=1e-9)
    assert data.notes == ()


def test_numbered_names_give_the_ids(tmp_path: Path) -> None:
    for name in ("000000000139", "000000000007"):
        picture(tmp_path / "images" / f"{name}.png")
        label(tmp_path / "labels" / f"{name}.txt")
    assert [r.image_id for r in read(describe(tmp_path)).records] == [7, 139]


def test_size_is_as_seen(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    path = picture(tmp_path / "images" / "a.jpg")
    Image.new("RGB", (40, 80)).save(path, exif=turned)
    label(tmp_path / "labels" / "a.txt", "0 0.5 0.5 1 1")
    record = read(describe(tmp_path)).records[0]
    assert (record.width, record.height) == (80, 40)
    assert record.boxes.tolist() == [[0, 0, 80, 40]]


@pytest.mark.parametrize(
    ("row", "expected", "note"),
    [
        ("0 0 0.5 0.5 1", [0, 0, 25, 50], "1 boxes reach out"),
        ("0 0.5 0.5 1.00001 1", [0, 0, 100, 50], None),
        ("0 -0.1 0.5 0.1 0.1", None, "outside"),
        ("0 nan 0.5 0.1 0.1", None, "not finite"),
        ("0 0.5 inf 0.1 0.1", None, "not finite"),
        ("0 0.5 0.5 0 0.1", None, "without area"),
        ("0 0.5 0.5 -0.1 0.1", None, "without area"),
    ],
)
def test_odd_boxes_are_clipped_or_dropped_and_counted(
    tmp_path: Path, row: str, expected: list[float] | None, note: str | None
) -> None:
    data = one(tmp_path, "1 0.5 0.5 0.1 0.1", row)
    assert data.objects == 1 + (expected is not None)
    if expected is not None:
        np.testing.assert_allclose(data.records[0].boxes[1], expected, atol=1e-9)
    assert len([text for text in data.notes if "boxes" in text]) == (note is not None)
    if note is not None:
        assert note in data.notes[0]
        assert "a.txt:2" in data.notes[0]


def test_pixels_instead_of_fractions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of 2 boxes .* none lies") as caught:
        one(tmp_path, "0 50 25 10 10", "1 30 20 5 5")
    assert "pixels" in (caught.value.hint or "")


def test_outline_becomes_the_box_around_it_with_its_own_area(tmp_path: Path) -> None:
    data = one(tmp_path, "0 0.1 0.2 0.5 0.2 0.5 0.8", "1 0.5 0.5 0.1 0.1")
    np.testing.assert_allclose(data.records[0].boxes[0], [10, 10, 50, 40], atol=1e-9)
    np.testing.assert_allclose(data.records[0].areas[0], 40 * 30 / 2)
    assert data.notes == ("1 outline became the box around it",)


def test_outline_without_area_has_that_of_its_box(tmp_path: Path) -> None:
    # There and back again.
    data = one(tmp_path, "0 0.1 0.2 0.5 0.6 0.5 0.6 0.1 0.2")
    np.testing.assert_allclose(data.records[0].areas, [40 * 20])


def test_outline_with_a_point_that_is_no_number_is_dropped(tmp_path: Path) -> None:
    data = one(tmp_path, "1 0.5 0.5 0.1 0.1", "0 0.1 0.2 0.5 nan 0.5 0.8")
    assert data.objects == 1
    assert any("not finite" in note for note in data.notes)


outlines = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(outlines)
def test_no_outline_is_larger_than_its_box(tmp_path: Path, points: list[tuple[float, float]]) -> None:
    row = "0 " + " ".join(f"{x!r} {y!r}" for x, y in points)
    record = one(tmp_path, "1 0.5 0.5 1 1", row).records[0]
    for box, area in zip(record.boxes[1:], record.areas[1:], strict=True):
        xs, ys = ([point[axis] * side for point in points] for axis, side in ((0, 100), (1, 50)))
        np.testing.assert_allclose(box, [min(xs), min(ys), max(xs), max(ys)], atol=1e-6)
        assert area >= 0


def test_pictures_without_label_file_are_empty_and_counted(tmp_path: Path) -> None:
    for name in "bcde":
        picture(tmp_path / "images" / f"{name}.png")
    data = one(tmp_path, "0 0.5 0.5 0.1 0.1")
    assert [len(r) for r in data.records] == [1, 0, 0, 0, 0]
    assert data.notes[0] == (
        "4 pictures without label file, counted as empty (images/b.png, images/c.png, images/d.png, ...)"
    )


def test_no_label_file_at_all_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match=r"of .*a\.png it would be .*labels.*a\.txt") as caught:
        read(describe(tmp_path))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "there is no class 2"),
        ("-1 0.5 0.5 0.1 0.1", "there is no class -1"),
        ("1.5 0.5 0.5 0.1 0.1", "class is '1.5'"),
        ("cat 0.5 0.5 0.1 0.1", "class is 'cat'"),
        ("nan 0.5 0.5 0.1 0.1", "class is 'nan'"),
        ("inf 0.5 0.5 0.1 0.1", "class is 'inf'"),
        ("0 0.5 0.5 0.1 x", "'x' is no number"),
        ("0 0.5,0.5 0.1 0.1 0.1", "'0.5,0.5' is no number"),
        ("0", "has 0 numbers"),
        ("0 0.5 0.5 0.1", "has 3 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "has 5 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "has 7 numbers"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        one(tmp_path, "0 0.5 0.5 0.1 0.1", "", row)
    assert str(Path("labels", "a.txt")) + ":3" in caught.value.message
    assert caught.value.hint


def test_label_file_that_is_no_text(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    label(tmp_path / "labels" / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        read(describe(tmp_path))


# --- data.yaml


@pytest.mark.parametrize(
    ("text", "names", "ids"),
    [
        ("names: [cat, dog]", ("cat", "dog"), (0, 1)),
        ("names:\n- cat\n- dog\nnc: 2", ("cat", "dog"), (0, 1)),
        ("names:\n  1: dog\n  0: cat", ("cat", "dog"), (0, 1)),
        ("names: {0: cat, 7: dog}", ("cat", "dog"), (0, 7)),
        ("names: [no, yes, 010, 1.0, null, 'a b']", ("no", "yes", "010", "1.0", "null", "a b"), (0, 1, 2, 3, 4, 5)),
        ("nc: 2", ("class 0", "class 1"), (0, 1)),
    ],
)
def test_names(tmp_path: Path, text: str, names: tuple[str, ...], ids: tuple[int, ...]) -> None:
    classes = load_yolo(describe(tmp_path, f"train: images\n{text}\n")).classes
    assert (classes.names, classes.category_ids) == (names, ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a", "not a YOLO data set"),
        ("just words", "not a YOLO data set"),
        ("names: [a\ntrain: b", "not valid YAML .line"),
        ("a: &x [*x]\n? [1]\n: b", "not valid YAML"),
        ("[" * 500, "not valid YAML"),
        ("train: images", "has no names"),
        ("train: images\nnames: cat", "names is no list"),
        ("train: images\nnames: []", "names is no list"),
        ("train: images\nnames: [cat, cat]", "'cat' is there twice"),
        ("train: images\nnames: [cat, '']", "class 1 is ''"),
        ("train: images\nnames: [cat, [dog]]", "class 1 is"),
        ("train: images\nnames: {a: cat}", "names has 'a'"),
        ("train: images\nnames: [cat]\nnc: 2", "nc is 2, but there are 1 names"),
        ("train: images\nnames: [cat]\nnc: two", "nc is 'two'"),
        ("train: images\nnc: 0", "nc is '0'"),
        ("names: [cat]", "names no train, val or test"),
        ("names: [cat]\ntrain:\nval: ~", "names no train, val or test"),
        ("names: [cat]\ntrain: images\npath: gone", "folder gone .path. does not exist"),
        ("names: [cat]\ntrain: images\npath: [a]", "path is"),
        ("names: [cat]\ntrain: images\nkpt_shape: [17, 3]", "key points"),
        ("names: [cat]\ntrain: gone/images", "names gone/images, which does not exist"),
        ("names: [cat]\ntrain: data.yaml", "neither a folder nor a list"),
        ("names: [cat]\ntrain: empty", "holds no pictures"),
    ],
    ids=lambda value: value[:30],
)
def test_wrong_descriptions_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    path = describe(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert caught.value.hint


@pytest.mark.parametrize("key", ["names", "nc", "path", "train"])
def test_references_do_not_swell(tmp_path: Path, key: str) -> None:
    rows = ["l0: &l0 [a, a]", *(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}, *l{i - 1}]" for i in range(1, 60))]
    fields = {"names": "[cat]", "nc": "1", "path": ".", "train": "images"} | {key: "[*l59]"}
    path = describe(tmp_path, "\n".join([*rows, *(f"{name}: {value}" for name, value in fields.items())]))
    with pytest.raises(DataError) as caught:
        read(path)
    assert len(caught.value.message) < 500


def test_tags_make_no_objects(tmp_path: Path) -> None:
    path = describe(tmp_path, "train: !!python/object/apply:os.system [exit]\nnames: [cat]\n")
    assert load_yolo(path).entries == (("train", ("exit",)),)


def test_parts_by_other_names(tmp_path: Path) -> None:
    found = load_yolo(describe(tmp_path, "names: [cat]\nvalid: a\ntraining: [b, c]\ntest: ''\n"))
    assert found.entries == (("train", ("b", "c")), ("val", ("a",)))
    assert found.part("validation") == found.part("val") == ("a",)
    assert found.part("test") is None
    with pytest.raises(DataError, match="names no test part"):
        read_yolo(found, "test")


@pytest.mark.parametrize(
    ("folder", "entry", "base"),
    [
        ("train/images", "train/images", None),
        ("train/images", "../train/images", None),
        ("train/images", "..\\train\\images", None),
        ("train/images", "set/train/images", None),
        ("images/train", "images/train", "."),
        ("images/train", "images/train", "../set"),
        ("inner/images/train", "images/train", "inner"),
        ("train", "./train", None),
    ],
)
def test_where_entries_lead(tmp_path: Path, folder: str, entry: str, base: str | None) -> None:
    root = tmp_path / "set"
    picture(root / folder / "a.png")
    label(root / folder.replace("images", "labels") / "a.txt", "0 0.5 0.5 0.1 0.1")
    path = describe(root, f"names: [cat]\ntrain: '{entry}'\n" + (f"path: {base}\n" if base else ""))
    record = read(path).records[0]
    assert record.path.resolve() == root / folder / "a.png"
    assert len(record) == 1
    assert record.file_name == f"{folder}/a.png".removeprefix("inner/")


def test_folders_relative_to_the_root_of_data_sets(tmp_path: Path) -> None:
    picture(tmp_path / "sets" / "mine" / "images" / "a.png")
    label(tmp_path / "sets" / "mine" / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1")
    path = describe(tmp_path / "else", "path: mine\ntrain: images\nnames: [cat]\n", "mine.yaml")
    data = read(path, root=tmp_path / "sets")
    assert (data.objects, data.name) == (1, "mine/train")


def test_pictures_outside_have_names_without_dots(tmp_path: Path) -> None:
    for name in ("one", "two"):
        picture(tmp_path / name / "images" / "a.png")
        label(tmp_path / name / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1")
    path = describe(tmp_path / "one", "names: [cat]\ntrain: [images, ../two/images]\n")
    assert [r.file_name for r in read(path).records] == ["one/images/a.png", "two/images/a.png"]


def test_linked_folder_of_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "images" / "a.png")
    label(tmp_path / "store" / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1")
    path = describe(tmp_path / "set")
    for name in ("images", "labels"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "store" / name)
    record = read(path).records[0]
    assert (record.file_name, len(record)) == ("images/a.png", 1)


def test_relative_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one(tmp_path, "0 0.5 0.5 0.1 0.1")
    monkeypatch.chdir(tmp_path)
    data = read(Path("data.yaml"))
    assert data.name == f"{tmp_path.name}/train"
    assert data.records[0].file_name == "images/a.png"
    assert data.fingerprint == read(tmp_path / "data.yaml").fingerprint


def test_images_above_the_data_set_mean_nothing(tmp_path: Path) -> None:
    root = tmp_path / "images" / "set"
    picture(root / "train" / "a.png")
    label(root / "train" / "a.txt", "0 0.5 0.5 0.1 0.1")
    assert read(describe(root, "names: [cat]\ntrain: train\n")).objects == 1


def test_lists_of_pictures(tmp_path: Path) -> None:
    names = ("images/train/b.png", "images/train/a.png", "images/val/c.png")
    for name in names:
        picture(tmp_path / name)
        label(tmp_path / name.replace("images", "labels").replace("png", "txt"), "0 0.5 0.5 0.1 0.1")
    (tmp_path / "lists").mkdir()
    lines = ["./images/train/b.png", str(tmp_path / "images" / "train" / "a.png"), "", "../images/val/c.png"]
    (tmp_path / "lists" / "train.txt").write_text("\n".join([*lines, lines[0]]))
    data = read(describe(tmp_path, "names: [cat]\ntrain: lists/train.txt\n"))
    assert [r.file_name for r in data.records] == list(names)
    assert data.objects == 3


def test_pictures_listed_twice_are_taken_once(tmp_path: Path) -> None:
    one(tmp_path, "0 0.5 0.5 0.1 0.1")
    data = read(describe(tmp_path, "names: [cat, dog]\ntrain: [images, images]\n"))
    assert len(data) == 1
    assert "1 picture is listed more than once" in data.notes


def test_listed_picture_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("\n./images/gone.png\n")
    with pytest.raises(DataError, match=r"train\.txt:2 lists \./images/gone\.png"):
        read(describe(tmp_path, "names: [cat]\ntrain: train.txt\n"))


def test_validation_on_the_training_pictures_is_said(tmp_path: Path) -> None:
    one(tmp_path, "0 0.5 0.5 0.1 0.1", "1 0.5 0.5 0.1 0.1")
    path = describe(tmp_path, YAML + "val: images\n")
    assert read(path, "val").notes == ("data.yaml names the same pictures for train and val",)
    assert read(path).notes == ()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data.yaml": "names: []", "other.yaml": YAML}, "data.yaml"),
        ({"data.yml": YAML}, "data.yml"),
        ({"coco8.yaml": YAML, "hyp.yaml": "lr0: 0.01"}, "coco8.yaml"),
        ({"one.yaml": YAML, "two.yaml": YAML}, None),
        ({"hyp.yaml": "lr0: 0.01", "broken.yaml": "["}, None),
    ],
)
def test_file_of_a_folder(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    for name, text in files.items():
        describe(tmp_path, text, name)
    found = find_yolo(tmp_path)
    assert (found.name if found else None) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60), st.text(alphabet="0123456789.-e \nnaif", max_size=60))
def test_any_text_raises_nothing_but_data_error(tmp_path: Path, text: str, rows: str) -> None:
    picture(tmp_path / "images" / "a.png", (4, 4))
    label(tmp_path / "labels" / "a.txt", rows)
    with contextlib.suppress(DataError):
        read(describe(tmp_path))
    path = tmp_path / "data.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(DataError):
        read(path)


# Found by benchmarks/fuzz_readers.py ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nc: 999999999\ntrain: images", "nc is '999999999'"),
        (f"nc: {'9' * 5000}\ntrain: images", r"nc is '9+\.\.\.'"),
        ("names: {9999999: cat}\ntrain: images", "names has '9999999'"),
        ("names: [cat]\ntrain: " + "x" * 300, "which does not exist"),
        ("names: [cat]\ntrain: images\npath: " + "x" * 300, "does not exist"),
        ("names: [cat]\ntrain: ..", "a folder above the data set"),
        ("names: [cat]\ntrain: /", "a folder above the data set"),
        ("names: [cat]\ntrain: list.txt", "which does not exist"),
    ],
    ids=lambda value: value[:20],
)
def test_descriptions_that_did_harm(tmp_path: Path, text: str, message: str) -> None:
    """They took all memory, searched the whole disk, or raised what is no DataError."""
    (tmp_path / "list.txt").write_text("x" * 300 + ".png\n")
    path = describe(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert caught.value.hint
    assert len(caught.value.message) < 2000


@pytest.mark.parametrize(("target", "message"), [("gone.txt", "does not exist"), ("/dev/zero", "not an ordinary file")])
def test_label_files_that_are_none(tmp_path: Path, target: str, message: str) -> None:
    one(tmp_path, "0 0.5 0.5 0.1 0.1")
    (tmp_path / "labels" / "a.txt").unlink()
    (tmp_path / "labels" / "a.txt").symlink_to(target)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.yaml")
