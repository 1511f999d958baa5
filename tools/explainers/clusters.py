"""The clusters explainer: one hypothesis per cluster of windows, merged into one sense or several.

A latent that responds to two unrelated things gives a reader of its mixed windows a muddle. So:

1. The firing windows of the explain split are embedded as sentences and clustered (Ward's method on vectors of unit
   length, whose squared distance is 2 − 2·cosine); of 2 to `most` clusters the number with the largest mean silhouette
   (Rousseeuw 1987) is taken, among those whose clusters all have at least `least` windows. Where there is none, there is
   one cluster.
2. The one-shot question is asked of each cluster by itself.
3. The model merges the hypotheses: what is one pattern becomes one sense, what is not stays apart. So splitting too much
   costs calls and not truth. With a single hypothesis there is nothing to merge.

All senses stand in the explanation's `parameters`, with the sizes of the clusters and what was said of each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exegete.tools.embedders import Embedder
from exegete.tools.errors import UserError
from exegete.tools.explainers.asking import WINDOWS, ModelExplainer, answer_schema, firing_windows, shown
from exegete.tools.explainers.contract import Explanation, NotExplained, explainer
from exegete.tools.llm.contract import Client
from exegete.tools.prompting import Line, line, prompt_digest, render
from exegete.tools.windows import LatentEvidence, Window

MOST, LEAST = 4, 4


@explainer("clusters")
class ClustersExplainer(ModelExplainer):
    """Explains a latent sense by sense: a call per cluster of windows, and one to merge what they say."""

    name = "clusters"

    def __init__(
        self,
        client: Client,
        embedder: Embedder,
        windows: int = WINDOWS,
        most: int = MOST,
        least: int = LEAST,
        temperature: float | None = None,
        max_tokens: int = 2_048,
    ) -> None:
        """Ask `client` about at most `most` clusters of at least `least` windows, by the vectors of `embedder`.

        Raises:
            UserError: `windows`, `most` or `least` is less than one.
        """
        super().__init__(client, windows, temperature, max_tokens)
        if most < 1 or least < 1:
            raise UserError(f"clusters must be at least one, of at least one window, not {most} of {least}")
        self._embedder, self._most, self._least = embedder, most, least

    async def candidate(self, evidence: LatentEvidence, seed: int, sample: int) -> Explanation | None:
        """Return the explanation number `sample`; raises as `explain`, also where one of its calls fails."""
        windows = firing_windows(evidence, self.windows, seed, sample)
        if not windows:
            return None
        groups = await asyncio.to_thread(self._groups, windows)
        said = await asyncio.gather(*(self._hypothesis(group, sample) for group in groups))
        found = [one for one in said if one is not None]
        parameters: dict[str, Any] = {
            "windows": len(windows),
            "clusters": [len(group) for group in groups],
            "embedding": self._embedder.name,
            "hypothesis_prompt": prompt_digest("one_shot"),
            "sample": sample,
        }
        if not found:
            return None
        if len(found) == 1:
            own = found[0].explanation
            return replace(own, parameters={**own.parameters, **parameters, "senses": [own.text]})
        return await self._merged(found, parameters, sample)

    def _groups(self, windows: Sequence[Window]) -> list[list[Window]]:
        labels = cluster(self._embedder.passages([w.text for w in windows]), self._most, self._least)
        groups = [[w for w, own in zip(windows, labels, strict=True) if own == label] for label in np.unique(labels)]
        return sorted(groups, key=len, reverse=True)

    async def _hypothesis(self, group: Sequence[Window], sample: int) -> Hypothesis | None:
        prompt = render("one_shot", windows=shown(group))
        found = self.explanation(await self.ask(prompt, answer_schema(), sample), prompt.digest, {})
        return Hypothesis(len(group), found) if found else None

    async def _merged(self, found: Sequence[Hypothesis], parameters: dict[str, Any], sample: int) -> Explanation | None:
        prompt = render("merge_senses", hypotheses=found)
        senses = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": len(found)}
        answer = await self.ask(prompt, answer_schema(senses=senses), sample)
        listed = answer.get("senses")
        if not isinstance(listed, list) or not listed or not all(isinstance(s, str) for s in listed):
            raise NotExplained("unparsed", "no list of senses in the answer")
        said = [one.explanation.text for one in found]
        return self.explanation(answer, prompt.digest, {**parameters, "hypotheses": said, "senses": listed})


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What was said of one cluster, as the merging prompt reads it."""

    passages: int
    explanation: Explanation

    @property
    def text(self) -> Line:
        """The explanation, safe for a prompt."""
        return line(self.explanation.text)

    @property
    def predicate(self) -> Line | None:
        """Its predicate, safe for a prompt."""
        return line(self.explanation.predicate) if self.explanation.predicate else None


def cluster(vectors: NDArray[np.float32], most: int, least: int) -> NDArray[np.int64]:
    """Return the cluster of each vector, shape (vector,), numbered from 0.

    `vectors`: shape (vector, width), of unit length. Ties in silhouette go to fewer clusters.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    best, labels = -np.inf, np.zeros(len(vectors), dtype=np.int64)
    if len(np.unique(vectors, axis=0)) < 2:
        return labels
    for count in range(2, min(most, len(vectors) // least, len(vectors) - 1) + 1):
        tried = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(vectors)
        if np.bincount(tried).min() < least:
            continue
        quality = float(silhouette_score(vectors, tried, metric="euclidean"))
        if quality > best:
            best, labels = quality, np.asarray(tried, dtype=np.int64)
    return labels
