"""No command that takes data changes it, opens a socket, or writes anywhere but into --out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.engine import benchmark as benchmark_module
from refinedet_cli.engine.benchmark_worker import LocalSubject

FRESH = ("--weights", "none", "--preset", "tiny", "--workers", 0, "--batch", 2, "--precision", "fp32")
PARTS = "train=0.5,val=0.5"
# The list of fonts, which takes seconds to make, matplotlib keeps for all programs of a user.
FONTS = mpl.get_cachedir()


class Place(NamedTuple):
    """Where the commands of a test work: all empty but the data; ``out`` does not exist, the folder around it does."""

    data: Path
    home: Path
    here: Path
    temporary: Path
    out: Path


@pytest.fixture(scope="module")
def fuzz(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script that knows how to watch."""
    return load_script("benchmarks/fuzz_readers.py")


@pytest.fixture(scope="module")
def watch(fuzz: ModuleType) -> Any:
    return fuzz.Watch()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path]) -> Path:
    """Six pictures with two classes, four to train on and two to validate, and weights that know them."""
    folder = tmp_path_factory.mktemp("sound")
    draw = np.random.default_rng(0)
    classes = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for part, numbers in (("train", (1, 2, 3, 4)), ("val", (5, 6))):
        images = [{"id": i, "file_name": f"pictures/{i}.png", "width": 64, "height": 64} for i in numbers]
        objects = [
            {"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": [4 * i, 6 * c, 24, 28], "area": 672}
            for i in numbers
            for c in (1, 2)
        ]  # fmt: skip
        (folder / "set").mkdir(exist_ok=True)
        document = {"images": images, "annotations": objects, "categories": classes}
        (folder / "set" / f"{part}.json").write_text(json.dumps(document))
    (folder / "set" / "pictures").mkdir()
    for i in range(1, 7):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"set/pictures/{i}.png")
    config = get_preset("tiny", Classes(names=("cat", "dog"), category_ids=(1, 2))).detector
    save_random(folder / "tiny.safetensors", config)
    return folder


