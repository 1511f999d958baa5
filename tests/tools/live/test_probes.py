"""Probes on planted vectors whose AUC is known, and on the bundled subject."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import norm

from exegete.tools.bundled.behaviours import behaviours
from exegete.tools.cross_validation import (
    IMBALANCED,
    PLAIN,
    SCARCE,
    Floats,
    Regime,
    TooFewError,
    difference,
    draw_inner,
    draw_splits,
    labelled,
    newcombe,
    shuffled,
    summary,
    thin,
)
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel
from exegete.tools.probe_fitting import (
    DenseView,
    LatentView,
    auc,
    choose_by_difference,
    choose_by_l1,
    difference_of_means,
    fit,
    logistic,
)
from exegete.tools.probes import Probes, ProbeSettings, cross_validate, probe

QUICK = ProbeSettings(ks=(1,), regimes=(PLAIN,), folds=4, repeats=1, shuffles=1)


def _planted(texts: int, latents: int, carriers: Sequence[int], seed: int = 0) -> tuple[csr_matrix, Floats, list[int]]:
    """Sparse activations of which only `carriers` know the label, and vectors of which only the first coordinate does.

    Along that coordinate the classes are normal, 2 standard deviations apart.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(texts) % 2
    codes = rng.random((texts, latents)) * (rng.random((texts, latents)) < 0.1)
    for carrier in carriers:
        codes[:, carrier] = np.where(labels == 1, 1.5 + rng.random(texts), rng.random(texts))
    vectors = rng.normal(size=(texts, 12))
    vectors[:, 0] += 2 * labels
    return csr_matrix(codes), vectors, labels.tolist()


def test_the_planted_latents_are_found_and_the_baseline_is_worth_what_it_must_be() -> None:
    codes, vectors, labels = _planted(200, 400, carriers=(17, 230, 41))
    found = cross_validate(codes, {"mean": vectors}, labels, settings=replace(QUICK, ks=(1, 3)))
    one, three = found.result("plain", 1), found.result("plain", 3)
    assert {chosen.latent for chosen in three.chosen} == {17, 41, 230}
    assert all(chosen.share == 1 and chosen.weight > 0 for chosen in three.chosen)
    assert three.stability == 1 and three.stability_floor < 0.6
    assert one.latent.value == three.latent.value == 1 and one.latent.low < 1
    # The classes are 2 standard deviations apart along one coordinate: AUC = Φ(2 / √2) = 0.921.
    assert one.dense.low < norm.cdf(math.sqrt(2)) < one.dense.high
    assert one.means.value == pytest.approx(norm.cdf(math.sqrt(2)), abs=0.05)
    assert one.gain.low > 0 and one.gain.value == pytest.approx(one.latent.value - one.dense.value)
    assert (found.texts, found.positives, found.groups, one.training_texts) == (200, 100, 200, 150)


def test_latents_that_know_less_lose_to_the_baseline() -> None:
    codes, vectors, labels = _planted(160, 60, carriers=())
    vectors[:, 0] += 4 * np.array(labels)
    found = cross_validate(codes, {"mean": vectors}, labels, settings=replace(QUICK, ks=(3,))).result("plain", 3)
    assert found.gain.high < 0 and found.dense.value > 0.98


def test_random_labels_score_a_half_with_thousands_of_latents() -> None:
    rng = np.random.default_rng(3)
    codes = csr_matrix(rng.normal(size=(100, 4_000)))
    labels = rng.permutation(np.arange(100) % 2).tolist()
    vectors = rng.normal(size=(100, 8))
    settings = replace(QUICK, ks=(20,), folds=5)
    found = cross_validate(codes, {"mean": vectors}, labels, settings=settings).result("plain", 20)
    assert found.latent.low < 0.5 < found.latent.high and abs(found.latent.value - 0.5) < 0.15
    assert abs(found.latent.floor - 0.5) < 0.15
    # The same fit, on latents chosen with all texts in view, tells noise from noise: what choosing inside the folds prevents.
    truth, groups = labelled(labels, None, 100)
    leaked = codes[:, choose_by_difference(codes, truth, np.arange(100), 20)].toarray()
    aucs = []
    for split in draw_splits(truth, groups, 5, 0):
        fitted = fit([DenseView(leaked)], truth, split.train, draw_inner(truth, groups, split.train, 0))
        aucs.append(auc(truth[split.test], fitted.scores(split.test)))
    assert np.mean(aucs) > 0.85


