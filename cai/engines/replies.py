"""What a server's answers hold: completions, log-probabilities, rewards; and what its errors say.

An answer that cannot be used raises `Transient`: it may be right when it is asked for again. NaN is never a number.
What a server says is given whole, and may repeat the key: `Client.quoted` takes it out, and then cuts.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from cai.engines.base import GenerateRequest, Loglikelihood, Reward
from cai.errors import RequestError
from cai.types import Completion

if TYPE_CHECKING:
    import aiohttp

_decoder = msgspec.json.Decoder()
_MOST_BYTES = 100_000_000
"""Of an answer, unpacked; the log-probabilities of a prompt of a million tokens are less."""
_MOST_TOKENS = 2**53
_HIGHEST = 0.01
"""Of a log-probability, which rounding may lift above 0."""
_ODD = (LookupError, TypeError, AttributeError, ValueError, OverflowError)
"""What reading an answer of another form than expected raises."""


class Transient(Exception):
    """An attempt that failed and may succeed when it is made again; its text may hold the server's words."""

    def __init__(self, problem: str, after: float = 0.0, kind: str = "failed", status: int = 0) -> None:
        """`after`: seconds that the server asks to wait; `status`: that of the answer, 0 where there is none.

        `kind`: `failed`, `overloaded`, `away` (a gateway without its server), `absent` (nobody listens), or `no numbers`.
        """
        super().__init__(problem)
        self.after, self.kind, self.status = after, kind, status


class Refused(RequestError):
    """A request that is refused for what is in it, which says nothing about the next one."""


async def body_of(response: aiohttp.ClientResponse) -> bytes:
    """The body of an answer. Raises `Transient` where there is no end of it, or it unpacks to too much for the memory."""
    parts, size = [], 0
    while part := await response.content.readany():
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise Transient(f"an answer of more than {_MOST_BYTES / 1e6:.0f} MB, which no call can have")
    return b"".join(parts)


def decode(raw: bytes) -> Any:
    """JSON; NaN and Infinity, which Python's servers write and JSON has not, are read as such. Raises `Transient`."""
    try:
        return _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as exc:
        said = raw.decode("utf-8", "replace")
        raise Transient(f"the answer is not JSON, or cut off after {len(raw)} bytes: {said}") from exc


def total_tokens(said: Any) -> float:
    """The tokens that an answer says it cost; 0 where it says nothing."""
    return float(counted(said, "total_tokens"))


def counted(said: Any, kind: str, otherwise: int = 0) -> int:
    """How many tokens of a kind an answer says that it cost; `otherwise` where it says nothing that can be a count."""
    usage = said.get("usage") if isinstance(said, dict) else None
    value = usage.get(kind) if isinstance(usage, dict) else None
    return int(value) if isinstance(value, (int, float)) and 0 <= value < _MOST_TOKENS else otherwise


def message_of(raw: bytes) -> str:
    """What a server says of an error, in whatever form it says it."""
    try:
        said = json.loads(raw)
        error = said.get("error", said.get("detail", said.get("message", said)))
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = raw.decode("utf-8", "replace")
    return str(text)


def retry_after(header: str | None) -> float:
    """Seconds from now that a `Retry-After` names, as a number or as an HTTP date; 0 where it names nothing."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
        return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), 3600.0)
    except ValueError:
        pass
    try:
        return min(max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0), 3600.0)
    except (ValueError, TypeError):
        return 0.0


def _unusable(said: Any, what: str, kind: str = "failed") -> NoReturn:
    error = said.get("error") if isinstance(said, dict) else None
    told = error.get("message", error) if isinstance(error, dict) else error
    raise Transient(f"{what}{f': {told}' if told else ''}", kind=kind)


def read_completions(said: Any, request: GenerateRequest, size: int, count: int = 1) -> list[Completion | RequestError]:
    """The first `count` completions, or as many as there are; a `RequestError` in the place of one that cannot be.

    The first one carries the prompt's tokens, the others 0; the generated ones are shared out by the lengths of the texts.
    Raises `Transient` or `RequestError` where there is no completion at all.
    """
    try:
        read = [_text_of(choice) for choice in said["choices"][:count]]
        first = read[0]
        good = [one for one in read if isinstance(one, tuple)]
        prompt, lengths = counted(said, "prompt_tokens", size // 4), [len(text) + 1 for text, _ in good]
        made = _shared_out(counted(said, "completion_tokens", sum(lengths) // 4), lengths)
        tokens = zip([prompt, *[0] * len(good)], made, strict=False)
        whole = [one if isinstance(one, Exception) else Completion(*one, *next(tokens), request.seed) for one in read]
    except _ODD:
        _unusable(said, "an answer without a completion in it (no 'choices')")
    if isinstance(first, Exception) and not good:
        raise first
    return [one for one in whole if not isinstance(one, Transient)]


def _text_of(choice: Any) -> tuple[str, Any] | RequestError | Transient:
    """A completion's text, and why it ended; or why there is none."""
    message = choice.get("message")
    text = choice["text"] if message is None else message.get("content") or message.get("refusal") or ""
    if isinstance(text, list):  # in parts, of which a model's thinking is none of the answer
        text = "".join(part["text"] for part in text if part["type"] == "text")
    try:
        return str(text).strip(), _finish(choice.get("finish_reason"))
    except (RequestError, Transient) as exc:
        return exc


