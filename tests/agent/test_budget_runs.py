"""Limits of whole runs: what the models of one server share."""

from __future__ import annotations

from exegete.agent.config import ModelsConfig
from exegete.agent.models import Models, budget_of
from exegete.tools.llm import MemoryJournal


def test_models_of_one_server_share_an_allowance() -> None:
    models = Models(ModelsConfig(requests_per_minute=60), MemoryJournal, None)
    here, there = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"

    def allowance(spec: str) -> object:
        client = models.client(spec)._client  # type: ignore[attr-defined]
        return client.pacer._allowance

    first = allowance(f"openai:a@{here}")
    assert allowance(f"openai:b@{here}") is first
    assert allowance(f"openai:a@{there}") is not first
    assert allowance(f"anthropic:a@{here}") is not first


def test_budgets_of_a_configuration() -> None:
    both = budget_of(ModelsConfig(budget_usd=2.0, budget_tokens=500))
    assert both is not None and (both.max_usd, both.max_tokens) == (2.0, 500)
    tokens = budget_of(ModelsConfig(budget_usd=2.0, no_budget=True, budget_tokens=500))
    assert tokens is not None and (tokens.max_usd, tokens.max_tokens) == (float("inf"), 500)
    assert budget_of(ModelsConfig(budget_usd=2.0, no_budget=True)) is None
