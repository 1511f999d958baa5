"""Screening: what a judge would say on the refine split of an explanation whose predicate was run there, without a call.

1. On the control subset the explanations of the screened rung are scored both ways.
2. A line is fitted from what the predicate reaches to what the judge gives, drawn towards no dependence as if `PRIOR` latents
   of the spread `SPREAD` had shown none.
3. A latent's reckoned score lies on the line. Its 95 % interval is that of a latent, not of the line: the standard deviation of
   the residuals, which holds the judge's own noise as well, times 1.96.
4. The control subset's own latents are reckoned by lines that are fitted without them, so that they look like all others.

A predicate and a judge are two readers of one explanation; the line is what makes rungs that were read by either comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from exegete.evaluators.refine_score import Refined
from exegete.evaluators.statistics import Z_95
from exegete.tools.errors import UserError

PRIOR = 8.0
SPREAD = 0.1
LEAST = 10
"""Latents that a line takes."""


@dataclass(frozen=True, slots=True)
class Screening:
    """The frozen fit of one run."""

    latents: int
    """That it rests on."""
    screened: float
    """Mean of what predicates reach there."""
    judged: float
    """Mean of what the judge gives."""
    slope: float
    deviation: float
    """Standard deviation of a latent about the line."""

    def reckoned(self, screened: Refined) -> Refined:
        """Return what a judge would have said; undefined where the predicate has no score."""
        if screened.value is None:
            return replace(screened, low=None, high=None)
        value = _bounded(self.judged + self.slope * (screened.value - self.screened))
        half = Z_95 * self.deviation
        return replace(screened, value=value, low=_bounded(value - half), high=_bounded(value + half))

    def described(self) -> dict[str, Any]:
        """Return it as JSON values, to be stored with the run."""
        return asdict(self)

    @classmethod
    def restored(cls, stored: Mapping[str, Any]) -> Screening:
        """Return what `described` gave."""
        return cls(**stored)


def fit_screening(screened: Sequence[float], judged: Sequence[float]) -> Screening:
    """Return the fit of what a judge gives, shape (latent,), on what predicates reach, shape (latent,).

    Raises:
        UserError: fewer than `LEAST` latents have both.
    """
    if len(screened) < LEAST:
        raise UserError(
            f"only {len(screened)} latents of the control subset have a predicate and a judge's score, and screening takes "
            f"{LEAST}: set cascade.control higher, or cascade.screen = false"
        )
    x, y = np.array(screened, dtype=np.float64), np.array(judged, dtype=np.float64)
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy) / (float(dx @ dx) + PRIOR * SPREAD**2)
    residuals = dy - slope * dx
    deviation = float(np.sqrt(residuals @ residuals / (len(x) - 2)))
    return Screening(len(x), float(x.mean()), float(y.mean()), slope, deviation)


def left_out(screened: Sequence[Refined], judged: Sequence[Refined]) -> list[Refined]:
    """Return each latent's reckoned score by the fit of all others; undefined where a latent lacks one of the two."""
    both = [
        (place, a.value, b.value)
        for place, (a, b) in enumerate(zip(screened, judged, strict=True))
        if a.value is not None and b.value is not None
    ]
    found = [replace(one, value=None, low=None, high=None) for one in screened]
    for own, *_ in both:
        others = [(a, b) for place, a, b in both if place != own]
        fit = fit_screening([a for a, _ in others], [b for _, b in others])
        found[own] = fit.reckoned(screened[own])
    return found


def _bounded(value: float) -> float:
    return max(0.0, min(1.0, value))
