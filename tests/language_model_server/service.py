"""From a request to its reply: routes, faults, limits, answers; the same for both wire formats.

1. A question finds its model's behaviour; a name that nothing is known of is the error 404.
2. The limit and the faults of transport come first, then the model takes its time, then it answers.
3. Faults of content spoil the answer; `max_tokens` cuts it as a provider would.
Lines of a batch go the same way, without time and transport.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import anthropic_messages, openai_chat
from .answers import cut_to, spoil
from .behaviours import SPOILING, STATUSES, Behaviour, Fault, Model, Models, uniform
from .judges import reply
from .questions import Question, RequestError, digest_of
from .record import Entry, Log
from .wire import Incoming, Outgoing, as_json

_MESSAGES = {
    "429": "Rate limit reached. Please try again later.",
    "quota": "You exceeded your current quota, please check your plan and billing details.",
    "401": "Incorrect API key provided: {key}.",
    "529": "Overloaded",
}

_BILLED = (
    *("prompt_tokens", "completion_tokens"),
    *("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"),
)


@dataclass(frozen=True, slots=True)
class Wire:
    """One provider's wire format."""

    name: str
    question: Callable[[Mapping[str, Any]], Question]
    completion: Callable[[Model, Question, Any], dict[str, Any]]
    error_body: Callable[[RequestError], dict[str, Any]]


def _wire(name: str, module: ModuleType) -> Wire:
    return Wire(name, module.question, module.completion, module.error_body)


OPENAI = _wire("openai", openai_chat)
ANTHROPIC = _wire("anthropic", anthropic_messages)


class Service:
    """Answers questions."""

    def __init__(self) -> None:
        self.models = Models()
        self.log = Log()

    async def complete(self, wire: Wire, incoming: Incoming, entry: Entry) -> Outgoing:
        """Answer one live request."""
        log = self.log
        log.begin()
        try:
            outgoing = await self._complete(wire, incoming, entry)
        except RequestError as error:
            outgoing = failed(wire, error)
        except BaseException:
            log.end()
            raise
        entry.status = outgoing.status

        def sent(whole: bool) -> None:
            log.end()
            log.given(entry, whole)

        outgoing.sent = sent
        return outgoing

    async def _complete(self, wire: Wire, incoming: Incoming, entry: Entry) -> Outgoing:
        model, asked = self._asked(wire, parsed(incoming.body), entry)
        wait = model.wait()
        if wait:
            entry.fault = "limit"
            raise RateLimited(math.ceil(wait * 1_000) / 1_000 if model.behaviour.retry_after else None)
        fault = model.fault("completions", entry.question, asked.user[-1] if asked.user else "")
        entry.fault = fault.kind if fault else ""
        if fault and fault.kind in STATUSES:
            return failed(wire, error_of(fault, key_of(incoming)), fault)
        if fault and fault.kind == "hang":
            return Outgoing(hold_s=fault.seconds, cut_at=-1)
        if fault and fault.kind == "cut":
            return Outgoing(cut_at=-1)
        await asyncio.sleep(model.behaviour.seconds)
        answer = self._answer(wire, model, asked, fault)
        entry.tokens = _billed(answer["usage"])
        outgoing = as_json(answer)
        outgoing.headers = {"x-request-id": f"req_{entry.number}", "request-id": f"req_{entry.number}"}
        if fault and fault.kind == "drip":
            outgoing.drip_s = fault.seconds
        if fault and fault.kind == "cut_body":
            outgoing.cut_at = 0.5
        return outgoing

    def line(self, wire: Wire, body: Mapping[str, Any], custom_id: str, path: str) -> tuple[int, dict[str, Any]]:
        """Answer one line of a batch: the status and body that it would have had alone."""
        entry = self.log.enter("batch_lines", path)
        entry.custom_id = custom_id
        try:
            model, asked = self._asked(wire, body, entry)
            fault = model.fault("batch_lines", entry.question, asked.user[-1] if asked.user else "")
            entry.fault = fault.kind if fault else ""
            if fault and fault.kind not in SPOILING:
                raise error_of(fault)
            entry.status = 200
            answered = self._answer(wire, model, asked, fault)
            entry.tokens = _billed(answered["usage"])
            self.log.given(entry, whole=True)
            return 200, answered
        except RequestError as error:
            entry.status = error.status
            return error.status, wire.error_body(error)

    def _asked(self, wire: Wire, body: Mapping[str, Any], entry: Entry) -> tuple[Model, Question]:
        asked = wire.question(body)
        whole = digest_of(body)
        self.log.asked(entry, asked.model, whole, body)
        return self.model(asked.model, asked), asked

    def model(self, name: str, asked: Question | None = None) -> Model:
        """Return the model of that name. Raises RequestError where there is none, or it does not take the request."""
        try:
            model = self.models.get(name)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(400, f"the model name {name!r} says nothing: {error}") from None
        if model is None:
            raise RequestError(
                404, f"The model `{name}` does not exist or you do not have access to it.", "model_not_found"
            )
        if asked:
            _refuse(model.behaviour, asked)
        return model

    def _answer(self, wire: Wire, model: Model, asked: Question, fault: Fault | None) -> dict[str, Any]:
        if model.behaviour.structured == "ignored":
            answer = spoil(reply(model, asked), "prose") if asked.structured else reply(model, asked)
        else:
            answer = reply(model, asked)
        if fault and fault.kind in SPOILING:
            answer = spoil(answer, fault.kind)
        if asked.max_tokens is not None:
            answer = cut_to(answer, asked.max_tokens)
        completion = wire.completion(model, asked, answer)
        _swell(completion["usage"], model.behaviour, asked)
        return completion


