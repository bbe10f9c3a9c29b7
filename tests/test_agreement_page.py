"""The page of a judge's agreement: it holds every number, asks for nothing from outside, and no text breaks out of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from matplotlib import rcParams
from matplotlib.colors import to_rgb

from cai.evaluation import measure
from cai.judging.base import principle_verdict
from cai.report import figures, render_page
from cai.report.agreement import draw
from tests.records import HOSTILE
from tests.test_agreement import pair, planted, vote


class Page(HTMLParser):
    """What a browser would find: elements, their attributes, texts; and whether every element was closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_decl(self, decl: str) -> None:
        assert decl == "doctype html"

    def handle_pi(self, data: str) -> None:
        raise AssertionError(data)


def many(principles: int = 18) -> dict[str, Any]:
    names = [f"principle-{number}" for number in range(principles)]
    return measure(
        planted(60, lambda draw: [vote(draw.normal(1 - index / 9), 1, name) for index, name in enumerate(names)]),
        {"no verdict": 3},
    ).to_json()


AGREEMENT = many()
SETTINGS = dict(rcParams)


def texts(page: str) -> str:
    return " ".join("\n".join(Page(page).texts).split())


def test_the_numbers_and_facts_are_there():
    agreement = AGREEMENT | {
        "accuracy": {"value": 0.7123, "low": 0.6721, "high": 0.7509, "pairs": 60},
        "gain": {"value": -0.058, "low": -0.021, "high": 0.094, "pairs": 60},
        "panel": {"judges": ["small", "large"], "alpha": 0.4812},
        "first_position_rate": None,
    }
    text = texts(render_page(agreement, "Agreement with HH", {"judge": "SmolLM2", "data": "hh.jsonl"}))
    assert "prefers what people chose in 71.2 % (67.2 to 75.1) of 60 pairs" in text
    assert "−5.8 points (−2.1 to +9.4)" in text
    assert "alpha of small, large" in text
    assert "0.481" in text
    assert "first position –" in text
    assert "judge SmolLM2 data hh.jsonl" in text
    assert "3: no verdict" in text
    for name in (f"principle-{number}" for number in range(18)):
        assert len(re.findall(rf"\b{name}\b", text)) == 2, "once in the picture, once in the table"


def test_nothing_is_asked_for_from_outside_and_the_page_is_well_formed():
    page = render_page(AGREEMENT, "title", {})
    found = Page(page)
    assert found.open == []
    assert [tag for tag, _ in found.elements if tag in ("script", "link", "img", "iframe", "object", "base", "image")] == []
    for _, attributes in found.elements:
        for name, value in attributes.items():
            assert name not in ("href", "xlink:href", "src", "srcset") or (value or "").startswith("#")
            assert not name.startswith("on")
    assert not re.search(r"@import|@font-face|url\((?!#)", page)
    outside = set(re.findall(r"https?://[^\"' <]+", page))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of XML, which are not fetched"


def test_four_pictures_that_do_not_share_names_and_take_the_pages_colour():
    page = render_page(AGREEMENT, "title", {})
    found = Page(page)
    assert [tag for tag, _ in found.elements].count("svg") == 4
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    referred = re.findall(r"(?:url\(#|xlink:href=\"#)([\w-]+)", page)
    assert referred
    assert set(referred) <= set(ids)
    assert len(ids) == len(set(ids))
    assert "#000000" not in page
    assert "stroke: currentColor" in page


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_out(text: str):
    hostile = text + '"><script>alert(1)</script><img src=x onerror=alert(1)>$\\frac{$'
    agreement = many(1)
    agreement["principles"][0]["id"] = hostile
    agreement["failures"] = {hostile: 2}
    agreement["panel"] = {"judges": [hostile, "b"], "alpha": None}
    found = Page(render_page(agreement, hostile, {hostile: hostile}))
    plain = Page(render_page(agreement | {"failures": {"x": 2}}, "x", {"x": "x"}))
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
    assert not any(tag in ("script", "img") for tag, _ in found.elements)
    assert found.open == []


def test_it_is_the_same_every_time_and_changes_no_settings():
    assert render_page(AGREEMENT, "title", {}) == render_page(AGREEMENT, "title", {})
    assert dict(rcParams) == SETTINGS


@pytest.mark.parametrize(
    "records",
    [
        [pair(0, [vote(1)])],
        [pair(n, [vote(0)], (7, 7)) for n in range(4)],
        [pair(n, [principle_verdict("score", "only", 1.0, [(1.0, 2.0)], [-0.2])]) for n in range(4)],
    ],
    ids=["one pair", "all ties", "no order, all wrong"],
)
def test_the_least_that_can_be_measured_has_a_page(records: list[Any]):
    found = Page(render_page(measure(records, {}).to_json(), "title", {}))
    assert found.open == []
    assert not re.search(r"\b(?:nan|None|null)\b", " ".join(found.texts))


def test_eighteen_principles_have_their_own_lines_best_first_within_the_picture():
    with figures.style():
        figure = draw(AGREEMENT)["principles"]
        figure.draw_without_rendering()
        (axes,) = figure.axes
        labels = axes.get_yticklabels()
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
        written = [text.get_window_extent() for text in axes.texts]
    value = {one["id"]: one["accuracy"]["value"] for one in AGREEMENT["principles"]}
    shown = [value[label.get_text()] for label in labels]
    assert shown == sorted(value.values(), reverse=True)
    assert all(lower.y1 < upper.y0 for lower, upper in pairwise(boxes))
    whole = figure.bbox
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes + written)


def test_dots_and_lines_stand_where_the_numbers_are():
    with figures.style():
        (axes,) = figures.dots([figures.Row("one", {"value": 0.7, "low": 0.6, "high": 0.75, "pairs": 9})], {"coin": 0.5}).axes
    interval, dot, coin = (list(line.get_xdata()) for line in axes.lines)
    assert (interval, dot, coin) == ([0.6, 0.75], [0.7], [0.5, 0.5])
    assert [text.get_text().strip() for text in axes.texts] == ["70.0 %  (60–75)", "coin"]
    low, high = axes.get_xlim()
    assert low < 0.5 < 0.75 < high


def test_the_reliability_picture_has_the_bins_and_their_counts():
    bins = [
        {"low": 0.5, "high": 0.55, "pairs": 12, "confidence": 0.53, "accuracy": 0.4},
        {"low": 0.9, "high": 0.95, "pairs": 30, "confidence": 0.92, "accuracy": 0.8},
    ]
    with figures.style():
        upper, lower = figures.reliability(bins).axes
    _, curve = upper.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0.53, 0.92], [0.4, 0.8])
    assert [bar.get_height() for bar in lower.patches] == [12, 30]  # type: ignore[attr-defined]
    assert [text.get_text() for text in lower.texts] == ["12", "30"]
    assert upper.get_ylim()[0] < 0.4


@pytest.mark.parametrize("colour", [figures.BLUE, figures.ORANGE, figures.GREY])
@pytest.mark.parametrize("paper", ["#ffffff", "#15181c"])
def test_colours_are_seen_on_light_and_dark(colour: str, paper: str):
    """WCAG 2.2's contrast of graphics, 3:1."""

    def luminance(name: str) -> float:
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in to_rgb(name)]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    darker, lighter = sorted((luminance(colour), luminance(paper)))
    assert (lighter + 0.05) / (darker + 0.05) >= 3
