"""How much of a dictionary's error a linear map of its input predicts (Engels et al. 2024, arXiv 2410.14670, section 4).

1. Normal equations of a ridge regression from the input to the error vector and to its squared norm are summed up token
   by token in float64, so that memory does not grow with the tokens.
2. Beside the true targets stand those of another token of the same context: what a fit of nothing reaches, the floor.
3. Shares of variance are taken on contexts that the fit has not seen: 1 − squared residuals / squared deviations from the
   mean of the fitted contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TARGETS = ("error", "squared_norm", "error_floor", "squared_norm_floor")


@dataclass
class ErrorRegression:
    """Sums over tokens. The vectors are taken relative to `shift`, shape (width,), which keeps the sums well scaled."""

    shift: Tensor
    width_out: int
    tokens: int = 0

    def __post_init__(self) -> None:
        width = len(self.shift) + 1
        self._gram = self.shift.new_zeros((width, width), dtype=torch.float64)
        self._products = self.shift.new_zeros((width, 2 * (self.width_out + 1)), dtype=torch.float64)

    def add(self, x: Tensor, error: Tensor) -> None:
        """Add one context: vectors (token, width) and the errors there (token, width out)."""
        inputs, targets = self._inputs(x), _targets(error)
        self.tokens += len(x)
        self._gram += inputs.T @ inputs
        self._products += inputs.T @ targets

    def fit(self, ridge: float) -> FittedError:
        """Return the fit, with a penalty of `ridge` times the mean square of the input on every weight but the constant."""
        penalty = ridge * self._gram.diagonal()[:-1].mean()
        penalties = torch.full_like(self._gram.diagonal(), float(penalty))
        penalties[-1] = 0
        weights = torch.linalg.lstsq(self._gram + penalties.diag(), self._products, driver=self._driver()).solution
        return FittedError(self, weights, self._products[-1] / self.tokens)

    def _driver(self) -> str:
        # On the CPU one that also takes inputs of less than full rank.
        return "gelsd" if self._gram.device.type == "cpu" else "gels"

    def _inputs(self, x: Tensor) -> Tensor:
        shifted = x.double() - self.shift
        return torch.cat([shifted, torch.ones_like(shifted[:, :1])], 1)


@dataclass(frozen=True)
class FittedError:
    """Weights of the fit, shape (width + 1, target), and the mean of every target, shape (target,)."""

    regression: ErrorRegression
    weights: Tensor
    means: Tensor

    def squares(self, x: Tensor, error: Tensor) -> dict[str, tuple[float, float]]:
        """Return for each of TARGETS, over one context, its squared residuals and its squared deviations from the mean."""
        targets = _targets(error)
        residuals = (targets - self.regression._inputs(x) @ self.weights).square().sum(0)
        deviations = (targets - self.means).square().sum(0)
        width = self.regression.width_out
        parts = torch.split(torch.stack([residuals, deviations]), [width, 1, width, 1], dim=1)
        return {name: (float(part[0].sum()), float(part[1].sum())) for name, part in zip(TARGETS, parts, strict=True)}


def _targets(error: Tensor) -> Tensor:
    error = error.double()
    true = torch.cat([error, error.square().sum(1, keepdim=True)], 1)
    return torch.cat([true, true.roll(len(true) // 2, 0)], 1)
