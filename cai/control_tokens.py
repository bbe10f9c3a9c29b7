"""Tokens that only a chat template may speak, and texts made unable to speak them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

THOUGHTS = frozenset({"<think>", "</think>"})
"""Marks that a model writes around a thought of its own."""


def control_tokens(tokenizer: Any) -> list[str]:
    """Special tokens, and added ones that the tokenizer's template speaks; added tokens such as line breaks are text."""
    template = str(tokenizer.chat_template)
    added = [(str(token), token.special) for token in tokenizer.added_tokens_decoder.values()]
    return [text for text, special in added if text.strip() and (special or (len(text) > 1 and text in template))]


def neutralizer(tokenizer: Any, keep: Collection[str] = ()) -> Callable[[str], str]:
    """A function that puts a space into each control token of a text but for those in `keep`."""
    tokens = sorted((re.escape(one) for one in control_tokens(tokenizer) if one not in keep), key=len, reverse=True)
    if not tokens:
        return str
    pattern = re.compile("|".join(tokens))
    return lambda text: pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
