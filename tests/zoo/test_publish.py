"""Uploads to the Hub, over HTTP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.hub import fetch
from refinedet_cli.zoo.hub_client import network
from refinedet_cli.zoo.publish import publish

WEIGHTS = bytes(range(256)) * 40
CARD = b"---\nlicense: mit\n---\n# Signs\n"


@pytest.fixture
def login(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.tokens["hf_writer"] = "org"


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "best.safetensors"
    path.write_bytes(WEIGHTS)
    return path


def test_what_was_pushed_is_pulled_byte_for_byte(hub, login, weights):
    seen = []
    with network(on_progress=seen.append):
        done = publish("org/signs", {"model.safetensors": weights, "README.md": CARD}, private=False, message="First")
    assert done.url == f"{hub.url}/org/signs"
    assert hub.repos["org/signs"].private is False
    for name, content in (("model.safetensors", WEIGHTS), ("README.md", CARD)):
        found = fetch("org/signs", name)
        assert found.path.read_bytes() == content
        assert found.commit == done.commit
    assert (seen[-1].file, seen[-1].done, seen[-1].total) == ("best.safetensors", len(WEIGHTS), len(WEIGHTS))
    assert not any("xet" in request.path for request in hub.requests)


def test_a_second_push_is_a_second_commit_and_keeps_other_files(hub, login, weights):
    hub.put("org/signs", {"notes.txt": b"mine", "README.md": b"old"})
    first = publish("org/signs", {"model.safetensors": weights}, private=True, message="First")
    second = publish("org/signs", {"README.md": CARD}, private=True, message="Second")
    assert first.commit != second.commit
    assert hub.repos["org/signs"].private is False  # it was there, and stays as it was
    assert hub.repos["org/signs"].commits[second.commit] == {
        "notes.txt": b"mine", "README.md": CARD, "model.safetensors": WEIGHTS,
    }  # fmt: skip


def test_a_new_repository_may_be_private(hub, login, weights):
    publish("org/signs", {"model.safetensors": weights}, private=True, message="First")
    assert hub.repos["org/signs"].private is True


def refused(repo, weights):
    with pytest.raises(CheckpointError) as caught:
        publish(repo, {"model.safetensors": weights}, private=False, message="First")
    return caught.value.message, caught.value.hint


def test_without_a_login_nothing_is_asked(hub, weights):
    message, hint = refused("org/signs", weights)
    assert message == "org/signs: there is no login to the Hugging Face Hub on this machine"
    assert "hf auth login" in hint
    assert hub.requests == []


@pytest.mark.parametrize(("tokens", "status"), [({}, 401), ({"hf_writer": "someone"}, 403)])
def test_a_login_that_may_not_write(hub, login, weights, tokens, status):
    hub.tokens = tokens
    message, hint = refused("org/signs", weights)
    assert message == f"org/signs: the Hub does not let this login write there ({status})"
    assert "may write to org" in hint
    assert hub.repos == {}


def test_the_hub_is_gone(hub, login, weights):
    hub.stop()
    message, _ = refused("org/signs", weights)
    assert message.startswith(f"org/signs: publishing failed, for the connection to {hub.url} did (")


def test_offline_publishes_nothing(hub, login, weights):
    with network(offline=True):
        message, hint = refused("org/signs", weights)
    assert message == "org/signs: publishing needs the network, which --offline forbids"
    assert hint == "leave out --offline"
    assert hub.requests == []


def test_an_upload_that_breaks_commits_nothing(hub, login, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    hub.storage = hub.url + "/nowhere"
    message, _ = refused("org/signs", weights)
    assert message.startswith("org/signs: the Hub ")
    assert hub.repos["org/signs"].commits == {}
