"""Which latents differ between two sets of texts: effect sizes, permutation p-values, false-discovery control.

Each text is one vector, a latent's activations pooled over its tokens (`exegete.tools.text_activations.pooled`).

1. Designs. `texts`: two independent sets. `pairs`: row i of one belongs to row i of the other (a base prompt and its variant,
   one text through two subjects). `strata`: both sides have texts of every group, and only texts of one group may change
   sides. `clusters`: texts of a group stick together (passages of one document); each group is averaged and counts once.
2. What cannot be found is not tested: a latent whose few firings could not bring its own p to `fdr` however they were
   arranged (Tarone 1990). The choice sees on how many texts a latent fires, not on which side, so it invents no
   discoveries.
3. The rest are tested by permutation (`exegete.tools.permutation_tests`), two-sided, by one of two methods.

   `maxt`, the default: Westfall and Young's step-down. The chance of any false discovery is at most `fdr`, and so is the
   false discovery rate, which is never larger: the only proof at hand that asks nothing of how latents depend on each
   other, how sparse or skewed they are. Under the null of no difference it is exact, because the labels are exchangeable
   and all latents share each permutation (Westfall and Young 1993; with differences elsewhere it needs that the latents
   without one are jointly exchangeable, their "subset pivotality"). It needs no more permutations for more latents, and
   rare ones cost it nothing: their scores are bounded below what the largest of all reaches.

   `bh`: Benjamini and Hochberg (1995) on p-values of each latent's own permutations, at least `latents / fdr` of them so
   that a single discovery is possible, followed only as long as a latent may matter (Besag and Clifford 1991; with BH:
   Bancroft, Du and Nettleton 2013). It finds more where hundreds of latents differ a little. Its proof wants positive regression
   dependence (Benjamini and Yekutieli 2001), which TopK latents that compete need not have; `benchmarks.comparing`
   measures how it fares. It bounds a mean: where latents are correlated, false discoveries come in clumps, none in most
   comparisons and many in a few.

   A null pooled over latents (SAM: Tusher, Tibshirani and Chu 2001) would be finer for fewer permutations, but holds only
   if all latents have one null distribution, and the score of a latent that fires on nine texts has not that of one that
   fires on all.
4. Effects are of the sets as they are. Those of discoveries are chosen for being large and so flatter themselves; take new
   texts to measure them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse, vstack
from scipy.stats import false_discovery_control

from exegete.tools.dictionaries import Dictionary
from exegete.tools.effect_sizes import effect_sizes
from exegete.tools.errors import UserError
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import LiveModel
from exegete.tools.permutation_tests import F64, Labels, Tested, max_t, scores, sequential, smallest_log_p
from exegete.tools.sampling import I64
from exegete.tools.text_activations import Pooling, pooled

Method = Literal["maxt", "bh"]
Design = Literal["texts", "pairs", "strata", "clusters"]
Groups = tuple[Sequence[Hashable], Sequence[Hashable]]

ROUNDING = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
"""What a subject's number format moves activations by, as a share, with room."""
PERMUTATIONS = 9_999
"""Of `maxt` by default: the standard error of an adjusted p of 0.05 is then 0.002."""


