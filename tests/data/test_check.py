"""The parts of the data check by themselves: the collector, the judges, and the look at pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.data.check import (
    BOX_TWICE,
    INVERTED,
    KINDS,
    LEADS_OUT,
    LEAK,
    NO_AREA,
    NOT_FINITE,
    OUTSIDE,
    REACHES_OUT,
    REACHES_OUT_LITTLE,
    SAME_PICTURE,
    SEVERITIES,
    UNREADABLE,
    Findings,
    Listed,
)
from refinedet_cli.data.check_boxes import judge_boxes
from refinedet_cli.data.check_entries import Part
from refinedet_cli.data.check_pictures import ListedPart, judge_pictures, look_at, look_at_all, same_pictures
from refinedet_cli.data.check_source import scan_source
from refinedet_cli.data.records import Objects, Pictures, make_records
from refinedet_cli.errors import DataError


def test_kinds_are_told_apart_and_say_what_to_do():
    assert len({kind.name for kind in KINDS}) == len({kind.title for kind in KINDS}) == len(KINDS)
    for kind in KINDS:
        assert kind.severity in SEVERITIES
        assert 0 < len(kind.title) <= 40
        assert kind.cure


@pytest.mark.parametrize("keep", [False, True])
def test_findings_are_counted_and_the_first_kept(tmp_path, keep):
    findings = Findings(tmp_path, keep=keep)
    for i in range(3):
        findings.add(REACHES_OUT, tmp_path / "inner" / "a.json", f"annotations[{i}]")
    findings.add(NO_AREA, Path("/elsewhere/b.json"))
    assert [(t.kind, t.count) for t in findings.tallies] == [(NO_AREA, 1), (REACHES_OUT, 3)]
    assert findings.tallies[1].first.place == "inner/a.json: annotations[0]"
    assert findings.tallies[0].first.file == "/elsewhere/b.json"
    assert (findings.count("error"), findings.count("warning"), findings.count("note")) == (1, 3, 0)
    assert len(findings.kept) == (4 if keep else 0)


def test_a_readers_message_is_not_repeated(tmp_path):
    findings = Findings(tmp_path)
    file = tmp_path / "a.json"
    findings.fault(UNREADABLE, file, "images[3]", DataError(f"{file}: images[3]: id is null", "number it"))
    first = findings.tallies[0].first
    assert (first.file, first.where, first.detail, first.cure) == ("a.json", "images[3]", "id is null", "number it")


# Boxes ---------------------------------------------------------------------------------------------------------------


def part(boxes, *, relative=False, picture=None, label=None):
    count = len(boxes)
    return Part(
        name="train",
        file=Path("a.json"),
        classes=("cat", "dog"),
        category_ids=(1, 2),
        pictures=[Listed(Path(f"{i}.png"), None, Path("a.json"), f"images[{i}]") for i in range(2)],
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        picture=np.zeros(count, dtype=np.int64) if picture is None else np.array(picture),
        label=np.ones(count, dtype=np.int64) if label is None else np.array(label),
        crowd=np.zeros(count, dtype=bool),
        difficult=np.zeros(count, dtype=bool),
        relative=relative,
        place=lambda i: (Path("a.json"), f"annotations[{i}]"),
        uncertain=frozenset(),
    )


def judged(given, sizes=((100, 50), (100, 50))):
    findings = Findings(Path(), keep=True)
    result = judge_boxes(given, sizes, findings)
    return result, [(f.kind, int(f.where[12:-1])) for f in findings.kept]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ((0, 0, 100, 50), None),
        ((99.5, 0, 0.5, 50), None),
        ((0, 0, 100.01, 50), None),
        ((NAN, 0, 1, 1), NOT_FINITE),
        ((0, -INF, 1, 1), NOT_FINITE),
        ((5, 5, -1, 1), INVERTED),
        ((5, 5, 0, -1), INVERTED),
        ((5, 5, 0, 1), NO_AREA),
        ((5, 5, 1, 0.009), NO_AREA),
        ((100, 5, 1, 1), OUTSIDE),
        ((-3, 5, 3, 1), OUTSIDE),
        ((1e300, 0, 1e300, 1), OUTSIDE),
        ((-1e308, 0, 1.5e308, 9), REACHES_OUT),
        ((-1.5, 5, 9, 9), REACHES_OUT),
        ((95, 5, 9, 9), REACHES_OUT),
        ((-1, 5, 9, 9), REACHES_OUT_LITTLE),
        ((92, 41, 8, 9.5), REACHES_OUT_LITTLE),
    ],
)
def test_each_box_is_judged(box, kind):
    result, found = judged(part([(1, 1, 2, 2), box]))
    assert found == ([] if kind is None else [(kind, 1)])
    assert result.good.tolist() == [True, kind is None or kind.severity != "error"]


def test_what_is_good_is_what_the_readers_keep():
    draw = np.random.default_rng(0)
    boxes = np.concatenate([draw.uniform(-60, 140, (400, 2)), draw.uniform(-9, 90, (400, 2))], axis=1).round(1)
    boxes[draw.integers(0, 400, 30), draw.integers(0, 4, 30)] = NAN
    result, _ = judged(part(boxes))
    objects = Objects(
        *([0] * 400 for _ in range(2)), [1] * 400, boxes.tolist(), [NAN] * 400, *([False] * 400 for _ in range(2))
    )
    objects.ids[:] = range(400)
    pictures = Pictures([1], ["0.png"], [Path("0.png")], [(100, 50)])
    (record,) = make_records(pictures, objects, str).records
    assert np.flatnonzero(result.good).tolist() == record.annotation_ids.tolist()
    np.testing.assert_array_equal(result.boxes[result.good], record.boxes)


def test_boxes_of_unknown_pictures_are_judged_as_far_as_can_be():
    result, found = judged(
        part([(900, 0, 9, 9), (0, 0, -9, 9), (-900, 0, 9, 9)], picture=[-1, -1, 1]), ((100, 50), None)
    )
    assert found == [(INVERTED, 1)]
    assert result.good.tolist() == [True, False, True]


def test_fractions_are_scaled_by_the_picture():
    result, found = judged(part([(0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.6, 0.5)], relative=True))
    np.testing.assert_allclose(result.boxes[0], [50, 25, 100, 50])
    assert found == [(REACHES_OUT, 1)]


def test_the_same_box_of_another_class_or_picture_is_another():
    boxes = [(1, 1, 9, 9), (1, 1, 9, 9), (1, 1, 9, 9), (1, 1, 9, 9.5), (1, 1, 9, 9)]
    _, found = judged(part(boxes, picture=[0, 0, 1, 0, 0], label=[1, 2, 1, 1, 1]))
    assert found == [(BOX_TWICE, 4)]


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    draw = np.random.default_rng(0)
    pixels = [draw.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    for name, i in (("a.png", 0), ("b.png", 1), ("c.png", 2), ("a.bmp", 0)):
        Image.fromarray(pixels[i]).save(tmp_path / name)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return [tmp_path / name for name in ("a.png", "b.png", "a.bmp", "c.png", "copy.png")]


@pytest.mark.parametrize(("depth", "groups"), [("pixels", [[0, 2, 4]]), ("headers", [[0, 4]]), ("entries", [])])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_pictures_are_found(pictures, depth, groups, threads):
    looks = list(look_at_all(pictures, depth, threads))
    assert same_pictures(pictures, looks, depth) == groups


def test_files_that_agree_at_both_ends_are_compared_in_full(tmp_path):
    paths = [tmp_path / name for name in ("a.bmp", "b.bmp")]
    for path, shade in zip(paths, (0, 255), strict=True):
        pixels = np.zeros((60, 60, 3), dtype=np.uint8)
        pixels[30, 30] = shade
        Image.fromarray(pixels).save(path)
    looks = list(look_at_all(paths, "headers", 1))
    assert looks[0].digest == looks[1].digest
    assert same_pictures(paths, looks, "headers") == []


def test_a_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    fault = look_at(tmp_path / "a.png", "pixels").fault
    assert fault is not None
    assert "not an ordinary file" in fault.error.message


def test_a_picture_of_many_parts_is_looked_at_once_and_belongs_to_the_first(pictures, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "refinedet_cli.data.check_pictures.look_at", lambda path, depth: asked.append(path) or look_at(path, depth)
    )

    def listed(*places):
        return [Listed(pictures[i], (8, 8), Path("x.json"), f"images[{i}]") for i in places]

    findings = Findings(Path(), keep=True)
    parts = [ListedPart("train", listed(0, 1, 4)), ListedPart("val", listed(0, 3)), ListedPart("test", listed(2))]
    judge_pictures(parts, "pixels", 1, findings, lambda done, total: None)
    assert sorted(asked) == sorted(set(asked))
    assert [(f.kind, f.detail) for f in findings.kept] == [
        (SAME_PICTURE, "copy.png is a.png"),
        (LEAK, "a.png is a.png of train"),
        (LEAK, "a.bmp is a.png of train"),
    ]


# Found by benchmarks/fuzz_readers.py ---------------------------------------------------------------------------------


def scanned(source, split=None):
    findings = Findings(source, keep=True)
    parts = scan_source(str(source), split, None, None, findings)
    for part in parts:
        judge_boxes(part, [(64, 48)] * len(part.pictures), findings)
    return [(finding.kind.name, finding.file) for finding in findings.kept if finding.kind.severity == "error"]


def test_boxes_too_large_for_any_number_are_no_warning_of_numpy(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images")
    (tmp_path / "images" / "a.png").touch()
    (tmp_path / "images" / "a.txt").write_text("0 0.5 0.5 1e308 0.1\n0 0.5 0.5 0.1 0.1\n")
    assert scanned(tmp_path) == [(NOT_FINITE.name, "images/a.txt")]


def test_label_files_that_are_links_out_are_not_read(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / "data.yaml").write_text("names: [cat]\ntrain: images")
    (tmp_path / "inner.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "set" / "inner.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    for name, target in (("a", "../../inner.txt"), ("b", "../inner.txt")):
        (tmp_path / "set" / "images" / f"{name}.png").touch()
        (tmp_path / "set" / "labels" / f"{name}.txt").symlink_to(target)
    assert scanned(tmp_path / "set") == [(LEADS_OUT.name, "labels/a.txt")]


def test_faults_of_lists_that_are_not_looked_at_count_where_training_takes_classes_from_them(tmp_path):
    xml = (
        "<annotation><object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        "</object></annotation>"
    )
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name, kind in zip("abc", ("cat", "dog", "emu"), strict=True):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml.format(kind))
        (tmp_path / "JPEGImages" / f"{name}.jpg").touch()
    lists = tmp_path / "ImageSets" / "Main"
    for name, content in {"train": "a\n", "val": "b\n", "more": "c\nmissing\n"}.items():
        (lists / f"{name}.txt").write_text(content)
    assert scanned(tmp_path) == []
    (part,) = scan_source(str(tmp_path), "train", None, None, Findings(tmp_path))
    assert part.classes == ("cat", "dog", "emu")
    (tmp_path / "Annotations" / "c.xml").write_text("<annotation><object/></annotation>")
    assert scanned(tmp_path) == [("entry-malformed", "Annotations/c.xml")]
    (lists / "more.txt").write_bytes(b"c\n\xff\n")
    assert (UNREADABLE.name, "ImageSets/Main/more.txt") in scanned(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert scanned(tmp_path) == []
