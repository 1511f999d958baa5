"""Stop asking about a latent once its score is settled: a confidence sequence over prompts (PROTOCOLS §13).

An interval that is looked at after every prompt, and that decides whether to go on, must hold at all times at once. Verdicts
of one prompt are correlated in ways nobody knows, so the prompt is the unit:

1. The outcome of a prompt is the mean of the share of firing items judged right and that of non-firing ones. Whatever the
   correlation within it and however many items of each class it has, it lies in [0, 1] and its expectation is the balanced
   accuracy, given all prompts before it. A prompt without a verdict on one of the classes says nothing and is passed over.
2. For every candidate mean m a gambler bets on outcomes above m, another below it. If m is the true mean their wealth is a
   non-negative martingale from 1, which ever reaches 2/α with probability α/2 at most (Ville 1939). So the m at which
   neither ever did form a 1 − α confidence sequence.
   Source: Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86:1–27.
3. A gambler spreads the wealth over fixed fractions of the largest bet that cannot ruin (their "grid Kelly"). Wealth on
   outcomes above m then falls with m, so the m that are rejected are an interval that ends at a point of a grid.
4. `stopped` is true once the target is outside. No more is asked then, and `n` prompts and the bound are stored.

The sequence covers the judge's balanced accuracy on windows drawn as these were; the plain value beside it, at a stopping
time, leans away from the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exegete.evaluators.clustering import Bools
from exegete.tools.errors import UserError

BOUND = "betting confidence sequence over prompts (Waudby-Smith & Ramdas 2024)"
GRID = 200
FRACTIONS = np.array([0.25, 0.5, 0.75, 0.99])
SHARES = np.array([0.1, 0.2, 0.2, 0.5])
"""Fractions of the largest bet, and the share of the wealth that bets so. Within a few dozen prompts the bold ones decide."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """When to stop asking about a latent."""

    target: float = 0.75
    """Balanced accuracy that decides: once the sequence lies wholly above or below it, no more is asked."""
    prompts_per_round: int = 2
    """Prompts asked at once; the sequence is looked at after each round."""
    confidence: float = 0.95
    """Probability that the sequence covers at all times."""

    def __post_init__(self) -> None:
        """Raise UserError where a field is outside its range."""
        for name in ("target", "confidence"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UserError(f"stopping {name}={value!r}: expected a number between 0 and 1, for example 0.75")
        if self.prompts_per_round < 1:
            raise UserError(f"stopping prompts_per_round={self.prompts_per_round!r}: expected 1 or more")

    def described(self) -> dict[str, Any]:
        """Return it as parameters of a score, with the name of the bound."""
        return {**asdict(self), "bound": BOUND}


class ConfidenceSequence:
    """An interval for the mean of outcomes in [0, 1] that holds after every one of them, whenever one stops."""

    def __init__(self, target: float = 0.75, confidence: float = 0.95) -> None:
        """Begin with [0, 1]; `stopped` will say whether `target` has been excluded."""
        self.target = target
        self.n = 0
        self.low, self.high = 0.0, 1.0
        self._means = np.unique([*np.linspace(0, 1, GRID + 1)[1:-1], target])
        self._barrier = 2 / (1 - confidence)
        above, below = 1 / self._means, 1 / (1 - self._means)
        self._bets = np.stack([above, -below])[:, :, None] * FRACTIONS
        self._wealth = np.zeros_like(self._bets) + SHARES
        """Of each gambler: shape (above or below, candidate mean, fraction)."""

    @property
    def stopped(self) -> bool:
        """Whether the target is excluded."""
        return not self.low < self.target < self.high

    def update(self, outcomes: Sequence[float]) -> tuple[float, float]:
        """Take the outcomes of further prompts, each in [0, 1], and return (low, high).

        Raises:
            UserError: an outcome is not a number in [0, 1].
        """
        for outcome in outcomes:
            if not 0 <= outcome <= 1:
                raise UserError(f"a prompt's outcome is {outcome!r}: expected a number from 0 to 1")
            self._wealth *= 1 + self._bets * (outcome - self._means)[:, None]
            # Wealth cut down is still a fair bound, and no bet overflows however long the game.
            np.minimum(self._wealth, 1e200, out=self._wealth)
            self.n += 1
            self._exclude()
        return self.low, self.high

    def _exclude(self) -> None:
        # What was excluded once stays so.
        ruined = self._wealth.sum(axis=2) >= self._barrier
        if ruined[0].any():
            self.low = max(self.low, float(self._means[ruined[0]].max()))
        if ruined[1].any():
            self.high = min(self.high, float(self._means[ruined[1]].min()))


def balanced_outcome(truth: Bools, right: Bools) -> float | None:
    """Return a prompt's outcome: the mean of both classes' shares of right verdicts; None where a class is missing.

    `truth` and `right` have shape (items,): those items of the prompt that have a verdict.
    """
    if truth.all() or not truth.any():
        return None
    return float(right[truth].mean() + right[~truth].mean()) / 2


def balanced_order(truth: Sequence[bool], per_prompt: int, rng: np.random.Generator) -> list[list[int]]:
    """Return items, as indices into `truth` (items,), cut into prompts that all hold the classes in the same proportion.

    With 100 of each and 5 a prompt: 2 and 3, then 3 and 2, in shuffled places. Which item comes where is drawn from `rng`.
    """
    fires = np.array(truth, dtype=np.bool_)
    classes = [rng.permutation(np.flatnonzero(fires)), rng.permutation(np.flatnonzero(~fires))]
    prompts = []
    for start in range(0, len(truth), per_prompt):
        ends = np.array([start, min(start + per_prompt, len(truth))])
        firing = ends * len(classes[0]) // len(truth)
        silent = ends - firing
        prompt = np.concatenate([classes[0][firing[0] : firing[1]], classes[1][silent[0] : silent[1]]])
        prompts.append([int(i) for i in rng.permutation(prompt)])
    return prompts
