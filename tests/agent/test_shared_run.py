"""A labeling run on a subject that others of its process run as well."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_model_server import Running, serving

import exegete
from exegete.agent.config import DictionaryConfig, RunConfig, SubjectConfig, load_config
from exegete.agent.investigation.shared_model import Sharing
from exegete.agent.live import Live, Wanted, inputs_of, open_live
from exegete.agent.progress import Lines
from exegete.agent.run import run
from exegete.tools.bundled import write_corpus
from exegete.tools.errors import UserError
from exegete.tools.live_model import Trial


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(answer="oracle", otherwise="never", rate=0.05) as running:
        yield running


@pytest.fixture(scope="module")
def live() -> Live:
    return open_live(Wanted(subject="bundled", dictionary="bundled:tests"))


def config(store: Path, source: Path, **more: Any) -> RunConfig:
    chosen = {
        "subject.name": "bundled", "dictionary.path": "bundled:tests", "corpus.source": str(source), "store": str(store),
        "evidence.firing": [12, 12, 12], "evidence.random": [12, 12, 12], "label.limit": 4, "label.floors": 0,
        "label.evaluator_options": {"intervention": {"steering": {"prompts": 4, "tokens": 3, "batches": 4}}},
    }  # fmt: skip
    return load_config(None, (), chosen | more)


def quiet() -> Lines:
    return Lines(io.StringIO(), every_s=1e9)


def tables(store: Path) -> tuple[list[Any], list[Any]]:
    with exegete.connect(store) as connection:
        words = connection.execute("SELECT latent, text FROM explanations ORDER BY ALL").fetchall()
        scores = "SELECT latent, evaluator, metric, status, n, value, low, high FROM scores ORDER BY ALL"
        return words, connection.execute(scores).fetchall()


def test_it_writes_the_same_tables_and_leaves_the_model_to_the_others(
    server: Running, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXEGETE_API_KEY", "none")
    write_corpus(tmp_path / "requests.jsonl", 0, 600)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run(config(alone, tmp_path / "requests.jsonl"), quiet()).finished  # Leaves its evidence.
    shutil.copytree(alone, together)
    judge = server.spec("openai", "judge")
    asked: dict[str, Any] = {"models.explainer": judge, "models.judge": judge, "label.explainer": "one-shot"}
    asked |= {"label.evaluators": ["detection", "intervention"]}
    assert run(config(alone, tmp_path / "requests.jsonl", **asked), quiet()).finished
    with Sharing(live) as sharing:
        outcome = run(config(together, tmp_path / "requests.jsonl", **asked), quiet(), sharing=sharing)
        assert outcome.finished and sharing.statistics.trials > 50
        assert len(sharing.live().model.run([Trial((1, 2, 3))], lambda reading: [0.0])) == 1
    (words, scores), (expected_words, expected) = tables(together), tables(alone)
    assert words == expected_words and len(scores) == len(expected) > 4
    for one, other in zip(scores, expected, strict=True):
        assert one[:5] == other[:5] and one[5:] == pytest.approx(other[5:], abs=1e-3)


@pytest.mark.parametrize(
    ("subject", "dictionary", "words"),
    [
        (SubjectConfig(name="gpt2"), "bundled:tests", "the shared subject is 'bundled' on cpu in float32.*'gpt2'"),
        (SubjectConfig(name="bundled", dtype="bfloat16"), "bundled:tests", "in bfloat16"),
        (SubjectConfig(name="bundled"), "bundled:demo", "the shared dictionary is 'bundled:tests'.*'bundled:demo'"),
    ],
)
def test_only_what_the_configuration_names_is_shared(
    live: Live, subject: SubjectConfig, dictionary: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        inputs_of(live, subject, DictionaryConfig(path=dictionary))


def test_a_run_that_would_not_use_it_says_so(live: Live, tmp_path: Path) -> None:
    with Sharing(live) as sharing, pytest.raises(UserError, match="nothing runs what is shared"):
        run(load_config(None, (), {"store": str(tmp_path / "store")}), quiet(), sharing=sharing)
