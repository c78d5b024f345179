"""Start a network from the weights of one with another class list, and read files of tensors with care."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.layers import AnchorHead, ArmReader
from refinedet_cli.errors import CheckpointError
from refinedet_cli.files import require_file
from refinedet_cli.zoo.torch_file import UnreadableFileError, load_torch_file

Shapes = Sequence[tuple[float, float]]


class Nearest(NamedTuple):
    """The anchor of some others that is most like one.

    Attributes:
        place: of the other, in its level.
        iou: of the two shapes, laid on one centre.
    """

    place: int
    iou: float


@dataclass(frozen=True)
class WarmStart:
    """What a network took over, by the names of its tensors.

    Attributes:
        copied: taken as they were.
        remapped: outputs taken row by row, as classes and anchors ask for it.
        fresh: left at their random start, because there was nothing of their shape, or of their meaning.
        class_outputs: whether outputs that stand for classes are among the first two.
        anchors: per level and anchor, the old one whose outputs it begins with; empty where all anchors are the same,
            or none were asked for.
    """

    copied: tuple[str, ...]
    remapped: tuple[str, ...]
    fresh: tuple[str, ...]
    class_outputs: bool
    anchors: tuple[tuple[Nearest, ...], ...]


class _Head(NamedTuple):
    """How the outputs of a layer are ordered: anchor by anchor, the classes first.

    Attributes:
        level: of the pyramid; None where there are no anchors.
        labels: outputs of each anchor that stand for classes.
        first: the label of the first of them: 1 where background has no output, else 0.
        rest: the other outputs of each anchor.
    """

    level: int | None
    labels: int
    first: int
    rest: int


def copy_detector(new: Detector, old: Detector, label_map: Mapping[int, int]) -> WarmStart:
    """Copy a detector's weights into one with other classes, other anchors, or of another family.

    Between families only the backbone means the same. An anchor that the old detector does not have begins with the
    outputs of the old one of its level that it is most like, and with the same boxes: its offsets are measured anew,
    from its own shape.

    Args:
        new: its network is written to.
        old: left as it is.
        label_map: new label to old label, for the classes both know; background 0 is added.

    Returns:
        `WarmStart`. Class outputs without a counterpart keep their fresh weights.
    """
    copied: list[str] = []
    remapped: list[str] = []
    fresh: list[str] = []
    source = old.network.state_dict()
    same_family = new.config.family == old.config.family
    nearest = _nearest_anchors(new.config, old.config) if same_family else ()
    heads, old_heads = _heads(new), _heads(old)
    state = new.network.state_dict()
    for name, tensor in state.items():
        values, layer = source.get(name), name.rpartition(".")[0]
        if values is None or not (same_family or name.startswith("backbone.")):
            fresh.append(name)
        elif layer in old_heads and state[f"{layer}.weight"].shape[1:] == source[f"{layer}.weight"].shape[1:]:
            # A head that reads another map is new, biases and all.
            rows = _rows(heads[layer], old_heads[layer], {0: 0, **label_map}, nearest)
            tensor[rows.new] = values[rows.old]
            _measure_anew(tensor, name, heads[layer], new.config, old.config, nearest)
            is_whole = len(tensor) == len(values) == len(rows.new) and torch.equal(rows.new, rows.old)
            (copied if is_whole else remapped if len(rows.new) else fresh).append(name)
        elif layer not in heads and tensor.shape == values.shape:
            tensor.copy_(values)
            copied.append(name)
        else:
            fresh.append(name)
    taken = {layer for layer in heads if f"{layer}.weight" not in fresh}
    moved = any(one != Nearest(i, 1.0) for level in nearest for i, one in enumerate(level))
    return WarmStart(
        tuple(copied),
        tuple(remapped),
        tuple(fresh),
        class_outputs=any(heads[layer].labels for layer in taken),
        anchors=nearest if moved and taken else (),
    )


def nearest_shapes(shapes: Shapes, others: Shapes) -> tuple[Nearest, ...]:
    """Find, for each of some anchor shapes, the most similar of others.

    Args:
        shapes: (width, height) pairs, positive.
        others: the same, at least one.

    Returns:
        one `Nearest` each: of the highest IoU; where one shape holds several others of equal area, and IoU cannot
        tell them apart, of the most similar sides. Equal shapes find each other.
    """
    return tuple(_nearest(shape, others) for shape in shapes)


def _nearest(shape: tuple[float, float], others: Shapes) -> Nearest:
    ious = []
    for other in others:
        common = min(shape[0], other[0]) * min(shape[1], other[1])
        ious.append(common / (shape[0] * shape[1] + other[0] * other[1] - common))

    def likeness(i: int) -> tuple[float, float]:
        return round(ious[i], 6), -sum(math.log(a / b) ** 2 for a, b in zip(shape, others[i], strict=True))

    best = max(range(len(others)), key=likeness)
    return Nearest(best, 1.0 if shape == others[best] else ious[best])


def _nearest_anchors(new: DetectorConfig, old: DetectorConfig) -> tuple[tuple[Nearest, ...], ...]:
    if new.anchors is None or old.anchors is None or new.anchors.strides != old.anchors.strides:
        return ()
    return tuple(map(nearest_shapes, new.anchors.shapes, old.anchors.shapes))


def _heads(detector: Detector) -> dict[str, _Head]:
    """Find the layers whose outputs belong to anchors or classes, by their names."""
    heads: dict[str, _Head] = {}
    for name, module in detector.network.named_modules():
        if isinstance(module, AnchorHead):
            # The ARM tells objects from background, whatever the classes.
            labels, rest = (0, module.classes + 4) if name == "arm" else (module.classes, 4)
            heads |= {f"{name}.levels.{i}": _Head(i, labels, 0, rest) for i in range(len(module.levels))}
        elif isinstance(module, ArmReader):  # one map for all anchors
            heads[name] = _Head(None, module.classes, 0, 4)
        elif name == "classes" and isinstance(module, nn.Conv2d):  # of a grid, which has no anchors
            heads[name] = _Head(None, module.out_channels, 1, 0)
    return heads


class _Rows(NamedTuple):
    """int64[R] each: output ``new[i]`` of a layer begins as output ``old[i]`` of the old layer."""

    new: Tensor
    old: Tensor


def _rows(new: _Head, old: _Head, label_map: Mapping[int, int], nearest: Sequence[Sequence[Nearest]]) -> _Rows:
    """Pair the outputs of two layers of one family that mean the same; there are none where levels are others."""
    if new.level is not None and not nearest:
        return _Rows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    anchors = [0] if new.level is None else [one.place for one in nearest[new.level]]
    pairs = [(to - new.first, of - old.first) for to, of in label_map.items() if to >= new.first and new.labels]
    pairs += [(new.labels + i, old.labels + i) for i in range(new.rest)]
    within = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    steps = torch.tensor([(i * (new.labels + new.rest), j * (old.labels + old.rest)) for i, j in enumerate(anchors)])
    rows = (steps[:, None] + within).reshape(-1, 2)
    order = rows[:, 0].argsort()
    return _Rows(rows[order, 0], rows[order, 1])


def _measure_anew(
    tensor: Tensor,
    name: str,
    head: _Head,
    new: DetectorConfig,
    old: DetectorConfig,
    nearest: Sequence[Sequence[Nearest]],
) -> None:
    """Make offsets that were measured from an old anchor lead from the new one to the same box.

    Only the first step starts from the anchors: that of the ARM where there is one.
    """
    if head.level is None or not nearest or new.anchors is None or old.anchors is None:
        return
    if name.startswith("odm.") and (new.network.arm or old.network.arm):
        return
    for i, ((width, height), one) in enumerate(zip(new.anchors.shapes[head.level], nearest[head.level], strict=True)):
        before = old.anchors.shapes[head.level][one.place]
        first = (i + 1) * (head.labels + head.rest) - 4
        for offset, ratio in enumerate((before[0] / width, before[1] / height)):
            tensor[first + offset] *= ratio
            if name.endswith(".bias"):
                tensor[first + 2 + offset] += math.log(ratio) / new.anchors.variances[1]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a PyTorch file, never running code from it.

    Raises:
        CheckpointError: the file is missing, damaged, or a pickle of something other than tensors.
    """
    require_file(path, "name a .safetensors or .pth file of tensors")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_torch_file(path)
    except (SafetensorError, OSError) as error:
        raise UnreadableFileError(f"{path}: cannot be read ({type(error).__name__})", "get the file again") from None
    if not isinstance(content, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items()
    ):
        raise CheckpointError(f"{path}: not a plain state dict", "save the state dict alone, or as safetensors")
    return content
