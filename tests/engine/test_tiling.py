"""The predictor that looks at tiles, around real and invented detectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from refinedet_cli.core.config import Classes
from refinedet_cli.core.multi_scale import ScalePass, ScaleSchedule
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.tiling import Tiling, merge, moved
from refinedet_cli.engine import tiling
from refinedet_cli.engine.multi_scale import MultiScalePredictor
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.tiling import TiledPredictor, make_tiling, reduced, remark_on_tiles, tiling_of
from refinedet_cli.errors import ConfigError, UsageError
from refinedet_cli.zoo.checkpoint import LoadedDetector, load_detector

CPU = torch.device("cpu")
CLASSES = Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))
ONCE = ScaleSchedule(name="one", passes=(ScalePass(size=64),))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, save_random) -> LoadedDetector:
    config = tiny(CLASSES).detector
    config = replace(config, postprocess=replace(config.postprocess, candidates=40, keep=20))
    return load_detector(save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((100, 150), (60, 40), (64, 65))]


class Blobs:
    """A detector that finds every bright connected patch, and notes what it is shown."""

    config = tiny(CLASSES).detector
    classes = CLASSES
    path = Path("blobs")
    provenance = {"made": "up"}  # noqa: RUF012
    device = CPU
    precision = "fp32"
    engine = "none"
    schedule = None

    def __init__(self) -> None:
        self.shown: list[list[tuple[int, int]]] = []

    def predict(self, images):
        self.shown.append([image.shape[:2] for image in images])
        return [self._look(image) for image in images]

    def _look(self, image) -> Detections:
        patches, _ = ndimage.label(image[:, :, 0] > 100)
        boxes = [[c.start, r.start, c.stop, r.stop] for r, c in ndimage.find_objects(patches)]
        table = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return Detections(table, torch.linspace(0.9, 0.5, len(table)), torch.ones(len(table), dtype=torch.int64))


def picture(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    pixels = np.zeros((*size, 3), np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = 200
    return pixels


# --- what is found


def test_every_patch_is_found_once_wherever_it_lies():
    generator = np.random.default_rng(3)
    boxes = []
    for row in range(10, 480, 40):
        for column in range(10, 700, 40):
            left, top = column + int(generator.integers(0, 12)), row + int(generator.integers(0, 12))
            boxes.append((left, top, left + int(generator.integers(3, 20)), top + int(generator.integers(3, 20))))
    boxes.append((0, 488, 20, 500))
    found = TiledPredictor(Blobs(), Tiling(size=100)).predict([picture((500, 720), *boxes)])[0]
    assert sorted(found.boxes.tolist()) == sorted(map(list, boxes))
    assert (found.scores.diff() <= 0).all()


def test_a_large_patch_comes_from_the_whole_picture():
    large, small = (20, 30, 260, 170), (3, 3, 9, 9)
    image = picture((200, 300), large, small)
    found = TiledPredictor(Blobs(), Tiling(size=100)).predict([image])[0]
    assert sorted(found.boxes.tolist()) == sorted([list(large), list(small)])
    parts = TiledPredictor(Blobs(), Tiling(size=100, whole=False)).predict([image])[0]
    assert list(large) not in parts.boxes.tolist()


@pytest.mark.parametrize("several", [False, True])
def test_it_is_the_wrapped_detector_tile_by_tile(loaded, images, several, assert_same):
    inner = (
        MultiScalePredictor(loaded, device=CPU, precision="fp32", schedule=ONCE)
        if several
        else Predictor(loaded, device=CPU, precision="fp32")
    )
    tiles = Tiling(size=64)
    together = TiledPredictor(inner, tiles, batch=4).predict(images)
    for image, found in zip(images, together, strict=True):
        size = (image.shape[0], image.shape[1])
        windows = tiles.looks(*size)
        looks = [moved(inner.predict([image[w.top : w.bottom, w.left : w.right]])[0], w) for w in windows]
        assert_same(found, merge(looks, windows, size, loaded.config.postprocess.nms_iou))
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([*size[::-1], *size[::-1]])).all()


def test_pictures_no_larger_than_a_tile_are_as_without_tiles(loaded, images, assert_same):
    inner = Predictor(loaded, device=CPU, precision="fp32")
    for found, expected in zip(
        TiledPredictor(inner, Tiling(size=150)).predict(images), inner.predict(images), strict=True
    ):
        assert_same(found, expected)
        torch.testing.assert_close(found.boxes, expected.boxes)


def test_pictures_are_checked_and_may_be_none():
    predictor = TiledPredictor(Blobs(), Tiling(size=64))
    assert predictor.predict([]) == []
    with pytest.raises(ValueError, match=r"picture 1: .*drop the alpha"):
        predictor.predict([picture((8, 8)), np.zeros((8, 8, 4), np.uint8)])


# --- how it is computed


def test_tiles_of_several_pictures_are_computed_together():
    inner = Blobs()
    TiledPredictor(inner, Tiling(size=64, overlap=0), batch=4).predict([picture((64, 192)), picture((128, 64))])
    tile = (64, 64)
    # Three tiles and the whole, then two tiles and the whole.
    assert inner.shown == [[tile, tile, tile, (64, 192)], [tile, tile, (128, 64)]]


def test_large_looks_are_reduced(monkeypatch):
    monkeypatch.setattr(tiling, "_MOST_PIXELS", 5_000)
    inner = Blobs()
    large, small = (30, 60, 270, 180), (3, 3, 9, 9)
    found = TiledPredictor(inner, Tiling(size=64), batch=8).predict([picture((201, 302), large, small)])[0]
    shown = [shape for batch in inner.shown for shape in batch]
    assert max(height * width for height, width in shown) <= 5_000
    assert shown[-1] == (50, 75)  # by 4; the last row and two columns do not fill a square
    assert sorted(found.boxes.tolist())[-1] == pytest.approx(list(large), abs=4)
    assert list(small) in found.boxes.tolist()


@pytest.mark.parametrize("strip", [1, 60, 10**9])
@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_reducing_is_the_mean_of_squares(monkeypatch, factor, strip):
    monkeypatch.setattr(tiling, "_STRIP_PIXELS", strip)
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    small = reduced(pixels, factor)
    assert small.dtype == np.uint8
    assert small.shape == (23 // factor, 31 // factor, 3)
    for row, column in ((0, 0), (small.shape[0] - 1, small.shape[1] - 1)):
        square = pixels[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        mean = square.reshape(-1, 3).mean(axis=0)
        assert np.abs(small[row, column] - mean).max() <= 0.5


def test_very_long_pictures_are_reduced_to_one_row_at_the_least(monkeypatch):
    monkeypatch.setattr(tiling, "_MOST_PIXELS", 10)
    found = TiledPredictor(Blobs(), Tiling(size=32)).predict([picture((2, 200), (50, 0, 60, 2))])[0]
    assert [50, 0, 60, 2] in found.boxes.tolist()


# --- what it says


def test_it_stands_where_the_wrapped_detector_can():
    inner, tiles = Blobs(), Tiling(size=64)
    predictor = TiledPredictor(inner, tiles)
    for name in ("config", "classes", "path", "provenance", "device", "precision", "engine", "schedule"):
        assert getattr(predictor, name) is getattr(inner, name)
    assert tiling_of(predictor) is tiles
    assert tiling_of(inner) is None


def test_options_make_a_tiling():
    assert make_tiling(None, None) is None
    assert make_tiling(640, None) == Tiling(size=640)
    assert make_tiling(640, 0.3) == Tiling(size=640, overlap=0.3)
    with pytest.raises(UsageError, match="--tile-overlap"):
        make_tiling(None, 0.3)
    with pytest.raises(ConfigError, match=r"0\.9"):
        make_tiling(640, 0.9)


def test_the_cost_is_told():
    predictor = TiledPredictor(Blobs(), Tiling(size=100))
    assert remark_on_tiles(predictor, [(260, 260), (50, 50)]) == (
        "tiles of 100 px that overlap by 20 px, and the whole picture: 11 looks at 2 pictures, 5.5 times the cost; 1 "
        "of the pictures is no larger than a tile"
    )
    assert remark_on_tiles(TiledPredictor(Blobs(), Tiling(size=100, whole=False)), [(260, 260)]) == (
        "tiles of 100 px that overlap by 20 px: 9 looks at 1 picture, 9 times the cost"
    )
    assert remark_on_tiles(predictor, [(100, 50)]) == (
        "--tile 100 changes nothing: no picture is larger than 100 x 100 px"
    )
    assert remark_on_tiles(predictor, []) is None
    assert remark_on_tiles(predictor) is None
    predictor.predict([picture((260, 260))])
    predictor.predict([picture((50, 50)), picture((50, 51))])
    assert remark_on_tiles(predictor) == (
        "tiles of 100 px that overlap by 20 px, and the whole picture: 12 looks at 3 pictures, 4 times the cost; 2 of "
        "the pictures are no larger than a tile"
    )
    assert remark_on_tiles(Blobs(), [(260, 260)]) is None
