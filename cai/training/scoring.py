"""Rows of completions scored by a reward model, as lines that say what each reward is made of.

{"origin": "pairs.jsonl:3", "id": "17", "side": "chosen", "reward": 0.81, "objectives": {"helpful": 0.9, "harmless": 0.4},
 "members": [0.7, 0.9], "length": 0.02, "tokens": 214, "characters": 731, "completion": "..."}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cai.errors import RequestError
from cai.intervals import named, numbered, share
from cai.prompts import Row
from cai.rewards.model import RewardModel
from cai.training.length_effect import length_correlation

_SEED = 0
"""Of the resamples."""
_AT_ONCE = 256
"""Dialogues that are sorted by length together, and written together."""
Line = dict[str, Any]


class Candidate(NamedTuple):
    """One completion to score."""

    origin: str
    id: str
    side: str
    """`chosen` or `rejected` in a pair, else `completion`."""
    dialogue: list[dict[str, str]]


def candidates(model: RewardModel, rows: Iterable[Row], bad: Callable[[str, str], object]) -> Iterator[Candidate]:
    """The completions of all rows; `bad` is told the place and the fault of a row that cannot be scored."""
    for row in rows:
        if row.prompt is None:
            bad(row.origin, str(row.error))
            continue
        prompt = [{"role": one.role, "content": one.content} for one in row.prompt.messages]
        sides = ("chosen", "rejected") if len(row.given) > 1 else ("completion",)
        found = [
            Candidate(row.origin, row.prompt.id, side, [*prompt, {"role": "assistant", "content": text}])
            for side, text in zip(sides, row.given, strict=True)
        ]
        try:
            for one in found:
                model.encode(one.dialogue)
        except RequestError as exc:
            bad(row.origin, str(exc))
            continue
        yield from found


def score_candidates(model: RewardModel, given: Sequence[Candidate], told: Callable[[int], object]) -> Iterator[Line]:
    """A line for each, in order; `told` is called with how many more passes of a dialogue through a member are done."""
    for start in range(0, len(given), _AT_ONCE):
        chunk = given[start : start + _AT_ONCE]
        scores = model.score([one.dialogue for one in chunk], told)
        for place, one in enumerate(chunk):
            text = one.dialogue[-1]["content"]
            yield {
                "origin": one.origin,
                "id": one.id,
                "side": one.side,
                "reward": float(scores.reward[place]),
                "objectives": dict(zip(model.spec.objectives, scores.objectives[place].tolist(), strict=True)),
                "members": scores.members[place].tolist(),
                "length": float(scores.length[place]),
                "tokens": int(scores.tokens[place]),
                "characters": len(text),
                "completion": text,
            }


def summarize(lines: Sequence[Line], prompts: Sequence[object]) -> dict[str, float]:
    """Mean and deviation of the reward, and its correlation with length.

    Of pairs also the share whose chosen completion is ahead, with its interval.
    """
    reward = np.array([one["reward"] for one in lines])
    places = numbered(prompts)
    lengths = np.array([one["characters"] for one in lines])
    found = {"completions": len(lines), "mean": float(reward.mean()), "deviation": float(reward.std())}
    found |= {f"length_correlation_{name}": value for name, value in length_correlation(reward, lengths, places).items()}
    is_chosen, is_rejected = (np.array([one["side"] == side for one in lines]) for side in ("chosen", "rejected"))
    if not is_chosen.any():
        return found
    ahead = (reward[is_chosen] > reward[is_rejected]).astype(float)
    return found | named("chosen_ahead", share(ahead, places[is_chosen], _SEED))
