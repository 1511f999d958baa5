"""What the two SDKs share: one attempt at one request, what the server lacks, and errors in our own terms.

1. A wire asks for schemas and log-probabilities in the server's own way until the server says that it has none; then it
   asks in the next simpler way, and remembers. The request that found out is sent again at once.
2. Every attempt has a time limit for the whole of it: a server that drips one byte a second never trips a read timeout.
3. The SDK's exceptions become those of `faults`; the SDKs have the same names for them.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import httpx2

from exegete.tools.errors import UserError
from exegete.tools.llm.connections import Lanes
from exegete.tools.llm.contract import Reply, Request
from exegete.tools.llm.faults import Declined, Lacking, Transient, Unexplained, fault_of, scrub
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.specs import Spec

TOP_LOGPROBS = (20, 5)
"""Alternatives per token to ask for; servers differ in how many they give."""
Answer = TypeVar("Answer")


class Wire(Protocol):
    """Sends requests to one model, each once."""

    name: str

    async def send(self, request: Request) -> Reply:
        """Return the reply, not yet held against the schema, without a price.

        Raises:
            Transient: it may succeed later.
            Declined: it will not.
            UserError: no request will.
        """
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


class Abilities:
    """What a server turned out to have."""

    def __init__(self, ways: tuple[str, ...]) -> None:
        self._ways = ways
        self._way = 0
        self._alternatives = 0
        self.has_answered = False

    @property
    def way(self) -> str:
        """How a schema is asked for now."""
        return self._ways[self._way]

    @property
    def alternatives(self) -> int:
        """Alternatives to ask for at each token; 0 where the server has no log-probabilities."""
        return (*TOP_LOGPROBS, 0)[self._alternatives]

    def lower(self, lacking: Lacking, way: str, alternatives: int) -> bool:
        """Ask for less from now on; False where there is nothing less. Calls side by side lower it only once."""
        if lacking.structured:
            if way == self._ways[-1]:
                return False
            if way == self.way:
                self._way += 1
        if lacking.logprobs:
            if alternatives == 0:
                return False
            if alternatives == self.alternatives:
                self._alternatives += 1
        return True


class SdkWire(ABC):
    """Base of both wires."""

    _client: Any
    """Of the SDK, its own retries off."""

    def __init__(self, spec: Spec, limits: Limits, sdk: Any, ways: tuple[str, ...], path: str, kind: type) -> None:
        """Remember what the two SDKs differ in. Raises UserError where the key is missing.

        Args:
            spec: of the model.
            limits: timeouts, and calls in flight.
            sdk: the module `openai` or `anthropic`.
            ways: of asking for a schema, the server's own way first.
            path: where requests are posted.
            kind: the SDK's class of an answer.
        """
        self.name = spec.name
        self.abilities = Abilities(ways)
        self._key = spec.key()
        self._spec = spec
        self._limits = limits
        self._sdk = sdk
        self._path = path
        self._kind = kind

    def _options(self) -> dict[str, Any]:
        """Return what the SDK's client takes."""
        return {
            # Without a key the SDKs complain, or look for other credentials, which may belong to another server.
            "api_key": self._key or "none",
            "base_url": self._spec.base_url,
            "max_retries": 0,
            "timeout": httpx2.Timeout(self._limits.total_s, connect=self._limits.connect_s, pool=None),
            "http_client": Lanes(self._sdk.DefaultAsyncHttpxClient),
        }

    async def send(self, request: Request) -> Reply:
        """Return the reply to one request, sent once (again only where the server lacks something)."""
        while True:
            way = self.abilities.way if request.schema is not None else ""
            alternatives = self.abilities.alternatives if request.logprobs else 0
            try:
                reply = await self._once(request, way, alternatives)
            except Lacking as lacking:
                if self.abilities.lower(lacking, way, alternatives):
                    continue
                raise self._settled(lacking.otherwise) from None
            except Unexplained as fault:
                raise self._settled(fault) from None
            self.abilities.has_answered = True
            return reply

    async def close(self) -> None:
        """Give connections back."""
        await self._client.close()

    @abstractmethod
    def body(self, request: Request, way: str, alternatives: int) -> dict[str, Any]:
        """Return the body of a request. Parts of it may be shared between requests: leave it as it is."""

    @abstractmethod
    def _read(self, answer: Any, request: Request, asked: tuple[bool, bool]) -> Reply:
        """Return an answer of the SDK's as a reply."""

    async def _once(self, request: Request, way: str, alternatives: int) -> Reply:
        asked = (bool(way) and way != "words", alternatives > 0)
        return await self._within(self._limits.total_s, lambda: self._ask(request, way, alternatives, asked), asked)

    async def _ask(self, request: Request, way: str, alternatives: int, asked: tuple[bool, bool]) -> Reply:
        # Not by the SDK's method for it: that may walk through the whole body once more, which costs more than the call.
        answer = await self._client.post(self._path, body=self.body(request, way, alternatives), cast_to=self._kind)
        if not isinstance(answer, self._kind):
            raise Transient("broken reply: no JSON object", sent=True)
        try:
            return self._read(answer, request, asked)
        except (AttributeError, TypeError) as error:
            # The SDK takes whatever shape comes.
            raise Transient(f"broken reply: {error}", sent=True) from None

    async def _within(
        self, seconds: float, call: Callable[[], Awaitable[Answer]], asked: tuple[bool, bool] = (False, False)
    ) -> Answer:
        """Return what a call of the SDK returns in at most so many seconds; what it raises becomes a fault of ours."""
        try:
            async with asyncio.timeout(seconds):
                return await call()
        except TimeoutError:
            raise Transient(f"no answer within {seconds:g} s", sent=True) from None
        except (Transient, Declined, UserError):
            raise
        except self._sdk.APIStatusError as error:
            raise self._status_fault(error, asked) from None
        except self._sdk.APIError as error:
            raise self._broken(error) from None
        except (ValueError, httpx2.HTTPError) as error:
            # A body that is no JSON, or that ends early, comes up from below the SDK.
            raise Transient(f"broken reply: {self._scrub(str(error))}", sent=True) from None

    def _status_fault(self, error: Any, asked: tuple[bool, bool]) -> Exception:
        code, body = error.status_code, error.body
        text = self._scrub(_message(body) or str(error.message))
        return fault_of(self.name, self._spec.key_variable, code, text, error.response.headers, asked)

    def _broken(self, error: Any) -> Transient:
        cause = error.__cause__ or error
        unsent = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
        what = "no connection" if unsent else "connection lost"
        return Transient(f"{what}: {type(cause).__name__}: {self._scrub(str(cause))}", sent=not unsent)

    def _settled(self, fault: Exception) -> Exception:
        if not isinstance(fault, Unexplained):
            return fault
        if self.abilities.has_answered:
            return Declined("rejected", str(fault))
        return UserError(f"{self.name}: the server rejects the request: {fault}")

    def _scrub(self, text: str) -> str:
        return scrub(text, self._key)


def _message(body: object) -> str:
    # {"error": {"message", "code", "param"}} or its inside; compatible servers also send {"message"}, {"detail"} or text.
    if not isinstance(body, dict):
        return str(body or "")
    inner = body.get("error", body)
    if not isinstance(inner, dict):
        return str(inner)
    parts = [inner.get("message") or inner.get("detail") or "", inner.get("code"), inner.get("param")]
    return " ".join(str(part) for part in parts if part)
