"""The views that readers see: `views.sql`, filled with the files of one store and what the snapshot has worked out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

BEST = "best_explanations"
WORKED_OUT = (BEST, "floor_means", "outcomes")
"""What a publishing works out as tables, in the order of `worked_out.sql`."""

_NO_LATENTS = (
    "latent INTEGER, status VARCHAR, tokens BIGINT, firing_tokens BIGINT, firing_windows BIGINT, density DOUBLE, mean DOUBLE,"
    " standard_deviation DOUBLE, peak FLOAT, histogram BIGINT[], certified BOOLEAN, hard_shortage INTEGER, explanation VARCHAR"
)
_NO_NEIGHBOURS = "latent INTEGER, neighbour INTEGER, cosine DOUBLE, rank INTEGER"
_NO_EXAMPLES = (
    "latent INTEGER, split VARCHAR, kind VARCHAR, rank INTEGER, text VARCHAR, peak FLOAT, fires BOOLEAN, top BOOLEAN,"
    " stratum SMALLINT, marks_correct BOOLEAN, window_id BIGINT, document VARCHAR"
)
_NO_VERDICTS = (
    "run VARCHAR, dictionary VARCHAR, latent INTEGER, explanation_id VARCHAR, evaluator VARCHAR, baseline VARCHAR,"
    " window_id BIGINT, marks SMALLINT[], truth BOOLEAN, applies BOOLEAN, probability DOUBLE, status VARCHAR, prompt INTEGER"
)
_NO_CALLS = (
    "call_id VARCHAR, run VARCHAR, provider VARCHAR, model VARCHAR, answered_by VARCHAR, status VARCHAR, input_tokens BIGINT,"
    " cached_tokens BIGINT, cache_write_tokens BIGINT, output_tokens BIGINT, usd DOUBLE, worst_usd DOUBLE, seconds DOUBLE,"
    " attempts INTEGER, detail VARCHAR, noted_at TIMESTAMP"
)

_NO_EMBEDDINGS = "dictionary VARCHAR, latent INTEGER, explanation_id VARCHAR, model VARCHAR, vector FLOAT[], code BLOB"

_EXAMPLES = """
SELECT {dictionary} AS dictionary, latent, split, kind, rank,
       array_to_string(list_transform(pieces, lambda piece, j:
           CASE WHEN list_contains(shown, j - 1) AND NOT list_contains(shown, j - 2) THEN '<<' ELSE '' END
           || replace(replace(translate(piece, '<>`', '‹›ˋ'), chr(10), '⏎'), chr(9), '→')
           || CASE WHEN list_contains(shown, j - 1) AND NOT list_contains(shown, j) THEN '>>' ELSE '' END), '') AS text,
       peak, fires, top, stratum, marks_correct, window_id, document
FROM (
    SELECT i.latent, i.split, i.kind, i.rank, i.peak, i.fires, i.top, i.stratum, i.marks_correct,
           i."window" AS window_id, w.document,
           list_transform(w.tokens, lambda token: v.pieces[token + 1]) AS pieces,
           CASE WHEN i."values" IS NULL THEN coalesce(i.marks, []) ELSE list_transform(
               list_filter(range(len(i."values")), lambda k:
                   i."values"[k + 1] > 0 AND i."values"[k + 1] >= 0.3::FLOAT * list_max(i."values")),
               lambda k: i.positions[k + 1]) END AS shown
    FROM read_parquet({items}) i
    JOIN read_parquet({windows}) w ON w."window" = i."window",
    (SELECT list(piece ORDER BY token) AS pieces FROM read_parquet({vocabulary})) v
)
"""


def view_statements(
    store: Path,
    evidence: Mapping[str, str],
    verdict_parts: Sequence[str],
    call_parts: Sequence[str] | None,
    tables: Collection[str],
    embedding_parts: Sequence[str] = (),
) -> list[str]:
    """Return the statements that make the views (and, after each, its comments).

    Args:
        store: absolute folder of the store.
        evidence: fingerprint → folder of finished evidence, relative to the store.
        verdict_parts: names of the registered parts; the views take their columns from the first.
        call_parts: the same for calls; None where the tables are older than these parts.
        tables: those of `WORKED_OUT` that are there.
        embedding_parts: the same as `verdict_parts` for embeddings.
    """
    folders = {dictionary: store / folder for dictionary, folder in sorted(evidence.items())}
    finished = {d: f for d, f in folders.items() if (f / "evidence.json").exists()}
    sources = {
        "latents": _union(finished, "latents.parquet", _NO_LATENTS),
        "neighbours": _union(finished, "neighbours.parquet", _NO_NEIGHBOURS),
        "examples": _examples(finished),
        "verdicts": _read(store / "verdicts", verdict_parts) or _empty(_NO_VERDICTS),
        "calls": _calls(store / "calls", call_parts),
        "embeddings": _read(store / "embeddings", embedding_parts) or _empty(_NO_EMBEDDINGS),
        **worked_out_queries(),
        **{name: f"SELECT * FROM data.{name}" for name in tables},
    }
    statements = _statements("views.sql")
    return [re.sub(r"\{\{(\w+)\}\}", lambda found: sources[found[1]], statement) for statement in statements]


def worked_out_queries(scores: str = "data.scores") -> dict[str, str]:
    """Return for each table of `WORKED_OUT` the query that works it out; `scores` are those that best explanations are of."""
    queries = [statement.replace("{{scores}}", scores) for statement in _statements("worked_out.sql")]
    return dict(zip(WORKED_OUT, queries, strict=True))


def _statements(name: str) -> list[str]:
    text = files("exegete.tools.store").joinpath(name).read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("--"))
    return [statement.strip() for statement in re.split(r";\s*\n|;\s*$", text) if statement.strip()]


def _calls(folder: Path, parts: Sequence[str] | None) -> str:
    if parts is None:
        return _empty(_NO_CALLS)
    return " UNION ALL BY NAME ".join(filter(None, (_read(folder, parts), "SELECT * FROM data.open_calls")))


def _read(folder: Path, parts: Sequence[str]) -> str:
    return f"SELECT * FROM read_parquet([{', '.join(_literal(folder / part) for part in parts)}])" if parts else ""


def _union(folders: Mapping[str, Path], name: str, columns: str) -> str:
    branches = [
        f"SELECT {_literal(dictionary)} AS dictionary, * FROM read_parquet({_literal(folder / name)})"
        for dictionary, folder in folders.items()
        if (folder / name).exists()
    ]
    return " UNION ALL BY NAME ".join(branches) or _empty(f"dictionary VARCHAR, {columns}")


def _examples(folders: Mapping[str, Path]) -> str:
    branches = [
        _EXAMPLES.format(
            dictionary=_literal(dictionary),
            items=_literal(folder / "items-*.parquet"),
            windows=_literal(folder / "windows.parquet"),
            vocabulary=_literal(folder / "vocabulary.parquet"),
        )
        for dictionary, folder in folders.items()
    ]
    return " UNION ALL ".join(branches) or _empty(f"dictionary VARCHAR, {_NO_EXAMPLES}")


def _empty(columns: str) -> str:
    typed = [column.strip().split(" ") for column in columns.split(",")]
    return f"SELECT {', '.join(f'NULL::{kind} AS {name}' for name, kind in typed)} WHERE false"


def _literal(value: str | Path) -> str:
    return "'" + str(value).replace("'", "''") + "'"
