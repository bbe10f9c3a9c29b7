"""Batches form behind the one that computes; each waiter gets its own result, and only its own batch's error."""

from __future__ import annotations

import asyncio
import random

import pytest

from cai.engines.batching import Batcher
from cai.errors import EngineError


class Squares:
    """Computes squares of batches; fails on a negative number; waits where it is told to."""

    def __init__(self, size=4):
        self.batches, self.begun, self.go = [], asyncio.Event(), asyncio.Event()
        self.go.set()
        self.square = Batcher(lambda waiting: range(min(size, len(waiting))), self.compute)

    async def compute(self, batch):
        self.batches.append(batch)
        self.begun.set()
        await self.go.wait()
        await asyncio.sleep(0)
        if min(batch) < 0:
            raise EngineError(f"{min(batch)} is negative")
        return [number**2 for number in batch]

    async def hold(self, number):
        """Begin a batch that does not end before `go` is set."""
        self.go.clear()
        self.begun.clear()
        first = asyncio.ensure_future(self.square(number))
        await self.begun.wait()
        return first


async def test_each_gets_its_own_result_in_whatever_order_it_asked():
    squares, numbers = Squares(), list(range(50))
    random.Random(3).shuffle(numbers)
    assert await asyncio.gather(*map(squares.square, numbers)) == [number**2 for number in numbers]
    assert sorted(number for batch in squares.batches for number in batch) == sorted(numbers)
    assert max(map(len, squares.batches)) == 4


async def test_what_waits_behind_a_batch_is_computed_together():
    squares = Squares()
    first = await squares.hold(0)
    others = [asyncio.ensure_future(squares.square(number)) for number in (1, 2, 3)]
    await asyncio.sleep(0.02)
    assert squares.batches == [[0]]
    squares.go.set()
    assert await asyncio.gather(first, *others) == [0, 1, 4, 9]
    assert squares.batches == [[0], [1, 2, 3]]


async def test_the_places_that_are_chosen_are_computed_and_the_rest_waits():
    seen = []

    def largest_with_the_oldest(waiting):
        seen.append(list(waiting))
        return {0, max(range(len(waiting)), key=waiting.__getitem__)}

    async def negate(batch):
        return [-number for number in batch]

    negated = Batcher(largest_with_the_oldest, negate)
    assert await asyncio.gather(*map(negated, (3, 1, 7, 5))) == [-3, -1, -7, -5]
    assert seen == [[3, 1, 7, 5], [1, 5]]


async def test_equal_items_are_told_apart():
    squares = Squares()
    assert await asyncio.gather(*(squares.square(number) for number in (2, 3, 2, 2))) == [4, 9, 4, 4]


async def test_an_error_reaches_all_of_its_batch_and_not_the_next():
    squares = Squares()
    first = await squares.hold(0)
    asked = [asyncio.ensure_future(squares.square(number)) for number in (1, -1, 2, 3, 4, 5)]
    squares.go.set()
    found = await asyncio.gather(first, *asked, return_exceptions=True)
    assert squares.batches == [[0], [1, -1, 2, 3], [4, 5]]
    assert found[0] == 0
    assert [str(one) for one in found[1:5]] == ["-1 is negative"] * 4
    assert all(isinstance(one, EngineError) for one in found[1:5])
    assert found[5:] == [16, 25]
    assert await squares.square(6) == 36


async def test_who_is_cancelled_while_waiting_is_not_computed():
    squares = Squares()
    first = await squares.hold(0)
    impatient, patient = asyncio.ensure_future(squares.square(1)), asyncio.ensure_future(squares.square(2))
    await asyncio.sleep(0)
    impatient.cancel()
    squares.go.set()
    assert await asyncio.gather(first, patient) == [0, 4]
    assert impatient.cancelled()
    assert squares.batches == [[0], [2]]


async def test_who_is_cancelled_while_it_is_computed_takes_nothing_from_the_others():
    squares = Squares()
    first = await squares.hold(0)
    asked = [asyncio.ensure_future(squares.square(number)) for number in (1, 2)]
    squares.begun.clear()
    squares.go.set()
    await squares.begun.wait()
    asked[0].cancel()
    assert await asyncio.gather(first, asked[1]) == [0, 4]
    assert asked[0].cancelled()
    assert squares.batches == [[0], [1, 2]]


async def test_an_error_after_all_were_cancelled_harms_nobody():
    squares = Squares()
    first = await squares.hold(-1)
    first.cancel()
    second = asyncio.ensure_future(squares.square(2))
    squares.go.set()
    assert await second == 4


async def test_closing_cancels_what_is_computed_and_what_waits():
    squares = Squares()
    first = await squares.hold(0)
    second = asyncio.ensure_future(squares.square(1))
    await asyncio.sleep(0)
    squares.square.close()
    found = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 5)
    assert [type(one) for one in found] == [asyncio.CancelledError] * 2
    assert squares.batches == [[0]]


async def test_closing_what_was_never_asked_is_nothing():
    Squares().square.close()


async def test_it_rests_when_nothing_waits_and_wakes_up_again():
    squares = Squares()
    assert await squares.square(3) == 9
    await asyncio.sleep(0.03)
    assert squares.square._worker.done()
    assert await squares.square(4) == 16


async def test_those_that_ask_again_at_once_share_the_next_batch():
    squares = Squares(size=8)

    async def twice(number):
        return await squares.square(await squares.square(number))

    assert await asyncio.gather(*map(twice, (1, 2, 3))) == [1, 16, 81]
    assert squares.batches == [[1, 2, 3], [1, 4, 9]]


@pytest.mark.parametrize("results", [[], [1, 2, 3]])
async def test_a_wrong_number_of_results_is_an_error_of_that_batch(results):
    async def compute(batch):
        return results

    batcher = Batcher(lambda waiting: range(len(waiting)), compute)
    found = await asyncio.wait_for(asyncio.gather(batcher(1), batcher(2), return_exceptions=True), 5)
    assert all(isinstance(one, ValueError) for one in found)


@pytest.mark.parametrize("choice", [KeyError("no such length"), []])
async def test_a_choice_that_fails_is_an_error_of_all_that_wait_and_of_no_later_one(choice):
    choices = iter([choice])

    def choose(waiting):
        for one in choices:
            if isinstance(one, Exception):
                raise one
            return one
        return range(len(waiting))

    async def negate(batch):
        return [-number for number in batch]

    negated = Batcher(choose, negate)
    found = await asyncio.wait_for(asyncio.gather(negated(1), negated(2), return_exceptions=True), 5)
    assert [type(one) for one in found] == [type(choice) if choice else ValueError] * 2
    assert await asyncio.wait_for(negated(3), 5) == -3
