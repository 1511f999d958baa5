"""How much of a distinction between texts a few latents carry, beside what the residual stream carries.

1. Each text becomes one sparse vector of pooled latent activations, and for the baseline the residual vector of its last
   token and the mean over its tokens.
2. In every fold, from its training texts alone: k latents are chosen and a logistic probe is fitted on them (Gurnee et al.
   2023, Finding Neurons in a Haystack; SAEBench, Karvonen et al. 2025); a logistic probe is fitted on the residual, at the
   pooling that inner folds prefer; and the difference of the residual's class means is taken at the same pooling.
3. Each is judged by AUC on the fold's held-out texts, in regimes where latents were hoped to help: all texts, few texts,
   few positives (Kantamneni et al. 2025, Are Sparse Autoencoders Useful?). There dense baselines were seldom beaten, and
   weak baselines made it look otherwise, so a result always holds them, and the paired difference with its interval.
4. All is done again with shuffled labels: the floor of each AUC and of the stability of the choice.

A result: `latent.value` 0.97 with k = 1, `dense.value` 1.00, `gain` −0.03 [−0.05, −0.01], latent 811 chosen in every fold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from exegete.tools.blas_threads import one_blas_thread
from exegete.tools.cross_validation import (
    IMBALANCED,
    PLAIN,
    SCARCE,
    Auc,
    Bools,
    Floats,
    Interval,
    Ints,
    Regime,
    Split,
    TooFewError,
    difference,
    draw_inner,
    draw_splits,
    labelled,
    require_classes,
    shuffled,
    summary,
    thin,
)
from exegete.tools.dictionaries import Dictionary
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel
from exegete.tools.probe_fitting import (
    SELECTIONS,
    DenseView,
    LatentView,
    PreparedLatents,
    Selection,
    auc,
    difference_of_means,
    fit,
)
from exegete.tools.prompt_vectors import POOLINGS, canonical, prompt_vectors
from exegete.tools.seeds import derive_seed, generator
from exegete.tools.text_activations import pooled


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are fitted and judged."""

    ks: tuple[int, ...] = (1, 5, 16)
    """Numbers of latents that a probe may use."""
    selection: Selection = "difference"
    """How they are chosen: by difference of means, or by the L1 path, which may settle for fewer."""
    regimes: tuple[Regime, ...] = (PLAIN, SCARCE, IMBALANCED)
    """What the training texts are thinned to."""
    folds: int = 5
    repeats: int = 3
    """Times that other folds are drawn."""
    shuffles: int = 10
    """Runs with shuffled labels."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise UserError(f"ks is {self.ks}; give different numbers of latents, each at least 1")
        if self.selection not in SELECTIONS:
            raise UserError(f"selection {self.selection!r} is not one of {', '.join(SELECTIONS)}")
        if not self.regimes or self.repeats < 1 or self.shuffles < 1:
            raise UserError("give at least one regime, 1 repeat and 1 shuffle: no figure comes without its floor")


@dataclass(frozen=True)
class ChosenLatent:
    """A latent that some fold chose."""

    latent: int
    share: float
    """Part of the fits, over folds and repeats, that chose it."""
    weight: float
    """Mean over these of its weight per unit of activation; above zero where it speaks for the label 1."""


@dataclass(frozen=True)
class ProbeResult:
    """A k-sparse latent probe in one regime, with what it must be held against."""

    regime: str
    k: int
    latent: Auc
    dense: Auc
    """Of the logistic probe on the residual."""
    means: Auc
    """Of the difference of means of the residual."""
    gain: Interval
    """`latent` less `dense`, paired over folds."""
    chosen: tuple[ChosenLatent, ...]
    """Most often chosen first."""
    stability: float
    """Mean over pairs of folds of a repeat of |latents chosen in both| / |chosen in either|."""
    stability_floor: float
    """The same with shuffled labels: folds share training texts, so it is not zero."""
    poolings: Mapping[str, float]
    """Pooling of the residual → part of the fits whose inner folds preferred it."""
    training_texts: float
    """Mean number that a probe was fitted on, and of positives among them."""
    training_positives: float


@dataclass(frozen=True)
class SkippedRegime:
    """A regime for which there are too few texts."""

    regime: str
    reason: str


@dataclass(frozen=True)
class Probes:
    """Results for every regime and k."""

    results: tuple[ProbeResult, ...]
    skipped: tuple[SkippedRegime, ...]
    texts: int
    positives: int
    groups: int
    settings: ProbeSettings

    def result(self, regime: str, k: int) -> ProbeResult:
        """Return one of the results.

        Raises:
            UserError: it is not there.
        """
        for found in self.results:
            if (found.regime, found.k) == (regime, k):
                return found
        reasons = "".join(f" ({one.reason})" for one in self.skipped if one.regime == regime)
        raise UserError(f"there is no result for regime {regime!r} and k = {k}{reasons}")


def probe(
    model: LiveModel,
    dictionary: Dictionary,
    prompts: Sequence[Tokens],
    labels: Sequence[bool | int],
    *,
    groups: Sequence[int | str] | None = None,
    pooling: Literal["max", "mean"] = "max",
    hook_point: str | None = None,
    settings: ProbeSettings | None = None,
) -> Probes:
    """Return how well latents, and beside them the residual stream, tell the prompts of label 1 from those of label 0.

    Args:
        model: with the dictionary attached.
        dictionary: whose latents.
        prompts: tokens of each text. The order makes no difference.
        labels: 0 or 1 for each.
        groups: texts of one group are never on both sides of a split; by default, equal prompts are one group. Give each
            minimal pair one: a text whose twin of the other label was trained on is taken for it, and the AUC falls below 0.5.
        pooling: of the latents over a text's tokens.
        hook_point: of the dense probes; the dictionary's, by default.
        settings: defaults if None.

    Raises:
        UserError: as `cross_validate`, or the model cannot read a prompt or has no such hook point.
    """
    order, known = canonical(prompts, labels, groups)
    ordered = [tuple(prompts[index]) for index in order]
    point = dictionary.hook_point if hook_point is None else hook_point
    # Said before the model runs; `cross_validate` says the rest.
    require_classes(
        *labelled([labels[index] for index in order], known, len(order)), (settings or ProbeSettings()).folds
    )
    vectors = prompt_vectors(model, ordered, [point], POOLINGS)
    residuals: dict[str, ArrayLike] = {name: vectors[point, name] for name in POOLINGS}
    activations = pooled(model, dictionary, ordered, pooling)
    return cross_validate(activations, residuals, [labels[index] for index in order], known, settings)


def cross_validate(
    activations: Any,
    residuals: Mapping[str, ArrayLike],
    labels: Sequence[bool | int],
    groups: Sequence[int | str] | None = None,
    settings: ProbeSettings | None = None,
) -> Probes:
    """Return what probes on given activations are worth, in every regime and for every k.

    Args:
        activations: pooled latents, sparse or dense, shape (text, latent).
        residuals: name of a pooling → dense vectors, shape (text, width).
        labels: 0 or 1 for each text.
        groups: texts of one group are never on both sides of a split.
        settings: defaults if None.

    Raises:
        UserError: labels or groups are not as many as texts or a label is neither 0 nor 1, only one class is there, a value
            is not finite, fewer latents are active than `k`, or no regime has enough texts.
    """
    settings = settings or ProbeSettings()
    texts = _Texts.of(activations, residuals, labels, groups, settings)
    results: list[ProbeResult] = []
    skipped: list[SkippedRegime] = []
    for regime in settings.regimes:
        try:
            with one_blas_thread():
                results += _results(texts, regime, settings)
        except TooFewError as error:
            skipped.append(SkippedRegime(regime.name, str(error)))
    if not results:
        raise TooFewError(skipped[0].reason)
    counts = len(texts.labels), int(texts.labels.sum()), len(np.unique(texts.groups))
    return Probes(tuple(results), tuple(skipped), *counts, settings)


@dataclass(frozen=True)
class _Texts:
    """What is known of the texts."""

    activations: Any
    """CSR matrix of shape (text, latent active on any text)."""
    latents: Ints
    """Whose column is which."""
    poolings: tuple[str, ...]
    residuals: tuple[Floats, ...]
    labels: Bools
    groups: Ints

    @staticmethod
    def of(
        activations: Any,
        residuals: Mapping[str, ArrayLike],
        labels: Sequence[bool | int],
        groups: Sequence[int | str] | None,
        settings: ProbeSettings,
    ) -> _Texts:
        from scipy.sparse import csr_matrix

        sparse = csr_matrix(activations, dtype=np.float64)
        dense = {name: np.asarray(vectors, np.float64) for name, vectors in residuals.items()}
        if not dense:
            raise UserError("no residual vectors are given: a latent probe is not judged without its dense baseline")
        for name, array in {"activations": sparse.data, **dense}.items():
            if not np.isfinite(array).all():
                raise UserError(f"{name} hold values that are not finite; leave out the texts that they come from")
        for name, array in dense.items():
            if array.ndim != 2 or len(array) != sparse.shape[0]:
                raise UserError(f"residual {name!r} has shape {array.shape}; it must be ({sparse.shape[0]}, width)")
        sparse.eliminate_zeros()
        active = np.unique(sparse.indices).astype(np.int64)
        if len(active) < max(settings.ks):
            raise UserError(
                f"k is {max(settings.ks)}, but {len(active)} latents are active on these texts; ask for fewer, or give more texts"
            )
        truth, numbers = labelled(labels, groups, sparse.shape[0])
        return _Texts(sparse[:, active], active, tuple(dense), tuple(dense.values()), truth, numbers)


@dataclass(frozen=True)
class _Fold:
    """What came out of one fold."""

    aucs: Mapping[str | int, float]
    """Of "dense", of "means", and of each k."""
    chosen: Mapping[int, Mapping[int, float]]
    """k → latent → weight."""
    pooling: str
    train: int
    positives: int


def _results(texts: _Texts, regime: Regime, settings: ProbeSettings) -> Iterator[ProbeResult]:
    seeds = [derive_seed(settings.seed, "probes", repeat) for repeat in range(settings.repeats)]
    splits = [draw_splits(texts.labels, texts.groups, settings.folds, seed) for seed in seeds]
    runs = [_run(texts, texts.labels, drawn, regime, settings, index) for index, drawn in enumerate(splits)]
    floors = []
    for index in range(settings.shuffles):
        drawn = splits[index % len(splits)]
        rng = generator(settings.seed, "probes", "shuffle", index)
        labels = shuffled(texts.labels, texts.groups, [split.test for split in drawn], rng)
        floors.append(_run(texts, labels, drawn, regime, settings, settings.repeats + index))
    for k in settings.ks:
        yield _result(texts, regime.name, k, runs, floors)


def _run(
    texts: _Texts, labels: Bools, splits: Sequence[Split], regime: Regime, settings: ProbeSettings, run: int
) -> list[_Fold]:
    found = []
    for index, split in enumerate(splits):
        # One choice of training texts for all regimes of a name, whatever else is asked for.
        rng = generator(settings.seed, "probes", regime.name, run, index)
        train = thin(split.train, labels, regime, rng)
        inner = draw_inner(labels, texts.groups, train, derive_seed(settings.seed, "probes", "inner", run, index))
        found.append(_fold(texts, labels, train, split.test, inner, settings))
    return found


def _fold(
    texts: _Texts, labels: Bools, train: Ints, test: Ints, inner: Sequence[Split], settings: ProbeSettings
) -> _Fold:
    truth = labels[test]
    dense = fit([DenseView(vectors) for vectors in texts.residuals], labels, train, inner)
    vectors = texts.residuals[dense.view]
    direction = difference_of_means(vectors[train], labels[train])
    aucs: dict[str | int, float] = {
        "dense": auc(truth, dense.scores(test)),
        "means": auc(truth, vectors[test] @ direction),
    }
    chosen: dict[int, Mapping[int, float]] = {}
    for k in settings.ks:
        probe = fit([LatentView(texts.activations, k, settings.selection)], labels, train, inner)
        aucs[k] = auc(truth, probe.scores(test))
        assert isinstance(probe.prepared, PreparedLatents)
        latents = texts.latents[probe.prepared.latents]
        chosen[k] = dict(zip(latents.tolist(), probe.weights().tolist(), strict=True))
    return _Fold(aucs, chosen, texts.poolings[dense.view], len(train), int(labels[train].sum()))


def _result(
    texts: _Texts, regime: str, k: int, runs: Sequence[Sequence[_Fold]], floors: Sequence[Sequence[_Fold]]
) -> ProbeResult:
    positives = int(texts.labels.sum())
    negatives = len(texts.labels) - positives

    def values(folds: Sequence[Sequence[_Fold]], of: str | int) -> Floats:
        return np.array([[fold.aucs[of] for fold in run] for run in folds])

    latent, dense, means = (
        summary(values(runs, of), values(floors, of), positives, negatives) for of in (k, "dense", "means")
    )
    every = [fold for run in runs for fold in run]
    return ProbeResult(
        regime=regime,
        k=k,
        latent=latent,
        dense=dense,
        means=means,
        gain=difference(values(runs, k), values(runs, "dense"), positives, negatives),
        chosen=_chosen([fold.chosen[k] for fold in every]),
        stability=_stability(runs, k),
        stability_floor=_stability(floors, k),
        poolings={name: float(np.mean([fold.pooling == name for fold in every])) for name in texts.poolings},
        training_texts=float(np.mean([fold.train for fold in every])),
        training_positives=float(np.mean([fold.positives for fold in every])),
    )


def _chosen(fits: Sequence[Mapping[int, float]]) -> tuple[ChosenLatent, ...]:
    weights: dict[int, list[float]] = defaultdict(list)
    for fitted in fits:
        for latent, weight in fitted.items():
            weights[latent].append(weight)
    found = [ChosenLatent(latent, len(given) / len(fits), float(np.mean(given))) for latent, given in weights.items()]
    return tuple(sorted(found, key=lambda one: (-one.share, one.latent)))


def _stability(runs: Sequence[Sequence[_Fold]], k: int) -> float:
    shared = []
    for run in runs:
        for one, other in combinations([set(fold.chosen[k]) for fold in run], 2):
            shared.append(len(one & other) / len(one | other))
    return float(np.mean(shared))
