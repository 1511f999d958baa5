"""Generation scores on the bundled subject: signs, hand-worked figures, a latent that really fires on a word, failures."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient
from live_subject import CONSTANT, WORDS, planted_model, random_windows

from exegete.evaluators import Score, make_evaluator
from exegete.evaluators.generation_scores import GenerationScores, faithfulness
from exegete.tools.bundled.grammar import generate
from exegete.tools.errors import UserError
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Reply, Request
from exegete.tools.seeds import generator
from exegete.tools.text_activations import activations
from exegete.tools.windows import LatentEvidence, Split, Window

WORD = " LIMIT"
LIMITS = Explanation("the word LIMIT")
SPLITS: tuple[Split, ...] = ("refine", "test")


@cache
def limit_latent() -> int:
    """The latent that best tells the word from other words, over some text."""
    model = planted_model()
    prompts = [model.tokens(example.text) for example in generate(5, 30, "held_out")]
    tokens = np.concatenate([np.array(prompt) for prompt in prompts])
    found = np.concatenate(activations(model, model.dictionary(), prompts, range(CONSTANT)))
    there = tokens == model.subject.pieces.index(WORD)
    fires = found > 0
    return int((fires[there].mean(0) - fires[~there].mean(0)).argmax())


@cache
def evidence() -> LatentEvidence:
    """Requests that go on with the word and requests that do not, with the true activations."""
    model, windows = planted_model(), []
    for number, split in enumerate(SPLITS):
        examples = [model.tokens(example.text)[:-1] for example in generate(31 + number, 40, "held_out")]
        found = activations(model, model.dictionary(), examples, [limit_latent()])
        for index, (tokens, values) in enumerate(zip(examples, found, strict=True)):
            pieces = tuple(model.subject.pieces[token] for token in tokens)
            fires = bool((values > 0).any())
            kind: Any = "firing" if fires else "random"
            windows.append(Window(1_000 * number + index, pieces, values[:, 0], fires, split, kind))
    return LatentEvidence(limit_latent(), "live", tuple(windows))


def rater(prompt: str, request: Request) -> Any:
    """Writes texts with and without the word, and rates a passage 2 where it has the word, else 0."""
    if "<window 1>" in prompt:
        windows = re.findall(r"<window \d+>(.*)</window>", prompt)
        return {"ratings": [2 if WORD in window else 0 for window in windows]}
    texts = [example.text for example in generate(100 + request.sample, 60, "held_out")]
    firing = [text for text in texts if WORD in text][:5]
    return {"firing": firing, "silent": [text for text in texts if WORD not in text][:5]}


def inverted(prompt: str, request: Request) -> Any:
    """Says the opposite of `rater`."""
    answer = rater(prompt, request)
    if "ratings" in answer:
        return {"ratings": [2 - rating for rating in answer["ratings"]]}
    return {"firing": answer["silent"], "silent": answer["firing"]}


def scores(
    client: FakeClient, known: LatentEvidence | None = None, factors: Sequence[float] = (0.0, 1.0, 10.0)
) -> dict[str, Score]:
    model = planted_model()
    made = GenerationScores(model, model.dictionary(), client, items_per_class=15, prompts=10, factors=factors)
    return {s.metric: s for s in asyncio.run(made.evaluate(LIMITS, known or evidence(), None, 0)).scores}


@cache
def of_rater() -> dict[str, Score]:
    return scores(FakeClient(rater))


def test_a_true_explanation_scores_high_on_the_input_side() -> None:
    found = of_rater()
    assert list(found) == ["clarity", "responsiveness", "purity", "faithfulness"]
    for metric in ("clarity", "responsiveness"):
        value, low = found[metric].value, found[metric].low
        assert value is not None and low is not None and value > 0.8 and low > 0.1
    purity = found["purity"]
    assert purity.value is not None and purity.value > 0.8 > purity.parameters["base_rate"]
    assert (found["clarity"].n, found["clarity"].failures, found["clarity"].status) == (30, 0, "ok")


def test_an_explanation_that_says_the_opposite_has_the_opposite_sign() -> None:
    found, true = scores(FakeClient(inverted)), of_rater()
    for metric in ("clarity", "responsiveness"):
        value, other = found[metric].value, true[metric].value
        assert value is not None and other is not None and value == pytest.approx(-other)


def test_faithfulness_is_measured_at_the_factor_found_on_other_splits() -> None:
    found = of_rater()["faithfulness"]
    facts = found.parameters
    shares = facts["shares_on_other_splits"]
    assert set(shares) == {"0.0", "1.0", "10.0"} and shares[str(facts["factor"])] == max(shares.values())
    assert found.value == pytest.approx((facts["share"] - facts["share_unchanged"]) / (1 - facts["share_unchanged"]))
    assert found.status == "ok" and found.n == 10


def test_a_latent_that_writes_what_the_explanation_says_is_faithful_and_another_is_not() -> None:
    def rate(prompt: str, request: Request) -> Any:
        windows = re.findall(r"<window \d+>(.*)</window>", prompt)
        return {"ratings": [2 * any(word in window for word in WORDS) for window in windows]}

    own, other = (
        scores(FakeClient(rate), random_windows(latent, 10), factors=(0.0, 1.0, 30.0))["faithfulness"]
        for latent in (CONSTANT, 5)
    )
    assert own.parameters["factor"] == 30.0 and own.value is not None and own.low is not None
    assert own.value > 0.5 and own.low > 0.2 and own.parameters["share_unchanged"] < 0.3
    assert other.value is not None and other.value < own.low


def test_hand_worked_faithfulness() -> None:
    before, after = [True, False, False, False], [True, True, True, False]
    interval, n, status = faithfulness([*after, None], [*before, True], generator(0, "a"))
    assert interval.value == pytest.approx((0.75 - 0.25) / 0.75) and (n, status) == (4, "ok")
    assert interval.low is not None and interval.high is not None and interval.low < 0.67 < interval.high
    assert faithfulness([True, False], [True, True], generator(0, "a"))[::2] == ((None, None, None), "always_shown")
    assert faithfulness([None], [True], generator(0, "a"))[1:] == (0, "error")
    worse = faithfulness([False, False], [True, False], generator(0, "a"))[0].value
    assert worse == -1.0


def test_failures_are_counted_and_named() -> None:
    def failing(prompt: str, request: Request) -> Any:
        if "<window 1>" in prompt:
            return Reply("refused")
        return Reply("truncated") if request.sample == 0 else {"firing": ["", " "] * 2 + [WORD], "silent": ["x"] * 5}

    found = scores(FakeClient(failing))
    assert {found[metric].status for metric in ("responsiveness", "purity")} == {"refused"}
    assert found["responsiveness"].failures > 0 and found["responsiveness"].n == 0
    assert (found["faithfulness"].value, found["faithfulness"].status) == (None, "error")
    clarity = found["clarity"]
    assert clarity.parameters["failed_requests"] == 1 and clarity.n + clarity.failures == 30 and clarity.failures >= 14


def test_replies_of_the_wrong_form_are_failures() -> None:
    found = scores(FakeClient(lambda *_: {"ratings": [2], "firing": ["x"], "silent": []}))
    assert {score.value for score in found.values()} == {None}
    assert found["clarity"].status == found["purity"].status == "unparsed"


def test_without_windows_each_figure_says_so() -> None:
    bare = scores(FakeClient(rater), LatentEvidence(limit_latent(), "live", ()))
    assert [bare[m].status for m in ("responsiveness", "purity", "faithfulness")] == ["no_items"] * 3
    alike = scores(FakeClient(lambda p, r: {"ratings": [0] * p.count("<window ")}), random_windows(limit_latent(), 4))
    assert (alike["purity"].value, alike["purity"].status) == (None, "no_contrast")


def test_samples_show_the_style_and_never_a_firing_window() -> None:
    client, known = FakeClient(rater), evidence()
    windows = tuple(
        Window(w.id, w.tokens, w.activations, w.fires, "explain", w.kind) for w in known.select("refine")
    )  # fmt: skip
    scores(client, LatentEvidence(known.latent, "live", (*windows, *known.windows)))
    asked = [request for request in client.asked if "<sample>" in request.messages[-1].text]
    shown = re.findall(r"<sample>(.*)</sample>", asked[0].messages[-1].text)
    silent = {w.text.replace("\n", "⏎") for w in windows if not w.fires}
    # Tag look-alikes are escaped in what is shown.
    assert len(asked) == 3 and len(shown) == 3
    assert all(text.replace("‹", "<").replace("›", ">") in silent for text in shown)
    assert {request.sample for request in asked} == {0, 1, 2}
    assert all(json.loads(str(request.schema))["required"] == ["firing", "silent"] for request in asked)


def test_bad_input_is_named() -> None:
    model, client = planted_model(), FakeClient(rater)
    with pytest.raises(UserError, match="'generation' needs a live model"):
        make_evaluator("generation")
    with pytest.raises(UserError, match="1 \\(which changes nothing\\)"):
        GenerationScores(model, model.dictionary(), client, factors=(0.0, 2.0))
    with pytest.raises(UserError, match="requests=0"):
        GenerationScores(model, model.dictionary(), client, requests=0)
    with pytest.raises(UserError, match="has no latent 5000"):
        scores(client, LatentEvidence(5000, "live", ()))
