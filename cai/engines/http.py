"""Requests to a server's URLs: one session, the least busy URL first, retries for what can succeed, and a stop for what cannot.

What is retried, with full jitter (Brooker 2015, "Exponential backoff and jitter") and never before `Retry-After`:
connections that break, time-outs, 408, 409, 425, 429, 5xx, answers that cannot be read. What is not: 400 and the like fail
the request; 401, 402, 403 and 404 stop the run. A URL that nobody listens at is left out until it answers again; overload
and absence are waited for as long as `server.give_up` says. A key is never part of an error.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from yarl import URL

from cai.engines.pacing import Rates, Window
from cai.engines.replies import Transient, decode, message_of, retry_after, total_tokens
from cai.errors import ConfigError, ContextLengthError, EngineError, RequestError, VerdictError
from cai.servers import ServerConfig

Answer = TypeVar("Answer")
_CONNECT = 10.0
"""Seconds that a connection may take."""
_LOOK = 1.0
"""Seconds between two looks at whether a dead URL is there again."""
_FAILING = 30
"""So many failed requests one after another, with none that succeeded, stop the run."""
_UNREADABLE = 4
"""How often an answer that cannot be used is asked for: a model that gives no numbers may give them once more."""
_OVERLOADED = {429, 503, 529}
_WAITED_FOR = ("overloaded", "absent")
_TRANSIENT = {408, 409, 425, *_OVERLOADED}
_CONTEXT = re.compile(
    r"context.{0,20}(length|window|size)|maximum.{0,20}(context|tokens)|too many tokens|too long|max_model_len", re.I
)
_QUOTED = 300
"""Characters of what a server says that an error repeats."""
_KEY_LIKE = re.compile(r"\b(sk|key|hf|gsk|xai)[-_][\w*-]{6,}", re.I)
_wait = wait_random_exponential(multiplier=0.5, max=30)


class Post(NamedTuple):
    """A request: below which path, its JSON, about how many tokens it asks for; those of one `kind` take about equally long."""

    path: str
    body: bytes
    tokens: float = 0.0
    kind: Hashable = None


class Endpoint:
    """One base URL, how many requests are there, and whether it is alive."""

    def __init__(self, url: str, concurrency: int | None) -> None:
        """The URL as the recipe says it, with or without a slash at its end."""
        self.base = url.rstrip("/")
        self.root = self.base.removesuffix("/v1")
        self.window = Window(concurrency)
        self.dead = ""
        self.paths: dict[str, URL] = {}

    def at(self, path: str) -> URL:
        """`/v1/...` below the base URL, other paths below the server's root."""
        if path not in self.paths:
            place = self.base + path.removeprefix("/v1") if path.startswith("/v1/") else self.root + path
            self.paths[path] = URL(place)
        return self.paths[path]


