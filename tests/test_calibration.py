"""A calibrated verdict is what its formula says, turns with its pair to the last digit, and fits one judge only."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.config import JudgeConfig, VllmConfig
from cai.constitution import Principle, load_constitution
from cai.documents import Document
from cai.engines import ScriptedEngine
from cai.errors import ConfigError, VerdictError
from cai.judging import build_judge
from cai.judging import calibration as module
from cai.judging.base import Judge, leaning, principle_verdict, verdict
from cai.judging.calibration import (
    CalibratedJudge,
    Calibration,
    JudgeIdentity,
    LoadedCalibration,
    apply,
    check_fits,
    judge_identity,
    load_calibration,
)
from cai.servers import ServerConfig
from cai.types import Message, Verdict
from tests.runs import SMALL

PAIR = (("candidate-0", "one"), ("candidate-1", "two"))
WORTH = {"accuracy": [0.6, 0.5, 0.7], "log_loss": [0.6, 0.5, 0.7]}
SETTINGS: dict[str, Any] = {"layout": "principle-last", "exemplars": 0, "clamp": [0.4, 0.6]}
FITTED: dict[str, Any] = {
    "method": "choice",
    "judge": "small@1",
    "constitution": "harmless@abc",
    "settings": SETTINGS,
    "pairs": 40,
    "kind": "weights",
    "temperature": 2.0,
    "sign": 1,
    "principles": {"q0": {"prior": 0.5, "weight": 0.25}, "q1": {"prior": -1.0, "weight": -0.125}},
    "cross_validated": {"before": WORTH, "after": WORTH},
}
THIS = JudgeIdentity("choice", "small@1", "harmless@abc", SETTINGS)
EXAMPLE = next(part for part in (module.__doc__ or "").split("\n\n") if "method: choice" in part)

number = st.floats(-50, 50)
reading = st.tuples(number, number)
readings = st.lists(st.lists(reading, min_size=1, max_size=2), min_size=1, max_size=4)
fitted_principle = st.fixed_dictionaries({"prior": number, "weight": number})


def fitted(**changes: Any) -> Calibration:
    return Calibration.model_validate(FITTED | changes)


def judged(*given_readings: list[tuple[float, float]], first: int = 0) -> Verdict:
    """A verdict under principles q0, q1, ... of these readings."""
    principles = [
        principle_verdict("choice", f"q{index}", 1.0 + index, one, [leaning(a - b) for a, b in one])
        for index, one in enumerate(given_readings, first)
    ]
    return verdict(PAIR, "samples", principles)


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    principles = {f"q{index}": draw(fitted_principle) for index in range(draw(st.integers(4, 6)))}
    return fitted(principles=principles, temperature=draw(st.floats(0.01, 100)), sign=draw(st.sampled_from([1, -1])))


@given(calibrations(), readings)
def test_a_turned_pair_gives_the_turned_verdict_to_the_last_digit(calibration, given_readings):
    one = judged(*given_readings)
    assert apply(calibration, one.swap()) == apply(calibration, one).swap()
    assert apply(calibration, one).probability + apply(calibration, one.swap()).probability == 1


@given(calibrations(), readings)
def test_only_probabilities_change(calibration, given_readings):
    one, found = judged(*given_readings), apply(calibration, judged(*given_readings))
    assert (found.first, found.second, found.source) == (one.first, one.second, one.source)
    kept = [(part.principle_id, part.weight, part.readings, part.judge) for part in one.principles]
    assert [(part.principle_id, part.weight, part.readings, part.judge) for part in found.principles] == kept


def test_the_logit_is_the_weighted_evidence():
    one = judged([(3.0, 1.0), (2.0, 2.0)], [(0.0, 4.0), (1.0, 1.0)])
    assert apply(fitted(), one).probability == pytest.approx(sigmoid(0.25 * 1.0 - 0.125 * -2.0))


def test_principles_that_were_not_drawn_are_made_up_for():
    one = judged([(3.0, 1.0), (2.0, 2.0)])
    assert apply(fitted(), one).probability == pytest.approx(sigmoid(0.25 * 1.0 * 2))


@given(number, number)
def test_the_prior_cancels_from_the_verdict(signal, prior):
    unbiased, biased = ([(signal + bias, 0.0), (signal - bias, 0.0)] for bias in (0.0, prior))
    assert apply(fitted(), judged(biased)).probability == pytest.approx(apply(fitted(), judged(unbiased)).probability)


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_the_prior_is_taken_out_of_each_order_of_a_principle(signal, prior):
    calibration = fitted(principles={"q0": {"prior": prior, "weight": 0.25}})
    (found,) = apply(calibration, judged([(signal + prior, 0.0), (signal - prior, 0.0)])).principles
    assert found.probability == pytest.approx(sigmoid(signal / 2))


def test_a_single_reading_has_no_order_to_correct():
    (found,) = apply(fitted(), judged([(3.0, 1.0)])).principles
    assert found.probability == pytest.approx(sigmoid(2.0 / 2))


@pytest.mark.parametrize(
    ("weight", "sign", "direction"), [(0.25, 1, 1), (0.25, -1, 1), (-0.25, 1, -1), (-0.25, -1, -1), (0.0, 1, 1), (0.0, -1, -1)]
)
def test_a_principle_of_negative_weight_is_turned(weight, sign, direction):
    calibration = fitted(principles={"q0": {"prior": 0.0, "weight": weight}}, sign=sign)
    (found,) = apply(calibration, judged([(3.0, 1.0), (3.0, 1.0)])).principles
    assert found.probability == pytest.approx(sigmoid(direction * 2.0 / 2))


def test_an_unknown_principle_is_refused():
    with pytest.raises(ConfigError, match=r"does not know principle 'q2'.*`cai judge calibrate` again, with judge.principles"):
        apply(fitted(), judged([(1.0, 0.0)], [(1.0, 0.0)], first=1))


def test_a_panel_is_calibrated_member_by_member():
    one = judged([(1.0, 0.0)])
    with pytest.raises(ConfigError, match=r"principle 'q0' has two verdicts; calibrate a panel's members one by one"):
        apply(fitted(), msgspec.structs.replace(one, principles=one.principles * 2))


@given(calibrations())
def test_yaml_round_trip(calibration):
    assert Document(calibration.to_yaml(), "calibration.yaml").validate(Calibration) == calibration


def test_a_file_is_read_back(tmp_path):
    path = tmp_path / "calibration.yaml"
    path.write_text(fitted().to_yaml())
    loaded = load_calibration(path)
    assert loaded == (fitted(), path.read_text())
    path.write_text(fitted(pairs=41).to_yaml())
    assert load_calibration(path).hash != loaded.hash == LoadedCalibration(fitted(), fitted().to_yaml()).hash


def test_the_example_in_the_docstring_is_one(tmp_path):
    path = tmp_path / "calibration.yaml"
    path.write_text(EXAMPLE)
    assert load_calibration(path).calibration.principles["honest"].prior == -0.2


@pytest.mark.parametrize(
    ("was", "now", "problem"),
    [
        ("pairs: 40", "pairs: 0", r"calibration.yaml:10: pairs: .*greater than 0"),
        ("kind: weights", "kind: weight", r"calibration.yaml:11: kind: .*'scale' or 'weights'"),
        ("temperature: 2.0", "temperature: 0", r"calibration.yaml:12: temperature: "),
        ("temperature: 2.0", "temperature: .inf", r"calibration.yaml:12: temperature: "),
        ("sign: 1", "sign: 0", r"calibration.yaml:13: sign: .*1 or -1"),
        ("sign: 1", "sing: 1", r"calibration.yaml:13: sing: unknown key \(did you mean 'sign'\?\)"),
        ("    prior: 0.5", "    prior: big", r"calibration.yaml:16: principles.q0.prior: found 'big'; expected .* 'weight'"),
        ("    prior: 0.5", "    prior: .nan", r"calibration.yaml:16: principles.q0.prior: found nan; expected"),
        ("    prior: 0.5", "    bias: 0.5", r"calibration.yaml:15: principles.q0.prior: this key is required; expected"),
        ("    prior: 0.5", "    prior: 0\n    bias: 1", r"calibration.yaml:17: principles.q0.bias: unknown key; expected"),
        (
            "    - 0.6\n",
            "    - .nan\n",
            r"calibration.yaml:\d+: cross_validated.before.accuracy\[0\]: expected a finite number",
        ),
    ],
)
def test_a_wrong_file_is_told_by_line_and_key(tmp_path, was, now, problem):
    path, text = tmp_path / "calibration.yaml", fitted().to_yaml()
    assert was in text
    path.write_text(text.replace(was, now, 1))
    with pytest.raises(ConfigError, match=problem):
        load_calibration(path)


@pytest.mark.parametrize("content", ["principles: {}", "principles: 3", "principles: [a]", "- a"])
def test_what_is_no_calibration_is_refused(tmp_path, content):
    path = tmp_path / "calibration.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"calibration.yaml"):
        load_calibration(path)


def test_a_calibration_that_fits_is_let_pass():
    check_fits(fitted(), THIS)


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ({"method": "score"}, "method: fitted for 'choice', this is 'score'; run"),
        ({"judge": "small@2"}, "judge: fitted for 'small@1', this is 'small@2'; run"),
        ({"constitution": "harmless@abd"}, "constitution: fitted for 'harmless@abc', this is 'harmless@abd'; run"),
        ({"method": "score", "judge": "small@2"}, "method: .*; judge: .*; run `cai judge calibrate` again"),
        ({"settings": SETTINGS | {"exemplars": 2}}, r"this judge: judge.exemplars: fitted for '0', this is '2'; run"),
        ({"settings": SETTINGS | {"more": 2}}, r"this judge: judge.more: fitted for nothing, this is '2'; run"),
        ({"settings": {}}, r"judge.clamp: fitted for '\[0.4, 0.6\]', this is nothing; judge.exemplars: .*; judge.layout: "),
    ],
)
def test_what_does_not_fit_is_told(judge, problem):
    with pytest.raises(ConfigError, match=problem):
        check_fits(fitted(), THIS._replace(**judge))


NUMBERS = {
    "layout": "principle-first",
    "exemplars": 1,
    "samples": 2,
    "temperature": 0.1,
    "max_tokens": 7,
    "clamp": (0.1, 0.9),
    "length": "sum",
}
NO_NUMBERS = {
    "model": "m",
    "revision": "r",
    "server": ServerConfig(retries=9),
    "vllm": VllmConfig(adapter="lora"),
    "principles": 1,
    "calibration": "c.yaml",
    "allow_python": True,
}


@pytest.mark.parametrize("key", sorted(JudgeConfig.model_fields.keys() - {"members"}))
def test_every_setting_that_moves_the_numbers_is_compared(key):
    """A new setting belongs into one of the two lists; `revision` needs a model."""
    rules, plain = load_constitution(str(SMALL)), JudgeConfig(model="m")
    changed = plain.model_copy(update={key: (NUMBERS | NO_NUMBERS | {"method": "score"})[key]})
    before, after = (judge_identity(one, "small@1", rules) for one in (plain, changed))
    assert (before != after) == (key in NUMBERS or key == "method")
    if key in NUMBERS:
        with pytest.raises(ConfigError, match=rf"judge: judge.{key}: fitted for .*, this is .*; run"):
            check_fits(fitted(**before._asdict()), after)


def test_the_methods_own_prompts_are_compared():
    rules = load_constitution(str(SMALL))
    texts = {
        method: judge_identity(JudgeConfig(method=method), "m", rules).settings["prompts"] for method in ("choice", "score")
    }
    assert texts["choice"] != texts["score"]


def test_a_changed_calibration_yields_to_what_was_read(tmp_path):
    """The file that was checked is the one that is used, whatever is written over it meanwhile."""
    path = tmp_path / "calibration.yaml"
    path.write_text(fitted().to_yaml())
    loaded = load_calibration(path)
    path.write_text("nothing")
    config = JudgeConfig(model="m", calibration=str(path))
    engine = ScriptedEngine(lambda request: [-0.1, -2.1])
    judge = build_judge(config, load_constitution(str(SMALL)), lambda _: engine, {str(path): loaded})
    assert isinstance(judge, CalibratedJudge)


@pytest.mark.parametrize("reading", [(1e308, -1e308), (-1e308, 1e308), (1e101, 0.0)])
def test_a_difference_too_large_to_calculate_with_is_no_verdict(reading):
    for one in (judged([reading]), judged([reading, reading])):
        with pytest.raises(VerdictError, match=r"principle 'q0': .* differ by more than 1e\+100, which cannot be calibrated"):
            apply(fitted(), one)


def test_an_abstention_stays_one():
    nothing = msgspec.structs.replace(judged([(1.0, 0.0)]), probability=0.5, principles=())
    assert apply(fitted(), nothing) == nothing


class Fixed:
    """A judge that always gives one verdict, and remembers what it was asked."""

    def __init__(self, answer: Verdict) -> None:
        self.answer, self.asked = answer, ()

    async def compare(self, *asked: Any) -> Verdict:
        self.asked = asked
        return self.answer


async def test_a_calibrated_judge_asks_its_judge_and_applies():
    inner = Fixed(judged([(3.0, 1.0), (2.0, 2.0)]))
    judge: Judge = CalibratedJudge(inner, fitted())
    asked = ((Message("user", "Why?"),), PAIR, [Principle(id="q0", preference="Which?")], "samples", 7)
    assert await judge.compare(*asked) == apply(fitted(), inner.answer)
    assert inner.asked == asked
