"""The one way from a file to pixels."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from refinedet_cli.errors import DataError

MAX_PIXELS = 200_000_000
# What it takes to resize a side grows with it: here, half a gigabyte.
MAX_SIDE = 100_000

# Raster formats that are recognised by their first bytes. Others are left out on purpose: EPS would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI")
READABLE = "JPEG, PNG, WebP, BMP, GIF, TIFF, JPEG 2000, AVIF, PPM, QOI and TGA are read"
# HEIF is listed although Pillow cannot read it, so that such pictures are reported and not passed over.
_EXTENSIONS = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".tga",
        ".qoi",
    }
    | {".jp2", ".j2k", ".jpx", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"}
)
_WIDTH_TAG, _HEIGHT_TAG, _ORIENTATION_TAG = 0x0100, 0x0101, 0x0112
# By what libjpeg can divide the sides while it decodes, the most first.
_REDUCTIONS = (8, 4, 2)
# A reduced picture is at least so many times as large as what it is resized to, so that the resize still decides.
_ROOM = 2
_ORIENT: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@dataclass(frozen=True)
class FoundImage:
    """A picture to work on.

    Attributes:
        path: the file.
        name: relative, unique among the pictures found together, for naming outputs; has no ``..``.
    """

    path: Path
    name: str


class Header(NamedTuple):
    """What a picture file says before its pixels.

    Attributes:
        size: (width, height) as the picture is seen, px-img.
        orientation: how the stored pixels are turned to be seen, as EXIF numbers it: 1..8; 1 leaves them as they are.
    """

    size: tuple[int, int]
    orientation: int


class Reading(NamedTuple):
    """A picture that was decoded, in full or reduced.

    Attributes:
        pixels: uint8[h, w, 3], RGB, as the picture is seen; contiguous and writable.
        size: (height, width) of the whole picture as it is seen, px-img.
        factor: 1, 2, 4 or 8: each pixel stands for a square of so many, and h and w are the sides of the whole picture
            divided by it and rounded up. The last row and column may stand for less than a square.
    """

    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    factor: int = 1


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a picture as people see it.

    EXIF orientation is applied; of an animation or stack the first frame counts; transparent parts are white. 16-bit
    grey is scaled from its full range, floating point from [0, 1] or, if it exceeds that, [0, 255].

    Returns:
        uint8[H, W, 3], RGB, contiguous and writable; (W, H) equals ``image_size(path)``.

    Raises:
        DataError: the file is missing, is not an ordinary file, may not be read, is empty, damaged, no picture, or has
            more than ``max_pixels`` pixels.
    """
    with open_regular(path) as file, _pillow():
        return image_pixels(_open(path, file, max_pixels), path)


