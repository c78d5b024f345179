"""run.html: its words and numbers are those of the files beside it, in whatever state they are."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from refinedet_cli.core.build import build
from refinedet_cli.core.config import Classes, to_dict
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine.environment import Start, describe_environment
from refinedet_cli.engine.run_page import duration, list_cards, list_commands, render_run_page, tell, write_run_page
from refinedet_cli.engine.run_record import RunRecord, read_run
from refinedet_cli.zoo.checkpoint import save_checkpoint

NAMES = ("cat", "<b>dog</b>")
AP = (0.125, 0.5, 0.25)
HERE = describe_environment(torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of ten steps, resumed once on another machine."""
    folder = tmp_path_factory.mktemp("runs") / "signs & co"
    folder.mkdir()
    preset = tiny(Classes(names=NAMES, category_ids=(1, 2)))
    train = {**to_dict(preset.train), "epochs": 3, "batch": 4}
    data = {"train": ["../signs/train.json"], "val": ["../signs/val.json"], "images": None, "root": None}
    (folder.parent / "signs").mkdir()
    (folder.parent / "signs" / "val.json").write_text("{}")
    config = {"detector": to_dict(preset.detector), "train": train, "data": data, "start": {"weights": None}}
    (folder / "config.json").write_text(json.dumps(config))
    provenance = {
        "start": {"weights": "bundled.safetensors", "classes_taken_over": ["cat"]},
        "data": {"name": "signs/train", "pictures": 40},
        "validation": {"name": "signs/val", "pictures": 1},
    }
    state = build(preset.detector).network.state_dict()
    for name in ("best", "last"):
        save_checkpoint(folder / f"{name}.safetensors", preset.detector, state, provenance)
    head = "step,epoch,lr,input,total,gradient_norm,conf,loc,positives_arm,pictures_per_second"
    rows = [f"{i},{i / 10},{0.01 / i:.6g},64x64,{9 / i:.5g},{i}.5,{5 / i:.5g},{4 / i:.5g},2,8.25" for i in range(1, 31)]
    (folder / "log.csv").write_text("\n".join([head, *rows, ""]))
    scores = [f"{10 * i},{i}.0,{ap},{ap + 0.1},{ap},{ap},," for i, ap in enumerate(AP, start=1)]
    (folder / "metrics.csv").write_text("\n".join(["step,epoch,AP,AP50,AP75,AP_small,AP_medium,AP_large", *scores, ""]))
    (folder / "classes.csv").write_text(
        f"step,class,AP,AP50,AP75,AR100,objects,detections\n20,{NAMES[0]},0.4,0.5,0.3,0.6,1200,9\n20,{NAMES[1]},,,,,0,7\n"
    )
    (folder / "health.csv").write_text('step,kind,message,cure\n1200,clipped,"gradients, all cut",lower train.lr\n')
    first = Start(
        started="2026-01-01T10:00:00+00:00",
        seen="2026-01-01T11:30:00+00:00",
        ended=None,
        outcome="running",
        from_step=0,
        to_step=14,
        folder=str(folder.parent),
        command=("refinedet", "train", "--out", "signs & co"),
        environment=HERE,
    )
    second = replace(
        first,
        started="2026-01-02T10:00:00+00:00",
        seen="2026-01-02T10:30:00+00:00",
        ended="2026-01-02T10:30:00+00:00",
        outcome="finished",
        from_step=10,
        to_step=30,
        environment=replace(HERE, gpu="Fast 9", gpu_memory_bytes=80_000_000_000, cuda="13.0", host="far"),
    )
    (folder / "environment.json").write_text(
        json.dumps({"schema_version": 1, "starts": [asdict(first), asdict(second)]})
    )
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    shutil.copytree(made.parent, tmp_path / "runs")
    return tmp_path / "runs" / made.name


