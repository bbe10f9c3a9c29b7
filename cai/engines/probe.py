"""What a server can, found by asking it a few one-token questions before the first call that matters.

GET /v1/models is free; the questions cost about ten tokens each: are there log-probabilities, and of how many tokens? Does the
server go on with a last assistant message (and not merely ignore the fields that ask for it: the count of prompt tokens tells)?
Are there exactly the tokens asked for (vLLM's `logprob_token_ids`), and those of a prompt? A question that only ever gets
an error means no, where the server still answers the plain one: an overload changes no fact.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from cai.engines.http import Client
from cai.engines.replies import counted, reward_numbers
from cai.errors import ConfigError, EngineError, nearest
from cai.servers import ServerConfig
from cai.types import without_surrogates

PROBE = "Say OK."
"""The dialogue of all questions."""
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""The fields with which vLLM and SGLang go on with a last assistant message."""
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_MOST, _FEW = 20, 5
_TRIES = 2
"""How often what is not there is asked for: an answer may lack for once what the server has."""
_SHOWN = 20
"""Models that an error lists."""
_NAME = 100
"""Characters of their names that it shows."""


class Facts(Struct, frozen=True):
    """What a server is and can."""

    model: str
    """The model's name there."""
    weights: str
    """What the server says that name stands for (vLLM's `root`), or the name."""
    limit: str = "max_tokens"
    """The field that bounds a completion; newer hosted models want another one."""
    top: int = 0
    """How many log-probabilities of a token there are."""
    prefill: Literal["fields", "default", "none"] = "none"
    """How a last assistant message is gone on with: by `CONTINUE`, always, or not at all."""
    token_ids: bool = False
    """Whether log-probabilities of chosen tokens can be asked for, and texts be turned into tokens."""
    prompt_logprobs: bool = False
    """Whether there are log-probabilities of a prompt's tokens."""
    reward: str = ""
    """The path that gives rewards."""


async def probe(client: Client, config: ServerConfig, reward: bool) -> Facts:
    """Ask; raises `ConfigError` where the server, the key or the model's name is not right."""
    try:
        facts = await _identify(client, config)
        questions = _Questions(client, config, facts)
        if reward:
            return await questions.reward()
        return await (questions.chat() if config.api == "chat" else questions.completions())
    except EngineError as exc:
        raise ConfigError(str(exc)) from exc


async def _identify(client: Client, config: ServerConfig) -> Facts:
    status, said = await client.exchange("/v1/models")
    found = models_in(status, said)
    client.models = list(found)
    name = config.name
    if name is None:
        if len(found) != 1:
            base = client.endpoints[0].base
            silent = "does not list its models" if status == 200 else f"does not list its models (HTTP {status}: {said})"
            there = f"has {len(found)} models: {_some(found)}" if found else silent
            raise ConfigError(f"{base} {there}{'' if found else _lacks(base)}; name one by {client.section}.name")
        name = next(iter(found))
    return Facts(name, weights_of(found.get(name, {}), name))


def models_in(status: int, said: Any) -> dict[str, dict[str, Any]]:
    """The models in the answer of `/v1/models`, by their names; empty where it lists none."""
    data = said.get("data") if status == 200 and isinstance(said, dict) else None
    there = [one for one in data if isinstance(one, dict) and "id" in one] if isinstance(data, list) else []
    return {without_surrogates(str(one["id"])): one for one in there}


def weights_of(listed: dict[str, Any], otherwise: str = "") -> str:
    """What a server says that one of its models stands for, of a path the last part."""
    root = without_surrogates(str(listed.get("root") or otherwise))
    return root.rstrip("/").rsplit("/", 1)[-1] if root.startswith(("/", "~", ".")) else root


def _lacks(base: str) -> str:
    """What the URL of a server may lack whose API is not found there."""
    return "" if urlsplit(base).path.strip("/") else f"; most servers have their API at {base}/v1"


