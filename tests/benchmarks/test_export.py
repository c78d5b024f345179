"""The detectors that stand in for trained ones when every preset is exported."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script("benchmarks/export.py")


def test_heads_tell_anchors_apart_and_most_places_are_background(script):
    config = script.Case("tiny", classes=3).config()
    network = script.spread_detector(config).network
    size = config.preprocess
    noise = torch.randn(1, 3, size.height, size.width, generator=torch.Generator().manual_seed(1)) * 60 / max(size.std)
    with torch.no_grad():
        logits = network(noise).odm_logits
    assert float(logits[..., 1:].std()) == pytest.approx(script.SPREAD, rel=0.3)
    sure = int((logits.softmax(dim=-1)[..., 1:] > 0.05).sum())
    assert 0 < sure <= script.FOREGROUND


def test_the_shift_leaves_as_many_candidates_as_wanted(script):
    logits = torch.randn(1, 4000, 5, generator=torch.Generator().manual_seed(0)) * 3
    shifted = logits.clone()
    shifted[..., 0] += script.background_shift(logits)
    sure = int((shifted.softmax(dim=-1)[..., 1:] > 0.05).sum())
    assert script.FOREGROUND - 5 <= sure <= script.FOREGROUND


def test_every_size_and_class_count_has_its_case(script):
    cases = list(script.cases(["tiny", "refinedet320_mobilenetv2", "refinedet320_vgg16"], quick=False))
    assert {case.classes for case in cases if case.preset == "refinedet320_mobilenetv2"} == {1, 20, 80}
    assert (384, 640) in {(case.height, case.width) for case in cases}
    assert len(list(script.cases(["tiny", "refinedet320_vgg16"], quick=True))) == 2
    assert script.Case("tiny", 80, 256, 384).config().classes.with_background == 81
