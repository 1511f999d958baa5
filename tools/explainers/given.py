"""The explanation that came with the evidence, scored as it stands."""

from __future__ import annotations

from exegete.tools.explainers.contract import Explanation, explainer
from exegete.tools.windows import LatentEvidence


@explainer("given")
class GivenExplainer:
    """Hands on the explanation that was imported with a latent."""

    name = "given"

    async def explain(self, evidence: LatentEvidence, seed: int) -> Explanation | None:
        """Return the imported explanation, or None where the latent came without one."""
        return Explanation(evidence.given_explanation) if evidence.given_explanation else None
