"""`refinedet data check`: every kind of bad data in a line with file and cure, while the rest is looked at."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

NAMES = ("a", "b", "c")
# In every data set below: found whatever else is wrong, so nothing stopped the work.
CANARY = "box-outside"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three different pictures of 64 x 48."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name in NAMES:
        Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


class Case(NamedTuple):
    """Something wrong: what makes it so, the findings beside the canary, and what the first of them says."""

    spoil: Callable[[Any], None]
    kinds: str
    says: str
    severity: str = "error"


def check(run, source, *args):
    """Run the command; its document, with the kinds that need not be looked at taken out."""
    ended = run("data", "check", source, "--preset", "tiny", "--json", "--quiet", "--workers", 1, *args)
    document = json.loads(ended.stdout)
    assert "kinds" in document, ended.stderr
    kinds = {k["kind"]: k for k in document["kinds"] if k["kind"] not in ("box-out-of-reach", CANARY)}
    assert CANARY in {k["kind"] for k in document["kinds"]}, "the rest was not looked at"
    return ended, kinds


def expect(run, source, case):
    severity = {"error": 4, "warning": 0, "note": 0}[case.severity]
    ended, kinds = check(run, source)
    assert " ".join(kinds) == case.kinds
    found = kinds[case.kinds.split()[0]]
    assert found["severity"] == case.severity
    line = f"{found['first']['file']}: {found['first']['where']}: {found['first']['detail']}"
    assert case.says in line
    assert found["first"]["file"]
    assert found["first"]["cure"]
    assert ended.code == 4  # The canary is an error itself.
    assert "Traceback" not in ended.stderr
    assert severity in (0, 4)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def huge_png(path: Path) -> None:
    """A picture whose header says 30,000 x 30,000, and that ends there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# COCO ----------------------------------------------------------------------------------------------------------------


