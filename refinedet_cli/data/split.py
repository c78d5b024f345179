"""A data set divided anew: by what pictures show, in groups that stay together, with the classes in balance."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.core.config import Classes
from refinedet_cli.data.convert import extras_of, labels_of, notes_of, open_parts, refuse_inside
from refinedet_cli.data.dataset import SPLIT_NAMES, Dataset, Record, Split, join, listed
from refinedet_cli.data.files import whole_folder
from refinedet_cli.data.placement import Part, Placement, Transfer, Transferred, place_for_coco, transfer_pictures
from refinedet_cli.data.source import describe_source, draw_by_content, open_dataset
from refinedet_cli.data.write_coco import Extras, write_coco
from refinedet_cli.errors import DataError, UsageError

BY_FOLDER = "folder"
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Divided:
    """What was written.

    Attributes:
        out: the folder.
        classes: of all parts.
        parts: in the order asked for.
        shares: the share of each part that was asked for.
        units: number of units that stayed together; as many as pictures where no two are alike or of one group.
        copies: number of pictures that show what another shows, byte for byte.
        alone: number of pictures that the group's pattern does not match; 0 without one.
        notes: of the source.
        pictures: how their files came there.
    """

    out: Path
    classes: Classes
    parts: tuple[Part, ...]
    shares: tuple[float, ...]
    units: int
    copies: int
    alone: int
    notes: tuple[str, ...]
    pictures: Transferred

    @cached_property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """Objects of each class, in each part."""
        columns = len(self.classes) + 1
        found = [np.bincount(labels_of(part.dataset), minlength=columns)[1:] for part in self.parts]
        return tuple(tuple(counts.tolist()) for counts in found)

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """Objects of each class, in all parts."""
        return tuple(sum(column) for column in zip(*self.counts, strict=True))


def read_shares(text: str) -> dict[Split, float]:
    """Read ``train=0.8,val=0.1,test=0.1``.

    Returns:
        the share of each part, in the order given; they add up to 1.

    Raises:
        UsageError: it is malformed, a part is unknown or there twice, or the shares do not add up to 1.
    """
    cure = "write it as train=0.8,val=0.1,test=0.1, with shares that add up to 1"
    shares: dict[Split, float] = {}
    for item in text.split(","):
        name, _, number = item.partition("=")
        split = next((split for split in SPLIT_NAMES if split == name.strip()), None)
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if split is None or split in shares or not 0 < share < 1:
            raise UsageError(f"--parts has {item.strip()!r}", cure)
        shares[split] = share
    if abs(sum(shares.values()) - 1) > _TOLERANCE:
        raise UsageError(f"the shares of --parts add up to {sum(shares.values()):g}", cure)
    return shares


def deal(
    counts: NDArray[np.int64], sizes: NDArray[np.int64], draws: Sequence[int], shares: Sequence[float]
) -> NDArray[np.int64]:
    """Divide units so that each part has its share of the objects of each class, as far as units allow.

    The rarest class goes first: each unit that has it, in the order of the draws, goes to the part that lacks most
    objects of this class; if two lack as many, to the one that lacks more pictures. Then the next rarest among the
    units left, and so on; units without objects go to the part that lacks most pictures. No part stays empty.

    Args:
        counts: int64[U, C], objects of each class in each unit.
        sizes: int64[U], pictures in each unit; positive.
        draws: of each unit; no two are equal.
        shares: of each part; they add up to 1.

    Returns:
        int64[U], the part of each unit. It does not depend on the order of the units.

    Raises:
        DataError: there are fewer units than parts.

    Source: iterative stratification, Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011. Differs: objects are balanced,
        not labels, and ties are broken by draws.
    """
    if len(sizes) < len(shares):
        raise DataError(
            f"{len(sizes):,} pictures or groups that differ cannot be divided into {len(shares)} parts",
            "add pictures, or ask for fewer parts or smaller groups",
        )
    order = np.array(sorted(range(len(draws)), key=draws.__getitem__), dtype=np.int64)
    # A last column counts pictures: the "class" of units that have no object.
    table = np.concatenate([counts, sizes[:, None]], axis=1)[order]
    lacking = np.outer(shares, table.sum(axis=0))
    part = np.full(len(order), -1, dtype=np.int64)
    for column in _rarest_first(table):
        for unit in np.flatnonzero((part < 0) & (table[:, column] > 0)):
            # Rounded, for what is equal but for floating point is decided by pictures.
            lacks = np.round(lacking[:, [column, -1]], 6)
            part[unit] = max(range(len(shares)), key=lambda p: (lacks[p, 0], lacks[p, 1], -p))
            lacking[part[unit]] -= table[unit]
    _fill_empty(part, table[:, -1], shares)
    found = np.empty_like(part)
    found[order] = part
    return found


def split(
    source: str,
    shares: Mapping[Split, float],
    out: Path,
    *,
    seed: int = 0,
    group: str | None = None,
    transfer: Transfer = "stay",
    images: Path | None = None,
    root: Path | None = None,
    show: Callable[[str, int, int], None] = lambda doing, done, total: None,
) -> Divided:
    """Divide a data set into COCO files train.json, val.json, test.json.

    Pictures of equal bytes are never in two parts, whatever they are called; nor are pictures of one group. What goes
    where depends on pictures, objects and seed, not on names or order.

    Args:
        source: as for ``open_dataset``; parts that it has are joined first.
        shares: from ``read_shares``.
        out: a folder that does not exist yet or is empty, and not inside the source.
        seed: another seed gives another division.
        group: ``folder``, or a pattern that is searched in ``file_name``; its groups in parentheses, or else all that
            it matches, are the name of the group.
        transfer: as for ``convert``.
        images: as for ``open_dataset``.
        root: as for ``open_dataset``.
        show: is told what is done, how many pictures, and of how many.

    Raises:
        DataError: the source cannot be read or has too few pictures.
        UsageError: ``out`` is not empty or inside the source, or the pattern is malformed or matches no picture.
    """
    described = describe_source(source, root)
    found = open_parts(source, described, images, root)
    refuse_inside(out, described, found)
    dataset = join([part.dataset for part in found])
    key_of = _key_of(group)
    keys = [key_of(record) for record in dataset.records]
    alone = sum(key is None for key in keys) if group is not None else 0
    if group is not None and alone == len(keys):
        raise UsageError(
            f"--group {group} matches no file name, as {dataset.records[0].file_name}", "check the pattern"
        )
    draws = []
    for record in dataset.records:
        draws.append(draw_by_content(record.path, seed))
        show("reading", len(draws), len(keys))
    unit_of = _units(draws, keys)
    side = _side(dataset, draws, unit_of, list(shares.values()))
    extras = _joined_extras(found, dataset, extras_of(source, described, found, root))
    parts = [Part(name, _taken(dataset, side == i)) for i, name in enumerate(shares)]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        show("writing", done, len(keys))

    placement = _place(dataset, side, len(parts), transfer)
    with whole_folder(out) as folder:
        pictures = transfer_pictures(parts, placement, folder, transfer, step)
        for part, names in zip(parts, placement.file_names, strict=True):
            write_coco(folder / f"{part.name}.json", part.dataset, names, extras)
            _check(folder, part)
    return Divided(
        out=out,
        classes=dataset.classes,
        parts=tuple(parts),
        shares=tuple(shares.values()),
        units=len(set(unit_of)),
        copies=len(draws) - len(set(draws)),
        alone=alone,
        notes=tuple(notes_of(described, found)),
        pictures=pictures,
    )


# Dealing -------------------------------------------------------------------------------------------------------------


def _rarest_first(table: NDArray[np.int64]) -> list[int]:
    """The columns in the order of what is left of them once the units of those before are gone; pictures last."""
    left = np.ones(len(table), dtype=bool)
    columns = set(range(table.shape[1] - 1))
    order = []
    while columns:
        totals = table[left].sum(axis=0).tolist()
        column = min(columns, key=lambda c: (totals[c] or 2**63, c))
        columns.remove(column)
        order.append(column)
        left &= table[:, column] == 0
    return [*order, table.shape[1] - 1]


def _fill_empty(part: NDArray[np.int64], sizes: NDArray[np.int64], shares: Sequence[float]) -> None:
    """Give each part without a unit the last one of the part that has most pictures beyond its share."""
    for empty in range(len(shares)):
        if (part == empty).any():
            continue
        pictures = np.bincount(part, weights=sizes, minlength=len(shares))
        units = np.bincount(part, minlength=len(shares))
        beyond = np.where(units > 1, pictures - np.array(shares) * sizes.sum(), -np.inf)
        part[np.flatnonzero(part == beyond.argmax())[-1]] = empty


def _units(draws: Sequence[int], keys: Sequence[str | None]) -> list[int]:
    """Number the units: pictures of the same bytes or the same group, directly or through others, have one number."""
    leader = list(range(len(draws)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first: dict[int | str, int] = {}
    for i, pair in enumerate(zip(draws, keys, strict=True)):
        for key in pair:
            if key is not None:
                leader[find(i)] = find(first.setdefault(key, i))
    return [find(i) for i in range(len(draws))]


def _side(dataset: Dataset, draws: Sequence[int], unit_of: Sequence[int], shares: Sequence[float]) -> NDArray[np.int64]:
    """The part of each picture."""
    _, place = np.unique(np.array(unit_of), return_inverse=True)
    counts = np.zeros((int(place.max()) + 1, len(dataset.classes)), dtype=np.int64)
    lowest: dict[int, int] = {}
    for record, draw, unit in zip(dataset.records, draws, place.tolist(), strict=True):
        counts[unit] += np.bincount(record.labels - 1, minlength=len(dataset.classes))
        lowest[unit] = min(draw, lowest.get(unit, draw))
    sizes = np.bincount(place)
    side: NDArray[np.int64] = deal(counts, sizes, [lowest[unit] for unit in range(len(sizes))], shares)[place]
    return side


def _key_of(group: str | None) -> Callable[[Record], str | None]:
    """What names the group of a picture; None where it stands alone."""
    if group is None:
        return lambda record: None
    if group == BY_FOLDER:
        return lambda record: str(record.path.parent)
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UsageError(f"--group {group} is no pattern: {error}", "give folder, or a regular expression") from None

    def key(record: Record) -> str | None:
        match = pattern.search(record.file_name)
        if match is None:
            return None
        return "\0".join(text or "" for text in match.groups()) if pattern.groups else match.group()

    return key


# Writing -------------------------------------------------------------------------------------------------------------


def _taken(dataset: Dataset, chosen: NDArray[np.bool_]) -> Dataset:
    records = tuple(record for record, is_chosen in zip(dataset.records, chosen, strict=True) if is_chosen)
    return dataclasses.replace(dataset, records=records, notes=())


def _place(dataset: Dataset, side: NDArray[np.int64], count: int, transfer: Transfer) -> Placement:
    """Names for the whole, so that a picture has the same in whatever part it falls; then part by part."""
    whole = place_for_coco([Part(None, dataset)], transfer)
    names, file_names = (
        tuple(tuple(name for name, s in zip(these[0], side, strict=True) if s == part) for part in range(count))
        for these in (whole.names, whole.file_names)
    )
    return Placement(names, file_names, whole.links)


def _joined_extras(found: Sequence[Part], dataset: Dataset, extras: Sequence[Extras]) -> Extras:
    """Further fields by the ids of the joined data set, whose records are those of its parts in a row."""
    if len(found) == 1:
        return extras[0]
    images: dict[int, Mapping[str, Any]] = {}
    annotations: dict[int, Mapping[str, Any]] = {}
    categories: dict[int, Mapping[str, Any]] = {}
    joined = iter(dataset.records)
    for part, more in zip(found, extras, strict=True):
        for record in part.dataset.records:
            new = next(joined)
            if record.image_id in more.images:
                images[new.image_id] = more.images[record.image_id]
            for old, own in zip(record.annotation_ids.tolist(), new.annotation_ids.tolist(), strict=True):
                if old in more.annotations:
                    annotations[own] = more.annotations[old]
        names = dict(zip(part.dataset.classes.names, part.dataset.classes.category_ids, strict=True))
        for name, own in zip(dataset.classes.names, dataset.classes.category_ids, strict=True):
            if names.get(name) in more.categories:
                categories.setdefault(own, more.categories[names[name]])
    return Extras(extras[0].document, images, annotations, categories)


def _check(folder: Path, part: Part) -> None:
    """Read a part back, and see that all is there."""
    back = open_dataset(str(folder), split=part.name or "train")
    if not all(_equal(a, b) for a, b in zip(part.dataset.records, back.records, strict=True)):
        raise RuntimeError(f"what was written of {part.name} reads differently: {listed(back.notes)}")


def _equal(a: Record, b: Record) -> bool:
    same = np.array_equal(a.boxes, b.boxes) and np.array_equal(a.labels, b.labels) and np.array_equal(a.crowd, b.crowd)
    return same and a.image_id == b.image_id and np.array_equal(a.difficult, b.difficult)
