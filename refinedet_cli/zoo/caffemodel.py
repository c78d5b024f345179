"""Weights of Caffe, read from the bytes of their protocol buffer: neither Caffe nor a protobuf library is needed.

A ``.caffemodel`` is one message, a network; of the many fields that may be in it only names and blobs are read, all
others are skipped. No length in the file is believed before it was compared with what is left of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refinedet_cli.errors import CheckpointError

# Far more than any network has; they keep a hostile file from being slow.
_MAX_FIELDS = 200_000
_MAX_LAYERS = 10_000
_MAX_DIMS = 8
_MAX_SIDE = 1 << 31
_MAX_NAME = 1000
# How far a run of numbers is looked through at first: what is looked through in vain stays little.
_WINDOW = 1024

# Ways to write a value.
_VARINT, _FIXED64, _CHUNK, _FIXED32 = 0, 1, 2, 5
# Numbers of fields: of a network, of a layer in its new and its old form, of a blob.
_NET_NAME, _NET_OLD_LAYER, _NET_LAYER = 1, 2, 100
_LAYER_FIELDS = {_NET_LAYER: (1, 7), _NET_OLD_LAYER: (4, 6)}
_BLOB_DATA, _BLOB_SHAPE, _BLOB_DOUBLES = 5, 7, 8
_OLD_SIDES = (1, 2, 3, 4)


@dataclass(frozen=True)
class CaffeLayer:
    """A layer and its learned arrays, float32, in Caffe's order; layers without any are not listed."""

    name: str
    blobs: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class CaffeNet:
    """A network's name, which may be empty, and its layers in the file's order."""

    name: str
    layers: tuple[CaffeLayer, ...]


class _WireError(Exception):
    """Bytes that are no message; told with the place."""


def read_caffemodel(path: Path) -> CaffeNet:
    """Read the names and weights of a ``.caffemodel``, of the old form (V1) too.

    Returns:
        `CaffeNet`; every array has exactly the numbers that its shape says, and all of them lie in the file.

    Raises:
        CheckpointError: the file is empty, damaged, or no binary protocol buffer of a network.
    """
    try:
        return _parse(path.read_bytes())
    except _WireError as error:
        raise CheckpointError(f"{path}: not a readable caffemodel: {error}", "get the file again") from None


def _parse(content: bytes) -> CaffeNet:
    reader = _Reader(content, 0, len(content), _Budget())
    name, layers = "", []
    for number, wire in reader.fields():
        if number == _NET_NAME and wire == _CHUNK:
            name = reader.text()
        elif number in _LAYER_FIELDS and wire == _CHUNK:
            layers.append(_layer(reader.inside(), *_LAYER_FIELDS[number]))
            if len(layers) > _MAX_LAYERS:
                raise _WireError("too many layers")
        else:
            reader.skip(wire)
    return CaffeNet(name, tuple(layer for layer in layers if layer.blobs))


def _layer(reader: _Reader, name_field: int, blob_field: int) -> CaffeLayer:
    name, blobs = "", []
    for number, wire in reader.fields():
        if number == name_field and wire == _CHUNK:
            name = reader.text()
        elif number == blob_field and wire == _CHUNK:
            blobs.append(_blob(reader.inside()))
        else:
            reader.skip(wire)
    return CaffeLayer(name, tuple(blobs))


def _blob(reader: _Reader) -> NDArray[np.float32]:
    shape: list[int] | None = None
    sides: dict[int, int] = {}
    parts: list[NDArray[np.float32]] = []
    start = reader.place
    for number, wire in reader.fields():
        if number in (_BLOB_DATA, _BLOB_DOUBLES) and wire in (_CHUNK, _FIXED32, _FIXED64):
            parts.append(reader.numbers(8 if number == _BLOB_DOUBLES else 4, wire))
        elif number == _BLOB_SHAPE and wire == _CHUNK:
            shape = _shape(reader.inside())
        elif number in _OLD_SIDES and wire == _VARINT:
            sides[number] = reader.varint()
        else:
            reader.skip(wire)
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if shape is None:
        shape = [sides.get(number, 0) for number in _OLD_SIDES] if sides else [len(values)]
    # A negative side arrives as a number beyond 63 bits.
    if any(side > _MAX_SIDE for side in shape) or math.prod(shape) != len(values):
        said = " x ".join(map(str, shape))
        raise _WireError(f"at byte {start}, a blob of {said} has {len(values)} numbers")
    return values.reshape(shape)


