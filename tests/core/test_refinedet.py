"""The network as published: its size, its forward pass written out by hand, and its switches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torchvision.models import mobilenet_v2

from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.backbones import StridedDepthwise
from refinedet_cli.core.boxes import cxcywh_to_xyxy, decode
from refinedet_cli.core.config import Classes, DetectorConfig, PreprocessConfig
from refinedet_cli.core.layers import (
    AnchorHead,
    L2Norm,
    TransferConnectionBlock,
    bottleneck,
    caffe_init,
    gaussian_init,
    stride_in_1x1,
)
from refinedet_cli.core.postprocess import suppress
from refinedet_cli.core.presets import VOC_CLASSES, get_preset, tiny
from refinedet_cli.core.refinedet import Decoder, RawOutput, RefineDet, build
from refinedet_cli.core.structures import Target, Targets

COCO_SIZED = Classes(names=tuple(f"c{i}" for i in range(80)), category_ids=tuple(range(1, 81)))
TWO = Classes(names=("a", "b"), category_ids=(1, 2))


def on_meta(config: DetectorConfig) -> RefineDet:
    with torch.device("meta"):
        return RefineDet(config)


def seeded(config: DetectorConfig, seed: int = 0) -> RefineDet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RefineDet(config)


def images_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Size.


def count_macs(network: nn.Module, images: Tensor) -> tuple[dict[str, float], RawOutput]:
    """Count a picture's multiply-adds in convolutions and deconvolutions, in billions, by top-level part."""
    macs: dict[str, float] = {}

    def counter(part: str):
        def count(layer: nn.Conv2d | nn.ConvTranspose2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Each place of the larger map is touched by every weight once.
            place = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
            macs[part] = macs.get(part, 0) + layer.weight.numel() * place.shape[2] * place.shape[3] / 1e9

        return count

    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.register_forward_hook(counter(name.partition(".")[0]))
    raw = network(images)
    return macs, raw


# With 81 classes the ResNets have as many parameters as others published of them (VoVNet, arXiv:1904.09730).
@pytest.mark.parametrize(
    ("preset", "classes", "parameters", "billions"),
    [
        ("refinedet320_vgg16", VOC_CLASSES, 34_440_884, 37.77),
        ("refinedet320_vgg16", COCO_SIZED, 36_100_484, 38.65),
        ("refinedet512_vgg16", VOC_CLASSES, 34_440_884, 96.70),
        ("refinedet320_resnet101", VOC_CLASSES, 75_815_348, 29.45),
        ("refinedet320_resnet101", COCO_SIZED, 82_451_588, 32.98),
        ("refinedet512_resnet101", COCO_SIZED, 82_451_588, 84.42),
        ("refinedet320_resnet50", VOC_CLASSES, 56_823_220, 22.37),
        ("refinedet320_resnet50", COCO_SIZED, 63_459_460, 25.89),
        ("refinedet320_resnet18", VOC_CLASSES, 15_296_074, 5.05),
        ("refinedet320_mobilenetv2", VOC_CLASSES, 7_437_066, 2.36),
    ],
)
def test_sizes(preset, classes, parameters, billions):
    config = get_preset(preset, classes).detector
    network, side = on_meta(config), config.preprocess.height
    assert sum(p.numel() for p in network.parameters()) == parameters
    macs, raw = count_macs(network, torch.empty(2, 3, side, side, device="meta"))
    assert sum(macs.values()) == pytest.approx(billions, abs=0.01)
    if (preset, classes) == ("refinedet320_vgg16", VOC_CLASSES):
        parts = {"backbone": 31.95, "tcb": 5.27, "arm": 0.19, "odm": 0.37}
        assert macs == {name: pytest.approx(value, abs=0.01) for name, value in parts.items()}
    anchors = {320: 6375, 512: 16320}[side]
    assert [tuple(t.shape) for t in raw[:4]] == [(2, anchors, n) for n in (2, 4, classes.with_background, 4)]
    assert raw.input_size == (side, side)


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("vgg16", (512, 512, 1024, 512)),
        ("mobilenet_v2", (192, 576, 1280, 256)),
        ("resnet18", (128, 256, 512, 512)),
        ("resnet50", (512, 1024, 2048, 512)),
        ("resnet101", (512, 1024, 2048, 512)),
    ],
)
def test_maps_of_the_backbones(backbone, channels):
    config = tiny(TWO).detector
    network = on_meta(replace(config, network=replace(config.network, backbone=backbone)))
    assert network.backbone.channels == channels
    maps = network.backbone(torch.empty(2, 3, 128, 192, device="meta"))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 128 // s, 192 // s) for c, s in zip(channels, (8, 16, 32, 64), strict=True)
    ]
    # Five stages, each of layers of its own; frozen from the input up.
    stages = network.backbone.stages()
    owned = [{id(p) for p in stage.parameters()} for stage in stages]
    assert len(stages) == 5
    assert all(owned)
    assert sum(map(len, owned)) == len(set().union(*owned))
    assert id(next(network.backbone.parameters())) in owned[0]


