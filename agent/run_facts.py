"""What the published snapshot says of the runs of a store: how far each is, what its calls came to, and its newest figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exegete.agent.summary import headline
from exegete.tools.rendering import visible

if TYPE_CHECKING:
    import duckdb

ROLES = ("explainer", "judge", "scorer", "embedder")


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What became of the calls of runs to language models, and what they cost."""

    calls: int
    answered: int
    """With a reply, usable or not."""
    failed: int
    unknown: int
    """That may have been billed, and whose reply was never seen."""
    in_flight: int
    """Without a reply when this was published."""
    usd: float
    unknown_worst_usd: float
    most_often: str | None
    """The most frequent detail of failed calls."""


@dataclass(frozen=True, slots=True)
class MeanFacts:
    """Mean balanced accuracy of one evaluator so far, with its normal interval."""

    evaluator: str
    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run."""

    run: str
    dictionary: str
    name: str
    """Of the dictionary, as the user gave it."""
    control: bool
    """Whether it is over latents of a random-weight control."""
    status: str
    """`running`, `interrupted` or `finished`."""
    seed: int
    code_version: str
    explainer: str
    """Its name; the rungs of a cascade, with arrows between."""
    judge: str
    models: Mapping[str, str]
    """Role → language model."""
    latents: int
    """To be labeled."""
    outcomes: Mapping[str, int]
    """Outcome → latents recorded so far."""
    floors: Mapping[str, int]
    """Floor → latents on which it is scored."""
    floors_asked: int | None
    calls: CallFacts | None
    """None where it made no calls."""
    missing: int
    """Latents about which calls failed for good and have not been asked again since."""
    figures: Mapping[str, Any] | None
    """As `exegete.agent.summary.summarise`; None while it goes on."""
    means: Sequence[MeanFacts]
    """Where there are no figures yet."""


def run_facts(connection: duckdb.DuckDBPyConnection, pid: int | None) -> list[RunFacts]:
    """Return the runs behind `connection`, the one begun last first; `pid`: the process that is writing the store."""
    return [_facts(connection, row, pid) for row in connection.execute(_RUNS).fetchall()]


def call_facts(connection: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> CallFacts | None:
    """Return what the calls of `runs` came to; None where they made none."""
    [(calls, answered, failed, unknown, in_flight, usd, unknown_worst_usd)] = connection.execute(
        """SELECT sum(calls), sum(answered), sum(failed), sum(unknown), sum(in_flight), sum(usd), sum(unknown_worst_usd)
        FROM costs WHERE list_contains(?, run)""",
        [runs],
    ).fetchall()
    if not calls:
        return None
    why = _why(connection, runs) if failed else None
    return CallFacts(int(calls), int(answered), int(failed), int(unknown), int(in_flight), usd, unknown_worst_usd, why)


def run_lines(facts: RunFacts, going: bool) -> list[str]:
    """Return a run as lines for a terminal; `going`: a process is writing the store."""
    lines = [
        f"{visible(facts.name)}: {facts.status}",
        f"  run {facts.run[:19]} · dictionary {facts.dictionary[:19]} · seed {facts.seed} · exegete {facts.code_version}"
        f" · explainer {facts.explainer}, judge {facts.judge}",
        *([f"  models: {models_text(facts.models)}"] if facts.models else []),
        _progress_line(facts),
        *([] if facts.control else [_floors_line(facts)]),
        *([f"  {calls_line(facts.calls, going)}"] if facts.calls else []),
    ]
    if facts.missing:
        lines.append(f"  {facts.missing:,} latents miss calls that failed; `exegete resume` asks them again")
    if facts.figures is not None:
        return [*lines, *(f"  {line}" for line in headline(dict(facts.figures)))]
    return [*lines, *map(_mean_line, facts.means)]


def calls_line(facts: CallFacts, going: bool) -> str:
    """Return calls and their cost as one line; `going`: more may come."""
    why = f" (most often: {facts.most_often})" if facts.most_often else ""
    counts = f"{facts.answered:,} answered, {facts.failed:,} failed{why}, {facts.unknown:,} unknown"
    if facts.in_flight:
        counts += f", {facts.in_flight:,} in flight" + ("" if going else " when it ended")
    at_most = f", and at most {facts.unknown_worst_usd:,.2f} USD for the unknown" if facts.unknown_worst_usd else ""
    return f"calls: {counts}; {facts.usd:,.2f} USD{at_most}"


def explainer_of(config: Mapping[str, Any]) -> str:
    """Return who explains by a stored configuration: the rungs of its cascade, or its one explainer."""
    rungs = (config.get("cascade") or {}).get("rungs") or ()
    return " → ".join(rungs) or str((config.get("label") or {}).get("explainer", "unknown"))


def models_text(models: Mapping[str, str]) -> str:
    """Return language models with what they do, each once: `explainer and judge openai:gpt-5-mini`."""
    roles: dict[str, list[str]] = {}
    for role, model in models.items():
        roles.setdefault(model, []).append(role)
    return ", ".join(f"{' and '.join(held)} {model}" for model, held in roles.items())


_RUNS = """
SELECT r.run, r.dictionary, d.name, coalesce(d.evidence LIKE 'controls/%', false), d.latents, r.status, r.seed,
       r.code_version, r.config, r.figures
