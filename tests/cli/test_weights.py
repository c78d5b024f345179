"""`refinedet weights list|info|pull|push`, and `--weights` from the Hub, over HTTP."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants, file_download
from PIL import Image

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.zoo.checkpoint import save_checkpoint
from refinedet_cli.zoo.hub import DEFAULT_WEIGHTS, read_manifest, resolve_weights
from refinedet_cli.zoo.hub_client import network

SIGNS = Classes(names=("stop", "give | way"), category_ids=(3, 7))
PROVENANCE = {
    "preset": "tiny", "seed": 5, "tool_version": "0.1.0", "step": 40, "pictures_seen": 320, "start": {"random": True},
    "train": {"optimizer": "adamw", "lr": 0.001, "batch": 8},
    "data": {"name": "signs/train", "pictures": 200, "sha256": "ab" * 32},
    "validation": {"name": "signs/val", "pictures": 50, "AP": 0.25, "AP50": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "best.safetensors"
    config = tiny(SIGNS).detector
    save_checkpoint(path, config, build(config).network.state_dict(), PROVENANCE, dtype=torch.float16)
    return path.read_bytes()


@pytest.fixture
def run_folder(tmp_path, checkpoint) -> Path:
    folder = tmp_path / "runs" / "signs"
    folder.mkdir(parents=True)
    (folder / "best.safetensors").write_bytes(checkpoint)
    (folder / "metrics.csv").write_text("step,epoch,AP,AP50\n20,1.0,0.1,0.3\n40,2.0,0.25,0.5\n")
    return folder


@pytest.fixture
def writer(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.tokens["hf_writer"] = "acme"


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(path)
    return path


# Pull.


def test_a_model_is_pulled_once_and_then_needs_no_hub(hub, run, tmp_path, checkpoint, picture):
    hub.put("acme/signs", {"model.safetensors": checkpoint, "README.md": b"---\nlicense: mit\n---\n"})
    code, stdout, stderr = run("weights", "pull", "acme/signs", "--json")
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    hub.stop()
    assert run("weights", "pull", "acme/signs").code == 0
    assert (
        json.loads(run("detect", picture, "--weights", "acme/signs", "--json").stdout)["origin"]["sha256"]
        == (document["sha256"])
    )
    copy = tmp_path / "copy.safetensors"
    assert run("weights", "pull", "acme/signs", "--out", copy).code == 0
    assert copy.read_bytes() == checkpoint


def test_pull_takes_what_the_branch_means_by_now(hub, run, checkpoint):
    other = checkpoint.replace(b"signs/val", b"signs/new")
    hub.put("acme/signs", {"model.safetensors": checkpoint})
    assert run("weights", "pull", "acme/signs").code == 0
    hub.requests.clear()
    assert run("weights", "pull", "acme/signs").code == 0
    assert [request.method for request in hub.requests if "model.safetensors" in request.path] == ["HEAD"]
    hub.put("acme/signs", {"model.safetensors": other})
    offline = run("weights", "pull", "acme/signs", "--offline", "--json")
    assert json.loads(offline.stdout)["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert json.loads(run("weights", "pull", "acme/signs", "--json").stdout)["sha256"] == (
        hashlib.sha256(other).hexdigest()
    )
    hub.stop()
    code, _, stderr = run("weights", "pull", "acme/signs")
    assert (code, "the Hub could not be asked" in stderr) == (0, True)


def test_a_commit_never_changes_and_is_not_asked_for(hub, run, checkpoint):
    commit = hub.put("acme/signs", {"model.safetensors": checkpoint})
    assert run("weights", "pull", f"acme/signs@{commit}").code == 0
    hub.requests.clear()
    assert run("weights", "pull", f"acme/signs@{commit}").code == 0
    assert not [request for request in hub.requests if "model.safetensors" in request.path]


def test_pull_does_not_replace_another_file(hub, run, tmp_path, checkpoint):
    hub.put("acme/signs", {"model.safetensors": checkpoint})
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    code, _, stderr = run("weights", "pull", "acme/signs", "--out", tmp_path / "mine.safetensors")
    assert code == 2
    assert "is another file" in stderr
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"


def test_a_damaged_cache_is_mended_by_pull(hub, run, checkpoint):
    hub.put("acme/signs", {"model.safetensors": checkpoint})
    path = resolve_weights("acme/signs")
    path.resolve().write_bytes(checkpoint[:-1] + b"\xff")
    assert run("weights", "pull", "acme/signs").code == 0
    assert path.read_bytes() == checkpoint


def test_an_interrupted_pull_goes_on_where_it_stopped(hub, run, checkpoint, monkeypatch):
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.put("acme/signs", {"model.safetensors": checkpoint})
    hub.cut = len(checkpoint) * 2 // 3
    seen = []
    with network(on_progress=seen.append):
        path = resolve_weights("acme/signs")
    assert path.read_bytes() == checkpoint
    assert [r.headers.get("range") is not None for r in hub.requests if "/storage/" in r.path] == [False, True]
    assert seen[-1] == ("model.safetensors", len(checkpoint), len(checkpoint))


def test_what_arrives_damaged_is_not_kept(hub, run, checkpoint):
    hub.put("acme/signs", {"model.safetensors": checkpoint})
    hub.spoilt = True
    code, _, stderr = run("weights", "pull", "acme/signs")
    assert code == 5
    assert "arrived damaged: its SHA-256 is not the one that the Hub states" in stderr
    hub.spoilt = False
    assert run("weights", "pull", "acme/signs").code == 0


def test_a_revision_is_pinned(hub, run, checkpoint):
    old = hub.put("acme/signs", {"model.safetensors": checkpoint}, "v1")
    hub.put("acme/signs", {"README.md": b"no weights any more"})
    for revision in ("v1", old):
        assert run("weights", "pull", f"acme/signs@{revision}").code == 0
    code, _, stderr = run("weights", "pull", "acme/signs")
    assert code == 5
    assert "has no file 'model.safetensors'" in stderr


def test_another_file_has_to_be_named(hub, run, checkpoint):
    hub.put("acme/signs", {"night.safetensors": checkpoint, "old/day.safetensors": checkpoint, "w.bin": b"w"})
    code, _, stderr = run("weights", "pull", "acme/signs")
    assert code == 5
    assert "name one that it has: acme/signs:night.safetensors, acme/signs:old/day.safetensors\n" in stderr
    assert run("weights", "pull", "acme/signs:old/day.safetensors").code == 0


@pytest.mark.parametrize("name", ["acme/unknown", "acme/private"])
def test_what_the_hub_hides_is_told_with_a_cure(hub, run, name):
    hub.refuse("acme/private", "RepoNotFound")
    code, _, stderr = run("weights", "pull", name)
    assert code == 5
    assert f"{name}: the Hub has no such repository, or it is private" in stderr
    assert "hf auth login" in stderr


def test_offline_is_an_option(hub, run, checkpoint):
    hub.put("acme/signs", {"model.safetensors": checkpoint})
    code, _, stderr = run("weights", "pull", "acme/signs", "--offline")
    assert code == 5
    assert "and --offline forbids the network" in stderr
    assert hub.requests == []
    assert constants.HF_HUB_OFFLINE is False
    assert run("weights", "pull", "acme/signs").code == 0
    assert run("weights", "pull", "acme/signs", "--offline").code == 0


@pytest.mark.parametrize("command", [("train", "--data"), ("anchors", "--dataset")])
def test_commands_with_weights_can_be_kept_off_the_network(hub, run, tmp_path, picture, command):
    data = tmp_path / "data.json"
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    image = {"id": 1, "file_name": picture.name, "width": 80, "height": 48}
    document = {"images": [image], "annotations": [box], "categories": [{"id": 3, "name": "stop"}]}
    data.write_text(json.dumps(document))
    more = ("--val", "none", "--out", tmp_path / "out") if command[0] == "train" else ()
    code, _, stderr = run(*command, data, "--weights", "acme/signs", "--offline", *more)
    assert code == 5
    assert "--offline forbids the network" in stderr
    assert hub.requests == []


@pytest.mark.parametrize("source", ["one.jpg", "one.mp4"])
def test_detect_can_be_kept_off_the_network(hub, run, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    Path(source).touch()
    code, _, stderr = run("detect", source, "--weights", "acme/signs", "--offline")
    assert code == 5
    assert "--offline forbids the network" in stderr
    assert hub.requests == []


def test_a_slip_in_a_path_does_not_reach_the_network(hub, run, run_folder, monkeypatch):
    monkeypatch.chdir(run_folder.parent.parent)
    for name in ("runs/sings", "runs/signs/besst.safetensors", "signs.safetensors"):
        assert run("weights", "info", name).code == 5
    assert hub.requests == []
    assert "write runs/sings@main" in run("weights", "info", "runs/sings").stderr


# What could do harm.


class _Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


@pytest.mark.parametrize("name", ["model.pth", "pytorch_model.bin", "model.pt2", "model.pkl"])
def test_a_pickle_is_not_even_downloaded(hub, run, tmp_path, picture, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    hub.put("acme/signs", {name: pickle.dumps(_Hostile())})
    code, _, stderr = run("detect", picture, "--weights", f"acme/signs:{name}")
    assert code == 5
    assert "no other weights are downloaded, for they could run code" in stderr
    assert hub.requests == []
    assert not Path("harmed").exists()


def _header(document: object, tensors: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + tensors


HOSTILE = {
    "a pickle": pickle.dumps(_Hostile()),
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of nothing but brackets": struct.pack("<Q", 50_000) + b"[" * 50_000,
    "a tensor beyond the end": _header({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}),
    "another tool's": _header({"__metadata__": {"format": "pt"}}),
    "a config that is none": _header(
        {"__metadata__": {"format": "refinedet", "format_version": "1", "config": "[[", "provenance": "{}"}}
    ),
    "a config without end": _header(
        {"__metadata__": {"format": "refinedet", "format_version": "1", "config": "[" * 9999, "provenance": "{}"}}
    ),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(hub, run, tmp_path, picture, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    hub.put("acme/signs", {"model.safetensors": content})
    for command in (("detect", picture, "--weights", "acme/signs"), ("weights", "info", "acme/signs")):
        code, _, stderr = run(*command)
        assert code == 5
        assert stderr.startswith("error: ")
        assert "Traceback" not in stderr
    assert not Path("harmed").exists()
    assert {m["source"] for m in json.loads(run("weights", "list", "--json").stdout)["models"]} == {"bundled"}


# List and info.


def test_list_shows_bundled_and_cached_models_of_ours(hub, run, checkpoint):
    bundled = list(read_manifest())
    assert [m["name"] for m in json.loads(run("weights", "list", "--json").stdout)["models"]] == bundled
    commit = hub.put("acme/signs", {"night.safetensors": checkpoint}, "v2")
    hub.put("acme/signs", {"model.safetensors": checkpoint, "README.md": b"---\nlicense: mit\n---\n"})
    hub.put("timm/other", {"model.safetensors": HOSTILE["another tool's"]})
    for name in ("acme/signs", "acme/signs@v2:night.safetensors"):
        assert run("weights", "pull", name).code == 0
    assert run("weights", "pull", "timm/other").code == 5
    hub.stop()
    models = json.loads(run("weights", "list", "--json").stdout)["models"]
    assert [m["name"] for m in models] == [*bundled, "acme/signs", "acme/signs@v2:night.safetensors"]
    default, (first, second) = models[0], models[len(bundled) :]
    assert {k: first[k] for k in ("source", "classes", "trained_on", "scored_on", "AP50", "licence")} == {
        "source": "cache", "classes": 2, "trained_on": "signs/train", "scored_on": "signs/val", "AP50": 0.5,
        "licence": "mit",
    }  # fmt: skip
    assert (default["licence"], second["licence"]) == ("Apache-2.0", None)
    assert commit in str(second["path"])
    for model in (first, second):
        assert resolve_weights(model["name"]).read_bytes() == checkpoint
    table = run("weights", "list").stdout
    assert "acme/signs@v2:night.safetensors" in table
    assert "0.500" in table


def test_info_tells_what_the_checkpoint_records(run, run_folder, checkpoint):
    document = json.loads(run("weights", "info", run_folder, "--json").stdout)
    assert document["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert document["bytes"] == len(checkpoint)
    assert document["provenance"] == PROVENANCE
    assert document["config"]["classes"]["names"] == list(SIGNS.names)
    assert document["scores"]["AP50"] == 0.5
    assert document["scores"]["weights_chosen_by_them"] is True
    assert document["licence"] is None
    table = run("weights", "info", run_folder).stdout
    for words in ("give | way", "signs/train, 200 pictures", "random weights", "not stated", "320"):
        assert words in table


def test_info_counts_the_parameters(run, run_folder):
    expected = sum(parameter.numel() for parameter in build(tiny(SIGNS).detector).network.parameters())
    assert json.loads(run("weights", "info", run_folder, "--json").stdout)["parameters"] == expected


def test_info_of_bundled_weights_knows_the_manifest(run):
    document = json.loads(run("weights", "info", DEFAULT_WEIGHTS, "--json").stdout)
    assert document["licence"] == "Apache-2.0"
    assert len(document["scores"]["AP50_of_class"]) == 20
    assert document["scores"]["weights_chosen_by_them"] is False


# Push.


def test_push_then_pull_is_equal_byte_for_byte(hub, writer, run, run_folder, checkpoint):
    code, stdout, stderr = run("weights", "push", run_folder, "acme/signs", "--licence", "mit", "--json")
    assert (code, stderr) == (0, "")
    (done,) = json.loads(stdout)["models"]
    assert done["url"] == f"{hub.url}/acme/signs"
    files = hub.repos["acme/signs"].commits[done["commit"]]
    assert sorted(files) == ["README.md", "model.safetensors", "training.png"]
    assert files["model.safetensors"] == checkpoint
    assert run("weights", "pull", "acme/signs").code == 0
    assert resolve_weights("acme/signs").read_bytes() == checkpoint
    assert json.loads(run("weights", "list", "--json").stdout)["models"][-1]["licence"] == "mit"


def test_the_card_is_made_from_the_checkpoint(run, run_folder, tmp_path):
    code, stdout, stderr = run("weights", "push", run_folder, "acme/signs", "--licence", "My Own", "--dry-run")
    assert (code, stderr) == (0, "nothing was sent\n")
    card = ModelCard(stdout)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "my-own")
    assert (data["library_name"], data["pipeline_tag"]) == ("refinedet", "object-detection")
    (results,) = data["model-index"]
    assert results["name"] == "signs"
    (result,) = results["results"]
    assert result["dataset"]["name"] == "signs/val"
    assert [(m["name"], m["value"]) for m in result["metrics"]] == [("AP", 0.25), ("AP50", 0.5)]
    for words in (
        "--weights acme/signs", 'from_pretrained("acme/signs")', "2 classes: stop, give | way",
        "| AP at IoU 0.50 | 0.500 |", "expect a little less", "signs/train, 200 pictures", "![", "under My Own",
    ):  # fmt: skip
        assert words in card.text


def test_what_is_not_known_is_not_claimed(run, tmp_path, save_random):
    path = save_random(tmp_path / "bare.safetensors", tiny(SIGNS).detector)
    _, stdout, stderr = run("weights", "push", path, "acme/bare", "--dry-run")
    assert "no licence is stated, so nobody may use the weights" in stderr
    card = ModelCard(stdout)
    assert "license" not in card.data.to_dict()
    assert "model-index" not in card.data.to_dict()
    for words in ("Not measured", "has not stated a licence"):
        assert words in card.text


def test_a_dry_run_sends_nothing_and_writes_the_card(hub, writer, run, run_folder, tmp_path):
    out = tmp_path / "card"
    code, stdout, _ = run("weights", "push", run_folder, "acme/signs", "--dry-run", "--out", out, "--json")
    assert code == 0
    document = json.loads(stdout)
    assert document["dry_run"] is True
    assert (out / "README.md").read_text() == document["models"][0]["card"]
    with Image.open(out / "training.png") as figure:
        assert figure.width > 400
    assert hub.requests == []


def test_all_bundled_models_are_published_at_once(hub, writer, run):
    code, stdout, _ = run("weights", "push", "--all-bundled", "acme", "--json")
    assert code == 0
    models = json.loads(stdout)["models"]
    assert [done["repo"] for done in models] == [f"acme/{name}" for name in read_manifest()]
    for done in models:
        files = hub.repos[done["repo"]].commits[done["commit"]]
        assert hashlib.sha256(files["model.safetensors"]).hexdigest() == done["sha256"]
        assert sorted(files) == ["README.md", "classes.png", "model.safetensors"]
        assert b"license: apache-2.0" in files["README.md"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "a model and its place are missing"),
        (("{run}",), 2, "a model and its place are missing"),
        (("{run}", "signs"), 2, "'signs' is no place to publish to"),
        (("{run}", "acme/signs@v1"), 2, "is no place to publish to"),
        (("{run}", "acme/signs", "--out", "card"), 2, "--out is for --dry-run alone"),
        (("{run}", "--all-bundled", "acme"), 2, "--all-bundled takes no other model"),
        (("--all-bundled", "acme/x"), 2, "is no user or organisation"),
        (("nothing.safetensors", "acme/signs"), 5, "there is no such file"),
        (("{run}", "acme/signs"), 5, "there is no login"),
    ],
)
def test_what_cannot_be_pushed(hub, run, run_folder, args, code, words):
    ended = run("weights", "push", *(str(arg).replace("{run}", str(run_folder)) for arg in args))
    assert ended.code == code
    assert words in ended.stderr
    assert hub.requests == []


def test_a_broken_checkpoint_is_not_pushed(hub, writer, run, run_folder, checkpoint):
    (run_folder / "best.safetensors").write_bytes(checkpoint[:-100])
    assert run("weights", "push", run_folder, "acme/signs").code == 5
    assert hub.requests == []


def test_the_clients_own_bars_are_never_shown(hub, writer, run, run_folder, monkeypatch):
    # Without a terminal they hide themselves, so that looking at stderr would prove nothing.
    bars = []
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"].tqdm, "__init__", lambda *a, **k: bars.append(k))
    assert run("weights", "push", run_folder, "acme/signs", "--licence", "mit", "--quiet").stderr == ""
    assert run("weights", "pull", "acme/signs", "--quiet").stderr == ""
    assert bars == []
