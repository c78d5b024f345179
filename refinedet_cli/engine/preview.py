"""The first training samples of a run on one sheet: what the network gets to see, and what was done to make it."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from refinedet_cli.core.config import AugmentConfig, Classes, DetectorConfig, PreprocessConfig, TrainConfig
from refinedet_cli.core.structures import Target
from refinedet_cli.core.words import counted
from refinedet_cli.data.augment import View, distort_colours, draw_view
from refinedet_cli.data.dataset import Dataset, Record
from refinedet_cli.data.files import write_whole
from refinedet_cli.data.loading import Draw, TrainingSet
from refinedet_cli.data.sampling import repeat_factors
from refinedet_cli.engine.draw import Canvas, Mark, class_colour, draw_boxes, font_for, tag_name
from refinedet_cli.engine.recipe import make_plan
from refinedet_cli.errors import UsageError

SAMPLES = 16
# File name endings, and what Pillow calls the format.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

_COLUMNS = 4
# Inputs narrower than this are enlarged, so that their tags can be read; px.
_NARROWEST = 448
_GAP, _LINE, _TITLE = 16, 21, 30
_PAPER, _INK, _FAINT = (255, 255, 255), (25, 25, 25), (105, 105, 105)
_MOST_CLASSES = 24
# A grey and a green, to see what a change of colours does; green, for at red the hue is cut off.
_PROBE = np.array([[[128, 128, 128], [100, 200, 100]]], dtype=np.uint8)


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        file_names: of the picture, or of the four of a mosaic.
        done: what was done to it, in words.
        epoch: pass over the data, from 1.
        input_size: height and width, px-in.
        objects: that the network is to find in it.
        smallest: width and height of the object with the shortest side, px-in; None where there is no object.
    """

    file_names: tuple[str, ...]
    done: str
    epoch: int
    input_size: tuple[int, int]
    objects: int
    smallest: tuple[float, float] | None


class Preview(NamedTuple):
    """The samples, and the sheet that shows them."""

    samples: tuple[Sample, ...]
    sheet: Image.Image


def make_preview(data: Dataset, detector: DetectorConfig, config: TrainConfig, count: int = SAMPLES) -> Preview:
    """Make the first samples of a run, exactly as the run will, and draw them.

    Args:
        data: training pictures.
        detector: the input size and normalisation, and the classes.
        config: the recipe.
        count: samples to show; a shorter run has fewer.

    Raises:
        DataError: a picture cannot be read.
    """
    weights = repeat_factors(data, config.balance) if config.balance else None
    samples = _Watched(data, config.augment, config.seed, weights)
    plan = make_plan(len(data.records), detector.preprocess, config, weights)
    made = [samples.make(draw) for draw in islice(chain.from_iterable(plan.batches(0)), count)]
    labels = sorted({int(label) for one in made for label in one.target.labels})
    times = {_time(one.sample) for one in made}
    title = (
        f"{data.name}: the first {len(made)} of {plan.steps * plan.batch:,} training samples, as the network sees them"
    )
    heading = "; ".join([title, *(times if len(times) == 1 else ())])
    legend = [(tag_name(data.classes, label), class_colour(label)) for label in labels]
    cells = [_Cell(_draw(one, data.classes), _lines(one.sample, with_time=len(times) > 1)) for one in made]
    return Preview(tuple(one.sample for one in made), _lay_out(heading, legend, cells))


def check_name(path: Path) -> None:
    """Refuse a name that no sheet can be written to.

    Raises:
        UsageError: it ends in no known format, or is a folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--preview {path} is no name of a picture", f"let it end in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(f"--preview {path} is a folder", "name a file in it")


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet in the format that its name asks for.

    Raises:
        DataError: it cannot be written.
    """
    content = BytesIO()
    sheet.save(content, FORMATS[path.suffix.lower()], quality=92)
    write_whole(path, content.getvalue())


# --- samples


class _Made(NamedTuple):
    """A sample: what to say of it, its pixels uint8[height, width, 3], RGB, and its objects."""

    sample: Sample
    pixels: Canvas
    target: Target


class _Seen(NamedTuple):
    """A picture that went into a sample, and what was done to it."""

    record: Record
    view: View
    colours: tuple[str, ...]


