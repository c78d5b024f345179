"""The README is held to what it says: its commands, options, presets, exit codes and Python lines."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from refinedet_cli import errors
from refinedet_cli.cli.app import INTERRUPTED
from refinedet_cli.core.presets import PRESETS
from refinedet_cli.zoo.hub import read_manifest


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_every_command_and_option_exists(run, readme):
    calls = re.findall(r"refinedet (anchors|detect|eval|train)\b([^\n`#]*)", readme)
    assert {command for command, _ in calls} == {"anchors", "detect", "eval", "train"}
    for command, rest in calls:
        known = run(command, "--help").stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert re.search(rf"{option}\b", known), f"{command} has no {option}"


def test_every_preset_is_listed(readme):
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == set(PRESETS)


def test_every_exit_code_is_listed(readme):
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.RefineDetError)]
    codes = {0, INTERRUPTED, *(kind.exit_code for kind in kinds)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)} == codes


def test_the_python_lines_run(readme, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert set(vars(names["found"])) == {"boxes", "scores", "labels"}


def test_links_lead_to_files(root, readme):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", readme):
        assert (root / target).is_file(), target


def test_weights_readme_names_every_bundled_file(root):
    text = (root / "weights" / "README.md").read_text(encoding="utf-8")
    for name, entry in read_manifest().items():
        assert f"`{name}`" in text
        assert f"{entry['AP50']:.3f}" in text, f"weights/README.md does not state the AP50 of {name}"
