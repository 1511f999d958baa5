from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.effects import (
    Pair,
    coherence_cost,
    continuation_effect,
    continuation_logprobs,
    generate_pairs,
    kl_divergences,
    logit_difference,
    next_token_effect,
    paired,
)
from exegete.tools.errors import UserError
from exegete.tools.generation import Continuation, generate
from exegete.tools.interventions import CLEAN, Intervention, Tokens, ablate, clamp, patch, push, steer
from exegete.tools.live_model import Batch, LiveModel, Reading, Trial


@pytest.fixture
def steered(dictionary: Dictionary) -> Intervention:
    return steer(dictionary.fingerprint, [40], 40.0)


def _distributions(model: LiveModel, trials: Sequence[Trial]) -> Tensor:
    return torch.stack([model.run([trial], lambda r: list(r.logits.double().softmax(-1)))[0] for trial in trials])


def test_next_token_effect_is_what_single_runs_give(
    model: LiveModel, prompts: list[Tokens], steered: Intervention
) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts]
    found = next_token_effect(model, trials, top=4)
    p, q = _distributions(model, [Trial(tokens) for tokens in prompts]), _distributions(model, trials)
    change = (q - p).mean(0)
    assert [one.token for one in found.risers] == change.argsort(descending=True)[:4].tolist()
    assert [one.token for one in found.fallers] == change.argsort()[:4].tolist()
    first = found.risers[0]
    rises = (q - p)[:, first.token]
    assert first.text == model.subject.pieces[first.token]
    assert first.clean == pytest.approx(float(p[:, first.token].mean()), abs=1e-5)
    assert first.changed == pytest.approx(float(q[:, first.token].mean()), abs=1e-5)
    assert first.probability.value == pytest.approx(float(rises.mean()), abs=1e-5)
    assert first.probability.sd == pytest.approx(float(rises.std()), abs=1e-4)
    # Student's quantile with eleven degrees of freedom is 2.201.
    half = 2.201 * float(rises.std()) / math.sqrt(12)
    assert first.probability.high == pytest.approx(float(rises.mean()) + half, abs=1e-3)
    logs = (q.log() - p.log())[:, first.token]
    assert first.logprob.value == pytest.approx(float(logs.mean()), rel=1e-3)
    assert found.kl.value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    entropies = [float(-(one * one.log()).sum(-1).mean()) for one in (p, q)]
    assert [found.entropy.clean.value, found.entropy.changed.value] == pytest.approx(entropies, rel=1e-3)
    assert found.n == found.kl.n == first.probability.n == 12


def test_what_changes_nothing_has_no_risers_or_fallers(model: LiveModel, prompts: list[Tokens]) -> None:
    found = next_token_effect(model, [Trial(tokens) for tokens in prompts])
    assert (found.risers, found.fallers, found.kl.value, found.entropy.change.value) == ((), (), 0.0, 0.0)
    assert found.entropy.clean.value > 0


def test_parts_of_the_trials_make_no_difference(
    model: LiveModel, prompts: list[Tokens], steered: Intervention, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts]
    whole = next_token_effect(model, trials, by="logprob"), kl_divergences(model, trials)
    monkeypatch.setattr("exegete.tools.effects._ENTRIES", 5 * len(model.subject.pieces))
    parts = next_token_effect(model, trials, by="logprob"), kl_divergences(model, trials)
    assert [one.token for one in parts[0].risers] == [one.token for one in whole[0].risers]
    assert parts[0].risers[0].logprob == pytest.approx(whole[0].risers[0].logprob, rel=1e-4)
    assert parts[1] == pytest.approx(whole[1], rel=1e-3, abs=1e-6)


def test_risers_by_log_probability_are_ranked_by_it(
    model: LiveModel, prompts: list[Tokens], steered: Intervention
) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts]
    found = next_token_effect(model, trials, by="logprob")
    rises = [one.logprob.value for one in found.risers]
    falls = [one.logprob.value for one in found.fallers]
    assert rises == sorted(rises, reverse=True) and falls == sorted(falls)
    assert len(rises) == 10 and min(rises) > 0 and all(fall < 0 for fall in falls)
    assert [one.token for one in found.risers] != [one.token for one in next_token_effect(model, trials).risers]


def test_logit_difference_is_the_log_odds(model: LiveModel, prompts: list[Tokens], steered: Intervention) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts]
    answers = [index + 5 for index in range(len(prompts))]
    found = logit_difference(model, trials, answers, 3)
    rows = list(range(len(prompts)))
    p, q = _distributions(model, [Trial(tokens) for tokens in prompts]), _distributions(model, trials)
    clean, changed = ((one[rows, answers] / one[rows, 3]).log() for one in (p, q))
    assert [pair[0] for pair in found.values] == pytest.approx(clean.tolist(), abs=1e-3)
    assert [pair[1] for pair in found.values] == pytest.approx(changed.tolist(), abs=1e-3)
    assert found.change.value == pytest.approx(float((changed - clean).mean()), abs=1e-3)
    assert found.change.sd == pytest.approx(float((changed - clean).std()), rel=1e-2)


