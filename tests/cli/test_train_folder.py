"""What `refinedet train` leaves in the folder of a run: page, environment, report and TensorBoard files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from refinedet_cli.cli.app import main
from refinedet_cli.errors import DataError

FAST = ("--weights", "none", "--preset", "tiny", "--precision", "fp32", "--workers", 0, "--batch", 4)


class Run(NamedTuple):
    """A run that was stopped and resumed: its folder, its data, and what both commands said."""

    folder: Path
    data: Path
    command: tuple[str, ...]
    first: dict
    second: dict


def call(*args: object) -> dict:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([str(arg) for arg in args]) == 0
    return json.loads(said.getvalue())


@pytest.fixture(scope="module")
def data(coloured_squares):
    """Eight pictures with squares of two classes."""
    return coloured_squares(8)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run"
    command = ("train", "--data", data, "--val", data, "--out", folder, "--epochs", 3, *FAST, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        first = call(*command, "--stop-after", 1e-5)
        second = call(*command, "--resume")
    return Run(folder, data, tuple(map(str, command)), first, second)


def test_every_start_is_in_the_environment(done):
    starts = json.loads((done.folder / "environment.json").read_text())["starts"]
    assert [(s["from_step"], s["to_step"], s["outcome"]) for s in starts] == [(0, 1, "stopped"), (1, 6, "finished")]
    assert starts[0]["command"] == ["refinedet", *done.command, "--stop-after", "1e-05"]
    assert starts[1]["command"] == ["refinedet", *done.command, "--resume"]
    assert starts[1]["folder"] == str(done.folder.parent)
    assert starts[1]["environment"]["device"] == "cpu"


def test_the_page_shows_the_resumed_run(done):
    assert done.first["finished"] is False
    assert done.first["report"] is None
    assert done.second["page"] == str(done.folder / "run.html")
    html = (done.folder / "run.html").read_text()
    assert "It went to its end, 3 epochs (6 steps of 4 pictures)" in html
    assert "in 2 starts" in html
    assert 'class="resumed"' in html
    assert "refinedet eval --dataset" in html
    assert "--weights &#39;a run/best.safetensors&#39;" in html
    assert "red</td>" in html


def test_the_report_is_what_eval_says_of_the_best_weights(run, done, tmp_path):
    assert done.second["report"] == str(done.folder / "val" / "report.html")
    assert '<a href="val/report.html">' in (done.folder / "run.html").read_text()
    written = json.loads((done.folder / "val" / "metrics.json").read_text())
    with (done.folder / "metrics.csv").open(newline="") as file:
        best = max(float(row["AP"]) for row in csv.DictReader(file))
    assert written["metrics"]["AP"] == best == done.second["best_AP"]
    ended = run(
        *("eval", "--dataset", done.data, "--weights", done.folder / "best.safetensors", "--batch", 4),
        *("--out", tmp_path, "--report", tmp_path / "report.html", "--engine", "pycocotools", "--quiet"),
    )
    assert ended.code == 0, ended.stderr
    measured = json.loads((tmp_path / "metrics.json").read_text())
    for key in ("schema_version", "command", "origin", "metrics", "classes", "conventions", "reasons", "complete"):
        assert written[key] == measured[key], key
    assert (done.folder / "val" / "detections.json").read_bytes() == (tmp_path / "detections.json").read_bytes()


def test_a_report_that_is_there_is_not_made_again(run, done, monkeypatch):
    monkeypatch.chdir(done.folder.parent)
    report = done.folder / "val" / "report.html"
    before = report.stat().st_mtime_ns
    ended = run(*done.command, "--resume")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["report"] == str(report)
    assert report.stat().st_mtime_ns == before
    # Of other weights it is made anew, though this start evaluated nothing.
    metrics = done.folder / "val" / "metrics.json"
    document = json.loads(metrics.read_text())
    good = document["metrics"]
    document["origin"]["sha256"] = "other"
    metrics.write_text(json.dumps(document))
    ended = run(*done.command, "--resume")
    assert ended.code == 0, ended.stderr
    assert report.stat().st_mtime_ns > before
    assert json.loads(metrics.read_text())["metrics"] == pytest.approx(good)


def test_without_validation_there_is_a_page_and_no_report(run, data, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    ended = run(
        "train", "--data", data, "--val", "none", "--out", out, "--epochs", 1, *FAST, "--tensorboard", "--overwrite"
    )
    assert ended.code == 0, ended.stderr
    assert f"page: {out / 'run.html'}\n" in ended.stdout
    assert not (out / "val").exists()
    assert len(list((out / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_tensorboard_that_is_not_installed_is_told_before_anything_is_done(run, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    ended = run("train", "--data", data, "--out", tmp_path / "run", *FAST, "--tensorboard")
    assert ended.code == 2
    assert 'hint: pip install "refinedet[tensorboard]"' in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_is_known_to_have_failed(run, data, tmp_path, monkeypatch):
    def fail(self: object) -> bool:
        raise DataError("a picture is gone", "put it back")

    monkeypatch.setattr("refinedet_cli.engine.train._Run._take_steps", fail)
    ended = run("train", "--data", data, "--val", "none", "--out", tmp_path / "run", "--epochs", 1, *FAST)
    assert ended.code == 4, ended.stderr
    [start] = json.loads((tmp_path / "run" / "environment.json").read_text())["starts"]
    assert (start["outcome"], start["to_step"]) == ("failed", 0)
    assert "It failed after" in (tmp_path / "run" / "run.html").read_text()
