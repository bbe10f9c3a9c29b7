"""What a training stage is told, as frozen data that can be printed, saved and read back.

model: smollm2-135m
data: [{source: runs/harmless}, {source: helpful.jsonl, weight: 0.5}]
lora: {rank: 16}
trl: {learning_rate: 1.0e-4, num_train_epochs: 1}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from cai.documents import Part, Text
from cai.rewards.spec import Combine, Weight

StageName = Literal["sft", "reward", "dpo", "kto", "orpo", "cpo"]
STAGES: tuple[StageName, ...] = ("sft", "reward", "dpo", "kto", "orpo", "cpo")
QUIET = {"report_to", "run_name", "save_total_limit", "save_strategy", "save_steps", "logging_steps", "logging_strategy"}
"""Keys of TRL that change nothing in the model."""


class SourceSettings(Part):
    """Rows to train on."""

    source: Text
    """A run folder of `cai generate`, a file (JSON lines, JSON, CSV, Parquet), a `datasets` folder, or a Hub dataset id."""
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Its share of the mixture relative to the other sources, which all need one then; null: all of its rows."""
    split: Text = "train"
    """The split to train on."""
    test_split: Text | None = "test"
    """The split to measure on, where there is such a one; null: none."""
    subset: Text | None = None
    """The configuration of a Hub dataset; of a run folder the one that the stage needs is taken."""
    data_dir: Text | None = None
    """The folder of a Hub dataset that is read (of `Anthropic/hh-rlhf`: `helpful-base`)."""
    revision: Text | None = None
    """The revision of a Hub dataset (branch, tag or commit)."""
    limit: PositiveInt | None = None
    """Use only the first so many rows of a split."""
    tag: Text | None = None
    """Of pairs without a verdict for each principle: the one of the reward model's `objectives` that their labels are for."""


class LoraSettings(Part):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in place of full fine-tuning."""

    rank: PositiveInt = 16
    """The rank of the adapters."""
    alpha: PositiveInt = 32
    """The adapters' output is scaled by `alpha / rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    target_modules: Text | tuple[Text, ...] = "all-linear"
    """The layers that get an adapter; `all-linear`: every linear layer but the output's."""
    merge: bool = True
    """Whether the saved model has the adapters added into its weights; else only the adapters are saved."""


class TrainSettings(Part):
    """What every stage is told."""

    model: Text = "smollm2-135m"
    """The model to begin with: an alias (`smollm2-135m`), a folder, or a Hub id."""
    revision: Text | None = None
    """Its Hub revision (branch, tag or commit)."""
    data: tuple[SourceSettings, ...] = Field(min_length=1)
    """One source or several: a text is the `source` of one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. `auto`: bfloat16 under adapters where the machine computes in it, float32 (computing in bfloat16 where
    it can) where all weights are trained."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Hold the weights under the adapters in 4 bits (QLoRA, Dettmers et al. 2023) or 8; needs a GPU, `lora`, bitsandbytes."""
    lora: LoraSettings | None = None
    """Train adapters; null: all weights."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the order of rows, new weights and dropout."""
    trl: dict[str, Any] = Field(default={})
    """Any argument of TRL's config class of this stage under its own name: `{num_train_epochs: 1, learning_rate: 1.0e-5}`."""

    @field_validator("data", mode="before")
    @classmethod
    def _as_a_list(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, str | Mapping) else value
        return [{"source": one} if isinstance(one, str) else one for one in listed] if isinstance(listed, list) else listed

    @field_validator("data")
    @classmethod
    def _weights_of_all_or_none(cls, value: tuple[SourceSettings, ...]) -> tuple[SourceSettings, ...]:
        if len({one.weight is None for one in value}) > 1:
            raise ValueError("expected a weight for each source or for none")
        return value

    @field_validator("trl")
    @classmethod
    def _with_numbers(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key: _as_number(one) for key, one in value.items()}

    @field_validator("lora", mode="before")
    @classmethod
    def _with_defaults(cls, value: Any) -> Any:
        return {} if value is True else value


