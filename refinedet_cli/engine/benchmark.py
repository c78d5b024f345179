"""How fast detectors are, what they take, and how well they find: side by side, under the same conditions.

Every detector, a checkpoint or an exported file, has a process of its own (`engine.benchmark_worker`), so that its
memory is its own. All are ready before the first is timed, and they take short turns on the same pictures in an order
that is drawn anew each time: whatever else the machine does falls on all alike, and a ratio is taken between times that
are neighbours. A turn begins with a run that is not counted, which brings the detector back into the caches and lets
the threads of the one before fall asleep.
"""

from __future__ import annotations

import os
import platform
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, remap
from refinedet_cli.data.images import read_image
from refinedet_cli.data.listing import find_images
from refinedet_cli.data.source import find_splits, open_joined
from refinedet_cli.engine.benchmark_worker import Accuracy, Memory, Opened, Opening, RemoteSubject, RunTime
from refinedet_cli.engine.cores import usable_cores
from refinedet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from refinedet_cli.engine.device import DeviceName, PrecisionName

QUANTILE_RULE = "nearest rank: the shortest measured time that is not exceeded by that share of all"
WARM_UP_RUNS = 5
RUNS_A_TURN = 5
# With fewer, the 99th percentile is the longest time there was.
RUNS_FOR_P99 = 100

_PRECISIONS: tuple[PrecisionName, ...] = ("auto", "fp32", "bf16")
# Their precision is in the file, and not for an option to choose.
_EXPORTED = frozenset({".onnx", ".xml", ".pt2"})
_LIBRARIES = ("torch", "onnxruntime", "openvino")
# Of a load, what programs in the background make up.
_LOAD_OF_NOBODY = 0.5
_DRAWN_PICTURES = 8
_DRAWN_SIZE = (500, 375)
_SEED = 0
_T = TypeVar("_T")


class Asked(NamedTuple):
    """A detector as a user names it.

    Attributes:
        name: for people; only what is asked for twice has one name twice.
        weights: to be opened.
        precision: of the network; None leaves it to the weights.
    """

    name: str
    weights: str
    precision: PrecisionName | None


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What to measure.

    Attributes:
        detectors: at least one; the others are compared with the first.
        datasets, split, images, root: data to look at and to score on, as `data.source.open_joined` takes them.
        sources: pictures to look at where there is no data set.
        device: where to compute.
        batch: pictures computed together.
        runs: that are counted, of so many pictures each.
        threads: of each detector; None leaves it to torch.
    """

    detectors: tuple[Asked, ...]
    datasets: tuple[str, ...] = ()
    split: Literal["train", "val", "test"] = "val"
    images: Path | None = None
    root: Path | None = None
    sources: tuple[str, ...] = ()
    device: DeviceName = "auto"
    batch: int = 1
    runs: int = 100
    threads: int | None = None


class BenchmarkProgress(NamedTuple):
    """What is being done, and how far it is; ``total`` is None where that is not known."""

    doing: str
    done: int = 0
    total: int | None = None


class Pictures(NamedTuple):
    """What is looked at.

    Attributes:
        kind: where they come from.
        source: as the user named it; empty for drawn ones.
        part: of the data set; None where it has none or the source names it.
        paths: the files, in the order in which they are looked at, each once.
        megapixels: mean of these.
        dataset: to score on; None for mere pictures.
    """

    kind: Literal["dataset", "pictures", "drawn"]
    source: str
    part: str | None
    paths: tuple[Path, ...]
    megapixels: float
    dataset: Dataset | None


class Turn(NamedTuple):
    """What each detector does before the next one may: batches of pictures, of which the first is not counted."""

    runs: tuple[tuple[Path, ...], ...]


class Latency(NamedTuple):
    """How long one run takes, in milliseconds, by `QUANTILE_RULE`, and how many pictures a second that are."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    pictures_per_second: float


class Ratio(NamedTuple):
    """How many times as fast as another, turn by turn: the median of the turns, and 8 of 10 lie from low to high."""

    median: float
    low: float
    high: float


