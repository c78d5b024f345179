"""Which pictures come how often."""

from __future__ import annotations

import numpy as np

from refinedet_cli.data.dataset import Dataset


def repeat_factors(dataset: Dataset, threshold: float) -> np.ndarray:
    """Compute how often pictures should come compared to others, so that rare classes are not drowned.

    A class in a fraction f of the pictures asks for max(1, sqrt(threshold / f)); a picture gets the most that any of
    its classes asks for. Crowds do not count.

    Args:
        dataset: pictures and their objects.
        threshold: fraction of the pictures from which a class is not rare.

    Returns:
        float64[pictures], at least 1.

    Source: repeat factor sampling, LVIS (arXiv:1908.03195).
    """
    present = [np.unique(record.labels[~record.crowd]) for record in dataset.records]
    pictures = np.bincount(np.concatenate(present), minlength=len(dataset.classes) + 1)
    wanted = np.maximum(1.0, np.sqrt(threshold * len(present) / np.maximum(pictures, 1)))
    return np.array([wanted[labels].max(initial=1.0) for labels in present])


def draw_weighted(weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw so many places with these weights, as evenly as can be.

    Args:
        weights: float64[N], positive.
        count: places to draw.
        generator: the only source of randomness.

    Returns:
        int64[count], ascending; each place comes as often as its share says, rounded down or up.
    """
    marks = (np.arange(count) + generator.random()) / count
    shares = np.cumsum(weights) / np.sum(weights)
    drawn: np.ndarray = np.searchsorted(shares, marks, side="right").clip(max=len(weights) - 1)
    return drawn


def draw_companions(pictures: int, weights: np.ndarray | None, count: int, generator: np.random.Generator) -> list[int]:
    """Draw so many pictures, each on its own, with the weights they come with."""
    shares = None if weights is None else weights / weights.sum()
    return [int(i) for i in generator.choice(pictures, size=count, p=shares)]
