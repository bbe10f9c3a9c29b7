"""Online training that safeguards stop: what is kept, what goes on after a kill, and what is told."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai.cli.training import show_summary
from cai.errors import ConfigError, EngineError, Interrupted
from cai.report.written import read_lines
from cai.training.arguments import make_arguments
from cai.training.card import render_card
from cai.training.data import load_data
from cai.training.launching import launch
from cai.training.loading import load_tokenizer
from cai.training.online import safeguards
from cai.training.online.best import Best
from cai.training.online.distance import log_ratios
from cai.training.online.rollouts import Logged
from cai.training.online.safeguards import Safeguards
from cai.training.running import train
from cai.training.stage import Parts, build_trainer
from tests.stages import WORDS, Shown, make_settings, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
FUNCTIONS = """
def rising(prompts, completions, trainer_state, **columns):
    return [trainer_state.global_step + len(one[-1]["content"]) / 100 for one in completions]

def rising_then_falling(prompts, completions, trainer_state, log_metric, log_extra, **columns):
    log_metric("words", 1.0)
    step = trainer_state.global_step
    return [(step if step <= 2 else 2 - 3 * step) + len(one[-1]["content"]) / 1000 for one in completions]

def rising_gold(prompts, completions, trainer_state, **columns):
    return [2.0 * trainer_state.global_step + len(one[-1]["content"]) / 1000 for one in completions]

def nothing(completions, **columns):
    return [None] * len(completions)

def half(completions, **columns):
    return [None if place % 2 else len(one[-1]["content"]) for place, one in enumerate(completions)]

