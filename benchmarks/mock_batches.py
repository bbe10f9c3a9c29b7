"""The batch API of the mock server: files, batches that take a while, and what can go wrong with them.

A batch is validated, is in progress for `batch_delay` seconds, and its lines are answered when that time is over: so what
the server counts is what would be paid for.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

MOST_LINES = 50_000


class Line(Struct):
    """A line of a batch's file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Batch(Struct):
    """A batch, as `/v1/batches` shows it but for its lines."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    status: str = "validating"
    metadata: dict[str, str] = {}
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: dict[str, int] = {}
    object: str = "batch"
    lines: list[Line] | UnsetType = UNSET


class Asked(Struct):
    """What creates a batch."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] = {}


class Problem(Exception):
    """What is wrong with a request: the status and a message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Batches:
    """The files and batches of one server; `server` answers lines and holds the settings."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Batch] = {}
        self.lines = 0

    async def handle(self, request: web.BaseRequest) -> Any:
        """JSON or bytes for a request below /v1/files or /v1/batches. Raises `Problem`."""
        parts = request.path.strip("/").split("/")[1:]
        match request.method, parts:
            case "POST", ["files"]:
                return await self._upload(request)
            case "GET", ["files", name, "content"] if name in self.files:
                if self._server.settings.batch_late > 0:
                    self._server.settings.batch_late -= 1
                    raise Problem(404, "No such File object")
                return self.files[name]
            case "POST", ["batches"]:
                return self._create(await request.read())
            case "GET", ["batches"]:
                return self._list(request)
            case "GET", ["batches", name] if name in self.batches:
                return self._shown(self.batches[name])
            case "POST", ["batches", name, "cancel"] if name in self.batches:
                self.batches[name].status = "cancelled"
                return self._shown(self.batches[name])
        raise Problem(404, "Not Found")

    async def _upload(self, request: web.BaseRequest) -> dict[str, Any]:
        fields: dict[str, bytes] = {}
        async for part in await request.multipart():
            content = bytearray()
            while chunk := await part.read_chunk(1 << 20):  # type: ignore[union-attr]
                content += chunk
            fields[part.name or ""] = bytes(content)  # type: ignore[union-attr]
        if fields.get("purpose") != b"batch" or "file" not in fields:
            raise Problem(400, "expected a file, and the purpose 'batch'")
        return {"id": self._store(fields["file"]), "object": "file", "purpose": "batch", "bytes": len(fields["file"])}

    def _store(self, content: bytes) -> str:
        name = f"file-{len(self.files) + 1}"
        self.files[name] = content
        return name

    def _create(self, raw: bytes) -> dict[str, Any]:
        try:
            asked = msgspec.json.decode(raw, type=Asked)
        except msgspec.DecodeError as exc:
            raise Problem(400, str(exc)) from exc
        if asked.completion_window != "24h" or asked.input_file_id not in self.files:
            raise Problem(400, "expected completion_window 24h, and input_file_id of an uploaded file")
        batch = Batch(f"batch_{len(self.batches) + 1}", created_at=time.time(), **msgspec.structs.asdict(asked))
        self.batches[batch.id] = batch
        return self._shown(batch)

    def _list(self, request: web.BaseRequest) -> dict[str, Any]:
        """The newest first, `limit` at a time, those behind `after`."""
        names = [*self.batches][::-1]
        after, limit = request.query.get("after"), int(request.query.get("limit", 20))
        rest = names[names.index(after) + 1 :] if after else names
        limit = min(limit, self._server.settings.batch_page)
        data = [self._shown(self.batches[name]) for name in rest[:limit]]
        return {"object": "list", "data": data, "has_more": len(rest) > limit}

    def _shown(self, batch: Batch) -> dict[str, Any]:
        self._advance(batch)
        shown: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(batch, lines=UNSET))
        return shown

    def _advance(self, batch: Batch) -> None:
        """What time has brought."""
        delay = self._server.settings.batch_delay
        age = time.time() - batch.created_at
        if batch.status == "validating" and age >= delay / 4:
            self._validate(batch)
        if batch.status == "in_progress" and batch.lines is not UNSET:
            total = len(batch.lines)
            done = total if age >= delay else int(total * age / delay)
            batch.request_counts = {"total": total, "completed": done, "failed": 0}
            if age >= delay:
                self._work(batch, batch.lines)

    def _validate(self, batch: Batch) -> None:
        problem = self._server.settings.batch_refuse or self._find_problem(batch)
        code = "invalid"
        if not problem and self._under_way() + self._size(batch) > self._server.settings.batch_room:
            problem, code = "Enqueued token limit reached", "token_limit_exceeded"
        batch.status = "failed" if problem else "in_progress"
        if problem:
            batch.errors = {"object": "list", "data": [{"code": code, "line": None, "message": problem, "param": None}]}

    def _size(self, batch: Batch) -> int:
        return self.files[batch.input_file_id].count(b"\n")

    def _under_way(self) -> int:
        return sum(self._size(one) for one in self.batches.values() if one.status == "in_progress")

    def _find_problem(self, batch: Batch) -> str:
        try:
            batch.lines = msgspec.json.Decoder(Line).decode_lines(self.files[batch.input_file_id])
        except msgspec.DecodeError as exc:
            return f"not a line of a batch: {exc}"
        if not 0 < len(batch.lines) <= MOST_LINES:
            return f"{len(batch.lines)} lines"
        if len({line.custom_id for line in batch.lines}) < len(batch.lines):
            return "a custom_id is used twice"
        if any(line.method != "POST" or line.url != batch.endpoint for line in batch.lines):
            return f"expected POST {batch.endpoint} in every line"
        return ""

    def _work(self, batch: Batch, lines: list[Line]) -> None:
        settings = self._server.settings
        expires = settings.batch_expire > 0
        settings.batch_expire -= expires
        good: list[bytes] = []
        bad: list[bytes] = []
        for number, line in enumerate(lines):
            if expires and number % 2:
                error = {"code": "batch_expired", "message": "This request could not be executed before the window expired."}
                bad.append(self._encoded(batch, line, None, error))
                continue
            self.lines += 1
            status, body = self._server.answer_line(line.url, bytes(line.body))
            (good if status == 200 else bad).append(self._encoded(batch, line, {"status_code": status, "body": body}, None))
        batch.output_file_id = self._store(b"".join(reversed(good))) if good else None
        batch.error_file_id = self._store(b"".join(bad)) if bad else None
        batch.request_counts = {"total": len(lines), "completed": len(good), "failed": len(bad)}
        batch.status = "expired" if expires else "completed"

    def _encoded(self, batch: Batch, line: Line, response: Any, error: Any) -> bytes:
        said = {"id": f"{batch.id}_{line.custom_id}", "custom_id": line.custom_id, "response": response, "error": error}
        return msgspec.json.encode(said) + b"\n"

    def stats(self) -> dict[str, Any]:
        """How many batches there were, how they are, and how many lines were answered."""
        return {
            "lines": self.lines,
            "statuses": {name: batch.status for name, batch in self.batches.items()},
            "endpoints": {name: batch.endpoint for name, batch in self.batches.items()},
            "sizes": {name: self._size(batch) for name, batch in self.batches.items()},
            "files": len(self.files),
        }
