"""Feature extractors: a picture in, maps at strides 8, 16, 32 and 64 out.

Every backbone has ``channels`` (of its four maps) and ``stages`` (its layers cut where the resolution halves, so that
training can freeze from the input up), and returns the maps finest first.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from refinedet_cli.core.config import NetworkConfig
from refinedet_cli.core.layers import L2Norm, caffe_init, conv_relu


class Backbone(Protocol):
    """What a detector may ask of a backbone."""

    channels: tuple[int, int, int, int]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W], H and W multiples of 64, to four maps at strides 8, 16, 32, 64."""

    def stages(self) -> list[nn.Module]:
        """Name the layers in order, cut where the resolution halves."""


class VGG16(nn.Module):
    """VGG-16 with fc6 and fc7 as convolutions, and one extra level.

    Source: official RefineDet code; fc6 is dilated by 3 at stride 32. 320 and 512 are the same network.
    """

    channels = (512, 512, 1024, 512)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _vgg_block(3, 64, 2)
        self.conv2 = _vgg_block(64, 128, 2)
        self.conv3 = _vgg_block(128, 256, 3)
        self.conv4 = _vgg_block(256, 512, 3)
        self.conv5 = _vgg_block(512, 512, 3)
        self.fc6 = nn.Sequential(nn.Conv2d(512, 1024, 3, padding=3, dilation=3), nn.ReLU(inplace=True))
        self.fc7 = conv_relu(1024, 1024, 1)
        self.conv6 = nn.Sequential(conv_relu(1024, 256, 1), conv_relu(256, 512, 3, stride=2))
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

    def stages(self) -> list[nn.Module]:
        """Name the five convolution blocks."""
        return [self.conv1, self.conv2, self.conv3, self.conv4, self.conv5]


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
        self.extra = nn.Sequential(
            conv_relu(1280, 128, 1, norm="group"), conv_relu(128, 256, 3, stride=2, norm="group")
        )
        caffe_init(self.extra)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map float[B, 3, H, W] to maps of 192, 576, 1280 and 256 channels."""
        maps: list[Tensor] = []
        features = images
        for index, block in enumerate(self.features):
            if index in self._taps:
                widen, rest = block.conv[0], block.conv[1:]
                maps.append(widen(features))
                features = rest(maps[-1])
            else:
                features = block(features)
        return [*maps, features, self.extra(features)]

    def stages(self) -> list[nn.Module]:
        """Name the blocks by resolution: strides 2, 4, 8, 16, 32."""
        return [self.features[a:b] for a, b in zip(self._cuts[:-1], self._cuts[1:], strict=True)]


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
            if isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.stride != (1, 1):
                strided = StridedDepthwise(
                    layer.in_channels, layer.out_channels, 3, stride=2, padding=1, groups=layer.groups, bias=False
                )
                strided.weight = layer.weight
                setattr(parent, name, strided)


def build_backbone(config: NetworkConfig) -> Backbone:
    """Build the backbone that a config names, with fresh weights."""
    return cast("Backbone", {"vgg16": VGG16, "mobilenet_v2": MobileNetV2}[config.backbone]())
