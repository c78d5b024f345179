"""Runs one of the processes of `test_distributed`, as torchrun would start it; ``JOB`` is given from outside."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refinedet_cli.cli.app import main
from refinedet_cli.core.build import build
from refinedet_cli.core.presets import Preset
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.engine.distributed import Processes, join
from refinedet_cli.engine.train import RunOptions, train


def train_here(
    processes: Processes, data: Dataset, validation: Dataset | None, preset: Preset, out: Path, what: dict[str, Any]
) -> dict[str, Any]:
    """Train from seed 0; ``what`` tells which rank is to be killed, or asks to stop, after how many steps."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        if what.get("kill") == [processes.rank, asked]:
            os.kill(os.getpid(), signal.SIGKILL)
        return what.get("stop") == [processes.rank, asked]

    torch.manual_seed(processes.rank)  # the weights of the first count
    options = RunOptions(
        out=out, device=torch.device("cpu"), precision="fp32", workers=0, cache=False, resume=what.get("resume", False),
        should_stop=should_stop, provenance={}, save_seconds=0.0, processes=processes,
    )  # fmt: skip
    result = train(build(preset.detector), data, validation, preset.train, options, lambda report: None)
    return {
        "finished": result.finished,
        "steps": result.steps,
        "best": result.best,
        "AP": result.result and result.result.AP,
    }


def talk(processes: Processes) -> dict[str, Any]:
    """Use every word there is."""
    return {
        "any": [processes.any(processes.rank == 1), processes.any(False)],
        "gather": processes.gather(["here"] * processes.rank),
        "from_first": processes.from_first(lambda: f"of {processes.rank}"),
        "sum": int(processes.sum(torch.tensor(processes.rank + 1))),
    }


def fail(processes: Processes, error: Exception, ranks: tuple[int, ...]) -> None:
    """Fail on some ranks, while the others go on."""
    if processes.rank in ranks:
        raise error
    processes.gather(1)


JOBS: dict[str, Callable[..., Any]] = {"train": train_here, "talk": talk, "fail": fail}


def run(name: str, environment: dict[str, str], arguments: tuple[Any, ...], prefix: str) -> None:
    """Do a job, or the command line's work, and leave beside ``prefix`` what came of it."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{prefix}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if name == "main":
        sys.exit(main(list(arguments)))
    try:
        with join() as processes:
            answer = JOBS[name](processes, *arguments)
    except Exception as error:
        code = getattr(error, "exit_code", 1)
        answer = (type(error).__name__, code, str(error), getattr(error, "hint", None))
    Path(f"{prefix}.answer").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    run(**JOB)  # type: ignore[name-defined]  # noqa: F821
