"""Vital signs in words: the same facts for a terminal, a log, a notebook and `exegete status`."""

from __future__ import annotations

from collections.abc import Mapping

from exegete.agent.vitals import BudgetVitals, CallVitals, Mean, ScoreVitals, Snapshot, StageVitals

SLOW = 0.1
"""Fewer units a second are told by the minute."""


def facts(snapshot: Snapshot) -> list[str]:
    """Return calls, spending and running scores in a line each; what a run does not have is left out."""
    return [*work_lines(snapshot), *score_lines(snapshot.scores)]


def work_lines(snapshot: Snapshot) -> list[str]:
    """Return calls and spending in a line each; what a run does not have is left out."""
    return [line for line in (calls_text(snapshot.calls), spent_text(snapshot)) if line]


def stage_text(stage: StageVitals) -> str:
    """Return how far a stage is, its pace and what is left, for example `labeling: 120 of 400 latents, 2.0 a second, 2 minutes to go`."""
    return f"{stage.name}: {stage.done:,} of {stage.total:,} {stage.unit}{_pace(stage)}"


def calls_text(calls: CallVitals) -> str:
    """Return what became of calls to language models; empty where none was made."""
    failed = ", ".join(f"{count:,} {status}" for status, count in calls.failed.items())
    if not (calls.ok or calls.cached or calls.in_flight or failed):
        return ""
    cached = f", {calls.cached:,} from the journal" if calls.cached else ""
    tokens = f", {calls.input_tokens:,} tokens in and {calls.output_tokens:,} out" if calls.input_tokens else ""
    return f"calls: {calls.ok:,} answered{cached}, {calls.in_flight:,} in flight, failed: {failed or 'none'}{tokens}"


def spent_text(snapshot: Snapshot) -> str:
    """Return what has been spent beside the budget; without one, what this process has paid; empty where that is nothing."""
    budget = snapshot.budget
    if budget is None or (budget.max_usd is None and budget.max_tokens is None):
        return f"spent: {snapshot.calls.usd:,.2f} USD since this start, without a limit" if snapshot.calls.usd else ""
    limits = _limits(budget)
    return "spent: " + "; ".join(limits) if limits else ""


def score_lines(scores: Mapping[str, ScoreVitals]) -> list[str]:
    """Return a line an evaluator: its running mean with interval and n, beside the floors or the word that there are none yet."""
    return [
        f"{name}: mean {score.metric.replace('_', ' ')} {_mean(score.own)}; "
        + (
            ", ".join(f"{floor.replace('_', ' ')} {_mean(mean)}" for floor, mean in score.floors.items())
            or "floors come after labeling"
        )
        for name, score in scores.items()
    ]


def duration(seconds: float) -> str:
    """Return a span of time in its largest unit of which there are two, for example `95 seconds`, `14 hours`."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _pace(stage: StageVitals) -> str:
    pace = stage.minute_rate or stage.rate
    left = "" if stage.left_s is None else f", {duration(stage.left_s)} to go"
    told = f"{pace:,.1f} a second" if pace >= SLOW else f"{60 * pace:,.1f} a minute"
    return f", {told}{left}" if pace else ""


def _limits(budget: BudgetVitals) -> list[str]:
    """Return the limits that something has been spent of, or is about to be."""
    found = []
    if budget.max_usd is not None and (budget.spent_usd or budget.in_flight_usd):
        flying = f" (and at most {budget.in_flight_usd:,.2f} in flight)" if budget.in_flight_usd else ""
        found.append(f"{budget.spent_usd:,.2f} of {budget.max_usd:,.2f} USD{flying}")
    if budget.max_tokens is not None and (budget.spent_tokens or budget.in_flight_tokens):
        flying = f" (and at most {budget.in_flight_tokens:,} in flight)" if budget.in_flight_tokens else ""
        found.append(f"{budget.spent_tokens:,} of {budget.max_tokens:,.0f} tokens{flying}")
    return found


def _mean(mean: Mean) -> str:
    interval = "" if mean.low is None or mean.high is None else f" [{mean.low:.3f}, {mean.high:.3f}]"
    return f"{mean.mean:.3f}{interval} (n = {mean.n:,})"
