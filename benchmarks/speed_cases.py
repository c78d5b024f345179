"""Random cases of post-processing, counted against the brute force of its tests."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.postprocess import Best, suppress, top_candidates, try_suppress
from refinedet_cli.core.structures import BatchDetections, Candidates

# Some that two boxes of a grid can overlap by exactly, although no float is that number.
LIMITS = (0.0, 0.25, 0.3, 0.45, 0.5, 0.6, 0.7, 1.0)
KEEPS = (200, 5, 1)
CANDIDATES = (400, 9)
THRESHOLD = 0.125
# Of a case; every twentieth one is a single picture of more anchors, where chains of suppression are long.
MOST_PICTURES, MOST_ANCHORS, MOST_CLASSES = 2, 12, 4
MANY_ANCHORS = 40

Listed = tuple[float, int, tuple[float, ...]]


class Case:
    """One random case.

    Boxes lie on a coarse grid, where overlaps repeat and hit the limit; in every other case scores repeat, too.

    Args:
        index: of the case, which settles its kind.
        generator: draws the rest.
    """

    def __init__(self, index: int, generator: torch.Generator) -> None:
        def draw(most: int) -> int:
            return int(torch.randint(1, most + 1, (), generator=generator))

        is_long = index % 20 == 0
        pictures = 1 if is_long else draw(MOST_PICTURES)
        anchors = MANY_ANCHORS if is_long else draw(MOST_ANCHORS)
        classes = draw(2 if is_long else MOST_CLASSES)
        self.boxes = torch.stack(
            [reference().random_row(generator, anchors, 1, ties=False)[0] for _ in range(pictures)]
        )  # [B, A, 4]
        self.scores = torch.rand(pictures, anchors, classes, generator=generator)
        if index % 2:
            self.scores = (self.scores * 4).round() / 4
        self.config = PostprocessConfig(
            score_threshold=THRESHOLD,
            candidates=CANDIDATES[index // 4 % len(CANDIDATES)],
            candidates_per="class" if index // 2 % 2 else "picture",
            nms_iou=LIMITS[index % len(LIMITS)],
            keep=KEEPS[index % len(KEEPS)],
        )

    def is_right(self, device: torch.device) -> bool:
        """Whether post-processing, in either of its forms, chooses, keeps and drops what plain loops do."""
        best = Best(*(t.cpu() for t in top_candidates(self.scores.to(device), self.config)))
        boxes = torch.stack([of_picture[chosen] for of_picture, chosen in zip(self.boxes, best.anchors, strict=True)])
        entering = Candidates(boxes, best.scores, best.labels)
        there = Candidates(*(t.to(device) for t in entering))
        # The form of a GPU computes on a CPU too, and as many rounds as there are places settle every case.
        forms = (suppress(there, self.config), try_suppress(there, self.config, boxes.shape[2]).found)
        found = [BatchDetections(*(t.cpu() for t in form)) for form in forms]
        for i, scores in enumerate(self.scores):
            kept = self._kept(entering, i)
            if not is_best_choice(scores, Best(*(t[i] for t in best)), self.config):
                return False
            if not all(same_detections(kept, form, i, self.config.keep) for form in found):
                return False
        return True

    def _kept(self, entering: Candidates, i: int) -> list[Listed]:
        kept: list[Listed] = []
        for row in zip(*(t[i] for t in entering), strict=True):
            stays = torch.tensor(reference().brute_force(*row, self.config.nms_iou), dtype=torch.bool)
            kept += _listed(*(t[stays] for t in row))
        return kept


@cache
def reference() -> ModuleType:
    """Load the brute force of the tests, with exact fractions and plain loops, and the way they draw boxes."""
    path = Path(__file__).resolve().parent.parent / "tests" / "core" / "test_postprocess.py"
    spec = importlib.util.spec_from_file_location("postprocess_reference", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is needed: run this in a clone")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def wrong_cases(cases: int, device: torch.device | None = None, seed: int = 0) -> int:
    """Count the random cases in which post-processing, from scores to detections, differs from brute force.

    Args:
        cases: how many.
        device: where post-processing computes; None is the CPU.
        seed: of the cases.
    """
    generator = torch.Generator().manual_seed(seed)
    return sum(not Case(i, generator).is_right(device or torch.device("cpu")) for i in range(cases))


def is_best_choice(scores: Tensor, best: Best, config: PostprocessConfig) -> bool:
    """Tell whether the candidates of a picture are the best there are; of equal scores any may have been taken.

    Args:
        scores: float32[A, C-1], all of the picture.
        best: what was chosen, of one picture.
        config: as `top_candidates`.
    """
    groups = [scores] if config.candidates_per == "picture" else list(scores.T)
    for g, group in enumerate(groups):
        passing = sorted((s for s in group.flatten().tolist() if s > config.score_threshold), reverse=True)
        wanted = passing[: config.candidates]
        rows = [t[g].tolist() for t in best]
        filled = list(zip(*(row[: len(wanted)] for row in rows), strict=True))
        if rows[0] != wanted + [0.0] * (len(rows[0]) - len(wanted)):
            return False
        if len({(anchor, label) for _, anchor, label in filled}) != len(filled):
            return False
        if any(float(scores[anchor, label - 1]) != score for score, anchor, label in filled):
            return False
        if config.candidates_per == "class" and any(label != g + 1 for *_, label in filled):
            return False
    return True


def same_detections(kept: Sequence[Listed], found: BatchDetections, i: int, keep: int) -> bool:
    """Compare what was found in a picture with all that brute force keeps, of which the best ``keep`` are wanted."""
    wanted = sorted(kept, reverse=True)
    total = int(found.counts[i])
    shown = _listed(*(t[i, :total] for t in found[:3]))
    return (
        total == min(keep, len(wanted))
        and [score for score, *_ in shown] == [score for score, *_ in wanted[:total]]
        # Of equal scores any may have been taken.
        and not Counter(shown) - Counter(wanted)
        and not any(bool(t[i, total:].any()) for t in found[:3])
    )


def _listed(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Listed]:
    columns = zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return [(score, label, tuple(box)) for box, score, label in columns]
