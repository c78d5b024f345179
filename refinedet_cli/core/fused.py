"""A copy of a network that can only predict, and computes the same in less time.

Batch normalisation becomes part of the convolution before it. On CPUs whose torch has oneDNN, ReLU and ReLU6 become
part of the convolution too, which saves a pass over the memory each, and weights are laid out once as oneDNN wants them
instead of at every call. In bf16 the weights are converted once.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from refinedet_cli.core.layers import L2Norm


class _Activation(NamedTuple):
    """How oneDNN calls an activation."""

    name: str
    arguments: tuple[float, ...] = ()


# What a layer may read and write at a time on a CPU. Allocators fetch larger maps from the system and give them back at
# every use, which takes longer than small batches do.
_MOST_BYTES = 32 * 2**20
_NONE = _Activation("none")
_RELU = _Activation("relu")
_ACTIVATIONS = {nn.ReLU: _RELU, nn.ReLU6: _Activation("hardtanh", (0.0, 6.0))}


class FusedNetwork(nn.Module):
    """A network that was prepared for prediction on one device, in one precision.

    Args:
        network: any; it is copied and stays as it is.
        device: where to compute.
        bf16: compute in bfloat16, and so return it; else in float32. Where torch has no fused operators for it, and for
            a network that torch cannot trace, this is autocast.
        input_size: height and width of the usual input; others are computed alike, and a little slower.
        fuse: whether layers may become one, and so round differently.

    Attributes:
        suits_lanes: whether pictures computed side by side, each on a core of its own, leave one another room in the
            processor's cache; else all cores share a picture sooner.
    """

    def __init__(
        self, network: nn.Module, *, device: torch.device, bf16: bool, input_size: tuple[int, int], fuse: bool = True
    ) -> None:
        super().__init__()
        # Frozen first: the copy of a parameter that learns would need a gradient again.
        own = copy.deepcopy(network).eval().requires_grad_(False).to(device=device)
        own.to(memory_format=torch.channels_last)
        dtype = torch.bfloat16 if bf16 else torch.float32
        fuses = device.type == "cpu" and _has_fused_convolution(dtype)
        # A folded bias is as large as what it is to be subtracted from: in bf16 it would cost accuracy.
        traced = _trace(own) if fuse and (fuses or not bf16) else None
        if traced is not None:
            _fold_normalisation(traced)
            if fuses:
                _fuse_activations(traced, dtype)
            _convert(traced, dtype)
        self._network = own if traced is None else traced
        self._dtype = torch.float32 if traced is None else dtype
        self._autocast = bf16 and traced is None
        # The first pass lays weights out for this size, whatever sizes and batches come.
        with torch.inference_mode():
            self(torch.zeros(1, 3, *input_size, device=device))
        largest = max((m.map_bytes for m in self.modules() if isinstance(m, _FusedConvolution)), default=0)
        self._bytes_per_pixel = largest / math.prod(input_size)
        self.suits_lanes = 2 * largest <= _MOST_BYTES

    def forward(self, images: Tensor) -> Any:
        """Map float32[B, 3, H, W] to what the network returns for it.

        The result is that of the network in evaluation mode up to rounding: to 1e-5 of logits in float32.
        """
        images = images.to(self._dtype).contiguous(memory_format=torch.channels_last)
        if self._autocast:
            with torch.autocast(images.device.type, dtype=torch.bfloat16):
                return self._network(images)
        return self._network(images)

    def parts(self, images: Tensor, *, lanes: int = 1) -> tuple[Tensor, ...]:
        """Cut a batch of at least one picture into such as take no longer one after the other than all together.

        Args:
            images: float32[B, 3, H, W].
            lanes: parts that are computed at a time; each gets as many, if there are enough pictures.

        Returns:
            Equal parts, up to one picture, in order.
        """
        largest = self._bytes_per_pixel * math.prod(images.shape[2:])
        most = max(1, int(_MOST_BYTES / largest)) if largest else len(images)
        rounds = math.ceil(len(images) / (most * lanes))
        parts: tuple[Tensor, ...] = images.tensor_split(min(len(images), rounds * lanes))
        return parts


class _Tracer(fx.Tracer):
    """Looks into everything but single layers, ours included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def _trace(network: nn.Module) -> fx.GraphModule | None:
    """Record what a network computes; None where it depends on values, which cannot be recorded."""
    tracer = _Tracer()
    try:
        return fx.GraphModule(network, tracer.trace(network))
    except Exception:  # whatever a network of another package does with a stand-in for a tensor
        return None


