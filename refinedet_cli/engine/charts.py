"""What all charts have in common: paper, ink, axes, keys, and the way to PNG.

The colours are told apart by red-blind and green-blind eyes; charts give lines different styles as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

DPI = 120
_FONT = "DejaVu Sans"  # comes with Matplotlib


class Theme(NamedTuple):
    """Colours of a chart; ``series`` are those of what is compared, ``reach`` those of a map, from none to all."""

    paper: str
    ink: str
    faint: str
    series: tuple[str, str, str]
    reach: tuple[str, str]


LIGHT = Theme("#ffffff", "#1b1f24", "#d5d9de", ("#0072b2", "#d55e00", "#009e73"), ("#f4f2ee", "#74b3dd"))
DARK = Theme("#15181c", "#e4e7eb", "#3a4048", ("#56b4e9", "#f0a030", "#3ecf9f"), ("#22272e", "#2c6f9f"))

PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.0f} %")


def new_figure(width: float, height: float, theme: Theme) -> Figure:
    """Begin a figure that needs no display and lays itself out; width and height are inches at `DPI`."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    return figure


def finish_axis(axis: Axes, theme: Theme, title: str) -> None:
    """Give a plot its title, and its lines, letters and grid the colours of a theme."""
    axis.set_title(title, fontsize=11, color=theme.ink, loc="left")
    axis.set_facecolor(theme.paper)
    axis.tick_params(colors=theme.ink, labelsize=9)
    axis.xaxis.label.set(color=theme.ink, fontsize=9)
    axis.yaxis.label.set(color=theme.ink, fontsize=9)
    axis.grid(visible=True, color=theme.faint, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[:].set_color(theme.faint)
    axis.spines[["top", "right"]].set_visible(False)


def log_axis(axis: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Scale one side of a plot by the logarithm, from ``low`` to ``high``, with ticks at powers of two."""
    side = getattr(axis, f"{which}axis")
    getattr(axis, f"set_{which}scale")("log", base=2)
    getattr(axis, f"set_{which}lim")(low, high)
    ticks = 2.0 ** np.arange(np.ceil(np.log2(low) - 1e-9), np.floor(np.log2(high) + 1e-9) + 1)
    side.set_major_locator(FixedLocator(list(ticks)))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend_below(figure: Figure, keys: Sequence[Any], theme: Theme, *, columns: int = 4) -> None:
    """Explain the given artists by their labels, in rows below the plots."""
    figure.legend(
        handles=list(keys), loc="outside lower center", ncols=min(len(keys), columns), frameon=False, fontsize=9,
        labelcolor=theme.ink,
    )  # fmt: skip


def colour_bar(
    figure: Figure, colours: ScalarMappable, axes: Axes | Sequence[Axes], label: str, theme: Theme
) -> Colorbar:
    """Explain the colours of a map beside its plots."""
    bar = figure.colorbar(colours, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label(label, color=theme.ink, fontsize=9)
    bar.ax.tick_params(colors=theme.ink, labelsize=8)
    bar.outline.set_edgecolor(theme.faint)
    return bar


def can_write(text: str) -> bool:
    """Tell whether the font of the charts has every letter of a text."""
    font = get_font(findfont(_FONT))
    return all(font.get_char_index(ord(letter)) for letter in text)


def to_png(figure: Figure) -> bytes:
    """Draw a figure as the bytes of a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor=figure.get_facecolor())
    return stream.getvalue()
