"""The pilot: how a judge's errors cluster in prompts, seen on a frozen subset before any interval is taken (PROTOCOLS §13).

1. At most `PILOT_LATENTS` live latents are drawn by the run's seed and labeled as all others will be, without being recorded.
2. Over their verdicts each evaluator's clustering is pooled (`exegete.evaluators.clustering`), and stored with the run: from
   then on it is fixed, and every interval of the run rests on it.
3. All latents, these too, are labeled with it. What the pilot asked is in the journal and not paid for again.
4. A pilot about which calls failed for good is used and not stored: it is made anew once they may be answered, by this call
   of the run or the next, and what rested on it is forgotten then.

A judge that reads each item alone needs no pilot, and where asking stops early the sequences need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np

from exegete.agent.engine import Batch, Stop, Write, evidence_in_ranges, label_latents
from exegete.agent.graph import Workbench, label_graph
from exegete.agent.ordering import Latents
from exegete.evaluators.clustering import INDEPENDENT, Clustering
from exegete.evaluators.contract import JudgedItem
from exegete.evaluators.scoring import expected_clustering, pilot_clustering
from exegete.tools.evidence import Evidence
from exegete.tools.seeds import generator
from exegete.tools.store import LatentRecord

PILOT_LATENTS = 64
CASCADE = "cascade"
"""Under this name the store keeps what a cascade's control subset has shown, beside the pilot's evaluators."""


def piloted(bench: Workbench) -> list[Any]:
    """Return the evaluators whose intervals need a pilot."""
    if expected_clustering(bench.judge) == INDEPENDENT:
        return []
    return [one for one in bench.evaluators if hasattr(one, "clustering") and getattr(one, "stopping", None) is None]


def pilot_latents(evidence: Evidence, latents: Latents, seed: int) -> list[int]:
    """Return the latents of the pilot, ascending: drawn from the live ones of `latents`."""
    live = np.intersect1d(latents, evidence.live)
    order = generator(seed, "pilot", evidence.dictionary).permutation(len(live))
    return [int(latent) for latent in np.sort(live[order[:PILOT_LATENTS]])]


async def run_pilot(
    evidence: Evidence, latents: Sequence[int], bench: Workbench, concurrency: int, stop: Stop, seen: Write
) -> tuple[dict[str, Clustering], bool] | None:
    """Label `latents` and return evaluator → clustering, and whether every call was answered; None where `stop` said so.

    `seen` is given the records in batches, as they are finished.

    Raises:
        Halted: no language model can be asked any more.
    """
    own = replace(bench, evaluators=piloted(bench), thorough=(), cascade=None, in_flight={})
    records: list[LatentRecord] = []

    def take(finished: Sequence[LatentRecord]) -> None:
        records.extend(finished)
        seen(finished)

    batch = Batch(take, 1)
    if not await label_latents(evidence_in_ranges(evidence, latents), label_graph(own), own, concurrency, batch, stop):
        return None
    records.sort(key=lambda record: record.latent)
    found = {
        one.name: pilot_clustering(
            [cast(JudgedItem, v.item) for v in record.verdicts if v.evaluator == one.name] for record in records
        )
        for one in own.evaluators
    }
    return found, not any(record.missing_calls for record in records)


def described(found: dict[str, Clustering]) -> dict[str, dict[str, Any]]:
    """Return clusterings as they are stored."""
    return {name: asdict(clustering) for name, clustering in found.items()}


def restored(stored: dict[str, dict[str, Any]]) -> dict[str, Clustering]:
    """Return clusterings from what was stored."""
    return {name: Clustering(**fields) for name, fields in stored.items() if name != CASCADE}
