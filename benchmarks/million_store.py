"""A store of very many latents as a night's run leaves it shortly before its end, generated in SQL.

1. The first `missing` latents have synthetic evidence (`synthetic_evidence`) and are still to be labeled; all others have a
   status in the evidence, and results: an explanation, twelve scores, floors for a hundred, verdicts, calls.
2. Texts are sentences of varied words; scores lie around 0.75; parameters are those that a run of the profile `night` stores.
3. Verdicts lie in parts of one transaction each, forty a latent. The journal holds so many calls, already published.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.synthetic_evidence import synthetic_evidence
from exegete.agent.config import RunConfig
from exegete.agent.identity import identity
from exegete.evaluators.clustering import CAUTIOUS
from exegete.tools.evidence import LATENTS, Evidence
from exegete.tools.store import DictionaryRecord, Store
from exegete.tools.store.journal_file import CALL_COLUMNS, JournalFile
from exegete.tools.store.schema import QUIET

IN_A_PART = 250
"""Latents in one transaction."""
FLOORED = 100

_WORDS = {
    "opening": "references to;mentions of;tokens that follow;words describing;the beginning of;punctuation after;names of;"
    "numbers in;verbs about;prepositions before;technical terms for;fragments of;quotations of;abbreviations of",
    "subject": "court rulings;protein structures;weather reports;football matches;stock prices;Python functions;recipes;"
    "medieval castles;railway timetables;chess openings;legal contracts;song lyrics;clinical trials;star catalogues;"
    "tax returns;insect anatomy;shipping routes;parliamentary debates;wine regions;bridge engineering;tide tables",
    "place": "in news articles;in source code comments;at the end of sentences;in dialogue;in scientific abstracts;in lists;"
    "within URLs;in German loanwords;near dates;in headlines;after commas;in footnotes;before proper names;in questions",
    "extra": "particularly with a negative tone;often in the past tense;mostly in the plural;when a person is named;"
    "where a quantity is given;especially in British English;usually capitalised;where a comparison is drawn",
}
_SCORES = """
INSERT INTO data.scores
SELECT $run, $dictionary, latent, explanation_id, evaluator, metric,
       CASE WHEN no_value THEN NULL ELSE value END, CASE WHEN no_value THEN NULL ELSE greatest(0, value - 0.2) END,
       CASE WHEN no_value THEN NULL ELSE least(1, value + 0.15) END, 20, 0, baseline,
       CASE WHEN no_value THEN 'no_probabilities' ELSE 'ok' END, parameters
