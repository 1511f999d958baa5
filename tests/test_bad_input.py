"""What is wrong is said in one line that quotes it and names the way out; status 2; nothing is written or damaged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from crashing import exegete, start, tables
from safetensors.numpy import load_file, save_file

from exegete.tools.bundled import dictionary_path, subject_path, write_corpus
from exegete.tools.store import Store

pytestmark = pytest.mark.slow
WEIGHTS = "sae_weights.safetensors"


def refusal(folder: Path, *arguments: str | Path) -> str:
    """Run `exegete ARGUMENTS`, which must be refused; return the one line that says why."""
    log = folder / "refused.log"
    status = exegete([str(argument) for argument in arguments], log)
    return the_one_line(status, log)


def the_one_line(status: int | None, log: Path) -> str:
    lines = log.read_text().splitlines()
    assert status == 2, lines
    said = [line for line in lines if line.startswith("exegete: ")]
    assert len(said) == 1 and said == lines[-1:], lines
    assert not any("Traceback" in line for line in lines)
    return said[0]


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file but the lock, which a refused writer may open."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "writer.lock"]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "requests.jsonl"
    write_corpus(file, 0, 300)
    return file


def settings(corpus: Path | str, *assignments: str) -> list[str]:
    chosen = ["subject.name=bundled", "dictionary.path=bundled:tests", f"corpus.source={corpus}"]
    small = ["evidence.slices=3", "label.limit=16", "label.floors=4", "label.batch=3", "label.concurrency=2"]
    return ["label", *(f"--set={assignment}" for assignment in [*chosen, *small, *assignments])]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert exegete([*settings(corpus), f"--store={folder / 'store'}"], folder / "log") == 0, (
        folder / "log"
    ).read_text()
    return folder / "store"


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(finished, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("subject.name=./no/model", ["'./no/model'", "config.json or a Hugging Face name"]),
        ("dictionary.path=./no/dictionary", ["'./no/dictionary'", "give a folder with"]),
        ("corpus.source=no/corpus.txt", ["'no/corpus.txt'", "give a file"]),
        ("corpus.source=pyproject.toml", ["'pyproject.toml'", "expected .txt"]),
        ("label.limmit=3", ["'label.limmit'", "Did you mean 'label.limit'?"]),
        ("label.explainer=lexicl", ["'lexicl'", "Did you mean 'lexical'?"]),
        ("label.judge=predicat", ["'predicat'", "Did you mean 'predicate'?"]),
        ('label.evaluators=["detecton"]', ["'detecton'", "Did you mean 'detection'?"]),
    ],
)
def test_what_is_missing_or_unknown(assignment: str, words: list[str], corpus: Path, tmp_path: Path) -> None:
    said = refusal(tmp_path, *settings(corpus, assignment), "--store", tmp_path / "store")
    assert all(word in said for word in words), said
    assert not (tmp_path / "store").exists()


def altered(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Return a copy of the bundled dictionary with configuration and weights changed."""
    shutil.copytree(dictionary_path("tests"), folder)
    configuration, weights = json.loads((folder / "cfg.json").read_text()), load_file(folder / WEIGHTS)
    change(configuration, weights)
    (folder / "cfg.json").write_text(json.dumps(configuration))
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, folder / WEIGHTS)
    return folder


def narrow(configuration: dict[str, Any], weights: dict[str, Any]) -> None:
    configuration["d_in"] = 64
    weights.update(W_enc=weights["W_enc"][:64], W_dec=weights["W_dec"][:, :64], b_dec=weights["b_dec"][:64])


def elsewhere(configuration: dict[str, Any], weights: dict[str, Any]) -> None:
    text = json.dumps(configuration)
    assert "blocks." in text
    layer = text.split("blocks.")[1].split(".")[0]
    configuration.update(json.loads(text.replace(f"blocks.{layer}.", "blocks.77.")))


def poisoned(configuration: dict[str, Any], weights: dict[str, Any]) -> None:
    weights["W_dec"][3, 5] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (narrow, ["64", "width"]),
        (elsewhere, ["no hook point 'blocks.77.", "for example"]),
        (poisoned, ["W_dec", "NaN"]),
    ],
)
def test_dictionaries_that_do_not_fit(change: Any, words: list[str], corpus: Path, tmp_path: Path) -> None:
    path = altered(tmp_path / "dictionary", change)
    said = refusal(tmp_path, *settings(corpus, f"dictionary.path={path}"), "--store", tmp_path / "store")
    assert all(word in said for word in words), said
    assert not (tmp_path / "store").exists()


