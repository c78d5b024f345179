from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.boxes import cxcywh_to_xyxy, pair_iou
from refinedet_cli.core.build import build
from refinedet_cli.core.config import AnchorConfig, Classes
from refinedet_cli.core.matching import match
from refinedet_cli.core.presets import get_preset
from refinedet_cli.core.structures import Target, Targets
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.source import open_dataset
from refinedet_cli.engine.anchor_file import anchor_toml, read_anchor_file
from refinedet_cli.engine.anchor_refinement import choose_pictures, measure_refinement
from refinedet_cli.engine.anchor_study import StudyOptions, hold_out_by_name, least_budget, part_data, study_anchors
from refinedet_cli.engine.anchors import explain, find_shortfall, gather, percent, report_anchors, shape_text
from refinedet_cli.engine.network_facts import multiply_adds, receptive_fields
from refinedet_cli.engine.run_file import read_run_file
from refinedet_cli.engine.start import resolve_config
from refinedet_cli.errors import ConfigError, DataError, UsageError
from refinedet_cli.zoo.checkpoint import LoadedDetector, save_checkpoint

CLASSES = Classes(names=("dog", "cat", "bird"), category_ids=(1, 2, 3))
TINY = get_preset("tiny", CLASSES).detector


def record(boxes, labels=None, *, size=(64, 64), crowd=None, name="a.png", folder=Path("nowhere")) -> Record:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(boxes)
    return Record(
        image_id=1,
        path=folder / name,
        width=size[0],
        height=size[1],
        boxes=boxes,
        labels=np.array(labels or [1] * count, dtype=np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        crowd=np.array(crowd or [False] * count, dtype=bool),
        difficult=np.zeros(count, dtype=bool),
        annotation_ids=np.arange(count),
        file_name=name,
    )


def dataset(*records: Record) -> Dataset:
    return Dataset("pets", CLASSES, records)


def random_dataset(pictures: int, seed: int = 0) -> Dataset:
    draw = np.random.default_rng(seed)
    records = []
    for i in range(pictures):
        width, height = (int(v) for v in draw.integers(50, 200, 2))
        count = int(draw.integers(0, 6))
        sides = np.exp(draw.uniform(np.log(3), np.log(45), (count, 2)))
        corner = draw.uniform(0, 1, (count, 2)) * ([width, height] - sides)
        boxes = np.concatenate([corner, corner + sides], axis=1)
        labels = draw.integers(1, 3, count).tolist()  # never a bird
        records.append(record(boxes, labels, size=(width, height), name=f"{i}.png"))
    return dataset(*records)


def write_coco(folder: Path, data: Dataset, name: str, *, pixels: bool = False) -> Path:
    images, annotations = [], []
    for i, r in enumerate(data.records, start=1):
        images.append({"id": i, "file_name": r.file_name, "width": r.width, "height": r.height})
        for box, label in zip(r.boxes.tolist(), r.labels.tolist(), strict=True):
            left, top, right, bottom = box
            bbox = [left, top, right - left, bottom - top]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": label, "bbox": bbox})
        if pixels:
            noise = np.random.default_rng(i).integers(0, 256, (r.height, r.width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / r.file_name)
    categories = [{"id": i, "name": n} for i, n in enumerate(CLASSES.names, start=1)]
    path = folder / name
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


# Objects -------------------------------------------------------------------------------------------------------------


def test_objects_are_stretched_to_the_input_without_crowds() -> None:
    data = dataset(
        record([], name="empty.png"),
        record([[10, 20, 30, 60], [0, 0, 9, 9]], [2, 1], size=(100, 200), crowd=[False, True]),
        record([[0, 0, 50, 50]], [1], size=(50, 50), name="b.png"),
    )
    objects = gather(data, (64, 128))
    assert objects.boxes.boxes.tolist() == [[12.8, 6.4, 38.4, 19.2], [0, 0, 128, 64]]
    assert objects.boxes.labels.tolist() == [2, 1]
    assert objects.boxes.picture.tolist() == [0, 1]
    assert objects.records.tolist() == [1, 2]
    assert objects.boxes.pictures == 2
    assert objects.crowds == 1
    assert objects.areas.tolist() == [800, 2500]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (dataset(record([])), "pets has no object for anchors to cover"),
        (dataset(record([[0, 0, 9, 9]], crowd=[True])), "the 1 box there is around a crowd"),
        (dataset(), "has no object"),
    ],
)
def test_data_without_objects_is_refused(data: Dataset, words: str) -> None:
    with pytest.raises(DataError, match=words):
        gather(data, (64, 64))


