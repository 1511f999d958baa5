"""`exegete report`: one self-contained HTML page, a section a dictionary.

1. Figures and plots are aggregated in SQL from the published snapshot (`report_figures`); cards of the best and worst
   latents come from `latent_cards`.
2. The template `report.html.j2` lays them out with automatic escaping: explanations and corpus text are untrusted.
3. The page has no script and forbids any by its content security policy; it loads nothing.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.inspection import writer_pid
from exegete.agent.latent_cards import LatentCard, read_cards
from exegete.agent.plots import Plot
from exegete.agent.report_figures import (
    Figure,
    Source,
    agreement_plots,
    density_plots,
    extremes,
    headline,
    other_metrics,
    score_plots,
)
from exegete.agent.run_facts import explainer_of
from exegete.evaluators.baselines import BASELINES
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible
from exegete.tools.store import connect

if TYPE_CHECKING:
    import duckdb

EXTREMES = 10
TRACK_LOW, TRACK_HIGH = 0.4, 1.0
"""Balanced accuracies at the ends of the little interval bars."""

_EXPLAINERS = {
    "lexical": "Explanations were written by the lexical explainer: statistics of tokens and their contexts, no language model.",
    "token_list": "Explanations are lists of the tokens each latent fires on; no language model wrote them.",
    "given": "Explanations came with the imported evidence and were scored as they stand; this run wrote none.",
}
_TYPE = "coalesce(typed, CASE WHEN outcome <> 'labeled' THEN outcome END, 'not typed')"
_PREDICATE_JUDGE = (
    "Scores were computed by the predicate judge, which executes each explanation's predicate on the windows: "
    "no language model judged."
)
_OFFLINE = (
    "This is the offline baseline, the floor that a language model has to beat; "
    "it does not stand for what one would reach."
)


@dataclass(frozen=True)
class Section:
    """What the page says of one dictionary."""

    anchor: str
    name: str
    facts: tuple[tuple[str, str], ...]
    notices: tuple[str, ...]
    outcomes: tuple[tuple[str, int], ...] = ()
    types: tuple[tuple[str, int], ...] = ()
    headline: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[tuple[str, str, Figure]] = ()
    plots: Sequence[Plot] = ()
    best: Sequence[LatentCard] = ()
    worst: Sequence[LatentCard] = ()


def write_report(store: Path, output: Path) -> Path:
    """Write the report of what `store` has published to `output`, whole or not at all; return `output`.

    Raises:
        UserError: there is no store, nothing was published, or `output` cannot be written.
    """
    with connect(store) as connection:
        page = _page(connection, store)
    temporary = output.with_name(f".{output.name}.writing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        if output.parent.is_dir():
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # The command line has its own word for a full disk.
        raise UserError(f"cannot write the report to {str(output)!r} ({error.strerror}); name another file") from error
    return output


def _page(connection: duckdb.DuckDBPyConnection, store: Path) -> str:
    from jinja2 import Environment, StrictUndefined

    published, version = connection.execute("SELECT published_at, code_version FROM snapshot").fetchall()[0]
    known = connection.execute(
        "SELECT dictionary, name, subject, hook_point, latents FROM dictionaries ORDER BY name, dictionary"
    )
    pid = writer_pid(store)
    sections = [_section(connection, store, row, pid) for row in known.fetchall()]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "track": track}
    template = environment.from_string(files("exegete.agent").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(sections=sections, published=_time(published), version=version, extremes=EXTREMES)


def _section(
    connection: duckdb.DuckDBPyConnection,
    store: Path,
    row: tuple[str, str, str | None, str | None, int],
    pid: int | None,
) -> Section:
    dictionary, name, subject, hook_point, latents = row
    about = [("Dictionary", f"{name} ({latents:,} latents)"), ("Fingerprint", dictionary)]
    about += [
        ("Subject", subject or "unknown: imported evidence"),
        ("Hook point", hook_point or "unknown: imported evidence"),
    ]
    run = _run(connection, dictionary)
    anchor = f"d{dictionary.removeprefix('sha256:')[:12]}"
    outcomes = _counts(connection, "coalesce(outcome, 'not reached')", dictionary)
    if run is None:
        source = Source(connection, dictionary, "")
        notice = "Nothing of this dictionary has been labeled yet: there are no explanations and no scores to show."
        return Section(anchor, visible(name), _clean(about), (notice,), outcomes, plots=density_plots(source))
    source = Source(connection, dictionary, run["run"])
    found = headline(source, run["figures"])
    best, worst = (extremes(source, EXTREMES, first) for first in (True, False))
    worst = [latent for latent in worst if latent not in best]
    cards = {card.latent: card for card in read_cards(connection, store, dictionary, [*best, *worst], run["run"])}
    notices = _notices(run, found, pid)
    if best and not cards:
        notices.append("The evidence of this dictionary is no longer in the store: its windows cannot be shown.")
    plots = [plot for evaluator in source.evaluators() for plot in score_plots(source, evaluator)]
    return Section(
        anchor,
        visible(name),
        _clean([*about, *_run_facts(connection, dictionary, run)]),
        tuple(notices),
        outcomes,
        _counts(connection, _TYPE, dictionary),
        found,
        other_metrics(source),
        [*plots, *density_plots(source), *agreement_plots(source)],
        [cards[latent] for latent in best if latent in cards],
        [cards[latent] for latent in worst if latent in cards],
    )


def _run(connection: duckdb.DuckDBPyConnection, dictionary: str) -> dict[str, Any] | None:
    """Return the newest run of a dictionary that has scored something, else the newest, else None."""
    columns = ("run", "status", "seed", "code_version", "config", "figures", "started_at", "finished_at")
    row = connection.execute(
        f"""SELECT {", ".join(columns)}, (SELECT count(*) FROM runs WHERE dictionary = r.dictionary) FROM runs r
        WHERE dictionary = ? ORDER BY run IN (SELECT run FROM scores) DESC, started_at DESC, run LIMIT 1""",
        [dictionary],
    ).fetchone()
    if row is None:
        return None
    run = dict(zip((*columns, "runs"), row, strict=True))
    return run | {"config": json.loads(run["config"])}


def _beside(figures: Any) -> list[tuple[str, str]]:
    """Return how the agent of a cascade stands beside best-of-N, where there was one."""
    from exegete.agent.cascade_summary import beside_lines

    figures = json.loads(figures) if isinstance(figures, str) else figures or {}
    lines = beside_lines((figures.get("cascade") or {}).get("beside_best_of"))
    return [("Agent or best-of-N", "; ".join(line.strip() for line in lines))] if lines else []


def _run_facts(connection: duckdb.DuckDBPyConnection, dictionary: str, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, label = run["config"], run["config"].get("label") or {}
    corpus = (config.get("corpus") or {}).get("source") or "imported evidence"
    tokens, calls, usd = connection.execute(
        """SELECT (SELECT max(tokens) FROM latents WHERE dictionary = ?),
           (SELECT sum(calls) FROM costs WHERE run = ?), (SELECT sum(usd) FROM costs WHERE run = ?)""",
        [dictionary, run["run"], run["run"]],
    ).fetchall()[0]
    times = _time(run["started_at"]) + (f" to {_time(run['finished_at'])}" if run["finished_at"] else "")
    return [
        ("Corpus", corpus + (f" ({tokens:,} tokens)" if tokens else "")),
        ("Explainer", f"{explainer_of(config)}{_models(connection, run['run'])}"),
        ("Judge", str(label.get("judge", "unknown"))),
        *_beside(run["figures"]),
        ("Language model calls", f"{calls:,} (${usd:,.2f})" if calls else "none"),
        (
            "Run",
            f"{run['run']} ({run['status']}"
            + (f"; one of {run['runs']} runs of this dictionary)" if run["runs"] > 1 else ")"),
        ),
        ("Seed", str(run["seed"])),
        ("Code version", f"exegete {run['code_version']}"),
        ("Time", times),
    ]


def _models(connection: duckdb.DuckDBPyConnection, run: str) -> str:
    rows = connection.execute(
        """SELECT DISTINCT model FROM explanations WHERE model IS NOT NULL
        AND explanation_id IN (SELECT explanation_id FROM scores WHERE run = ?) ORDER BY model""",
        [run],
    ).fetchall()
    return f" with {', '.join(model for (model,) in rows)}" if rows else ""


def _notices(run: Mapping[str, Any], found: Mapping[str, Any], pid: int | None) -> list[str]:
    label = run["config"].get("label") or {}
    explainer, judge = explainer_of(run["config"]), label.get("judge")
    parts = [_EXPLAINERS.get(explainer, ""), _PREDICATE_JUDGE if judge == "predicate" else ""]
    if explainer in _EXPLAINERS and judge == "predicate":
        parts.append(_OFFLINE)
    notices = [" ".join(filter(None, parts))] if any(parts) else []
    if run["status"] != "finished":
        state = (
            "is still going on"
            if run["status"] == "running" and pid
            else "was interrupted; `exegete resume` goes on with it"
        )
        notices.append(
            f"This run {state}. Figures are of what it has recorded so far, with normal intervals over latents."
        )
    if not found:
        notices.append("This run has scored nothing yet.")
    return notices + _missing_floors(found)


def _missing_floors(found: Mapping[str, Any]) -> list[str]:
    """Say which evaluators lack which floors: a headline without its floor is none (PROTOCOLS §11)."""
    bare = [name for name, figures in found.items() if not figures["floors"]]
    lines = (
        [f"No floors were scored for {' and '.join(bare)}: without them these figures are no headline."] if bare else []
    )
    for baseline in BASELINES:
        lacking = [name for name, figures in found.items() if figures["floors"] and baseline not in figures["floors"]]
        if lacking:
            lines.append(f"The {baseline.replace('_', ' ')} floor was not scored for {' and '.join(lacking)}.")
    return lines


def _counts(connection: duckdb.DuckDBPyConnection, key: str, dictionary: str) -> tuple[tuple[str, int], ...]:
    query = f"SELECT {key} AS k, count(*) AS n FROM latents WHERE dictionary = ? GROUP BY k ORDER BY n DESC, k"
    return tuple(connection.execute(query, [dictionary]).fetchall())


def _clean(facts: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, visible(value)) for name, value in facts)


def _time(at: datetime) -> str:
    return f"{at.astimezone(None):%Y-%m-%d %H:%M %Z}"


def number(value: float | None, signed: bool = False) -> str:
    """Return a figure with three decimals, a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def track(value: float | None) -> str:
    """Return where a balanced accuracy lies on the little interval bar, as a percentage from its left end."""
    share = 0.0 if value is None else (value - TRACK_LOW) / (TRACK_HIGH - TRACK_LOW)
    return f"{100 * min(1.0, max(0.0, share)):.1f}"
