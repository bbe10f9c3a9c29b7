"""The recipe: everything that a run is told, as frozen data that can be printed, saved and read back.

constitution: harmless
seed: 0
prompts: {source: red-team, limit: 24}
policy: {model: smollm2-135m}
judge: {model: null, method: choice, principles: 4}
generation: {candidates: 1, rounds: 2, max_tokens: 256}
dataset: {test_fraction: 0.1}
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cai.documents import Document, Part, dump, parse_scalar
from cai.errors import ConfigError

Text = Annotated[str, StringConstraints(min_length=1)]


class PromptsConfig(Part):
    """Where prompts come from."""

    source: Text = "red-team"
    """A built-in set (`red-team`, `benign`), a file, a `datasets` folder, a Hub dataset id, or `-` for standard input."""
    limit: int | None = Field(default=None, gt=0, le=10**12)
    """Use only the first so many rows; those that are no prompts count too."""
    column: Text | None = None
    """The column that holds the prompt; by default the first of the usual names that is there."""
    split: Text = "train"
    """The split of a Hub dataset or a `datasets` folder."""
    revision: Text | None = None
    """The revision of a Hub dataset (branch, tag or commit)."""
    subset: Text | None = None
    """The configuration of a Hub dataset."""


class ModelConfig(Part):
    """A model and how to run it."""

    model: Text = "smollm2-135m"
    """An alias (`smollm2-135m`), a folder, a Hub id, or `scripted:FILE.py:FUNCTION`."""
    revision: Text | None = None
    """The Hub revision (branch, tag or commit)."""
    device: Text | None = None
    """`cpu`, `cuda`, `cuda:1`, `mps`; by default the best there is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the machine computes in it, else float32."""
    batch_size: PositiveInt = 64
    """The most requests that are generated together."""
    batch_tokens: PositiveInt = 32768
    """The most tokens (prompts and what is generated, with padding) that one batch may hold; bounds memory."""
    exact: bool = False
    """Compute each request alone, in float32 unless `dtype` says otherwise: the same whatever else runs, and slower."""


class JudgeConfig(Part):
    """Who compares completions, and how."""

    model: Text | None = None
    """The judge's model; null: the policy's own."""
    revision: Text | None = None
    """The Hub revision of the judge's model."""
    method: Literal["choice"] = "choice"
    """`choice`: multiple choice by log-probability, in both orders."""
    principles: PositiveInt | Literal["all"] = 4
    """How many principles judge each pair, drawn anew for every pair; `all`: every one with a preference question."""

    @model_validator(mode="after")
    def _revision_of_a_model(self) -> JudgeConfig:
        if self.revision is not None and self.model is None:
            raise _wrong("revision", "names the revision of judge.model, which is not set; set it, or policy.revision")
        return self


class GenerationConfig(Part):
    """Answers, critiques and revisions."""

    candidates: int = Field(default=1, gt=0, le=1000)
    """How many completions the policy samples for each prompt. The first one is critiqued and revised."""
    rounds: int = Field(default=2, ge=0)
    """Rounds of critique and revision, each under another principle."""
    pairs: Literal["revision", "samples", "both"] = "revision"
    """What is compared: the original with its revision, the candidates among themselves, or both."""
    exemplars: int | None = Field(default=None, ge=0)
    """How many of the constitution's few-shot dialogues stand before each critique; null: all of them, 0: none."""
    max_tokens: PositiveInt = 256
    """The most tokens of one completion, critique or revision."""
    temperature: float = Field(default=0.7, ge=0, le=5)
    """Of sampling answers, critiques and revisions; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the smallest set of tokens with this much probability."""
    concurrency: int = Field(default=128, gt=0, le=10_000)
    """Prompts in flight at once. Changes speed and memory, never a request."""

    @model_validator(mode="after")
    def _pairs_can_be_made(self) -> GenerationConfig:
        if self.pairs != "revision" and self.candidates < 2:
            raise _wrong("pairs", f"{self.pairs} compares candidates; set generation.candidates to 2 or more")
        if self.pairs != "revision" and self.temperature == 0:
            raise _wrong("pairs", f"{self.pairs} compares candidates, all equal at temperature 0; raise generation.temperature")
        if self.pairs != "samples" and self.rounds < 1:
            raise _wrong("pairs", f"{self.pairs} compares revisions; set generation.rounds to 1 or more")
        return self


