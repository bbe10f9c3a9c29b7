"""What a value function begins with: a reward model, whose reward of what is written so far is the first guess of what it will
be, or the policy's trunk and values that are all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from cai.cpu import tune_for_cpu
from cai.documents import Document
from cai.models import locate
from cai.rewards.model import first_tokenizer
from cai.rewards.spec import SPEC, MemberSpec, RewardSpec
from cai.training.ppo.config import PPOConfig
from cai.training.ppo.critic import AdapterCritic, Adapters, Critic, Output, SeparateCritic, TrunkHead
from cai.weights import loading, pretrained

_SCORE = "score"


class Start(NamedTuple):
    """Weights of a reward model. Either a backbone, or adapters."""

    backbone: Any
    adapters: Adapters | None
    output: Output


class Beginning(NamedTuple):
    """A reward model that a critic is to begin with."""

    folder: Path
    version: str
    """Of the weights under the policy's adapters, by `cai.models.locate`; empty where that is not known."""
    weight: float
    """That of the reward model in the sum of rewards."""


class UnfitError(ValueError):
    """A critic cannot begin with this reward model; says why."""


def build_value(
    policy: Any, arguments: PPOConfig, tokenizer: Any, beginning: Beginning | None, device: torch.device
) -> tuple[Critic | TrunkHead, str | None]:
    """The value function of `policy`, which may have adapters, on `device`, where the policy will be; and why a critic does not
    begin with the reward model, where so. Raises `EngineError` for one that does not load."""
    shares, note, start = isinstance(policy, PeftModel), None, None
    base: Any = policy.get_base_model() if shares else policy
    if arguments.value_function == "head":
        return _on(device, TrunkHead(base)), None
    if beginning is not None:
        try:
            start = start_from(beginning.folder, base.dtype, beginning.version if shares else None, tokenizer, beginning.weight)
        except UnfitError as exc:
            note = f"the critic begins with the policy's own weights, not with reward model '{beginning.folder}': {exc}"
    if shares:
        return _on(device, AdapterCritic(policy, start and start.adapters, start and start.output)), note
    return SeparateCritic(_backbone(base, start, arguments, device), start and start.output), note


def _on(device: torch.device, value: Any) -> Any:
    """The same, with its layer there: a policy that something else places is not there yet."""
    value.layer.to(device)
    return value


def _backbone(base: Any, start: Start | None, arguments: PPOConfig, device: torch.device) -> Any:
    """Of a critic of its own: the reward model's, or a copy of the policy's trunk."""
    backbone = start.backbone if start else AutoModel.from_config(base.config, dtype=base.dtype)
    if start is None:
        backbone.load_state_dict(base.base_model.state_dict())
    if device.type == "cpu":
        tune_for_cpu(backbone)
    if arguments.gradient_checkpointing:
        backbone.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    return backbone.to(device).train()


def reads(reward_model: str | Path, tokenizer: Any) -> bool:
    """Whether each token of the policy's means the same to the reward model, which may know more. Raises as
    `RewardModel.load` does."""
    known = first_tokenizer(reward_model).get_vocab()
    return all(known.get(token) == place for token, place in tokenizer.get_vocab().items())


def start_from(folder: Path, dtype: torch.dtype, shared: str | None, tokenizer: Any, weight: float = 1.0) -> Start:
    """The first network of a reward model; its output is `weight` times the normalised reward, all objectives by their
    weights.

    `shared` is the version of the weights under the policy's adapters, on which the reward model has to be adapters too;
    with None the backbone is loaded, adapters merged. `tokenizer` is the policy's.

    Raises `UnfitError` for a reward model that a critic of this policy cannot begin with, `EngineError` for one that does not
    load.
    """
    spec = Document.read(folder / SPEC).validate(RewardSpec) if (folder / SPEC).is_file() else None
    member = spec.members[0] if spec else MemberSpec(folder=".", mean=(0.0,), deviation=(1.0,))
    weights = [weight * one for one in (spec.objectives.values() if spec else [1.0])]
    source = folder / member.folder
    if shared == "":
        raise UnfitError("base_version, by which adapters on the policy's own weights are known, is not given")
    if shared is not None and member.version != shared:
        raise UnfitError(
            "it is not adapters on the weights that the policy's adapters are on; train it on those, with lora: {merge: false}"
        )
    if not reads(folder, tokenizer):
        raise UnfitError("its tokenizer is not the policy's")
    with loading(f"reward model '{folder}', which the critic begins with,"):
        if shared is not None:
            return _adapters(source, member, weights)
        network = _merged(source, member, len(weights), dtype)
    layer = getattr(network, _SCORE, None)
    if layer is None or len(layer.weight) != len(weights):
        raise UnfitError(f"it has no layer `{_SCORE}` with {len(weights)} output{'s' * (len(weights) > 1)}")
    return Start(network.base_model, None, _output(member, weights, layer.weight, layer.bias))


def _adapters(source: Path, member: MemberSpec, weights: list[float]) -> Start:
    from peft import PeftConfig, TaskType

    config: Any = PeftConfig.from_pretrained(str(source))
    config.task_type, config.modules_to_save, config.inference_mode = TaskType.CAUSAL_LM, None, False
    state = load_file(source / "adapter_model.safetensors")
    score = {name: state.pop(name) for name in list(state) if f".{_SCORE}." in name}
    weight = next(one for name, one in score.items() if name.endswith("weight"))
    bias = next((one for name, one in score.items() if name.endswith("bias")), None)
    return Start(None, Adapters(config, state), _output(member, weights, weight, bias))


def _merged(source: Path, member: MemberSpec, outputs: int, dtype: torch.dtype) -> Any:
    if member.base is None:
        return AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype)
    name, revision = pretrained(locate(member.base, member.revision))
    base = AutoModelForSequenceClassification.from_pretrained(name, revision=revision, num_labels=outputs, dtype=dtype)
    return PeftModel.from_pretrained(base, str(source)).merge_and_unload()


def _output(member: MemberSpec, weights: list[float], weight: Tensor, bias: Tensor | None) -> Output:
    """One output that is the sum of all, each normalised and by its weight."""
    share = torch.tensor(weights) / torch.tensor(member.deviation)
    shift = share * ((0.0 if bias is None else bias.float()) - torch.tensor(member.mean))
    return Output((share.unsqueeze(0) @ weight.float()), shift.sum().reshape(1))
