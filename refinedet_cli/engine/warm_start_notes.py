"""What a warm start took over, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from refinedet_cli.core.config import Classes, DetectorConfig, PreprocessConfig, to_dict
from refinedet_cli.data.dataset import listed
from refinedet_cli.zoo.warm_start import WarmStart

_MOST_NAMES = 20


class _Part(NamedTuple):
    """How many tensors of a part of the network were taken as they were, taken in another order, and not taken."""

    name: str
    kept: int
    remapped: int
    fresh: int

    @property
    def tensors(self) -> int:
        return self.kept + self.remapped + self.fresh


_CALLED = {"arm": "ARM", "tcb": "TCB", "odm": "ODM", "arm_blocks": "ARM blocks", "odm_blocks": "ODM blocks"}


def _parts(taken: WarmStart) -> list[_Part]:
    counts = [
        Counter(name.partition(".")[0] for name in names) for names in (taken.copied, taken.remapped, taken.fresh)
    ]
    names = dict.fromkeys(["backbone", "arm", "tcb", "odm", *(name for count in counts for name in count)])
    parts = [_Part(name, *(count[name] for count in counts)) for name in names]
    return [part for part in parts if part.tensors]


def parts_line(taken: WarmStart) -> str:
    """Say of each part of the network whether it is kept, remapped or new: "backbone, ARM, TCB kept; ODM remapped"."""
    said: dict[str, list[str]] = {"kept": [], "kept in part": [], "remapped": [], "new": []}
    for part in _parts(taken):
        name = _CALLED.get(part.name, part.name)
        if part.fresh == part.tensors:
            said["new"].append(name)
        elif part.fresh:
            said["kept in part"].append(f"{name} ({part.tensors - part.fresh} of {part.tensors} tensors)")
        else:
            said["remapped" if part.remapped else "kept"].append(name)
    return "; ".join(f"{', '.join(names)} {what}" for what, names in said.items() if names)


def explain(
    taken: WarmStart, new: DetectorConfig, old: DetectorConfig, label_map: Mapping[int, int]
) -> tuple[str, ...]:
    """Say what became of classes, anchors and input.

    Args:
        taken: what was taken over.
        new: of the detector to train.
        old: of the one that the weights are of.
        label_map: new label to old label of the class outputs that were taken over.

    Returns:
        lines that begin with "start: ".
    """
    return (
        _classes_line(new.classes, old.classes, label_map),
        *_anchor_notes(taken),
        *_input_notes(new.preprocess, old.preprocess),
    )


def _classes_line(new: Classes, old: Classes, label_map: Mapping[int, int]) -> str:
    """Say which class outputs were known, under which other name, and which are new."""
    pairs = [(new.names[label - 1], old.names[place - 1]) for label, place in sorted(label_map.items())]
    taken = [name if name == before else f"{name} (there {before})" for name, before in pairs]
    fresh = [name for label, name in enumerate(new.names, start=1) if label not in label_map]
    if not fresh:
        renamed = [line for line, (name, _) in zip(taken, pairs, strict=True) if line != name]
        return "start: all class outputs taken over by name" + (f": {listed(renamed, _MOST_NAMES)}" if renamed else "")
    new_ones = listed(fresh, _MOST_NAMES)
    if not taken:
        return f"start: no class output taken over; new: {new_ones}"
    return f"start: class outputs taken over by name: {listed(taken, _MOST_NAMES)}; new: {new_ones}"


def _anchor_notes(taken: WarmStart) -> list[str]:
    ious = [one.iou for level in taken.anchors for one in level]
    if not ious:
        return []
    same = sum(iou == 1.0 for iou in ious)
    also = f"{same} of {len(ious)} are the same; " if same else ""
    return [
        "start: anchors are not those of the weights: each begins with the outputs of the nearest shape of its level "
        f"({also}overlap {min(ious):.2f} at least)"
    ]


def _input_notes(new: PreprocessConfig, old: PreprocessConfig) -> list[str]:
    now, before = to_dict(new), to_dict(old)
    differing = [f"preprocess.{name} {now[name]} (there {before[name]})" for name in now if now[name] != before[name]]
    return [f"start: differs from the input of the weights: {', '.join(differing)}"] if differing else []
