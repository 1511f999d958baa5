"""Language models behind one awaitable call: what is asked, what comes back, and who keeps it.

A `Client` completes a `Request`, at once or hours later (batches); whoever awaits it cannot tell which. What went wrong is
a `Reply` with a status, never an exception, except for what the user must mend before any money is spent (`UserError`).

Cache and journal are injected, so that nothing here knows the store: before a request is sent its intent is written
down, and its reply before it is used. A request is known by its content, so the same question is never paid twice.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

from exegete.tools.seeds import digest

_as_json = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
Role = Literal["system", "user", "assistant"]

Status = Literal["ok", "unparsed", "refused", "truncated", "filtered", "empty", "rejected", "error", "unknown"]
"""ok; no valid JSON after one repair; the model declined; cut at `max_tokens`; stopped by a content filter; neither text
nor calls; the server does not take this request, however often it is asked (too long, malformed); the provider failed for
good (`detail` says how); sent, but killed before the reply was written down. Only the last two are ever asked again."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants used."""

    id: str
    """As the provider gave it; unique within the message that holds it."""
    name: str
    arguments_json: str
    """As the model wrote it, which may be no JSON at all."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool returned, for the model that called it."""

    id: str
    """Of the call, which stands in the assistant's message right before."""
    text: str
    failed: bool = False
    """Whether the text is an error."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    text: str
    calls: tuple[ToolCall, ...] = ()
    """Of the assistant, after its text."""
    results: tuple[ToolResult, ...] = ()
    """Of the user, before the text: one for each call of the message before."""

    def content(self) -> dict[str, Any]:
        """Return it as plain values; calls and results only where there are any."""
        content: dict[str, Any] = {"role": self.role, "text": self.text}
        if self.calls:
            content["calls"] = [[call.id, call.name, call.arguments_json] for call in self.calls]
        if self.results:
            content["results"] = [[result.id, result.text, result.failed] for result in self.results]
        return content


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to be completed."""

    messages: tuple[Message, ...]
    schema: str | None = None
    """JSON Schema of the answer, as canonical JSON text; None for free text."""
    max_tokens: int = 1_024
    temperature: float | None = None
    """None leaves the provider's default (some models take no other)."""
    logprobs: bool = False
    """Ask for log-probabilities of the answer's tokens, where the server has them."""
    shared: int = 0
    """So many messages at the beginning are the same in many requests: what a provider can cache."""
    prompt_digest: str = ""
    """Of the template that it was rendered from."""
    sample: int = 0
    """Which of several answers to the same question."""
    tools: tuple[str, ...] = ()
    """What the model may call: each a `tool_text` of name, description and parameters (a JSON Schema of an object)."""
    parallel_calls: bool = True
    """Whether it may call several at a time, where it may call any."""

    def id(self, model: str) -> str:
        """Return the content address of this request to `model`: `sha256:…`."""
        content = {
            "logprobs": self.logprobs,
            "max_tokens": self.max_tokens,
            "messages": [message.content() for message in self.messages],
            "prompt_digest": self.prompt_digest,
            "sample": self.sample,
            "schema": self.schema,
            "shared": self.shared,
            "temperature": self.temperature,
        }
        if self.tools:
            # Only where there are any: the ids of all other requests stay what they are in existing stores.
            content |= {"tools": self.tools, "parallel_calls": self.parallel_calls}
        return digest(model, _as_json(content))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of an answer with its alternatives."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """Most probable tokens there, with their log-probabilities."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counted them."""

    input_tokens: int = 0
    """In all, cached ones included."""
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.output_tokens + other.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: Status
    text: str = ""
    parsed: Any = None
    """The validated JSON value, where a schema was asked for and `status` is "ok"."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """None where the server gives none."""
    model: str = ""
    """As the server names it."""
    usage: Usage = field(default_factory=Usage)
    usd: float = 0.0
    seconds: float = 0.0
    attempts: int = 1
    """Times that it was sent, the repair included."""
    cached: bool = False
    """Taken from the journal or cache: not paid for this time."""
    known_usage: Usage = field(default_factory=Usage)
    """Beside `usage`, that of an answer which was known before, where only its repair was paid for this time."""
    known_usd: float = 0.0
    """Beside `usd`, what that answer had cost."""
    detail: str = ""
    """What the provider said, where `status` is not "ok"."""
    calls: tuple[ToolCall, ...] = ()
    """Tools that the model wants used. Where `status` is not "ok", the last may be cut off: use none of them."""


class Client(Protocol):
    """Completes conversations with one model."""

    name: str
    """As the user wrote it, for example `anthropic:MODEL` or `openai:MODEL@URL`."""

    async def complete(self, request: Request) -> Reply:
        """Return the reply. Failures have a status.

        Raises:
            UserError: nothing can come of asking (no key, no such model, budget used up): the run must stop and say so.
        """
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


class PromptScorer(Protocol):
    """A local model that gives the log-probability of text after a prompt (surprisal, intervention scoring)."""

    name: str

    async def logprobs(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        """Return the natural log-probability of each continuation after `prompt`, summed over its tokens."""
        ...


class Journal(Protocol):
    """Keeps intents and replies; durable before it returns. `agent` supplies the store's."""

    async def known(self, call: str) -> Reply | None:
        """Return the reply of the call with this id (`Request.id`), None where there is none."""
        ...

    async def intend(self, call: str, model: str, worst_usd: float) -> None:
        """Write down that the call is about to be sent, and what it may cost at most."""
        ...

    async def answered(self, call: str, reply: Reply) -> None:
        """Write down the reply; from then on it may be used."""
        ...


