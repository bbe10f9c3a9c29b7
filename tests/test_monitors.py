"""Monitors of rollouts against naive code, and decisions by numbers: limits, notes, gold, held-out prompts."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cai.errors import ConfigError, EngineError
from cai.report.written import best_of, read_lines, unscored
from cai.training.data import StageData
from cai.training.online import gold, lines, monitors
from cai.training.online.drift import Drift
from cai.training.online.held_out import Answer, hold_out, tell_sources
from cai.training.online.limits import collapsed, over_kl
from cai.training.online.rewards import Rewards
from cai.training.online.rollouts import Logged, Rollout, Rollouts, weighted

TEXTS = st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12).map(" ".join), min_size=1, max_size=5)


# ---------------------------------------------------------------------------------------------------- monitors
@given(TEXTS, st.integers(1, 3))
def test_distinct_n_and_repetition_are_those_of_naive_code(texts, n):
    grams = [[tuple(one.split()[at : at + n]) for at in range(len(one.split()) - n + 1)] for one in texts]
    everything = [gram for one in grams for gram in one]
    wanted = len(set(everything)) / len(everything) if everything else None
    assert monitors.distinct(texts, n) == wanted
    again = [sum(count - 1 for count in Counter(one).values()) / len(one) for one in grams if one]
    assert monitors.repetition(texts, n) == (pytest.approx(sum(again) / len(texts)) if again else None)


def test_words_of_several_scripts():
    assert monitors.words("Don't STOP, 3 times!") == ["don't", "stop", "3", "times"]
    assert monitors.words("你好 world") == ["你", "好", "world"]


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("As an AI language model, I have no opinions.", True),
        ("I cannot do this.", True),
        ("I apologize, that is nothing I can assist with", True),
        ("Sure! Knead the dough for ten minutes.", False),
        ("The door would not open. " * 20 + "I can't say why.", False),
        ("You can't boil an egg in a microwave.", False),
    ],
)
def test_refusals(text, refuses):
    assert monitors.refusals([text]) == float(refuses)


def test_language_changes_are_told_where_both_texts_are_long_enough():
    pytest.importorskip("py3langid")
    english, german = "How do I bake a loaf of bread at home?", "Zuerst wird der Teig lange geknetet und dann gebacken."
    assert monitors.language_changes([english, english, english], [german, english, "Ja."]) == 0.5
    assert monitors.language_changes([english], ["Ja."]) is None


def described(
    texts: list[str], prompts: list[str] | None = None, rewards: list[float | None] | None = None
) -> dict[str, float]:
    """Of completions to other prompts, unless told which."""
    prompts = prompts or [f"prompt {one}" for one in range(len(texts))]
    return monitors.describe(prompts, texts, rewards or [None] * len(texts), prompts)


def test_a_rollout_is_described_and_completions_without_a_reward_say_nothing_of_it():
    found = described(["one two", "one two three four", "", "one"], ["p", "p", "q", "q"], [1.0, 3.0, None, 0.0])
    assert (found["completions"], found["empty"], found["words"]) == (4, 0.25, 1.75)
    assert found["reward"] == pytest.approx(4 / 3)
    assert found["length_correlation_overall"] == pytest.approx(np.corrcoef([1, 3, 0], [2, 4, 1])[0, 1])


@pytest.mark.parametrize("text", ["Yes.", "!" * 200, "\N{GRINNING FACE}" * 100, "a" * 400, "\n. " * 60, "no " * 50])
def test_completions_that_all_say_the_same_are_a_collapse(text):
    normal = [f"Answer number {one} is about something else, {7 * one}." for one in range(16)]
    first, last = (described(texts) for texts in (normal, [text] * 16))
    assert collapsed([first] * 6) == ""
    assert collapsed([first] * 3 + [last] * 3)


@pytest.mark.parametrize("unit", ["a", "ab", "xyz"])
def test_a_word_that_never_ends_is_repetition(unit):
    prompts = [f"prompt {one}" for one in range(16)]
    longer = [unit * (50 + one) for one in range(16)]
    assert monitors.repetition(longer) > 0.9
    assert monitors.repetition(["Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch"]) < 0.1
    assert monitors.repetition(["aaaa"]) is None
    assert monitors.repetition([*map(str, range(63)), "-" * 60]) < 0.05, "one of many"
    assert monitors.alike(prompts, longer) == 0.0


def test_a_text_without_a_word_is_empty():
    texts = ["!!! ?", "\n. ", "", "\N{GRINNING FACE}", "1 + 1"]
    assert described(texts)["empty"] == 0.8


def test_rewards_that_differ_by_rounding_go_with_no_length():
    texts = ["a " * (one + 1) for one in range(24)]
    prompts = [f"p{one}" for one in range(6) for _ in range(one + 1)] + ["p6"] * 3
    found = described(texts, prompts, [0.7] * 24)
    assert not [name for name in found if name.startswith("length_correlation")]
    json.dumps(found, allow_nan=False)


def test_the_same_text_counts_between_different_prompts_alone():
    assert monitors.alike(["p", "p", "q", "q"], ["yes", "yes", "no", "no"]) == 0.0
    assert monitors.alike(["p", "p", "q", "q"], ["yes", "yes", "yes", "no"]) == 0.5
    assert monitors.alike(["p", "p"], ["yes", "yes"]) is None


def test_what_the_trainer_measured_is_taken_once_and_kl_is_in_nats_a_completion():
    metrics = {
        "completions/clipped_ratio": [0.25],
        "completions/mean_length": [10.0],
        "entropy": [1.0, 3.0],
        "kl": [0.5, math.nan],
    }
    logged = Logged(SimpleNamespace(_metrics={"train": metrics}))
    assert logged.take() == {"unfinished": 0.25, "tokens": 10.0, "entropy": 2.0, "kl": 5.0}
    assert logged.take() == {}
    metrics["entropy"].append(4.0)
    metrics["objective/kl"] = [7.0]
    assert logged.take() == {"entropy": 4.0, "kl": 7.0}, "PPO tells it itself"
    for values in metrics.values():
        values[:] = [1.0]
    logged.forget()
    assert logged.take() == {"unfinished": 1.0, "tokens": 1.0, "entropy": 1.0, "kl": 1.0}
    stats = {
        "val/contain_eos_token": [0.75],
        "rewards/chosen": [0.3],
        "rewards/rejected": [0.1],
        "beta": [0.1],
        "objective/kl": [99.0],
    }
    assert Logged(SimpleNamespace(stats=stats)).take() == pytest.approx({"unfinished": 0.25, "kl": 2.0})


def test_rewards_are_summed_by_weight_and_none_has_no_part():
    assert weighted([[1.0, None, None], [2.0, 3.0, None]], [2.0, 0.5]) == [3.0, 1.5, None]


# ---------------------------------------------------------------------------------------------------- limits
def test_the_kl_has_to_be_over_its_limit_in_three_rollouts():
    def of(*values: float) -> list[dict[str, float]]:
        return [{"kl": one} for one in values]

    assert over_kl(of(1, 60, 1, 60, 60), 50) == ""
    assert over_kl([*of(60, 60), {}, {}], 50) == ""
    assert "is 70 nats a completion, over limits.kl (50)" in over_kl([*of(60, 60), {}, *of(70)], 50)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"distinct_2": 0.6}, {"distinct_2": 0.14}, "alike"),
        ({"distinct_2": 0.6}, {"distinct_2": 0.2}, ""),
        ({"repetition": 0.1}, {"repetition": 0.6}, "said before"),
        ({"repetition": 0.45}, {"repetition": 0.6}, ""),
        ({"empty": 0.0}, {"empty": 0.8}, "no word"),
        ({"alike": 0.1}, {"alike": 0.8}, "80 % of pairs of completions to different prompts are the same text"),
        ({"alike": 0.6}, {"alike": 0.8}, ""),
        ({"unfinished": 0.3}, {"unfinished": 1.0}, "no end"),
        ({"unfinished": 0.9}, {"unfinished": 1.0}, ""),
        ({}, {"empty": 1.0}, ""),
    ],
)
def test_a_collapse_is_told_in_comparison_with_the_beginning(before, after, says):
    assert collapsed([before] * 3 + [after] * 2) == ""
    told = collapsed([before] * 3 + [after] * 3)
    assert says in told if says else told == ""
    assert collapsed([before] * 3 + [after, after, before]) == ""


def test_a_constant_reward_is_told_once_and_not_before_enough_was_seen():
    rollouts = Rollouts(["x", "y"], [1.0, 1.0])
    told = [rollouts.constant(1, worth([[0.5] * 16, [1.0, 2.0] * 8])) for _ in range(4)]
    assert [len(one) for one in told] == [0, 1, 0, 0]
    assert told[1][0].startswith("reward 'x' is the same (0.5) for all 32 completions so far: nothing can be learned from it")
    nothing = Rollouts(["z"], [1.0]).constant(1, worth([[None] * 32]))
    assert nothing == ["reward 'z' has no number for any of 32 completions so far: nothing can be learned from it"]


# ---------------------------------------------------------------------------------------------------- notes
@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"refusals": 0.1}, {"refusals": 0.4}, "40 % of completions refuse; it was 10 % at the beginning"),
        ({"refusals": 0.5}, {"refusals": 0.7}, ""),
        ({"language_changes": 0.0}, {"language_changes": 0.5}, "50 % of completions are in another language than their prompt"),
        ({"words": 40.0}, {"words": 81.0}, "81 words a completion; it was 40 at the beginning"),
        ({"words": 40.0}, {"words": 19.0}, "19 words a completion"),
        ({"words": 40.0}, {"words": 70.0}, ""),
        ({"entropy": 2.0}, {"entropy": 0.4}, "0.4 nats a token are the policy's entropy; it was 2 at the beginning"),
        ({"entropy": 2.0}, {"entropy": 9.0}, "9 nats a token"),
        ({"length_correlation_overall": 0.1}, {"length_correlation_overall": 0.6}, "the reward goes with length"),
        ({"length_correlation_within_prompts": 0.1}, {"length_correlation_within_prompts": -0.6}, "goes against length"),
        ({"length_correlation_overall": 0.5}, {"length_correlation_overall": 0.7}, ""),
        ({}, {"refusals": 1.0}, ""),
    ],
)
def test_what_moves_far_from_the_beginning_is_told_once(before, after, says):
    drift = Drift()
    assert drift.new([before] * 3 + [after] * 2) == []
    assert drift.new([before] * 3 + [after, after, before]) == []
    told = drift.new([before] * 3 + [after] * 3)
    assert [says in one for one in told] == [True] * bool(says)
    assert drift.new([before] * 3 + [after] * 4) == []


def worth(rewards: list[Rewards]) -> Rollout:
    """Completions of one prompt with these rewards."""
    count = len(rewards[0])
    return Rollout(["p"] * count, ["t"] * count, rewards, ["d"] * count)


def test_what_has_weight_0_is_no_reward():
    assert weighted([[None, 1.0], [5.0, 5.0]], [1.0, 0.0]) == [None, 1.0]
    for weights, rewards in (([1.0, 0.0], [[None, None], [5.0, 5.0]]), ([1.0, 1.0], [[None, None], [None, None]])):
        with pytest.raises(EngineError, match=r"^rewards 'x', 'y': no number for any of 2 completions"):
            Rollouts(["x", "y"], weights).check(worth(rewards))
    Rollouts(["x", "y"], [1.0, 1.0]).check(worth([[None, None], [None, 0.0]]))


def test_dialogues_that_end_with_the_same_words_are_several():
    rollouts = Rollouts(["x"], [1.0])
    asked = [[{"role": "system", "content": str(one % 2)}, {"role": "user", "content": "Go on."}] for one in range(4)]
    rollouts.add(0, asked, ["yes", "yes", "yes", "no"], [1.0, 2.0, 3.0, 4.0])
    rollout = rollouts.take()
    assert rollout is not None
    assert (rollout.prompts, len(set(rollout.dialogues))) == (["Go on."] * 4, 2)
    assert rollouts.line(1, rollout, {})["alike"] == 0.5
    assert len({one["dialogue"] for one in rollouts.samples(1, rollout)}) == 2


def test_completions_without_a_reward_are_counted_and_told_from_a_tenth_on():
    rollouts, drift = Rollouts(["x", "y"], [1.0, 1.0]), Drift()
    line = rollouts.line(1, worth([[None] * 3 + [1.0] * 17, [2.0] * 20]), {})
    assert line["unscored"] == {"x": 3, "y": 0}
    assert drift.new([line]) == [], "of too few"
    assert drift.new([line, line]) == ["reward 'x' had no number for 6 of 40 completions so far"]
    assert Drift().new([{"completions": 40, "unscored": {"x": 4}}]) == []
    assert unscored([line, {"completions": 9}, line]) == {"x": (6, 40)}


# ---------------------------------------------------------------------------------------------------- gold
def series(*measures: tuple[float, list[float]]) -> list[dict[str, Any]]:
    """Lines of gold measures: the proxy's mean, and gold of each prompt."""
    return [
        gold.measured(step, [Answer(n, "a b", [proxy], one) for n, one in enumerate(golds)], [1.0], 0)
        for step, (proxy, golds) in enumerate(measures)
    ]


