"""Rows that are too long for the model or for `trl.max_length` are left out and counted; none is cut off within."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset

from cai.errors import ConfigError
from cai.training.data import StageData

_ENDS = ("completion", "chosen", "rejected")


def drop_long_rows(data: StageData, tokenizer: Any, limit: int | None) -> tuple[StageData, dict[str, int]]:
    """The data without rows of more than `limit` tokens, and how many there were by split.

    Raises `ConfigError` where nothing is left to train on.
    """
    if limit is None:
        return data, {}
    train, test = _short(data.train, tokenizer, limit), data.test and _short(data.test, tokenizer, limit)
    if not len(train):
        count = len(data.train)
        if "columns" in data.train.column_names:
            raise ConfigError(
                f"all {count} prompts are longer than the {limit} tokens that completions leave of the model's context, of a "
                "reward model's, or of trl.vllm_max_model_length; lower trl.max_completion_length (of online-dpo "
                "trl.max_new_tokens), or use shorter prompts"
            )
        raise ConfigError(f"all {count} rows are longer than {limit} tokens; raise trl.max_length, or use shorter rows")
    dropped = {"train": len(data.train) - len(train), "test": len(data.test or ()) - len(test or ())}
    return replace(data, train=train, test=test or None), {name: count for name, count in dropped.items() if count}


def _short(rows: Dataset, tokenizer: Any, longest: int) -> Dataset:
    return rows.filter(lambda row: max(row_lengths(row, tokenizer)) <= longest, keep_in_memory=True)


def row_lengths(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """Tokens of each dialogue of a row, prompt and all."""
    dialogues = [[*row["prompt"], *row[name]] for name in _ENDS if name in row]
    if not dialogues:
        return [_length(row["prompt"], tokenizer, add_generation_prompt=True)]
    return [_length(one, tokenizer) for one in dialogues]


def _length(dialogue: list[dict[str, str]], tokenizer: Any, **more: bool) -> int:
    return len(tokenizer.apply_chat_template(dialogue, tokenize=True, return_dict=True, **more)["input_ids"])
