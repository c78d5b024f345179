"""Many pictures: names, failures, interrupts, memory."""

from __future__ import annotations

import json
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.images import FoundImage, read_image
from refinedet_cli.data.listing import find_images, list_images
from refinedet_cli.engine import detect_reading as reading
from refinedet_cli.engine.detect import DetectOptions, DetectResult, detect
from refinedet_cli.engine.detect_names import UniqueNames
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.results import PictureRecord
from refinedet_cli.errors import UsageError
from refinedet_cli.zoo.checkpoint import load_detector


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, save_random) -> Predictor:
    """A seeded random detector that finds something in every picture."""
    config = tiny(Classes(names=("person", "Straßenbahn", "dog"), category_ids=(1, 17, 18))).detector
    path = save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config)
    return Predictor(load_detector(path), device=torch.device("cpu"), precision="fp32")


def save(path: Path, *, seed: int = 0, size: tuple[int, int] = (80, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven pictures in two levels."""
    names = ("a.jpg", "b.png", "c d.webp", "ü/a.jpg", "ü/Ωmega 日本.jpg", "z/e.bmp", "z/f.jpeg")
    for i, name in enumerate(names):
        save(tmp_path / "photos" / name, seed=i, size=(60 + 7 * i, 90 - 5 * i))
    return tmp_path / "photos"


def go(
    predictor: Predictor, images: list[FoundImage], out: Path | None = None, *, on_progress=lambda _: None, **options
) -> DetectResult:
    chosen = DetectOptions(**{"score": 0.6, "batch": 3, **options})
    return detect(predictor, images, out=out, options=chosen, on_progress=on_progress)


def found(picture: PictureRecord) -> Detections:
    boxes = torch.tensor([row.bbox for row in picture.rows]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = [(1, 17, 18).index(row.category_id) + 1 for row in picture.rows]
    return Detections(boxes, torch.tensor([row.score for row in picture.rows]), torch.tensor(labels))


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def document(out: Path) -> dict:
    return json.loads((out / "detections.json").read_text())


# --- what is found and written


def test_results_and_annotated_copies(predictor, photos, tmp_path):
    out = tmp_path / "new" / "deep"
    images = find_images([str(photos)])
    result = go(predictor, images, out)

    names = [image.name for image in images]
    written = document(out)
    assert [i["file_name"] for i in written["images"]] == names
    assert [i["id"] for i in written["images"]] == list(range(1, 8))
    assert len(written["annotations"]) == result.objects > 7
    assert {a["category_id"] for a in written["annotations"]} <= {1, 17, 18}
    assert min(a["score"] for a in written["annotations"]) >= 0.6
    assert written["info"]["complete"] is True
    assert written["info"]["failures"] == []

    kept = {"a.jpg", "b.png", "z/f.jpeg", "ü/a.jpg", "ü/Ωmega 日本.jpg", "c d.webp.jpg", "z/e.bmp.jpg"}
    assert files_in(out) == {"detections.json", "detections.jsonl"} | {f"annotated/{name}" for name in kept}
    for picture, entry in zip(result.pictures, written["images"], strict=True):
        with Image.open(picture.annotated) as drawn, Image.open(picture.path) as source:
            assert drawn.size == source.size == (entry["width"], entry["height"])
            assert drawn.format == ("PNG" if picture.path.suffix == ".png" else "JPEG")
        assert (read_image(picture.annotated) != read_image(picture.path)).any()
    assert not result.summary.problems
    assert result.seconds > 0
    assert result.pictures_per_second == pytest.approx(7 / result.seconds)
    assert sum(count.objects for count in result.counts) == result.objects


def test_nothing_depends_on_batch_and_readers(predictor, photos, tmp_path, assert_same):
    images = find_images([str(photos)])
    results = [
        go(predictor, images, tmp_path / f"out{i}", batch=batch, readers=readers, draw=False)
        for i, (batch, readers) in enumerate([(1, 1), (3, 2), (50, 4)])
    ]
    for i, other in enumerate(results[1:], start=1):
        assert document(tmp_path / f"out{i}")["images"] == document(tmp_path / "out0")["images"]
        for a, b in zip(results[0].pictures, other.pictures, strict=True):
            assert a.path == b.path
            assert_same(found(a), found(b))


def test_nothing_depends_on_the_order_of_files(predictor, photos, assert_same):
    images = find_images([str(photos)])
    forward, backward = go(predictor, images), go(predictor, images[::-1])
    assert [p.path for p in backward.pictures] == [p.path for p in forward.pictures][::-1]
    for a, b in zip(forward.pictures, backward.pictures[::-1], strict=True):
        assert_same(found(a), found(b))


def test_two_runs_write_the_same_bytes(predictor, photos, tmp_path):
    images = find_images([str(photos)])
    for out in ("one", "two"):
        go(predictor, images, tmp_path / out)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    for name in files_in(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_the_score_decides_what_is_kept(predictor, photos):
    images = find_images([str(photos)])
    low, high = go(predictor, images, score=0.5), go(predictor, images, score=0.7)
    assert 0 < high.objects < low.objects
    assert min(row.score for p in high.pictures for row in p.rows) >= 0.7
    assert go(predictor, images, score=1.0).objects == 0


def test_without_out_nothing_is_written(predictor, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    result = go(predictor, find_images([str(photos)]))
    assert files_in(tmp_path) == before
    assert result.files == ()
    assert all(picture.annotated is None for picture in result.pictures)
    assert result.objects > 0


def test_without_drawing_only_the_document_is_written(predictor, photos, tmp_path):
    go(predictor, find_images([str(photos)]), tmp_path / "out", draw=False)
    assert files_in(tmp_path / "out") == {"detections.json", "detections.jsonl"}


def test_no_pictures_at_all(predictor, tmp_path):
    result = go(predictor, [], tmp_path / "out")
    assert (result.pictures, result.summary.problems, result.objects) == ([], [], 0)
    assert document(tmp_path / "out")["images"] == []


def test_progress_counts_every_picture(predictor, photos):
    (photos / "broken.jpg").write_text("no picture")
    reports = []
    go(predictor, find_images([str(photos)]), on_progress=reports.append)
    assert [r.done for r in reports] == list(range(1, 9))
    assert {r.total for r in reports} == {8}
    assert [r.objects for r in reports] == sorted(r.objects for r in reports)
    assert reports[-1].failed == 1
    assert "broken.jpg" in {r.name for r in reports}


def test_pictures_too_long_for_jpeg_become_png(predictor, tmp_path):
    Image.new("RGB", (65_501, 2), "white").save(tmp_path / "scroll.bmp")
    result = go(predictor, find_images([str(tmp_path / "scroll.bmp")]), tmp_path / "out")
    with Image.open(result.pictures[0].annotated) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (65_501, 2))


# --- bad files


def spoil(photos: Path) -> dict[str, str]:
    """Add bad files of several kinds: name to a word of the reason."""
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.png").write_text("<html>404</html>")
    (photos / "lfs.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    whole = save(photos / "whole.jpg", size=(200, 200)).read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "whole.jpg").unlink()
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    return {"empty.jpg": "empty", "text.png": "not a picture", "lfs.jpg": "LFS", "cut.jpg": "damaged", "gone.png": ""}


@pytest.mark.parametrize("batch", [1, 4])
def test_bad_files_are_recorded_and_the_rest_goes_on(predictor, photos, tmp_path, batch):
    alone = go(predictor, find_images([str(photos)]))
    bad = spoil(photos)
    images = find_images([str(photos)])
    result = go(predictor, images, tmp_path / "out", batch=batch)

    assert {f.file_name for f in result.summary.problems} == set(bad)
    for failure in result.summary.problems:
        assert bad[failure.file_name] in failure.problem
        assert str(photos) not in failure.problem.split(";")[0]
        assert failure.path == photos / failure.file_name
    assert [p.path for p in result.pictures] == [p.path for p in alone.pictures]
    assert result.objects == alone.objects
    written = document(tmp_path / "out")
    assert {f["file_name"] for f in written["info"]["failures"]} == set(bad)
    # An id is the place in the list, so that mending a file does not change the others'.
    assert [i["id"] for i in written["images"]] == [
        i for i, image in enumerate(images, start=1) if image.name not in bad
    ]


def test_only_bad_files(predictor, tmp_path):
    (tmp_path / "photos").mkdir()
    bad = spoil(tmp_path / "photos")
    result = go(predictor, find_images([str(tmp_path / "photos")]), tmp_path / "out")
    assert result.pictures == []
    assert result.summary.failed == len(result.summary.problems) == len(bad)
    assert document(tmp_path / "out")["images"] == []


def test_a_folder_that_could_not_be_searched_is_a_failure(predictor, photos, tmp_path):
    (photos / "lost+found").mkdir()
    images = [*find_images([str(photos)]), FoundImage(photos / "lost+found", "lost+found")]
    result = go(predictor, images, tmp_path / "out")
    (failure,) = result.summary.problems
    assert (failure.file_name, failure.problem) == (
        "lost+found",
        "is a folder that cannot be read; change its permissions",
    )
    assert result.summary.read == 7


def test_a_bug_in_reading_is_not_taken_for_a_bad_file(predictor, photos, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(reading, "read_reduced", broken)
    with pytest.raises(ZeroDivisionError):
        go(predictor, find_images([str(photos)]))
    monkeypatch.setattr(reading, "read_image", broken)
    with pytest.raises(ZeroDivisionError):
        go(predictor, find_images([str(photos)]), tmp_path / "out")


def test_a_copy_that_cannot_be_written_is_a_failure_and_the_result_stays(predictor, photos, tmp_path):
    out = tmp_path / "out"
    (out / "annotated" / "b.png").mkdir(parents=True)
    result = go(predictor, find_images([str(photos)]), out)
    assert [f.file_name for f in result.summary.problems] == ["b.png"]
    by_name = {p.file_name: p for p in result.pictures}
    assert by_name["b.png"].annotated is None
    assert by_name["b.png"].rows
    assert len(document(out)["images"]) == 7
    assert by_name["z/f.jpeg"].annotated.is_file()


# --- names


def copies(*names: str) -> list[str]:
    with UniqueNames() as unique:
        return [f"out/{unique.annotated(name)}" for name in names]


def test_copies_keep_folders_and_the_names_of_jpeg_and_png():
    assert copies("a.jpg", "b/c.JPEG", "b/d.PNG", "e f/g.webp", "noext") == [
        "out/a.jpg",
        "out/b/c.JPEG",
        "out/b/d.PNG",
        "out/e f/g.webp.jpg",
        "out/noext.jpg",
    ]


def test_copies_never_share_a_name():
    assert copies("a.webp", "a.webp.jpg", "A.WEBP.jpg") == [
        "out/a.webp.jpg",
        "out/a.webp-2.jpg",
        "out/A.WEBP-3.jpg",
    ]
    composed, decomposed = "\u00fc.jpg", "u\u0308.jpg"
    first, second = copies(composed, decomposed)
    assert first == f"out/{composed}"
    assert second == "out/u\u0308-2.jpg"


def test_copies_never_leave_the_folder():
    assert copies("../../etc/a.jpg", "/abs/b.jpg") == ["out/etc/a.jpg", "out/abs/b.jpg"]


def test_names_too_long_are_cut_and_stay_apart():
    stem = "ü" * 123  # 246 bytes
    first, second = copies(f"{stem}a.webp", f"{stem}b.webp")
    assert first != second
    for path in (first, second):
        name = path.removeprefix("out/")
        assert len(name.encode()) <= 255
        assert name.startswith("üüü")
        assert name.endswith(".webp.jpg")
    assert copies("x" * 300 + "/a.jpg")[0].endswith("/a.jpg")


@pytest.mark.skipif(sys.platform == "win32", reason="file names of this length need a setting there")
def test_a_name_as_long_as_the_disk_allows(predictor, tmp_path):
    path = save(tmp_path / ("n" * 250 + ".bmp"))
    result = go(predictor, find_images([str(path)]), tmp_path / "out")
    assert result.pictures[0].annotated.is_file()
    assert result.pictures[0].file_name == path.name


def test_the_same_name_in_two_folders(predictor, tmp_path):
    paths = [save(tmp_path / folder / "cat.jpg", seed=i) for i, folder in enumerate(("one", "two"))]
    result = go(predictor, find_images([str(path) for path in paths]), tmp_path / "out")
    assert len({p.file_name for p in result.pictures}) == 2
    assert len({p.annotated for p in result.pictures}) == 2
    assert len(files_in(tmp_path / "out" / "annotated")) == 2


# --- the output folder


def test_copies_of_an_earlier_run_are_left_out(predictor, photos):
    out = photos / "found"
    first = go(predictor, find_images([str(photos)]), out)
    assert len(find_images([str(photos)])) == 14
    with list_images([str(photos)], leave_out=[out / "annotated"]) as images:
        second = go(predictor, images, out)
        assert images.left_out == 7
    assert [(p.image_id, p.path) for p in second.pictures] == [(p.image_id, p.path) for p in first.pictures]
    assert len(files_in(out / "annotated")) == 7


def test_out_that_is_a_file_is_a_usage_error(predictor, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="file"):
            go(predictor, find_images([str(photos)]), out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_cannot_lead_a_copy_out_of_the_folder(predictor, photos, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / "annotated").mkdir(parents=True)
    elsewhere.mkdir()
    (out / "annotated" / "z").symlink_to(elsewhere)
    result = go(predictor, find_images([str(photos)]), out)
    assert files_in(elsewhere) == set()
    assert {f.file_name for f in result.summary.problems} == {"z/e.bmp", "z/f.jpeg"}
    assert "leads out" in result.summary.problems[0].problem


# --- stopping


def test_an_interrupt_writes_what_was_found_and_goes_on(predictor, photos, tmp_path):
    def interrupt(progress) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        go(predictor, find_images([str(photos)]), tmp_path / "out", batch=1, on_progress=interrupt)
    written = document(tmp_path / "out")
    assert written["info"]["complete"] is False
    assert [i["id"] for i in written["images"]] == [1, 2, 3, 4]
    assert len(files_in(tmp_path / "out" / "annotated")) == 4
    assert threading.active_count() == before


def test_an_interrupt_before_the_first_picture_leaves_old_results_alone(predictor, photos, tmp_path, monkeypatch):
    go(predictor, find_images([str(photos)]), tmp_path / "out")
    before = (tmp_path / "out" / "detections.json").read_bytes()

    def interrupt(images: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor, "predict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(predictor, find_images([str(photos)]), tmp_path / "out")
    assert (tmp_path / "out" / "detections.json").read_bytes() == before


def test_an_error_midway_writes_what_was_found_too(predictor, photos, tmp_path, monkeypatch):
    whole, calls = predictor.predict, []

    def fail_later(images: list[np.ndarray]) -> list:
        calls.append(len(images))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(images)

    monkeypatch.setattr(predictor, "predict", fail_later)
    with pytest.raises(torch.OutOfMemoryError):
        go(predictor, find_images([str(photos)]), tmp_path / "out")
    assert len(document(tmp_path / "out")["images"]) == 3
    assert document(tmp_path / "out")["info"]["complete"] is False


# --- memory


def test_only_a_few_pictures_are_held_at_a_time(predictor, tmp_path, monkeypatch):
    for i in range(40):
        save(tmp_path / "photos" / f"{i:02}.png", seed=i, size=(40, 40))
    held = most = 0
    lock = threading.Lock()

    def leave() -> None:
        nonlocal held
        with lock:
            held -= 1

    def counted(path: Path) -> np.ndarray:
        nonlocal held, most
        pixels = read_image(path)
        with lock:
            held += 1
            most = max(most, held)
        weakref.finalize(pixels, leave)
        return pixels

    monkeypatch.setattr(reading, "read_image", counted)
    # Room for five pictures of 40 x 40: ahead of the network, in its batch and behind it.
    monkeypatch.setattr(reading, "HELD_BYTES", 5 * 40 * 40 * 3)
    result = go(predictor, find_images([str(tmp_path / "photos")]), tmp_path / "out", batch=32, readers=2)
    assert len(result.pictures) == 40
    assert most <= 20
