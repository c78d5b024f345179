"""Feature extractors: a picture in, maps at strides 8, 16, 32 and 64 out; those of SSD300 go on to a single cell.

Every backbone has ``channels`` (of its maps) and ``stages`` (its layers cut where the resolution halves, so that
training can freeze from the input up), and returns the maps finest first.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v2, resnet18, resnet50, resnet101

from refinedet_cli.core.config import SSD_VGG, NetworkConfig
from refinedet_cli.core.layers import L2Norm, bottleneck, caffe_init, conv_relu, gaussian_init, stride_in_1x1
from refinedet_cli.errors import ConfigError


class Backbone(Protocol):
    """What a detector may ask of a backbone."""

    channels: tuple[int, ...]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to maps of as many cells as `map_sides` of the config counts."""

    def stages(self) -> list[nn.Module]:
        """Name the layers in order, cut where the resolution halves."""


class _VGGLayers(nn.Module):
    """What the two readings of VGG-16 share: its layers, fc6 and fc7 as convolutions, and the first extra one."""

    def __init__(self, fc6_dilation: int) -> None:
        super().__init__()
        self.conv1 = _vgg_block(3, 64, 2)
        self.conv2 = _vgg_block(64, 128, 2)
        self.conv3 = _vgg_block(128, 256, 3)
        self.conv4 = _vgg_block(256, 512, 3)
        self.conv5 = _vgg_block(512, 512, 3)
        self.fc6 = nn.Sequential(
            nn.Conv2d(512, 1024, 3, padding=fc6_dilation, dilation=fc6_dilation), nn.ReLU(inplace=True)
        )
        self.fc7 = conv_relu(1024, 1024, 1)
        self.conv6 = nn.Sequential(conv_relu(1024, 256, 1), conv_relu(256, 512, 3, stride=2))

    def stages(self) -> list[nn.Module]:
        """Name the five convolution blocks."""
        return [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5]


