"""What an online stage is told besides: what rewards completions, what measures them honestly, and when to stop.

model: runs/sft
data: prompts.jsonl
reward: [{model: runs/reward}, {constitution: concise-and-clear, weight: 0.2}]
gold: {model: runs/other-reward, every: 0.1, prompts: 64}
limits: {kl: 50}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from cai.config import JudgeConfig
from cai.constitution import built_in_names
from cai.documents import Part, Text
from cai.rewards.spec import Weight
from cai.training.base_settings import TrainSettings

_OF_JUDGES = {"model", "revision", "server", "vllm", "method", "length", "allow_python"}
"""The keys of a judge that say something of how it judges one completion."""


class Source(Part):
    """What says what a completion is worth: exactly one of `model`, `constitution` and `function`."""

    model: Text | None = None
    """A reward model: a folder of `cai train reward`, or a sequence classifier with one output (folder or Hub id)."""
    constitution: Text | None = None
    """A constitution, by its name or a path: its checks, or with `judge` what that says under its principles."""
    judge: JudgeConfig | None = None
    """Who judges by the constitution; one that looks at one completion alone: `score`, `likelihood` or `checks`. null: its
    checks alone."""
    function: Text | None = None
    """A Python function, as FILE.py:NAME or package.module:NAME, called as TRL calls reward functions: with lists `prompts`,
    `completions` and the columns of the rows. It returns a number for each completion, or None where it has none."""

    @model_validator(mode="after")
    def _is_one(self) -> Source:
        given = [name for name in ("model", "constitution", "function") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of model, constitution, function, found {' and '.join(given) or 'none'}")
        if self.judge is not None and self.constitution is None:
            raise ValueError("judge: judges by a constitution; name one beside it")
        if self.judge is not None and (problem := _judge_problem(self.judge)):
            raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_refused(self, usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys of a judge that say nothing of one completion are left out: where they are read again they would be refused."""
        told: dict[str, Any] = usual(self)
        if judge := told.get("judge"):
            told["judge"] = {name: value for name, value in judge.items() if name in _OF_JUDGES}
        return told

    @property
    def name(self) -> str:
        """What logs call it."""
        if self.function:
            return self.function.rpartition(":")[2]
        named = self.model or self.constitution or ""
        return named.rstrip("/").rpartition("/")[2].removesuffix(".yaml")


class RewardSource(Source):
    """What rewards a completion."""

    weight: Weight = 1.0
    """Its weight in the sum of all."""


def _judge_problem(judge: JudgeConfig) -> str | None:
    """Why a judge cannot say what one completion is worth."""
    if judge.method not in ("score", "likelihood", "checks"):
        return (
            f"judge.method: '{judge.method}' compares completions, and a reward is of one alone; use score, likelihood or "
            "checks"
        )
    if judge.method != "checks" and judge.model is None:
        return "judge.model: a model is needed that judges; the policy is what is trained"
    if unread := sorted(judge.model_fields_set - _OF_JUDGES):
        return f"judge.{unread[0]}: says nothing of one completion judged by every principle; remove it"
    return None


def source_of(value: Any) -> Any:
    """What a text rewards by: FILE.py:NAME a function, a built-in name or a YAML file a constitution, else a reward model."""
    if not isinstance(value, str):
        return value
    place, _, name = value.rpartition(":")
    if place and name.isidentifier():
        return {"function": value}
    if value.endswith(".py"):
        raise ValueError(f"{value!r} is a file of Python; name the function in it: {value}:NAME")
    return {"constitution" if value in built_in_names() or value.endswith((".yaml", ".yml")) else "model": value}


class GoldSettings(Source):
    """A measure that is not trained on, taken of answers to held-out prompts."""

    every: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """After so many steps, or below 1 after such a share of all steps, answers are measured."""
    prompts: PositiveInt = 64
    """How many held-out prompts are answered each time; the same ones."""
    stop: bool = True
    """Whether training stops where two measures in a row are below the best while the reward has risen, both with
    significance."""


class LimitSettings(Part):
    """What ends a training that goes astray."""

    kl: float | None = Field(default=50.0, gt=0, allow_inf_nan=False)
    """Nats a completion from the reference; null: no limit."""
    steps: PositiveInt | None = 10_000
    """The most steps; null: no limit."""
    collapse: bool = True
    """Whether training stops where completions collapse: nearly all alike, repetitive, empty or without an end."""


class OnlineSettings(TrainSettings):
    """What all online stages are told. `data` is prompts: of other rows the prompts are taken."""

    reward: tuple[RewardSource, ...] = Field(min_length=1)
    """What rewards completions; the weighted sum of several. A text is FILE.py:NAME of a function, a constitution's name or
    file, or else a reward model."""
    gold: GoldSettings | None = None
    """What measures completions honestly, a text as in `reward`; null: nothing does, and over-optimisation goes unseen."""
    limits: LimitSettings = LimitSettings()
    """When to stop."""

    @property
    def stops(self) -> dict[str, Any]:
        """What may end the training before its last step, and decides nothing else: with others it goes on from there."""
        return {"limits": self.limits.model_dump(mode="json"), "gold": self.gold is not None and self.gold.stop}

    @field_validator("reward", mode="before")
    @classmethod
    def _rewards_as_a_list(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, str | Mapping) else value
        return [source_of(one) for one in listed] if isinstance(listed, list | tuple) else listed

    @field_validator("gold", mode="before")
    @classmethod
    def _gold_of_a_text(cls, value: Any) -> Any:
        return source_of(value)

    @model_validator(mode="after")
    def _rewards_differ(self) -> OnlineSettings:
        names = [one.name for one in self.reward]
        if twice := next((one for one in names if names.count(one) > 1), None):
            raise ValueError(f"reward: two are called {twice!r}, and logs could not tell them apart; rename one of them")
        if not any(one.weight for one in self.reward):
            raise ValueError("reward: every weight is 0, so that nothing would be learned; give one of them another weight")
        return self

    @model_validator(mode="after")
    def _gold_is_another(self) -> OnlineSettings:
        if self.gold is not None:
            gold = {name: getattr(self.gold, name) for name in ("model", "constitution", "judge", "function")}
            if any({name: getattr(one, name) for name in gold} == gold for one in self.reward):
                raise ValueError("gold: this is trained on as a reward; an honest measure is one that is not")
        return self


class PpoSettings(OnlineSettings):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with a learned value function."""

    critic: Text | None = None
    """The reward model that the critic begins with; null: the first of `reward` with the policy's tokenizer. Where there is
    none, or under adapters its base is another, the policy's own weights."""


class RlooSettings(OnlineSettings):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740)."""


class GrpoSettings(OnlineSettings):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""


class OnlineDpoSettings(OnlineSettings):
    """DPO on pairs that the policy writes and the rewards order (Guo et al. 2024, arXiv 2402.04792); experimental in TRL."""
