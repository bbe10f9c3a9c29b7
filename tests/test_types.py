"""Records survive JSON, name their completions, and a verdict turned twice is itself."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.types import Completion, Message, PrincipleVerdict, Prompt, Record, Verdict
from tests.records import HOSTILE, completion, record, revision, verdict

differences = st.floats(-80, 80)
readings = st.lists(st.tuples(differences, differences), min_size=1, max_size=5)


@given(readings)
def test_swap_is_an_involution_to_the_last_digit(given_readings):
    one = verdict("a", "b", *given_readings)
    assert all(principle.swap().swap() == principle for principle in one.principles)
    assert [principle.probability + principle.swap().probability for principle in one.principles] == [1] * len(one.principles)
    assert one.swap().swap().principles == one.principles


def test_swap_names_the_completions_the_other_way_round():
    one = Verdict("a", "b", "samples", 0.75, (PrincipleVerdict("q", 2.0, ((-0.5, -1.5), (-1.0, -2.0)), 0.75, "choice"),))
    turned = PrincipleVerdict("q", 2.0, ((-2.0, -1.0), (-1.5, -0.5)), 0.25, "choice")
    assert one.swap() == Verdict("b", "a", "samples", 0.25, (turned,))


@pytest.mark.parametrize(
    ("readings", "flipped"),
    [
        (((-1.0, -2.0), (-1.0, -3.0)), False),
        (((-2.0, -1.0), (-3.0, -1.0)), False),
        (((-1.0, -2.0), (-2.0, -1.0)), True),
        (((-1.0, -1.0), (-2.0, -1.0)), False),
        (((-1.0, -1.0), (-1.0, -1.0)), False),
        (((1.0, 7.0),), False),
    ],
)
def test_flipped_is_a_preference_that_turns_with_the_order(readings, flipped):
    one = PrincipleVerdict("q", 1.0, readings, 0.5, "choice")
    assert one.flipped is flipped
    assert one.swap().flipped is flipped


def test_completions_by_name():
    made = record(
        candidates=["first", completion(" second\n", length=True)],
        revisions=[revision(1, "one", problem="refusal"), revision(2, "two", length=True)],
    )
    names = ["candidate-0", "candidate-1", "revision-1", "revision-2"]
    assert [made.text(name) for name in names] == ["first", "second", "one", "two"]
    assert [made.truncated(name) for name in names] == [False, True, False, True]


@pytest.mark.parametrize(
    ("problems", "final"),
    [([], None), ([None, None], 2), ([None, "refusal"], 1), (["empty", None], 2), (["empty", "empty"], None)],
)
def test_the_final_revision_is_the_last_one_that_is_one(problems, final):
    made = record(revisions=[revision(number, f"text {number}", problem) for number, problem in enumerate(problems, 1)])
    found = made.final_revision
    assert (found.round if found else None) == final


@given(
    prompt=st.text(),
    text=st.text(),
    given_readings=readings,
    seed=st.integers(0, 2**63 - 1) | st.none(),
)
def test_records_survive_json(prompt, text, given_readings, seed):
    made = record(
        prompt,
        [completion(text, seed=seed)],
        [revision(1, text, cleaned=("preamble", "quotes"))],
        [verdict("candidate-0", "revision-1", *given_readings)],
    )
    assert msgspec.json.decode(msgspec.json.encode(made), type=Record) == made


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_survive_json(text):
    made = record(text, [text], [revision(1, text)])
    assert msgspec.json.decode(msgspec.json.encode(made), type=Record) == made


@pytest.mark.parametrize(
    ("value", "attribute"),
    [(Message("user", "x"), "content"), (Prompt("x", ()), "id"), (Completion("x", "stop", 1, 1), "text"), (record(), "prompt")],
)
def test_all_of_it_is_frozen(value, attribute):
    with pytest.raises(AttributeError):
        setattr(value, attribute, "y")


def test_a_stored_record_with_a_wrong_role_is_refused():
    wrong = msgspec.json.encode(record()).replace(b'"user"', b'"wizard"')
    with pytest.raises(msgspec.ValidationError, match="wizard"):
        msgspec.json.decode(wrong, type=Record)
