"""The contrastive explainer: windows in which the latent fires beside hard ones in which it does not.

1. Firing windows as the one-shot explainer shows them.
2. Hard negatives of the explain split: windows that hold the latent's top tokens, or on which its nearest latents fire,
   while it verifiably does not (PROTOCOLS §1). How many there were is stored: without any, this is the one-shot question
   in other words.
3. One question; the answer is the explanation.
"""

from __future__ import annotations

from exegete.tools.errors import UserError
from exegete.tools.explainers.asking import WINDOWS, ModelExplainer, answer_schema, firing_windows, shown
from exegete.tools.explainers.contract import Explanation, explainer
from exegete.tools.llm.contract import Client
from exegete.tools.prompting import render, window_line
from exegete.tools.windows import LatentEvidence

HARD = 16


@explainer("contrastive")
class ContrastiveExplainer(ModelExplainer):
    """Explains a latent from windows in which it fires and hard ones in which it does not, in one call."""

    name = "contrastive"

    def __init__(
        self,
        client: Client,
        windows: int = WINDOWS,
        hard: int = HARD,
        temperature: float | None = None,
        max_tokens: int = 2_048,
    ) -> None:
        """Ask `client`, showing at most `windows` firing and `hard` non-firing windows; the rest as `ModelExplainer`.

        Raises:
            UserError: `windows` or `hard` is less than one.
        """
        super().__init__(client, windows, temperature, max_tokens)
        if hard < 1:
            raise UserError(f"the contrastive explainer needs at least one hard negative, not {hard}; see 'one-shot'")
        self.hard = hard

    async def candidate(self, evidence: LatentEvidence, seed: int, sample: int) -> Explanation | None:
        """Return the explanation number `sample`; raises as `explain`."""
        windows = firing_windows(evidence, self.windows, seed, sample)
        if not windows:
            return None
        hard = [w for w in evidence.select("explain", kind="hard") if not w.fires][: self.hard]
        prompt = render("contrastive", windows=shown(windows), silent=[window_line(w.tokens) for w in hard])
        answer = await self.ask(prompt, answer_schema(), sample)
        return self.explanation(answer, prompt.digest, {"windows": len(windows), "hard": len(hard), "sample": sample})
