from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.voc import VOC_CLASSES, VocFolder, find_voc, find_years, read_voc
from refinedet_cli.errors import DataError

SIZE = "<size><width>100</width><height>50</height><depth>3</depth></size>"


def box(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    return f"<bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin><ymax>{ymax}</ymax><ymin>{ymin}</ymin></bndbox>"


def thing(name: str = "cat", inside: str | None = None) -> str:
    return f"<object><name>{name}</name>{box(11, 6, 30, 25) if inside is None else inside}</object>"


def annotate(folder: Path, stem: str, *objects: str, size: str = SIZE, file_name: str = "") -> Path:
    """Write an XML file, and an empty file for its picture."""
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "JPEGImages" / f"{stem}.jpg").touch()
    path = folder / "Annotations" / f"{stem}.xml"
    path.write_text(f"<annotation><filename>{file_name}</filename>{size}{''.join(objects)}</annotation>")
    return path


def enlist(folder: Path, name: str, content: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(content)


def voc(folder: Path) -> VocFolder:
    found = find_voc(folder)
    assert found is not None
    return found


def read(folder: Path, name: str = "", **more: Path) -> Dataset:
    found = voc(folder)
    part = found.part(name)
    assert part is not None
    return read_voc(found, part, **more)


def test_everything_is_read(tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    hard = "<difficult>1</difficult><truncated>1</truncated><pose>Left</pose>"
    annotate(root, "000012", thing("dog"), thing("person", hard + box(1, 1, 100, 50)))
    annotate(root, "000007")
    annotate(root, "000003", thing("cat", "<difficult>0</difficult>" + box(5, 5, 5, 5)))
    enlist(root, "train", "000012\n000007\r\n\n")
    enlist(root, "test", "000003\n")
    data = read(root, "train")
    assert data.name == "VOC2007/train"
    assert data.classes.names == VOC_CLASSES
    assert data.classes.category_ids == tuple(range(1, 21))
    assert [r.image_id for r in data.records] == [12, 7]
    assert [r.file_name for r in data.records] == ["JPEGImages/000012.jpg", "JPEGImages/000007.jpg"]
    assert [r.path for r in data.records] == [root / r.file_name for r in data.records]
    first, second = data.records
    assert (first.width, first.height) == (100, 50)
    assert first.boxes.tolist() == [[10, 5, 30, 25], [0, 0, 100, 50]]
    assert first.labels.tolist() == [12, 15]
    assert first.areas.tolist() == [400, 5000]
    assert first.difficult.tolist() == [False, True]
    assert not first.crowd.any()
    assert first.annotation_ids.tolist() == [1, 2]
    assert second.boxes.shape == (0, 4)
    # A single pixel, by VOC's own formula (xmax - xmin + 1) * (ymax - ymin + 1).
    assert read(root, "test").records[0].boxes.tolist() == [[4, 4, 5, 5]]
    assert data.notes == (
        "18 of 20 classes without object: " + ", ".join(n for n in VOC_CLASSES if n not in ("dog", "person")),
    )


def test_official_names_are_in_the_order_of_the_devkit() -> None:
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


corners = st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(1, 50), st.integers(1, 50))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(corners, min_size=1, max_size=10))
def test_inclusive_corners_become_edges(tmp_path: Path, drawn: list[tuple[int, int, int, int]]) -> None:
    given_boxes = [(min(a, b), min(c, d), max(a, b), max(c, d)) for a, b, c, d in drawn]
    annotate(tmp_path, "a", *(thing("x", box(*given_box)) for given_box in given_boxes))
    data = read(tmp_path)
    record = data.records[0]
    assert len(record) == len(given_boxes)
    for (xmin, ymin, xmax, ymax), found in zip(given_boxes, record.boxes, strict=True):
        mask = np.zeros((50, 100), dtype=bool)
        mask[ymin - 1 : ymax, xmin - 1 : xmax] = True  # The pixels that the devkit means.
        rows, columns = np.nonzero(mask)
        assert found.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    devkit = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in given_boxes]
    assert record.areas.tolist() == devkit
    assert not any("boxes" in note for note in data.notes)


