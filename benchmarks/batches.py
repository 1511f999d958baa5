"""Measure batches at size, through two kills. Run `python -m benchmarks.batches`.

120,000 calls through the batch client, for each provider, with the store's journal on the disk and the test server in a
process of its own. Three processes after one another ask all of them; the first two end by SIGKILL:

- `made`: killed when the first batch has been made and its id has not been written down yet;
- `read`: takes up what there is, and is killed when so many replies have been written down;
- `done`: takes up the rest, and ends by itself.

By the server's own log: requests of batches that it was asked (`lines`), different questions, those asked again after they
had been answered, batches made. The criterion: lines = questions = answered = calls, none asked again, every reply ok.
`peak_mib` is the largest resident memory of each process; `requests`, of one that makes the requests and a waiting task for
each, and no client; `client`, of one that opens client and store for a single call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from language_model_server import Running, serving

from exegete.tools.llm import BatchLimits, Message, Reply, Request, open_client, schema_text
from exegete.tools.store import Store
from exegete.tools.store.journal import RunJournal

PROVIDERS = ("openai", "anthropic")
SCHEMA = schema_text(
    {
        "type": "object",
        "properties": {"verdicts": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 1}},
        "required": ["verdicts"],
        "additionalProperties": False,
    }
)
WORDS = "and then the cat that sat on the wall jumped over it to the other side of "


def main() -> None:
    """Print one table and one JSON object; or, as a process of its own, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=120_000)
    parser.add_argument("--prompt-bytes", type=int, default=1_000)
    parser.add_argument("--read", type=int, default=30_000, help="replies after which the second process is killed")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--scratch", type=Path, default=None, help="folder for stores and request files")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        print(json.dumps(dict(ask(chosen))))
        return
    figures = {provider: measure(provider, chosen) for provider in chosen.providers}
    for provider, found in figures.items():
        for part, one in found["processes"].items():
            print(f"{provider:10} {part:9} {one['seconds']:8.1f} s  {one['peak_mib']:8.0f} MiB  {one['end']}")
        print(f"{provider:10} {'server':9} {found['server']}")
    print(json.dumps(figures | {"cores": os.cpu_count()}, indent=1))


def measure(provider: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, memory and end of each process, and the server's account."""
    with tempfile.TemporaryDirectory(dir=chosen.scratch) as folder, serving() as server:
        server.behave()
        server.keep_bodies(False)
        spec = server.spec(f"{provider}-batch", "model")
        processes = {part: _process(part, spec, Path(folder), chosen) for part in ("requests", "client")}
        server.reset_log()
        for part in ("made", "read", "done"):
            processes[part] = _process(part, spec, Path(folder), chosen) | {"lines_so_far": _account(server)["lines"]}
        found = _account(server)
    expected = {"lines": chosen.calls, "questions": chosen.calls, "answered": chosen.calls, "asked_again": 0}
    statuses = processes["done"]["end"]
    held = all(found[name] == value for name, value in expected.items()) and statuses == f"{{'ok': {chosen.calls}}}"
    return {"processes": processes, "server": found, "criterion_met": held}


def ask(chosen: argparse.Namespace) -> Mapping[str, int]:
    """Ask every call; return how many replies have which status. Ends by SIGKILL where `--part` says so."""
    requests = [
        _request(number, chosen.prompt_bytes) for number in range(1 if chosen.part == "client" else chosen.calls)
    ]
    if chosen.part == "requests":
        asyncio.run(_wait_for_nothing(requests))
        return {}
    folder = chosen.scratch / ("single" if chosen.part == "client" else "store")
    with Store.create_or_open(folder).writer() as writer:
        journal = _Watched(writer.journal.of_run("benchmark"), chosen.part, chosen.read)
        return asyncio.run(_ask(chosen, journal, requests))


async def _ask(chosen: argparse.Namespace, journal: _Watched, requests: list[Request]) -> Mapping[str, int]:
    batches = BatchLimits(linger_s=1.0, poll_s=0.5, poll_max_s=2.0, settle_s=2.0, scratch=chosen.scratch)
    client = open_client(chosen.spec, journal=journal, batches=batches)
    try:
        replies = await asyncio.gather(*map(client.complete, requests))
        return Counter(reply.status for reply in replies)
    finally:
        await client.close()


async def _wait_for_nothing(requests: list[Request]) -> None:
    async def wait(request: Request, until: asyncio.Event) -> Request:
        await until.wait()
        return request

    until = asyncio.Event()
    tasks = [asyncio.ensure_future(wait(request, until)) for request in requests]
    await asyncio.sleep(0)
    until.set()
    await asyncio.gather(*tasks)


class _Watched:
    """The store's journal in a process that ends at a given entry."""

    def __init__(self, journal: RunJournal, part: str, replies: int) -> None:
        self.known = journal.known
        self.intend = journal.intend
        self.submitting = journal.submitting
        self.landed = journal.landed
        self.submissions = journal.submissions
        self._journal = journal
        self._part = part
        self._left = replies

    async def submitted(self, nonce: str, batch: str) -> None:
        if self._part == "made":
            os.kill(os.getpid(), signal.SIGKILL)
        await self._journal.submitted(nonce, batch)

    async def answered(self, call: str, reply: Reply) -> None:
        await self._journal.answered(call, reply)
        self._left -= 1
        if self._part == "read" and self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _request(number: int, size: int) -> Request:
    text = f"Window {number}: {WORDS * (size // len(WORDS))}"
    return Request((Message("system", "Does the explanation apply?"), Message("user", text)), SCHEMA, max_tokens=64)


def _process(part: str, spec: str, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run one process to its end."""
    command = [sys.executable, "-m", "benchmarks.batches", "--part", part, "--spec", spec, "--scratch", str(folder)]
    sizes = {"--calls": chosen.calls, "--prompt-bytes": chosen.prompt_bytes, "--read": chosen.read}
    command += [str(word) for pair in sizes.items() for word in pair]
    began = time.monotonic()
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    said = started.stdout.read()
    _, status, used = os.wait4(started.pid, 0)
    seconds = time.monotonic() - began
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
    if not ended and os.WEXITSTATUS(status):
        raise RuntimeError(f"the process {part!r} failed")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mib": round(used.ru_maxrss / 1024),
        "end": ended or str(json.loads(said)),
    }


def _account(server: Running) -> dict[str, int]:
    counts = server.counts()
    made = counts["by_route"].get("batches", 0)
    lines = counts["by_route"].get("batch_lines", 0)
    return {"batches": made, "lines": lines} | {name: counts[name] for name in ("questions", "answered", "asked_again")}


if __name__ == "__main__":
    main()
