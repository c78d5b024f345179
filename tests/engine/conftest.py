"""What tests of runs and pages share: small data sets, options, a strict comparison of what runs leave, a browser."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.engine.run_state import load_state
from refinedet_cli.engine.train import RunOptions

RunComparison = Callable[[Path, Path], None]


@pytest.fixture(scope="session")
def few_squares(tmp_path_factory: pytest.TempPathFactory, draw_squares: Callable[..., dict[str, Any]]) -> Path:
    """A folder with twelve pictures of 64 x 64 pixels, two squares each, one class rare; train.json and val.json."""
    folder = tmp_path_factory.mktemp("squares")
    labels = [[1, 2] if i == 5 else [1, 1] for i in range(12)]
    drawn = draw_squares(folder, labels, {1: ("yellow", (200, 190, 30)), 2: ("blue", (30, 190, 200))}, seed=2)
    for name, count in (("train", 12), ("val", 4)):
        objects = [a for a in drawn["annotations"] if a["image_id"] < count]
        document = {**drawn, "images": drawn["images"][:count], "annotations": objects}
        (folder / f"{name}.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def bright_squares(
    tmp_path_factory: pytest.TempPathFactory, draw_squares: Callable[..., dict[str, Any]]
) -> Callable[..., Path]:
    """Draw so many pictures of 96 x 80 pixels of up to three bright squares, and write squares.json: its path.

    Picture 3 shows nothing; the first square of each picture in ``crowds`` is a crowd.
    """

    def draw(count: int, crowds: Collection[int] = ()) -> Path:
        folder = tmp_path_factory.mktemp("squares")
        labels = [[7] * (0 if i == 3 else 1 + i % 3) for i in range(count)]
        limits = ((0, 0, 12), (60, 44, 36))
        document = draw_squares(folder, labels, {7: ("square", (220, 200, 40))}, seed=0, size=(96, 80), limits=limits)
        for picture in crowds:
            next(a for a in document["annotations"] if a["image_id"] == picture)["iscrowd"] = 1
        path = folder / "squares.json"
        path.write_text(json.dumps(document))
        return path

    return draw


@pytest.fixture(scope="session")
def four_squares(tmp_path_factory: pytest.TempPathFactory, make_record: Callable[..., Record]) -> Dataset:
    """Four pictures of 64 x 64 pixels with one bright square each; their ids are 10 to 13, the class has id 7."""
    folder = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(0)
    records = []
    for i in range(4):
        pixels = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        pixels[16:48, 8 + 4 * i : 40 + 4 * i] = 220
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        records.append(make_record(path, [[8 + 4 * i, 16, 40 + 4 * i, 48]], image_id=10 + i))
    return Dataset("squares", Classes(names=("square",), category_ids=(7,)), tuple(records))


@pytest.fixture(scope="session")
def run_options() -> Callable[..., RunOptions]:
    """Options of a short run on the CPU in this process: ``run_options(folder, resume=True)``."""

    def make(out: Path, **changes: Any) -> RunOptions:
        base = RunOptions(
            out=out,
            device=torch.device("cpu"),
            precision="fp32",
            workers=0,
            cache=False,
            resume=False,
            should_stop=lambda: False,
            provenance={},
        )
        return replace(base, **changes)

    return make


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A headless Chromium without a page; a message in its console fails the test. Skipped where there is none."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,900",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    messages = driver.get_log("browser")
    driver.quit()
    assert messages == []


def _rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file but for times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def assert_equal_runs() -> RunComparison:
    """Compare all that two runs left, bit for bit, but for times."""

    def check(one: Path, two: Path) -> None:
        states = [vars(load_state(out / "state.pt")) for out in (one, two)]
        for state in states:
            state["log"].pop("seconds")
        for name in ("settings", "data", "order", "validation", "start"):
            assert states[0].pop(name) == states[1].pop(name)
        for name in states[0]:
            first, second = (state[name] for state in states)
            torch.testing.assert_close(
                second, first, rtol=0, atol=0, msg=lambda text, name=name: f"{name} of the state: {text}"
            )
        for name in ("best.safetensors", "last.safetensors", "metrics.csv", "classes.csv"):
            assert (one / name).exists() == (two / name).exists(), name
            assert not (one / name).exists() or (one / name).read_bytes() == (two / name).read_bytes(), name
        assert _rows(one / "log.csv") == _rows(two / "log.csv")
        assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}

    return check
