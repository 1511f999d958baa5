"""Claims checked by code, on prompts that no experiment has seen.

A causal claim says that an intervention on some latents makes the metric fall (or rise). For each:

1. It must rest on an experiment that exists, and name latents that exist. Held-out prompts that do not show the behaviour as
   they are (for `rises` with `flips`: that do) are left out and counted; fewer than eight left verify nothing.
2. Latents that are active on none of these prompts fail (but for steering, and where a judge reads what is written), and an
   interchange where prompts and variants do not differ in the metric, or differ the other way: then no latent can carry the
   difference.
3. The intervention runs on every prompt, and so does the same on random sets of as many latents that fire as often; with
   `steer` all at one KL, matched on other prompts, and random directions at that KL beside them.
4. It is verified if all of this holds:
   the effect's interval, at a confidence that holds for all causal claims together, lies beyond the range from the 2.5th to
   the 97.5th percentile of the random sets' effects (and the random directions'), and beyond 0;
   the larger of two p-values, paired over prompts and by rank among the random sets (`family`), is at most 0.05 after Holm's
   adjustment over all causal claims, those that could not be checked among them;
   with `flips`, the share of prompts that flipped has its Wilson limit above one half, and the random sets' 95th percentile
   lies below that limit.

What is not held out, an experiment's own figures above all, plays no part. The model that claims has no say in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from exegete.agent.findings import figure
from exegete.agent.investigation.arms import MATCHED, WORDS, Arms, Latents, active_on, headline_of, matched_sets, named
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Case, Claim, Headline, Verdict
from exegete.agent.investigation.family import LEVEL, holm, paired_p, random_sets_needed, rank_p, widened
from exegete.agent.investigation.measuring import Floats, Measurable
from exegete.agent.investigation.steering import steered
from exegete.tools.errors import ToolError
from exegete.tools.estimates import estimate
from exegete.tools.interventions import Intervention, Tokens
from exegete.tools.interventions import ablate as ablated
from exegete.tools.interventions import patch as patched
from exegete.tools.live_model import Trial

FEWEST = 8
"""Held-out prompts that a claim is verified on, at least."""
RANDOM_SETS = 199
"""Beside each claim, at least: with them ten claims of a report can pass."""
JUDGED_SETS = 39
"""The same where a judge is asked about every continuation; more where there are more than two claims."""
DIRECTIONS = 99
"""Random directions beside a claim that steers."""
KL = 0.5
"""That claims are steered to, in nats."""
_MATCHED_ON = 8

Source = tuple[Tokens, ...]


class Unverifiable(Exception):
    """A claim cannot be checked, or fails before it is measured; the message says why."""

    def __init__(self, why: str, status: Literal["failed", "unverified"] = "unverified") -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of one claim."""

    arms: Arms
    sign: int
    """1 where the metric should rise, −1 where it should fall."""
    note: str
    """Which prompts it was measured on, in words."""
    direction: Headline | None = None

    @property
    def p(self) -> float:
        """The larger of the paired p-value and that by rank."""
        change = self.sign * self.arms.change
        beside = self.sign * (self.arms.controls - self.arms.measurable.clean)
        known = np.isfinite(change)
        among = np.array([row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.nan for row in beside.T])
        differences = (change - among)[known & np.isfinite(among)]
        ranked = rank_p(float(change[known].mean()), self.sign * self.arms.control_changes)
        return max(paired_p(differences), ranked)


