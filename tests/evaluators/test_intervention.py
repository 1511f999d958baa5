"""Intervention on the bundled subject: planted output latents against random ones, controls, statuses, bad input."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient
from live_subject import DEAD, PLANTED, WORDS, planted_model, random_windows, rates
from scipy.stats import binomtest

from exegete.evaluators import Score, make_evaluator
from exegete.evaluators.effect_passages import Steering, select_prompts
from exegete.evaluators.forced_choice import choose
from exegete.evaluators.intervention import Intervention
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.llm import PromptScorer, Reply, Request, open_scorer
from exegete.tools.prompting import line, render
from exegete.tools.rendering import escape
from exegete.tools.windows import LatentEvidence, Split, Window

STORIES = Path(__file__).parents[3] / "shared/data/models/stories260K/hf"
AGGREGATES = Explanation("aggregate functions: " + ",".join(WORDS))
QUICK = Steering(prompts=12)


def reader(prompt: str, request: Request) -> Any:
    """Counts the words that the explanation names in both continuations; without a difference it answers 1."""
    explanation, rest = prompt.split("</explanation>")
    words = [f" {word}" for word in re.findall(r"[A-Z]{3,}", explanation)]
    first, second = re.findall(r"<continuation \d>(.*)</continuation>", rest)
    counts = [sum(text.count(word) for word in words) for text in (first, second)]
    return {"choice": 2 if counts[1] > counts[0] else 1}


class WordScorer:
    """Log-probability of an explanation: one nat for each of its words in the passage."""

    name = "hf:words"

    async def logprobs(self, prompt: str, continuations: Sequence[str]) -> list[float]:
        passage = prompt.split("Passage: ")[1].split("\nDescription:")[0]
        return [float(sum(passage.count(word) for word in WORDS if word in text)) for text in continuations]


def intervention(
    client: FakeClient | None = None, scorer: PromptScorer | None = None, rated: np.ndarray | None = None
) -> Intervention:
    model = planted_model()
    known = rates() if rated is None else rated
    return Intervention(model, model.dictionary(), known, client=client, scorer=scorer, steering=QUICK)


@cache
def reading() -> Intervention:
    """Shared, since it keeps the passages."""
    return intervention(FakeClient(reader))


def scores(made: Intervention, latent: int, explanation: Explanation = AGGREGATES, seed: int = 0) -> dict[str, Score]:
    evaluation = asyncio.run(made.evaluate(explanation, random_windows(latent, QUICK.prompts), None, seed))
    return {score.metric: score for score in evaluation.scores}


@cache
def of_planted() -> dict[str, Score]:
    return scores(reading(), PLANTED)


def test_a_planted_output_latent_is_told_from_its_controls_at_equal_kl() -> None:
    found = of_planted()
    assert set(found) == {"accuracy", "accuracy_random_latent", "accuracy_random_direction"}
    own, latent, direction = found.values()
    assert own.value is not None and own.low is not None and own.value >= 0.8 and own.low > 0.5
    for control in (latent, direction):
        assert control.value is not None and control.value < own.low and control.low is not None and control.low < 0.5
    for score in found.values():
        assert (score.n, score.failures, score.status) == (12, 0, "ok")
        assert score.parameters["kl"] == pytest.approx(0.5, rel=0.1)
    assert latent.parameters["latent"] >= DEAD and latent.parameters["rate"] == own.parameters["rate"] == 0.0


def test_the_explanation_says_nothing_of_a_random_latent() -> None:
    found = scores(reading(), DEAD + 3)["accuracy"]
    assert found.value is not None and of_planted()["accuracy"].value is not None
    assert found.value < 0.8 and found.low is not None and found.low < 0.5


def test_another_explanation_of_the_planted_latent_scores_at_chance() -> None:
    found = scores(reading(), PLANTED, Explanation("DISTINCT values"))["accuracy"]
    assert found.low is not None and found.high is not None and found.low < 0.5 < found.high


def test_log_probability_mode() -> None:
    found = scores(intervention(scorer=WordScorer()), PLANTED)
    own, latent, direction = found.values()
    assert list(found) == ["information", "information_random_latent", "information_random_direction"]
    assert own.value is not None and own.low is not None and own.low > 0 and own.parameters["scorer"] == "hf:words"
    for control in (latent, direction):
        assert control.value is not None and abs(control.value) < own.value


@pytest.mark.skipif(not STORIES.exists(), reason="../shared/data/models/stories260K is absent")
def test_log_probability_mode_on_a_local_model_is_the_mean_gain_over_passages() -> None:
    scorer = open_scorer(f"hf:{STORIES}")
    made = intervention(scorer=scorer)
    found = scores(made, PLANTED, Explanation("numbers of things"))["information"]
    (kept,) = made._kept.values()
    head = "Each entry gives a passage, and then a description of what it shows.\n\nPassage: "

    async def logprob(text: str) -> float:
        (found,) = await scorer.logprobs(f"{head}{escape(text)}\nDescription:", [" numbers of things"])
        return found

    async def gains() -> list[float]:
        shown = [(one.prompt + one.steered, one.prompt + one.clean) for one in kept[0].passages]
        return [await logprob(steered) - await logprob(clean) for steered, clean in shown]

    expected = asyncio.run(gains())
    assert found.value == pytest.approx(np.mean(expected), abs=1e-4) and np.std(expected) > 0.01
    assert (found.n, found.failures, found.status) == (12, 0, "ok")


def test_the_same_seed_gives_the_same_scores_and_passages_are_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from exegete.evaluators import effect_passages

    searched = effect_passages.arms
    made, calls = intervention(FakeClient(reader)), 0

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return searched(*given)

    monkeypatch.setattr("exegete.evaluators.intervention.arms", counted)
    first = scores(made, PLANTED)
    scores(made, PLANTED, Explanation("something else"))
    assert first == of_planted() and calls == 1


def test_prompts_are_cut_after_the_first_firing_token_and_matched_on_other_splits() -> None:
    pieces = random_windows(5, 12).windows[0].tokens
    fires = np.zeros(len(pieces), dtype=np.float32)
    fires[[4, 7]] = 1.0, 2.0
    splits: tuple[Split, ...] = ("explain", "refine", "test", "test")
    windows = tuple(
        Window(number, (*pieces[:number], *pieces[number + 1 :], pieces[0]), fires, True, split, "firing")
        for number, split in enumerate(splits)
    )
    model = planted_model()
    prompts = select_prompts(model, LatentEvidence(5, "live", windows), "test", 20)
    text = ["".join(window.tokens[:5]) for window in windows]
    assert [model.text(tokens) for tokens in prompts.scored] == [text.replace("<bos>", "") for text in text[2:]]
    assert len(prompts.matching) == 2 and not set(prompts.matching) & set(prompts.scored)
    assert prompts.cut == "first_firing" and prompts.tokenised_again == 0
    assert all(tokens.count(0) == 1 and tokens[0] == 0 for tokens in (*prompts.scored, *prompts.matching))


def test_words_that_are_scored_are_never_matched_on() -> None:
    evidence = random_windows(5, 4)
    copies = tuple(replace(window, split="refine") for window in evidence.select("test"))
    prompts = select_prompts(planted_model(), replace(evidence, windows=(*copies, *evidence.select("test"))), "test", 9)
    assert len(prompts.scored) == 4 and prompts.matching == ()


def test_text_that_is_no_token_is_tokenised_again() -> None:
    window = Window(0, (" SELECT", " name FROM"), None, False, "test", "random")
    prompts = select_prompts(planted_model(), LatentEvidence(1, "dead", (window,)), "test", 9)
    assert prompts.tokenised_again == 1 and planted_model().text(prompts.scored[0]) == " SELECT name FROM"


@pytest.mark.parametrize(("splits", "status"), [(("refine",), "no_items"), (("test",), "no_matching_prompts")])
def test_without_prompts_there_is_a_status(splits: Any, status: str) -> None:
    evidence = random_windows(PLANTED, 3, splits)
    (found,) = asyncio.run(reading().evaluate(AGGREGATES, evidence, None, 0)).scores
    assert (found.value, found.n, found.status) == (None, 0, status)


def test_a_kl_out_of_reach_and_a_missing_control_are_recorded() -> None:
    alone = rates().copy()
    alone[PLANTED] = 0.0
    alone[DEAD:] = 0.01
    model = planted_model()
    steering = Steering(target_kl=60.0, batches=2, prompts=3)
    made = Intervention(model, model.dictionary(), alone, client=FakeClient(reader), steering=steering)
    own, latent, direction = scores(made, PLANTED).values()
    assert (own.value, own.status) == (None, "unreachable") and own.parameters["strength"] is None
    assert (latent.value, latent.status) == (None, "no_control")
    assert (direction.value, direction.status) == (None, "unreachable")


def test_failures_of_the_client_are_counted() -> None:
    made = intervention(FakeClient(lambda *_: Reply("refused")))
    found = scores(made, PLANTED)["accuracy"]
    assert (found.value, found.status) == (None, "refused")
    assert found.failures == 12 - found.parameters["alike"] > 0


def pairs(client: FakeClient, given: Sequence[tuple[str, str]], seed: int = 0) -> Any:
    def ask(index: int, first: Any, second: Any) -> Any:
        return render("effect_choice", explanation=line("x"), text=line("y"), first=line(first), second=line(second))

    return asyncio.run(choose(client, given, ask, seed))


def test_who_always_answers_one_is_right_half_of_the_time() -> None:
    found = pairs(FakeClient(lambda *_: {"choice": 1}), [("right", "wrong")] * 40)
    assert found.accuracy().value == 0.5
    other = pairs(FakeClient(lambda *_: {"choice": 1}), [("right", "wrong")] * 40, seed=1)
    assert found.outcomes != other.outcomes


def test_hand_worked_accuracy_with_alike_pairs_and_failures() -> None:
    def answer(prompt: str, request: Request) -> Any:
        if "lost" in prompt:
            return {"choice": 3}
        return {"choice": 1 if "1>good" in prompt else 2}

    given = [("good", "bad")] * 7 + [("bad", "good"), ("same", "same"), ("same", "same"), ("lost", "x")]
    found = pairs(FakeClient(answer), given)
    interval = binomtest(8, 10).proportion_ci(method="wilson")
    assert found.accuracy() == pytest.approx((0.8, interval.low, interval.high))
    assert (found.failures, found.statuses[-3:]) == (1, ("alike", "alike", "unparsed"))


def test_pairs_that_read_alike_give_no_accuracy_where_every_question_failed() -> None:
    failing = FakeClient(lambda *_: Reply("error"))
    lost = pairs(failing, [("same", "same"), ("right", "wrong")])
    assert (lost.accuracy().value, lost.status, lost.failures) == (None, "error", 1)
    alike = pairs(failing, [("same", "same")] * 4)
    assert (alike.accuracy().value, alike.status) == (0.5, "ok")


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match="needs a live model"):
        make_evaluator("intervention")
    with pytest.raises(UserError, match="not with both"):
        intervention(FakeClient(reader), WordScorer())
    with pytest.raises(UserError, match="not with both"):
        intervention()
    with pytest.raises(UserError, match="has no latent 4000"):
        scores(reading(), 4000)
    with pytest.raises(UserError, match="one firing rate for each of the 1024"):
        scores(intervention(FakeClient(reader), rated=rates()[:10]), PLANTED)