def _as_number(value: Any) -> Any:
    """`1e-4`, which YAML reads as a text, as the number that is meant; also inside a mapping."""
    if isinstance(value, Mapping):
        return {key: _as_number(one) for key, one in value.items()}
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class SftSettings(TrainSettings):
    """Supervised fine-tuning on completions: the supervised phase of Bai et al. 2022 (arXiv 2212.08073, section 3).

    Which completions of a run these are, its `dataset.sft` says.
    """


class RewardSettings(TrainSettings):
    """A Bradley-Terry reward model, or several."""

    soft_labels: bool = True
    """Cross-entropy against each pair's `chosen_probability`; else every chosen completion counts as preferred for certain."""
    members: PositiveInt = 1
    """How many reward models are trained, each with a seed and a draw of the rows of its own. With `lora` each of several is
    saved as adapters, whatever `lora.merge` says, so that they share one base."""
    member_share: float = Field(default=0.8, gt=0, le=1)
    """The share of the rows that each of several members draws, without any row twice."""
    bases: tuple[Text, ...] = ()
    """The models that members begin with, one each, `model` being the first; empty: all with `model`."""
    combine: Combine = "mean"
    """How the rewards of several members become one: their mean, the least, or the mean less `variance_weight` times their
    variance (Coste et al. 2023, arXiv 2310.02743)."""
    variance_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """The lambda of `mean-variance`."""
    objectives: dict[Text, Weight] = Field(default={})
    """One output for each of these tags of the constitution, trained on the verdicts of its principles, and its weight in the
    reward; empty: one output, trained on the whole verdict."""
    length: Literal["none", "fitted"] = "none"
    """`fitted`: what the reward gains by length alone, as a line over the characters of completions of the data, is taken out
    of it."""

    @model_validator(mode="before")
    @classmethod
    def _begins_with_the_first(cls, values: Any) -> Any:
        bases = values.get("bases") if isinstance(values, Mapping) else None
        return {"model": bases[0], **values} if bases and isinstance(bases, list | tuple) else values

    @model_validator(mode="after")
    def _agrees(self) -> RewardSettings:
        if self.bases and self.bases[0] != self.model:
            raise ValueError(f"model: with bases it is the first of them, {self.bases[0]!r}; remove it")
        if self.bases and len(self.bases) != self.members:
            raise ValueError(f"bases: expected one for each of the {self.members} members, found {len(self.bases)}")
        if self.bases and self.revision:
            raise ValueError("revision is that of 'model', and members begin with 'bases'; remove one of them")
        if self.objectives and not any(self.objectives.values()):
            raise ValueError("objectives: every weight is 0, so that every reward would be; give one of them another weight")
        return self

    @property
    def heads(self) -> tuple[str, ...]:
        """The outputs' names."""
        return tuple(self.objectives) or ("reward",)


class DpoSettings(TrainSettings):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    soft_labels: bool = True
    """Each pair counts by its own `chosen_probability`: conservative DPO (Mitchell 2023) with a label of its own."""
    reference: Text | None = None
    """The model that the trained one is held near: an alias, a folder, or a Hub id; null: the model it begins with."""


class KtoSettings(TrainSettings):
    """Kahneman-Tversky optimisation on single completions (Ethayarajh et al. 2024, arXiv 2402.01306)."""


class OrpoSettings(TrainSettings):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691); experimental in TRL."""


class CpoSettings(TrainSettings):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417), or SimPO (Meng et al. 2024, arXiv 2405.14734)
    with `trl: {loss_type: simpo, cpo_alpha: 0}`; experimental in TRL."""


SETTINGS: dict[StageName, type[TrainSettings]] = {
    "sft": SftSettings,
    "reward": RewardSettings,
    "dpo": DpoSettings,
    "kto": KtoSettings,
    "orpo": OrpoSettings,
    "cpo": CpoSettings,
}
