"""What is still to come of a run, extrapolated from a few latents (sampling theory: Cochran 1977, chapters 2 and 5).

1. The live latents that are not labeled yet fall into strata: those that are scored in full (`Workbench.first`, where the run's
   profile has such), and the others. From each some are drawn by the run's seed.
2. They go through the run's own graph with its own clients, so that a real run finds their replies in its journal and pays for
   none twice. What their calls took is counted (`metering`), and how long each latent took.
3. A quantity still to come, for example USD, is Σ strata · left · mean per latent, plus four floors on some latents, each of which
   takes what scoring takes, plus the latents of a random-weight control, taken to be like the dictionary's, plus two of them for
   each latent of a cascade's control subset (every rung, and best-of-N at the cost of that; three where best-of-N is drawn
   beside `test-and-refine` as well). Its 95 % interval is
   by Student's t over the sampled latents; it holds both how uncertain the means are and how much the rest will scatter. Of
   the floors two may fall away (a latent may have no sibling, or the same one twice): the lower limit is without them.
4. The time is the longest of what each limit takes alone: latents in flight, calls in flight, requests and tokens per minute,
   and this machine's processor.

Dead, rare and dense latents take nothing.
"""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import stdtrit

from exegete.agent.metering import Meter, Staged, Totals, metered
from exegete.evaluators.baselines import BASELINES
from exegete.tools.seeds import generator
from exegete.tools.store import rows

if TYPE_CHECKING:
    from exegete.agent.config import RunConfig
    from exegete.agent.engine import Work
    from exegete.agent.graph import Workbench
    from exegete.tools.evidence import Evidence
    from exegete.tools.store import LatentRecord
    from exegete.tools.windows import LatentEvidence

SAMPLED = 12
"""Latents of a stratum: with so few, the t-interval of a mean is some 1.3 standard deviations wide on either side."""
CALL_BYTES = 400
"""Of the row and the index of one call in the journal and in what readers see of it."""

Latents = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """What one latent took."""

    label: Totals
    """All of its calls."""
    score: Totals
    """Those of its evaluators."""
    seconds: float
    """From its first node to its record; where its replies came from the journal, their seconds one after the other."""
    verdict_bytes: float = 0.0
    row_bytes: float = 0.0
    paid_usd: float = 0.0
    """What was paid for it now."""


@dataclass(frozen=True)
class Stratum:
    """Latents of one kind."""

    left: int
    """That are still to be labeled, without those of `samples` whose replies are in the run's journal."""
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Extent:
    """How much there is to do beside the latents of the strata."""

    floors: int = 0
    """Latents on which the floors are still to be scored."""
    control: int = 0
    """Latents of a random-weight control that are still to be labeled."""
    climbs: int = 0
    """Latents that climb every rung of a cascade and draw best-of-N at the cost of that, beside being labeled."""
    draws: int = 1
    """How often each of these draws best-of-N."""


@dataclass(frozen=True)
class Pace:
    """What limits the speed."""

    latents: int
    """In flight at once."""
    calls: int
    """In flight at once."""
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    cpu_s: float = 0.0
    """Of this machine for one latent, measured over the sample."""


@dataclass(frozen=True)
class Figure:
    """A quantity with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Latents that it was measured on; 0 where it is counted."""

    def times(self, factor: float, plus: float = 0.0) -> Figure:
        """Return it scaled by a factor and shifted."""
        value, low, high = (plus + factor * one for one in (self.value, self.low, self.high))
        return Figure(value, low, high, self.n)


@dataclass(frozen=True)
class Estimate:
    """What is still to come."""

    calls: Figure
    input_tokens: Figure
    output_tokens: Figure
    usd: Figure
    hours: Figure
    bound_by: str
    """What takes the longest."""
    disk_bytes: Mapping[str, Figure]
    """What it is for → bytes."""
    paid_usd: float
    """What measuring has cost now."""
    strata: Sequence[int] = field(default_factory=list)
    """Latents of each stratum that are left."""

    @property
    def n(self) -> int:
        """Latents that were measured."""
        return self.calls.n


