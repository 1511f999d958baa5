"""`exegete status`: how the runs of a store stand, told by another process than the one that writes it.

1. Whether a process is writing is asked of the lock that it holds.
2. The runs are read from the published snapshot (`run_facts`), which may be minutes old.
3. The vital signs of the process that writes, and how the one that wrote last ended, are read from the event log (`needs`).
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exegete.agent.needs import Need, last_session, need_of
from exegete.agent.run_facts import RunFacts, call_facts, calls_line, run_facts, run_lines
from exegete.agent.vital_lines import duration, facts, stage_text
from exegete.agent.vitals import Snapshot
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


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """How a store stands at this moment."""

    store: str
    pid: int | None
    """The process that is writing."""
    need: Need
    published_at: str | None
    """Time of the snapshot that `runs` come from, ISO 8601 in UTC; None where nothing was published yet."""
    published_age_s: float | None
    vitals: Snapshot | None
    """The newest of the process that is writing; None where there is none, or it has told none yet."""
    vitals_age_s: float | None
    runs: Sequence[RunFacts]
    """The one begun last first."""


def store_status(store: Path) -> StoreStatus:
    """Return how the store stands: from its snapshot, its event log, and the lock of its writer, whose files stay closed.

    Raises:
        UserError: there is no store.
    """
    folder = Store.open(store).folder
    pid = writer_pid(folder)
    runs: list[RunFacts] = []
    published: datetime | None = None
    if (folder / SNAPSHOT).exists():
        with connect(store) as connection:
            runs, published = run_facts(connection, pid), _published(connection)
    session = last_session(folder)
    need = need_of(store, pid, runs[0] if runs else None, session)
    live = session if session is not None and pid is not None and session.pid in (None, pid) else None
    return StoreStatus(
        str(folder),
        pid,
        need,
        published.isoformat() if published else None,
        _seconds_since(published) if published else None,
        live.vitals if live else None,
        live.age_s() if live else None,
        runs,
    )


def status_lines(store: Path) -> list[str]:
    """Return lines on the store's writer, what its newest run needs, the snapshot, and each run; raises as `store_status`."""
    status = store_status(store)
    if status.published_age_s is None:
        snapshot = "nothing was published yet" if status.pid else _begin(store)
    else:
        snapshot = f"snapshot of {shown_time(status.published_at)} UTC ({duration(status.published_age_s)} old)"
    lines = [_writer_line(status), snapshot]
    if status.runs and status.need.state != "running":
        lines.append(status.need.line())
    lines += _live_lines(status)
    for run in status.runs:
        lines += ["", *run_lines(run, status.pid is not None)]
    if not status.runs and status.published_age_s is not None:
        lines.append(_begin(store))
    return [visible(line) for line in lines]


def status_json(store: Path) -> str:
    """Return `store_status` as JSON text; raises as that."""
    return json.dumps(asdict(store_status(store)), indent=2)


def calls_lines(store: Path, runs: Sequence[str]) -> list[str]:
    """Return one line on what the calls of ended runs came to and cost; none where they made no calls."""
    with connect(store) as connection:
        found = call_facts(connection, runs)
    return [visible(calls_line(found, going=False))] if found else []


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


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # It lives, and belongs to somebody else.
        return True
    return True


def _writer_line(status: StoreStatus) -> str:
    return f"store {status.store}: " + (f"process {status.pid} is writing" if status.pid else "no process is writing")


def _begin(store: Path) -> str:
    return f"no run yet; begin one with `exegete label --store {store}`"


def _live_lines(status: StoreStatus) -> list[str]:
    if status.vitals is None or status.vitals_age_s is None:
        return []
    stage = status.vitals.stage
    doing = "between two stages" if stage is None else stage_text(stage)
    return [f"{duration(status.vitals_age_s)} ago: {doing}", *(f"  {line}" for line in facts(status.vitals))]


def _published(connection: duckdb.DuckDBPyConnection) -> datetime:
    row = connection.execute("SELECT epoch(published_at) FROM snapshot").fetchone()
    assert row is not None  # The snapshot is published with exactly one row.
    return datetime.fromtimestamp(row[0], UTC)


def _seconds_since(moment: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())


def shown_time(moment: str | None) -> str:
    """Return an ISO 8601 time as a reader wants it, to the second; empty where there is none."""
    return "" if moment is None else f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M:%S}"
