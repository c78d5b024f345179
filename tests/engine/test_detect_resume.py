"""Runs that are stopped, go on, and are shared: nothing lost, nothing done twice, the same bytes at the end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.listing import find_images
from refinedet_cli.engine import detect_copies, detect_reading, detect_shards, detect_store
from refinedet_cli.engine.detect import DetectOptions, DetectResult, detect
from refinedet_cli.engine.distributed import Shard
from refinedet_cli.errors import DataError, PartialError, UsageError
from refinedet_cli.files import cannot_write

CLASSES = Classes(names=("person", "cat"), category_ids=(1, 17))


class Fake:
    """Finds one box in a picture, or none in a dark one; its score tells which pictures were computed together."""

    device = torch.device("cpu")
    precision = "fp32"
    engine = "fake 1"
    schedule = None
    input_size = (64, 64)

    def __init__(self, path: Path) -> None:
        path.write_bytes(b"weights")
        self.path = path
        self.config = tiny(CLASSES).detector
        self.classes = CLASSES
        self.provenance: dict = {}
        self.seen = 0

    def predict(self, images) -> list[Detections]:
        self.seen += len(images)
        together = float(np.mean([image.mean() for image in images])) / 255
        return [self._one(image, together) for image in images]

    def _one(self, image: np.ndarray, together: float) -> Detections:
        height, width = image.shape[:2]
        n = int(image.mean() > 60)
        box = torch.tensor([[1.0, 2.0, width / 2, height - 1.5]])[:n]
        return Detections(box, torch.tensor([0.4 + together / 2])[:n], torch.tensor([1 + int(image.mean()) % 2])[:n])


@pytest.fixture
def predictor(tmp_path) -> Fake:
    return Fake(tmp_path / "w.safetensors")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Seven pictures, one dark and one damaged."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    folder = tmp_path / "photos"
    (folder / "s").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "c.jpg", "e.png", "s/a.png", "s/f.png")):
        draw = np.random.default_rng(i)
        pixels = draw.integers(0, 40 if i == 1 else 256, (12 + i, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "d.jpg").write_text("no picture")
    return folder


def go(predictor: Fake, photos: Path, out: Path | None, *, on_progress=lambda _: None, **options) -> DetectResult:
    chosen = DetectOptions(**{"score": 0.3, "batch": 3, "draw": False, "readers": 1, **options})
    return detect(predictor, find_images([str(photos)]), out=out, options=chosen, on_progress=on_progress)


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def lines(out: Path, name: str = "detections.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


# --- the journal


def test_the_journal_says_what_the_run_is_and_a_line_for_each_picture(predictor, photos, tmp_path):
    go(predictor, photos, tmp_path / "out", draw=True, crops=True)
    head, *records, end = lines(tmp_path / "out")
    assert (head["format"], head["format_version"]) == ("refinedet detections", 1)
    assert (head["origin"]["weights"], head["origin"]["score_threshold"]) == ("w.safetensors", 0.3)
    assert head["options"] == {"annotated": True, "crops": True}
    assert head["sources"]["pictures"] == 7
    assert head["outputs"] == ["annotated", "coco", "crops"]
    assert end == {"finished": True}
    assert [record["id"] for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["file_name"] for record in records] == [i.name for i in find_images([str(photos)])]
    first, dark, _, bad = records[:4]
    assert first["annotated"] == "annotated/a.png"
    (found,) = first["detections"]
    assert found.keys() == {"class", "category_id", "bbox", "score"}
    assert first["crops"] == [f"crops/{found['class']}/a_1.jpg"]
    assert dark["detections"] == []
    assert bad.keys() == {"id", "file_name", "path", "problem"}
    assert "not a picture" in bad["problem"]


def test_each_picture_is_on_disk_before_the_next_group_is_worked_on(predictor, photos, tmp_path):
    seen = []

    def look(progress) -> None:
        path = tmp_path / "out" / "detections.jsonl"
        seen.append(len(path.read_text().splitlines()) - 1 if path.exists() else 0)

    go(predictor, photos, tmp_path / "out", batch=1, on_progress=look)
    assert seen == [1, 2, 3, 4, 5, 6, 7]


# --- going on


def test_a_journal_cut_at_any_byte_is_completed_to_the_same_bytes(predictor, photos, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for name in ("s/a.png", "s/f.png", "e.png"):
        (photos / name).unlink()
    go(predictor, photos, whole, batch=2)
    expected, journal = files(whole), (whole / "detections.jsonl").read_bytes()
    head = journal.index(b"\n")
    for length in [*range(0, head, 61), *range(head, len(journal) + 1)]:
        shutil.rmtree(cut, ignore_errors=True)
        cut.mkdir()
        (cut / "detections.jsonl").write_bytes(journal[:length])
        go(predictor, photos, cut, batch=2, resume=True)
        assert files(cut) == expected, length


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_a_run_that_was_interrupted_anywhere_ends_the_same(predictor, photos, tmp_path, stop):
    options = {"draw": True, "crops": True, "formats": frozenset({"yolo", "csv", "results"})}
    go(predictor, photos, tmp_path / "whole", **options)

    def interrupt(progress) -> None:
        if progress.done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(predictor, photos, tmp_path / "out", on_progress=interrupt, **options)
    partial = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert partial["info"]["complete"] is False
    reports = []
    result = go(predictor, photos, tmp_path / "out", resume=True, on_progress=reports.append, **options)
    # The fourth cannot be read, and is tried again.
    done = stop - (stop >= 4)
    assert (result.resumed, result.worked) == (done, 7 - done)
    assert [report.done for report in reports] == list(range(done + 1, 8))
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert result.summary.count == 7


def test_large_pictures_make_the_same_groups_when_a_run_goes_on(predictor, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_reading, "HELD_BYTES", 2 * 13 * 16 * 3)
    go(predictor, photos, tmp_path / "whole", batch=7)
    journal = (tmp_path / "whole" / "detections.jsonl").read_bytes()
    (tmp_path / "out").mkdir()
    for count in range(1, 8):
        (tmp_path / "out" / "detections.jsonl").write_bytes(b"".join(journal.splitlines(keepends=True)[:count]))
        go(predictor, photos, tmp_path / "out", batch=7, resume=True)
        assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_resume_where_there_is_nothing_begins(predictor, photos, tmp_path):
    go(predictor, photos, tmp_path / "one")
    go(predictor, photos, tmp_path / "two", resume=True)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_finished_run_is_not_computed_again_and_can_be_written_in_other_formats(predictor, photos, tmp_path):
    (photos / "d.jpg").unlink()
    go(predictor, photos, tmp_path / "both", formats=frozenset({"csv"}))
    go(predictor, photos, tmp_path / "later")
    before = predictor.seen
    result = go(predictor, photos, tmp_path / "later", formats=frozenset({"csv"}), resume=True)
    assert predictor.seen == before
    assert (result.resumed, result.worked) == (6, 0)
    both, later = files(tmp_path / "both"), files(tmp_path / "later")
    assert both.pop("detections.jsonl") != later.pop("detections.jsonl")
    assert both == later
    # A new run knows that the table is its own, and may replace it.
    go(predictor, photos, tmp_path / "later", formats=frozenset({"csv"}))


def mend(photos) -> None:
    shutil.copy(photos / "c.jpg", photos / "d.jpg")


@pytest.mark.parametrize("finished", [True, False])
def test_a_picture_that_failed_is_tried_again(predictor, photos, tmp_path, finished):
    # One at a time, for those computed together with a picture that could not be read were computed without it.
    out, options = tmp_path / "out", {"draw": True, "crops": True, "formats": frozenset({"yolo"}), "batch": 1}
    if finished:
        assert go(predictor, photos, out, **options).summary.failed == 1
    else:
        interrupted(predictor, photos, out, **options)
    mend(photos)
    result = go(predictor, photos, out, resume=True, **options)
    assert (result.summary.count, result.summary.read, result.summary.failed) == (7, 7, 0)
    assert result.worked == (1 if finished else 4)
    go(predictor, photos, tmp_path / "whole", **options)
    assert files(out) == files(tmp_path / "whole")
    assert json.loads((out / "detections.json").read_text())["info"]["failures"] == []


def test_a_finished_run_that_tries_again_is_unfinished_until_it_ends(predictor, photos, tmp_path):
    out = tmp_path / "out"
    go(predictor, photos, out, batch=1)
    mend(photos)

    def interrupt(progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(predictor, photos, out, batch=1, resume=True, on_progress=interrupt)
    # The new line stands behind that of the end.
    assert [line.get("id") for line in lines(out)[-2:]] == [None, 4]
    with pytest.raises(UsageError, match="not finished: 7 of 7"):
        go(predictor, photos, out)
    assert go(predictor, photos, out, batch=1, resume=True).worked == 0
    go(predictor, photos, tmp_path / "whole", batch=1)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("options", [{"draw": True}, {"crops": True}])
def test_a_disk_that_takes_no_more_ends_the_run_which_goes_on_later(
    predictor, photos, tmp_path, monkeypatch, number, options
):
    out, calls = tmp_path / "out", []

    def write(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 2:
            error = OSError(number, os.strerror(number))
            raise cannot_write(path, error) from error
        write_whole(path, content)

    monkeypatch.setattr(detect_copies, "write_whole", write)
    with pytest.raises(DataError, match=os.strerror(number)) as caught:
        go(predictor, photos, out, **options)
    assert "--resume" in caught.value.hint
    assert str(calls[1]) in caught.value.message
    assert not [line for line in lines(out) if "problem" in line and "cannot write" in line["problem"]]
    assert json.loads((out / "detections.json").read_text())["info"]["complete"] is False
    go(predictor, photos, out, resume=True, **options)
    go(predictor, photos, tmp_path / "whole", **options)
    assert files(out) == files(tmp_path / "whole")


def test_a_journal_that_a_full_disk_cuts_holds_no_half_line(predictor, photos, tmp_path, monkeypatch):
    out, real = tmp_path / "out", Path.open

    class Full(FileIO):
        def write(self, data) -> int:
            # The third line is cut; behind it there is room again.
            self.lines = getattr(self, "lines", 0) + 1
            return super().write(data[:9] if self.lines == 3 else data)

    def open_full(path: Path, mode: str = "r", *args, **kwargs):
        return Full(path, "r+") if mode == "r+b" else real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DataError, match="No space left"):
        go(predictor, photos, out, draw=True)
    monkeypatch.undo()
    # What was under way is recorded behind the line that is lacking.
    assert [line["id"] for line in lines(out)[1:]][:2] == [1, 2]
    go(predictor, photos, out, draw=True, resume=True)
    go(predictor, photos, tmp_path / "whole", draw=True)
    assert files(out) == files(tmp_path / "whole")


def interrupted(predictor, photos, out, **options) -> None:
    def interrupt(progress) -> None:
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(predictor, photos, out, on_progress=interrupt, **options)


def test_an_unfinished_run_is_not_overwritten(predictor, photos, tmp_path):
    interrupted(predictor, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="not finished: 3 of 7 pictures are done") as caught:
        go(predictor, photos, tmp_path / "out")
    assert "--resume" in caught.value.hint
    assert files(tmp_path / "out") == before


def change(what: str, predictor: Fake, photos: Path) -> dict:
    """Change something and give the options that go with it."""
    if what == "weights":
        predictor.path.write_bytes(b"others")
    elif what == "engine":
        predictor.engine = "fake 2"
    elif what == "detector":
        predictor.config = replace(
            predictor.config,
            postprocess=replace(predictor.config.postprocess, keep=predictor.config.postprocess.keep - 1),
        )
    elif what == "reading":
        predictor.input_size = None
    elif what == "one more":
        shutil.copy(photos / "a.png", photos / "z.png")
    elif what == "renamed":
        (photos / "a.png").rename(photos / "aa.png")
    return {
        "score": {"score": 0.5},
        "draw": {"draw": True},
        "crops": {"crops": True},
        "class": {"only_classes": ("cat",)},
    }.get(what, {})


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("weights", r"--weights w\.safetensors \(9e1d1ee1\) then, w\.safetensors \(\w{8}\) now"),
        ("engine", "engine fake 1 then, fake 2 now"),
        ("detector", "set up in another way"),
        ("one more", "number of pictures 7 then, 8 now"),
        ("renamed", "other pictures, as many as then"),
        # That the detector keeps what --score asks for goes without saying too.
        ("score", r"settings: --score 0\.3 then, 0\.5 now$"),
        # That JPEGs are then read in full goes without saying.
        ("draw", "settings: drawing off then, on now$"),
        ("crops", "settings: --crops off then, on now$"),
        ("reading", "pictures are read by Pillow .*, large JPEGs reduced then, Pillow .*, full size now"),
        ("class", "--class none then, cat now"),
    ],
)
def test_another_run_is_not_gone_on_with_and_the_difference_is_told(predictor, photos, tmp_path, what, told):
    interrupted(predictor, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    options = change(what, predictor, photos)
    told = told.replace("9e1d1ee1", hashlib.sha256(b"weights").hexdigest()[:8])
    with pytest.raises(UsageError, match=told):
        go(predictor, photos, tmp_path / "out", resume=True, **options)
    assert files(tmp_path / "out") == before


def test_another_batch_may_go_on(predictor, photos, tmp_path):
    interrupted(predictor, photos, tmp_path / "out")
    result = go(predictor, photos, tmp_path / "out", resume=True, batch=2)
    assert result.summary.count == 7


@pytest.mark.parametrize("content", ["{}\n", '{"format": "other"}\n', "no JSON\n", "[1]\n"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_file_of_somebody_else_is_not_taken_for_a_journal(predictor, photos, tmp_path, content, resume):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.jsonl").write_text(content)
    with pytest.raises(DataError, match="was not written by refinedet detect"):
        go(predictor, photos, tmp_path / "out", resume=resume)
    assert (tmp_path / "out" / "detections.jsonl").read_text() == content


# --- runs in the same folder


def test_a_new_run_removes_what_the_finished_one_wrote_and_nothing_else(predictor, photos, tmp_path):
    out = tmp_path / "out"
    everything = {"draw": True, "crops": True, "formats": frozenset({"yolo", "csv", "results"})}
    go(predictor, photos, out, **everything)
    (out / "annotated" / "mine.png").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    (photos / "a.png").rename(photos / "other.png")
    result = go(predictor, photos, out)
    # Six copies, five crops, six files of labels.
    assert result.removed == 17
    assert set(files(out)) == {"annotated/mine.png", "notes.txt", "detections.json", "detections.jsonl"}
    assert not (out / "labels").exists()


@pytest.mark.parametrize(("name", "options"), [
    ("labels", {"formats": frozenset({"yolo"})}),
    ("classes.txt", {"formats": frozenset({"yolo"})}),
    ("results.json", {"formats": frozenset({"results"})}),
    ("detections.csv", {"formats": frozenset({"csv"})}),
    ("crops", {"crops": True}),
])  # fmt: skip
@pytest.mark.parametrize("resume", [True, False])
def test_a_users_own_files_are_not_overwritten(predictor, photos, tmp_path, name, options, resume):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"{name} is there already"):
        go(predictor, photos, out, resume=resume, **options)
    assert set(out.iterdir()) == {out / name}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["detections.json", "annotated/a.png", "annotated/c.jpg"])
def test_a_users_own_copies_and_document_are_not_overwritten(predictor, photos, tmp_path, name, resume):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(b"mine")
    with pytest.raises(UsageError, match=f"{name} is there already") as caught:
        go(predictor, photos, out, draw=True, resume=resume)
    assert caught.value.hint
    assert files(out) == {name: b"mine"}


def test_copies_are_drawn_beside_a_users_own(predictor, photos, tmp_path):
    out = tmp_path / "out"
    (out / "annotated").mkdir(parents=True)
    (out / "annotated" / "mine.png").write_bytes(b"mine")
    for _ in range(2):
        go(predictor, photos, out, draw=True)
    assert files(out)["annotated/mine.png"] == b"mine"
    # A picture of that name comes later.
    (photos / "a.png").rename(photos / "mine.png")
    before = files(out)
    with pytest.raises(UsageError, match=r"mine\.png is there already"):
        go(predictor, photos, out, draw=True)
    assert files(out) == before


def test_copies_of_a_run_that_was_killed_before_its_first_line_are_its_own(predictor, photos, tmp_path):
    out = tmp_path / "out"
    go(predictor, photos, tmp_path / "whole", draw=True, crops=True)
    shutil.copytree(tmp_path / "whole", out)
    (out / "detections.jsonl").write_text((out / "detections.jsonl").read_text().splitlines()[0] + "\n")
    go(predictor, photos, out, draw=True, crops=True, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_a_journal_cannot_make_a_run_remove_files_elsewhere(predictor, photos, tmp_path):
    out = tmp_path / "out"
    go(predictor, photos, out, draw=True)
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    (out / "own.png").write_bytes(b"mine")
    text = (out / "detections.jsonl").read_text()
    text = text.replace('"annotated/a.png"', '"../mine.png"').replace('"annotated/b.png"', '"own.png"')
    (out / "detections.jsonl").write_text(text)
    go(predictor, photos, out)
    assert mine.exists()
    assert (out / "own.png").exists()


# --- processes that share the work


def shared(predictor, photos, out, ranks, count, **options) -> list[DetectResult]:
    return [go(predictor, photos, out, shard=Shard(rank, count), **options) for rank in ranks]


@pytest.mark.parametrize(("count", "batch"), [(2, 1), (3, 2), (4, 3), (2, 3)])
def test_several_processes_write_what_one_does(predictor, photos, tmp_path, count, batch):
    options = {"batch": batch, "draw": True, "crops": True, "formats": frozenset({"yolo"})}
    alone = go(predictor, photos, tmp_path / "one", **options)
    *others, first = shared(predictor, photos, tmp_path / "many", [*range(1, count), 0], count, **options)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert all(result.files == () for result in others)
    assert (first.counts, first.summary.count) == (alone.counts, 7)
    assert sum(result.worked for result in (*others, first)) == 7


def test_rank_0_waits_for_the_others(predictor, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_shards, "_POLL", 0.01)
    go(predictor, photos, tmp_path / "one", batch=1)
    first = threading.Thread(target=shared, args=(predictor, photos, tmp_path / "many", [0], 2), kwargs={"batch": 1})
    first.start()
    shared(predictor, photos, tmp_path / "many", [1], 2, batch=1)
    first.join()
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_lost_process_is_named_and_others_go_on_in_its_place(predictor, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_shards, "PATIENCE", 0.05)
    monkeypatch.setattr(detect_shards, "_POLL", 0.01)
    go(predictor, photos, tmp_path / "one", batch=1)
    with pytest.raises(PartialError, match="of 3 processes rank 1 lacks 2") as caught:
        shared(predictor, photos, tmp_path / "many", [2, 0], 3, batch=1)
    assert "--resume" in caught.value.hint
    again = shared(predictor, photos, tmp_path / "many", [1, 0], 2, batch=1, resume=True)
    # What rank 1 lacked, and the picture that cannot be read, once more.
    assert sum(result.worked for result in again) == 3
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_one_process_goes_on_for_several_and_several_for_one(predictor, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_shards, "PATIENCE", 0.05)
    monkeypatch.setattr(detect_shards, "_POLL", 0.01)
    out = tmp_path / "out"
    go(predictor, photos, tmp_path / "one", batch=2)
    interrupted(predictor, photos, out, batch=2)
    with pytest.raises(PartialError, match="rank 1 lacks 1"):
        shared(predictor, photos, out, [0], 2, batch=2, resume=True)
    result = go(predictor, photos, out, batch=2, resume=True)
    assert (result.resumed, result.worked) == (5, 2)
    assert files(out) == files(tmp_path / "one")


def test_processes_do_not_replace_a_run(predictor, photos, tmp_path):
    go(predictor, photos, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(UsageError, match="several processes cannot replace"):
        shared(predictor, photos, tmp_path / "out", [0], 2)
    with pytest.raises(UsageError, match="several processes cannot replace"):
        shared(predictor, photos, tmp_path / "out", [1], 2, score=0.5)
    assert files(tmp_path / "out") == before
    shared(predictor, photos, tmp_path / "half", [1], 2)
    with pytest.raises(UsageError, match="not finished"):
        shared(predictor, photos, tmp_path / "half", [1], 2)
    with pytest.raises(UsageError, match="not finished"):
        go(predictor, photos, tmp_path / "half")


def test_a_process_without_pictures_leaves_nothing_behind(predictor, photos, tmp_path):
    out = tmp_path / "out"
    go(predictor, photos, tmp_path / "one", batch=4)
    # Two blocks for three processes; the last comes before, and after, rank 0 has joined all.
    *_, early, _, _, late = shared(predictor, photos, out, [2, 1, 0, 2], 3, batch=4)
    assert (early.worked, late.worked, late.files) == (0, 0, ())
    assert files(out) == files(tmp_path / "one")
    go(predictor, photos, out, batch=4)


def test_a_process_that_comes_while_outputs_are_written_has_nothing_to_do(predictor, photos, tmp_path):
    out = tmp_path / "out"
    go(predictor, photos, out, draw=True)
    journal = (out / "detections.jsonl").read_text().splitlines(keepends=True)
    (out / "detections.jsonl").write_text("".join(journal[:-1]))
    (late,) = shared(predictor, photos, out, [1], 2, draw=True)
    assert late.worked == 0


def test_a_journal_without_pictures_that_a_process_left_is_in_nobodys_way(predictor, photos, tmp_path):
    out = tmp_path / "out"
    go(predictor, photos, out)
    (out / "detections-3.jsonl").write_text((out / "detections.jsonl").read_text().splitlines()[0] + "\n")
    go(predictor, photos, out, score=0.5)
    assert set(files(out)) == {"detections.json", "detections.jsonl"}


@pytest.mark.parametrize("ranks", [[0, 1], [1, 0]])
def test_several_processes_try_again_what_failed(predictor, photos, tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(detect_shards, "PATIENCE", 0.05)
    monkeypatch.setattr(detect_shards, "_POLL", 0.01)
    out = tmp_path / "out"
    # Of two processes, the second would have the picture that cannot be read, and has one that is lacking.
    with pytest.raises(PartialError, match="rank 2 lacks 2"):
        shared(predictor, photos, out, [1, 0], 3, batch=1)
    mend(photos)
    with contextlib.suppress(PartialError):
        shared(predictor, photos, out, ranks, 2, batch=1, resume=True)
    result = go(predictor, photos, out, batch=1, resume=True)
    go(predictor, photos, tmp_path / "one", batch=1)
    assert files(out) == files(tmp_path / "one")
    assert (result.summary.count, result.summary.failed) == (7, 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3"}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Shard(1, 4)),
    ],
)
def test_the_part_of_a_process_is_in_its_environment(environment, expected):
    assert Shard.from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)
def test_an_environment_that_makes_no_sense_is_told(environment):
    with pytest.raises(UsageError, match="RANK="):
        Shard.from_environment(environment)


# --- what is held


def test_only_the_first_pictures_and_failures_are_listed(predictor, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_store, "LISTED", 2)
    (photos / "empty.jpg").touch()
    (photos / "zero.jpg").touch()
    for out in (tmp_path / "out", None):
        summary = go(predictor, photos, out).summary
        assert [p.file_name for p in summary.pictures] == ["a.png", "b.png"]
        assert [p.file_name for p in summary.problems] == ["d.jpg", "empty.jpg"]
        assert (summary.count, summary.read, summary.failed, summary.with_objects) == (9, 6, 3, 5)
        assert sum(summary.sides.values()) == 6


def test_pictures_with_many_objects_are_listed_sooner_cut(predictor, photos, monkeypatch):
    monkeypatch.setattr(detect_store, "LISTED_OBJECTS", 2)
    summary = go(predictor, photos, None).summary
    # The second picture has none; the fourth that could be read would be the third object.
    assert [p.file_name for p in summary.pictures] == ["a.png", "b.png", "c.jpg"]
    assert (summary.count, summary.with_objects) == (7, 5)