def test_shuffled_labels_are_the_floor_and_the_p_value_says_how_far_above_it_a_figure_is() -> None:
    codes, vectors, labels = _planted(80, 60, carriers=(5,))
    settings = replace(QUICK, shuffles=4)
    found = cross_validate(codes, {"mean": vectors}, labels, settings=settings).result("plain", 1)
    for figure in (found.latent, found.dense, found.means):
        assert abs(figure.floor - 0.5) < 0.12 and figure.floor <= figure.floor_highest < figure.value
        assert figure.p_value == pytest.approx(0.2)


def test_regimes_thin_the_training_texts_only() -> None:
    codes, vectors, labels = _planted(200, 50, carriers=(9,))
    settings = replace(QUICK, regimes=(PLAIN, SCARCE, IMBALANCED))
    found = cross_validate(codes, {"mean": vectors}, labels, settings=settings)
    sizes = {one.regime: (one.training_texts, one.training_positives) for one in found.results}
    # 150 training texts, 75 of each class; 75 negatives go with 8.3 positives for a tenth.
    assert sizes == {"plain": (150, 75), "scarce": (20, 10), "imbalanced": (83, 8)}
    # The fewer a probe learns from, the worse is the noisy baseline; the planted latent needs few.
    assert found.result("scarce", 1).dense.value < found.result("plain", 1).dense.value
    assert found.result("scarce", 1).latent.value > 0.98


def test_a_regime_without_enough_texts_is_a_row_that_says_so() -> None:
    codes, vectors, labels = _planted(20, 50, carriers=(9,))
    settings = replace(QUICK, regimes=(PLAIN, SCARCE))
    found = cross_validate(codes, {"mean": vectors}, labels, settings=settings)
    assert [one.regime for one in found.results] == ["plain"]
    (skipped,) = found.skipped
    assert skipped.regime == "scarce" and "10 positive" in skipped.reason
    with pytest.raises(UserError, match=r"scarce.*10 positive"):
        found.result("scarce", 1)


def test_the_pooling_that_knows_more_is_the_baseline() -> None:
    codes, vectors, labels = _planted(100, 40, carriers=(3,))
    noise = np.random.default_rng(5).normal(size=vectors.shape)
    found = cross_validate(codes, {"last": noise, "mean": vectors}, labels, settings=QUICK)
    result = found.result("plain", 1)
    assert result.poolings == {"last": 0, "mean": 1} and result.dense.value > 0.8


def test_texts_of_a_group_are_never_on_both_sides() -> None:
    # Each group has a coordinate of its own, so that whoever saw one of its texts knows the label of the others.
    groups = np.repeat(np.arange(40), 3)
    rng = np.random.default_rng(8)
    owned = rng.permutation(np.arange(40) % 2)
    vectors = np.eye(40)[groups] + 0.01 * rng.normal(size=(120, 40))
    labels = owned[groups].tolist()
    apart = cross_validate(vectors, {"mean": vectors}, labels, groups.tolist(), QUICK).result("plain", 1)
    mixed = cross_validate(vectors, {"mean": vectors}, labels, None, QUICK).result("plain", 1)
    assert mixed.dense.value > 0.9 and apart.dense.value < 0.7
    truth, numbers = labelled(labels, groups.tolist(), 120)
    for split in draw_splits(truth, numbers, 5, 1):
        assert not set(numbers[split.train]) & set(numbers[split.test])
        for inner in draw_inner(truth, numbers, split.train, 1):
            assert set(inner.train) | set(inner.test) == set(split.train)
            assert not set(numbers[inner.train]) & set(numbers[inner.test])


