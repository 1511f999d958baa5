"""`exegete steer` and `ablate`: one experiment on the live model, with its controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exegete.agent.findings import Findings, Table, estimated, figure
from exegete.agent.gathering import BUNDLED, bundled_texts
from exegete.agent.live import Live
from exegete.tools.ablation_sets import Ablation
from exegete.tools.controls import firing_rates, random_direction, random_latents
from exegete.tools.effects import (
    Change,
    NextTokenEffect,
    Pair,
    generate_pairs,
    kl_divergences,
    logit_difference,
    next_token_effect,
)
from exegete.tools.errors import UserError
from exegete.tools.interventions import Intervention, Positions, Tokens, push, steer
from exegete.tools.live_model import Trial
from exegete.tools.seeds import derive_seed
from exegete.tools.strength import Make, Matched, match_strengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODES = ("zero", "mean", "resample")
SAMPLE = 200
"""Requests of the bundled grammar that firing rates are taken on, where nothing better is there."""


@dataclass(frozen=True)
class Request:
    """What the experiments have in common."""

    prompts: Sequence[str]
    latents: Sequence[int] = ()
    texts: Sequence[str] = ()
    """Other texts: to match strengths and take firing rates, means and draws on."""
    positions: Positions = "last"
    tokens: int = 16
    temperature: float = 0.0
    controls: int = 3
    top: int = 8
    seed: int = 0

    def parameters(self, latents: Sequence[int] = ()) -> dict[str, Any]:
        """Return what is stored beside a result."""
        return {
            "latents": list(latents),
            "positions": self.positions,
            "tokens": self.tokens,
            "temperature": self.temperature,
            "controls": self.controls,
            "seed": self.seed,
            "texts": len(self.texts),
        }


@dataclass(frozen=True)
class Steering:
    """One steered arm: the latents, or a control at the same KL."""

    name: str
    latents: tuple[int, ...]
    matched: Matched | None
    """None where the strength was given."""
    strength: float | None
    effect: NextTokenEffect | None
    written: tuple[str, ...]


def steering(live: Live, request: Request, *, kl: float | None, strength: float | None) -> Findings:
    """Steer latents to a KL, or by a strength, beside random latents and directions at the same KL.

    Raises:
        UserError: a prompt, latent or number is not there or out of range.
    """
    model, dictionary = live.model, live.dictionary
    if (kl is None) == (strength is None):
        raise UserError("give either --kl or --strength")
    prompts = live.prompts(request.prompts)
    latents = _latents(live, request.latents)
    model.check([Trial(prompt) for prompt in prompts])
    own: Make = lambda s: steer(dictionary.fingerprint, latents, s, request.positions)  # noqa: E731
    clean = generate_pairs(model, [Trial(prompt) for prompt in prompts], request.tokens, **_sampling(request))
    matched_on = [model.tokens(text) for text in request.texts] or prompts
    if strength is not None:
        first = _arm(live, request, prompts, "steered", tuple(latents), own, strength, None)
        # Where the controls are brought to it: on other prompts the same strength comes to another KL.
        kl = float(np.mean(kl_divergences(model, [Trial(prompt, own(strength)) for prompt in matched_on])))
    makes = [] if strength is not None else [("steered", tuple(latents), own)]
    makes += _controls(live, request, latents, prompts) if kl else []
    found = match_strengths(model, [make for *_, make in makes], matched_on, target_kl=kl) if makes and kl else []
    arms = [first] if strength is not None else []
    for (name, used, make), matched in zip(makes, found, strict=True):
        arms.append(_arm(live, request, prompts, name, used, make, matched.strength, matched))
    facts = {
        "command": "steer",
        "origin": live.origin,
        "parameters": request.parameters(latents) | {"target_kl": kl, "matched_on": len(matched_on)},
        "prompts": list(request.prompts),
        "clean": [model.text(pair.clean.tokens) for pair in clean],
        "arms": arms,
    }
    lines = [live.heading, *(f"latent {latent}: {live.label(latent) or 'no label'}" for latent in latents)]
    where = (
        f"{len(matched_on)} other texts" if request.texts else "the prompts themselves; give --texts to match on others"
    )
    lines.append(f"strengths matched to KL {figure(kl)} ({where})" if makes else "no controls")
    return Findings(facts, lines, _steering_tables(live, request, clean, arms))


def _steering_tables(live: Live, request: Request, clean: Sequence[Pair], arms: Sequence[Steering]) -> list[Table]:
    texts: list[tuple[str, str, float | None, str, str]] = []
    for index, prompt in enumerate(request.prompts):
        texts.append((prompt[-40:], "clean", None, "", live.model.text(clean[index].clean.tokens)))
        texts += [("", arm.name, arm.strength, _kl(arm), arm.written[index] if arm.written else "") for arm in arms]
    tables = [Table("continuations", ("prompt", "run", "strength", "KL", "text"), texts)]
    return tables + [_token_table(arm.name, arm.effect) for arm in arms[:1] if arm.effect]


def _kl(arm: Steering) -> str:
    if arm.effect is None:
        reached = arm.matched.kl if arm.matched else None
        return f"unreachable (most: {figure(reached)})"
    kl = arm.effect.kl
    return figure(kl.value, kl.low, kl.high)


def _arm(
    live: Live,
    request: Request,
    prompts: Sequence[Tokens],
    name: str,
    latents: tuple[int, ...],
    make: Make,
    strength: float | None,
    matched: Matched | None,
) -> Steering:
    if strength is None:
        return Steering(name, latents, matched, None, None, ())
    trials = [Trial(prompt, make(strength)) for prompt in prompts]
    effect = next_token_effect(live.model, trials, request.top)
    pairs = generate_pairs(live.model, trials, request.tokens, **_sampling(request))
    return Steering(name, latents, matched, strength, effect, tuple(live.model.text(p.changed.tokens) for p in pairs))


def _controls(
    live: Live, request: Request, latents: Sequence[int], prompts: Sequence[Tokens]
) -> list[tuple[str, tuple[int, ...], Make]]:
    """Return random latents of the same firing rates, and random directions, to be steered to the same KL."""
    dictionary = live.dictionary
    found: list[tuple[str, tuple[int, ...], Make]] = []
    for drawn in _random_sets(live, request, latents, prompts):
        found.append(("random latent", drawn, _steer_by(dictionary.fingerprint, drawn, request.positions)))
    width = live.model.subject.width(dictionary.hook_point_out)
    for index in range(request.controls):
        vector = random_direction(width, derive_seed(request.seed, "steer", index)).tolist()
        found.append(("random direction", (), _push_by(dictionary.hook_point_out, vector, request.positions)))
    return found


def _steer_by(dictionary: str, latents: Sequence[int], positions: Positions) -> Make:
    return lambda strength: steer(dictionary, latents, strength, positions)


def _push_by(point: str, vector: Sequence[float], positions: Positions) -> Make:
    return lambda strength: push(point, vector, strength, positions)


def _random_sets(
    live: Live, request: Request, latents: Sequence[int], prompts: Sequence[Tokens]
) -> list[tuple[int, ...]]:
    if not request.controls:
        return []
    rates = _rates(live, request, prompts)
    taken: list[list[int]] = [[] for _ in range(request.controls)]
    for latent in latents:
        exclude = {*latents, *(one for drawn in taken for one in drawn)} - {latent}
        drawn = random_latents(rates, latent, request.controls, derive_seed(request.seed, "controls"), sorted(exclude))
        for own, one in zip(taken, drawn.latents, strict=True):
            own.append(one)
    return [tuple(drawn) for drawn in taken]


def _rates(live: Live, request: Request, prompts: Sequence[Tokens]) -> NDArray[np.float64]:
    """Return firing rates: the store's, else on the texts given, else on bundled requests, else on the prompts."""
    known = live.rates()
    if known is not None:
        return known
    model = live.model
    if request.texts:
        return firing_rates(model, live.dictionary, [model.tokens(text) for text in request.texts])
    if model.subject.name == BUNDLED:
        texts = bundled_texts(request.seed, SAMPLE)
        return firing_rates(model, live.dictionary, [model.tokens(text) for text in texts])
    raise UserError(
        "controls need firing rates: give --texts FILE or a --store with the dictionary's evidence, or --controls 0"
    )


