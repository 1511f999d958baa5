"""Replies that are not even of the protocol, from a server that says whatever it is told to."""

from __future__ import annotations

import asyncio

import pytest

from exegete.tools.errors import UserError
from exegete.tools.llm import Limits, MemoryJournal, Reply, open_client

from .conftest import question

ERROR_IN_200 = '{"error": {"code": 429, "message": "slow down"}}'


def reply_to(
    provider: str, body: str, *, status: int = 200, kind: str = "application/json", headers: str = "", attempts: int = 1
) -> Reply:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await reader.readexactly(int(length.split(b":")[1]))
        content = body.encode()
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n{headers}"
            "connection: close\r\n\r\n".encode()
            + content
        )
        await writer.drain()
        writer.close()

    async def ask() -> Reply:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        limits = Limits(attempts=attempts, patience_s=0.01)
        client = open_client(f"{provider}:m@http://127.0.0.1:{port}", journal=MemoryJournal(), limits=limits)
        try:
            return await client.complete(question())
        finally:
            await client.close()
            server.close()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "body", ['{"id": "x", "choices": [', "<html>", "[]", "null", "{}", '{"choices": [{}], "content": 3}']
)
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_no_completion(provider: str, body: str, kind: str) -> None:
    reply = reply_to(provider, body, kind=kind)
    assert reply.status == "error" and "broken reply" in reply.detail and reply.parsed is None


def test_error_in_place_of_choices() -> None:
    reply = reply_to("openai", ERROR_IN_200)
    assert reply.status == "error" and "HTTP 429: slow down" in reply.detail


@pytest.mark.parametrize(
    ("code", "message", "status"),
    [
        (400, "This model's maximum context length is 8192 tokens", "rejected"),
        (400, "prompt is too long: 210000 tokens > 200000 maximum", "rejected"),
        (413, "Request too large", "rejected"),
        (400, "The response was filtered: content management policy", "filtered"),
        (403, "flagged by moderation", "filtered"),
    ],
)
def test_rejections_of_one_request(provider: str, code: int, message: str, status: str) -> None:
    reply = reply_to(provider, f'{{"error": {{"message": "{message}"}}}}', status=code)
    assert reply.status == status and message in reply.detail and reply.attempts == 1


@pytest.mark.parametrize(
    ("code", "message", "says"),
    [
        (401, "bad key", "EXEGETE_API_KEY"),
        (402, "no funds", "payment"),
        (400, "Your credit balance is too low", "payment"),
        (403, "not allowed", "permission"),
        (404, "model m", "no such model"),
        (400, "unknown parameter", "rejects the request"),
    ],
)
def test_rejections_of_every_request(provider: str, code: int, message: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        reply_to(provider, f'{{"error": {{"message": "{message}"}}}}', status=code)


def test_a_key_that_the_server_echoes_is_taken_out(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "plain-old-key-1")
    with pytest.raises(UserError) as raised:
        reply_to(provider, '{"error": {"message": "wrong key plain-old-key-1"}}', status=401)
    assert "plain-old" not in str(raised.value)
    reply = reply_to(provider, '{"error": {"message": "busy plain-old-key-1"}}', status=500)
    assert reply.status == "error" and "plain-old" not in repr(reply)
