"""environment.json: one entry for every start, no secret in it, and no run that fails because of it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import refinedet_cli
from refinedet_cli.engine import environment
from refinedet_cli.engine.environment import StartLog, describe_environment, read_starts, without_secrets


@pytest.fixture(scope="module")
def here() -> environment.Environment:
    return describe_environment(torch.device("cpu"), "fp32")


def test_it_names_machine_and_versions(here):
    assert here.torch == torch.__version__
    assert here.refinedet == refinedet_cli.__version__
    assert here.threads == torch.get_num_threads()
    assert here.cpu
    assert here.gpu is here.cuda is None


@pytest.mark.gpu
def test_it_names_the_gpu():
    here = describe_environment(torch.device("cuda", 0), "bf16")
    assert here.gpu == torch.cuda.get_device_name(0)
    assert here.gpu_memory_bytes > 1e9
    assert here.cuda
    assert here.device == "cuda:0"


def test_every_start_has_its_entry(tmp_path, here):
    first = StartLog(tmp_path, here, ("refinedet", "train", "--out", "a b"), 0)
    first.seen(7)
    assert read_starts(tmp_path)[0].outcome == "running"
    second = StartLog(tmp_path, replace(here, host="elsewhere"), (), 5)
    second.ended(9, "finished")
    one, two = read_starts(tmp_path)
    assert (one.from_step, one.to_step, one.outcome, one.ended) == (0, 7, "running", None)
    assert one.command == ("refinedet", "train", "--out", "a b")
    assert one.folder == str(Path.cwd())
    assert (two.from_step, two.to_step, two.outcome, two.environment.host) == (5, 9, "finished", "elsewhere")
    assert two.seconds >= 0
    assert two.ended == two.seen


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"starts": 3}', '{"starts": [1, {}]}', '{"starts": [{"started": "x"}]}', "\ud7ff"]
)
def test_a_file_that_is_broken_is_begun_anew(tmp_path, here, content):
    (tmp_path / "environment.json").write_text(content, encoding="utf-8")
    assert read_starts(tmp_path) == ()
    StartLog(tmp_path, here, (), 3)
    assert [start.from_step for start in read_starts(tmp_path)] == [3]


def test_entries_of_a_newer_version_stay_as_they_are(tmp_path, here):
    StartLog(tmp_path, here, (), 0)
    path = tmp_path / "environment.json"
    document = json.loads(path.read_text())
    document["starts"][0]["colour"] = "red"
    document["starts"][0]["environment"]["npu"] = 1
    path.write_text(json.dumps(document))
    StartLog(tmp_path, here, (), 1)
    assert json.loads(path.read_text())["starts"][0] == document["starts"][0]
    assert len(read_starts(tmp_path)) == 2


def test_the_command_is_as_typed_but_for_secrets():
    typed = [
        "refinedet",
        "train",
        "--data",
        "a b/c.json",
        "--set",
        "train.lr=0.1",
        "--out",
        "./runs/../x",
        "tokens.json",
    ]
    assert without_secrets(typed) == typed
    secret = ["--hf-token", "abc", "--api_key=xyz", "--root", "https://me:word@host/x", "hf_" + "a1" * 10, "--password"]
    assert without_secrets(secret) == [
        "--hf-token", "***", "--api_key=***", "--root", "https://***@host/x", "***", "--password"
    ]  # fmt: skip


def test_a_package_outside_of_a_clone_has_no_commit(tmp_path, monkeypatch):
    # It may lie in an environment inside somebody's own repository, whose commit says nothing of it.
    inside = tmp_path / "project" / ".venv" / "lib" / "refinedet_cli"
    inside.mkdir(parents=True)
    (tmp_path / "project" / ".git").mkdir()
    monkeypatch.setattr(refinedet_cli, "__file__", str(inside / "__init__.py"))
    assert environment._commit() is None


def test_changes_are_told_from_the_commit(tmp_path, monkeypatch):
    package = tmp_path / "refinedet_cli"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True
        ).stdout

    try:
        git("init", "-q")
    except OSError:
        pytest.skip("git is not installed")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    commit = git("rev-parse", "HEAD").strip()
    monkeypatch.setattr(refinedet_cli, "__file__", str(package / "__init__.py"))
    assert environment._commit() == commit
    (package / "__init__.py").write_text("a = 2\n")
    assert environment._commit() == f"{commit}+changes"


def test_no_program_to_ask_is_no_failure(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment._answer("git", "--version") is None
