"""What a network costs and how far it sees, read from its layers alone: no weights, no picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from refinedet_cli.core.backbones import build_backbone
from refinedet_cli.core.build import build
from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.layers import L2Norm

_WIDEST = 1 << 15


def multiply_adds(config: DetectorConfig) -> int:
    """Count the multiplications of all convolutions for one picture at the config's input size.

    Returns:
        multiply-accumulate operations; those of norms, activations, decoding and suppression are not counted.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight: Any = layer.weight
        # A deconvolution uses each input once for each of its weights; a convolution makes each output from so many.
        places = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output
        total += math.prod(places.shape) * weight[0].numel()

    size = config.preprocess
    with torch.device("meta"), torch.inference_mode():
        network = build(config).network.eval()
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.register_forward_hook(count)
        network(torch.zeros(1, 3, size.height, size.width))
    return total


def receptive_fields(config: DetectorConfig) -> tuple[int, ...] | None:
    """Compute how wide a part of the input can change what the first head says of one cell, level by level.

    That head is the ARM's, which judges and moves the anchors; without an ARM it is the ODM's, of which the path
    through the backbone is taken. Padding and strides count as in the network; learned weights do not, so this is the
    theoretical field: most of what a trained cell listens to lies in its middle.

    Returns:
        px-in for each level, finest first; None for backbones of other packages, whose layers are not known.
    """
    if config.network.backbone.startswith("timm/"):
        return None
    with torch.device("meta"):  # without memory for weights, which play no part
        backbone: Any = _without_weights(build_backbone(config.network))
    width = 1024
    while width < _WIDEST:
        fields = _measure(backbone, width, max(config.require_anchors().strides))
        if max(fields) < width // 2:
            return fields
        width *= 2
    return None


def _measure(backbone: Callable[[Tensor], list[Tensor]], width: int, height: int) -> tuple[int, ...]:
    """Differentiate the middle cell of each level, and its neighbours under the 3x3 head, by the input."""
    image = torch.ones(1, 3, height, width, dtype=torch.float64, requires_grad=True)
    fields = []
    for features in backbone(image):
        middle = features.shape[3] // 2
        seen = features[0, :, :, middle - 1 : middle + 2].sum()
        (gradient,) = torch.autograd.grad(seen, image, retain_graph=True)
        columns = gradient[0].sum(dim=(0, 1)).nonzero()
        fields.append(int(columns.max() - columns.min()) + 1)
    return tuple(fields)


def _without_weights(module: Any) -> Any:
    """Put in the place of each layer one that passes on all that reaches it, so that no gradient is 0 by chance."""
    for name, child in list(module.named_children()):
        setattr(module, name, _stand_in(child))
    return module


def _stand_in(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return _Window(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if isinstance(layer, nn.MaxPool2d):
        return nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
    if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm, L2Norm, nn.ReLU, nn.ReLU6)):
        return nn.Identity()
    return _without_weights(layer)  # type: ignore[no-any-return]


class _Window(nn.Module):
    """The mean over all channels and over what a convolution looks at."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation

    def forward(self, features: Tensor) -> Tensor:
        """Map float64[B, C, H, W] to float64[B, 1, h, w] of the convolution's output size."""
        kernel = features.new_full((1, 1, *self.kernel), 1 / math.prod(self.kernel), device=features.device)
        mean = features.mean(dim=1, keepdim=True)
        return functional.conv2d(mean, kernel, None, self.stride, self.padding, self.dilation)
