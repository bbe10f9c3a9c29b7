"""The `openai` engine: any server that speaks OpenAI's API (vLLM, SGLang, TGI, llama.cpp, Ollama, hosted ones).

Answers come from chat completions, where the server applies its chat template, or from plain completions of a
`Human:`/`Assistant:` text. What else there is depends on the server and is found out by a few one-token questions
(`probe.py`) when it is first needed: `choice_logprobs` wants log-probabilities of next tokens, `loglikelihood` those of a
prompt. Where a server does not go on with a last assistant message, it is told in words what its answer should complete.
The fingerprint holds the model, the form of the API, and a hash of `extra_body`; no URL and no key.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import msgspec

from cai.config import ModelConfig
from cai.engines.base import (
    BatchWork,
    Capability,
    ChoiceLogprobs,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    Reward,
    RewardRequest,
    all_answered,
)
from cai.engines.batch_api import check_batches
from cai.engines.batches import Batches
from cai.engines.choices import Spelled, by_ids, by_text
from cai.engines.http import Client, Post
from cai.engines.probe import CONTINUE, Facts, probe, with_extra
from cai.engines.replicas import check_replicas
from cai.engines.replies import (
    read_completions,
    read_echo_sum,
    read_ids,
    read_prompt_sum,
    read_reward,
    read_texts,
    read_token_list,
)
from cai.engines.together import Together
from cai.errors import RequestError
from cai.store import Database
from cai.types import Completion, Message, Messages

Answer = TypeVar("Answer")
_CONTROL = re.compile(r"<(?=[|｜]\w[\w▁ -]*[|｜]>|/?s>|(?:start|end)_of_turn>)|\[(?=/?INST\])")
"""Where texts would speak a chat template's own tokens."""
_TURN = re.compile(r"\n\n(?=(?:Human|Assistant):)")
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_TAIL = 48
"""Characters of a last assistant message that decide how a choice after it is cut into tokens."""
_SHARED = 4
"""From so many prompts that share a beginning, one goes ahead, so that the others find the beginning computed."""
_WORDS = "\n\n(Answer with one of these and nothing else: {choices}. It completes the sentence: {start})"


