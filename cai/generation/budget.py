"""What a run may cost. A call is begun only where its most likely cost still fits beside those that are under way."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Mapping
from typing import NamedTuple

from cai.errors import BudgetError, Interrupted
from cai.generation.tally import Tally
from cai.servers import BudgetConfig
from cai.store import RoleUsage

_RATIO = 0.5
"""Prompt tokens for each byte that is sent, before any call has told; more than in any usual text."""
_MARGIN = 1.1
"""An estimate is so much more than the largest ratio that was seen."""


class Price(NamedTuple):
    """What a million tokens cost, of the prompt and of what is generated."""

    prompt: float = 0.0
    completion: float = 0.0


class Cost(NamedTuple):
    """Tokens, and their price."""

    tokens: float
    money: float


class Budget:
    """Counts what the whole run folder has cost, and refuses what would go beyond.

    Attempts that failed are not known to cost anything and are not counted.
    """

    def __init__(self, config: BudgetConfig, prices: Mapping[str, Price], usage: Mapping[str, RoleUsage], tally: Tally) -> None:
        """`usage` is what the folder's journal holds already; roles without a price cost nothing."""
        self._config, self._prices, self._tally = config, prices, tally
        self._tokens = self._money = 0.0
        self._under_way, self._reserved = 0, Cost(0.0, 0.0)
        self._waiting: list[Future[None]] = []
        self._ratio = _RATIO
        self._seen = False
        for role, spent in usage.items():
            self._add(self._cost(role, spent.prompt_tokens, spent.completion_tokens))

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._config.tokens is not None or self._config.money is not None

    def _cost(self, role: str, prompt: float, completion: float) -> Cost:
        price = self._prices.get(role, Price())
        return Cost(prompt + completion, (prompt * price.prompt + completion * price.completion) / 1e6)

    def _add(self, cost: Cost) -> None:
        self._tokens += cost.tokens
        self._money += cost.money

    async def reserve(self, role: str, size: int, completion: int) -> Cost:
        """Set aside what a call of `size` bytes can cost; waits for calls under way where only they leave too little.

        Raises `BudgetError` where it does not fit, and then the run begins no further call; `Interrupted` where the run was
        asked to stop.
        """
        while True:
            if self._tally.stopping:
                raise BudgetError(self._tally.spent) if self._tally.spent else Interrupted("stopping")
            cost = self._cost(role, size * self._ratio, completion)
            problem = self._problem(cost)
            if problem is None:
                self._reserve(1, cost)
                return cost
            if not self._under_way:
                self._tally.stopping, self._tally.spent = True, problem
                self._wake()
                raise BudgetError(problem)
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting

    def _reserve(self, calls: int, cost: Cost) -> None:
        """Sums, since thousands may be under way; none of them leaves exactly nothing, whatever was rounded."""
        self._under_way += calls
        tokens, money = self._reserved.tokens + calls * cost.tokens, self._reserved.money + calls * cost.money
        self._reserved = Cost(tokens, money) if self._under_way else Cost(0.0, 0.0)

    def _problem(self, cost: Cost) -> str | None:
        tokens, money = cost.tokens + self._reserved.tokens, cost.money + self._reserved.money
        limits = self._config
        if limits.tokens is not None and self._tokens + tokens > limits.tokens:
            return (
                f"budget.tokens: {self._tokens:,.0f} of {limits.tokens:,} tokens are spent, and the next call would go beyond; "
                "everything is kept: the same command with a higher budget.tokens continues"
            )
        if limits.money is not None and self._money + money > limits.money:
            return (
                f"budget.money: {self._money:,.4f} of {limits.money:,g} is spent, and the next call would go beyond; "
                "everything is kept: the same command with a higher budget.money continues"
            )
        return None

    def settle(self, reserved: Cost, role: str, size: int, spent: tuple[int, int] | None) -> None:
        """A call ended: `spent` prompt and completion tokens, or None where it failed."""
        self._reserve(-1, reserved)
        if spent:
            self._add(self._cost(role, *spent))
            ratio = _MARGIN * spent[0] / max(size, 1)
            self._ratio, self._seen = max(ratio, self._ratio if self._seen else 0.0), True
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():
                one.set_result(None)
