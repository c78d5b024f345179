"""What is wrong with a training step that is not finite, as far as its own numbers tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from refinedet_cli.core.anchors import anchors_per_cell, level_sizes
from refinedet_cli.core.boxes import MAX_LOG_SCALE
from refinedet_cli.core.config import AnchorConfig, DetectorConfig
from refinedet_cli.core.structures import LossParts
from refinedet_cli.engine.device import Precision

# What is larger counts as not finite: a box that such an offset moves twice would leave the range of float32.
LARGEST = 1e30

Fault = Literal["none", "pictures", "weights", "outputs", "loss", "gradients"]


class Picture(NamedTuple):
    """One picture of the batch.

    Attributes:
        image_id, file_name: as in the annotation file.
        objects: that the network was to find in it, after all changes.
        finite: whether the network's input was.
    """

    image_id: int
    file_name: str
    objects: int
    finite: bool


class OutputFact(NamedTuple):
    """One tensor of the network's output.

    Attributes:
        name: such as arm_offsets.
        values: how many numbers it holds.
        bad: how many of them are not finite.
        bad_stride: stride of the finest level with such a number; None where there is none, or no levels.
        largest: largest absolute value of the others.
        stride: of the level that it is on; None where there are no levels.
        limited: sizes that were cut to a factor of 1000 when boxes were decoded; 0 for what is no offset.
    """

    name: str
    values: int
    bad: int
    bad_stride: int | None
    largest: float
    stride: int | None
    limited: int


class PartFact(NamedTuple):
    """One part of the network.

    Attributes:
        name: such as backbone, arm, tcb or odm.
        gradient_norm: of all its gradients together, before clipping; None where it has none.
        bad_gradients, bad_weights: names of the parameters that hold a number that is not finite.
        parameters: how many tensors it has to train.
    """

    name: str
    gradient_norm: float | None
    bad_gradients: tuple[str, ...]
    bad_weights: tuple[str, ...]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A step by its numbers.

    Attributes:
        fault: the first thing on the way from the pictures to the gradients that is not finite.
        cause: the same in one line.
        cure: what to do about it.
        step: from 1.
        lr: rate of the heads in this step.
        precision: of the network.
        total: the loss.
        terms: of the loss.
        positives: matched anchors, by module.
        pictures: of the batch.
        outputs: of the network.
        gradient_norm: of the whole network, before clipping; None where there are no gradients.
        parts: of the network.
    """

    fault: Fault
    cause: str
    cure: str
    step: int
    lr: float
    precision: Precision
    total: float
    terms: dict[str, float]
    positives: dict[str, float]
    pictures: tuple[Picture, ...]
    outputs: tuple[OutputFact, ...]
    gradient_norm: float | None
    parts: tuple[PartFact, ...]

    @property
    def finite(self) -> bool:
        """Whether nothing is wrong."""
        return self.fault == "none"


class Step(NamedTuple):
    """What there is of a step when it is judged: after the gradients, before the optimiser.

    Attributes:
        number: from 1.
        lr: rate of the heads.
        precision: of the network.
        images: float[B, 3, H, W], what the network read.
        pictures: of the batch, as (id, file name, objects).
        raw: the network's output.
        loss: computed from it.
    """

    number: int
    lr: float
    precision: Precision
    images: Tensor
    pictures: tuple[tuple[int, str, int], ...]
    raw: Any
    loss: LossParts


def diagnose(step: Step, network: nn.Module, config: DetectorConfig, origin: str) -> Diagnosis:
    """Find the first thing that is not finite, and gather what else tells how it came about.

    Args:
        step: the step.
        network: with its weights of before the optimiser, and with the gradients before clipping.
        config: of the detector.
        origin: since when the weights are as they are.

    Returns:
        `Diagnosis`; equal numbers give an equal one.
    """
    finite = step.images.flatten(1).isfinite().all(dim=1).tolist()
    pictures = tuple(Picture(*p, good) for p, good in zip(step.pictures, finite, strict=True))
    parts = tuple(_part(name, module) for name, module in network.named_children())
    size = (step.images.shape[2], step.images.shape[3])
    outputs = tuple(_output(name, tensor, config, size) for name, tensor in named_tensors(step.raw))
    total = float(step.loss.total.detach())
    terms = {name: float(value) for name, value in step.loss.parts.items()}
    norms = [part.gradient_norm for part in parts if part.gradient_norm is not None]
    fault, cause = _fault(pictures, parts, outputs, {"total": total, **terms}, origin)
    return Diagnosis(
        fault=fault,
        cause=cause,
        cure=_cure(fault, step),
        step=step.number,
        lr=step.lr,
        precision=step.precision,
        total=total,
        terms=terms,
        positives={name: float(value) for name, value in step.loss.positives.items()},
        pictures=pictures,
        outputs=outputs,
        gradient_norm=math.hypot(*norms) if norms else None,
        parts=parts,
    )


