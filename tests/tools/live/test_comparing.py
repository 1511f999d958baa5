"""Comparing sets of texts: hand-worked p-values, straightforward implementations, null and planted differences."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from exegete.tools.bundled import subject_path
from exegete.tools.bundled.grammar import generate
from exegete.tools.comparing import Comparison, Method, compare, compare_prompts, compare_subjects, require_shared
from exegete.tools.dictionaries import Dictionary, OpaqueDictionary, PlainDictionary
from exegete.tools.effect_sizes import effect_sizes
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel
from exegete.tools.permutation_tests import STOP, Labels, max_t, scores, sequential, smallest_log_p
from exegete.tools.seeds import generator
from exegete.tools.subject import Subject, load_subject

Array = NDArray[np.float64]


def column(*values: float) -> Array:
    return np.array(values, float)[:, None]


def sparse_latents(texts: int, latents: int, seed: int) -> Array:
    """Activations that are sparse, skewed and correlated: a few topics switch groups of latents on."""
    rng = generator(seed, "sparse latents")
    topics = rng.random((texts, 8)) < 0.3
    loud = topics @ (rng.random((8, latents)) < 0.3)
    fires = rng.random((texts, latents)) < 1 - np.exp(-0.5 * loud)
    activations: Array = fires * rng.lognormal(0.0, 1.0, (texts, latents)) * (1 + loud)
    return activations


@pytest.fixture(scope="module")
def model(subject: Subject, dictionary: Dictionary) -> LiveModel:
    return LiveModel(subject, [dictionary])


# Hand-worked


def test_two_sets_of_three_have_twenty_arrangements() -> None:
    found = compare(column(4, 5, 6), column(1, 2, 3), fdr=0.2)
    (row,) = found.discoveries
    assert (found.exact, found.permutations, found.resolution) == (True, 20, 1 / 20)
    assert row.p == row.q == 2 / 20
    assert (row.mean_first, row.mean_second, row.effect, row.auroc) == (5, 2, 3, 1)
    assert (row.rate_first, row.rate_second, row.n_first, row.n_second) == (1, 1, 3, 3)
    # S is 15, 10.5 on average; its variance n₁n₂/(n(n−1)) · Σ(x−x̄)² is 9/30 · 17.5.
    assert row.score == pytest.approx(4.5 / math.sqrt(5.25))


def test_a_middling_difference_counts_the_arrangements_as_good() -> None:
    # Sums of two of 0, 1, 2, 10: 1, 2, 10, 3, 11, 12; the mean is 6.5, and 10 lies 3.5 from it, as all but 3 do at least.
    found = compare(column(0, 10), column(1, 2), fdr=0.9)
    assert found.rows()[0].p == pytest.approx(6 / 6)
    assert compare(column(1, 10), column(0, 2), fdr=0.9).rows()[0].p == pytest.approx(4 / 6)


def test_pairs_flip_signs() -> None:
    base = column(5, 6, 7)
    # The differences 2, 3, −1 sum to 4; of the eight sums ±2±3±1, four are as large: ±4 and ±6.
    found = compare(base + column(2, 3, -1), base, design="pairs", fdr=0.6)
    assert (found.permutations, found.rows()[0].p) == (8, 4 / 8)
    assert compare(base + column(2, 3, 1), base, design="pairs", fdr=0.3).rows()[0].p == 2 / 8


def test_strata_exchange_within_groups_only() -> None:
    # Sums of one of 9, 1, 2 and one of 8, 3, 4 average 9; none but 17 lies 8 from that.
    groups = (["a", "b"], ["a", "a", "b", "b"])
    found = compare(column(9, 8), column(1, 2, 3, 4), design="strata", groups=groups, fdr=0.2)
    assert found.permutations == 9
    assert found.rows()[0].p == pytest.approx(1 / 9)


def test_clusters_count_once() -> None:
    groups = (["a", "a", "b", "c"], ["d", "e", "e", "f"])
    found = compare(column(3, 5, 5, 6), column(1, 2, 2, 3), design="clusters", groups=groups, fdr=0.2)
    alone = compare(column(4, 5, 6), column(1, 2, 3), fdr=0.2)
    assert found.rows() == alone.rows()
    assert (found.n_first, found.n_second) == (3, 3)


def test_effects_and_their_intervals() -> None:
    first, second = column(1, 2, 3, 6), column(0, 0, 2, 2)
    found = effect_sizes(csr_matrix(np.vstack([first, second])), np.arange(8) < 4)
    # Squared distances 4 + 1 + 0 + 9 and 1 + 1 + 1 + 1: a pooled variance of 18 / 6.
    assert found["effect"][0] == pytest.approx(2 / math.sqrt(3))
    # Of the 16 pairs of texts 11 favour the first; 1 < 2 twice; 2 = 2 twice.
    assert found["auroc"][0] == pytest.approx((2 + 2 + 2 * 0.5 + 4 + 4) / 16)
    assert found["rate_second"][0] == 0.5
    assert found["low"][0] < found["effect"][0] < found["high"][0]
    constant = effect_sizes(csr_matrix([[0.1, 0.1], [0.1, 0.1], [0.1, 0.0], [0.1, 0.0]]), np.arange(4) < 2)
    assert constant["effect"].tolist() == [0.0, math.inf]


@pytest.mark.parametrize("pairs", [False, True])
def test_intervals_hold_the_true_effect_as_often_as_they_say(pairs: bool) -> None:
    rng = generator(5, "intervals")
    shared = rng.normal(size=(60, 2_000)) if pairs else 0.0
    units = np.vstack([rng.normal(0.5, 1, (60, 2_000)) + shared, rng.normal(0, 1, (60, 2_000)) + shared])
    found = effect_sizes(csr_matrix(units), np.arange(120) < 60, pairs=pairs)
    true = 0.5 / math.sqrt(2 if pairs else 1)
    held = ((found["low"] <= true) & (true <= found["high"])).mean()
    # 2,000 latents: a standard error of 0.005.
    assert 0.93 <= held <= 0.97


def test_what_a_latents_firings_allow() -> None:
    labels = Labels(np.arange(10) < 5, np.zeros(10, np.int64))
    fires = np.zeros((10, 3))
    fires[:3, 0] = fires[:7, 1] = 1
    bound = np.exp(smallest_log_p(csr_matrix(fires), labels))
    # Three on one side: 2 · C(7, 2) / C(10, 5); seven fill a side, and its mirror image; none.
    np.testing.assert_allclose(bound, [2 * 21 / 252, 2 / 252, 1.0])
    found, _ = scores(csr_matrix(fires[:, :1]), labels)
    assert max_t(found, labels, 252, 0).p[0] == pytest.approx(bound[0])
    pairs = Labels(np.arange(10) < 5, np.tile(np.arange(5), 2))
    assert math.exp(smallest_log_p(csr_matrix(fires[:, :1]), pairs)[0]) == pytest.approx(2 / 8)


def test_rare_and_constant_latents_are_counted_not_tested() -> None:
    activations = sparse_latents(40, 5, 1)
    activations[:, 0], activations[:, 1], activations[:, 2] = 0, 1, 0
    activations[:2, 2] = 3
    found = compare(activations[:20], activations[20:])
    assert (found.latents, found.firing, found.tested) == (5, 4, 2)
    assert found.columns["latent"].tolist() == [3, 4]


def test_rounding_is_no_difference() -> None:
    # What a batch's shape does to a latent that is the same everywhere.
    noise = np.repeat([0.0, 1e-5], 20)[:, None]
    assert compare(5 + noise[:20], 5 + noise[20:]).tested == 0
    assert compare(5 + noise[:20], 5 + noise[20:], rounding=1e-7).discoveries
    single = effect_sizes(csr_matrix(np.full((600, 1), 32.66, np.float32)), np.arange(600) < 290)
    assert single["effect"].tolist() == [0.0]


# Against straightforward implementations


def arrangement_scores(x: Array, labels: Array) -> Array:
    """|correlation| of each latent with each arrangement's labels: another road to the order of the scores."""
    x = x - x.mean(0)
    y = labels - labels.mean(0)
    found: Array = np.abs(x.T @ y) / np.sqrt((x**2).sum(0)[:, None] * (y**2).sum(0))
    return found


