"""Detections drawn onto pictures: antialiased boxes, and name tags that keep out of each other's way.

Lines and letters grow with the picture, so that 100 pixels and 8,000 are equally readable. Boxes are blended in narrow
strips of the picture, never in a copy at a higher resolution, so that a large picture costs little more than its bytes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from refinedet_cli.core.config import Classes
from refinedet_cli.core.structures import Detections
from refinedet_cli.errors import RefineDetError

# The first twenty are as far apart as could be found, by CIEDE2000 for normal eyes and in OKLab for red-blind and
# green-blind ones, among colours vivid and light enough to stand out from a photograph; among these, and among those
# that follow, each is the one farthest from all before it.
_PALETTE = bytes.fromhex(
    "ff6622 77ffee 7700ff eeee00 aaaaff ff0099 aa4444 ffbb44 4466cc aa2299 9977bb 0099ff 44aa44 55ddff ccee99 008877 "
    "ff88cc 44dd99 dd8888 aa6600 ee44ee 33bbbb ffaa77 7788dd dd3366 bb6699 bb11dd ff7766 ee2200 ffdd66 ccaa33 66dd22 "
    "88ffcc 66aa77 bb3311 66dddd 00ccaa 6655ee 00bbdd cc5544 88cc77 ffbbee 448855 0077bb cc8844 00ff77 ee6699 ff88ff "
    "bb5577 bb44aa bb77ff 999900 77ddbb bb2266 ee99aa dd5566 cc77bb 00eeff 8877ee dd55aa bbbb55 00bb66 aa4488 9966cc "
    "ffaa99 ee11bb 7766aa ddcc66 66ffaa bb44ff dd99dd 33eecc aa5533 bb77cc 3399cc ff7799 ff66ee cc1199 dd4488 6699dd"
)

# Fonts for names beyond ASCII, by the file names under which systems ship them; the first that has all letters is used.
_WIDE_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "DroidSansFallbackFull.ttf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "AppleSDGothicNeo.ttc",
    "msyh.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "Nirmala.ttf",
)
_UNASSIGNED = "\U0010fffd"  # no font has a glyph for it, so it draws as the font's sign for a missing one
_BUILT_IN = ""
_FINER = 4  # letters are drawn this much larger and then reduced, which spaces small ones evenly

_HALO_OPACITY = 0.45
_TAG_OPACITY = 0.94
_SMALLEST_FONT = 9
_MOST_COVERED = 0.25  # of the picture, by tags

Colour = tuple[int, int, int]
Canvas = NDArray[np.uint8]


class Mark(NamedTuple):
    """A box to draw.

    Attributes:
        box: xyxy, px-img.
        colour: of its line and of the plate of its tag.
        tag: a name, which is cut where room is short, and what follows it in full, if anything; None for a box without
            a tag.
    """

    box: Sequence[float]
    colour: Colour
    tag: tuple[str, str] | None


class _Rect(NamedTuple):
    """Left, top, right, bottom; px-img."""

    left: float
    top: float
    right: float
    bottom: float


class _Outline(NamedTuple):
    """The line around a box: where its middle runs, and its width."""

    middle: _Rect
    width: int


class _Wanted(NamedTuple):
    """What a tag is to say, and the line it belongs to."""

    name: str
    score: str
    outline: _Outline


@dataclass(frozen=True)
class _Tag:
    """A name tag: its text in one size, and where its plate goes (left, top; px-img)."""

    text: str
    font: ImageFont.FreeTypeFont
    left: int
    top: int
    width: int
    height: int
    baseline: int
    indent: int


def draw_detections(image: Canvas, detections: Detections, classes: Classes) -> Image.Image:
    """Draw boxes with name and score onto a copy of a picture.

    Args:
        image: uint8[H, W, 3], RGB; it is not written to.
        detections: N boxes, xyxy, px-img; N may be 0.
        classes: the names that belong to the labels.

    Returns:
        A picture of the same size. The best boxes and tags lie on top. Tags stay inside the picture, and off each other
        where there is room; in a crowd that would disappear beneath its tags, the lowest scored boxes go without one.

    Raises:
        ValueError: the picture is not uint8[H, W, 3], or a label has no class.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"expected a picture uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
    labels = [int(label) for label in detections.labels]
    if labels and not 1 <= min(labels) <= max(labels) <= len(classes):
        raise ValueError(f"expected labels in 1..{len(classes)}, got {min(labels)}..{max(labels)}")
    canvas = np.array(image, order="C")
    side = math.sqrt(canvas.shape[0] * canvas.shape[1])
    line = max(2.0, 0.6 + 0.0033 * side)
    font_size = max(10.0, 4.5 + 0.016 * side)

    boxes = detections.boxes.detach().cpu().double().tolist()
    scores = [float(score) for score in detections.scores]
    marks = [
        Mark(boxes[i], class_colour(labels[i]), (tag_name(classes, labels[i]), f"{scores[i]:.2f}"))
        for i in sorted(range(len(scores)), key=lambda i: -scores[i])
    ]
    draw_boxes(canvas, marks, line=line, letters=font_size)
    return Image.fromarray(canvas)


