"""One detector under `engine.benchmark`: what its process does, and the other end of the pipe to it.

The process does nothing but this detector, so that its peak memory is the detector's own, and ends with the one that
started it. Only the standard library is imported at the top: the number of threads has to be set before numpy and torch
load.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from refinedet_cli.engine.memory import is_out_of_memory, peak_memory
from refinedet_cli.errors import DeviceError, RefineDetError

if TYPE_CHECKING:
    import torch

    from refinedet_cli.core.config import Classes
    from refinedet_cli.data.dataset import Dataset
    from refinedet_cli.engine.device import DeviceName, PrecisionName
    from refinedet_cli.engine.predict import AnyPredictor

_READERS = 4
_FAREWELL_SECONDS = 10.0


class Opening(NamedTuple):
    """What to open and how.

    Attributes:
        weights: as a user names them; None is the bundled detector.
        precision: of the network; None leaves it to the weights.
        device: where to compute.
        threads: that compute; None leaves it to torch.
        together: pictures are looked at several at a time, as `detect` does, and not one by one.
    """

    weights: str | None
    precision: PrecisionName | None
    device: DeviceName
    threads: int | None
    together: bool = False


class Opened(NamedTuple):
    """A detector that is ready.

    Attributes:
        path, file_bytes: its file, and its size with all that belongs to it.
        engine: the library that computes, with its version.
        precision: of the network.
        device: as a person names it.
        threads: that compute.
        seconds: from the name to ready.
        classes: that it finds.
    """

    path: Path
    file_bytes: int
    engine: str
    precision: str
    device: str
    threads: int
    seconds: float
    classes: Classes


class RunTime(NamedTuple):
    """Seconds that one batch of pictures took: files to pixels, and pixels to detections."""

    reading: float
    detecting: float


class Memory(NamedTuple):
    """Bytes; None where they cannot be known.

    Attributes:
        peak: the most that the process held.
        libraries: of that, what it held before the detector was opened.
        device_peak: the most that torch held on a CUDA device.
    """

    peak: int | None
    libraries: int | None
    device_peak: int | None


class Accuracy(NamedTuple):
    """The COCO metric's numbers.

    Attributes:
        ap, ap50: None where there is no object.
        scored_classes: that they are of, named as the detector names them.
        complete: whether these are all classes of the data.
        notes: what was left out or done in a special way.
    """

    ap: float | None
    ap50: float | None
    scored_classes: tuple[str, ...]
    complete: bool
    notes: tuple[str, ...]


class LocalSubject:
    """A detector in this process.

    Args:
        opening: what to open and how.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._libraries: int | None = None
        self._predictor: AnyPredictor | None = None

    def prepare(self) -> None:
        """Load the libraries and set the number of threads."""
        import torch

        # For what they import, too: after this a detector of any kind has all but its own library.
        from refinedet_cli.engine import evaluate, open_predictor  # noqa: F401

        if self._opening.threads is not None:
            torch.set_num_threads(self._opening.threads)
        self._libraries = peak_memory()

    def open(self) -> Opened:
        """Make the detector ready.

        Raises:
            RefineDetError: it cannot be used, or not in this way.
        """
        import torch

        from refinedet_cli.engine.device import describe_device, select_device
        from refinedet_cli.engine.lanes import lanes_for
        from refinedet_cli.engine.open_predictor import open_predictor

        device = select_device(self._opening.device)
        started = time.perf_counter()
        lanes = lanes_for(device) if self._opening.together else 1
        predictor = open_predictor(self._opening.weights, device=device, precision=self._opening.precision, lanes=lanes)
        _synchronise(device)
        seconds = time.perf_counter() - started
        self._predictor = predictor
        return Opened(
            path=predictor.path,
            file_bytes=file_bytes(predictor.path),
            engine=predictor.engine,
            precision=predictor.precision,
            device=describe_device(predictor.device),
            threads=torch.get_num_threads(),
            seconds=seconds,
            classes=predictor.classes,
        )

    def time(self, runs: Sequence[Sequence[Path]]) -> tuple[RunTime, ...]:
        """Read and look at batches of pictures, one batch after the other, and take the time of each."""
        return tuple(time_run(self._ready(), paths) for paths in runs)

    def memory(self) -> Memory:
        """Tell what the process has held so far."""
        import torch

        device = self._ready().device
        on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Memory(peak_memory(), self._libraries, on_device)

    def score(self, dataset: Dataset, batch: int, on_progress: Callable[[int], None]) -> Accuracy:
        """Score with the COCO metric over a whole data set.

        Raises:
            DataError: there is no class in common, or a picture cannot be read.
        """
        from refinedet_cli.engine.evaluate import choose_engine, coco_notes, collect, score_coco

        collected = collect(
            self._ready(), dataset, batch=batch, workers=_READERS, on_progress=lambda p: on_progress(p.done)
        )
        engine = choose_engine("auto")
        result = score_coco(collected, engine)
        notes = (*collected.notes, *engine.notes, *coco_notes(collected))
        return Accuracy(
            ap=result.AP,
            ap50=result.AP50,
            scored_classes=collected.scored_classes,
            complete=collected.complete,
            notes=notes,
        )

    def close(self) -> None:
        """Let go of the detector."""
        self._predictor = None

    def _ready(self) -> AnyPredictor:
        if self._predictor is None:
            raise RuntimeError("open the detector first")
        return self._predictor


