"""How other implementations of RefineDet, and one of SSD, name their tensors, and which of our layers those are.

Source: the code of each project; `DetectorLayout.project` names it. All RefineDets have VGG-16 or ResNet-101, transfer
connection blocks of 256 channels and three anchors a cell; background comes first everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from refinedet_cli.core.config import Classes, DetectorConfig, NetworkConfig, PostprocessConfig
from refinedet_cli.core.presets import VOC_NAMES, caffe_postprocess, get_preset, ssd300_coco_anchors
from refinedet_cli.zoo.backbone_layouts import LAYOUTS

LEVELS = range(4)

# Position in VGG's sequence of layers, as vgg16_reducedfc numbers them, to our layer.
_VGG = LAYOUTS["vgg16_reducedfc"].layers
_CAFFE_VGG = {
    **{f"conv{stage}_{number}": f"conv{stage}.{number - 1}.0" for stage, depth in enumerate((2, 2, 3, 3, 3), start=1)
       for number in range(1, depth + 1)},
    "fc6": "fc6.0", "fc7": "fc7.0", "conv4_3_norm": "norm4", "conv5_3_norm": "norm5",
    "conv6_1": "conv6.0.0", "conv6_2": "conv6.1.0",
}  # fmt: skip
_RESNET_101 = (3, 4, 23, 3)
_RESNET_SOURCES = ("res3b3_relu", "res4b22_relu", "res5c_relu", "res6_relu")


class Head(NamedTuple):
    """The two layers that are one of ours: class logits, and offsets."""

    logits: str
    offsets: str


@dataclass(frozen=True, kw_only=True)
class DetectorLayout:
    """One implementation's names and numbers.

    Attributes:
        project: where it is from.
        about: its network, for people.
        preset: ours that is nearest to it; where it is for 320 px, the one for 512 px has that number in its place.
        signs: names of tensors that, all together, nothing else has.
        layers: our layer, to its layer.
        heads: our layer, to the two that it is made of.
        channel_order: of the input that its code feeds.
        network: its network; None for the official one.
        cut_anchors: limit both sides of every anchor to the input.
        postprocess: what its code does, by the number of classes.
        size: of the input, where there is but one.
        repeated: beginnings of names under which it holds tensors a second time.
        unused: beginnings of names that a detector has no place for.
        assumed: what its files do not say and its code does.
    """

    project: str
    about: str
    preset: Literal["refinedet320_vgg16", "refinedet320_resnet101", "ssd300_vgg16"]
    signs: tuple[str, ...]
    layers: Mapping[str, str]
    heads: Mapping[str, Head]
    channel_order: Literal["rgb", "bgr"]
    network: NetworkConfig | None = None
    cut_anchors: bool = False
    postprocess: Callable[[int], PostprocessConfig]
    size: int | None = None
    repeated: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def config(self, classes: Classes, size: int) -> DetectorConfig:
        """Configure our detector to compute what the implementation does, for an input of a size in px."""
        name = self.preset.replace("320", "512") if size == 512 else self.preset
        config = get_preset(name, classes).detector
        anchors = config.require_anchors()
        if self.preset == "ssd300_vgg16" and len(classes) != len(VOC_NAMES):
            anchors = ssd300_coco_anchors()
        if self.cut_anchors:
            shapes = tuple(tuple((min(w, size), min(h, size)) for w, h in level) for level in anchors.shapes)
            anchors = replace(anchors, shapes=shapes)
        return replace(
            config,
            network=self.network or config.network,
            anchors=anchors,
            preprocess=replace(config.preprocess, height=size, width=size, channel_order=self.channel_order),
            postprocess=self.postprocess(len(classes)),
        )

    @property
    def first_head(self) -> str:
        """Name our layer whose outputs tell how many classes there are."""
        return "head.levels.0" if self.preset == "ssd300_vgg16" else "odm.levels.0"

    @property
    def anchors_of_a_cell(self) -> int:
        """Count the anchors that the first head has in each cell."""
        return 4 if self.preset == "ssd300_vgg16" else 3


def _vgg_backbone(prefix: str, norms: tuple[str, str], extras: tuple[str, str]) -> dict[str, str]:
    ours = ("norm4", "norm5", "conv6.0.0", "conv6.1.0")
    layers = {f"backbone.{our}": f"{prefix}{index}" for index, our in _VGG.items()}
    return layers | {f"backbone.{our}": their for our, their in zip(ours, (*norms, *extras), strict=True)}


def _pyramid_heads() -> dict[str, Head]:
    """Name the heads as every one of the PyTorch implementations does."""
    return {
        f"{part}.levels.{level}": Head(f"{part}_conf.{level}", f"{part}_loc.{level}")
        for part in ("arm", "odm")
        for level in LEVELS
    }


def _luuuyi_tcb() -> dict[str, str]:
    layers: dict[str, str] = {}
    for level in LEVELS:
        layers |= {
            f"tcb.{level}.first.0": f"tcb0.{3 * level}",
            f"tcb.{level}.second.0": f"tcb0.{3 * level + 2}",
            f"tcb.{level}.last.0": f"tcb2.{3 * level + 1}",
        }
    return layers | {f"tcb.{level}.up.0": f"tcb1.{level}" for level in LEVELS[:-1]}


def _dd604_tcb(*, norm: bool) -> dict[str, str]:
    layers: dict[str, str] = {}
    parts = {"first": "conv1", "second": "conv2", "up": "deconv", "last": "conv3"}
    norms = {"first": "bn1", "second": "bn2", "up": "deconv_bn", "last": "bn3"}
    for level in LEVELS[:-1]:
        layers |= {f"tcb.{level}.{our}.0": f"pyramid_layer{level + 1}.{their}" for our, their in parts.items()}
        if norm:
            layers |= {f"tcb.{level}.{our}.1": f"pyramid_layer{level + 1}.{their}" for our, their in norms.items()}
    # The coarsest one is a sequence of convolution, perhaps normalisation, and ReLU, three times.
    step = 3 if norm else 2
    for place, our in enumerate(("first", "second", "last")):
        layers[f"tcb.3.{our}.0"] = f"pyramid_layer4.{place * step}"
        if norm:
            layers[f"tcb.3.{our}.1"] = f"pyramid_layer4.{place * step + 1}"
    return layers


def _lzx_tcb(top: tuple[int, int, int], order: tuple[int, int, int]) -> dict[str, str]:
    """Name the blocks; ``order`` is the place of the lateral convolutions of each level."""
    layers = {
        f"tcb.3.{our}.0": f"last_layer_trans.{i}" for our, i in zip(("first", "second", "last"), top, strict=True)
    }
    for level in LEVELS[:-1]:
        layers |= {
            f"tcb.{level}.first.0": f"trans_layers.{order[level]}.0",
            f"tcb.{level}.second.0": f"trans_layers.{order[level]}.2",
            f"tcb.{level}.up.0": f"up_layers.{2 - level}",
            f"tcb.{level}.last.0": f"latent_layrs.{2 - level}",
        }
    return layers


def _caffe_tcb(*, norm: bool) -> dict[str, str]:
    layers: dict[str, str] = {}
    for level in LEVELS:
        parts = {"first": f"TL{level + 3}_1", "second": f"TL{level + 3}_2", "last": f"P{level + 3}"}
        if level + 1 in LEVELS:
            parts["up"] = f"P{level + 4}-up"
        layers |= {f"tcb.{level}.{our}.0": their for our, their in parts.items()}
        if norm:
            layers |= {f"tcb.{level}.{our}.1": f"{their}_bn" for our, their in parts.items()}
    return layers


def _caffe_heads(arm: tuple[str, ...], odm: tuple[str, ...]) -> dict[str, Head]:
    return {
        f"{part}.levels.{level}": Head(f"{name}_mbox_conf", f"{name}_mbox_loc")
        for part, names in (("arm", arm), ("odm", odm))
        for level, name in enumerate(names)
    }


def _torch_resnet(prefix: str, extra: str) -> dict[str, str]:
    """Name what has torchvision's names, below ``prefix`` and ``extra``."""
    layers = {f"backbone.{name}": f"{prefix}{name}" for name in ("conv1", "bn1")}
    for stage, depth in enumerate(_RESNET_101, start=1):
        for block in range(depth):
            for part in _block_parts(projected=not block):
                layers[f"backbone.layer{stage}.{block}.{part}"] = f"{prefix}layer{stage}.{block}.{part}"
    return layers | {f"backbone.res6.{part}": f"{extra}{part}" for part in _block_parts(projected=True)}


