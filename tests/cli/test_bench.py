from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import DEFAULT_PRESET, get_preset
from refinedet_cli.engine import benchmark as benchmark_module
from refinedet_cli.engine.benchmark import percentile
from refinedet_cli.engine.benchmark_worker import LocalSubject

Run = Callable[..., Any]
LATENCY = {"p50_ms", "p90_ms", "p99_ms", "mean_ms", "pictures_per_second"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random) -> Path:
    classes = Classes(names=("cat", "dog"), category_ids=(1, 2))
    return save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", get_preset("tiny", classes).detector)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pets")
    draw = np.random.default_rng(0)
    for i in (1, 2, 3):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in (1, 2, 3)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": c, "bbox": [8 * i, 8, 20, 20]} for i, c in ((1, 1), (2, 2), (3, 3))
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "[cow]"}],
    }
    (folder / "pets.json").write_text(json.dumps(document))
    return folder / "pets.json"


@pytest.fixture
def bench(run, monkeypatch) -> Run:
    """The command, with all detectors in this process: a process of its own takes seconds to load torch."""
    monkeypatch.setattr(benchmark_module, "benchmark", partial(benchmark_module.benchmark, start=LocalSubject))
    threads = torch.get_num_threads()
    yield partial(run, "bench", "--device", "cpu", "--rounds", 6)
    torch.set_num_threads(threads)


def test_tables_and_document_agree(bench, weights, dataset, tmp_path):
    call = [weights, f"{weights}:bf16", "--dataset", dataset, "--out", tmp_path / "new"]
    code, stdout, stderr = bench(*call)
    assert code == 0
    lines = [line.strip() for line in stdout.splitlines()]
    for title in ("Milliseconds for a picture", "Against tiny.safetensors", "What it takes"):
        assert title in lines
    assert sum(line.startswith("tiny.safetensors bf16 ") for line in lines) == 3
    assert "not the data set's AP" in stdout
    assert "warning: not every object was scored: COCO metric over 2 shared of 3 classes" in stderr
    assert f"wrote {tmp_path / 'new' / 'bench.json'}" in stderr

    as_json = bench(*call, "--json", "--quiet")
    document = json.loads(as_json.stdout)
    assert as_json.code == 0
    assert as_json.stderr.startswith("warning: ")
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    runs = written.pop("runs")
    assert document.pop("report_file") == str(tmp_path / "new" / "bench.json")
    assert written == document
    assert (document["schema_version"], document["command"]) == (1, "bench")
    assert document["pictures"]["from"] == "dataset"
    assert (document["pictures"]["timed"], document["pictures"]["scored"]) == (3, 3)
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["libraries"]["torch"] == torch.__version__.partition("+")[0]
    assert document["settings"]["runs"] == 6
    first, second = document["detectors"]
    assert (first["precision"], second["precision"]) == ("fp32", "bf16")
    assert first["file"] == str(weights)
    assert first["file_bytes"] == weights.stat().st_size
    assert set(first["in_memory"]) == set(first["from_file"]) == LATENCY
    assert all(second["from_file"][key] >= second["in_memory"][key] for key in ("p50_ms", "p90_ms", "p99_ms"))
    assert (first["against_reference"], first["failure"]) == (None, None)
    assert set(second["against_reference"]) == {"speed", "speed_from_file", "AP", "AP50"}
    change = second["accuracy"]["AP"] - first["accuracy"]["AP"]
    assert second["against_reference"]["AP"] == pytest.approx(change)
    assert first["accuracy"]["complete"] is False

    times = [time for turn in runs[1]["detecting_ms"] for time in turn]
    assert [len(turn) for turn in runs[1]["detecting_ms"]] == [5, 1]
    assert percentile(times, 90) == pytest.approx(second["in_memory"]["p90_ms"])