@dataclass(frozen=True)
class Runs:
    """What has run so far: claims share many of their random sets."""

    bench: Bench
    every: Measurable
    """The metric on all held-out prompts."""
    known: dict[tuple[Latents, str, Tokens | None], float] = field(default_factory=dict)
    """Latents, prompt, and where they take their activations from → metric."""

    def rows(self, own: Measurable, sets: Sequence[Latents], sources: Source | None, active: np.ndarray) -> Floats:
        """Return the metric with each set taken out, shape (set, case).

        Where no latent of a set is active this changes nothing, and no run is spent on it.
        """
        places = [(int(row), int(i)) for row, i in np.argwhere(active)]
        keys = [(sets[row], own.cases[i].prompt, sources[i] if sources else None) for row, i in places]
        new = {key: place for key, place in zip(keys, places, strict=True) if key not in self.known}
        if new:
            trials = [(i, Trial(own.prompts[i], _done(self.bench, sets[row], i, sources))) for row, i in new.values()]
            self.known.update(zip(new, own.at(trials).tolist(), strict=True))
        found: Floats = np.tile(own.clean, (len(sets), 1))
        for (row, i), key in zip(places, keys, strict=True):
            found[row, i] = self.known[key]
        return found


async def verify(
    bench: Bench,
    held_out: Sequence[Case],
    claims: Sequence[Claim],
    known: Collection[str],
    *,
    controls: int | None = None,
) -> list[Verdict]:
    """Check the claims of a report on held-out prompts, and return a verdict for each, in order.

    Args:
        bench: of the investigation.
        held_out: prompts that it has not seen.
        claims: all claims of the report: those that are causal share one chance of error.
        known: ids of the experiments that exist.
        controls: random sets beside each claim; by default as many as let each pass.

    Raises:
        UserError: a held-out prompt cannot be measured, or as `LiveModel.run`.
    """
    # Not a copy where it has a loop already: what the bench has measured once stays with it.
    own = bench if bench.loop is not None else replace(bench, loop=asyncio.get_running_loop())
    return await asyncio.to_thread(verdicts, own, held_out, claims, known, controls)


def verdicts(
    bench: Bench,
    held_out: Sequence[Case],
    claims: Sequence[Claim],
    known: Collection[str],
    controls: int | None = None,
) -> list[Verdict]:
    """Return what `verify` returns, from a thread that has no event loop of its own."""
    family = sum(claim.kind == "causal" for claim in claims)
    if not family:
        return [_correlational(claim, known) for claim in claims]
    measurable = Measurable(bench.live, bench.metric, held_out, seed=bench.seed, judge=bench.judge, ask=bench.ask)
    least = JUDGED_SETS if bench.metric.kind == "judged" else RANDOM_SETS
    count = random_sets_needed(family, least) if controls is None else controls
    found: list[Measured | Verdict] = []
    runs = Runs(bench, measurable)
    for claim in claims:
        if claim.kind == "correlational":
            found.append(_correlational(claim, known))
            continue
        try:
            found.append(_measured(runs, claim, known, count))
        except Unverifiable as error:
            found.append(Verdict(claim, error.status, str(error)))
    causal = [one for one, claim in zip(found, claims, strict=True) if claim.kind == "causal"]
    adjusted = iter(holm([one.p if isinstance(one, Measured) else None for one in causal]))
    judged: list[Verdict] = []
    for claim, one in zip(claims, found, strict=True):
        p = next(adjusted) if claim.kind == "causal" else None
        if isinstance(one, Verdict):
            judged.append(one)
            continue
        assert p is not None
        judged.append(_judged(claim, one, p, family))
    return judged


def _correlational(claim: Claim, known: Collection[str]) -> Verdict:
    if missing := _missing(claim, known):
        return Verdict(claim, "unverified", missing)
    return Verdict(claim, "correlational", "nothing causal is claimed, and nothing was checked by an intervention")


def _missing(claim: Claim, known: Collection[str]) -> str:
    unknown = [one for one in claim.experiments if one not in known]
    return f"it rests on no experiment: there is no {', '.join(unknown)}" if unknown else ""


