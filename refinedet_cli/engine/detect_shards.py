"""Processes that share the pictures of one run, as ``torchrun`` starts them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from refinedet_cli.engine.detect_journal import Journal
from refinedet_cli.errors import PartialError, UsageError

# Rank 0 gives up when nobody has finished a picture for so long, in seconds.
PATIENCE = 600.0
_POLL = 0.5


@dataclass(frozen=True)
class Shard:
    """The part of one process.

    Attributes:
        rank: of the process, from 0.
        count: processes there are, at least two.
    """

    rank: int
    count: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """Read RANK and WORLD_SIZE; None where the process is alone.

        Raises:
            UsageError: they are no numbers, or do not go together.
        """
        given = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE")}
        if not given["WORLD_SIZE"] or given["WORLD_SIZE"] == "1":
            return None
        if not all(value.isdecimal() for value in given.values()) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
            shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise UsageError(
                f"the environment says {shown}", "start with torchrun, which sets both, or unset WORLD_SIZE"
            )
        return cls(int(given["RANK"]), int(given["WORLD_SIZE"]))

    def has(self, block: int) -> bool:
        """Tell whether this process works on a block of pictures."""
        return block % self.count == self.rank

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"


def own_device(device: torch.device, environment: Mapping[str, str]) -> torch.device:
    """Choose among the CUDA devices by LOCAL_RANK, so that the processes of a machine share them evenly."""
    rank = environment.get("LOCAL_RANK", "")
    if device.type != "cuda" or not rank.isdecimal():
        return device
    return torch.device("cuda", int(rank) % torch.cuda.device_count())


def wait_for_all(journal: Journal, shard: Shard, batch: int) -> None:
    """Wait until all processes have written all their pictures.

    Args:
        journal: read again and again.
        shard: of this process.
        batch: pictures in a block.

    Raises:
        PartialError: no picture came for `PATIENCE`; names the ranks that lack some.
    """
    last = time.monotonic()
    while any(True for _ in journal.missing()):
        before = journal.done
        journal.read()
        if journal.done > before:
            last = time.monotonic()
        elif time.monotonic() - last > PATIENCE:
            raise _lost(journal, shard, batch)
        else:
            time.sleep(_POLL)


def _lost(journal: Journal, shard: Shard, batch: int) -> PartialError:
    missing: dict[int, int] = {}
    for image_id in journal.missing():
        rank = (image_id - 1) // batch % shard.count
        missing[rank] = missing.get(rank, 0) + 1
    ranks = ", ".join(f"rank {rank} lacks {count:,}" for rank, count in sorted(missing.items()))
    return PartialError(
        f"no picture came for {PATIENCE:g} seconds, and of {shard.count} processes {ranks}",
        "see what ended them; then run again with --resume, with as many processes as you like",
    )
