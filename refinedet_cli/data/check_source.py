"""From what a user calls a data set to all of its parts, read tolerantly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from refinedet_cli.data.check import PART_MISSING, UNREADABLE, Findings
from refinedet_cli.data.check_entries import Part, scan_coco, scan_voc, scan_yolo
from refinedet_cli.data.dataset import Split
from refinedet_cli.data.kinds import CocoFolder, CocoSource, JsonFile, JsonFolder, Voc, Yolo, recognise
from refinedet_cli.data.locate import Place, locate
from refinedet_cli.data.yolo import find_yolo
from refinedet_cli.errors import DataError


def find_base(source: str, root: Path | None = None) -> Path:
    """Find the folder that a data set lies in.

    Raises:
        DataError: it does not exist.
    """
    path = locate(source, root).path
    return path if path.is_dir() else path.parent


def scan_source(
    source: str, split: Split | None, images: Path | None, root: Path | None, findings: Findings
) -> list[Part]:
    """Read the parts of a data set.

    Args:
        source: as for ``open_dataset``; with ``:PART``, that part alone.
        split: the part to read, whatever it may be called; None reads all.
        images: as for ``open_dataset``.
        root: as for ``open_dataset``.
        findings: receives what is wrong.

    Returns:
        the parts that could be read, train first.

    Raises:
        DataError: the source does not exist, is of a format that is not read, or has no such part.
        UsageError: ``images`` is given for a format that names its own folders.
    """
    place = locate(source, root, split)
    if images is not None and not images.is_dir():
        raise DataError(f"the folder of pictures {images} does not exist", "check --images")
    try:
        kind = recognise(place, root)
    except DataError as error:
        described = _described(place)
        if described is None:
            raise
        findings.fault(UNREADABLE, described, "", error)
        return []
    wanted = place.part or split
    try:
        if isinstance(kind, JsonFile):
            return _scan_file(kind, place, wanted, images, findings)
        if isinstance(kind, JsonFolder):
            return _scan_folder(kind, wanted, images, findings, named=place.part is not None)
        if isinstance(kind, CocoFolder):
            return _scan_official(kind, wanted, images, findings)
        if isinstance(kind, Voc):
            return _scan_voc(kind, wanted, images, findings, named=place.part is not None)
        if isinstance(kind, Yolo):
            return _scan_yolo(kind, wanted, images, findings)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}", "change its permissions") from error
    raise TypeError(f"no tolerant reader for {type(kind).__name__}")


def _described(place: Place) -> Path | None:
    """The YAML file that is at fault where a data set is not recognised."""
    if place.path.is_dir():
        return find_yolo(place.path)
    return place.path if place.path.suffix.lower() in (".yaml", ".yml") else None


def _scan_file(kind: JsonFile, place: Place, wanted: str | None, images: Path | None, findings: Findings) -> list[Part]:
    source = kind.source(wanted or "train", named=place.part is not None)
    return _scan_json("", source, images, findings)


def _scan_folder(
    kind: JsonFolder, wanted: str | None, images: Path | None, findings: Findings, *, named: bool
) -> list[Part]:
    parts = (wanted,) if wanted is not None else kind.splits()
    found: list[Part] = []
    for part in parts:
        sources = kind.sources(part, named=named)
        for extra in sources[1:]:
            detail = f"{part} may be this file or {sources[0].file.name}"
            findings.add(PART_MISSING, extra.file, "", detail, cure="keep one of them, or name the JSON file itself")
        for source in sources:
            found += _scan_json(part, source, images, findings)
    if not parts:
        for source in kind.loose():
            found += _scan_json(source.file.stem, source, images, findings)
    return found


def _scan_official(kind: CocoFolder, wanted: str | None, images: Path | None, findings: Findings) -> list[Part]:
    found: list[Part] = []
    for part in (wanted,) if wanted is not None else kind.splits():
        found += _scan_json(part, kind.source(part), images, findings)
    return found


def _scan_json(name: str, source: CocoSource, images: Path | None, findings: Findings) -> list[Part]:
    part = scan_coco(name, source.file, images, source.search, findings)
    return [] if part is None else [part]


def _scan_voc(kind: Voc, wanted: str | None, images: Path | None, findings: Findings, *, named: bool) -> list[Part]:
    folder = kind.folder
    if wanted is None:
        # Of lists such as trainval, whose pictures are in others too, nothing is read where there are others.
        parts = [part for split in kind.splits() if (part := folder.part(split)) is not None] or list(folder.parts)
    else:
        parts = [kind.find(wanted, named=named)]
    return scan_voc(folder, parts, images, findings)


def _scan_yolo(kind: Yolo, wanted: str | None, images: Path | None, findings: Findings) -> list[Part]:
    kind.refuse_images(images)
    if wanted is not None:
        kind.annotations(wanted, named=True)  # Refuses a part that is not there.
    parts: Sequence[str] = kind.splits() if wanted is None else (wanted,)
    return [scan_yolo(kind.described, part, findings) for part in parts]
