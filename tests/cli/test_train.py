"""`refinedet train` from the command line: a new run, its folder, resume, and what is refused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine.run_state import load_state
from refinedet_cli.zoo.checkpoint import load_detector, save_checkpoint

FAST = ("--set", "train.evaluate_every=0", "--precision", "fp32", "--workers", 0, "--batch", 4)


@pytest.fixture(scope="module")
def data(coloured_squares):
    """Ten pictures with squares of two classes."""
    return coloured_squares(10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A detector of the tiny preset that knows red and blue."""
    torch.manual_seed(5)
    config = tiny(Classes(names=("red", "blue"), category_ids=(1, 2))).detector
    path = tmp_path_factory.mktemp("weights") / "colours.safetensors"
    save_checkpoint(path, config, build(config).network.state_dict(), {})
    return path


def test_a_run_from_scratch_leaves_weights_that_detect(run, data, tmp_path):
    out = tmp_path / "run"
    ended = run("train", "--data", data, "--out", out, "--weights", "none", "--preset", "tiny", "--epochs", 2, *FAST)
    assert ended.code == 0, ended.stderr
    assert "held out of" in ended.stderr
    loaded = load_detector(out / "best.safetensors")
    assert loaded.config.classes == Classes(names=("green", "red"), category_ids=(3, 4))
    assert loaded.provenance["train"]["epochs"] == 2
    found = run("detect", data.parent / "0.png", "--weights", out / "best.safetensors", "--json")
    assert found.code == 0, found.stderr
    assert json.loads(found.stdout)["pictures"]


def test_json_is_one_document_and_replays(run, data, tmp_path):
    first = run(
        *("train", "--data", data, "--val", data, "--out", tmp_path / "a", "--weights", "none", "--preset", "tiny"),
        *("--epochs", 1, "--seed", 3, "--set", "loss.neg_ratio=2", "--json", *FAST),
    )
    assert first.code == 0, first.stderr
    document = json.loads(first.stdout)
    assert document["command"] == "train"
    assert document["finished"] is True
    assert document["config"]["detector"]["loss"]["neg_ratio"] == 2.0
    again = run("train", "--config", tmp_path / "a" / "config.json", "--out", tmp_path / "b", "--workers", 0)
    assert again.code == 0, again.stderr
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    one, two = (load_detector(tmp_path / name / "last.safetensors") for name in "ab")
    torch.testing.assert_close(one.detector.network.state_dict(), two.detector.network.state_dict(), rtol=0, atol=0)


