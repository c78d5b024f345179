"""The self-contained file that a training run goes on from, and its place on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refinedet_cli.errors import CheckpointError

STATE_VERSION = 1


@dataclass(frozen=True)
class RunState:
    """All that decides how a run continues; only tensors, numbers, strings, lists and dicts.

    Attributes:
        step: optimiser steps done; the order of pictures and the rate follow from it and the settings.
        network: raw weights.
        ema: averaged weights.
        optimizer: state of the optimiser.
        best: best validation AP so far, or None.
        settings: resolved config of the run, plain data.
        data: fingerprint of the training data.
    """

    step: int
    network: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: float | None
    settings: dict[str, Any]
    data: str


def save_state(path: Path, state: RunState) -> None:
    """Write the state whole: an interruption at any moment leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            torch.save({"version": STATE_VERSION, **vars(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> RunState:
    """Read a state without running any code from it.

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is nothing to resume", "start the run without --resume")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content.pop("version")
        state = RunState(**content)
    except Exception as error:  # torch.load raises many kinds on damaged input
        raise CheckpointError(
            f"{path}: not a readable run state ({type(error).__name__}: {error})",
            "start again with --weights and the run's last.safetensors; only the resume state is lost",
        ) from None
    if version != STATE_VERSION:
        raise CheckpointError(f"{path}: run state of version {version}, expected {STATE_VERSION}")
    return state
