"""The benchmark of anchors, on a data set of drawn boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from refinedet_cli.core import anchor_design
from refinedet_cli.core.anchor_coverage import ObjectSet


@pytest.fixture
def anchors(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a small sample."""
    module = load_script("benchmarks/anchors.py")
    monkeypatch.setattr(anchor_design, "_COPIES", 2)
    return module


def write_part(path: Path, seed: int) -> None:
    """Write flat objects, which the paper's anchors hardly match, one to a picture."""
    generator = np.random.default_rng(seed)
    boxes = [
        [*generator.uniform(0, 150, 2).tolist(), *(generator.uniform(0.9, 1.1, 2) * (100, 22)).tolist()]
        for _ in range(40)
    ]
    document = {
        "categories": [{"id": 1, "name": "plank"}],
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 320, "height": 320} for i in range(40)],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)],
    }
    path.write_text(json.dumps(document), encoding="utf-8")


def test_the_search_is_compared_with_paper_and_clusters(
    anchors: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_part(tmp_path / "train.json", 0)
    write_part(tmp_path / "val.json", 1)
    assert anchors.main([str(tmp_path), "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}: 40 objects to fit, 40 to judge"
    names = [line[:22].strip() for line in lines[2:7]]
    assert names == ["paper", "k-means", "search, seed 0", "search, seed 1", "search, twice as many"]
    number, val = ([line[22:].split()[i] for line in lines[2:7]] for i in (0, 2))
    assert number[0] == "6,375"
    assert all(int(n.replace(",", "")) <= 6375 for n in number[2:4])
    assert float(val[0]) < 50 < 90 < float(val[2])
    assert lines[7].startswith("over 2 seeds: ")


def test_clusters_go_to_the_levels_by_area(anchors: ModuleType) -> None:
    sides = np.repeat(np.arange(1, 13) * 20.0, 5)
    boxes = np.stack([sides * 0, sides * 0, sides, sides], axis=1)
    found = anchors.cluster(ObjectSet(boxes, np.ones(60, np.int64), np.arange(60), 60))
    assert [round(w) for level in found.shapes for w, _ in level] == [20 * k for k in range(1, 13)]


def test_both_ways_to_count_a_million_agree(anchors: ModuleType) -> None:
    text = anchors.million(pictures=50, each=4)
    assert text.startswith("200 boxes, 50 pictures: coverage ")
    one, other = text.split("matched ")[1].replace(" %", "").split(" and ")
    assert one == other


@pytest.mark.parametrize("options", [[], ["--seeds", "x"]])
def test_wrong_options_are_refused(anchors: ModuleType, options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        anchors.main(options)
    assert ended.value.code == 2
