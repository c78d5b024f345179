"""From the options of a command to a detector that is ready to use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from refinedet_cli.core.config import PostprocessConfig
from refinedet_cli.core.tiling import Tiling
from refinedet_cli.engine.artefact import ArtefactPredictor, is_artefact, open_artefact
from refinedet_cli.engine.device import PrecisionName, select_precision
from refinedet_cli.engine.evaluate import with_postprocess
from refinedet_cli.engine.multi_scale import make_predictor
from refinedet_cli.engine.predict import AnyPredictor
from refinedet_cli.engine.tiling import with_tiles
from refinedet_cli.errors import UsageError
from refinedet_cli.zoo.checkpoint import LoadedDetector, load_detector
from refinedet_cli.zoo.hub import resolve_weights


def _refuse_for_artefact(path: Path, given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"--{option} does not go with {path.name}: an exported file computes as it was exported",
                f"leave --{option} out, or use the checkpoint",
            )


def _without_lower(loaded: LoadedDetector, least_score: float) -> LoadedDetector:
    """Raise the score threshold: who scores more is neither suppressed nor displaced by who scores less."""
    post = loaded.config.postprocess
    # The threshold must be passed, the least score only reached; scores are float32.
    threshold = float(np.nextafter(np.float32(least_score), np.float32(0)))
    if post.soft_nms_iou is not None or threshold <= post.score_threshold:
        return loaded
    return with_postprocess(loaded, replace(post, score_threshold=threshold))


def open_predictor(
    weights: str | None,
    *,
    device: torch.device,
    precision: PrecisionName | None,
    usual_precision: PrecisionName = "fp32",
    multi_scale: str | None = None,
    postprocess: PostprocessConfig | None = None,
    tiles: Tiling | None = None,
    batch: int | None = None,
    lanes: int = 1,
    least_score: float = 0.0,
) -> AnyPredictor:
    """Find weights and make them ready.

    Args:
        weights: as a user names them; None is the bundled detector.
        device: where to compute.
        precision: of the network, where somebody asked for one.
        usual_precision: of a checkpoint's network, where nobody did.
        multi_scale: a schedule's name or file; None looks at each picture once.
        postprocess: in place of the detector's own.
        tiles: how to cut larger pictures; None looks at them as a whole.
        batch: tiles computed together; None fits the device.
        lanes: as for `make_predictor`.
        least_score: detections that score less will not be looked at. Where none of them bears on the others, they are
            not even made, which saves time.

    Raises:
        CheckpointError: there are no such weights, or they cannot be used.
        ConfigError: the schedule does not exist or is not valid.
        UsageError: an exported file cannot do what is asked.
    """
    path = resolve_weights(weights)
    if is_artefact(path):
        _refuse_for_artefact(path, {"precision": precision, "multi-scale": multi_scale, "postprocess": postprocess})
        return with_tiles(ArtefactPredictor(open_artefact(path, device=device), device), tiles, batch)
    loaded = load_detector(path)
    if postprocess is not None:
        loaded = with_postprocess(loaded, postprocess)
    if multi_scale is None and tiles is None:
        loaded = _without_lower(loaded, least_score)
    chosen = select_precision(precision or usual_precision, device)
    predictor = make_predictor(loaded, device=device, precision=chosen, multi_scale=multi_scale, lanes=lanes)
    return with_tiles(predictor, tiles, batch)
