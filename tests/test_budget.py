"""A budget: nothing is begun that may go beyond it, and what the folder has cost before counts."""

from __future__ import annotations

import asyncio

import pytest

from cai.errors import BudgetError, Interrupted
from cai.generation import Budget, Price, Tally
from cai.servers import BudgetConfig
from cai.store import RoleUsage

PRICES = {"policy": Price(1.0, 10.0), "judge": Price(5.0, 0.0)}


def budget(tally: Tally | None = None, spent: dict[str, RoleUsage] | None = None, **limits: float) -> Budget:
    return Budget(BudgetConfig.model_validate(limits), PRICES, spent or {}, tally or Tally())


async def call(one: Budget, role: str = "policy", size: int = 100, spent: tuple[int, int] = (25, 10)) -> None:
    reserved = await one.reserve(role, size, 20)
    await asyncio.sleep(0)
    one.settle(reserved, role, size, spent)


def test_without_a_limit_there_is_nothing_to_ask() -> None:
    assert not budget().is_limited
    assert budget(tokens=1).is_limited
    assert budget(money=1).is_limited


async def test_what_is_under_way_counts_with_all_that_it_may_cost() -> None:
    tally = Tally()
    one = budget(tally, tokens=1000)
    done = await asyncio.gather(*(call(one) for _ in range(100)), return_exceptions=True)
    finished = sum(result is None for result in done)
    assert 24 <= finished <= 1000 // 35
    assert all(isinstance(result, BudgetError) for result in done if result is not None)
    assert tally.stopping
    assert tally.spent == str(next(result for result in done if result))
    assert f"budget.tokens: {finished * 35:,} of 1,000 tokens are spent" in tally.spent


async def test_what_the_folder_has_cost_before_counts() -> None:
    one = budget(tokens=1000, spent={"policy": RoleUsage(3, 500, 100), "judge": RoleUsage(2, 390, 0)})
    with pytest.raises(BudgetError, match="990 of 1,000 tokens"):
        await call(one)


async def test_money_goes_by_each_roles_price() -> None:
    one = budget(money=0.001)
    await call(one, "judge", spent=(100, 0))
    with pytest.raises(BudgetError, match=r"budget.money: 0.0005 of 0.001 is spent.*higher budget.money"):
        await call(one, "judge", spent=(100, 0))


async def test_a_call_that_failed_costs_nothing_and_makes_room() -> None:
    one = budget(tokens=80)
    reserved = await one.reserve("policy", 100, 20)
    waiting = asyncio.ensure_future(call(one))
    await asyncio.sleep(0)
    assert not waiting.done(), "both together do not fit"
    one.settle(reserved, "policy", 100, None)
    await waiting


@pytest.mark.parametrize("spent", [(25, 10), (1, 1)])
async def test_who_waits_for_room_when_the_run_is_stopped_begins_nothing_and_spends_nothing(spent: tuple[int, int]) -> None:
    tally = Tally()
    one = budget(tally, tokens=80)
    reserved = await one.reserve("policy", 100, 20)
    waiting = asyncio.ensure_future(call(one))
    await asyncio.sleep(0)
    tally.stopping = True
    one.settle(reserved, "policy", 100, spent)
    with pytest.raises(Interrupted) as caught:
        await waiting
    assert type(caught.value) is Interrupted
    assert tally.spent == ""
