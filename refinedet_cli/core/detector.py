"""What every detector family offers, and all that the verbs may know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.loss import OverAll, alone
from refinedet_cli.core.structures import Candidates, LossParts, Targets


class Loss(Protocol):
    """The loss of a batch, or of one process's share of a batch."""

    def __call__(self, raw: Any, targets: Targets, *, over_all: OverAll = alone) -> LossParts:
        """Compute the loss of some pictures, or of none.

        Args:
            raw: what the network made of these pictures. Every tensor in it has the pictures as first dimension, and
                may be in tuples, named tuples, lists and dicts; all else in it follows from the input size.
            targets: their objects.
            over_all: sums a number over all processes that share the batch; no gradient flows through it. Whatever
                terms are divided by goes through it, in the same order and as often on every process, for no pictures
                too.

        Returns:
            `LossParts` of these pictures, with the divisors of the whole batch and the positives of these pictures:
            each value, summed over the processes, is that of the whole batch in one process.
        """


class Step(NamedTuple):
    """One move of every anchor.

    Attributes:
        name: of the module that makes it, for people.
        offsets: float[B, A, 4], from where the step before has left the anchors.
        positive_iou: overlap from which an anchor, as it lies before this step, learns an object.
        kept: bool[B, A], anchors that may still become detections; None for all.
    """

    name: str
    offsets: Tensor
    positive_iou: float
    kept: Tensor | None = None


@dataclass(frozen=True)
class Detector:
    """A network with the two readings of its output: a loss for training, candidates for detection.

    Attributes:
        config: what the detector was built from.
        network: float[B, 3, H, W], preprocessed, to a raw output that is private to the family. It draws nothing at
            random, and no picture's output depends on another's but through batch normalisation.
        criterion: raw output and the objects of the same pictures to the loss, see `Loss`.
        decoder: raw output to `Candidates`; non-maximum suppression is shared and comes after.
        steps: config and raw output to how it moves the anchors, step by step; None where the family has no anchors.
    """

    config: DetectorConfig
    network: nn.Module
    criterion: Loss
    decoder: Callable[[Any], Candidates]
    steps: Callable[[DetectorConfig, Any], tuple[Step, ...]] | None = None

    def forward(self, images: Tensor) -> Candidates:
        """Run the network and decode its output."""
        return self.decoder(self.network(images))