async def measured(evidence: Evidence, left: Latents, bench: Workbench, seed: int) -> tuple[list[Stratum], float]:
    """Label a few of `left` without recording them; return the strata, and processor seconds for one latent.

    Args:
        evidence: of the dictionary.
        left: latents that the run has not recorded yet, ascending, shape (latent,).
        bench: the run's instruments. Their calls go into the run's journal and are paid from its budget.
        seed: of the run.

    Raises:
        Halted: no language model can be asked any more.
    """
    live = np.intersect1d(left, evidence.live, assume_unique=True)
    early = np.isin(live, bench.first) & bool(len(bench.thorough))
    strata = [stratum for stratum in (live[early], live[~early]) if len(stratum)]
    drawn = [_drawn(stratum, evidence, seed) for stratum in strata]
    chosen = [int(latent) for some in drawn for latent in some]
    if not chosen:
        return [], 0.0
    own = {one.latent: one for one in evidence.read(sorted(chosen), "score")}
    work = _through_the_graph(bench)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    taken = dict(zip(chosen, await _all_of(work, [own[latent] for latent in chosen]), strict=True))
    # Threads that compute side by side take no longer than the clock says.
    cpu_s = min(time.perf_counter() - begun, time.process_time() - begun_cpu) / len(chosen)
    found = [
        Stratum(len(stratum) - len(some), [taken[int(latent)] for latent in some])
        for stratum, some in zip(strata, drawn, strict=True)
    ]
    return found, cpu_s


def estimate(strata: Sequence[Stratum], extent: Extent, pace: Pace) -> Estimate:
    """Return what is still to come by what the samples took."""

    def total(of: Callable[[Totals], float]) -> Figure:
        return _total(strata, extent, lambda one: of(one.label), lambda one: of(one.score))

    calls, seconds = total(lambda t: t.calls), total(lambda t: t.seconds)
    tokens = total(lambda t: t.input_tokens + t.output_tokens)
    hours, bound_by = _hours(strata, extent, pace, calls, seconds, tokens)
    texts = total(lambda t: t.text_bytes)
    verdicts = _total(strata, extent, lambda one: one.verdict_bytes, lambda one: one.verdict_bytes)
    found = _total(strata, extent, lambda one: one.row_bytes, lambda one: one.row_bytes)
    return Estimate(
        calls=calls,
        input_tokens=total(lambda t: t.input_tokens),
        output_tokens=total(lambda t: t.output_tokens),
        usd=total(lambda t: t.usd),
        hours=hours,
        bound_by=bound_by,
        # Readers have a copy of the tables; calls are in the journal, and in parts for readers.
        disk_bytes={
            "journal": _sum(texts, calls.times(2 * CALL_BYTES)),
            "verdicts": verdicts,
            "tables and snapshot": found.times(2),
        },
        paid_usd=sum(one.paid_usd for stratum in strata for one in stratum.samples),
        strata=[stratum.left for stratum in strata],
    )


def pace_of(config: RunConfig, cpu_s: float) -> Pace:
    """Return what limits the speed of a run."""
    limits = config.models.limits()
    return Pace(
        config.label.concurrency, limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute, cpu_s
    )


def again_to_do(strata: Sequence[Stratum]) -> list[Stratum]:
    """Return strata whose samples are still to be labeled as well, since no journal keeps their replies."""
    return [replace(stratum, left=stratum.left + len(stratum.samples)) for stratum in strata]


def _total(
    strata: Sequence[Stratum], extent: Extent, label: Callable[[Sample], float], score: Callable[[Sample], float]
) -> Figure:
    """Return the sum of a quantity over everything that is left, by its values for labeling a latent and for scoring it."""
    value = variance = satterthwaite = uncertain = 0.0
    n, left = sum(len(stratum.samples) for stratum in strata), sum(stratum.left for stratum in strata)
    unknown = False
    for place, stratum in enumerate(strata):
        # The control is on random latents with the counts of the larger stratum, the last; floors are on random ones with their own.
        last = place == len(strata) - 1
        labeled = stratum.left + (extent.control + (1 + extent.draws) * extent.climbs if last else 0)
        floored = extent.floors * (stratum.left / left if left else float(last))
        floors = len(BASELINES) * floored
        if not labeled and not floors:
            continue
        labels = np.array([label(one) for one in stratum.samples])
        scores = np.array([score(one) for one in stratum.samples])
        weighted = labeled * labels + floors * scores
        value += weighted.mean()
        uncertain += floors / 2 * scores.mean()
        if len(stratum.samples) < 2:
            unknown = True
            continue
        of_mean = weighted.var(ddof=1) / len(weighted)
        # The floors of one latent rise and fall together.
        of_rest = labeled * labels.var(ddof=1) + floored * len(BASELINES) ** 2 * scores.var(ddof=1)
        variance += of_mean + of_rest
        satterthwaite += (of_mean + of_rest) ** 2 / (len(weighted) - 1)
    if unknown:
        return Figure(float(value), 0.0, math.inf, n)
    half = float(stdtrit(variance**2 / satterthwaite, 0.975)) * math.sqrt(variance) if variance else 0.0
    return Figure(float(value), max(0.0, float(value - half - uncertain)), float(value + half), n)


