"""Stages from settings to a saved model, on what `cai generate` wrote: columns, checkpoints, folders, cards."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai import generate
from cai.training import ONLINE, STAGES
from cai.training.data import VIEWS
from cai.training.running import train
from tests import runs
from tests.stages import FAST, Shown, dialogue, log, losses, make_settings, pair, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
COLUMNS = {
    "sft": {"prompt", "completion", "input_ids", "labels"},
    "dpo": {"prompt", "chosen", "rejected", "chosen_probability", "prompt_ids", "chosen_ids", "rejected_ids"},
    "kto": {"prompt", "completion", "label", "completion_ids"},
    "orpo": {"prompt", "chosen", "rejected"},
    "cpo": {"prompt", "chosen", "rejected"},
    "reward": {"chosen_probability", "chosen_ids", "rejected_ids"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    generation = {"candidates": 3, "pairs": "both"}
    generate(runs.recipe(prompts={"limit": 12}, generation=generation, dataset={"test_fraction": 0.2}), out)
    return out


@pytest.fixture
def seen(monkeypatch) -> list[Any]:
    """The trainers that are built."""
    from cai.training import members, running

    found: list[Any] = []
    build = running.build_trainer

    def noting(*given: Any) -> Any:
        found.append(build(*given))
        return found[-1]

    for module in (running, members):
        monkeypatch.setattr(module, "build_trainer", noting)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ONLINE])
def test_two_steps_of_every_stage_on_what_a_run_wrote(run, tiny, tmp_path, seen, stage):
    out, show = tmp_path / "out", Shown()
    manifest = train(stage, make_settings(stage, tiny, run), out, show=show)
    (trainer,) = seen
    assert set(trainer.train_dataset.column_names) >= COLUMNS[stage]
    assert (manifest["status"], manifest["steps"], len(losses(out))) == ("done", 2, 2)
    told, written = manifest["data"][0], runs.manifest(run)["dataset"]["rows"][VIEWS[stage]]
    assert told["train"] == len(trainer.train_dataset) > 0
    assert told["train"] + told["test"] + told.get("left_out", 0) == sum(written.values())
    assert ("accuracy" if stage == "reward" else "eval_loss") in manifest["measures"]
    assert show.notes[:2] == ["reading the data", "preparing the rows"]
    assert show.steps[0][0] == 0
    assert show.steps[-1] == (2, 2)
    assert not (out / "run" / "rows").exists()
    assert not list(out.rglob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    if stage != "reward":
        assert largest_difference(out, tiny) > 0
        assert AutoModelForCausalLM.from_pretrained(out).config.use_cache


def test_sft_learns_the_completion_alone(tiny, tmp_path, seen):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n, "Yes.") for n in range(4)])
    train("sft", make_settings("sft", tiny, rows), tmp_path / "out")
    (trainer,) = seen
    (batch, _) = trainer.get_train_dataloader()
    learned = [[int(t) for t in row if t != -100] for row in batch["labels"]]
    assert {trainer.processing_class.decode(row) for row in learned} == {"Yes.<|im_end|>\n"}


def test_a_card_names_data_constitution_and_recipe_and_no_folder_of_the_machine(run, tiny, tmp_path):
    out = tmp_path / "model"
    people = write_rows(tmp_path / "people.jsonl", [pair(0), {"chosen": "x"}, pair(1)])
    train("dpo", make_settings("dpo", tiny, run, people, lora={"rank": 2}), out)
    card = (out / "README.md").read_text()
    constitution = runs.manifest(run)["constitution"]
    assert f"| small | {constitution['hash']} |" in card
    assert "| people.jsonl | 2 | 0 |" in card
    assert "Of people.jsonl, 1 rows could not be used." in card
    assert str(tmp_path) not in card
    assert str(tiny.parent) not in card
    head = yaml.safe_load(card.split("---")[1])
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    told = yaml.safe_load(card.split("```yaml")[1].split("```")[0])["dpo"]
    assert told["lora"] == {"rank": 2}
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())["dpo"]
    assert recipe["data"][0]["source"] == str(run)


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_merged_or_beside_their_model_answer_alike(run, tiny, tmp_path, seen, merge):
    out = tmp_path / "out"
    lora = {"rank": 4, "merge": merge}
    train("dpo", make_settings("dpo", tiny, run, lora=lora, trl={"learning_rate": 0.01}), out)
    (trainer,) = seen
    assert (out / "adapter_model.safetensors").exists() != merge
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        base, trained = AutoModelForCausalLM.from_pretrained(tiny)(ids).logits, trainer.model(ids).logits
        assert torch.allclose(loaded(ids).logits, trained, atol=1e-4)
        assert not torch.allclose(base, trained, atol=1e-2)
    recipe = runs.recipe(policy={"model": str(out)}, prompts={"limit": 2}, generation={"rounds": 1, "max_tokens": 4})
    judge = {"model": runs.recipe().policy.model}
    made = generate(recipe.model_copy(update={"judge": recipe.judge.model_copy(update=judge)}), tmp_path / "again")
    assert made["dataset"]["records"] == 2


def test_a_killed_training_goes_on_to_the_same_weights(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [pair(n, 0.5 + n / 40) for n in range(16)])
    trl = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    settings = make_settings("dpo", tiny, rows, lora={"rank": 4, "dropout": 0.1}, trl=trl)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train("dpo", settings, whole)
    code = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from cai.training import watching, running, SETTINGS\n"
        "def die(self, args, state, control, **given):\n"
        "    if state.global_step == 2: os.kill(os.getpid(), 9)\n"
        "watching.Watch.on_save = die\n"
        "from pathlib import Path\n"
        "running.train('dpo', SETTINGS['dpo'].model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    process = runs.start(settings.model_dump_json(), killed, code=code)
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, said
    assert sorted(path.name for path in (killed / "checkpoints").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert not (killed / "manifest.json").exists()

    (killed / "checkpoints" / "checkpoint-9").mkdir()  # one that was not written to its end
    show = Shown()
    manifest = train("dpo", settings, killed, show=show)
    assert "training goes on from checkpoint-2" in show.notes
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-7)
    assert manifest["measures"]["loss"] == pytest.approx(losses(whole)[-1], abs=1e-7)
    assert largest_difference(whole, killed) < 1e-7
    assert len(list((whole / "checkpoints").iterdir())) == 2


def test_a_finished_training_is_not_done_again(tiny, tmp_path):
    settings = make_settings("sft", tiny, write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(4)]))
    first = train("sft", settings, tmp_path / "out")
    changed = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train("sft", settings, tmp_path / "out") == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == changed
    train("sft", settings, tmp_path / "out", "fresh")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns != changed


def test_rows_of_no_use_are_named_in_the_folder_while_the_source_has_them(tiny, tmp_path):
    rows, out = [dialogue(n) for n in range(4)], tmp_path / "out"
    bad = make_settings("sft", tiny, write_rows(tmp_path / "rows.jsonl", [*rows[:1], {"text": 1}, *rows[1:], []]))
    train("sft", bad, out)
    named = [json.loads(line) for line in (out / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [one["origin"] for one in named] == ["rows.jsonl:2", "rows.jsonl:6"]
    assert all(one["reason"] for one in named)
    (out / "manifest.json").unlink()  # as where it was stopped
    write_rows(tmp_path / "rows.jsonl", rows)
    train("sft", bad, out)
    assert not (out / "run" / "quarantine.jsonl").exists()


def test_packing_checkpointing_of_gradients_and_bf16_pass_through(tiny, tmp_path, seen):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(16)])
    trl = {"packing": True, "max_length": 256, "gradient_checkpointing": True, "bf16": True}
    settings = make_settings("sft", tiny, rows, trl=trl, dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train("sft", settings, tmp_path / "out")
    (trainer,) = seen
    assert (trainer.args.packing, trainer.args.gradient_checkpointing, trainer.args.bf16) == (True, True, True)
    assert len(trainer.train_dataset) < 16
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_every_measure_is_logged_as_json_and_checkpoints_are_not_written_every_few_seconds(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(8)])
    usual = {key: value for key, value in FAST.items() if key not in ("save_strategy", "logging_steps")}
    settings = make_settings("sft", tiny, rows).model_copy(update={"trl": {**usual, "max_steps": 3}})
    train("sft", settings, tmp_path / "out")
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line] == [1, 2, 3]
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_trackers_get_what_is_logged(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(4)])
    monkeypatch.setitem(os.environ, "TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train("sft", make_settings("sft", tiny, rows, trl={"report_to": "tensorboard"}), tmp_path / "out")
    assert list((tmp_path / "board").rglob("events*"))


def test_the_manifest_is_the_one_that_is_given_back(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(4)])
    given = train("sft", make_settings("sft", tiny, rows), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == given


@pytest.mark.parametrize(("stage", "lora"), [("sft", None), ("dpo", {"rank": 2, "merge": False}), ("reward", {"rank": 2})])
def test_what_it_was_trained_by_is_told_whoever_chose_it(tiny, tmp_path, seen, stage, lora):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) if stage == "sft" else pair(n) for n in range(6)])
    trl = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    given = make_settings(stage, tiny, rows, lora=lora, trl={**FAST, **trl, "warmup_steps": 0.1})
    given = given.model_copy(update={"trl": {key: value for key, value in given.trl.items() if key != "learning_rate"}})
    told = train(stage, given, tmp_path / "out")["training"]
    (used,) = (one.args for one in seen)
    usual = type(used).__dataclass_fields__["learning_rate"].default
    assert told["learning_rate"] == used.learning_rate == pytest.approx(usual * (10 if lora else 1))
    assert (told["rows_per_step"], told["rows_per_device"], told["accumulation"], told["processes"]) == (3, 1, 3, 1)
    assert (told["epochs"], told["max_steps"], told["schedule"]) == (2, None, used.lr_scheduler_type.value)
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"Learning rate {used.learning_rate:.4g} (" in card
    assert "warm-up 0.1 of all steps); 3 rows a step (1 per device, 3 accumulated, 1 process); 4 steps, 2 epochs." in card
