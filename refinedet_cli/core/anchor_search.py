"""Search for the anchor shapes of every level that match most of a sample of objects.

A cell of a coarse level stands for many of a fine one, so a shape on stride 8 costs as many anchors as four on stride
16: how many shapes each level gets is part of the search. Layouts are built greedily, the best value for its anchors
first; then shapes are exchanged, and refined one at a time by differential evolution while the others stand.
"""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import differential_evolution

from refinedet_cli.core.anchor_pairs import Floats, Ints
from refinedet_cli.core.anchors import level_sizes
from refinedet_cli.core.config import AnchorConfig

# A hard step at 0.5 has no slope to climb; credit rises between these overlaps, and a little everywhere.
_RISE = (0.46, 0.54)
_SLOPE = 0.03
# What the tail and the smallest objects weigh beside all objects.
_TAIL_WEIGHT = 0.1
_SMALLEST_WEIGHT = 0.1
# Sizes and ratios of the shapes that greedy steps choose from, on each level.
_SIZES = 12
_RATIOS = 9
# A shape must add this to the value, or its anchors are saved; a round that adds less is the last.
_LEAST_GAIN = 1e-4
_ROUNDS = 4
_POPULATION = 8
_GENERATIONS = 10
# Shapes whose overlaps are computed at once, so that these stay in the cache.
_AT_ONCE = 32
# The argument of SciPy's generator was renamed.
_RNG = "rng" if "rng" in inspect.signature(differential_evolution).parameters else "seed"

Singles = NDArray[np.float32]


class Limits(NamedTuple):
    """What a shape may be.

    Attributes:
        smallest, largest: side of the square of the same area, in strides of the level; the paper's is 4. Smaller
            anchors would leave gaps between neighbours, larger ones need more context than the level's features see.
        flattest: longer side over shorter.
        per_cell: shapes of one cell; as many as the start has are always allowed.
    """

    smallest: float = 1.5
    largest: float = 6.0
    flattest: float = 5.0
    per_cell: int = 6

    def check(self) -> None:
        """Raise ValueError for limits that leave nothing to search."""
        if not (0 < self.smallest < self.largest and self.flattest > 1 and self.per_cell > 0):
            raise ValueError(f"expected 0 < smallest < largest, flattest > 1 and per_cell > 0, got {self}")


DEFAULT_LIMITS = Limits()


class Sample(NamedTuple):
    """Objects to fit anchors to.

    Attributes:
        boxes: float64[N, 4], xyxy, px-in, with positive width and height.
        smallest: bool[N], objects that count once more for being small.
        groups: bool[N, G], classes that may be among the worst; G may be 0.
    """

    boxes: Floats
    smallest: NDArray[np.bool_]
    groups: NDArray[np.bool_]


class Found(NamedTuple):
    """Shapes of each level as in `AnchorConfig`, in whole tenths of a pixel, and how many were tried."""

    shapes: tuple[tuple[tuple[float, float], ...], ...]
    evaluations: int


class _Shape(NamedTuple):
    level: int
    width: float
    height: float


class _Layout(NamedTuple):
    """Shapes with their overlaps with the sample, float32[len(shapes), N]."""

    shapes: tuple[_Shape, ...]
    overlaps: Singles

    def best(self, n: int) -> Singles:
        """float32[N], of all shapes."""
        return self.overlaps.max(axis=0) if len(self.shapes) else np.zeros(n, np.float32)

    def without(self, place: int) -> _Layout:
        return _Layout(self.shapes[:place] + self.shapes[place + 1 :], np.delete(self.overlaps, place, axis=0))

    def plus(self, shape: _Shape, overlaps: Singles) -> _Layout:
        """With one more shape, whose overlaps are float32[N]."""
        return _Layout((*self.shapes, shape), np.concatenate([self.overlaps, overlaps[None]]))


def search_shapes(
    sample: Sample,
    start: AnchorConfig,
    input_size: tuple[int, int],
    *,
    budget: int,
    limits: Limits,
    generator: np.random.Generator,
) -> Found:
    """Find shapes of high value for a sample.

    Args:
        sample: N > 0 objects.
        start: strides; its shapes are one of the beginnings if they are within the budget.
        input_size: (height, width), px-in.
        budget: the most anchors of one picture, at least one shape on every level.
        limits: what a shape may be.
        generator: of the only randomness.

    Returns:
        `Found`, with at least one shape on every level and at most ``budget`` anchors. A start within budget and limits
        is never of higher value, up to rounding to tenths.
    """
    return _Search(sample, start, input_size, budget, limits, generator).run(start)


