"""Whole investigations by a scripted language model on both wires: the real graph, tools, checks and report, the bundled subject."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Budget, Case, Metric, Question
from exegete.agent.investigation.graph import investigated
from exegete.agent.investigation.inquiry import Inquiry, Interrupted
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.model import ModelInvestigator
from exegete.agent.investigation.record import InvestigationRecord
from exegete.agent.investigation.reporting import write_report
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.investigation.toolbelt import Toolbelt
from exegete.agent.investigation.verifying import verify
from exegete.tools.llm import Limits, load_prices, open_client
from exegete.tools.store import Store
from exegete.tools.store.journal import StoreJournal

SETS = 40
"""Random sets beside each claim: enough for two."""
BELIEVED = 954
"""A latent that holds the behaviour up, as the tests of verifying show."""


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def ablate(latents: list[int], hypothesis: str = "H1", **bounds: float) -> dict[str, Any]:
    return call("ablate", hypothesis=hypothesis, because="it fires on the word", latents=latents, **bounds)


LOOK = [
    call("hypothesis", statement=f"Latent {BELIEVED} carries the direction."),
    call("hypothesis", statement=f"Latent {BELIEVED} has no part in it."),
    call("prompts", count=2),
    call("activations", prompts=[0]),
]
TRY = [
    ablate([BELIEVED], high=-0.1),
    {"name": "ablate", "arguments": '{"latents": [954'},
    ablate([10**6], high=0.0),
    call("ablate", latents=[3]),
    call("ablaet", latents=[3]),
    call("windows", latent=BELIEVED, split="test"),
]
CLAIMS = [
    call("update", hypothesis="H1", status="supported"),
    call("claim", statement="It carries it.", kind="causal", latents=[BELIEVED], experiments=["E1"], hypothesis="H1"),
    call("claim", statement="Latent 3 does too.", kind="causal", latents=[3]),
    call("finish", answer=f"Latent {BELIEVED} carries it."),
]
SCRIPT: list[Any] = [{"calls": LOOK, "text": "I look."}, {"calls": TRY}, "Let me think.", {"calls": CLAIMS}]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Running) -> Running:
    running.reset()
    running.behave(answer="scripted", replies=SCRIPT)
    return running


class Work:
    """One investigation in a folder, which can be stopped and taken up by new objects."""

    def __init__(self, server: Running, provider: str, bench: Bench, held_out: tuple[Case, ...], folder: Path) -> None:
        self.server = server
        self.spec = server.spec(provider, "model")
        self.bench = replace(bench, cases=bench.cases[:8], controls=2)
        self.held_out = held_out
        self.folder = folder

    def run(self, stopping: Callable[[], bool] = lambda: False, budget: Budget | None = None) -> InvestigationRecord:
        budget = budget or Budget(steps=10)
        question = Question("Why DESC?", self.bench.cases, Metric("log_odds"), budget=budget)
        journal = StoreJournal(self.folder / "calls.sqlite")
        try:
            with Ledger(self.folder) as ledger, Sharing(self.bench.live) as sharing:
                ledger.begin(self._record(budget))
                bench = replace(self.bench, live=sharing.live())
                asyncio.run(self._investigated(ledger, journal, question, bench, stopping))
                return ledger.record()
        finally:
            journal.close()

    async def _investigated(
        self, ledger: Ledger, journal: StoreJournal, question: Question, bench: Bench, stopping: Callable[[], bool]
    ) -> None:
        client = open_client(self.spec, journal=journal.of_run("r"), prices=load_prices(), limits=Limits())
        inquiry = Inquiry(
            ledger=ledger,
            investigator=ModelInvestigator(client, Toolbelt(bench, recall=lambda _: None).schemas("plain")),
            question=question,
            held_out=self.held_out,
            open_bench=lambda metric: bench,
            open_toolbelt=lambda bench: Toolbelt(bench, recall=inquiry.recall),
            verifier=lambda bench, cases, claims, known: verify(bench, cases, claims, known, controls=SETS),
            reporter=write_report,
            stopping=stopping,
        )
        try:
            await investigated(inquiry)
        finally:
            inquiry.close()
            await client.close()

    def _record(self, budget: Budget) -> InvestigationRecord:
        return InvestigationRecord(
            id=self.folder.name, question="Why DESC?", investigator=self.spec, origin=self.bench.live.origin,
            cases=self.bench.cases, held_out=self.held_out, metric=self.bench.metric, seed=self.bench.seed,
            code_version="1", started_at="2026-01-01T00:00:00", status="interrupted", budget=budget, controls=2,
        )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "why"
    made.mkdir()
    return made


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_whole_investigation(
    server: Running, provider: str, bench: Bench, held_out: tuple[Case, ...], folder: Path
) -> None:
    record = Work(server, provider, bench, held_out, folder).run()
    assert (record.status, record.stopped, record.answer) == ("finished", "", "Latent 954 carries it.")
    assert [row["status"] for row in server.log()] == [200] * 4
    assert [(one.id, one.status, one.predicted) for one in record.experiments[:1]] == [("E1", "ok", True)]
    assert [one.status for one in record.experiments[1:]] == ["error"]  # No latent 1,000,000.
    assert [(one.id, one.status) for one in record.hypotheses] == [("H1", "supported"), ("H2", "open")]
    true, bare = record.verdicts
    assert true.status == "verified" and bare.status == "unverified", (true.why, bare.why)
    page = (folder / "report.html").read_text()
    assert "It carries it." in page and "unverified" in page
    _check_what_it_was_told(server)
    _check_held_out_prompts_are_in_no_request(server, bench, held_out)


def _check_what_it_was_told(server: Running) -> None:
    bodies = [row["body"] for row in server.log(bodies=True)]
    told = str(bodies[-1]["messages"])
    words = (
        *("E1: the headline figure was as predicted.", "they are no JSON", "there is no latent 1000000"),
        *("say before it runs", "there is no tool 'ablaet'", "Did you mean 'ablate'?", "called no tool"),
    )
    for word in words:
        assert word in told or word.replace("'", "\\'") in told, word
    assert all(len(body["tools"]) == len(bodies[0]["tools"]) > 20 for body in bodies)


def test_what_may_not_be_asked_is_refused_and_nothing_crashes(
    server: Running, bench: Bench, held_out: tuple[Case, ...], folder: Path
) -> None:
    stolen = folder / "stolen.csv"
    queries = (
        "INSERT INTO latents VALUES (1)",
        f"COPY (SELECT 1) TO '{stolen}'",
        f"ATTACH '{folder / 'other.duckdb'}'",
        "SELECT * FROM read_csv('/etc/passwd')",
    )
    asked = [call("sql", query=query) for query in queries]
    server.behave(answer="scripted", replies=[{"calls": asked}, {"calls": [call("finish", answer="Nothing.")]}])
    store = Store.create_or_open(folder / "store")
    with store.writer() as writer:
        writer.publish()
    work = Work(server, "openai", replace(bench, live=replace(bench.live, store=folder / "store")), held_out, folder)
    assert work.run().answer == "Nothing."
    with Ledger(folder) as ledger:
        found = [one.result for one in ledger.calls()]
    assert [one.call.arguments["query"] for one in found] == list(queries)
    assert all(one.status != "ok" and "root:" not in one.outcome.text for one in found)
    assert not stolen.exists() and not (folder / "other.duckdb").exists()


def _check_held_out_prompts_are_in_no_request(server: Running, bench: Bench, held_out: tuple[Case, ...]) -> None:
    everything = str([row["body"] for row in server.log(bodies=True)])
    assert all(_middle(case.prompt) in everything for case in bench.cases[:8])
    assert not [case.prompt for case in held_out if _middle(case.prompt) in everything]


def _middle(prompt: str) -> str:
    """A line that no two of these prompts share."""
    return next(line for line in prompt.splitlines() if "?" in line or len(line) > 20)


def test_stopped_and_taken_up_it_asks_nothing_twice_and_repeats_nothing(
    server: Running, bench: Bench, held_out: tuple[Case, ...], folder: Path
) -> None:
    work = Work(server, "anthropic", bench, held_out, folder)
    with pytest.raises(Interrupted):
        work.run(stopping=lambda: server.counts()["questions"] >= 2)
    with Ledger(folder) as ledger:
        assert ledger.steps == 2
    record = work.run()
    assert (record.status, len(record.experiments), len(record.verdicts)) == ("finished", 2, 2)
    counts = server.counts()
    assert (counts["questions"], counts["by_route"]["completions"], counts["asked_again"]) == (4, 4, 0)


def test_a_model_that_repeats_itself_is_stopped(
    server: Running, bench: Bench, held_out: tuple[Case, ...], folder: Path
) -> None:
    server.behave(answer="scripted", replies=[{"calls": LOOK[:1]}, *[{"calls": [ablate([BELIEVED], high=0.0)]}] * 20])
    record = Work(server, "openai", bench, held_out, folder).run(budget=Budget(steps=15))
    assert record.status == "finished" and "brought nothing new" in record.stopped
    assert len(record.experiments) == 1 and server.counts()["questions"] < 9


def test_forward_passes_are_bounded(server: Running, bench: Bench, held_out: tuple[Case, ...], folder: Path) -> None:
    # What every investigation begins with takes 60 texts and 8 prompts; a quarter is kept for verifying.
    record = Work(server, "anthropic", bench, held_out, folder).run(budget=Budget(steps=10, passes=100))
    assert record.experiments[0].status == "refused" and record.spent.passes <= 100
    assert [verdict.status for verdict in record.verdicts] == ["unverified", "unverified"]
    assert (record.status, record.answer) == ("budget", "Latent 954 carries it.")
