"""Anthropic's messages: the request as a question, the answer as a message, errors as they are written.

Source: the types of the `anthropic` package (types/message, types/usage, types/stop_reason, types/output_config_param).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .answers import Answer, Called
from .behaviours import Model
from .questions import Prefix, Question, RequestError, check_objects, digests_of, require, tokens_of
from .tools import check_order, check_tool, tokens_of_calls

_NUMBERS = itertools.count(1)
_STOP = {"stop": "end_turn", "length": "max_tokens", "refusal": "refusal", "content_filter": "refusal"}
_UNSUPPORTED = frozenset(
    ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "maxItems"]
)
"""Keywords that structured output does not take."""
_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 504: "timeout_error",
    529: "overloaded_error",
}  # fmt: skip
Block = tuple[str, str, bool]
"""Role, text, and whether the cache may end here."""


def question(body: Mapping[str, Any]) -> Question:
    """Return the question that a request's body asks. Raises RequestError where the real server would refuse it."""
    model, messages = body.get("model"), body.get("messages")
    require(isinstance(model, str) and bool(model), "model: Field required")
    require(isinstance(messages, list) and bool(messages), "messages: at least one message is required")
    require(isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 0, "max_tokens: Field required")
    require(not body.get("stream"), "this server does not stream")
    assert isinstance(messages, list)
    require(all(m.get("role") in ("user", "assistant") for m in messages), "messages: Unexpected role")
    require(messages[0]["role"] == "user", 'messages: first message must use the "user" role')
    blocks = [
        *_blocks("system", body.get("system", [])),
        *(b for m in messages for b in _blocks(m["role"], m["content"])),
    ]
    require(sum(cached for _, _, cached in blocks) <= 4, "A maximum of 4 blocks with cache_control may be provided.")
    turns = [(role, text) for role, text, _ in blocks]
    _check_tools(body, messages)
    tool, schema = _form(body)
    digests = digests_of(turns)
    return Question(
        model=str(model),
        instructions="\n".join(text for role, text in turns if role == "system"),
        user=tuple(text for role, text in turns if role == "user"),
        digest=digests[-1],
        schema=schema,
        max_tokens=body["max_tokens"],
        input_tokens=sum(tokens_of(text) for _, text in turns),
        prefixes=tuple(_prefixes(blocks, digests)),
        tool=tool,
        structured=schema is not None,
        temperature=body.get("temperature") is not None,
        turn=sum(message["role"] == "assistant" for message in messages),
        offered=tuple(tool["name"] for tool in body.get("tools", [])),
        results=tuple(_results(messages)),
    )


