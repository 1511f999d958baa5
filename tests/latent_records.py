"""Records of made-up latents, as a run hands them to the writer of a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import exegete
from exegete.tools.explainers import Explanation
from exegete.tools.store import DictionaryRecord, LatentRecord, Store, VerdictRecord, Writer
from exegete.tools.windows import Window

DICTIONARY = "sha256:" + "ab" * 32
TABLES = ("results", "explanations", "scores", "typing", "floors")


@dataclass(frozen=True)
class FakeScore:
    evaluator: str = "detection"
    metric: str = "balanced_accuracy"
    value: float | None = 0.75
    low: float | None = 0.6
    high: float | None = 0.9
    n: int = 20
    failures: int = 0
    baseline: str | None = None
    status: str = "ok"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FakeVerdict:
    applies: bool | None = True
    probability: float | None = None
    status: str = "ok"


@dataclass(frozen=True)
class FakeItem:
    window: Window
    marks: tuple[int, ...] | None = None
    truth: bool = True
    verdict: FakeVerdict = FakeVerdict()
    prompt: int = 0


def record(latent: int, value: float = 0.75) -> LatentRecord:
    explanation = Explanation(f"months, as in latent {latent}", predicate=None, parameters={"top": 5})
    identity = explanation.id(DICTIONARY, latent)
    window = Window(latent * 10, (" a", " b"), None, True, "test", "firing")
    scores = [
        FakeScore(value=value),
        FakeScore("fuzzing", value=value - 0.1),
        FakeScore(metric="f1", value=None, status="x"),
    ]
    verdicts = [
        VerdictRecord(identity, "detection", FakeItem(window)),
        VerdictRecord(identity, "fuzzing", FakeItem(window, (1,))),
    ]
    return LatentRecord(
        DICTIONARY, latent, "labeled", [(explanation, identity)], [(identity, s) for s in scores], verdicts
    )


def begin(writer: Writer) -> str:
    writer.add_dictionary(DictionaryRecord(DICTIONARY, "toy", 100))
    return writer.begin_run(config={"a": 1}, seed=0, code_version="0", dictionary=DICTIONARY)


def fill(folder: Path, batches: Sequence[Sequence[int]]) -> Store:
    """Return a store whose run has recorded the latents of `batches`, each by a writer of its own."""
    store = Store.create_or_open(folder)
    for batch in batches:
        with store.writer() as writer:
            run = begin(writer)
            writer.record(run, [record(latent, 0.5 + latent / 100) for latent in batch])
            writer.set_types(run, DICTIONARY, {latent: "input" for latent in range(20)})
            writer.publish()
    return store


def content(store: Store) -> dict[str, Any]:
    """Return what readers of a store see."""
    with exegete.connect(store.folder) as connection:
        rows = {table: connection.execute(f"FROM data.{table}").fetchall() for table in TABLES}
        rows["verdicts"] = connection.execute("FROM verdicts ORDER BY ALL").fetchall()
        return rows
