"""The floors of a run: what scores other explanations reach on the same windows (PROTOCOLS §11).

On a random subset of the explained latents every evaluator also scores the explanation of another latent, that of the most
similar one, a constant one, and the list of marked tokens. Everything is drawn from the run's seed over the sorted latents,
so an interrupted run has the same floors as an undisturbed one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from exegete.agent.engine import Batch, Stop, failed, work_through
from exegete.agent.graph import Workbench
from exegete.agent.models import Halted
from exegete.evaluators.baselines import (
    CONSTANT,
    Baseline,
    Latents,
    firing_tokens,
    floor_subset,
    shuffled_partners,
    token_overlap_siblings,
)
from exegete.tools.evidence import Evidence, restrict
from exegete.tools.explainers import Explanation, make_explainer
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.store import LatentRecord, VerdictRecord
from exegete.tools.windows import LatentEvidence

MOST_RIVALS = 20_000
"""Where there are no decoder directions to compare, siblings are the most similar of so many latents, drawn by the seed: reading
the windows of a million would take longer than all floors together."""
_BLOCK = 250


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


def plan_floors(evidence: Evidence, explained: Latents, count: int, seed: int) -> Floors:
    """Draw the subset of `explained` latents (ascending) and their partners."""
    subset = floor_subset(explained, count, seed)
    known = np.asarray(explained, dtype=np.int64)
    return Floors(subset, shuffled_partners(known, seed, subset), _siblings(evidence, known, subset, seed))


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
    evaluators = bench.evaluators_of(own.latent)
    asked = [(b, e, evaluator) for b, e in candidates.items() if e is not None for evaluator in evaluators]
    # All at once: where calls go out in batches that take hours, one after the other would be days.
    evaluations = await asyncio.gather(*(by.evaluate(e, own, bench.judge, seed) for _, e, by in asked))
    scores, verdicts = [], []
    for (baseline, _, evaluator), evaluation in zip(asked, evaluations, strict=True):
        scores += [(own_id, replace(score, baseline=baseline)) for score in evaluation.scores]
        verdicts += [VerdictRecord(own_id, evaluator.name, item, baseline) for item in evaluation.verdicts]
    return LatentRecord(bench.dictionary, own.latent, "labeled", scores=scores, verdicts=verdicts)


def _siblings(evidence: Evidence, explained: NDArray[np.int64], subset: Sequence[int], seed: int) -> dict[int, int]:
    nearest = evidence.folder / "neighbours.parquet"
    if nearest.exists():
        rows = pq.read_table(nearest, columns=["latent", "neighbour", "rank"], filters=[("latent", "in", list(subset))])
        return _nearest_explained(rows.to_pylist(), explained)
    own = {one.latent: firing_tokens(one) for one in evidence.read(subset, "explain")}
    rivals = _rivals(explained, seed)
    return token_overlap_siblings(own, ((one.latent, firing_tokens(one)) for one in evidence.read(rivals, "explain")))


def _rivals(explained: NDArray[np.int64], seed: int) -> list[int]:
    """Return the latents among which siblings are looked for: `MOST_RIVALS` of many, in blocks that are read at once."""
    if len(explained) <= MOST_RIVALS:
        return [int(latent) for latent in explained]
    blocks = np.array_split(explained, -(-len(explained) // _BLOCK))
    drawn = generator(seed, "floors", "rivals").permutation(len(blocks))[: MOST_RIVALS // _BLOCK]
    return sorted(int(latent) for block in drawn for latent in blocks[block])


def _nearest_explained(rows: Sequence[Mapping[str, int]], explained: NDArray[np.int64]) -> dict[int, int]:
    known = set(np.intersect1d(explained, [row["neighbour"] for row in rows]).tolist())
    siblings: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: (row["latent"], row["rank"])):
        if row["neighbour"] in known:
            siblings.setdefault(row["latent"], row["neighbour"])
    return siblings


def floors_seed(seed: int, dictionary: str) -> int:
    """Return the seed that the floors of one dictionary derive from."""
    return derive_seed(seed, dictionary, "floors")