class OpenAIEngine(Engine):
    """A served model behind the Engine Protocol."""

    revision: str | None = None

    def __init__(self, config: ModelConfig, reward: bool = False, section: str = "policy.server") -> None:
        """`section` is what errors call the recipe's section. Raises `ConfigError` for a key that is not there."""
        self._config, self._server, self._reward, self._section = config, config.server, reward, section
        self._urls = list(dict.fromkeys(url.rstrip("/") for url in (config.model, *config.server.replicas)))
        self._client = self._new_client()
        self._batches = Batches(self._client, config.server) if config.server.batch else None
        self._together = Together(self._complete) if config.server.n else None
        self._known: Facts | None = None
        self._probing = threading.Lock()
        self._spellings: dict[tuple[str | None, tuple[str, ...]], asyncio.Future[tuple[int, list[Spelled]] | None]] = {}

    def _new_client(self) -> Client:
        return Client(self._urls, self._server, self._section)

    @property
    def facts(self) -> Facts:
        """What the server is and can; asked once. Raises `ConfigError`."""
        if self._known is not None:
            return self._known
        with self._probing:
            if self._known is None:
                with ThreadPoolExecutor(1) as thread:  # there may be a running loop here
                    self._known = thread.submit(asyncio.run, self._probe()).result()
        return self._known

    async def _probe(self) -> Facts:
        client = self._new_client()
        try:
            if self._server.batch:
                await check_batches(client)
            facts = await probe(client, self._server, self._reward)
            await check_replicas(self._urls, self._server, self._section, facts.model)
            return facts
        finally:
            self._client.models, self._client.is_accepted = client.models, client.is_accepted
            await client.close()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the server was found to offer."""
        facts, able = self.facts, set[Capability]()
        if facts.reward:
            return frozenset({"reward"})
        able.add("generate")
        if facts.top or facts.token_ids:
            able.add("choice_logprobs")
        if facts.prompt_logprobs:
            able.add("loglikelihood")
        return frozenset(able)

    @property
    def fingerprint(self) -> str:
        """The model's name and what the server says it stands for, the form of the API, whether with `n`, `extra_body`."""
        facts = self.facts
        name = facts.model if facts.weights == facts.model else f"{facts.model}={facts.weights}"
        form = facts.reward or f"{self._server.api}{' n' if self._together else ''}"
        extra = self._server.extra_body
        more = f" extra {hashlib.sha256(msgspec.json.encode(extra, order='deterministic')).hexdigest()[:12]}" if extra else ""
        return f"openai:{name} {form}{more}"

    @property
    def choice_form(self) -> str:
        """Exact, or from how many of the likeliest tokens: what another version of the server may offer otherwise."""
        facts = self.facts
        if facts.token_ids:
            return "choices by token"
        return f"choices by top-{facts.top} {'in words' if facts.prefill == 'none' else 'prefilled'}" if facts.top else ""

    def keep_batches(self, database: Database, work: BatchWork) -> None:
        """Where to note the batches that are handed to the server."""
        if self._batches:
            self._batches.keep(database, work)

    # -- requests -------------------------------------------------------------------------------------------------------

    def _post(self, path: str, tokens: int, kind: Any, **fields: Any) -> Post:
        try:
            body = with_extra({"model": self.facts.model, **fields}, self._server.extra_body)
        except UnicodeEncodeError as exc:
            raise RequestError("a text of this dialogue holds lone surrogates, which no request can carry") from exc
        return Post(path, body, len(body) / 4 + tokens, kind)

    async def _send(self, call: Post, read: Callable[[Any], Answer]) -> Answer:
        """At once, or in a batch."""
        if self._batches and call.path in (_CHAT, _TEXT):
            return await self._batches.post(call, read)
        return await self._client.post(call, read)

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `RequestError`, and `ContextLengthError` where the server says so."""
        if self.facts.reward:
            return await super().generate(request)
        if self._together and request.temperature > 0:
            return await self._together.generate(request)
        [answer] = await self._complete(request)
        assert isinstance(answer, Completion)
        return answer

    async def _complete(self, request: GenerateRequest, count: int = 1) -> list[Completion | RequestError]:
        """So many completions, or fewer; see `read_completions`."""
        facts, chat = self.facts, self._server.api == "chat"
        fields: dict[str, Any] = {
            **(self._dialogue(request.messages) if chat else {"prompt": plain_text(request.messages)}),
            facts.limit: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.top_p < 1:
            fields["top_p"] = request.top_p
        if stop := [*request.stop, *([] if chat else ["\n\nHuman:"])]:
            fields["stop"] = stop
        if count > 1:
            fields["n"] = count
        most = count * request.max_tokens
        call = self._post(_CHAT if chat else _TEXT, most, (request.max_tokens, count), **fields)
        return await self._send(call, lambda said: read_completions(said, request, len(call.body), count))

    def _dialogue(self, messages: Messages, more: str = "") -> dict[str, Any]:
        """The messages as the chat API takes them, the last one with `more` at its end."""
        shown = _neutral(messages)
        if more:
            shown[-1] = Message(shown[-1].role, shown[-1].content + more)
        goes_on = messages[-1].role == "assistant" and self.facts.prefill == "fields"
        return {"messages": shown, **(CONTINUE if goes_on else {})}

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Each choice after each prompt; see `choices.py` for what is exact and what is a bound.

        Of many prompts one goes ahead where the server is vLLM, so that the others find the shared beginning in its cache.
        """
        if not (self.facts.top or self.facts.token_ids):
            return await super().choice_logprobs(prompts, choices)
        ahead = 1 if len(prompts) >= _SHARED and self.facts.token_ids and not self._batches else 0
        first = [await self._choose(prompt, choices) for prompt in prompts[:ahead]]
        return await all_answered((self._choose(prompt, choices) for prompt in prompts[ahead:]), first)

    async def _choose(self, messages: Messages, choices: Sequence[str]) -> ChoiceLogprobs:
        spent: list[int] = []
        spelled = await self._spell(messages, tuple(choices)) if self.facts.token_ids else None
        if spelled:
            cut, spellings = spelled

            async def ask_ids(before: str, tokens: Sequence[int]) -> Mapping[int, float]:
                return await self._next_ids(_continued(messages, before, cut), tokens, spent)

            return ChoiceLogprobs(tuple(await by_ids(ask_ids, spellings)), sum(spent))
        asked, goes_on = self._prefilled(messages, choices)

        async def ask(before: str) -> Mapping[str, float]:
            return await self._next_texts(_continued(asked, before) if before else asked, spent)

        begins = asked[-1].role != "assistant"
        return ChoiceLogprobs(tuple(await by_text(ask, choices, begins, goes_on)), sum(spent))

    def _prefilled(self, messages: Messages, choices: Sequence[str]) -> tuple[Messages, bool]:
        """The prompt in a form that the server can go on with, and whether it can go on from a part of a choice."""
        if self.facts.prefill != "none":
            return messages, True
        if messages[-1].role != "assistant" or len(messages) < 2:
            return messages, False
        start = messages[-1].content.rstrip().rsplit("\n", 1)[-1]
        words = _WORDS.format_map({"choices": ", ".join(choices), "start": start})
        *before, user, last = messages
        if len(last.content) > len(start) + 2:  # a thought, which has to be read before the choice is asked for
            return (*before, user, last, Message("user", words.strip())), False
        return (*before, Message(user.role, user.content + words)), False

    async def _next_texts(self, messages: Messages, spent: list[int]) -> Mapping[str, float]:
        """The likeliest next tokens."""
        top = self.facts.top
        if self._server.api == "chat":
            fields = {**self._dialogue(messages), self.facts.limit: 1, "logprobs": True, "top_logprobs": top}
            call = self._post(_CHAT, 1, "choice", **fields, temperature=1.0, seed=0)
        else:
            call = self._post(
                _TEXT, 1, "choice", prompt=plain_text(messages), max_tokens=1, logprobs=top, temperature=1.0, seed=0
            )
        return await self._send(call, lambda said: read_texts(said, spent))

    async def _next_ids(self, messages: Messages, tokens: Sequence[int], spent: list[int]) -> Mapping[int, float]:
        """Chosen next tokens (vLLM)."""
        asked = {"logprobs": True, "logprob_token_ids": list(tokens), "return_tokens_as_token_ids": True}
        fields = {**self._dialogue(messages), self.facts.limit: 1, "temperature": 1.0, "seed": 0, **asked}
        return await self._send(self._post(_CHAT, 1, "choice", **fields), lambda said: read_ids(said, tokens, spent))

    # -- tokens (vLLM) --------------------------------------------------------------------------------------------------

    async def _tokens(self, messages: Messages) -> list[int]:
        goes_on = messages[-1].role == "assistant"
        extra = self._server.extra_body
        fields: dict[str, Any] = {key: extra[key] for key in ("chat_template", "chat_template_kwargs") if key in extra}
        shown = {"messages": _neutral(messages), **(CONTINUE if goes_on else {})}
        body: dict[str, Any] = {"model": self.facts.model, **shown, **fields}
        return await self._send(Post("/tokenize", msgspec.json.encode(body), 0, "tokenize"), read_token_list)

    async def _spell(self, messages: Messages, choices: tuple[str, ...]) -> tuple[int, list[Spelled]] | None:
        """The choices in tokens after such an ending, and how many characters of it they take in; None: not by tokens."""
        ending = messages[-1].content[-_TAIL:] if messages[-1].role == "assistant" else None
        key = ending, choices
        if key not in self._spellings:
            self._spellings[key] = asyncio.ensure_future(self._spell_after(ending, choices))
            if len(self._spellings) > 4096:
                self._spellings.pop(next(iter(self._spellings)))
        try:
            return await asyncio.shield(self._spellings[key])
        except BaseException:
            self._spellings.pop(key, None)
            raise

    async def _spell_after(self, ending: str | None, choices: tuple[str, ...]) -> tuple[int, list[Spelled]] | None:
        before, start = (Message("user", "."),), ending or ""
        alone = await self._tokens((*before, Message("assistant", start)) if start else before)
        seen: dict[str, list[int]] = {}
        for choice in choices:
            for end in range(1, len(choice) + 1):
                if choice[:end] not in seen:
                    seen[choice[:end]] = await self._tokens((*before, Message("assistant", start + choice[:end])))
        seam = min(_shared(alone, seen[choice]) for choice in choices)
        cut = 0
        while seam < len(alone):
            cut += 1
            if cut > min(8, len(start) - 1):
                return None
            shorter = await self._tokens((*before, Message("assistant", start[:-cut])))
            if shorter == alone[: len(shorter)] and len(shorter) <= seam:
                alone, seam = shorter, len(shorter)
        spelled = [_spelling(choice, seen, alone, start[len(start) - cut :]) for choice in choices]
        return (cut, [one for one in spelled if one]) if all(spelled) else None

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The summed log-probability of the continuation's tokens, without an end-of-sequence token."""
        if not self.facts.prompt_logprobs:
            return await super().loglikelihood(request)
        if not request.continuation:
            raise RequestError("a continuation is empty: there are no tokens to score")
        if self._server.api == "completions":
            return await self._echoed(request)
        alone = await self._tokens(request.messages)
        whole = _continued(request.messages, request.continuation)
        fields = {**self._dialogue(whole), self.facts.limit: 1, "prompt_logprobs": 0, "temperature": 1.0}
        call = self._post(_CHAT, 1, "likelihood", **fields)
        return await self._send(call, lambda said: read_prompt_sum(said, alone))

    async def _echoed(self, request: LoglikelihoodRequest) -> Loglikelihood:
        text = plain_text(request.messages)
        space = " " if request.messages[-1].role != "assistant" else ""
        whole = text + space + _plain(request.continuation)
        call = self._post(_TEXT, 0, "likelihood", prompt=whole, max_tokens=0, echo=True, logprobs=1, temperature=1.0)
        return await self._send(call, lambda said: read_echo_sum(said, len(text)))

    async def reward(self, request: RewardRequest) -> Reward:
        """What a served classifier with one output gives, before any activation."""
        if not self.facts.reward:
            return await super().reward(request)
        fields = {"messages": _neutral(request.messages), "add_generation_prompt": False, "use_activation": False}
        return await self._send(self._post(self.facts.reward, 0, "reward", **fields), read_reward)

    async def close(self) -> None:
        """Close all connections; batches that were handed over go on."""
        if self._together:
            await self._together.close()
        if self._batches:
            await self._batches.close()
        await self._client.close()


