"""The one way from a file to pixels, and the search for pictures in folders."""

from __future__ import annotations

import glob
import os
import re
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from refinedet_cli.errors import DataError

MAX_PIXELS = 200_000_000

# Raster formats that are recognised by their first bytes. Others are left out on purpose: EPS would start Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "QOI")
_KNOWN = "JPEG, PNG, WebP, BMP, GIF, TIFF, JPEG 2000, AVIF, PPM, QOI and TGA are read"
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
        name: relative, unique among the pictures found together (case aside), for naming outputs; has no ``..``.
    """

    path: Path
    name: str


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
        image = _open(path, file, max_pixels)
        with _damage(path):
            image.load()
        orientation = _orientation(image)
        pixels = _to_rgb(path, image)
    turn = _ORIENT.get(orientation)
    return np.ascontiguousarray(turn(pixels)) if turn else pixels


def image_size(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Read the (width, height) of a picture as it is seen, EXIF orientation applied, from its header alone.

    Raises:
        DataError: as ``read_image``, save for damage behind the header.
    """
    with open_regular(path) as file, _pillow():
        image = _open(path, file, max_pixels)
        width, height = _stored_size(image)
        return (height, width) if _orientation(image) >= 5 else (width, height)


def find_images(sources: Sequence[str]) -> list[FoundImage]:
    """Find the pictures that files, folders and patterns name.

    Folders are searched to the bottom for names with the usual extensions, hidden files and folders aside. Patterns
    know ``*``, ``?``, ``[...]`` and ``**``. A file that is named itself is taken whatever its extension.

    Returns:
        each picture once, in the order of the sources and sorted by name within each. Names are relative to the folder
        that was searched; where two would be equal, parent folders are added.

    Raises:
        DataError: a source names no picture, or a folder cannot be read.
    """
    found: dict[Path, FoundImage] = {}
    folders: dict[Path, Path] = {}
    for source in sources:
        for image in _find(source):
            folder = image.path.parent
            real = folders[folder] if folder in folders else folders.setdefault(folder, folder.resolve())
            found.setdefault(real / image.path.name, image)
    if not found:
        raise DataError("no pictures were named", "give files, folders or patterns such as 'photos/*.jpg'")
    return _with_unique_names(found)


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
            raise DataError(f"{path} does not exist", _missing_cure(path)) from None
        except PermissionError:
            raise DataError(f"{path} may not be read", "change its permissions") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}", "check the path") from error
        if status.st_size == 0:
            raise DataError(f"{path} is empty", "copy or download it again")
        yield file


def _missing_cure(path: Path) -> str:
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
        return DataError(f"{path} is not a picture, or is damaged at its start", f"copy it again; {_KNOWN}")
    return DataError(f"{path} is not a picture", _KNOWN)


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # Of TIFF alone, and not in all versions, Pillow gives the turned size before it has turned the pixels.
        return int(image.tag_v2[_WIDTH_TAG]), int(image.tag_v2[_HEIGHT_TAG])
    return image.size


def _orientation(image: ImageFile.ImageFile) -> int:
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


def _find(source: str) -> list[FoundImage]:
    """The pictures of one source; at least one."""
    path = Path(source)
    if re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        raise DataError(f"{source} is an address; pictures are not downloaded", "save it as a file first")
    try:
        if path.is_dir():
            found = _search(path)
            if not found:
                raise DataError(f"the folder {source} holds no pictures", f"searched with all its folders; {_KNOWN}")
            return found
        if path.exists():
            return [FoundImage(path, path.name)]
    except (OSError, ValueError) as error:
        raise DataError(f"{source!r} cannot be read: {error}", "check the path") from error
    if not glob.has_magic(source):
        raise DataError(f"{source} does not exist", _missing_cure(path) if source else "give a file or folder")
    found = _match(source)
    if not found:
        raise DataError(f"the pattern {source!r} matches no pictures", f"check it; {_KNOWN}")
    return found


def _search(folder: Path) -> list[FoundImage]:
    def fail(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}", "change its permissions")

    found, seen = [], set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = Path(here).resolve()
        if real in seen:  # A link that leads back up would never end.
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name) for name in files if is_picture_name(name)]
    named = [FoundImage(path, path.relative_to(folder).as_posix()) for path in found]
    return sorted(named, key=lambda image: image.name.split("/"))


def _match(pattern: str) -> list[FoundImage]:
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    # glob.glob rather than Path.glob, for that knows no absolute patterns and no hidden files.
    matches = (Path(match) for match in glob.glob(pattern, recursive=True))  # noqa: PTH207
    found = [path for path in matches if is_picture_name(path.name) and not path.is_dir()]
    named = []
    for path in found:
        name = path.relative_to(fixed)
        named.append(FoundImage(path, path.name if ".." in name.parts else name.as_posix()))
    return sorted(named, key=lambda image: (image.name.split("/"), image.path))


def _with_unique_names(found: dict[Path, FoundImage]) -> list[FoundImage]:
    """Lengthen equal names by parent folders, then number what is still equal (names that differ only in case)."""
    images, tails = list(found.values()), [path.parts[1:] for path in found]
    depth = [image.name.count("/") + 1 for image in images]
    while True:
        counts = Counter(image.name.casefold() for image in images)
        longer = [i for i, image in enumerate(images) if counts[image.name.casefold()] > 1 and depth[i] < len(tails[i])]
        if not longer:
            break
        for i in longer:
            depth[i] += 1
            images[i] = replace(images[i], name="/".join(tails[i][-depth[i] :]))
    return _numbered(images)


def _numbered(images: list[FoundImage]) -> list[FoundImage]:
    taken: set[str] = set()
    result = []
    for image in images:
        name, number = image.name, 1
        while name.casefold() in taken:
            number += 1
            stem, dot, extension = image.name.rpartition(".")
            name = f"{stem or extension}-{number}{dot if stem else ''}{extension if stem else ''}"
        taken.add(name.casefold())
        result.append(replace(image, name=name))
    return result