class Change(NamedTuple):
    """What a detector has more (or less) than the one it is compared with.

    Attributes:
        speed, speed_from_file: in how much less time it looks at a picture, and at a file.
        ap, ap50: None where either has none, or they are not of the same classes.
    """

    speed: Ratio
    speed_from_file: Ratio
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A detector that went all the way.

    Attributes:
        asked, opened, memory: which it is, and what it takes.
        first_ms: of the very first run, from pixels to detections.
        turns: the times of the counted runs.
        in_memory: of a run from pixels to detections.
        from_file: of a run from files to detections.
        accuracy: None without a data set.
    """

    asked: Asked
    opened: Opened
    memory: Memory
    first_ms: float
    turns: tuple[tuple[RunTime, ...], ...]
    in_memory: Latency
    from_file: Latency
    accuracy: Accuracy | None


class Failed(NamedTuple):
    """A detector that could not be measured, and why; an error other than a `RefineDetError` is a bug."""

    asked: Asked
    error: Exception


class Machine(NamedTuple):
    """Where it was measured.

    Attributes:
        processor: its name.
        cpus: that this process may use.
        system, python: with their versions.
        libraries: version of each that computes, or None where it is not installed.
        load: processes that wanted a CPU in the minute before; None where the system does not tell.
    """

    processor: str
    cpus: int
    system: str
    python: str
    libraries: dict[str, str | None]
    load: float | None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All that was measured.

    Attributes:
        rows: in the order asked for.
        changes: of each row against ``reference``; None for that itself and for those that failed.
        reference: the first that could be measured; None if none could.
        pictures, machine, options: under which conditions.
        notes: what there is to know, one line each.
    """

    rows: tuple[Measured | Failed, ...]
    changes: tuple[Change | None, ...]
    reference: Measured | None
    pictures: Pictures
    machine: Machine
    options: BenchmarkOptions
    notes: tuple[str, ...]

    @property
    def measured(self) -> tuple[Measured, ...]:
        """The rows that were measured."""
        return tuple(row for row in self.rows if isinstance(row, Measured))

    @property
    def failed(self) -> tuple[Failed, ...]:
        """The rows that were not."""
        return tuple(row for row in self.rows if isinstance(row, Failed))


class Subject(Protocol):
    """What is measured: a `RemoteSubject`, or a `LocalSubject` in this process."""

    def prepare(self) -> None:
        """Load the libraries."""

    def open(self) -> Opened:
        """Make the detector ready."""

    def time(self, runs: Sequence[Sequence[Path]]) -> tuple[RunTime, ...]:
        """Look at batches of pictures."""

    def memory(self) -> Memory:
        """Tell what was held so far."""

    def score(self, dataset: Dataset, batch: int, on_progress: Callable[[int], None]) -> Accuracy:
        """Score over a data set."""

    def close(self) -> None:
        """Let go of everything."""


def ignore(progress: BenchmarkProgress) -> None:
    """Take no notice of progress."""


def ask(names: Sequence[str], precision: PrecisionName | None) -> tuple[Asked, ...]:
    """Read what a user wants to have measured.

    Args:
        names: weights, each with ``:fp32``, ``:bf16`` or ``:auto`` at its end or not; none is the bundled detector.
        precision: of those that do not say theirs and are not exported.

    Returns:
        at least one. Their names are those of the files where that tells them apart, else as the user wrote them.
    """
    if not names:
        # Here, for it loads torch, which this process has no other use for.
        from refinedet_cli.zoo.hub import DEFAULT_WEIGHTS

        names = (DEFAULT_WEIGHTS,)
    parted = [_part(text) for text in names]
    short = [Path(weights).name for weights, _ in parted]
    told_apart = len(set(short)) == len({weights for weights, _ in parted})
    found = []
    for name, (weights, own) in zip(short, parted, strict=True):
        shown = name if told_apart else weights
        exported = Path(weights).suffix.lower() in _EXPORTED
        found.append(Asked(f"{shown} {own}" if own else shown, weights, own or (None if exported else precision)))
    return tuple(found)


def _part(text: str) -> tuple[str, PrecisionName | None]:
    """Part weights from the precision at their end, if there is one."""
    front, _, end = text.rpartition(":")
    if front and not Path(text).exists():
        for known in _PRECISIONS:
            if end == known:
                return front, known
    return text, None


