"""What a batch client asks of a provider, and what both providers share.

1. A request's id in a batch is the batch's nonce and the beginning of the call's id: whoever has the journal can say
   which call a result belongs to, and whoever sees one id can say which batch it is. The nonce begins with the time at
   which gathering began, so that a search through the provider's list knows where to end.
2. Results are fetched into a file and read from it line by line.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from exegete.tools.errors import UserError
from exegete.tools.llm.contract import Reply, Request
from exegete.tools.llm.faults import Declined, Lacking, Transient, Unexplained
from exegete.tools.llm.wire import Abilities

_CALL_DIGITS = 40
_CLOCKS_DIFFER_S = 86_400
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before the first request of a file, between two, and after the last."""

    head: bytes
    between: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one request of a batch."""

    custom_id: str
    reply: Reply | None = None
    """Not yet held against the schema, without a price."""
    fault: Exception | None = None
    """As a wire raises them: `Transient` for what was not done (expired, cancelled, failed inside) and may be asked again,
    with `sent` for an answer that cannot be read."""


@dataclass(frozen=True, slots=True)
class State:
    """How a batch stands."""

    ended: bool
    rows: int = 0
    """Answers that there are, once it has ended: so many results at least must come, since they are paid for."""
    rejected: Exception | None = None
    """Why the provider took nothing of it: `Transient` with `pushback` where it had no room now."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the provider's list says about a nonce."""

    batch: str | None = None
    undecided: bool = False
    """A batch that could be the one has not ended, and shows nothing before."""


class Gone(Exception):
    """The provider does not have this batch."""


class BatchWire(Protocol):
    """Sends batches of requests to one model."""

    name: str
    max_requests: int
    max_bytes: int
    frame: Frame

    @property
    def abilities(self) -> Abilities:
        """What the server has turned out to have."""
        ...

    def line(self, custom_id: str, request: Request) -> bytes:
        """Return one request as it stands in the file."""
        ...

    async def prepare(self, file: Path) -> str:
        """Bring the file where `create` finds it; costs nothing. Raises as `Wire.send`."""
        ...

    async def create(self, prepared: str, nonce: str) -> str:
        """Submit the batch, once; return its id.

        Raises:
            Transient: it failed; where `sent` is true the provider may have it all the same.
            UserError: it does not take the batch, for a reason that will last.
        """
        ...

    async def find(self, nonce: str, requests: int) -> Sighting:
        """Look for the batch of `nonce` with so many requests in the provider's list. Raises as `Wire.send`."""
        ...

    def know(self, batch: str, nonce: str) -> None:
        """Note whose a batch is, so that no search takes it for another's."""
        ...

    async def state(self, batch: str) -> State:
        """Return how the batch stands. Raises as `Wire.send`, and Gone where there is no such batch."""
        ...

    async def fetch(self, batch: str, file: BinaryIO) -> None:
        """Write the results of a batch that has ended to `file`, one JSON object a line. Raises as `state`."""
        ...

    def result(self, row: dict[str, Any]) -> Result:
        """Return one line of the results as a result. Raises KeyError, TypeError where it is none."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


def new_nonce() -> str:
    """Return 20 hex digits: the time in seconds, and chance."""
    return f"{int(time.time()):08x}{secrets.token_hex(6)}"


def begun(nonce: str) -> float:
    """Return the Unix time before which the batch of `nonce` cannot have been made, however clocks differ."""
    return int(nonce[:8], 16) - _CLOCKS_DIFFER_S


def custom_id(nonce: str, call: str) -> str:
    """Return the id of a call in a batch: 61 characters, as both providers take them."""
    return f"{nonce}-{call.rpartition(':')[2][:_CALL_DIGITS]}"


def nonce_of(custom_id: str) -> str:
    """Return the nonce in a request's id."""
    return custom_id.partition("-")[0]


def read_result(wire: BatchWire, line: bytes) -> Result:
    """Return a line of a results file as a result. Raises Transient where it is none: the file came broken."""
    try:
        return wire.result(json.loads(line))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Transient(f"broken results: {type(error).__name__}: {error}", sent=True) from None


def outcome(custom_id: str, read: Callable[[], Reply]) -> Result:
    """Return what `read` makes of one request's result; what it raises is the result's fault."""
    try:
        return Result(custom_id, read())
    except (Transient, Declined, Lacking, Unexplained, UserError) as fault:
        return Result(custom_id, fault=fault)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return Result(custom_id, fault=Transient(f"broken reply: {type(error).__name__}: {error}", sent=True))


async def save(response: AbstractAsyncContextManager[Any], file: BinaryIO) -> None:
    """Write the body of an SDK's streaming response to `file`; a last line without its end gets one."""
    last = b"\n"
    async with response as opened:
        chunks: AsyncIterator[bytes] = opened.iter_bytes()
        async for chunk in chunks:
            file.write(chunk)
            last = chunk[-1:] or last
    if last != b"\n":
        file.write(b"\n")


def doubtful(fault: Transient) -> Transient:
    """Return the fault of a try to make a batch, `sent` where the provider may have made it all the same.

    A gateway may fail behind which it was made; a server that asks for fewer requests has made none.
    """
    fault.sent = fault.sent or (str(fault).startswith("HTTP") and not fault.pushback)
    return fault


async def sound(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Return what `call` returns. Raises Transient where the SDK let a reply through that is not of the protocol."""
    try:
        return await call()
    except (AttributeError, KeyError, TypeError) as error:
        raise Transient(f"broken reply: {type(error).__name__}: {error}", sent=True) from None


async def listed(first: Awaitable[Any]) -> AsyncIterator[Any]:
    """Yield every object of a provider's list, page by page. Raises Transient where a page is none."""
    page = await first
    while True:
        if not isinstance(page.data, list):
            # An empty list would say that there is no batch.
            raise Transient("broken reply: no list of batches", sent=True)
        for one in page.data:
            yield one
        if not page.has_next_page():
            return
        page = await page.get_next_page()
