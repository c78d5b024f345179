"""Videos on the command line."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random):
    config = tiny(Classes(names=("person", "cat"), category_ids=(1, 17))).detector
    return save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "clip.mkv"
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=5)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv444p"
        for _ in range(10):
            pixels = generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_video_goes_into_the_folder(run, video, weights, tmp_path):
    code, stdout, stderr = run("detect", video, "--weights", weights, "--out", tmp_path / "out", "--json")
    assert code == 0
    document = json.loads(stdout)
    (told,) = document["videos"]
    assert (told["name"], told["frames"], told["width"], told["height"]) == ("clip.mkv", 10, 64, 48)
    assert told["objects"] == document["objects"] > 0
    assert "without sound" in stderr
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(written["annotations"]) == told["objects"]
    assert (tmp_path / "out" / "annotated" / "clip.mkv.mp4").is_file()


def test_it_is_told_in_a_table(run, video, weights):
    code, stdout, _ = run("detect", video, "--weights", weights)
    assert code == 0
    assert "detections in 10 frames (2.0 s) at a score of 0.3 or better" in stdout
    assert "clip.mkv" in stdout


def test_several_videos_have_folders_of_their_own(run, video, weights, tmp_path):
    other = tmp_path / "other.mkv"
    other.write_bytes(video.read_bytes())
    options = ("--weights", weights, "--out", tmp_path / "out", "--no-draw", "--tile", "32")
    code, _, stderr = run("detect", video, other, *options)
    assert code == 0
    assert "tiles of 32 px" in stderr
    found = [(tmp_path / "out" / name / "frames.jsonl").read_text() for name in ("clip.mkv", "other.mkv")]
    assert found[0] == found[1]


def test_a_damaged_video_is_partly_done(run, video, weights):
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    code, stdout, stderr = run("detect", video, "--weights", weights)
    assert code == 8
    assert "is cut off or damaged" in stderr
    assert stderr.count("cut off") == 1
    assert "frames" in stdout


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("picture.jpg",), "run of their own"),
        (("--class", "cat"), "--class is for pictures"),
        (("--profile",), "--profile is for pictures"),
        (("--tile-overlap", "0.3"), "--tile-overlap"),
    ],
)
def test_what_does_not_go_with_videos_is_a_usage_error(run, video, weights, more, said):
    finished = run("detect", video, *more, "--weights", weights)
    assert finished.code == 2
    assert said in finished.stderr