def draw_boxes(canvas: Canvas, marks: Sequence[Mark], *, line: float, letters: float) -> None:
    """Draw boxes with their tags into a picture.

    Args:
        canvas: uint8[H, W, 3], RGB; it is written to.
        marks: the most important first, which lies on top; in a crowd, the last go without their tags.
        line: width of the lines, px-img; thinner around small boxes.
        letters: size of the font, px-img; smaller in a crowd.
    """
    outlines = [_fit_outline(_Rect(*mark.box), line, canvas) for mark in marks]
    tagged = [
        (mark.colour, _Wanted(*mark.tag, outline)) for mark, outline in zip(marks, outlines, strict=True) if mark.tag
    ]
    tags = _place_tags([wanted for _, wanted in tagged], letters, canvas)
    for mark, outline in reversed(list(zip(marks, outlines, strict=True))):
        _draw_outline(canvas, outline, mark.colour)
    for (colour, _), tag in reversed(list(zip(tagged, tags, strict=False))):
        _draw_tag(canvas, tag, colour)


def class_colour(label: int) -> Colour:
    """The colour of a class: the same in every picture, and distinct from that of its neighbours in the list.

    Args:
        label: in 1..C-1; colours come again after 80 classes.

    Returns:
        Red, green, blue in 0..255.
    """
    start = 3 * (label - 1) % len(_PALETTE)
    red, green, blue = _PALETTE[start : start + 3]
    return red, green, blue


def text_colour(plate: Colour) -> Colour:
    """Black or white, whichever contrasts more with a plate of this colour (WCAG 2 contrast ratio)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in plate)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    black_wins = (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05)
    return (0, 0, 0) if black_wins else (255, 255, 255)


def undrawable_names(classes: Classes) -> tuple[str, ...]:
    """The class names that no font here has letters for; their tags show ``#`` and the category id instead."""
    return tuple(name for name in classes.names if _font_file(_one_line(name)) is None)


def built_in_font(size: int) -> ImageFont.FreeTypeFont:
    """Load Pillow's own font, which is the same on every machine and has ASCII letters and little more.

    Args:
        size: px.

    Raises:
        RefineDetError: Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RefineDetError(
            "this build of Pillow has no FreeType, which draws the letters", "install Pillow from PyPI, or do not draw"
        )
    return font


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Load the first font here that has every letter of a text; Pillow's own where none has.

    Args:
        text: to be drawn.
        size: px.
    """
    return _font(_font_file(text) or _BUILT_IN, size) or built_in_font(size)


