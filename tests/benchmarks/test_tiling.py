"""The benchmark of tiling, on drawn pictures and an untrained detector."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny


@pytest.fixture
def benchmark(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/tiling.py")


def test_it_prints_a_row_for_every_way(benchmark, noise_set, tmp_path, save_random, capsys):
    weights = save_random(tmp_path / "tiny.safetensors", tiny(Classes(names=("person",), category_ids=(1,))).detector)
    options = ["--weights", str(weights), "--grid", "2", "--mosaics", "1", "--tile", "80", "--pictures", "1"]
    benchmark.main([str(noise_set), *options])
    head, *rows, seconds = capsys.readouterr().out.splitlines()
    assert head == benchmark.HEAD
    assert len(rows) == 14
    # 160 x 140 px in tiles of 80 that share 16, and the whole.
    assert [row.split()[-4] for row in rows[:7]] == ["1.0", *["6.0"] * 3, *["7.0"] * 3]
    assert seconds.endswith(" s")