def test_labels_of_a_group_are_shuffled_as_one_block() -> None:
    groups = np.repeat(np.arange(10), 3)
    labels = groups < 4
    found = shuffled(labels, groups, [np.arange(30)], np.random.default_rng(0))
    assert found.sum() == labels.sum() and (found != labels).any()
    assert all(len(set(found[groups == group])) == 1 for group in range(10))
    # The labels of minimal pairs change places in about half of them.
    pairs, twins = np.arange(200) % 2 == 1, np.arange(200) // 2
    swapped = shuffled(pairs, twins, [np.arange(200)], np.random.default_rng(0))
    assert (swapped[::2] != swapped[1::2]).all() and 60 < (swapped != pairs).sum() < 140
    halves = [np.arange(0, 30, 2), np.arange(1, 30, 2)]
    within = shuffled(labels, np.arange(30), halves, np.random.default_rng(0))
    assert [within[half].sum() for half in halves] == [labels[half].sum() for half in halves]


def test_auc_by_hand() -> None:
    # Of the 2 · 3 pairs the positives win 5, and tie 1 with the value 3.
    labels, scores = np.array([True, False, False, True, False]), np.array([3.0, 3.0, 1.0, 9.0, 0.0])
    assert auc(labels, scores) == pytest.approx(5.5 / 6)


def test_the_interval_by_hand() -> None:
    # Newcombe's method 5 for an AUC of 1 with 10 and 10: (1 − L)² = z² L (1 − L) (1 + 9 ((1 − L)/(2 − L) + L/(1 + L))) / 100.
    low, high = newcombe(1.0, 10, 10)
    factor = 1 + 9 * ((1 - low) / (2 - low) + low / (1 + low))
    assert (1 - low) ** 2 == pytest.approx(1.959963984540054**2 * low * (1 - low) * factor / 100)
    assert high == 1 and 0.7 < low < 0.9
    # Folds at 0.8 and 0.9, twice: s² = 1/300, times 1/4 + 1 with two folds; Student's t of 3 degrees is 3.182.
    folds = np.array([[0.8, 0.9], [0.9, 0.8]])
    paired = difference(folds, np.zeros((2, 2)) + 0.5, 50, 50)
    half = 3.18244630528 * math.sqrt(1 / 300 * 1.25)
    assert paired.value == pytest.approx(0.35) and paired.high - paired.value == pytest.approx(half)
    # No fold differs: the width is that of both figures.
    same = difference(np.ones((1, 5)), np.ones((1, 5)), 10, 10)
    assert same.value == 0 and same.low == pytest.approx(low - 1) and same.high == pytest.approx(1 - low)
    assert summary(np.ones((1, 5)), np.full((3, 5), 0.5), 10, 10).low == pytest.approx(low)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # The AUC of the first coordinate, given with no fit, is Φ(1 / √2) whatever the fold.
    truth = norm.cdf(1 / math.sqrt(2))
    labels = np.arange(60) % 2 == 1
    held = []
    for seed in range(200):
        scores = np.random.default_rng(seed).normal(size=60) + labels
        splits = [draw_splits(labels, np.arange(60), 5, repeat) for repeat in (0, 1)]
        folds = np.array([[auc(labels[split.test], scores[split.test]) for split in drawn] for drawn in splits])
        figure = summary(folds, np.full((1, 5), 0.5), 30, 30)
        held.append(figure.low <= truth <= figure.high)
    assert np.mean(held) >= 0.92


def test_a_probe_in_the_space_of_the_texts_is_the_same_probe() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(30) % 2 == 1
    vectors = rng.normal(size=(30, 90)) * rng.uniform(0.1, 9, 90) + labels[:, None]
    fitted = DenseView(vectors).prepare(np.arange(20), labels)
    weights = fitted.weights(logistic(fitted.rows(np.arange(20)), labels[:20], 0.01))
    plain = (vectors - vectors[:20].mean(0)) / vectors[:20].std(0)
    direct = logistic(plain[:20], labels[:20], 0.01) / vectors[:20].std(0)
    assert np.allclose(weights, direct, atol=1e-3 * np.abs(direct).max())