def test_a_model_with_nan_weights(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(subject_path(), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    name = next(name for name in weights if name.endswith(".weight"))
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[7] = np.nan
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    said = refusal(tmp_path, *settings(corpus, f"subject.name={tmp_path / 'model'}"), "--store", tmp_path / "store")
    assert "NaN" in said and str(tmp_path / "model") in said
    assert not (tmp_path / "store").exists()


def test_empty_corpora_and_then_a_good_one(corpus: Path, finished: Path, tmp_path: Path) -> None:
    for text in ("", "\n\n  \n"):
        (tmp_path / "empty.txt").write_text(text)
        said = refusal(tmp_path, *settings(tmp_path / "empty.txt"), "--store", tmp_path / "store")
        assert "empty.txt" in said and "empty" in said
    assert exegete([*settings(corpus), f"--store={tmp_path / 'store'}"], tmp_path / "log") == 0
    assert tables(tmp_path / "store") == tables(finished)


def test_invalid_utf8_is_counted_and_the_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"].encode() for line in corpus.read_text().splitlines()]
    texts[10] += b" \xff\xfe"
    (tmp_path / "text.txt").write_bytes(b"\n\n".join(texts))
    log = tmp_path / "log"
    status = exegete([*settings(tmp_path / "text.txt"), f"--store={tmp_path / 'store'}"], log)
    assert status == 0, log.read_text()
    assert "invalid utf8 2," in log.read_text()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("part", ["slice-00001-of-00003/events.parquet", "selected.parquet"])
def test_a_truncated_part_of_the_pass(part: str, store: Path, corpus: Path, finished: Path, tmp_path: Path) -> None:
    shutil.rmtree(next(store.glob("evidence/*")))
    working = next(store.glob("passes/*"))
    truncate(working / part)
    said = refusal(tmp_path, *settings(corpus), "--store", store)
    assert part.split("/")[0] in said and "remove it and run again" in said
    damaged = working / part.split("/")[0]
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
    assert exegete([*settings(corpus), f"--store={store}"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert tables(store) == tables(finished)


def test_truncated_evidence(store: Path, corpus: Path, finished: Path, tmp_path: Path) -> None:
    folder = next(store.glob("evidence/*"))
    for name in ("items-00000", "latents", "windows", "vocabulary"):
        whole = (folder / f"{name}.parquet").read_bytes()
        truncate(folder / f"{name}.parquet")
        for command in (["label", "--set=label.limit=20"], ["show", "4"]):
            said = refusal(tmp_path, *command, "--store", store)
            assert name.split("-")[0] in said and folder.name in said, said
        (folder / f"{name}.parquet").write_bytes(whole)
    shutil.rmtree(folder)
    assert exegete([*settings(corpus), f"--store={store}"], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    again, before = tables(store), tables(finished)
    assert all(again[view] == before[view] for view in ("evidence", "latents", "scores", "verdicts", "examples"))


@pytest.mark.parametrize("which", [0, -1])
def test_a_truncated_part_of_verdicts(which: int, store: Path, tmp_path: Path) -> None:
    with duckdb.connect(str(store / "labels.duckdb"), read_only=True) as snapshot:
        parts = snapshot.execute("SELECT part FROM data.verdict_parts").fetchall()
    part = store / "verdicts" / parts[which][0]
    truncate(part)
    said = refusal(tmp_path, "sql", "SELECT count(*) FROM verdicts", "--store", store)
    assert part.name in said
    assert exegete(["sql", "SELECT count(*) FROM scores", f"--store={store}"], tmp_path / "log") == 0


def test_evidence_of_something_else(store: Path, corpus: Path, tmp_path: Path) -> None:
    before = tables(store)
    for change, words in {
        "seed=5": ["another corpus", "name another store"],
        "corpus.documents=250": ["another corpus", "name another store"],
        "evidence.firing=[30,30,90]": ["other settings", "firing was [40, 40, 100], now [30, 30, 90]"],
        "evidence.hard=[0,0,0]": ["other settings", "hard was"],
    }.items():
        said = refusal(tmp_path, *settings(corpus, change), "--store", store)
        assert all(word in said for word in words), said
        assert tables(store) == before, change
    assert exegete([*settings(corpus), f"--store={store}"], tmp_path / "log") == 0


def test_evidence_that_another_dictionary_left(store: Path, corpus: Path, tmp_path: Path) -> None:
    marker = next(store.glob("evidence/*/evidence.json"))
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"dictionary": "sha256:" + "0" * 64}))
    said = refusal(tmp_path, *settings(corpus), "--store", store)
    assert "another dictionary" in said and "name another store" in said


def test_a_store_from_a_newer_version(store: Path, corpus: Path, tmp_path: Path) -> None:
    with duckdb.connect(str(store / "run.duckdb")) as connection:
        connection.execute("INSERT INTO migrations VALUES (99, '0099_later.sql', 'x', TIMESTAMP '2030-01-01')")
    before = content(store)
    said = refusal(tmp_path, *settings(corpus), "--store", store)
    assert "schema 99" in said and "pip install -U exegete" in said
    assert content(store) == before
    (store / "store.json").write_text('{"format": 99}')
    assert "pip install -U exegete" in refusal(tmp_path, "sql", "SELECT 1", "--store", store)


def test_a_second_writer_learns_who_the_first_is(store: Path, corpus: Path, tmp_path: Path) -> None:
    before = content(store)
    with Store.open(store).writer():
        said = refusal(tmp_path, *settings(corpus), "--store", store)
        assert f"process {os.getpid()} is writing" in said and "wait until it ends" in said
    assert content(store).keys() >= before.keys()


def test_questions_to_a_store(store: Path, tmp_path: Path) -> None:
    before = content(store)
    for arguments, words in {
        ("show", "99999"): ["99999", "0 to 1023"],
        ("sql", "SELECT * FROM scors"): ["SELECT * FROM scors", 'Did you mean "scores"'],
        ("sql", "SELEKT 1"): ["SELEKT 1"],
        ("sql", "DROP TABLE data.scores"): ["DROP TABLE data.scores"],
    }.items():
        said = refusal(tmp_path, *arguments, "--store", store)
        assert all(word in said for word in words), said
    assert content(store) == before


@pytest.mark.parametrize("command", [["sql", "SELECT 1"], ["show", "1"], ["report"], ["status"], ["resume"]])
def test_questions_to_no_store(command: list[str], tmp_path: Path) -> None:
    said = refusal(tmp_path, *command, "--store", tmp_path / "none")
    assert str(tmp_path / "none") in said and "exegete label" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", [["label"], ["show", "1"], ["resume"]])
def test_questions_to_an_empty_store(command: list[str], tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "store").writer() as writer:
        writer.publish()
    said = refusal(tmp_path, *command, "--store", tmp_path / "store")
    assert str(tmp_path / "store") in said and "exegete " in said.removeprefix("exegete: "), said


@pytest.mark.parametrize("line", ['{"dictionary": "x"', '{"dictionary": "x", "latent": -1, "windows": []}', "[1]"])
def test_a_broken_file_of_evidence(line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    said = refusal(tmp_path, "evidence", "import", tmp_path / "bad.jsonl", "--store", tmp_path / "store")
    assert "bad.jsonl:1" in said
    assert not (tmp_path / "store").exists()


def full_disk(arguments: Sequence[str], log: Path, when: Callable[[str], bool]) -> str:
    """Run until `when` (of what was said) is true, let no file grow from then on, and return the refusal."""
    process = start(arguments, log)
    deadline = time.monotonic() + 120
    while not (log.exists() and when(log.read_text())):
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)
    assert process.pid is not None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8_192, 8_192))
    process.join(120)
    return the_one_line(process.exitcode, log)


def test_a_full_disk_at_every_stage_and_then_room(corpus: Path, finished: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "full.log"
    arguments = [*settings(corpus), f"--store={store}"]
    stages: dict[str, Callable[[str], bool]] = {
        "corpus": lambda said: "loading" in said and (store / "corpora").exists(),
        "pass": lambda said: "corpus:" in said,
        "merge": lambda said: "merging" in said,
        "labeling": lambda said: any(store.glob("evidence/*/evidence.json")),
        "floors": lambda said: "labeling: 16 of 16" in said,
    }
    for stage, when in stages.items():
        said = full_disk(arguments, log, when)
        assert str(store) in said or "no room left" in said, (stage, said)
        assert any(words in said for words in ("free some", "run again", "File too large")), (stage, said)
    assert exegete(arguments, log) == 0, log.read_text()
    assert tables(store) == tables(finished)
