from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from refinedet_cli.data.images import image_size, read_image
from refinedet_cli.errors import DataError

ORIENTATION = 0x0112


def gradient(height: int = 6, width: int = 9) -> np.ndarray:
    """A picture of which no turn or flip equals another."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "ppm", "webp", "gif", "tga", "qoi"])
def test_lossless_formats_come_back_exactly(tmp_path: Path, extension: str) -> None:
    pixels = gradient() if extension != "gif" else np.full((6, 9, 3), (255, 0, 0), dtype=np.uint8)
    path = saved(
        tmp_path / f"a.{extension}", Image.fromarray(pixels), **({"lossless": True} if extension == "webp" else {})
    )
    result = read_image(path)
    np.testing.assert_array_equal(result, pixels)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert result.flags.writeable
    assert image_size(path) == (9, 6)


@pytest.mark.parametrize("extension", ["jpg", "jp2", "avif", "webp"])
def test_lossy_formats_come_back_nearly(tmp_path: Path, extension: str) -> None:
    pixels = np.full((16, 24, 3), (200, 100, 50), dtype=np.uint8)
    result = read_image(saved(tmp_path / f"a.{extension}", Image.fromarray(pixels)))
    assert result.shape == pixels.shape
    np.testing.assert_allclose(result.astype(int), pixels.astype(int), atol=4)


WHITE, BLACK, GREY = (255, 255, 255), (0, 0, 0), (128, 128, 128)


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    return image


def columns(mode: str, left: object, right: object) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


@pytest.mark.parametrize(
    ("extension", "image", "left", "right"),
    [
        ("png", columns("1", 0, 1), BLACK, WHITE),
        ("png", columns("L", 7, 200), (7, 7, 7), (200, 200, 200)),
        ("png", columns("LA", (9, 255), (0, 0)), (9, 9, 9), WHITE),
        ("png", columns("RGBA", (1, 2, 3, 255), (0, 0, 0, 0)), (1, 2, 3), WHITE),
        ("png", columns("RGBA", (0, 0, 0, 127), (255, 0, 0, 51)), GREY, (255, 204, 204)),
        ("png", palette_with_transparency(), (10, 20, 30), WHITE),
        ("gif", palette_with_transparency(), (10, 20, 30), WHITE),
        ("tiff", columns("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), WHITE, (255, 0, 0)),
        ("png", columns("I;16", 65535, 32768), WHITE, GREY),
        ("tiff", columns("I;16", 257, 128), (1, 1, 1), BLACK),
        ("tiff", columns("I;16B", 65535, 129), WHITE, (1, 1, 1)),
        ("tiff", columns("I", 65535, 0), WHITE, BLACK),
        ("tiff", columns("F", 1.0, 0.5), WHITE, GREY),
        ("tiff", columns("F", 255.0, 0.5), WHITE, BLACK),
    ],
    ids=[
        "bilevel", "grey", "grey+alpha", "rgba", "half-transparent", "palette", "gif", "cmyk", "16 bit png",
        "16 bit tiff", "16 bit big-endian", "32 bit", "float to 1", "float to 255",
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(
    tmp_path: Path, extension: str, image: Image.Image, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    result = read_image(saved(tmp_path / f"a.{extension}", image))
    assert result.tolist() == [[list(left), list(right)]]


def test_lab_becomes_rgb(tmp_path: Path) -> None:
    result = read_image(saved(tmp_path / "a.tiff", columns("LAB", (255, 128, 128), (0, 128, 128))))
    np.testing.assert_allclose(result.astype(int), [[WHITE, BLACK]], atol=2)


def test_grey_with_a_transparent_value(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", columns("L", 7, 200), transparency=7)
    assert read_image(path).tolist() == [[[255] * 3, [200] * 3]]


@pytest.mark.parametrize(
    "values",
    [(-1.0, 0.5), (float("nan"), 0.5), (0.0, 300.0), (0.0, float("inf"))],
    ids=["negative", "nan", "large", "inf"],
)
def test_grey_of_unknown_range_is_refused(tmp_path: Path, values: tuple[float, float]) -> None:
    path = saved(tmp_path / "a.tiff", columns("F", *values))
    with pytest.raises(DataError, match="grey values") as caught:
        read_image(path)
    assert caught.value.hint


def test_32_bit_integers_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="65536"):
        read_image(saved(tmp_path / "a.tiff", columns("I", 65536, 0)))


@pytest.mark.parametrize("extension", ["png", "tiff", "webp", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int, extension: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options: dict[str, object] = {"lossless": True} if extension == "webp" else {}
    path = saved(tmp_path / f"a.{extension}", Image.fromarray(gradient()), exif=exif, **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    result = read_image(path)
    np.testing.assert_array_equal(result, expected)
    assert result.flags.c_contiguous
    assert image_size(path) == (result.shape[1], result.shape[0])
    assert (result.shape[0] == 9) == (orientation >= 5)


def test_orientation_of_avif_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    path = saved(tmp_path / "a.avif", Image.fromarray(pixels), exif=exif)
    result = read_image(path)
    assert result.shape == (32, 16, 3)
    assert result[:12].min() > 200
    assert result[20:].max() < 50
    assert image_size(path) == (16, 32)


def png(*chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\1\2\3" * 2)
    parts = {"header": chunk(b"IHDR", header), "pixels": chunk(b"IDAT", pixels), "end": chunk(b"IEND", b"")}
    return b"\x89PNG\r\n\x1a\n" + parts["header"] + parts["pixels"] + b"".join(chunks) + parts["end"]


def test_png_orientation_behind_the_pixels_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "a.png").write_bytes(png(chunk(b"eXIf", exif.tobytes()[6:])))
    assert read_image(tmp_path / "a.png").shape == (3, 2, 3)
    assert image_size(tmp_path / "a.png") == (2, 3)


def test_size_of_a_png_is_read_without_its_pixels(tmp_path: Path) -> None:
    whole = png()
    (tmp_path / "a.png").write_bytes(whole[: whole.index(b"IDAT") + 6])
    assert image_size(tmp_path / "a.png") == (3, 2)
    with pytest.raises(DataError, match="damaged"):
        read_image(tmp_path / "a.png")


def test_damaged_exif_counts_as_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(gradient()), exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01")
    assert read_image(path).shape == (6, 9, 3)
    assert image_size(path) == (9, 6)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_out_of_range_counts_as_none(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    assert read_image(saved(tmp_path / "a.png", Image.fromarray(gradient()), exif=exif)).shape == (6, 9, 3)


@pytest.mark.parametrize("extension", ["gif", "tiff", "webp", "png"])
def test_first_frame_counts(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    options: dict[str, object] = {"lossless": True} if extension == "webp" else {}
    path = saved(tmp_path / f"a.{extension}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert (read_image(path) == (255, 0, 0)).all()


def test_limit_on_pixels_comes_before_decoding(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("1", (30_000, 10_000)))
    for read in (read_image, image_size):
        with pytest.raises(DataError, match=r"30000 x 10000 pixels, more than 200 megapixels") as caught:
            read(path)
        assert caught.value.hint
    assert image_size(path, max_pixels=300_000_000) == (30_000, 10_000)


def test_a_side_that_takes_too_much_memory_to_resize_is_refused(tmp_path):
    path = saved(tmp_path / "strip.png", Image.new("1", (100_001, 1)))
    with pytest.raises(DataError, match=r"strip\.png is 100001 x 1, and no side may have more than 100,000 pixels"):
        read_image(path)
    assert read_image(saved(tmp_path / "long.png", Image.new("1", (100_000, 1)))).shape == (1, 100_000, 3)


def test_large_pictures_below_the_limit_are_silent(tmp_path: Path) -> None:
    # Pillow itself warns above 89 megapixels and refuses above 179.
    path = saved(tmp_path / "a.png", Image.new("1", (19_000, 10_000)))
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert image_size(path) == (19_000, 10_000)
    assert seen == []
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def test_pillow_is_as_before_after_many_threads(tmp_path: Path) -> None:
    good, bad = saved(tmp_path / "a.png", Image.fromarray(gradient())), tmp_path / "b.png"
    bad.write_bytes(b"no picture")
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    results: list[bool] = []

    def work() -> None:
        for _ in range(20):
            with pytest.raises(DataError):
                read_image(bad)
            results.append(np.array_equal(read_image(good), gradient()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 160
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


def _text(path: Path) -> None:
    path.write_text("hello, world")


def _empty(path: Path) -> None:
    path.touch()


def _missing(path: Path) -> None:
    pass


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def _lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def _heif(path: Path) -> None:
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def _postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


def _truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


def _no_pixels(path: Path) -> None:
    path.write_bytes(b"P6\n0 4\n255\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text, "not a picture"),
        (_empty, "is empty"),
        (_missing, "does not exist"),
        (_folder, "is a folder"),
        (_pipe, "not an ordinary file"),
        (_dangling, "does not exist"),
        (_lfs, "Git LFS pointer"),
        (_heif, "HEIF"),
        (_postscript, "not a picture"),
        (_truncated, "damaged.*truncated"),
        (_no_pixels, "no pixels|damaged|not a picture"),
    ],
    ids=lambda value: value.__name__.lstrip("_") if callable(value) else "",
)
def test_bad_files_are_one_data_error(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "a.jpg"
    make(path)
    with pytest.raises(DataError, match=message) as caught:
        read_image(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    if make is not _truncated:
        with pytest.raises(DataError, match=message):
            image_size(path)


@pytest.mark.parametrize("name", ["nul\0.jpg", "n" * 300 + ".jpg"], ids=["nul", "long"])
def test_impossible_names_are_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        read_image(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(gradient()))
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read: permission denied"):
        read_image(path)


def test_refused_permission_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(gradient()))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read: permission denied"):
        read_image(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mangled_pictures_raise_nothing_but_data_error(tmp_path: Path, data: st.DataObject) -> None:
    extension = data.draw(st.sampled_from(["png", "jpg", "gif", "tiff", "bmp", "webp", "qoi", "tga", "ppm"]))
    path = saved(tmp_path / f"a.{extension}", Image.fromarray(gradient()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    message = ""
    try:
        result = read_image(path, max_pixels=100_000)
    except DataError as error:
        message = error.message
    if message:
        assert str(path) in message
    else:
        assert result.dtype == np.uint8
        assert image_size(path) == (result.shape[1], result.shape[0])
