from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.engine import report
from refinedet_cli.engine.reasons import find_reasons
from refinedet_cli.engine.report import Number, Page, SourcePicture, gallery, render, write_report
from refinedet_cli.errors import DataError
from refinedet_cli.metrics.coco import PictureDetections, PictureTruth

NAMES = ("zebra", "cat", "<b>dog</b>")


@pytest.fixture
def page(tmp_path) -> Page:
    """Three pictures: all right; one object missed; one taken for another class and one detection of nothing."""
    pictures = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((100, 200, 3), 60 * i, np.uint8)).save(path)
        pictures.append(SourcePicture(path, f"{i} & co.png", 200, 100))
    objects = [[(1, 0, 0, 50, 50)], [(1, 0, 0, 50, 50), (2, 100, 20, 150, 80)], [(2, 0, 0, 50, 50), (3, 60, 0, 99, 50)]]
    found = [
        [(1, 0.9, 0, 0, 50, 50)],
        [(1, 0.8, 0, 0, 50, 50)],
        [(3, 0.95, 0, 0, 50, 50), (3, 0.9, 60, 0, 99, 50), (1, 0.85, 150, 50, 190, 90), (2, 0.1, 0, 0, 50, 50)],
    ]
    truths, detections = [], []
    for i, (wanted, seen) in enumerate(zip(objects, found, strict=True)):
        table, rows = np.array(wanted, float), np.array(seen, float)
        truths.append(
            PictureTruth(
                i, table[:, 1:], table[:, 0].astype(int), np.full(len(table), 900.0), np.zeros(len(table), bool)
            )
        )
        detections.append(PictureDetections(i, rows[:, 2:], rows[:, 1], rows[:, 0].astype(int)))
    return Page(
        title="zoo",
        scope="COCO metric over 3 pictures",
        numbers=[Number("AP", "the number to compare", 0.25, 0.2, 0.31), Number("AP_small", "small ones", None)],
        columns=("AP", "AP50"),
        rows=[(0.5, 0.6), (0.125, 0.3), (None, None)],
        reasons=find_reasons(truths, detections, NAMES),
        refinement=None,
        pictures=pictures,
        facts=[("Weights", "w.safetensors")],
    )


