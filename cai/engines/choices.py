"""The log-probability of each of some choices from a server that says what the next token may be, one position a question.

Choices are walked as a tree: at each position one question tells the log-probabilities of the tokens there. `A` and `B` need
one question; `1` to `10` one, or a second after `1` where a digit is a token. A choice that another one begins with (`1` of
`10`) stands for itself alone: what goes on to the longer one is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from cai.errors import VerdictError

Ask = Callable[[str], Awaitable[Mapping[str, float]]]
"""The log-probabilities of some next tokens, as texts, after the prompt and a part of a choice."""
AskIds = Callable[[str, Sequence[int]], Awaitable[Mapping[int, float]]]
"""Those of chosen tokens."""


class Spelled(NamedTuple):
    """A choice in tokens, and for each token the part of the choice that stands before it."""

    tokens: tuple[int, ...]
    before: tuple[str, ...]


async def by_text(ask: Ask, choices: Sequence[str], begins: bool, goes_on: bool) -> list[float]:
    """From the likeliest tokens alone, as all servers with `top_logprobs` give them.

    A choice that is not among them gets an upper bound: the least log-probability that is there, or what is left of
    the whole where that is less. This can only make a judge less sure, and it is far below what decides a verdict. Where no
    choice is among them, that is no verdict (`VerdictError`). With `begins`, the choice begins the
    answer, and a space before it does not count. Without `goes_on` the server cannot be asked behind a first token.
    """
    top = _cleaned(await ask(""), begins)
    found: dict[str, float] = {}
    for choice in choices:
        if choice in top:
            found[choice] = top[choice]
    for choice in choices:
        starts = [token for token in top if token and choice != token and choice.startswith(token)]
        if choice not in found and starts and goes_on:
            rest = await _rest(ask, max(starts, key=len), choice, top)
            if rest is not None:
                found[choice] = rest
                start = max(starts, key=len)
                if start in choices and start in found:
                    found[start] = _without(found[start], rest)
    if not found:
        raise VerdictError(f"none of {', '.join(choices)} is among the likeliest tokens: {list(top)[:8]}")
    bound = _bound(top)
    return [found.get(choice, bound) for choice in choices]


async def _rest(ask: Ask, start: str, choice: str, top: Mapping[str, float]) -> float | None:
    """The log-probability of a choice that begins with the token `start`; None where it leaves the likeliest tokens."""
    logprob, prefix = top[start], start
    while prefix != choice:
        following = await ask(prefix)
        steps = [token for token in following if token and choice[len(prefix) :].startswith(token)]
        if not steps:
            return logprob + _bound(following)
        step = max(steps, key=len)
        logprob, prefix = logprob + following[step], prefix + step
    return logprob


def _cleaned(top: Mapping[str, float], begins: bool) -> dict[str, float]:
    """Tokens that are the same text (with a space before it or not) taken together."""
    summed: dict[str, float] = {}
    for token, logprob in top.items():
        text = token.lstrip() if begins else token
        summed[text] = _sum(summed[text], logprob) if text in summed else logprob
    return summed


def _sum(one: float, other: float) -> float:
    high, low = max(one, other), min(one, other)
    return high + math.log1p(math.exp(low - high))


def _without(whole: float, part: float) -> float:
    """log(exp(whole) - exp(part)), kept finite."""
    return whole + math.log1p(-min(math.exp(part - whole), 1 - 1e-9))


def _bound(top: Mapping[str, float]) -> float:
    """The most that a token can have which is not among the likeliest."""
    left = 1 - sum(math.exp(value) for value in top.values())
    return min(min(top.values()), math.log(max(left, 1e-12)))


async def by_ids(ask: AskIds, spelled: Sequence[Spelled]) -> list[float]:
    """Exactly, from servers that say the log-probability of any token that they are asked for."""
    wanted: dict[str, set[int]] = {}
    for one in spelled:
        for before, token in zip(one.before, one.tokens, strict=True):
            wanted.setdefault(before, set()).add(token)
    found = {before: await ask(before, sorted(tokens)) for before, tokens in wanted.items()}
    own = {
        one.tokens: sum(found[before][token] for before, token in zip(one.before, one.tokens, strict=True)) for one in spelled
    }
    return [_exclusive(one.tokens, own) for one in spelled]


def _exclusive(tokens: tuple[int, ...], own: Mapping[tuple[int, ...], float]) -> float:
    """Without the choices that go on from this one, of which only the nearest count."""
    logprob = own[tokens]
    beyond = [other for other in own if len(other) > len(tokens) and other[: len(tokens)] == tokens]
    nearest = [one for one in beyond if not any(len(other) < len(one) and one[: len(other)] == other for other in beyond)]
    share = sum(math.exp(own[one] - logprob) for one in nearest)
    return logprob + math.log1p(-min(share, 1 - 1e-9)) if nearest else logprob
