"""Checkpoints: exact copies, readable headers, and a clear answer to every file that is none."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, to_dict
from refinedet_cli.core.presets import tiny
from refinedet_cli.errors import CheckpointError, DataError
from refinedet_cli.zoo import checkpoint
from refinedet_cli.zoo.checkpoint import file_sha256, load_detector, read_header, save_checkpoint

CONFIG = tiny(Classes(names=("cat", "chèvre"), category_ids=(17, 5))).detector
PROVENANCE = {"tool_version": "0", "seed": 3, "metrics": {"AP": 0.25, "AP50": None}, "note": "Ü"}


def fresh_state(seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(CONFIG).network
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


STATE = fresh_state()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, CONFIG, STATE, PROVENANCE)
    return path


def rewrite(path: Path, *, tensors: dict[str, Tensor] | None = None, **header: str | None) -> None:
    """Write the file again, with other tensors or other entries in its header (None removes one)."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **header}
    content = load_file(path) if tensors is None else tensors
    save_file(content, path, metadata={k: v for k, v in metadata.items() if v is not None})


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_float32_comes_back_bit_for_bit(saved):
    loaded = load_detector(saved)
    assert loaded.config == CONFIG
    assert loaded.provenance == PROVENANCE
    assert loaded.path == saved
    state = loaded.detector.network.state_dict()
    assert state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype
    assert not any(module.training for module in loaded.detector.network.modules())


def test_float16_comes_back_rounded_in_half_the_size(tmp_path, saved):
    small = tmp_path / "small.safetensors"
    save_checkpoint(small, CONFIG, STATE, PROVENANCE, dtype=torch.float16)
    assert small.stat().st_size < 0.52 * saved.stat().st_size
    state = load_detector(small).detector.network.state_dict()
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert_close(state[name], tensor, rtol=2**-10, atol=1e-7)
    assert not all(torch.equal(state[name], STATE[name]) for name in STATE)


def test_saving_what_was_loaded_changes_nothing(tmp_path, saved):
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, CONFIG, load_detector(saved).detector.network.state_dict(), PROVENANCE)
    assert same_tensors(again, saved)
    assert read_header(again) == read_header(saved)


def test_channels_last_weights_are_stored_as_any(tmp_path, saved):
    other = tmp_path / "other.safetensors"
    state = {n: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in STATE.items()}
    save_checkpoint(other, CONFIG, state, PROVENANCE)
    assert same_tensors(other, saved)


def test_the_hash_is_of_the_content(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_header_is_read_without_the_weights(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "build", lambda _: pytest.fail("the header alone was asked for"))
    assert read_header(saved) == (CONFIG, PROVENANCE)


def test_the_header_is_plain_for_other_tools(saved):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "refinedet"
    assert int(metadata["format_version"]) == checkpoint.FORMAT_VERSION
    assert json.loads(metadata["config"]) == json.loads(json.dumps(to_dict(CONFIG)))
    assert json.loads(metadata["provenance"]) == PROVENANCE


# Files that are no checkpoint.


def refused(path: Path, match: str = "") -> CheckpointError:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_detector(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600 + len(str(path))
    return caught.value


def test_a_missing_file_and_a_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no such file")
    refused(tmp_path, "this is a folder, not a file")


def test_a_file_cut_short_anywhere(tmp_path, saved):
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "cut.safetensors"
    lengths = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        refused(path, "not a readable safetensors file" if length else "the file is empty")
        with pytest.raises(CheckpointError):
            read_header(path)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"\xff" * 5000, b"PK\x03\x04" * 50, b"hello, world\n" * 9])
def test_bytes_that_are_something_else(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, "not a readable safetensors file")


@pytest.mark.parametrize("name", ["foreign.pth", "foreign.pt", "foreign.caffemodel"])
def test_weights_of_other_projects_are_to_be_imported(tmp_path, name):
    path = tmp_path / name
    torch.save({"conv.weight": torch.zeros(2)}, path)
    assert f"refinedet weights import {path}" in str(refused(path, "not a checkpoint of this tool").hint)


def test_safetensors_of_another_project_are_to_be_imported(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, path)
    assert f"refinedet weights import {path}" in str(refused(path, "but not a checkpoint of this tool").hint)


def test_a_file_that_may_not_be_read_is_not_called_missing(saved, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(saved, "cannot be read: permission denied").hint == "change its permissions"


def test_a_damaged_header_never_ends_in_a_traceback(tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_checkpoint(path, CONFIG, {"x": torch.zeros(1)}, PROVENANCE)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refusals = []
    for place in range(0, header, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x15
        path.write_bytes(damaged)
        # Where it hits a letter of a name, what is read may still be valid.
        with contextlib.suppress(CheckpointError):
            read_header(path)
            continue
        refusals.append(place)
    assert len(refusals) > header // 7 // 2


def test_a_safetensors_file_of_another_tool(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(3)}, path, metadata=metadata)
        refused(path, "not a checkpoint of this tool")


def test_a_newer_version_says_so_whatever_else_it_holds(saved):
    rewrite(saved, format_version="2")
    assert refused(saved, r"newer version of this tool \(format 2\)").hint == "upgrade refinedet"
    rewrite(saved, format_version="99", config=None, provenance=None)
    refused(saved, r"newer version of this tool \(format 99\)")


@pytest.mark.parametrize(
    "header",
    [
        {"format_version": None}, {"format_version": "one"}, {"format_version": "0"}, {"format_version": "-1"},
        {"config": None}, {"config": "{"}, {"provenance": None}, {"provenance": "nope"}, {"provenance": "[1]"},
        {"config": "[" * 100_000},
    ],
)  # fmt: skip
def test_a_header_with_holes(saved, header):
    rewrite(saved, **header)
    refused(saved, "the header is damaged")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"preset": 5}, "preset"),
        ({"surplus": 1}, "surplus"),
        ({"network": {"backbone": "resnet900"}}, "network.backbone"),
        ({"loss": {"neg_ratio": float("nan")}}, "loss.neg_ratio"),
        ({"preprocess": {"height": 300}}, "preprocess.height"),
    ],
)
def test_a_config_that_is_not_valid(saved, change, names):
    rewrite(saved, config=json.dumps({**to_dict(CONFIG), **change}))
    refused(saved, f"the stored config is not valid.*{names}")


