"""Videos on the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal

import av
import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine.video_files import VideoReader


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
    code, stdout, _ = run("detect", video, "--weights", weights, "--precision", "fp32")
    assert code == 0
    assert "detections in 10 frames (2.0 s) at a score of 0.3 or better, fp32, " in stdout
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


def test_a_pattern_names_videos(run, video, weights):
    for name in ("b[1].mkv", "a.mkv", "a.jpg"):
        video.with_name(name).write_bytes(video.read_bytes())
    (video.parent / "folder.mkv").mkdir()
    document = run("detect", f"{video.parent}/[a-c]*.mkv", "--weights", weights, "--json").document()
    assert [told["name"] for told in document["videos"]] == ["a.mkv", "b[1].mkv", "clip.mkv"]
    document = run("detect", video.with_name("b[1].mkv"), "--weights", weights, "--json").document()
    assert [told["name"] for told in document["videos"]] == ["b[1].mkv"]
    code, _, stderr = run("detect", f"{video.parent}/*.mp4", "--weights", weights)
    assert code == 4
    assert "*.mp4' matches no videos" in stderr


def test_videos_beside_pictures_are_told_of(run, video, weights, tmp_path):
    folder = tmp_path / "mixed"
    for name in ("b.mkv", "a.mkv", "sub/c.mkv", ".hidden.mkv"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(video, folder / name)
    Image.new("RGB", (64, 64)).save(folder / "one.png")
    (folder / "notes.txt").touch()
    code, stdout, stderr = run("detect", folder, "--weights", weights, "--json")
    assert (code, len(json.loads(stdout)["pictures"])) == (0, 1)
    assert f"passed over 3 videos: of a folder only pictures are taken; name its videos: {folder / 'a.mkv'}" in stderr
    assert "passed over" not in run("detect", folder / "one.png", "--weights", weights).stderr


def test_a_folder_with_videos_alone_says_how_to_name_them(run, video, weights):
    code, _, stderr = run("detect", video.parent, "--weights", weights)
    assert code == 4
    assert "holds no pictures" in stderr
    assert f"name its videos: {video}, or {video.with_name('*.mkv')} for all" in stderr
    assert run("detect", video.with_name("*.mkv"), "--weights", weights).code == 0


def test_a_folder_that_is_called_like_a_video_is_a_folder(run, video, weights):
    folder = video.parent / "frames.mp4"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    assert run("detect", folder, "--weights", weights, "--json").document()["pictures"][0]["file_name"] == "0.png"


def test_a_video_that_cannot_be_read_does_not_keep_others_from_it(run, video, weights, tmp_path):
    bad, other = tmp_path / "bad.mp4", tmp_path / "other.mkv"
    bad.write_bytes(b"no video")
    other.write_bytes(video.read_bytes())
    code, stdout, stderr = run("detect", video, bad, other, "--weights", weights, "--out", tmp_path / "out", "--json")
    assert code == 8
    document = json.loads(stdout)
    assert [told["name"] for told in document["videos"]] == ["clip.mkv", "other.mkv"]
    assert [told["source"] for told in document["failed"]] == [str(bad)]
    assert "bad.mp4 is not a video that can be read" in stderr
    assert "1 of 3 videos could not be read" in stderr
    assert (tmp_path / "out" / "other.mkv" / "detections.json").is_file()
    assert run("detect", bad, "--weights", weights).code == 4


def test_sigterm_stops_a_video_with_what_was_found(run, video, weights, tmp_path, monkeypatch):
    real = VideoReader.frames

    def frames(self):
        for frame in real(self):
            if frame.number == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield frame

    monkeypatch.setattr(VideoReader, "frames", frames)
    assert run("detect", video, "--weights", weights, "--batch", "2", "--out", tmp_path / "out").code == 130
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert written["info"]["complete"] is False
    assert len(written["images"]) == 6


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
