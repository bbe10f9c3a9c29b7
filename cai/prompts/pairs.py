"""Pairs of completions with a label from people, read from whatever source prompts are read from.

A row of the HH data, abridged (whole dialogues; the prompt is what they share):

    {"chosen": "\\n\\nHuman: Is it possible to download a car?\\n\\nAssistant: I'm not sure what you mean. Can you clarify?",
     "rejected": "\\n\\nHuman: Is it possible to download a car?\\n\\nAssistant: I'm sorry, I don't understand."}

The dialogues may also be lists of messages. Where a row has a prompt of its own, `chosen` and `rejected` may be only the
answers: texts, or lists of the assistant's messages, as in the `preference` view of a run.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import msgspec

from cai.config import PromptsConfig
from cai.errors import RowError, nearest
from cai.prompts.rows import COLUMNS, _digest, _row_id, _transcript, _turn, to_prompt
from cai.prompts.sources import Row, read_rows
from cai.types import Message, Messages, Prompt, without_surrogates

_ANSWERS = ("chosen", "rejected")
_PROMPTS = tuple(name for name in COLUMNS if name not in _ANSWERS)
_LONGEST_ID = 200


class Pair(NamedTuple):
    """Two completions of a prompt, without space around them; people preferred `chosen`. `prompt.id` is the pair's."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_pairs(config: PromptsConfig) -> Iterator[Row]:
    """The rows of a source, one at a time, up to `limit`; given with each prompt are the better completion and the worse one.

    Raises `ConfigError` at once where there is no such source, `PromptSourceError` where it cannot be read.
    """
    return read_rows(config, lambda raw: _parts(to_pair(raw, config.column)))


def _parts(pair: Pair) -> tuple[Prompt, tuple[str, ...]]:
    return pair.prompt, (pair.chosen, pair.rejected)


def to_pair(row: Any, column: str | None = None) -> Pair:
    """The pair of a row: a mapping with `chosen` and `rejected`, and a prompt in `column` unless they are whole dialogues.

    The pair's id is its `pair_id` or `id`, else made of its texts: pairs may share a prompt, and so a `prompt_id`.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__} ({reprlib.repr(row)}); expected columns 'chosen' and 'rejected'")
    for name in _ANSWERS:
        if row.get(name) is None:
            raise RowError(_noanswer(row, name))
    context, chosen = answer(row["chosen"], "'chosen'")
    other_context, rejected = answer(row["rejected"], "'rejected'")
    if context != other_context:
        raise RowError(_difference(context, other_context))
    if chosen == rejected:
        raise RowError("'chosen' and 'rejected' are equal; expected two different completions")
    prompt = _prompt(row, column, context)
    return Pair(msgspec.structs.replace(prompt, id=_pair_id(row, prompt, chosen, rejected)), chosen, rejected)


def _noanswer(row: Mapping[Any, Any], name: str) -> str:
    what = f"'{name}' is empty" if name in row else f"no column '{name}'{nearest(name, map(str, row))}"
    return without_surrogates(
        f"{what}; columns here: {', '.join(map(str, row)) or 'none':.200}; expected the better completion in 'chosen', the "
        "worse one in 'rejected', and 'prompt' unless both are whole dialogues"
    )


def answer(value: Any, where: str) -> tuple[Messages, str]:
    """What comes before the answer, if anything does, and the answer: the assistant's last turn, even if it is in parts."""
    turns, parts = _turns(value, where), list[str]()
    while turns and turns[-1].role == "assistant":
        parts.append(turns.pop().content)
    if turns and not parts:
        raise RowError(f"{where} ends with a {turns[-1].role} message; expected it to end with the assistant's answer")
    answer = "\n\n".join(reversed(parts)).strip()
    if not answer:
        raise RowError(f"{where} is empty: there is no assistant's turn with text")
    return tuple(turns), answer


def _turns(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        is_dialogue = value.startswith("\n\nHuman:") or (
            value.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in value  # else an answer that begins so
        )
        return _transcript(value) if is_dialogue else [Message("assistant", without_surrogates(value))]
    if isinstance(value, list | tuple):
        return [_turn(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise RowError(f"{where} is {type(value).__name__} ({reprlib.repr(value)}); expected a text or a list of messages")


def _difference(context: Messages, other: Messages) -> str:
    turn = next(number for number, (one, two) in enumerate(zip_longest(context, other), 1) if one != two)
    return f"'chosen' and 'rejected' do not answer the same dialogue: they differ from turn {turn} on"


def _prompt(row: Mapping[Any, Any], column: str | None, context: Messages) -> Prompt:
    """The prompt that both answer: what the dialogues share, which must agree with the row's own prompt, or that one."""
    name = column or next((name for name in _PROMPTS if row.get(name) not in (None, "", [])), "chosen")
    if not context and name in _ANSWERS:
        raise RowError(
            f"no prompt: 'chosen' and 'rejected' are only answers; expected one of {', '.join(_PROMPTS)} (or set "
            "prompts.column), or dialogues: lists of messages, or texts that begin with 'Human:'"
        )
    prompt = to_prompt(row, name)
    if not context or name in _ANSWERS:
        return prompt
    if context[-len(prompt.messages) :] != prompt.messages:
        raise RowError(
            f"'{name}' is not what 'chosen' and 'rejected' answer: their dialogues end otherwise (to go by these alone, set "
            "prompts.column to chosen)"
        )
    return to_prompt(row, "chosen")


def _pair_id(row: Mapping[Any, Any], prompt: Prompt, chosen: str, rejected: str) -> str:
    own = row.get("pair_id")
    if isinstance(own, str) and len(own) > _LONGEST_ID:  # a run's own are longer than their prompt's, which may be as long
        own = None
    if own is not None or row.get("id") is not None:
        return _row_id({"id": own}) or prompt.id
    return _digest((*prompt.messages, Message("assistant", chosen), Message("assistant", rejected)))