def test_several_data_sets_are_one(bench, weights, dataset):
    document = bench(weights, "--dataset", dataset, "--dataset", dataset, "--json").document()
    assert document["pictures"]["source"] == f"{dataset} + {dataset}"
    assert (document["pictures"]["timed"], document["pictures"]["scored"]) == (6, 6)


def test_one_detector_on_pictures_alone(bench, weights, dataset):
    code, stdout, _ = bench(weights, "--source", dataset.parent, "--batch", 2, "--threads", 1)
    assert code == 0
    assert "Milliseconds for 2 pictures" in stdout
    assert "6 runs of 2 pictures in turns of 5" in stdout
    assert ", 1 thread; " in stdout
    assert "p99 is the longest" in stdout
    for absent in ("Against", " AP", "Not measured", "Device"):
        assert absent not in stdout


def test_one_that_fails_is_listed_and_the_rest_goes_on(bench, weights, dataset):
    call = ["nothing.safetensors", weights, "--source", dataset.parent]
    code, stdout, stderr = bench(*call)
    assert code == 8
    assert "\nNot measured" in stdout
    assert "nothing.safetensors" in stdout
    assert "1 of 2 detectors could not be measured" in stderr

    document = json.loads(bench(*call, "--json").stdout)
    assert document["reference"] == "tiny.safetensors"
    assert set(document["detectors"][0]) == {"name", "weights", "failure"}
    assert document["detectors"][0]["failure"]["code"] == 5
    assert document["detectors"][1]["against_reference"] is None


def test_where_all_fail_the_first_error_is_that_of_the_command(bench, dataset):
    call = ["a.safetensors", "b.safetensors", "--source", dataset.parent]
    code, stdout, stderr = bench(*call)
    assert (code, stdout) == (5, "")
    warning, error = (line for line in stderr.splitlines() if not line.startswith("hint"))
    assert warning.startswith("warning: b.safetensors: ")
    assert error.startswith("error: ")
    assert "a.safetensors" in error
    assert json.loads(bench(*call, "--json").stdout)["error"]["code"] == 5


def test_a_bug_is_no_reason_to_lose_the_rest_but_stays_a_bug(bench, weights, dataset, monkeypatch):
    time = LocalSubject.time

    def fail(self, runs):
        if self._opening.precision == "bf16":
            raise ZeroDivisionError("oh")
        return time(self, runs)

    monkeypatch.setattr(LocalSubject, "time", fail)
    code, stdout, stderr = bench(weights, f"{weights}:bf16", "--source", dataset.parent, "--json")
    assert code == 1
    assert json.loads(stdout)["detectors"][1]["failure"]["code"] == 1
    assert "Traceback" in stderr
    assert "this is a bug" in stderr


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["--dataset", "a.json", "--source", "b"], "--dataset and by --source"),
        (["--out", "FILE"], "is a file"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_usage_errors(bench, weights, call, words):
    code, stdout, stderr = bench(*(weights if part == "FILE" else part for part in call))
    assert (code, stdout) == (2, "")
    assert words in stderr


def test_a_folder_that_cannot_be_written_is_told_before_the_work(run, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_module, "benchmark", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").touch()
    code, _, stderr = run("bench", weights, "--out", tmp_path / "file" / "below")
    assert (code, "cannot write" in stderr) == (4, True)


def test_pictures_that_are_not_there(bench, weights, tmp_path):
    code, _, stderr = bench(weights, "--source", tmp_path / "nowhere")
    assert code == 4
    assert "nowhere" in stderr


def test_the_default_is_the_bundled_detector_on_drawn_pictures(run, monkeypatch):
    seen = []

    def stop(options, **_):
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_module, "benchmark", stop)
    assert run("bench").code == 130
    (options,) = seen
    (asked,) = options.detectors
    assert (asked.name, Path(asked.weights).name) == (DEFAULT_PRESET, f"{DEFAULT_PRESET}.safetensors")
    assert (options.datasets, options.sources, options.batch, options.threads) == ((), (), 1, None)
