"""Detectors that are opened for a purpose: what nobody will look at is not made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.tiling import Tiling
from refinedet_cli.engine.open_predictor import open_predictor

CPU = torch.device("cpu")
CONFIG = tiny(Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))).detector


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random) -> str:
    return str(save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", CONFIG))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, 90, 3), dtype=np.uint8) for height in (64, 48, 130)]


def test_what_scores_enough_is_the_same_without_what_scores_less(weights, images, assert_same):
    every = open_predictor(weights, device=CPU, precision=None).predict(images)
    # A score that occurs is enough by itself.
    least = float(torch.cat([found.scores for found in every]).sort(descending=True).values[20])
    some = open_predictor(weights, device=CPU, precision=None, least_score=least).predict(images)
    assert sum(map(len, some)) == 21 < sum(map(len, every))
    for mine, other in zip(some, every, strict=True):
        assert_same(mine, other.above(least))


def test_the_threshold_of_the_detector_is_never_lowered(weights):
    opened = open_predictor(weights, device=CPU, precision=None, least_score=0.001)
    assert opened.config.postprocess == CONFIG.postprocess


@pytest.mark.parametrize("option", [{"multi_scale": "voc"}, {"tiles": Tiling(size=64)}])
def test_what_bears_on_others_is_made(weights, option):
    opened = open_predictor(weights, device=CPU, precision=None, least_score=0.5, **option)
    assert opened.config.postprocess == CONFIG.postprocess


def test_softening_needs_all(tmp_path: Path, save_random):
    soft = replace(CONFIG, postprocess=replace(CONFIG.postprocess, soft_nms_iou=0.3))
    path = save_random(tmp_path / "soft.safetensors", soft)
    opened = open_predictor(str(path), device=CPU, precision=None, least_score=0.5)
    assert opened.config.postprocess == soft.postprocess
