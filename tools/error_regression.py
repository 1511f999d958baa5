"""How much of a dictionary's error a linear map of its input predicts (Engels et al. 2024, arXiv 2410.14670).

1. Normal equations of a ridge regression from the input to the error vector and to its squared norm are summed up token
   by token in float64, so that memory does not grow with the tokens. The penalty of each target is the one of a ladder
   that generalised cross-validation prefers (Golub, Heath, Wahba 1979), which these sums suffice for.
2. Beside the true targets stand those of another token of the same context: what a fit of nothing reaches, the floor.
3. Shares of variance are taken on contexts that the fit has not seen: 1 − squared residuals / squared deviations from the
   mean of the fitted contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(-8, 4))
TARGETS = ("error", "squared_norm", "error_floor", "squared_norm_floor")


@dataclass
class ErrorRegression:
    """Sums over tokens. The vectors are taken relative to `shift`, shape (width,), which keeps the sums well scaled."""

    shift: Tensor
    width_out: int
    tokens: int = 0

    def __post_init__(self) -> None:
        width, targets = len(self.shift) + 1, 2 * (self.width_out + 1)
        self._gram = self.shift.new_zeros((width, width), dtype=torch.float64)
        self._products = self.shift.new_zeros((width, targets), dtype=torch.float64)
        self._squares = self.shift.new_zeros(targets, dtype=torch.float64)

    def add(self, x: Tensor, error: Tensor) -> None:
        """Add one context: vectors (token, width) and the errors there (token, width out)."""
        inputs, targets = self._inputs(x), _targets(error)
        self.tokens += len(x)
        self._gram += inputs.T @ inputs
        self._products += inputs.T @ targets
        self._squares += targets.square().sum(0)

    def fit(self) -> FittedError:
        """Return the fit to what was added."""
        mean_input, means = self._gram[-1, :-1] / self.tokens, self._products[-1] / self.tokens
        covariance = self._gram[:-1, :-1] - self.tokens * torch.outer(mean_input, mean_input)
        products = self._products[:-1] - self.tokens * torch.outer(mean_input, means)
        squares = self._squares - self.tokens * means.square()
        scales, axes = torch.linalg.eigh(covariance)
        scales = scales.clamp_min(0)
        groups = zip(self._groups(axes.T @ products), self._groups(squares[None]), strict=True)
        fits = [_chosen(scales, product, float(square.sum()), self.tokens) for product, square in groups]
        slopes = axes @ torch.cat([weights for weights, _ in fits], 1)
        weights = torch.cat([slopes, (means - mean_input @ slopes)[None]])
        return FittedError(self, weights, means, fits[0][1])

    def _groups(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of each of TARGETS."""
        return torch.split(values, [self.width_out, 1, self.width_out, 1], dim=1)

    def _inputs(self, x: Tensor) -> Tensor:
        shifted = x.double() - self.shift
        return torch.cat([shifted, torch.ones_like(shifted[:, :1])], 1)


@dataclass(frozen=True)
class FittedError:
    """Weights of the fit, shape (width + 1, target), and the mean of every target, shape (target,)."""

    regression: ErrorRegression
    weights: Tensor
    means: Tensor
    ridge: float
    """Penalty on the weights of the error vector, relative to the mean variance of the input."""

    def squares(self, x: Tensor, error: Tensor) -> dict[str, tuple[float, float]]:
        """Return for each of TARGETS, over one context, its squared residuals and its squared deviations from the mean."""
        targets = _targets(error)
        residuals = (targets - self.regression._inputs(x) @ self.weights).square().sum(0)
        deviations = (targets - self.means).square().sum(0)
        parts = self.regression._groups(torch.stack([residuals, deviations]))
        return {name: (float(part[0].sum()), float(part[1].sum())) for name, part in zip(TARGETS, parts, strict=True)}


def _chosen(scales: Tensor, products: Tensor, squares: float, tokens: int) -> tuple[Tensor, float]:
    """Return weights along the input's axes, shape (axis, target), and their ridge: the one of the least GCV score."""
    best: tuple[float, Tensor, float] | None = None
    for ridge in RIDGES:
        shrunk = scales + max(ridge * float(scales.mean()), torch.finfo(torch.float64).tiny)
        weights = products / shrunk[:, None]
        residual = squares - 2 * float((products * weights).sum()) + float((scales[:, None] * weights.square()).sum())
        free = 1 - (1 + float((scales / shrunk).sum())) / tokens
        score = max(residual, 0.0) / free**2 if free > 0 else float("inf")
        if best is None or score < best[0]:
            best = (score, weights, ridge)
    assert best is not None
    return best[1], best[2]


def _targets(error: Tensor) -> Tensor:
    error = error.double()
    true = torch.cat([error, error.square().sum(1, keepdim=True)], 1)
    return torch.cat([true, true.roll(len(true) // 2, 0)], 1)
