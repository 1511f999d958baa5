"""Limits of whole runs: budgets that hold to the last call, and what the models of one server share."""

from __future__ import annotations

from pathlib import Path

import pytest
from budgeted import budgeted
from planted_store import planted_file, planted_store

from exegete.agent.config import ModelsConfig
from exegete.agent.models import Models, budget_of
from exegete.tools.llm import MemoryJournal

SEEDS = (5, 2, 7)


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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    return planted_store(planted_file(folder, 24, 4), folder / "store")


# Cheap enough to finish with the larger budget; too dear for it; interrupted before the budget is used up.
@pytest.mark.parametrize("seed", SEEDS)
def test_a_whole_run_keeps_to_its_budget_and_goes_on_with_a_larger_one(
    seed: int, template: Path, tmp_path: Path
) -> None:
    found = budgeted(seed, template, tmp_path)
    assert found.complaints(1.0) == []
    # The budget had ended it, and by as much as it was raised more was asked.
    assert found.exits[-2] == 2 and found.usd[-1] > found.usd[-2]
    assert found.interrupted is (seed == SEEDS[-1])