def _one_line(name: str) -> str:
    """The name without line breaks, tabs and control characters, which have no glyph."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def tag_name(classes: Classes, label: int) -> str:
    """The name of a class as a tag shows it: on one line, or its category id where no font here has its letters."""
    name = _one_line(classes.names[label - 1])
    return f"#{classes.category_ids[label - 1]}" if _font_file(name) is None else name


# --- fonts


@lru_cache(maxsize=256)
def _font_file(text: str) -> str | None:
    """The first font that has every letter of the text: a file, `_BUILT_IN`, or None."""
    for file in (_BUILT_IN, *_wide_font_files()):
        font = _font(file, 16)
        if font is not None and _covers(font, text):
            return file
    return None


def _wide_font_files() -> Iterator[str]:
    # matplotlib carries DejaVu Sans, so that Latin, Greek, Cyrillic, Arabic and Hebrew look the same on every machine.
    # It is found without importing matplotlib, which takes long and writes a font list to the home folder.
    package = importlib.util.find_spec("matplotlib")
    if package is not None and package.origin is not None:
        yield str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    yield from _WIDE_FONTS


@lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont | None:
    if file == _BUILT_IN:
        return built_in_font(size)
    try:
        return ImageFont.truetype(file, size)
    except OSError:
        return None


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = _glyph(font, _UNASSIGNED)
    return all(_glyph(font, letter) != missing for letter in set(text) if not letter.isspace())


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


# --- boxes


def _fit_outline(box: _Rect, line: float, canvas: Canvas) -> _Outline:
    """Choose the middle of the line around a box so that its whole width lies in the picture, on whole pixels.

    The line is thinner for small boxes, so that what is inside can still be seen.
    """
    smaller = min(box.right - box.left, box.bottom - box.top)
    width = max(1, round(min(line, max(0.12 * smaller, 0.4 * line))))
    rows, columns = canvas.shape[:2]

    def snap(middle: float, length: int) -> float:
        return min(max(round(middle - width / 2), 0), max(0, length - width)) + width / 2

    left, right = snap(box.left, columns), snap(box.right, columns)
    top, bottom = snap(box.top, rows), snap(box.bottom, rows)
    return _Outline(_Rect(left, top, max(left, right), max(top, bottom)), width)


def _draw_outline(canvas: Canvas, outline: _Outline, colour: Colour) -> None:
    # A dark rim sets the line off from a background of the same colour.
    rim = max(0.5, 0.3 * outline.width)
    radius = 1.5 * outline.width
    _stroke(canvas, outline.middle, outline.width + 2 * rim, (0, 0, 0), _HALO_OPACITY, radius)
    _stroke(canvas, outline.middle, outline.width, colour, 1.0, radius)


def _stroke(canvas: Canvas, box: _Rect, width: float, colour: Colour, opacity: float, radius: float) -> None:
    """Blend the outline of a rounded rectangle, touching only the strips along its edges."""
    reach = width / 2 + 1
    left, top = math.floor(box.left - reach), math.floor(box.top - reach)
    right, bottom = math.ceil(box.right + reach), math.ceil(box.bottom + reach)
    depth = math.ceil(2 * reach + radius) + 1
    upper, lower = min(top + depth, bottom), max(top + depth, bottom - depth)
    inner, outer = min(left + depth, right), max(left + depth, right - depth)
    strips = (
        (left, top, right, upper),
        (left, min(lower, bottom), right, bottom),
        (left, upper, inner, min(lower, bottom)),
        (min(outer, right), upper, right, min(lower, bottom)),
    )
    for strip in strips:
        window = _clip(strip, canvas)
        if window is not None:
            distance = _distance(window, box, radius)
            _blend(canvas, window, colour, opacity * np.clip(width / 2 + 0.5 - np.abs(distance), 0, 1))


def _fill(canvas: Canvas, box: _Rect, colour: Colour, opacity: float, radius: float) -> None:
    """Blend a filled rounded rectangle."""
    window = _clip((math.floor(box.left), math.floor(box.top), math.ceil(box.right), math.ceil(box.bottom)), canvas)
    if window is not None:
        _blend(canvas, window, colour, opacity * np.clip(0.5 - _distance(window, box, radius), 0, 1))


def _clip(window: tuple[int, int, int, int], canvas: Canvas) -> tuple[int, int, int, int] | None:
    left, top, right, bottom = window
    height, width = canvas.shape[:2]
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _distance(window: tuple[int, int, int, int], box: _Rect, radius: float) -> NDArray[np.float32]:
    """Distance of each pixel centre of the window to the edge of a rounded rectangle, negative inside."""
    left, top, right, bottom = window
    half_width, half_height = (box.right - box.left) / 2, (box.bottom - box.top) / 2
    radius = min(radius, half_width, half_height)
    x = np.arange(left, right, dtype=np.float32) + 0.5 - (box.left + box.right) / 2
    y = np.arange(top, bottom, dtype=np.float32) + 0.5 - (box.top + box.bottom) / 2
    beside = (np.abs(x) - (half_width - radius)).astype(np.float32)[None, :]
    above = (np.abs(y) - (half_height - radius)).astype(np.float32)[:, None]
    corner = np.hypot(np.maximum(beside, 0), np.maximum(above, 0))
    distance: NDArray[np.float32] = corner + np.minimum(np.maximum(beside, above), 0) - np.float32(radius)
    return distance


def _blend(canvas: Canvas, window: tuple[int, int, int, int], colour: Colour, coverage: NDArray[np.floating]) -> None:
    """Mix a colour into a window of the canvas; coverage is float[h, w] in 0..1."""
    left, top, right, bottom = window
    region = canvas[top:bottom, left:right]
    weight = coverage.astype(np.float32)[:, :, None]
    mixed = region + weight * (np.array(colour, dtype=np.float32) - region)
    canvas[top:bottom, left:right] = np.rint(mixed).astype(np.uint8)


# --- tags


def _place_tags(wanted: list[_Wanted], font_size: float, canvas: Canvas) -> list[_Tag]:
    """Find a place for each tag, in the order given; the first have the free choice, and the last may get none."""
    height, width = canvas.shape[:2]
    room = _MOST_COVERED * height * width
    demand = sum(tag.width * tag.height for tag in (_make_tag(w, round(font_size), width) for w in wanted))
    font_size *= min(1.0, max(0.7, math.sqrt(0.5 * room / max(1, demand))))
    boxes = np.array([one.outline.middle for one in wanted], dtype=np.float64).reshape(-1, 4)
    placed = np.zeros((0, 4))
    tags: list[_Tag] = []
    for one in wanted:
        choice: tuple[float, _Tag] | None = None
        for shrink in (1.0, 0.85, 0.7):
            tag = _make_tag(one, max(_SMALLEST_FONT, round(shrink * font_size)), width)
            places = _places(tag, one.outline, width, height)
            clash, cost = _costs(places, boxes, placed)
            best = int(np.argmin(cost))
            if choice is None or clash[best] < choice[0]:
                choice = float(clash[best]), _at(tag, places[best])
            if choice[0] == 0:
                break
        if choice is not None:
            tag = choice[1]
            tags.append(tag)
            edge = [tag.left, tag.top, tag.left + tag.width, tag.top + tag.height]
            placed = np.concatenate([placed, np.array([edge], dtype=np.float64)])
            room -= tag.width * tag.height
            if room < 0:
                break
    return tags


def _make_tag(wanted: _Wanted, size: int, picture_width: int) -> _Tag:
    """Measure a tag; a name that would cross most of the picture is cut."""
    font = font_for(wanted.name, _FINER * size)
    indent = max(2, round(0.32 * size))
    room = _FINER * max(1, min(picture_width, max(0.5 * picture_width, 12 * size)) - 2 * indent)
    text = f"{wanted.name} {wanted.score}".rstrip()
    if font.getbbox(text)[2] > room:
        text = _shorten(wanted, font, room)
    capital = font.getbbox("H", anchor="ls")
    height = round(1.45 * size)
    return _Tag(
        text=text,
        font=font,
        left=0,
        top=0,
        width=math.ceil(font.getbbox(text)[2] / _FINER) + 2 * indent,
        height=height,
        baseline=round((height - capital[1] / _FINER) / 2),
        indent=indent,
    )


def _shorten(wanted: _Wanted, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Cut the name, not the score, until the text fits; a very narrow picture shows the score alone."""
    for length in range(len(wanted.name) - 1, 0, -1):
        shorter = f"{wanted.name[:length].rstrip()}… {wanted.score}".rstrip()
        if font.getbbox(shorter)[2] <= room:
            return shorter
    return wanted.score


