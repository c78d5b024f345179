"""The README is held to what it says: its commands, options, presets, exit codes and Python lines."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from refinedet_cli import api, errors
from refinedet_cli.cli.app import INTERRUPTED, all_commands
from refinedet_cli.core.presets import PRESETS
from refinedet_cli.zoo.hub import read_manifest


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_every_command_and_option_exists(run, readme):
    names = "|".join(sorted(all_commands(), key=len, reverse=True))
    calls = re.findall(rf"refinedet ({names})\b([^\n`#]*)", readme)
    for command, rest in calls:
        known = run(*command.split(), "--help").stdout
        for option in re.findall(r"--[a-z-]+", rest):
            assert re.search(rf"{option}\b", known), f"{command} has no {option}"


def test_every_preset_is_listed(readme):
    assert set(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == set(PRESETS)


def test_every_exit_code_is_listed(readme):
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.RefineDetError)]
    codes = {0, INTERRUPTED, *(kind.exit_code for kind in kinds)}
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.MULTILINE)} == codes


def test_the_python_lines_run(readme, tmp_path, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for name in ("street.jpg", "park.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["found"].path.name == "park.jpg"


def test_the_python_lines_that_train_and_publish_are_calls_that_exist(readme, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    calls: list[str] = []

    def stand_in(function):
        def call(*args, **settings):
            inspect.signature(function).bind(*args, **settings)
            calls.append(function.__name__)

        return call

    publish = stand_in(api.Detector.push_to_hub)
    detector = SimpleNamespace(push_to_hub=lambda *args, **settings: publish(None, *args, **settings))
    monkeypatch.setattr(api, "train", stand_in(api.train))
    monkeypatch.setattr(api, "Detector", SimpleNamespace(load=lambda name: detector))
    exec(compile(code, "README.md", "exec"), {})
    assert calls == ["train", "push_to_hub"]


def test_links_lead_to_files(root, readme):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", readme):
        assert (root / target).is_file(), target


def test_weights_readme_names_every_bundled_file(root):
    text = (root / "weights" / "README.md").read_text(encoding="utf-8")
    for name, entry in read_manifest().items():
        assert f"`{name}`" in text
        assert f"{entry['AP50']:.3f}" in text, f"weights/README.md does not state the AP50 of {name}"