FROM runs r LEFT JOIN data.dictionaries d USING (dictionary) ORDER BY r.started_at DESC, r.run
"""


def _facts(connection: duckdb.DuckDBPyConnection, row: tuple[Any, ...], pid: int | None) -> RunFacts:
    run, dictionary, name, control, latents, status, seed, code_version, config_text, figures = row
    if status == "running" and pid is None:
        status = "interrupted"  # Its process ended without a word: killed, or the machine went down.
    config = json.loads(config_text)
    label, models = config.get("label", {}), config.get("models", {})
    asked = label.get("random_control" if control else "limit")
    return RunFacts(
        run=run,
        dictionary=dictionary,
        name=name or dictionary,
        control=control,
        status=status,
        seed=seed,
        code_version=code_version,
        explainer=explainer_of(config),
        judge=label.get("judge", "unknown"),
        models={role: models[role] for role in ROLES if models.get(role)},
        latents=min(latents or 0, asked or latents or 0),
        outcomes=_outcomes(connection, run),
        floors=_floors(connection, run),
        floors_asked=label.get("floors"),
        calls=call_facts(connection, [run]),
        missing=_missing(connection, run),
        figures=None if figures is None else json.loads(figures),
        means=_means(connection, run) if figures is None else [],
    )


def _outcomes(connection: duckdb.DuckDBPyConnection, run: str) -> dict[str, int]:
    query = "SELECT status, count(*) FROM data.results WHERE run = ? GROUP BY ALL ORDER BY ALL"
    return dict(connection.execute(query, [run]).fetchall())


def _floors(connection: duckdb.DuckDBPyConnection, run: str) -> dict[str, int]:
    query = """SELECT baseline, count(DISTINCT latent) FROM scores
        WHERE run = ? AND baseline IS NOT NULL GROUP BY ALL ORDER BY ALL"""
    return dict(connection.execute(query, [run]).fetchall())


def _why(connection: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> str | None:
    found = connection.execute(
        """SELECT detail FROM calls WHERE list_contains(?, run) AND status IN ('error', 'rejected') AND detail IS NOT NULL
        GROUP BY detail ORDER BY count(*) DESC, detail LIMIT 1""",
        [runs],
    ).fetchone()
    return str(found[0]) if found else None


def _missing(connection: duckdb.DuckDBPyConnection, run: str) -> int:
    import duckdb

    query = """SELECT count(DISTINCT latent) FROM (
        SELECT run, latent, missing_calls FROM data.results UNION ALL SELECT run, latent, missing_calls FROM data.floors
    ) WHERE run = ? AND missing_calls > 0"""
    try:
        [(latents,)] = connection.execute(query, [run]).fetchall()
    except (duckdb.BinderException, duckdb.CatalogException):  # Published by a version that did not count them.
        return 0
    return int(latents)


def _means(connection: duckdb.DuckDBPyConnection, run: str) -> list[MeanFacts]:
    rows = connection.execute(
        """SELECT evaluator, avg(value), 1.96 * stddev_samp(value) / sqrt(count(value)), count(value) FROM data.scores
        WHERE run = ? AND baseline IS NULL AND metric = 'balanced_accuracy' AND value IS NOT NULL
        GROUP BY evaluator ORDER BY evaluator""",
        [run],
    ).fetchall()
    return [
        MeanFacts(evaluator, mean, None if half is None else mean - half, None if half is None else mean + half, n)
        for evaluator, mean, half, n in rows
    ]


def _progress_line(facts: RunFacts) -> str:
    done = sum(facts.outcomes.values())
    share = f" ({done / facts.latents:.0%})" if facts.latents else ""
    by_outcome = ", ".join(f"{count:,} {outcome}" for outcome, count in facts.outcomes.items())
    return f"  {done:,} of {facts.latents:,} latents recorded{share}" + (f": {by_outcome}" if by_outcome else "")


def _floors_line(facts: RunFacts) -> str:
    told = ", ".join(f"{baseline} on {count:,} latents" for baseline, count in facts.floors.items())
    asked = "" if facts.floors_asked is None else f" ({facts.floors_asked:,} asked for)"
    return f"  floors: {told or 'none yet'}{asked}"


def _mean_line(facts: MeanFacts) -> str:
    interval = "" if facts.low is None or facts.high is None else f" [{facts.low:.3f}, {facts.high:.3f}]"
    return f"  so far, {facts.evaluator}: mean balanced accuracy {facts.mean:.3f}{interval} (n = {facts.n:,}, normal interval)"
