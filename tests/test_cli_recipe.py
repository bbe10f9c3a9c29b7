"""`cai recipe`: every key is told, and what is shown is a recipe again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.config import Recipe, load_recipe
from tests.runs import ROOT, command
from tests.test_config import leaves


def test_keys_tells_every_key_with_its_type_default_and_docstring():
    done = command("recipe", "keys")
    assert done.returncode == 0
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert [key for key in leaves(Recipe()) if not any(line.startswith(f"{key}: ") for line in lines)] == []
    for line in (
        "seed: 0  (whole number)",
        "judge.principles: 4  (whole number or 'all')",
        "policy.exact: false  (true or false)",
        "prompts.limit: null  (whole number or null)",
        "generation.pairs: \"revision\"  ('revision' or 'samples' or 'both')",
        "generation.temperature: 0.7  (number)",
        "Rounds of critique and revision, each under another principle.",
        "The model that answers, criticises and revises.",
    ):
        assert line in lines
    assert max(map(len, done.stdout.splitlines())) < 80


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("dpo", "reference: null  (text or null)"),
        ("pipeline", "rounds: 1  (whole number)"),
        ("ppo", "  gold.stop: true  (true or false)"),
        ("ppo", "  trl.num_iterations: 4"),
        ("ppo", "      Epochs over each rollout."),
    ],
)
def test_keys_of_another_stage(stage: str, line: str):
    done = command("recipe", "keys", stage)
    assert done.returncode == 0
    assert line in done.stdout.splitlines()


def test_keys_of_no_stage_are_told_with_the_nearest():
    done = command("recipe", "keys", "dpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no stage 'dpu' (did you mean 'dpo'?); expected one of generate, pipeline, sft, reward, dpo, kto" in done.stderr


@pytest.mark.parametrize("name", [None, "demo-dataset", "demo", ROOT / "pipelines" / "demo.yaml"])
def test_show_prints_a_recipe_that_is_the_same_again(tmp_path: Path, name: str | None):
    done = command("recipe", "show", *filter(None, [name]))
    assert done.returncode == 0
    (tmp_path / "shown.yaml").write_text(done.stdout)
    assert load_recipe(tmp_path / "shown.yaml", []) == load_recipe(name, [])


def test_show_of_an_unknown_recipe_tells_those_that_there_are():
    done = command("recipe", "show", "demmo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cai: no recipe 'demmo': neither a file nor a built-in name (did you mean 'demo'?); built in: " in done.stderr
