"""Planted judges, of known accuracy, bias and noise, are measured for what they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import brier_score_loss, log_loss

from cai.errors import VerdictError
from cai.evaluation import Agreement, measure
from cai.intervals import difference, share
from cai.judging.base import leaning, principle_verdict, verdict
from cai.types import Completion, Message, PrincipleVerdict, Prompt, Record, Verdict

Draw = Callable[[np.random.Generator], Sequence[PrincipleVerdict]]


def vote(quality: float, bias: float = 0.0, name: str = "q0", judge: str = "choice", weight: float = 1.0) -> PrincipleVerdict:
    """A principle's verdict in both orders: `quality` is for people's choice, `bias` for what is shown first."""
    readings = [((quality + shown) / 2 - 1, -(quality + shown) / 2 - 1) for shown in (bias, -bias)]
    return principle_verdict(judge, name, weight, readings, [leaning(one - other) for one, other in readings])


def pair(
    number: int, votes: Sequence[PrincipleVerdict], lengths: tuple[int, int] = (30, 20), prompt: str | None = None
) -> Record:
    """A judged pair; each is of a prompt of its own where none is named."""
    texts = tuple(Completion("x" * length, "stop", 5, 3) for length in lengths)
    named = (("candidate-0", ""), ("candidate-1", ""))
    asked = Prompt(f"pair-{number}", (Message("user", prompt or f"prompt {number}"),))
    return Record(asked, texts, (), (verdict(named, "samples", votes),))


def planted(count: int, draw: Draw, prompts: int | None = None, seed: int = 0) -> list[Record]:
    generator = np.random.default_rng(seed)
    return [pair(n, draw(generator), prompt=f"prompt {n % (prompts or count)}") for n in range(count)]


def saying(probabilities: Iterable[float]) -> list[Record]:
    """Pairs with verdicts of just these probabilities."""
    records = []
    for number, one in enumerate(probabilities):
        said = PrincipleVerdict("q0", 1.0, ((one, 1 - one), (one, 1 - one)), one, "choice")
        plain = pair(number, [said])
        records.append(
            Record(plain.prompt, plain.candidates, (), (Verdict("candidate-0", "candidate-1", "samples", one, (said,)),))
        )
    return records


def test_a_known_accuracy_is_found_exactly_and_ties_are_half():
    found = measure(saying([0.9] * 6 + [0.2] * 2 + [0.5] * 2), {"no verdict": 3, "too long": 1, "never": 0})
    assert found.accuracy.value == 0.7
    assert (found.pairs, found.prompts, found.ties) == (10, 10, 2)
    assert found.failures == {"no verdict": 3, "too long": 1}
    assert found.sureness == pytest.approx((6 * 0.9 + 2 * 0.8 + 2 * 0.5) / 10)
    assert found.accuracy.low is not None
    assert found.accuracy.high is not None
    assert 0.3 < found.accuracy.low < 0.7 < found.accuracy.high < 1


def test_a_noisy_judge_is_as_right_as_its_noise_lets_it():
    found = measure(planted(3000, lambda draw: [vote(1 + draw.normal(0, 1))]), {})
    assert found.accuracy.value == pytest.approx(norm.cdf(1), abs=0.02)
    assert found.accuracy.low is not None
    assert found.accuracy.high is not None
    width = found.accuracy.high - found.accuracy.low
    assert width == pytest.approx(2 * 1.96 * math.sqrt(norm.cdf(1) * norm.cdf(-1) / 3000), rel=0.1)


def test_a_judge_that_only_likes_what_is_shown_first_is_a_coin():
    found = measure(planted(400, lambda draw: [vote(0, bias=2, name=name) for name in "ab"]), {})
    assert found.accuracy.value == 0.5
    assert found.ties == 400
    assert found.first_position_rate == 1
    assert found.order_flip_rate == found.verdict_flip_rate == 1
    assert 0.4 < found.usual.value < 0.6, "the usual judge must not profit from people's choice being the first of the pair"
    assert {one.flip_rate for one in found.principles} == {1.0}


def test_a_judge_that_likes_what_is_shown_last_is_seen():
    found = measure([pair(n, [vote(1, bias=-3)]) for n in range(4)], {})
    assert found.first_position_rate == 0
    assert found.accuracy.value == 1


def test_a_judge_of_pairs_named_both_ways_is_half_right():
    draws = np.random.default_rng(3).normal(0, 2, 300)
    records = [pair(n, [vote(one, bias=1)]) for n, one in enumerate(draws)]
    turned = [msgspec.structs.replace(one, verdicts=(one.verdicts[0].swap(),)) for one in records]
    named_anew = [
        msgspec.structs.replace(one, verdicts=(msgspec.structs.replace(verdict, first=verdict.second, second=verdict.first),))
        for one in turned
        for verdict in one.verdicts
    ]
    found = measure(records + named_anew, {})
    alone, swapped = measure(records, {}), measure(named_anew, {})
    assert found.accuracy.value == 0.5
    assert alone.accuracy.value == pytest.approx(1 - swapped.accuracy.value)
    assert alone.order_flip_rate == swapped.order_flip_rate
    assert alone.first_position_rate == swapped.first_position_rate


def test_readings_that_prefer_nothing_are_half_right_and_half_first():
    found = measure([pair(n, [vote(0)]) for n in range(3)], {})
    assert found.usual.value == found.first_position_rate == 0.5
    assert found.order_flip_rate == found.verdict_flip_rate == 0


def test_orders_that_disagree_under_one_principle_may_agree_together():
    votes = [vote(3, name="a"), vote(0.1, bias=1, name="b")]
    found = measure([pair(0, votes), pair(1, votes)], {})
    assert found.order_flip_rate == 0.5
    assert found.verdict_flip_rate == 0
    heavy = [vote(3, name="a", weight=0.1), vote(0.1, bias=1, name="b", weight=9)]
    assert measure([pair(0, votes), pair(1, heavy)], {}).verdict_flip_rate == 0.5


def test_many_principles_in_both_orders_gain_over_the_usual_way():
    def draw(generator: np.random.Generator) -> list[PrincipleVerdict]:
        quality = generator.normal(1, 1)
        return [vote(quality + generator.normal(0, 2), generator.normal(2, 1), f"q{k}") for k in range(8)]

    found = measure(planted(800, draw), {})
    assert found.gain.value == pytest.approx(found.accuracy.value - found.usual.value)
    assert found.gain.low is not None
    assert found.gain.low > 0.05
    assert found.usual.value < found.principles[0].accuracy.value < found.accuracy.value


def test_the_usual_judge_draws_one_principle_evenly_whatever_their_order():
    right, wrong = vote(1, name="a"), vote(-1, name="b")
    found = measure([pair(n, [right, right, wrong]) for n in range(600)], {})
    assert found.usual.value == pytest.approx(2 / 3, abs=0.06)
    forward = measure([pair(n, [right, wrong]) for n in range(50)], {})
    backward = measure([pair(n, [wrong, right]) for n in range(50)], {})
    assert forward.usual == backward.usual
    assert 0 < forward.usual.value < 1


def test_without_orders_nothing_is_said_of_them():
    single = principle_verdict("reward-model", "reward", 1.0, [(2.0, 1.0)], [leaning(1.0)])
    found = measure([pair(n, [single]) for n in range(3)], {})
    assert found.order_flip_rate is None
    assert found.verdict_flip_rate is None
    assert found.first_position_rate is None
    assert found.principles[0].flip_rate is None
    assert found.usual.value == 1


def test_verdicts_without_orders_do_not_thin_out_those_with():
    single = principle_verdict("checks", "short", 1.0, [(1.0, 0.0)], [0.5])
    found = measure([pair(0, [single, vote(0, bias=1)]), pair(1, [single])], {})
    assert found.order_flip_rate == found.verdict_flip_rate == found.first_position_rate == 1


def test_calibration_of_a_calibrated_and_of_a_boastful_judge():
    generator = np.random.default_rng(1)
    sure = generator.uniform(0.5, 1, 20_000)
    right = generator.random(20_000) < sure
    calibrated = measure(saying(np.where(right, sure, 1 - sure).tolist()), {})
    assert calibrated.expected_calibration_error < 0.015
    assert sum(one.pairs for one in calibrated.reliability) == 20_000
    assert [round(one.low, 2) for one in calibrated.reliability] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert all(one.low <= one.confidence <= one.high for one in calibrated.reliability)
    boastful = measure(saying([0.99] * 6 + [0.01] * 4), {})
    assert boastful.expected_calibration_error == pytest.approx(0.39)
    assert [(one.pairs, one.accuracy) for one in boastful.reliability] == [(10, 0.6)]


def test_errors_of_opposite_bins_do_not_cancel():
    found = measure(saying([0.95 + 1e-9] * 5 + [0.05 - 1e-9] * 5 + [0.54] * 10), {})
    assert found.expected_calibration_error == pytest.approx((10 * 0.45 + 10 * 0.46) / 20, abs=1e-6)


def test_scores_are_those_of_scikit_learn():
    said = np.random.default_rng(2).uniform(0.01, 0.99, 200)
    found = measure(saying(said.tolist()), {})
    truth = np.ones(200)
    assert found.brier == pytest.approx(brier_score_loss(truth, said))
    assert found.log_loss == pytest.approx(log_loss(truth, said, labels=[0, 1]))
    assert measure(saying([0.0, 1.0]), {}).log_loss == pytest.approx(20 * math.log(2))


def test_length_is_told_from_judgement():
    """A judge that goes by length alone, where people chose the longer in three of four."""
    lengths = [(40 + 10 * n, 20) if n % 4 else (20, 40 + 10 * n) for n in range(120)]
    records = [pair(n, [vote(1.0 if one > other else -1.0)], (one, other)) for n, (one, other) in enumerate(lengths)]
    length = measure(records, {}).length
    assert length.always_longer.value == 0.75
    assert length.always_shorter.value == 0.25
    assert {name: (one.value, one.pairs) for name, one in length.by_chosen.items()} == {
        "longer": (1.0, 90),
        "shorter": (0.0, 30),
    }
    assert [one.accuracy.pairs for one in length.by_difference] == [40, 40, 40]
    assert [(one.shortest, one.longest) for one in length.by_difference] == [(20, 410), (420, 810), (820, 1210)]


def test_the_thirds_of_length_have_their_own_accuracies():
    far = [pair(n, [vote(1 if n < 20 else -1)], (20 + n, 20)) for n in range(30)]
    assert [one.accuracy.value for one in measure(far, {}).length.by_difference] == [1, 1, 0]
    alike = measure([pair(n, [vote(1)], (7, 7)) for n in range(5)], {}).length
    assert [(one.shortest, one.longest, one.accuracy.pairs) for one in alike.by_difference] == [(0, 0, 5)]
    assert alike.always_longer.value == alike.always_shorter.value == 0.5
    assert list(alike.by_chosen) == ["equal"]


def test_principles_each_alone():
    votes = [[vote(3, name="strong"), vote(-1, name="contrary", bias=2), vote(0, name="mute")]] * 8
    votes += [[vote(-3, name="strong")]] * 2
    strong, contrary, mute = measure([pair(n, one) for n, one in enumerate(votes)], {}).principles
    assert (strong.id, strong.accuracy.value, strong.accuracy.pairs, strong.flip_rate, strong.opposed) == (
        "strong",
        0.8,
        10,
        0,
        0,
    )
    assert strong.leaning == pytest.approx(leaning(3))
    assert (contrary.accuracy.value, contrary.accuracy.pairs, contrary.flip_rate, contrary.opposed) == (0, 8, 1, 1)
    assert (mute.accuracy.value, mute.leaning, mute.opposed) == (0.5, 0, 0)
    assert mute.accuracy.low is None


@pytest.mark.parametrize("qualities", [(1, 2), (-1, 1), (0, 0, 1)])
def test_a_panel_of_one_mind_has_alpha_one(qualities: tuple[float, ...]):
    votes = [[vote(quality, judge=judge) for judge in ("small", "large", "other")] for quality in qualities]
    panel = measure([pair(n, one) for n, one in enumerate(votes)], {}).panel
    assert panel is not None
    assert panel.judges == ("small", "large", "other")
    assert panel.alpha == 1


def test_a_panel_agrees_no_more_than_its_members_do():
    """Two members, each right in nine of ten, agree in 0.82 of the pairs: 0.64 above chance, whichever is called the first."""

    def draw(generator: np.random.Generator) -> list[PrincipleVerdict]:
        return [vote(1 if generator.random() < 0.9 else -1, judge=judge) for judge in ("small", "large")]

    panel = measure(planted(4000, draw), {}).panel
    assert panel is not None
    assert panel.alpha == pytest.approx(0.64, abs=0.04)

    coins = measure(planted(4000, lambda draw: [vote(draw.normal(), judge=judge) for judge in "ab"]), {}).panel
    assert coins is not None
    assert coins.alpha == pytest.approx(0, abs=0.04)


def test_a_panel_without_two_opinions_on_a_pair_has_no_alpha():
    apart = measure([pair(0, [vote(1, judge="a")]), pair(1, [vote(-1, judge="b")])], {}).panel
    assert apart is not None
    assert apart.alpha is None
    silent = measure([pair(0, [vote(0, judge="a"), vote(0, judge="b")]), pair(1, [vote(1, judge="a")])], {}).panel
    assert silent is not None
    assert silent.alpha is None
    assert measure([pair(0, [vote(1)])], {}).panel is None


def test_a_panel_members_verdicts_on_a_principle_count_once_by_weight():
    votes = [vote(-3, judge="small", weight=0.1), vote(1, judge="large", weight=0.9)]
    (principle,) = measure([pair(n, votes) for n in range(4)], {}).principles
    assert (principle.accuracy.value, principle.accuracy.pairs) == (1, 4)
    assert principle.leaning == pytest.approx(0.9 * leaning(1) + 0.1 * leaning(-3))


def test_prompts_are_told_apart_by_their_text():
    found = measure(planted(60, lambda draw: [vote(draw.normal())], prompts=12), {})
    assert (found.pairs, found.prompts) == (60, 12)


def test_an_interval_over_prompts_is_wider_where_a_prompts_pairs_are_alike():
    same = [pair(n, [vote(1 if n % 20 < 10 else -1)], prompt=f"prompt {n % 20}") for n in range(200)]
    alone = [pair(n, [vote(1 if n % 20 < 10 else -1)]) for n in range(200)]
    wide, narrow = measure(same, {}).accuracy, measure(alone, {}).accuracy
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)  # type: ignore[operator]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered, pretended = 0, 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(60), generator.integers(1, 8, 60)).astype(float)
        rates = generator.beta(1.4, 0.6, 60)
        values = (generator.random(len(prompts)) < rates[prompts.astype(int)]).astype(float)
        found, naive = share(values, prompts, seed), share(values, np.arange(len(prompts), dtype=float), seed)
        covered += found.low < 0.7 < found.high
        pretended += naive.low < 0.7 < naive.high
    assert 0.9 <= covered / 200 <= 0.99
    assert pretended / 200 < 0.88, "pairs taken as independent cover less, or this test shows nothing"


def test_a_prompt_counts_by_its_pairs_in_the_interval_too():
    sizes, rates = [9] * 30 + [1] * 30, [1.0] * 30 + [0.0] * 30
    found = share(np.repeat(rates, sizes), np.repeat(np.arange(60.0), sizes), 0)
    assert found.value == pytest.approx(0.9)
    assert found.low < 0.9 < found.high
    assert found.low > 0.8


def test_what_pairs_cannot_tell_has_no_interval():
    one = measure([pair(n, [vote(1 if n else -1)], prompt="the same") for n in range(4)], {})
    assert (one.prompts, one.accuracy.value, one.accuracy.low, one.accuracy.high) == (1, 0.75, None, None)
    values, prompts = np.ones(20), np.arange(20.0)
    assert difference(0 * values, prompts, 0).low is None
    assert share(values / 2, prompts, 0).low is None
    right, wrong = share(values, prompts, 0), share(0 * values, prompts, 0)
    assert (right.low, right.high) == (pytest.approx(0.8316, abs=1e-4), 1), "Clopper and Pearson's, 20 of 20"
    assert (wrong.low, wrong.high) == (0, pytest.approx(0.1684, abs=1e-4))


def test_the_same_seed_gives_the_same_numbers():
    records = planted(80, lambda draw: [vote(1 + draw.normal(0, 2), bias=1)], prompts=30)
    first, again, other = measure(records, {}, 4), measure(iter(records), {}, 4), measure(records, {}, 5)
    assert first == again
    assert first.accuracy != other.accuracy
    assert first.principles[0].accuracy != other.principles[0].accuracy
    assert first.accuracy.value == other.accuracy.value


def test_nothing_to_measure_is_an_error_that_names_the_failures():
    with pytest.raises(VerdictError, match="no verdict': 7"):
        measure([], {"no verdict": 7})


def test_json_is_plain_and_complete():
    found = measure(planted(30, lambda draw: [vote(draw.normal(1), judge=judge) for judge in "ab"]), {"no verdict": 1})
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain) == set(Agreement.__struct_fields__)
    assert plain["accuracy"]["value"] == round(found.accuracy.value, 6)
    assert set(plain["accuracy"]) == {"value", "low", "high", "pairs"}
    assert plain["panel"] == {"judges": ["a", "b"], "alpha": round(found.panel.alpha, 6)}  # type: ignore[union-attr]
