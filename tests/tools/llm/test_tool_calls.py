"""Tool calls through the real SDKs against a real server: what goes out, what comes back, and what is kept of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running

from exegete.tools.errors import UserError
from exegete.tools.llm import (
    Limits,
    MemoryJournal,
    Message,
    Reply,
    Request,
    ToolCall,
    ToolResult,
    load_prices,
    open_client,
    parse_spec,
    tool_text,
)
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.openai_client import OpenAIWire
from exegete.tools.llm.prices import most_input_tokens
from exegete.tools.llm.tool_calls import arguments_object, check_tools, told_apart
from exegete.tools.store.journal import StoreJournal, packed, unpacked

from .conftest import PRICES, SCHEMA, Opening

ABLATE = tool_text(
    "ablate",
    "Set latents to zero.",
    {
        "type": "object",
        "properties": {"latents": {"type": "array", "items": {"type": "integer"}}},
        "required": ["latents"],
    },
)
LENS = tool_text("lens", "Show what a latent promotes.", {"type": "object", "properties": {}, "required": []})
START = (Message("system", "You investigate."), Message("user", "Why?"))
TWO = (ToolCall("a", "ablate", '{"latents":[1,2]}'), ToolCall("b", "lens", "{}"))


def asking(messages: tuple[Message, ...] = START, **options: Any) -> Request:
    return Request(messages, tools=(ABLATE, LENS), **options)


def answered(client: Any, *requests: Request) -> list[Reply]:
    async def ask() -> list[Reply]:
        try:
            return [await client.complete(request) for request in requests]
        finally:
            await client.close()

    return asyncio.run(ask())


def bodies(server: Running) -> list[dict[str, Any]]:
    return [row["body"] for row in server.log(bodies=True)]


def script(*calls: dict[str, Any], **line: Any) -> dict[str, Any]:
    return {"calls": list(calls), **line}


def test_ids_and_bytes_without_tools_are_those_of_existing_stores() -> None:
    """Computed before requests could have tools: a journal that is on a disk stays valid."""
    messages = (Message("system", "You judge."), Message("user", "Häufig?"))
    options: dict[str, Any] = {"max_tokens": 64, "temperature": 0.5, "logprobs": True, "shared": 1, "sample": 2}
    request = Request(messages, '{"type":"object"}', prompt_digest="sha256:0", **options)
    assert request.id("openai:model") == "sha256:07f8d9eae904ed7377e25db46e20958a44184f7dfe68073edc3f198d9aabb6d7"
    plain = Request((Message("user", "Q"),), parallel_calls=False)
    assert plain.id("anthropic:m") == "sha256:1be170572e1fbd8f53ce7e4b61a738effd6a5219f7c06741c2bec8c88eaaf4ef"
    old = b'{"status":"ok","text":"Yes.","model":"m","usd":0.25,"seconds":1.5,"attempts":2,"detail":"","usage":[3,1,0,2],"logprobs":null}'
    assert packed(unpacked(old)) == old and unpacked(old).calls == ()


def test_everything_about_tools_is_part_of_the_id() -> None:
    results = (ToolResult("a", "Nothing fell."), ToolResult("b", "DESC"))
    talk = (*START, Message("assistant", "", TWO), Message("user", "", results=results))
    changed = (*START, Message("assistant", "", TWO), Message("user", "", results=(results[0], ToolResult("b", "ASC"))))
    failed = (
        *START,
        Message("assistant", "", TWO),
        Message("user", "", results=(results[0], ToolResult("b", "DESC", True))),
    )
    requests = [Request(START), asking(), Request(START, tools=(LENS, ABLATE)), asking(parallel_calls=False)]
    requests += [asking(talk), asking(changed), asking(failed)]
    assert len({request.id("m") for request in requests}) == len(requests)


def test_parallel_calls_come_back_and_their_results_go_out(server: Running, provider: str, opened: Opening) -> None:
    first = script(
        {"name": "ablate", "arguments": {"latents": [1, 2]}, "id": "a"}, {"name": "lens", "arguments": {}, "id": "b"}
    )
    server.behave(answer="scripted", replies=[first | {"text": "Two at once."}, "Done."])
    asked = asking(shared=2)
    client = opened(MemoryJournal())

    async def talk() -> tuple[Reply, Reply]:
        reply = await client.complete(asked)
        results = (ToolResult("a", "The metric fell."), ToolResult("b", "no such tool", failed=True))
        turns = (
            *START,
            Message("assistant", reply.text, reply.calls),
            Message("user", "3 steps left.", results=results),
        )
        last = await client.complete(asking(turns, shared=4))
        await client.close()
        return reply, last

    reply, last = asyncio.run(talk())
    assert (reply.status, reply.text) == ("ok", "Two at once.")
    assert [(call.id, call.name, json.loads(call.arguments_json)) for call in reply.calls] == [
        ("a", "ablate", {"latents": [1, 2]}),
        ("b", "lens", {}),
    ]
    assert (last.status, last.text, last.calls) == ("ok", "Done.", ())
    (_, second) = bodies(server)
    (_of_openai if provider == "openai" else _of_anthropic)(second)


def _of_openai(body: dict[str, Any]) -> None:
    parameters = json.loads(ABLATE)["parameters"]
    function = {"name": "ablate", "description": "Set latents to zero.", "parameters": parameters}
    assert body["tools"][0] == {"type": "function", "function": function} and "parallel_tool_calls" not in body
    called, first, second, user = body["messages"][2:]
    assert called["content"] == "Two at once." and called["tool_calls"][0] == {
        "id": "a",
        "type": "function",
        "function": {"name": "ablate", "arguments": '{"latents":[1,2]}'},
    }
    assert first == {"role": "tool", "tool_call_id": "a", "content": "The metric fell."}
    assert second["tool_call_id"] == "b" and user == {"role": "user", "content": "3 steps left."}


def _of_anthropic(body: dict[str, Any]) -> None:
    parameters = json.loads(ABLATE)["parameters"]
    assert body["tools"][0] == {"name": "ablate", "description": "Set latents to zero.", "input_schema": parameters}
    assert body["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": False}
    called, results = body["messages"][1:]
    assert [block["type"] for block in called["content"]] == ["text", "tool_use", "tool_use"]
    assert called["content"][1] == {"type": "tool_use", "id": "a", "name": "ablate", "input": {"latents": [1, 2]}}
    assert [block["type"] for block in results["content"]] == ["tool_result", "tool_result", "text"]
    assert [block.get("is_error") for block in results["content"]] == [False, True, None]
    # What is shared ends with the conversation so far: the next request finds all of it in the provider's cache.
    assert results["content"][-1]["cache_control"] == {"type": "ephemeral"}


def test_a_call_without_text_is_an_answer_and_one_at_a_time_can_be_asked_for(
    server: Running, provider: str, opened: Opening
) -> None:
    server.behave(answer="scripted", replies=[script({"name": "lens", "arguments": {}}), {"text": ""}])
    called, empty = answered(opened(MemoryJournal()), asking(parallel_calls=False), asking(sample=1))
    assert (called.status, called.text, len(called.calls)) == ("ok", "", 1)
    assert (empty.status, empty.calls) == ("empty", ())
    first = bodies(server)[0]
    if provider == "openai":
        assert first["parallel_tool_calls"] is False
    else:
        assert first["tool_choice"]["disable_parallel_tool_use"] is True


@pytest.mark.parametrize("arguments", ["{latents: [1]", "", "[1, 2]", '{"latents": NaN}', '{"latents": "\\ud800"}'])
def test_malformed_arguments_reach_the_caller_and_can_go_back(server: Running, opened: Opening, arguments: str) -> None:
    server.behave(answer="scripted", replies=[script({"name": "ablate", "arguments": arguments, "id": "x"}), "I see."])
    client = opened(MemoryJournal())

    async def talk() -> tuple[Reply, Reply]:
        reply = await client.complete(asking())
        turns = (
            *START,
            Message("assistant", "", reply.calls),
            Message("user", "", results=(ToolResult("x", "No.", True),)),
        )
        last = await client.complete(asking(turns))
        await client.close()
        return reply, last

    reply, last = asyncio.run(talk())
    assert [call.arguments_json for call in reply.calls] == [arguments]
    assert last.text == "I see."


def test_an_empty_message_keeps_its_place_unless_results_stand_for_it() -> None:
    wire = OpenAIWire(parse_spec("openai:m@http://localhost:1/v1"), Limits())
    assert wire.body(Request((Message("user", ""),)))["messages"] == [{"role": "user", "content": ""}]
    results = (ToolResult("a", "x"), ToolResult("b", "y"))
    turns = (*START, Message("assistant", "", TWO), Message("user", "", results=results))
    assert [turn["role"] for turn in wire.body(asking(turns))["messages"][2:]] == ["assistant", "tool", "tool"]


def test_what_goes_back_is_an_object() -> None:
    assert arguments_object(ToolCall("x", "ablate", '{"latents": [1]}')) == {"latents": [1]}
    assert arguments_object(ToolCall("x", "ablate", "[1]")) == {"not_json": "[1]"}
    assert arguments_object(ToolCall("x", "ablate", "\ud800")) == {"not_json": "?"}
    assert arguments_object(ToolCall("x", "ablate", "[" * 100_000))["not_json"].startswith("[[")


def test_ids_that_a_server_leaves_out_or_repeats_are_told_apart(server: Running, opened: Opening) -> None:
    calls: list[dict[str, Any]] = [
        {"name": "lens", "arguments": {}, "id": name} for name in ("", "call_1", "call_1", "")
    ]
    server.behave(answer="scripted", replies=[script(*calls)])
    (reply,) = answered(opened(MemoryJournal()), asking())
    assert [call.id for call in reply.calls] == ["call_2", "call_1", "call_3", "call_4"]
    assert told_apart(TWO) == TWO


def test_a_reply_that_was_cut_is_truncated(server: Running, opened: Opening) -> None:
    server.behave(answer="scripted", replies=[script({"name": "lens", "arguments": {}}, stop="length")])
    (reply,) = answered(opened(MemoryJournal()), asking())
    assert reply.status == "truncated"


def test_a_call_is_journaled_with_its_calls_and_never_asked_again(
    server: Running, provider: str, tmp_path: Path
) -> None:
    server.behave(answer="scripted", replies=[script({"name": "ablate", "arguments": {"latents": [7]}, "id": "é"})])
    for cached in (False, True):
        journal = StoreJournal(tmp_path / "calls.sqlite")
        client = open_client(
            server.spec(provider, "model"), journal=journal.of_run("r"), prices=load_prices(own=PRICES), limits=Limits()
        )
        (reply,) = answered(client, asking())
        journal.close()
        assert (reply.status, reply.cached) == ("ok", cached)
        assert [(call.id, call.name, json.loads(call.arguments_json)) for call in reply.calls] == [
            ("é", "ablate", {"latents": [7]})
        ]
    assert server.counts()["questions"] == server.counts()["by_route"]["completions"] == 1


def test_packing_keeps_calls() -> None:
    reply = Reply("ok", calls=(*TWO, ToolCall("c", "sql", "{not json" * 200)))
    assert unpacked(packed(reply)) == reply


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ((*START, Message("assistant", "", TWO), Message("user", "", results=(ToolResult("a", "x"),))), "one each"),
        ((*START, Message("assistant", "", TWO), Message("user", "Go on.")), "one each"),
        ((Message("user", "", results=(ToolResult("a", "x"),)),), "one each"),
        ((Message("user", "Why?", calls=TWO),), "calls are the assistant's"),
        ((*START, Message("assistant", "", (TWO[0], TWO[0])), Message("user", "")), "given twice"),
        ((*START, Message("assistant", "", TWO)), "results come first"),
    ],
)
def test_a_conversation_that_providers_would_refuse_is_a_mistake_of_ours(
    messages: tuple[Message, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        check_tools(Request(messages, tools=(ABLATE, LENS)))


def test_tools_and_schema_exclude_each_other_and_tools_have_a_form(opened: Opening) -> None:
    for request, why in (
        (asking(schema=SCHEMA), "either offers tools"),
        (Request(START, tools=('{"name":"x"}',)), "tool_text"),
        (Request((*START, Message("assistant", "", TWO), Message("user", "", results=(ToolResult("a", ""),)))), "needs the tools"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            answered(opened(MemoryJournal()), request)


def test_tools_calls_and_results_are_in_the_worst_case() -> None:
    results = (ToolResult("a", "r" * 1_000), ToolResult("b", ""))
    talk = (*START, Message("assistant", "", TWO), Message("user", "", results=results))
    plain = most_input_tokens(Request(START))
    assert most_input_tokens(asking()) >= plain + len(ABLATE) + len(LENS)
    assert most_input_tokens(asking(talk)) >= most_input_tokens(asking()) + 1_000 + len(TWO[0].arguments_json)


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_batches_take_no_tools(server: Running, kind: str) -> None:
    client = open_client(server.spec(f"{kind}-batch", "model"), journal=MemoryJournal())
    with pytest.raises(UserError, match=rf"batches take no tools.*name it {kind}:model@http"):
        answered(client, asking())
    assert server.counts()["questions"] == 0


def test_local_models_take_no_tools() -> None:
    from exegete.tools.llm.local_client import LocalModel

    class Local:
        name = "hf:somewhere"
        takes_tools = LocalModel.takes_tools

        async def close(self) -> None:
            pass

    journal = MemoryJournal()
    client = JournaledClient(Local(), journal=journal, budget=None, price=None, limits=Limits())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"hf:somewhere: takes no tools.*openai:MODEL@URL"):
        answered(client, asking())
    assert not journal.intents
