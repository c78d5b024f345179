from __future__ import annotations

import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator

import pytest

from refinedet_cli.data.download import download, unpack
from refinedet_cli.errors import DataError

CONTENT = bytes(range(256)) * 40_000  # 10 MB: several chunks


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT; ``cut`` ends an answer early, ``ranges`` says whether it knows them."""

    cut: int | None = None
    ranges = True
    status = 200
    asked: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers["Range"])
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = 0
        if self.server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/set.zip"


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path):
    seen: list[int] = []
    target = tmp_path / "deep" / "set.zip"
    download(url(server), target, len(CONTENT), seen.append)
    assert target.read_bytes() == CONTENT
    assert seen == sorted(seen)
    assert seen[-1] == len(CONTENT)
    assert [p.name for p in target.parent.iterdir()] == ["set.zip"]
    download(url(server), target, len(CONTENT), seen.append)
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_an_attempt_that_was_cut_off_is_continued(server, tmp_path, ranges):
    target = tmp_path / "set.zip"
    server.cut, server.ranges = 3_000_000, ranges
    with pytest.raises(DataError, match=r"3,000,000 of 10,240,000 bytes|connection failed") as caught:
        download(url(server), target, len(CONTENT), lambda _: None)
    assert "again" in (caught.value.hint or "")
    assert not target.exists()
    server.cut = None
    download(url(server), target, len(CONTENT), lambda _: None)
    assert target.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=3000000-"]


def test_a_file_of_another_size_is_refused(server, tmp_path):
    with pytest.raises(DataError, match="more than the 1,000 bytes"):
        download(url(server), tmp_path / "set.zip", 1000, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_the_answer_of_the_server_is_told(server, tmp_path):
    server.status = 404
    with pytest.raises(DataError, match="answers 404"):
        download(url(server), tmp_path / "set.zip", 1000, lambda _: None)


def test_no_server_is_told(tmp_path):
    with pytest.raises(DataError, match="connection failed"):
        download("http://127.0.0.1:9/set.zip", tmp_path / "set.zip", 1000, lambda _: None)


def test_too_small_a_disk_is_told_before_anything_is_fetched(server, tmp_path):
    with pytest.raises(DataError, match="GB free"):
        download(url(server), tmp_path / "set.zip", 10**18, lambda _: None)
    assert server.asked == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_unpacked(tmp_path, kind):
    archive = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("in/a.txt", "hello")
    else:
        with tarfile.open(archive, "w") as packed:
            entry = tarfile.TarInfo("in/a.txt")
            entry.size = 5
            packed.addfile(entry, io.BytesIO(b"hello"))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "in" / "a.txt").read_text() == "hello"


def test_nothing_is_written_outside_the_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("../../evil.txt", "x")
    unpack(tmp_path / "a.zip", tmp_path / "one" / "two")
    assert not (tmp_path / "evil.txt").exists()
    with tarfile.open(tmp_path / "a.tar", "w") as packed_tar:
        packed_tar.addfile(tarfile.TarInfo("../../evil.txt"))
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "a.tar", tmp_path / "one" / "two")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_a_damaged_archive_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"not an archive" * 100)
    with pytest.raises(DataError, match=name):
        unpack(tmp_path / name, tmp_path / "out")
