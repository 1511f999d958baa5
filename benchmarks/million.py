"""A store of a million latents: what readers, the writer and a restart wait for. Run `python -m benchmarks.million`.

1. The store of a night's run shortly before its end is generated in SQL (`million_store`), and published once.
2. Readers: `exegete.connect` and one query, the median of five.
3. The writer records 250 latents at a time while a snapshot is made from nothing, then while one grows from the last; what its
   slowest transaction took stands beside that of as many without publishing.
4. A restart: `exegete.agent.run.run` on the store, until the first call to a language model is to be sent.
5. Small parts are merged until none are left to be.

Each step is a process of its own, and its peak memory that process's. CPU seconds stand beside seconds: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import exegete
from benchmarks.million_store import make_store
from benchmarks.night import ScriptedWire
from exegete.agent.config import RunConfig, load_config
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.evaluators.contract import JudgedItem, Score, Verdict
from exegete.tools.explainers import Explanation
from exegete.tools.llm import Reply, Request, opening
from exegete.tools.store import LatentRecord, Store, VerdictRecord, Writer, compaction
from exegete.tools.windows import Window

QUERIES = {
    "point": "SELECT * FROM best_explanations WHERE latent = {latent}",
    "top_100": "SELECT latent, text, mean_score FROM best_explanations ORDER BY mean_score DESC LIMIT 100",
    "words": "SELECT latent, text FROM explanations WHERE text ILIKE '%castles%headlines%'",
    "words_with_scores": "SELECT latent, text, mean_score FROM best_explanations WHERE text ILIKE '%castles%' ORDER BY 3 DESC LIMIT 20",
    "histogram": "SELECT round(mean_score, 1), count(*) FROM best_explanations GROUP BY 1 ORDER BY 1",
    "histogram_of_scores": "SELECT evaluator, round(value, 1), count(*) FROM scores WHERE metric = 'balanced_accuracy'"
    " AND baseline IS NULL GROUP BY ALL",
    "scores_of_one": "SELECT * FROM scores WHERE latent = {latent}",
    "verdicts_of_one": "SELECT * FROM verdicts WHERE latent = {latent}",
    "types": "SELECT typed, outcome, count(*) FROM latents GROUP BY ALL",
    "costs": "SELECT * FROM costs",
}
REPEATS = 5
PAUSE_S = 0.2


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=1_000_000)
    parser.add_argument("--missing", type=int, default=1_000, help="Of them, still to be labeled.")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--verdict-latents", type=int, default=1_000_000, help="So many have verdicts, 40 each.")
    parser.add_argument("--folder", type=Path, help="Keep the store here; it is used again where it is.")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="million-")) / "store"
    try:
        if not folder.exists():
            numbers = (chosen.latents, chosen.missing, chosen.calls, chosen.verdict_latents)
            _print("generated", _apart(_make, (folder, *numbers)))
        for step in chosen.steps:
            _print(step, _apart(STEPS[step], (folder, chosen.latents)))
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder.parent)


def reading(folder: Path, latents: int) -> dict[str, Any]:
    """Time every query of `QUERIES`, connecting included."""
    found = {}
    for name, query in QUERIES.items():
        seconds = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            with exegete.connect(folder) as connection:
                rows = connection.execute(query.format(latent=latents * 3 // 4)).fetchall()
            seconds.append(time.perf_counter() - begun)
        found[name] = {"seconds": round(median(seconds), 3), "rows": len(rows)}
    return found


def writing(folder: Path, latents: int) -> dict[str, Any]:
    """Time a snapshot made from nothing and one that has grown, and what the writer waited for meanwhile."""
    with Store.open(folder).writer() as writer:
        dictionary = writer.runs()[0].dictionary
        key = writer.begin_run(config={"at": time.time()}, seed=0, code_version="0", dictionary=dictionary)
        numbers = iter(range(latents))
        alone = _recording(writer, key, dictionary, numbers, lambda: time.sleep(20 * PAUSE_S))
        whole = _recording(writer, key, dictionary, numbers, writer.publish)
        grown = _recording(writer, key, dictionary, numbers, writer.publish)
        begun = time.process_time()
        writer.publish()
        grown["processor_s_of_publishing_alone"] = round(time.process_time() - begun, 1)
    size = (folder / "labels.duckdb").stat().st_size
    return {"no_publishing": alone, "from_nothing": whole, "grown": grown, "snapshot_mb": size >> 20}


def restart(folder: Path, latents: int) -> dict[str, Any]:
    """Time `run` from its beginning to the first call that is to be sent."""
    begun = time.perf_counter()
    sent: list[float] = []

    class Stopped(ScriptedWire):
        async def send(self, request: Request) -> Reply:
            sent.append(time.perf_counter() - begun)
            raise KeyboardInterrupt

    opening._wire = lambda spec, limits, device: Stopped()
    with suppress(KeyboardInterrupt):
        run(_config(folder), Lines(every_s=30.0))
    return {"first_call_s": round(sent[0], 1), "stopped_s": round(time.perf_counter() - begun, 1)}


def merging(folder: Path, latents: int) -> dict[str, Any]:
    """Merge small parts, as publishings do a few at a time, until none are left to be merged."""
    merges, longest = 0, 0.0
    parts = "SELECT count(*) FROM data.verdict_parts"
    with Store.open(folder).writer() as writer:
        [(before,)] = writer._connection.execute(parts).fetchall()
        while True:
            begun = time.perf_counter()
            found = compaction.compact(writer._connection, writer._lock, folder)
            longest = max(longest, time.perf_counter() - begun)
            merges += found
            if found < compaction.MERGES_AT_ONCE:
                break
        [(after,)] = writer._connection.execute(parts).fetchall()
        writer.publish()
    return {"merges": merges, "parts_before": before, "parts_after": after, "longest_round_s": round(longest, 1)}


STEPS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "writing": writing,
    "reading": reading,
    "restart": restart,
    "merging": merging,
    "reading_merged": reading,
}


def _make(folder: Path, latents: int, missing: int, calls: int, verdict_latents: int) -> dict[str, Any]:
    make_store(_config(folder), latents, missing, calls, verdict_latents)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"latents": latents, "calls": calls, "verdicts": 40 * verdict_latents, "mb": size >> 20}


def _config(folder: Path) -> RunConfig:
    overrides = {
        "store": str(folder),
        "models.explainer": ScriptedWire.name,
        "models.judge": ScriptedWire.name,
        "models.no_budget": True,
        "label.explainer": "one-shot",
        "label.profile": "night",
    }
    return load_config(None, [], overrides)


def _recording(
    writer: Writer, run_id: str, dictionary: str, numbers: Iterator[int], meanwhile: Callable[[], object]
) -> dict[str, Any]:
    """Do `meanwhile` while another thread records latents; return how long that took, and what recording took."""
    waited: list[float] = []
    ended = threading.Event()

    def record() -> None:
        while not ended.is_set():
            records = [_record(dictionary, next(numbers)) for _ in range(250)]
            begun = time.perf_counter()
            writer.record(run_id, records)
            waited.append(time.perf_counter() - begun)
            ended.wait(PAUSE_S)

    thread = threading.Thread(target=record)
    thread.start()
    time.sleep(PAUSE_S)
    begun = time.perf_counter()
    meanwhile()
    seconds = time.perf_counter() - begun
    ended.set()
    thread.join()
    return {
        "seconds": round(seconds, 1),
        "transactions": len(waited),
        "median_s": round(median(waited), 3),
        "longest_s": round(max(waited), 3),
    }


def _record(dictionary: str, latent: int) -> LatentRecord:
    explanation = Explanation(f"another explanation of latent {latent}", explainer="another")
    key = explanation.id(dictionary, latent)
    window = Window(latent, (" a", " b"), None, True, "test", "firing")
    names = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc", "auprc")
    scores, verdicts = [], []
    for evaluator in ("detection", "fuzzing"):
        scores += [(key, Score(evaluator, name, 0.5, 0.4, 0.6, n=20, failures=0)) for name in names]
        item = JudgedItem(window, None, True, Verdict(True), 0)
        verdicts += [VerdictRecord(key, evaluator, item)] * 20
    return LatentRecord(dictionary, latent, "labeled", [(explanation, key)], scores, verdicts)


def _apart(step: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (step, arguments))


def _measured(step: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> dict[str, Any]:
    with _timed() as taken:
        found = step(*arguments)
    return {**found, **taken}


@contextmanager
def _timed() -> Iterator[dict[str, Any]]:
    begun, processor, taken = time.perf_counter(), time.process_time(), dict[str, Any]()
    yield taken
    taken["all_s"] = round(time.perf_counter() - begun, 1)
    taken["processor_s"] = round(time.process_time() - processor, 1)
    taken["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    taken["load"] = round(os.getloadavg()[0], 1)


def _print(step: str, found: dict[str, Any]) -> None:
    print(json.dumps({step: found}), flush=True)


if __name__ == "__main__":
    main()
