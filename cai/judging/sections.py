"""The sections of a recipe that say who judges: of a panel one for each member."""

from __future__ import annotations

from collections.abc import Sequence

from cai.config import JudgeConfig, PanelMember, Recipe


def judge_sections(judge: JudgeConfig) -> list[JudgeConfig]:
    """The section of each judge: of a panel, of its members."""
    return [judge.member(one) for one in judge.members] or [judge]


def section_names(recipe: Recipe) -> list[str]:
    """For each judge the section in which its model's settings are, or would be: `policy`, `judge`, `judge.members[0]`."""
    own = [("judge", recipe.judge)]
    members = [(f"judge.members[{number}]", member) for number, member in enumerate(recipe.judge.members)]
    return [_nearest(recipe, [member, *own]) for member in members] or [_nearest(recipe, own)]


def _nearest(recipe: Recipe, sections: Sequence[tuple[str, PanelMember | JudgeConfig]]) -> str:
    """The first section that names a model or how to ask it; the policy's where that is the policy's model, asked as it is."""
    for name, section in sections:
        if section.server or section.model:
            return name if section.server or section.model != recipe.policy.model else "policy"
    return "policy"