def _block_parts(*, projected: bool) -> tuple[str, ...]:
    parts = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
    return (*parts, "downsample.0", "downsample.1") if projected else parts


def _caffe_block(ours: str, theirs: str, *, projected: bool) -> dict[str, str]:
    return {f"{ours}.{part}": _caffe_part(theirs, part) for part in _block_parts(projected=projected)}


def _caffe_part(block: str, part: str) -> str:
    """Name a layer of a bottleneck: ``res2a_branch2b`` is the second convolution of block 2a, ``bn2a_branch1`` ..."""
    kind, number = ("res" if part.startswith("conv") or part.endswith(".0") else "bn"), part[-1]
    branch = "branch1" if part.startswith("downsample") else f"branch2{'abc'[int(number) - 1]}"
    return f"{kind}{block}_{branch}"


def _caffe_resnet() -> dict[str, str]:
    layers = {"backbone.conv1": "conv1", "backbone.bn1": "bn_conv1"}
    for stage, depth in enumerate(_RESNET_101, start=1):
        for block in range(depth):
            # Few blocks are lettered, many numbered from the second on.
            name = "abc"[block] if depth == 3 else f"b{block}" if block else "a"
            layers |= _caffe_block(f"backbone.layer{stage}.{block}", f"{stage + 1}{name}", projected=not block)
    layers |= _caffe_block("backbone.res6", "6", projected=True)
    for level in LEVELS:
        layers |= _caffe_block(f"arm_blocks.{level}", f"{_RESNET_SOURCES[level]}_inter", projected=True)
        layers |= _caffe_block(f"odm_blocks.{level}", f"P{level + 3}_inter", projected=True)
    return layers


