"""Each completion alone, rated from 1 to 10: the expected rating by log-probability (d-RLAIF, Lee et al. 2023, section 2.3).

One call a completion and principle, so the cost is linear in the number of completions. The difference of two expected
ratings is the logit of the preference; a calibration says how much a point is worth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.constitution import Principle
from cai.engines import Engine
from cai.errors import VerdictError
from cai.judging.base import neutral, show_conversation
from cai.judging.pointwise import PointwiseJudge
from cai.types import Message, Messages

RATINGS = tuple(map(str, range(1, 11)))
_FOLDER = Path(__file__).parent
_TEMPLATE = Template(_FOLDER.joinpath("score.txt").read_text(encoding="utf-8"))
_PREFILL = _FOLDER.joinpath("score_prefill.txt").read_text(encoding="utf-8")


class ScoreJudge(PointwiseJudge):
    """Rates each completion by itself under each of some principles."""

    name = "score"

    def __init__(self, engine: Engine) -> None:
        """The engine must be able to give `choice_logprobs`."""
        super().__init__()
        self._engine = engine

    async def rate(self, prompt: Messages, text: str, principles: Sequence[Principle]) -> list[float]:
        """The expected rating under each principle, in [1, 10]."""
        questions = [question(prompt, text, principle) for principle in principles]
        answers = await self._engine.choice_logprobs(questions, RATINGS)
        return [expected_rating(answer.logprobs) for answer in answers]


def expected_rating(logprobs: Sequence[float]) -> float:
    """The mean of 1 to 10 under the probabilities, which are scaled to sum to 1."""
    if not all(map(math.isfinite, logprobs)):
        raise VerdictError(f"expected {len(RATINGS)} finite log-probabilities, got {list(logprobs)!r:.200}")
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    return sum(rating * weight for rating, weight in enumerate(weights, 1)) / sum(weights)


def question(prompt: Messages, text: str, principle: Principle) -> Messages:
    """The dialogue that asks for a rating; it ends in the middle of the judge's answer, before the number."""
    shown = _TEMPLATE.substitute(
        conversation=show_conversation(prompt), completion=neutral(text), question=principle.preference or ""
    )
    return Message("user", shown.strip()), Message("assistant", _PREFILL)
