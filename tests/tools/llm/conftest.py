"""One server for all tests of clients, and clients for both providers on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from language_model_server import Running, serving

from exegete.tools.llm import Budget, Limits, Message, Request, load_prices, open_client, schema_text
from exegete.tools.llm.contract import Journal
from exegete.tools.llm.journaled import JournaledClient

PRICES = {f"{provider}:{model}": {"input": 1.0, "cached": 0.1, "cache_write": 1.25, "output": 10.0}
          for provider in ("openai", "anthropic") for model in ("model", "other")}  # fmt: skip
SCHEMA = schema_text(
    {
        "type": "object",
        "properties": {"verdicts": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 1}},
        "required": ["verdicts"],
        "additionalProperties": False,
    }
)
Opening = Callable[..., JournaledClient]


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Running) -> Running:
    running.reset()
    running.behave()
    return running


@pytest.fixture(params=["openai", "anthropic"])
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spec_at(server: Running, provider: str, model: str = "model") -> str:
    return server.spec(provider, model)


@pytest.fixture
def opened(server: Running, provider: str) -> Opening:
    def opening(journal: Journal, budget: Budget | None = None, model: str = "model", **limits: Any) -> JournaledClient:
        client = open_client(
            spec_at(server, provider, model),
            journal=journal,
            budget=budget,
            prices=load_prices(own=PRICES),
            limits=Limits(**limits),
        )
        assert isinstance(client, JournaledClient)
        return client

    return opening


def question(text: str = "Three verdicts, please.", schema: str | None = SCHEMA, **options: Any) -> Request:
    return Request((Message("system", "You judge."), Message("user", text)), schema, **options)
