"""Small synthetic stores, written through the store's public writer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from exegete.agent.summary import summarise
from exegete.evaluators.contract import JudgedItem, Score, Verdict
from exegete.tools.evidence import Evidence
from exegete.tools.evidence_writing import write_evidence
from exegete.tools.explainers import Explanation
from exegete.tools.store import DictionaryRecord, LatentRecord, Outcome, Store, VerdictRecord, Writer
from exegete.tools.windows import LatentEvidence, Window

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "[bold red]markup[/]",
    "[/]",
    "{{ 7*7 }}",
    "\x00",
)
"""What corpus text may hold to harm a page or a terminal."""
WORDS = (" the", " cat", " sat", " on", " a", " mat", ".", " SELECT", " FROM", "\n", *HOSTILE)
WINDOW = 16
PER_SPLIT = 12

StoreMaker = Callable[..., str]


@dataclass(frozen=True)
class Toy:
    """What a synthetic dictionary is made of. The last three latents are dead, rare and dense."""

    name: str = "toy"
    latents: int = 12
    floors: bool = True
    finish: bool = True
    labeled: bool = True
    seed: int = 0
    judge: str = "predicate"
    activations: bool = True
    limit: int | None = None
    words: tuple[str, ...] = WORDS
    """Pieces of the vocabulary, as many as `WORDS`."""
    said: str = '</script><script>alert("x")</script> \x1b[2J\u202e'
    """What explanations end with."""
    predicate: str = 'token in {" cat", "<b>"}'
    model: str | None = None
    """That wrote the explanations."""

    @property
    def dictionary(self) -> str:
        """Fingerprint."""
        return f"sha256:{self.name.encode().hex():0<64}"[:71]

    def config(self) -> dict[str, Any]:
        """What the run was told."""
        label = {"explainer": "lexical", "judge": self.judge, "floors": 5, "limit": self.limit}
        return {"corpus": {"source": "<i>toy</i>.txt"}, "label": label, "seed": self.seed}


@pytest.fixture
def make_store(tmp_path: Path) -> StoreMaker:
    """Return a function that writes a toy dictionary into a store and publishes it; it returns the fingerprint."""

    def make(store: str = "store", **options: Any) -> str:
        toy = Toy(**options)
        opened = Store.create_or_open(tmp_path / store)
        _write_evidence(opened, toy)
        with opened.writer() as writer:
            subject, hook_point = ("toy-model", "blocks.0.hook_resid_post") if toy.activations else (None, None)
            writer.add_dictionary(DictionaryRecord(toy.dictionary, toy.name, toy.latents, subject, hook_point))
            if toy.labeled:
                _label(opened, toy, writer)
            writer.publish()
        return toy.dictionary

    return make


def _write_evidence(store: Store, toy: Toy) -> None:
    rng = np.random.default_rng(toy.seed)
    windows: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for latent in range(toy.latents):
        status = _status(toy, latent)
        rows.append(_latent(toy, latent, status))
        for split in ("explain", "refine", "test") if status == "live" else ():
            for rank in range(PER_SPLIT):
                number = len(windows)
                tokens = rng.integers(len(WORDS), size=WINDOW).astype(np.int32).tolist()
                windows.append({"window": number, "document": "d", "tokens": tokens})
                items.append(_item(toy, latent, split, rank, number, rng))
    if not toy.activations:
        rows = [{"latent": row["latent"], "status": row["status"]} for row in rows]
    write_evidence(
        store.evidence_folder(toy.dictionary),
        vocabulary=pa.table({"token": range(len(WORDS)), "piece": toy.words}),
        windows=pa.Table.from_pylist(windows),
        items=pa.Table.from_pylist(items),
        latents=pa.Table.from_pylist(rows),
        provenance={"dictionary": toy.dictionary, "source": "pass", "seed": toy.seed},
    )


def _status(toy: Toy, latent: int) -> str:
    return {toy.latents - 3: "dead", toy.latents - 2: "rare", toy.latents - 1: "dense"}.get(latent, "live")


def _latent(toy: Toy, latent: int, status: str) -> dict[str, Any]:
    fired = {"dead": 0, "rare": 3, "dense": 90_000}.get(status, 100 * (latent + 1))
    numbers = {"tokens": 100_000, "firing_tokens": fired, "firing_windows": fired // 2, "density": fired / 100_000}
    moments = {"mean": 2.5, "standard_deviation": 0.5, "peak": 9.0} if fired else {"mean": None, "peak": 0.0}
    return {"latent": latent, "status": status, **numbers, **moments}


def _item(toy: Toy, latent: int, split: str, rank: int, window: int, rng: np.random.Generator) -> dict[str, Any]:
    fires = rank % 2 == 0
    positions = sorted(rng.choice(WINDOW, size=3, replace=False).tolist()) if fires else []
    values = rng.uniform(0.5, 9.0, size=len(positions)).astype(np.float32).tolist()
    item = {"latent": latent, "split": split, "kind": "firing" if fires else "random", "rank": rank, "window": window}
    item |= {"fires": fires, "top": rank == 0, "stratum": rank // 2 if fires and rank else None}
    if toy.activations:
        return item | {"positions": positions, "values": values, "peak": max(values, default=0.0)}
    return item | {"marks": positions or None, "marks_correct": True if fires else None}


def _label(store: Store, toy: Toy, writer: Writer) -> None:
    run = writer.begin_run(config=toy.config(), seed=toy.seed, code_version="0.1.0", dictionary=toy.dictionary)
    evidence = Evidence.open(store.evidence_folder(toy.dictionary))
    chosen = list(evidence.statuses)[: toy.limit]
    found = list(evidence.read(chosen, "score"))
    writer.record(run, [_record(toy, own) for own in found])
    live = [own for own in found if own.status == "live"]
    if toy.floors:
        writer.record(run, [_floor_record(toy, own) for own in live[:5]], floors=True)
    writer.set_types(run, toy.dictionary, {own.latent: "input" if own.latent % 2 else "unexplained" for own in live})
    if toy.finish:
        headlines = dict.fromkeys(("detection", "fuzzing"), "balanced_accuracy")
        figures = summarise(writer.results(run, toy.dictionary), headlines, np.random.default_rng(toy.seed))
        writer.finish_run(run, "finished", figures)


def _explanation(toy: Toy, latent: int) -> Explanation:
    return Explanation(f"Word {latent} {toy.said}", toy.predicate, explainer="lexical", model=toy.model)


def _record(toy: Toy, own: LatentEvidence) -> LatentRecord:
    outcomes: dict[str, Outcome] = {"dead": "dead", "rare": "rare", "dense": "dense"}
    if own.status != "live":
        return LatentRecord(toy.dictionary, own.latent, outcomes[own.status])
    explanation = _explanation(toy, own.latent)
    identity = explanation.id(toy.dictionary, own.latent)
    value = 0.55 + 0.4 * own.latent / toy.latents
    return LatentRecord(
        toy.dictionary,
        own.latent,
        "labeled",
        explanations=[(explanation, identity)],
        scores=[(identity, score) for name in ("detection", "fuzzing") for score in _scores(toy, name, value)],
        verdicts=[
            VerdictRecord(identity, name, _judged(window, name)) for name in ("detection", "fuzzing")
            for window in own.select("test")
        ],
    )  # fmt: skip


def _floor_record(toy: Toy, own: LatentEvidence) -> LatentRecord:
    identity = _explanation(toy, own.latent).id(toy.dictionary, own.latent)
    scores = [
        (identity, score)
        for baseline, value in (("shuffled", 0.5 + 0.01 * own.latent), ("sibling", 0.6), ("constant", 0.5))
        for name in ("detection", "fuzzing")
        for score in _scores(toy, name, value, baseline)
    ]
    return LatentRecord(toy.dictionary, own.latent, "labeled", scores=scores)


def _scores(toy: Toy, evaluator: str, value: float, baseline: str | None = None) -> list[Score]:
    value = value - 0.03 * (evaluator == "fuzzing" and baseline is None)
    common: dict[str, Any] = {"n": PER_SPLIT, "failures": 1, "baseline": baseline, "parameters": {"judge": toy.judge}}
    return [
        Score(evaluator, "balanced_accuracy", value, value - 0.05, value + 0.05, **common),
        Score(evaluator, "f1", value, value - 0.05, value + 0.05, **common),
        Score(evaluator, "auroc", None, None, None, status="no_probabilities", **common),
    ]


def _judged(window: Window, evaluator: str) -> JudgedItem:
    marks = (1, 2) if evaluator == "fuzzing" else None
    wrong = window.id % 3 == 0
    return JudgedItem(window, marks, window.fires, Verdict(applies=window.fires != wrong), prompt=0)