def _swell(usage: dict[str, Any], behaviour: Behaviour, asked: Question) -> None:
    """Have more input tokens billed than there are, as the behaviour says."""
    share = uniform(behaviour.seed, "swell", *asked.user)
    kind = "prompt_tokens" if "prompt_tokens" in usage else "input_tokens"
    more = round(usage[kind] * (behaviour.swell - 1) * share)
    usage[kind] += more
    if "total_tokens" in usage:
        usage["total_tokens"] += more


def _billed(usage: Mapping[str, Any]) -> int:
    """Return the tokens of a usage in either format: OpenAI's input has the cached ones in it, Anthropic's has not."""
    return sum(usage.get(kind, 0) for kind in _BILLED)


class RateLimited(RequestError):
    """Asked faster than the limit allows."""

    def __init__(self, retry_after: float | None) -> None:
        super().__init__(429, _MESSAGES["429"])
        self.retry_after = retry_after


def _refuse(behaviour: Behaviour, asked: Question) -> None:
    if behaviour.logprobs == "rejected" and asked.top_logprobs is not None:
        raise RequestError(400, "logprobs are not supported with this model", "unsupported_parameter")
    if behaviour.structured == "rejected" and asked.structured and asked.tool is None:
        raise RequestError(400, "structured output is not supported with this model", "unsupported_parameter")
    if behaviour.temperature == "rejected" and asked.temperature:
        raise RequestError(400, "'temperature' is not supported with this model", "unsupported_value")


def key_of(incoming: Incoming) -> str:
    """Return the key that was sent, in either of the providers' headers."""
    bearer = incoming.headers.get("authorization", "").removeprefix("Bearer").strip()
    return incoming.headers.get("x-api-key", "") or bearer


def error_of(fault: Fault, key: str = "") -> RequestError:
    """Return the error that a fault stands for; a line of a batch that hangs or is cut has failed inside.

    A key that is not taken is quoted, as providers do.
    """
    code = "insufficient_quota" if fault.kind == "quota" else None
    status = STATUSES.get(fault.kind, 500)
    return RequestError(
        status,
        _MESSAGES.get(fault.kind, "The server had an error while processing your request.").format(key=key),
        code,
    )


def failed(wire: Wire, error: RequestError, fault: Fault | None = None) -> Outgoing:
    """Return an error as a reply."""
    if fault and fault.kind == "html":
        page = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
        return Outgoing(page, 502, content_type="text/html")
    after = fault.retry_after if fault else getattr(error, "retry_after", None)
    return as_json(wire.error_body(error), error.status, headers={} if after is None else {"retry-after": f"{after:g}"})


def parsed(body: bytes) -> dict[str, Any]:
    """Return a request's body. Raises RequestError where it is not a JSON object."""
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(400, "We could not parse the JSON body of your request.")
    return value
