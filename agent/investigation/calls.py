"""The calls of a decision, sorted: which run, which were made before, and what is predicted of them.

A call was made before where its tool and arguments are the same and it went well, whatever was predicted of it: what is known cannot
be predicted any more. One that went wrong was made before only where the prediction is the same as well, since a missing one may
have been the reason. One that was refused since passes had run out may be made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exegete.agent.investigation.contract import Call, Outcome, Prediction, Result
from exegete.agent.investigation.ledger import Finished
from exegete.tools.errors import ToolError

Check = Callable[[Call], tuple[Any, dict[str, Any], Prediction | None]]
"""As `Toolbelt.checked`."""
NO_PASSES = {"refused": "passes"}
"""Facts of what was refused since no forward passes were left."""


@dataclass(frozen=True)
class Planned:
    """One call of a decision."""

    call: Call
    prediction: Prediction | None
    """None where it is no experiment, or none that can run."""
    repeats: str = ""
    """Id of the call whose result it is given; empty where it runs."""


def planned(calls: Sequence[Call], earlier: Sequence[Finished], check: Check) -> list[Planned]:
    """Return the calls of a decision in their order.

    Args:
        calls: of the decision.
        earlier: calls of decisions before it.
        check: says what a call's arguments and prediction are.
    """
    known: dict[str, str] = {}
    for one in earlier:
        if not one.repeats and not refused_for_passes(one.result):
            meant = _meant(one.result.call, check)[0] if one.result.status == "ok" else None
            known |= dict.fromkeys(filter(None, (meant, _written(one.result.call))), one.result.call.id)
    found = []
    for call in calls:
        meant, prediction = _meant(call, check)
        names = [name for name in (meant, _written(call)) if name is not None]
        repeats = next((known[name] for name in names if name in known), "")
        known |= {name: repeats or call.id for name in names}
        found.append(Planned(call, prediction, repeats))
    return found


def again(call: Call, former: Result) -> Result:
    """Return the result of a call that was made before."""
    name = former.experiment or "an earlier step"
    told = f"The same call was made before, in {name}; it is not run again. What it gave then:\n{former.outcome.text}"
    return Result(call, former.status, Outcome(told, former.outcome.headline))


def refused(result: Result) -> Result:
    """Return the result of a call for which no passes were left."""
    return Result(result.call, "refused", Outcome(result.outcome.text, facts=NO_PASSES))


def refused_for_passes(result: Result) -> bool:
    """Return whether a call was refused since no forward passes were left."""
    return result.status == "refused" and dict(result.outcome.facts) == NO_PASSES


def _meant(call: Call, check: Check) -> tuple[str | None, Prediction | None]:
    try:
        _, arguments, prediction = check(call)
    except ToolError:
        return None, None
    return f"meant {call.tool} {_canonical(arguments)}", prediction


def _written(call: Call) -> str:
    return f"written {call.tool} {_canonical(call.arguments)}"


def _canonical(arguments: Any) -> str:
    return json.dumps(arguments, sort_keys=True, default=repr)
