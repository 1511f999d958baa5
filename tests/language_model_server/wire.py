"""HTTP/1.1 on asyncio streams, with the raw control that misbehaving needs.

1. A connection is kept alive; each request is read whole (content-length or chunked).
2. The handler returns an `Outgoing`, which says how it is to be written: at once, in drips, cut off, or held back.
3. Whether the reply went out whole is told to `Outgoing.sent`, so that the log knows which answers were given.
"""

from __future__ import annotations

import asyncio
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}
MAX_HEAD = 65_536


@dataclass(frozen=True, slots=True)
class Incoming:
    """One request, read whole."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(slots=True)
class Outgoing:
    """One reply and how it is written."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    drip_s: float | None = None
    """Write the body in small chunks over so many seconds (transfer-encoding chunked)."""
    cut_at: float | None = None
    """Close the connection after this share of the body; a negative share sends nothing at all."""
    hold_s: float = 0.0
    """Say nothing for so long, or until the client leaves."""
    sent: Callable[[bool], None] = lambda whole: None
    """Told whether the whole reply was written while the client was there."""


Handler = Callable[[Incoming], Awaitable[Outgoing]]


def as_json(value: Any, status: int = 200, **more: Any) -> Outgoing:
    """Return a reply whose body is `value` as JSON."""
    return Outgoing(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(), status, **more)


async def serve(handler: Handler, port: int = 0) -> asyncio.Server:
    """Return a server that listens on loopback; its port is `server.sockets[0].getsockname()[1]`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while await _exchange(handler, reader, writer):
                pass
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    return await asyncio.start_server(connected, "127.0.0.1", port, limit=MAX_HEAD, backlog=2_048)


async def _exchange(handler: Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Read one request and write its reply; return whether the connection lives on."""
    incoming = await _read(reader)
    try:
        outgoing = await handler(incoming)
    except Exception:
        # A mistake of this server: the test that met it should see it.
        outgoing = Outgoing(traceback.format_exc().encode(), 500, content_type="text/plain")
    whole = False
    try:
        whole = await _write(outgoing, reader, writer)
    finally:
        outgoing.sent(whole)
    return whole and incoming.headers.get("connection", "").lower() != "close"


async def _read(reader: asyncio.StreamReader) -> Incoming:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head[:-4].split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "chunked" in headers.get("transfer-encoding", ""):
        body = await _chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    path, _, query = target.partition("?")
    return Incoming(method, unquote(path), dict(parse_qsl(query)), headers, body)


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(parts)


async def _write(outgoing: Outgoing, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Write the reply as it asks to be; return whether it went out whole."""
    await _hold(outgoing.hold_s, reader)
    if reader.at_eof() or (outgoing.cut_at is not None and outgoing.cut_at < 0):
        writer.transport.abort()
        return False
    if outgoing.drip_s is not None:
        await _drip(outgoing, outgoing.drip_s, reader, writer)
        return not reader.at_eof()
    writer.write(_head(outgoing, f"content-length: {len(outgoing.body)}"))
    if outgoing.cut_at is not None:
        writer.write(outgoing.body[: int(len(outgoing.body) * outgoing.cut_at)])
        await writer.drain()
        writer.close()
        return False
    writer.write(outgoing.body)
    await writer.drain()
    return True


async def _hold(seconds: float, reader: asyncio.StreamReader) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    while loop.time() < until and not reader.at_eof():
        await asyncio.sleep(min(0.02, seconds))


async def _drip(outgoing: Outgoing, seconds: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_head(outgoing, "transfer-encoding: chunked"))
    count = max(1, min(len(outgoing.body), 50))
    step = -(-len(outgoing.body) // count)
    for at in range(0, len(outgoing.body), step):
        part = outgoing.body[at : at + step]
        writer.write(b"%x\r\n%s\r\n" % (len(part), part))
        await writer.drain()
        await _hold(seconds / count, reader)
        if reader.at_eof():
            return
    writer.write(b"0\r\n\r\n")
    await writer.drain()


def _head(outgoing: Outgoing, length: str) -> bytes:
    lines = [f"HTTP/1.1 {outgoing.status} {REASONS.get(outgoing.status, 'Status')}"]
    lines += [f"content-type: {outgoing.content_type}", length]
    lines += [f"{name}: {value}" for name, value in outgoing.headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
