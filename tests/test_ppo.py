"""PPO's rollouts, losses and gradients on a tiny model, beside plain code that looks at one completion at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import ppo_runs
from tests.ppo_runs import FORMS, LENGTH, LOW, Script, disturb, low_or_none, make, policy_weights, rollout, value_weights
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
each_form = pytest.mark.parametrize("form", FORMS)
PLAIN = {"whiten_advantages": False, "center_values": False}
"""Nothing that goes by all rows of a rollout."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


class Row(NamedTuple):
    """A completion, each number of which stands for one of its tokens."""

    prompt: list[int]
    ids: list[int]
    counted: list[bool]


def rows_of(out: dict[str, Any]) -> list[Row]:
    """A rollout without its padding."""
    tools = out.get("tool_mask", torch.ones_like(out["completion_mask"]))
    found = []
    for place in range(len(out["completion_ids"])):
        prompt = out["prompt_ids"][place][out["prompt_mask"][place] > 0].tolist()
        real = out["completion_mask"][place] > 0
        counted = [bool(one) for one in tools[place][real]]
        found.append(Row(prompt, out["completion_ids"][place][real].tolist(), counted))
    return found


def plain_logps(model: Any, row: Row) -> Tensor:
    """The log-probability of each token of the completion, by a pass over this row alone."""
    logps = model(input_ids=torch.tensor([row.prompt + row.ids])).logits[0].float().log_softmax(-1)
    return torch.stack([logps[len(row.prompt) + place - 1, token] for place, token in enumerate(row.ids)])


def critic_of(trainer: Any, form: str) -> Any:
    """Where the critic's weights are those in use."""
    return trainer.value.working() if form == "adapters" else nullcontext()


def plain_values(trainer: Any, form: str, row: Row) -> Tensor:
    """The value of what was written before each token of the completion; within `critic_of`."""
    value, model = trainer.value, trainer.model
    backbone = {"critic": lambda: value.backbone, "adapters": lambda: model.base_model.model.model, "head": lambda: model.model}
    ids, weights, start = torch.tensor(row.prompt + row.ids), dict(value.layer.named_parameters()), len(row.prompt) - 1
    hidden, words = backbone[form]()(input_ids=ids.unsqueeze(0)).last_hidden_state[0], backbone[form]().embed_tokens.weight[ids]
    scale = 250 / 3 / hidden.shape[-1]
    states, words = normal(hidden) * scale, normal(words) * scale
    if form == "head":
        states, words = states.detach(), words.detach()
    found = []
    for place in range(start, len(ids) - 1):
        written = slice(start, place + 1)
        parts = {"state": states[place], "states": states[written].mean(0), "words": words[written].mean(0)}
        found.append(sum(weights[f"{name}.weight"][0] @ one for name, one in parts.items()) + weights["state.bias"][0])
    return torch.stack(found)


def normal(rows: Tensor) -> Tensor:
    """Rows of mean 0 and variance 1."""
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def plain_rewards(kl: list[float], score: float, counted: list[bool], beta: float) -> list[float]:
    rewards = [-beta * one if counts else 0.0 for one, counts in zip(kl, counted, strict=True)]
    if any(counted):
        rewards[max(place for place, counts in enumerate(counted) if counts)] += score
    return rewards


def plain_advantages(rewards: list[float], values: list[float], counted: list[bool], lam: float) -> list[float]:
    advantages, following, value_after = [0.0] * len(rewards), 0.0, 0.0
    for place in reversed([place for place, counts in enumerate(counted) if counts]):
        following = rewards[place] + value_after - values[place] + lam * following
        advantages[place], value_after = following, values[place]
    return advantages


def score(row: Row) -> float:
    return sum(token < LOW for token in row.ids) / LENGTH


