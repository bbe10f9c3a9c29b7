"""PPO over several steps on a tiny model: resumed, in two processes, begun with a reward model, learning; and bad input."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from cai.errors import ConfigError, EngineError
from cai.models import folder_version
from cai.rewards.combining import combine
from cai.rewards.model import RewardModel
from cai.training.checkpoints import is_whole
from cai.training.launching import find_config
from tests import ppo_runs
from tests.ppo_runs import (
    FORMS,
    LENGTH,
    Script,
    disturb,
    logged,
    low,
    low_or_none,
    make,
    policy_weights,
    rollout,
    value_weights,
)
from tests.tiny_model import make_tiny_model, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


# ------------------------------------------------------------------------------------------------ checkpoints
def state_of(trainer: Any) -> dict[str, Any]:
    """All that the next steps depend on."""
    optimizers = [trainer.optimizer, trainer._value_optimizer]
    moments = [moment for one in optimizers for state in one.state_dict()["state"].values() for moment in state.values()]
    return {
        "policy": policy_weights(trainer),
        "value": value_weights(trainer),
        "moments": [one.clone() for one in moments],
        "kl": trainer.kl.coefficient,
        "step": trainer._step,
        "tokens": trainer.state.num_input_tokens_seen,
    }


@each_form
@pytest.mark.parametrize("kept", [3, 4])
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(tiny, tmp_path, form, kept):
    """Rollouts are trained on for four steps each: at step 3 one is under way."""

    def trainer(out: str, steps: int) -> Any:
        return make(
            tiny, tmp_path / out, form, max_steps=steps, num_iterations=2, steps_per_generation=2, target_kl=0.01,
            per_device_train_batch_size=4, kl_horizon=50, save_strategy="steps", save_steps=kept, value_learning_rate=1e-2,
        )  # fmt: skip

    whole = trainer("whole", 6)
    whole.train()
    trainer("part", kept).train()
    again = trainer("part", 6)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{kept}"))
    expected, found = state_of(whole), state_of(again)
    assert found["kl"] != whole.args.beta
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    told = [{name: one for name, one in line.items() if "time" not in name} for line in again.state.log_history[:-1]]
    plain = [{name: one for name, one in line.items() if "time" not in name} for line in whole.state.log_history[:-1]]
    assert told == plain
    assert found["step"] == 6


def test_a_level_that_no_score_had_set_is_set_after_a_resume(tiny, tmp_path):
    def late(completion_ids: Any, trainer_state: Any, **_: Any) -> list[float | None]:
        return [None if trainer_state.global_step < 2 else -3.0 for _ in completion_ids]

    def trainer() -> Any:
        told = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
        return make(tiny, tmp_path, "head", late, rollout_func=Script(), learning_rate=0.0, value_learning_rate=0.0, **told)

    whole, again = trainer(), trainer()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for one in (whole, again):
        assert logged(one, "value/mean")[-1] == pytest.approx(-3)


def test_a_checkpoint_counts_as_whole_only_when_the_value_function_is_in_it(tiny, tmp_path, monkeypatch):
    def fail(*given: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cai.training.ppo.saving.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        make(tiny, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not is_whole(tmp_path / "checkpoint-1")


def test_a_checkpoint_that_lacks_a_part(tiny, tmp_path):
    make(tiny, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    (folder / "rollout-0.pt").unlink()
    again = make(tiny, tmp_path, max_steps=2)
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 2, "a new rollout is written"
    for state in ("[]", '{"kl_coefficient": 0.05}'):
        (folder / "ppo_state.json").write_text(state)
        with pytest.raises(EngineError, match=r"ppo_state.json is not what this version writes; --fresh starts over$"):
            make(tiny, tmp_path, max_steps=2).train(resume_from_checkpoint=str(folder))
    (folder / "critic_optimizer.pt").unlink()
    with pytest.raises(
        EngineError, match=r"checkpoint-1 was not written whole \(critic_optimizer.pt is not there\): delete it"
    ):
        make(tiny, tmp_path, max_steps=2).train(resume_from_checkpoint=str(folder))


@each_form
def test_what_is_saved_is_the_policy_alone(tiny, tmp_path, form):
    trainer = make(tiny, tmp_path, form, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    ids = torch.arange(20).unsqueeze(0)
    for folder in (tmp_path / "final", tmp_path / "checkpoint-1"):
        assert not [path for path in folder.iterdir() if path.is_dir()]
        if form == "adapters":
            from peft import PeftModel

            saved = load_file(folder / "adapter_model.safetensors")
            assert len(saved) == len(policy_weights(trainer))
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
        else:
            loaded, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
            assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


# ------------------------------------------------------------------------------------------------ two processes
def test_two_processes_train_as_one_with_the_same_global_batch(tiny, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.mkdir()
    ppo_runs.train_some(tiny, one, 8)
    config, _ = find_config("2")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    command = [*launcher, "--main_process_port", "0", "-m", "tests.ppo_runs", str(tiny), str(two), "4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for form in FORMS:
        alone, together = (load_file(path / f"{form}.safetensors") for path in (one, two))
        assert alone.keys() == together.keys()
        for name, weight in alone.items():
            torch.testing.assert_close(
                together[name], weight, atol=5e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
        for name, weight in alone.items():
            if name.startswith("again."):
                torch.testing.assert_close(weight, alone[name.removeprefix("again.")], atol=0, rtol=0)
        begun = make(tiny, tmp_path / "run", form)
        for kind, weights in (("policy", policy_weights(begun)), ("value", value_weights(begun))):
            assert max(float((alone[f"{kind}.{name}"] - one).abs().max()) for name, one in weights.items()) > 1e-3
        assert float(alone["kl_coefficient"]) != begun.args.beta


# ------------------------------------------------------------------------------------------------ a reward model
def make_reward_model(tiny: Path, out: Path, outputs: int = 1, members: int = 0, more_tokens: int = 0) -> Path:
    """A reward model with random weights: one network, or members as adapters on the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if more_tokens:
        tokenizer.add_tokens([f"<more-{place}>" for place in range(more_tokens)])
    specs: list[dict[str, Any]] = []
    for place in range(members or 1):
        folder = out / (f"members/{place}" if members else ".")
        told = {"mean": [0.3 - place, -0.2][:outputs], "deviation": [0.7 + place, 1.9][:outputs]}
        specs.append({"folder": f"members/{place}" if members else ".", **told})
        if members:
            _adapters(tiny, outputs, place).save_pretrained(folder)
            specs[-1] |= {"base": str(tiny), "version": folder_version(tiny)}
        else:
            LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=outputs)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    objectives = {"helpful": 1.5, "harmless": -0.5} if outputs == 2 else {"reward": 1.0}
    (out / "reward.json").write_text(json.dumps({"members": specs, "objectives": objectives}))
    return out


