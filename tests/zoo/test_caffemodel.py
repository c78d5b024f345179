"""The reader of Caffe's protocol buffers: bytes written by hand, and bytes that lie."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from refinedet_cli.errors import CheckpointError
from refinedet_cli.zoo.caffemodel import CaffeNet, read_caffemodel

# name "net"; a layer "fc" whose blob is 2 x 3 of the floats 0..5, packed, shape packed.
FLOATS = struct.pack("<6f", *range(6))
BLOB = b"\x3a\x04\x0a\x02\x02\x03" + b"\x2a\x18" + FLOATS
LAYER = b"\x0a\x02fc" + b"\x12\x0cInnerProduct" + b"\x3a\x20" + BLOB
NET = b"\x0a\x03net" + b"\xa2\x06" + bytes([len(LAYER)]) + LAYER


def read(tmp_path: Path, content: bytes) -> CaffeNet:
    path = tmp_path / "net.caffemodel"
    path.write_bytes(content)
    return read_caffemodel(path)


def refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(CheckpointError, match=r"net\.caffemodel: not a readable caffemodel: ") as caught:
        read(tmp_path, content)
    assert caught.value.hint
    return caught.value.message


def layer_of(blob: bytes) -> bytes:
    layer = b"\x0a\x02fc" + b"\x3a" + bytes([len(blob)]) + blob
    return b"\xa2\x06" + bytes([len(layer)]) + layer


def test_a_network_by_hand(tmp_path):
    net = read(tmp_path, NET)
    assert (net.name, [layer.name for layer in net.layers]) == ("net", ["fc"])
    (blob,) = net.layers[0].blobs
    assert blob.dtype == np.float32
    assert blob.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_old_form_of_layers_and_shapes(tmp_path):
    blob = b"\x08\x01\x10\x01\x18\x02\x20\x03" + b"\x2a\x18" + FLOATS
    layer = b"\x22\x02fc" + b"\x28\x0e" + b"\x32" + bytes([len(blob)]) + blob
    (found,) = read(tmp_path, b"\x12" + bytes([len(layer)]) + layer).layers
    assert found.name == "fc"
    assert found.blobs[0].shape == (1, 1, 2, 3)


@pytest.mark.parametrize(
    "numbers",
    [
        b"".join(b"\x2d" + struct.pack("<f", i) for i in range(6)),
        b"\x2a\x08" + FLOATS[:8] + b"\x2a\x10" + FLOATS[8:],
        b"\x2d" + FLOATS[:4] + b"\x2a\x14" + FLOATS[4:],
        b"\x42\x30" + struct.pack("<6d", *range(6)),
        b"".join(b"\x41" + struct.pack("<d", i) for i in range(6)),
    ],
    ids=["unpacked", "in two pieces", "both ways", "doubles", "unpacked doubles"],
)
def test_numbers_may_be_written_in_several_ways(tmp_path, numbers):
    for blob in (b"\x3a\x04\x0a\x02\x02\x03" + numbers, numbers + b"\x3a\x04\x08\x02\x08\x03"):
        (layer,) = read(tmp_path, layer_of(blob)).layers
        assert layer.blobs[0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_is_not_needed_is_skipped(tmp_path):
    others = b"\x20\x05" + b"\x1a\x04data" + b"\x4d" + bytes(4) + b"\x51" + bytes(8) + b"\xf8\xff\xff\xff\x0f\x01"
    assert len(read(tmp_path, others + NET + others).layers) == 1
    empty = b"\xa2\x06\x06" + b"\x0a\x04relu"
    assert [layer.name for layer in read(tmp_path, empty + NET).layers] == ["fc"]


@pytest.mark.parametrize("end", range(1, len(NET)))
def test_a_file_that_is_cut_off_is_refused(tmp_path, end):
    whole = {5: 0, len(NET): 1}  # where a field ends, the rest is simply not there
    if end in whole:
        assert len(read(tmp_path, NET[:end]).layers) == whole[end]
    else:
        assert "byte" in refusal(tmp_path, NET[:end])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x0a\xff\xff\xff\xff\x0f", "a name of 4294967295 bytes"),
        (b"\xa2\x06\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "9223372036854775807 bytes are announced and 0 are left"),
        (b"\x80" * 12, "a number without an end"),
        (b"\x00\x01", "a field without a number"),
        (b"\x0b", "a field of an unknown kind"),
        (layer_of(b"\x3a\x04\x0a\x02\x02\x04" + b"\x2a\x18" + FLOATS), "a blob of 2 x 4 has 6 numbers"),
        (layer_of(b"\x2a\x03abc"), "3 bytes of numbers of 4 bytes"),
        (layer_of(b"\x29" + bytes(8)), "numbers of another width"),
        (layer_of(b"\x3a\x0b\x0a\x09" + b"\x01" * 9 + b"\x2a\x04" + bytes(4)), "an impossible shape"),
        (layer_of(b"\x08" + b"\xff" * 9 + b"\x01" + b"\x10\x00\x18\x00\x20\x00"), "a blob of 18446744073709551615 x 0"),
        (b"\x20\x01" * 200_001, "too many fields"),
    ],
)
def test_lengths_that_lie_are_refused(tmp_path, content, says):
    assert says in refusal(tmp_path, content)


def test_a_hostile_mixture_of_numbers_is_not_slow(tmp_path):
    # Runs of one number each, with a field to skip between: what follows must not be looked through for each.
    inside = (b"\x2d" + bytes(4) + b"\x48\x00") * 90_000
    length = len(inside)
    layer = b"\x3a" + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + inside
    length = len(layer)
    content = b"\xa2\x06" + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + layer
    started = time.process_time()
    (found,) = read(tmp_path, content).layers
    assert found.blobs[0].shape == (90_000,)
    assert time.process_time() - started < 5


def test_too_large_a_double_becomes_infinite(tmp_path):
    (layer,) = read(tmp_path, layer_of(b"\x42\x08" + struct.pack("<d", 1e300))).layers
    assert layer.blobs[0].tolist() == [np.inf]


def test_an_empty_file_has_no_layers(tmp_path):
    assert read(tmp_path, b"") == CaffeNet("", ())
