from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from refinedet_cli.data.files import require_writable, whole_folder, write_json, write_whole
from refinedet_cli.errors import DataError


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\x00\xff", b"\x00\xff"), ("naïve\n", "naïve\n".encode()), (b"", b"")],
    ids=["bytes", "text", "empty"],
)
def test_content_is_written_and_nothing_is_left_over(tmp_path: Path, content: bytes | str, expected: bytes) -> None:
    target = tmp_path / "new" / "folder" / "file"
    write_whole(target, content)
    assert target.read_bytes() == expected
    assert list(target.parent.iterdir()) == [target]


def test_longest_file_name_fits(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    write_whole(target, b"x")
    assert target.read_bytes() == b"x"


def test_replacing_keeps_permissions(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    target.chmod(0o640)
    write_whole(target, b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_whole(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_failure_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError) as caught:
        write_whole(target, b"new")
    assert str(target) in caught.value.message
    assert os.strerror(number) in caught.value.message
    assert caught.value.hint
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_interrupt_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"old")
    require_writable(tmp_path / "there", tmp_path / "new", tmp_path / "deep" / "folder" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_folder_that_takes_no_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DataError, match=os.strerror(number)) as caught:
        require_writable(tmp_path / "new" / "file")
    assert str(tmp_path / "new" / "file") in caught.value.message
    assert list(tmp_path.iterdir()) == []


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def _below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"")
    return tmp_path / "file" / "below"


def _pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def _loop(tmp_path: Path) -> Path:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    "place",
    [_folder, _below_a_file, _pipe, _loop, lambda p: p / ("n" * 256), lambda p: p / "nul\0"],
    ids=["folder", "below a file", "pipe", "loop of links", "long name", "nul"],
)
def test_bad_targets_are_refused(tmp_path: Path, place) -> None:
    target = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="cannot write") as caught:
        write_whole(target, b"x")
    assert caught.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_json_comes_back(tmp_path: Path) -> None:
    document = {"name": "été \ud800", "values": [1, 2.5, None, True]}
    write_json(tmp_path / "a.json", document)
    assert json.loads((tmp_path / "a.json").read_bytes()) == document


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_json_does_not_know(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", [value])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").write_bytes(b"old")
    out, synced = tmp_path / "out", []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append((str(Path(f"/proc/self/fd/{handle}").readlink()), out.exists()))
    )
    with whole_folder(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_bytes(b"a")
        (folder / "linked").hardlink_to(tmp_path / "old")
    names = [(path.removeprefix(str(folder)), there) for path, there in synced]
    assert names == [("/inner", False), ("/inner/a", False), ("", False), (str(tmp_path), True)]
