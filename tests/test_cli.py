"""The command as a shell sees it: output, exit codes, what is asked, and that no user ever sees a traceback."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cai.cli import progress
from cai.cli.doctor import EXTRAS
from cai.cli.main import app
from cai.cli.terminal import duration, printable, shortened, time_left
from cai.generation import Tally
from tests.records import HOSTILE
from tests.runs import (
    CALLS,
    ROOT,
    SCRIPTED,
    SMALL,
    command,
    data_bytes,
    environment,
    kept_calls,
    log_lines,
    manifest,
    model,
    real_command,
    start,
    wait_until,
    written_rows,
)

LOGGED = f"scripted:{SCRIPTED}:logged"
RESPOND = f"scripted:{SCRIPTED}:respond"


def generate(
    out: Path, *args: Any, function: str = "respond", run: Any = command, **options: Any
) -> subprocess.CompletedProcess[str]:
    return run("generate", "-c", SMALL, "-m", f"scripted:{SCRIPTED}:{function}", "-o", out / "run", *args, **options)


# --- help, and what is imported


def test_help_names_the_commands_and_generate_shows_examples():
    everything = command("--help", env={"COLUMNS": "200"})
    assert everything.returncode == 0
    assert all(name in everything.stdout for name in ("generate", "constitution", "doctor"))
    one = command("generate", "--help", env={"COLUMNS": "200"})
    assert "cai generate prompts.jsonl -c my.yaml -m Qwen/Qwen3-4B -o runs/mine" in one.stdout
    for option in ("--model", "--judge-model", "--out", "--set", "--fresh", "--update", "--dry-run", "--recipe", "--seed"):
        assert option in one.stdout


def test_every_example_in_the_help_is_a_command_that_parses():
    epilog = typer.main.get_command(app).commands["generate"].epilog
    examples = re.findall(r"^cai (generate.*)$", epilog, re.M)
    assert len(examples) == 3
    here = {"my.yaml": SMALL, "prompts.jsonl": "benign"}
    for example in examples:
        args = [here.get(word, word) for word in example.split() if word not in ("-m", "Qwen/Qwen3-4B")]
        done = command(*args, "--dry-run", "-m", RESPOND)
        assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # of TRL, as it is imported
@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "online-dpo"])
def test_every_key_of_the_trainer_in_the_help_is_one_of_that_trainer(stage):
    from cai.training.arguments import check_arguments

    epilog = typer.main.get_command(app).commands["train"].commands[stage].epilog
    keys = re.findall(r"trl\.(\w+)", epilog)
    values = {"value_function": "head", "target_kl": 6.0}
    assert keys
    check_arguments(stage, {key: values.get(key, 8) for key in keys}, str)


def test_help_is_to_be_read_on_a_narrow_terminal():
    shown = real_command("generate", "--help", env={"COLUMNS": "80"}).stdout
    lines = [line.strip() for line in shown.splitlines()]
    for line in re.findall(r"^(?:# |cai ).*$", typer.main.get_command(app).commands["generate"].epilog, re.M):
        assert line in lines
    assert [name for name in ("Inputs", "Models", "Run folder") if f"╭─ {name} ─" not in shown] == []
    assert [line for line in lines if "<bool>" in line and "--help" not in line] == []
    assert "cai recipe keys" in shown


def test_the_version_is_told():
    done = command("--version")
    assert (done.returncode, bool(re.fullmatch(r"cai \d+\.\d+.*\n", done.stdout))) == (0, True)


def test_what_the_hub_retries_is_told_by_our_own_error_alone():
    code = "import cai.cli.main as m\ntry: m.main()\nfinally:\n from huggingface_hub.utils import logging\n"
    code += " print(logging.get_verbosity() == logging.ERROR)"
    assert real_command("--version", code=code).stdout.endswith("True\n")


def test_no_arguments_show_the_help():
    assert "generate" in command().stdout
    assert command("generat").returncode == 2


@pytest.mark.parametrize("code", ["import cai", "import cai, sys; sys.argv = ['cai', '--help']; from cai.cli.main import main"])
def test_nothing_heavy_is_loaded_to_import_or_to_show_help(code):
    show = (
        "import sys\n" + code + "\ntry: main()\nexcept (NameError, SystemExit): pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'pyarrow', 'pandas', 'numpy', 'huggingface_hub', 'jinja2'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, encoding="utf-8", check=True, env=environment())
    assert done.stdout.endswith("LOADED []\n")


def test_the_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "cai", "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "generate" in done.stdout


# --- a run


def test_a_run_tells_what_was_made_what_it_cost_and_what_to_type_next(tmp_path):
    done = generate(tmp_path, "benign", "-n", 6, run=real_command)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert any(re.fullmatch(r"preference +\d+ +\d+ *", line) for line in lines)
    assert re.search(r"\d% +shown first preferred to shown second", done.stdout)
    assert "mean probability of the chosen one (6 pairs)" in done.stdout
    assert f"policy: {6 * 5} calls" in done.stdout
    assert f"judge: {6 * 8} calls" in done.stdout
    assert "flip with the order of the completions" in done.stdout
    assert f"{tmp_path}/run/README.md" in done.stdout
    code = re.search(r'python -c "(.*)"', done.stdout)
    assert code
    assert subprocess.run([sys.executable, "-c", code[1]], check=False, capture_output=True).returncode == 0
    assert "also judges its own completions; --judge-model names another judge" in done.stderr


def test_a_judge_that_is_named_needs_no_note(tmp_path):
    done = generate(tmp_path, "benign", "-n", 2, "--judge-model", LOGGED, env={"CALLS_LOG": tmp_path / "calls.log"})
    assert done.returncode == 0
    assert "judges its own" not in done.stderr
    assert {line["kind"] for line in log_lines(tmp_path / "calls.log")} == {"ChoiceRequest"}
    assert manifest(tmp_path / "run")["judge_is_policy"] is False


def test_prompts_may_stand_after_the_options(tmp_path):
    for number, args in enumerate((["benign", "-n", 2, "--seed", 3], ["-n", 2, "--seed", 3, "benign"])):
        done = command("generate", "-c", SMALL, "-m", RESPOND, "-o", tmp_path / f"{number}", *args)
        assert done.returncode == 0
    assert data_bytes(tmp_path / "0") == data_bytes(tmp_path / "1")


def test_flags_win_over_the_recipe_and_both_over_the_defaults(tmp_path):
    recipe = {"constitution": str(SMALL), "seed": 5, "prompts": {"source": "benign", "limit": 9}, "generation": {"rounds": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    args = ("--recipe", tmp_path / "recipe.yaml", "-m", RESPOND, "-n", 2, "--set", "judge.principles=all", "-o", out)
    assert command("generate", *args).returncode == 0
    saved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (saved["seed"], saved["prompts"]["limit"], saved["generation"]["rounds"]) == (5, 2, 1)
    assert (saved["judge"]["principles"], saved["policy"]["model"]) == ("all", RESPOND)


def test_the_folder_is_named_after_the_constitution_unless_it_is_given(tmp_path):
    done = command("generate", "benign", "-n", 1, "-c", SMALL, "-m", RESPOND, cwd=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "runs" / "small" / "README.md").exists()
    saved = tmp_path / "runs" / "small" / "recipe.yaml"
    assert command("generate", "--recipe", saved, "-n", 1, "--seed", 2, "-o", "other", cwd=tmp_path).returncode == 0
    again = command("generate", "--recipe", "other/recipe.yaml", "-n", 1, cwd=tmp_path)
    assert (again.returncode, "runs/small holds another run" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "one"}\n{"prompt": "two"}\n',
        '"one"\n["no prompt"]\n"two"',
        "one\n\ntwo\n",
        "\ufeffone\r\ntwo\r\n",
    ],
)
def test_prompts_come_from_standard_input(tmp_path, text):
    done = generate(tmp_path, "-", stdin=text)
    assert done.returncode == 0
    assert manifest(tmp_path / "run")["dataset"]["records"] == 2


def test_nothing_on_standard_input_is_a_failure(tmp_path):
    done = generate(tmp_path, "-")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "cai: '-': there are no rows in it")


# --- a dry run


def test_a_dry_run_makes_no_call_writes_nothing_and_tells_the_cost(tmp_path, log):
    done = generate(
        tmp_path, "benign", "-n", 7, "--dry-run", function="logged", cwd=tmp_path, env={"COLUMNS": "200"}, run=real_command
    )
    assert done.returncode == 0
    recipe = yaml.safe_load(done.stdout[: done.stdout.index("no call was made")])
    assert (recipe["prompts"]["limit"], recipe["policy"]["model"]) == (7, LOGGED)
    assert re.search(rf"^together +{7 * CALLS} *$", done.stdout, re.M)
    assert re.search(rf"^policy +{re.escape(LOGGED)} +{7 * 5} +[\d,]+ +{7 * 5 * 256:,}$", done.stdout, re.M)
    assert re.search(rf"^judge +{re.escape(LOGGED)} +{7 * 8} +[\d,]+ +0$", done.stdout, re.M)
    assert "7 prompts. Calls of the policy: 7 answer, 14 critique, 14 revision. " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_rows_that_are_no_prompts_and_reads_standard_input(tmp_path):
    done = generate(tmp_path, "-", "--dry-run", stdin='{"prompt": "a"}\n{"no": 1}\n')
    assert done.returncode == 0
    assert "1 prompt; 1 row without one would be set aside. " in done.stdout


def test_a_dry_run_tells_what_the_folder_holds_already(tmp_path, log):
    dry = ("benign", "-n", 2, "--dry-run")
    assert " holds " not in generate(tmp_path, *dry, function="logged").stdout
    assert generate(tmp_path, "benign", "-n", 1, function="logged").returncode == 0
    told = generate(tmp_path, *dry, function="logged").stdout
    assert told.endswith(f"{tmp_path}/run holds this run already: {CALLS} finished calls are paid for\n")
    told = generate(tmp_path, *dry, "--seed", 3, function="logged").stdout
    assert told.endswith(f"run holds another run (--update keeps what of it still fits): {CALLS} finished calls are paid for\n")
    assert len(log_lines(log)) == CALLS


# --- wrong usage: 2; a run that could not do its job: 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.jsonl"], "prompts 'missing.jsonl': there is no such file"),
        (["red-teem"], "did you mean 'red-team'?"),
        (["benign", "-c", "harmles"], "did you mean 'harmless'?"),
        (["benign", "-m", "smollm"], "there is no such folder"),
        (["benign", "-m", "scripted:nowhere.py:f"], "there is no file nowhere.py"),
        (["benign", "--set", "judge.principle=4"], "did you mean 'principles'?"),
        (["benign", "--set", "judge.principles=some"], "--set judge.principles=some: judge.principles: "),
        (["benign", "--set", "judge.principles"], "expected key=value"),
        (["benign", "--set", "generation.rounds=99"], "99 rounds draw a principle each"),
        (
            ["benign", "--recipe", "missing.yaml"],
            "no recipe 'missing.yaml': neither a file nor a built-in name; built in: demo",
        ),
        (["benign", "--fresh", "--update"], "--update keeps what --fresh deletes: give one of them"),
        (["benign", "--fresh", "--update", "--dry-run"], "give one of them"),
        (["benign", "-n", "0"], "-n"),
        (["benign", "--seed", "many"], "--seed"),
        (["benign", "--no-such-flag"], "--no-such-flag"),
        (["benign", "twice"], "twice"),
    ],
)
def test_wrong_usage_is_told_on_standard_error_and_nothing_is_written(tmp_path, args, message):
    done = command("generate", "-c", SMALL, "-m", RESPOND, "-o", tmp_path / "run", *args, cwd=tmp_path, env={"COLUMNS": "200"})
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "there are no rows in it"),
        ("blank.txt", b"\n \n\n", "there are no rows in it"),
        ("list.json", b"[]", "there are no rows in it"),
        ("none.jsonl", b'{"a": 1}\n', "the only row became no record (unreadable row: 1); the first, none.jsonl:1: "),
        ("broken.json", b'[{"prompt": "a"}, {', "not valid JSON"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\0\0\0\0\0", "damaged or cut short"),
        ("no.parquet", b"PAR1", "not readable as Parquet"),
    ],
)
def test_a_run_that_cannot_do_its_job_ends_with_1(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    done = generate(tmp_path, tmp_path / name)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("cai: ")
    assert manifest(tmp_path / "run")["status"] == "failed"


def test_some_bad_rows_are_counted_in_the_summary_and_the_run_is_done(tmp_path):
    rows = [{"id": "a", "prompt": "fine"}, {"id": "a", "prompt": "fine"}, {"id": "b", "prompt": "fault:raise"}, {"x": 1}]
    done = generate(tmp_path, written_rows(tmp_path, *rows), function="faulty")
    assert done.returncode == 0
    left_out = done.stdout[done.stdout.index("left out") : done.stdout.index("cost")].splitlines()
    assert [" ".join(line.split()) for line in left_out[1:-1]] == [
        "rows", "1 ValueError", "1 unreadable row", "1 duplicate prompt", "1 of 3 prompts gave a pair"
    ]  # fmt: skip
    assert len((tmp_path / "run" / "run" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_all_bad_rows_are_a_failure(tmp_path):
    rows = [{"id": "b", "prompt": "fault:nan"}, {"id": "c", "prompt": "fault:number"}]
    done = generate(tmp_path, written_rows(tmp_path, *rows), function="faulty")
    assert done.returncode == 1
    assert (
        "none of 2 rows became a record (no verdict: 1, request failed: 1); the first, prompts.jsonl:1: "
        f"expected 2 finite numbers, got [nan, -1.0]; more in {tmp_path}/run/run/quarantine.jsonl\n"
    ) in done.stderr


def test_invalid_utf_8_sets_its_line_aside(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a good line\n\xff\xfe bad\nanother\n")
    assert generate(tmp_path, tmp_path / "p.txt").returncode == 0
    told = manifest(tmp_path / "run")
    assert (told["dataset"]["records"], told["prompts"]["quarantined"]) == (2, {"unreadable row": 1})


# --- the folder


def test_a_folder_of_sources_is_no_run_folder_but_hidden_files_do_no_harm(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitignore").write_text("*")
    assert generate(tmp_path, "benign", "-n", 1).returncode == 0
    (tmp_path / "b" / "run").mkdir(parents=True)
    for name in "main.py", "a", "b", "c", "d", "e":
        (tmp_path / "b" / "run" / name).write_text("mine")
    done = generate(tmp_path / "b", "benign", "-n", 1)
    assert (done.returncode, "run holds a, b, c, d, e, more, but no run of cai; " in done.stderr) == (2, True)
    assert len(list((tmp_path / "b" / "run").iterdir())) == 6


@pytest.mark.parametrize("name", ["README.md", "data"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    for extra in ([], ["--update"], ["--fresh", "--yes"]):
        done = generate(tmp_path, "benign", "-n", 1, *extra)
        assert done.returncode == 2
        assert f"holds {name}, but no run of cai; nothing was touched" in done.stderr
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_file_or_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    done = generate(tmp_path, "benign", "-n", 1)
    assert (done.returncode, "is a file; -o names a folder" in done.stderr) == (2, True)
    done = command("generate", "benign", "-n", 1, "-c", SMALL, "-m", RESPOND, "-o", "/proc/cai")
    assert (done.returncode, "/proc/cai: cannot be written" in done.stderr) == (1, True)


def test_a_second_command_on_a_live_folder_is_refused_and_the_first_one_ends_well(tmp_path, log):
    first = start(
        "generate", "benign", "-n", 3, "-c", SMALL, "-m", f"scripted:{SCRIPTED}:slow", "-o", tmp_path / "run", env={"SLOW": 0.2}
    )
    wait_until(lambda: log_lines(log, "begun"))
    for extra in ([], ["--update"], ["--fresh", "--yes"]):
        second = generate(tmp_path, "benign", "-n", 3, *extra, function="slow")
        assert second.returncode == 1
        assert f"a live run (process {first.pid}) is writing here; wait for it or use another -o" in second.stderr
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(log_lines(log)) == 3 * CALLS


def test_a_changed_recipe_names_the_keys_and_the_ways_on(tmp_path, log):
    assert generate(tmp_path, "benign", "-n", 2, function="logged").returncode == 0
    changed = ("benign", "-n", 2, "--set", "judge.principles=all", "--seed", 0)
    done = generate(tmp_path, *changed, function="logged")
    assert done.returncode == 2
    assert "  judge.principles: 4 there, 'all' now\n" in done.stderr
    assert all(way in done.stderr for way in ("another -o", "--update", "--fresh"))
    made = len(log_lines(log))
    done = generate(tmp_path, *changed, "--update", function="logged")
    assert done.returncode == 0
    assert len(log_lines(log)) - made == 2 * 2
    assert f"{made} calls were already paid for" in done.stdout


def test_fresh_is_refused_without_a_terminal_and_done_with_yes(tmp_path, log):
    assert generate(tmp_path, "benign", "-n", 2, "--fresh", function="logged").returncode == 0, "there is nothing to lose yet"
    done = generate(tmp_path, "benign", "-n", 2, "--fresh", function="logged")
    assert done.returncode == 2
    assert f"--fresh would delete {2 * CALLS} finished calls in {tmp_path}/run; add --yes if that is meant" in done.stderr
    assert kept_calls(tmp_path / "run") == 2 * CALLS
    made = len(log_lines(log))
    assert generate(tmp_path, "benign", "-n", 1, "--fresh", "--yes", function="logged").returncode == 0
    assert len(log_lines(log)) - made == CALLS


def test_fresh_deletes_nothing_where_the_recipe_cannot_work(tmp_path):
    assert generate(tmp_path, "benign", "-n", 1).returncode == 0
    assert generate(tmp_path, "benign", "-n", 1, "-m", "no-such-model", "--fresh", "--yes").returncode == 2
    assert kept_calls(tmp_path / "run") == CALLS


def on_a_terminal(*args: Any, answer: str = "", **variables: Any) -> tuple[int, str]:
    """The command with a terminal on all three streams; exit code, and all that the terminal was sent."""
    ours, theirs = pty.openpty()
    env = {"TERM": "xterm-256color", "COLUMNS": "120", **variables}
    process = start(*args, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.write(ours, answer.encode())
    sent = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                sent += os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
    os.close(ours)
    return process.wait(60), sent.decode("utf-8", "replace")


def test_on_a_terminal_fresh_asks(tmp_path):
    assert generate(tmp_path, "benign", "-n", 1).returncode == 0
    args = ("generate", "benign", "-n", 1, "-c", SMALL, "-m", RESPOND, "-o", tmp_path / "run", "--fresh")
    code, shown = on_a_terminal(*args, answer="n\n")
    assert (code, "holds 13 finished calls. Delete and start over?" in shown) == (1, True)
    assert len(manifest(tmp_path / "run")["sessions"]) == 1
    code, _ = on_a_terminal(*args, answer="y\n")
    assert code == 0
    assert manifest(tmp_path / "run")["sessions"][-1]["calls_made"] == CALLS


# --- what is shown


def test_on_a_terminal_there_is_a_bar_and_hostile_texts_colour_and_move_nothing(tmp_path):
    source = written_rows(tmp_path, *(f"{text} " for text in HOSTILE))
    code, shown = on_a_terminal("generate", source, "-c", SMALL, "-m", f"scripted:{SCRIPTED}:hostile", "-o", tmp_path / "run")
    assert code == 0
    assert "━" in shown
    plain = " ".join(re.sub(r"\x1b\[[\d;?]*\w", "", shown).split())
    assert f"prompts {len(HOSTILE)} of {len(HOSTILE)}" in plain
    summary = plain[plain.index("a pair") :]
    assert "[bold]bold[/bold] [/] [/nothing] [link=http://example.com]x[/link] :warning:" in summary
    assert "\x1b[31mred" not in shown, "the text's own colour"
    assert "\x1b]" not in shown
    assert "\x9b" not in shown
    assert "\x00" not in shown
    assert "\u202e" not in shown


def test_without_a_terminal_there_are_plain_lines_and_no_codes(tmp_path):
    done = generate(tmp_path, written_rows(tmp_path, *HOSTILE), function="hostile")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert re.search(rf"^prompts {len(HOSTILE)} of {len(HOSTILE)}  [\d,]+ calls, [\d,]+ tokens/s$", done.stderr, re.M)


def test_hostile_names_are_told_as_they_are_and_do_not_break_the_message(tmp_path):
    done = generate(tmp_path, "[bold]x[/] \x1b[31m{0}.jsonl")
    assert done.returncode == 2
    assert "[bold]x[/] �[31m{0}" in done.stderr
    folder = tmp_path / "'it' :boom: \x1b31m {0}"
    done = generate(folder, "benign", "-n", 1)
    assert done.returncode == 0
    assert f"{folder}/run/README.md".replace("\x1b", "�") in done.stdout


def test_a_name_that_is_no_text_is_refused(tmp_path):
    odd = os.fsdecode(b"odd \xff.jsonl")
    (tmp_path / odd).write_text('{"prompt": "a"}\n')
    done = generate(tmp_path, tmp_path / odd)
    assert (done.returncode, "expected a text of valid Unicode" in done.stderr) == (2, True)
    done = generate(tmp_path / odd, "benign", "-n", 1)
    assert (done.returncode, "expected a name of valid Unicode, for -o" in done.stderr) == (2, True)


@pytest.mark.parametrize("name", ["[red]", "a::b", "$HOME"])
def test_a_folder_that_could_not_be_loaded_from_is_refused_before_anything_is_paid_for(tmp_path, name):
    done = command("generate", "benign", "-n", 1, "-c", SMALL, "-m", RESPOND, "-o", name, cwd=tmp_path)
    assert (done.returncode, f"-o {name}: `datasets` cannot load from a path" in done.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", " "])
def test_a_folder_without_a_name_is_none(tmp_path, name):
    done = command("generate", "benign", "-n", 1, "-c", SMALL, "-m", RESPOND, "-o", name, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "cai: -o is empty: expected a folder\n")


@pytest.mark.parametrize("name", ["a:b", "s3:x", "file:x", "~x", "x%20y z", "\\", "#?", "{}"])
def test_any_other_name_is_a_folder(tmp_path, name):
    (tmp_path / "~x.jsonl").write_text('"a prompt"\n')
    done = command("generate", "~x.jsonl", "-c", SMALL, "-m", RESPOND, "-o", name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path / name)["status"] == "done"


def test_a_terminal_that_is_not_utf_8_is_served(tmp_path):
    done = generate(tmp_path, "benign", "-n", 2, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, run=real_command)
    assert done.returncode == 0
    assert "preference" in done.stdout


def test_a_reader_that_goes_away_is_no_failure(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = generate(tmp_path, "benign", "-n", 2, stdout=writing, run=real_command)
    os.close(writing)
    assert (done.returncode, manifest(tmp_path / "run")["status"]) == (0, "done")
    assert "BrokenPipe" not in done.stderr
    for args in (["constitution", "show", "harmless"], ["doctor"], ["--help"]):
        reading, writing = os.pipe()
        os.close(reading)
        assert "BrokenPipe" not in real_command(*args, stdout=writing).stderr
        os.close(writing)


def test_an_output_that_cannot_be_written_is_told(tmp_path):
    with open("/dev/full", "w") as full:
        done = generate(tmp_path, "benign", "-n", 2, stdout=full, run=real_command)
        assert (done.returncode, "No space left on device" in done.stderr) == (1, True)
        assert manifest(tmp_path / "run")["status"] == "done"
        done = real_command("constitution", "show", "harmless", stdout=full)
        assert done.returncode == 1
        assert re.fullmatch(r"cai: .*No space left on device\n", done.stderr)


def test_where_there_is_no_pair_to_show_the_summary_says_so(tmp_path):
    same = model(tmp_path, "def respond(request):\n    return 'the same' if hasattr(request, 'seed') else [0.0, 0.0]\n")
    done = command("generate", "benign", "-n", 2, "-c", SMALL, "-m", same, "-o", tmp_path / "run")
    assert done.returncode == 0
    assert "\na pair" not in done.stdout
    assert re.search(r"^  revisions\n +4  unchanged$", done.stdout, re.M)
    assert "without rows, so not there to load: sft, preference, unpaired" in done.stdout
    assert "0 of 2 prompts gave a pair" in done.stdout
    assert "no pair was made, mostly for 'revisions: unchanged': a larger model may help" in done.stdout
    assert "labels" not in done.stdout, "nothing was compared"


def test_where_answers_are_empty_the_summary_says_what_may_help(tmp_path):
    empty = model(tmp_path, "def respond(request):\n    return '' if hasattr(request, 'seed') else [0.0, 0.0]\n")
    done = command("generate", "benign", "-n", 2, "-c", SMALL, "-m", empty, "-o", tmp_path / "run")
    told = " ".join(done.stdout.split())
    assert "no pair was made, mostly for 'candidates: empty': where a model's thoughts take up all of" in told


def test_where_the_labels_follow_the_order_the_summary_says_so_with_no_pair_too(tmp_path):
    source = "def respond(request):\n    return usual(request) if hasattr(request, 'seed') else [-0.1, -2.0]\n"
    asked = ("generate", "benign", "-n", 2, "-c", SMALL, "-m", model(tmp_path, source), "-o", tmp_path / "run")
    done = command(*asked)
    assert done.returncode == 0
    assert re.search(r" 100%  flip with the order of the completions ", done.stdout)
    assert re.search(r" 100%  shown first preferred to shown second ", done.stdout)
    assert "the judge follows the order, not the text: try another --judge-model" in done.stdout
    assert "no pair was made, mostly for 'tie': try another --judge-model" in done.stdout
    done = command(*asked, "--set", "dataset.min_probability=0.9")
    assert "all 26 calls were already paid for" in done.stdout
    assert "2 kept from before, no call was needed" in done.stderr


def test_a_threshold_that_leaves_no_pair_is_what_to_lower(tmp_path):
    done = generate(tmp_path, "benign", "-n", 2, "--set", "dataset.min_probability=0.9")
    hint = "mostly for 'less sure than dataset.min_probability': lower dataset.min_probability"
    assert hint in " ".join(done.stdout.split())


def test_the_lines_of_the_example_hang_under_their_text(tmp_path):
    done = generate(tmp_path, "benign", "-n", 6, env={"COLUMNS": "60"}, run=real_command)
    shown = done.stdout[done.stdout.index("a pair") : done.stdout.index("next")].splitlines()[1:-1]
    assert [line[:12] for line in shown if line[:12].strip()] == ["    prompt  ", "    chosen  ", "  rejected  "]
    assert len(shown) > 3
    assert all(len(line) <= 60 and line[12] != " " for line in shown)


def test_advice_does_not_stand_before_an_error(tmp_path):
    done = generate(tmp_path, "benign", "--set", "generation.rounds=99")
    assert (done.returncode, "note:" in done.stderr) == (2, False)


# --- progress


def lines_of(tally: Tally, total: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.01)
    with progress.watch(tally, total):
        time.sleep(0.05)
    return capsys.readouterr().err


def test_lines_tell_rows_speed_and_what_is_left_out(monkeypatch, capsys):
    tally = Tally(
        records_made=3, duplicates=1, quarantined=Counter({"x": 2}), calls_made=40, completion_tokens=900, calls_each=10
    )
    line = r"^prompts 6 of 12  40 calls, [\d,]+ tokens/s, 3 left out$"
    assert re.search(line, lines_of(tally, 12, monkeypatch, capsys), re.M)
    assert re.search(r"^prompts 6  40 calls", lines_of(tally, None, monkeypatch, capsys), re.M)


def test_the_time_left_is_told_by_the_pace_since_the_first_new_call():
    tally, pace = Tally(calls_each=10, read=4, calls_replayed=10), progress._Pace()
    assert pace.left(tally, 4, 0) == "", "nothing is new yet"
    tally.calls_made = 2
    assert pace.left(tally, 4, 1000) == "", "loading the model took that long"
    tally.calls_made = 8
    assert pace.left(tally, 4, 1060) == ", 45%, about 4 min left"
    tally.calls_replayed, tally.read = 0, 6
    assert pace.left(tally, 4, 1060) == ", 45%, about 4 min left", "what is reached stays"
    tally.records_made = 4
    assert pace.left(tally, 4, 1100) == ""


def test_no_time_left_is_told_where_it_cannot_be():
    tally, pace = Tally(calls_each=10, read=4, calls_made=2), progress._Pace()
    assert pace.left(tally, None, 0) == ""
    tally.calls_made = 30
    assert pace.left(tally, None, 60) == ""
    tally.stopping = True
    assert pace.left(tally, 4, 60) == ""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "under 1 s"), (0.99, "under 1 s"), (1, "1 s"), (89, "89 s"), (152, "3 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_are_told_as_people_tell_them(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize(("seconds", "told"), [(0.3, "under 1 s left"), (1, "about 1 s left"), (152, "about 3 min left")])
def test_what_is_left_is_told_without_about_under(seconds, told):
    assert time_left(seconds) == told


def test_lines_tell_when_a_model_is_loading_and_when_the_run_is_stopping(monkeypatch, capsys):
    assert "loading the model" in lines_of(Tally(in_flight=4), 12, monkeypatch, capsys)
    told = lines_of(Tally(in_flight=4, stopping=True), 12, monkeypatch, capsys)
    assert "stopping: 4 calls in flight finish; Ctrl-C again stops at once" in told
    assert re.search("^prompts 0 of 12  stopped$", lines_of(Tally(stopping=True), 12, monkeypatch, capsys), re.M)


def test_the_watch_ends_with_its_block_whatever_happens(monkeypatch, capsys):
    with pytest.raises(ValueError, match="x"), progress.watch(Tally(), 5):
        raise ValueError("x")
    assert threading.active_count() == 1 or all("watch" not in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_printable_text_holds_nothing_that_a_terminal_obeys(text):
    shown = printable(text + "\ud800\x7f")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", shown)
    assert "\n" not in shortened(text * 50, 40)
    assert len(shortened(text * 50, 40)) <= 40


# --- doctor


def test_doctor_tells_versions_engines_extras_models_and_devices():
    done = command("doctor")
    assert done.returncode == 0
    for part in ("python ", "cai-toolkit ", "torch ", "engines", "transformers     usable", "scripted         usable"):
        assert part in done.stdout
    shown = done.stdout[done.stdout.index("extras") : done.stdout.index("models")]
    assert [line.split()[0] for line in shown.splitlines()[1:] if line] == list(EXTRAS)
    for part in ("models", "smollm2-135m ", "devices", "cpu, ", "dtype auto on "):
        assert part in done.stdout


WITHOUT = "import sys; sys.modules.update({names}); from cai.cli.main import main; main()"


def test_doctor_tells_what_to_install():
    done = real_command("doctor", code=WITHOUT.format(names={"torch": None, "trl": None}))
    assert done.returncode == 0
    assert "transformers     missing torch: pip install 'cai-toolkit[local]'" in done.stdout
    assert "train            missing torch, trl: pip install 'cai-toolkit[train]'" in done.stdout


def test_doctor_survives_a_broken_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    done = real_command("doctor", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 0
    assert "cannot be imported: OSError: libcudart.so.12: cannot open" in done.stdout


def test_a_run_that_needs_torch_says_what_to_install(tmp_path):
    done = real_command("generate", "benign", "-n", 1, "-o", tmp_path / "run", code=WITHOUT.format(names={"torch": None}))
    assert (done.returncode, "torch is not installed: pip install 'cai-toolkit[local]'" in done.stderr) == (2, True)
    code = WITHOUT.format(names={"torch": None, "transformers": None})
    done = real_command("generate", "benign", "-n", 1, "-o", tmp_path / "run", code=code)
    assert (done.returncode, "torch and transformers are not installed: pip" in done.stderr) == (2, True)


def test_a_run_without_torch_works_on_another_engine(tmp_path):
    code = WITHOUT.format(names={"torch": None, "transformers": None, "trl": None})
    done = generate(tmp_path, "benign", "-n", 1, code=code, run=real_command)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "done"
