"""Tool calls as both providers hold a conversation to them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .answers import Called
from .questions import require

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def check_tool(name: Any, parameters: Any, path: str) -> None:
    """Refuse a tool whose name or schema the providers do not take."""
    require(isinstance(name, str) and _NAME.fullmatch(name) is not None, f"{path}.name: does not match {_NAME.pattern}")
    is_object = isinstance(parameters, dict) and parameters.get("type") == "object"
    require(is_object, f"{path}: the schema of a tool's arguments must be of type object")


def check_order(turns: Sequence[tuple[Sequence[str], Sequence[str]]], offered: bool) -> None:
    """Refuse a conversation in which a call is not answered at once, or a result answers nothing.

    Args:
        turns: for each turn the ids of its calls, and of the calls that its results answer.
        offered: whether the request has tools.
    """
    open_calls: list[str] = []
    for called, answered in turns:
        require(
            sorted(answered) == sorted(open_calls), f"calls {open_calls} must be followed by their results: {answered}"
        )
        require(len(set(called)) == len(called), f"`tool_use` ids must be unique: {called}")
        open_calls = list(called)
    require(not open_calls, f"the calls {open_calls} have no results")
    require(offered or not any(called for called, _ in turns), "Requests which include calls must define tools")


def tokens_of_calls(calls: Sequence[Called]) -> int:
    """Return how many tokens calls are billed with."""
    return sum(len(written(call)) // 4 + 8 for call in calls)


def written(call: Called) -> str:
    """Return a call's arguments as text."""
    return call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
