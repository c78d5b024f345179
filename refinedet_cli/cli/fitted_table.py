"""Tables that stay readable where the terminal is narrow."""

from __future__ import annotations

from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table

# What text keeps of its width, however many columns stand beside it.
_LEAST_TEXT = 12
# An edge and a blank on either side of what is in a cell; the last edge is one more.
_AROUND = 3


class FittedTable(Table):
    """A table that goes on in another one below where it is wider than the terminal.

    Text is folded first, but never to less than 12 characters; then columns of numbers move into the tables below, each
    of which repeats the names of its rows. Rich alone would squeeze the names to nothing instead.

    Args:
        title: what stands above it; those below say that they continue it.
        names: how many columns, from the first on, name a row.
    """

    def __init__(self, title: str | None = None, *, names: int = 1) -> None:
        super().__init__(title=title, title_justify="left", caption_justify="left")
        self._names = names
        self._beside: set[int] = set()

    def add_text(self, *headings: str) -> None:
        """Add columns that are folded where there is no room."""
        for heading in headings:
            self.add_column(heading, overflow="fold")

    def add_number(self, *headings: str, justify: Literal["left", "right"] = "right", beside: bool = False) -> None:
        """Add columns that are never folded.

        Args:
            headings: one a column.
            justify: where the numbers stand.
            beside: they say more of the column before, and stay with it.
        """
        for heading in headings:
            if beside:
                self._beside.add(len(self.columns))
            self.add_column(heading, justify=justify, no_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out the table, or those that it becomes."""
        parts = [] if self.box is None else self._parts(console, options)
        if len(parts) < 2:
            yield from super().__rich_console__(console, options)
            return
        for i, columns in enumerate(parts):
            yield self._part(columns, first=i == 0, last=i == len(parts) - 1)

    def _parts(self, console: Console, options: ConsoleOptions) -> list[list[int]]:
        """Tell which columns beside the names go into which table; no table where one is enough."""
        widths = [self._least_width(console, options, column) + _AROUND for column in self.columns]
        room = options.max_width - 1 - sum(widths[: self._names])
        groups: list[list[int]] = []
        for i in range(self._names, len(widths)):
            if i in self._beside:
                groups[-1].append(i)
            else:
                groups.append([i])
        sizes = [sum(widths[i] for i in group) for group in groups]
        if not groups or sum(sizes) <= room:
            return []
        widest = max(sizes)
        count = len(_filled(sizes, max(room, widest)))
        # As many tables as it takes, and none much wider than the others.
        rooms = range(widest, sum(sizes) + 1)
        parts = next(parts for room in rooms if len(parts := _filled(sizes, room)) == count)
        return [[i for k in part for i in groups[k]] for part in parts]

    def _least_width(self, console: Console, options: ConsoleOptions, column: Column) -> int:
        wide = options.update(max_width=10_000, no_wrap=True)
        width = max(console.measure(cell, options=wide).maximum for cell in (column.header, *column.cells))
        return width if column.no_wrap else min(width, _LEAST_TEXT)

    def _part(self, columns: list[int], *, first: bool, last: bool) -> Table:
        chosen = [*range(self._names), *columns]
        title = self.title if first else f"{self.title}, continued" if self.title else None
        part = Table(*(self.columns[i].copy() for i in chosen), title=title, caption=self.caption if last else None)
        part.title_justify, part.caption_justify = self.title_justify, self.caption_justify
        part.title_style, part.caption_style = self.title_style, self.caption_style
        cells = [list(self.columns[i].cells) for i in chosen]
        for row, values in zip(self.rows, zip(*cells, strict=True), strict=True):
            part.add_row(*values, style=row.style, end_section=row.end_section)
        return part


def _filled(sizes: list[int], room: int) -> list[list[int]]:
    """Put things of these sizes after one another, and begin anew where there is no room."""
    parts: list[list[int]] = []
    left = 0
    for k, size in enumerate(sizes):
        if not parts or size > left:
            parts.append([])
            left = room
        parts[-1].append(k)
        left -= size
    return parts
