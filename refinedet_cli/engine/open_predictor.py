"""From the options of a command to a detector that is ready to use."""

from __future__ import annotations

import torch

from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.engine.device import PrecisionName, select_precision
from refinedet_cli.engine.evaluate import with_postprocess
from refinedet_cli.engine.multi_scale import make_predictor
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.zoo.checkpoint import load_detector
from refinedet_cli.zoo.hub import resolve_weights


def open_predictor(
    weights: str | None,
    *,
    device: torch.device,
    precision: PrecisionName | None,
    multi_scale: str | None = None,
    postprocess: PostprocessConfig | None = None,
) -> AnyPredictor:
    """Find weights and make them ready.

    Args:
        weights: as a user names them; None is the bundled detector.
        device: where to compute.
        precision: of the network; None is fp32.
        multi_scale: a schedule's name or file; None looks at each picture once.
        postprocess: in place of the detector's own.

    Raises:
        CheckpointError: there are no such weights, or they cannot be used.
        ConfigError: the schedule does not exist or is not valid.
    """
    loaded = load_detector(resolve_weights(weights))
    if postprocess is not None:
        loaded = with_postprocess(loaded, postprocess)
    chosen = select_precision(precision or "fp32", device)
    return make_predictor(loaded, device=device, precision=chosen, multi_scale=multi_scale)