def noisy(mean: float, seed: int = 0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 0.3, 32))


def test_it_stops_where_gold_falls_twice_with_significance_while_the_proxy_rises():
    rising = series((0, noisy(0)), (1, noisy(1)), (2, noisy(2)))
    fallen = series((2.5, noisy(1, seed=2)), (3, noisy(1, seed=3)))
    within_noise, less_proxy = series((2.5, noisy(1.9, seed=1)), (1.5, noisy(1)))
    assert gold.over_optimised(rising) == ""
    assert gold.over_optimised([*rising, fallen[0]]) == "", "once is not enough"
    assert gold.over_optimised([*rising, within_noise, within_noise]) == ""
    assert gold.over_optimised([*rising, fallen[0], less_proxy]) == "", "the proxy has fallen too"
    assert gold.over_optimised([*rising, fallen[0], *series((4, noisy(2.1)))]) == "", "it is better again"
    told = gold.over_optimised([*rising, *fallen])
    assert "its best, 1.95 at step 2, in 2 measures in a row (p " in told
    assert "while the reward has risen from 2 to 3" in told
    for rise, stops in ((0.0, False), (0.1, True)):
        proxies = (2 + rise + np.random.default_rng(0).normal(0, 0.2, 32)).tolist()
        by_chance = {**fallen[1], "proxy": 2.1, "proxies": proxies}
        assert bool(gold.over_optimised([*rising, fallen[0], by_chance])) == stops


