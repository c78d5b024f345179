"""The detectors that `speed.py` compares: ours, and torchvision's with random weights made like trained ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from PIL import Image
from speed_timing import Bench
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from refinedet_cli.core.build import build
from refinedet_cli.core.detector import Detector
from refinedet_cli.core.fused import FusedNetwork
from refinedet_cli.core.preprocess import preprocess
from refinedet_cli.core.presets import VOC_CLASSES, get_preset
from refinedet_cli.data.images import read_image
from refinedet_cli.engine.device import Precision
from refinedet_cli.engine.lanes import lanes_for
from refinedet_cli.engine.open_predictor import open_predictor
from refinedet_cli.zoo.checkpoint import load_detector, save_checkpoint
from refinedet_cli.zoo.hub import resolve_weights

# Of logits over the places of a picture, as the heads of trained detectors have it.
SPREAD = 2.5
# Pairs of box and class that score above a detector's own threshold, in the mean of the pictures.
PASSING = 200
SAMPLE = 5


class Stand(NamedTuple):
    """A detector of torchvision.

    Attributes:
        model: ready to be called, with most places made background.
        raw: the same with its random head as it was drawn.
        passing: scores above the model's own threshold, for each of the sampled pictures.
        raw_passing: the same of ``raw``.
    """

    model: nn.Module
    raw: nn.Module
    passing: tuple[int, ...]
    raw_passing: tuple[int, ...]


class Head(NamedTuple):
    """The last layers of a detector, of which some biases are those of background.

    Attributes:
        layers: convolutions.
        classes: with background, which comes first.
        stride: outputs of one anchor.
    """

    layers: Sequence[nn.Conv2d]
    classes: int
    stride: int

    def lower(self, shift: float) -> None:
        """Make background so much more likely."""
        with torch.no_grad():
            for layer in self.layers:
                _biases(layer).view(-1, self.stride)[:, 0] += shift

    def scale(self, factor: float) -> None:
        """Draw the class logits apart."""
        with torch.no_grad():
            for layer in self.layers:
                for values in (layer.weight, _biases(layer)):
                    values.unflatten(0, (-1, self.stride))[:, : self.classes] *= factor


def _biases(layer: nn.Conv2d) -> Tensor:
    if layer.bias is None:
        raise ValueError("a head without biases")
    return layer.bias


# --- ours


def paper_weights(bench: Bench) -> Path:
    """Save the paper's detector for the 20 classes of VOC with random weights that act like trained ones."""
    path = bench.folder / f"{bench.sizes.paper}.safetensors"
    if path.is_file():
        return path
    config = get_preset(bench.sizes.paper, VOC_CLASSES).detector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = build(config)
    network: Any = detector.network.eval()
    head = Head([*network.odm.levels], config.classes.with_background, config.classes.with_background + 4)
    inputs = sample_inputs(bench, detector)

    act_like_trained(head, lambda: network(inputs).odm_logits, config.postprocess.score_threshold)
    save_checkpoint(path, config, network.state_dict(), {"note": "random, to be timed"})
    return path


def default_weights(bench: Bench) -> str | None:
    """Name the weights of the default detector, which are the bundled ones; None as users leave it out."""
    return None if bench.sizes.default == "refinedet320_mobilenetv2" else str(paper_weights(bench))


def open_ours(bench: Bench, weights: str | None, precision: Precision | None = None, least_score: float = 0.0) -> Any:
    """Make a detector ready as `refinedet detect` does; None leaves the precision to it."""
    lanes = lanes_for(bench.device)
    return open_predictor(
        weights, device=bench.device, precision=precision or "auto", lanes=lanes, least_score=least_score
    )


def load_ours(weights: str | None) -> Detector:
    """Load a detector on the CPU, to take it apart."""
    return load_detector(resolve_weights(weights)).detector


