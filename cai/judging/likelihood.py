"""Contrastive likelihood: how much more likely a completion is where a principle is held than where it is violated.

log p(completion | the principle held) - log p(completion | the principle violated), per principle; the difference between
two completions is the logit of the preference (RLCD, Yang et al. 2023, arXiv 2307.12950, section 3; DLMA, Liu et al.
2024, arXiv 2402.11907, section 3.2, which uses the sum). Nothing is decoded and there is no order. `judge.length` says
what length does: `sum` adds over tokens, so long completions weigh more; `mean` divides by the completion's tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.config import JudgeConfig
from cai.constitution import Principle
from cai.engines import Engine, LoglikelihoodRequest
from cai.judging.pointwise import PointwiseJudge
from cai.types import Message, Messages

_FOLDER = Path(__file__).parent
_HELD, _VIOLATED = (
    Template(_FOLDER.joinpath(f"likelihood_{name}.txt").read_text(encoding="utf-8").strip()) for name in ("held", "violated")
)


class LikelihoodJudge(PointwiseJudge):
    """Compares how a completion's likelihood answers to each of some principles."""

    name = "likelihood"

    def __init__(self, engine: Engine, config: JudgeConfig) -> None:
        """The engine must be able to give a `loglikelihood`."""
        super().__init__()
        self._engine, self._length = engine, config.length

    async def rate(self, prompt: Messages, text: str, principles: Sequence[Principle]) -> list[float]:
        """The log-ratio of each principle, in nats (a token, where `judge.length` is `mean`)."""
        return list(await asyncio.gather(*(self._ratio(prompt, text, principle) for principle in principles)))

    async def _ratio(self, prompt: Messages, text: str, principle: Principle) -> float:
        held, violated = await asyncio.gather(
            *(
                self._engine.loglikelihood(LoglikelihoodRequest(told(prompt, principle, template), text))
                for template in (_HELD, _VIOLATED)
            )
        )
        ratio = held.logprob - violated.logprob
        return ratio / held.tokens if self._length == "mean" else ratio


def told(prompt: Messages, principle: Principle, template: Template) -> Messages:
    """The dialogue with an instruction after its last turn, where all principles still share its beginning."""
    *before, last = prompt
    instruction = template.substitute(question=principle.preference or "")
    return (*before, Message(last.role, f"{last.content}\n\n{instruction}"))
