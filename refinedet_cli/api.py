"""The Python face: load a detector, find objects, train one, publish one; the same path as the commands.

Example:
    >>> from refinedet_cli.api import Detector
    >>> detector = Detector.load()
    >>> found = detector.predict("street.jpg")
    >>> for box, score, name in zip(found.boxes, found.scores, found.names):
    ...     print(name, score, box)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.data.images import image_pixels, read_image
from refinedet_cli.engine import training_session
from refinedet_cli.engine.device import DeviceName, PrecisionName, select_device
from refinedet_cli.engine.open_predictor import open_predictor
from refinedet_cli.engine.predict import AnyPredictor, Predictor, default_batch
from refinedet_cli.engine.publish import prepare_upload, send
from refinedet_cli.engine.results import detection_rows
from refinedet_cli.engine.train import Report, TrainResult
from refinedet_cli.errors import DataError, RefineDetError, UsageError
from refinedet_cli.zoo.hub import parse_hub_name
from refinedet_cli.zoo.hub_client import network
from refinedet_cli.zoo.publish import Published

__all__ = ["Detector", "Found", "Picture", "PictureError", "Published", "RefineDetError", "TrainResult", "train"]

Picture = str | Path | Image.Image | NDArray[np.uint8]

_log = logging.getLogger(__name__)


class PictureError(DataError, ValueError):
    """What was given as a picture is none."""


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one picture, best first.

    Attributes:
        boxes: float32[N, 4], xyxy, px-img, inside the picture.
        scores: float32[N], descending.
        labels: int64[N], the place of each object's class in ``classes.names``, counted from 0.
        names: the class of each object.
        classes: all that the detector knows.
        width, height: of the picture as it is seen, px-img.
        path: of the file; None for a picture that was given as such.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    classes: Classes
    width: int
    height: int
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        rows = zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        lines = [f"{name} {score:.2f} at {', '.join(f'{v:.0f}' for v in box)}" for name, score, box in rows]
        return "\n".join(lines) or "no objects"

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """Give the objects as COCO results, with the category ids of the detector and rounded as the commands write.

        Args:
            image_id: of the picture in the data set.

        Returns:
            One entry each, with ``image_id``, ``category_id``, ``bbox`` (left, top, width, height, px-img) and
            ``score``: what pycocotools' ``loadRes`` takes.
        """
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}
            for bbox, score, category_id in detection_rows(self._detections(), self.classes)
        ]

    def to_supervision(self) -> Any:
        """Give the objects as ``supervision.Detections``, whose ``class_id`` is ``labels``; its data holds the names.

        Raises:
            UsageError: the package supervision is not installed.
        """
        try:
            import supervision  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise UsageError(
                f"the package supervision cannot be imported ({error})", "pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def _detections(self) -> Detections:
        import torch

        boxes, scores, labels = (torch.from_numpy(array) for array in (self.boxes, self.scores, self.labels))
        return Detections(boxes, scores, labels + 1)


class Detector:
    """A detector ready to use; get one with `load` or `from_pretrained`.

    Args:
        predictor: what computes.
    """

    def __init__(self, predictor: AnyPredictor) -> None:
        self._predictor = predictor

    @classmethod
    def load(
        cls,
        weights: str | Path | None = None,
        *,
        device: DeviceName = "auto",
        precision: PrecisionName | None = None,
        multi_scale: str | None = None,
        offline: bool = False,
    ) -> Detector:
        """Load a detector as ``--weights`` of the commands names it.

        Args:
            weights: a file, the folder of a run, a bundled model's name, or ``org/repo[@revision][:file]`` on the
                Hugging Face Hub; None is the bundled detector.
            device: where to compute; "auto" takes the fastest there is.
            precision: number format of the network; None is that of ``refinedet detect``: bf16 where the
                device multiplies it natively, else fp32.
            multi_scale: a schedule's name or file; None looks at each picture once.
            offline: do not use the network.

        Raises:
            CheckpointError: there are no such weights, or they cannot be had or used.
            DeviceError: there is no such device.
        """
        with network(offline=offline):
            name = None if weights is None else str(weights)
            chosen = select_device(device)
            return cls(
                open_predictor(
                    name, device=chosen, precision=precision, usual_precision="auto", multi_scale=multi_scale
                )
            )

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        *,
        revision: str | None = None,
        device: DeviceName = "auto",
        precision: PrecisionName | None = None,
        offline: bool = False,
    ) -> Detector:
        """Load a published detector: one of the Hugging Face Hub, or a bundled one by its name.

        Args:
            repo: ``org/repo``, or a bundled model's name.
            revision: branch, tag or commit of the repository.
            device: where to compute.
            precision: number format of the network; None is that of ``refinedet detect``: bf16 where the
                device multiplies it natively, else fp32.
            offline: do not use the network.

        Raises:
            UsageError: the revision of something that is not written as ``org/repo``.
            CheckpointError, DeviceError: as for `load`.
        """
        if revision is not None:
            place = parse_hub_name(f"{repo}@{revision}")
            if place is None:
                raise UsageError(f"revision {revision!r} of {repo!r} names nothing on the Hub", "write org/repo")
            repo = f"{repo}@{revision}"
        return cls.load(repo, device=device, precision=precision, offline=offline)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of what it finds, in the order of its labels."""
        return self._predictor.classes.names

    @property
    def path(self) -> Path:
        """The file its weights came from."""
        return self._predictor.path

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What that file records of how the weights were made."""
        return self._predictor.provenance

    @overload  # a str is a sequence of str too, and is taken for a path
    def predict(  # type: ignore[overload-overlap]
        self, pictures: Picture, *, score: float = 0.3, batch: int | None = None
    ) -> Found: ...

    @overload
    def predict(self, pictures: Sequence[Picture], *, score: float = 0.3, batch: int | None = None) -> list[Found]: ...

    def predict(
        self, pictures: Picture | Sequence[Picture], *, score: float = 0.3, batch: int | None = None
    ) -> Found | list[Found]:
        """Find the objects in a picture, or in several.

        Args:
            pictures: a path, a Pillow image or an array uint8[H, W, 3] in RGB; or a sequence of these. Files and Pillow
                images are turned as their EXIF says, like everywhere in the tool.
            score: objects that score lower are left out.
            batch: pictures read and computed together; None fits the device.

        Returns:
            One `Found`, or a list of them in order: the same numbers as ``refinedet detect``.

        Raises:
            DataError: a file is missing or is no picture.
            PictureError: it is something else, or an array that is not uint8[H, W, 3].
        """
        if isinstance(pictures, (str, Path, Image.Image, np.ndarray)):
            return self._predict(self._predictor, [pictures], score)[0]
        if not isinstance(pictures, Sequence):
            raise _no_picture(pictures)
        size = batch or default_batch(self._predictor.device)
        found: list[Found] = []
        for first in range(0, len(pictures), size):
            some = pictures[first : first + size]
            found += self._predict(self._predictor if len(some) == 1 else self._predictor_for_many, some, score)
        return found

    @cached_property
    def _predictor_for_many(self) -> AnyPredictor:
        predictor = self._predictor
        return predictor.for_many() if isinstance(predictor, Predictor) else predictor

    def _predict(self, predictor: AnyPredictor, pictures: Sequence[Picture], score: float) -> list[Found]:
        arrays = [_pixels(picture) for picture in pictures]
        detections = predictor.predict(arrays)
        return [
            _found(found.above(score), self._predictor.classes, array, picture)
            for found, array, picture in zip(detections, arrays, pictures, strict=True)
        ]

    def push_to_hub(
        self, repo: str, *, licence: str | None = None, private: bool = False, message: str | None = None
    ) -> Published:
        """Publish the weights with a card made from what they record, as ``refinedet weights push``.

        Args:
            repo: ``org/repo``; it is made if it is new.
            licence: what you put your weights under, such as "apache-2.0"; None takes what is known of them.
            private: make a new repository private.
            message: of the commit.

        Raises:
            UsageError: ``repo`` is not written so.
            CheckpointError: the Hub's login may not write there, or the upload failed.
        """
        return send(prepare_upload(str(self.path), repo, licence=licence), private=private, message=message)


def train(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    val: str | Path | Sequence[str | Path] | None = None,
    images: str | Path | None = None,
    root: str | Path | None = None,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    offline: bool = False,
    preset: str | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    device: DeviceName = "auto",
    workers: int | None = None,
    cache: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[Report], None] | None = None,
    should_stop: Callable[[], bool] = training_session.never,
) -> TrainResult:
    """Train a detector, as ``refinedet train`` with the options of the same names does.

    Args:
        data: what to train on; several are joined.
        out: folder of the run; it receives best.safetensors and last.safetensors.
        val: data to validate on; several are joined, and "none" validates nothing.
        images: folder of the pictures that an annotation file names.
        root: folder of the public data sets.
        weights: the detector to start from, or "none"; None is the bundled one.
        backbone_weights: ImageNet weights to start from instead.
        offline: do not use the network.
        preset: detector and recipe; None is that of the weights.
        config: a run file.
        settings: values by dotted name, such as ``{"train.epochs": 30}``: what ``--set`` takes.
        device: where to compute.
        workers: processes that read pictures.
        cache: keep decoded pictures in memory; None decides by the free memory.
        resume: go on with the run in ``out``.
        overwrite: replace the run in ``out``.
        on_progress: called with each report of the run.
        should_stop: asked after every step.

    Returns:
        How it went. Remarks on data and start go to the log of this module, at level INFO.

    Raises:
        RefineDetError: whatever makes the command fail.
    """
    with network(offline=offline):
        session = training_session.prepare(
            data=_texts(data),
            val=_texts(val),
            images=_path(images),
            root=_path(root),
            out=Path(out),
            weights=None if weights is None else str(weights),
            backbone_weights=None if backbone_weights is None else str(backbone_weights),
            preset=preset,
            config=_path(config),
            settings=[f"{name}={json.dumps(value)}" for name, value in (settings or {}).items()],
            device=device,
            workers=workers,
            cache=cache,
            resume=resume,
            overwrite=overwrite,
        )
    for note in session.notes:
        _log.info(note)
    return session.run(on_progress or _ignore, should_stop)


def _ignore(report: Report) -> None:
    """Take no notice of progress."""


def _texts(value: str | Path | Sequence[str | Path] | None) -> list[str]:
    values = [value] if isinstance(value, (str, Path)) else value or []
    return [str(one) for one in values]


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _pixels(picture: Picture) -> NDArray[np.uint8]:
    if isinstance(picture, (str, Path)):
        return read_image(Path(picture))
    if isinstance(picture, Image.Image):
        return image_pixels(picture, Path(getattr(picture, "filename", "") or "the picture"))
    if not isinstance(picture, np.ndarray):
        raise _no_picture(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise PictureError(
            f"an array {picture.dtype}{list(picture.shape)} is no picture",
            "give uint8[H, W, 3], RGB from 0 to 255; drop the alpha channel, repeat grey three times",
        )
    return picture


def _no_picture(given: object) -> PictureError:
    return PictureError(
        f"{type(given).__name__} is no picture",
        "give a path, a Pillow image, an array uint8[H, W, 3], or a list of these",
    )


def _found(detections: Detections, classes: Classes, array: NDArray[np.uint8], picture: Picture) -> Found:
    labels = detections.labels.numpy() - 1
    return Found(
        boxes=detections.boxes.numpy(),
        scores=detections.scores.numpy(),
        labels=labels,
        names=tuple(classes.names[label] for label in labels),
        classes=classes,
        width=array.shape[1],
        height=array.shape[0],
        path=Path(picture) if isinstance(picture, (str, Path)) else None,
    )
