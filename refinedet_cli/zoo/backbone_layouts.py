"""How ImageNet classifiers name their tensors, and which of our backbones' layers those are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

TIMM = "timm/"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of naming the tensors of one architecture.

    Attributes:
        signs: tensors that tell it from the others.
        parts: what our backbone shares with the classifier; the rest, such as an extra level, stays fresh.
        unused: what a detector has no place for.
        layers: a layer's name in the file, and in our backbone; those that are not listed have the same name.
    """

    signs: tuple[str, ...]
    parts: tuple[str, ...]
    unused: tuple[str, ...] = ()
    layers: Mapping[str, str] = field(default_factory=dict)


_VGG_PARTS = ("conv1.", "conv2.", "conv3.", "conv4.", "conv5.", "fc6.", "fc7.")
# Position in the sequence of convolutions, activations and poolings; the same in torchvision, timm and vgg16_reducedfc.
_VGG_CONVOLUTIONS = {
    0: "conv1.0.0", 2: "conv1.1.0",
    5: "conv2.0.0", 7: "conv2.1.0",
    10: "conv3.0.0", 12: "conv3.1.0", 14: "conv3.2.0",
    17: "conv4.0.0", 19: "conv4.1.0", 21: "conv4.2.0",
    24: "conv5.0.0", 26: "conv5.1.0", 28: "conv5.2.0",
}  # fmt: skip
_VGG_FEATURES = {f"features.{index}": layer for index, layer in _VGG_CONVOLUTIONS.items()}


def _timm_mobilenet_layers() -> dict[str, str]:
    """Name timm's layers as torchvision does: blocks are counted through, and their layers have numbers."""
    layers = {
        "conv_stem": "features.0.0",
        "bn1": "features.0.1",
        "conv_head": "features.18.0",
        "bn2": "features.18.1",
        "blocks.0.0.conv_dw": "features.1.conv.0.0",
        "blocks.0.0.bn1": "features.1.conv.0.1",
        "blocks.0.0.conv_pw": "features.1.conv.1",
        "blocks.0.0.bn2": "features.1.conv.2",
    }
    places = [(stage, block) for stage, blocks in enumerate((2, 3, 4, 3, 3, 1), start=1) for block in range(blocks)]
    for number, (stage, block) in enumerate(places, start=2):
        ours = {"conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1", "conv_pwl": "2", "bn3": "3"}
        layers |= {f"blocks.{stage}.{block}.{theirs}": f"features.{number}.conv.{our}" for theirs, our in ours.items()}
    return layers


LAYOUTS: dict[str, Layout] = {
    "timm_vgg16": Layout(
        signs=("features.0.weight", "pre_logits.fc1.weight"),
        parts=_VGG_PARTS,
        unused=("head.",),
        layers={**_VGG_FEATURES, "pre_logits.fc1": "fc6.0", "pre_logits.fc2": "fc7.0"},
    ),
    "torchvision_vgg16": Layout(
        signs=("features.0.weight", "classifier.0.weight"),
        parts=_VGG_PARTS,
        unused=("classifier.6.",),
        layers={**_VGG_FEATURES, "classifier.0": "fc6.0", "classifier.3": "fc7.0"},
    ),
    "vgg16_reducedfc": Layout(
        signs=("0.weight", "33.weight"),
        parts=_VGG_PARTS,
        layers={**{str(i): layer for i, layer in _VGG_CONVOLUTIONS.items()}, "31": "fc6.0", "33": "fc7.0"},
    ),
    "resnet": Layout(
        signs=("conv1.weight", "layer1.0.conv1.weight"),
        parts=("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."),
        unused=("fc.",),
    ),
    "torchvision_mobilenet_v2": Layout(
        signs=("features.0.0.weight", "features.18.0.weight"), parts=("features.",), unused=("classifier.",)
    ),
    "timm_mobilenet_v2": Layout(
        signs=("conv_stem.weight", "blocks.0.0.conv_dw.weight"),
        parts=("features.",),
        unused=("classifier.",),
        layers=_timm_mobilenet_layers(),
    ),
    # Of a network that we know nothing of but that timm made both it and the file.
    "timm": Layout(signs=(), parts=("body.",)),
}
BACKBONE_LAYOUTS: dict[str, tuple[str, ...]] = {
    "vgg16": ("torchvision_vgg16", "timm_vgg16", "vgg16_reducedfc"),
    "vgg16_ssd": ("torchvision_vgg16", "timm_vgg16", "vgg16_reducedfc"),
    "mobilenet_v2": ("torchvision_mobilenet_v2", "timm_mobilenet_v2"),
    "resnet18": ("resnet",),
    "resnet50": ("resnet",),
    "resnet101": ("resnet",),
}


