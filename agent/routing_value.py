"""What routing is worth: policies compared on the control subset, whose latents climbed every rung whatever they scored.

1. Each latent is routed as the rule would have done (`exegete.agent.routing`), by gains and prices that were fitted on the
   other folds of the subset, so that no latent decides over itself.
2. What a policy is worth is the score on the *test* split of the explanation that it ends with, which is the best by the
   refine split among those that the policy pays for. The gain of the refine score is no measure: explanations are chosen
   by it, and revised on it. A latent without an explanation scores as chance does.
3. Policies: `routed`; `lowest rung only`; `climb always`; `random at equal cost`, which sends as many latents to each rung as
   the rule does, but any, and is mixed with climbing always or never until its mean cost is the rule's; and `best-of`, where
   candidates of one explainer were drawn at equal cost. Whether the rung `test-and-refine` beats best-of-N by the same
   language model at equal tokens is a comparison of its own (`agent_beside_best_of`).
4. Cost is in USD, or in tokens where nothing costs money. Of each rung: what it adds to the test score, and that per dollar
   (per million tokens).

Every interval is a percentile bootstrap over latents, all policies on the same resamples, so that differences are paired;
random routing is worked out anew on each resample, at the rule's mean cost there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exegete.agent.routing import CHANCE, Gains, Rule, Tread, climbs, fit_gains, ladder
from exegete.agent.rungs import TEST_AND_REFINE
from exegete.tools.errors import UserError
from exegete.tools.seeds import generator
from exegete.tools.store.records import StepRecord

Floats = NDArray[np.float64]
FOLDS = 5
RESAMPLES = 2_000
BEST_OF = "best-of"
"""The rung of steps that drew several candidates at the cost of the whole climb."""
BEST_OF_BESIDE = f"{BEST_OF} beside {TEST_AND_REFINE}"
"""The rung of steps that drew several candidates for the tokens that the agent took."""
ABOVE = f"{TEST_AND_REFINE} - {BEST_OF}"
LEAST_LATENTS = 10
"""Fewer say nothing about which is better: an interval over two or three latents is no interval."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure over the control subset, with its 95 % interval."""

    name: str
    value: float | None
    """None where it is undefined: nothing was paid, or there are no latents."""
    low: float | None
    high: float | None
    n: int
    """Latents."""
    unit: str

    def described(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def measured(control: Sequence[Sequence[StepRecord]], rule: Rule, seed: int, folds: int = FOLDS) -> list[Measured]:
    """Return what the rule is worth on `control`, the steps of each latent of the control subset.

    Latents that lack a rung, or the test score of an explanation that some policy ends with, are left out, and counted in
    the figure `left out`.

    Raises:
        UserError: fewer than two latents are left, or `folds` is less than two.
    """
    if folds < 2:
        raise UserError(f"routing is measured on folds of the control subset, two at least, not {folds}")
    ladders = [ladder(steps, rule.rungs) for steps in control]
    kept = [n for n, own in enumerate(ladders) if all(one.reached and one.test is not None for one in own)]
    if len(kept) < 2:
        raise UserError(
            f"of {len(control)} latents of the control subset, {len(kept)} have a test score on every rung; routing is "
            "measured on two at least: raise cascade.control"
        )
    steps, own = [control[n] for n in kept], [ladders[n] for n in kept]
    table = _table(own, _routed(steps, own, rule, seed, folds))
    found = _bootstrapped(lambda weights: _policies(table, weights, rule.rungs), len(kept), seed)
    figures = [
        Measured(name, *_interval(samples), n=len(kept), unit=_unit(name, table.unit))
        for name, samples in found.items()
    ]
    left = len(control) - len(kept)
    return [
        *figures,
        *_against_best_of(steps, table, seed),
        Measured("left out", left, None, None, len(control), "latents"),
    ]


def agent_beside_best_of(control: Sequence[Sequence[StepRecord]], seed: int) -> list[Measured]:
    """Return what the agent and best-of-N at its tokens reach on the test split, on latents for which both were tried.

    Each is the explanation that it ended with, whatever the run stands by; where it ended without one, it counts as chance, as
    in every policy. Latents whose explanation has no test score are left out and counted. Costs are in tokens.

    Raises:
        UserError: fewer than two latents are left.
    """
    treads = [(ladder(own, [TEST_AND_REFINE])[0], ladder(own, [BEST_OF_BESIDE])[0]) for own in control]
    tried = [pair for pair in treads if all(one.reached for one in pair)]
    known = [pair for pair in tried if all(one.test is not None for one in pair)]
    if len(known) < 2:
        raise UserError(
            f"of {len(control)} latents of the control subset, {len(known)} have a test score of both; two at least are compared: "
            "raise cascade.control"
        )
    test = np.array([[one.test for one in pair] for pair in known], dtype=np.float64)
    tokens = np.array([[one.tokens for one in pair] for pair in known], dtype=np.float64)

    def figures(weights: Floats) -> dict[str, Floats]:
        score, cost = weights @ test, weights @ tokens
        return {
            TEST_AND_REFINE: score[:, 0],
            BEST_OF_BESIDE: score[:, 1],
            f"cost of {TEST_AND_REFINE}": cost[:, 0],
            f"cost of {BEST_OF_BESIDE}": cost[:, 1],
            ABOVE: weights @ (test[:, 0] - test[:, 1]),
        }

    found = _bootstrapped(figures, len(known), seed)
    measured = [
        Measured(name, *_interval(own), n=len(known), unit=_unit(name, "tokens")) for name, own in found.items()
    ]
    return [*measured, Measured("left out", len(tried) - len(known), None, None, len(tried), "latents")]


def winner(difference: Mapping[str, Any]) -> str | None:
    """Return which is better by the paired difference `ABOVE`: the agent, best-of, or None where that cannot be said."""
    if difference["n"] < LEAST_LATENTS:
        return None
    return TEST_AND_REFINE if difference["low"] > 0 else BEST_OF if difference["high"] < 0 else None


@dataclass(frozen=True, slots=True)
class _Table:
    """What each latent scores and costs where it stops on each rung, shapes (latents, rungs), and where the rule stops it."""

    test: Floats
    cost: Floats
    """Of this rung and all below."""
    stops: Floats
    """1 on the rung where the rule stops, else 0."""
    unit: str


def _table(ladders: Sequence[Sequence[Tread]], stops: Sequence[int]) -> _Table:
    rungs = len(ladders[0])
    usd = np.array([[one.usd for one in own] for own in ladders], dtype=np.float64)
    tokens = np.array([[one.tokens for one in own] for own in ladders], dtype=np.float64)
    cost, unit = (usd, "USD") if usd.any() else (tokens, "tokens")
    test = np.array([[one.test for one in own] for own in ladders], dtype=np.float64)
    return _Table(test, cost.cumsum(axis=1), np.eye(rungs)[list(stops)], unit)


def _routed(
    steps: Sequence[Sequence[StepRecord]], ladders: Sequence[Sequence[Tread]], rule: Rule, seed: int, folds: int
) -> list[int]:
    """Return the rung on which each latent stops, by gains fitted without its fold."""
    fold = generator(seed, "routing", "folds").permutation(len(steps)) % min(folds, len(steps))
    gains = {
        left: fit_gains([one for one, at in zip(steps, fold, strict=True) if at != left], rule.rungs)
        for left in sorted(set(fold.tolist()))
    }
    return [_stop(own, gains[int(at)], rule) for own, at in zip(ladders, fold, strict=True)]


def _stop(own: Sequence[Tread], gains: Gains, rule: Rule) -> int:
    return next(rung for rung, tread in enumerate(own) if climbs(rung, tread.standing, gains, rule) != "climbs")


def _policies(table: _Table, weights: Floats, rungs: Sequence[str]) -> dict[str, Floats]:
    """Return every figure under each row of `weights`, shape (resamples, latents), rows of which sum to one."""
    test, cost, shares = weights @ table.test, weights @ table.cost, weights @ table.stops
    routed, paid = weights @ (table.test * table.stops).sum(axis=1), weights @ (table.cost * table.stops).sum(axis=1)
    random = _random(test, cost, shares, paid)
    figures = {
        "routed": routed,
        "cost of routed": paid,
        "lowest rung only": test[:, 0],
        "cost of lowest rung only": cost[:, 0],
        "climb always": test[:, -1],
        "cost of climb always": cost[:, -1],
        "random at equal cost": random,
        "routed - random at equal cost": routed - random,
        "routed - climb always": routed - test[:, -1],
        "routed - lowest rung only": routed - test[:, 0],
    }
    below, before = np.full(len(weights), CHANCE.value, dtype=np.float64), np.zeros(len(weights))
    for place, name in enumerate(rungs):
        gain, price = test[:, place] - below, cost[:, place] - before
        figures |= {f"share that stops on {name}": shares[:, place], f"gain of {name}": gain, f"price of {name}": price}
        figures[f"gain per cost of {name}"] = _ratio(gain, price) * (1 if table.unit == "USD" else 1_000_000)
        below, before = test[:, place], cost[:, place]
    return figures


def _random(test: Floats, cost: Floats, shares: Floats, paid: Floats) -> Floats:
    """Return the score of random routing with these `shares`, mixed with always or never climbing until it costs `paid`."""
    score, own = (shares * test).sum(axis=1), (shares * cost).sum(axis=1)
    other, its_cost = np.where(
        (paid > own)[:, None], np.stack([test[:, -1], cost[:, -1]], 1), np.stack([test[:, 0], cost[:, 0]], 1)
    ).T
    part = np.clip(np.nan_to_num(_ratio(paid - own, its_cost - own)), 0.0, 1.0)
    mixed: Floats = score + part * (other - score)
    return mixed


def _against_best_of(steps: Sequence[Sequence[StepRecord]], table: _Table, seed: int) -> list[Measured]:
    """Return best-of-N beside climbing always, on the latents for which it was drawn and has a test score."""
    drawn = {n: ladder(own, [BEST_OF])[0] for n, own in enumerate(steps)}
    known = {n: one for n, one in drawn.items() if one.reached and one.test is not None}
    if not known:
        return []
    rows = list(known)
    score = np.array([one.test for one in known.values()], dtype=np.float64)
    price = np.array([one.usd if table.unit == "USD" else one.tokens for one in known.values()], dtype=np.float64)
    always, its_price = table.test[rows, -1], table.cost[rows, -1]

    def figures(weights: Floats) -> dict[str, Floats]:
        return {
            BEST_OF: weights @ score,
            f"cost of {BEST_OF}": weights @ price,
            f"climb always - {BEST_OF}": weights @ (always - score),
            f"cost of climb always - {BEST_OF}": weights @ (its_price - price),
        }

    found = _bootstrapped(figures, len(rows), seed)
    return [Measured(name, *_interval(own), n=len(rows), unit=_unit(name, table.unit)) for name, own in found.items()]


def _bootstrapped(figures: Callable[[Floats], Mapping[str, Floats]], latents: int, seed: int) -> dict[str, Floats]:
    """Return each figure on the latents themselves, then on resamples of them: shape (1 + resamples,)."""
    rng, chance = generator(seed, "routing", "bootstrap"), np.full(latents, 1 / latents)
    parts = [figures(chance[None, :])]
    block = max(1, 2_000_000 // latents)
    for at in range(0, RESAMPLES, block):
        parts.append(figures(rng.multinomial(latents, chance, size=min(block, RESAMPLES - at)) / latents))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interval(samples: Floats) -> tuple[float | None, float | None, float | None]:
    value, drawn = float(samples[0]), samples[1:]
    if np.isnan(value):
        return None, None, None
    low, high = np.nanquantile(drawn, [0.025, 0.975]).tolist()
    return value, low, high


def _ratio(above: Floats, below: Floats) -> Floats:
    found: Floats = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=found, where=below != 0)
    return found


def _unit(name: str, cost: str) -> str:
    if name.startswith(("cost of", "price of")):
        return f"{cost} a latent"
    if name.startswith("gain per cost"):
        return "balanced accuracy per USD" if cost == "USD" else "balanced accuracy per million tokens"
    return "share of latents" if name.startswith("share") else "balanced accuracy"
