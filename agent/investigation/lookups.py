"""Looking up what is known: SQL over the store, its views, a search over its explanations, and the search prompts.

Queries are bounded in time, rows and memory (`exegete.tools.store.apart`) and read the published snapshot alone, without
the windows of the test split. Whatever a corpus or a language model wrote is fenced.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import duckdb

from exegete.agent.findings import figure
from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Outcome
from exegete.agent.investigation.fencing import fenced, fenced_text, quoted
from exegete.agent.investigation.toolbelt import tool
from exegete.tools.errors import ToolError, nearest
from exegete.tools.prompting import line
from exegete.tools.store import connect
from exegete.tools.store.apart import query_apart

if TYPE_CHECKING:
    from exegete.agent.investigation.contract import Case
    from exegete.tools.search import Found, Hit

ROWS = 200
WIDEST = 160
"""Characters of a cell in the text; the facts have more."""
MOST_HITS = 50
MOST_PROMPTS = 50


@tool("lookup")
def sql(bench: Bench, query: str) -> Outcome:
    """Run one SELECT (DuckDB) over the store of labels. Read-only, some seconds, 200 rows; windows of the test split are not there.

    The views that matter most: latents (how each fires), explanations, best_explanations (text with detection and fuzzing,
    their intervals and shuffled floors), scores, examples (windows as text), neighbours (decoder cosine). The tool `views`
    names all of them, and their columns.

    Args:
        query: for example SELECT latent, text, detection, detection_shuffled FROM best_explanations ORDER BY detection DESC LIMIT 20
    """
    found = query_apart(_store(bench), query, time_limit_s=bench.query_s, row_limit=ROWS, memory_mb=bench.query_mb)
    rows = found.rows
    more = f", of more than {ROWS}: add a LIMIT and OFFSET, or aggregate" if found.truncated else ""
    head = f"{len(rows)} row{'' if len(rows) == 1 else 's'}{more}"
    facts = {"query": query, "columns": found.columns, "rows": rows, "truncated": found.truncated}
    return Outcome("\n".join([head, *_fenced_rows(found.columns, rows)]), None, facts)


@tool("lookup")
def views(bench: Bench, view: str = "") -> Outcome:
    """Name the views that SQL can read, or the columns of one of them and what they mean.

    Args:
        view: its name; all views are listed where it is left out.
    """
    with _reading(bench) as connection:
        known: dict[str, str] = dict(
            connection.execute(
                "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal AND database_name = 'labels'"
                " AND schema_name = 'main' ORDER BY 1"
            ).fetchall()
        )
        if not view:
            own = bench.live.dictionary.fingerprint
            lines = [f"latents are of the dictionary {own!r} (column dictionary, where a view has it)"]
            lines += [f"{name}: {comment}" for name, comment in known.items()]
            return Outcome("\n".join(lines), None, {"dictionary": own, "views": known})
        if view not in known:
            raise ToolError(f"there is no view {view!r}; there are: {', '.join(known)}.{nearest(view, known)}")
        columns = connection.execute(
            "SELECT column_name, data_type, comment FROM duckdb_columns()"
            " WHERE database_name = 'labels' AND schema_name = 'main' AND table_name = ? ORDER BY column_index",
            [view],
        ).fetchall()
    told = [{"column": name, "type": kind, "meaning": meaning} for name, kind, meaning in columns]
    rows = [f"{one['column']} ({one['type']}): {one['meaning']}" for one in told]
    return Outcome("\n".join([known[view], *rows]), None, {"view": view, "columns": told})


@tool("lookup")
def search(
    bench: Bench, phrase: str, by: Literal["both", "words", "meaning"] = "both", limit: int = 10, offset: int = 0
) -> Outcome:
    """Find latents whose explanation has the words of a phrase, or means nearly the same. Hits are candidates, not evidence.

    Each stands beside its held-out scores (balanced accuracy) with those of shuffled explanations, and its cosine beside that
    of an explanation at random.

    Args:
        phrase: words, or what is meant; up to 1,000 characters.
        by: by words, by meaning, or both where the store has embeddings and their model is there.
        limit: hits, 1 to 50.
        offset: leave out so many of the best.
    """
    from exegete.tools.search import search as find

    _within("limit", limit, 1, MOST_HITS)
    _within("offset", offset, 0, 1_000)
    words_alone = by == "both" and bench.open_embedder is None
    with _reading(bench) as connection:
        found = find(
            connection,
            phrase,
            by="words" if words_alone else by,
            limit=offset + limit,
            dictionary=bench.live.dictionary.fingerprint,
            open_embedder=bench.open_embedder,
        )
    note = "found by words alone: no embedding model is open" if words_alone else found.note
    hits = found.hits[offset:]
    facts = {"phrase": phrase, "by": by, "note": note, "cosine_mean": found.cosine_mean, "hits": hits}
    return Outcome("\n".join(_search_lines(found, hits, note)), None, facts)


@tool("lookup")
def prompts(bench: Bench, offset: int = 0, count: int = 10) -> Outcome:
    """Show the search prompts with what they are compared with, and the metric on each as it is, nothing changed.

    Other tools take prompts by these numbers. ⏎ stands for a line break.

    Args:
        offset: number of the first one, from 0.
        count: prompts, 1 to 50.
    """
    _within("count", count, 1, MOST_PROMPTS)
    _within("offset", offset, 0, len(bench.cases) - 1)
    clean, metric = bench.measurable.clean, bench.metric
    shown = int((clean > metric.shown).sum())
    lines = [
        f"{len(bench.cases)} search prompts; metric {metric.kind} in {metric.unit}: mean {clean.mean():.3g} (n = {len(clean)}), "
        f"{shown} show the behaviour (above {metric.shown:.3g})"
    ]
    cases = []
    for number, case in list(enumerate(bench.cases))[offset : offset + count]:
        value = float(clean[number])
        lines.append(f"{number} metric {value:.3g}{_answers(case)} {fenced_text('prompt', case.prompt, number)}")
        if case.variant is not None:
            lines.append(f"{number} without the suggested cause: {fenced_text('variant', case.variant, number)}")
        cases.append({"number": number, "metric": value, "shown": value > metric.shown, "case": case})
    facts = {"prompts": len(bench.cases), "mean": clean.mean(), "showing": shown, "cases": cases}
    return Outcome("\n".join(lines), None, facts)


def _store(bench: Bench) -> Path:
    if bench.live.store is None:
        raise ToolError(
            "there is no store of labels in this investigation; use card, windows and activations, which run the model"
        )
    return bench.live.store


@contextmanager
def _reading(bench: Bench) -> Iterator[duckdb.DuckDBPyConnection]:
    """Read the store, for a limited time."""
    connection = connect(_store(bench))
    timer = threading.Timer(bench.query_s, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield connection
    except duckdb.InterruptException as error:
        raise ToolError(f"it took longer than {bench.query_s:g} s; ask for less") from error
    finally:
        timer.cancel()
        connection.close()


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ToolError(f"{name} is {value}; give {low} to {high:,}")


def _fenced_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    body = [" | ".join(_short(cell) for cell in row) for row in rows]
    return ["<rows>", " | ".join(line(column) for column in columns), *body, "</rows>"]


def _short(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    text = line(str(cell)[: WIDEST + 1])
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}…"


def _search_lines(found: Found, hits: Sequence[Hit], note: str | None) -> list[str]:
    lines = [f"{len(hits)} explanation{'' if len(hits) == 1 else 's'}" + (f" ({note})" if note else "")]
    if found.cosine_mean is not None:
        lines.append(f"cosine of an explanation at random: {found.cosine_mean:.2f} (mean of {found.embedded:,})")
    return lines + [_hit(hit) for hit in hits]


def _hit(hit: Hit) -> str:
    scores = [
        f"{name} {figure(value, low, high)} (shuffled {figure(floor) or 'unknown'})"
        for name, value, low, high, floor in (
            ("detection", hit.detection, hit.detection_low, hit.detection_high, hit.detection_shuffled),
            ("fuzzing", hit.fuzzing, hit.fuzzing_low, hit.fuzzing_high, hit.fuzzing_shuffled),
        )
        if value is not None
    ]
    found_by = [] if hit.word_rank is None else [f"words: rank {hit.word_rank}"]
    found_by += [] if hit.cosine is None else [f"cosine {hit.cosine:.2f}"]
    told = ", ".join([*found_by, *(scores or ["not scored"])])
    return f"latent {hit.latent} {fenced('label', hit.text)} {told}"


def _answers(case: Case) -> str:
    against = "" if case.other is None else f" against {quoted(case.other)}"
    return "" if case.answer is None else f", answer {quoted(case.answer)}{against}"
