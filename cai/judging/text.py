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
from cai.judging.base import Named, Reading, neutral, principle_verdict, show_conversation, turned, verdict
from cai.seeds import derive_seed
from cai.types import Message, Messages, PrincipleVerdict, Source, Verdict

_TEMPLATE = Template(Path(__file__).with_name("text.txt").read_text(encoding="utf-8"))
_ANSWER = re.compile(r"(?:(?:the )?(?:better )?(?:answer|completion)(?: is)?:? *)?[\"'(*]*([AB])[\"')*]*\.?", re.IGNORECASE)
_MAX_TOKENS = 12
_TRIES = 3
"""How often one sample is drawn anew where it is no answer."""


class TextJudge:
    """Asks for a letter under each of some principles."""

    def __init__(self, engine: Engine, config: JudgeConfig) -> None:
        """The engine must be able to `generate`."""
        self._engine, self._config = engine, config

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The verdict on two completions, each a (name, text). Raises `VerdictError` for what is no answer."""
        verdicts = await asyncio.gather(*(self._under(prompt, pair, one, derive_seed(seed, one.id)) for one in principles))
        return verdict(pair, source, verdicts)

    async def _under(self, prompt: Messages, pair: tuple[Named, Named], principle: Principle, seed: int) -> PrincipleVerdict:
        (_, first), (_, second) = pair
        shown, swapped = await asyncio.gather(
            self._read(question(prompt, first, second, principle), seed),
            self._read(question(prompt, second, first, principle), seed),
        )
        readings = (shown, turned(swapped))
        leanings = [(first_share - second_share) / 2 for first_share, second_share in readings]
        return principle_verdict("text", principle.id, principle.weight, readings, leanings)

    async def _read(self, asked: Messages, seed: int) -> Reading:
        """The shares of the samples that chose A and B."""
        numbers = range(self._config.samples)
        letters = await asyncio.gather(*(self._letter(asked, derive_seed(seed, number)) for number in numbers))
        share = letters.count("A") / len(letters)
        return share, 1 - share

    async def _letter(self, asked: Messages, seed: int) -> str:
        text, config = "", self._config
        for number in range(_TRIES if config.temperature else 1):
            request = GenerateRequest(asked, _MAX_TOKENS, config.temperature, 1.0, derive_seed(seed, "try", number))
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
    text = _TEMPLATE.substitute(
        conversation=show_conversation(prompt),
        first=neutral(first),
        second=neutral(second),
        question=principle.preference or "",
    )
    return (Message("user", text.strip()),)
