from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refinedet_cli.engine.charts.DPI", 40)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two pictures that are not on disk, one of them empty."""
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 320} for i in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 64, 32]},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 2, 900]},
        ],
        "categories": [{"id": 1, "name": "[cat]"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "emu"}],
    }
    path = tmp_path / "pets.json"
    path.write_text(json.dumps(document))
    return path


def test_tables(run: Run, pets: Path) -> None:
    code, stdout, stderr = run("data", "stats", pets, "--preset", "tiny")
    assert code == 0, stderr
    lines = [line.split() for line in stdout.splitlines()]
    assert ["all", "2", "1", "2", "1.0", "2", "0", "0"] in lines
    assert ["[cat]", "1", "50.0", "%", "1", "6"] in lines
    assert ["emu", "0", "0.0", "%", "0", "-"] in lines
    assert ["640", "x", "320", "2", "100.0", "%"] in lines
    assert ["[cat]", "+", "dog", "1", "50.0", "%"] in lines
    assert "clipped" in stderr


def test_the_document_and_the_files(run: Run, pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run("data", "stats", pets, "--preset", "tiny", "--out", out, "--json")
    assert code == 0, stderr
    document = json.loads(stdout)
    assert document["total"]["objects"] == 2
    assert [one["name"] for one in document["classes"]] == ["[cat]", "dog", "emu"]
    assert document["classes"][2]["side"] is None
    assert document["together"] == [{"first": "[cat]", "second": "dog", "pictures": 1}]
    names = ["stats.json", "pictures.png", "objects_per_picture.png", "classes.png", "sizes.png"]
    assert document["files"] == [str(out / name) for name in names]
    written = json.loads((out / "stats.json").read_text())
    del document["files"]
    assert written == document


def test_mistakes(run: Run, pets: Path, tmp_path: Path) -> None:
    assert run("data", "stats", pets, "--out", pets).code == 2
    assert run("data", "stats", pets, "--preset", "none").code == 3
    assert run("data", "stats", tmp_path / "none").code == 4