def test_the_reward_has_risen_where_that_of_the_same_prompts_has():
    easy = [0.0] * 16 + [10.0] * 16
    for change, wanted in ((0.1, True), (-0.1, False), (0.0, False)):
        before, later = ({"proxies": [one + times * change for one in easy]} for times in (0, 1))
        assert gold.has_risen(before, later) == wanted
        later["proxies"][:16] = [None] * 16
        assert gold.has_risen(before, later) == wanted
    noise = np.random.default_rng(0).normal(0, 1.0, 32)
    for rise, wanted in ((0.2, False), (1.0, True)):
        assert gold.has_risen({"proxies": easy}, {"proxies": (easy + noise + rise).tolist()}) == wanted
    few = [None] * 17 + [1.0] * 15
    assert not gold.has_risen({"proxies": few}, {"proxies": [one and 2.0 for one in few]}), "of fewer than sixteen"


def is_one(draw: np.random.Generator) -> Any:
    return (draw.random(64) < 0.9).astype(float)


@pytest.mark.parametrize(("answers", "fall"), [(lambda draw: draw.normal(0.0, 1.0, 64), 0.5), (is_one, 0.3)])
def test_flat_gold_seldom_stops_a_training_and_a_fall_soon_does(answers, fall):
    def told(falls_at: int, draw: np.random.Generator) -> int | None:
        """At which of 11 measures it stops."""
        given: list[dict[str, Any]] = []
        for place in range(11):
            golds = (answers(draw) - fall * (place >= falls_at)).tolist()
            proxy = {"proxy": float(place), "proxies": [float(place)] * 64}
            given.append({"step": place, "gold": math.fsum(golds) / len(golds), **proxy, "golds": golds})
            if gold.over_optimised(given):
                return place
        return None

    draw = np.random.default_rng(0)
    assert sum(told(11, draw) is not None for _ in range(60)) <= 5
    assert sum(told(8, draw) in (8, 9, 10) for _ in range(20)) >= 14


