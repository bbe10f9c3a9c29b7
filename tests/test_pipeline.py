"""From a recipe to a folder: what is checked first, what a changed recipe costs, and what is said where it fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from cai import dataset, pipeline
from cai.config import GenerationConfig, JudgeConfig, PanelMember, Recipe
from cai.engines import ScriptedEngine
from cai.errors import (
    CapabilityError,
    ConfigError,
    ConstitutionError,
    EngineError,
    Interrupted,
    PromptSourceError,
    StoreError,
)
from cai.generation import Generator
from cai.judging import build_judge
from cai.judging.calibration import Calibration, judge_identity
from cai.pipeline import generate, plan, planning, running
from cai.types import Message, Prompt
from tests.records import HOSTILE as HOSTILE_PROMPTS
from tests.runs import (
    CALLS,
    SCRIPTED,
    SMALL,
    command,
    data_bytes,
    kept_calls,
    log_lines,
    manifest,
    model,
    quarantine,
    real_command,
    recipe,
    rows,
    wait_until,
    written_rows,
)
from tests.scripted import HOSTILE, respond
from tests.test_calibration import FITTED

PROMPTS = 3


def asked(**sections: Any) -> Recipe:
    return recipe("logged", **{**sections, "prompts": {"limit": PROMPTS, **sections.get("prompts", {})}})


def kinds(log: Path, since: int = 0) -> dict[str, int]:
    """How many calls of each kind were made."""
    made = [line["kind"].removesuffix("Request").lower() for line in log_lines(log)[since:]]
    return {kind: made.count(kind) for kind in sorted(set(made))}


# --- a run and its manifest


def test_a_run_leaves_what_it_promises(tmp_path, log):
    told = generate(asked(), tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "README.md", "constitution.yaml", "data", "manifest.json", "recipe.yaml", "run"
    ]  # fmt: skip
    assert told == manifest(tmp_path / "run")
    assert told["status"] == "done"
    assert told["prompts"] == {"source": "benign", "read": 3, "duplicates": 0, "quarantined": {}}
    assert told["dataset"]["records"] == 3
    assert told["judge_is_policy"] is True
    assert set(told["files"]) == {name.removeprefix("data/") for name in data_bytes(tmp_path / "run")}
    assert told["usage"]["policy"]["calls"] == 3 * 5
    assert told["usage"]["judge"]["calls"] == 3 * 8
    session = told["sessions"][0]
    assert (session["records_made"], session["calls_made"], session["calls_replayed"]) == (3, 3 * CALLS, 0)
    assert kinds(log) == {"choice": 3 * 8, "generate": 3 * 5}


def test_tokens_in_the_manifest_are_those_ever_paid_for(tmp_path, log):
    first = generate(asked(), tmp_path / "run")["usage"]
    assert generate(asked(), tmp_path / "run")["usage"] == first


# --- what is checked before anything is written


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"constitution": "harmles"}, ConstitutionError, "did you mean 'harmless'?"),
        ({"policy": {"model": "no-such-model"}}, ConfigError, "there is no such folder"),
        ({"policy": {"model": "scripted:none.py:f"}}, ConfigError, "there is no file none.py"),
        ({"policy": {"model": "carrier:pigeon"}}, ConfigError, "unknown scheme 'carrier:'"),
        ({"judge": {"model": "no-such-model"}}, ConfigError, "there is no such folder"),
        ({"prompts": {"source": "missing.jsonl"}}, ConfigError, "there is no such file"),
        ({"prompts": {"source": "red-teem"}}, ConfigError, "did you mean 'red-team'?"),
        ({"generation": {"rounds": 9}}, ConfigError, "generation.rounds: 9 rounds draw a principle each"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, sections, error, message):
    with pytest.raises(error) as caught:
        generate(asked(**sections), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_prompts_in_the_folder_that_the_run_rewrites_are_refused(tmp_path, log):
    out = tmp_path / "run"
    generate(asked(), out)
    for source in (out / "data" / "sft", out / "data" / "sft" / "train-00000-of-00001.parquet", out):
        with pytest.raises(ConfigError, match="lie in the run folder"):
            generate(asked(prompts={"source": str(source)}), out, "fresh")
    assert manifest(out)["status"] == "done"
    elsewhere = generate(asked(prompts={"source": str(out / "data" / "sft" / "train-00000-of-00001.parquet")}), tmp_path / "b")
    assert elsewhere["dataset"]["records"] > 0


def test_a_constitution_without_a_question_for_the_judge_is_refused(tmp_path):
    principle = {"id": "a", "critique": "c", "revision": "r"}
    written = {"name": "none", "description": "d", "license": "l", "principles": [principle]}
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match="no principle with a 'preference'"):
        plan(asked(constitution=str(tmp_path / "none.yaml"), generation={"rounds": 1}))


@pytest.mark.parametrize(
    ("principles", "told"),
    [
        ([{"id": "a", "preference": "p"}], "2 rounds draw a principle each without repeating, but constitution 'few' has none"),
        ([{"id": "a", "critique": "c", "revision": "r", "preference": "p"}], "but constitution 'few' has 1 with critique"),
    ],
)
def test_too_few_principles_are_told_with_flags_that_work(tmp_path, principles, told):
    written = {"name": "few", "description": "d", "license": "l", "principles": principles}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(written))
    asked_for = ["generate", "benign", "-n", 1, "-c", tmp_path / "few.yaml", "-m", recipe().policy.model]
    failed = command(*asked_for, "-o", tmp_path / "run")
    assert (failed.returncode, told in failed.stderr) == (2, True)
    flags = failed.stderr.partition("; this works: ")[2].split()
    assert command(*asked_for, "-o", tmp_path / "run", *flags).returncode == 0


def test_an_engine_that_cannot_judge_is_refused(monkeypatch):
    monkeypatch.setattr("cai.engines.ScriptedEngine.capabilities", frozenset({"generate"}))
    with pytest.raises(CapabilityError, match=r"judge\.method: choice needs choice_logprobs, which scripted:.* does not offer"):
        plan(asked())


def test_a_reward_model_has_to_be_named():
    with pytest.raises(ConfigError, match="reward-model needs a reward model of its own; name it by --judge-model"):
        plan(asked(judge={"method": "reward-model"}))


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ("reasoning", "choice_logprobs"),
        ("likelihood", "loglikelihood"),
        ("score", "choice_logprobs"),
        ("reward-model", "reward"),
    ],
)
def test_what_a_method_needs_is_asked_of_its_engine(monkeypatch, method, needed):
    monkeypatch.setattr("cai.engines.ScriptedEngine.capabilities", frozenset({"generate"}))
    section = {"method": method, "model": f"scripted:{SCRIPTED}:respond"}
    with pytest.raises(CapabilityError, match=rf"judge\.method: {method} needs {needed}, which scripted:.* does not offer"):
        plan(asked(judge=section))
    panel = {"method": "panel", "members": [{"name": "one", "method": "text"}, {"name": "two", **section}]}
    with pytest.raises(CapabilityError, match=rf"{method} needs {needed}"):
        plan(asked(judge=panel))


def test_members_of_a_panel_with_the_same_model_share_its_engine():
    other = f"scripted:{SCRIPTED}:respond"
    members = [
        {"name": "a"},
        {"name": "b", "method": "score"},
        {"name": "c", "model": other},
        {"name": "d", "method": "checks"},
    ]
    with_checks = SMALL.read_text() + "  - id: brief\n    check: {max_words: 3}\n"
    checked = plan_of(with_checks, judge={"method": "panel", "members": members})
    assert len(checked.judges) == 3, "checks need none"
    assert len(set(checked.judges.values())) == 2
    assert checked.policy in checked.judges.values()


# --- no key without an effect


EXEMPLAR = """
exemplars:
  - {prompt: "Why?", completion: "No.", principle: kind, critique: "It is not kind.", revision: "Let us see."}
