"""From what a user calls a data set to a `Dataset`, and the part of it that is held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from refinedet_cli.core.words import counted
from refinedet_cli.data.dataset import Dataset, Split, join
from refinedet_cli.data.images import open_regular
from refinedet_cli.data.kinds import Format, recognise
from refinedet_cli.data.locate import locate
from refinedet_cli.errors import DataError


def open_dataset(source: str, *, split: Split, images: Path | None = None, root: Path | None = None) -> Dataset:
    """Open one part of a data set.

    What has no parts (a single JSON file, VOC annotations without lists) is every part; ``find_splits`` tells whether
    there is a part of its own. Of VOC, train is ``train.txt`` alone, so that nothing of val is in it; what has another
    name, as ``trainval``, is opened by that name.

    Args:
        source: a COCO JSON; a folder with parts; a VOC folder; a YOLO data.yaml or its folder; or the name of a public
            data set. With ``:PART`` at its end, that part is opened whatever ``split`` says.
        split: which part.
        images: the folder that file names are relative to; None looks where exporters put the pictures.
        root: where public data sets lie; None takes $REFINEDET_DATA, else ./datasets.

    Raises:
        DataError: the source does not exist, is of a format that is not read, or has no such part, or two of them.
        UsageError: ``images`` is given for a format that names its own folders.
    """
    place = locate(source, root, split)
    return recognise(place, root).open(place.part or split, images, named=place.part is not None)


def open_joined(
    sources: Sequence[str], *, split: Split, images: Path | None = None, root: Path | None = None
) -> Dataset:
    """Open one part of several data sets, as `open_dataset` does each, and join them."""
    return join([open_dataset(source, split=split, images=images, root=root) for source in sources])


def find_splits(source: str, root: Path | None = None) -> tuple[Split, ...]:
    """Tell which parts a data set has of its own; one that is not divided, or one part by its name, has none.

    Raises:
        DataError: the source does not exist or is of a format that is not read.
    """
    place = locate(source, root)
    kind = recognise(place, root)
    return () if place.part is not None else kind.splits()


class Source(NamedTuple):
    """What a user named, before anything of it is read.

    Attributes:
        path: the file or folder.
        format: of its annotations.
        part: the part that the user named, as ``val`` in ``signs:val``.
        splits: its parts; empty where it is not divided, or one part is named.
        others: names of its other parts, as ``trainval``.
    """

    path: Path
    format: Format
    part: str | None
    splits: tuple[Split, ...]
    others: tuple[str, ...]


def describe_source(source: str, root: Path | None = None) -> Source:
    """Tell what a data set is made of.

    Raises:
        DataError: the source does not exist or is of a format that is not read.
    """
    place = locate(source, root)
    kind = recognise(place, root)
    whole = place.part is None
    return Source(place.path, kind.format, place.part, kind.splits() if whole else (), kind.others() if whole else ())


def find_annotations(source: str, *, split: Split, root: Path | None = None) -> Path:
    """Find what ``open_dataset`` reads for a part: the COCO JSON, VOC's folder of XML files, or YOLO's data.yaml.

    Raises:
        DataError: as ``open_dataset``.
    """
    place = locate(source, root, split)
    return recognise(place, root).annotations(place.part or split, named=place.part is not None)


def hold_out(dataset: Dataset, *, fraction: float = 0.15, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Part a data set into what is trained on and what is held out to validate.

    The side of a picture depends on the bytes of its file and the seed alone. So copies of a picture, under whatever
    name, fall on one side; the order does not count; and pictures that are added later move none from one side to the
    other, except where a side would have been empty.

    Args:
        dataset: its picture files are read.
        fraction: of the distinct pictures that is held out, on average; between 0 and 1.
        seed: another seed gives another choice.

    Returns:
        the rest and the held-out part, neither empty; together they have every record once.

    Raises:
        DataError: a picture cannot be read, the fraction is out of range, or there are not two distinct pictures.
    """
    if not 0 < fraction < 1:
        raise DataError(f"{fraction} of the pictures cannot be held out", "give a fraction between 0 and 1")
    draws = [draw_by_content(record.path, seed) for record in dataset.records]
    distinct = sorted(set(draws))
    if len(distinct) < 2:
        raise DataError(
            f"{dataset.name} has {counted(len(distinct), 'distinct picture')}, and none can be held out to validate",
            "add pictures, or name other data to validate on; train takes it, or none, as --val",
        )
    # The lowest draw is always held out and the highest never, so that neither side is empty.
    limit = min(max(int(fraction * 2**256), distinct[0] + 1), distinct[-1])
    held = [draw < limit for draw in draws]
    note = f"{sum(held):,} of {counted(len(held), 'picture')} held out by content, seed {seed}"
    rest, out = (
        tuple(r for r, is_held in zip(dataset.records, held, strict=True) if is_held is side) for side in (False, True)
    )
    return (
        dataclasses.replace(dataset, records=rest, notes=(*dataset.notes, note)),
        dataclasses.replace(dataset, name=f"{dataset.name} (held out)", records=out, notes=(note,)),
    )


def draw_by_content(picture: Path, seed: int) -> int:
    """Draw a number in [0, 2**256) that is even over pictures and decided by a picture's bytes and the seed alone.

    Raises:
        DataError: the picture cannot be read.
    """
    with open_regular(picture) as file:
        content = hashlib.file_digest(file, "sha256").digest()
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + content).digest(), "big")
