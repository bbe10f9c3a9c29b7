"""The recipe: what it may say, what its errors say, and that it is the same after saving."""

from __future__ import annotations

import ast
import functools
import re
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from cai.config import RATING, JudgeConfig, Recipe, load_recipe, parse_set
from cai.documents import Document, parse_scalar
from cai.errors import ConfigError
from cai.servers import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "pipelines"
PANEL = "judge: {method: panel, members: [{name: a}, {name: b, method: score, weight: 2}]}\n"


def load(tmp_path: Path, text: str, *assignments: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "r.yaml", [parse_set(one) for one in assignments])


def fault(tmp_path: Path, text: str, *assignments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *assignments)
    return str(caught.value).replace(f"{tmp_path}/", "")


def sections(model: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    inner = [one for field in model.model_fields.values() for one in (field.annotation, *typing.get_args(field.annotation))]
    found = [one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)]
    return [model, *(deeper for one in found for deeper in sections(one))]


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


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "pipelines/demo.yaml"])
def test_a_shipped_recipe_is_found_by_name_from_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name, []) == load_recipe(RECIPES / "demo.yaml", [])
    (tmp_path / "pipelines").mkdir()
    (tmp_path / name).write_text("seed: 7\n")
    assert load_recipe(name, []).seed == 7, "a file that is here wins"


@pytest.mark.parametrize("name", ["dmeo", "dmeo.yaml", "elsewhere/demos.yaml"])
def test_an_unknown_recipe_is_told_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, [])
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    assert str(caught.value) == (
        f"no recipe '{name}': neither a file nor a built-in name (did you mean 'demo'?); built in: {known}"
    )


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; expected a file or a built-in name"):
        load_recipe(tmp_path, [])


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
        ("max_tokens: 9\n", "r.yaml:1: max_tokens: unknown key (did you mean 'judge.max_tokens' or 'generation.max_tokens'?)"),
        ("model: x\n", "r.yaml:1: model: unknown key (did you mean 'policy.model' or 'judge.model'?)"),
        (
            "zzz: 1\n",
            "r.yaml:1: zzz: unknown key; known keys: constitution, seed, policy, judge, prompts, generation, dataset, budget",
        ),
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
            "r.yaml:3: generation.pairs: pairs of kind 'samples' compare candidates; set generation.candidates to 2 or more",
        ),
        (
            "generation: {candidates: 2, temperature: 0, pairs: both}\n",
            "r.yaml:1: generation.pairs: pairs of kind 'both' compare candidates, equal at temperature 0; raise ",
        ),
        (
            "generation:\n  rounds: 0\n",
            "r.yaml:2: generation.rounds: pairs of kind 'revision' compare revisions; set generation.rounds to 1 or more, or ",
        ),
        ("judge:\n  revision: main\n", "r.yaml:2: judge.revision: names the revision of judge.model, which is not set"),
        (
            "judge: {method: reasonin}\n",
            "r.yaml:1: judge.method: expected 'choice', 'reasoning', 'likelihood', 'score', 'text',",
        ),
        (
            "judge:\n  method: reasoning\n  clamp: [0.6, 0.4]\n",
            "r.yaml:3: judge.clamp: expected [low, high] with 0 <= low < 0.5 < high <= 1, found [0.6, 0.4]",
        ),
        ("judge: {clamp: [-0.1, 0.6]}\n", "r.yaml:1: judge.clamp: expected [low, high] with 0 <= low < 0.5 < high <= 1"),
        ("judge: {clamp: [0.4, .nan]}\n", "r.yaml:1: judge.clamp: expected [low, high] with 0 <= low < 0.5 < high <= 1"),
        ("judge: {samples: 0}\n", "r.yaml:1: judge.samples: expected greater than 0, found 0"),
        ("judge: {exemplars: -1}\n", "r.yaml:1: judge.exemplars: expected greater than or equal to 0, found -1"),
        (
            "judge:\n  members: [{name: a}, {name: b}]\n",
            "r.yaml:2: judge.members: only a panel has members; set judge.method to panel",
        ),
        ("judge: {method: panel}\n", "r.yaml:1: judge.members: a panel needs two members or more, with different names"),
        (
            "judge:\n  method: panel\n  members: [{name: a}, {name: a}]\n",
            "r.yaml:3: judge.members: a panel needs two members or more, with different names",
        ),
        (
            "judge:\n  method: panel\n  members: [{name: a}, {name: b, method: panel}]\n",
            "r.yaml:3: judge.members: a member of a panel cannot be a panel",
        ),
        ("judge: {method: panel, members: [{name: a, weigth: 1}]}\n", "r.yaml:1: judge.members[0].weigth: unknown key"),
        (
            "judge: {method: panel, members: [{name: a}, {name: b, weight: 0}]}\n",
            "r.yaml:1: judge.members[1].weight: expected greater than 0, found 0",
        ),
        (
            "generation:\n  pairs: samples\n  candidates: 4\n  comparisons: best-worst\n",
            "r.yaml:4: generation.comparisons: best-worst needs a judge that rates each alone: likelihood, score, checks, ",
        ),
        (
            "dataset:\n  ranking: bradley-terry\n",
            "r.yaml:2: dataset.ranking: bradley-terry ranks candidates that were all compared; set generation.comparisons: all",
        ),
        (
            "generation: {pairs: both, candidates: 4, comparisons: tournament}\ndataset: {ranking: bradley-terry}\n",
            "r.yaml:2: dataset.ranking: bradley-terry ranks candidates that were all compared",
        ),
        (
            "dataset:\n  sft: best\n",
            "r.yaml:2: dataset.sft: best is of candidates that were compared; set generation.pairs: samples (or both)",
        ),
    ],
)
def test_a_bad_recipe_is_told_with_file_line_key_and_fix(tmp_path: Path, text: str, message: str) -> None:
    assert fault(tmp_path, text).startswith(message)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("judge.principels=all", "judge.principels: unknown key (did you mean 'principles'?)"),
        ("judgee.principles=all", "judgee: unknown key (did you mean 'judge'?)"),
        ("temperature=1", "temperature: unknown key (did you mean 'judge.temperature' or 'generation.temperature'?)"),
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


