"""The types of a run's latents (PROTOCOLS §12), from the scores that it stored.

1. Own scores and those of shuffled explanations, in each evaluator's headline metric, go to `exegete.evaluators.typing`.
2. Where a random-weight control was labeled, its scores are a further floor. An evaluator with fewer of them than its bar takes
   decides nothing (`too_few`): a bar that nobody can vouch for types no latent as explained.
3. A latent that is dead, rare or dense has that as its type, whatever a score says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from exegete.evaluators import typing
from exegete.evaluators.typing import Scores, Typed, deciding_evaluators, least_controls
from exegete.tools.store.results import RunResults

Controls = Mapping[str, Sequence[float]]
"""Evaluator → scores of the latents of a random-weight dictionary."""


def typed_latents(
    results: RunResults,
    headlines: Mapping[str, str],
    silent: Mapping[str, NDArray[np.int64]],
    controls: Controls | None = None,
) -> Typed:
    """Return the types of the latents that have a score, and of the `silent` ones.

    Args:
        results: what the run has stored.
        headlines: evaluator → metric.
        silent: dead, rare and dense → the latents that are so, each shape (latent,).
        controls: None where the run has no random-weight control.
    """
    scores = {name: Scores(*results.figures(name, metric)) for name, metric in headlines.items()}
    floors = {name: _shuffled(results, name, metric) for name, metric in headlines.items()}
    if controls is None:
        return _silenced(typing.typed_latents(scores, floors), silent)
    lacking = too_few(controls)
    enough = {name: values for name, values in controls.items() if name not in lacking}
    return _silenced(typing.typed_latents(scores, floors, controls=[enough]), silent)


def few_floors(results: RunResults, headlines: Mapping[str, str]) -> dict[str, int]:
    """Return the deciding evaluators with fewer shuffled scores than a 95th percentile takes, and how many they have."""
    counted = {name: len(_shuffled(results, name, headlines[name])) for name in deciding_evaluators(headlines)}
    return {name: count for name, count in counted.items() if count < least_controls(1)}


def control_scores(results: RunResults, headlines: Mapping[str, str]) -> dict[str, list[float]]:
    """Return what the run of a random-weight control came to: evaluator → scores, of every evaluator in `headlines`."""
    return {name: results.figures(name, metric).values.tolist() for name, metric in headlines.items()}


def too_few(controls: Controls) -> list[str]:
    """Return the evaluators that would decide types, and of which `controls` has fewer scores than a bar takes."""
    deciding = deciding_evaluators(controls)
    return [name for name in deciding if len(controls[name]) < least_controls(len(deciding))]


def _shuffled(results: RunResults, evaluator: str, metric: str) -> list[float]:
    found = results.floor_figures(evaluator, metric).get("shuffled")
    return [] if found is None else found.values.tolist()


def _silenced(typed: Typed, silent: Mapping[str, NDArray[np.int64]]) -> Typed:
    """Return `typed` with the status of every silent latent in place of its type."""
    statuses = [np.full(len(latents), status) for status, latents in silent.items() if len(latents)]
    if not statuses:
        return typed
    latents = np.concatenate([latents for latents in silent.values() if len(latents)])
    spoken = ~np.isin(typed.latents, latents)
    every = np.concatenate([typed.latents[spoken], latents])
    types = np.concatenate([typed.types[spoken], *statuses])
    order = np.argsort(every)
    return Typed(every[order], types[order])