def test_the_penalty_is_chosen_without_the_latents_having_seen_the_inner_fold() -> None:
    # Noise that was chosen for its luck looks predictive wherever it was chosen: a leaking inner loop reports AUCs near 1.
    codes = csr_matrix(np.random.default_rng(4).normal(size=(60, 3_000)))
    labels = np.arange(60) % 2 == 1
    inner = draw_inner(labels, np.arange(60), np.arange(60), 0)
    assert fit([LatentView(codes, 10, "difference")], labels, np.arange(60), inner).inner_auc < 0.75


def test_latents_are_chosen_by_difference_and_by_the_l1_path() -> None:
    labels = np.arange(8) % 2 == 1
    codes = np.zeros((8, 5))
    codes[:, 1] = labels * 2.0
    codes[:, 3] = ~labels * 3.0
    codes[:, 4] = 5.0
    sparse, every = csr_matrix(codes), np.arange(8)
    assert choose_by_difference(sparse, labels, every, 3).tolist() == [3, 1, 0]
    # Of texts that are left out nothing is known.
    assert choose_by_difference(sparse, labels, np.array([0, 2, 4, 5]), 1).tolist() == [3]
    assert set(choose_by_l1(sparse, labels, every, 2).tolist()) <= {1, 3}
    many, vectors, truth = _planted(120, 100, carriers=(7, 70))
    settings = replace(QUICK, ks=(2,), selection="l1")
    found = cross_validate(many, {"mean": vectors}, truth, settings=settings).result("plain", 2)
    assert {chosen.latent for chosen in found.chosen} <= {7, 70} and found.latent.value > 0.99


def test_class_means_by_hand() -> None:
    vectors = np.array([[1.0, 0], [3, 2], [5, 5], [1, 1]])
    assert difference_of_means(vectors, np.array([False, True, True, False])).tolist() == [3, 3]


def test_thinning_keeps_what_it_says() -> None:
    labels = np.arange(40) % 4 == 0
    rng = np.random.default_rng(0)
    kept = thin(np.arange(40), labels, Regime("half", positives=0.5), rng)
    assert len(kept) == 20 and labels[kept].sum() == 10
    assert thin(np.arange(40), labels, PLAIN, rng).tolist() == list(range(40))
    with pytest.raises(TooFewError, match="takes 15 positive and 15 negative"):
        thin(np.arange(40), labels, Regime("large", texts=30, positives=0.5), rng)
    with pytest.raises(UserError, match=r"the part of positives is 1\.5"):
        thin(np.arange(40), labels, Regime("wrong", positives=1.5), rng)


@pytest.mark.parametrize(
    ("labels", "groups", "message"),
    [
        ([0, 1] * 9, None, "18 labels are given for 20 texts"),
        ([1] * 20, None, "all 20 texts have the label 1"),
        ([0] * 20, None, "all 20 texts have the label 0"),
        ([0, 2] * 10, None, "label of text 1 is 2"),
        ([0, math.nan] * 10, None, "label of text 1 is nan"),
        ([1] * 3 + [0] * 17, None, "3 texts have the label 1; 4 folds need at least 4"),
        ([0, 1] * 10, [0, 1], "2 groups are given for 20 texts"),
        ([0, 1] * 10, [0, 1, 2, 3] * 5, "2 groups of texts have the label 1; 4 folds"),
        ([], None, "0 labels are given for 20 texts"),
    ],
)
def test_bad_labels_are_named(labels: list[int], groups: list[int] | None, message: str) -> None:
    codes, vectors, _ = _planted(20, 10, carriers=(1,))
    with pytest.raises(UserError, match=message):
        cross_validate(codes, {"mean": vectors}, labels, groups, QUICK)


