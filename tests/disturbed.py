"""Whole labeling runs on a server that misbehaves: what was asked, and whether what is stored says so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running
from planted_store import planted_file, planted_store, tables

import exegete
from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.run import Outcome, run

ORACLE: dict[str, Any] = {"answer": "oracle", "otherwise": "never"}
PRICE_USD = 10.0
"""Of a million tokens."""
ENDURING = {"models.timeout_s": 60, "models.patience_s": 120}
"""Limits that no call reaches, however busy the machine is."""


@dataclass(frozen=True)
class Bench:
    """A server, the evidence of planted latents, and a folder for stores and prices."""

    server: Running
    folder: Path
    evidence: Path
    provider: str = "openai"

    @property
    def model(self) -> str:
        """The model that explains and judges."""
        return self.server.spec(self.provider, "judge")

    def behave(self, *faults: dict[str, Any]) -> None:
        """Have the server suffer these faults from now on, and no others."""
        self.server.behave("judge", **ORACLE, faults=list(faults))

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the configuration of a run as dotted keys."""
        prices = self.folder / "prices.toml"
        prices.write_text(f'["{self.model}"]\ninput = {PRICE_USD}\noutput = {PRICE_USD}\n')
        own = {"models.explainer": self.model, "models.judge": self.model, "models.prices": str(prices)}
        short = {"label.explainer_options.max_tokens": 100, "label.judge_options.max_tokens": 100, "label.floors": 4}
        return {**own, **short, "models.budget_usd": 100.0, "models.attempts": 1, **ENDURING, **more}

    def store(self, name: str) -> Path:
        """Return the folder of a new store that holds the evidence."""
        return planted_store(self.evidence, self.folder / name)

    def label(self, store: Path, **more: Any) -> Outcome:
        """Label the latents of a store, or go on."""
        return run(load_config(None, (), self.settings(store=str(store), **more)), Lines(every_s=1e9))


@dataclass(frozen=True)
class Undisturbed:
    """A run on a server without faults."""

    tables: dict[str, list[Any]]
    questions: frozenset[str]
    usd: float


def bench_of(
    server: Running, folder: Path, latents: int, provider: str = "openai", windows_per_split: int = 4
) -> Bench:
    """Return a bench with so many planted latents; with four windows a split, each score takes one call."""
    return Bench(server, folder, planted_file(folder, latents, windows_per_split), provider)


def undisturbed(bench: Bench, **more: Any) -> Undisturbed:
    """Label a store without faults."""
    bench.server.reset_log()
    bench.behave()
    store = bench.store("undisturbed")
    outcome = bench.label(store, **more)
    assert outcome.finished and not any(outcome.missing.values())
    entries = bench.server.log()
    assert all(entry["answered"] for entry in entries)
    return Undisturbed(tables(store), frozenset(entry["question"] for entry in entries), account_usd(bench.server))


def rows(store: Path, query: str) -> list[Any]:
    """Return what readers of a store get."""
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


def struck(entries: Sequence[dict[str, Any]]) -> dict[str, set[str]]:
    """Return fault → questions that suffered it."""
    found: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry["fault"]:
            found[entry["fault"]].add(entry["question"])
    return dict(found)


def account_usd(server: Running) -> float:
    """Return what the server would bill."""
    return float(server.counts()["tokens"] * PRICE_USD * 1e-6)


def check_account(bench: Bench, store: Path) -> None:
    """Stored ≤ billed ≤ stored + the worst case of what is unknown; as many calls in the account as were sent."""
    ((usd, worst_usd, unknown),) = rows(store, "SELECT sum(usd), sum(unknown_worst_usd), sum(unknown) FROM costs")
    billed = account_usd(bench.server)
    assert usd <= billed + 1e-9 and billed <= usd + worst_usd + 1e-9
    assert (worst_usd > 0) is (unknown > 0)
    ((sent,),) = rows(store, "SELECT sum(attempts) FROM calls")
    assert sent == bench.server.counts()["requests"]


def check_rows(store: Path, latents: int) -> None:
    """Every latent has a row, every failure a status, and every score rests on the verdicts that were given."""
    assert rows(store, "SELECT count(outcome), count(*) FROM latents") == [(latents, latents)]
    unnamed = (
        "SELECT latent FROM latents WHERE outcome <> 'labeled' AND (outcome <> 'no_explanation' OR detail IS NULL)"
    )
    assert rows(store, unnamed) == []
    assert rows(store, "SELECT * FROM verdicts WHERE (status = 'ok') <> (applies IS NOT NULL)") == []
    check_scores(store)


def check_scores(store: Path) -> None:
    """The balanced accuracy, n and failures of each explanation are those of its stored verdicts."""
    key = "latent, explanation_id, evaluator, baseline"
    judged: dict[Any, list[tuple[bool, bool | None]]] = defaultdict(list)
    for *which, truth, applies in rows(store, f"SELECT {key}, truth, applies FROM verdicts"):
        judged[tuple(which)].append((truth, applies))
    scored = rows(store, f"SELECT {key}, value, n, failures FROM scores WHERE metric = 'balanced_accuracy'")
    assert len(scored) == len(judged) > 0
    for *which, value, n, failures in scored:
        verdicts = judged[tuple(which)]
        given = [(truth, applies) for truth, applies in verdicts if applies is not None]
        assert (n, failures) == (len(given), len(verdicts) - len(given))
        right = {side: [a is t for t, a in given if t is side] for side in (True, False)}
        if right[True] and right[False]:
            assert value == pytest.approx(sum(sum(r) / len(r) for r in right.values()) / 2)
        else:
            assert value is None
