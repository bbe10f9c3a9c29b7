"""What each training stage is told, as frozen data that can be printed, saved and read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from cai.documents import Text
from cai.rewards.spec import Combine, Weight
from cai.training.base_settings import TrainSettings
from cai.training.online.settings import GrpoSettings, OnlineDpoSettings, OnlineSettings, PpoSettings, RlooSettings

StageName = Literal["sft", "reward", "dpo", "kto", "orpo", "cpo", "ppo", "rloo", "grpo", "online-dpo"]
STAGES: tuple[StageName, ...] = get_args(StageName)


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
    "ppo": PpoSettings,
    "rloo": RlooSettings,
    "grpo": GrpoSettings,
    "online-dpo": OnlineDpoSettings,
}
ONLINE: tuple[StageName, ...] = tuple(stage for stage, settings in SETTINGS.items() if issubclass(settings, OnlineSettings))
"""The stages that train on completions which the policy writes."""
