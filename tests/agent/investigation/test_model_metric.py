"""A language model says how the behaviour is measured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from exegete.agent.investigation.contract import Case, Metric
from exegete.agent.investigation.model import ModelInvestigator
from exegete.tools.errors import UserError
from exegete.tools.llm import Reply, Status

from .scripted import CASES, FINISH, QUESTION, TOOLS, Scripted


def test_a_given_metric_is_not_asked_for() -> None:
    client = Scripted(FINISH)
    assert asyncio.run(ModelInvestigator(client, TOOLS).frame(QUESTION)) == Metric("log_odds")
    assert client.asked == []


def proposed(cases: Sequence[Case] = CASES, **answer: Any) -> Metric:
    value = {"kind": None, "answer": None, "other": None, "criterion": None} | answer
    client = Scripted(Reply("ok", json.dumps(value), value))
    question = replace(QUESTION, metric=None, cases=tuple(cases))
    found = asyncio.run(ModelInvestigator(client, TOOLS).frame(question))
    (request,) = client.asked
    assert request.schema is not None and not request.tools
    assert "15 prompts, of which" in request.messages[-1].text
    return found


BARE = [Case(case.prompt) for case in CASES]


def test_the_model_proposes_a_metric() -> None:
    assert proposed(kind="log_odds") == Metric("log_odds")
    assert proposed(BARE, kind="log_odds", answer=" DESC", other=" ASC") == Metric("log_odds", " DESC", " ASC")
    assert proposed(BARE, kind="log_probability", answer=" DESC", other="x") == Metric("log_probability", " DESC")
    assert proposed(kind="judged", criterion="It sorts.") == Metric("judged", criterion="It sorts.")


@pytest.mark.parametrize(
    ("cases", "answer", "why"),
    [
        (CASES, {}, "cannot be measured"),
        (CASES, {"kind": "judged"}, "without a criterion"),
        (BARE, {"kind": "log_odds", "answer": " DESC"}, "log_odds without 'other'"),
        ([*CASES[:-1], BARE[-1]], {"kind": "log_probability"}, "log_probability without 'answer'"),
    ],
)
def test_a_metric_that_cannot_be_taken_is_the_users_to_give(
    cases: Sequence[Case], answer: dict[str, Any], why: str
) -> None:
    with pytest.raises(UserError, match=f"scripted:model: .*{why}.*; say how the behaviour is measured"):
        proposed(cases, **answer)


@pytest.mark.parametrize("status", ["refused", "unparsed", "error", "truncated"])
def test_no_metric_without_an_answer(status: Status) -> None:
    investigator = ModelInvestigator(Scripted(Reply(status, detail="no")), TOOLS)
    with pytest.raises(UserError, match=f"proposed no metric \\({status}: no\\)"):
        asyncio.run(investigator.frame(replace(QUESTION, metric=None)))