def _measured(runs: Runs, claim: Claim, known: Collection[str], count: int) -> Measured:
    """Return what the claim's intervention does on the held-out prompts. Raises Unverifiable."""
    if not claim.experiments:
        raise Unverifiable("it rests on no experiment")
    if missing := _missing(claim, known):
        raise Unverifiable(missing)
    try:
        latents = tuple(runs.bench.latents(list(claim.latents)))
        own, note = _asked(runs.every, claim)
        measure = _steered if claim.intervention == "steer" else _taken_out
        found = measure(runs, own, claim, latents, count, note)
    except ToolError as error:
        raise Unverifiable(str(error)) from error
    left = len(own.cases) - found.arms.missing
    if left < FEWEST:
        raise Unverifiable(f"the judge gave verdicts on {left} held-out prompts; at least {FEWEST} are needed")
    return found


def _asked(every: Measurable, claim: Claim) -> tuple[Measurable, str]:
    """Return the held-out prompts that the claim can be checked on, and how many there are in words."""
    coming = claim.expects == "rises" and claim.flips
    line, total = every.metric.shown, len(every.cases)
    unknown = int((~np.isfinite(every.clean)).sum())
    fit = (every.clean <= line) if coming else (every.clean > line)
    chosen = np.flatnonzero(fit & np.isfinite(every.clean)).tolist()
    words = "shows the behaviour already" if coming else "does not show the behaviour"
    why = f"the model {words} on {total - len(chosen) - unknown} of {total} held-out prompts"
    if unknown:
        why += f", and the judge gave no verdict on {unknown}"
    if len(chosen) >= FEWEST and claim.intervention == "interchange":
        chosen = [i for i in chosen if every.variants[i] is not None]
        why = f"{len(chosen)} of {total} held-out prompts that can be used have a variant to take activations from"
    if len(chosen) < FEWEST:
        raise Unverifiable(f"{why}; at least {FEWEST} must be left")
    return every.part(chosen), f"measured on {len(chosen)} of {total} held-out prompts"


def _taken_out(runs: Runs, own: Measurable, claim: Claim, latents: Latents, count: int, note: str) -> Measured:
    sources: Source | None = None
    if claim.intervention == "interchange":
        sources = tuple(variant for variant in own.variants if variant is not None)
        note += f"; {_difference(own, sources, claim)}"
    bench = runs.bench
    sets = (latents, *matched_sets(bench, latents, count))
    active = active_on(bench, own.prompts, sets)
    if sources is not None:
        active |= active_on(bench, sources, sets)
    if not active[0].any():
        verb = "is" if len(latents) == 1 else "are"
        raise Unverifiable(f"{named(latents)} {verb} active on none of the held-out prompts", "failed")
    rows = runs.rows(own, sets, sources, active)
    done = tuple(_done(bench, latents, i, sources) for i in range(len(own.cases)))
    return Measured(Arms(own, latents, done, rows[0], sets[1:], rows[1:]), _sign(claim), note)


def _steered(runs: Runs, own: Measurable, claim: Claim, latents: Latents, count: int, note: str) -> Measured:
    directions = min(count, DIRECTIONS)
    found = steered(runs.bench, own, latents, KL, 1, "last", count=count, directions=directions, matched_on=_MATCHED_ON)
    if found.arms is None:
        raise Unverifiable(f"no strength brings {named(latents)} to KL {KL:g}, at which it would be checked")
    if not len(found.arms.sets) or not len(found.directions):
        raise Unverifiable(f"no control reaches KL {KL:g}, at which it would be checked")
    return Measured(found.arms, _sign(claim), f"{note}, at KL {KL:g}", found.direction)


def _difference(own: Measurable, sources: Source, claim: Claim) -> str:
    """Return in words how prompts and variants differ in the metric. Raises Unverifiable where the claim cannot hold."""
    changes = own.values([Trial(source) for source in sources]) - own.clean
    values = changes[np.isfinite(changes)]
    if len(values) < FEWEST:
        raise Unverifiable(f"the judge gave a verdict on {len(values)} variants; at least {FEWEST} are needed")
    found = estimate(values)
    assert found.low is not None and found.high is not None
    words = f"from prompt to variant the metric changes by {figure(found.value, found.low, found.high, found.n)}"
    if found.low <= 0 <= found.high:
        raise Unverifiable(f"prompts and variants do not differ in the metric: {words}", "failed")
    if found.value * _sign(claim) < 0:
        raise Unverifiable(f"the metric {claim.expects} in no variant: {words}", "failed")
    return words


