"""SIGKILL throughout a run with language models: the tables of an undisturbed run, and every dollar accounted for."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashing import exegete, start
from language_model_server import Running, serving
from planted_store import planted_file, planted_store, tables

import exegete as package

KILLS, IN_FLIGHT = 5, 16
PRICE_USD = 10.0
"""Of a million tokens."""


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(answer="oracle", otherwise="never", seconds=0.02, rate=0.1) as running:
        yield running


def arguments(server: Running, store: Path) -> list[str]:
    model = f"openai:judge@{server.openai_url}"
    prices = store.parent / "prices.toml"
    prices.write_text(f'["{model}"]\ninput = {PRICE_USD}\noutput = {PRICE_USD}\n')
    steps = {
        "label.batch": 4, "label.concurrency": 6, "label.publish_seconds": 0.2, "label.floors": 8,
        "label.explainer_options.max_tokens": 100, "label.judge_options.max_tokens": 100,
        "models.concurrency": IN_FLIGHT, "models.prices": prices, "models.budget_usd": 100,
    }  # fmt: skip
    return ["label", "--store", str(store), "--model", model, *(f"--set={key}={value}" for key, value in steps.items())]


def costs(store: Path) -> dict[str, Any]:
    with package.connect(store) as connection:
        found = connection.execute("FROM costs WHERE calls > 0").fetchdf().to_dict("records")
    assert len(found) == 1
    return dict(found[0])


@pytest.mark.slow
def test_kills_throughout_a_run_pay_for_nothing_twice(server: Running, tmp_path: Path) -> None:
    evidence = planted_file(tmp_path, 20)
    undisturbed, store = (planted_store(evidence, tmp_path / name) for name in ("undisturbed", "store"))
    log, chance = tmp_path / "log", random.Random(0)
    assert exegete(arguments(server, undisturbed), log) == 0, log.read_text()
    whole = server.counts()["requests"]
    assert whole == costs(undisturbed)["answered"] > 20 * KILLS
    server.reset_log()

    for kill in range(1, KILLS + 1):
        process = start(arguments(server, store), log)
        while server.counts()["requests"] < whole * kill / (KILLS + 1):
            assert process.is_alive(), log.read_text()
        time.sleep(chance.uniform(0, 0.05))
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended by itself"
    assert exegete(arguments(server, store), log) == 0, log.read_text()

    assert tables(store) == tables(undisturbed)
    paid, should = costs(store), costs(undisturbed)
    counts = server.counts()
    assert (paid["answered"], paid["failed"], paid["in_flight"]) == (whole, 0, 0) and counts["questions"] == whole
    # What was answered and written down is never sent again: whatever was sent more often is unknown in the store.
    assert counts["requests"] - whole <= paid["unknown"] <= KILLS * IN_FLIGHT
    assert paid["unknown"] > 0 and counts["asked_again"] <= paid["unknown"]
    # The provider's account: each question once, and what was sent when a kill hit, at no more than its worst case.
    assert paid["usd"] == pytest.approx(should["usd"]) and paid["unknown_worst_usd"] > 0
    billed = counts["tokens"] * PRICE_USD * 1e-6
    assert paid["usd"] <= billed + 1e-9 and billed <= paid["usd"] + paid["unknown_worst_usd"] + 1e-9
