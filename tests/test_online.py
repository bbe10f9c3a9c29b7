"""Stages that train on completions which the policy writes: on every kind of prompts, by every kind of reward."""

from __future__ import annotations

import asyncio
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from cai import generate
from cai.training import ONLINE, SETTINGS, StageName, TrainSettings
from cai.training.data import load_data
from cai.training.launching import launch
from cai.training.online.rewards import Reward, find_function
from cai.training.running import identity, train
from tests import runs
from tests.stages import Shown, log, make_settings, pair, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__)
FEW = {"per_device_train_batch_size": 4, "max_completion_length": 6}
LENGTH: dict[StageName, dict[str, int]] = {
    "ppo": {},
    "rloo": {"num_generations": 2},
    "grpo": {"num_generations": 2},
    "online-dpo": {},
}
CHECKED = """\
name: checked
description: One check and one question.
license: Apache-2.0
principles:
  - {id: at-most-two-words, check: {max_words: 2}}
  - {id: polite, preference: "Which completion is more polite?"}
"""


def brief(completions: Any, **columns: Any) -> list[float]:
    """A reward: less for each character."""
    return [-float(len(one[-1]["content"])) for one in completions]


def counted(completions: Any, **columns: Any) -> list[float]:
    """A measure: how many words."""
    return [float(len(one[-1]["content"].split())) for one in completions]


def by_topic(prompts: Any, completions: Any, topic: Any, log_metric: Any, **columns: Any) -> list[float | None]:
    """A reward that hangs on another column of the prompts' rows."""
    assert all(one in ("river", "lamp") for one in topic)
    assert all(place[-1]["content"].endswith(f"{one}?") for place, one in zip(prompts, topic, strict=True))
    return [1.0 if one == "river" else None for one in topic]


def ten_choices(request: Any) -> list[float]:
    """A judge's answer: the longer the completion, the higher its rating."""
    length = len(request.messages[0].content)
    return [-abs(number - length % 10) for number, _ in enumerate(request.choices)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), context=512)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    generate(runs.recipe(prompts={"limit": 12}, generation={"candidates": 2}, dataset={"test_fraction": 0.2}), out)
    return out


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, run, tiny) -> Path:
    """Two members that share a base."""
    out = tmp_path_factory.mktemp("reward") / "model"
    lora = {"rank": 2}
    train("reward", make_settings("reward", tiny, run, members=2, lora=lora, trl={"eval_strategy": "no"}), out)
    return out


def settings(stage: StageName, model: Path, *data: Any, trl: dict[str, Any] | None = None, **keys: Any) -> TrainSettings:
    lengths = {"max_new_tokens": 6} if stage == "online-dpo" else {"max_completion_length": 6}
    few = {"per_device_train_batch_size": 4, **lengths, **LENGTH[stage]}
    return make_settings(stage, model, *data, **{"reward": f"{HERE}:brief", **keys}, trl=few | (trl or {}))


