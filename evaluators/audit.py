"""The audit of an evaluator: what it can tell, on planted latents whose meaning is known.

1. Each latent's true explanation and its corrupted ones are scored on the same evidence, with the same seed.
2. For each metric and corruption: the AUROC of the score for telling true explanations from corrupted ones, over latents,
   with Newcombe's interval (`ranking`), and the share of latents whose own true explanation wins (ties count half).
3. Two sanity checks after Oikarinen, Yan & Weng 2025, "Evaluating Neuron Explanations: A Unified Framework with Sanity
   Checks": where half of the positive labels are taken away, or as many random ones are added, a sound metric falls. There
   the labels are those of a concept; here nobody labels, so the text itself is exchanged: half of the firing windows get the
   text of silent ones (`missing`), the silent windows the text of firing ones, as many as fire in the scored sample (`extra`:
   all of them, where the classes are equal) or, at the latent's rate in the corpus, as many as fire there (`extra_in_corpus`).
   A check counts the latents whose score falls by more than 0.001 and is passed above nine in ten, as in the paper.
4. Coverage: the share of scores whose 95 % interval holds the expectation, where that is known (`audit_coverage`).

Scores that have no value are counted, and left out.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from exegete.evaluators.audit_truths import CORRUPTIONS
from exegete.evaluators.contract import Evaluator, Judge, Score
from exegete.evaluators.ranking import auroc_interval
from exegete.evaluators.statistics import UNDEFINED, Interval, wilson
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.windows import LatentEvidence, Split, Window

TRUE = "true"
Check = Literal["missing", "extra", "extra_in_corpus"]
CHECKS: tuple[Check, ...] = get_args(Check)
LEAST_FALL = 0.001
PASSING_SHARE = 0.9
CASES_AT_ONCE = 8
"""What a case asks goes out at once; embedders and scorers keep what the explanations of so many cases share."""

Key = tuple[int, str]
"""Latent, and which explanation: true, a corruption, or a check."""
Scored = Mapping[Key, Mapping[str, Score]]
"""Scores by metric."""
Expected = Callable[[int, str], Awaitable[Mapping[str, float]]]


@dataclass(frozen=True)
class Case:
    """A planted latent: what is known of it, and what is said of it."""

    latent: int
    true: Explanation
    corrupted: Mapping[str, Explanation]
    evidence: LatentEvidence
    population: LatentEvidence | None = None
    """More windows of its, of other documents: what the score would be on very many is estimated on them."""

    @property
    def explanations(self) -> dict[str, Explanation]:
        """The true explanation and the corrupted ones."""
        return {TRUE: self.true, **self.corrupted}


@dataclass(frozen=True)
class Separation:
    """How well a metric tells true explanations from corrupted ones."""

    auroc: Interval
    n: int
    """Latents with both scores."""
    wins: Interval
    """Share of latents whose own true explanation scores higher; ties count half."""
    true_mean: float | None
    corrupted_mean: float | None
    missing: int
    """Latents for which one of the two scores has no value."""


@dataclass(frozen=True)
class Sanity:
    """Whether a metric falls where labels are made wrong."""

    fell: Interval
    """Share of latents whose score fell."""
    change: float | None
    """Mean change of the score."""
    n: int

    @property
    def passed(self) -> bool | None:
        """Whether it fell for more than nine in ten latents; None where nothing is known."""
        return None if self.fell.value is None else self.fell.value > PASSING_SHARE


@dataclass(frozen=True)
class Coverage:
    """Share of scores whose interval holds the expectation; `reason` says why there is none."""

    share: Interval = UNDEFINED
    n: int = 0
    reason: str = ""


@dataclass(frozen=True)
class MetricAudit:
    """What is known of one metric."""

    metric: str
    true_mean: float | None
    n: int
    """Latents whose true explanation has a score."""
    separations: Mapping[str, Separation]
    sanity: Mapping[str, Sanity]
    coverage: Coverage


@dataclass(frozen=True)
class EvaluatorAudit:
    """What is known of one evaluator."""

    evaluator: str
    metrics: tuple[MetricAudit, ...]
    seconds: float
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Scores without a value, by status."""
    values: Mapping[Key, Mapping[str, float | None]] = field(default_factory=dict, repr=False)

    def against(self, metric: str, control: str) -> Separation:
        """Return how well `metric` stands above another metric of the same true explanations, its control."""
        true = [scores for (_, which), scores in self.values.items() if which == TRUE]
        return separation([one.get(metric) for one in true], [one.get(control) for one in true])


