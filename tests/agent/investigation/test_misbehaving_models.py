"""Whole investigations by models and servers that do everything wrong: each thing is refused or bounded, and the report says so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving

import exegete
from exegete.agent.investigation import verifying
from exegete.agent.investigation.contract import Budget, Case, Metric
from exegete.agent.investigation.investigate import investigate
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.result import Investigation
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.live import Live
from exegete.tools.bundled import sample_texts
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.live_model import LiveModel
from exegete.tools.subject import Subject

from .on_the_wire import ANSWER, BELIEVED, LOOK, QUESTION, STEPS, TEXTS, Reply, ablate, call, finish, prompts

METRIC = Metric("log_odds")
HYPOTHESIS = LOOK[0]
BARE = call("claim", statement="Latent 3 does it.", kind="causal", latents=[3])
FOUND = call("claim", statement="It carries it.", kind="causal", latents=[BELIEVED], experiments=["E1"])
LOOKING = [{"calls": [call("prompts", offset=n % 12, count=1 + n // 12)]} for n in range(60)]
"""Never the same call twice."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def sharing(subject: Subject, dictionary: Dictionary) -> Iterator[Sharing]:
    with Sharing(Live(LiveModel(subject, [dictionary]), dictionary, None)) as shared:
        yield shared


@pytest.fixture(autouse=True)
def fewer_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough for two claims.
    monkeypatch.setattr(verifying, "RANDOM_SETS", 40)


class Work:
    """Asks one question of a scripted model, again where it is asked again."""

    def __init__(self, server: Running, sharing: Sharing, cases: Sequence[Case], folder: Path) -> None:
        self.server = server
        self.cases = cases
        self.folder = folder
        self.given: dict[str, Any] = {
            **{"sharing": sharing, "out": folder, "controls": 2, "no_budget": True},
            "texts": list(sample_texts(77, TEXTS)),
        }

    def ask(self, *replies: Reply, provider: str = "openai", faults: Sequence[Any] = (), **more: Any) -> Investigation:
        self.server.behave(answer="scripted", by_turn=True, replies=replies, faults=faults)
        spec = self.server.spec(provider, "model")
        return investigate(QUESTION, self.cases, METRIC, spec, **(self.given | more))

    @property
    def told(self) -> str:
        """Everything that the model was ever told."""
        return str([row["body"] for row in self.server.log(bodies=True)])


@pytest.fixture
def work(running: Running, sharing: Sharing, cases: tuple[Case, ...], tmp_path: Path) -> Work:
    running.reset()
    return Work(running, sharing, cases, tmp_path / "out")


def report(found: Investigation) -> str:
    return (found.folder / "report.md").read_text()


CROSS = "range(1000000) a, range(1000) b WHERE (a.range * b.range) % 7 = 3"


def queries(folder: Path) -> dict[str, str]:
    """What may not be asked, with what is said to it."""
    return {
        "INSERT INTO latents VALUES (1)": "only a SELECT can be run",
        f"COPY (SELECT 1) TO '{folder / 'stolen.csv'}'": "only a SELECT can be run",
        f"ATTACH '{folder / 'other.duckdb'}'": "only a SELECT can be run",
        "SELECT * FROM read_csv('/etc/passwd')": "read_csv() cannot be used here",
        "PRAGMA database_list": "only a SELECT can be run",
        "SET memory_limit = '100GB'": "only a SELECT can be run",
        "INSTALL httpfs": "only a SELECT can be run",
        f"SELECT count(*) FROM {CROSS}": "ran longer than 1 s",
        "SELECT list(range) FROM range(1000000000)": "needs more than 100MB of memory",
    }