def test_the_chance_of_a_fall_is_that_of_permuted_numbers():
    """Twelve of 64 prompts, each with one number of three that is 0: by chance none of these is the best's."""
    best = [1.0] * 64
    one, other = [0.0] * 6 + [1.0] * 58, [1.0] * 6 + [0.0] * 6 + [1.0] * 52
    before, *later = series((0, best), (1, one), (2, other))
    change, chance = gold.fall(before, later, 0.001)
    assert change == pytest.approx(-12 / 128)
    assert chance == pytest.approx((2 / 3) ** 12, rel=0.5)
    assert gold.fall(before, later, 1e-5)[1] == pytest.approx((2 / 3) ** 12, rel=0.05)


def test_smaller_chances_than_permutations_tell_are_those_of_their_variance():
    draw = np.random.default_rng(0)
    for size, near in ((0.9, 1e-4), (1.3, 1e-7)):
        rows = np.column_stack([draw.normal(0, 1, 64), draw.normal(-size, 1, (64, 2))])
        orders = draw.permuted(np.broadcast_to(rows, (4000, 64, 3)), axis=2)
        changes = (orders[:, :, 1:].mean(axis=2) - orders[:, :, 0]).mean(axis=1)
        fallen = rows[:, 1:].mean() - rows[:, 0].mean()
        change, chance = gold.fall({"golds": rows[:, 0].tolist()}, [{"golds": one.tolist()} for one in rows.T[1:]], 1e-9)
        assert change == pytest.approx(fallen)
        assert math.log10(chance) == pytest.approx(math.log10(stats.norm.cdf(fallen / changes.std())), rel=0.1)
        assert chance < near