# The forward pass, by hand.


def vgg_by_hand(state: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The refinement maps and the detection maps, from the tables of the official code."""

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)

    def block(x: Tensor, name: str, depth: int) -> Tensor:
        for i in range(depth):
            x = conv(x, f"backbone.{name}.{i}.0", padding=1).relu()
        return x

    def unit_length(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).sum(1, keepdim=True) + 1e-10).sqrt() * state[f"backbone.{name}.weight"].view(1, -1, 1, 1)

    x = images
    for name, depth in (("conv1", 2), ("conv2", 2), ("conv3", 3)):
        x = functional.max_pool2d(block(x, name, depth), 2, 2)
    conv4 = block(x, "conv4", 3)
    conv5 = block(functional.max_pool2d(conv4, 2, 2), "conv5", 3)
    fc6 = conv(functional.max_pool2d(conv5, 2, 2), "backbone.fc6.0", padding=3, dilation=3).relu()
    fc7 = conv(fc6, "backbone.fc7.0").relu()
    conv6 = conv(conv(fc7, "backbone.conv6.0.0").relu(), "backbone.conv6.1.0", padding=1, stride=2).relu()
    sources = [unit_length(conv4, "norm4"), unit_length(conv5, "norm5"), fc7, conv6]

    pyramid: list[Tensor] = []
    for level in (3, 2, 1, 0):
        name = f"tcb.{level}"
        x = conv(sources[level], f"{name}.first.0", padding=1).relu()
        x = conv(x, f"{name}.second.0", padding=1)
        if pyramid:
            up = f"{name}.up.0"
            x = x + functional.conv_transpose2d(pyramid[0], state[f"{up}.weight"], state[f"{up}.bias"], stride=2)
        pyramid.insert(0, conv(x.relu(), f"{name}.last.0", padding=1).relu())
    return sources, pyramid


def head_by_hand(state: dict[str, Tensor], maps: list[Tensor], name: str, classes: int) -> tuple[Tensor, Tensor]:
    logits, offsets = [], []
    for level, features in enumerate(maps):
        weight, bias = state[f"{name}.levels.{level}.weight"], state[f"{name}.levels.{level}.bias"]
        flat = functional.conv2d(features, weight, bias, padding=1)
        # A cell at a time: its rows, its columns, its three anchors.
        for y in range(flat.shape[2]):
            for x in range(flat.shape[3]):
                for anchor in flat[:, :, y, x].split(classes + 4, dim=1):
                    logits.append(anchor[:, :classes])
                    offsets.append(anchor[:, classes:])
    return torch.stack(logits, dim=1), torch.stack(offsets, dim=1)


def test_vgg16_forward_by_hand():
    network = seeded(get_preset("refinedet320_vgg16", TWO).detector).eval()
    for parameter in network.parameters():
        if parameter.ndim == 1 and not parameter.any():  # biases, which start at 0
            parameter.detach().normal_(0, 0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    # At 64 px the coarsest maps are so small that only the middle of fc6's kernel meets them.
    images = images_of(1, 3, 128, 128)
    with torch.no_grad():
        raw = network(images)
        sources, pyramid = vgg_by_hand(dict(network.state_dict()), images)
        expected = (
            *head_by_hand(dict(network.state_dict()), sources, "arm", 2),
            *head_by_hand(dict(network.state_dict()), pyramid, "odm", 3),
        )
    for found, wanted in zip(raw[:4], expected, strict=True):
        assert float(found.std()) > 1e-3
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class ResNetByHand:
    """The official layers as functions of a state, batch normalisation by its running statistics."""

    def __init__(self, state: dict[str, Tensor], stride_in: str) -> None:
        self.state, self.stride_in = state, stride_in

    def normalised(self, x: Tensor, norm: str) -> Tensor:
        mean, variance, scale, shift = (
            self.state[f"{norm}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def unit(self, x: Tensor, layer: str, norm: str, **how: int) -> Tensor:
        return self.normalised(functional.conv2d(x, self.state[f"{layer}.weight"], **how), norm)

    def block(self, x: Tensor, name: str, stride: int) -> Tensor:
        skip = x
        if f"{name}.downsample.0.weight" in self.state:
            skip = self.unit(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
        if f"{name}.conv3.weight" not in self.state:
            x = self.unit(x, f"{name}.conv1", f"{name}.bn1", stride=stride, padding=1).relu()
            return (self.unit(x, f"{name}.conv2", f"{name}.bn2", padding=1) + skip).relu()
        first, second = (stride, 1) if self.stride_in == "1x1" else (1, stride)
        x = self.unit(x, f"{name}.conv1", f"{name}.bn1", stride=first).relu()
        x = self.unit(x, f"{name}.conv2", f"{name}.bn2", stride=second, padding=1).relu()
        return (self.unit(x, f"{name}.conv3", f"{name}.bn3") + skip).relu()

    def sources(self, images: Tensor, depths: tuple[int, ...], stem_pool: str) -> list[Tensor]:
        x = self.unit(images, "backbone.conv1", "backbone.bn1", stride=2, padding=3).relu()
        # All are positive, so zeros outside are as good as nothing; Caffe's last window hangs over the far edges.
        sides = (0, 1, 0, 1) if stem_pool == "ceil" else (1, 1, 1, 1)
        x = functional.pad(x, sides).unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(-1, -2))
        ends = []
        for group, depth in enumerate(depths, start=1):
            for i in range(depth):
                x = self.block(x, f"backbone.layer{group}.{i}", 2 if group > 1 and i == 0 else 1)
            ends.append(x)
        return [*ends[1:], self.block(x, "backbone.res6", 2)]

    def pyramid(self, sources: list[Tensor]) -> list[Tensor]:
        maps: list[Tensor] = []
        for level in (3, 2, 1, 0):
            name = f"tcb.{level}"
            x = self.unit(sources[level], f"{name}.first.0", f"{name}.first.1", padding=1).relu()
            x = self.unit(x, f"{name}.second.0", f"{name}.second.1", padding=1)
            if maps:
                up = functional.conv_transpose2d(maps[0], self.state[f"{name}.up.0.weight"], stride=2)
                x = x + self.normalised(up, f"{name}.up.1")
            maps.insert(0, self.unit(x.relu(), f"{name}.last.0", f"{name}.last.1", padding=1).relu())
        return maps


def resnet_config(backbone: str, **changes: Any) -> DetectorConfig:
    """The official arrangement, with a narrow pyramid."""
    base = get_preset("refinedet320_resnet101", TWO).detector
    return replace(base, network=replace(base.network, backbone=backbone, tcb_channels=32, **changes))


@pytest.fixture(scope="module")
def small_resnet() -> RefineDet:
    """As drawn; nobody moves its weights."""
    return seeded(resnet_config("resnet18"))


def stir(network: nn.Module) -> None:
    """Draw every tensor so that signals keep their size, and that no scale, shift or statistic can be left out."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize(
    ("backbone", "depths", "changes"),
    [
        ("resnet50", (3, 4, 6, 3), {}),
        ("resnet18", (2, 2, 2, 2), {"stride_in": "3x3", "stem_pool": "padded"}),
        ("resnet18", (2, 2, 2, 2), {"head_blocks": False}),
    ],
    ids=["official", "torchvision's switches", "no head blocks"],
)
def test_resnet_forward_by_hand(backbone, depths, changes):
    config = resnet_config(backbone, **changes)
    network = seeded(config).eval()
    images = images_of(1, 3, 64, 128)
    with torch.no_grad():
        # As drawn, every signal dies out, for the running statistics have seen nothing yet; it must stay a number.
        assert all(bool(t.isfinite().all()) for t in network(images_of(1, 3, 64, 64) * 100)[:4])
        stir(network)
        raw, state = network(images), dict(network.state_dict())
        hand = ResNetByHand(state, config.network.stride_in)
        sources = hand.sources(images, depths, config.network.stem_pool)
        pyramid = hand.pyramid(sources)
        if config.network.head_blocks:
            sources = [hand.block(features, f"arm_blocks.{i}", 1) for i, features in enumerate(sources)]
            pyramid = [hand.block(features, f"odm_blocks.{i}", 1) for i, features in enumerate(pyramid)]
        expected = (*head_by_hand(state, sources, "arm", 2), *head_by_hand(state, pyramid, "odm", 3))
    for found, wanted in zip(raw[:4], expected, strict=True):
        assert float(found.std()) > 0.1
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_mobilenet_maps_are_those_of_torchvision():
    backbone = seeded(tiny(TWO).detector).backbone.eval()
    seen: dict[str, Tensor] = {}
    for index in (7, 14):
        backbone.features[index].conv[0].register_forward_hook(
            lambda _m, _i, output, index=index: seen.__setitem__(index, output)
        )
    images = images_of(1, 3, 64, 64)
    with torch.no_grad():
        last = backbone.features(images)
        assert seen.keys() == {7, 14}
        expected = [seen[7], seen[14], last, backbone.extra(last)]
        for found, wanted in zip(backbone(images), expected, strict=True):
            assert_close(found, wanted, rtol=0, atol=0)


