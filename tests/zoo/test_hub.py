"""From what a user calls weights to a file."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from refinedet_cli.core.presets import PRESETS
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo import hub
from refinedet_cli.zoo.checkpoint import file_sha256, load_detector, read_header
from refinedet_cli.zoo.hub import (
    DEFAULT_WEIGHTS,
    HubName,
    fetch,
    fetch_optional,
    parse_hub_name,
    read_manifest,
    resolve_weights,
    weights_folder,
)

MANIFEST = f"""
[{DEFAULT_WEIGHTS}]
file = "default.safetensors"
sha256 = "00"

["other_model"]
file = "other.safetensors"

[lost]
file = "lost.safetensors"
"""


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose weights lie in a folder beside it, as in a clone; the working folder is another."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "manifest.toml").write_text(MANIFEST)
    for name in ("default", "other"):
        (folder / f"{name}.safetensors").write_bytes(b"x")
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "refinedet_cli" / "zoo" / "hub.py"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder


def test_bundled_weights_by_name(bundle):
    assert resolve_weights("other_model") == bundle / "other.safetensors"


def test_no_name_means_the_default(bundle):
    assert resolve_weights(None) == bundle / "default.safetensors"
    assert resolve_weights(DEFAULT_WEIGHTS) == bundle / "default.safetensors"


def test_a_path_on_disk(bundle, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"y")
    assert resolve_weights(str(path)) == path


def test_a_path_on_disk_wins_over_a_bundled_name(bundle):
    Path("other_model").write_bytes(b"y")
    assert resolve_weights("other_model").resolve() == Path.cwd() / "other_model"
    assert resolve_weights("other_model").read_bytes() == b"y"


def test_a_folder_does_not_hide_a_bundled_name(bundle):
    Path("other_model").mkdir()
    assert resolve_weights("other_model") == bundle / "other.safetensors"


def test_an_unknown_name_is_answered_with_the_bundled_ones(bundle):
    with pytest.raises(CheckpointError, match="'best': there is no such file, folder or bundled model") as caught:
        resolve_weights("best")
    assert all(name in (caught.value.hint or "") for name in (DEFAULT_WEIGHTS, "other_model"))


@pytest.mark.parametrize("name", [".", "..", "runs"])
def test_a_folder_without_weights(bundle, name):
    Path("runs").mkdir()
    with pytest.raises(CheckpointError, match=r"the folder holds no \.safetensors file"):
        resolve_weights(name)


def test_nothing_is_no_name(bundle):
    Path("best.safetensors").write_bytes(b"y")
    with pytest.raises(CheckpointError, match="weights '': there is no such file"):
        resolve_weights("")


def test_the_folder_of_a_run_stands_for_its_best_file(bundle):
    run = Path("runs/signs")
    run.mkdir(parents=True)
    (run / "only.safetensors").write_bytes(b"y")
    assert resolve_weights("runs/signs") == run / "only.safetensors"
    (run / "other.safetensors").write_bytes(b"y")
    with pytest.raises(CheckpointError, match=r"holds 2 \.safetensors files") as caught:
        resolve_weights("runs/signs")
    assert caught.value.hint == "name one of them: only.safetensors, other.safetensors"
    for file in ("last.safetensors", "best.safetensors"):
        (run / file).write_bytes(b"y")
        assert resolve_weights("runs/signs/") == run / file


@pytest.mark.parametrize("name", ["exported.onnx", "exported.xml", "exported.pt2"])
def test_an_exported_file_is_taken_as_it_is(bundle, name):
    Path(name).write_bytes(b"y")
    assert resolve_weights(name) == Path(name)


def test_a_name_that_no_path_can_have(bundle):
    with pytest.raises(CheckpointError):
        resolve_weights("a\0b")


def test_a_bundled_file_that_is_gone(bundle):
    with pytest.raises(CheckpointError, match=r"'lost' are missing at .*lost\.safetensors"):
        resolve_weights("lost")


def test_an_installed_package_carries_its_own(bundle, tmp_path):
    inside = tmp_path / "refinedet_cli" / "_weights"
    inside.mkdir(parents=True)
    (inside / "manifest.toml").write_text("[inner]\nfile = 'i.safetensors'\n")
    assert weights_folder() == inside
    assert list(read_manifest()) == ["inner"]


def test_no_weights_at_all(bundle):
    (bundle / "manifest.toml").unlink()
    for call in (weights_folder, read_manifest, lambda: resolve_weights(None), lambda: resolve_weights("best")):
        with pytest.raises(CheckpointError, match="the bundled weights are missing"):
            call()


def test_a_path_needs_no_bundle(bundle, tmp_path):
    (bundle / "manifest.toml").unlink()
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"y")
    assert resolve_weights(str(path)) == path


def test_the_weights_that_are_really_bundled():
    manifest = read_manifest()
    assert DEFAULT_WEIGHTS in manifest
    for name, entry in manifest.items():
        path = resolve_weights(name)
        assert path.parent == weights_folder()
        assert file_sha256(path) == entry["sha256"]
        config, provenance = read_header(path)
        assert config.preset in PRESETS
        assert provenance
    assert load_detector(resolve_weights(None)).config.preset == DEFAULT_WEIGHTS


# The Hugging Face Hub.

SMALL, LARGE = b"small", bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("timm/vgg16.tv_in1k", HubName("timm/vgg16.tv_in1k")),
        ("a-b/c_d@v1.0", HubName("a-b/c_d", "v1.0")),
        ("a/b@refs/pr/1", HubName("a/b", "refs/pr/1")),
        ("a/b:w.pth", HubName("a/b", None, "w.pth")),
        ("a/b@main:sub/w.pth", HubName("a/b", "main", "sub/w.pth")),
        *((text, None) for text in (
            "vgg16", "a/b/c", "./a", "../a", "/a/b", "a/", "a/b@", "a/b:", "a b/c", "a/b:../w", "a/..", "a--b/c", "",
            "a/b@x@y", "a/b:c:d", "a\\b", "a/b:c\\d", "\u00e4/b", "a/b\n",
        )),
    ],
)  # fmt: skip
def test_names_on_the_hub(text, name):
    assert parse_hub_name(text) == name


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("file", ["model.safetensors", "sub/folder/model.safetensors"])
def test_a_file_is_downloaded_once(hub, content, file):
    commit = hub.put("org/repo", {file: content})
    found = fetch("org/repo", file)
    assert found.path.read_bytes() == content
    assert found.path.is_relative_to(hub.cache)
    assert (found.repo, found.file, found.commit) == ("org/repo", file, commit)
    hub.stop()
    hub.requests.clear()
    assert fetch("org/repo", file) == found
    assert hub.requests == []


def test_a_cached_revision_is_not_asked_for_again(hub):
    old = hub.put("org/repo", {"w": SMALL}, "main", "v1")
    assert fetch("org/repo", "w").commit == old
    new = hub.put("org/repo", {"w": LARGE})
    assert fetch("org/repo", "w").commit == old
    assert fetch("org/repo", "w", new).commit == new
    assert fetch("org/repo", "w", "v1").path.read_bytes() == SMALL


@pytest.mark.parametrize("how", ["branch", "tag", "commit"])
def test_a_revision_is_what_it_names(hub, how):
    pinned = hub.put("org/repo", {"w": SMALL}, "refs/pr/7" if how == "branch" else "v1")
    hub.put("org/repo", {"w": LARGE})
    revision = {"branch": "refs/pr/7", "tag": "v1", "commit": pinned}[how]
    for _ in range(2):
        found = fetch("org/repo", "w", revision)
        assert found.commit == pinned
        assert found.path.read_bytes() == SMALL
        hub.stop()


def test_nothing_is_told_but_what_a_download_needs(hub, monkeypatch):
    hub.put("org/repo", {"w": LARGE})
    fetch("org/repo", "w")
    assert [r.path for r in hub.requests[:-1]] == ["/org/repo/resolve/main/w"] * 2
    assert hub.requests[-1].path == f"/storage/{hashlib.sha256(LARGE).hexdigest()}"
    for request in hub.requests:
        assert "torch" not in request.headers["user-agent"]
    # It is ours to set for the call, and nobody's after it.
    assert constants.HF_HUB_DISABLE_TELEMETRY is False
    with pytest.raises(CheckpointError):
        fetch("org/repo", "none")
    assert constants.HF_HUB_DISABLE_TELEMETRY is False


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.put("org/repo", {"w": LARGE})
    fetch("org/repo", "w")
    sent = [request.headers.get("authorization") for request in hub.requests]
    assert sent == ["Bearer hf_secret", "Bearer hf_secret", None]


def test_a_file_that_need_not_be_there(hub):
    hub.put("org/repo", {"w": SMALL, "config.json": b"{}"})
    hub.put("org/bare", {"w": SMALL})
    for _ in range(2):
        found = fetch_optional("org/repo", "config.json")
        assert found is not None
        assert found.path.read_bytes() == b"{}"
        assert fetch_optional("org/bare", "config.json") is None
        hub.stop()  # both answers are remembered


def test_an_optional_file_that_cannot_be_asked_for_is_not_taken_for_missing(hub):
    hub.put("org/repo", {"w": SMALL})
    commit = fetch("org/repo", "w").commit
    hub.stop()
    with pytest.raises(CheckpointError, match=r"config\.json is not in the cache, and the connection to http.* failed"):
        fetch_optional("org/repo", "config.json", commit)


def refused(*args):
    with pytest.raises(CheckpointError) as caught:
        fetch(*args)
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.hint


def test_no_network_is_said_at_once(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace())  # on which nobody sleeps
    hub.stop()
    message, hint = refused("org/repo", "w")
    assert message.startswith(f"org/repo: w is not in the cache, and the connection to {hub.url} failed (")
    assert "by its path" in hint


def test_offline_is_honoured(hub, monkeypatch):
    hub.put("org/repo", {"w": SMALL})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message, hint = refused("org/repo", "w")
    assert message == f"org/repo: w is not in the cache ({hub.cache}), and HF_HUB_OFFLINE forbids the network"
    assert "unset it" in hint
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = fetch("org/repo", "w")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("org/repo", "w") == found


def test_what_the_hub_does_not_have(hub):
    hub.put("org/repo", {"w": SMALL})
    message, hint = refused("org/other", "w")
    assert message == "org/other: the Hub has no such repository, or it is private"
    assert "HF_TOKEN" in hint
    message, hint = refused("org/repo", "w", "v9")
    assert message == "org/repo@v9: the repository has no such revision"
    assert hint == f"see {hub.url}/org/repo/commits/main"
    message, hint = refused("org/repo", "other.bin")
    assert message == "org/repo: the repository has no file 'other.bin'"
    assert f"{hub.url}/org/repo/tree/main" in hint


def test_what_the_hub_does_not_give(hub):
    hub.refuse("org/gated", "GatedRepo")
    message, hint = refused("org/gated", "w")
    assert message == "org/gated: its owner grants access on request"
    assert hint.startswith(f"ask for it at {hub.url}/org/gated, then log in")
    hub.refuse("org/private", "RepoNotFound")
    assert "or it is private" in refused("org/private", "w")[0]


@pytest.mark.parametrize(
    ("status", "says"), [(401, "refuses access (401)"), (403, "refuses access (403)"), (503, "answered 503")]
)
def test_other_answers_are_passed_on(hub, status, says):
    hub.status, hub.headers = status, {"X-Error-Message": "Invalid credentials in Authorization header"}
    message, hint = refused("org/repo", "w")
    assert message == f"org/repo: the Hub {says}"
    assert ("hf auth login" in hint) == (status != 503)


def test_something_else_that_answers_is_no_hub(hub):
    hub.status = 200  # as the login page of a hotel does
    message, hint = refused("org/repo", "w")
    assert message == f"org/repo: {hub.url} does not answer as a Hub"
    assert "HF_ENDPOINT" in hint


def test_a_broken_download_goes_on_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.put("org/repo", {"w": LARGE})
    hub.cut = 6500
    assert fetch("org/repo", "w").path.read_bytes() == LARGE
    assert [r.headers.get("range") for r in hub.requests[2:]] == [None, "bytes=6000-"]


def test_a_download_that_keeps_breaking_leaves_nothing(hub, monkeypatch):
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.put("org/repo", {"w": LARGE})
    hub.cut = 0
    assert "failed (peer closed connection" in refused("org/repo", "w")[0]
    hub.cut = None
    assert fetch("org/repo", "w").path.read_bytes() == LARGE


def test_a_disk_without_room_is_seen_before_the_download(hub, monkeypatch):
    hub.put("org/repo", {"w": LARGE})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(LARGE) - 1))
    message, hint = refused("org/repo", "w")
    assert message == f"org/repo: w takes 0 MB, and {hub.cache} has 0 MB free"
    assert "HF_HOME" in hint
    assert [r.method for r in hub.requests] == ["HEAD"]


@pytest.mark.parametrize(
    ("number", "cure"), [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EROFS, "make it")]
)
def test_a_disk_that_does_not_take_it(hub, monkeypatch, number, cure):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(number, "no", "/somewhere")

    hub.put("org/repo", {"w": LARGE})
    monkeypatch.setattr(file_download, "http_get", full)
    message, hint = refused("org/repo", "w")
    assert message.startswith(f"org/repo: w cannot be stored in {hub.cache} (")
    assert hint.startswith(cure)


def test_a_cache_that_is_a_file(hub):
    hub.put("org/repo", {"w": SMALL})
    hub.cache.write_bytes(b"")
    assert "cannot be stored in" in refused("org/repo", "w")[0]


def test_a_name_that_the_client_refuses_is_not_ours(hub):
    # `parse_hub_name` lets none of these through; a caller that makes one up has a bug.
    with pytest.raises(ValueError, match="repo_id"):
        fetch("a--b/c", "w")