def of_one(completions, **columns):
    return [None if place < len(completions) // 2 else -3.0 for place in range(len(completions))]

def raising(completions, trainer_state, **columns):
    if trainer_state.global_step == 2:
        raise ValueError("no such word")
    return [len(one[-1]["content"]) for one in completions]

def constant(completions, **columns):
    return [0.5] * len(completions)

def length(completions, **columns):
    return [len(one[-1]["content"]) / 10 for one in completions]
"""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than such trainings."""
    monkeypatch.setattr("cai.report.training.draw", lambda written: {})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("functions") / "fun.py"
    file.write_text(FUNCTIONS)
    return file


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    told = [{"prompt": [{"role": "user", "content": f"Say something about {WORDS[n % 8]}, number {n}."}]} for n in range(80)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", told)


def settings_of(stage: str, tiny: Path, rows: Path, functions: Path, reward: Any, gold_by: str | None = None, **keys: Any):
    longest = "max_new_tokens" if stage == "online-dpo" else "max_completion_length"
    trl = {"max_steps": 6, "per_device_train_batch_size": 8, longest: 8, "save_strategy": "steps", "save_steps": 1}
    measure = {"gold": {"function": f"{functions}:{gold_by}", "every": 1, "prompts": 16}} if gold_by else {}
    rewards = {"function": f"{functions}:{reward}"} if isinstance(reward, str) else reward
    given = {"reward": rewards, "seed": 1, **measure, **keys}
    more = {"save_total_limit": 10, "learning_rate": 1e-2, **given.pop("trl", {})}
    return make_settings(stage, tiny, rows, trl=trl | more, **given)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def the_one_at(step: int) -> Any:
    """In place of the best one."""
    return lambda told: next((one for one in told if one["step"] == step), None)


def killed_after(step: int) -> Any:
    """In place of what safeguards do after each step."""
    usual = Safeguards.on_step_end

    def look(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        usual(self, args, state, control, **given)
        if state.global_step == step:
            raise KeyboardInterrupt

    return look


def written(out: Path, name: str) -> list[dict[str, Any]]:
    return read_lines(out / "run" / f"{name}.jsonl")


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "online-dpo"])
def test_a_run_whose_gold_falls_while_its_reward_rises_stops_and_keeps_the_best(stage, tiny, rows, functions, tmp_path, capsys):
    out, show = tmp_path / "out", Shown()
    manifest = train(stage, settings_of(stage, tiny, rows, functions, "rising", "rising_then_falling"), out, show=show)
    assert (manifest["status"], manifest["steps"], manifest["best"]["step"]) == ("done", 4, 2)
    kls = [line.get("kl") for line in written(out, "gold")]
    assert kls == [None] * 5 if stage == "grpo" else (abs(kls[0]) < 1e-4 < abs(kls[2])), "GRPO keeps no reference"
    assert (manifest["stopped"]["reason"], manifest["stopped"]["step"]) == ("gold", 4)
    assert len([note for note in show.notes if note.startswith("stopped after step 4: gold has changed by")]) == 1
    assert [line["step"] for line in written(out, "gold")] == [0, 1, 2, 3, 4]
    assert len(written(out, "samples")) == 5 * 8
    assert [line["completions"] for line in written(out, "rollouts")] == (
        [8] if stage == "ppo" else [8 + 8 * (stage == "online-dpo")] * 4
    )
    assert written(out, "rollouts")[0]["rewards"].keys() == {"rising"}
    assert [(one["train"], one["test"]) for one in manifest["data"]] == [(64, 16)], "of 80 rows"
    assert manifest["measures"].get("kl") == written(out, "rollouts")[-1].get("kl")
    assert "objective/kl" not in manifest["measures"]
    assert manifest["rollout"] == (1 if stage == "ppo" else 4)
    assert same(weights(out / "best"), weights(out / "checkpoints" / "checkpoint-2"))
    assert same(weights(out), weights(out / "checkpoints" / "checkpoint-4"))
    assert not same(weights(out), weights(out / "best"))
    assert AutoModelForCausalLM.from_pretrained(out / "best").config.use_cache
    assert AutoTokenizer.from_pretrained(out / "best").chat_template
    assert not (out / "run" / "best").exists()
    assert train(stage, settings_of(stage, tiny, rows, functions, "rising", "rising_then_falling"), out) == manifest
    show_summary(manifest, out)
    told = " ".join(capsys.readouterr().out.split())
    assert "stopped after step 4: gold has changed by" in told
    assert "rows.jsonl 64 16" in told.replace(str(rows), "rows.jsonl")
    assert f"best by gold: {out / 'best'} pictures: {out / 'training.html'}" in told
    card = " ".join((out / "README.md").read_text().split())
    assert "Gold is the function `rising_then_falling`, which was not trained on, of answers to 16 held-out prompts" in card
    assert re.search(r"at step 4, and at best \S+ \(.*\) after step 2", card)
    assert "after step 2, which is in `best/`." in card
    rewarded = "objective/scores" if stage == "online-dpo" else "reward"
    assert f"| {rewarded} (of the rollout at step {manifest['rollout']}) | " in card
    assert stage == "grpo" or f"| kl, nats a completion (of the rollout at step {manifest['rollout']}) | " in card
    assert "| rows.jsonl | 64 | 16 |" in card
    assert "after step 2, whose policy this is" in (out / "best" / "README.md").read_text()
    assert "It was stopped after step 4: gold has changed by" in card


def test_an_evaluation_leaves_what_the_training_has_measured_as_read():
    metrics = {"objective/kl": [7.0]}
    trainer = SimpleNamespace(_metrics={"train": metrics}, model=SimpleNamespace(training=True))
    guard = object.__new__(Safeguards)
    guard._trainer, guard._logged = trainer, Logged(trainer)
    assert guard._logged.take() == {"kl": 7.0}
    trainer.model.training = False
    guard.on_log(None, None, None)
    metrics["objective/kl"].append(9.0)
    assert guard._logged.take() == {"kl": 9.0}
    trainer.model.training = True
    metrics["objective/kl"] = [3.0]
    guard.on_log(None, None, None)
    assert guard._logged.take() == {"kl": 3.0}


def test_a_target_of_the_kl_past_its_limit_is_refused(tiny, rows, functions, tmp_path):
    settings = settings_of("ppo", tiny, rows, functions, "length", trl={"target_kl": 60.0})
    with pytest.raises(ConfigError, match=r"^limits\.kl: a training is stopped from 50 nats .* steers it to 60; raise"):
        train("ppo", settings, tmp_path / "out", show=Shown())


def test_a_pair_that_rewards_do_not_order_trains_nothing(tiny, rows, functions, tmp_path):
    begun = weights(tiny)
    for reward, moves in (("of_one", False), ("constant", False), ("length", True)):
        settings = settings_of("online-dpo", tiny, rows, functions, reward, trl={"max_steps": 2})
        train("online-dpo", settings, tmp_path / reward, show=Shown())
        found = weights(tmp_path / reward)
        assert moves != all(torch.equal(one, found[name]) for name, one in begun.items())
    assert written(tmp_path / "of_one", "log")[0]["objective/scores"] == pytest.approx(-3.0)


def test_the_best_adapters_are_merged(tiny, rows, functions, tmp_path):
    settings = settings_of("grpo", tiny, rows, functions, "rising", "rising_then_falling", lora={"rank": 4})
    train("grpo", settings, tmp_path / "out")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny)
    kept = PeftModel.from_pretrained(base, str(tmp_path / "out" / "checkpoints" / "checkpoint-2")).merge_and_unload()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.allclose(best(ids).logits, kept(ids).logits, atol=1e-5)
        assert not torch.allclose(best(ids).logits, AutoModelForCausalLM.from_pretrained(tiny)(ids).logits, atol=1e-3)