def test_mobilenet_starts_with_torchvision_s_weights():
    ours = seeded(tiny(TWO).detector, seed=7).backbone.features.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = mobilenet_v2(weights=None).features.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Layers.


def test_strided_depthwise_keeps_its_dtype_and_its_gradient_under_autocast():
    layer = StridedDepthwise(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
    nn.init.uniform_(layer.weight, -1, 1, generator=torch.Generator().manual_seed(0))
    plain = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
    plain.load_state_dict(layer.state_dict())
    features = images_of(2, 8, 6, 6).bfloat16()
    gradients = []
    for module in (layer, plain):
        inputs = features.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = module(inputs)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
        gradients.append((inputs.grad, module.weight.grad))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == expected.dtype
        assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_l2norm_scales_each_place_to_its_factor():
    layer = L2Norm(3, 10.0)
    features = images_of(2, 3, 4, 5)
    normalised = layer(features)
    assert_close(normalised.norm(dim=1), torch.full((2, 4, 5), 10.0), rtol=1e-5, atol=0)
    assert_close(normalised / features, (normalised / features)[:, :1].expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-4)


def test_l2norm_has_a_finite_gradient_where_nothing_is():
    features = torch.zeros(1, 3, 1, 1, requires_grad=True)
    L2Norm(3, 10.0)(features).sum().backward()
    assert bool(features.grad.isfinite().all())


def test_caffe_init_draws_by_fan_in():
    layers = nn.Sequential(nn.Conv2d(256, 12, 3), nn.ConvTranspose2d(16, 64, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        caffe_init(layers)
    for layer, fan_in in zip(layers, (256 * 9, 64 * 4), strict=True):
        bound = (3 / fan_in) ** 0.5
        assert 0.98 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().var()) == pytest.approx(1 / fan_in, rel=0.1)
        assert not layer.bias.any()


def begun(head_init: str, neg_ratio: float = 3.0) -> RawOutput:
    config = tiny(TWO).detector
    network = replace(config.network, head_init=head_init)
    with torch.no_grad():
        return seeded(replace(config, network=network, loss=replace(config.loss, neg_ratio=neg_ratio)))(
            images_of(2, 3, 64, 64)
        )


@pytest.mark.parametrize(("neg_ratio", "background"), [(3.0, 0.75), (7.0, 0.875), (0.0, 0.5)])
def test_at_the_prior_background_is_as_likely_as_among_mined_anchors_and_classes_are_alike(neg_ratio, background):
    raw = begun("prior", neg_ratio)
    for logits, offsets in ((raw.arm_logits, raw.arm_offsets), (raw.odm_logits, raw.odm_offsets)):
        likely = logits.softmax(dim=-1).mean(dim=(0, 1))
        classes = len(likely) - 1
        expected = torch.tensor([background, *[(1 - background) / classes] * classes])
        assert_close(likely, expected, rtol=0, atol=0.01)
        assert float(offsets.std()) < 0.1


def test_heads_as_in_the_paper_begin_ten_times_as_loud():
    prior, paper = begun("prior"), begun("xavier")
    assert_close(paper.arm_offsets, 10 * prior.arm_offsets)
    assert_close(paper.odm_offsets, 10 * prior.odm_offsets)
    assert_close(paper.odm_logits[..., 1:], 10 * prior.odm_logits[..., 1:])


def test_gaussian_init_draws_alike_at_any_fan_in():
    layers = nn.Sequential(nn.Conv2d(256, 12, 3), nn.Conv2d(16, 800, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gaussian_init(layers)
    for layer in layers:
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert not layer.bias.any()


def test_what_is_batch_normalised_is_drawn_from_a_gaussian_and_the_heads_are_not(small_resnet):
    for name, layer in small_resnet.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            bound = (3 / layer.weight[0].numel()) ** 0.5
            spread = bound / 3**0.5 if name.startswith(("arm.", "odm.")) else 0.01
            assert float(layer.weight.detach().std()) == pytest.approx(spread, rel=0.1), name
    other = seeded(tiny(TWO).detector)
    assert float(other.tcb[0].first[0].weight.detach().std()) == pytest.approx((9 * 192) ** -0.5, rel=0.1)


def test_bottlenecks_have_their_stride_where_they_are_told():
    block = bottleneck(8, 4, stride=2)
    assert [layer.stride for layer in (block.conv1, block.conv2, block.conv3)] == [(1, 1), (2, 2), (1, 1)]
    stride_in_1x1(block)
    assert [layer.stride for layer in (block.conv1, block.conv2, block.conv3)] == [(2, 2), (1, 1), (1, 1)]
    assert block.downsample[0].stride == (2, 2)
    assert tuple(block(images_of(2, 8, 6, 10)).shape) == (2, 16, 3, 5)


def test_every_new_layer_is_drawn_so():
    network = seeded(get_preset("refinedet320_vgg16", TWO).detector)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            assert float(layer.weight.detach().abs().max()) <= 1.00001 * (3 / layer.weight[0].numel()) ** 0.5
            assert not layer.bias.any()
    scales = [set(norm.weight.tolist()) for norm in (network.backbone.norm4, network.backbone.norm5)]
    assert scales == [{10.0}, {8.0}]


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_normalised_blocks_have_no_idle_bias(norm):
    block = TransferConnectionBlock(8, 16, coarser=True, norm=norm)
    for layer in block.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            assert (layer.bias is None) == (norm != "none")
    features, coarser = images_of(2, 8, 4, 6), images_of(2, 16, 2, 3)
    assert block(features, coarser).shape == (2, 16, 4, 6)


def test_levels_may_have_unlike_numbers_of_anchors():
    head = AnchorHead((2, 2), (1, 3), 5)
    logits, offsets = head([torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 1, 1)])
    assert (tuple(logits.shape), tuple(offsets.shape)) == ((1, 7, 5), (1, 7, 4))


# Switches.


SWITCHES = [(arm, tcb) for arm in (True, False) for tcb in (True, False)]


@pytest.mark.parametrize(("arm", "tcb"), SWITCHES)
def test_switched_off_parts_still_train_and_detect(arm, tcb):
    base = tiny(TWO).detector
    config = replace(base, network=replace(base.network, arm=arm, tcb=tcb))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build(config)
    network = detector.network
    images = images_of(2, 3, 64, 128)
    target = Target(torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.5, 0.1, 0.7, 0.4]]), torch.tensor([1, 2]))
    network.train()
    raw = network(images)
    assert [t is None for t in raw[:2]] == [not arm] * 2
    loss = detector.criterion(raw, Targets.pack([target, target]))
    assert set(loss.positives) == ({"arm", "odm"} if arm else {"odm"})
    loss.total.backward()
    pulled = set()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if parameter.grad.any():
            pulled.add(name.partition(".")[0])
    assert pulled == {"backbone", "odm"} | ({"arm"} if arm else set()) | ({"tcb"} if tcb else set())
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    network.eval()
    with torch.no_grad():
        found = suppress(detector.forward(images), config.postprocess)
    assert bool(found.boxes.isfinite().all())
    assert found.boxes.shape == (2, 200, 4)


