"""How `speed.py` takes times, and what it makes of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from refinedet_cli.engine.benchmark import Ratio, speed_ratio

Work = Callable[[], object]
Sense = Literal["at least", "under", "at most"]
WARM_UP_CALLS = 2


class Sizes(NamedTuple):
    """How large the work is; tests and first tries take less of it.

    Attributes:
        paper, default: presets of the large and of the light detector.
        batch: pictures that are computed together where many are.
        vgg_pictures, light_pictures: of one turn of `detect`.
        photograph: width and height of a large photograph, px.
        cases: random cases of post-processing.
        matrices: sides of the matrices of which the fastest product is the machine's limit.
    """

    paper: str = "refinedet320_vgg16"
    default: str = "refinedet320_mobilenetv2"
    batch: int = 32
    vgg_pictures: int = 16
    light_pictures: int = 64
    photograph: tuple[int, int] = (4000, 3000)
    cases: int = 10_000
    matrices: tuple[int, ...] = (4096, 6144, 8192)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One call of the benchmark.

    Attributes:
        pictures: files to look at, in this order and again from the start.
        folder: for files that are not kept.
        device: where to compute.
        rounds: in each of which every side has one turn.
        turn_seconds: about how long a turn takes, where a call takes less.
        sizes: how large the work is.
        clock: gives seconds.
    """

    pictures: tuple[Path, ...]
    folder: Path
    device: torch.device
    rounds: int
    turn_seconds: float
    sizes: Sizes = field(default_factory=Sizes)
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table.

    Attributes:
        work: what was done.
        ours, theirs: how fast, for people; ``theirs`` is empty where there is nobody to compare with.
        figure: what is judged, over the rounds.
        unit: of the figure and the target: "x" for a ratio, "%" for a share in percent, "ms", "/s" for
            pictures a second, or "".
        target: None where nothing is asked.
        sense: on which side of the target to be.
        seconds: of one call, by side, round by round.
        facts: what else is worth keeping; plain data.
    """

    work: str
    ours: str
    theirs: str = ""
    figure: Ratio
    unit: str = "x"
    target: float | None = None
    sense: Sense = "at least"
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the median is on the right side of the target."""
        if self.target is None:
            return None
        value = self.figure.median
        if self.sense == "at least":
            return value >= self.target
        return value < self.target if self.sense == "under" else value <= self.target


def take_turns(
    bench: Bench, sides: Mapping[str, Work], *, warm_up: int = WARM_UP_CALLS
) -> dict[str, tuple[float, ...]]:
    """Time several ways to do some work, side by side.

    In a round each side has one turn; the next round goes through them backwards (A B, B A, A B ...), so that a machine
    that becomes slower, or others at work on it, hit all sides alike. A turn is as many calls for every side as the
    slowest one makes in ``bench.turn_seconds``, led by one that does not count if a call is so short that there are
    several.

    Args:
        bench: rounds, length of a turn, device and clock.
        sides: each call does the same work.
        warm_up: calls of each side before the first turn.

    Returns:
        for each side the mean seconds of a call, round by round.
    """
    slowest = 0.0
    for work in sides.values():
        for _ in range(warm_up):
            work()
        slowest = max(slowest, time_calls(bench, work, 1))
    calls = max(1, round(bench.turn_seconds / max(slowest, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(bench.rounds):
        for name in list(sides)[:: -1 if i % 2 else 1]:
            if calls > 1:
                sides[name]()
            seconds[name].append(time_calls(bench, sides[name], calls) / calls)
    return {name: tuple(values) for name, values in seconds.items()}


def time_calls(bench: Bench, work: Work, calls: int) -> float:
    """Take the time of some calls, waiting for the device before and after."""
    synchronise(bench.device)
    start = bench.clock()
    for _ in range(calls):
        work()
    synchronise(bench.device)
    return bench.clock() - start


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, which works behind our back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """How many times as fast we are, round by round; 8 of 10 rounds lie from ``low`` to ``high``."""
    return speed_ratio(ours, theirs)


def share(part: Sequence[float], whole: Sequence[float]) -> Ratio:
    """What part of the whole it is, round by round, in percent."""
    return spread([100 * own / all_ for own, all_ in zip(part, whole, strict=True)])


def spread(values: Sequence[float]) -> Ratio:
    """The median, and from where to where 8 of 10 lie."""
    return speed_ratio([1.0] * len(values), values)


def milliseconds(seconds: Sequence[float]) -> Ratio:
    """The same in milliseconds."""
    return spread([1e3 * value for value in seconds])


def rate(seconds: Sequence[float], pictures: int = 1) -> str:
    """Pictures a second of the median call, for people."""
    return f"{number(pictures / spread(seconds).median)} pictures/s"


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