@pytest.mark.parametrize("text", ["{}", Recipe().to_yaml()])
def test_of_two_keys_that_do_not_go_together_the_one_that_was_set_last_is_blamed(tmp_path: Path, text: str) -> None:
    told = fault(tmp_path, text, "generation.candidates=4", "generation.rounds=0")
    assert told.startswith("--set generation.rounds=0: generation.rounds: pairs of kind 'revision' compare revisions; ")
    told = fault(tmp_path, text, "generation.candidates=1", "generation.pairs=both")
    assert told.startswith("--set generation.pairs=both: generation.pairs: pairs of kind 'both' compare candidates; ")
    told = fault(tmp_path, text, "generation.pairs=both", "generation.candidates=1")
    assert told.startswith("--set generation.candidates=1: generation.candidates: pairs of kind 'both' compare candidates; ")


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


SETTINGS = {
    "policy.dtype": "float16",
    "policy.vllm.args": "{max_num_seqs: 3}",
    "judge.vllm": "{adapter: lora}",
    "judge.method": "score",
    "judge.layout": "principle-first",
    "judge.clamp": "[0.25, 0.75]",
    "judge.length": "sum",
    "judge.members": "[{name: a}, {name: b}]",
    "generation.pairs": "both",
    "generation.comparisons": "tournament",
    "dataset.ranking": "bradley-terry",
    "dataset.sft": "all",
    "ray.address": "head:6379",
    "judge.server": "{retries: 9}",
    "policy.server.api": "completions",
    "policy.server.replicas": "['http://other/v1']",
    "policy.server.extra_body": "{top_k: 20}",
}
"""Values for keys that do not take just any of their type."""
TEXTS = {
    "prompts.column",
    "prompts.subset",
    "prompts.data_dir",
    "prompts.revision",
    "policy.revision",
    "policy.device",
    "policy.vllm.adapter",
    "judge.model",
    "judge.revision",
    "judge.calibration",
    "dataset.license",
    "policy.server.name",
    "policy.server.key_file",
}
"""Keys whose default is null and that take a text."""
BESIDE = {
    "generation.pairs": ["generation.candidates=2"],
    "judge.revision": ["judge.model=m"],
    "judge.vllm": ["judge.model=vllm:m"],
    "judge.members": ["judge.method=panel"],
    "dataset.ranking": ["generation.candidates=2", "generation.pairs=samples"],
    "judge.server": ["judge.model=http://127.0.0.1/v1"],
    **{f"policy.server.{name}": ["policy.model=http://127.0.0.1/v1"] for name in ServerConfig.model_fields},
}
"""What has to be said beside a key."""


def annotation(key: str) -> Any:
    model: Any = Recipe
    for name in key.split("."):
        model = model.model_fields[name].annotation
    return model


