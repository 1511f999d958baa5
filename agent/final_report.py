"""The final report of a run, for the end of its output and for `report.md`: where time and money went, what is missing, what next.

1. Wall time of each stage is summed over every process that worked on the run, from the event log: a stage that was broken off
   by a kill counts until the last sign of life. It goes back as far as the log, some thirty hours of it.
2. Calls and spending of each model are those of the account (`costs`).
3. The figures are those that the run has published, each beside its floors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from exegete.agent.events import Event, read_events
from exegete.agent.inspection import shown_time, store_status
from exegete.agent.run_facts import RunFacts, run_lines
from exegete.agent.vital_lines import duration
from exegete.tools.rendering import visible
from exegete.tools.store import connect

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What one model did for a run, or for several."""

    model: str
    answered: int
    failed: int
    """Not answered, or it is not known whether."""
    input_tokens: int
    output_tokens: int
    usd: float


def stage_seconds(events: Sequence[Event], runs: Sequence[str] | None = None) -> dict[str, float]:
    """Return stage → wall time in seconds, in the order in which they first began.

    `runs`: only of these, and of stages that belong to none yet (the activation pass); all where it is None.
    """
    spent: dict[str, float] = {}
    open_since: dict[str, datetime] = {}
    last: datetime | None = None
    for event in events:
        stage = event.fields.get("stage")
        if event.event == "begun" and last is not None:
            _close(spent, open_since, last)
        last = event.time
        if not isinstance(stage, str) or (runs is not None and event.run is not None and event.run not in runs):
            continue
        if event.event == "stage_begun":
            spent.setdefault(stage, 0.0)
            open_since[stage] = event.time
        elif event.event == "stage_ended":
            seconds = event.fields.get("seconds")
            spent[stage] = spent.get(stage, 0.0) + (float(seconds) if isinstance(seconds, int | float) else 0.0)
            open_since.pop(stage, None)
    if last is not None:
        _close(spent, open_since, last)
    return spent


def model_costs(connection: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> list[ModelCosts]:
    """Return what each model did for `runs`, the dearest first."""
    rows = connection.execute(
        """SELECT model, sum(answered), sum(failed + unknown), sum(input_tokens), sum(output_tokens), sum(usd)
        FROM costs WHERE list_contains(?, run) AND model IS NOT NULL GROUP BY model ORDER BY sum(usd) DESC, model""",
        [list(runs)],
    ).fetchall()
    return [
        ModelCosts(str(model), int(answered), int(failed), int(asked), int(written), float(usd))
        for model, answered, failed, asked, written, usd in rows
    ]


def time_and_money_lines(store: Path, runs: Sequence[str]) -> list[str]:
    """Return a line on the wall time of the stages of `runs`, and one a model on its calls and what they cost."""
    seconds = stage_seconds(list(read_events(store)), runs)
    with connect(store) as connection:
        costs = model_costs(connection, runs)
    told = ", ".join(f"{stage} {duration(spent)}" for stage, spent in seconds.items())
    return [visible(line) for line in ([f"time: {told}"] if told else []) + [_cost_line(cost) for cost in costs]]


def final_report(store: Path) -> str:
    """Return the report of the runs that the process which wrote `store` last has worked on, as Markdown.

    Raises:
        UserError: there is no store, or nothing was published yet.
    """
    status = store_status(store)
    runs = _of_last_session(store, status.runs)
    parts = ["# Report of the run", "", visible(status.need.line()), ""]
    for run in runs:
        parts += [f"## {visible(run.name)}", "", *_quoted(run_lines(run, going=False)[1:]), ""]
    money = time_and_money_lines(store, [run.run for run in runs])
    parts += ["## Time and money", "", *(_quoted(money) if money else ["    no stage and no call"]), ""]
    parts += [
        f'Snapshot of {shown_time(status.published_at)} UTC. Ask it anything: `exegete sql --store {visible(str(store))} "SHOW TABLES"`'
    ]
    return "\n".join(parts) + "\n"


def _of_last_session(store: Path, runs: Sequence[RunFacts]) -> list[RunFacts]:
    begun: set[str | None] = set()
    for event in read_events(store):
        if event.event == "begun":
            begun = set()
        elif event.event == "run_begun":
            begun.add(event.run)
    return [run for run in runs if run.run in begun]


def _close(spent: dict[str, float], open_since: dict[str, datetime], until: datetime) -> None:
    for stage, since in open_since.items():
        spent[stage] += max(0.0, (until - since).total_seconds())
    open_since.clear()


def _cost_line(cost: ModelCosts) -> str:
    return (
        f"{cost.model}: {cost.answered:,} calls answered, {cost.failed:,} not; "
        f"{cost.input_tokens:,} tokens in, {cost.output_tokens:,} out; {cost.usd:,.2f} USD"
    )


def _quoted(lines: Sequence[str]) -> list[str]:
    """Return lines as a block of code: what stands in them is no Markdown."""
    return [f"    {visible(line).removeprefix('  ')}" for line in lines]