def westfall_young(x: Array, first: Array, arrangements: Array) -> Array:
    """Step-down adjusted p-values as the algorithm says them, one latent and arrangement after the other."""
    seen = arrangement_scores(x, first[:, None])[:, 0]
    permuted = arrangement_scores(x, arrangements)
    order = np.argsort(-seen)
    adjusted = np.zeros(len(order))
    for rank, latent in enumerate(order):
        counts = [max(permuted[k, b] for k in order[rank:]) >= seen[latent] - 1e-9 for b in range(permuted.shape[1])]
        adjusted[latent] = max(np.mean(counts), adjusted[order[rank - 1]] if rank else 0.0)
    return adjusted


def test_max_t_is_westfall_and_youngs() -> None:
    x = sparse_latents(11, 9, 3)
    first = np.arange(11) < 5
    every = np.zeros((11, 462))
    for index, chosen in enumerate(itertools.combinations(range(11), 5)):
        every[list(chosen), index] = 1
    found = compare(x[:5], x[5:], permutations=10_000, fdr=0.9)
    tested = found.columns["latent"]
    assert found.exact
    assert len(tested) >= 4
    np.testing.assert_allclose(found.columns["q"], westfall_young(x[:, tested], first.astype(float), every))
    assert (np.diff(found.columns["q"][np.argsort(-np.abs(found.columns["score"]))]) >= 0).all()


