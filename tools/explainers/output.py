"""Explainers that look at what a latent does to the output: `output` by that alone, `combined` beside its windows.

1. `effects` says what the latent does to the output (PROTOCOLS §10): what its direction writes through the unembedding,
   and what rises and falls under a clamp, each beside what random directions reach. `output_effects.LensEffects` measures
   it on a live model; whatever else gives `OutputEffects` serves as well.
2. One question: the tokens alone (`output`), or the tokens beside the windows of the one-shot question (`combined`).

Source: Gur-Arieh et al. 2025, "Enhancing Automated Interpretability with Output-Centric Feature Descriptions" (VocabProj,
TokenChange, and their ensemble with activating examples).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exegete.tools.explainers.asking import WINDOWS, ModelExplainer, answer_schema, firing_windows, shown
from exegete.tools.explainers.contract import Explanation, explainer
from exegete.tools.llm.contract import Client
from exegete.tools.prompting import Line, render, window_line
from exegete.tools.windows import LatentEvidence


@dataclass(frozen=True, slots=True)
class OutputEffects:
    """What a latent does to the output; tokens as text, the most extreme first."""

    promoted: tuple[str, ...]
    suppressed: tuple[str, ...]
    promoted_beyond: int
    """So many of them go beyond what random directions reach."""
    suppressed_beyond: int
    rising: tuple[tuple[str, float], ...] = ()
    """Token and mean change of its log-probability, in nats, under the clamp."""
    falling: tuple[tuple[str, float], ...] = ()
    rise_by_chance: float | None = None
    """Largest mean rise that random directions cause at the same KL; None where that is not known."""
    clamp: str = "not_measured"
    """ "matched", or why there is nothing under `rising` and `falling`: "unreachable", "no_prompts", "not_measured"."""


class Effects(Protocol):
    """Says what a latent does to the output."""

    async def __call__(self, evidence: LatentEvidence, seed: int) -> OutputEffects:
        """Return the effects of the latent of `evidence`, of which only the explain split is used."""
        ...


class _WithEffects(ModelExplainer):
    def __init__(
        self,
        client: Client,
        effects: Effects,
        windows: int = WINDOWS,
        temperature: float | None = None,
        max_tokens: int = 2_048,
    ) -> None:
        """Ask `client` about what `effects` measures; the rest as `ModelExplainer`."""
        super().__init__(client, windows, temperature, max_tokens)
        self._effects = effects


@explainer("output")
class OutputExplainer(_WithEffects):
    """Explains a latent by what it does to the output."""

    name = "output"

    async def candidate(self, evidence: LatentEvidence, seed: int, sample: int) -> Explanation | None:
        """Return the explanation number `sample`; raises as `explain`."""
        effects = await self._effects(evidence, seed)
        prompt = render("output", effects=in_prompt(effects))
        answer = await self.ask(prompt, answer_schema(predicate=False), sample)
        return self.explanation(answer, prompt.digest, {**_noted(effects), "sample": sample})


@explainer("combined")
class CombinedExplainer(_WithEffects):
    """Explains a latent by the windows in which it fires and by what it does to the output."""

    name = "combined"

    async def candidate(self, evidence: LatentEvidence, seed: int, sample: int) -> Explanation | None:
        """Return the explanation number `sample`; raises as `explain`."""
        windows = firing_windows(evidence, self.windows, seed, sample)
        effects = await self._effects(evidence, seed)
        prompt = render("combined", windows=shown(windows), effects=in_prompt(effects))
        answer = await self.ask(prompt, answer_schema(), sample)
        return self.explanation(answer, prompt.digest, {"windows": len(windows), **_noted(effects), "sample": sample})


@dataclass(frozen=True, slots=True)
class ShownEffects:
    """Effects as a prompt shows them."""

    promoted: Line
    suppressed: Line
    promoted_beyond: int
    suppressed_beyond: int
    measured: bool
    rising: Line
    falling: Line
    rise_by_chance: Line


def in_prompt(effects: OutputEffects) -> ShownEffects:
    """Return effects as lines that are safe for a prompt: tokens quoted, changes in nats with their sign."""
    chance = "unknown" if effects.rise_by_chance is None else f"{effects.rise_by_chance:.1f}"
    return ShownEffects(
        promoted=_listed(effects.promoted),
        suppressed=_listed(effects.suppressed),
        promoted_beyond=effects.promoted_beyond,
        suppressed_beyond=effects.suppressed_beyond,
        measured=effects.clamp == "matched",
        rising=_changes(effects.rising),
        falling=_changes(effects.falling),
        rise_by_chance=window_line([chance]),
    )


def _listed(tokens: Sequence[str]) -> Line:
    return window_line([", ".join(_quoted(token) for token in tokens)])


def _changes(changes: Sequence[tuple[str, float]]) -> Line:
    return window_line([", ".join(f"{_quoted(token)} {change:+.1f}" for token, change in changes)])


def _quoted(token: str) -> str:
    return json.dumps(token, ensure_ascii=False)


def _noted(effects: OutputEffects) -> dict[str, Any]:
    return {
        "clamp": effects.clamp,
        "promoted_beyond": effects.promoted_beyond,
        "suppressed_beyond": effects.suppressed_beyond,
    }
