"""`exegete status`: how far the runs of a store are, read from the published snapshot while a run may be going on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.summary import headline
from exegete.tools.errors import UserError
from exegete.tools.rendering import visible
from exegete.tools.store import Store, connect
from exegete.tools.store.publishing import SNAPSHOT

if TYPE_CHECKING:
    import duckdb

LOCK = "writer.lock"


def newest_run(store: Path) -> tuple[str, str, dict[str, Any]]:
    """Return id, dictionary and configuration of the run that was begun last, as it was last started.

    Raises:
        UserError: the store has no run, or nothing was published yet.
    """
    with connect(store) as connection:
        found = connection.execute(
            "SELECT run, dictionary, config FROM runs ORDER BY started_at DESC, run LIMIT 1"
        ).fetchone()
        if found is None:
            raise UserError(f"the store {str(store)!r} has no run yet; begin one with `exegete label --store {store}`")
        run, dictionary, config = found
        return run, dictionary, json.loads(_settings(connection, run) or config)


def _settings(connection: duckdb.DuckDBPyConnection, run: str) -> str | None:
    tables = "SELECT 1 FROM duckdb_tables() WHERE schema_name = 'data' AND table_name = 'settings'"
    if not connection.execute(tables).fetchall():
        return None  # Published by a version that kept all of it in the configuration.
    rows = connection.execute("SELECT settings FROM data.settings WHERE run = ?", [run]).fetchall()
    return str(rows[0][0]) if rows else None


def newest_config(store: Path) -> dict[str, Any]:
    """Return the configuration of the run that was begun last; raises as `newest_run`."""
    return newest_run(store)[2]


def status_lines(store: Path) -> list[str]:
    """Return lines on the store's writer and snapshot, then for each run its state, progress and newest figures.

    Raises:
        UserError: there is no store.
    """
    folder = Store.open(store).folder
    pid = writer_pid(folder)
    if not (folder / SNAPSHOT).exists():
        return [_writer_line(folder, pid), "nothing was published yet" if pid else _begin(store)]
    with connect(store) as connection:
        runs = connection.execute(_RUNS).fetchall()
        lines = [_writer_line(folder, pid), _snapshot_line(connection)]
        for run in runs:
            lines += ["", *_run_lines(connection, run, pid)]
    return [visible(line) for line in (lines if runs else [*lines, _begin(store)])]


def calls_lines(store: Path, runs: Sequence[str]) -> list[str]:
    """Return one line on what the calls of ended runs came to and cost; none where they made no calls."""
    with connect(store) as connection:
        return [visible(line.strip()) for line in _calls_lines(connection, runs, going=False)]


def writer_pid(folder: Path) -> int | None:
    """Return the id of the live process that holds the writer's lock of the store in `folder`, or None.

    The lock is tried only where the process that last held it still lives, so that asking never stands in the way of a
    writer that is just starting.
    """
    try:
        with (folder / LOCK).open("rb") as file:
            pid = int(file.read(32).decode(errors="replace").strip() or 0)
            if not pid or not _lives(pid):
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return pid
            return None
    except (FileNotFoundError, ValueError):
        return None


_RUNS = """
SELECT r.run, r.dictionary, d.name, coalesce(d.evidence LIKE 'controls/%', false), d.latents, r.status, r.seed,
       r.code_version, r.config, r.figures
