"""Training that goes wrong: it stops before anything is spoiled, says why, and leaves the step to be seen again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.core.structures import LossParts, Targets
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.loading import Batch
from refinedet_cli.engine import health as health_module
from refinedet_cli.engine import train as training
from refinedet_cli.engine.capture import CAPTURE_FILE, Capture, load_capture, replay, save_capture
from refinedet_cli.engine.diagnosis import Diagnosis, named_tensors
from refinedet_cli.engine.distributed import Processes
from refinedet_cli.engine.health import Health, NonFiniteError, measure
from refinedet_cli.engine.recipe import make_optimizer
from refinedet_cli.engine.run_log import StepReport
from refinedet_cli.engine.train import Report, RunOptions, rehearse, train
from refinedet_cli.errors import CheckpointError, DataError
from refinedet_cli.zoo.checkpoint import load_detector

MakeOptions = Callable[..., RunOptions]
SAVED = (training.STATE_FILE, training.LAST_FILE, training.BEST_FILE)
CPU = torch.device("cpu")
CLASSES = Classes(names=("square",), category_ids=(7,))


def preset(**changes: Any) -> Preset:
    base = tiny(CLASSES)
    settings = {"batch": 2, "steps": 4, "warmup_steps": 0, "precision": "fp32", "freeze_norm": False, **changes}
    return replace(base, train=replace(base.train, **settings))


def fails(
    data: Dataset,
    recipe: Preset,
    chosen: RunOptions,
    spoil: Callable[[Detector], Detector | None] = lambda detector: None,
) -> tuple[NonFiniteError, list[Report]]:
    """Train a detector, spoiled before it begins, until it fails."""
    torch.manual_seed(0)
    detector = build(recipe.detector)
    reports: list[Report] = []
    with pytest.raises(NonFiniteError) as raised:
        train(spoil(detector) or detector, data, None, recipe.train, chosen, reports.append)
    return raised.value, reports


def bits(diagnosis: Diagnosis) -> str:
    """All numbers of a diagnosis, in full; NaN equals itself."""
    return repr(diagnosis)


def test_a_picture_that_is_not_finite_is_named_and_nothing_has_changed(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    recipe = preset()
    mean = replace(recipe.detector.preprocess, mean=(1e39, 0.0, 0.0))  # beyond float32
    recipe = replace(recipe, detector=replace(recipe.detector, preprocess=mean))
    kept: list[tuple[Detector, dict[str, torch.Tensor]]] = []

    def remember(detector: Detector) -> None:
        kept.append((detector, {n: t.clone() for n, t in detector.network.state_dict().items()}))

    error, reports = fails(four_squares, recipe, run_options(tmp_path), remember)
    diagnosis = error.diagnosis
    assert diagnosis is not None
    assert reports == [diagnosis]
    assert (diagnosis.fault, diagnosis.step, error.exit_code) == ("pictures", 1, 7)
    assert [p.finite for p in diagnosis.pictures] == [False, False]
    assert {(p.image_id, p.file_name) for p in diagnosis.pictures} < {(10 + i, f"{i}.png") for i in range(4)}
    assert diagnosis.pictures[0].file_name in error.message
    assert "preprocess.mean" in str(error.hint)
    # The statistics of batch normalisation, which saw the pictures, are as they were too.
    detector, before = kept[0]
    torch.testing.assert_close(dict(detector.network.state_dict()), before, rtol=0, atol=0)
    assert (tmp_path / CAPTURE_FILE).is_file()
    assert not any((tmp_path / name).exists() for name in SAVED)


def test_weights_that_are_not_finite_are_named(four_squares: Dataset, tmp_path: Path, run_options: MakeOptions) -> None:
    def spoil(detector: Detector) -> None:
        detector.network.get_parameter("odm.levels.1.bias").data[0] = math.nan

    error, _ = fails(four_squares, preset(), run_options(tmp_path), spoil)
    diagnosis = error.diagnosis
    assert diagnosis is not None
    assert diagnosis.fault == "weights"
    assert "weights are not finite from the start: odm.levels.1.bias" in error.message
    parts = {part.name: part for part in diagnosis.parts}
    assert parts["odm"].bad_weights == ("odm.levels.1.bias",)
    assert not parts["arm"].bad_weights
    outputs = {output.name: output for output in diagnosis.outputs}
    assert (outputs["odm_logits"].bad_stride, outputs["arm_logits"].bad) == (16, 0)
    assert math.isnan(diagnosis.terms["odm_conf"])
    assert math.isfinite(diagnosis.terms["arm_conf"])


def test_a_rate_that_explodes_is_stopped_and_what_was_saved_stays(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    # The first step is saved, as at the beginning of every run; the second, from its weights, overflows.
    error, reports = fails(four_squares, preset(optimizer="sgd", lr=1e30, steps=3), run_options(tmp_path))
    assert error.diagnosis is not None
    assert error.diagnosis.step == 2
    assert error.diagnosis.fault in ("outputs", "weights")
    assert "lower train.lr" in str(error.hint)
    assert str(tmp_path / "state.pt") in str(error.hint)
    assert reports[-1] is error.diagnosis
    state = training.load_state(tmp_path / "state.pt")
    assert state.step == 1
    assert all(bool(t.isfinite().all()) for t in state.network.values())
    # What the folder holds is what the first step left.
    assert load_detector(tmp_path / training.LAST_FILE).provenance["step"] == 1


def test_weights_are_looked_at_before_they_are_saved(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    error, _ = fails(four_squares, preset(optimizer="sgd", lr=1e38, clip_norm=0.0, steps=1), run_options(tmp_path))
    assert error.diagnosis is not None
    assert error.diagnosis.fault == "weights"
    assert "weights are not finite after step 1 (rate 1e+38" in error.message
    assert (tmp_path / CAPTURE_FILE).is_file()
    assert not any((tmp_path / name).exists() for name in SAVED)


def overflow(detector: Detector) -> None:
    """Make the ARM ask for boxes so far away that they leave the range of float32."""
    network = detector.network
    bias = network.get_parameter("arm.levels.0.bias").data.view(3, 6)
    bias[:, 2] = 3e38
    network.get_parameter("arm.levels.0.weight").data.mul_(1e3)


def test_boxes_that_overflow_are_named_by_their_offsets_and_level(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    error, _ = fails(four_squares, preset(), run_options(tmp_path), overflow)
    diagnosis = error.diagnosis
    assert diagnosis is not None
    assert diagnosis.fault == "outputs"
    arm = next(output for output in diagnosis.outputs if output.name == "arm_offsets")
    assert (arm.bad, arm.values, arm.bad_stride) == (2 * 64 * 3, 2 * 255 * 4, 8)
    assert "arm_offsets (384 of 2,040 values, first on the level of stride 8)" in error.message


def poisoned(detector: Detector) -> Detector:
    """Give the gradient of one term a hole, as the square root of zero does."""

    def criterion(raw: Any, targets: Any, **more: Any) -> LossParts:
        loss = detector.criterion(raw, targets, **more)
        zero = raw.odm_logits.float().sum() * 0
        return loss._replace(total=loss.total + zero.abs().sqrt())

    return replace(detector, criterion=criterion)


def test_gradients_that_are_not_finite_are_told_by_part(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    error, _ = fails(four_squares, preset(), run_options(tmp_path), poisoned)
    diagnosis = error.diagnosis
    assert diagnosis is not None
    assert diagnosis.fault == "gradients"
    assert math.isfinite(diagnosis.total)
    parts = {part.name: part for part in diagnosis.parts}
    assert list(parts) == ["backbone", "arm", "tcb", "odm"]
    assert parts["odm"].bad_gradients
    assert not parts["arm"].bad_gradients
    assert math.isfinite(parts["arm"].gradient_norm or math.nan)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_capture_replays_to_the_same_bits(
    four_squares: Dataset, tmp_path: Path, precision: Any, run_options: MakeOptions
) -> None:
    error, _ = fails(
        four_squares,
        preset(optimizer="adamw", unfreeze=((0.5, 0),), freeze_stages=2),
        run_options(tmp_path, precision=precision),
        overflow,
    )
    capture = load_capture(tmp_path / CAPTURE_FILE)
    assert (capture.step, capture.precision, capture.frozen, capture.device) == (1, precision, 2, "cpu")
    again = replay(capture, device=CPU)
    assert error.diagnosis is not None
    assert bits(again.diagnosis) == bits(error.diagnosis)
    assert not again.finite
    other = replay(capture, device=CPU, precision="fp32")
    assert other.diagnosis.precision == "fp32"
    assert other.before == (precision, "cpu")
    # It holds plain data only.
    torch.load(tmp_path / CAPTURE_FILE, weights_only=True)


def test_a_replay_goes_on_to_the_optimiser_where_it_can(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    fails(four_squares, preset(optimizer="sgd", clip_norm=0.0), run_options(tmp_path), overflow)
    capture = load_capture(tmp_path / CAPTURE_FILE)
    mended = dict(capture.network)
    mended["arm.levels.0.bias"] = torch.zeros_like(mended["arm.levels.0.bias"])
    again = replay(replace(capture, network=mended), device=CPU)
    assert again.finite
    assert (again.diagnosis.fault, again.diagnosis.cure) == ("none", "")
    assert not replay(replace(capture, network=mended, factor=1e41), device=CPU).finite


def test_a_capture_that_cannot_be_read_is_refused(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    fails(four_squares, preset(), run_options(tmp_path), overflow)
    path = tmp_path / CAPTURE_FILE
    capture = load_capture(path)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_capture(tmp_path / "nowhere.pt")
    save_capture(path, replace(capture, network={}))
    with pytest.raises(CheckpointError, match="do not fit each other"):
        replay(load_capture(path), device=CPU)
    torch.save({"version": 1}, path)
    with pytest.raises(CheckpointError, match="not a step of a run"):
        load_capture(path)
    content = {"kind": "refinedet step", **vars(capture)}
    torch.save({**content, "version": 9}, path)
    with pytest.raises(CheckpointError, match="version 9"):
        load_capture(path)
    torch.save({**content, "version": 1, "more": 1}, path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_capture(path)
    path.write_bytes(b"\x00" * 10)
    with pytest.raises(CheckpointError, match="not a readable file"):
        load_capture(path)


def test_a_capture_that_cannot_be_written_hides_nothing(
    four_squares: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_options: MakeOptions
) -> None:
    def full(path: Path, capture: Capture) -> None:
        raise DataError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(health_module, "save_capture", full)
    error, _ = fails(four_squares, preset(), run_options(tmp_path), overflow)
    assert "arm_offsets" in error.message
    assert "the step could not be kept: cannot write" in str(error.hint)


def test_a_rehearsal_stops_too_and_leaves_nothing(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    recipe = preset()
    detector = build(recipe.detector)
    overflow(detector)
    with pytest.raises(NonFiniteError, match="arm_offsets"):
        rehearse(detector, four_squares, recipe.train, run_options(tmp_path), lambda seconds: True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_goes_well_is_left_alone(
    four_squares: Dataset, tmp_path: Path, optimizer: str, run_options: MakeOptions
) -> None:
    recipe = preset(steps=40, optimizer=optimizer, warmup_steps=100, batch=1)
    torch.manual_seed(0)
    reports: list[Report] = []
    train(build(recipe.detector), four_squares, None, recipe.train, run_options(tmp_path), reports.append)
    assert {type(report) for report in reports} == {StepReport}
    assert not (tmp_path / "health.csv").exists()
    assert not (tmp_path / CAPTURE_FILE).exists()


def test_a_new_run_drops_the_capture_of_the_one_before(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    fails(four_squares, preset(), run_options(tmp_path), overflow)
    assert (tmp_path / CAPTURE_FILE).is_file()
    recipe = preset(steps=1)
    reports: list[Report] = []
    train(build(recipe.detector), four_squares, None, recipe.train, run_options(tmp_path), reports.append)
    assert not (tmp_path / CAPTURE_FILE).exists()


class _Two(Processes):
    """The first of two processes, the other of which has so many numbers that are not finite."""

    count = 2

    def __init__(self, rank: int, elsewhere: float) -> None:
        self.rank, self.elsewhere = rank, elsewhere

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + self.elsewhere


@pytest.mark.parametrize(
    ("rank", "here", "elsewhere", "norm", "good", "culprit"),
    [
        pytest.param(0, 1.0, 0.0, 1.0, True, False, id="all is well"),
        pytest.param(0, math.nan, 0.0, math.nan, False, True, id="here"),
        pytest.param(1, math.nan, 0.0, math.nan, False, True, id="here, second"),
        pytest.param(0, 1.0, 1.0, math.nan, False, False, id="elsewhere"),
        pytest.param(0, 1.0, 1.0, 1.0, False, False, id="elsewhere, gradients finite"),
        pytest.param(1, 1.0, 1.0, 1.0, False, False, id="elsewhere, second"),
        pytest.param(0, 1.0, 0.0, math.inf, False, True, id="gradients alone"),
        pytest.param(1, 1.0, 0.0, math.inf, False, False, id="gradients alone, second"),
    ],
)
def test_processes_stop_together_and_one_tells(
    rank: int, here: float, elsewhere: float, norm: float, good: bool, culprit: bool
) -> None:
    total = torch.tensor(1.0)
    loss = LossParts(total, {"loc": total}, {"head": torch.tensor(3.0)})
    offsets = torch.tensor([[[here, 2.0, -7.0, 5.0]]])
    vitals = measure({"offsets": offsets}, loss, torch.tensor(norm), _Two(rank, elsewhere))
    assert (vitals.good, vitals.culprit) == (good, culprit)
    assert (vitals.positives, vitals.sizes) == ({"head": 3.0}, {"offsets": 7.0})


def test_what_another_process_tells_is_what_is_raised(
    four_squares: Dataset, tmp_path: Path, run_options: MakeOptions
) -> None:
    error, _ = fails(four_squares, preset(), run_options(tmp_path / "other"), overflow)
    assert error.diagnosis is not None

    class First(_Two):
        def gather(self, value: Any) -> list[Any]:
            assert value is None  # this one has nothing to tell
            return [value, health_module._Told(error.message, str(error.hint), error.diagnosis)]

    recipe = preset()
    detector, reports = build(recipe.detector), list[Any]()
    health = Health(
        detector,
        recipe.train,
        four_squares,
        make_optimizer(detector.network, recipe.train),
        settings={},
        precision="fp32",
        out=tmp_path,
        state=tmp_path / "state.pt",
        on_report=reports.append,
        processes=First(0, 1.0),
    )
    one, empty = torch.tensor(1.0), torch.empty(0, dtype=torch.int64)
    batch = Batch(torch.zeros(1, 3, 64, 64), Targets(torch.empty(0, 4), empty, empty, 1), (0,))
    with pytest.raises(NonFiniteError) as raised:
        health.judge(
            batch, {"offsets": torch.zeros(1, 1, 4)}, LossParts(one, {}, {}), one, step=1, factor=1.0, frozen=0
        )
    assert raised.value.message == error.message
    assert reports == [error.diagnosis]
    assert not (tmp_path / CAPTURE_FILE).exists()


def test_outputs_are_found_by_name_in_any_nesting() -> None:
    one, two = torch.zeros(1), torch.ones(2)
    raw = LossParts(one, {"inner": two}, {"ids": torch.zeros(1, dtype=torch.int64)})
    assert [(name, len(t)) for name, t in named_tensors(raw)] == [("total", 1), ("inner", 2)]
    assert [name for name, _ in named_tensors([one, (two, 3)])] == ["output 0", "output 1 0"]
