"""Everything that a folder of pictures can hold, at once: what is bad is one line with its cure, the rest is done."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from refinedet_cli.core.config import Classes
from refinedet_cli.core.presets import tiny
from refinedet_cli.engine import detect_reading

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def pixels(height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    content = io.BytesIO()
    (image or Image.fromarray(pixels())).save(content, form, **options)
    return content.getvalue()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def frames(form: str, **options: Any) -> bytes:
    first, *rest = (Image.new("RGB", (56, 40), colour) for colour in ("red", "green", "blue"))
    return encoded(form, first, save_all=True, append_images=rest, **options)


def palette() -> Image.Image:
    image = Image.fromarray(pixels()).quantize(8)
    image.info["transparency"] = 1
    return image


def bomb() -> bytes:
    """A few hundred bytes that say 30,000 x 30,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Name, content, and (width, height) as seen.
GOOD: tuple[tuple[str, Callable[[], bytes], tuple[int, int]], ...] = (
    ("plain.jpg", lambda: encoded("JPEG"), (56, 40)),
    ("really a png.jpg", lambda: encoded("PNG"), (56, 40)),
    ("really a jpeg.tga", lambda: encoded("JPEG"), (56, 40)),
    ("one pixel.png", lambda: encoded("PNG", Image.new("RGB", (1, 1))), (1, 1)),
    ("wide.png", lambda: encoded("PNG", Image.new("L", (30_000, 3), 9)), (30_000, 3)),
    ("cmyk.jpg", lambda: encoded("JPEG", Image.fromarray(pixels()).convert("CMYK")), (56, 40)),
    ("16 bit.png", lambda: encoded("PNG", Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)), (56, 40)),
    ("palette.png", lambda: encoded("PNG", palette(), transparency=1), (56, 40)),
    ("grey + alpha.png", lambda: encoded("PNG", Image.fromarray(pixels()).convert("LA")), (56, 40)),
    ("animated.gif", lambda: frames("GIF"), (56, 40)),
    ("animated.webp", lambda: frames("WEBP", lossless=True), (56, 40)),
    ("stack.tiff", lambda: frames("TIFF"), (56, 40)),
    *(
        (f"exif{i}.jpg", lambda i=i: encoded("JPEG", exif=exif(i)), (56, 40) if i < 5 else (40, 56))
        for i in range(1, 9)
    ),
)  # fmt: skip


class Bad(NamedTuple):
    """A file that cannot be read: how it is made, and what is said of it."""

    make: Callable[[Path], object]
    says: str
    cure: str


def _write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _locked(path: Path) -> None:
    path.write_bytes(encoded("PNG"))
    path.chmod(0)


AGAIN = "copy or download it again"
BAD = {
    "empty.jpg": Bad(_write(b""), "is empty", AGAIN),
    "cut.jpg": Bad(_write(half(encoded("JPEG"))), "is damaged", AGAIN),
    "cut.png": Bad(_write(half(encoded("PNG"))), "is damaged", AGAIN),
    "cut.webp": Bad(_write(half(encoded("WEBP", lossless=True))), "is damaged", AGAIN),
    "cut at once.png": Bad(_write(encoded("PNG")[:10]), "not a picture, or is damaged at its start", "copy it again"),
    "text.jpg": Bad(_write(b"hello"), "not a picture", "are read"),
    "bomb.png": Bad(_write(bomb()), "30000 x 30000 pixels, more than 200 megapixels", "make it smaller"),
    "phone.heic": Bad(_write(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "HEIF picture, which is not read", "to JPEG"),
    "pipe.png": Bad(os.mkfifo, "not an ordinary file", "save it as a file first"),
    "broken link.png": Bad(lambda path: path.symlink_to("gone"), "does not exist", "link to something that is gone"),
    "loop.png": Bad(lambda path: path.symlink_to("loop.png"), "cannot be read", "check the path"),
    "device.png": Bad(lambda path: path.symlink_to("/dev/zero"), "not an ordinary file", "save it as a file first"),
}  # fmt: skip
VANISHING = "vanishing.png"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path]) -> Path:
    config = tiny(Classes(names=("cat", "dog"), category_ids=(1, 2))).detector
    return save_random(tmp_path_factory.mktemp("weights") / "tiny.safetensors", config)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """All of them, in one folder, and one below a folder with a picture's name."""
    found = tmp_path / "photos"
    (found / "folder.png").mkdir(parents=True)
    (found / "folder.png" / "inner.jpg").write_bytes(encoded("JPEG"))
    (found / "folder.png" / "round").symlink_to(found)
    (found / "notes.txt").write_text("passed over")
    for name, content, _ in GOOD:
        (found / name).write_bytes(content())
    for name, bad in BAD.items():
        bad.make(found / name)
    (found / VANISHING).write_bytes(encoded("PNG"))
    return found


