from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.estimates import estimate
from exegete.tools.interventions import Intervention, Tokens, VectorEdit, push, steer
from exegete.tools.live_model import Batch, LiveModel, Reading, Trial
from exegete.tools.strength import kl_divergence, match_strength, match_strengths

HALF_A_NAT = 2 * math.acosh(math.exp(0.5))
"""2.170: for logits (0, s) against (0, 0) the divergence is log cosh(s / 2), hence 0.5 nats here."""


class TwoTokens:
    """A model of two tokens whose second logit is a function of strength, the same for every prompt but for a factor."""

    def __init__(self, curve: Callable[[float], float] = lambda s: s) -> None:
        self.subject = SimpleNamespace(bridge=SimpleNamespace(cfg=SimpleNamespace(d_vocab=2)))
        self.curve = curve
        self.calls: list[int] = []
        self.most = math.inf

    def check(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if _strength(trial.intervention) > self.most:
                raise UserError(f"a strength is {_strength(trial.intervention)}; float16 holds at most {self.most}")

    def run(self, trials: Sequence[Trial], read: Callable[[Reading], Sequence[Any]]) -> list[Any]:
        self.calls.append(len(trials))
        rows = [[0.0, trial.tokens[-1] * self.curve(_strength(trial.intervention))] for trial in trials]
        return list(read(Reading(Batch(trials, torch.zeros(0), torch.zeros(0)), torch.tensor(rows))))


def _strength(intervention: Intervention) -> float:
    edits = [edit for edit in intervention.edits if isinstance(edit, VectorEdit)]
    return sum(edit.strength for edit in edits)


def two_tokens(curve: Callable[[float], float] = lambda s: s) -> Any:
    return TwoTokens(curve)


def shift(strength: float) -> Intervention:
    return push("anywhere", [1.0], strength)


def test_kl_divergence_of_known_distributions() -> None:
    clean = torch.tensor([[0.0, 0.0], [0.0, 1e-3], [0.0, -torch.inf]])
    changed = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [5.0, -torch.inf]])
    # ½·log(½ / ¼) + ½·log(½ / ¾); s² / 8 for small s; a token that both rule out.
    wanted = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 1e-6 / 8, 0.0]
    assert kl_divergence(clean, changed).tolist() == pytest.approx(wanted, rel=1e-6)
    assert kl_divergence(clean[None], changed[None]).shape == (1, 3)
    assert kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])).tolist() == [math.inf]


def test_kl_divergence_in_blocks_is_that_of_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(0)
    clean, changed = torch.randn(7, 5, generator=source), torch.randn(7, 5, generator=source)
    rows = [float(kl_divergence(p, q)) for p, q in zip(clean, changed, strict=True)]
    monkeypatch.setattr("exegete.tools.strength._BLOCK_ENTRIES", 11)
    assert kl_divergence(clean, changed).tolist() == pytest.approx(rows, abs=1e-12)


@pytest.mark.parametrize("per_batch", [1, 2, 4])
def test_the_strength_of_half_a_nat_is_known(per_batch: int) -> None:
    found = match_strength(two_tokens(), shift, [(1,)], tolerance=1e-4, per_batch=per_batch)
    assert found.status == "matched" and found.strength is not None
    assert found.strength == pytest.approx(HALF_A_NAT, rel=1e-3)
    assert found.kl == pytest.approx(0.5, rel=1e-4)
    assert (found.low, found.high, found.n) == (None, None, 1)
    assert found.batches <= 10
    assert [strength for strength, _ in found.tried] == sorted(strength for strength, _ in found.tried)
    for strength, kl in found.tried:
        assert kl == pytest.approx(math.log(math.cosh(strength / 2)), rel=1e-4)


def test_the_mean_over_prompts_is_matched_with_its_interval() -> None:
    found = match_strength(two_tokens(), shift, [(1,), (2,)], tolerance=0.01)
    assert found.strength is not None and found.kl is not None and found.high is not None
    each = [math.log(math.cosh(factor * found.strength / 2)) for factor in (1, 2)]
    assert found.kl == pytest.approx(sum(each) / 2, rel=1e-6) and abs(found.kl - 0.5) <= 0.005
    # Student's quantile with one degree of freedom is 12.706; the divergence cannot be negative.
    assert found.high == pytest.approx(found.kl + 12.706 * abs(each[1] - each[0]) / 2, rel=1e-3)
    assert (found.low, found.n) == (0.0, 2)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_where_the_search_begins_does_not_matter(scale: float) -> None:
    found = match_strength(two_tokens(lambda s: s * scale), shift, [(1,)])
    assert found.status == "matched" and found.batches <= 10
    assert found.kl == pytest.approx(0.5, rel=0.1)


