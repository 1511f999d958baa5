"""What an investigation says while it goes on, a line each. Who shows them makes untrusted text visible."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from exegete.agent.investigation.contract import Decision, Headline, Hypothesis, Result, Verdict

_MOST = 160
"""Characters of a text that somebody wrote."""


def decided_lines(decision: Decision, known: Collection[Hypothesis] = ()) -> Iterator[str]:
    """Yield the hypotheses of a decision that are new or no longer as they were `known`, and how many claims it ends with."""
    for hypothesis in decision.hypotheses:
        if hypothesis in known:
            continue
        status = "" if hypothesis.status == "open" else f" ({hypothesis.status})"
        yield f"{hypothesis.id}{status}: {_short(hypothesis.statement)}"
    if decision.done:
        yield f"done: {sum(not claim.withdrawn for claim in decision.claims)} claims to verify"


def result_line(result: Result) -> str:
    """Return what became of a call."""
    name = f"{result.experiment} {result.call.tool}".strip()
    headline = result.outcome.headline
    if result.status != "ok" or headline is None:
        return f"{name}: {result.status}; {_short(result.outcome.text)}" if result.status != "ok" else f"{name}: done"
    predicted = {True: "; as predicted", False: "; not as predicted", None: ""}[result.predicted]
    return f"{name}: {figure(headline)}{predicted}"


def verdict_line(verdict: Verdict) -> str:
    """Return what became of a claim."""
    effect = "" if verdict.effect is None else f"; {figure(verdict.effect)}"
    return f"claim {verdict.status}: {_short(verdict.claim.statement)}{effect}"


def figure(headline: Headline) -> str:
    """Return a figure with its interval and n, beside its control."""
    own = f"{headline.name} {_number(headline.value)}{_interval(headline.low, headline.high)}, n = {headline.n}"
    if not headline.control:
        return own
    beside = f"{_number(headline.control_value)}{_interval(headline.control_low, headline.control_high)}"
    return f"{own}; beside {headline.control}: {beside}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST else f"{line[: _MOST - 1]}…"
