"""Large JPEGs that are decoded smaller than they are."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from refinedet_cli.data.images import Reading, image_size, read_image, read_reduced
from refinedet_cli.errors import DataError

ORIENTATION = 0x0112
INPUT = (32, 48)


def scene(height: int, width: int) -> np.ndarray:
    """A smooth picture of which no turn or flip equals another."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    planes = [255 * x, 255 * y * y, 200 * x * y + 30]
    return np.stack(planes, axis=2).astype(np.uint8)


def save(folder: Path, size: tuple[int, int], *, mode: str = "RGB", name: str = "a.jpg", **options: Any) -> Path:
    path = folder / name
    Image.fromarray(scene(*size)).convert(mode).save(path, **{"quality": 95, **options})
    return path


def squares(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each square of a picture whose sides the factor divides."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    return pixels.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))


def assert_in_full(reading: Reading, path: Path) -> None:
    assert reading.factor == 1
    np.testing.assert_array_equal(reading.pixels, read_image(path))
    assert reading.size == reading.pixels.shape[:2] == image_size(path)[::-1]


@pytest.mark.parametrize(
    ("size", "factor"),
    [
        pytest.param((512, 768), 8, id="exactly twice the input at an eighth"),
        pytest.param((511, 768), 8, id="a side that is not divided evenly counts the last pixel"),
        pytest.param((505, 761), 8, id="the least at an eighth"),
        pytest.param((504, 768), 4, id="one row less"),
        pytest.param((512, 760), 4, id="one column less"),
        pytest.param((253, 381), 4, id="the least at a quarter"),
        pytest.param((252, 384), 2, id="one row less than a quarter"),
        pytest.param((127, 191), 2, id="the least at a half"),
        pytest.param((126, 192), 1, id="one row less than a half"),
        pytest.param((128, 190), 1, id="one column less than a half"),
        pytest.param((4000, 100), 1, id="long and narrow"),
        pytest.param((20, 30), 1, id="smaller than the input"),
    ],
)
def test_both_sides_stay_at_least_twice_the_input(tmp_path: Path, size: tuple[int, int], factor: int) -> None:
    path = save(tmp_path, size)
    reading = read_reduced(path, INPUT)
    assert reading.factor == factor
    assert reading.size == size
    assert reading.pixels.shape == (-(-size[0] // factor), -(-size[1] // factor), 3)
    assert reading.pixels.dtype == np.uint8
    assert reading.pixels.flags.c_contiguous
    assert reading.pixels.flags.writeable
    if factor == 1:
        assert_in_full(reading, path)


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)), wanted=st.tuples(st.integers(1, 40), st.integers(1, 40))
)
def test_the_rule_holds_for_any_size(tmp_path_factory: Any, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    reading = read_reduced(save(tmp_path_factory.getbasetemp(), size), wanted)
    reached = [
        factor
        for factor in (8, 4, 2)
        if all(-(-side // factor) >= 2 * least for side, least in zip(size, wanted, strict=True))
    ]
    assert reading.factor == max(reached, default=1)
    assert reading.pixels.shape == (*(-(-side // reading.factor) for side in size), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_sides_count_as_seen(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    # As stored, the picture could be halved for this input; turned, its sides suffice for a quarter.
    size, wanted = ((640, 256), (80, 32)) if orientation < 5 else ((256, 640), (80, 32))
    path = save(tmp_path, size, exif=exif)
    whole, reading = read_image(path), read_reduced(path, wanted)
    assert reading.factor == 4
    assert reading.size == whole.shape[:2] == (640, 256)
    assert reading.pixels.flags.c_contiguous
    assert np.abs(reading.pixels - squares(whole, 4)).max() < 4


@pytest.mark.parametrize("orientation", [1, 6])
def test_sides_are_not_mixed_up(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path, (640, 256), exif=exif)
    # Seen upright it has 640 rows; seen turned it has 256.
    assert read_reduced(path, (80, 32)).factor == (4 if orientation == 1 else 1)
    assert read_reduced(path, (32, 80)).factor == (1 if orientation == 1 else 4)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("L", {"progressive": True}),
    ],
    ids=["4:2:0", "4:4:4", "progressive", "stored as RGB", "grey", "grey progressive"],
)
def test_a_reduced_pixel_is_the_mean_of_its_square(
    tmp_path: Path, mode: str, options: dict[str, Any], factor: int
) -> None:
    path = save(tmp_path, (512, 768), mode=mode, **options)
    reading = read_reduced(path, (256 // factor, 384 // factor))
    assert reading.factor == factor
    assert np.abs(reading.pixels - squares(read_image(path), factor)).max() < 4


def test_several_pictures_in_one_file_are_reduced_as_the_first(tmp_path: Path) -> None:
    path, second = tmp_path / "a.jpg", Image.new("RGB", (768, 512), "red")
    Image.fromarray(scene(512, 768)).save(path, "MPO", save_all=True, append_images=[second], quality=95)
    with Image.open(path) as image:
        assert image.format == "MPO"
    reading = read_reduced(path, INPUT)
    assert reading.factor == 8
    assert np.abs(reading.pixels - squares(read_image(path), 8)).max() < 4


@pytest.mark.parametrize("extension", ["png", "webp", "tiff", "bmp"])
def test_other_formats_are_decoded_in_full(tmp_path: Path, extension: str) -> None:
    path = save(tmp_path, (512, 768), name=f"a.{extension}")
    assert_in_full(read_reduced(path, INPUT), path)


def test_a_cmyk_jpeg_is_decoded_in_full(tmp_path: Path) -> None:
    path = save(tmp_path, (512, 768), mode="CMYK")
    assert_in_full(read_reduced(path, INPUT), path)


def test_a_turned_picture_of_another_format_has_its_size_as_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = save(tmp_path, (100, 40), name="a.png", exif=exif)
    reading = read_reduced(path, (1, 1))
    assert reading.size == (40, 100)
    assert_in_full(reading, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def _cut_at_the_start(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("hello, world")


def _missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("spoil", [_cut, _cut_at_the_start, _empty, _text, _missing], ids=lambda f: f.__name__)
def test_bad_files_are_the_same_error_as_in_full(tmp_path: Path, spoil: Any) -> None:
    path = save(tmp_path, (512, 768), quality=100)
    spoil(path)
    with pytest.raises(DataError) as full:
        read_image(path)
    with pytest.raises(DataError) as reduced:
        read_reduced(path, INPUT)
    # Where a file ends early, Pillow tells how many bytes it had left, which depends on how it reads.
    assert reduced.value.message.partition(" (")[0] == full.value.message.partition(" (")[0]
    assert reduced.value.hint == full.value.hint


def test_the_limit_is_on_the_whole_picture(tmp_path: Path) -> None:
    path = save(tmp_path, (512, 768))
    with pytest.raises(DataError, match="768 x 512 pixels"):
        read_reduced(path, INPUT, max_pixels=512 * 768 - 1)
    assert read_reduced(path, INPUT, max_pixels=512 * 768).factor == 8


def test_a_lossless_jpeg_which_cannot_be_reduced_is_decoded_in_full(tmp_path: Path) -> None:
    def segment(marker: int, content: bytes) -> bytes:
        return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content

    # Grey, 128 x 128, each pixel predicted from its neighbour and no difference anywhere: a bit 0 for each.
    frame = segment(0xC3, struct.pack(">BHHB", 8, 128, 128, 1) + bytes([1, 0x11, 0]))
    table, scan = segment(0xC4, bytes([0, 1] + [0] * 16)), segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8" + frame + table + scan + bytes(128 * 128 // 8) + b"\xff\xd9")
    assert (read_image(path) == 128).all()
    assert_in_full(read_reduced(path, (16, 16)), path)
