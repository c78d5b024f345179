"""Annotated pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine import draw
from refinedet_cli.engine.draw import Mark, class_colour, draw_boxes, draw_detections, text_colour, undrawable_names

CLASSES = Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))


def grey(height: int, width: int, value: int = 128) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def found(*rows: tuple[tuple[float, float, float, float], float, int]) -> Detections:
    return Detections(
        boxes=torch.tensor([box for box, _, _ in rows]).reshape(-1, 4).float(),
        scores=torch.tensor([score for _, score, _ in rows]).float(),
        labels=torch.tensor([label for _, _, label in rows], dtype=torch.int64),
    )


def drawn(image: np.ndarray, detections: Detections, classes: Classes = CLASSES) -> np.ndarray:
    return np.asarray(draw_detections(image, detections, classes))


def placed(*wanted: tuple[str, tuple[float, float, float, float]], size: tuple[int, int], font: float = 14.0):
    lines = [draw._Wanted(*text.rsplit(" ", 1), draw._Outline(draw._Rect(*box), 2)) for text, box in wanted]
    return draw._place_tags(lines, font, grey(*size))


# --- pictures


def test_nothing_found_leaves_the_picture_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(drawn(image, found()), image)


def test_the_picture_given_is_not_written_to_and_may_be_read_only():
    image = grey(120, 160)
    image.flags.writeable = False
    picture = draw_detections(image, found(((20, 40, 100, 100), 0.9, 1)), CLASSES)
    assert picture.size == (160, 120)
    assert (image == 128).all()
    assert (np.asarray(picture) != 128).any()


def test_edges_have_the_colour_of_the_class_and_the_inside_is_left_alone():
    image = grey(200, 300)
    result = drawn(image, found(((50, 60, 250, 180), 0.9, 2)))
    for y, x in ((180, 150), (120, 50), (120, 250), (60, 200)):
        patch = result[y - 1 : y + 1, x - 1 : x + 1].reshape(-1, 3)
        assert (np.abs(patch.astype(int) - class_colour(2)).sum(axis=1) < 12).any(), (y, x)
    assert (result[80:170, 70:240] == 128).all()
    assert (result[190:, :] == 128).all()


def test_the_better_box_lies_on_top_in_whatever_order_they_come():
    rows = [((20, 60, 280, 140), 0.9, 1), ((100, 20, 200, 180), 0.4, 2)]
    image = grey(200, 300)
    first, second = drawn(image, found(*rows)), drawn(image, found(*rows[::-1]))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first[139:141, 199:201].astype(int) - class_colour(1)).sum(axis=2).min() < 12
    swapped = [(rows[0][0], 0.3, 1), rows[1]]
    assert np.abs(drawn(image, found(*swapped))[139:141, 199:201].astype(int) - class_colour(2)).sum(axis=2).min() < 12


def test_a_whole_picture_box_shows_its_full_line():
    result = drawn(grey(100, 150), found(((0, 0, 150, 100), 0.9, 1)))
    for pixel in (result[50, 0], result[50, 149], result[99, 120]):
        assert np.abs(pixel.astype(int) - class_colour(1)).sum() < 12


@pytest.mark.parametrize("size", [(100, 100), (30, 8000), (8000, 30), (1, 1), (2, 3)])
def test_any_size_of_picture(size):
    height, width = size
    result = drawn(grey(*size), found(((0, 0, width, height), 0.9, 1), ((0, 0, width / 2, height / 2), 0.8, 2)))
    assert result.shape == (height, width, 3)
    assert (result != 128).any()


def test_lines_and_letters_grow_with_the_picture():
    def measure(side: int) -> tuple[int, int]:
        box = (0.2 * side, 0.4 * side, 0.8 * side, 0.8 * side)
        changed = (drawn(grey(side, side), found((box, 0.9, 1))) != 128).any(axis=2)
        line = int(changed[int(0.75 * side), : side // 2].sum())
        above = np.flatnonzero(changed[: int(0.4 * side) - 2 * line, int(0.3 * side)])
        return line, len(above)

    lines, tags = zip(*(measure(side) for side in (100, 600, 2400)), strict=True)
    assert lines[0] < lines[1] < lines[2]
    assert 6 <= tags[0] < tags[1] < tags[2]


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    boxes=st.lists(st.tuples(*[st.floats(-30, 130, width=32)] * 4), max_size=5),
)
def test_no_box_is_too_odd(size, boxes):
    rows = [((*box,), 0.9 - 0.1 * i, 1 + i % 3) for i, box in enumerate(boxes)]
    assert drawn(grey(*size), found(*rows)).shape == (*size, 3)


@pytest.mark.parametrize(
    "image",
    [
        grey(4, 4)[:, :, 0],
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["grey", "alpha", "float", "empty"],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="expected a picture uint8"):
        draw_detections(image, found(), CLASSES)


@pytest.mark.parametrize("label", [0, 4])
def test_a_label_without_class_is_refused(label):
    with pytest.raises(ValueError, match=r"labels in 1\.\.3"):
        draw_detections(grey(50, 50), found(((1, 1, 20, 20), 0.9, label)), CLASSES)


# --- lines


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("width", [1.2, 2.0, 5.5])
def test_a_line_is_as_wide_as_asked_wherever_it_lies(shift, width):
    canvas = grey(80, 80, 0)
    draw._stroke(canvas, draw._Rect(20 + shift, 20 + shift, 60, 60), width, (255, 255, 255), 1.0, radius=3)
    for across in (canvas[40, :40, 0], canvas[:40, 40, 0]):
        assert across.astype(float).sum() / 255 == pytest.approx(width, abs=0.02)


def test_half_opacity_is_half_the_change():
    canvas = grey(40, 40, 0)
    draw._fill(canvas, draw._Rect(10, 10, 30, 30), (200, 100, 50), 0.5, radius=0)
    assert canvas[20, 20].tolist() == [100, 50, 25]
    assert canvas[5, 5].tolist() == [0, 0, 0]


def test_strips_leave_no_gap_and_are_not_blended_twice():
    # Against the distance of every pixel of the canvas, without strips.
    box, canvas = draw._Rect(9.3, 11.7, 52.2, 49.1), grey(64, 64, 0)
    draw._stroke(canvas, box, 4.0, (255, 255, 255), 0.5, radius=6)
    distance = draw._distance((0, 0, 64, 64), box, 6)
    whole = np.rint(255 * 0.5 * np.clip(2.5 - np.abs(distance), 0, 1))
    np.testing.assert_array_equal(canvas[:, :, 0], whole)


@pytest.mark.parametrize("side", [0.0, 0.5, 1.0, 3.0, 7.0])
def test_small_boxes_get_the_same_strips(side):
    box, canvas = draw._Rect(20, 20, 20 + side, 20 + side / 2), grey(48, 48, 0)
    draw._stroke(canvas, box, 3.0, (255, 255, 255), 0.5, radius=4)
    distance = draw._distance((0, 0, 48, 48), box, 4)
    np.testing.assert_array_equal(canvas[:, :, 0], np.rint(255 * 0.5 * np.clip(2 - np.abs(distance), 0, 1)))


# --- colours


def luminance(colour: tuple[int, int, int]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_letters_contrast_with_every_plate():
    for label in range(1, 81):
        plate = class_colour(label)
        light, dark = sorted((luminance(plate), luminance(text_colour(plate))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_letters_are_black_on_light_and_white_on_dark():
    assert text_colour((250, 240, 80)) == (0, 0, 0)
    assert text_colour((60, 20, 90)) == (255, 255, 255)


# Machado et al. 2009, severity 1.0: linear RGB as red-blind and as green-blind eyes see it.
PROTAN = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTAN = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]


def oklab(colour: tuple[int, int, int], eyes: list[list[float]]) -> np.ndarray:
    srgb = np.array(colour) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(eyes) @ linear, 0, 1)
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_lms.append([0.0883024619, 0.2817188376, 0.6299787005])
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    to_lab.append([0.0259040371, 0.7827717662, -0.8086757660])
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ seen)


@pytest.mark.parametrize(("eyes", "least"), [(np.eye(3).tolist(), 0.08), (PROTAN, 0.07), (DEUTAN, 0.07)])
def test_the_first_twenty_colours_are_told_apart_by_all_eyes(eyes, least):
    seen = [oklab(class_colour(label), eyes) for label in range(1, 21)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


def cielab(colour: tuple[int, int, int]) -> np.ndarray:
    srgb = np.array(colour) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.95047, 1.0, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("count", "least"), [(5, 60), (10, 25), (20, 20), (40, 12), (80, 7)])
def test_no_two_classes_have_nearly_one_colour(count, least):
    seen = [cielab(class_colour(label)) for label in range(1, count + 1)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > least


def test_eighty_colours_are_distinct_and_come_again_in_order():
    colours = [class_colour(label) for label in range(1, 161)]
    assert len(set(colours)) == 80
    assert colours[:80] == colours[80:]


# --- tags


def overlap(a, b) -> float:
    width = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    height = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    return max(0, width) * max(0, height)


def test_a_tag_stands_above_its_box():
    (tag,) = placed(("person 0.98", (50, 60, 150, 120)), size=(200, 300))
    assert tag.top + tag.height <= 60
    assert tag.left == 49
    assert tag.text == "person 0.98"


def test_a_tag_goes_inside_where_there_is_no_room_above():
    (tag,) = placed(("person 0.98", (20, 0, 280, 199)), size=(200, 300))
    assert tag.top >= 0
    assert tag.top + tag.height <= 199
    assert tag.left >= 19


def test_a_small_box_is_not_hidden_by_its_own_tag():
    (tag,) = placed(("person 0.98", (100, 0, 112, 10)), size=(200, 300))
    box = draw._Rect(100, 0, 112, 10)
    outside = tag.top >= box.bottom or tag.left >= box.right or tag.left + tag.width <= box.left
    assert outside


def test_tags_keep_off_each_other_where_there_is_room():
    row = [(f"person 0.{90 - i}", (30 + 12 * i, 100, 130 + 12 * i, 180)) for i in range(6)]
    tags = placed(*row, size=(400, 600))
    assert len(tags) == 6
    assert all(overlap(a, b) == 0 for a, b in itertools.combinations(tags, 2))


def test_the_best_has_the_first_choice():
    best, other = placed(("a 0.9", (50, 60, 150, 120)), ("b 0.5", (50, 60, 150, 120)), size=(200, 300))
    assert (best.left, best.top) == (placed(("a 0.9", (50, 60, 150, 120)), size=(200, 300))[0].left, best.top)
    assert best.top + best.height <= 60
    assert overlap(best, other) == 0


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(60, 300), st.integers(60, 300)),
    corners=st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=12),
)
def test_tags_never_leave_the_picture(size, corners):
    height, width = size
    wanted = [
        ("person 0.50", (min(a, c) * width, min(b, d) * height, max(a, c) * width, max(b, d) * height))
        for a, b, c, d in corners
    ]
    for tag in placed(*wanted, size=size):
        assert 0 <= tag.left <= tag.left + tag.width <= width
        assert 0 <= tag.top <= tag.top + tag.height <= height


def test_a_crowd_is_not_buried_beneath_its_tags():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 250, (150, 2))
    wanted = [("traffic light 0.50", (x, y, x + 30, y + 30)) for x, y in corners]
    tags = placed(*wanted, size=(300, 300))
    assert 5 < len(tags) < 150
    assert sum(tag.width * tag.height for tag in tags[:-1]) <= 0.25 * 300 * 300


# --- names


def test_long_names_are_cut_and_keep_their_score():
    (tag,) = placed(("very " * 60 + "0.51", (10, 40, 90, 90)), size=(100, 120))
    assert tag.width <= 120
    assert tag.text.startswith("very ")
    assert tag.text.endswith("… 0.51")


def test_names_beyond_ascii_have_letters():
    classes = Classes(names=("Straßenbahn", "кошка", "γάτα", "قطة"), category_ids=(1, 2, 3, 4))
    assert undrawable_names(classes) == ()
    rows = [((60, 150, 840, 540), 0.9, label) for label in (1, 2, 3, 4)]
    tags = [drawn(grey(600, 900), found(row), classes)[:140] for row in rows]
    # What is written differs, not only the colour of the plate behind it.
    letters = [
        np.abs(tag.astype(int) - text_colour(class_colour(i + 1))).sum(axis=2) < 90 for i, tag in enumerate(tags)
    ]
    assert all(mask.sum() > 30 for mask in letters)
    assert all((a != b).any() for a, b in itertools.combinations(letters, 2))


def test_names_without_a_font_show_the_category_id(monkeypatch):
    monkeypatch.setattr(draw, "_WIDE_FONTS", ())
    draw._font_file.cache_clear()
    try:
        classes = Classes(names=("plain", "日本語", "🐈"), category_ids=(5, 22, 33))
        assert undrawable_names(classes) == ("日本語", "🐈")
        assert [draw.tag_name(classes, label) for label in (1, 2, 3)] == ["plain", "#22", "#33"]
        rows = [((10, 30 + 50 * i, 100, 70 + 50 * i), 0.9, i + 1) for i in range(3)]
        assert (drawn(grey(200, 200), found(*rows), classes) != 128).any()
    finally:
        draw._font_file.cache_clear()


def test_names_with_line_breaks_and_control_characters_become_one_line():
    classes = Classes(names=("traffic\n\tlight\x00", "\x07"), category_ids=(1, 2))
    assert draw.tag_name(classes, 1) == "traffic light"
    assert drawn(grey(99, 99), found(((9, 40, 90, 90), 0.9, 2)), classes).shape == (99, 99, 3)


def test_a_box_without_a_tag_is_drawn_alone_and_the_first_lies_on_top() -> None:
    canvas, tagged = grey(120, 120), grey(120, 120)
    box, red, blue = (30.0, 40.0, 90.0, 100.0), (255, 0, 0), (0, 0, 255)
    draw_boxes(canvas, [Mark(box, red, None), Mark(box, blue, None)], line=4, letters=12)
    assert tuple(canvas[70, 30]) == red
    assert (canvas[:30] == grey(120, 120)[:30]).all()
    draw_boxes(tagged, [Mark(box, red, ("cat", "0.90"))], line=4, letters=12)
    assert (tagged[:38] != grey(120, 120)[:38]).any()