class Addresses(HTMLParser):
    """Collects what a page would load or lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_asks_no_network(page):
    html = render(page)
    parser = Addresses()
    parser.feed(html)
    assert parser.found
    assert all(address.startswith("data:") for address in parser.found)
    assert not re.search(r"https?://|url\(|@import|fetch\(", html)


def test_what_people_named_is_shown_as_text(page):
    html = render(page)
    assert "&lt;b&gt;dog&lt;/b&gt;" in html
    assert "<b>dog" not in html
    assert "2 &amp; co.png" in html


def test_numbers_stand_there_with_their_intervals(page):
    html = render(page)
    assert "95 %: 0.200 to 0.310" in html
    assert re.search(r"AP_small</small><b>-</b>", html)


def test_the_gallery_holds_the_pictures_with_faults_worst_first(page):
    shown = gallery(page.reasons, page.pictures)
    assert [s.file_name for s in shown] == ["2 & co.png", "1 & co.png"]
    worst, second = shown
    assert second.faults == {"missed": 1, "false": 0, "confused": 0}
    [missed] = [m for m in second.marks if m.kind == "missed"]
    assert (missed.left, missed.top, missed.width, missed.height) == (50, 20, 25, 60)
    assert missed.text == "cat not found"
    assert worst.faults == {"missed": 0, "false": 1, "confused": 1}
    assert [m.text for m in worst.marks if m.kind != "found"] == ["<b>dog</b> 0.95: class", "zebra 0.85: background"]


def test_misses_are_counted_at_the_scores_that_the_page_names(page):
    # Three cats found at 0.9; the fourth only at 0.1, far below detections of nothing: the best threshold is 0.9.
    box, elsewhere = (0, 0, 50, 50), (60, 60, 90, 90)
    truths = [
        PictureTruth(i, np.array([box], float), np.array([2]), np.full(1, 2500.0), np.zeros(1, bool)) for i in range(4)
    ]
    seen = [[(0.9, box)]] * 3 + [[(0.5, elsewhere)] * 8 + [(0.1, box)]]
    detections = [
        PictureDetections(
            i, np.array([b for _, b in rows], float), np.array([s for s, _ in rows]), np.full(len(rows), 2)
        )
        for i, rows in enumerate(seen)
    ]
    reasons = find_reasons(truths, detections, NAMES)
    html = render(Page(**{**vars(page), "reasons": reasons, "pictures": [*page.pictures, page.pictures[0]]}))
    plain = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", html))
    assert "missed 1 object that no detection comes near" in plain
    assert "Counted from a score of 0.90 on" in plain
    assert "Not found at these scores: 1 of 4 objects;" in plain
    assert re.findall(r"(\d+) not found,", plain) == ["1"]


def test_a_page_without_faults_or_objects_is_written_too(page, tmp_path):
    nothing = find_reasons(
        [PictureTruth(0, np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), np.zeros(0, bool))],
        [PictureDetections(0, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))],
        NAMES,
    )
    empty = Page(**{**vars(page), "reasons": nothing, "pictures": page.pictures[:1]})
    write_report(tmp_path / "deep" / "r.html", empty)
    html = (tmp_path / "deep" / "r.html").read_text(encoding="utf-8")
    assert "There is no object to be found." in html
    assert "No picture has a fault" in html


def test_a_picture_that_is_gone_is_named(page):
    page.pictures[2].path.unlink()
    with pytest.raises(DataError, match=r"2\.png"):
        render(page)


def test_the_page_works_in_a_browser(page, tmp_path, browser):
    write_report(tmp_path / "report.html", page)
    browser.get((tmp_path / "report.html").as_uri())

    def texts(selector: str) -> list[str]:
        return browser.execute_script(
            "return Array.from(document.querySelectorAll(arguments[0])).filter(e => e.checkVisibility())"
            ".map(e => e.textContent.trim())",
            selector,
        )

    def click(selector: str) -> None:
        browser.find_element("css selector", selector).click()

    first_cells = "#classes tbody td:first-child"
    assert texts(first_cells) == list(NAMES)
    click("#classes th:nth-child(3) button")  # AP, highest first; no number last
    assert texts(first_cells) == ["zebra", "cat", "<b>dog</b>"]
    click("#classes th:nth-child(3) button")
    assert texts(first_cells) == ["<b>dog</b>", "cat", "zebra"]
    click("#classes th:nth-child(1) button")
    assert texts(first_cells) == ["<b>dog</b>", "cat", "zebra"]

    browser.find_element("id", "filter").send_keys("CA")
    assert texts(first_cells) == ["cat"]
    assert texts("#shown") == ["1 of 3"]

    assert len(texts("figure")) == 2
    click("[data-fault=missed]")
    assert all("1 not found" in text for text in texts("figcaption"))
    click("[data-fault='']")
    browser.find_element("css selector", "#of option[value='']")
    browser.execute_script(
        "const s = document.getElementById('of'); s.value = 'zebra'; s.dispatchEvent(new Event('change'))"
    )
    assert [t.split(".png")[0] for t in texts("figcaption")] == ["2 & co"]

    lines = "polyline[data-curve]:not([hidden])"
    assert len(browser.find_elements("css selector", lines)) == 2
    browser.execute_script(
        "const s = document.getElementById('curve'); s.value = '1'; s.dispatchEvent(new Event('change'))"
    )
    shown = [e.get_attribute("data-curve") for e in browser.find_elements("css selector", lines)]
    assert shown == ["1", "1"]

    def background() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = background()
    click("#theme")
    assert background() != before

    for width in (400, 1200):
        browser.set_window_size(width, 900)
        page = "document.documentElement"
        assert browser.execute_script(f"return {page}.scrollWidth - {page}.clientWidth") <= 0


def test_of_very_many_classes_those_are_shown_that_are_mixed_up_most():
    table = np.zeros((1001, 1001), dtype=np.int64)
    table[range(1001), range(1001)] = 9  # found as what they are
    table[900, 7] = 5
    table[500, 0] = 2
    table[0, 3] = 1
    shown = report._most_confused(table)
    assert len(shown) == report._CONFUSED + 1
    assert {0, 3, 7, 500, 900} <= set(shown)
    assert shown == sorted(shown)
    assert report._most_confused(table[:4, :4]) == [0, 1, 2, 3]
