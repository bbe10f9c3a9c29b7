"""What a run would cost, told before it makes a call: the number of calls exactly (at most), the tokens roughly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cai.config import Recipe
from cai.constitution import Constitution
from cai.generation.dialogues import critique_request, few_shot, revision_request
from cai.generation.record import calls_per_prompt, comparisons_per_prompt
from cai.judging import generated_tokens
from cai.judging.choice import question
from cai.prompts import Row
from cai.types import Messages

_CHARACTERS = 4
"""Characters of English that make one token, roughly, for today's tokenizers."""


@dataclass(frozen=True)
class Estimate:
    """Calls by step, and tokens by role: at most so many calls, about so many tokens if every text were full length."""

    prompts: int
    bad_rows: int
    calls: dict[str, int]
    policy_prompt_tokens: int
    policy_completion_tokens: int
    judge_prompt_tokens: int
    judge_completion_tokens: int


def estimate(recipe: Recipe, constitution: Constitution, rows: Iterable[Row]) -> Estimate:
    """Reads every row once and keeps none; shared beginnings are counted as often as they are sent."""
    prompts = bad = characters = 0
    for row in rows:
        if row.prompt is None:
            bad += 1
            continue
        prompts += 1
        characters += sum(len(turn.content) for turn in row.prompt.messages)
    each = calls_per_prompt(recipe, constitution)
    calls = {step: count * prompts for step, count in each.items()}
    most = recipe.generation.max_tokens
    asked = characters // _CHARACTERS
    shots = _mean_tokens([few_shot(constitution, constitution.exemplars[: recipe.generation.exemplars])])
    criticise = _mean_tokens([critique_request((), "", principle) for principle in constitution.critiquing])
    revise = _mean_tokens([revision_request("", principle) for principle in constitution.critiquing])
    compare = _mean_tokens([question((), "", "", principle) for principle in constitution.comparing if principle.preference])
    critiques = each["critique"] * asked + calls["critique"] * (shots + most + criticise)
    revisions = each["revision"] * asked + calls["revision"] * (shots + 2 * most + criticise + revise)
    return Estimate(
        prompts,
        bad,
        calls,
        policy_prompt_tokens=each["answer"] * asked + critiques + revisions,
        policy_completion_tokens=(calls["answer"] + calls["critique"] + calls["revision"]) * most,
        judge_prompt_tokens=each["judge"] * asked + calls["judge"] * (2 * most + compare),
        judge_completion_tokens=prompts * generated_tokens(recipe.judge, constitution, comparisons_per_prompt(recipe)),
    )


def _mean_tokens(dialogues: Sequence[Messages]) -> int:
    characters = sum(len(turn.content) for dialogue in dialogues for turn in dialogue)
    return characters // max(1, len(dialogues)) // _CHARACTERS
