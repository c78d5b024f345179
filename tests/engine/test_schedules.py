"""What changes in the course of a run: an end for want of gain, stages that are freed, the rate that the user set."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, TrainConfig
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.engine import train as training
from refinedet_cli.engine.recipe import fewest_frozen, freeze, frozen_stages, learning_rate, make_optimizer
from refinedet_cli.engine.run_state import load_state, save_state
from refinedet_cli.engine.train import EvaluationReport, RunOptions, TrainResult, train
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth, evaluate_coco

ONE_CLASS = Classes(names=("square",), category_ids=(7,))


def preset(**changes: object) -> Preset:
    base = tiny(ONE_CLASS)
    settings: dict[str, object] = {"batch": 2, "epochs": 5, "warmup_steps": 0, "precision": "fp32", **changes}
    return replace(base, train=replace(base.train, **settings))  # type: ignore[arg-type]


@pytest.fixture
def run(run_options: Callable[..., RunOptions]) -> Callable[..., TrainResult]:
    """Train from seed 0: ``run(data, recipe, folder, resume=True)``."""

    def train_it(
        data: Dataset,
        recipe: Preset,
        out: Path,
        *,
        validation: Dataset | None = None,
        on_progress: Callable[[training.Report], None] = lambda report: None,
        **changes: Any,
    ) -> TrainResult:
        torch.manual_seed(0)
        return train(build(recipe.detector), data, validation, recipe.train, run_options(out, **changes), on_progress)

    return train_it


def stop_after(steps: int) -> Callable[[], bool]:
    """Ask for a stop after so many steps of one call."""
    taken = 0

    def wanted() -> bool:
        nonlocal taken
        taken += 1
        return taken >= steps

    return wanted


def assert_equal_states(one: Path, two: Path) -> None:
    first, second = (load_state(folder / "state.pt") for folder in (one, two))
    assert (first.step, first.best, first.without_gain) == (second.step, second.best, second.without_gain)
    for part in ("network", "ema", "optimizer"):
        torch.testing.assert_close(getattr(second, part), getattr(first, part), rtol=0, atol=0)


# The end for want of gain.


NO_BOX, NONE = np.zeros((0, 4)), np.zeros(0, np.int64)
NUMBERS = evaluate_coco(
    [PictureTruth(0, NO_BOX, NONE, np.zeros(0), np.zeros(0, bool))],
    [PictureDetections(0, NO_BOX, np.zeros(0), NONE)],
    1,
)


def score(values: Sequence[float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have evaluations reach these APs, one after the other."""
    coming = iter(values)

    def evaluate(*args: Any, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(result=replace(NUMBERS, AP=next(coming)), scored_classes=ONE_CLASS.names)

    monkeypatch.setattr(training, "evaluate", evaluate)


PATIENT = {"epochs": 10, "evaluate_every": 1, "patience": 2}


def test_a_run_ends_when_ap_no_longer_rises(four_squares, tmp_path, monkeypatch, run):
    score([0.1, 0.3, 0.2, 0.35, 0.35, 0.3, 0.9], monkeypatch)
    reports: list[training.Report] = []
    result = run(four_squares, preset(**PATIENT), tmp_path, validation=four_squares, on_progress=reports.append)
    evaluations = [r for r in reports if isinstance(r, EvaluationReport)]
    assert [r.without_gain for r in evaluations] == [0, 0, 1, 0, 1, 2]  # an equal AP is no gain
    assert [r.ends_run for r in evaluations] == [False] * 5 + [True]
    assert evaluations[-1].best == 0.35
    assert (result.finished, result.ended_early, result.steps, result.best) == (True, True, 12, 0.35)
    assert result.pictures == 24
    assert load_state(tmp_path / "state.pt").step == 12
    assert {"best.safetensors", "last.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_where_nothing_can_be_scored_the_newest_weights_are_best(four_squares, tmp_path, monkeypatch, run):
    score([None] * 5, monkeypatch)
    reports: list[training.Report] = []
    recipe = preset(**{**PATIENT, "epochs": 5})
    result = run(four_squares, recipe, tmp_path, validation=four_squares, on_progress=reports.append)
    evaluations = [r for r in reports if isinstance(r, EvaluationReport)]
    assert [(r.is_best, r.without_gain, r.best) for r in evaluations] == [(True, 0, None)] * 5
    assert (result.finished, result.ended_early, result.steps, result.best) == (True, False, 10, None)
    best, last = (load_file(tmp_path / f"{name}.safetensors") for name in ("best", "last"))
    torch.testing.assert_close(best, last, rtol=0, atol=0)


def test_without_patience_a_run_goes_to_its_end(four_squares, tmp_path, monkeypatch, run):
    score([0.3, 0.2, 0.1, 0.0, 0.0], monkeypatch)
    result = run(four_squares, preset(evaluate_every=1), tmp_path, validation=four_squares)
    assert (result.finished, result.ended_early, result.steps) == (True, False, 10)


def test_patience_that_ends_with_the_last_step_is_no_early_end(four_squares, tmp_path, monkeypatch, run):
    score([0.3, 0.2, 0.1], monkeypatch)
    reports: list[training.Report] = []
    recipe = preset(**{**PATIENT, "epochs": 3})
    result = run(four_squares, recipe, tmp_path, validation=four_squares, on_progress=reports.append)
    assert (result.finished, result.ended_early, result.steps) == (True, False, 6)
    assert not any(r.ends_run for r in reports if isinstance(r, EvaluationReport))


@pytest.mark.parametrize("stops", [(4,), (5, 1, 1)])
def test_the_count_survives_a_resume(four_squares, tmp_path, monkeypatch, stops, run):
    values = [0.3, 0.35, 0.2, 0.1, 0.9]
    score(values, monkeypatch)
    whole = run(four_squares, preset(**PATIENT), tmp_path / "whole", validation=four_squares)
    assert whole.steps == 8
    score(values, monkeypatch)
    for place, steps in enumerate(stops):
        cut = {"resume": place > 0, "should_stop": stop_after(steps)}
        assert not run(four_squares, preset(**PATIENT), tmp_path / "cut", validation=four_squares, **cut).finished
    rest = run(four_squares, preset(**PATIENT), tmp_path / "cut", validation=four_squares, resume=True)
    assert (rest.finished, rest.ended_early, rest.steps, rest.best) == (True, True, 8, 0.35)
    assert_equal_states(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_ended_so_has_nothing_left_to_do(four_squares, tmp_path, monkeypatch, run):
    score([0.3, 0.2, 0.1], monkeypatch)
    run(four_squares, preset(**PATIENT), tmp_path, validation=four_squares)
    before = load_state(tmp_path / "state.pt")
    again = run(four_squares, preset(**PATIENT), tmp_path, validation=four_squares, resume=True)
    assert (again.finished, again.ended_early, again.steps, again.pictures) == (True, True, 6, 0)
    after = load_state(tmp_path / "state.pt")
    torch.testing.assert_close(after.network, before.network, rtol=0, atol=0)
    assert after.without_gain == before.without_gain == 2


def test_a_state_from_before_the_count_resumes(four_squares, tmp_path, monkeypatch, run):
    recipe = preset(evaluate_every=1)
    run(four_squares, recipe, tmp_path, should_stop=stop_after(3))
    state = load_state(tmp_path / "state.pt")
    del state.__dict__["without_gain"]
    del state.settings["train"]["patience"], state.settings["train"]["unfreeze"]
    save_state(tmp_path / "state.pt", state)
    assert "without_gain" not in torch.load(tmp_path / "state.pt", weights_only=True)
    assert load_state(tmp_path / "state.pt").without_gain == 0
    assert run(four_squares, recipe, tmp_path, resume=True).finished


# Stages that are freed.

FREED = {"freeze_stages": 3, "unfreeze": ((0.25, 2), (0.5, 0)), "epochs": 4}  # 8 steps: from 2 on, from 4 on


def test_how_many_stages_are_frozen_when():
    config = TrainConfig(freeze_stages=3, unfreeze=((0.25, 2), (0.5, 0)))
    assert [frozen_stages(config, step, 8) for step in range(8)] == [3, 3, 2, 2, 0, 0, 0, 0]
    assert fewest_frozen(config) == 0
    constant = TrainConfig(freeze_stages=2)
    assert {frozen_stages(constant, step, 8) for step in range(8)} == {fewest_frozen(constant)} == {2}
    # A fraction that was meant as a whole number of steps is that, however it was rounded.
    thirds = TrainConfig(freeze_stages=1, unfreeze=((round(1 / 3, 15), 0),))
    assert [frozen_stages(thirds, step, 30) for step in (9, 10)] == [1, 0]


@pytest.mark.parametrize("freeze_norm", [True, False])
def test_freezing_again_with_fewer_stages_frees_the_others(freeze_norm):
    config = TrainConfig(freeze_stages=2, freeze_norm=freeze_norm)
    again, direct = (build(tiny(ONE_CLASS).detector).network for _ in range(2))
    freeze(again, config, 3)
    freeze(again, config, 1)
    freeze(direct, config, 1)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in direct.parameters()]
    assert [m.training for m in again.modules()] == [m.training for m in direct.modules()]
    first, second, *_ = again.backbone.stages()  # type: ignore[union-attr]
    norms = [m for m in second.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for p in first.parameters())
    assert not any(m.training for m in first.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert {m.training for m in norms} == {not freeze_norm}
    assert {p.requires_grad for m in norms for p in m.parameters()} == {not freeze_norm}
    assert second[0].conv[0][0].weight.requires_grad


@pytest.mark.parametrize(("optimizer", "freeze_norm"), [("sgd", True), ("adamw", False)])
def test_stages_begin_to_move_when_they_are_freed(four_squares, tmp_path, monkeypatch, optimizer, freeze_norm, run):
    recipe = preset(**FREED, optimizer=optimizer, freeze_norm=freeze_norm, ema_decay=0.5)
    torch.manual_seed(0)
    start = {n: t.clone() for n, t in build(recipe.detector).network.state_dict().items()}
    network = build(recipe.detector).network
    stages = []
    for stage in network.backbone.stages():  # type: ignore[union-attr]
        own = {t.data_ptr() for t in stage.state_dict().values()}
        stages.append([n for n, t in network.state_dict().items() if t.data_ptr() in own])
    moved: list[list[bool]] = []
    real = training._Run._train_step

    def watched(self: training._Run, batch: training.Batch) -> None:
        real(self, batch)
        for state in (self.network.state_dict(), self.average.tensors):
            moved.append([any(not torch.equal(state[n], start[n]) for n in names) for names in stages])

    monkeypatch.setattr(training._Run, "_train_step", watched)
    run(four_squares, recipe, tmp_path)
    expected = [[step >= 4, step >= 4, step >= 2, True, True] for step in range(8)]
    assert moved[0::2] == expected
    assert moved[1::2] == expected  # the average too
    norms = [n for n in network.state_dict() if n.startswith("backbone.") and "running_mean" in n]
    end = load_state(tmp_path / "state.pt").network
    assert any(not torch.equal(end[n], start[n]) for n in norms) != freeze_norm


@pytest.mark.parametrize(("optimizer", "stop"), [("adamw", 1), ("adamw", 2), ("adamw", 5), ("sgd", 3)])
def test_a_run_that_frees_stages_resumes_bit_for_bit_at_any_step(
    four_squares, tmp_path_factory, tmp_path, optimizer, stop, run
):
    recipe = preset(**FREED, optimizer=optimizer, weight_decay=0.1, freeze_norm=False)
    whole = tmp_path_factory.getbasetemp() / f"freed-{optimizer}"
    if not whole.exists():
        run(four_squares, recipe, whole)
    assert not run(four_squares, recipe, tmp_path, should_stop=stop_after(stop)).finished
    run(four_squares, recipe, tmp_path, resume=True)
    assert_equal_states(whole, tmp_path)


def test_the_groups_are_those_of_a_run_that_trains_all_from_the_start():
    networks = [build(tiny(ONE_CLASS).detector).network for _ in range(2)]
    configs = [TrainConfig(**FREED), TrainConfig(freeze_stages=0)]
    described = []
    for network, config in zip(networks, configs, strict=True):
        freeze(network, config, fewest_frozen(config))
        optimizer = make_optimizer(network, config)
        names = {id(p): n for n, p in network.named_parameters()}
        described.append(
            [(g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in optimizer.param_groups]
        )
    assert described[0] == described[1]


# The rate is the user's.


def rates_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[list[float]]:
    """The rates that the optimiser was stepped with, by step and group."""
    seen: list[list[float]] = []
    real = training.make_optimizer

    def watched(network: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        optimizer = real(network, config)
        optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
        return optimizer

    monkeypatch.setattr(training, "make_optimizer", watched)
    run()
    return seen


@pytest.mark.parametrize(("batch", "accumulate", "optimizer"), [(1, 1, "sgd"), (4, 2, "adamw")])
def test_the_rate_depends_on_nothing_but_the_settings_and_the_step(
    four_squares, tmp_path, monkeypatch, batch, accumulate, optimizer, run
):
    recipe = preset(
        batch=batch,
        accumulate=accumulate,
        optimizer=optimizer,
        steps=10,
        lr=3e-4,
        backbone_lr=0.5,
        bias_lr=2.0,
        warmup_steps=1,
        final_lr=0.1,
    )
    seen = rates_of(monkeypatch, lambda: run(four_squares, recipe, tmp_path))
    factors = [learning_rate(recipe.train, step, 10) for step in range(10)]
    assert factors[:2] == pytest.approx([1 / 2, 1])
    assert [sorted(set(rates)) for rates in seen] == [
        pytest.approx(sorted({3e-4 * factor * part for part in (0.5, 1.0, 2.0)})) for factor in factors
    ]