FROM (
    SELECT e.latent, e.explanation_id, evaluator, metric, metric IN ('auroc', 'auprc') AS no_value, b.baseline,
           CASE evaluator WHEN 'detection' THEN $detection ELSE $fuzzing END AS parameters,
           round(least(1, greatest(0.3, (CASE WHEN b.baseline IS NULL THEN 0.75 ELSE 0.5 END)
               + 0.25 * (hash(e.latent, evaluator, metric, b.baseline) % 1000 / 1000.0 - 0.5))) * 20) / 20 AS value
    FROM data.explanations e, (SELECT unnest(['detection', 'fuzzing']) AS evaluator),
         (SELECT unnest(['balanced_accuracy', 'tpr', 'tnr', 'f1', 'auroc', 'auprc']) AS metric), ({baselines}) b
    WHERE {chosen}
    ORDER BY e.latent
)
"""
_VERDICTS = """
COPY (
    SELECT $run AS run, $dictionary AS dictionary, e.latent, e.explanation_id, evaluator, NULL::VARCHAR AS baseline,
           (hash(e.latent, evaluator, i) >> 2)::BIGINT AS window_id,
           CASE WHEN evaluator = 'fuzzing' THEN [hash(i, e.latent) % 32, hash(e.latent, i) % 32]::SMALLINT[] END AS marks,
           i % 2 = 0 AS truth, (hash(i, e.latent, 1) % 4 = 0) <> (i % 2 = 0) AS applies, NULL::DOUBLE AS probability,
           'ok' AS status, (i // 10)::INTEGER AS prompt
    FROM data.explanations e, (SELECT unnest(['detection', 'fuzzing']) AS evaluator), range(20) t(i)
    WHERE e.latent >= $first AND e.latent < $last ORDER BY e.latent, evaluator, i
) TO '{path}' (FORMAT parquet, COMPRESSION zstd)
"""


def make_store(config: RunConfig, latents: int, missing: int, calls: int, verdict_latents: int) -> dict[str, str]:
    """Make the store of `config`, with its run shortly before the end; return that run and its dictionary.

    Args:
        config: of the run that is to go on; its store is new.
        latents: in all.
        missing: of them, still to be labeled; they are the first ones.
        calls: in the journal.
        verdict_latents: so many have verdicts.
    """
    folder = Path(config.store)
    store = Store.create_or_open(folder)
    evidence = _evidence(store, latents, missing)
    with store.writer() as writer:
        writer.add_dictionary(DictionaryRecord(evidence.dictionary, "million", latents))
        run = writer.begin_run(
            config=identity(config), seed=config.seed, code_version="0", dictionary=evidence.dictionary
        )
        writer.set_pilot(run, evidence.dictionary, dict.fromkeys(("detection", "fuzzing"), asdict(CAUTIOUS)))
    key = {"run": run, "dictionary": evidence.dictionary}
    with duckdb.connect(str(folder / "run.duckdb")) as connection:
        connection.execute(QUIET)
        _results(connection, key, latents, missing)
        _verdicts(connection, key, folder, missing, min(missing + verdict_latents, latents))
    _calls(folder / "journal.sqlite", run, calls)
    return key


def _evidence(store: Store, latents: int, missing: int) -> Evidence:
    made = synthetic_evidence(store.folder / "evidence" / "making", missing)
    folder = store.evidence_folder(made.dictionary)
    made.folder.rename(folder)
    path = folder / "latents.parquet"
    own = pq.read_table(path).cast(LATENTS)
    template = own.slice(0, 1).to_pylist()[0]
    fixed = {name: pa.array([value], LATENTS.field(name).type) for name, value in template.items()}
    with pq.ParquetWriter(path, LATENTS, compression="zstd") as writer:
        writer.write_table(own)
        for start in range(missing, latents, 65_536):
            stop = min(start + 65_536, latents)
            columns = {name: pa.repeat(value[0], stop - start) for name, value in fixed.items()}
            columns["latent"] = pa.array(range(start, stop), pa.int32())
            writer.write_table(pa.table([columns[name] for name in LATENTS.names], schema=LATENTS))
    return Evidence.open(folder)


def _results(connection: duckdb.DuckDBPyConnection, key: dict[str, str], latents: int, missing: int) -> None:
    words = {name: text.split(";") for name, text in _WORDS.items()}
    chosen = " || ' ' || ".join(
        f"(${name})[1 + (hash(latent, '{name}') % {len(found)})::INTEGER]" for name, found in words.items()
    )
    connection.execute(
        f"""
        INSERT INTO data.explanations
        SELECT 'sha256:' || sha256(latent || text), $dictionary, latent, text, 'word("' || latent || '")', 'one-shot',
               'openai:some-model', 'sha256:' || sha256('prompt'), '{{"windows":40}}', NULL
        FROM (SELECT latent::INTEGER AS latent, {chosen} || ' (' || latent % 9973 || ')' AS text
              FROM range({missing}, {latents}) t(latent)) ORDER BY latent""",
        {"dictionary": key["dictionary"], **words},
    )
    connection.execute(
        "INSERT INTO data.results (run, dictionary, latent, status, detail, missing_calls, explanation_id)"
        " SELECT $run, $dictionary, latent, 'labeled', NULL, 0, explanation_id FROM data.explanations ORDER BY latent",
        key,
    )
    described = {name: json.dumps(_parameters(name), separators=(",", ":")) for name in ("detection", "fuzzing")}
    parts = (
        ("SELECT NULL::VARCHAR AS baseline", "true"),
        (
            "SELECT unnest(['shuffled', 'sibling', 'constant', 'token_list']) AS baseline",
            f"e.latent < {missing + FLOORED}",
        ),
    )
    for baselines, where in parts:
        connection.execute(_SCORES.format(baselines=baselines, chosen=where), {**key, **described})
    connection.execute(
        "INSERT INTO data.floors SELECT $run, $dictionary, latent, 0 FROM data.explanations WHERE latent < $last",
        {**key, "last": missing + FLOORED},
    )
    connection.execute("INSERT INTO data.typing SELECT $run, $dictionary, latent, 'input' FROM data.explanations", key)


def _parameters(evaluator: str) -> dict[str, Any]:
    judge = {"judge": "model", "model": "openai:some-model", "items": 10, "prompt": f"sha256:{'c0ffee' * 10}beef"}
    clustering = {"balanced": 0.0321, "positives": 0.0456, "negatives": 0.0123, "errors": 12.0, "source": "pilot"}
    own = {"negatives": "random"} if evaluator == "detection" else {"negatives": "non_firing", "misplaced": False}
    return {"base_rate": 0.5, "clustering": clustering, **judge, **own, "per_class": 10, "positives": 10}


def _verdicts(connection: duckdb.DuckDBPyConnection, key: dict[str, str], folder: Path, first: int, last: int) -> None:
    parts = []
    for start in range(first, last, IN_A_PART):
        stop = min(start + IN_A_PART, last)
        name = f"{start:032x}.parquet"
        path = str(folder / "verdicts" / name).replace("'", "''")
        connection.execute(_VERDICTS.format(path=path), {**key, "first": start, "last": stop})
        parts.append((name, 40 * (stop - start)))
    if parts:
        connection.executemany("INSERT INTO data.verdict_parts (part, rows) VALUES (?, ?)", parts)


def _calls(path: Path, run: str, calls: int) -> None:
    JournalFile(path).close()
    columns = ", ".join(("settled", *CALL_COLUMNS))
    content = json.dumps({"status": "ok", "text": "x" * 300, "model": "some-model"})
    with sqlite3.connect(path) as connection:
        numbers = f"WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < {calls})"
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            f"INSERT INTO calls ({columns}) {numbers} SELECT i, printf('sha256:%064x', i * 2654435761 % 4294967296), ?,"
            " 'openai:some-model', 'some-model', 'ok', 800, 0, 0, 20, 0.0001, 0.001, 1.5, 1, NULL, 1700000000.0 + i FROM t",
            [run],
        )
        connection.execute("INSERT OR IGNORE INTO replies SELECT call_id, 'ok', ? FROM calls", [content])
    connection.close()
