"""Records as columns: what `Writer.record` hands to DuckDB and to Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from exegete.tools.store.records import LatentRecord

RESULTS = pa.schema(
    [
        ("run", pa.string()),
        ("dictionary", pa.string()),
        ("latent", pa.int32()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("missing_calls", pa.int32()),
        ("explanation_id", pa.string()),
    ]
)
EXPLANATIONS = pa.schema(
    [
        ("explanation_id", pa.string()),
        ("dictionary", pa.string()),
        ("latent", pa.int32()),
        ("text", pa.string()),
        ("predicate", pa.string()),
        ("explainer", pa.string()),
        ("model", pa.string()),
        ("prompt_digest", pa.string()),
        ("parameters", pa.string()),
        ("parent", pa.string()),
    ]
)
SCORES = pa.schema(
    [
        ("run", pa.string()),
        ("dictionary", pa.string()),
        ("latent", pa.int32()),
        ("explanation_id", pa.string()),
        ("evaluator", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int32()),
        ("failures", pa.int32()),
        ("baseline", pa.string()),
        ("status", pa.string()),
        ("parameters", pa.string()),
    ]
)
CLIMBS = pa.schema(
    [
        ("run", pa.string()),
        ("dictionary", pa.string()),
        ("latent", pa.int32()),
        ("control", pa.bool_()),
        ("step", pa.int32()),
        ("rung", pa.string()),
        ("explanation_id", pa.string()),
        ("refine", pa.float64()),
        ("refine_low", pa.float64()),
        ("refine_high", pa.float64()),
        ("refine_n", pa.int32()),
        ("test", pa.float64()),
        ("test_n", pa.int32()),
        ("calls", pa.int32()),
        ("tokens", pa.int64()),
        ("usd", pa.float64()),
        ("decision", pa.string()),
    ]
)
TYPING = pa.schema([("run", pa.string()), ("dictionary", pa.string()), ("latent", pa.int32()), ("typed", pa.string())])
VERDICTS = pa.schema(
    [
        ("run", pa.string()),
        ("dictionary", pa.string()),
        ("latent", pa.int32()),
        ("explanation_id", pa.string()),
        ("evaluator", pa.string()),
        ("baseline", pa.string()),
        ("window_id", pa.int64()),
        ("marks", pa.list_(pa.int16())),
        ("truth", pa.bool_()),
        ("applies", pa.bool_()),
        ("probability", pa.float64()),
        ("status", pa.string()),
        ("prompt", pa.int32()),
    ]
)


def results(run: str, records: Sequence[LatentRecord]) -> pa.Table:
    """One row a record."""
    return _table(
        RESULTS,
        [(run, r.dictionary, r.latent, r.status, r.detail, r.missing_calls, _chosen(r)) for r in records],
    )


def floors(run: str, records: Sequence[LatentRecord]) -> pa.Table:
    """One row a latent whose floors the record holds."""
    return results(run, records).select(["run", "dictionary", "latent", "missing_calls"])


def explanations(records: Sequence[LatentRecord]) -> pa.Table:
    """One row an explanation; the same explanation twice in a record is one row."""
    found = {
        key: (
            key,
            r.dictionary,
            r.latent,
            e.text,
            e.predicate,
            e.explainer,
            e.model,
            e.prompt_digest,
            _json(e.parameters),
            e.parent,
        )
        for r in records
        for e, key in r.explanations
    }
    return _table(EXPLANATIONS, list(found.values()))


def scores(run: str, records: Sequence[LatentRecord]) -> pa.Table:
    """One row a score."""
    return _table(
        SCORES,
        [
            (
                run,
                r.dictionary,
                r.latent,
                key,
                s.evaluator,
                s.metric,
                s.value,
                s.low,
                s.high,
                s.n,
                s.failures,
                s.baseline,
            )
            + (s.status, _json(s.parameters))
            for r in records
            for key, s in r.scores
        ],
    )


def climbs(run: str, records: Sequence[LatentRecord]) -> pa.Table:
    """One row a step of a climb."""
    return _table(
        CLIMBS,
        [
            (run, r.dictionary, r.latent, s.control, s.step, s.rung, s.explanation_id)
            + (s.refine, s.refine_low, s.refine_high, s.refine_n, s.test, s.test_n)
            + (s.calls, s.tokens, s.usd, s.decision)
            for r in records
            for s in r.steps
        ],
    )


Types = Mapping[int, str] | tuple[NDArray[np.int64], NDArray[np.str_]]
"""Latent → type, as a mapping or as two arrays, shape (latents,)."""


def typing(run: str, dictionary: str, types: Types) -> pa.Table:
    """One row a latent, ascending."""
    if isinstance(types, Mapping):
        types = (np.array(list(types), dtype=np.int64), np.array(list(types.values()), dtype=np.str_))
    latents, typed = types
    order = np.argsort(latents)
    columns = [
        pa.repeat(run, len(latents)),
        pa.repeat(dictionary, len(latents)),
        pa.array(latents[order]),
        pa.array(typed[order]),
    ]
    return pa.table(columns, names=TYPING.names).cast(TYPING)


def verdicts(run: str, records: Sequence[LatentRecord]) -> pa.Table:
    """One row a judged item."""
    return _table(
        VERDICTS,
        [
            (run, r.dictionary, r.latent, v.explanation_id, v.evaluator, v.baseline, v.item.window.id, v.item.marks)
            + (v.item.truth, v.item.verdict.applies, v.item.verdict.probability, v.item.verdict.status, v.item.prompt)
            for r in records
            for v in r.verdicts
        ],
    )


def _chosen(record: LatentRecord) -> str | None:
    if record.chosen is not None or len(record.explanations) != 1:
        return record.chosen
    return record.explanations[0][1]


def _table(schema: pa.Schema, found: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = list(zip(*found, strict=True)) if found else [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