def named_tensors(raw: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Walk the floating-point tensors of a network's output, each by the name of the field that holds it."""
    if isinstance(raw, Tensor):
        if raw.is_floating_point():
            yield name, raw.detach()
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from named_tensors(value, str(key))
    elif isinstance(raw, (tuple, list)):
        fields: Sequence[str] = getattr(raw, "_fields", ()) or [f"{name} {i}" for i in range(len(raw))]
        for field, value in zip(fields, raw, strict=True):
            yield from named_tensors(value, field)


def is_offsets(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor of the output moves anchors: (dx, dy, dw, dh) in the coding of `boxes.encode`."""
    return name.endswith("offsets") and tensor.shape[-1] == 4


def is_good(value: float) -> bool:
    """Tell whether a number is finite, and no larger than what can be computed with."""
    return abs(value) <= LARGEST


def _good(tensor: Tensor) -> Tensor:
    return tensor.abs() <= LARGEST  # False for NaN too


def _output(name: str, tensor: Tensor, config: DetectorConfig, size: tuple[int, int]) -> OutputFact:
    tensor = tensor.float()
    good = _good(tensor)
    magnitude = torch.where(good, tensor.abs(), 0.0)
    bad, largest = int((~good).sum()), float(magnitude.max()) if magnitude.numel() else 0.0
    bad_stride = stride = None
    limited = 0
    if config.anchors is not None:
        if is_offsets(name, tensor):
            limited = int((tensor[..., 2:].abs() * config.anchors.variances[1] > MAX_LOG_SCALE).sum())
        counts = _anchors_of_levels(config.anchors, size)
        if tensor.ndim == 3 and tensor.shape[1] == sum(counts):
            levels = list(zip(config.anchors.strides, good.split(counts, 1), magnitude.split(counts, 1), strict=True))
            bad_stride = next((s for s, fine, _ in levels if not bool(fine.all())), None)
            stride = max(levels, key=lambda level: float(level[2].max()))[0] if largest else None
    return OutputFact(name, tensor.numel(), bad, bad_stride, largest, stride, limited)


def _anchors_of_levels(anchors: AnchorConfig, size: tuple[int, int]) -> list[int]:
    per_cell = anchors_per_cell(anchors)
    return [rows * columns * n for (rows, columns), n in zip(level_sizes(anchors, *size), per_cell, strict=True)]


def _part(name: str, module: nn.Module) -> PartFact:
    parameters = dict(module.named_parameters(prefix=name))
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    norm = float(nn.utils.get_total_norm(list(gradients.values()))) if gradients else None
    return PartFact(
        name=name,
        gradient_norm=norm,
        bad_gradients=tuple(n for n, g in gradients.items() if not bool(g.isfinite().all())),
        bad_weights=tuple(n for n, p in parameters.items() if not bool(p.isfinite().all())),
        parameters=len(parameters),
    )


def _fault(
    pictures: Sequence[Picture],
    parts: Sequence[PartFact],
    outputs: Sequence[OutputFact],
    losses: Mapping[str, float],
    origin: str,
) -> tuple[Fault, str]:
    unread = [p.file_name for p in pictures if not p.finite]
    if unread:
        return "pictures", f"the network's input is not finite for {_some(unread)}"
    weights = [name for part in parts for name in part.bad_weights]
    if weights:
        return "weights", f"weights are not finite {origin}: {_some(weights)}"
    overflown = [o for o in outputs if o.bad]
    if overflown:
        first, *others = overflown
        names = ", ".join([f"{first.name} ({_how_many(first)})", *(o.name for o in others)])
        return "outputs", f"the network's output is not finite, though its input and weights are: {names}"
    terms = [f"{name} is {value:g}" for name, value in losses.items() if not is_good(value)]
    if terms:
        return "loss", f"the loss is not finite, though the network's output is: {_some(terms)}"
    gradients = [name for part in parts for name in part.bad_gradients]
    if gradients:
        return "gradients", f"gradients are not finite, though the loss is: {_some(gradients)}"
    huge = [part.name for part in parts if part.gradient_norm is not None and not is_good(part.gradient_norm)]
    if huge:
        return "gradients", f"gradients are too large to be summed: those of {_some(huge)}"
    return "none", "nothing in this step is out of range"


def _how_many(fact: OutputFact) -> str:
    level = "" if fact.bad_stride is None else f", first on the level of stride {fact.bad_stride}"
    return f"{fact.bad:,} of {fact.values:,} values{level}"


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _cure(fault: Fault, step: Step) -> str:
    if fault == "none":
        return ""
    if fault == "pictures":
        return "check preprocess.mean and preprocess.std"
    if fault == "loss":
        return "the loss should be finite for any finite output: please report it with this file"
    return f"lower train.lr (this step's rate was {step.lr:.3g}) or lengthen train.warmup_steps"