@each_form
@pytest.mark.parametrize("tools", [False, True])
def test_a_rollout_holds_what_plain_code_says_of_each_completion(tiny, tmp_path, form, tools):
    trainer = make(tiny, tmp_path, form, rollout_func=Script(tools), whiten_advantages=False)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    disturb(trainer)
    out = rollout(trainer)
    nats = []
    for place, row in enumerate(rows_of(out)):
        with torch.no_grad():
            logps = plain_logps(trainer.model, row)
            kl = logps - plain_logps(base, row)
            with critic_of(trainer, form):
                values = plain_values(trainer, form, row)
        counted, length = torch.tensor(row.counted), len(row.ids)
        rewards = plain_rewards(kl.tolist(), score(row), row.counted, trainer.args.beta)
        advantages = torch.tensor(plain_advantages(rewards, values.tolist(), row.counted, trainer.args.lam))
        nats.append(float(kl[counted].sum()))

        def same(name: str, plain: Tensor, place: int = place, length: int = length) -> None:
            torch.testing.assert_close(
                out[name][place, :length], plain, atol=2e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}"
            )
            assert (out[name][place, length:] == 0).all() or name == "old_per_token_logps"

        same("old_per_token_logps", logps)
        same("value_mask", counted.long())
        same("values", values * counted)
        same("advantages", advantages)
        same("returns", (advantages + values) * counted)
    assert float(torch.tensor(nats).abs().mean()) > 0.1, "the policy is not the reference"
    assert trainer._metrics["train"]["objective/kl"][0] == pytest.approx(sum(nats) / len(nats), abs=1e-3)


@each_form
def test_what_stands_beside_a_completion_changes_none_of_its_numbers(tiny, tmp_path, form):
    found = []
    for data in (ppo_runs.prompts(8), ppo_runs.prompts(16, words=12)):
        same = ppo_runs.prompts(4)["prompt"]
        texts = [*same, *data["prompt"][-4:]]
        trainer = make(
            tiny, tmp_path, form, rollout_func=Script(tools=True), shuffle_dataset=False, **PLAIN,
            data=data.from_dict({"prompt": texts}),
        )  # fmt: skip
        disturb(trainer)
        found.append(rollout(trainer))
    first, second = found
    assert first["prompt_ids"].shape != second["prompt_ids"].shape
    for name in ("old_per_token_logps", "values", "returns", "advantages"):
        for place, row in enumerate(rows_of(first)[:4]):
            ones = (out[name][place, : len(row.ids)] for out in found)
            torch.testing.assert_close(*ones, atol=1e-4, rtol=1e-4)


