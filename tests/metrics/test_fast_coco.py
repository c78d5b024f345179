from __future__ import annotations

import sys

import numpy as np
import pytest

from refinedet_cli.metrics import fast_coco
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, evaluate_coco
from refinedet_cli.metrics.fast_coco import distrust, evaluate_coco_fast, probe

needs_hotcoco = pytest.mark.skipif(
    not fast_coco.is_installed(), reason="hotcoco, the extra fast-eval, is not installed"
)
ARRAYS = ("precision", "recall", "scores")


@pytest.fixture(autouse=True)
def fresh():
    distrust.cache_clear()
    yield
    distrust.cache_clear()


@needs_hotcoco
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_every_array_is_that_of_pycocotools(first):
    for seed in range(1000 + first, 1020 + first):
        slow, fast = evaluate_coco(*probe(seed), 3), evaluate_coco_fast(*probe(seed), 3)
        for name in ARRAYS:
            assert getattr(slow, name).tobytes() == getattr(fast, name).tobytes(), (seed, name)
        assert {n: v for n, v in vars(slow).items() if n not in ARRAYS} == {
            n: v for n, v in vars(fast).items() if n not in ARRAYS
        }


@needs_hotcoco
def test_nothing_to_find_and_nothing_found():
    nothing = PictureTruth(3, np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
    none = PictureDetections(3, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    fast = evaluate_coco_fast([nothing], [none], 2)
    assert fast.AP is None
    assert fast.precision.tobytes() == evaluate_coco([nothing], [none], 2).precision.tobytes()


@needs_hotcoco
def test_it_is_trusted_after_it_proved_equal():
    assert distrust() is None


@needs_hotcoco
@pytest.mark.parametrize("name", ARRAYS)
def test_an_engine_that_differs_in_one_cell_is_refused(monkeypatch, name):
    honest = evaluate_coco_fast

    def wrong(*arguments):
        result = honest(*arguments)
        getattr(result, name).flat[7] = np.nextafter(getattr(result, name).flat[7], 2)
        return result

    monkeypatch.setattr(fast_coco, "evaluate_coco_fast", wrong)
    assert f"another {name} than pycocotools" in (distrust() or "")


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(fast_coco, "is_installed", lambda: False)
    assert "pip install" in (distrust() or "")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ModuleNotFoundError):
        evaluate_coco_fast(*probe(0), 3)


def test_pictures_must_agree():
    truths, detections = probe(1)
    with pytest.raises((ValueError, ModuleNotFoundError)):
        evaluate_coco_fast(truths, detections[:-1], 3)
