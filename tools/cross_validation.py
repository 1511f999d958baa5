"""How well scores rank texts that the scorer has not seen: AUC over folds, with interval and shuffled-label floor.

1. Texts fall into folds with the classes in equal parts; texts of one group stay together. Other folds are drawn for each
   repeat. A `Regime` thins the training part of each fold: few texts, or few positives among them. What is tested stays.
2. An AUC is taken of each fold by itself: scores of different folds come from different fits and cannot be ranked together
   (Forman & Scholz 2010, Apples-to-apples in cross-validation studies). The figure is the mean over folds and repeats.
3. Folds share training texts, and repeats share test texts, so the variance over folds is multiplied by
   1 / (folds · repeats) + 1 / (folds − 1) (Nadeau & Bengio 2003; Bouckaert & Frank 2004) and Student's quantile taken.
   Where all folds agree, at an AUC of 1 above all, that has no width: the interval is at least that of Newcombe (2006,
   method 5) for so many positives and negatives.
4. The floor is the same again with labels shuffled within each fold, the labels of a group moving as one block (of a
   minimal pair they change places, or not): what the procedure finds where there is nothing to be found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exegete.tools.errors import UserError
from exegete.tools.seeds import derive_seed

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

INNER_FOLDS = 3
"""Folds of a training part on which penalties and hook points are chosen."""


class TooFewError(UserError):
    """There are too few texts for what was asked; the message says of what, and how many are needed."""


@dataclass(frozen=True)
class Regime:
    """What the training part of each fold is thinned to."""

    name: str
    texts: int | None = None
    """So many texts; None for all."""
    positives: float | None = None
    """This part of them positive; None for as many as there are."""


PLAIN = Regime("plain")
SCARCE = Regime("scarce", texts=20, positives=0.5)
IMBALANCED = Regime("imbalanced", positives=0.1)


@dataclass(frozen=True)
class Split:
    """Indices of texts to fit on and to test on."""

    train: Ints
    test: Ints


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Auc:
    """A cross-validated area under the ROC curve, with its floor."""

    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    spread: float
    """Standard deviation over folds and repeats."""
    floor: float
    """Mean over runs with shuffled labels; about 0.5 unless something leaks."""
    floor_highest: float
    """The highest of these runs."""
    p_value: float
    """Part of the runs, this one and the shuffled ones, that reach `value`."""


def labelled(labels: Sequence[bool | int], groups: Sequence[int | str] | None, texts: int) -> tuple[Bools, Ints]:
    """Return labels and groups as arrays of shape (text,); without groups each text is one.

    Raises:
        UserError: there are not as many as texts, a label is neither 0 nor 1, or all are equal.
    """
    for what, given in (("labels", labels), ("groups", groups)):
        if given is not None and len(given) != texts:
            raise UserError(f"{len(given)} {what} are given for {texts} texts; give one for each")
    if wrong := [(index, label) for index, label in enumerate(labels) if label not in (0, 1)]:
        raise UserError(f"the label of text {wrong[0][0]} is {wrong[0][1]!r}; it must be 0 or 1")
    truth = np.asarray(labels, bool)
    if truth.all() or not truth.any():
        raise UserError(f"all {texts} texts have the label {int(truth.any())}; give texts of both classes")
    if groups is None:
        return truth, np.arange(texts)
    _, numbers = np.unique([str(group) for group in groups], return_inverse=True)
    return truth, numbers.astype(np.int64)


def require_classes(labels: Bools, groups: Ints, folds: int) -> None:
    """Raise TooFewError unless each class has a text, or group, for every fold."""
    for label in (True, False):
        count = len(np.unique(groups[labels == label]))
        if count < folds:
            what = "texts" if len(np.unique(groups)) == len(groups) else "groups of texts"
            raise TooFewError(
                f"{count} {what} have the label {int(label)}; {folds} folds need at least {folds}: give more, or fewer folds"
            )


def draw_splits(labels: Bools, groups: Ints, folds: int, seed: int) -> list[Split]:
    """Return one fold after another as test part, the rest as training part; every text is tested once.

    Raises:
        TooFewError: a fold would lack a class.
    """
    if folds < 2:
        raise UserError(f"folds is {folds}; cross-validation needs at least 2")
    require_classes(labels, groups, folds)
    found = _folds(labels, groups, folds, seed)
    if not all(_both(labels[split.train]) and _both(labels[split.test]) for split in found):
        raise TooFewError(
            f"the groups do not fall into {folds} folds with both classes; give more groups or fewer folds"
        )
    return found


def draw_inner(labels: Bools, groups: Ints, train: Ints, seed: int) -> list[Split]:
    """Return folds of the texts `train`, as indices of all texts, leaving out those that lack a class.

    Raises:
        TooFewError: none is left.
    """
    own, theirs = labels[train], groups[train]
    folds = min(INNER_FOLDS, _units(own, theirs))
    splits = _folds(own, theirs, folds, seed) if folds > 1 else []
    usable = [split for split in splits if _both(own[split.train]) and _both(own[split.test])]
    if not usable:
        raise TooFewError(
            f"{len(train)} training texts ({int(own.sum())} of them positive) do not part into two with both classes; "
            f"give at least 2 texts, or groups, of each class to train on"
        )
    return [Split(train[split.train], train[split.test]) for split in usable]


def thin(train: Ints, labels: Bools, regime: Regime, rng: np.random.Generator) -> Ints:
    """Return the training texts that a regime leaves, in order.

    Raises:
        TooFewError: there are not as many as it asks for, or fewer than 2 of a class would be left.
    """
    positive, negative = train[labels[train]], train[~labels[train]]
    share = len(positive) / len(train) if regime.positives is None else regime.positives
    if not 0 < share < 1:
        raise UserError(f"regime {regime.name!r}: the part of positives is {share}; it must lie between 0 and 1")
    most = min(len(positive) / share, len(negative) / (1 - share))
    texts = most if regime.texts is None else regime.texts
    wanted = round(texts * share), round(texts * (1 - share))
    if wanted[0] > len(positive) or wanted[1] > len(negative) or min(wanted) < 2:
        raise TooFewError(
            f"regime {regime.name!r} takes {wanted[0]} positive and {wanted[1]} negative training texts, at least 2 each, "
            f"but a fold has {len(positive)} and {len(negative)}; give more texts"
        )
    kept = [rng.permutation(texts)[:count] for texts, count in zip((positive, negative), wanted, strict=True)]
    return np.sort(np.concatenate(kept))


def shuffled(labels: Bools, groups: Ints, parts: Sequence[Ints], rng: np.random.Generator) -> Bools:
    """Return labels shuffled among the texts of each part; the labels of a group move as one block, in any order within."""
    result = labels.copy()
    for part in parts:
        own, place = np.unique(groups[part], return_inverse=True)
        order = np.lexsort((rng.random(len(part)), place))
        moved = np.argsort(rng.permutation(len(own))[place], kind="stable")
        result[part[order]] = labels[part[moved]]
    return result


def summary(aucs: Floats, floors: Floats, positives: int, negatives: int) -> Auc:
    """Return the mean AUC with its interval and floor.

    Args:
        aucs: of each fold, shape (repeat, fold).
        floors: the same with shuffled labels, shape (shuffle, fold).
        positives: texts of the one class.
        negatives: texts of the other.
    """
    value = float(aucs.mean())
    half = _half_width(aucs)
    low, high = newcombe(value, positives, negatives)
    runs = floors.mean(1)
    p_value = (1 + int((runs >= value).sum())) / (1 + len(runs))
    bounds = max(0.0, min(low, value - half)), min(1.0, max(high, value + half))
    return Auc(value, *bounds, float(aucs.std(ddof=1)), float(runs.mean()), float(runs.max()), p_value)


def difference(first: Floats, second: Floats, positives: int, negatives: int) -> Interval:
    """Return the mean of `first − second`, AUCs of the same folds, shape (repeat, fold), with a paired interval.

    Where no fold differs from another the interval is of the two AUCs as if they were independent (MOVER, Zou & Donner
    2008): wider than the paired one would be.
    """
    paired = first - second
    value, half = float(paired.mean()), _half_width(paired)
    if half > 0:
        return Interval(value, max(-1.0, value - half), min(1.0, value + half))
    ours, theirs = float(first.mean()), float(second.mean())
    low, high = newcombe(ours, positives, negatives)
    their_low, their_high = newcombe(theirs, positives, negatives)
    return Interval(
        value, value - math.hypot(ours - low, their_high - theirs), value + math.hypot(high - ours, theirs - their_low)
    )


def newcombe(auc: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95 % interval of an AUC of so many texts (Newcombe 2006, method 5); it has a width at 0 and 1."""
    from scipy.optimize import brentq

    z2 = 1.959963984540054**2

    def outside(bound: float) -> float:
        return (auc - bound) ** 2 - z2 * _hanley(bound, positives, negatives)

    # At 0 and 1 the figure itself is a root; the bound is the other one.
    low = float(brentq(outside, 0.0, min(auc, 1 - 1e-9))) if auc > 0 else 0.0
    high = float(brentq(outside, max(auc, 1e-9), 1.0)) if auc < 1 else 1.0
    return low, high