def _shape(reader: _Reader) -> list[int]:
    shape: list[int] = []
    for number, wire in reader.fields():
        if number == 1 and wire == _CHUNK:
            dims = reader.inside()
            while dims.place < dims.end and len(shape) <= _MAX_DIMS:
                shape.append(dims.varint())
        elif number == 1 and wire == _VARINT:
            shape.append(reader.varint())
        else:
            reader.skip(wire)
        if len(shape) > _MAX_DIMS:
            raise _WireError(f"at byte {reader.place}, an impossible shape")
    return shape


def _single(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # too large a double becomes infinite, which is refused later
        return values.astype(np.float32)


class _Budget:
    """How many fields may still be read."""

    def __init__(self) -> None:
        self.left = _MAX_FIELDS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _WireError("too many fields")


class _Reader:
    """Reads one message from ``place`` to ``end``, never beyond."""

    def __init__(self, content: bytes, place: int, end: int, budget: _Budget) -> None:
        self.content, self.place, self.end, self.budget = content, place, end, budget

    def fields(self) -> Iterator[tuple[int, int]]:
        """Name each field, with how it is written; whoever asks reads or skips its value before the next."""
        while self.place < self.end:
            self.budget.take()
            key = self.varint()
            if not key >> 3:
                raise _WireError(f"at byte {self.place}, a field without a number")
            yield key >> 3, key & 7

    def varint(self) -> int:
        value, place = 0, self.place
        for shift in range(0, 70, 7):
            if place >= self.end:
                raise _WireError(f"it ends at byte {place}, inside a number")
            byte = self.content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                self.place = place
                return value
        raise _WireError(f"at byte {self.place}, a number without an end")

    def take(self, length: int) -> int:
        """Move on by ``length`` bytes and tell where they begin."""
        start = self.place
        if length > self.end - start:
            raise _WireError(f"at byte {start}, {length} bytes are announced and {self.end - start} are left")
        self.place = start + length
        return start

    def inside(self) -> _Reader:
        """Read the message that is the field's value."""
        start = self.take(self.varint())
        return _Reader(self.content, start, self.place, self.budget)

    def text(self) -> str:
        length = self.varint()
        if length > _MAX_NAME:
            raise _WireError(f"at byte {self.place}, a name of {length} bytes")
        start = self.take(length)
        return self.content[start : self.place].decode("utf-8", errors="replace")

    def numbers(self, width: int, wire: int) -> NDArray[np.float32]:
        """Read floating-point numbers of 4 or 8 bytes: packed, or the whole run of those with a key before each."""
        kind = f"<f{width}"
        if wire == _CHUNK:
            length = self.varint()
            start = self.take(length)
            if length % width:
                raise _WireError(f"at byte {start}, {length} bytes of numbers of {width} bytes")
            return _single(np.frombuffer(self.content, kind, length // width, start))
        if wire != (_FIXED32 if width == 4 else _FIXED64):
            raise _WireError(f"at byte {self.place}, numbers of another width")
        keyed = np.dtype([("key", "u1"), ("value", kind)])
        first = self.place - 1
        run = np.frombuffer(self.content, keyed, (self.end - first) // keyed.itemsize, first)
        count, window = 0, _WINDOW
        while len(part := run["key"][count : count + window]):
            others = np.flatnonzero(part != self.content[first])
            if len(others):
                count += int(others[0])
                break
            count, window = count + len(part), 2 * window
        # At least the one whose key was read has to be there in full.
        self.place = first
        self.take(max(1, count) * keyed.itemsize)
        return _single(run["value"][:count])

    def skip(self, wire: int) -> None:
        if wire == _VARINT:
            self.varint()
        elif wire == _CHUNK:
            self.take(self.varint())
        elif wire in (_FIXED32, _FIXED64):
            self.take(4 if wire == _FIXED32 else 8)
        else:
            raise _WireError(f"at byte {self.place}, a field of an unknown kind")
