"""A provider whose batches hold what a test says, a journal that counts, and a client on both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from exegete.tools.errors import UserError
from exegete.tools.llm import BatchLimits, Budget, Limits, MemoryJournal, Price, Reply, Request, Usage
from exegete.tools.llm.batch_wire import BatchWire, Frame, Result, Sighting, State, outcome
from exegete.tools.llm.batches import BatchClient
from exegete.tools.llm.faults import Declined, Lacking, Transient, Unexplained
from exegete.tools.llm.wire import Abilities

from .batching import QUICK

Row = dict[str, Any]
PRICE = Price(input=1.0, output=10.0)
FAULTS: dict[str, Exception] = {
    "late": Transient("not done: expired"),
    "broken": Transient("broken reply", sent=True),
    "declined": Declined("filtered", "not allowed"),
    "lacking": Lacking(structured=True, logprobs=False, otherwise=Unexplained("HTTP 400: response_format")),
    "malformed": Unexplained("HTTP 400: no idea"),
    "key": UserError("no such key"),
}


class Fake:
    """A provider whose results are what a test says: one function a fetch, from ids to the file."""

    name = "fake-batch:model"
    max_requests = 100
    max_bytes = 100_000
    frame = Frame(b"", b"\n", b"\n")

    def __init__(self, *fetches: Callable[[list[str]], bytes], rows: int = 0) -> None:
        self.abilities = Abilities(("json_schema", "words"))
        self.made: list[list[str]] = []
        self.fetches = list(fetches)
        self._rows = rows

    def line(self, custom_id: str, request: Request) -> bytes:
        return custom_id.encode()

    async def prepare(self, file: Path) -> str:
        return file.read_text()

    async def create(self, prepared: str, nonce: str) -> str:
        self.made.append(prepared.split())
        return str(len(self.made) - 1)

    async def find(self, nonce: str, requests: int) -> Sighting:
        return Sighting()

    def know(self, batch: str, nonce: str) -> None: ...

    async def state(self, batch: str) -> State:
        return State(True, self._rows)

    async def fetch(self, batch: str, file: BinaryIO) -> None:
        file.write((self.fetches.pop(0) if self.fetches else all_ok)(self.made[int(batch)]))

    def result(self, row: dict[str, Any]) -> Result:
        def read() -> Reply:
            if row["said"] in FAULTS:
                raise FAULTS[row["said"]]
            return Reply("ok", row["said"], usage=Usage(10, 0, 0, 5))

        return outcome(row["custom_id"], read)

    async def close(self) -> None: ...


def rows(*said: str) -> Callable[[list[str]], bytes]:
    """One row a request, the last of `said` for all that follow."""

    def write(names: list[str]) -> bytes:
        told = [*said, *[said[-1]] * len(names)]
        return b"".join(
            json.dumps({"custom_id": n, "said": s}).encode() + b"\n" for n, s in zip(names, told, strict=False)
        )

    return write


all_ok = rows("yes")


def first_of(count: int) -> Callable[[list[str]], bytes]:
    return lambda names: all_ok(names[:count])


class Counting(MemoryJournal):
    """A journal that counts what it is told, and may fail."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.told: list[str] = []
        self.undone: list[str] = []
        self.failing = failing

    async def answered(self, call: str, reply: Reply) -> None:
        self.told.append(call)
        self._fail("answered")
        await super().answered(call, reply)

    async def submitting(self, nonce: str, model: str, calls: Any) -> None:
        self._fail("submitting")
        await super().submitting(nonce, model, calls)

    async def landed(self, nonce: str, undone: Any = ()) -> None:
        self.undone += undone
        await super().landed(nonce, undone)

    def _fail(self, here: str) -> None:
        if here == self.failing:
            raise UserError("the disk is full")


def client_of(wire: BatchWire, journal: MemoryJournal, budget: Budget | None = None, **batches: Any) -> BatchClient:
    return BatchClient(
        wire,
        journal=journal,
        budget=budget,
        price=PRICE,
        limits=Limits(attempts=3),
        batches=BatchLimits(**(QUICK | batches)),
    )
