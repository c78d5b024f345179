"""Side by side: what is counted, in which order, and what becomes of a detector that fails."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.data.images import read_image
from refinedet_cli.engine import benchmark as benchmark_module
from refinedet_cli.engine import benchmark_worker
from refinedet_cli.engine.artefact import SUFFIXES
from refinedet_cli.engine.benchmark import (
    RUNS_A_TURN,
    WARM_UP_RUNS,
    Asked,
    BenchmarkOptions,
    Failed,
    Latency,
    Machine,
    Measured,
    Ratio,
    Turn,
    ask,
    benchmark,
    draw_pictures,
    latency,
    percentile,
    plan_turns,
    speed_ratio,
    spread,
    take_turns,
)
from refinedet_cli.engine.benchmark_worker import (
    Accuracy,
    LocalSubject,
    Memory,
    Opened,
    Opening,
    RemoteSubject,
    RunTime,
    answer_call,
    file_bytes,
    time_run,
)
from refinedet_cli.engine.device import PrecisionName
from refinedet_cli.engine.memory import is_out_of_memory, peak_memory
from refinedet_cli.errors import CheckpointError, DataError, DeviceError, RefineDetError, UsageError

CLASSES = Classes(names=("cat", "dog"), category_ids=(1, 2))
PATHS = [Path(f"{i}.jpg") for i in range(4)]


class FakeSubject:
    """Takes no time but says that it took some: ``detecting`` seconds a run, and reading always 0.5."""

    def __init__(self, opening, log=None, detecting=1.0, fails=None, accuracy=None):
        self.name = opening.weights
        self.log = [] if log is None else log
        self.detecting, self.fails, self.accuracy = detecting, fails or {}, accuracy

    def _step(self, name):
        self.log.append((self.name, name))
        if name in self.fails:
            raise self.fails[name]

    def prepare(self):
        self._step("prepare")

    def open(self):
        self._step("open")
        return Opened(Path(self.name), 10, "fake 1", "fp32", "cpu (1 threads)", 1, 0.1, CLASSES)

    def time(self, runs):
        self._step("time")
        # The uncounted run takes far longer, so that counting it shows.
        return tuple(RunTime(0.5, 99.0 if i == 0 else self.detecting) for i in range(len(runs)))

    def memory(self):
        self._step("memory")
        return Memory(300, 100, None)

    def score(self, dataset, batch, on_progress):
        self._step("score")
        on_progress(len(dataset))
        return self.accuracy

    def close(self):
        self._step("close")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def dataset(pictures: Path) -> Path:
    """A data set of the pictures, in which the second has an object."""
    path = pictures / "pets.json"
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40 + i} for i in range(3)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory, save_random) -> Path:
    return save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", get_preset("tiny", CLASSES).detector)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(pictures: Path, *names: str, **other) -> BenchmarkOptions:
    return BenchmarkOptions(detectors=ask(names, None), **{"sources": (str(pictures),), "runs": 7, **other})


def starting(log, **of_name):
    """Start fakes, each with its own settings."""
    return lambda opening: FakeSubject(opening, log, **of_name.get(opening.weights, {}))


# Statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        pytest.param([3.0], 50, 3.0, id="one value is every percentile"),
        pytest.param([3.0], 99, 3.0, id="one value is the 99th too"),
        pytest.param([4.0, 1.0], 50, 1.0, id="half of two do not exceed the smaller"),
        pytest.param([1.0, 2.0, 3.0], 50, 2.0, id="median of three"),
        pytest.param(list(range(1, 11)), 90, 9, id="nine of ten"),
        pytest.param(list(range(1, 101)), 99, 99, id="99 of 100"),
        pytest.param(list(range(1, 100)), 99, 99, id="of fewer than 100 the longest"),
        pytest.param(list(range(1, 102)), 99, 100, id="100 of 101"),
        pytest.param([5, 1, 1, 1], 75, 1, id="ties"),
        pytest.param([1, 2, 3], 100, 3, id="all"),
    ],
)
def test_percentiles_by_hand(values, percent, expected):
    assert percentile(values, percent) == expected


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.sampled_from([10, 50, 90, 99]))
def test_percentiles_are_those_of_numpy(values, percent):
    assert percentile(values, percent) == np.quantile(values, percent / 100, method="inverted_cdf")


def test_latency_of_batches():
    found = latency([0.010, 0.020, 0.030, 0.040], batch=4)
    assert found == pytest.approx(Latency(20, 40, 40, 25, 160))


def test_a_ratio_is_taken_within_turns():
    # Whatever slows a turn slows both; the ratio of the medians would be 2.5.
    assert speed_ratio([1, 10, 100], [2, 25, 200]) == Ratio(2, 2, 2.5)
    assert speed_ratio([2, 2], [1, 1]) == Ratio(0.5, 0.5, 0.5)


# Turns ---------------------------------------------------------------------------------------------------------------


def test_turns_go_round_the_pictures_and_begin_with_a_run_that_is_not_counted():
    a, b, c, d = PATHS
    turns = plan_turns(PATHS, runs=7, batch=1)
    assert [turn.runs for turn in turns] == [((a,), (a,), (b,), (c,), (d,), (a,)), ((c,), (b,), (c,))]
    assert sum(len(turn.runs) - 1 for turn in turns) == 7


def test_turns_of_batches():
    a, b, c, d = PATHS
    (turn,) = plan_turns(PATHS, runs=2, batch=3)
    assert turn.runs == ((d, a, b), (a, b, c), (d, a, b))


@pytest.mark.parametrize(
    ("there", "count", "expected"),
    [(4, 10, [0, 1, 2, 3]), (4, 2, [0, 2]), (4, 1, [0]), (4, 3, [0, 1, 2]), (1, 5, [0])],
)
def test_pictures_are_chosen_evenly(there, count, expected):
    assert spread(PATHS[:there], count) == tuple(PATHS[i] for i in expected)


def test_every_row_takes_every_turn_in_changing_order():
    log = []

    class Row:
        def __init__(self, name):
            self.name = name

        def take_turn(self, turn):
            log.append((turn, self.name))

    turns = [Turn(((Path(str(i)),),)) for i in range(40)]
    take_turns([Row("a"), Row("b"), Row("c")], turns)
    orders = [tuple(name for _, name in log[i : i + 3]) for i in range(0, len(log), 3)]
    assert [turn for turn, _ in log] == [turn for turn in turns for _ in range(3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) == 6, "each order comes up"


# What is asked -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "precision", "expected"),
    [
        pytest.param((), None, [("refinedet320_mobilenetv2", "refinedet320_mobilenetv2", None)], id="bundled"),
        pytest.param(
            ("runs/a.safetensors", "runs/a.safetensors:bf16"),
            None,
            [
                ("a.safetensors", "runs/a.safetensors", None),
                ("a.safetensors bf16", "runs/a.safetensors", "bf16"),
            ],
            id="one in two precisions",
        ),
        pytest.param(
            ("a/best.onnx", "b/best.onnx", "b/best.onnx:bf16"),
            None,
            [
                ("a/best.onnx", "a/best.onnx", None),
                ("b/best.onnx", "b/best.onnx", None),
                ("b/best.onnx bf16", "b/best.onnx", "bf16"),
            ],
            id="folders where names are equal",
        ),
        pytest.param(("a.pt2", "a.pt2"), None, [("a.pt2", "a.pt2", None)] * 2, id="the same twice"),
        pytest.param(
            ("a.onnx", "b.safetensors", "c.safetensors:fp32", "d.XML:bf16"),
            "bf16",
            [
                ("a.onnx", "a.onnx", None),
                ("b.safetensors", "b.safetensors", "bf16"),
                ("c.safetensors fp32", "c.safetensors", "fp32"),
                ("d.XML bf16", "d.XML", "bf16"),
            ],
            id="the option is for checkpoints that do not say theirs",
        ),
        pytest.param(
            ("me/pets:small.safetensors",),
            None,
            [("pets:small.safetensors", "me/pets:small.safetensors", None)],
            id="a file on the Hub",
        ),
    ],
)
def test_names_and_precisions(names, precision, expected):
    assert [tuple(asked) for asked in ask(names, precision)] == expected


def test_a_file_that_ends_like_a_precision_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:bf16").touch()
    assert ask(["a:bf16"], None) == (Asked("a:bf16", "a:bf16", None),)


def test_every_precision_can_be_asked_for():
    assert get_args(PrecisionName) == benchmark_module._PRECISIONS


def test_every_exported_format_is_known_as_such():
    # Written twice, so that the process that only waits need not load torch.
    assert set(SUFFIXES.values()) == benchmark_module._EXPORTED


# The whole, with fakes -----------------------------------------------------------------------------------------------


def test_all_are_ready_before_the_first_is_timed_and_all_are_closed(pictures):
    log = []
    result = benchmark(options(pictures, "a", "b"), start=starting(log, a={"detecting": 2.0}))
    steps = [step for _, step in log]
    assert steps[:6] == ["prepare", "prepare", "open", "time", "open", "time"]
    assert sorted(log[-2:]) == [("a", "close"), ("b", "close")]
    assert steps.count("time") == 2 * (1 + 2)  # the warm-up and two turns each
    a, b = result.rows
    assert isinstance(a, Measured)
    assert (a.first_ms, a.in_memory.p99_ms, a.from_file.p99_ms) == (99_000, 2_000, 2_500)
    assert [len(turn) for turn in a.turns] == [RUNS_A_TURN, 2]
    assert result.reference is a
    assert result.changes[0] is None
    assert result.changes[1].speed == Ratio(2, 2, 2)
    assert result.changes[1].speed_from_file == pytest.approx((2.5 / 1.5,) * 3)
    assert (b.accuracy, result.changes[1].ap) == (None, None)
    assert result.pictures.kind == "pictures"
    assert result.pictures.megapixels == pytest.approx(60 * 41 / 1e6)


@pytest.mark.parametrize("step", ["prepare", "open", "time", "memory"])
def test_one_that_fails_takes_no_further_part(pictures, step):
    log, error = [], CheckpointError("no")
    result = benchmark(options(pictures, "a", "b"), start=starting(log, a={"fails": {step: error}}))
    of_a = [s for name, s in log if name == "a"]
    assert of_a[of_a.index(step) :] == [step, "close", "close"]
    assert result.failed == (Failed(Asked("a", "a", None), error),)
    assert result.reference is result.rows[1]
    assert result.changes == (None, None)


def test_where_all_fail_there_is_no_reference(pictures):
    result = benchmark(options(pictures, "a"), start=starting([], a={"fails": {"open": RuntimeError("bug")}}))
    assert (result.reference, len(result.failed), result.notes) == (None, 1, ())


def test_an_interrupt_closes_all(pictures):
    log = []
    with pytest.raises(KeyboardInterrupt):
        benchmark(options(pictures, "a", "b"), start=starting(log, b={"fails": {"time": KeyboardInterrupt()}}))
    assert {("a", "close"), ("b", "close")} <= set(log)


def test_accuracies_are_compared_only_over_the_same_classes(dataset):
    def accuracy(ap, ap50, *classes):
        return {"accuracy": Accuracy(ap, ap50, classes, True, ("by the way",))}

    found = {
        "a": accuracy(0.5, 0.75, "cat", "dog"),
        "b": accuracy(0.25, None, "dog", "cat"),
        "c": accuracy(0.75, 1.0, "cat"),
    }
    asked = BenchmarkOptions(detectors=ask("abc", None), datasets=(str(dataset),), runs=1)
    result = benchmark(asked, start=starting([], **found))
    assert [(c.ap, c.ap50) for c in result.changes[1:]] == [(-0.25, None), (None, None)]
    assert sum("by the way" in note for note in result.notes) == 1
    assert sum("c and a do not score the same classes" in note for note in result.notes) == 1
    assert (result.pictures.kind, len(result.pictures.dataset)) == ("dataset", 3)


def test_data_without_a_shared_class_is_refused_before_the_clock_starts(dataset):
    text = dataset.read_text().replace('"cat"', '"red cell"').replace('"dog"', '"white cell"')
    dataset.write_text(text)
    log = []
    asked = BenchmarkOptions(detectors=ask("a", None), datasets=(str(dataset),), runs=1)
    result = benchmark(asked, start=starting(log))
    assert isinstance(result.failed[0].error, DataError)
    assert ("a", "time") not in log


def test_pictures_are_named_once(pictures, dataset):
    with pytest.raises(UsageError, match="--dataset and by --source"):
        benchmark(options(pictures, "a", datasets=(str(dataset),)), start=starting([]))


def test_a_picture_that_cannot_be_read_is_told_before_anything_is_loaded(pictures):
    (pictures / "1.png").write_bytes(b"no picture")
    log = []
    with pytest.raises(DataError, match=r"1\.png"):
        benchmark(options(pictures, "a"), start=starting(log))
    assert log == []


def test_pictures_are_drawn_where_none_are_named(pictures, tmp_path):
    result = benchmark(options(pictures, "a", sources=()), start=starting([]))
    assert result.pictures.kind == "drawn"
    assert any("were drawn" in note for note in result.notes)
    assert not any(path.exists() for path in result.pictures.paths)
    drawn = draw_pictures(tmp_path)
    assert {read_image(path).shape for path in drawn} == {(375, 500, 3)}
    # As large as photographs of this size: 0.1 MB.
    assert all(60_000 < path.stat().st_size < 150_000 for path in drawn)


@pytest.mark.parametrize(("load", "told"), [(0.2, False), (1.4, False), (1.6, True), (None, False)])
def test_a_busy_machine_is_told(pictures, monkeypatch, load, told):
    machine = Machine("", 2, "", "", {}, load)
    monkeypatch.setattr(benchmark_module, "_machine", lambda: machine)
    result = benchmark(options(pictures, "a"), start=starting([]))
    assert any("others are at work" in note for note in result.notes) == told


# One in this process -------------------------------------------------------------------------------------------------


def test_the_clock_parts_reading_from_detecting(pictures, monkeypatch):
    seen = []

    class Slow:
        device = torch.device("cpu")

        def predict(self, images):
            seen.append([image.shape for image in images])
            time.sleep(0.05)

    def slow_read(path):
        time.sleep(0.01)
        return read_image(path)

    monkeypatch.setattr("refinedet_cli.data.images.read_image", slow_read)
    run = time_run(Slow(), [pictures / "0.png", pictures / "2.png"])
    assert seen == [[(40, 60, 3), (42, 60, 3)]]
    assert run.reading >= 0.02
    assert run.detecting >= 0.05


def test_a_gpu_is_waited_for_before_the_clock_is_read(pictures, monkeypatch):
    events = []

    class OnGpu:
        device = torch.device("cuda", 0)

        def predict(self, images):
            events.append("predict")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    time_run(OnGpu(), [pictures / "0.png"])
    assert events == ["wait", "predict", "wait"]


@pytest.mark.parametrize(("together", "lanes"), [(False, 1), (True, 2)])
def test_a_batch_is_shared_out_as_detect_does(weights, threads, together, lanes):
    subject = LocalSubject(Opening(str(weights), None, "cpu", 2, together))
    subject.prepare()
    assert subject.open().threads == 2
    assert subject._ready()._lanes.count == lanes


def test_a_detector_is_opened_timed_and_scored(weights, dataset, threads):
    subject = LocalSubject(Opening(str(weights), "bf16", "cpu", 1))
    with pytest.raises(RuntimeError, match="open"):
        subject.memory()
    subject.prepare()
    opened = subject.open()
    assert (opened.path, opened.file_bytes) == (weights, weights.stat().st_size)
    assert (opened.precision, opened.threads, opened.classes) == ("bf16", 1, CLASSES)
    assert opened.engine.startswith("torch ")
    assert 0 < opened.seconds < 60
    times = subject.time([[dataset.with_name("0.png")], [dataset.with_name("1.png")] * 2])
    assert len(times) == 2
    memory = subject.memory()
    assert memory.device_peak is None
    assert memory.peak >= memory.libraries > 10e6
    seen = []
    from refinedet_cli.data.source import open_dataset

    accuracy = subject.score(open_dataset(str(dataset), split="val"), 2, seen.append)
    assert seen == [2, 3]
    assert (accuracy.complete, accuracy.scored_classes) == (True, ("cat", "dog"))
    assert 0 <= accuracy.ap <= accuracy.ap50 <= 1


def test_the_size_counts_weights_beside_the_file(tmp_path):
    for name, size in (("a.xml", 3), ("a.bin", 5), ("b.onnx", 7), ("b.onnx.data", 11), ("b.bin", 100), ("c.pt2", 13)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert [file_bytes(tmp_path / name) for name in ("a.xml", "b.onnx", "c.pt2")] == [8, 18, 13]


def test_peak_memory_is_what_this_process_held_and_not_the_one_that_started_it():
    mine = peak_memory()
    if mine is None:
        pytest.skip("this system does not tell")
    program = (
        "from refinedet_cli.engine.memory import peak_memory; before = peak_memory(); "
        "held = b'x' * 60_000_000; del held; print(before, peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < mine / 3
    assert after - before == pytest.approx(60e6, rel=0.05)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("m"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: m"), True),
        (RuntimeError("m"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error, expected):
    assert is_out_of_memory(error) is expected


# Both ends of the pipe -----------------------------------------------------------------------------------------------


def called(method, *arguments, reports=False, **behaviour):
    """What comes back through the pipe, a fake being at the other end."""
    ours, theirs = multiprocessing.Pipe()
    ours.send(benchmark_worker._Call(method, arguments, reports))
    answer_call(theirs, FakeSubject(Opening("a", None, "cpu", None), **behaviour))
    answers = []
    while ours.poll():
        answers.append(ours.recv())
    ours.close()
    theirs.close()
    return answers


def test_answers_and_progress_come_through():
    assert called("memory") == [benchmark_worker._Answer(Memory(300, 100, None))]
    accuracy = Accuracy(None, None, (), False, ())
    assert called("score", "xyz", 1, reports=True, accuracy=accuracy) == [
        benchmark_worker._Progress(3),
        benchmark_worker._Answer(accuracy),
    ]


def test_a_users_error_comes_through_as_it_is():
    (failed,) = called("open", fails={"open": CheckpointError("damaged", "copy it")})
    assert (type(failed.error), failed.error.message, failed.error.hint) == (CheckpointError, "damaged", "copy it")
    assert failed.trace == ""


def test_out_of_memory_comes_through_as_the_devices_error():
    (failed,) = called("open", fails={"open": torch.OutOfMemoryError("no room\nfor this")})
    assert (type(failed.error), failed.error.message) == (DeviceError, "no room")
    (failed,) = called("open", fails={"open": MemoryError()})
    assert failed.error.message == "out of memory"


def test_a_bug_comes_through_with_its_traceback():
    class UnsendableError(Exception):
        pass

    (failed,) = called("open", fails={"open": UnsendableError("oh")})
    error = benchmark_worker._as_error(failed)
    assert not isinstance(error, RefineDetError)
    assert str(error).endswith("UnsendableError: oh")
    assert "in _step" in error.__notes__[0]


def test_a_process_of_its_own_from_beginning_to_death(weights, pictures):
    """One process for all of this: each takes seconds to load torch."""
    subject = RemoteSubject(Opening(str(weights), None, "cpu", 1))
    try:
        subject.prepare()
        opened = subject.open()
        assert (opened.path, opened.precision, opened.threads) == (weights, "fp32", 1)
        (run,) = subject.time([[pictures / "0.png"]])
        assert run.reading > 0 < run.detecting
        with pytest.raises(DataError, match="gone"):
            subject.time([[pictures / "gone.png"]])
        status = Path(f"/proc/{subject._process.pid}/status")
        if status.is_file():
            (blocked,) = re.findall(r"^SigBlk:\s*(\w+)$", status.read_text(), re.MULTILINE)
            assert int(blocked, 16) & 1 << (signal.SIGINT - 1), "Ctrl-C is not for this process"
        subject._process.kill()
        with pytest.raises(DeviceError, match="killed from outside"):
            subject.time([[pictures / "0.png"]])
    finally:
        subject.close()
    assert not multiprocessing.active_children()


def test_threads_can_be_set_before_anything_that_uses_them_loads():
    program = (
        "import sys; heavy = {'numpy', 'torch'}\n"
        "import refinedet_cli.engine.benchmark_worker; print(*heavy & set(sys.modules))\n"
        "import refinedet_cli.engine.benchmark; print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # The process that only waits for the others needs no torch either; that numpy is there shows that the probe works.
    assert done.stdout.splitlines() == ["", "numpy"]


def test_another_death_is_told_with_its_signal():
    subject = object.__new__(RemoteSubject)

    class Dead:
        exitcode = -signal.SIGSEGV

        def join(self, timeout):
            pass

    subject._process = Dead()
    assert "signal 11" in str(subject._death())
    Dead.exitcode = 3
    assert "exit code 3" in str(subject._death())


def test_an_interrupt_waits_until_a_process_has_started():
    arrived = []
    before = signal.signal(signal.SIGINT, lambda *_: arrived.append(1))

    def blocked():
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())

    try:
        with benchmark_worker._without_interrupts():
            assert blocked()
            signal.raise_signal(signal.SIGINT)
            assert arrived == []
        assert len(arrived) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert not blocked()


def test_the_warm_up_is_as_long_as_said(pictures):
    seen = []

    class Counting(FakeSubject):
        def time(self, runs):
            seen.append(len(runs))
            return super().time(runs)

    benchmark(replace(options(pictures, "a"), runs=1, batch=2), start=Counting)
    assert seen == [WARM_UP_RUNS, 2]