@pytest.mark.parametrize("stage", ["ppo", "online-dpo"])
def test_the_distance_from_the_reference_is_that_of_naive_code(stage, tiny, rows, functions, tmp_path):
    """One completion at a time, without padding; tokens of probabilities at the temperature of the training."""
    settings = settings_of(stage, tiny, rows, functions, "length")
    arguments = make_arguments(stage, settings, tmp_path)
    trainer = build_trainer(stage, Parts(settings, load_data(stage, settings), load_tokenizer(settings), arguments))
    for weight in trainer.model.parameters():
        weight.data *= 1.05
    before, after = [[5, 6, 7], [8] * 6, [9, 10]], [[11, 12], [13], [14, 15, 16, 17]]
    wanted = []
    temperature = trainer.args.temperature if stage == "ppo" else 1.0
    for first, second in zip(before, after, strict=True):
        said = []
        for model in (trainer.model, AutoModelForCausalLM.from_pretrained(tiny)):
            with torch.no_grad():
                logps = (model(torch.tensor([first + second])).logits[0] / temperature).log_softmax(-1)
            said.append(sum(float(logps[len(first) + place - 1, token]) for place, token in enumerate(second)))
        wanted.append(said[0] - said[1])
    assert log_ratios(trainer, before, after) == pytest.approx(wanted, abs=1e-4)
    assert min(abs(one) for one in wanted) > 1e-3


@pytest.mark.parametrize("stage", ["ppo", "online-dpo"])
def test_measuring_gold_changes_nothing_in_the_training(stage, tiny, functions, tmp_path):
    def split(first: int, last: int) -> Dataset:
        return Dataset.from_list([{"prompt": f"Tell me of {WORDS[n % 8]}, {n}."} for n in range(first, last)])

    data = tmp_path / "data"
    DatasetDict({"train": split(0, 24), "test": split(24, 30)}).save_to_disk(str(data))
    for name, by in (("with", "rising_gold"), ("without", None)):
        settings = settings_of(stage, tiny, data, functions, "length", by, trl={"max_steps": 3})
        train(stage, settings, tmp_path / name)
    assert len(written(tmp_path / "with", "gold")) == 4
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert not (tmp_path / "without" / "best").exists()


def test_a_killed_run_goes_on_drops_later_lines_and_keeps_the_best_of_its_checkpoint(
    tiny, rows, functions, tmp_path, monkeypatch
):
    settings = settings_of("grpo", tiny, rows, functions, "rising", "rising_gold", trl={"max_steps": 4, "save_steps": 2})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train("grpo", settings, whole)
    usual = Safeguards.on_step_end
    monkeypatch.setattr(Safeguards, "on_step_end", killed_after(3))
    with pytest.raises(Interrupted):
        train("grpo", settings, killed)
    monkeypatch.setattr(Safeguards, "on_step_end", usual)
    assert sorted(path.name for path in (killed / "run" / "best").iterdir()) == ["2", "3"]
    shutil.copytree(killed, tmp_path / "again")
    manifest = train("grpo", settings, killed)
    assert [line["step"] for line in written(killed, "gold")] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in written(killed, "rollouts")] == [1, 2, 3, 4]
    assert [line["step"] for line in written(killed, "log")] == [1, 2, 3, 4, 4]
    assert Counter(line["step"] for line in written(killed, "samples")) == dict.fromkeys(range(5), 8)
    assert manifest["best"]["step"] == 4
    assert same(weights(killed / "best"), weights(killed))

    monkeypatch.setattr("cai.training.online.safeguards.best_of", the_one_at(2))
    train("grpo", settings, tmp_path / "again")
    assert same(weights(tmp_path / "again" / "best"), weights(whole / "checkpoints" / "checkpoint-2"))


def test_a_best_policy_that_was_deleted_is_not_said_to_be_there(tiny, rows, functions, tmp_path, monkeypatch):
    trl = {"max_steps": 4, "save_steps": 2}
    settings, out = settings_of("grpo", tiny, rows, functions, "rising", "rising_gold", trl=trl), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Safeguards, "on_step_end", killed_after(3))
        patch.setattr("cai.training.online.safeguards.best_of", the_one_at(0))
        with pytest.raises(Interrupted):
            train("grpo", settings, out)
        shutil.rmtree(out / "run" / "best")
        patch.undo()
        patch.setattr("cai.training.online.safeguards.best_of", the_one_at(0))
        manifest = train("grpo", settings, out, show=(show := Shown()))
    assert "run/best/0, the policy with the best gold, is not there any more: best/ will be of a better one" in show.notes
    assert ("best" in manifest, manifest["gold"]["first"]["step"], (out / "best").exists()) == (False, 0, False)
    assert "`best/`" not in (out / "README.md").read_text()