class Coco:
    """A sound COCO JSON but for the canary, to be spoilt."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.folder, self.path = folder, folder / "set.json"
        for name in NAMES:
            shutil.copy(pictures / f"{name}.png", folder)
        self.images = [
            {"id": i, "file_name": f"{n}.png", "width": 64, "height": 48} for i, n in enumerate(NAMES, start=1)
        ]
        self.objects = [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 20]},
            {"id": 2, "image_id": 2, "category_id": 2, "bbox": [2, 2, 20, 20]},
            {"id": 3, "image_id": 3, "category_id": 1, "bbox": [4, 4, 20, 20]},
            {"id": 4, "image_id": 3, "category_id": 1, "bbox": [900, 900, 9, 9]},
        ]
        self.classes = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        self.text: str | None = None

    def write(self) -> Path:
        document = {"images": self.images, "annotations": self.objects, "categories": self.classes}
        self.path.write_text(json.dumps(document) if self.text is None else self.text)
        return self.path

    def first(self, **changes: Any) -> None:
        """Change the first object."""
        self.objects[0].update(changes)

    def box(self, *box: Any) -> None:
        self.first(bbox=list(box))

    def name(self, name: Any) -> None:
        self.images[0]["file_name"] = name

    def add(self, **entry: Any) -> None:
        """Add a picture with one object."""
        self.images.append({"id": 9, "width": 64, "height": 48, **entry})
        self.objects.append({"id": 9, "image_id": 9, "category_id": 2, "bbox": [3, 3, 20, 20]})


def _link_out(data):
    outside = data.folder.parent / f"{data.folder.name}-outside.png"
    shutil.copy(data.folder / "a.png", outside)
    (data.folder / "link.png").symlink_to(outside)
    data.name("link.png")


def _folder_out(data):
    outside = data.folder.parent / f"{data.folder.name}-outside"
    outside.mkdir()
    shutil.copy(data.folder / "a.png", outside)
    (data.folder / "away").symlink_to(outside)
    data.name("away/a.png")


def _pipe(data):
    os.mkfifo(data.folder / "pipe.png")
    data.name("pipe.png")


def _save(data, name, **options):
    with Image.open(data.folder / "a.png") as image:
        image.save(data.folder / name, **options)
    data.name(name)


def _turned(data, orientation, *, size):
    _save(data, "turned.jpg", exif=exif(orientation))
    data.images[0].update(width=size[0], height=size[1])


def _write(name, content):
    def spoil(data):
        (data.folder / name).write_bytes(content)
        data.name(name)

    return spoil


COCO = {
    # entries
    "object no object": Case(lambda d: d.objects.append(7), "entry-malformed", "annotations[4]: is a JSON number"),
    "picture no object": Case(lambda d: d.images.append("x"), "entry-malformed", "images[3]: is a JSON string"),
    "class no object": Case(lambda d: d.classes.append(None), "entry-malformed", "categories[2]: is a JSON null"),
    "no bbox": Case(lambda d: d.objects[0].pop("bbox"), "entry-malformed", "annotations[0] (id 1): has no 'bbox'"),
    "bbox of three": Case(lambda d: d.box(1, 2, 3), "entry-malformed", "bbox is [1, 2, 3]"),
    "bbox of text": Case(lambda d: d.box(1, 2, 3, "4"), "entry-malformed", 'bbox is [1, 2, 3, "4"]'),
    "no image_id": Case(lambda d: d.objects[0].pop("image_id"), "entry-malformed picture-empty", "has no 'image_id'"),
    "no category_id": Case(lambda d: d.objects[0].pop("category_id"), "entry-malformed", "has no 'category_id'"),
    "id of text": Case(lambda d: d.first(id="one"), "entry-malformed", 'annotations[0]: id is "one"'),
    "fractional id": Case(lambda d: d.first(category_id=1.5), "entry-malformed", "category_id is 1.5"),
    "flag of text": Case(lambda d: d.first(iscrowd="no"), "entry-malformed", 'iscrowd is "no"'),
    "no file_name": Case(lambda d: d.images[0].pop("file_name"), "entry-malformed", "images[0] (id 1): has no"),
    "empty file_name": Case(lambda d: d.name(""), "entry-malformed", 'file_name is ""'),
    "NUL in file_name": Case(lambda d: d.name("a\0.png"), "entry-malformed", "file_name is"),
    "size of text": Case(lambda d: d.images[0].update(width="64"), "entry-malformed", 'width is "64"'),
    "negative size": Case(lambda d: d.images[0].update(width=-64), "entry-malformed", "the size is -64 x 48"),
    "two faults of one object": Case(
        lambda d: d.first(image_id="x", iscrowd=3), "entry-malformed picture-empty", 'image_id is "x"'
    ),
    "picture id twice": Case(lambda d: d.images[1].update(id=1), "id-twice picture-unknown picture-empty", "images[1]"),
    "object id twice": Case(lambda d: d.first(id=2), "id-twice", "annotations[1]: annotation id 2"),
    "class id twice": Case(lambda d: d.classes.append({"id": 1, "name": "cow"}), "id-twice", "categories[2]"),
    "picture not listed": Case(lambda d: d.first(image_id=77), "picture-unknown picture-empty", "image_id is 77"),
    "listed twice": Case(
        lambda d: d.add(file_name="a.png"), "picture-listed-twice", '"a.png" is images[0] already', "warning"
    ),
    "size absent": Case(lambda d: d.images[0].pop("width"), "size-absent", "images[0]", "note"),
    "crowd": Case(lambda d: d.first(iscrowd=1), "crowd", "annotations[0] (id 1)", "note"),
    "difficult": Case(lambda d: d.first(difficult=1), "difficult", "annotations[0] (id 1)", "note"),
    "no objects": Case(lambda d: d.objects.pop(0), "picture-empty", "images[0]", "note"),
    # classes
    "class not listed": Case(lambda d: d.first(category_id=40), "class-unknown", "category_id is 40"),
    "class name twice": Case(
        lambda d: d.classes.append({"id": 3, "name": "cat"}), "class-twice class-unused", "'cat' is there already"
    ),
    "class without name": Case(lambda d: d.classes.append({"id": 3, "name": " "}), "entry-malformed", 'name is " "'),
    "classes alike": Case(
        lambda d: (d.classes.append({"id": 3, "name": "Cat"}), d.first(category_id=3)),
        "class-alike",
        "'cat' and 'Cat'",
        "warning",
    ),
    "class unused": Case(lambda d: d.classes.append({"id": 3, "name": "cow"}), "class-unused", "cow", "warning"),
    "gaps": Case(
        lambda d: (d.classes[1].update(id=90), d.objects[1].update(category_id=90)),
        "class-gaps",
        "2 ids from 1 to 90",
        "note",
    ),
    # boxes
    "NaN": Case(lambda d: d.box(float("nan"), 1, 2, 3), "box-not-finite", "annotations[0] (id 1): cat, 2 x 3 px"),
    "null": Case(lambda d: d.box(None, 1, 2, 3), "box-not-finite", "annotations[0] (id 1)"),
    "infinite": Case(lambda d: d.box(0, 0, float("inf"), 3), "box-not-finite", "cat, inf x 3 px at (0, 0)"),
    "inverted": Case(lambda d: d.box(20, 20, -10, 5), "box-inverted", "cat, -10 x 5 px at (20, 20) of 64 x 48"),
    "no width": Case(lambda d: d.box(20, 20, 0, 5), "box-no-area", "0 x 5 px"),
    "a hair's width": Case(lambda d: d.box(20, 20, 1e-5, 5), "box-no-area", "1e-05 x 5 px"),
    "outside above": Case(lambda d: d.box(5, -30, 10, 20), "", ""),
    "reaches out": Case(lambda d: d.box(50, 10, 20, 20), "box-reaches-out", "20 x 20 px at (50, 10)", "warning"),
    "reaches out a little": Case(lambda d: d.box(-0.5, 10, 20, 20), "box-rounding", "at (-0.5, 10)", "note"),
    "huge numbers": Case(lambda d: d.box(1e308, 0, 1e308, 5), "", ""),
    "box twice": Case(
        lambda d: d.objects.append({"id": 9, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 20]}),
        "box-twice",
        "annotations[4] (id 9)",
        "warning",
    ),
    # pictures
    "missing": Case(lambda d: d.name("gone.png"), "picture-missing", "images[0]: gone.png does not exist"),
    "missing folder": Case(lambda d: d.name("gone/a.png"), "picture-missing", "a.png does not exist"),
    "dangling link": Case(
        lambda d: ((d.folder / "x.png").symlink_to("nowhere"), d.name("x.png")), "picture-missing", "x.png"
    ),
    "name too long": Case(lambda d: d.name("x" * 3000), "picture-unreadable", "cannot be read"),
    "empty file": Case(_write("x.png", b""), "picture-unreadable", "x.png is empty"),
    "text": Case(_write("x.png", b"no picture at all"), "picture-unreadable", "x.png is not a picture"),
    "LFS pointer": Case(
        _write("x.png", b"version https://git-lfs.github.com/spec/v1\n"), "picture-unreadable", "Git LFS pointer"
    ),
    "folder": Case(
        lambda d: ((d.folder / "x.png").mkdir(), d.name("x.png")), "picture-unreadable", "is a folder, not a file"
    ),
    "pipe": Case(_pipe, "picture-unreadable", "pipe.png is not an ordinary file"),
    "cut off": Case(lambda d: cut(d.folder / "a.png"), "picture-damaged", "a.png is damaged"),
    "cut off JPEG": Case(
        lambda d: (_save(d, "cut.jpg", quality=95), cut(d.folder / "cut.jpg")), "picture-damaged", "cut.jpg is damaged"
    ),
    "too large": Case(
        lambda d: (huge_png(d.folder / "x.png"), d.name("x.png"), d.images[0].update(width=30000, height=30000)),
        "picture-too-large",
        "30,000 x 30,000 pixels",
    ),
    "other size": Case(lambda d: d.images[0].update(width=640), "size-differs", "640 x 48 is stated, a.png is 64 x 48"),
    "turned": Case(lambda d: _turned(d, 6, size=(64, 48)), "size-turned", "64 x 48 is stated, turned.jpg is 48 x 64"),
    "turned and stated so": Case(lambda d: _turned(d, 6, size=(48, 64)), "", ""),
    "upside down": Case(
        lambda d: _turned(d, 3, size=(64, 48)), "picture-turned", "turned.jpg, EXIF orientation 3", "warning"
    ),
    "same pixels": Case(
        lambda d: (Image.open(d.folder / "a.png").save(d.folder / "z.bmp"), d.add(file_name="z.bmp")),
        "picture-twice",
        "z.bmp is a.png",
        "warning",
    ),
    # hostile names
    "upwards": Case(lambda d: d.name("../a.png"), "picture-leads-out", "leads out of the folder"),
    "far up": Case(lambda d: d.name("x/../../../etc/passwd"), "picture-leads-out", "leads out of the folder"),
    "absolute": Case(lambda d: d.name("/etc/passwd"), "picture-leads-out", '"/etc/passwd" leads out'),
    "device": Case(lambda d: d.name("/dev/zero"), "picture-leads-out", '"/dev/zero" leads out'),
    "drive": Case(lambda d: d.name("C:\\a.png"), "picture-leads-out", "leads out of the folder"),
    "link out": Case(_link_out, "picture-leads-out", "link.png is a link out of"),
    "linked folder out": Case(_folder_out, "picture-leads-out", "away/a.png is a link out of"),
}


@pytest.mark.parametrize("case", COCO.values(), ids=COCO)
def test_bad_coco(run, tmp_path, pictures, case):
    data = Coco(tmp_path, pictures)
    case.spoil(data)
    path = data.write()
    if case.kinds:
        expect(run, path, case)
    else:
        assert check(run, path)[1] == {}


def test_sound_data_is_sound(run, tmp_path, pictures):
    data = Coco(tmp_path, pictures)
    del data.objects[3]
    ended = run("data", "check", data.write(), "--preset", "tiny", "--strict")
    assert ended.code == 0
    assert "Nothing to find fault with." in ended.stdout
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b'{"images": [', "is not valid JSON (line 1"),
        (b"[]", "holds a JSON list"),
        (b'[{"score": 1}]', "is a list of COCO results"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"images": {}, "annotations": [], "categories": []}', "images is a JSON object"),
        (b'{"annotations": [], "categories": []}', "has no 'images'"),
    ],
)
def test_a_broken_file_leaves_the_other_parts_to_be_checked(run, tmp_path, pictures, content, says):
    data = Coco(tmp_path, pictures)
    data.path = tmp_path / "val.json"
    data.write()
    (tmp_path / "train.json").write_bytes(content)
    ended, kinds = check(run, tmp_path)
    assert ended.code == 4
    first = kinds["file-unreadable"]["first"]
    assert first["file"] == "train.json"
    assert says in first["detail"]
    assert first["cure"]


# VOC -----------------------------------------------------------------------------------------------------------------


class Voc:
    """A sound VOC folder but for the canary, to be spoilt."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.folder = folder
        for inner in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / inner).mkdir(parents=True)
        for name in NAMES:
            shutil.copy(pictures / f"{name}.png", folder / "JPEGImages")
        self.xml = {
            "a": self.annotation("a", ("cat", 3, 3, 22, 22)),
            "b": self.annotation("b", ("dog", 3, 3, 22, 22)),
            "c": self.annotation("c", ("cat", 3, 3, 22, 22), ("cat", 900, 900, 910, 910)),
        }
        self.listing: str | None = "a\nb\nc\n"

    def annotation(self, name: str, *objects: tuple[Any, ...], size: str | None = None) -> str:
        size = size or "<size><width>64</width><height>48</height></size>"
        inner = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
            "</bndbox></object>"
            for label, x1, y1, x2, y2 in objects
        )
        return f"<annotation><filename>{name}.png</filename>{size}{inner}</annotation>"

    def write(self) -> Path:
        for name, text in self.xml.items():
            (self.folder / "Annotations" / f"{name}.xml").write_text(text)
        if self.listing is not None:
            (self.folder / "ImageSets" / "Main" / "train.txt").write_text(self.listing)
        return self.folder

    def replace(self, old: str, new: str) -> None:
        assert old in self.xml["a"]
        self.xml["a"] = self.xml["a"].replace(old, new, 1)

    def picture(self, name: str) -> Path:
        return self.folder / "JPEGImages" / name


