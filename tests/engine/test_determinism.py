"""Equal settings give equal runs, to the last bit, however often one is stopped and however its pictures are read."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.run_state import load_state, save_state
from refinedet_cli.engine.train import RunOptions, train

STEPS, CUT = 6, 4  # of three steps an epoch: the cut is within the second


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def data(few_squares: Path) -> Dataset:
    return open_dataset(str(few_squares / "train.json"), split="train")


@pytest.fixture(scope="module")
def validation(few_squares: Path) -> Dataset:
    return open_dataset(str(few_squares / "val.json"), split="val")


def preset(data: Dataset, size: int, changes: dict[str, object], augment: dict[str, float]) -> Preset:
    base = tiny(data.classes)
    preprocess = replace(base.detector.preprocess, height=size, width=size)
    settings = {"batch": 4, "steps": STEPS, "lr": 0.01, "augment": replace(base.train.augment, **augment), **changes}
    detector = replace(base.detector, preprocess=preprocess)
    return replace(base, detector=detector, train=replace(base.train, **settings))  # type: ignore[arg-type]


@pytest.fixture
def run(run_options: Callable[..., RunOptions]) -> Callable[..., None]:
    """Train up to a step, or to the end, from the same random start."""

    def train_it(
        data: Dataset, validation: Dataset | None, recipe: Preset, out: Path, how: dict[str, object], stop: int = 0
    ) -> None:
        torch.manual_seed(0)
        detector = build(recipe.detector)
        torch.manual_seed(stop)  # Nothing may depend on the state of the global generator.
        asked = itertools.count(load_state(out / "state.pt").step + 1 if how.get("resume") else 1)
        chosen = {"precision": recipe.train.precision, "should_stop": lambda: next(asked) == stop, **how}
        train(detector, data, validation, recipe.train, run_options(out, **chosen), lambda report: None)

    return train_it


SGD = {"optimizer": "sgd", "precision": "fp32", "ema_decay": 0.99}
ADAMW = {"optimizer": "adamw", "precision": "bf16", "ema_decay": 0.0, "evaluate_every": 0}
ALL_DRAWS = {**SGD, "balance": 0.5, "small_input": ((0.6, 0.5),), "freeze_norm": False, "evaluate_every": 1}


@pytest.mark.parametrize(
    ("size", "changes", "augment", "whole", "cut", "rest"),
    [
        pytest.param(64, SGD, {}, {"workers": 0}, {"workers": 2}, {"workers": 1}, id="sgd fp32 workers"),
        pytest.param(64, ADAMW, {}, {"cache": True}, {"cache": False}, {"cache": True}, id="adamw bf16 cache, no ema"),
        pytest.param(
            *(128, ALL_DRAWS, {"mosaic_probability": 0.6, "mosaic_until": 0.9}),
            *({"workers": 2, "cache": True}, {"workers": 0}, {"workers": 1, "cache": True}),
            id="balance, mosaic, small input, norm",
        ),
    ],
)
def test_a_run_stopped_within_an_epoch_leaves_what_an_unbroken_one_does(
    data, validation, tmp_path, assert_equal_runs, size, changes, augment, whole, cut, rest, run
):
    recipe = preset(data, size, changes, augment)
    scored = validation if changes.get("evaluate_every") else None
    run(data, scored, recipe, tmp_path / "whole", whole)
    run(data, scored, recipe, tmp_path / "cut", cut, CUT)
    assert load_state(tmp_path / "cut" / "state.pt").step == CUT
    run(data, scored, recipe, tmp_path / "cut", {**rest, "resume": True})
    assert load_state(tmp_path / "cut" / "state.pt").step == STEPS
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")


def test_the_comparison_notices_the_last_bit_of_one_weight(data, tmp_path, assert_equal_runs, run):
    run(data, None, preset(data, 64, {**SGD, "steps": 1}, {}), tmp_path / "one", {})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    state = load_state(tmp_path / "two" / "state.pt")
    weight = next(t for t in state.ema.values() if t.is_floating_point() and t.ndim == 1)
    weight[3] = weight[3].nextafter(torch.tensor(9.0))
    save_state(tmp_path / "two" / "state.pt", state)
    with pytest.raises(AssertionError, match=r"^ema of the state"):
        assert_equal_runs(tmp_path / "one", tmp_path / "two")
