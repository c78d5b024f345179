"""Multi-scale testing: the predictor that looks at each picture in several sizes, and the schedules it follows."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.config import DetectorConfig, PreprocessConfig, from_dict
from refinedet_cli.core.multi_scale import (
    SCHEDULE_NAMES,
    ScalePass,
    ScaleSchedule,
    mirrored,
    named_schedule,
    pool,
    within_limits,
)
from refinedet_cli.core.structures import Detections
from refinedet_cli.core.words import counted
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.predict import AnyPredictor, Predictor, picture_sizes
from refinedet_cli.engine.stages import stage
from refinedet_cli.errors import ConfigError
from refinedet_cli.zoo.checkpoint import LoadedDetector

# Limits in pixels of the picture were chosen for VOC and COCO, whose pictures are half as large as this.
_LARGE_SIDE = 1000


class MultiScalePredictor(Predictor):
    """A detector that looks at each picture in several sizes; it can stand wherever a `Predictor` can.

    Every pass goes through its own NMS, and what the passes leave is voted together (`core.multi_scale.pool`), which
    takes the place of soft-NMS. Anchors keep their sizes in input pixels, so larger inputs bring smaller objects.

    Args:
        loaded: as for `Predictor`.
        device: where to compute.
        precision: of the network.
        schedule: the passes and the voting.
    """

    def __init__(
        self, loaded: LoadedDetector, *, device: torch.device, precision: Precision, schedule: ScaleSchedule
    ) -> None:
        super().__init__(loaded, device=device, precision=precision)
        self.schedule: ScaleSchedule = schedule

    @property
    def input_size(self) -> None:
        """None: the larger passes need all pixels."""

    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Find the objects in a batch of pictures, which may differ in size.

        Args:
            images: B pictures uint8[H, W, 3], RGB; B may be 0. No forward pass holds more input pixels than B pictures
                of the detector's own input size, or one picture where that is more.

        Returns:
            one `Detections` per picture, in order, on the CPU.

        Raises:
            ValueError: a picture is not uint8[H, W, 3].
        """
        looks = self._look(images, picture_sizes(images))
        with stage("post-processing"):
            return [pool(of_picture, self.schedule, self.config.postprocess) for of_picture in looks]

    def _look(self, images: Sequence[NDArray[np.uint8]], sizes: Sequence[tuple[int, int]]) -> list[list[Detections]]:
        """Collect for each picture what its passes found, in their order."""
        own = self.config.preprocess
        most_pixels = len(images) * own.height * own.width
        found: list[list[Detections]] = [[] for _ in images]
        for entry in self.schedule.passes:
            for places, (height, width) in _batches(entry, sizes, most_pixels):
                inputs = self._inputs([images[i] for i in places], replace(own, height=height, width=width))
                of_batch = [sizes[i] for i in places]
                for i, seen in zip(places, self._find(inputs, of_batch), strict=True):
                    found[i].append(self._meant(seen, entry, sizes[i]))
                if entry.mirror:
                    for i, seen in zip(places, self._find(inputs.flip(3), of_batch), strict=True):
                        found[i].append(self._meant(mirrored(seen, sizes[i][1]), entry, sizes[i]))
        return found

    def _meant(self, seen: Detections, entry: ScalePass, size: tuple[int, int]) -> Detections:
        """Keep what a pass is meant for."""
        side = self.schedule.picture_side
        return within_limits(seen, entry, 1.0 if side is None else max(size) / side)


