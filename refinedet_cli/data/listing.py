"""The search for pictures: millions of them in little memory, and always in the same order."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Self

from refinedet_cli.data.images import READABLE, FoundImage, is_picture_name, missing_cure, real_path
from refinedet_cli.errors import DataError


class ImageList:
    """Pictures found together, each with a name of its own; kept on disk once they are many.

    Iterating gives a `FoundImage` each, as often as one likes. `list_images` makes one and closes it.

    Attributes:
        left_out: pictures that were found in folders to be left out.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.left_out = 0

    def __len__(self) -> int:
        (count,) = self._database.execute("SELECT count(*) FROM image").fetchone()
        return int(count)

    def __iter__(self) -> Iterator[FoundImage]:
        for path, name in self._database.execute("SELECT path, name FROM image ORDER BY id"):
            yield FoundImage(_path(path), os.fsdecode(name))


class Entry(str):
    """A source out of a list that may be long: what cannot be found is listed itself, and fails as a picture does."""


class DiskSet:
    """A set of strings that moves from memory to the disk when it grows; a context manager."""

    def __init__(self) -> None:
        self._database = _temporary("CREATE TABLE member (value BLOB PRIMARY KEY) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, value: str) -> bool:
        """Put a string in, and tell whether it was new."""
        raw = value.encode("utf-8", "surrogatepass")
        return self._database.execute("INSERT OR IGNORE INTO member VALUES (?)", (raw,)).rowcount == 1


def find_images(sources: Iterable[str]) -> list[FoundImage]:
    """Find the pictures that files, folders and patterns name: what `list_images` gives, as a list.

    Raises:
        DataError: a source names no picture, or a folder cannot be read.
    """
    with list_images(sources, strict=True) as images:
        return list(images)


@contextmanager
def list_images(
    sources: Iterable[str],
    *,
    leave_out: Sequence[Path] = (),
    strict: bool = False,
    on_other: Callable[[str], None] | None = None,
) -> Iterator[ImageList]:
    """Find the pictures that files, folders and patterns name, without holding them all in memory.

    Folders are searched to the bottom for names with the usual extensions, hidden files and folders aside. Patterns
    know ``*``, ``?``, ``[...]`` and ``**``. A file that is named itself is taken whatever its extension.

    Args:
        sources: consumed one by one; of those that are an `Entry`, one that names no picture ends nothing.
        leave_out: folders whose pictures do not count, however they are reached.
        strict: a folder that cannot be read, in one that is searched, is an error; else it is listed itself, and fails
            as a picture does that cannot be read. Patterns pass it over, as they do everywhere.
        on_other: called with the path of each file in a folder that was named that is no picture, hidden ones aside.

    Yields:
        each picture once, in the order of the sources and sorted by name within each. Names are relative to the folder
        that was searched; where two would be equal, parent folders are added.

    Raises:
        DataError: a source names no picture, a folder cannot be read, or all that was found is to be left out.
    """
    try:
        with closing(_temporary(*_TABLES)) as database:
            search = _Search(database, strict=strict, on_other=on_other or _ignore)
            for source in sources:
                search.add(source)
            images = ImageList(database)
            if not images:
                raise DataError("no pictures were named", "give files, folders or patterns such as 'photos/*.jpg'")
            images.left_out = search.leave_out(leave_out)
            if not images:
                raise DataError(
                    f"{' and '.join(map(str, leave_out))} hold pictures that this tool wrote, and no others were given",
                    "name the original pictures, or choose another output folder",
                )
            search.make_names_unique()
            yield images
    except sqlite3.Error as error:
        raise DataError(
            f"the list of pictures cannot be kept: {error}", "free some space where temporary files go (TMPDIR)"
        ) from error


def _ignore(path: str) -> None:
    """Take no notice of a file."""


# `real` is the file with the links of its folder resolved. All are bytes, for a name may hold some that are no text.
_TABLES = (
    "CREATE TABLE image (id INTEGER PRIMARY KEY, path BLOB, real BLOB UNIQUE, name BLOB)",
    "CREATE TABLE unsorted (path BLOB, real BLOB, name BLOB)",
)
_COLUMNS = "path, real, name"


class _Search:
    """What fills the tables."""

    def __init__(self, database: sqlite3.Connection, *, strict: bool, on_other: Callable[[str], None]) -> None:
        self._database, self._strict, self._on_other = database, strict, on_other
        database.create_function("sort_key", 1, _sort_key, deterministic=True)
        self._real_folder = lru_cache(maxsize=4096)(Path.resolve)

    def add(self, source: str) -> None:
        """Find the pictures of one source, at least one."""
        try:
            self._find(source)
        except DataError:
            path = Path(source)
            # A name that no file can have is told at once; the others when they are read.
            if not isinstance(source, Entry) or "\0" in source or path.name in ("", ".."):
                raise
            self._insert("image", [FoundImage(path, path.name)])

    def _find(self, source: str) -> None:
        if not source:  # As of a shell's variable that is not set; to pathlib it is the current folder.
            raise DataError("a source is empty", "name a file or folder; . is the current one")
        path = Path(source)
        if re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
            raise DataError(f"{source} is an address; pictures are not downloaded", "save it as a file first")
        try:
            if path.is_dir():
                os.scandir(path).close()  # That what was named itself cannot be read is always an error.
                if not self._add_sorted(_walk(path, strict=self._strict, on_other=self._on_other)):
                    raise DataError(
                        f"the folder {source} holds no pictures", f"searched with all its folders; {READABLE}"
                    )
                return
            if path.exists():
                self._insert("image", [FoundImage(path, path.name)])
                return
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{source!r} cannot be read: {reason}", "check the path and its permissions") from error
        if not glob.has_magic(source):
            raise DataError(f"{source} does not exist", missing_cure(path))
        if not self._add_sorted(_match(source)):
            raise DataError(f"the pattern {source!r} matches no pictures", f"check it; {READABLE}")

    def leave_out(self, folders: Sequence[Path]) -> int:
        """Forget the pictures in folders, and count them."""
        count = 0
        for folder in folders:
            inside = os.fsencode(folder.resolve()) + os.sep.encode()
            query = "DELETE FROM image WHERE substr(real, 1, ?) = ?"
            count += self._database.execute(query, (len(inside), inside)).rowcount
        return count

    def make_names_unique(self) -> None:
        """Lengthen equal names by parent folders, then number what is still equal (found through links)."""
        self._database.execute("CREATE INDEX by_name ON image (name)")
        while clashes := self._collect_clashes():
            if not self._lengthen():
                break
        if clashes:
            self._number()

    def _add_sorted(self, found: Iterable[FoundImage]) -> bool:
        self._insert("unsorted", found)
        self._database.execute(
            f"INSERT OR IGNORE INTO image ({_COLUMNS}) SELECT {_COLUMNS} FROM unsorted "
            "ORDER BY sort_key(name), sort_key(path)"
        )
        return self._database.execute("DELETE FROM unsorted").rowcount > 0

    def _insert(self, table: str, found: Iterable[FoundImage]) -> None:
        rows = ((_raw(str(i.path)), self._real(i.path), _raw(i.name)) for i in found)
        self._database.executemany(f"INSERT OR IGNORE INTO {table} ({_COLUMNS}) VALUES (?, ?, ?)", rows)

    def _real(self, path: Path) -> bytes:
        return _raw(str(self._real_folder(path.parent) / path.name))

    def _collect_clashes(self) -> int:
        """Put the pictures whose names are not unique into a table, and count them."""
        self._database.execute("DROP TABLE IF EXISTS clash")
        self._database.execute(
            "CREATE TABLE clash AS SELECT id FROM image WHERE name IN "
            "(SELECT name FROM image GROUP BY name HAVING count(*) > 1)"
        )
        (count,) = self._database.execute("SELECT count(*) FROM clash").fetchone()
        return int(count)

    def _lengthen(self) -> bool:
        """Add one more folder to the names of all clashing pictures that have one left."""
        some = False
        query = "SELECT image.id, real, name FROM clash JOIN image USING (id)"
        for identity, real, raw_name in self._database.execute(query):
            parts, name = _path(real).parts[1:], os.fsdecode(raw_name)
            depth = name.count("/") + 2
            if depth <= len(parts):
                self._rename(identity, "/".join(parts[-depth:]))
                some = True
        return some

    def _number(self) -> None:
        with DiskSet() as taken:
            last = 0
            # Row by row, for a cursor must not read what is being changed.
            while row := self._database.execute(
                "SELECT id, name FROM image WHERE id > ? ORDER BY id LIMIT 1", (last,)
            ).fetchone():
                last, original = row[0], os.fsdecode(row[1])
                name, number = original, 1
                while not taken.add(name):
                    number += 1
                    stem, dot, extension = original.rpartition(".")
                    name = f"{stem or extension}-{number}{dot if stem else ''}{extension if stem else ''}"
                if name != original:
                    self._rename(last, name)

    def _rename(self, identity: int, name: str) -> None:
        self._database.execute("UPDATE image SET name = ? WHERE id = ?", (_raw(name), identity))


def links_out(root: Path, folders: dict[str, list[tuple[str, int]]]) -> Iterator[tuple[str, int]]:
    """Find what is a link to somewhere outside ``root``, or lies in a folder that is.

    Args:
        root: the folder that may not be left.
        folders: names and numbers of files, by their folders relative to ``root``; each is listed once, and no ordinary
            file is asked about.
    """
    top = real_path(root)
    for folder, leaves in folders.items():
        real = real_path(top / folder)
        if not real.is_relative_to(top):
            yield from leaves
            continue
        try:
            with os.scandir(real) as listing:
                links = {entry.name for entry in listing if entry.is_symlink()}
        except (OSError, ValueError):  # Absent, unreadable or no name: reported when a picture of it is looked at.
            continue
        for leaf, number in leaves:
            if leaf in links and not real_path(real / leaf).is_relative_to(top):
                yield leaf, number


def _temporary(*statements: str) -> sqlite3.Connection:
    """Open a database that nobody else sees: in memory, and in a temporary file once it outgrows its cache."""
    database = sqlite3.connect("", isolation_level=None)
    for statement in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", *statements):
        database.execute(statement)
    # One transaction for ever: the database ends with its connection.
    database.execute("BEGIN")
    return database


def _raw(text: str) -> bytes:
    return os.fsencode(text)


def _path(raw: bytes) -> Path:
    return Path(os.fsdecode(raw))


def _sort_key(raw: bytes) -> bytes:
    """What sorts as the parts between the slashes do; no name holds a NUL."""
    return raw.replace(b"/", b"\0")


def _walk(folder: Path, *, strict: bool, on_other: Callable[[str], None]) -> Iterator[FoundImage]:
    """The pictures of a folder, to its bottom, in the order in which the disk gives them."""
    for _, pictures in _scan(folder, strict=strict, on_other=on_other):
        yield from pictures


def _scan(
    top: Path, *, strict: bool, on_other: Callable[[str], None] = _ignore
) -> Iterator[tuple[Path, Iterator[FoundImage]]]:
    """A folder and those below it, each once and with its pictures, named from the top; hidden ones aside."""
    seen: set[Path] = set()
    waiting, real_top = [(top, "")], real_path(top)
    while waiting:
        here, prefix = waiting.pop()
        real = real_path(here)
        # A link that leads back would never end, and one that leads above the folder searches what nobody named.
        if real in seen or (real != real_top and real_top.is_relative_to(real)):
            continue
        seen.add(real)
        folders: list[str] = []
        pictures = _pictures(here, prefix, folders, strict=strict, on_other=on_other)
        yield here, pictures
        for _ in pictures:  # What nobody has looked at: the folders come among them.
            pass
        # Sorted, for of two links to one folder the first counts.
        waiting += [(here / name, f"{prefix}{name}/") for name in sorted(folders, reverse=True)]


def _pictures(
    here: Path, prefix: str, folders: list[str], *, strict: bool, on_other: Callable[[str], None]
) -> Iterator[FoundImage]:
    """The pictures in a folder itself, or the folder if it cannot be read; those in it are added to a list."""
    try:
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                elif is_picture_name(entry.name):
                    yield FoundImage(here / entry.name, prefix + entry.name)
                else:
                    on_other(entry.path)
    except OSError as error:
        if strict:
            raise DataError(f"the folder {here} cannot be read: {error.strerror}", "change its permissions") from error
        yield FoundImage(here, prefix.removesuffix("/"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def _match(pattern: str) -> Iterator[FoundImage]:
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    fixed = Path(*parts[:first])
    for path in _matches(fixed, parts[first:]):
        if is_picture_name(path.name) and not path.is_dir():
            name = path.relative_to(fixed)
            yield FoundImage(path, path.name if ".." in name.parts else name.as_posix())


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What a pattern matches below a folder, as `glob` does, but ``**`` enters each folder once, however links lead."""
    if "**" not in parts:
        # glob rather than Path.glob, for that knows no hidden files.
        yield from (folder / name for name in glob.iglob(str(Path(*parts)), root_dir=folder))  # noqa: PTH207
        return
    at = parts.index("**")
    for top in _matches(folder, parts[:at]) if at else (folder,):
        for here, _ in _scan(top, strict=False):
            yield from _matches(here, parts[at + 1 :] or ("*",))