def time_run(predictor: AnyPredictor, paths: Sequence[Path]) -> RunTime:
    """Read pictures and find the objects in them, together, with the clock beside it."""
    from refinedet_cli.data.images import read_image

    device = predictor.device
    _synchronise(device)
    started = time.perf_counter()
    images = [read_image(path) for path in paths]
    read = time.perf_counter()
    predictor.predict(images)
    _synchronise(device)
    return RunTime(read - started, time.perf_counter() - read)


def file_bytes(path: Path) -> int:
    """Tell the size of a detector, with the file of weights that may lie beside it."""
    beside = {".xml": path.with_suffix(".bin"), ".onnx": path.with_name(path.name + ".data")}.get(path.suffix.lower())
    return path.stat().st_size + (beside.stat().st_size if beside is not None and beside.is_file() else 0)


def _synchronise(device: torch.device) -> None:
    """Wait for a device that works behind our back."""
    if device.type == "cpu":
        return
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Both ends of the pipe -----------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A method of `LocalSubject`, and whether it takes a function that it reports to."""

    method: str
    arguments: tuple[Any, ...] = ()
    reports: bool = False


class _Answer(NamedTuple):
    value: Any


class _Progress(NamedTuple):
    done: int


class _Failed(NamedTuple):
    """An error, and the traceback where it is a bug."""

    error: Exception
    trace: str


class RemoteSubject:
    """A `LocalSubject` in a process of its own; the methods are those of `LocalSubject`, and so are their errors.

    Args:
        opening: what to open and how.

    Raises:
        DeviceError: by any method: the process was killed, as a system short of memory does.
        RefineDetError: by any method: the process died in another way.
    """

    def __init__(self, opening: Opening) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, opening), daemon=True)
        with _without_interrupts():
            self._process.start()
        other.close()
        # Those that are started together load their libraries together.
        with contextlib.suppress(OSError):
            self._connection.send(_Call("prepare"))

    def prepare(self) -> None:
        """Wait until the libraries are loaded, which begins by itself."""
        self._answer()

    def open(self) -> Opened:
        """See `LocalSubject.open`."""
        opened: Opened = self._call("open")
        return opened

    def time(self, runs: Sequence[Sequence[Path]]) -> tuple[RunTime, ...]:
        """See `LocalSubject.time`."""
        times: tuple[RunTime, ...] = self._call("time", runs)
        return times

    def memory(self) -> Memory:
        """See `LocalSubject.memory`."""
        memory: Memory = self._call("memory")
        return memory

    def score(self, dataset: Dataset, batch: int, on_progress: Callable[[int], None]) -> Accuracy:
        """See `LocalSubject.score`."""
        accuracy: Accuracy = self._call("score", dataset, batch, on_progress=on_progress)
        return accuracy

    def close(self) -> None:
        """End the process; nothing that it holds is worth waiting for."""
        self._connection.close()
        self._process.kill()
        self._process.join(_FAREWELL_SECONDS)

    def _call(self, method: str, *arguments: Any, on_progress: Callable[[int], None] | None = None) -> Any:
        # A process that has died may have said why before, so its answer is looked for even then.
        with contextlib.suppress(OSError):
            self._connection.send(_Call(method, arguments, on_progress is not None))
        return self._answer(on_progress)

    def _answer(self, on_progress: Callable[[int], None] | None = None) -> Any:
        while True:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                raise self._death() from None
            if isinstance(answer, _Answer):
                return answer.value
            if isinstance(answer, _Failed):
                raise _as_error(answer)
            if on_progress is not None:
                on_progress(answer.done)

    def _death(self) -> RefineDetError:
        self._process.join(_FAREWELL_SECONDS)
        code = self._process.exitcode
        if code is not None and code == -getattr(signal, "SIGKILL", 9):
            return DeviceError(
                "its process was killed from outside, as a system short of memory does",
                "look at it alone, lower --batch, or free some memory",
            )
        how = f"signal {-code} ({signal.strsignal(-code)})" if code is not None and code < 0 else f"exit code {code}"
        return RefineDetError(f"its process died with {how}", "look at it alone; its library may not fit this machine")


def serve(connection: Connection, opening: Opening) -> None:
    """Be the process of a detector: answer calls until nobody is left to ask."""
    # An interrupt is for the process that started this one, and so is stdout.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    if opening.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(opening.threads)
    subject = LocalSubject(opening)
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer_call(connection, subject)


def answer_call(connection: Connection, subject: LocalSubject) -> None:
    """Take one call from the pipe and answer it.

    Raises:
        EOFError: the other end is closed.
    """
    call: _Call = connection.recv()
    progress = (lambda done: connection.send(_Progress(done)),) if call.reports else ()
    try:
        answer: _Answer | _Failed = _Answer(getattr(subject, call.method)(*call.arguments, *progress))
    except Exception as error:  # told to the other end, which knows what to do about it
        answer = _failed(error)
    connection.send(answer)


def _failed(error: Exception) -> _Failed:
    if isinstance(error, RefineDetError):
        return _Failed(error, "")
    if is_out_of_memory(error):
        first_line = str(error).strip().partition("\n")[0] or "out of memory"
        return _Failed(DeviceError(first_line, "lower --batch, or choose another --device"), "")
    # Not every exception can be sent, so that of a bug goes as text.
    return _Failed(RuntimeError(f"{type(error).__name__}: {error}"), "".join(traceback.format_exception(error)))


def _as_error(failed: _Failed) -> Exception:
    if failed.trace:
        failed.error.add_note(f"In the process of the detector:\n{failed.trace}")
    return failed.error


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let a process that starts here be deaf to Ctrl-C from its first moment; this one hears it afterwards."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    from multiprocessing import resource_tracker

    # With the first process this helper would be started too, and lift the block.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