def benchmark(
    options: BenchmarkOptions,
    *,
    start: Callable[[Opening], Subject] = RemoteSubject,
    on_progress: Callable[[BenchmarkProgress], None] = ignore,
) -> Benchmark:
    """Measure detectors side by side.

    Args:
        options: what and how.
        start: begins a detector; by default in a process of its own.
        on_progress: called whenever something was done.

    Returns:
        `Benchmark`; a detector that cannot be opened, or fails on the way, is a `Failed` and the others go on.

    Raises:
        DataError: there are no pictures, or one that is to be looked at cannot be read.
        UsageError: pictures are named twice over.
    """
    with ExitStack() as stack:
        machine = _machine()
        on_progress(BenchmarkProgress("reading pictures"))
        pictures = _pictures(options, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="refinedet-"))))
        rows = [_Row(asked, options, start, stack) for asked in options.detectors]
        for row in rows:
            on_progress(BenchmarkProgress(f"loading {row.asked.name}"))
            row.attempt(lambda subject: subject.prepare())
        # One after the other: loading is timed.
        for row in rows:
            on_progress(BenchmarkProgress(f"loading {row.asked.name}"))
            row.open(pictures)
        take_turns(rows, plan_turns(pictures.paths, options.runs, options.batch), on_progress)
        for row in rows:
            row.finish(pictures.dataset, on_progress)
    return _summary(tuple(row.result() for row in rows), pictures, machine, options)


class _Row:
    """A detector on its way; from its first failure on, it takes no further part."""

    def __init__(
        self, asked: Asked, options: BenchmarkOptions, start: Callable[[Opening], Subject], stack: ExitStack
    ) -> None:
        self.asked = asked
        self.batch = options.batch
        self.error: Exception | None = None
        self.turns: list[tuple[RunTime, ...]] = []
        self.first: RunTime | None = None
        self._opened: Opened | None = None
        self._memory: Memory | None = None
        self._accuracy: Accuracy | None = None
        opening = Opening(asked.weights, asked.precision, options.device, options.threads, options.batch > 1)
        self._subject = stack.enter_context(closing(start(opening)))

    def attempt(self, step: Callable[[Subject], _T]) -> _T | None:
        """Go one step; None where it or an earlier one failed."""
        if self.error is not None:
            return None
        try:
            return step(self._subject)
        except Exception as error:  # a bug, too: the others go on, and the end tells of it
            self.error = error
            self._subject.close()
            return None

    def open(self, pictures: Pictures) -> None:
        """Open, see that there is something to score, and warm up."""
        self._opened = opened = self.attempt(lambda subject: subject.open())
        if opened is None:
            return
        if pictures.dataset is not None:
            data = pictures.dataset
            self.attempt(lambda _: remap(data, opened.classes))
        warm_up = [take(pictures.paths, i * self.batch, self.batch) for i in range(WARM_UP_RUNS)]
        times = self.attempt(lambda subject: subject.time(warm_up))
        self.first = times[0] if times else None

    def take_turn(self, turn: Turn) -> None:
        """Look at the pictures of a turn."""
        times = self.attempt(lambda subject: subject.time(turn.runs))
        if times is not None:
            self.turns.append(times[1:])

    def finish(self, dataset: Dataset | None, on_progress: Callable[[BenchmarkProgress], None]) -> None:
        """Take stock of memory, then score."""
        self._memory = self.attempt(lambda subject: subject.memory())
        if dataset is None:
            return
        doing, total = f"scoring {self.asked.name}", len(dataset)

        def show(done: int) -> None:
            on_progress(BenchmarkProgress(doing, done, total))

        show(0)
        self._accuracy = self.attempt(lambda subject: subject.score(dataset, self.batch, show))

    def result(self) -> Measured | Failed:
        """What came of it."""
        if self.error is not None:
            return Failed(self.asked, self.error)
        if self._opened is None or self._memory is None or self.first is None:
            raise RuntimeError(f"{self.asked.name} was neither measured nor failed")
        runs = [run for turn in self.turns for run in turn]
        return Measured(
            asked=self.asked,
            opened=self._opened,
            memory=self._memory,
            first_ms=1e3 * self.first.detecting,
            turns=tuple(self.turns),
            in_memory=latency([run.detecting for run in runs], self.batch),
            from_file=latency([run.reading + run.detecting for run in runs], self.batch),
            accuracy=self._accuracy,
        )


