from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.core.refinedet import build
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.zoo.checkpoint import load_detector, save_checkpoint

SUMMARY = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
CLASSES = Classes(names=("dog", "aeroplane"), category_ids=(7, 3))

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = get_preset("tiny", CLASSES).detector
    config = replace(config, postprocess=replace(config.postprocess, candidates=50, keep=20))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = build(config).network
        for name, parameter in network.named_parameters():
            if name.startswith("odm."):
                parameter.data *= 3  # fresh weights score all places alike
    save_checkpoint(path, config, network.state_dict(), {})
    return path


def document_of(
    objects: list[tuple[int, str, list[float]]], pictures: dict[int, tuple[int, int]], names: tuple[str, ...]
) -> dict[str, Any]:
    """A COCO data set; objects are (picture, class, xywh), pictures have (width, height)."""
    ids = {name: i for i, name in enumerate(names, start=1)}
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in pictures.items()],
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
        "annotations": [
            {"id": k, "image_id": i, "category_id": ids[name], "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (i, name, box) in enumerate(objects, start=1)
        ],
    }


@pytest.fixture(scope="module")
def data(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with val.json and test.json; objects lie near some of what the detector says."""
    folder = tmp_path_factory.mktemp("data")
    predictor = Predictor(load_detector(weights), device=torch.device("cpu"), precision="fp32")
    draw = np.random.default_rng(0)
    objects, pictures = [], {}
    for i in range(1, 8):
        width, height = (int(side) for side in draw.integers(40, 150, 2))
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        pictures[i] = (width, height)
        found = predictor.predict([pixels])[0]
        for k in draw.permutation(len(found))[:3]:
            x1, y1, x2, y2 = found.boxes[k].double().tolist()
            name = ("dog", "airplane")[int(found.labels[k]) - 1]  # COCO's spelling, in COCO's order
            objects.append((i, name, [round(v, 2) for v in (x1, y1, (x2 - x1) * 0.93, y2 - y1)]))
    names = ("airplane", "dog")
    (folder / "val.json").write_text(json.dumps(document_of(objects, pictures, names)))
    (folder / "test.json").write_text(json.dumps(document_of([], {1: pictures[1]}, names)))
    return folder


@pytest.fixture
def evaluate(run: Run, weights: Path) -> Run:
    """Run ``refinedet eval`` on the CPU with the tiny weights."""
    return lambda dataset, *args: run("eval", "--dataset", dataset, "--weights", weights, "--device", "cpu", *args)


def of_json(finished: Any) -> dict[str, Any]:
    assert (finished.code, finished.stderr) == (0, "")
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def test_table_and_document(evaluate: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = evaluate(data / "val.json")
    assert (code, stderr) == (0, "")
    assert f"{data / 'val.json'}: 7 pictures, 21 objects" in stdout
    assert "tiny.safetensors, preset tiny, sha256 " in stdout
    assert "64 x 64 px, fp32 on cpu" in stdout
    assert "scores above 0.01, 50 candidates a picture, NMS at IoU 0.45, best 20 a picture" in stdout
    assert "pictures/s" in stdout
    rows = {line.split()[0]: line.split() for line in stdout.splitlines() if line.strip()}
    assert [name for name in rows if name in SUMMARY] == list(SUMMARY)
    assert list(rows).index("dog") < list(rows).index("aeroplane")

    document = of_json(evaluate(data / "val.json", "--json"))
    assert (document["schema_version"], document["command"], document["metric"]) == (1, "eval", "coco")
    assert list(document["metrics"]) == list(SUMMARY)
    assert 0.02 < document["metrics"]["AP"] < 0.98
    for name, value in document["metrics"].items():
        assert rows[name][1] == ("-" if value is None else f"{value:.3f}")
    assert [(c["name"], c["category_id"]) for c in document["classes"]] == [("dog", 7), ("aeroplane", 3)]
    for scored in document["classes"]:
        numbers = [f"{scored[n]:.3f}" for n in ("AP", "AP50", "AP75", "AR100")]
        assert rows[scored["name"]] == [scored["name"], *numbers, str(scored["objects"]), str(scored["detections"])]
    assert sum(c["objects"] for c in document["classes"]) == 21
    assert document["complete"] is True
    assert document["dataset"]["source"] == str(data / "val.json")
    assert document["dataset"]["split"] is None
    assert (document["dataset"]["pictures"], document["dataset"]["objects"]) == (7, 21)
    assert (document["origin"]["precision"], document["origin"]["score_threshold"]) == ("fp32", 0.01)
    assert document["input_size"] == {"height": 64, "width": 64}
    assert document["postprocess"]["preset"] is None
    assert document["postprocess"]["candidates"] == 50
    assert document["pictures_per_second"] > 0

    assert (document["detections_file"], document["metrics_file"]) == (None, None)
    assert list(tmp_path.iterdir()) == []


def test_out_holds_the_document_and_leads_pycocotools_to_the_same_numbers(
    evaluate: Run, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "folder"
    code, stdout, stderr = evaluate(data / "val.json", "--out", out, "--json")
    assert (code, stderr) == (0, f"wrote {out / 'detections.json'} and {out / 'metrics.json'}\n")
    document = json.loads(stdout)
    assert sorted(p.name for p in out.iterdir()) == ["detections.json", "metrics.json"]
    assert document["detections_file"] == str(out / "detections.json")

    # The detector has category ids of its own: as a user would, carry them over by name.
    written = json.loads((out / "detections.json").read_text())
    assert [(c["id"], c["name"]) for c in written["categories"]] == [(7, "dog"), (3, "aeroplane")]
    ids = {7: 2, 3: 1}
    results = [{**a, "category_id": ids[a["category_id"]]} for a in written["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "val.json"))
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ours = [-1.0 if v is None else v for v in document["metrics"].values()]
    np.testing.assert_allclose(ours, evaluator.stats, rtol=0, atol=1e-12)

    # metrics.json is the same document, but for the paths: the folder may be moved.
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == {k: v for k, v in document.items() if k not in ("detections_file", "metrics_file")}


def test_batch_and_workers_do_not_change_the_numbers(evaluate: Run, data: Path) -> None:
    one = of_json(evaluate(data, "--json", "--batch", 1))
    other = of_json(evaluate(data, "--json", "--batch", 64, "--workers", 0))
    assert one["metrics"] == other["metrics"]
    assert one["classes"] == other["classes"]


def test_split_of_a_folder(evaluate: Run, data: Path) -> None:
    assert f"{data}, split test: 1 picture, 0 objects" in evaluate(data, "--split", "test").stdout
    document = json.loads(evaluate(data, "--split", "test", "--json").stdout)
    assert (document["dataset"]["split"], document["dataset"]["pictures"]) == ("test", 1)


def test_no_objects_means_no_numbers(evaluate: Run, data: Path) -> None:
    code, stdout, stderr = evaluate(data, "--split", "test")
    assert code == 0
    assert "there is no object to be found" in stderr
    rows = {line.split()[0]: line.split() for line in stdout.splitlines() if line.strip()}
    assert {rows[name][1] for name in SUMMARY} == {"-"}
    assert rows["dog"][1:6] == ["-", "-", "-", "-", "0"]
    document = of_json(evaluate(data, "--split", "test", "--json", "--quiet"))
    assert set(document["metrics"].values()) == {None}
    assert any("no object" in note for note in document["notes"])


def test_quiet_keeps_the_result_alone(evaluate: Run, data: Path, tmp_path: Path) -> None:
    code, stdout, stderr = evaluate(data, "--split", "test", "--quiet", "--out", tmp_path)
    assert (code, stderr) == (0, "")
    assert "AP50" in stdout


def rewritten(data: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> tuple[Path, Path]:
    """The val set changed: its JSON, and the folder of pictures."""
    document = json.loads((data / "val.json").read_text())
    change(document)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(document))
    return path, data


def test_unknown_classes_are_left_out_and_never_passed_over(evaluate: Run, data: Path, tmp_path: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        document["categories"][0]["name"] = "zebra"

    path, images = rewritten(data, tmp_path, rename)
    code, stdout, stderr = evaluate(path, "--images", images)
    assert code == 0
    assert "over 1 shared of 2 classes, not the data set's AP" in stdout
    assert "warning: " in stderr
    assert "zebra" in stderr
    _, stdout, stderr = evaluate(path, "--images", images, "--json", "--quiet")
    assert stderr.startswith("warning: ")
    document = json.loads(stdout)
    assert document["complete"] is False
    assert [c["name"] for c in document["classes"]] == ["dog"]


def test_postprocess_presets(evaluate: Run, data: Path) -> None:
    test = (data, "--split", "test", "--json", "--quiet", "--postprocess")
    paper, caffe = (of_json(evaluate(*test, name)) for name in ("paper", "caffe"))
    assert (paper["postprocess"]["preset"], paper["postprocess"]["keep"]) == ("paper", 200)
    assert (caffe["postprocess"]["preset"], caffe["postprocess"]["candidates_per"]) == ("caffe", "class")
    found = [sum(c["detections"] for c in document["classes"]) for document in (paper, caffe)]
    assert 20 < found[0] <= found[1]


def test_settings_are_told(evaluate: Run, data: Path) -> None:
    stdout = evaluate(data, "--split", "test", "--precision", "bf16", "--postprocess", "paper").stdout
    assert "64 x 64 px, bf16 on cpu" in stdout
    assert "preset paper: scores above 0.01, 400 candidates a picture" in stdout


def failure(finished: Any) -> tuple[int, str]:
    document = json.loads(finished.stdout)
    assert finished.code == document["error"]["code"]
    assert document["command"] == "eval"
    assert finished.stderr.startswith("error: ")
    return finished.code, document["error"]["message"]


def test_no_shared_class_names_both_lists(evaluate: Run, data: Path, tmp_path: Path) -> None:
    def rename(document: dict[str, Any]) -> None:
        for category, name in zip(document["categories"], ("zebra", "giraffe"), strict=True):
            category["name"] = name

    path, images = rewritten(data, tmp_path, rename)
    code, message = failure(evaluate(path, "--images", images, "--json"))
    assert code == 4
    assert "zebra, giraffe" in message
    assert "dog, aeroplane" in message


def test_a_missing_picture_is_an_error(evaluate: Run, data: Path, tmp_path: Path) -> None:
    def lose(document: dict[str, Any]) -> None:
        document["images"][4]["file_name"] = "lost.png"

    path, images = rewritten(data, tmp_path, lose)
    out = tmp_path / "out"
    code, message = failure(evaluate(path, "--images", images, "--out", out, "--json"))
    assert code == 4
    assert "lost.png" in message
    assert not out.exists()


def test_other_ways_to_fail(evaluate: Run, run: Run, data: Path, tmp_path: Path) -> None:
    code, message = failure(evaluate(tmp_path / "none.json", "--json"))
    assert (code, "none.json" in message) == (4, True)
    code, message = failure(evaluate(data, "--split", "train", "--json"))
    assert (code, "train" in message) == (4, True)
    (tmp_path / "file").touch()
    code, message = failure(evaluate(data, "--out", tmp_path / "file", "--json"))
    assert (code, "is a file" in message) == (2, True)
    code, message = failure(run("eval", "--dataset", data, "--weights", tmp_path / "no.safetensors", "--json"))
    assert code == 5
    assert failure(run("eval", "--json"))[0] == 2
    assert failure(evaluate(data, "--postprocess", "other", "--json"))[0] == 2
    assert failure(evaluate(data, "--batch", 0, "--json"))[0] == 2


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device here")
def test_an_absent_device(run: Run, data: Path, weights: Path) -> None:
    finished = run("eval", "--dataset", data, "--weights", weights, "--device", "mps", "--json")
    assert failure(finished)[0] == 6
