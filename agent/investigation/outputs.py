"""Experiments on what the model writes: continuations with latents changed, and tokens that latents write (lens)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from exegete.agent.findings import figure, plain
from exegete.agent.investigation.arms import MATCHED, Latents, matched_sets, named, told
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Headline, Outcome
from exegete.agent.investigation.fencing import fenced, quoted
from exegete.agent.investigation.steering import matching, require_kl, turning
from exegete.agent.investigation.toolbelt import tool
from exegete.tools import interventions
from exegete.tools.errors import ToolError, UserError
from exegete.tools.generation import generate as written
from exegete.tools.intervals import share
from exegete.tools.interventions import CLEAN, Intervention, Tokens
from exegete.tools.lens import ClampedLens, DirectLens, clamped_lens, direct_lens
from exegete.tools.live_model import Trial
from exegete.tools.seeds import derive_seed
from exegete.tools.strength import match_strengths

_FEW_SETS = 5
"""Random sets beside written texts."""
_MOST_TOKENS, _MOST_LENSES = 200, 4


@tool("experiment")
def generate(
    bench: Bench,
    latents: list[int] | None = None,
    how: Literal["zero", "up"] = "zero",
    kl: float = 0.5,
    texts: list[str] | None = None,
    tokens: int = 16,
    temperature: float = 0.0,
    prompts: int = 8,
) -> Outcome:
    """Let the model go on writing, as it is and with latents changed.

    Headline: the share of prompts whose continuation with the latents changed differs from the clean one (same random
    numbers). Control: random sets of as many latents that fire as often, changed in the same way. Without latents the clean
    continuations are shown, and the headline is the share of search prompts after which the answer is written first.

    Args:
        latents: that are changed while the model reads and writes; none shows clean continuations.
        how: set them to zero, or turn them up to a KL.
        kl: for up: mean KL of the next token that the strength is matched to, in nats.
        texts: to be continued instead of search prompts.
        tokens: to write for each, at most.
        temperature: of the sampling; 0 takes the most probable token.
        prompts: search prompts to continue, the first ones.
    """
    if not 1 <= tokens <= _MOST_TOKENS or prompts < 1:
        raise ToolError(
            f"tokens = {tokens}, prompts = {prompts}; give 1 to {_MOST_TOKENS} tokens and at least 1 prompt"
        )
    require_kl(kl)
    given = texts or [case.prompt for case in bench.cases[:prompts]]
    starts = bench.live.prompts(given)
    chosen = tuple(bench.latents(latents)) if latents else ()
    sets = [chosen, *matched_sets(bench, chosen, _FEW_SETS)] if chosen else []
    changes = [one for one in _changes(bench, sets, how, kl) if one is not None]
    trials = [Trial(start, change) for change in [CLEAN, *changes] for start in starts]
    found = written(bench.live.model, trials, tokens, temperature=temperature, seed=bench.seed)
    rows = [[one.tokens for one in found[at : at + len(starts)]] for at in range(0, len(found), len(starts))]
    headline = _wrote(bench, rows, asked=not texts) if not chosen else _differs(rows, chosen, how, kl)
    shown = [[bench.live.model.text(one) for one in row] for row in rows[:2]]
    lines = [*told(headline, ""), *_text_lines(given, shown)]
    facts = {
        "latents": list(chosen), "how": how, "kl": kl, "temperature": temperature, "prompts": given,
        "clean": shown[0], "changed": shown[1] if chosen else None,
        "interventions": [changes[0].to_json()] if chosen else [], "controls": [list(one) for one in sets[1:]],
    }  # fmt: skip
    return Outcome("\n".join(lines), headline, plain(facts))


@tool("experiment")
def lens(bench: Bench, latents: list[int], kl: float = 0.5, top: int = 8) -> Outcome:
    """Show what latents write: tokens that their directions favour, and what clamping each of them changes on the prompts.

    Headline: of the first latent, the largest mean rise in log-probability of any next token while it is clamped to the KL;
    every second search prompt finds the clamp and the others are measured. Control: the largest rise under random directions
    at the same KL.

    Args:
        latents: each is looked at by itself, four at most.
        kl: mean KL of the next token that each is clamped to, in nats.
        top: tokens to show at either end.
    """
    chosen = bench.latents(latents)
    require_kl(kl)
    if len(chosen) > _MOST_LENSES or top < 1:
        raise ToolError(
            f"{len(chosen)} latents and top = {top}; give at most {_MOST_LENSES} latents, and top at least 1"
        )
    model, dictionary = bench.live.model, bench.live.dictionary
    direct, why = _direct(bench, chosen, top)
    clamped = [
        clamped_lens(model, dictionary, latent, bench.prompts, kl, top, seed=derive_seed(bench.seed, "lens"))
        for latent in chosen
    ]
    first = clamped[0]
    lines: list[str] = [] if not why else [f"directions are not shown: {why}"]
    for index, one in enumerate(clamped):
        label = bench.live.label(one.latent)
        lines.append(f"latent {one.latent} {fenced('label', label) if label else 'no label'}")
        lines += _direct_lines(direct[index]) if direct else []
        lines += _clamped_lines(one, kl)
    headline = _rise(first, kl)
    facts = {"kl": kl, "latents": chosen, "direct": direct, "clamped": clamped}
    return Outcome("\n".join([*told(headline, "nats"), *lines]), headline, plain(facts))


def _text_lines(prompts: Sequence[str], shown: Sequence[Sequence[str]]) -> list[str]:
    """Return each prompt with its continuations, clean and, where there is one, changed."""
    lines = []
    for number, prompt in enumerate(prompts):
        lines.append(fenced("prompt", prompt[-60:], number + 1))
        lines += [fenced(name, row[number], number + 1) for name, row in zip(("clean", "changed"), shown, strict=False)]
    return lines


def _changes(bench: Bench, sets: Sequence[Latents], how: str, kl: float) -> list[Intervention | None]:
    """Return what is done to each set; None where the KL cannot be reached. Of the first set it raises instead."""
    if how == "zero":
        return [interventions.ablate(bench.live.dictionary.fingerprint, one) for one in sets]
    makes = [turning(bench, one, 1, "last") for one in sets]
    found = match_strengths(bench.live.model, makes, matching(bench), target_kl=kl) if makes else []
    if found and found[0].strength is None:
        raise ToolError(f"no strength brings {named(sets[0])} to KL {kl:g}; try a smaller one")
    return [None if one.strength is None else make(one.strength) for make, one in zip(makes, found, strict=True)]


def _differs(rows: Sequence[Sequence[Tokens]], latents: Latents, how: str, kl: float) -> Headline:
    done = "set to zero" if how == "zero" else f"turned up to KL {kl:g}"
    clean, shares = rows[0], []
    for row in rows[1:]:
        shares.append(share(np.array([one != other for one, other in zip(row, clean, strict=True)])))
    own, controls = shares[0], [one.value for one in shares[1:]]
    return Headline(
        f"share of continuations that change, {named(latents)} {done}", own.value, own.low, own.high, own.n, MATCHED,
        float(np.mean(controls)) if controls else None, min(controls, default=None), max(controls, default=None), len(controls),
    )  # fmt: skip


def _wrote(bench: Bench, rows: Sequence[Sequence[Tokens]], *, asked: bool) -> Headline:
    """Return how often the answer is written first; no figure where other texts than those asked about are continued."""
    answers = bench.measurable.answers
    if not asked or not answers:
        return Headline("clean continuations", None, n=len(rows[0]))
    first = np.array([bool(one) and one[0] == answer for one, answer in zip(rows[0], answers, strict=False)])
    own = share(first)
    return Headline(
        "share of search prompts after which the answer is written first", own.value, own.low, own.high, own.n
    )


def _direct(bench: Bench, latents: Sequence[int], top: int) -> tuple[list[DirectLens], str]:
    """Return the direct lens of each latent, or why there is none."""
    try:
        return direct_lens(bench.live.model, bench.live.dictionary, latents, top, seed=bench.seed), ""
    except UserError as error:
        return [], str(error)


def _direct_lines(found: DirectLens) -> list[str]:
    def row(tokens: Sequence[Any]) -> str:
        return ", ".join(f"{quoted(one.piece)} {one.logit:.2g}" for one in tokens)

    return [
        f"  favours {row(found.top)}; random directions reach {found.floor:.2g} in 5 % of cases",
        f"  disfavours {row(found.bottom)}",
    ]


def _clamped_lines(found: ClampedLens, kl: float) -> list[str]:
    if found.effect is None:
        return [f"  no clamp reaches KL {kl:g} (nearest: {figure(found.matched.kl)})"]
    sides = (("makes more probable", found.effect.risers), ("less probable", found.effect.fallers))
    return [
        f"  clamped to {figure(found.matched.strength)} {words}: "
        + ", ".join(f"{quoted(one.text)} {one.logprob.value:+.2g}" for one in tokens)
        for words, tokens in sides
        if tokens
    ]


def _rise(found: ClampedLens, kl: float) -> Headline:
    name = f"largest mean rise in log-probability while latent {found.latent} is clamped to KL {kl:g}"
    control = "the largest rise under a random direction at the same KL"
    if found.effect is None or not found.effect.risers:
        return Headline(name, None, control=control)
    own, floor = found.effect.risers[0].logprob, found.floor
    if floor is None:
        return Headline(name, own.value, own.low, own.high, own.n, control)
    beside = (floor.value, floor.low, floor.high, floor.n)
    return Headline(name, own.value, own.low, own.high, own.n, control, *beside)
