"""Numbers that must not change unnoticed: what the bundled weights find, and every preset's anchors and first loss.

`pytest tests/test_golden.py --record-golden` writes them anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch

from refinedet_cli.api import Detector
from refinedet_cli.core.anchors import tile_anchors
from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import PRESETS, get_preset
from refinedet_cli.core.structures import Target, Targets

Golden = Callable[[str, Any], Any]
TWO = Classes(names=("cat", "dog"), category_ids=(1, 2))


@pytest.fixture
def golden(request: pytest.FixtureRequest, root: Path) -> Golden:
    """Give the recorded values of a name: ``golden(name, found)``; with --record-golden they become what was found."""

    def recorded(name: str, found: Any) -> Any:
        path = root / "tests" / "golden" / f"{name}.json"
        if request.config.getoption("--record-golden"):
            path.write_text(json.dumps(found, indent=1) + "\n")
        return json.loads(path.read_text())

    return recorded


def test_what_the_bundled_weights_find(golden: Golden) -> None:
    folder = Path(skimage.data.__file__).parent
    detector = Detector.load("refinedet320_mobilenetv2", device="cpu", precision="fp32")
    found = {}
    for name in ("astronaut", "chelsea", "coffee"):
        objects = detector.predict(folder / f"{name}.png", score=0.3)
        rows = zip(objects.names, objects.scores.tolist(), objects.boxes.tolist(), strict=True)
        found[name] = [{"class": c, "score": round(s, 4), "box": [round(v, 2) for v in box]} for c, s, box in rows]
    expected = golden("bundled", found)
    assert found.keys() == expected.keys()
    for name, objects in expected.items():
        assert [o["class"] for o in found[name]] == [o["class"] for o in objects], name
        for key, tolerance in (("score", 1e-3), ("box", 0.2)):
            ours, theirs = ([o[key] for o in side] for side in (found[name], objects))
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=tolerance)


def test_every_preset_s_anchors(golden: Golden) -> None:
    found = {}
    for name in PRESETS:
        detector = get_preset(name, TWO).detector
        if detector.anchors is None:
            continue
        anchors = tile_anchors(detector.anchors, detector.preprocess.height, detector.preprocess.width).double()
        ends = [[round(v, 6) for v in anchors[place].tolist()] for place in (0, -1)]
        found[name] = {"count": len(anchors), "ends": ends, "means": [round(v, 6) for v in anchors.mean(0).tolist()]}
    expected = golden("anchors", found)
    assert {name: one["count"] for name, one in found.items()} == {n: one["count"] for n, one in expected.items()}
    for name, one in expected.items():
        for key in ("ends", "means"):
            torch.testing.assert_close(torch.tensor(found[name][key]), torch.tensor(one[key]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["tiny", "ssd320_mobilenetv2", "yolo320_mobilenetv2"])
def test_the_first_loss_of_each_family(golden: Golden, name: str) -> None:
    """Of outputs that are numbers in a row, so that neither a generator nor a network has a say."""
    config = get_preset(name, TWO).detector
    config = replace(config, preprocess=replace(config.preprocess, height=64, width=64))
    detector = build(config)
    raw = detector.network(torch.zeros(2, 3, 64, 64))
    outputs = _in_a_row(raw)
    objects = [Target(torch.tensor([[0.1, 0.2, 0.6, 0.7], [0.5, 0.5, 0.9, 1.0]]), torch.tensor([1, 2]))]
    loss = detector.criterion(
        outputs, Targets.pack([*objects, Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))])
    )
    found = {part: round(float(value), 4) for part, value in loss.parts.items()}
    expected = golden(f"loss-{name}", found)
    assert found == pytest.approx(expected, rel=1e-4)


def _in_a_row(value: Any) -> Any:
    """Replace the tensors that a network has computed, and keep the rest of its output."""
    if isinstance(value, tuple):
        made = [_in_a_row(part) for part in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return torch.linspace(-2, 2, value.numel()).reshape(value.shape)
    return value
