"""Backbones: torchvision's layers under torchvision's names, timm's networks, and how both are cut into stages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models

from refinedet_cli.core.backbones import Backbone, StridedDepthwise, build_backbone
from refinedet_cli.core.config import Classes, DetectorConfig, NetworkConfig
from refinedet_cli.core.presets import tiny
from refinedet_cli.core.refinedet import RefineDet
from refinedet_cli.errors import ConfigError


def images_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(name: str, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(NetworkConfig(backbone=name, **settings))


def on_meta(name: str, **settings: Any) -> Any:
    with torch.device("meta"):
        return build_backbone(NetworkConfig(backbone=name, **settings))


def stir(network: nn.Module) -> None:
    """Draw weights and statistics so that signals keep their size."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)


# ResNet.


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_with_torchvision_s_switches_it_is_torchvision_s_network(name):
    backbone = seeded(name).eval()
    stir(backbone)
    body = models.get_model(name, weights=None).eval()
    own = {n: t for n, t in backbone.state_dict().items() if not n.startswith("res6.")}
    assert own.keys() == {n for n in body.state_dict() if not n.startswith("fc.")}
    body.load_state_dict(own, strict=False)
    images = images_of(2, 3, 64, 128)
    with torch.no_grad():
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        for found, layer in zip(backbone(images), (body.layer2, body.layer3, body.layer4), strict=False):
            x = layer(x)
            assert float(x.std()) > 0.1
            assert_close(found, x, rtol=1e-5, atol=1e-5)


