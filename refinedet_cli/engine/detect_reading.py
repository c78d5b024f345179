"""Pictures read ahead of the network, in groups that are the same however a run is shared out or interrupted.

Pictures computed together may differ in their last bits from pictures computed alone. So groups are cut from blocks of
the whole list: a process takes whole blocks, and a run that goes on reads a block again of which anything is missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from refinedet_cli.data.images import FoundImage, Reading, read_image, read_reduced
from refinedet_cli.engine.detect_copies import Targets
from refinedet_cli.engine.stages import stage
from refinedet_cli.errors import DataError

# Decoded pictures that may wait for the network.
HELD_BYTES = 256 * 2**20


class Listed(NamedTuple):
    """A picture of the list, before it is read; ``is_last`` tells that its block ends with it."""

    image_id: int
    image: FoundImage
    targets: Targets
    is_last: bool


class Decoded(NamedTuple):
    """A picture that was read, or what is wrong with it."""

    listed: Listed
    reading: Reading | DataError


def blocks(
    pictures: Iterable[tuple[int, FoundImage, Targets]], batch: int, wanted: Callable[[int, Sequence[int]], bool]
) -> Iterator[Listed]:
    """Cut the list into blocks of ``batch`` and give the pictures of those that are wanted.

    Args:
        pictures: image id, picture and where its files go; all there are, in order.
        batch: of the run.
        wanted: told the number of a block and its image ids.
    """
    upcoming, number = iter(pictures), 0
    while block := list(islice(upcoming, batch)):
        if wanted(number, [image_id for image_id, _, _ in block]):
            yield from (Listed(*picture, is_last=i == len(block)) for i, picture in enumerate(block, start=1))
        number += 1


def read_groups(
    pictures: Iterable[Listed], batch: int, readers: int, *, input_size: tuple[int, int] | None = None
) -> Generator[list[Decoded]]:
    """Read pictures ahead and gather those of a block, in order; a block of large pictures makes several groups.

    A group is handed on as soon as its last picture is there; while it is worked on, the next one is read.

    Args:
        pictures: as `blocks` gives them.
        batch: most pictures in a block.
        readers: threads that decode.
        input_size: (height, width) to which pictures will be resized, if nobody needs all their pixels: large JPEGs are
            then decoded reduced, as `read_reduced` does. None decodes all in full.
    """
    group: list[Decoded] = []
    held = 0
    pool = ThreadPoolExecutor(readers)
    try:
        for decoded in _read_ahead(pictures, batch, readers, pool, input_size):
            group.append(decoded)
            held += _bytes_of(decoded.reading)
            is_full = decoded.listed.is_last or held >= HELD_BYTES
            del decoded
            if is_full:
                yield group
                group, held = [], 0
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(
    pictures: Iterable[Listed], batch: int, readers: int, pool: ThreadPoolExecutor, input_size: tuple[int, int] | None
) -> Iterator[Decoded]:
    upcoming = iter(pictures)
    pending: deque[tuple[Listed, Future[Reading | DataError]]] = deque()
    largest = 0
    while True:
        # How large pictures are is known when the first are there; until then only a few are read.
        ahead = max(readers, min(batch + readers, HELD_BYTES // largest)) if largest else readers
        for listed in islice(upcoming, max(0, ahead - len(pending))):
            # In the context of this thread, so that the clock of the stages is the same.
            pending.append((listed, pool.submit(copy_context().run, _read, listed.image.path, input_size)))
        if not pending:
            return
        listed, future = pending.popleft()
        with stage("wait for pictures"):
            reading = future.result()
        del future
        largest = max(largest, _bytes_of(reading))
        yield Decoded(listed, reading)
        del reading


def _bytes_of(reading: Reading | DataError) -> int:
    return 0 if isinstance(reading, DataError) else reading.pixels.nbytes


def _read(path: Path, input_size: tuple[int, int] | None) -> Reading | DataError:
    """Decode a picture; what is wrong with it is handed back, for one bad file must not stop the others."""
    with stage("read"):
        try:
            if input_size is not None:
                return read_reduced(path, input_size)
            pixels = read_image(path)
        except DataError as error:
            return error
        return Reading(pixels, (pixels.shape[0], pixels.shape[1]))
