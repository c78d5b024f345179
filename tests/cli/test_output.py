"""What goes to stdout, what to stderr, and in which form."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.table import Table

from refinedet_cli.cli.output import Output, invocation


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@dataclass(frozen=True)
class _Row:
    name: str
    ap: float


def _table(cell="cat"):
    table = Table("class", "AP", title="Result")
    table.add_row(cell, "0.5")
    return table


def test_json_is_exactly_one_document_with_the_command(capsys):
    with invocation("eval", json=True):
        Output(json=True).result({"ap": 0.5, "path": Path("a/b"), "rows": (_Row("cat", math.nan),)}, _table())
    stdout, stderr = capsys.readouterr()
    assert json.loads(stdout) == {
        "schema_version": 1,
        "command": "eval",
        "ap": 0.5,
        "path": str(Path("a/b")),
        "rows": [{"name": "cat", "ap": None}],
    }
    assert stderr == ""


def test_json_survives_a_file_name_that_is_not_text(capsys):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    Output(json=True).result({"file": name})
    stdout = capsys.readouterr().out
    assert stdout.isascii()
    assert json.loads(stdout)["file"] == name


def test_json_refuses_what_it_has_no_form_for(capsys):
    with pytest.raises(TypeError):
        Output(json=True).result({"thing": object()})
    assert capsys.readouterr().out == ""


def test_one_result_a_command():
    with invocation("eval", json=True):
        Output(json=True).result({})
        with pytest.raises(RuntimeError, match="one result"):
            Output(json=True).result({})


def test_a_piped_table_is_plain_and_uncut(capsys):
    long = "x" * 300
    Output().result({}, _table(long), "done")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["Result"], ["class", "AP"], [long, "0.5"], ["done"]]


def test_a_table_on_a_terminal_has_its_box(monkeypatch):
    monkeypatch.setattr(sys, "stdout", _Terminal())
    monkeypatch.setenv("TERM", "xterm")
    Output().result({}, _table())
    assert "━" in sys.stdout.getvalue()


@pytest.mark.parametrize("text", ["a[red]b[/red].jpg", "[/]", ":car:"])
def test_text_is_never_markup(text, capsys):
    output = Output()
    output.note(text)
    output.warn(text)
    output.result({}, _table(text), text)
    stdout, stderr = capsys.readouterr()
    assert stderr.splitlines() == [text, f"warning: {text}"]
    assert stdout.count(text) == 2


def test_quiet_silences_notes_but_not_warnings(capsys):
    output = Output(quiet=True)
    output.note("by the way")
    output.warn("look out")
    assert capsys.readouterr() == ("", "warning: look out\n")


def _run_a_bar(output):
    with output.progress("reading") as bars:
        task = bars.add_task("pictures", total=2)
        bars.advance(task)
        bars.refresh()


@pytest.mark.parametrize(
    ("options", "terminal", "shown"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"quiet": True}, True, False),
        ({"json": True}, True, False),
    ],
)
def test_progress_is_for_a_person_at_a_terminal(options, terminal, shown, monkeypatch, capsys):
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    _run_a_bar(Output(**options))
    assert ("reading" in stream.getvalue()) == shown
    assert bool(stream.getvalue()) == shown
    assert capsys.readouterr().out == ""


def test_progress_stays_out_of_a_log_even_with_forced_colour(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("FORCE_COLOR", "1")
    _run_a_bar(Output())
    assert stream.getvalue() == ""


def test_text_out_of_data_is_never_obeyed_by_the_terminal(capsys, monkeypatch):
    hostile = "a\x1b]0;title\x1b[2J\x7f\x9b.jpg"
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    output = Output()
    output.note(hostile)
    output.warn(hostile)
    output.result({}, _table(hostile))
    stdout, stderr = capsys.readouterr()
    for shown in (stdout, stderr):
        assert "a␛]0;title␛[2J␡\ufffd.jpg" in shown
        assert not {"\x7f", "\x9b"} & set(shown)
