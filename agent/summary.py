"""The headline of a run: every figure beside its floors, its interval and its n (PROTOCOLS §11, §13)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exegete.evaluators.baselines import BASELINES
from exegete.evaluators.statistics import Interval, difference_interval, mean_interval, paired_interval
from exegete.tools.store.results import Figures, RunResults

RANDOM_CONTROL = "random_control"
"""Floor of the explanations of a random-weight dictionary's latents, on those latents' own windows."""


def summarise(
    results: RunResults,
    headlines: Mapping[str, str],
    rng: np.random.Generator,
    controls: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Return the figures of one dictionary's run.

    `outcomes`: status → latents; `types`: type → latents; per evaluator the mean over latents of its headline metric
    (`headlines`: evaluator → metric) with interval and n, and per floor the mean and the paired difference over the latents that have both.
    Where there are `controls` (evaluator → scores of a random-weight dictionary's latents), they stand beside the floors, with
    the difference of the means.
    """
    own = {name: results.figures(name, metric) for name, metric in sorted(headlines.items())}
    own = {name: figures for name, figures in own.items() if len(figures.latents)}
    evaluators = {}
    for name, scores in own.items():
        floors = results.floor_figures(name, headlines[name])
        evaluators[name] = _evaluator(headlines[name], scores, floors, rng)
    for name, figures in evaluators.items():
        if others := (controls or {}).get(name):
            values = own[name].values
            control = np.array(others, dtype=np.float64)
            figures["floors"][RANDOM_CONTROL] = {
                headlines[name]: _figure(mean_interval(control, rng), len(control)),
                "above": _figure(difference_interval(values, control, rng), len(values)),
            }
    return {"outcomes": results.counts("status"), "types": results.counts("typed"), "evaluators": evaluators}


def _evaluator(metric: str, own: Figures, floors: Mapping[str, Figures], rng: np.random.Generator) -> dict[str, Any]:
    values = own.values
    figures: dict[str, Any] = {"metric": metric, metric: _figure(mean_interval(values, rng), len(values)), "floors": {}}
    for baseline in BASELINES:
        if baseline not in floors:
            continue
        floor = floors[baseline]
        shared, at_own, at_floor = np.intersect1d(own.latents, floor.latents, return_indices=True)
        if not len(shared):
            continue
        here, there = values[at_own], floor.values[at_floor]
        figures["floors"][baseline] = {
            metric: _figure(mean_interval(there, rng), len(shared)),
            "above": _figure(paired_interval(here, there, rng), len(shared)),
        }
    return figures


def _figure(interval: Interval, n: int) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": n}


def headline(figures: dict[str, Any]) -> list[str]:
    """Return the figures of `summarise` as lines for a terminal."""
    lines = [_counts("latents", figures["outcomes"]), _counts("types", figures["types"])]
    for name, evaluator in figures["evaluators"].items():
        metric = evaluator.get("metric", "balanced_accuracy")  # Runs of older versions had no other.
        lines.append(f"{name}: mean {metric.replace('_', ' ')} {_text(evaluator[metric])}")
        for baseline, floor in evaluator["floors"].items():
            lines.append(
                f"  {baseline.replace('_', ' '):<10} {_text(floor[metric])}; above it by {_text(floor['above'])}"
            )
    if "cascade" in figures:
        from exegete.agent.cascade_summary import cascade_lines

        lines += cascade_lines(figures["cascade"])
    return lines


def _counts(name: str, counts: Counter[str] | dict[str, int]) -> str:
    return f"{name}: " + (", ".join(f"{count:,} {key}" for key, count in sorted(counts.items())) or "none")


def _text(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}] (n = {figure['n']:,})"
