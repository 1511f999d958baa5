"""What the server does with a model: how it answers, what goes wrong, and how fast it may be asked.

A behaviour belongs to a model name. It is set at the start or at run time, or written into the name itself:

    oracle?rate=0.1&correlation=0.5&fault=429,first=3,retry_after=0.2&fault=500,share=0.1

`oracle` there is a kind of answer, or the name of a behaviour that was set, whose fields the rest overrides.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

AnswerKind = Literal["fill", "oracle", "replay", "scripted"]
"""A valid answer without sense; a judge that knows what explanations mean; recorded verdicts; a queue of replies."""

FaultKind = Literal[
    "429", "500", "503", "529", "401", "quota", "html",  # an error with this status; an error page of a gateway (502)
    "hang", "drip", "cut", "cut_body",  # nothing for `seconds`; the body over `seconds`; no byte at all; half of the body
    "truncated_json", "wrong_length", "prose", "not_json", "refusal", "empty", "content_filter", "max_tokens",  # answers
]  # fmt: skip
Route = Literal["completions", "batch_lines", "batches", "files", "polls", "downloads", "any"]
"""Live questions; lines of a batch; making and cancelling batches; uploads; looking at batches; reading results; all."""
ANSWERS: tuple[str, ...] = get_args(AnswerKind)
SPOILING = frozenset(
    ["truncated_json", "wrong_length", "prose", "not_json", "refusal", "empty", "content_filter", "max_tokens"]
)
STATUSES = {"429": 429, "500": 500, "503": 503, "529": 529, "401": 401, "quota": 429, "html": 502}


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, and when. All conditions must hold."""

    kind: FaultKind
    after: int = 0
    """Not for the first so many requests to the model on this route."""
    first: int | None = None
    """For at most so many requests."""
    every: int = 1
    """For each so many-th request only."""
    share: float = 1.0
    """For this share of the questions, chosen by their content: the same ones each time they are asked."""
    once: bool = False
    """Only the first time that a question is asked."""
    containing: str = ""
    """Only where the last user message contains this (examples come before it)."""
    route: Route = "completions"
    """Where it strikes. What is not a question or a line of a batch has no model: those faults are `*`'s."""
    retry_after: float | None = None
    """Seconds in the Retry-After header; None sends none."""
    seconds: float = 3_600.0
    """Of a hang or drip."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the server treats one model."""

    answer: AnswerKind = "fill"
    seconds: float = 0.0
    """Time that an answer takes."""
    rate: float = 0.0
    """Share of the oracle's verdicts that are flipped."""
    correlation: float = 0.0
    """Share of prompts whose verdicts are flipped all together or not at all; the rest flip one by one."""
    seed: int = 0
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Explanation → predicate that says what it means. The oracle reads an explanation that is missing as a predicate."""
    blind: Literal["", "writer", "agent"] = ""
    """Whose explanations mean nothing: those that are asked for in one go, or those of an agent with tools."""
    otherwise: str = ""
    """Predicate that the oracle takes for an explanation that means nothing to it; where empty, that is an error."""
    verdicts: tuple[Mapping[str, Any], ...] = ()
    """Recorded for replay: {"task", "text" as rendered, "applies", "explanation" (may be missing)}."""
    replies: tuple[Any, ...] = ()
    """Of the script, used up in order: a text, or {"text" or "json": …, "stop": …, "calls": [{"name", "arguments", "id"}]}."""
    by_turn: bool = False
    """The script's reply is the one for as many replies as the conversation has, not the next: asked again, it says the same.
    A question with a schema is answered by the first with "json", any other by the rest."""
    faults: tuple[Fault, ...] = ()
    requests_per_s: float | None = None
    """More than so many are answered with 429."""
    burst: int = 1
    """Requests that the limit lets through at once."""
    retry_after: bool = False
    """Whether the limit names the time in Retry-After."""
    logprobs: Literal["given", "ignored", "rejected"] = "given"
    structured: Literal["given", "ignored", "rejected"] = "given"
    temperature: Literal["given", "rejected"] = "given"
    swell: float = 1.0
    """Input tokens are billed by a factor between 1 and this, drawn by the question."""
    cache_min_tokens: int = 1_024
    """Shortest prefix that the provider caches."""
    batch_s: float = 0.0
    """Seconds that a batch is in progress."""
    batch_expires_after: int | None = None
    """A batch answers so many of its requests; the others expire."""
    batch_fails: str = ""
    """A batch fails validation as a whole with this message."""
    batch_max_requests: int | None = None
    """Lowers the provider's limit."""
    batch_max_bytes: int | None = None


