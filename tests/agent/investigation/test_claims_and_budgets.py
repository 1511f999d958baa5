"""Claims that are taken back, and what an investigator is told that it may still use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_investigation import CASES, CLAIM, SCRIPT, Scripted, inquiry, run

from exegete.agent.investigation import notes
from exegete.agent.investigation.contract import Budget, Claim, Left, Metric, Question, View
from exegete.agent.investigation.conversation import Turn
from exegete.agent.investigation.graph import investigated
from exegete.agent.investigation.model import beginning, told_now
from exegete.agent.investigation.note_taking import Notebook, claims_of
from exegete.agent.investigation.record import Spent
from exegete.agent.investigation.reporting import html, page
from exegete.agent.investigation.toolbelt import make_tool
from exegete.tools.llm import ToolCall

SCHEMAS = {one.__name__: make_tool("note", one).parameters for one in (notes.claim, notes.withdraw)}
CORRELATED = {"statement": "Latent 7 goes with it.", "kind": "correlational"}
SECOND = {"statement": "Latent 8 goes with it.", "kind": "correlational"}


def book(claims: list[Claim] | None = None) -> Notebook:
    return Notebook(1, SCHEMAS, {}, frozenset(), claims or [])


def asked(*calls: tuple[str, dict[str, Any]]) -> list[ToolCall]:
    return [ToolCall(str(n), name, json.dumps(given)) for n, (name, given) in enumerate(calls)]


def test_a_claim_that_is_taken_back_keeps_its_number_and_says_why() -> None:
    found = book()
    found.take(asked(("claim", CORRELATED), ("claim", SECOND), ("withdraw", {"claim": 1, "why": "E5 says no"})))
    assert [(one.statement, one.withdrawn) for one in found.claims] == [
        ("Latent 7 goes with it.", "E5 says no"),
        ("Latent 8 goes with it.", ""),
    ]
    assert [one.answer for one in found.asked][2] == "Claim 1 is withdrawn."
    # Of a conversation that goes on, the same; in the same words it is claimed again, under its number.
    later = book(claims_of(found.asked, SCHEMAS))
    assert later.claims == found.claims
    later.take(asked(("claim", CORRELATED)))
    assert [one.withdrawn for one in later.claims] == ["", ""]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"claim": 2, "why": "so"}, "there is no claim 2; there are: 1 to 1"),
        ({"claim": 0, "why": "so"}, "there is no claim 0"),
        ({"claim": 1, "why": " "}, "is empty"),
        ({"claim": 1}, "is missing"),
    ],
)
def test_what_cannot_be_taken_back_is_said(given: dict[str, Any], said: str) -> None:
    found = book()
    found.take(asked(("claim", CORRELATED), ("withdraw", given)))
    assert found.asked[1].failed and said in found.asked[1].answer and not found.claims[0].withdrawn


def test_what_was_taken_back_is_reported_and_neither_checked_nor_counted(tmp_path: Path) -> None:
    gone = replace(CLAIM, statement="latent 2 does it", withdrawn="E2 showed <nothing>")
    found = run(tmp_path / "why", script=(*SCRIPT[:-1], replace(SCRIPT[-1], claims=(gone, CLAIM))))
    assert [(one.claim.statement, one.status) for one in found.verdicts] == [
        ("latent 2 does it", "withdrawn"),
        ("latent 3 does it", "verified"),
    ]
    assert found.verdicts[0].why == "it was taken back before any check, since: E2 showed <nothing>"
    # Thirty passes a claim that is checked.
    assert found.spent.passes == 10 + 3 * 100 + 30
    shown = html(page(found, tmp_path))
    assert 'class="verdict withdrawn"' in shown and "since: E2 showed &lt;nothing&gt;" in shown


def test_an_investigator_is_told_what_is_left_and_the_same_again_after_a_resume(tmp_path: Path) -> None:
    one = inquiry(tmp_path / "why", budget=Budget(10, passes=1_000, tokens=500, usd=2.0))
    spent: Iterator[int] = iter(range(9))
    one.account = lambda: Spent(tokens=200 * (n := next(spent)), usd=0.25 * n)
    try:
        asyncio.run(investigated(one))
        assert isinstance(one.investigator, Scripted)
        # 750 passes are for the search; ten before everything, 100 an experiment. Tokens are never less than none.
        assert [view.left for view in one.investigator.views] == [
            *(Left(740, 500, 2.0), Left(540, 300, 1.75), Left(540, 100, 1.5), Left(440, 0, 1.25)),
        ]
        assert one.ledger.spent_before(2, lambda: Spent(tokens=9)) == Spent(tokens=200, usd=0.25)
        one.ledger.set_budget(Budget(10, passes=None, tokens=900))
        assert one._left(2) == Left(None, 700, None)
    finally:
        one.close()
        one.ledger.close()


def test_what_is_left_is_said_at_each_turn() -> None:
    question = Question("Why?", CASES, Metric("log_odds"), budget=Budget(7, 8_000, usd=1.5, tokens=90_000))
    view = View(question, Metric("log_odds"), (), (), 0, (), 6, left=Left(5_400, 80_000, 1.234))
    told = told_now(view, [Turn("", "Well.")])
    assert told.endswith("6 replies are left, 5,400 forward passes for experiments, 80,000 tokens, 1.23 USD.")
    assert told_now(replace(view, left=Left()), [Turn("", "Well.")]).endswith("6 replies are left.")
    assert beginning(view)[-1].text.endswith("You have 7 replies, 90,000 tokens, 1.50 USD. Begin.")


def test_a_call_that_takes_too_long_gets_no_more_passes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exegete.agent.investigation.running.TOOL_S", 0.0)
    found = run(tmp_path / "why", budget=Budget(10, passes=1_000))
    # The search goes on, and lookups that need no passes are as they were.
    assert {one.status for one in found.experiments} == {"error"} and found.lookups == {"look": 1}
    assert "took longer than 0 s" in found.experiments[0].text and "ask for less" in found.experiments[0].text
    # Nothing was used up: that is another thing to be told.
    assert (found.status, found.stopped, found.spent.passes) == ("finished", "", 10 + 30)
