"""The investigation's graph: predictions before experiments, budgets, loops, people. Kills: `test_ask_on_the_wire`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_investigation import (
    CLAIM,
    SCRIPT,
    Scripted,
    ablating,
    as_lines,
    inquiry,
    lines,
    run,
    timeless,
)

from exegete.agent.investigation.contract import Budget, Decision, Hypothesis, Metric, Question, Result, View
from exegete.agent.investigation.graph import CHECKPOINTS, investigated
from exegete.agent.investigation.inquiry import Answer, Interrupted
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.record import InvestigationRecord, read_record
from exegete.tools.errors import UserError
from exegete.tools.llm.budget import BudgetUsedUp


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> InvestigationRecord:
    return run(tmp_path_factory.mktemp("undisturbed") / "why")


def test_an_investigation_from_its_question_to_its_report(undisturbed: InvestigationRecord, tmp_path: Path) -> None:
    found = run(tmp_path / "why")
    assert timeless(found) == replace(timeless(undisturbed))
    one, two, three = found.experiments
    assert [(e.id, e.arguments["latents"], e.predicted) for e in (one, two, three)] == [
        ("E1", [1], True),  # −1 ≤ −0.5
        ("E2", [2], False),  # −2 < 0
        ("E3", [3], True),  # −3 ≤ −2
    ]
    assert found.hits == (2, 3) and found.lookups == {"look": 1}
    assert [(h.id, h.statement, h.status) for h in found.hypotheses] == [
        ("H1", "latent 3 does it", "supported"),
        ("H2", "latent 2 does it", "rejected"),
    ]
    assert [(v.claim, v.status) for v in found.verdicts] == [(CLAIM, "verified")]
    assert (found.status, found.stopped, found.answer) == ("finished", "", "latent 3")
    # Ten before everything, three experiments, thirty to verify: the repeated call costs nothing.
    assert (found.spent.steps, found.spent.passes) == (4, 10 + 3 * 100 + 30)
    assert read_record(tmp_path / "why") == found and (tmp_path / "why" / "report.md").exists()
    assert sorted(lines(tmp_path / "why", "ran")) == sorted(
        ["look 1", "ablate [1]", "ablate [2]", "look 99", "ablate [3]"]
    )


def test_predictions_are_there_before_any_experiment_of_the_decision_runs(tmp_path: Path) -> None:
    seen: list[int] = []
    original = Ledger.finish
    try:

        def finish(ledger: Ledger, result: Result, *args: Any, **more: Any) -> Result:
            seen.append(len(ledger.record().experiments))
            return original(ledger, result, *args, **more)

        Ledger.finish = finish  # type: ignore[assignment, method-assign]
        run(tmp_path / "why")
    finally:
        Ledger.finish = original  # type: ignore[method-assign]
    # Three calls of the first decision end, each with both predictions on the disk.
    assert seen[:3] == [2, 2, 2]


def test_calls_that_cannot_run_come_back_in_words(tmp_path: Path) -> None:
    one = inquiry(tmp_path / "why")
    try:
        asyncio.run(investigated(one))
        results = {found.result.call.id: found.result for found in one.ledger.calls()}
        views = one.investigator.views if isinstance(one.investigator, Scripted) else []
    finally:
        one.close()
        one.ledger.close()
    assert "made before, in E1" in results["2-0"].outcome.text and results["2-0"].experiment == "E1"
    assert "no hypothesis 'H9'; there are: H1, H2" in results["2-1"].outcome.text
    assert results["2-2"].status == "error" and "no latent 99" in results["2-2"].outcome.text
    assert results["2-3"].status == "refused" and "say before it runs" in results["2-3"].outcome.text
    assert [(view.new, len(view.results), view.steps_left) for view in views] == [
        *((0, 0, 10), (3, 3, 9), (4, 7, 8), (1, 8, 7)),
    ]
    assert [dict(one) for one in views[1].said] == [{"role": "assistant", "text": "first"}]
    assert views[3].results[-1].predicted is True and views[0].metric == Metric("log_odds")


def test_calls_of_a_decision_run_at_the_same_time(tmp_path: Path) -> None:
    script = (replace(SCRIPT[0], calls=SCRIPT[0].calls[1:]), SCRIPT[-1])
    # Each waits for the other: one after the other, they would wait for ever.
    found = run(tmp_path / "why", script=script, together=threading.Barrier(2, timeout=30))
    assert [one.status for one in found.experiments] == ["ok", "ok"]


def test_it_stops_when_asked_and_goes_on(undisturbed: InvestigationRecord, tmp_path: Path) -> None:
    folder = tmp_path / undisturbed.id
    with pytest.raises(Interrupted):
        run(folder, stopping=lambda: len(lines(folder, "asked")) >= 3)
    asked = lines(folder, "asked")
    assert asked == ["frame", "1", "2"]
    assert as_lines(run(folder)) == as_lines(undisturbed)
    assert lines(folder, "asked")[3:] == ["3", "4"]


def test_an_investigator_that_loops_is_stopped(tmp_path: Path) -> None:
    first = Decision((ablating("1-0", [1], high=0.0),), (Hypothesis("H1", "x"),))
    again = [Decision((ablating(f"{step}-0", [1], high=0.0),), claims=(CLAIM,)) for step in range(2, 30)]
    found = run(tmp_path / "why", script=(first, *again), budget=Budget(steps=20))
    assert found.stopped == "4 decisions in a row brought nothing new" and found.status == "finished"
    assert found.spent.steps == 5 and lines(tmp_path / "why", "ran") == ["ablate [1]"]
    # It claims E3, which is not there: what it claimed last is checked all the same.
    assert [verdict.status for verdict in found.verdicts] == ["unverified"]


def test_steps_are_limited(tmp_path: Path) -> None:
    found = run(tmp_path / "why", budget=Budget(steps=2))
    assert (found.status, found.stopped, found.spent.steps) == ("budget", "its 2 steps are used", 2)
    assert found.verdicts == () and (tmp_path / "why" / "report.md").exists()


def test_what_exceeds_the_passes_is_refused_and_a_reserve_is_left_to_verify(tmp_path: Path) -> None:
    # Of 300 passes 225 are for the search, 215 after the opening. A third of that is too little for either of the first two
    # experiments, so they run one after the other; 15 are left for the third.
    script = (*SCRIPT[:3], replace(SCRIPT[-1], claims=(CLAIM, replace(CLAIM, experiments=("E1",)))))
    found = run(tmp_path / "why", script=script, budget=Budget(steps=10, passes=300))
    assert [(one.id, one.status, one.passes) for one in found.experiments] == [
        *(("E1", "ok", 100), ("E2", "ok", 100), ("E3", "refused", 0)),
    ]
    assert "15 are left for this" in found.experiments[2].text
    assert found.stopped.startswith("1 calls were refused") and found.status == "budget"
    assert found.spent.passes == 10 + 2 * 100 + 2 * 30
    # The first rests on what was refused.
    assert [verdict.status for verdict in found.verdicts] == ["unverified", "verified"]


def test_a_call_that_was_refused_for_passes_may_be_made_again(tmp_path: Path) -> None:
    script = (SCRIPT[0], *(Decision((ablating(f"{step}-0", [7], low=0.0),)) for step in range(2, 20)))
    found = run(tmp_path / "why", script=script, budget=Budget(steps=15, passes=300))
    assert [one.status for one in found.experiments] == ["ok", "ok", *["refused"] * 5]
    assert found.stopped == "its 225 forward passes for the search are used"


def test_verifying_ends_where_its_passes_end(tmp_path: Path) -> None:
    script = (replace(SCRIPT[0], calls=SCRIPT[0].calls[1:2]), replace(SCRIPT[-1], claims=(CLAIM,) * 2))
    # 112 of 150 are for the search, which takes 110; verifying would take 60.
    found = run(tmp_path / "why", script=script, budget=Budget(steps=10, passes=150))
    assert [(verdict.status, "no forward passes were left" in verdict.why) for verdict in found.verdicts] == [
        *(("unverified", True), ("unverified", True)),
    ]
    assert found.spent.passes == 110


def test_too_few_passes_to_begin_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small to measure the behaviour even once"):
        run(tmp_path / "why", budget=Budget(passes=8))


def test_it_goes_on_with_more_of_a_budget(undisturbed: InvestigationRecord, tmp_path: Path) -> None:
    folder = tmp_path / undisturbed.id
    assert run(folder, budget=Budget(steps=2)).status == "budget"
    with Ledger(folder) as ledger:
        ledger.set_budget(Budget(steps=10))
        ledger.reopen()
    assert as_lines(run(folder)) == as_lines(undisturbed)
    assert lines(folder, "asked") == ["frame", "1", "2", "3", "4"]


class _Poor(Scripted):
    async def decide(self, view: View) -> Decision:
        if len(view.results) > 3:
            raise UserError("halted") from BudgetUsedUp("budget of 1 USD: the next call could exceed it")
        return await super().decide(view)


def test_money_that_is_used_up_ends_the_search_alone(tmp_path: Path) -> None:
    one = inquiry(tmp_path / "why")
    one.investigator = _Poor(
        tmp_path / "why", [SCRIPT[0], replace(SCRIPT[1], claims=(replace(CLAIM, experiments=("E1",)),))]
    )
    try:
        asyncio.run(investigated(one))
        found = one.ledger.record()
    finally:
        one.close()
        one.ledger.close()
    assert (found.status, found.stopped, found.spent.steps) == ("budget", "halted", 2)
    assert [verdict.status for verdict in found.verdicts] == ["verified"]


class _Watching:
    """Corrects the metric, says something before the second and third decision, and ends the search after that."""

    def __init__(self, stop_before: int = 4) -> None:
        self.stop_before = stop_before
        self.told: list[tuple[int, list[str]]] = []

    def metric(self, question: Question, proposed: Metric) -> Metric:
        return replace(proposed, answer="no")

    def between(self, step: int, results: Sequence[Result]) -> Answer:
        self.told.append((step, [result.experiment for result in results]))
        if step == self.stop_before:
            return Answer(stop=True)
        return Answer(f"a word before {step}")


def test_a_person_corrects_the_metric_says_something_and_ends_the_search(tmp_path: Path) -> None:
    person = _Watching()
    found = run(tmp_path / "why", person=person)
    assert found.metric == Metric("log_odds", answer="no")
    assert person.told == [(2, ["", "E1", "E2"]), (3, ["E1", "", "", ""]), (4, ["E3"])]
    assert found.notes == ("a word before 2", "a word before 3")
    assert (found.status, found.stopped) == ("finished", "the person who watched ended the search")


class _Gone(_Watching):
    def between(self, step: int, results: Sequence[Result]) -> Answer:
        raise KeyboardInterrupt


def test_who_leaves_at_a_question_is_asked_it_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "why", person=_Gone())
    person = _Watching(stop_before=99)
    found = run(tmp_path / "why", person=person)
    assert found.answer == "latent 3" and person.told[0][0] == 2
    assert lines(tmp_path / "why", "asked") == ["frame", "1", "2", "3", "4"]


def test_nobody_watches_any_more(undisturbed: InvestigationRecord, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / undisturbed.id, person=_Gone())
    found = run(tmp_path / undisturbed.id)
    assert replace(timeless(found), metric=undisturbed.metric) == timeless(undisturbed)


def test_damaged_checkpoints_are_said(tmp_path: Path) -> None:
    run(tmp_path / "why")
    (tmp_path / "why" / CHECKPOINTS).write_bytes(b"no database" * 999)
    for more in ("-wal", "-shm"):
        (tmp_path / "why" / f"{CHECKPOINTS}{more}").unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"{CHECKPOINTS}.*is damaged"):
        run(tmp_path / "why")


def test_a_bug_in_a_tool_is_raised_once_the_others_have_ended(tmp_path: Path) -> None:
    one = inquiry(tmp_path / "why", script=(SCRIPT[0],), together=threading.Barrier(3, timeout=0.1))
    try:
        with pytest.raises(threading.BrokenBarrierError):
            asyncio.run(investigated(one))
        assert [found.result.call.id for found in one.ledger.calls()] == ["1-0"]
    finally:
        one.close()
        one.ledger.close()


def test_a_call_that_is_broken_off_is_not_finished(undisturbed: InvestigationRecord, tmp_path: Path) -> None:
    folder = tmp_path / undisturbed.id
    together = threading.Barrier(3)
    one = inquiry(folder, together=together)

    async def broken_off() -> None:
        work = asyncio.create_task(investigated(one))
        while together.n_waiting < 2:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        one.close()
        together.wait()  # Now both go on, and nobody takes what they found.

    asyncio.run(broken_off())
    one._threads.shutdown(wait=True)
    assert [found.result.call.id for found in one.ledger.calls()] == ["1-0"]
    one.ledger.close()
    assert as_lines(run(folder)) == as_lines(undisturbed)
