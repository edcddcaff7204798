"""How every plot looks, and how it becomes an inline SVG or a picture file.

No pyplot and no global state: a figure is made and drawn inside `style()`, whatever the user's own matplotlibrc says.
Every text that comes from a journal passes through `label` first.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.style
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedpeft.errors import ConfigError, sentence
from fedpeft.files import write_atomically
from fedpeft.report.units import human_bytes

PALETTE = ("#1f5aa6", "#d2691e", "#2e8b6a", "#8a4b9c", "#b8960c", "#c23b5e", "#3b9fc0", "#7a6a58", "#6f8f2f", "#5a6472")
FEDERATION, INK, FAINT, FAILED = PALETTE[0], "#26303a", "#8c97a3", "#c0392b"
BOUND_DASHES = ((0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 2)))
WIDTH_INCHES = 4.2
MOST_VECTOR_MARKS = 1500
MOST_DOTTED_ROUNDS = 40
_PICTURE_KINDS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}
_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e3e7eb",
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.7,
    "lines.markersize": 3.4,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """A figure with what a page says about it. `name` is unique on a page; `caption` says what is seen."""

    name: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def style(salt: str = "fedpeft") -> Iterator[None]:
    """Inside it, figures look alike on every machine and the ids of an SVG depend on `salt` alone."""
    with matplotlib.style.context(["default", {**_RC, "svg.hashsalt": salt}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(height_inches: float = 3.1) -> Figure:
    """An empty figure as wide as every other on the page."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def label(text: object, longest: int = 28) -> str:
    """One printable line of at most `longest` letters."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int = 2) -> None:
    """The legend stands under the plot, never over it; a name takes no more than its column."""
    shown = [label(name, 54 // columns).lstrip("_") or "–" for name in names]
    if shown:
        figure.legend(handles, shown, loc="outside lower left", ncols=columns, columnspacing=1.4, handletextpad=0.6)


def key_mark(color: str, marker: str) -> Line2D:
    """A lone mark for a legend."""
    return Line2D([], [], color=color, linestyle="", marker=marker, markersize=6, markeredgewidth=0)


def dots(points: Sequence[Any]) -> str:
    """The marker of a line through `points`: a dot at each, unless they would run together."""
    return "o" if len(points) <= MOST_DOTTED_ROUNDS else ""


def rounds_axis(axes: Axes, rounds: Sequence[int]) -> None:
    """Whole rounds along x, with room for a single one."""
    axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")


def percent_axis(axes: Axes) -> None:
    """Shares along y, in percent."""
    axes.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=(1, 2, 5, 10)))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, symbol=" %"))


def bytes_axis(axes: Axes) -> None:
    """Bytes on a log scale, whole decades labelled in human units."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(numticks=8))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_round_bytes))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def inline_svg(plot: Plot) -> str:
    """The figure as an `<svg>` element to stand in an HTML page: no namespace, metadata, style or colliding id.

    The same figure gives the same text.
    """
    buffer = io.BytesIO()
    with style(plot.name):
        plot.figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root, f"{plot.name}-")
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", label(f"{plot.title}. {plot.caption}", longest=300))
    return ElementTree.tostring(root, encoding="unicode")


def write_picture(figure: Figure, path: Path) -> None:
    """`path` holds the figure in the format its name ends with: .png, .svg or .pdf.

    Raises:
        ConfigError: another ending.
    """
    kind = _PICTURE_KINDS.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(
            sentence(
                str(path),
                expected=f"a name that ends with {', '.join(_PICTURE_KINDS)}",
                found=path.suffix or "no ending",
                remedy="name the picture accordingly",
            )
        )
    buffer = io.BytesIO()
    dates = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with style():
        figure.savefig(buffer, format=kind, dpi=200, metadata=dates[kind])
    write_atomically(path, buffer.getvalue())


def _round_bytes(size: float, _position: int | None) -> str:
    number, unit = human_bytes(size).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _strip(element: ElementTree.Element, prefix: str) -> None:
    element.tag = element.tag.rpartition("}")[2]
    for child in list(element):
        if child.tag.rpartition("}")[2] in ("metadata", "style"):
            element.remove(child)
        else:
            _strip(child, prefix)
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    element.attrib.clear()
    for key, value in attributes.items():
        element.set(key, _prefixed(key, value, prefix))


def _prefixed(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}")
