"""The recipe: what it may say, what its errors say, and that it is the same after saving."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cai.config import Recipe, load_recipe, parse_set
from cai.documents import Document
from cai.errors import ConfigError

RECIPES = Path(__file__).resolve().parent.parent / "pipelines"


def load(tmp_path: Path, text: str, *assignments: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "r.yaml", [parse_set(one) for one in assignments])


def fault(tmp_path: Path, text: str, *assignments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *assignments)
    return str(caught.value).replace(f"{tmp_path}/", "")


def sections(model: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    inner = [field.annotation for field in model.model_fields.values()]
    return [model, *(one for one in inner if isinstance(one, type) and issubclass(one, BaseModel))]


@pytest.mark.parametrize("section", sections())
def test_every_key_has_a_docstring(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_modules_example_is_a_recipe_with_the_documented_keys() -> None:
    import cai.config

    _, _, example = (cai.config.__doc__ or "").partition("\n\n")
    assert Document(example, "docstring").validate(Recipe).judge.principles == 4


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path, []).prompts.limit


def test_no_file_and_no_flags_are_the_defaults() -> None:
    assert load_recipe(None, []) == Recipe()


@pytest.mark.parametrize("text", ["judge:\n", "judge: null\nprompts: ~\n", "policy: {}\ngeneration:\ndataset:\n", "{}"])
def test_an_empty_section_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Recipe()
    assert load(tmp_path, text, "judge.principles=2").judge.principles == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\njudge:\n  principels: all\n", "r.yaml:3: judge.principels: unknown key (did you mean 'principles'?)"),
        ("jugde: {}\n", "r.yaml:1: jugde: unknown key (did you mean 'judge'?)"),
        ("max_tokens: 9\n", "r.yaml:1: max_tokens: unknown key (did you mean 'generation.max_tokens'?)"),
        ("model: x\n", "r.yaml:1: model: unknown key (did you mean 'policy.model' or 'judge.model'?)"),
        ("zzz: 1\n", "r.yaml:1: zzz: unknown key; known keys: constitution, seed, policy, judge, prompts, generation, dataset"),
        ("seed: x\n", "r.yaml:1: seed: expected a whole number, found 'x'"),
        ("seed: true\n", "r.yaml:1: seed: expected something else than true or false, found True"),
        ("judge: 3\n", "r.yaml:1: judge: expected a section with keys, found 3"),
        ("judge: {principles: some}\n", "r.yaml:1: judge.principles: expected a whole number or 'all', found 'some'"),
        ("judge: {principles: 0}\n", "r.yaml:1: judge.principles: expected greater than 0 or 'all', found 0"),
        ("prompts:\n  limit: 0\n", "r.yaml:2: prompts.limit: expected greater than 0, found 0"),
        ("prompts: {source: ''}\n", "r.yaml:1: prompts.source: expected a text that is not empty, found ''"),
        ('constitution: "\\ud800"\n', "r.yaml:1: constitution: expected a text of valid Unicode"),
        (
            "policy: {revision: 1234567}\n",
            "r.yaml:1: policy.revision: expected a text (in quotes where it reads like a number)",
        ),
        (
            "policy: {dtype: int8}\n",
            "r.yaml:1: policy.dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', found 'int8'",
        ),
        ("policy: {exact: 3}\n", "r.yaml:1: policy.exact: expected true or false, found 3"),
        ("generation: {temperature: .nan}\n", "r.yaml:1: generation.temperature: expected less than or equal to 5, found nan"),
        ("generation: {top_p: 0}\n", "r.yaml:1: generation.top_p: expected greater than 0, found 0"),
        ("dataset: {test_fraction: 1}\n", "r.yaml:1: dataset.test_fraction: expected less than 1, found 1"),
        ("seed: 1\nseed: 2\n", "r.yaml:2: seed: this key stands here twice; remove one"),
        ("", "r.yaml: expected a mapping of keys to values, found nothing"),
        (
            "generation:\n  candidates: 1\n  pairs: samples\n",
            "r.yaml:3: generation.pairs: samples compares candidates; set generation.candidates to 2 or more",
        ),
        (
            "generation: {candidates: 2, temperature: 0, pairs: both}\n",
            "r.yaml:1: generation.pairs: both compares candidates, all equal at temperature 0; raise generation.temperature",
        ),
        (
            "generation:\n  rounds: 0\n",
            "r.yaml:1: generation.pairs: revision compares revisions; set generation.rounds to 1 or more",
        ),
        ("judge:\n  revision: main\n", "r.yaml:2: judge.revision: names the revision of judge.model, which is not set"),
    ],
)
def test_a_bad_recipe_is_told_with_file_line_key_and_fix(tmp_path: Path, text: str, message: str) -> None:
    assert fault(tmp_path, text).startswith(message)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("judge.principels=all", "judge.principels: unknown key (did you mean 'principles'?)"),
        ("judgee.principles=all", "judgee: unknown key (did you mean 'judge'?)"),
        ("temperature=1", "temperature: unknown key (did you mean 'generation.temperature'?)"),
        ("judge.principles=x", "judge.principles: expected a whole number or 'all', found 'x'"),
        ("judge.principles.x=3", "'judge.principles' is a value and has no key 'x'"),
        ("judge=4", "judge: expected a section with keys, found 4"),
        ("prompts.column=no", "prompts.column: expected something else than true or false, found False"),
        ("prompts.source=", "prompts.source: expected a text (in quotes where it reads like a number), found None"),
        ("seed", "expected key=value, for example --set judge.principles=all"),
        ("=1", "expected key=value, for example --set judge.principles=all"),
        ("judge..principles=1", "expected key=value, for example --set judge.principles=all"),
    ],
)
def test_a_bad_assignment_is_told_with_the_flag_the_key_and_the_fix(tmp_path: Path, assignment: str, message: str) -> None:
    assert fault(tmp_path, "seed: 1\njudge:\n  principles: 2\n", assignment).startswith(f"--set {assignment}: {message}")


def test_set_wins_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    recipe = load(tmp_path, "seed: 1\njudge: {principles: 2}\n", "judge.principles=all", "seed=2", "seed=3")
    assert (recipe.seed, recipe.judge.principles) == (3, "all")


def test_set_reads_yaml_and_a_lone_dash_is_standard_input(tmp_path: Path) -> None:
    recipe = load(tmp_path, "{}", "prompts.source=-", "policy.exact=true", "generation.exemplars=null", "judge={principles: 3}")
    assert (recipe.prompts.source, recipe.policy.exact, recipe.generation.exemplars) == ("-", True, None)
    assert recipe.judge.principles == 3


def leaves(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {f"{prefix}{name}": value}
    return found


@pytest.mark.parametrize("key", leaves(Recipe()))
def test_every_key_can_be_set_by_a_flag(key: str) -> None:
    default = leaves(Recipe())[key]
    choices = {bool: "true", int: "7", float: "0.5625", str: "other", type(None): "9"}
    names = {"policy.dtype": "float16", "judge.method": "choice", "generation.pairs": "both"}
    texts = {
        "prompts.column",
        "prompts.subset",
        "prompts.revision",
        "policy.revision",
        "policy.device",
        "judge.model",
        "judge.revision",
    }
    text = names.get(key, "'other'" if key in texts | {"dataset.license"} else choices[type(default)])
    more = {"generation.pairs": ["generation.candidates=2"], "judge.revision": ["judge.model=m"]}.get(key, [])
    resolved = leaves(load_recipe(None, [parse_set(one) for one in (*more, f"{key}={text}")]))
    assert str(resolved[key]) == text.strip("'").replace("true", "True")
    changed = {name for name, value in resolved.items() if value != leaves(Recipe())[name]}
    assert changed - {one.split("=")[0] for one in more} == ({key} if key != "judge.method" else set())


def test_paths_are_looked_for_beside_the_recipe_and_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, here = tmp_path / "recipes", tmp_path / "here"
    for path in (folder / "data", here, folder / "benign"):
        path.mkdir(parents=True)
    (folder / "mine.yaml").write_text("")
    (folder / "p.jsonl").write_text("")
    (here / "q.jsonl").write_text("")
    monkeypatch.chdir(here)

    def read(constitution: str, source: str) -> tuple[str, str]:
        recipe = load(folder, f"constitution: {constitution}\nprompts: {{source: {source}}}\n")
        return recipe.constitution, recipe.prompts.source

    assert read("mine.yaml", "p.jsonl") == (f"{folder}/mine.yaml", f"{folder}/p.jsonl")
    assert read("./mine.yaml", "./data") == (f"{folder}/mine.yaml", f"{folder}/data")
    assert read("harmless", "q.jsonl") == ("harmless", "q.jsonl")
    assert read("none.yaml", "benign") == ("none.yaml", "benign")
    assert load(folder, "constitution: mine.yaml", "constitution=mine.yaml").constitution == "mine.yaml"


def test_the_judge_has_the_policys_settings_and_its_own_model() -> None:
    recipe = Recipe.model_validate({"policy": {"model": "a", "revision": "r", "batch_size": 3}})
    assert recipe.judge_model is recipe.policy
    other = Recipe.model_validate({**recipe.model_dump(), "judge": {"model": "b"}}).judge_model
    assert (other.model, other.revision, other.batch_size) == ("b", None, 3)


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: not re.search(r"[\ud800-\udfff]", text))
RECIPE = st.fixed_dictionaries(
    {},
    optional={
        "constitution": TEXT,
        "seed": st.integers(),
        "policy": st.fixed_dictionaries({"model": TEXT, "revision": st.none() | TEXT, "exact": st.booleans()}),
        "judge": st.fixed_dictionaries({"model": TEXT, "principles": st.just("all") | st.integers(1, 99)}),
        "prompts": st.fixed_dictionaries({"source": TEXT | st.just("-"), "column": st.none() | TEXT}),
        "generation": st.fixed_dictionaries({"temperature": st.floats(0, 5), "top_p": st.floats(0.01, 1)}),
        "dataset": st.fixed_dictionaries({"license": st.none() | TEXT | st.sampled_from(["no", "1.0", "2026-01-01", "null"])}),
    },
)


@given(RECIPE)
def test_a_saved_recipe_is_read_back_as_it_was(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    text = recipe.to_yaml()
    assert Document(text, "saved").validate(Recipe) == recipe
    assert set(leaves(recipe)) == {
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in Document(text, "saved").data.items()
        for key in (values if isinstance(values, dict) else [section])
    }


def test_parse_set_splits_at_the_first_equals_sign() -> None:
    assert parse_set(" judge.model =a=b") == ("judge.model", "a=b", "--set  judge.model =a=b")


@given(st.text())
def test_parse_set_without_an_equals_sign_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value, for example"):
        parse_set(text.replace("=", ""))
