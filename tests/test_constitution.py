"""Constitutions: what the built-in ones hold, how files are composed, and what errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cai.constitution import Constitution, Example, Exemplar, Principle, built_in_names, load_constitution, to_yaml
from cai.documents import Document
from cai.errors import ConstitutionError

HEAD = "name: mine\ndescription: d\nlicense: MIT\n"
"""Three lines, so that what a test adds begins on line 4."""
ONE = HEAD + "principles:\n  - id: a\n    critique: c\n    revision: r\n    preference: p\n"


def written(folder: Path, text: str, name: str = "c.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def load(folder: Path, text: str) -> Constitution:
    return load_constitution(written(folder, text))


def fault(folder: Path, text: str) -> str:
    with pytest.raises(ConstitutionError) as caught:
        load(folder, text)
    return str(caught.value).replace(f"{folder}/", "")


def constitution(**changed: Any) -> Constitution:
    principle = {"id": "a", "critique": "c", "revision": "r", "preference": "p", **changed}
    return Constitution.model_validate({"name": "n", "description": "d", "license": "l", "principles": [principle]})


# --- built in


def test_the_built_in_constitutions() -> None:
    assert built_in_names() == ["concise-and-clear", "harmless", "helpful-honest-harmless"]


@pytest.mark.parametrize("name", built_in_names())
def test_a_built_in_constitution_serves_critique_revision_and_comparison(name: str) -> None:
    one = load_constitution(name)
    assert one.name == name
    assert one.license == "Apache-2.0"
    assert len(one.principles) >= (16 if name == "harmless" else 10)
    assert one.critiquing == one.comparing == one.principles
    assert len(one.exemplars) == (5 if name == "harmless" else 4)
    assert len({exemplar.principle for exemplar in one.exemplars}) == len(one.exemplars)
    assert sum(bool(principle.examples) for principle in one.principles) >= 5
    for part in ("critique", "revision", "preference"):
        assert len({getattr(principle, part) for principle in one.principles}) == len(one.principles)


@pytest.mark.parametrize("name", built_in_names())
def test_the_texts_of_a_built_in_constitution_can_stand_in_a_prompt(name: str) -> None:
    one = load_constitution(name)
    for principle in one.principles:
        for text in (principle.critique, principle.revision, principle.preference):
            assert text
            assert "\n" not in text
            assert text[-1] in ".?"
            assert "{" not in text
        assert principle.preference
        assert principle.preference.startswith("Which completion")
    for exemplar in one.exemplars:
        assert exemplar.revision != exemplar.completion
    for example in (example for principle in one.principles for example in principle.examples):
        assert example.chosen != example.rejected


def test_no_two_built_in_principles_have_the_same_id() -> None:
    ids = [principle.id for name in built_in_names() for principle in load_constitution(name).principles]
    assert len(ids) == len(set(ids))


# --- what is valid


def test_a_principle_may_have_critique_and_revision_or_preference_or_all(tmp_path: Path) -> None:
    text = (
        HEAD
        + "principles:\n- {id: a, critique: c, revision: r}\n- {id: b, preference: p}\n- {id: c, critique: c, revision: r, "
    )
    one = load(tmp_path, text + "preference: p}\n")
    assert [principle.id for principle in one.critiquing] == ["a", "c"]
    assert [principle.id for principle in one.comparing] == ["b", "c"]


def test_defaults_and_empty_lists(tmp_path: Path) -> None:
    one = load(tmp_path, ONE + "    tags:\n    examples:\nextends:\nexemplars:\n")
    assert one.version == "1.0"
    assert (one.extends, one.exemplars) == ((), ())
    assert one.principles == (Principle(id="a", critique="c", revision="r", preference="p", weight=1, tags=(), examples=()),)


def test_every_key_is_read(tmp_path: Path) -> None:
    text = """
name: full
version: "2"
description: all keys
license: MIT
extends: []
principles:
  - id: a.b_c-1
    critique: >-
      folded
      text
    revision: " stripped "
    preference: "{braces} {{ jinja }} %s <|im_start|>"
    weight: 2
    tags: [x, y-z]
    examples: [{prompt: p, chosen: c, rejected: r}]
    note: why
exemplars:
  - {prompt: p, completion: c, principle: a.b_c-1, critique: k, revision: r}
