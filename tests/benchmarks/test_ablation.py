"""The ablation: trained for a few steps on drawn pictures, then its table against the files it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.cli.app import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # one core
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
SMALL = ("preprocess.height=64", "preprocess.width=64", "network.tcb_channels=16", "train.precision=fp32")


@pytest.fixture
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/ablation.py")


@pytest.fixture
def data(noise_set: Path) -> str:
    return str(noise_set)


def test_it_trains_what_is_missing_and_lays_out_what_is_there(script, data, tmp_path, monkeypatch, capsys):
    calls: list[Sequence[str]] = []

    def call(arguments: Sequence[str]) -> None:
        calls.append(arguments)
        assert main([*arguments]) == 0

    monkeypatch.setattr(script, "refinedet", call)
    out = tmp_path / "out"
    options = [
        "--table", "recipe", "--only", "batch-8", "--train", data, "--val", data, "--test", data, "--start", "none",
        "--steps", "8", "--batch", "2", "--seeds", "1", "--workers", "0", "--out", str(out),
    ]  # fmt: skip
    for setting in SMALL:
        options += ["--set", setting]
    script.main(options)
    assert [arguments[0] for arguments in calls] == ["train", "eval"] * 2
    capsys.readouterr()
    # The other batch sees as many pictures: 8 steps of 2 are 2 of 8 (of which there are but 4).
    settings = [json.loads((out / name / "config.json").read_text())["train"] for name in ("default-0", "batch-8-0")]
    assert [(s["batch"], s["steps"]) for s in settings] == [(2, 8), (8, 2)]

    calls.clear()
    script.main(options)
    assert not calls
    lines = capsys.readouterr().out.splitlines()
    assert lines == (out / "table.md").read_text().splitlines()
    scores, evaluations = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert len(scores) == 4
    assert evaluations[0] == "| pictures seen | the default recipe |"  # the other batch is evaluated at other points
    for line, name in zip(scores[2:], ("default-0", "batch-8-0"), strict=True):
        metrics = json.loads((out / name / "test" / "metrics.json").read_text())
        numbers = {n["name"]: n["value"] for n in metrics["numbers"]} if "numbers" in metrics else metrics["metrics"]
        assert f"{numbers['AP50']:.3f}" in line
    with Image.open(out / "curve.png") as picture:
        assert picture.width > 500

    # Against itself nothing differs, and what stopped in the middle goes on.
    (out / "batch-8-0" / "test" / "metrics.json").unlink()
    script.main(options)
    assert "--resume" in calls[0]


def test_training_is_followed_and_the_leader_named(script):
    def curve(title: str, seen: Sequence[int], *seeds: Sequence[float]) -> object:
        scores = np.stack([seeds, np.zeros_like(seeds)], axis=-1)
        return script.Curve(title, np.array(seen), scores)

    first = curve("A", [900, 1800, 2700], [0.1, 0.25, 0.3], [0.3, 0.25, 0.4])
    behind_once = curve("B", [900, 1800, 2700], [0.1, 0.3, 0.2])
    never_ahead = curve("C", [900, 1800, 2700], [0.0, 0.0, 0.0])
    elsewhere = curve("D", [500, 2700], [0.5, 0.5])
    assert script.follow([first, behind_once, never_ahead, elsewhere]) == [
        "| pictures seen | A | B | C |",
        "| --- | --- | --- | --- |",
        "| 900 | 0.200 (0.100 to 0.300) | 0.100 (0.100 to 0.100) | 0.000 (0.000 to 0.000) |",
        "| 1,800 | 0.250 (0.250 to 0.250) | 0.300 (0.300 to 0.300) | 0.000 (0.000 to 0.000) |",
        "| 2,700 | 0.350 (0.300 to 0.400) | 0.200 (0.200 to 0.200) | 0.000 (0.000 to 0.000) |",
        "",
        "Mean AP, A against B: A begins ahead, the lead changes at 1,800, 2,700.",
        "",
        "Mean AP, A against C: A begins ahead and stays there.",
    ]


def test_an_unknown_row_is_named(script, data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--train", data, "--val", data, "--test", data, "--out", str(tmp_path), "--only", "yolo9"])
    assert "yolo9" in capsys.readouterr().err


def test_every_row_names_settings_that_exist(script):
    from refinedet_cli.core.config import Classes
    from refinedet_cli.core.presets import PRESETS
    from refinedet_cli.engine.run_file import read_run_file
    from refinedet_cli.engine.start import resolve_config

    classes = Classes(names=("a",), category_ids=(1,))
    for variants in script.TABLES.values():
        for variant in variants.values():
            assert variant.preset in PRESETS
            resolve_config(classes, variant.preset, "none", read_run_file(None), variant.settings)