# Turns ---------------------------------------------------------------------------------------------------------------


class TurnTaker(Protocol):
    """Who looks at the pictures of a turn."""

    def take_turn(self, turn: Turn) -> None:
        """Look at them."""


def plan_turns(paths: Sequence[Path], runs: int, batch: int) -> tuple[Turn, ...]:
    """Lay out which pictures are looked at when.

    Args:
        paths: taken in turn, from the beginning again after the last.
        runs: to be counted.
        batch: pictures of a run.

    Returns:
        turns of `RUNS_A_TURN` counted runs, the last one perhaps shorter, each led by its own last run, uncounted.
    """
    counted = [take(paths, i * batch, batch) for i in range(runs)]
    turns = [tuple(counted[i : i + RUNS_A_TURN]) for i in range(0, runs, RUNS_A_TURN)]
    return tuple(Turn((turn[-1], *turn)) for turn in turns)


def take(paths: Sequence[Path], first: int, count: int) -> tuple[Path, ...]:
    """Take pictures in turn, from the beginning again after the last."""
    return tuple(paths[i % len(paths)] for i in range(first, first + count))


def take_turns(
    rows: Sequence[TurnTaker], turns: Sequence[Turn], on_progress: Callable[[BenchmarkProgress], None] = ignore
) -> None:
    """Let each row take each turn, in an order that is drawn anew for every turn."""
    draw = random.Random(_SEED)
    for done, turn in enumerate(turns):
        on_progress(BenchmarkProgress("taking turns", done, len(turns)))
        for row in draw.sample(rows, len(rows)):
            row.take_turn(turn)


# Pictures ------------------------------------------------------------------------------------------------------------


def _pictures(options: BenchmarkOptions, folder: Path) -> Pictures:
    """Find what is to be looked at, and read it once, so that nobody pays for a disk that is slow the first time."""
    if options.datasets and options.sources:
        raise UsageError("pictures are named twice, by --dataset and by --source", "leave one of them out")
    kind: Literal["dataset", "pictures", "drawn"] = "drawn"
    source, part, dataset = "", None, None
    if options.datasets:
        kind, source = "dataset", " + ".join(options.datasets)
        dataset = open_joined(options.datasets, split=options.split, images=options.images, root=options.root)
        if not dataset.records:
            raise DataError(f"{dataset.name} has no pictures to score", "name another data set or split")
        part = options.split if any(find_splits(name, options.root) for name in options.datasets) else None
        paths = [record.path for record in dataset.records]
    elif options.sources:
        kind, source = "pictures", ", ".join(options.sources)
        paths = [image.path for image in find_images(options.sources)]
    else:
        paths = draw_pictures(folder)
    chosen = spread(paths, options.runs * options.batch)
    pixels = [image.shape[0] * image.shape[1] for image in map(read_image, chosen)]
    return Pictures(kind, source, part, chosen, sum(pixels) / len(pixels) / 1e6, dataset)


