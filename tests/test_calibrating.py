"""On planted pairs, whose truth is known, the fit finds it; where there is nothing to find, it says so."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest

from cai.errors import ConfigError
from cai.evaluation.calibrating import Fit, check_enough, fit
from cai.judging.base import leaning, principle_verdict, verdict
from cai.judging.calibration import JudgeIdentity, apply
from cai.prompts import Row
from cai.types import Completion, Message, Prompt, Record

NAMES = (("candidate-0", ""), ("candidate-1", ""))
TEXT = Completion("text", "stop", 1, 1)
BIASES = (1.5, -0.5, 0.0)


def record(prompt: int, signals: dict[int, float], biases: Sequence[float] = (), weights: Sequence[float] = ()) -> Record:
    """A pair whose first completion people chose; of each principle's number the judge's signal for it."""
    principles = []
    for number, signal in signals.items():
        bias = biases[number] if biases else 0.0
        readings = [(signal + bias, 0.0), (signal - bias, 0.0)]
        leanings = [leaning(first - second) for first, second in readings]
        weight = weights[number] if weights else 1.0
        principles.append(principle_verdict("choice", f"q{number}", weight, readings, leanings))
    asked = Prompt(str(prompt), (Message("user", f"Question {prompt}?"),))
    return Record(asked, (TEXT, TEXT), (), (verdict(NAMES, "samples", principles),))


def planted(truth: Sequence[float], pairs: int = 300, seed: int = 0, spread: float = 2.0, **kwargs: Any) -> list[Record]:
    """Two pairs a prompt; people choose by a logistic model of the judge's signals with the weights `truth`.

    With `drawn`, each pair is judged under so many of the principles.
    """
    draw, made = np.random.default_rng(seed), []
    drawn = kwargs.pop("drawn", len(truth))
    for number in range(pairs):
        present = sorted(draw.choice(len(truth), drawn, replace=False).tolist())
        signals = draw.normal(size=drawn) * spread
        logit = float(signals @ np.array(truth)[present]) * len(truth) / drawn
        chosen = 1 if draw.random() < 1 / (1 + math.exp(-logit)) else -1
        made.append(record(number // 2, dict(zip(present, (chosen * signals).tolist(), strict=True)), **kwargs))
    return made


def fitted(records: list[Record], **kwargs: Any) -> Fit:
    return fit(records, JudgeIdentity("choice", "small@1", "harmless@abc", {"exemplars": 0}), **kwargs)


def weights(found: Fit) -> list[float]:
    return [principle.weight for principle in found.calibration.principles.values()]


@cache
def helpful() -> Fit:
    """The first principle knows people twice as well as the second, the third is noise."""
    return fitted(planted([1.0, 0.5, 0.0], biases=BIASES))


@cache
def reversed_judge() -> Fit:
    return fitted(planted([-0.4, -0.4, -0.4], biases=BIASES))


def test_the_prior_for_an_order_is_recovered():
    assert [one.prior for one in helpful().calibration.principles.values()] == pytest.approx(BIASES)
    assert [one.prior for one in reversed_judge().calibration.principles.values()] == pytest.approx(BIASES)


def test_principles_get_the_weights_that_they_deserve():
    found = helpful()
    assert found.calibration.kind == "weights"
    assert weights(found) == pytest.approx([1.0, 0.5, 0.0], abs=0.25)
    assert found.weights.log_loss[0] < found.scale.log_loss[0] < found.uncalibrated.log_loss[0]
    assert found.weights.calibration_error[0] < found.uncalibrated.calibration_error[0]
    assert found.weights.accuracy[1] > 0.6


def test_a_helpful_judge_is_called_so():
    assert not helpful().anticorrelated
    assert helpful().finding.startswith("The judge sees what people prefer: its accuracy is 0.")
    assert "when calibrated by weights, and its log loss goes from" in helpful().finding


def test_a_reversed_judge_is_found_and_turned_round():
    found = reversed_judge()
    assert found.anticorrelated
    assert found.finding.startswith("The judge is anti-correlated with people: its accuracy is 0.")
    assert found.calibration.sign == -1
    assert all(weight < 0 for weight in weights(found))
    assert found.uncalibrated.accuracy[2] < 0.5 < min(found.scale.accuracy[1], found.weights.accuracy[1])


@pytest.mark.parametrize(("few", "many"), [((0.1,) * 30, (-5.0,) * 30), ((5.0,) * 15, (-0.1,) * 45)])
def test_anticorrelated_by_evidence_alone_or_by_accuracy_alone(few, many):
    found = fitted([record(number, {0: signal}) for number, signal in enumerate(few + many)])
    accuracy, evidence = found.uncalibrated.accuracy, sum(few + many)
    assert (accuracy[2] < 0.5) != (evidence < 0)
    assert found.anticorrelated


def test_the_calibration_error_is_that_of_each_bin():
    """Half of the pairs are right with 0.75, half wrong with 0.9: gaps of 0.25 and -0.9 that must not cancel."""
    found = fitted([record(number, {0: math.log(3) if number % 2 else -math.log(9)}) for number in range(40)])
    mean, low, high = found.uncalibrated.calibration_error
    assert mean == pytest.approx((0.25 + 0.9) / 2)
    assert low < mean < high


def test_the_fitted_calibration_does_what_was_measured():
    records = planted([-0.4, -0.4, -0.4], biases=BIASES, seed=9)
    right = [apply(reversed_judge().calibration, one.verdicts[0]).probability > 0.5 for one in records]
    assert np.mean(right) == pytest.approx(reversed_judge().scale.accuracy[0], abs=0.08)


def test_a_judge_that_is_too_sure_is_cooled():
    found = fitted(planted([0.05, 0.05], spread=20, pairs=400))
    assert found.calibration.temperature == pytest.approx(10, rel=0.3)
    assert found.calibration.sign == 1
    assert found.scale.log_loss[0] < found.uncalibrated.log_loss[0] - 0.1
    assert found.scale.calibration_error[0] < found.uncalibrated.calibration_error[0]


def test_few_pairs_leave_the_weights_of_the_constitution():
    own = [1.0, 3.0, 1.0, 1.0, 0.5, 2.0, 1.0, 1.0]
    found = fitted(planted([weight / 8 for weight in own], weights=own, pairs=60, seed=1))
    assert found.calibration.kind == "scale"
    assert np.array(weights(found)) / weights(found)[0] == pytest.approx(own)
    assert sum(weights(found)) == pytest.approx(1 / found.calibration.temperature)


def test_principles_that_were_drawn_weigh_as_where_all_are_present():
    found = fitted(planted([0.3] * 4, pairs=800, drawn=2))
    assert found.calibration.principles.keys() == {"q0", "q1", "q2", "q3"}
    assert weights(found) == pytest.approx([0.3] * 4, abs=0.08)
    assert found.calibration.temperature == pytest.approx(1 / 1.2, rel=0.15)


def test_opposite_principles_are_no_lack_of_signal():
    found = fitted(planted([1.0, -1.0], seed=1))
    assert weights(found)[0] > 0.5
    assert weights(found)[1] < -0.5
    assert found.uncalibrated.accuracy[1] < 0.5 < found.weights.accuracy[1]
    assert found.finding.startswith("The judge sees")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_labels_are_not_learnt(seed):
    """Ten principles and sixty pairs: fitted and measured on the same pairs, the accuracy would be about 0.7."""
    found = fitted(planted([0.0] * 10, pairs=60, seed=seed), seed=seed)
    for measures in (found.uncalibrated, found.scale, found.weights):
        low, high = measures.accuracy[1:]
        assert low <= 0.5 <= high
    assert not found.anticorrelated
    assert found.finding.startswith("There is no evidence that the judge knows what people prefer")


def test_pairs_of_one_prompt_are_never_on_both_sides():
    """Each prompt's label is random and its pairs are equal: whoever has seen one of them knows the others."""
    records = [one for one in planted([0.0] * 20, pairs=40, seed=4) for _ in range(4)]
    renamed = [
        msgspec.structs.replace(one, prompt=Prompt(f"id {number}", (Message("user", f"Question {number // 4}?"),)))
        for number, one in enumerate(records)
    ]
    low, high = fitted(renamed).weights.accuracy[1:]
    assert low <= 0.5 <= high


