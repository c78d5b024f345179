"""Where, when and how a run was started: environment.json, with one entry for every start."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision

import refinedet_cli
from refinedet_cli.data.files import write_json

ENVIRONMENT_FILE = "environment.json"
SCHEMA_VERSION = 1

Outcome = Literal["running", "finished", "stopped", "failed"]

_HIDDEN = "***"
# What would open somebody else's door if the run's folder were passed on.
_SECRET_OPTION = re.compile(r"(?i)^(--?[\w-]*(?:token|password|passwd|secret|api[-_]?key)[\w-]*)(?:=.*)?$", re.DOTALL)
_SECRET_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRET_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the programs of a start; texts are as their makers write them, None where there is no such thing.

    Attributes:
        refinedet: version of this tool.
        commit: of the clone that this tool runs from, with ``+changes`` where files in it differ from that commit.
        python, torch, torchvision, numpy: versions.
        platform: operating system and architecture.
        host: name of the machine.
        cpu: its processor.
        cores, threads: processors that the operating system sees, and threads that torch computes with.
        memory_bytes: of the machine.
        device: what the run computes on, such as "cpu" or "cuda:0".
        precision: of the network.
        processes: that train together.
        gpu: its name.
        gpu_memory_bytes: its memory.
        cuda, cudnn: versions that torch was built with; of ROCm, ``cuda`` says so.
    """

    refinedet: str
    commit: str | None
    python: str
    torch: str
    torchvision: str
    numpy: str
    platform: str
    host: str
    cpu: str
    cores: int
    threads: int
    memory_bytes: int | None
    device: str
    precision: str
    processes: int
    gpu: str | None
    gpu_memory_bytes: int | None
    cuda: str | None
    cudnn: str | None


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run, by the first command or by a resume.

    Attributes:
        started: when, UTC, ISO 8601.
        seen: when it last gave a sign of life, UTC.
        ended: when it ended, UTC; None where it is running, or ended without a chance to say so.
        outcome: how it ended; "running" where ``ended`` is None.
        from_step, to_step: steps done when it began, and when it was last seen.
        folder: the working folder, absolute; relative paths of the command start here.
        command: program and arguments as typed, secrets left out; empty where there was no command.
        environment: of this start.
    """

    started: str
    seen: str
    ended: str | None
    outcome: Outcome
    from_step: int
    to_step: int
    folder: str
    command: tuple[str, ...]
    environment: Environment

    @property
    def seconds(self) -> float:
        """From the start to the last sign of life."""
        return (datetime.fromisoformat(self.seen) - datetime.fromisoformat(self.started)).total_seconds()


class StartLog:
    """Writes environment.json: the starts before stay as they are, this one is added and kept up to date.

    Args:
        folder: of the run.
        environment: of this start.
        command: program and arguments.
        step: steps done when it begins.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, folder: Path, environment: Environment, command: Sequence[str], step: int) -> None:
        self._path = folder / ENVIRONMENT_FILE
        self._before = _entries(self._path)
        now = _now()
        self.start = Start(
            started=now,
            seen=now,
            ended=None,
            outcome="running",
            from_step=step,
            to_step=step,
            folder=str(Path.cwd()),
            command=tuple(without_secrets(command)),
            environment=environment,
        )
        self._write()

    def seen(self, step: int) -> None:
        """Give a sign of life after a number of steps."""
        self.start = replace(self.start, seen=_now(), to_step=step)
        self._write()

    def ended(self, step: int, outcome: Outcome) -> None:
        """Tell how this start ended."""
        now = _now()
        self.start = replace(self.start, seen=now, ended=now, outcome=outcome, to_step=step)
        self._write()

    def _write(self) -> None:
        starts = [*self._before, asdict(self.start)]
        write_json(self._path, {"schema_version": SCHEMA_VERSION, "starts": starts})


def read_starts(folder: Path) -> tuple[Start, ...]:
    """Read the starts of a run, the first one first; entries that are not as this version writes them are left out."""
    starts = []
    for entry in _entries(folder / ENVIRONMENT_FILE):
        try:
            known = {field.name: entry[field.name] for field in fields(Start)}
            environment = {field.name: entry["environment"][field.name] for field in fields(Environment)}
            command = tuple(map(str, known["command"]))
            start = Start(**{**known, "command": command, "environment": Environment(**environment)})
            if start.seconds >= 0 and start.to_step >= start.from_step:
                starts.append(start)
        except (KeyError, TypeError, ValueError):
            continue
    return tuple(starts)


def describe_environment(device: torch.device, precision: str, processes: int = 1) -> Environment:
    """Look at this machine.

    Args:
        device: what the run computes on.
        precision: of the network.
        processes: that train together.
    """
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cudnn = torch.backends.cudnn.version() if gpu is not None else None
    return Environment(
        refinedet=refinedet_cli.__version__,
        commit=_commit(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        torch=str(torch.__version__),
        torchvision=torchvision.__version__,
        numpy=np.__version__,
        platform=platform.platform(),
        host=platform.node(),
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        device=str(device),
        precision=precision,
        processes=processes,
        gpu=None if gpu is None else gpu.name,
        gpu_memory_bytes=None if gpu is None else gpu.total_memory,
        cuda=None if gpu is None else torch.version.cuda or f"ROCm {torch.version.hip}",
        cudnn=None if cudnn is None else str(cudnn),
    )


def without_secrets(command: Sequence[str]) -> list[str]:
    """Copy a command line, with stars for what looks like a password or an access token."""
    kept: list[str] = []
    hide_next = False
    for argument in command:
        option = _SECRET_OPTION.match(argument)
        if option and "=" in argument:
            kept.append(f"{option[1]}={_HIDDEN}")
        elif hide_next:
            kept.append(_HIDDEN)
        else:
            kept.append(_SECRET_TOKEN.sub(_HIDDEN, _SECRET_IN_ADDRESS.sub(_HIDDEN, argument)))
        hide_next = bool(option) and "=" not in argument
    return kept


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _entries(path: Path) -> list[dict[str, Any]]:
    """Read the entries as they stand; none where the file is not there, or somebody else's."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    starts = document.get("starts") if isinstance(document, dict) else None
    return [entry for entry in starts if isinstance(entry, dict)] if isinstance(starts, list) else []


def _commit() -> str | None:
    """Name the commit of the clone that the package lies in; a package in an environment belongs to no clone."""
    root = Path(refinedet_cli.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _answer("git", "-C", str(root), "--no-optional-locks", "rev-parse", "HEAD")
    changes = _answer("git", "-C", str(root), "--no-optional-locks", "status", "--porcelain", "--", "refinedet_cli")
    return commit and commit + ("+changes" if changes else "")


def _cpu() -> str:
    """Name the processor; Python knows its name on Windows alone."""
    if sys.platform == "darwin":
        return _answer("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    model = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _answer(*command: str) -> str | None:
    """Ask a program of this machine; None where it is not there or has no answer."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return asked.stdout.strip()
