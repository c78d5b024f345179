"""Multi-scale testing: one picture looked at in several sizes, mirrored too, and what was found voted together.

Source: paper, "+" results; passes, limits and voting are those of the official test scripts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from refinedet_cli.core.config import PostprocessConfig, PreprocessConfig
from refinedet_cli.core.postprocess import pixel_iou
from refinedet_cli.core.structures import Detections
from refinedet_cli.errors import ConfigError

SCHEDULE_NAMES = ("voc", "coco")

_STEP = 64
_LARGEST_SIDE = 4096

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ScalePass:
    """One size in which a picture is looked at.

    Attributes:
        size: side of the network input, px-in; where ``short_side`` is given, that of the picture's longer side.
        short_side: input side for the picture's shorter side; None makes the input square.
        mirror: look at the mirrored picture too, which makes it two passes.
        max_side_above: keep only boxes whose longer side, plus 1, is above this, px-img; None keeps all.
        min_side_below: keep only boxes whose shorter side, plus 1, is below this, px-img; None keeps all.
    """

    size: int
    short_side: int | None = None
    mirror: bool = True
    max_side_above: float | None = None
    min_side_below: float | None = None

    def __post_init__(self) -> None:
        for name in ("size", "short_side"):
            side = getattr(self, name)
            if side is not None and not (0 < side <= _LARGEST_SIDE and side % _STEP == 0):
                raise ConfigError(
                    f"{name} of a pass must be a multiple of {_STEP} from {_STEP} to {_LARGEST_SIDE}, not {side}"
                )
        if self.short_side is not None and self.short_side > self.size:
            raise ConfigError(f"short_side of a pass must not be above its size {self.size}, not {self.short_side}")
        for name in ("max_side_above", "min_side_below"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ConfigError(f"{name} of a pass must be positive, not {limit:g}")

    @property
    def count(self) -> int:
        """How often the network runs."""
        return 2 if self.mirror else 1

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the network input, px-in, for a picture of this height and width."""
        short = self.short_side or self.size
        return (short, self.size) if width > height else (self.size, short)


@dataclass(frozen=True, kw_only=True)
class ScaleSchedule:
    """The passes of multi-scale testing, and how what they find becomes one result.

    Attributes:
        name: what people call it.
        passes: in this order; of equal scores, the earlier pass leads.
        voting: "average" is `vote`, "soft" is `soft_vote`.
        voting_iou: boxes of one class that overlap the best of them by at least this are voted together.
        picture_side: the limits of the passes are for pictures whose longer side is so many pixels, and grow with the
            picture; None takes them as they are for all pictures, as the official code does.
    """

    name: str
    passes: tuple[ScalePass, ...]
    voting: Literal["average", "soft"] = "average"
    voting_iou: float = 0.45
    picture_side: int | None = None

    def __post_init__(self) -> None:
        if not self.passes:
            raise ConfigError(f"the multi-scale schedule {self.name} has no passes", "add [[passes]] with a size")
        if not 0 < self.voting_iou <= 1:
            raise ConfigError(f"voting_iou must be in (0, 1], not {self.voting_iou:g}")
        if self.picture_side is not None and self.picture_side <= 0:
            raise ConfigError(f"picture_side must be positive, not {self.picture_side}")

    @property
    def count(self) -> int:
        """How often the network runs for one picture."""
        return sum(entry.count for entry in self.passes)

    @property
    def pixels(self) -> int:
        """Input pixels of all passes over one picture, px-in."""
        return sum(entry.count * entry.size * (entry.short_side or entry.size) for entry in self.passes)

    @property
    def has_limits(self) -> bool:
        """Whether some pass keeps only boxes of certain sizes."""
        return any(entry.max_side_above is not None or entry.min_side_below is not None for entry in self.passes)


class _Row(NamedTuple):
    """A pass as a factor of the base input; ``short`` is the factor of the shorter side."""

    scale: float
    short: float | None = None
    above: float | None = None
    below: float | None = None
    schedules: tuple[str, ...] = SCHEDULE_NAMES


