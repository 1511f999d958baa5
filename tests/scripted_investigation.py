"""An investigation without a model: an investigator that follows a script, tools that compute on their arguments alone.

What ran and what was asked is written to files.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import (
    Budget,
    Call,
    Case,
    Claim,
    Decision,
    Headline,
    Hypothesis,
    Metric,
    Outcome,
    Question,
    Verdict,
    View,
)
from exegete.agent.investigation.inquiry import Inquiry, Person
from exegete.agent.investigation.ledger import Ledger
from exegete.agent.investigation.passes import current
from exegete.agent.investigation.record import InvestigationRecord, to_json, write_whole
from exegete.agent.investigation.toolbelt import Tool, Toolbelt, make_tool
from exegete.tools.errors import ToolError

CASES = tuple(Case(f"prompt {number}", "yes", "no") for number in range(8))
CLAIM = Claim("latent 3 does it", "causal", (3,), experiments=("E3",), hypothesis="H1")
COSTS = 100
"""Forward passes of one `ablate`."""


def ablating(number: str, latents: Sequence[int], hypothesis: str = "H1", **bounds: float) -> Call:
    """Return a call of the experiment; its headline will be minus the sum of the latents."""
    return Call(number, "ablate", {"latents": list(latents), "hypothesis": hypothesis, "because": "so", **bounds})


SCRIPT: tuple[Decision, ...] = (
    Decision(
        (Call("1-0", "look", {"latent": 1}), ablating("1-1", [1], high=-0.5), ablating("1-2", [2], "H2", low=0.0)),
        (Hypothesis("H1", "latent 3 does it"), Hypothesis("H2", "latent 2 does it")),
        said=({"role": "assistant", "text": "first"},),
    ),
    Decision(
        (
            *(
                ablating("2-0", [1], high=-9.0),
                ablating("2-1", [4], "H9", low=0.0),
                Call("2-2", "look", {"latent": 99}),
            ),
            Call("2-3", "ablate", {"latents": [5]}),
        ),
        (Hypothesis("H2", "reworded", "rejected"),),
    ),
    Decision((ablating("3-0", [3], high=-2.0),), (Hypothesis("H1", "", "supported"),)),
    Decision(claims=(CLAIM,), answer="latent 3", done=True),
)


@dataclass
class Scripted:
    """Follows a script; says on a file which steps it was asked for."""

    folder: Path
    script: Sequence[Decision] = SCRIPT
    name: str = "recipe"
    views: list[View] = field(default_factory=list)

    async def frame(self, question: Question) -> Metric:
        """Propose a metric."""
        noted(self.folder, "asked", "frame")
        return Metric("log_odds")

    async def decide(self, view: View) -> Decision:
        """Return what the script says."""
        step = view.question.budget.steps - view.steps_left + 1
        noted(self.folder, "asked", str(step))
        self.views.append(view)
        return self.script[step - 1]


def noted(folder: Path, file: str, line: str) -> None:
    """Append a line, in one write."""
    with (folder / file).open("a") as opened:
        opened.write(f"{line}\n")


def lines(folder: Path, file: str) -> list[str]:
    """Return the lines written so far."""
    path = folder / file
    return path.read_text().splitlines() if path.exists() else []


def tools(folder: Path, together: threading.Barrier | None = None) -> dict[str, Tool]:
    """Return a lookup and an experiment that say on a file that they ran."""

    def look(bench: Bench, latent: int) -> Outcome:
        """Look at a latent.

        Args:
            latent: which.
        """
        noted(folder, "ran", f"look {latent}")
        if latent > 9:
            raise ToolError(f"there is no latent {latent}")
        return Outcome(f"a card of latent {latent}")

    def ablate(bench: Bench, latents: list[int]) -> Outcome:
        """Take latents out.

        Args:
            latents: which.
        """
        take(COSTS)
        noted(folder, "ran", f"ablate {latents}")
        if together is not None:
            together.wait()
        value = -float(sum(latents))
        return Outcome(
            f"it falls by {-value}", Headline("effect", value, value - 1, value + 1, 8), {"latents": latents}
        )

    return {"look": make_tool("lookup", look), "ablate": make_tool("experiment", ablate)}


def take(passes: int) -> None:
    """Count passes, as a shared model does."""
    count = current()
    assert count is not None
    count.take(passes)


class Measured:
    """Stands for a bench: what is measured before everything else costs ten passes."""

    def __init__(self) -> None:
        self.prompts = CASES
        self.measurable = SimpleNamespace(clean=0.0)

    @property
    def rates(self) -> float:
        """The first thing that costs something."""
        take(10)
        return 0.0


async def verified(
    bench: Bench, held_out: Sequence[Case], claims: Sequence[Claim], known: Collection[str]
) -> list[Verdict]:
    """Verify the claims that rest on experiments that are there, at 30 passes each."""
    take(30 * len(claims))
    return [
        Verdict(claim, "verified" if set(claim.experiments) <= set(known) else "unverified", f"of {len(held_out)}")
        for claim in claims
    ]


def reported(record: InvestigationRecord, folder: Path) -> Path:
    """Write what is the same however often it was interrupted."""
    return write_whole(folder / "report.md", to_json(timeless(record)))


def timeless(record: InvestigationRecord) -> InvestigationRecord:
    """Return a record without its times."""
    experiments = tuple(replace(one, predicted_at="", finished_at=None, seconds=0.0) for one in record.experiments)
    return replace(record, experiments=experiments, started_at="", finished_at=None)


def inquiry(
    folder: Path,
    *,
    script: Sequence[Decision] = SCRIPT,
    budget: Budget | None = None,
    person: Person | None = None,
    together: threading.Barrier | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Inquiry:
    """Return the investigation in a folder, begun or not."""
    ledger = Ledger(folder)
    ledger.begin(
        InvestigationRecord(
            id=folder.name,
            question="Why?",
            investigator="recipe",
            origin={},
            cases=CASES[:5],
            held_out=CASES[5:],
            metric=None,
            seed=0,
            code_version="1",
            started_at="2026-01-01",
            status="interrupted",
            budget=budget or Budget(steps=10),
        )
    )
    question = Question("Why?", CASES[:5], budget=ledger.begun().budget)
    found = Inquiry(
        ledger=ledger,
        investigator=Scripted(folder, script),
        question=question,
        held_out=CASES[5:],
        open_bench=lambda metric: cast(Bench, Measured()),
        open_toolbelt=lambda bench: Toolbelt(bench, tools(folder, together), recall=found.recall),
        verifier=verified,
        reporter=reported,
        stopping=stopping,
        interactive=person is not None,
    )
    return found


def run(folder: Path, person: Person | None = None, **more: Any) -> InvestigationRecord:
    """Run an investigation from where it is, and return its record."""
    import asyncio

    from exegete.agent.investigation.graph import investigated

    one = inquiry(folder, person=person, **more)
    try:
        asyncio.run(investigated(one, person))
        return one.ledger.record()
    finally:
        one.close()
        one.ledger.close()


def as_lines(record: InvestigationRecord) -> list[str]:
    """Return the record without its times, to be compared."""
    return json.dumps(json.loads(to_json(timeless(record))), indent=1, sort_keys=True).splitlines()