def _hours(
    strata: Sequence[Stratum], extent: Extent, pace: Pace, calls: Figure, seconds: Figure, tokens: Figure
) -> tuple[Figure, str]:
    """Return how long everything takes, and what takes so long."""
    # A latent's floors are scored side by side.
    latents = _total(strata, extent, lambda one: one.seconds, lambda one: one.seconds / len(BASELINES))
    works = _total(strata, extent, lambda one: 1.0, lambda one: 1.0)
    candidates = {
        f"{pace.latents:,} latents in flight": latents.times(1 / pace.latents / 3600),
        f"{pace.calls:,} calls in flight": seconds.times(1 / pace.calls / 3600),
        "requests per minute": calls.times(1 / pace.requests_per_minute / 60),
        "tokens per minute": tokens.times(1 / pace.tokens_per_minute / 60),
        "this machine": works.times(pace.cpu_s / 3600),
    }
    bound_by = max(candidates, key=lambda name: candidates[name].value)
    return candidates[bound_by], bound_by


def _sum(first: Figure, second: Figure) -> Figure:
    """Return a sum whose interval holds, however the two depend on each other."""
    return Figure(first.value + second.value, first.low + second.low, first.high + second.high, first.n)


def _drawn(stratum: Latents, evidence: Evidence, seed: int) -> Latents:
    order = generator(seed, "estimate", evidence.dictionary).permutation(len(stratum))
    drawn: Latents = np.sort(stratum[order[:SAMPLED]])
    return drawn


def _through_the_graph(bench: Workbench) -> Work:
    """Return what makes the record of a latent, with the calls of its evaluators counted apart."""
    from exegete.agent.engine import failed
    from exegete.agent.graph import label_graph
    from exegete.agent.models import Halted

    own = replace(
        bench,
        evaluators=[Staged(one, "score") for one in bench.evaluators],
        thorough=[Staged(one, "score") for one in bench.thorough],
        in_flight={},
    )
    graph = label_graph(own)

    async def work(evidence: LatentEvidence) -> LatentRecord:
        own.in_flight[evidence.latent] = evidence
        try:
            record: LatentRecord = (await graph.ainvoke({"latent": evidence.latent}))["record"]
            return record
        except Halted:
            raise
        except Exception as error:  # It would be a row of the run, and has taken what it took.
            return failed(own.dictionary, evidence.latent, error)
        finally:
            own.in_flight.pop(evidence.latent)

    return work


async def _all_of(work: Work, latents: Sequence[LatentEvidence]) -> list[Sample]:
    ended = await asyncio.gather(*(_sampled(work, own) for own in latents), return_exceptions=True)
    for one in ended:
        if isinstance(one, BaseException):
            raise one
    return [one for one in ended if isinstance(one, Sample)]


async def _sampled(work: Work, own: LatentEvidence) -> Sample:
    with metered() as meter:
        begun = time.perf_counter()
        record = await work(own)
        seconds = time.perf_counter() - begun
    return sample_of(meter, record, seconds)


def sample_of(meter: Meter, record: LatentRecord, seconds: float) -> Sample:
    """Return what a latent took, from what was counted while it was labeled."""
    whole = meter.total
    known = whole.calls > 0 and not meter.fresh
    tables = (rows.results("", [record]), rows.explanations([record]), rows.scores("", [record]))
    return Sample(
        label=whole,
        score=meter.stages.get("score", Totals()),
        seconds=whole.seconds if known else seconds,
        verdict_bytes=_file_bytes(rows.verdicts("", [record])) - _file_bytes(rows.verdicts("", [])),
        row_bytes=sum(table.nbytes for table in tables),
        paid_usd=meter.paid_usd,
    )


def _file_bytes(table: pa.Table) -> int:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return len(buffer.getvalue())
