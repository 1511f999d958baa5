"""What both wire formats share of tool calls.

1. A conversation is checked before it is sent: each call of the assistant is answered by one result in the user's next
   message, and whoever has called tools is offered tools. Providers refuse anything else.
2. Arguments reach the caller as the model wrote them, JSON or not. When they go back to the model, text that is no JSON
   object is put into one (`{"not_json": "…"}`): Anthropic takes objects only, and servers that write conversations by a
   template fail on anything else.
3. Ids that a server left out or gave twice are numbered anew (`call_1`, …), so that each result finds its call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from exegete.tools.llm.contract import Message, Request, ToolCall

_FIELDS = {"name", "description", "parameters"}


def check_tools(request: Request) -> None:
    """Raise ValueError where the tools of a request, or the calls and results in it, do not fit each other."""
    for text in request.tools:
        if tool_value(text).keys() != _FIELDS:
            raise ValueError(f"a tool is {text[:60]!r}; make it by tool_text(name, description, parameters)")
    if request.tools and request.schema is not None:
        raise ValueError("a request either offers tools or asks for an answer by a schema")
    used = any(message.calls or message.results for message in request.messages)
    if used and not request.tools:
        raise ValueError("a conversation with tool calls needs the tools that were offered")
    before: Sequence[ToolCall] = ()
    for message in request.messages:
        _check_turn(message, [call.id for call in before])
        before = message.calls
    if before:
        raise ValueError("the conversation ends with calls; their results come first")


def _check_turn(message: Message, called: list[str]) -> None:
    if (message.calls and message.role != "assistant") or (message.results and message.role != "user"):
        raise ValueError(f"a message of the {message.role}'s with calls or results; calls are the assistant's")
    answered = [result.id for result in message.results]
    if answered != called:
        raise ValueError(f"results of the calls {answered} after the calls {called}: expected one each, in their order")
    ids = [call.id for call in message.calls]
    if len(set(ids)) != len(ids):
        raise ValueError(f"calls by the ids {ids}: one is given twice")


@lru_cache(maxsize=256)
def tool_value(text: str) -> dict[str, Any]:
    """Return a tool as a dictionary; it is shared, so leave it as it is. Raises ValueError where it is no JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"no tool: {text[:60]!r}")
    return value


def arguments_object(call: ToolCall) -> dict[str, Any]:
    """Return a call's arguments as the object that goes back to the model; it can always be sent."""
    try:
        value = json.loads(call.arguments_json, parse_constant=_no_number)
        # Half of a surrogate pair can stand in JSON, but not on the wire.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"not_json": call.arguments_json.encode("utf-8", "replace").decode()}


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def as_written(arguments: Any) -> str:
    """Return a call's arguments as text, whether the server sent text or a value."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def told_apart(calls: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Return the calls of one message with ids that differ."""
    given = list(calls)
    taken = {call.id for call in given}
    seen: set[str] = set()
    made = []
    for call in given:
        if not call.id or call.id in seen:
            number = next(n for n in range(1, len(given) + len(taken) + 2) if f"call_{n}" not in taken)
            call = replace(call, id=f"call_{number}")
            taken.add(call.id)
        seen.add(call.id)
        made.append(call)
    return tuple(made)