class VGG16(_VGGLayers):
    """VGG-16 with fc6 and fc7 as convolutions, and one extra level.

    Source: official RefineDet code; fc6 is dilated by 3 at stride 32 there. 320 and 512 are the same network.
    """

    channels = (512, 512, 1024, 512)

    def __init__(self, fc6_dilation: int = 3) -> None:
        super().__init__(fc6_dilation)
        self.norm4 = L2Norm(512, 10.0)
        self.norm5 = L2Norm(512, 8.0)
        self.pool = nn.MaxPool2d(2)
        caffe_init(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to the normalised conv4_3 and conv5_3, fc7 and conv6_2."""
        conv4 = self.conv4(self.pool(self.conv3(self.pool(self.conv2(self.pool(self.conv1(images)))))))
        conv5 = self.conv5(self.pool(conv4))
        fc7 = self.fc7(self.fc6(self.pool(conv5)))
        return [self.norm4(conv4), self.norm5(conv5), fc7, self.conv6(fc7)]


class SSDVGG16(_VGGLayers):
    """VGG-16 as SSD300 reads it: its last pooling keeps the resolution, and four extra levels end at a single cell.

    Source: SSD (arXiv:1512.02325), Sec. 3 and Fig. 2, and its official code: pool5 is 3x3 with stride 1, fc6 is dilated
    by 6, conv4_3 is normalised to length 20; Caffe's poolings cover the edge of an odd map (75 cells make 38).
    """

    channels = (512, 1024, 512, 256, 256, 256)

    def __init__(self, fc6_dilation: int = 6) -> None:
        super().__init__(fc6_dilation)
        self.conv7 = nn.Sequential(conv_relu(512, 128, 1), conv_relu(128, 256, 3, stride=2))
        self.conv8 = nn.Sequential(conv_relu(256, 128, 1), nn.Conv2d(128, 256, 3), nn.ReLU(inplace=True))
        self.conv9 = nn.Sequential(conv_relu(256, 128, 1), nn.Conv2d(128, 256, 3), nn.ReLU(inplace=True))
        self.norm4 = L2Norm(512, 20.0)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.pool5 = nn.MaxPool2d(3, stride=1, padding=1)
        caffe_init(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to the normalised conv4_3, fc7, and conv6_2 to conv9_2."""
        conv4 = self.conv4(self.pool(self.conv3(self.pool(self.conv2(self.pool(self.conv1(images)))))))
        maps = [self.norm4(conv4), self.fc7(self.fc6(self.pool5(self.conv5(self.pool(conv4)))))]
        for extra in (self.conv6, self.conv7, self.conv8, self.conv9):
            maps.append(extra(maps[-1]))
        return maps


def _vgg_block(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(conv_relu(inputs if i == 0 else outputs, outputs, 3) for i in range(depth)))


class MobileNetV2(nn.Module):
    """MobileNetV2, read at the widened maps of the blocks that halve the resolution, and one extra level.

    SSDLite reads the same maps.

    Source: MobileNetV2 (arXiv:1801.04381), torchvision's layers.
    """

    channels = (192, 576, 1280, 256)
    # Each of these inverted residuals opens with a 1x1 convolution that widens the map, before its stride.
    _taps = (7, 14)
    _cuts = (0, 2, 4, 7, 14, 19)

    def __init__(self) -> None:
        super().__init__()
        self.features = mobilenet_v2(weights=None).features
        _replace_strided_depthwise(self.features)
        self.extra = _extra_level(1280)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to maps of 192, 576, 1280 and 256 channels."""
        maps: list[Tensor] = []
        features = images
        for index, block in enumerate(self.features):
            if index in self._taps:
                widen, *rest = block.conv
                maps.append(widen(features))
                features = maps[-1]
                for layer in rest:
                    features = layer(features)
            else:
                features = block(features)
        return [*maps, features, self.extra(features)]

    def stages(self) -> list[nn.Module]:
        """Name the blocks by resolution: strides 2, 4, 8, 16, 32."""
        return [self.features[a:b] for a, b in zip(self._cuts[:-1], self._cuts[1:], strict=True)]


def _extra_level(inputs: int) -> nn.Sequential:
    """Halve the resolution once more, to 256 channels; group normalisation does not mind how small the map becomes."""
    layers = nn.Sequential(conv_relu(inputs, 128, 1, norm="group"), conv_relu(128, 256, 3, stride=2, norm="group"))
    caffe_init(layers)
    return layers


class StridedDepthwise(nn.Conv2d):
    """A depthwise convolution with a stride, trained in float32 on CPUs.

    The bf16 gradient of its input takes oneDNN 15 to 30 times as long there as the float32 one.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Convolve; the result has the dtype of the input even where it was computed in float32."""
        if features.device.type != "cpu" or not features.requires_grad:
            return super().forward(features)
        with torch.autocast("cpu", enabled=False):
            return super().forward(features.float()).to(features.dtype)


def _replace_strided_depthwise(features: nn.Module) -> None:
    for parent in list(features.modules()):
        for name, layer in parent.named_children():
            # Not what derives from a convolution: timm's pad in their own ways.
            if type(layer) is nn.Conv2d and 1 < layer.groups == layer.in_channels and layer.stride != (1, 1):
                strided = StridedDepthwise(
                    layer.in_channels,
                    layer.out_channels,
                    cast("tuple[int, int]", layer.kernel_size),
                    stride=cast("tuple[int, int]", layer.stride),
                    padding=cast("tuple[int, int]", layer.padding),
                    dilation=cast("tuple[int, int]", layer.dilation),
                    groups=layer.groups,
                    bias=layer.bias is not None,
                )
                strided.weight, strided.bias = layer.weight, layer.bias
                setattr(parent, name, strided)


class ResNet(nn.Module):
    """A ResNet with torchvision's layers and names, read at the end of its last three groups, and one extra bottleneck.

    The extra level of ResNet-18 is a bottleneck too: a block of its own kind would add 5 million parameters to 11, for
    a map of 5 x 5 cells.

    Source: official RefineDet code for ResNet-101, whose res3b3, res4b22, res5c and res6 are the four maps.
    """

    channels: tuple[int, int, int, int]

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        body = {"resnet18": resnet18, "resnet50": resnet50, "resnet101": resnet101}[config.backbone](weights=None)
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.pool = (
            nn.MaxPool2d(3, stride=2, ceil_mode=True)
            if config.stem_pool == "ceil"
            else nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        width = body.fc.in_features
        self.res6 = bottleneck(width, 128, stride=2)
        self.channels = (width // 4, width // 2, width, 512)
        if config.stride_in == "1x1":
            stride_in_1x1(self)
        gaussian_init(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to the outputs of layer2, layer3, layer4 and res6."""
        features = self.layer1(self.pool(functional.relu(self.bn1(self.conv1(images)))))
        maps: list[Tensor] = []
        for layer in (self.layer2, self.layer3, self.layer4, self.res6):
            features = layer(features)
            maps.append(features)
        return maps

    def stages(self) -> list[nn.Module]:
        """Name the stem and the four groups of blocks: strides 2, 4, 8, 16, 32."""
        return [nn.ModuleList([self.conv1, self.bn1]), self.layer1, self.layer2, self.layer3, self.layer4]


class Timm(nn.Module):
    """A network of the timm package, read at its last maps of strides 8, 16 and 32, and one extra level.

    Any network serves that gives feature maps at these strides whatever the size of the picture. Its weights are drawn,
    never fetched, and none of its layers is dropped at random.
    """

    channels: tuple[int, int, int, int]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body, self._maps = _timm_body(name)
        _replace_strided_depthwise(self.body)
        _keep_everything(self.body)
        watched = _watch(self.body, name)
        found = [watched.shapes[i] for i in self._maps]
        for stride, shape in zip(_TIMM_STRIDES, found, strict=True):
            sides = tuple(side // stride for side in _WATCHED_SIZE)
            if shape[2:] != sides:
                raise ConfigError(
                    f"network.backbone timm/{name}: of a picture of {_sides(_WATCHED_SIZE)} its map at stride {stride} "
                    f"is {_sides(shape[1:])}, not channels x {_sides(sides)}",
                    "choose a convolutional network",
                )
        self.extra = _extra_level(found[-1][1])
        self.channels = (found[0][1], found[1][1], found[2][1], 256)
        self._stages = watched.stages

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to the network's maps at strides 8, 16 and 32, and the extra one."""
        maps = self.body(images)
        chosen = [maps[i] for i in self._maps]
        return [*chosen, self.extra(chosen[-1])]

    def stages(self) -> list[nn.Module]:
        """Group the layers by the stride of what they give; a first layer of stride 4 leaves no stage at 2."""
        return [nn.ModuleList(self.body.get_submodule(name) for name in names) for names in self._stages]


def _keep_everything(body: nn.Module) -> None:
    """Switch off what drops activations or whole layers at random: one seed is to give one result, resumed or not."""
    module: Any
    for module in body.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):  # timm's DropPath, DropBlock2d and their like
            module.drop_prob = 0.0


_TIMM_STRIDES = (8, 16, 32)
_WATCHED_SIZE = (64, 128)


def _timm_body(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Build a feature extractor of timm, and tell which of its maps are the last of each stride wanted."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"network.backbone timm/{name}: the package timm cannot be imported ({error})",
            'pip install "refinedet[timm]"',
        ) from None
    # Asked first, because timm takes some names for addresses on the network.
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise ConfigError(
            f"network.backbone timm/{name}: timm {timm.__version__} has no network of this name",
            f"similar: {', '.join(near)}" if near else "timm.list_models() in Python lists all names",
        )
    try:
        body = timm.create_model(name, pretrained=False, features_only=True)
        strides = [int(s) for s in body.feature_info.reduction()]
    except Exception as error:  # whatever a network without feature maps happens to raise
        raise ConfigError(
            f"network.backbone timm/{name}: timm makes no feature extractor of it ({type(error).__name__}: {error})",
            "choose another network, such as timm/resnet34",
        ) from error
    missing = [s for s in _TIMM_STRIDES if s not in strides]
    if missing:
        raise ConfigError(
            f"network.backbone timm/{name}: no map at stride {_listed(missing)}; "
            f"there are maps at {_listed(sorted(set(strides)))}",
            f"choose a network with maps at strides {_listed(_TIMM_STRIDES)}",
        )
    return body, tuple(max(i for i, s in enumerate(strides) if s == wanted) for wanted in _TIMM_STRIDES)


class _Watched(NamedTuple):
    """What a network did to a picture of `_WATCHED_SIZE`.

    Attributes:
        shapes: of its maps.
        stages: names of the modules that hold its parameters, by the stride of what they gave, finest first.
    """

    shapes: list[tuple[int, ...]]
    stages: list[tuple[str, ...]]


def _watch(body: nn.Module, name: str) -> _Watched:
    strides: dict[str, tuple[int, int]] = {}

    def note(module: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and all(isinstance(t, Tensor) and t.ndim == 4 for t in (inputs[0], output)):
                before, after = (max(1, _WATCHED_SIZE[0] // t.shape[2]) for t in (inputs[0], output))
                strides.setdefault(module, (before, after))

        return hook

    hooks = [module.register_forward_hook(note(path)) for path, module in body.named_modules() if path]
    body.eval()
    try:
        with torch.no_grad():
            shapes = [tuple(m.shape) for m in body(torch.zeros(1, 3, *_WATCHED_SIZE))]
    except Exception as error:  # networks check the picture's size in ways of their own
        raise ConfigError(
            f"network.backbone timm/{name}: does not take a picture of {_sides(_WATCHED_SIZE)} "
            f"({type(error).__name__}: {error})",
            "choose a network that takes any multiple of 64",
        ) from error
    finally:
        body.train()
        for handle in hooks:
            handle.remove()
    stages: dict[int, list[str]] = {}
    stride = 1
    for path in _parts(body, "", strides):
        # What was not seen at work belongs to what came before it.
        stride = strides[path][1] if path in strides else stride
        stages.setdefault(stride, []).append(path)
    return _Watched(shapes, [tuple(stages[s]) for s in sorted(stages)])


def _parts(module: nn.Module, path: str, strides: dict[str, tuple[int, int]]) -> Iterator[str]:
    """Name the largest modules that halve the resolution once at most; together they hold every parameter once."""
    before, after = strides.get(path, (1, 64))
    children = dict(module.named_children())
    own = any(True for _ in module.parameters(recurse=False))
    if path and (own or not children or after <= 2 * before):
        if any(True for _ in module.parameters()):
            yield path
        return
    for name, child in children.items():
        yield from _parts(child, f"{path}.{name}" if path else name, strides)


def _sides(numbers: Iterable[int]) -> str:
    return " x ".join(map(str, numbers))


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# What makes or normalises the other maps, in any backbone.
_BEYOND_STRIDE_32 = ("norm4", "norm5", "conv6", "res6", "extra")


def keep_to_stride_32(backbone: Any) -> None:
    """Take out the layers that are idle where nothing but the third map, that at stride 32, is read."""
    for name in _BEYOND_STRIDE_32:
        if hasattr(backbone, name):
            setattr(backbone, name, nn.Identity())


def build_backbone(config: NetworkConfig) -> Backbone:
    """Build the backbone that a config names, with fresh weights.

    Raises:
        ConfigError: a network of timm is asked for, and timm is not installed, does not know it, or it has no maps at
            strides 8, 16 and 32.
    """
    if config.backbone.startswith("timm/"):
        return cast("Backbone", Timm(config.backbone.removeprefix("timm/")))
    if config.backbone.startswith("resnet"):
        return cast("Backbone", ResNet(config))
    if config.backbone == "mobilenet_v2":
        return cast("Backbone", MobileNetV2())
    return cast("Backbone", {"vgg16": VGG16, SSD_VGG: SSDVGG16}[config.backbone](config.fc6_dilation))
