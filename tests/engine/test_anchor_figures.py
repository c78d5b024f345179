from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.anchor_coverage import ObjectSet
from refinedet_cli.core.config import AnchorConfig, Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.engine.anchor_figures import (
    Panel,
    ReachMap,
    Series,
    as_jpeg,
    draw_levels,
    draw_picture,
    draw_reach,
    draw_recall_by_iou,
    draw_recall_by_size,
    map_reach,
)
from refinedet_cli.engine.anchor_gallery import choose_examples
from refinedet_cli.engine.anchor_page import render_page, write_gallery
from refinedet_cli.engine.anchor_study import StudyOptions, study_anchors
from refinedet_cli.engine.anchors import AnchorReport, Objects, gather, report_anchors
from refinedet_cli.engine.charts import DARK, LIGHT

CLASSES = Classes(names=("<script>alert(1)</script>",), category_ids=(1,))
TINY = get_preset("tiny", CLASSES).detector


def make_record(boxes: list[list[float]], path: Path) -> Record:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(array)
    return Record(
        image_id=1,
        path=path,
        width=64,
        height=64,
        boxes=array,
        labels=np.ones(count, dtype=np.int64),
        areas=(array[:, 2:] - array[:, :2]).prod(axis=1),
        crowd=np.zeros(count, dtype=bool),
        difficult=np.zeros(count, dtype=bool),
        annotation_ids=np.arange(count),
        file_name=path.name,
    )


def objects_of(*boxes: list[float]) -> Objects:
    return gather(Dataset("pets", CLASSES, (make_record(list(boxes), Path("a.png")),)), (64, 64))


