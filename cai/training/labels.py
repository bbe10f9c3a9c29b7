"""Soft labels on their way from a row to the loss: past the columns that TRL's trainers drop, and into a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Labelled:
    """TRL's collator, with the labels of its rows beside what it makes of them."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    column: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch; labels of shape (pairs,), or (pairs, outputs) where a row has several."""
        labels = torch.tensor([one[self.column] for one in examples], dtype=torch.float32)
        return {**self.collator(examples), self.column: labels}


def keep_column(trainer: Any, column: str) -> None:
    """Make a trainer, whose own columns are known, hand this one on to its collator as well."""
    columns: list[str] = trainer._signature_columns
    if column not in columns:
        columns.append(column)
