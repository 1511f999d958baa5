"""Anthropic's message batches: create, poll, results as JSONL, list, cancel, expire.

Source: the types of the `anthropic` package (types/messages/message_batch*); limits from the Message Batches guide.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from .behaviours import Behaviour
from .questions import RequestError, require
from .service import ANTHROPIC, Service, parsed
from .wire import Incoming, Outgoing, as_json

MAX_REQUESTS, MAX_BYTES = 100_000, 256_000_000
AT_ONCE = 100
_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass
class Batch:
    """A batch, its requests until they are answered, and its results."""

    described: dict[str, Any]
    requests: list[dict[str, Any]]
    results: bytes = b""
    cancelled: bool = False


class Batches:
    """The message batches of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._batches: dict[str, Batch] = {}
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def route(self, incoming: Incoming) -> Outgoing:
        """Answer a request below `/v1/messages/batches`."""
        rest = incoming.path.split("/")[4:]
        call = (incoming.method, *rest[1:]) if rest else (incoming.method, "all")
        if call == ("POST", "all"):
            return as_json(self._create(incoming).described)
        if call == ("GET", "all"):
            return as_json(_page([batch.described for batch in reversed(self._batches.values())], incoming))
        batch = self._batches.get(rest[0]) if rest else None
        if batch is None:
            raise RequestError(404, f"Batch not found: {incoming.path}")
        if call == ("GET",):
            return as_json(batch.described)
        if call == ("POST", "cancel"):
            return as_json(_cancel(batch).described)
        if call == ("GET", "results"):
            require(batch.described["processing_status"] == "ended", "The batch has not ended.")
            return Outgoing(batch.results, content_type="application/x-jsonl")
        if call == ("DELETE",):
            require(batch.described["processing_status"] == "ended", "A batch in progress cannot be deleted.")
            self._batches.pop(rest[0])
            return as_json({"id": rest[0], "type": "message_batch_deleted"})
        raise RequestError(404, f"Not found: {incoming.path}")

    def _create(self, incoming: Incoming) -> Batch:
        requests = parsed(incoming.body).get("requests") or []
        require(bool(requests), "requests: at least one request is required")
        behaviour = self._behaviour(requests)
        if len(incoming.body) > (behaviour.batch_max_bytes or MAX_BYTES):
            raise RequestError(413, "Request exceeds the maximum size")
        most = behaviour.batch_max_requests or MAX_REQUESTS
        require(len(requests) <= most, f"requests: at most {most} requests")
        ids = [str(request.get("custom_id", "")) for request in requests]
        require(all(map(_CUSTOM_ID.fullmatch, ids)), "requests: custom_id must match ^[a-zA-Z0-9_-]{1,64}$")
        require(len(set(ids)) == len(ids), "requests: custom_id must be unique")
        require(not behaviour.batch_fails, behaviour.batch_fails)
        batch = Batch(_described(f"msgbatch_{next(self._numbers)}", len(requests)), requests)
        self._batches[batch.described["id"]] = batch
        host = incoming.headers.get("host", "127.0.0.1")
        task = asyncio.get_running_loop().create_task(self._work(batch, behaviour, f"http://{host}"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return batch

    def _behaviour(self, requests: list[dict[str, Any]]) -> Behaviour:
        """Of the first request's model; a model that is unknown fails its own requests only, as the real server has it."""
        try:
            return self._service.model(str(requests[0].get("params", {}).get("model", ""))).behaviour
        except RequestError:
            return Behaviour()

    async def _work(self, batch: Batch, behaviour: Behaviour, host: str) -> None:
        until = time.monotonic() + behaviour.batch_s
        while time.monotonic() < until and not batch.cancelled:
            await asyncio.sleep(0.02)
        limit = len(batch.requests) if behaviour.batch_expires_after is None else behaviour.batch_expires_after
        counts = batch.described["request_counts"]
        rows = []
        for number, request in enumerate(batch.requests):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            result = self._result(request) if not batch.cancelled and number < limit else None
            result = result or {"type": "canceled" if batch.cancelled else "expired"}
            counts[result["type"]] += 1
            counts["processing"] -= 1
            rows.append(json.dumps({"custom_id": request["custom_id"], "result": result}, ensure_ascii=False) + "\n")
        batch.results, batch.requests = "".join(reversed(rows)).encode(), []
        results_url = f"{host}/v1/messages/batches/{batch.described['id']}/results"
        batch.described |= {"processing_status": "ended", "ended_at": _now(), "results_url": results_url}

    def _result(self, request: dict[str, Any]) -> dict[str, Any]:
        status, body = self._service.line(ANTHROPIC, request["params"], request["custom_id"], "/v1/messages")
        return {"type": "succeeded", "message": body} if status == 200 else {"type": "errored", "error": body}


def _described(name: str, requests: int) -> dict[str, Any]:
    return {
        "id": name,
        "type": "message_batch",
        "processing_status": "in_progress",
        "request_counts": {"processing": requests, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0},
        "created_at": _now(),
        "expires_at": _now(hours=24),
        "ended_at": None,
        "archived_at": None,
        "cancel_initiated_at": None,
        "results_url": None,
    }


def _cancel(batch: Batch) -> Batch:
    if batch.described["processing_status"] == "in_progress":
        batch.cancelled = True
        batch.described |= {"processing_status": "canceling", "cancel_initiated_at": _now()}
    return batch


def _now(hours: int = 0) -> str:
    return (datetime.now(UTC) + timedelta(hours=hours)).isoformat().replace("+00:00", "Z")


def _page(rows: list[dict[str, Any]], incoming: Incoming) -> dict[str, Any]:
    after, limit = incoming.query.get("after_id"), int(incoming.query.get("limit", 20))
    start = next((n + 1 for n, row in enumerate(rows) if row["id"] == after), 0)
    shown = rows[start : start + limit]
    return {
        "data": shown,
        "has_more": len(rows) > start + limit,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }
