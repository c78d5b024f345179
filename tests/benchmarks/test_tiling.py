"""The benchmark of tiling, on drawn pictures and an untrained detector."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny


@pytest.fixture
def benchmark(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/tiling.py")


def test_it_prints_a_row_for_every_way(benchmark, tmp_path, save_random, capsys):
    weights = save_random(tmp_path / "tiny.safetensors", tiny(Classes(names=("person",), category_ids=(1,))).detector)
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
    (tmp_path / "data.json").write_text(json.dumps(document))
    options = ["--weights", str(weights), "--grid", "2", "--mosaics", "1", "--tile", "80", "--pictures", "1"]
    benchmark.main([str(tmp_path / "data.json"), *options])
    head, *rows, seconds = capsys.readouterr().out.splitlines()
    assert head == benchmark.HEAD
    assert len(rows) == 14
    # 160 x 140 px in tiles of 80 that share 16, and the whole.
    assert [row.split()[-4] for row in rows[:7]] == ["1.0", *["6.0"] * 3, *["7.0"] * 3]
    assert seconds.endswith(" s")
