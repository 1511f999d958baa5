"""SIGKILL at twenty points of a run, and at the end the tables of a run that nobody disturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pytest
from crashing import FORKS, exegete, hold_one_reader_open, query_again_and_again, start, tables

LIMIT, FLOORS = 160, 40
CONFIG = """
store = "{store}"
[subject]
name = "bundled"
[dictionary]
path = "bundled:tests"
[corpus]
source = "bundled"
documents = 600
[label]
limit = {limit}
floors = {floors}
"""
SMALL_STEPS = ["evidence.slices=6", "label.batch=6", "label.concurrency=3", "label.publish_seconds=0.3"]
"""Many pieces, none of which changes the result."""


@dataclass
class Killer:
    """Starts the run again and again in one store, and kills each where it is told to."""

    folder: Path
    random: random.Random
    hits: list[str] = field(default_factory=list)
    """The stage in which each kill hit, by what the dead run left behind."""

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def arguments(self) -> list[str]:
        return ["label", str(self.folder / "run.toml"), *(f"--set={step}" for step in SMALL_STEPS)]

    def kill(self, when: Callable[[], bool], within_s: float) -> None:
        """Kill a run at a random time within `within_s` after `when` is true."""
        self.log.unlink(missing_ok=True)
        process = start(self.arguments(), self.log)
        deadline = time.monotonic() + 120
        while not when():
            assert process.is_alive(), f"the run ended by itself: {self.said()}"
            assert time.monotonic() < deadline, f"nothing happened: {self.said()}"
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, within_s))
        assert process.is_alive(), f"the run ended by itself: {self.said()}"
        assert process.pid is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        self.hits.append(self.stage())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def says(self, words: str) -> Callable[[], bool]:
        return lambda: words in self.said()

    def touches_corpora(self) -> Callable[[], bool]:
        folder, found = self.store / "corpora", (self.store / "corpora").exists()
        before = folder.stat().st_mtime_ns if found else 0
        return lambda: "loading" in self.said() and folder.exists() and folder.stat().st_mtime_ns > before

    def slices(self, count: int) -> Callable[[], bool]:
        return lambda: "corpus:" in self.said() and len(list(self.store.glob("passes/*/slice-*"))) >= count

    def parts(self, words: str, count: int) -> Callable[[], bool]:
        """`count` parts of verdicts more than now, after `words`."""
        before = self._parts()
        return lambda: words in self.said() and len(self._parts() - before) >= count

    def _parts(self) -> set[str]:
        return {path.name for path in self.store.glob("verdicts/[!.]*.parquet")}

    def stage(self) -> str:
        """Return what a run that goes on now would do first."""
        if not list(self.store.glob("corpora/*/corpus.json")):
            return "corpus"
        if not list(self.store.glob("passes/*/verified.parquet")):
            return "pass"
        if not list(self.store.glob("evidence/*/evidence.json")):
            return "merge"
        labeled, floors = self._recorded()
        return "labeling" if labeled < LIMIT else "floors" if floors < FLOORS else "end"

    def _recorded(self) -> tuple[int, int]:
        """Count labeled latents and floors, in a copy: opening the database would recover it."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for path in self.store.glob("run.duckdb*"):
            shutil.copy(path, copy)
        with duckdb.connect(str(copy / "run.duckdb")) as connection:
            query = "SELECT (SELECT count(*) FROM data.results), (SELECT count(*) FROM data.floors)"
            [(labeled, floors)] = connection.execute(query).fetchall()
        return labeled, floors


def kill_everywhere(killer: Killer) -> None:
    for _ in range(2):
        killer.kill(killer.touches_corpora(), 0.02)
    for complete in range(6):
        killer.kill(killer.slices(complete), 0.03)
    for within_s in (0.02, 0.1, 0.2):
        killer.kill(killer.says("merging the evidence"), within_s)
    for _ in range(6):
        killer.kill(killer.parts("merging" if not killer.hits.count("labeling") else "corpus:", 2), 0.05)
    for new in (0, 1, 2):
        killer.kill(killer.parts(f"labeling: {LIMIT} of {LIMIT}", new), 0.05)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two processes that read tmp_path/store throughout; they write what they saw when tmp_path/stop is made."""
    files = tmp_path / "fresh.json", tmp_path / "kept.json"
    readers = [
        FORKS.Process(target=target, args=(tmp_path / "store", tmp_path / "stop", file))
        for target, file in zip((query_again_and_again, hold_one_reader_open), files, strict=True)
    ]
    for reader in readers:
        reader.start()
    yield files
    for reader in readers:
        reader.kill()
        reader.join()


def findings(file: Path) -> dict[str, Any]:
    import json

    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, f"the reader never wrote {file.name}"
        time.sleep(0.1)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
def test_twenty_kills_leave_the_tables_of_an_undisturbed_run(tmp_path: Path, watched: tuple[Path, Path]) -> None:
    for name in ("store", "undisturbed"):
        content = CONFIG.format(store=tmp_path / name, limit=LIMIT, floors=FLOORS)
        (tmp_path / ("run.toml" if name == "store" else "undisturbed.toml")).write_text(content)
    killer = Killer(tmp_path, random.Random(0))
    kill_everywhere(killer)
    counts = Counter(killer.hits)
    assert len(killer.hits) == 20
    assert counts["corpus"] >= 1 and counts["pass"] >= 5 and counts["merge"] >= 2, counts
    assert counts["labeling"] >= 6 and counts["floors"] >= 2, counts

    assert exegete(killer.arguments(), killer.log) == 0, killer.said()
    log = tmp_path / "undisturbed.log"
    assert exegete(["label", str(tmp_path / "undisturbed.toml")], log) == 0, log.read_text()
    disturbed, undisturbed = tables(killer.store), tables(tmp_path / "undisturbed")
    for view, rows in undisturbed.items():
        assert rows, view
        assert disturbed[view] == rows, view

    (tmp_path / "stop").touch()
    fresh, kept = (findings(file) for file in watched)
    assert not fresh["wrong"]
    assert fresh["queries"] >= 20 and len(fresh["counts"]) >= 5, fresh
    assert kept["queries"] >= 20 and len(kept["counts"]) == 1, kept
