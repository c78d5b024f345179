"""A small Hugging Face Hub on this machine: what its client asks for when it downloads and uploads, over real HTTP.

Small files are answered directly, large ones by a redirect to a second server, as the Hub does. Tests get it as the
fixture ``hub``; they cannot import it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants

LARGE = 1000


class Request(NamedTuple):
    """What the client sent."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repo:
    """One repository: its files at each commit, and the names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    refusal: str | None = None
    private: bool = False


class Hub:
    """A Hub with repositories that a test puts there.

    Attributes:
        url: of the server.
        cache: the client's cache.
        requests: what was asked of both servers, in order.
        status: if it is set, the answer to everything.
        headers: sent with every answer of ``status``.
        cut: if it is set, large files end after so many bytes, every time they are sent.
        spoilt: whether the first byte of large files is another one, as sent by the storage.
        tokens: who may write, and to which organisation.
        stored: large files that were uploaded, by their SHA-256.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.cut: int | None = None
        self.spoilt = False
        self.tokens: dict[str, str] = {}
        self.stored: dict[str, bytes] = {}
        self._servers = [_Server(self) for _ in range(2)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.01,)) for s in self._servers]
        for thread in self._threads:
            thread.start()

    def put(self, repo: str, files: dict[str, bytes], *revisions: str) -> str:
        """Add a commit, and let ``main`` or the named revisions mean it; return the commit."""
        described = "".join(f"{name} {hashlib.sha1(content).hexdigest()}" for name, content in files.items())
        commit = hashlib.sha1(described.encode()).hexdigest()
        place = self.repos.setdefault(repo, Repo())
        place.commits[commit] = files
        place.revisions |= dict.fromkeys(revisions or ("main",), commit)
        return commit

    def refuse(self, repo: str, reason: str) -> None:
        """Let a repository be private or unknown ("RepoNotFound") or gated ("GatedRepo") for everyone."""
        self.repos.setdefault(repo, Repo()).refusal = reason

    def stop(self) -> None:
        """Take the Hub from the network; its address then refuses connections."""
        huggingface_hub.close_session()
        for server, thread in zip(self._servers, self._threads, strict=True):
            if thread.is_alive():
                server.shutdown()
                server.server_close()
                thread.join()


class _Server(ThreadingHTTPServer):
    """An HTTP server that knows its Hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers as the Hub and its storage do."""

    server: _Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.server.hub.requests.append(
            Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        )
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.hub.status is not None:
            self._answer(self.server.hub.status, dict(self.server.hub.headers))
        elif self.path.startswith("/storage/"):
            self._send_stored(self.path.rpartition("/")[2])
        elif "/resolve/" in self.path:
            self._resolve(*self.path.lstrip("/").split("/resolve/"))
        elif "/tree/" in self.path:
            self._list(*self.path.removeprefix("/api/models/").partition("?")[0].split("/tree/"))
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path.startswith("/upload/"):
            self.server.hub.stored[hashlib.sha256(body).hexdigest()] = body
            self._answer(200, {})
        elif self.command == "POST":
            self._write(json.loads(body.splitlines()[0]), body)
        else:
            self._answer(404, {})

    def _json(self, document: Any, status: int = 200) -> None:
        self._answer(status, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def _list(self, repo: str, revision: str) -> None:
        place = self.server.hub.repos[repo]
        files = place.commits[place.revisions.get(unquote(revision), revision)]
        self._json([{"type": "file", "path": n, "size": len(c), "oid": _git_hash(c)} for n, c in files.items()])

    def _write(self, asked: Any, body: bytes) -> None:
        """Take a repository or a commit from who may write there."""
        hub = self.server.hub
        place = self.path.removeprefix("/api/models/").removeprefix("/").partition(".git/")[0]
        repo = "/".join(place.split("/")[:2])
        if self.path == "/api/repos/create":
            repo = f"{asked['organization']}/{asked['name']}"
        owner = hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if owner != repo.partition("/")[0]:
            self._json({"error": "no"}, 401 if owner is None else 403)
        elif self.path == "/api/repos/create":
            there = repo in hub.repos
            hub.repos.setdefault(repo, Repo(private=asked.get("visibility") == "private"))
            self._json({"url": f"{hub.url}/{repo}"}, 409 if there else 200)
        elif "/preupload/" in self.path:
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in asked["files"]}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            actions = {o["oid"]: {"upload": {"href": f"{hub.storage}/upload/{o['oid']}"}} for o in asked["objects"]}
            self._json(
                {"transfer": "basic", "objects": [{**o, "actions": actions[o["oid"]]} for o in asked["objects"]]}
            )
        else:
            self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repo: str, lines: list[Any]) -> None:
        hub = self.server.hub
        place = hub.repos[repo]
        files = dict(place.commits.get(place.revisions.get("main", ""), {}))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
        commit = hub.put(repo, files)
        self._json({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit, "hookOutput": ""})

    def _resolve(self, repo: str, rest: str) -> None:
        place = self.server.hub.repos.get(repo)
        revision, _, name = rest.partition("/")
        if place is None or place.refusal is not None:
            code = "RepoNotFound" if place is None else place.refusal
            self._answer(403 if code == "GatedRepo" else 401, {"X-Error-Code": code})
            return
        commit = place.revisions.get(unquote(revision), revision)
        if commit not in place.commits:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        content = place.commits[commit].get(unquote(name))
        known = {"X-Repo-Commit": commit}
        if content is None:
            self._answer(404, {**known, "X-Error-Code": "EntryNotFound"})
        elif len(content) < LARGE:
            self._answer(200, {**known, "ETag": f'"{_git_hash(content)}"'}, content)
        else:
            sha = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha}"'}
            self._answer(302, {**known, **linked, "Location": f"{self.server.hub.storage}/storage/{sha}"})

    def _send_stored(self, sha: str) -> None:
        every = (c for r in self.server.hub.repos.values() for files in r.commits.values() for c in files.values())
        content = next(c for c in every if hashlib.sha256(c).hexdigest() == sha)
        if self.server.hub.spoilt:
            content = bytes([content[0] ^ 1]) + content[1:]
        asked = self.headers.get("Range")
        if asked is None:
            self._answer(200, {}, content)
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        place = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206, {"Content-Range": place}, content[start:])

    def _answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            short = self.path.startswith("/storage/") and self.server.hub.cut is not None
            self.wfile.write(content[: self.server.hub.cut] if short else content)
            self.close_connection = self.close_connection or short


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub, and point the client of this process at it, with a cache, a token and nothing else of the user's."""
    hub = Hub(folder / "hub")
    # The client reads its environment when it is imported, and these at every call.
    settings: dict[str, Any] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(hub.cache),
        "HF_TOKEN_PATH": str(folder / "token"),
        "AGENT_HARNESSES_PATH": str(folder / "harnesses.json"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": None,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        hub.stop()
