"""Pictures as SVG that stands inside a page: its text takes the page's colour, so light and dark both work."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#3f8fd2", "#d1731c", "#8a8a8a"
"""Told apart by colour-blind people too, and at least 3:1 against both white and near black (WCAG 2.2, 1.4.11)."""
_WIDTH, _ROW = 7.2, 0.27
_LONGEST = 44
_FEW = 40
"""So many points of a line are shown as dots."""
_INK = re.compile(r"(fill|stroke): #000000")
_UNUSED = re.compile(r'(<g|<path) id="(?!C\d)[^"]*_\d+"')
"""Names like `line2d_3`, to which nothing refers and which all figures of a page would share."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.3,
}


class Row(NamedTuple):
    """One line of a dot plot: an estimate as `Agreement.to_json` gives it."""

    label: str
    estimate: Mapping[str, Any]
    colour: str = BLUE


def dots(rows: Sequence[Row], reference: Mapping[str, float]) -> Figure:
    """A dot for each share, its interval as a line, its number to the right; dashed lines at the named references."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((_WIDTH, 0.75 + _ROW * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        low, high = _ends(row.estimate)
        axes.plot([low, high], [place, place], color=row.colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([row.estimate["value"]], [place], "o", color=row.colour, markersize=6.5)
        axes.text(1.02, place, _written(row.estimate), transform=axes.get_yaxis_transform(), va="center")
    sides = ("right", "left") if len(reference) == 2 else ("center",) * len(reference)
    for side, (name, value) in zip(sides, sorted(reference.items(), key=lambda item: item[1]), strict=True):
        axes.axvline(value, color=GREY, linestyle="--", linewidth=1.1, zorder=0)
        axes.text(value, 1, f" {name} ", transform=axes.get_xaxis_transform(), ha=side, va="bottom", color=GREY)
    ends = [end for row in rows for end in _ends(row.estimate)] + list(reference.values())
    axes.set(xlim=(max(-0.02, min(ends) - 0.04), min(1.02, max(ends) + 0.04)), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), [_shortened(row.label) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    _percent(axes, "x")
    return figure


def reliability(bins: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy against confidence, bin by bin, beside the diagonal; below, how many pairs each bin has."""
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence, accuracy = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
    middles, counts = [(one["low"] + one["high"]) / 2 for one in bins], [one["pairs"] for one in bins]
    upper.plot([0.5, 1], [0.5, 1], "--", color=GREY, linewidth=1.1)
    upper.plot(confidence, accuracy, color=BLUE, linewidth=1.2)
    upper.scatter(confidence, accuracy, s=[15 + 150 * count / max(counts) for count in counts], color=BLUE, zorder=3)
    upper.set(xlim=(0.49, 1.01), ylim=(min(0.5, *accuracy, 1) - 0.06, 1.06), ylabel="right, of the bin's pairs")
    bars = lower.bar(middles, counts, width=0.045, color=BLUE, alpha=0.75)
    lower.bar_label(bars, fontsize=8.5, padding=1)
    lower.set(ylabel="pairs", xlabel="how sure the judge is", ylim=(0, 1.3 * max(counts)))
    lower.set_yticks([])
    for axes in (upper, lower):
        axes.grid(axis="both" if axes is upper else "x")
    _percent(upper, "y")
    _percent(lower, "x")
    return figure


class Series(NamedTuple):
    """One line of a plot; `band` are the ends of its intervals, `style` tells lines of one colour apart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE
    band: tuple[Sequence[float], Sequence[float]] | None = None
    style: int = 0


def panels(plots: Mapping[str, Sequence[Series]], xlabel: str, mark: tuple[str, float] | None) -> Figure:
    """Plots one under the other with the same x, each with what it shows above it; a dashed line at the named `mark`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((_WIDTH, 0.5 + 1.75 * len(plots)), layout="constrained")
    column = figure.subplots(len(plots), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, series) in zip(column, plots.items(), strict=True):
        for one in series:
            dots = "o" if len(one.x) <= _FEW else ""
            style = ("-", "--", ":")[one.style]
            axes.plot(one.x, one.y, style, marker=dots, markersize=4.5, color=one.colour, linewidth=1.5, label=one.label)
            if one.band:
                axes.fill_between(one.x, *one.band, color=one.colour, alpha=0.2, linewidth=0)
        axes.set_title(label, loc="left", fontsize=9.5)
        axes.grid(axis="both")
        if mark:
            axes.axvline(mark[1], color=GREY, linestyle="--", linewidth=1.1, zorder=0)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1, 1))
    if mark:
        column[0].text(mark[1], 0.98, f" {mark[0]}", transform=column[0].get_xaxis_transform(), va="top", color=GREY)
    column[-1].set_xlabel(xlabel)
    column[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], min_n_ticks=1))
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element; `name` keeps what it refers to apart from that of the page's other figures."""
    text = io.StringIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        import matplotlib

        matplotlib.rcParams["svg.hashsalt"] = name
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    element = text.getvalue()
    element = element[element.index("<svg") :]
    return _UNUSED.sub(r"\1", _INK.sub(r"\1: currentColor", element))


@contextmanager
def style() -> Iterator[None]:
    """How figures look, where they are made and where they are written."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _ends(estimate: Mapping[str, Any]) -> tuple[float, float]:
    if estimate["low"] is None:
        return estimate["value"], estimate["value"]
    return estimate["low"], estimate["high"]


def _written(estimate: Mapping[str, Any]) -> str:
    interval = "" if estimate["low"] is None else f"  ({100 * estimate['low']:.0f}–{100 * estimate['high']:.0f})"
    return f"{100 * estimate['value']:.1f} %{interval}"


def _shortened(label: str) -> str:
    """Cut in the middle: long names often differ at their end."""
    half = _LONGEST // 2
    return label if len(label) <= _LONGEST else f"{label[:half]}…{label[1 - half :]}"


def _percent(axes: Axes, axis: str) -> None:
    from matplotlib.ticker import PercentFormatter

    getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
