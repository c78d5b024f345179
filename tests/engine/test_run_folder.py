"""What explains a run: kept up to date, and never the reason that a run ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refinedet_cli.engine import run_folder
from refinedet_cli.engine.environment import read_starts
from refinedet_cli.engine.run_folder import RunFolder
from refinedet_cli.engine.watch import HealthReport
from refinedet_cli.errors import DataError


def begun(out: Path, told: list[HealthReport], step: int = 0) -> RunFolder:
    folder = RunFolder(out, ("refinedet", "train"), tensorboard=False, on_problem=told.append)
    folder.begin(step, device=torch.device("cpu"), precision="fp32", processes=1)
    return folder


def test_a_start_is_written_down_from_its_beginning_to_its_end(tmp_path):
    told: list[HealthReport] = []
    folder = begun(tmp_path, told)
    assert read_starts(tmp_path)[0].outcome == "running"
    assert not (tmp_path / "run.html").exists()
    folder.saved(3)
    assert read_starts(tmp_path)[0].to_step == 3
    assert "It was running when this page was written" in (tmp_path / "run.html").read_text()
    folder.end("stopped", 4)
    begun(tmp_path, told, 4).end("finished", 9)
    assert [(s.from_step, s.to_step, s.outcome) for s in read_starts(tmp_path)] == [
        (0, 4, "stopped"),
        (4, 9, "finished"),
    ]
    assert told == []


def test_the_page_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = 1000.0
    pages = []

    def write(out: Path) -> None:
        nonlocal now
        pages.append(now)
        now += 2.0

    monkeypatch.setattr(run_folder, "write_run_page", write)
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    folder = begun(tmp_path, [])
    for _ in range(300):
        folder.saved(1)
        now += 1.0
    assert 2 <= len(pages) <= 4
    folder.saved(1)
    count = len(pages)
    folder.saved(1)
    assert len(pages) == count
    folder.evaluation(1, None)
    folder.saved(1)
    assert len(pages) == count + 1
    folder.end("finished", 1)
    assert pages[-1] == now - 2.0


@pytest.mark.parametrize("error", [DataError("the disk is full", "free some space"), ZeroDivisionError("oops")])
def test_what_cannot_be_written_is_told_once_and_ends_no_run(tmp_path, monkeypatch, error):
    def fail(out: Path) -> None:
        raise error

    told: list[HealthReport] = []
    monkeypatch.setattr(run_folder, "write_run_page", fail)
    folder = begun(tmp_path, told)
    folder.saved(5)
    folder.end("finished", 5)
    [report] = told
    assert report.step == 5
    assert str(error) in report.message
    assert read_starts(tmp_path)[0].outcome == "finished"


def test_before_it_begins_nothing_is_written(tmp_path):
    folder = RunFolder(tmp_path, (), tensorboard=False, on_problem=lambda report: None)
    folder.saved(1)
    folder.end("failed")
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_drops_what_explains_an_older_one_and_nothing_else(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "tensorboard").mkdir()
    for name in ("run.html", "environment.json", "val/report.html", "val/metrics.json", "val/detections.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "tensorboard" / "events.out.tfevents.1.host.2.0").write_text("old")
    for name in ("notes.txt", "val/mine.json"):
        (tmp_path / name).write_text("mine")
    RunFolder(tmp_path, (), tensorboard=False, on_problem=lambda report: None).clear()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "notes.txt",
        "val/mine.json",
    ]