def test_a_model_that_saturates_below_the_target_is_reported() -> None:
    found = match_strength(two_tokens(math.tanh), shift, [(1,)])
    assert (found.status, found.strength) == ("unreachable", None)
    assert found.kl == pytest.approx(math.log(math.cosh(0.5)), rel=1e-6)
    assert found.batches <= 10 and max(strength for strength, _ in found.tried) > 1e5


def test_an_intervention_without_effect_is_unreachable_at_zero() -> None:
    found = match_strength(two_tokens(lambda s: 0.0), shift, [(1,)])
    assert (found.status, found.kl) == ("unreachable", 0.0)


def test_an_intervention_that_never_does_so_little_is_unreachable() -> None:
    found = match_strength(two_tokens(lambda s: 0.0 if s == 0 else 5.0), shift, [(1,)])
    assert (found.status, found.strength) == ("unreachable", None)
    assert found.kl == pytest.approx(math.log(math.cosh(2.5)))


def test_of_several_crossings_the_least_strong_is_taken() -> None:
    # The logit rises to 4 at s = 8, falls to 0 at s = 16, and rises again.
    found = match_strength(two_tokens(lambda s: 4 * abs(math.sin(s * math.pi / 16))), shift, [(1,)], tolerance=0.01)
    assert found.strength == pytest.approx(16 / math.pi * math.asin(HALF_A_NAT / 4), rel=0.02)


def test_a_peak_between_the_first_tries_is_found() -> None:
    def bump(strength: float) -> float:
        return 3.0 * math.exp(-((math.log(strength / 2.0) / 0.4) ** 2)) if strength else 0.0

    assert all(bump(strength) < 1 for strength in (0.25, 1.0, 4.0, 16.0))
    found = match_strength(two_tokens(bump), shift, [(1,)])
    assert found.status == "matched" and found.kl == pytest.approx(0.5, rel=0.1)


def test_output_that_is_not_finite_was_too_strong() -> None:
    def overflowing(limit: float) -> Any:
        return two_tokens(lambda s: s if s < limit else math.nan)

    found = match_strength(overflowing(3.0), shift, [(1,)])
    assert found.status == "matched" and any(math.isnan(kl) for _, kl in found.tried)
    found = match_strength(overflowing(1.5), shift, [(1,)])
    assert (found.status, found.batches) == ("unreachable", 10)
    assert found.kl is not None and found.kl < 0.5
    assert found.kl == pytest.approx(math.log(math.cosh(0.75)), rel=0.05)
    found = match_strength(two_tokens(lambda s: math.nan if s else 0.0), shift, [(1,)])
    assert (found.status, found.kl, found.low) == ("unreachable", None, None)


def test_what_the_number_format_cannot_hold_was_too_strong() -> None:
    model = two_tokens(lambda s: s / 20)
    model.most = 60.0
    found = match_strength(model, shift, [(1,)])
    assert found.status == "matched" and found.strength == pytest.approx(20 * HALF_A_NAT, rel=0.1)
    assert any(strength > 60 and math.isnan(kl) for strength, kl in found.tried)
    model.most = 30.0
    found = match_strength(model, shift, [(1,)])
    assert found.status == "unreachable" and found.kl == pytest.approx(math.log(math.cosh(0.75)), rel=0.01)
    with pytest.raises(UserError, match="holds at most"):
        match_strength(model, shift, [(1,)], first=1_000.0)


def test_many_searches_share_their_calls_and_find_what_each_finds_alone() -> None:
    def scaled(scale: float) -> Callable[[float], Intervention]:
        return lambda strength: shift(strength * scale)

    makes, model = [scaled(10.0**power) for power in range(-3, 4)], two_tokens()
    together = match_strengths(model, makes, [(1,), (2,)])
    assert together == [match_strength(two_tokens(), make, [(1,), (2,)]) for make in makes]
    assert len(model.calls) == 1 + max(found.batches for found in together) < 8
    assert max(model.calls) == 7 * 4 * 2