def test_what_may_not_be_asked_is_refused_and_the_investigation_goes_on(
    running: Running,
    subject: Subject,
    dictionary: Dictionary,
    labeled_store: Path,
    tmp_path: Path,
) -> None:
    running.reset()
    store = tmp_path / "store"
    shutil.copytree(labeled_store, store)
    live = Live(LiveModel(subject, [dictionary]), dictionary, store)
    sealed = _only_in_the_test_split(store)
    latent = sealed[0][0]
    peeking = [
        call("windows", latent=latent, split="test"),
        call("card", latent=latent, split="test"),
        call("search", phrase="windows of the test split", by="words"),
        call("sql", query="SELECT text FROM examples WHERE split = 'test'"),
    ]
    wrong = queries(tmp_path)
    replies = [
        {"calls": [HYPOTHESIS, *peeking]},
        {"calls": [call("sql", query=query) for query in wrong]},
        {"calls": [ablate([BELIEVED], high=-0.1)]},
        {"calls": [FOUND, BARE, *finish(ANSWER)["calls"]]},
    ]
    with Sharing(live) as sharing:
        work = Work(running, sharing, prompts(), tmp_path / "unused")
        found = work.ask(*replies, store=store, out=None, query_s=1.0, query_mb=100)
    assert (found.record.status, found.answer) == ("finished", ANSWER)
    with Ledger(found.folder) as ledger:
        results = [one.result for one in ledger.calls()]
    assert [one.status for one in results] == ["refused", "error", "ok", "ok", *["error"] * len(wrong), "ok"]
    for one, words in zip(results[4:], wrong.values(), strict=False):
        assert words in one.outcome.text, one.call.arguments
    assert results[3].outcome.facts["rows"] == [] and "sealed" in results[0].outcome.text
    told = work.told
    assert not [text for _, text in sealed if text in told] and "root:" not in told and "PRAGMA" in told
    assert not (tmp_path / "stolen.csv").exists() and not (tmp_path / "other.duckdb").exists()
    with exegete.connect(store) as connection:
        rows = connection.execute("SELECT statement, verdict, why FROM claims ORDER BY claim_id").fetchall()
        assert connection.execute("SELECT status, answer FROM investigations").fetchall() == [("finished", ANSWER)]
    assert [row[:2] for row in rows] == [("It carries it.", "verified"), ("Latent 3 does it.", "unverified")]
    assert rows[1][2] == "it rests on no experiment"
    assert "**unverified**: Latent 3 does it." in report(found)
    assert "Not done as asked | card ×1, sql ×9, windows ×1" in report(found)


def _only_in_the_test_split(store: Path) -> list[tuple[int, str]]:
    """Return how windows begin that are of the test split alone, each with a latent that they are of."""
    with exegete.connect(store) as connection:
        query = "SELECT split = 'test', text[:80], min(latent) FROM examples WHERE latent < 100 GROUP BY ALL"
        rows = connection.execute(query).fetchall()
    others = {text for sealed, text, _ in rows if not sealed}
    found = [(latent, text) for sealed, text, latent in rows if sealed and len(text) == 80 and text not in others]
    assert len(found) > 20
    return found


@pytest.mark.parametrize(
    ("replies", "provider", "stopped", "answer"),
    [
        ([{"calls": [HYPOTHESIS]}, *[{"calls": [ablate([BELIEVED], high=0.0)]}] * 20], "openai", "nothing new", ""),
        ([{"calls": [BARE]}, *[{"text": "Yes."}] * 20], "anthropic", "", "3 replies in a row called no tool] Yes."),
        ([{"calls": [BARE]}, {"text": "I cannot.", "stop": "refusal"}], "anthropic", "", "reply failed: refused"),
    ],
)
def test_a_model_that_gets_nowhere_is_stopped(
    work: Work, replies: Sequence[Reply], provider: str, stopped: str, answer: str
) -> None:
    found = work.ask(*replies, provider=provider)
    assert found.record.status == "finished" and stopped in found.record.stopped and answer in found.answer
    assert work.server.counts()["questions"] < 9 and len(found.record.experiments) <= 1
    assert (stopped or "The investigation ended early") in report(found)
    assert not answer or "**unverified**: Latent 3 does it." in report(found)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(steps=3), "its 3 steps are used"),
        (Budget(passes=60), "more forward passes than were left"),
        (Budget(tokens=90_000), "tokens"),
        (Budget(usd=0.2), "USD"),
    ],
)
def test_what_exceeds_a_budget_ends_the_search(work: Work, tmp_path: Path, budget: Budget, words: str) -> None:
    spec = work.server.spec("openai", "model")
    (tmp_path / "prices.toml").write_text(f'["{spec}"]\ninput = 1.0\noutput = 10.0\n')
    (tmp_path / "config.toml").write_text(f'[models]\nprices = "{tmp_path / "prices.toml"}"\n')
    first = {"calls": [HYPOTHESIS, ablate([BELIEVED], high=-0.1), BARE]}
    ending = [finish(ANSWER)] if budget.passes == 60 else LOOKING
    more: dict[str, Any] = {"no_budget": budget.usd is None, "config": tmp_path / "config.toml"}
    found = work.ask(first, *ending, budget=budget, **more)
    record = found.record
    assert record.status == "budget" and words in record.stopped, record.stopped
    assert "Its budget was used up" in report(found) and "**unverified**: Latent 3 does it." in report(found)
    assert record.spent.steps <= budget.steps and record.spent.passes <= (budget.passes or 10**9)
    assert record.spent.tokens <= (budget.tokens or 10**9) and record.spent.usd <= (budget.usd or 10**9)
    assert 1 <= work.server.counts()["questions"] < 30
    assert [one.status for one in record.experiments] == ["refused" if budget.passes == 60 else "ok"]


