"""Requests to a server's URLs: one session, retries for what can succeed, and a stop for what cannot.

What is retried, with full jitter (Brooker 2015, "Exponential backoff and jitter") and never before `Retry-After`:
connections that break, time-outs, 408, 409, 425, 429, 5xx, answers that cannot be read. What is not: 400 and the like fail
the request; 401, 402 and 404 stop the run, and so does a 403 before the key was ever accepted. Overload (429, 503, 529) and
absence (502, 504, nobody listens) are waited for as long as `server.give_up` says. A key is never part of an error.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from cai.engines.balancing import Balancer, Endpoint
from cai.engines.pacing import Rates
from cai.engines.replies import Refused, Transient, body_of, decode, message_of, retry_after, total_tokens
from cai.errors import ConfigError, ContextLengthError, EngineError, RequestError, VerdictError
from cai.servers import ServerConfig

Answer = TypeVar("Answer")
_CONNECT = 10.0
"""Seconds that a connection may take, and a look at a dead URL."""
_PROBING, _PROBES = 60.0, 5
"""Seconds and tries for a question that finds out what a server can."""
FAILING = 30
"""So many failed requests one after another, with none that succeeded, stop the run; so does a batch of as many."""
UNREADABLE = 4
"""How often an answer that cannot be used is asked for: a model that gives no numbers may give them once more."""
_OVERLOADED, _AWAY = {429, 503, 529}, {502, 504}
_WAITED_FOR = ("overloaded", "away", "absent")
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


class Client:
    """Asks the URLs of one model. Belongs to the event loop in which it is first used."""

    def __init__(self, urls: list[str], config: ServerConfig, section: str) -> None:
        """`section` is what errors call the recipe's section. Raises `ConfigError` for a key that is not there."""
        self.endpoints = [Endpoint(url, config.concurrency) for url in urls]
        self._config, self.section = config, section
        self._key = read_key(config, section)
        self._rates = Rates(config.requests_per_minute, config.tokens_per_minute)
        self._balancer = Balancer(self.endpoints, self._is_there, self._is_over)
        self._session: aiohttp.ClientSession | None = None
        self._last_success = 0.0
        self._failures, self._streak_from = 0, 0
        self._flying: dict[int, None] = {}
        self._number = 0
        self._broken: Exception | None = None
        self.models: list[str] = []
        """Those that the server lists, for errors."""
        self.is_accepted = False
        """Whether the key was good for a question."""

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
        except (ContextLengthError, Refused):
            raise
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

        tries = _Tries(self._config.retries, self._config.give_up, last_success=lambda: self._last_success)
        try:
            return await tries.retrying(again)
        except Transient as exc:
            waited = time.monotonic() - max(self._last_success, tries.began)
            asked, most = exc.after, self._config.give_up
            if exc.kind in _WAITED_FOR and (waited > most / 2 or asked > most):  # else it is this request, and no other
                too_long = f"it asks to wait {asked:.0f} s, more than {self.section}.give_up"
                told = too_long if asked > most else f"no request succeeded for {waited:.0f} s"
                raise EngineError(f"{self.quoted(exc)}; {told}; the same command continues") from exc
            final = VerdictError if exc.kind == "no numbers" else RequestError
            raise final(f"{self.quoted(exc)}; tried {tries.made} times") from exc

    async def _attempt(self, call: Post, read: Callable[[Any], Answer]) -> Answer:
        if self._broken:
            raise self._broken
        await self._rates.wait(call.tokens)
        endpoint = await self._balancer.acquire()
        began, overloaded = time.monotonic(), False
        try:
            async with self._open().post(endpoint.at(call.path), data=call.body, allow_redirects=False) as response:
                raw = await body_of(response)
            if response.status != 200:
                overloaded = response.status in _OVERLOADED
                self._refuse(response.status, raw, response.headers, endpoint, call.path)
            endpoint.missed = 0
            said = decode(raw)
            if self._config.tokens_per_minute:
                self._rates.learn(call.tokens, total_tokens(said))
            return read(said)
        except Transient as exc:
            if exc.after:
                self._balancer.rest(endpoint, exc.after)
                if exc.after > self._config.give_up and any(not (one.dead or one.not_before) for one in self.endpoints):
                    exc.after = 0.0  # the next attempt is made there
            if exc.kind == "away":
                self._balancer.miss(endpoint, str(exc))
            raise
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            problem = str(getattr(exc, "os_error", exc))
            self._balancer.bury(endpoint, problem)
            raise Transient(f"{endpoint.base} cannot be reached: {problem}", kind="absent") from exc
        except TimeoutError as exc:
            overloaded = True
            raise Transient(f"no answer within {self._config.timeout:g} s ({self.section}.timeout)") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise Transient(f"the connection broke: {type(exc).__name__}") from exc
        finally:
            endpoint.window.ended(began, time.monotonic(), (call.path, call.kind), overloaded)
            self._balancer.release(endpoint)

    async def exchange(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON (or message) of one question that nothing depends on; GET where there is no body.

        A 5xx that lasts is an answer, too. Raises `EngineError` where no URL gives one, or the key is refused.
        """
        problem, answer = "", None
        for endpoint in self.endpoints:
            tries = _Tries(_PROBES - 1, min(self._config.give_up, _PROBING), longest=_PROBING)
            try:
                return await tries.retrying(self._exchange, endpoint, path, body)
            except (aiohttp.ClientError, OSError) as exc:
                told = str(getattr(exc, "os_error", exc)) or type(exc).__name__
                problem = f"{endpoint.base} cannot be reached: {told}; start the server or mend the URL"
            except Transient as exc:
                problem = f"{endpoint.base}{path.removeprefix('/v1')}: {self.quoted(exc)}; see the server's log, or try later"
                if exc.status >= 500:
                    answer = exc.status, self.quoted(exc).removeprefix(f"HTTP {exc.status}: ")
        if answer:
            return answer
        raise EngineError(self._clean(problem))

    async def _exchange(self, endpoint: Endpoint, path: str, body: bytes | None) -> tuple[int, Any]:
        method, seconds = "GET" if body is None else "POST", min(self._config.timeout, _PROBING)
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT)
        try:
            async with self._open().request(
                method, endpoint.at(path), data=body, allow_redirects=False, timeout=timeout
            ) as response:
                raw = await body_of(response)
        except aiohttp.ConnectionTimeoutError:
            raise
        except TimeoutError as exc:
            raise Transient(f"no answer within {seconds:g} s") from exc
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError) as exc:
            raise Transient(f"the connection broke: {type(exc).__name__}") from exc
        if response.status == 200:
            self.is_accepted = self.is_accepted or method == "POST"  # some list their models to everybody
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

    async def _is_there(self, endpoint: Endpoint) -> bool:
        """Whether a dead URL answers again, and not only a gateway."""
        quick = aiohttp.ClientTimeout(total=_CONNECT)
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self._open().get(endpoint.at("/v1/models"), timeout=quick, allow_redirects=False) as response:
                return response.status not in {503, *_AWAY}
        return False

    def _is_over(self, endpoint: Endpoint, died: float) -> bool:
        """Whether all URLs are dead for too long; then everything that waits fails."""
        if time.monotonic() - max(died, self._last_success) <= self._config.give_up:
            return False
        self._break(f"{endpoint.base} cannot be reached for {self._config.give_up:g} s: {endpoint.dead}")
        return True

    def _break(self, problem: str) -> None:
        """Nothing can succeed any more: all that waits fails, and so does what comes."""
        self._broken = EngineError(f"{self._clean(problem)}; mend that, then the same command continues")
        self._balancer.fail(self._broken)

    # -- what failed ----------------------------------------------------------------------------------------------------

    def _failed(self, problem: str, number: int) -> None:
        """Count a request that failed for good. Trips where only failures come, and nothing older is still under way."""
        if not self._failures:
            self._streak_from = self._number
        self._failures += 1
        oldest = next(iter(self._flying), number)
        if self._failures >= FAILING and (oldest >= self._streak_from or self._failures >= 10 * FAILING):
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
            kind = "overloaded" if status in _OVERLOADED else "away" if status in _AWAY else "failed"
            raise Transient(told, retry_after(headers.get("Retry-After")), kind, status)
        if status in (401, 402) or (status == 403 and not (self.is_accepted or self._last_success)):
            raise EngineError(f"{told}; {self._about_the_key()}")
        if status == 404:
            raise EngineError(f"{told}; {self._about_the_place(endpoint, path)}")
        if 300 <= status < 400:
            raise EngineError(f"{endpoint.base} answers that it has moved (HTTP {status}); use its new URL")
        if status in (400, 413, 422) and _CONTEXT.search(said):
            raise ContextLengthError(f"{told}; shorten the prompt, or lower max_tokens")
        if status in (400, 422) and self._last_success:
            raise Refused(told)
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
        self._balancer.close()
        if self._session is not None:
            await self._session.close()
            self._session = None


class _Tries:
    """When the attempts at one request are over, and how long to wait before the next."""

    def __init__(
        self, retries: int, give_up: float, longest: float = math.inf, last_success: Callable[[], float] = float
    ) -> None:
        """`give_up`: seconds that overload and absence are waited for; `longest`: seconds after which nothing is."""
        self._retries, self._give_up, self._longest, self._last_success = retries, give_up, longest, last_success
        self.began = time.monotonic()
        self.made = self._failed = self._unreadable = 0

    @property
    def retrying(self) -> AsyncRetrying:
        """Calls what it is given until that works, or the tries are over: then the last failure is raised."""
        return AsyncRetrying(stop=self.are_over, wait=self.pause, retry=retry_if_exception_type(Transient), reraise=True)

    def are_over(self, state: RetryCallState) -> bool:
        """Overload and absence are waited for, the latter from when any request last succeeded; other failures are counted."""
        failure, now = _failure(state), time.monotonic()
        passed = now - self.began
        self.made += 1
        if passed + failure.after > self._longest:
            return True
        if failure.kind == "absent":
            return now - max(self.began, self._last_success()) > self._give_up
        if failure.kind in _WAITED_FOR:
            return max(passed, failure.after) > self._give_up
        self._failed += 1
        self._unreadable += failure.kind == "no numbers"
        return self._failed > self._retries or self._unreadable >= UNREADABLE

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
