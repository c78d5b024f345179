from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import get_preset
from refinedet_cli.core.refinedet import build
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.engine import evaluate as module
from refinedet_cli.engine.evaluate import Evaluation, EvaluationProgress, evaluate, with_postprocess
from refinedet_cli.engine.predict import Predictor
from refinedet_cli.engine.results import origin_of, write_results
from refinedet_cli.errors import DataError
from refinedet_cli.metrics.coco import CocoResult
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
    origin = origin_of(predictor.loaded, precision="fp32", score_threshold=0.01)
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
    assert left_out.startswith("1 objects of classes that the model does not know")
    assert "zebra" in left_out
    assert unscored == "1 classes of the detector are not in the data and are not scored: bus"


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
