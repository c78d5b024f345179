"""Hostile data sets through training's readers and `data check`; benchmarks/fuzz_readers.py tries thousands of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def fuzz(load_script: Callable[[str], ModuleType]) -> ModuleType:
    """The script."""
    return load_script("benchmarks/fuzz_readers.py")


@pytest.fixture(scope="module")
def watch(fuzz: ModuleType) -> Any:
    return fuzz.Watch()


@pytest.fixture(scope="module")
def sandbox(fuzz: ModuleType, watch: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.Sandbox(tmp_path_factory.mktemp("sets"), watch)


@pytest.mark.parametrize("reader", ["coco", "voc", "yolo"])
def test_hostile_data_do_no_harm(fuzz: ModuleType, sandbox: Any, reader: str) -> None:
    seen = set()

    @FEW
    @given(draw=st.randoms(use_true_random=False))
    def attempt(draw: Any) -> None:
        outcome = sandbox.run(fuzz.Spoiler(draw, sandbox.top).spoil(reader))
        seen.add(outcome.opened)
        assert outcome.bugs == ()

    attempt()
    assert seen == {"accepted", "refused"}


@pytest.mark.parametrize("reader", ["coco", "voc", "yolo"])
def test_the_sound_sets_are_sound(fuzz: ModuleType, sandbox: Any, reader: str) -> None:
    for split in ("train", "val"):
        assert sandbox.run(fuzz.Input(reader, {}, split, "pixels")) == ("accepted", "accepted", ())


# What is counted as a bug, each with a case that must be seen ---------------------------------------------------------


def _raise(folder: Path) -> None:
    raise KeyError("images")


def _warn(folder: Path) -> None:
    import numpy as np

    np.float64(1e308) * np.float64(10)


def _unclear(folder: Path) -> None:
    from refinedet_cli.errors import DataError

    raise DataError(f"{folder} is bad")


def _write(folder: Path) -> None:
    (folder / "coco" / "cache.bin").write_bytes(b"x")


def _change(folder: Path) -> None:
    os.utime(folder / "coco" / "set.json", (1, 1))


def _read_out(folder: Path) -> None:
    (folder / "secret" / "a.txt").read_bytes()


def _remove(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        (folder / "coco" / "nothing").unlink()


def _connect(folder: Path) -> None:
    with socket.socket() as client, pytest.raises(OSError, match="refused"):
        client.connect(("127.0.0.1", 9))


def _start(folder: Path) -> None:
    os.system("true")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_raise, "open_dataset: KeyError"),
        (_warn, "open_dataset: RuntimeWarning"),
        (_unclear, "cure None"),
        (_write, "opened to write"),
        (_change, "os.utime"),
        (_read_out, "secret/a.txt"),
        (_remove, "os.remove"),
        (_connect, "socket.connect"),
        (_start, "os.system"),
    ],
)
def test_harm_is_seen(
    fuzz: ModuleType,
    watch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    words: str,
) -> None:
    sandbox = fuzz.Sandbox(tmp_path, watch)
    monkeypatch.setattr("refinedet_cli.data.source.open_dataset", lambda source, split: harm(tmp_path))
    bugs = sandbox.run(fuzz.Input("coco", {}, "train", "entries")).bugs
    assert any(words in bug for bug in bugs), bugs
    if harm in (_write, _change):
        assert "files of the data set were changed" in bugs


def test_inputs_are_written_and_read_back(fuzz: ModuleType, tmp_path: Path) -> None:
    spoiler = fuzz.Spoiler(fuzz.random.Random(3), tmp_path)
    for reader in fuzz.READERS * 20:
        spoilt = spoiler.spoil(reader)
        assert fuzz.load(fuzz.dump(spoilt)) == spoilt