def test_resnet101_has_torchvision_s_names():
    backbone = on_meta("resnet101")
    with torch.device("meta"):
        body = models.resnet101(weights=None)
    own = {n: t.shape for n, t in backbone.state_dict().items() if not n.startswith("res6.")}
    assert own == {n: t.shape for n, t in body.state_dict().items() if not n.startswith("fc.")}
    assert tuple(backbone.res6.conv3.weight.shape) == (512, 128, 1, 1)
    assert tuple(backbone.res6.downsample[0].weight.shape) == (512, 2048, 1, 1)


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
def test_strides_of_resnet101(stride_in):
    backbone = on_meta("resnet101", stride_in=stride_in)
    halving = {n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    blocks = ("layer2.0", "layer3.0", "layer4.0", "res6")
    place = {"1x1": "conv1", "3x3": "conv2"}[stride_in]
    assert halving == {"conv1"} | {f"{b}.{place}" for b in blocks} | {f"{b}.downsample.0" for b in blocks}


def test_the_first_pooling_is_caffe_s_or_torchvision_s():
    # One bright pixel at an even place: Caffe's windows begin there, torchvision's end one before or begin one after.
    picture = torch.zeros(1, 1, 8, 8)
    picture[0, 0, 4, 7] = 1
    seen = {
        how: on_meta("resnet18", stem_pool=how).pool(picture)[0, 0].nonzero().tolist() for how in ("ceil", "padded")
    }
    assert seen == {"ceil": [[1, 3], [2, 3]], "padded": [[2, 3]]}


@pytest.mark.parametrize("stem_pool", ["ceil", "padded"])
def test_both_poolings_halve(stem_pool):
    for height, width in ((64, 64), (128, 320)):
        maps = on_meta("resnet18", stem_pool=stem_pool)(torch.empty(2, 3, height, width, device="meta"))
        assert [tuple(m.shape[2:]) for m in maps] == [(height // s, width // s) for s in (8, 16, 32, 64)]


# Stages.


def check_stages(backbone: Any, strides: tuple[int, ...], extra: str) -> None:
    """Stages hold every layer before the extra level once, and each ends where it says; the first may be frozen."""
    stages = backbone.stages()
    assert len(stages) == len(strides)
    owned = [{id(p) for p in stage.parameters()} for stage in stages]
    body = {n: p for n, p in backbone.named_parameters() if not n.startswith(extra)}
    assert sum(map(len, owned)) == len(body)
    assert set().union(*owned) == {id(p) for p in body.values()}

    given: dict[int, list[int]] = {}
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, output, index=index: given.setdefault(index, []).append(128 // output.shape[3])
        )
        for index, stage in enumerate(stages)
        for layer in stage.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
    ]
    backbone.eval()
    with torch.no_grad():
        backbone(images_of(1, 3, 64, 128).to(next(backbone.parameters()).device))
    for handle in handles:
        handle.remove()
    before = 1
    for index, stride in enumerate(strides):
        # A convolution may still work at the resolution that the stage takes.
        assert set(given[index]) - {before} == {stride}
        before = stride

    backbone.train()
    backbone.requires_grad_(True)
    for count, stage in enumerate(stages, start=1):
        stage.requires_grad_(False)
        stage.eval()
        trained = {id(p) for p in backbone.parameters() if p.requires_grad}
        assert trained == {id(p) for p in backbone.parameters()} - set().union(*owned[:count])
    layers = [m for stage in backbone.stages() for m in stage.modules() if not list(m.children())]
    assert layers
    assert not any(m.training for m in layers)
    assert all(p.requires_grad for n, p in backbone.named_parameters() if n.startswith(extra))


@pytest.mark.parametrize("stride_in", ["1x1", "3x3"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stages_of_resnets(name, stride_in):
    check_stages(on_meta(name, stride_in=stride_in), (2, 4, 8, 16, 32), "res6")


# timm.


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="the extra timm is not installed")


def test_timm_s_resnet_gives_the_same_maps(timm):
    ours, theirs = seeded("resnet18").eval(), seeded("timm/resnet18").eval()
    stir(ours)
    theirs.body.load_state_dict({n: t for n, t in ours.state_dict().items() if not n.startswith("res6.")}, strict=True)
    assert theirs.channels == (128, 256, 512, 256)
    images = images_of(2, 3, 64, 128)
    with torch.no_grad():
        maps = theirs(images)
        for found, wanted in zip(maps[:3], ours(images)[:3], strict=True):
            assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert tuple(maps[3].shape) == (2, 256, 1, 2)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("resnet18", (2, 4, 8, 16, 32)),
        ("mobilenetv3_small_050", (2, 4, 8, 16, 32)),
        ("regnetx_002", (2, 4, 8, 16, 32)),
        ("convnext_atto", (4, 8, 16, 32)),
    ],
)
def test_stages_of_timm_s_networks(timm, name, strides):
    check_stages(seeded(f"timm/{name}"), strides, "extra")


def detector_on(backbone: str) -> DetectorConfig:
    base = tiny(Classes(names=("a", "b"), category_ids=(1, 2))).detector
    return replace(base, network=replace(base.network, backbone=backbone))


def test_a_detector_on_a_network_of_timm_trains_and_is_rebuilt_from_its_config(timm):
    config = detector_on("timm/mobilenetv3_small_050")
    network = RefineDet(config)
    images = images_of(2, 3, 64, 128)
    raw = network(images)
    assert [tuple(t.shape) for t in raw[:4]] == [(2, 510, n) for n in (2, 4, 3, 4)]
    sum(t.square().sum() for t in raw[:4]).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []
    # In training it is watched once, on zeros; that must leave no trace in its statistics.
    fresh = RefineDet(config)
    assert all(not t.any() for n, t in fresh.state_dict().items() if n.endswith(("running_mean", "batches_tracked")))
    assert all(m.training for m in fresh.modules())
    fresh.load_state_dict(network.state_dict(), strict=True)
    with torch.no_grad():
        for found, wanted in zip(fresh.eval()(images)[:4], network.eval()(images)[:4], strict=True):
            assert_close(found, wanted, rtol=0, atol=0)


def test_nothing_of_timm_s_networks_is_dropped_at_random(timm):
    assert any(m.drop_prob for m in timm.create_model("nextvit_small").modules() if hasattr(m, "drop_prob"))
    backbone = seeded("timm/nextvit_small")
    images = images_of(2, 3, 64, 64)
    with torch.no_grad():
        for first, second in zip(backbone(images), backbone(images), strict=True):
            assert_close(first, second, rtol=0, atol=0)


def test_timm_s_strided_depthwise_convolutions_compute_the_same(timm):
    backbone = seeded("timm/mobilenetv3_small_050")
    strided = [m for m in backbone.modules() if isinstance(m, StridedDepthwise)]
    assert {m.kernel_size for m in strided} == {(3, 3), (5, 5)}
    assert all(m.padding[0] == m.kernel_size[0] // 2 and m.weight.requires_grad for m in strided)


def test_networks_that_timm_has_without_the_maps_are_refused(timm):
    with pytest.raises(ConfigError, match=r"timm/vit_tiny_patch16_224: no map at stride 8, 32; .* maps at 16$"):
        on_meta("timm/vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="timm/swin_tiny_patch4_window7_224: does not take a picture of 64 x 128"):
        on_meta("timm/swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", ["resnet8", "hf-hub:timm/resnet18.a1_in1k"])
def test_names_that_timm_does_not_know_are_refused(timm, name):
    with pytest.raises(ConfigError, match=rf"timm/{name}: timm [\d.]+\w* has no network of this name") as caught:
        seeded(f"timm/{name}")
    if name == "resnet8":
        assert "resnet18" in caught.value.hint


def test_without_timm_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"network\.backbone timm/resnet18: the package timm cannot be imported"
    ) as caught:
        seeded("timm/resnet18")
    assert caught.value.hint == 'pip install "refinedet[timm]"'
    assert caught.value.exit_code == 3


class Pyramid(nn.Module):
    """What timm's extractors are like, as small as can be: a map for each step, in a container that is never called."""

    def __init__(self, strides: tuple[int, ...], change: Callable[[Tensor], Tensor] = lambda m: m) -> None:
        super().__init__()
        self.feature_info = SimpleNamespace(reduction=lambda: list(strides))
        steps = zip(strides, (1, *strides[:-1]), strict=True)
        self.blocks = nn.ModuleList(self.step(3 if i == 0 else 4, s // before) for i, (s, before) in enumerate(steps))
        self.never_run = nn.Linear(2, 2)
        self.change = change

    def step(self, inputs: int, stride: int) -> nn.Module:
        if stride == 4:
            return nn.Sequential(self.step(inputs, 2), self.step(4, 2))
        return nn.Conv2d(inputs, 4, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(self.change(x))
        return maps


def stand_in(monkeypatch: pytest.MonkeyPatch, create: Callable[..., nn.Module]) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def create_model(name: str, **how: Any) -> nn.Module:
        asked.append({"name": name, **how})
        return create()

    fake = SimpleNamespace(
        __version__="0", is_model=lambda n: n == "net", list_models=lambda: ["net"], create_model=create_model
    )
    monkeypatch.setitem(sys.modules, "timm", fake)
    return asked


def test_the_last_map_of_each_stride_is_read(monkeypatch):
    asked = stand_in(monkeypatch, lambda: Pyramid((2, 4, 8, 8, 16, 32, 32)))
    backbone: Backbone = seeded("timm/net")
    assert asked == [{"name": "net", "pretrained": False, "features_only": True}]
    images = images_of(1, 3, 64, 64)
    maps, all_maps = backbone(images), backbone.body(images)  # type: ignore[attr-defined]
    for found, index in zip(maps[:3], (3, 4, 6), strict=True):
        assert_close(found, all_maps[index], rtol=0, atol=0)
    held = [
        [n for n, p in backbone.body.named_parameters() if p in set(stage.parameters())] for stage in backbone.stages()
    ]  # type: ignore[attr-defined]
    indices = [sorted({int(n.split(".")[1]) for n in names if n.startswith("blocks")}) for names in held]
    assert indices == [[0], [1], [2, 3], [4], [5, 6]]
    # What never runs is held too, so that whoever freezes everything freezes it.
    assert "never_run.weight" in held[-1]


def test_a_block_that_halves_twice_is_cut_within(monkeypatch):
    stand_in(monkeypatch, lambda: Pyramid((4, 8, 16, 32)))
    backbone = seeded("timm/net")
    check_stages(backbone, (2, 4, 8, 16, 32), "extra")
    assert next(iter(backbone.stages()[0].parameters())) is backbone.body.blocks[0][0].weight


def test_a_missing_stride_is_named_with_those_there_are(monkeypatch):
    stand_in(monkeypatch, lambda: Pyramid((2, 4, 8, 16, 16)))
    with pytest.raises(ConfigError, match=r"timm/net: no map at stride 32; there are maps at 2, 4, 8, 16$") as caught:
        seeded("timm/net")
    assert caught.value.hint == "choose a network with maps at strides 8, 16, 32"


def test_maps_that_are_not_channels_first_are_refused(monkeypatch):
    stand_in(monkeypatch, lambda: Pyramid((8, 16, 32), lambda m: m.permute(0, 2, 3, 1)))
    with pytest.raises(ConfigError, match="its map at stride 8 is 8 x 16 x 4, not channels x 8 x 16"):
        seeded("timm/net")


def test_a_network_of_one_size_is_refused(monkeypatch):
    def fixed(m: Tensor) -> Tensor:
        raise AssertionError("height is not 224")

    stand_in(monkeypatch, lambda: Pyramid((8, 16, 32), fixed))
    with pytest.raises(ConfigError, match=r"does not take a picture of 64 x 128 \(AssertionError: height is not 224\)"):
        seeded("timm/net")


def test_a_network_without_an_extractor_is_refused(monkeypatch):
    def create() -> nn.Module:
        raise RuntimeError("features_only not implemented")

    stand_in(monkeypatch, create)
    with pytest.raises(ConfigError, match=r"timm/net: timm makes no feature extractor of it \(RuntimeError: features"):
        seeded("timm/net")
