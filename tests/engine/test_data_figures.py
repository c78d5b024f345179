from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Dataset
from refinedet_cli.data.placement import Part
from refinedet_cli.data.records import Objects, Pictures, make_records
from refinedet_cli.engine.data_figures import _drawable, draw_stats
from refinedet_cli.engine.data_stats import DataStats, measure


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinedet_cli.engine.charts.DPI", 40)


def stats(names: Sequence[str], objects_each: Sequence[int]) -> DataStats:
    draw = np.random.default_rng(0)
    count = len(objects_each)
    sizes = [(int(w), int(h)) for w, h in draw.integers(50, 900, (count, 2))]
    pictures = Pictures(list(range(count)), [""] * count, [Path()] * count, sizes)
    objects = Objects()
    for i, number in enumerate(objects_each):
        for _ in range(number):
            objects.ids.append(len(objects.ids) + 1)
            objects.pictures.append(i)
            objects.labels.append(int(draw.integers(1, len(names) + 1)))
            objects.boxes.append([0.0, 0.0, *draw.uniform(0.05, sizes[i]).tolist()])
            objects.areas.append(float("nan"))
            objects.crowd.append(False)
            objects.difficult.append(False)
    classes = Classes(names=tuple(names), category_ids=tuple(range(1, len(names) + 1)))
    dataset = Dataset("x", classes, make_records(pictures, objects, str).records)
    return measure([Part(None, dataset)], preset="tiny", input_size=(64, 96))


def files(data: DataStats) -> list[str]:
    found = []
    for name, png in draw_stats(data):
        assert np.ptp(np.array(Image.open(io.BytesIO(png)).convert("L"))) > 100
        found.append(name)
    return found


ALL = ["pictures.png", "objects_per_picture.png", "classes.png", "sizes.png"]


@pytest.mark.parametrize(
    ("names", "each"),
    [
        (("cat", "$x$", "猫猫", "long" * 20), [0, 3, 9, 1]),
        ([f"class {i}" for i in range(70)], [200, 0, 1]),
    ],
)
def test_every_set_can_be_drawn(names: Sequence[str], each: list[int]) -> None:
    assert files(stats(names, each)) == ALL


def test_what_has_no_objects_has_fewer_charts() -> None:
    assert files(stats(("cat",), [0, 0])) == ALL[:2]


def test_names_that_the_font_lacks() -> None:
    assert _drawable("naïve café", 3) == "naïve café"
    assert _drawable("猫", 3) == "class 3"
    assert _drawable("x" * 50, 3) == "x" * 31 + "…"