def test_bad_values_are_named() -> None:
    codes, vectors, labels = _planted(20, 10, carriers=(1,))
    broken = codes.copy()
    broken.data[3] = np.nan
    with pytest.raises(UserError, match="activations hold values that are not finite"):
        cross_validate(broken, {"mean": vectors}, labels, settings=QUICK)
    with pytest.raises(UserError, match="mean hold values that are not finite"):
        cross_validate(codes, {"mean": np.where(vectors > 2, np.inf, vectors)}, labels, settings=QUICK)
    with pytest.raises(UserError, match=r"'mean' has shape \(19, 12\)"):
        cross_validate(codes, {"mean": vectors[:19]}, labels, settings=QUICK)
    with pytest.raises(UserError, match="not judged without its dense baseline"):
        cross_validate(codes, {}, labels, settings=QUICK)
    with pytest.raises(UserError, match="k is 11, but 10 latents are active"):
        cross_validate(codes, {"mean": vectors}, labels, settings=replace(QUICK, ks=(11,)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ks": ()}, "ks is"),
        ({"ks": (0,)}, "each at least 1"),
        ({"ks": (2, 2)}, "different numbers"),
        ({"selection": "best"}, "'best' is not one of difference, l1"),
        ({"shuffles": 0}, "no figure comes without its floor"),
        ({"regimes": ()}, "at least one regime"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(QUICK, **wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def requests() -> tuple[list[str], list[int]]:
    """Prompts about to write the direction of an ordering, and whether the request says descending."""
    (descending,) = (behaviour for behaviour in behaviours() if behaviour.name == "order.DESC")
    pairs = list(descending.pairs(5, 20))
    texts = ["".join(prompt) for pair in pairs for prompt in (pair.variant, pair.base)]
    return texts, [0, 1] * len(pairs)


def _probe(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens], labels: list[int], groups: list[int]
) -> Probes:
    point, settings = "blocks.3.hook_resid_post", replace(QUICK, ks=(4,), shuffles=2)
    return probe(model, dictionary, prompts, labels, groups=groups, hook_point=point, settings=settings)


def test_the_residual_of_the_bundled_subject_knows_that_a_request_sorts_downwards(
    model: LiveModel, dictionary: Dictionary, requests: tuple[list[str], list[int]]
) -> None:
    prompts, labels = [model.tokens(text) for text in requests[0]], requests[1]
    pairs = [index // 2 for index in range(40)]
    found = _probe(model, dictionary, prompts, labels, pairs)
    result = found.result("plain", 4)
    # At the last layer the last token is about to be DESC or ASC; latents of the second layer know it from the request.
    assert result.dense.value > 0.95 and result.dense.low > result.dense.floor_highest
    assert result.poolings == {"last": 1, "mean": 0} and result.gain.value < 0
    assert result.latent.value > 0.7 > result.latent.floor
    assert (found.texts, found.positives, found.groups) == (40, 20, 20)
    # Neither the order of the texts nor what else is in a batch makes a difference.
    small = LiveModel(model.subject, [dictionary], batch_tokens=300)
    assert _probe(small, dictionary, prompts[::-1], labels[::-1], pairs[::-1]) == found


def test_equal_prompts_are_one_group(model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]) -> None:
    settings = replace(QUICK, folds=3)
    found = probe(model, dictionary, prompts * 2, [0, 1] * 12, settings=settings)
    assert (found.texts, found.groups) == (24, 12)


def test_bad_prompts_are_named_before_the_model_runs(
    model: LiveModel, dictionary: Dictionary, prompts: list[Tokens]
) -> None:
    with pytest.raises(UserError, match="11 labels are given for 12 texts"):
        probe(model, dictionary, prompts, [0, 1] * 5 + [0])
    with pytest.raises(UserError, match="all 12 texts have the label 1"):
        probe(model, dictionary, prompts, [1] * 12)
    with pytest.raises(UserError, match=r"no hook point 'blocks\.9\.hook_resid_post'"):
        probe(model, dictionary, prompts, [0, 1] * 6, hook_point="blocks.9.hook_resid_post")