def _batches(
    entry: ScalePass, sizes: Sequence[tuple[int, int]], most_pixels: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Group pictures whose network input is of one size, few enough to be computed together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(entry.input_size(*size), []).append(i)
    for (height, width), places in groups.items():
        together = max(1, most_pixels // (height * width))
        for start in range(0, len(places), together):
            yield places[start : start + together], (height, width)


def find_schedule(source: str, preprocess: PreprocessConfig) -> ScaleSchedule:
    """Find a schedule by its name, or read it from a file.

    Args:
        source: "voc", "coco", or the path of a TOML file whose settings are those of `ScaleSchedule`, with each pass in
            a ``[[passes]]`` table.
        preprocess: of the detector, for named schedules.

    Raises:
        ConfigError: there is no such schedule or file, or the file cannot be used; names it and the value.
    """
    if source in SCHEDULE_NAMES:
        return named_schedule(cast('Literal["voc", "coco"]', source), preprocess)
    path = Path(source)
    try:
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"--multi-scale {source}: there is no such schedule or file",
            f"choose {' or '.join(SCHEDULE_NAMES)}, or name a TOML file with [[passes]]",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", "schedules are TOML with one [[passes]] table for each size") from None
    try:
        return from_dict(ScaleSchedule, {"name": path.name, **content})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", error.hint) from None


def make_predictor(
    loaded: LoadedDetector, *, device: torch.device, precision: Precision, multi_scale: str | None, lanes: int = 1
) -> Predictor:
    """Make the predictor that a command's options ask for.

    Args:
        loaded: as for `Predictor`.
        device: where to compute.
        precision: of the network.
        multi_scale: as ``source`` of `find_schedule`; None looks at each picture once.
        lanes: as for `Predictor`, where each picture is looked at once; larger passes need all cores for a picture.

    Raises:
        ConfigError: as `find_schedule`; or the network does not take inputs of these sizes.
    """
    if multi_scale is None:
        return Predictor(loaded, device=device, precision=precision, lanes=lanes)
    schedule = find_schedule(multi_scale, loaded.config.preprocess)
    _check_passes(schedule, loaded.config)
    return MultiScalePredictor(loaded, device=device, precision=precision, schedule=schedule)


def _check_passes(schedule: ScaleSchedule, config: DetectorConfig) -> None:
    """Refuse inputs that the network does not take: those of SSD300 have to be just so large."""
    for entry in schedule.passes:
        for height, width in (entry.input_size(1, 2), entry.input_size(2, 1)):
            try:
                replace(config, preprocess=replace(config.preprocess, height=height, width=width))
            except ConfigError as error:
                raise ConfigError(
                    f"multi-scale {schedule.name}: a pass at {width} x {height} px: {error.message}",
                    "leave --multi-scale out, or name a file of passes of sizes that fit",
                ) from None


def describe_passes(schedule: ScaleSchedule) -> str:
    """List the passes of a schedule in one line, their sizes in px-in."""
    count = f"{counted(schedule.count, 'pass', 'passes')} a picture"
    sizes = [f"{p.size}" + (f" x {p.short_side}" if p.short_side else "") for p in schedule.passes]
    mirrors = [p.mirror for p in schedule.passes]
    if all(mirrors):
        return f"{count}: {', '.join(sizes)} px, each mirrored too"
    marked = (size + (" (mirrored too)" if mirror else "") for size, mirror in zip(sizes, mirrors, strict=True))
    return f"{count}: {', '.join(marked)} px"


def remark_on_passes(predictor: AnyPredictor) -> str | None:
    """Say in one line what multi-scale testing does and costs; None where a picture is looked at once."""
    schedule, size = predictor.schedule, predictor.config.preprocess
    if schedule is None:
        return None
    times = schedule.pixels / (size.height * size.width)
    soft = predictor.config.postprocess.soft_nms_iou is not None
    return (
        f"multi-scale {schedule.name}: {describe_passes(schedule)}; {times:.3g} times the pixels of one look"
        f"{'; voting takes the place of soft-NMS' if soft else ''}"
    )


def remark_on_limits(predictor: AnyPredictor, sizes: Iterable[tuple[int, int]]) -> str | None:
    """Tell of pictures so large that limits in their pixels leave the enlarged passes little to add.

    Args:
        predictor: whose schedule has the limits; those that grow with the picture need no remark.
        sizes: of the pictures, either side first, px-img.
    """
    schedule = predictor.schedule
    if schedule is None or schedule.picture_side is not None or not schedule.has_limits:
        return None
    large = sum(max(size) > _LARGE_SIDE for size in sizes)
    if not large:
        return None
    return (
        f"{counted(large, 'picture has', 'pictures have')} a side above {_LARGE_SIDE:,} px: the box limits of "
        f"{schedule.name} are for pictures of about 500 px, so its large passes add little there; with picture_side = "
        "500, a schedule of your own makes them grow with the picture"
    )
