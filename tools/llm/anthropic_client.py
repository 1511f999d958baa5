"""Anthropic's messages.

1. A schema goes out as `output_config.format`, then as a tool that must be called, then in words, as far down as the model
   makes necessary. Keywords that Anthropic's subset lacks become part of descriptions (the SDK's `transform_schema`); our
   own validation holds the answer to all of them.
2. The last block of the shared messages carries `cache_control`, so that the provider keeps what comes before it.
3. There are no log-probabilities.
4. Tools go out as they are, with an `input_schema`; calls and results are blocks of their messages (`tool_use`,
   `tool_result`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import anthropic
from anthropic.types import Message as Answer

from exegete.tools.llm.contract import Message, Reply, Request, Status, ToolCall, Usage
from exegete.tools.llm.faults import Transient
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.specs import Spec
from exegete.tools.llm.structured import in_words, schema_value
from exegete.tools.llm.tool_calls import arguments_object, as_written, told_apart, tool_value
from exegete.tools.llm.wire import SdkWire

_WAYS = ("output_config", "tool", "words")
_CACHED = {"type": "ephemeral"}


class AnthropicWire(SdkWire):
    """Sends requests through Anthropic's SDK, its own retries off."""

    def __init__(self, spec: Spec, limits: Limits) -> None:
        """Open a client; nothing is sent yet. Raises UserError where the key is missing."""
        super().__init__(spec, limits, anthropic, _WAYS, "/v1/messages", Answer)
        self._client: anthropic.AsyncAnthropic = anthropic.AsyncAnthropic(**self._options())

    def body(self, request: Request, way: str = _WAYS[0], alternatives: int = 0) -> dict[str, Any]:
        """Return the body of a message request."""
        asked = in_words(request) if way == "words" else request
        turns = [_blocks(message, number == request.shared) for number, message in enumerate(asked.messages, 1)]
        leading = sum(message.role == "system" for message in asked.messages)
        body: dict[str, Any] = {
            "model": self._spec.model,
            "max_tokens": request.max_tokens,
            "messages": [
                {"role": message.role, "content": blocks}
                for message, blocks in zip(asked.messages[leading:], turns[leading:], strict=True)
            ],
        }
        if leading:
            body["system"] = [block for blocks in turns[:leading] for block in blocks]
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.schema is not None and way == "output_config":
            body["output_config"] = {"format": {"type": "json_schema", "schema": _subset(request.schema)}}
        if request.schema is not None and way == "tool":
            body |= _forced_tool(request.schema)
        if request.tools:
            body["tools"] = list(map(_tool, request.tools))
            body["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": not request.parallel_calls}
        return body

    def reply_of(self, answer: Answer, schema: str | None = None) -> Reply:
        """Return a message as a reply to a request with this schema.

        Raises:
            Transient: it has no content at all.
        """
        if not isinstance(answer.content, list):
            raise Transient("broken reply: no content in it", sent=True)
        text = "".join(_text(block, schema) for block in answer.content)
        calls = _calls(answer) if schema is None else ()
        status, detail = _status(answer, bool(text.strip() or calls))
        model = answer.model or ""
        return Reply(status, text, model=model, usage=_usage(answer), detail=self._scrub(detail), calls=calls)

    def _read(self, answer: Any, request: Request, asked: tuple[bool, bool]) -> Reply:
        return self.reply_of(answer, request.schema)


def _blocks(message: Message, cached: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": result.id, "content": result.text, "is_error": result.failed}
        for result in message.results
    ]
    if message.text or not (message.results or message.calls):
        blocks.append({"type": "text", "text": message.text})
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_object(call)}
        for call in message.calls
    ]
    return [*blocks[:-1], blocks[-1] | {"cache_control": _CACHED}] if cached else blocks


def _tool(text: str) -> dict[str, Any]:
    tool = tool_value(text)
    return {"name": tool["name"], "description": tool["description"], "input_schema": tool["parameters"]}


@lru_cache(maxsize=256)
def _subset(schema: str) -> dict[str, Any]:
    return anthropic.transform_schema(schema_value(schema))


def _forced_tool(schema: str) -> dict[str, Any]:
    value = schema_value(schema)
    # Tools take objects only.
    inner = value if _is_object(value) else {"type": "object", "properties": {"answer": value}, "required": ["answer"]}
    tool = {"name": "answer", "description": "Give the answer.", "input_schema": inner}
    return {"tools": [tool], "tool_choice": {"type": "tool", "name": "answer"}}


def _is_object(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "object"


def _text(block: Any, schema: str | None) -> str:
    if block.type == "text":
        return str(block.text or "")
    if block.type != "tool_use" or schema is None:
        return ""
    wrapped = not _is_object(schema_value(schema)) and isinstance(block.input, dict)
    return json.dumps(block.input.get("answer") if wrapped else block.input, ensure_ascii=False)


def _calls(answer: Answer) -> tuple[ToolCall, ...]:
    used = (block for block in answer.content if block.type == "tool_use")
    return told_apart(ToolCall(block.id or "", block.name or "", as_written(block.input)) for block in used)


def _status(answer: Answer, said: bool) -> tuple[Status, str]:
    reason = answer.stop_reason
    if reason == "refusal":
        details = answer.stop_details
        return "refused", (details.explanation or details.category or "") if details else "the model declined"
    if reason in ("max_tokens", "model_context_window_exceeded"):
        return "truncated", "cut at max_tokens" if reason == "max_tokens" else "the context window is full"
    return ("ok", "") if said else ("empty", f"no text; stop_reason {reason}")


def _usage(answer: Answer) -> Usage:
    usage = answer.usage
    if usage is None:
        return Usage()
    read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
    return Usage((usage.input_tokens or 0) + read + written, read, written, usage.output_tokens or 0)
