"""Where the time of a run of `detect` went, and what would make it shorter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from refinedet_cli.engine.stages import StageName, Stages

# What the main thread does, one after the other, and what other threads do meanwhile.
_IN_TURN: tuple[StageName, ...] = (
    "wait for pictures",
    "prepare",
    "network",
    "post-processing",
    "record",
    "wait for drawing",
    "wait for processes",
    "outputs",
)
_BESIDE: tuple[StageName, ...] = ("read", "draw and write")
_REST: Literal["everything else"] = "everything else"


@dataclass(frozen=True)
class StageTime:
    """What a stage took.

    Attributes:
        stage: its name.
        threads: that could be in it at a time.
        seconds: that threads were in it, added up.
        share: of the time that these threads had, in [0, 1].
        ms_per_picture: milliseconds of one thread a picture.
    """

    stage: StageName | Literal["everything else"]
    threads: int
    seconds: float
    share: float
    ms_per_picture: float


@dataclass(frozen=True)
class Profile:
    """Where the time of a run went.

    Attributes:
        seconds: the run took.
        pictures: that were worked on.
        in_turn: stages that follow one another, with all else last; they add up to ``seconds``.
        beside: stages of other threads, at the same time.
        advice: what would make it shorter; None where the network took most of it.
    """

    seconds: float
    pictures: int
    in_turn: tuple[StageTime, ...]
    beside: tuple[StageTime, ...]
    advice: str | None

    @property
    def bottleneck(self) -> StageTime:
        """The stage in turn that took longest; what goes on beside is none unless somebody waited for it."""
        return max(self.in_turn, key=lambda time: time.seconds)

    @property
    def verdict(self) -> str:
        """One sentence: what the bottleneck is and, if it is not the network, what would help."""
        time = self.bottleneck
        advice = f"; {self.advice}" if self.advice else ""
        return f"{_CALLED[time.stage]} is the bottleneck: {time.share:.0%} of the time{advice}"


_CALLED = {
    "wait for pictures": "reading pictures",
    "prepare": "resizing pictures",
    "network": "the network",
    "post-processing": "post-processing",
    "record": "recording what was found",
    "wait for drawing": "drawing and writing pictures",
    "wait for processes": "another process",
    "outputs": "writing the outputs at the end",
    _REST: "what is done once for a run",
}
_ADVICE = {
    "wait for pictures": "more processor cores, a faster disk or smaller pictures would help",
    "prepare": "smaller pictures would help",
    "post-processing": "a higher --score would help",
    "record": "a higher --score or a faster disk would help",
    "wait for drawing": "--no-draw, more processor cores or a faster disk would help",
    "wait for processes": "a smaller --batch shares the pictures out more evenly",
    "outputs": "a higher --score or a faster disk would help",
    _REST: "more pictures in one run would help",
}


def make_clock(device: torch.device) -> Stages:
    """Make the clock of a run that computes on a device."""
    if device.type == "cuda":
        return Stages(partial(torch.cuda.synchronize, device))
    return Stages(torch.mps.synchronize if device.type == "mps" else None)


def profile_of(clock: Stages, *, seconds: float, pictures: int, threads: int, could_reduce: bool) -> Profile:
    """Sum up what a clock has measured.

    Args:
        clock: of the run.
        seconds: that the run took.
        pictures: that were worked on.
        threads: that read, and that draw.
        could_reduce: whether large JPEGs would be read at reduced size if nothing were drawn or cut out.
    """

    def of(stage: StageName | Literal["everything else"], spent: float, threads: int = 1) -> StageTime:
        return StageTime(
            stage, threads, spent, spent / max(threads * seconds, 1e-9), 1000 * spent / pictures if pictures else 0.0
        )

    in_turn = [of(stage, clock.seconds(stage)) for stage in _IN_TURN]
    in_turn.append(of(_REST, max(0.0, seconds - sum(time.seconds for time in in_turn))))
    beside = tuple(of(stage, clock.seconds(stage), threads) for stage in _BESIDE)
    profile = Profile(seconds, pictures, tuple(in_turn), beside, None)
    return replace(profile, advice=_advice(profile.bottleneck.stage, could_reduce))


def _advice(stage: str, could_reduce: bool) -> str | None:
    advice = _ADVICE.get(stage)
    if could_reduce and stage in ("wait for pictures", "prepare"):
        return (
            f"{advice}, and so would reading large JPEGs at reduced size, which is done where nothing is drawn or cut"
        )
    return advice
