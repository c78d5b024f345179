"""ImageNet weights for a backbone: where they are, what they hold, and which input they were made for."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from refinedet_cli.core.config import PreprocessConfig
from refinedet_cli.core.presets import torchvision_preprocess
from refinedet_cli.errors import CheckpointError
from refinedet_cli.files import require_file
from refinedet_cli.zoo.backbone_layouts import LAYOUTS, TIMM, find_layout, rename
from refinedet_cli.zoo.checkpoint import file_sha256
from refinedet_cli.zoo.hub import HubFile, fetch, fetch_optional, parse_hub_name
from refinedet_cli.zoo.torch_file import UnreadableFileError
from refinedet_cli.zoo.warm_start import read_tensors

IMAGENET = "imagenet"
HUB_FILE = "model.safetensors"
# What "imagenet" stands for. The ResNets are torchvision's first ones: trained plainly, and what published detectors
# start from. Later recipes give better classifiers, which are not reliably better to start a detector from.
PUBLISHED: dict[str, str] = {
    "vgg16": "timm/vgg16.tv_in1k",
    "vgg16_ssd": "timm/vgg16.tv_in1k",
    "resnet18": "timm/resnet18.tv_in1k",
    "resnet50": "timm/resnet50.tv_in1k",
    "resnet101": "timm/resnet101.tv_in1k",
    "mobilenet_v2": "timm/mobilenetv2_100.ra_in1k",
}
_EXPECTED: dict[str, str] = {
    "vgg16": "a VGG-16 of torchvision or timm, or vgg16_reducedfc",
    "vgg16_ssd": "a VGG-16 of torchvision or timm, or vgg16_reducedfc",
    "resnet18": "a ResNet-18 of torchvision or timm",
    "resnet50": "a ResNet-50 of torchvision or timm",
    "resnet101": "a ResNet-101 of torchvision or timm",
    "mobilenet_v2": "a MobileNetV2 of torchvision, or timm's mobilenetv2_100",
}
_FILE_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar"}

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class BackboneFile:
    """ImageNet weights on this disk, recognised but not yet loaded.

    Attributes:
        path: safetensors, or a PyTorch file of tensors.
        backbone: the backbone they are for, as `NetworkConfig` names it.
        layout: how the tensors are named, one of `LAYOUTS`.
        tensors: how many there are.
        mean, std: of the input they were made for, RGB, on the 0..255 scale.
        channel_order: of that input.
        origin: where they came from, for people.
        sha256: of the file.
        repo, commit: where they are on the Hub; None for a local file.
    """

    path: Path
    backbone: str
    layout: str
    tensors: int
    mean: Triple
    std: Triple
    channel_order: Literal["rgb", "bgr"]
    origin: str
    sha256: str
    repo: str | None = None
    commit: str | None = None


def find_backbone_weights(name: str, backbone: str) -> BackboneFile:
    """Find ImageNet weights and recognise them.

    Args:
        name: a path, "imagenet" for the published weights of the backbone, or ``org/repo[@revision][:file]`` on the
            Hugging Face Hub. What is on the disk wins, and what the Hub's cache has is not asked for again.
        backbone: what they are for, as `NetworkConfig` names it.

    Returns:
        `BackboneFile`, whose layout this backbone can load.

    Raises:
        CheckpointError: there is no such file, it cannot be had, or it holds something else.
    """
    path = Path(name)
    if path.is_file():
        return _describe(path, None, backbone)
    hub = _fetch(name, backbone)
    try:
        return _describe(hub.path, hub, backbone)
    except UnreadableFileError as error:
        # The cache keeps the content under another name.
        cure = f"delete {hub.path.resolve()}, then it is downloaded again"
        raise CheckpointError(error.message, cure) from None


def load_backbone(network: nn.Module, file: BackboneFile) -> int:
    """Load ImageNet weights into a detector's backbone.

    Args:
        network: the detector's; it stays as it was if the weights do not fit.
        file: what `find_backbone_weights` found.

    Returns:
        The number of tensors loaded: everything that the backbone shares with an ImageNet classifier, but for the
        counters of batch normalisation that a file may lack.

    Raises:
        CheckpointError: the file cannot be read safely, lacks a tensor, has one of another shape, one that is not
            finite, or one that the backbone has no place for.
    """
    state = network.get_submodule("backbone").state_dict()
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(LAYOUTS[file.layout].parts)}
    tensors = read_tensors(file.path)
    given = rename(file.layout, tensors, wanted)
    fault = _fault(given, wanted)
    if fault is not None:
        raise _misfit(file.path, list(tensors), file.backbone, fault)
    with torch.no_grad():
        for name, tensor in given.items():
            state[name].copy_(tensor)
    return len(given)


def _fetch(name: str, backbone: str) -> HubFile:
    if name == IMAGENET:
        return fetch(_published(backbone), HUB_FILE)
    path = Path(name)
    if path.is_dir():
        raise CheckpointError(f"backbone weights {name!r}: this is a folder", "name the file in it")
    place = parse_hub_name(name)
    # The path of a file that is not there looks like a name on the Hub; a slip of the pen must not reach the network.
    if place is None or (place.file is None and path.suffix in _FILE_SUFFIXES):
        raise CheckpointError(
            f"backbone weights {name!r}: there is no such file",
            "name a file, imagenet, or a place on the Hugging Face Hub: org/repo, org/repo@revision, org/repo:file",
        )
    return fetch(place.repo, place.file or HUB_FILE, place.revision)


def _published(backbone: str) -> str:
    """Name the repository that "imagenet" means; of a network of timm it is what timm itself would take."""
    if not backbone.startswith(TIMM):
        return PUBLISHED[backbone]
    config = _timm_config(backbone)
    if config is None or not config.hf_hub_id:
        raise CheckpointError(
            f"backbone weights {IMAGENET!r}: timm publishes none of {backbone!r}", "name others, or --weights none"
        )
    return str(config.hf_hub_id)


def _timm_config(backbone: str) -> Any:
    """Ask timm what it knows of its weights of this name, or of its first choice; None if it has none."""
    try:
        models: Any = importlib.import_module("timm.models")
    except ImportError as error:
        raise CheckpointError(
            f"backbone {backbone!r}: the package timm cannot be imported ({error})", 'pip install "refinedet[timm]"'
        ) from None
    try:
        return models.get_pretrained_cfg(backbone.removeprefix(TIMM))
    except RuntimeError:  # no such network, or no such weights of it
        return None


def _describe(path: Path, hub: HubFile | None, backbone: str) -> BackboneFile:
    names = _names(path)
    layout = _layout(path, names, backbone)
    # vgg16_reducedfc is converted from a Caffe file, and Caffe reads BGR; its authors never said.
    caffe = PreprocessConfig(channel_order="bgr") if layout == "vgg16_reducedfc" else None
    mean, std = _normalisation(path, hub, backbone) if caffe is None else (caffe.mean, caffe.std)
    return BackboneFile(
        path=path,
        backbone=backbone,
        layout=layout,
        tensors=len(names),
        mean=mean,
        std=std,
        channel_order="rgb" if caffe is None else caffe.channel_order,
        origin=str(path) if hub is None else f"{hub.repo} at {hub.commit[:8]}, {hub.file}",
        sha256=file_sha256(path),
        repo=None if hub is None else hub.repo,
        commit=None if hub is None else hub.commit,
    )


def _names(path: Path) -> list[str]:
    """List the tensors; only PyTorch files have to be read whole for it."""
    require_file(path, "name another")
    if path.suffix != ".safetensors":
        return list(read_tensors(path))
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UnreadableFileError(f"{path}: cannot be read ({error})", "get the file again") from None


def _layout(path: Path, names: list[str], backbone: str) -> str:
    layout = find_layout(set(names), backbone)
    if backbone.startswith("vgg16") and "features.1.running_mean" in names:
        raise _misfit(path, names, backbone, "a VGG with batch normalisation, which this one does not have")
    if layout is None:
        raise _misfit(path, names, backbone, "its tensors have other names")
    return layout


def _misfit(path: Path, names: list[str], backbone: str, fault: str) -> CheckpointError:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return CheckpointError(
        f"{path}: not the weights of this backbone ({backbone}): {fault}; "
        f"tensors in the file: {len(names)}{f' ({shown})' if names else ''}",
        f"expected is {_EXPECTED.get(backbone, f'what timm publishes of {backbone.removeprefix(TIMM)}')}; "
        "--backbone-weights imagenet fetches it",
    )


def _fault(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """Say in what the weights differ from what fills the backbone; None if they fill it."""
    odd = [n for n, t in given.items() if n in wanted and t.shape != wanted[n].shape]
    if odd:
        has, wants = (" x ".join(map(str, t.shape)) or "a number" for t in (given[odd[0]], wanted[odd[0]]))
        return f"tensors of another shape: {len(odd)}, such as {odd[0]}, {has} instead of {wants}"
    missing = [n for n in wanted if n not in given and not n.endswith(".num_batches_tracked")]
    if missing:
        return f"tensors missing: {len(missing)} of {len(wanted)}, such as {missing[0]}"
    surplus = [n for n in given if n not in wanted]
    if surplus:
        return f"tensors without a place in it: {len(surplus)}, such as {surplus[0]}"
    unusable = [n for n, t in given.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    return f"{unusable[0]} is not finite" if unusable else None


def _normalisation(path: Path, hub: HubFile | None, backbone: str) -> tuple[Triple, Triple]:
    """Find out what input the weights were made for: by their config.json, by timm, else it is ImageNet's."""
    config = path.with_name("config.json")
    if hub is not None:
        found = fetch_optional(hub.repo, "config.json", hub.commit)
        stated = None if found is None else _stated(found.path)
    else:
        # As a repository lies in a folder; the config.json of a run says nothing of this kind.
        stated = _stated(config) if path.name == HUB_FILE and config.is_file() else None
    if stated is not None:
        return stated
    known = _timm_config(backbone) if backbone.startswith(TIMM) else None
    if known is not None:
        return _scaled(known.mean), _scaled(known.std)
    imagenet = torchvision_preprocess()
    return imagenet.mean, imagenet.std


def _stated(path: Path) -> tuple[Triple, Triple] | None:
    """Read mean and std out of a timm repository's config.json; None if it has neither."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.get("pretrained_cfg", {})
        if "mean" not in stated and "std" not in stated:
            return None
        mean, std = _scaled(stated["mean"]), _scaled(stated["std"])
        if min(std) <= 0:
            raise ValueError("std must be positive")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot read mean and std of pretrained_cfg ({error!r})",
            "name the weights by the path of a copy, and set preprocess.mean and preprocess.std",
        ) from None
    return mean, std


def _scaled(values: Any) -> Triple:
    """Bring three values from the 0..1 scale to 0..255."""
    red, green, blue = (round(float(value) * 255, 6) for value in values)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError("not finite")
    return red, green, blue