class Client:
    """Asks the URLs of one model. Belongs to the event loop in which it is first used."""

    def __init__(self, urls: list[str], config: ServerConfig, section: str) -> None:
        """`section` is what errors call the recipe's section. Raises `ConfigError` for a key that is not there."""
        self.endpoints = [Endpoint(url, config.concurrency) for url in urls]
        self._config, self.section = config, section
        self._key = read_key(config, section)
        self._rates = Rates(config.requests_per_minute, config.tokens_per_minute)
        self._waiting: deque[Future[Endpoint]] = deque()
        self._session: aiohttp.ClientSession | None = None
        self._looking: dict[Endpoint, asyncio.Task[None]] = {}
        self._last_success = 0.0
        self._failures, self._streak_from = 0, 0
        self._flying: dict[int, None] = {}
        self._number = 0
        self._broken: Exception | None = None
        self.models: list[str] = []
        """Those that the server lists, for errors."""

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=30),
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._config.timeout, sock_connect=_CONNECT),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=any(os.environ.get(name) for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")),
            )
            self._last_success = self._last_success or time.monotonic()
        return self._session

    async def post(self, call: Post, read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the answer; it raises `Transient` for what it cannot use.

        Raises `RequestError` where this request cannot succeed, and `EngineError` where none can.
        """
        self._number += 1
        number = self._number
        self._flying[number] = None
        try:
            answer = await self.tries(lambda: self._attempt(call, read))
        except RequestError as exc:
            self._failed(str(exc), number)
            raise
        except EngineError as exc:
            self._broken = self._broken or exc
            raise
        finally:
            self._flying.pop(number, None)
        self._failures, self._last_success = 0, time.monotonic()
        return answer

    async def tries(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """The first attempt without more ado, since nearly all succeed; then `tenacity` goes on from its failure."""
        try:
            return await attempt()
        except Transient as exc:
            failed = [exc]

        async def again() -> Answer:
            if failed:
                raise failed.pop()
            return await attempt()

        tries = _Tries(self._config)
        retrying = AsyncRetrying(stop=tries.are_over, wait=tries.pause, retry=retry_if_exception_type(Transient), reraise=True)
        try:
            return await retrying(again)
        except Transient as exc:
            waited = time.monotonic() - self._last_success
            if exc.kind in _WAITED_FOR and waited > self._config.give_up:
                raise EngineError(
                    f"{self.quoted(exc)}; no request succeeded for {waited:.0f} s; the same command continues"
                ) from exc
            final = VerdictError if exc.kind == "no numbers" else RequestError
            raise final(f"{self.quoted(exc)}; tried {tries.made} times") from exc

    async def _attempt(self, call: Post, read: Callable[[Any], Answer]) -> Answer:
        if self._broken:
            raise self._broken
        await self._rates.wait(call.tokens)
        endpoint = await self._acquire()
        began, overloaded = time.monotonic(), False
        try:
            async with self._open().post(endpoint.at(call.path), data=call.body, allow_redirects=False) as response:
                raw = await response.read()
            if response.status != 200:
                overloaded = response.status in _OVERLOADED
                self._refuse(response.status, raw, response.headers, endpoint, call.path)
            said = decode(raw)
            if self._config.tokens_per_minute:
                self._rates.learn(call.tokens, total_tokens(said))
            return read(said)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            problem = str(getattr(exc, "os_error", exc))
            self._bury(endpoint, problem)
            raise Transient(f"{endpoint.base} cannot be reached: {problem}", kind="absent") from exc
        except TimeoutError as exc:
            overloaded = True
            raise Transient(f"no answer within {self._config.timeout:g} s ({self.section}.timeout)") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise Transient(f"the connection broke: {type(exc).__name__}") from exc
        finally:
            endpoint.window.ended(began, time.monotonic(), (call.path, call.kind), overloaded)
            self._release(endpoint)

    async def exchange(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON (or message) of one question that nothing depends on; GET where there is no body.

        Raises `EngineError` where no URL answers, or the key is refused.
        """
        problem = ""
        for endpoint in self.endpoints:
            retrying = AsyncRetrying(
                stop=stop_after_attempt(5), wait=_wait, retry=retry_if_exception_type(Transient), reraise=True
            )
            try:
                return await retrying(self._exchange, endpoint, path, body)
            except (aiohttp.ClientError, OSError) as exc:
                problem = f"{endpoint.base} cannot be reached: {getattr(exc, 'os_error', exc) or type(exc).__name__}"
            except Transient as exc:
                problem = f"{endpoint.base}: {self.quoted(exc)}"
        raise EngineError(f"{self._clean(problem)}; start the server or mend the URL")

    async def _exchange(self, endpoint: Endpoint, path: str, body: bytes | None) -> tuple[int, Any]:
        method = "GET" if body is None else "POST"
        try:
            async with self._open().request(method, endpoint.at(path), data=body, allow_redirects=False) as response:
                raw = await response.read()
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, TimeoutError) as exc:
            raise Transient(f"the connection broke: {type(exc).__name__}") from exc
        if response.status == 200:
            return 200, decode(raw)
        try:
            self._refuse(response.status, raw, response.headers, endpoint, path)
        except RequestError:
            return response.status, self.quoted(message_of(raw))
        except EngineError:
            if response.status == 404:
                return 404, self.quoted(message_of(raw))
            raise

    async def fetch(self, path: str, body: bytes | aiohttp.FormData | None = None) -> bytes | None:
        """One attempt at a file or a batch, which are at the first URL: what is there, or None for a 404.

        Raises `Transient`, `RequestError`, `EngineError`; GET where there is no body. To be repeated by `tries`.
        """
        endpoint, headers = self.endpoints[0], {}
        data: Any = body
        if isinstance(body, aiohttp.FormData):
            data = body()
            headers = {"Content-Type": data.headers["Content-Type"]}
        method = "GET" if body is None else "POST"
        try:
            async with self._open().request(
                method, endpoint.at(path), data=data, headers=headers, allow_redirects=False
            ) as response:
                raw = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            problem = str(getattr(exc, "os_error", exc)) or type(exc).__name__
            raise Transient(f"{endpoint.base} cannot be reached: {problem}", kind="overloaded") from exc
        if response.status == 404:
            return None
        if response.status not in (200, 201):
            self._refuse(response.status, raw, response.headers, endpoint, path)
        self._last_success = time.monotonic()
        return raw

    def refuse_line(self, status: int, raw: bytes, path: str) -> NoReturn:
        """Raise what a line of a batch without an answer means: the same as the answer to a single request."""
        self._refuse(status, raw, {}, self.endpoints[0], path)

    # -- which URL ------------------------------------------------------------------------------------------------------

    def _free(self) -> Endpoint | None:
        free = [one for one in self.endpoints if not one.dead and one.window.has_room]
        return min(free, key=lambda one: one.window.in_flight / one.window.limit) if free else None

    async def _acquire(self) -> Endpoint:
        endpoint = None if self._waiting else self._free()
        if endpoint is None:
            waiting: Future[Endpoint] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                return await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled() and not waiting.exception():
                    self._release(waiting.result())
                raise
        endpoint.window.in_flight += 1
        return endpoint

    def _release(self, endpoint: Endpoint) -> None:
        endpoint.window.in_flight -= 1
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and (endpoint := self._free()):
            waiting = self._waiting.popleft()
            if not waiting.done():
                endpoint.window.in_flight += 1
                waiting.set_result(endpoint)

    def _bury(self, endpoint: Endpoint, problem: str) -> None:
        """Leave out a URL until it answers."""
        endpoint.dead = problem
        if endpoint not in self._looking:
            self._looking[endpoint] = asyncio.ensure_future(self._look(endpoint))

    async def _look(self, endpoint: Endpoint) -> None:
        """Ask a dead URL from time to time; where all are dead for too long, everything that waits fails."""
        session, quick = self._open(), aiohttp.ClientTimeout(total=_CONNECT)
        while True:
            await asyncio.sleep(_LOOK)
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.get(endpoint.at("/v1/models"), timeout=quick, allow_redirects=False) as response:
                    if response.status not in (502, 503, 504):
                        break
            if all(one.dead for one in self.endpoints) and time.monotonic() - self._last_success > self._config.give_up:
                self._break(f"{endpoint.base} cannot be reached for {self._config.give_up:g} s: {endpoint.dead}")
                return
        endpoint.dead = ""
        del self._looking[endpoint]
        self._hand_out()

    def _break(self, problem: str) -> None:
        """Nothing can succeed any more: all that waits fails, and so does what comes."""
        self._broken = EngineError(f"{self._clean(problem)}; mend that, then the same command continues")
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(self._broken)

    # -- what failed ----------------------------------------------------------------------------------------------------

    def _failed(self, problem: str, number: int) -> None:
        """Count a request that failed for good. Trips where only failures come, and nothing older is still under way."""
        if not self._failures:
            self._streak_from = self._number
        self._failures += 1
        oldest = next(iter(self._flying), number)
        if self._failures >= _FAILING and (oldest >= self._streak_from or self._failures >= 10 * _FAILING):
            self._break(f"the last {self._failures} requests all failed, the last of them: {problem}")
            assert self._broken
            raise self._broken

    def _refuse(self, status: int, raw: bytes, headers: Mapping[str, str], endpoint: Endpoint, path: str) -> NoReturn:
        """Raise what an answer without an answer means."""
        said = self.quoted(message_of(raw))
        told = f"HTTP {status}: {said}"
        if status == 429 and "insufficient_quota" in raw[:2000].decode("utf-8", "replace"):
            raise EngineError(f"{told}; the quota of this key is used up")
        if status in _TRANSIENT or (status >= 500 and status != 501):
            raise Transient(told, retry_after(headers.get("Retry-After")), "overloaded" if status in _OVERLOADED else "failed")
        if status in (401, 402, 403):
            raise EngineError(f"{told}; {self._about_the_key()}")
        if status == 404:
            raise EngineError(f"{told}; {self._about_the_place(endpoint, path)}")
        if 300 <= status < 400:
            raise EngineError(f"{endpoint.base} answers that it has moved (HTTP {status}); use its new URL")
        if status in (400, 413, 422) and _CONTEXT.search(said):
            raise ContextLengthError(f"{told}; shorten the prompt, or lower max_tokens")
        raise RequestError(told)

    def _about_the_key(self) -> str:
        config = self._config
        if config.key_file:
            return f"the key in the file of {self.section}.key_file is refused"
        if self._key:
            return f"the key in the environment variable {config.key_env} is refused"
        return f"there is no key: set the environment variable {config.key_env} ({self.section}.key_env names it)"

    def _about_the_place(self, endpoint: Endpoint, path: str) -> str:
        there = f"models there: {', '.join(self.models[:10])}; " if self.models else ""
        return f"{there}expected {self.section}.name to be one of them, and {path} below {endpoint.base.removesuffix('/v1')}"

    def quoted(self, said: object) -> str:
        """What a server says, for an error: without the key, in one line, and then cut."""
        return " ".join(self._clean(str(said)).split())[:_QUOTED] or "no message"

    def _clean(self, text: str) -> str:
        """Without the key, whoever repeats it."""
        return _KEY_LIKE.sub("***", text.replace(self._key, "***") if self._key else text)

    async def close(self) -> None:
        """Close connections; what waits fails."""
        for task in self._looking.values():
            task.cancel()
        self._looking.clear()
        while self._waiting:
            self._waiting.popleft().cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Tries:
    """When the attempts at one request are over, and how long to wait before the next."""

    def __init__(self, config: ServerConfig) -> None:
        self._config, self._began = config, time.monotonic()
        self.made = self._failed = self._unreadable = 0

    def are_over(self, state: RetryCallState) -> bool:
        """Overload and absence are waited for; other failures are counted."""
        kind = _failure(state).kind
        self.made += 1
        if kind in _WAITED_FOR:
            return time.monotonic() - self._began > self._config.give_up
        self._failed += 1
        self._unreadable += kind == "no numbers"
        return self._failed > self._config.retries or self._unreadable >= _UNREADABLE

    def pause(self, state: RetryCallState) -> float:
        """Full jitter below an exponential bound, after what the server asks for; a dead URL is waited for elsewhere."""
        failure = _failure(state)
        return 0.0 if failure.kind == "absent" else failure.after + _wait(state)


def _failure(state: RetryCallState) -> Transient:
    failure = state.outcome.exception() if state.outcome else None
    assert isinstance(failure, Transient)
    return failure


def read_key(config: ServerConfig, section: str) -> str | None:
    """The key, from the file or the environment. Raises `ConfigError` where what the recipe names is not there."""
    if config.key_file:
        try:
            key = Path(config.key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{section}.key_file: {config.key_file} cannot be read: {type(exc).__name__}") from exc
        where = f"{section}.key_file: {config.key_file}"
    else:
        key = os.environ.get(config.key_env, "").strip()
        where = f"the environment variable {config.key_env}"
        if not key and config.key_env != type(config).model_fields["key_env"].default:
            raise ConfigError(f"{section}.key_env: {where} is not set; set it to the key")
        if not key:
            return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where} holds no key: expected one line of plain characters")
    return key
