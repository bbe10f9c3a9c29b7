"""What a critic begins with: a reward model, whose reward of what is written so far is the first guess of what it will be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from cai.documents import Document
from cai.models import locate
from cai.rewards.spec import SPEC, MemberSpec, RewardSpec
from cai.training.ppo.critic import Output
from cai.weights import loading, pretrained

_SCORE = "score"


class Start(NamedTuple):
    """Weights of a reward model. Either a backbone, or adapters that belong on a base of this version."""

    backbone: Any
    adapters: dict[str, Tensor] | None
    version: str | None
    output: Output


def start_from(folder: Path, dtype: torch.dtype, shared: str | None) -> Start | None:
    """The first network of a reward model; its output is the normalised reward, all objectives by their weights.

    `shared` is the version of the weights under the policy's adapters: a reward model that is adapters on the same
    gives its adapters, and any other one nothing; without it the backbone is loaded, adapters merged.
    """
    spec = Document.read(folder / SPEC).validate(RewardSpec) if (folder / SPEC).is_file() else None
    member = spec.members[0] if spec else MemberSpec(folder=".", mean=(0.0,), deviation=(1.0,))
    weights = list(spec.objectives.values()) if spec else [1.0]
    source = folder / member.folder
    if shared is not None:
        return _adapters(source, member, weights) if member.version == shared else None
    with loading(f"reward model '{folder}', which the critic begins with"):
        network = _merged(source, member, len(weights), dtype)
    return Start(network.base_model, None, None, _output(member, weights, network.score.weight, network.score.bias))


def _adapters(source: Path, member: MemberSpec, weights: list[float]) -> Start:
    state = load_file(source / "adapter_model.safetensors")
    score = {name: state.pop(name) for name in list(state) if f".{_SCORE}." in name}
    weight = next(one for name, one in score.items() if name.endswith("weight"))
    bias = next((one for name, one in score.items() if name.endswith("bias")), None)
    return Start(None, state, member.version, _output(member, weights, weight, bias))


def _merged(source: Path, member: MemberSpec, outputs: int, dtype: torch.dtype) -> Any:
    if member.base is None:
        return AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype)
    from peft import PeftModel

    name, revision = pretrained(locate(member.base, member.revision))
    base = AutoModelForSequenceClassification.from_pretrained(name, revision=revision, num_labels=outputs, dtype=dtype)
    return PeftModel.from_pretrained(base, str(source)).merge_and_unload()


def _output(member: MemberSpec, weights: list[float], weight: Tensor, bias: Tensor | None) -> Output:
    """One output that is the sum of all, each normalised and by its weight."""
    share = torch.tensor(weights) / torch.tensor(member.deviation)
    shift = share * ((0.0 if bias is None else bias.float()) - torch.tensor(member.mean))
    return Output((share.unsqueeze(0) @ weight.float()), shift.sum().reshape(1))
