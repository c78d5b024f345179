"""Weights as other projects write them, and networks that compute with them as those projects do.

Keys and shapes are written out here once more, from what is known of the projects (not from the package), and the
networks are plain functions of a state dict. ``narrow`` makes all of it small, for files whose numbers do not matter.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]

VGG = (
    (0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
    (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512),
)  # fmt: skip
SOURCES = (512, 512, 1024, 512)
CAFFE_CONVOLUTIONS = (
    "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3", "conv4_1", "conv4_2", "conv4_3",
    "conv5_1", "conv5_2", "conv5_3",
)  # fmt: skip

_pool: list[Tensor] = []


def filled(shapes: Shapes, seed: int = 0) -> State:
    """Draw tensors that keep activations near one; they are cut out of one row of random numbers, which is quick."""
    if not _pool:
        _pool.append(torch.randn(3_000_017, generator=torch.Generator().manual_seed(7)))
    state, at = {}, 1009 * seed
    for name, shape in shapes.items():
        count = math.prod(shape)
        at = (at + 7919) % len(_pool[0])
        row = _pool[0].roll(-at) if count > len(_pool[0]) - at else _pool[0][at:]
        values = row.repeat(-(-count // len(row)))[:count].reshape(shape).clone()
        if name.endswith(("running_var", ".1")) and len(shape) == 1:
            values = values.abs().clamp(max=2) * 0.5 + 0.5
        elif len(shape) == 4:
            values *= (1.6 / math.prod(shape[1:])) ** 0.5
        elif len(shape) == 1 and name.endswith(("weight", "norm.0")):
            values = 0.3 + 0.1 * values
        else:
            values *= 0.1
        state[name] = values
    return state


def _both(name: str, weight: tuple[int, ...], outputs: int | None = None) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": (weight[0] if outputs is None else outputs,)}


def _narrowed(shapes: Shapes, narrow: int) -> Shapes:
    return {n: tuple(max(1, side // narrow) if side > 90 else side for side in shape) for n, shape in shapes.items()}


def _vgg_shapes(prefix: str) -> Shapes:
    shapes: Shapes = {}
    for index, inputs, outputs in VGG:
        shapes |= _both(f"{prefix}{index}", (outputs, inputs, 3, 3))
    return shapes | _both(f"{prefix}31", (1024, 512, 3, 3)) | _both(f"{prefix}33", (1024, 1024, 1, 1))


def _head_shapes(classes: int, sources: tuple[int, ...] = SOURCES) -> Shapes:
    shapes: Shapes = {}
    for part, outputs in (("arm_loc", 12), ("arm_conf", 6), ("odm_loc", 12), ("odm_conf", 3 * classes)):
        for level in range(4):
            shapes |= _both(f"{part}.{level}", (outputs, sources[level] if part.startswith("arm") else 256, 3, 3))
    return shapes


# luuuyi/RefineDet.PyTorch ---------------------------------------------------------------------------------------------


def luuuyi(classes: int, narrow: int = 1) -> State:
    shapes = _vgg_shapes("vgg.") | {"conv4_3_L2Norm.weight": (512,), "conv5_3_L2Norm.weight": (512,)}
    shapes |= _both("extras.0", (256, 1024, 1, 1)) | _both("extras.1", (512, 256, 3, 3)) | _head_shapes(classes)
    for level, channels in enumerate(SOURCES):
        shapes |= _both(f"tcb0.{3 * level}", (256, channels, 3, 3)) | _both(f"tcb0.{3 * level + 2}", (256, 256, 3, 3))
    for level in range(3):
        shapes |= _both(f"tcb1.{level}", (256, 256, 2, 2))
    for level in range(4):
        shapes |= _both(f"tcb2.{3 * level + 1}", (256, 256, 3, 3))
    return filled(_narrowed(shapes, narrow))


def _conv(state: State, name: str, x: Tensor, **how: Any) -> Tensor:
    weight = state[f"{name}.weight"]
    how.setdefault("padding", weight.shape[2] // 2)
    return F.conv2d(x, weight, state.get(f"{name}.bias"), **how)


def _unit(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10) * scale.view(1, -1, 1, 1)


def _vgg_maps(state: State, prefix: str, dilation: int, scales: tuple[Tensor, Tensor], x: Tensor) -> list[Tensor]:
    maps = []
    for index, _, _ in VGG:
        x = F.relu(_conv(state, f"{prefix}{index}", x))
        if index in (2, 7, 14):
            x = F.max_pool2d(x, 2, 2)
        elif index == 21:
            maps.append(_unit(x, scales[0]))
            x = F.max_pool2d(x, 2, 2)
        elif index == 28:
            maps.append(_unit(x, scales[1]))
            x = F.max_pool2d(x, 2, 2)
    x = F.relu(_conv(state, f"{prefix}31", x, padding=dilation, dilation=dilation))
    return [*maps, F.relu(_conv(state, f"{prefix}33", x))]


def _predictions(maps: list[Tensor], layer: Callable[[int, Tensor], Tensor], width: int) -> Tensor:
    rows = [layer(i, x).permute(0, 2, 3, 1).reshape(len(x), -1) for i, x in enumerate(maps)]
    return torch.cat(rows, 1).view(len(maps[0]), -1, width)


def _four(state: State, coarse: list[Tensor], fine: list[Tensor], classes: int) -> tuple[Tensor, ...]:
    """ARM logits and offsets, ODM logits and offsets, of heads with the usual names."""
    return tuple(
        _predictions(maps, lambda i, x, part=part: _conv(state, f"{part}.{i}", x), width)
        for part, maps, width in (
            ("arm_conf", coarse, 2), ("arm_loc", coarse, 4), ("odm_conf", fine, classes), ("odm_loc", fine, 4),
        )
    )  # fmt: skip


def luuuyi_forward(state: State, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    scales = (state["conv4_3_L2Norm.weight"], state["conv5_3_L2Norm.weight"])
    maps = _vgg_maps(state, "vgg.", 3, scales, x)
    y = F.relu(_conv(state, "extras.0", maps[-1]))
    maps.append(F.relu(_conv(state, "extras.1", y, stride=2)))
    fine: list[Tensor] = []
    for level in (3, 2, 1, 0):
        s = _conv(state, f"tcb0.{3 * level + 2}", F.relu(_conv(state, f"tcb0.{3 * level}", maps[level])))
        if fine:
            s = s + F.conv_transpose2d(fine[0], state[f"tcb1.{level}.weight"], state[f"tcb1.{level}.bias"], stride=2)
        fine.insert(0, F.relu(_conv(state, f"tcb2.{3 * level + 1}", F.relu(s))))
    return _four(state, maps, fine, classes)


# dd604/refinedet.pytorch ----------------------------------------------------------------------------------------------


def _pyramid_shapes(sources: tuple[int, ...], *, norm: bool) -> Shapes:
    shapes: Shapes = {}
    for level in (1, 2, 3):
        name = f"pyramid_layer{level}"
        for part, inputs in (("conv1", sources[level - 1]), ("conv2", 256), ("deconv", 256), ("conv3", 256)):
            layer = {f"{name}.{part}.weight": (256, inputs, 3, 3)}
            shapes |= layer if norm else _both(f"{name}.{part}", (256, inputs, 3, 3))
        for part in ("bn1", "bn2", "deconv_bn", "bn3") if norm else ():
            shapes |= _norm_shapes(f"{name}.{part}", 256)
    step = 3 if norm else 2
    for place, inputs in enumerate((sources[3], 256, 256)):
        shapes |= _both(f"pyramid_layer4.{place * step}", (256, inputs, 3, 3))  # biased even before normalisation
        if norm:
            shapes |= _norm_shapes(f"pyramid_layer4.{place * step + 1}", 256)
    return shapes


def _norm_shapes(name: str, channels: int) -> Shapes:
    return {f"{name}.{kind}": (channels,) for kind in ("weight", "bias", "running_mean", "running_var")}


def dd604(classes: int, narrow: int = 1) -> State:
    shapes = _vgg_shapes("base.") | _both("extra.0", (256, 1024, 1, 1)) | _both("extra.2", (512, 256, 3, 3))
    shapes |= {"L2Norm_conv4_3.weight": (512,), "L2Norm_conv5_3.weight": (512,)}
    state = filled(_narrowed(shapes | _pyramid_shapes(SOURCES, norm=False) | _head_shapes(classes), narrow), 1)
    # The backbone once more, cut into four sequences that count from 0.
    for name in list(state):
        part, _, rest = name.partition(".")
        index, _, kind = rest.partition(".")
        if part == "base":
            number = int(index)
            place = (
                ("layer1", number)
                if number < 23
                else ("layer2", number - 23)
                if number < 30
                else ("layer3", number - 30)
            )
            state[f"{place[0]}.{place[1]}.{kind}"] = state[name]
        elif part == "extra":
            state[f"layer4.{rest}"] = state[name]
    return state


def _dd604_pyramid(state: State, maps: list[Tensor], norm: Callable[[str, Tensor], Tensor], step: int) -> list[Tensor]:
    y = maps[3]
    for place in range(3):
        name = f"pyramid_layer4.{place * step}"
        y = F.relu(norm(f"pyramid_layer4.{place * step + 1}", _conv(state, name, y)))
    fine = [y]
    for level in (3, 2, 1):
        name = f"pyramid_layer{level}"
        y = F.relu(norm(f"{name}.bn1", _conv(state, f"{name}.conv1", maps[level - 1])))
        up = F.conv_transpose2d(
            fine[0],
            state[f"{name}.deconv.weight"],
            state.get(f"{name}.deconv.bias"),
            stride=2,
            padding=1,
            output_padding=1,
        )
        y = F.relu(norm(f"{name}.bn2", _conv(state, f"{name}.conv2", y)) + norm(f"{name}.deconv_bn", up))
        fine.insert(0, F.relu(norm(f"{name}.bn3", _conv(state, f"{name}.conv3", y))))
    return fine


def dd604_forward(state: State, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    scales = (state["L2Norm_conv4_3.weight"], state["L2Norm_conv5_3.weight"])
    maps = _vgg_maps(state, "base.", 6, scales, x)
    maps.append(F.relu(_conv(state, "extra.2", F.relu(_conv(state, "extra.0", maps[-1])), stride=2)))
    return _four(state, maps, _dd604_pyramid(state, maps, lambda _, y: y, 2), classes)


RESNET = ((3, 64), (4, 128), (23, 256), (3, 512))
RESNET_SOURCES = (512, 1024, 2048, 512)


def _bottleneck_shapes(name: str, inputs: int, width: int, *, projected: bool) -> Shapes:
    shapes: Shapes = {}
    for k, (i, o, kernel) in enumerate(((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)), start=1):
        shapes |= {f"{name}.conv{k}.weight": (o, i, kernel, kernel), **_norm_shapes(f"{name}.bn{k}", o)}
    if projected:
        shapes |= {
            f"{name}.downsample.0.weight": (4 * width, inputs, 1, 1),
            **_norm_shapes(f"{name}.downsample.1", 4 * width),
        }
    return shapes


def dd604_resnet(classes: int, narrow: int = 1) -> State:
    shapes: Shapes = {"base.conv1.weight": (64, 3, 7, 7), **_norm_shapes("base.bn1", 64)}
    inputs = 64
    for stage, (depth, width) in enumerate(RESNET, start=1):
        for block in range(depth):
            shapes |= _bottleneck_shapes(f"base.layer{stage}.{block}", inputs, width, projected=block == 0)
            inputs = 4 * width
    shapes |= {"base.fc.weight": (1000, 2048), "base.fc.bias": (1000,)}
    shapes |= _bottleneck_shapes("extra.resbody", 2048, 128, projected=True)
    shapes |= _pyramid_shapes(RESNET_SOURCES, norm=True) | _head_shapes(classes, RESNET_SOURCES)
    state = filled(_narrowed(shapes, narrow), 2)
    for name in list(state):
        # The backbone once more: stem, layer1 and layer2 as one sequence, then layer3, layer4 and the extra one.
        for old, new in (
            ("base.conv1.", "layer1.0."), ("base.bn1.", "layer1.1."), ("base.layer1.", "layer1.4."),
            ("base.layer2.", "layer1.5."), ("base.layer3.", "layer2."), ("base.layer4.", "layer3."),
            ("extra.", "layer4."),
        ):  # fmt: skip
            if name.startswith(old):
                state[new + name.removeprefix(old)] = state[name]
    return state


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def _bottleneck(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    y = F.relu(_norm(state, f"{name}.bn1", _conv(state, f"{name}.conv1", x)))
    y = F.relu(_norm(state, f"{name}.bn2", _conv(state, f"{name}.conv2", y, stride=stride)))
    y = _norm(state, f"{name}.bn3", _conv(state, f"{name}.conv3", y))
    if f"{name}.downsample.0.weight" in state:
        x = _norm(state, f"{name}.downsample.1", _conv(state, f"{name}.downsample.0", x, stride=stride))
    return F.relu(x + y)


def dd604_resnet_forward(state: State, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    x = F.relu(_norm(state, "base.bn1", _conv(state, "base.conv1", x, stride=2)))
    x = F.max_pool2d(x, 3, 2, padding=1)
    maps = []
    for stage, (depth, _) in enumerate(RESNET, start=1):
        for block in range(depth):
            x = _bottleneck(state, f"base.layer{stage}.{block}", x, 2 if stage > 1 and block == 0 else 1)
        maps.append(x)
    maps = [*maps[1:], _bottleneck(state, "extra.resbody", x, 2)]
    fine = _dd604_pyramid(state, maps, lambda name, y: _norm(state, name, y), 3)
    return _four(state, maps, fine, classes)


# lzx1413/PytorchSSD ---------------------------------------------------------------------------------------------------


def lzx(classes: int, narrow: int = 1, *, later: bool = False) -> State:
    """The model RefineSSD, or the later one, RefineDet, which has the ReLUs and other names."""
    shapes = _vgg_shapes("base.layers." if later else "base.")
    shapes |= {"L2Norm_4_3.weight": (512,), "L2Norm_5_3.weight": (512,)}
    shapes |= _both("extras.0", (256, 1024, 1, 1)) | _both("extras.2", (512, 256, 3, 3)) | _head_shapes(classes)
    for place, inputs in zip((0, 2, 4 if later else 3), (512, 256, 256), strict=True):
        shapes |= _both(f"last_layer_trans.{place}", (256, inputs, 3, 3))
    for place, inputs in enumerate((1024, 512, 512) if later else (512, 512, 1024)):
        shapes |= _both(f"trans_layers.{place}.0", (256, inputs, 3, 3)) | _both(
            f"trans_layers.{place}.2", (256, 256, 3, 3)
        )
        shapes |= _both(f"up_layers.{place}", (256, 256, 2, 2)) | _both(f"latent_layrs.{place}", (256, 256, 3, 3))
    return filled(_narrowed(shapes, narrow), 3)


def lzx_forward(state: State, x: Tensor, classes: int, *, later: bool = False) -> tuple[Tensor, ...]:
    scales = (state["L2Norm_4_3.weight"], state["L2Norm_5_3.weight"])
    maps = _vgg_maps(state, "base.layers." if later else "base.", 6, scales, x)
    maps.append(F.relu(_conv(state, "extras.2", F.relu(_conv(state, "extras.0", maps[-1])), stride=2)))
    y = F.relu(_conv(state, "last_layer_trans.0", maps[3]))
    if later:
        y = F.relu(_conv(state, "last_layer_trans.4", F.relu(_conv(state, "last_layer_trans.2", y))))
    else:
        y = _conv(state, "last_layer_trans.3", _conv(state, "last_layer_trans.2", y))
    fine = [y]
    for turn, level in enumerate((2, 1, 0)):
        place = turn if later else level
        t = _conv(state, f"trans_layers.{place}.2", F.relu(_conv(state, f"trans_layers.{place}.0", maps[level])))
        u = F.conv_transpose2d(fine[0], state[f"up_layers.{turn}.weight"], state[f"up_layers.{turn}.bias"], stride=2)
        fine.insert(0, F.relu(_conv(state, f"latent_layrs.{turn}", F.relu(u + t))))
    return _four(state, maps, fine, classes)


# amdegroot/ssd.pytorch ------------------------------------------------------------------------------------------------

SSD_HEADS = ((512, 4), (1024, 6), (512, 6), (256, 6), (256, 4), (256, 4))


def ssd(classes: int, narrow: int = 1) -> State:
    shapes = _vgg_shapes("vgg.") | {"L2Norm.weight": (512,)}
    extras = ((1024, 256, 1), (256, 512, 3), (512, 128, 1), (128, 256, 3), (256, 128, 1), (128, 256, 3), (256, 128, 1),
              (128, 256, 3))  # fmt: skip
    for place, (inputs, outputs, kernel) in enumerate(extras):
        shapes |= _both(f"extras.{place}", (outputs, inputs, kernel, kernel))
    for level, (inputs, anchors) in enumerate(SSD_HEADS):
        shapes |= _both(f"loc.{level}", (4 * anchors, inputs, 3, 3))
        shapes |= _both(f"conf.{level}", (classes * anchors, inputs, 3, 3))
    return filled(_narrowed(shapes, narrow), 6)


def ssd_forward(state: State, x: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    maps = []
    for index, _, _ in VGG:
        x = F.relu(_conv(state, f"vgg.{index}", x))
        if index == 21:
            maps.append(_unit(x, state["L2Norm.weight"]))
        if index in (2, 7, 14, 21):
            x = F.max_pool2d(x, 2, 2, ceil_mode=index == 14)
    x = F.max_pool2d(x, 3, 1, padding=1)
    x = F.relu(_conv(state, "vgg.33", F.relu(_conv(state, "vgg.31", x, padding=6, dilation=6))))
    maps.append(x)
    for place, (stride, padding) in enumerate(((1, 0), (2, 1), (1, 0), (2, 1), (1, 0), (1, 0), (1, 0), (1, 0))):
        x = F.relu(_conv(state, f"extras.{place}", x, stride=stride, padding=padding))
        if place % 2:
            maps.append(x)
    return (
        _predictions(maps, lambda i, y: _conv(state, f"conf.{i}", y), classes),
        _predictions(maps, lambda i, y: _conv(state, f"loc.{i}", y), 4),
    )


# The official code, Caffe ---------------------------------------------------------------------------------------------


def caffe_vgg(classes: int, narrow: int = 1) -> State:
    """Blobs by ``LAYER.NUMBER``."""
    shapes: Shapes = {}

    def add(name: str, *weight: int) -> None:
        shapes[f"{name}.0"], shapes[f"{name}.1"] = weight, (weight[1] if name.endswith("-up") else weight[0],)

    for name, (_, inputs, outputs) in zip(CAFFE_CONVOLUTIONS, VGG, strict=True):
        add(name, outputs, inputs, 3, 3)
    add("fc6", 1024, 512, 3, 3)
    add("fc7", 1024, 1024, 1, 1)
    add("conv6_1", 256, 1024, 1, 1)
    add("conv6_2", 512, 256, 3, 3)
    shapes |= {"conv4_3_norm.0": (512,), "conv5_3_norm.0": (512,)}
    for k, inputs in zip((3, 4, 5, 6), SOURCES, strict=True):
        add(f"TL{k}_1", 256, inputs, 3, 3)
        add(f"TL{k}_2", 256, 256, 3, 3)
        add(f"P{k}", 256, 256, 3, 3)
        if k > 3:
            add(f"P{k}-up", 256, 256, 2, 2)
    for name, inputs in zip(("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"), SOURCES, strict=True):
        add(f"{name}_mbox_loc", 12, inputs, 3, 3)
        add(f"{name}_mbox_conf", 6, inputs, 3, 3)
    for k in (3, 4, 5, 6):
        add(f"P{k}_mbox_loc", 12, 256, 3, 3)
        add(f"P{k}_mbox_conf", 3 * classes, 256, 3, 3)
    return filled(_narrowed(shapes, narrow), 4)


def _caffe_conv(net: State, name: str, x: Tensor, **how: Any) -> Tensor:
    weight = net[f"{name}.0"]
    how.setdefault("padding", weight.shape[2] // 2)
    return F.conv2d(x, weight, net.get(f"{name}.1"), **how)


def _caffe_heads(net: State, names: list[str], maps: list[Tensor], kind: str, width: int) -> Tensor:
    return _predictions(maps, lambda i, x: _caffe_conv(net, f"{names[i]}_mbox_{kind}", x), width)


def caffe_vgg_forward(net: State, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    maps: list[Tensor] = []
    for name in CAFFE_CONVOLUTIONS:
        x = F.relu(_caffe_conv(net, name, x))
        if name in ("conv4_3", "conv5_3"):
            length = (x.pow(2).sum(dim=1, keepdim=True) + 1e-10).sqrt()
            maps.append(x / length * net[f"{name}_norm.0"].view(1, -1, 1, 1))
        if name in ("conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"):
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
    maps.append(F.relu(_caffe_conv(net, "fc7", F.relu(_caffe_conv(net, "fc6", x, padding=3, dilation=3)))))
    maps.append(F.relu(_caffe_conv(net, "conv6_2", F.relu(_caffe_conv(net, "conv6_1", maps[-1])), stride=2)))
    fine: list[Tensor] = []
    for k in (6, 5, 4, 3):
        y = _caffe_conv(net, f"TL{k}_2", F.relu(_caffe_conv(net, f"TL{k}_1", maps[k - 3])))
        if fine:
            y = y + F.conv_transpose2d(fine[0], net[f"P{k + 1}-up.0"], net[f"P{k + 1}-up.1"], stride=2)
        fine.insert(0, F.relu(_caffe_conv(net, f"P{k}", F.relu(y))))
    arm, odm = ["conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"], ["P3", "P4", "P5", "P6"]
    return (
        _caffe_heads(net, arm, maps, "conf", 2), _caffe_heads(net, arm, maps, "loc", 4),
        _caffe_heads(net, odm, fine, "conf", classes), _caffe_heads(net, odm, fine, "loc", 4),
    )  # fmt: skip


FACTOR = 999.0  # of Caffe's running averages: what they have to be divided by


def caffe_resnet(classes: int, narrow: int = 1) -> State:
    shapes: Shapes = {}

    def add(conv: str, norm: str, scale: str, *weight: int) -> None:
        outputs = weight[1] if conv.endswith("-up") else weight[0]
        shapes[f"{conv}.0"] = weight
        shapes.update({f"{norm}.0": (outputs,), f"{norm}.1": (outputs,), f"{norm}.2": (1,)})
        shapes.update({f"{scale}.0": (outputs,), f"{scale}.1": (outputs,)})

    def body(block: str, inputs: int, width: int, outputs: int, *, projected: bool) -> None:
        parts = [("2a", width, inputs, 1), ("2b", width, width, 3), ("2c", outputs, width, 1)]
        for branch, o, i, kernel in (*parts, *([("1", outputs, inputs, 1)] if projected else [])):
            names = (f"{kind}{block}_branch{branch}" for kind in ("res", "bn", "scale"))
            add(*names, o, i, kernel, kernel)

    add("conv1", "bn_conv1", "scale_conv1", 64, 3, 7, 7)
    inputs = 64
    for block, width in caffe_blocks():
        body(block, inputs, width, 4 * width, projected=block.endswith("a"))
        inputs = 4 * width
    body("6", 2048, 128, 512, projected=True)
    for k, channels in zip((3, 4, 5, 6), RESNET_SOURCES, strict=True):
        for name, i in ((f"TL{k}_1", channels), (f"TL{k}_2", 256), (f"P{k}", 256)):
            add(name, f"{name}_bn", f"{name}_scale", 256, i, 3, 3)
        if k > 3:
            add(f"P{k}-up", f"P{k}-up_bn", f"P{k}-up_scale", 256, 256, 2, 2)
        for source, i, outputs in ((CAFFE_SOURCES[k - 3], channels, 6), (f"P{k}", 256, 3 * classes)):
            body(f"{source}_inter", i, 256, 1024, projected=True)
            for kind, o in (("loc", 12), ("conf", outputs)):
                shapes[f"res{source}_inter_mbox_{kind}.0"] = (o, 1024, 3, 3)
                shapes[f"res{source}_inter_mbox_{kind}.1"] = (o,)
    return _as_averages(filled(_narrowed(shapes, narrow), 5))


def _as_averages(net: State) -> State:
    """Make the statistics what Caffe keeps: sums with a weight."""
    for name in list(net):
        if name.endswith(".2"):
            net[name].fill_(FACTOR)
            net[name[:-1] + "0"] *= FACTOR
            net[name[:-1] + "1"] = (net[name[:-1] + "1"].abs() + 0.5) * FACTOR
            scale = name[:-2]
            scale = f"scale{scale[2:]}" if scale.startswith("bn") else f"{scale[:-3]}_scale"
            net[f"{scale}.0"] = 0.3 + 0.1 * net[f"{scale}.0"].tanh()
    return net


CAFFE_SOURCES = ("res3b3_relu", "res4b22_relu", "res5c_relu", "res6_relu")


def caffe_blocks() -> list[tuple[str, int]]:
    names = ["2a", "2b", "2c", "3a", "3b1", "3b2", "3b3", "4a", *(f"4b{i}" for i in range(1, 23)), "5a", "5b", "5c"]
    return [(name, {"2": 64, "3": 128, "4": 256, "5": 512}[name[0]]) for name in names]


def _caffe_norm(net: State, norm: str, scale: str, x: Tensor) -> Tensor:
    factor = net[f"{norm}.2"]
    x = (x - (net[f"{norm}.0"] / factor).view(1, -1, 1, 1)) / (
        (net[f"{norm}.1"] / factor).view(1, -1, 1, 1) + 1e-5
    ).sqrt()
    return x * net[f"{scale}.0"].view(1, -1, 1, 1) + net[f"{scale}.1"].view(1, -1, 1, 1)


def _caffe_body(net: State, block: str, x: Tensor, stride: int) -> Tensor:
    def branch(name: str, y: Tensor, **how: Any) -> Tensor:
        names = (f"{kind}{block}_branch{name}" for kind in ("bn", "scale"))
        return _caffe_norm(net, *names, _caffe_conv(net, f"res{block}_branch{name}", y, **how))

    y = F.relu(branch("2b", F.relu(branch("2a", x, stride=stride))))
    y = branch("2c", y)
    return F.relu(y + (branch("1", x, stride=stride) if f"res{block}_branch1.0" in net else x))


def caffe_resnet_forward(net: State, x: Tensor, classes: int) -> tuple[Tensor, ...]:
    x = F.relu(_caffe_norm(net, "bn_conv1", "scale_conv1", _caffe_conv(net, "conv1", x, stride=2)))
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    maps = []
    for block, _ in caffe_blocks():
        x = _caffe_body(net, block, x, 2 if block in ("3a", "4a", "5a") else 1)
        if block in ("3b3", "4b22", "5c"):
            maps.append(x)
    maps.append(_caffe_body(net, "6", x, 2))

    def layer(name: str, y: Tensor) -> Tensor:
        return _caffe_norm(net, f"{name}_bn", f"{name}_scale", _caffe_conv(net, name, y))

    fine: list[Tensor] = []
    for k in (6, 5, 4, 3):
        y = layer(f"TL{k}_2", F.relu(layer(f"TL{k}_1", maps[k - 3])))
        if fine:
            up = F.conv_transpose2d(fine[0], net[f"P{k + 1}-up.0"], None, stride=2)
            y = y + _caffe_norm(net, f"P{k + 1}-up_bn", f"P{k + 1}-up_scale", up)
        fine.insert(0, F.relu(layer(f"P{k}", F.relu(y))))
    arm = [f"res{source}_inter" for source in CAFFE_SOURCES]
    odm = [f"resP{k}_inter" for k in (3, 4, 5, 6)]
    coarse = [_caffe_body(net, f"{source}_inter", y, 1) for source, y in zip(CAFFE_SOURCES, maps, strict=True)]
    fine = [_caffe_body(net, f"P{k}_inter", y, 1) for k, y in zip((3, 4, 5, 6), fine, strict=True)]
    return (
        _caffe_heads(net, arm, coarse, "conf", 2), _caffe_heads(net, arm, coarse, "loc", 4),
        _caffe_heads(net, odm, fine, "conf", classes), _caffe_heads(net, odm, fine, "loc", 4),
    )  # fmt: skip


# A caffemodel's bytes -------------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*parts, number])


def chunk(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def blob(values: Tensor, form: str = "new") -> bytes:
    """A blob: "new", "old" (four sides), "unpacked" (a key before each number) or "double"."""
    row = values.detach().contiguous().numpy()
    shape = chunk(7, chunk(1, b"".join(map(varint, row.shape))))
    if form == "double":
        return shape + chunk(8, row.astype("<f8").tobytes())
    if form == "unpacked":
        return shape + b"".join(b"\x2d" + struct.pack("<f", v) for v in row.flatten().tolist())
    if form == "old":
        sides = [1] * (4 - row.ndim) + list(row.shape)
        return b"".join(varint(i << 3) + varint(side) for i, side in enumerate(sides, 1)) + chunk(5, row.tobytes())
    return shape + chunk(5, row.tobytes())


def caffemodel(net: State, name: str = "", *, form: str = "new", old: bool = False) -> bytes:
    """A network's bytes, with fields that a reader has to skip; ``old`` is the form V1."""
    layers: dict[str, list[Tensor]] = {}
    for key, tensor in net.items():
        layers.setdefault(key.rpartition(".")[0], []).append(tensor)
    parts = [chunk(1, name.encode()), chunk(3, b"data")] + [varint(4 << 3) + varint(n) for n in (1, 3, 320, 320)]
    layer_field, name_field, blob_field = (2, 4, 6) if old else (100, 1, 7)
    parts.append(chunk(layer_field, chunk(name_field, b"relu1_1")))
    for layer, blobs in layers.items():
        kind = varint(5 << 3) + varint(4) if old else chunk(2, b"Convolution")
        content = chunk(name_field, layer.encode()) + kind
        parts.append(chunk(layer_field, content + b"".join(chunk(blob_field, blob(b, form)) for b in blobs)))
    return b"".join(parts)