_SSD_EXTRAS = ("conv6.0.0", "conv6.1.0", "conv7.0.0", "conv7.1.0", "conv8.0.0", "conv8.1", "conv9.0.0", "conv9.1")


def _ssd_backbone() -> dict[str, str]:
    layers = {f"backbone.{our}": f"vgg.{index}" for index, our in _VGG.items()} | {"backbone.norm4": "L2Norm"}
    return layers | {f"backbone.{our}": f"extras.{index}" for index, our in enumerate(_SSD_EXTRAS)}


def _ssd_postprocess(classes: int) -> PostprocessConfig:
    return PostprocessConfig(candidates=200, candidates_per="class", keep=200 * classes)


def _luuuyi_postprocess(classes: int) -> PostprocessConfig:
    """Take 1000 a class; its limit on what is kept has no effect, so all of them may be kept."""
    return PostprocessConfig(candidates=1000, candidates_per="class", keep=1000 * classes)


def _dd604_postprocess(classes: int) -> PostprocessConfig:
    return PostprocessConfig(candidates=400, candidates_per="class", keep=400 * classes)


def _lzx_postprocess(classes: int) -> PostprocessConfig:
    return PostprocessConfig(candidates=1000, candidates_per="class", keep=200 if classes == 80 else 300)


def _official_postprocess(_: int) -> PostprocessConfig:
    return caffe_postprocess()


_LZX_ASSUMED = (
    "anchors are cut to the input, as its code does",
    "its limit of 50 detections a class is left out: at most 300 a picture (200 with 80 classes) are kept",
)

