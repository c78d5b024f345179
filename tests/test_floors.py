"""The floors hold, and each contract that holds them can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# For every contract a line that breaks it and nothing else does.
BREACHES = {
    "floors": ("data/dataset.py", "import refinedet_cli.engine.predict"),
    "terminal": ("engine/predict.py", "import rich"),
    "light": ("core/presets.py", "import torch"),
    "core": ("core/boxes.py", "import PIL"),
    "commands": ("cli/train.py", "import refinedet_cli.cli.detect"),
}


def _contracts(root: Path) -> list[dict[str, str]]:
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    return subprocess.run([program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_the_floors_hold(root):
    done = _lint(root)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_contract_has_a_breach(root):
    assert {contract["id"] for contract in _contracts(root)} == set(BREACHES)


@pytest.fixture(scope="module")
def verdicts(root, tmp_path_factory) -> dict[str, str]:
    """What is said of each contract in a copy of the package with all the breaches."""
    copy = tmp_path_factory.mktemp("breached")
    shutil.copy(root / "pyproject.toml", copy)
    shutil.copytree(root / "refinedet_cli", copy / "refinedet_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name, line in BREACHES.values():
        path = copy / "refinedet_cli" / name
        path.write_text(f"{path.read_text()}\n{line}\n")
    done = _lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return {
        c["id"]: line.rsplit(" ", 1)[-1] for c in _contracts(root) for line in lines if line.startswith(c["name"] + " ")
    }


@pytest.mark.parametrize("contract", BREACHES)
def test_a_breach_is_noticed(contract, verdicts):
    assert verdicts[contract] == "BROKEN"
