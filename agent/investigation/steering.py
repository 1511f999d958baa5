"""The experiment that turns latents up or down to a fixed KL, and what others need to do the same.

Any push changes what a model says if it is strong enough. So strengths are matched: each set of latents, each random set of
as many that fire as often, and each random direction is brought to one mean KL(clean ‖ changed) of the next token, on
other texts where there are some (PROTOCOLS §8), and only then is the metric taken of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from exegete.agent.findings import figure, plain
from exegete.agent.investigation.arms import (
    MATCHED,
    Arms,
    Latents,
    headline_of,
    matched_sets,
    named,
    report,
    told,
)
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Outcome
from exegete.agent.investigation.measuring import Floats, Measurable
from exegete.agent.investigation.toolbelt import tool
from exegete.tools import interventions
from exegete.tools.controls import random_direction
from exegete.tools.errors import ToolError
from exegete.tools.estimates import estimate
from exegete.tools.interventions import Tokens, push
from exegete.tools.live_model import Trial
from exegete.tools.seeds import derive_seed
from exegete.tools.strength import Make, Matched, match_strengths

Positions = Literal["last", "all"]

LADDER = (0.25, 0.5, 1.0, 2.0)
"""Steps of a steering curve, as shares of the KL asked for."""
MATCHING = 16
"""Prompts that strengths are matched on, at most."""
MOST_CONTROLS = 10
"""Random sets, and random directions, of a steering experiment: each needs a strength of its own."""


@dataclass(frozen=True, eq=False)
class Steered:
    """A set of latents and its controls at one KL, on the same cases."""

    kl: float
    matched: Matched
    arms: Arms | None
    """The latents beside random ones; None where no strength reaches the KL."""
    directions: Floats
    """Mean change of the metric under each random direction that reaches it, shape (direction,)."""
    unreachable: int
    """Controls of either kind that do not."""

    @property
    def direction(self) -> Headline | None:
        """The effect beside random directions; None where the KL is not reached."""
        if self.arms is None:
            return None
        name = "mean change of the metric at the same KL"
        return headline_of(self.arms.change, name, self.directions, "random directions at the same KL")


@tool("experiment")
def steer(
    bench: Bench,
    latents: list[int],
    kl: float = 0.5,
    direction: Literal["up", "down"] = "up",
    positions: Positions = "last",
) -> Outcome:
    """Turn latents up, or down below what they are, by as much as changes the next token by a given KL.

    Headline: the mean over prompts of the metric while steered, less the metric as it is. Controls, all at the same KL:
    random sets of as many latents that fire as often, and random directions. A ladder of weaker and stronger KLs shows
    whether the effect grows with it.

    Args:
        latents: that are turned together, all by the same activation.
        kl: mean KL(clean || steered) of the next token that the strength is matched to, in nats.
        direction: up adds to the activation, down takes from it.
        positions: from the last token of the prompt on, or at every one.
    """
    chosen, own = tuple(bench.latents(latents)), bench.measurable
    require_kl(kl)
    sign: Literal[1, -1] = 1 if direction == "up" else -1
    found = steered(bench, own, chosen, kl, sign, positions, count=min(bench.controls, MOST_CONTROLS))
    facts: dict[str, Any] = {
        "kl": kl,
        "direction": direction,
        "positions": positions,
        "matched_on": len(matching(bench)),
        "matched": found.matched,
        "random_directions": found.directions,
        "unreachable_controls": found.unreachable,
    }
    if found.arms is None:
        return _unreachable(found, chosen, facts)
    done = f"{named(chosen)} turned {direction} to KL {kl:g}"
    rises = float(np.nanmean(found.arms.change)) > 0
    outcome = report(found.arms, done, facts, to="came" if rises else "gone", control=f"{MATCHED}, at the same KL")
    return _with_ladder(outcome, found, *_ladder(bench, own, chosen, found, sign, positions))


def steered(
    bench: Bench,
    measurable: Measurable,
    latents: Latents,
    kl: float,
    sign: Literal[1, -1],
    positions: Positions,
    *,
    count: int,
    directions: int | None = None,
    matched_on: int = MATCHING,
) -> Steered:
    """Return latents, `count` random sets and `directions` random directions (as many, by default), all at one KL.

    Strengths are matched on `matched_on` prompts, at most.

    Raises:
        ToolError: too few latents fire that are not in the set.
        UserError: as `match_strengths`.
    """
    model, prompts = bench.live.model, matching(bench)[:matched_on]
    (own,) = match_strengths(model, [turning(bench, latents, sign, positions)], prompts, target_kl=kl)
    if own.strength is None:
        return Steered(kl, own, None, np.zeros(0), 0)
    sets = matched_sets(bench, latents, count)
    makes = [turning(bench, one, sign, positions) for one in sets]
    makes += [pushing(bench, i, positions) for i in range(count if directions is None else directions)]
    # Where the latents' own strength lies is where those of their controls are looked for first.
    found = match_strengths(model, makes, prompts, target_kl=kl, first=own.strength, per_batch=2) if makes else []
    done = [None if one.strength is None else make(one.strength) for make, one in zip(makes, found, strict=True)]
    change = turning(bench, latents, sign, positions)(own.strength)
    held = [i for i, one in enumerate(done) if one is not None]
    rows = [change, *(one for one in done if one is not None)]
    values = measurable.table([[Trial(prompt, one) for prompt in measurable.prompts] for one in rows])
    random = [row + 1 for row, i in enumerate(held) if i < len(sets)]
    pushed = [row + 1 for row, i in enumerate(held) if i >= len(sets)]
    kept = tuple(sets[i] for i in held if i < len(sets))
    arms = Arms(measurable, latents, (change,) * len(measurable.cases), values[0], kept, values[random])
    means = np.array([np.nanmean(values[row] - measurable.clean) for row in pushed])
    return Steered(kl, own, arms, means, len(done) - len(held))


def turning(bench: Bench, latents: Sequence[int], sign: Literal[1, -1], positions: Positions) -> Make:
    """Return what turns latents by a strength, up or down."""
    dictionary = bench.live.dictionary.fingerprint
    return lambda strength: interventions.steer(dictionary, latents, sign * strength, positions)


def pushing(bench: Bench, index: int, positions: Positions) -> Make:
    """Return what pushes along the random direction of a number, at the point that the dictionary writes to."""
    point = bench.live.dictionary.hook_point_out
    width = bench.live.model.subject.width(point)
    vector = random_direction(width, derive_seed(bench.seed, "random directions", index)).tolist()
    return partial(push, point, vector, positions=positions)


def matching(bench: Bench) -> list[Tokens]:
    """Return the prompts that strengths are matched on: other texts, where there are some, else search prompts."""
    texts = [bench.live.model.tokens(text) for text in bench.texts[:MATCHING]]
    return texts or bench.prompts[:MATCHING]


def require_kl(kl: float) -> None:
    """Raise ToolError where no strength could be matched to such a KL."""
    if not 0 < kl <= 20:
        raise ToolError(f"kl is {kl:g}; give a number of nats above 0, for example 0.5")


def _unreachable(found: Steered, latents: Latents, facts: dict[str, Any]) -> Outcome:
    headline = Headline(f"mean change of the metric, {named(latents)} at KL {found.kl:g}", None)
    text = (
        f"no strength brings {named(latents)} to KL {found.kl:g}: the nearest seen is {figure(found.matched.kl)}; try a "
        "smaller KL, or positions = all"
    )
    return Outcome(text, headline, plain({**facts, "latents": latents}))


def _with_ladder(outcome: Outcome, found: Steered, curve: dict[str, Any], ladder: Sequence[dict[str, Any]]) -> Outcome:
    """Add the directions beside the latents, and what other KLs do."""
    assert found.arms is not None and found.direction is not None
    lines = [
        f"strength {figure(found.matched.strength)}, in units of activation; KL {figure(found.matched.kl)}",
        told(found.direction, found.arms.measurable.metric.unit)[1],
        "at other KLs: " + "; ".join(f"{point['kl']:.3g}: {figure(point['change'])}" for point in ladder),
    ]
    text = outcome.text.split("\n")
    return replace(
        outcome,
        text="\n".join([*text[:2], *lines, *text[2:]]),
        facts={**outcome.facts, "ladder": plain(ladder)},
        plots=(*outcome.plots, curve),
    )


def _ladder(
    bench: Bench, own: Measurable, latents: Latents, found: Steered, sign: Literal[1, -1], positions: Positions
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the steering curve as a plot, and its points."""
    make, points = turning(bench, latents, sign, positions), []
    assert found.arms is not None and found.matched.strength is not None
    for step in LADDER:
        matched = found.matched
        if step != 1:
            first = found.matched.strength * step**0.5
            (matched,) = match_strengths(
                bench.live.model, [make], matching(bench), target_kl=found.kl * step, first=first
            )
        if matched.strength is None:
            continue
        change = make(matched.strength)
        values = found.arms.change if step == 1 else own.values([Trial(one, change) for one in own.prompts]) - own.clean
        effect = estimate(values[np.isfinite(values)])
        points.append({"kl": found.kl * step, "strength": matched.strength, "change": effect.value, "low": effect.low,
                       "high": effect.high})  # fmt: skip
    series = [_series("latents", points, False)]
    for label, means in (("random latents", found.arms.control_changes), ("random directions", found.directions)):
        if len(means):
            low, high = np.quantile(means, (0.025, 0.975))
            here = {"kl": found.kl, "change": float(means.mean()), "low": float(low), "high": float(high)}
            series.append(_series(label, [here], True))
    title = f"{named(latents)} steered"
    return {"kind": "curve", "title": title, "x": "KL (nats)", "y": own.metric.unit, "series": series}, points


def _series(label: str, points: Sequence[dict[str, Any]], control: bool) -> dict[str, Any]:
    return {
        "label": label,
        "points": [[point["kl"], point["change"]] for point in points],
        "low": [point["low"] for point in points],
        "high": [point["high"] for point in points],
        "control": control,
    }
