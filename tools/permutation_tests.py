"""Permutation tests of many latents at once: which of them tell two sides apart, when the sides are exchangeable.

The units – texts, or documents – carry a label, first or second side, and may lie in strata. Under the null hypothesis
any arrangement of the labels that keeps each stratum's numbers was as likely as the one seen; pairs are strata of two, and
permuting them is flipping signs.

1. A latent's score is `|S − E| / σ`: S is its sum over the first side, E and σ are the mean and standard deviation of S
   over all arrangements, exact and in closed form (sampling without replacement from each stratum). For one stratum that
   orders arrangements as the difference of means and the pooled t statistic do; for pairs as the paired t does.
2. Arrangements are drawn at random, all latents sharing each one, so that their dependence is kept; or all are listed,
   where there are no more of them than were asked for. S over many arrangements is one product, matrix × labels, in blocks.
3. p = (1 + arrangements that score as high) / (1 + arrangements drawn), or the plain share where all are listed (Phipson and
   Smyth 2010): never 0.
4. `max_t`: Westfall and Young's step-down (1993, algorithm 4.1; Ge, Dudoit and Speed 2003, box 2). Latents ordered by
   score; each is compared with the largest permuted score among itself and all below it.
5. `sequential`: Besag and Clifford (1991). A latent is followed until `STOP` arrangements have scored as high, at draw l:
   then p = STOP / l, which is valid, and the draws go on for the others. The few that need small p-values get them, at a
   cost of about `STOP · ln(draws / STOP)` draws for each of the rest.

The smallest p that a latent's firings allow, all of them on one side, depends on how many labels there are, not on which
text has which, and so may decide what is tested at all (Tarone 1990).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix
from scipy.special import gammaln

from exegete.tools.sampling import I64
from exegete.tools.seeds import generator

F64 = NDArray[np.float64]
STOP = 100
"""Arrangements that score as high, after which a latent's p-value is known well enough: its relative error is a tenth."""
_DRAWS = 256
"""Arrangements in one product. Part of what a seed means: the draws come in such lots."""
_ENTRIES = 2**23
"""Scores that are held at once: 64 megabytes."""
_TIE = 1 - 1e-9
"""Sums in another order differ in their last bits; arrangements as good as the one seen must count as such."""
_DENSE = 0.05
"""Share of entries from which a dense product is the faster one."""


@dataclass(frozen=True)
class Labels:
    """Which side each unit is on, and what may be exchanged with what."""

    first: NDArray[np.bool_]
    """Shape (unit,)."""
    strata: I64
    """Shape (unit,), numbered from 0: labels are exchanged within a stratum."""

    @cached_property
    def sizes(self) -> tuple[I64, I64]:
        """Units of each stratum, all and on the first side, each of shape (stratum,)."""
        whole = np.bincount(self.strata)
        return whole, np.bincount(self.strata[self.first], minlength=len(whole))

    @cached_property
    def arrangements(self) -> int:
        """How many there are, the one seen included."""
        whole, first = self.sizes
        return math.prod(math.comb(int(n), int(m)) for n, m in zip(whole, first, strict=True))

    @property
    def balanced(self) -> bool:
        """Whether every arrangement has its mirror image, with the sides exchanged."""
        whole, first = self.sizes
        return bool((whole == 2 * first).all())

    def drawn(self, number: int, seed: int) -> Iterator[F64]:
        """Yield `number` random arrangements in lots, shape (unit, arrangement): 1 on the first side, else 0.

        The first ones are the same whatever the number.
        """
        by_stratum = np.argsort(self.strata, kind="stable")
        seen = self.first[by_stratum].astype(np.float64)
        for start in range(0, number, _DRAWS):
            uniform = generator(seed, "permutations", start).random((_DRAWS, len(self.strata)))
            lot = np.empty((_DRAWS, len(self.strata)))
            np.put_along_axis(lot, np.argsort(self.strata + uniform, axis=1), seen[None], axis=1)
            yield lot[: number - start].T

    def listed(self) -> Iterator[F64]:
        """Yield every arrangement once, as `drawn` does."""
        whole, first = self.sizes
        places = [np.flatnonzero(self.strata == stratum).tolist() for stratum in range(len(whole))]
        chosen = [list(itertools.combinations(here, int(m))) for here, m in zip(places, first, strict=True)]
        every = itertools.product(*chosen)
        while lot := list(itertools.islice(every, _DRAWS)):
            labels = np.zeros((len(self.strata), len(lot)))
            for column, parts in enumerate(lot):
                labels[list(itertools.chain.from_iterable(parts)), column] = 1
            yield labels


