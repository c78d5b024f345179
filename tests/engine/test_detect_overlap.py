"""Reading, network and writing of `detect` at the same time, and what its profile says of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.tiling import Tiling
from refinedet_cli.data.images import read_image
from refinedet_cli.data.listing import find_images
from refinedet_cli.engine import detect as module
from refinedet_cli.engine import detect_reading as reading
from refinedet_cli.engine import detect_store
from refinedet_cli.engine.detect import DetectOptions, DetectResult, detect
from refinedet_cli.engine.detect_profile import make_clock, profile_of
from refinedet_cli.engine.detect_store import InMemory
from refinedet_cli.engine.distributed import Shard
from refinedet_cli.engine.multi_scale import make_predictor
from refinedet_cli.engine.stages import Stages, stage
from refinedet_cli.engine.tiling import TiledPredictor
from refinedet_cli.zoo.checkpoint import load_detector

CPU = torch.device("cpu")
CLASSES = Classes(names=("thing",), category_ids=(7,))
# Long enough for a busy machine; only a fault waits so long.
PATIENCE = 30.0


class Slow:
    """A detector that takes its time, or does what a test wants while the network would be at work."""

    config = tiny(CLASSES).detector
    classes = CLASSES
    device = CPU
    precision = "fp32"
    engine = "none"
    schedule = None
    input_size = None

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"weights")
        self.path = path
        self.provenance: dict = {}
        self.calls: list[int] = []
        self.meanwhile = lambda call: None

    def predict(self, images) -> list[Detections]:
        self.calls.append(len(images))
        self.meanwhile(len(self.calls))
        return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)) for _ in images]


@pytest.fixture
def slow(tmp_path) -> Slow:
    return Slow(tmp_path / "w.safetensors")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Nine pictures, so three groups of three."""
    (tmp_path / "photos").mkdir()
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def go(predictor, photos: Path, out: Path | None = None, **options) -> DetectResult:
    chosen = DetectOptions(**{"score": 0.3, "batch": 3, "draw": False, "readers": 2, **options})
    return detect(predictor, find_images([str(photos)]), out=out, options=chosen)


# --- overlap


def test_a_group_does_not_wait_for_the_next_one(slow, photos, monkeypatch):
    first_group = threading.Event()

    def read(path: Path) -> np.ndarray:
        if path.name == "3.png":
            assert first_group.wait(PATIENCE), "the network waits for a picture that it does not need"
        return read_image(path)

    monkeypatch.setattr(reading, "read_image", read)
    slow.meanwhile = lambda _: first_group.set()
    go(slow, photos)
    assert slow.calls == [3, 3, 3]


def test_the_next_group_is_read_while_the_network_works(slow, photos, monkeypatch):
    read_all = [threading.Event() for _ in range(9)]

    def read(path: Path) -> np.ndarray:
        pixels = read_image(path)
        read_all[int(path.stem)].set()
        return pixels

    def wait_for_the_next(call: int) -> None:
        for event in read_all[3 * call : 3 * call + 3]:
            assert event.wait(PATIENCE)

    monkeypatch.setattr(reading, "read_image", read)
    slow.meanwhile = wait_for_the_next
    go(slow, photos)
    assert slow.calls == [3, 3, 3]


def test_copies_are_drawn_while_the_network_works(slow, photos, tmp_path):
    def wait_for_the_last(call: int) -> None:
        names = [f"{i}.png" for i in range(3 * (call - 1))]
        end = time.monotonic() + PATIENCE
        while not all((tmp_path / "out" / "annotated" / name).exists() for name in names):
            assert time.monotonic() < end
            time.sleep(0.01)

    slow.meanwhile = wait_for_the_last
    go(slow, photos, tmp_path / "out", draw=True)
    assert slow.calls == [3, 3, 3]


# --- the profile


def seconds(result: DetectResult) -> dict[str, float]:
    assert result.profile is not None
    return {time.stage: time.seconds for time in (*result.profile.in_turn, *result.profile.beside)}


def test_stages_in_turn_add_up_to_the_run(slow, photos, tmp_path):
    slow.meanwhile = lambda _: time.sleep(0.05)
    result = go(slow, photos, tmp_path / "out", draw=True, profile=True)
    profile = result.profile
    assert profile.seconds == result.seconds
    assert profile.pictures == 9
    assert sum(time.seconds for time in profile.in_turn) == pytest.approx(result.seconds)
    assert sum(time.share for time in profile.in_turn) == pytest.approx(1)
    assert all(time.seconds >= 0 for time in profile.in_turn)
    for time_beside in profile.beside:
        assert time_beside.threads == 2
        assert 0 < time_beside.seconds <= 2 * result.seconds
        assert time_beside.share == pytest.approx(time_beside.seconds / (2 * result.seconds))
    for entry in (*profile.in_turn, *profile.beside):
        assert entry.ms_per_picture == pytest.approx(1000 * entry.seconds / 9)
    assert seconds(result)["network"] >= 3 * 0.05
    assert seconds(result)["outputs"] > 0
    assert seconds(result)["record"] > 0


