"""What tests of the commands share: drawn pictures, and small detectors of the families that came later."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, DetectorConfig
from refinedet_cli.core.presets import ssd320_mobilenetv2, tiny, yolo320_mobilenetv2
from refinedet_cli.zoo.checkpoint import save_checkpoint

CLASSES = Classes(names=("person", "cat", "dog"), category_ids=(1, 17, 18))
SIZES = ((60, 80), (97, 41), (120, 150))


@pytest.fixture(scope="session")
def coloured_squares(
    tmp_path_factory: pytest.TempPathFactory, draw_squares: Callable[..., dict[str, Any]]
) -> Callable[[int], Path]:
    """Draw so many pictures of 64 x 64 pixels with a square each, green and red in turn: the path of squares.json."""
    colours = {3: ("green", (30, 200, 30)), 4: ("red", (200, 30, 30))}

    def draw(count: int) -> Path:
        folder = tmp_path_factory.mktemp("data")
        path = folder / "squares.json"
        path.write_text(json.dumps(draw_squares(folder, [[3 + i % 2] for i in range(count)], colours, seed=1)))
        return path

    return draw


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three pictures of coloured patches, 0.png to 2.png, of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate(SIZES):
        patches = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(patches).resize((width, height)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def label_photos(photos: Path) -> Callable[[str, Sequence[tuple[int, list[int]]]], Path]:
    """Make a COCO data set of the photographs: ``label_photos("one.json", [(1, [2, 3, 20, 30])])``.

    Pictures have ids from 1; a box is [left, top, width, height], and the objects are dogs and cats in turn.
    """

    def write(name: str, boxes: Sequence[tuple[int, list[int]]]) -> Path:
        pictures = [
            {"id": i, "file_name": f"{i - 1}.png", "width": width, "height": height}
            for i, (height, width) in enumerate(SIZES, start=1)
        ]
        annotations = [
            {"id": k, "image_id": i, "category_id": 17 + k % 2, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (i, box) in enumerate(boxes, start=1)
        ]
        categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
        path = photos / name
        path.write_text(json.dumps({"images": pictures, "annotations": annotations, "categories": categories}))
        return path

    return write


@pytest.fixture(scope="session")
def small_config() -> Callable[..., DetectorConfig]:
    """A small detector of a family, of persons, cats and dogs unless told otherwise: ``small_config("yolo")``."""

    def make(family: str, classes: Classes = CLASSES) -> DetectorConfig:
        if family == "ssd":
            base = ssd320_mobilenetv2(classes).detector
            anchors = tiny(classes).detector.anchors
            return replace(base, anchors=anchors, preprocess=replace(base.preprocess, height=64, width=64))
        base = yolo320_mobilenetv2(classes).detector
        grid = replace(base.grid, channels=32, layers=1)
        return replace(base, grid=grid, preprocess=replace(base.preprocess, height=128, width=128))

    return make


@pytest.fixture(scope="session")
def small_weights(
    tmp_path_factory: pytest.TempPathFactory,
    small_config: Callable[..., DetectorConfig],
    save_spread: Callable[[Path, DetectorConfig], Path],
) -> Callable[[str], Path]:
    """The file of a small detector of a family that is sure of what it says; made once."""

    @functools.cache
    def make(family: str) -> Path:
        save = {"ssd": save_spread, "yolo": _save_sure}[family]
        return save(tmp_path_factory.mktemp("weights") / "small.safetensors", small_config(family))

    return make


def _save_sure(path: Path, config: DetectorConfig) -> Path:
    """Save a seeded random YOLO whose outputs spread as those of a trained one; no box is a sliver."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = build(config).network
        inputs = nn.functional.interpolate(torch.rand(16, 3, 5, 5), size=(128, 128)) * 2 - 1
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network.train()(inputs)
        features = network.eval().head(network.backbone(inputs)[2])
        classes, boxes = len(config.classes), config.grid.boxes
        for layer, middle, wanted in (
            (network.classes, [0.3] * classes, [0.4] * classes),
            (network.boxes, [0.5, 0.5, 0.5, 0.5, 0.3] * boxes, [0.3, 0.3, 0.08, 0.08, 0.35] * boxes),
        ):
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            given = layer(features).transpose(0, 1).flatten(1)
            factor = torch.tensor(wanted) / given.std(dim=1)
            layer.weight *= factor[:, None, None, None]
            layer.bias.copy_(torch.tensor(middle) - given.mean(dim=1) * factor)
    save_checkpoint(path, config, network.state_dict(), {})
    return path
