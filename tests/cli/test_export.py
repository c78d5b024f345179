"""The command `refinedet export`, and exported files as weights of the other commands."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from refinedet_cli.cli.app import main
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.data.images import read_image
from refinedet_cli.engine import export as exporting
from refinedet_cli.engine import sidecar

CLASSES = Classes(names=("person", "cat", "dog", "car", "tvmonitor"), category_ids=(1, 17, 18, 3, 72))
SIZES = ((60, 80), (97, 41), (120, 150))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_spread) -> Path:
    return save_spread(tmp_path_factory.mktemp("weights") / "tiny.safetensors", tiny(CLASSES).detector)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(SIZES):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def data(photos) -> Path:
    """The photographs as a COCO data set with some boxes."""
    pictures = []
    for i, (height, width) in enumerate(SIZES, start=1):
        pictures.append({"id": i, "file_name": f"{i - 1}.png", "width": width, "height": height})
    annotations = [
        {"id": k, "image_id": 1 + k % 3, "category_id": 1 + k % 2, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for k, box in enumerate(([2, 3, 20, 30], [10, 10, 25, 20], [5, 30, 30, 8], [15, 4, 12, 12]), start=1)
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}]
    document = {"info": {}, "images": pictures, "annotations": annotations, "categories": categories}
    path = photos / "val.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def written(weights, photos, data, tmp_path_factory) -> tuple[Path, dict, str]:
    """One export by the command: the file, its document, and what stderr said."""
    out = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        patch.setattr(sys, "stderr", io.StringIO())
        code = main([
            "export", "--weights", str(weights), "--out", str(out), "--dynamic-batch", "--json",
            "--verify", str(photos), "--dataset", str(data), "--dataset", str(data),
        ])  # fmt: skip
        stdout, stderr = sys.stdout.getvalue(), sys.stderr.getvalue()
    assert code == 0, stderr
    return out / "tiny.onnx", json.loads(stdout), stderr


@pytest.fixture
def premade(monkeypatch, written) -> None:
    """Let an export take the file that was written before."""
    monkeypatch.setattr(exporting, "write_onnx", lambda module, path, info: shutil.copy(written[0], path))


@pytest.fixture
def copied(written, tmp_path) -> Path:
    for path in written[0].parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / written[0].name


# --- writing


def test_the_document(written):
    path, document, _ = written
    assert (document["schema_version"], document["command"]) == (1, "export")
    assert document["files"] == [str(path), f"{path}.json"]
    assert document["bytes"] == path.stat().st_size
    head = {name: document[name] for name in ("format", "precision", "content", "batch", "weights", "preset")}
    assert head == {
        "format": "onnx",
        "precision": "fp32",
        "content": "detections",
        "batch": None,
        "weights": "tiny.safetensors",
        "preset": "tiny",
    }
    assert (document["holds"], document["failures"]) == (True, [])
    agreement = document["agreement"]
    assert agreement.keys() == {
        "pictures", "boxes", "unmatched", "ties", "least_iou", "box_shift", "score_shift", "worst",
    }  # fmt: skip
    assert agreement["pictures"] == 2 * 3 + 3 + 4  # of both --dataset, of --verify, and the odd ones
    assert agreement["boxes"] > 100
    assert agreement["unmatched"] == 0
    assert document["tolerance"].keys() == {"above", "iou", "score", "unmatched", "ap"}
    accuracy = document["accuracy"]
    assert accuracy["change"] == pytest.approx(accuracy["AP_exported"] - accuracy["AP_checkpoint"])
    assert abs(accuracy["change"]) <= document["tolerance"]["ap"]


def test_help_says_when_a_folder_is_needed(run):
    told = " ".join(run("export", "--help").stdout.replace("│", " ").split())
    assert "required, unless --check is given" in told


def test_what_is_kept_of_the_pictures_is_said(written):
    assert "tiny.onnx.json keeps 3 of the pictures, shrunk" in written[2]


@pytest.mark.usefixtures("premade")
def test_the_table(run, weights, photos, tmp_path):
    code, stdout, stderr = run("export", "--weights", weights, "--out", tmp_path, "--verify", photos / "0.png")
    assert code == 0
    for words in ("Proof: against the checkpoint", "Pictures", "Without counterpart at IoU 0.999", "proven  "):
        assert words in stdout
    assert str(tmp_path / "tiny.onnx") in stdout.replace("\n", "")
    assert "AP" not in stdout
    assert "keeps one of the pictures, shrunk" in stderr
    assert "keeps" not in run("export", "--weights", weights, "--out", tmp_path, "--quiet").stderr


def test_a_failed_proof_is_exit_code_7_and_leaves_nothing(run, weights, photos, written, tmp_path, monkeypatch):
    def write_damaged(module: object, path: Path, info: object) -> None:
        model = onnx.load(written[0])
        entry = next(e for e in model.graph.initializer if "odm.levels.0.weight" in e.name)
        values = onnx.numpy_helper.to_array(entry) * 1.5
        entry.CopyFrom(onnx.numpy_helper.from_array(values, entry.name))
        onnx.save(model, path)

    monkeypatch.setattr(exporting, "write_onnx", write_damaged)
    out = tmp_path / "out"
    code, stdout, stderr = run("export", "--weights", weights, "--out", out, "--verify", photos, "--json")
    assert code == 7
    assert "nothing was written" in stderr
    document = json.loads(stdout)
    assert (document["holds"], document["files"], document["bytes"]) == (False, [], 0)
    assert document["failures"]
    assert not out.exists()
    code, stdout, _ = run("export", "--weights", weights, "--out", out, "--verify", photos)
    assert code == 7
    assert "not proven" in stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--out is missing"),
        (["--out", "x", "--raw", "--nms", "none"], "--raw has no NMS"),
        (["--out", "x", "--batch", "2", "--dynamic-batch"], "--batch and --dynamic-batch"),
        (["--out", "x", "--precision", "int8"], "--calibrate"),
        (["--out", "x", "--calibrate", "PHOTOS"], "--calibrate is about int8"),
        (["--out", "x", "--precision", "int8", "--format", "torch-export", "--calibrate", "PHOTOS"], "torch-export"),
        (["--out", "x", "--batch", "0"], "greater than or equal to 1"),
        (["--out", "x", "--format", "tensorrt"], "tensorrt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be(run, weights, photos, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)  # where "x" would be made
    options = [str(photos) if option == "PHOTOS" else option for option in options]
    code, stdout, stderr = run("export", "--weights", weights, *options)
    assert code == 2
    assert words in stderr.replace("\n", " ")
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_there(run, tmp_path):
    code, _, stderr = run("export", "--weights", "none.safetensors", "--out", tmp_path / "out")
    assert code == 5
    assert "none.safetensors" in stderr


def test_an_exported_file_cannot_be_exported_again(run, written, tmp_path):
    code, _, stderr = run("export", "--weights", written[0], "--out", tmp_path / "out")
    assert code == 5
    assert "tiny.onnx" in stderr


# --- --check


def test_check_of_a_good_file(run, copied):
    before = sorted(copied.parent.iterdir())
    code, stdout, stderr = run("export", "--check", copied)
    assert (code, stderr) == (0, "")
    assert "proven  " in stdout
    assert "onnxruntime 1." in stdout
    document = json.loads(run("export", "--check", copied, "--json").stdout)
    assert document["file"] == str(copied)
    assert (document["holds"], document["failures"], document["versions_changed"]) == (True, [], [])
    assert document["agreement"]["pictures"] == 3
    assert document["accuracy"] is None
    assert sorted(copied.parent.iterdir()) == before


def test_check_tells_of_other_versions(run, copied, monkeypatch):
    now = sidecar.versions("onnx")
    monkeypatch.setattr(sidecar, "versions", lambda kind: {**now, "onnxruntime": "99.1"})
    code, stdout, stderr = run("export", "--check", copied, "--json")
    assert code == 0
    assert f"written with onnxruntime {now['onnxruntime']}, proven with 99.1" in stderr
    assert json.loads(stdout)["versions_changed"] == [
        {"name": "onnxruntime", "then": now["onnxruntime"], "now": "99.1"}
    ]


def test_check_of_a_changed_file(run, copied):
    content = bytearray(copied.read_bytes())
    content[len(content) // 2] ^= 1
    copied.write_bytes(content)
    code, stdout, stderr = run("export", "--check", copied)
    assert (code, stdout) == (7, "")
    assert "not the file that was proven" in stderr


def test_check_of_pictures_that_give_something_else(run, copied):
    sidecar = copied.with_name("tiny.onnx.json")
    document = json.loads(sidecar.read_text())
    document["golden"][0]["scores"][0] -= 0.001
    sidecar.write_text(json.dumps(document))
    code, stdout, stderr = run("export", "--check", copied, "--json")
    assert code == 7
    assert "does not do what it did" in stderr
    assert json.loads(stdout)["holds"] is False


def test_check_without_sidecar_or_file(run, copied):
    copied.with_name("tiny.onnx.json").unlink()
    code, _, stderr = run("export", "--check", copied)
    assert code == 5
    assert "tiny.onnx.json" in stderr
    code, _, stderr = run("export", "--check", copied.with_name("none.onnx"))
    assert code == 5
    assert "none.onnx: there is no such file" in stderr


@pytest.mark.parametrize(
    "option",
    [
        ["--out", "x"],
        ["--verify", "x"],
        ["--dataset", "x"],
        ["--calibrate", "x"],
        ["--weights", "x"],
        ["--precision", "fp16"],
        ["--postprocess", "caffe"],
        ["--batch", "2"],
        ["--dynamic-batch"],
        ["--raw"],
    ],
    ids=" ".join,
)
def test_check_goes_with_no_option_of_an_export(run, copied, option):
    code, stdout, stderr = run("export", "--check", copied, *option)
    assert (code, stdout) == (2, "")
    assert f"{option[0]} does not go with --check" in stderr


# --- exported files as weights


def rows(path: Path) -> list[dict]:
    document = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    files = {image["id"]: image["file_name"] for image in document["images"]}
    return sorted(
        (
            {
                "file": files[a["image_id"]],
                "class": names[a["category_id"]],
                "id": a["category_id"],
                "score": a["score"],
                "bbox": a["bbox"],
            }
            for a in document["annotations"]
        ),
        key=lambda row: (row["file"], row["id"], row["bbox"][0]),
    )


def assert_same_rows(first: Path, second: Path) -> None:
    ours, theirs = rows(first), rows(second)
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert (a["file"], a["class"], a["id"]) == (b["file"], b["class"], b["id"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.05)


def test_detect_finds_the_same_with_the_exported_file(run, weights, written, photos, tmp_path):
    origins = []
    for name, file in (("checkpoint", weights), ("exported", written[0])):
        code, stdout, stderr = run(
            "detect", photos, "--weights", file, "--device", "cpu", "--score", 0.3, "--out", tmp_path / name, "--json",
            *(("--precision", "fp32") if name == "checkpoint" else ()),
        )  # fmt: skip
        assert code == 0, stderr
        origins.append(json.loads(stdout)["origin"])
    assert_same_rows(tmp_path / "checkpoint" / "detections.json", tmp_path / "exported" / "detections.json")
    assert [origin["weights"] for origin in origins] == ["tiny.safetensors", "tiny.onnx"]
    assert origins[0]["engine"].startswith("torch")
    assert origins[1]["engine"].startswith("onnxruntime")


def test_eval_scores_the_same_with_the_exported_file(run, weights, written, data, tmp_path):
    documents = []
    for name, file in (("checkpoint", weights), ("exported", written[0])):
        code, stdout, stderr = run(
            "eval", "--dataset", data, "--weights", file, "--device", "cpu", "--out", tmp_path / name, "--json"
        )
        assert code == 0, stderr
        documents.append(json.loads(stdout))
    for metric, value in documents[0]["metrics"].items():
        assert documents[1]["metrics"][metric] == pytest.approx(value, abs=1e-3)
    first, second = (tmp_path / name / "detections.json" for name in ("checkpoint", "exported"))
    scores = [sorted(row["score"] for row in rows(path)) for path in (first, second)]
    assert len(scores[0]) > 100
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ["detect", "PHOTOS", "--precision", "fp32"],
        ["detect", "PHOTOS", "--multi-scale", "paper"],
        ["eval", "--dataset", "DATA", "--precision", "fp32"],
        ["eval", "--dataset", "DATA", "--postprocess", "caffe"],
        ["eval", "--dataset", "DATA", "--multi-scale", "paper"],
    ],
    ids=" ".join,
)
def test_what_an_exported_file_cannot_do_is_refused(run, written, photos, data, options):
    filled = [{"PHOTOS": str(photos), "DATA": str(data)}.get(option, option) for option in options]
    code, stdout, stderr = run(*filled, "--weights", written[0], "--device", "cpu")
    assert (code, stdout) == (2, "")
    assert f"{options[-2]} does not go with tiny.onnx" in stderr


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--data", "DATA", "--val", "DATA", "--out", "OUT", "--device", "cpu"],
        ["anchors", "--dataset", "DATA"],
    ],
    ids=lambda command: command[0],
)
def test_who_needs_weights_says_so(run, written, data, tmp_path, command):
    filled = [{"DATA": str(data), "OUT": str(tmp_path / "run")}.get(option, option) for option in command]
    code, stdout, stderr = run(*filled, "--weights", written[0])
    assert (code, stdout) == (5, "")
    assert "tiny.onnx" in stderr
    assert "Traceback" not in stderr


def test_the_example_finds_the_same_without_this_package(root, weights, written, photos, tmp_path, run):
    picture = sorted(photos.iterdir())[0]
    np.save(tmp_path / "picture.npy", read_image(picture))
    # Without the variable, importing onnxruntime writes into the home folder.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    call = [sys.executable, str(root / "examples" / "run_onnx.py"), str(written[0]), str(tmp_path / "picture.npy")]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=True)
    done_here = run("detect", picture, "--weights", weights, "--precision", "fp32", "--json")
    detections = json.loads(done_here.stdout)["pictures"][0]["detections"]
    assert detections
    for line, found in zip(done.stdout.splitlines(), detections, strict=True):
        name, score, *edges = line.split(" ")
        left, top, width, height = found["bbox"]
        assert (name, score) == (found["class"], f"{found['score']:.2f}")
        assert [int(e) for e in edges] == pytest.approx([left, top, left + width, top + height], abs=0.51)
