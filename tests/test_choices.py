"""Choices from what a server says of next tokens: exact where it can be, bounds where not, never a number from nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from cai.engines.choices import Spelled, by_ids, by_text
from cai.errors import VerdictError


async def text(
    tops: Mapping[str, Mapping[str, float]], *choices: str, begins: bool = False, goes_on: bool = True
) -> list[float]:
    async def ask(before: str) -> Mapping[str, float]:
        return tops[before]

    return await by_text(ask, choices, begins, goes_on)


async def test_choices_that_are_tokens_are_read_off() -> None:
    assert await text({"": {"A": -0.5, "B": -1.5, " the": -3.0}}, "A", "B") == [-0.5, -1.5]


async def test_a_choice_that_is_not_there_gets_the_tighter_of_two_upper_bounds() -> None:
    least = await text({"": {"A": -0.4, "C": -2.0, "D": -2.5}}, "A", "B")
    assert least == [-0.4, -2.5], "the least that was seen"
    left = await text({"": {"A": -0.001, "C": -9.0}}, "A", "B")
    assert left[1] == -9.0
    assert await text({"": {"A": math.log(0.9), "C": math.log(0.099)}}, "A", "B") == [
        math.log(0.9),
        pytest.approx(math.log(0.001)),
    ]


async def test_where_no_choice_is_there_it_is_no_verdict() -> None:
    with pytest.raises(VerdictError, match="none of A, B is among the likeliest tokens"):
        await text({"": {"The": -0.1, "I": -3.0}}, "A", "B")


async def test_a_choice_of_two_tokens_is_walked_and_its_beginning_stands_for_itself_alone() -> None:
    tops = {"": {"1": -0.5, "9": -2.0}, "1": {"0": -1.0, ")": -0.6}}
    one, nine, ten = await text(tops, "1", "9", "10")
    assert (nine, ten) == (-2.0, -1.5)
    assert math.exp(one) + math.exp(ten) == pytest.approx(math.exp(-0.5))
    assert await text({"": {"1": -0.5, "10": -3.0}}, "1", "10") == [-0.5, -3.0], "one token: nothing is shared"
    assert (await text(tops, "1", "9", "10", goes_on=False))[0] == -0.5


async def test_where_an_answer_begins_a_space_before_the_choice_does_not_count() -> None:
    both = await text({"": {"A": math.log(0.3), " A": math.log(0.2), "B": math.log(0.1)}}, "A", "B", begins=True)
    assert both == [pytest.approx(math.log(0.5)), math.log(0.1)]
    inside = await text({"": {"A": math.log(0.3), " A": math.log(0.2), "B": math.log(0.1)}}, "A", "B")
    assert inside[0] == math.log(0.3)


async def ids(found: Mapping[str, Mapping[int, float]], *spelled: Spelled) -> tuple[list[float], list[Any]]:
    asked: list[Any] = []

    async def ask(before: str, tokens: Sequence[int]) -> Mapping[int, float]:
        asked.append((before, list(tokens)))
        return found[before]

    return await by_ids(ask, spelled), asked


async def test_tokens_that_are_asked_for_are_exact_in_one_question_a_position() -> None:
    assert await ids({"": {65: -0.5, 66: -1.5}}, Spelled((65,), ("",)), Spelled((66,), ("",))) == (
        [-0.5, -1.5],
        [("", [65, 66])],
    )


async def test_the_tree_of_tokens_is_asked_once_a_node() -> None:
    found = {"": {1: -0.5, 9: -2.0}, "1": {0: -1.0}}
    logprobs, asked = await ids(found, Spelled((1,), ("",)), Spelled((9,), ("",)), Spelled((1, 0), ("", "1")))
    assert logprobs[1:] == [-2.0, -1.5]
    assert math.exp(logprobs[0]) + math.exp(-1.5) == pytest.approx(math.exp(-0.5))
    assert asked == [("", [1, 9]), ("1", [0])]