def changed(out: Path, tiny: Path) -> float:
    first, second = load_file(tiny / "model.safetensors"), load_file(out / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def logged(out: Path, name: str) -> list[float]:
    return [line[name] for line in log(out) if name in line]


@pytest.mark.parametrize("kind", ["run", "pairs", "prompts"])
@pytest.mark.parametrize("stage", ONLINE)
def test_two_steps_of_every_stage_on_every_kind_of_prompts(run, tiny, tmp_path, stage, kind):
    prompts = [{"prompt": f"What is {number}?"} for number in range(6)]
    rows = {"pairs": [pair(number) for number in range(6)], "prompts": prompts}
    source = run if kind == "run" else write_rows(tmp_path / "rows.jsonl", rows[kind])
    lora = {"rank": 2} if kind == "pairs" else None
    manifest = train(stage, settings(stage, tiny, source, lora=lora), tmp_path / "out")
    assert (manifest["status"], manifest["steps"], manifest["stage"]) == ("done", 2, stage)
    held_out = manifest["data"][0]["test"]
    assert held_out > 0 if kind == "run" else held_out == 0
    reward = manifest["measures"]["objective/scores" if stage == "online-dpo" else "reward"]
    assert reward == logged(tmp_path / "out", "objective/scores" if stage == "online-dpo" else "reward")[-1]
    assert changed(tmp_path / "out", tiny) > 0
    assert not list((tmp_path / "out").rglob("critic*"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_other_columns_of_a_prompts_row_reach_a_function(tiny, tmp_path):
    rows = [{"prompt": f"Where is the {topic}?", "topic": topic} for topic in ("river", "lamp") * 3]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    manifest = train("grpo", settings("grpo", tiny, file, reward=f"{HERE}:by_topic"), tmp_path / "out")
    assert manifest["measures"]["reward"] in (0.5, 1.0, 0.0)
    assert set(logged(tmp_path / "out", "rewards/by_topic/mean")) == {1.0}, "what is None is no reward of 0"


def test_a_column_that_trl_names_too_does_not_take_its_place(tiny):
    seen: dict[str, Any] = {}

    def score(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0]

    own = json.dumps({"completions": "mine", "log_metric": "mine", "prompts": "mine", "topic": "mine"})
    logged = dict[str, float]()
    turns = [[{"role": "assistant", "content": "a"}]]
    Reward("r", score)([[]], turns, columns=[own], log_metric=logged.__setitem__)
    seen.pop("log_metric")("mine", 2)
    assert logged == {"rewards/r/none": 0.0, "mine": 2.0}
    seen.pop("log_extra")(column="nowhere", values=[1])
    assert seen == {"prompts": [[]], "completions": turns, "topic": ["mine"]}


def test_online_dpo_logs_how_far_members_of_a_reward_model_disagree(run, tiny, reward_model, tmp_path):
    train("online-dpo", settings("online-dpo", tiny, run, reward=str(reward_model)), tmp_path)
    assert logged(tmp_path, "reward_disagreement")[-1] > 0
    assert logged(tmp_path, "rewards/model/none")[-1] == 0


def test_a_step_of_online_dpo_takes_the_mean_over_its_batches(run, tiny, tmp_path):
    def norms(name: str, steps: int, **trl: Any) -> list[float]:
        still = {"learning_rate": 0.0, "max_steps": steps, "temperature": 3.0, **trl}
        train("online-dpo", settings("online-dpo", tiny, run, trl=still), tmp_path / name)
        return logged(tmp_path / name, "grad_norm")

    apart, [together] = norms("apart", 2), norms("together", 1, gradient_accumulation_steps=2)
    assert 0 < together <= sum(apart) / 2


def test_online_dpo_learns_of_a_pair_whose_rewards_differ_after_fines():
    from cai.training.online.dpo import OnlineDpo

    trainer = OnlineDpo.__new__(OnlineDpo)
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer.is_deepspeed_enabled, trainer.current_gradient_accumulation_steps = False, 2
    trainer.state, trainer.reward_weights, trainer._said, trainer._mean = None, None, {}, 0.0
    told = [[0.5, 0.5, 0.5, None, 1.0, 0.5, 0.5, 0.5]]
    trainer.reward_funcs = [lambda **given: told[0]]
    rewards = trainer._calculate_rewards_from_functions([None] * 8, [None] * 8, [[]] * 8)
    rewards[torch.tensor([1])] -= 1.0  # as TRL does
    weights = trainer._weighted(torch.ones(8, 2))
    assert weights[:, 0].tolist() == [0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]


def test_a_function_may_be_async_with_one_loop_for_all_calls():
    loops = list[Any]()

    async def score(completions: Any, **columns: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    turns = [[{"role": "assistant", "content": "a"}]]
    reward = Reward("r", score)
    assert [reward([[]], turns), reward([[]], turns)] == [[1.0], [1.0]]
    assert loops[0] is loops[1]


def test_online_dpo_logs_the_means_of_what_came_since_the_last_line(monkeypatch):
    from trl.experimental.online_dpo import OnlineDPOTrainer

    from cai.training.online.dpo import OnlineDpo

    lines = []
    monkeypatch.setattr(OnlineDPOTrainer, "log", lambda self, logs, *given: lines.append(logs))
    trainer = OnlineDpo.__new__(OnlineDpo)
    trainer._said = {}
    for values in ([1.0, 3.0], [5.0], []):
        for one in values:
            trainer._note("a", one)
        trainer.log({"loss": 0.5})
    assert lines == [{"loss": 0.5, "a": 2.0}, {"loss": 0.5, "a": 5.0}, {"loss": 0.5}]


@pytest.mark.parametrize(("kind", "expected"), [("llama", "static"), ("neo", None)])
def test_a_model_whose_attention_goes_by_columns_writes_with_a_growing_cache(kind, expected, tiny, run, tmp_path, monkeypatch):
    from transformers import GenerationMixin, GPTNeoConfig, GPTNeoForCausalLM

    model = tiny
    if kind == "neo":
        tokenizer, model = AutoTokenizer.from_pretrained(tiny), tmp_path / "neo"
        size = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        config = GPTNeoConfig(vocab_size=len(tokenizer), max_position_embeddings=512, window_size=8, **size, **ends)
        GPTNeoForCausalLM(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
    caches, usual = [], GenerationMixin.generate

    def generate(self, *given, **named):
        caches.append(named["generation_config"].cache_implementation)
        return usual(self, *given, **named)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    train("rloo", settings("rloo", model, run), tmp_path / "out")
    assert set(caches) == {expected}


def test_a_judge_checks_and_a_reward_model_together(run, tiny, reward_model, tmp_path):
    constitution = tmp_path / "checked.yaml"
    constitution.write_text(CHECKED)
    judge = {"model": f"scripted:{HERE}:ten_choices", "method": "score"}
    reward = [
        {"constitution": str(constitution), "weight": 0.5},
        {"constitution": str(runs.SMALL), "judge": judge, "weight": 2},
        {"model": str(reward_model)},
    ]
    out = tmp_path / "out"
    train("ppo", settings("ppo", tiny, run, reward=reward), out)
    named = [f"rewards/{name}/mean" for name in ("checked", "small", "model")]
    checked, judged, modelled = (logged(out, name)[-1] for name in named)
    assert 0 <= checked <= 1
    assert -1 <= judged <= 1
    assert logged(out, "reward")[-1] == pytest.approx(0.5 * checked + 2 * judged + modelled, abs=1e-5)
    assert logged(out, "reward_disagreement")[-1] > 0
    told = json.loads((out / "run" / "identity.json").read_text())
    assert [set(one) - {"weight"} for one in told["reward"]] == [{"constitution"}, {"constitution", "judge"}, {"model"}]
    again = SETTINGS["ppo"].model_validate(yaml.safe_load((out / "recipe.yaml").read_text())["ppo"])
    assert train("ppo", again, out) == json.loads((out / "manifest.json").read_text()), "its recipe is that of this training"
    card = " ".join((out / "README.md").read_text().split())
    assert "Its completions were rewarded by the weighted sum of" in card
    assert "- the checks of the constitution `checked.yaml`, weight 0.5" in card
    assert "- what `scripted:test_online.py:ten_choices` says under the constitution `small.yaml` (`score`), weight 2" in card
    assert "- the reward model `model`, weight 1" in card
    assert str(tmp_path) not in card
    assert str(HERE.parent) not in card


@pytest.mark.slow
def test_two_processes_train_one_ppo(tiny, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"What is {number}?"} for number in range(16)])
    one = settings("ppo", tiny, file, lora={"rank": 2}, trl={"per_device_train_batch_size": 2})
    show = Shown()
    manifest = launch("ppo", one, tmp_path / "out", "continue", "2", show)
    assert (manifest["status"], manifest["steps"], manifest["training"]["processes"]) == ("done", 2, 2)
    assert show.steps[-1] == (2, 2)
    assert changed(tmp_path / "out", tiny) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "is_tied"), [({"rank": 4}, False), (None, True)])
def test_vllm_in_the_process_writes_with_the_weights_of_each_step(tmp_path, lora, is_tied):
    pytest.importorskip("vllm")
    model = make_tiny_model(tmp_path / "model", context=512, head=32, tied=is_tied)  # the smallest that vLLM computes on a CPU
    (tmp_path / "reward.py").write_text("from typing import Any\n" + inspect.getsource(brief) + inspect.getsource(counted))
    prompts = [*(f"What is {number}?" for number in range(16)), "long " * 128]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": one} for one in prompts])
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05, "vllm_max_model_length": 128}
    recipe = {
        "model": str(model),
        "dtype": "bfloat16",
        "data": {"source": str(rows), "test_split": None},
        "lora": lora,
        "reward": {"function": str(tmp_path / "reward.py:brief")},
        "gold": {"function": str(tmp_path / "reward.py:counted"), "every": 3, "prompts": 4},
        "trl": {**FEW, **vllm, "max_steps": 6, "learning_rate": 0.03, "beta": 0.01, "save_strategy": "no"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    told = ["train", "ppo", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    done = subprocess.run([Path(sys.executable).with_name("cai"), *told], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["too_long"] == {"train": 1}
    assert max(logged(tmp_path / "out", "kl")) > 0.3, "the weights have moved away from those that vLLM loaded"
    assert max(logged(tmp_path / "out", "sampling/sampling_logp_difference/mean")) < 0.1, "vLLM's and the trainer's"


@pytest.mark.parametrize(
    ("device", "mode", "reloads"), [("cpu", "colocate", True), ("cpu", "server", False), ("cuda", "colocate", False)]
)
def test_only_vllm_in_the_process_on_a_cpu_reloads(device, mode, reloads):
    from cai.training.online.colocated import reload_where_packed

    arguments, usual = SimpleNamespace(use_vllm=True, vllm_mode=mode), object()
    accelerator = SimpleNamespace(device=torch.device(device))
    trainer = SimpleNamespace(args=arguments, accelerator=accelerator, vllm_generation=SimpleNamespace(sync_weights=usual))
    reload_where_packed(trainer)
    assert (trainer.vllm_generation.sync_weights is not usual) == reloads


@pytest.mark.parametrize("stage", ["ppo", "grpo", "rloo"])
def test_the_reference_is_of_the_revision_and_dtype_that_the_policy_is(tiny, tmp_path, monkeypatch, stage):
    from trl.trainer import grpo_trainer, rloo_trainer

    from cai.training import loading

    told: list[dict[str, Any]] = []
    find, create = loading.find_model, grpo_trainer.create_model_from_path
    monkeypatch.setattr(loading, "find_model", lambda one: find(one)._replace(revision="branch"))
    for module in (grpo_trainer, rloo_trainer):
        monkeypatch.setattr(module, "create_model_from_path", lambda name, **given: told.append(given) or create(name, **given))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?"}] * 4)
    train(stage, settings(stage, tiny, rows, dtype="bfloat16", trl={"beta": 0.1, "max_steps": 1}), tmp_path / "out")
    assert [(one["revision"], one["dtype"]) for one in told] == [("branch", "bfloat16")]
    assert logged(tmp_path / "out", "kl")[0] == pytest.approx(0, abs=1e-3)


# --- what a training is told apart by


def told(one: TrainSettings) -> dict[str, Any]:
    return identity("ppo", one, "1", load_data("ppo", one))


def test_another_reward_in_the_same_place_is_another_training(tiny, reward_model, tmp_path):
    rows, function = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?"}]), tmp_path / "fun.py"
    constitution = tmp_path / "checked.yaml"

    def write(number: int) -> None:
        function.write_text(f"def flat(completions, **columns):\n    return [{number}.0 for _ in completions]\n")
        constitution.write_text(CHECKED.replace("max_words: 2", f"max_words: {number}"))
        (tmp_path / "model" / "reward.json").write_text((reward_model / "reward.json").read_text() + " " * number)

    for name in ("model", "other"):
        shutil.copytree(reward_model, tmp_path / name)
    sources = [f"{function}:flat", str(constitution), str(tmp_path / "other")]
    one = settings("ppo", tiny, rows, reward=sources, gold=str(tmp_path / "model"), critic=str(tmp_path / "model"))
    write(3)
    before = told(one)
    assert told(one) == before
    write(4)
    after = told(one)
    assert [key for key in after if after[key] != before[key]] == ["reward", "gold", "critic"]
    assert [new == old for new, old in zip(after["reward"], before["reward"], strict=True)] == [False, False, True]


def test_what_gold_says_is_part_of_it_and_a_heavier_reward_too_but_no_stop_is(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Why?"}])
    plain = told(settings("ppo", tiny, rows))
    for more in (
        {"gold": {"function": f"{HERE}:by_topic"}},
        {"reward": {"function": f"{HERE}:brief", "weight": 2}},
    ):
        assert told(settings("ppo", tiny, rows, **more)) != plain
    assert told(settings("ppo", tiny, rows, limits={"kl": 5})) == plain
    stopping, going_on = ({"function": f"{HERE}:by_topic", "stop": stop} for stop in (True, False))
    assert told(settings("ppo", tiny, rows, gold=stopping)) == told(settings("ppo", tiny, rows, gold=going_on))


def test_a_function_may_be_in_a_module():
    assert find_function("tests.test_online:brief")([[{"content": "abc"}]]) == [-3.0]
