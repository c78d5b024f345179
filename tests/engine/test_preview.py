"""The sheet of training samples: they are those of the run, and what is said of them is so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import AugmentConfig, Classes, PreprocessConfig
from refinedet_cli.core.preprocess import Window, preprocess
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.data.augment import View, view_boxes
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import TrainingSet
from refinedet_cli.data.sampling import repeat_factors
from refinedet_cli.engine import preview
from refinedet_cli.engine.preview import check_name, make_preview, save_sheet, to_pixels
from refinedet_cli.engine.recipe import make_plan
from refinedet_cli.errors import DataError, UsageError

CLASSES = Classes(
    names=("cell", "größe\n白血球", "a name that is much too long for any tag of a small picture"),
    category_ids=(1, 2, 3),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, make_record: Callable[..., Record]) -> Dataset:
    """Six pictures; the fourth shows nothing, the fifth is a crowd."""
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for i in range(6):
        path = folder / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(path)
        count = 0 if i == 3 else 1 + i % 3
        boxes = [[10 + 3 * k, 10, 40 + 5 * k, 45] for k in range(count)]
        record = make_record(path, boxes, np.arange(count) % 3 + 1, image_id=i, width=80, height=60)
        records.append(replace(record, crowd=np.full(count, i == 4), file_name=f"folder/{i}.png"))
    return Dataset("pictures", CLASSES, tuple(records))


def preset(**augment: object) -> Preset:
    base = tiny(CLASSES)
    changed = replace(base.train, batch=4, epochs=3, augment=replace(base.train.augment, **augment))  # type: ignore[arg-type]
    return replace(base, train=changed)


PLAIN = {
    "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "expand_probability": 0.0,
    "crop_probability": 0.0, "mirror_probability": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("mosaic", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("balance", [0.0, 0.9])
def test_the_samples_are_those_that_the_run_will_see(pictures, mosaic, balance):
    recipe = preset(mosaic_probability=mosaic, min_size=3.0)
    recipe = replace(recipe, train=replace(recipe.train, balance=balance))
    weights = repeat_factors(pictures, balance) if balance else None
    plan = make_plan(6, recipe.detector.preprocess, recipe.train, weights)
    watched = preview._Watched(pictures, recipe.train.augment, recipe.train.seed, weights)
    plain = TrainingSet(pictures, recipe.train.augment, recipe.train.seed, weights)
    draws = [draw for batch in plan.batches(0) for draw in batch]
    shown = make_preview(pictures, recipe.detector, recipe.train)
    assert len(shown.samples) == len(draws) == 12
    for draw, sample in zip(draws, shown.samples, strict=True):
        pixels, target, _ = plain[draw]
        made = watched.make(draw)
        assert torch.equal(made.target.boxes, target.boxes)
        assert torch.equal(made.target.labels, target.labels)
        torch.testing.assert_close(torch.from_numpy(made.pixels), to_torch(pixels, draw.preprocess), rtol=0, atol=0)
        assert made.sample == sample
        assert (sample.objects, sample.input_size, sample.epoch) == (len(target.labels), (64, 64), draw.epoch + 1)
        assert len(sample.file_names) in ({1, 4} if mosaic == 0.5 else {4} if mosaic else {1})
        assert sample.file_names[0] == f"folder/{draw.picture}.png"
        if len(sample.file_names) == 1:
            assert len(watched._seen) == 1


def to_torch(pixels: torch.Tensor, config: PreprocessConfig) -> torch.Tensor:
    return torch.from_numpy(to_pixels(pixels, config))


def test_what_is_told_is_what_was_done(pictures):
    """The view that was drawn beside the run places the boxes where the run has them."""
    recipe = preset()
    plan = make_plan(6, recipe.detector.preprocess, recipe.train)
    watched = preview._Watched(pictures, recipe.train.augment, recipe.train.seed)
    for batch in plan.batches(0):
        for draw in batch:
            made = watched.make(draw)
            ((record, view, _),) = watched._seen
            boxes, _ = view_boxes(record.boxes[~record.crowd], view)
            assert torch.equal(made.target.boxes, torch.from_numpy(boxes).float())


def test_normalisation_is_undone():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8))
    for order in ("rgb", "bgr"):
        config = PreprocessConfig(
            height=64, width=128, mean=(100.0, 110.0, 120.0), std=(50.0, 60.0, 70.0), channel_order=order
        )
        assert np.array_equal(to_pixels(preprocess(image, config), config), image.numpy())


@pytest.mark.parametrize(
    ("window", "mirror", "expected"),
    [
        ((0, 0, 80, 60), False, ("whole picture",)),
        ((0, 0, 80, 60), True, ("whole picture", "mirrored")),
        ((-40, -30, 120, 90), False, ("shrunk to 50 %",)),
        ((0, 0, 40, 60), True, ("crop of 50 %", "mirrored")),
        ((-10, 0, 40, 30), False, ("crop of 25 % with canvas beside it",)),
        ((0, 0, 1, 1), False, ("crop of 1 %",)),
    ],
)
def test_views_in_words(pictures, window, mirror, expected):
    seen = preview._Seen(pictures.records[0], View(Window(*window), mirror), ())
    assert preview._view_words(seen) == expected


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        ({}, {""}),
        # Light colours are paler, and dark ones are not.
        ({"brightness": 60.0}, {"", "lighter", "lighter, paler colours", "darker", "darker, stronger colours"}),
        ({"saturation": 0.6}, {"", "stronger colours", "paler colours"}),
    ],
)
def test_colours_in_words(pictures, augment, expected):
    recipe = preset(**{**PLAIN, **augment})
    shown = make_preview(pictures, recipe.detector, recipe.train)
    words = {", ".join(sample.done.split(", ")[1:]) for sample in shown.samples}
    assert words <= expected
    assert len(words) > 1 or not augment
    assert {sample.done.split(", ")[0] for sample in shown.samples} == {"whole picture"}


def test_a_turn_of_the_hue_is_told_in_degrees(pictures):
    recipe = preset(**{**PLAIN, "hue": 90.0})
    done = [sample.done for sample in make_preview(pictures, recipe.detector, recipe.train).samples]
    turns = [words.split("hue ")[1] for words in done if "hue" in words]
    assert turns
    assert all(turn[0] in "+-" and 3 <= abs(int(turn)) <= 90 for turn in turns)


def test_lines_below_a_sample():
    one = preview.Sample(("a/b.png",), "whole picture", 2, (64, 128), 1, (5.25, 60.0))
    assert preview._lines(one, with_time=False) == ("a/b.png", "whole picture", "1 object, 5.2 x 60 px")
    assert preview._lines(one, with_time=True)[2] == "1 object, 5.2 x 60 px; input 128 x 64, epoch 2"
    none = replace(one, objects=0, smallest=None)
    assert preview._lines(none, with_time=False)[2] == "no object"
    four = replace(one, file_names=("x/a.png", "x/b.png", "x/c.png", "x/d.png"), objects=3)
    assert preview._lines(four, with_time=False) == (
        "a.png, b.png,", "c.png, d.png", "mosaic; 3 objects, the smallest 5.2 x 60 px",
    )  # fmt: skip


def test_one_picture_and_a_short_run_make_a_sheet(pictures):
    recipe = preset()
    one = replace(pictures, records=pictures.records[:1])
    shown = make_preview(one, recipe.detector, recipe.train)
    assert [sample.epoch for sample in shown.samples] == [1, 2, 3]
    assert shown.sheet.width >= 3 * preview._NARROWEST
    short = replace(recipe.train, steps=1, small_input=())
    shown = make_preview(one, recipe.detector, short)
    assert len(shown.samples) == 1


def test_the_input_size_is_that_of_the_time(pictures):
    recipe = preset()
    detector = replace(recipe.detector, preprocess=replace(recipe.detector.preprocess, height=128, width=192))
    shown = make_preview(pictures, detector, replace(recipe.train, small_input=((0.4, 0.5),)))
    assert [s.input_size for s in shown.samples] == [(64, 128)] * 8 + [(128, 192)] * 4
    mosaics = AugmentConfig(mosaic_probability=1.0, mosaic_until=0.5)
    shown = make_preview(pictures, detector, replace(recipe.train, augment=mosaics))
    assert [len(s.file_names) for s in shown.samples] == [4] * 8 + [1] * 4


def test_every_class_gets_its_tag_before_any_has_two():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 8, 8], [0, 0, 7, 7], [0, 0, 2, 2], [0, 0, 3, 3]], dtype=np.float64)
    assert preview._by_importance(boxes, np.array([1, 1, 1, 2, 2])) == [0, 4, 1, 3, 2]
    assert preview._by_importance(np.zeros((0, 4)), np.zeros(0, int)) == []


@pytest.mark.parametrize("name", ["sheet.png", "sheet.JPG", "new/sheet.jpeg"])
def test_a_sheet_is_written_in_the_format_of_its_name(pictures, tmp_path, name):
    check_name(tmp_path / name)
    save_sheet(Image.new("RGB", (8, 8)), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == ("PNG" if name.endswith("png") else "JPEG")


def test_names_that_are_none(tmp_path):
    for path in (tmp_path / "sheet", tmp_path / "sheet.gif", tmp_path / "sheet.pdf"):
        with pytest.raises(UsageError, match="is no name of a picture"):
            check_name(path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check_name(tmp_path / "folder.png")


def test_a_picture_that_cannot_be_read_is_named(pictures, tmp_path):
    gone = replace(pictures.records[0], path=tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        make_preview(replace(pictures, records=(gone,)), preset().detector, preset().train)


def test_many_classes_and_long_names_fit_the_sheet():
    legend = [(f"class number {i}", (0, 0, 0)) for i in range(1000)]
    entries = list(preview._place_legend(legend, 900))
    assert len(entries) == preview._MOST_CLASSES + 1
    assert entries[-1].name == "and 976 more classes"
    assert all(e.left + 100 < 900 for e in entries)
    cell = preview._Cell(Image.new("RGB", (448, 448)), ("x" * 1000, "y", "z"))
    sheet = preview._lay_out("title " * 100, legend, [cell])
    assert sheet.width == 2 * preview._NARROWEST