async def audit(
    name: str,
    evaluator: Evaluator,
    cases: Sequence[Case],
    judge: Judge,
    seed: int,
    *,
    expected: Expected | str = "the expectation is not known",
    checks: Sequence[Check] = CHECKS,
    relabeled_metrics: Callable[[str], bool] = lambda metric: True,
    split: Split = "test",
    at_once: int = CASES_AT_ONCE,
) -> EvaluatorAudit:
    """Return what `evaluator` can tell.

    Args:
        name: what the audit calls it.
        evaluator: as a labeling run makes it.
        cases: planted latents, two at least.
        judge: for evaluators that ask one.
        seed: of everything random.
        expected: gives the expectation of metrics for (latent, which explanation), or says why nothing is known.
        checks: sanity checks to be made; each scores the true explanations once more.
        relabeled_metrics: whether they mean anything for a metric (they exchange the text of windows).
        split: that the evaluator scores.
        at_once: cases in flight.
    """
    began = time.perf_counter()
    scored = await _score(evaluator, cases, judge, seed, checks, split, at_once)
    expectations: dict[Key, Mapping[str, float]] = {}
    if not isinstance(expected, str):
        keys = [(case.latent, which) for case in cases for which in case.explanations]
        expectations = dict(zip(keys, [await expected(*key) for key in keys], strict=True))
    reason = expected if isinstance(expected, str) else "not taken of this metric"
    names = list(dict.fromkeys(metric for scores in scored.values() for metric in scores))
    audited = [
        _metric(metric, scored, expectations, reason, checks if relabeled_metrics(metric) else ()) for metric in names
    ]
    known = tuple(one for one in audited if one.n)
    values = {key: {metric: s.value for metric, s in scores.items()} for key, scores in scored.items()}
    failed = [s.status for scores in scored.values() for s in scores.values() if s.value is None]
    statuses = {status: failed.count(status) for status in sorted(set(failed))}
    return EvaluatorAudit(name, known, time.perf_counter() - began, statuses, values)


def separation(true: Sequence[float | None], corrupted: Sequence[float | None]) -> Separation:
    """Return how well scores tell true explanations from corrupted ones; both lists are in the order of the latents."""
    pairs = [(a, b) for a, b in zip(true, corrupted, strict=True) if a is not None and b is not None]
    missing = len(true) - len(pairs)
    if not pairs:
        return Separation(UNDEFINED, 0, UNDEFINED, None, None, missing)
    right, wrong = np.array(pairs, dtype=np.float64).T
    truth = np.arange(2 * len(pairs)) < len(pairs)
    won = float((right > wrong).sum() + (right == wrong).sum() / 2)
    return Separation(
        auroc_interval(truth, np.concatenate([right, wrong])),
        len(pairs),
        Interval(won / len(pairs), *wilson(won, len(pairs))),
        float(right.mean()),
        float(wrong.mean()),
        missing,
    )


def sanity(before: Sequence[float | None], after: Sequence[float | None]) -> Sanity:
    """Return how often scores fell; both lists are in the order of the latents."""
    changes = np.array([b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None])
    if not len(changes):
        return Sanity(UNDEFINED, None, 0)
    fell = int((changes < -LEAST_FALL).sum())
    return Sanity(Interval(fell / len(changes), *wilson(fell, len(changes))), float(changes.mean()), len(changes))