def test_where_the_last_checkpoint_is_cut_off_the_best_of_the_one_before_is_there(tiny, rows, functions, tmp_path, monkeypatch):
    trl = {"max_steps": 6, "save_steps": 2}
    settings, out = settings_of("grpo", tiny, rows, functions, "rising", "rising_gold", trl=trl), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Safeguards, "on_step_end", killed_after(5))
        with pytest.raises(Interrupted):
            train("grpo", settings, out)
    assert sorted(path.name for path in (out / "run" / "best").iterdir()) == ["2", "4", "5"]
    at_2 = weights(out / "checkpoints" / "checkpoint-2")
    (out / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    monkeypatch.setattr("cai.training.online.safeguards.best_of", the_one_at(2))
    assert train("grpo", settings, out, show=(show := Shown()))["best"]["step"] == 2
    assert "training goes on from checkpoint-2" in show.notes
    assert same(weights(out / "best"), at_2)


@pytest.mark.parametrize(("step", "is_there"), [(5, True), (15, False), (None, False)])
def test_what_was_saved_as_best_is_told_as_that_alone(tmp_path, step, is_there):
    (tmp_path / "best").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.json").write_text('{"step": 5}')
    assert Best(tmp_path).save(None, None, step) is is_there  # type: ignore[arg-type]
    assert (tmp_path / "best").exists() is is_there


def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew(tiny, rows, functions, tmp_path, monkeypatch):
    trl = {"max_steps": 3, "save_strategy": "no"}
    settings, out = settings_of("grpo", tiny, rows, functions, "rising", "rising_gold", trl=trl), tmp_path / "out"
    usual = Safeguards.on_step_end
    monkeypatch.setattr(Safeguards, "on_step_end", killed_after(1))
    with pytest.raises(Interrupted):
        train("grpo", settings, out)
    assert [path.name for path in (out / "run" / "best").iterdir()] == ["1"]
    monkeypatch.setattr(Safeguards, "on_step_end", usual)
    shutil.copytree(out, tmp_path / "other")
    assert train("grpo", settings.model_copy(update={"seed": 2}), tmp_path / "other")["steps"] == 3, "nothing was lost"
    monkeypatch.setattr("cai.training.online.safeguards.best_of", the_one_at(0))
    assert train("grpo", settings, out)["best"]["step"] == 0
    assert same(weights(out / "best"), weights(tiny))
    assert [line["step"] for line in written(out, "gold")] == [0, 1, 2, 3]


def test_a_run_that_is_killed_after_its_stop_does_not_train_on(tiny, rows, functions, tmp_path, monkeypatch):
    settings, out = settings_of("grpo", tiny, rows, functions, "rising", "rising_then_falling"), tmp_path / "out"

    def die(self: Any) -> None:
        raise KeyboardInterrupt

    usual = Safeguards.finish
    monkeypatch.setattr(Safeguards, "finish", die)
    with pytest.raises(Interrupted):
        train("grpo", settings, out)
    monkeypatch.setattr(Safeguards, "finish", usual)
    shutil.copytree(out, tmp_path / "other")
    manifest = train("grpo", settings, out)
    assert (manifest["steps"], manifest["stopped"]["step"], manifest["best"]["step"]) == (4, 4, 2)
    assert same(weights(out / "best"), weights(out / "checkpoints" / "checkpoint-2"))
    with monkeypatch.context() as patch:
        patch.setattr("cai.training.online.versions._digest", lambda file: "another")
        manifest = train("grpo", settings, tmp_path / "other", "changed-code")
    assert (manifest["steps"], manifest["gold"]["first"]["step"]) == (6, 4), "gold by which it stopped is no more"
    assert "stopped" not in manifest


def test_gold_is_not_forgotten_for_a_function_that_fails(tiny, rows, functions, tmp_path):
    file, out = tmp_path / "gold.py", tmp_path / "out"
    file.write_text(FUNCTIONS)
    own = {"function": f"{file}:raising", "every": 1, "prompts": 16}
    settings = settings_of("grpo", tiny, rows, functions, "rising", gold=own, trl={"max_steps": 3})
    with pytest.raises(EngineError, match="no such word"):
        train("grpo", settings, out)
    before, best = [written(out, name) for name in ("gold", "samples")], sorted((out / "run" / "best").iterdir())
    file.write_text(FUNCTIONS.replace("global_step == 2", "global_step == 1"))
    with pytest.raises(EngineError, match="no such word"):
        train("grpo", settings, out, "changed-code")
    assert before == [written(out, name) for name in ("gold", "samples")]
    assert sorted((out / "run" / "best").iterdir()) == best
    file.write_text(FUNCTIONS.replace("def raising(", "raising = nothing\n\ndef other("))
    with pytest.raises(EngineError, match=r"^gold by the changed 'raising' has no number for any answer at step 1; mend it"):
        train("grpo", settings, out, "changed-code")
    assert before == [written(out, name) for name in ("gold", "samples")]
    assert sorted((out / "run" / "best").iterdir()) == best
    file.write_text(FUNCTIONS.replace('raise ValueError("no such word")', "return [0.0] * len(completions)"))
    manifest = train("grpo", settings, out, "changed-code")
    assert [line["step"] for line in written(out, "gold")] == [1, 2, 3]
    assert manifest["gold"]["first"]["step"] == 1
    golds = {line["step"]: line["gold"] for line in written(out, "samples")}
    assert (golds[0], golds[2]) == (None, 0.0)
    assert golds[1] > 0
    assert Counter(line["step"] for line in written(out, "samples")) == dict.fromkeys(range(4), 8)
    assert len(manifest["changes"]) == 3


def test_what_is_best_by_another_function_outlasts_a_kill_before_the_next_checkpoint(
    tiny, rows, functions, tmp_path, monkeypatch
):
    """It goes on from step 2, with the best at step 0 by the old function, and by the new one first at 2, then at 3."""
    trl = {"max_steps": 4, "save_steps": 2}
    settings, out = settings_of("grpo", tiny, rows, functions, "length", "rising_gold", trl=trl), tmp_path / "out"
    usual = Safeguards.on_step_end
    monkeypatch.setattr(Safeguards, "on_step_end", killed_after(3))
    monkeypatch.setattr("cai.training.online.safeguards.best_of", the_one_at(0))
    with pytest.raises(Interrupted):
        train("grpo", settings, out)
    monkeypatch.setattr("cai.training.online.safeguards.best_of", lambda told: the_one_at(0)(told) or (told or [None])[-1])
    monkeypatch.setattr("cai.training.online.versions._digest", lambda file: "another")
    with pytest.raises(Interrupted):
        train("grpo", settings, out, "changed-code")
    assert [line["step"] for line in written(out, "gold")] == [2, 3]
    monkeypatch.setattr(Safeguards, "on_step_end", usual)
    monkeypatch.setattr("cai.training.online.safeguards.best_of", the_one_at(2))
    assert train("grpo", settings, out, "changed-code")["best"]["step"] == 2
    assert same(weights(out / "best"), weights(out / "checkpoints" / "checkpoint-2"))


def test_a_signal_while_gold_is_measured_stops_after_that_step(tiny, rows, functions, tmp_path, monkeypatch):
    from cai.training.online import held_out

    steps = [0, 2]

    def interrupted(trainer: Any, *given: Any) -> Any:
        if steps and trainer.state.global_step == steps[0]:
            del steps[0]
            signal.raise_signal(signal.SIGTERM)
        return held_out.answer(trainer, *given)

    monkeypatch.setattr("cai.training.online.safeguards.answer", interrupted)
    settings = settings_of("grpo", tiny, rows, functions, "rising", "rising_gold", trl={"max_steps": 3})
    for told in ("stopped before another step", "stopped after step 2 of 3"):
        with pytest.raises(Interrupted, match=told):
            train("grpo", settings, tmp_path / "out", show=Shown())
    assert train("grpo", settings, tmp_path / "out", show=Shown())["steps"] == 3
    assert [line["step"] for line in written(tmp_path / "out", "gold")] == [0, 1, 2, 3]


def test_a_training_goes_on_with_a_function_that_was_mended_where_that_is_said(tiny, rows, tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(FUNCTIONS)
    settings = settings_of("grpo", tiny, rows, file, "raising", "length", trl={"max_steps": 4})
    with pytest.raises(EngineError, match="no such word"):
        train("grpo", settings, out)
    file.write_text(FUNCTIONS.replace('raise ValueError("no such word")', "pass"))
    with pytest.raises(
        ConfigError, match=r"reward\[0\]\.function: 'raising@[\s\S]* has changed; --changed-code goes on with it"
    ) as told:
        train("grpo", settings, out)
    assert str(told.value).count("there,") == 2
    other = settings.model_copy(update={"seed": 7})
    with pytest.raises(ConfigError, match="another training"):
        train("grpo", other, out, "changed-code")
    show = Shown()
    manifest = train("grpo", settings, out, "changed-code", show=show)
    gold, change = manifest["changes"]
    assert gold["key"] == "gold.function"
    assert manifest["gold"]["first"]["step"] == 1, "the measure begins anew"
    assert "the function that measures gold has changed: gold is measured anew, and best/ is by that" in show.notes
    assert (manifest["steps"], change["step"], change["key"]) == (4, 1, "reward[0].function")
    assert change["before"] != change["after"]
    card = (out / "README.md").read_text()
    assert f"After step 1 it went on with another version of reward[0].function (`{change['after']}`" in card
    assert "4 steps on 32 completions of 4 rollouts" in card
    assert [line["step"] for line in written(out, "rollouts")] == [1, 2, 3, 4]
    assert train("grpo", settings, out)["changes"] == [gold, change]
    file.write_text(FUNCTIONS)
    with pytest.raises(ConfigError, match="another training") as told:
        train("grpo", settings, out, "changed-code")
    assert str(told.value).endswith("; that one has ended, and --changed-code is for one that has not")
    assert "goes on with it" not in str(told.value)


def test_gold_and_the_best_policy_outlast_a_mended_reward(tiny, rows, functions, tmp_path, capsys, monkeypatch):
    file, out, notes = tmp_path / "mine.py", tmp_path / "out", Shown()
    monkeypatch.setattr("cai.training.online.safeguards.best_of", the_one_at(0))
    file.write_text(FUNCTIONS)
    own = {"function": f"{functions}:length", "every": 1, "prompts": 16}
    settings = settings_of("grpo", tiny, rows, file, "raising", gold=own, trl={"max_steps": 4})
    with pytest.raises(EngineError, match="no such word"):
        train("grpo", settings, out)
    before = written(out, "gold")
    file.write_text("oh no(")
    with pytest.raises(ConfigError, match="SyntaxError"):
        train("grpo", settings, out, "changed-code")
    assert written(out, "gold") == before
    file.write_text(FUNCTIONS.replace('raise ValueError("no such word")', "pass"))
    manifest = train("grpo", settings, out, "changed-code", show=notes)
    assert len([note for note in notes.notes if note.startswith("a function that rewards has changed: gold and best/")]) == 1
    after = written(out, "gold")
    assert [line["golds"] for line in after[:2]] == [line["golds"] for line in before]
    assert [line["proxy"] is None for line in after] == [True] * 2 + [False] * 3
    assert (manifest["gold"]["first"]["step"], [one["step"] for one in manifest["changes"]]) == (0, [1])
    assert manifest["best"]["step"] == 0
    assert same(weights(out / "best"), weights(tiny))
    show_summary(manifest, out)
    assert "another version of reward[0].function after step 1" in " ".join(capsys.readouterr().out.split())


def test_without_gold_completions_of_rollouts_are_shown(tiny, rows, functions, tmp_path):
    train("grpo", settings_of("grpo", tiny, rows, functions, "length", trl={"max_steps": 25}), tmp_path, show=Shown())
    shown = written(tmp_path, "samples")
    assert sorted({one["step"] for one in shown}) == [1, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert {len(one["completion"]) / 10 == one["proxy"] and one["gold"] is None for one in shown} == {True}


def test_the_kl_stops_a_run_with_one_line(tiny, rows, functions, tmp_path):
    show = Shown()
    trl = {"kl_estimator": "k3", "num_iterations": 1}
    settings = settings_of("ppo", tiny, rows, functions, "length", limits={"kl": 1e-9}, trl=trl)
    manifest = train("ppo", settings, tmp_path / "out", show=show)
    assert manifest["stopped"]["reason"] == "kl"
    assert 3 <= manifest["steps"] < 6
    assert len([note for note in show.notes if note.startswith("stopped after")]) == 1
    assert len([note for note in show.notes if note.startswith("no gold measure")]) == 1


@pytest.mark.parametrize(
    ("limits", "steps", "reason"), [({"steps": 2}, 2, "steps"), ({}, 3, "collapse"), ({"collapse": False}, 4, None)]
)
def test_steps_and_collapse_stop_a_run(tiny, rows, functions, tmp_path, monkeypatch, limits, steps, reason):
    monkeypatch.setattr("cai.training.online.safeguards.collapsed", lambda told: "all alike" if len(told) > 2 else "")
    settings = settings_of("grpo", tiny, rows, functions, "length", limits=limits, trl={"max_steps": 4})
    manifest = train("grpo", settings, tmp_path / "out")
    assert (manifest["steps"], manifest.get("stopped", {}).get("reason")) == (steps, reason)


def test_a_value_function_that_learns_alone_is_told_while_it_does(tiny, rows, functions, tmp_path):
    first, then = Shown(), Shown()
    trl = {"value_warmup_steps": 1, "max_steps": 2}
    for limits, show in (({"steps": 1}, first), ({}, then)):
        train("ppo", settings_of("ppo", tiny, rows, functions, "length", limits=limits, trl=trl), tmp_path / "out", show=show)
    line = "to step 1 the value function alone learns (trl.value_warmup_steps)"
    assert (first.notes.count(line), then.notes.count(line)) == (1, 0)
    assert "training goes on from checkpoint-1" in then.notes


@pytest.mark.parametrize("by", ["rising_gold", None])
def test_gold_is_measured_where_a_limit_stops_and_the_card_says_what_the_model_is(
    by, tiny, rows, functions, tmp_path, monkeypatch
):
    monkeypatch.setattr("cai.training.online.safeguards.collapsed", lambda told: "all alike" if len(told) > 1 else "")
    settings = settings_of("grpo", tiny, rows, functions, "length", by, trl={"save_strategy": "no"})
    settings = settings.model_copy(update={"gold": settings.gold and settings.gold.model_copy(update={"every": 5})})
    manifest = train("grpo", settings, tmp_path)
    assert (manifest["steps"], [line["step"] for line in written(tmp_path, "gold")]) == (2, [0, 2] if by else [])
    kept = "best/ holds the best one by gold" if by else "earlier ones are in checkpoints/ if any were saved"
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert f"stopped after step 2: all alike; the model is the policy after that, past the limit, and {kept}." in card


def test_rewards_and_gold_without_numbers_are_told(tiny, rows, functions, tmp_path):
    show = Shown()
    manifest = train("grpo", settings_of("grpo", tiny, rows, functions, "half", "nothing"), tmp_path, show=show)
    assert len([note for note in show.notes if note.startswith("reward 'half' had no number for")]) == 1
    assert len([note for note in show.notes if note.startswith("gold had no number for any answer at step 0")]) == 1
    assert manifest["unscored"] == {"half": {"none": 24, "of": 48}}
    assert (manifest["gold"]["unscored"], "best" in manifest) == (7 * 16, False)
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert "Gold, the function `nothing`, had no number for any answer" in card
    assert "The reward `half` had no number for 24 of 48 completions." in card


def test_the_page_is_drawn_where_a_training_fails_and_is_no_reason_to_fail(tiny, rows, functions, tmp_path, monkeypatch):
    with pytest.raises(EngineError, match="no such word"):
        train("rloo", settings_of("rloo", tiny, rows, functions, "raising"), tmp_path / "failed")
    assert "2 of 6 steps. There is no gold measure" in (tmp_path / "failed" / "training.html").read_text()

    def fail(out: Path, all_steps: int) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("cai.report.training.write_page", fail)
    show = Shown()
    settings = settings_of("rloo", tiny, rows, functions, "length", trl={"max_steps": 1})
    assert train("rloo", settings, tmp_path / "out", show=show)["status"] == "done"
    assert "training.html could not be drawn: ValueError: no font" in show.notes


def test_the_card_names_what_measures_gold_and_no_server_or_key(tiny, rows, functions):
    judge = {"model": "http://10.0.0.7:8000/v1", "method": "score", "server": {"name": "big-judge", "key_file": "/home/me/key"}}
    trl = {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "10.0.0.8", "hub_token": "hf_abc"}
    gold_by = {"constitution": "concise-and-clear", "judge": judge}
    settings = settings_of("grpo", tiny, rows, functions, "length", gold=gold_by, trl=trl)
    measure = {"step": 0, "gold": 0.5}
    told = {"first": measure, "last": {**measure, "step": 9}, "by": "concise-and-clear", "prompts": 8, "unscored": 2}
    training = {"learning_rate": 1e-5, "schedule": "linear", "warmup_steps": 0, "rows_per_step": 8, "rows_per_device": 8}
    training |= {"accumulation": 1, "processes": 1, "epochs": 1}
    manifest = {"measures": {}, "versions": {"trl": "1"}, "data": [], "training": training, "steps": 9, "too_long": {}}
    manifest |= {"unlabelled": {}, "best": measure, "gold": told}
    card = render_card("grpo", settings, manifest, "name")
    assert ", weight" not in card
    [reward] = settings.reward
    heavy = settings.model_copy(update={"reward": (reward.model_copy(update={"weight": 0.1}),)})
    assert "- the function `length`, weight 0.1" in render_card("grpo", heavy, manifest, "name")
    said = "Gold is what `big-judge` says under the constitution `concise-and-clear` (`score`), which was not trained on"
    assert said in " ".join(card.split())
    assert "Gold had no number for 2 answers." in card
    assert not any(secret in card for secret in ("10.0.0", "8000", "key", "hf_abc"))


def test_with_other_limits_a_stopped_run_goes_on_from_where_it_stopped(tiny, rows, functions, tmp_path):
    def run(out: str, **keys: Any) -> tuple[dict[str, Any], Shown]:
        show = Shown()
        settings = settings_of("grpo", tiny, rows, functions, "rising", "rising_then_falling", trl={"max_steps": 5}, **keys)
        return train("grpo", settings, tmp_path / out, show=show), show

    def gold(stop: bool) -> dict[str, Any]:
        return settings_of("grpo", tiny, rows, functions, "rising", "rising_then_falling").gold.model_dump() | {"stop": stop}

    stopped, _ = run("out")
    assert (stopped["stopped"]["reason"], stopped["steps"], stopped["best"]["step"]) == ("gold", 4, 2)
    manifest, show = run("out", gold=gold(False))
    assert "training goes on from checkpoint-4" in show.notes
    assert (manifest["steps"], manifest.get("stopped"), manifest["best"]["step"]) == (5, None, 2)
    assert [line["step"] for line in written(tmp_path / "out", "gold")] == [0, 1, 2, 3, 4, 5]
    whole, _ = run("whole", gold=gold(False))
    assert whole["best"] == manifest["best"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert same(weights(tmp_path / "out" / "best"), weights(tmp_path / "whole" / "best"))
    assert run("out", gold=gold(False))[0] == manifest


@pytest.mark.parametrize(
    ("epochs", "minibatches", "told"),
    [
        (1, 2.0, "trained on once in minibatches of 4"),
        (3, 1.0, "trained on 3 times in minibatches of 8"),
        (1, 0.25, "and a step takes 4 of them"),
        (2, 0.25, "and a step goes over it 2 times with the same weights, of which once is enough; raise trl.steps_per_gen"),
    ],
)
def test_how_a_rollout_is_used(epochs, minibatches, told):
    assert safeguards._how_used(epochs, minibatches, 8).startswith(told)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo", "online-dpo"])
def test_what_is_only_logged_changes_nothing(stage, tiny, rows, functions, tmp_path):
    half, only_logged = {"function": f"{functions}:half"}, {"function": f"{functions}:length", "weight": 0}
    for name, rewards in {"one": [half], "two": [half, only_logged]}.items():
        train(stage, settings_of(stage, tiny, rows, functions, rewards), tmp_path / name)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert {"half", "length"} <= written(tmp_path / "two", "rollouts")[0]["rewards"].keys()


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_a_run_that_stopped_inside_a_rollout_goes_on_with_it(stage, tiny, rows, functions, tmp_path):
    trl = {"num_generations": 2, "num_iterations": 2, "max_steps": 4}

    def run(out: str, steps: int | None) -> Shown:
        show = Shown()
        settings = settings_of(stage, tiny, rows, functions, "length", trl=trl, limits={"steps": steps, "collapse": False})
        train(stage, settings, tmp_path / out, show=show)
        return show

    assert "limits.steps ends this after 1 of its 4 steps; set limits.steps: null for all of them" in run("out", 1).notes
    assert "training goes on from checkpoint-1" in run("out", None).notes
    assert "each rollout is 8 completions, trained on 2 times in minibatches of 8" in run("whole", None).notes
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert [line["step"] for line in written(tmp_path / "out", "rollouts")] == [1, 3]
    line = "all 4 steps are trained on one rollout, so that reward and KL are those from before; raise trl.max_steps above 4"
    trl["num_iterations"] = 4
    assert line in run("short", None).notes


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_a_run_that_goes_on_in_its_second_epoch_sees_the_prompts_in_the_same_order(stage, tiny, rows, functions, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", [json.loads(line) for line in rows.read_text().splitlines()[:8]])
    trl = {"num_generations": 2, "num_iterations": 1, "max_steps": 6, "per_device_train_batch_size": 8}

    def run(out: str, steps: int | None) -> dict[str, Any]:
        settings = settings_of(stage, tiny, few, functions, "length", trl=trl, limits={"steps": steps})
        return train(stage, settings, tmp_path / out)

    assert run("out", 3)["stopped"]["reason"] == "steps"  # two steps are an epoch
    assert run("out", None)["steps"] == run("whole", None)["steps"] == 6
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ([{"function": "a.py:same"}, {"function": "b.py:same"}], "two are called 'same'"),
        ([{"function": "a.py:f", "weight": 0}], "every weight is 0"),
        ("mine.py", "name the function in it: mine.py:NAME"),
    ],
)
def test_rewards_that_say_nothing_or_cannot_be_told_apart_are_refused(reward, problem):
    with pytest.raises(ValueError, match=problem):
        make_settings("ppo", Path("model"), Path("rows.jsonl"), reward=reward)


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "online-dpo"])
def test_a_reward_without_any_number_ends_the_first_rollout(stage, tiny, rows, functions, tmp_path, caplog):
    settings = settings_of(stage, tiny, rows, functions, "nothing")
    with pytest.raises(
        EngineError, match=r"^reward 'nothing': no number for any of \d+ completions, so nothing can be learned; "
    ):
        train(stage, settings, tmp_path / "out")
    assert [line["step"] for line in written(tmp_path / "out", "log")] in ([], [1])
    assert "All reward functions" not in caplog.text


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "online-dpo"])
def test_a_constant_reward_is_said_so(stage, tiny, rows, functions, tmp_path):
    show = Shown()
    train(stage, settings_of(stage, tiny, rows, functions, "constant", trl={"max_steps": 2}), tmp_path / "out", show=show)
    count = 16 if stage == "online-dpo" else 8
    told = f"all {count} completions of the rollout at step 1 have the same reward (0.5): nothing can be learned"
    assert len([note for note in show.notes if note.startswith(told)]) == 1
    assert not [note for note in show.notes if note.startswith("reward 'constant'")]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "online-dpo"])
def test_two_processes_decide_alike(stage, tiny, rows, functions, tmp_path):
    out, show = tmp_path / "out", Shown()
    settings = settings_of(
        stage, tiny, rows, functions, "rising", "rising_then_falling", trl={"per_device_train_batch_size": 4}
    )
    manifest = launch(stage, settings, out, "continue", "2", show)
    assert (manifest["steps"], manifest["stopped"]["reason"], manifest["best"]["step"]) == (4, "gold", 2)
    assert same(weights(out / "best"), weights(out / "checkpoints" / "checkpoint-2"))
    assert [line["answers"] for line in written(out, "gold")] == [6] * 5
    assert written(out, "rollouts")[0]["completions"] == (16 if stage == "online-dpo" else 8)
    assert len([note for note in show.notes if note.startswith("stopped after")]) == 1
