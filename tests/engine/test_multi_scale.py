"""The predictor of many passes, and the schedules it follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from refinedet_cli.core.config import Classes, PreprocessConfig
from refinedet_cli.core.multi_scale import ScalePass, ScaleSchedule, mirrored, named_schedule, pool, within_limits
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.multi_scale import (
    MultiScalePredictor,
    describe_passes,
    find_schedule,
    make_predictor,
    remark_on_limits,
    remark_on_passes,
)
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.errors import ConfigError
from refinedet_cli.zoo.checkpoint import LoadedDetector, load_detector

CPU = torch.device("cpu")
SIZES = ((64, 64), (48, 100), (130, 31))
SMALL = ScaleSchedule(
    name="small",
    passes=(
        ScalePass(size=64),
        ScalePass(size=128, short_side=64, max_side_above=20),
        ScalePass(size=192, min_side_below=30, mirror=False),
    ),
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, save_random) -> LoadedDetector:
    """A seeded random detector whose scores differ from box to box."""
    config = tiny(Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))).detector
    config = replace(config, postprocess=replace(config.postprocess, candidates=60, keep=30))
    path = save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config)
    return load_detector(path)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def multi(loaded: LoadedDetector, schedule: ScaleSchedule = SMALL) -> MultiScalePredictor:
    return MultiScalePredictor(loaded, device=CPU, precision="fp32", schedule=schedule)


def single(loaded: LoadedDetector, height: int, width: int) -> Predictor:
    """The ordinary predictor at another input size."""
    preprocess = replace(loaded.config.preprocess, height=height, width=width)
    config = replace(loaded.config, preprocess=preprocess)
    return Predictor(replace(loaded, detector=replace(loaded.detector, config=config)), device=CPU, precision="fp32")


# --- the passes


@pytest.mark.parametrize("voting", ["average", "soft"])
def test_it_is_the_ordinary_predictor_pass_by_pass(loaded, images, voting, assert_same):
    schedule = replace(SMALL, voting=voting)
    together = multi(loaded, schedule).predict(images)
    for image, found in zip(images, together, strict=True):
        height, width = image.shape[:2]
        looks = []
        for entry in schedule.passes:
            predictor = single(loaded, *entry.input_size(height, width))
            looks.append(within_limits(predictor.predict([image])[0], entry))
            if entry.mirror:
                turned = predictor.predict([image[:, ::-1]])[0]
                looks.append(within_limits(mirrored(turned, width), entry))
        assert len(looks) == schedule.count == 5
        assert_same(found, pool(looks, schedule, loaded.config.postprocess))


def test_one_plain_pass_that_votes_with_none_is_the_ordinary_predictor(loaded, images, assert_same):
    schedule = ScaleSchedule(name="one", passes=(ScalePass(size=64, mirror=False),), voting_iou=1.0)
    ordinary = Predictor(loaded, device=CPU, precision="fp32").predict(images)
    for found, expected in zip(multi(loaded, schedule).predict(images), ordinary, strict=True):
        assert_same(found, expected)


def test_anchors_stay_in_input_pixels(loaded, images):
    # On input of twice the size the same anchors cover half as much of the picture.
    found = {side: single(loaded, side, side).predict([images[0]])[0] for side in (64, 256)}
    sides = {
        side: float((d.boxes[:, 2:] - d.boxes[:, :2]).clamp(min=1).log().mean().exp()) for side, d in found.items()
    }
    assert sides[256] < 0.6 * sides[64]


def test_what_is_found_does_not_depend_on_batch_and_order(loaded, images, assert_same):
    predictor = multi(loaded)
    together = predictor.predict(images)
    for image, backward, expected in zip(images, predictor.predict(images[::-1])[::-1], together, strict=True):
        assert_same(predictor.predict([image])[0], expected)
        assert_same(backward, expected)


def test_boxes_lie_inside_their_pictures_and_the_best_are_kept(loaded, images):
    for (height, width), found in zip(SIZES, multi(loaded, replace(SMALL, voting="soft")).predict(images), strict=True):
        assert len(found) == loaded.config.postprocess.keep
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 0::2] <= width).all()
        assert (found.boxes[:, 1::2] <= height).all()
        assert (found.scores.diff() <= 0).all()


def test_limits_grow_with_the_picture_where_a_side_is_given(loaded, images, assert_same):
    entry = ScalePass(size=64, mirror=False, min_side_below=20)
    schedule = ScaleSchedule(name="x", passes=(entry,), voting_iou=1.0)
    picture = images[2]  # its longer side has 130 px
    every = Predictor(loaded, device=CPU, precision="fp32").predict([picture])[0]
    for side, limit in ((None, 20), (65, 40), (260, 10)):
        (found,) = multi(loaded, replace(schedule, picture_side=side)).predict([picture])
        assert_same(found, within_limits(every, replace(entry, min_side_below=limit)))


def test_pictures_are_checked_and_may_be_none(loaded, images):
    assert multi(loaded).predict([]) == []
    with pytest.raises(ValueError, match=r"picture 1: .*drop the alpha"):
        multi(loaded).predict([images[0], np.zeros((8, 8, 4), np.uint8)])


def test_voting_takes_the_place_of_soft_nms(loaded, images, assert_same):
    post = replace(loaded.config.postprocess, soft_nms_iou=0.1)
    config = replace(loaded.config, postprocess=post)
    softened = replace(loaded, detector=replace(loaded.detector, config=config))
    for a, b in zip(multi(softened).predict(images), multi(loaded).predict(images), strict=True):
        assert_same(a, b)


class Counting(MultiScalePredictor):
    """Notes the input of each forward pass and finds nothing."""

    def __init__(self, loaded: LoadedDetector, schedule: ScaleSchedule) -> None:
        super().__init__(loaded, device=CPU, precision="fp32", schedule=schedule)
        self.shapes: list[tuple[int, ...]] = []

    def _find(self, inputs, sizes):
        assert len(inputs) == len(sizes)
        self.shapes.append((len(inputs), *inputs.shape[2:]))
        nothing = torch.zeros(0)
        return [Detections(nothing.view(0, 4), nothing, nothing.long()) for _ in sizes]


@pytest.mark.parametrize(
    ("name", "side", "count"), [("voc", 320, 16), ("coco", 320, 18), ("voc", 512, 12), ("coco", 512, 18)]
)
def test_forward_passes_of_the_published_schedules(loaded, images, name, side, count):
    preprocess = PreprocessConfig(height=side, width=side)
    config = replace(loaded.config, preprocess=preprocess)
    resized = replace(loaded, detector=replace(loaded.detector, config=config))
    predictor = Counting(resized, named_schedule(name, preprocess))
    predictor.predict(images[1:2])
    assert len(predictor.shapes) == count == predictor.schedule.count
    assert predictor.shapes[:2] == [(1, side, side)] * 2
    short = {320: 192, 512: 384}[side]
    assert predictor.shapes[2:4] == [(1, short, side)] * 2  # the picture is wide


def test_no_forward_pass_holds_more_pixels_than_the_base_batch(loaded):
    pictures = [np.zeros((8, 8 + i % 2, 3), np.uint8) for i in range(10)]
    predictor = Counting(loaded, SMALL)
    predictor.predict(pictures)
    assert all(count == 1 or count * height * width <= 10 * 64 * 64 for count, height, width in predictor.shapes)
    by_size: dict[tuple[int, ...], list[int]] = {}
    for count, *size in predictor.shapes:
        by_size.setdefault(tuple(size), []).append(count)
    assert by_size == {
        (64, 64): [10, 10],
        (128, 64): [5, 5],
        (64, 128): [5, 5],
        (192, 192): [1] * 10,
    }


# --- schedules from names and files


def test_named_schedules_are_found(loaded):
    for name in ("voc", "coco"):
        assert find_schedule(name, loaded.config.preprocess) == named_schedule(name, loaded.config.preprocess)


def test_a_schedule_of_ones_own(tmp_path, loaded):
    path = tmp_path / "mine.toml"
    path.write_text(
        'voting = "soft"\nvoting_iou = 0.5\npicture_side = 640\n'
        "[[passes]]\nsize = 320\n"
        "[[passes]]\nsize = 512\nshort_side = 384\nmirror = false\nmin_side_below = 96\n"
    )
    assert find_schedule(str(path), loaded.config.preprocess) == ScaleSchedule(
        name="mine.toml",
        passes=(ScalePass(size=320), ScalePass(size=512, short_side=384, mirror=False, min_side_below=96.0)),
        voting="soft",
        voting_iou=0.5,
        picture_side=640,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[passes]\n", "mine.toml: "),
        ("", "passes.* is missing"),
        ("passes = []\n", "has no passes"),
        ("[[passes]]\nsize = 300\n", "mine.toml: size of a pass .* not 300"),
        ("[[passes]]\nsize = 'big'\n", r"mine.toml: passes\[0\].size must be int, not 'big'"),
        ("[[passes]]\nsize = 320\nflip = true\n", r"unknown setting 'passes\[0\].flip'"),
        ("[passes]\nsize = 320\n", "mine.toml: passes must be a list"),
        ("voting = 'hard'\n[[passes]]\nsize = 320\n", "voting must be one of average, soft, not 'hard'"),
        ("scales = [1]\n[[passes]]\nsize = 320\n", "unknown setting 'scales'"),
    ],
)
def test_mistakes_in_a_file_are_named_with_it(tmp_path, loaded, text, words):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        find_schedule(str(tmp_path / "mine.toml"), loaded.config.preprocess)
    assert "mine.toml" in caught.value.message


def test_files_that_are_not_there_or_no_text(tmp_path, loaded):
    with pytest.raises(ConfigError, match="--multi-scale vox: there is no such schedule or file") as caught:
        find_schedule("vox", loaded.config.preprocess)
    assert "voc or coco" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_schedule(str(tmp_path), loaded.config.preprocess)
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"x\.toml"):
        find_schedule(str(tmp_path / "x.toml"), loaded.config.preprocess)


def test_a_schedule_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf[[passes]]\nsize = 64\n")
    assert find_schedule(str(path), PreprocessConfig()).passes[0].size == 64


# --- what people are told


def test_predictors_are_made_as_asked_for(loaded):
    plain = make_predictor(loaded, device=CPU, precision="fp32", multi_scale=None)
    assert (type(plain), plain.schedule) == (Predictor, None)
    made = make_predictor(loaded, device=CPU, precision="bf16", multi_scale="voc")
    assert isinstance(made, MultiScalePredictor)
    assert (made.precision, made.schedule) == ("bf16", named_schedule("voc", loaded.config.preprocess))
    assert (made.config, made.classes) == (loaded.config, loaded.config.classes)


def test_passes_and_their_cost_are_told(loaded):
    assert describe_passes(SMALL) == "5 passes a picture: 64 (mirrored too), 128 x 64 (mirrored too), 192 px"
    published = named_schedule("voc", PreprocessConfig())
    assert describe_passes(published).startswith("16 passes a picture: 320, 320 x 192, 192, 384, ")
    assert describe_passes(published).endswith(" 704 px, each mirrored too")
    # 2 x 64 x 64, 2 x 128 x 64 and 192 x 192 pixels are 15 times 64 x 64.
    assert remark_on_passes(multi(loaded)) == (
        f"multi-scale small: {describe_passes(SMALL)}; 15 times the pixels of one look"
    )
    assert remark_on_passes(Predictor(loaded, device=CPU, precision="fp32")) is None
    soft = replace(loaded.config, postprocess=replace(loaded.config.postprocess, soft_nms_iou=0.3))
    predictor = multi(replace(loaded, detector=replace(loaded.detector, config=soft)))
    assert str(remark_on_passes(predictor)).endswith("; voting takes the place of soft-NMS")


def test_limits_that_large_pictures_defeat_are_told(loaded):
    sizes = [(1000, 800), (800, 1001), (4000, 3000)]
    assert "2 pictures have a side above 1,000 px" in str(remark_on_limits(multi(loaded), sizes))
    assert "1 picture has" in str(remark_on_limits(multi(loaded), sizes[:2]))
    assert remark_on_limits(multi(loaded), sizes[:1]) is None
    assert remark_on_limits(multi(loaded, replace(SMALL, picture_side=500)), sizes) is None
    assert remark_on_limits(multi(loaded, replace(SMALL, passes=SMALL.passes[:1])), sizes) is None
    assert remark_on_limits(Predictor(loaded, device=CPU, precision="fp32"), sizes) is None