class TwoTokens:
    """A model of two tokens: as probable as each other, and 1 : 3 under any intervention."""

    def __init__(self) -> None:
        cfg = SimpleNamespace(d_vocab=2)
        self.subject = SimpleNamespace(bridge=SimpleNamespace(cfg=cfg), device="cpu", pieces=["no", "yes"], name="two")

    def check(self, trials: Sequence[Trial]) -> None:
        if not trials:
            raise UserError("there is no prompt to run; give at least one")

    def run(self, trials: Sequence[Trial], read: Callable[[Reading], Sequence[Any]]) -> list[Any]:
        rows = [[0.0, math.log(3) if trial.intervention else 0.0] for trial in trials]
        return list(read(Reading(Batch(trials, torch.zeros(0), torch.zeros(0)), torch.tensor(rows))))


def test_a_hand_worked_change_of_two_tokens() -> None:
    two: Any = TwoTokens()
    trials = [Trial((0,), push("anywhere", [1.0], 1.0)), Trial((1,), push("anywhere", [1.0], 1.0))]
    found = next_token_effect(two, trials)
    (riser,), (faller,) = found.risers, found.fallers
    assert (riser.text, faller.text) == ("yes", "no")
    assert (riser.clean, riser.changed) == pytest.approx((0.5, 0.75))
    assert riser.probability == pytest.approx((0.25, 0.25, 0.25, 0.0, 2), abs=1e-6)
    assert faller.probability.value == pytest.approx(-0.25)
    assert riser.logprob.value == pytest.approx(math.log(1.5))
    assert faller.logprob.value == pytest.approx(math.log(0.5))
    assert found.kl.value == pytest.approx(0.5 * math.log(4 / 3))
    assert found.entropy.clean.value == pytest.approx(math.log(2))
    assert found.entropy.changed.value == pytest.approx(2 * math.log(2) - 0.75 * math.log(3))
    assert logit_difference(two, trials, 1, 0).change.value == pytest.approx(math.log(3))


KINDS = [
    *("clean", "from the last token", "everywhere", "at numbered tokens"),
    *("patched", "resampled", "pushed, and ablated"),
]


def _interventions(dictionary: Dictionary, prompts: Sequence[Tokens]) -> dict[str, Intervention]:
    name, point = dictionary.fingerprint, dictionary.hook_point
    vector = [1.0 + index % 3 for index in range(dictionary.width)]
    return {
        "clean": CLEAN,
        "from the last token": steer(name, [40], 30.0),
        "everywhere": clamp(name, [40, 3], 20.0, "all"),
        "at numbered tokens": clamp(name, [40], 40.0, (-1, 2)),
        "patched": patch(name, list(range(200)), prompts[0]),
        "resampled": ablate(name, list(range(300)), texts=prompts[:3], seed=4),
        "pushed, and ablated": push(point, vector, 1.0) + ablate(name, list(range(100))),
    }


@pytest.mark.parametrize("what", KINDS)
def test_a_given_continuation_has_the_log_probabilities_that_writing_it_gave(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens], what: str
) -> None:
    prompts = prompts[:4]
    trials = [Trial(tokens, _interventions(dictionary, prompts)[what]) for tokens in prompts]
    written = generate(model, trials, 7, temperature=1.5, seed=1)
    # Of different lengths, as where a continuation ends early.
    written = [
        Continuation(one.tokens[: 4 + index], one.logprobs[: 4 + index], False) for index, one in enumerate(written)
    ]
    found = continuation_logprobs(model, trials, [one.tokens for one in written])
    for logprobs, one in zip(found, written, strict=True):
        assert logprobs == pytest.approx(one.logprobs, abs=1e-3)
    if what != "clean":
        unchanged = continuation_logprobs(model, [Trial(tokens) for tokens in prompts], [one.tokens for one in written])
        assert max(abs(a - b) for x, y in zip(found, unchanged, strict=True) for a, b in zip(x, y, strict=True)) > 0.1


def test_last_stays_the_last_token_of_the_prompt(
    model: LiveModel, prompts: list[Tokens], steered: Intervention
) -> None:
    tokens, continuation = prompts[0], (5, 6, 7)
    (found,) = continuation_logprobs(model, [Trial(tokens, steered)], [continuation])

    def step(read: Tokens, positions: tuple[int, ...]) -> Tensor:
        numbered = Intervention(tuple(replace(edit, positions=positions) for edit in steered.edits))
        logprobs: list[Tensor] = model.run(
            [Trial(read, numbered)], lambda reading: list(reading.logits.log_softmax(-1))
        )
        return logprobs[0]

    for index, token in enumerate(continuation):
        read = tokens + continuation[:index]
        logprobs = step(read, tuple(range(len(tokens) - 1, len(read))))
        assert found[index] == pytest.approx(float(logprobs[token]), abs=1e-3)
    assert found[2] != pytest.approx(float(step(read, (-1,))[7]), abs=1e-2)


