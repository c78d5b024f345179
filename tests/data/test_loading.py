"""Training batches: the same whatever the number of workers, the cache, or the step a run goes on from."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from refinedet_cli.core.config import AugmentConfig, Classes, PreprocessConfig
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.core.structures import Target
from refinedet_cli.data.augment import distort_colours, draw_view, view_boxes
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.loading import Batch, Draw, Plan, TrainingSet, collate, make_loader, read_record
from refinedet_cli.errors import DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # one core
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

SIZE = PreprocessConfig(height=64, width=64)
SMALL = PreprocessConfig(height=64, width=128)
PLAIN = AugmentConfig(
    brightness=0, contrast=0, saturation=0, hue=0, expand_probability=0, crop_probability=0, mirror_probability=0
)


def record_of(folder: Path, index: int, width: int, height: int, rows: list[tuple[float, ...]]) -> Record:
    """Rows are (label, x1, y1, x2, y2, crowd, difficult)."""
    pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = folder / f"{index}.png"
    Image.fromarray(pixels).save(path)
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    boxes = table[:, 1:5]
    return Record(
        image_id=index, path=path, width=width, height=height, boxes=boxes, labels=table[:, 0].astype(np.int64),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), crowd=table[:, 5].astype(np.bool_),
        difficult=table[:, 6].astype(np.bool_), annotation_ids=np.arange(len(table)), file_name=path.name,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    records = []
    for index in range(7):
        width, height = (int(v) for v in draw.integers(40, 90, 2))
        rows = []
        for _ in range(index % 4):
            left, top = draw.integers(0, 20, 2)
            rows.append(
                (int(draw.integers(1, 3)), left, top, left + draw.integers(4, 20), top + draw.integers(4, 20), 0, 0)
            )
        records.append(record_of(folder, index, width, height, rows))
    return Dataset("drawn", Classes(names=("a", "b"), category_ids=(1, 2)), tuple(records))


def plan_of(count: int, batch: int, epochs: int, seed: int = 0) -> Plan:
    # Half of the run is wide, so that a size that followed anything but the step would be seen.
    return Plan(count, batch, epochs, seed, lambda done: SMALL if done < 0.5 else SIZE)


def same(first: Iterable[Batch], second: Iterable[Batch]) -> int:
    count = 0
    for a, b in zip(first, second, strict=True):
        assert a.indices == b.indices
        assert torch.equal(a.images, b.images)
        assert a.targets.batch == b.targets.batch
        for x, y in zip(a.targets[:3], b.targets[:3], strict=True):
            assert torch.equal(x, y)
        count += 1
    return count


# The plan.


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (7, 7), (5, 1), (1, 1), (3, 8)])
def test_an_epoch_shows_each_picture_once(count, batch):
    plan = plan_of(count, batch, 5)
    steps = list(plan.batches(0))
    assert len(steps) == plan.steps == 5 * plan.steps_per_epoch
    orders = []
    for epoch in range(5):
        draws = [d for step in steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch] for d in step]
        assert sorted(d.picture for d in draws) == list(range(count))
        assert {d.epoch for d in draws} == {epoch}
        orders.append(tuple(d.picture for d in draws))
    if count > 3:
        assert len(set(orders)) == 5


def test_what_does_not_fill_a_batch_is_left_for_another_epoch():
    plan = plan_of(10, 4, 60)
    steps = list(plan.batches(0))
    assert plan.steps_per_epoch == 2
    assert {len(step) for step in steps} == {4}
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert len({d.picture for d in (*first, *second)}) == 8
    counts = np.bincount([d.picture for step in steps for d in step], minlength=10)
    assert counts.sum() == 480
    assert counts.min() > 35


def test_a_small_data_set_is_taken_whole_at_each_step():
    plan = plan_of(3, 8, 2)
    assert (plan.batch, plan.steps_per_epoch, plan.steps) == (3, 1, 2)


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (9, 3), (2, 2)])
def test_the_plan_goes_on_from_any_step(count, batch):
    plan = plan_of(count, batch, 4)
    whole = list(plan.batches(0))
    for start in range(plan.steps + 1):
        assert list(plan.batches(start)) == whole[start:]


def test_the_seed_decides_the_order():
    first, again, other = (list(plan_of(20, 5, 1, seed).batches(0)) for seed in (0, 0, 1))
    assert first == again != other


def test_sizes_follow_the_share_of_the_run():
    asked = []

    def sizes(done: float) -> PreprocessConfig:
        asked.append(done)
        return SMALL if done < 0.5 else SIZE

    plan = Plan(4, 2, 3, 0, sizes)
    steps = list(plan.batches(0))
    assert asked == [i / 6 for i in range(6)]
    assert [{d.preprocess for d in step} for step in steps] == [{SMALL}] * 3 + [{SIZE}] * 3


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
def test_steps_take_the_place_of_epochs_and_may_end_within_one(steps):
    asked = []

    def sizes(done: float) -> PreprocessConfig:
        asked.append(done)
        return SIZE

    plan = Plan(9, 3, 4, 0, sizes, steps=steps)
    assert (plan.steps, plan.steps_per_epoch, plan.epochs) == (steps, 3, steps / 3)
    taken = list(plan.batches(0))
    assert asked == [i / steps for i in range(steps)]
    # The pictures are those of the same steps of a run that is counted in epochs.
    counted = list(Plan(9, 3, 4, 0, lambda done: SIZE).batches(0))[:steps]
    assert [[d[:3] for d in step] for step in taken] == [[d[:3] for d in step] for step in counted]
    for start in range(steps + 1):
        assert list(plan.batches(start)) == taken[start:]


def test_weighted_pictures_come_by_their_share_and_each_time_as_another_turn():
    weights = np.array([1.0, 1.0, 1.0, 3.0])
    plan = Plan(4, 2, 30, 5, lambda done: SIZE, weights=weights)
    came = np.zeros(4)
    for epoch in range(30):
        draws = [d for step in list(plan.batches(epoch * 2))[:2] for d in step]
        assert len({(d.picture, d.turn) for d in draws}) == 4
        for picture in range(4):
            turns = sorted(d.turn for d in draws if d.picture == picture)
            assert turns == list(range(len(turns)))
            came[picture] += len(turns)
        assert sum(d.picture == 3 for d in draws) == 2
    # Two of three others in every epoch, each as often as the rest.
    assert came[3] == 60
    assert (abs(came[:3] - 20) < 8).all()


# Samples.


def test_a_plain_sample_is_the_picture_and_its_boxes(dataset):
    record = dataset.records[3]
    pixels, target, index = TrainingSet(dataset, PLAIN, 0)[Draw(3, 0, SIZE)]
    image = torch.from_numpy(np.array(Image.open(record.path)))
    assert index == 3
    assert_close(pixels, preprocess(image, SIZE), rtol=0, atol=0)
    scale = [record.width, record.height] * 2
    assert_close(target.boxes, torch.from_numpy(record.boxes / scale).float(), rtol=0, atol=0)
    assert target.labels.tolist() == record.labels.tolist()
    assert (target.boxes.dtype, target.labels.dtype) == (torch.float32, torch.int64)


def test_an_augmented_sample_is_window_then_colours_then_resize(dataset):
    # Colours are changed where the window shows the picture; the mean around it is not.
    config = AugmentConfig(expand_probability=0.7)
    samples = TrainingSet(dataset, config, 5)
    beyond = 0
    for index, record in enumerate(dataset.records):
        for epoch in range(4):
            pixels, target, _ = samples[Draw(index, epoch, SMALL)]
            generator = np.random.default_rng([5, epoch, index])
            view = draw_view(record.height, record.width, record.boxes, config, generator)
            image = np.array(Image.open(record.path))
            left, top = max(view.window.left, 0), max(view.window.top, 0)
            shown = image[top : view.window.bottom, left : view.window.right]
            image = image.copy()
            image[top : view.window.bottom, left : view.window.right] = distort_colours(shown, config, generator)
            beyond += view.window.left < 0
            expected = preprocess(torch.from_numpy(image), SMALL, view.window, view.mirror)
            assert_close(pixels, expected, rtol=0, atol=1e-4)
            moved, kept = view_boxes(record.boxes, view)
            assert_close(target.boxes, torch.from_numpy(moved).float(), rtol=0, atol=0)
            assert target.labels.tolist() == record.labels[kept].tolist()
    assert beyond > 5


def test_crowds_are_not_learned_and_difficult_objects_are(tmp_path):
    rows = [(1, 0, 0, 10, 10, 1, 0), (2, 20, 20, 30, 30, 0, 1), (1, 5, 5, 15, 15, 0, 0)]
    record = record_of(tmp_path, 0, 40, 40, rows)
    data = Dataset("x", Classes(names=("a", "b"), category_ids=(1, 2)), (record,))
    _, target, _ = TrainingSet(data, PLAIN, 0)[Draw(0, 0, SIZE)]
    assert target.labels.tolist() == [2, 1]
    assert_close(target.boxes[0], torch.tensor([0.5, 0.5, 0.75, 0.75]))


def test_samples_do_not_depend_on_what_came_before_or_on_global_generators(dataset):
    samples = TrainingSet(dataset, AugmentConfig(), 1)
    first = samples[Draw(2, 1, SIZE)]
    for i in range(3):
        samples[Draw(i, 0, SIZE)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = samples[Draw(2, 1, SIZE)]
    assert torch.equal(first[0], again[0])
    for other in (TrainingSet(dataset, AugmentConfig(), 2)[Draw(2, 1, SIZE)], samples[Draw(2, 2, SIZE)]):
        assert not torch.equal(first[0], other[0])


def test_an_augmentation_of_one_size_is_that_of_another(dataset):
    # The view is drawn in pixels of the picture, so a smaller input shows the same objects.
    samples = TrainingSet(dataset, AugmentConfig(), 1)
    for i in range(7):
        assert torch.equal(samples[Draw(i, 0, SIZE)][1].boxes, samples[Draw(i, 0, SMALL)][1].boxes)


def test_a_mosaic_shows_each_object_where_its_pixels_are(tmp_path):
    # Every picture is black but for one box in a colour of its class; nothing is cropped or recoloured.
    colours = {1: (250, 0, 0), 2: (0, 250, 0), 3: (0, 0, 250), 4: (250, 250, 0)}
    records = []
    for label, colour in colours.items():
        record = record_of(tmp_path, label, 80, 60, [(label, 16, 12, 64, 48, 0, 0)])
        image = np.zeros((60, 80, 3), dtype=np.uint8)
        image[12:48, 16:64] = colour
        Image.fromarray(image).save(record.path)
        records.append(record)
    data = Dataset("x", Classes(names=("a", "b", "c", "d"), category_ids=(1, 2, 3, 4)), tuple(records))
    samples = TrainingSet(data, replace(PLAIN, mosaic_probability=1.0), 0)
    raw = replace(SIZE, mean=(0.0, 0.0, 0.0))
    seen = set()
    for epoch in range(6):
        pixels, target, index = samples[Draw(2, epoch, raw)]
        assert index == 2
        assert target.labels[0] == 3  # the picture itself is in the first quarter
        assert len(target.labels) == 4
        for box, label in zip(target.boxes * 64, target.labels.tolist(), strict=True):
            seen.add(label)
            left, top, right, bottom = box.tolist()
            inside = pixels[:, round(top) + 2 : round(bottom) - 2, round(left) + 2 : round(right) - 2]
            assert_close(inside, torch.tensor(colours[label])[:, None, None].expand_as(inside).float(), rtol=0, atol=1)
            edge = pixels[:, max(0, round(top) - 3), round(left)]
            assert float(edge.max()) < 40
    assert seen == {1, 2, 3, 4}


def test_mosaics_end_where_the_run_says_and_come_as_often_as_asked(dataset):
    plain = TrainingSet(dataset, replace(PLAIN, mosaic_until=0.6), 0)
    samples = TrainingSet(dataset, replace(PLAIN, mosaic_probability=0.5, mosaic_until=0.6), 0)

    def mosaics(done: float) -> int:
        return sum(
            not torch.equal(samples[Draw(5, epoch, SIZE, 0, done)][0], plain[Draw(5, epoch, SIZE, 0, done)][0])
            for epoch in range(60)
        )

    assert 18 < mosaics(0.0) < 42
    assert 18 < mosaics(0.59) < 42
    assert mosaics(0.6) == 0


def test_a_picture_that_comes_again_in_an_epoch_is_changed_anew(dataset):
    samples = TrainingSet(dataset, AugmentConfig(), 1)
    first, again = samples[Draw(5, 0, SIZE, 0)], samples[Draw(5, 0, SIZE, 1)]
    assert not torch.equal(first[0], again[0])
    assert torch.equal(again[0], samples[Draw(5, 0, SIZE, 1)][0])


def test_objects_that_became_too_small_are_left_out(tmp_path):
    rows = [(1, 0, 0, 10, 40, 0, 0), (2, 20, 20, 30, 30, 0, 0), (1, 5, 5, 9, 15, 0, 0)]
    data = Dataset("x", Classes(names=("a", "b"), category_ids=(1, 2)), (record_of(tmp_path, 0, 40, 40, rows),))
    # 40 px become 64: sides are 16 and 64, 16 and 16, 6.4 and 16.
    for least, labels in ((0.0, [1, 2, 1]), (6.4, [1, 2, 1]), (6.5, [1, 2]), (16.5, [])):
        _, target, _ = TrainingSet(data, replace(PLAIN, min_size=least), 0)[Draw(0, 0, SIZE)]
        assert target.labels.tolist() == labels
        assert target.boxes.shape == (len(labels), 4)


# Batches.


def test_batches_pack_their_pictures(dataset):
    samples = TrainingSet(dataset, PLAIN, 0)
    batch = collate([samples[Draw(i, 0, SIZE)] for i in (3, 0, 2)])
    assert batch.indices == (3, 0, 2)
    assert tuple(batch.images.shape) == (3, 3, 64, 64)
    assert batch.targets.image.tolist() == [0, 0, 0, 2, 2]
    assert batch.targets.batch == 3
    assert batch.targets.labels.tolist() == [*dataset.records[3].labels, *dataset.records[2].labels]


def test_a_batch_without_objects():
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    batch = collate([(torch.zeros(3, 64, 64), empty, i) for i in range(2)])
    assert tuple(batch.targets.boxes.shape) == (0, 4)
    assert batch.targets.image.tolist() == []


@pytest.fixture(scope="module")
def in_this_process(dataset: Dataset) -> list[Batch]:
    return list(make_loader(TrainingSet(dataset, AugmentConfig(), 3), plan_of(7, 3, 2, seed=3), 0, 0, pin=False))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(dataset, in_this_process, workers):
    samples = TrainingSet(dataset, AugmentConfig(), 3)
    assert same(make_loader(samples, plan_of(7, 3, 2, seed=3), 0, workers, pin=False), in_this_process) == 4


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (2, 2), (3, 0), (4, 0)])
def test_a_loader_goes_on_from_any_step(dataset, in_this_process, start, workers):
    samples = TrainingSet(dataset, AugmentConfig(), 3)
    resumed = make_loader(samples, plan_of(7, 3, 2, seed=3), start, workers, pin=False)
    assert same(resumed, in_this_process[start:]) == 4 - start


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_changes_nothing_but_where_pictures_come_from(dataset, in_this_process, workers, monkeypatch):
    samples = TrainingSet(dataset, AugmentConfig(), 3)
    assert samples.cache_bytes() == sum(r.width * r.height * 3 for r in dataset.records)
    main, seen = threading.current_thread(), []
    samples.fill_cache(2, lambda: seen.append(threading.current_thread()))
    assert seen == [main] * 7
    monkeypatch.setattr("refinedet_cli.data.loading.read_image", lambda _: pytest.fail("it is in the cache"))
    assert same(make_loader(samples, plan_of(7, 3, 2, seed=3), 0, workers, pin=False), in_this_process) == 4
    # Nothing wrote into it.
    assert same(make_loader(samples, plan_of(7, 3, 2, seed=3), 0, 0, pin=False), in_this_process) == 4


def test_a_loader_that_is_left_early_ends_its_workers(dataset):
    loader = make_loader(TrainingSet(dataset, PLAIN, 0), plan_of(7, 3, 50), 0, 1, pin=False)
    next(loader)
    assert multiprocessing.active_children()
    loader.close()
    for child in multiprocessing.active_children():
        child.join(timeout=10)
    assert not multiprocessing.active_children()


# Pictures that are not as promised.


def test_a_picture_of_another_size_than_annotated(dataset):
    record = replace(dataset.records[0], width=dataset.records[0].width + 1)
    with pytest.raises(DataError, match=rf"0\.png.*but its annotation says {record.width} x {record.height}") as caught:
        read_record(record)
    assert "EXIF" in (caught.value.hint or "")


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("fault", ["size", "missing"])
def test_a_bad_picture_is_a_plain_error_from_workers_too(dataset, workers, fault):
    records = list(dataset.records)
    path = records[4].path if fault == "size" else records[4].path.with_name("gone.png")
    records[4] = replace(records[4], path=path, height=records[4].height + 5)
    samples = TrainingSet(replace(dataset, records=tuple(records)), PLAIN, 0)
    expected = "annotation says" if fault == "size" else r"gone\.png"
    with pytest.raises(DataError, match=expected) as caught:
        list(make_loader(samples, plan_of(7, 7, 1), 0, workers, pin=False))
    # The error outlives the loader that raised it.
    assert not multiprocessing.active_children()
    assert "Traceback" not in caught.value.message
    assert caught.value.hint
    with pytest.raises(DataError, match=expected):
        samples.fill_cache(2, lambda: None)


def test_a_bug_in_a_sample_is_not_hidden(dataset, monkeypatch):
    monkeypatch.setattr(TrainingSet, "_picture", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(make_loader(TrainingSet(dataset, PLAIN, 0), plan_of(7, 7, 1), 0, 0, pin=False))