@pytest.mark.parametrize("design", ["texts", "pairs"])
def test_drawn_arrangements_are_uniform_and_shared(design: str) -> None:
    strata = np.zeros(6, np.int64) if design == "texts" else np.tile(np.arange(3), 2)
    labels = Labels(np.arange(6) < 3, strata)
    assert labels.arrangements == (20 if design == "texts" else 8)
    drawn = np.hstack(list(labels.drawn(10_000, 4)))
    listed = np.hstack(list(labels.listed()))
    counts = np.array([(drawn == one[:, None]).all(0).sum() for one in listed.T])
    assert counts.sum() == 10_000
    expected = 10_000 / labels.arrangements
    assert (np.abs(counts - expected) < 5 * math.sqrt(expected)).all()
    np.testing.assert_array_equal(np.hstack(list(labels.drawn(300, 4))), drawn[:, :300])


def test_sequential_p_values_stop_where_they_say() -> None:
    x = sparse_latents(60, 30, 6)
    x = csr_matrix(x[:, x.any(0)])
    labels = Labels(np.arange(60) < 30, np.zeros(60, np.int64))
    found, _ = scores(x, labels)
    drawn = np.hstack(list(labels.drawn(1_500, 7)))
    higher = arrangement_scores(x.toarray(), drawn) >= np.abs(found.seen[:, None]) / math.sqrt(59) - 1e-9
    expected = [
        STOP / (1 + int((row.cumsum() >= STOP).argmax())) if row.sum() >= STOP else (row.sum() + 1) / 1_501
        for row in higher
    ]
    np.testing.assert_allclose(sequential(found, labels, 1_500, 7).p, expected)
    np.testing.assert_allclose(max_t(found, labels, 1_500, 7).p, (higher.sum(1) + 1) / 1_501)
    assert {row.sum() >= STOP for row in higher} == {True, False}


def same(one: Comparison, other: Comparison) -> None:
    for name, values in one.columns.items():
        np.testing.assert_allclose(values, other.columns[name], err_msg=name)


