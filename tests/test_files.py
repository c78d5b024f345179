"""Files are whole or not there, and what the disk says is told in one line; patched failures and real ones."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refinedet_cli import files
from refinedet_cli.cli.app import main
from refinedet_cli.errors import DataError, UsageError
from refinedet_cli.files import append_whole, claimed, remove_leftovers, sync_folder, whole_file, written_by_a_library


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the disk still takes, and what it says afterwards; both may be changed."""
    left = [1000, errno.ENOSPC]
    real = files._Recording.write

    def write(file: files._Recording, data: memoryview) -> int:
        written = real(file, memoryview(data)[: left[0]]) if left[0] else 0
        left[0] -= written
        if not written:
            file.failure = OSError(left[1], os.strerror(left[1]))
            raise file.failure
        return written

    monkeypatch.setattr(files._Recording, "write", write)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=4_100))
    return left


@pytest.mark.parametrize(
    ("number", "said", "cure"),
    [
        (errno.ENOSPC, r"No space left on device \(it takes 40 kB, and 4.1 kB are free\)$", "free some space"),
        (errno.EDQUOT, "quota", "quota is used up"),
        (errno.EFBIG, "File too large$", "ulimit"),
        (errno.EIO, "Input/output error$", "another disk"),
        (errno.ESTALE, "Stale", "another disk"),
        (errno.EROFS, "Read-only file system$", "another folder"),
        (errno.EACCES, "Permission denied$", "permissions"),
    ],
)
def test_what_torch_says_of_a_disk_that_fails_is_replaced_by_what_the_disk_said(tmp_path, room, number, said, cure):
    room[1] = number
    target = tmp_path / "state.pt"
    target.write_bytes(b"old")
    with (
        pytest.raises(DataError, match=f"^cannot write {target}: .*{said}") as caught,
        whole_file(target, size=40_000) as file,
    ):
        torch.save({"a": torch.zeros(10_000)}, file)
    assert cure in (caught.value.hint or "")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupt_within_torch_stays_one(tmp_path, monkeypatch):
    def interrupted(file: files._Recording, data: memoryview) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(files._Recording, "write", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "state.pt") as file:
        torch.save({"a": torch.zeros(10_000)}, file)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_the_very_end_is_noticed(tmp_path, room):
    room[0] = 3
    with pytest.raises(DataError, match="No space left on device"), whole_file(tmp_path / "a") as file:
        file.write(b"four")
    assert list(tmp_path.iterdir()) == []


def test_what_is_free_is_told_with_the_right_unit(tmp_path, monkeypatch):
    for free, said in ((0, "0 bytes are free"), (4_100_000, "4.1 MB are free"), (10**12, "perhaps no more files fit")):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        error = files.cannot_write(tmp_path / "a", OSError(errno.ENOSPC, "No space left on device"), 36_400_000)
        assert said in error.message
    assert "it takes" not in error.message


def test_a_row_is_appended_whole_or_not_at_all(tmp_path, room):
    path = tmp_path / "log.csv"
    append_whole(path, "a,b\n")
    room[0] = 2
    with pytest.raises(DataError, match=f"cannot write {path}: No space left on device"):
        append_whole(path, "1,2\n")
    assert path.read_text() == "a,b\n"
    room[0] = 100
    append_whole(path, "1,2\n")
    assert path.read_text() == "a,b\n1,2\n"


