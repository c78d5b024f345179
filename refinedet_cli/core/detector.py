"""What every detector family offers, and all that the verbs may know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.structures import Candidates, LossParts, Targets


@dataclass(frozen=True)
class Detector:
    """A network with the two readings of its output: a loss for training, candidates for detection.

    Attributes:
        config: what the detector was built from.
        network: float[B, 3, H, W], preprocessed, to a raw output that is private to the family.
        criterion: raw output and the objects of the same batch to the loss.
        decoder: raw output to `Candidates`; non-maximum suppression is shared and comes after.
    """

    config: DetectorConfig
    network: nn.Module
    criterion: Callable[[Any, Targets], LossParts]
    decoder: Callable[[Any], Candidates]

    def forward(self, images: Tensor) -> Candidates:
        """Run the network and decode its output."""
        return self.decoder(self.network(images))
