"""Videos that the tests encode themselves, looked at by a detector that finds every bright square."""

from __future__ import annotations

import builtins
import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine import video, video_files
from refinedet_cli.engine.results import read_results
from refinedet_cli.engine.video import detect_video
from refinedet_cli.engine.video_files import VIDEO_EXTENSIONS, VideoReader, VideoWriter, is_camera, is_video_name
from refinedet_cli.errors import DataError, UsageError

CLASSES = Classes(names=("square", "other"), category_ids=(7, 9))
SIZE = (48, 80)
RATE = 10


class Squares:
    """A detector that finds the bright part of each picture, if there is one, and is sure by 0.8."""

    config = tiny(CLASSES).detector
    classes = CLASSES
    provenance: dict = {}  # noqa: RUF012
    device = torch.device("cpu")
    precision = "fp32"
    engine = "none"
    schedule = None

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"weights")
        self.path = path
        self.batches: list[int] = []

    def predict(self, images):
        self.batches.append(len(images))
        return [self._look(image) for image in images]

    def _look(self, image) -> Detections:
        rows, columns = np.nonzero(image[:, :, 0] > 150)
        if not len(rows):
            return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return Detections(torch.tensor([box]).float(), torch.tensor([0.8]), torch.tensor([1]))


@pytest.fixture
def squares(tmp_path) -> Squares:
    return Squares(tmp_path / "weights.safetensors")


class Clip(NamedTuple):
    """A video and where its square is in each frame: left, top, right, bottom, or None."""

    path: Path
    boxes: list[tuple[int, int, int, int] | None]


def box_of(frame: int) -> tuple[int, int, int, int] | None:
    """Where the square is: it moves to the right and is gone in each fifth frame."""
    return None if frame % 5 == 4 else (4 + 2 * frame, 10, 20 + 2 * frame, 26)


def encode(path: Path, frames: int = 12, *, codec: str = "libx264", times: list[int] | None = None, **options) -> Clip:
    """Write a video, without loss where the codec can; ``times`` are in tenths of a second."""
    settings = {"libx264": {"qp": "0", "preset": "ultrafast", "g": "4"}, "ffv1": {"g": "1"}}.get(codec, {})
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=RATE, options=settings)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv444p" if codec != "mpeg4" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(frames):
            pixels = np.full((*SIZE, 3), 30, np.uint8)
            if (box := box_of(number)) is not None:
                pixels[box[1] : box[3], box[0] : box[2]] = 240
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Clip(path, [box_of(number) for number in range(frames)])


@pytest.fixture
def clip(tmp_path) -> Clip:
    return encode(tmp_path / "clip.mp4")


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]


def decode(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


# --- what is found


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "ffv1"), ("a.mov", "libx264"), ("a.avi", "mpeg4")]
)
def test_each_frame_is_looked_at(tmp_path, squares, name, codec):
    made = encode(tmp_path / name, codec=codec)
    result = detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert (result.frames, result.height, result.width) == (12, *SIZE)
    assert result.warning is None
    assert squares.batches == [5, 5, 2]
    assert result.duration == pytest.approx(1.2)
    lines = lines_of(tmp_path / "out")
    assert [line["frame"] for line in lines] == list(range(12))
    assert [line["time"] for line in lines] == pytest.approx([i / RATE for i in range(12)], abs=0.002)
    assert sum(len(line["detections"]) for line in lines) == result.objects == 10
    for line, box in zip(lines, made.boxes, strict=True):
        found = line["detections"]
        assert len(found) == (box is not None)
        if box is not None:
            near = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            assert found[0]["bbox"] == pytest.approx(near, abs=0 if codec != "mpeg4" else 2)
            assert (found[0]["class"], found[0]["category_id"], found[0]["score"]) == ("square", 7, 0.8)


def test_frames_become_a_coco_data_set(tmp_path, squares, clip):
    result = detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=8)
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [image["file_name"] for image in document["images"]][:2] == ["clip.mp4#000000", "clip.mp4#000001"]
    assert [image["id"] for image in document["images"]] == list(range(12))
    assert all((image["height"], image["width"]) == SIZE for image in document["images"])
    assert [a["image_id"] for a in document["annotations"]] == [i for i, b in enumerate(clip.boxes) if b]
    assert document["annotations"][0]["bbox"] == [4, 10, 16, 16]
    assert document["info"]["decoder"] == f"PyAV {av.__version__}"
    assert document["info"]["complete"] is True
    assert document["info"]["failures"] == []
    assert len(read_results(tmp_path / "out" / "detections.json")) == result.objects
    (count,) = result.counts
    assert (count.name, count.pictures, count.objects, count.best_score) == ("square", 10, 10, 0.8)