# Where rounding makes two passes equal the first stays, so the wider limit has to come first.
_TABLES: dict[int, tuple[_Row, ...]] = {
    320: (
        _Row(1.0),
        _Row(1.0, short=0.6),
        _Row(0.6, above=32),
        _Row(1.2, below=160),
        _Row(1.4, below=128),
        _Row(1.6, below=96),
        _Row(1.8, below=64),
        _Row(2.0, below=48, schedules=("coco",)),
        _Row(2.2, below=32),
    ),
    512: (
        _Row(1.0),
        _Row(1.0, short=0.75),
        _Row(0.5),
        _Row(0.75),
        _Row(1.25, below=224, schedules=("coco",)),
        _Row(1.5, below=192),
        _Row(1.75, below=128),
        _Row(2.0, below=96, schedules=("coco",)),
        _Row(2.25, below=64, schedules=("coco",)),
    ),
}


def named_schedule(name: Literal["voc", "coco"], preprocess: PreprocessConfig) -> ScaleSchedule:
    """Build the published schedule for a detector's input.

    Args:
        name: "voc" votes with `vote`, "coco" has more passes and votes with `soft_vote`.
        preprocess: of the detector; its input must be square.

    Returns:
        `ScaleSchedule`; at 320 px 16 (voc) or 18 (coco) runs of the network, at 512 px 12 or 18. Other inputs take the
        factors of the nearer of the two (320 up to 384 px), with sides rounded to multiples of 64; passes that become
        equal are one. Limits stay, because objects do not change with the input.

    Raises:
        ConfigError: the input is not square.

    Source: official test scripts, multi_scale_test_net_320 and _512.
    """
    base = preprocess.height
    if base != preprocess.width:
        raise ConfigError(
            f"the multi-scale schedule {name} is made for square inputs, and this detector's is "
            f"{preprocess.width} x {base} px",
            "write the sizes into a schedule of your own: --multi-scale FILE.toml",
        )
    table = _TABLES[min(_TABLES, key=lambda side: max(side, base) / min(side, base))]
    passes: dict[tuple[int, int], ScalePass] = {}
    for row in table:
        size = _rounded(row.scale * base)
        short = size if row.short is None else _rounded(row.short * base)
        if name in row.schedules and (size, short) not in passes:
            passes[size, short] = ScalePass(
                size=size,
                short_side=None if short == size else short,
                max_side_above=row.above,
                min_side_below=row.below,
            )
    return ScaleSchedule(name=name, passes=tuple(passes.values()), voting="soft" if name == "coco" else "average")


def _rounded(side: float) -> int:
    return _STEP * max(1, int(side / _STEP + 0.5))


def mirrored(found: Detections, width: int) -> Detections:
    """Turn detections of a mirrored picture of this width, px-img, into those of the picture; twice is no change."""
    left, top, right, bottom = found.boxes.unbind(1)
    return Detections(torch.stack([width - right, top, width - left, bottom], dim=1), found.scores, found.labels)


def within_limits(found: Detections, entry: ScalePass, scale: float = 1.0) -> Detections:
    """Keep the boxes whose size a pass is meant for.

    Args:
        found: what the pass found in one picture.
        entry: its limits are exclusive, and compared with sides plus 1 px as in the official code.
        scale: factor on the limits.

    Returns:
        the detections that stay, in order.
    """
    sides = found.boxes[:, 2:] - found.boxes[:, :2] + 1
    chosen = torch.ones(len(found), dtype=torch.bool)
    if entry.max_side_above is not None:
        chosen &= sides.amax(dim=1) > entry.max_side_above * scale
    if entry.min_side_below is not None:
        chosen &= sides.amin(dim=1) < entry.min_side_below * scale
    return Detections(found.boxes[chosen], found.scores[chosen], found.labels[chosen])


