"""OpenAI's files and batches: upload JSONL, create, poll, read output and error files, list, cancel, expire.

A batch is checked as the real server checks it (limits, unique custom ids, one endpoint), is in progress for the seconds
of its model's behaviour, and is then answered in the background. Results come in another order than the requests.

Source: the types of the `openai` package (types/batch, types/file_object); limits from the Batch API's guide.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from .questions import RequestError, require
from .service import OPENAI, Service, parsed
from .wire import Incoming, Outgoing, as_json

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000
ENDPOINT = "/v1/chat/completions"
AT_ONCE = 100
"""Lines answered before other requests get their turn."""


@dataclass
class File:
    """A file as it was uploaded or written."""

    described: dict[str, Any]
    content: bytes


@dataclass
class Batch:
    """A batch and the lines that it has to answer."""

    described: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False


class Batches:
    """The files and batches of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._files: dict[str, File] = {}
        self._batches: dict[str, Batch] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def route(self, incoming: Incoming) -> Outgoing:
        """Answer a request below `/v1/files` or `/v1/batches`."""
        _, _, kind, *rest = incoming.path.split("/")
        call = (incoming.method, kind, len(rest))
        if call == ("POST", "files", 0):
            return as_json(self._upload(incoming).described)
        if call == ("POST", "batches", 0):
            return as_json(self._create(parsed(incoming.body)).described)
        if call == ("POST", "batches", 2) and rest[1] == "cancel":
            return as_json(self._cancel(self._batch(rest[0])).described)
        if call == ("GET", "files", 2) and rest[1] == "content":
            return Outgoing(self._file(rest[0]).content, content_type="application/octet-stream")
        if call == ("GET", kind, 1):
            return as_json(self._file(rest[0]).described if kind == "files" else self._batch(rest[0]).described)
        if call == ("DELETE", "files", 1):
            self._files.pop(self._file(rest[0]).described["id"])
            return as_json({"id": rest[0], "object": "file", "deleted": True})
        if call == ("GET", kind, 0):
            files, batches = list(self._files.values()), list(self._batches.values())
            found = [f.described for f in files] if kind == "files" else [b.described for b in batches]
            return as_json(_page(found[::-1], incoming))
        raise RequestError(404, f"Invalid URL ({incoming.method} {incoming.path})")

    def _file(self, name: str) -> File:
        if name not in self._files:
            raise RequestError(404, f"No such File object: {name}")
        return self._files[name]

    def _batch(self, name: str) -> Batch:
        if name not in self._batches:
            raise RequestError(404, f"No batch found with id '{name}'.")
        return self._batches[name]

    def _upload(self, incoming: Incoming) -> File:
        form = _multipart(incoming)
        require("file" in form and "purpose" in form, "file and purpose are required")
        filename, content = form["file"]
        limit = 512_000_000
        require(len(content) <= limit, "File is too large", "file_too_large")
        return self._keep(filename or "upload", form["purpose"][1].decode(), content)

    def _keep(self, filename: str, purpose: str, content: bytes) -> File:
        described: dict[str, Any] = {
            "id": f"file-{next(self._numbers)}",
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self._files[described["id"]] = File(described, content)
        return self._files[described["id"]]

    def _create(self, asked: dict[str, Any]) -> Batch:
        require(asked.get("endpoint") == ENDPOINT, f"Invalid endpoint: {asked.get('endpoint')!r}")
        require(asked.get("completion_window") == "24h", "Invalid completion_window")
        source = self._file(asked.get("input_file_id", ""))
        require(source.described["purpose"] == "batch", "the input file's purpose must be 'batch'")
        metadata = asked.get("metadata")
        require(metadata is None or len(metadata) <= 16, "metadata: at most 16 pairs")
        now = int(time.time())
        described = {
            "id": f"batch_{next(self._numbers)}",
            "object": "batch",
            "endpoint": ENDPOINT,
            "errors": None,
            "input_file_id": source.described["id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + 86_400,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
        }
        batch = self._batches[str(described["id"])] = Batch(described)
        task = asyncio.get_running_loop().create_task(self._work(batch, source.content))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def _cancel(self, batch: Batch) -> Batch:
        if batch.described["status"] not in ("completed", "failed", "expired", "cancelled"):
            batch.cancelled = True
            batch.described |= {"status": "cancelling", "cancelling_at": int(time.time())}
        return batch

    async def _work(self, batch: Batch, content: bytes) -> None:
        described = batch.described
        try:
            batch.lines = await _lines(content)
            model = self._service.model(batch.lines[0]["body"].get("model", ""))
            _check(batch.lines, content, model.behaviour.batch_max_requests, model.behaviour.batch_max_bytes)
            require(not model.behaviour.batch_fails, model.behaviour.batch_fails)
        except (RequestError, KeyError, TypeError, ValueError) as error:
            told = {"code": getattr(error, "code", None), "message": str(error), "line": None, "param": None}
            described |= {"status": "failed", "failed_at": int(time.time())}
            described["errors"] = {"object": "list", "data": [told]}
            return
        described["request_counts"]["total"] = len(batch.lines)
        if not batch.cancelled:
            described |= {"status": "in_progress", "in_progress_at": int(time.time())}
        until = time.monotonic() + model.behaviour.batch_s
        while time.monotonic() < until and not batch.cancelled:
            await asyncio.sleep(0.02)
        await self._answer(batch, model.behaviour.batch_expires_after)

    async def _answer(self, batch: Batch, expires_after: int | None) -> None:
        outputs: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        limit = len(batch.lines) if expires_after is None else expires_after
        for number, line in enumerate(batch.lines):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            if batch.cancelled or number >= limit:
                errors.append(_unanswered(line, "batch_cancelled" if batch.cancelled else "batch_expired"))
                continue
            status, body = self._service.line(OPENAI, line["body"], line["custom_id"], ENDPOINT)
            result = {"status_code": status, "request_id": f"req_{number}", "body": body}
            (outputs if status == 200 else errors).append(
                {"id": f"batch_req_{number}", "custom_id": line["custom_id"], "response": result, "error": None}
            )
            batch.described["request_counts"]["completed" if status == 200 else "failed"] += 1
        self._finish(batch, outputs, errors, expired=limit < len(batch.lines))

    def _finish(self, batch: Batch, outputs: list[dict[str, Any]], errors: list[dict[str, Any]], expired: bool) -> None:
        described = batch.described
        for name, rows in (("output", outputs), ("error", errors)):
            if rows:
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in reversed(rows))
                kept = self._keep(f"{described['id']}_{name}.jsonl", "batch_output", text.encode())
                described[f"{name}_file_id"] = kept.described["id"]
        status = "cancelled" if batch.cancelled else "expired" if expired else "completed"
        described |= {"status": status, f"{status}_at": int(time.time())}
        batch.lines = []


async def _lines(content: bytes) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(content.splitlines()):
        if number % (AT_ONCE * 10) == 0:
            await asyncio.sleep(0)
        lines.append(json.loads(line))
    require(bool(lines), "The input file is empty.", "empty_file")
    return lines


def _check(lines: list[dict[str, Any]], content: bytes, requests: int | None, size: int | None) -> None:
    require(len(lines) <= (requests or MAX_REQUESTS), "The batch has too many requests.", "too_many_tasks")
    require(len(content) <= (size or MAX_BYTES), "The batch input file is too large.", "file_too_large")
    ids = {line["custom_id"] for line in lines}
    require(len(ids) == len(lines), "The custom_id of a request is not unique.", "duplicate_custom_id")
    require(
        all(line["method"] == "POST" and line["url"] == ENDPOINT for line in lines),
        "Wrong method or url.",
        "mismatched_url",
    )
    models = {line["body"].get("model") for line in lines}
    require(len(models) == 1, "All requests of a batch must be for the same model.", "mismatched_model")


def _unanswered(line: dict[str, Any], code: str) -> dict[str, Any]:
    message = "This request could not be executed before the completion window expired."
    error = {"code": code, "message": message if code == "batch_expired" else "This request was cancelled."}
    return {"id": f"batch_req_{line['custom_id']}", "custom_id": line["custom_id"], "response": None, "error": error}


def _page(rows: list[dict[str, Any]], incoming: Incoming) -> dict[str, Any]:
    """Newest first, as the server lists them."""
    after, limit = incoming.query.get("after"), int(incoming.query.get("limit", 20))
    start = next((n + 1 for n, row in enumerate(rows) if row["id"] == after), 0)
    shown = rows[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(rows) > start + limit,
    }


def _multipart(incoming: Incoming) -> dict[str, tuple[str | None, bytes]]:
    """Return the parts of a form: name → (file name, content)."""
    boundary = re.search(r'boundary="?([^";]+)', incoming.headers.get("content-type", ""))
    require(boundary is not None, "expected multipart/form-data")
    assert boundary is not None
    parts = {}
    for part in incoming.body.split(b"--" + boundary[1].encode())[1:-1]:
        head, _, content = part[2:-2].partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="([^"]*)"', head)
        filename = re.search(rb'filename="([^"]*)"', head)
        if name:
            parts[name[1].decode()] = (filename[1].decode() if filename else None, content)
    return parts
