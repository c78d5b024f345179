"""How processes that share the pictures of one run come together: by what they have written."""

from __future__ import annotations

import time

from refinedet_cli.engine.detect_journal import Journal
from refinedet_cli.engine.distributed import Shard
from refinedet_cli.errors import PartialError

# Rank 0 gives up when nobody has finished a picture for so long, in seconds.
PATIENCE = 600.0
_POLL = 0.5


def is_own(image_id: int, shard: Shard | None, batch: int) -> bool:
    """Tell whether a picture is in a block of a process; one that is alone has all."""
    return shard is None or shard.has((image_id - 1) // batch)


def wait_for_all(journal: Journal, shard: Shard, batch: int) -> None:
    """Wait until all processes have written all their pictures.

    Args:
        journal: read again and again.
        shard: of this process.
        batch: pictures in a block.

    Raises:
        PartialError: no picture came for `PATIENCE`; names the ranks that lack some.
    """
    last = time.monotonic()
    while any(True for _ in journal.missing()):
        before = journal.done
        journal.read()
        if journal.done > before:
            last = time.monotonic()
        elif time.monotonic() - last > PATIENCE:
            raise _lost(journal, shard, batch)
        else:
            time.sleep(_POLL)


def _lost(journal: Journal, shard: Shard, batch: int) -> PartialError:
    missing: dict[int, int] = {}
    for image_id in journal.missing():
        rank = (image_id - 1) // batch % shard.count
        missing[rank] = missing.get(rank, 0) + 1
    ranks = ", ".join(f"rank {rank} lacks {count:,}" for rank, count in sorted(missing.items()))
    return PartialError(
        f"no picture came for {PATIENCE:g} seconds, and of {shard.count} processes {ranks}",
        "see what ended them; then run again with --resume, with as many processes as you like",
    )
