"""One row of any source becomes a `Prompt`, or a `RowError` that says why it cannot.

A prompt is a string, a list of messages, or a transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."), under any of the usual
column names. Where a row holds whole dialogues (`messages`, `chosen`), the assistant's last turn is left off.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec

from cai.errors import RowError, nearest
from cai.types import Message, Messages, Prompt, Role, without_surrogates

COLUMNS = ("prompt", "messages", "conversations", "question", "instruction", "text", "chosen", "input", "query")
_IDS = ("id", "prompt_id")
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_SPEAKER = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ \t]?")


def to_prompt(row: Any, column: str | None = None) -> Prompt:
    """The prompt of a row: a string, a list of messages, or a mapping with one of `COLUMNS` (or `column`)."""
    if not isinstance(row, Mapping):
        messages = _messages(row, "the row")
        return Prompt(_digest(messages), messages)
    name = column or _prompt_column(row)
    if name is None or row.get(name) is None:
        raise RowError(_no_prompt(row, column))
    messages = _messages(row[name], f"'{name}'")
    return Prompt(_row_id(row) or _digest(messages), messages, _category(row))


def _prompt_column(row: Mapping[Any, Any]) -> str | None:
    """The first of `COLUMNS` that has something in it, or is there at all."""
    present = [name for name in COLUMNS if row.get(name) is not None]
    return next((name for name in present if row[name] not in ("", [])), next(iter(present), None))


def _no_prompt(row: Mapping[Any, Any], column: str | None) -> str:
    name = column or next((one for one in COLUMNS if one in row), None)
    if name is None:
        what = "no prompt"
    else:
        what = f"'{name}' is empty" if name in row else f"no column '{name}'{nearest(name, map(str, row))}"
    here = ", ".join(map(str, row)) or "none"
    return without_surrogates(
        f"{what}; columns here: {here:.200}; expected one of {', '.join(COLUMNS)} (or, to generate, set prompts.column)"
    )


def _category(row: Mapping[Any, Any]) -> str | None:
    value = row.get("category")
    if value is not None and not isinstance(value, str | int | float):
        raise RowError(f"its category is {type(value).__name__} ({reprlib.repr(value)}); expected a text")
    return None if value is None else without_surrogates(str(value))


def _row_id(row: Mapping[Any, Any]) -> str | None:
    value = next((row[name] for name in _IDS if row.get(name) is not None), None)
    if value is None:
        return None
    if not isinstance(value, str | int) or isinstance(value, bool) or len(str(value)) > 200 or not str(value).strip():
        raise RowError(f"its id is {reprlib.repr(value)}; expected a text of 1 to 200 characters or a whole number")
    return without_surrogates(str(value))


def _digest(messages: Messages) -> str:
    return hashlib.sha256(msgspec.json.encode(messages)).hexdigest()[:16]


def _messages(value: Any, where: str) -> Messages:
    if isinstance(value, str):
        turns = _transcript(value) if value.lstrip("\n").startswith("Human:") else [Message("user", without_surrogates(value))]
    elif isinstance(value, list | tuple):
        turns = [_turn(item, f"{where}[{index}]") for index, item in enumerate(value)]
    else:
        raise RowError(f"{where} is {type(value).__name__} ({reprlib.repr(value)}); expected a text or a list of messages")
    while turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or not turns[-1].content.strip():
        raise RowError(f"{where} is empty: there is no user's turn with text to answer")
    if turns[-1].role != "user":
        raise RowError(f"{where} ends with a {turns[-1].role} message; expected it to end with the user's")
    return tuple(turns)


def _turn(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} is {type(item).__name__}; expected a message with 'role' and 'content'")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise RowError(f"{where} has the role {reprlib.repr(role)}; expected system, user or assistant")
    if not isinstance(content, str):
        raise RowError(f"{where} has {type(content).__name__} as its content; expected a text")
    return Message(_ROLES[role.lower()], without_surrogates(content))


def _transcript(text: str) -> list[Message]:
    """A dialogue in the format of the HH data: turns begin with Human: or Assistant: after an empty line.

    Two turns of one speaker in a row are one, as chat templates want speakers that alternate.
    """
    parts = _SPEAKER.split(text.lstrip("\n"))
    names: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    turns: list[Message] = []
    for name, turn in zip(parts[1::2], parts[2::2], strict=True):
        content = without_surrogates(turn.strip())
        if turns and turns[-1].role == names[name]:
            content = f"{turns.pop().content}\n\n{content}".strip()
        turns.append(Message(names[name], content))
    return turns
