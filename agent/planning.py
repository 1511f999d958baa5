"""What a run would do, said before it does anything."""

from __future__ import annotations

from pathlib import Path

from exegete.agent.config import RunConfig
from exegete.agent.workbench import check_workbench
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence


def plan(config: RunConfig) -> list[str]:
    """Return the plan of a run as lines, after checking every name that can be checked without loading a model.

    Raises:
        UserError: an explainer, judge or evaluator is unknown, or there is nothing to label.
    """
    check_workbench(config)
    return [
        f"store: {config.store}",
        *_source(config),
        f"explainer: {config.label.explainer}; judge: {config.label.judge}; scores: {', '.join(config.label.evaluators)}",
        f"latents: {config.label.limit or 'all'}; floors on {config.label.floors}",
        *_control(config),
        *_models(config),
    ]


def _control(config: RunConfig) -> list[str]:
    count = config.label.random_control
    return [f"random-weight control: {count} latents, after a second pass"] if count else []


def _models(config: RunConfig) -> list[str]:
    models = config.models
    named = {"explainer": models.explainer, "judge": models.judge, "scorer": models.scorer}
    asked = [f"{role} {spec}" for role, spec in named.items() if spec]
    if not asked:
        return ["cost: 0 calls, 0.00 USD (no language model takes part)"]
    budget = "none" if models.budget_usd is None else f"{models.budget_usd:.2f} USD"
    return [f"language models: {', '.join(asked)}; budget: {budget}"]


def _source(config: RunConfig) -> list[str]:
    if config.subject and config.dictionary and config.corpus:
        return [f"pass: {config.subject.name}, {config.dictionary.path} over {config.corpus.source}"]
    markers = sorted(Path(config.store).glob("evidence/*/evidence.json"))
    if not markers:
        raise UserError(f"nothing to label: no [subject], [dictionary], [corpus], and no evidence in {config.store!r}")
    found = [Evidence.open(marker.parent) for marker in markers]
    return [f"evidence in the store: {own.dictionary[:23]}…, {len(own.statuses):,} latents" for own in found]
