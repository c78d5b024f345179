"""Windows, boxes and colours of training pictures, by hand and by their promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.core.config import AugmentConfig
from refinedet_cli.core.preprocess import Window
from refinedet_cli.data import augment
from refinedet_cli.data.augment import CROP_MIN_IOUS, View, _draw_crops, distort_colours, draw_view, view_boxes

steady = settings(derandomize=True, deadline=None)

OFF = AugmentConfig(
    brightness=0, contrast=0, saturation=0, hue=0, expand_probability=0, crop_probability=0, mirror_probability=0
)
HEIGHT, WIDTH = 80, 120
BOXES = np.array([[10.0, 20, 50, 60], [100, 5, 118, 30], [0, 0, 120, 80]])


def change(**settings_of: float) -> AugmentConfig:
    return AugmentConfig(**{**{f: getattr(OFF, f) for f in OFF.__dataclass_fields__}, **settings_of})


def views(config: AugmentConfig, boxes: np.ndarray = BOXES, count: int = 200) -> list[View]:
    return [draw_view(HEIGHT, WIDTH, boxes, config, np.random.default_rng(seed)) for seed in range(count)]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, np.ndarray]:
    """A picture's size and boxes inside it, some of them thin."""
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        corner = []
        for length in (width, height):
            low = draw(st.floats(0, length - 0.5))
            corner.append((low, min(low + draw(st.floats(0.01, length)), length)))
        rows.append([corner[0][0], corner[1][0], corner[0][1], corner[1][1]])
    return height, width, np.array(rows, dtype=np.float64).reshape(-1, 4)


# Boxes in a view.


