"""A tokenizer with its chat template, through which no text can speak the template's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from cai.config import ModelConfig
from cai.control_tokens import neutralizer
from cai.engines.local_model import Tail
from cai.errors import ConfigError, RequestError
from cai.models import ModelPlace
from cai.types import Messages
from cai.weights import load_tokenizer


class ChatTokenizer:
    """Dialogues as text and text as tokens."""

    def __init__(self, config: ModelConfig, place: ModelPlace | None = None) -> None:
        """Load the model's tokenizer. Raises `ConfigError` where it has no chat template."""
        self._model = config.model
        self.tokenizer: Any = load_tokenizer(config, place)
        if not self.tokenizer.chat_template:
            raise ConfigError(f"model '{config.model}' has no chat template; use an instruct model, or add chat_template.jinja")
        self.neutral = neutralizer(self.tokenizer)
        """Of a text, the same with a space inside each control token."""

    def render(self, messages: Messages, answer: bool = True) -> str:
        """The dialogue as the template writes it, ready for the assistant's answer (or the rest of its last message)."""
        turns = [{"role": message.role, "content": self.neutral(message.content)} for message in messages]
        goes_on = answer and messages[-1].role == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=answer and not goes_on, continue_final_message=goes_on
            )
        except (jinja2.TemplateError, ValueError) as exc:
            raise RequestError(f"the chat template of '{self._model}' refuses this dialogue: {exc}") from exc
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Tokens, none added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """Text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def tail(self, messages: Messages, choices: Sequence[str]) -> Tail:
        """The prompt's tokens and each choice's, cut where the tokens of all choices begin to differ from the prompt's.

        Prompt and choice are encoded as one text, since tokens may merge across the seam.
        """
        prompt = self.render(messages)
        alone = self.encode(prompt)
        joint = [self.encode(prompt + self.neutral(choice)) for choice in choices]
        seam = len(alone)
        while seam > 0 and any(tokens[:seam] != alone[:seam] for tokens in joint):
            seam -= 1
        if not all(len(tokens) > seam for tokens in joint):
            raise RequestError("a choice or continuation is empty: there are no tokens to score")
        return Tail(alone[:seam], [tokens[seam:] for tokens in joint])
