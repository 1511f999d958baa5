"""Start the server in a process of its own, speak to its control endpoint, and stop it, always."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exegete.tools.prompting import line, window_line


class Running:
    """A server that runs. `openai_url` and `anthropic_url` are the `base_url` of the two SDKs."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.openai_url = f"http://127.0.0.1:{port}/v1"
        self.anthropic_url = f"http://127.0.0.1:{port}"

    def spec(self, provider: str, model: str) -> str:
        """Return a model of this server as users name it: `openai:MODEL@URL`, `anthropic-batch:MODEL@URL`, …"""
        url = self.anthropic_url if provider.startswith("anthropic") else self.openai_url
        return f"{provider}:{model}@{url}"

    def behave(self, model: str = "*", **behaviour: Any) -> None:
        """Set how the server treats a model from now on (fields of `Behaviour`; faults as dictionaries); `*` is any model.

        What it remembered of that model (script, counts of faults, cached prefixes) begins anew; the log goes on.
        """
        self._post("behaviour", {"model": model, "behaviour": behaviour})

    def counts(self) -> dict[str, Any]:
        """Return what was asked since the last reset, in figures (`Log.counts`)."""
        counts: dict[str, Any] = self._call("GET", "counts")
        return counts

    def log(self, bodies: bool = False) -> list[dict[str, Any]]:
        """Return every request since the last reset (`Entry`)."""
        rows: list[dict[str, Any]] = self._call("GET", f"log?bodies={int(bodies)}")
        return rows

    def reset(self) -> None:
        """Forget everything: behaviours, log, files, batches."""
        self._post("reset", {})

    def reset_log(self) -> None:
        """Forget the log only."""
        self._post("reset_log", {})

    def keep_bodies(self, keep: bool) -> None:
        """Keep the bodies of requests in the log, or not (they take memory under load)."""
        self._post("keep_bodies", {"keep": keep})

    def _post(self, call: str, value: Any) -> None:
        self._call("POST", call, value)

    def _call(self, method: str, call: str, value: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, f"/control/{call}", None if value is None else json.dumps(value))
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(answer["error"])
        return answer


@contextmanager
def serving(**behaviour: Any) -> Iterator[Running]:
    """Run a server in a process of its own; with fields of `Behaviour`, that is how it treats every model."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", __package__ or "language_model_server"]
    started = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        assert started.stdout is not None
        first = started.stdout.readline()
        if not first:
            raise RuntimeError(f"the test server did not start: exit code {started.wait()}")
        running = Running(int(first))
        if behaviour:
            running.behave(**behaviour)
        yield running
    finally:
        started.kill()
        started.wait()
        for stream in (started.stdin, started.stdout):
            if stream is not None:
                stream.close()


def recorded(
    task: str, explanation: str | None, tokens: Sequence[str], marks: Collection[int], applies: bool
) -> Mapping[str, Any]:
    """Return a verdict for `Behaviour.verdicts`, its texts as prompts show them; without explanation it holds for any."""
    shown = None if explanation is None else str(line(explanation))
    return {"task": task, "explanation": shown, "text": str(window_line(tokens, marks)), "applies": applies}