def _some(names: Any) -> str:
    shown = [name[:_NAME] for name in list(names)[:_SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")


class _Questions:
    """The questions to one model."""

    def __init__(self, client: Client, config: ServerConfig, facts: Facts) -> None:
        self._client, self._config, self._facts = client, config, facts
        self._has_failed = False

    async def _ask(self, path: str, **fields: Any) -> tuple[int, Any]:
        body = with_extra({"model": self._facts.model, **fields}, self._config.extra_body)
        status, said = await self._client.exchange(path, body)
        self._has_failed = self._has_failed or status >= 500
        return status, said if status != 200 or isinstance(said, dict) else {}

    async def _plain(self) -> Any:
        """What a server answers that is there. Raises `ConfigError` where it does not."""
        if self._config.api == "completions":
            status, said = await self._ask(_TEXT, prompt=PROBE, max_tokens=1)
        else:
            status, said = await self._chat(PROBE)
            if status == 400 and "max_completion_tokens" in str(said):
                self._facts = msgspec.structs.replace(self._facts, limit="max_completion_tokens")
                status, said = await self._chat(PROBE)
        if status != 200 and "output limit was reached" not in str(said):
            raise self._refused(status, said)
        return said

    async def _chat(self, *contents: str, **fields: Any) -> tuple[int, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
        return await self._ask(_CHAT, messages=messages, **{self._facts.limit: 1}, **fields)

    async def chat(self) -> Facts:
        """Of the chat API."""
        said = await self._plain()
        top = await self._top()
        prefill = await self._prefill(_prompt_tokens(said)) if top else "none"
        ids = prefill == "fields" and await self._has_token_ids()
        prompts = ids and await self._has_prompt_logprobs()
        if self._has_failed:
            await self._plain()
        return msgspec.structs.replace(self._facts, top=top, prefill=prefill, token_ids=ids, prompt_logprobs=prompts)

    def _refused(self, status: int, said: Any) -> ConfigError:
        models, name = self._client.models, self._facts.model
        if models and name not in models:
            return ConfigError(
                f"{self._client.endpoints[0].base} has no model '{name}'{nearest(name, models)}; there: {_some(models)}; "
                f"set {self._client.section}.name"
            )
        base = self._client.endpoints[0].base
        return ConfigError(f"{base}: model '{name}' answers HTTP {status}: {said}{_lacks(base) if status == 404 else ''}")

    async def _top(self) -> int:
        for count in (_MOST, _MOST, _FEW, _FEW):
            status, said = await self._chat(PROBE, logprobs=True, top_logprobs=count)
            if status == 200 and (found := len(_first_top(said))) > 1:
                return min(count, found)
        return 0

    async def _prefill(self, alone: int) -> Literal["fields", "default", "none"]:
        """A last assistant message that is gone on with adds its one token; else it adds what ends and begins a turn, too."""
        if not alone:
            return "none"
        for kind, fields in (("fields", CONTINUE), ("default", {})):
            status, said = await self._chat(PROBE, "Sure", **fields)
            if status == 200 and alone < _prompt_tokens(said) <= alone + 2:
                return "fields" if kind == "fields" and not await self._is_default(alone) else "default"
        return "none"

    async def _is_default(self, alone: int) -> bool:
        """Whether the server would go on without being asked to, and the fields are perhaps not even known to it."""
        status, said = await self._chat(PROBE, "Sure")
        return status == 200 and alone < _prompt_tokens(said) <= alone + 2

    async def _has_token_ids(self) -> bool:
        status, said = await self._ask("/tokenize", prompt="B", add_special_tokens=False)
        ids = said.get("tokens") if status == 200 else None
        if not (isinstance(ids, list) and ids):
            return False
        asked = {"logprobs": True, "logprob_token_ids": ids[-1:], "return_tokens_as_token_ids": True}
        for _ in range(_TRIES):
            status, said = await self._chat(PROBE, **asked)
            if status == 200 and f"token_id:{ids[-1]}" in {one.get("token") for one in _first_top(said)}:
                return True
        return False

    async def _has_prompt_logprobs(self) -> bool:
        for _ in range(_TRIES):
            status, said = await self._chat(PROBE, "Sure", **CONTINUE, prompt_logprobs=0)
            if status == 200 and _is_long(said.get("prompt_logprobs")):
                return True
        return False

    async def completions(self) -> Facts:
        """Of the API for plain texts."""
        top = 0
        await self._plain()
        for count in (_MOST, _FEW):
            status, said = await self._ask(_TEXT, prompt=PROBE, max_tokens=1, logprobs=count)
            if status == 200 and (top := min(count, len(_text_top(said)))):
                break
        status, said = await self._ask(_TEXT, prompt=PROBE, max_tokens=0, echo=True, logprobs=1)
        echoes = status == 200 and _is_long(_inside(said, "choices", 0, "logprobs", "token_logprobs"))
        if self._has_failed:
            await self._plain()
        return msgspec.structs.replace(self._facts, top=top if top > 1 else 0, prefill="default", prompt_logprobs=echoes)

    async def reward(self) -> Facts:
        """Of a served classifier with one output."""
        messages = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": "OK."}]
        said: Any = ""
        for path in ("/pooling", "/classify"):
            status, said = await self._ask(path, messages=messages, add_generation_prompt=False, use_activation=False)
            if status == 200 and len(reward_numbers(said)) == 1:
                return msgspec.structs.replace(self._facts, reward=path)
        base, name = self._client.endpoints[0].base, self._facts.model
        raise ConfigError(
            f"{base}: model '{name}' gives no single reward at /pooling or /classify ({str(said)[:200]}); serve a sequence "
            "classifier with one output (vllm serve MODEL --runner pooling), or use another judge.method"
        )


def with_extra(fields: dict[str, Any], extra: dict[str, Any]) -> bytes:
    """The JSON of a request, with the recipe's own fields; those that are null are taken out."""
    if extra:
        fields = {key: value for key, value in {**fields, **extra}.items() if value is not None}
    return msgspec.json.encode(fields)


def _prompt_tokens(said: Any) -> int:
    return counted(said, "prompt_tokens")


def _inside(said: Any, *steps: str | int) -> Any:
    """What lies there in an answer; None where nothing does."""
    try:
        for step in steps:
            said = said[step]
    except (LookupError, TypeError):
        return None
    return said


def _is_long(found: Any) -> bool:
    return isinstance(found, list) and len(found) > 1


def _first_top(said: Any) -> list[dict[str, Any]]:
    """The alternatives for the first token of a chat completion; empty where there are none."""
    found = _inside(said, "choices", 0, "logprobs", "content", 0, "top_logprobs")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _text_top(said: Any) -> dict[str, float]:
    """The same of a plain completion."""
    found = _inside(said, "choices", 0, "logprobs", "top_logprobs", 0)
    return found if isinstance(found, dict) else {}