FAULTS = ("429", "500", "html", "cut", "hang")


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_server_that_recovers_changes_nothing(work: Work, tmp_path: Path, provider: str) -> None:
    # One after the other, each before another reply.
    faults = [
        {"kind": kind, "after": 2 * at, "first": 1, "retry_after": 0.01, "seconds": 60}
        for at, kind in enumerate(FAULTS)
    ]
    (tmp_path / "config.toml").write_text("[models]\ntimeout_s = 2\n")
    replies = [{"calls": [HYPOTHESIS]}, *LOOKING[: STEPS - 2], finish(ANSWER)]
    found = work.ask(*replies, provider=provider, faults=faults, config=tmp_path / "config.toml")
    assert (found.record.status, found.answer, found.record.spent.steps) == ("finished", ANSWER, STEPS)
    counts = work.server.counts()
    assert counts["by_fault"] == dict.fromkeys(FAULTS, 1) and counts["asked_again"] == 0


def test_a_server_that_is_down_interrupts_and_what_was_found_is_kept(work: Work, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[models]\nattempts = 2\n")
    replies = [{"calls": [HYPOTHESIS, ablate([BELIEVED], high=-0.1), BARE]}, finish(ANSWER)]
    more: dict[str, Any] = {"config": tmp_path / "config.toml"}
    found = work.ask(*replies, faults=[{"kind": "500", "after": 1}], **more)
    assert not found.finished and "gave no answer (error: HTTP 500" in found.record.stopped
    assert "It was interrupted" in report(found) and "**unverified**: Latent 3 does it." in report(found)
    again = work.ask(*replies, **more)
    assert again.finished and again.id == found.id and (again.answer, again.record.stopped) == (ANSWER, "")
    assert again.record.experiments == found.record.experiments and len(found.record.experiments) == 1
    assert work.server.counts()["asked_again"] == 0


def test_a_key_that_the_server_quotes_is_nowhere(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "nobody-knows-this-one"
    monkeypatch.setenv("EXEGETE_API_KEY", key)
    replies = [{"calls": [HYPOTHESIS]}, finish(ANSWER)]
    with pytest.raises(UserError, match="does not take the key in EXEGETE_API_KEY") as told:
        work.ask(*replies, faults=[{"kind": "401", "after": 1}])
    found = work.ask(*replies)
    assert found.answer == ANSWER and key not in str(told.value) and "[key]" in str(told.value)
    files = [path for path in work.folder.rglob("*") if path.is_file()]
    assert len(files) > 4 and not [path for path in files if key.encode() in path.read_bytes()]


def test_whoever_stops_while_the_server_fails_need_not_wait(work: Work) -> None:
    def asked() -> bool:
        return bool(work.server.counts()["requests"] >= 2)

    found = work.ask(finish(ANSWER), faults=[{"kind": "500"}], stopping=asked)
    assert not found.finished and found.record.stopped == "" and work.server.counts()["requests"] == 2
    assert work.ask(finish(ANSWER)).answer == ANSWER
