"""A run that is killed, interrupted or refused by the disk goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from refinedet_cli.engine.run_state import load_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


Call = Callable[..., Ended]


@pytest.fixture(scope="module")
def call(root: Path) -> Iterator[Call]:
    """Call the command line in a fork of a process that has all imported, with an accident: see forking_cli.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(root / "tests" / "engine" / "forking_cli.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=root,
    ) as server:

        def ask(*arguments: object, accident: dict[str, Any] | None = None) -> Ended:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(json.dumps({"arguments": [str(a) for a in arguments], "accident": accident}) + "\n")
            server.stdin.flush()
            return Ended(*json.loads(server.stdout.readline()))

        yield ask
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture(scope="module")
def command(few_squares: Path) -> tuple[object, ...]:
    """Ten steps of four pictures, saved after every step, evaluated after the third, sixth, ninth and last."""
    return (
        *("train", "--data", few_squares / "train.json", "--val", few_squares / "val.json"),
        *("--weights", "none", "--preset", "tiny", "--no-cache"),
        *("--batch", 4, "--precision", "fp32", "--workers", 0, "--save-every", 0),
        *("--set", "train.steps=10", "--set", "train.evaluate_every=1", "--set", "train.lr=0.01"),
    )


@pytest.fixture(scope="module")
def timed(call: Call, command: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nothing happens to, and the seconds that it took."""
    out, start = tmp_path_factory.mktemp("unbroken") / "run", time.monotonic()
    ended = call(*command, "--out", out)
    assert ended.code == 0, ended.stderr
    return out, time.monotonic() - start


@pytest.fixture(scope="module")
def unbroken(timed: tuple[Path, float]) -> Path:
    return timed[0]


def at(kind: str, target: str, file: int = 1, do: str = "SIGKILL") -> dict[str, Any]:
    return {"do": do, "kind": kind, "target": target, "file": file}


def resume_through(
    call: Call, command: tuple[object, ...], out: Path, accidents: list[dict[str, Any]], *, code: int
) -> None:
    """Start and resume a run again and again, with an accident each time, and at last without one."""
    for accident in accidents:
        resume = ["--resume"] if (out / "state.pt").is_file() else []
        ended = call(*command, "--out", out, *resume, accident=accident)
        assert ended.code == code, (accident, ended.stderr)
        assert "Traceback" not in ended.stderr, (accident, ended.stderr)
        if (out / "state.pt").is_file():
            load_state(out / "state.pt")
    ended = call(*command, "--out", out, "--resume")
    assert ended.code == 0, ended.stderr


def test_killed_at_the_worst_moments(call, command, unbroken, tmp_path, assert_equal_runs):
    out = tmp_path / "run"
    moments = [
        at("write", "config.json"),
        at("fsync", "state.pt"),
        at("replaced", "state.pt"),  # Step 1: there is something to resume from here on, but no weights.
        at("write", "last.safetensors"),  # While they are put right.
        at("write", "state.pt"),
        at("write", "log.csv", 1),  # While rows that go too far are dropped.
        at("write", "log.csv", 2),  # In the middle of a row.
        at("replace", "state.pt", 2),
        at("write", "metrics.csv", 1),  # Step 3 is saved, and to be evaluated.
        at("write", "metrics.csv", 2),
        at("replaced", "state.pt"),  # Evaluated, and the best so far.
        at("open", "best.safetensors"),
        at("replace", "best.safetensors"),
        at("replaced", "best.safetensors"),
        at("replace", "last.safetensors"),
        {"do": "SIGKILL", "call": "refinedet_cli.engine.train:_Run._optimise", "nth": 3},
        {"do": "SIGKILL", "call": "refinedet_cli.engine.predict:Predictor.predict"},
    ]
    resume_through(call, command, out, moments, code=-9)
    assert_equal_runs(unbroken, out)


@pytest.mark.slow
def test_killed_at_any_moment(call, command, timed, tmp_path, assert_equal_runs):
    unbroken, seconds = timed
    out = tmp_path / "run"
    for part in np.random.default_rng(0).uniform(0.2, 0.8, 6):
        resume = ["--resume"] if (out / "state.pt").is_file() else []
        ended = call(*command, "--out", out, *resume, accident={"do": "SIGKILL", "after": float(part) * seconds})
        assert ended.code in (-9, 0), ended.stderr
    resume = ["--resume"] if (out / "state.pt").is_file() else []
    assert call(*command, "--out", out, *resume).code == 0
    assert_equal_runs(unbroken, out)


def test_a_full_disk_is_one_clear_error(call, command, unbroken, tmp_path, assert_equal_runs):
    out = tmp_path / "run"
    places = [
        ("write", "config.json", 1),
        ("write", "log.csv", 2),
        ("write", "state.pt", 2),
        ("write", "last.safetensors", 1),
        ("fsync", "last.safetensors", 2),
        ("write", "metrics.csv", 2),
        ("write", "best.safetensors", 1),
    ]
    for kind, name, file in places:
        before = (out / "state.pt").read_bytes() if (out / "state.pt").is_file() else b""
        resume = ["--resume"] if before else []
        ended = call(*command, "--out", out, *resume, "--json", accident=at(kind, name, file, do="ENOSPC"))
        assert ended.code == 4, ended.stderr
        error = json.loads(ended.stdout)["error"]
        assert error["message"].startswith(f"cannot write {out / name}: No space left on device (")
        assert error["hint"] == "free some space, or write to another disk"
        assert "Traceback" not in ended.stderr
        assert not [p for p in out.iterdir() if p.name.startswith(".")]
        if before:
            load_state(out / "state.pt")
    assert call(*command, "--out", out, "--resume").code == 0
    assert_equal_runs(unbroken, out)


def test_an_interrupt_leaves_a_run_that_goes_on(call, command, unbroken, tmp_path, assert_equal_runs):
    out = tmp_path / "run"
    caching = {"call": "refinedet_cli.engine.train:_Run._stop_if_interrupted", "nth": 3}
    for times in (1, 2):
        ended = call(*command, "--out", out, "--cache", accident={"do": "SIGINT", "times": times, **caching})
        assert ended.code == 130, ended.stderr
        assert "Traceback" not in ended.stderr
        assert not list(out.glob("*.pt")) + list(out.glob("*.safetensors"))
        assert ("there is nothing to resume" in ended.stderr) == (times == 1)
    # Twice while the first state is written: nothing is left of it either.
    twice = {"do": "SIGINT", "call": "torch:save", "times": 2}
    assert call(*command, "--out", out, accident=twice).code == 130
    assert not list(out.glob("*.pt")) + list(out.glob("*.safetensors")) + list(out.glob(".*"))
    in_the_first_step = {"do": "SIGTERM", "call": "refinedet_cli.engine.train:_Run._optimise"}
    ended = call(*command, "--out", out, accident=in_the_first_step)
    assert ended.code == 130, ended.stderr
    assert "stopped after step 1; go on with the same command and --resume" in ended.stderr
    assert load_state(out / "state.pt").step == 1
    evaluating = {"do": "SIGINT", "call": "refinedet_cli.engine.predict:Predictor.predict"}
    for times in (1, 2):
        assert call(*command, "--out", out, "--resume", accident={**evaluating, "times": times}).code == 130
        state = load_state(out / "state.pt")
        assert (state.step, state.evaluated, state.best) == (3, False, None)
    saving = [at("write", "state.pt", 2, do="SIGINT"), {**at("write", "state.pt", 2, do="SIGINT"), "times": 2}]
    resume_through(call, command, out, saving, code=130)
    assert_equal_runs(unbroken, out)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("detect", "{data}/0.png", "{data}/1.png", "--out", "{out}", "--weights", "{weights}"), "detections.jsonl"),
        (("eval", "--dataset", "{data}/val.json", "--out", "{out}", "--weights", "{weights}"), "detections.json"),
        (("data", "convert", "{data}/train.json", "--to", "voc", "--out", "{out}"), ""),
        (("data", "check", "{data}/train.json", "--out", "{out}"), "findings.json"),
        (("train", "--data", "{data}/train.json", "--val", "none", "--weights", "{weights}", "--out", "{out}"), ""),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_a_limit_on_files_is_one_clear_error_of_every_command(call, few_squares, unbroken, tmp_path, arguments, name):
    out = tmp_path / "out"
    places = {"data": few_squares, "out": out, "weights": unbroken / "last.safetensors"}
    ended = call(*(a.format(**places) for a in arguments), accident={"do": "limit", "bytes": 100})
    assert ended.code == 4, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith(f"error: cannot write {out / name}".removesuffix("/"))
    assert errors[0].endswith("File too large")
    assert "Traceback" not in ended.stderr
    assert not [p for p in tmp_path.rglob(".*") if p.is_file()]