DETECTOR_LAYOUTS: tuple[DetectorLayout, ...] = (
    DetectorLayout(
        project="luuuyi/RefineDet.PyTorch",
        about="RefineDet with VGG-16",
        preset="refinedet320_vgg16",
        signs=("vgg.0.weight", "tcb0.0.weight", "odm_conf.0.weight"),
        layers={
            **_vgg_backbone("vgg.", ("conv4_3_L2Norm", "conv5_3_L2Norm"), ("extras.0", "extras.1")),
            **_luuuyi_tcb(),
        },
        heads=_pyramid_heads(),
        channel_order="rgb",
        cut_anchors=True,
        postprocess=_luuuyi_postprocess,
        assumed=(
            "anchors are cut to the input, as its code does",
            "all detections are kept: the limit of its code has no effect",
        ),
    ),
    DetectorLayout(
        project="dd604/refinedet.pytorch",
        about="RefineDet with VGG-16, deconvolutions of 3 x 3, fc6 dilated by 6",
        preset="refinedet320_vgg16",
        signs=("pyramid_layer1.conv1.weight", "base.0.weight", "L2Norm_conv4_3.weight"),
        layers={
            **_vgg_backbone("base.", ("L2Norm_conv4_3", "L2Norm_conv5_3"), ("extra.0", "extra.2")),
            **_dd604_tcb(norm=False),
        },
        heads=_pyramid_heads(),
        channel_order="bgr",
        network=NetworkConfig(backbone="vgg16", tcb_up="3x3", fc6_dilation=6),
        postprocess=_dd604_postprocess,
        repeated=("layer1.", "layer2.", "layer3.", "layer4."),
        assumed=("all detections are kept: the limit of its code has no effect",),
    ),
    DetectorLayout(
        project="dd604/refinedet.pytorch",
        about="RefineDet with ResNet-101 of torchvision, no blocks before the heads, deconvolutions of 3 x 3",
        preset="refinedet320_resnet101",
        signs=("pyramid_layer1.bn1.weight", "base.layer1.0.conv1.weight", "extra.resbody.conv1.weight"),
        layers={**_torch_resnet("base.", "extra.resbody."), **_dd604_tcb(norm=True)},
        heads=_pyramid_heads(),
        channel_order="bgr",
        network=NetworkConfig(backbone="resnet101", tcb_norm="batch", tcb_up="3x3"),
        postprocess=_dd604_postprocess,
        repeated=("layer1.", "layer2.", "layer3.", "layer4."),
        unused=("base.fc.",),
        assumed=("all detections are kept: the limit of its code has no effect",),
    ),
    DetectorLayout(
        project="lzx1413/PytorchSSD (RefineSSD)",
        about="RefineDet with VGG-16, fc6 dilated by 6, two ReLUs of the coarsest block missing",
        preset="refinedet320_vgg16",
        signs=("base.0.weight", "last_layer_trans.3.weight", "trans_layers.0.0.weight"),
        layers={
            **_vgg_backbone("base.", ("L2Norm_4_3", "L2Norm_5_3"), ("extras.0", "extras.2")),
            **_lzx_tcb((0, 2, 3), (0, 1, 2)),
        },
        heads=_pyramid_heads(),
        channel_order="bgr",
        network=NetworkConfig(backbone="vgg16", tcb_top="linear", fc6_dilation=6),
        cut_anchors=True,
        postprocess=_lzx_postprocess,
        assumed=_LZX_ASSUMED,
    ),
    DetectorLayout(
        project="lzx1413/PytorchSSD (RefineDet)",
        about="RefineDet with VGG-16, fc6 dilated by 6",
        preset="refinedet320_vgg16",
        signs=("base.layers.0.weight", "last_layer_trans.4.weight", "trans_layers.0.0.weight"),
        layers={
            **_vgg_backbone("base.layers.", ("L2Norm_4_3", "L2Norm_5_3"), ("extras.0", "extras.2")),
            **_lzx_tcb((0, 2, 4), (2, 1, 0)),
        },
        heads=_pyramid_heads(),
        channel_order="bgr",
        network=NetworkConfig(backbone="vgg16", fc6_dilation=6),
        cut_anchors=True,
        postprocess=_lzx_postprocess,
        assumed=_LZX_ASSUMED,
    ),
    DetectorLayout(
        project="sfzhang15/RefineDet (Caffe)",
        about="RefineDet with VGG-16",
        preset="refinedet320_vgg16",
        signs=("conv1_1.weight", "TL3_1.weight", "P3_mbox_conf.weight"),
        layers={**{f"backbone.{our}": their for their, our in _CAFFE_VGG.items()}, **_caffe_tcb(norm=False)},
        heads=_caffe_heads(("conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2"), ("P3", "P4", "P5", "P6")),
        channel_order="bgr",
        postprocess=_official_postprocess,
    ),
    DetectorLayout(
        project="sfzhang15/RefineDet (Caffe)",
        about="RefineDet with ResNet-101",
        preset="refinedet320_resnet101",
        signs=("res2a_branch1.weight", "TL3_1.weight", "resP3_inter_mbox_conf.weight"),
        layers={**_caffe_resnet(), **_caffe_tcb(norm=True)},
        heads=_caffe_heads(
            tuple(f"res{name}_inter" for name in _RESNET_SOURCES), tuple(f"resP{k}_inter" for k in (3, 4, 5, 6))
        ),
        channel_order="bgr",
        postprocess=_official_postprocess,
    ),
    DetectorLayout(
        project="amdegroot/ssd.pytorch",
        about="SSD300 with VGG-16",
        preset="ssd300_vgg16",
        signs=("vgg.0.weight", "L2Norm.weight", "loc.5.weight", "conf.5.weight"),
        layers=_ssd_backbone(),
        heads={f"head.levels.{level}": Head(f"conf.{level}", f"loc.{level}") for level in range(6)},
        channel_order="rgb",
        cut_anchors=True,
        postprocess=_ssd_postprocess,
        size=300,
        assumed=(
            "anchors are those of its code for VOC with 20 classes, else those for COCO; they are cut to the input",
            # The last cells of stride 32: 9.5 * 32 px is 304 px.
            "120 of 8,732 anchors are centred 4 px beyond the right or lower edge; its code moves them to the edge",
            "all detections are kept: its code has no limit",
        ),
    ),
)


def size_in_name(name: str) -> int | None:
    """Find 320 or 512, the sizes that RefineDets are made for, in the name of a file or network."""
    sizes = {int(number) for number in re.findall(r"(?<!\d)(320|512)(?!\d)", name)}
    return sizes.pop() if len(sizes) == 1 else None
