"""Taking weights over: class outputs row by row, and files that must not be trusted."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from refinedet_cli.core.anchors import level_sizes, tile_anchors
from refinedet_cli.core.boxes import decode
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.presets import tiny, yolo320_mobilenetv2
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.warm_start import copy_detector, nearest_shapes, read_tensors

ANCHORS, LEVELS = 3, 4


def config_of(classes: int) -> DetectorConfig:
    return tiny(Classes(names=tuple(f"c{i}" for i in range(classes)), category_ids=tuple(range(classes)))).detector


def detector_of(config: DetectorConfig, seed: int) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = build(config)
        for parameter in detector.network.parameters():
            if parameter.ndim == 1:  # biases and norms, which all networks start with alike
                nn.init.normal_(parameter)
    return detector


def clone(detector: Detector) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in detector.network.state_dict().items()}


def with_shapes(config: DetectorConfig, *levels: tuple[tuple[float, float], ...]) -> DetectorConfig:
    """The config with other anchors, of the first levels or of all."""
    shapes = (*levels, *config.require_anchors().shapes[len(levels) :])
    return replace(config, anchors=replace(config.require_anchors(), shapes=shapes))


TWENTY = detector_of(config_of(20), seed=1)
HEADS = {f"odm.levels.{level}.{kind}" for level in range(LEVELS) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("classes", "label_map"),
    [
        (3, {2: 15}),
        (1, {1: 7}),
        (1, {}),
        (25, {**{i: 21 - i for i in range(1, 21)}, 25: 4}),
        (20, {1: 20, 20: 1}),
        (20, {1: 1, 2: 2}),
    ],
    ids=["one shared", "to one", "none shared", "to more", "reordered", "some of as many"],
)
def test_class_rows_follow_their_names(classes, label_map):
    detector = detector_of(config_of(classes), seed=2)
    fresh, old = clone(detector), clone(TWENTY)
    taken = copy_detector(detector, TWENTY, label_map)
    new = detector.network.state_dict()
    assert set(taken.remapped) == HEADS
    assert set(taken.copied) == new.keys() - HEADS
    assert (taken.fresh, taken.class_outputs, taken.anchors) == ((), True, ())
    for name in taken.copied:
        assert torch.equal(new[name], old[name]), name
    for name in HEADS:
        for anchor in range(ANCHORS):
            to, of = anchor * (classes + 5), anchor * 25
            for label in range(classes + 1):
                source = {0: 0, **label_map}.get(label)
                expected = fresh[name][to + label] if source is None else old[name][of + source]
                assert torch.equal(new[name][to + label], expected), (name, anchor, label)
            for coordinate in range(4):
                expected = old[name][of + 21 + coordinate]
                assert torch.equal(new[name][to + classes + 1 + coordinate], expected), (name, anchor, coordinate)


def test_the_same_detector_is_copied_whole():
    detector = detector_of(config_of(20), seed=2)
    taken = copy_detector(detector, TWENTY, {i: i for i in range(1, 21)})
    assert set(taken.copied) == detector.network.state_dict().keys()
    torch.testing.assert_close(clone(detector), clone(TWENTY), rtol=0, atol=0)


def test_the_source_is_left_as_it_was_and_shares_no_memory():
    before = clone(TWENTY)
    detector = detector_of(config_of(20), seed=2)
    copy_detector(detector, TWENTY, {1: 2})
    with torch.no_grad():
        for parameter in detector.network.parameters():
            parameter.zero_()
    torch.testing.assert_close(clone(TWENTY), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"tcb_channels": 64}, {"tcb": False}])
def test_parts_of_other_shapes_stay_fresh(change):
    config = config_of(2)
    detector = detector_of(replace(config, network=replace(config.network, **change)), seed=2)
    before = clone(detector)
    taken = copy_detector(detector, TWENTY, {1: 1})
    new = detector.network.state_dict()
    assert set(taken.fresh) >= HEADS
    for name in taken.fresh:
        assert torch.equal(new[name], before[name]), name
    assert {n for n in new if n.startswith(("backbone.", "arm."))} <= set(taken.copied)
    assert sorted((*taken.copied, *taken.remapped, *taken.fresh)) == sorted(new)
    assert not taken.class_outputs


def test_what_the_source_lacks_stays_fresh():
    config = config_of(20)
    source = detector_of(replace(config, network=replace(config.network, arm=False)), seed=3)
    detector = detector_of(config, seed=2)
    taken = copy_detector(detector, source, {i: i for i in range(1, 21)})
    assert set(taken.fresh) == {n for n in detector.network.state_dict() if n.startswith("arm.")}


# Anchors.


def test_anchors_of_another_number_begin_as_the_nearest_of_their_level():
    config = config_of(2)
    first = ((7.0, 9.0), (16.0, 4.0), (30.0, 9.0), (4.0, 17.0))  # there: 8 x 8, 11.3 x 5.7, 5.7 x 11.3
    second = ((15.0, 15.0),)  # there: 16 x 16 and the like
    detector = detector_of(with_shapes(config, first, second), seed=2)
    fresh, old = clone(detector), clone(TWENTY)
    taken = copy_detector(detector, TWENTY, {1: 4})
    new = detector.network.state_dict()
    assert [[one.place for one in level] for level in taken.anchors] == [[0, 1, 1, 2], [0], [0, 1, 2], [0, 1, 2]]
    assert taken.anchors[0][0].iou == pytest.approx(56 / (64 + 63 - 56))
    assert {one.iou for level in taken.anchors[2:] for one in level} == {1.0}
    assert taken.fresh == ()
    arm = {n for n in new if n.startswith("arm.levels.") and n.split(".")[2] in "01"}
    assert set(taken.remapped) == HEADS | arm
    for anchor, place in enumerate([0, 1, 1, 2]):
        for kind in ("weight", "bias"):
            name = f"arm.levels.0.{kind}"
            assert torch.equal(new[name][6 * anchor : 6 * anchor + 2], old[name][6 * place : 6 * place + 2])
            name = f"odm.levels.0.{kind}"
            to, of = new[name][7 * anchor : 7 * anchor + 7], old[name][25 * place : 25 * place + 25]
            assert torch.equal(to[0], of[0])
            assert torch.equal(to[1], of[4])
            assert torch.equal(to[2], fresh[name][7 * anchor + 2])
            assert torch.equal(to[3:], of[21:])


@pytest.mark.parametrize("has_arm", [True, False], ids=["two steps", "one step"])
def test_an_anchor_of_another_shape_begins_with_the_boxes_of_the_one_it_is_most_like(has_arm):
    config = config_of(2)
    config = replace(config, network=replace(config.network, arm=has_arm))
    old = detector_of(config, seed=1)
    new = detector_of(with_shapes(config, ((7.0, 9.0), (16.0, 4.0), (30.0, 9.0), (4.0, 17.0)), ((15.0, 11.0),)), seed=2)
    taken = copy_detector(new, old, {1: 1, 2: 2})
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))

    def boxes(detector):
        anchors = detector.config.require_anchors()
        found = tile_anchors(anchors, 64, 64)
        raw = detector.network(picture)
        for offsets in (raw.arm_offsets, raw.odm_offsets):
            found = found if offsets is None else decode(offsets[0], found, anchors.variances)
        each = [len(level) for level in anchors.shapes]
        cells = [h * w for h, w in level_sizes(anchors, 64, 64)]
        return [
            part.unflatten(0, (-1, number))
            for part, number in zip(found.split([c * n for c, n in zip(cells, each, strict=True)]), each, strict=True)
        ]

    with torch.inference_mode():
        for level, before, after in zip(taken.anchors, boxes(old), boxes(new), strict=True):
            torch.testing.assert_close(after, before[:, [one.place for one in level]])


def test_anchors_of_the_same_number_but_another_order_follow_their_shapes():
    shapes = [level[::-1] for level in config_of(20).require_anchors().shapes]
    detector = detector_of(with_shapes(config_of(20), *shapes), seed=2)
    taken = copy_detector(detector, TWENTY, {i: i for i in range(1, 21)})
    assert [[(one.place, one.iou) for one in level] for level in taken.anchors] == [[(2, 1.0), (1, 1.0), (0, 1.0)]] * 4
    new, old = clone(detector), clone(TWENTY)
    for name in HEADS:
        assert torch.equal(new[name].unflatten(0, (3, -1)), old[name].unflatten(0, (3, -1)).flip(0))


def reading(classes: int) -> DetectorConfig:
    config = config_of(classes)
    return replace(config, network=replace(config.network, odm_reads_arm=True))


def test_what_the_odm_reads_follows_its_classes():
    old, new = detector_of(reading(20), seed=1), detector_of(reading(3), seed=2)
    weight = "arm_reader.weight"
    old.network.state_dict()[weight].normal_(generator=torch.Generator().manual_seed(3))
    taken = copy_detector(new, old, {2: 15})
    before, after = old.network.state_dict()[weight], new.network.state_dict()[weight]
    assert weight in taken.remapped
    assert torch.equal(after[[0, 2, 4, 5, 6, 7]], before[[0, 15, 21, 22, 23, 24]])
    assert not after[[1, 3]].any()
    # A detector that did not read begins to, from nothing.
    taken = copy_detector(new, TWENTY, {2: 15})
    assert weight in taken.fresh


def test_an_anchor_that_holds_several_takes_the_one_of_its_form():
    # All three have half of the area, and IoU cannot tell them apart.
    others = ((10.0, 20.0), (20.0, 10.0), (200**0.5, 200**0.5))
    assert [one.place for one in nearest_shapes([(40.0, 20.1), (20.1, 40.0), (30.0, 30.0)], others)] == [1, 0, 2]
    assert nearest_shapes([others[1]], others)[0].iou == 1.0


def test_other_levels_leave_the_heads_fresh():
    other = SimpleNamespace(config=replace(TWENTY.config), network=TWENTY.network)
    strides = replace(TWENTY.config.require_anchors())
    object.__setattr__(strides, "strides", (4, 8, 16, 32))
    object.__setattr__(other.config, "anchors", strides)
    detector = detector_of(config_of(20), seed=2)
    taken = copy_detector(detector, other, {i: i for i in range(1, 21)})  # type: ignore[arg-type]
    assert {n.partition(".")[0] for n in taken.fresh} == {"arm", "odm"}
    assert not taken.class_outputs


# Families.


def test_between_families_only_the_backbone_means_the_same():
    refinedet = config_of(20)
    network = replace(refinedet.network, arm=False, tcb=False)
    ssd = detector_of(replace(refinedet, family="ssd", network=network), seed=2)
    taken = copy_detector(ssd, TWENTY, {i: i for i in range(1, 21)})
    new, old = clone(ssd), clone(TWENTY)
    assert set(taken.copied) == {n for n in new if n.startswith("backbone.")}
    assert {n.partition(".")[0] for n in taken.fresh} == {"head"}
    assert (taken.remapped, taken.class_outputs, taken.anchors) == ((), False, ())
    assert all(torch.equal(new[n], old[n]) for n in taken.copied)


def test_an_ssd_of_other_classes_takes_over_its_own_head():
    refinedet = config_of(3)
    network = replace(refinedet.network, arm=False, tcb=False)
    of_three = detector_of(replace(refinedet, family="ssd", network=network), seed=1)
    of_one = detector_of(replace(config_of(1), family="ssd", network=network), seed=2)
    taken = copy_detector(of_one, of_three, {1: 3})
    assert {n.partition(".")[0] for n in taken.remapped} == {"head"}
    new, old = clone(of_one)["head.levels.0.bias"], clone(of_three)["head.levels.0.bias"]
    assert torch.equal(new.view(3, 6), old.view(3, 8)[:, [0, 3, 4, 5, 6, 7]])


def test_a_grid_has_classes_without_background_and_no_anchors():
    def of(names: tuple[str, ...], boxes: int = 2) -> DetectorConfig:
        config = yolo320_mobilenetv2(Classes(names=names, category_ids=tuple(range(len(names))))).detector
        return replace(config, grid=replace(config.require_grid(), boxes=boxes, layers=1, channels=16))

    old, new = detector_of(of(("a", "b", "c")), seed=1), detector_of(of(("c", "x")), seed=2)
    fresh = clone(new)
    taken = copy_detector(new, old, {1: 3})
    assert set(taken.remapped) == {"classes.weight", "classes.bias"}
    assert (taken.fresh, taken.class_outputs, taken.anchors) == ((), True, ())
    state, before = clone(new), clone(old)
    for name in taken.remapped:
        assert torch.equal(state[name][0], before[name][2])
        assert torch.equal(state[name][1], fresh[name][1])
    other = copy_detector(detector_of(of(("a", "b", "c"), boxes=3), seed=2), old, {1: 1, 2: 2, 3: 3})
    assert {n.partition(".")[0] for n in other.fresh} == {"boxes"}
    # Of a RefineDet it takes the backbone as far as it reads it.
    of_twenty = copy_detector(new, TWENTY, {1: 1})
    assert set(of_twenty.copied) == {n for n in state if n.startswith("backbone.")}


# Files.


class Mine:
    """A pickle of this runs a command where it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("inside", [True, False], ids=["in a state dict", "bare"])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, zipped, inside):
    target, path = tmp_path / "owned", tmp_path / "hostile.pth"
    content = {"features.0.0.weight": torch.zeros(2), "payload": Mine(target)} if inside else Mine(target)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"hostile\.pth.*refused"):
        read_tensors(path)
    assert not target.exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path):
    target, path = tmp_path / "owned", tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(Mine(target)))
    with pytest.raises(CheckpointError):
        read_tensors(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # so the guard had something to stop


def test_a_file_cut_short_anywhere(tmp_path):
    tensors = {"features.a": torch.arange(500.0), "b": torch.ones(3, dtype=torch.int64)}
    for name, save in (("w.pth", torch.save), ("w.safetensors", save_file)):
        path = tmp_path / name
        save(tensors, path)
        whole = path.read_bytes()
        for length in [*range(0, len(whole), 97), len(whole) - 1]:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=name):
                read_tensors(path)
        path.write_bytes(whole)
        assert read_tensors(path).keys() == tensors.keys()


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], torch.zeros(1), {"epoch": 3}, {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}, None],
    ids=["list", "tensor", "number", "nested", "key", "none"],
)
def test_anything_but_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"odd\.pth: not a plain state dict"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["text.pth", "text.safetensors"])
def test_a_text_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("<html>404: not found</html>\n")
    with pytest.raises(CheckpointError, match=name):
        read_tensors(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path, match in ((tmp_path / "none.pth", "there is no such file"), (tmp_path, "this is a folder")):
        with pytest.raises(CheckpointError, match=match):
            read_tensors(path)