def test_a_slow_network_is_the_bottleneck(slow, photos):
    slow.meanwhile = lambda _: time.sleep(0.3)
    profile = go(slow, photos, profile=True).profile
    assert profile.bottleneck.stage == "network"
    assert profile.verdict == f"the network is the bottleneck: {profile.bottleneck.share:.0%} of the time"


def test_slow_reading_is_the_bottleneck_and_the_cure_is_told(slow, photos, tmp_path, monkeypatch):
    def read(path: Path) -> np.ndarray:
        time.sleep(0.1)
        return read_image(path)

    monkeypatch.setattr(reading, "read_image", read)
    profile = go(slow, photos, tmp_path / "1", draw=True, profile=True).profile
    assert profile.bottleneck.stage == "wait for pictures"
    assert profile.verdict.startswith("reading pictures is the bottleneck: ")
    assert profile.verdict.endswith("more processor cores, a faster disk or smaller pictures would help")
    # Here reading at reduced size is what drawing forbids.
    slow.input_size = (64, 64)
    assert "reduced size" in go(slow, photos, tmp_path / "2", draw=True, profile=True).profile.verdict


def test_slow_drawing_is_the_bottleneck_and_the_cure_is_told(slow, photos, tmp_path, monkeypatch):
    write = module.Copies.write

    def slowly(self, *args):
        time.sleep(0.1)
        return write(self, *args)

    monkeypatch.setattr(module.Copies, "write", slowly)
    profile = go(slow, photos, tmp_path / "out", draw=True, profile=True).profile
    assert profile.bottleneck.stage == "wait for drawing"
    assert "--no-draw" in profile.verdict


def test_slow_recording_and_everything_else_are_told_apart(slow, photos, monkeypatch):
    append = InMemory.append

    def slowly(self, record) -> None:
        time.sleep(0.05)
        append(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(InMemory, "append", slowly)
        assert go(slow, photos, profile=True).profile.bottleneck.stage == "record"
    monkeypatch.setattr(module, "origin_of", _slowly(module.origin_of))
    profile = go(slow, photos, profile=True).profile
    assert profile.bottleneck.stage == "everything else"
    assert "more pictures in one run would help" in profile.verdict


def test_waiting_for_other_processes_is_a_stage_of_its_own(slow, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_store, "wait_for_all", lambda *_: time.sleep(0.5))
    profile = go(slow, photos, tmp_path / "out", shard=Shard(0, 2), profile=True).profile
    assert profile.bottleneck.stage == "wait for processes"
    assert profile.verdict.startswith("another process is the bottleneck: ")


def _slowly(function):
    def call(*args, **named):
        time.sleep(0.5)
        return function(*args, **named)

    return call


def test_without_the_option_nothing_is_recorded(slow, photos, monkeypatch):
    monkeypatch.setattr(Stages, "__call__", lambda *_: pytest.fail("nobody asked for a profile"))
    assert go(slow, photos).profile is None


def test_the_clock_ends_with_the_run(slow, photos):
    go(slow, photos, profile=True)
    assert stage("network") is stage("read")
    slow.meanwhile = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        go(slow, photos, profile=True)
    assert stage("network") is stage("read")


@pytest.mark.parametrize("kind", ["one look", "multi-scale", "tiles"])
def test_the_stages_of_a_checkpoint_are_told_apart(photos, tmp_path, save_random, kind):
    loaded = load_detector(save_random(tmp_path / "tiny.safetensors", tiny(CLASSES).detector))
    predictor = make_predictor(
        loaded, device=CPU, precision="fp32", multi_scale="voc" if kind == "multi-scale" else None
    )
    result = go(TiledPredictor(predictor, Tiling(size=64)) if kind == "tiles" else predictor, photos, profile=True)
    spent = seconds(result)
    assert all(spent[name] > 0 for name in ("read", "prepare", "network", "post-processing"))
    assert sum(spent[time.stage] for time in result.profile.in_turn) == pytest.approx(result.seconds)


def test_no_pictures_make_a_profile_too(slow, tmp_path):
    result = detect(slow, [], out=None, options=DetectOptions(score=0.3, batch=3, profile=True))
    assert {time.ms_per_picture for time in result.profile.in_turn[:-1]} == {0}


def test_a_run_of_no_length_divides_by_nothing():
    profile = profile_of(Stages(), seconds=0.0, pictures=0, threads=2, could_reduce=False)
    assert {time.share for time in profile.in_turn} == {0}


@pytest.mark.gpu
def test_the_clock_waits_for_a_gpu():
    device = torch.device("cuda")
    matrix = torch.rand(8192, 8192, device=device)
    waited, hurried = make_clock(device), Stages()
    for clock in (waited, hurried, waited, hurried):
        torch.cuda.synchronize()
        with clock("network"):
            matrix @ matrix
    assert waited.seconds("network") > 2 * hurried.seconds("network")
