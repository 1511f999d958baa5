"""What a report says in words: figures beside their controls, metrics, predictions, what was spent.

Everything here is text without any mark-up; whoever lays it out escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exegete.agent.investigation.contract import Claim, Headline, Metric, Prediction
from exegete.agent.investigation.record import InvestigationRecord
from exegete.evaluators.statistics import wilson
from exegete.tools.rendering import visible_json


@dataclass(frozen=True)
class Figure:
    """One figure beside its control, in words."""

    name: str
    value: str
    interval: str
    n: str
    control: str = ""
    """Empty where there is none."""
    control_value: str = ""
    control_interval: str = ""
    control_n: str = ""


def hit_rate(record: InvestigationRecord) -> str:
    """Return how many predictions held, for example `3 of 4 (75 %, 95 % interval 30 % to 95 %)`, beside how many controls met."""
    hits, n = record.hits
    if not n:
        return "none could be held against a figure"
    low, high = wilson(hits, n)
    held = f"{hits} of {n} ({_percent(hits / n)}, 95 % interval {_percent(low)} to {_percent(high)})"
    met, of = record.hits_of_controls
    return f"{held}; the controls' own figures would have met {met} of {of}" if of else held


def number(value: float | None) -> str:
    """Return a figure with three significant digits, a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.3g}"


def figure(headline: Headline) -> Figure:
    """Return a headline in words."""
    h = headline
    own = Figure(h.name, number(h.value), _interval(h.low, h.high), f"{h.n:,}")
    if not h.control:
        return own
    control = (h.control, number(h.control_value), _interval(h.control_low, h.control_high), f"{h.control_n:,}")
    return replace(
        own, **dict(zip(("control", "control_value", "control_interval", "control_n"), control, strict=True))
    )


def measured(metric: Metric | None) -> str:
    """Return what a metric measures, in a sentence."""
    if metric is None:
        return "it ended before that was settled"
    answer = f"of {metric.answer!r}" if metric.answer else "of each prompt's answer"
    other = f"that of {metric.other!r}" if metric.other else "that of its other token"
    return {
        "log_odds": f"logit {answer} less {other}, in logits; shown above 0",
        "log_probability": f"natural logarithm of the probability {answer}, in nats; shown above log ½",
        "judged": f"share of {metric.samples} sampled continuations that meet {metric.criterion!r}; shown above one half",
    }[metric.kind]


def predicted(prediction: Prediction) -> str:
    """Return where a figure was predicted to lie."""
    if prediction.low is None:
        return f"at most {number(prediction.high)}"
    if prediction.high is None:
        return f"at least {number(prediction.low)}"
    return f"from {number(prediction.low)} to {number(prediction.high)}"


def who(record: InvestigationRecord) -> str:
    """Return who investigated, and whether that is a language model."""
    if not record.by_model:
        return "recipe: a fixed protocol, no language model"
    what = "a language model" if ":" in record.investigator else "an investigator that was given"
    return f"{record.investigator}: {what}, which chose the experiments and wrote what is marked as its words"


def whose(record: InvestigationRecord) -> str:
    """Return what marks the investigator's texts; empty for the recipe's, which are ours."""
    if not record.by_model:
        return ""
    return "the model’s words" if ":" in record.investigator else "the investigator’s words"


def ended(record: InvestigationRecord) -> str:
    """Return why an investigation ended early; an empty text where it did not."""
    if record.status == "finished" and not record.stopped:
        return ""
    what = {"interrupted": "It was interrupted", "budget": "Its budget was used up", "finished": "It was stopped"}
    why = f" ({record.stopped})" if record.stopped else ""
    return f"{what[record.status]}{why}: what was not done by then is not in this report."


def facts(record: InvestigationRecord) -> Iterable[tuple[str, str]]:
    """Yield what the head of a report says: who investigated what, how it was measured, what was spent."""
    origin = record.origin
    yield "Investigated by", who(record)
    yield "Subject", f"{origin.get('subject', 'unknown')}"
    yield "Dictionary", f"{origin.get('dictionary', 'unknown')} at {origin.get('hook_point', 'unknown')}"
    yield "Fingerprint", f"{origin.get('fingerprint', 'unknown')}"
    yield "Measured by", measured(record.metric)
    if record.judge:
        yield "Judge", record.judge
    if record.suggested:
        yield "Suggested cause", record.suggested
    yield "Prompts", f"{len(record.cases):,} to search on; {len(record.held_out):,} held out, for checking claims alone"
    yield "Spent", "; ".join(_spent(record))
    if record.lookups:
        yield "Looked up", _times(record.lookups)
    if record.failed:
        yield "Not done as asked", _times(record.failed)
    for note in record.notes:
        yield "Told meanwhile", note
    yield "Seed", str(record.seed)
    yield "Code version", f"exegete {record.code_version}"
    yield "Time", record.started_at + (f" to {record.finished_at}" if record.finished_at else "")
    yield "Investigation", record.id


def says(claim: Claim) -> str:
    """Return what a claim says of its latents: by which intervention the metric changes in which way."""
    if claim.kind == "correlational":
        return "correlational"
    done = {
        "ablate": "setting them to zero",
        "interchange": "giving them their activations on each prompt's variant",
        "steer": "turning them up to a fixed KL",
    }[claim.intervention]
    flips = (
        ""
        if not claim.flips
        else ", and on most prompts the behaviour " + ("goes" if claim.expects == "falls" else "comes")
    )
    return f"causal: by {done} the metric {claim.expects}{flips}"


def probability(p: float | None) -> str:
    """Return a p-value, a dash where there is none."""
    return "–" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def as_json(value: Any) -> str:
    """Return a plain value as JSON text for people, one line where it is short."""
    short = json.dumps(value, ensure_ascii=False)
    return visible_json(short if len(short) <= 100 else json.dumps(value, ensure_ascii=False, indent=1))


def _interval(low: float | None, high: float | None) -> str:
    return "no interval" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _spent(record: InvestigationRecord) -> Iterable[str]:
    spent, budget = record.spent, record.budget
    yield f"{spent.steps:,} of {budget.steps:,} steps"
    yield f"{spent.passes:,}{_of(budget.passes)} forward passes"
    if not spent.calls:
        yield "no call to a language model"
        return
    yield f"{spent.calls:,} calls to language models"
    yield f"{spent.tokens:,}{_of(budget.tokens)} tokens"
    yield f"${spent.usd:,.2f}" + ("" if budget.usd is None else f" of ${budget.usd:,.2f}")


def _times(used: Mapping[str, int]) -> str:
    return ", ".join(f"{tool} ×{times}" for tool, times in used.items())


def _of(most: int | None) -> str:
    return "" if most is None else f" of {most:,}"