# Report --------------------------------------------------------------------------------------------------------------


def brute_force(data: Dataset, anchors: AnchorConfig) -> tuple[np.ndarray, np.ndarray]:
    """Best IoU and positives of each object, by the matching of training on whole pictures."""
    tiled = tile_anchors(anchors, 64, 64)
    best, positives = [], []
    for r in data.records:
        if not len(r):
            continue
        scale = np.array([r.width, r.height] * 2)
        targets = Targets.pack([Target(torch.from_numpy(r.boxes / scale).float(), torch.from_numpy(r.labels))])
        ious = pair_iou(targets.boxes[:, None], cxcywh_to_xyxy(tiled)[None])
        taken = match(ious, targets, 0.5).target[0]
        best.append(ious.max(dim=1).values.numpy())
        positives.append(np.bincount(taken[taken >= 0], minlength=len(r)))
    return np.concatenate(best), np.concatenate(positives)


def test_report_counts_as_training_matches() -> None:
    data = random_dataset(40)
    report = report_anchors(gather(data, (64, 64)), TINY)
    best, positives = brute_force(data, TINY.anchors)
    overall = report.overall
    assert overall.objects == len(best) == data.objects
    assert overall.shares == pytest.approx([(best >= iou).mean() for iou in (0.3, 0.5, 0.7)])
    assert overall.forced == pytest.approx(((positives == 1) & (best < 0.5)).mean())
    assert overall.positives == pytest.approx(positives.mean())
    assert report.share == overall.shares[1]
    assert 0.1 < report.share < 0.9  # else this test would say little
    assert sum(sum(level.positives) for level in report.levels) == positives.sum()
    assert report.total == len(tile_anchors(TINY.anchors, 64, 64))


def test_groups_add_up_to_all_objects() -> None:
    report = report_anchors(gather(random_dataset(40), (64, 64)), TINY)
    overall = report.overall
    for groups in (report.by_area, report.by_side, report.by_ratio, report.by_class, report.by_level):
        assert sum(group.objects for group in groups) == overall.objects
        reached = sum(group.objects * group.shares[1] for group in groups)
        assert reached == pytest.approx(overall.objects * overall.shares[1])
    assert [group.name for group in report.by_class] == list(CLASSES.names)
    assert report.by_class[2] == ("bird", 0, (0.0, 0.0, 0.0), 0.0, 0.0, 0.0)


def test_groups_are_cut_where_they_say() -> None:
    boxes = [[0, 0, 32, 31.9], [0, 0, 32, 32], [0, 0, 96, 96], [0, 0, 10, 60]]
    report = report_anchors(gather(dataset(record(boxes, size=(128, 128))), (64, 64)), TINY)
    assert [group.objects for group in report.by_area] == [2, 1, 1]
    # At the input they are 16 x 15.95, 16 x 16, 48 x 48 and 5 x 30 px.
    assert {g.name: g.objects for g in report.by_side if g.objects} == {
        "8 to 16 px": 2,
        "16 to 32 px": 1,
        "32 to 64 px": 1,
    }
    assert {g.name: g.objects for g in report.by_ratio if g.objects} == {"below 1:5": 1, "2:3 to 3:2": 3}


def test_unused_anchors_and_narrow_sight_are_told() -> None:
    report = report_anchors(gather(dataset(record([[16, 16, 24, 24]])), (64, 64)), TINY)
    assert report.levels[0].unused == ()  # an 8-px square lies on the finest level
    assert len(report.levels[3].unused) == 3
    assert "no object is matched to the anchors 64x64, 90.5x45.3, 45.3x90.5 of stride 64" in report.notes
    long = replace(TINY, anchors=replace(TINY.anchors, shapes=(((200.0, 8.0),), *TINY.anchors.shapes[1:])))
    notes = report_anchors(gather(dataset(record([[16, 16, 24, 24]])), (64, 64)), long).notes
    assert any("stride 8 are up to 200 px long, but the head that judges them sees 75 px" in note for note in notes)


def test_reasons_for_falling_short() -> None:
    anchors = AnchorConfig(strides=(8,), shapes=(((20.0, 20.0), (40.0, 40.0)),))
    sides = np.array([[10, 10], [14.1, 14.1], [60, 60], [100, 9], [20, 20], [30, 30]], dtype=np.float64)
    best = np.array([0.2, 0.4, 0.3, 0.1, 0.45, 0.5])
    found = find_shortfall(sides, best, anchors)
    assert found[:4] == (2, 1, 1, 1)  # the last object is reached
    assert found.total == 5
    assert found.smallest == pytest.approx(20 / 2**0.5)
    assert found.largest == pytest.approx(40 * 2**0.5)


