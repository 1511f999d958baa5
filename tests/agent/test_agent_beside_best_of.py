"""The agent beside best-of-N: by hand on the steps of a few latents, and in the words of the report."""

from __future__ import annotations

import pytest

from exegete.agent.cascade_control import _nearest
from exegete.agent.cascade_summary import beside_lines, verdict
from exegete.agent.routing_value import ABOVE, BEST_OF_BESIDE, LEAST_LATENTS, Measured, agent_beside_best_of, winner
from exegete.agent.rungs import TEST_AND_REFINE, top_writer
from exegete.agent.spending import Spent
from exegete.tools.errors import UserError
from exegete.tools.store import StepRecord


def step(rung: str, test: float | None, tokens: int = 0, explained: bool = True) -> StepRecord:
    identity = f"sha256:{rung}" if explained else None
    return StepRecord(0, rung, identity, 0.7, 0.6, 0.8, 40, 1, tokens, 0.0, "control", test, 200, control=True)


def latent(agent: float | None, rival: float | None, explained: bool = True) -> list[StepRecord]:
    """A latent's steps; the rung below and best-of at the cost of the climb are in neither arm."""
    others = [step("one-shot", 0.99, 10), step("best-of", 0.98, 10)]
    return [*others, step(TEST_AND_REFINE, agent, 500, explained), step(BEST_OF_BESIDE, rival, 600)]


def found(control: list[list[StepRecord]]) -> dict[str, Measured]:
    return {one.name: one for one in agent_beside_best_of(control, 0)}


def test_by_hand() -> None:
    figures = found([latent(0.9, 0.7), latent(0.8, 0.9)])
    expected = {
        TEST_AND_REFINE: 0.85,
        BEST_OF_BESIDE: 0.80,
        ABOVE: 0.05,
        f"cost of {TEST_AND_REFINE}": 500.0,
        f"cost of {BEST_OF_BESIDE}": 600.0,
        "left out": 0,
    }
    assert {name: one.value for name, one in figures.items()} == pytest.approx(expected)
    # Two latents, drawn with replacement: the mean difference is one of -0.1, 0.05 and 0.2.
    assert (figures[ABOVE].low, figures[ABOVE].high) == pytest.approx((-0.1, 0.2))
    assert (figures[ABOVE].n, figures[f"cost of {TEST_AND_REFINE}"].unit) == (2, "tokens a latent")


def test_no_explanation_counts_as_chance_and_no_score_is_left_out() -> None:
    silent, failed = latent(None, 0.9, explained=False), latent(None, 0.9)
    figures = found([latent(0.7, 0.7), silent, failed, [step("one-shot", 0.9)]])
    assert figures[TEST_AND_REFINE].value == pytest.approx((0.7 + 0.5) / 2) and figures[TEST_AND_REFINE].n == 2
    assert (figures["left out"].value, figures["left out"].n) == (1, 3)


def test_too_few_are_not_compared() -> None:
    with pytest.raises(UserError, match="of 2 latents of the control subset, 1 have a test score of both"):
        agent_beside_best_of([latent(0.9, 0.7), latent(None, 0.7)], 0)


@pytest.mark.parametrize(
    ("differences", "better", "told"),
    [
        ([0.1, 0.2] * 5, TEST_AND_REFINE, "test-and-refine is better here"),
        ([-0.1, -0.2] * 5, "best-of", "best-of-N is better here"),
        ([-0.2, 0.2] * 5, None, "the interval holds 0"),
        ([0.0] * LEAST_LATENTS, None, "the interval holds 0"),
        ([0.1] * (LEAST_LATENTS - 1), None, "fewer than 10 latents"),
    ],
)
def test_which_is_better_is_said_where_the_interval_leaves_no_doubt(
    differences: list[float], better: str | None, told: str
) -> None:
    figures = {name: one.described() for name, one in found([latent(0.7 + d, 0.7) for d in differences]).items()}
    assert winner(figures[ABOVE]) == better
    lines = beside_lines({**figures, "better": better})
    assert told in verdict({**figures, "better": better}) and told in lines[-1]
    assert (
        "500 tokens a latent" in lines[1]
        and "600 tokens a latent" in lines[2]
        and f"(n = {len(differences)})" in lines[3]
    )


@pytest.mark.parametrize(
    ("draws", "tokens", "ends"), [(1, 1_499, True), (1, 1_501, False), (3, 3_500, True), (3, 3_501, False)]
)
def test_draws_end_where_they_are_nearest_to_the_agents_tokens(draws: int, tokens: int, ends: bool) -> None:
    """A draw takes 1,000 tokens."""
    assert _nearest(Spent(tokens=1_000 * draws), draws, tokens) is ends


def test_nothing_is_said_without_an_agent() -> None:
    assert beside_lines(None) == []
    assert beside_lines({"not_measured": "too few"}) == ["  test-and-refine beside best-of-N is not measured: too few"]


@pytest.mark.parametrize(
    ("rungs", "writer"),
    [
        (["lexical", "one-shot", "refine", "test-and-refine"], "one-shot"),
        (["lexical", "test-and-refine"], "lexical"),
        (["test-and-refine"], "test-and-refine"),
        (["refine"], ""),
    ],
)
def test_the_highest_rung_that_explains_in_one_go(rungs: list[str], writer: str) -> None:
    assert top_writer(rungs) == writer
