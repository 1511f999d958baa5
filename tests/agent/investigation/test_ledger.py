"""The ledger: the first writing counts, predictions come before results, and what is damaged or full is said."""

from __future__ import annotations

import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from exegete.agent.investigation.contract import (
    Budget,
    Call,
    Case,
    Claim,
    Decision,
    Headline,
    Hypothesis,
    Metric,
    Outcome,
    Prediction,
    Result,
    Verdict,
)
from exegete.agent.investigation.ledger import LEDGER, Ledger, Stopped
from exegete.agent.investigation.record import InvestigationRecord, Spent, from_json, to_json
from exegete.tools.errors import UserError

BEGUN = InvestigationRecord(
    id="why-0a1b2c3d",
    question="Why?",
    investigator="recipe",
    origin={"subject": "bundled"},
    cases=(Case("a", "b", "c"),),
    held_out=(Case("d", "e", "f"),),
    metric=None,
    seed=3,
    code_version="1",
    started_at="2026-01-01T00:00:00.000+00:00",
    status="interrupted",
)
ABLATE = Call("1-0", "ablate", {"latents": [5, 7]})
LOOK = Call("1-1", "card", {"latent": 5})


def measured(value: float | None) -> Outcome:
    return Outcome("what it found", Headline("effect", value, n=12), facts={"rows": [1, 2]})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path)
    found.begin(BEGUN)
    return found


def test_predictions_are_numbered_in_their_order_and_the_first_one_counts(ledger: Ledger) -> None:
    assert ledger.predict(ABLATE, Prediction("H1", "it carries it", high=-1.0)) == "E1"
    assert ledger.predict(Call("1-2", "steer", {}), Prediction("H1", "more of it", low=0.5)) == "E2"
    assert ledger.predict(ABLATE, Prediction("H1", "on second thoughts", low=5.0)) == "E1"
    first, second = ledger.record().experiments
    assert (first.id, first.status, first.prediction.because) == ("E1", "begun", "it carries it")
    assert (second.id, second.prediction.low) == ("E2", 0.5)


@pytest.mark.parametrize(
    ("value", "predicted"),
    [(-1.5, True), (-0.5, False), (-1.0, True), (1e-8 - 1, True), (1e-4 - 1, False), (None, None), (math.nan, None)],
)
def test_figures_are_held_against_their_predictions(
    ledger: Ledger, value: float | None, predicted: bool | None
) -> None:
    ledger.decide(1, Decision((ABLATE, LOOK)))
    ledger.predict(ABLATE, Prediction("H1", "it carries it", high=-1.0))
    ledger.finish(Result(ABLATE, "ok", measured(value)), passes=40, seconds=0.5)
    ledger.finish(Result(LOOK, "ok", Outcome("a card")), passes=2)
    scored = ledger.score(1)
    assert [(one.experiment, one.predicted) for one in scored] == [("E1", predicted), ("", None)]
    assert ledger.record().hits == ((0, 0) if predicted is None else (int(predicted), 1))
    assert ledger.record().lookups == {"card": 1}


def test_a_result_is_written_once_and_read_back_as_it_was(ledger: Ledger) -> None:
    ledger.predict(ABLATE, Prediction("H1", "it carries it", high=-1.0))
    assert ledger.finished("1-0") is None
    stored = ledger.finish(Result(ABLATE, "ok", measured(-1.5)), passes=40)
    assert stored == Result(ABLATE, "ok", measured(-1.5), experiment="E1")
    assert ledger.finish(Result(ABLATE, "error", Outcome("again")), passes=9) == stored
    assert ledger.finished("1-0") == stored and ledger.passes() == 40


def test_a_repeated_call_is_given_the_experiment_that_it_repeats(ledger: Ledger) -> None:
    ledger.predict(ABLATE, Prediction("H1", "it carries it", high=-1.0))
    former = ledger.finish(Result(ABLATE, "ok", measured(-1.5)), passes=40)
    again = Call("2-0", "ablate", {"latents": [5, 7]})
    ledger.decide(2, Decision((again,)))
    ledger.finish(Result(again, "ok", former.outcome), repeats="1-0")
    ledger.score(2)
    (found,) = ledger.calls(2)
    assert (found.result.experiment, found.repeats) == ("E1", "1-0")
    assert len(ledger.record().experiments) == 1 and ledger.record().lookups == {}


def test_the_first_decision_of_a_step_counts_and_hypotheses_are_not_reworded(ledger: Ledger) -> None:
    ledger.decide(1, Decision((ABLATE,), (Hypothesis("H1", "latent 5 does it"),)))
    assert ledger.decide(1, Decision(answer="another", done=True)).calls == (ABLATE,)
    ledger.decide(2, Decision(hypotheses=(Hypothesis("H1", "latent 7 does it", "supported"), Hypothesis("H2", "new"))))
    assert ledger.hypotheses == (Hypothesis("H1", "latent 5 does it", "supported"), Hypothesis("H2", "new"))
    with pytest.raises(ValueError, match="'1-0' was made before"):
        ledger.decide(3, Decision((LOOK, ABLATE)))
    assert ledger.decision(3) is None and ledger.steps == 2  # Whole or not at all.


