"""OpenAI's chat completions: the request as a question, the answer as a completion, errors as they are written.

Source: the types of the `openai` package (types/chat, types/completion_usage).
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import Answer, Called, Piece, logprob
from .behaviours import Model
from .questions import Prefix, Question, RequestError, check_objects, digests_of, require, tokens_of
from .tools import check_order, check_tool, tokens_of_calls, written

_NUMBERS = itertools.count(1)
_ROLES = frozenset(["system", "developer", "user", "assistant", "tool"])
_FINISH = {"stop": "stop", "length": "length", "refusal": "stop", "content_filter": "content_filter"}
_TYPES = {401: "authentication_error", 429: "requests", 500: "server_error", 503: "server_error"}


def question(body: Mapping[str, Any]) -> Question:
    """Return the question that a request's body asks. Raises RequestError where the real server would refuse it."""
    model, messages = body.get("model"), body.get("messages")
    require(isinstance(model, str) and bool(model), "you must provide a model parameter")
    require(isinstance(messages, list) and bool(messages), "Invalid 'messages': empty array")
    require(not body.get("stream"), "this server does not stream")
    turns = [_turn(message) for message in messages or []]
    _check_tools(body, messages or [])
    schema = _schema(body.get("response_format"))
    digests = digests_of(turns)
    top = body.get("top_logprobs")
    require(top is None or bool(body.get("logprobs")), "'logprobs' must be true when 'top_logprobs' is specified")
    require(top is None or 0 <= top <= 20, "Invalid value for 'top_logprobs': must be between 0 and 20")
    return Question(
        model=str(model),
        instructions="\n".join(text for role, text in turns if role in ("system", "developer")),
        user=tuple(text for role, text in turns if role == "user"),
        digest=digests[-1],
        schema=schema,
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
        input_tokens=sum(tokens_of(text) for _, text in turns),
        prefixes=_prefixes(turns, digests),
        top_logprobs=(top or 0) if body.get("logprobs") else None,
        structured=(body.get("response_format") or {}).get("type", "text") != "text",
        temperature=body.get("temperature") is not None,
        turn=sum(role == "assistant" for role, _ in turns),
        offered=tuple(tool["function"]["name"] for tool in body.get("tools") or ()),
        results=tuple(_turn(message)[1] for message in messages or [] if message["role"] == "tool"),
    )


def _turn(message: Mapping[str, Any]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    require(role in _ROLES, f"Invalid value for 'messages': role {role!r}")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    calls = message.get("tool_calls")
    require(
        isinstance(content, str) or (content is None and bool(calls)), "Invalid value for 'content': expected a string"
    )
    return str(role), f"{content or ''}{json.dumps(calls) if calls else ''}"


def _check_tools(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    tools = body.get("tools")
    require(tools is None or bool(tools), "Invalid 'tools': empty array")
    require("parallel_tool_calls" not in body or bool(tools), "'parallel_tool_calls' is only allowed with 'tools'")
    for number, tool in enumerate(tools or ()):
        require(tool.get("type") == "function", f"Invalid value: 'tools[{number}].type'")
        check_tool(tool["function"].get("name"), tool["function"].get("parameters"), f"tools[{number}].function")
    turns: list[tuple[list[str], list[str]]] = []
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(message["tool_call_id"])
            continue
        calls = message.get("tool_calls", ())
        require(all(isinstance(call["function"]["arguments"], str) for call in calls), "arguments: expected a string")
        turns.append(([call["id"] for call in calls], results))
        results = []
    check_order([*turns, ([], results)], bool(tools))


def _schema(asked: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if asked is None or asked.get("type") in ("text", "json_object"):
        return None
    require(asked.get("type") == "json_schema", f"Invalid value for 'response_format': {asked!r}")
    named = asked["json_schema"]
    valid = re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", named.get("name", "")) is not None
    require(valid, "Invalid 'response_format.json_schema.name'")
    schema: Mapping[str, Any] = named["schema"]
    if named.get("strict"):
        require(schema.get("type") == "object", "schema must be a JSON Schema of 'type: \"object\"'")
        check_objects(schema, frozenset(["allOf", "not", "if", "patternProperties"]), all_required=True)
    return schema


def _prefixes(turns: list[tuple[str, str]], digests: list[str]) -> tuple[Prefix, ...]:
    tokens = itertools.accumulate(tokens_of(text) for _, text in turns)
    return tuple(Prefix(digest, count) for digest, count in zip(digests, tokens, strict=True))


def completion(model: Model, asked: Question, answer: Answer) -> dict[str, Any]:
    """Return the answer as a chat completion."""
    refused = answer.stop == "refusal"
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if refused else answer.text,
        "refusal": answer.text if refused else None,
        "annotations": [],
    }
    if answer.calls and not refused:
        message |= {"content": answer.text or None, "tool_calls": list(map(_called, answer.calls))}
    with_logprobs = asked.top_logprobs is not None and model.behaviour.logprobs == "given" and not refused
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(answer, asked.top_logprobs or 0) if with_logprobs else None,
        "finish_reason": "tool_calls" if answer.calls and answer.stop == "stop" else _FINISH[answer.stop],
    }
    return {
        "id": f"chatcmpl-{next(_NUMBERS)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [choice],
        "usage": _usage(model, asked, answer),
        "system_fingerprint": None,
    }


def _called(call: Called) -> dict[str, Any]:
    name = f"call_{next(_NUMBERS)}" if call.id is None else call.id
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": written(call)}}


def _usage(model: Model, asked: Question, answer: Answer) -> dict[str, Any]:
    known = [p.tokens for p in asked.prefixes if p.digest in model.prefixes]
    cached = max((n // 128 * 128 for n in known if n >= model.behaviour.cache_min_tokens), default=0)
    model.prefixes.update(p.digest for p in asked.prefixes)
    made = len(answer.pieces) + tokens_of_calls(answer.calls)
    return {
        "prompt_tokens": asked.input_tokens,
        "completion_tokens": made,
        "total_tokens": asked.input_tokens + made,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _logprobs(answer: Answer, top: int) -> dict[str, Any]:
    return {"content": [_token(piece, top) for piece in answer.pieces], "refusal": None}


def _token(piece: Piece, top: int) -> dict[str, Any]:
    both = sorted([(piece.text, piece.probability), *piece.others], key=lambda pair: -pair[1])
    return _entry(piece.text, piece.probability) | {"top_logprobs": [_entry(*pair) for pair in both[:top]]}


def _entry(text: str, probability: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob(probability), "bytes": list(text.encode())}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return an error as OpenAI writes it."""
    kind = "insufficient_quota" if error.code == "insufficient_quota" else _TYPES.get(error.status)
    return {
        "error": {
            "message": error.message,
            "type": kind or "invalid_request_error",
            "param": None,
            "code": error.code or ("rate_limit_exceeded" if error.status == 429 else None),
        }
    }


def model_list(names: list[str]) -> dict[str, Any]:
    """Return the answer of `/v1/models`."""
    return {"object": "list", "data": [model_entry(name) for name in names]}


def model_entry(name: str) -> dict[str, Any]:
    """Return one model of `/v1/models`."""
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "tests"}