@pytest.fixture
def place(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the data, and HOME, the current folder and all that programs take for temporary elsewhere and empty."""
    found = Place(*(tmp_path / name for name in ("data", "home", "here", "temporary", "around/out")))
    shutil.copytree(sound, found.data)
    for folder in (found.home, found.here, found.temporary, found.out.parent):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(found.temporary))
    monkeypatch.setenv("HOME", str(found.home))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "REFINEDET_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(found.here)
    return found


@pytest.fixture
def harmless(run: Callable[..., Any], watch: Any, fuzz: ModuleType, place: Place) -> Callable[..., Any]:
    """Run a command and compare what is on disk before and after."""

    def call(*args: object, code: int = 0) -> Any:
        before = {folder: fuzz.tree_hash(folder) for folder in place[:4]}
        # A folder that is written as a whole lies beside --out until it is, and a benchmark's pictures are temporary.
        with watch.watching(readable=None, writable=(place.out.parent, place.temporary)) as seen:
            ended = run(*args)
        assert ended.code == code, ended.stderr
        assert {folder: fuzz.tree_hash(folder) for folder in before} == before
        # Training notes the commit that it runs, which git tells without writing, and the platform: Python asks uname.
        harmless = ("subprocess.Popen: ('git', ['git', '-C', ", "subprocess.Popen: ('uname', ['uname', '-p'], ")
        assert [s for s in seen if not s.startswith(harmless)] == []
        assert [*place.out.parent.iterdir()] in ([], [place.out])
        return ended

    return call


def test_training(harmless: Callable[..., Any], place: Place) -> None:
    data = place.data / "set"
    forecast = harmless("train", "--data", data, *FRESH, "--dry-run", "--json")
    assert not place.out.exists()
    assert json.loads(forecast.stdout)["dry_run"]
    harmless("train", "--data", data, "--out", place.out, *FRESH, "--set", "train.steps=1")
    assert (place.out / "last.safetensors").is_file()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("eval --dataset {set} --weights {weights} --bootstrap 100", id="eval"),
        pytest.param("anchors --dataset {set} --preset tiny --no-search", id="anchors"),
        pytest.param("anchors --dataset {set} --weights {weights} --visualize --no-search", id="anchors, drawn"),
        pytest.param("data check {set} --preset tiny --workers 1", id="data check"),
        pytest.param("data convert {set} --to yolo", id="data convert, copied"),
        pytest.param("data convert {set} --to coco --picture-files stay", id="data convert, staying"),
        pytest.param("data convert {set} --to voc --picture-files link", id="data convert, linked"),
        pytest.param("data stats {set} --preset tiny", id="data stats"),
        pytest.param("data split {set} --parts " + PARTS, id="data split"),
        pytest.param("detect {set}/pictures --weights {weights} --crops", id="detect"),
        pytest.param("detect {set}/pictures --weights {weights} --tile 32 --no-draw", id="detect, tiles"),
        pytest.param("bench {weights} --dataset {set} --rounds 1 --threads 1", id="bench"),
    ],
)
def test_commands(harmless: Callable[..., Any], place: Place, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    # A process of its own takes seconds to load torch.
    monkeypatch.setattr(benchmark_module, "benchmark", partial(benchmark_module.benchmark, start=LocalSubject))
    monkeypatch.setattr("refinedet_cli.engine.charts.DPI", 40)
    threads = torch.get_num_threads()
    words = call.format(set=place.data / "set", weights=place.data / "tiny.safetensors").split()
    harmless(*words, "--out", place.out)
    torch.set_num_threads(threads)
    assert any(place.out.iterdir())


@pytest.mark.parametrize("call", ["eval --dataset {set} --weights {weights}", "data check {set} --preset tiny"])
def test_nothing_is_written_without_out(harmless: Callable[..., Any], place: Place, call: str) -> None:
    harmless(*call.format(set=place.data / "set", weights=place.data / "tiny.safetensors").split(), "--json")
    assert not place.out.exists()


def test_refusals_leave_nothing(harmless: Callable[..., Any], place: Place) -> None:
    """A command that fails in the middle, on its last picture."""
    (place.data / "set/pictures/6.png").write_bytes(b"no picture")
    data = place.data / "set"
    harmless("data", "convert", data, "--to", "yolo", "--out", place.out, code=4)
    assert not place.out.exists()
    harmless("eval", "--dataset", data, "--weights", place.data / "tiny.safetensors", "--out", place.out, code=4)


def test_a_process_of_its_own_leaves_home_and_folder_empty(place: Place) -> None:
    """What libraries do when they are imported first, with a HOME that is new to them."""
    calls = [
        ["anchors", "--dataset", "{set}", "--weights", "{weights}", "--visualize", "--no-search", "--out", "{out}/a"],
        ["detect", "{set}/pictures/1.png", "--weights", "{weights}", "--out", "{out}/d"],
    ]
    names = {"set": place.data / "set", "weights": place.data / "tiny.safetensors", "out": place.out}
    filled = [[word.format(**names) for word in call] for call in calls]
    program = "import json, sys; from refinedet_cli.cli.app import main; " + (
        "sys.exit(max(main(call) for call in json.loads(sys.argv[1])))"
    )
    environment = {**os.environ, "MPLCONFIGDIR": FONTS, "HOME": str(place.home), "TMPDIR": str(place.temporary)}
    ended = subprocess.run(
        [sys.executable, "-c", program, json.dumps(filled)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert [*place.home.rglob("*"), *place.here.iterdir(), *place.temporary.iterdir()] == []


def test_the_watch_sees(watch: Any, fuzz: ModuleType, tmp_path: Path) -> None:
    """The guard itself, with cases in which it must strike."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("a")
    before = fuzz.tree_hash(tmp_path)
    with watch.watching(readable=None, writable=(tmp_path / "out",)) as seen:
        (tmp_path / "in" / "a").read_text()
        assert seen == []
        (tmp_path / "in" / "b").write_text("b")
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "c").write_text("c")
    assert len(seen) == 1
    assert "in/b" in seen[0]
    assert fuzz.tree_hash(tmp_path) != before
    before = fuzz.tree_hash(tmp_path)
    assert fuzz.tree_hash(tmp_path) == before
    os.utime(tmp_path / "in" / "a", (1, 1))
    assert fuzz.tree_hash(tmp_path) != before
