"""What a latent does to the output, measured on a live model for the explainers that are told of it (PROTOCOLS §10).

1. The direct lens: the latent's direction through the final norm and unembedding, top and bottom tokens; those beyond the
   95th percentile of random directions' largest logit are counted.
2. The clamped lens: the latent held at the value that reaches a given KL; next tokens that rise and fall most, beside the
   largest rise by random directions at the same KL. On windows of the explain split, cut just after the first token on
   which the latent fires, or whole random ones where it never does. Their text is tokenised anew.

A latent that cannot reach the KL, or has no windows, has lens tokens only, and says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from exegete.tools.errors import UserError
from exegete.tools.explainers.asking import firing_windows
from exegete.tools.explainers.output import OutputEffects
from exegete.tools.windows import LatentEvidence

if TYPE_CHECKING:
    from exegete.tools.dictionaries import Dictionary
    from exegete.tools.effects import TokenChange
    from exegete.tools.lens import ClampedLens
    from exegete.tools.live_model import LiveModel

LEAST_PROMPTS = 4


class LensEffects:
    """Measures the output effects of the latents of one dictionary."""

    def __init__(
        self,
        model: LiveModel,
        dictionary: Dictionary,
        prompts: int = 16,
        target_kl: float = 0.5,
        lens_tokens: int = 30,
        clamp_tokens: int = 10,
    ) -> None:
        """Measure on `model`.

        Args:
            model: with the dictionary attached.
            dictionary: of the latents.
            prompts: windows to clamp on; one half finds the value, the other is measured.
            target_kl: mean KL(clean ‖ clamped) of the next token, in nats.
            lens_tokens: listed at either end of the direct lens.
            clamp_tokens: listed as rising and as falling.

        Raises:
            UserError: too few prompts.
        """
        if prompts < LEAST_PROMPTS:
            raise UserError(f"a clamp is measured on at least {LEAST_PROMPTS} prompts, not {prompts}")
        self._model, self._dictionary = model, dictionary
        self._prompts, self._target_kl = prompts, target_kl
        self._lens_tokens, self._clamp_tokens = lens_tokens, clamp_tokens

    async def __call__(self, evidence: LatentEvidence, seed: int) -> OutputEffects:
        """Return the effects of the latent of `evidence`.

        Raises:
            UserError: as `exegete.tools.lens`: for example, the dictionary does not write to the residual stream.
            SealedSplitError: `evidence` hides the explain split.
        """
        texts = prompt_texts(evidence, self._prompts, seed)
        return await asyncio.to_thread(self._measured, evidence.latent, texts, seed)

    def _measured(self, latent: int, texts: Sequence[str], seed: int) -> OutputEffects:
        from exegete.tools.lens import clamped_lens, direct_lens

        (lens,) = direct_lens(self._model, self._dictionary, [latent], self._lens_tokens, seed=seed)
        clamped = None
        if len(texts) >= LEAST_PROMPTS:
            prompts = [self._model.tokens(text) for text in texts]
            clamped = clamped_lens(
                self._model, self._dictionary, latent, prompts, self._target_kl, self._clamp_tokens, seed=seed
            )
        effect = clamped.effect if clamped else None
        return OutputEffects(
            promoted=tuple(one.piece for one in lens.top),
            suppressed=tuple(one.piece for one in lens.bottom),
            promoted_beyond=sum(one.logit > lens.floor for one in lens.top),
            suppressed_beyond=sum(-one.logit > lens.floor for one in lens.bottom),
            rising=_changes(effect.risers) if effect else (),
            falling=_changes(effect.fallers) if effect else (),
            rise_by_chance=clamped.floor.value if clamped and clamped.floor else None,
            clamp=_status(clamped),
        )


def prompt_texts(evidence: LatentEvidence, count: int, seed: int) -> list[str]:
    """Return at most `count` texts of the explain split to clamp on; see the module for where they end."""
    cut = ["".join(w.tokens[: w.firing_positions()[0] + 1]) for w in firing_windows(evidence, count, seed)]
    texts = cut or [w.text for w in evidence.select("explain", kind="random") if not w.fires][:count]
    return [text for text in texts if text]


def _changes(changes: Sequence[TokenChange]) -> tuple[tuple[str, float], ...]:
    return tuple((one.text, one.logprob.value) for one in changes)


def _status(clamped: ClampedLens | None) -> str:
    if clamped is None:
        return "no_prompts"
    return "matched" if clamped.effect is not None else "unreachable"