def test_a_run_file_names_data_start_and_settings_and_options_win(run, data, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "mine.toml"
    recipe.write_text(
        f"""
        [data]
        train = [{str(data)!r}]
        val = ["none"]
        [start]
        preset = "tiny"
        weights = {str(weights)!r}
        [train]
        steps = 3
        batch = 4
        precision = "fp32"
        """
    )
    call = ("train", "--config", "recipes/mine.toml", "--workers", 0, "--json")
    first = run(*call, "--out", "runs/a")
    assert first.code == 0, first.stderr
    assert "validation: none" in first.stderr
    assert "3 steps (1.5 epochs) of batch 4" in first.stderr
    assert "class outputs taken over by name: red" in first.stderr
    document = json.loads(first.stdout)
    assert (document["steps"], document["AP"]) == (3, None)
    written = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert document["config"] == written
    assert written["data"] == {"train": [str(data)], "val": ["none"], "images": None, "root": None}
    assert written["start"] == {"weights": str(weights), "backbone_weights": None}
    second = run(*call, "--out", "runs/b", "--epochs", 1, "--weights", "none", "--val", data, "--set", "train.lr=0.5")
    assert second.code == 0, second.stderr
    assert "start: random weights" in second.stderr
    document = json.loads(second.stdout)
    assert document["steps"] == 2
    assert document["AP"] is not None
    assert document["config"]["train"]["steps"] == 0
    assert document["config"]["train"]["lr"] == 0.5
    # Other data than the file's is not validated on what the file names.
    third = run(*call, "--out", "runs/c", "--data", data)
    assert "held out of" in third.stderr


def test_a_dry_run_says_what_would_happen_and_writes_nothing(run, data, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ("train", "--data", data, "--weights", weights, "--dry-run", *FAST, "--set", "train.steps=500")
    shown = run(*call, "--set", "train.schedule=multistep", "--set", "train.milestones=[0.5, 0.8]")
    assert shown.code == 0, shown.stderr
    rows = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in shown.stdout.splitlines()[1:])
    assert list(rows) == [
        *("training data", "validation data", "input", "parameters", "length", "learning rate", "a step"),
        *("training", "with evaluation", "memory", "on disk"),
    ]
    assert rows["learning rate"] == "0.001, lower after 250, 400 steps"
    assert rows["length"].startswith("500 steps, ")
    as_json = run(*call, "--json", "--out", "runs/a")
    document = json.loads(as_json.stdout)
    assert document["dry_run"]["steps"] == 500
    assert document["dry_run"]["step_seconds"] > 0
    assert document["config"]["train"]["steps"] == 500
    assert document["config"]["data"]["train"] == [str(data)]
    assert list(tmp_path.iterdir()) == []


def test_a_preview_is_drawn_and_nothing_trained(run, data, weights, tmp_path):
    sheet = tmp_path / "sheets" / "first.png"
    call = ("train", "--data", data, "--weights", weights, "--preview", sheet, *FAST)
    shown = run(*call)
    assert shown.code == 0, shown.stderr
    assert shown.stdout == f"{sheet}: 16 samples\n"
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.safetensors").touch()  # a run that is there already is in nobody's way
    document = json.loads(run(*call, "--out", tmp_path / "run", "--json").stdout)
    assert document["preview"]["file"] == str(sheet)
    first = document["preview"]["samples"][0]
    assert list(first) == ["file_names", "done", "epoch", "input_size", "objects", "smallest"]
    assert document["config"]["train"]["batch"] == 4
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["last.safetensors"]


def test_a_dry_run_with_a_preview_does_both(run, data, weights, tmp_path):
    sheet = tmp_path / "first.png"
    call = ("train", "--data", data, "--weights", weights, "--preview", sheet, "--dry-run", *FAST)
    shown = run(*call)
    assert shown.code == 0, shown.stderr
    assert shown.stdout.startswith(f"{sheet}: 16 samples\n")
    assert "Dry run: nothing is written but the preview" in shown.stdout
    document = json.loads(run(*call, "--json").stdout)
    assert document["preview"]["file"] == str(sheet)
    assert document["dry_run"]["step_seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["first.png"]


def test_a_batch_may_be_looked_for(run, data, weights, tmp_path, monkeypatch):
    from refinedet_cli.engine import batch_size

    found = batch_size.FoundBatch(5, "10 is no faster", ())
    monkeypatch.setattr(batch_size, "find_batch", lambda *args: found)
    call = ("train", "--data", data, "--weights", weights, "--preview", tmp_path / "a.png", *FAST[:-2])
    ended = run(*call, "--batch", "auto", "--json")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["config"]["train"]["batch"] == 5
    said = ended.stderr.splitlines()
    assert said[0] == "--batch auto: trying out batches"
    assert "batch: 5 found by trial; 10 is no faster" in said
    assert "batch: train.lr stays 0.001, which the recipe pairs with a batch of 8" in said


def test_a_run_that_ends_early_says_so(run, data, weights, tmp_path):
    call = ("train", "--data", data, "--val", data, "--out", tmp_path / "run", "--weights", weights, "--batch", 10)
    patience = ("--set", "train.patience=1", "--set", "train.evaluate_every=1", "--set", "train.lr=1e-9")
    ended = run(*call, "--epochs", 9, *patience, "--workers", 0, "--precision", "fp32")
    assert ended.code == 0, ended.stderr
    assert "the run ends here, as train.patience asks: 1 evaluation without a better AP than 0." in ended.stderr
    assert ended.stdout.startswith("Training, ended early: AP no longer rose")
    assert {"best.safetensors", "last.safetensors"} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_what_is_missing_is_said(run, data, tmp_path):
    nothing = run("train", "--out", tmp_path / "run")
    assert (nothing.code, nothing.stderr.splitlines()[0]) == (
        2,
        "error: there is no data to train on: --data is missing",
    )
    empty = tmp_path / "empty.toml"
    empty.write_text("[train]\nlr = 0.1\n")
    neither = run("train", "--out", tmp_path / "run", "--config", empty)
    assert neither.code == 2
    assert f"--data is missing, and {empty} names none" in neither.stderr
    nowhere = run("train", "--data", data)
    assert nowhere.code == 2
    assert "--out is missing" in nowhere.stderr


def test_two_kinds_of_weights_are_refused_before_any_is_looked_for(run, data, tmp_path):
    both = ("--weights", tmp_path / "x.safetensors", "--backbone-weights", "imagenet")
    ended = run("train", "--data", data, "--out", tmp_path / "run", "--preset", "tiny", *both)
    assert ended.code == 2
    assert "exclude each other" in ended.stderr


def test_it_starts_from_weights_and_says_which_classes_it_knows(run, data, weights, tmp_path):
    ended = run("train", "--data", data, "--out", tmp_path / "run", "--weights", weights, "--epochs", 1, *FAST)
    assert ended.code == 0, ended.stderr
    assert "class outputs taken over by name: red; new: green" in ended.stderr
    provenance = load_detector(tmp_path / "run" / "last.safetensors").provenance
    assert provenance["start"] == {"weights": "colours.safetensors", "classes_taken_over": ["red"]}


def test_a_folder_with_a_run_is_neither_overwritten_nor_resumed_unasked(run, data, weights, tmp_path):
    call = ("train", "--data", data, "--out", tmp_path / "run", "--weights", weights, "--epochs", 2, *FAST)
    stopped = run(*call, "--stop-after", 1e-6, "--json")
    assert stopped.code == 0, stopped.stderr
    assert json.loads(stopped.stdout)["finished"] is False
    refused = run(*call)
    assert refused.code == 2
    assert "holds a run already" in refused.stderr
    resumed = run(*call, "--resume", "--json")
    assert json.loads(resumed.stdout)["steps"] == 4
    assert "resume: going on after step 1 of 4 (epoch 0.5 of 2.0)\n" in resumed.stderr
    ended = run(*call, "--resume")
    assert "resume: the run has ended after step 4 of 4 (epoch 2.0 of 2.0); there is nothing left to" in ended.stderr
    both = run(*call, "--resume", "--overwrite")
    assert (both.code, "--resume and --overwrite exclude each other" in both.stderr) == (2, True)
    changed = run(*call, "--resume", "--set", "train.lr=0.5")
    assert changed.code == 3
    assert "train.lr was" in changed.stderr
    assert run(*call, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        pytest.param(("--set", "train.lr=-1"), 3, "train.lr must be positive", id="out of range"),
        pytest.param(("--set", "train.lr"), 2, "has no value", id="no value"),
        pytest.param(("--set", "loss.nonsense=1"), 3, "unknown setting", id="unknown setting"),
        pytest.param(("--preset", "yolo"), 3, "no preset is called 'yolo'", id="unknown preset"),
        pytest.param(("--config", "nowhere.toml"), 3, "nowhere.toml", id="missing run file"),
        pytest.param(("--weights", "nowhere.safetensors"), 5, "nowhere.safetensors", id="missing weights"),
        pytest.param(("--preset", "refinedet320_vgg16"), 5, "none of these weights fit", id="other architecture"),
        pytest.param(
            ("--set", "network.backbone=resnet18"),
            5,
            "fit the backbone 'resnet18' (they are of 'mobilenet_v2')",
            id="other backbone",
        ),
        pytest.param(("--resume",), 5, "nothing to resume", id="nothing to resume"),
        pytest.param(("--batch", 0), 2, "--batch '0' is no number of pictures", id="no batch"),
        pytest.param(("--batch", "many"), 2, "--batch 'many' is no number of pictures", id="malformed batch"),
        pytest.param(("--preview", "sheet"), 2, "--preview sheet is no name of a picture", id="malformed option"),
        pytest.param(
            ("--val", "none", "--set", "train.patience=1", "--set", "train.evaluate_every=1"),
            3,
            "nothing to validate on",
            id="patience without validation",
        ),
        pytest.param(("--val", "nowhere.json"), 4, "nowhere.json", id="missing validation data"),
    ],
)
def test_mistakes_end_with_one_line_and_nothing_written(run, data, weights, tmp_path, extra, code, said):
    out = tmp_path / "run"
    ended = run("train", "--data", data, "--out", out, "--weights", weights, "--epochs", 1, *FAST, *extra)
    assert ended.code == code, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (out / "last.safetensors").exists()


def test_ctrl_c_finishes_the_step_and_leaves_a_run_that_goes_on(data, weights, tmp_path):
    call = ("train", "--data", data, "--out", tmp_path / "run", "--weights", weights, "--epochs", 400, *FAST)
    program = "from refinedet_cli.cli.app import run; run()"
    started = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, call)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 120
    while not log.is_file() and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=120)
    assert started.returncode == 130, stderr
    assert stdout == ""
    (steps,) = re.findall(r"stopped after step (\d+); go on with the same command and --resume", stderr)
    assert load_state(tmp_path / "run" / "state.pt").step == int(steps)