def _shared_out(total: int, sizes: Sequence[int]) -> list[int]:
    """A total in parts that are as the sizes are to each other, rounded so that they add up to it."""
    whole, marks = sum(sizes), [0, *accumulate(sizes)]
    return [total * end // whole - total * start // whole for start, end in pairwise(marks)]


def _finish(reason: Any) -> Any:
    if reason == "content_filter":
        raise Refused("the server's content filter cut this completion off")
    if reason == "error":
        raise Transient("the server ended this completion by an error")
    return "length" if reason in ("length", "max_tokens", "model_length") else "stop"


def _spend(said: Any, spent: list[int]) -> None:
    """Prompt tokens, and the one that every such question generates."""
    spent.append(counted(said, "prompt_tokens") + counted(said, "completion_tokens"))


def read_texts(said: Any, spent: list[int]) -> Mapping[str, float]:
    """The likeliest next tokens as texts; `spent` gets the tokens that were paid for."""
    try:
        logprobs = said["choices"][0]["logprobs"]
        if "content" in logprobs:
            top = logprobs["content"][0]["top_logprobs"]
            pairs = [(_token_text(one), float(one["logprob"])) for one in top]
        else:
            pairs = [(token, float(value)) for token, value in logprobs["top_logprobs"][0].items()]
    except _ODD:
        _unusable(said, "an answer without log-probabilities", "no numbers")
    found: dict[str, float] = {}
    for token, value in pairs:
        if not value <= _HIGHEST:
            raise Transient(f"a log-probability is {value}, which none can be", kind="no numbers")
        if value > -9000:  # vLLM's -9999 and others' -inf stand for none
            found.setdefault(token, value)
    if not found:
        raise Transient("an answer without log-probabilities", kind="no numbers")
    _spend(said, spent)
    return found


def _token_text(one: Mapping[str, Any]) -> str:
    """A token's text; by its bytes, which are right where its text shows a part of a character."""
    given = one.get("bytes")
    return bytes(given).decode("utf-8", "replace") if given else str(one["token"])


def read_ids(said: Any, tokens: Sequence[int], spent: list[int]) -> Mapping[int, float]:
    """The log-probabilities of the tokens that were asked for."""
    try:
        top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = {str(one["token"]).removeprefix("token_id:"): float(one["logprob"]) for one in top}
        values = {token: found[str(token)] for token in tokens}
    except _ODD:
        _unusable(said, "an answer without the log-probabilities that were asked for", "no numbers")
    _all_numbers(values.values())
    _spend(said, spent)
    return values


def _all_numbers(values: Any) -> None:
    if not all(-math.inf < value <= _HIGHEST for value in values):
        raise Transient("a log-probability is above 0, or not a finite number", kind="no numbers")


def read_token_list(said: Any) -> list[int]:
    """What `/tokenize` answers."""
    try:
        return [int(one) for one in said["tokens"]]
    except _ODD:
        _unusable(said, "no tokens in the answer of /tokenize")


def read_prompt_sum(said: Any, alone: list[int]) -> Loglikelihood:
    """Over the tokens from where they begin to differ from the dialogue's alone."""
    try:
        entries = [next(iter(one.items())) if one else None for one in said["prompt_logprobs"]]
        same = next((i for i, one in enumerate(entries) if one and (i >= len(alone) or int(one[0]) != alone[i])), len(entries))
        values = [float(one[1]["logprob"]) for one in entries[same:] if one]
    except _ODD:
        _unusable(said, "an answer without the prompt's log-probabilities", "no numbers")
    return _summed(values, said)


def read_echo_sum(said: Any, start: int) -> Loglikelihood:
    """Over the tokens that end behind the place where the continuation begins."""
    try:
        logprobs = said["choices"][0]["logprobs"]
        ends = [*logprobs["text_offset"][1:], math.inf]
        values = [float(value) for value, end in zip(logprobs["token_logprobs"], ends, strict=True) if end > start]
    except _ODD:
        _unusable(said, "an answer without the prompt's log-probabilities", "no numbers")
    return _summed(values, said)


def _summed(values: list[float], said: Any) -> Loglikelihood:
    if not values:
        raise Refused("a continuation has no tokens of its own: there is nothing to score")
    _all_numbers(values)
    spent: list[int] = []
    _spend(said, spent)
    return Loglikelihood(sum(values), len(values), sum(spent))


def read_reward(said: Any) -> Reward:
    """The one output of a served classifier."""
    numbers = reward_numbers(said)
    if len(numbers) != 1 or not math.isfinite(numbers[0]):
        _unusable(said, f"expected one reward, got {numbers[:4]}", "no numbers")
    return Reward(numbers[0], counted(said, "prompt_tokens"))


def reward_numbers(said: Any) -> list[float]:
    """The outputs of a served classifier, in any of the forms that vLLM gives them."""
    try:
        data = said["data"][0]
        values = data.get("data", data.get("probs"))
        while values and isinstance(values[0], list):
            values = values[0]
        return [float(value) for value in values]
    except _ODD:
        return []