def ablating(
    live: Live, request: Request, *, mode: str, answer: str | None = None, other: str | None = None
) -> Findings:
    """Ablate latents, beside random latents of the same firing rates.

    Raises:
        UserError: a prompt, latent, mode or token is not there, or the mode needs texts that are not given.
    """
    model = live.model
    prompts, latents = live.prompts(request.prompts), _latents(live, request.latents)
    make = _ablation(live, request, mode)
    sets = [tuple(latents), *_random_sets(live, request, latents, prompts)]
    trials = [[Trial(prompt, make(drawn, prompt)) for prompt in prompts] for drawn in sets]
    effects = [next_token_effect(model, one, request.top) for one in trials]
    odds = _log_odds(live, answer, other, trials)
    pairs = generate_pairs(model, trials[0], request.tokens, **_sampling(request))
    kls = [effect.kl.value for effect in effects]
    facts = {
        "command": "ablate",
        "origin": live.origin,
        "parameters": request.parameters(latents) | {"mode": mode, "answer": answer, "other": other},
        "prompts": list(request.prompts),
        "clean": [model.text(pair.clean.tokens) for pair in pairs],
        "ablated": [model.text(pair.changed.tokens) for pair in pairs],
        "effect": effects[0],
        "controls": [{"latents": drawn, "kl": effect.kl} for drawn, effect in zip(sets[1:], effects[1:], strict=True)],
        "log_odds": odds,
    }
    kl = effects[0].kl
    lines = [live.heading, *(f"latent {latent}: {live.label(latent) or 'no label'}" for latent in latents)]
    lines.append(f"KL from the clean run: {figure(kl.value, kl.low, kl.high, kl.n)}; {_beside(kls[1:])}")
    if odds:
        change = odds[0].change
        beside = _beside([abs(one.change.value) for one in odds[1:]])
        lines.append(
            f"log-odds of {answer!r} against {other!r}: {odds[0].clean.value:.3g} → {odds[0].changed.value:.3g}, "
            f"change {figure(change.value, change.low, change.high, change.n)}; {beside}"
        )
    texts = [
        row
        for prompt, pair in zip(request.prompts, pairs, strict=True)
        for row in (
            (prompt[-40:], "clean", model.text(pair.clean.tokens)),
            ("", "ablated", model.text(pair.changed.tokens)),
        )
    ]
    tables = [Table("continuations", ("prompt", "run", "text"), texts), _token_table("ablated", effects[0])]
    return Findings(facts, lines, tables)


