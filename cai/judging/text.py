"""A generated verdict, parsed strictly, for servers that give no log-probabilities.

The judge writes one letter. What is not exactly an answer raises `VerdictError` and is counted, never a tie, after so
many further samples as the recipe allows. Both orders; the reading of an order is the share of its samples that chose
each completion.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.config import JudgeConfig
from cai.constitution import Principle
from cai.engines import Engine, GenerateRequest
from cai.errors import VerdictError
from cai.judging.base import Reading
from cai.judging.ordered import OrderedJudge, ask
from cai.seeds import derive_seed
from cai.types import Messages

_TEMPLATE = Template(Path(__file__).with_name("text.txt").read_text(encoding="utf-8"))
_ANSWER = re.compile(r"(?:(?:the )?(?:better )?(?:answer|completion)(?: is)?:? *)?[\"'(*]*([AB])[\"')*]*\.?", re.IGNORECASE)
MAX_TOKENS = 12
_TRIES = 3
"""How often one sample is drawn anew where it is no answer."""


class TextJudge(OrderedJudge):
    """Asks for a letter under each of some principles."""

    name = "text"

    def __init__(self, engine: Engine, config: JudgeConfig) -> None:
        """The engine must be able to `generate`."""
        self._engine, self._config = engine, config

    async def read(self, prompt: Messages, shown: tuple[str, str], principles: Sequence[Principle], seed: int) -> list[Reading]:
        """The shares of the samples that chose A and B. Raises `VerdictError` for what is no answer."""
        asked = [(question(prompt, *shown, principle), derive_seed(seed, principle.id)) for principle in principles]
        return list(await asyncio.gather(*(self._under(*one) for one in asked)))

    def leaning(self, reading: Reading) -> float:
        """Half the difference of the shares."""
        return (reading[0] - reading[1]) / 2

    async def _under(self, asked: Messages, seed: int) -> Reading:
        numbers = range(self._config.samples)
        letters = await asyncio.gather(*(self._letter(asked, derive_seed(seed, number)) for number in numbers))
        share = letters.count("A") / len(letters)
        return share, 1 - share

    async def _letter(self, asked: Messages, seed: int) -> str:
        text, config = "", self._config
        for number in range(_TRIES if config.temperature else 1):
            request = GenerateRequest(asked, MAX_TOKENS, config.temperature, 1.0, derive_seed(seed, "try", number))
            text = (await self._engine.generate(request)).text
            if letter := parse(text):
                return letter
        raise VerdictError(f"expected A or B, the judge wrote {text!r:.200}")


def parse(text: str) -> str | None:
    """`A` or `B` where the whole text is such an answer, else None."""
    match = _ANSWER.fullmatch(text.strip())
    return match[1].upper() if match else None


def question(prompt: Messages, first: str, second: str, principle: Principle) -> Messages:
    """The dialogue that asks for a letter."""
    return (ask(_TEMPLATE, prompt, (first, second), principle),)
