"""Training: resume, logs, what is saved, and that nothing ever becomes NaN."""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, TrainConfig
from refinedet_cli.core.layers import L2Norm
from refinedet_cli.core.presets import Preset, refinedet320_vgg16, tiny
from refinedet_cli.data import loading
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine import train as training
from refinedet_cli.engine.recipe import input_sizes, learning_rate, make_optimizer, milestone_steps
from refinedet_cli.engine.run_log import StepReport
from refinedet_cli.engine.run_state import load_state, save_state
from refinedet_cli.engine.train import EvaluationReport, Report, RunOptions, TrainResult, rehearse, train
from refinedet_cli.errors import CheckpointError, ConfigError, DataError, DeviceError, GateError
from refinedet_cli.zoo.checkpoint import load_detector

MakeOptions = Callable[..., RunOptions]
ONE_CLASS = Classes(names=("square",), category_ids=(7,))


@pytest.fixture(scope="module")
def squares(bright_squares: Callable[..., Path]) -> Dataset:
    """Twelve pictures of bright squares on dark noise; one shows nothing, one holds a crowd box."""
    opened = open_dataset(str(bright_squares(12, crowds=[5])), split="train")
    return replace(opened, name="squares")


def preset(**changes: object) -> Preset:
    base = tiny(ONE_CLASS)
    settings: dict[str, object] = {"batch": 4, "epochs": 3, "warmup_steps": 2, "precision": "fp32", **changes}
    return replace(base, train=replace(base.train, **settings))  # type: ignore[arg-type]


def run(
    data: Dataset,
    recipe: Preset,
    chosen: RunOptions,
    *,
    validation: Dataset | None = None,
    on_progress: Callable[[Report], None] = lambda report: None,
) -> TrainResult:
    torch.manual_seed(0)
    return train(build(recipe.detector), data, validation, recipe.train, chosen, on_progress)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_resumed_mid_epoch_equals_one_that_never_stopped(
    squares: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, run_options: MakeOptions
) -> None:
    recipe = preset(optimizer=optimizer)
    run(squares, recipe, run_options(tmp_path / "whole"))
    # Saved after every step, then killed in the middle of the second epoch; steps after the last save are lost.
    real, calls = training._Run._train_step, 0

    def dies(self: training._Run, batch: training.Batch) -> None:
        nonlocal calls
        calls += 1
        real(self, batch)
        if calls == 5:
            raise _Killed

    monkeypatch.setattr(training._Run, "_train_step", dies)
    with pytest.raises(_Killed):
        run(squares, recipe, run_options(tmp_path / "cut", save_seconds=0.0))
    assert load_state(tmp_path / "cut" / "state.pt").step == 4
    run(squares, recipe, run_options(tmp_path / "cut", resume=True))
    whole, cut = (load_state(tmp_path / name / "state.pt") for name in ("whole", "cut"))
    assert whole.step == cut.step == 9
    for part in ("network", "ema", "optimizer"):
        torch.testing.assert_close(getattr(cut, part), getattr(whole, part), rtol=0, atol=0)


