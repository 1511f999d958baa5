"""Output on the bundled subject: a planted direction against random ones, what is shown, failures, bad input."""

from __future__ import annotations

import asyncio
import re
from functools import cache
from typing import Any

import pytest
from fake_clients import FakeClient
from live_subject import DEAD, PLANTED, WORDS, planted_model

from exegete.evaluators import Score, make_evaluator
from exegete.evaluators.output import Output
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.lens import direct_lens
from exegete.tools.llm import Reply, Request
from exegete.tools.windows import LatentEvidence

AGGREGATES = Explanation("writes" + ",".join(WORDS))


def lists_of(prompt: str) -> list[list[str]]:
    return [found.split("\n") for found in re.findall(r"<list \d>\n(.*?)\n</list \d>", prompt, re.DOTALL)]


def reader(prompt: str, request: Request) -> Any:
    """Counts the words of the explanation in both lists; without a difference it answers 1."""
    words = {f" {word}" for word in re.findall(r"[A-Z]{3,}", prompt.split("</explanation>")[0])}
    first, second = (len(words & set(one)) for one in lists_of(prompt))
    return {"choice": 2 if second > first else 1}


def score(latent: int, explanation: Explanation, client: FakeClient, seed: int = 0, shown: int = 10) -> Score:
    model = planted_model()
    made = Output(model, model.dictionary(), client, shown=shown)
    (found,) = asyncio.run(made.evaluate(explanation, LatentEvidence(latent, "live", ()), None, seed)).scores
    return found


@cache
def asked(latent: int, seed: int = 0) -> tuple[str, ...]:
    client = FakeClient(reader)
    score(latent, AGGREGATES, client, seed)
    return tuple(request.messages[-1].text for request in client.asked)


def test_what_a_planted_latent_writes_is_told_from_what_others_write() -> None:
    found = score(PLANTED, AGGREGATES, FakeClient(reader))
    # Half of the twenty tokens are shown: now and then none of the four words is among them.
    assert found.value is not None and found.value >= 0.85 and found.low is not None and found.low > 0.6
    assert (found.metric, found.n, found.failures, found.status) == ("accuracy", 20, 0, "ok")
    assert found.parameters["largest_logit"] > found.parameters["largest_logit_random_directions"]


def test_the_explanation_of_another_latent_scores_at_chance() -> None:
    found = score(DEAD + 2, AGGREGATES, FakeClient(reader))
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high
    wrong = score(PLANTED, Explanation("writes DISTINCT"), FakeClient(reader))
    assert wrong.low is not None and wrong.high is not None and wrong.low < 0.5 < wrong.high


def test_each_question_shows_tokens_from_the_top_of_both_lists() -> None:
    model = planted_model()
    top = [one.piece for one in direct_lens(model, model.dictionary(), [PLANTED], 20)[0].top]
    assert len(asked(PLANTED)) == 20
    places = []
    for prompt in asked(PLANTED):
        first, second = lists_of(prompt)
        assert len(first) == len(second) == 10
        place = 0 if set(first) <= set(top) else 1
        assert set((first, second)[place]) <= set(top) and first != second
        places.append(place)
    assert sum(places) == 10
    others = {tuple(lists_of(prompt)[1 - place]) for prompt, place in zip(asked(PLANTED), places, strict=True)}
    assert len(others) == 20


def test_the_same_seed_asks_the_same_and_another_seed_other_questions() -> None:
    again = FakeClient(reader)
    score(PLANTED, AGGREGATES, again)
    assert tuple(request.messages[-1].text for request in again.asked) == asked(PLANTED) != asked(PLANTED, 1)


def test_failures_are_counted() -> None:
    replies = iter([Reply("refused"), Reply("truncated")] + [Reply("ok", "", {"choice": 1})] * 18)
    found = score(PLANTED, AGGREGATES, FakeClient(lambda *_: next(replies)))
    assert (found.n, found.failures, found.status) == (18, 2, "ok") and found.value is not None
    lost = score(PLANTED, AGGREGATES, FakeClient(lambda *_: Reply("refused")))
    assert (lost.value, lost.n, lost.failures, lost.status) == (None, 0, 20, "refused")


def test_bad_input_is_named() -> None:
    model, client = planted_model(), FakeClient(reader)
    with pytest.raises(UserError, match="'output' needs a live model"):
        make_evaluator("output")
    with pytest.raises(UserError, match="needs a language model"):
        Output(model, model.dictionary())
    with pytest.raises(UserError, match="shown=30, top=20"):
        score(PLANTED, AGGREGATES, client, shown=30)
    with pytest.raises(UserError, match="has 1024 in all"):
        Output(model, model.dictionary(), client, questions=1024)
    with pytest.raises(UserError, match="has no latent 1024"):
        score(1024, AGGREGATES, client)
