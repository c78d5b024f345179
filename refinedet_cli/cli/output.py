"""The one sink of everything a command says.

stdout is the result: a table, or with ``--json`` exactly one JSON document. Notes, warnings, errors and progress go to
stderr. Text is shown as it is: no square bracket in a file name is ever read as markup.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

SCHEMA_VERSION = 1

# A table that is piped has no edge to be cut at: one row is one line, however long.
_PIPED_WIDTH = 10_000


@dataclass
class Invocation:
    """What one call of the command line is about, known before its options are read.

    Attributes:
        command: the command's name, or None where none of the known ones was given.
        json: whether ``--json`` stands among the arguments.
        answered: whether a result has been written; stdout then holds all that it may hold.
        silent: whether another process speaks for this one.
        arguments: all of them, as given, without the program's name.
    """

    command: str | None = None
    json: bool = False
    answered: bool = False
    silent: bool = False
    arguments: tuple[str, ...] = ()


_invocation: ContextVar[Invocation | None] = ContextVar("invocation", default=None)


@contextmanager
def invocation(command: str | None, *, json: bool, arguments: Sequence[str] = ()) -> Iterator[Invocation]:
    """Make an `Invocation` the current one for the length of a ``with`` block."""
    current = Invocation(command=command, json=json, arguments=tuple(arguments))
    token = _invocation.set(current)
    try:
        yield current
    finally:
        _invocation.reset(token)


def current_invocation() -> Invocation:
    """Return the invocation under way, or an empty one outside of `main`."""
    return _invocation.get() or Invocation()


# Characters that a terminal obeys instead of showing them; names of files and classes may hold any.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _shown(match: re.Match[str]) -> str:
    """Stand in for a character: its picture in Unicode, if it has one."""
    number = ord(match[0])
    return chr(0x2400 + number) if number < 0x20 else "\u2421" if number == 0x7F else "\ufffd"


class _SafeConsole(Console):
    """A console on which text out of data cannot move the cursor, or change colours and titles."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Lay out text as Rich does; here, so that a table's columns are as wide as what is shown."""
        return super().render_str(_OBEYED.sub(_shown, text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield segments as Rich does, without characters that a terminal obeys."""
        for segment in super().render(renderable, options):
            if segment.control or not _OBEYED.search(segment.text):
                yield segment
            else:
                yield Segment(_OBEYED.sub(_shown, segment.text), segment.style)


def _console(*, stderr: bool) -> Console:
    # Without these a file called "cat[red].jpg" or a class called ":car:" would be printed as something else.
    console = _SafeConsole(stderr=stderr, markup=False, emoji=False, highlight=False)
    return console if stderr or console.is_terminal else _piped_console()


def _piped_console() -> Console:
    return _SafeConsole(markup=False, emoji=False, highlight=False, no_color=True, width=_PIPED_WIDTH)


class Bars(Progress):
    """Progress bars, and below them one text that may change.

    Attributes:
        detail: the text; empty shows none.
    """

    detail = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bars and the text, as Rich asks for them."""
        yield from super().get_renderables()
        if self.detail:
            yield Text(self.detail, style="dim")


@dataclass(frozen=True)
class Output:
    """Where a command writes: its result, its remarks and its progress.

    Args:
        json: the result is one JSON document instead of tables, and there is no progress.
        quiet: neither notes nor progress; warnings, errors and the result stay.
    """

    json: bool = False
    quiet: bool = False
    _stderr: Console = field(default_factory=lambda: _console(stderr=True), init=False, repr=False, compare=False)

    def result(self, document: Mapping[str, Any], *renderables: RenderableType) -> None:
        """Write the result to stdout: the document with ``--json``, otherwise the renderables one below the other.

        Args:
            document: strings, numbers, bools, None, paths, lists, mappings and dataclasses; ``schema_version`` and
                ``command`` are added. Numbers that JSON has no form for (NaN, infinity) become null.
            renderables: tables and texts; boxed and coloured on a terminal, plain and uncut when piped.

        Raises:
            RuntimeError: a result has been written before; a command has one.
        """
        current = current_invocation()
        if current.answered:
            raise RuntimeError("a command writes one result")
        if current.silent:
            return
        if self.json:
            write_document(document)
        else:
            console = _console(stderr=False)
            for renderable in renderables:
                console.print(renderable if console.is_terminal else _without_box(renderable), soft_wrap=False)
        current.answered = True

    def note(self, text: str) -> None:
        """Write a remark to stderr; silent under ``quiet``."""
        if not self.quiet and not current_invocation().silent:
            self._stderr.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Write a warning to stderr, also under ``quiet``."""
        if not current_invocation().silent:
            self._stderr.print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)

    @contextmanager
    def progress(self, description: str) -> Iterator[Bars]:
        """Show bars on stderr while the block runs; they vanish at its end.

        Args:
            description: stands before every bar.

        Yields:
            `Bars` without tasks. It shows nothing under ``json`` or ``quiet`` and without a
            terminal, yet takes the same calls, so that commands need not ask.
        """
        silent = self.json or self.quiet or current_invocation().silent
        hidden = silent or not sys.stderr.isatty() or self._stderr.is_dumb_terminal
        bars = Bars(
            TextColumn(description, markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._stderr,
            transient=True,
            disable=hidden,
        )
        with bars:
            yield bars


def write_document(document: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout, led by ``schema_version`` and ``command``.

    Raises:
        TypeError: a value has no form in JSON.
    """
    head = {"schema_version": SCHEMA_VERSION, "command": current_invocation().command}
    # Escaped to ASCII: valid whatever encoding stdout has, and whatever bytes a file name is made of.
    text = json.dumps({**head, **_jsonable(document)}, indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_error(message: str, hint: str | None) -> None:
    """Write an error and its cure to stderr, each on a line of its own."""
    console = _console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)


def _jsonable(value: Any) -> Any:
    """Replace what ``json`` cannot write but has an obvious form; leave the rest for it to refuse."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _without_box(renderable: RenderableType) -> RenderableType:
    if not isinstance(renderable, Table):
        return renderable
    plain = copy.copy(renderable)
    plain.box = None
    plain.expand = False
    plain.title_justify = plain.caption_justify = "left"
    return plain
