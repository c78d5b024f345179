from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from refinedet_cli.core.presets import DEFAULT_PRESET
from refinedet_cli.engine.data_stats import DataStats, Pair, PartStats, describe_data
from refinedet_cli.errors import ConfigError

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "emu"}]


def write(
    path: Path, pictures: list[tuple[int, int]], objects: list[tuple[int, int, list[float], dict[str, int]]]
) -> None:
    """Pictures by size; objects are (picture, class, xywh, flags)."""
    document = {
        "images": [
            {"id": i, "file_name": f"{path.stem}{i}.png", "width": w, "height": h}
            for i, (w, h) in enumerate(pictures, start=1)
        ],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": box, **flags}
            for k, (i, c, box, flags) in enumerate(objects, start=1)
        ],
        "categories": CATEGORIES,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


@pytest.fixture
def stats(tmp_path: Path) -> DataStats:
    """No picture is on disk."""
    write(
        tmp_path / "train.json",
        [(640, 320), (640, 320), (320, 640)],
        [
            (1, 1, [0, 0, 20, 10], {}),
            (1, 1, [0, 0, 40, 40], {"difficult": 1}),
            (1, 2, [0, 0, 200, 100], {}),
            (3, 1, [0, 0, 300, 300], {"iscrowd": 1}),
        ],
    )
    write(tmp_path / "val.json", [(640, 320)], [(1, 2, [0, 0, 320, 320], {}), (1, 1, [1, 1, 96, 96], {})])
    return describe_data(str(tmp_path), preset="refinedet320_vgg16")


def test_parts(stats: DataStats) -> None:
    assert stats.parts == (
        PartStats("train", pictures=3, empty=1, objects=3, crowds=1, difficult=1, most=3),
        PartStats("val", pictures=1, empty=0, objects=2, crowds=0, difficult=0, most=2),
    )
    assert stats.total == PartStats("all", pictures=4, empty=1, objects=5, crowds=1, difficult=1, most=3)


def test_classes(stats: DataStats) -> None:
    cat, dog, emu = stats.by_class
    assert (cat.name, cat.objects, cat.pictures, cat.by_part) == ("cat", 3, 2, (2, 1))
    assert (dog.name, dog.objects, dog.pictures, dog.by_part) == ("dog", 2, 2, (1, 1))
    assert (emu.objects, emu.pictures, emu.by_part) == (0, 0, (0, 0))
    # Widths are halved at the 320 x 320 input: 10 x 10, 20 x 40 and 48 x 96.
    assert cat.side == pytest.approx(np.sqrt(20 * 40))
    assert np.isnan(emu.side)
    assert stats.pairs == (Pair("cat", "dog", 2),)


def test_sizes(stats: DataStats) -> None:
    assert stats.input_size == (320, 320)
    assert stats.common_sizes == ((640, 320, 3), (320, 640, 1))
    np.testing.assert_allclose(stats.input_sides[0], [10, 10])
    np.testing.assert_allclose(stats.sides[0], [20, 10])
    # 20 x 10 is small, 40 x 40 medium; 96 x 96 and more are large.
    assert stats.by_area == (1, 1, 3)
    spreads = {spread.name: spread.values for spread in stats.spreads}
    assert spreads["picture width"] == pytest.approx((320, 368, 640, 640, 640))
    assert spreads["objects in a picture"][0] == 0
    assert spreads["object width : height"][-1] == 2


def test_the_default_input_is_that_of_the_default_detector(tmp_path: Path) -> None:
    write(tmp_path / "a.json", [(64, 64)], [])
    stats = describe_data(str(tmp_path / "a.json"))
    assert stats.preset == DEFAULT_PRESET
    assert stats.total == PartStats("all", 1, 1, 0, 0, 0, 0)
    assert len(stats.spreads) == 4
    with pytest.raises(ConfigError):
        describe_data(str(tmp_path / "a.json"), preset="none")