def test_each_search_may_have_prompts_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exegete.tools.strength._PROMPTS", 2)
    sets: list[list[Tokens]] = [[(1,)], [(2,), (2, 2)], [(1,), (4,)]]
    found = match_strengths(two_tokens(), [shift] * 3, sets)
    assert [one.n for one in found] == [1, 2, 2]
    alone = [match_strength(two_tokens(), shift, own) for own in sets]
    assert found == alone


def test_a_search_ends_with_its_batches() -> None:
    model = two_tokens()
    found = match_strength(model, shift, [(1,)], tolerance=1e-9, batches=2)
    assert (found.status, found.batches, len(model.calls)) == ("unreachable", 2, 3)
    assert found.kl is not None and abs(found.kl - 0.5) < 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target_kl": 0.0}, "target_kl is 0.0"),
        ({"target_kl": -1.0}, "target_kl is -1.0"),
        ({"target_kl": math.nan}, "target_kl is nan"),
        ({"target_kl": math.inf}, "target_kl is inf"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": 1.0}, "tolerance is 1.0"),
        ({"batches": 0}, "batches is 0"),
        ({"per_batch": 0}, "per_batch is 0"),
        ({"first": -1.0}, "search downwards"),
        ({"first": math.nan}, "first is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        match_strength(two_tokens(), shift, [(1,)], **wrong)


def test_prompts_that_are_missing_are_refused() -> None:
    with pytest.raises(UserError, match="no prompt"):
        match_strength(two_tokens(), shift, [])
    words: Any = ["SELECT"]
    with pytest.raises(UserError, match="'SELECT' is text"):
        match_strength(two_tokens(), shift, words)
    with pytest.raises(UserError, match="2 sets of prompts are given for 3"):
        match_strengths(two_tokens(), [shift] * 3, [[(1,)], [(2,)]])
    with pytest.raises(UserError, match="prompts of intervention 1 are empty"):
        match_strengths(two_tokens(), [shift] * 2, [[(1,)], []])


def test_estimates_refuse_what_has_no_mean() -> None:
    assert estimate([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.4841, 2 + 2.4841, 1.0, 3), abs=1e-4)
    assert estimate([4.0]) == (4.0, None, None, None, 1)
    with pytest.raises(UserError, match="shape"):
        estimate([])
    with pytest.raises(UserError, match="nan"):
        estimate([1.0, math.nan])


def _steering(dictionary: Dictionary, latent: int, sign: int = 1) -> Callable[[float], Intervention]:
    return lambda strength: steer(dictionary.fingerprint, [latent], sign * strength)


def test_latents_of_the_bundled_dictionary_are_matched(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    makes = [_steering(dictionary, latent) for latent in (40, 512)] + [_steering(dictionary, 40, -1)]
    prompts = prompts[:4]
    found = match_strengths(model, makes, prompts, first=8.0)
    for make, one in zip(makes, found, strict=True):
        assert one.status == "matched" and one.strength is not None and one.batches <= 10
        assert one.kl == pytest.approx(_mean_divergence(model, make(one.strength), prompts), rel=1e-2)
        assert one.kl is not None and abs(one.kl - 0.5) <= 0.05
        assert one.low is not None and one.low < one.kl
    assert found[0].strength != found[2].strength


def _mean_divergence(model: LiveModel, intervention: Intervention, prompts: Sequence[Tokens]) -> float:
    def distributions(change: Intervention) -> list[Tensor]:
        return [
            model.run([Trial(tokens, change)], lambda reading: list(reading.logits.softmax(-1)))[0]
            for tokens in prompts
        ]

    pairs = zip(distributions(Intervention()), distributions(intervention), strict=True)
    return sum(float((p * (p / q).log()).sum()) for p, q in pairs) / len(prompts)


def test_a_match_does_not_depend_on_how_prompts_are_batched(
    subject: Any, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    found = [
        match_strength(
            LiveModel(subject, [dictionary], batch_tokens=size), _steering(dictionary, 3), prompts[:6], first=8.0
        )
        for size in (100, 4_096)
    ]
    assert found[0].strength == pytest.approx(found[1].strength, rel=1e-3)
    assert [kl for _, kl in found[0].tried] == pytest.approx([kl for _, kl in found[1].tried], abs=1e-4)


def test_an_unknown_latent_is_the_models_own_error(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    with pytest.raises(UserError, match="no latent 5000"):
        match_strength(model, _steering(dictionary, 5_000), prompts)
