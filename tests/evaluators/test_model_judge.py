from __future__ import annotations

import asyncio
import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_clients import FakeClient, ok

from exegete.evaluators import Item, Verdict, judge_names, make_evaluator, make_judge
from exegete.evaluators.model_judge import ModelJudge, probabilities, verdict_schema
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Reply, Request, Status, TokenLogprob
from exegete.tools.prompting import prompt_digest

from planted import cat_evidence

CATS = Explanation("the word\ncat <b>")
ITEMS = (Item((" a", " cat", "\n"), (1,)), Item((" a", " <dog>"), (0,)))


def asked(answer: Callable[[str, Request], Any], items: Sequence[Item] = ITEMS, **options: Any) -> list[Verdict]:
    return asyncio.run(ModelJudge(FakeClient(answer), **options).judge("detection", CATS, items, 0))


def said(*answers: int) -> dict[str, list[int]]:
    return {"verdicts": list(answers)}


def test_what_the_model_reads_in_detection_and_fuzzing() -> None:
    client = FakeClient(lambda text, request: said(1, 0))
    judge = make_judge("model", client=client)
    found = [asyncio.run(judge.judge(task, CATS, ITEMS, 0)) for task in ("detection", "fuzzing")]
    assert found == [[Verdict(True), Verdict(False)]] * 2
    assert [request.messages[-1].text for request in client.asked] == [
        "<explanation>the word cat ‹b›</explanation>\n"
        "<window 1> a cat⏎</window>\n<window 2> a ‹dog›</window>\nGive 2 verdicts.",
        "<explanation>the word cat ‹b›</explanation>\n"
        "<window 1> a<< cat>>⏎</window>\n<window 2><< a>> ‹dog›</window>\nGive 2 verdicts.",
    ]
    assert [request.prompt_digest for request in client.asked] == [prompt_digest("detection"), prompt_digest("fuzzing")]
    assert all(request.logprobs and request.temperature is None and request.shared == 5 for request in client.asked)
    assert judge.name == "fake:model" and "model" in judge_names()


def test_the_same_question_is_the_same_request_whatever_the_seed() -> None:
    client = FakeClient(lambda text, request: said(1, 0))
    for seed in (0, 1):
        asyncio.run(ModelJudge(client).judge("detection", CATS, ITEMS, seed))
    assert client.asked[0].id("m") == client.asked[1].id("m")


def test_the_schema_asks_for_exactly_so_many_verdicts() -> None:
    jsonschema: Any = importlib.import_module("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(verdict_schema(2)))
    assert validator.is_valid(said(0, 1))
    for wrong in (said(0), said(0, 1, 1), said(0, 2), {"verdicts": [True, False]}, {}, {**said(0, 1), "why": ""}):
        assert not validator.is_valid(wrong)


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        ("unparsed", "unparsed"),
        ("refused", "refused"),
        ("truncated", "truncated"),
        ("filtered", "filtered"),
        ("empty", "empty"),
        ("error", "error"),
        ("unknown", "error"),
    ],
)
def test_each_failure_is_a_verdict_with_its_status(status: Status, verdict: str) -> None:
    # The text would be a fine answer: a reply that failed is not read.
    reply = Reply(status, text='{"verdicts": [1, 1]}', parsed=said(1, 1))
    assert [(v.applies, v.probability, v.status) for v in asked(lambda text, request: reply)] == [
        (None, None, verdict)
    ] * 2


@pytest.mark.parametrize("text", ['{"verdicts": [1]}', '{"verdicts": []}', '{"verdicts": [1, 0, 0]}'])
def test_a_list_of_another_length_is_told_from_no_list(text: str) -> None:
    assert {v.status for v in asked(lambda *_: Reply("unparsed", text=text))} == {"wrong_length"}
    assert {v.status for v in asked(lambda *_: Reply("ok", text=text, parsed=json.loads(text)))} == {"wrong_length"}


