"""The floors of a run: what scores other explanations reach on the same windows (PROTOCOLS §11).

On a random subset of the explained latents every evaluator also scores the explanation of another latent, that of the most
similar one, a constant one, and the list of marked tokens. Everything is drawn from the run's seed over the sorted latents,
so an interrupted run has the same floors as an undisturbed one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow.parquet as pq

from exegete.agent.engine import Batch, Stop, failed, work_through
from exegete.agent.graph import Workbench
from exegete.agent.models import Halted
from exegete.evaluators.baselines import (
    CONSTANT,
    Baseline,
    firing_tokens,
    floor_subset,
    shuffled_partners,
    token_overlap_siblings,
)
from exegete.tools.evidence import Evidence, restrict
from exegete.tools.explainers import Explanation, make_explainer
from exegete.tools.seeds import derive_seed
from exegete.tools.store import LatentRecord, VerdictRecord
from exegete.tools.windows import LatentEvidence


@dataclass(frozen=True)
class Floors:
    """Which latents are scored against which others."""

    subset: Sequence[int]
    shuffled: Mapping[int, int]
    sibling: Mapping[int, int]

    @property
    def lenders(self) -> set[int]:
        """The latents whose explanations are borrowed."""
        pairs = (self.shuffled, self.sibling)
        return {pair[latent] for pair in pairs for latent in self.subset if latent in pair}


def plan_floors(evidence: Evidence, explained: Sequence[int], count: int, seed: int) -> Floors:
    """Draw the subset of `explained` latents (ascending) and their partners."""
    subset = floor_subset(explained, count, seed)
    return Floors(subset, shuffled_partners(explained, seed), _siblings(evidence, explained, subset))


async def score_all_floors(
    source: Iterable[LatentEvidence],
    identities: Mapping[int, str],
    floors: Floors,
    explanations: Mapping[int, Explanation],
    bench: Workbench,
    concurrency: int,
    batch: Batch,
    stop: Stop,
) -> bool:
    """Score the floors of every latent of `source` and hand them to `batch`; as `label_latents`."""

    async def score(own: LatentEvidence) -> LatentRecord:
        try:
            return await score_floors(own, identities[own.latent], floors, explanations, bench)
        except Halted:
            raise
        except Exception as error:
            return failed(bench.dictionary, own.latent, error)

    return await work_through(source, score, concurrency, batch, stop)


async def score_floors(
    own: LatentEvidence, own_id: str, floors: Floors, explanations: Mapping[int, Explanation], bench: Workbench
) -> LatentRecord:
    """Return the floor scores of one latent, each beside the latent's own explanation `own_id`."""
    seed = bench.latent_seed(own.latent)
    candidates: dict[Baseline, Explanation | None] = {
        "shuffled": explanations.get(floors.shuffled.get(own.latent, -1)),
        "sibling": explanations.get(floors.sibling.get(own.latent, -1)),
        "constant": CONSTANT,
        "token_list": await make_explainer("token_list").explain(restrict(own, "explain"), seed),
    }
    asked = [(b, e, evaluator) for b, e in candidates.items() if e is not None for evaluator in bench.evaluators]
    # All at once: where calls go out in batches that take hours, one after the other would be days.
    evaluations = await asyncio.gather(*(by.evaluate(e, own, bench.judge, seed) for _, e, by in asked))
    scores, verdicts = [], []
    for (baseline, _, evaluator), evaluation in zip(asked, evaluations, strict=True):
        scores += [(own_id, replace(score, baseline=baseline)) for score in evaluation.scores]
        verdicts += [VerdictRecord(own_id, evaluator.name, item, baseline) for item in evaluation.verdicts]
    return LatentRecord(bench.dictionary, own.latent, "labeled", scores=scores, verdicts=verdicts)


def _siblings(evidence: Evidence, explained: Sequence[int], subset: Sequence[int]) -> dict[int, int]:
    nearest = evidence.folder / "neighbours.parquet"
    if nearest.exists():
        return _nearest_explained(pq.read_table(nearest).to_pylist(), set(explained), set(subset))
    tokens: dict[int, Counter[str]] = {own.latent: firing_tokens(own) for own in evidence.read(explained, "explain")}
    return token_overlap_siblings(tokens, subset)


def _nearest_explained(rows: Sequence[Mapping[str, int]], explained: set[int], subset: set[int]) -> dict[int, int]:
    siblings: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: (row["latent"], row["rank"])):
        if row["latent"] in subset and row["neighbour"] in explained:
            siblings.setdefault(row["latent"], row["neighbour"])
    return siblings


def floors_seed(seed: int, dictionary: str) -> int:
    """Return the seed that the floors of one dictionary derive from."""
    return derive_seed(seed, dictionary, "floors")
