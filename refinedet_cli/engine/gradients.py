"""Gradients of a batch, however it is parted: over processes, and over micro-batches that come one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refinedet_cli.core.detector import Detector
from refinedet_cli.core.loss import OverAll, alone
from refinedet_cli.core.structures import LossParts, Targets
from refinedet_cli.data.loading import Batch
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.distributed import Processes


class Pulled(NamedTuple):
    """What a batch said on its way to gradients.

    Attributes:
        loss: of the whole batch, the same on all processes.
        own: the part of it that this process's pictures have; summed over the processes it is ``loss``.
        raw: what the network made of this process's pictures.
    """

    loss: LossParts
    own: LossParts
    raw: Any


class Gradients:
    """Computes the gradients of whole batches, of which each process has a share, and computes it in micro-batches.

    They equal, but for rounding, those of one process that takes the batch at once, since the loss is divided by what
    the whole batch holds. Only batch normalisation that is trained looks at the pictures of a micro-batch alone; its
    running statistics are averaged over the processes.

    Two or more micro-batches are run twice: first without gradients, for a loss is known only when all outputs are, and
    these are small; then each again, pulled by the gradient of that loss with respect to its outputs.

    Args:
        detector: on its device; its parameters get the gradients.
        precision: of the network; the loss is in float32.
        micro_batches: into which a process parts its share.
        processes: that share the batches.
    """

    def __init__(self, detector: Detector, *, precision: Precision, micro_batches: int, processes: Processes) -> None:
        self.detector, self.network = detector, detector.network
        self.precision, self.micro_batches, self.processes = precision, micro_batches, processes
        self.device = next(self.network.parameters()).device
        self.over_all: OverAll = alone if processes.count == 1 else processes.sum
        self._parallel: nn.Module | None = None
        self._trained: list[bool] = []
        self._statistics: list[Tensor] = []

    def __call__(self, batch: Batch) -> Pulled:
        """Leave in the parameters the gradients of a batch, of which this process has some pictures or none."""
        network = self._shared_network()
        images = batch.images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        targets = batch.targets.to(self.device)
        self.network.zero_grad(set_to_none=True)
        with self.processes.computing():
            pull = self._pull_at_once if self.micro_batches == 1 else self._pull_in_parts
            own, raw = pull(network, images, targets)
            own = own._replace(total=own.total.detach())
            self._average_statistics(len(images))
            return Pulled(self._whole(own), own, raw)

    def _shared_network(self) -> nn.Module:
        """Wrap the network for the processes, anew if other parameters are trained than before."""
        trained = [p.requires_grad for p in self.network.parameters()]
        if self._parallel is None or trained != self._trained:
            self._parallel, self._trained = None, trained  # the old one lets go of the parameters first
            self._parallel = self.processes.parallel(self.network)
            self._statistics = list(_statistics(self.network)) if self.processes.count > 1 else []
        return self._parallel

    def _pull_at_once(self, network: nn.Module, images: Tensor, targets: Targets) -> tuple[LossParts, Any]:
        raw = self._forward(network, images)
        loss = self.detector.criterion(raw, targets, over_all=self.over_all)
        # The processes' gradients are averaged, and they have to be summed.
        (loss.total * self.processes.count).backward()
        return loss, _rebuilt(raw, (t.detach() for t in _tensors(raw)))

    def _pull_in_parts(self, network: nn.Module, images: Tensor, targets: Targets) -> tuple[LossParts, Any]:
        parts = [part for part in images.tensor_split(self.micro_batches) if len(part)] or [images]
        before = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        with torch.no_grad():
            outputs = [self._forward(self.network, part) for part in parts]
        for buffer, value in before:
            buffer.copy_(value)
        joined = [torch.cat(tensors) for tensors in zip(*map(_tensors, outputs), strict=True)]
        leaves = [t.requires_grad_() for t in joined if t.is_floating_point()]
        loss = self.detector.criterion(_rebuilt(outputs[0], iter(joined)), targets, over_all=self.over_all)
        pulls = torch.autograd.grad(loss.total * self.processes.count, leaves, materialize_grads=True)
        shares = zip(*(pull.split([len(part) for part in parts]) for pull in pulls), strict=True)
        for part, share in zip(parts, shares, strict=True):
            with nullcontext() if part is parts[-1] else _without_exchange(network):
                tensors = (t for t in _tensors(self._forward(network, part)) if t.is_floating_point())
                pairs = [(t, pull) for t, pull in zip(tensors, share, strict=True) if t.requires_grad]
                torch.autograd.backward([t for t, _ in pairs], [pull for _, pull in pairs])
        return loss, _rebuilt(outputs[0], (t.detach() for t in joined))

    def _forward(self, network: nn.Module, images: Tensor) -> Any:
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            if len(images):
                return network(images)
            # No picture of this batch is for this process; its parameters still need a gradient, of zeros.
            raw = network(images.new_zeros(1, *images.shape[1:]))
            return _rebuilt(raw, (t[:0] for t in _tensors(raw)))

    def _average_statistics(self, pictures: int) -> None:
        """Give all processes the mean of their running statistics, those of an empty share not counted."""
        if not self._statistics:
            return
        own = torch.cat([*(buffer.flatten() for buffer in self._statistics), self._statistics[0].new_ones(1)])
        *_, weight = total = self.processes.sum(own * pictures)
        means = (total[:-1] / weight).split([buffer.numel() for buffer in self._statistics])
        for buffer, mean in zip(self._statistics, means, strict=True):
            buffer.copy_(mean.view_as(buffer))

    def _whole(self, loss: LossParts) -> LossParts:
        """Sum a loss over the processes."""
        if self.processes.count == 1:
            return loss
        values = [loss.total, *loss.parts.values(), *loss.positives.values()]
        total, *rest = self.processes.sum(torch.stack([value.float() for value in values]))
        parts, positives = rest[: len(loss.parts)], rest[len(loss.parts) :]
        return LossParts(
            total,
            dict(zip(loss.parts, parts, strict=True)),
            dict(zip(loss.positives, positives, strict=True)),
        )


def _without_exchange(network: nn.Module) -> AbstractContextManager[None]:
    """Keep a network that processes share from exchanging its gradients yet."""
    return network.no_sync() if isinstance(network, nn.parallel.DistributedDataParallel) else nullcontext()


def _statistics(network: nn.Module) -> Iterator[Tensor]:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
            yield from (module.running_mean, module.running_var)  # type: ignore[misc]


def _tensors(raw: Any) -> Iterator[Tensor]:
    """Yield the tensors of a raw output, in order."""
    if isinstance(raw, Tensor):
        yield raw
    elif isinstance(raw, (Mapping, list, tuple)):
        for part in raw.values() if isinstance(raw, Mapping) else raw:
            yield from _tensors(part)


def _rebuilt(raw: Any, tensors: Iterator[Tensor]) -> Any:
    """Put other tensors in the places of those of a raw output."""
    if isinstance(raw, Tensor):
        return next(tensors)
    if isinstance(raw, Mapping):
        return {name: _rebuilt(part, tensors) for name, part in raw.items()}
    if isinstance(raw, (list, tuple)):
        parts = [_rebuilt(part, tensors) for part in raw]
        return raw._make(parts) if hasattr(raw, "_make") else type(raw)(parts)
    return raw
