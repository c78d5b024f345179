"""Looks at the pictures of a data set: can they be read, how large are they as seen, which are the same."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from refinedet_cli.data.check import (
    LEAK,
    PICTURE_DAMAGED,
    PICTURE_MISSING,
    PICTURE_TOO_LARGE,
    PICTURE_UNREADABLE,
    SAME_PICTURE,
    SIZE_DIFFERS,
    SIZE_TURNED,
    TURNED,
    Findings,
    Kind,
    Listed,
)
from refinedet_cli.data.images import MAX_PIXELS, open_regular, read_header, read_image
from refinedet_cli.errors import DataError

# How far to look into pictures: not at all, at sizes and EXIF alone, or at every pixel.
Depth = Literal["entries", "headers", "pixels"]

# Enough to tell compressed pictures of one length apart; those that agree in it are compared in full.
_SAMPLE = 4096
_AHEAD = 32


class Fault(NamedTuple):
    """Why a picture cannot be used."""

    kind: Kind
    error: DataError


class Look(NamedTuple):
    """What a picture file turned out to be.

    Attributes:
        size: (width, height) as seen, px-img; None where that could not be read.
        orientation: of EXIF, 1..8.
        digest: equal for equal pixels, or for files that may well be equal where only headers were looked at; None
            where there is none.
        fault: why it cannot be used; None for a good one.
    """

    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes | None = None
    fault: Fault | None = None


def look_at(path: Path, depth: Depth) -> Look:
    """Look at one picture; never raises for what is wrong with it."""
    try:
        size, orientation = read_header(path, max_pixels=sys.maxsize)
        sample = None if depth == "pixels" else _sample(path)
    except DataError as error:
        missing = isinstance(error.__context__, (FileNotFoundError, NotADirectoryError))
        return Look(fault=Fault(PICTURE_MISSING if missing else PICTURE_UNREADABLE, error))
    width, height = size
    if width * height > MAX_PIXELS:
        limit = f"{width:,} x {height:,} pixels, more than {MAX_PIXELS / 1e6:g} megapixels"
        return Look(size, orientation, None, Fault(PICTURE_TOO_LARGE, DataError(limit)))
    if depth != "pixels":
        return Look(size, orientation, sample)
    try:
        pixels = read_image(path)
    except DataError as error:
        return Look(size, orientation, None, Fault(PICTURE_DAMAGED, error))
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    return Look(size, orientation, digest.digest())


def look_at_all(paths: Sequence[Path], depth: Depth, threads: int) -> Iterator[Look]:
    """Look at many pictures, each in the order given; few are held in memory at once."""
    if depth == "entries":
        return
    with ThreadPoolExecutor(max(1, threads)) as pool:
        step = _AHEAD * max(1, threads)
        for start in range(0, len(paths), step):
            yield from pool.map(lambda path: look_at(path, depth), paths[start : start + step])


class ListedPart(NamedTuple):
    """The pictures of a part of a data set, and what to call it."""

    name: str
    pictures: Sequence[Listed]


def judge_pictures(
    parts: Sequence[ListedPart], depth: Depth, threads: int, findings: Findings, on_picture: Callable[[int, int], None]
) -> list[list[tuple[int, int] | None]]:
    """Look at all pictures of a data set, each file once, however often it is listed.

    Args:
        parts: in whose order a picture that is in two of them belongs to the first.
        depth: how far to look.
        threads: that read at once; findings do not depend on it.
        findings: receives what is wrong.
        on_picture: called with the pictures that are done, and with all, after each.

    Returns:
        for each picture of each part its (width, height), px-img: as stated, else as seen; None where it is not known.
    """
    sizes = [[listed.size for listed in part.pictures] for part in parts]
    listings: dict[Path, list[tuple[int, int]]] = {}
    for p, part in enumerate(parts):
        for i, listed in enumerate(part.pictures):
            if listed.path is not None:
                listings.setdefault(listed.path, []).append((p, i))
    paths = list(listings)
    looks = []
    for path, look in zip(paths, look_at_all(paths, depth, threads), strict=False):
        for p, i in listings[path]:
            _judge(parts[p].pictures[i], path, look, findings)
            sizes[p][i] = sizes[p][i] or look.size
        looks.append(look)
        on_picture(len(looks), len(paths))
    groups = same_pictures(paths, looks, depth)
    grouped = {place for group in groups for place in group}
    groups += [[place] for place, path in enumerate(paths) if len(listings[path]) > 1 and place not in grouped]
    for group in groups:
        _judge_same(parts, [(place, *at) for place in group for at in listings[paths[place]]], findings)
    return sizes


def _judge(listed: Listed, path: Path, look: Look, findings: Findings) -> None:
    if look.fault is not None:
        kind, error = look.fault
        reason = error.message.removeprefix(str(path)).strip()
        detail = reason if path == listed.file else f"{path.name} {reason}"
        findings.add(kind, listed.file, listed.where, detail, cure=error.hint or "")
    if look.size is None:
        return
    seen = f"{look.size[0]} x {look.size[1]}"
    tells = look.orientation >= 5 and look.size[0] != look.size[1] and listed.size is not None
    if listed.size is not None and listed.size != look.size:
        turned = look.orientation >= 5 and listed.size == look.size[::-1]
        detail = f"{listed.size[0]} x {listed.size[1]} is stated, {path.name} is {seen}"
        findings.add(SIZE_TURNED if turned else SIZE_DIFFERS, listed.file, listed.where, detail, picture=path)
    elif look.orientation > 1 and not tells:
        detail = f"{path.name}, EXIF orientation {look.orientation}"
        findings.add(TURNED, listed.file, listed.where, detail, picture=path)


def _judge_same(parts: Sequence[ListedPart], group: list[tuple[int, int, int]], findings: Findings) -> None:
    """Report all of a group of equal pictures but the first; each is place of the file, part, and place in the part."""
    ordered = sorted(group, key=lambda one: one[1:])
    first_of: dict[int, tuple[int, Listed]] = {}
    for file, p, i in ordered:
        listed = parts[p].pictures[i]
        first_of.setdefault(p, (file, listed))
        _, first_part, _ = ordered[0]
        file_before, before = first_of[first_part] if p != first_part else first_of[p]
        if listed is before or listed.path is None or before.path is None:
            continue
        if p != first_part:
            detail = f"{listed.path.name} is {before.path.name} of {parts[first_part].name}"
            findings.add(LEAK, listed.file, listed.where, detail, picture=listed.path)
        elif file != file_before:
            detail = f"{listed.path.name} is {before.path.name}"
            findings.add(SAME_PICTURE, listed.file, listed.where, detail, picture=listed.path)


def same_pictures(paths: Sequence[Path], looks: Sequence[Look], depth: Depth) -> list[list[int]]:
    """Group pictures that are the same, whatever their names.

    Args:
        paths: different ones.
        looks: at each.
        depth: of the looks; where only headers were read, files have to be equal byte for byte.

    Returns:
        places of equal pictures, ascending, two or more in each group.
    """
    first: dict[bytes, int] = {}
    groups: dict[int, list[int]] = {}
    for place, look in enumerate(looks):
        if look.digest is None:
            continue
        known = first.setdefault(look.digest, place)
        if known != place:
            groups.setdefault(known, [known]).append(place)
    if depth == "pixels":
        return list(groups.values())
    return [same for group in groups.values() for same in _equal_files(paths, group)]


def _equal_files(paths: Sequence[Path], group: list[int]) -> Iterator[list[int]]:
    found: dict[bytes, list[int]] = {}
    for place in group:
        try:
            with open_regular(paths[place]) as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except (DataError, OSError):  # Gone since it was looked at.
            continue
        found.setdefault(content, []).append(place)
    yield from (same for same in found.values() if len(same) > 1)


def _sample(path: Path) -> bytes:
    """Length, beginning and end of a file."""
    with open_regular(path) as file:
        length = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(length.to_bytes(8, "big"), digest_size=16)
        file.seek(max(0, length - _SAMPLE))
        digest.update(file.read(_SAMPLE))
        file.seek(0)
        digest.update(file.read(_SAMPLE))
    return digest.digest()