@dataclass(frozen=True)
class Scores:
    """What is compared: shape (latent,) each, the matrix (latent, unit)."""

    matrix: csr_matrix
    mean: F64
    deviation: F64
    seen: F64
    """`(S − E) / σ`, positive where the first side has more."""

    def of(self, chosen: NDArray[Any]) -> Scores:
        """Return those of some latents, in that order."""
        return Scores(self.matrix[chosen], self.mean[chosen], self.deviation[chosen], self.seen[chosen])

    def blocks(self) -> Iterator[tuple[slice, Any]]:
        """Yield latents and their part of the matrix, dense where that multiplies faster."""
        size = max(1, _ENTRIES // max(_DRAWS, self.matrix.shape[1]))
        for start in range(0, self.matrix.shape[0], size):
            part = self.matrix[start : start + size]
            dense = part.nnz > _DENSE * part.shape[0] * part.shape[1]
            yield slice(start, start + size), part.toarray() if dense else part

    def permuted(self, latents: slice, part: Any, labels: F64) -> F64:
        """Return the scores of some latents under arrangements, shape (latent, arrangement)."""
        scores: F64 = part @ labels
        scores -= self.mean[latents, None]
        scores /= self.deviation[latents, None]
        return np.abs(scores, out=scores)


@dataclass(frozen=True)
class Tested:
    """Results, shape (latent,) each."""

    p: F64
    adjusted: F64 | None
    """Step-down maxT: family-wise error; None of `sequential`."""
    largest: F64 | None
    """The largest score of any latent under each arrangement; None of `sequential`."""
    arrangements: int
    listed: bool
    """Whether these are all that there are."""

    @property
    def resolution(self) -> float:
        """The smallest p-value that there could be."""
        return 1 / (self.arrangements + (0 if self.listed else 1))


def scores(matrix: csr_matrix, labels: Labels, rounding: float = 1e-6) -> tuple[Scores, NDArray[np.bool_]]:
    """Return scores, and which latents vary within strata at all (the scores of the others mean nothing).

    Args:
        matrix: shape (unit, latent), float64.
        labels: of the units.
        rounding: spread within strata, as a share of the root mean square, up to which a latent counts as constant.
    """
    whole, first = (sizes.astype(np.float64) for sizes in labels.sizes)
    sums, squares = _by_stratum(matrix, labels), _by_stratum(matrix.multiply(matrix).tocsr(), labels)
    mean = sums.T @ (first / whole)
    weight = first * (whole - first) / (whole * np.maximum(whole - 1, 1))
    spread = squares.T @ weight
    variance = spread - sums.multiply(sums).T @ (weight / whole)
    varies = variance > rounding**2 * spread
    deviation = np.sqrt(np.where(varies, variance, 1.0))
    seen = (matrix.T @ labels.first.astype(np.float64) - mean) / deviation
    return Scores(matrix.T.tocsr(), mean, deviation, seen), varies


def smallest_log_p(matrix: csr_matrix, labels: Labels) -> F64:
    """Return a lower bound of the log of the smallest p-value of each latent, shape (latent,), given where it fires.

    All units that fire are put on one side, as far as they fit there; the labels as they were are not used.
    """
    fires = csr_matrix((np.ones(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape)
    counts = csc_matrix(_by_stratum(fires, labels))
    whole, first = labels.sizes
    strata, latents = counts.indices, np.repeat(np.arange(matrix.shape[1]), np.diff(counts.indptr))
    sides = []
    for side in (first, whole - first):
        log_p = _log_share(whole[strata], side[strata], counts.data.astype(np.int64))
        sides.append(np.bincount(latents, log_p, minlength=matrix.shape[1]))
    bound: F64 = np.minimum(*sides) + (math.log(2) if labels.balanced else 0.0)
    return np.minimum(bound, 0.0)


def max_t(scores: Scores, labels: Labels, permutations: int, seed: int) -> Tested:
    """Return p-values and step-down adjusted ones of the latents of `scores`."""
    order = np.argsort(np.abs(scores.seen), kind="stable")
    chosen = scores.of(order)
    bound = np.abs(chosen.seen) * _TIE
    single, joint = np.zeros(len(order)), np.zeros(len(order))
    largest = []
    for lot in _arrangements(labels, permutations, seed):
        highest = np.zeros(lot.shape[1])
        for latents, part in chosen.blocks():
            permuted = chosen.permuted(latents, part, lot)
            single[latents] += (permuted >= bound[latents, None]).sum(1)
            permuted[0] = np.maximum(permuted[0], highest)
            np.maximum.accumulate(permuted, axis=0, out=permuted)
            joint[latents] += (permuted >= bound[latents, None]).sum(1)
            highest = permuted[-1].copy()
        largest.append(highest)
    listed = labels.arrangements <= permutations + 1
    drawn = labels.arrangements if listed else permutations
    share = [(count + (not listed)) / (drawn + (not listed)) for count in (single, joint)]
    # A latent is not found unless all of higher scores are.
    share[1] = np.maximum.accumulate(share[1][::-1])[::-1]
    p, adjusted = np.empty(len(order)), np.empty(len(order))
    p[order], adjusted[order] = share
    return Tested(p, adjusted, np.concatenate(largest) if largest else np.zeros(0), drawn, listed)


def sequential(scores: Scores, labels: Labels, permutations: int, seed: int) -> Tested:
    """Return p-values as fine as `permutations` arrangements make them, without drawing all of them for each latent."""
    if labels.arrangements <= permutations + 1:
        found = max_t(scores, labels, permutations, seed)
        return Tested(found.p, None, None, found.arrangements, True)
    p = np.ones(len(scores.seen))
    alive, higher = np.arange(len(p)), np.zeros(len(p), np.int64)
    chosen, drawn = scores, 0
    for lot in _arrangements(labels, permutations, seed):
        stopped = np.zeros(len(alive), bool)
        for latents, part in chosen.blocks():
            bound = np.abs(chosen.seen[latents, None]) * _TIE
            counts = higher[latents, None] + (chosen.permuted(latents, part, lot) >= bound).cumsum(1)
            ended = counts[:, -1] >= STOP
            p[alive[latents][ended]] = STOP / (drawn + 1 + (counts[ended] >= STOP).argmax(1))
            stopped[latents], higher[latents] = ended, counts[:, -1]
        drawn += lot.shape[1]
        if stopped.any():
            alive, higher, chosen = alive[~stopped], higher[~stopped], chosen.of(~stopped)
        if not len(alive):
            break
    p[alive] = (higher + 1) / (permutations + 1)
    return Tested(p, None, None, permutations, False)


def _arrangements(labels: Labels, permutations: int, seed: int) -> Iterator[F64]:
    return labels.listed() if labels.arrangements <= permutations + 1 else labels.drawn(permutations, seed)


def _by_stratum(matrix: csr_matrix, labels: Labels) -> csr_matrix:
    """Return the sums of a matrix over each stratum's units, shape (stratum, latent)."""
    units = np.arange(len(labels.strata))
    member = csr_matrix((np.ones(len(units)), (labels.strata, units)))
    return (member @ matrix).tocsr()


def _log_share(whole: I64, side: I64, firing: I64) -> F64:
    """Return the log of the share of arrangements that put all `firing` units on a side, or fill it with them."""
    within = np.minimum(firing, side)
    share: F64 = _log_choose(whole - within, side - within) - _log_choose(whole, side)
    return share


def _log_choose(n: I64, k: I64) -> F64:
    found: F64 = gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)
    return found