"""
    one = load(tmp_path, text)
    assert one.principles[0] == Principle(
        id="a.b_c-1",
        critique="folded text",
        revision="stripped",
        preference="{braces} {{ jinja }} %s <|im_start|>",
        weight=2.0,
        tags=("x", "y-z"),
        examples=(Example(prompt="p", chosen="c", rejected="r"),),
        note="why",
    )
    assert one.exemplars == (Exemplar(prompt="p", completion="c", principle="a.b_c-1", critique="k", revision="r"),)
    assert one.principle("a.b_c-1") is one.principles[0]
    with pytest.raises(KeyError):
        one.principle("b")


# --- what is not


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principles:\n  - id: a\n    critique: c\n", "c.yaml:5: principles[0]: principle 'a' has no 'revision'"),
        (
            "principles:\n  - id: a\n    revision: r\n    preference: p\n",
            "c.yaml:5: principles[0]: principle 'a' has no 'critique'",
        ),
        ("principles:\n  - id: a\n", "c.yaml:5: principles[0]: principle 'a' needs a critique and a revision, or a preference"),
        ("principles:\n  - id: a\n    critque: c\n", "c.yaml:6: principles[0].critque: unknown key (did you mean 'critique'?)"),
        ("principles:\n  - preference: p\n", "c.yaml:5: principles[0].id: this key is required"),
        ("principles:\n  - id: A b\n    preference: p\n", "c.yaml:5: principles[0].id: expected a name of a-z, 0-9, '.', '_'"),
        (
            "principles:\n  - id: 7\n    preference: p\n",
            "c.yaml:5: principles[0].id: expected a text (in quotes where it reads",
        ),
        (
            "principles:\n  - id: a\n    preference: ' '\n",
            "c.yaml:6: principles[0].preference: expected a text that is not empty",
        ),
        (
            "principles:\n  - id: a\n    preference: yes\n",
            "c.yaml:6: principles[0].preference: expected something else than true",
        ),
        (
            "principles:\n  - id: a\n    preference: p\n    weight: 0\n",
            "c.yaml:7: principles[0].weight: expected greater than 0",
        ),
        (
            "principles:\n  - id: a\n    preference: p\n    weight: .inf\n",
            "c.yaml:7: principles[0].weight: expected a finite number",
        ),
        (
            "principles:\n  - id: a\n    preference: p\n    weight: on\n",
            "c.yaml:7: principles[0].weight: expected something else",
        ),
        (
            "principles:\n  - id: a\n    preference: p\n    tags: x\n",
            "c.yaml:7: principles[0].tags: expected a list, found 'x'",
        ),
        (
            "principles:\n  - id: a\n    preference: p\n    examples:\n    - {prompt: p, chosen: c, rejectd: r}\n",
            "c.yaml:8: principles[0].examples[0].rejected: this key is required\n"
            "c.yaml:8: principles[0].examples[0].rejectd: unknown key (did you mean 'rejected'?)",
        ),
        ("principles:\n  - a\n", "c.yaml:5: principles[0]: expected a section with keys, found 'a'"),
        ("principles: {a: {preference: p}}\n", "c.yaml:4: principles: expected a list, found"),
        ("principles: []\n", "c.yaml:4: principles: expected at least one principle"),
        ("", "c.yaml: principles: expected at least one principle"),
        (
            "principles:\n  - id: a\n    preference: p\n  - id: a\n    preference: q\n",
            "c.yaml:7: principles[1].id: principle id 'a' is used twice; give one of them another id",
        ),
        ("principles:\n  - id: a\n    id: b\n    preference: p\n", "c.yaml:6: principles[0].id: this key stands here twice"),
        ("license: GPL\n", "c.yaml:4: license: this key stands here twice; remove one"),
        ("principels: []\n", "c.yaml:4: principels: unknown key (did you mean 'principles'?)"),
        ("version: 2.0\n", "c.yaml:4: version: expected a text (in quotes where it reads like a number), found 2.0"),
        ("extends: harmless\n", "c.yaml:4: extends: expected a list, found 'harmless'"),
        ("principles: [\n", "c.yaml:5: not valid YAML: "),
    ],
)
def test_a_bad_constitution_is_told_with_file_line_key_and_fix(tmp_path: Path, text: str, message: str) -> None:
    assert fault(tmp_path, HEAD + text).startswith(message)


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    assert fault(tmp_path, "name: X\n") == (
        "c.yaml:1: name: expected a name of a-z, 0-9, '.', '_' and '-', found 'X'\n"
        "c.yaml: description: this key is required\n"
        "c.yaml: license: this key is required"
    )


@pytest.mark.parametrize(
    ("principle", "fix"),
    [("aa", " (did you mean 'a'?)"), ("zzz", "; those that have both: a")],
)
def test_an_exemplar_of_an_unknown_principle(tmp_path: Path, principle: str, fix: str) -> None:
    exemplar = f"exemplars:\n  - prompt: p\n    completion: c\n    principle: {principle}\n    critique: c\n    revision: r\n"
    message = f"c.yaml:12: exemplars[0].principle: there is no principle '{principle}' with a critique and a revision{fix}"
    assert fault(tmp_path, ONE + exemplar) == message


def test_an_exemplar_of_a_principle_that_only_compares(tmp_path: Path) -> None:
    exemplar = "exemplars:\n  - {prompt: p, completion: c, principle: a, critique: c, revision: r}\n"
    assert fault(tmp_path, HEAD + "principles:\n  - {id: a, preference: p}\n" + exemplar) == (
        "c.yaml:7: exemplars[0].principle: there is no principle 'a' with a critique and a revision; those that have both: none"
    )


@pytest.mark.parametrize("name", ["harmles", "", ".", "/", "no.yaml", "~nobody-there/c.yaml", "x" * 5000, "a\0b", "\ud800"])
def test_an_unknown_constitution(name: str) -> None:
    with pytest.raises(ConstitutionError) as caught:
        load_constitution(name)
    assert str(caught.value).startswith(f"no constitution '{name}': neither a file nor a built-in name")
    assert "built in: concise-and-clear, harmless, helpful-honest-harmless" in str(caught.value)
    assert ("did you mean 'harmless'?" in str(caught.value)) == (name == "harmles")


def test_a_built_in_name_is_never_a_file_that_happens_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, ONE, "harmless")
    assert load_constitution("harmless").name == "harmless"
    assert load_constitution("./harmless").name == "mine"


# --- extends


def extending(names: str, principles: str = "") -> str:
    return f"name: mine\ndescription: d\nlicense: MIT\nextends: [{names}]\n" + (principles and f"principles:\n{principles}")


def test_what_is_extended_comes_first_and_a_same_id_overrides_in_its_place(tmp_path: Path) -> None:
    base = load_constitution("harmless")
    one = load(tmp_path, extending("harmless", "  - {id: mine, preference: p}\n  - {id: crime, critique: c, revision: r}\n"))
    assert [principle.id for principle in one.principles] == [*(principle.id for principle in base.principles), "mine"]
    assert one.principle("crime") == Principle(id="crime", critique="c", revision="r")
    assert one.principle("hate") == base.principle("hate")
    assert one.exemplars == base.exemplars
    assert one.extends == ()
    assert (one.name, one.license) == ("mine", "MIT")


def test_of_several_that_are_extended_the_later_wins_and_exemplars_add_up(tmp_path: Path) -> None:
    written(tmp_path, ONE.replace("preference: p", "preference: first"), "first.yaml")
    written(tmp_path, ONE.replace("preference: p", "preference: second"), "second.yaml")
    one = load(tmp_path, extending("first.yaml, second.yaml, harmless, harmless"))
    assert one.principles[0].preference == "second"
    assert len(one.principles) == 1 + len(load_constitution("harmless").principles)
    assert one.exemplars == load_constitution("harmless").exemplars


def test_what_is_extended_on_many_ways_is_read_once(tmp_path: Path) -> None:
    written(tmp_path, ONE, "level0.yaml")
    for level in range(1, 40):
        written(tmp_path, extending(f"level{level - 1}.yaml, level{level - 1}.yaml"), f"level{level}.yaml")
    assert load_constitution(str(tmp_path / "level39.yaml")).principles[0].id == "a"


def test_a_base_is_looked_for_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    written(tmp_path, ONE, "root.yaml")
    written(tmp_path / "a", extending("../root.yaml"), "middle.yaml")
    top = written(tmp_path / "a" / "b", extending("../middle.yaml", "  - {id: top, preference: p}\n"), "top.yaml")
    monkeypatch.chdir(tmp_path.parent)
    assert [principle.id for principle in load_constitution(top).principles] == ["a", "top"]


def test_a_missing_base_is_told_with_its_line(tmp_path: Path) -> None:
    message = fault(tmp_path, "name: mine\ndescription: d\nlicense: MIT\nextends:\n  - harmless\n  - harmles\n")
    assert message.startswith("c.yaml:6: extends[1]: no constitution 'harmles'")
    assert "did you mean 'harmless'?" in message


def test_a_broken_base_is_told_with_both_lines(tmp_path: Path) -> None:
    base = written(tmp_path, HEAD + "principles:\n  - id: a\n", "base.yaml")
    message = fault(tmp_path, extending("base.yaml"))
    assert message.startswith("c.yaml:4: extends[0]: base.yaml:5: principles[0]: principle 'a' needs")
    assert Path(base).exists()


def test_a_circle_is_told_with_its_chain(tmp_path: Path) -> None:
    written(tmp_path, extending("two.yaml"), "one.yaml")
    written(tmp_path, extending("one.yaml"), "two.yaml")
    assert fault(tmp_path, extending("one.yaml")).endswith(
        "extends itself: c -> one -> two -> one; remove one of these 'extends'"
    )
    assert "c -> c" in fault(tmp_path, extending("c.yaml"))


def test_an_override_must_keep_what_an_inherited_exemplar_answers(tmp_path: Path) -> None:
    answered = load_constitution("harmless").exemplars[0].principle
    tail = f": an inherited exemplar answers '{answered}', which must keep a critique and a revision"
    override = f"  - {{id: {answered}, preference: p}}\n"
    assert fault(tmp_path, extending("harmless", override)) == f"c.yaml:6: principles[0]{tail}"
    written(tmp_path, HEAD + "principles:\n" + override, "weak.yaml")
    assert fault(tmp_path, extending("harmless, weak.yaml")) == f"c.yaml:4: extends{tail}"


# --- hash and saving


def test_the_hash_is_of_what_a_model_can_see() -> None:
    same = constitution()
    assert constitution(note="why", tags=["x"]).hash == same.hash
    assert same.model_copy(update={"name": "o", "description": "o", "version": "9", "license": "o"}).hash == same.hash
    changed = [{"critique": "C"}, {"revision": "R"}, {"preference": "P"}, {"id": "b"}, {"weight": 2}, {"preference": None}]
    hashes = {constitution(**one).hash for one in changed}
    assert len(hashes | {same.hash}) == len(changed) + 1


def test_the_hash_is_the_same_in_every_version_of_the_program() -> None:
    assert constitution().hash == "eb87f60b4b19db96"


def test_the_hash_sees_exemplars_and_what_is_inherited(tmp_path: Path) -> None:
    exemplar = "exemplars:\n  - {prompt: p, completion: c, principle: a, critique: c, revision: r}\n"
    assert load(tmp_path, ONE).hash != load(tmp_path, ONE + exemplar).hash
    assert load(tmp_path, extending("harmless")).hash == load_constitution("harmless").hash


@pytest.mark.parametrize("name", built_in_names())
def test_a_saved_constitution_is_read_back_as_it_was(tmp_path: Path, name: str) -> None:
    one = load_constitution(name)
    again = load(tmp_path, to_yaml(one))
    assert again == one
    assert again.hash == one.hash


def test_a_saved_constitution_names_its_version() -> None:
    assert list(Document(to_yaml(constitution()), "saved").data) == ["name", "version", "description", "license", "principles"]


TEXT = st.text(min_size=1, max_size=30).filter(str.strip)
NAME = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True)
PRINCIPLE = st.fixed_dictionaries(
    {"critique": TEXT, "revision": TEXT},
    optional={
        "preference": TEXT,
        "note": TEXT,
        "weight": st.floats(1e-6, 1e6),
        "tags": st.lists(NAME, max_size=2),
        "examples": st.lists(st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}), max_size=1),
    },
)


@given(st.dictionaries(NAME, PRINCIPLE, min_size=1, max_size=3), TEXT)
def test_any_constitution_is_read_back_as_it_was(principles: dict[str, dict[str, Any]], text: str) -> None:
    exemplar = {"prompt": text, "completion": text, "principle": next(iter(principles)), "critique": text, "revision": text}
    listed = [{"id": name, **parts} for name, parts in principles.items()]
    one = Constitution.model_validate(
        {"name": "n", "version": text, "description": text, "license": text, "principles": listed, "exemplars": [exemplar]}
    )
    again = Document(to_yaml(one), "saved").validate(Constitution)
    assert again == one
    assert again.hash == one.hash


def test_saved_text_is_readable_yaml() -> None:
    saved = to_yaml(constitution(critique="Où est-ce nuisible ? 日本"))
    assert "Où est-ce nuisible ? 日本" in saved
    assert yaml.safe_load(saved)["principles"][0]["critique"] == "Où est-ce nuisible ? 日本"
