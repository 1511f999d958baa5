"""The minimal set on a behaviour of the bundled subject, and on a judge whose minimal set is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from exegete.tools.ablation_sets import Ablation, random_sets
from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.controls import firing_rates
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.intervals import mean, share
from exegete.tools.interventions import LatentEdit, Tokens
from exegete.tools.judged_behaviours import Margin, Prefers, Says, WrittenBehaviour, judged, measured
from exegete.tools.live_model import LiveModel, Trial
from exegete.tools.minimal_set import minimal_set
from exegete.tools.subject import Subject

# Of the tests dictionary: the latents that an exact ablation of each finds to carry `ORDER BY … DESC`, and bystanders.
CARRIERS = (954, 253, 205)
CANDIDATES = (954, 523, 253, 49, 205, 1010, 515, 325, 843)


@dataclass(frozen=True)
class Situation:
    prompts: list[Tokens]
    answers: dict[Tokens, int]
    others: dict[Tokens, int]
    sources: dict[Tokens, Tokens]


@pytest.fixture(scope="module")
def descending(subject: Subject) -> Situation:
    """Eight prompts after which DESC follows, and the ones that say ascending."""
    pieces = {piece: token for token, piece in enumerate(subject.pieces)}
    assert subject.bos is not None
    begin = (subject.bos,)
    found = Situation([], {}, {}, {})
    behaviour = next(one for one in behaviours() if one.name == "order.DESC")
    for pair in behaviour.pairs(0, 8):
        base, variant = (begin + tuple(pieces[piece] for piece in side) for side in (pair.base, pair.variant))
        found.prompts.append(base)
        found.answers[base], found.others[base] = pieces[pair.base_answer], pieces[pair.variant_answer]
        found.sources[base] = variant
    return found


def ablated_in(trial: Trial) -> set[int]:
    return {k for edit in trial.intervention.edits if isinstance(edit, LatentEdit) for k in edit.latents}


@dataclass(frozen=True)
class Known:
    """A behaviour that goes exactly when `gone` says so of the ablated latents."""

    gone: Callable[[set[int], Tokens], bool]
    calls: list[int]

    def __call__(self, model: LiveModel, trials: Sequence[Trial]) -> list[float]:
        self.calls.append(len(trials))
        return [float(not self.gone(ablated_in(trial), trial.tokens)) for trial in trials]


def known(gone: Callable[[set[int], Tokens], bool]) -> Known:
    return Known(gone, [])


def test_a_known_set_is_found_among_many(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    judge = known(lambda latents, _: {7, 41, 60} <= latents or {3, 70} <= latents)
    found = minimal_set(model, dictionary, range(100), prompts, judge, controls=5)
    assert found.status == "minimal"
    # The first 61 candidates hold 7, 41 and 60; the pair with 70 lies beyond the smallest prefix.
    assert found.latents == (7, 41, 60)
    assert found.search.flipped.value == 1.0 and found.search.flipped.n == 12
    assert found.search.flipped.low == pytest.approx(12 / (12 + 1.959964**2))
    assert [step.size for step in found.trace if step.stage == "prefix"] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        100,
        48,
        56,
        60,
        62,
        61,
    ]
    pruned = [step.size for step in found.trace if step.stage == "pruned"]
    assert pruned == sorted(pruned, reverse=True) and pruned[-1] == 3
    assert found.search.random.status == "measured" and found.search.random.flipped == (0.0,) * 5
    # All sets of a round run in one call: eight prefixes and five steps of bisection, two calls for a round, three others.
    assert len(judge.calls) < 60 and max(judge.calls) >= 61 * 12 - 12


def test_no_single_latent_can_be_dropped(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    # Each prompt rests on a latent of its own; nine tenths of twelve prompts are eleven latents.
    judge = known(lambda latents, prompt: prompts.index(prompt) in latents)
    found = minimal_set(model, dictionary, range(40), prompts, judge, controls=0)
    assert (found.status, len(found.latents)) == ("minimal", 11)
    assert found.search.flipped.value == pytest.approx(11 / 12)
    assert found.search.random.status == "not asked for" and found.search.random.mean is None


def test_latents_that_work_against_each_other(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    # 0 takes the behaviour away and 1 gives half of it back, so no prefix beyond the first flips all.
    even = set(prompts[::2])
    judge = known(lambda latents, prompt: {0, 2} <= latents and (1 not in latents or prompt in even))
    found = minimal_set(model, dictionary, range(8), prompts, judge, controls=0)
    assert found.status == "minimal" and found.latents == (0, 2)
    assert found.search.flipped.value == 1.0


def test_not_reached(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    judge = known(lambda latents, prompt: 5 in latents and prompt in prompts[:3])
    found = minimal_set(model, dictionary, range(30), prompts, judge, held_out=prompts[:2], controls=3)
    assert found.status == "not reached" and found.latents == (5,)
    assert found.search.flipped.value == 3 / 12
    assert found.held_out is None and found.held_out_prompts.repeated == 2


def test_most_bounds_the_candidates(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    judge = known(lambda latents, _: 9 in latents)
    assert minimal_set(model, dictionary, range(20), prompts, judge, most=9, controls=0).status == "not reached"
    found = minimal_set(model, dictionary, range(20), prompts, judge, most=10, controls=0)
    assert (found.status, found.latents, found.candidates) == ("minimal", (9,), 10)


def test_prompts_that_do_not_show_it_or_come_twice_are_left_out_and_counted(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    judge = known(lambda latents, prompt: 4 in latents or prompt in prompts[:3])
    found = minimal_set(
        model, dictionary, [4], [*prompts[:6], prompts[5]], judge, held_out=[*prompts[5:], prompts[0]], controls=0
    )
    assert found.search_prompts == type(found.search_prompts)(given=7, repeated=1, without=3, used=3)
    assert found.held_out_prompts == type(found.search_prompts)(given=8, repeated=2, without=0, used=6)
    assert found.held_out is not None and found.held_out.flipped.n == 6


def test_no_prompt_shows_it(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    with pytest.raises(UserError, match="none of the 12 prompts shows the behaviour"):
        minimal_set(model, dictionary, [1], prompts, known(lambda latents, _: True))


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ([], {}, "there are no candidates"),
        ([3, 4, 3], {}, "latent 3 is among the candidates more than once"),
        ([3, 4000], {}, "has no latent 4000"),
        ([3.5], {}, "candidates are numbers of latents"),
        ([3], {"wanted": 0.0}, "wanted is 0.0"),
        ([3], {"wanted": float("nan")}, "wanted is nan"),
        ([3], {"most": 0}, "most 0"),
        ([3], {"rates": [0.1, 0.2]}, r"rates have shape \(2,\)"),
        ([3], {"rates": [float("nan")] * 1024}, "a firing rate is nan"),
        ([3], {"ablation": Ablation(means=[1.0])}, "1 means are given"),
        ([3], {"ablation": Ablation(means=[0.0] * 1024, texts=((5, 6),))}, "one of means, texts and sources"),
        ([3], {"ablation": Ablation(sources={})}, "no source is given for the prompt"),
    ],
)
def test_bad_input(
    model: LiveModel,
    dictionary: Dictionary,
    prompts: list[Tokens],
    candidates: list[int],
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        minimal_set(model, dictionary, candidates, prompts, known(lambda latents, _: bool(latents)), **options)  # type: ignore[arg-type]


def test_no_prompts(model: LiveModel, dictionary: Dictionary) -> None:
    with pytest.raises(UserError, match="there are no prompts"):
        minimal_set(model, dictionary, [1], [], known(lambda latents, _: True))


@pytest.mark.parametrize(("score", "message"), [(float("nan"), "is nan on the prompt"), (1.5, "returned 1.5")])
def test_a_judge_that_says_nonsense(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens], score: float, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        minimal_set(model, dictionary, [1], prompts, lambda model, trials: [score] * len(trials))
    with pytest.raises(UserError, match="1 numbers for 12 trials"):
        minimal_set(model, dictionary, [1], prompts, lambda model, trials: [1.0])


def test_on_the_bundled_subject(model: LiveModel, dictionary: Dictionary, descending: Situation) -> None:
    judge = Prefers(descending.answers, descending.others)
    search, held_out = descending.prompts[:5], descending.prompts[5:8]
    found = minimal_set(model, dictionary, CANDIDATES[:5], search, judge, held_out=held_out, wanted=0.8, controls=3)
    assert found.status == "minimal" and 954 in found.latents and len(found.latents) <= 4
    assert found.search.flipped.value >= 0.8 and found.search.clean_score > 0.99
    assert found.held_out is not None and found.held_out.flipped.n == 3
    assert found.held_out.random.mean == 0.0 and found.held_out.random.rate == pytest.approx(found.rate, rel=0.3)
    # The same again, a few prompts at a time: neither seeds nor batches change anything.
    alone = LiveModel(model.subject, [dictionary], batch_tokens=400)
    again = minimal_set(alone, dictionary, CANDIDATES[:5], search, judge, held_out=held_out, wanted=0.8, controls=3)
    assert (again.latents, again.trace) == (found.latents, found.trace)
    assert again.held_out is not None and again.held_out.random == found.held_out.random


def test_interchange_takes_the_other_prompts_answer(
    model: LiveModel, dictionary: Dictionary, descending: Situation
) -> None:
    judge = Prefers(descending.answers, descending.others)
    every = Ablation(sources=descending.sources)
    trials = every.trials(dictionary, [(), range(1024)], descending.prompts[:3])
    clean, exchanged = np.split(judged(model, judge, trials), 2)
    assert (clean > 0.99).all() and (exchanged < 0.01).all()


def test_next_token_judges_agree_with_the_logits(
    model: LiveModel, dictionary: Dictionary, descending: Situation
) -> None:
    trials = Ablation().trials(dictionary, [(), CARRIERS], descending.prompts[:5])
    logits = np.stack(model.run(trials, lambda reading: list(reading.logits.cpu().numpy())))
    answers = [descending.answers[trial.tokens] for trial in trials]
    others = [descending.others[trial.tokens] for trial in trials]
    rows = np.arange(len(trials))
    margins = logits[rows, answers] - logits[rows, others]
    np.testing.assert_allclose(
        measured(model, Margin(descending.answers, descending.others), trials), margins, atol=1e-4
    )
    prefers = judged(model, Prefers(descending.answers, descending.others), trials)
    np.testing.assert_allclose(prefers, 1 / (1 + np.exp(-margins)), atol=1e-5)
    says = judged(model, Says(descending.answers), trials)
    assert ((says > 0.5) == (logits.argmax(1) == answers)).all() and (says[:5] > 0.5).all() and (says[5:] <= 0.5).any()


def test_answers_that_are_not_there(model: LiveModel, descending: Situation) -> None:
    trial = Trial(descending.prompts[0])
    with pytest.raises(UserError, match="no answer is given for the prompt"):
        judged(model, Says({}), [trial])
    with pytest.raises(UserError, match="answer 99999 is not a token"):
        judged(model, Says(99_999), [trial])


def test_a_written_behaviour(model: LiveModel, dictionary: Dictionary, descending: Situation) -> None:
    asked: list[tuple[str, str]] = []

    def judge(prompt: str, written: str) -> float:
        asked.append((prompt, written))
        return float(written.startswith(" DESC"))

    behaviour = WrittenBehaviour(judge, tokens=2, temperature=0.0, draws=3)
    found = minimal_set(model, dictionary, CANDIDATES[:3], descending.prompts[:4], behaviour, wanted=0.7, controls=0)
    assert found.status == "minimal" and 954 in found.latents
    assert found.search.clean_score == 1.0
    assert all("ORDER BY" in prompt for prompt, _ in asked)
    # At temperature 0 the three continuations of a trial are one, which is judged once in a call.
    asked.clear()
    trials = [Trial(prompt) for prompt in descending.prompts[:4]]
    assert judged(model, behaviour, trials).tolist() == [1.0] * 4
    assert len(asked) == 4
    with pytest.raises(UserError, match="draws is 0"):
        WrittenBehaviour(judge, tokens=2, draws=0)


def test_written_scores_do_not_depend_on_the_batch(model: LiveModel, descending: Situation) -> None:
    behaviour = WrittenBehaviour(lambda _, written: min(1.0, len(written) / 40), tokens=6, temperature=1.5, draws=2)
    trials = [Trial(prompt) for prompt in descending.prompts[:5]]
    together = judged(model, behaviour, trials)
    assert together.tolist() == [float(judged(model, behaviour, [trial])[0]) for trial in trials]


def test_random_sets_are_matched_and_reproducible(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    rates = firing_rates(model, dictionary, prompts)
    tokens = sum(token not in model.subject.special_tokens for prompt in prompts for token in prompt)
    # TopK keeps 16 at most for each token.
    assert 10 * tokens < rates.sum() * tokens <= 16 * tokens
    chosen = [int(k) for k in np.argsort(-rates)[20:200:30]]
    sets = random_sets(chosen, rates, 5, seed=3)
    assert sets == random_sets(chosen, rates, 5, seed=3) != random_sets(chosen, rates, 5, seed=4)
    assert sets[:2] == random_sets(chosen, rates, 2, seed=3)
    for one in sets:
        assert len(set(one)) == len(chosen) and not set(one) & set(chosen) and (rates[list(one)] > 0).all()
        np.testing.assert_allclose(np.log(rates[list(one)]), np.log(rates[chosen]), atol=0.5)


def test_too_few_live_latents_for_random_sets_is_said(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    rates = np.zeros(dictionary.latents)
    rates[[3, 8]] = 0.1
    found = minimal_set(model, dictionary, [3, 5], prompts, known(lambda latents, _: {3, 5} <= latents), rates=rates)
    assert found.search.random.status == "too few live latents outside the set"
    assert found.search.random.mean is None and found.search.random.high is None


def test_hand_worked_intervals() -> None:
    # Wilson for 8 of 10: (0.8 + 1.9208/10 ± 1.96·√(0.016 + 0.0096036)) / 1.38416
    rate = share(np.array([True] * 8 + [False] * 2))
    assert (rate.value, rate.n) == (0.8, 10)
    assert [rate.low, rate.high] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    # 1, 2, 3: standard error 1/√3, Student's quantile for 2 degrees of freedom 4.3027.
    figure = mean(np.array([1.0, 2.0, 3.0]))
    assert [figure.value, figure.low, figure.high] == pytest.approx([2.0, -0.4841, 4.4841], abs=1e-4)
    assert mean(np.array([1.0])).high == np.inf
