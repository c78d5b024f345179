"""What stops a run at a step that is not finite, before it spoils anything, and leaves that step to be looked at.

It costs one look at a few numbers a step: they come to the host together, as the check of the loss alone would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refinedet_cli.core.config import TrainConfig
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.structures import LossParts
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.loading import Batch
from refinedet_cli.engine.capture import CAPTURE_FILE, Capture, bad_weights, save_capture
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.diagnosis import LARGEST, Diagnosis, Step, diagnose, is_good, is_offsets, named_tensors
from refinedet_cli.engine.distributed import ALONE, Processes
from refinedet_cli.engine.watch import HealthReport, Vitals, Watch
from refinedet_cli.errors import DataError, GateError


class NonFiniteError(GateError):
    """A step whose numbers are not finite.

    Args:
        message: what is wrong.
        hint: what to do.
        diagnosis: all that the step tells, if it was in the pictures of this process.
    """

    def __init__(self, message: str, hint: str | None = None, diagnosis: Diagnosis | None = None) -> None:
        super().__init__(message, hint)
        self.diagnosis = diagnosis


def measure(raw: Any, loss: LossParts, norm: Tensor, processes: Processes = ALONE) -> Vitals:
    """Bring the numbers of a step to the host, in one go.

    Args:
        raw: output of the network for the pictures of this process.
        loss: their part of the batch's.
        norm: float32[], of all gradients of the batch, before clipping.
        processes: that share the batch.
    """
    scalars = {"norm": norm.detach(), "total": loss.total.detach(), **loss.parts}
    scalars |= {f"positives {name}": count for name, count in loss.positives.items()}
    sizes: dict[str, int] = {}
    values = [torch.stack([value.float() for value in scalars.values()])]
    count = len(scalars)
    for name, tensor in named_tensors(raw):
        if not tensor.numel():
            continue
        # One number of a plain tensor, four of offsets; the last two are the sizes'.
        if is_offsets(name, tensor):
            values.append(tensor.abs().flatten(0, -2).amax(0).float())
            sizes[name] = count + 2
        else:
            values.append(tensor.abs().amax().float()[None])
        count += len(values[-1])
    if processes.count > 1:
        # The gradients are the same everywhere; what is before them is each process's own.
        bad = (~(torch.cat(values)[1:].abs() <= LARGEST)).any().float()
        values.append(processes.sum(bad)[None])
    numbers = torch.cat(values).tolist()
    found = dict(zip(scalars, numbers, strict=False))
    good_norm, good_here = is_good(found["norm"]), all(map(is_good, numbers[1:count]))
    good = good_here and not any(numbers[count:])
    return Vitals(
        total=found["total"],
        gradient_norm=found["norm"],
        positives={name: found[f"positives {name}"] for name in loss.positives},
        sizes={name: max(numbers[place : place + 2]) for name, place in sizes.items()},
        good=good and good_norm,
        # Where the gradients alone are wrong, the first tells it.
        culprit=not good_here or (processes.first and good and not good_norm),
    )


class _Judged(NamedTuple):
    """A step that was looked at."""

    number: int
    batch: Batch
    output: dict[str, Tensor]
    loss: LossParts
    lr: float
    factor: float
    frozen: int
    gradient_norm: float

    @property
    def origin(self) -> str:
        """Say whose weights are those after it."""
        return f"after step {self.number} (rate {self.lr:.3g}, gradients of norm {self.gradient_norm:.3g})"


class _Told(NamedTuple):
    """What one process has to tell of a step that is not finite."""

    message: str
    hint: str
    diagnosis: Diagnosis


class Health:
    """Looks after one run: stops it at a step that is not finite, and warns of what goes wrong.

    Args:
        detector: its network is on its device.
        config: the recipe.
        data: training pictures.
        optimizer: of the run, for the capture.
        settings: of the run, plain data, for the capture.
        precision: of the network.
        out: folder of the run; None leaves no capture.
        state: file of the run's last good state.
        on_report: called in the first process with every `HealthReport`, and with the `Diagnosis` of a step that is
            not finite.
        processes: that share the batch.
    """

    def __init__(
        self,
        detector: Detector,
        config: TrainConfig,
        data: Dataset,
        optimizer: torch.optim.Optimizer,
        *,
        settings: Mapping[str, Any],
        precision: Precision,
        out: Path | None,
        state: Path,
        on_report: Callable[[HealthReport | Diagnosis], None],
        processes: Processes = ALONE,
    ) -> None:
        self.detector, self.config, self.data, self.optimizer = detector, config, data, optimizer
        self.settings, self.precision, self.out, self.state = settings, precision, out, state
        self.on_report, self.processes = on_report, processes
        self.watch = Watch(config, detector.config, data)
        modules = detector.network.modules()
        self._norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._buffers = list(detector.network.buffers())
        self._buffers_before = [b.detach().clone() for b in self._buffers]
        self._last: _Judged | None = None

    def begin(self) -> None:
        """Remember what the forward pass of a step will change: the running statistics of batch normalisation."""
        if any(norm.training for norm in self._norms):
            torch._foreach_copy_(self._buffers_before, self._buffers)

    def judge(
        self, batch: Batch, raw: Any, loss: LossParts, norm: Tensor, *, step: int, factor: float, frozen: int
    ) -> None:
        """Look at a step after its gradients, before they are clipped and used.

        Args:
            batch: what was learned from.
            raw: the network's output for the pictures of this process.
            loss: their part of the batch's.
            norm: float32[], of all gradients of the batch.
            step: from 1.
            factor: on the rates.
            frozen: stages of the backbone that are not trained in this step.

        Raises:
            NonFiniteError: something is not finite, here or on another process; all of them stop at the same step. The
                network is as it was before the step, and what it takes to see the step again is in the run's folder.
        """
        # Without the graph: the last step is kept until the next is judged.
        output, loss = dict(named_tensors(raw)), loss._replace(total=loss.total.detach())
        vitals = measure(output, loss, norm, self.processes)
        lr = self.config.lr * factor
        judged = _Judged(step, batch, output, loss, lr, factor, frozen, vitals.gradient_norm)
        if not vitals.good:
            self._restore_buffers()
            origin = "from the start" if self._last is None else self._last.origin
            own = self._tell(judged, origin) if vitals.culprit else None
            told = next(t for t in self.processes.gather(own) if t is not None)
            if self.processes.first:
                self.on_report(told.diagnosis)
            raise NonFiniteError(*told)
        self._last = judged
        if self.processes.first:
            for report in self.watch.look(step, vitals, batch.targets.labels.tolist(), len(batch.indices)):
                self.on_report(report)

    def judge_weights(self) -> None:
        """Look at the weights, before they are saved.

        Raises:
            NonFiniteError: they are not finite.
        """
        if self._last is not None and bad_weights(self.detector.network):
            told = self._tell(self._last, self._last.origin)
            self.on_report(told.diagnosis)
            raise NonFiniteError(*told)

    def _pictures(self, batch: Batch) -> tuple[tuple[int, str, int], ...]:
        objects = torch.bincount(batch.targets.image, minlength=len(batch.indices)).tolist()
        records = [self.data.records[i] for i in batch.indices]
        return tuple((r.image_id, r.file_name, n) for r, n in zip(records, objects, strict=True))

    def _restore_buffers(self) -> None:
        if any(norm.training for norm in self._norms):
            torch._foreach_copy_(self._buffers, self._buffers_before)

    def _tell(self, judged: _Judged, origin: str) -> _Told:
        batch = judged.batch
        pictures = self._pictures(batch)
        step = Step(judged.number, judged.lr, self.precision, batch.images, pictures, judged.output, judged.loss)
        diagnosis = diagnose(step, self.detector.network, self.detector.config, origin)
        first = ", ".join(p.file_name for p in diagnosis.pictures[:4])
        message = (
            f"training is not finite at step {diagnosis.step}: {diagnosis.cause} "
            f"(rate {diagnosis.lr:.3g}, {diagnosis.precision}; first pictures: {first})"
        )
        hints = [diagnosis.cure]
        if self.out is not None:
            hints.append(self._capture(self.out, judged, pictures, origin))
            if self.state.is_file():
                hints.append(f"the state of before is in {self.state}")
        return _Told(message, "; ".join(hints), diagnosis)

    def _capture(self, out: Path, judged: _Judged, pictures: Sequence[tuple[int, str, int]], origin: str) -> str:
        """Write the step down and say how to see it again, or why it could not be written."""
        targets, rank = judged.batch.targets, self.processes.rank
        path = out / (f"rank{rank}-{CAPTURE_FILE}" if rank else CAPTURE_FILE)
        capture = Capture(
            step=judged.number,
            lr=judged.lr,
            factor=judged.factor,
            frozen=judged.frozen,
            precision=self.precision,
            device=next(self.detector.network.parameters()).device.type,
            origin=origin,
            settings=dict(self.settings),
            network=dict(self.detector.network.state_dict()),
            optimizer=self.optimizer.state_dict(),
            images=judged.batch.images,
            boxes=targets.boxes,
            labels=targets.labels,
            image=targets.image,
            pictures=[list(picture) for picture in pictures],
        )
        try:
            save_capture(path, capture)
        except DataError as error:
            return f"the step could not be kept: {error.message}"
        in_fp32 = ", and with --precision fp32 without the rounding of bf16" if self.precision == "bf16" else ""
        return f"refinedet train --replay {path} computes this step again{in_fp32}"