def _labels(text):
    return lambda data: (data.folder / "labels.txt").write_text(text)


def _voc_link(data):
    outside = data.folder.parent / f"{data.folder.name}-outside.png"
    shutil.move(data.picture("a.png"), outside)
    data.picture("a.png").symlink_to(outside)


VOC = {
    "broken XML": Case(lambda d: d.replace("</annotation>", ""), "file-unreadable", "a.xml: : is not valid XML"),
    "document type": Case(
        lambda d: d.replace("<annotation>", "<!DOCTYPE x [<!ENTITY e 'e'>]><annotation>"),
        "file-unreadable",
        "declares a document type",
    ),
    "other XML": Case(lambda d: d.xml.update(a="<svg/>"), "file-unreadable", "it holds <svg>"),
    "no name": Case(lambda d: d.replace("cat", ""), "entry-malformed", "object 1: has no name"),
    "no box": Case(lambda d: d.replace("bndbox>", "box>"), "file-unreadable", "is not valid XML"),
    "no number": Case(lambda d: d.replace(">22<", ">x<"), "entry-malformed", "bndbox is 3, 3, x, 22"),
    "difficult is odd": Case(
        lambda d: d.replace("</bndbox>", "</bndbox><difficult>2</difficult>"),
        "entry-malformed",
        "difficult is '2'",
    ),
    "difficult": Case(
        lambda d: d.replace("</bndbox>", "</bndbox><difficult>1</difficult>"), "difficult", "object 1", "note"
    ),
    "size is odd": Case(lambda d: d.replace("64", "wide"), "entry-malformed", "a.xml: size: the size is wide x 48"),
    "size absent": Case(lambda d: d.replace(">64<", ">0<"), "size-absent", "a.xml", "note"),
    "other size": Case(lambda d: d.replace("64", "99"), "size-differs", "99 x 48 is stated"),
    "picture missing": Case(lambda d: d.picture("a.png").unlink(), "picture-missing", "a.xml"),
    "two pictures": Case(
        lambda d: (shutil.copy(d.picture("a.png"), d.picture("a.bmp")), d.replace("a.png", "none.png")),
        "picture-missing",
        "may be of",
    ),
    "link out": Case(_voc_link, "picture-leads-out", "a.png is a link out of"),
    "cut off": Case(lambda d: cut(d.picture("a.png")), "picture-damaged", "a.png is damaged"),
    "listed, not there": Case(
        lambda d: setattr(d, "listing", "a\nb\nc\nd\n"), "part-missing", "line 4: d.xml is not in"
    ),
    "listed twice": Case(
        lambda d: setattr(d, "listing", "a\nb\nc\na\n"), "picture-listed-twice", "line 4: a", "warning"
    ),
    "begins at 0": Case(lambda d: d.replace("<xmin>3", "<xmin>0"), "box-from-zero", "a.xml: object 1", "warning"),
    "swapped": Case(lambda d: d.replace("<xmax>22", "<xmax>1"), "box-inverted", "cat, -1 x 20 px at (2, 2)"),
    "one pixel": Case(lambda d: d.replace("<xmax>22", "<xmax>3"), "", ""),
    "no width": Case(lambda d: d.replace("<xmax>22", "<xmax>2"), "box-no-area", "0 x 20 px"),
    "NaN": Case(lambda d: d.replace("<xmax>22", "<xmax>nan"), "box-not-finite", "object 1"),
    "reaches out": Case(lambda d: d.replace("<xmax>22", "<xmax>70"), "box-reaches-out", "of 64 x 48", "warning"),
    "class not listed": Case(
        lambda d: (_labels("cat\ndog\n")(d), d.replace("cat", "cow")),
        "class-unknown",
        "object 1: class 'cow' is not listed",
    ),
    "class listed twice": Case(_labels("cat\ndog\ncat\n"), "class-twice", "labels.txt: : has a name twice: cat"),
    "class unused": Case(_labels("cat\ndog\ncow\n"), "class-unused", "cow", "warning"),
    "classes alike": Case(lambda d: d.replace("cat", "Cat"), "class-alike", "'Cat' and 'cat'", "warning"),
    "not annotated": Case(
        lambda d: (
            setattr(d, "listing", None),
            Image.new("RGB", (9, 9)).save(d.picture("d.png")),
        ),
        "picture-left-out",
        "d.png",
        "note",
    ),
}