class _Watched(TrainingSet):
    """Makes the samples of a run, and takes down how.

    What is drawn for a picture is drawn once more from a twin of the generator, which leaves the sample as it is.
    """

    _seen: list[_Seen]

    def make(self, draw: Draw) -> _Made:
        self._seen = []
        pixels, target, _ = self[draw]
        size = draw.preprocess.height, draw.preprocess.width
        sides = (target.boxes[:, 2:] - target.boxes[:, :2]) * torch.tensor([size[1], size[0]])
        smallest = None if not len(sides) else tuple(sides[sides.amin(dim=1).argmin()].tolist())
        names = tuple(seen.record.file_name for seen in self._seen)
        sample = Sample(names, _in_words(self._seen), draw.epoch + 1, size, len(sides), smallest)
        return _Made(sample, to_pixels(pixels, draw.preprocess), target)

    def _begin(self, record: Record, augment: AugmentConfig, generator: np.random.Generator) -> None:
        twin = np.random.default_rng()
        twin.bit_generator.state = generator.bit_generator.state
        view = draw_view(record.height, record.width, record.boxes[~record.crowd], augment, twin)
        self._seen.append(_Seen(record, view, _colour_words(distort_colours(_PROBE, augment, twin))))


def to_pixels(planes: Tensor, config: PreprocessConfig) -> Canvas:
    """Undo the normalisation of network input.

    Args:
        planes: float32[3, height, width].
        config: mean, std and channel order that it was made with.

    Returns:
        uint8[height, width, 3], RGB.
    """
    ordered = planes.flip(0) if config.channel_order == "bgr" else planes
    values = ordered * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]
    pixels: Canvas = values.round().clamp(0, 255).byte().movedim(0, -1).contiguous().numpy()
    return pixels


def _in_words(seen: Sequence[_Seen]) -> str:
    if len(seen) > 1:
        return f"mosaic of {len(seen)}, each cropped and changed on its own"
    return ", ".join(chain.from_iterable(_view_words(one) + one.colours for one in seen))


def _view_words(seen: _Seen) -> tuple[str, ...]:
    """Tell which part of a picture is shown, and whether it is flipped."""
    record, window = seen.record, seen.view.window
    mirrored = ("mirrored",) if seen.view.mirror else ()
    inside = max(0, min(window.right, record.width) - max(window.left, 0)) * max(
        0, min(window.bottom, record.height) - max(window.top, 0)
    )
    area = (window.right - window.left) * (window.bottom - window.top)
    shown = inside / (record.width * record.height)
    if window == (0, 0, record.width, record.height):
        return "whole picture", *mirrored
    if shown == 1:
        return f"shrunk to {round(100 * record.width / (window.right - window.left))} %", *mirrored
    beside = " with canvas beside it" if inside < area else ""
    return f"crop of {max(1, round(100 * shown))} %{beside}", *mirrored


def _colour_words(probe: np.ndarray) -> tuple[str, ...]:
    """Tell what became of the colours of `_PROBE`; changes that nobody would see are passed over."""
    grey, green = probe[0, 0].mean() - 128, colorsys.rgb_to_hsv(*(probe[0, 1] / 255))
    words = []
    if abs(grey) >= 6:
        words.append("lighter" if grey > 0 else "darker")
    if not 0.85 < green[1] / 0.5 < 1.15:
        words.append("stronger colours" if green[1] > 0.5 else "paler colours")
    turn = round(360 * green[0] - 120)
    if abs(turn) >= 3:
        words.append(f"hue {turn:+d}")
    return tuple(words)


# --- the sheet


class _Cell(NamedTuple):
    """A drawn sample with the lines below it."""

    image: Image.Image
    lines: tuple[str, ...]


def _draw(made: _Made, classes: Classes) -> Image.Image:
    """Enlarge a sample if it is small, and draw its boxes."""
    height, width = made.pixels.shape[:2]
    scale = max(1.0, _NARROWEST / width)
    image = Image.fromarray(made.pixels)
    if scale > 1:
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    canvas = np.array(image)
    boxes = made.target.boxes.double().numpy() * np.array([image.width, image.height] * 2)
    labels = made.target.labels.numpy()
    marks = [
        Mark(boxes[i].tolist(), class_colour(int(labels[i])), (tag_name(classes, int(labels[i])), ""))
        for i in _by_importance(boxes, labels)
    ]
    draw_boxes(canvas, marks, line=2.0, letters=13.0)
    return Image.fromarray(canvas)


