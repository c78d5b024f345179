"""The journal of a run: a line a picture, on disk as soon as the picture is done, from which a run can go on.

The first line of ``detections.jsonl`` says what the run is: detector, options and pictures. A line a picture follows,
with what was found or why it failed, and once all is written, a line that says so. A picture that failed may be tried
again, and has another line then. Processes that share the work write one file each, ``detections-RANK.jsonl``; the run
is what all files together say.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Self

from refinedet_cli import __version__
from refinedet_cli.core.config import Classes, DetectorConfig, to_dict
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.images import FoundImage
from refinedet_cli.engine.results import Origin, PictureRecord, Row, row_document
from refinedet_cli.errors import DataError, UsageError
from refinedet_cli.files import whole_file

JOURNAL_NAME = "detections.jsonl"

_FORMAT, _FORMAT_VERSION = "refinedet detections", 1
_JOURNAL_FILE = re.compile(r"detections(-(?P<rank>\d+))?\.jsonl")
# How a user calls what the first line holds.
_OPTIONS = {
    "version": "refinedet",
    "sha256": "--weights",
    "config_sha256": "detector",
    "score_threshold": "--score",
    "precision": "--precision",
    "decoder": "pictures are read by",
    "multi_scale": "--multi-scale",
    "tiles": "--tile",
    "only_classes": "--class",
    "annotated": "drawing",
    "crops": "--crops",
    "pictures": "number of pictures",
}


def journal_name(rank: int | None) -> str:
    """Name the file of one of several processes; None is the only one."""
    return JOURNAL_NAME if rank is None else f"detections-{rank}.jsonl"


@dataclass(frozen=True)
class RunKey:
    """What a run is: two with equal keys find the same and write the same.

    Attributes:
        origin: the detector and its options.
        config_sha256: of everything that the detector computes except its weights.
        pictures: how many there are.
        listing_sha256: of their paths and names, in order.
        annotated: whether copies are drawn.
        crops: whether objects are cut out.
    """

    origin: Origin
    config_sha256: str
    pictures: int
    listing_sha256: str
    annotated: bool
    crops: bool

    @classmethod
    def of(
        cls, origin: Origin, config: DetectorConfig, images: Iterable[FoundImage], *, annotated: bool, crops: bool
    ) -> Self:
        """Make the key of a run; the pictures are gone through once."""
        count, listing = 0, hashlib.sha256()
        for count, image in enumerate(images, start=1):  # noqa: B007
            listing.update(os.fsencode(image.path.absolute()) + b"\0" + os.fsencode(image.name) + b"\0")
        computed = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
        return cls(origin, computed.hexdigest(), count, listing.hexdigest(), annotated, crops)

    def document(self) -> dict[str, Any]:
        """What the first line says of it, as it comes back from JSON."""
        key = {
            "version": __version__,
            "origin": to_dict(self.origin) | {"config_sha256": self.config_sha256},
            "options": {"annotated": self.annotated, "crops": self.crops},
            "sources": {"pictures": self.pictures, "listing_sha256": self.listing_sha256},
        }
        return dict(json.loads(json.dumps(key)))


class Earlier(NamedTuple):
    """What journals in a folder tell of the run that wrote them.

    Attributes:
        done: pictures with a line that tells of no problem.
        pictures: that the run has in all.
        finished: whether everything was written.
        outputs: the formats that it wrote, or was about to write.
    """

    done: int
    pictures: int
    finished: bool
    outputs: frozenset[str]


class Journal:
    """The pictures that a run is done with, on disk; an iterable of records, by image id, and a context manager.

    Of each picture only the place of its line is held, and whether it is to be tried again: eleven bytes.

    Args:
        folder: of all outputs.
        key: of the run.
        classes: names of the category ids.
        rank: of this process among those that share the work; None where it is alone.

    Attributes:
        done: pictures that are in it, those to be tried again aside.
    """

    def __init__(self, folder: Path, key: RunKey, classes: Classes, *, rank: int | None = None) -> None:
        self.done = 0
        self._folder, self._key, self._rank = folder, key, rank
        self._path = folder / journal_name(rank)
        self._names = dict(zip(classes.category_ids, classes.names, strict=True))
        self._offsets = array("q", [-1]) * (key.pictures + 1)
        self._files = array("H", [0]) * (key.pictures + 1)
        self._again = bytearray(key.pictures + 1)
        self._last, self._is_ordered = 0, True
        self._paths: list[Path] = []
        self._ends: list[int] = []
        self._own: FileIO | None = None
        self._finished = False
        self._outputs: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._own is not None:
            self._own.close()
            self._own = None

    def __contains__(self, image_id: int) -> bool:
        return self._offsets[image_id] >= 0 and not self._again[image_id]

    def __iter__(self) -> Iterator[PictureRecord]:
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self._paths]
            for image_id, offset in enumerate(self._offsets):
                if offset >= 0:
                    file = files[self._files[image_id]]
                    file.seek(offset)
                    yield _record(json.loads(file.readline()), self._folder)

    @property
    def is_merged(self) -> bool:
        """Whether it is one file with one line a picture, by image id."""
        return self._rank is None and len(self._paths) <= 1 and self._is_ordered

    def read(self, *, again: bool = False) -> None:
        """Take up what all files of the folder hold beyond what was read of them before.

        A line that is cut off, as by a process that was killed, does not count, nor do any behind it.

        Args:
            again: a picture that has failed is to be tried again.

        Raises:
            UsageError: a file is of another run; tells how they differ.
            DataError: a file is none of a run.
        """
        for path in journals_in(self._folder):
            if path not in self._paths:
                self._paths.append(path)
                self._ends.append(0)
            self._read_file(self._paths.index(path), again=again)

    def begin(self, outputs: Iterable[str]) -> None:
        """Make this process's own file ready for lines, cutting off what is not whole, and say what will be written.

        Raises:
            DataError: the file cannot be written.
        """
        if self._path not in self._paths:
            self._paths.append(self._path)
            self._ends.append(0)
        own = self._paths.index(self._path)
        declared = sorted(self._outputs | set(outputs))
        if not self._ends[own]:
            header = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **self._key.document(), "outputs": declared}
            write_whole(self._path, _line(header))
            self._ends[own] = self._path.stat().st_size
            self._outputs = set(declared)
        self._own = self._path.open("r+b", buffering=0)
        self._own.truncate(self._ends[own])
        self._own.seek(self._ends[own])
        if set(declared) != self._outputs:
            self._append({"outputs": declared})
            self._outputs, self._finished = set(declared), False

    def append(self, record: PictureRecord) -> None:
        """Write the line of a picture; when this returns, no end of the process can lose it.

        Raises:
            DataError: the line cannot be written.
        """
        own = self._paths.index(self._path)
        offset = self._ends[own]
        self._append(_document(record, self._folder, self._names))
        self._is_ordered &= record.image_id > self._last
        self._note(record.image_id, own, offset, again=False)
        self._finished = False

    def finish(self) -> None:
        """Say that all outputs are written."""
        if not self._finished:
            self._append({"finished": True})
            self._finished = True

    def merge(self) -> None:
        """Put the lines of all files into one, one for each picture, by image id, and remove the files of processes.

        Raises:
            DataError: it cannot be written.
        """
        target = self._folder / JOURNAL_NAME
        header = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **self._key.document()}
        with whole_file(target) as file:
            file.write(_line({**header, "outputs": sorted(self._outputs)}))
            for record in self:
                file.write(_line(_document(record, self._folder, self._names)))
        self.__exit__()
        remove_parts(self._folder)
        self._offsets = array("q", [-1]) * len(self._offsets)
        self._again = bytearray(len(self._offsets))
        self._paths, self._ends, self._path, self._rank = [], [], target, None
        self.done, self._finished, self._last, self._is_ordered = 0, False, 0, True
        self.read()
        self.begin(self._outputs)

    def missing(self) -> Iterator[int]:
        """The image ids of the pictures that are not in it."""
        return (i for i in range(1, len(self._offsets)) if i not in self)

    def is_to_try_again(self, image_id: int) -> bool:
        """Tell whether a picture has failed before and was not tried since."""
        return bool(self._again[image_id])

    def _append(self, document: dict[str, Any]) -> None:
        if self._own is None:
            raise RuntimeError("the journal has not begun")
        line, own = _line(document), self._paths.index(self._path)
        try:
            if self._own.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # What is written next must not stand behind half a line.
            with suppress(OSError):
                self._own.truncate(self._ends[own])
            self._own.seek(self._ends[own])
            raise DataError(
                f"cannot write {self._path}: {error.strerror}", "free some space, then go on with --resume"
            ) from error
        self._ends[own] += len(line)

    def _read_file(self, number: int, *, again: bool) -> None:
        path, start = self._paths[number], self._ends[number]
        for offset, end, document in _lines(path, start):
            if offset == 0:
                _check_header(document, path, self._key)
                self._outputs |= set(document["outputs"])
            elif isinstance(image_id := document.get("id"), int) and 0 < image_id <= self._key.pictures:
                self._is_ordered &= image_id > self._last
                # Of two files, that with the better news may be read first.
                if "problem" not in document or image_id not in self:
                    self._note(image_id, number, offset, again=again and "problem" in document)
                self._finished = False
            elif "outputs" in document:
                self._outputs |= set(document["outputs"])
                self._finished = False
            elif "finished" in document:
                self._finished = True
            else:
                break
            self._ends[number] = end

    def _note(self, image_id: int, file: int, offset: int, *, again: bool) -> None:
        self.done += (not again) - (image_id in self)
        self._offsets[image_id], self._files[image_id], self._again[image_id] = offset, file, again
        self._last = max(self._last, image_id)


def journals_in(folder: Path) -> list[Path]:
    """Find the journals in a folder: that of a run, then those of processes by rank."""
    found = [(int(match["rank"] or -1), p) for p in folder.iterdir() if (match := _JOURNAL_FILE.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def remove_parts(folder: Path) -> None:
    """Remove the files of processes that shared the work, whose lines are in that of the run or of no use."""
    for path in journals_in(folder):
        if path.name != JOURNAL_NAME:
            path.unlink(missing_ok=True)


def look_at(paths: Sequence[Path]) -> Earlier | None:
    """Tell what journals hold; None where none has begun."""
    done = pictures = 0
    finished, outputs = False, set()
    for path in paths:
        for offset, _, document in _lines(path, 0):
            if offset == 0:
                pictures = _header(document, path)["sources"]["pictures"]
            elif "id" in document or "outputs" in document:
                finished = False
            done += "id" in document and "problem" not in document
            finished |= "finished" in document
            outputs |= set(document.get("outputs", ()))
    return Earlier(done, pictures, finished, frozenset(outputs)) if outputs else None


def records_in(path: Path) -> Iterator[PictureRecord]:
    """The records of one journal, in the order of its lines."""
    return (_record(document, path.parent) for _, _, document in _lines(path, 0) if "id" in document)


def _lines(path: Path, start: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The whole lines from a place on, each with where it begins and ends; stops at the first that is none."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:  # Rank 0 has merged it just now.
            return
        file.seek(start)
        while line := file.readline():
            try:
                document = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                document = None
            if not isinstance(document, dict):
                if not start and line.endswith(b"\n"):
                    raise _stranger(path)
                return
            yield start, start + len(line), document
            start += len(line)


def _header(document: dict[str, Any], path: Path) -> dict[str, Any]:
    if document.get("format") != _FORMAT:
        raise _stranger(path)
    if document.get("format_version") != _FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {document.get('format_version')}, and this tool reads {_FORMAT_VERSION}",
            "use the version of refinedet that wrote it, or another output folder",
        )
    return document


def _stranger(path: Path) -> DataError:
    return DataError(f"{path} was not written by refinedet detect", "move it away, or choose another output folder")


def _check_header(document: dict[str, Any], path: Path, key: RunKey) -> None:
    then, now = _header(document, path), key.document()
    differences = list(_differences(_flat(then), _flat(now)))
    if differences:
        raise UsageError(
            f"{path} is of a run with other settings: {'; '.join(differences)}",
            "give the settings of that run to go on with it, or choose another --out",
        )


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    parts = (header["origin"], header["options"], header["sources"])
    return {"version": header["version"]} | {name: value for part in parts for name, value in part.items()}


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    if "sha256" in changed:
        # A file may have changed under its name; other weights often bring another config, which goes without saying.
        yield f"--weights {then['weights']} ({then['sha256'][:8]}) then, {now['weights']} ({now['sha256'][:8]}) now"
        changed -= {"config_sha256", "preset"}
    if "score_threshold" in changed:
        # The detector keeps what --score asks for: that its setup differs too says nothing more.
        changed.discard("config_sha256")
    if changed & {"annotated", "crops", "multi_scale", "tiles"}:
        # Whether large JPEGs are reduced follows from these.
        changed.discard("decoder")
    if changed == {"weights"}:  # Renamed, but the same to the byte.
        return
    if "listing_sha256" in changed and "pictures" not in changed:
        yield "other pictures, as many as then"
    for name in sorted(changed - {"sha256", "weights", "listing_sha256"}):
        if name == "config_sha256":
            yield "the detector is set up in another way"
        else:
            yield f"{_OPTIONS.get(name, name)} {_shown(then.get(name))} then, {_shown(now.get(name))} now"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def _document(record: PictureRecord, folder: Path, names: dict[int, str]) -> dict[str, Any]:
    document: dict[str, Any] = {"id": record.image_id, "file_name": record.file_name, "path": str(record.path)}
    if record.was_read:
        document |= {
            "width": record.width,
            "height": record.height,
            "detections": [{"class": names[row.category_id], **row_document(row)} for row in record.rows],
        }
    if record.annotated is not None:
        document["annotated"] = record.annotated.relative_to(folder).as_posix()
    if record.crops:
        document["crops"] = [crop.relative_to(folder).as_posix() for crop in record.crops]
    if record.problem is not None:
        document["problem"] = record.problem
    return document


def _record(document: dict[str, Any], folder: Path) -> PictureRecord:
    return PictureRecord(
        image_id=document["id"],
        path=Path(document["path"]),
        file_name=document["file_name"],
        width=document.get("width", 0),
        height=document.get("height", 0),
        rows=tuple(Row(row["bbox"], row["score"], row["category_id"]) for row in document.get("detections", ())),
        annotated=folder / document["annotated"] if "annotated" in document else None,
        crops=tuple(folder / crop for crop in document.get("crops", ())),
        problem=document.get("problem"),
    )