def test_resume_refuses_another_recipe_other_data_and_an_empty_folder(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    recipe = preset(epochs=1)
    run(squares, recipe, run_options(tmp_path))
    again = run_options(tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"train\.lr was 0.001 and is 0.002"):
        run(squares, preset(epochs=1, lr=0.002), again)
    with pytest.raises(ConfigError, match="other training data"):
        run(replace(squares, records=squares.records[:11]), recipe, again)
    with pytest.raises(ConfigError, match="in another order"):
        run(replace(squares, records=squares.records[::-1]), recipe, again)
    with pytest.raises(ConfigError, match="other validation data"):
        run(squares, recipe, again, validation=squares)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        run(squares, recipe, run_options(tmp_path / "new", resume=True))


def test_a_resumed_run_keeps_the_record_of_its_start(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    told = {"provenance": {"start": {"weights": "a"}, "seed": 0}, "record": {"data": 1, "start": {"weights": "x/a"}}}
    run(squares, preset(), run_options(tmp_path, should_stop=lambda: True, **told))
    other = {"provenance": {"start": {"weights": "b"}, "seed": 0}, "record": {"data": 2, "start": {"weights": "b"}}}
    assert run(squares, preset(), run_options(tmp_path, resume=True, **other)).finished
    assert load_detector(tmp_path / "last.safetensors").provenance["start"] == {"weights": "a"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["data"], written["start"]) == (2, {"weights": "x/a"})


# torch raises where the run just is, be it between the opening of a file and its use.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loading_process_that_is_killed_ends_the_run_with_its_cause(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    def kill() -> bool:
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
        return False

    options = run_options(tmp_path, workers=1, should_stop=kill)
    with pytest.raises(DeviceError, match="a process that loads training pictures is lost: ") as caught:
        run(squares, preset(epochs=30), options)
    assert "--workers" in (caught.value.hint or "")
    assert load_state(tmp_path / "state.pt").step >= 1


def test_an_error_leaves_no_loading_process_behind(
    squares: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_options: MakeOptions
) -> None:
    def full(*_: object) -> None:
        raise DataError("the disk is full")

    monkeypatch.setattr(training, "save_state", full)
    with pytest.raises(DataError, match="the disk is full") as caught:
        run(squares, preset(epochs=30), run_options(tmp_path, workers=1))
    # Python would wait for them at its end, and for ever; the traceback keeps what the run held.
    assert caught.tb is not None
    assert multiprocessing.active_children() == []


def test_a_batch_that_is_lost_does_not_keep_the_run_waiting_for_ever(
    squares: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_options: MakeOptions
) -> None:
    monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(loading, "_collate_guarded", lambda samples: time.sleep(5))
    with pytest.raises(DeviceError, match=r"timed out after 0\.5 seconds"):
        run(squares, preset(epochs=1), run_options(tmp_path, workers=1))


def test_the_folder_holds_weights_logs_and_config(squares: Dataset, tmp_path: Path, run_options: MakeOptions) -> None:
    reports: list[Report] = []
    result = run(
        squares,
        preset(epochs=2, evaluate_every=1),
        run_options(tmp_path, cache=True, provenance={"preset": "tiny"}),
        validation=squares,
        on_progress=reports.append,
    )
    assert result.finished
    assert result.steps == 6
    assert result.pictures == 24
    evaluations = [r for r in reports if isinstance(r, EvaluationReport)]
    assert [r.step for r in evaluations] == [3, 6]
    assert result.best == max(r.result.AP or 0.0 for r in evaluations)
    last = [r for r in reports if isinstance(r, StepReport)][-1]
    assert last.step == last.steps == 6
    for name in ("last", "best"):
        loaded = load_detector(tmp_path / f"{name}.safetensors")
        assert loaded.config.classes == ONE_CLASS
        assert loaded.provenance["data"] == {"name": "squares", "pictures": 12, "sha256": squares.fingerprint}
    assert loaded.provenance["preset"] == "tiny"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["train"]["epochs"] == 2
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [3, 6]
    assert float(rows[-1]["AP50"]) == pytest.approx(evaluations[-1].result.AP50)
    with (tmp_path / "log.csv").open(newline="") as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == 6


def test_stopping_early_leaves_a_run_that_can_go_on(squares: Dataset, tmp_path: Path, run_options: MakeOptions) -> None:
    result = run(squares, preset(), run_options(tmp_path, should_stop=lambda: True))
    assert not result.finished
    assert result.steps == 1
    rest = run(squares, preset(), run_options(tmp_path, resume=True))
    assert rest.finished
    assert rest.steps == 9
    assert rest.pictures == 32


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    run(squares, preset(epochs=1), run_options(tmp_path, should_stop=lambda: True))
    state = load_state(tmp_path / "state.pt")
    next(t for t in state.network.values() if t.is_floating_point())[0] = torch.nan
    save_state(tmp_path / "state.pt", state)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(GateError, match="not finite at step 2"):
        run(squares, preset(epochs=1), run_options(tmp_path, resume=True))
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_no_step_is_ever_non_finite(
    squares: Dataset, tmp_path: Path, precision: str, batch: int, run_options: MakeOptions
) -> None:
    """A short form of `benchmarks/stability.py`."""
    recipe = preset(batch=batch, epochs=2 if batch == 1 else 10, lr=4e-3, warmup_steps=500, freeze_norm=False)
    reports: list[Report] = []
    run(squares, recipe, run_options(tmp_path, precision=precision), on_progress=reports.append)
    last = reports[-1]
    assert isinstance(last, StepReport)
    assert np.isfinite([last.total, last.gradient_norm, *last.parts.values()]).all()
    state = load_state(tmp_path / "state.pt")
    assert all(bool(t.isfinite().all()) for t in state.network.values() if t.is_floating_point())


def test_training_learns(squares: Dataset, tmp_path: Path, run_options: MakeOptions) -> None:
    recipe = preset(batch=6, epochs=120, optimizer="adamw", lr=2e-3, freeze_norm=False, evaluate_every=0)
    plain = replace(recipe.train.augment, expand_probability=0.0, crop_probability=0.0, hue=0.0)
    recipe = replace(recipe, train=replace(recipe.train, augment=plain, ema_decay=0.98))
    result = run(squares, recipe, run_options(tmp_path, cache=True), validation=squares)
    assert result.result is not None
    assert (result.result.AP50 or 0.0) > 0.5


def test_learning_rate_warms_up_and_falls() -> None:
    cosine = TrainConfig(warmup_steps=10, schedule="cosine", final_lr=0.01)
    rates = [learning_rate(cosine, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    steps = TrainConfig(warmup_steps=0, schedule="multistep", milestones=(0.5, 0.75), gamma=0.1)
    assert [learning_rate(steps, s, 100) for s in (0, 49, 50, 74, 75, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert learning_rate(TrainConfig(warmup_steps=500), 0, 20) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("steps", "drops", "gamma"),
    [
        (120_000, (80_000, 100_000), 0.1),
        (240_000, (160_000, 200_000), 0.1),
        (400_000, (280_000, 360_000), 0.1),
        (540_000, (400_000, 480_000), 0.1),
        (120_000, (80_000,), 0.2),
        (160_000, (120_000,), 0.2),
    ],
)
def test_the_rate_drops_at_the_published_steps(steps: int, drops: tuple[int, ...], gamma: float) -> None:
    for digits in (None, 15):
        fractions = tuple(d / steps if digits is None else round(d / steps, digits) for d in drops)
        config = TrainConfig(warmup_steps=0, schedule="multistep", milestones=fractions, gamma=gamma)
        assert milestone_steps(config, steps) == drops
        for passed, drop in enumerate(drops):
            around = [learning_rate(config, step, steps) for step in (drop - 1, drop)]
            assert around == pytest.approx([gamma**passed, gamma ** (passed + 1)])


def test_a_milestone_between_two_steps_waits_for_the_next() -> None:
    config = TrainConfig(schedule="multistep", milestones=(0.5, 2 / 3))
    assert milestone_steps(config, 101) == (51, 68)
    assert milestone_steps(TrainConfig(schedule="cosine"), 100) == ()


def test_a_run_of_so_many_steps_ends_within_an_epoch_and_resumes(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    recipe = preset(steps=5, evaluate_every=1, epochs=100)
    reports: list[Report] = []
    whole = run(squares, recipe, run_options(tmp_path / "whole"), validation=squares, on_progress=reports.append)
    assert (whole.steps, whole.pictures) == (5, 20)
    assert [r.step for r in reports if isinstance(r, EvaluationReport)] == [3, 5]
    last = [r for r in reports if isinstance(r, StepReport)][-1]
    assert (last.steps, last.epoch) == (5, 5 / 3)
    taken = 0

    def after_four() -> bool:
        nonlocal taken
        taken += 1
        return taken == 4

    assert not run(squares, recipe, run_options(tmp_path / "cut", should_stop=after_four)).finished
    run(squares, recipe, run_options(tmp_path / "cut", resume=True))
    one, two = (load_state(tmp_path / name / "state.pt") for name in ("whole", "cut"))
    assert one.step == two.step == 5
    torch.testing.assert_close(two.network, one.network, rtol=0, atol=0)


def test_a_run_from_before_a_setting_existed_resumes(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    run(squares, preset(epochs=1), run_options(tmp_path, should_stop=lambda: True))
    state = load_state(tmp_path / "state.pt")
    del state.settings["train"]["steps"]
    del state.settings["detector"]["loss"]["background_negatives"]
    save_state(tmp_path / "state.pt", state)
    assert run(squares, preset(epochs=1), run_options(tmp_path, resume=True)).finished
    save_state(tmp_path / "state.pt", state)
    with pytest.raises(ConfigError, match=r"train\.steps was 0 and is 9"):
        run(squares, preset(epochs=1, steps=9), run_options(tmp_path, resume=True))


def test_config_json_holds_what_the_caller_wants_recorded(
    squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    run(squares, preset(steps=1), run_options(tmp_path, record={"data": {"train": ["squares"]}}))
    written = json.loads((tmp_path / "config.json").read_text())
    assert list(written) == ["detector", "train", "data"]
    assert written["data"] == {"train": ["squares"]}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rehearsal_takes_real_steps_and_writes_nothing(
    squares: Dataset, tmp_path: Path, optimizer: str, run_options: MakeOptions
) -> None:
    recipe = preset(optimizer=optimizer, lr=10.0, warmup_steps=0)
    torch.manual_seed(0)
    detector = build(recipe.detector)
    before = {n: t.clone() for n, t in detector.network.state_dict().items()}
    rehearsal = rehearse(
        detector, squares, recipe.train, run_options(tmp_path / "run"), lambda seconds: len(seconds) == 4
    )
    assert len(rehearsal.seconds) == 4
    assert not (tmp_path / "run").exists()
    after = detector.network.state_dict()
    assert any(not torch.equal(before[n], after[n]) for n in before)
    # What it foretells is what a run leaves, but for names and headers.
    run(squares, preset(optimizer=optimizer), run_options(tmp_path / "run"))
    for name, foretold in (("last.safetensors", rehearsal.weights_bytes), ("state.pt", rehearsal.state_bytes)):
        assert 0 <= (tmp_path / "run" / name).stat().st_size - foretold < 600_000


def test_every_parameter_has_its_rate_and_decay() -> None:
    network = build(tiny(ONE_CLASS).detector).network
    config = TrainConfig(lr=1.0, bias_lr=2.0, backbone_lr=0.5, weight_decay=0.1)
    optimizer = make_optimizer(network, config)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    names = dict(network.named_parameters())
    assert len(settings) == len(names)
    assert settings[id(names["odm.levels.0.weight"])] == (1.0, 0.1)
    assert settings[id(names["odm.levels.0.bias"])] == (2.0, 0.0)
    assert settings[id(names["tcb.0.first.1.weight"])] == (1.0, 0.0)
    assert settings[id(names["backbone.features.1.conv.0.0.weight"])] == (0.5, 0.1)
    assert settings[id(names["backbone.features.1.conv.0.1.weight"])] == (0.5, 0.0)


def test_normalisation_is_decayed_on_request_alone() -> None:
    network = build(tiny(ONE_CLASS).detector).network
    optimizer = make_optimizer(network, TrainConfig(lr=1.0, bias_lr=2.0, weight_decay=0.1, decay_norm=True))
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    names = dict(network.named_parameters())
    assert settings[id(names["tcb.0.first.1.weight"])] == (1.0, 0.1)
    assert settings[id(names["tcb.0.first.1.bias"])] == (1.0, 0.1)
    assert settings[id(names["odm.levels.0.bias"])] == (2.0, 0.0)


def test_rates_and_decays_of_the_published_vgg_network() -> None:
    # Built without memory: rates and decays need no weights.
    with torch.device("meta"):
        network = build(refinedet320_vgg16(ONE_CLASS).detector).network
    optimizer = make_optimizer(network, TrainConfig(lr=1.0, weight_decay=0.1))
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    found: dict[str, set[tuple[float, float]]] = {"bias": set(), "scale": set(), "weight": set()}
    scales = {id(m.weight) for m in network.modules() if isinstance(m, L2Norm)}
    for name, parameter in network.named_parameters():
        kind = "scale" if id(parameter) in scales else "bias" if name.endswith("bias") else "weight"
        found[kind].add(settings[id(parameter)])
    assert len(scales) == 2
    assert found == {"bias": {(2.0, 0.0)}, "scale": {(1.0, 0.1)}, "weight": {(1.0, 0.1)}}


def test_early_epochs_use_a_smaller_input() -> None:
    recipe = tiny(ONE_CLASS)
    full = replace(recipe.detector.preprocess, height=320, width=512)
    at = input_sizes(full, replace(recipe.train, small_input=((0.6, 0.8), (0.3, 0.6))))
    sizes = [(p.height, p.width) for p in (at(0.0), at(0.29), at(0.3), at(0.59), at(0.6), at(0.99))]
    assert sizes == [(192, 320), (192, 320), (256, 384), (256, 384), (320, 512), (320, 512)]
