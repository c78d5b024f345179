"""What tests of the benchmarks share: a small drawn data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def noise_set(tmp_path: Path) -> Path:
    """A COCO file of four pictures of noise, 80 x 70 pixels, with a person of 30 x 20 px in each."""
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 70} for i in range(4)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [5, 5, 30, 20], "area": 600, "iscrowd": 0}
            for i in range(4)
        ],
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(document))
    return path