# -- texts --------------------------------------------------------------------------------------------------------------


@lru_cache(2048)
def neutral(text: str) -> str:
    """The text with a space inside what the usual chat templates would take for a token of theirs."""
    return _CONTROL.sub(lambda match: f"{match[0]} ", text)


def _neutral(messages: Messages) -> list[Message]:
    return [Message(one.role, neutral(one.content)) for one in messages]


def _plain(text: str) -> str:
    return _TURN.sub("\n\n ", text)


def plain_text(messages: Messages) -> str:
    """A dialogue as a plain text (as in Bai et al. 2022), ready for the assistant's answer or the rest of it."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: ", "system": ""}
    text = "".join(names[one.role] + _plain(one.content) for one in messages)
    return text if messages[-1].role == "assistant" else f"{text}\n\nAssistant:"


def _continued(messages: Messages, more: str, cut: int = 0) -> Messages:
    """The dialogue with its assistant's turn going on (or begun), `cut` characters of it taken off before."""
    *before, last = messages
    if last.role != "assistant":
        return (*messages, Message("assistant", more)) if more else messages
    return (*before, Message("assistant", last.content[: len(last.content) - cut] + more))


def _shared(one: list[int], other: list[int]) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _spelling(choice: str, seen: Mapping[str, list[int]], alone: list[int], taken: str) -> Spelled | None:
    """A choice's own tokens, and the text before each: `taken` of the ending, and a part of the choice."""
    tokens = seen[choice][len(alone) :]
    before = [""]
    for count in range(1, len(tokens)):
        stem = [*alone, *tokens[:count]]
        part = next((choice[:end] for end in range(1, len(choice)) if seen[choice[:end]] == stem), None)
        if part is None:
            return None
        before.append(taken + part)
    return Spelled(tuple(tokens), tuple(before)) if tokens and seen[choice][: len(alone)] == alone else None
