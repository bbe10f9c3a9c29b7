"""`cai judge evaluate`, `calibrate` and `label`: planted judges are measured for what they are, and no call is made twice."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
from pathlib import Path

import datasets
import pytest
import yaml

from tests.runs import SCRIPTED, SMALL, command, kept_calls, log_lines, manifest, quarantine, rows, written_rows

PRINCIPLES = 5
JUDGE = '''
import math, os, random, re
from tests.scripted import *
from tests.scripted import _calls

TEXTS = re.compile(r"<completion A>\\n(.*)\\n</completion A>\\n\\n<completion B>\\n(.*)\\n</completion B>", re.DOTALL)

def planted(request):
    """The difference of two completions' worths, times QUALITY, with BIAS for what is first, and NOISE by the pair."""
    text = request.messages[0].content
    first, second = TEXTS.findall(text)[0]
    if "[fails]" in text:
        return [float("nan"), -1.0]
    worth = [float(re.search(r"worth (-?[\\d.]+)", one)[1]) for one in (first, second)]
    noise = random.Random(" ".join(sorted((first, second)))).gauss(0, {noise})
    noise = noise if first < second else -noise
    lean = {quality} * (worth[0] - worth[1]) + noise + {bias}
    return [lean / 2 - 3, -lean / 2 - 3]

async def logged(request):
    await asyncio.sleep(int(key(request), 16) % 4 / 1000)
    if next(_calls) == int(os.environ.get("KILL_AT", "0")):
        os.kill(os.getpid(), signal.SIGKILL)
    note("answered", request)
    return planted(request)