class _Search:
    """Build layouts shape by shape, then improve one shape at a time."""

    def __init__(
        self,
        sample: Sample,
        start: AnchorConfig,
        input_size: tuple[int, int],
        budget: int,
        limits: Limits,
        generator: np.random.Generator,
    ) -> None:
        self.strides, self.budget, self.limits, self.generator = start.strides, budget, limits, generator
        self.per_cell = max(limits.per_cell, *(len(level) for level in start.shapes))
        grids = level_sizes(start, *input_size)
        self.cells = np.array([rows * columns for rows, columns in grids])
        self.evaluations = 0
        boxes = sample.boxes
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        self.width, self.height = (boxes[:, 2:] - boxes[:, :2]).T.astype(np.float32)
        self.area = self.width * self.height
        # From the centre to that of the nearest cell, per level and axis.
        self.distance = []
        for stride, (rows, columns) in zip(self.strides, grids, strict=True):
            cell = np.clip(centre // stride, 0, [columns - 1, rows - 1])
            self.distance.append(np.abs(centre - (cell + 0.5) * stride).T.astype(np.float32))
        # Means over all objects, over the smallest and over each group, as one matrix product.
        columns_of = np.concatenate([np.ones((len(boxes), 1)), sample.smallest[:, None], sample.groups], axis=1)
        self.means = (columns_of / columns_of.sum(axis=0).clip(min=1)).astype(np.float32)
        self.worst = math.ceil(sample.groups.shape[1] / 4)
        self.pool = self._layout(self._pool())

    def run(self, start: AnchorConfig) -> Found:
        """Search from several beginnings and keep the best."""
        nothing = self._layout(())
        # The finest level is the dearest: how many shapes it gets is tried, the rest follows.
        most = min(self.per_cell, self.budget // int(self.cells.max()))
        layouts = [self._fill(nothing, finest) for finest in range(1, most + 1)]
        own = tuple(_Shape(level, w, h) for level, shapes in enumerate(start.shapes) for w, h in shapes)
        if sum(self.cells[s.level] for s in own) <= self.budget:
            layouts.append(self._fill(self._layout(own), self.per_cell))
        best = max(layouts, key=self._value)
        for _ in range(_ROUNDS):
            before = self._value(best)
            best = self._exchange(self._refine(best))
            if self._value(best) < before + _LEAST_GAIN:
                break
        best = self._refine(best)
        rounded = [(s.level, round(s.width, 1), round(s.height, 1)) for s in best.shapes]
        rounded.sort(key=lambda shape: (shape[0], shape[1] * shape[2], shape[1]))
        levels = range(len(self.strides))
        return Found(tuple(tuple((w, h) for at, w, h in rounded if at == level) for level in levels), self.evaluations)

    def _pool(self) -> tuple[_Shape, ...]:
        limits = self.limits
        ratios = np.geomspace(1 / limits.flattest, limits.flattest, _RATIOS) ** 0.5
        return tuple(
            _Shape(level, float(size * r), float(size / r))
            for level, stride in enumerate(self.strides)
            for size, r in itertools.product(
                np.geomspace(limits.smallest * stride, limits.largest * stride, _SIZES), ratios
            )
        )

    def _layout(self, shapes: tuple[_Shape, ...]) -> _Layout:
        rows = [self._overlap(s.level, np.array([s.width]), np.array([s.height])) for s in shapes]
        return _Layout(shapes, np.concatenate([np.empty((0, len(self.width)), np.float32), *rows]))

    def _overlap(self, level: int, widths: Floats, heights: Floats) -> Singles:
        """Best overlap float32[S, N] of each shape anywhere on the level."""
        self.evaluations += len(widths)
        dx, dy = self.distance[level]
        w, h = widths.astype(np.float32)[:, None], heights.astype(np.float32)[:, None]
        wide = np.minimum(np.minimum(self.width, w), (self.width + w) / 2 - dx).clip(min=0)
        high = np.minimum(np.minimum(self.height, h), (self.height + h) / 2 - dy).clip(min=0)
        common: Singles = wide * high
        common /= self.area + w * h - common
        return common

    def _values(self, best: Singles) -> Floats:
        """Value of each row of best overlaps, float32[S, N]."""
        credit = np.clip((best - _RISE[0]) / (_RISE[1] - _RISE[0]), 0, 1)
        means = (((1 - _SLOPE) * credit + _SLOPE * best) @ self.means).astype(np.float64)
        value = (1 - _TAIL_WEIGHT - _SMALLEST_WEIGHT) * means[:, 0] + _SMALLEST_WEIGHT * means[:, 1]
        # Without groups the tail is everything.
        tail = np.sort(means[:, 2:], axis=1)[:, : self.worst] if self.worst else means[:, :1]
        total: Floats = value + _TAIL_WEIGHT * tail.mean(axis=1)
        return total

    def _value(self, layout: _Layout) -> float:
        return float(self._values(layout.best(len(self.width))[None])[0])

    def _cost(self, layout: _Layout) -> int:
        return int(sum(self.cells[s.level] for s in layout.shapes))

    def _fill(self, layout: _Layout, finest: int) -> _Layout:
        """Add shapes of the pool, the most value for its anchors first, until none is affordable or worth it.

        Every level gets one, worth it or not; the level of most cells gets at most ``finest``.
        """
        most = np.where(self.cells == self.cells.max(), finest, self.per_cell)
        level = np.array([s.level for s in self.pool.shapes])
        while True:
            counts = np.bincount([s.level for s in layout.shapes], minlength=len(self.cells))
            empty = counts == 0
            left = self.budget - self._cost(layout) - self.cells[empty].sum()
            allowed = empty | ((counts < most) & (self.cells <= left))
            places = np.flatnonzero(allowed[level])
            if not len(places):
                return layout
            best = layout.best(len(self.width))
            gains = self._gains(places, best)
            chosen = int(np.argmax(gains / self.cells[level[places]]))
            if gains[chosen] < _LEAST_GAIN:
                if not empty.any():
                    return layout
                chosen = int(np.argmax(np.where(empty[level[places]], gains, -1)))
            place = places[chosen]
            layout = layout.plus(self.pool.shapes[place], self.pool.overlaps[place])

    def _gains(self, places: Ints, best: Singles) -> Floats:
        """What each of these shapes of the pool would add."""
        parts = [
            self._values(np.maximum(self.pool.overlaps[places[at : at + _AT_ONCE]], best))
            for at in range(0, len(places), _AT_ONCE)
        ]
        gains: Floats = np.concatenate(parts) - self._values(best[None])
        return gains

    def _exchange(self, layout: _Layout) -> _Layout:
        """Take each shape out once and fill up again, keeping what is better."""
        value = self._value(layout)
        for shape in layout.shapes:
            if shape in layout.shapes:
                other = self._fill(layout.without(layout.shapes.index(shape)), self.per_cell)
                if self._value(other) > value + _LEAST_GAIN:
                    layout, value = other, self._value(other)
        return layout

    def _refine(self, layout: _Layout) -> _Layout:
        """Improve each shape while the others stand."""
        for shape in self.generator.permutation(np.array(layout.shapes)):
            old = _Shape(int(shape[0]), float(shape[1]), float(shape[2]))
            others = layout.without(layout.shapes.index(old))
            new = self._improve(old, others.best(len(self.width)))
            layout = others.plus(new, self._layout((new,)).overlaps[0])
        return layout

    def _improve(self, shape: _Shape, rest: Singles) -> _Shape:
        """Find the best shape of a level beside the others, whose best overlaps are ``rest``."""
        level, stride, limits = shape.level, self.strides[shape.level], self.limits

        def loss(x: Floats) -> Floats:  # [2] or [2, S]: logarithms of size and of the root of the ratio
            size, root = np.exp(x.reshape(2, -1))
            values = self._values(np.maximum(self._overlap(level, size * root, size / root), rest))
            return -values if x.ndim == 2 else -values[0]

        flattest = math.log(limits.flattest) / 2
        low = np.array([math.log(limits.smallest * stride), -flattest])
        high = np.array([math.log(limits.largest * stride), flattest])
        now = np.array([math.log(shape.width * shape.height) / 2, math.log(shape.width / shape.height) / 2])
        options: dict[str, Any] = {_RNG: self.generator}
        result = differential_evolution(
            loss,
            list(zip(low, high, strict=True)),
            maxiter=_GENERATIONS,
            popsize=_POPULATION,
            tol=0,
            polish=False,
            updating="deferred",
            vectorized=True,
            # Just inside: rounding must not put it outside.
            x0=np.clip(now, low + 1e-9, high - 1e-9),
            **options,
        )
        if -result.fun <= -float(loss(now[:, None])[0]):
            return shape
        size, root = math.exp(result.x[0]), math.exp(result.x[1])
        return _Shape(level, size * root, size / root)