@pytest.mark.parametrize("key", leaves(Recipe()))
def test_every_key_can_be_set_by_a_flag(key: str) -> None:
    default = leaves(Recipe())[key]
    choices = {bool: "true", int: "7", float: "0.5625", str: "other", type(None): "9"}
    text = SETTINGS.get(key) or ("'other'" if key in TEXTS else choices[type(default)])
    more = BESIDE.get(key, [])
    recipe = load_recipe(None, [parse_set(one) for one in (*more, f"{key}={text}")])
    if key == "judge.server":
        assert recipe.judge.server == ServerConfig(retries=9)
        return
    found = functools.reduce(getattr, key.split("."), recipe)
    assert found == TypeAdapter(annotation(key)).validate_python(parse_scalar(text)) != default
    changed = {name for name, value in leaves(recipe).items() if value != leaves(Recipe()).get(name)}
    below = set(leaves(found, f"{key}.")) if isinstance(found, BaseModel) else {key}
    assert changed - {one.split("=")[0] for one in more} <= below


def read_attributes() -> Counter[str]:
    """The names of all attributes that code reads, but for those that only a validator of the recipe looks at."""
    found: Counter[str] = Counter()
    for file in (ROOT / "cai").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        checks = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef) and "validator" in "".join(map(ast.dump, outer.decorator_list))
            for inner in ast.walk(outer)
        }
        found.update(
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks
        )
    found.update(re.findall(r"recipe\.\w+\.(\w+)", (ROOT / "cai/dataset/card.md.jinja").read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("section", sections())
def test_no_key_is_ignored_by_all_code(section: type[BaseModel]) -> None:
    """That each key of `judge`, `generation` and `dataset` changes something is in test_pipeline and test_dataset."""
    read = read_attributes()
    assert [name for name in section.model_fields if not read[name]] == []


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
    assert recipe.judge_model(recipe.judge) is recipe.policy
    other = recipe.judge_model(JudgeConfig(model="b"))
    assert (other.model, other.revision, other.batch_size) == ("b", None, 3)
    assert recipe.judge_model(JudgeConfig(model="b", revision="s")).revision == "s"


def test_a_judge_on_the_policys_server_is_asked_as_the_policy_is_and_another_server_is_not_told_its_key() -> None:
    policy = {"model": "http://a/v1", "server": {"key_env": "MINE", "retries": 1}}
    recipe = Recipe.model_validate({"policy": policy, "judge": {"model": "http://a/v1"}})
    assert recipe.judge_model(recipe.judge) == recipe.policy
    assert recipe.judge_model(JudgeConfig(model="http://b/v1")).server == ServerConfig()
    own = JudgeConfig(model="http://b/v1", server=ServerConfig(key_env="OTHER"))
    assert recipe.judge_model(own).server.key_env == "OTHER"
    assert recipe.judge_model(JudgeConfig(server=ServerConfig(retries=3))).server.retries == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: {server: {name: x}}", "r.yaml:1: policy.server: these settings are for the URL of a server, and this model"),
        ("judge: {model: m, server: {name: x}}", "r.yaml:1: judge.server: these settings are for the URL of a server"),
        ("judge: {server: {name: x}}", "r.yaml:1: judge.server: these settings are for the URL of a server"),
        ("policy: {model: 'http:///v1'}", "r.yaml:1: policy.model: expected the base URL of a server, such as http://127"),
        ("policy: {model: 'http://h:99999/'}", "r.yaml:1: policy.model: expected the base URL of a server"),
        ("policy: {model: 'http://a:b@h/v1'}", "r.yaml:1: policy.model: a URL with a user or a password in it is refused"),
        ("judge: {model: 'http://h/v1?api_key=1'}", "r.yaml:1: judge.model: a URL with '?' or '#' is refused"),
        (
            "policy: {model: 'http://h/v1', server: {replicas: [h]}}",
            "r.yaml:1: policy.server.replicas: expected the base URL of a server",
        ),
        (
            "policy: {model: 'http://h/v1', server: {extra_body: {messages: []}}}",
            "r.yaml:1: policy.server.extra_body: 'messages' is not for extra_body; the engine sets it",
        ),
        (
            "policy: {model: 'http://h/v1', server: {extra_body: {X-Api-Key: abc}}}",
            "r.yaml:1: policy.server.extra_body: 'X-Api-Key' is not for extra_body, which stands in recipe.yaml; "
            "give a key by key_env or key_file",
        ),
        ("budget: {tokens: 0}", "r.yaml:1: budget.tokens: expected greater than 0, found 0"),
    ],
)
def test_what_is_wrong_about_a_server_is_told(tmp_path: Path, text: str, message: str) -> None:
    assert fault(tmp_path, text).startswith(message)