def test_other_choices_turn_the_weights_and_keep_the_priors():
    records = planted([1.0, 0.5, 0.0], biases=BIASES)
    turned = [
        msgspec.structs.replace(
            one, verdicts=(msgspec.structs.replace(one.verdicts[0].swap(), first="candidate-0", second="candidate-1"),)
        )
        for one in records
    ]
    found = fitted(turned)
    assert weights(found) == pytest.approx([-weight for weight in weights(helpful())], rel=1e-4, abs=1e-6)
    assert [one.prior for one in found.calibration.principles.values()] == pytest.approx(BIASES)
    assert found.uncalibrated.accuracy[0] == pytest.approx(1 - helpful().uncalibrated.accuracy[0])
    assert found.anticorrelated


def test_the_same_pairs_and_seed_give_the_same_fit():
    records = planted([1.0, 0.5, 0.0], biases=BIASES)
    assert fitted(iter(records)) == helpful()
    assert fitted(records, seed=-1) != helpful()


def test_the_calibration_says_where_it_is_from():
    calibration = helpful().calibration
    assert (calibration.method, calibration.judge, calibration.constitution) == ("choice", "small@1", "harmless@abc")
    assert calibration.pairs == 300
    assert calibration.cross_validated.before == helpful().uncalibrated.quality
    assert calibration.cross_validated.after == helpful().weights.quality
    assert calibration.cross_validated.after.log_loss == helpful().weights.log_loss