def test_a_failure_at_another_file_is_not_blamed_on_this_one(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(BrokenPipeError), whole_file(tmp_path / "a"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(ValueError, match="of the caller"), whole_file(tmp_path / "a"):
        raise ValueError("a fault of the caller")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "validation").mkdir()
    left = [files.temporary_beside(tmp_path / place) for place in ("state.pt", "validation/report.html")]
    for path in left:
        path.write_bytes(b"half")
    others = [tmp_path / name for name in (".hidden", ".0123.tmp", "0123456789abcdef.tmp", ".0123456789abcdef.tmp.png")]
    for path in others:
        path.write_bytes(b"")
    (tmp_path / ".0123456789abcdef.tmp").mkdir()
    remove_leftovers(tmp_path)
    folders = [tmp_path / "validation", tmp_path / ".0123456789abcdef.tmp"]
    assert sorted(tmp_path.rglob("*")) == sorted([*others, *folders])


def test_a_folder_that_cannot_be_synced_is_no_failure_but_a_broken_disk_is(tmp_path, monkeypatch):
    number = errno.EINVAL

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    sync_folder(tmp_path)
    number = errno.EIO
    with pytest.raises(DataError, match=f"cannot write {tmp_path}: Input/output error"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("number", sorted(files.DISK_ERRNOS))
def test_what_the_file_system_says_elsewhere_is_no_bug(monkeypatch, capsys, number):
    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr("refinedet_cli.cli.app._invoke", fail)
    assert main(["detect"]) == 4
    assert capsys.readouterr().err.startswith(f"error: somewhere: {os.strerror(number)}")


@pytest.mark.parametrize(
    ("error", "free", "said"),
    [
        (RuntimeError("unexpected pos 64 vs 0"), 0, "No space left on device (0 bytes free)"),
        (OSError(errno.EFBIG, "File too large"), 10**9, "File too large"),
        (RuntimeError("a bug"), 10**9, None),
        (KeyError("a bug"), 2**20, None),
    ],
)
def test_a_library_that_fails_is_believed_unless_the_disk_is_the_reason(tmp_path, monkeypatch, error, free, said):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(type(error) if said is None else DataError) as caught, written_by_a_library(tmp_path / "a"):
        raise error
    if said is not None:
        assert str(caught.value) == f"cannot write {tmp_path / 'a'}: {said}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_real_disk_is_full_and_then_read_only(small_disk):
    target = small_disk / "state.pt"
    with whole_file(target) as file:
        file.write(b"old")
    with (
        pytest.raises(DataError, match=r"No space left on device \(it takes 400 kB, and 25\d kB are free\)"),
        whole_file(target, size=400_000) as file,
    ):
        torch.save(torch.zeros(100_000), file)
    assert [(p.name, p.read_bytes()) for p in small_disk.iterdir()] == [("state.pt", b"old")]
    with pytest.raises(DataError, match="No space left on device"):
        append_whole(target, "x" * 400_000)
    assert target.read_bytes() == b"old"
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(DataError, match=f"cannot write {target}: Read-only file system") as caught, whole_file(target):
        pass
    assert caught.value.hint == "the disk is read-only: choose another folder"
    with pytest.raises(DataError, match="Read-only file system"):
        append_whole(target, "x")


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    append_whole(tmp_path / "log", "x")
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


HOLDER = """
import pathlib, sys
from refinedet_cli.files import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no such locks")
class TestClaimed:
    def test_a_second_process_is_refused_until_the_first_has_ended(self, tmp_path, held):
        refused = pytest.raises(UsageError, match=f"^{tmp_path}: another process is writing there$")
        with refused, claimed(tmp_path):
            raise AssertionError("claimed twice")
        held.communicate("")
        assert not list(tmp_path.iterdir())
        with claimed(tmp_path):
            assert list(tmp_path.iterdir())

    def test_a_process_that_was_killed_holds_nothing(self, tmp_path, held):
        held.kill()
        held.wait()
        assert list(tmp_path.iterdir())
        with claimed(tmp_path):
            pass
        assert not list(tmp_path.iterdir())

    def test_another_name_is_another_claim(self, tmp_path, held):
        with claimed(tmp_path, ".lock-1"):
            pass

    def test_a_file_that_was_removed_in_between_is_made_again(self, tmp_path, monkeypatch):
        real, removed = files.fcntl.lockf, []

        def lockf(file, flags):
            real(file, flags)
            if not removed:
                removed.append((tmp_path / ".lock").unlink())

        monkeypatch.setattr(files.fcntl, "lockf", lockf)
        with claimed(tmp_path):
            assert removed
            assert (tmp_path / ".lock").exists()

    def test_a_file_system_without_locks_refuses_nobody(self, tmp_path, monkeypatch):
        def lockf(file, flags):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(files.fcntl, "lockf", lockf)
        with claimed(tmp_path):
            pass

    @pytest.mark.parametrize("command", ["train", "detect"])
    def test_commands_refuse_a_folder_that_another_process_writes(self, tmp_path, held, run, draw_squares, command):
        (data := tmp_path / "data").mkdir()
        document = draw_squares(data, [[1]] * 4, {1: ("red", (200, 30, 30))}, seed=0)
        (data / "train.json").write_text(json.dumps(document))
        train = ("train", "--data", data, "--val", "none", "--weights", "none", "--preset", "tiny", "--workers", 0)
        call = {"train": (*train, "--batch", 4, "--epochs", 1), "detect": ("detect", data)}[command]
        before = sorted(tmp_path.rglob("*"))
        finished = run(*call, "--out", tmp_path)
        assert finished.code == 2
        assert f"{tmp_path}: another process is writing there" in finished.stderr
        assert "choose another folder" in finished.stderr
        assert sorted(tmp_path.rglob("*")) == before