@pytest.mark.parametrize(
    ("given_box", "expected", "note"),
    [
        ((0, 6, 30, 25), [0, 5, 30, 25], "1 box begins at 0"),
        ((11, 0, 30, 25), [10, 0, 30, 25], "1 box begins at 0"),
        ((0, 0, 100, 50), [0, 0, 100, 50], "1 box begins at 0"),
        ((0.5, 6, 30, 25), [0, 5, 30, 25], "1 box begins at 0"),
        ((-3, 6, 30, 25), [0, 5, 30, 25], "1 boxes reach out"),
        ((11, 6, 130, 25), [10, 5, 100, 25], "1 boxes reach out"),
        ((11.25, 6.5, 30.75, 25), [10.25, 5.5, 30.75, 25], None),
        (("  11 ", "6", "30", "\n25\n"), [10, 5, 30, 25], None),
        ((30, 6, 11, 25), None, "without area"),
        ((11, 6, 10, 25), None, "without area"),
        (("nan", 6, 30, 25), None, "not finite"),
        ((11, 6, "inf", 25), None, "not finite"),
        ((101, 6, 130, 25), None, "outside"),
    ],
)
def test_odd_boxes(tmp_path: Path, given_box: tuple, expected: list[float] | None, note: str | None) -> None:
    annotate(tmp_path, "a", thing("x", box(*given_box)))
    data = read(tmp_path)
    assert data.records[0].boxes.tolist() == ([] if expected is None else [expected])
    odd = [text for text in data.notes if "boxes" in text]
    assert len(odd) == (note is not None)
    if note is not None:
        assert note in odd[0]
        assert "a.xml object 1" in odd[0]


def test_parts_of_objects_are_no_objects(tmp_path: Path) -> None:
    head = f"<part><name>head</name>{box(12, 7, 15, 10)}</part>"
    inner = f"<parts>{thing('hand')}</parts>"
    annotate(tmp_path, "a", thing("person", head + inner + box(11, 6, 30, 25)))
    data = read(tmp_path)
    assert data.classes.names == ("person",)
    assert data.records[0].boxes.tolist() == [[10, 5, 30, 25]]


def test_first_box_is_not_that_of_a_part(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing("person", f"<part><name>head</name>{box(12, 7, 15, 10)}</part>"))
    with pytest.raises(DataError, match=r"object 1 \(person\) has no bndbox"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("", False), ("0", False), ("1", True), ("True", True), ("Unspecified", False)]
)
def test_difficult(tmp_path: Path, text: str, expected: bool) -> None:
    annotate(tmp_path, "a", thing("x", f"<difficult>{text}</difficult>" + box(1, 1, 5, 5)))
    assert read(tmp_path).records[0].difficult.tolist() == [expected]


# --- classes


def test_labels_agree_in_all_parts(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing("zebra"))
    annotate(tmp_path, "b", thing("ant"))
    annotate(tmp_path, "unlisted", thing("whale"))
    enlist(tmp_path, "train", "a")
    enlist(tmp_path, "val", "b\n")
    train, val = read(tmp_path, "train"), read(tmp_path, "val")
    assert train.classes == val.classes
    assert train.classes.names == ("ant", "zebra")
    assert train.records[0].labels.tolist() == [2]
    assert val.records[0].labels.tolist() == [1]
    assert "classes are the names in the XML files: ant, zebra" in train.notes


def test_own_set_with_official_names_has_only_its_own(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing("person"), thing("car"))
    assert read(tmp_path).classes.names == ("car", "person")


def test_year_folder_with_other_names_has_these(tmp_path: Path) -> None:
    annotate(tmp_path / "VOC2007", "a", thing("person"), thing("helmet"))
    assert read(tmp_path / "VOC2007").classes.names == ("helmet", "person")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "zebra\ncat\n\nant\n"),
        ("classes.txt", "\ufeffzebra\r\ncat\r\nant"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nzebra:1,2,3::\ncat:::\nant:4,5,6::\n"),
    ],
)
def test_labels_file_decides(tmp_path: Path, name: str, content: str) -> None:
    annotate(tmp_path, "a", thing("cat"))
    (tmp_path / name).write_text(content, encoding="utf-8")
    data = read(tmp_path)
    assert data.classes.names == ("zebra", "cat", "ant")
    assert data.records[0].labels.tolist() == [2]
    assert data.notes == (f"classes are those of {name}", "2 of 3 classes without object: zebra, ant")


