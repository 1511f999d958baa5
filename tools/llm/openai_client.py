"""OpenAI's chat completions, also as vLLM, Ollama, llama.cpp and OpenRouter speak them.

1. A schema goes out as `response_format: json_schema` (strict where the schema keeps to OpenAI's strict subset), then as
   `json_object` with the schema in words, then in words alone, as far down as the server makes necessary.
2. Log-probabilities come with 20 alternatives, or 5, or not at all, likewise.
3. Shared messages come first as they are: OpenAI, vLLM and llama.cpp cache prefixes by themselves.
4. Tools go out as functions; each result is a message of its own (role `tool`), before the user's text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice

from exegete.tools.llm.contract import Message, Reply, Request, Status, TokenLogprob, ToolCall, Usage
from exegete.tools.llm.faults import Transient, fault_of
from exegete.tools.llm.pacing import Limits
from exegete.tools.llm.specs import Spec
from exegete.tools.llm.structured import in_words, schema_value
from exegete.tools.llm.tool_calls import arguments_object, as_written, told_apart, tool_value
from exegete.tools.llm.wire import SdkWire

_WAYS = ("json_schema", "json_object", "words")


class OpenAIWire(SdkWire):
    """Sends requests through OpenAI's SDK, its own retries off."""

    def __init__(self, spec: Spec, limits: Limits) -> None:
        """Open a client; nothing is sent yet. Raises UserError where the key is missing."""
        super().__init__(spec, limits, openai, _WAYS, "/chat/completions", ChatCompletion)
        self._client: openai.AsyncOpenAI = openai.AsyncOpenAI(**self._options())

    def body(self, request: Request, way: str = _WAYS[0], alternatives: int = 20) -> dict[str, Any]:
        """Return the body of a chat completion request."""
        asked = in_words(request) if way in ("json_object", "words") else request
        official = self._spec.host == "api.openai.com"
        body: dict[str, Any] = {
            "model": self._spec.model,
            "messages": [turn for message in asked.messages for turn in _turns(message)],
            # The newer name, which covers reasoning tokens, is OpenAI's own; compatible servers know the older one.
            "max_completion_tokens" if official else "max_tokens": request.max_tokens,
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.logprobs and alternatives:
            body |= {"logprobs": True, "top_logprobs": alternatives}
        if request.schema is not None and way != "words":
            body["response_format"] = _response_format(request.schema, way)
        if request.tools:
            body["tools"] = [_function(tool) for tool in request.tools]
            if not request.parallel_calls:
                # Several at a time are the default; not every compatible server knows the name.
                body["parallel_tool_calls"] = False
        return body

    def reply_of(self, completion: ChatCompletion, asked: tuple[bool, bool] = (False, False)) -> Reply:
        """Return a completion as a reply.

        Raises:
            Transient: it holds no choice, or an error object in place of one (as OpenRouter sends).
        """
        if not completion.choices:
            raise self._instead(completion, asked)
        choice = completion.choices[0]
        text = choice.message.content or ""
        calls = _calls(choice)
        status, detail = _status(choice, bool(text.strip() or calls))
        return Reply(
            status,
            text,
            logprobs=_logprobs(choice),
            model=completion.model or "",
            usage=_usage(completion),
            detail=self._scrub(detail),
            calls=calls,
        )

    def _read(self, answer: Any, request: Request, asked: tuple[bool, bool]) -> Reply:
        return self.reply_of(answer, asked)

    def _instead(self, completion: ChatCompletion, asked: tuple[bool, bool]) -> Exception:
        error = (completion.model_extra or {}).get("error")
        if isinstance(error, dict) and isinstance(code := error.get("code"), int) and 400 <= code < 600:
            text = self._scrub(str(error.get("message", "")))
            return fault_of(self.name, self._spec.key_variable, code, text, {}, asked)
        return Transient("broken reply: no choices in it", sent=True)


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """Yield a message as the messages that it is on this wire."""
    for result in message.results:
        yield {"role": "tool", "tool_call_id": result.id, "content": result.text}
    if message.calls:
        yield {"role": message.role, "content": message.text or None, "tool_calls": list(map(_called, message.calls))}
    elif message.text or not message.results:
        yield {"role": message.role, "content": message.text}


def _called(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(arguments_object(call), ensure_ascii=False, separators=(",", ":"))
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _function(tool: str) -> dict[str, Any]:
    return {"type": "function", "function": tool_value(tool)}


def strict(schema: Any) -> bool:
    """Return whether a schema keeps to OpenAI's strict subset: closed objects whose properties are all required."""
    if isinstance(schema, list):
        return all(map(strict, schema))
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        if schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(properties):
            return False
    return not {"oneOf", "allOf", "not", "uniqueItems"} & schema.keys() and all(map(strict, schema.values()))


@lru_cache(maxsize=256)
def _response_format(schema: str, way: str) -> dict[str, Any]:
    if way == "json_object":
        return {"type": "json_object"}
    value = schema_value(schema)
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": strict(value)}}


def _status(choice: Choice, said: bool) -> tuple[Status, str]:
    if choice.message.refusal:
        return "refused", choice.message.refusal
    if choice.finish_reason == "content_filter":
        return "filtered", "stopped by the provider's content filter"
    if choice.finish_reason == "length":
        return "truncated", "cut at max_tokens"
    return ("ok", "") if said else ("empty", f"no text; finish_reason {choice.finish_reason}")


def _calls(choice: Choice) -> tuple[ToolCall, ...]:
    called: Any = choice.message.tool_calls or ()
    functions = ((call.id, call.function) for call in called)
    return told_apart(ToolCall(id or "", said.name or "", as_written(said.arguments)) for id, said in functions)


def _logprobs(choice: Choice) -> tuple[TokenLogprob, ...] | None:
    content = choice.logprobs.content if choice.logprobs else None
    if not content:
        return None
    return tuple(
        TokenLogprob(item.token, item.logprob, tuple((top.token, top.logprob) for top in item.top_logprobs or ()))
        for item in content
    )


def _usage(completion: ChatCompletion) -> Usage:
    usage = completion.usage
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    return Usage(
        usage.prompt_tokens or 0,
        (details.cached_tokens or 0) if details else 0,
        (details.cache_write_tokens or 0) if details else 0,
        usage.completion_tokens or 0,
    )