@each_form
def test_a_constant_added_to_all_rewards_changes_no_advantage(tiny, tmp_path, form):
    """Else the first rollouts of low rewards would teach not to end, and those of high ones to end at once."""

    def raised(*given: Any, **columns: Any) -> list[float | None]:
        return [None if one is None else one + 5 for one in low_or_none(*given, **columns)]

    trainers = [
        make(tiny, tmp_path, form, reward=one, rollout_func=Script(tools=True), whiten_advantages=False)
        for one in (low_or_none, raised)
    ]
    for one in trainers:
        disturb(one)
    low, high = map(rollout, trainers)
    mask = low["value_mask"] > 0
    assert low["advantages"][mask].abs().mean() > 0.01
    torch.testing.assert_close(high["advantages"], low["advantages"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(high["values"], low["values"] + 5 * mask, atol=1e-4, rtol=1e-4)
    for trainer, out in zip(trainers, (low, high), strict=True):
        ends = [one[of > 0][-1] for one, of in zip(out["values"], out["value_mask"], strict=True) if of.any()]
        assert 0 < len(ends) < len(out["values"]), "some have no reward"
        assert float(sum(ends) / len(ends)) == pytest.approx(trainer._metrics["train"]["objective/score"][0], abs=1e-4)
        unread = {name: one for name, one in out.items() if name != "old_per_token_logps"}
        read = trainer._passed(unread).values
        torch.testing.assert_close(read[mask], out["values"][mask], atol=1e-4, rtol=1e-4)  # the value function has learned it
        bias = trainer.value.layer.state.bias.clone()
        rollout(trainer)
        assert trainer.value.layer.state.bias == bias, "it is of the first rollout"


def test_whitening_is_over_what_counts(tiny, tmp_path):
    plain, white = (
        rollout(make(tiny, tmp_path, reward=low_or_none, rollout_func=Script(tools=True), whiten_advantages=one))
        for one in (False, True)
    )
    mask = plain["value_mask"] > 0
    assert 0 < mask.sum() < plain["completion_mask"].sum()
    counted = plain["advantages"][mask]
    expected = (counted - counted.mean()) / counted.std(unbiased=False)
    torch.testing.assert_close(white["advantages"][mask], expected, atol=1e-3, rtol=1e-3)
    assert (white["advantages"][~mask] == 0).all()
    torch.testing.assert_close(white["returns"], plain["returns"])


@pytest.mark.parametrize(("kind", "steps"), [("k1", 1), ("k3", 1), ("k1", 2)])
def test_the_kl_is_estimated_as_told_whether_or_not_trl_has_the_log_probabilities(tiny, tmp_path, kind, steps):
    trainer = make(tiny, tmp_path, rollout_func=Script(), kl_estimator=kind, num_iterations=steps)
    disturb(trainer)
    out = rollout(trainer)
    ratio = (out["old_per_token_logps"] - out["ref_per_token_logps"]) * out["completion_mask"]
    plain = ratio if kind == "k1" else (-ratio).exp() - 1 + ratio
    told = trainer._metrics["train"]
    assert told["objective/kl"][0] == pytest.approx(float(plain.sum(dim=1).mean()), abs=1e-4)
    assert told["kl"][0] == pytest.approx(float(plain.sum() / out["completion_mask"].sum()), abs=1e-4)
    assert told["objective/rlhf_reward"][0] == pytest.approx(told["objective/score"][0] - 0.2 * told["objective/kl"][0])


def gradients(weights: dict[str, Any], loss: Tensor | None = None) -> dict[str, Tensor]:
    """Of the loss, or those that are there; these are taken away."""
    if loss is not None:
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return {name: one for name, one in zip(weights, found, strict=True) if one is not None}
    found = {name: one.grad for name, one in weights.items() if one.grad is not None}
    for one in weights.values():
        one.grad = None
    return found


def assert_same(found: dict[str, Tensor], plain: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert {name for name, one in found.items() if one.any()} == {name for name, one in plain.items() if one.any()}
    for name, one in plain.items():
        if one.any():
            torch.testing.assert_close(found[name], one, atol=atol, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@each_form
def test_the_loss_is_the_clipped_surrogate_and_the_clipped_value_loss_and_no_kl(tiny, tmp_path, form):
    trainer = make(tiny, tmp_path, form, rollout_func=Script(tools=True), beta=1.0)
    out = rollout(trainer)
    disturb(trainer, 0.02)
    policy = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    loss = trainer._compute_loss(trainer.model, out)
    value_found = gradients(trainer._trained)
    loss.backward()
    found = gradients(policy)

    surrogate, errors, clipped, tokens = 0.0, 0.0, 0, float(out["value_mask"].sum())
    for place, row in enumerate(rows_of(out)):
        logps = plain_logps(trainer.model, row)
        for at, counts in enumerate(row.counted):
            if counts:
                ratio, advantage = (logps[at] - out["old_per_token_logps"][place, at]).exp(), out["advantages"][place, at]
                surrogate = surrogate - torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                clipped += int(abs(ratio - 1) > 0.2)
    surrogate = surrogate / tokens
    plain = gradients(policy, surrogate)
    with critic_of(trainer, form):
        for place, row in enumerate(rows_of(out)):
            values = plain_values(trainer, form, row)
            for at, counts in enumerate(row.counted):
                if counts:
                    old, target = out["values"][place, at], out["returns"][place, at]
                    near = torch.clamp(values[at], old - 0.2, old + 0.2)
                    errors = errors + torch.max((values[at] - target) ** 2, (near - target) ** 2) / 2
        value_loss = errors / tokens
        value_plain = gradients(trainer._trained, value_loss)
    assert clipped > 0
    assert float(loss) == pytest.approx(float(surrogate), abs=1e-5)
    assert_same(found, plain)
    assert_same(value_found, value_plain)
    assert trainer.beta == 1.0
    assert trainer._metrics["train"]["value/loss"][-1] == pytest.approx(float(value_loss), abs=1e-5)
    assert trainer._metrics["train"]["kl"] == [pytest.approx(0.0, abs=1e-5)]


@each_form
def test_without_values_and_with_lambda_1_the_gradient_is_that_of_reinforce(tiny, tmp_path, form):
    trainer = make(tiny, tmp_path, form, rollout_func=Script(tools=True), lam=1.0, gamma=1.0, **PLAIN)
    with torch.no_grad():
        for name, one in trainer.model.named_parameters():
            if "lora_B.default" in name or form != "adapters":
                one.add_(0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(len(name))))
    out = rollout(trainer)
    assert (out["values"] == 0).all()
    policy = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    trainer._compute_loss(trainer.model, out).backward()
    found = gradients(policy)
    base, total, tokens = AutoModelForCausalLM.from_pretrained(tiny), 0.0, 0
    for row in rows_of(out):
        logps = plain_logps(trainer.model, row)
        with torch.no_grad():
            kl = (logps - plain_logps(base, row)).tolist()
        rewards = plain_rewards(kl, score(row), row.counted, trainer.args.beta)
        for at, counts in enumerate(row.counted):
            if counts:
                total, tokens = total - logps[at] * sum(rewards[at:]), tokens + 1
    plain = gradients(policy, total / tokens)
    assert any(one.abs().max() > 1e-3 for one in plain.values())
    assert_same(found, plain)


def trained(tiny: Any, out: Any, form: str, **arguments: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of policy and value function after some steps in which a step's size goes with its gradient's."""
    steps = {"adam_epsilon": 1.0, "max_grad_norm": 0.0, "learning_rate": 0.5, "value_learning_rate": 0.5}
    trainer = make(tiny, out, form, **(steps | {"rollout_func": Script(tools=True)} | arguments))
    trainer.train()
    return policy_weights(trainer), value_weights(trainer)


def assert_close(ones: Any, others: Any, atol: float = 2e-5) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for name, weight in one.items():
            torch.testing.assert_close(weight, other[name], atol=atol, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((weight - other[name]).abs().max()) for name, weight in one.items())


@each_form
def test_a_step_is_the_same_in_however_many_batches(tiny, tmp_path, form):
    begun = trained(tiny, tmp_path, form, learning_rate=0.0, value_learning_rate=0.0)
    one = trained(tiny, tmp_path, form)
    parts = trained(tiny, tmp_path, form, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_close(parts, one)
    assert distance(one[0], begun[0]) > 1e-2
    assert distance(one[1], begun[1]) > 1e-2


@each_form
def test_minibatches_of_unlike_lengths_are_the_same_in_however_many_batches(tiny, tmp_path, form):
    told = {"num_iterations": 2, "max_steps": 4, "reward": low_or_none}
    whole = trained(tiny, tmp_path, form, **told, per_device_train_batch_size=4, steps_per_generation=2)
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    assert_close(trained(tiny, tmp_path, form, **told, **more), whole)


@each_form
def test_a_minibatch_weighs_as_much_as_the_whole_rollout_would(tiny, tmp_path, form):
    """Of completions that are all the same."""
    told = {"data": ppo_runs.Dataset.from_dict({"prompt": ["which?"] * 16})}
    whole = trained(tiny, tmp_path, form, **told)
    assert_close(trained(tiny, tmp_path, form, **told, per_device_train_batch_size=4, steps_per_generation=2), whole)


@each_form
def test_gradient_checkpointing_changes_nothing(tiny, tmp_path, form):
    plain = trained(tiny, tmp_path, form, max_steps=2)
    assert_close(trained(tiny, tmp_path, form, max_steps=2, gradient_checkpointing=True), plain)


@each_form
def test_the_value_function_does_not_touch_the_policy(tiny, tmp_path, form):
    """Within a rollout, whose advantages are known."""
    told = {"num_iterations": 3, "max_steps": 3, "max_grad_norm": 0.05, "center_values": False}

    def at(rate: float) -> Any:
        rest = {} if form == "head" else {"critic_learning_rate": rate}
        return trained(tiny, tmp_path, form, **told, value_learning_rate=rate, **rest)

    (one, critic), (other, moved), (third, still) = at(0.5), at(5.0), at(0.0)
    assert_close((one, one), (other, third), atol=0)
    assert distance(critic, moved) > 1e-2
    assert distance(still, value_weights(make(tiny, tmp_path, form))) == 0


@each_form
def test_a_value_function_is_warmed_up_alone(tiny, tmp_path, form):
    begun = make(tiny, tmp_path, form)
    policy, value = trained(tiny, tmp_path, form, value_warmup_steps=2, max_steps=2, weight_decay=0.1)
    assert distance(policy, policy_weights(begun)) == 0
    assert distance(value, value_weights(begun)) > 1e-2
    policy, _ = trained(tiny, tmp_path, form, value_warmup_steps=2, max_steps=3)
    assert distance(policy, policy_weights(begun)) > 1e-3


@each_form
def test_what_only_warms_up_takes_no_step_of_the_optimizer_and_steers_no_kl(tiny, tmp_path, form):
    trainer = make(
        tiny, tmp_path, form, value_warmup_steps=2, max_steps=4, gradient_accumulation_steps=2, target_kl=0.5, kl_horizon=16
    )
    trainer.train()
    first, second = ppo_runs.logged(trainer, "objective/kl_coef")[:2]
    assert first == second == trainer.args.beta
    assert trainer.kl.coefficient < trainer.args.beta
    steps = {int(one["step"]) for one in trainer.optimizer.state.values()}
    assert steps == {2}


@pytest.mark.parametrize("value_function", ["critic", "head"])
def test_adapters_of_the_embeddings(tiny, tmp_path, monkeypatch, value_function):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    monkeypatch.setattr(ppo_runs, "lora", lambda: config)
    trainer = make(tiny, tmp_path, "adapters", value_function=value_function, max_steps=2, num_iterations=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert any("lora_embedding_A" in name for name in saved)
    assert not any("critic" in name for name in saved)
    assert any("lora_embedding_A" in name for name in trainer._trained) == (value_function == "critic")


def test_adapters_leave_the_base_as_it_was(tiny, tmp_path):
    trainer = make(tiny, tmp_path, "adapters", max_steps=3, num_iterations=2)
    trainer.train()
    assert trainer.ref_model is None
    base = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    kept = trainer.model.get_base_model().state_dict()
    for name, one in base.items():
        found = [other for key, other in kept.items() if key.replace(".base_layer", "") == name]
        assert len(found) == 1
        assert torch.equal(found[0], one)
    assert trainer.model.active_adapter == "default"


def test_dropout_of_adapters_is_off_in_the_critic_too(tiny, tmp_path, monkeypatch):
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    monkeypatch.setattr(ppo_runs, "lora", lambda: config)
    trainer = make(tiny, tmp_path, "adapters", rollout_func=Script())
    disturb(trainer)
    first, second = rollout(trainer), rollout(trainer)
    for name in ("values", "old_per_token_logps"):
        torch.testing.assert_close(first[name], second[name])
