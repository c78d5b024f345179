"""Several processes are as good as one: the same steps, the same numbers, and a common end."""

from __future__ import annotations

import csv
import json
import multiprocessing
import pickle
import runpy
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import DetectorConfig, from_dict
from refinedet_cli.core.presets import Preset, tiny
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.distributed import Shard
from refinedet_cli.engine.run_state import RunState, load_state
from refinedet_cli.engine.train import RunOptions, TrainResult, train
from refinedet_cli.errors import ConfigError, DataError, UsageError
from refinedet_cli.zoo.checkpoint import save_checkpoint

SCRIPT = Path(__file__).with_name("one_rank.py")


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal), what it answered, and what it wrote."""

    code: int
    answer: Any
    stdout: str
    stderr: str


Group = Callable[..., list[Ended]]
Alone = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Run a job of one_rank.py in several processes, which a server forks so that torch is imported once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["refinedet_cli.cli.app", "refinedet_cli.engine.training_session"])

    def run(count: int, name: str, *arguments: Any, own: Callable[[int], tuple[Any, ...]] | None = None) -> list[Ended]:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(count):
            values = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
            values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job = {
                "name": name,
                "environment": {key: str(value) for key, value in values.items()},
                "arguments": own(rank) if own else arguments,
                "prefix": str(folder / str(rank)),
            }
            call = {"init_globals": {"JOB": job}, "run_name": "__main__"}
            processes.append(context.Process(target=runpy.run_path, args=(str(SCRIPT),), kwargs=call))
        for process in processes:
            process.start()
        for process in processes:
            process.join(200)
            assert process.exitcode is not None, "a process hangs"
        return [_ended(process.exitcode, folder / str(rank)) for rank, process in enumerate(processes)]

    return run


def _ended(code: int | None, prefix: Path) -> Ended:
    answer = prefix.with_suffix(".answer")
    words = [prefix.with_suffix(suffix).read_text() for suffix in (".out", ".err")]
    return Ended(code or 0, pickle.loads(answer.read_bytes()) if answer.exists() else None, words[0], words[1])


@pytest.fixture(scope="module")
def squares(bright_squares: Callable[..., Path]) -> Path:
    """Eleven pictures of one to three bright squares; one shows nothing."""
    return bright_squares(11)


@pytest.fixture(scope="module")
def data(squares: Path) -> Dataset:
    return open_dataset(str(squares), split="train")


def recipe(data: Dataset, **changes: Any) -> Preset:
    base = tiny(data.classes)
    settings: dict[str, Any] = {"batch": 5, "epochs": 3, "warmup_steps": 0, "precision": "fp32", "evaluate_every": 0}
    # Adam would make much of a gradient that is nothing but rounding.
    settings |= {"optimizer": "sgd", "lr": 1e-3, "freeze_stages": 2, "unfreeze": ((0.5, 0),)}
    # All negatives: among those of equal cost, of which there are many, rounding would choose.
    loss = replace(base.detector.loss, neg_ratio=1e6, background_negatives=10**6)
    detector = replace(base.detector, loss=loss)
    return replace(base, detector=detector, train=replace(base.train, **{**settings, **changes}))


@pytest.fixture(scope="module")
def alone(run_options: Callable[..., RunOptions]) -> Alone:
    """Train in one process from seed 0: ``alone(data, preset, folder, validation=data)``."""

    def run(
        data: Dataset, preset: Preset, out: Path, *, validation: Dataset | None = None, resume: bool = False
    ) -> TrainResult:
        torch.manual_seed(0)
        options = run_options(out, resume=resume)
        return train(build(preset.detector), data, validation, preset.train, options, lambda report: None)

    return run


def state(out: Path) -> RunState:
    return load_state(out / "state.pt")


def assert_same_run(out: Path, other: Path) -> None:
    """Compare logs, and weights by how far training has moved them: rounding may turn single ReLUs."""
    found, expected = state(out), state(other)
    assert found.step == expected.step
    torch.manual_seed(0)
    start = build(from_dict(DetectorConfig, expected.settings["detector"])).network.state_dict()
    for name in ("network", "ema"):
        after, wanted = getattr(found, name), getattr(expected, name)
        moved = torch.cat([(wanted[n] - start[n]).flatten().float() for n in start])
        off = torch.cat([(after[n] - wanted[n]).flatten().float() for n in start])
        assert off.norm() < 2e-3 * moved.norm(), name
    momenta = [
        torch.cat([s["momentum_buffer"].flatten() for s in o.optimizer["state"].values()]) for o in (found, expected)
    ]
    assert (momenta[0] - momenta[1]).norm() < 1e-2 * momenta[1].norm()
    # Its gradient norms are those before clipping.
    for step, logged in zip(log_of(out), log_of(other), strict=True):
        assert step == pytest.approx(logged, rel=1e-3)


def log_of(out: Path) -> list[dict[str, float]]:
    with (out / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = (
        "total",
        "gradient_norm",
        "arm_conf",
        "arm_loc",
        "odm_conf",
        "odm_loc",
        "positives_arm",
        "positives_odm",
    )
    return [{name: float(row[name]) for name in measured} for row in rows]


@pytest.fixture(scope="module")
def whole(data: Dataset, tmp_path_factory: pytest.TempPathFactory, alone: Alone) -> tuple[Path, TrainResult]:
    """Six steps of five pictures in one process, evaluated on the same pictures."""
    out = tmp_path_factory.mktemp("whole")
    return out, alone(data, recipe(data), out, validation=data)


def test_two_processes_take_the_steps_of_one(
    group: Group, data: Dataset, whole: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out, expected = whole
    first, second = group(2, "train", data, data, recipe(data), tmp_path / "run", {})
    assert first.code == second.code == 0, first.stderr + second.stderr
    assert first.stderr == second.stderr == ""
    assert first.answer == second.answer
    assert first.answer["finished"]
    assert first.answer["best"] == pytest.approx(expected.best, abs=0.01)
    assert_same_run(tmp_path / "run", out)


def test_a_run_that_one_process_stops_goes_on_in_one(
    group: Group, data: Dataset, whole: tuple[Path, TrainResult], tmp_path: Path, alone: Alone
) -> None:
    # Rank 6 of the seven never has a picture, and asks to stop after the third step.
    ended = group(7, "train", data, data, recipe(data, accumulate=2), tmp_path / "run", {"stop": [6, 3]})
    assert [e.code for e in ended] == [0] * 7, [e.stderr for e in ended]
    assert [(e.answer["finished"], e.answer["steps"]) for e in ended] == [(False, 3)] * 7
    assert alone(data, recipe(data), tmp_path / "run", validation=data, resume=True).steps == 6
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("parts", [2, 5, 9])
def test_parts_of_a_step_add_up_to_the_step(
    data: Dataset, whole: tuple[Path, TrainResult], tmp_path: Path, parts: int, alone: Alone
) -> None:
    alone(data, recipe(data, accumulate=parts), tmp_path)
    assert_same_run(tmp_path, whole[0])


def test_layers_of_timm_that_lead_nowhere_do_not_end_the_run(
    group: Group, data: Dataset, tmp_path: Path, alone: Alone
) -> None:
    pytest.importorskip("timm", reason="the extra timm is not installed")
    preset = recipe(data, steps=2, freeze_stages=0, unfreeze=())
    network = replace(preset.detector.network, backbone="timm/hrnet_w18_small")
    preset = replace(preset, detector=replace(preset.detector, network=network))
    ended = group(2, "train", data, None, preset, tmp_path / "run", {})
    assert [e.code for e in ended] == [0, 0], [e.stderr for e in ended]
    alone(data, preset, tmp_path / "whole")
    for found, expected in zip(log_of(tmp_path / "run"), log_of(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_running_statistics_are_those_of_all_pictures(
    group: Group, data: Dataset, tmp_path: Path, alone: Alone
) -> None:
    # The third process has no picture, and what it computes instead does not count.
    preset = recipe(data, batch=2, steps=1, freeze_norm=False, freeze_stages=0, unfreeze=())
    ended = group(3, "train", data, None, preset, tmp_path / "three", {})
    assert [e.code for e in ended] == [0] * 3, [e.stderr for e in ended]
    alone(data, preset, tmp_path / "one")
    found, expected = state(tmp_path / "three").network, state(tmp_path / "one").network
    first = next(name for name in found if name.endswith("running_mean"))
    torch.testing.assert_close(found[first], expected[first])


def test_a_process_that_is_killed_ends_the_other_and_spoils_nothing(
    group: Group, data: Dataset, whole: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    first, second = group(2, "train", data, data, recipe(data), tmp_path / "run", {"kill": [1, 3]})
    assert second.code == -9
    kind, code, message, hint = first.answer
    assert (kind, code) == ("PartialError", 8)
    assert message.startswith("rank 0 of 2: another process of the command is gone (")
    assert "--resume" in hint
    assert state(tmp_path / "run").step == 3
    again = group(3, "train", data, data, recipe(data), tmp_path / "run", {"resume": True})
    assert [e.code for e in again] == [0] * 3, [e.stderr for e in again]
    assert_same_run(tmp_path / "run", whole[0])


def test_processes_hear_of_each_other(group: Group) -> None:
    answers = [e.answer for e in group(3, "talk")]
    assert (
        answers
        == [{"any": [True, False], "gather": [[], ["here"], ["here", "here"]], "from_first": "of 0", "sum": 6}] * 3
    )


@pytest.mark.parametrize(
    ("error", "ranks", "expected"),
    [
        (DataError("no picture", "look"), (0, 1), [("DataError", 4, "no picture", "look")]),
        (DataError("no picture", "look"), (1,), [("DataError", 4, "rank 1: no picture", "look")]),
        (KeyError("x"), (1,), [("ToldElsewhere", 1, "rank 1: KeyError: 'x'", None), ("KeyError", 1, "'x'", None)]),
    ],
    ids=["all fail", "one fails", "a bug"],
)
def test_a_failure_of_one_ends_all_and_is_told_once(
    group: Group, error: Exception, ranks: tuple[int, ...], expected: list[tuple[Any, ...]]
) -> None:
    first, second = (e.answer for e in group(2, "fail", error, ranks))
    assert first == expected[0]
    assert second == (expected[1] if len(expected) > 1 else ("ToldElsewhere", *expected[0][1:]))


def test_other_data_on_one_machine_is_refused(group: Group, data: Dataset, tmp_path: Path) -> None:
    def own(rank: int) -> tuple[Any, ...]:
        seen = replace(data, records=data.records[rank:])
        return seen, None, recipe(data), tmp_path / "run", {}

    first, second = (e.answer for e in group(2, "train", own=own))
    assert first[:3] == ("ConfigError", ConfigError.exit_code, "rank 1 has other training data than rank 0")
    assert second[:2] == ("ToldElsewhere", ConfigError.exit_code)
    assert not (tmp_path / "run").exists()


def test_eval_finds_the_same_and_one_speaks(
    group: Group, run: Callable[..., Any], squares: Path, data: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    detector = tiny(data.classes).detector
    weights = tmp_path / "w.safetensors"
    save_checkpoint(weights, detector, build(detector).network.state_dict(), {})
    command = ("eval", "--dataset", str(squares), "--weights", str(weights), "--precision", "fp32", "--batch", "2")
    one = run(*command, "--out", tmp_path / "one", "--json")
    assert one.code == 0, one.stderr
    first, *others = group(3, "main", *command, "--out", str(tmp_path / "three"), "--json")
    assert [e.code for e in (first, *others)] == [0] * 3, first.stderr
    assert [(e.stdout, e.stderr) for e in others] == [("", "")] * 2
    found, expected = json.loads(first.stdout), json.loads(one.stdout)
    assert [found[k] for k in ("metrics", "classes")] == [expected[k] for k in ("metrics", "classes")]
    names = ("one", "three")
    files = [json.loads((tmp_path / name / "detections.json").read_text())["annotations"] for name in names]
    assert files[0] == files[1]
    assert len(files[0]) > 10


def test_train_speaks_with_one_voice(group: Group, squares: Path, tmp_path: Path) -> None:
    command = ("train", "--data", str(squares), "--weights", "none", "--preset", "tiny", "--epochs", "1")
    options = ("--batch", "4", "--workers", "0", "--precision", "fp32", "--out", str(tmp_path / "run"))
    first, second = group(2, "main", *command, *options, "--json", "--val", str(squares))
    assert first.code == second.code == 0, first.stderr + second.stderr
    assert json.loads(first.stdout)["steps"] == 2
    assert second.stdout == second.stderr == ""
    first, second = group(2, "main", *command, *options)
    assert first.code == second.code == UsageError.exit_code
    assert "holds a run already" in first.stderr
    assert first.stdout == second.stdout == second.stderr == ""


def test_processes_that_cannot_find_each_other_are_told_how(
    run: Callable[..., Any], squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ended = run("eval", "--dataset", squares)
    assert ended.code == UsageError.exit_code
    assert "the environment says that this is rank 1 of 2, and MASTER_ADDR is missing" in ended.stderr
    assert "torchrun" in ended.stderr
    assert Shard(1, 2).has(3)