def _done(bench: Bench, latents: Latents, case: int, sources: Source | None) -> Intervention:
    dictionary = bench.live.dictionary.fingerprint
    return ablated(dictionary, latents) if sources is None else patched(dictionary, latents, sources[case])


def _sign(claim: Claim) -> int:
    return 1 if claim.expects == "rises" else -1


def _judged(claim: Claim, found: Measured, p: float, family: int) -> Verdict:
    """Return the verdict on what was measured; `p` is adjusted for the family."""
    arms = found.arms
    known = arms.change[np.isfinite(arms.change)]
    name = f"mean change of the {WORDS[arms.measurable.metric.kind]} on held-out prompts"
    control = MATCHED if found.direction is None else f"{MATCHED}, at the same KL"
    effect = _together(headline_of(arms.change, name, arms.control_changes, control), known, family)
    direction = None if found.direction is None else _together(found.direction, known, family)
    flips = arms.flips("came" if claim.expects == "rises" else "gone")
    flipped = flips.headline("share of held-out prompts that flipped")
    against = [*_within(effect, found.sign), *([] if direction is None else _within(direction, found.sign))]
    if not p <= LEVEL:
        against.append(f"p = {found.p:.2g}, {_adjusted(p, family)}, which is above {LEVEL:g}")
    if claim.flips:
        against += _few_flips(flipped)
    shown = f"effect {figure(effect.value, effect.low, effect.high, effect.n)}"
    beyond = f"{shown}, beyond that of {effect.control_n} {control}; p = {found.p:.2g}, {_adjusted(p, family)}"
    why = "; ".join(against) or beyond
    why = f"{why} ({found.note})"
    return Verdict(claim, "failed" if against else "verified", why, effect, flipped, direction, found.p, p)


def _adjusted(p: float, family: int) -> str:
    return f"{p:.2g} adjusted for {family} causal claim{'s' if family > 1 else ''}"


def _together(headline: Headline, values: Floats, family: int) -> Headline:
    """Return the headline with an interval that holds for the whole family."""
    value, low, high = widened(values, family)
    return replace(headline, value=value, low=low, high=high)


def _within(effect: Headline, sign: int) -> list[str]:
    """Return why an effect is not beyond its control; nothing where it is."""
    assert effect.low is not None and effect.high is not None
    if effect.control_low is None or effect.control_high is None:
        return ["it has no control"]
    # Beyond 0 as well: controls alone may have moved the other way.
    beyond = effect.low > max(effect.control_high, 0.0) if sign > 0 else effect.high < min(effect.control_low, 0.0)
    if beyond:
        return []
    own, control = (f"[{low:.3g}, {high:.3g}]" for low, high in _ends(effect))
    return [f"its interval {own} does not lie beyond 0 and {control}, that of {effect.control}"]


def _ends(effect: Headline) -> list[tuple[float, float]]:
    pairs = ((effect.low, effect.high), (effect.control_low, effect.control_high))
    return [(low or 0.0, high or 0.0) for low, high in pairs]


def _few_flips(flipped: Headline) -> list[str]:
    if flipped.value is None or flipped.low is None:
        return ["no prompt could flip"]
    own = figure(flipped.value, flipped.low, flipped.high, flipped.n)
    if not flipped.low > 0.5:
        return [f"the share of prompts that flipped is {own}, whose limit is not above one half"]
    if flipped.control_high is None or not flipped.control_high < flipped.low:
        return [
            f"random sets flip as many: 95 % of them up to {figure(flipped.control_high) or 'unknown'}, beside {own}"
        ]
    return []
