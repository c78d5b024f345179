"""Commands that the processes of torchrun run together, of which the first one speaks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, ParamSpec

from refinedet_cli.cli.output import current_invocation
from refinedet_cli.errors import ToldElsewhere

if TYPE_CHECKING:
    from refinedet_cli.engine.distributed import Processes

P = ParamSpec("P")

_INTERRUPTED = 130
_joined: ContextVar[Processes | None] = ContextVar("joined", default=None)


def together(command: Callable[P, None]) -> Callable[P, None]:
    """Let the processes that torchrun started run a command together; all end with the same exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **options: P.kwargs) -> None:
        if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
            command(*args, **options)
            return
        from refinedet_cli.engine.distributed import join

        speaks = True
        try:
            with join() as processes:
                speaks = processes.first
                current_invocation().silent = not speaks
                token = _joined.set(processes)
                try:
                    command(*args, **options)
                finally:
                    _joined.reset(token)
        except KeyboardInterrupt:
            if speaks:
                raise
            raise ToldElsewhere("interrupted", None, _INTERRUPTED) from None

    return run


def processes() -> Processes:
    """Return those that run the command under way."""
    from refinedet_cli.engine.distributed import ALONE

    return _joined.get() or ALONE
