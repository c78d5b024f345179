"""Pictures read ahead of the network, in groups that are the same however a run is shared out or interrupted.

Pictures computed together may differ in their last bits from pictures computed alone. So groups are cut from blocks of
the whole list: a process takes whole blocks, and a run that goes on reads a block again of which anything is missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.data.images import FoundImage, read_image
from refinedet_cli.engine.detect_copies import Targets
from refinedet_cli.errors import DataError

Pixels = NDArray[np.uint8]

# Decoded pictures that may wait for the network.
HELD_BYTES = 256 * 2**20


class Listed(NamedTuple):
    """A picture of the list, before it is read; ``block`` counts from 0."""

    image_id: int
    image: FoundImage
    targets: Targets
    block: int


class Decoded(NamedTuple):
    """A picture that was read, or what is wrong with it."""

    listed: Listed
    pixels: Pixels | DataError


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
            yield from (Listed(*picture, number) for picture in block)
        number += 1


def read_groups(pictures: Iterable[Listed], batch: int, readers: int) -> Generator[list[Decoded]]:
    """Read pictures ahead and gather those of a block, in order; a block of large pictures makes several groups.

    Args:
        pictures: as `blocks` gives them.
        batch: most pictures in a block.
        readers: threads that decode.
    """
    group: list[Decoded] = []
    held = 0
    pool = ThreadPoolExecutor(readers)
    try:
        for listed, pixels in _read_ahead(pictures, batch, readers, pool):
            if group and (listed.block != group[0].listed.block or held >= HELD_BYTES):
                yield group
                group, held = [], 0
            group.append(Decoded(listed, pixels))
            held += 0 if isinstance(pixels, DataError) else pixels.nbytes
            del pixels
        if group:
            yield group
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(
    pictures: Iterable[Listed], batch: int, readers: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Listed, Pixels | DataError]]:
    upcoming = iter(pictures)
    pending: deque[tuple[Listed, Future[Pixels | DataError]]] = deque()
    largest = 0
    while True:
        # How large pictures are is known when the first are there; until then only a few are read.
        ahead = max(readers, min(batch + readers, HELD_BYTES // largest)) if largest else readers
        for listed in islice(upcoming, max(0, ahead - len(pending))):
            pending.append((listed, pool.submit(_read, listed.image.path)))
        if not pending:
            return
        listed, future = pending.popleft()
        pixels = future.result()
        if not isinstance(pixels, DataError):
            largest = max(largest, pixels.nbytes)
        yield listed, pixels


def _read(path: Path) -> Pixels | DataError:
    """Decode a picture; what is wrong with it is handed back, for one bad file must not stop the others."""
    try:
        return read_image(path)
    except DataError as error:
        return error
