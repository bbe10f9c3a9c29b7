"""The page of an online training: it holds the numbers, asks for nothing from outside, and no completion breaks out of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cai.report import figures
from cai.report.training import draw, render_training, write_page
from cai.report.written import Written, read_training
from tests.records import HOSTILE
from tests.test_agreement_page import Page, texts


def gold_line(step: int, value: float, proxy: float, **more: Any) -> dict[str, Any]:
    ends = {"low": value - 0.1, "high": value + 0.1, "proxy_low": proxy - 0.2, "proxy_high": proxy + 0.2}
    return {"step": step, "gold": value, "proxy": proxy, "words": 31.5, "answers": 64, "golds": [value], **ends, **more}


def sample(step: int, completion: str, prompt: str = "What is rust?") -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "dialogue": prompt, "completion": completion, "proxy": 1.25, "gold": None}


LOG = [
    {"step": step, "objective/kl": 99.0, "objective/kl_coef": 0.05, "value/explained_variance": step / 10, "loss": 1.0}
    for step in range(1, 6)
]
ROLLOUTS = [
    {
        "step": step,
        "kl": 3.0 * step,
        "words": 30.0 + step,
        "distinct_1": 0.4,
        "distinct_2": 0.7,
        "repetition": 0.1,
        "rewards": {},
    }
    for step in range(1, 6)
]
GOLD = [gold_line(0, 0.411, 1.0, kl=0.0), gold_line(3, 0.777, 2.0, kl=4.0), gold_line(5, 0.5, -3.0, kl=9.0)]
STOPPED = {"reason": "gold", "step": 5, "why": "gold has changed by −0.277"}
WHOLE = Written(LOG, ROLLOUTS, GOLD, [sample(step, f"answer {step}") for step in (0, 3, 5)], STOPPED)
NOTHING = Written([], [], [], [], None)


def test_the_numbers_the_reason_and_the_answers_are_there():
    text = texts(render_training(WHOLE, "harmless"))
    assert "5 steps. At step 5, gold is 0.5 (0.4 to 0.6) ; it began at 0.411 (0.311 to 0.511), and is best at step 3 :" in text
    assert "3 : 0.777 (0.677 to 0.877) ." in text
    assert "Stopped after step 5: gold has changed by −0.277." in text
    assert "5 0.5 (0.4 to 0.6) −3 (−3.2 to −2.8) 9 31.5" in text
    assert all(f"answer {step}" in text for step in (0, 3, 5))
    assert [name for name, _ in Page(render_training(WHOLE, "x")).elements].count("svg") == 6


@pytest.mark.parametrize(("all_steps", "told"), [(None, "x 5 steps."), (5, "x 5 steps."), (1200, "x 5 of 1,200 steps.")])
def test_how_far_it_went_of_all_steps_is_told(all_steps, told):
    assert told in texts(render_training(WHOLE, "x", all_steps))


def test_completions_without_a_reward_and_gold_without_a_number_are_told():
    rollouts = [{"step": step, "completions": 40, "unscored": {"brief": step, "other": 0}} for step in range(3)]
    gold = [{"step": 0, "gold": None, "proxy": 1.0, "words": 3.0, "answers": 64, "golds": [None]}]
    page = render_training(NOTHING._replace(rollouts=rollouts, gold=gold), "x")
    text = " ".join(texts(page).split())
    assert "Reward brief had no number for 3 of 120 completions." in text
    assert "Reward other" not in text
    assert "Gold had no number for any answer" in text
    assert "no gold measure" not in text


def test_series_that_are_missing_are_left_out():
    assert draw(NOTHING) == {}
    assert draw(WHOLE).keys() == {"gold", "frontier", "kl", "value", "length", "monitors"}
    assert draw(NOTHING._replace(log=[{"step": 1, "reward_disagreement": 0.2}])).keys() == {"disagreement"}
    assert draw(NOTHING._replace(rollouts=[{"step": 1, "kl": 0.2}])).keys() == {"kl"}
    rewarded = [{"step": step, "reward": 1.5 * step, "rewards": {"brief": 1.0 * step, "polite": 0.5 * step}} for step in (1, 2)]
    found = draw(NOTHING._replace(rollouts=rewarded))["reward"].axes
    assert [list(one.lines[0].get_ydata()) for one in found] == [[1.5, 3.0], [1.0, 2.0], [0.5, 1.0]]
    [one] = draw(NOTHING._replace(rollouts=[{"step": 1, "reward": 1.0, "rewards": {"brief": 1.0}}]))["reward"].axes
    assert list(one.lines[0].get_ydata()) == [1.0]
    assert draw(NOTHING._replace(gold=[gold_line(0, 0.4, 1.0, kl=0.0), gold_line(1, 0.4, 1.0)])).keys() == {"gold"}
    text = texts(render_training(NOTHING, "empty"))
    assert "0 steps. There is no gold measure" in text
    assert not re.search(r"nan|None|Stopped", text)


def test_the_kl_is_that_of_the_rollouts_whatever_the_trainer_logs():
    """Online DPO logs a sum over padding too, GRPO and RLOO the KL of a token."""
    with figures.style():
        kl, coefficient = draw(WHOLE._replace(log=[{**line, "kl": 1e6} for line in LOG]))["kl"].axes
    assert list(kl.lines[0].get_ydata()) == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert list(coefficient.lines[0].get_ydata()) == [0.05] * 5


def test_gold_over_steps_and_over_the_root_of_the_kl_with_bands_and_the_best():
    with figures.style():
        found = draw(WHOLE)
    for name, x, best in (("gold", [0, 3, 5], 3), ("frontier", [0.0, 2.0, 3.0], 2.0)):
        gold, proxy = found[name].axes
        assert [list(one.lines[0].get_xdata()) for one in (gold, proxy)] == [x, x]
        assert list(gold.lines[0].get_ydata()) == [0.411, 0.777, 0.5]
        assert list(proxy.lines[0].get_ydata()) == [1.0, 2.0, -3.0]
        assert list(gold.lines[1].get_xdata()) == [best, best]
        ends = gold.collections[0].get_paths()[0].vertices[:, 1]
        assert (min(ends), max(ends)) == (pytest.approx(0.311), pytest.approx(0.877))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_completion_breaks_out(text: str):
    hostile = text + '</td><script>alert(1)</script><img src=x onerror="alert(1)">{{ title }}'
    samples = [sample(0, hostile, hostile), sample(1, "plain", hostile)]
    stopped = {**STOPPED, "why": hostile}
    found = Page(render_training(NOTHING._replace(samples=samples, stopped=stopped), hostile))
    plain = Page(render_training(NOTHING._replace(samples=[sample(0, "a"), sample(1, "b")], stopped=STOPPED), "x"))
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
    assert found.open == []
    assert "{{ title }}" in "".join(found.texts)


def test_nothing_is_asked_for_from_outside_and_it_is_the_same_every_time():
    page = render_training(WHOLE, "title")
    assert page == render_training(WHOLE, "title")
    assert set(re.findall(r"https?://[^\"' <]+", page)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in Page(page).elements)


def test_many_steps_are_shown_at_six_of_them():
    samples = [sample(step, f"answer-{step}.") for step in range(0, 101, 5)]
    text = texts(render_training(NOTHING._replace(samples=samples), "x"))
    shown = re.findall(r"answer-(\d+)\.", text)
    assert (len(shown), shown[0], shown[-1]) == (6, "0", "100")


def test_it_is_made_of_what_lies_beside_the_training(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    again = [{"step": 2, "objective/kl": 9.0}, {"step": 5, "train_runtime": 3.0}]
    for name, told in (("log", LOG + again), ("rollouts", ROLLOUTS), ("gold", GOLD), ("samples", WHOLE.samples)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told) + '{"step": 6, "gol')
    found = read_training(tmp_path)
    assert [line["step"] for line in found.log] == [1, 2, 3, 4, 5]
    assert found.log[1] == LOG[1] | again[0]
    assert found.log[4] == LOG[4] | again[1], "at its end a training logs the last step again"
    assert found.gold == GOLD
    write_page(tmp_path / "training.html")
    page = (tmp_path / "training.html").read_text()
    assert texts(page).startswith(tmp_path.name)
    assert "0.777 (0.677 to 0.877)" in texts(page)
    assert not list(tmp_path.glob("*.part"))