@pytest.mark.parametrize("case", VOC.values(), ids=VOC)
def test_bad_voc(run, tmp_path, pictures, case):
    data = Voc(tmp_path, pictures)
    case.spoil(data)
    path = data.write()
    if case.kinds:
        expect(run, path, case)
    else:
        assert check(run, path)[1] == {}


# YOLO ----------------------------------------------------------------------------------------------------------------


class Yolo:
    """A sound YOLO folder but for the canary, to be spoilt."""

    def __init__(self, folder: Path, pictures: Path) -> None:
        self.folder = folder
        for inner in ("images", "labels"):
            (folder / inner).mkdir()
        for name in NAMES:
            shutil.copy(pictures / f"{name}.png", folder / "images")
        self.rows = {"a": "0 .4 .4 .4 .4\n", "b": "1 .4 .4 .4 .4\n", "c": "0 .4 .4 .4 .4\n0 9 9 .1 .1\n"}
        self.yaml = "train: images\nnames: [cat, dog]\n"

    def write(self) -> Path:
        (self.folder / "data.yaml").write_text(self.yaml)
        for name, text in self.rows.items():
            (self.folder / "labels" / f"{name}.txt").write_bytes(text.encode("latin-1"))
        return self.folder / "data.yaml"

    def row(self, text: str) -> None:
        self.rows["a"] = text

    def list(self, *lines: str) -> None:
        (self.folder / "list.txt").write_text("\n".join(["images/a.png", "images/b.png", "images/c.png", *lines]))
        self.yaml = self.yaml.replace("images", "list.txt")

    def picture(self, name: str) -> Path:
        return self.folder / "images" / name


