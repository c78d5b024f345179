"""Hostile data sets against the readers of COCO JSON, VOC folders and YOLO files: training's and that of `data check`.

    python benchmarks/fuzz_readers.py --inputs 20000 [--atheris] [--seed 0] [--out fuzz]
    python benchmarks/fuzz_readers.py --replay fuzz/first-coco.json

Small sound data sets are spoilt: types swapped, entries removed or doubled, numbers huge, negative or none, deep
nesting, odd encodings, NUL bytes, names and links that lead out, devices and pipes. With --atheris (that package has to
be installed) half of the inputs are bytes that are led by the readers' own branches. It is a bug where a reader

- raises anything but a RefineDetError, or one without a cure, or warns, or takes above 10 s,
- creates, changes or removes any file, or opens one to write,
- reads a file outside the data set and the folders that data.yaml names. Links elsewhere, and lists of pictures, are
  followed by training's VOC and YOLO readers on purpose, never by its COCO reader or by `data check`,
- makes a socket or starts a program,
- refuses to train on what `data check`, which opened the pictures, finds no error in.

Prints a table; writes the first bug of each reader to --out, to be replayed; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

READERS = ("coco", "voc", "yolo")
TITLES = {"coco": "COCO JSON", "voc": "VOC folder", "yolo": "YOLO data.yaml"}
LIMIT = 10  # seconds for one input
_MEMORY = 6 * 2**30
# Where pictures lie that nothing but a link, a list or a path that leads out can reach.
SECRET, STORE = "secret", "store"
# Readers of training that follow links to pictures and labels elsewhere: people lay out their data so.
_FOLLOW_LINKS = ("voc", "yolo")


class Link(NamedTuple):
    """A symbolic link to put in the place of a file."""

    target: str


# A file's bytes, a link, a named pipe, or None for "not there".
Content = bytes | Link | str | None
PIPE = "pipe"


class Input(NamedTuple):
    """A spoilt data set.

    Attributes:
        reader: one of ``READERS``.
        files: what differs from the sound one, by the path in the data set's folder.
        split: the part that is opened.
        depth: how far `data check` looks.
    """

    reader: str
    files: dict[str, Content]
    split: str
    depth: str


# Watching ------------------------------------------------------------------------------------------------------------


class Watch:
    """An audit hook that notes what a reader has no business to do; Python cannot take hooks away, so it sleeps.

    Attributes:
        seen: what was noted since `watching` began.
    """

    _NEVER = (
        "socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pty.", "urllib.",
        "http.client", "ftplib.", "smtplib.", "webbrowser.", "code.__new__", "pickle.find_class",
    )  # fmt: skip
    _CHANGES = (
        "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown", "os.utime",
        "os.truncate", "os.setxattr", "os.removexattr", "shutil.",
    )  # fmt: skip
    _WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._readable: tuple[str, ...] | None = None
        self._writable: tuple[str, ...] = ()
        self._awake = self._busy = False
        sys.addaudithook(self._note)

    @contextlib.contextmanager
    def watching(self, *, readable: tuple[Path, ...] | None, writable: tuple[Path, ...] = ()) -> Iterator[list[str]]:
        """Note what happens in the block.

        Args:
            readable: folders that may be read, beside those of Python itself; None allows all.
            writable: folders that may be written to.
        """
        self.seen = []
        own = (sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parent.parent / "refinedet_cli"))
        system = ("/usr/share/zoneinfo", "/proc/self", "/sys/", "/proc/cpuinfo", "/proc/meminfo")
        self._readable = None if readable is None else (*map(os.path.realpath, (*readable, *own)), *system)
        self._writable = tuple(map(os.path.realpath, writable))
        self._awake = True
        try:
            yield self.seen
        finally:
            self._awake = False

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._awake or self._busy:
            return
        self._busy = True
        try:
            if event == "open":
                self._opened(*args)
            elif event.startswith(self._NEVER):
                self.seen.append(f"{event}: {str(args)[:200]}")
            elif event == "os.mkdir" and os.path.isdir(args[0]):  # noqa: PTH112 - it may be bytes
                return  # "unless it is there", which it is.
            elif event.startswith(self._CHANGES):
                self._judge_write(event, args[1] if event in ("os.symlink", "os.link") else args[0])
        finally:
            self._busy = False

    def _opened(self, path: Any, mode: str | None, flags: int) -> None:
        if isinstance(path, int):
            return
        if flags & self._WRITING or set(mode or "") & set("wax+"):
            self._judge_write("opened to write", path)
        else:
            self._judge_read("opened", path)

    def _judge_read(self, event: str, path: Any) -> None:
        if self._readable is not None and not isinstance(path, int) and not _is_in(path, self._readable):
            self.seen.append(f"{event}: {path!r}")

    def _judge_write(self, event: str, path: Any) -> None:
        if not isinstance(path, int) and not _is_in(path, (*self._writable, os.devnull)):
            self.seen.append(f"{event}: {path!r}")


def _is_in(path: Any, folders: tuple[str, ...]) -> bool:
    try:
        real = os.path.realpath(os.fsdecode(path if path is not None else "."))
    except (OSError, ValueError):  # It cannot be opened either.
        return True
    return any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in folders)


def tree_hash(folder: Path) -> str:
    """Hash names, kinds, sizes, permissions, times of change and contents of all that is in a folder."""
    digest = hashlib.sha256()
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        with os.scandir(here) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            facts = [os.fsencode(entry.path), str((status.st_mode, status.st_size, status.st_mtime_ns)).encode()]
            if stat.S_ISLNK(status.st_mode):
                facts.append(os.fsencode(os.readlink(entry.path)))  # noqa: PTH115 - thousands of times a second
            elif stat.S_ISDIR(status.st_mode):
                waiting.append(entry.path)
            elif stat.S_ISREG(status.st_mode):
                facts.append(Path(entry.path).read_bytes())
            for fact in facts:
                digest.update(len(fact).to_bytes(8, "big") + fact)
    return digest.hexdigest()


# The sound data sets -------------------------------------------------------------------------------------------------

_COCO: dict[str, Any] = {
    "info": {"description": "sound"},
    "licenses": [],
    "images": [
        {"id": i, "file_name": name, "width": 64, "height": 48}
        for i, name in enumerate(("a.png", "b.png", "sub/c.png"), start=1)
    ],
    "annotations": [
        {"id": i, "image_id": 1 + i % 3, "category_id": 1 + i % 2, "bbox": [2 + i, 3, 20, 30], "area": 60, "iscrowd": 0}
        for i in range(1, 6)
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}  # fmt: skip
_XML = """<annotation><folder>JPEGImages</folder><filename>{name}.png</filename>
<size><width>64</width><height>48</height><depth>3</depth></size><segmented>0</segmented>
<object><name>cat</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>10</xmin><ymin>4.5</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object></annotation>"""
_YAML = {"path": ".", "train": "images/train", "val": "val.txt", "nc": 2, "names": {"0": "cat", "1": "dog"}}
_ROWS = "0 0.5 0.5 0.25 0.25\n1 0.3 0.3 0.2 0.1\n1 0.1 0.1 0.4 0.1 0.4 0.6\n"
_STATIC: dict[str, Content] = {  # In every data set: what hostile names point to.
    "out.png": Link(f"../{SECRET}/a.png"),
    "away": Link(f"../{SECRET}"),
    "loop.png": Link("loop.png"),
    "round": Link("round"),
    "gone.png": Link("nowhere.png"),
    "null.png": Link("/dev/zero"),
    "pipe.png": PIPE,
    "empty.png": b"",
    "text.png": b"no picture",
    "folder.png/x.txt": b"",
}


def _sound(reader: str, picture: bytes) -> dict[str, Content]:
    if reader == "coco":
        pictures = dict.fromkeys(("a.png", "b.png", "sub/c.png", "cut.png"), picture)
        return {**_STATIC, **pictures, "set.json": json.dumps(_COCO).encode(), "cut.png": picture[:60]}
    if reader == "voc":
        files: dict[str, Content] = {f"JPEGImages/{name}.png": picture for name in "abc"}
        files |= {f"Annotations/{name}.xml": _XML.format(name=name).encode() for name in "abc"}
        return files | {"ImageSets/Main/train.txt": b"a\nb\n", "ImageSets/Main/val.txt": b"c\n"}
    files = {f"images/{name}.png": picture for name in ("train/a", "train/b", "val/c")}
    files |= {f"labels/{name}.txt": _ROWS.encode() for name in ("train/a", "train/b", "val/c")}
    return {**_STATIC, **files, "data.yaml": json.dumps(_YAML).encode(), "val.txt": b"./images/val/c.png\n"}


def _picture() -> bytes:
    from io import BytesIO

    from PIL import Image

    content = BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(content, "PNG")
    return content.getvalue()


# Spoiling ------------------------------------------------------------------------------------------------------------

# Texts that stand for numbers, in any format.
_NUMBERS = (
    "0", "-1", "1e999", "-1e999", "NaN", "nan", "Infinity", "-Infinity", "inf", "9223372036854775807",
    "9223372036854775808", "-9223372036854775809", "1" * 400, "9" * 5000, "1e308", "1e-320", "0.0000001", "2147483648",
    "4294967296", "-0.0", "1.5", "3.0", "0x10", "1_0", "٣", "1,5", "", " ", "null", "true",
)  # fmt: skip
_TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "\udcff", "\x1b[31mred", "a\nb", "🚦" * 50, "x" * 5000, "cat", "CAT ", "None",
    "{0.__class__}", "%s%n%x", "$(touch pwned)", "'; DROP TABLE image; --", "<b>", "[bold]", "﻿cat", "‮tac", "..",
)  # fmt: skip
_PATHS = (
    "../secret/a.png", "..\\secret\\a.png", "sub/../../secret/a.png", "{secret}/a.png", "{store}/a.png",
    "../store/a.png", "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/environ", "/etc/passwd", "C:\\a.png",
    "\\\\host\\share\\a.png", "file:///etc/passwd", "http://192.0.2.1/a.png", "~/a.png", "out.png", "away/a.png",
    "away", "loop.png", "loop.png/a.png", "round/a.png", "gone.png", "null.png", "pipe.png", "empty.png", "text.png",
    "cut.png", "folder.png", "x" * 300 + ".png", "d/" * 2500 + "a.png", ".", "/", "//", "a.png/", "./a.png", "a.png",
    "sub//c.png", "A.PNG", "a.png\n", " a.png ", "\ud800.png", "\udcff.png", "\0.png", "a.png\0.txt", "\x1b[2J.png",
    "images/train", "images/val/c.png", "images", "labels/train", "**/*.png", "*.png", "val.txt", "data.yaml",
)  # fmt: skip


class Spoiler:
    """Makes hostile data sets; everything is drawn from one generator, so an input follows from its state.

    Args:
        draw: the generator; hypothesis has one that shrinks.
        top: the folder in which the data sets lie, for absolute paths.
    """

    def __init__(self, draw: random.Random, top: Path) -> None:
        self.draw, self._top = draw, top
        self._raw: list[str] = []

    def spoil(self, reader: str) -> Input:
        """Make one input."""
        self._raw = []
        files = {"coco": self._coco, "voc": self._voc, "yolo": self._yolo}[reader]()
        depth = self.draw.choice(("entries",) * 6 + ("headers",) * 3 + ("pixels",))
        return Input(reader, files, self.draw.choice(("train", "val")), depth)

    def _coco(self) -> dict[str, Content]:
        document = copy.deepcopy(_COCO)
        if self._chance(0.4):
            self.draw.choice(document["images"])["file_name"] = self._path()
        if self._chance(0.1):  # A size that is not in the file is read from the picture.
            for entry in document["images"]:
                entry.pop("width")
        spoilt = self._spoil_tree(document, self.draw.choice((0, 1, 1, 2, 4)))
        return {"set.json": self._spoil_bytes(self._json(spoilt))}

    def _voc(self) -> dict[str, Content]:
        name = self.draw.choice("abc")
        files: dict[str, Content] = {}
        for _ in range(self.draw.choice((1, 1, 2))):
            kind = self.draw.randrange(8)
            if kind < 4:
                files[f"Annotations/{name}.xml"] = self._spoil_bytes(self._xml(name))
            elif kind == 4:
                files[f"ImageSets/Main/{self.draw.choice(('train', 'val', 'cat_train'))}.txt"] = self._lines("abc")
            elif kind == 5:
                files[self.draw.choice(("labels.txt", "classes.txt", "labelmap.txt"))] = self._lines(("cat", "dog"))
            elif kind == 6:
                files[f"JPEGImages/{name}.png"] = self._odd_file()
            else:
                files[f"Annotations/{self._leaf()}.xml"] = self._spoil_bytes(self._xml(name))
        return files

    def _yolo(self) -> dict[str, Content]:
        files: dict[str, Content] = {}
        name = self.draw.choice(("train/a", "train/b", "val/c"))
        for _ in range(self.draw.choice((1, 1, 2))):
            kind = self.draw.randrange(8)
            if kind < 3:
                files["data.yaml"] = self._spoil_bytes(self._yaml())
            elif kind < 5:
                files[f"labels/{name}.txt"] = self._spoil_bytes(self._rows())
            elif kind == 5:
                files["val.txt"] = self._lines(("./images/val/c.png", "images/train/a.png", self._path(), self._path()))
            elif kind == 6:
                files[self.draw.choice((f"images/{name}.png", f"labels/{name}.txt"))] = self._odd_file()
            else:
                files[f"images/train/{self._leaf()}.png"] = self._odd_file()
        return files

    # Formats

    def _json(self, document: Any) -> bytes:
        text = json.dumps(document, ensure_ascii=self._chance(0.8))
        if self._chance(0.1):
            key = self.draw.choice(("images", "annotations", "categories", "id", "bbox", "file_name"))
            value = self.draw.choice(("[]", "null", "1", "{}", '"x"'))
            at = self.draw.choice([match.end() for match in re.finditer(r"\{", text)] or [0])
            text = f'{text[:at]}"{key}": {value}, {text[at:]}'
        for number, raw in enumerate(self._raw):
            text = text.replace(f'"@raw{number}@"', raw)
        return text.encode("utf-8", "surrogatepass")

    def _xml(self, name: str) -> bytes:
        root = ET.fromstring(_XML.format(name=name))
        for _ in range(self.draw.choice((0, 1, 1, 2, 4))):
            nodes = list(root.iter())
            node, other = self.draw.choice(nodes), self.draw.choice(nodes)
            kind = self.draw.randrange(7)
            if kind < 3:
                node.text = self.draw.choice((*_NUMBERS, *_TEXTS, *_PATHS))
            elif kind == 3:
                node.tag = self.draw.choice((other.tag, "x", "object", "annotation"))
            elif kind == 4:
                for child in list(node)[:1]:
                    node.remove(child)
            elif kind == 5:
                node.append(copy.deepcopy(other))
            else:
                node.set("id", "x")
        content = ET.tostring(root, "unicode").encode("utf-8", "surrogatepass")
        if not self._chance(0.15):
            return content
        deep = self.draw.choice((100, 5000, 100_000))
        return self.draw.choice((
            b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + content.replace(b"cat", b"&x;"),
            b'<!DOCTYPE a [<!ENTITY l "l"><!ENTITY m "&l;&l;&l;&l;">]>' + content.replace(b"cat", b"&m;"),
            b'<?xml version="1.0" encoding="utf-16"?>' + content,
            b'<?xml version="1.0" encoding="utf-7"?>+ADw-!DOCTYPE a+AD4-' + content,
            b'<?xml version="1.0" encoding="cp037"?>' + content,
            b'<?xml version="1.0" encoding="nothing"?>' + content,
            b"<annotation>" + b"<object>" * deep + b"</object>" * deep + b"</annotation>",
            b'<annotation xmlns="x">' + content[12:],
            content.replace(b"cat", b"&#0;"),
            content.replace(b"cat", b"<![CDATA[c]]>at"),
            content * 2,
        ))  # fmt: skip

    def _yaml(self) -> bytes:
        document: Any = copy.deepcopy(_YAML)
        if self._chance(0.4):
            key = self.draw.choice(("path", "train", "val"))
            document[key] = self.draw.choice((self._path(), [self._path(), "images/val"]))
        if self._chance(0.2):
            document["nc"] = self.draw.choice(_NUMBERS)
            if self._chance(0.5):
                del document["names"]
        content = self._json(self._spoil_tree(document, self.draw.choice((0, 1, 1, 2))))
        if not self._chance(0.15):
            return content
        deep = self.draw.choice((50, 3000))
        return self.draw.choice((
            b'train: images/train\nnames: !!python/object/apply:os.system ["touch pwned"]\n',
            b"train: images/train\nnames: !!python/name:os.system\n",
            b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\ntrain: images/train\nnames: [*c, *c]\n",
            b"train: &a [*a]\nnames: &b {x: *b}\n",
            b"? &a [*a]\n: x\ntrain: images/train\n",
            b"train: images/train\nnames: " + b"[" * deep + b"]" * deep,
            b"train: images/train\nnames: " + b"{a: " * deep + b"}" * deep,
            b"train: images/train\nnc: 999999999999\n",
            b"train: images/train\nnc: 99999999\n",
            b"train: images/train\nnames: {99999999999999999999999: cat}\n",
            b"train: images/train\nnames: {0: cat, 00: dog}\n",
            b"train: images/train\nnames: {0: cat}\nnames: {1: dog}\n",
            b"%YAML 9.9\n---\ntrain: images/train\nnames: [cat]\n---\nnames: [dog]\n",
            b"train: images/train\nnames:\n\t- cat\n",
            b"<<: {train: images/train}\nnames: [cat, dog]\n",
        ))  # fmt: skip

    def _rows(self) -> bytes:
        rows = [line.split() for line in _ROWS.splitlines()]
        for _ in range(self.draw.choice((1, 1, 2, 3))):
            row = self.draw.choice(rows)
            kind = self.draw.randrange(4)
            if kind < 2 and row:
                row[self.draw.randrange(len(row))] = self.draw.choice((*_NUMBERS, *_TEXTS))
            elif kind == 2:
                row.extend(["0.1"] * self.draw.choice((1, 2, 3, 1000)))
            elif row:
                row.pop()
        end = self.draw.choice(("\n", "\r\n", "\r", "\x0b", "\u2028"))
        return end.join(" ".join(row) for row in rows).encode("utf-8", "surrogatepass")

    def _lines(self, sound: Any) -> bytes:
        lines = [*sound]
        for _ in range(self.draw.choice((0, 1, 2))):
            odd = self.draw.choice((*_PATHS, *_TEXTS, "cat -1", "cat:1,2,3::", "# x", *lines))
            lines.insert(self.draw.randrange(len(lines) + 1), self._filled(odd))
        text = self.draw.choice(("\n", "\r\n", "\n\n")).join(lines)
        return self._spoil_bytes(text.encode("utf-8", "surrogatepass"))

    # Parts

    def _spoil_tree(self, document: Any, times: int) -> Any:
        for _ in range(times):
            places = list(_places(document))
            if not places:
                return document
            parent, key = self.draw.choice(places)
            kind = self.draw.randrange(8)
            if kind < 4:
                parent[key] = self._value()
            elif kind == 4:
                del parent[key]
            elif kind == 5 and isinstance(parent, list):
                parent.append(copy.deepcopy(parent[key]))
            elif kind == 6 and isinstance(parent, dict):
                parent[self.draw.choice((*_TEXTS, "id", "width", "difficult"))] = parent.pop(key)
            else:
                other, place = self.draw.choice(places)
                with contextlib.suppress(KeyError, IndexError):
                    parent[key] = copy.deepcopy(other[place])
        return document

    def _value(self) -> Any:
        kind = self.draw.randrange(6)
        if kind == 0:
            return self.draw.choice((None, True, False, [], {}, [[]], [None] * 4, {"id": 1}, [1, 2, 3], [1] * 5, 2.0))
        if kind == 1:
            return self._path()
        if kind == 2:
            return self.draw.choice(_TEXTS)
        if kind == 3:
            return self.draw.choice((-1, 0, 1, 2, 3, 10**18, -(2**63), 2**64, 1e300, -0.0, 1e-300, 0.1))
        deep = self.draw.choice((30, 200, 900, 950, 980, 5000))
        literal = self.draw.choice(_NUMBERS[:20])
        is_json = bool(re.fullmatch(r"-?[0-9]+([.][0-9]+)?(e-?[0-9]+)?|NaN|-?Infinity", literal))
        self._raw.append("[" * deep + "]" * deep if kind == 4 or not is_json else literal)
        return f"@raw{len(self._raw) - 1}@"

    def _spoil_bytes(self, content: bytes) -> bytes:
        kind = self.draw.randrange(24)
        text = content.decode("utf-8", "replace")
        if kind < 4:
            encoding = ("utf-16", "utf-32-le", "utf-8-sig", "latin-1")[kind]
            return text.encode(encoding, "replace")
        at = self.draw.randrange(len(content) + 1)
        changed = {
            4: lambda: content[:at],
            5: lambda: content[:at] + b"\0" + content[at:],
            6: lambda: content[:at] + bytes([self.draw.randrange(256)]) + content[at + 1 :],
            7: lambda: content[:at] + self.draw.choice((b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80")) + content[at:],
            8: lambda: self.draw.choice((b"", b"\0" * 100, b"[" * 100_000, b'{"a":' * 10_000, b"\x1f\x8b", b"PK\3")),
            9: lambda: content + content,
            10: lambda: b" " * 100_000 + content,
        }  # fmt: skip
        return changed.get(kind, lambda: content)()

    def _odd_file(self) -> Content:
        target = self._filled(self.draw.choice(_PATHS))
        is_name = "\0" not in target and "\ud800" not in target and 0 < len(target) < 4000
        odd: tuple[Content, ...] = (
            None,
            b"",
            b"no picture",
            PIPE,
            Link("/dev/zero"),
            Link(".."),
            Link("../../out.png"),
        )
        return self.draw.choice((*odd, Link(target if is_name else "loop.png"), Link(f"../../{SECRET}/a.png")))

    def _leaf(self) -> str:
        return self.draw.choice(("x" * 240, "\udcff", "\x1b[31m", "new\nline", " ", "a.b", "-rf", "[a]", "*", "é", "1"))

    def _path(self) -> str:
        return self._filled(self.draw.choice(_PATHS))

    def _filled(self, path: str) -> str:
        for name in (SECRET, STORE):
            path = path.replace(f"{{{name}}}", str(self._top / name))
        return path

    def _chance(self, share: float) -> bool:
        return self.draw.random() < share


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


# Trying --------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of an input in training's reader and in `data check`; and what was wrong, empty if nothing."""

    opened: str
    checked: str
    bugs: tuple[str, ...]