def _results(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the texts that calls have returned."""
    for message in messages:
        for block in message["content"] if isinstance(message["content"], list) else ():
            if block["type"] == "tool_result":
                content = block.get("content", "")
                yield content if isinstance(content, str) else "".join(part["text"] for part in content)


def _blocks(role: str, content: Any) -> Iterator[Block]:
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if block.get("type") in ("tool_use", "tool_result"):
            own = block["type"] == ("tool_use" if role == "assistant" else "tool_result")
            require(own, f"{role}: `{block['type']}` blocks belong to the other role")
            plain = {name: value for name, value in block.items() if name != "cache_control"}
            yield "tool", json.dumps(plain), block.get("cache_control") is not None
            continue
        require(block.get("type") == "text", f"{role}: this server reads text blocks only, not {block.get('type')!r}")
        require(bool(block["text"].strip()), f"{role}: text content blocks must contain non-whitespace text")
        yield role, block["text"], block.get("cache_control") is not None


def _form(body: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    """Return the tool that must be called and the schema of what is to be said."""
    chosen = body.get("tool_choice") or {}
    tools = {tool["name"]: tool for tool in body.get("tools", [])}
    if tools and chosen.get("type") in ("tool", "any"):
        name = chosen.get("name") or next(iter(tools))
        require(name in tools, f"tool_choice: Tool '{name}' not found in provided tools")
        return name, tools[name]["input_schema"]
    asked = (body.get("output_config") or {}).get("format")
    if asked is None:
        return None, None
    require(asked.get("type") == "json_schema", "output_config.format.type: Input should be 'json_schema'")
    check_objects(asked["schema"], _UNSUPPORTED, all_required=False, path="output_config.format.schema")
    _check_min_items(asked["schema"])
    return None, asked["schema"]


def _check_tools(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    for number, tool in enumerate(body.get("tools", [])):
        check_tool(tool.get("name"), tool.get("input_schema"), f"tools.{number}")
    turns = []
    for message in messages:
        blocks = message["content"] if isinstance(message["content"], list) else []
        kinds = [block["type"] for block in blocks]
        require(kinds == sorted(kinds, key="tool_result".__ne__), "`tool_result` blocks must come first")
        used = [block for block in blocks if block["type"] == "tool_use"]
        require(
            all(isinstance(block["input"], dict) for block in used),
            "tool_use.input: Input should be a valid dictionary",
        )
        turns.append(([b["id"] for b in used], [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]))
    check_order(turns, bool(body.get("tools")))


def _check_min_items(schema: Any) -> None:
    if isinstance(schema, dict):
        require(schema.get("minItems", 0) in (0, 1), "output_config.format.schema: minItems must be 0 or 1")
    for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _check_min_items(inner)


def _prefixes(blocks: list[Block], digests: list[str]) -> Iterator[Prefix]:
    tokens = 0
    for (_, text, cached), digest in zip(blocks, digests, strict=True):
        tokens += tokens_of(text)
        if cached:
            yield Prefix(digest, tokens)


def completion(model: Model, asked: Question, answer: Answer) -> dict[str, Any]:
    """Return the answer as a message."""
    reason = _STOP[answer.stop]
    content: list[dict[str, Any]] = [{"type": "text", "text": answer.text}] if answer.text else []
    if asked.tool and reason in ("end_turn", "max_tokens"):
        content = _tool_use(asked.tool, answer.text)
        reason = "tool_use" if reason == "end_turn" and content[-1]["type"] == "tool_use" else reason
    elif answer.calls:
        content += map(_called, answer.calls)
        reason = "tool_use" if reason == "end_turn" else reason
    return {
        "id": f"msg_{next(_NUMBERS)}",
        "type": "message",
        "role": "assistant",
        "model": asked.model,
        "content": [] if reason == "refusal" else content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": _usage(model, asked, answer),
    }


def _called(call: Called) -> dict[str, Any]:
    name = f"toolu_{next(_NUMBERS)}" if call.id is None else call.id
    return {"type": "tool_use", "id": name, "name": call.name, "input": call.arguments}


def _tool_use(name: str, text: str) -> list[dict[str, Any]]:
    """A tool's input is an object in the reply: what is none comes as far as it goes, or as text."""
    try:
        given = json.loads(text)
    except ValueError:
        given = {} if text.startswith("{") else None
    if not isinstance(given, dict):
        return [{"type": "text", "text": text}] if text else []
    return [{"type": "tool_use", "id": f"toolu_{next(_NUMBERS)}", "name": name, "input": given}]


def _usage(model: Model, asked: Question, answer: Answer) -> dict[str, Any]:
    """Tokens as Anthropic counts them: `input_tokens` are those neither read from the cache nor written to it."""
    long_enough = [p for p in asked.prefixes if p.tokens >= model.behaviour.cache_min_tokens]
    read = max((p.tokens for p in long_enough if p.digest in model.prefixes), default=0)
    reach = max((p.tokens for p in long_enough), default=0)
    model.prefixes.update(p.digest for p in long_enough)
    return {
        "input_tokens": asked.input_tokens - reach,
        "cache_creation_input_tokens": reach - read,
        "cache_read_input_tokens": read,
        "cache_creation": {"ephemeral_5m_input_tokens": reach - read, "ephemeral_1h_input_tokens": 0},
        "output_tokens": len(answer.pieces) + tokens_of_calls(answer.calls),
        "service_tier": "standard",
    }


def error_body(error: RequestError) -> dict[str, Any]:
    """Return an error as Anthropic writes it."""
    kind = _TYPES.get(error.status, "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": f"req_{next(_NUMBERS)}",
    }
