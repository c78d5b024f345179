"""Transfers from and to the Hugging Face Hub, seen in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from refinedet_cli.cli.output import Output

if TYPE_CHECKING:
    from rich.progress import TaskID

    from refinedet_cli.zoo.hub_client import Transfer


@contextmanager
def downloads(output: Output, *, offline: bool = False) -> Iterator[None]:
    """Show what the block receives from the Hub or sends there; nothing is shown while nothing moves.

    Args:
        output: of the command.
        offline: forbid the network to the block.
    """
    from refinedet_cli.zoo.hub_client import network

    with output.progress("Hugging Face Hub:") as bars:
        tasks: dict[str, TaskID] = {}

        def show(transfer: Transfer) -> None:
            if transfer.file not in tasks:
                tasks[transfer.file] = bars.add_task(f"{transfer.file}, MB", total=None)
            total = None if transfer.total is None else transfer.total / 1e6
            bars.update(tasks[transfer.file], completed=transfer.done / 1e6, total=total)

        with network(offline=offline, on_progress=show):
            yield


def on_disk(output: Output, name: str | None, *, offline: bool) -> str | None:
    """Bring weights onto this disk before a command shows progress of its own.

    Returns:
        Their path; None where none were named.
    """
    from refinedet_cli.zoo.hub import resolve_weights

    if name is None:
        return None
    with downloads(output, offline=offline):
        return str(resolve_weights(name))
