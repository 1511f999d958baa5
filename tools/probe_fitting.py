"""Linear probes fitted on some texts and judged on others; nothing of the others is seen before.

1. A *view* is what a probe sees of a text: the whole vector (`DenseView`), or k latents of its code (`LatentView`). It is
   prepared from training texts alone: which latents are chosen, and the mean and spread that columns are brought to.
2. The probe is a logistic regression with an L2 penalty. Its strength is chosen by log loss over inner folds of the training
   texts; the view is prepared anew in each, so that the choice of latents is not judged on texts that it was made on.
   Where there are several views (poolings of the residual), the one with the least loss is taken.
3. Latents are chosen by the difference of their mean activations between the classes, largest first (Gurnee et al. 2023;
   SAEBench, Karvonen et al. 2025), or by the L1 path: the penalty is loosened until k latents have a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from exegete.tools.cross_validation import Bools, Floats, Ints, Split

Selection = Literal["difference", "l1"]
SELECTIONS: tuple[Selection, ...] = ("difference", "l1")

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse penalties that are tried, as scikit-learn's `C`; the strongest penalty wins ties."""
_PATH = np.geomspace(1.05, 1e3, 25)
"""Inverse L1 penalties, in multiples of the one below which no latent has a weight."""
_MOST_STEPS = 5_000


class Prepared(Protocol):
    """A view whose choices are made."""

    def rows(self, texts: Ints) -> Floats:
        """Return what a probe is fitted on, shape (text, column)."""
        ...

    def weights(self, coefficients: Floats) -> Floats:
        """Return coefficients of the columns as weights on what the view is of, in its own units."""
        ...


class View(Protocol):
    """What a probe sees."""

    def prepare(self, texts: Ints, labels: Bools) -> Prepared:
        """Make the choices from these texts; `labels` are those of all texts."""
        ...


@dataclass(frozen=True)
class Probe:
    """A fitted probe."""

    prepared: Prepared
    coefficients: Floats
    """Of the prepared columns."""
    strength: float
    view: int
    """Which of the views it was given."""
    inner_auc: float
    """Mean over the inner folds at this strength: what hook points are chosen by."""

    def scores(self, texts: Ints) -> Floats:
        """Return how positive texts look, shape (text,); only their order has a meaning."""
        found: Floats = self.prepared.rows(texts) @ self.coefficients
        return found

    def weights(self) -> Floats:
        """Return the direction that scores are taken along, in units of what the view is of."""
        return self.prepared.weights(self.coefficients)


def fit(views: Sequence[View], labels: Bools, train: Ints, inner: Sequence[Split]) -> Probe:
    """Return the probe of the best of `views`, fitted on the texts `train`; `inner` are folds of them."""
    tried = [_validated(view, labels, inner) for view in views]
    which = int(np.argmin([losses.min() for losses, _ in tried]))
    losses, aucs = tried[which]
    best = int(losses.argmin())
    prepared = views[which].prepare(train, labels)
    coefficients = logistic(prepared.rows(train), labels[train], STRENGTHS[best])
    return Probe(prepared, coefficients, STRENGTHS[best], which, float(aucs[best]))


def logistic(columns: Floats, labels: Bools, strength: float, counts: Floats | None = None) -> Floats:
    """Return the coefficients of a logistic regression, shape (column,); `counts` weighs the texts."""
    return np.asarray(_logistic(columns, labels, strength, counts).coef_[0], np.float64)


def difference_of_means(vectors: Floats, labels: Bools) -> Floats:
    """Return the mean of the positive vectors less that of the negative ones, shape (text, width) → (width,)."""
    found: Floats = vectors[labels].mean(0) - vectors[~labels].mean(0)
    return found


