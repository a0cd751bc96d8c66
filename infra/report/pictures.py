"""The report's pictures as plain functions: strips and contact sheets of clips, histograms, loss curves.

Each returns the bytes of a file. A plot is an SVG that follows the reader's light or dark scheme and needs no page.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

GAP = 2
_MARGIN, _CAPTION, _COLUMNS = 8, 18, 3
_MOST_BARS = 10
_MOST_POINTS = 1000
# plots are drawn in the light colours, which become CSS variables of the SVG; page.css has the same values
_COLOURS = {
    "paper": ("#ffffff", "#171b21"),
    "ink": ("#59636e", "#9aa5b1"),
    "rule": ("#dfe3e8", "#2e353e"),
    "kept": ("#2f6fdb", "#6ba1ff"),
    "dropped": ("#d9772b", "#f0a35e"),
    "third": ("#8250df", "#c297ff"),
    "fourth": ("#1a7f45", "#57c785"),
    "fifth": ("#bf3989", "#ff8ac8"),
    "sixth": ("#0a7c86", "#4fd1d9"),
}
_MODELS = ("kept", "dropped", "third", "fourth", "fifth", "sixth")
_MOST_DOTS = 32  # points of a curve that are marked
_LIGHT = {name: light for name, (light, _) in _COLOURS.items()}


def strip(video: np.ndarray, height: int) -> "Image":
    """The frames of (T, H, W, 3) in a row, at most `height` pixels high."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in video]
    h = min(height, frames[0].height)
    w = max(1, round(frames[0].width * h / frames[0].height))
    row = Image.new("RGB", (len(frames) * (w + GAP) - GAP, h), "#888888")
    for i, frame in enumerate(frames):
        row.paste(frame.resize((w, h), Image.Resampling.LANCZOS, reducing_gap=2.0), (i * (w + GAP), 0))
    return row


def jpeg(picture: "Image") -> bytes:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=85)
    return sink.getvalue()


def sheet(strips: Sequence["Image"], captions: Sequence[str]) -> bytes:
    """A JPEG of all strips in columns of equal width, each over its caption."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(12)
    columns = min(_COLUMNS, len(strips))
    width = max(*(s.width for s in strips), *(math.ceil(font.getlength(c)) for c in captions))
    rows = [range(i, min(i + columns, len(strips))) for i in range(0, len(strips), columns)]
    heights = [max(strips[i].height for i in row) + _CAPTION + _MARGIN for row in rows]
    canvas = Image.new("RGB", (columns * (width + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), _LIGHT["paper"])
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (width + _MARGIN)
            canvas.paste(strips[i], (left, top))
            draw.text((left, top + strips[i].height + 1), captions[i], fill=_LIGHT["ink"], font=font)
        top += height
    return jpeg(canvas)


def histogram(kept: np.ndarray, dropped: np.ndarray, log: bool = False) -> bytes:
    """Kept and dropped values stacked in common bins; with `log`, bins of equal ratio (values must be positive)."""
    figure, axes = _axes()
    values = np.concatenate([kept, dropped])
    low, high = float(values.min()), float(values.max())
    if log and low < high:
        bins = np.geomspace(low, high, 25)
        axes.set_xscale("log")
    else:
        middle, reach = (low + high) / 2, max((high - low) / 2, abs(high) * 1e-3, 1e-6)
        bins = np.linspace(middle - reach, middle + reach, 25)
    colours = [_LIGHT["kept"], _LIGHT["dropped"]]
    axes.hist([kept, dropped], bins.tolist(), stacked=True, color=colours, edgecolor=_LIGHT["paper"], linewidth=0.6)
    _whole_numbers(axes.yaxis)
    return _svg(figure)


def bars(names: Sequence[str], kept: np.ndarray, dropped: np.ndarray) -> bytes:
    """Stacked horizontal bars, the longest first; the last bar is the sum of those that do not fit."""
    order = np.argsort(-(kept + dropped), kind="stable")
    longest, others = order[:_MOST_BARS], order[_MOST_BARS:]
    labels = [names[i] for i in longest] + ([f"{len(others)} others"] if len(others) else [])
    sums = [[int(counts[others].sum())] if len(others) else [] for counts in (kept, dropped)]
    left, right = (np.append(counts[longest], last) for counts, last in zip((kept, dropped), sums, strict=True))
    figure, axes = _axes()
    axes.barh(labels, left, color=_LIGHT["kept"], height=0.7)
    axes.barh(labels, right, left=left, color=_LIGHT["dropped"], height=0.7)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    _whole_numbers(axes.xaxis)
    return _svg(figure)


def curve(points: Sequence[tuple[int, float]]) -> bytes:
    """A metric by step: pale values, their running mean over them; log scale if they span more than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    figure, axes = _axes()
    steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    peaks = _extremes(values)
    axes.plot(steps[peaks], values[peaks], color=_LIGHT["kept"], alpha=0.35, linewidth=0.9)
    spread = np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS)).astype(int)
    axes.plot(steps[spread], running_mean(values)[spread], color=_LIGHT["kept"], linewidth=1.8)
    if len(values) == 1:
        axes.plot(steps, values, "o", color=_LIGHT["kept"], markersize=4)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        decades = np.log10(values.max() / values.min())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _whole_numbers(axes.xaxis)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.01)
    return _svg(figure)


