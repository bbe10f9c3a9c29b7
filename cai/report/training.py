"""The page beside the checkpoints of an online training, made of what it writes; its template is `training.html.jinja`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.report import figures
from cai.report.figures import BLUE, GREY, ORANGE, Series
from cai.report.page import render
from cai.report.written import Line, Written, best_of, read_training, unscored
from cai.store import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TIMES = 6
"""Steps at which completions are shown, spread over the training."""
_COLOURS = (BLUE, ORANGE, GREY)
_COEFFICIENT = "objective/kl_coef"
_KL = {"KL, nats a completion": ("kl",), "coefficient of the KL": (_COEFFICIENT,)}
_VALUE = {"explained variance of the values": ("value/explained_variance",), "loss of the values": ("value/loss",)}
_LENGTH = {"words of a completion": ("words",), "tokens of a completion": ("tokens",)}
_DISAGREEMENT = {"disagreement of the ensemble": ("reward_disagreement",)}
_MONITORS = {
    "distinct n-grams": ("distinct_1", "distinct_2"),
    "shares": ("repetition", "refusals", "empty", "alike", "unfinished", "language_changes"),
    "entropy, nats a token": ("entropy",),
    "reward with length": ("length_correlation_overall", "length_correlation_within_prompts"),
    "spread of the reward": ("reward_spread",),
}
"""The plots of each figure, one under the other, and the measures in each."""

_ENDS = {"gold": ("low", "high"), "proxy": ("proxy_low", "proxy_high")}
"""Of the intervals of both."""


def write_page(file: Path, all_steps: int | None = None) -> None:
    """Write the page of the training in whose folder `file` is, whole or not at all. Raises `StoreError`."""
    out = file.parent
    write_whole(file, render_training(read_training(out), out.name, all_steps))


def render_training(written: Written, title: str, all_steps: int | None = None) -> str:
    """One HTML page that asks for nothing from outside; what was not measured is not shown. `all_steps` are those that were to
    be done, if that is known."""
    last = max((line["step"] for line in (*written.log, *written.rollouts, *written.gold)), default=0)
    return render(
        "training.html.jinja",
        {"number": _number, "ends": _ends},
        lambda: draw(written),
        written=written,
        title=title,
        steps=last,
        all_steps=all_steps if all_steps and all_steps > last else None,
        best=best_of(written.gold),
        samples=_shown(written.samples),
        unscored=unscored(written.rollouts),
    )


def draw(written: Written) -> dict[str, Figure]:
    """The page's figures by name, without those that there is nothing for."""
    best = best_of(written.gold)
    mark = None if best is None else best["step"]
    found = {
        "gold": _gold(written.gold, _step, "step", mark),
        "frontier": _frontier(written.gold, best),
        "reward": _rewards(written.rollouts, mark),
        "kl": _plots([*written.rollouts, *_coefficients(written.log)], _KL, mark),
        "value": _plots(written.log, _VALUE, mark),
        "length": _plots(written.rollouts, _LENGTH, mark),
        "disagreement": _plots(written.log, _DISAGREEMENT, mark),
        "monitors": _plots(written.rollouts, _MONITORS, mark),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _coefficients(log: Sequence[Line]) -> list[Line]:
    """Without the KL that is logged, of which each trainer means something else: that of a rollout is in nats a completion."""
    return [{name: line[name] for name in ("step", _COEFFICIENT)} for line in log if _COEFFICIENT in line]


def _step(line: Line) -> float:
    return float(line["step"])


def _root_of_kl(line: Line) -> float:
    return math.sqrt(max(0.0, line["kl"]))


def _frontier(gold: Sequence[Line], best: Line | None) -> Figure | None:
    """The same over the square root of the KL, from left to right."""
    known = sorted((line for line in gold if line.get("kl") is not None), key=_root_of_kl)
    if len(known) < 2:
        return None
    mark = _root_of_kl(best) if best and best.get("kl") is not None else None
    return _gold(known, _root_of_kl, "√KL from the reference (nats a completion)", mark)


def _gold(gold: Sequence[Line], x: Any, label: str, mark: float | None) -> Figure | None:
    plots = {}
    for name, what, colour in (("gold", "gold", ORANGE), ("proxy", "reward that is trained on", BLUE)):
        known = [line for line in gold if line[name] is not None]
        ends = [[_or(line.get(end), line[name]) for line in known] for end in _ENDS[name]]
        if known:
            plots[what] = [Series("", [x(line) for line in known], [line[name] for line in known], colour, (ends[0], ends[1]))]
    return figures.panels(plots, label, ("best", mark) if mark is not None else None) if plots else None


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _rewards(rollouts: Sequence[Line], mark: float | None) -> Figure | None:
    """The reward of each rollout, and of several what each says."""
    names = list(dict.fromkeys(name for line in rollouts for name in line.get("rewards", {})))
    each = {f"reward '{name}'": (f"rewards/{name}",) for name in names if names[1:]}
    lines = [{**line, **{f"rewards/{name}": one for name, one in line.get("rewards", {}).items()}} for line in rollouts]
    return _plots(lines, {"reward": ("reward",), **each}, mark)


def _plots(lines: Sequence[Line], wanted: Mapping[str, Sequence[str]], mark: float | None) -> Figure | None:
    plots: dict[str, list[Series]] = {}
    for label, names in wanted.items():
        for place, name in enumerate(names):
            known = [line for line in lines if line.get(name) is not None]
            if known:
                words = name.removeprefix("length_correlation_").replace("_", " ") if len(names) > 1 else ""
                colour = _COLOURS[place % len(_COLOURS)]
                series = Series(
                    words, [_step(line) for line in known], [line[name] for line in known], colour, style=place // 3
                )
                plots.setdefault(label, []).append(series)
    return figures.panels(plots, "step", ("best", mark) if mark is not None else None) if plots else None


def _shown(samples: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """Prompts, each with its completions at several steps, the first and the last among them."""
    steps = sorted({line["step"] for line in samples})
    count = min(_TIMES, len(steps))
    wanted = {steps[round(place * (len(steps) - 1) / max(1, count - 1))] for place in range(count)}
    found: dict[str, list[Line]] = {}
    for line in samples:
        if line["step"] in wanted:
            found.setdefault(line["dialogue"], []).append(line)
    return [(one[0]["prompt"], one) for one in found.values()]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _ends(line: Line, name: str) -> str:
    """A mean with its interval."""
    value, (low, high) = line[name], map(line.get, _ENDS[name])
    return _number(value) if low is None else f"{_number(value)} ({_number(low)} to {_number(high)})"
