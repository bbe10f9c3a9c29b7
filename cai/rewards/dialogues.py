"""Whole dialogues as the tokens that a reward model reads: in training, at its end and wherever it is used after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from cai.control_tokens import THOUGHTS, neutralizer
from cai.errors import RequestError

Dialogue = Sequence[Mapping[str, str]]
"""Turns, each a mapping with `role` and `content`."""


class DialogueTokenizer:
    """A tokenizer with its chat template, through which no text can speak the template's own tokens.

    The assistant's own thoughts stay marked (`<think>`).
    """

    def __init__(self, tokenizer: Any, model: str) -> None:
        """`model` is what errors call it."""
        self.tokenizer, self.model = tokenizer, model
        self._neutral, self._own = neutralizer(tokenizer), neutralizer(tokenizer, keep=THOUGHTS)

    def encode(self, dialogue: Dialogue) -> list[int]:
        """The dialogue's tokens, without a prompt for an answer. Raises `RequestError` where the template refuses it."""
        turns = [{"role": turn["role"], "content": self._change(turn)} for turn in dialogue]
        try:
            return list(self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"])
        except (jinja2.TemplateError, ValueError) as exc:
            raise RequestError(f"the chat template of '{self.model}' refuses this dialogue: {exc}") from exc

    def _change(self, turn: Mapping[str, str]) -> str:
        return self._own(turn["content"]) if turn["role"] == "assistant" else self._neutral(turn["content"])


def completion_length(dialogue: Dialogue) -> int:
    """Characters of the last turn."""
    return len(dialogue[-1]["content"])
