"""Investigations in the store: their records are files, and whoever writes the store takes them into its tables.

An investigation never needs the writer's lock, which a labeling run may hold all night. It leaves one file when it ends,
`investigations/ID/record.json`, renamed into place. Whoever opens the store for writing, and every publishing:

1. lists the records and compares what identifies each file (inode, size, time of change) with what the table says of the one
   that is in: only others are read;
2. puts a record's rows in place of those that it had, in one transaction: taking it in twice changes nothing;
3. keeps of what an experiment found no more than `MOST_FACTS` characters, since readers copy the whole snapshot; the file has all;
4. logs a record that is damaged, once, and leaves it out; what an earlier, sound one said stays.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

FOLDER = "investigations"
RECORD = "record.json"
MOST_FACTS = 20_000
"""Characters of what an experiment found, in its row."""
_TABLES = ("investigations", "experiments", "claims")

Transaction = Callable[[], AbstractContextManager[duckdb.DuckDBPyConnection]]
Row = Mapping[str, Any]

log = logging.getLogger(__name__)


class Investigations:
    """The records in the store in `folder`, taken in through the writer's connection and under the writer's lock."""

    def __init__(
        self,
        folder: Path,
        connection: duckdb.DuckDBPyConnection,
        lock: AbstractContextManager[object],
        transaction: Transaction,
    ) -> None:
        self._folder = folder / FOLDER
        self._connection = connection
        self._lock = lock
        self._transaction = transaction
        self._damaged: dict[str, str] = {}

    def take_in(self) -> int:
        """Take in the records that are not in as they are now; return how many were.

        Raises:
            UserError: the disk is full.
        """
        with self._lock:
            found = self._connection.execute("SELECT investigation_id, record FROM data.investigations").fetchall()
        known = {**dict(found), **self._damaged}
        return sum(
            self._take(path, identity)
            for path in sorted(self._folder.glob(f"*/{RECORD}"))
            if (identity := _identity(path)) is not None and known.get(path.parent.name) != identity
        )

    def _take(self, path: Path, identity: str) -> bool:
        name = path.parent.name
        try:
            rows = rows_of(json.loads(path.read_text(encoding="utf-8")), name, identity)
            with self._transaction() as connection:
                _replace(connection, name, rows)
        except FileNotFoundError:
            return False  # Removed since it was listed.
        except (OSError, RecursionError, *_DAMAGED) as error:
            log.warning("the record %r is damaged and was left out (%s)", str(path), " ".join(str(error).split()))
            self._damaged[name] = identity
            return False
        return True


_DAMAGED = (
    *(KeyError, TypeError, ValueError, AttributeError, OverflowError),
    # A value that its column does not take.
    *(duckdb.DataError, duckdb.IntegrityError, duckdb.InvalidInputException, duckdb.BinderException),
)


def _identity(path: Path) -> str | None:
    """Return what tells a file from another one that has replaced it; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return f"{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def _replace(connection: duckdb.DuckDBPyConnection, investigation: str, rows: Mapping[str, Sequence[Row]]) -> None:
    for table in _TABLES:
        connection.execute(f"DELETE FROM data.{table} WHERE investigation_id = ?", [investigation])
        for row in rows[table]:
            columns, places = ", ".join(row), ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO data.{table} ({columns}) VALUES ({places})", list(row.values()))


def rows_of(record: Mapping[str, Any], name: str, identity: str) -> dict[str, list[Row]]:
    """Return table → rows of a record (see `exegete.agent.investigation.record`).

    Args:
        record: as JSON gives it.
        name: of its folder, which has to be its id.
        identity: of its file.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what a record is.
    """
    if record["id"] != name:
        raise ValueError(f"it is of investigation {record['id']!r}, and lies in the folder {name!r}")
    hypotheses = {one["id"]: one for one in record["hypotheses"]}
    return {
        "investigations": [_investigation(record, identity)],
        "experiments": [
            _experiment(name, place, one, hypotheses) for place, one in enumerate(record["experiments"], 1)
        ],
        "claims": [_claim(name, place, one, hypotheses) for place, one in enumerate(record["verdicts"], 1)],
    }