def test_the_whole_picture_only_normalises():
    moved, kept = view_boxes(BOXES, View(Window(0, 0, WIDTH, HEIGHT), mirror=False))
    np.testing.assert_allclose(moved, BOXES / [WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert kept.tolist() == [0, 1, 2]


def test_a_crop_by_hand():
    # 40 x 20 pixels; the first box reaches out of it to the left and below, the last one on all sides.
    window = Window(25, 35, 65, 55)
    moved, kept = view_boxes(BOXES, View(window, mirror=False))
    np.testing.assert_allclose(moved, [[0.0, 0.0, 0.625, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert kept.tolist() == [0, 2]
    moved, _ = view_boxes(BOXES, View(window, mirror=True))
    np.testing.assert_allclose(moved, [[0.375, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])


def test_an_expansion_by_hand():
    moved, kept = view_boxes(BOXES, View(Window(-80, -20, 160, 140), mirror=False))
    np.testing.assert_allclose(moved[0], [90 / 240, 40 / 160, 130 / 240, 80 / 160])
    assert kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("left", "inside"), [(29.0, True), (30.0, True), (30.5, False), (9.0, True), (-11.0, True), (-30.0, False)]
)
def test_a_box_belongs_to_the_window_that_holds_its_centre(left, inside):
    # The centre's x is 30 and the window 60 wide: its left edge counts, its right edge does not.
    window = Window(int(np.ceil(left)), 0, int(np.ceil(left)) + 60, 80)
    _, kept = view_boxes(np.array([[20.0, 10, 40, 30]]), View(window, mirror=False))
    assert (len(kept) == 1) == inside


def test_no_boxes():
    moved, kept = view_boxes(np.zeros((0, 4)), View(Window(0, 0, 10, 10), mirror=True))
    assert (moved.shape, kept.shape) == ((0, 4), (0,))


@steady
@given(scenes(), st.integers(0, 2**32))
def test_mirrored_twice_is_as_before(scene, seed):
    height, width, boxes = scene
    window = draw_view(height, width, boxes, AugmentConfig(), np.random.default_rng(seed)).window
    plain, kept = view_boxes(boxes, View(window, mirror=False))
    mirrored, same = view_boxes(boxes, View(window, mirror=True))
    assert same.tolist() == kept.tolist()
    back = mirrored.copy()
    back[:, [0, 2]] = 1 - mirrored[:, [2, 0]]
    np.testing.assert_allclose(back, plain, rtol=0, atol=1e-15)
    assert np.array_equal(mirrored[:, [1, 3]], plain[:, [1, 3]])


@steady
@given(scenes(), st.integers(0, 2**32))
def test_boxes_stay_inside_with_an_area_and_in_place(scene, seed):
    height, width, boxes = scene
    before = boxes.copy()
    view = draw_view(height, width, boxes, AugmentConfig(), np.random.default_rng(seed))
    assert np.array_equal(boxes, before)
    window = view.window
    assert all(isinstance(v, int) for v in window)
    assert window.right > window.left
    assert window.bottom > window.top
    moved, kept = view_boxes(boxes, view)
    assert ((moved >= 0) & (moved <= 1)).all()
    assert (moved[:, 2:].astype(np.float32) > moved[:, :2].astype(np.float32)).all()
    # Back in the picture, each is its box as far as the window shows it.
    for row, box in zip(moved, boxes[kept], strict=True):
        x0, x1 = (1 - row[2], 1 - row[0]) if view.mirror else (row[0], row[2])
        size = np.array([window.right - window.left, window.bottom - window.top] * 2)
        shown = np.array([x0, row[1], x1, row[3]]) * size + [window.left, window.top] * 2
        expected = [
            max(box[0], window.left), max(box[1], window.top), min(box[2], window.right), min(box[3], window.bottom)
        ]  # fmt: skip
        np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-9)


@steady
@given(scenes(), st.integers(0, 2**32))
def test_a_picture_with_boxes_shows_the_centre_of_one(scene, seed):
    height, width, boxes = scene
    view = draw_view(height, width, boxes, AugmentConfig(), np.random.default_rng(seed))
    if len(boxes):
        assert len(view_boxes(boxes, view)[1]) > 0


# Views.


def test_everything_off_is_the_whole_picture():
    assert set(views(OFF, count=20)) == {View(Window(0, 0, WIDTH, HEIGHT), mirror=False)}


def test_the_same_seed_gives_the_same_view_and_another_another():
    config = AugmentConfig()
    assert views(config, count=30) == views(config, count=30)
    assert len(set(views(config, count=30))) > 20


def test_an_expansion_never_shrinks_and_holds_the_picture():
    drawn = views(change(expand_probability=1, expand_max=4))
    ratios = []
    for window, _ in drawn:
        assert window.left <= 0 <= WIDTH <= window.right
        assert window.top <= 0 <= HEIGHT <= window.bottom
        ratios.append((window.right - window.left) / WIDTH)
        assert (window.bottom - window.top) / HEIGHT == pytest.approx(ratios[-1], abs=1 / HEIGHT)
    assert max(ratios) <= 4
    assert min(ratios) < 1.2
    assert np.mean(ratios) == pytest.approx(2.5, abs=0.2)
    # Placed anywhere: as often in the left half of its room as in the right.
    places = [-w.left / (w.right - w.left - WIDTH) for w, _ in drawn if w.right - w.left > WIDTH + 20]
    assert np.mean(places) == pytest.approx(0.5, abs=0.07)


def test_an_expansion_by_one_is_the_picture():
    assert set(views(change(expand_probability=1, expand_max=1), count=20)) == {
        View(Window(0, 0, WIDTH, HEIGHT), False)
    }


@pytest.mark.parametrize(
    ("name", "hit"),
    [
        ("mirror_probability", lambda v: v.mirror),
        ("expand_probability", lambda v: v.window != Window(0, 0, WIDTH, HEIGHT)),
    ],
)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probabilities(name, hit, probability):
    share = np.mean([hit(v) for v in views(change(**{name: probability}), count=400)])
    # An expansion by hardly more than 1 is none.
    assert share == pytest.approx(probability, abs=0.06 if probability == 0.3 else 0.01)


def test_crops_lie_on_the_canvas_within_their_scale_and_aspect():
    canvas = Window(-30, -10, 170, 90)
    for seed in range(60):
        for crop in _draw_crops(canvas, BOXES, 0.3, np.random.default_rng(seed)):
            assert canvas.left <= crop.left < crop.right <= canvas.right
            assert canvas.top <= crop.top < crop.bottom <= canvas.bottom
            width, height = (crop.right - crop.left) / 200, (crop.bottom - crop.top) / 100
            assert 0.3 - 0.01 <= np.sqrt(width * height) <= 1.0
            assert 0.48 <= width / height <= 2.1


@pytest.mark.parametrize("limit", [limit for limit in CROP_MIN_IOUS if limit > 0])
def test_crops_keep_their_overlap_with_one_box_at_least(monkeypatch, limit):
    monkeypatch.setattr(augment, "CROP_MIN_IOUS", (limit,))
    boxes = np.array([[30.0, 20, 90, 60], [0, 0, 9, 9]])
    overlaps = []
    for seed in range(400):
        for crop in _draw_crops(Window(0, 0, WIDTH, HEIGHT), boxes, 0.3, np.random.default_rng(seed)):
            low, high = np.maximum(crop[:2], boxes[0, :2]), np.minimum(crop[2:], boxes[0, 2:])
            common = np.prod(np.clip(high - low, 0, None))
            area = (crop.right - crop.left) * (crop.bottom - crop.top)
            overlaps.append(common / (area + 60 * 40 - common))
    assert overlaps
    assert limit <= min(overlaps) < limit + 0.05


def test_a_limit_that_no_crop_reaches_is_left_out():
    # A box of one pixel: no crop of a third of the picture overlaps it by a tenth.
    found = _draw_crops(Window(0, 0, WIDTH, HEIGHT), np.array([[60.0, 40, 61, 41]]), 0.3, np.random.default_rng(0))
    assert len(found) == 1


def test_without_boxes_nothing_is_cropped():
    assert {v.window for v in views(change(crop_probability=1), np.zeros((0, 4)), count=20)} == {
        Window(0, 0, WIDTH, HEIGHT)
    }


def test_the_whole_picture_stays_one_of_the_choices():
    whole = [v.window == Window(0, 0, WIDTH, HEIGHT) for v in views(change(crop_probability=1), count=400)]
    # One of up to seven.
    assert 0.08 < np.mean(whole) < 0.3


# Colours.


def gradient() -> np.ndarray:
    levels = np.arange(256, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(levels[:, None], levels[None], levels[::-1][:, None]), axis=-1).copy()


def test_no_ranges_leave_the_colours_alone():
    image = gradient()
    for seed in range(40):
        assert np.array_equal(distort_colours(image, OFF, np.random.default_rng(seed)), image)


def test_brightness_and_contrast_by_hand():
    image, seen = gradient(), set()
    for seed in range(60):
        generator = np.random.default_rng(seed)
        found = distort_colours(image, change(brightness=200, contrast=0.9), generator)
        replay = np.random.default_rng(seed)
        coins = replay.random(5) < 0.5
        shift = replay.uniform(-200, 200) * coins[0]
        factor = 1 + replay.uniform(-0.9, 0.9) * coins[1]
        for level in (0, 1, 100, 254, 255):
            shifted = min(max(round(level + shift), 0), 255)
            expected = min(max(round(shifted * factor), 0), 255)
            assert (found[level, :, 0] == expected).all()
        seen.add((bool(coins[0]), bool(coins[1]), expected in (0, 255)))
    assert len(seen) >= 6


def test_values_saturate_and_do_not_wrap():
    image = np.array([[[250, 5, 128]]], dtype=np.uint8)
    bright = [
        distort_colours(image, change(brightness=255), np.random.default_rng(seed))[0, 0].tolist() for seed in range(60)
    ]
    assert [255, 255, 255] in [[255 if v > 250 else v for v in row] for row in bright]
    # A shift is the same for all bands until one meets an end, so their order never changes.
    assert all(row[0] >= row[2] >= row[1] for row in bright)


def test_saturation_leaves_grey_grey_and_hue_leaves_it_too():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    for seed in range(30):
        found = distort_colours(grey, change(saturation=0.9, hue=180), np.random.default_rng(seed))
        assert np.array_equal(found, grey)


def hue_of(image: np.ndarray) -> int:
    return int(np.array(Image.fromarray(image).convert("HSV"))[0, 0, 0])


def test_hue_turns_within_its_range_and_keeps_lightness():
    image = np.full((2, 2, 3), (40, 200, 90), dtype=np.uint8)
    start = hue_of(image)
    turns = []
    for seed in range(80):
        found = distort_colours(image, change(hue=36), np.random.default_rng(seed))
        assert int(found.max()) == 200
        turns.append(hue_of(found) - start)
    # 36 degrees of 360 are 25.6 of 256; rounding adds up to 2.
    assert 15 < max(turns) <= 28
    assert -28 <= min(turns) < -15
    assert turns.count(0) > 20


def test_hue_stops_at_the_ends_of_its_circle():
    red = np.full((1, 1, 3), (255, 0, 0), dtype=np.uint8)  # hue 0
    hues = {hue_of(distort_colours(red, change(hue=36), np.random.default_rng(seed))) for seed in range(80)}
    assert max(hues) <= 28


def test_saturation_moves_in_both_directions():
    image = np.full((1, 1, 3), (100, 150, 200), dtype=np.uint8)
    spreads = [int(np.ptp(distort_colours(image, change(saturation=0.5), np.random.default_rng(s)))) for s in range(60)]
    assert min(spreads) < 70
    assert max(spreads) > 130


def test_the_picture_itself_is_left_alone_and_the_seed_decides():
    image, before = gradient(), gradient()
    first, again = (distort_colours(image, AugmentConfig(), np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(image, before)
    assert np.array_equal(first, again)
    assert (first.dtype, first.shape) == (np.uint8, image.shape)
    assert not np.array_equal(first, distort_colours(image, AugmentConfig(), np.random.default_rng(4)))


@pytest.mark.parametrize("coin", [False, True])
def test_contrast_comes_before_or_after_the_colours(coin):
    # Every second colour: rounding alone tells the orders apart.
    image = gradient()[::2, ::2]
    config = change(contrast=0.9, saturation=0.9)
    for seed in range(4000):
        replay = np.random.default_rng(seed)
        coins = replay.random(5) < 0.5
        replay.uniform(-0.0, 0.0)
        factor, richness = 1 + replay.uniform(-0.9, 0.9), 1 + replay.uniform(-0.9, 0.9)
        if coins.tolist()[1:] == [True, True, coins[3], coin] and 0.5 < factor < 0.8 and richness > 1.5:
            break
    else:
        pytest.fail("no such draw")

    def contrast(values: np.ndarray) -> np.ndarray:
        return np.round(values * factor).clip(0, 255).astype(np.uint8)

    def colour(values: np.ndarray) -> np.ndarray:
        hsv = np.array(Image.fromarray(values).convert("HSV"))
        hsv[..., 1] = np.round(hsv[..., 1] * richness).clip(0, 255)
        bands = [Image.fromarray(np.ascontiguousarray(hsv[..., i])) for i in range(3)]
        return np.array(Image.merge("HSV", bands).convert("RGB"))

    expected = colour(contrast(image)) if coin else contrast(colour(image))
    assert np.array_equal(distort_colours(image, config, np.random.default_rng(seed)), expected)
    assert not np.array_equal(colour(contrast(image)), contrast(colour(image)))
