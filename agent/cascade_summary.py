"""What a run says of its cascade: where latents stopped, what each rung gained and cost, and whether routing paid.

1. Counts are over all latents of the run, by the steps that were recorded of them.
2. Scores and prices are over the control subset, whose latents climbed every rung and drew best-of-N at equal cost; they are
   on the test split, cross-fitted, with intervals over latents (`routing_value`).
   Where the rung `test-and-refine` is there, it stands beside best-of-N by the same language model at equal tokens; which of the
   two is better is said only where the interval of the paired difference does not touch 0, on ten latents or more.
3. `flattered` is by how much the refine-split score of the explanation that stands exceeds its test score there: what choosing
   and revising by it has cost in honesty. The reported scores are not touched by it, since they are on the test split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from exegete.agent.routing import Rule, ladder
from exegete.agent.routing_value import ABOVE, BEST_OF_BESIDE, LEAST_LATENTS, agent_beside_best_of, measured, winner
from exegete.agent.rungs import TEST_AND_REFINE
from exegete.evaluators.statistics import paired_interval
from exegete.tools.errors import UserError
from exegete.tools.seeds import generator
from exegete.tools.store.records import StepRecord

if TYPE_CHECKING:
    from exegete.tools.store.results import RunResults


def cascade_figures(results: RunResults, rule: Rule, seed: int) -> dict[str, Any]:
    """Return the figures of a run's cascade as JSON values: `stopped`, `measured` and `flattered`, the latter two where there is
    a control subset large enough, and `beside_best_of` where there is the rung `test-and-refine`."""
    found: dict[str, Any] = {"rungs": list(rule.rungs), "target": rule.target, "stopped": results.stopped()}
    control = [list(own) for _, own in groupby(results.control_steps(), key=lambda row: row[0])]
    steps = [[step for _, step in own] for own in control]
    if TEST_AND_REFINE in rule.rungs:
        found["beside_best_of"] = _beside(steps, seed)
    try:
        figures = measured(steps, rule, seed)
    except UserError as error:  # Too few latents have all scores: said, and no figure given.
        return {**found, "not_measured": str(error)}
    return {
        **found,
        "measured": {one.name: one.described() for one in figures},
        "flattered": _flattered(steps, rule, seed),
    }


def _beside(steps: Sequence[Sequence[StepRecord]], seed: int) -> dict[str, Any]:
    try:
        figures = {one.name: one.described() for one in agent_beside_best_of(steps, seed)}
    except UserError as error:
        return {"not_measured": str(error)}
    return {**figures, "better": winner(figures[ABOVE])}


def _flattered(control: Sequence[Sequence[StepRecord]], rule: Rule, seed: int) -> dict[str, Any]:
    tops = [ladder(steps, rule.rungs)[-1] for steps in control]
    pairs = [(top.standing.value, top.test) for top in tops if top.standing.value is not None and top.test is not None]
    refine, test = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    value, low, high = paired_interval(refine, test, generator(seed, "flattered"))
    return {"value": value, "low": low, "high": high, "n": len(pairs)}


def cascade_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return `cascade_figures` as lines for a terminal."""
    lines = [f"cascade: {' → '.join(figures['rungs'])}, target {figures['target']:g}"]
    lines += [f"  {_stops(name, counts)}" for name, counts in figures["stopped"].items()]
    lines += beside_lines(figures.get("beside_best_of"))
    if "measured" not in figures:
        return [*lines, f"  routing is not measured: {figures['not_measured']}"]
    own = figures["measured"]
    lines.append("  on the control subset, test split:")
    for name in ("routed", "lowest rung only", "climb always", "random at equal cost", "best-of"):
        if name in own:
            cost = own.get(f"cost of {name}")
            lines.append(f"    {name:<21}{_text(own[name])}" + (f", {_price(cost)}" if cost else ""))
    for name in ("routed - random at equal cost", "routed - climb always", "climb always - best-of"):
        if name in own:
            lines.append(f"    {name.replace(' - ', ' above '):<21} by {_text(own[name])}")
    for rung in figures["rungs"]:
        gain, price, rate = (own[f"{what} of {rung}"] for what in ("gain", "price", "gain per cost"))
        rated = f": {_text(rate, 2)} {rate['unit']}" if rate["value"] is not None else ""
        lines.append(f"    {rung} adds {_text(gain)} for {_price(price)}{rated}")
    return [*lines, f"    refine-split scores flatter by {_text(figures['flattered'])}"]


def beside_lines(figures: Mapping[str, Any] | None) -> list[str]:
    """Return how the agent stands beside best-of-N as lines for a terminal; none where there was no agent."""
    if figures is None:
        return []
    if "not_measured" in figures:
        return [f"  {TEST_AND_REFINE} beside best-of-N is not measured: {figures['not_measured']}"]
    lines = [f"  {TEST_AND_REFINE} beside best-of-N by the same model at equal tokens, test split:"]
    for shown, name in ((TEST_AND_REFINE, TEST_AND_REFINE), ("best-of-N", BEST_OF_BESIDE)):
        lines.append(f"    {shown:<21}{_text(figures[name])}, {_price(figures[f'cost of {name}'])}")
    return [*lines, f"    {TEST_AND_REFINE} above best-of-N by {_text(figures[ABOVE])}: {verdict(figures)}"]


def verdict(figures: Mapping[str, Any]) -> str:
    """Return in words which of the two is better, by `beside_best_of`."""
    if figures["better"] is not None:
        return f"{'best-of-N' if figures['better'] != TEST_AND_REFINE else TEST_AND_REFINE} is better here"
    if figures[ABOVE]["n"] < LEAST_LATENTS:
        return f"fewer than {LEAST_LATENTS} latents, which say nothing of which is better"
    return "the interval holds 0, so neither is shown to be better"


def _stops(rung: str, decisions: Mapping[str, int]) -> str:
    told = ", ".join(f"{count:,} {decision.replace('_', ' ')}" for decision, count in sorted(decisions.items()))
    return f"{sum(decisions.values()):,} latents stopped on {rung}: {told}"


def _text(figure: Mapping[str, Any], digits: int = 3) -> str:
    if figure["value"] is None:
        return "undefined"
    # Adding 0 turns a −0 that rounding leaves into 0.
    value, low, high = (round(figure[name], digits) + 0.0 for name in ("value", "low", "high"))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] (n = {figure['n']:,})"


def _price(figure: Mapping[str, Any]) -> str:
    digits = ",.0f" if figure["unit"].startswith("tokens") else ".3g"
    return f"{figure['value']:{digits}} {figure['unit']}"