def test_the_difference_is_that_of_the_same_prompts():
    easy = [0.0] * 16 + [10.0] * 16
    shifted = [one - 0.1 - 0.01 * (n % 3) for n, one in enumerate(easy)]
    before, after, again = series((0, easy), (1, shifted), (2, shifted))
    assert before["low"] < after["gold"] < before["high"], "not to be seen in the means"
    assert gold.over_optimised([before, after, again])
    assert gold.fall(before, [after, again], 0.05)[0] == pytest.approx(after["gold"] - before["gold"])


def test_prompts_without_a_gold_number_are_left_out_and_by_fewer_than_sixteen_nothing_is_stopped():
    before, after = series((0, [2.0, None, 1.0, *[5.0] * 15]), (1, [0.0, 0.5, None, *[4.5] * 15]))
    change, chance = gold.fall(before, [after], 0.001)
    assert change == pytest.approx(-9.5 / 16)
    assert chance == pytest.approx(0.5**16, abs=1e-3)
    assert gold.fall(before, [after, {"golds": [None, *[1.0] * 17]}], 0.05) == (0.0, 1.0)
    for count, stops in ((15, False), (16, True)):
        alike = series((0, [1.1] * count), (1, [0.5] * count), (2, [0.5] * count))
        assert bool(gold.over_optimised(alike)) == stops
    nothing = series((0, [None, None]))
    assert (nothing[0]["gold"], best_of(nothing), gold.over_optimised(nothing)) == (None, None, "")