def inference_network(detector: Detector, device: torch.device, precision: Precision) -> nn.Module:
    """Make the network that `engine.predict.Predictor` computes with."""
    size = detector.config.preprocess
    bf16 = precision == "bf16"
    return FusedNetwork(detector.network, device=device, bf16=bf16, input_size=(size.height, size.width))


def sample_inputs(bench: Bench, detector: Detector, count: int = SAMPLE) -> Tensor:
    """Preprocess some pictures: float32[N, 3, height, width] on the CPU."""
    config = detector.config.preprocess
    return torch.stack([preprocess(torch.from_numpy(read_image(path)), config) for path in turn(bench, count)])


def turn(bench: Bench, count: int) -> list[Path]:
    """Take so many pictures, from the start again after the last."""
    return [bench.pictures[i % len(bench.pictures)] for i in range(count)]


# --- torchvision's


def peer(bench: Bench, name: str, classes: int) -> Stand:
    """Build a single-shot detector of torchvision with random weights, and make it act like a trained one.

    Args:
        bench: whose pictures it is fitted to.
        name: of its function in `torchvision.models.detection`.
        classes: without background.
    """
    passing = []
    models: list[Any] = []
    for fit in (_fit_peer, lambda *_: None):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            make: Any = getattr(torchvision.models.detection, name)
            model = make(weights=None, weights_backbone=None, num_classes=classes + 1).to(bench.device).eval()
        images = [open_picture(path).to(bench.device) for path in turn(bench, SAMPLE)]
        fit(model, images)
        passing.append(tuple(_passing(logits, model.score_thresh) for logits in _peer_logits(model, images)))
        models.append(model)
    return Stand(models[0], models[1], passing[0], passing[1])


def look(model: nn.Module, paths: Iterable[Path], device: torch.device) -> int:
    """Find objects the way a first script does: picture by picture, from the file to boxes; returns how many."""
    found = 0
    with torch.inference_mode():
        for path in paths:
            (detections,) = model([open_picture(path).to(device)])
            found += len(detections["boxes"].cpu())
    return found


def open_picture(path: Path) -> Tensor:
    """Decode with Pillow: float32[3, H, W] in [0, 1]."""
    with Image.open(path) as image:
        tensor: Tensor = to_tensor(image.convert("RGB"))
    return tensor


def _fit_peer(model: Any, images: Sequence[Tensor]) -> None:
    # Without statistics of its own, a random network with batch normalisation fades out over its layers.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all that it is shown
        norm.reset_running_stats()
        norm.train()
    if norms:
        _peer_logits(model, images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    scoring = model.head.classification_head
    layers = [level if isinstance(level, nn.Conv2d) else level[-1] for level in scoring.module_list]
    head = Head(layers, scoring.num_columns, scoring.num_columns)
    act_like_trained(head, lambda: _peer_logits(model, images), model.score_thresh)


@torch.no_grad()
def _peer_logits(model: Any, images: Sequence[Tensor]) -> Tensor:
    """Class logits float32[B, A, classes], by the steps of the model's own forward."""
    batch, _ = model.transform([*images])
    logits: Tensor = model.head([*model.backbone(batch.tensors).values()])["cls_logits"]
    return logits


# --- random heads


@torch.no_grad()
def act_like_trained(head: Head, logits: Callable[[], Tensor], threshold: float) -> None:
    """Change a random head so that it tells places apart, and about `PASSING` scores a picture pass the threshold.

    A random head gives all boxes much the same score; then either none passes, or tens of thousands, which no trained
    detector hands to its post-processing.
    """
    head.scale(SPREAD / float(logits().std()))
    drawn = logits()
    low, high = -100.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        passing = sum(_passing(of_picture, threshold, middle) for of_picture in drawn)
        low, high = (middle, high) if passing > PASSING * len(drawn) else (low, middle)
    head.lower(high)


def _passing(logits: Tensor, threshold: float, shift: float = 0.0) -> int:
    shifted = logits.clone()
    shifted[:, 0] += shift
    return int((shifted.softmax(dim=-1)[:, 1:] > threshold).sum())
