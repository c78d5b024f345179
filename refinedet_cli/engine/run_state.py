"""The self-contained file that a training run goes on from, and its place on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from refinedet_cli.errors import CheckpointError
from refinedet_cli.files import require_file, sync_folder, whole_file

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
        without_gain: evaluations since the best; states of before it was counted begin at 0.
        best_step: where that AP was reached; None where there is none, and in older states.
        evaluated: False between a step after which the weights are to be evaluated and the end of the evaluation.
        scores: what the weights of this very step reached, if they were evaluated.
        log: what `RunLog` has added up for its next row.
        order: SHA-256 of the training pictures' names in their order; None in older states.
        validation: fingerprint of the validation data, "" without; None in older states.
        start: what the run began from, as "provenance" of the weights and as "record" of config.json; empty in older
            states.
    """

    step: int
    network: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: float | None
    settings: dict[str, Any]
    data: str
    without_gain: int = 0
    best_step: int | None = None
    evaluated: bool = True
    scores: dict[str, float | None] = field(default_factory=dict)
    log: dict[str, Any] = field(default_factory=dict)
    order: str | None = None
    validation: str | None = None
    start: dict[str, Any] = field(default_factory=dict)


def save_state(path: Path, state: RunState) -> None:
    """Write the state whole and safely on disk: any end, at any moment, leaves the old file or the new one.

    Raises:
        DataError: it cannot be written; the old file is untouched.
    """
    content = {"version": STATE_VERSION, **vars(state)}
    with whole_file(path, size=sum(t.nbytes for t in _tensors(content))) as file:
        torch.save(content, file)
    sync_folder(path.resolve().parent)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)


def load_state(path: Path) -> RunState:
    """Read a state without running any code from it.

    Raises:
        CheckpointError: the file is missing, damaged or of another version.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: there is nothing to resume", "start the run without --resume")
    require_file(path, "start the run without --resume")
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
