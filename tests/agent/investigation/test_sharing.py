"""Whole investigations, through the function that users call, by a scripted language model, over one model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Budget, Decision, Metric, Question, View
from exegete.agent.investigation.investigate import ainvestigate
from exegete.agent.investigation.record import InvestigationRecord
from exegete.agent.investigation.shared_model import Sharing


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def script(latent: int) -> list[dict[str, Any]]:
    """Two experiments at the same time, a claim, the end."""
    tries = {"hypothesis": "H1", "because": "it may carry it", "high": 0.0}
    first = call("hypothesis", statement=f"Latent {latent} carries it.")
    both = [call("ablate", latents=[latent], **tries), call("steer", latents=[latent], **tries)]
    claim = call("claim", statement="It does.", kind="causal", latents=[latent], experiments=["E1"], hypothesis="H1")
    return [{"calls": [first]}, {"calls": both}, {"calls": [claim]}, {"calls": [call("finish", answer="That one.")]}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "none")


class Broken:
    """An investigator with a bug."""

    name = "broken"

    async def frame(self, question: Question) -> Metric:
        return Metric("log_odds")

    async def decide(self, view: View) -> Decision:
        raise RuntimeError("a bug")


async def asked(bench: Bench, sharing: Sharing, investigator: Any, out: Path) -> InvestigationRecord:
    found = await ainvestigate(
        "Why DESC?", bench.cases, Metric("log_odds"), investigator, sharing=sharing, out=out, no_budget=True,
        texts=bench.texts[:20], controls=2, budget=Budget(steps=6),
    )  # fmt: skip
    return found.record


def figures(record: InvestigationRecord) -> list[float]:
    """Return every figure of a record."""
    headlines = [one.headline for one in record.experiments] + [one.effect for one in record.verdicts]
    return [
        value
        for one in headlines
        if one is not None
        for value in (one.value, one.low, one.high, one.control_value)
        if value is not None
    ]


def test_nothing_depends_on_what_goes_on_beside_it_nor_on_whether_that_fails(
    server: Running, bench: Bench, tmp_path: Path
) -> None:
    specs = {latent: server.spec("openai", f"latent-{latent}") for latent in (954, 12)}

    def scripted() -> None:
        for latent in specs:
            server.behave(f"latent-{latent}", answer="scripted", replies=script(latent))

    async def together(sharing: Sharing) -> list[Any]:
        every = [*specs.values(), Broken()]
        return await asyncio.gather(
            *(asked(bench, sharing, one, tmp_path / "together") for one in every), return_exceptions=True
        )

    scripted()
    with Sharing(bench.live) as sharing:
        *found, failed = asyncio.run(together(sharing))
        batches = sharing.statistics.batches
    assert isinstance(failed, RuntimeError)
    scripted()
    alone = 0
    for record, spec in zip(found, specs.values(), strict=True):
        with Sharing(bench.live) as sharing:
            expected = asyncio.run(asked(bench, sharing, spec, tmp_path / "alone"))
            alone += sharing.statistics.batches
        assert (record.status, record.answer) == ("finished", "That one.")
        assert len(figures(record)) >= 11 and figures(record) == pytest.approx(figures(expected), rel=1e-3, abs=1e-3)
        assert [one.status for one in record.verdicts] == [one.status for one in expected.verdicts]
        assert (record.spent.steps, record.spent.passes) == (expected.spent.steps, expected.spent.passes)
    assert batches < alone
