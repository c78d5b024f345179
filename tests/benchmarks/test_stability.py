"""The benchmark that counts steps which are not finite."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def stability(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, cut down to one run a seed, of small batches."""
    module = load_script("benchmarks/stability.py")
    for name, value in {"BATCHES": (2,), "PRECISIONS": ("fp32",), "RATES": (4e-3,), "TURNS": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


def counts(output: str) -> list[int]:
    """Runs, steps, and those with a loss, gradients, boxes and weights that are not finite, of the table's one row."""
    return [int(column) for column in output.splitlines()[1].split()[3:9]]


def test_a_sound_run_passes(stability: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert stability.main(["--seeds", "2", "--steps", "2"]) == 0
    output = capsys.readouterr().out
    assert counts(output) == [2, 4, 0, 0, 0, 0]
    assert "0 not finite in 4 steps of 2 runs out of 2" in output


def test_it_goes_on_where_it_stopped(
    stability: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.json"
    call = ["--seeds", "2", "--steps", "1", "--json", str(file)]
    assert stability.main([*call, "--minutes", "0.0000001"]) == 0
    captured = capsys.readouterr()
    assert "of 1 runs out of 2" in captured.out
    assert len(json.loads(file.read_text())["runs"]) == 1
    assert stability.main(call) == 0
    captured = capsys.readouterr()
    assert counts(captured.out)[:2] == [2, 2]
    assert captured.err.count("not finite in 1 steps") == 1  # the other run is not done again
    with pytest.raises(SystemExit, match="its runs have 1 steps, not 2"):
        stability.main([*call, "--steps", "2"])


def test_weights_that_blow_up_are_counted_once_a_run(
    stability: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(stability, "learning_rate", lambda config, step, steps: float("inf") if step == 1 else 1.0)
    file = tmp_path / "runs.json"
    for _ in range(2):  # what failed stays failed
        assert stability.main(["--seeds", "2", "--steps", "3", "--json", str(file)]) == 1
        assert counts(capsys.readouterr().out) == [2, 4, 0, 0, 0, 2]


def test_losses_gradients_and_boxes_that_blow_up_are_counted(
    stability: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stability.build

    def poisoned(config: object) -> object:
        detector = real(config)
        detector.network.odm.levels[0].bias.data[:] = float("nan")
        return detector

    monkeypatch.setattr(stability, "build", poisoned)
    assert stability.main(["--seeds", "1", "--steps", "3"]) == 1
    assert counts(capsys.readouterr().out) == [1, 1, 1, 1, 1, 1]


def test_every_rate_and_precision_meets_every_batch_size(load_script: Callable[[str], ModuleType]) -> None:
    runs = list(load_script("benchmarks/stability.py").combinations(20))
    assert len(set(runs)) == 80
    assert set(Counter(run.batch for run in runs).values()) == {13, 14}
    assert set(Counter((run.lr, run.precision, run.batch) for run in runs).values()) == {3, 4}
    assert len({(run.batch, run.norm) for run in runs}) == 12
    assert set(Counter((run.seed, run.lr, run.precision) for run in runs).values()) == {1}


def test_the_time_of_a_step_is_measured(
    stability: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stability, "TIMED", 1)
    monkeypatch.setattr(stability, "WARM_UP", 0)
    assert stability.main(["--seeds", "3", "--steps", "100", "--time"]) == 0
    assert "3 runs of 100 steps: " in capsys.readouterr().out


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