@dataclass(frozen=True)
class Difference:
    """One latent, tested. Texts are units: pairs count once for each side, clusters once."""

    latent: int
    mean_first: float
    """Of the pooled activation."""
    mean_second: float
    rate_first: float
    """Share of texts on which it fires, in 0 … 1."""
    rate_second: float
    effect: float
    """`(mean_first − mean_second)` in standard deviations within the sides, pooled (Cohen's d); infinite where both sides
    are constant and differ."""
    low: float
    """95 % interval of the effect, by the delta method over units; rough for latents that fire on a dozen texts."""
    high: float
    auroc: float
    """Chance that a text of the first side has the higher activation, ties half: 0.5 is no difference."""
    score: float
    """`(S − E) / σ` over all arrangements; compare with the `floor` of the comparison."""
    p: float
    q: float
    """Below `fdr` for discoveries: adjusted p of `maxt`, Benjamini–Hochberg's q of `bh`."""
    n_first: int
    n_second: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two sets of texts compared. Arrays have shape (tested latent,), in the order of latents."""

    method: Method
    design: Design
    fdr: float
    seed: int
    permutations: int
    """Arrangements of the labels: drawn, or `exact`, all that there are."""
    exact: bool
    resolution: float
    """The smallest p-value that there could be."""
    n_first: int
    """Units on the first side."""
    n_second: int
    latents: int
    """Of the dictionary."""
    firing: int
    """Latents that fire on any of the texts."""
    tested: int
    """Latents that could be found; `firing − tested` fire too rarely, or the same everywhere."""
    floor: float | None
    """Score that the largest of all latents exceeds in a share `fdr` of arrangements; None of `bh`."""
    columns: dict[str, NDArray[Any]]
    """Field of `Difference` → values."""

    @property
    def discoveries(self) -> list[Difference]:
        """Latents with `q ≤ fdr`, the strongest first."""
        return self.rows(int((self.columns["q"] <= self.fdr).sum()))

    def rows(self, limit: int | None = None) -> list[Difference]:
        """Return the first `limit` of the tested latents by q, then score."""
        order = np.lexsort((-np.abs(self.columns["score"]), self.columns["q"]))[:limit]
        chosen = {name: values[order].tolist() for name, values in self.columns.items()}
        return [
            Difference(**dict(zip(chosen, row, strict=True)), n_first=self.n_first, n_second=self.n_second)
            for row in zip(*chosen.values(), strict=True)
        ]


def compare(
    first: Any,
    second: Any,
    *,
    design: Design = "texts",
    groups: Groups | None = None,
    method: Method = "maxt",
    permutations: int | None = None,
    fdr: float = 0.05,
    seed: int = 0,
    rounding: float = 1e-4,
) -> Comparison:
    """Return which latents differ between two sets of texts.

    Args:
        first: pooled activations, sparse or dense, shape (text, latent).
        second: of the other texts, the same latents.
        design: what may be exchanged under the null hypothesis; see the module.
        groups: for "strata" and "clusters", each text's group (say its document), of the first and the second set.
        method: "maxt" or "bh"; see the module.
        permutations: arrangements of the labels; all are listed where there are no more. None: 9,999 for `maxt`; for
            `bh` so many that `resolution ≤ fdr / tested`.
        fdr: false discovery rate to keep below, in 0 … 1.
        seed: of the permutations.
        rounding: spread, as a share of a latent's root mean square, up to which it counts as constant. The length of a
            prompt decides what it is batched with, and so moves activations a little; that is no difference of texts.

    Raises:
        UserError: a set is empty, has another number of latents than the other, or values that are not finite; design,
            groups, method, permutations or `fdr` make no sense; or the texts are so few that no p-value could reach `fdr`.
    """
    _check(design, groups, method, permutations, fdr)
    if not 0 <= rounding < 1:
        raise UserError(f"rounding is {rounding}; it is a share, for example 1e-4")
    units, labels = _units(_matrix(first, "first"), _matrix(second, "second"), design, groups)
    _require_enough(labels, permutations, fdr, design)
    fires = np.bincount(units.indices, minlength=units.shape[1]) > 0
    found, varies = scores(units, labels, rounding)
    latents = np.flatnonzero(varies & (smallest_log_p(units, labels) <= math.log(fdr)))
    wanted = _permutations(permutations, method, len(latents), fdr)
    tested = (max_t if method == "maxt" else sequential)(found.of(latents), labels, wanted, seed)
    q = tested.adjusted if tested.adjusted is not None else _benjamini_hochberg(tested.p)
    sizes = effect_sizes(units[:, latents], labels.first, pairs=design == "pairs")
    columns: dict[str, NDArray[Any]] = {"latent": latents, **sizes}
    return Comparison(
        method=method,
        design=design,
        fdr=fdr,
        seed=seed,
        permutations=tested.arrangements,
        exact=tested.listed,
        resolution=tested.resolution,
        n_first=int(labels.first.sum()),
        n_second=int((~labels.first).sum()),
        latents=units.shape[1],
        firing=int(fires.sum()),
        tested=len(latents),
        floor=_floor(tested, fdr),
        columns=columns | {"score": found.seen[latents], "p": tested.p, "q": q},
    )


def compare_prompts(
    model: LiveModel,
    dictionary: Dictionary,
    first: Sequence[Tokens],
    second: Sequence[Tokens],
    *,
    pooling: Pooling = "max",
    **options: Any,
) -> Comparison:
    """Return which latents differ between two sets of prompts; `options` as of `compare`.

    Raises:
        UserError: as `compare` and `pooled` do.
    """
    sides = [
        _pooled(model, dictionary, prompts, pooling, name) for prompts, name in ((first, "first"), (second, "second"))
    ]
    return compare(*sides, **{"rounding": ROUNDING[model.subject.dtype], **options})


def compare_subjects(
    first: LiveModel,
    second: LiveModel,
    dictionaries: tuple[Dictionary, Dictionary],
    prompts: Sequence[Tokens],
    *,
    pooling: Pooling = "max",
    **options: Any,
) -> Comparison:
    """Return which latents of a shared dictionary differ between two subjects, say a base model and its fine-tuned one.

    Args:
        first: one subject.
        second: the other.
        dictionaries: the same weights as attached to each; fingerprints, which name the subject too, may differ.
        prompts: texts that both subjects read; they are compared in pairs.
        pooling: over the tokens of a text.
        options: as of `compare`, but for `design` and `groups`.

    Raises:
        UserError: the dictionaries differ, the subjects' tokenizers do, or as `compare` and `pooled` do.
    """
    if first.subject.tokenizer_digest != second.subject.tokenizer_digest:
        raise UserError(
            f"subjects {first.subject.name!r} and {second.subject.name!r} have different tokenizers, so the same tokens "
            "are not the same text; compare subjects that share one"
        )
    require_shared(*dictionaries)
    pairs = zip((first, second), dictionaries, ("first", "second"), strict=True)
    sides = [_pooled(model, dictionary, prompts, pooling, name) for model, dictionary, name in pairs]
    rounding = max(ROUNDING[model.subject.dtype] for model in (first, second))
    return compare(*sides, design="pairs", **{"rounding": rounding, **options})


def require_shared(first: Dictionary, second: Dictionary) -> None:
    """Raise UserError unless two dictionaries are one, whatever subject each is attached to.

    Plain ones are compared by their weights. Of others the weights cannot be read, so the same object must be given.
    """
    from exegete.tools.dictionaries import PlainDictionary

    if first is second:
        return
    names = f"dictionaries {first.name!r} and {second.name!r}"
    if not (isinstance(first, PlainDictionary) and isinstance(second, PlainDictionary)):
        raise UserError(
            f"{names}: weights that cannot be read cannot be compared; attach one dictionary to both subjects"
        )
    for name in ("hook_point", "hook_point_out", "width", "latents", "activation", "k"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise UserError(f"{names} differ: {name} is {one!r} and {other!r}; load one dictionary with both subjects")
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias", "threshold", "input_shift"):
        if not _same(getattr(first, name), getattr(second, name)):
            raise UserError(f"{names} differ in their {name}; load one dictionary with both subjects")


def _same(one: Any, other: Any) -> bool:
    import torch

    if one is None or other is None:
        return one is other
    return one is other or torch.equal(one.cpu(), other.cpu())


def _pooled(model: LiveModel, dictionary: Dictionary, prompts: Sequence[Tokens], pooling: Pooling, name: str) -> Any:
    if not prompts:
        raise UserError(f"the {name} set has no text; give at least two")
    return pooled(model, dictionary, prompts, pooling)


def _check(design: Design, groups: Groups | None, method: Method, permutations: int | None, fdr: float) -> None:
    if design not in ("texts", "pairs", "strata", "clusters"):
        raise UserError(f'design {design!r} is not one of "texts", "pairs", "strata", "clusters"')
    if method not in ("maxt", "bh"):
        raise UserError(f'method {method!r} is not one of "maxt", "bh"')
    if (groups is not None) != (design in ("strata", "clusters")):
        given = "no groups are given" if groups is None else "groups are given"
        raise UserError(f'{given} and the design is {design!r}; give groups with design="strata" or "clusters", only')
    if not 0 < fdr < 1:
        raise UserError(f"fdr is {fdr}; it must lie between 0 and 1, for example 0.05")
    if permutations is not None and permutations < 1:
        raise UserError(f"permutations is {permutations}; at least 1 is needed")


def _matrix(given: Any, name: str) -> csr_matrix:
    """Return a set's pooled activations in float64, without stored zeros."""
    if not issparse(given) and np.ndim(given) != 2:
        raise UserError(f"the {name} set has shape {np.shape(given)}; it must be (text, latent)")
    matrix = csr_matrix(given, dtype=np.float64, copy=True)
    if 0 in matrix.shape:
        raise UserError(
            f"the {name} set has {matrix.shape[0]} texts of {matrix.shape[1]} latents; give at least two texts"
        )
    if not np.isfinite(matrix.data).all():
        row = int(np.searchsorted(matrix.indptr, np.flatnonzero(~np.isfinite(matrix.data))[0], side="right")) - 1
        raise UserError(f"text {row} of the {name} set has an activation that is not finite; leave it out or mend it")
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _units(first: csr_matrix, second: csr_matrix, design: Design, groups: Groups | None) -> tuple[csr_matrix, Labels]:
    """Return what the labels are exchanged between, shape (unit, latent), and the labels."""
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"the first set has {first.shape[1]} latents and the second {second.shape[1]}; encode both with one dictionary"
        )
    if design == "pairs" and first.shape[0] != second.shape[0]:
        raise UserError(f"{first.shape[0]} and {second.shape[0]} texts make no pairs; give as many of each")
    if design == "clusters" and groups is not None:
        names = [
            _names(side, part, name)
            for side, part, name in zip((first, second), groups, ("first", "second"), strict=True)
        ]
        if both := set(names[0]) & set(names[1]):
            raise UserError(f'group {next(iter(both))!r} has texts in both sets; use design="strata"')
        first, second = (_averaged(side, part) for side, part in zip((first, second), names, strict=True))
    is_first = np.arange(first.shape[0] + second.shape[0]) < first.shape[0]
    strata = np.zeros(len(is_first), np.int64)
    if design == "pairs":
        strata = np.tile(np.arange(first.shape[0]), 2)
    if design == "strata" and groups is not None:
        strata = _strata([*_names(first, groups[0], "first"), *_names(second, groups[1], "second")])
    return vstack([first, second], format="csr"), Labels(is_first, strata)