def _at(tag: _Tag, place: NDArray[np.float64]) -> _Tag:
    return _Tag(tag.text, tag.font, int(place[0]), int(place[1]), tag.width, tag.height, tag.baseline, tag.indent)


def _places(tag: _Tag, outline: _Outline, width: int, height: int) -> NDArray[np.float64]:
    """Where a tag may go, best first: float64[P, 4], xyxy, px-img, moved into the picture."""
    box, half_line = outline.middle, outline.width / 2
    left, right = math.floor(box.left - half_line), math.ceil(box.right + half_line)
    top, bottom = math.floor(box.top - half_line), math.ceil(box.bottom + half_line)
    along = [left, right - tag.width, (left + right - tag.width) // 2]
    inside_top, inside_bottom = math.floor(box.top + half_line), math.ceil(box.bottom - half_line) - tag.height
    inside = [math.floor(box.left + half_line), math.ceil(box.right - half_line) - tag.width]
    corners = [
        *((x, top - tag.height) for x in along[:2]),
        *((x, inside_top) for x in inside),
        *((x, bottom) for x in along[:2]),
        *((x, inside_bottom) for x in inside),
        *((x, y) for y in (top, bottom - tag.height) for x in (right, left - tag.width)),
        (along[2], top - tag.height),
        (along[2], bottom),
        *((inside[0], inside_top + k * tag.height) for k in (1, 2, 3)),
        *((along[0], top - k * tag.height) for k in (2, 3)),
        *((along[0], bottom + k * tag.height) for k in (1, 2)),
    ]
    places = np.array(corners, dtype=np.float64)
    places[:, 0] = places[:, 0].clip(0, max(0, width - tag.width))
    places[:, 1] = places[:, 1].clip(0, max(0, height - tag.height))
    return np.concatenate([places, places + np.array([tag.width, tag.height])], axis=1)


class _Costs(NamedTuple):
    """How bad each place is: the part of the tag that lies on other tags, and the whole cost; float64[P]."""

    clash: NDArray[np.float64]
    cost: NDArray[np.float64]


def _costs(places: NDArray[np.float64], boxes: NDArray[np.float64], placed: NDArray[np.float64]) -> _Costs:
    area = (places[0, 2] - places[0, 0]) * (places[0, 3] - places[0, 1])
    clash = _common_area(places, placed).sum(axis=1) / area
    # Hiding a small object is bad, hiding a bit of a large one is not.
    sizes = np.maximum(1, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    hidden = np.minimum(1, _common_area(places, boxes) / sizes).sum(axis=1)
    return _Costs(clash, 20 * clash + 2 * hidden + 0.03 * np.arange(len(places)))


def _common_area(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area that boxes share: float64[len(a), len(b)]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common: NDArray[np.float64] = np.clip(high - low, 0, None).prod(axis=2)
    return common


def _draw_tag(canvas: Canvas, tag: _Tag, colour: Colour) -> None:
    plate = _Rect(tag.left, tag.top, tag.left + tag.width, tag.top + tag.height)
    _fill(canvas, plate, colour, _TAG_OPACITY, radius=0.15 * tag.height)
    letters = Image.new("L", (_FINER * tag.width, _FINER * tag.height))
    origin = (_FINER * tag.indent, _FINER * tag.baseline)
    ImageDraw.Draw(letters).text(origin, tag.text, fill=255, font=tag.font, anchor="ls")
    letters = letters.reduce(_FINER)
    window = _clip((tag.left, tag.top, tag.left + tag.width, tag.top + tag.height), canvas)
    if window is not None:
        coverage = np.asarray(letters, dtype=np.float32)[: window[3] - window[1], : window[2] - window[0]] / 255
        _blend(canvas, window, text_colour(colour), coverage)