@dataclass(frozen=True, slots=True)
class Submission:
    """A batch of calls that was about to be sent, or was."""

    nonce: str
    """Part of every request id in the batch, written down before anything is sent: by it a batch is found again."""
    model: str
    calls: tuple[str, ...]
    batch: str | None = None
    """The provider's id; None where the process ended before it was written down."""
    worst_usd: float = 0.0
    """What the calls that have no reply may cost at most, all together."""


@runtime_checkable
class BatchJournal(Journal, Protocol):
    """A journal that also remembers batches, so that a restart takes them up again and pays for none twice."""

    async def submitting(self, nonce: str, model: str, calls: Mapping[str, float]) -> None:
        """Write down that these calls (id → worst-case USD) are about to be sent as one batch; it is their intent as well."""
        ...

    async def submitted(self, nonce: str, batch: str) -> None:
        """Write down the provider's id of the batch."""
        ...

    async def landed(self, nonce: str, undone: Collection[str] = ()) -> None:
        """Write down that nothing more will come of the batch; calls of it without a reply may be asked again.

        Those in `undone` the provider has not done and does not bill (expired, cancelled); others may have been billed.
        """
        ...

    async def submissions(self, model: str) -> list[Submission]:
        """Return the batches of a model that have not landed, in the order in which they were written down."""
        ...


class MemoryJournal:
    """A journal that forgets with the process: for tests, and for single questions."""

    def __init__(self) -> None:
        self.intents: dict[str, tuple[str, float]] = {}
        self.replies: dict[str, Reply] = {}
        self.open: dict[str, Submission] = {}

    async def known(self, call: str) -> Reply | None:
        """Return the reply that was written down."""
        return self.replies.get(call)

    async def intend(self, call: str, model: str, worst_usd: float) -> None:
        """Write the intent down."""
        self.intents[call] = (model, worst_usd)

    async def answered(self, call: str, reply: Reply) -> None:
        """Write the reply down."""
        self.replies[call] = reply

    async def submitting(self, nonce: str, model: str, calls: Mapping[str, float]) -> None:
        """Write the batch and its intents down."""
        self.intents |= {call: (model, worst_usd) for call, worst_usd in calls.items()}
        self.open[nonce] = Submission(nonce, model, tuple(calls), worst_usd=sum(calls.values()))

    async def submitted(self, nonce: str, batch: str) -> None:
        """Write the provider's id down."""
        self.open[nonce] = replace(self.open[nonce], batch=batch)

    async def landed(self, nonce: str, undone: Collection[str] = ()) -> None:
        """Forget the batch."""
        self.open.pop(nonce, None)

    async def submissions(self, model: str) -> list[Submission]:
        """Return the open batches of a model."""
        return [one for one in self.open.values() if one.model == model]


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return a JSON Schema as the canonical text that `Request.schema` takes."""
    return json.dumps(schema, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def tool_text(name: str, description: str, parameters: Mapping[str, Any]) -> str:
    """Return a tool as the canonical text that `Request.tools` takes; `parameters` is a JSON Schema of an object."""
    return schema_text({"name": name, "description": description, "parameters": parameters})
