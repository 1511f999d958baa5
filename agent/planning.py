"""What a run would do, said before it does anything."""

from __future__ import annotations

from pathlib import Path

from exegete.agent.config import RunConfig
from exegete.evaluators import make_evaluator, make_judge
from exegete.tools.errors import UserError
from exegete.tools.evidence import Evidence
from exegete.tools.explainers import make_explainer


def plan(config: RunConfig) -> list[str]:
    """Return the plan of a run as lines, after checking every name that can be checked without loading a model.

    Raises:
        UserError: an explainer, judge or evaluator is unknown, or there is nothing to label.
    """
    make_explainer(config.label.explainer)
    make_judge(config.label.judge)
    for name in config.label.evaluators:
        make_evaluator(name)
    return [
        f"store: {config.store}",
        *_source(config),
        f"explainer: {config.label.explainer}; judge: {config.label.judge}; scores: {', '.join(config.label.evaluators)}",
        f"latents: {config.label.limit or 'all'}; floors on {config.label.floors}",
        "cost: 0 calls, 0.00 USD (no language model takes part)",
    ]


def _source(config: RunConfig) -> list[str]:
    if config.subject and config.dictionary and config.corpus:
        return [f"pass: {config.subject.name}, {config.dictionary.path} over {config.corpus.source}"]
    markers = sorted(Path(config.store).glob("evidence/*/evidence.json"))
    if not markers:
        raise UserError(f"nothing to label: no [subject], [dictionary], [corpus], and no evidence in {config.store!r}")
    found = [Evidence.open(marker.parent) for marker in markers]
    return [f"evidence in the store: {own.dictionary[:23]}…, {len(own.statuses):,} latents" for own in found]
