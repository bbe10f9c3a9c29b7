"""How many requests a server gets at once, found while running; and caps on requests and tokens a minute.

The window grows while growing pays: each round (about one answer for each request in flight) measures how much work was
answered a second, and a larger window that answers hardly more is given back. So a saturated server that refuses nothing
and only gets slower does not get more. An overload (429, 503) halves the window; it comes back fast to just below where it
was, and slowly from there. A halving after which the share of overloads is the same was for nothing (somebody else's load, or
chance), and is taken back. From time to time a little more and a little less is tried, since capacities change.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable

from aiolimiter import AsyncLimiter

START, MOST = 32, 1024
_MARGIN = 0.95
"""Up to this share of a window that was too large, growth is fast."""
_PAYS = 0.25
"""Growing pays where the work answered grows by this share of the window's growth (both as logarithms), or more."""
_AS_MUCH = 0.93
"""A window a quarter smaller that answers this share of what the larger one did is kept."""
_HOLD = 4
"""Rounds between two trials; each trial that changes nothing doubles it, up to four times as many."""
_ROUND = 16
"""The fewest answers that a round is measured by."""
_HOPELESS = 0.3
"""Where so large a share of a round is refused, the window is too large whatever came before."""
_PATIENCE = 8
"""The most rounds between two steps towards a window that was too large again and again."""
_IMMUNE = 20
"""Rounds in which overloads are not answered by halving, after that was found to be for nothing."""