def _fold_normalisation(traced: fx.GraphModule) -> None:
    """Make batch normalisation part of the convolution before it, where nothing else reads that."""
    for node, conv in _convolutions(traced):
        (user,) = node.users if len(node.users) == 1 else (None,)
        norm = _module(traced, user)
        if user is None or type(norm) is not nn.BatchNorm2d:
            continue
        _replace(traced, node, fuse_conv_bn_eval(conv, norm))
        _drop(user, node)
    traced.recompile()


def _fuse_activations(traced: fx.GraphModule, dtype: torch.dtype) -> None:
    """Replace convolutions by ones that apply the activation after them, where nothing else reads what is before it."""
    for node, conv in _convolutions(traced):
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        (user,) = node.users if len(node.users) == 1 else (None,)
        activation = _activation(traced, user)
        _replace(traced, node, _FusedConvolution(conv, activation or _NONE, dtype))
        if user is not None and activation is not None:
            _drop(user, node)
    traced.recompile()


def _convolutions(traced: fx.GraphModule) -> list[tuple[fx.Node, nn.Conv2d]]:
    """List the convolutions that are computed exactly once."""
    nodes = [node for node in traced.graph.nodes if isinstance(_module(traced, node), nn.Conv2d)]
    calls: dict[nn.Module | None, int] = {}
    for node in nodes:
        calls[_module(traced, node)] = calls.get(_module(traced, node), 0) + 1
    found = []
    for node in nodes:
        conv = _module(traced, node)
        if isinstance(conv, nn.Conv2d) and calls[conv] == 1:
            found.append((node, conv))
    return found


def _module(traced: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def _activation(traced: fx.GraphModule, node: fx.Node | None) -> _Activation | None:
    if node is not None and node.op == "call_function" and node.target in (functional.relu, torch.relu):
        return _RELU
    module = _module(traced, node)
    return None if module is None else _ACTIVATIONS.get(type(module))


def _replace(traced: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    parent, _, name = str(node.target).rpartition(".")
    setattr(traced.get_submodule(parent), name, module)


def _drop(node: fx.Node, before: fx.Node) -> None:
    node.replace_all_uses_with(before)
    node.graph.erase_node(node)


def _convert(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert weights, but not those of normalisation, which computes in float32, as under autocast."""
    for module in network.modules():
        if not isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm, L2Norm)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


class _FusedConvolution(nn.Module):
    """A convolution on the CPU with the activation that follows it, its weights in oneDNN's own layout.

    The bias stays float32 whatever the weights are.

    Attributes:
        map_bytes: what it reads and writes for one picture of the first call; 0 before.
    """

    def __init__(self, conv: nn.Conv2d, activation: _Activation, dtype: torch.dtype) -> None:
        super().__init__()
        self._shape = ([*map(int, conv.padding)], [*conv.stride], [*conv.dilation], conv.groups)
        self._activation = activation
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._weight = conv.weight.detach().to(dtype)
        self.map_bytes = 0

    def forward(self, features: Tensor) -> Tensor:
        is_first = not self.map_bytes
        if is_first:
            # Which layout is best depends on the size of the map.
            self._weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                self._weight.to_mkldnn(), *self._shape, [*features.shape]
            )
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            features, self._weight, self._bias, *self._shape, self._activation.name, [*self._activation.arguments], ""
        )
        if is_first:
            self.map_bytes = (features.nbytes + result.nbytes) // len(result)
        return result


@lru_cache
def _has_fused_convolution(dtype: torch.dtype) -> bool:
    """Tell whether this torch, on this CPU, has the operators of `_FusedConvolution`; they are not public."""
    try:
        with torch.inference_mode():
            for activation in (_NONE, *_ACTIVATIONS.values()):
                _FusedConvolution(nn.Conv2d(4, 4, 1), activation, dtype)(torch.zeros(1, 4, 2, 2, dtype=dtype))
    except (AttributeError, RuntimeError, TypeError):  # not there, not for this CPU, or with other arguments
        return False
    return True
