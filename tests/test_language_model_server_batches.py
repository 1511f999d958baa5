"""Batches of the test server through the real SDKs: submit, poll, results, list, cancel, expire, fail in part."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from anthropic import AsyncAnthropic
from language_model_server import Running, serving
from language_model_server.clients import anthropic_client, openai_client
from openai import AsyncOpenAI
from openai.types import Batch


@pytest.fixture(scope="module")
def started() -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture
def server(started: Running) -> Running:
    started.reset()
    return started


def question(number: int, model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 50}


def jsonl(count: int, model: str = "fill") -> bytes:
    rows = (
        {"custom_id": f"c-{n}", "method": "POST", "url": "/v1/chat/completions", "body": question(n, model)}
        for n in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


async def submit(client: AsyncOpenAI, content: bytes, metadata: dict[str, str] | None = None) -> Batch:
    file = await client.files.create(file=("requests.jsonl", io.BytesIO(content)), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(content), "batch", "requests.jsonl")
    assert (await client.files.content(file.id)).content == content
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
    )


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        await asyncio.sleep(0.02)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def rows(client: AsyncOpenAI, file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    text = (await client.files.content(file)).text
    found = [json.loads(line) for line in text.splitlines()]
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def test_openai_batch_from_upload_to_results(server: Running) -> None:
    async def run() -> tuple[Batch, dict[str, Any]]:
        async with openai_client(server) as client:
            batch = await submit(client, jsonl(5), {"nonce": "n1"})
            assert (batch.status, batch.metadata) == ("validating", {"nonce": "n1"})
            done = await ended(client, batch)
            return done, await rows(client, done.output_file_id)

    done, found = asyncio.run(run())
    assert (done.status, done.error_file_id) == ("completed", None)
    assert done.request_counts and done.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
    assert list(found) == [f"c-{n}" for n in reversed(range(5))], "not in the order of the requests"
    reply = found["c-3"]["response"]
    assert (reply["status_code"], reply["body"]["object"]) == (200, "chat.completion")
    lines = [entry for entry in server.log() if entry["route"] == "batch_lines"]
    assert [entry["custom_id"] for entry in lines] == [f"c-{n}" for n in range(5)]
    assert server.counts()["questions"] == 5


def test_openai_batches_are_listed_newest_first_in_pages(server: Running) -> None:
    async def run() -> list[str]:
        async with openai_client(server) as client:
            for number in range(3):
                await submit(client, jsonl(1), {"nonce": str(number)})
            pages = await client.batches.list(limit=2)
            assert len(pages.data) == 2 and pages.has_more
            return [(batch.metadata or {})["nonce"] async for batch in client.batches.list(limit=2)]

    assert asyncio.run(run()) == ["2", "1", "0"]


def test_openai_batch_fails_in_part_expires_and_is_cancelled(server: Running) -> None:
    async def run(cancel: bool = False) -> tuple[Batch, dict[str, Any], dict[str, Any]]:
        async with openai_client(server) as client:
            batch = await submit(client, jsonl(6, "m"))
            if cancel:
                assert (await client.batches.cancel(batch.id)).status == "cancelling"
            done = await ended(client, batch)
            return done, await rows(client, done.output_file_id), await rows(client, done.error_file_id)

    server.behave("m", faults=[{"kind": "500", "route": "batch_lines", "every": 3}], batch_expires_after=5)
    done, good, bad = asyncio.run(run())
    assert (done.status, sorted(good), sorted(bad)) == ("expired", ["c-1", "c-2", "c-4"], ["c-0", "c-3", "c-5"])
    assert bad["c-0"]["response"]["status_code"] == 500 and bad["c-0"]["response"]["body"]["error"]["message"]
    assert (bad["c-5"]["response"], bad["c-5"]["error"]["code"]) == (None, "batch_expired")
    server.behave("m", batch_s=60)
    done, good, bad = asyncio.run(run(cancel=True))
    assert (done.status, good, len(bad)) == ("cancelled", {}, 6)
    assert bad["c-5"]["error"]["code"] == "batch_cancelled"


@pytest.mark.parametrize(
    ("content", "behaviour", "code"),
    [
        (jsonl(2) + jsonl(1), {}, "duplicate_custom_id"),
        (jsonl(4), {"batch_max_requests": 3}, "too_many_tasks"),
        (jsonl(4), {"batch_max_bytes": 100}, "file_too_large"),
        (jsonl(1, "gpt-none"), {}, "model_not_found"),
        (jsonl(1) + b"not json\n", {}, None),
        (jsonl(1), {"batch_fails": "token limit"}, None),
    ],
)
def test_openai_batch_that_fails_validation(
    server: Running, content: bytes, behaviour: dict[str, Any], code: str | None
) -> None:
    async def run() -> Batch:
        async with openai_client(server) as client:
            return await ended(client, await submit(client, content))

    server.behave("fill", **behaviour)
    done = asyncio.run(run())
    assert done.status == "failed" and done.errors and done.errors.data and done.errors.data[0].code == code
    assert server.counts()["questions"] == 0


def test_a_batch_whose_id_is_lost_is_found_in_the_list(server: Running) -> None:
    """The connection is cut after the batch was made: the client has no id, the server has the batch."""

    async def run() -> tuple[list[str], int]:
        async with openai_client(server) as client:
            with pytest.raises(openai.APIError):
                await submit(client, jsonl(2), {"nonce": "lost"})
            found = [batch async for batch in client.batches.list() if (batch.metadata or {}).get("nonce") == "lost"]
            done = await ended(client, found[0])
            return [batch.id for batch in found], len(await rows(client, done.output_file_id))

    server.behave("*", faults=[{"kind": "cut_body", "route": "batches", "first": 1}])
    found, answered = asyncio.run(run())
    assert (len(found), answered) == (1, 2)


def test_results_that_are_cut_off_can_be_read_again(server: Running) -> None:
    async def run() -> list[str]:
        async with openai_client(server) as client:
            done = await ended(client, await submit(client, jsonl(3)))
            assert done.output_file_id
            with pytest.raises(openai.APIError):
                await client.files.content(done.output_file_id)
            return list(await rows(client, done.output_file_id))

    server.behave("*", faults=[{"kind": "cut_body", "route": "downloads", "after": 1, "first": 1}])
    assert sorted(asyncio.run(run())) == ["c-0", "c-1", "c-2"]
    assert server.counts()["by_route"]["downloads"] == 3


def requests(count: int, model: str) -> Any:
    return [{"custom_id": f"c-{n}", "params": question(n, model)} for n in range(count)]


async def message_results(client: AsyncAnthropic, name: str) -> dict[str, Any]:
    while (await client.messages.batches.retrieve(name)).processing_status != "ended":
        await asyncio.sleep(0.02)
    found = [row async for row in await client.messages.batches.results(name)]
    assert len({row.custom_id for row in found}) == len(found)
    return {row.custom_id: row.result for row in found}


def test_message_batch_succeeds_errs_expires(server: Running) -> None:
    async def run() -> tuple[Any, dict[str, Any], list[str]]:
        async with anthropic_client(server) as client:
            batch = await client.messages.batches.create(requests=requests(5, "m"))
            assert batch.processing_status == "in_progress" and batch.request_counts.processing == 5
            results = await message_results(client, batch.id)
            await client.messages.batches.create(requests=requests(1, "fill"))
            names = [one.id async for one in client.messages.batches.list(limit=1)]
            return await client.messages.batches.retrieve(batch.id), results, names

    faults = [
        {"kind": "529", "route": "batch_lines", "first": 1},
        {"kind": "refusal", "route": "batch_lines", "first": 1},
    ]
    server.behave("m", faults=faults, batch_expires_after=4)
    batch, results, names = asyncio.run(run())
    kinds = [results[f"c-{n}"].type for n in range(5)]
    assert kinds == ["errored", "succeeded", "succeeded", "succeeded", "expired"]
    assert results["c-0"].error.error.type == "overloaded_error"
    assert results["c-1"].message.stop_reason == "refusal"
    assert results["c-2"].message.content[0].text
    counts = batch.request_counts
    assert (counts.succeeded, counts.errored, counts.expired, counts.canceled, counts.processing) == (3, 1, 1, 0, 0)
    assert len(names) == 2 and names[-1] == batch.id, "newest first"


def test_message_batch_is_cancelled_and_results_wait_for_the_end(server: Running) -> None:
    async def run() -> dict[str, Any]:
        async with anthropic_client(server) as client:
            batch = await client.messages.batches.create(requests=requests(2, "fill?batch_s=60"))
            with pytest.raises(anthropic.AnthropicError):
                await client.messages.batches.results(batch.id)
            assert (await client.messages.batches.cancel(batch.id)).processing_status == "canceling"
            return await message_results(client, batch.id)

    assert [result.type for result in asyncio.run(run()).values()] == ["canceled", "canceled"]


def test_message_batches_that_are_refused(server: Running) -> None:
    async def run(asked: Any) -> None:
        async with anthropic_client(server) as client:
            await client.messages.batches.create(requests=asked)

    server.behave("small", batch_max_requests=2)
    wrong = [
        requests(1, "fill") * 2,
        requests(3, "small"),
        [{"custom_id": "not allowed!", "params": question(1, "fill")}],
        [],
    ]
    for asked in wrong:
        with pytest.raises(anthropic.BadRequestError):
            asyncio.run(run(asked))
    assert server.counts()["questions"] == 0