FROM runs r LEFT JOIN data.dictionaries d USING (dictionary) ORDER BY r.started_at DESC, r.run
"""


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # It lives, and belongs to somebody else.
        return True
    return True


def _writer_line(folder: Path, pid: int | None) -> str:
    return f"store {folder}: " + (f"process {pid} is writing" if pid else "no process is writing")


def _begin(store: Path) -> str:
    return f"no run yet; begin one with `exegete label --store {store}`"


def _snapshot_line(connection: duckdb.DuckDBPyConnection) -> str:
    row = connection.execute("SELECT epoch(published_at) FROM snapshot").fetchone()
    assert row is not None  # The snapshot is published with exactly one row.
    at = datetime.fromtimestamp(row[0], UTC)
    seconds = max(0.0, (datetime.now(UTC) - at).total_seconds())
    return f"snapshot of {at:%Y-%m-%d %H:%M:%S} UTC ({_age(seconds)} old)"


def _age(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _run_lines(connection: duckdb.DuckDBPyConnection, row: tuple[Any, ...], pid: int | None) -> list[str]:
    run, dictionary, name, control, latents, status, seed, code_version, config_text, figures = row
    if status == "running" and pid is None:
        status = "interrupted"  # Its process ended without a word: killed, or the machine went down.
    config = json.loads(config_text)
    label = config.get("label", {})
    asked = "random_control" if control else "limit"
    lines = [
        f"{visible(name or dictionary)}: {status}",
        f"  run {run[:19]} · dictionary {dictionary[:19]} · seed {seed} · exegete {code_version}"
        f" · explainer {label.get('explainer', 'unknown')}, judge {label.get('judge', 'unknown')}",
        *_models_lines(config.get("models", {})),
        _progress_line(connection, run, min(latents or 0, label.get(asked) or latents or 0)),
        *([] if control else [_floors_line(connection, run, label.get("floors"))]),
        *_calls_lines(connection, [run], pid is not None),
        *_missing_lines(connection, run),
    ]
    if figures is not None:
        lines += [f"  {line}" for line in headline(json.loads(figures))]
    else:
        lines += _means(connection, run)
    return lines


def _models_lines(models: Mapping[str, Any]) -> list[str]:
    named = [f"{role} {models[role]}" for role in ("explainer", "judge", "scorer", "embedder") if models.get(role)]
    return [f"  models: {', '.join(named)}"] if named else []


def _progress_line(connection: duckdb.DuckDBPyConnection, run: str, total: int) -> str:
    counts = connection.execute(
        "SELECT status, count(*) FROM data.results WHERE run = ? GROUP BY ALL ORDER BY ALL", [run]
    ).fetchall()
    done = sum(count for _, count in counts)
    share = f" ({done / total:.0%})" if total else ""
    by_outcome = ", ".join(f"{count:,} {outcome}" for outcome, count in counts)
    return f"  {done:,} of {total:,} latents recorded{share}" + (f": {by_outcome}" if by_outcome else "")


def _floors_line(connection: duckdb.DuckDBPyConnection, run: str, wanted: int | None) -> str:
    counts = connection.execute(
        """SELECT baseline, count(DISTINCT latent) FROM scores
        WHERE run = ? AND baseline IS NOT NULL GROUP BY ALL ORDER BY ALL""",
        [run],
    ).fetchall()
    told = ", ".join(f"{baseline} on {count:,} latents" for baseline, count in counts)
    asked = "" if wanted is None else f" ({wanted:,} asked for)"
    return f"  floors: {told or 'none yet'}{asked}"


def _calls_lines(connection: duckdb.DuckDBPyConnection, runs: Sequence[str], going: bool) -> list[str]:
    """Return one line on calls to language models and their cost; none for runs that make no calls."""
    [(calls, answered, failed, unknown, in_flight, usd, unknown_worst_usd)] = connection.execute(
        """SELECT sum(calls), sum(answered), sum(failed), sum(unknown), sum(in_flight), sum(usd), sum(unknown_worst_usd)
        FROM costs WHERE list_contains(?, run)""",
        [runs],
    ).fetchall()
    if not calls:
        return []
    counts = f"{answered:,} answered, {failed:,} failed{_why(connection, runs) if failed else ''}, {unknown:,} unknown"
    if in_flight:
        counts += f", {in_flight:,} in flight" + ("" if going else " when it ended")
    spent = f"{usd:,.2f} USD" + (f", and at most {unknown_worst_usd:,.2f} USD for the unknown" if unknown else "")
    return [f"  calls: {counts}; {spent}"]


def _why(connection: duckdb.DuckDBPyConnection, runs: Sequence[str]) -> str:
    found = connection.execute(
        """SELECT detail FROM calls WHERE list_contains(?, run) AND status IN ('error', 'rejected') AND detail IS NOT NULL
        GROUP BY detail ORDER BY count(*) DESC, detail LIMIT 1""",
        [runs],
    ).fetchone()
    return f" (most often: {found[0]})" if found else ""


def _missing_lines(connection: duckdb.DuckDBPyConnection, run: str) -> list[str]:
    """Return one line where calls about latents failed for good and have not been asked again since."""
    import duckdb

    query = """SELECT count(DISTINCT latent) FROM (
        SELECT run, latent, missing_calls FROM data.results UNION ALL SELECT run, latent, missing_calls FROM data.floors
    ) WHERE run = ? AND missing_calls > 0"""
    try:
        [(latents,)] = connection.execute(query, [run]).fetchall()
    except (duckdb.BinderException, duckdb.CatalogException):  # Published by a version that did not count them.
        return []
    return [f"  {latents:,} latents miss calls that failed; `exegete resume` asks them again"] if latents else []


def _means(connection: duckdb.DuckDBPyConnection, run: str) -> list[str]:
    """Return running means, for a run that has stored no figures yet."""
    rows = connection.execute(
        """SELECT evaluator, avg(value), 1.96 * stddev_samp(value) / sqrt(count(value)), count(value) FROM data.scores
        WHERE run = ? AND baseline IS NULL AND metric = 'balanced_accuracy' AND value IS NOT NULL
        GROUP BY evaluator ORDER BY evaluator""",
        [run],
    ).fetchall()
    return [
        f"  so far, {evaluator}: mean balanced accuracy {mean:.3f}"
        + (f" [{mean - half:.3f}, {mean + half:.3f}]" if half is not None else "")
        + f" (n = {n:,}, normal interval)"
        for evaluator, mean, half, n in rows
    ]