def read_reduced(path: Path, input_size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> Reading:
    """Decode a picture that will be resized: a large JPEG at a half, a quarter or an eighth of its size.

    It is reduced as long as both sides stay at least twice those of the input. This is for looking at pictures fast,
    not for numbers: reduced and then resized, pixels differ a little. A JPEG that is neither RGB nor grey when decoded,
    and every other format, is decoded in full.

    Args:
        path: the file.
        input_size: (height, width) to which the picture, as it is seen, will be resized.
        max_pixels: most pixels of the whole picture.

    Returns:
        a reading; where its ``factor`` is 1, its pixels equal ``read_image(path)``.

    Raises:
        DataError: as `read_image`.
    """
    with open_regular(path) as file, _pillow():
        image = _open(path, file, max_pixels)
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            pixels = image_pixels(image, path)
            return Reading(pixels, (pixels.shape[0], pixels.shape[1]))
        width, height = image.size
        is_turned = _orientation(image) >= 5
        factor = _reduce(image, input_size[::-1] if is_turned else input_size)
        return Reading(image_pixels(image, path), (width, height) if is_turned else (height, width), factor)


def image_pixels(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    """Decode an opened picture exactly as ``read_image`` decodes a file.

    Args:
        image: of any size; it may be loaded already.
        path: of its file, or what else to call it where it cannot be read.

    Returns:
        as ``read_image``.

    Raises:
        DataError: it is damaged, or its grey values have no known range.
    """
    with _pillow(), _damage(path):
        image.load()
    orientation = _orientation(image)
    pixels = _to_rgb(path, image)
    turn = _ORIENT.get(orientation)
    return np.ascontiguousarray(turn(pixels)) if turn else pixels


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Read the (width, height) of a picture as it is seen, EXIF orientation applied, from its header alone.

    Raises:
        DataError: as ``read_header``.
    """
    return read_header(path, max_pixels=max_pixels).size


def read_header(path: Path, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Read what a picture says of its size and orientation; its pixels are not decoded.

    Raises:
        DataError: as ``read_image``, save for damage behind the header.
    """
    with open_regular(path) as file, _pillow():
        image = _open(path, file, max_pixels)
        width, height = _stored_size(image)
        orientation = _orientation(image)
        return Header((height, width) if orientation >= 5 else (width, height), orientation)


def is_picture_name(name: str) -> bool:
    """Tell whether a file is a picture by its extension; hidden files are none."""
    return not name.startswith(".") and Path(name).suffix.lower() in _EXTENSIONS


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open an ordinary, non-empty file to read; a pipe or device is refused, for it could block for ever.

    Raises:
        DataError: it is missing, empty, something else or may not be read.
    """
    with ExitStack() as stack:
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise DataError(f"{path} is a folder, not a file", "name a file")
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path} is not an ordinary file", "save it as a file first")
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist", missing_cure(path)) from None
        except PermissionError:
            raise DataError(f"{path} cannot be read: permission denied", "change its permissions") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(f"{path} cannot be read: {reason}", "check the path") from error
        if status.st_size == 0:
            raise DataError(f"{path} is empty", "copy or download it again")
        yield file


def is_file(path: Path) -> bool:
    """Tell whether there is an ordinary file; a name that no file can have names none."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for names that are too long


def is_empty(path: Path) -> bool:
    """Tell whether there is an ordinary file without content; a pipe or device, which has no length, is none."""
    return is_file(path) and path.stat().st_size == 0


def real_path(path: Path) -> Path:
    """Follow all links; what cannot be followed stays as it is, for it cannot be opened either."""
    try:
        return Path(os.path.realpath(path))  # Path.resolve raises where links go round.
    except (OSError, ValueError):
        return path


def missing_cure(path: Path) -> str:
    """Tell what may be wrong with the path of a file that does not exist."""
    if path.is_symlink():
        return "it is a link to something that is gone"
    return "check the name and its case" if path.parent.is_dir() else f"the folder {path.parent} does not exist either"


class _PillowLimits:
    """Lifts Pillow's pixel limit, for which ours stands in, and silences its remarks, while any thread decodes.

    Both are process-wide in Pillow, so the first to enter sets them and the last to leave puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._restore = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._set()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._restore.close()

    def _set(self) -> None:
        self._restore.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None


_pillow = _PillowLimits()


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Report what Pillow raises on a bad file, which may be any exception, as the file's fault."""
    try:
        yield
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{path} does not fit into memory", "make the picture smaller") from None
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(f"{path} is damaged: {reason}", "copy or download it again, or leave it out") from error


def _open(path: Path, file: BufferedReader, max_pixels: int) -> ImageFile.ImageFile:
    Image.init()
    # TGA has no signature: with it in the list, any bytes might pass for a picture.
    formats = [*_FORMATS, "TGA"] if path.suffix.lower() == ".tga" else _FORMATS
    with _damage(path):
        try:
            image = Image.open(file, formats=[f for f in formats if f in Image.OPEN])
        except UnidentifiedImageError:
            raise _no_picture(path, file) from None
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{path} has {width} x {height} pixels, more than {max_pixels / 1e6:g} megapixels",
            "make it smaller, or cut it into tiles",
        )
    if max(width, height) > MAX_SIDE:
        raise DataError(
            f"{path} is {width} x {height}, and no side may have more than {MAX_SIDE:,} pixels", "cut it into pieces"
        )
    if width <= 0 or height <= 0:
        raise DataError(f"{path} has no pixels ({width} x {height})", "leave it out")
    return image


def _no_picture(path: Path, file: BufferedReader) -> DataError:
    file.seek(0)
    head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return DataError(f"{path} is a Git LFS pointer, not the picture itself", "run: git lfs pull")
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return DataError(f"{path} is a HEIF picture, which is not read", "convert it to JPEG")
    if path.suffix.lower() in _EXTENSIONS:
        return DataError(f"{path} is not a picture, or is damaged at its start", f"copy it again; {READABLE}")
    return DataError(f"{path} is not a picture", READABLE)


def _reduce(image: JpegImagePlugin.JpegImageFile, input_size: tuple[int, int]) -> int:
    """Have a JPEG decoded as small as an input (height, width) of its stored pixels allows; tells by what factor."""
    # A lossless JPEG, which has no tables of quantisation, cannot be reduced.
    if image.mode not in ("RGB", "L") or not image.quantization:
        return 1
    width, height = image.size
    for factor in _REDUCTIONS:
        reduced = (-(-width // factor), -(-height // factor))
        if reduced[1] >= _ROOM * input_size[0] and reduced[0] >= _ROOM * input_size[1]:
            # Pillow takes the largest factor that leaves at least the size that it is asked for, sides rounded down.
            image.draft(None, (width // factor, height // factor))
            return factor if image.size == reduced else 1
    return 1


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Of TIFF alone, and not in all versions, Pillow gives the turned size before it has turned the pixels.
        return int(image.tag_v2[_WIDTH_TAG]), int(image.tag_v2[_HEIGHT_TAG])
    return image.size


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 where there is none or the EXIF block is damaged, as browsers take it."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile) and not _has_late_metadata(image):
            exif = Image.Image.getexif(image)  # PNG's own method would decode all pixels to look behind them.
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) and value in _ORIENT else 1


def _has_late_metadata(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether a PNG holds EXIF or text behind its pixels."""
    if image.fp is None:  # All was read already.
        return False
    position = image.fp.tell()
    image.fp.seek(8)
    pixels = found = False
    while not found and len(head := image.fp.read(8)) == 8 and head[4:] != b"IEND":
        pixels |= head[4:] == b"IDAT"
        found = pixels and head[4:] in (b"eXIf", b"iTXt")
        image.fp.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    image.fp.seek(position)
    return found


def _to_rgb(path: Path, image: Image.Image) -> NDArray[np.uint8]:
    """Turn a loaded picture of any mode into uint8[H, W, 3]."""
    with _damage(path):
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            grey = _to_8_bit(path, np.array(image))
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.mode == "LAB":
            lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
            return np.array(converted)
        if image.has_transparency_data:
            seen = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            white = Image.new("RGBA", seen.size, "white")
            return np.array(Image.alpha_composite(white, seen).convert("RGB"))
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bit(path: Path, grey: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Scale [H, W] of 16-bit, 32-bit or floating-point grey to uint8."""
    low, high = float(grey.min()), float(grey.max())
    if np.issubdtype(grey.dtype, np.integer) and low >= 0 and high <= 65535:
        return ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(grey.dtype, np.floating) and low >= 0 and high <= 255:
        scaled = grey.astype(np.float64) * (255.0 if high <= 1 else 1.0)
        return np.rint(scaled).astype(np.uint8)
    raise DataError(
        f"{path} holds grey values from {low:g} to {high:g}, of which black and white are not known",
        "save it with 8 or 16 bits, or as floating point in [0, 1]",
    )
