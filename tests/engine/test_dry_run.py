"""What a dry run foretells: counts that are certain, times from the measured steps; and no trace on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, TrainConfig
from refinedet_cli.core.presets import tiny
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.engine import dry_run
from refinedet_cli.engine.dry_run import forecast
from refinedet_cli.engine.train import Rehearsal

CLASSES = Classes(names=("a", "b", "c"), category_ids=(1, 2, 3))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, make_record):
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for i in range(9):
        path = folder / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 64, 3), dtype=np.uint8)).save(path)
        records.append(make_record(path, [[5, 5, 40, 50]] * 2, [1, 2], image_id=i, height=70))
    return Dataset("pictures", CLASSES, tuple(records))


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"batch": 2, "freeze_stages": 2, "warmup_steps": 0, **changes})


@pytest.mark.parametrize("cache", [False, True])
def test_a_forecast_counts_measures_and_leaves_no_trace(pictures, tmp_path, monkeypatch, cache, run_options):
    torch.manual_seed(0)
    detector = build(tiny(CLASSES).detector)
    before = {n: t.clone() for n, t in detector.network.state_dict().items()}
    recipe = config(steps=42, schedule="multistep", milestones=(0.5,), evaluate_every=3)
    validation = replace(pictures, records=pictures.records[:5])
    monkeypatch.chdir(tmp_path)
    found = forecast(detector, pictures, validation, recipe, run_options(tmp_path / "run", cache=cache))
    assert (found.pictures, found.objects, found.classes, found.validation_pictures) == (9, 18, 3, 5)
    assert (found.batch, found.steps, found.epochs, found.milestones) == (2, 42, 10.5, (21,))
    assert found.input_size == (64, 64)
    assert found.evaluations == 4  # after epochs 3, 6 and 9, and at the end
    counts = {n: p.numel() for n, p in detector.network.named_parameters()}
    assert found.parameters == sum(counts.values())
    assert 0 < found.trainable < found.parameters
    assert found.measured_steps == 5
    assert found.training_hours == pytest.approx(42 * found.step_seconds / 3600)
    assert found.evaluation_hours > 0
    assert found.loading_seconds > 0
    assert found.memory_bytes > 50e6
    assert found.state_bytes > 2 * found.checkpoint_bytes > 2 * 4 * found.parameters
    assert list(tmp_path.iterdir()) == []
    after = detector.network.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.requires_grad for p in detector.network.parameters())


def test_stages_that_are_freed_later_count_as_trained(pictures, tmp_path, run_options):
    def trainable(**recipe) -> int:
        found = forecast(
            build(tiny(CLASSES).detector), pictures, None, config(steps=1, **recipe), run_options(tmp_path)
        )
        return found.trainable

    freed = trainable(freeze_stages=2, unfreeze=((0.5, 0),))
    assert freed == trainable(freeze_stages=0) > trainable(freeze_stages=2)


def test_without_validation_there_is_nothing_to_evaluate(pictures, tmp_path, run_options):
    found = forecast(build(tiny(CLASSES).detector), pictures, None, config(steps=1), run_options(tmp_path))
    assert (found.validation_pictures, found.evaluations, found.evaluation_hours) == (None, 0, None)
    assert found.measured_steps == 1  # the only one there is


def test_impatience_shortens_the_measurement(pictures, tmp_path, monkeypatch, run_options):
    monkeypatch.setattr(dry_run, "PATIENCE_SECONDS", 0.0)
    found = forecast(build(tiny(CLASSES).detector), pictures, None, config(steps=100), run_options(tmp_path))
    assert (found.measured_steps, found.steps) == (1, 100)


def test_only_the_first_pictures_are_read_into_memory(pictures, tmp_path, monkeypatch, run_options):
    seen = []
    whole = dry_run._excerpt
    monkeypatch.setattr(dry_run, "WARM_UP", 1)
    monkeypatch.setattr(dry_run, "MEASURED", 1)
    monkeypatch.setattr(dry_run, "_excerpt", lambda *args: seen.append(whole(*args)) or seen[-1])
    forecast(build(tiny(CLASSES).detector), pictures, None, config(steps=100), run_options(tmp_path, cache=True))
    assert len(seen[0].records) == 4


@pytest.mark.parametrize(
    ("seconds", "workers", "expected"),
    [
        pytest.param((9.0, 8.0, 1.0, 3.0, 2.0), 0, (3, 2.0), id="the median after the warm-up"),
        pytest.param((9.0, 8.0), 0, (1, 8.0), id="too few for a warm-up of two"),
        pytest.param((9.0,), 0, (1, 9.0), id="one step"),
        pytest.param((9.0, 8.0, 1.0, 1.0, 1.0), 2, (3, 3.0), id="workers that are too slow"),
        pytest.param((9.0, 8.0, 1.0, 1.0, 1.0), 12, (3, 1.0), id="workers that keep up"),
    ],
)
def test_what_a_step_takes(seconds, workers, expected):
    assert dry_run._step_seconds(Rehearsal(seconds, 0, 0), 6.0, workers) == expected


def test_small_input_counts_by_its_area(pictures, tmp_path, monkeypatch, run_options):
    monkeypatch.setattr(dry_run, "_step_seconds", lambda *args: (5, 36.0))
    detector = tiny(CLASSES).detector
    detector = replace(detector, preprocess=replace(detector.preprocess, height=128, width=128))
    recipe = config(steps=100, small_input=((0.4, 0.5),))
    found = forecast(build(detector), pictures, None, recipe, run_options(tmp_path))
    assert found.training_hours == pytest.approx((40 / 4 + 60) * 36 / 3600)
