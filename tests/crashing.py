"""Runs that are killed, and readers that watch: the processes of `test_crash`, and of other tests of whole runs.

Processes are forked from a server that has imported the heavy libraries, which takes longer than a small run. What is
killed is still a process of its own with everything that the run does in it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

VIEWS = ("latents", "explanations", "scores", "best_explanations", "verdicts", "examples", "neighbours", "dictionaries")
EVIDENCE = ("items", "latents", "windows", "neighbours", "vocabulary")
HEAVY = ["transformer_lens", "sae_lens", "langgraph.graph", "exegete.agent.run", "exegete.tools.activations", "pandas"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["crashing", *HEAVY])


def start(arguments: Sequence[str], log: Path) -> BaseProcess:
    """Start `exegete ARGUMENTS` in a process group of its own, its output in `log`."""
    process = FORKS.Process(target=_command, args=(list(arguments), log))
    process.start()
    return process


def exegete(arguments: Sequence[str], log: Path, timeout_s: float = 300.0) -> int:
    """Run `exegete ARGUMENTS` to its end and return its status."""
    process = start(arguments, log)
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"exegete {' '.join(arguments)} has not ended: {log.read_text()[-2000:]}")
    return process.exitcode


def _command(arguments: list[str], log: Path) -> None:
    import torch

    from exegete.agent.cli import main

    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    sys.argv = ["exegete", *arguments]
    main()


def tables(store: Path, views: Sequence[str] = VIEWS) -> dict[str, Any]:
    """Return every row of `views`, and what of a run does not depend on the time.

    Of `examples`, which takes seconds to put into words, only the first latents; but all of the evidence that it shows.
    """
    import exegete as package

    some = {"examples": "WHERE latent < 32"}
    found: dict[str, Any] = {"evidence": evidence_digests(store)} if "examples" in views else {}
    with package.connect(store) as connection:
        for view in views:
            query = f"SELECT * FROM {view} {some.get(view, '')} ORDER BY ALL"
            found[view] = connection.execute(query).fetchall()
        found["runs"] = connection.execute(
            "SELECT run, status, seed, config, figures FROM runs ORDER BY run"
        ).fetchall()
    return found


def evidence_digests(store: Path) -> dict[str, str]:
    """Return a digest of all rows of each evidence table, in stored order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    [folder] = store.glob("evidence/*")
    digests = {}
    for name in EVIDENCE:
        rows = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob(f"{name}*.parquet")))
        assert rows.num_rows, name
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows.combine_chunks())
        digests[name] = hashlib.sha256(sink.getvalue()).hexdigest()
    return digests


PARTIAL = """
WITH judged AS (
    SELECT run, latent, evaluator, baseline, count(*) AS verdicts FROM verdicts GROUP BY ALL
), scored AS (
    SELECT run, latent, explanation_id, evaluator, baseline, n, failures FROM scores WHERE metric = 'balanced_accuracy'
)
SELECT 'no explanation', l.latent FROM latents l
WHERE l.outcome = 'labeled' AND l.latent NOT IN (SELECT latent FROM explanations)
UNION ALL
SELECT 'no scores', l.latent FROM latents l
WHERE l.outcome = 'labeled'
  AND (SELECT count(DISTINCT evaluator) FROM scored s WHERE s.latent = l.latent AND s.baseline IS NULL) <> 2
UNION ALL
SELECT 'verdicts missing', s.latent FROM scored s
LEFT JOIN judged j ON j.run = s.run AND j.latent = s.latent AND j.evaluator = s.evaluator
    AND j.baseline IS NOT DISTINCT FROM s.baseline
WHERE coalesce(j.verdicts, 0) < s.n + s.failures
UNION ALL
SELECT 'verdicts without scores', j.latent FROM judged j
ANTI JOIN scored s ON j.run = s.run AND j.latent = s.latent AND j.evaluator = s.evaluator
    AND j.baseline IS NOT DISTINCT FROM s.baseline
"""
"""Latents of which a snapshot shows a part only."""
COUNTS = "SELECT (SELECT count(*) FROM explanations), (SELECT count(*) FROM scores), (SELECT count(*) FROM verdicts)"


def query_again_and_again(store: Path, stop: Path, findings: Path) -> None:
    """Connect afresh and look for partial rows until `stop` exists; then write what was seen."""
    import exegete as package

    seen: dict[str, Any] = {"queries": 0, "counts": [], "wrong": []}
    while not stop.exists() and not seen["wrong"]:
        if (store / "labels.duckdb").exists():
            try:
                with package.connect(store) as connection:
                    seen["wrong"] += connection.execute(PARTIAL).fetchall()
                    [counts] = connection.execute(COUNTS).fetchall()
                seen["queries"] += 1
                if list(counts) not in seen["counts"]:
                    seen["counts"].append(list(counts))
            except Exception as error:
                seen["wrong"].append(f"{type(error).__name__}: {error}")
        time.sleep(0.05)
    findings.write_text(json.dumps(seen))


def hold_one_reader_open(store: Path, stop: Path, findings: Path) -> None:
    """Connect once, as soon as there is something to read, and go on asking that connection until `stop` exists."""
    import exegete as package

    while not (store / "labels.duckdb").exists():
        time.sleep(0.02)
    seen: dict[str, Any] = {"queries": 0, "counts": []}
    with package.connect(store) as connection:
        while not stop.exists():
            [counts] = connection.execute(COUNTS).fetchall()
            seen["queries"] += 1
            if list(counts) not in seen["counts"]:
                seen["counts"].append(list(counts))
            time.sleep(0.2)
    findings.write_text(json.dumps(seen))