def test_where_too_few_prompts_have_numbers_each_time_that_is_said_since_gold_stops_nothing_then():
    whole, half, other = series((0, [1.0] * 24), (1, [0.5] * 16 + [None] * 8), (2, [None] * 8 + [0.5] * 16))
    assert gold.gaps([whole], True) == gold.gaps([whole, half], True) == gold.gaps([whole, half, other], False) == {}
    assert gold.gaps([whole, half, other], True)["few"] == (
        "gold had a number for 8 of 24 prompts in its best measure and in both of the last ones, at step 2: too few to stop "
        "the training by"
    )
    unrewarded = {**other, "golds": whole["golds"], "proxies": [1.0] * 15 + [None] * 9}
    assert gold.gaps([whole, unrewarded], True)["proxy"] == (
        "rewards had a number for 15 of 24 held-out answers at the best gold and at step 2: too few to stop the training by"
    )
    nothing, few, fewest = series((0, [None] * 24), (1, [1.0] * 15 + [None] * 9), (2, [None, *[1.0] * 9]))
    assert gold.gaps([few], True)["few"] == "gold had a number for 15 of 24 answers at step 1: too few to stop the training by"
    told = {"gold": "gold had no number for any answer at step 0: nothing is measured"}
    assert gold.gaps([nothing], False) == gold.gaps([whole, nothing], True) == told
    assert gold.gaps([whole, nothing, half], True) == {}, "which the next measure mends"
    assert gold.gaps([fewest], True) == {}, "of few prompts that is told when they are held out"


def test_where_the_rewards_have_no_number_for_held_out_answers_that_is_said_since_gold_stops_nothing_then():
    (line,) = series((None, [1.0] * 16))
    assert line["proxy"] is None
    assert gold.gaps([line], False) == {}
    assert gold.gaps([line], True) == {
        "proxy": "no reward had a number for any held-out answer at step 0: by this measure gold stops nothing"
    }


def test_measures_by_another_function_are_not_compared():
    by = {"functions": {"gold": "g@1", "reward": ["r@1"]}, "proxy_low": 0.5, "proxy_high": 2.5, "proxies": [1.0, 2.0]}
    lines = [{**one, **by} for one in series((1, noisy(1)), (2, noisy(0)))]
    assert gold.comparable(lines, {"gold": "g@1", "reward": ["r@1"]}) == lines
    assert gold.comparable(lines, {"gold": "g@2", "reward": ["r@1"]}) == []
    now = {"gold": "g@1", "reward": ["r@2"]}
    mended = gold.comparable(lines, now)
    assert [(one["gold"], one["golds"]) for one in mended] == [(one["gold"], one["golds"]) for one in lines]
    told = [(one["proxy"], one.get("proxy_low"), one.get("proxies"), one["functions"]) for one in mended]
    assert told == [(None, None, None, now)] * 2
    assert gold.comparable(mended, now) == mended


def test_where_the_reward_was_another_one_at_the_best_it_is_compared_with_the_first_since():
    best, *rest = series((9, noisy(2)), (1, noisy(1)), (2, noisy(1, seed=2)), (3, noisy(1, seed=3)))
    lines = [{**best, "proxy": None}, *rest]
    assert gold.over_optimised(lines[:2]) == ""
    assert "while the reward has risen from 1 to 3" in gold.over_optimised(lines)
    assert gold.over_optimised([*lines[:3], {**lines[3], "proxies": [1.0] * 32}]) == ""
    unknown = [{**one, "proxy": None} for one in lines]
    assert gold.over_optimised(unknown) == gold.over_optimised([*unknown[:3], lines[3]]) == "", "nothing to compare with"


def test_a_measure_with_few_numbers_is_not_the_best():
    whole, few, more = series(
        (0, [1.0, 2.0, 1.0, 2.0, 1.0]), (1, [9.0, None, None, None, None]), (2, [None, 1.5, 1.5, 2.0, 0.5])
    )
    assert best_of([whole, few]) == whole
    assert best_of([few, whole]) == whole, "which says more"
    assert best_of([whole, more]) == whole, "by the prompts that both have a number for"
    assert best_of([more, few]) == more
    of_some = series(*((step, [value, None, None, None]) for step, value in enumerate([0.0, 2.0, 1.0])))
    assert best_of(of_some) == of_some[1], "most prompts never have a number"


