"""Warnings of a run that goes wrong slowly, each given once, when it begins."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from refinedet_cli.core.boxes import MAX_LOG_SCALE
from refinedet_cli.core.config import DetectorConfig, TrainConfig
from refinedet_cli.data.dataset import Dataset, listed

# Batches in a row without a matched anchor, though they had objects; and without an object.
NO_POSITIVES = 20
NO_OBJECTS = 100
# Steps in a row in which sizes were cut off when boxes were decoded.
LIMITED = 3
# Of so many gradients, this many were cut to less than the fraction. In runs that go well many are cut a little: in
# those of the bundled weights all, yet to less than a fifth 25 in a row at most.
CLIP_WINDOW, CLIPPED, CLIP_FRACTION = 200, 190, 0.2
# The loss of so many steps is compared with the median of those before; both halves against single odd batches.
RECENT, LOSS_WINDOW, LOSS_RISE = 9, 200, 10.0
# How many pictures of a class must have come without any of its objects.
UNSEEN = 30
_LISTED = 10


class Vitals(NamedTuple):
    """The numbers of a step that tell how a run is; plain floats.

    Attributes:
        total: the loss.
        gradient_norm: before clipping.
        positives: matched anchors, by module.
        sizes: by name of the offsets, the largest absolute size offset.
        good: whether all numbers of the step are finite, on all processes.
        culprit: whether this process is to tell what is not.
    """

    total: float
    gradient_norm: float
    positives: dict[str, float]
    sizes: dict[str, float]
    good: bool
    culprit: bool


@dataclass(frozen=True)
class HealthReport:
    """Something that a user should know of while the run goes on.

    Attributes:
        step: after which it was seen.
        kind: such as loss-risen; of each kind there is one report a run.
        message: what was seen.
        cure: what to do about it.
    """

    step: int
    kind: str
    message: str
    cure: str


def _objects_by_class(data: Dataset) -> tuple[list[int], list[int]]:
    """Count by label the objects that training is to find, and the pictures that have some."""
    objects, pictures = ([0] * data.classes.with_background for _ in range(2))
    for record in data.records:
        labels = record.labels[~record.crowd].tolist()
        for label in labels:
            objects[label] += 1
        for label in set(labels):
            pictures[label] += 1
    return objects, pictures


def _classes(names: Sequence[str]) -> str:
    return f"the class{'es' if len(names) > 1 else ''} {listed(names, _LISTED)}"


class Watch:
    """Reports what goes wrong slowly, each kind once, when it begins.

    Args:
        config: the recipe.
        detector: for the coding of its boxes.
        data: training pictures.
    """

    def __init__(self, config: TrainConfig, detector: DetectorConfig, data: Dataset) -> None:
        self.config, self.data = config, data
        self._anchors = detector.anchors
        self._reported: set[str] = set()
        self._in_a_row: Counter[str] = Counter()
        self._clipped: deque[bool] = deque(maxlen=CLIP_WINDOW)
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._pictures = 0
        self._objects, self._shown = _objects_by_class(data)
        self._unseen = {label for label, count in enumerate(self._shown) if count}

    def look(self, step: int, vitals: Vitals, labels: Sequence[int], pictures: int) -> list[HealthReport]:
        """Take a step in.

        Args:
            step: from 1.
            vitals: of the step.
            labels: of all objects of the batch.
            pictures: in the batch.

        Returns:
            what begins with this step, mostly nothing.
        """
        found = [
            *self._missing_classes(labels, pictures),
            *self._empty_handed(vitals, bool(labels)),
            *self._far_offsets(vitals),
            *self._clipped_gradients(vitals),
            *self._risen_loss(vitals, bool(labels)),
        ]
        reports = [HealthReport(step, kind, message, cure) for kind, message, cure in found if self._is_new(kind)]
        self._reported.update(report.kind for report in reports)
        return reports

    def _is_new(self, kind: str) -> bool:
        return kind not in self._reported

    def _lasts(self, what: str, holds: bool, steps: int) -> bool:
        """Count for how many steps something holds, and tell whether it is as many as that."""
        self._in_a_row[what] = self._in_a_row[what] + 1 if holds else 0
        return self._in_a_row[what] >= steps

    @property
    def _slower(self) -> str:
        return (
            f"lower train.lr (now {self.config.lr:g}) or lengthen train.warmup_steps (now {self.config.warmup_steps})"
        )

    def _missing_classes(self, labels: Sequence[int], pictures: int) -> Iterator[tuple[str, str, str]]:
        if not self._pictures:
            without = [
                name for name, count in zip(self.data.classes.names, self._objects[1:], strict=True) if not count
            ]
            if without:
                yield (
                    "classes-without-objects",
                    f"no training picture has an object of {_classes(without)}",
                    "add pictures of them, or take them off the list of classes",
                )
        self._pictures += pictures
        self._unseen.difference_update(labels)
        passes = self._pictures / len(self.data.records)
        late = [label for label in sorted(self._unseen) if self._shown[label] * passes >= UNSEEN]
        if late:
            yield (
                "classes-never-seen",
                f"in {passes:.1f} passes no object of {_classes([self.data.classes.names[i - 1] for i in late])} has "
                "reached the network: crops or the smallest size leave them all out",
                f"lower train.augment.min_size (now {self.config.augment.min_size:g}), or raise "
                f"train.augment.crop_min_scale (now {self.config.augment.crop_min_scale:g})",
            )

    def _empty_handed(self, vitals: Vitals, has_objects: bool) -> Iterator[tuple[str, str, str]]:
        if self._lasts("no objects", not has_objects, NO_OBJECTS):
            yield (
                "no-objects",
                f"no picture of the last {NO_OBJECTS} batches had an object: only background is learned",
                "take fewer pictures without objects, or a larger --batch; refinedet data stats counts them",
            )
        # Without anchors there is nothing to match, and other things are counted.
        if not has_objects or self._anchors is None:
            return
        for name, count in vitals.positives.items():
            if self._lasts(f"no positives {name}", not count, NO_POSITIVES):
                yield (
                    f"no-positives-{name}",
                    f"the {name.upper()} has found no anchor for any object of the last {NO_POSITIVES} batches",
                    "look at the anchors with refinedet anchors"
                    if name != "odm"
                    else f"the ARM has moved its anchors away from the objects: {self._slower}",
                )

    def _far_offsets(self, vitals: Vitals) -> Iterator[tuple[str, str, str]]:
        if self._anchors is None:
            return
        for name, largest in vitals.sizes.items():
            if self._lasts(name, largest * self._anchors.variances[1] > MAX_LOG_SCALE, LIMITED):
                yield (
                    f"far-{name.replace('_', '-')}",
                    f"{name} ask for boxes over 1000 times larger or smaller than their anchors (largest size offset "
                    f"{largest:.3g}); they are cut there",
                    f"the run is about to diverge: {self._slower}",
                )

    def _clipped_gradients(self, vitals: Vitals) -> Iterator[tuple[str, str, str]]:
        if not self.config.clip_norm:
            return
        self._clipped.append(vitals.gradient_norm * CLIP_FRACTION > self.config.clip_norm)
        clipped = sum(self._clipped)
        if clipped >= CLIPPED:
            yield (
                "gradients-clipped",
                f"{clipped} of the last {CLIP_WINDOW} gradients were cut to less than a fifth (the last "
                f"from a norm of {vitals.gradient_norm:.3g} to train.clip_norm, {self.config.clip_norm:g})",
                "raise train.clip_norm if the loss falls, lower train.lr if it does not",
            )

    def _risen_loss(self, vitals: Vitals, has_objects: bool) -> Iterator[tuple[str, str, str]]:
        # The loss of pictures without objects is another, and may be next to nothing.
        if not has_objects:
            return
        if len(self._recent) == RECENT:
            self._losses.append(self._recent[0])
        self._recent.append(vitals.total)
        if len(self._losses) < LOSS_WINDOW // 2 or vitals.total < LOSS_RISE * min(self._losses):
            return
        before, now = median(self._losses), median(self._recent)
        if now > LOSS_RISE * before:
            yield (
                "loss-risen",
                f"the loss has risen from a median of {before:.3g} to {now:.3g}",
                f"{self._slower}; start again from the best weights so far with --weights",
            )
