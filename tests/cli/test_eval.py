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

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
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
    assert metrics == {k: v for k, v in document.items() if k not in ("detections_file", "metrics_file", "report_file")}


def test_batch_and_workers_do_not_change_the_numbers(evaluate: Run, data: Path) -> None:
    one = of_json(evaluate(data, "--json", "--batch", 1))
    other = of_json(evaluate(data, "--json", "--batch", 64, "--workers", 0))
    assert one["metrics"] == other["metrics"]
    assert one["classes"] == other["classes"]


def test_several_data_sets_are_one(evaluate: Run, data: Path) -> None:
    alone = of_json(evaluate(data, "--json"))
    both = evaluate(data, "--dataset", f"{data}:test", "--json").document()
    assert both["dataset"]["source"] == f"{data} + {data}:test"
    counts = ("pictures", "objects")
    assert [both["dataset"][key] - alone["dataset"][key] for key in counts] == [1, 0]
    # What is found on a picture without objects can only be wrong.
    assert 0 < both["metrics"]["AP"] < alone["metrics"]["AP"]
    assert both["metrics"]["AR100"] == alone["metrics"]["AR100"]


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


@pytest.fixture(scope="module")
def found(weights: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detections of val.json, saved by eval itself."""
    from refinedet_cli.cli.app import main

    out = tmp_path_factory.mktemp("found")
    options = ("--weights", weights, "--device", "cpu", "--out", out, "--quiet")
    assert main([str(a) for a in ("eval", "--dataset", data / "val.json", *options)]) == 0
    return out / "detections.json"


@pytest.fixture
def saved(run: Run, data: Path) -> Run:
    """Run ``refinedet eval --from`` on val.json."""
    return lambda path, *args: run("eval", "--dataset", data / "val.json", "--from", path, *args)


def changed(path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads(path.read_text())
    change(document)
    target = tmp_path / "other.json"
    target.write_text(json.dumps(document))
    return target


def rows_of(stdout: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in stdout.splitlines() if line.strip()}


def test_coco_conventions_are_in_the_document(saved: Run, found: Path) -> None:
    document = of_json(saved(found, "--json"))
    assert document["metric"] == "coco"
    assert document["conventions"]["iou"] == "at least 0.50 to 0.95 in steps of 0.05"
    assert (document["bootstrap"], document["comparison"]) == (None, None)


@pytest.mark.parametrize("metric", ["coco", "voc2007", "voc2012"])
def test_saved_detections_score_as_the_detector_does(
    evaluate: Run, saved: Run, data: Path, found: Path, metric: str
) -> None:
    alive = of_json(evaluate(data / "val.json", "--json", "--metric", metric))
    document = of_json(saved(found, "--json", "--metric", metric))
    for key in ("metrics", "classes", "conventions", "complete", "dataset"):
        assert document[key] == alive[key]
    assert alive["from"] is None
    assert document["from"]["format"] == "detections.json"
    assert document["from"]["file"] == str(found)
    assert document["from"]["detections"] == sum(c["detections"] for c in alive["classes"])
    assert document["origin"]["weights"] == alive["origin"]["weights"] == "tiny.safetensors"
    assert [document[k] for k in ("input_size", "postprocess", "device", "seconds", "pictures_per_second")] == [
        None
    ] * 5


def test_the_table_of_saved_detections(saved: Run, found: Path, tmp_path: Path) -> None:
    code, stdout, stderr = saved(found, "--out", tmp_path / "out")
    assert (code, stderr) == (0, f"wrote {tmp_path / 'out' / 'metrics.json'}\n")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["metrics.json"]
    assert f"{found}: " in stdout
    assert " detections, sha256 " in stdout
    assert "tiny.safetensors, preset tiny, precision fp32" in stdout
    assert "pictures/s" not in stdout


def test_a_list_of_results_with_the_ids_of_the_data(saved: Run, found: Path, tmp_path: Path) -> None:
    ids = {7: 2, 3: 1}  # the detector's, by name those of the data
    rows = json.loads(found.read_text())["annotations"]
    kept = [{**a, "category_id": ids[a["category_id"]]} for a in rows]
    (tmp_path / "results.json").write_text(json.dumps(kept))
    document, own = of_json(saved(tmp_path / "results.json", "--json")), of_json(saved(found, "--json"))
    assert document["metrics"] == own["metrics"]
    assert [c["name"] for c in document["classes"]] == ["airplane", "dog"]
    assert (document["from"]["format"], document["origin"]) == ("results list", None)


def test_voc_numbers_are_never_called_ap_alone(saved: Run, found: Path) -> None:
    code, stdout, _ = saved(found, "--metric", "voc2007")
    assert code == 0
    assert "VOC 2007 metric" in stdout
    assert "11-point average, found at IoU at least 0.5, inclusive pixels (xmax - xmin + 1 px wide)" in stdout
    rows = rows_of(stdout)
    assert rows["Class"][:2] == ["Class", "AP_voc2007"]
    document = of_json(saved(found, "--metric", "voc2007", "--json"))
    (name,) = document["metrics"]
    assert name == "mAP_voc2007"
    assert rows[name][1] == f"{document['metrics'][name]:.3f}"
    assert 0.02 < document["metrics"][name] < 0.98
    dog = document["classes"][0]
    keys = ["name", "category_id", "AP_voc2007", "objects", "difficult", "detections", "right", "wrong", "passed_over"]
    assert list(dog) == keys
    assert rows["dog"] == ["dog", f"{dog['AP_voc2007']:.3f}", *(str(dog[key]) for key in keys[3:])]
    assert dog["right"] + dog["wrong"] + dog["passed_over"] == dog["detections"]
    assert document["conventions"]["iou"] == "at least 0.5"
    assert document["conventions"]["average_precision"].startswith("11-point")
    area = of_json(saved(found, "--metric", "voc2012", "--json"))
    assert area["conventions"]["average_precision"].startswith("area")
    assert area["metrics"]["mAP_voc2012"] != document["metrics"]["mAP_voc2007"]


def test_voc_conventions_can_be_chosen(run: Run, tmp_path: Path) -> None:
    # The object is 10 x 10 px; the detection is its left half: 50 of 100 px, and 4 x 9 of 9 x 9 without the + 1.
    document = document_of([(1, "dog", [0, 0, 10, 10])], {1: (20, 20)}, ("dog",))
    (tmp_path / "val.json").write_text(json.dumps(document))
    half = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 10], "score": 0.5}
    (tmp_path / "half.json").write_text(json.dumps([half]))
    call = (
        "eval",
        "--dataset",
        tmp_path / "val.json",
        "--from",
        tmp_path / "half.json",
        "--metric",
        "voc2012",
        "--json",
    )
    for options, value in (
        ((), 1.0),
        (("--voc-overlap", "above"), 0.0),
        (("--voc-pixels", "continuous"), 0.0),
        (("--voc-pixels", "inclusive", "--voc-overlap", "at-least"), 1.0),
    ):
        told = of_json(run(*call, *options))
        assert told["metrics"] == {"mAP_voc2012": value}
    assert told["conventions"]["pixels"].startswith("inclusive")
    above = of_json(run(*call, "--voc-overlap", "above", "--voc-pixels", "continuous"))["conventions"]
    assert (above["iou"], above["pixels"][:10]) == ("above 0.5", "continuous")


def test_difficult_objects_are_told_of(run: Run, tmp_path: Path) -> None:
    document = document_of([(1, "dog", [0, 0, 10, 10]), (1, "dog", [9, 9, 10, 10])], {1: (20, 20)}, ("dog",))
    document["annotations"][1]["difficult"] = 1
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "none.json").write_text("[]")
    call = ("eval", "--dataset", tmp_path / "val.json", "--from", tmp_path / "none.json", "--metric", "voc2007")
    finished = run(*call)
    assert "1 difficult objects count neither as found nor as missed" in finished.stderr
    assert f"{tmp_path / 'none.json'} holds no detection" in finished.stderr
    document = of_json(run(*call, "--json", "--quiet"))
    assert (document["dataset"]["difficult"], document["classes"][0]["objects"]) == (1, 1)
    assert document["metrics"] == {"mAP_voc2007": 0.0}


def test_intervals_stand_beside_the_numbers(saved: Run, found: Path) -> None:
    document = of_json(saved(found, "--bootstrap", 200, "--json"))
    boot = document["bootstrap"]
    assert (boot["rounds"], boot["seed"], boot["drawn"], boot["confidence"]) == (200, 0, "pictures", 0.95)
    assert list(boot["metrics"]) == ["AP", "AP50", "AP75"]
    for name, number in boot["metrics"].items():
        assert number["value"] == document["metrics"][name]
        assert number["low"] < number["high"]
        assert number["rounds"] == 200
    for own, scored in zip(boot["classes"], document["classes"], strict=True):
        assert own["name"] == scored["name"]
        assert [own[n]["value"] for n in ("AP", "AP50")] == [scored[n] for n in ("AP", "AP50")]
    assert boot == of_json(saved(found, "--bootstrap", 200, "--json"))["bootstrap"]

    stdout = saved(found, "--bootstrap", 200).stdout
    rows = rows_of(stdout)
    ap = boot["metrics"]["AP"]
    assert rows["AP"][2:5] == [f"{ap['low']:.3f}", "to", f"{ap['high']:.3f}"]
    assert rows["AR10"][2] == "with"  # no interval
    dog = boot["classes"][0]["AP50"]
    assert f"{dog['low']:.3f} to {dog['high']:.3f}" in next(line for line in stdout.splitlines() if "dog" in line)
    assert "from 200 drawings" in stdout


def test_intervals_of_voc_numbers(saved: Run, found: Path) -> None:
    boot = of_json(saved(found, "--metric", "voc2012", "--bootstrap", 100, "--json"))["bootstrap"]
    assert list(boot["metrics"]) == ["mAP_voc2012"]
    assert list(boot["classes"][0]) == ["name", "AP_voc2012"]


def test_detections_compared_with_themselves_do_not_differ(saved: Run, found: Path) -> None:
    document = of_json(saved(found, "--compare", found, "--json"))
    told = document["comparison"]
    assert (told["rounds"], document["bootstrap"]["rounds"], told["direction"]) == (1000, 1000, "this minus other")
    assert told["sha256"] == document["from"]["sha256"]
    zero = {"difference": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False, "rounds": 1000}
    assert told["metrics"] == {"AP": zero, "AP50": zero, "AP75": zero}
    stdout = saved(found, "--compare", found).stdout
    assert f"AP is equal to that of {found}; the 95 % interval of the difference, +0.000 to +0.000, does not" in stdout


def test_a_difference_is_told_plainly_both_ways(saved: Run, found: Path, tmp_path: Path) -> None:
    def lose(document: dict[str, Any]) -> None:
        """Make every found box too small to be right, in all pictures."""
        for annotation in document["annotations"]:
            annotation["bbox"][2:] = [side / 3 for side in annotation["bbox"][2:]]

    worse = changed(found, tmp_path, lose)
    document = of_json(saved(found, "--compare", worse, "--bootstrap", 300, "--json"))
    ap = document["comparison"]["metrics"]["AP"]
    assert document["comparison"]["other"]["AP"] + ap["difference"] == pytest.approx(document["metrics"]["AP"])
    assert ap["low"] > 0
    assert ap["excludes_zero"] is True
    stdout = saved(found, "--compare", worse, "--bootstrap", 300).stdout
    verdict = stdout.splitlines()[-2]
    assert verdict.startswith(f"AP is {ap['difference']:.3f} above that of {worse}; ")
    assert verdict.endswith(f"{ap['low']:+.3f} to {ap['high']:+.3f}, excludes 0.")
    rows = [line.split() for line in stdout.splitlines() if line.split()[:1] == ["AP"]]
    assert rows[1][-1] == "yes"
    assert " below that of " in saved(worse, "--compare", found, "--metric", "voc2007").stdout


def test_a_detector_is_compared_with_saved_detections(evaluate: Run, data: Path, found: Path) -> None:
    document = of_json(evaluate(data / "val.json", "--compare", found, "--bootstrap", 100, "--json"))
    assert document["comparison"]["metrics"]["AP"]["difference"] == 0.0
    assert document["seconds"] is not None


def test_multi_scale_is_said_and_recorded(evaluate: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text("[[passes]]\nsize = 64\n")
    options = ("--split", "test", "--multi-scale", tmp_path / "two.toml", "--out", tmp_path / "out")
    finished = evaluate(data, *options)
    assert "multi-scale two.toml: 2 passes a picture" in finished.stderr
    assert finished.stdout.rstrip().endswith("2 passes a picture (multi-scale two.toml)")
    rows = [line.split() for line in finished.stdout.splitlines()]
    assert ["Multi-scale", "two.toml,", "2", "passes", "a", "picture"] in rows
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["origin"]["multi_scale"]["name"] == "two.toml"
    document = of_json(evaluate(data, *options[:4], "--json", "--quiet"))
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert document["origin"]["multi_scale"]["name"] == written["info"]["multi_scale"]["name"] == "two.toml"


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


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_what_cannot_be_written_is_told_before_the_work(
    evaluate: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("refinedet_cli.engine.evaluate.collect", lambda *_, **__: pytest.fail("it began"))
    (tmp_path / "file").touch()
    code, message = failure(evaluate(data / "val.json", option, tmp_path / "file" / "below", "--json"))
    assert code == 4
    assert f"cannot write {tmp_path / 'file' / 'below'}" in message
    # A folder in the place of a file that is to be written.
    (tmp_path / "out" / "metrics.json").mkdir(parents=True)
    code, message = failure(evaluate(data / "val.json", "--out", tmp_path / "out", "--json"))
    assert (code, "metrics.json: it is not an ordinary file" in message) == (4, True)


def test_a_split_that_chooses_nothing_is_told_of(evaluate: Run, data: Path) -> None:
    finished = evaluate(data / "val.json", "--split", "test")
    assert finished.code == 0
    assert "--split test chooses nothing" in finished.stderr
    assert "--split" not in evaluate(data / "val.json").stderr
    code, message = failure(evaluate(f"{data}:val", "--split=test", "--json"))
    assert (code, "--split test contradicts" in message) == (2, True)
    for source in (f"{data}:test", data):
        finished = evaluate(source, "--split", "test")
        assert (finished.code, "--split" in finished.stderr) == (0, False)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device here")
def test_an_absent_device(run: Run, data: Path, weights: Path) -> None:
    finished = run("eval", "--dataset", data, "--weights", weights, "--device", "mps", "--json")
    assert failure(finished)[0] == 6


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--from", "{found}", "--weights", "{found}"), "--weights does not go with --from"),
        (("--from", "{found}", "--device", "cpu"), "--device does not go with --from"),
        (("--from", "{found}", "--batch", "1"), "--batch does not go with --from"),
        (("--from", "{found}", "--multi-scale", "voc"), "--multi-scale does not go with --from"),
        (("--from", "{found}", "--voc-pixels", "inclusive"), "--voc-pixels is about VOC numbers"),
        (("--voc-overlap", "above", "--metric", "coco"), "--voc-overlap is about VOC numbers"),
        (("--from", "{found}", "--bootstrap", "99"), "--bootstrap 99 is too few"),
        (("--from", "{found}", "--bootstrap", "-1"), "--bootstrap"),
        (("--from", "{found}", "--bootstrap", "0", "--compare", "{found}"), "--compare needs drawings"),
        (("--metric", "voc2010"), "--metric"),
    ],
)
def test_options_that_do_not_go_together(run: Run, data: Path, found: Path, options: tuple, told: str) -> None:
    args = [option.format(found=found) for option in options]
    code, message = failure(run("eval", "--dataset", data / "val.json", *args, "--json"))
    assert code == 2
    assert told in message


@pytest.mark.parametrize("option", ["--from", "--compare"])
def test_wrong_detection_files_are_one_clear_error(
    run: Run, data: Path, found: Path, tmp_path: Path, option: str
) -> None:
    def attempt(path: Path) -> str:
        other = () if option == "--from" else ("--from", found)
        code, message = failure(run("eval", "--dataset", data / "val.json", option, path, *other, "--json"))
        assert code == 4
        assert str(path) in message
        return message

    result = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 10], "score": 0.5}
    path = tmp_path / "wrong.json"
    for row, told in (
        ({"image_id": 99}, "no picture with image id 99"),
        ({"category_id": 9}, "categories that"),
        ({"score": float("nan")}, "score is NaN"),
        ({"bbox": [0, 0, float("inf"), 1]}, "bbox is"),
    ):
        path.write_text(json.dumps([result, {**result, **row}]))
        assert told in attempt(path)
    path.write_text("{")
    assert "is not valid JSON" in attempt(path)
    assert "no 'score'" in attempt(data / "val.json")  # the data set itself
    assert "does not exist" in attempt(tmp_path / "none.json")

    def rename(document: dict[str, Any]) -> None:
        for category, name in zip(document["categories"], ("zebra", "giraffe"), strict=True):
            category["name"] = name

    assert "share no class" in attempt(changed(found, tmp_path, rename))


def test_a_wrong_file_to_compare_with_is_told_before_the_detector_runs(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{")
    call = ("eval", "--dataset", data / "val.json", "--weights", tmp_path / "no.safetensors")
    code, message = failure(run(*call, "--compare", tmp_path / "other.json", "--json"))
    assert (code, "other.json" in message) == (4, True)


def test_help_explains_with_examples(run: Run) -> None:
    code, stdout, _ = run("eval", "--help")
    assert code == 0
    assert stdout.count("refinedet eval ") >= 3
    for option in ("--from", "--metric", "--voc-pixels", "--voc-overlap", "--bootstrap", "--compare", "--root"):
        assert option in stdout
    told = " ".join(stdout.replace("│", " ").split())
    assert "intervals around AP, AP50 and AP75, and around AP and AP50 of each class" in told


# The page, the engine, and data that has to be fetched ----------------------------------------------------------------


@pytest.mark.parametrize("metric", ["coco", "voc2007"])
def test_report_explains_the_same_numbers(evaluate: Run, data: Path, tmp_path: Path, metric: str) -> None:
    page = tmp_path / "deep" / "page.html"
    code, stdout, stderr = evaluate(
        data / "val.json", "--metric", metric, "--bootstrap", "100", "--report", page, "--json"
    )
    assert (code, stderr.splitlines()[-1]) == (0, f"wrote {page}")
    document = json.loads(stdout)
    assert document["report_file"] == str(page)
    html = page.read_text(encoding="utf-8")
    name, value = next(iter(document["metrics"].items()))
    interval = document["bootstrap"]["metrics"][name]
    assert f"<small>{name}</small><b>{value:.3f}</b>" in html
    assert f"95 %: {interval['low']:.3f} to {interval['high']:.3f}" in html
    assert document["dataset"]["fingerprint"] in html
    assert "after the ARM" in html
    assert "after the ODM" in html
    reasons = document["reasons"]
    assert [e["kind"] for e in reasons["errors"]] == ["class", "place", "both", "duplicate", "background", "missed"]
    assert sum(map(sum, reasons["confusion"]["objects_by_detections"][1:])) == document["dataset"]["objects"]
    assert all(finding in html for finding in reasons["findings"])


def test_report_of_saved_detections_needs_no_detector(evaluate: Run, run: Run, data: Path, tmp_path: Path) -> None:
    evaluate(data / "val.json", "--out", tmp_path)
    saved, page = tmp_path / "detections.json", tmp_path / "page.html"
    finished = run("eval", "--dataset", data / "val.json", "--from", saved, "--report", page)
    assert finished.code == 0, finished.stderr
    assert "after the ARM" not in page.read_text(encoding="utf-8")
    finished = run("eval", "--dataset", data / "val.json", "--from", saved, "--report", tmp_path)
    assert (finished.code, "is a folder" in finished.stderr) == (2, True)


def test_both_engines_give_one_document(evaluate: Run, data: Path) -> None:
    pytest.importorskip("hotcoco", reason="the extra fast-eval is not installed")
    documents = []
    for engine in ("pycocotools", "hotcoco", "auto"):
        document = of_json(evaluate(data / "val.json", "--engine", engine, "--json"))
        assert engine == "auto" or document["conventions"].pop("engine").startswith(engine)
        documents.append(document)
    assert documents[2]["conventions"].pop("engine").startswith("hotcoco")
    timeless = [{k: v for k, v in d.items() if k not in ("seconds", "pictures_per_second")} for d in documents]
    assert timeless[0] == timeless[1] == timeless[2]


def test_an_engine_that_differs_is_refused_or_passed_over(
    evaluate: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refinedet_cli.engine import evaluate as engine

    monkeypatch.setattr(engine, "distrust", lambda: "hotcoco 9 computes another recall")
    monkeypatch.setattr(engine, "is_installed", lambda: True)
    refused = evaluate(data / "val.json", "--engine", "hotcoco")
    assert (refused.code, "computes another recall" in refused.stderr) == (2, True)
    code, stdout, stderr = evaluate(data / "val.json", "--json")
    assert (code, stderr) == (0, "hotcoco 9 computes another recall\n")
    assert json.loads(stdout)["conventions"]["engine"].startswith("pycocotools")
    assert evaluate(data / "val.json", "--engine", "pycocotools", "--metric", "voc2007").code == 2


def test_download_fetches_what_is_named_and_nothing_else(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refinedet_cli.data import public

    asked = []

    def fetch(name: str, part: str, on_progress: Callable[..., None], root: Path | None) -> tuple[Any, ...]:
        asked.append((name, part, root))
        return ()

    monkeypatch.setattr(public, "fetch_public", fetch)
    finished = run("eval", "--dataset", "voc2007:test", "--download", "--root", tmp_path, "--weights", weights)
    assert asked == [("voc2007", "test", tmp_path)]
    assert (finished.code, "voc2007 is not there" in finished.stderr) == (4, True)
    refused = run("eval", "--dataset", tmp_path / "mine.json", "--download", "--weights", weights)
    assert (refused.code, "does not know" in refused.stderr) == (2, True)
    assert len(asked) == 1
