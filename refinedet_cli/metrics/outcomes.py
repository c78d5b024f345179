"""What became of every detection of a class: the common ground of the metrics and of their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The detections of one class in all pictures, best score first.

    A detection is right or wrong by its own picture alone, so the outcomes of pictures drawn with repetition are these,
    counted as often as their picture was drawn.

    Attributes:
        picture: int64[D], place of the picture among all pictures, by ascending id.
        scores: float64[D], descending; of equal scores in the order of the pictures.
        right: bool[T, D], whether it found an object that counts, at each of T overlaps.
        counted: bool[T, D], whether it is right or wrong; the others found an object that does not count.
        objects: int64[P], objects to be found in each picture.
    """

    picture: NDArray[np.int64]
    scores: NDArray[np.float64]
    right: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    objects: NDArray[np.int64]