def spread(paths: Sequence[Path], count: int) -> tuple[Path, ...]:
    """Choose at most so many pictures, evenly from the first to the last."""
    count = min(count, len(paths))
    return tuple(paths[i * len(paths) // count] for i in range(count))


def draw_pictures(folder: Path) -> list[Path]:
    """Draw pictures of the usual size: gradients, boxes, and grain that makes a JPEG as large as a photograph's."""
    width, height = _DRAWN_SIZE
    down, right = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    paths = []
    for i in range(_DRAWN_PICTURES):
        draw = np.random.default_rng(i)
        colours = draw.uniform(0, 255, (3, 3))
        pixels = colours[0] + down[..., None] * (colours[1] - colours[0]) + right[..., None] * (colours[2] - colours[0])
        for _ in range(12):
            left, top = draw.integers(0, width - 40), draw.integers(0, height - 40)
            wide, high = draw.integers(20, 200, 2)
            pixels[top : top + high, left : left + wide] = draw.uniform(0, 255, 3)
        pixels += draw.normal(0, 14, pixels.shape)
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


# Numbers -------------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least so many percent of all do not exceed: always one of them.

    Args:
        values: at least one, in any order.
        percent: 1 to 100.
    """
    ordered = sorted(values)
    return ordered[-(-percent * len(ordered) // 100) - 1]


def latency(seconds: Sequence[float], batch: int) -> Latency:
    """Sum up runs of ``batch`` pictures each."""
    p50, p90, p99 = (1e3 * percentile(seconds, percent) for percent in (50, 90, 99))
    mean = sum(seconds) / len(seconds)
    return Latency(p50, p90, p99, 1e3 * mean, batch / max(mean, 1e-9))


def speed_ratio(seconds: Sequence[float], others: Sequence[float]) -> Ratio:
    """How many times as fast a row is as another, from the seconds that each took for the same turns."""
    ratios = [other / max(own, 1e-9) for own, other in zip(seconds, others, strict=True)]
    return Ratio(percentile(ratios, 50), percentile(ratios, 10), percentile(ratios, 90))


def compare(row: Measured, reference: Measured) -> Change:
    """Tell what a row has more than another."""
    own, other = row.accuracy, reference.accuracy
    ap = ap50 = None
    if own is not None and other is not None and _same_classes(own, other):
        ap, ap50 = _difference(own.ap, other.ap), _difference(own.ap50, other.ap50)
    return Change(
        speed=speed_ratio(_detecting(row), _detecting(reference)),
        speed_from_file=speed_ratio(_all(row), _all(reference)),
        ap=ap,
        ap50=ap50,
    )


def _same_classes(own: Accuracy, other: Accuracy) -> bool:
    return set(own.scored_classes) == set(other.scored_classes)


def _detecting(row: Measured) -> list[float]:
    return [sum(run.detecting for run in turn) for turn in row.turns]


def _all(row: Measured) -> list[float]:
    return [sum(run.reading + run.detecting for run in turn) for turn in row.turns]


def _difference(own: float | None, other: float | None) -> float | None:
    return None if own is None or other is None else own - other


def _summary(
    rows: tuple[Measured | Failed, ...], pictures: Pictures, machine: Machine, options: BenchmarkOptions
) -> Benchmark:
    measured = [row for row in rows if isinstance(row, Measured)]
    reference = measured[0] if measured else None
    return Benchmark(
        rows=rows,
        changes=tuple(
            None if reference is None or row is reference or isinstance(row, Failed) else compare(row, reference)
            for row in rows
        ),
        reference=reference,
        pictures=pictures,
        machine=machine,
        options=options,
        notes=tuple(dict.fromkeys(_notes(measured, pictures, machine))),
    )


def _notes(measured: Sequence[Measured], pictures: Pictures, machine: Machine) -> Iterator[str]:
    if not measured:
        return
    if pictures.kind == "drawn":
        yield (
            f"no pictures were named, so {len(pictures.paths)} were drawn, of {_DRAWN_SIZE[0]} x {_DRAWN_SIZE[1]} px: "
            "--source times yours, and --dataset scores, too"
        )
    first, threads = measured[0].accuracy, measured[0].opened.threads
    if machine.load is not None and machine.load + threads > machine.cpus + _LOAD_OF_NOBODY:
        yield (
            f"others are at work here (load {machine.load:.1f} before the start, {counted(machine.cpus, 'CPU')}): "
            "times are longer than on an idle machine; the ratios suffer least"
        )
    for row in measured:
        if row.accuracy is not None:
            yield from row.accuracy.notes
            if first is not None and not _same_classes(row.accuracy, first):
                yield (
                    f"{row.asked.name} and {measured[0].asked.name} do not score the same classes, so their AP is not "
                    "compared"
                )


# The machine ---------------------------------------------------------------------------------------------------------


def _machine() -> Machine:
    return Machine(
        processor=_processor(),
        cpus=usable_cores(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        libraries={name: _version(name) for name in _LIBRARIES},
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _processor() -> str:
    """The name that the processor gives itself, which Python does not tell on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
