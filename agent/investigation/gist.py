"""What a report says first: what became of the claims, how much the dictionary leaves out, and how its figures are read."""

from __future__ import annotations

from collections.abc import Mapping

from exegete.agent.investigation.contract import Verdict
from exegete.agent.investigation.record import InvestigationRecord
from exegete.agent.investigation.wording import number, probability

READING = (
    "Intervals: of a figure, 95 % for its mean or share over n prompts (effects of claims: wider, so that they hold for all "
    "claims together); of a control, what 95 % of its n random draws reach."
)
"""How the tables of figures are read."""
NO_LABELS = "No label is known of these latents: this was asked without a store that has any (--store)."


def tally(record: InvestigationRecord) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the ids of the claims by their verdict, the verdicts in the order in which claims first have them.

    For example `(("verified", ("C1", "C3")), ("failed", ("C2",)))`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for at, one in enumerate(record.verdicts, 1):
        found[one.status] = (*found.get(one.status, ()), f"C{at}")
    return tuple(found.items())


def outside(record: InvestigationRecord) -> str:
    """Return what the first attribution says of the dictionary's error; empty where there is none.

    The error stays in place in every intervention on latents: what it carries, no experiment here can take away.
    """
    for one in record.experiments:
        share = _estimate(one.facts.get("error_share"))
        if not share:
            continue
        said = f"{share} of the size of all attributions is its error's ({one.id}), which no intervention changes"
        alone = one.facts.get("error_total")
        if isinstance(alone, Mapping) and (lost := _estimate(alone.get("exact"))):
            said += f"; with the error alone at zero the metric loses {lost}"
        return said
    return ""


def _estimate(found: object) -> str:
    """Return an estimate as a record holds it, with its interval; empty for anything else."""
    if not isinstance(found, Mapping):
        return ""
    value, low, high = (found.get(name) for name in ("value", "low", "high"))
    if not isinstance(value, int | float):
        return ""
    known = isinstance(low, int | float) and isinstance(high, int | float)
    return number(value) + (f" [{number(low)}, {number(high)}]" if known else "")


def p_value(verdict: Verdict) -> str:
    """Return a claim's p-value, and whether it is the smallest that so many random sets allow."""
    controls = verdict.effect.control_n if verdict.effect is not None else 0
    least = verdict.p is not None and controls > 0 and abs(verdict.p - 1 / (controls + 1)) < 1e-9
    return probability(verdict.p) + (f" (the smallest that {controls:,} random sets allow)" if least else "")
