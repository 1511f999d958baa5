"""Experiments on what holds the metric up: attribute, minimal_set, interactions.

They call the instruments of those names (`exegete.tools`), which state their algorithms. Attribution and sets of latents are
chosen on the search prompts, so that what is found flatters itself there: held-out prompts are for `verifying`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from exegete.agent.findings import estimated, figure, plain
from exegete.agent.investigation.arms import MATCHED, WORDS, as_json, bars_of, named, told
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Outcome
from exegete.agent.investigation.fencing import fenced, quoted
from exegete.agent.investigation.measuring import Measurable
from exegete.agent.investigation.toolbelt import tool
from exegete.tools.ablation_sets import ZERO, Ablation
from exegete.tools.attribution import Attribution, LatentAttribution
from exegete.tools.attribution import attribute as attributed
from exegete.tools.errors import ToolError
from exegete.tools.growing import grow
from exegete.tools.interactions import ExactInteraction, ExactInteractions, exact_interactions
from exegete.tools.interactions import interactions as interacting
from exegete.tools.minimal_set import MinimalSet
from exegete.tools.minimal_set import minimal_set as smallest
from exegete.tools.random_masks import RandomMasks, random_masks

How = Literal["zero", "interchange"]

_FEWEST = 4
"""Prompts that a set is searched on, at least."""
_PLOTTED = 2
"""Prompts whose tokens are drawn with their attributions."""
_MOST_MASKED = 24
_CONTROLS = 10
"""Random latents among the masked ones."""


@tool("experiment")
def attribute(bench: Bench, top: int = 10, prompts: int = 16, groups: int = 32) -> Outcome:
    """Find the latents that hold the metric up, by gradients, and check the leaders by setting each alone to zero.

    Headline: the exact loss of the metric when the first latent of the ranking alone is set to zero, mean over prompts; above
    zero where it holds the metric up. Control: the size of that loss for other active latents drawn at random, whose upper
    end is their 95th percentile.

    Args:
        top: latents to rank and check.
        prompts: search prompts to attribute on, the first ones.
        groups: of latents, each with integrated gradients of its own; more rank more surely and cost as many passes.
            0 takes one gradient for all.
    """
    own = bench.measurable
    if own.gradient is None:
        raise ToolError("a judged metric has no gradient; compare prompts with their variants, and ablate what differs")
    if not 1 <= top <= 50 or prompts < 1 or groups < 0:
        raise ToolError(f"top = {top}, prompts = {prompts}, groups = {groups}; give 1 to 50, at least 1, and 0 or more")
    part = own.part(range(min(prompts, len(own.cases))))
    assert part.gradient is not None
    found = attributed(
        bench.live.model, bench.live.dictionary, part.prompts, part.gradient, steps=int(groups > 0),
        groups=max(1, groups), top=top, exact=top, seed=bench.seed,
    )  # fmt: skip
    headline = _leader(found, WORDS[own.metric.kind])
    lines = told(headline, own.metric.unit)
    if found.agreement is not None:
        one = found.agreement
        lines.append(f"rank correlation of estimate and exact loss: {figure(one.value, one.low, one.high, one.n)}; "
                     f"chance stays below {one.floor:.2g}")  # fmt: skip
    lines.append(f"share of the dictionary's error in all attributions: {estimated(found.error_share)}")
    lines += [_ranked_line(bench, part, found, one) for one in found.ranked]
    facts = {
        "metric": own.metric, "steps": found.steps, "groups": found.groups, "prompts": _cleans(part),
        "latents": [_ranked_row(bench, found, one) for one in found.ranked], "random": found.drawn,
        "random_95": found.floor, "agreement": found.agreement, "latents_total": found.latents_total,
        "error_total": found.error_total, "error_share": found.error_share,
    }  # fmt: skip
    return Outcome("\n".join(lines), headline, plain(facts), _attribution_plots(part, found, headline))


@tool("experiment")
def minimal_set(
    bench: Bench, how: How = "zero", most: int = 128, wanted: float = 0.95, candidates: list[int] | None = None
) -> Outcome:
    """Find a small set of latents without which the search prompts no longer show the behaviour.

    Candidates are found by attributing again and again while those found so far are taken out, then the set is pruned.
    Headline: the share of search prompts that no longer show the behaviour with the set taken out; it is too good by the
    choice of the set on these same prompts. Control: random sets of as many latents that fire as often.

    Args:
        how: set latents to zero, or exchange their activations with those on each prompt's variant.
        most: candidates, at most.
        wanted: share of prompts that are to flip.
        candidates: latents to choose among, the most promising first, instead of those that attribution finds.
    """
    if not 0 < wanted <= 1 or most < 1:
        raise ToolError(f"wanted = {wanted}, most = {most}; give a share above 0 and up to 1, and at least 1")
    own = showing(bench, how)
    ablation = taken_out(own, how)
    chosen, grown = bench.latents(candidates) if candidates else [], 0.0
    if not candidates:
        if own.gradient is None:
            raise ToolError(
                "a judged metric has no gradient to find candidates by; name some, for example from compare"
            )
        growth = grow(
            bench.live.model, bench.live.dictionary, own.prompts, own.gradient, own.behaviour, ablation=ablation,
            wanted=wanted, most=most,
        )  # fmt: skip
        chosen, grown = list(growth.latents), max(growth.flipped)
    if not chosen:
        raise ToolError("no latent holds the metric up on these prompts, so there is no set to prune")
    found = smallest(
        bench.live.model, bench.live.dictionary, chosen, own.prompts, own.behaviour, most=most, ablation=ablation,
        wanted=min(wanted, grown) if grown else wanted, controls=bench.controls, rates=bench.rates, seed=bench.seed,
    )  # fmt: skip
    headline = _set_headline(found, "without" if how == "zero" else "with the variants'")
    lines = [*told(headline, ""), f"the set ({found.status}): {', '.join(map(str, found.latents))}"]
    lines += [f"latent {one} {_label(bench, one)}" for one in found.latents[:10]]
    count = found.search_prompts
    lines.append(f"{count.used} prompts show the behaviour clean; {found.candidates} candidates")
    done = [ablation.of(bench.live.dictionary, found.latents, prompt) for prompt in own.prompts]
    facts = {
        "metric": own.metric, "how": how, "latents": found.latents, "candidates": chosen, "set": found,
        "prompts": _cleans(own), "interventions": as_json(done),
    }  # fmt: skip
    return Outcome("\n".join(lines), headline, plain(facts), (bars_of(headline, "share of prompts", "the set"),))


@tool("experiment")
def interactions(bench: Bench, latents: list[int], how: How = "zero", prompts: int = 12, top: int = 5) -> Outcome:
    """Find pairs of latents that do together what neither does alone.

    Random subsets of the latents are taken out, a factorisation machine is fitted, and its strongest pairs are taken out
    exactly: effect of both, less the effects of each alone. Headline: that interaction for the strongest pair, mean over
    prompts. Control: the same for random pairs, other latents that fire as often among them.

    Args:
        latents: 2 to 24, for example a minimal set.
        how: set latents to zero, or exchange their activations with those on each prompt's variant.
        prompts: search prompts to measure on, the first ones that show the behaviour.
        top: pairs to check exactly.
    """
    chosen = bench.latents(latents)
    if not 2 <= len(chosen) <= _MOST_MASKED or prompts < 1 or top < 1:
        raise ToolError(f"{len(chosen)} different latents; give 2 to {_MOST_MASKED}, and prompts and top at least 1")
    every = showing(bench, how)
    own = every.part(range(min(prompts, len(every.cases))))
    ablation = taken_out(own, how)
    model, dictionary = bench.live.model, bench.live.dictionary
    masks = random_masks(
        model, dictionary, chosen, own.prompts, own.measure, trials=max(96, 4 * (len(chosen) + _CONTROLS)),
        ablation=ablation, controls=_CONTROLS, rates=bench.rates, seed=bench.seed,
    )  # fmt: skip
    pairs = len(masks.latents) * (len(masks.latents) - 1) // 2
    fitted = interacting(masks.latents, masks.masks, masks.values, top=pairs, shuffles=10, seed=bench.seed)
    strongest = [one.pair for one in fitted.pairs if set(one.pair) <= set(chosen)][:top]
    exact = exact_interactions(
        model, dictionary, strongest, masks.latents, own.prompts, own.measure, ablation=ablation,
        controls=bench.controls, seed=bench.seed,
    )  # fmt: skip
    headline = _pair_headline(exact, WORDS[own.metric.kind])
    lines = [*told(headline, own.metric.unit), *map(_pair_line, exact.pairs), *_own_lines(masks)]
    lines.append(
        f"pairs explain {figure(fitted.gain.value, fitted.gain.low, fitted.gain.high)} of the variance over "
        f"{fitted.gain.n} held-out subsets beyond the {fitted.linear_r2:.2g} of single effects"
    )
    facts = {
        "metric": own.metric, "how": how, "latents": chosen, "prompts": _cleans(own), "exact": exact,
        "fitted": fitted, "own_effects": masks.effects, "own_floor": masks.floor, "r2": masks.r2,
    }  # fmt: skip
    return Outcome("\n".join(lines), headline, plain(facts), (_pair_bars(exact, headline, own.metric.unit),))


def showing(bench: Bench, how: How = "zero") -> Measurable:
    """Return the search prompts that show the behaviour, and have a variant where one is needed.

    Raises:
        ToolError: they are fewer than four.
    """
    own = bench.measurable
    shown = [
        i
        for i, value in enumerate(own.clean)
        if value > own.metric.shown and (how == "zero" or own.variants[i] is not None)
    ]
    if len(shown) < _FEWEST:
        wanted = "show the behaviour" if how == "zero" else "show the behaviour and have a variant"
        raise ToolError(f"{len(shown)} of {len(own.cases)} search prompts {wanted}; at least {_FEWEST} are needed")
    return own.part(shown)


def taken_out(measurable: Measurable, how: How) -> Ablation:
    """Return how latents are taken out of these prompts."""
    if how == "zero":
        return ZERO
    pairs = zip(measurable.prompts, measurable.variants, strict=True)
    return Ablation(sources={prompt: variant for prompt, variant in pairs if variant is not None})


def _leader(found: Attribution, words: str) -> Headline:
    first = found.ranked[0]
    exact = first.exact
    assert exact is not None
    sizes = [abs(one.exact.value) for one in found.drawn if one.exact is not None]
    return Headline(
        f"exact loss of the {words} without latent {first.latent}, the first of the ranking", exact.value, exact.low,
        exact.high, exact.n, "the size of that loss for other active latents drawn at random",
        float(np.mean(sizes)) if sizes else None, min(sizes, default=None), found.floor, len(sizes),
    )  # fmt: skip


def _ranked_line(bench: Bench, part: Measurable, found: Attribution, one: LatentAttribution) -> str:
    prompt, position = _strongest(found, one.latent)
    piece = bench.live.model.subject.pieces[part.prompts[prompt][position]]
    return (
        f"latent {one.latent}: attribution {estimated(one.attribution)}, exact loss {estimated(one.exact)}, mostly at "
        f"{quoted(piece)} {_label(bench, one.latent)}"
    )


def _ranked_row(bench: Bench, found: Attribution, one: LatentAttribution) -> dict[str, Any]:
    prompt, position = _strongest(found, one.latent)
    return {
        "latent": one.latent, "attribution": one.attribution, "exact": one.exact, "label": bench.live.label(one.latent),
        "strongest_prompt": prompt, "strongest_position": position, "by_prompt": found.by_prompt([one.latent])[0],
    }  # fmt: skip


def _strongest(found: Attribution, latent: int) -> tuple[int, int]:
    """Return the prompt and position at which a latent is held most responsible."""
    own = np.flatnonzero(found.entries.latent == latent)
    place = own[np.argmax(np.abs(found.entries.attribution[own]))]
    return int(found.entries.prompt[place]), int(found.entries.position[place])


def _attribution_plots(part: Measurable, found: Attribution, headline: Headline) -> tuple[dict[str, Any], ...]:
    unit, pieces = part.metric.unit, part.live.model.subject.pieces
    bars = [
        {"label": f"latent {one.latent}", "value": one.exact.value, "low": one.exact.low, "high": one.exact.high,
         "control": False}
        for one in found.ranked
        if one.exact is not None
    ]  # fmt: skip
    drawn = bars_of(headline, unit, "")["bars"][1:]
    plots: list[dict[str, Any]] = [
        {"kind": "bars", "title": "exact loss without each latent", "unit": unit, "bars": [*bars, *drawn]}
    ]
    for number, prompt in enumerate(part.prompts[:_PLOTTED]):
        here = found.entries.prompt == number
        values = np.bincount(found.entries.position[here], found.entries.attribution[here], len(prompt))
        title = f"attribution of all latents, by token, prompt {number + 1}"
        tokens = [pieces[token] for token in prompt]
        plots.append({"kind": "tokens", "title": title, "unit": unit, "tokens": tokens, "values": values.tolist()})
    return tuple(plots)


def _set_headline(found: MinimalSet, done: str) -> Headline:
    own, random = found.search.flipped, found.search.random
    name = f"share of search prompts that flip {done} {named(found.latents)}"
    if not random.flipped:
        return Headline(name, own.value, own.low, own.high, own.n, f"{MATCHED}: {random.status}")
    low = float(np.quantile(random.flipped, 0.025))
    return Headline(
        name, own.value, own.low, own.high, own.n, MATCHED, random.mean, low, random.high, len(random.flipped)
    )


def _pair_headline(exact: ExactInteractions, words: str) -> Headline:
    best = max(exact.pairs, key=lambda one: abs(one.interaction.value))
    one, controls = best.interaction, [pair.interaction.value for pair in exact.controls]
    name = f"change of the {words} with latents {best.pair[0]} and {best.pair[1]} out, beyond the sum of each alone"
    if not controls:
        return Headline(name, one.value, one.low, one.high, one.n, "random pairs: there are no others")
    low, high = np.quantile(controls, (0.025, 0.975))
    beside = (float(np.mean(controls)), float(low), float(high), len(controls))
    return Headline(name, one.value, one.low, one.high, one.n, "random pairs", *beside)


def _pair_line(one: ExactInteraction) -> str:
    together = figure(one.interaction.value, one.interaction.low, one.interaction.high)
    return (
        f"latents {one.pair[0]} and {one.pair[1]}: {one.first.value:.3g} and {one.second.value:.3g} alone, "
        f"{one.both.value:.3g} together, interaction {together}"
    )


def _own_lines(masks: RandomMasks) -> list[str]:
    own = [one for one in masks.effects if not one.control][:6]
    floor = "" if masks.floor is None else f"; random latents stay below {masks.floor:.2g} in 95 % of cases"
    listed = ", ".join(f"{one.latent}: {figure(one.effect.value, one.effect.low, one.effect.high)}" for one in own)
    return [f"own effects, averaged over what else is out: {listed}{floor}"]


def _pair_bars(exact: ExactInteractions, headline: Headline, unit: str) -> dict[str, Any]:
    bars = [
        {"label": f"{one.pair[0]} and {one.pair[1]}", "value": one.interaction.value, "low": one.interaction.low,
         "high": one.interaction.high, "control": False}
        for one in exact.pairs
    ]  # fmt: skip
    beside: Sequence[Any] = bars_of(headline, unit, "")["bars"][1:]
    return {"kind": "bars", "title": "interaction of pairs", "unit": unit, "bars": [*bars, *beside]}


def _label(bench: Bench, latent: int) -> str:
    label = bench.live.label(latent)
    return fenced("label", label) if label else "no label"


def _cleans(measurable: Measurable) -> list[dict[str, Any]]:
    return [
        {"prompt": case.prompt, "clean": float(value)}
        for case, value in zip(measurable.cases, measurable.clean, strict=True)
    ]
