"""The sections in which the settings of judges' models are."""

from __future__ import annotations

from typing import Any

import pytest

from cai.config import Recipe
from cai.judging import section_names

URL, OTHER = "http://a/v1", "http://b/v1"
SET = {"retries": 1}


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        ({}, ["policy"]),
        ({"server": SET}, ["judge"]),
        ({"model": URL}, ["policy"]),
        ({"model": URL, "server": SET}, ["judge"]),
        ({"model": OTHER}, ["judge"]),
        ({"members": [{}, {"server": SET}, {"model": OTHER}, {"model": URL}]}, ["policy", "[1]", "[2]", "policy"]),
        ({"model": OTHER, "members": [{}, {"server": SET}, {"model": URL}]}, ["judge", "[1]", "policy"]),
        ({"server": SET, "members": [{}, {"model": URL}]}, ["judge", "policy"]),
    ],
)
def test_each_judge_has_one(judge: dict[str, Any], expected: list[str]) -> None:
    if "members" in judge:
        named = [{"name": str(number), **one} for number, one in enumerate(judge["members"])]
        judge = {**judge, "method": "panel", "members": named}
    recipe = Recipe.model_validate({"policy": {"model": URL}, "judge": judge})
    names = section_names(recipe)
    assert [name.removeprefix("judge.members") for name in names] == expected
    for name, section in zip(names, recipe.judge.members or [recipe.judge], strict=True):
        own = recipe.policy if name == "policy" else recipe.judge if name == "judge" else section
        judged = recipe.judge.member(section) if recipe.judge.members else recipe.judge  # type: ignore[arg-type]
        assert own.server is None or recipe.judge_model(judged).server == own.server, "the settings that hold"
