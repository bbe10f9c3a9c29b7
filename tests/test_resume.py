"""Killed at any moment, the same command pays for no finished call again and ends in the same bytes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cai import dataset
from cai.config import Recipe
from cai.errors import CaiError, EngineError, StoreError
from cai.pipeline import generate, running
from cai.pipeline.manifest import file_hashes
from cai.store import RunFolder
from tests.runs import (
    CALLS,
    SMALL,
    command,
    data_bytes,
    forked,
    generate_in,
    kept_calls,
    log_lines,
    manifest,
    model,
    quarantine,
    real_command,
    recipe,
    start,
    wait_until,
    written_rows,
)
from tests.runs import rows as written

PROMPTS = 4
AT_ONCE = 3
RECIPE = recipe("logged", prompts={"limit": PROMPTS}, generation={"concurrency": AT_ONCE})
ONE_PROMPT = recipe("logged", prompts={"limit": 1})


class Reference(NamedTuple):
    """A run that nothing interrupted."""

    data: dict[str, bytes]
    calls: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    out = tmp_path_factory.mktemp("reference")
    log = out.parent / "reference.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALLS_LOG", str(log))
        generate(RECIPE, out / "run")
    calls = len(log_lines(log))
    assert kept_calls(out / "run") == calls == len({line["key"] for line in log_lines(log)})
    return Reference(data_bytes(out / "run"), calls)


DESCRIBED = ("dataset", "source_hash", "files")


def trace_file(out: Path) -> Path:
    return out / "data" / "trace" / "train-00000-of-00001.parquet"


def variables(log: Path, **more: int) -> dict[str, str]:
    return {"CALLS_LOG": str(log), **{name: str(value) for name, value in more.items()}}


def finish(out: Path, log: Path, reference: Reference, recipe: Recipe = RECIPE) -> None:
    """Run to the end; asserts that exactly the missing calls were made, and that the result is the reference's."""
    kept = kept_calls(out)
    before = len(log_lines(log))
    done = generate(recipe, out)
    assert len(log_lines(log)) - before == reference.calls - kept
    assert done["status"] == "done"
    assert data_bytes(out) == reference.data
    assert kept_calls(out) == reference.calls


def test_the_recipe_makes_as_many_calls_as_these_tests_go_through(reference):
    assert reference.calls == PROMPTS * CALLS


@pytest.mark.parametrize("number", range(1, PROMPTS * CALLS + 1))
def test_killed_during_any_call(tmp_path, log, reference, number):
    out = tmp_path / "run"
    process = forked(generate_in, variables(log, KILL_AT=number), RECIPE, out)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    answered = log_lines(log)
    assert len(answered) == number - 1
    texts = sum(line["kind"] == "GenerateRequest" for line in answered)
    verdicts = len(answered) - texts
    # an answer is kept before anything else happens; of judge's calls, four in one order are one call of the engine
    assert texts <= kept_calls(out) <= len(answered)
    assert len(answered) - kept_calls(out) <= min(verdicts, AT_ONCE * 2 * 3)
    finish(out, log, reference)