def relabeled(evidence: LatentEvidence, check: Check, split: Split, seed: int) -> LatentEvidence:
    """Return the evidence with text exchanged between firing and silent windows of `split`, activations as they were.

    A window takes the text of another only where that is long enough; it is cut to the window's own length.

    Args:
        evidence: of one latent; `window_density` among its statistics for "extra_in_corpus".
        check: which labels are made wrong.
        split: whose windows.
        seed: of the choice.
    """
    rng = generator(seed, "relabel", check, evidence.latent)
    firing = [w for w in evidence.windows if w.split == split and w.fires]
    silent = [w for w in evidence.windows if w.split == split and not w.fires]
    if not firing or not silent:
        return evidence
    if check == "missing":
        chosen = {firing[i].id for i in rng.permutation(len(firing))[: (len(firing) + 1) // 2]}
        sources: Sequence[Window] = silent
    else:
        density = evidence.statistics.get("window_density", 0.5)
        in_corpus = density / max(1e-9, 1 - density)
        # Random and hard windows are scored apart: there are to be as many extra labels among either as windows that fire.
        of_kind = Counter(window.kind for window in silent)
        rates = {kind: in_corpus if check == "extra_in_corpus" else len(firing) / n for kind, n in of_kind.items()}
        chosen = {window.id for window in silent if rng.random() < rates[window.kind]}
        sources = firing
    changed = tuple(
        replace(window, tokens=_borrowed(window, sources, rng))
        if window.split == split and window.id in chosen
        else window
        for window in evidence.windows
    )
    return replace(evidence, windows=changed)


def _borrowed(window: Window, sources: Sequence[Window], rng: np.random.Generator) -> tuple[str, ...]:
    fitting = [one for one in sources if len(one.tokens) >= len(window.tokens)]
    if not fitting:
        return window.tokens
    return fitting[int(rng.integers(len(fitting)))].tokens[: len(window.tokens)]


async def _score(
    evaluator: Evaluator,
    cases: Sequence[Case],
    judge: Judge,
    seed: int,
    checks: Sequence[Check],
    split: Split,
    at_once: int,
) -> dict[Key, dict[str, Score]]:
    turn = asyncio.Semaphore(at_once)

    async def one(case: Case) -> dict[Key, dict[str, Score]]:
        own = derive_seed(seed, "audit", case.latent)
        asked = {which: (said, case.evidence) for which, said in case.explanations.items()}
        asked |= {check: (case.true, relabeled(case.evidence, check, split, own)) for check in checks}
        async with turn:
            # The first one leaves passages, vectors and the like that the others need as well.
            (said, shown), *others = asked.values()
            found = [await evaluator.evaluate(said, shown, judge, own)]
            found += await asyncio.gather(*(evaluator.evaluate(said, shown, judge, own) for said, shown in others))
        return {
            (case.latent, which): {score.metric: score for score in evaluation.scores if score.baseline is None}
            for which, evaluation in zip(asked, found, strict=True)
        }

    return {key: scores for found in await asyncio.gather(*map(one, cases)) for key, scores in found.items()}


def _metric(
    metric: str, scored: Scored, expectations: Mapping[Key, Mapping[str, float]], reason: str, checks: Sequence[Check]
) -> MetricAudit:
    def value(latent: int, which: str) -> float | None:
        found = scored[latent, which].get(metric)
        return None if found is None else found.value

    latents = [latent for latent, which in scored if which == TRUE]
    of_true = [value(latent, TRUE) for latent in latents]
    separations = {}
    for corruption in _corruptions(scored):
        known = [latent for latent in latents if (latent, corruption) in scored]
        separations[corruption] = separation(
            [value(latent, TRUE) for latent in known], [value(latent, corruption) for latent in known]
        )
    relabelings: dict[str, Sanity] = {
        check: sanity(of_true, [value(latent, check) for latent in latents]) for check in checks
    }
    given = [found for found in of_true if found is not None]
    return MetricAudit(
        metric,
        float(np.mean(given)) if given else None,
        len(given),
        separations,
        relabelings,
        _coverage(metric, scored, expectations, reason),
    )


def _corruptions(scored: Collection[Key]) -> list[str]:
    present = dict.fromkeys(which for _, which in scored if which not in (TRUE, *CHECKS))
    order = {name: place for place, name in enumerate(CORRUPTIONS)}
    return sorted(present, key=lambda name: order.get(name, len(order)))  # type: ignore[call-overload]


def _coverage(metric: str, scored: Scored, expectations: Mapping[Key, Mapping[str, float]], reason: str) -> Coverage:
    held = []
    for key, found in expectations.items():
        score = scored[key].get(metric)
        if metric in found and score is not None and score.low is not None and score.high is not None:
            held.append(score.low - 1e-9 <= found[metric] <= score.high + 1e-9)
    if not held:
        return Coverage(reason=reason)
    return Coverage(Interval(sum(held) / len(held), *wilson(sum(held), len(held))), len(held))