def _yolo_turned(data):
    with Image.open(data.picture("a.png")) as image:
        image.save(data.picture("a.jpg"), exif=exif(6))
    data.picture("a.png").unlink()


YOLO = {
    "no class": Case(lambda d: d.row("cat .5 .5 .1 .1"), "entry-malformed", "line 1: the class is 'cat'"),
    "fractional class": Case(lambda d: d.row("0.5 .5 .5 .1 .1"), "entry-malformed", "the class is '0.5'"),
    "unknown class": Case(lambda d: d.row("7 .5 .5 .1 .1"), "class-unknown", "a.txt: line 1: there is no class 7"),
    "a score": Case(lambda d: d.row("0 .5 .5 .1 .1 .9"), "entry-malformed", "has 5 numbers behind"),
    "no number": Case(lambda d: d.row("0 .5 .5 .1 wide"), "entry-malformed", "'wide' is no number"),
    "only the bad row": Case(lambda d: d.row("0 .4 .4 .4 .4\n0 1 2\n"), "entry-malformed", "a.txt: line 2"),
    "NaN": Case(lambda d: d.row("0 nan .5 .1 .1"), "box-not-finite", "a.txt: line 1"),
    "inverted": Case(lambda d: d.row("0 .5 .5 -.1 .1"), "box-inverted", "cat, -6.4 x 4.8 px"),
    "no width": Case(lambda d: d.row("0 .5 .5 0 .1"), "box-no-area", "0 x 4.8 px"),
    "reaches out": Case(lambda d: d.row("0 .9 .5 .4 .4"), "box-reaches-out", "of 64 x 48", "warning"),
    "pixels": Case(lambda d: d.row("0 .4 .4 .4 .4\n0 30 30 8 8"), "", ""),
    "box twice": Case(lambda d: d.row("0 .4 .4 .4 .4\n0 .4 .4 .4 .4"), "box-twice", "a.txt: line 2", "warning"),
    "not UTF-8": Case(lambda d: d.row("0 .4 .4 .4 .4 \xe9"), "file-unreadable", "a.txt: : is not UTF-8"),
    "no label file": Case(lambda d: d.rows.pop("a"), "picture-unlabelled", "a.png", "note"),
    "label file alone": Case(lambda d: d.rows.update(z="0 .4 .4 .4 .4"), "label-without-picture", "z.txt", "warning"),
    "outline": Case(lambda d: d.row("0 .2 .2 .6 .2 .6 .6 .2 .6"), "", ""),
    "class unused": Case(
        lambda d: setattr(d, "yaml", "train: images\nnames: [cat, dog, cow]\n"), "class-unused", "cow", "warning"
    ),
    "missing part": Case(
        lambda d: setattr(d, "yaml", d.yaml + "val: elsewhere\n"),
        "part-missing no-pictures",
        "names elsewhere, which does not exist",
    ),
    "listed, missing": Case(lambda d: d.list("images/z.png"), "picture-missing", "list.txt: line 4: images/z.png"),
    "listed twice": Case(
        lambda d: d.list("images/a.png"), "picture-listed-twice", "list.txt: line 4: a.png", "warning"
    ),
    "listed outside": Case(lambda d: d.list("../../../etc/passwd"), "picture-leads-out", "list.txt: line 4"),
    "a device listed": Case(lambda d: d.list("/dev/zero"), "picture-leads-out", "line 4: /dev/zero"),
    "damaged": Case(lambda d: cut(d.picture("a.png")), "picture-damaged", "a.png: : is damaged"),
    "turned": Case(_yolo_turned, "picture-turned", "EXIF orientation 6", "warning"),
}