def test_weak_detections_are_left_out(tmp_path, squares, clip):
    assert detect_video(squares, str(clip.path), out=None, score=0.9, batch=8).objects == 0


def test_without_a_folder_nothing_is_written(tmp_path, squares, clip):
    before = sorted(tmp_path.iterdir())
    result = detect_video(squares, str(clip.path), out=None, score=0.3, batch=8)
    assert (result.objects, result.results_file, result.frames_file, result.annotated) == (10, None, None, None)
    assert sorted(tmp_path.iterdir()) == before


def test_progress_is_told_after_each_batch(squares, clip):
    seen = []
    detect_video(squares, str(clip.path), out=None, score=0.3, batch=5, on_progress=seen.append)
    assert [(p.frames, p.total, p.objects) for p in seen] == [(5, 12, 4), (10, 12, 8), (12, 12, 10)]


def test_large_frames_make_small_batches(squares, clip, monkeypatch):
    monkeypatch.setattr(video, "_HELD_BYTES", 2 * SIZE[0] * SIZE[1] * 3)
    detect_video(squares, str(clip.path), out=None, score=0.3, batch=8)
    assert squares.batches == [2] * 6


# --- the drawn video


def test_the_drawn_video_has_the_same_times_and_pictures(tmp_path, squares):
    # Times as those of a camera that drops frames.
    times = [0, 1, 2, 5, 6, 7, 8, 12, 13, 20, 21, 22]
    made = encode(tmp_path / "clip.mp4", times=times)
    result = detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert result.annotated == tmp_path / "out" / "annotated" / "clip.mp4"
    assert result.encoder == "libx264"
    drawn = decode(result.annotated)
    assert [time for time, _ in drawn] == pytest.approx([t / RATE for t in times])
    assert [line["time"] for line in lines_of(tmp_path / "out")] == [t / RATE for t in times]
    for (_, pixels), box in zip(drawn, made.boxes, strict=True):
        assert pixels.shape == (*SIZE, 3)
        inside = pixels[14:22, box[0] + 5 : box[2] - 5] if box else pixels
        assert (inside.mean() > 150) == (box is not None)


def test_other_formats_become_mp4(tmp_path, squares):
    made = encode(tmp_path / "clip.mkv", codec="ffv1")
    result = detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert result.annotated.name == "clip.mkv.mp4"
    assert len(decode(result.annotated)) == 12


def test_without_h264_it_is_mpeg4(tmp_path, squares, clip, monkeypatch):
    monkeypatch.setattr(video_files, "_ENCODERS", (("no-such-encoder", None), ("mpeg4", 65535)))
    result = detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    assert result.encoder == "mpeg4"
    assert [time for time, _ in decode(result.annotated)] == pytest.approx([i / RATE for i in range(12)], abs=0.001)


