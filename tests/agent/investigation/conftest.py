"""A bench over the bundled subject: minimal pairs of one behaviour, with the dictionary that the tests have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exegete.agent.investigation.bench import Bench
from exegete.agent.investigation.contract import Case, Metric
from exegete.agent.live import Live, Wanted, open_live
from exegete.tools.bundled import dictionary_path, sample_texts, subject_path, write_corpus
from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.dictionaries import Dictionary
from exegete.tools.dictionary_loaders import load_dictionary
from exegete.tools.live_model import LiveModel
from exegete.tools.store import Store
from exegete.tools.subject import Subject, load_subject

PAIRS = 20
"""Minimal pairs of a bench."""
TEXTS = 60
"""Other texts of the grammar beside them."""


@pytest.fixture(scope="session")
def subject() -> Subject:
    return load_subject(str(subject_path()))


@pytest.fixture(scope="session")
def dictionary(subject: Subject) -> Dictionary:
    return load_dictionary(str(dictionary_path("tests")), subject)


@pytest.fixture(scope="session")
def cases() -> tuple[Case, ...]:
    """The minimal pairs of `order.DESC`: the request says `descending` where its variant says `ascending`, and the like."""
    return cases_of("order.DESC")


@pytest.fixture(scope="session")
def held_out(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Ten minimal pairs of the same behaviour that the bench has not."""
    fresh = [case for case in cases_of("order.DESC", 16, seed=41) if case not in cases]
    return tuple(fresh[:10])


@pytest.fixture
def bench(subject: Subject, dictionary: Dictionary, cases: tuple[Case, ...]) -> Bench:
    """Search prompts that end before ` DESC`, measured by its logit less that of ` ASC`; no store, no judge."""
    live = Live(LiveModel(subject, [dictionary]), dictionary, None)
    return Bench(live, cases, Metric("log_odds"), seed=5, texts=tuple(sample_texts(77, TEXTS)))


@pytest.fixture(scope="session")
def labeled_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the evidence of the dictionary, twenty labels with floors, and embeddings of `AxisEmbedder`."""
    from searched_store import AxisEmbedder, embed

    from exegete.agent.config import load_config
    from exegete.agent.run import run

    folder = tmp_path_factory.mktemp("labeled")
    write_corpus(folder / "requests.jsonl", 0, 120)
    chosen = {"subject.name": "bundled", "dictionary.path": "bundled:tests", "label.limit": 20, "label.floors": 5}
    where = {"corpus.source": str(folder / "requests.jsonl"), "store": str(folder / "store")}
    run(load_config(None, (), {**chosen, **where}))
    with Store.open(folder / "store").writer() as writer:
        embed(writer, AxisEmbedder())
        writer.publish()
    return folder / "store"


@pytest.fixture(scope="session")
def labeled_live(labeled_store: Path) -> Live:
    return open_live(Wanted(store=labeled_store))


@pytest.fixture
def labeled_bench(bench: Bench, labeled_live: Live) -> Bench:
    """The same bench with a store."""
    return replace(bench, live=labeled_live)


def cases_of(behaviour: str, count: int = PAIRS, seed: int = 3) -> tuple[Case, ...]:
    """Return the minimal pairs of a behaviour of the bundled language as cases."""
    chosen = next(one for one in behaviours() if one.name == behaviour)
    return tuple(
        Case("".join(pair.base), pair.base_answer, pair.variant_answer, "".join(pair.variant))
        for pair in chosen.pairs(seed, count)
    )
