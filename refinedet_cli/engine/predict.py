"""Pictures in, detections out: the one path from pixels to boxes that every command takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinedet_cli.core.config import Classes, DetectorConfig, PreprocessConfig
from refinedet_cli.core.fused import FusedNetwork
from refinedet_cli.core.multi_scale import ScaleSchedule
from refinedet_cli.core.postprocess import soften, suppress, to_detections
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.core.structures import Detections
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.lanes import Lanes, lanes_for
from refinedet_cli.engine.stages import stage
from refinedet_cli.zoo.checkpoint import LoadedDetector

_FLAGS = threading.Lock()


class AnyPredictor(Protocol):
    """What the verbs need of a detector that is ready to use, whatever file it came from and whatever computes it."""

    @property
    def config(self) -> DetectorConfig:
        """What it computes, except its weights."""

    @property
    def classes(self) -> Classes:
        """What its labels stand for."""

    @property
    def path(self) -> Path:
        """The file its weights came from."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What that file says of how the weights were made."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def precision(self) -> str:
        """The number format of the network, such as "fp32"."""

    @property
    def engine(self) -> str:
        """The library that computes, with its version."""

    @property
    def schedule(self) -> ScaleSchedule | None:
        """The passes of multi-scale testing; None where a picture is looked at once."""

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) to which a picture is resized as a whole; None where it is needed as large as it is."""

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Find the objects in pictures uint8[H, W, 3], RGB, of any sizes: one `Detections` each, in order."""


class Predictor:
    """A detector ready to use on a device.

    Args:
        loaded: its network is copied; what becomes of it later changes nothing here.
        device: where to compute.
        precision: of the network; decoding and suppression are always float32.
        lanes: threads that compute pictures of their own, on CPUs: see `Lanes`. 1 is faster for a picture at a time,
            and what is taken for a heavy network.

    Attributes:
        loaded, device, precision: as given.
        schedule: of multi-scale testing; None where a picture is looked at once.
    """

    schedule: ScaleSchedule | None = None
    engine = f"torch {torch.__version__}"
    _fuses = True

    def __init__(self, loaded: LoadedDetector, *, device: torch.device, precision: Precision, lanes: int = 1) -> None:
        self.loaded = loaded
        self.device = device
        self.precision: Precision = precision
        size = loaded.config.preprocess
        self._lanes = Lanes(lanes)
        prepare = partial(
            FusedNetwork,
            loaded.detector.network,
            device=device,
            bf16=precision == "bf16",
            input_size=(size.height, size.width),
            fuse=self._fuses,
        )
        # Where it will compute: the layout of weights depends on the number of threads.
        self._network = self._lanes.call(prepare)
        if lanes > 1 and not self._network.suits_lanes:
            self._lanes = Lanes(1)
            self._network = prepare()

    def for_many(self) -> Predictor:
        """Give what computes many pictures at a time the fastest: this one, or one of the same weights with lanes."""
        lanes = lanes_for(self.device)
        if type(self) is not Predictor or self._lanes.count == lanes or not self._network.suits_lanes:
            return self
        return Predictor(self.loaded, device=self.device, precision=self.precision, lanes=lanes)

    @property
    def config(self) -> DetectorConfig:
        """The config the detector was built from."""
        return self.loaded.config

    @property
    def classes(self) -> Classes:
        """The classes that labels stand for."""
        return self.loaded.config.classes

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.loaded.path

    @property
    def provenance(self) -> dict[str, Any]:
        """What the checkpoint says of how it was made."""
        return self.loaded.provenance

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of the network's input."""
        return self.config.preprocess.height, self.config.preprocess.width

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Find the objects in a batch of pictures, which may differ in size.

        Args:
            images: B pictures uint8[H, W, 3], RGB; B may be 0. They are computed together: who has many passes a few at
                a time.

        Returns:
            one `Detections` per picture, in order, on the CPU. In fp32 they do not depend on which pictures are
            computed together.

        Raises:
            ValueError: a picture is not uint8[H, W, 3].
        """
        sizes = picture_sizes(images)
        if not images:
            return []
        post = self.config.postprocess
        found = self._find(self._inputs(images, self.config.preprocess), sizes)
        if post.soft_nms_iou is None:
            return found
        return [soften(detections, post.soft_nms_iou, post.score_threshold) for detections in found]

    def _inputs(self, images: Sequence[NDArray[np.uint8]], config: PreprocessConfig) -> Tensor:
        """Make network input float32[B, 3, height, width] of checked pictures."""
        with stage("prepare"):
            return torch.stack(self._lanes.map(lambda image: preprocess(self._upload(image), config), images))

    def _upload(self, image: NDArray[np.uint8]) -> Tensor:
        # A read-only or mirrored array has no tensor view, so these are copied.
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        if self.device.type == "cuda":
            # From pinned memory, the copy runs while the next picture is made ready.
            return pixels.pin_memory().to(self.device, non_blocking=True)
        return pixels.to(self.device)

    def _find(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Run the network, decode and suppress; ``sizes`` are the heights and widths of the pictures, px-img."""
        parts = self._network.parts(inputs, lanes=self._lanes.count)
        rest = iter(sizes)
        sizes_of_parts = [[*islice(rest, len(part))] for part in parts]
        with _exact_convolutions(self.device):
            with stage("network"):
                raw = self._lanes.map(self._compute, parts)
            with stage("post-processing"):
                found = self._lanes.map(self._finish, zip(raw, sizes_of_parts, strict=True))
        return [*chain.from_iterable(found)]

    def _compute(self, part: Tensor) -> Any:
        with torch.inference_mode():
            return self._network(part)

    def _finish(self, raw_and_sizes: tuple[Any, Sequence[tuple[int, int]]]) -> list[Detections]:
        raw, sizes = raw_and_sizes
        with torch.inference_mode():
            best = suppress(self.loaded.detector.decoder(raw), self.config.postprocess)
            return to_detections(best, sizes)


class ReferencePredictor(Predictor):
    """A predictor that computes layer by layer, as training does: what others are compared with."""

    _fuses = False


def picture_sizes(images: Sequence[NDArray[np.uint8]]) -> list[tuple[int, int]]:
    """Check pictures and give their heights and widths.

    Raises:
        ValueError: a picture is not uint8[H, W, 3].
    """
    for i, image in enumerate(images):
        _check(image, i)
    return [(image.shape[0], image.shape[1]) for image in images]


def _check(image: NDArray[np.uint8], i: int) -> None:
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return
    cure = ""
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        cure = "; repeat the grey channel three times"
    elif image.ndim == 3 and image.shape[2] == 4:
        cure = "; drop the alpha channel"
    elif image.dtype != np.uint8:
        cure = "; scale it to 0..255 and convert it to uint8"
    raise ValueError(f"picture {i}: expected uint8[H, W, 3], got {image.dtype}{list(image.shape)}{cure}")


@contextmanager
def _exact_convolutions(device: torch.device) -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TF32, and from choosing another algorithm for another batch size."""
    if device.type != "cuda":
        yield
        return
    # Its flags are those of all threads: two that set and restore them at once would leave them changed.
    with _FLAGS, torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def default_batch(device: torch.device, *, everywhere: bool = False) -> int:
    """How many pictures to compute together where nobody said: beyond this, more brings little speed.

    Args:
        device: that computes.
        everywhere: give the same for every machine with such a device, whatever its cores.
    """
    if device.type == "cuda":
        return 32
    # Four for each lane: about as many as it computes at a time. No more pictures than memory has room for.
    return 8 if everywhere else min(64, max(8, 4 * lanes_for(device)))
