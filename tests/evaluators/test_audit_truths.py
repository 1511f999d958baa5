"""Planted truths and their corruptions, worked by hand."""

from __future__ import annotations

import numpy as np

from exegete.evaluators.audit_evidence import Pool, evidence, fired
from exegete.evaluators.audit_truths import Place, Sense, Truth, corrupted, misplaced, narrow, without_a_sense
from exegete.tools.predicates import parse
from exegete.tools.windows import LatentEvidence, Split

ARTICLE, THE = (
    Place('before(1): token is " a"', "right after a"),
    Place('before(1): token is " the"', "right after the"),
)
ANIMALS = ("cat", "dog", "hen", "cow", "fox")
PETS = Sense("Pets", ("cat", "dog", "hen", "cow"), "Animals", ANIMALS, ARTICLE, THE)
COLOURS = Sense("Colours", ("red", "blue"), "Adjectives", ("red", "blue", "big"))
TOKENS = (" a", " cat", " the", " dog", " fox", " red", " big")


def held(source: str | None) -> list[int]:
    assert source is not None
    return np.flatnonzero(parse(source).matches(TOKENS)).tolist()


def explained(truth: Truth) -> list[int]:
    return held(truth.explanation().predicate)


def test_text_and_predicate_say_the_same() -> None:
    said = Truth("pets", (PETS,)).explanation()
    assert said.text == "Pets: cat, dog, hen, cow; right after a."
    assert said.predicate == 'word in {"cat", "dog", "hen", "cow"} and before(1): token in {" a"}'
    both = Truth("both", (PETS, COLOURS)).explanation(begin="Makes likelier: ")
    assert both.text == "Makes likelier: Pets: cat, dog, hen, cow; right after a. Also: Colours: red, blue."
    assert held(both.predicate) == [1, 5]


def test_each_corruption_holds_where_it_should() -> None:
    truths = {0: Truth("both", (PETS, COLOURS)), 1: Truth("colours", (COLOURS,)), 2: Truth("pets", (PETS,))}
    texts: dict[Split, list[tuple[str, ...]]] = {"explain": [TOKENS] * 3, "test": [TOKENS]}
    pool = Pool(texts, None)
    known = {n: evidence(n, truth, pool, fired(truth, texts, 0), 2, 0) for n, truth in truths.items()}
    wrong = corrupted(truths, known, 0)
    assert held(wrong[0]["too_broad"].predicate) == [1, 3, 4, 5, 6]
    assert held(wrong[0]["wrong_context"].predicate) == [3, 5]
    assert held(wrong[0]["missing_sense"].predicate) in ([1], [5])
    assert set(wrong[1]) == {"too_broad", "too_narrow", "sibling", "shuffled"}
    assert wrong[1]["sibling"].text == truths[0].explanation().text
    assert wrong[2]["shuffled"].text != truths[2].explanation().text
    assert all(said.explainer == name for given in wrong.values() for name, said in given.items())


def test_half_of_the_words_are_left_of_a_narrow_explanation() -> None:
    (sense,) = narrow(Truth("pets", (PETS,)), 0).senses
    assert len(sense.words) == 2 and set(sense.words) < set(PETS.words) and sense.place == ARTICLE
    drawn = {narrow(Truth("pets", (PETS,)), seed).senses[0].words for seed in range(20)}
    assert len(drawn) > 2


def test_what_a_truth_does_not_allow_is_left_out() -> None:
    assert misplaced(Truth("colours", (COLOURS,))) is None and without_a_sense(Truth("pets", (PETS,)), 0) is None
    assert explained(Truth("pets", (PETS,))) == [1]


def test_a_twin_is_no_corruption() -> None:
    twins = {n: Truth(f"colours {n}", (COLOURS,)) for n in range(2)}
    texts: dict[Split, list[tuple[str, ...]]] = {"explain": [TOKENS]}
    pool = Pool(texts, None)
    known = {n: evidence(n, truth, pool, fired(truth, texts, 0), 2, 0) for n, truth in twins.items()}
    assert set(corrupted(twins, known, 0)[0]) == {"too_broad", "too_narrow"}


def of_cats() -> LatentEvidence:
    """Windows of two tokens: ` a cat` fires, ` the cat` is hard, ` the sun` is not."""
    run = (" a", " cat", " the", " cat", " the", " sun", " an", " ox") * 12
    truth = Truth("pets", (PETS,))
    texts: dict[Split, list[tuple[str, ...]]] = {"test": [run]}
    pool = Pool(texts, 2)
    return evidence(7, truth, pool, pool.activations(fired(truth, texts, 0)), 10, 0)


def test_evidence_is_what_the_predicate_fires_on() -> None:
    found = of_cats()
    kinds = {kind: [w for w in found.windows if w.kind == kind] for kind in ("firing", "random", "hard")}
    assert {kind: len(windows) for kind, windows in kinds.items()} == {"firing": 10, "random": 10, "hard": 8} or len(
        kinds["hard"]
    ) <= 10
    assert all(w.tokens == (" a", " cat") and w.firing_positions() == (1,) for w in kinds["firing"])
    assert all(w.tokens == (" the", " cat") for w in kinds["hard"])
    assert all(not w.fires and w.peak == 0 for kind in ("random", "hard") for w in kinds[kind])
    assert sorted(w.stratum or 0 for w in kinds["firing"]) == list(range(10))
    assert all(0.5 <= (w.peak or 0) <= 1.5 for w in kinds["firing"])
    assert found.statistics["window_density"] == 0.25 and found.statistics["density"] == 0.125
    assert len({w.id for w in found.windows}) == len(found.windows)


def test_a_predicate_sees_what_stands_before_the_window() -> None:
    truth = Truth("pets", (PETS,))
    texts: dict[Split, list[tuple[str, ...]]] = {"test": [(" x", " a", " cat", " y")]}
    pool = Pool(texts, 2)
    found = evidence(7, truth, pool, pool.activations(fired(truth, texts, 0)), 5, 0)
    assert [w.tokens for w in found.windows if w.fires] == [(" cat", " y")]
