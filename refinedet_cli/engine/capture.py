"""A step that went wrong, kept in one file that runs it again anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinedet_cli import __version__
from refinedet_cli.core.build import build
from refinedet_cli.core.config import DetectorConfig, TrainConfig, from_dict
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.structures import Targets
from refinedet_cli.data.loading import Batch
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.diagnosis import Diagnosis, Step, diagnose
from refinedet_cli.engine.distributed import ALONE
from refinedet_cli.engine.gradients import Gradients
from refinedet_cli.engine.recipe import fewest_frozen, freeze, make_optimizer
from refinedet_cli.errors import CheckpointError, ConfigError
from refinedet_cli.files import require_file, whole_file

CAPTURE_FILE = "nonfinite.pt"
CAPTURE_VERSION = 1
_KIND = "refinedet step"


@dataclass(frozen=True)
class Capture:
    """All that decides what a step computes; only tensors, numbers, strings, lists and dicts.

    Attributes:
        step: from 1.
        lr: rate of the heads.
        factor: on every rate.
        frozen: the backbone's stages, from the input up, that are not trained in this step.
        precision: of the network.
        device: kind of the device that computed it.
        origin: since when the weights are as they are.
        settings: resolved config of the run, plain data.
        network: weights and buffers of before the step.
        optimizer: state of before the step.
        images: float32[B, 3, H, W], as the network reads them.
        boxes, labels, image: their objects, as `Targets` has them.
        pictures: of the batch, as [id, file name, objects].
        tool_version, torch_version: that computed it.
    """

    step: int
    lr: float
    factor: float
    frozen: int
    precision: Precision
    device: str
    origin: str
    settings: dict[str, Any]
    network: dict[str, Tensor]
    optimizer: dict[str, Any]
    images: Tensor
    boxes: Tensor
    labels: Tensor
    image: Tensor
    pictures: list[list[Any]]
    tool_version: str = __version__
    torch_version: str = str(torch.__version__)


@dataclass(frozen=True)
class Replay:
    """A step that was computed again.

    Attributes:
        diagnosis: of the step as it went this time.
        weights_after: names of weights that the optimiser made not finite; empty where the step was not finite itself,
            for then the optimiser was not let to them.
        before: precision and kind of device of the first time.
    """

    diagnosis: Diagnosis
    weights_after: tuple[str, ...]
    before: tuple[Precision, str]

    @property
    def finite(self) -> bool:
        """Whether the step and the weights after it are finite."""
        return self.diagnosis.finite and not self.weights_after


def save_capture(path: Path, capture: Capture) -> None:
    """Write a capture whole.

    Raises:
        DataError: the file cannot be written.
    """
    with whole_file(path) as file:
        torch.save({"kind": _KIND, "version": CAPTURE_VERSION, **vars(capture)}, file)


def remove_captures(folder: Path) -> None:
    """Drop what an earlier run left."""
    for path in folder.glob(f"*{CAPTURE_FILE}"):
        path.unlink()


def load_capture(path: Path) -> Capture:
    """Read a capture without running any code from it.

    Raises:
        CheckpointError: the file is missing, damaged, no capture or of another version.
    """
    require_file(path, f"name the {CAPTURE_FILE} of a run that broke off")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        kind, version = content.pop("kind", None), content.pop("version", None)
    except Exception as error:  # torch.load raises many kinds on damaged input
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: not a readable file ({type(error).__name__}: {reason})") from None
    if kind != _KIND:
        raise CheckpointError(
            f"{path}: not a step of a run that broke off", f"name its {CAPTURE_FILE}; a run is resumed with --resume"
        )
    if version != CAPTURE_VERSION:
        raise CheckpointError(f"{path}: a step of version {version}, expected {CAPTURE_VERSION}")
    try:
        return Capture(**content)
    except TypeError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def replay(capture: Capture, *, device: torch.device, precision: Precision | None = None) -> Replay:
    """Compute a step again, as the run did.

    Args:
        capture: the step.
        device: to compute on.
        precision: of the network; None takes that of the first time.

    Returns:
        `Replay`. On the device, with the precision, the versions and the number of threads of the first time, all
        numbers are the same; of a run of several processes it is the step of one process alone.

    Raises:
        CheckpointError: the weights do not fit the settings.
    """
    try:
        detector = build(from_dict(DetectorConfig, capture.settings["detector"]))
        config = from_dict(TrainConfig, capture.settings["train"], where="train")
        network = detector.network.to(device).to(memory_format=torch.channels_last)
        freeze(network, config, fewest_frozen(config))
        optimizer = make_optimizer(network, config)
        freeze(network, config, capture.frozen)
        network.load_state_dict(capture.network)
        optimizer.load_state_dict(capture.optimizer)
    except (ConfigError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"step {capture.step}: weights and settings do not fit each other: {reason}") from None
    step = _compute(capture, detector, precision or capture.precision, config.accumulate)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    diagnosis = diagnose(step, network, detector.config, capture.origin)
    after: tuple[str, ...] = ()
    if diagnosis.finite:
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(parameters, config.clip_norm or math.inf, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * capture.factor
        optimizer.step()
        after = bad_weights(network)
    return Replay(diagnosis, after, (capture.precision, capture.device))


def bad_weights(network: nn.Module) -> tuple[str, ...]:
    """Name the weights and buffers that hold a number that is not finite."""
    state = {n: t for n, t in network.state_dict().items() if t.is_floating_point()}
    return tuple(name for name, tensor in state.items() if not bool(tensor.isfinite().all()))


def _compute(capture: Capture, detector: Detector, precision: Precision, micro_batches: int) -> Step:
    targets = Targets(capture.boxes, capture.labels, capture.image, len(capture.images))
    batch = Batch(capture.images, targets, tuple(range(len(capture.images))))
    pull = Gradients(detector, precision=precision, micro_batches=micro_batches, processes=ALONE)
    pulled = pull(batch)
    pictures = tuple((int(i), str(name), int(objects)) for i, name, objects in capture.pictures)
    return Step(capture.step, capture.lr, precision, capture.images, pictures, pulled.raw, pulled.own)
