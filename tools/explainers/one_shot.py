"""The one-shot explainer: one call to a language model with quantile windows, marks and activations (PROTOCOLS §2).

1. Windows of the explain split on which the latent fires, as many of each quantile of the peak (40 by default).
2. One question; the answer is the explanation.

Source: Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language Models", section
'explanation': quantile windows score 0.77, the strongest ones alone 0.73.
"""

from __future__ import annotations

from exegete.tools.explainers.asking import ModelExplainer, answer_schema, firing_windows, shown
from exegete.tools.explainers.contract import Explanation, explainer
from exegete.tools.prompting import render
from exegete.tools.windows import LatentEvidence


@explainer("one-shot")
class OneShotExplainer(ModelExplainer):
    """Explains a latent from windows in which it fires, in one call."""

    name = "one-shot"

    async def candidate(self, evidence: LatentEvidence, seed: int, sample: int) -> Explanation | None:
        """Return the explanation number `sample`; raises as `explain`."""
        windows = firing_windows(evidence, self.windows, seed, sample)
        if not windows:
            return None
        prompt = render("one_shot", windows=shown(windows))
        answer = await self.ask(prompt, answer_schema(), sample)
        return self.explanation(answer, prompt.digest, {"windows": len(windows), "sample": sample})
