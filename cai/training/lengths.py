"""Rows that are too long for the model or for `trl.max_length` are left out and counted; none is cut off within."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from cai.errors import ConfigError
from cai.training.data import StageData
from cai.weights import context_length

_ENDS = ("completion", "chosen", "rejected")


def drop_long_rows(data: StageData, tokenizer: Any, model_config: Any, limit: int | None) -> tuple[StageData, dict[str, int]]:
    """The data without them, and how many there were by split.

    `limit` is `trl.max_length`, in tokens. Raises `ConfigError` where nothing is left, or the limit is beyond the context.
    """
    context = context_length(model_config)
    if limit is not None and context is not None and limit > context:
        raise ConfigError(f"trl.max_length: {limit} is more than the {context} tokens of the model's context; lower it")
    longest = limit or context
    if longest is None:
        return data, {}
    kept = {name: _short(rows, tokenizer, longest) for name, rows in (("train", data.train), ("test", data.test)) if rows}
    if not len(kept["train"]):
        raise ConfigError(
            f"all {len(data.train)} rows are longer than {longest} tokens; raise trl.max_length, or use shorter rows"
        )
    dropped = {name: len(getattr(data, name)) - len(rows) for name, rows in kept.items()}
    test = kept.get("test")
    left = StageData(kept["train"], test if test is not None and len(test) else None, data.sources)
    return left, {name: count for name, count in dropped.items() if count}


def _short(rows: Dataset, tokenizer: Any, longest: int) -> Dataset:
    return rows.filter(lambda row: max(row_lengths(row, tokenizer)) <= longest, keep_in_memory=True)


def row_lengths(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """Tokens of each dialogue of a row, prompt and all."""
    prompt = row.get("prompt") or []
    ends = [row[name] for name in _ENDS if name in row]
    if isinstance(prompt, str):
        return [len(tokenizer(prompt + end)["input_ids"]) for end in ends]
    return [len(tokenizer.apply_chat_template([*prompt, *end], tokenize=True, return_dict=True)["input_ids"]) for end in ends]
