"""Two dictionaries in one store, one after the other, and two writers at the same time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from planted_store import planted_line
from scripted_wire import SPEC, scripted

import exegete
from exegete.agent.config import load_config
from exegete.agent.progress import Lines
from exegete.agent.run import Outcome, run
from exegete.tools.interchange import import_evidence
from exegete.tools.store import Store

FIRST, SECOND = 5, 8


def brought(store: Path, name: str, latents: range) -> None:
    file = store.parent / f"{name}.jsonl"
    file.write_text("".join(json.dumps(planted_line(latent) | {"dictionary": name}) + "\n" for latent in latents))
    import_evidence(file, store)


def label(store: Path) -> Outcome:
    overrides = {"store": str(store), "models.explainer": SPEC, "models.judge": SPEC, "models.no_budget": True}
    return run(load_config(None, ["label.floors=2"], overrides), Lines(every_s=1e9))


def rows(store: Path, query: str) -> list[Any]:
    with exegete.connect(store) as connection:
        return connection.execute(query).fetchall()


def test_a_second_dictionary_joins_a_labeled_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wire, store = scripted(monkeypatch), tmp_path / "store"
    brought(store, "first", range(FIRST))
    alone = label(store)
    before = rows(store, "FROM scores ORDER BY ALL")
    wire.questions.clear()

    brought(store, "second", range(10, 10 + SECOND))
    both = label(store)
    assert set(alone.figures) < set(both.figures) and len(both.runs) == 2
    # Of the first nothing is asked and nothing changes.
    (first,) = alone.figures
    assert rows(store, f"FROM scores WHERE dictionary = '{first}' ORDER BY ALL") == before
    assert set(wire.questions.values()) == {1}
    counted = rows(
        store, "SELECT name, count(*) FROM best_explanations JOIN dictionaries USING (dictionary) GROUP BY 1 ORDER BY 1"
    )
    assert counted == [("first", FIRST), ("second", SECOND)]
    assert rows(store, "SELECT count(*) FROM runs WHERE status = 'finished'") == [(2,)]


def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    store = tmp_path / "store"
    brought(store, "first", range(FIRST))
    with Store.open(store).writer():
        command = [sys.executable, "-m", "exegete.agent.cli", "label", "--store", str(store), "--explainer", "lexical"]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert re.search(rf"process {os.getpid()} is writing to the store", second.stderr)
    assert second.stderr.count("\n") == 1