def pool(found: Sequence[Detections], schedule: ScaleSchedule, config: PostprocessConfig) -> Detections:
    """Vote together, class by class, what several passes found in one picture.

    Args:
        found: of each pass, px-img of the same picture; may be empty.
        schedule: kind and overlap of the voting.
        config: ``score_threshold`` for the members that soft voting keeps, and ``keep``.

    Returns:
        the ``keep`` best voted boxes, best first, inside the picture if those of the passes are.
    """
    boxes = np.concatenate([d.boxes.double().numpy() for d in found] or [np.zeros((0, 4))])
    scores = np.concatenate([d.scores.double().numpy() for d in found] or [np.zeros(0)])
    labels = np.concatenate([d.labels.numpy() for d in found] or [np.zeros(0, np.int64)])
    voted = [_Voted(np.zeros((0, 4)), np.zeros(0))]
    names = [np.zeros(0, np.int64)]
    for label in np.unique(labels):
        of_class = labels == label
        if schedule.voting == "soft":
            voted.append(soft_vote(boxes[of_class], scores[of_class], schedule.voting_iou, config.score_threshold))
        else:
            voted.append(vote(boxes[of_class], scores[of_class], schedule.voting_iou))
        names.append(np.full(len(voted[-1].scores), label))
    every = np.concatenate([v.scores for v in voted])
    best = np.argsort(-every, kind="stable")[: config.keep]
    return Detections(
        boxes=torch.from_numpy(np.concatenate([v.boxes for v in voted])[best]).float(),
        scores=torch.from_numpy(every[best]).float(),
        labels=torch.from_numpy(np.concatenate(names)[best]),
    )


class _Voted(NamedTuple):
    """Boxes float64[N, 4], xyxy, px-img, and their scores float64[N], in no order."""

    boxes: Floats
    scores: Floats


def vote(boxes: Floats, scores: Floats, iou: float) -> _Voted:
    """Merge the boxes of one class: the best takes in all that overlap it, again and again.

    Args:
        boxes: float64[N, 4], xyxy, px-img, finite.
        scores: float64[N], positive.
        iou: overlap (`pixel_iou`) from which on a box is taken in.

    Returns:
        M <= N boxes, each the mean of its members weighted by their scores, with the best of their scores.

    Source: bbox_vote of the official test scripts.
    """
    merged = [_mean(members) for members in _clusters(boxes, scores, iou)]
    return _joined(merged)


def soft_vote(boxes: Floats, scores: Floats, iou: float, score_threshold: float) -> _Voted:
    """Merge as `vote` does, and keep the members too where they are far enough from the best of them.

    Args:
        boxes: float64[N, 4], xyxy, px-img, finite.
        scores: float64[N], positive.
        iou: overlap from which on a box is taken in.
        score_threshold: the least that a kept member must score, inclusive.

    Returns:
        the boxes of `vote`, and every member with its score times (1 - its overlap with the best one).

    Source: soft_bbox_vote of the official test scripts.
    """
    merged = []
    for members in _clusters(boxes, scores, iou):
        lowered = members.scores * (1 - members.overlaps)
        # The best one itself ends at 0, and no detection scores that.
        stays = (lowered >= score_threshold) & (lowered > 0)
        merged += [_mean(members), _Voted(members.boxes[stays], lowered[stays])]
    return _joined(merged)


class _Members(NamedTuple):
    """Boxes that vote together, best first, with their scores and their overlaps with the first."""

    boxes: Floats
    scores: Floats
    overlaps: Floats


def _clusters(boxes: Floats, scores: Floats, iou: float) -> Iterator[_Members]:
    """Part boxes into groups around the best one left; each box comes once."""
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    while len(scores):
        overlaps = pixel_iou(boxes[0], boxes)
        joins = overlaps >= iou
        joins[0] = True  # also if it were not finite: else this would not end
        yield _Members(boxes[joins], scores[joins], overlaps[joins])
        boxes, scores = boxes[~joins], scores[~joins]


def _mean(members: _Members) -> _Voted:
    if len(members.scores) == 1:
        return _Voted(members.boxes, members.scores)
    weighted = (members.boxes * members.scores[:, None]).sum(axis=0) / members.scores.sum()
    return _Voted(weighted[None], members.scores[:1])


def _joined(parts: Sequence[_Voted]) -> _Voted:
    if not parts:
        return _Voted(np.zeros((0, 4)), np.zeros(0))
    return _Voted(np.concatenate([p.boxes for p in parts]), np.concatenate([p.scores for p in parts]))