def _by_importance(boxes: np.ndarray, labels: np.ndarray) -> list[int]:
    """Order boxes so that the largest of each class come first, then the second largest: all classes get a tag."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order = np.argsort(-areas, kind="stable")
    turn = np.array([int((labels[order[:k]] == labels[i]).sum()) for k, i in enumerate(order)], dtype=np.int64)
    return [int(i) for i in order[np.argsort(turn, kind="stable")]]


def _lines(sample: Sample, *, with_time: bool) -> tuple[str, ...]:
    """Name the pictures, what was done to them, and what is to be found; in three lines."""
    facts = "no object"
    if sample.smallest is not None:
        which = "," if sample.objects == 1 else ", the smallest"
        facts = f"{counted(sample.objects, 'object')}{which} {_size(sample.smallest)} px"
    if with_time:
        facts += f"; {_time(sample)}"
    if len(sample.file_names) == 1:
        return sample.file_names[0], sample.done, facts
    names = [Path(name).name for name in sample.file_names]
    half = len(names) // 2
    return f"{', '.join(names[:half])},", ", ".join(names[half:]), f"mosaic; {facts}"


def _time(sample: Sample) -> str:
    height, width = sample.input_size
    return f"input {width} x {height}, epoch {sample.epoch}"


def _size(sides: tuple[float, float]) -> str:
    return " x ".join(f"{side:.0f}" if side >= 10 else f"{side:.1f}" for side in sides)


def _lay_out(title: str, legend: Sequence[tuple[str, tuple[int, int, int]]], cells: Sequence[_Cell]) -> Image.Image:
    """Put the cells in rows on one page, below a title and the colours of the classes."""
    columns = min(_COLUMNS, len(cells))
    cell_width = max(cell.image.width for cell in cells)
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.image.height for cell in row) for row in rows]
    width = max(columns * (cell_width + _GAP) + _GAP, 2 * _NARROWEST)
    entries = list(_place_legend(legend, width))
    top = _GAP + _TITLE + (entries[-1].top + _LINE if entries else 0) + _GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + len(rows) * (3 * _LINE + 2 * _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_GAP, _GAP), title, 20, _INK, width - 2 * _GAP)
    for entry in entries:
        left, down = entry.left, _GAP + _TITLE + entry.top
        if entry.colour is not None:
            pen.rectangle((left, down + 3, left + 11, down + 14), entry.colour)
        _write(pen, (left + 18, down), entry.name, 14, _INK, width - left - 18 - _GAP)
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = _GAP + column * (cell_width + _GAP)
            sheet.paste(cell.image, (left, top))
            for i, line in enumerate(cell.lines):
                down = top + cell.image.height + 5 + i * _LINE
                _write(pen, (left, down), line, 15, _FAINT if i else _INK, cell_width)
        top += height + 3 * _LINE + 2 * _GAP
    return sheet


class _Entry(NamedTuple):
    """A class in the legend, and where: left of the sheet, below the title; without a colour it is a remark."""

    name: str
    colour: tuple[int, int, int] | None
    left: int
    top: int


def _place_legend(legend: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> Iterator[_Entry]:
    shown: list[tuple[str, tuple[int, int, int] | None]] = list(legend[:_MOST_CLASSES])
    if len(legend) > _MOST_CLASSES:
        shown.append((f"and {len(legend) - _MOST_CLASSES:,} more classes", None))
    left, top = _GAP, 0
    for name, colour in shown:
        needed = 18 + round(font_for(name, 14).getlength(name)) + 24
        if left > _GAP and left + needed > width:
            left, top = _GAP, top + _LINE
        yield _Entry(name, colour, left, top)
        left += needed


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int
) -> None:
    """Write a line, cut to the room there is."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    font = font_for(text, size)
    shown = text
    while len(text) > 1 and font.getlength(shown) > room:
        text = text[:-1]
        shown = f"{text}…"
    pen.text(place, shown, colour, font)
