"""What the end of a struck run is held against: all its tables, its files, its journal; and the readers that watch it."""

from __future__ import annotations

import json
import sqlite3
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
from crashing import COUNTS, PARTIAL
from planted_store import tables

from exegete import connect
from exegete.tools.store import Store
from exegete.tools.store.parts import SUPERSEDED

HELD_S = 1.5
"""Seconds for which a snapshot is held open."""


def everything(store: Path) -> dict[str, Any]:
    """Return all tables that do not depend on when and at what price."""
    with connect(store) as connection:
        climbs = connection.execute("FROM climbs ORDER BY ALL").fetchall()
        runs = connection.execute("SELECT run, status, seed, config, figures FROM runs ORDER BY run").fetchall()
    return {**tables(store), "climbs": climbs, "runs": runs}


def strangers(store: Path) -> list[str]:
    """Return files of a store that nobody knows, and parts that are known and not there. Nobody may be writing."""
    found = [str(path.relative_to(store)) for path in store.rglob(".*") if path.is_file()]
    with Store.open(store).writer():
        pass
    with duckdb.connect(str(store / "run.duckdb"), read_only=True) as connection:
        for kind in ("verdict", "call"):
            known = {part for (part,) in connection.execute(f"SELECT part FROM data.{kind}_parts").fetchall()}
            replaced = {path.name for path in (store / f"{kind}s" / SUPERSEDED).glob("*")}
            there = {path.name for path in (store / f"{kind}s").iterdir() if path.is_file()} - (replaced - known)
            found += [f"{kind}s/{name}" for name in known ^ there]
    return found


def _afresh(store: Path) -> list[Any]:
    with connect(store) as connection:
        return connection.execute(PARTIAL).fetchall()


def _held(store: Path) -> list[Any]:
    with connect(store) as connection:
        first = connection.execute(COUNTS).fetchall()
        later = []
        for _ in range(5):
            time.sleep(HELD_S / 5)
            later.append(connection.execute(COUNTS).fetchall())
        return [f"{first} became {one}" for one in later if one != first]


def _asks_for_status(store: Path) -> list[Any]:
    from exegete.agent.inspection import status_json, status_lines

    lines = status_lines(store)
    json.loads(status_json(store))
    return [] if lines else ["no status"]


READERS = (_afresh, _held, _asks_for_status)


def watch(look: Callable[[Path], list[Any]], store: Path, stop: Path, findings: Path) -> None:
    """Look again and again until `stop` exists or something is wrong; then write down how often, and what was wrong."""
    seen: dict[str, Any] = {"queries": 0, "wrong": []}
    while not stop.exists() and not seen["wrong"]:
        if (store / "labels.duckdb").exists():
            try:
                seen["wrong"] += look(store)
            except Exception:
                seen["wrong"].append(traceback.format_exc())
            seen["queries"] += 1
        time.sleep(0.1)
    findings.write_text(json.dumps(seen, default=str))


_CALLS = """
WITH account AS (
    SELECT settled, status, detail, instr(call_id, '/') = 0 AS final,
           CASE WHEN instr(call_id, '/') = 0 THEN call_id ELSE substr(call_id, 1, instr(call_id, '/') - 1) END AS call, call_id
    FROM calls
)
SELECT (SELECT count(*) FROM account a JOIN account f ON f.call = a.call AND f.final AND a.settled > f.settled),
       (SELECT count(*) FROM account WHERE call_id LIKE '%/again-%'),
       (SELECT count(*) FROM account WHERE status = 'unknown' AND detail LIKE '%before the process ended')
"""


def journal_figures(journal: Path) -> dict[str, int]:
    """Return what the journal says of calls: none is settled once more after its answer was written down.

    An intent is written before anything is sent, so whatever is asked again after its answer leaves a later row.
    """
    connection = sqlite3.connect(journal)
    try:
        found = connection.execute(_CALLS).fetchone()
    finally:
        connection.close()
    return dict(zip(("asked_again", "answered_twice", "unknown_at_ends"), found, strict=True))


def difference(wanted: Any, ours: Any) -> str:
    missing, more = ([row for row in one if row not in other] for one, other in ((wanted, ours), (ours, wanted)))
    return f"{len(missing)} of {len(wanted)} rows missing, {len(more)} more: {missing[:2]} … {more[:2]}"
