"""What leaves the house: the wheel carries weights and licence, and works where the repository is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import refinedet_cli

# What a wheel is built from; a folder of the working tree that is not listed cannot leak into it.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "refinedet_cli", "weights")


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    # A pure wheel is installed by unpacking it.
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _python(code_or_args: list[str], *, site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The editable install is further down the path than PYTHONPATH.
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *code_or_args], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_name_version_licence_and_command(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    assert info.name == f"refinedet-{refinedet_cli.__version__}.dist-info"
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "refinedet = refinedet_cli.cli.app:run" in (info / "entry_points.txt").read_text()


def test_all_code_and_nothing_else_is_inside(unpacked, root):
    def modules(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in (folder / "refinedet_cli").rglob("*.py")}

    assert modules(unpacked) == modules(root)
    assert (unpacked / "refinedet_cli" / "py.typed").is_file()
    assert {p.name for p in unpacked.iterdir() if p.suffix != ".dist-info"} == {"refinedet_cli"}


def test_weights_are_inside_byte_for_byte(unpacked, root):
    expected = {p.name: p.read_bytes() for pattern in ("*.safetensors", "manifest.toml", "README.md")
                for p in (root / "weights").glob(pattern)}  # fmt: skip
    if not expected:
        pytest.skip("weights/ holds nothing yet")
    inside = unpacked / "refinedet_cli" / "_weights"
    assert {p.name: p.read_bytes() for p in inside.iterdir()} == expected


def test_the_unpacked_wheel_is_what_runs(unpacked, tmp_path):
    done = _python(["-c", "import refinedet_cli; print(refinedet_cli.__file__)"], site=unpacked, cwd=tmp_path)
    assert Path(done.stdout.strip()) == unpacked / "refinedet_cli" / "__init__.py", done.stderr


def test_detect_runs_from_the_wheel_in_an_empty_folder(unpacked, root, tmp_path):
    if not list((root / "weights").glob("*.safetensors")):
        pytest.skip("no bundled weights in weights/ yet")
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    call = "import sys; from refinedet_cli.cli.app import run; run()"
    done = _python(
        ["-c", call, "detect", "picture.png", "--out", "found", "--device", "cpu", "--json"],
        site=unpacked,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["command"] == "detect"
    assert [i["file_name"] for i in json.loads((tmp_path / "found" / "detections.json").read_text())["images"]]