def test_the_first_of_several_best_ones_is_the_best():
    found = best_of(series((0, [1.0]), (1, [2.0]), (2, [2.0])))
    assert found is not None
    assert found["step"] == 1


# ---------------------------------------------------------------------------------------------------- held-out prompts
def prompts(*texts: str) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": one}], "columns": "{}"} for one in texts])


def of(rows: Dataset) -> list[str]:
    return [one[-1]["content"] for one in rows["prompt"]]


def test_held_out_prompts_are_not_trained_on():
    train_rows = prompts(*"abcdefghij", "a", "b")
    found = hold_out(StageData(train_rows, None, ()), 64, 0)
    assert len(of(found.prompts)) == 2
    assert set(of(found.train)) == set("abcdefghij") - set(of(found.prompts))
    assert of(hold_out(StageData(train_rows, None, ()), 64, 0).prompts) == of(found.prompts)
    assert any(of(hold_out(StageData(train_rows, None, ()), 64, seed).prompts) != of(found.prompts) for seed in range(1, 5))
    assert len(of(hold_out(StageData(train_rows, None, ()), 1, 0).prompts)) == 1
    with pytest.raises(ConfigError, match="one prompt alone; add more"):
        hold_out(StageData(prompts("a", "a"), None, ()), 1, 0)


def test_test_rows_are_held_out_where_they_are_others():
    apart = hold_out(StageData(prompts(*"abcde"), prompts(*"xyza"), ()), 64, 0)
    assert (of(apart.train), of(apart.prompts)) == (list("abcde"), list("xyz"))
    same = hold_out(StageData(prompts(*"abcde"), prompts(*"abcde"), ()), 64, 0)
    assert set(of(same.train)) | set(of(same.prompts)) == set("abcde")
    assert not set(of(same.train)) & set(of(same.prompts))


def test_prompts_that_are_taken_from_training_are_told_of_their_sources():
    sources = ({"source": "x", "train": 6, "test": 2}, {"source": "y", "train": 6, "test": 0})
    data = StageData(prompts(*"abcdee", *"efghij"), None, sources)
    held = hold_out(data, 2, 0)
    told = tell_sources(data, held._replace(train=prompts(*"abcdfghi"), prompts=prompts(*"ej")))
    assert told == ({"source": "x", "train": 4, "test": 3}, {"source": "y", "train": 4, "test": 1})
    told = tell_sources(data, held)
    assert sum(one["train"] for one in told) == len(held.train)
    assert sum(one["test"] for one in told) == len(held.prompts) + 2


def test_lines_of_later_steps_are_dropped_and_a_broken_one(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert lines.keep_until(file, 3) == []
    lines.append(file, {"step": 1}, {"step": 2, "text": "\ud800"}, {"step": 3})
    file.write_text(file.read_text() + '{"step": 2, "te')
    assert [one["step"] for one in lines.keep_until(file, 2)] == [1, 2]
    assert [one["step"] for one in read_lines(file)] == [1, 2]


def test_a_rollout_whose_completions_are_worth_the_same_is_told_once():
    def told(*totals: list[float | None]) -> list[str]:
        rollouts = Rollouts(["x"], [2.0])
        return [text for one in totals for text in rollouts.constant(3, worth([one]))]

    assert told([1.0, 2.0], [1.0], [1.0, None]) == []
    (text,) = told([1.0, 2.0], *[[0.5, 0.5, None]] * 20)
    assert text.startswith("all 2 completions of the rollout at step 3 have the same reward (1): nothing can be learned")
    opposed = Rollouts(["x", "y"], [1.0, 1.0]).constant(1, worth([[1.0, 2.0], [2.0, 1.0]]))
    assert opposed[0].startswith("all 2 completions of the rollout at step 1 have the same reward (3)")
