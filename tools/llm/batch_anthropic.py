"""Anthropic's message batches: all requests go out with the batch, and come back as JSONL when it has ended.

1. The body is streamed from a file: the SDK's own method would hold all requests as objects, and as text once more.
2. A batch has no metadata. It is known by the nonce in the ids of its requests, which results show only once it has ended.
   A search for a lost batch looks at those made since with as many requests; one that has not ended leaves it undecided.
3. Where a model takes no `output_config`, schemas are asked for in words: forced tools wrap some answers, and whoever reads
   the results after a restart does not know which.

Limits: 100,000 requests and 256 MB a batch, ids of 1 to 64 characters of [a-zA-Z0-9_-] (Anthropic's guide to batch
processing, and its reference of `custom_id`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import anthropic
import httpx2
from anthropic.types import Message as Answer
from anthropic.types.messages import MessageBatch

from exegete.tools.llm.anthropic_client import AnthropicWire
from exegete.tools.llm.batch_wire import (
    Frame,
    Gone,
    Result,
    Sighting,
    State,
    begun,
    doubtful,
    listed,
    nonce_of,
    outcome,
    save,
    sound,
)
from exegete.tools.llm.contract import Reply, Request
from exegete.tools.llm.faults import Transient, fault_of
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.specs import Spec

_PATH = "/v1/messages/batches"
_PAGE = 100
_CHUNK = 1 << 20
_CODES = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "api_error": 500, "timeout_error": 504,
    "overloaded_error": 529,
}  # fmt: skip
"""HTTP statuses of the errors that a result may name (Anthropic's reference of errors)."""


class AnthropicBatchWire(AnthropicWire):
    """Sends batches through Anthropic's SDK, its own retries off."""

    max_requests = 100_000
    max_bytes = 256_000_000
    frame = Frame(b'{"requests":[', b",\n", b"]}")

    def __init__(self, spec: Spec, limits: Limits, transfer_s: float) -> None:
        """Open a client; nothing is sent yet. Raises UserError where the key is missing."""
        super().__init__(spec, limits)
        self._transfer_s = transfer_s
        self._transfer = httpx2.Timeout(transfer_s, connect=limits.connect_s, pool=None)
        self._nonces: dict[str, str] = {}

    def line(self, custom_id: str, request: Request) -> bytes:
        """Return one element of the list that is sent."""
        way = self.abilities.way if request.schema is not None else ""
        row = {"custom_id": custom_id, "params": self.body(request, "words" if way == "tool" else way)}
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()

    async def prepare(self, file: Path) -> str:
        """Nothing need be brought anywhere: the batch takes the file along."""
        return str(file)

    async def create(self, prepared: str, nonce: str) -> str:
        """Send the batch."""
        file = Path(prepared)
        headers = {"content-type": "application/json", "content-length": str(file.stat().st_size)}

        async def make() -> str:
            made: Any = await self._client.post(
                _PATH,
                cast_to=MessageBatch,
                content=_chunks(file),
                options={"headers": headers, "timeout": self._transfer},
            )
            return _checked(made, sent=True).id

        try:
            return await self._within(self._transfer_s, make)
        except Transient as fault:
            raise doubtful(fault) from None

    async def find(self, nonce: str, requests: int) -> Sighting:
        """Look at the batches made since that have as many requests, and whose nonce is not known."""

        async def search() -> Sighting:
            undecided = False
            async for batch in listed(self._client.messages.batches.list(limit=_PAGE)):
                if batch.created_at.timestamp() < begun(nonce):
                    break
                if batch.id in self._nonces or _requests(batch) != requests:
                    found = self._nonces.get(batch.id, "")
                elif batch.processing_status != "ended":
                    undecided, found = True, ""
                else:
                    found = self._nonces[batch.id] = await self._first_nonce(batch)
                if found == nonce:
                    return Sighting(batch.id)
            return Sighting(undecided=undecided)

        return await self._within(self._transfer_s, lambda: sound(search))

    def know(self, batch: str, nonce: str) -> None:
        """Note whose a batch is."""
        self._nonces[batch] = nonce

    async def state(self, batch: str) -> State:
        """Return how the batch stands."""
        found = await self._retrieved(batch)
        return State(found.processing_status == "ended", rows=found.request_counts.succeeded or 0)

    async def fetch(self, batch: str, file: BinaryIO) -> None:
        """Write the results of a batch to `file`."""
        if not _readable(await self._retrieved(batch)):
            raise Gone(batch)

        async def download() -> None:
            try:
                await save(self._results(batch), file)
            except anthropic.NotFoundError:
                raise Gone(batch) from None

        await self._within(self._transfer_s, download)

    def result(self, row: dict[str, Any]) -> Result:
        """Return one line of the results as a result."""
        return outcome(str(row["custom_id"]), lambda: self._reply(row["result"]))

    def _reply(self, result: dict[str, Any]) -> Reply:
        kind = result["type"]
        if kind == "succeeded":
            return self.reply_of(Answer.construct(**result["message"]))
        if kind in ("expired", "canceled"):
            raise Transient(f"not done: {kind}")
        told = result["error"].get("error") or {}
        code, text = _CODES.get(str(told.get("type")), 500), self._scrub(str(told.get("message") or "no reason given"))
        raise fault_of(self.name, self._spec.key_variable, code, text, {}, (True, False))

    async def _retrieved(self, batch: str) -> MessageBatch:
        async def retrieve() -> MessageBatch:
            try:
                return _checked(await self._client.messages.batches.retrieve(batch))
            except anthropic.NotFoundError:
                raise Gone(batch) from None

        return await self._within(self._limits.total_s, retrieve)

    async def _first_nonce(self, batch: MessageBatch) -> str:
        if not _readable(batch):
            return ""
        begin = b""
        async with self._results(batch.id) as response:
            async for chunk in response.iter_bytes():
                begin += chunk
                if b"\n" in begin:
                    break
        return nonce_of(str(json.loads(begin.partition(b"\n")[0])["custom_id"]))

    def _results(self, batch: str) -> Any:
        return self._client.messages.batches.with_streaming_response.results(batch, timeout=self._transfer)


async def _chunks(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            yield chunk


def _requests(batch: MessageBatch) -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired


def _readable(batch: MessageBatch) -> bool:
    # Results are kept for 29 days.
    return batch.results_url is not None and batch.archived_at is None


def _checked(batch: Any, sent: bool = False) -> MessageBatch:
    # The SDK takes whatever shape comes.
    if not isinstance(batch, MessageBatch) or not isinstance(batch.id, str) or batch.request_counts is None:
        raise Transient("broken reply: no batch", sent=sent)
    return batch
