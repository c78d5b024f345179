from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine import evaluate as module
from refinedet_cli.engine.evaluate import (
    Collected,
    Evaluation,
    EvaluationProgress,
    coco_notes,
    collect_saved,
    evaluate,
    in_classes_of,
    resample,
    score_coco,
    score_voc,
    voc_notes,
    with_postprocess,
)
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.results import SavedDetections, origin_of, read_results, write_results
from refinedet_cli.errors import DataError
from refinedet_cli.metrics.coco import CocoResult
from refinedet_cli.metrics.intervals import differences, draw_pictures
from refinedet_cli.metrics.voc import VOC2007, VOC2012
from refinedet_cli.zoo.checkpoint import load_detector, save_checkpoint

SUMMARY = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


def classes_of(*names: str) -> Classes:
    return Classes(names=names, category_ids=tuple(range(11, 11 + len(names))))


def a_record(folder: Path, image_id: int, *rows: tuple[float, ...], size: tuple[int, int] = (40, 30)) -> Record:
    """A picture whose first pixel tells its id; rows are (label, x1, y1, x2, y2)."""
    draw = np.random.default_rng(image_id)
    pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[0, 0] = image_id
    path = folder / f"{image_id}.png"
    Image.fromarray(pixels).save(path)
    return with_objects(Record(image_id, path, *size, *_nothing(), path.name), *rows)


def _nothing() -> tuple[np.ndarray, ...]:
    kinds = (np.float64, np.int64, np.float64, np.bool_, np.bool_, np.int64)
    return tuple(np.zeros((0, 4) if i == 0 else 0, dtype=kind) for i, kind in enumerate(kinds))


