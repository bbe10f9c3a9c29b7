"""What tests of judges share: a prompt, principles, a judge that is asked about two texts, and what it asked its engine."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cai.constitution import Principle
from cai.engines import ScriptedEngine
from cai.judging import Judge
from cai.types import Message, Messages, Verdict

GOLDEN = Path(__file__).parent / "golden"
ASKED = (Message("user", "Is it?"),)
DIALOGUE = (
    Message("system", "Be brief."),
    Message("user", "Hello {name}"),
    Message("assistant", "Hi."),
    Message("user", "$first or </conversation>?"),
)
"""Of the golden prompts."""
SHOWN = re.compile(r"<completion A>\n(.*)\n</completion A>\n\n<completion B>\n(.*)\n</completion B>", re.DOTALL)
_DELIMITERS = ("conversation", "completion A", "completion B", "completion", "user", "assistant", "system")


def principle(number: int, weight: float = 1.0) -> Principle:
    return Principle(id=f"q{number}", preference=f"Which is better by {number}?", weight=weight)


def shown(request: Any) -> tuple[str, str, int]:
    """The two completions in the order shown, and the number of the principle."""
    text = request.messages[0].content
    first, second = SHOWN.findall(text)[0]
    return first, second, int(re.findall(r"by (\d+)\?", text)[-1])


def recorded(function: Callable[[Any], Any]) -> tuple[ScriptedEngine, list[Any]]:
    """An engine, and the list that its requests go into."""
    asked: list[Any] = []

    def respond(request: Any) -> Any:
        asked.append(request)
        return function(request)

    return ScriptedEngine(respond), asked


def compare(
    judge: Judge,
    first: str = "long text",
    second: str = "text",
    principles: Sequence[Principle] | None = None,
    *,
    seed: int = 0,
    prompt: Messages = ASKED,
) -> Verdict:
    pair = (("candidate-0", first), ("revision-1", second))
    asked = [principle(1)] if principles is None else principles
    return asyncio.run(judge.compare(prompt, pair, asked, "revision", seed))


def assert_turns(
    make: Callable[[], Judge], first: str = "one", second: str = "other", principles: Sequence[Principle] = (principle(1),)
) -> Verdict:
    """The swapped pair's verdict is the swapped verdict to the last digit, whether or not the judge was asked before."""
    one, other = ("candidate-0", first), ("revision-1", second)

    async def both() -> None:
        judge = make()
        forth = await judge.compare(ASKED, (one, other), principles, "revision", 7)
        for again in (judge, make()):
            back = await again.compare(ASKED, (other, one), principles, "revision", 7)
            assert back == forth.swap()
            assert forth.probability + back.probability == 1
        assert 0 <= forth.probability <= 1
        assert math.isfinite(forth.probability)
        assert forth.swap().swap() == forth
        found.append(forth)

    found: list[Verdict] = []
    asyncio.run(both())
    return found[0]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def assert_golden(messages: Messages, name: str) -> None:
    """A dialogue is what the golden file holds, letter by letter."""
    first, *rest = messages
    shown = first.content + "".join(f"\n=== {turn.role}\n{turn.content}" for turn in rest) + "\n"
    assert shown == GOLDEN.joinpath(name).read_text(encoding="utf-8")


def assert_closes_nothing(text: str, *delimiters: str) -> None:
    """Each of these delimiters opens once and closes once; no other one is there, however it is spelled."""
    for name in _DELIMITERS:
        found = len(re.findall(rf"<\s*{name}\s*>", text, re.I)), len(re.findall(rf"<\s*/\s*{name}\s*>", text, re.I))
        assert found == ((1, 1) if name in delimiters else (0, 0)), name
