"""A prompt with one completion, in any of TRL's conversational formats, or with the two of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cai.config import PromptsConfig
from cai.errors import RowError, nearest
from cai.prompts.pairs import answer, to_pair
from cai.prompts.rows import _digest, _row_id, to_prompt
from cai.prompts.sources import Row, read_rows
from cai.types import Messages, Prompt, without_surrogates

_DIALOGUES = ("messages", "conversations")


def read_completions(config: PromptsConfig) -> Iterator[Row]:
    """The rows of a source, one at a time, up to `limit`; given is one completion, or of a pair the better and the worse one.

    Raises `ConfigError` at once where there is no such source, `PromptSourceError` where it cannot be read.
    """
    return read_rows(config, _parts)


def _parts(row: Any) -> tuple[Prompt, tuple[str, ...]]:
    if isinstance(row, Mapping) and row.get("chosen") is not None and row.get("rejected") is not None:
        pair = to_pair(row)
        return pair.prompt, (pair.chosen, pair.rejected)
    before, completion = to_completion(row)
    return Prompt(_row_id(row) or _digest(before), before), (completion,)


def to_completion(row: Any) -> tuple[Messages, str]:
    """What comes before the assistant's last turn, and that turn: of `messages`, or of `prompt` and `completion`.

    Raises `RowError` where the row is neither.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}; expected columns")
    if row.get("completion") is None:
        return _last_turn(row)
    before, completion = answer(row["completion"], "'completion'")
    if before:
        raise RowError("'completion' holds more than the assistant's turn; put what comes before it into 'prompt'")
    return to_prompt(row, "prompt").messages, completion


def _last_turn(row: Mapping[Any, Any]) -> tuple[Messages, str]:
    name = next((name for name in _DIALOGUES if row.get(name)), None)
    if name is None:
        raise RowError(_no_completion(row))
    before, completion = answer(row[name], f"'{name}'")
    if not any(turn.role == "user" for turn in before):
        raise RowError(f"'{name}' has no user's turn before the assistant's last")
    return before, completion


def _no_completion(row: Mapping[Any, Any]) -> str:
    return without_surrogates(
        f"no column 'messages'{nearest('messages', map(str, row))}, nor 'completion'; columns here: "
        f"{', '.join(map(str, row)) or 'none':.200}; expected 'messages' (a dialogue that ends with the assistant's turn), or "
        "'prompt' and 'completion'"
    )
