"""Claims on the bundled subject: true ones are verified, and what is not so, not shown or not tested is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_clients import FakeClient
from hypothesis import given
from hypothesis import strategies as st

from exegete.agent.investigation.arms import Arms
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Case, Claim, Metric, Verdict
from exegete.agent.investigation.family import holm, paired_p, random_sets_needed, rank_p, widened
from exegete.agent.investigation.passes import counting
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.investigation.toolbelt import every_tool
from exegete.agent.investigation.verifying import Measured, _judged, verify
from exegete.tools.ablation_sets import random_sets
from exegete.tools.interventions import CLEAN
from exegete.tools.seeds import generator

SETS = 40
"""Random sets: enough for two claims."""


def causal(latents: Any, **changes: Any) -> Claim:
    given: dict[str, Any] = {"latents": tuple(latents), "experiments": ("E1",), **changes}
    return Claim("These latents hold it up.", "causal", **given)


def check(bench: Bench, held_out: Any, *claims: Claim, sets: int = SETS, **options: Any) -> list[Verdict]:
    return asyncio.run(verify(bench, held_out, claims, {"E1"}, controls=sets, **options))


def found_by(bench: Bench, how: str) -> tuple[int, ...]:
    outcome = every_tool()["minimal_set"].function(replace(bench, controls=1), how=how)
    return tuple(outcome.facts["latents"])


def test_a_set_found_on_search_prompts_is_verified_and_a_random_one_is_not(
    bench: Bench, held_out: tuple[Case, ...]
) -> None:
    latents = found_by(replace(bench, cases=bench.cases[:8]), "zero")
    (random,) = random_sets(latents, bench.rates, 1, seed=99)
    true, false = check(bench, held_out, causal(latents, flips=True), causal(random))
    assert true.status == "verified", true.why
    assert true.effect is not None and true.effect.high is not None and true.effect.control_low is not None
    assert true.effect.high < true.effect.control_low and true.effect.control_n == SETS and true.effect.n == 10
    assert true.flipped is not None and true.flipped.low is not None and true.flipped.low > 0.5
    assert true.p == pytest.approx(1 / (SETS + 1)) and true.p_adjusted == pytest.approx(2 / (SETS + 1))
    assert false.status == "failed" and "does not lie beyond" in false.why and false.p_adjusted is not None
    assert false.p_adjusted > 0.05


def test_the_wrong_way_fails(bench: Bench, held_out: tuple[Case, ...]) -> None:
    (verdict,) = check(bench, held_out, causal([954], expects="rises"))
    assert verdict.status == "failed" and verdict.p == 1


def test_an_effect_that_flips_few_prompts_does_not_flip_most(bench: Bench, held_out: tuple[Case, ...]) -> None:
    (verdict,) = check(bench, held_out, causal([253], flips=True))
    assert verdict.status == "failed" and "not above one half" in verdict.why
    assert verdict.flipped is not None and verdict.flipped.value is not None and verdict.flipped.value < 0.5


def test_interchange_is_verified_where_the_variant_makes_the_difference(
    bench: Bench, held_out: tuple[Case, ...]
) -> None:
    claim = causal([954, 811, 253], intervention="interchange")
    short = [replace(case, variant=None) for case in held_out]
    same = [replace(case, variant=swapped(case.prompt)) for case in held_out]
    (true,) = check(bench, held_out, claim)
    assert true.status == "verified" and "from prompt to variant the metric changes by -2" in true.why, true.why
    (none,) = check(bench, short, claim)
    assert none.status == "unverified" and "0 of 10 held-out prompts that can be used have a variant" in none.why
    (nothing,) = check(bench, same, claim)
    assert nothing.status == "failed" and "do not differ in the metric" in nothing.why and nothing.effect is None


def swapped(prompt: str) -> str:
    """The prompt with the first two columns of its schema in the other order."""
    head, bracket, tail = prompt.partition("(")
    columns, close, rest = tail.partition(")")
    one, two, *others = columns.split(", ")
    return head + bracket + ", ".join([two, one, *others]) + close + rest


def test_a_behaviour_that_is_not_there_verifies_nothing(bench: Bench, held_out: tuple[Case, ...]) -> None:
    turned = [replace(case, answer=case.other, other=case.answer) for case in held_out]
    (verdict,) = check(bench, turned, causal([954]))
    assert (verdict.status, verdict.p) == ("unverified", None)
    assert verdict.why.startswith("the model does not show the behaviour on 10 of 10 held-out prompts")
    few = [*held_out[:7], *turned[7:]]
    (verdict,) = check(bench, few, causal([954]))
    assert verdict.status == "unverified" and "on 3 of 10 held-out prompts; at least 8" in verdict.why


def test_rising_is_claimed_where_the_behaviour_is_not_shown(bench: Bench, held_out: tuple[Case, ...]) -> None:
    turned = [Case(case.variant or "", case.answer, case.other, case.prompt) for case in held_out]
    claim = causal([954, 811, 253], intervention="interchange", expects="rises", flips=True)
    (verdict,) = check(bench, turned, claim)
    assert verdict.effect is not None and verdict.effect.value is not None and verdict.effect.value > 5
    assert verdict.flipped is not None and verdict.flipped.n == 10
    (shown,) = check(bench, held_out, claim)
    assert shown.status == "unverified" and "shows the behaviour already on 10 of 10" in shown.why


@pytest.mark.parametrize(
    ("changes", "status", "why"),
    [
        ({"experiments": ()}, "unverified", "it rests on no experiment"),
        ({"experiments": ("E1", "E7")}, "unverified", "there is no E7"),
        ({"latents": ()}, "unverified", "no latent is given"),
        ({"latents": (5_000,)}, "unverified", "there is no latent 5000"),
        ({"latents": tuple(range(900))}, "unverified", "no random set"),
        ({"kind": "correlational", "experiments": ()}, "correlational", "nothing causal is claimed"),
        ({"kind": "correlational", "experiments": ("E9",)}, "unverified", "there is no E9"),
    ],
)
def test_claims_that_are_not_measured(
    bench: Bench, held_out: tuple[Case, ...], changes: dict[str, Any], status: str, why: str
) -> None:
    (verdict,) = check(bench, held_out, replace(causal([954]), **changes))
    assert (verdict.status, verdict.effect, verdict.p) == (status, None, None) and why in verdict.why


def test_latents_that_are_never_active_fail(bench: Bench, held_out: tuple[Case, ...]) -> None:
    silent = int(np.flatnonzero(bench.rates == 0)[0])
    (verdict,) = check(bench, held_out, causal([silent]))
    assert verdict.status == "failed" and f"latent {silent} is active on none" in verdict.why


def test_what_cannot_be_checked_counts_in_the_family(bench: Bench, held_out: tuple[Case, ...]) -> None:
    true = causal([954], flips=False)
    alone = check(bench, held_out, true)[0]
    among = check(bench, held_out, true, *[replace(true, experiments=())] * 3)[0]
    assert alone.p == among.p and alone.p is not None and among.p_adjusted == pytest.approx(4 * alone.p)
    assert alone.status == "verified" and among.status == "failed" and "adjusted for 4 causal claims" in among.why
    assert alone.effect is not None and among.effect is not None
    assert (among.effect.high or 0) > (alone.effect.high or 0)


def test_what_takes_more_passes_than_are_left_is_unverified(bench: Bench, held_out: tuple[Case, ...]) -> None:
    with Sharing(bench.live) as sharing:
        own = replace(bench, live=sharing.live())
        with counting(len(bench.texts) + 100) as count:
            (verdict,) = check(own, held_out, causal([954, 811, 253]))
    assert verdict.status == "unverified" and "forward passes are needed" in verdict.why
    assert count.refused and count.used <= len(bench.texts) + 100


def test_ten_claims_of_nothing_give_none_verified(bench: Bench, held_out: tuple[Case, ...]) -> None:
    # Neighbours in firing rate share most of their controls, so that few runs check all of them.
    ordered = np.argsort(bench.rates, kind="stable")
    live = ordered[(bench.rates[ordered] > 0.01) & ~np.isin(ordered, [954, 253, 811])]
    drawn = live[int(generator(8, "null claims").integers(len(live) - 10)) :][:10]
    found = check(bench, held_out[:8], *(causal([int(latent)]) for latent in drawn), sets=200)
    assert {verdict.status for verdict in found} == {"failed"}
    # With so many sets the strongest of ten could have passed.
    assert holm([1 / 201] + [None] * 9)[0] == pytest.approx(10 / 201) and {
        v.effect.control_n for v in found if v.effect
    } == {200}


def test_steering_is_checked_at_one_kl_beside_both_controls(bench: Bench, held_out: tuple[Case, ...]) -> None:
    own = replace(bench, texts=bench.texts[:4])
    (verdict,) = check(own, held_out[:8], causal([954], intervention="steer", expects="rises"), sets=3)
    assert verdict.status == "failed" and verdict.direction is not None and verdict.direction.control_n >= 1
    assert "at KL 0.5" in verdict.why and "random directions" in verdict.direction.control
    assert verdict.p is not None and verdict.p >= 1 / 4


def test_what_a_judge_leaves_open_verifies_nothing(bench: Bench, held_out: tuple[Case, ...]) -> None:
    metric = Metric("judged", criterion="It sorts from high to low.", tokens=1, samples=1)
    sure = FakeClient(lambda text, _: {"meets": "<continuation> DESC" in text})
    own = replace(bench, metric=metric, judge=sure)
    latents = (954, 811, 253, 625, 49, 707, 820, 1010, 325, 515, 523)
    (verdict,) = check(own, held_out, causal(latents, intervention="interchange", flips=True), sets=20)
    assert verdict.status == "verified", verdict.why
    unsure = FakeClient(lambda text, _: {"meets": True} if "<continuation> DESC" in text else {})
    (verdict,) = check(replace(own, judge=unsure), held_out, causal(latents), sets=20)
    assert verdict.status == "unverified" and "the judge gave verdicts on" in verdict.why


def test_holm_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, None, 0.001]) == [pytest.approx(0.08), None, pytest.approx(0.003)]
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == [] and holm([None]) == [None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_value_and_bonferroni(values: list[float]) -> None:
    for own, adjusted in zip(values, holm(values), strict=True):
        assert adjusted is not None and own <= adjusted <= 1
        assert adjusted <= min(1, len(values) * max(v for v in values if v <= own)) + 1e-12


def test_other_figures_as_by_hand() -> None:
    assert rank_p(1.0, np.array([0.2, 1.0, 3.0])) == 0.75 and rank_p(9.0, np.zeros(199)) == 0.005
    # t = 2 / (1 / √3) with 2 degrees of freedom: p = (1 − t / √(2 + t²)) / 2.
    assert paired_p(np.array([1.0, 2.0, 3.0])) == pytest.approx((1 - np.sqrt(12 / 14)) / 2)
    assert (paired_p(np.array([1.0])), paired_p(np.ones(5)), paired_p(np.zeros(5))) == (1, 0, 1)
    assert widened(np.array([1.0, 2.0, 3.0]), 1) == pytest.approx(
        (2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4
    )
    # 99.5 % for ten claims: t = 14.089 with 2 degrees of freedom.
    assert widened(np.array([1.0, 2.0, 3.0]), 10)[2] == pytest.approx(2 + 14.089 / 3**0.5, abs=1e-3)
    assert random_sets_needed(3, 199) == 199 and random_sets_needed(15, 199) == 300
    assert all(holm([1 / (1 + random_sets_needed(m, 1))] + [None] * (m - 1))[0] <= 0.05 for m in range(1, 40))  # type: ignore[operator]


def measured(own: np.ndarray, controls: np.ndarray) -> Measured:
    """What would be measured where the metric is 0 clean: changes of shape (prompt,) and (set, prompt)."""
    clean = SimpleNamespace(clean=np.zeros(len(own)), metric=Metric("log_odds"))
    sets = tuple((i,) for i in range(len(controls)))
    return Measured(Arms(clean, (1,), (CLEAN,) * len(own), own, sets, controls), -1, "by hand")  # type: ignore[arg-type]


def families(effect: float, count: int) -> float:
    """Share of made-up families of ten claims with a verified one, where sets differ as 1 and prompts as 0.5."""
    verified = 0
    for family in range(count):
        rng = generator(family, "families", str(effect))
        found = []
        for _ in range(10):
            means = rng.normal(size=200)
            means[0] -= effect
            changes = means[:, None] + 0.5 * rng.normal(size=(200, 12))
            found.append(measured(changes[0], changes[1:]))
        adjusted = holm([one.p for one in found])
        statuses = [_judged(causal([1]), one, p or 0, 10).status for one, p in zip(found, adjusted, strict=True)]
        verified += "verified" in statuses
    return verified / count


def test_families_of_nothing_are_rarely_wrong_and_large_effects_are_found() -> None:
    assert families(0.0, 60) <= 0.05
    assert families(6.0, 5) == 1


def test_controls_of_one_latent_are_different_ones_nearest_in_rate(bench: Bench) -> None:
    rates = np.array([0.1, 0.11, 0.3, 0.0, 0.09, 0.5])
    assert random_sets([0], rates, 3, 1, distinct=True) == [(1,), (4,), (2,)]
    assert random_sets([0], rates, 9, 1, distinct=True) == [(1,), (4,), (2,), (5,)]
    pairs = random_sets([954, 253], bench.rates, 199, 1, distinct=True)
    assert len({frozenset(pair) for pair in pairs}) == 199 and all(len(set(pair)) == 2 for pair in pairs)
    assert not {954, 253} & {latent for pair in pairs for latent in pair}