class DatasetConfig(Part):
    """The views of the records that are written. Changing these makes no model call."""

    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """The share of prompts, by hash of their text, whose rows go to the `test` split."""
    min_probability: float = Field(default=0.5, ge=0.5, lt=1)
    """Drop pairs whose `chosen_probability` is not above this; 0.5 drops only ties."""
    shard_rows: PositiveInt = 100_000
    """Rows in one Parquet file."""
    license: Text | None = None
    """The licence that the card names, as the Hub spells it (`cc-by-4.0`)."""


class Recipe(Part):
    """All of it."""

    constitution: Text = "harmless"
    """A built-in constitution's name or a path."""
    seed: int = 0
    """The run's seed; every draw is a hash of it, the prompt's id and the step."""
    policy: ModelConfig = ModelConfig()
    """The model that answers, criticises and revises."""
    judge: JudgeConfig = JudgeConfig()
    """The model that compares."""
    prompts: PromptsConfig = PromptsConfig()
    """What is answered."""
    generation: GenerationConfig = GenerationConfig()
    """How it is answered and revised."""
    dataset: DatasetConfig = DatasetConfig()
    """What is written of it."""

    @field_validator("policy", "judge", "prompts", "generation", "dataset", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def judge_model(self) -> ModelConfig:
        """The judge as an engine's configuration: the policy's settings with the judge's model in its place."""
        if self.judge.model is None:
            return self.policy
        return self.policy.model_copy(update={"model": self.judge.model, "revision": self.judge.revision})

    def to_yaml(self) -> str:
        """The resolved recipe, every key spelled out."""
        return dump(self.model_dump(mode="json"))


def _wrong(key: str, problem: str) -> PydanticCustomError:
    """What is wrong with one key of a section, seen only beside the others."""
    return PydanticCustomError("value_error", "{problem}", {"problem": problem, "at": (key,)})


def load_recipe(path: Path | None, overrides: list[tuple[str, object, str]]) -> Recipe:
    """A recipe from a file (or the defaults) with flags on top.

    `overrides` are (dotted key, value, the flag they came from). Raises `ConfigError` naming file, line, key and fix.
    A constitution or prompts that the recipe names by a path are looked for beside the recipe first.
    """
    document = Document.read(path) if path else Document("{}", "the command line")
    if path:
        _beside(document, path.parent, "constitution")
        _beside(document, path.parent, "prompts.source")
    for dotted, value, source in overrides:
        document.override(dotted, value, source)
    return document.validate(Recipe)


def _beside(document: Document, folder: Path, dotted: str) -> None:
    *sections, key = dotted.split(".")
    target: Any = document.data
    for section in sections:
        target = target.get(section) if isinstance(target, dict) else None
    value = target.get(key) if isinstance(target, dict) else None
    if isinstance(value, str) and value != "-" and _is_meant(folder / value, value):
        target[key] = str(folder / value)


def _is_meant(path: Path, value: str) -> bool:
    """Whether a path is what the recipe names: a plain word is no folder (`benign`, beside a run in `benign/`)."""
    return os.path.isfile(path) or ("/" in value and os.path.isdir(path))


def parse_set(assignment: str) -> tuple[str, object, str]:
    """`judge.principles=all` as an override."""
    key, equals, value = assignment.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {assignment}: expected key=value, for example --set judge.principles=all")
    return key.strip(), parse_scalar(value), f"--set {assignment}"
