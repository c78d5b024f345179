"""The command `refinedet detect`."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.cli import detect as module
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine import draw, open_predictor
from refinedet_cli.errors import CheckpointError

# The seeded detector below scores its best boxes above this, in every picture.
SCORE = 0.6


def config_of(*names: str) -> DetectorConfig:
    return tiny(Classes(names=names, category_ids=(1, 17, 18)[: len(names)])).detector


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return save_random(path, config_of("person", "[red] :cat:", "dog"))


@pytest.fixture
def detect(run, weights):
    """Call ``refinedet detect`` with the seeded detector, in fp32 whatever the machine can."""

    def call(*args: object):
        return run("detect", *args, "--weights", weights, "--device", "cpu", "--precision", "fp32", "--score", SCORE)

    return call


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path) -> Path:
    for i, name in enumerate(("one.jpg", "two words.png", "über/one.jpg")):
        save(tmp_path / "photos" / name, seed=i)
    return tmp_path / "photos"


# --- the whole way


def test_pictures_become_tables_copies_and_a_document(detect, photos, tmp_path):
    code, stdout, stderr = detect(photos, "--out", tmp_path / "new" / "found")
    assert code == 0
    for word in ("one.jpg", "two words.png", "über/one.jpg", "Classes", "Best score", "objects in 3 of 3 pictures"):
        assert word in stdout
    assert "wrote" in stderr
    assert "3 annotated pictures" in stderr
    out = tmp_path / "new" / "found"
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == [
        "annotated/one.jpg",
        "annotated/two words.png",
        "annotated/über/one.jpg",
        "detections.json",
        "detections.jsonl",
    ]


def test_json_is_one_document_that_holds_everything(detect, photos, tmp_path):
    (photos / "broken.png").write_text("no")
    code, stdout, stderr = detect(photos, "--json", "--out", tmp_path / "out")
    assert code == 8
    assert "1 of 4 pictures failed" in stderr
    document = json.loads(stdout)
    assert (document["schema_version"], document["command"]) == (1, "detect")
    assert [p["file_name"] for p in document["pictures"]] == ["one.jpg", "two words.png", "über/one.jpg"]
    assert [f["file_name"] for f in document["failures"]] == ["broken.png"]
    assert "not a picture" in document["failures"][0]["reason"]
    assert document["origin"]["weights"] == "tiny.safetensors"
    assert document["origin"]["precision"] == "fp32"
    assert document["origin"]["score_threshold"] == SCORE

    written = json.loads(Path(document["detections_file"]).read_text())
    shown = [(p["id"], d["category_id"], d["score"], d["bbox"]) for p in document["pictures"] for d in p["detections"]]
    assert shown == [(a["image_id"], a["category_id"], a["score"], a["bbox"]) for a in written["annotations"]]
    assert document["objects"] == len(shown) == sum(c["objects"] for c in document["classes"]) > 0
    names = {category["id"]: category["name"] for category in written["categories"]}
    assert all(d["class"] == names[d["category_id"]] for p in document["pictures"] for d in p["detections"])
    assert all(Path(p["annotated"]).is_file() for p in document["pictures"])


def test_without_out_the_detections_are_in_the_answer_and_nothing_is_written(detect, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, stdout, stderr = detect(photos, "--json")
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["detections_file"] is None
    assert all(p["annotated"] is None for p in document["pictures"])
    assert document["pictures"][0]["detections"][0].keys() == {"class", "category_id", "score", "bbox"}
    assert sorted(tmp_path.rglob("*")) == before


def test_no_draw_writes_the_document_alone(detect, photos, tmp_path):
    code, _, stderr = detect(photos, "--out", tmp_path / "out", "--no-draw")
    assert code == 0
    assert "annotated" not in stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["detections.json", "detections.jsonl"]


def test_quiet_leaves_the_result_and_warnings(detect, photos, tmp_path):
    code, stdout, stderr = detect(photos, "--out", tmp_path / "out", "--quiet")
    assert (code, stderr) == (0, "")
    assert "objects in 3 of 3 pictures" in stdout


def test_batch_and_order_do_not_matter(detect, photos):
    def scores(*args: object) -> dict[str, list[float]]:
        pictures = json.loads(detect(*args, "--json").stdout)["pictures"]
        return {p["path"]: [d["score"] for d in p["detections"]] for p in pictures}

    files = sorted(p for p in photos.rglob("*") if p.is_file())
    forward, backward = scores(*files, "--batch", 1), scores(*files[::-1], "--batch", 3)
    assert forward.keys() == backward.keys()
    assert any(forward.values())
    for path in forward:
        torch.testing.assert_close(torch.tensor(forward[path]), torch.tensor(backward[path]), rtol=0, atol=1e-4)


def test_nothing_found_is_said(run, weights, photos):
    code, stdout, _ = run("detect", photos, "--weights", weights, "--device", "cpu", "--score", 1)
    assert code == 0
    assert "nothing found in 3 pictures at a score of 1 or better" in stdout
    assert "Best score" not in stdout


def test_names_of_classes_and_files_are_not_markup(detect, tmp_path):
    save(tmp_path / "photos" / "[bold]x[/bold].png")
    code, stdout, _ = detect(tmp_path / "photos")
    assert code == 0
    assert "[bold]x[/bold].png" in stdout
    assert "[red] :cat:" in stdout


def test_many_pictures_are_not_listed_one_by_one(detect, tmp_path):
    for i in range(21):
        save(tmp_path / "photos" / f"picture{i:02}.png", seed=i)
    few = detect(*sorted((tmp_path / "photos").iterdir())[:20]).stdout
    many = detect(tmp_path / "photos").stdout
    assert "picture00.png" in few
    assert "picture00.png" not in many
    assert "of 21 pictures" in many


def test_a_crowded_picture_lists_its_best(run, weights, photos):
    args = ("detect", photos / "one.jpg", "--weights", weights, "--device", "cpu", "--score", 0.1)
    count = len(json.loads(run(*args, "--json").stdout)["pictures"][0]["detections"])
    assert count > 12
    rows = [line for line in run(*args).stdout.splitlines() if "one.jpg" in line]
    assert len(rows) == 13
    assert f"and {count - 12} more" in rows[-1]


# --- sources


def test_a_list_of_paths_on_standard_input(detect, photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos / 'two words.png'}\n\n{photos / 'über' / 'one.jpg'}\n"))
    document = json.loads(detect("-", "--json").stdout)
    assert [Path(p["path"]).name for p in document["pictures"]] == ["two words.png", "one.jpg"]


def test_an_empty_list_on_standard_input(detect, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert detect("-").code == 4


class Piped:
    """Standard input as a pipe gives it: bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_a_list_of_paths_in_bytes(detect, photos, monkeypatch, end):
    names = ["two words.png", "über/one.jpg"]
    if end == b"\0":
        save(photos / "new\nline.png")
        names.append("new\nline.png")
    entries = [str(photos / name).encode() for name in names]
    monkeypatch.setattr(sys, "stdin", Piped(end.join([*entries, b""])))
    document = json.loads(detect("-", *["-0"] * (end == b"\0"), "--json").stdout)
    assert [Path(p["path"]) for p in document["pictures"]] == [photos / name for name in names]


