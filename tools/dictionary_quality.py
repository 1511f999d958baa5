"""How well a dictionary stands for what is at its hook point, on given contexts.

1. A first pass takes the mean vectors.
2. A second counts active latents, compares the reconstruction with its target (for a transcoder, the vectors at the hook
   point that it writes to), and runs the model on with the reconstruction in place of it, with zeros and with the mean.
3. A third, over the half of the contexts that the regression of step 2 has not seen, says which share of the error a
   linear map of the input predicts (`error_regression`).

Special tokens (beginning, end, padding) keep their own vectors, are not counted and not predicted: dictionaries are not
trained on them. Intervals are Student's at 95 %, over contexts (for ratios of sums, by linearisation). Memory holds a
batch, a dozen numbers for each context, and for step 3 matrices of width × width.

Fraction of variance unexplained, L0 and loss recovered: Gao et al. 2024 (arXiv 2406.04093); SAEBench.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exegete.tools.dictionaries import Dictionary
from exegete.tools.error_regression import TARGETS, ErrorRegression, FittedError
from exegete.tools.errors import UserError
from exegete.tools.estimates import Estimate, estimate
from exegete.tools.interventions import Tokens
from exegete.tools.live_model import Batch, Keep, LiveModel, Reading, Trial
from exegete.tools.reconstructions import Coded, code, distances, loss
from exegete.tools.seeds import generator

if TYPE_CHECKING:
    from exegete.tools.corpus import Corpus

T = TypeVar("T")

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CONTEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class Losses:
    """Cross-entropy of the next token in nats, with what stands at the hook point that the dictionary writes to."""

    clean: Estimate
    reconstruction: Estimate
    zeros: Estimate
    mean: Estimate
    recovered: Estimate
    """(zeros − reconstruction) / (zeros − clean)."""
    recovered_from_mean: Estimate
    """(mean − reconstruction) / (mean − clean)."""
    predicted_tokens: int


@dataclass(frozen=True)
class ErrorShares:
    """What of the error a linear map of the input predicts, on contexts that it was not fitted on."""

    status: Literal["ok", "too few tokens", "no error"]
    """`too few tokens`: fewer than twice the weights of each target, so that a fit would say nothing. `no error`: the
    error does not vary, so that there is nothing to share. The estimates are None in both cases."""
    fitted_tokens: int
    held_out_tokens: int
    linear: Estimate | None = None
    """Share of the error's variance; what remains is the non-linear share."""
    non_linear: Estimate | None = None
    """1 − `linear`."""
    linear_floor: Estimate | None = None
    """`linear` where each error belongs to another token of its context."""
    squared_norm: Estimate | None = None
    """Share of the variance of the error's squared norm."""
    squared_norm_floor: Estimate | None = None
    fvu_non_linear: Estimate | None = None
    """Squared error that is not predicted, over the variance of the target."""
    ridge: float | None = None
    """Penalty of the fit of `linear`, relative to the mean variance of the input."""


@dataclass(frozen=True)
class Quality:
    """What `dictionary_quality` returns. The n of every estimate is the number of contexts."""

    dictionary: str
    """Fingerprint."""
    tokens: int
    """That were counted."""
    special_tokens: int
    """That were left out."""
    l0: Estimate
    """Latents with an activation other than 0, in a token."""
    l0_quantiles: dict[float, float]
    """Over tokens."""
    dead: int
    """Latents that are 0 on all of `tokens`. One that fires on more than 3 in `tokens` would show with 95 %."""
    dead_share: float
    fvu: Estimate
    """Squared error over the target's squared distance from its mean, both summed over tokens. Predicting the mean: 1."""
    fvu_per_token: Estimate
    """Mean over tokens of the same ratio."""
    cosine: Estimate
    """Mean over tokens, of reconstruction and target."""
    losses: Losses
    error: ErrorShares


def dictionary_quality(
    model: LiveModel,
    contexts: Sequence[Sequence[int]],
    dictionary: str | None = None,
    *,
    seed: int = 0,
) -> Quality:
    """Measure a dictionary on contexts.

    Args:
        model: with the dictionary attached.
        contexts: tokens, as `LiveModel.tokens` makes them, or `CorpusContexts`. They are read three times.
        dictionary: name or fingerprint; None: the only one.
        seed: of which half of the contexts the error is fitted on.

    Raises:
        UserError: there is no context, or none with text; one is too long; no such dictionary is attached; the vectors
            or the reconstruction are not finite, or do not vary.
    """
    if not len(contexts):
        raise UserError("there is no context to measure on; give at least one")
    measuring = _Measuring(model, model.dictionary(dictionary), contexts, seed)
    measuring.take_means()
    measuring.compare()
    return measuring.quality(measuring.shares())