def _hanley(auc: float, positives: int, negatives: int) -> float:
    """Return the variance of an AUC (Hanley & McNeil 1982), both sizes in its pair terms replaced by their mean."""
    pairs = (positives + negatives) / 2 - 1
    return auc * (1 - auc) * (1 + pairs * ((1 - auc) / (2 - auc) + auc / (1 + auc))) / (positives * negatives)


def _half_width(figures: Floats) -> float:
    from scipy.stats import t

    repeats, folds = figures.shape
    inflated = float(figures.var(ddof=1)) * (1 / (repeats * folds) + 1 / (folds - 1))
    return float(t.ppf(0.975, repeats * folds - 1)) * math.sqrt(inflated)


def _units(labels: Bools, groups: Ints) -> int:
    """Return of how many groups the rarer class is."""
    return min(len(np.unique(groups[labels == label])) for label in (True, False))


def _folds(labels: Bools, groups: Ints, folds: int, seed: int) -> list[Split]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    alone = len(np.unique(groups)) == len(groups)
    kind = StratifiedKFold if alone else StratifiedGroupKFold
    drawn = kind(folds, shuffle=True, random_state=derive_seed(seed, "folds") % 2**32)
    return [Split(train, test) for train, test in drawn.split(labels, labels, None if alone else groups)]


def _both(labels: Bools) -> bool:
    return bool(labels.any()) and not bool(labels.all())