def lines(curves: Mapping[str, Sequence[tuple[int, float]]], marks: Sequence[int] = ()) -> bytes:
    """One or two curves over the same whole numbers, with a legend for two, and dashed lines at the marks."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    for mark in marks:
        axes.axvline(mark, color=_LIGHT["ink"], alpha=0.4, linewidth=0.6, linestyle="--")
    for (label, points), colour in zip(curves.items(), ("kept", "dropped"), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=_LIGHT[colour], linewidth=1.8, marker="o", markersize=3, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_LIGHT["ink"])
    return _svg(figure)


class Band(NamedTuple):
    """A curve of a model: points (x, value, low, high), its name, and the model's number, which gives its colour."""

    label: str
    number: int
    points: Sequence[Sequence[float]]


def colour_of(number: int) -> str:
    """The name of the colour of model `number`, as CSS variable; after six they begin again."""
    return _MODELS[number % len(_MODELS)]


def bands(curves: Sequence[Band]) -> bytes:
    """Curves over the same axis, each with the band of its intervals; from the seventh model on dashed, then dotted."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    for curve in curves:
        x, value, low, high = np.array([[math.nan if end is None else end for end in p] for p in curve.points]).T
        colour = _LIGHT[colour_of(curve.number)]
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        style = ("-", "--", ":")[min(curve.number // len(_MODELS), 2)]
        dot = "o" if len(x) <= _MOST_DOTS else ""
        axes.plot(x, value, style, color=colour, linewidth=1.8, marker=dot, markersize=3, label=curve.label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.margins(x=0.02)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_LIGHT["ink"])
    return _svg(figure)


def paths(kinds: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> bytes:
    """Paths (V, T, 2) of one or two kinds in one plane, a dot at each latent, a ring at the first."""
    figure, axes = _axes()
    for (label, group), colour in zip(kinds.items(), ("kept", "dropped"), strict=False):
        for number, path in enumerate(group):
            x, y = zip(*path, strict=True)
            name = label if number == 0 else None
            axes.plot(x, y, color=_LIGHT[colour], linewidth=0.9, marker=".", markersize=3, alpha=0.8, label=name)
            axes.plot(x[:1], y[:1], color=_LIGHT[colour], marker="o", markersize=5, fillstyle="none")
    if len(kinds) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_LIGHT["ink"])
    return _svg(figure)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean around each value over a twentieth of all values, over fewer at the ends."""
    reach = len(values) // 40
    centres = np.arange(len(values))
    first, last = np.maximum(centres - reach, 0), np.minimum(centres + reach, len(values) - 1) + 1
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last] - sums[first]) / (last - first)


def _extremes(values: np.ndarray) -> np.ndarray:
    """Numbers of the values to draw, without losing a spike: the least and the greatest of each stretch."""
    if len(values) <= _MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), _MOST_POINTS // 2)
    return np.unique([s[pick(values[s])] for s in stretches for pick in (np.argmin, np.argmax)])


def _axes() -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0, 2.3), layout="constrained", facecolor=_LIGHT["paper"])
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(color=_LIGHT["rule"], linewidth=0.8)
    axes.tick_params(colors=_LIGHT["ink"], labelsize=9, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_LIGHT["rule"])
    return figure, axes


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _svg(figure: "Figure") -> bytes:
    """The figure as an SVG; the same drawing gives the same bytes."""
    import matplotlib as mpl

    sink = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "longtake"}):
        figure.savefig(sink, format="svg", metadata={"Date": None})
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in _COLOURS.items()) for i in (0, 1))
    svg = sink.getvalue()
    for name, colour in _LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"(font: [^;\"]*?px) '[^;\"]*", r"\1 system-ui, sans-serif", svg)
    style = f"svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}"
    return svg.replace('<style type="text/css">', f'<style type="text/css">{style}', 1).encode()