def test_everything_is_there_when_it_is_opened_again(ledger: Ledger, tmp_path: Path) -> None:
    claim = Claim("latent 5 raises DESC", "causal", (5,), experiments=("E1",))
    ledger.settle(Metric("log_odds", "DESC", "ASC"))
    ledger.decide(1, Decision((ABLATE,), (Hypothesis("H1", "x"),), said=({"role": "user", "text": "…"},)))
    ledger.predict(ABLATE, Prediction("H1", "y", low=1.0))
    ledger.finish(Result(ABLATE, "refused", Outcome("no")), passes=3)
    ledger.note(2, "look at 7 \ud800")  # Half of a surrogate pair, as a terminal may give.
    ledger.decide(2, Decision(claims=(claim,), answer="so", done=True))
    ledger.use("opening", 10)
    ledger.use("opening", 99)
    ledger.use("verifying", 30)
    ledger.judge([Verdict(claim, "verified", "it held", Headline("effect", -2.0), p=0.01)])
    ledger.end(Spent(calls=2, tokens=300, usd=0.01))
    before = ledger.record()
    assert before.spent == Spent(steps=2, passes=43, calls=2, tokens=300, usd=0.01)
    assert before.status == "finished" and before.answer == "so" and before.notes == ("look at 7 �",)
    ledger.close()
    with Ledger(tmp_path) as again:
        assert again.record() == before
        assert from_json(to_json(before), "here") == before
        assert again.notes(1) == () and again.notes(2) == before.notes
        assert again.passes(before_step=2) == 13
        assert again.decision(2) == Decision(claims=(claim,), answer="so", done=True, said=[])


def test_an_ended_search_can_be_opened_again(ledger: Ledger) -> None:
    ledger.stop("no passes are left", budget=True)
    ledger.judge([])
    ledger.end(Spent())
    assert (ledger.record().status, ledger.record().stopped) == ("budget", "no passes are left")
    ledger.set_budget(Budget(passes=5))
    assert ledger.reopen() == 1 and ledger.stopped is None and ledger.verdicts is None
    assert ledger.record().status == "interrupted" and ledger.record().budget == Budget(passes=5)
    ledger.stop("in circles", budget=False)
    ledger.end(Spent())
    assert ledger.stopped == Stopped("in circles", False) and ledger.record().status == "finished"


def test_threads_write_at_the_same_time(ledger: Ledger) -> None:
    calls = [Call(str(number), "ablate", {"latents": [number]}) for number in range(30)]

    def work(call: Call) -> str:
        name = ledger.predict(call, Prediction("H1", "…", low=0.0))
        return ledger.finish(Result(call, "ok", measured(1.0)), passes=1).experiment if name else ""

    with ThreadPoolExecutor(8) as threads:
        names = list(threads.map(work, calls))
    assert sorted(names) == sorted(f"E{number}" for number in range(1, 31)) and ledger.passes() == 30


def test_a_damaged_ledger_is_said(ledger: Ledger, tmp_path: Path) -> None:
    ledger.close()
    (tmp_path / LEDGER).write_bytes(b"no database" * 500)
    with pytest.raises(UserError, match="is damaged"):
        Ledger(tmp_path)


def test_a_value_that_does_not_fit_is_said(ledger: Ledger, tmp_path: Path) -> None:
    ledger.settle(Metric("log_odds"))
    ledger.close()
    with closing(sqlite3.connect(tmp_path / LEDGER)) as connection, connection:
        connection.execute("UPDATE facts SET content = '{\"kind\": \"mood\"}' WHERE name = 'metric'")
    with Ledger(tmp_path) as again, pytest.raises(UserError, match="is damaged"):
        _ = again.metric


def test_a_second_process_is_told_so(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="being worked on already"):
        Ledger(tmp_path)
    ledger.close()
    Ledger(tmp_path).close()


def test_a_full_disk_is_said_and_leaves_nothing_half_written(ledger: Ledger) -> None:
    pages = ledger._file.rows("PRAGMA page_count")[0][0]
    ledger._file.rows(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(UserError, match=r"free some space and go on: exegete ask --resume"):
        ledger.decide(1, Decision((ABLATE, Call("1-9", "card", {"text": "x" * 100_000}))))
    assert ledger.decision(1) is None and ledger.calls() == []
    assert ledger.decide(1, Decision((ABLATE,))).calls == (ABLATE,)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="name another folder"):
        Ledger(tmp_path / "file" / "inside")


def test_nothing_begun_is_said(tmp_path: Path) -> None:
    with Ledger(tmp_path) as empty, pytest.raises(UserError, match="holds no investigation"):
        empty.begun()
