"""Measure what the language-model layer costs and how it follows a server. Run `python -m benchmarks.language_model_load`.

The test server answers from a process of its own after 50 ms; this process asks it for five verdicts at a time, each
question another one, as a labeling run does.

- `load`: 256 calls in flight, by turns in one process, in four ways. `bare`: the SDK as its documentation has it (`create`,
  one HTTP client with a connection for each call), a worker for each call, bodies made beforehand. `posted`: the same by
  the SDK's `post` through the connections that our client uses, the least that a call through this SDK can cost us.
  `ours`: our client, its journal in memory, twice as many callers as may be in flight, so that pacing has a queue. `kept`:
  the same with the store's journal on the disk. The criterion is our rate by the smaller one of the ideal rate (calls in
  flight by 50 ms) and the SDK's of the same round, and the CPU time of a call (all threads) above the SDK's. Beside it:
  what the server gives to a client that does no more than read and write sockets, and its own CPU time; and what a call
  costs where the SDK returns the same answer at once, which is our layer alone, with little noise.
- `limit`: the server takes all, then 5 requests a second, then all again. Answers take a second there, so that the server
  bounds the rate and not this machine. By the server's log: accepted and refused requests in each second, seconds until
  the rate holds to the limit, and until it is back.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import anthropic
import httpx2
import openai
from anthropic.types import Message
from language_model_server import Running, serving
from openai.types.chat import ChatCompletion

from exegete.evaluators.contract import Item
from exegete.evaluators.model_judge import prompt, verdict_schema
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Client, Limits, MemoryJournal, Request, open_client
from exegete.tools.llm.anthropic_client import AnthropicWire
from exegete.tools.llm.journaled import JournaledClient
from exegete.tools.llm.openai_client import OpenAIWire
from exegete.tools.llm.specs import parse_spec
from exegete.tools.store.journal import StoreJournal

Ask = Callable[[int], Awaitable[None]]
PROVIDERS = ("openai", "anthropic")
ALLOWED = 5.0
"""Requests per second, while the server is short of them."""
SHORT, PLENTY, OVER = 10.0, 30.0, 60.0
"""Seconds at which that begins, ends, and at which no more is asked."""
SLOW = 1.0
"""Seconds that an answer takes then."""


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["load", "limit"], default=["load", "limit"])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=1_500, help="in each round, each way")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=0.05, help="that an answer takes")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {"cores": os.cpu_count(), "load_before": _load()}
    for provider in chosen.providers if "load" in chosen.parts else ():
        with serving(seconds=chosen.seconds) as server:
            server.keep_bodies(False)
            asyncio.run(_into(figures, provider, load(server, provider, chosen)))
    if "limit" in chosen.parts:
        with serving(seconds=SLOW) as server:
            server.keep_bodies(False)
            asyncio.run(_into(figures, "limit", limit(server, chosen.in_flight)))
    print(json.dumps(figures | {"load_after": _load()}, indent=1))


async def _into(figures: dict[str, Any], name: str, part: Awaitable[Any]) -> None:
    figures[name] = await part


def questions(numbers: Iterable[int]) -> list[Request]:
    """Return a question about five windows for each number, as `ModelJudge` asks it."""
    words = " and then the cat that sat on the wall jumped over it to the other side of".split(" ")
    items = [Item(tuple(f" {word}" for word in words[n:] + words[:n])) for n in range(5)]
    explained = Explanation("The name of an animal.")
    schema = verdict_schema(len(items))
    made = []
    for number in numbers:
        numbered = [*items[:-1], Item((*items[-1].tokens, f" {number}"))]
        made.append(prompt("detection", explained, numbered).request(schema=schema, logprobs=True))
    return made


class Ways:
    """The SDK in two ways and our client, on one server, each with its own connections."""

    def __init__(self, server: Running, provider: str, in_flight: int, folder: Path) -> None:
        openai_ = provider == "openai"
        limits = Limits(concurrency=in_flight)
        name = server.spec(provider, "model")
        self.server = server
        self.in_flight = in_flight
        self.path = "/chat/completions" if openai_ else "/v1/messages"
        self.kind: type = ChatCompletion if openai_ else Message
        self.wire = OpenAIWire(parse_spec(name), limits) if openai_ else AnthropicWire(parse_spec(name), limits)
        self.memory = MemoryJournal()
        self.store = StoreJournal(folder / "journal.sqlite")
        self.client = open_client(name, journal=self.memory, limits=limits)
        self.keeping = open_client(name, journal=self.store.of_run("load"), limits=limits)
        sdk: Any = openai if openai_ else anthropic
        pool = httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
        timeout = httpx2.Timeout(limits.total_s, connect=limits.connect_s, pool=None)
        http = sdk.DefaultAsyncHttpxClient(limits=pool)
        made = sdk.AsyncOpenAI if openai_ else sdk.AsyncAnthropic
        self.sdk = made(
            api_key="k", base_url=parse_spec(name).base_url, max_retries=0, timeout=timeout, http_client=http
        )
        self.create = self.sdk.chat.completions.create if openai_ else self.sdk.messages.create

    async def bare(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Ask by the SDK alone; return calls per second and CPU seconds of a call."""
        bodies = [self.wire.body(request) for request in requests]

        async def ask(number: int) -> None:
            assert isinstance(await self.create(**bodies[number]), self.kind)

        return await timed(ask, len(requests), self.in_flight)

    async def posted(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Ask by the SDK's `post` through our connections."""
        sdk: Any = self.wire._client
        bodies = [self.wire.body(request) for request in requests]

        async def ask(number: int) -> None:
            assert isinstance(await sdk.post(self.path, body=bodies[number], cast_to=self.kind), self.kind)

        return await timed(ask, len(requests), self.in_flight)

    async def ours(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Ask by our client with a journal in memory, which forgets between rounds as a disk would."""
        self.memory.replies.clear()
        self.memory.intents.clear()
        return await self._through(self.client, requests)

    async def kept(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Ask by our client with the store's journal."""
        return await self._through(self.keeping, requests)

    async def _through(self, client: Client, requests: Sequence[Request]) -> tuple[float, float]:
        async def ask(number: int) -> None:
            reply = await client.complete(requests[number])
            if reply.status != "ok" or reply.cached:
                raise RuntimeError(f"{reply.status}: {reply.detail}")

        return await timed(ask, len(requests), 2 * self.in_flight)

    async def alone(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Ask by our client over an SDK that returns one real answer at once."""
        limits = Limits(concurrency=self.in_flight)
        spec = parse_spec(self.client.name)
        wire = OpenAIWire(spec, limits) if self.kind is ChatCompletion else AnthropicWire(spec, limits)
        await wire.close()
        instant: Any = _Instant(await self.create(**wire.body(requests[0])))
        wire._client = instant
        client = JournaledClient(wire, journal=MemoryJournal(), budget=None, price=None, limits=limits)
        return await self._through(client, requests)

    async def sockets(self, requests: Sequence[Request]) -> tuple[float, float]:
        """Send the same bodies and read the replies, no more."""
        path = self.path if self.path.startswith("/v1") else f"/v1{self.path}"
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer k\r\nx-api-key: k\r\ncontent-length: "
        bodies = [json.dumps(self.wire.body(request)).encode() for request in requests]
        pool = [await asyncio.open_connection("127.0.0.1", self.server.port) for _ in range(self.in_flight)]

        async def ask(number: int) -> None:
            reader, writer = pool.pop()
            writer.write(f"{head}{len(bodies[number])}\r\n\r\n".encode() + bodies[number])
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            await reader.readexactly(int(answer.split(b"content-length: ")[1].split(b"\r\n")[0]))
            pool.append((reader, writer))

        try:
            return await timed(ask, len(requests), self.in_flight)
        finally:
            for _, writer in pool:
                writer.close()

    async def close(self) -> None:
        """Give the connections back."""
        for opened in (self.sdk, self.wire, self.client, self.keeping):
            await opened.close()
        self.store.close()


class _Instant:
    """An SDK's client that has its answer already."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def post(self, path: str, **options: Any) -> Any:
        """Return the answer."""
        await asyncio.sleep(0)
        return self._answer


async def timed(ask: Ask, count: int, callers: int) -> tuple[float, float]:
    """Have `callers` ask the questions 0 … `count`; return calls per second and CPU seconds of a call."""
    numbers = iter(range(count))

    async def caller() -> None:
        for number in numbers:
            await ask(number)

    begin = time.perf_counter(), time.process_time()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return count / (time.perf_counter() - begin[0]), (time.process_time() - begin[1]) / count


async def load(server: Running, provider: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return rates and CPU times of each way, and ours by the bare one, over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(server, provider, chosen.in_flight, Path(folder))
        figures = await _by_turns(ways, chosen)
        await ways.close()
    return figures


async def _by_turns(ways: Ways, chosen: argparse.Namespace) -> dict[str, Any]:
    asked = {"bare": ways.bare, "posted": ways.posted, "ours": ways.ours, "kept": ways.kept}
    count, taken = chosen.calls, []
    for number in range(chosen.rounds + 1):
        # No question is asked twice of a client; opposite orders by turns.
        requests = questions(range(number * count, (number + 1) * count))
        order = list(asked) if number % 2 else list(asked)[::-1]
        taken.append({way: await asked[way](requests) for way in order})
    alone = [(await ways.alone(questions(range(2_000))))[1] for _ in range(chosen.rounds)]
    before = ways.server.counts()["cpu_s"]
    sockets = await ways.sockets(questions(range(count)))
    server_cpu = ways.server.counts()["cpu_s"] - before
    # The first round opens the connections and is not counted.
    return _table(taken[1:], chosen.in_flight / chosen.seconds) | {
        "calls": count,
        "rounds": chosen.rounds,
        "layer_alone_cpu_ms": _spread([1e3 * seconds for seconds in alone]),
        "server_to_bare_sockets_per_s": round(sockets[0]),
        "server_cpu_ms": round(1e3 * server_cpu / count, 3),
    }


def _table(taken: Sequence[dict[str, tuple[float, float]]], ideal: float) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "ideal_per_s": round(ideal),
        "per_s": {way: _spread([one[way][0] for one in taken], 0) for way in taken[0]},
        "cpu_ms": {way: _spread([1e3 * one[way][1] for one in taken]) for way in taken[0]},
    }
    for own, way in itertools.product(("ours", "kept"), ("bare", "posted")):
        ratios = [one[own][0] / min(ideal, one[way][0]) for one in taken]
        more = [1e3 * (one[own][1] - one[way][1]) for one in taken]
        figures |= {f"{own}_rate_by_{way}": _spread(ratios), f"{own}_cpu_ms_above_{way}": _spread(more)}
    return figures


async def limit(server: Running, in_flight: int) -> dict[str, Any]:
    """Return how our client follows a server that allows 5 requests a second from second 10 to second 30."""
    client = open_client(
        f"openai:model@{server.openai_url}", journal=MemoryJournal(), limits=Limits(concurrency=in_flight)
    )
    begin = time.perf_counter()
    statuses: Counter[str] = Counter()
    longest = 0.0

    async def caller(number: int) -> None:
        nonlocal longest
        while time.perf_counter() - begin < OVER:
            (request,) = questions([number])
            number += 2 * in_flight
            reply = await client.complete(request)
            statuses[reply.status] += 1
            longest = max(longest, reply.seconds)

    async def behave(after: float, **behaviour: Any) -> None:
        await asyncio.sleep(max(0.0, begin + after - time.perf_counter()))
        await asyncio.to_thread(server.behave, seconds=SLOW, **behaviour)

    changes = (behave(SHORT, requests_per_s=ALLOWED), behave(PLENTY))
    await asyncio.gather(*map(caller, range(2 * in_flight)), *changes)
    await client.close()
    return _followed(server.log()) | {"replies": dict(statuses), "longest_call_s": round(longest, 1)}


def _followed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    questions_at = [(row["at"], row["status"]) for row in rows if row["route"] == "completions"]
    start = questions_at[0][0]
    accepted = [at - start for at, status in questions_at if status == 200]
    refused = [at - start for at, status in questions_at if status == 429]
    former = _per_s(accepted, SHORT / 2, SHORT)
    held = (t for t in _quarters(SHORT, PLENTY - 2) if abs(_per_s(accepted, t, t + 2) - ALLOWED) <= 1)
    back = (t for t in _quarters(PLENTY, accepted[-1] - 2) if _per_s(accepted, t, t + 2) >= 0.9 * former)
    return {
        "former_per_s": round(former, 1),
        "accepted_by_second": _by_second(accepted),
        "refused_by_second": _by_second(refused),
        "seconds_until_within_5±1_per_s": next((t - SHORT for t in held), None),
        "accepted_per_s_while_short": round(_per_s(accepted, SHORT + 3, PLENTY), 2),
        "refused_per_s_while_short": round(_per_s(refused, SHORT + 3, PLENTY), 2),
        "seconds_until_90_percent_of_the_former_rate": next((t - PLENTY for t in back), None),
    }


def _quarters(begin: float, end: float) -> list[float]:
    return [quarter / 4 for quarter in range(int(4 * begin), int(4 * end))]


def _per_s(times: Sequence[float], begin: float, end: float) -> float:
    return sum(begin <= at < end for at in times) / (end - begin)


def _by_second(times: Sequence[float]) -> list[int]:
    counts = Counter(int(at) for at in times)
    return [counts[second] for second in range(max(counts, default=-1) + 1)]


def _spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    named = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def _load() -> list[float]:
    return [round(value, 1) for value in os.getloadavg()]


if __name__ == "__main__":
    main()
