"""From a config to a detector, whatever its family."""

from __future__ import annotations

from refinedet_cli.core import refinedet, ssd, yolo
from refinedet_cli.core.config import DetectorConfig
from refinedet_cli.core.detector import Detector

FAMILIES = {"refinedet": refinedet.build, "ssd": ssd.build, "yolo": yolo.build}


def build(config: DetectorConfig) -> Detector:
    """Build a detector with fresh weights, drawn from torch's global generator."""
    return FAMILIES[config.family](config)