def test_the_hash_of_a_recipe_does_not_hang_on_the_order_of_a_free_mapping() -> None:
    one, other = (
        Recipe.model_validate({"policy": {"model": "http://h/v1", "server": {"extra_body": extra}}})
        for extra in ({"a": 1, "b": {"c": 2}}, {"b": {"c": 2}, "a": 1})
    )
    assert one == other
    assert hash(one) == hash(other) != hash(Recipe())


def test_a_member_of_a_panel_has_the_panels_settings_and_what_it_says_itself(tmp_path: Path) -> None:
    text = """
judge:
  {method: panel, model: a, revision: r, samples: 3, layout: principle-first, calibration: null, members: [
    {name: one}, {name: two, method: score}, {name: three, model: b}, {name: four, model: b, revision: s}]}
"""
    recipe = load(tmp_path, text)
    members = [recipe.judge.member(one) for one in recipe.judge.members]
    assert [(one.method, one.model, one.revision) for one in members] == [
        ("choice", "a", "r"),
        ("score", "a", "r"),
        ("choice", "b", None),
        ("choice", "b", "s"),
    ]
    assert {(one.samples, one.layout, one.members) for one in members} == {(3, "principle-first", ())}
    own = load(tmp_path, PANEL)
    assert own.judge_model(own.judge.member(own.judge.members[0])) is own.policy


@pytest.mark.parametrize("method", RATING)
def test_best_worst_goes_with_every_judge_that_rates_each_alone(tmp_path: Path, method: str) -> None:
    text = f"generation: {{pairs: samples, candidates: 4, comparisons: best-worst}}\njudge: {{method: {method}}}\n"
    assert load(tmp_path, text).generation.comparisons == "best-worst"


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: not re.search(r"[\ud800-\udfff]", text))
RECIPE = st.fixed_dictionaries(
    {},
    optional={
        "constitution": TEXT,
        "seed": st.integers(),
        "policy": st.fixed_dictionaries({"model": TEXT, "revision": st.none() | TEXT, "exact": st.booleans()}),
        "judge": st.fixed_dictionaries(
            {
                "model": TEXT,
                "principles": st.just("all") | st.integers(1, 99),
                "clamp": st.tuples(st.floats(0, 0.49), st.floats(0.51, 1)),
                "calibration": st.none() | TEXT,
            }
        )
        | st.builds(
            lambda names: {"method": "panel", "members": [{"name": name, "model": name} for name in names]},
            st.lists(TEXT, min_size=2, max_size=3, unique=True),
        ),
        "prompts": st.fixed_dictionaries({"source": TEXT | st.just("-"), "column": st.none() | TEXT}),
        "generation": st.fixed_dictionaries({"temperature": st.floats(0, 5), "top_p": st.floats(0.01, 1)}),
        "dataset": st.fixed_dictionaries({"license": st.none() | TEXT | st.sampled_from(["no", "1.0", "2026-01-01", "null"])}),
    },
)


@settings(deadline=None)
@given(RECIPE)
def test_a_saved_recipe_is_read_back_as_it_was(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    text = recipe.to_yaml()
    assert Document(text, "saved").validate(Recipe) == recipe
    data = Document(text, "saved").data
    assert [key for key in leaves(recipe) if not in_document(data, key.split("."))] == []


def in_document(data: Any, path: list[str]) -> bool:
    return not path or (path[0] in data and in_document(data[path[0]], path[1:]))


def test_parse_set_splits_at_the_first_equals_sign() -> None:
    assert parse_set(" judge.model =a=b") == ("judge.model", "a=b", "--set  judge.model =a=b")


@given(st.text())
def test_parse_set_without_an_equals_sign_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value, for example"):
        parse_set(text.replace("=", ""))


def test_a_members_calibration_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("")
    text = "judge: {method: panel, members: [{name: a, calibration: c.yaml}, {name: b, calibration: nowhere.yaml}]}"
    recipe = load(tmp_path, text)
    assert [one.calibration for one in recipe.judge.members] == [str(tmp_path / "c.yaml"), "nowhere.yaml"]
    judges = [recipe.judge.member(one) for one in recipe.judge.members]
    assert [one.calibration for one in judges] == [str(tmp_path / "c.yaml"), "nowhere.yaml"]


def test_a_members_revision_without_a_model_is_refused(tmp_path: Path) -> None:
    text = "judge:\n  method: panel\n  members:\n    - {name: a}\n    - name: b\n      revision: main\n"
    problem = r"r.yaml:6: judge.members\[1\].revision: names the revision of the member's own model, which is not set"
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, text)
