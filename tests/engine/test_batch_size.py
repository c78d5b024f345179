"""The batch that fits: how it is searched, what is tried, and that running out of memory is only an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import AugmentConfig, Classes, TrainConfig
from refinedet_cli.core.presets import tiny
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.engine import batch_size, memory
from refinedet_cli.engine.batch_size import CpuTrials, CudaTrials, FoundBatch, Load, Trial, find_batch, search
from refinedet_cli.errors import DeviceError, UsageError

CLASSES = Classes(names=("a", "b"), category_ids=(1, 2))


@pytest.fixture
def dataset(dataset_of):
    """Pictures of so many objects and a crowd, which is not trained on: ``dataset(3, 0)``."""

    def make(*counts: int, size: int = 10) -> Dataset:
        labels = [[1] * (count + 1) for count in counts]
        return dataset_of(labels, crowds=list(enumerate(counts)), names=CLASSES.names, size=(size, size))

    return make


@pytest.fixture
def load(run_options):
    """The load of a run with these data; ``train`` are settings of the recipe."""

    def make(data: Dataset, validation: Dataset | None = None, cache: bool = False, **train: Any) -> Load:
        preset = tiny(CLASSES)
        options = run_options(Path("nowhere"), workers=2, cache=cache)
        return Load.of(preset.detector, data, validation, replace(preset.train, **train), options)

    return make


# The search.


def machine(memory: int, speeds: Callable[[int], float] = float) -> tuple[Callable[[int], Trial], list[int]]:
    """A device that takes so many pictures, at these pictures/s."""
    tried: list[int] = []

    def attempt(batch: int) -> Trial:
        tried.append(batch)
        fits = batch <= memory
        return Trial(batch, batch * 10**9, fits, speeds(batch) if fits else None)

    return attempt, tried


@pytest.mark.parametrize(
    ("memory", "wanted", "most", "expected", "tried"),
    [
        pytest.param(1000, 16, 100, 64, [1, 2, 4, 8, 16, 32, 64], id="the data ends it"),
        pytest.param(40, 16, 1000, 32, [1, 2, 4, 8, 16, 32, 64, 48], id="memory, and the middle does not fit"),
        pytest.param(50, 16, 1000, 48, [1, 2, 4, 8, 16, 32, 64, 48], id="memory, and the middle fits"),
        pytest.param(50, 16, 40, 32, [1, 2, 4, 8, 16, 32], id="the middle is never tried for nothing"),
        pytest.param(7, 16, 1000, 4, [1, 2, 4, 8], id="no middle that is a multiple of 8"),
        pytest.param(1, 16, 1000, 1, [1, 2], id="one"),
        pytest.param(1000, 16, 1, 1, [1], id="one picture"),
    ],
)
def test_batches_double_until_something_ends_it(memory, wanted, most, expected, tried):
    attempt, seen = machine(memory)
    found = search(attempt, wanted=wanted, most=most)
    assert (found.batch, seen) == (expected, tried)
    assert [t.batch for t in found.trials] == tried


def test_speed_ends_it_only_beyond_the_batch_of_the_recipe():
    attempt, tried = machine(1000, lambda batch: 50.0)  # never faster
    assert search(attempt, wanted=16, most=1000).batch == 16
    assert tried == [1, 2, 4, 8, 16, 32]
    attempt, _ = machine(1000, lambda batch: min(batch, 64.0))
    found = search(attempt, wanted=16, most=1000)
    assert (found.batch, found.why) == (64, "128 is no faster (64 pictures/s against 64)")
    attempt, _ = machine(1000, lambda batch: min(batch, 64.0) + batch / 100)
    assert search(attempt, wanted=16, most=1000).why.startswith("128 is hardly faster (65.3 pictures/s against 64.6)")


def test_a_batch_that_is_no_power_of_two_is_met_from_below_or_above():
    attempt, _ = machine(1000, lambda batch: 50.0)
    assert search(attempt, wanted=20, most=1000).batch == 16


def test_no_memory_for_one_picture_is_said_with_cures():
    attempt, _ = machine(0)
    with pytest.raises(DeviceError, match=r"no memory to train with a batch of 1, which would take 1\.00 GB") as caught:
        search(attempt, wanted=16, most=100)
    assert "preprocess.height" in (caught.value.hint or "")


def test_the_note_says_what_was_found_and_why():
    trials = (Trial(16, 2_500_000_000, True, 9.0), Trial(32, None, False, None))
    found = FoundBatch(16, "32 does not fit into memory", trials, allowed=4_000_000_000, crowd=1200)
    assert found.note == (
        "batch: 16 found by trial with up to 1,200 objects a picture, which takes 2.50 GB of the 4.00 GB that may be "
        "taken; 32 does not fit into memory"
    )
    assert FoundBatch(16, "why", (Trial(16, 5, True, 1.0),)).note == "batch: 16 found by trial; why"


# The worst case.


def test_the_fullest_pictures_are_tried(dataset, load):
    data = dataset(3, 0, 9, 5)
    assert load(data).counts(2) == [9, 5]
    assert load(data).counts(6) == [9, 5, 3, 0, 9, 5]
    assert load(data, balance=0.1).counts(2) == [9, 9]  # pictures repeat
    mosaics = AugmentConfig(mosaic_probability=0.5)
    assert load(data, augment=mosaics).counts(2) == [9 + 27, 5 + 27]
    batch = batch_size.worst_batch(load(data), 2)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.targets.image.tolist() == [0] * 9 + [1] * 5
    boxes = batch.targets.boxes
    assert bool(((boxes[:, :2] >= 0) & (boxes[:, 2:] <= 1) & (boxes[:, 2:] > boxes[:, :2])).all())
    assert set(batch.targets.labels.tolist()) <= {1, 2}


def test_what_lies_ready_counts(dataset, load):
    data, validation = dataset(1, 1, size=100), dataset(0, 0, 0, size=20)
    input_bytes = 3 * 64 * 64 * 4
    assert load(data).loading_bytes(2) == 9 * 2 * input_bytes  # two workers with four batches each, and one in use
    with_all = load(data, validation, cache=True)
    assert with_all.loading_bytes(1) == 9 * input_bytes + 2 * 30_000 + 3 * 1200


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trial_holds_all_that_a_run_will(monkeypatch, accumulate, dataset, load):
    seen = []
    real = batch_size._evaluate

    def evaluate(detector, load, batch):
        seen.append((batch, [p.grad is not None for p in detector.network.parameters() if p.requires_grad]))
        real(detector, load, batch)

    monkeypatch.setattr(batch_size, "_evaluate", evaluate)
    recipe = {"freeze_stages": 2, "unfreeze": ((0.5, 0),), "small_input": ((0.5, 0.5),), "accumulate": accumulate}
    detector = build(tiny(CLASSES).detector)
    speed = batch_size.train_worst(detector, load(dataset(2, 1), **recipe), 2)
    assert speed > 0
    ((batch, gradients),) = seen  # once, while gradients and the optimiser's state are there
    assert batch == 2 // accumulate
    assert all(gradients)
    assert all(p.requires_grad for n, p in detector.network.named_parameters() if n.startswith("backbone.features.0.0"))


# On the CPU.


def test_a_batch_is_found_on_the_cpu_and_the_detector_left_alone(tmp_path, monkeypatch, dataset, run_options):
    monkeypatch.chdir(tmp_path)
    detector = build(tiny(CLASSES).detector)
    before = {n: t.clone() for n, t in detector.network.state_dict().items()}
    generator = torch.random.get_rng_state()
    recipe = TrainConfig(batch=1, warmup_steps=0)
    found = find_batch(detector, dataset(*([2] * 17)), None, recipe, run_options(Path("nowhere")))
    assert found.batch in (1, 2)
    assert found.crowd == 2
    first = found.trials[0]
    assert first.fits
    assert first.needed is not None
    assert found.allowed is not None
    assert 1e6 < first.needed < found.allowed
    torch.testing.assert_close(detector.network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert list(tmp_path.iterdir()) == []


def fake_pool(trials: CpuTrials, outcome: Callable[[int], object]) -> list[int]:
    asked: list[int] = []

    def submit(function, load, batch):
        asked.append(batch)
        value = outcome(batch)

        def result():
            if isinstance(value, Exception):
                raise value
            return value

        return SimpleNamespace(result=result)

    trials._pool = SimpleNamespace(submit=submit)  # type: ignore[assignment]
    trials._held = 0
    return asked


def test_what_cannot_fit_is_not_tried(dataset, load):
    trials = CpuTrials(replace(load(dataset(1)), workers=0), allowed=1_000_000)
    base = trials.load.loading_bytes(1)
    asked = fake_pool(trials, lambda batch: (100_000 * batch, 5.0))
    assert [trials(b).fits for b in (1, 2, 4)] == [True, True, True]
    beyond = trials(8)
    assert (beyond.fits, beyond.pictures_per_second, asked) == (False, None, [1, 2, 4])
    assert beyond.needed == 8 * (100_000 + base)


@pytest.mark.parametrize("outcome", [None, batch_size.BrokenProcessPool("killed")])
def test_a_process_out_of_memory_is_an_answer(outcome, dataset, load):
    trials = CpuTrials(load(dataset(1)), allowed=10**12)
    fake_pool(trials, lambda batch: outcome)
    assert trials(4) == Trial(4, None, fits=False, pictures_per_second=None)


def test_where_memory_cannot_be_known_only_speed_counts(dataset, load):
    trials = CpuTrials(load(dataset(1)), allowed=None)
    fake_pool(trials, lambda batch: (None, 5.0))
    assert trials(4) == Trial(4, None, fits=True, pictures_per_second=5.0)


def test_a_try_in_its_process_tells_memory_from_a_bug(monkeypatch, dataset, load):
    def fails(error):
        def train(*args):
            raise error

        return train

    monkeypatch.setattr(batch_size, "train_worst", fails(MemoryError()))
    assert batch_size._try(load(dataset(1)), 1) is None
    monkeypatch.setattr(batch_size, "train_worst", fails(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        batch_size._try(load(dataset(1)), 1)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n"}, 4_096_000),
        ({"meminfo": "MemAvailable: 4000 kB\n", "memory.max": "max\n", "memory.current": "5\n"}, 4_096_000),
        ({"meminfo": "MemAvailable: 4000 kB\n", "memory.max": "1000\n", "memory.current": "400\n"}, 600),
        ({"meminfo": "MemAvailable: 4000 kB\n", "memory.max": "1000\n", "memory.current": "1400\n"}, 0),
        ({}, None),
    ],
)
def test_free_memory_is_that_of_the_system_or_its_container(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert memory.free_memory() == expected


# On a GPU.


def fake_cuda(monkeypatch: pytest.MonkeyPatch, takes: Callable[[int], int]) -> list[str]:
    """A GPU of 10 GB, 1 GB of which others hold; a trial with a batch reserves so many bytes."""
    log: list[str] = []
    state = {"peak": 0}

    def train_worst(detector, load, batch):
        state["peak"] = takes(batch)
        if state["peak"] > 9 * 10**9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10.0 * batch

    monkeypatch.setattr(batch_size, "train_worst", train_worst)
    fakes = {
        "mem_get_info": lambda device: (9 * 10**9, 10 * 10**9),
        "memory_reserved": lambda device: 0,
        "max_memory_reserved": lambda device: state["peak"],
        "reset_peak_memory_stats": lambda device: log.append("reset"),
        "empty_cache": lambda: log.append("empty"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


def test_a_gpu_is_filled_up_to_a_margin(monkeypatch, dataset, load):
    log = fake_cuda(monkeypatch, lambda batch: batch * 10**9)
    detector = build(tiny(CLASSES).detector)
    trials = CudaTrials(detector, replace(load(dataset(1)), device=torch.device("cuda")))
    assert trials.allowed == 8_100_000_000
    found = search(trials, wanted=16, most=10_000)
    assert [(t.batch, t.fits) for t in found.trials][-2:] == [(8, True), (16, False)]
    assert (found.batch, found.why) == (8, "16 does not fit into memory")
    # Emptied before and after each.
    assert log == ["empty", *["empty", "reset", "empty"] * len(found.trials)]


def test_what_fits_only_without_the_margin_does_not_fit(monkeypatch, dataset, load):
    fake_cuda(monkeypatch, lambda batch: batch * 85 * 10**8)
    trials = CudaTrials(build(tiny(CLASSES).detector), replace(load(dataset(1)), device=torch.device("cuda")))
    assert trials(1) == Trial(1, 8_500_000_000, fits=False, pictures_per_second=10.0)


def test_a_bug_on_a_gpu_is_no_answer(monkeypatch, dataset, load):
    log = fake_cuda(monkeypatch, lambda batch: batch)

    def fails(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(batch_size, "train_worst", fails)
    trials = CudaTrials(build(tiny(CLASSES).detector), replace(load(dataset(1)), device=torch.device("cuda")))
    with pytest.raises(RuntimeError, match="a bug"):
        trials(1)
    assert log[-1] == "empty"


@pytest.mark.gpu
def test_a_batch_is_found_on_a_gpu(dataset, run_options):
    detector = build(tiny(CLASSES).detector)
    detector.network.to("cuda")
    held = torch.cuda.memory_allocated()
    found = find_batch(
        detector,
        dataset(*([3] * 600)),
        None,
        TrainConfig(batch=8),
        run_options(Path("nowhere"), workers=2, device=torch.device("cuda")),
    )
    assert found.batch >= 8
    assert found.batch <= 75
    assert torch.cuda.memory_allocated() <= held + (1 << 20)


def test_other_devices_cannot_be_measured(dataset, run_options):
    detector = build(tiny(CLASSES).detector)
    with pytest.raises(UsageError, match="cannot measure the memory of mps"):
        find_batch(detector, dataset(1), None, TrainConfig(), run_options(Path("nowhere"), device=torch.device("mps")))