def test_measures_lie_in_their_intervals():
    for measures in (helpful().uncalibrated, helpful().scale, helpful().weights):
        for mean, low, high in (measures.accuracy, measures.log_loss):
            assert low < mean < high


def test_a_judge_without_orders_has_no_prior():
    records = []
    for one in planted([0.5]):
        (part,) = one.verdicts[0].principles
        alone = principle_verdict("score", "q0", 1.0, part.readings[:1], [leaning(part.readings[0][0])])
        records.append(msgspec.structs.replace(one, verdicts=(verdict(NAMES, "samples", [alone]),)))
    assert fitted(records).calibration.principles["q0"].prior == 0


def test_a_judge_that_always_ties_is_no_crash():
    found = fitted([record(number, {0: 0.0, 1: 0.0}, biases=(2.0, 2.0)) for number in range(30)])
    assert found.uncalibrated.accuracy == (0.5, 0.5, 0.5)
    assert weights(found) == [0, 0]
    assert not found.anticorrelated
    assert found.finding.startswith("There is no evidence")


def test_a_perfect_judge_is_no_crash():
    found = fitted([record(number, {0: 1000.0, 1: 0.001}) for number in range(30)])
    assert found.weights.accuracy[0] == 1
    assert found.weights.accuracy[1] < 1
    assert all(math.isfinite(weight) for weight in weights(found))


def test_too_few_pairs_are_refused():
    with pytest.raises(ConfigError, match="at least 20 labelled pairs of at least 5 prompts, found 19 of 10"):
        fitted(planted([1.0], pairs=19))


def test_too_few_prompts_are_refused():
    with pytest.raises(ConfigError, match="at least 20 labelled pairs of at least 5 prompts, found 40 of 4"):
        fitted([record(number % 4, {0: 1.0}) for number in range(40)])


def test_five_prompts_are_enough():
    assert fitted([record(number % 5, {0: 1.0 - number % 3}) for number in range(20)]).calibration.pairs == 20


@pytest.mark.parametrize("change", [{"first": "candidate-1", "second": "candidate-0"}, {"second": "revision-1"}, None])
def test_other_verdicts_are_refused(change):
    *records, last = planted([1.0])
    verdicts = (msgspec.structs.replace(last.verdicts[0], **change),) if change else ()
    with pytest.raises(ConfigError, match="prompt '149': expected a first verdict of candidate-0 against candidate-1"):
        fitted([*records, msgspec.structs.replace(last, verdicts=verdicts)])


def test_verdicts_of_two_constitutions_are_refused():
    records = planted([1.0, 1.0]) + planted([1.0, 1.0], weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match=r"principle 'q1' has the weights 1.0 and 2.0: expected verdicts of one constitution"):
        fitted(records)


def test_without_scikit_learn_the_fix_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'cai-toolkit\[judge\]'"):
        fitted(planted([1.0]))


@pytest.mark.parametrize("signal", [1e308, -1e308, 9.9e307, 1e101])
@pytest.mark.filterwarnings("error")
def test_evidence_that_no_sum_can_hold_is_refused_by_its_prompt(signal):
    pairs = [record(number, {0: 1.0, 1: -0.5}) for number in range(30)]
    pairs[7] = record(7, {0: 1.0, 1: signal})
    with pytest.raises(ConfigError, match=r"prompt '7': principle 'q1': .*cannot be calibrated; leave this pair out"):
        fitted(pairs)


@pytest.mark.filterwarnings("error")
def test_the_largest_evidence_that_is_let_pass_gives_finite_numbers():
    found = fitted([record(number, {0: 1e100 if number % 3 else -1e100}) for number in range(30)])
    assert all(map(math.isfinite, [*weights(found), *found.scale.log_loss, *found.uncalibrated.log_loss]))


def pair_rows(pairs: int, prompts: int) -> list[Row]:
    made = []
    for number in range(pairs):
        prompt = Prompt(str(number), (Message("user", f"Question {number % prompts}?"),))
        made.append(Row(f"row {number}", prompt, None, "", ("good", "bad")))
    return made


@pytest.mark.parametrize(("pairs", "prompts"), [(19, 19), (25, 4)])
def test_too_few_rows_are_told_from_the_source_alone(pairs, prompts):
    with pytest.raises(ConfigError, match=f"at least 20 labelled pairs of at least 5 prompts, found {pairs} of {prompts}"):
        check_enough(pair_rows(pairs, prompts) + pair_rows(1, prompts))


def test_no_more_is_read_than_is_needed_to_know_that_there_is_enough():
    rows = iter(pair_rows(30, 5))
    check_enough(rows)
    assert len(list(rows)) == 10
