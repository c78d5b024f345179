"""The benchmark that counts steps which are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def stability(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, cut down to one combination."""
    module = load_script("benchmarks/stability.py")
    for name, values in {"BATCHES": (4,), "PRECISIONS": ("fp32",), "RATES": (4e-3,), "NORMS": ("frozen",)}.items():
        monkeypatch.setattr(module, name, values)
    return module


def counts(output: str) -> list[int]:
    """Steps, and those with a loss, gradients and weights that are not finite, of the table's one row."""
    return [int(column) for column in output.splitlines()[1].split()[4:8]]


def test_a_sound_run_passes(stability: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert stability.main(["--seeds", "2", "--steps", "3"]) == 0
    output = capsys.readouterr().out
    assert counts(output) == [6, 0, 0, 0]
    assert "0 not finite in 6 steps" in output


def test_weights_that_blow_up_are_counted_once_a_run(
    stability: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stability, "learning_rate", lambda config, step, steps: float("inf") if step == 1 else 1.0)
    assert stability.main(["--seeds", "2", "--steps", "3"]) == 1
    assert counts(capsys.readouterr().out) == [4, 0, 0, 2]


def test_losses_and_gradients_that_blow_up_are_counted(
    stability: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stability.build

    def poisoned(config: object) -> object:
        detector = real(config)
        detector.network.odm.levels[0].bias.data[0] = float("nan")
        return detector

    monkeypatch.setattr(stability, "build", poisoned)
    assert stability.main(["--seeds", "1", "--steps", "3"]) == 1
    assert counts(capsys.readouterr().out) == [1, 1, 1, 1]


def test_pictures_are_empty_crowded_and_plain(stability: ModuleType, tmp_path: Path) -> None:
    dataset = stability.draw_pictures(tmp_path, 0)
    numbers = [len(record) for record in dataset.records]
    assert set(numbers[::4]) == {0}
    assert min(numbers[1::4]) > 60
    assert 0 < max(numbers[2::4] + numbers[3::4]) <= 3
    for record in dataset.records:
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert (record.boxes >= 0).all()
        assert (record.boxes[:, 2:] <= (record.width, record.height)).all()
        assert len(np.unique(record.boxes, axis=0)) < len(record) or len(record) <= 3


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--device", "abacus"]])
def test_wrong_options_are_refused(stability: ModuleType, options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        stability.main(options)
    assert ended.value.code == 2