def test_the_verdict_is_told_in_words() -> None:
    data = dataset(record([[16, 16, 24, 24], [2, 2, 5, 5], [50, 50, 53, 53], [1, 30, 3, 62]]))
    assert explain(report_anchors(gather(data, (64, 64)), TINY)) == (
        "75.0 % of the objects (3 of 4) never reach IoU 0.5 with an anchor at 64 x 64. "
        "Of these, 66.7 % are smaller than 5.66 px and 33.3 % are of a size or shape that no anchor has."
    )
    small = dataset(record([[16, 16, 24, 24], [2, 2, 5, 5]]))
    assert explain(report_anchors(gather(small, (64, 64)), TINY)).endswith("All of these are smaller than 5.66 px.")
    fine = dataset(record([[16, 16, 24, 24]]))
    assert explain(report_anchors(gather(fine, (64, 64)), TINY)).startswith("The one object reaches")


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0 %"), (1, "100.0 %"), (0.5, "50.0 %"), (0.9999, "99.9 %"), (0.0001, "0.1 %")]
)
def test_almost_all_is_not_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_shapes_are_written_to_a_tenth() -> None:
    assert shape_text((45.254834, 22.0)) == "45.3x22"


# Network facts -------------------------------------------------------------------------------------------------------


def test_receptive_fields_by_hand() -> None:
    # conv4_3 sees 92 px, conv5_3 196, fc6 (dilated by 3 at stride 32) 404, conv6_2 468; the 3x3 head adds two strides.
    assert receptive_fields(get_preset("refinedet320_vgg16", CLASSES).detector) == (108, 228, 468, 596)
    unknown = replace(TINY, network=replace(TINY.network, backbone="timm/any"))
    assert receptive_fields(unknown) is None


def test_multiply_adds_follow_the_anchors() -> None:
    more = replace(TINY.anchors, shapes=(TINY.anchors.shapes[0] * 2, *TINY.anchors.shapes[1:]))
    # Three more anchors of 2 + 4 outputs from 192 channels (ARM) and of 4 + 4 from 32 (ODM), by 3x3, on 8 x 8 cells.
    extra = 64 * 9 * 3 * (6 * 192 + 8 * 32)
    assert multiply_adds(replace(TINY, anchors=more)) - multiply_adds(TINY) == extra


# File ----------------------------------------------------------------------------------------------------------------


def test_anchors_return_from_their_file(tmp_path: Path) -> None:
    shapes = (((8.0, 8.5),), ((16.0, 15.1), (3.2, 40.0)), ((32.0, 32.0),), ((64.0, 60.7),))
    anchors = AnchorConfig(shapes=shapes)
    path = tmp_path / "anchors.toml"
    path.write_text(anchor_toml(anchors, (64, 128), ["pets\nshapes = 3\x1b", "again"]))
    assert path.read_text().startswith("# pets shapes = 3\n# again\n\n[anchors]\n")
    found = read_anchor_file(path)
    assert (found.anchors, found.input_size) == (anchors, (64, 128))
    resolved = resolve_config(CLASSES, "tiny", None, read_run_file(None), found.settings)
    assert resolved.detector.anchors == anchors
    assert (resolved.detector.preprocess.height, resolved.detector.preprocess.width) == (64, 64)
    as_run_file = resolve_config(CLASSES, "tiny", None, read_run_file(path), [])
    assert as_run_file.detector.anchors == anchors
    assert as_run_file.detector.preprocess.width == 128
    warning = found.mismatch(resolved.detector)
    assert warning is not None
    assert "fitted to an input of 128 x 64 px, but this detector takes 64 x 64" in warning
    assert found.mismatch(as_run_file.detector) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[train]\nepochs = 3\n", r"has no table \[anchors\]"),
        ("[anchors]\nshapes = 3\n", "anchors.shapes must be a list"),
        ("[anchors]\nshapes = [[[1, 2]]]\n", "differ in length"),
        ("[anchors]\nshape = [[[1, 2]]]\n", "unknown setting"),
        ("anchors = 3\n", "must be a table"),
        ("[anchors\n", "anchors.toml: "),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "anchors.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_anchor_file(path)
    assert str(path) in caught.value.message


