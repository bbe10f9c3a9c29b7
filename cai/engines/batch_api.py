"""The batch API of OpenAI: a file of calls is handed over, a batch is looked at, and files of answers are fetched.

{"custom_id": "9f2c…", "method": "POST", "url": "/v1/chat/completions", "body": {…}}     -> /v1/files -> /v1/batches
{"custom_id": "9f2c…", "response": {"status_code": 200, "body": {…}}, "error": null}     <- /v1/files/{id}/content
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import aiohttp
import msgspec

from cai.engines.http import Client, Post
from cai.engines.replies import Transient, decode
from cai.errors import ConfigError, EngineError

_FILES, _BATCHES = "/v1/files", "/v1/batches"
_PAGE = 100
"""Batches that are listed at once."""
_TOO_MUCH = "token_limit_exceeded"
_SHOWN = 3
"""Problems of a refused batch that an error repeats."""


class Look(NamedTuple):
    """A batch as the server shows it."""

    status: str
    """`validating`, `in_progress`, `finalizing`, `completed`, `failed`, `expired`, `cancelling` or `cancelled`."""
    total: int
    finished: int
    files: tuple[str, ...]
    """Where its answers are."""
    problems: str
    """Why it was refused."""
    is_too_much: bool
    """Whether the reason is how much the server has to do for this account already (OpenAI's enqueued tokens)."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("completed", "failed", "expired", "cancelled")


def encode_line(custom_id: str, call: Post) -> bytes:
    """A call as a line of a batch's file."""
    line = {"custom_id": custom_id, "method": "POST", "url": call.path, "body": msgspec.Raw(call.body)}
    return msgspec.json.encode(line) + b"\n"


class BatchApi:
    """What a server's batch API offers; each call is repeated where that can help. Raises `RequestError`, `EngineError`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def upload(self, content: bytes) -> str:
        """The id of a file of calls."""

        async def upload() -> str:
            form = aiohttp.FormData()
            form.add_field("purpose", "batch")
            form.add_field("file", io.BytesIO(content), filename="cai.jsonl", content_type="application/jsonl")
            return str((await self._needed(_FILES, form))["id"])

        return await self._client.tries(upload)

    async def create(self, name: str, path: str, file: str) -> str:
        """The id of a new batch. An attempt that broke may have created it, so that it is looked for before the next one."""
        body = {"input_file_id": file, "endpoint": path, "completion_window": "24h", "metadata": {"cai": name}}
        encoded, tried = msgspec.json.encode(body), False

        async def create() -> str:
            nonlocal tried
            if tried and (found := await self.find(name)):
                return found
            tried = True
            return str((await self._needed(_BATCHES, encoded))["id"])

        return await self._client.tries(create)

    async def find(self, name: str) -> str | None:
        """The id of the batch with this name in its metadata, among all that the server lists."""
        path = f"{_BATCHES}?limit={_PAGE}"
        while True:
            listed = await self._client.tries(lambda place=path: self._needed(place))  # type: ignore[misc]
            data = listed.get("data") or []
            for one in data:
                if (one.get("metadata") or {}).get("cai") == name:
                    return str(one["id"])
            if not data or not listed.get("has_more"):
                return None
            path = f"{_BATCHES}?limit={_PAGE}&after={data[-1]['id']}"

    async def look(self, batch: str) -> Look | None:
        """How far a batch is; None where the server does not know it."""
        said = await self._client.tries(lambda: self._json(f"{_BATCHES}/{batch}"))
        if said is None:
            return None
        counts = said.get("request_counts") or {}
        finished = int(counts.get("completed") or 0) + int(counts.get("failed") or 0)
        files = tuple(str(said[key]) for key in ("output_file_id", "error_file_id") if said.get(key))
        found = ((said.get("errors") or {}).get("data")) or []
        errors = [one for one in found if isinstance(one, dict)]
        told = [f"line {one['line']}: {one.get('message')}" if one.get("line") else str(one.get("message")) for one in errors]
        problems = self._client.quoted("; ".join(told[:_SHOWN]) or "it does not say why")
        too_much = any(one.get("code") == _TOO_MUCH for one in errors)
        return Look(str(said.get("status")), int(counts.get("total") or 0), finished, files, problems, too_much)

    async def answers(self, file: str) -> Iterator[dict[str, Any]] | None:
        """The lines of a file of answers, of which a damaged one answers no call; None where there is no such file."""
        raw = await self._client.tries(lambda: self._client.fetch(f"{_FILES}/{file}/content"))
        return None if raw is None else (said for said in map(_decode_line, raw.split(b"\n")) if said)

    def body(self, answered: dict[str, Any], path: str) -> Any:
        """What a line holds; raises what the same answer to a single call would, `Transient` where there is none."""
        response = answered.get("response")
        if not isinstance(response, dict):
            error = answered.get("error")
            told = error.get("message") or error.get("code") if isinstance(error, dict) else error
            raise Transient(f"the batch has no answer: {told}")
        if (status := int(response.get("status_code") or 0)) != 200:
            self._client.refuse_line(status, msgspec.json.encode(response.get("body")), path)
        return response.get("body")

    async def _json(self, path: str, body: bytes | aiohttp.FormData | None = None) -> dict[str, Any] | None:
        raw = await self._client.fetch(path, body)
        said = None if raw is None else decode(raw)
        if said is not None and not isinstance(said, dict):
            raise Transient(f"expected a JSON object from {path}")
        return said

    async def _needed(self, path: str, body: bytes | aiohttp.FormData | None = None) -> dict[str, Any]:
        said = await self._json(path, body)
        if said is None:
            base = self._client.endpoints[0].base
            raise EngineError(f"{base} has no {path} (HTTP 404): leave out {self._client.section}.batch")
        return said


def _decode_line(text: bytes) -> dict[str, Any]:
    try:
        said = decode(text) if text.strip() else {}
    except Transient:
        return {}
    return said if isinstance(said, dict) else {}


async def check_batches(client: Client) -> None:
    """Raises `ConfigError` where the server has no batch API."""
    try:
        status, said = await client.exchange(f"{_BATCHES}?limit=1")
    except EngineError as exc:
        raise ConfigError(str(exc)) from exc
    if status != 200:
        place = f"{client.endpoints[0].base}/batches"
        meaning = "try later, or" if status >= 500 else "it has no batch API:"
        raise ConfigError(f"{place} answers HTTP {status}: {said}; {meaning} leave out {client.section}.batch")