@pytest.mark.parametrize(
    ("content", "message"),
    [("ant\n", "object 1 is of the class 'cat'"), ("cat\ncat\n", "a name twice: cat"), (" \n", "no class names")],
)
def test_wrong_labels_files(tmp_path: Path, content: str, message: str) -> None:
    annotate(tmp_path, "a", thing("cat"))
    (tmp_path / "labels.txt").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert caught.value.hint


def test_no_object_at_all_is_no_class(tmp_path: Path) -> None:
    annotate(tmp_path, "a")
    with pytest.raises(DataError, match="no XML file has an object"):
        read(tmp_path)


# --- layout


def test_parts_are_the_lists_of_pictures(tmp_path: Path) -> None:
    annotate(tmp_path, "a b", thing())
    for name in ("train", "trainval", "fold_1"):
        enlist(tmp_path, name, "a b\n")
    enlist(tmp_path, "cat_train", "000012  1\n")  # The devkit's lists of one class are no parts,
    enlist(tmp_path, "val", "")  # nor are empty files.
    found = voc(tmp_path)
    assert [part.name for part in found.parts] == ["fold_1", "train", "trainval"]
    assert len(read(tmp_path, "fold_1")) == 1


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("asked", ["val", "valid"])
def test_parts_by_other_names(tmp_path: Path, name: str, asked: str) -> None:
    annotate(tmp_path, "a", thing())
    enlist(tmp_path, name, "a")
    part = voc(tmp_path).part(asked)
    assert part is not None
    assert part.name == name


def test_without_lists_all_is_one_part(tmp_path: Path) -> None:
    annotate(tmp_path, "b", thing())
    annotate(tmp_path, "a", thing())
    (tmp_path / "JPEGImages" / "c.png").touch()
    (tmp_path / "Annotations" / "._a.xml").touch()
    data = read(tmp_path)
    assert data.name == tmp_path.name
    assert [r.file_name for r in data.records] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    assert f"1 picture of {tmp_path / 'JPEGImages'} left out, without XML file" in data.notes


def test_xml_beside_pictures(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing())
    for folder, name in (("Annotations", "a.xml"), ("JPEGImages", "a.jpg")):
        (tmp_path / folder / name).rename(tmp_path / name)
        (tmp_path / folder).rmdir()
    data = read(tmp_path)
    assert data.records[0].path == tmp_path / "a.jpg"
    assert data.records[0].file_name == "a.jpg"


def test_folders_of_xml_beside_pictures_are_parts(tmp_path: Path) -> None:
    for part, name in (("train", "x"), ("valid", "y")):
        path = annotate(tmp_path / part, "a", thing(name))
        path.rename(tmp_path / part / "a.xml")
        (tmp_path / part / "a.jpg").touch()
    assert [part.name for part in voc(tmp_path).parts] == ["train", "valid"]
    val = read(tmp_path, "val")
    assert val.classes.names == ("x", "y")
    assert val.records[0].file_name == "valid/a.jpg"
    # The same name in both parts is no number; ids are places among all, so that they differ.
    assert [read(tmp_path, part).records[0].image_id for part in ("train", "val")] == [1, 2]


@pytest.mark.parametrize(("annotations", "pictures"), [("annotations", "images"), ("Annotations", "images")])
def test_other_folder_names(tmp_path: Path, annotations: str, pictures: str) -> None:
    annotate(tmp_path / "made", "a", thing())
    (tmp_path / "set").mkdir()
    (tmp_path / "made" / "Annotations").rename(tmp_path / "set" / annotations)
    (tmp_path / "made" / "JPEGImages").rename(tmp_path / "set" / pictures)
    assert read(tmp_path / "set").records[0].file_name == f"{pictures}/a.jpg"