@dataclass(frozen=True)
class CorpusContexts(Sequence[Tokens]):
    """Contexts `start` … `stop` of a corpus as they are on disk, less padding; each is read when it is asked for."""

    corpus: Corpus
    start: int = 0
    stop: int | None = None

    def __len__(self) -> int:
        stop = self.corpus.contexts if self.stop is None else min(self.stop, self.corpus.contexts)
        return max(0, stop - self.start)

    def __getitem__(self, number: int) -> Tokens:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        context = self.start + number
        counted = np.flatnonzero(self.corpus.mask(context, context + 1)[0])
        length = int(counted[-1]) + 1 if len(counted) else 1
        return tuple(self.corpus.tokens(context, context + 1)[0, :length].tolist())


@dataclass
class _Measuring:
    """The passes. `_sums` has a row for each context, columns by name."""

    model: LiveModel
    dictionary: Dictionary
    contexts: Sequence[Sequence[int]]
    seed: int
    special_tokens: int = 0
    _sums: dict[str, list[float]] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    """Trial, by its id → number of its context."""

    def __post_init__(self) -> None:
        device = self.model.subject.device
        self._points = list(dict.fromkeys((self.dictionary.hook_point, self.dictionary.hook_point_out)))
        self._fired = torch.zeros(self.dictionary.latents, dtype=torch.bool, device=device)
        self._special = torch.tensor(sorted(self.model.subject.special_tokens), device=device, dtype=torch.long)
        self._histogram = np.zeros(self.dictionary.latents + 1, np.int64)
        draws = generator(self.seed, "dictionary quality", len(self.contexts)).permutation(len(self.contexts))
        self._is_fitted: NDArray[np.bool_] = draws % 2 == 0

    def take_means(self) -> None:
        """Take the mean vector at both hook points."""
        totals = [torch.zeros(self.model.subject.width(point), dtype=torch.float64) for point in self._points]
        tokens = 0
        for found in self._pass(self._summed, "none", range(len(self.contexts))):
            for count, sums in found:
                tokens += count
                totals = [total + part for total, part in zip(totals, sums, strict=True)]
        if not tokens:
            raise UserError("the contexts hold special tokens only; give some with text")
        means = [(total / tokens).to(self.model.subject.device) for total in totals]
        self._means = dict(zip(self._points, means, strict=True))
        self._regression = ErrorRegression(self._means[self._points[0]], len(self._means[self._points[-1]]))

    def _summed(self, reading: Reading) -> list[tuple[int, list[Tensor]]]:
        counted = self._counted(reading.batch)
        vectors = [reading.vectors[point] * counted[..., None] for point in self._points]
        sums = [one.double().sum(1).cpu() for one in vectors]
        return [(int(count), [one[row] for one in sums]) for row, count in enumerate(counted.sum(1).tolist())]

    def compare(self) -> None:
        """Compare reconstruction and target, and what the model says with either."""
        for found in self._pass(self._compared, "all", range(len(self.contexts))):
            for sums in found:
                for name, value in sums.items():
                    self._sums.setdefault(name, []).append(value)

    def _compared(self, reading: Reading) -> list[dict[str, float]]:
        coded = code(self.dictionary, reading, self._counted(reading.batch))
        columns = distances(coded, self._means[self._points[-1]]) | self._losses(reading, coded)
        rows = torch.stack(list(columns.values()), 1).tolist()
        # Nothing that may run out of memory comes after the first sum: a batch that does is run again, in halves.
        self.special_tokens += int(reading.batch.mask.sum()) - len(coded.x)
        self._fired |= coded.fired
        self._histogram += np.bincount(coded.active.cpu().numpy(), minlength=len(self._histogram))
        for trial, (x, error, _) in zip(reading.batch.trials, coded.each(), strict=True):
            if len(x) and self._is_fitted[self._numbers[id(trial)]]:
                self._regression.add(x, error)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _losses(self, reading: Reading, coded: Coded) -> dict[str, Tensor]:
        """Return summed cross-entropies, each of shape (context,), and over how many tokens."""
        batch, point = reading.batch, self._points[-1]
        predicted = coded.counted[:, 1:] & batch.mask[:, :-1]
        mean = self._means[point].expand_as(coded.target)
        found = {"predicted": predicted.sum(1).double(), "clean": loss(reading.logits, batch.tokens, predicted)}
        for name, instead in (
            ("reconstruction", coded.reconstruction),
            ("zeros", torch.zeros_like(coded.target)),
            ("mean", mean),
        ):
            spliced = reading.vectors[point].clone()
            spliced[coded.counted] = instead.to(spliced.dtype)
            with self.model.editing(batch), torch.inference_mode(), self.model.hooked(point, _constant(spliced)):
                found[name] = loss(self.model.logits(batch.tokens, batch.mask, last=False), batch.tokens, predicted)
        return found

    def shares(self) -> ErrorShares:
        """Fit the error on half of the contexts, and take the shares on the other half."""
        tokens = np.array(self._sums["tokens"], np.int64)
        counts = int(tokens[self._is_fitted].sum()), int(tokens[~self._is_fitted].sum())
        if counts[0] < 2 * (self.dictionary.width + 1) or not counts[1]:
            return ErrorShares("too few tokens", *counts)
        fitted = self._regression.fit()
        held_out = [int(number) for number in np.flatnonzero(~self._is_fitted & (tokens > 0))]
        columns: dict[str, list[tuple[float, float]]] = {}
        for found in self._pass(lambda reading: self._evaluated(reading, fitted), "none", held_out):
            for one in found:
                for name, squares in one.items():
                    columns.setdefault(name, []).append(squares)
        if not all(sum(below for _, below in columns[name]) > 0 for name in columns):
            return ErrorShares("no error", *counts)
        remaining = {name: _ratio(*zip(*columns[name], strict=True)) for name in (*TARGETS, "fvu")}
        explained = {name: _less(1.0, remaining[name]) for name in TARGETS}
        return ErrorShares(
            "ok",
            *counts,
            linear=explained["error"],
            non_linear=remaining["error"],
            linear_floor=explained["error_floor"],
            squared_norm=explained["squared_norm"],
            squared_norm_floor=explained["squared_norm_floor"],
            fvu_non_linear=remaining["fvu"],
            ridge=fitted.ridge,
        )

    def _evaluated(self, reading: Reading, fitted: FittedError) -> list[dict[str, tuple[float, float]]]:
        found = []
        for x, error, target in code(self.dictionary, reading, self._counted(reading.batch)).each():
            squares = fitted.squares(x, error)
            variance = float((target - self._means[self._points[-1]]).square().sum())
            found.append(squares | {"fvu": (squares["error"][0], variance)})
        return found

    def quality(self, error: ErrorShares) -> Quality:
        """Return what was measured."""
        sums = {name: np.array(column) for name, column in self._sums.items()}
        if not float(sums["variance"].sum()) > 0:
            raise UserError(f"the vectors at {self._points[-1]!r} are all the same; give contexts that differ")
        per_token = {name: _ratio(sums[name], sums["tokens"]) for name in ("l0", "fvu_per_token", "cosine")}
        dead = int((~self._fired).sum())
        return Quality(
            dictionary=self.dictionary.fingerprint,
            tokens=int(sums["tokens"].sum()),
            special_tokens=self.special_tokens,
            l0_quantiles=_quantiles(self._histogram),
            dead=dead,
            dead_share=dead / self.dictionary.latents,
            fvu=_ratio(sums["squared_error"], sums["variance"]),
            losses=_all_losses(sums),
            error=error,
            **per_token,
        )

    def _pass(
        self, read: Callable[[Reading], Sequence[T]], keep: Keep, numbers: Sequence[int]
    ) -> Iterator[Sequence[T]]:
        """Yield what `read` returns for each context of these numbers, some at a time."""
        for start in range(0, len(numbers), _CONTEXTS_AT_ONCE):
            chosen = numbers[start : start + _CONTEXTS_AT_ONCE]
            trials = [Trial(tuple(self.contexts[number])) for number in chosen]
            self._numbers = {id(trial): number for trial, number in zip(trials, chosen, strict=True)}
            yield self.model.run(trials, read, keep=keep, points=self._points)

    def _counted(self, batch: Batch) -> Tensor:
        return batch.mask & ~torch.isin(batch.tokens, self._special)


