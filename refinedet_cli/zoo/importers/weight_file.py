"""A file of someone else's weights as a dictionary of tensors, whatever wrote it; nothing in it is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refinedet_cli.errors import CheckpointError
from refinedet_cli.files import require_file
from refinedet_cli.zoo.caffemodel import CaffeLayer, CaffeNet, read_caffemodel
from refinedet_cli.zoo.checkpoint import FORMAT, file_sha256
from refinedet_cli.zoo.torch_file import ARCHIVE, PICKLE, UnreadableFileError, is_plain, load_torch_file

_LARGEST = 4 << 30
_HDF5 = b"\x89HDF"
_GET_AGAIN = "get the file again"
# Where training scripts put the weights among other things; the first that is there is taken.
_PLACES = ("state_dict", "model_state_dict", "model", "net", "weights")
# What DataParallel puts before every name.
_PARALLEL = "module."


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a file holds.

    Attributes:
        path: the file.
        kind: what wrote it, for people.
        tensors: by name, on the CPU, unchanged. Those of Caffe have names as in PyTorch: ``LAYER.weight``.
        network: the name that the network has in the file; empty where it has none.
        notes: what was done to get at the tensors.
        sha256: of the file.
    """

    path: Path
    kind: str
    tensors: Mapping[str, Tensor]
    network: str
    notes: tuple[str, ...]
    sha256: str


def read_weight_file(path: Path) -> WeightFile:
    """Read a PyTorch file, safetensors, or a caffemodel; its content tells which, not its name.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds something else. Weights of this tool itself
            are refused too: they need no import.
    """
    require_file(path, "name a .pth, .safetensors or .caffemodel file")
    if path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path}: larger than any detector, {path.stat().st_size / 1e9:.1f} GB")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith((ARCHIVE, PICKLE)):
        tensors, notes = _state_dict(path, load_torch_file(path))
        kind, network = "PyTorch", ""
    elif start[8:9] == b"{":
        tensors, notes = _safetensors(path), ()
        kind, network = "safetensors", ""
    else:
        net = _caffe(path, start)
        tensors, notes = _caffe_tensors(path, net), ()
        kind, network = "Caffe", net.name
    tensors, parallel = _without_parallel(tensors)
    return WeightFile(
        path=path, kind=kind, tensors=tensors, network=network, notes=(*notes, *parallel), sha256=file_sha256(path)
    )


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                raise CheckpointError(f"{path}: weights of this tool, which need no import", "give them to --weights")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UnreadableFileError(f"{path}: cannot be read ({error})", _GET_AGAIN) from None


def _state_dict(path: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Find the tensors in what a PyTorch file holds: it may be a state dict, or have one among other things."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, no state dict", "save the state dict alone")
    if _is_state(content):
        return _plain(path, content), ()
    inner = {str(name): value for name, value in content.items() if isinstance(value, dict) and _is_state(value)}
    place = next((name for name in (*_PLACES, *inner) if name in inner), None)
    if place is None:
        held = ", ".join(repr(name)[:40] for name in list(content)[:5]) or "nothing"
        raise CheckpointError(f"{path}: no state dict in it; it holds {held}", "save the state dict alone")
    others = sorted(inner.keys() - {place})
    beside = f", and not from {', '.join(map(repr, others))}" if others else ""
    return _plain(path, inner[place]), (f"taken from {place!r} in the file{beside}",)


def _is_state(content: dict[Any, Any]) -> bool:
    return bool(content) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items())


def _plain(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    odd = next((name for name, tensor in tensors.items() if not is_plain(tensor)), None)
    if odd is not None:
        raise UnreadableFileError(f"{path}: tensor {odd[:80]!r} is not in the file as an ordinary array", _GET_AGAIN)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _without_parallel(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    if not tensors or not all(name.startswith(_PARALLEL) for name in tensors):
        return tensors, ()
    return {n.removeprefix(_PARALLEL): t for n, t in tensors.items()}, (f"{_PARALLEL!r} before every name is left out",)


def _caffe(path: Path, start: bytes) -> CaffeNet:
    cure = "expected is a .pth of torch.save, a .safetensors or a .caffemodel"
    if start.startswith(_HDF5):
        raise CheckpointError(f"{path}: an HDF5 file, which is not read", "have Caffe save it as BINARYPROTO")
    try:
        net = read_caffemodel(path)
    except CheckpointError:
        if path.suffix == ".caffemodel":
            raise
        raise CheckpointError(
            f"{path}: no kind of file that is known: it begins with {start[:8].hex(' ')}", cure
        ) from None
    if not net.layers:
        raise CheckpointError(f"{path}: no weights in it", cure)
    return net


def _caffe_tensors(path: Path, net: CaffeNet) -> dict[str, Tensor]:
    """Name blobs as PyTorch would: batch normalisation, and the scale that follows it in Caffe, become one layer."""
    layers = {layer.name: layer for layer in net.layers}
    if len(layers) < len(net.layers):
        raise CheckpointError(f"{path}: two layers have the same name", _GET_AGAIN)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if _is_norm(layer):
            tensors |= _norm_statistics(layer)
            continue
        # A scale goes where its normalisation is.
        norm = _norm_of(name)
        target = norm if norm in layers else name
        for kind, blob in zip(("weight", "bias", *map(str, range(2, len(layer.blobs)))), layer.blobs, strict=False):
            tensors[f"{target}.{kind}"] = torch.from_numpy(blob)
    return tensors


def _is_norm(layer: CaffeLayer) -> bool:
    return (layer.name.startswith("bn") or layer.name.endswith("_bn")) and [b.size for b in layer.blobs[2:]] == [1]


def _norm_of(name: str) -> str:
    """Name the normalisation that a scale belongs to; the name itself if it is none."""
    if name.startswith("scale"):
        return f"bn{name.removeprefix('scale')}"
    return f"{name.removesuffix('_scale')}_bn" if name.endswith("_scale") else name


def _norm_statistics(layer: CaffeLayer) -> dict[str, Tensor]:
    """Divide the sums that Caffe keeps by their weight, as it does where it uses them."""
    mean, variance, weight = (torch.from_numpy(blob) for blob in layer.blobs)
    factor = 1 / float(weight.flatten()[0]) if float(weight.flatten()[0]) else 0.0
    return {f"{layer.name}.running_mean": mean * factor, f"{layer.name}.running_var": variance * factor}
