"""The pictures that a run writes: copies with boxes drawn on them, and objects cut out."""

from __future__ import annotations

import errno
import io
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.files import write_whole
from refinedet_cli.engine.detect_names import UniqueNames, class_folders
from refinedet_cli.engine.draw import draw_detections
from refinedet_cli.engine.results import PictureRecord
from refinedet_cli.errors import DataError

ANNOTATED_NAME = "annotated"
CROPS_NAME = "crops"

# Why a disk takes no file at all, whichever picture it is of.
_DISK_FAILS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO})

_JPEG_QUALITY = 92
_JPEG_LONGEST_SIDE = 65_500


class Targets(NamedTuple):
    """Where the files of a picture go.

    Attributes:
        annotated: the drawn copy, below its folder; None draws none.
        stem: what the names of its crops begin with, below the folder of a class; None cuts none.
    """

    annotated: PurePosixPath | None
    stem: PurePosixPath | None


@dataclass(frozen=True)
class Copies:
    """What writes the pictures of a run.

    Args:
        out: the folder of the run.
        classes: of the detector.
        annotated: whether copies are drawn.
        crops: whether objects are cut out.
    """

    out: Path
    classes: Classes
    annotated: bool
    crops: bool

    def targets(self, name: str, annotated: UniqueNames, stems: UniqueNames) -> Targets:
        """Name the files of a picture; asked once for each, in order."""
        return Targets(
            annotated.annotated(name) if self.annotated else None,
            stems.stem(name) if self.crops else None,
        )

    def write(
        self, record: PictureRecord, targets: Targets, pixels: NDArray[np.uint8], detections: Detections
    ) -> PictureRecord:
        """Write the files of a picture.

        Returns:
            the record with their paths, and with a problem where one could not be written.

        Raises:
            DataError: the disk takes none: it is full, read-only or broken.
        """
        try:
            if targets.annotated is not None:
                drawn = draw_detections(pixels, detections, self.classes)
                record = replace(record, annotated=_save(drawn, self.out / ANNOTATED_NAME, targets.annotated))
            if targets.stem is not None:
                record = replace(record, crops=self._cut(record, targets.stem, pixels))
        except DataError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _DISK_FAILS:
                raise DataError(error.message, f"{error.hint}; then go on with --resume") from error
            return replace(record, problem=reason_of(error, record.path))
        return record

    @cached_property
    def _folders(self) -> dict[int, str]:
        return class_folders(self.classes)

    def _cut(self, record: PictureRecord, stem: PurePosixPath, pixels: NDArray[np.uint8]) -> tuple[Path, ...]:
        paths = []
        for number, row in enumerate(record.rows, start=1):
            name = PurePosixPath(self._folders[row.category_id]) / stem.with_name(f"{stem.name}_{number}.jpg")
            paths.append(_save(Image.fromarray(_inside_box(pixels, row.bbox)), self.out / CROPS_NAME, name))
        return tuple(paths)


def reason_of(error: DataError, path: Path) -> str:
    """Tell in one line what is wrong with a picture; its path, which stands beside, is left out."""
    reason = error.message.removeprefix(f"{path} ")
    return f"{reason}; {error.hint}" if error.hint else reason


def _inside_box(pixels: NDArray[np.uint8], bbox: list[float]) -> NDArray[np.uint8]:
    """The pixels that a box (left, top, width, height) touches; at least one."""
    left, top = (min(math.floor(low), size - 1) for low, size in zip(bbox[:2], pixels.shape[1::-1], strict=True))
    right, bottom = math.ceil(bbox[0] + bbox[2]), math.ceil(bbox[1] + bbox[3])
    return np.ascontiguousarray(pixels[top : max(bottom, top + 1), left : max(right, left + 1)])


def _save(picture: Image.Image, folder: Path, name: PurePosixPath) -> Path:
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"not written: {target} is a link that leads out of {folder}", "remove the link")
    if target.suffix.lower() != ".png" and max(picture.size) > _JPEG_LONGEST_SIDE:
        target = target.with_name(f"{target.name}.png")
    encoded = io.BytesIO()
    if target.suffix.lower() == ".png":
        picture.save(encoded, "PNG", compress_level=4)
    else:
        # Full colour resolution: lines of one pixel would lose their colour otherwise.
        picture.save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    write_whole(target, encoded.getvalue())
    return target