@pytest.mark.parametrize(("arm", "tcb"), SWITCHES)
def test_switches_of_vgg16(arm, tcb):
    base = get_preset("refinedet320_vgg16", TWO).detector
    network = on_meta(replace(base, network=replace(base.network, arm=arm, tcb=tcb)))
    parts = {n.partition(".")[0] for n, _ in network.named_parameters()}
    assert parts == {"backbone", "odm"} | ({"arm"} if arm else set()) | ({"tcb"} if tcb else set())
    raw = network(torch.empty(1, 3, 64, 128, device="meta"))
    assert tuple(raw.odm_logits.shape) == (1, 510, 3)
    assert (raw.arm_logits is None) == (not arm)


@pytest.mark.parametrize(("arm", "tcb"), SWITCHES)
def test_head_blocks_read_what_the_heads_would(arm, tcb):
    network = on_meta(resnet_config("resnet18", arm=arm, tcb=tcb))
    parts = {n.partition(".")[0] for n, _ in network.named_parameters()}
    expected = (
        {"backbone", "odm", "odm_blocks"} | ({"arm", "arm_blocks"} if arm else set()) | ({"tcb"} if tcb else set())
    )
    assert parts == expected
    sources = (128, 256, 512, 512)
    assert [b.conv1.in_channels for b in network.odm_blocks] == ([32] * 4 if tcb else list(sources))
    if arm:
        assert [b.conv1.in_channels for b in network.arm_blocks] == list(sources)
    assert all(head.in_channels == 1024 for head in network.odm.levels)
    raw = network(torch.empty(2, 3, 64, 128, device="meta"))
    assert tuple(raw.odm_logits.shape) == (2, 510, 3)