@pytest.mark.parametrize("case", YOLO.values(), ids=YOLO)
def test_bad_yolo(run, tmp_path, pictures, case):
    data = Yolo(tmp_path, pictures)
    case.spoil(data)
    path = data.write()
    if case.kinds:
        expect(run, path, case)
    else:
        assert check(run, path)[1] == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: images\nnames: [cat, cat]\n", "the name 'cat' is there twice"),
        ("train: images\nnc: 3\nnames: [cat, dog]\n", "nc is 3, but there are 2 names"),
        ("names: [cat]\n", "names no train, val or test"),
        ("train: [\n", "is not valid YAML"),
    ],
)
def test_a_bad_data_yaml_is_a_finding(run, tmp_path, text, says):
    (tmp_path / "data.yaml").write_text(text)
    ended = run("data", "check", tmp_path / "data.yaml", "--json")
    first = json.loads(ended.stdout)["kinds"][0]["first"]
    assert (ended.code, first["file"]) == (4, "data.yaml")
    assert says in first["detail"]


# Between parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def divided(tmp_path, pictures):
    """Parts train and val of other pictures, without the canary."""

    def make(spoil=lambda train, val: None):
        parts = {}
        for part, shade in (("train", 0), ("val", 9)):
            (tmp_path / part).mkdir()
            parts[part] = data = Coco(tmp_path / part, pictures)
            data.path = tmp_path / part / "_annotations.coco.json"
            del data.objects[3]
            for name in NAMES:
                with Image.open(pictures / f"{name}.png") as image:
                    image.point(lambda v, by=shade: min(255, v + by)).save(tmp_path / part / f"{name}.png")
        spoil(parts["train"], parts["val"])
        for data in parts.values():
            data.write()
        return tmp_path

    return make


