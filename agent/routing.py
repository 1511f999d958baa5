"""Routing: which latents climb from a cheap rung of the cascade to the next one, and whether that pays.

In words: a latent climbs when the refine-split score of its explanation stays below `target` even at the upper limit of its
95 % interval, and when what the next rung is expected to add is worth its price:

    expected gain × worth_usd ≥ price of the rung in USD

1. The score is the mean balanced accuracy of detection and fuzzing on the refine split (`exegete.evaluators.refine_score`),
   of the explanation that stands: the best so far, the earlier of equals, since it is the cheaper and the simpler one.
   A rung that says nothing about a latent scores as a constant answer does, `CHANCE`.
2. The expected gain is a line over the score below, fitted on latents that climbed every rung whatever they scored (the
   frozen pilot or the control subset). The mean gain is drawn towards zero as if `PRIOR` more latents had gained nothing,
   the slope is a ridge estimate of the same weight and never positive (the better an explanation, the less there is to
   gain), and the result lies between zero and what is missing to a perfect score. The price is the rung's mean there.
3. Nothing else decides: the latent's own rows, the frozen fit and the configuration. No order, budget or clock does. Of the
   test split one thing is known: how the judge's errors cluster in prompts, pooled over the pilot (`pilot`), on which the
   width of refine-split intervals rests.
4. Revisions end when the target is reached, when `patience` rounds in a row did not improve on the best by more than the
   noise of the difference, or when the rounds are used up.

What the rule is worth, `exegete.agent.routing_value` measures on the control subset.
Sources: FrugalGPT (Chen, Zaharia & Zou 2023) for cascades by score and cost; Hoerl & Kennard 1970 for the ridge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from exegete.evaluators.refine_score import Refined, noise
from exegete.tools.errors import UserError
from exegete.tools.store import StepRecord

Decision = Literal["good_enough", "not_worth_it", "climbs", "top", "no_score"]
Round = Literal["good_enough", "plateau", "rounds_used_up", "climbs"]

PRIOR = 8.0
"""Latents that gained nothing, as the fit of gains adds them."""
SPREAD = 0.1
"""Standard deviation of the score below that goes with them."""


class Figured(Protocol):
    """A score with its interval, as `exegete.evaluators.refine_score.Refined`."""

    @property
    def value(self) -> float | None: ...  # noqa: D102
    @property
    def high(self) -> float | None: ...  # noqa: D102


class Standing(NamedTuple):
    """The score of the explanation that stands."""

    value: float | None
    low: float | None
    high: float | None


CHANCE = Standing(0.5, 0.5, 0.5)
"""What no explanation scores, on any split."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a latent climbs."""

    target: float
    """Refine-split score that is good enough."""
    worth_usd: float | None
    """What it is worth, in USD, that one latent's score rises by 1.0; None: climbing is worth any price."""
    rungs: tuple[str, ...]
    """Explainers, the cheapest first."""

    def __post_init__(self) -> None:
        """Raise UserError where a figure makes no sense."""
        if not 0 < self.target <= 1:
            raise UserError(
                f"cascade.target = {self.target} is no score to aim for: above 0 and at most 1, for example 0.8"
            )
        if self.worth_usd is not None and not 0 <= self.worth_usd < math.inf:
            raise UserError(
                f"cascade.worth_usd = {self.worth_usd}: a price in USD, 0 or more; leave it out for any price"
            )
        if not self.rungs or len(set(self.rungs)) < len(self.rungs):
            raise UserError(
                f"cascade.rungs = {list(self.rungs)}: one explainer or more, each named once, the cheapest first"
            )


@dataclass(frozen=True, slots=True)
class Gain:
    """What a rung adds to the refine-split score of the one below, and what it takes; means over latents."""

    latents: int
    """Latents that it was fitted on."""
    below: float
    """Mean score below."""
    mean: float
    """Mean gain, drawn towards zero."""
    slope: float
    """Change of the gain per unit of the score below; zero or negative."""
    usd: float
    calls: float
    tokens: float

    def expected(self, below: float) -> float:
        """Return the expected gain of a latent whose score below is `below`."""
        return min(max(0.0, self.mean + self.slope * (below - self.below)), max(0.0, 1.0 - below))


@dataclass(frozen=True, slots=True)
class Gains:
    """The frozen fit, by rung; the lowest rung gains over `CHANCE`."""

    rungs: Mapping[str, Gain]

    def described(self) -> dict[str, Any]:
        """Return it as JSON values, to be stored with the run."""
        return {name: asdict(gain) for name, gain in self.rungs.items()}

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> Gains:
        """Return what `described` gave.

        Raises:
            UserError: the stored values are none of this version.
        """
        try:
            return cls({name: Gain(**values) for name, values in stored.items()})
        except TypeError as error:
            raise UserError(f"the run's frozen pilot of its cascade is of another version: {error}") from None