def test_what_is_no_voc_folder(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "pom.xml").write_text("<project/>")
    (tmp_path / "a.jpg").touch()
    assert find_voc(tmp_path) is None
    assert find_voc(tmp_path / "gone") is None


def test_years(tmp_path: Path) -> None:
    for name in ("VOC2012", "VOC2007", "VOC2007-more", "VOCcode"):
        (tmp_path / name).mkdir()
    (tmp_path / "VOC2008").touch()
    assert [year.name for year in find_years(tmp_path)] == ["VOC2007", "VOC2012"]


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        (["000012", "000003"], [12, 3]),
        (["2008_000123", "2007_000001"], [2008000123, 2007000001]),
        (["0", "00"], [1, 2]),
        (["1_23", "12_3"], [2, 1]),
        (["b", "a"], [2, 1]),
        (["7", "a"], [1, 2]),
        (["1" * 30, "2"], [1, 2]),
    ],
)
def test_picture_ids(tmp_path: Path, stems: list[str], expected: list[int]) -> None:
    for stem in stems:
        annotate(tmp_path, stem, thing())
    enlist(tmp_path, "train", "\n".join(stems))
    enlist(tmp_path, "val", stems[0])
    assert [r.image_id for r in read(tmp_path, "train").records] == expected
    assert read(tmp_path, "val").records[0].image_id == expected[0]


def test_pictures_listed_twice_are_taken_once(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing())
    enlist(tmp_path, "train", "a\na\n")
    data = read(tmp_path, "train")
    assert len(data) == 1
    assert "1 picture is listed more than once in train.txt" in data.notes


# --- pictures


def test_images_folder_replaces_the_own(tmp_path: Path) -> None:
    annotate(tmp_path / "set", "a", thing())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").touch()
    record = read(tmp_path / "set", images=tmp_path / "mine").records[0]
    assert (record.path, record.file_name) == (tmp_path / "mine" / "a.png", "a.png")
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "set", images=tmp_path / "gone")


@pytest.mark.parametrize("file_name", ["other.png", "C:\\pictures\\other.png", "/home/me/other.png"])
def test_picture_by_the_name_in_the_xml(tmp_path: Path, file_name: str) -> None:
    annotate(tmp_path, "a", thing(), file_name=file_name)
    (tmp_path / "JPEGImages" / "a.jpg").rename(tmp_path / "JPEGImages" / "other.png")
    assert read(tmp_path).records[0].path == tmp_path / "JPEGImages" / "other.png"


def test_picture_of_the_same_name_goes_first(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing(), file_name="b.jpg")
    annotate(tmp_path, "b", thing(), file_name="b.jpg")
    assert [r.path.name for r in read(tmp_path).records] == ["a.jpg", "b.jpg"]


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing())
    (tmp_path / "JPEGImages" / "a.png").touch()
    with pytest.raises(DataError, match=r"a\.jpg.*a\.png") as caught:
        read(tmp_path)
    assert caught.value.hint
    annotate(tmp_path, "a", thing(), file_name="a.png")
    assert read(tmp_path).records[0].path.name == "a.png"


def test_missing_picture_is_named_with_a_cure(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing(), file_name="../../secret.jpg")
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    (tmp_path / "secret.jpg").touch()
    with pytest.raises(DataError, match=r"picture of .*a\.xml is not in .*JPEGImages") as caught:
        read(tmp_path)
    assert "--images" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "size",
    ["", "<size/>", "<size><width>0</width><height>50</height></size>", "<size><width/><height>50</height></size>"],
)
def test_missing_size_is_read_from_the_picture(tmp_path: Path, size: str) -> None:
    annotate(tmp_path, "a", thing(), size=size)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 60)).save(tmp_path / "JPEGImages" / "a.jpg", exif=turned)
    data = read(tmp_path)
    assert (data.records[0].width, data.records[0].height) == (60, 30)
    assert "1 sizes are not in the XML files and were read from the pictures" in data.notes


