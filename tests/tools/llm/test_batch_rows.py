"""Rows of a batch: what is sent, what cannot be read, lists that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from exegete.tools.errors import UserError
from exegete.tools.llm import Limits, Message, Reply, Request
from exegete.tools.llm.batch_anthropic import AnthropicBatchWire
from exegete.tools.llm.batch_openai import OpenAIBatchWire
from exegete.tools.llm.batch_wire import listed, read_result
from exegete.tools.llm.faults import Declined, Lacking, Transient, Unexplained
from exegete.tools.llm.specs import parse_spec

from .batch_results import Row
from .conftest import question


def wires() -> tuple[OpenAIBatchWire, AnthropicBatchWire]:
    return (
        OpenAIBatchWire(parse_spec("openai-batch:m@http://127.0.0.1:9/v1"), Limits(), 5.0),
        AnthropicBatchWire(parse_spec("anthropic-batch:m@http://127.0.0.1:9"), Limits(), 5.0),
    )


def test_lines_hold_what_a_live_call_sends() -> None:
    openai_, anthropic_ = wires()
    both: list[tuple[OpenAIBatchWire | AnthropicBatchWire, str]] = [(openai_, "body"), (anthropic_, "params")]
    for wire, inner in both:
        row = json.loads(wire.line("an-id", question()))
        live = wire.body(question(), wire.abilities.way, 0)
        assert row["custom_id"] == "an-id" and row[inner] == json.loads(json.dumps(live))
    openai_row = json.loads(openai_.line("an-id", question()))
    # As OpenAI documents a line, and `vllm run-batch` reads it.
    assert list(openai_row) == ["custom_id", "method", "url", "body"]
    assert (openai_row["method"], openai_row["url"]) == ("POST", "/v1/chat/completions")
    assert b"\n" not in openai_.line("an-id", Request((Message("user", "a\nb\u2028c"),)))


CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}


@pytest.mark.parametrize(
    ("row", "kind", "sent"),
    [
        ({"response": None, "error": {"code": "batch_expired", "message": "too late"}}, Transient, False),
        ({"response": {"status_code": 500, "body": {"error": {"message": "x"}}}}, Transient, False),
        ({"response": {"status_code": 400, "body": {"error": {"message": "prompt is too long"}}}}, Declined, None),
        ({"response": {"status_code": 400, "body": {"error": {"message": "bad response_format"}}}}, Lacking, None),
        ({"response": {"status_code": 400, "body": {"error": {"message": "no idea"}}}}, Unexplained, None),
        ({"response": {"status_code": 404, "body": {"error": {"message": "no model"}}}}, UserError, None),
        ({"response": {"status_code": 200, "body": {}}}, Transient, True),
        ({"response": {"status_code": 200, "body": {"choices": [{"message": 3}]}}}, Transient, True),
        ({"response": {"status_code": 200, "body": {"choices": [CHOICE]}}}, Reply, None),
    ],
)
def test_openai_rows(row: Row, kind: type, sent: bool | None) -> None:
    result = wires()[0].result({"custom_id": "a"} | row)
    found = result.reply or result.fault
    assert isinstance(found, kind), found
    assert sent is None or (isinstance(found, Transient) and found.sent == sent)


def failed(kind: str, message: str = "x") -> Row:
    return {"type": "errored", "error": {"type": "error", "error": {"type": kind, "message": message}}}


@pytest.mark.parametrize(
    ("result", "kind", "sent"),
    [
        ({"type": "expired"}, Transient, False),
        ({"type": "canceled"}, Transient, False),
        (failed("overloaded_error"), Transient, False),
        (failed("api_error"), Transient, False),
        (failed("invalid_request_error", "prompt is too long"), Declined, None),
        (failed("invalid_request_error", "output_config is not supported"), Lacking, None),
        (failed("not_found_error", "no model"), UserError, None),
        ({"type": "succeeded", "message": {"content": 3}}, Transient, True),
        ({"type": "succeeded", "message": {"content": [{"type": "text", "text": "yes"}]}}, Reply, None),
        ({"type": "something new"}, Transient, True),
    ],
)
def test_anthropic_rows(result: Row, kind: type, sent: bool | None) -> None:
    read = wires()[1].result({"custom_id": "a", "result": result})
    found = read.reply or read.fault
    assert isinstance(found, kind), found
    assert sent is None or (isinstance(found, Transient) and found.sent == sent)


@pytest.mark.parametrize("line", [b"<html>", b"[]", b"null", b"{}", b'{"custom_id": "a"', b"\xff"])
def test_lines_that_are_no_results(line: bytes) -> None:
    for wire in wires():
        with pytest.raises(Transient, match="broken results"):
            read_result(wire, line)


class _Page:
    def __init__(self, data: Any, following: _Page | None = None) -> None:
        self.data = data
        self._following = following

    def has_next_page(self) -> bool:
        return self._following is not None

    async def get_next_page(self) -> _Page:
        assert self._following is not None
        return self._following


def test_a_page_that_is_none_does_not_say_that_there_is_no_batch() -> None:
    async def read(first: _Page) -> list[Any]:
        async def page() -> _Page:
            return first

        found: AsyncIterator[Any] = listed(page())
        return [one async for one in found]

    assert asyncio.run(read(_Page([1], _Page([2, 3])))) == [1, 2, 3]
    with pytest.raises(Transient, match="no list"):
        asyncio.run(read(_Page([1], _Page(None))))
