"""Networks prepared for prediction compute what they computed before, and leave their originals alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from refinedet_cli.core import fused
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.fused import FusedNetwork
from refinedet_cli.core.presets import get_preset

CPU = torch.device("cpu")
TWO = Classes(names=("a", "b"), category_ids=(1, 2))
SIZES = {"ssd300_vgg16": 300, "yolo320_mobilenetv2": 64}


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give normalisation statistics and factors that are not 0 and 1, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.2, 0.2),
                (layer.running_var, 0.5, 2.0),
                (layer.weight.data, 0.5, 1.5),
                (layer.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)
    return network.eval()


def made(preset: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return lively(build(get_preset(preset, TWO).detector).network)


def pictures(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def prepare(network: nn.Module, *, bf16: bool = False, size: int = 64) -> FusedNetwork:
    return FusedNetwork(network, device=CPU, bf16=bf16, input_size=(size, size))


def tensors(raw: Any) -> list[Tensor]:
    return [value for value in raw if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    "preset",
    [
        "tiny",
        "refinedet320_mobilenetv2",
        "refinedet320_resnet18",
        "refinedet320_resnet101",
        "refinedet320_vgg16",
        "ssd300_vgg16",
        "ssd320_mobilenetv2",
        "yolo320_mobilenetv2",
    ],
)
@torch.inference_mode()
def test_computes_what_the_network_computes(preset):
    network, size = made(preset), SIZES.get(preset, 64)
    images = pictures(2, size)
    expected, found = network(images), prepare(network, size=size)(images)
    assert type(found) is type(expected)
    assert len(tensors(found)) >= 2
    for mine, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            assert_close(mine, other, rtol=1e-4, atol=2e-5)
        else:
            assert mine == other


@torch.inference_mode()
def test_bf16_is_near_and_tells_its_dtype():
    network, images = made("refinedet320_mobilenetv2"), pictures(2, 64)
    for mine, other in zip(tensors(prepare(network, bf16=True)(images)), tensors(network(images)), strict=True):
        assert mine.dtype == torch.bfloat16
        assert_close(mine.float(), other, rtol=0, atol=0.05 * float(other.abs().max()))


@torch.inference_mode()
def test_other_sizes_and_batches_than_the_usual():
    network = made("refinedet320_mobilenetv2")
    prepared = prepare(network)
    for shape in ((1, 3, 64, 64), (5, 3, 64, 64), (2, 3, 128, 192), (1, 3, 64, 64)):
        images = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        for mine, other in zip(tensors(prepared(images)), tensors(network(images)), strict=True):
            assert_close(mine, other, rtol=1e-4, atol=2e-5)


def test_light_networks_suit_lanes_and_heavy_ones_do_not(monkeypatch):
    network = made("refinedet320_mobilenetv2")
    largest = 96 * (32 * 32 + 16 * 16) * 4  # of 64 px, where 96 channels of 32 x 32 become 16 x 16
    for most, suits in ((2 * largest, True), (2 * largest - 1, False)):
        monkeypatch.setattr(fused, "_MOST_BYTES", most)
        assert prepare(network).suits_lanes is suits


def test_large_batches_are_cut_to_what_the_allocator_keeps(monkeypatch):
    prepared = prepare(made("refinedet320_mobilenetv2"))
    # Of 64 px most is read and written where 96 channels of 32 x 32 become 16 x 16.
    monkeypatch.setattr(fused, "_MOST_BYTES", 3 * 96 * (32 * 32 + 16 * 16) * 4)
    assert [len(part) for part in prepared.parts(pictures(8, 64))] == [3, 3, 2]
    # Lanes have as many parts each, so that none waits for another.
    assert [len(part) for part in prepared.parts(pictures(7, 64), lanes=2)] == [2, 2, 2, 1]
    assert [len(part) for part in prepared.parts(pictures(5, 64), lanes=4)] == [2, 1, 1, 1]
    assert [len(part) for part in prepared.parts(pictures(2, 64), lanes=4)] == [1, 1]
    assert torch.equal(torch.cat(prepared.parts(pictures(7, 64), lanes=2)), pictures(7, 64))
    assert [len(part) for part in prepared.parts(pictures(3, 128))] == [1, 1, 1]
    monkeypatch.setattr(fused, "_MOST_BYTES", 1)
    assert [len(part) for part in prepared.parts(pictures(2, 64))] == [1, 1]
    assert [len(part) for part in prepare(Choosy(), size=16).parts(pictures(5, 16))] == [5]


def test_the_original_stays_as_it_is():
    network = made("tiny").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    prepared = prepare(network, bf16=True)
    expected = prepared(pictures(1, 64))
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert_close(tensor, before[name], rtol=0, atol=0)
    for parameter in network.parameters():
        parameter.data.zero_()
    for mine, other in zip(tensors(prepared(pictures(1, 64))), tensors(expected), strict=True):
        assert_close(mine, other, rtol=0, atol=0)


def test_nothing_is_left_of_normalisation_and_activations():
    prepared = prepare(made("refinedet320_mobilenetv2"))
    layers = {type(prepared._network.get_submodule(str(n.target))) for n in calls(prepared)}
    assert not layers & {nn.BatchNorm2d, nn.ReLU6, nn.Conv2d}
    assert nn.GroupNorm in layers


def calls(prepared: FusedNetwork) -> list[Any]:
    return [node for node in prepared._network.graph.nodes if node.op == "call_module"]


def test_without_the_operators_only_normalisation_is_folded(monkeypatch):
    network, images = made("refinedet320_mobilenetv2"), pictures(1, 64)
    monkeypatch.setattr(fused, "_has_fused_convolution", lambda _: False)
    prepared = prepare(network)
    layers = {type(prepared._network.get_submodule(str(n.target))) for n in calls(prepared)}
    assert nn.BatchNorm2d not in layers
    assert {nn.Conv2d, nn.ReLU6} <= layers
    with torch.inference_mode():
        for mine, other in zip(tensors(prepared(images)), tensors(network(images)), strict=True):
            assert_close(mine, other, rtol=1e-4, atol=2e-5)


class Shared(nn.Module):
    """One convolution computed twice, and one whose result is read before its normalisation and activation too."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.read, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = self.other(self.twice(self.norm(self.twice(images))))
        tapped = self.read(first)
        return tapped, functional.relu(tapped) + self.relu(first)


class Choosy(nn.Module):
    """What it computes depends on the values, so it cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        features = self.norm(self.conv(images))
        return (features if features.sum() > 0 else -features,)


@torch.inference_mode()
def test_bf16_subtracts_large_means_exactly():
    """A convolution whose results are far from 0, and normalised to be near it."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    network[0].weight.data.fill_(1.0)
    network[1].running_mean.fill_(300.7)
    images = torch.full((1, 3, 8, 8), 100.0)
    images[..., 4:] = 101.0
    assert_close(prepare(network, size=8)(images), network(images), rtol=1e-5, atol=1e-4)
    assert_close(prepare(network, bf16=True, size=8)(images).float(), network(images), rtol=1e-2, atol=0)


@pytest.mark.parametrize("make", [Shared, Choosy])
@torch.inference_mode()
def test_networks_that_cannot_be_changed_everywhere(make):
    network, images = lively(make()), pictures(2, 16)
    for mine, other in zip(prepare(network, size=16)(images), network(images), strict=True):
        assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for mine, other in zip(prepare(network, bf16=True, size=16)(images), network(images), strict=True):
        assert mine.dtype == torch.bfloat16
        assert_close(mine.float(), other, rtol=0.05, atol=0.05)
