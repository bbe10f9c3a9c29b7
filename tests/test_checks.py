"""Checks: what each kind passes, what is refused before a run, and that what a check cannot say is never a verdict."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.config import JudgeConfig
from cai.constitution import Check, Principle, load_constitution
from cai.errors import ConfigError, ConstitutionError, VerdictError
from cai.judging import build_judge
from cai.judging.checks import ChecksJudge, prepare, python_hashes, score
from cai.pipeline import label, read_records
from cai.types import Message
from tests.judges import ASKED, assert_turns, compare, recorded, sigmoid
from tests.records import HOSTILE
from tests.runs import manifest, quarantine, real_command, recipe, written_rows

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und geht danach nach Hause, um zu schlafen."
HARD = (
    "Notwithstanding considerable methodological heterogeneity, contemporary interdisciplinary investigations "
    "overwhelmingly demonstrate institutional accountability's indispensability."
)
EASY = "The cat sat. The dog ran. It was fun."


def checking(number=1, weight=1.0, **check):
    return Principle(id=f"c{number}", check=Check(**check), weight=weight)


def passes(text, **check):
    return score(checking(**check), ASKED, text)


@pytest.mark.parametrize(
    ("check", "passing", "failing"),
    [
        ({"max_words": 3}, "one two\nthree", "one two three four"),
        ({"min_words": 3}, "one two three", "one  two"),
        ({"max_characters": 3}, "äöü", "äöü!"),
        ({"min_characters": 3}, "äöü", "äö"),
        ({"must_match": r"^Dear \w+"}, "Dear you,", "My dear you"),
        ({"must_match": "(?i)sorry"}, "I am SORRY.", "I am glad."),
        ({"must_not_match": "(?i)as an ai"}, "I am one.", "As an AI, I cannot"),
        ({"must_match": r"\p{Lu}"}, "É", "é"),
        ({"valid_json": True}, ' {"a": [1, null]} ', '{"a": 1} and more'),
        ({"valid_json": True}, "3", ""),
        ({"valid_json": True}, '["NaN"]', "[NaN]"),
        ({"valid_json": False}, "Infinity", '"Infinity"'),
        ({"valid_json": True}, "-1", '{"a": -Infinity}'),
        ({"valid_json": False}, "{'a': 1}", "[]"),
        ({"language": "en"}, ENGLISH, GERMAN),
        ({"language": "de"}, GERMAN, ENGLISH),
        ({"max_grade": 6}, EASY, HARD),
    ],
)
def test_each_kind_passes_and_fails(check, passing, failing):
    assert passes(passing, **check) == 1.0
    assert passes(failing, **check) == 0.0
    found = compare(ChecksJudge(), passing, failing, [checking(**check)])
    assert found.probability == 1.0
    assert (found.principles[0].judge, found.principles[0].readings) == ("checks", ((1.0, 0.0),))
    assert compare(ChecksJudge(), passing, passing, [checking(**check)]).probability == 0.5


def test_the_grade_is_flesch_and_kincaids():
    """Nine words of a syllable each in three sentences; a text without words asks for nothing."""
    grade = 0.39 * 9 / 3 + 11.8 * 9 / 9 - 15.59
    assert passes(EASY, max_grade=grade + 0.01) == 1.0
    assert passes(EASY, max_grade=grade - 0.01) == 0.0
    assert [passes(text, max_grade=0) for text in ("", "... !")] == [1.0, 1.0]


def test_json_that_is_nested_too_deep_is_no_json():
    assert passes("[" * 100_000, valid_json=True) == 0.0


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_pass_or_fail(text):
    for check in (
        {"max_words": 3},
        {"must_match": "<"},
        {"valid_json": True},
        {"language": "en"},
        {"max_grade": 8},
        {"python": "tests.test_checks:long"},
    ):
        assert passes(text, **check) in (0.0, 1.0)


# --- a constitution's file


def constitution(folder, *lines, head="name: checked\ndescription: D.\nlicense: MIT\nprinciples:\n"):
    file = folder / "checked.yaml"
    file.write_text(head + "".join(f"  {line}\n" for line in lines))
    return file


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        ("{max_word: 3}", r"checked.yaml:6: principles\[0\].check.max_word: unknown key \(did you mean 'max_words'\?\)"),
        (
            "{max_words: 3, min_words: 1}",
            r"checked.yaml:6: principles\[0\].check: expected exactly one of max_words, min_words",
        ),
        ("{}", r"checked.yaml:6: principles\[0\].check: expected exactly one of"),
        ("{must_match: '('}", r"checked.yaml:6: principles\[0\].check.must_match: not a regular expression: missing \)"),
        ("{must_not_match: '[a'}", r"checked.yaml:6: .*must_not_match: not a regular expression"),
        ("{max_words: 0}", r"checked.yaml:6: .*max_words: expected greater than 0, found 0"),
        ("{min_characters: many}", r"checked.yaml:6: .*min_characters: expected a whole number"),
        ("{max_grade: .nan}", r"checked.yaml:6: .*max_grade: expected a finite number"),
        ("{language: english}", r"checked.yaml:6: .*language: "),
        ("{language: zz}", r"checked.yaml:6: .*check.language: 'zz' is no language .* tells apart \(did you mean 'z"),
        ("{language: eng}", r"checked.yaml:6: .*check.language: 'eng' is no .* \(did you mean 'en'\?\); it knows .*\bde\b"),
        ("{python: nothing}", r"checked.yaml:6: .*python: "),
        ("{valid_json: perhaps}", r"checked.yaml:6: .*valid_json: expected true or false"),
    ],
)
def test_a_wrong_check_is_told_by_line_and_key(tmp_path, check, problem):
    with pytest.raises(ConstitutionError, match=problem):
        load_constitution(str(constitution(tmp_path, "- id: brief", f"  check: {check}")))


def test_a_principle_has_a_preference_or_a_check(tmp_path):
    file = constitution(tmp_path, "- id: brief", "  preference: Which is brief?", "  check: {max_words: 3}")
    with pytest.raises(ConstitutionError, match=r"checked.yaml:5: .*'brief' has a preference and a check: .* remove one"):
        load_constitution(str(file))


# --- regular expressions that take years


def test_a_catastrophic_expression_is_given_up_and_is_no_verdict():
    with pytest.raises(VerdictError, match=r"principle 'c1': its regular expression took over 2 s"):
        compare(ChecksJudge(), "a" * 60 + "!", "b", [checking(must_match="^(a|a)*$")])


# --- functions in Python


def long(messages, completion):
    return len(completion) > 20


def half(messages, completion):
    return 0.5 if messages == [{"role": "user", "content": "Is it?"}] else 0


def failing(messages, completion):
    raise KeyError("the rule's own bug")


def too_much(messages, completion):
    return 1.5


def nothing(messages, completion):
    return None


def no_number(messages, completion):
    return float("nan")


def test_a_function_is_given_the_prompt_and_the_completion():
    assert passes("x" * 21, python="tests.test_checks:long") == 1.0
    assert passes("x", python="tests.test_checks:long") == 0.0
    assert passes("x", python="tests.test_checks:half") == 0.5
    assert score(checking(python="tests.test_checks:half"), (Message("user", "Why?"),), "x") == 0.0


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("failing", 'raised KeyError: "the rule\'s own bug"'),
        ("too_much", "returned 1.5; expected a bool or a number from 0 to 1"),
        ("no_number", "returned nan; expected a bool"),
        ("nothing", "raised TypeError"),
    ],
)
def test_what_a_function_does_wrong_is_no_verdict(function, problem):
    with pytest.raises(VerdictError, match=f"check tests.test_checks:{function} {problem}"):
        compare(ChecksJudge(), principles=[checking(python=f"tests.test_checks:{function}")])


def test_a_function_is_called_only_where_it_is_allowed():
    principles = [checking(python="tests.test_checks:long")]
    with pytest.raises(ConfigError, match=r"'c1' runs the code of tests.test_checks:long; .* --set judge.allow_python=true"):
        prepare(principles, allow_python=False)
    prepare(principles, allow_python=True)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("tests.test_checks:nowhere", "no attribute 'nowhere'"),
        ("tests.no_such_module:long", "No module named 'tests.no_such_module'"),
        ("tests.test_checks:ENGLISH", "is no function"),
        ("broken_rules:long", "SyntaxError: "),
        (".rules:long", "TypeError: "),
    ],
)
def test_a_function_that_is_not_there_is_told_before_the_run(tmp_path, monkeypatch, target, problem):
    (tmp_path / "broken_rules.py").write_text("def long(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"check {target}: .*{problem}"):
        prepare([checking(python=target)], allow_python=True)


# --- beside a model


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=8), st.text(max_size=8), st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_a_swapped_verdict_is_the_verdict_on_the_swapped_pair(one, other, weights):
    principles = [
        checking(1, weights[0], max_characters=3),
        checking(2, weights[1], must_match="[a-z]"),
        checking(3, weights[2], python="tests.test_checks:long"),
    ]
    assert_turns(ChecksJudge, one, other, principles)


MIXED = (
    *("- id: brief", "  check: {max_words: 2}", "  weight: 3"),
    *("- id: kind", "  preference: Which is more kind?"),
    *("- id: json", "  check: {valid_json: true}"),
)


def test_a_models_principles_and_checks_are_averaged_by_weight(tmp_path):
    rules = load_constitution(str(constitution(tmp_path, *MIXED)))
    engine, asked = recorded(
        lambda request: [0.0, -1.0] if "\nshort\n</completion A>" in request.messages[0].content else [0.0, 0.0]
    )
    judge = build_judge(JudgeConfig(), rules, lambda section: engine)
    found = compare(judge, "short", "this is too long", rules.comparing)
    kind = (sigmoid(1) + sigmoid(0)) / 2
    assert [one.principle_id for one in found.principles] == ["brief", "kind", "json"]
    assert [one.judge for one in found.principles] == ["checks", "choice", "checks"]
    assert [one.probability for one in found.principles] == pytest.approx([1.0, kind, 0.5], abs=1e-11)
    assert found.probability == pytest.approx((3 * 1.0 + kind + 0.5) / 5, abs=1e-11)
    assert len(asked) == 2
    assert all("Which is more kind?" in request.messages[0].content for request in asked)


def test_the_method_checks_uses_no_other_principle_and_asks_no_model(tmp_path):
    rules = load_constitution(str(constitution(tmp_path, *MIXED)))

    def refuse(section):
        raise AssertionError("a model was asked for")

    judge = build_judge(JudgeConfig(method="checks"), rules, refuse)
    found = compare(judge, "short", "this is too long", [one for one in rules.comparing if one.check])
    assert [one.principle_id for one in found.principles] == ["brief", "json"]
    assert found.probability == pytest.approx((3 * 1.0 + 0.5) / 4, abs=1e-11)


def test_a_run_of_checks_makes_no_call_and_needs_no_model(tmp_path):
    file = constitution(tmp_path, *MIXED)
    given = [{"id": f"{n}", "prompt": f"Say {n}!", "chosen": "[1]", "rejected": "not so short as that"} for n in range(3)]
    one = recipe(
        constitution=str(file),
        judge={"method": "checks", "model": "scripted:nowhere.py:nothing"},
        prompts={"source": written_rows(tmp_path, *given)},
    )
    label(one, tmp_path / "run")
    assert [record.verdicts[0].probability for record in read_records(tmp_path / "run")] == [1.0] * 3
    assert manifest(tmp_path / "run")["usage"] == {}
    assert manifest(tmp_path / "run")["judge"] == "checks"


def test_a_check_that_fails_itself_sets_the_pair_aside_and_no_other(tmp_path):
    file = constitution(tmp_path, "- id: ours", "  check: {python: 'tests.test_checks:picky'}")
    given = [{"id": f"{n}", "prompt": f"Say {n}!", "chosen": "bad" if n == 1 else "good", "rejected": "x"} for n in range(3)]
    one = recipe(
        constitution=str(file),
        judge={"method": "checks", "allow_python": True},
        prompts={"source": written_rows(tmp_path, *given)},
    )
    label(one, tmp_path / "run")
    assert [record.prompt.id for record in read_records(tmp_path / "run")] == ["0", "2"]
    (row,) = quarantine(tmp_path / "run")
    assert (row["prompt_id"], row["reason"]) == ("1", "no verdict")
    assert "check tests.test_checks:picky raised ValueError: bad" in row["detail"]


def picky(messages, completion):
    if completion == "bad":
        raise ValueError("bad")
    return completion == "good"


def test_a_constitution_without_checks_is_refused_for_the_method(tmp_path):
    one = recipe(judge={"method": "checks"}, prompts={"source": written_rows(tmp_path, {})})
    with pytest.raises(ConfigError, match=r"constitution 'small' has no principle with a 'check' for the judge; add one"):
        label(one, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_function_that_is_not_allowed_stops_a_run_before_anything_is_written(tmp_path):
    file = constitution(tmp_path, "- id: ours", "  check: {python: 'tests.test_checks:long'}")
    one = recipe(constitution=str(file), prompts={"source": written_rows(tmp_path, {})})
    with pytest.raises(ConfigError, match=r"judge.allow_python=true"):
        label(one, tmp_path / "run")
    assert not (tmp_path / "run").exists()


RULES = "def polite(messages, completion):\n    return {} in completion\n"


def test_another_body_of_a_function_is_another_run(tmp_path):
    """The function's file is part of what a run is; it is read in a process of its own, as a command is."""
    (tmp_path / "rules_here.py").write_text(RULES.format("'good'"))
    file = constitution(tmp_path, "- id: ours", "  check: {python: 'rules_here:polite'}")
    given = [{"prompt": f"Say {n}!", "chosen": "good", "rejected": "bad"} for n in range(20)]
    settings = ("--set", "judge.allow_python=true", "--set", "judge.principles=all")
    judging = (written_rows(tmp_path, *given), "-c", file, "--method", "checks", *settings)
    env = {"PYTHONPATH": tmp_path}

    def run(name, *more, out="run"):
        return real_command("judge", name, *judging, "-o", tmp_path / out, *more, env=env)

    assert run("calibrate").returncode == 0
    assert run("label").returncode == 0
    (tmp_path / "rules_here.py").write_text(RULES.format("'bad'"))
    done = run("label")
    assert done.returncode == 2
    assert "check rules_here:polite: '" in done.stderr
    use = ("--set", f"judge.calibration={tmp_path}/run/calibration.yaml")
    done = run("label", *use, out="other")
    assert done.returncode == 2
    assert "judge.check rules_here:polite: fitted for '" in done.stderr
    assert run("label", "--update").returncode == 0
    assert [record.verdicts[0].probability for record in read_records(tmp_path / "run")] == [0.0] * 20


class Polite:
    def __call__(self, messages, completion):
        return True


polite = Polite()


def test_what_is_no_plain_function_has_a_source_or_none():
    named = [checking(python=name) for name in ("tests.test_checks:polite", "tests.test_checks:long", "math:hypot")]
    found = python_hashes([*named, checking(max_words=3)])
    assert found["check tests.test_checks:polite"] == found["check tests.test_checks:long"]
    assert found["check math:hypot"] == "without a source"
    assert len(found) == 3
