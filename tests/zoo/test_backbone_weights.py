"""ImageNet weights: where they come from, whose names they have, and what the backbone then computes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2, resnet18, vgg

from refinedet_cli.core.backbones import build_backbone
from refinedet_cli.core.config import BACKBONES, NetworkConfig
from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo import backbone_weights
from refinedet_cli.zoo.backbone_layouts import BACKBONE_LAYOUTS, LAYOUTS, find_layout, thin_fc6, thin_fc7
from refinedet_cli.zoo.backbone_weights import BackboneFile, find_backbone_weights, load_backbone
from refinedet_cli.zoo.checkpoint import file_sha256

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


class Network(nn.Module):
    """As much of a detector as loading needs."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def network_of(backbone: str, **settings: object) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Network(build_backbone(NetworkConfig(backbone=backbone, **settings)))


def randomised(model: nn.Module, seed: int = 5) -> nn.Module:
    """Draw everything anew, statistics of normalisation included, at sizes that keep activations near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            scale = (2 / tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
            tensor.normal_(0.0, scale, generator=generator)
        else:
            tensor.fill_(7)
    return model.eval()


def clone(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def pictures() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def find(path: Path, backbone: str) -> BackboneFile:
    return find_backbone_weights(str(path), backbone)


@pytest.fixture(scope="module")
def network18() -> Network:
    """For tests that leave it as it was, or do not mind how it was."""
    return network_of("resnet18")


@pytest.fixture(scope="module")
def mobilenet() -> nn.Module:
    return randomised(mobilenet_v2(weights=None))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return randomised(resnet18(weights=None))


# What the backbone computes.


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_resnet_computes_what_torchvision_s_does(tmp_path, resnet, tolerance, kind):
    path = tmp_path / f"weights.{kind}"
    (save_file if kind == "safetensors" else torch.save)(resnet.state_dict(), path)
    network = network_of("resnet18").eval()
    fresh = clone(network.backbone.res6)
    file = find(path, "resnet18")
    assert file.layout == "resnet"
    assert load_backbone(network, file) == len(resnet.state_dict()) - 2 == file.tensors - 2
    with torch.no_grad():
        features = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(pictures()))))
        expected = []
        for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            features = layer(features)
            expected.append(features)
        found = network.backbone(pictures())
    torch.testing.assert_close(found[:3], expected[1:], **tolerance(torch.float32))
    assert int(network.backbone.bn1.num_batches_tracked) == 7
    assert all(torch.equal(t, fresh[n]) for n, t in network.backbone.res6.state_dict().items())


def test_a_mobilenet_computes_what_torchvision_s_does(tmp_path, mobilenet, tolerance):
    path = tmp_path / "weights.safetensors"
    save_file(mobilenet.state_dict(), path)
    network = network_of("mobilenet_v2").eval()
    fresh = clone(network.backbone.extra)
    file = find(path, "mobilenet_v2")
    assert load_backbone(network, file) == len(mobilenet.features.state_dict()) == file.tensors - 2
    with torch.no_grad():
        torch.testing.assert_close(
            network.backbone(pictures())[2], mobilenet.features(pictures()), **tolerance(torch.float32)
        )
    assert all(torch.equal(t, fresh[n]) for n, t in network.backbone.extra.state_dict().items())


def test_a_mobilenet_computes_what_timm_s_does(tmp_path, tolerance):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = randomised(timm.create_model("mobilenetv2_100", pretrained=False))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    network = network_of("mobilenet_v2").eval()
    file = find(path, "mobilenet_v2")
    assert file.layout == "timm_mobilenet_v2"
    assert load_backbone(network, file) == file.tensors - 2
    with torch.no_grad():
        torch.testing.assert_close(
            network.backbone(pictures())[2], model.forward_features(pictures()), **tolerance(torch.float32)
        )


def test_timm_s_mobilenet_has_the_layers_of_torchvision_s(mobilenet):
    # Without timm: all 52 convolutions and their normalisations, each once, and each pair side by side.
    layers = LAYOUTS["timm_mobilenet_v2"].layers
    theirs = {n.rpartition(".")[0] for n in mobilenet.features.state_dict()}
    assert set(layers.values()) == {f"features.{n}" for n in theirs}
    assert len(layers) == len(theirs) == 104
    assert layers["blocks.6.0.conv_pwl"] == "features.17.conv.2"
    assert layers["blocks.3.3.bn2"] == "features.10.conv.1.1"


@pytest.fixture(scope="module")
def reduced_vgg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Sequential, dict[str, Tensor]]:
    """A file of real shapes, with torchvision's layers that it has the names of."""
    features = randomised(vgg.make_layers(vgg.cfgs["D"], batch_norm=False))
    generator = torch.Generator().manual_seed(6)
    state = dict(features.state_dict())
    for name, shape in (("31", (1024, 512, 3, 3)), ("33", (1024, 1024, 1, 1))):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * shape[2] ** 2 / 2) ** 0.5
        state[f"{name}.bias"] = torch.randn(1024, generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg16_reducedfc.pth"
    torch.save(state, path)
    return path, features, state


def test_a_vgg_computes_what_torchvision_s_does(reduced_vgg, tolerance):
    path, features, state = reduced_vgg
    network = network_of("vgg16").eval()
    fresh = clone(network.backbone.conv6)
    file = find(path, "vgg16")
    assert load_backbone(network, file) == file.tensors == 30
    with torch.no_grad():
        expected = features(pictures())
        # Twice the distance of SSD's dilation in steps that are twice as wide.
        expected = functional.conv2d(expected, state["31.weight"], state["31.bias"], padding=3, dilation=3).relu()
        expected = functional.conv2d(expected, state["33.weight"], state["33.bias"]).relu()
        conv4 = features[:23](pictures())
        maps = network.backbone(pictures())
        torch.testing.assert_close(maps[2], expected, **tolerance(torch.float32))
        torch.testing.assert_close(maps[0], network.backbone.norm4(conv4), **tolerance(torch.float32))
    assert all(torch.equal(t, fresh[n]) for n, t in network.backbone.conv6.state_dict().items())


def small_vgg() -> nn.Module:
    """The names of our VGG-16 at a sixteenth of its width."""
    full = build_backbone_on_meta("vgg16")
    small = nn.Module()
    for name, tensor in full.state_dict().items():
        shape = [n // 16 if n > 3 else n for n in tensor.shape]
        module = small
        *path, last = name.split(".")
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    return small


def build_backbone_on_meta(backbone: str) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(NetworkConfig(backbone=backbone))


@pytest.mark.parametrize("maker", ["torchvision", "timm"])
def test_the_classifier_of_a_vgg_becomes_convolutions(tmp_path, maker):
    backbone = small_vgg()
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = vgg.make_layers(vgg.cfgs["D"], batch_norm=False).state_dict()
    state = {
        f"features.{n}": torch.randn([s // 16 if s > 3 else s for s in t.shape], generator=generator)
        for n, t in shapes.items()
    }
    fc1, fc2 = torch.randn(256, 32, 7, 7, generator=generator), torch.randn(256, 256, 1, 1, generator=generator)
    bias1, bias2, head = torch.arange(256.0), -torch.arange(256.0), torch.ones(10, 256)
    if maker == "torchvision":
        state |= {"classifier.0.weight": fc1.flatten(1), "classifier.3.weight": fc2.flatten(1)}
        state |= {"classifier.0.bias": bias1, "classifier.3.bias": bias2, "classifier.6.weight": head}
    else:
        state |= {"pre_logits.fc1.weight": fc1, "pre_logits.fc2.weight": fc2, "head.fc.weight": head}
        state |= {"pre_logits.fc1.bias": bias1, "pre_logits.fc2.bias": bias2}
    path = tmp_path / "vgg.safetensors"
    save_file(state, path)
    file = find(path, "vgg16")
    assert file.layout == f"{maker}_vgg16"
    assert load_backbone(Network(backbone), file) == 30
    loaded = backbone.state_dict()
    assert torch.equal(loaded["conv4.2.0.weight"], state["features.21.weight"])
    weight6, weight7 = loaded["fc6.0.weight"], loaded["fc7.0.weight"]
    assert weight6.shape == (64, 32, 3, 3)
    assert weight7.shape == (64, 64, 1, 1)
    for output in (0, 5, 63):
        assert loaded["fc6.0.bias"][output] == 4 * output
        assert loaded["fc7.0.bias"][output] == -4 * output
        for row in range(3):
            for column in range(3):
                assert torch.equal(weight6[output, :, row, column], fc1[4 * output, :, 3 * row, 3 * column])
        assert torch.equal(weight7[output, 9, 0, 0], fc2[4 * output, 36, 0, 0])


def test_thinning_by_hand():
    # Weight = 1000 output + 100 channel + 10 row + column.
    digits = torch.tensor([[1000 * o + 100 * c for c in range(2)] for o in range(8)])
    cells = torch.tensor([[10 * r + c for c in range(7)] for r in range(7)])
    weight, bias = thin_fc6((digits[:, :, None, None] + cells).float(), torch.arange(8.0))
    assert weight[1, 1].tolist() == [[4100, 4103, 4106], [4130, 4133, 4136], [4160, 4163, 4166]]
    assert weight.shape == (2, 2, 3, 3)
    assert bias.tolist() == [0, 4]
    weight, bias = thin_fc7(torch.arange(64.0).view(8, 8), torch.arange(8.0))
    assert weight.flatten(1).tolist() == [[0, 4], [32, 36]]
    assert weight.shape == (2, 2, 1, 1)
    assert bias.tolist() == [0, 4]


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_any_network_of_timm_takes_timm_s_weights(tmp_path, name, tolerance):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    # Extractors write dots of the names as underscores, or leave the last layers out.
    model = randomised(timm.create_model(name, pretrained=False))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    network = network_of(f"timm/{name}").eval()
    file = find(path, f"timm/{name}")
    count = load_backbone(network, file)
    assert count == len(network.backbone.body.state_dict()) < file.tensors
    indices = network.backbone._maps
    with torch.no_grad():
        expected = model.forward_intermediates(pictures(), intermediates_only=True)
        found = network.backbone.body(pictures())
        same = [e for e in expected if e.shape == found[indices[0]].shape]
        torch.testing.assert_close(found[indices[0]], same[-1], **tolerance(torch.float32))


# Whose names.


def signs(layout: str) -> set[str]:
    return set(LAYOUTS[layout].signs)


def test_layouts_are_told_apart_by_their_names():
    for backbone, layouts in BACKBONE_LAYOUTS.items():
        for layout in LAYOUTS:
            if layout != "timm":
                assert find_layout(signs(layout), backbone) == (layout if layout in layouts else None)
        assert find_layout(set(), backbone) is None
    assert BACKBONE_LAYOUTS.keys() == set(BACKBONES) == backbone_weights.PUBLISHED.keys()
    assert find_layout({"anything"}, "timm/anything") == "timm"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_names_of_every_layout_are_the_backbone_s(backbone):
    state = build_backbone_on_meta(backbone).state_dict()
    for layout in BACKBONE_LAYOUTS[backbone]:
        parts = LAYOUTS[layout].parts
        assert all(any(n.startswith(part) for n in state) for part in parts)
        layers = {n.rpartition(".")[0] for n in state if n.startswith(parts)}
        if LAYOUTS[layout].layers:
            assert set(LAYOUTS[layout].layers.values()) == layers


def test_half_precision_weights_are_taken_as_float32(tmp_path, resnet, network18):
    path = tmp_path / "half.pth"
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in resnet.state_dict().items()}, path)
    load_backbone(network18, find(path, "resnet18"))
    assert network18.backbone.conv1.weight.dtype == torch.float32
    assert torch.equal(network18.backbone.conv1.weight, resnet.conv1.weight.half().float())


def test_counters_of_normalisation_may_be_missing(tmp_path, resnet, network18):
    path = tmp_path / "old.pth"
    state = {n: t for n, t in resnet.state_dict().items() if not n.endswith("num_batches_tracked")}
    torch.save(state, path)
    network18.backbone.bn1.num_batches_tracked.fill_(3)
    assert load_backbone(network18, find(path, "resnet18")) == len(state) - 2
    assert int(network18.backbone.bn1.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "tensors missing: 1 of 120, such as layer3.0.bn2.running_mean"),
        ("surplus", "tensors without a place in it: 1, such as layer3.2.conv1.weight"),
        ("shape", "tensors of another shape: 1, such as conv1.weight, 16 x 3 x 7 x 7 instead of 64 x 3 x 7 x 7"),
        ("scalar", "tensors of another shape: 1, such as bn1.weight, a number instead of 64"),
        ("nan", "layer4.1.bn2.running_var is not finite"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(tmp_path, resnet, network18, fault, says):
    state, path = dict(resnet.state_dict()), tmp_path / "other.pth"
    if fault == "missing":
        del state["layer3.0.bn2.running_mean"]
    elif fault == "surplus":
        state["layer3.2.conv1.weight"] = torch.zeros(2)
    elif fault == "shape":
        state["conv1.weight"] = torch.zeros(16, 3, 7, 7)
    elif fault == "scalar":
        state["bn1.weight"] = torch.tensor(1.0)
    else:
        state["layer4.1.bn2.running_var"] = state["layer4.1.bn2.running_var"] * torch.nan
    torch.save(state, path)
    before = clone(network18)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(network18, find(path, "resnet18"))
    assert caught.value.message == (
        f"{path}: not the weights of this backbone (resnet18): {says}; "
        f"tensors in the file: {len(state)} (conv1.weight, bn1.weight, bn1.bias, ...)"
    )
    assert "a ResNet-18 of torchvision or timm" in (caught.value.hint or "")
    assert all(torch.equal(t, before[n]) for n, t in network18.state_dict().items())


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_a_shallower_network_s_weights_do_not_fit(tmp_path, resnet, backbone):
    path = tmp_path / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    network = Network(build_backbone_on_meta(backbone))
    with pytest.raises(CheckpointError, match="tensors of another shape: "):
        load_backbone(network, find(path, backbone))


@pytest.mark.parametrize(
    ("names", "backbone", "says"),
    [
        (("module.conv1.weight", "module.layer1.0.conv1.weight"), "resnet18", "its tensors have other names"),
        (("conv1.weight", "layer1.0.conv1.weight"), "vgg16", "its tensors have other names"),
        (("features.0.weight", "classifier.0.weight"), "mobilenet_v2", "its tensors have other names"),
        ((), "mobilenet_v2", "its tensors have other names"),
        (("features.0.weight", "features.1.running_mean", "classifier.0.weight"), "vgg16", "a VGG with batch norm"),
    ],
)
def test_a_file_of_another_network_is_shown(tmp_path, names, backbone, says):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(CheckpointError) as caught:
        find(path, backbone)
    message = caught.value.message
    assert message.startswith(f"{path}: not the weights of this backbone ({backbone}): {says}")
    assert f"tensors in the file: {len(names)}" in message
    assert all(name in message for name in names)
    assert "--backbone-weights imagenet" in (caught.value.hint or "")


def test_a_deeper_network_of_timm_does_not_fit(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    network = network_of("timm/resnet10t")
    body = network.backbone.body.state_dict()
    path = tmp_path / "model.pth"
    for extra, fits in (("fc.weight", True), ("layer3.1.conv1.weight", False)):
        torch.save({**body, extra: torch.zeros(1)}, path)
        file = find(path, "timm/resnet10t")
        if fits:
            assert load_backbone(network, file) == len(body)
        else:
            with pytest.raises(CheckpointError, match=r"without a place in it: 1, such as layer3\.1\.conv1\.weight"):
                load_backbone(network, file)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_damaged_file_is_refused(tmp_path, resnet, kind):
    path = tmp_path / f"cut.{kind}"
    (save_file if kind == "safetensors" else torch.save)(resnet.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=rf"cut\.{kind}: cannot be read"):
        find(path, "resnet18")


class Mine:
    """A pickle of this makes a file where it is loaded without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def hostile(path: Path, target: Path) -> bytes:
    torch.save({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": Mine(target)}, path)
    return path.read_bytes()


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, hub):
    target, path = tmp_path / "owned", tmp_path / "hostile.pth"
    hub.put("org/repo", {"weights.bin": hostile(path, target)})
    for name in (str(path), "org/repo:weights.bin"):
        with pytest.raises(CheckpointError, match="refused, it holds more than tensors"):
            find_backbone_weights(name, "resnet18")
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # so the guard had something to stop


# Where they come from.


# As little as is needed to tell what it is, in a file large enough to be stored apart.
STATE = {"conv1.weight": torch.zeros(400), "layer1.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}


def published(
    state: dict[str, Tensor] | None = None, mean: object = (0.485, 0.456, 0.406), std: object = (0.229, 0.224, 0.225)
):
    config = {"architecture": "resnet18", "pretrained_cfg": {"mean": mean, "std": std, "input_size": [3, 224, 224]}}
    return {"model.safetensors": save(state or STATE), "config.json": json.dumps(config).encode()}


def test_imagenet_is_the_published_weights(hub, resnet, network18):
    commit = hub.put("timm/resnet18.tv_in1k", published(resnet.state_dict()))
    file = find_backbone_weights("imagenet", "resnet18")
    assert file.origin == f"timm/resnet18.tv_in1k at {commit[:8]}, model.safetensors"
    assert (file.repo, file.commit, file.sha256) == ("timm/resnet18.tv_in1k", commit, file_sha256(file.path))
    assert (file.mean, file.std, file.channel_order) == (*IMAGENET, "rgb")
    load_backbone(network18, file)
    assert torch.equal(network18.backbone.conv1.weight, resnet.conv1.weight)
    # And again with the network gone.
    hub.stop()
    assert find_backbone_weights("imagenet", "resnet18") == file


def test_imagenet_of_a_network_of_timm_is_timm_s_choice(hub):
    pytest.importorskip("timm", reason="timm is not installed")
    hub.put("timm/resnet18.a1_in1k", published())
    hub.put("timm/resnet18.tv_in1k", published(mean=(0.5, 0.5, 0.5)))
    plain, tagged = (find_backbone_weights("imagenet", f"timm/{n}") for n in ("resnet18", "resnet18.tv_in1k"))
    assert (plain.repo, tagged.repo) == ("timm/resnet18.a1_in1k", "timm/resnet18.tv_in1k")
    assert (plain.mean, tagged.mean) == (IMAGENET[0], (127.5, 127.5, 127.5))
    for name in ("resnet18.no_such_tag", "no_such_network"):
        with pytest.raises(CheckpointError, match=f"timm publishes none of 'timm/{name}'"):
            find_backbone_weights("imagenet", f"timm/{name}")


def test_without_timm_its_networks_cannot_be_asked_for(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm.models", None)
    with pytest.raises(CheckpointError, match="the package timm cannot be imported") as caught:
        find_backbone_weights("imagenet", "timm/resnet18")
    assert "refinedet[timm]" in (caught.value.hint or "")


def test_a_place_on_the_hub(hub):
    old = hub.put("org/repo", {**published(), "sub/w.safetensors": save(STATE)}, "main", "v1")
    new = hub.put("org/repo", {"model.safetensors": save({"conv1.weight": torch.zeros(1)})})
    assert find_backbone_weights("org/repo@v1", "resnet18").commit == old
    assert find_backbone_weights(f"org/repo@{old}", "resnet18").commit == old
    file = find_backbone_weights("org/repo@v1:sub/w.safetensors", "resnet18")
    assert file.origin == f"org/repo at {old[:8]}, sub/w.safetensors"
    with pytest.raises(CheckpointError, match=rf"{new}.*tensors in the file: 1 \(conv1\.weight\)"):
        find_backbone_weights("org/repo", "resnet18")
    with pytest.raises(CheckpointError, match=r"the repository has no file 'w\.pth'"):
        find_backbone_weights("org/repo:w.pth", "resnet18")


def test_a_file_on_the_disk_wins(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    for name in ("org/repo", "imagenet"):
        torch.save(STATE, name)
        assert find_backbone_weights(name, "resnet18").path == Path(name)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["weights/vgg.pth", "a/b.safetensors", "./a/b", "../a", "vgg16", "", "a/b/c", "none"])
def test_a_slip_of_the_pen_does_not_reach_the_network(tmp_path, hub, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"backbone weights {re.escape(repr(name))}: th(ere is no|is is a)"):
        find_backbone_weights(name, "resnet18")
    assert hub.requests == []


@pytest.mark.parametrize("file", ["model.safetensors", "model.pth"])
def test_a_damaged_file_in_the_cache_can_be_mended(hub, tmp_path, file):
    (save_file if file.endswith("s") else torch.save)(STATE, tmp_path / file)
    hub.put("org/repo", {file: (tmp_path / file).read_bytes()})
    path = find_backbone_weights(f"org/repo:{file}", "resnet18").path
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        find_backbone_weights(f"org/repo:{file}", "resnet18")
    named = re.fullmatch("delete (.*), then it is downloaded again", caught.value.hint or "")
    assert named is not None
    Path(named[1]).unlink()
    assert find_backbone_weights(f"org/repo:{file}", "resnet18").tensors == len(STATE)


def test_offline_needs_the_cache(hub, monkeypatch):
    hub.put("timm/resnet18.tv_in1k", published())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids the network"):
        find_backbone_weights("imagenet", "resnet18")
    assert hub.requests == []


# What input they were made for.


def test_the_input_that_a_repository_states(hub):
    hub.put("org/half", published(mean=[0.5, 0.25, 0], std=[0.5, 1, 0.2]))
    file = find_backbone_weights("org/half", "resnet18")
    assert file.mean == (127.5, 63.75, 0.0)
    assert file.std == (127.5, 255.0, 51.0)


def test_a_repository_that_states_nothing_means_imagenet_s(hub):
    weights = save(STATE)
    for name, extra in (("bare", {}), ("other", {"config.json": b'{"detector": {}}'})):
        hub.put(f"org/{name}", {"model.safetensors": weights, **extra})
        assert find_backbone_weights(f"org/{name}", "resnet18").mean == IMAGENET[0]
    hub.stop()
    assert find_backbone_weights("org/bare", "resnet18").mean == IMAGENET[0]


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"pretrained_cfg": 3}', '{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}',
        '{"pretrained_cfg": {"mean": [0.5, 0.5], "std": [1, 1, 1]}}',
        '{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 0]}}',
        '{"pretrained_cfg": {"mean": [0.5, 0.5, NaN], "std": [1, 1, 1]}}',
        '{"pretrained_cfg": {"mean": "abc", "std": [1, 1, 1]}}',
    ],
)  # fmt: skip
def test_a_repository_that_states_nonsense_is_refused(hub, content):
    hub.put("org/odd", {**published(), "config.json": content.encode()})
    with pytest.raises(CheckpointError, match=r"config\.json: cannot read mean and std"):
        find_backbone_weights("org/odd", "resnet18")


def test_a_local_copy_of_a_repository_states_its_input(tmp_path):
    for name, content in published(mean=(0.5, 0.5, 0.5)).items():
        (tmp_path / name).write_bytes(content)
    assert find(tmp_path / "model.safetensors", "resnet18").mean == (127.5, 127.5, 127.5)
    # Beside any other file it may belong to anything.
    (tmp_path / "model.safetensors").rename(tmp_path / "resnet18.safetensors")
    assert find(tmp_path / "resnet18.safetensors", "resnet18").mean == IMAGENET[0]


def test_the_reduced_vgg_has_caffe_s_input(reduced_vgg):
    file = find(reduced_vgg[0], "vgg16")
    assert (file.mean, file.std, file.channel_order) == ((123.0, 117.0, 104.0), (1.0, 1.0, 1.0), "bgr")
    assert file.origin == str(reduced_vgg[0])
    assert replace(file, repo=None, commit=None) == file


def test_timm_knows_the_input_of_its_networks(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1)}, path)
    assert find(path, "timm/inception_v4").mean == (127.5, 127.5, 127.5)
    assert find(path, "timm/resnet18").mean == IMAGENET[0]
    assert find(path, "timm/no_such_network").mean == IMAGENET[0]