def test_every_parameter_of_a_resnet_is_pulled(small_resnet):
    sum(t.square().sum() for t in small_resnet.train()(images_of(2, 3, 128, 128))[:4]).backward()
    for name, parameter in small_resnet.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_rows_of_a_wide_input_belong_to_their_anchors():
    # A head that copies its input: the maps say where their cells are, and the output must be in the anchors' order.
    config = tiny(TWO).detector
    head = AnchorHead((2,) * 4, (3,) * 4, 2)
    nn.init.zeros_(head.levels[0].weight)
    for level in head.levels:
        nn.init.zeros_(level.weight)
        nn.init.zeros_(level.bias)
        with torch.no_grad():
            for anchor in range(3):
                for axis in range(2):
                    level.weight[anchor * 6 + 2 + axis, axis, 1, 1] = 1
    height, width = 64, 192
    maps = []
    for stride in (8, 16, 32, 64):
        y, x = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        maps.append((torch.stack([x / (width // stride), y / (height // stride)]) + 0.0)[None])
    _, offsets = head(maps)
    anchors = tile_anchors(config.anchors, height, width)
    cells = torch.cat([torch.full((3 * m.shape[2] * m.shape[3],), m.shape[3]) for m in maps])
    rows = torch.cat([torch.full((3 * m.shape[2] * m.shape[3],), m.shape[2]) for m in maps])
    assert_close(offsets[0, :, 0] + 0.5 / cells, anchors[:, 0])
    assert_close(offsets[0, :, 1] + 0.5 / rows, anchors[:, 1])


# Decoding.


def random_raw(batch: int, anchors: int, classes: int, seed: int = 0) -> RawOutput:
    generator = torch.Generator().manual_seed(seed)
    outputs = (
        spread * torch.randn(batch, anchors, n, generator=generator)
        for n, spread in ((2, 4.0), (4, 1.0), (classes, 3.0), (4, 1.0))
    )
    return RawOutput(*outputs, (64, 64))


@pytest.mark.parametrize("per", ["picture", "class"])
@pytest.mark.parametrize("arm", [True, False], ids=["arm", "no arm"])
def test_candidates_equal_a_full_decode(per, arm):
    config = tiny(TWO).detector
    config = replace(config, postprocess=replace(config.postprocess, candidates=50, candidates_per=per))
    anchors = tile_anchors(config.anchors, 64, 64)
    raw = random_raw(2, len(anchors), 3)
    variances = config.anchors.variances
    scores, refined = raw.odm_logits.softmax(-1), anchors.expand(2, -1, -1)
    if arm:
        refined = decode(raw.arm_offsets, anchors, variances)
        objectness = raw.arm_logits.softmax(-1)[..., 1:]
        dropped = objectness < 0.01
        assert 0 < int(dropped.sum()) < dropped.numel()
        scores = scores * ~dropped
    else:
        raw = raw._replace(arm_logits=None, arm_offsets=None)
    boxes = cxcywh_to_xyxy(decode(raw.odm_offsets, refined, variances))
    found = Decoder(config)(raw)
    assert found.scores.shape == ((2, 1, 50) if per == "picture" else (2, 2, 50))
    for i in range(2):
        entries = sorted(
            ((float(scores[i, a, c]), c, a) for a in range(len(anchors)) for c in (1, 2) if scores[i, a, c] > 0.01),
            reverse=True,
        )
        groups = [entries[:50]] if per == "picture" else [[e for e in entries if e[1] == c][:50] for c in (1, 2)]
        for g, group in enumerate(groups):
            assert len(group) == 50
            assert_close(found.scores[i, g], torch.tensor([e[0] for e in group]))
            assert found.labels[i, g].tolist() == [e[1] for e in group]
            assert_close(found.boxes[i, g], boxes[i, [e[2] for e in group]])


def test_the_arm_filter_drops_candidates_below_it_only():
    config = tiny(TWO).detector
    count = len(tile_anchors(config.anchors, 64, 64))
    raw = random_raw(1, count, 3)
    raw.arm_logits.zero_()  # an objectness of exactly a half
    for limit, expected in ((0.5, True), (0.5000001, False), (0.0, True)):
        decoder = Decoder(replace(config, postprocess=replace(config.postprocess, arm_filter=limit)))
        assert bool(decoder(raw).scores.any()) == expected


def test_low_precision_outputs_are_decoded_in_float32():
    config = tiny(TWO).detector
    raw = random_raw(1, len(tile_anchors(config.anchors, 64, 64)), 3)
    low = RawOutput(*(t.bfloat16() for t in raw[:4]), (64, 64))
    same = RawOutput(*(t.float() for t in low[:4]), (64, 64))
    for found, expected in zip(Decoder(config)(low), Decoder(config)(same), strict=True):
        assert_close(found, expected, rtol=0, atol=0)


def test_absurd_outputs_decode_to_finite_boxes():
    config = tiny(TWO).detector
    raw = random_raw(1, len(tile_anchors(config.anchors, 64, 64)), 3)
    absurd = RawOutput(*(1e9 * t.sign() for t in raw[:4]), (64, 64))
    found = suppress(Decoder(config)(absurd), config.postprocess)
    assert int(found.counts) > 0
    assert bool(found.boxes.isfinite().all())


def test_pictures_of_a_batch_do_not_touch_each_other():
    config = replace(tiny(TWO).detector, preprocess=PreprocessConfig(height=64, width=64))
    raw = random_raw(3, len(tile_anchors(config.anchors, 64, 64)), 3)
    decoder = Decoder(config)
    together = suppress(decoder(raw), config.postprocess)
    for i in range(3):
        alone = suppress(decoder(RawOutput(*(t[i : i + 1] for t in raw[:4]), (64, 64))), config.postprocess)
        for found, expected in zip(together, alone, strict=True):
            assert_close(found[i : i + 1], expected, rtol=0, atol=0)


# What the ODM reads.


def reading(*, reads: bool) -> RefineDet:
    config = tiny(TWO).detector
    return seeded(replace(config, network=replace(config.network, odm_reads_arm=reads))).eval()


def test_an_odm_that_reads_begins_as_one_that_does_not():
    images = images_of(2, 3, 64, 64)
    with torch.no_grad():
        for mine, other in zip(reading(reads=True)(images)[:4], reading(reads=False)(images)[:4], strict=True):
            assert_close(mine, other, rtol=0, atol=0)


def test_the_odm_hears_of_each_anchor_what_its_arm_said_and_the_arm_learns_nothing_from_it():
    network, plain, images = reading(reads=True), reading(reads=False), images_of(1, 3, 64, 64)
    assert network.arm_reader is not None
    nn.init.normal_(network.arm_reader.weight, std=10.0, generator=torch.Generator().manual_seed(4))
    raw, before = network(images), plain(images)
    said = torch.cat([raw.arm_logits, raw.arm_offsets], dim=-1)
    told = 10 * said @ network.arm_reader.weight.T
    assert float(told.detach().abs().max()) > 0.05
    assert_close(raw.odm_logits, before.odm_logits + told[..., :3], rtol=1e-5, atol=1e-5)
    assert_close(raw.odm_offsets, before.odm_offsets + told[..., 3:], rtol=1e-5, atol=1e-5)
    (raw.odm_logits.square().sum() + raw.odm_offsets.square().sum()).backward()
    assert network.arm is not None
    assert all(parameter.grad is None for parameter in network.arm.parameters())
    assert bool(network.arm_reader.weight.grad.abs().sum() > 0)


def test_without_an_arm_there_is_nothing_to_read():
    config = tiny(TWO).detector
    network = RefineDet(replace(config, network=replace(config.network, odm_reads_arm=True, arm=False)))
    assert network.arm_reader is None
