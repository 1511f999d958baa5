"""From verdicts to scores: a function of a latent's own verdicts, and of what is expected of its judge.

Without stopping, every metric takes its interval from `statistics`. Where asking stopped as soon as a confidence sequence
allowed it (`stopping`), such an interval would cover too rarely, since the stop chose the moment. Then
- balanced accuracy, TPR and TNR have their own sequences over prompts,
- F1, which rises with TPR and with TNR, has the corners of their two sequences, each at half the error,
- AUROC and AUPRC have a value and no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from exegete.evaluators import statistics
from exegete.evaluators.clustering import CAUTIOUS, INDEPENDENT, Bools, Clustering, Table, pooled
from exegete.evaluators.contract import Judge, JudgedItem, Score, Task
from exegete.evaluators.statistics import UNDEFINED, Area, Interval
from exegete.evaluators.stopping import ConfidenceSequence, Stopping, balanced_outcome

METRICS = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc", "auprc")
_AREAS: tuple[Area, ...] = ("auroc", "auprc")


def scores(
    task: Task,
    judged: Sequence[JudgedItem],
    parameters: Mapping[str, Any],
    clustering: Clustering = CAUTIOUS,
    stopping: Stopping | None = None,
) -> tuple[Score, ...]:
    """Return every metric of `judged` with its 95 % interval; the same rows always give the same scores.

    So scores can be taken again from stored verdicts, without a call, once a pilot has shown how a judge's errors cluster.
    `stopping` is what the verdicts were asked under.
    """
    given = [item for item in judged if item.verdict.applies is not None]
    failures, table = len(judged) - len(given), _table(given)
    described = {**parameters, **_described(table), **(stopping.described() if stopping else clustering.described())}
    intervals = _intervals(table, clustering) if stopping is None else _sequences(table, stopping)
    intervals |= _areas(table, given, clustering if stopping is None else None)
    return tuple(
        Score(task, metric, *intervals[metric], n=len(given), failures=failures,
              status=_status(judged, given, intervals[metric], metric), parameters=described)
        for metric in METRICS
    )  # fmt: skip


def pilot_clustering(pilot: Iterable[Sequence[JudgedItem]]) -> Clustering:
    """Return how the errors of a judge cluster in prompts, from the verdicts of the latents of a frozen pilot."""
    return pooled(_table([item for item in judged if item.verdict.applies is not None]) for judged in pilot)


def expected_clustering(judge: Judge) -> Clustering:
    """Return what is expected of a judge that no pilot has shown: nothing in common where it reads each item alone."""
    return INDEPENDENT if getattr(judge, "reads_items_alone", False) else CAUTIOUS


def outcomes(judged: Sequence[JudgedItem]) -> list[float]:
    """Return the outcome of each prompt (see `stopping`), in order; prompts without a verdict on each class are left out."""
    table = _table([item for item in judged if item.verdict.applies is not None])
    found = (balanced_outcome(truth, right) for truth, right in _by_prompt(table))
    return [outcome for outcome in found if outcome is not None]


def _table(given: Sequence[JudgedItem]) -> Table:
    return Table(
        np.array([item.truth for item in given], dtype=np.bool_),
        np.array([bool(item.verdict.applies) for item in given], dtype=np.bool_),
        np.array([item.prompt for item in given], dtype=np.int64),
    )


def _described(table: Table) -> dict[str, Any]:
    positives, n = int(table.truth.sum()), len(table.truth)
    return {"positives": positives, "base_rate": positives / n if n else None}


def _intervals(table: Table, clustering: Clustering) -> dict[str, Interval]:
    truth, said, prompts = table
    errors = clustering.errors
    return {
        "balanced_accuracy": statistics.balanced_accuracy(*table, clustering),
        "tpr": statistics.rate_interval(said[truth], prompts[truth], clustering.positives, errors),
        "tnr": statistics.rate_interval(~said[~truth], prompts[~truth], clustering.negatives, errors),
        "f1": statistics.f1(*table, clustering),
    }


def _areas(table: Table, given: Sequence[JudgedItem], clustering: Clustering | None) -> dict[str, Interval]:
    """Return AUROC and AUPRC, where every verdict has a probability; without an interval where `clustering` is None."""
    if not given or not _have_probabilities(given):
        return dict.fromkeys(_AREAS, UNDEFINED)
    probabilities = np.array([item.verdict.probability for item in given], dtype=np.float64)
    if clustering is not None:
        return {name: statistics.area(name, table.truth, probabilities, table.prompts, clustering) for name in _AREAS}
    plain = {"auroc": statistics.auroc, "auprc": statistics.auprc}
    return {name: Interval(metric(table.truth, probabilities), None, None) for name, metric in plain.items()}


def _have_probabilities(given: Sequence[JudgedItem]) -> bool:
    return all(item.verdict.probability is not None and math.isfinite(item.verdict.probability) for item in given)


def _sequences(table: Table, stopping: Stopping) -> dict[str, Interval]:
    """Return the metrics of yes/no verdicts with intervals that hold although asking stopped by them."""
    truth, right = table.truth, table.said == table.truth
    if truth.all() or not truth.any():
        return dict.fromkeys(("balanced_accuracy", "tpr", "tnr", "f1"), UNDEFINED)
    prompts = _by_prompt(table)
    both = [x for x in (balanced_outcome(*prompt) for prompt in prompts) if x is not None]
    firing = [float(r[t].mean()) for t, r in prompts if t.any()]
    silent = [float(r[~t].mean()) for t, r in prompts if not t.all()]
    tpr, tnr = float(right[truth].mean()), float(right[~truth].mean())
    half = (1 + stopping.confidence) / 2
    (tpr_low, tpr_high), (tnr_low, tnr_high) = _sequence(firing, half), _sequence(silent, half)
    positives, negatives = int(truth.sum()), int((~truth).sum())

    def f1(tpr: float, tnr: float) -> float:
        return 2 * tpr * positives / (positives * (1 + tpr) + negatives * (1 - tnr))

    return {
        "balanced_accuracy": _around((tpr + tnr) / 2, _sequence(both, stopping.confidence)),
        "tpr": _around(tpr, _sequence(firing, stopping.confidence)),
        "tnr": _around(tnr, _sequence(silent, stopping.confidence)),
        "f1": _around(f1(tpr, tnr), (f1(tpr_low, tnr_low), f1(tpr_high, tnr_high))),
    }


def _sequence(found: Sequence[float], confidence: float) -> tuple[float, float]:
    return ConfidenceSequence(confidence=confidence).update(found)


def _around(value: float, limits: tuple[float, float]) -> Interval:
    # Items weigh alike in the value and prompts in the sequence: where they differ, the interval holds both.
    return Interval(value, min(value, limits[0]), max(value, limits[1]))


def _by_prompt(table: Table) -> list[tuple[Bools, Bools]]:
    """Return (truth, right) of each prompt, in the order of the prompts."""
    right = table.said == table.truth
    return [
        (table.truth[chosen], right[chosen])
        for chosen in (table.prompts == n for n in np.unique(table.prompts).tolist())
    ]


def _status(judged: Sequence[JudgedItem], given: Sequence[JudgedItem], interval: Interval, metric: str) -> str:
    if interval.value is not None:
        return "ok"
    if not judged:
        return "no_items"
    if not given:
        return judged[0].verdict.status
    if metric in _AREAS and not _have_probabilities(given):
        return "no_probabilities"
    return "one_class"