class Window:
    """The bound on requests in flight at one server; times are seconds of a clock that the caller reads."""

    def __init__(self, fixed: int | None) -> None:
        """`fixed` is the most there may be, and the begin; None: found while running."""
        self.limit = float(fixed or START)
        self.in_flight = 0
        self._fixed, self._most = fixed is not None, float(fixed or MOST)
        self._ceiling = math.inf
        self._seen: dict[Hashable, tuple[int, float]] = {}
        self._before: tuple[float, float] | None = None
        self._trial = "climb"
        self._next_trial = "more"
        self._rest = self._hold = _HOLD
        self._cut_at, self._cut_from, self._share_at_cut = -math.inf, 0.0, 0.0
        self._immune, self._patience = 0, 1
        self._refused = 0.0
        self._restart(-math.inf)

    @property
    def has_room(self) -> bool:
        """Whether one more may be sent."""
        return self.in_flight < max(1, int(self.limit + 1e-9))

    def resume(self, now: float) -> None:
        """Nothing was sent for a while, which says nothing about the window: begin the round anew."""
        self._restart(now)

    def _restart(self, now: float) -> None:
        """Begin a round; it is measured from the first answer to a request that was sent in it."""
        self._sent_after, self._measured_from = now, math.inf
        self._work, self._ends, self._overloads, self._peak = 0.0, 0, 0, 0

    def ended(self, began: float, now: float, kind: Hashable, overloaded: bool) -> None:
        """An attempt ended that was `in_flight` until now; requests of one `kind` take about equally long."""
        self._peak = max(self._peak, self.in_flight)
        self._refused += ((1.0 if overloaded else 0.0) - self._refused) / max(8.0, self.limit)
        work = 0.0 if overloaded else self._worth(kind, now - began)
        if self._measured_from == math.inf:
            if began >= self._sent_after:
                self._measured_from = now
            return
        self._ends += 1
        self._overloads += overloaded
        if overloaded and began >= self._sent_after:
            self._overload(now)
        elif not overloaded:
            self._work += work
            self._recover()
        if self._ends >= max(_ROUND, self.limit) and now > self._measured_from:
            self._judge(now)

    def _worth(self, kind: Hashable, seconds: float) -> float:
        """How much work an answer of this kind is: the mean time of the first ones, so that it does not drift with the load."""
        count, mean = self._seen.get(kind, (0, 0.0))
        if count < _ROUND:
            count, mean = count + 1, mean + (seconds - mean) / (count + 1)
            self._seen[kind] = count, mean
        return mean

    def _overload(self, now: float) -> None:
        """Halve, once for all that were in flight together, and again only where that proves to be too little."""
        hopeless = self._ends >= 8 and self._overloads >= _HOPELESS * self._ends
        if self._trial == "recover" and not hopeless:
            return
        if self._immune and self._refused < 2 * self._share_at_cut + 0.2:
            return
        again = 0.9 * self._ceiling <= self.limit <= 1.1 * self._ceiling
        self._patience = min(_PATIENCE, 2 * self._patience) if again else 1
        self._cut_from, self._share_at_cut = self.limit, max(self._refused, 1 / max(8.0, self.limit))
        self._ceiling, self.limit = self.limit, max(1.0, self.limit / 2)
        self._trial, self._before, self._immune = "recover", None, 0
        self._restart(now)

    def _recover(self) -> None:
        """After a halving, one more for each good answer, up to just below where it was."""
        if self._trial == "recover" and self._ends >= _ROUND // 2 and self._overloads < 0.1 * self._ends:
            self.limit = min(self.limit + 1, max(self.limit, _MARGIN * self._cut_from))

    def _judge(self, now: float) -> None:
        """A round is over: what it says about the window."""
        rate = self._work / (now - self._measured_from)
        limit, idle = self.limit, self._peak < 0.9 * int(self.limit)
        self._immune = max(0, self._immune - 1)
        if self._trial == "recover":
            self._end_recovery(self._overloads / self._ends)
        elif not idle:
            self._next(rate)
        changed = self.limit != limit
        self._restart(now if changed or not idle else self._sent_after)

    def _end_recovery(self, share: float) -> None:
        """Below the old window again: edge up to it. A halving that changed nothing is taken back for some rounds."""
        if 0.5 * self._share_at_cut <= share < _HOPELESS:
            self.limit, self._immune, self._ceiling = self._cut_from, _IMMUNE, math.inf
            self._trial, self._rest = "hold", self._hold
        elif self.limit >= _MARGIN * self._cut_from - 1:
            self._trial, self._rest = "edge", self._patience

    def _next(self, rate: float) -> None:
        match self._trial:
            case "edge":
                self._edge(rate)
            case _ if self._fixed:
                self.limit = self._most
            case "climb":
                self._climb(rate)
            case "less":
                self._after_less(rate)
            case _:
                self._held(rate)

    def _edge(self, rate: float) -> None:
        """A little more each round, or each few where it always ends here; beyond what was too large, grow freely."""
        self._rest -= 1
        if self._rest > 0:
            return
        self._rest = self._patience
        self.limit = min(self._most, self.limit + max(1.0, 0.01 * self.limit))
        if self.limit > 1.05 * self._ceiling or self.limit >= self._most:
            self._ceiling, self._before, self._trial = math.inf, None, "climb"

    def _climb(self, rate: float) -> None:
        """Go on as long as it pays; else back to the knee: what was answered before, a little more."""
        if self._before is None or self._before[0] >= self.limit:
            self._grow(rate, 2.0)
            return
        limit, earlier = self._before
        gain = math.log(max(rate, 1e-9) / max(earlier, 1e-9)) / math.log(self.limit / limit)
        if gain >= _PAYS:
            self._hold = _HOLD
            self._grow(rate, 2.0 if gain > 0.7 else 1.4)
            return
        self.limit = min(self.limit, max(limit, 1.1 * limit * min(rate / max(earlier, 1e-9), self.limit / limit)))
        self._trial, self._before, self._hold = "hold", (self.limit, rate), min(4 * _HOLD, 2 * self._hold)
        self._rest = self._hold

    def _grow(self, rate: float, factor: float) -> None:
        """By a factor, as far as there is room."""
        self._before, self._trial = (self.limit, rate), "climb"
        self.limit = min(self.limit * factor, self._most)
        if self.limit >= self._most:
            self._trial, self._rest = "hold", self._hold

    def _held(self, rate: float) -> None:
        """Rest, while the rate that later trials are compared with is averaged; then try more and less in turn."""
        earlier = self._before[1] if self._before and self._before[0] == self.limit else rate
        self._before = (self.limit, 0.7 * earlier + 0.3 * rate)
        self._rest -= 1
        if self._rest > 0:
            return
        if self._next_trial == "more":
            self._next_trial = "less"
            self._grow(self._before[1], 1.25)
        else:
            self._next_trial, self._trial = "more", "less"
            self.limit = max(1.0, 0.75 * self.limit)

    def _after_less(self, rate: float) -> None:
        """Keep the smaller window where it answered as much."""
        assert self._before
        limit, earlier = self._before
        if rate < _AS_MUCH * earlier:
            self.limit = limit
            self._before = None
        self._trial, self._rest = "hold", self._hold


class Rates:
    """Caps on requests and on tokens a minute, spread over the minute.

    What is sent within any minute is at most the cap, a second's worth of it, and the one request that it begins with.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: int | None) -> None:
        """None: no cap."""
        self._requests = _limiter(requests_per_minute)
        self._tokens = _limiter(tokens_per_minute)
        self._turn = asyncio.Lock()
        self._ratio = 1.0

    async def wait(self, tokens: float) -> None:
        """Until a request of about so many tokens may be sent: all of them are waited for, in the order of the calls."""
        if self._requests:
            await self._requests.acquire()
        if self._tokens:
            left = max(tokens * self._ratio, 1.0)
            async with self._turn:
                while left > 0:
                    part = min(left, self._tokens.max_rate)
                    await self._tokens.acquire(part)
                    left -= part

    def learn(self, expected: float, spent: float) -> None:
        """How far off an estimate was; 0 spent: the server did not say, which teaches nothing."""
        if self._tokens and expected > 0 and spent > 0:
            self._ratio += 0.05 * (spent / expected - self._ratio)


def _limiter(per_minute: float | None) -> AsyncLimiter | None:
    """A leaky bucket that holds a second's worth, and one at least."""
    if per_minute is None:
        return None
    second = per_minute / 60
    return AsyncLimiter(second, 1) if second >= 1 else AsyncLimiter(1, 60 / per_minute)