def _leak(train, val):
    shutil.copy(train.folder / "a.png", val.folder / "b.png")


def _no_cats(train, val):
    val.objects = [o for o in val.objects if o["category_id"] == 2]


def _cats_elsewhere(train, val):
    for thing in train.objects:
        thing["category_id"] = 2


BETWEEN = [
    (lambda train, val: None, ""),
    (_leak, "picture-in-two-parts"),
    (_no_cats, "picture-empty class-unmeasured"),
    (lambda train, val: val.classes[0].update(name="cow"), "classes-differ class-unmeasured"),
    (lambda train, val: val.objects.clear(), "no-objects"),
    (_cats_elsewhere, "class-elsewhere"),
]


@pytest.mark.parametrize(("spoil", "kinds"), BETWEEN)
@pytest.mark.parametrize("depth", ["headers", "pixels"])
def test_parts_are_compared(run, divided, spoil, kinds, depth):
    ended = run("data", "check", divided(spoil), "--preset", "tiny", "--depth", depth, "--json")
    found = {k["kind"] for k in json.loads(ended.stdout)["kinds"]} - {"box-out-of-reach"}
    assert found - {"class-unmeasured"} == set(kinds.split()) - {"class-unmeasured"}


def test_a_class_of_another_part_names_it(run, divided):
    kinds = json.loads(run("data", "check", divided(_cats_elsewhere), "--preset", "tiny", "--json").stdout)["kinds"]
    (found,) = (k for k in kinds if k["kind"] == "class-elsewhere")
    assert re.fullmatch(r"cat: \d in val", found["first"]["detail"])


def test_a_leak_names_both_pictures_and_strict_fails(run, divided):
    folder = divided(_leak)
    lenient = run("data", "check", folder, "--preset", "tiny", "--json")
    (leak,) = (k for k in json.loads(lenient.stdout)["kinds"] if k["kind"] == "picture-in-two-parts")
    assert leak["first"]["file"] == "val/_annotations.coco.json"
    assert leak["first"]["detail"] == "b.png is a.png of train"
    assert lenient.code == 0
    strict = run("data", "check", folder, "--preset", "tiny", "--strict")
    assert strict.code == 4
    assert "error: 1 warnings" not in strict.stderr
    assert "1 warning" in strict.stderr


