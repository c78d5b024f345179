"""Pictures of what a check found: the worst of each kind with the boxes that are meant, and a sheet of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from refinedet_cli.data.check import KINDS, OUT_OF_REACH, SEVERITIES, Box, Finding, Kind
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.images import read_image
from refinedet_cli.engine.draw import Canvas, Colour, Mark, built_in_font, class_colour, draw_boxes
from refinedet_cli.errors import DataError

SHEET_NAME = "worst.jpg"
PICTURES_NAME = "worst"

_OF_EACH_KIND, _MOST = 3, 24
_MOST_TAGS = 12
# Longer sides of a drawn picture, px: small ones are enlarged so that tags can be read.
_SMALLEST, _LARGEST = 640, 1600
# As much of a picture's side is shown beside it, for boxes that reach out.
_BESIDE = 0.25
_BACKGROUND, _PAPER, _INK = (120, 124, 130), (255, 255, 255), (30, 30, 30)
_CELL, _COLUMNS, _GAP, _LINE = 360, 4, 12, 18


class Drawn(NamedTuple):
    """One drawn picture: a name for its file, two lines that explain it, and itself."""

    name: str
    title: str
    place: str
    image: Image.Image


def write_worst(out: Path, findings: Sequence[Finding]) -> list[Path]:
    """Draw the pictures with the most findings of each kind, and a sheet of them.

    Args:
        out: the folder to write to.
        findings: all of them. What needs no picture to be understood is passed over, and pictures that cannot be read.

    Returns:
        the files, the sheet first; none where there is nothing to draw.
    """
    drawn = list(draw_worst(findings))
    if not drawn:
        return []
    sheet = out / SHEET_NAME
    write_whole(sheet, _as_jpeg(make_sheet(drawn)))
    files = [sheet]
    for one in drawn:
        files.append(out / PICTURES_NAME / f"{one.name}.jpg")
        write_whole(files[-1], _as_jpeg(one.image))
    return files


def draw_worst(findings: Sequence[Finding]) -> Iterator[Drawn]:
    """Draw pictures, those of severe kinds first."""
    drawable = [f for f in findings if f.picture is not None and (f.kind.severity != "note" or f.kind == OUT_OF_REACH)]
    of_picture: dict[Path, list[Finding]] = {}
    counts: dict[Kind, Counter[Path]] = {}
    for finding in drawable:
        if finding.picture is not None:
            of_picture.setdefault(finding.picture, []).append(finding)
            counts.setdefault(finding.kind, Counter())[finding.picture] += 1
    drawn: list[Path] = []
    for kind in sorted(counts, key=lambda kind: (SEVERITIES.index(kind.severity), KINDS.index(kind))):
        number = 0
        for picture, count in counts[kind].most_common(2 * _OF_EACH_KIND):
            if number == _OF_EACH_KIND or len(drawn) == _MOST:
                break
            if number and picture in drawn:  # Its boxes of this kind were shown with it.
                continue
            image = _draw(picture, kind, of_picture[picture])
            if image is None:
                continue
            number += 1
            drawn.append(picture)
            first = next(f for f in of_picture[picture] if f.kind == kind)
            title = kind.title if count == 1 else f"{kind.title}: {count:,}"
            place = first.detail if first.box is None and first.detail else picture.name
            yield Drawn(f"{kind.name}-{number}", title, place, image)


def make_sheet(drawn: Sequence[Drawn]) -> Image.Image:
    """Lay out small copies on one page, each with its two lines below."""
    columns = min(_COLUMNS, len(drawn))
    small = [one.image.copy() for one in drawn]
    for image in small:
        image.thumbnail((_CELL, _CELL))
    heights = [max(image.height for image in small[i : i + columns]) for i in range(0, len(small), columns)]
    size = (columns * (_CELL + _GAP) + _GAP, sum(heights) + len(heights) * (2 * _LINE + 3 * _GAP) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    pen, font, top = ImageDraw.Draw(sheet), built_in_font(14), _GAP
    for row, height in enumerate(heights):
        for column in range(min(columns, len(drawn) - row * columns)):
            one, image = drawn[row * columns + column], small[row * columns + column]
            left = _GAP + column * (_CELL + _GAP)
            sheet.paste(image, (left + (_CELL - image.width) // 2, top + height - image.height))
            for line, text in enumerate((one.title, one.place)):
                pen.text((left, top + height + 4 + line * _LINE), _fit(text, pen, font), _INK, font)
        top += height + 2 * _LINE + 3 * _GAP
    return sheet


def _fit(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """Cut a line to the width of a cell."""
    shown = text
    while len(text) > 1 and pen.textlength(shown, font) > _CELL:
        text = text[:-1]
        shown = f"{text}…"
    return shown


def _draw(picture: Path, kind: Kind, findings: Sequence[Finding]) -> Image.Image | None:
    """A picture with the boxes of all its findings, those of one kind on top; None where it cannot be read."""
    try:
        pixels = read_image(picture)
    except DataError:
        return None
    ordered = sorted((f for f in findings if f.box is not None), key=lambda f: f.kind != kind)
    boxes = np.array([_upright(f.box) for f in ordered if f.box is not None], dtype=np.float64).reshape(-1, 4)
    canvas, boxes = _frame(pixels, boxes)
    # What no anchor reaches is small and often many: tags would hide all of it.
    crowded = len(ordered) > _MOST_TAGS
    marks = [
        Mark(box, _colour(f.kind), None if crowded and f.kind == OUT_OF_REACH else (_short(f.kind), _entry(f)))
        for f, box in zip(ordered, boxes.tolist(), strict=True)
    ]
    side = max(canvas.shape)
    draw_boxes(canvas, marks, line=max(2.0, 0.004 * side), letters=max(13.0, 0.018 * side))
    return Image.fromarray(canvas)


def _frame(pixels: Canvas, boxes: np.ndarray) -> tuple[Canvas, np.ndarray]:
    """Scale a picture to be looked at, and put as much ground around it as boxes that reach out need."""
    height, width = pixels.shape[:2]
    scale = min(max(1.0, _SMALLEST / max(height, width)), _LARGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    scaled = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    most = _BESIDE * np.array([size[0], size[1]] * 2)
    boxes = boxes * np.array([size[0] / width, size[1] / height] * 2)
    edges = np.array([0, 0, *size], dtype=np.float64)
    beyond = np.concatenate([edges[:2] - boxes[:, :2], boxes[:, 2:] - edges[2:]], axis=1).max(axis=0, initial=0.0)
    left, top, right, bottom = (int(np.ceil(v)) for v in np.minimum(np.where(beyond > 1, beyond + 8, 0), most))
    canvas = np.full((size[1] + top + bottom, size[0] + left + right, 3), _BACKGROUND, dtype=np.uint8)
    canvas[top : top + size[1], left : left + size[0]] = scaled
    limit = np.array([canvas.shape[1], canvas.shape[0]] * 2, dtype=np.float64)
    return canvas, np.clip(boxes + np.array([left, top, left, top]), 0, limit)


def _upright(box: Box) -> Box:
    left, top, right, bottom = box
    return min(left, right), min(top, bottom), max(left, right), max(top, bottom)


def _colour(kind: Kind) -> Colour:
    return class_colour(KINDS.index(kind) + 1)


def _short(kind: Kind) -> str:
    return kind.name.removeprefix("box-").replace("-", " ")


def _entry(finding: Finding) -> str:
    """The shortest that tells the entry: its id where it has one."""
    return finding.where.partition(" (")[2].removesuffix(")") or finding.where


def _as_jpeg(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "JPEG", quality=88)
    return content.getvalue()
