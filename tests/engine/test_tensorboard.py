"""Event files: TensorBoard reads of them what the CSV files say, and of a resumed run every step once."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refinedet_cli.engine import tensorboard
from refinedet_cli.engine.run_log import StepReport
from refinedet_cli.engine.tensorboard import EventFiles, drop_events, require_tensorboard
from refinedet_cli.errors import UsageError
from refinedet_cli.metrics.coco import CocoResult

REPORT = StepReport(
    step=1,
    steps=9,
    epoch=0.5,
    lr=0.01,
    input_size=(64, 64),
    total=3.5,
    parts={"conf": 2.5, "loc": 1.0},
    positives={"odm": 17.0},
    gradient_norm=9.0,
    pictures_per_second=12.5,
    seconds_left=3.0,
)
NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
RECALLS = ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def result(ap: float) -> CocoResult:
    numbers = {**dict.fromkeys((*NAMES, *RECALLS), ap), "AP_large": None}
    arrays = {name: np.zeros(0) for name in ("precision", "recall", "scores")}
    return CocoResult(pictures=3, per_class=(), **numbers, **arrays)


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves as TensorBoard shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def write(folder: Path, done: int, until: int, offset: float = 0.0) -> None:
    """Write the events of a start that begins after ``done`` steps."""
    files = EventFiles(folder, done)
    for step in range(done + 1, until + 1):
        files.steps(replace(REPORT, step=step, total=step + offset))
        if step % 2 == 0:
            files.evaluation(step, result(step / 8))
    files.close()


def test_curves_are_those_of_the_reports(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, 0, 4)
    curves = read(tmp_path)
    assert curves["loss/total"] == [(i, i) for i in range(1, 5)]
    assert curves["loss/conf"][0] == (1, 2.5)
    assert curves["positives/odm"][0] == (1, 17.0)
    assert curves["train/lr"][0] == (1, pytest.approx(0.01))
    assert curves["validation/AP"] == [(2, 0.25), (4, 0.5)]
    assert "validation/AP_large" not in curves
    assert {"train/gradient_norm", "train/pictures_per_second", "train/epoch"} <= curves.keys()


def test_a_resumed_run_draws_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, 0, 6)
    write(tmp_path, 3, 8, offset=0.5)  # saved after step 3: steps 4 to 6 were lost, and are taken again
    curves = read(tmp_path)
    assert curves["loss/total"] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5), (7, 7.5), (8, 8.5)]
    assert [step for step, _ in curves["validation/AP"]] == [2, 4, 6, 8]


def test_events_of_an_earlier_run_go_and_other_files_stay(tmp_path):
    pytest.importorskip("tensorboard")
    write(tmp_path, 0, 2)
    (tmp_path / "notes.txt").write_text("mine")
    drop_events(tmp_path)
    drop_events(tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_package_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError) as caught:
        require_tensorboard()
    assert "the package tensorboard" in caught.value.message
    assert 'pip install "refinedet[tensorboard]"' in str(caught.value.hint)
    with pytest.raises(UsageError):
        tensorboard.EventFiles(Path("nowhere"), 0)
