"""A server that speaks OpenAI's API without a model: fixed latency, a limited capacity, chosen faults, and it counts.

    python -m benchmarks.mock_server --port 8190 --latency 0.05 --per-token 0.001 --concurrency 32 --error 0.1

It prints its address and answers until it is killed. Every field of `Settings` is an option; POST /control changes them
while it runs, GET /stats says what was asked and answered. A call takes `latency + per_token * completion tokens`. Tokens are
characters (with `--joined true` a number is one token), and `logprob` below is what every log-probability comes from.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import random
import re
import sys
import time
from collections import Counter
from email.utils import formatdate
from typing import Any
from zlib import crc32

import msgspec
from aiohttp import web

from benchmarks.mock_batches import Batches, Problem

_SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "ai", "ou")]
WORDS = [first + last for last in ("n", "rel", "st", "m", "vin", "sk") for first in _SYLLABLES][::-1][:619]
"""A prime number of them, so that no stride comes round before all were said: what repeats itself is no revision."""
FAULTS = ("error", "overload", "reset", "hang", "truncated", "invalid", "empty", "missing", "nan", "echo")
_UNDER_WAY = 0.1
"""Seconds after a `Retry-After` in which calls come that were sent before it was read."""
CANDIDATES = [*"ABCDEFGHIJ", *"0123456789", "10"]
END = "<|end|>"
_encode, _decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode


class Settings(msgspec.Struct):
    """What the server does; times in seconds, faults as shares of the calls (drawn from `seed` and the call's number)."""

    model: str = "mock"
    latency: float = 0.0
    per_token: float = 0.0
    tokens: int = 64
    """The most tokens of an answer, whatever is asked for."""
    concurrency: int = 0
    """How many calls are worked on at once; others wait. 0: all."""
    queue: int = -1
    """How many may wait; others get `overload_status`. -1: all."""
    overload_status: int = 429
    retry_after: str = ""
    """The header of an overload answer: seconds, or `date:SECONDS` for an HTTP date; empty: none."""
    error: float = 0.0
    error_status: int = 500
    overload: float = 0.0
    reset: float = 0.0
    hang: float = 0.0
    truncated: float = 0.0
    invalid: float = 0.0
    empty: float = 0.0
    missing: float = 0.0
    nan: float = 0.0
    echo: float = 0.0
    """A 200 that holds an error, and in it the key, `echo_at` characters from its beginning."""
    echo_at: int = 0
    die_at: int = 0
    """Before this call (from 1) the server dies: its port is closed, its connections are cut. 0: never."""
    dead_for: float = 20.0
    """Seconds until it is there again; below 0: for ever."""
    context: int = 1_000_000
    """Characters of a prompt; a longer one is refused by a 400."""
    refuse: str = ""
    """A dialogue that holds this text is refused by `refuse_status`."""
    refuse_status: int = 400
    stumble: str = ""
    """A request whose body holds this text gets `error_status`, always."""
    fail_from: int = 0
    """From this call on (from 1) all get `error_status`. 0: none."""
    away: bool = False
    """Everything is answered as by a gateway whose server is gone."""
    key: str = ""
    """Where this is set, calls without it get a 401."""
    flavour: str = "vllm"
    """`vllm`: everything; `openai`: top_logprobs, and unknown fields are a 400; `plain`: no log-probabilities; `reward`."""
    weights: str = "weights"
    """What `/v1/models` of `vllm` says that the model's weights lie in."""
    top: int = 20
    """The most log-probabilities of a token that are given."""
    choices: int = 0
    """The most completions of one request, whatever `n` asks for; 0: all."""
    joined: bool = False
    remember: bool = True
    """Whether it tells which calls were made twice; that wants memory for each call."""
    seed: int = 0
    batches: bool = True
    """Whether there is a batch API; see `mock_batches.py`."""
    batch_delay: float = 0.2
    """Seconds that a batch takes."""
    batch_refuse: str = ""
    """Why batches fail when they are validated; empty: they do not."""
    batch_expire: int = 0
    """So many batches expire when half of their lines are answered."""
    batch_room: int = 1_000_000
    """The most lines of all batches that are in progress; a batch beyond fails as OpenAI's do beyond the enqueued tokens."""
    batch_late: int = 0
    """So many times a file of answers is not there."""
    batch_page: int = 100
    """The most batches of one list."""
    create_hang: bool = False
    """Creating a batch works, and is never answered."""


def logprob(context: str, token: str) -> float:
    """The log-probability of a token after a text; a function of both, and no distribution."""
    return _after(crc32(context.encode("utf-8", "replace")), token)


def _after(digest: int, token: str) -> float:
    return -0.05 - crc32(f"\0{token}".encode("utf-8", "replace"), digest) % 4000 / 1000


def _logprobs(tokens: list[str]) -> list[float | None]:
    """Of each token after all before it; the first has none."""
    values: list[float | None] = []
    digest = 0
    for token in tokens:
        values.append(_after(digest, token) if values else None)
        digest = crc32(token.encode("utf-8", "replace"), digest)
    return values


def reward(text: str) -> float:
    """What `--flavour reward` says of a dialogue."""
    return crc32(text.encode("utf-8", "replace")) % 1000 / 100 - 5


def tokenize(text: str, joined: bool) -> list[str]:
    """The tokens of a text: its characters, and the marks of the chat template."""
    return re.findall(r"<\|\w+\|>|\d+|[\s\S]" if joined else r"<\|\w+\|>|[\s\S]", text)


def token_id(token: str) -> int:
    """A character's code, and for longer tokens a number beyond all codes."""
    return ord(token) if len(token) == 1 else 2_000_000 + int.from_bytes(token.encode()[:6], "big")


def template(body: dict[str, Any]) -> str:
    """A dialogue as the server's chat template writes it."""
    messages = body["messages"]
    text = "".join(f"<|{one['role']}|>{one['content']}{END}" for one in messages)
    if body.get("continue_final_message"):
        return text.removesuffix(END)
    return f"{text}<|assistant|>" if body.get("add_generation_prompt", True) else text


class MockServer:
    """The server: its settings, its counters, its port."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._connections: set[asyncio.Transport] = set()
        self._site: web.TCPSite | None = None
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None, handler_cancellation=True))
        self._slots = asyncio.Condition()
        self._working = self._waiting = 0
        self._batches = Batches(self)
        self._clear()

    def _clear(self) -> None:
        self.calls = self.good = self.in_flight = self.peak = 0
        self.first = self.last = 0.0
        self.early, self._waved_off, self._not_before = 0, 0.0, 0.0
        self.statuses: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self.answered: Counter[bytes] = Counter()
        self.bodies: dict[bytes, bytes] = {}
        self.tokens = [0, 0]
        self._random = random.Random(self.settings.seed)

    async def start(self, port: int) -> int:
        """Listen on 127.0.0.1; the port, chosen where 0 was asked for."""
        if self._runner.server is None:
            await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True, backlog=4096)
        await self._site.start()
        self.port: int = self._runner.addresses[0][1]
        return self.port

    async def _die(self) -> None:
        site, self._site = self._site, None
        assert site
        await site.stop()
        for transport in list(self._connections):
            transport.abort()
        if self.settings.dead_for >= 0:
            await asyncio.sleep(self.settings.dead_for)
            await self.start(self.port)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        if path == "/stats":
            return _json(self.stats())
        if path == "/control":
            return await self._control(request)
        if request.transport:
            self._connections.add(request.transport)
            if self._site is None:  # a connection that was made before it died
                request.transport.abort()  # type: ignore[attr-defined]
        settings = self.settings
        if settings.away:
            return self._refuse(502, "Bad Gateway")
        if settings.key and request.headers.get("Authorization") != f"Bearer {settings.key}":
            return self._refuse(401, "Incorrect API key provided: the mock wants another one")
        if path == "/v1/models":
            root = {"root": f"{settings.weights}/{settings.model}"} if settings.flavour == "vllm" else {}
            return _json({"object": "list", "data": [{"id": settings.model, "object": "model", **root}]})
        if path.startswith(("/v1/files", "/v1/batches")):
            return await self._batch(request) if settings.batches else self._refuse(404, "Not Found")
        raw = await request.read()
        try:
            body = _decode(raw)
        except msgspec.DecodeError:
            return self._refuse(400, "the body is not JSON")
        if body.get("model") != settings.model:
            return self._refuse(404, f"The model `{body.get('model')}` does not exist.")
        if path == "/tokenize" and settings.flavour == "vllm":
            tokens = tokenize(template(body) if "messages" in body else body["prompt"], settings.joined)
            shown = {"token_strs": tokens} if body.get("return_token_strs") else {}
            return _json({"count": len(tokens), "max_model_len": settings.context, "tokens": [*map(token_id, tokens)], **shown})
        return await self._call(request, path, raw, body)

    async def _batch(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            answer = await self._batches.handle(request)
        except Problem as exc:
            return self._refuse(exc.status, str(exc))
        if self.settings.create_hang and request.method == "POST" and request.path == "/v1/batches":
            await asyncio.sleep(3600)
        return web.Response(body=answer, content_type="application/jsonl") if isinstance(answer, bytes) else _json(answer)

    def answer_line(self, path: str, raw: bytes) -> tuple[int, Any]:
        """Status and JSON of a batch's line; the faults `error`, `overload` and `empty` hit lines, too."""
        self.calls += 1
        self.paths[f"batch {path}"] += 1
        fault, body = self._draw(), _decode(raw)
        if fault in ("error", "overload"):
            self.faults[fault] += 1
            status = self.settings.error_status if fault == "error" else self.settings.overload_status
            return status, {"error": {"message": f"the mock has an {fault}"}}
        if fault == "echo":
            return 200, self._echo()
        answer = self._answer(path, body)
        if isinstance(answer, web.Response):
            return answer.status, _decode(bytes(answer.body))  # type: ignore[arg-type]
        if fault == "empty":
            self.faults[fault] += 1
            return 200, {**answer, "choices": []}
        self._remember(raw)
        self.tokens[0] += answer["usage"]["prompt_tokens"]
        self.tokens[1] += answer["usage"].get("completion_tokens", 0)
        self.statuses[200] += 1
        return 200, answer

    async def _control(self, request: web.BaseRequest) -> web.Response:
        """New settings, at once; `{"clear": true}` empties the counters, `{"die": true}` kills."""
        asked = _decode(await request.read() or b"{}")
        clear, die = asked.pop("clear", False), asked.pop("die", False)
        for name, value in asked.items():
            setattr(self.settings, name, value)
        if clear:
            self._clear()
        if die:
            self._dying = asyncio.ensure_future(self._die())
        async with self._slots:
            self._slots.notify_all()
        return _json(msgspec.to_builtins(self.settings))

    async def _call(self, request: web.BaseRequest, path: str, raw: bytes, body: dict[str, Any]) -> web.StreamResponse:
        self.calls += 1
        self.paths[path] += 1
        self.early += self._waved_off + _UNDER_WAY < time.time() < self._not_before
        self.first = self.first or time.time()
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            if self.calls == self.settings.die_at:
                self._dying = asyncio.ensure_future(self._die())
            return await self._work(request, path, raw, body)
        finally:
            self.in_flight -= 1
            self.last = time.time()

    async def _work(self, request: web.BaseRequest, path: str, raw: bytes, body: dict[str, Any]) -> web.StreamResponse:
        settings, fault = self.settings, self._draw()
        stumbles = settings.stumble and settings.stumble in raw.decode("utf-8", "replace")
        if stumbles or 0 < settings.fail_from <= self.calls:
            return self._refuse(settings.error_status, "the mock stumbles over this request")
        answer = self._answer(path, body)
        if isinstance(answer, web.Response):
            return answer
        if self._working >= (settings.concurrency or math.inf) and 0 <= settings.queue <= self._waiting:
            return self._overloaded()
        if settings.concurrency:
            await self._wait_for_a_slot()
        try:
            await asyncio.sleep(settings.latency + settings.per_token * answer["usage"].get("completion_tokens", 0))
        finally:
            if settings.concurrency:
                await self._give_back()
        if fault:
            self.faults[fault] += 1
            if (faulty := await self._fail(fault, request, answer)) is not None:
                return faulty
        self._remember(raw)
        self.tokens[0] += answer["usage"]["prompt_tokens"]
        self.tokens[1] += answer["usage"].get("completion_tokens", 0)
        self.statuses[200] += 1
        return _json(answer)

    def _remember(self, raw: bytes) -> None:
        self.good += 1
        if not self.settings.remember:
            return
        key = hashlib.blake2b(raw, digest_size=8).digest()
        self.answered[key] += 1
        if self.answered[key] > 1:
            self.bodies[key] = raw

    async def _wait_for_a_slot(self) -> None:
        if self._working < self.settings.concurrency and not self._waiting:
            self._working += 1
            return
        self._waiting += 1
        try:
            async with self._slots:
                await self._slots.wait_for(lambda: self._working < self.settings.concurrency)
                self._working += 1
        finally:
            self._waiting -= 1

    async def _give_back(self) -> None:
        self._working -= 1
        if self._waiting:
            async with self._slots:
                self._slots.notify()

    def _draw(self) -> str | None:
        """The fault of this call, if it has one."""
        number = self._random.random()
        for fault in FAULTS:
            number -= getattr(self.settings, fault)
            if number < 0:
                return fault
        return None

    async def _fail(self, fault: str, request: web.BaseRequest, answer: dict[str, Any]) -> web.StreamResponse | None:
        match fault:
            case "error":
                return self._refuse(self.settings.error_status, "the mock has an internal error")
            case "overload":
                return self._overloaded()
            case "hang":
                await asyncio.sleep(3600)
            case "reset" | "truncated":
                return await self._cut(request, _encode(answer), abort=fault == "reset")
            case "invalid":
                return web.Response(body=b'{"choices": [}', content_type="application/json")
            case "empty" if "choices" in answer:
                answer["choices"] = []
                return _json(answer)
            case "missing" | "nan":
                return _spoiled(answer, fault)
            case "echo":
                return _json(self._echo())
        return None

    def _echo(self) -> dict[str, Any]:
        return {"error": {"message": f"{'.' * self.settings.echo_at}{self.settings.key} is not liked here"}}

    async def _cut(self, request: web.BaseRequest, whole: bytes, abort: bool) -> web.StreamResponse:
        """Half a body: then the connection is reset, or it ends as if that were all."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if abort:
            response.content_length = len(whole)
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
        if abort and request.transport:
            await asyncio.sleep(0.005)
            request.transport.abort()  # type: ignore[attr-defined]
        return response

    def _overloaded(self) -> web.Response:
        after, now = self.settings.retry_after, time.time()
        if after and now >= self._not_before:
            self._waved_off = now
        if after.startswith("date:"):
            whole = int(now + float(after[5:]))
            self._not_before = max(self._not_before, whole)
            after = formatdate(whole, usegmt=True)
        elif after:
            self._not_before = max(self._not_before, now + float(after))
        return self._refuse(self.settings.overload_status, "too many requests", {"Retry-After": after} if after else {})

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
        self.statuses[status] += 1
        body = _encode({"error": {"message": message, "type": "mock", "code": status}})
        return web.Response(body=body, status=status, content_type="application/json", headers=headers)

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | web.Response:
        flavour = self.settings.flavour
        if flavour == "reward":
            return self._reward(body) if path in ("/pooling", "/classify") else self._refuse(404, "Not Found")
        if path == "/v1/chat/completions":
            unknown = {"continue_final_message", "add_generation_prompt", "logprob_token_ids", "prompt_logprobs"} & body.keys()
            if flavour == "openai" and unknown:
                return self._refuse(400, f"Unrecognized request argument supplied: {min(unknown)}")
            return self._complete(template(body), body, chat=True)
        if path == "/v1/completions":
            return self._complete(self._prompt(body["prompt"]), body, chat=False)
        return self._refuse(404, "Not Found")

    def _prompt(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else "".join(map(chr, prompt))

    def _reward(self, body: dict[str, Any]) -> dict[str, Any]:
        text = template(body)
        return {"data": [{"index": 0, "data": [reward(text)]}], "usage": {"prompt_tokens": len(text)}}

    def _complete(self, prompt: str, body: dict[str, Any], chat: bool) -> dict[str, Any] | web.Response:
        settings = self.settings
        if len(prompt) > settings.context:
            return self._refuse(400, f"This model's maximum context length is {settings.context} tokens; yours is longer.")
        if settings.refuse and settings.refuse in prompt:
            return self._refuse(settings.refuse_status, "this dialogue violates the mock's policy")
        most = body.get("max_tokens", body.get("max_completion_tokens", 16))
        letter = "one letter" in prompt or "(A)" in prompt
        count = min(most, 1 if letter else settings.tokens)
        asked = min(body.get("n") or 1, settings.choices or math.inf)
        choices = [self._choice(prompt, body, chat, number, count) for number in range(int(asked))]
        usage = {"prompt_tokens": max(1, len(prompt) // 4), "completion_tokens": count * len(choices)}
        usage["total_tokens"] = sum(usage.values())
        kind = "chat.completion" if chat else "text_completion"
        answer = {"id": "mock", "object": kind, "created": 0, "model": settings.model, "choices": choices, "usage": usage}
        if chat and settings.flavour == "vllm" and body.get("prompt_logprobs") is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(prompt)
        return answer

    def _choice(self, prompt: str, body: dict[str, Any], chat: bool, number: int, count: int) -> dict[str, Any]:
        drawn = crc32(f"{prompt}{body.get('seed')}{number}".encode("utf-8", "replace"))
        stride = drawn % 100 * 2 + 41
        words = (WORDS[(drawn + place * stride) % len(WORDS)] for place in range(count))
        text = "AB"[drawn % 2] if "one letter" in prompt else " ".join(words)
        finish = "length" if count == body.get("max_tokens") else "stop"
        choice: dict[str, Any] = {"index": number, "finish_reason": finish}
        if chat:
            logprobs = self._top(prompt, body) if body.get("logprobs") and self.settings.flavour != "plain" else None
            return {**choice, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        asked = body.get("logprobs") if self.settings.flavour != "plain" else None
        echo = prompt if body.get("echo") else ""
        return {**choice, "text": echo + text, "logprobs": None if asked is None else self._text_logprobs(prompt, echo, asked)}

    def _top(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        """The log-probabilities of the first token, as chat completions say them."""
        asked, by_id = body.get("logprob_token_ids"), body.get("return_tokens_as_token_ids")
        tokens = CANDIDATES[: None if self.settings.joined else -1]
        if asked is not None and self.settings.flavour == "vllm":
            tokens = [chr(one) if one < 2_000_000 else "10" for one in asked]
        ranked = sorted(((logprob(prompt, token), token) for token in tokens), reverse=True)
        kept = ranked if asked is not None else ranked[: min(body.get("top_logprobs", 0), self.settings.top)]
        top = [{"token": f"token_id:{token_id(token)}" if by_id else token, "logprob": value} for value, token in kept]
        value, token = ranked[0]
        return {
            "content": [{"token": f"token_id:{token_id(token)}" if by_id else token, "logprob": value, "top_logprobs": top}]
        }

    def _text_logprobs(self, prompt: str, echo: str, asked: int) -> dict[str, Any]:
        """Those of an echoed prompt, or of the first token, as plain completions say them."""
        if not echo:
            ranked = sorted(((logprob(prompt, token), token) for token in CANDIDATES[:-1]), reverse=True)[: max(asked, 1)]
            return {
                "tokens": [ranked[0][1]],
                "token_logprobs": [ranked[0][0]],
                "top_logprobs": [{token: value for value, token in ranked}],
                "text_offset": [len(prompt)],
            }
        tokens, offsets, at = tokenize(echo, self.settings.joined), [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token)
        return {"tokens": tokens, "token_logprobs": _logprobs(tokens), "top_logprobs": None, "text_offset": offsets}

    def _prompt_logprobs(self, prompt: str) -> list[dict[str, Any] | None]:
        tokens = tokenize(prompt, self.settings.joined)
        return [
            None if value is None else {str(token_id(token)): {"logprob": value, "rank": 1, "decoded_token": token}}
            for token, value in zip(tokens, _logprobs(tokens), strict=True)
        ]

    def stats(self) -> dict[str, Any]:
        """What was asked and answered so far; `repeated` are good answers to a body that had one already."""
        again = sum(self.answered.values()) - len(self.answered)
        return {
            "calls": self.calls,
            "early": self.early,
            "answered": self.good,
            "repeated": again,
            "repeated_bodies": [body.decode("utf-8", "replace") for body in list(self.bodies.values())[:20]],
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "faults": dict(self.faults),
            "paths": dict(self.paths),
            "batches": self._batches.stats(),
            "in_flight": self.in_flight,
            "peak": self.peak,
            "prompt_tokens": self.tokens[0],
            "completion_tokens": self.tokens[1],
            "span": round(self.last - self.first, 4) if self.first else 0.0,
        }


def _spoiled(answer: dict[str, Any], fault: str) -> web.Response:
    """Log-probabilities that are not there, or are not numbers; what has none stays as it is."""
    for choice in answer.get("choices", ()):
        if choice.get("logprobs"):
            choice["logprobs"] = None if fault == "missing" else _not_numbers(choice["logprobs"])
    if answer.get("prompt_logprobs"):
        answer["prompt_logprobs"] = None if fault == "missing" else _not_numbers(answer["prompt_logprobs"])
    for one in answer.get("data", ()):
        one["data"] = [] if fault == "missing" else [math.nan]
    return web.Response(body=re.sub(rb'"NAN"', b"NaN", _encode(_marked(answer))), content_type="application/json")


def _not_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _not_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_not_numbers(one) for one in value]
    return math.nan if isinstance(value, float) else value


def _marked(value: Any) -> Any:
    """NaN as a mark, since a strict JSON writer makes null of it and Python's servers write NaN."""
    if isinstance(value, dict):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_marked(one) for one in value]
    return "NAN" if isinstance(value, float) and math.isnan(value) else value


def _json(value: Any) -> web.Response:
    return web.Response(body=_encode(value), content_type="application/json")


async def serve(settings: Settings, port: int) -> None:
    """Print the address, then answer until killed."""
    server = MockServer(settings)
    print(f"http://127.0.0.1:{await server.start(port)}/v1", flush=True)
    await asyncio.Event().wait()


def _parse() -> tuple[Settings, int]:
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server without a model.")
    parser.add_argument("--port", type=int, default=0)
    for field in msgspec.structs.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default)
    told = vars(parser.parse_args())
    port = told.pop("port")
    return msgspec.convert(told, Settings, strict=False), port


def main() -> None:
    """Serve with what argv says, on uvloop where it is installed."""
    settings, port = _parse()
    loop_factory = None
    if sys.platform != "win32":
        try:
            import uvloop

            loop_factory = uvloop.new_event_loop
        except ImportError:
            pass
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(serve(settings, port))


if __name__ == "__main__":
    main()