def behaviour(values: Mapping[str, Any], base: Behaviour | None = None) -> Behaviour:
    """Return the behaviour that `values` describe over `base`. Raises TypeError, ValueError for what is not a field."""
    given = dict(values)
    if "faults" in given:
        given["faults"] = tuple(f if isinstance(f, Fault) else Fault(**f) for f in given["faults"])
    for name in ("replies", "verdicts"):
        if name in given:
            given[name] = tuple(given[name])
    made = replace(base or Behaviour(), **given)
    faults = [(fault.kind, fault.route) for fault in made.faults]
    known = all(kind in get_args(FaultKind) and route in get_args(Route) for kind, route in faults)
    if made.answer not in ANSWERS or not known:
        raise ValueError(f"no such answer, fault or route: {made.answer!r}, {faults}")
    return made


def from_name(query: str, base: Behaviour) -> Behaviour:
    """Return `base` with what a model's name says after its question mark."""
    types = {f.name: str(f.type) for f in fields(Behaviour)}
    given: dict[str, Any] = {}
    faults = []
    for name, value in parse_qsl(query):
        if name == "fault":
            faults.append(_fault(value))
        else:
            given[name] = _value(types[name], value)
    return behaviour(given | ({"faults": faults} if faults else {}), base)


def _fault(text: str) -> Fault:
    kind, *options = text.split(",")
    types = {f.name: str(f.type) for f in fields(Fault)}
    pairs = (option.split("=", 1) for option in options)
    given: dict[str, Any] = {name: _value(types[name], value) for name, value in pairs}
    return Fault(kind=kind, **given)  # type: ignore[arg-type]  # `behaviour` checks it


def _value(kind: str, text: str) -> Any:
    if kind.startswith("bool"):
        return text.lower() in ("1", "true", "yes")
    return int(text) if kind.startswith("int") else float(text) if kind.startswith("float") else text


Recorded = tuple[str, str | None, str]
"""Task, explanation (None for any) and window as rendered: what a recorded verdict is known by."""


class Model:
    """One model at work: its behaviour, and what it remembers from request to request."""

    def __init__(self, name: str, behaviour: Behaviour) -> None:
        self.name = name
        self.behaviour = behaviour
        self.script = deque(behaviour.replies)
        self.recorded: dict[Recorded, bool] | None = None
        """The verdicts to replay by what they are known by, once they have been needed."""
        self.prefixes: set[str] = set()
        """Digests of the prompt beginnings that the provider has cached."""
        self._asked: Counter[str] = Counter()
        self._struck: Counter[int] = Counter()
        self._seen: set[tuple[int, str]] = set()
        self._allowance = float(behaviour.burst)
        self._at = time.monotonic()

    def fault(self, route: str, question: str, text: str) -> Fault | None:
        """Return what goes wrong with this request, None where nothing does. Counts the request."""
        self._asked[route] += 1
        number = self._asked[route]
        for at, fault in enumerate(self.behaviour.faults):
            if fault.route in (route, "any") and self._strikes(at, fault, number, question, text):
                self._struck[at] += 1
                return fault
        return None

    def _strikes(self, at: int, fault: Fault, number: int, question: str, text: str) -> bool:
        if number <= fault.after or (number - fault.after - 1) % fault.every or fault.containing not in text:
            return False
        if fault.first is not None and self._struck[at] >= fault.first:
            return False
        if fault.share < 1 and uniform(self.behaviour.seed, "share", str(at), question) >= fault.share:
            return False
        if fault.once and (at, question) in self._seen:
            return False
        self._seen.add((at, question))
        return True

    def wait(self) -> float:
        """Take one from the allowance; return the seconds until there is one, 0 where it was taken."""
        limit = self.behaviour.requests_per_s
        if limit is None:
            return 0.0
        now = time.monotonic()
        self._allowance = min(float(self.behaviour.burst), self._allowance + (now - self._at) * limit)
        self._at = now
        if self._allowance >= 1:
            self._allowance -= 1
            return 0.0
        return (1 - self._allowance) / limit


class Models:
    """The behaviours by model name."""

    def __init__(self) -> None:
        self._set: dict[str, Behaviour] = {}
        self._at_work: dict[str, Model] = {}

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        """Set the behaviour of a model, `*` for every name that nothing else is known of."""
        made = behaviour(values)
        self._set[name] = made
        for known in list(self._at_work):
            base = known.partition("?")[0]
            if base == name or (name == "*" and base not in self._set):
                del self._at_work[known]

    def get(self, name: str) -> Model | None:
        """Return the model of that name, None where there is none."""
        if name not in self._at_work:
            base_name, _, query = name.partition("?")
            base = self._set.get(base_name) or self._built_in(base_name) or self._set.get("*")
            if base is None:
                return None
            self._at_work[name] = Model(name, from_name(query, base))
        return self._at_work[name]

    def names(self) -> list[str]:
        """Return the names that were set, and the kinds of answers."""
        return sorted({*self._set, *ANSWERS} - {"*"})

    @staticmethod
    def _built_in(name: str) -> Behaviour | None:
        return behaviour({"answer": name}) if name in ANSWERS else None


def uniform(seed: int, *names: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the seed and the names."""
    text = "\x1f".join([str(seed), *names]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
