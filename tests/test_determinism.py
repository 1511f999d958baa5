"""Whole runs on the bundled subject: pieces and batches change no row, the seed changes the samples.

That slices and batches change no byte of the evidence of planted dictionaries is tested beside the pass
(`tools/test_activations`); here the subject, the dictionary, the corpus and everything after the pass are real.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crashing import EVIDENCE, VIEWS, evidence_digests, exegete, tables

from exegete.tools.bundled import write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ragged_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from a few tokens to several contexts long, which fill no whole number of micro-batches."""
    file = tmp_path_factory.mktemp("corpus") / "ragged.jsonl"
    write_corpus(file, 3, 330)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    joined = [
        texts[0],
        *(" ".join(texts[at : at + at % 7 + 1]) for at in range(1, len(texts), 3)),
        " ".join(texts[:40]),
    ]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in joined))
    return file


def labeled(folder: Path, corpus: Path, *assignments: str) -> Path:
    settings = [
        *("subject.name=bundled", "dictionary.path=bundled:tests", f"corpus.source={corpus}"),
        *("label.limit=24", "label.floors=8", *assignments),
    ]
    log = folder / "log"
    folder.mkdir()
    status = exegete(["label", f"--store={folder / 'store'}", *(f"--set={a}" for a in settings)], log)
    assert status == 0, log.read_text()
    return folder / "store"


def rows(store: Path) -> dict[str, list[Any]]:
    """Return the rows of the views but `examples`, which shows the evidence."""
    return tables(store, tuple(view for view in VIEWS if view != "examples"))


def manifest(store: Path) -> dict[str, Any]:
    [file] = store.glob("passes/*/manifest.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def plain(ragged_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labeled(tmp_path_factory.mktemp("plain") / "run", ragged_corpus, "evidence.slices=1", "evidence.batch=4")


def test_the_corpus_is_ragged(plain: Path) -> None:
    [file] = plain.glob("corpora/*/corpus.json")
    contexts = json.loads(file.read_text())["contexts"]
    assert contexts % 4 and contexts % 12 and contexts % 16 and contexts > 5 * 4


@pytest.mark.parametrize(("slices", "batch"), [(2, 12), (5, 16)])
def test_slices_and_batches_change_no_row(
    slices: int, batch: int, plain: Path, ragged_corpus: Path, tmp_path: Path
) -> None:
    pieces = [f"evidence.slices={slices}", f"evidence.batch={batch}", "label.concurrency=5", "label.batch=7"]
    store = labeled(tmp_path / "run", ragged_corpus, *pieces)
    assert manifest(store)["slices"] == slices
    assert evidence_digests(store) == evidence_digests(plain)
    assert rows(store) == rows(plain)


def test_the_same_seed_gives_the_same_tables(plain: Path, ragged_corpus: Path, tmp_path: Path) -> None:
    again = labeled(tmp_path / "again", ragged_corpus)
    assert evidence_digests(again) == evidence_digests(plain)
    assert rows(again) == rows(plain)


def test_another_seed_gives_other_samples_and_scores(plain: Path, ragged_corpus: Path, tmp_path: Path) -> None:
    other = labeled(tmp_path / "other", ragged_corpus, "seed=1")
    ours, theirs = evidence_digests(plain), evidence_digests(other)
    # The nearest latents are those of the decoder.
    assert {name for name in EVIDENCE if ours[name] == theirs[name]} == {"vocabulary", "neighbours"}
    mine, others = rows(plain), rows(other)
    assert all(mine[view] != others[view] for view in ("latents", "scores", "verdicts"))
    assert {row[0] for row in mine["dictionaries"]} == {row[0] for row in others["dictionaries"]}
