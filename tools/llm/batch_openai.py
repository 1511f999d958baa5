"""OpenAI's batches: a JSONL file is uploaded, a batch made of it, and its output and error files are read.

1. The file holds one request a line (custom_id, method, url, body), as `vllm run-batch` reads it too.
2. The nonce stands in the batch's metadata, which the list of batches shows: a batch whose id was lost is found there.
3. A batch that the provider's queue has no room for (enqueued tokens) fails as a whole and may be sent again later.

Limits: 50,000 requests and 200 MB a file (OpenAI's Batch API reference, `input_file_id`; docstring of
`openai.resources.batches.Batches.create`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx2
import openai
from openai.types import Batch
from openai.types.chat import ChatCompletion

from exegete.tools.errors import UserError
from exegete.tools.llm.batch_wire import (
    Frame,
    Gone,
    Result,
    Sighting,
    State,
    doubtful,
    listed,
    outcome,
    save,
    sound,
)
from exegete.tools.llm.contract import Reply, Request
from exegete.tools.llm.faults import Transient, fault_of
from exegete.tools.llm.openai_client import OpenAIWire
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.specs import Spec

_ENDPOINT: Final = "/v1/chat/completions"
_ENDED = ("completed", "expired", "cancelled")
_NO_ROOM = re.compile(r"(?i)token_limit_exceeded|enqueued|too many batches|rate.?limit")
_OWN_FAULT = re.compile(r"(?i)server.?error|internal|try again|timed? ?out|temporar")
_PAGE = 100


class OpenAIBatchWire(OpenAIWire):
    """Sends batches through OpenAI's SDK, its own retries off."""

    max_requests = 50_000
    max_bytes = 200_000_000
    frame = Frame(b"", b"\n", b"\n")

    def __init__(self, spec: Spec, limits: Limits, transfer_s: float) -> None:
        """Open a client; nothing is sent yet. Raises UserError where the key is missing."""
        super().__init__(spec, limits)
        self._transfer_s = transfer_s
        self._transfer = httpx2.Timeout(transfer_s, connect=limits.connect_s, pool=None)

    def line(self, custom_id: str, request: Request) -> bytes:
        """Return one line of the file that is uploaded."""
        way = self.abilities.way if request.schema is not None else ""
        body = self.body(request, way, self.abilities.alternatives if request.logprobs else 0)
        row = {"custom_id": custom_id, "method": "POST", "url": _ENDPOINT, "body": body}
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()

    async def prepare(self, file: Path) -> str:
        """Upload the file; return the id that it got."""

        async def upload() -> str:
            with file.open("rb") as content:
                made: Any = await self._client.files.create(
                    file=(file.name, content), purpose="batch", timeout=self._transfer
                )
                return _name(made)

        return await self._within(self._transfer_s, upload)

    async def create(self, prepared: str, nonce: str) -> str:
        """Make a batch of an uploaded file."""

        async def make() -> str:
            made: Any = await self._client.batches.create(
                input_file_id=prepared, endpoint=_ENDPOINT, completion_window="24h", metadata={"nonce": nonce}
            )
            return _name(made)

        try:
            return await self._within(self._limits.total_s, make)
        except Transient as fault:
            raise doubtful(fault) from None

    async def find(self, nonce: str, requests: int) -> Sighting:
        """Look for the nonce in the metadata of all batches: the order of the list is not documented."""

        async def search() -> Sighting:
            async for batch in listed(self._client.batches.list(limit=_PAGE)):
                if (batch.metadata or {}).get("nonce") == nonce:
                    return Sighting(batch.id)
            return Sighting()

        return await self._within(self._transfer_s, lambda: sound(search))

    def know(self, batch: str, nonce: str) -> None:
        """Nothing need be noted: a batch's metadata says whose it is."""

    async def state(self, batch: str) -> State:
        """Return how the batch stands."""
        return self._state(await self._retrieved(batch))

    async def fetch(self, batch: str, file: BinaryIO) -> None:
        """Write the output file and the error file of a batch to `file`."""
        found = await self._retrieved(batch)

        async def download() -> None:
            try:
                for name in filter(None, (found.output_file_id, found.error_file_id)):
                    await save(self._client.files.with_streaming_response.content(name, timeout=self._transfer), file)
            except openai.NotFoundError:
                raise Gone(batch) from None

        await self._within(self._transfer_s, download)

    def result(self, row: dict[str, Any]) -> Result:
        """Return one line of an output or error file as a result."""
        return outcome(str(row["custom_id"]), lambda: self._reply(row.get("response"), row.get("error")))

    def _reply(self, response: Any, error: Any) -> Reply:
        if response is None:
            raise Transient(f"not done: {self._scrub(_told(error))}")
        code, body = int(response["status_code"]), response["body"]
        if code != 200:
            text = self._scrub(_told((body or {}).get("error") or error))
            raise fault_of(self.name, self._spec.key_variable, code, text, {}, (True, True))
        return self.reply_of(ChatCompletion.construct(**body))

    async def _retrieved(self, batch: str) -> Batch:
        async def retrieve() -> Batch:
            try:
                found: Any = await self._client.batches.retrieve(batch)
            except openai.NotFoundError:
                raise Gone(batch) from None
            if not isinstance(found, Batch) or not isinstance(found.status, str):
                raise Transient("broken reply: no batch")
            return found

        return await self._within(self._limits.total_s, retrieve)

    def _state(self, batch: Batch) -> State:
        if batch.status == "failed":
            errors = (batch.errors.data if batch.errors else None) or []
            told = "; ".join(" ".join(filter(None, (one.code, one.message))) for one in errors)
            return State(True, rejected=self._rejection(self._scrub(told or "no reason given")))
        counts = batch.request_counts
        return State(batch.status in _ENDED, rows=(counts.completed or 0) if counts else 0)

    def _rejection(self, told: str) -> Exception:
        if _NO_ROOM.search(told):
            return Transient(told, pushback=True)
        if _OWN_FAULT.search(told):
            return Transient(told)
        return UserError(f"{self.name}: the provider rejects the batch: {told}")


def _name(made: Any) -> str:
    name = getattr(made, "id", None)
    if not isinstance(name, str) or not name:
        raise Transient("broken reply: no id in it", sent=True)
    return name


def _told(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error or "no reason given")
    return " ".join(str(error[key]) for key in ("code", "message", "param") if error.get(key))