"""
CHECK = """
  - id: mine
    check: {python: "tests.scripted:calm"}
"""
OTHER = f"scripted:{SCRIPTED}:respond"
LABELS = {"method": "panel", "members": [{"name": "one"}, {"name": "two", "method": "score"}]}
SERVER_KEY = ({"model": "http://127.0.0.1:9/v1"}, {"server": {"key_env": "SET_NOWHERE"}})
"""Refused either way: nobody listens there, or the key is looked for and not there."""
JUDGE_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({}, {"model": OTHER}),
    "revision": ({"model": OTHER}, {"revision": "main"}),
    "method": ({}, {"method": "score"}),
    "principles": ({}, {"principles": 2}),
    "layout": ({}, {"layout": "principle-first"}),
    "exemplars": ({}, {"exemplars": 1}),
    "samples": ({"method": "reasoning"}, {"samples": 2}),
    "temperature": ({"method": "text"}, {"temperature": 0.1}),
    "max_tokens": ({"method": "reasoning"}, {"max_tokens": 9}),
    "clamp": ({"method": "reasoning"}, {"clamp": [0.1, 0.9]}),
    "length": ({"method": "likelihood"}, {"length": "sum"}),
    "allow_python": ({}, {"allow_python": True}),
    "calibration": ({}, {"calibration": "none.yaml"}),
    "server": SERVER_KEY,
    "vllm": ({"model": OTHER}, {"vllm": {"args": {"seed": 1}}}),
    "members": (LABELS, {"members": [{"name": "one"}, {"name": "two", "method": "text"}]}),
}
MEMBER_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "name": ({}, {"name": "another"}),
    "model": ({}, {"model": OTHER}),
    "revision": ({"model": OTHER}, {"revision": "main"}),
    "method": ({}, {"method": "text"}),
    "weight": ({}, {"weight": 3.0}),
    "calibration": ({}, {"calibration": "none.yaml"}),
    "server": SERVER_KEY,
}
GENERATION_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "candidates": ({}, {"candidates": 2}),
    "rounds": ({}, {"rounds": 1}),
    "pairs": ({"candidates": 2}, {"pairs": "both"}),
    "comparisons": ({"candidates": 4, "pairs": "samples"}, {"comparisons": "tournament"}),
    "exemplars": ({}, {"exemplars": 0}),
    "max_tokens": ({}, {"max_tokens": 9}),
    "temperature": ({}, {"temperature": 0.1}),
    "top_p": ({}, {"top_p": 0.9}),
}


def plan_of(constitution: str, **sections: Any) -> pipeline.Plan:
    with TemporaryDirectory() as folder:
        path = Path(folder, "mine.yaml")
        path.write_text(constitution)
        return plan(recipe("hashed", constitution=str(path), **sections))


def outcome(constitution: str = SMALL.read_text() + EXEMPLAR, **sections: Any) -> Any:
    """All that comes of a recipe: its record of one prompt, the revisions of its models, or why it is refused."""
    try:
        checked = plan_of(constitution, **sections)
    except ConfigError as exc:
        return str(exc)
    judge = build_judge(checked.recipe.judge, checked.constitution, checked.judges.__getitem__)
    made = Generator(checked.recipe, checked.constitution, checked.policy, judge)
    record = asyncio.run(made.make_record(Prompt("id", (Message("user", "Why is the sky blue?"),))))
    return record, [checked.recipe.judge_model(section).revision for section in checked.judges]


@pytest.mark.parametrize("key", JudgeConfig.model_fields)
def test_no_key_of_the_judge_is_ignored(key):
    base, change = JUDGE_KEYS[key]
    constitution = SMALL.read_text() + (CHECK if key == "allow_python" else EXEMPLAR)
    before = outcome(constitution, judge=base)
    assert isinstance(before, str) == (key in ("allow_python", "server")), before
    assert before == outcome(constitution, judge=base), "only the key makes a difference"
    assert before != outcome(constitution, judge={**base, **change})


@pytest.mark.parametrize("key", PanelMember.model_fields)
def test_no_key_of_a_member_is_ignored(key):
    base, change = MEMBER_KEYS[key]
    first, second = (
        outcome(judge={"method": "panel", "members": [{"name": "one"}, {"name": "two", **member}]})
        for member in (base, {**base, **change})
    )
    assert isinstance(first, str) == (key == "server")
    assert first != second


@pytest.mark.parametrize("key", sorted(set(GenerationConfig.model_fields) - {"concurrency"}))
def test_no_key_of_the_generation_is_ignored(key):
    """What `concurrency` does is in test_runner."""
    base, change = GENERATION_KEYS[key]
    before = outcome(generation=base)
    assert not isinstance(before, str)
    assert before != outcome(generation={**base, **change})


# --- a recipe that changed


@pytest.mark.parametrize(
    "sections",
    [
        {"dataset": {"sft": "all"}},
        {"dataset": {"test_fraction": 0.5, "min_probability": 0.6, "shard_rows": 1, "license": "mit"}},
        {"generation": {"concurrency": 1}},
        {"prompts": {"limit": 2}},
        {"prompts": {"limit": 1}},
        {"policy": {"batch_size": 1, "batch_tokens": 1}},
    ],
)
def test_what_decides_no_record_may_change_and_costs_nothing(tmp_path, log, sections):
    generate(asked(), tmp_path / "run")
    before = len(log_lines(log))
    assert generate(asked(**sections), tmp_path / "run")["status"] == "done"
    assert len(log_lines(log)) == before


def test_more_prompts_pay_only_for_themselves_and_fewer_leave_the_others_out(tmp_path, log):
    generate(asked(), tmp_path / "run")
    more = generate(asked(prompts={"limit": 5}), tmp_path / "run")
    assert (more["sessions"][-1]["calls_made"], more["dataset"]["records"]) == (2 * CALLS, 5)
    fewer = generate(asked(prompts={"limit": 2}), tmp_path / "run")
    assert (fewer["sessions"][-1]["calls_made"], fewer["dataset"]["records"]) == (0, 2)
    assert len(rows(tmp_path / "run", "trace")) == 2


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"seed": 1}, ["seed: 0 there, 1 now"]),
        ({"judge": {"principles": "all"}}, ["judge.principles: 4 there, 'all' now"]),
        ({"judge": {"layout": "principle-first", "exemplars": 1}}, ["judge.layout: ", "judge.exemplars: 0 there, 1 now"]),
        ({"judge": {"method": "score"}}, ["judge.method: 'choice' there, 'score' now"]),
        ({"generation": {"comparisons": "tournament"}}, ["generation.comparisons: 'all' there, 'tournament' now"]),
        ({"generation": {"rounds": 1}, "prompts": {"column": "prompt"}}, ["generation.rounds", "prompts.column"]),
        ({"generation": {"temperature": 0.1}}, ["generation.temperature"]),
        ({"constitution": "harmless"}, ["constitution: 'small@", "there, 'harmless@"]),
        ({"policy": {"model": recipe("respond").policy.model}}, ["policy: ", "judge: "]),
        ({"prompts": {"source": "red-team"}}, ["prompts.source: 'benign' there, 'red-team' now"]),
    ],
)
def test_another_recipe_is_refused_with_every_changed_key_and_nothing_is_touched(tmp_path, log, sections, changed):
    generate(asked(), tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()}
    with pytest.raises(ConfigError) as caught:
        generate(asked(**sections), tmp_path / "run")
    for part in changed:
        assert part in str(caught.value)
    assert str(caught.value).count(" there, ") == len({part.split(":")[0] for part in changed if not part.startswith("there")})
    assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.is_file()} == before


def test_more_principles_for_the_judge_pay_only_for_new_questions(tmp_path, log):
    generate(asked(), tmp_path / "run")
    made = len(log_lines(log))
    told = generate(asked(judge={"principles": "all"}), tmp_path / "run", "update")
    assert kinds(log, made) == {"choice": PROMPTS * 2}, "one principle of five more, in both orders"
    assert told["dataset"]["records"] == PROMPTS
    generate(asked(judge={"principles": "all"}), tmp_path / "anew")
    assert data_bytes(tmp_path / "run") == data_bytes(tmp_path / "anew")


def test_a_changed_question_pays_only_for_itself(tmp_path, log):
    constitution = tmp_path / "mine.yaml"
    constitution.write_text(SMALL.read_text())
    mine = asked(constitution=str(constitution), judge={"principles": "all"})
    generate(mine, tmp_path / "run")
    made = len(log_lines(log))
    constitution.write_text(SMALL.read_text().replace("Which completion is more calm?", "Which completion is calmer?"))
    with pytest.raises(ConfigError, match="constitution: 'small@"):
        generate(mine, tmp_path / "run")
    generate(mine, tmp_path / "run", "update")
    assert kinds(log, made) == {"choice": PROMPTS * 2}
    assert {row["verdicts"][0]["principles"][-1]["principle_id"] for row in rows(tmp_path / "run", "trace")} == {"calm"}


def test_a_changed_critique_pays_for_what_follows_from_it_and_answers_stay(tmp_path, log):
    constitution = tmp_path / "mine.yaml"
    constitution.write_text(SMALL.read_text())
    mine = asked(constitution=str(constitution))
    generate(mine, tmp_path / "run")
    answers = {row["prompt_id"]: row["candidates"] for row in rows(tmp_path / "run", "trace")}
    made = len(log_lines(log))
    constitution.write_text(SMALL.read_text().replace("Where is your last answer not", "Find where your last answer is not"))
    generate(mine, tmp_path / "run", "update")
    again = log_lines(log)[made:]
    assert sum(line["kind"] == "GenerateRequest" for line in again) == PROMPTS * 4
    assert {row["prompt_id"]: row["candidates"] for row in rows(tmp_path / "run", "trace")} == answers


def test_a_note_in_the_constitution_changes_nothing(tmp_path, log):
    constitution = tmp_path / "mine.yaml"
    constitution.write_text(SMALL.read_text())
    generate(asked(constitution=str(constitution)), tmp_path / "run")
    constitution.write_text(SMALL.read_text().replace("  - id: kind\n", "  - id: kind\n    note: for people\n"))
    assert generate(asked(constitution=str(constitution)), tmp_path / "run")["sessions"][-1]["calls_made"] == 0


def test_a_way_back_to_an_earlier_recipe_is_paid_for_already(tmp_path, log):
    generate(asked(), tmp_path / "run")
    before = data_bytes(tmp_path / "run")
    generate(asked(seed=1), tmp_path / "run", "update")
    made = len(log_lines(log))
    generate(asked(), tmp_path / "run", "update")
    assert len(log_lines(log)) == made
    assert data_bytes(tmp_path / "run") == before


def test_fresh_pays_for_all_again(tmp_path, log):
    generate(asked(), tmp_path / "run")
    told = generate(asked(seed=1), tmp_path / "run", "fresh")
    assert told["sessions"][-1]["calls_made"] == kept_calls(tmp_path / "run")
    assert len(told["sessions"]) == 1


# --- rows


def test_bad_rows_are_set_aside_and_counted_and_the_others_become_records(tmp_path):
    source = written_rows(
        tmp_path,
        {"id": "good", "prompt": "fine"},
        {"id": "good", "prompt": "fine"},
        {"id": "good", "prompt": "other"},
        {"id": "r", "prompt": "fault:raise"},
        {"id": "f", "prompt": "fault:file"},
        {"id": "n", "prompt": "fault:number"},
        {"id": "0", "prompt": "fault:nothing"},
        {"id": "b", "prompt": "fault:bytes"},
        {"id": "nan", "prompt": "fault:nan"},
        {"id": "inf", "prompt": "fault:infinite"},
        {"id": "3", "prompt": "fault:three"},
        {"id": "w", "prompt": "fault:words"},
        {"answer": "no prompt"},
        {"prompt": 5},
        "a bare text is fine",
    )
    told = generate(recipe("faulty", prompts={"source": source, "limit": None}), tmp_path / "run")
    assert {row["prompt_id"] for row in rows(tmp_path / "run", "trace")} >= {"good"}
    assert told["dataset"]["records"] == 2
    reasons = told["prompts"]["quarantined"]
    assert reasons == {
        "id used twice": 1,
        "ValueError": 1,
        "FileNotFoundError": 1,
        "request failed": 5,
        "no verdict": 2,
        "unreadable row": 2,
    }
    assert (told["prompts"]["read"], told["prompts"]["duplicates"]) == (15, 1)
    aside = quarantine(tmp_path / "run")
    assert [row["position"] for row in aside] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert all(row["detail"] and row["row"] and row["origin"].startswith("prompts.jsonl:") for row in aside)
    assert aside[1]["detail"] == "the \x1b[31mscripted\x1b[0m function \\ud800 failed"


def test_a_run_in_which_nothing_worked_fails_and_says_why(tmp_path):
    source = written_rows(tmp_path, {"id": "r", "prompt": "fault:raise"}, {"prompt": 5}, {"prompt": 6})
    with pytest.raises(PromptSourceError, match=r"none of 3 rows became a record \(unreadable row: 2, ValueError: 1\); "):
        generate(recipe("faulty", prompts={"source": source}), tmp_path / "run")
    told = manifest(tmp_path / "run")
    assert told["status"] == "failed"
    assert "none of 3 rows" in told["error"]
    assert told["prompts"]["quarantined"] == {"ValueError": 1, "unreadable row": 2}
    assert len(quarantine(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "data").exists()


def test_no_prompts_are_a_failure(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(PromptSourceError, match=r"empty\.jsonl': there are no rows in it"):
        generate(recipe(prompts={"source": str(tmp_path / "empty.jsonl")}), tmp_path / "run")
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_a_failure_does_not_take_the_dataset_that_was_there(tmp_path):
    source = written_rows(tmp_path, {"id": "a", "prompt": "fine"})
    generate(recipe("faulty", prompts={"source": source}), tmp_path / "run")
    before = data_bytes(tmp_path / "run")
    written_rows(tmp_path, {"id": "a", "prompt": "fault:raise"})
    with pytest.raises(PromptSourceError):
        generate(recipe("faulty", prompts={"source": source}), tmp_path / "run")
    assert data_bytes(tmp_path / "run") == before
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_where_no_pair_could_be_made_the_dataset_is_empty_and_the_run_done(tmp_path):
    same = model(tmp_path, "def respond(request):\n    return 'the same' if hasattr(request, 'seed') else [0.0, 0.0]\n")
    told = generate(recipe(policy={"model": same}), tmp_path / "run")
    assert told["status"] == "done"
    assert told["dataset"]["rows"]["preference"] == {"train": 0}
    assert rows(tmp_path / "run", "preference") == []


def test_an_engine_that_breaks_down_stops_the_run_and_the_same_call_continues(tmp_path):
    source = (
        "import os\nfrom cai.errors import EngineError\n"
        "def respond(request):\n"
        "    if hasattr(request, 'choices') and os.environ.get('BROKEN'):\n        raise EngineError('out of memory')\n"
        "    return usual(request)\n"
    )
    broken = recipe(policy={"model": model(tmp_path, source)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROKEN", "1")
        with pytest.raises(EngineError, match="out of memory"):
            generate(broken, tmp_path / "run")
    told = manifest(tmp_path / "run")
    assert (told["status"], told["error"]) == ("failed", "out of memory")
    kept = kept_calls(tmp_path / "run")
    assert kept >= 5
    session = generate(broken, tmp_path / "run")["sessions"][-1]
    assert session["calls_replayed"] >= kept
    assert kept_calls(tmp_path / "run") == kept + session["calls_made"]


# --- texts


def test_hostile_texts_arrive_to_the_letter_and_surrogates_as_the_replacement_character(tmp_path):
    source = written_rows(tmp_path, *({"id": f"{n}", "prompt": text} for n, text in enumerate(HOSTILE_PROMPTS)))
    told = generate(recipe("hostile", prompts={"source": source, "limit": None}), tmp_path / "run")
    traces = rows(tmp_path / "run", "trace")
    assert sorted(row["prompt"][0]["content"] for row in traces) == sorted(HOSTILE_PROMPTS)
    expected = HOSTILE.replace("\ud83d!", "\ufffd!").replace("\ud83d\ude00", "😀")
    assert all(row["candidates"][0]["text"].startswith(expected) for row in traces)
    assert told["prompts"]["quarantined"] == {}
    assert all(row["chosen"][0]["content"].startswith(expected.strip()) for row in rows(tmp_path / "run", "preference"))


# --- the folder


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sessions": 5}'])
def test_a_damaged_manifest_is_written_anew(tmp_path, log, content):
    generate(asked(), tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(content)
    told = generate(asked(), tmp_path / "run")
    assert (told["status"], len(told["sessions"]), told["sessions"][0]["calls_made"]) == ("done", 1, 0)


def test_a_dataset_whose_journal_was_deleted_is_not_paid_for_again_unasked(tmp_path, log):
    generate(asked(), tmp_path / "run")
    before = data_bytes(tmp_path / "run")
    (tmp_path / "run" / "run" / "journal.sqlite").unlink()
    with pytest.raises(StoreError, match="is gone, with all finished calls of this run"):
        generate(asked(), tmp_path / "run")
    assert len(log_lines(log)) == PROMPTS * CALLS
    assert data_bytes(tmp_path / "run") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A folder on a disk of its own, of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("free", [0, 4, 12, 40, 100, 300, 600])
def test_a_disk_that_fills_up_at_any_time_loses_nothing(tmp_path, log, small_disk, free):
    """So many KiB are free when the command starts; then, typed again, enough."""
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * ((1024 - free) * 1024 - 4096 * 2))
    args = ["generate", "benign", "-c", SMALL, "-n", 6, "-m", asked().policy.model, "-o", small_disk / "run"]
    failed = command(*args, "--set", "generation.concurrency=2")
    assert failed.returncode == 1
    assert "the same command continues" in failed.stderr
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    kept, made = kept_calls(small_disk / "run"), len(log_lines(log))
    assert made - kept <= 2 * 8, "lost are at most those in flight"
    assert command(*args).returncode == 0
    assert len(log_lines(log)) - made == 6 * CALLS - kept
    assert manifest(small_disk / "run")["status"] == "done"


def limited(size: int) -> str:
    """The command, in a process none of whose files may grow beyond so many bytes."""
    return (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\nfrom cai.cli.main import main; main()"
    )


@pytest.mark.parametrize("size", [1000, 20_000, 60_000, 90_000])
def test_a_file_that_may_not_grow_is_told_like_a_full_disk(tmp_path, log, size):
    args = ["generate", "benign", "-c", SMALL, "-n", 4, "-m", asked().policy.model, "-o", tmp_path / "run"]
    failed = real_command(*args, code=limited(size))
    assert failed.returncode == 1
    assert "the same command continues" in failed.stderr
    kept = kept_calls(tmp_path / "run")
    made = len(log_lines(log))
    assert command(*args).returncode == 0
    assert len(log_lines(log)) - made == kept_calls(tmp_path / "run") - kept


# --- being stopped


def test_a_keyboard_interrupt_outside_the_loop_is_an_interruption(tmp_path, log, monkeypatch):
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "count_prompts", interrupt)
    with pytest.raises(Interrupted, match="stopped; the same command continues"):
        generate(asked(), tmp_path / "run", watch=lambda tally, total: None)
    assert manifest(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.parametrize(("signals", "closed"), [(1, 2), (2, 0)])
def test_engines_are_closed_unless_the_run_is_to_stop_at_once(tmp_path, monkeypatch, signals, closed):
    """Closing waits for what an engine is doing, which may be loading its weights."""

    class Closing(ScriptedEngine):
        async def close(self) -> None:
            closes.append(self)

    async def function(request: Any) -> Any:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.02)
        await asyncio.sleep(60 * (signals - 1))
        return respond(request)

    closes: list[Any] = []
    monkeypatch.setattr(planning, "build_engine", lambda *_: Closing(function))
    with pytest.raises(Interrupted):
        generate(recipe("hashed", prompts={"limit": 1}, judge={"model": OTHER}), tmp_path / "run")
    assert len(set(closes)) == len(closes) == closed, "policy and judge"


# --- a dry run


def test_a_dry_run_counts_the_calls_that_the_run_then_makes(tmp_path, log):
    _, estimate = pipeline.dry_run(asked())
    assert log_lines(log) == []
    generate(asked(), tmp_path / "run")
    assert sum(estimate.calls.values()) == len(log_lines(log)) == PROMPTS * CALLS
    assert estimate.prompts == PROMPTS


def test_in_a_notebook_where_a_loop_runs_already_it_works_too(tmp_path, log):
    assert in_a_notebook(asked(), tmp_path / "run")["status"] == "done"


def in_a_notebook(asked: Recipe, out: Path) -> Any:
    async def cell() -> Any:
        return generate(asked, out)

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(cell())
    finally:
        loop.close()


def press_ctrl_c(times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)


@pytest.mark.parametrize(("times", "slow", "finished"), [(1, "0.5", 3), (2, "60", 0)])
def test_ctrl_c_in_a_notebook_stops_as_it_does_elsewhere(tmp_path, log, monkeypatch, times, slow, finished):
    def person() -> None:
        wait_until(lambda: len(log_lines(log, "begun")) == 3)
        press_ctrl_c(times)

    monkeypatch.setenv("SLOW", slow)
    thread = threading.Thread(target=person)
    thread.start()
    began = time.monotonic()
    with pytest.raises(Interrupted, match="the same command continues"):
        in_a_notebook(recipe("slow", generation={"concurrency": 3}), tmp_path / "run")
    assert time.monotonic() - began < 10
    thread.join()
    assert len(log_lines(log)) == kept_calls(tmp_path / "run") == finished
    assert manifest(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_notebook_while_the_dataset_is_written(tmp_path, log, monkeypatch, times):
    """That cannot be stopped from outside: the first press waits for its end, the second does not."""

    def write(*args: Any) -> Any:
        press_ctrl_c(times)
        assert times == 1 or released.wait(20)
        return usual(*args)

    released, usual = threading.Event(), dataset.write_dataset
    monkeypatch.setattr(running, "_PATIENCE", 0.1)
    monkeypatch.setattr(dataset, "write_dataset", write)
    with pytest.raises(Interrupted, match="stopped; the same command continues"):
        in_a_notebook(asked(), tmp_path / "run")
    assert (manifest(tmp_path / "run")["status"] == "done") if times == 1 else not (tmp_path / "run" / "data").exists()
    released.set()
    wait_until(lambda: (tmp_path / "run" / "manifest.json").exists())


def test_a_folder_may_be_named_by_a_text(tmp_path, log):
    assert generate(asked(), str(tmp_path / "run")) == manifest(tmp_path / "run")


def test_a_run_is_named_by_the_calibration_that_was_read_whatever_becomes_of_the_file(tmp_path):
    file, judge = tmp_path / "calibration.yaml", JudgeConfig(model=OTHER)
    uncalibrated = plan(recipe(judge=judge.model_dump()))
    identity = judge_identity(judge, uncalibrated.judge_names, uncalibrated.constitution)
    file.write_text(Calibration.model_validate(FITTED | identity._asdict()).to_yaml())
    checked = plan(recipe(judge={"model": OTHER, "calibration": str(file)}))
    named = checked.identity
    file.write_text("something else")
    assert checked.identity == named
    assert checked.calibration_files["calibration.yaml"] != "something else"
    with pytest.raises(ConfigError, match=r"calibration.yaml: expected a mapping"):
        plan(recipe(judge={"model": OTHER, "calibration": str(file)}))