def test_without_any_encoder_it_is_said(tmp_path, squares, clip, monkeypatch):
    monkeypatch.setattr(video_files, "_ENCODERS", (("no-such-encoder", None),))
    with pytest.raises(UsageError, match="no-such-encoder"):
        detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_without_drawing_there_is_no_video(tmp_path, squares, clip):
    result = detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5, draw=False)
    assert (result.annotated, result.encoder) == (None, None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["detections.json", "frames.jsonl"]


def test_sides_that_are_odd_grow_by_a_pixel(tmp_path, squares, monkeypatch):
    monkeypatch.setitem(globals(), "SIZE", (47, 79))
    made = encode(tmp_path / "odd.mp4", frames=3)
    result = detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert (result.height, result.width) == (47, 79)
    assert decode(result.annotated)[0][1].shape == (48, 80, 3)


def test_the_original_is_not_overwritten(tmp_path, squares):
    folder = tmp_path / "out" / "annotated"
    folder.mkdir(parents=True)
    made = encode(folder / "clip.mp4")
    before = made.path.read_bytes()
    with pytest.raises(UsageError, match="would be replaced"):
        detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert made.path.read_bytes() == before


# --- how a video is to be shown


def turn(path: Path, matrix: tuple[int, ...]) -> None:
    """Write a turn into the header of an MP4: the nine numbers of its track, 16.16 and 2.30 fixed point."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    assert data[start : start + 4] == (1 << 16).to_bytes(4, "big")
    for i, (value, shift) in enumerate(zip(matrix, (16, 16, 30) * 3, strict=True)):
        data[start + 4 * i : start + 4 * i + 4] = (value << shift).to_bytes(4, "big", signed=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "turns"),
    [((0, 1, 0, -1, 0, 0, 0, 0, 1), -1), ((0, -1, 0, 1, 0, 0, 0, 0, 1), 1), ((-1, 0, 0, 0, -1, 0, 0, 0, 1), 2)],
)
def test_a_turned_recording_is_seen_upright(tmp_path, squares, matrix, turns):
    made = encode(tmp_path / "phone.mp4", frames=3)
    (_, stored), *_ = decode(made.path)
    turn(made.path, matrix)
    with VideoReader(str(made.path)) as reader:
        first = next(iter(reader.frames()))
    # Quarter turns anticlockwise, as np.rot90 counts them; the matrix of a phone held upright turns clockwise.
    np.testing.assert_array_equal(first.pixels, np.rot90(stored, turns))
    result = detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert (result.height, result.width) == np.rot90(stored, turns).shape[:2]
    assert decode(result.annotated)[0][1].shape == np.rot90(stored, turns).shape


# --- damage


def test_a_file_that_is_cut_off_gives_what_can_be_decoded(tmp_path, squares):
    made = encode(tmp_path / "clip.mkv", frames=40, codec="ffv1")
    data = made.path.read_bytes()
    made.path.write_bytes(data[: len(data) // 2])
    result = detect_video(squares, str(made.path), out=tmp_path / "out", score=0.3, batch=5)
    assert 10 < result.frames < 30
    assert result.warning.startswith(f"{made.path} is cut off or damaged: ")
    assert f" of 4.0 s could be decoded, {result.frames} frames" in result.warning
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [f["file_name"] for f in document["info"]["failures"]] == ["clip.mkv"]
    assert len(document["images"]) == len(lines_of(tmp_path / "out")) == result.frames
    assert len(decode(result.annotated)) == result.frames


def test_damage_in_the_middle_costs_no_more_than_it_must(tmp_path, squares):
    made = encode(tmp_path / "clip.mp4", frames=24, movflags="faststart")
    data = bytearray(made.path.read_bytes())
    start = data.index(b"mdat") + len(data) // 3
    data[start : start + 300] = bytes(300)
    made.path.write_bytes(data)
    result = detect_video(squares, str(made.path), out=None, score=0.3, batch=5)
    assert 12 < result.frames <= 24
    assert "is damaged in " in result.warning


def test_a_recording_without_its_end_cannot_be_read(tmp_path, squares, clip):
    # An MP4 has at its end what tells where its frames are.
    data = clip.path.read_bytes()
    clip.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"clip\.mp4 is not a video that can be read"):
        detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    assert not (tmp_path / "out").exists()


def test_a_video_of_which_no_frame_can_be_decoded_is_an_error(tmp_path, squares, clip, monkeypatch):
    monkeypatch.setattr(VideoReader, "frames", lambda self: iter(()))
    with pytest.raises(DataError, match=r"no frame of .*clip\.mp4 could be decoded"):
        detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "content", [b"", b"no video at all" * 40, b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1\nx.ts\n"]
)
def test_what_is_no_video_is_refused(tmp_path, squares, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"clip\.mp4"):
        detect_video(squares, str(path), out=None, score=0.3, batch=5)


def test_a_missing_file_is_named(tmp_path, squares):
    with pytest.raises(DataError, match=r"gone\.mp4 does not exist"):
        detect_video(squares, str(tmp_path / "gone.mp4"), out=None, score=0.3, batch=5)


def test_sound_alone_is_no_video(tmp_path, squares):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(DataError, match="holds no video"):
        detect_video(squares, str(path), out=None, score=0.3, batch=5)


def test_names_are_files_and_nothing_else(tmp_path, squares, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip.path.rename(tmp_path / "a:b%03d.mp4")
    assert detect_video(squares, "a:b%03d.mp4", out=None, score=0.3, batch=5).frames == 12


# --- stopping


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_found_before_a_stop_is_written(tmp_path, squares, clip, error):
    def stop(progress):
        if progress.frames == 10:
            raise error

    with pytest.raises(error):
        detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5, on_progress=stop)
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert document["info"]["complete"] is False
    assert len(document["images"]) == len(lines_of(tmp_path / "out")) == 10
    assert len(decode(tmp_path / "out" / "annotated" / "clip.mp4")) == 10


@pytest.mark.parametrize("fails", ["write", "__exit__"])
def test_a_drawn_video_that_cannot_be_written_costs_nothing_else(tmp_path, squares, clip, monkeypatch, fails):
    def full(self, *_):
        raise DataError("the disk is full")

    monkeypatch.setattr(VideoWriter, fails, full)
    with pytest.raises(DataError, match="the disk is full"):
        detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert document["info"]["complete"] is False
    assert len(document["images"]) == len(lines_of(tmp_path / "out")) >= 5
    assert not list((tmp_path / "out" / "annotated").iterdir())


def test_a_video_without_a_decoder_is_told(squares, clip, monkeypatch):
    real = video_files._pyav().open

    def undecodable(*given, **more):
        with real(*given, **more) as container:
            stream = SimpleNamespace(codec_context=None)
            return SimpleNamespace(streams=SimpleNamespace(video=[stream]), close=container.close)

    monkeypatch.setattr(video_files, "_pyav", lambda: SimpleNamespace(open=undecodable, FFmpegError=av.FFmpegError))
    with pytest.raises(DataError, match="has no decoder for its pictures"):
        VideoReader(str(clip.path))


def test_a_stop_before_the_first_frame_leaves_nothing(tmp_path, squares, clip, monkeypatch):
    def stop(images):
        raise KeyboardInterrupt

    monkeypatch.setattr(squares, "predict", stop)
    with pytest.raises(KeyboardInterrupt):
        detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# --- cameras


@pytest.mark.parametrize(
    ("system", "source", "opened"),
    [
        ("linux", "camera:2", ("/dev/video2", "v4l2")),
        ("darwin", "camera:0", ("0", "avfoundation")),
        ("win32", "camera:Integrated Camera", ("video=Integrated Camera", "dshow")),
    ],
)
def test_a_camera_is_a_video_without_end(tmp_path, squares, clip, monkeypatch, system, source, opened):
    asked = []
    really_open = av.open

    def open_camera(name, *args, **options):
        if "format" not in options or "w" in args:
            return really_open(name, *args, **options)
        asked.append((name, options["format"]))
        return really_open(str(clip.path))

    monkeypatch.setattr(video_files, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(av, "open", open_camera)

    def stop(progress):
        if progress.frames == 10:
            raise KeyboardInterrupt

    result = detect_video(squares, source, out=tmp_path / "out", score=0.3, batch=5, on_progress=stop)
    assert asked == [opened]
    assert (result.frames, result.warning) == (10, None)
    assert result.annotated.name == f"{source.replace(':', '-')}.mp4"
    document = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert document["info"]["complete"] is True
    assert document["images"][3]["file_name"] == f"{source.replace(':', '-')}#000003"


@pytest.mark.parametrize(
    ("system", "source"), [("linux", "camera:front"), ("win32", "camera:0"), ("darwin", "camera:")]
)
def test_cameras_must_be_named_as_the_system_does(squares, monkeypatch, system, source):
    monkeypatch.setattr(video_files, "sys", SimpleNamespace(platform=system))
    with pytest.raises(UsageError, match="names no camera"):
        detect_video(squares, source, out=None, score=0.3, batch=5)


def test_a_camera_that_is_not_there_is_an_error_of_the_data(squares, monkeypatch):
    monkeypatch.setattr(video_files, "sys", SimpleNamespace(platform="linux"))
    with pytest.raises(DataError, match="camera:97 cannot be opened"):
        detect_video(squares, "camera:97", out=None, score=0.3, batch=5)


# --- names and the package


def test_videos_are_known_by_their_extension():
    assert is_video_name("a.MP4")
    assert is_video_name("b.c.webm")
    assert not is_video_name(".mp4")
    assert not is_video_name(".hidden.mp4")
    assert not is_video_name("a.jpg")
    assert not is_video_name("module.ts")
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in VIDEO_EXTENSIONS)
    assert is_camera("camera:0")
    assert not is_camera("camera.mp4")


def test_without_pyav_the_cure_is_told(squares, clip, monkeypatch):
    really_import = builtins.__import__

    def no_av(name, *args, **options):
        if name == "av":
            raise ImportError(name)
        return really_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_av)
    with pytest.raises(UsageError, match="PyAV") as caught:
        detect_video(squares, str(clip.path), out=None, score=0.3, batch=5)
    assert caught.value.hint == 'pip install "refinedet[video]"'


def test_frames_of_other_sizes_fit_into_the_drawn_video(tmp_path, squares, clip, monkeypatch):
    really = VideoReader.frames

    def growing(self):
        for frame in really(self):
            larger = np.repeat(frame.pixels, 2, axis=0)
            yield frame if frame.number < 6 else replace_pixels(frame, larger)

    def replace_pixels(frame, pixels):
        return frame._replace(pixels=pixels)

    monkeypatch.setattr(VideoReader, "frames", growing)
    result = detect_video(squares, str(clip.path), out=tmp_path / "out", score=0.3, batch=5)
    assert {(line["height"], line["width"]) for line in lines_of(tmp_path / "out")} == {SIZE, (2 * SIZE[0], SIZE[1])}
    assert {pixels.shape for _, pixels in decode(result.annotated)} == {(*SIZE, 3)}
