"""Building blocks that more than one network uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck

Norm = Literal["none", "batch", "group"]
GROUP_SIZE = 16
# What weights are multiplied by that are to predict next to nothing, and can still learn at once.
_DAMPING = 0.1


class L2Norm(nn.Module):
    """Scale each position's feature vector to unit length, then each channel by a learned factor.

    Source: ParseNet (arXiv:1506.04579), as in SSD; epsilon inside the root as in the official code, so that the
    gradient is finite where all channels are 0.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise float[B, channels, h, w] at every position; computed in float32."""
        length = features.float().square().sum(dim=1, keepdim=True).add(1e-10).rsqrt()
        return (features * length * self.weight[:, None, None]).to(features.dtype)


def caffe_init(module: nn.Module) -> None:
    """Draw convolutions from Caffe's "xavier" (uniform, variance 1 / fan-in, unlike torch's) and set biases to 0.

    Source: weight fillers of the official code. For a deconvolution Caffe takes outputs x kernel area as the fan-in.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            bound = math.sqrt(3 / layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def gaussian_init(module: nn.Module) -> None:
    """Draw convolutions from a normal distribution of standard deviation 0.01 and set biases to 0.

    Only fit for convolutions that batch normalisation follows: it undoes the scale, which is the same at any fan-in.

    Source: weight fillers of the official ResNet networks.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """Build the normalisation layer that follows a convolution."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(channels // GROUP_SIZE, channels)
    return nn.Identity()


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, norm: Norm = "none") -> list[nn.Module]:
    """Build a "same" convolution and its normalisation; the convolution has a bias only without normalisation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
    ]
    if norm != "none":
        layers.append(make_norm(norm, outputs))
    return layers


def conv_relu(inputs: int, outputs: int, kernel: int, *, stride: int = 1, norm: Norm = "none") -> nn.Sequential:
    """Build convolution, normalisation and ReLU."""
    return nn.Sequential(*conv(inputs, outputs, kernel, stride=stride, norm=norm), nn.ReLU(inplace=True))


def bottleneck(inputs: int, width: int, *, stride: int = 1) -> Bottleneck:
    """Build a ResNet bottleneck with a projection: 1x1 and 3x3 to ``width``, 1x1 to four times that, sum, ReLU.

    Every convolution is batch normalised; the stride is in the 3x3 (see `stride_in_1x1`) and in the projection.
    """
    outputs = width * Bottleneck.expansion
    projection = nn.Sequential(*conv(inputs, outputs, 1, stride=stride, norm="batch"))
    return Bottleneck(inputs, width, stride, projection)


def stride_in_1x1(module: nn.Module) -> None:
    """Move the stride of every bottleneck from its 3x3 convolution to its first 1x1, where ResNet had it at first.

    Source: ResNet (arXiv:1512.03385); torchvision's place is the later one.
    """
    for block in module.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


class TransferConnectionBlock(nn.Module):
    """Turn an anchor refinement feature map into a detection feature map, adding what the coarser level knows.

    Source: RefineDet (arXiv:1711.06897), Sec. 3, transfer connection block. Differs from the figure, as the official
    code does: the deconvolution is 2x2 with stride 2, and the coarsest block is three convolutions with ReLU. Other
    implementations have a 3x3 deconvolution (``up``), or the last two of the three without ReLU (``top``).
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        coarser: bool,
        norm: Norm,
        up: Literal["2x2", "3x3"] = "2x2",
        top: Literal["relu", "linear"] = "relu",
    ) -> None:
        super().__init__()
        kernel, padding = (2, 0) if up == "2x2" else (3, 1)
        self.first = conv_relu(inputs, channels, 3, norm=norm)
        self.second = nn.Sequential(*conv(channels, channels, 3, norm=norm))
        self.up = (
            nn.Sequential(
                nn.ConvTranspose2d(
                    channels,
                    channels,
                    kernel,
                    stride=2,
                    padding=padding,
                    output_padding=padding,  # so that either doubles the resolution
                    bias=norm == "none",
                ),
                make_norm(norm, channels),
            )
            if coarser
            else None
        )
        self.linear = not coarser and top == "linear"
        self.last = nn.Sequential(
            *conv(channels, channels, 3, norm=norm), nn.Identity() if self.linear else nn.ReLU(inplace=True)
        )

    def forward(self, features: Tensor, coarser: Tensor | None) -> Tensor:
        """Map float[B, inputs, h, w] and the coarser float[B, channels, h/2, w/2] to float[B, channels, h, w]."""
        lateral = self.second(self.first(features))
        if self.up is not None:
            lateral = lateral + self.up(coarser)
        return self.last(lateral if self.linear else functional.relu(lateral))  # type: ignore[no-any-return]


class AnchorHead(nn.Module):
    """One 3x3 convolution per level that predicts class logits and box offsets for each anchor of each cell.

    Both come from one convolution, since two of few outputs cost nearly twice as much; the channels of an anchor are
    its ``classes`` logits, then its 4 offsets.
    """

    def __init__(self, inputs: Sequence[int], anchors: Sequence[int], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.levels = nn.ModuleList(
            nn.Conv2d(i, a * (classes + 4), 3, padding=1) for i, a in zip(inputs, anchors, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map level features float[B, inputs, h, w] to logits float[B, A, classes] and offsets float[B, A, 4].

        Anchors are ordered as `tile_anchors` orders them.
        """
        flat = [
            level(features).permute(0, 2, 3, 1).reshape(features.shape[0], -1, self.classes + 4)
            for level, features in zip(self.levels, maps, strict=True)
        ]
        logits, offsets = torch.cat(flat, dim=1).split([self.classes, 4], dim=-1)
        return logits, offsets

    def begin_at_prior(self, negatives: float) -> None:
        """Make fresh weights predict next to nothing: anchors hardly move, and most are background.

        As drawn from Caffe's "xavier", weights make logits and offsets as large as the features, and the loss of these
        disturbs a pretrained backbone at first.

        Args:
            negatives: mined for each positive; background begins as likely as it is among these anchors, and the
                classes are alike.

        Source: the prior of focal loss (arXiv:1708.02002, Sec. 4.1), here for mined negatives.
        """
        with torch.no_grad():
            for level in self.levels:
                level.weight.mul_(_DAMPING)  # type: ignore[operator]
                # Without negatives classes stand alone.
                level.bias.view(-1, self.classes + 4)[:, 0] = math.log(max(negatives, 1.0) * (self.classes - 1))  # type: ignore[operator]


class ArmReader(nn.Module):
    """Tell the ODM how the ARM has judged and moved each anchor: a linear map, the same for all anchors.

    The ODM's features belong to the cell of an anchor and do not show where the ARM has moved it; the way that is left
    from there to the object has to be guessed without. Not in the paper. It starts as 0, which changes nothing, and no
    gradient flows into the ARM.
    """

    # A weight that starts as 0 takes Adam as many steps as the rate goes into it; this many times fewer.
    _PACE = 10.0

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.zeros(classes + 4, 2 + 4))

    def forward(self, arm_logits: Tensor, arm_offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Map float[B, A, 2] and float[B, A, 4] to what is added to the ODM's, float[B, A, classes] and [B, A, 4]."""
        outputs = torch.cat([arm_logits, arm_offsets], dim=-1).detach()
        logits, offsets = functional.linear(outputs, self._PACE * self.weight).split([self.classes, 4], dim=-1)
        return logits, offsets