@pytest.fixture
def vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture is gone between being found and being read."""
    read = detect_reading.read_image

    def reading(path: Path) -> Any:
        if path.name == VANISHING:
            path.unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(detect_reading, "read_image", reading)


@pytest.mark.usefixtures("vanish")
def test_detect_does_what_it_can(run: Callable[..., Any], weights: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run("detect", folder, "--weights", weights, "--device", "cpu", "--out", out, "--json")
    document = json.loads(stdout)
    assert code == 8
    assert "Traceback" not in stderr

    failures = {failure["file_name"]: failure["reason"] for failure in document["failures"]}
    expected = {name: bad[1:] for name, bad in BAD.items()} | {VANISHING: ("does not exist", "check the name")}
    assert failures.keys() == expected.keys()
    for name, (says, cure) in expected.items():
        assert says in failures[name], name
        assert cure in failures[name], name
        assert "\n" not in failures[name], name

    sizes = {name: size for name, _, size in GOOD} | {"folder.png/inner.jpg": (56, 40)}
    assert {p["file_name"]: (p["width"], p["height"]) for p in document["pictures"]} == sizes
    for picture in document["pictures"]:
        # A copy for each: of its size, but for what cannot be drawn on at all.
        with Image.open(picture["annotated"]) as copy:
            assert copy.size == sizes[picture["file_name"]]
    written = json.loads((out / "detections.json").read_text())
    assert {image["file_name"]: (image["width"], image["height"]) for image in written["images"]} == sizes
    assert f"{len(expected)} of {len(expected) + len(sizes)} pictures failed" in stderr


def test_the_table_has_a_line_for_each(run: Callable[..., Any], weights: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, bad in BAD.items():
        bad.make(tmp_path / "photos" / name)
    (tmp_path / "photos" / "good.png").write_bytes(encoded("PNG"))
    ended = run("detect", tmp_path / "photos", "--weights", weights, "--device", "cpu")
    assert ended.code == 8
    for name, bad in BAD.items():
        (line,) = (line for line in ended.stdout.splitlines() if f"/{name} " in line)
        assert bad.says in line
        assert bad.cure in line


@pytest.mark.skipif(IS_ROOT, reason="root may read everything")
def test_a_picture_that_may_not_be_read(run: Callable[..., Any], weights: Path, tmp_path: Path) -> None:
    _locked(tmp_path / "locked.png")
    (tmp_path / "good.png").write_bytes(encoded("PNG"))
    ended = run("detect", tmp_path, "--weights", weights, "--device", "cpu", "--json")
    assert ended.code == 8
    assert (
        "cannot be read: permission denied; change its permissions" in json.loads(ended.stdout)["failures"][0]["reason"]
    )


@pytest.mark.parametrize("name", [*BAD, VANISHING])
def test_eval_names_the_picture(run: Callable[..., Any], weights: Path, tmp_path: Path, name: str) -> None:
    """A score over a part of the pictures would be none of the data set."""
    (tmp_path / "good.png").write_bytes(encoded("PNG"))
    if name in BAD:
        BAD[name].make(tmp_path / name)
    document = {
        "images": [{"id": i, "file_name": n, "width": 56, "height": 40} for i, n in enumerate(("good.png", name))],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 20, 20]}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(document))
    out = tmp_path / "out"
    ended = run("eval", "--dataset", tmp_path / "set.json", "--weights", weights, "--device", "cpu", "--out", out)
    assert ended.code == 4
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    error, hint = (line for line in ended.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
    assert name in error
    if name == "device.png":
        assert "link out of the folder" in error
    elif name in BAD:
        assert BAD[name].says in error
        assert BAD[name].cure in hint


def test_eval_reads_every_readable_one(run: Callable[..., Any], weights: Path, tmp_path: Path) -> None:
    images = []
    for i, (name, content, (width, height)) in enumerate(GOOD, start=1):
        (tmp_path / name).write_bytes(content())
        images.append({"id": i, "file_name": name, "width": width, "height": height})
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 20, 20]}
    classes = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    document = {"images": images, "annotations": [{"id": 1, **box}], "categories": classes}
    (tmp_path / "set.json").write_text(json.dumps(document))
    ended = run("eval", "--dataset", tmp_path / "set.json", "--weights", weights, "--device", "cpu", "--json")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["command"] == "eval"