def _constant(vectors: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: vectors


def _all_losses(sums: dict[str, NDArray[np.float64]]) -> Losses:
    if not sums["predicted"].sum():
        raise UserError("no token follows another in the contexts, so no loss can be taken; give longer ones")
    means = {name: _ratio(sums[name], sums["predicted"]) for name in ("clean", "reconstruction", "zeros", "mean")}

    def recovered(baseline: str) -> Estimate:
        return _ratio(sums[baseline] - sums["reconstruction"], sums[baseline] - sums["clean"])

    return Losses(
        **means,
        recovered=recovered("zeros"),
        recovered_from_mean=recovered("mean"),
        predicted_tokens=int(sums["predicted"].sum()),
    )


def _ratio(above: Sequence[float] | NDArray[np.float64], below: Sequence[float] | NDArray[np.float64]) -> Estimate:
    """Return the ratio of two sums over contexts, with the interval of its linearisation."""
    numerators, denominators = np.asarray(above, np.float64), np.asarray(below, np.float64)
    ratio = numerators.sum() / denominators.sum()
    return estimate(ratio + (numerators - ratio * denominators) / denominators.mean())


def _less(total: float, part: Estimate) -> Estimate:
    low, high = (None if end is None else total - end for end in (part.high, part.low))
    return part._replace(value=total - part.value, low=low, high=high)


def _quantiles(histogram: NDArray[np.int64]) -> dict[float, float]:
    """Return the smallest count that so large a share of the tokens does not exceed."""
    cumulative = np.cumsum(histogram) / histogram.sum()
    return {share: float(np.searchsorted(cumulative, share - 1e-12)) for share in QUANTILES}