def test_val_names_other_data(run, divided):
    folder = divided(_leak)
    train, val = (folder / part / "_annotations.coco.json" for part in ("train", "val"))
    document = json.loads(run("data", "check", train, "--val", val, "--preset", "tiny", "--json").stdout)
    assert [part["pictures"] for part in document["parts"]] == [3, 3]
    assert "picture-in-two-parts" in {k["kind"] for k in document["kinds"]}
    twice = run("data", "check", train, "--val", val, "--val", val, "--preset", "tiny", "--json")
    assert len(json.loads(twice.stdout)["parts"]) == 3
    alone = json.loads(run("data", "check", f"{folder}:val", "--preset", "tiny", "--json").stdout)
    assert [part["name"] for part in alone["parts"]] == ["val"]


# What is written -----------------------------------------------------------------------------------------------------


def _tree(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        digest.update(f"{path.relative_to(folder)} {status.st_mode} {status.st_size} {status.st_mtime_ns}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def test_the_data_is_left_as_it_was_and_all_findings_are_written(run, tmp_path, pictures):
    (tmp_path / "data").mkdir()
    data = Coco(tmp_path / "data", pictures)
    data.box(50, 30, 40, 40)
    data.objects += [{"id": 10 + i, "image_id": 2, "category_id": 1, "bbox": [5, 5, 0, i]} for i in range(7)]
    cut(tmp_path / "data" / "c.png")
    path = data.write()
    before = _tree(tmp_path / "data")
    out = tmp_path / "out"
    ended = run("data", "check", path, "--preset", "tiny", "--out", out)
    assert ended.code == 4
    assert _tree(tmp_path / "data") == before
    document = json.loads((out / "findings.json").read_text())
    assert (document["schema_version"], document["command"]) == (1, "data check")
    kinds = [finding["kind"] for finding in document["findings"]]
    assert kinds.count("box-no-area") == 7
    assert {k["kind"]: k["count"] for k in document["kinds"]} == {kind: kinds.count(kind) for kind in set(kinds)}
    drawn = sorted(p.name for p in (out / "worst").iterdir())
    assert {"box-no-area-1.jpg", "box-reaches-out-1.jpg"} <= set(drawn)
    assert (out / "worst.jpg").is_file()
    assert f"wrote {out / 'findings.json'} and {len(drawn) + 1} pictures" in ended.stderr


def test_table_and_document_agree(run, tmp_path, pictures):
    data = Coco(tmp_path, pictures)
    data.objects.append({"id": 9, "image_id": 1, "category_id": 1, "bbox": [800, 2, 3, 3]})
    path = data.write()
    table = run("data", "check", path, "--preset", "tiny").stdout
    document = json.loads(run("data", "check", path, "--preset", "tiny", "--json").stdout)
    for kind in document["kinds"]:
        (line,) = (line for line in table.splitlines() if line.startswith(f" {kind['title']} "))
        assert f" {kind['count']:,} " in line
        assert kind["first"]["where"] in line
        assert kind["cure"] in line
    assert document["kinds"][0]["count"] == 2
    assert "mend the errors" in table


def test_entries_alone_open_no_picture(run, tmp_path, pictures):
    data = Coco(tmp_path, pictures)
    data.name("gone.png")
    path = data.write()
    assert "picture-missing" not in check(run, path, "--depth", "entries")[1]
    assert "picture-missing" in check(run, path, "--depth", "headers")[1]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("gone",), 4, "does not exist"),
        (("{data}:test",), 4, "no part test"),
        (("{data}", "--preset", "none"), 3, "none"),
        (("{data}", "--preset", "tiny", "--weights", "x"), 2, "exclude each other"),
        (("{data}", "--images", "gone"), 4, "gone does not exist"),
        (("{data}", "--out", "{data}"), 2, "is a file"),
        (("{data}", "--depth", "deep"), 2, "deep"),
    ],
)
def test_what_cannot_be_checked_is_refused(run, tmp_path, pictures, args, code, says):
    path = Coco(tmp_path, pictures).write()
    ended = run("data", "check", *(arg.replace("{data}", str(path)) for arg in args))
    assert ended.code == code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
