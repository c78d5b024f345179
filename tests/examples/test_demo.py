"""The example that writes photographs."""

from __future__ import annotations

import subprocess
import sys

from PIL import Image

NAMES = {"astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png"}


def test_photographs_are_written_and_named(root, tmp_path):
    command = [sys.executable, str(root / "examples" / "demo.py"), str(tmp_path / "new" / "photos")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = list((tmp_path / "new" / "photos").iterdir())
    assert {p.name for p in written} == NAMES
    assert sorted(done.stdout.split()) == sorted(map(str, written))
    for path in written:
        with Image.open(path) as picture:
            assert min(picture.size) >= 300


def test_without_a_folder_it_says_what_it_wants(root):
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "demo.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "usage" in done.stderr
