"""Which subject and dictionary a command runs, and whose labels stand beside its latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exegete.agent.config import load_config
from exegete.agent.live import Wanted, open_live, read_records, read_texts
from exegete.agent.run import run
from exegete.tools.bundled import dictionary_path, subject_path, write_corpus
from exegete.tools.errors import UserError


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a few labels of the bundled dictionary for tests."""
    folder = tmp_path_factory.mktemp("labeled")
    write_corpus(folder / "requests.jsonl", 0, 120)
    chosen = {"subject.name": "bundled", "dictionary.path": "bundled:tests", "label.limit": 20, "label.floors": 2}
    run(
        load_config(
            None, (), {**chosen, "corpus.source": str(folder / "requests.jsonl"), "store": str(folder / "store")}
        )
    )
    return folder / "store"


def test_without_options_the_bundled_demo_runs() -> None:
    live = open_live(Wanted())
    assert live.model.subject.name == "bundled"
    assert live.dictionary.hook_point == "blocks.1.hook_resid_post"
    assert live.label(3) == "" and live.rates() is None
    assert live.origin["store"] is None and live.origin["fingerprint"] == live.dictionary.fingerprint


def test_a_store_names_its_model_and_gives_labels_and_rates(labeled: Path) -> None:
    live = open_live(Wanted(store=labeled))
    assert 0 < len(live.labels) <= 20
    assert all(live.label(latent) for latent in live.labels)
    rates = live.rates()
    assert rates is not None and rates.shape == (1024,) and 0 < rates.mean() < 0.1


def test_labels_of_another_dictionary_are_refused(labeled: Path) -> None:
    with pytest.raises(UserError, match="is not the store's"):
        open_live(Wanted(store=labeled, subject="bundled", dictionary="bundled:demo"))


def test_options_and_configurations_name_the_model(tmp_path: Path) -> None:
    named = open_live(Wanted(subject=str(subject_path()), dictionary=str(dictionary_path("tests"))))
    config = tmp_path / "run.toml"
    config.write_text('[subject]\nname = "bundled"\n[dictionary]\npath = "bundled:tests"\n')
    assert open_live(Wanted(config=config)).dictionary.fingerprint == named.dictionary.fingerprint


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted(subject="bundled"), "--dictionary"),
        (Wanted(store=Path("nowhere")), "nowhere"),
        (Wanted(config=Path("none.toml")), "none.toml"),
        (Wanted(subject="/no/such/model", dictionary="bundled:demo"), "/no/such/model"),
        (Wanted(device="cuda:77"), "cuda:77"),
        (Wanted(dtype="float7"), "float7"),
    ],
)
def test_what_is_not_there_is_quoted(wanted: Wanted, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_live(wanted)


def test_texts_are_read_from_lines_and_records(tmp_path: Path) -> None:
    plain, records = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("one\n\ntwo\\n\n")
    records.write_text('{"text": "a\\nb", "label": 1}\n{"prompt": "c"}\n')
    assert read_texts(plain) == ["one", "two\\n"]
    assert read_records(records) == [("a\nb", {"text": "a\nb", "label": 1}), ("c", {"prompt": "c"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": 3}\n', "line 1"),
        ("a.jsonl", json.dumps({"text": "x"}) + "\n[1]\n", "line 2"),
        ("a.jsonl", "{broken\n", "broken"),
        ("a.txt", "\n\n", "no text"),
        ("a.txt", "a\nb\nc\n", "at most 2"),
    ],
)
def test_broken_texts(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_texts(tmp_path / name, 2)


def test_a_missing_file_of_texts() -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        read_texts(Path("nowhere.txt"))
