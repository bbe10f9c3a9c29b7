"""Ratings are made once, whoever asks for them and whatever becomes of those who asked."""

from __future__ import annotations

import asyncio
import gc
import math

import pytest

from cai.errors import RequestError, VerdictError
from cai.judging import pointwise
from cai.judging.pointwise import PointwiseJudge
from cai.types import Message
from tests.judges import ASKED, assert_turns, compare, principle, sigmoid


class Lengths(PointwiseJudge):
    """Rates by length; waits where it is told to, and fails on `bad`."""

    name = "lengths"

    def __init__(self):
        super().__init__()
        self.rated = []
        self.go = asyncio.Event()
        self.go.set()

    async def rate(self, prompt, text, principles):
        self.rated.append(text)
        await self.go.wait()
        if text == "bad":
            raise RequestError("too bad")
        return [float(len(text)) * int(one.id[1:]) for one in principles]


def pair(first, second):
    return ("candidate-0", first), ("candidate-1", second)


async def ask(judge, first, second, principles=None, prompt=ASKED):
    return await judge.compare(prompt, pair(first, second), principles or [principle(1)], "samples", 0)


def test_a_verdict_is_made_of_two_ratings_a_principle():
    found = compare(Lengths(), "three", "one", [principle(1, 3.0), principle(2)])
    assert [one.readings for one in found.principles] == [((5, 3),), ((10, 6),)]
    assert [one.probability for one in found.principles] == pytest.approx([sigmoid(2), sigmoid(4)], abs=1e-11)
    assert found.probability == pytest.approx((3 * sigmoid(2) + sigmoid(4)) / 4, abs=1e-11)
    assert {(one.judge, one.flipped) for one in found.principles} == {("lengths", False)}


def test_a_swapped_verdict_is_the_verdict_on_the_swapped_pair():
    assert_turns(Lengths, "three", "one", [principle(1, 0.1), principle(3, 0.7)])


def test_equal_ratings_are_a_tie():
    assert compare(Lengths(), "one", "two").probability == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_verdict(bad):
    class Bad(Lengths):
        async def rate(self, prompt, text, principles):
            return [bad]

    with pytest.raises(VerdictError, match=r"q1.*finite"):
        compare(Bad(), "one", "one")


async def test_ratings_are_shared_by_pairs_that_are_asked_at_once_and_later():
    judge = Lengths()
    await asyncio.gather(ask(judge, "a", "bb"), ask(judge, "bb", "ccc"), ask(judge, "ccc", "a"))
    await ask(judge, "ccc", "bb")
    assert sorted(judge.rated) == ["a", "bb", "ccc"]


async def test_another_prompt_and_other_principles_are_rated_anew():
    judge = Lengths()
    await ask(judge, "a", "bb")
    await ask(judge, "a", "bb", [principle(2)])
    await ask(judge, "a", "bb", [principle(1), principle(2)])
    await ask(judge, "a", "bb", prompt=(Message("user", "And this?"),))
    assert len(judge.rated) == 8


async def test_a_rating_that_fails_fails_all_its_pairs_and_no_other():
    judge = Lengths()
    asked = (ask(judge, "bad", "a"), ask(judge, "bb", "bad"), ask(judge, "a", "bb"))
    first, second, third = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(first, RequestError)
    assert isinstance(second, RequestError)
    assert third.probability < 0.5
    assert judge.rated.count("bad") == 1


async def test_who_is_cancelled_takes_no_rating_away_from_others():
    judge = Lengths()
    judge.go.clear()
    impatient, patient = asyncio.ensure_future(ask(judge, "a", "bb")), asyncio.ensure_future(ask(judge, "bb", "ccc"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    judge.go.set()
    assert (await patient).probability < 0.5
    assert judge.rated.count("bb") == 1


async def test_a_failure_that_was_told_leaves_no_complaint_behind():
    judge, complaints = Lengths(), []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    with pytest.raises(RequestError):
        await ask(judge, "bad", "a")
    del judge
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_only_so_many_ratings_are_remembered_and_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(pointwise, "_KEPT", 4)
    judge = Lengths()
    for number in range(3):
        await ask(judge, "x" * (2 * number + 1), "x" * (2 * number + 2))
    assert len(judge._ratings) == 4
    await ask(judge, "xxxxx", "xxxxxx")
    assert len(judge.rated) == 6
    await ask(judge, "x", "xx")
    assert len(judge.rated) == 8