def auc(labels: Bools, scores: Floats) -> float:
    """Return the part of pairs, a positive and a negative, that scores rank rightly; ties count half."""
    from scipy.stats import rankdata

    positives = int(labels.sum())
    ranks = float(rankdata(scores)[labels].sum())
    return (ranks - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


def _logistic(columns: Floats, labels: Bools, strength: float, counts: Floats | None = None) -> Any:
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegression

    # Thousands of small fits on arrays that are known to be sound: the checks would take longer than the fits.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        return LogisticRegression(C=strength, max_iter=_MOST_STEPS).fit(columns, labels, sample_weight=counts)


def _validated(view: View, labels: Bools, inner: Sequence[Split]) -> tuple[Floats, Floats]:
    """Return mean log loss and mean AUC over the inner folds, each of shape (strength,)."""
    losses, aucs = np.zeros(len(STRENGTHS)), np.zeros(len(STRENGTHS))
    for split in inner:
        prepared = view.prepare(split.train, labels)
        seen, unseen = prepared.rows(split.train), prepared.rows(split.test)
        signs = np.where(labels[split.test], 1.0, -1.0)
        for index, strength in enumerate(STRENGTHS):
            probe = _logistic(seen, labels[split.train], strength)
            scores = unseen @ probe.coef_[0] + probe.intercept_[0]
            losses[index] += float(np.logaddexp(0, -signs * scores).mean()) / len(inner)
            aucs[index] += auc(labels[split.test], scores) / len(inner)
    return losses, aucs


@dataclass(frozen=True)
class DenseView:
    """Whole vectors, shape (text, width)."""

    vectors: Floats

    def prepare(self, texts: Ints, labels: Bools) -> PreparedDense:
        """Take means and spreads from these texts."""
        return PreparedDense(self.vectors, texts)


class PreparedDense:
    """Vectors with every coordinate brought to the same spread.

    Where they are longer than there are texts they are turned into the space that the texts span: under an L2 penalty the
    probe is the same, and its fit much faster.
    """

    def __init__(self, vectors: Floats, texts: Ints) -> None:
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        steps: list[Any] = [StandardScaler()]
        if vectors.shape[1] > len(texts):
            steps.append(PCA(svd_solver="full"))
        self._vectors = vectors
        self._pipeline = make_pipeline(*steps).fit(vectors[texts])

    def rows(self, texts: Ints) -> Floats:
        """Return the columns that a probe is fitted on."""
        found: Floats = self._pipeline.transform(self._vectors[texts])
        return found

    def weights(self, coefficients: Floats) -> Floats:
        """Return weights on the vectors' coordinates, shape (width,)."""
        turned = self._pipeline[1].components_.T @ coefficients if len(self._pipeline) > 1 else coefficients
        found: Floats = turned / self._pipeline[0].scale_
        return found


@dataclass(frozen=True)
class LatentView:
    """`k` latents of sparse activations; a CSR matrix of shape (text, latent)."""

    activations: Any
    k: int
    selection: Selection

    def prepare(self, texts: Ints, labels: Bools) -> PreparedLatents:
        """Choose the latents on these texts."""
        chooser = choose_by_l1 if self.selection == "l1" else choose_by_difference
        return PreparedLatents(self.activations, texts, chooser(self.activations, labels, texts, self.k))


class PreparedLatents:
    """The chosen latents, each brought to the same spread."""

    def __init__(self, activations: Any, texts: Ints, latents: Ints) -> None:
        from sklearn.preprocessing import StandardScaler

        self.latents = latents
        """Columns, the one chosen first coming first."""
        self._columns = activations[:, latents].toarray()
        self._scaler = StandardScaler().fit(self._columns[texts])

    def rows(self, texts: Ints) -> Floats:
        """Return the columns that a probe is fitted on."""
        found: Floats = self._scaler.transform(self._columns[texts])
        return found

    def weights(self, coefficients: Floats) -> Floats:
        """Return weights on the chosen latents' activations."""
        found: Floats = coefficients / self._scaler.scale_
        return found


def choose_by_difference(activations: Any, labels: Bools, texts: Ints, k: int) -> Ints:
    """Return the `k` latents whose mean activation differs most between the classes of `texts`, largest first."""
    weights = np.zeros(len(labels))
    positive, negative = texts[labels[texts]], texts[~labels[texts]]
    weights[positive] = 1 / len(positive)
    weights[negative] = -1 / len(negative)
    return _largest(np.abs(activations.T @ weights), k)


def choose_by_l1(activations: Any, labels: Bools, texts: Ints, k: int) -> Ints:
    """Return at most `k` latents that the L1 path gives a weight, heaviest first.

    Fewer, where the path separates the classes with fewer.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler
    from sklearn.svm import l1_min_c

    columns, own = MaxAbsScaler().fit_transform(activations[texts]), labels[texts]
    lowest = l1_min_c(columns, own, loss="log")
    weights = np.zeros(columns.shape[1])
    for factor in _PATH:
        probe = LogisticRegression(C=lowest * factor, l1_ratio=1.0, solver="liblinear", max_iter=_MOST_STEPS)
        weights = np.abs(probe.fit(columns, own).coef_[0])
        if np.count_nonzero(weights) >= k:
            break
    return _largest(weights, min(k, max(1, int(np.count_nonzero(weights)))))


def _largest(sizes: Floats, k: int) -> Ints:
    """Return the indices of the `k` largest, the lower of equal ones first."""
    bound = np.partition(sizes, len(sizes) - k)[len(sizes) - k]
    candidates = np.flatnonzero(sizes >= bound)
    return candidates[np.argsort(-sizes[candidates], kind="stable")][:k]