def with_objects(record: Record, *rows: tuple[float, ...]) -> Record:
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    boxes, count = table[:, 1:], len(table)
    return replace(
        record,
        boxes=boxes,
        labels=table[:, 0].astype(np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        crowd=np.zeros(count, dtype=np.bool_),
        difficult=np.zeros(count, dtype=np.bool_),
        annotation_ids=np.arange(count) + 100 * record.image_id,
    )


class Oracle:
    """Stands in for a predictor: finds what it was told to find in the picture whose first pixel names it."""

    def __init__(self, classes: Classes, found: dict[int, Sequence[tuple[float, ...]]]) -> None:
        self.classes, self.found = classes, found
        self.batches: list[int] = []

    def predict(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Rows are (label, score, x1, y1, x2, y2), best first."""
        self.batches.append(len(images))
        tables = [torch.tensor(self.found.get(int(i[0, 0, 0]), []), dtype=torch.float64) for i in images]
        tables = [t.reshape(-1, 6) for t in tables]
        return [Detections(t[:, 2:].float(), t[:, 1].float(), t[:, 0].long()) for t in tables]


def score(predictor: object, dataset: Dataset, *, batch: int = 2, workers: int = 2) -> Evaluation:
    return evaluate(predictor, dataset, batch=batch, workers=workers)  # type: ignore[arg-type]


def summary(result: CocoResult) -> dict[str, float | None]:
    return {name: getattr(result, name) for name in SUMMARY}


def check_same(one: Evaluation, other: Evaluation) -> None:
    assert summary(one.result) == summary(other.result)
    assert one.result.per_class == other.result.per_class
    np.testing.assert_array_equal(one.result.precision, other.result.precision)
    np.testing.assert_array_equal(one.result.recall, other.result.recall)
    # Sums of another order may move a score's last written decimal.
    np.testing.assert_allclose(one.result.scores, other.result.scores, rtol=0, atol=1.1e-6)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A tiny detector with random weights, through its file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = get_preset("tiny", classes_of("dog", "sofa", "aeroplane")).detector
    config = replace(config, postprocess=replace(config.postprocess, candidates=100, keep=30))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network = build(config).network
        for name, parameter in network.named_parameters():
            if name.startswith("odm."):
                parameter.data *= 3  # fresh weights score all places alike
    save_checkpoint(path, config, network.state_dict(), {})
    return Predictor(load_detector(path), device=torch.device("cpu"), precision="fp32")


@pytest.fixture(scope="module")
def noise(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Pictures of noise; the objects lie near some of what the detector says, so that it is right now and then."""
    folder = tmp_path_factory.mktemp("noise")
    draw = np.random.default_rng(0)
    records = []
    for i in range(1, 16):
        record = a_record(folder, i, size=(int(draw.integers(30, 200)), int(draw.integers(30, 200))))
        found = predictor.predict([np.array(Image.open(record.path))])[0]
        chosen = draw.permutation(len(found))[: draw.integers(0, 6)]
        boxes = found.boxes.double().numpy()[chosen]
        boxes = boxes + draw.normal(0, 0.04, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        records.append(with_objects(record, *np.column_stack([found.labels.numpy()[chosen], boxes]).tolist()))
    return Dataset("noise", predictor.classes, tuple(records))


@pytest.fixture(scope="module")
def reference(predictor: Predictor, noise: Dataset) -> Evaluation:
    return score(predictor, noise, batch=4, workers=1)


def test_the_case_is_not_trivial(reference: Evaluation) -> None:
    assert reference.result.AP is not None
    assert 0.02 < reference.result.AP < 0.98
    assert len({c.AP for c in reference.result.per_class}) == 3


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_does_not_matter(predictor: Predictor, noise: Dataset, reference: Evaluation, batch: int) -> None:
    check_same(score(predictor, noise, batch=batch), reference)


def test_large_pictures_are_looked_at_a_few_at_a_time(
    predictor: Predictor, noise: Dataset, reference: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(r.width * r.height * 3 for r in noise.records)
    monkeypatch.setattr(module, "HELD_BYTES", largest)
    read: list[Path] = []
    looked_at: list[Any] = []
    together: list[int] = []
    ahead: list[int] = []

    class Counting:
        classes, config = predictor.classes, predictor.config

        def predict(self, images: Sequence[Any]) -> list[Detections]:
            together.append(sum(image.nbytes for image in images))
            looked_at.extend(images)
            ahead.append(len(read) - len(looked_at))
            return predictor.predict(images)

    real = module.read_record
    monkeypatch.setattr(module, "read_record", lambda record: read.append(record.path) or real(record))
    check_same(score(Counting(), noise, batch=64, workers=1), reference)
    assert max(together) < 2 * largest
    assert len(looked_at) == len(noise)
    assert max(ahead) <= 1 + largest // min(r.width * r.height * 3 for r in noise.records)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_worker_count_does_not_matter(
    predictor: Predictor, noise: Dataset, reference: Evaluation, workers: int
) -> None:
    check_same(score(predictor, noise, batch=4, workers=workers), reference)


def test_order_of_records_does_not_matter(predictor: Predictor, noise: Dataset, reference: Evaluation) -> None:
    order = np.random.default_rng(1).permutation(len(noise))
    shuffled = replace(noise, records=tuple(noise.records[i] for i in order))
    other = score(predictor, shuffled, batch=4)
    check_same(other, reference)
    assert [p.image_id for p in other.pictures] == [p.image_id for p in reference.pictures] == list(range(1, 16))


def test_the_written_detections_lead_pycocotools_to_the_same_numbers(
    predictor: Predictor, noise: Dataset, reference: Evaluation, tmp_path: Path
) -> None:
    origin = origin_of(predictor, score_threshold=0.01)
    write_results(tmp_path / "detections.json", reference.pictures, predictor.classes, origin)
    annotations = [
        {
            "id": int(i),
            "image_id": r.image_id,
            "category_id": int(label) + 10,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": float(area),
            "iscrowd": 0,
        }
        for r in noise.records
        for i, label, box, area in zip(r.annotation_ids, r.labels, r.boxes.tolist(), r.areas, strict=True)
    ]
    categories = [{"id": i, "name": n} for i, n in zip(noise.classes.category_ids, noise.classes.names, strict=True)]
    truth = {"info": {}, "images": [{"id": r.image_id} for r in noise.records]}
    (tmp_path / "truth.json").write_text(json.dumps({**truth, "categories": categories, "annotations": annotations}))
    written = json.loads((tmp_path / "detections.json").read_text())["annotations"]
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO(str(tmp_path / "truth.json"))
        evaluator = COCOeval(data, data.loadRes(written), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ours = [-1.0 if v is None else v for v in summary(reference.result).values()]
    assert ours == evaluator.stats.tolist()


def test_scores_count_as_they_are_written(tmp_path: Path) -> None:
    # Unrounded, the wrong box of the second picture would be the better one; in the file the two are equal.
    records = (a_record(tmp_path, 1, (1, 2, 2, 20, 20)), a_record(tmp_path, 2))
    found = {1: [(1, 0.5, 2, 2, 20, 20)], 2: [(1, 0.5 + 1e-7, 2, 2, 20, 20)]}
    evaluation = score(Oracle(classes_of("dog"), found), Dataset("tie", classes_of("dog"), records))
    assert float(evaluation.pictures[1].detections.scores[0]) > float(evaluation.pictures[0].detections.scores[0])
    assert evaluation.result.AP50 is not None
    assert evaluation.result.AP50 > 0.99


def test_other_postprocessing_leaves_the_detector_as_it_is(predictor: Predictor, noise: Dataset) -> None:
    before = predictor.config.postprocess
    few = replace(before, keep=3, score_threshold=0.4)
    changed = with_postprocess(predictor.loaded, few)
    evaluation = score(Predictor(changed, device=torch.device("cpu"), precision="fp32"), noise, batch=15)
    assert changed.config.postprocess == few
    assert changed.detector.network is predictor.loaded.detector.network
    assert max(len(p.detections) for p in evaluation.pictures) == 3
    assert min(float(p.detections.scores.min()) for p in evaluation.pictures if len(p.detections)) > 0.4
    assert predictor.config.postprocess == before


def test_perfect_detections(tmp_path: Path) -> None:
    classes = classes_of("dog", "cat")
    dataset = Dataset(
        "two", classes, (a_record(tmp_path, 1, (1, 2, 3, 20, 25)), a_record(tmp_path, 2, (2, 5, 5, 30, 30)))
    )
    predictor = Oracle(classes, {1: [(1, 0.9, 2, 3, 20, 25)], 2: [(2, 0.8, 5, 5, 30, 30)]})
    evaluation = score(predictor, dataset)
    assert evaluation.result.AP50 is not None
    assert abs(evaluation.result.AP50 - 1) < 1e-12
    assert evaluation.scored_classes == ("dog", "cat")
    assert (evaluation.complete, evaluation.objects, evaluation.notes) == (True, 2, ())
    assert [(p.image_id, p.file_name, p.width, p.height) for p in evaluation.pictures] == [
        (1, "1.png", 40, 30),
        (2, "2.png", 40, 30),
    ]
    assert evaluation.seconds > 0
    assert evaluation.pictures_per_second == 2 / evaluation.seconds
    assert replace(evaluation, seconds=0.0).pictures_per_second > 0


def test_voc_and_coco_spellings_are_one_class(tmp_path: Path) -> None:
    # The detector's list is VOC's, the data's COCO's, in another order and with other category ids.
    objects = [(1, 2, 2, 20, 20), (2, 5, 5, 30, 30), (3, 1, 1, 9, 9)]
    dataset = Dataset("coco", classes_of("couch", "dog", "airplane"), (a_record(tmp_path, 1, *objects),))
    found = [(3, 0.9, 2, 2, 20, 20), (1, 0.8, 5, 5, 30, 30), (2, 0.7, 1, 1, 9, 9)]
    evaluation = score(Oracle(classes_of("dog", "aeroplane", "sofa"), {1: found}), dataset)
    assert evaluation.scored_classes == ("dog", "aeroplane", "sofa")
    assert evaluation.complete
    assert [(c.objects, c.detections, c.AR100) for c in evaluation.result.per_class] == [(1, 1, 1.0)] * 3


@pytest.fixture
def half_known(tmp_path: Path) -> Dataset:
    """Of its three classes the detector below knows two."""
    rows = [(1, 2, 2, 20, 20), (2, 5, 5, 30, 30), (2, 0, 0, 10, 10), (3, 10, 10, 20, 20)]
    return Dataset("half", classes_of("zebra", "cat", "dog"), (a_record(tmp_path, 1, *rows),), ("as read",))


def test_partly_shared_classes_are_scored_and_named(half_known: Dataset) -> None:
    found = [(2, 0.9, 2, 2, 20, 20), (1, 0.8, 10, 10, 20, 20), (3, 0.7, 5, 5, 30, 30), (3, 0.6, 0, 0, 10, 10)]
    evaluation = score(Oracle(classes_of("dog", "bus", "cat"), {1: found}), half_known)
    assert evaluation.scored_classes == ("dog", "cat")
    assert not evaluation.complete
    assert [(c.objects, c.detections, c.AR100) for c in evaluation.result.per_class] == [(1, 1, 1.0), (2, 2, 1.0)]
    assert len(evaluation.pictures[0].detections) == 4  # the bus stays among what was found
    assert evaluation.objects == 4
    kept, left_out, unscored = evaluation.notes
    assert kept == "as read"
    assert left_out.startswith("1 object of a class that the model does not know left out")
    assert "zebra" in left_out
    assert unscored == "1 class of the detector is not in the data and not scored: bus"


def test_an_unknown_class_without_objects_leaves_the_numbers_complete(half_known: Dataset) -> None:
    used = replace(half_known, records=tuple(r.select(r.labels > 1) for r in half_known.records))
    evaluation = score(Oracle(classes_of("dog", "cat"), {}), used)
    assert evaluation.complete
    assert evaluation.scored_classes == ("dog", "cat")


def test_two_classes_that_are_one_to_the_detector(tmp_path: Path) -> None:
    rows = [(1, 2, 2, 20, 20), (2, 5, 5, 30, 30)]
    dataset = Dataset("double", classes_of("sofa", "couch"), (a_record(tmp_path, 1, *rows),))
    evaluation = score(Oracle(classes_of("sofa"), {1: [(1, 0.9, 2, 2, 20, 20), (1, 0.8, 5, 5, 30, 30)]}), dataset)
    assert not evaluation.complete
    assert evaluation.notes == ("sofa, couch are one class to the detector: sofa",)
    assert [(c.objects, c.AR100) for c in evaluation.result.per_class] == [(2, 1.0)]


def test_no_shared_class_is_refused_with_both_lists(half_known: Dataset) -> None:
    with pytest.raises(DataError) as caught:
        score(Oracle(classes_of("bus", "train"), {}), half_known)
    assert "zebra, cat, dog" in caught.value.message
    assert "bus, train" in caught.value.message


def test_an_unreadable_picture_is_an_error_that_names_it(tmp_path: Path) -> None:
    records = [a_record(tmp_path, i, (1, 2, 2, 20, 20)) for i in range(1, 6)]
    records[3].path.write_bytes(records[3].path.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"4\.png"):
        score(Oracle(classes_of("dog"), {}), Dataset("broken", classes_of("dog"), tuple(records)))


def test_a_picture_of_another_size_than_annotated_is_an_error(tmp_path: Path) -> None:
    record = replace(a_record(tmp_path, 1, (1, 2, 2, 20, 20)), width=30, height=40)
    with pytest.raises(DataError, match=r"1\.png.*40 x 30.*30 x 40"):
        score(Oracle(classes_of("dog"), {}), Dataset("turned", classes_of("dog"), (record,)))


def test_no_pictures_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing has no pictures"):
        score(Oracle(classes_of("dog"), {}), Dataset("nothing", classes_of("dog"), ()))


def test_nothing_to_find_has_no_numbers_and_says_so(tmp_path: Path) -> None:
    dataset = Dataset("bare", classes_of("dog"), (a_record(tmp_path, 1),))
    evaluation = score(Oracle(classes_of("dog"), {1: [(1, 0.5, 0, 0, 9, 9)]}), dataset)
    assert set(summary(evaluation.result).values()) == {None}
    assert evaluation.notes == ("there is no object to be found, so there are no numbers",)


def test_difficult_objects_count_and_are_mentioned(tmp_path: Path) -> None:
    record = a_record(tmp_path, 1, (1, 2, 2, 20, 20), (1, 20, 2, 38, 20))
    record = replace(record, difficult=np.array([True, False]))
    evaluation = score(
        Oracle(classes_of("dog"), {1: [(1, 0.9, 20, 2, 38, 20)]}), Dataset("d", classes_of("dog"), (record,))
    )
    assert evaluation.result.per_class[0].objects == 2
    assert evaluation.result.AR100 == 0.5
    assert evaluation.notes[0].startswith("1 difficult objects count like all others")


def test_crowds_are_no_objects(tmp_path: Path) -> None:
    record = a_record(tmp_path, 1, (1, 2, 2, 20, 20), (1, 20, 2, 38, 20))
    record = replace(record, crowd=np.array([False, True]), difficult=np.array([False, True]))
    found = [(1, 0.9, 21, 3, 37, 19), (1, 0.8, 2, 2, 20, 20)]
    evaluation = score(Oracle(classes_of("dog"), {1: found}), Dataset("d", classes_of("dog"), (record,)))
    assert evaluation.result.per_class[0].objects == 1
    assert evaluation.result.AP is not None
    assert abs(evaluation.result.AP - 1) < 1e-12
    assert evaluation.notes == ()


def test_pictures_of_joined_data_sets_may_share_an_id(tmp_path: Path) -> None:
    one = a_record(tmp_path, 1, (1, 2, 2, 20, 20))
    (tmp_path / "other").mkdir()
    two = a_record(tmp_path / "other", 1, (1, 5, 5, 30, 30))
    predictor = Oracle(classes_of("dog"), {1: [(1, 0.9, 2, 2, 20, 20), (1, 0.8, 5, 5, 30, 30)]})
    evaluation = score(predictor, Dataset("joined", classes_of("dog"), (one, two)))
    assert (evaluation.result.pictures, evaluation.result.AR100, evaluation.result.AR1) == (2, 1.0, 0.5)


def test_progress_is_told_after_every_batch(tmp_path: Path) -> None:
    dataset = Dataset("five", classes_of("dog"), tuple(a_record(tmp_path, i) for i in range(1, 6)))
    told: list[EvaluationProgress] = []
    predictor = Oracle(classes_of("dog"), {})
    evaluate(predictor, dataset, batch=2, workers=1, on_progress=told.append)  # type: ignore[arg-type]
    assert told == [EvaluationProgress(2, 5), EvaluationProgress(4, 5), EvaluationProgress(5, 5)]
    assert predictor.batches == [2, 2, 1]


def test_pictures_are_not_read_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset("many", classes_of("dog"), tuple(a_record(tmp_path, i) for i in range(1, 31)))
    read: list[int] = []
    original = module.read_record

    def counting(record: Record) -> np.ndarray:
        read.append(record.image_id)
        return original(record)

    class Checking(Oracle):
        def predict(self, images: Sequence[np.ndarray]) -> list[Detections]:
            asked = sum(self.batches) + len(images)
            assert asked <= len(read) <= asked + 2 + 3
            return super().predict(images)

    monkeypatch.setattr(module, "read_record", counting)
    score(Checking(classes_of("dog"), {}), dataset, batch=2, workers=3)
    assert sorted(read) == list(range(1, 31))


def test_reading_stops_when_detection_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset("many", classes_of("dog"), tuple(a_record(tmp_path, i) for i in range(1, 31)))
    read: list[int] = []
    original = module.read_record

    def counting(record: Record) -> np.ndarray:
        read.append(record.image_id)
        return original(record)

    class Failing(Oracle):
        def predict(self, images: Sequence[np.ndarray]) -> list[Detections]:
            raise RuntimeError("no")

    monkeypatch.setattr(module, "read_record", counting)
    with pytest.raises(RuntimeError, match="no"):
        score(Failing(classes_of("dog"), {}), dataset, batch=2, workers=2)
    assert len(read) <= 6


@pytest.fixture(scope="module")
def written(predictor: Predictor, reference: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "detections.json"
    origin = origin_of(predictor, score_threshold=0.01)
    write_results(path, reference.pictures, predictor.classes, origin)
    return path


def check_equal(one: Collected, other: Collected) -> None:
    """The same to the bit, whatever the metric."""
    assert (one.scored_classes, one.complete, one.objects) == (other.scored_classes, other.complete, other.objects)
    for ours, theirs in zip((*one.truths, *one.detections), (*other.truths, *other.detections), strict=True):
        assert ours.image_id == theirs.image_id
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    for found, same in zip(one.detections, other.detections, strict=True):
        np.testing.assert_array_equal(found.scores, same.scores)


def test_saved_detections_give_the_numbers_of_the_detector(
    noise: Dataset, reference: Evaluation, written: Path
) -> None:
    collected = collect_saved(read_results(written), noise)
    check_equal(collected, reference)
    assert summary(score_coco(collected)) == summary(reference.result)
    assert (collected.pictures, collected.seconds, collected.pictures_per_second) == ((), None, None)
    assert collected.notes == reference.notes
    ours, theirs = (score_voc(c, VOC2007) for c in (collected, reference))
    assert ours.mAP == theirs.mAP
    assert ours.mAP


def test_a_list_of_results_gives_the_numbers_of_the_detector(
    noise: Dataset, reference: Evaluation, written: Path, tmp_path: Path
) -> None:
    kept = ("image_id", "category_id", "bbox", "score")
    rows = [{key: a[key] for key in kept} for a in json.loads(written.read_text())["annotations"]]
    # Only the order within a picture counts, between equal scores.
    rows.sort(key=lambda row: -row["image_id"])
    (tmp_path / "results.json").write_text(json.dumps(rows))
    check_equal(collect_saved(read_results(tmp_path / "results.json"), noise), reference)


def test_drawings_of_what_was_collected(reference: Evaluation) -> None:
    drawn = draw_pictures(len(reference.records), 4, 0)
    coco = resample(reference, drawn, None)
    assert coco.overall[0].tolist() == [reference.result.AP, reference.result.AP50, reference.result.AP75]
    voc = resample(reference, drawn, VOC2012)
    assert voc.overall[0].tolist() == [score_voc(reference, VOC2012).mAP]
    assert (coco.overall.shape, voc.overall.shape) == ((5, 3), (5, 1))


def saved_of(*rows: tuple[float, ...], classes: Classes | None = None, pictures: dict | None = None) -> SavedDetections:
    """Rows are (image id, category id, score, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    ids = table[:, :2].astype(np.int64)
    kind = "results list" if classes is None else "detections.json"
    columns = (ids[:, 0], ids[:, 1], table[:, 3:], table[:, 2])
    return SavedDetections(Path("saved.json"), "00", kind, classes, pictures, {}, *columns)  # type: ignore[arg-type]


@pytest.fixture
def pair(tmp_path: Path) -> Dataset:
    """Two pictures, ids 1 and 2, each with a dog (category 11) and the second with a cat (12) too."""
    records = (a_record(tmp_path, 2, (1, 2, 2, 20, 20), (2, 5, 5, 30, 30)), a_record(tmp_path, 1, (1, 2, 2, 20, 20)))
    return Dataset("pair", classes_of("dog", "cat"), records)


DOG_1, DOG_2, CAT_2 = (1, 11, 0.9, 2, 2, 20, 20), (2, 11, 0.8, 2, 2, 20, 20), (2, 12, 0.7, 5, 5, 30, 30)


@pytest.mark.parametrize(
    ("rows", "recalls"),
    [
        pytest.param((DOG_1, DOG_2, CAT_2), (1.0, 1.0), id="perfect"),
        pytest.param((), (0.0, 0.0), id="empty"),
        pytest.param((CAT_2, DOG_2, DOG_1), (1.0, 1.0), id="shuffled"),
        pytest.param((DOG_1,), (0.5, 0.0), id="a picture without detections"),
        pytest.param(((1, 11, -3.5, 2, 2, 20, 20),), (0.5, 0.0), id="a negative score"),
        pytest.param(((1, 11, 0.5, 2, 2, 2, 20), DOG_2), (0.5, 0.0), id="a box without width"),
    ],
)
def test_saved_lists_are_scored_as_they_are(pair: Dataset, rows: tuple, recalls: tuple[float, float]) -> None:
    collected = collect_saved(saved_of(*rows), pair)
    assert tuple(c.AR100 for c in score_coco(collected).per_class) == recalls
    assert [r.image_id for r in collected.records] == [1, 2]
    assert collected.complete
    assert collected.notes == (() if rows else ("saved.json holds no detection",))


def test_a_detection_that_is_there_twice_is_wrong_once(pair: Dataset) -> None:
    for metric, best in ((score_coco, "AP50"), (lambda c: score_voc(c, VOC2012), "AP")):
        once = metric(collect_saved(saved_of(DOG_1, DOG_2), pair)).per_class[0]
        twice = metric(collect_saved(saved_of(DOG_1, DOG_1, DOG_2), pair)).per_class[0]
        assert getattr(once, best) == pytest.approx(1.0)
        assert getattr(twice, best) < 0.9


def test_detections_of_other_pictures_or_categories_are_refused(pair: Dataset) -> None:
    with pytest.raises(DataError, match=r"saved\.json: pair has no picture with image id 7, 8$"):
        collect_saved(saved_of(DOG_1, (8, 11, 0.5, 0, 0, 1, 1), (7, 11, 0.5, 0, 0, 1, 1)), pair)
    with pytest.raises(DataError, match=r"categories that pair does not have: 13$") as caught:
        collect_saved(saved_of(DOG_1, (1, 13, 0.5, 0, 0, 1, 1)), pair)
    assert "11, 12" in str(caught.value.hint)


def test_a_data_set_whose_pictures_share_an_id_cannot_be_scored_by_id(pair: Dataset) -> None:
    double = replace(pair, records=(pair.records[0], replace(pair.records[1], image_id=2)))
    with pytest.raises(DataError, match="cannot be told apart"):
        collect_saved(saved_of(DOG_1), double)


def test_a_detections_file_goes_by_file_and_class_names(pair: Dataset) -> None:
    # Ids are its own: picture 5 is 1.png, category 3 is the dog; and it knows a bus, which the data does not.
    classes = Classes(names=("bus", "dog", "cat"), category_ids=(1, 3, 4))
    rows = ((5, 3, 0.9, 2, 2, 20, 20), (6, 3, 0.9, 2, 2, 20, 20), (6, 4, 0.5, 5, 5, 30, 30), (6, 1, 0.5, 0, 0, 9, 9))
    collected = collect_saved(saved_of(*rows, classes=classes, pictures={5: "1.png", 6: "2.png"}), pair)
    assert collected.scored_classes == ("dog", "cat")
    assert [c.AR100 for c in score_coco(collected).per_class] == [1.0, 1.0]
    assert sum(len(d.scores) for d in collected.detections) == 3
    assert collected.notes == ("1 class of the detector is not in the data and not scored: bus",)


def test_pictures_that_a_detections_file_leaves_out_count_as_missed_and_are_told(pair: Dataset) -> None:
    part = saved_of((1, 11, 0.9, 2, 2, 20, 20), classes=pair.classes, pictures={1: "1.png"})
    collected = collect_saved(part, pair)
    assert collected.notes == ("1 of 2 pictures not in saved.json: objects there count as missed",)
    assert score_coco(collected).per_class[0].AR100 == 0.5


def test_a_detections_file_of_other_pictures_or_classes_is_refused(pair: Dataset) -> None:
    other = {1: "1.png", 2: "2.png", 3: "sea/3.png"}
    with pytest.raises(DataError, match=r"pair has no picture named sea/3\.png$"):
        collect_saved(saved_of(classes=pair.classes, pictures=other), pair)
    with pytest.raises(DataError, match=r"lists pictures more than once: 1\.png"):
        collect_saved(saved_of(classes=pair.classes, pictures={1: "1.png", 2: "1.png"}), pair)
    with pytest.raises(
        DataError, match=r"saved\.json and pair share no class: the file has bus; the data has dog, cat"
    ):
        collect_saved(saved_of(classes=classes_of("bus"), pictures={1: "1.png"}), pair)
    with pytest.raises(DataError, match="nothing has no pictures"):
        collect_saved(saved_of(), Dataset("nothing", pair.classes, ()))


def test_pictures_of_one_name_are_told_apart_by_their_ids(pair: Dataset) -> None:
    named = replace(pair, records=tuple(replace(r, file_name="same.png") for r in pair.records))
    rows = (DOG_1, DOG_2, CAT_2)
    collected = collect_saved(saved_of(*rows, classes=pair.classes, pictures={1: "same.png", 2: "same.png"}), named)
    assert [len(d.scores) for d in collected.detections] == [1, 2]
    with pytest.raises(DataError, match=r"no picture named same\.png"):
        collect_saved(saved_of(classes=pair.classes, pictures={3: "same.png"}), named)


def test_two_sets_are_compared_class_by_class_whatever_their_order(pair: Dataset) -> None:
    one = collect_saved(saved_of(DOG_1, DOG_2, CAT_2), pair)
    turned = Classes(names=("bus", "cat", "dog"), category_ids=(1, 12, 11))
    fewer = collect_saved(saved_of(DOG_1, CAT_2, classes=turned, pictures={1: "1.png", 2: "2.png"}), pair)
    assert fewer.scored_classes == ("cat", "dog")
    other = in_classes_of(fewer, one)
    assert other.scored_classes == ("dog", "cat")
    for ours, theirs in zip(one.truths, other.truths, strict=True):
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    drawn = draw_pictures(2, 100, 0)
    summed = differences(resample(one, drawn, None), resample(other, drawn, None))
    dog, cat = (numbers[1].value for numbers in summed.per_class)
    assert dog == pytest.approx(50 / 101)
    assert cat == 0.0


def test_sets_that_score_other_classes_cannot_be_compared(pair: Dataset) -> None:
    one = collect_saved(saved_of(DOG_1), pair)
    only_dogs = collect_saved(saved_of(DOG_1, classes=classes_of("dog"), pictures={1: "1.png", 2: "2.png"}), pair)
    with pytest.raises(DataError, match="score different classes: dog, cat; and dog"):
        in_classes_of(only_dogs, one)


def test_voc_passes_over_difficult_objects_and_crowds(pair: Dataset) -> None:
    easy, hard = pair.records[1], pair.records[0]
    hard = replace(hard, difficult=np.array([True, False]), crowd=np.array([False, True]))
    collected = collect_saved(saved_of(DOG_1, DOG_2, CAT_2), replace(pair, records=(easy, hard)))
    result = score_voc(collected, VOC2007)
    assert [(c.objects, c.difficult, c.right, c.passed_over) for c in result.per_class] == [(1, 1, 1, 1), (0, 1, 0, 1)]
    assert (result.mAP, result.per_class[1].AP) == (pytest.approx(1.0), None)
    assert voc_notes(collected) == (
        "1 difficult objects count neither as found nor as missed",
        "1 crowds count as difficult objects: the VOC metric knows no crowds",
    )
    assert coco_notes(collected)[0].startswith("1 difficult objects count like all others")


def test_voc_without_an_object_to_find_has_no_number(pair: Dataset) -> None:
    hard = tuple(replace(r, difficult=np.ones(len(r), dtype=np.bool_)) for r in pair.records)
    collected = collect_saved(saved_of(DOG_1), replace(pair, records=hard))
    assert score_voc(collected, VOC2012).mAP is None
    assert voc_notes(collected)[-1] == "there is no object to be found, so there are no numbers"
    assert len(coco_notes(collected)) == 1


def test_a_voc_annotation_is_scored_by_the_pixels_that_it_names(tmp_path: Path) -> None:
    # Pixels 1 to 10 in both directions, as in the XML; the detection covers pixels 1 to 5 of each row: 50 of 100.
    voc = tmp_path / "VOC2007"
    for name in ("Annotations", "JPEGImages"):
        (voc / name).mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(voc / "JPEGImages" / "000004.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>10</xmax><ymax>10</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    text = f"<annotation>{size}<object><name>dog</name>{box}</object></annotation>"
    (voc / "Annotations" / "000004.xml").write_text(text)
    data = open_dataset(str(voc), split="test")
    dog = data.classes.category_ids[data.classes.names.index("dog")]
    # The same detection as our edges and as a COCO box: 5 px wide, 10 px high.
    collected = collect_saved(saved_of((4, dog, 0.9, 0, 0, 5, 10)), data)
    assert score_voc(collected, VOC2007).mAP == pytest.approx(1.0)
    assert score_voc(collected, replace(VOC2007, overlap="above")).mAP == 0.0
    assert score_voc(collected, replace(VOC2007, pixels="continuous")).mAP == 0.0  # 4 x 9 of 9 x 9
