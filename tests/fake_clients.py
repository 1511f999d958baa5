"""Clients for tests of evaluators: they answer with a function of the request and keep what they were asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from exegete.tools.llm import Reply, Request, TokenLogprob


class FakeClient:
    """Answers `answer(last message, request)`: a Reply, or a value that becomes the JSON of one."""

    name = "fake:model"

    def __init__(self, answer: Callable[[str, Request], Any]) -> None:
        self.answer = answer
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Reply:
        self.asked.append(request)
        answer = self.answer(request.messages[-1].text, request)
        return answer if isinstance(answer, Reply) else ok(answer)

    async def close(self) -> None:
        pass


def ok(value: Any, logprobs: tuple[TokenLogprob, ...] | None = None) -> Reply:
    """Return an answered reply that holds `value`."""
    return Reply("ok", json.dumps(value), value, logprobs)