class _TooLongError(Exception):
    """One input took too long."""


class Sandbox:
    """A folder with the sound data sets, in which inputs are put in place, tried, and taken back.

    Args:
        top: an empty folder.
        watch: the audit hook.
    """

    def __init__(self, top: Path, watch: Watch) -> None:
        self.top = top.resolve()
        self._watch = watch
        picture = _picture()
        self._base = {reader: _sound(reader, picture) for reader in READERS}
        for reader, files in self._base.items():
            for name, content in files.items():
                _put(self.top / reader / name, content)
        for name in (SECRET, STORE):
            for leaf, content in {"a.png": picture, "a.txt": b"0 0.5 0.5 0.1 0.1\n", "val.txt": b"a.png\n"}.items():
                _put(self.top / name / leaf, content)

    def source(self, reader: str) -> Path:
        """What a user would name."""
        return self.top / {"coco": "coco/set.json", "voc": "voc", "yolo": "yolo/data.yaml"}[reader]

    def run(self, given: Input) -> Outcome:
        """Put an input in place, try it, and take it back."""
        root = self.top / given.reader
        try:
            for name, content in given.files.items():
                _put(root / name, content)
            return self._try(given)
        finally:
            for name in given.files:
                _put(root / name, self._base[given.reader].get(name))

    def _try(self, given: Input) -> Outcome:
        from refinedet_cli.data.source import open_dataset
        from refinedet_cli.engine.data_check import CheckOptions, check_data

        source = str(self.source(given.reader))
        bugs: list[str] = []
        before = tree_hash(self.top)
        named = self._named(given)
        followed = None if given.reader in _FOLLOW_LINKS else named
        refused: list[str] = []

        def opening() -> str:
            open_dataset(source, split=given.split)
            return "accepted"

        def checking() -> str:
            options = CheckOptions(data=source, depth=given.depth, preset="tiny", threads=1, keep=True)
            check = check_data(options, lambda progress: None)
            json.dumps([f._replace(kind=None, picture=None) for f in check.findings], allow_nan=False)
            return "refused" if check.count("error") else "accepted"

        opened = self._attempt(opening, followed, bugs, "open_dataset", refused)
        checked = self._attempt(checking, named, bugs, "data check", [])
        # A part that is not there is nothing to find fault with, and pictures are not always looked at.
        may_differ = given.depth == "entries" or any(f"has no {given.split} part" in message for message in refused)
        if opened == "refused" and checked == "accepted" and not may_differ:
            bugs.append(f"data check finds no error where training refuses: {refused}")
        if tree_hash(self.top) != before:
            bugs.append("files of the data set were changed")
        return Outcome(opened, checked, tuple(bugs))

    def _named(self, given: Input) -> tuple[Path, ...]:
        """The data set's folder, and those that data.yaml may name as its own; links that have such a name count."""
        if given.reader != "yolo":
            return (self.top / given.reader,)
        described = given.files.get("data.yaml")
        is_secret = isinstance(described, bytes) and any(word in described for word in (b"away", SECRET.encode()))
        names = (given.reader, STORE, *((SECRET,) if is_secret else ()))
        return tuple(self.top / name for name in names)

    def _attempt(
        self, work: Callable[[], str], readable: tuple[Path, ...] | None, bugs: list[str], name: str, refused: list[str]
    ) -> str:
        from refinedet_cli.errors import RefineDetError

        with self._watch.watching(readable=readable) as seen, warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                with _limit():
                    result = work()
            except RefineDetError as error:
                result = "refused"
                refused.append(error.message)
                if not error.hint or not error.message:
                    bugs.append(f"{name}: unclear error {error.message!r}, cure {error.hint!r}")
            except Exception as error:
                result = "bug"
                last = [
                    (f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(error.__traceback__)
                ]
                places = " < ".join(f"{Path(file).name}:{line} {name}" for file, line, name in last[:-4:-1])
                bugs.append(f"{name}: {type(error).__name__}: {str(error)[:300]} ({places})")
        bugs += [f"{name}: {what}" for what in dict.fromkeys(seen)]
        return result


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLongError(f"more than {LIMIT} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _put(path: Path, content: Content) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()
    if content is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Link):
        path.symlink_to(content.target)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        os.mkfifo(path)


# Counting ------------------------------------------------------------------------------------------------------------


class Tally:
    """Counts outcomes of one reader and engine, and keeps the first input of each kind of bug."""

    def __init__(self) -> None:
        self.inputs = 0
        self.opened: Counter[str] = Counter()
        self.checked: Counter[str] = Counter()
        self.bugs: dict[str, tuple[str, str]] = {}
        self.buggy = 0

    def add(self, given: Input, outcome: Outcome) -> None:
        """Take in one."""
        self.inputs += 1
        self.opened[outcome.opened] += 1
        self.checked[outcome.checked] += 1
        self.buggy += bool(outcome.bugs)
        for bug in outcome.bugs:
            # Places and types tell kinds apart, values do not.
            kind = re.sub(r"'.*?'|\".*?\"|[0-9]+|/\S*", "", bug)[:160]
            if kind not in self.bugs:
                self.bugs[kind] = (bug, dump(given))

    def as_json(self) -> str:
        """For another process."""
        return json.dumps([self.inputs, self.opened, self.checked, self.bugs, self.buggy])

    @classmethod
    def from_json(cls, text: str) -> Tally:
        """From another process."""
        tally = cls()
        tally.inputs, opened, checked, bugs, tally.buggy = json.loads(text)
        tally.opened, tally.checked = Counter(opened), Counter(checked)
        tally.bugs = {kind: (bug, given) for kind, (bug, given) in bugs.items()}
        return tally


def dump(given: Input) -> str:
    """Write an input as JSON, from which it can be made again."""
    files = {
        name: base64.b64encode(content).decode() if isinstance(content, bytes) else
        {"link": content.target} if isinstance(content, Link) else {"pipe": content == PIPE}
        for name, content in given.files.items()
    }  # fmt: skip
    return json.dumps({**given._asdict(), "files": files}, indent=1)


def load(text: str) -> Input:
    """Read what ``dump`` has written."""
    fields = json.loads(text)
    files: dict[str, Content] = {}
    for name, content in fields.pop("files").items():
        if isinstance(content, str):
            files[name] = base64.b64decode(content)
        elif "link" in content:
            files[name] = Link(content["link"])
        else:
            files[name] = PIPE if content["pipe"] else None
    return Input(files=files, **fields)


# Engines -------------------------------------------------------------------------------------------------------------


def fuzz_structure(sandbox: Sandbox, reader: str, inputs: int, seed: int) -> Tally:
    """Try spoilt data sets."""
    tally = Tally()
    for number in range(inputs):
        given = Spoiler(random.Random(f"{seed} {reader} {number}"), sandbox.top).spoil(reader)
        tally.add(given, sandbox.run(given))
    return tally


# The files that the bytes of the coverage-guided engine become; the first byte chooses.
_SLOTS = {
    "coco": ("set.json",),
    "voc": ("Annotations/a.xml", "Annotations/a.xml", "ImageSets/Main/train.txt", "labels.txt", "labelmap.txt"),
    "yolo": ("data.yaml", "data.yaml", "labels/train/a.txt", "val.txt"),
}


def fuzz_bytes(reader: str, inputs: int, seed: int, report: Path) -> None:
    """Try bytes that atheris chooses by the branches they reach; ends the process, as libFuzzer does."""
    import atheris  # type: ignore[import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["refinedet_cli.data", "json.decoder", "json.scanner"]):
        import refinedet_cli.data.source
        import refinedet_cli.engine.data_check  # noqa: F401
    _limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        sandbox, tally = Sandbox(Path(folder) / "sets", Watch()), Tally()
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number in range(60):
            spoiler = Spoiler(random.Random(f"{seed} seed {number}"), sandbox.top)
            files = {
                **{n: sandbox._base[reader].get(n, b"cat\n") for n in _SLOTS[reader]},
                **spoiler.spoil(reader).files,
            }
            slot = number % len(_SLOTS[reader])
            content = files[_SLOTS[reader][slot]]
            if isinstance(content, bytes) and len(content) < 20_000:
                (corpus / str(number)).write_bytes(bytes([slot]) + content)

        def one_input(data: bytes) -> None:
            slots = _SLOTS[reader]
            name = slots[data[0] % len(slots)] if data else slots[0]
            given = Input(reader, {name: data[1:]}, "val" if name == "val.txt" else "train", "entries")
            tally.add(given, sandbox.run(given))
            if tally.inputs >= inputs:
                report.write_text(tally.as_json())
                os._exit(0)

        arguments = [sys.argv[0], f"-seed={seed + 1}", "-max_len=20000", "-verbosity=0", "-timeout=60", str(corpus)]
        atheris.Setup(arguments, one_input)
        atheris.Fuzz()


def _in_another_process(reader: str, inputs: int, seed: int) -> Tally:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        call = [sys.executable, __file__, "--bytes", reader, "--inputs", str(inputs), "--seed", str(seed)]
        ended = subprocess.run(
            [*call, "--report", str(report)], capture_output=True, text=True, cwd=folder, check=False
        )
        if report.is_file():
            return Tally.from_json(report.read_text())
        tally = Tally()
        tally.inputs, tally.buggy = inputs, 1
        tally.bugs["died"] = (f"the process died with code {ended.returncode}: {ended.stderr[-2000:]}", "{}")
        return tally


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


# What is shown -------------------------------------------------------------------------------------------------------


def _print_table(rows: list[tuple[str, str, Tally, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Hostile data sets", title_justify="left", box=None)
    table.add_column("Reader")
    table.add_column("Engine")
    for heading in ("Inputs", "Opened", "Refused", "Check: no error", "Check: errors", "Bugs", "Seconds"):
        table.add_column(heading, justify="right")
    for reader, engine, tally, seconds in rows:
        numbers = (
            tally.inputs, tally.opened["accepted"], tally.opened["refused"], tally.checked["accepted"],
            tally.checked["refused"], tally.buggy,
        )  # fmt: skip
        table.add_row(TITLES[reader], engine, *(f"{number:,}" for number in numbers), f"{seconds:.0f}")
    Console(width=110).print(table)


def _report_bugs(rows: list[tuple[str, str, Tally, float]], out: Path) -> int:
    for reader, engine, tally, _ in rows:
        for bug, _ in tally.bugs.values():
            print(f"{TITLES[reader]}, {engine}: {bug}")
        first = next(iter(tally.bugs.values()), None)
        if first is not None:
            out.mkdir(parents=True, exist_ok=True)
            file = out / f"first-{reader}-{engine}.json"
            file.write_text(first[1])
            print(f"  the first as a file: {file}")
    return 1 if any(tally.buggy for _, _, tally, _ in rows) else 0


def _replay(file: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        outcome = Sandbox(Path(folder), Watch()).run(load(file.read_text()))
    print(f"opened: {outcome.opened}; data check: {outcome.checked}")
    print("\n".join(outcome.bugs) or "no bug")
    return 1 if outcome.bugs else 0


def main(argv: list[str] | None = None) -> int:
    """Run and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all readers and engines together")
    parser.add_argument("--atheris", action="store_true", help="half of them are led by coverage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="where the first failing inputs go")
    parser.add_argument("--replay", type=Path, help="try one input that was written before")
    parser.add_argument("--bytes", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.bytes:
        fuzz_bytes(options.bytes, options.inputs, options.seed, options.report)
    if options.replay:
        return _replay(options.replay)
    if options.atheris and importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 2
    engines = ("structure", "coverage") if options.atheris else ("structure",)
    share = max(1, options.inputs // (len(READERS) * len(engines)))
    rows = []
    _limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder), Watch())
        for reader in READERS:
            for engine in engines:
                start = time.perf_counter()
                if engine == "structure":
                    tally = fuzz_structure(sandbox, reader, share, options.seed)
                else:
                    tally = _in_another_process(reader, share, options.seed)
                rows.append((reader, engine, tally, time.perf_counter() - start))
    _print_table(rows)
    return _report_bugs(rows, options.out)


if __name__ == "__main__":
    sys.exit(main())
