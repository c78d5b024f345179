"""Taking weights over: class outputs row by row, and files that must not be trusted."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.refinedet import RefineDet
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.warm_start import copy_detector, read_tensors

ANCHORS, LEVELS = 3, 4


def config_of(classes: int) -> DetectorConfig:
    return tiny(Classes(names=tuple(f"c{i}" for i in range(classes)), category_ids=tuple(range(classes)))).detector


def network_of(config: DetectorConfig, seed: int) -> RefineDet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RefineDet(config)
        for parameter in network.parameters():
            if parameter.ndim == 1:  # biases and norms, which all networks start with alike
                nn.init.normal_(parameter)
    return network


def clone(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


TWENTY = network_of(config_of(20), seed=1)


@pytest.mark.parametrize(
    ("classes", "label_map"),
    [
        (3, {2: 15}),
        (1, {1: 7}),
        (1, {}),
        (25, {**{i: 21 - i for i in range(1, 21)}, 25: 4}),
        (20, {1: 20, 20: 1}),
        (20, {i: i for i in range(1, 21)}),
    ],
    ids=["one shared", "to one", "none shared", "to more", "reordered", "same"],
)
def test_class_rows_follow_their_names(classes, label_map):
    network = network_of(config_of(classes), seed=2)
    fresh, old = clone(network), clone(TWENTY)
    taken = copy_detector(network, TWENTY.state_dict(), label_map, classes + 1, 21)
    new = network.state_dict()
    heads = {f"odm.levels.{level}.{kind}" for level in range(LEVELS) for kind in ("weight", "bias")}
    assert set(taken.remapped) == heads
    assert set(taken.copied) == new.keys() - heads
    assert taken.fresh == ()
    for name in taken.copied:
        assert torch.equal(new[name], old[name]), name
    for name in heads:
        for anchor in range(ANCHORS):
            to, of = anchor * (classes + 5), anchor * 25
            for label in range(classes + 1):
                source = {0: 0, **label_map}.get(label)
                expected = fresh[name][to + label] if source is None else old[name][of + source]
                assert torch.equal(new[name][to + label], expected), (name, anchor, label)
            for coordinate in range(4):
                expected = old[name][of + 21 + coordinate]
                assert torch.equal(new[name][to + classes + 1 + coordinate], expected), (name, anchor, coordinate)


def test_the_source_is_left_as_it_was_and_shares_no_memory():
    before = clone(TWENTY)
    network = network_of(config_of(20), seed=2)
    copy_detector(network, TWENTY.state_dict(), {1: 2}, 21, 21)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for name, tensor in TWENTY.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("change", [{"tcb_channels": 64}, {"tcb": False}])
def test_parts_of_other_shapes_stay_fresh(change):
    config = config_of(2)
    network = network_of(replace(config, network=replace(config.network, **change)), seed=2)
    before = clone(network)
    taken = copy_detector(network, TWENTY.state_dict(), {1: 1}, 3, 21)
    new = network.state_dict()
    assert {f"odm.levels.{i}.weight" for i in range(LEVELS)} <= set(taken.fresh)
    for name in taken.fresh:
        assert torch.equal(new[name], before[name]), name
    assert {n for n in new if n.startswith(("backbone.", "arm."))} <= set(taken.copied)
    assert sorted((*taken.copied, *taken.remapped, *taken.fresh)) == sorted(new)


def test_what_the_source_lacks_stays_fresh():
    config = config_of(20)
    source = network_of(replace(config, network=replace(config.network, arm=False)), seed=3)
    network = network_of(config, seed=2)
    taken = copy_detector(network, source.state_dict(), {i: i for i in range(1, 21)}, 21, 21)
    assert set(taken.fresh) == {n for n in network.state_dict() if n.startswith("arm.")}


def test_a_source_with_other_anchors_gives_all_but_its_heads():
    config = config_of(2)
    shapes = tuple(level[:2] for level in config.anchors.shapes)
    network = network_of(replace(config, anchors=replace(config.anchors, shapes=shapes)), seed=2)
    taken = copy_detector(network, TWENTY.state_dict(), {1: 1, 2: 2}, 3, 21)
    assert {n.partition(".")[0] for n in taken.fresh} == {"arm", "odm"}
    assert taken.remapped == ()


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
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such file"):
            read_tensors(path)