def test_what_a_list_names_in_vain_fails_like_a_picture_that_cannot_be_read(detect, photos, monkeypatch):
    entries = ["gone.jpg", str(photos / "two words.png"), "gone*.png", str(photos)]
    monkeypatch.setattr(sys, "stdin", Piped("\n".join(entries).encode()))
    code, stdout, _ = detect("-", "--json")
    document = json.loads(stdout)
    assert code == 8
    assert [failure["path"] for failure in document["failures"]] == ["gone.jpg", "gone*.png"]
    assert "does not exist" in document["failures"][0]["reason"]
    assert len(document["pictures"]) == 3
    assert detect("gone.jpg", photos).code == 4


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_a_list_may_begin_with_a_byte_order_mark(monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", Piped(b"\xef\xbb\xbfa.jpg" + end + b"b.jpg"))
    assert list(module._entries(end)) == ["a.jpg", "b.jpg"]


def test_a_long_list_is_read_in_pieces(monkeypatch):
    entries = [f"{i:05}.jpg" for i in range(20_000)]
    monkeypatch.setattr(sys, "stdin", Piped("\n".join(entries).encode()))
    assert list(module._entries(b"\n")) == entries


def test_copies_of_an_earlier_run_are_left_out_and_it_is_said(detect, photos):
    assert detect(photos, "--out", photos / "found").code == 0
    code, stdout, stderr = detect(photos, "--out", photos / "found")
    assert code == 0
    assert "3 of 3 pictures" in stdout
    assert "left out 3 pictures that an earlier run has written into" in stderr
    assert "removed 3 files that the earlier run had written into" in stderr


# --- going on, formats and classes


def test_a_run_is_gone_on_with_and_it_is_said(detect, photos, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert detect(photos, "--out", whole).code == 0
    assert detect(photos, "--out", out).code == 0
    lines = (out / "detections.jsonl").read_bytes().splitlines(keepends=True)
    (out / "detections.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:30])
    refused = detect(photos, "--out", out)
    assert refused.code == 2
    assert "1 of 3 pictures are done" in refused.stderr
    assert "--resume" in refused.stderr
    code, stdout, stderr = detect(photos, "--out", out, "--resume")
    assert code == 0
    assert "1 picture had been done before" in stderr
    assert "in 3 of 3 pictures" in stdout
    assert (out / "detections.json").read_bytes() == (whole / "detections.json").read_bytes()
    other = detect(photos, "--out", out, "--resume", "--no-draw")
    assert other.code == 2
    assert "drawing on then, off now" in other.stderr


def test_a_run_that_was_done_before_has_no_pace(detect, photos, tmp_path):
    assert "pictures/s" in detect(photos, "--out", tmp_path).stdout
    code, stdout, _ = detect(photos, "--out", tmp_path, "--resume")
    assert code == 0
    assert "in 3 of 3 pictures" in stdout
    assert "pictures/s" not in stdout


def test_with_another_score_a_run_says_so_and_no_more(run, weights, photos, tmp_path):
    call = ("detect", photos, "--weights", weights, "--out", tmp_path)
    assert run(*call, "--score", 0.005).code == 0
    code, _, stderr = run(*call, "--score", 0.9, "--resume")
    assert code == 2
    assert "other settings: --score 0.005 then, 0.9 now" in stderr
    assert "set up in another way" not in stderr


def test_other_formats_crops_and_a_class(detect, photos, tmp_path):
    out = tmp_path / "out"
    formats = [word for name in ("results", "yolo", "csv") for word in ("--also", name)]
    finished = detect(photos, "--out", out, "--no-draw", "--crops", *formats, "--class", "DOG", "--json")
    assert finished.code == 0
    document = json.loads(finished.stdout)
    assert [Path(path).name for path in document["files"]] == [
        "detections.json", "results.json", "labels", "detections.csv",
    ]  # fmt: skip
    assert {d["class"] for p in document["pictures"] for d in p["detections"]} == {"dog"}
    assert document["origin"]["only_classes"] == ["dog"]
    crops = [Path(crop) for p in document["pictures"] for crop in p["crops"]]
    assert len(crops) == document["objects"] > 0
    assert all(crop.is_file() and crop.parts[-2] in ("dog", "über") for crop in crops)
    assert (document["picture_count"], document["pictures_listed"], document["failure_count"]) == (3, 3, 0)
    assert "labels and" in finished.stderr or "crops" in finished.stderr
    assert (out / "labels" / "über" / "one.txt").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--resume",), "--resume needs --out"),
        (("--crops",), "--crops needs --out"),
        (("--also", "yolo"), "--also needs --out"),
        (("--also", "xml"), "xml"),
        (("--also", "coco"), "coco"),
        (("--null",), "--null is about the list"),
        (("--class", "dgo"), "did you mean dog?"),
    ],
)
def test_options_that_do_not_go_together(detect, photos, args, words):
    code, stdout, stderr = detect(photos, *args)
    assert (code, stdout) == (2, "")
    assert words in stderr


def test_a_long_answer_is_cut_and_it_is_said(detect, photos, tmp_path, monkeypatch):
    from refinedet_cli.engine import detect_store

    monkeypatch.setattr(detect_store, "LISTED", 2)
    finished = detect(photos, "--json")
    document = json.loads(finished.stdout)
    assert len(document["pictures"]) == document["pictures_listed"] == 2
    assert document["picture_count"] == 3
    assert "the first 2 pictures are listed" in finished.stderr
    assert "are listed" not in detect(photos, "--json", "--out", tmp_path / "out").stderr


def test_processes_share_a_run_and_rank_0_answers(detect, photos, tmp_path, monkeypatch):
    assert detect(photos, "--out", tmp_path / "one", "--batch", 1).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "without --out" in detect(photos).stderr
    helper = detect(photos, "--out", tmp_path / "many", "--batch", 1)
    assert (helper.code, helper.stdout) == (0, "rank 1 of 2 is done; rank 0 joins what all have found\n")
    monkeypatch.setenv("RANK", "0")
    first = detect(photos, "--out", tmp_path / "many", "--batch", 1)
    assert first.code == 0
    assert "in 3 of 3 pictures" in first.stdout
    one, many = (tmp_path / name / "detections.json" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()


# --- exit codes


def test_some_failed(detect, photos):
    (photos / "empty.jpg").write_bytes(b"")
    code, stdout, stderr = detect(photos)
    assert code == 8
    assert "Failed" in stdout
    assert "is empty" in stdout
    assert "objects in 3 of 3 pictures" in stdout
    assert "error: 1 of 4 pictures failed" in stderr


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_all_failed(detect, tmp_path, flags):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_text("no")
    code, stdout, stderr = detect(tmp_path / "a.jpg", tmp_path / "b.png", *flags)
    assert code == 4
    assert "error: " in stderr
    if flags:
        assert [f["file_name"] for f in json.loads(stdout)["failures"]] == ["a.jpg", "b.png"]
    else:
        assert "a.jpg" in stdout
        assert "b.png" in stdout


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("{tmp}/nowhere.jpg",), 4, "does not exist"),
        (("{tmp}/photos", "--out", "{tmp}/photos/one.jpg"), 2, "--out"),
        (("{tmp}/photos", "--out", "{tmp}/photos/one.jpg/below"), 2, "is a file"),
        (("{tmp}/photos", "--score", "2"), 2, "--score"),
        (("{tmp}/photos", "--batch", "0"), 2, "--batch"),
        (("{tmp}/photos", "--multi-scale", "vox"), 3, "vox"),
        (("{tmp}/photos", "--multi-scale", "{tmp}/photos/one.jpg"), 3, "one.jpg"),
        (("{tmp}/photos", "--weights", "{tmp}/photos/one.jpg"), 5, "one.jpg"),
        (("{tmp}/photos", "--weights", "no-such-weights"), 5, "no-such-weights"),
        ((), 2, "SOURCES"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_mistakes_have_codes_and_no_traceback(run, weights, photos, tmp_path, args, code, words, as_json):
    args = [arg.format(tmp=tmp_path) for arg in args]
    if "--weights" not in args:
        args += ["--weights", str(weights)]
    finished = run("detect", *args, *["--json"] * as_json)
    assert finished.code == code
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr
    if as_json:
        assert json.loads(finished.stdout)["error"]["code"] == code
    else:
        assert finished.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device(run, weights, photos):
    assert run("detect", photos, "--weights", weights, "--device", "cuda").code == 6


def test_an_interrupt_ends_with_130_and_leaves_what_was_found(detect, photos, tmp_path, monkeypatch):
    from refinedet_cli.engine.predict import Predictor

    whole, calls = Predictor.predict, []

    def stop_later(self: Predictor, images: list[np.ndarray]) -> list:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, images)

    monkeypatch.setattr(Predictor, "predict", stop_later)
    code, stdout, stderr = detect(photos, "--out", tmp_path / "out", "--batch", 1, "--json")
    assert code == 130
    assert json.loads(stdout)["error"]["type"] == "interrupted"
    assert "Traceback" not in stderr
    assert "holds what was found so far, in 1 of 3 pictures" in stderr
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert written["info"]["complete"] is False
    assert len(written["images"]) == 1


# --- options


def test_the_default_weights_are_the_bundled_ones(run, photos, monkeypatch):
    asked = []

    def note(name: str | None) -> Path:
        asked.append(name)
        raise CheckpointError("stop here")

    monkeypatch.setattr(open_predictor, "resolve_weights", note)
    assert run("detect", photos).code == 5
    assert asked == [None]


def test_bf16_is_recorded(run, weights, photos):
    args = ("detect", photos, "--weights", weights, "--device", "cpu", "--precision", "bf16", "--json")
    assert json.loads(run(*args).stdout)["origin"]["precision"] == "bf16"


def test_multi_scale_is_announced_recorded_and_summed_up(detect, photos, tmp_path):
    picture = photos / "one.jpg"
    code, stdout, stderr = detect(picture, "--multi-scale", "voc", "--out", tmp_path / "out")
    assert code == 0
    # So few because the factors of 64 px are rounded to multiples of 64.
    assert "multi-scale voc: 4 passes a picture: 64, 128 px, each mirrored too; 10 times the pixels" in stderr
    assert stdout.rstrip().endswith("pictures/s, 4 passes a picture (multi-scale voc)")
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    schedule = written["info"]["multi_scale"]
    assert (schedule["name"], schedule["voting"]) == ("voc", "average")
    assert [(p["size"], p["mirror"], p["min_side_below"]) for p in schedule["passes"]] == [
        (64, True, None),
        (128, True, 96.0),
    ]
    finished = detect(picture, "--multi-scale", "voc", "--json", "--quiet")
    assert finished.stderr == ""
    document, once = json.loads(finished.stdout), json.loads(detect(picture, "--json").stdout)
    assert document["origin"]["multi_scale"] == schedule
    assert document["objects"] == len(written["annotations"]) > 0
    assert once["origin"]["multi_scale"] is None
    assert once["pictures"][0]["detections"] != document["pictures"][0]["detections"]


def test_a_schedule_file_that_makes_one_look_finds_the_same(detect, photos, tmp_path):
    (tmp_path / "one.toml").write_text("voting_iou = 1.0\n[[passes]]\nsize = 64\nmirror = false\n")
    finished = detect(photos, "--multi-scale", tmp_path / "one.toml", "--json")
    assert "multi-scale one.toml: 1 pass a picture: 64 px; 1 times the pixels" in finished.stderr
    one, plain = json.loads(finished.stdout), json.loads(detect(photos, "--json").stdout)
    assert one["origin"]["multi_scale"]["name"] == "one.toml"
    assert one["pictures"] == plain["pictures"]


def test_limits_that_large_pictures_defeat_are_remarked_on(detect, tmp_path):
    Image.new("RGB", (1100, 40)).save(tmp_path / "long.png")
    assert "1 picture has a side above 1,000 px" in detect(tmp_path / "long.png", "--multi-scale", "voc").stderr


def test_a_score_below_the_detectors_own_is_remarked_on(run, weights, photos):
    args = ("detect", photos, "--weights", weights, "--device", "cpu", "--score", 0.001)
    assert "keeps nothing that scores below 0.01" in run(*args).stderr
    assert "keeps nothing" not in run(*args, "--quiet").stderr


def test_the_profile_is_a_table_and_in_the_document(detect, photos, tmp_path):
    code, stdout, _ = detect(photos, "--out", tmp_path / "out", "--profile")
    assert code == 0
    table = stdout[stdout.index("Where the time went") :]
    for word in ("Stage", "Seconds", "Share", "ms/picture", "read", "network", "record", "outputs", "draw and write"):
        assert word in table
    assert re.search(r" is the bottleneck: \d+% of the time", table.splitlines()[-1])

    document = detect(photos, "--profile", "--json").document()
    profile = document["profile"]
    assert profile["pictures"] == 3
    assert profile["seconds"] == pytest.approx(document["seconds"], abs=1e-3)
    assert sum(row["seconds"] for row in profile["in_turn"]) == pytest.approx(profile["seconds"], abs=1e-4)
    assert profile["bottleneck"] in {row["stage"] for row in profile["in_turn"]}
    assert {row["stage"] for row in profile["beside"]} == {"read", "draw and write"}
    for row in profile["in_turn"] + profile["beside"]:
        assert list(row) == ["stage", "threads", "seconds", "share", "ms_per_picture"]
    assert " is the bottleneck: " in profile["verdict"]


def test_without_profile_there_is_none(detect, photos):
    code, stdout, _ = detect(photos)
    assert code == 0
    assert "Where the time went" not in stdout
    assert "bottleneck" not in stdout
    assert detect(photos, "--json").document()["profile"] is None


def test_large_jpegs_are_read_reduced_and_it_is_said(detect, tmp_path):
    path = tmp_path / "photos" / "large.jpg"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)).save(path)
    document = detect(path, "--json").document()
    assert document["origin"]["decoder"].endswith("large JPEGs reduced")
    (picture,) = document["pictures"]
    assert (picture["width"], picture["height"]) == (800, 600)
    assert "at a score of 0.6 or better, fp32, large JPEGs reduced, " in detect(path).stdout
    drawn = detect(path, "--json", "--out", tmp_path / "out").document()
    assert drawn["origin"]["decoder"].endswith("full size")
    assert "or better, fp32, full size, " in detect(path, "--out", tmp_path / "again").stdout


def test_names_that_no_font_can_write_are_warned_about(run, photos, tmp_path, monkeypatch, save_random):
    monkeypatch.setattr(draw, "_WIDE_FONTS", ())
    draw._font_file.cache_clear()
    odd = save_random(tmp_path / "odd.safetensors", config_of("person", "猫"))
    try:
        args = ("detect", photos, "--weights", odd, "--device", "cpu", "--quiet", "--out")
        finished = run(*args, tmp_path / "out")
        undrawn = run(*args, tmp_path / "out2", "--no-draw")
    finally:
        draw._font_file.cache_clear()
    assert finished.code == 0
    assert "warning: no font here can write 猫" in finished.stderr
    assert undrawn.stderr == ""


def test_help_explains_with_examples(run):
    code, stdout, _ = run("detect", "--help")
    assert code == 0
    assert stdout.count("refinedet detect ") >= 3
    for option in (
        "--out",
        "--no-draw",
        "--crops",
        "--also",
        "--resume",
        "--class",
        "--null",
        "--weights",
        "--score",
        "--multi-scale",
        "--offline",
        "--device",
        "--precision",
        "--batch",
        "--json",
        "--profile",
    ):
        assert option in stdout
