"""The types of a run's latents (PROTOCOLS §12), from the scores that it stored.

1. Own scores and those of shuffled explanations, in each evaluator's headline metric, go to `exegete.evaluators.typing`.
2. Where a random-weight control was labeled, its scores are a further floor. An evaluator with fewer of them than its bar takes
   decides nothing (`too_few`): a bar that nobody can vouch for types no latent as explained.
3. A latent that is dead, rare or dense has that as its type, whatever a score says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from exegete.evaluators.typing import Scored, deciding_evaluators, least_controls, types
from exegete.tools.store.results import RunResults

Controls = Mapping[str, Sequence[float]]
"""Evaluator → scores of the latents of a random-weight dictionary."""


def typed_latents(
    results: RunResults,
    headlines: Mapping[str, str],
    statuses: Mapping[int, str],
    controls: Controls | None = None,
) -> dict[int, str]:
    """Return latent → type, of the latents in `statuses` and those with a score.

    Args:
        results: what the run has stored.
        headlines: evaluator → metric.
        statuses: latent → live, dead, rare or dense.
        controls: None where the run has no random-weight control.
    """
    scores: dict[str, list[Scored]] = {}
    floors: dict[str, list[float]] = {}
    for latent, evaluator, baseline, value, low in results.headlines(headlines):
        if baseline is None:
            scores.setdefault(evaluator, []).append(Scored(latent, value, low))
        elif baseline == "shuffled":
            floors.setdefault(evaluator, []).append(value)
    silent = {latent: str(status) for latent, status in statuses.items() if status != "live"}
    if controls is None:
        return types(scores, floors) | silent
    lacking = too_few(controls)
    enough = {name: values for name, values in controls.items() if name not in lacking}
    return types(scores, floors, controls=[enough]) | silent


def few_floors(results: RunResults, headlines: Mapping[str, str]) -> dict[str, int]:
    """Return the deciding evaluators with fewer shuffled scores than a 95th percentile takes, and how many they have."""
    counted = dict.fromkeys(deciding_evaluators(headlines), 0)
    for row in results.headlines(headlines):
        if row.baseline == "shuffled" and row.evaluator in counted:
            counted[row.evaluator] += 1
    return {name: count for name, count in counted.items() if count < least_controls(1)}


def control_scores(results: RunResults, headlines: Mapping[str, str]) -> dict[str, list[float]]:
    """Return what the run of a random-weight control came to: evaluator → scores, of every evaluator in `headlines`."""
    found: dict[str, list[float]] = {name: [] for name in headlines}
    for row in results.headlines(headlines):
        found[row.evaluator].append(row.value)
    return found


def too_few(controls: Controls) -> list[str]:
    """Return the evaluators that would decide types, and of which `controls` has fewer scores than a bar takes."""
    deciding = deciding_evaluators(controls)
    return [name for name in deciding if len(controls[name]) < least_controls(len(deciding))]