def test_an_empty_continuation_has_no_log_probability_and_no_effect(
    model: LiveModel, prompts: list[Tokens], steered: Intervention
) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts[:2]]
    found = continuation_logprobs(model, trials, [(), (5,)])
    assert found[0] == () and len(found[1]) == 1
    assert continuation_logprobs(model, trials[:1], [()]) == [()]
    with pytest.raises(UserError, match="continuation 0 is empty"):
        continuation_effect(model, trials, [(), (5,)])


def test_continuation_effect_adds_up_the_tokens(model: LiveModel, prompts: list[Tokens], steered: Intervention) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts[:3]]
    texts = [(5, 6), (7,), (8, 9, 10)]
    found = continuation_effect(model, trials, texts)
    for index, (clean, changed) in enumerate(found.values):
        alone = [Trial(trials[index].tokens), trials[index]]
        sums = [sum(one) for one in continuation_logprobs(model, alone, [texts[index]] * 2)]
        assert (clean, changed) == pytest.approx(tuple(sums), abs=1e-3)
    assert found.change.value == pytest.approx(sum(b - a for a, b in found.values) / 3)


def test_pairs_share_their_random_numbers(model: LiveModel, prompts: list[Tokens], steered: Intervention) -> None:
    same = generate_pairs(model, [Trial(tokens) for tokens in prompts], 6)
    assert [pair.clean for pair in same] == [pair.changed for pair in same]
    pairs = generate_pairs(model, [Trial(tokens, steered) for tokens in prompts], 6)
    assert [pair.clean.tokens for pair in pairs] == [pair.clean.tokens for pair in same]
    assert [pair.clean.tokens for pair in pairs] != [pair.changed.tokens for pair in pairs]
    other = generate_pairs(model, [Trial(tokens, draw=1) for tokens in prompts], 6, temperature=2.0)
    assert [pair.clean.tokens for pair in other] != [pair.clean.tokens for pair in same]


def test_coherence_costs_nothing_without_an_intervention_and_much_under_a_strong_one(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    def cost(strength: float) -> float:
        trials = [Trial(tokens, steer(dictionary.fingerprint, [40], strength)) for tokens in prompts]
        found = coherence_cost(model, prompts, generate_pairs(model, trials, 6))
        assert found.ratio.value == pytest.approx(found.changed.value / found.clean.value)
        assert found.clean.value >= 1 and found.left_out + found.clean.n == len(prompts)
        return found.ratio.value

    assert cost(0.0) == pytest.approx(1.0)
    assert cost(60.0) > 3


def test_coherence_is_the_exponential_of_the_mean_loss(model: LiveModel, prompts: list[Tokens]) -> None:
    def text(*tokens: int) -> Continuation:
        return Continuation(tokens, (0.0,) * len(tokens), False)

    pairs = [Pair(text(5, 6), text(7)), Pair(text(8), text(9, 10)), Pair(text(), text(5))]
    found = coherence_cost(model, prompts[:3], pairs)
    trials = [Trial(tokens) for tokens in prompts[:2]]
    clean = [sum(one) / len(one) for one in continuation_logprobs(model, trials, [(5, 6), (8,)])]
    changed = [sum(one) / len(one) for one in continuation_logprobs(model, trials, [(7,), (9, 10)])]
    assert found.clean.value == pytest.approx(math.exp(-sum(clean) / 2), rel=1e-4)
    assert found.changed.value == pytest.approx(math.exp(-sum(changed) / 2), rel=1e-4)
    assert (found.left_out, found.ratio.n) == (1, 2)
    assert paired([(1.0, 3.0), (2.0, 3.0)]).change.value == 1.5


def test_bad_input_is_refused(model: LiveModel, prompts: list[Tokens], steered: Intervention) -> None:
    trials = [Trial(tokens, steered) for tokens in prompts[:2]]
    empty = Pair(Continuation((), (), True), Continuation((5,), (0.0,), False))
    room = model.subject.max_context
    calls: dict[str, Callable[[], Any]] = {
        "top is 0": lambda: next_token_effect(model, trials, top=0),
        "no prompt": lambda: next_token_effect(model, []),
        "token 99999 is not one": lambda: logit_difference(model, trials, 99_999, 0),
        "3 tokens are given for 2 trials": lambda: logit_difference(model, trials, 0, [1, 2, 3]),
        "1 continuations are given for 2": lambda: continuation_logprobs(model, trials, [(5,)]),
        f"subject .* takes {room}": lambda: continuation_logprobs(model, trials[:1], [(5,) * room]),
        "token -1 is not one": lambda: continuation_logprobs(model, trials[:1], [(-1,)]),
        "1 pairs of texts are given for 2": lambda: coherence_cost(model, prompts[:2], [empty]),
        "none of 1 pairs": lambda: coherence_cost(model, prompts[:1], [empty]),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message):
            call()


def test_logits_that_are_not_finite_are_an_error(
    model: LiveModel, prompts: list[Tokens], dictionary: Dictionary
) -> None:
    huge = push(dictionary.hook_point, [3e38] * dictionary.width, 1.0)
    huge += huge
    with pytest.raises(UserError, match="logits under an intervention are not finite"):
        kl_divergences(model, [Trial(prompts[0], huge)])
