"""Tables on narrow terminals: every cell is there, and every row has its name."""

from __future__ import annotations

import io
import re
import sys

import pytest

from refinedet_cli.cli.fitted_table import FittedTable
from refinedet_cli.cli.output import Output

NAMES = ("aeroplane", "a stop sign that is far away", "x")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _table() -> FittedTable:
    table = FittedTable("Classes")
    table.add_text("Class")
    for name in ("AP", "AP50", "AP75"):
        table.add_number(name)
        table.add_number("95 % interval", justify="left", beside=True)
    table.add_number("Objects", "Detections")
    table.caption = "What it means."
    for i, name in enumerate(NAMES):
        table.add_row(
            name, *[f"0.{i}{k}1" if k % 2 else f"0.{i}{k}0 to 0.{i}{k}9" for k in range(1, 7)], "12", f"{i}7,654"
        )
    return table


def _shown(width: int, monkeypatch: pytest.MonkeyPatch, table: FittedTable | None = None) -> str:
    monkeypatch.setattr(sys, "stdout", terminal := _Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    Output().result({}, table or _table())
    return "\n".join(re.sub("\x1b\\[[0-9;]*m", "", line).rstrip() for line in terminal.getvalue().splitlines())


@pytest.mark.parametrize("width", [50, 60, 80, 100, 120, 200])
def test_nothing_is_lost_and_every_row_is_named(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(width, monkeypatch)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    tables = shown.count("Class ")
    assert shown.count("continued") == tables - 1
    assert shown.count("aeroplane") == tables
    assert shown.count("What it means.") == 1
    for column in _table().columns[1:]:
        for cell in column.cells:
            assert str(cell) in shown


def test_a_table_that_fits_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(200, monkeypatch)
    assert "continued" not in shown
    assert NAMES[1] in shown


def test_an_interval_stays_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(60, monkeypatch)
    for line in shown.splitlines():
        if "aeroplane" in line and " to " in line:
            assert line.count("│") == 4, line


def test_tables_are_about_equally_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    table = FittedTable()
    table.add_text("Name")
    table.add_number(*["12345678"] * 6)
    table.add_row("x", *["1"] * 6)
    # Six of eleven each do not fit beside the name; three and three do.
    headings = [line.count("12345678") for line in _shown(70, monkeypatch, table).splitlines() if "Name" in line]
    assert headings == [3, 3]


def test_rows_keep_their_sections_and_a_row_may_be_a_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    table = FittedTable()
    table.add_text("Name")
    table.add_number(*["12345678"] * 6)
    table.add_row("first", *["1"] * 6)
    table.add_section()
    table.add_row("heading")
    shown = _shown(70, monkeypatch, table)
    assert shown.count("├") == 2
    assert shown.count("heading") == 2


@pytest.mark.parametrize("width", [1, 10, 20])
def test_no_terminal_is_too_narrow(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _shown(width, monkeypatch)


def test_in_a_pipe_a_row_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    Output().result({}, _table())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(NAMES) + 1
    assert lines[3].split("  ")[0].strip() == NAMES[1]