def _names(side: csr_matrix, groups: Sequence[Hashable], name: str) -> Sequence[Hashable]:
    if len(groups) != side.shape[0]:
        raise UserError(f"the {name} set has {side.shape[0]} texts and {len(groups)} groups; give each text's group")
    return groups


def _strata(names: Sequence[Hashable]) -> I64:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _averaged(side: csr_matrix, groups: Sequence[Hashable]) -> csr_matrix:
    """Return the mean of each group's texts, shape (group, latent)."""
    strata = _strata(groups)
    share = 1 / np.bincount(strata)[strata]
    return (csr_matrix((share, (strata, np.arange(len(strata))))) @ side).tocsr()


def _require_enough(labels: Labels, permutations: int | None, fdr: float, design: Design) -> None:
    """Raise UserError where no p-value could reach `fdr`."""
    first, second = int(labels.first.sum()), int((~labels.first).sum())
    least = (2 if labels.balanced else 1) / labels.arrangements
    if least > fdr:
        raise UserError(
            f"{first} and {second} {'clusters' if design == 'clusters' else 'texts'} can be arranged in "
            f"{labels.arrangements} ways, so no p-value is below {least:.3g} and nothing could be found at fdr {fdr}; "
            "give more texts"
        )
    if permutations is not None and 1 / (permutations + 1) > fdr:
        raise UserError(
            f"{permutations} permutations give no p-value below {1 / (permutations + 1):.3g}; for fdr {fdr} "
            f"take at least {math.ceil(1 / fdr)}"
        )


def _permutations(asked: int | None, method: Method, tested: int, fdr: float) -> int:
    if asked is not None:
        return asked
    return PERMUTATIONS if method == "maxt" else max(PERMUTATIONS, math.ceil(tested / fdr))


def _benjamini_hochberg(p: F64) -> F64:
    q: F64 = false_discovery_control(p, method="bh") if len(p) else p
    return q


def _floor(tested: Tested, fdr: float) -> float | None:
    if tested.largest is None or not len(tested.p):
        return None
    return float(np.quantile(tested.largest, 1 - fdr, method="higher"))