@pytest.mark.parametrize("method", ["maxt", "bh"])
def test_blocks_sparsity_and_order_of_texts_within_a_side_change_nothing(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = sparse_latents(50, 40, 8)
    x[:, ::2] *= generator(1, "thin").random((50, 20)) < 0.1
    whole = compare(x[:25], x[25:], method=method, permutations=700, seed=3)
    same(whole, compare(csr_matrix(x[:25]), csr_matrix(x[25:]), method=method, permutations=700, seed=3))
    monkeypatch.setattr("exegete.tools.permutation_tests._ENTRIES", 3 * 256)
    monkeypatch.setattr("exegete.tools.effect_sizes._ENTRIES", 3 * 50)
    same(whole, compare(x[:25], x[25:], method=method, permutations=700, seed=3))
    monkeypatch.setattr("exegete.tools.permutation_tests._DENSE", 2.0)
    same(whole, compare(x[:25], x[25:], method=method, permutations=700, seed=3))


def test_exchanging_the_sides_changes_the_sign_only() -> None:
    x = sparse_latents(16, 12, 9)
    one, other = compare(x[:6], x[6:], fdr=0.5), compare(x[6:], x[:6], fdr=0.5)
    assert one.exact
    np.testing.assert_allclose(one.columns["p"], other.columns["p"])
    np.testing.assert_allclose(one.columns["effect"], -other.columns["effect"])
    np.testing.assert_allclose(one.columns["auroc"], 1 - other.columns["auroc"])


# Calibration


@pytest.mark.parametrize("method", ["maxt", "bh"])
@pytest.mark.parametrize("design", ["texts", "pairs"])
def test_samples_of_one_corpus_hardly_ever_differ(method: Method, design: Any) -> None:
    false = 0
    for seed in range(40):
        x = sparse_latents(60, 40, 100 + seed)
        found = compare(x[:30], x[30:], design=design, method=method, permutations=999, seed=seed)
        assert found.tested >= 30
        false += bool(found.discoveries)
    assert false <= 5


@pytest.mark.parametrize("method", ["maxt", "bh"])
def test_planted_differences_are_found(method: Method) -> None:
    x = sparse_latents(200, 60, 12)
    x[:100, :10] += x[:, :10].std(0)
    found = compare(x[:100], x[100:], method=method, permutations=1_999)
    discovered = {row.latent for row in found.discoveries}
    assert len(discovered & set(range(10))) >= 9
    assert len(discovered - set(range(10))) <= 1
    assert all(row.effect > 0.4 and row.low > 0 and row.auroc > 0.5 for row in found.discoveries if row.latent < 10)
    if found.floor is not None:
        assert all(abs(row.score) >= found.floor for row in found.discoveries[:1])


def test_pairs_find_what_texts_hide() -> None:
    rng = generator(2, "pairs")
    base = rng.lognormal(1.0, 1.0, (20, 6))
    variant = base + np.where(np.arange(6) == 2, 0.3, 0.0) + rng.normal(0, 0.1, base.shape)
    assert [row.latent for row in compare(variant, base, design="pairs").discoveries] == [2]
    assert compare(variant, base).discoveries == []


def test_bh_takes_as_many_permutations_as_a_single_discovery_needs() -> None:
    x = csr_matrix(sparse_latents(40, 800, 13))
    found = compare(x[:20], x[20:], method="bh")
    assert found.tested > 500
    assert found.resolution <= 0.05 / found.tested


# On the subject


def test_two_sets_of_prompts(model: LiveModel, dictionary: Dictionary) -> None:
    texts = [example.text for example in generate(21, 150) if "ORDER BY" in example.text]
    sides = [[model.tokens(text) for text in texts if (" DESC" in text) == falling][:12] for falling in (True, False)]
    found = compare_prompts(model, dictionary, *sides, permutations=999)
    assert found.discoveries
    assert (found.n_first, found.n_second, found.latents) == (len(sides[0]), len(sides[1]), dictionary.latents)


def test_two_subjects_that_share_a_dictionary(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    assert isinstance(dictionary, PlainDictionary)
    changed = load_subject(str(subject_path()))
    weight = changed.bridge.original_model.get_input_embeddings().weight
    with torch.no_grad():
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    other = replace(dictionary, fingerprint="sha256:other")
    tuned = LiveModel(changed, [other])
    found = compare_subjects(tuned, model, (other, dictionary), prompts, permutations=999)
    assert found.design == "pairs"
    assert found.discoveries
    still = compare_subjects(model, model, (dictionary, dictionary), prompts, permutations=999)
    assert (still.tested, still.discoveries) == (0, [])
    nudged = replace(other, encoder_bias=other.encoder_bias + 1e-3)
    with pytest.raises(UserError, match="differ in their encoder_bias"):
        compare_subjects(tuned, model, (nudged, dictionary), prompts)
    with pytest.raises(UserError, match="k is 8 and 16"):
        require_shared(replace(other, k=8), dictionary)


def test_dictionaries_that_cannot_be_read_must_be_one(dictionary: Dictionary) -> None:
    facts: Any = {"name": "closed", "hook_point": "h", "width": 2, "latents": 2, "device": "cpu", "dtype": "float32"}
    one, other = (
        OpaqueDictionary(**facts, fingerprint=name, encoder=lambda x: x, decoder=lambda z, given: z) for name in "ab"
    )
    require_shared(one, one)
    with pytest.raises(UserError, match="cannot be compared"):
        require_shared(one, other)


def test_subjects_must_share_a_tokenizer(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    stranger = cast(Any, type("Stranger", (), {"subject": type("S", (), {"tokenizer_digest": "x", "name": "other"})}))
    with pytest.raises(UserError, match="different tokenizers"):
        compare_subjects(model, stranger, (dictionary, dictionary), prompts)


GOOD = np.ones((10, 3))


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        (GOOD[:0], GOOD, {}, "the first set has 0 texts"),
        (GOOD, GOOD[:, :2], {}, "3 latents and the second 2"),
        (GOOD, np.where(np.eye(10, 3, -4), np.nan, GOOD), {}, "text 4 of the second set has an activation"),
        (GOOD * np.inf, GOOD, {}, "text 0 of the first set"),
        (GOOD[:1], GOOD[:1], {}, "1 and 1 texts can be arranged in 2 ways"),
        (GOOD[:3], GOOD[:3], {}, "no p-value is below 0.1 and nothing could be found at fdr 0.05"),
        (GOOD[0], GOOD, {}, "has shape"),
        (GOOD, GOOD[:9], {"design": "pairs"}, "10 and 9 texts make no pairs"),
        (GOOD, GOOD, {"design": "words"}, "design 'words' is not one of"),
        (GOOD, GOOD, {"method": "sam"}, "method 'sam' is not one of"),
        (GOOD, GOOD, {"permutations": 0}, "permutations is 0"),
        (GOOD, GOOD, {"permutations": 10}, "take at least 20"),
        (GOOD, GOOD, {"rounding": -1}, "rounding is -1"),
        (GOOD, GOOD, {"fdr": 1.5}, "fdr is 1.5"),
        (GOOD, GOOD, {"fdr": float("nan")}, "fdr is nan"),
        (GOOD, GOOD, {"design": "strata"}, "no groups are given"),
        (GOOD, GOOD, {"groups": ("a" * 10, "b" * 10)}, "groups are given and the design is 'texts'"),
        (GOOD, GOOD, {"design": "strata", "groups": ("a" * 9, "b" * 10)}, "10 texts and 9 groups"),
        (GOOD, GOOD, {"design": "clusters", "groups": ("a" * 10, "a" * 10)}, "group 'a' has texts in both sets"),
    ],
)
def test_bad_input_is_one_clear_line(first: Any, second: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(first, second, **options)


def test_no_prompts_on_one_side(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    with pytest.raises(UserError, match="the second set has no text"):
        compare_prompts(model, dictionary, prompts, [])


def test_constant_latents_leave_nothing_to_test() -> None:
    found = compare(GOOD, GOOD)
    assert (found.firing, found.tested, found.rows(), found.floor) == (3, 0, [], None)