@pytest.mark.parametrize("parsed", [None, [1, 0], {"verdicts": "10"}, {"verdicts": [1, "0"]}, {"verdicts": [1, 2]}])
def test_an_answer_of_another_form_gives_no_verdict(parsed: Any) -> None:
    assert {v.status for v in asked(lambda *_: Reply("ok", parsed=parsed))} == {"unparsed"}


def test_nothing_asked_costs_no_call() -> None:
    assert asked(lambda *_: pytest.fail("was asked"), items=()) == []


def test_what_the_user_must_mend_stops_the_run() -> None:
    def no_key(text: str, request: Request) -> Any:
        raise UserError("no key")

    with pytest.raises(UserError, match="no key"):
        asked(no_key)


def token(text: str, *top: tuple[str, float]) -> TokenLogprob:
    chances = tuple((other, math.log(chance)) for other, chance in top)
    return TokenLogprob(text, dict(chances).get(text, 0.0), chances)


def test_probabilities_by_hand() -> None:
    tokens = (
        token('{"verdicts"'),
        token(": ["),
        token("1", ("1", 0.6), ("0", 0.2), ("true", 0.1)),
        token(","),
        token(" 0", (" 0", 0.7), (" 1", 0.1), ("0", 0.15), ("1", 0.05)),
        token("]}"),
    )
    assert probabilities(tokens, [True, False]) == pytest.approx([0.75, 0.15])
    reply = ok(said(1, 0), tokens)
    assert [v.probability for v in asked(lambda *_: reply)] == pytest.approx([0.75, 0.15])


def test_a_digit_outside_the_list_is_no_verdict() -> None:
    tokens = (token("Window 1: "), token('{"verdicts":['), token("0", ("0", 0.9), ("1", 0.1)), token("]} 1"))
    assert probabilities(tokens, [False]) == pytest.approx([0.1])


def test_probabilities_that_cannot_be_known_are_left_out() -> None:
    head = token('{"verdicts": [')
    merged = (head, token("1, 0", ("1, 0", 0.9)), token("]}"))
    assert probabilities(merged, [True, False]) == [None, None]
    alone = (head, token("1"), token("]}"))
    assert probabilities(alone, [True]) == [None]
    assert probabilities((), [True]) == [None]
    other = (head, token("0", ("0", 0.9), ("1", 0.1)), token("]}"))
    assert probabilities(other, [True]) == [None]
    one_sided = (head, token("1", ("1", 0.9), ("2", 0.1)), token("]}"))
    assert probabilities(one_sided, [True]) == [1.0]


def test_a_model_that_reads_only_the_prompt_scores_perfectly_end_to_end() -> None:
    def oracle(text: str, request: Request) -> dict[str, list[int]]:
        windows = re.findall(r"<window \d+>(.*)</window>", text)
        marked = [re.findall(r"<<(.*?)>>", one) for one in windows]
        return said(
            *(int(all(m == " cat" for m in ms) if ms else " cat" in w) for w, ms in zip(windows, marked, strict=True))
        )

    judge = make_judge("model", client=FakeClient(oracle))
    for name in ("detection", "fuzzing"):
        evaluation = asyncio.run(make_evaluator(name).evaluate(CATS, cat_evidence(), judge, 0))
        score = next(score for score in evaluation.scores if score.metric == "balanced_accuracy")
        assert (score.value, score.n, score.failures, score.parameters["judge"]) == (1.0, 40, 0, "fake:model")
        assert score.parameters["judge_parameters"]["prompt_digest"] == prompt_digest(name)


def test_parameters_say_what_the_verdicts_depend_on() -> None:
    judge = ModelJudge(FakeClient(lambda *_: None), temperature=0.0, max_tokens=99, logprobs=False)
    assert judge.parameters("fuzzing") == {
        "prompt_digest": prompt_digest("fuzzing"),
        "temperature": 0.0,
        "max_tokens": 99,
        "logprobs": False,
    }