def climbs(rung: int, refined: Figured, gains: Gains | None, rule: Rule) -> Decision:
    """Return what follows for a latent that has reached `rung`, numbered from 0.

    Args:
        rung: the place of the last explainer tried, in `rule.rungs`.
        refined: the score of the explanation that stands; `CHANCE` where there is none.
        gains: the frozen fit; None while it is being made, when every price is paid.
        rule: the configuration.

    Returns:
        "no_score" where the explanation could not be scored (no better one could be told from it); "good_enough" where the
        upper limit reaches the target; "top" on the last rung; "not_worth_it" where the price exceeds the expected worth.
    """
    if refined.value is None or refined.high is None:
        return "no_score"
    if refined.high >= rule.target:
        return "good_enough"
    if rung + 1 >= len(rule.rungs):
        return "top"
    if rule.worth_usd is None or gains is None:
        return "climbs"
    coming = gains.rungs.get(rule.rungs[rung + 1])
    if coming is None:
        raise UserError(f"the frozen pilot knows no rung {rule.rungs[rung + 1]!r}; it knows {', '.join(gains.rungs)}")
    return "climbs" if coming.expected(refined.value) * rule.worth_usd >= coming.usd else "not_worth_it"


def after_round(tried: Sequence[Refined | None], target: float, rounds: int, patience: int = 1) -> Round:
    """Return whether another round of revision follows ("climbs"), or why none does.

    Args:
        tried: the score of what was to be revised, then that of each round's revision; None where there was no revision or
            no score.
        target: value that is good enough.
        rounds: most rounds.
        patience: rounds in a row without an improvement beyond the noise that end it.
    """
    best_yet, improved = tried[0], 0
    for number, one in enumerate(tried[1:], 1):
        if _beyond_noise(best_yet, one):
            improved = number
        if best_yet is None or (one is not None and best([best_yet, one]) == 1):
            best_yet = one
    if best_yet is not None and best_yet.value is not None and best_yet.value >= target:
        return "good_enough"
    if len(tried) - 1 >= rounds:
        return "rounds_used_up"
    return "plateau" if len(tried) - 1 - improved >= patience else "climbs"


def best(tried: Sequence[Figured | None]) -> int | None:
    """Return the place of the best score, the earlier of equals; None where there is no score."""
    scored = [(one.value, -place) for place, one in enumerate(tried) if one is not None and one.value is not None]
    return -max(scored)[1] if scored else None


def fit_gains(climbed: Sequence[Sequence[StepRecord]], rungs: Sequence[str]) -> Gains:
    """Return the gain and price of each rung over `climbed`, the steps of latents that took every rung.

    Latents that lack a score on a rung do not count for it.

    Raises:
        UserError: no latent has a score on one of the rungs.
    """
    ladders = [ladder(steps, rungs) for steps in climbed]
    return Gains({name: _gain(name, place, ladders) for place, name in enumerate(rungs)})


@dataclass(frozen=True, slots=True)
class Tread:
    """Where a latent stands when it has reached a rung."""

    standing: Standing
    """Refine-split score of the best explanation so far."""
    test: float | None
    """Test-split score of the same explanation; None where it has none."""
    usd: float
    """Cost of this rung alone."""
    calls: int
    tokens: int
    reached: bool
    """Whether the latent took this rung."""


def ladder(steps: Sequence[StepRecord], rungs: Sequence[str]) -> list[Tread]:
    """Return where a latent stands on each of `rungs`, by the steps that it took; other steps (best-of) do not count."""
    standing, test, treads = CHANCE, CHANCE.value, []
    explained = False
    for name in rungs:
        own = [step for step in steps if step.rung == name]
        for step in own:
            if step.explanation_id is None:
                continue
            better = step.refine is not None and (standing.value is None or step.refine > standing.value)
            if not explained or better or standing.value is None:
                standing, test = Standing(step.refine, step.refine_low, step.refine_high), step.test
            explained = True
        usd, calls, tokens = (sum(getattr(step, unit) for step in own) for unit in ("usd", "calls", "tokens"))
        treads.append(Tread(standing, test, usd, calls, tokens, bool(own)))
    return treads


def _gain(name: str, place: int, ladders: Sequence[Sequence[Tread]]) -> Gain:
    taken = [
        (one[place - 1].standing.value if place else CHANCE.value, one[place])
        for one in ladders
        if one[place].reached and (not place or one[place - 1].reached)
    ]
    known = [(below, own, own.standing.value) for below, own in taken]
    pairs = np.array([(b, after - b) for b, _, after in known if b is not None and after is not None], dtype=np.float64)
    if not len(pairs):
        raise UserError(f"no latent of the pilot has a score on rung {name!r}: there is nothing to fit its gain on")
    below, gained = pairs.mean(axis=0).tolist()
    centred = pairs - pairs.mean(axis=0)
    slope = float(centred[:, 0] @ centred[:, 1]) / (float(centred[:, 0] @ centred[:, 0]) + PRIOR * SPREAD**2)
    prices = [(own.usd, own.calls, own.tokens) for _, own in taken]
    usd, calls, tokens = np.array(prices, dtype=np.float64).mean(axis=0).tolist()
    n = len(pairs)
    return Gain(n, below, gained * n / (n + PRIOR), min(0.0, slope), usd, calls, tokens)


def _beyond_noise(before: Refined | None, after: Refined | None) -> bool:
    if after is None or after.value is None:
        return False
    if before is None or before.value is None:
        return True
    return after.value - before.value > noise(before, after) + 1e-9  # Rounding must not make an item's worth of it.