def test_a_config_that_is_no_table(saved):
    rewrite(saved, config="[]")
    refused(saved, "the stored config is not valid")


NAME = "odm.levels.0.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({NAME: None}, NAME),
        ({"odm.levels.9.weight": torch.zeros(2)}, r"odm\.levels\.9\.weight"),
        ({NAME: torch.zeros(21, 32, 3, 2)}, NAME),
        ({NAME: torch.zeros(22, 32, 3, 3)}, NAME),
    ],
    ids=["missing", "surplus", "shape", "classes"],
)
def test_weights_that_do_not_fit_the_config(saved, change, match):
    tensors = {**load_file(saved), **change}
    rewrite(saved, tensors={n: t for n, t in tensors.items() if t is not None})
    refused(saved, f"do not fit the file's own config.*{match}")


def test_no_weights_at_all(saved):
    rewrite(saved, tensors={"x": torch.zeros(1)})
    refused(saved, "do not fit the file's own config")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, saved, value):
    broken = {**STATE, NAME: STATE[NAME].clone()}
    broken[NAME][3, 2, 1, 0] = value
    path = tmp_path / "nan.safetensors"
    with pytest.raises(CheckpointError, match=f"nan.safetensors.*{NAME}.*not finite"):
        save_checkpoint(path, CONFIG, broken, PROVENANCE)
    assert list(tmp_path.iterdir()) == [saved]
    # From elsewhere it is refused as well.
    rewrite(saved, tensors=broken)
    refused(saved, f"{NAME}.*not finite")


def test_weights_too_large_for_float16(tmp_path):
    large = {**STATE, NAME: torch.full_like(STATE[NAME], 1e5)}
    save_checkpoint(tmp_path / "a.safetensors", CONFIG, large, PROVENANCE)
    with pytest.raises(CheckpointError, match=r"not finite as torch\.float16"):
        save_checkpoint(tmp_path / "b.safetensors", CONFIG, large, PROVENANCE, dtype=torch.float16)


# Writing.


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "disk full"), DataError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(saved, monkeypatch, error, raised):
    before = saved.read_bytes()

    def fail(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised):
        save_checkpoint(saved, CONFIG, fresh_state(1), PROVENANCE)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_equal_content_gives_equal_bytes_in_every_process(tmp_path, saved):
    # Within one process the library's order would differ too: each save draws another.
    for number in range(4):
        save_checkpoint(tmp_path / "again.safetensors", CONFIG, STATE, PROVENANCE)
        assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes(), number
    header = saved.read_bytes()[:8]
    assert int.from_bytes(header, "little") % 8 == 0


def test_a_save_replaces_the_old_file(saved):
    save_checkpoint(saved, CONFIG, fresh_state(1), {"seed": 4})
    loaded = load_detector(saved)
    assert loaded.provenance == {"seed": 4}
    assert torch.equal(loaded.detector.network.state_dict()[NAME], fresh_state(1)[NAME])
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.skipif(os.name != "posix", reason="file modes are of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_file_s_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "m.safetensors", CONFIG, {"x": torch.zeros(1)}, {})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o666 & ~umask


def test_provenance_that_is_not_plain_data_writes_nothing(tmp_path):
    for provenance, error in (({"AP": float("nan")}, ValueError), ({"where": tmp_path}, TypeError)):
        with pytest.raises(error):
            save_checkpoint(tmp_path / "x.safetensors", CONFIG, STATE, provenance)
    assert list(tmp_path.iterdir()) == []


def test_old_formats_migrate_step_by_step(saved, monkeypatch):
    def one_to_two(header, tensors):
        return {**header, "format_version": 2, "provenance": {"was": 1}}, tensors

    def two_to_three(header, tensors):
        assert header["provenance"] == {"was": 1}
        return {**header, "format_version": 3}, {n.replace("old.", ""): t for n, t in tensors.items()}

    rewrite(saved, tensors={f"old.{n}": t for n, t in load_file(saved).items()})
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
    monkeypatch.setattr(checkpoint, "MIGRATIONS", {1: one_to_two, 2: two_to_three})
    loaded = load_detector(saved)
    assert loaded.provenance == {"was": 1}
    assert torch.equal(loaded.detector.network.state_dict()[NAME], STATE[NAME])
