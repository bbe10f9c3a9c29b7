"""What every training stage is told.

model: smollm2-135m
data: [{source: runs/harmless}, {source: helpful.jsonl, weight: 0.5}]
lora: {rank: 16}
trl: {learning_rate: 1.0e-4, num_train_epochs: 1}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from cai.documents import Part, Text

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