def _adapters(tiny: Path, outputs: int, seed: int) -> Any:
    """Of another rank, scale and other layers than the policy's are in these tests."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=outputs)
    model = get_peft_model(base, LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name or "score" in name:
                one.normal_(std=0.3)
    return model


@pytest.mark.parametrize(("form", "members"), [("critic", 0), ("critic", 2), ("adapters", 2)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_critic_begins_with_a_reward_model(tiny, tmp_path, form, members, outputs):
    folder = make_reward_model(tiny, tmp_path / "reward", outputs, members, more_tokens=0 if members else 3)
    told = {"base_version": folder_version(tiny), "value_weight": -2.5}
    trainer = make(tiny, tmp_path, form, value_model=folder, rollout_func=Script(), **told)
    assert trainer.critic_note is None
    model, rows = RewardModel.load(folder, device="cpu", dtype="float32"), [[5, 9, 280, 1, 14], [7, 8]]
    found = model.compute([[row] * max(1, members) for row in rows])
    rewards = -2.5 * combine(model.spec, found, found[:, 0, 0] * 0, found[:, 0, 0] * 0).members[:, 0]
    with trainer.value.working(), torch.no_grad():
        for row, reward in zip(rows, rewards, strict=True):
            ids = torch.tensor([row])
            assert float(
                trainer.value.values(more := torch.cat([ids, ids[:, :1]], dim=1), torch.ones_like(more), 1)[0, 0]
            ) == pytest.approx(float(reward), abs=1e-4)
    fast, slow = ([id(one) for one in group["params"]] for group in trainer._value_optimizer.param_groups)
    assert fast == [id(trainer._trained[f"layer.{name}.weight"]) for name in ("states", "words")]
    assert {id(one) for name, one in trainer._trained.items() if name.startswith("layer.state.")} < set(slow)
    out = rollout(trainer)
    assert (out["old_per_token_logps"] - out["ref_per_token_logps"]).abs().max() < 1e-4, "the policy is as it was"
    assert trainer.model.training
    trainer.train()


def test_the_base_of_a_policy_that_is_named_is_known(tiny, tmp_path):
    folder = make_reward_model(tiny, tmp_path / "reward", members=1)
    told = {"peft_config": ppo_runs.lora(), "value_model": folder}
    arguments = ppo_runs.PPOConfig(str(tmp_path / "out"), **ppo_runs.FAST)
    trainer = ppo_runs.PPOTrainer(str(tiny), low, arguments, ppo_runs.prompts(), **told)
    assert trainer.critic_note is None


def test_a_critic_does_not_begin_with_a_reward_model_that_it_cannot(tiny, tmp_path, caplog):
    folder = make_reward_model(tiny, tmp_path / "reward")
    other = AutoTokenizer.from_pretrained(tiny).train_new_from_iterator(["some other words"] * 9, 290)
    other.save_pretrained(folder)
    told = "the critic begins with the policy's own weights, not with reward model '{}': {}"
    trainer = make(tiny, tmp_path, value_model=folder, rollout_func=Script(), center_values=False)
    assert trainer.critic_note == told.format(folder, "its tokenizer is not the policy's")
    assert (rollout(trainer)["values"] == 0).all()

    members = make_reward_model(tiny, tmp_path / "members", members=1)
    for version, reason in (
        ("another", "it is not adapters on the weights that the policy's adapters are on; train it on those, with lora: {m"),
        (None, "base_version, by which adapters on the policy's own weights are known, is not given"),
    ):
        told_of = {"value_model": members, "base_version": version, "center_values": False}
        trainer = make(tiny, tmp_path, "adapters", rollout_func=Script(), **told_of)
        assert trainer.critic_note.startswith(told.format(members, reason))
        assert trainer.critic_note in caplog.text
        assert (rollout(trainer)["values"] == 0).all()

    outputs = make_reward_model(tiny, tmp_path / "outputs", 2)
    (outputs / "reward.json").unlink()
    trainer = make(tiny, tmp_path, value_model=outputs)
    assert trainer.critic_note == told.format(outputs, "it has no layer `score` with 1 output")

    (outputs / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=f"^reward model '{outputs}', which the critic begins with, could not be loaded: "):
        make(tiny, tmp_path, value_model=outputs)


# ------------------------------------------------------------------------------------------------ learning
def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@each_form
def test_the_policy_learns_and_the_values_explain_returns(tiny, tmp_path, form):

    def first(prompts: list[str], **_: Any) -> list[float]:
        return [float("a" in prompt) for prompt in prompts]

    trainer = make(
        tiny, tmp_path, form, [low, first], Dataset.from_dict({"prompt": ["aaaa", "zzzz"] * 64}), max_steps=128,
        num_iterations=4, per_device_train_batch_size=32, beta=0.005, learning_rate=2e-2 if form == "adapters" else 5e-3,
        value_learning_rate=3e-2, seed=1,
    )  # fmt: skip
    trainer.train()
    rewards, explained = logged(trainer, "rewards/low/mean"), logged(trainer, "value/explained_variance")
    assert mean(rewards[-4:]) > mean(rewards[:4]) + 0.06  # of four seeds each had 0.13 or more
    assert explained[0] < 0.05 < 0.3 < mean(explained[-4:])


@pytest.mark.parametrize("form", ["adapters", "head"])
def test_a_pass_on_a_cpu_says_what_trls_says(tiny, tmp_path, monkeypatch, form):
    trainer = make(tiny, tmp_path, form, rollout_func=Script(), temperature=0.8)
    trainer.model.get_output_embeddings().requires_grad_(False)
    disturb(trainer)
    out = rollout(trainer)
    ids, mask = (torch.cat([out[f"prompt_{name}"], out[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    assert (mask[:, 0] == 0).any()
    assert (mask[:, -1] == 0).any()
    length, counts, found = out["completion_ids"].size(1), out["completion_mask"].bool(), []
    for plain in (True, False):
        monkeypatch.setattr("cai.training.ppo.passes.is_plain", lambda base, plain=plain: plain)
        trainer._watched = []
        told = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, 3, compute_entropy=True)
        found.append([one[counts].detach() for one in (*told[:2], *trainer._watched)])
    assert len(found[0]) == (3 if form == "head" else 2)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@each_form
def test_passes_without_gradients_have_more_rows_than_a_step(tiny, tmp_path, monkeypatch, form):
    from cai.training.ppo import features

    trainer = make(tiny, tmp_path, form, rollout_func=Script())
    trainer.model.get_output_embeddings().requires_grad_(False)
    disturb(trainer)
    out = rollout(trainer)
    del out["old_per_token_logps"]
    once, mask = trainer._passed(out), out["completion_mask"].bool()
    length, seen = out["prompt_ids"].size(1) + mask.size(1), list[int]()

    def note(trunk: Any, ids: Any, *more: Any) -> Any:
        seen.append(len(ids))
        return features.completion_features(trunk, ids, *more)

    for place in ("passes", "critic"):
        monkeypatch.setattr(f"cai.training.ppo.{place}.completion_features", note)
    monkeypatch.setattr(features, "_AT_ONCE", 3 * length + 1)
    trainer.args.per_device_train_batch_size = 1
    parts = trainer._passed(out)
    assert seen == [3, 3, 2] * (1 if form == "head" else 2)
    torch.testing.assert_close(parts.logps[mask], once.logps[mask], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(parts.values[mask], once.values[mask], atol=1e-5, rtol=1e-4)


def drawn(tiny: Path, out: Path, form: str, monkeypatch: Any, **told: Any) -> tuple[Any, dict[str, Any], list[Any]]:
    """A trainer that is not where it began, its first rollout, and the models that read it."""
    arguments = {"num_iterations": 2, "temperature": 0.8, "max_completion_length": 40, "per_device_train_batch_size": 16}
    more = told.pop("of_model", {})
    trainer, reading = make(tiny, out, form, **(arguments | told)), list[Any]()
    disturb(trainer)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.get_output_embeddings().weight.data[trainer.eos_token_ids] *= 1.6  # so that some end early
    policy.generation_config.update(**more)
    ask = trainer._has_drawn

    def note(model: Any, *given: Any) -> bool:
        found = ask(model, *given)
        reading.extend([] if found else [model])
        return found

    monkeypatch.setattr(trainer, "_has_drawn", note)
    return trainer, rollout(trainer), reading


@each_form
def test_what_the_policy_says_as_it_draws_is_what_it_says_as_it_reads(tiny, tmp_path, monkeypatch, form):
    trainer, out, reading = drawn(tiny, tmp_path, form, monkeypatch)
    mask = out["completion_mask"].bool()
    assert (out["prompt_mask"][:, 0] == 0).any()
    assert 0 < (mask[:, -1] == 0).sum() < len(mask), "some end early"
    assert len(reading) == 1, "the reference"
    logps, values = out.pop("old_per_token_logps"), out["values"]
    assert trainer._drawn is None
    read = trainer._passed(out)
    assert len(reading) == 2
    torch.testing.assert_close(logps[mask], read.logps[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values[mask], read.values[mask], atol=1e-4, rtol=1e-4)
    assert (logps[~mask] == 0).all()
    assert (out["ref_per_token_logps"] - logps)[mask].abs().mean() > 0.01


BENT: list[dict[str, Any]] = [
    {"top_k": 5},
    {"repetition_penalty": 1.5},
    {"generation_kwargs": {"temperature": 0.5}},
    {"generation_kwargs": {"min_new_tokens": 10}},
    {"generation_kwargs": {"no_repeat_ngram_size": 1}},
    {"generation_kwargs": {"suppress_tokens": list(range(40, 90))}},
    {"of_model": {"suppress_tokens": list(range(40, 90))}},
    {"rollout_func": Script()},
    {"bf16": True},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("told", BENT, ids=lambda told: next(iter(told)))
def test_the_policy_reads_what_it_did_not_draw_by_its_own_probabilities(tiny, tmp_path, monkeypatch, told):
    _, out, reading = drawn(tiny, tmp_path, "head", monkeypatch, **told)
    assert len(reading) == 2
    assert out["values"].shape == out["old_per_token_logps"].shape == out["completion_ids"].shape


@each_form
@pytest.mark.parametrize(
    ("told", "rows"),
    [
        ({"cache_implementation": "static"}, 1),
        ({"cache_implementation": "static", "dtype": torch.bfloat16}, 1),
        ({"bf16": True}, 8),
        ({}, 8),
    ],
    ids=["static", "static-bfloat16", "autocast", "growing"],
)
def test_what_prompts_begin_with_is_written_from_once_where_there_is_a_cache_for_it(
    tiny, tmp_path, monkeypatch, form, told, rows
):
    monkeypatch.setattr("cai.training.ppo.sharing._WORTH", 1)
    data = Dataset.from_dict({"prompt": [f"Which of these is {'really ' * (place % 3)}{place}?" for place in range(16)]})
    trainer, passes = make(tiny, tmp_path, form, data=data, **told), []
    trunk = trainer._base_of(trainer.model).base_model
    trunk.register_forward_pre_hook(lambda _, __, named: passes.append(tuple(named["input_ids"].shape)), with_kwargs=True)
    out = rollout(trainer)
    assert (out["prompt_mask"][:, 0] == 0).any()
    assert passes[0][0] == rows
    assert passes[1][0] == 8
    assert out["prompt_ids"].size(1) == passes[0][1] + (passes[1][1] if rows == 1 else 0)
    if told == {"cache_implementation": "static"}:
        mask, logps = out["completion_mask"].bool(), out.pop("old_per_token_logps")
        torch.testing.assert_close(logps[mask], trainer._passed(out).logps[mask], atol=1e-4, rtol=1e-4)


def test_all_adapters_are_quick_on_a_cpu(tiny, tmp_path):
    from peft.tuners.lora import LoraLayer

    from cai.training.adapters import QuickLora

    trainer = make(tiny, tmp_path, "adapters")
    layers = [one for one in trainer.model.modules() if isinstance(one, LoraLayer)]
    assert {type(one) for one in layers} == {QuickLora}
    assert len(layers) == 2 * 7
    trainer.train()
    assert all(math.isfinite(one) for name in ("loss", "value/loss", "grad_norm") for one in logged(trainer, name))


def test_the_policy_reads_with_what_is_dropped_at_random(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("cai.training.ppo.passes.drops", lambda trunk: True)
    assert len(drawn(tiny, tmp_path, "critic", monkeypatch)[2]) == 2


def test_nothing_is_kept_of_what_is_drawn_outside_of_a_rollout(tiny, tmp_path, monkeypatch):
    from cai.training.ppo.drawing import Draw

    trainer, _, _ = drawn(tiny, tmp_path, "head", monkeypatch)
    kept, keeping = [], Draw.keeping
    monkeypatch.setattr(Draw, "keeping", lambda *given: kept.append(given) or keeping(*given))
    for prompt in ("a", "b"):
        trainer._generate([prompt])
    assert trainer._drawn is None
    assert kept == []
    rollout(trainer)
    assert len(kept) == 1


def test_a_completion_without_an_end_is_fined(tiny, tmp_path):
    told = {"rollout_func": Script(), "whiten_advantages": False, "beta": 0.0, "lam": 1.0}
    plain, fined = (rollout(make(tiny, tmp_path, reward=low_or_none, missing_eos_penalty=one, **told)) for one in (None, 0.7))
    end = AutoTokenizer.from_pretrained(tiny).eos_token_id
    seen = set()
    for place, mask in enumerate(plain["completion_mask"] > 0):
        ids = plain["completion_ids"][place][mask].tolist()
        fine = 0.7 if len(ids) % 2 and ids[-1] != end else 0.0
        seen.add((len(ids) % 2, fine))
        paid = plain["returns"][place][mask] - fine
        torch.testing.assert_close(fined["returns"][place][mask], paid)
    assert len(seen) == 3


def test_rows_without_a_reward_train_nothing(tiny, tmp_path):
    def none(completion_ids: Any, **_: Any) -> list[None]:
        return [None] * len(completion_ids)

    begun, trainer = (make(tiny, tmp_path, reward=none, rollout_func=Script(), target_kl=1.0) for _ in range(2))
    trainer.train()
    assert all(torch.equal(one, policy_weights(begun)[name]) for name, one in policy_weights(trainer).items())
    assert all(torch.equal(one, value_weights(begun)[name]) for name, one in value_weights(trainer).items())
    assert trainer.kl.coefficient == trainer.args.beta
    assert logged(trainer, "objective/score") == []

    out = rollout(make(tiny, tmp_path, reward=low_or_none, rollout_func=Script()))
    scored = out["completion_mask"].sum(dim=1) % 2 == 1
    assert 0 < scored.sum() < len(scored)
    assert (out["advantages"][~scored] == 0).all()
    assert (out["returns"][~scored] == 0).all()
    assert int(out["num_items_in_batch"]) == int(out["completion_mask"][scored].sum()), "a token with a reward weighs as ever"


def test_the_kl_is_that_of_all_completions(tiny, tmp_path):
    def kl(reward: Any) -> float:
        trainer = make(tiny, tmp_path, reward=reward, rollout_func=Script())
        disturb(trainer)
        rollout(trainer)
        [found] = trainer._metrics["train"]["objective/kl"]
        return found

    def none(completion_ids: Any, **_: Any) -> list[None]:
        return [None] * len(completion_ids)

    assert abs(kl(low)) > 1e-3
    assert kl(low) == kl(low_or_none) == kl(none)


def test_the_reward_less_the_kl_is_that_of_completions_with_a_reward(tiny, tmp_path):
    trainer = make(tiny, tmp_path, reward=low_or_none, rollout_func=Script(), lam=1.0)
    disturb(trainer)
    out = rollout(trainer)
    scored = out["completion_mask"].sum(dim=1) % 2 == 1
    [found] = trainer._metrics["train"]["objective/rlhf_reward"]
    assert found == pytest.approx(float(out["returns"][scored, 0].mean()), abs=1e-5)
    assert abs(found - trainer._metrics["train"]["objective/score"][0]) > 1e-4


def test_the_table_of_completions_has_advantages_of_ppo(tiny, tmp_path):
    for group in (1, 2):
        trainer = make(tiny, tmp_path, rollout_func=Script(), num_generations=group)
        for _ in range(2):
            out = rollout(trainer)
        mask = out["value_mask"]
        means = (out["advantages"] * mask).sum(dim=1) / mask.sum(dim=1)
        assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist())
        assert len(trainer._logs["completion"]) == len(means)


def test_the_trainer_has_arguments_without_being_given_any(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cai.training.ppo.trainer.PPOConfig", partial(ppo_runs.PPOConfig, **ppo_runs.FAST))
    trainer = ppo_runs.PPOTrainer(str(tiny), low, train_dataset=ppo_runs.prompts())
    assert Path(trainer.args.output_dir).name == f"{tiny.name}-PPO"


def test_rewards_are_the_weighted_sum_of_those_that_say_something(tiny, tmp_path):
    told = {"rollout_func": Script(), "whiten_advantages": False, "beta": 0.0, "lam": 1.0}
    out = rollout(make(tiny, tmp_path, reward=[low, low_or_none], reward_weights=[1.0, -3.0], **told))
    for place, mask in enumerate(out["completion_mask"] > 0):
        ids = out["completion_ids"][place][mask].tolist()
        share = low([ids])[0]
        assert float(out["returns"][place, 0]) == pytest.approx(share * (-2.0 if len(ids) % 2 else 1.0), abs=1e-5)


def test_several_completions_of_a_prompt(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=2, num_generations=4)
    out = rollout(trainer)
    assert len({tuple(row) for row in out["prompt_ids"].tolist()}) == 2
    assert len({tuple(row) for row in out["completion_ids"].tolist()}) == 8
    trainer.train()
    assert len(logged(trainer, "reward")) == 2


@pytest.mark.parametrize(("batch", "steps"), [(1, 3), (3, 1), (5, 1)])
def test_rollouts_of_any_size(tiny, tmp_path, batch, steps):
    trainer = make(tiny, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    assert trainer.num_generations == trainer.num_generations_eval == 1
    trainer.train()
    assert len(logged(trainer, "reward")) == 1


@each_form
def test_evaluation_tells_and_steers_nothing(tiny, tmp_path, form):
    trainer = make(
        tiny, tmp_path, form, eval_dataset=ppo_runs.prompts(6), per_device_eval_batch_size=3, target_kl=1e-3, kl_horizon=50,
        eval_strategy="steps", eval_steps=1, rollout_func=Script(),
    )  # fmt: skip
    weights = value_weights(trainer)
    told = trainer.evaluate()
    assert trainer.kl.coefficient == trainer.args.beta
    assert all(torch.equal(one, weights[name]) for name, one in value_weights(trainer).items())
    assert all(one.grad is None for one in trainer._trained.values())
    for name in ("reward", "objective/kl", "value/explained_variance", "value/loss"):
        assert math.isfinite(told[f"eval_{name}"])
    trainer.train()
    assert logged(trainer, "eval_objective/kl_coef") == [trainer.kl.coefficient]


@each_form
def test_what_begins_at_0_learns_at_a_rate_of_its_own(tiny, tmp_path, form):
    more = {} if form == "head" else {"critic_learning_rate": 7e-4}
    trainer = make(tiny, tmp_path, form, learning_rate=1e-3, value_learning_rate=3e-2, **more)
    rates = {id(one): group["lr"] for group in trainer._value_optimizer.param_groups for one in group["params"]}
    found = {name: rates.pop(id(one)) for name, one in trainer._trained.items()}
    assert not rates
    layer = {name for name in found if name.startswith("layer.")}
    assert layer == {"layer.state.weight", "layer.state.bias", "layer.states.weight", "layer.words.weight"}
    assert found == {name: 3e-2 if name in layer else 7e-4 for name in found}
    assert (found.keys() == layer) == (form == "head")


@pytest.mark.parametrize("form", ["critic", "adapters"])
def test_a_critic_learns_as_fast_as_the_policy_where_nothing_is_said(tiny, tmp_path, form):
    trainer = make(tiny, tmp_path, form, learning_rate=2e-4)
    assert [group["lr"] for group in trainer._value_optimizer.param_groups] == [2e-3, 2e-4]


@each_form
@pytest.mark.parametrize("told", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "weights"])
def test_bfloat16(tiny, tmp_path, form, told):
    trainer = make(tiny, tmp_path, form, max_steps=2, gradient_checkpointing=True, **told)
    trainer.train()
    assert all(math.isfinite(one) for name in ("loss", "value/loss", "grad_norm") for one in logged(trainer, name))
    assert {one.dtype for one in trainer.value.layer.parameters()} == {torch.float32}


def test_without_a_kl_there_is_no_reference(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=1, beta=0.0)
    trainer.train()
    assert trainer.ref_model is None
    assert all("kl" not in name for line in trainer.state.log_history for name in line), "what is not known is not told"
    assert logged(trainer, "objective/score")


def test_a_gradient_that_is_no_number_is_told(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=2)
    with torch.no_grad():
        trainer.value.layer.state.bias.fill_(math.inf)
    with pytest.raises(
        EngineError, match=r"^a gradient of the value function is not a finite number at step 1; lower trl\..*about 1"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"value_function": "none"}, "value_function: expected critic or head, found 'none'"),
        (
            {"value_function": "head", "critic_learning_rate": 1e-5},
            "critic_learning_rate: with value_function: head there is no",
        ),
        ({"kl_estimator": "k2"}, "kl_estimator: expected k1 or k3, found 'k2'"),
        ({"lam": 1.5}, "lam: expected a number from 0 to 1, found 1.5"),
        ({"target_kl": 1.0, "beta": 0.0}, "target_kl: needs to be above 0, and so does beta"),
        ({"target_kl": 1.0, "kl_horizon": 7}, "kl_horizon: expected at least the 8 completions of a rollout, found 7"),
        ({"scale_rewards": True}, "scale_rewards: expected none, found 'group': PPO scales no rewards"),
        ({"missing_eos_penalty": 1.0, "mask_truncated_completions": True}, "missing_eos_penalty: with mask_truncated_compl"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation: expected sum_then_normalize, "),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: expected token, found 'sequence': the adv"),
        ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold: expected null, found 1.0: it masks completions"),
        ({"use_bias_correction_kl": False}, "use_bias_correction_kl: expected true, found False: the KL of PPO"),
        ({"loss_type": "sapo"}, "loss_type: expected dapo or bnpo or grpo or dr_grpo, found 'sapo': these have the clipped"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: a rollout of one completion is too few"),
        ({"sync_ref_model": True}, "sync_ref_model: the KL of PPO is to a fixed reference; remove it"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, keys, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ppo_runs.PPOConfig(str(tmp_path), **(ppo_runs.FAST | keys))


@pytest.mark.parametrize(("form", "sharded"), [("adapters", "is_fsdp_enabled"), ("head", "is_deepspeed_enabled")])
def test_a_value_function_on_weights_that_are_spread_over_processes(tiny, tmp_path, form, sharded):
    trainer = make(tiny, tmp_path, form)
    setattr(trainer, sharded, True)
    with pytest.raises(ConfigError, match=r"^value_function: one that shares the policy's weights cannot be trained while"):
        trainer._check_value_function()


@each_form
def test_a_value_function_is_where_the_policy_will_be(tiny, tmp_path, form):
    """Weights that are to be spread are put there later than the trainer is made."""
    from cai.training.ppo.critic import CRITIC
    from cai.training.ppo.starting import build_value

    trainer = make(tiny, tmp_path, form)
    policy, there = trainer.model, torch.device("meta")
    if form == "adapters":
        policy.delete_adapter(CRITIC)
    value, _ = build_value(policy, trainer.args, trainer.processing_class, None, there)
    assert {one.device for one in value.layer.parameters()} == {there}
    if form == "critic":
        assert {one.device for one in value.weights().values()} == {there}


def test_a_model_that_sees_is_refused(tmp_path):
    tiny = make_tiny_model(tmp_path / "tiny")
    told = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(told | {"vision_config": {}}))
    with pytest.raises(ConfigError, match=r"^PPO: the model is one that sees images"):
        make(tiny, tmp_path)


def test_completions_are_as_long_as_is_told(tiny, tmp_path):
    assert rollout(make(tiny, tmp_path))["completion_ids"].shape[1] <= LENGTH
