"""Experiments on the search prompts: latents taken out, or given what they are elsewhere, and what the metric does.

All stand beside random sets of as many latents that fire as often; see `arms`. The other experiments are in `steering`
(steer), `outputs` (generate, lens), `holding_up` (attribute, minimal_set, interactions) and `contrasts` (compare, probe,
directions). Importing this module registers them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exegete.agent.experiments import mean_activations
from exegete.agent.findings import figure
from exegete.agent.investigation import contrasts as contrasts
from exegete.agent.investigation import holding_up as holding_up
from exegete.agent.investigation import outputs as outputs
from exegete.agent.investigation import steering as steering
from exegete.agent.investigation.arms import Acts, Arms, Latents, active_on, beside_random, firing, named, report
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Outcome
from exegete.agent.investigation.measuring import Floats, Measurable
from exegete.agent.investigation.toolbelt import tool
from exegete.tools.ablation_sets import Ablation
from exegete.tools.errors import ToolError
from exegete.tools.estimates import estimate
from exegete.tools.interventions import Positions
from exegete.tools.interventions import patch as patched
from exegete.tools.live_model import Trial

Mode = Literal["zero", "mean", "resample"]

_MODES = {
    "zero": "set to zero",
    "mean": "set to their means over other texts",
    "resample": "given what they are in other texts",
}


@tool("experiment")
def ablate(bench: Bench, latents: list[int], mode: Mode = "zero", positions: Literal["all", "last"] = "all") -> Outcome:
    """Take latents out, all together, while the model reads the search prompts.

    Headline: the mean over prompts of the metric with the latents taken out, less the metric as it is. Below zero where the
    latents hold the metric up. Control: random sets of as many latents that fire as often, taken out in the same way.

    Args:
        latents: that are taken out together.
        mode: set them to zero, to their mean over other texts, or to what they are at a random token of other texts.
        positions: at every token of the prompt, or from its last one on.
    """
    chosen, own = bench.latents(latents), bench.measurable
    ablation = _ablation(bench, mode, positions)
    # Only to zero: a mean, or what a latent is elsewhere, also comes where it is silent.
    acts: Acts | None = (lambda sets: active_on(bench, own.prompts, sets)) if mode == "zero" else None
    dictionary = bench.live.dictionary
    arms = beside_random(bench, own, chosen, lambda one, i: ablation.of(dictionary, one, own.prompts[i]), acts=acts)
    fires = firing(bench, own, chosen)
    found = report(
        arms,
        f"{named(chosen)} {_MODES[mode]}",
        {"mode": mode, "positions": positions, "fires_on": {str(one): share for one, share in fires.items()}},
    )
    return _with_line(found, _silent(fires))


@tool("experiment")
def interchange(bench: Bench, latents: list[int], positions: Literal["all", "last"] = "all") -> Outcome:
    """Give latents, on each search prompt, the activations that they have on that prompt's variant.

    This tests whether the difference between prompt and variant acts through these latents. Headline: the mean over prompts
    of the metric with the activations exchanged, less the metric as it is. Control: random sets of as many latents that fire
    as often, exchanged in the same way. Beside it: how far the metric falls from prompt to variant, which is as far as an
    exchange of everything would bring it.

    Args:
        latents: that are exchanged together.
        positions: at every token of the prompt, or from its last one on.
    """
    chosen, own = bench.latents(latents), with_variants(bench.measurable)
    dictionary = bench.live.dictionary.fingerprint
    sources = [variant for variant in own.variants if variant is not None]

    def acts(sets: Sequence[Latents]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = active_on(bench, own.prompts, sets) | active_on(bench, sources, sets)
        return found

    arms = beside_random(bench, own, chosen, lambda one, i: patched(dictionary, one, sources[i], positions), acts=acts)
    varied = own.values([Trial(source) for source in sources])
    line, facts = _carried(arms, varied)
    left_out = len(bench.measurable.cases) - len(own.cases)
    found = report(
        arms,
        f"{named(chosen)} exchanged with their variants'",
        {"positions": positions, "without_variant": left_out, **facts},
    )
    return _with_line(found, line)


@tool("experiment")
def patch(bench: Bench, latents: list[int], source: str, positions: list[int] | None = None) -> Outcome:
    """Give latents, on every search prompt, the activations that they have on one text of your own.

    Positions are matched from the ends of both texts; where yours is shorter, what it lacks stays as it is. Headline: the
    mean over prompts of the metric with the activations given, less the metric as it is. Control: random sets of as many
    latents that fire as often, given theirs on the same text.

    Args:
        latents: that are given together.
        source: the text whose activations they take.
        positions: tokens of the prompts at which they take them, counted from the end (-1 is the last); all where left out.
    """
    chosen, own = bench.latents(latents), bench.measurable
    tokens = bench.live.model.tokens(source)
    if positions is not None and (not positions or max(positions) >= 0):
        raise ToolError(
            f"positions are {positions}; prompts differ in length: count from the end, for example [-1, -2]"
        )
    where: Positions = "all" if positions is None else tuple(positions)
    dictionary = bench.live.dictionary.fingerprint
    arms = beside_random(bench, own, chosen, lambda one, _: patched(dictionary, one, tokens, where))
    return report(
        arms, f"{named(chosen)} given what they are on another text", {"source": source, "positions": positions}
    )


def with_variants(measurable: Measurable) -> Measurable:
    """Return the cases that have a variant. Raises ToolError where none has."""
    chosen = [i for i, variant in enumerate(measurable.variants) if variant is not None]
    if not chosen:
        raise ToolError(
            "no prompt has a variant to take activations from; use ablate, or patch with a text of your own"
        )
    return measurable.part(chosen)


def _ablation(bench: Bench, mode: Mode, positions: Literal["all", "last"]) -> Ablation:
    texts = tuple(bench.live.model.tokens(text) for text in bench.texts)
    if mode == "zero":
        return Ablation(positions)
    if not texts:
        raise ToolError(f"mode {mode!r} takes activations from other texts, and there are none here; use zero")
    if mode == "resample":
        return Ablation(positions, texts=texts, seed=bench.seed)
    return Ablation(positions, means=mean_activations(bench.live, texts).tolist())


def _silent(fires: dict[int, float]) -> str:
    silent = [latent for latent, share in fires.items() if share == 0]
    return f"{named(silent)} fire on none of these prompts: setting them to zero changes nothing" if silent else ""


def _carried(arms: Arms, varied: Floats) -> tuple[str, dict[str, object]]:
    """Return what part of the difference between prompts and variants the latents carry, in words and figures."""
    differences = varied - arms.measurable.clean
    known = np.isfinite(differences) & np.isfinite(arms.change)
    if not known.any():
        return "", {"difference": None, "carried": None}
    whole = estimate(differences[known])
    carried = float(arms.change[known].mean() / whole.value) if whole.value else None
    line = f"from prompt to variant the metric changes by {figure(whole.value, whole.low, whole.high, whole.n)}"
    if carried is not None and whole.low is not None and whole.high is not None and whole.low * whole.high > 0:
        line += f"; these latents carry {carried:.0%} of that"
    return line, {"difference": whole, "carried": carried, "on_variants": varied}


def _with_line(found: Outcome, line: str) -> Outcome:
    if not line:
        return found
    first, _, rest = found.text.partition("\n")
    return replace(found, text=f"{first}\n{line}\n{rest}")
