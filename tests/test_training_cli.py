"""What `cai train` shows while it trains and at its end."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from cai.cli import training
from cai.cli.train import read_document
from cai.cli.training import progress, show_summary
from cai.errors import ConfigError
from tests.stages import resolve_settings


def test_lines_show_the_first_measures_the_last_and_some_between(capsys, monkeypatch):
    clock = iter(range(10_000))  # a second from one look to the next
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(training.sys.stderr, "isatty", lambda: False, raising=False)
    with progress() as show:
        show.note("training")
        show.step(0, 12, {})
        for step in range(1, 13):
            show.step(step, 12, {})
            show.step(step, 12, {"loss": 1 / step, "rewards/margins": 0.5, "epoch": 1.0})
        show.step(12, 12, {"train_runtime": 3.0})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training"
    assert lines[-1] == "step 12 of 12  loss 0.08333, margins 0.5"
    assert 2 < len(lines) < 13
    assert all("left" in line for line in lines[1:-1])


def test_the_summary_tells_what_was_left_out_and_shows_names_as_they_are(capsys):
    source = {"source": "data [bold]\x1b[31m.jsonl", "train": 1234, "test": 0, "left_out": 2, "first_left_out": "a:1: [red]no"}
    manifest = {
        "stage": "dpo",
        "steps": 1000,
        "seconds": 125.0,
        "data": [source],
        "too_long": {"train": 3},
        "unlabelled": {},
        "measures": {"loss": 0.512345},
    }
    show_summary(manifest, Path("models/[x]"))
    out = capsys.readouterr().out
    assert "data [bold]�[31m.jsonl  1,234  0" in out
    assert "left out 2 rows that could not be used (models/[x]/run/quarantine.jsonl); the first, a:1: [red]no" in out
    assert "left out 3 of train: longer than trl.max_length" in out
    assert "measures after 1,000 steps, 2 min" in out
    assert "0.5123  loss" in out
    assert "use it:             cai generate -m models/[x]" in out


@pytest.mark.parametrize(("stage", "follow"), [("sft", "cai train dpo DATA -m m"), ("reward", "cai reward score m ")])
def test_what_to_type_next_follows_from_the_stage(capsys, stage, follow):
    manifest = {"stage": stage, "steps": 1, "seconds": 1.0, "data": [], "too_long": {}, "unlabelled": {}, "measures": {}}
    show_summary(manifest, Path("m"))
    assert follow in capsys.readouterr().out


GUARDED = {
    "stage": "ppo",
    "steps": 12,
    "seconds": 9.0,
    "data": [{"source": "prompts.jsonl", "train": 12, "test": 0}],
    "too_long": {},
    "unlabelled": {},
    "measures": {},
}


def test_the_summary_of_an_online_training_tells_what_stopped_it_and_how_gold_went(capsys, tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "training.html").touch()
    first, best = {"step": 0, "gold": 0.25, "low": 0.2, "high": 0.31}, {"step": 8, "gold": 0.5, "low": 0.4, "high": 0.6}
    gold = {"by": "judge", "prompts": 64, "first": first, "last": {"step": 12, "gold": 0.125}}
    stopped = {"reason": "kl", "step": 12, "why": "the KL is [red] 60"}
    show_summary({**GUARDED, "stopped": stopped, "best": best, "gold": gold}, tmp_path)
    told = " ".join(capsys.readouterr().out.split())
    assert "stopped after step 12: the KL is [red] 60" in told
    assert "gold by judge: from 0.25 (0.2 to 0.31) to 0.125 at step 12, best at step 8: 0.5 (0.4 to 0.6)" in told
    assert f"best by gold: {tmp_path}/best pictures: {tmp_path}/training.html" in told


def test_the_summary_says_of_which_rollout_measures_are(capsys, tmp_path):
    measures = {"reward": 0.25, "kl": 3.0, "loss": 0.5}
    show_summary({**GUARDED, "measures": measures, "rollout": 9}, tmp_path)
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "0.25 reward (of the rollout at step 9)" in told
    assert "3 kl, nats a completion (of the rollout at step 9)" in told
    assert "0.5 loss" in told


def test_gold_is_named_by_a_flag_and_set_goes_into_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gold: {constitution: concise-and-clear, every: 7}")
    flags = {"data": ["benign"], "reward": ["models/reward"], "gold": "gold.py:honest"}
    gold = resolve_settings("grpo", str(recipe), ["gold.prompts=5"], flags).gold
    assert (gold.function, gold.constitution, gold.every, gold.prompts) == ("gold.py:honest", None, 7, 5)
    assert resolve_settings("ppo", None, [], {**flags, "gold": "models/other"}).gold.model == "models/other"
    with pytest.raises(ConfigError, match="trained on as a reward"):
        resolve_settings("grpo", None, [], {**flags, "gold": "models/reward"})
    with pytest.raises(ConfigError, match="--gold"):
        resolve_settings("grpo", None, [], {**flags, "gold": ""})


def test_a_flag_for_adapters_keeps_what_is_said_of_them(tmp_path):
    def lora(*assignments: str, flag: bool = True, file: str = "{}") -> object:
        recipe = tmp_path / "sft.yaml"
        recipe.write_text(file)
        flags = {"data": ["x"], "lora": True if flag else None}
        return read_document("sft", str(recipe), list(assignments), flags).data.get("lora")

    assert lora() is True
    assert lora("lora.rank=4", "lora.merge=false") == {"rank": 4, "merge": False}
    assert lora(file="lora: {rank: 8}") == {"rank": 8}
    assert lora("lora.merge=false", file="lora: {rank: 8}") == {"rank": 8, "merge": False}
    assert lora(file="lora: null") is lora("lora=false") is True
    assert lora(flag=False) is None


def test_the_summary_tells_of_gold_and_rewards_without_numbers(capsys, tmp_path):
    gold = {"by": "judge", "prompts": 64, "unscored": 128, "first": {"step": 0}, "last": {"step": 9}}
    show_summary({**GUARDED, "gold": gold, "unscored": {"brief": {"none": 3, "of": 64}}}, tmp_path)
    told = " ".join(capsys.readouterr().out.split())
    assert "gold by judge had no number for any answer" in told
    assert "no number of reward 'brief' for 3 of 64 completions" in told


def test_the_summary_of_an_online_training_without_gold_says_so(capsys, tmp_path):
    show_summary(GUARDED, tmp_path)
    told = " ".join(capsys.readouterr().out.split())
    assert "no gold measure: whether answers got better with the reward is not known" in told
    assert not any(word in told for word in ("stopped", "best", "pictures", "test_split"))


def test_what_is_noted_while_it_trains_stays_above_the_bar(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=60, highlight=False)
    monkeypatch.setattr(training, "_stderr", lambda: shown)
    monkeypatch.setattr(training.sys.stderr, "isatty", lambda: True, raising=False)
    with progress() as show:
        show.note("reading the data")
        show.step(1, 3, {})
        show.note("stopped after step 2: [red]")
        show.step(2, 3, {})
    lines = shown.file.getvalue()
    assert re.search(r"stopped after step 2: \[red\]\s*\n", lines)
    assert "reading the data\n" not in lines