def kill_at_event(number: int, log: Path, out: Path) -> None:
    """Run, and die just before the n-th time that something in the run folder is opened, renamed, made or removed."""
    seen = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "sqlite3.connect") and str(out) in str(args[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    generate_in(variables(log), ONE_PROMPT, out)


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_killed_before_any_touch_of_the_folder(tmp_path, log, again):
    """Until a round ends without a kill: every touch was tried; `again`: every second, in a folder with a finished run."""
    generate(ONE_PROMPT, tmp_path / "finished")
    reference = Reference(data_bytes(tmp_path / "finished"), CALLS)
    number = 0
    while True:
        number += 2 if again else 1
        out = tmp_path / f"run-{number}"
        if again:
            shutil.copytree(tmp_path / "finished", out)
        process = forked(kill_at_event, number, log, out)
        process.join(60)
        finish(out, log, reference, ONE_PROMPT)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert number > 20


def test_killed_again_and_again(tmp_path, log, reference):
    out = tmp_path / "run"
    kills = 0
    while True:
        process = forked(generate_in, variables(log, KILL_AT=26), RECIPE, out)
        process.join(60)
        if process.exitcode == 0:
            break
        kills += 1
    assert kills >= 2
    assert data_bytes(out) == reference.data
    texts = [line["key"] for line in log_lines(log) if line["kind"] == "GenerateRequest"]
    assert len(texts) == len(set(texts)), "no answer, critique or revision was made twice in all those runs"


@pytest.mark.parametrize("attempt", range(8))
def test_killed_from_outside_at_a_random_time(tmp_path, log, reference, attempt):
    out = tmp_path / "run"
    process = forked(generate_in, variables(log), RECIPE, out)
    time.sleep(random.Random(attempt).uniform(0, 0.25))
    process.kill()
    process.join(60)
    finish(out, log, reference)


def test_the_real_command_killed_and_typed_again(tmp_path, log, reference):
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml())
    args = ("generate", "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "run")
    process = start(*args, env={"KILL_AT": 20})
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    kept = kept_calls(tmp_path / "run")
    done = real_command(*args)
    assert done.returncode == 0
    assert data_bytes(tmp_path / "run") == reference.data
    assert f"{kept} calls were already paid for" in done.stdout
    assert manifest(tmp_path / "run")["sessions"][-1]["calls_made"] == reference.calls - kept


def test_a_finished_run_again_makes_no_call_and_no_difference(tmp_path, log, reference):
    for calls in (reference.calls, 0):
        generate(RECIPE, tmp_path / "run")
        assert manifest(tmp_path / "run")["sessions"][-1]["calls_made"] == calls
        assert data_bytes(tmp_path / "run") == reference.data
    assert len(manifest(tmp_path / "run")["sessions"]) == 2


def test_a_finished_dataset_is_kept_until_something_of_it_changes(tmp_path, log, reference):
    out = tmp_path / "run"
    generate(RECIPE, out)
    before = manifest(out)
    file = trace_file(out)
    written_at = file.stat().st_mtime_ns
    generate(RECIPE, out)
    assert file.stat().st_mtime_ns == written_at
    assert {**manifest(out), "sessions": 0, "usage": 0} == {**before, "sessions": 0, "usage": 0}
    file.write_bytes(b"damaged")
    generate(RECIPE, out)
    assert data_bytes(out) == reference.data
    generate(RECIPE.model_copy(update={"dataset": RECIPE.dataset.model_copy(update={"test_fraction": 0.5})}), out)
    assert sum(manifest(out)["dataset"]["rows"]["trace"].values()) == PROMPTS
    assert data_bytes(out) != reference.data


@pytest.mark.parametrize("failure", [KeyboardInterrupt, EngineError("out of memory")])
def test_a_resume_that_fails_leaves_what_is_said_of_the_dataset_and_the_dataset(tmp_path, log, monkeypatch, failure):
    def fail(*args: object) -> None:
        raise failure

    out = tmp_path / "run"
    before = generate(RECIPE, out)
    written_at = trace_file(out).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(running, "_run", fail)
        with pytest.raises(CaiError):
            generate(RECIPE, out)
    told = manifest(out)
    assert told["status"] in ("interrupted", "failed")
    assert {name: told[name] for name in DESCRIBED} == {name: before[name] for name in DESCRIBED}
    generate(RECIPE, out)
    assert trace_file(out).stat().st_mtime_ns == written_at


def test_where_the_new_dataset_is_there_and_the_card_is_not_the_manifest_does_not_tell_of_the_old_one(
    tmp_path, log, monkeypatch
):
    out = tmp_path / "run"
    generate(RECIPE, out)
    changed = RECIPE.model_copy(update={"dataset": RECIPE.dataset.model_copy(update={"test_fraction": 0.5})})
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_text", refuse("README.md", RunFolder.write_text))
        with pytest.raises(StoreError):
            generate(changed, out)
    told = manifest(out)
    assert told["status"] == "failed"
    assert told["files"] == file_hashes(out / "data")
    assert told["dataset"] == generate(changed, out)["dataset"]


def refuse(name: str, write: Callable[..., None]) -> Callable[..., None]:
    def refusing(folder: RunFolder, target: str, text: str) -> None:
        if target == name:
            raise StoreError("full")
        write(folder, target, text)

    return refusing


def test_a_dataset_is_written_anew_by_other_code(tmp_path, log, monkeypatch):
    out = tmp_path / "run"
    code = tmp_path / "code"
    shutil.copytree(Path(dataset.__file__).parent, code / "dataset")
    monkeypatch.setattr(running, "__file__", str(code / "pipeline" / "running.py"))
    generate(RECIPE, out)
    file, pyarrow = trace_file(out), metadata.version("pyarrow")
    written_at = [file.stat().st_mtime_ns]
    for source, release in (("", pyarrow), ("# changed\n", pyarrow), ("", f"{pyarrow}.1")):
        with (code / "dataset" / "views.py").open("a") as views:
            views.write(source)
        monkeypatch.setattr(
            metadata, "version", lambda name, known=metadata.version, told=release: {"pyarrow": told}.get(name) or known(name)
        )
        generate(RECIPE, out)
        written_at.append(file.stat().st_mtime_ns)
    assert written_at[0] == written_at[1] < written_at[2] < written_at[3]


def test_links_in_the_place_of_data_are_replaced_and_what_they_lead_to_is_left_alone(tmp_path, log, reference):
    out = tmp_path / "run"
    generate(RECIPE, out)
    trace_file(out).unlink()
    trace_file(out).symlink_to(tmp_path / "nowhere")
    generate(RECIPE, out)
    assert data_bytes(out) == reference.data
    (out / "data").rename(tmp_path / "elsewhere")
    (out / "data").symlink_to(tmp_path / "elsewhere")
    trace_file(out).write_bytes(b"damaged")
    generate(RECIPE, out)
    assert data_bytes(out) == reference.data
    assert not (out / "data").is_symlink()
    assert (tmp_path / "elsewhere" / "trace").is_dir()


def test_a_record_that_was_made_and_is_not_there_is_an_error(tmp_path, log, monkeypatch):
    def lose(checked: Any, folder: RunFolder, *rest: Any) -> None:
        run(checked, folder, *rest)
        folder.database._db.execute("DELETE FROM prompts WHERE position >= 2")

    run = running._run
    out = tmp_path / "run"
    fewer = recipe("logged", prompts={"limit": 2})
    for first in (None, fewer):  # with `fewer`, the dataset that is there holds the very records that are left
        if first:
            generate(first, out, "fresh")
        with monkeypatch.context() as patch:
            patch.setattr(running, "_run", lose)
            with pytest.raises(StoreError, match="the dataset has 2 of 4 records; the same command"):
                generate(RECIPE, out)
        assert manifest(out)["status"] == "failed"
        assert (out / "data").exists() == bool(first)
    assert generate(RECIPE, out)["dataset"]["records"] == PROMPTS


def test_two_spellings_of_a_path_are_one_run(tmp_path, log, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written_rows(tmp_path, "one question")
    for source in ("prompts.jsonl", "./prompts.jsonl"):
        generate(recipe("logged", prompts={"source": source}), tmp_path / "run")
    assert manifest(tmp_path / "run")["sessions"][-1]["calls_made"] == 0


@pytest.mark.parametrize("concurrency", [1, 2, 50])
def test_concurrency_makes_no_difference(tmp_path, log, reference, concurrency):
    generate(recipe("logged", prompts={"limit": PROMPTS}, generation={"concurrency": concurrency}), tmp_path / "run")
    assert data_bytes(tmp_path / "run") == reference.data


def test_the_order_of_prompts_changes_no_record(tmp_path, log):
    rows = [{"id": f"p{number}", "prompt": f"question {number}"} for number in range(6)]
    records = []
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        out = tmp_path / str(len(records))
        out.mkdir()
        source = written_rows(out, *order)
        asked = recipe("logged", prompts={"source": source, "limit": None}, dataset={"test_fraction": 0})
        generate(asked, out / "run")
        records.append({row["prompt_id"]: row for row in written(out / "run", "trace")})
        assert list(records[-1]) == [row["id"] for row in order]
    assert records[0] == records[1] == records[2]


def test_the_saved_recipe_makes_the_same_again(tmp_path, log, reference):
    generate(RECIPE, tmp_path / "run")
    done = command("generate", "--recipe", tmp_path / "run" / "recipe.yaml", "-o", tmp_path / "again")
    assert done.returncode == 0
    assert data_bytes(tmp_path / "again") == reference.data
    done = command("generate", "--recipe", tmp_path / "run" / "recipe.yaml", "-o", tmp_path / "run")
    assert done.returncode == 0
    assert manifest(tmp_path / "run")["sessions"][-1]["calls_made"] == 0


# --- Ctrl-C


def interrupted(tmp_path: Path, *signals: int, function: str = "slow", slow: float = 0.4) -> tuple[int, str, float]:
    """Start the command, send the signals once three calls are in flight; exit code, stderr, and seconds from the first."""
    args = ("generate", "benign", "-c", SMALL, "-n", 4, "-m", f"scripted:{Path(__file__).parent / 'scripted.py'}:{function}")
    process = start(*args, "--set", "generation.concurrency=3", "-o", tmp_path / "run", env={"SLOW": slow})
    wait_until(lambda: len(log_lines(tmp_path / "calls.log", "begun")) == 3)
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, err, time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_what_is_in_flight(tmp_path, log, monkeypatch, number):
    code, err, _ = interrupted(tmp_path, number)
    assert code == 130
    assert err.endswith("cai: stopped before the end; the same command continues; 3 finished calls are kept\n")
    assert len(log_lines(log, "begun")) == len(log_lines(log)) == kept_calls(tmp_path / "run") == 3
    told = manifest(tmp_path / "run")
    assert (told["status"], told["sessions"][-1]["calls_made"]) == ("interrupted", 3)
    monkeypatch.setenv("SLOW", "0")
    asked = recipe("slow", prompts={"limit": 4})
    assert generate(asked, tmp_path / "run")["sessions"][-1]["calls_replayed"] == 3
    assert len(log_lines(log)) == 4 * CALLS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once(tmp_path, log, number):
    code, err, seconds = interrupted(tmp_path, number, number, slow=60)
    assert code == 130
    assert "the same command continues" in err
    assert seconds < 5
    assert log_lines(log) == []
    assert manifest(tmp_path / "run")["status"] == "interrupted"


def test_the_second_signal_waits_for_no_model_that_is_loading(tmp_path, log):
    code, _, seconds = interrupted(tmp_path, signal.SIGINT, signal.SIGINT, function="loading", slow=60)
    assert (code, manifest(tmp_path / "run")["status"]) == (130, "interrupted")
    assert seconds < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_dataset_is_written_is_told_too(tmp_path, log, monkeypatch, number):
    """Outside the event loop it arrives as a KeyboardInterrupt, which the command makes of both signals."""
    code = (
        "import os, sys, signal, cai.dataset.parquet as parquet\n"
        f"parquet.pq.ParquetWriter = lambda *args: os.kill(os.getpid(), {int(number)}) or signal.pause()\n"
        "from cai.cli.main import main; main()"
    )
    done = real_command("generate", "-m", RECIPE.policy.model, "-n", 2, "-o", tmp_path / "run", code=code)
    assert done.returncode == 130
    assert re.search(r"cai: stopped; the same command continues; \d+ finished calls are kept\n$", done.stderr)
    assert manifest(tmp_path / "run")["status"] == "interrupted"
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_begins_ends_it_quietly(tmp_path, number):
    begun = tmp_path / "begun"
    source = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)\n"
    process = start("generate", "benign", "-m", model(tmp_path, source), "-o", tmp_path / "run")
    wait_until(begun.exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_is_heard_while_standard_input_is_silent_and_what_came_is_answered_meanwhile(tmp_path, log):
    process = start("generate", "-", "-m", RECIPE.policy.model, "-o", tmp_path / "run", stdin=subprocess.PIPE)
    process.stdin.write("a first question\na second question\n")
    process.stdin.flush()
    wait_until(lambda: kept_calls(tmp_path / "run") >= 2 * CALLS - 8)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: process.poll() is not None, 5)
    _, err = process.communicate()
    assert (process.returncode, manifest(tmp_path / "run")["status"]) == (130, "interrupted")
    assert "Fatal" not in err
    assert manifest(tmp_path / "run")["sessions"][-1]["records_made"] == 2


# --- what an earlier pass left


def test_the_quarantine_is_that_of_the_last_pass(tmp_path, log):
    source = written_rows(tmp_path, {"id": "a", "prompt": "question"}, {"prompt": 5})
    asked = recipe("logged", prompts={"source": source})
    generate(asked, tmp_path / "run")
    assert [row["reason"] for row in quarantine(tmp_path / "run")] == ["unreadable row"]
    written_rows(tmp_path, {"id": "a", "prompt": "question"}, {"prompt": "now a text"})
    done = generate(asked, tmp_path / "run")
    assert (quarantine(tmp_path / "run"), done["prompts"]["quarantined"]) == ([], {})
    assert done["sessions"][-1]["records_made"] == 1


def test_a_prompt_that_changed_between_two_runs_replaces_its_record(tmp_path, log):
    asked = recipe("logged", prompts={"source": written_rows(tmp_path, *({"id": i, "prompt": f"q {i}"} for i in "abc"))})
    generate(asked, tmp_path / "run")
    written_rows(tmp_path, {"id": "a", "prompt": "q a"}, {"id": "b", "prompt": "changed"}, {"id": "c", "prompt": "q c"})
    done = generate(asked, tmp_path / "run")
    assert done["sessions"][-1]["records_made"] == 1
    generate(asked, tmp_path / "anew")
    assert data_bytes(tmp_path / "run") == data_bytes(tmp_path / "anew")