def test_a_missing_file_is_refused_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read") as caught:
        read_anchor_file(tmp_path / "missing.toml")
    assert caught.value.hint == "check the name and its case"


def test_strides_that_do_not_fit_are_refused_when_training() -> None:
    settings = ["anchors.strides=[4, 8, 16, 32]"]
    with pytest.raises(ConfigError, match="those of the backbone's maps"):
        resolve_config(CLASSES, "tiny", None, read_run_file(None), settings)


# Refinement ----------------------------------------------------------------------------------------------------------


def loaded_detector(*, still: bool, arm: bool = True) -> LoadedDetector:
    """A tiny detector with fresh weights; a still one moves no anchor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        detector = build(replace(TINY, network=replace(TINY.network, arm=arm)))
    detector.network.eval()
    if still:
        for parameter in detector.network.parameters():
            parameter.data.zero_()
    return LoadedDetector(detector, {}, Path("tiny.safetensors"))


def refine(loaded: LoadedDetector, data: Dataset, **options):
    seen: list[tuple[int, int]] = []
    wanted = {"pictures": 99, "seed": 0, "device": torch.device("cpu"), "batch": 4, "workers": 2, **options}
    found = measure_refinement(loaded, data, on_progress=lambda done, total: seen.append((done, total)), **wanted)
    assert seen[-1] == (len(found.dataset), len(found.dataset))
    return found


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("pets")
    return open_dataset(str(write_coco(folder, random_dataset(9), "pets.json", pixels=True)), split="train")


def test_a_network_that_moves_nothing_leaves_the_coverage(on_disk: Dataset) -> None:
    report = report_anchors(gather(on_disk, (64, 64)), TINY)
    found = refine(loaded_detector(still=True), on_disk)
    assert [step.name for step in found.steps] == ["anchors", "after the ARM", "after the ODM"]
    for step in found.steps:
        np.testing.assert_allclose(step.best_iou, report.coverage.best_iou, atol=1e-5)
    for step in found.steps[:2]:
        assert step.positives is not None
        np.testing.assert_array_equal(step.positives, report.coverage.positives)
    assert found.steps[2].positives is None
    np.testing.assert_allclose(found.moves.anchors, found.moves.final, atol=1e-3)


def test_moved_boxes_are_those_that_the_numbers_are_of(on_disk: Dataset) -> None:
    found = refine(loaded_detector(still=False), on_disk)
    boxes = torch.from_numpy(found.objects.boxes.boxes).float()
    ious = pair_iou(boxes, torch.from_numpy(found.moves.final)).double()
    np.testing.assert_allclose(ious, found.steps[-1].best_iou, atol=1e-4)
    assert not np.allclose(found.moves.anchors, found.moves.refined)
    assert not np.allclose(found.moves.refined, found.moves.final)
    assert "% after the ARM and" in found.verdict


def test_what_the_filter_drops_does_not_count_as_detected(on_disk: Dataset) -> None:
    loaded = loaded_detector(still=True)
    config = replace(TINY, postprocess=replace(TINY.postprocess, arm_filter=0.6))  # a still network says 0.5
    found = refine(replace(loaded, detector=replace(loaded.detector, config=config)), on_disk)
    assert found.steps[1].share(0.3) > 0
    assert found.steps[2].share(0.01) == 0


def test_without_an_arm_there_are_two_steps(on_disk: Dataset) -> None:
    found = refine(loaded_detector(still=False, arm=False), on_disk)
    assert [step.name for step in found.steps] == ["anchors", "after the ODM"]
    np.testing.assert_array_equal(found.moves.anchors, found.moves.refined)


def test_pictures_are_drawn_by_seed_and_all_have_objects(on_disk: Dataset) -> None:
    chosen = choose_pictures(on_disk, 3, seed=0)
    assert len(chosen) == 3
    assert all(len(r) for r in chosen.records)
    assert [r.file_name for r in chosen.records] == [r.file_name for r in choose_pictures(on_disk, 3, 0).records]
    assert any(
        [r.file_name for r in choose_pictures(on_disk, 3, s).records] != [r.file_name for r in chosen.records]
        for s in (1, 2, 3)
    )
    assert len(choose_pictures(on_disk, 99, seed=0)) == sum(len(r) > 0 for r in on_disk.records)


# Study ---------------------------------------------------------------------------------------------------------------


def test_pictures_that_are_absent_are_held_out_by_name() -> None:
    data = random_dataset(200)
    rest, out = hold_out_by_name(data, fraction=0.15, seed=0)
    assert {r.file_name for r in rest.records}.isdisjoint(r.file_name for r in out.records)
    assert len(rest) + len(out) == 200
    assert 10 <= len(out) <= 50
    again = hold_out_by_name(replace(data, records=data.records[::-1]), fraction=0.15, seed=0)[1]
    assert {r.file_name for r in again.records} == {r.file_name for r in out.records}
    pair = hold_out_by_name(replace(data, records=data.records[:2]), fraction=0.15, seed=0)
    assert [len(side) for side in pair] == [1, 1]
    with pytest.raises(ValueError, match="two names"):
        hold_out_by_name(replace(data, records=data.records[:1]), fraction=0.15, seed=0)


def test_the_judging_pictures_are_the_val_part_or_held_out(tmp_path: Path, on_disk: Dataset) -> None:
    write_coco(tmp_path, random_dataset(5, seed=1), "train.json")
    write_coco(tmp_path, random_dataset(3, seed=2), "val.json")
    options = {"images": None, "root": None, "seed": 0}
    train = open_dataset(str(tmp_path), split="train")
    own = part_data(train, [str(tmp_path)], **options)
    assert own is not None
    assert [len(own.fitted), len(own.held_out)] == [5, 3]
    alone = part_data(train, [str(tmp_path / "train.json")], **options)
    assert alone is not None
    assert "by name" in alone.how
    present = part_data(on_disk, [str(on_disk.records[0].path.parent / "pets.json")], **options)
    assert present is not None
    assert "by content" in present.how
    single = write_coco(tmp_path, dataset(record([[1, 1, 9, 9]])), "one.json")
    assert part_data(open_dataset(str(single), split="train"), [str(single)], **options) is None


@pytest.fixture
def absent(tmp_path: Path) -> Path:
    return write_coco(tmp_path, random_dataset(60), "pets.json")


def study(path: Path, **options):
    return study_anchors(StudyOptions(datasets=[str(path)], preset="tiny", **options), lambda progress: None)


def test_a_study_opens_no_picture_and_proposes_what_wins(absent: Path) -> None:
    found = study(absent)
    search = found.search
    assert search is not None
    assert search.proposal.anchors_after <= search.proposal.anchors_before
    assert search.found.overall.objects == found.report.overall.objects
    assert search.found.share == pytest.approx(
        report_anchors(found.objects, replace(found.detector, anchors=search.proposal.found)).share
    )
    assert (found.anchors == search.proposal.found) == search.proposal.accepted
    assert all(round(v, 1) == v for level in search.proposal.found.shapes for shape in level for v in shape)
    assert len(found.verdict) == 2
    assert found.verdict[1].startswith("Better anchors reach" if search.proposal.accepted else "No better anchors")
    assert study(absent).search.proposal == search.proposal


def test_a_budget_that_is_too_small_is_refused(absent: Path) -> None:
    assert least_budget(TINY) == 64 + 16 + 4 + 1
    with pytest.raises(UsageError, match="--budget 84 is less than one anchor in every cell"):
        study(absent, budget=84)
    found = study(absent, budget=85)
    assert found.search is not None
    assert found.search.proposal.anchors_after == 85


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record([[1, 1, 9, 9]])], "there is no second picture"),
        ([record([[1, 1, 9, 9]], name="a.png"), record([], name="b.png")], "pictures have no object"),
    ],
)
def test_no_search_without_pictures_to_judge_by(tmp_path: Path, records: list[Record], words: str) -> None:
    found = study(write_coco(tmp_path, dataset(*records), "few.json"))
    assert found.search is None
    assert any(words in note for note in found.notes)
    assert found.anchors == found.detector.anchors
    assert found.report.overall.objects == 1


def test_weights_decide_anchors_and_input(on_disk: Dataset, tmp_path: Path) -> None:
    anchors = replace(TINY.anchors, shapes=(((9.0, 9.0),), *TINY.anchors.shapes[1:]))
    config = replace(TINY, anchors=anchors, classes=Classes(names=("thing",), category_ids=(1,)))
    path = tmp_path / "things.safetensors"
    save_checkpoint(path, config, build(config).network.state_dict(), {})
    source = on_disk.records[0].path.parent / "pets.json"
    found = study_anchors(
        StudyOptions(datasets=[str(source)], weights=str(path), search=False, device="cpu"), lambda progress: None
    )
    assert found.detector.anchors == anchors
    assert found.detector.classes.names == CLASSES.names
    assert found.refinement is not None
    assert found.search is None
