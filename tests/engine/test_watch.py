"""Warnings of a run: each comes when it begins, once; a run that goes well has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refinedet_cli.core.config import AugmentConfig, Classes, TrainConfig
from refinedet_cli.core.presets import PRESETS, tiny
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.engine.watch import (
    CLIP_WINDOW,
    CLIPPED,
    LIMITED,
    LOSS_WINDOW,
    NO_OBJECTS,
    NO_POSITIVES,
    HealthReport,
    Vitals,
    Watch,
)

CLASSES = Classes(names=("cat", "dog", "cow"), category_ids=(1, 2, 3))
WELL = Vitals(
    total=2.0, gradient_norm=8.0, positives={"arm": 20, "odm": 30}, sizes={"arm_offsets": 2.0}, good=True, culprit=False
)


@pytest.fixture
def data(dataset_of: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Pictures of objects with these labels, of three animals."""

    def make(*labels: tuple[int, ...], **changes: Any) -> Dataset:
        return dataset_of(labels, names=CLASSES.names, **changes)

    return make


@pytest.fixture
def watch(data: Callable[..., Dataset]) -> Callable[..., Watch]:
    """A watch over a run, on pictures of all classes unless told otherwise."""

    def make(dataset: Dataset | None = None, **settings: Any) -> Watch:
        chosen = dataset or data((1, 2), (2, 3), (3,))
        return Watch(TrainConfig(lr=0.5, **settings), tiny(CLASSES).detector, chosen)

    return make


def look(
    to: Watch, steps: int, vitals: Vitals, labels: tuple[int, ...] = (1, 2, 3), begin: int = 1
) -> list[HealthReport]:
    return [r for step in range(begin, begin + steps) for r in to.look(step, vitals, labels, 2)]


def test_a_run_that_goes_well_has_no_warning(watch: Callable[..., Watch]) -> None:
    generator = np.random.default_rng(0)
    one = watch()
    for step in range(1, 1001):
        # The loss falls and is noisy, gradients are cut at nearly every step, a third of the batches show nothing.
        loss = float((1 + 20 / step) * generator.lognormal(sigma=0.5))
        vitals = WELL._replace(total=loss, gradient_norm=float(generator.uniform(9, 60)))
        assert not one.look(step, vitals, (1, 2, 3), 2)
        if step % 3 == 0:
            assert not one.look(step, WELL._replace(total=1e-6, positives={"arm": 0, "odm": 0}), (), 2)


def test_classes_without_an_object_are_named_at_the_first_step(
    watch: Callable[..., Watch], data: Callable[..., Dataset]
) -> None:
    (report,) = look(watch(data((1,), ())), 1, WELL)
    assert (report.step, report.kind) == (1, "classes-without-objects")
    assert report.message == "no training picture has an object of the classes dog, cow"
    (report,) = look(watch(data((1, 2, 3), crowds=[(0, 0), (0, 1), (0, 2)])), 1, WELL)
    assert "cat, dog, cow" in report.message


def test_classes_whose_objects_never_come_are_named_once(watch: Callable[..., Watch]) -> None:
    one = watch(augment=AugmentConfig(min_size=16.0))
    # Three pictures, two of which have class 2: it is due 30 times in 15 passes, which are 23 steps of two pictures.
    assert not look(one, 22, WELL, (1, 3))
    (report,) = look(one, 50, WELL, (1, 3), begin=23)
    assert (report.step, report.kind) == (23, "classes-never-seen")
    assert "no object of the class dog has reached the network" in report.message
    assert "train.augment.min_size (now 16)" in report.cure
    seen = watch()
    look(seen, 1, WELL, (2,))
    assert not look(seen, 22, WELL, (1, 3), begin=2)


def test_a_module_that_matches_nothing_is_named_once_it_lasts(watch: Callable[..., Watch]) -> None:
    without = WELL._replace(positives={"arm": 20, "odm": 0})
    one = watch()
    assert not look(one, NO_POSITIVES - 1, without)
    # Batches without objects neither count nor break the row.
    assert not look(one, 3, without, ())
    (report,) = look(one, 30, without, begin=50)
    assert (report.step, report.kind) == (50, "no-positives-odm")
    assert "the ODM has found no anchor" in report.message
    assert "lower train.lr (now 0.5)" in report.cure
    broken = watch()
    for _ in range(5):
        assert not look(broken, NO_POSITIVES - 1, without)
        assert not look(broken, 1, WELL)
    (report,) = look(watch(), NO_POSITIVES, WELL._replace(positives={"head": 0}))
    assert "refinedet anchors" in report.cure


def test_many_batches_without_any_object_are_told(watch: Callable[..., Watch], data: Callable[..., Dataset]) -> None:
    one = watch(data((1, 2, 3), *[()] * 1000))
    assert not look(one, NO_OBJECTS - 1, WELL, ())
    assert [r.kind for r in look(one, 2 * NO_OBJECTS, WELL, (), begin=NO_OBJECTS)] == ["no-objects"]


def test_sizes_beyond_what_decoding_keeps_are_told(watch: Callable[..., Watch]) -> None:
    # The tiny preset divides sizes by 0.2.
    limit = math.log(1000) / 0.2
    assert not look(watch(), 50, WELL._replace(sizes={"arm_offsets": limit - 0.01}))
    one = watch()
    (report,) = look(one, 50, WELL._replace(sizes={"arm_offsets": limit + 0.01, "odm_offsets": 1.0}))
    assert (report.step, report.kind) == (LIMITED, "far-arm-offsets")
    assert "over 1000 times" in report.message


def test_gradients_that_are_cut_far_at_nearly_every_step_are_told(watch: Callable[..., Watch]) -> None:
    steep = WELL._replace(gradient_norm=51.0)
    (report,) = look(watch(), 2 * CLIP_WINDOW, steep)
    assert (report.step, report.kind) == (CLIPPED, "gradients-clipped")
    assert "train.clip_norm" in report.message
    assert not look(watch(), 2 * CLIP_WINDOW, WELL._replace(gradient_norm=49.0))
    assert not look(watch(clip_norm=0.0), 2 * CLIP_WINDOW, steep)


def test_a_loss_that_rises_tenfold_is_told_and_a_single_odd_batch_is_not(watch: Callable[..., Watch]) -> None:
    one = watch()
    look(one, LOSS_WINDOW, WELL)
    assert not look(one, 4, WELL._replace(total=50.0))
    assert not look(one, 20, WELL)
    (report,) = look(one, 20, WELL._replace(total=50.0), begin=500)
    assert (report.step, report.kind) == (504, "loss-risen")
    assert "from a median of 2 to 50" in report.message


def test_a_family_without_anchors_is_watched_too(data: Callable[..., Dataset]) -> None:
    yolo = next(p.detector for p in (make(CLASSES) for make in PRESETS.values()) if p.detector.family == "yolo")
    one = Watch(TrainConfig(), yolo, data((1, 2), (2, 3), (3,)))
    assert not look(one, 50, WELL._replace(sizes={}, positives={"objects": 3, "left_out": 0}))


def test_each_kind_is_told_once_and_others_still_are(watch: Callable[..., Watch], data: Callable[..., Dataset]) -> None:
    one = watch(data((1,), (1,)))
    assert [r.kind for r in look(one, 10, WELL)] == ["classes-without-objects"]
    far = WELL._replace(sizes={"arm_offsets": 100.0})
    assert [r.kind for r in look(one, 10, far, begin=11)] == ["far-arm-offsets"]
    assert not look(one, 10, WELL, begin=21)
    assert not look(one, 10, far, begin=31)