def find_layout(names: set[str], backbone: str) -> str | None:
    """Tell which layout of a backbone a file has by the names of its tensors; None if it has none of them."""
    if backbone.startswith(TIMM):
        return "timm"
    return next((n for n in BACKBONE_LAYOUTS[backbone] if names.issuperset(LAYOUTS[n].signs)), None)


def rename(layout: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tensors the names, and fully connected layers the form, that they have in our backbone.

    Args:
        layout: of the tensors, one of `LAYOUTS`.
        tensors: those of the file.
        wanted: those of the backbone.

    Returns:
        The tensors as float32, without those a detector has no place for. What the layout does not know keeps its name.
    """
    if layout == "timm":
        return _rename_timm(tensors, wanted)
    known = LAYOUTS[layout]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith(known.unused):
            layer, dot, kind = name.rpartition(".")
            renamed[known.layers.get(layer, layer) + dot + kind] = (
                tensor.float() if tensor.is_floating_point() else tensor
            )
    if layout in ("timm_vgg16", "torchvision_vgg16"):
        for name, thin in (("fc6.0", thin_fc6), ("fc7.0", thin_fc7)):
            if {f"{name}.weight", f"{name}.bias"} <= renamed.keys():
                weight, bias = thin(renamed[f"{name}.weight"], renamed[f"{name}.bias"])
                renamed |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return renamed


def thin_fc6(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Make the first fully connected layer of VGG a convolution of 3 x 3.

    Args:
        weight: float[4 N, 49 C] or float[4 N, C, 7, 7].
        bias: float[4 N].

    Returns:
        float[N, C, 3, 3] and float[N]: every fourth output, and the rows and columns 0, 3 and 6.

    Source: the usual way to the reduced VGG of SSD (arXiv:1512.02325), which the official RefineDet starts from.
    """
    if weight.ndim == 2 and weight.shape[1] % 49 == 0:
        weight = weight.view(len(weight), -1, 7, 7)
    return weight[::4, :, ::3, ::3] if weight.ndim == 4 else weight, bias[::4]


def thin_fc7(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Make the second fully connected layer of VGG a convolution of 1 x 1, of every fourth input and output.

    Args:
        weight: float[4 N, 4 M] or float[4 N, 4 M, 1, 1].
        bias: float[4 N].

    Returns:
        float[N, M, 1, 1] and float[N].
    """
    return weight.reshape(*weight.shape[:2], 1, 1)[::4, ::4] if weight.ndim in (2, 4) else weight, bias[::4]


def _rename_timm(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the tensors of timm's feature extractor, which writes dots of the whole network's names as underscores.

    What lies outside it is the classifier, or a stage that is not read, and has no place. A tensor inside one of its
    parts that it lacks belongs to another network, such as a deeper one, and keeps its name.
    """
    ours = {_plain(name): name for name in wanted}
    roots = {
        _plain(name.removeprefix("body.").partition(".")[0]) + "."
        for name in wanted
        if not name.startswith("body.model.")
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = _plain(name)
        if plain in ours or plain.startswith(tuple(roots)):
            renamed[ours.get(plain, name)] = tensor.float() if tensor.is_floating_point() else tensor
    return renamed


def _plain(name: str) -> str:
    return name.removeprefix("body.").removeprefix("model.").replace("_", ".")