class Page(HTMLParser):
    """Collects what a page would load or lead to, its charts and its rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.charts: list[dict] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.charts += [json.loads(value) for name, value in attrs if name == "data-chart"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def test_numbers_are_those_of_the_files(folder):
    page = Page(render_run_page(read_run(folder)))
    with (folder / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    with (folder / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    overall, sizes, *training = page.charts
    for chart, names in ((overall, ("AP", "AP50", "AP75")), (sizes, ("AP_small", "AP_medium", "AP_large"))):
        assert chart["values"] == [[float(row[n]) if row[n] else None for row in metrics] for n in names]
        assert chart["epoch"] == [1, 2, 3]
    columns = ("total", "conf", "loc", "lr", "positives_arm", "gradient_norm", "pictures_per_second")
    assert [chart["values"] for chart in training] == [
        [[pytest.approx(float(row[name]), rel=1e-4) for row in log]] for name in columns
    ]
    assert all(chart["step"] == list(range(1, 31)) for chart in training)
    assert ["2", "20", "0.500", "0.600", "0.500", "0.500", "-", "-"] in page.rows
    assert ["cat", "", "0.400", "0.500", "0.300", "0.600", "1,200", "9"] in page.rows


def test_the_page_asks_no_network(folder):
    html = render_run_page(read_run(folder))
    addresses = Page(html).addresses
    assert {a for a in addresses if not a.startswith("data:")} == {
        *("best.safetensors", "last.safetensors", "config.json", "log.csv", "metrics.csv", "classes.csv", "health.csv"),
        "environment.json",
    }
    assert not re.search(r"https?://|url\(|@import|fetch\(", html)


def test_it_says_in_words_what_happened(folder):
    what, start, how_long, how_good = tell(read_run(folder))
    assert what == "This is tiny at 64 x 64, trained on signs/train (40 pictures), for 2 classes: cat and <b>dog</b>."
    assert start == "It started from bundled.safetensors; class outputs taken over by name: cat."
    assert how_long.startswith("It went to its end, 3 epochs (30 steps of 4 pictures), in 2.0 h in 2 starts, on ")
    assert "and Fast 9 in fp32" in how_long
    assert how_good == (
        "Best AP on signs/val (1 picture): 0.500 at epoch 2 (AP50 0.600 and AP75 0.500); the last evaluation, at "
        "epoch 3, gave 0.250."
    )
    html = render_run_page(read_run(folder))
    assert "&lt;b&gt;dog&lt;/b&gt;" in html
    assert "<b>dog" not in html
    assert "Step 1,200: gradients, all cut; lower train.lr" in html
    assert "2026-01-02 10:00:00" in html
    cards = {card.name: card.value for card in list_cards(read_run(folder))}
    assert (cards["AP"], cards["at epoch"], cards["steps"], cards["time"]) == ("0.500", "2", "30", "2.0 h")


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ("running", "It was running when this page was written, after 3 of 3 epochs (30 steps of 4 pictures)"),
        ("stopped", "It was stopped after 3 of 3 epochs (30 steps of 4 pictures), to be resumed"),
        ("failed", "It failed after 3 of 3 epochs (30 steps of 4 pictures)"),
    ],
)
def test_it_says_how_it_ended_and_how_to_go_on(folder, outcome, said):
    run = read_run(folder)
    (folder / "state.pt").write_bytes(b"")
    run = replace(read_run(folder), starts=(run.starts[0], replace(run.starts[1], outcome=outcome)))
    assert said in list(tell(run))[2]
    assert next(list_commands(run)).line == "refinedet train --out 'signs & co' --resume"


def test_a_run_that_ended_before_its_plan_says_why(folder):
    config = json.loads((folder / "config.json").read_text())
    config["train"]["epochs"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    assert (
        "It ended early, after 3 of 9 epochs (30 steps of 4 pictures), for AP no longer rose"
        in list(tell(read_run(folder)))[2]
    )


def test_commands_have_the_paths_from_where_the_run_was_started(folder):
    run = read_run(folder)
    run = replace(run, starts=(replace(run.starts[1], folder=str(folder.parent)),))
    lines = [command.line for command in list_commands(run)]
    weights = "'signs & co/best.safetensors'"
    assert lines == [
        f"refinedet eval --dataset signs/val.json --weights {weights}",
        f"refinedet detect PICTURES --weights {weights} --out found",
        f"refinedet export --weights {weights} --out shipped",
    ]


def test_held_out_pictures_have_no_name_to_give_to_eval(folder):
    run = read_run(folder)
    run = replace(run, provenance={**run.provenance, "validation": {"name": "signs (held out)", "pictures": 3}})
    assert "--dataset TEST-DATA" in next(list_commands(run)).line


def test_a_run_without_validation_says_so(folder):
    for name in ("metrics.csv", "classes.csv", "best.safetensors"):
        (folder / name).unlink()
    run = replace(read_run(folder), provenance={"start": {"random": True}})
    assert list(tell(run))[1] == "It started from random weights."
    assert list(tell(run))[-1] == "There are no validation data, so no AP."
    assert "<h2>Validation" not in render_run_page(run)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0\0", b"step,epoch\n1", b"{", b"[]", b"step,epoch,AP\n1,1,x\n"])
def test_broken_files_break_no_page(folder, content):
    for path in folder.iterdir():
        path.write_bytes(content)
    run = read_run(folder)
    assert isinstance(run, RunRecord)
    assert "Run signs &amp; co" in render_run_page(run)


def test_rows_that_are_left_out_are_counted(folder):
    with (folder / "log.csv").open("a") as file:
        file.write("31,3.1,0.00")
    assert "1 rows of log.csv and metrics.csv are broken" in render_run_page(read_run(folder))


def test_an_empty_folder_has_a_page(tmp_path):
    assert write_run_page(tmp_path).read_text().startswith("<!doctype html>")


def test_a_report_is_linked_when_it_is_there(folder):
    assert "val/report.html" not in render_run_page(read_run(folder))
    (folder / "val").mkdir()
    (folder / "val" / "report.html").write_text("x")
    assert '<a href="val/report.html">Why the best weights score' in render_run_page(read_run(folder))


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")])
def test_times_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_the_page_works_in_a_browser(folder, browser):
    browser.get(write_run_page(folder).as_uri())

    def texts(selector: str) -> list[str]:
        return [e.text for e in browser.find_elements("css selector", selector)]

    # The last values, until a pointer asks for others.
    assert texts("figure:first-of-type output")[:3] == ["0.25", "0.35", "0.25"]
    browser.execute_script(
        "const plot = document.querySelector('.plot'), box = plot.getBoundingClientRect();"
        "plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 0.6, bubbles: true}))"
    )
    assert texts("figure:first-of-type output")[:3] == ["0.5", "0.6", "0.5"]
    assert texts("figure:first-of-type .at")[0] == "epoch 2, step 20"

    first_cells = "#classes tbody td:first-child"
    assert texts(first_cells) == list(NAMES)
    browser.find_element("css selector", "#classes th:first-child button").click()
    assert texts(first_cells) == ["<b>dog</b>", "cat"]

    def background() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    browser.find_element("id", "theme").click()
    assert background() != before

    for width in (400, 1200):
        browser.set_window_size(width, 900)
        page = "document.documentElement"
        assert browser.execute_script(f"return {page}.scrollWidth - {page}.clientWidth") <= 0
