"""Shortcuts that save time change nothing: lanes, bodies posted as they are, ids built by hand, answers remembered."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

import httpx2
import pytest
from language_model_server import Running

from exegete.tools.llm import Limits, MemoryJournal, Message, Request
from exegete.tools.llm.anthropic_client import AnthropicWire
from exegete.tools.llm.connections import Lanes
from exegete.tools.llm.contract import ToolCall, ToolResult, tool_text
from exegete.tools.llm.openai_client import OpenAIWire
from exegete.tools.llm.specs import parse_spec
from exegete.tools.llm.structured import parse
from exegete.tools.seeds import digest

from .conftest import SCHEMA, Opening, question, spec_at


class Opened:
    """Makes lanes that answer once `gate` is set, and remembers them."""

    def __init__(self) -> None:
        self.lanes: list[httpx2.AsyncClient] = []
        self.asked: list[int] = []
        self.gate = asyncio.Event()

    def __call__(self, **options: Any) -> httpx2.AsyncClient:
        number = len(self.lanes)

        async def answer(request: httpx2.Request) -> httpx2.Response:
            self.asked.append(number)
            await self.gate.wait()
            if request.url.path == "/broken":
                raise httpx2.ReadError("gone")
            return httpx2.Response(200)

        self.lanes.append(httpx2.AsyncClient(transport=httpx2.MockTransport(answer)))
        return self.lanes[-1]


def test_a_lane_for_each_call_in_flight_and_the_last_one_again() -> None:
    async def ask() -> Opened:
        opened = Opened()
        lanes = Lanes(opened)
        flying = [asyncio.create_task(lanes.get("http://x/a")) for _ in range(3)]
        await asyncio.sleep(0)
        opened.gate.set()
        assert [response.status_code for response in await asyncio.gather(*flying)] == [200] * 3
        last = opened.asked[-1]
        for _ in range(2):
            await lanes.get("http://x/b")
        # A call that fails gives its lane back as well.
        with pytest.raises(httpx2.ReadError):
            await lanes.get("http://x/broken")
        await lanes.get("http://x/c")
        assert opened.asked[3:] == [last] * 4
        await lanes.aclose()
        return opened

    opened = asyncio.run(ask())
    assert sorted(opened.asked[:3]) == [0, 1, 2] and len(opened.lanes) == 3
    assert all(lane.is_closed for lane in opened.lanes)


def test_what_goes_out_is_what_the_sdk_sends(server: Running, provider: str, opened: Opening) -> None:
    server.behave(logprobs="given")
    request = question(logprobs=provider == "openai", shared=1)

    async def ask() -> None:
        spec, limits = parse_spec(spec_at(server, provider)), Limits()
        wire = OpenAIWire(spec, limits) if provider == "openai" else AnthropicWire(spec, limits)
        sdk: Any = wire._client
        create = sdk.chat.completions.create if provider == "openai" else sdk.messages.create
        await create(**wire.body(request))
        await wire.close()
        client = opened(MemoryJournal())
        assert (await client.complete(request)).status == "ok"
        await client.close()

    asyncio.run(ask())
    by_the_sdk, by_us = [row["body"] for row in server.log(bodies=True)]
    assert by_us == by_the_sdk and by_us["messages"]


@pytest.mark.parametrize(
    "request_",
    [
        question(),
        question('“Ünïcode” \u2028 \x00 \\ "', None, temperature=0.0, logprobs=True, shared=1, sample=3),
        Request((Message("user", ""),), max_tokens=7, temperature=1e-7, prompt_digest="sha256:0"),
        Request((), temperature=float("nan")),
        Request(
            (Message("user", "a"),), tools=(tool_text("look", "Looks.", {"type": "object"}),), parallel_calls=False
        ),
        Request(
            (Message("assistant", "", (ToolCall("c", "look", "{}"),)), Message("user", "", (), (ToolResult("c", "b"),)))
        ),
    ],
)
def test_ids_are_digests_of_canonical_json(request_: Request) -> None:
    # Every field, whatever fields there will be: a reply that was paid for must be found again. Those of tools only where there
    # are any: ids of requests from before there were stand in the journals of stores.
    fields = asdict(request_)
    if not request_.tools:
        del fields["tools"], fields["parallel_calls"]
    for message in fields["messages"]:
        for name in ("calls", "results"):
            if written := message.pop(name):
                message[name] = [list(one.values()) for one in written]
    canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    assert request_.id("openai:model") == digest("openai:model", canonical)


def test_an_id_stays_what_it_was() -> None:
    asked = Request((Message("system", "é"), Message("user", "b")), "{}", logprobs=True, shared=1)
    assert asked.id("m") == "sha256:ca2e865d28700988058b567e3a04862678cb05aab017b1f77743ed74dc6fcd1b"


def test_each_answer_is_a_value_of_its_own() -> None:
    first, second = (parse('{"verdicts": [1]}', SCHEMA) for _ in range(2))
    first["verdicts"].append(2)
    assert second == {"verdicts": [1]} == parse('{"verdicts": [1]}', SCHEMA)