def opened(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def paper(pixels: np.ndarray) -> str:
    return "#" + bytes(pixels[0, 0]).hex()


@pytest.fixture(scope="module")
def report() -> AnchorReport:
    return report_anchors(objects_of([16, 16, 24, 24], [1, 1, 4, 4], [5, 5, 60, 60]), TINY)


def test_the_map_shows_what_an_anchor_reaches() -> None:
    # Squares of 32 px on cells of 8: an object as large is reached wherever it lies, one of half the area nowhere.
    close = map_reach(AnchorConfig(strides=(8,), shapes=(((32.0, 32.0),),)), (64, 64))
    # Squares of 16: an object as large is not reached where it lies in the middle between four of them.
    apart = map_reach(AnchorConfig(strides=(8,), shapes=(((16.0, 16.0),),)), (64, 64))
    assert close.share.shape == (len(close.heights), len(close.widths))

    def share(found: ReachMap, width: float, height: float) -> float:
        row, column = np.abs(found.heights - height).argmin(), np.abs(found.widths - width).argmin()
        return float(found.share[row, column])

    assert share(close, 32, 32) == share(close, 24, 24) == 1
    assert share(close, 22, 22) == share(close, 47, 47) == share(close, 4, 64) == 0
    assert 0.5 < share(apart, 16, 16) < 1


def test_the_map_knows_height_from_width() -> None:
    found = map_reach(AnchorConfig(strides=(8,), shapes=(((12.0, 48.0),),)), (64, 64))
    rows, columns = np.nonzero(found.share > 0.5)
    assert len(rows)
    assert found.heights[rows].min() > found.widths[columns].max()


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_charts_are_drawn_in_their_theme(report: AnchorReport, theme) -> None:
    sides = np.array([[8.0, 8.0], [3.0, 3.0], [55.0, 55.0]])
    series = [Series(name, report.coverage.best_iou) for name in ("anchors", "after the ARM", "after the ODM")]
    named = [("now", report), ("proposed", report)]
    charts = [
        draw_reach(named, sides, theme),
        draw_recall_by_size(series, sides, theme, limit=5.7),
        draw_recall_by_iou(series, theme),
        draw_levels(named, theme),
    ]
    for chart in charts:
        pixels = opened(chart)
        assert paper(pixels) == theme.paper
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is on it


def test_a_single_object_can_be_drawn() -> None:
    objects = objects_of([16, 16, 24, 24])
    single = report_anchors(objects, TINY)
    for chart in (
        draw_reach([("now", single)], objects.sides, LIGHT),
        draw_recall_by_size([Series("now", single.coverage.best_iou)], objects.sides, LIGHT),
        draw_recall_by_iou([Series("now", single.coverage.best_iou)], LIGHT),
        draw_levels([("now", single)], LIGHT),
    ):
        assert opened(chart).size


def count(png: bytes, colour: str) -> int:
    return int((opened(png) == list(bytes.fromhex(colour))).all(axis=-1).sum())


def test_objects_have_the_colour_of_what_becomes_of_them() -> None:
    image = np.full((100, 120, 3), 128, dtype=np.uint8)
    boxes = np.array([[10.0, 10, 40, 40], [50.0, 10, 80, 40], [10.0, 60, 40, 90]])
    colours = ("4cc2ff", "ffc20a", "ff4fa3")
    # More than in the legend alone, where a swatch is some 40 x 8 px.
    for iou, own in ((0.5, "4cc2ff"), (0.49, "ffc20a"), (0.3, "ffc20a"), (0.29, "ff4fa3")):
        png = draw_picture(image, boxes, [Panel("now", np.full(3, iou), boxes + 3)])
        assert [colour for colour in colours if count(png, colour) > 400] == [own]
        assert all(count(png, colour) for colour in colours)
    mixed = draw_picture(image, boxes, [Panel("now", np.array([0.9, 0.4, 0.1]), boxes + 3, boxes)])
    assert all(count(mixed, colour) > 400 for colour in colours)


def test_panels_stand_side_by_side() -> None:
    image = np.zeros((50, 80, 3), dtype=np.uint8)
    boxes = np.array([[10.0, 10, 40, 40]])
    panel = Panel("now", np.array([0.7]), boxes)
    one, three = (opened(draw_picture(image, boxes, [panel] * n)) for n in (1, 3))
    assert three.shape[1] == 3 * one.shape[1]
    jpeg = Image.open(io.BytesIO(as_jpeg(draw_picture(image, boxes, [panel]))))
    assert (jpeg.format, jpeg.size) == ("JPEG", one.shape[1::-1])


def test_examples_go_from_worst_to_best_without_crowds() -> None:
    # Pictures 0..9 of four objects, of which 0, 0, 0, 1, 2, 3, 4, 4, 4, 4 are matched; picture 10 is crowded.
    sizes = [4] * 10 + [60]
    picture = np.repeat(np.arange(11), sizes)
    matched = [0, 0, 0, 1, 2, 3, 4, 4, 4, 4]
    best = np.concatenate([[0.9] * m + [0.1] * (4 - m) for m in matched] + [[0.1] * 60])
    packed = ObjectSet(np.zeros((100, 4)), np.ones(100, dtype=np.int64), picture, 11)
    objects = replace(objects_of([1, 1, 2, 2]), boxes=packed, records=np.arange(11))
    there = np.ones(11, dtype=bool)
    chosen = choose_examples(objects, best, there, 4)
    assert chosen == [0, 1, 4, 9]
    there[0] = False
    assert 0 not in choose_examples(objects, best, there, 4)
    assert choose_examples(objects, best, np.zeros(11, dtype=bool), 4) == []
    assert sorted(choose_examples(objects, best, np.ones(11, dtype=bool), 99)) == list(range(11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pets")
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, 5):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        for _ in range(3):
            size = draw.uniform(3, 40, 2)
            corner = draw.uniform(0, 64 - size)
            box = [round(v, 1) for v in (*corner, *size)]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": box})
    categories = [{"id": 1, "name": CLASSES.names[0]}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (path / "pets.json").write_text(json.dumps(document))
    return path


def test_the_page_needs_nothing_else_and_shows_names_as_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refinedet_cli.engine.charts.DPI", 40)
    options = StudyOptions(datasets=[str(folder / "pets.json")], preset="tiny", budget=85)
    study = study_anchors(options, lambda progress: None)
    written, pictures = write_gallery(tmp_path, study, lambda doing: None)
    assert pictures == 4
    assert [path.name for path in written[:3]] == ["anchors.html", "coverage-map.png", "recall-by-size.png"]
    assert all(path.is_file() for path in written)
    page = (tmp_path / "anchors.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|srcset|href)="(?!data:)', page)
    assert "http" not in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert study.verdict[0] in page
    images = re.findall(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)\"", page)
    assert len(images) == 2 * 4 + pictures
    for kind, content in images:
        assert Image.open(io.BytesIO(base64.b64decode(content))).format == kind.upper()


def test_the_page_can_do_without_pictures_and_search(folder: Path) -> None:
    options = StudyOptions(datasets=[str(folder / "pets.json")], preset="tiny", search=False)
    study = study_anchors(options, lambda progress: None)
    page = render_page(study, [], [])
    assert "On pictures of the data" not in page
    assert "held-out" not in page
