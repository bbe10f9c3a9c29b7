"""The page that shows how far a judge agrees with people; its template lies beside it in `agreement.html.jinja`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cai.report import figures
from cai.report.figures import BLUE, GREY, ORANGE, Row
from cai.report.page import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHANCE = {"coin": 0.5}


def render_page(agreement_json: Mapping[str, Any], title: str, facts: Mapping[str, str]) -> str:
    """One HTML page that asks for nothing from outside; `facts` (judge, data, ...) are shown as they stand, in their order.

    `agreement_json` is what `cai.evaluation.Agreement.to_json` gives.
    """
    return render(
        "agreement.html.jinja",
        {"percent": _percent, "estimate": _estimate, "points": _points, "decimal": _decimal},
        lambda: draw(agreement_json),
        agreement=agreement_json,
        title=title,
        facts=facts,
    )


def draw(agreement: Mapping[str, Any]) -> dict[str, Figure]:
    """The page's figures by name."""
    length = agreement["length"]
    baselines = [
        Row("this judge", agreement["accuracy"], BLUE),
        Row("same model, one principle, one order", agreement["usual"], ORANGE),
        Row("always the longer", length["always_longer"], GREY),
        Row("always the shorter", length["always_shorter"], GREY),
    ]
    ranked = sorted(agreement["principles"], key=lambda one: -one["accuracy"]["value"])
    principles = [Row(one["id"], one["accuracy"]) for one in ranked]
    thirds = [
        Row(f"lengths differ by {one['shortest']:,}–{one['longest']:,}", one["accuracy"]) for one in length["by_difference"]
    ]
    sides = [Row(f"people chose the {name}", one, ORANGE) for name, one in length["by_chosen"].items() if name != "equal"]
    whole = {"the verdict": agreement["accuracy"]["value"]}
    return {
        "reliability": figures.reliability(agreement["reliability"]),
        "accuracy": figures.dots(baselines, _CHANCE),
        "principles": figures.dots(principles, _CHANCE | whole),
        "length": figures.dots(thirds + sides, _CHANCE | whole),
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _estimate(estimate: Mapping[str, Any]) -> str:
    """A share with its interval."""
    if estimate["low"] is None:
        return _percent(estimate["value"])
    return f"{_percent(estimate['value'])} ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"


def _points(estimate: Mapping[str, Any]) -> str:
    """A difference of two shares, in percentage points with its sign."""
    interval = "" if estimate["low"] is None else f" ({100 * estimate['low']:+.1f} to {100 * estimate['high']:+.1f})"
    return f"{100 * estimate['value']:+.1f} points{interval}".replace("-", "−")