def _beside(values: Sequence[float]) -> str:
    if not values:
        return "no controls"
    return f"random latents of the same firing rates: mean {np.mean(values):.3g}, most {max(values):.3g} (n = {len(values)})"


def _ablation(live: Live, request: Request, mode: str) -> Callable[[Sequence[int], Tokens], Intervention]:
    if mode not in MODES:
        raise UserError(f"--mode {mode!r} is not one of {', '.join(MODES)}")
    texts = tuple(live.model.tokens(text) for text in request.texts)
    if mode != "zero" and not texts:
        raise UserError(f"--mode {mode} takes activations from other texts: give --texts FILE")
    ablation = Ablation(request.positions)
    if mode == "resample":
        ablation = Ablation(request.positions, texts=texts, seed=request.seed)
    if mode == "mean":
        ablation = Ablation(request.positions, means=mean_activations(live, texts).tolist())
    return lambda latents, prompt: ablation.of(live.dictionary, latents, prompt)


def mean_activations(live: Live, texts: Sequence[Tokens]) -> NDArray[np.float64]:
    """Return the mean activation of every latent over the texts' tokens, special ones left out."""
    from exegete.tools.text_activations import pooled

    special = live.model.subject.special_tokens
    lengths = np.array([sum(token not in special for token in text) for text in texts], dtype=np.float64)
    means = pooled(live.model, live.dictionary, texts, "mean")
    summed: NDArray[np.float64] = np.asarray(means.T @ lengths, dtype=np.float64).ravel() / lengths.sum()
    return summed


def _log_odds(live: Live, answer: str | None, other: str | None, trials: Sequence[Sequence[Trial]]) -> list[Change]:
    if answer is None and other is None:
        return []
    if answer is None or other is None:
        raise UserError("log-odds are between two tokens: give both --answer and --other")
    tokens = live.token(answer), live.token(other)
    return [logit_difference(live.model, one, *tokens) for one in trials]


def _token_table(name: str, effect: NextTokenEffect) -> Table:
    rows = [
        (kind, one.text, one.clean, one.changed, estimated(one.probability))
        for kind, tokens in (("rises", effect.risers), ("falls", effect.fallers))
        for one in tokens
    ]
    return Table(
        f"next token, {name} (mean probability over prompts)", ("", "token", "clean", "changed", "change"), rows
    )


def _sampling(request: Request) -> dict[str, Any]:
    return {"temperature": request.temperature, "seed": request.seed}


def _latents(live: Live, latents: Sequence[int]) -> list[int]:
    if not latents:
        raise UserError("no latent is given; name at least one with --latent")
    live.model.require_latents(live.dictionary, latents)
    return list(dict.fromkeys(latents))