def _investigation(record: Mapping[str, Any], identity: str) -> Row:
    origin, spent = record["origin"], record["spent"]
    parameters = {key: record[key] for key in ("budget", "controls", "judge", "opened", "stopped")}
    return {
        "investigation_id": record["id"],
        "record": identity,
        **{key: record[key] for key in ("question", "suggested", "investigator", "status", "answer", "seed")},
        "code_version": record["code_version"],
        "subject": origin.get("subject"),
        "dictionary": origin.get("fingerprint"),
        "hook_point": origin.get("hook_point"),
        "metric": None if record["metric"] is None else _json(record["metric"]),
        "search_prompts": len(record["cases"]),
        "held_out_prompts": len(record["held_out"]),
        "parameters": _json(parameters),
        **{key: spent[key] for key in ("steps", "passes", "calls", "tokens", "usd")},
        "started_at": _time(record["started_at"]),
        "finished_at": _time(record["finished_at"]),
    }


def _experiment(investigation: str, place: int, one: Mapping[str, Any], hypotheses: Mapping[str, Row]) -> Row:
    prediction = one["prediction"]
    hypothesis = hypotheses.get(prediction["hypothesis"], {})
    headline = _headline(one["headline"])
    return {
        "investigation_id": investigation,
        "experiment": one["id"],
        "place": place,
        "tool": one["tool"],
        "parameters": _json(one["arguments"]),
        "hypothesis": hypothesis.get("statement", prediction["hypothesis"]),
        "hypothesis_status": hypothesis.get("status"),
        "because": prediction["because"],
        "predicted_low": prediction["low"],
        "predicted_high": prediction["high"],
        "status": one["status"],
        "headline": None if one["headline"] is None else one["headline"]["name"],
        **headline,
        "hit": one["predicted"],
        "facts": _within(one["facts"], investigation),
        "passes": one["passes"],
        "seconds": one["seconds"],
        "predicted_at": _time(one["predicted_at"]),
        "finished_at": _time(one["finished_at"]),
    }


def _claim(investigation: str, place: int, verdict: Mapping[str, Any], hypotheses: Mapping[str, Row]) -> Row:
    claim = verdict["claim"]
    flipped, direction = _headline(verdict["flipped"]), _headline(verdict["direction"])
    same = ("statement", "kind", "latents", "intervention", "expects", "flips")
    return {
        "investigation_id": investigation,
        "place": place,
        **{key: claim[key] for key in same},
        "experiments": [f"{investigation}/{id}" for id in claim["experiments"]],
        "hypothesis": hypotheses.get(claim["hypothesis"], {}).get("statement", claim["hypothesis"]),
        "verdict": verdict["status"],
        "why": verdict["why"],
        **_headline(verdict["effect"]),
        "flipped": flipped["value"],
        **{f"flipped_{key}": flipped[key] for key in ("low", "high", "n")},
        **{f"flipped_control{end}": flipped[f"control_{of}"] for end, of in _ENDS.items()},
        **{f"direction_control{end}": direction[f"control_{of}"] for end, of in _ENDS.items()},
        "direction_control_n": direction["control_n"],
        "p": verdict["p"],
        "p_adjusted": verdict["p_adjusted"],
    }


_ENDS = {"": "value", "_low": "low", "_high": "high"}
_FIGURES = ("value", "low", "high", "n", "control", "control_value", "control_low", "control_high", "control_n")


def _headline(headline: Mapping[str, Any] | None) -> dict[str, Any]:
    if headline is None:
        return dict.fromkeys(_FIGURES)
    return {key: headline[key] for key in _FIGURES} | {"control": headline["control"] or None}


def _within(facts: Mapping[str, Any], investigation: str) -> str:
    """Return what an experiment found as JSON: of too much, the smaller parts, with where the others are."""
    texts = {name: _json(value) for name, value in facts.items()}
    if len(whole := _json(facts)) <= MOST_FACTS:
        return whole
    kept, used = dict[str, Any](), 0
    for name in sorted(texts, key=lambda name: (len(texts[name]), name)):
        used += len(texts[name]) + len(_json(name)) + 4
        if used > MOST_FACTS:
            break
        kept[name] = facts[name]
    left_out = {name: len(text) for name, text in texts.items() if name not in kept}
    return _json({**kept, "left_out": left_out, "record": f"{FOLDER}/{investigation}/{RECORD}"})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)