# --- what is wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("<annotation>", "not valid XML"),
        ("no xml", "not valid XML"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "not valid XML"),
        ("<project/>", "holds <project>"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation><size><width>x</width><height>5</height></size></annotation>", "size is x x 5"),
        ("<annotation><size><width>-5</width><height>5</height></size></annotation>", "size is -5 x 5"),
        ("<annotation><size><width>nan</width><height>5</height></size></annotation>", "size is nan"),
        ("<annotation><size><width>inf</width><height>5</height></size></annotation>", "size is inf"),
        ("<annotation><size><width>5.5</width><height>5</height></size></annotation>", "size is 5.5"),
        (f"<annotation>{SIZE}<object/></annotation>", "object 1 has no name"),
        (f"<annotation>{SIZE}{thing()}{thing(' ')}</annotation>", "object 2 has no name"),
        (f"<annotation>{SIZE}{thing('cat', '')}</annotation>", "object 1 .cat. has no bndbox"),
        (f"<annotation>{SIZE}{thing('cat', '<bndbox/>')}</annotation>", "bndbox is absent, absent"),
        (f"<annotation>{SIZE}{thing('cat', box(1, 2, 'x', 4))}</annotation>", "bndbox is 1, 2, x, 4"),
        (
            f"<annotation>{SIZE}{thing('cat', box(1, 2, 3, 4) + '<difficult>2</difficult>')}</annotation>",
            "difficult is '2'",
        ),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    annotate(tmp_path, "a", thing()).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert str(Path("Annotations", "a.xml")) in caught.value.message
    assert caught.value.hint


def test_declaration_in_two_byte_text_is_refused(tmp_path: Path) -> None:
    bomb = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>'
    annotate(tmp_path, "a").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path)


def test_latin_letters_are_read(tmp_path: Path) -> None:
    path = annotate(tmp_path, "a")
    text = f'<?xml version="1.0" encoding="ISO-8859-1"?><annotation>{SIZE}{thing("Bär")}</annotation>'
    path.write_bytes(text.encode("latin-1"))
    assert read(tmp_path).classes.names == ("Bär",)


@pytest.mark.parametrize(
    ("line", "cure"), [("gone", "copy"), ("sub/a", "without folder"), ("a.jpg", "without folder"), ("../a", "without")]
)
def test_listed_name_without_xml(tmp_path: Path, line: str, cure: str) -> None:
    annotate(tmp_path, "a", thing())
    enlist(tmp_path, "train", f"a\n{line}\n")
    with pytest.raises(DataError, match=r"train\.txt:2 lists") as caught:
        read(tmp_path, "train")
    assert cure in (caught.value.hint or "")


def test_hidden_test_of_2012_is_said(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    annotate(root, "a", thing("dog"))
    enlist(root, "train", "a")
    enlist(root, "test", "b")
    assert len(read(root, "train")) == 1
    with pytest.raises(DataError, match="VOC2012 test are not public"):
        read(root, "test")


def test_list_that_is_no_text(tmp_path: Path) -> None:
    annotate(tmp_path, "a", thing())
    enlist(tmp_path, "train", "a")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"val\.txt:1 is not UTF-8"):
        find_voc(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 40))
def test_mangled_files_raise_nothing_but_data_error(tmp_path: Path, noise: bytes, start: int, length: int) -> None:
    path = annotate(tmp_path, "a", thing("cat", "<difficult>0</difficult>" + box(1, 2, 30, 40)))
    content = path.read_bytes()
    path.write_bytes(content[:start] + noise + content[start + length :])
    with contextlib.suppress(DataError):
        assert len(read(tmp_path)) == 1


def test_large_set_is_read_quickly(tmp_path: Path) -> None:
    count = 1_000
    for number in range(count):
        annotate(tmp_path, f"{number:06d}", thing(), thing("dog"), thing("cow"))
    start = time.process_time()
    data = read(tmp_path)
    assert data.objects == 3 * count
    # Processor time, which other work on the machine does not count towards; about 0.12 s when it was written.
    assert time.process_time() - start < 1.5