'''


def judge(folder, function="planted", quality=1.0, bias=0.0, noise=0.0):
    file = folder / "judge.py"
    source = JUDGE.replace("{quality}", str(quality)).replace("{bias}", str(bias)).replace("{noise}", str(noise))
    file.write_text(source)
    return f"scripted:{file}:{function}"


def labelled(folder, count, fails=0, seed=0, ids=False):
    """Pairs in which people chose what is worth 1 more or less than the rejected; so many of the first make the judge fail."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        gap = draw.choice([0.5, 1.0, 2.0])
        text = "[fails] " if number < fails else ""
        answers = {"chosen": f"{number} worth {gap}", "rejected": f"{number} worth 0.0, it is"}
        row = {"prompt": f"{text}Question {number}?", **answers}
        lines.append(row | ({"id": f"pair-{number}"} if ids else {}))
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(name, folder, pairs, model, *args, out="run", **options):
    args = ("judge", name, pairs, "-c", SMALL, "-m", model, "-o", folder / out, *args)
    return command(*args, **options)


def evaluation(folder, out="run"):
    return json.loads((folder / out / "evaluation.json").read_text())


# --- evaluate


def test_a_perfect_judge_is_found_perfect(tmp_path):
    done = run("evaluate", tmp_path, labelled(tmp_path, 60), judge(tmp_path))
    assert done.returncode == 0, done.stderr
    told = evaluation(tmp_path)["agreement"]
    assert (told["pairs"], told["accuracy"]["value"], told["usual"]["value"]) == (60, 1.0, 1.0)
    assert (told["order_flip_rate"], told["verdict_flip_rate"], told["first_position_rate"]) == (0, 0, 0.5)
    assert told["failures"] == {}
    assert [one["accuracy"]["value"] for one in told["principles"]] == [1.0] * PRINCIPLES
    assert "accuracy" in done.stdout
    assert "100.0%" in done.stdout
    assert (tmp_path / "run" / "evaluation.html").read_text().startswith("<!")


def test_a_bias_for_the_first_place_is_measured_and_cancels(tmp_path):
    """A gap of 0.5 or 1 is outweighed by the bias of 1.5, one of 2 is not; both orders together see through it."""
    pairs = labelled(tmp_path, 90)
    assert run("evaluate", tmp_path, pairs, judge(tmp_path, bias=1.5)).returncode == 0
    told = evaluation(tmp_path)["agreement"]
    outweighed = sum("worth 2.0" not in json.loads(line)["chosen"] for line in pairs.read_text().splitlines()) / 90
    assert told["accuracy"]["value"] == 1.0
    assert told["order_flip_rate"] == pytest.approx(outweighed, abs=0.06)
    assert told["verdict_flip_rate"] == pytest.approx(outweighed, abs=1e-6)
    assert told["first_position_rate"] == pytest.approx(0.5 + outweighed / 2, abs=0.03)
    assert told["usual"]["value"] == pytest.approx(1 - outweighed / 2, abs=0.12)
    assert told["gain"]["value"] == pytest.approx(told["accuracy"]["value"] - told["usual"]["value"], abs=1e-5)


def test_a_noisy_judge_is_as_accurate_as_its_noise_lets_it_be(tmp_path):
    """The share of gaps that outweigh Gaussian noise of deviation 1, by its distribution function; within 3 deviations."""
    pairs, model = labelled(tmp_path, 600), judge(tmp_path, noise=1.0)
    assert run("evaluate", tmp_path, pairs, model, "--set", "judge.principles=1").returncode == 0
    told = evaluation(tmp_path)["agreement"]
    expected = sum((1 + math.erf(gap / math.sqrt(2))) / 2 for gap in (0.5, 1.0, 2.0)) / 3
    assert told["accuracy"]["value"] == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / 600))
    assert told["accuracy"]["low"] < expected < told["accuracy"]["high"]


def test_a_judge_that_knows_nothing_is_found_out(tmp_path):
    assert run("evaluate", tmp_path, labelled(tmp_path, 40), judge(tmp_path, quality=0.0, bias=2.0)).returncode == 0
    told = evaluation(tmp_path)["agreement"]
    assert (told["ties"], told["accuracy"]["value"], told["sureness"]) == (40, 0.5, 0.5)
    assert (told["order_flip_rate"], told["first_position_rate"]) == (1, 1)


def test_failures_are_counted_and_are_no_ties(tmp_path):
    done = run("evaluate", tmp_path, labelled(tmp_path, 40, fails=7), judge(tmp_path))
    assert done.returncode == 0, done.stderr
    told = evaluation(tmp_path)["agreement"]
    assert (told["pairs"], told["ties"], told["failures"]) == (33, 0, {"no verdict": 7})
    assert len(quarantine(tmp_path / "run")) == 7
    assert "7 no verdict" in done.stdout


def test_a_judge_that_always_fails_ends_with_one_error_line(tmp_path):
    done = run("evaluate", tmp_path, labelled(tmp_path, 5, fails=5), judge(tmp_path))
    assert done.returncode == 1
    assert "none of 5 rows became a record (no verdict: 5)" in done.stderr
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_every_method_can_be_evaluated(tmp_path):
    (tmp_path / "model.py").write_text(
        "from tests.scripted import *\n"
        "def respond(request):\n"
        "    name = type(request).__name__\n"
        "    if name == 'GenerateRequest':\n"
        "        text = request.messages[0].content\n"
        "        return 'A' if text.rindex('splendid') < text.rindex('dull') else 'B'\n"
        "    if name == 'ChoiceRequest' and len(request.choices) == 10:\n"
        "        return [-abs(rating - (9 if 'splendid' in request.messages[0].content else 2)) for rating in range(1, 11)]\n"
        "    if name == 'ChoiceRequest':\n"
        "        text = request.messages[0].content\n"
        "        return [-0.1, -2.3] if text.rindex('splendid') < text.rindex('dull') else [-2.3, -0.1]\n"
        "    if name == 'RewardRequest':\n"
        "        return float('splendid' in request.messages[-1].content)\n"
        "    held = 'would choose' in request.messages[-1].content\n"
        "    return float(held == ('splendid' in request.continuation))\n"
    )
    pairs = tmp_path / "pairs.jsonl"
    given = [{"prompt": f"Question {n}?", "chosen": "splendid", "rejected": "dull"} for n in range(8)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in given))
    for method in ("choice", "reasoning", "likelihood", "score", "text", "reward-model"):
        done = run("evaluate", tmp_path, pairs, f"scripted:{tmp_path}/model.py:respond", "--method", method, out=method)
        assert done.returncode == 0, done.stderr
        assert evaluation(tmp_path, method)["agreement"]["accuracy"]["value"] == 1.0, method


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("--method", "chioce"), "judge.method: expected 'choice'"),
        (("--method", "checks"), "has no principle with a 'check' for the judge"),
        (("--method", "panel"), "a panel needs two members or more"),
        (("--set", "judge.clamp=[0.7, 0.9]"), "expected [low, high] with 0 <= low < 0.5 < high <= 1"),
        (("--update", "--fresh"), "--update keeps what --fresh deletes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, args, problem):
    done = run("evaluate", tmp_path, labelled(tmp_path, 3), judge(tmp_path), *args)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not (tmp_path / "run").exists()


def test_rows_that_are_no_pairs_are_set_aside(tmp_path):
    pairs = labelled(tmp_path, 6)
    pairs.write_text(pairs.read_text() + '{"prompt": "Why?", "chosen": "a worth 1"}\nno json\n{"chosen": 3}\n')
    done = run("evaluate", tmp_path, pairs, judge(tmp_path))
    assert done.returncode == 0, done.stderr
    assert evaluation(tmp_path)["agreement"]["failures"] == {"unreadable row": 3}
    assert "no column 'rejected'" in quarantine(tmp_path / "run")[0]["detail"]


# --- no call is made twice


def test_killed_and_run_again_it_makes_no_call_twice(tmp_path, log):
    """Four principles of one order are one call of the engine, and are kept together."""
    pairs, model = labelled(tmp_path, 12), judge(tmp_path, "logged", bias=0.5)
    few = ("--set", "generation.concurrency=2")
    done = run("evaluate", tmp_path, pairs, model, *few, env={"CALLS_LOG": log, "KILL_AT": 41})
    assert done.returncode == -signal.SIGKILL
    kept = kept_calls(tmp_path / "run")
    assert 40 - 2 * 2 * 3 <= kept <= 40
    before = len(log_lines(log))
    done = run("evaluate", tmp_path, pairs, model, env={"CALLS_LOG": log})
    assert done.returncode == 0, done.stderr
    assert len(log_lines(log)) - before == 12 * 4 * 2 - kept
    first = evaluation(tmp_path)
    assert first["agreement"]["pairs"] == 12
    made = len(log_lines(log))
    assert run("evaluate", tmp_path, pairs, model, env={"CALLS_LOG": log}).returncode == 0
    assert len(log_lines(log)) == made
    assert evaluation(tmp_path) == first


def test_label_evaluate_and_calibrate_share_a_folders_calls(tmp_path, log):
    pairs, model = labelled(tmp_path, 24), judge(tmp_path, "logged")
    every = ("--set", "judge.principles=all")
    for name in ("label", "evaluate", "calibrate"):
        done = run(name, tmp_path, pairs, model, *every, env={"CALLS_LOG": log})
        assert done.returncode == 0, done.stderr
    assert len(log_lines(log)) == 24 * PRINCIPLES * 2


# --- label


def test_a_labelled_dataset_loads_and_holds_the_judges_probabilities(tmp_path):
    done = run("label", tmp_path, labelled(tmp_path, 30), judge(tmp_path, quality=-1.0), "--set", "dataset.test_fraction=0.3")
    assert done.returncode == 0, done.stderr
    data = datasets.load_dataset(str(tmp_path / "run"), "preference", cache_dir=str(tmp_path / "cache"))
    found = [row for split in data.values() for row in split]
    assert len(found) == 30
    assert set(data) == {"train", "test"}
    for row in found:
        gap = float(row["rejected"][0]["content"].split("worth ")[1].split(",")[0])
        assert row["chosen"][0]["content"].endswith("worth 0.0, it is")
        assert row["chosen_probability"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-9)
        assert len(row["principle_ids"]) == 4
        assert row["source"] == "samples"
    assert manifest(tmp_path / "run")["policy"] is None


def test_a_row_that_changed_under_its_id_is_judged_anew(tmp_path, log):
    pairs, model = labelled(tmp_path, 5, ids=True), judge(tmp_path, "logged")
    assert run("label", tmp_path, pairs, model, env={"CALLS_LOG": log}).returncode == 0
    made = len(log_lines(log))
    assert made == 5 * 4 * 2
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines[2] = {"id": "pair-2", "prompt": lines[2]["prompt"], "chosen": "2 worth -4", "rejected": "2 worth 0.0, it is"}
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("label", tmp_path, pairs, model, env={"CALLS_LOG": log}).returncode == 0
    assert len(log_lines(log)) == made + 4 * 2
    found = {row["prompt_id"]: row for row in rows(tmp_path / "run", "preference")}
    assert len(found) == 5
    assert found["pair-2"]["chosen"][0]["content"] == "2 worth 0.0, it is"
    assert found["pair-2"]["rejected"][0]["content"] == "2 worth -4"


def test_pairs_come_through_a_pipe(tmp_path):
    text = labelled(tmp_path, 4).read_text()
    assert run("label", tmp_path, "-", judge(tmp_path), stdin=text).returncode == 0
    assert len(rows(tmp_path / "run", "preference")) == 4


# --- calibrate


def test_a_calibration_turns_an_anticorrelated_judge_round(tmp_path):
    pairs, model = labelled(tmp_path, 80), judge(tmp_path, quality=-2.0, bias=0.7, noise=0.5)
    every = ("--set", "judge.principles=all")
    done = run("calibrate", tmp_path, pairs, model, "--save", tmp_path / "fitted.yaml", out="fit")
    assert done.returncode == 0, done.stderr
    assert "anti-correlated with people" in done.stdout
    fitted = yaml.safe_load((tmp_path / "fitted.yaml").read_text())
    assert (fitted["method"], fitted["sign"], fitted["pairs"]) == ("choice", -1, 80)
    assert [one["prior"] for one in fitted["principles"].values()] == pytest.approx([0.7] * PRINCIPLES, abs=1e-9)

    other = labelled(tmp_path, 60, seed=1)
    use = f"judge.calibration={tmp_path}/fitted.yaml"
    assert run("evaluate", tmp_path, other, model, *every, out="before").returncode == 0
    done = run("evaluate", tmp_path, other, model, *every, "--set", use, out="after")
    assert done.returncode == 0, done.stderr
    before, after = (evaluation(tmp_path, out)["agreement"] for out in ("before", "after"))
    assert before["accuracy"]["value"] < 0.15
    assert after["accuracy"]["value"] == pytest.approx(1 - before["accuracy"]["value"], abs=1e-6)
    assert after["log_loss"] < 0.6 < before["log_loss"]
    saved = yaml.safe_load((tmp_path / "after" / "recipe.yaml").read_text())
    assert saved["judge"]["calibration"] == "calibration.yaml"
    assert yaml.safe_load((tmp_path / "after" / "calibration.yaml").read_text()) == fitted


def test_a_calibrated_run_can_be_made_again_from_its_own_folder(tmp_path):
    pairs, model = labelled(tmp_path, 40), judge(tmp_path, quality=-2.0, noise=0.5)
    assert run("calibrate", tmp_path, pairs, model, out="fit").returncode == 0
    use = f"judge.calibration={tmp_path}/fit/calibration.yaml"
    assert run("label", tmp_path, pairs, model, "--set", "judge.principles=all", "--set", use, out="first").returncode == 0
    again = command("judge", "label", pairs, "--recipe", tmp_path / "first" / "recipe.yaml", "-o", tmp_path / "second")
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "second", "preference") == rows(tmp_path / "first", "preference")


@pytest.mark.parametrize("changed", ["judge", "constitution", "method", "judge.exemplars", "judge.layout"])
def test_a_calibration_of_another_judge_is_refused(tmp_path, changed):
    pairs, model = labelled(tmp_path, 24), judge(tmp_path)
    assert run("calibrate", tmp_path, pairs, model, out="fit").returncode == 0
    more = ["--set", f"judge.calibration={tmp_path}/fit/calibration.yaml"]
    if changed == "judge":
        model = judge(tmp_path, quality=2.0)
    elif changed == "constitution":
        more += ["-c", "harmless"]
    elif changed == "judge.exemplars":
        more += ["--set", "judge.exemplars=1"]
    elif changed == "judge.layout":
        more += ["--set", "judge.layout=principle-first"]
    else:
        more += ["--method", "score"]
    done = run("evaluate", tmp_path, pairs, model, *more)
    assert done.returncode == 2
    assert f"the calibration does not fit this judge: {changed}: fitted for" in done.stderr
    assert not (tmp_path / "run").exists()


def test_checks_can_be_calibrated_too(tmp_path):
    """No engine judges here, and a calibration must know its judge by the same name in both commands."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "name: rules\ndescription: D.\nlicense: MIT\nprinciples:\n"
        "  - id: brief\n    check: {max_characters: 12}\n  - id: one\n    check: {must_match: 'worth 1'}\n"
    )
    pairs = labelled(tmp_path, 30)
    done = command("judge", "calibrate", pairs, "-c", rules, "--method", "checks", "-o", tmp_path / "fit")
    assert done.returncode == 0, done.stderr
    use = ("--set", f"judge.calibration={tmp_path}/fit/calibration.yaml", "--set", "judge.principles=all")
    done = command("judge", "evaluate", pairs, "-c", rules, "--method", "checks", "-o", tmp_path / "run", *use)
    assert done.returncode == 0, done.stderr
    assert evaluation(tmp_path)["usage"]["calls"] == 0


def test_too_few_pairs_are_refused_and_nothing_is_saved(tmp_path):
    done = run("calibrate", tmp_path, labelled(tmp_path, 6), judge(tmp_path))
    assert done.returncode == 2
    assert "a calibration needs at least 20 labelled pairs" in done.stderr
    assert not (tmp_path / "run").exists()


def test_too_few_pairs_from_a_pipe_are_told_after_they_were_judged(tmp_path):
    done = run("calibrate", tmp_path, "-", judge(tmp_path), stdin=labelled(tmp_path, 6).read_text())
    assert done.returncode == 2
    assert "a calibration needs at least 20 labelled pairs of at least 5 prompts, found 6 of 6" in done.stderr
    assert not (tmp_path / "run" / "calibration.yaml").exists()


@pytest.mark.parametrize("target", ["/proc/calibration.yaml", "nowhere/calibration.yaml", f"{'x' * 300}.yaml"])
def test_a_file_that_cannot_be_saved_is_told_before_anything_is_judged(tmp_path, target):
    done = run("calibrate", tmp_path, labelled(tmp_path, 24), judge(tmp_path), "--save", target)
    assert done.returncode == 2
    assert f"--save {target}: " in done.stderr.replace("\n", "")
    assert not (tmp_path / "run").exists()


def test_rewards_too_far_apart_are_refused_in_one_line(tmp_path):
    (tmp_path / "model.py").write_text(
        "def respond(request):\n    return 1e308 if 'worth 0.0' in request.messages[-1].content else -1e308\n"
    )
    model = f"scripted:{tmp_path}/model.py:respond"
    done = run("calibrate", tmp_path, labelled(tmp_path, 24), model, "--method", "reward-model")
    assert done.returncode == 2
    assert "principle 'reward': the judge's readings [(-1e+308, 1e+308)] differ by more than 1e+100" in done.stderr
    assert not (tmp_path / "run" / "calibration.yaml").exists()


def test_a_calibration_of_other_verdicts_does_not_stay_behind(tmp_path):
    """A folder's own calibration goes with the verdicts it was fitted on, unless the new run is what uses it."""
    pairs, model = labelled(tmp_path, 24), judge(tmp_path, quality=-2.0)
    fitted = tmp_path / "run" / "calibration.yaml"
    every = ("--set", "judge.principles=all")
    assert run("calibrate", tmp_path, pairs, model).returncode == 0
    text = fitted.read_text()
    assert run("label", tmp_path, pairs, model, *every).returncode == 0
    assert fitted.read_text() == text
    use = ("--set", f"judge.calibration={fitted}")
    done = run("evaluate", tmp_path, pairs, model, *every, *use, "--update")
    assert done.returncode == 0, done.stderr
    assert evaluation(tmp_path)["agreement"]["accuracy"]["value"] == 1.0
    assert fitted.read_text() == text
    assert run("label", tmp_path, pairs, model, "--update").returncode == 0
    assert not fitted.exists()


def test_the_cost_says_that_it_is_of_all_that_the_folder_paid_for(tmp_path):
    pairs, model = labelled(tmp_path, 6), judge(tmp_path)
    assert run("evaluate", tmp_path, pairs, model, "--set", "judge.principles=2").returncode == 0
    done = run(
        "evaluate", tmp_path, pairs, model, "--set", "judge.principles=2", "--set", "judge.layout=principle-first", "--update"
    )
    assert done.returncode == 0, done.stderr
    calls = kept_calls(tmp_path / "run")
    assert calls == 6 * 2 * 2 * 2
    assert f"{calls} calls, 0 prompt tokens computed, 0 generated, in this folder in all" in done.stdout


def test_a_judge_that_is_calibrated_already_is_not_calibrated_again(tmp_path):
    pairs, model = labelled(tmp_path, 24), judge(tmp_path)
    assert run("calibrate", tmp_path, pairs, model, out="fit").returncode == 0
    done = run("calibrate", tmp_path, pairs, model, "--set", f"judge.calibration={tmp_path}/fit/calibration.yaml")
    assert done.returncode == 2
    assert "judge.calibration: a judge that is to be calibrated has none yet" in done.stderr


# --- help


@pytest.mark.parametrize("name", ["evaluate", "calibrate", "label"])
def test_help_shows_an_example_and_every_option(name):
    done: subprocess.CompletedProcess[str] = command("judge", name, "--help", env={"COLUMNS": "200"})
    assert done.returncode == 0
    assert f"cai judge {name} pairs.jsonl -m Qwen/Qwen3-4B" in done.stdout
    for option in ("--model", "--method", "--constitution", "--out", "--recipe", "--set", "--update", "--fresh", "--yes"):
        assert option in done.stdout


def test_calibrate_writes_over_no_file_that_is_no_calibration(tmp_path):
    source = written_rows(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    before = Path(source).read_bytes()
    done = command("judge", "calibrate", source, "-m", f"scripted:{SCRIPTED}:respond", "-o", tmp_path / "run", "--save", source)
    assert done.returncode == 2
    assert "is no calibration" in done.stderr
    assert Path(source).read_bytes() == before
