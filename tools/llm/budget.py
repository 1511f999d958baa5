"""A budget in USD that stops new calls before it is exceeded.

1. Before a call is sent its worst case is reserved; afterwards the reservation becomes what the call cost, or the worst
   case itself where no answer came although the provider may have billed one.
2. A call that does not fit beside the reservations of others waits until they are settled, since they mostly cost less.
3. A call that does not fit beside what is spent is refused, and so is every new one after it: those in flight land, the
   rest of the run can be taken up later with more money.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from exegete.tools.errors import UserError


class BudgetUsedUp(UserError):
    """The next call could exceed the budget. Calls in flight land; the run can be resumed with a larger budget."""


class Budget:
    """An amount of USD, shared by any number of clients of one event loop.

    Raises:
        UserError: `max_usd` is negative or no number.
    """

    def __init__(self, max_usd: float, spent_usd: float = 0.0) -> None:
        if not (math.isfinite(max_usd) and max_usd >= 0):
            raise UserError(f"budget of {max_usd} USD: expected a finite number that is not negative")
        self.max_usd = max_usd
        self.spent_usd = spent_usd
        """Paid, and what calls without an answer may have cost."""
        self.reserved_usd = 0.0
        """Worst case of the calls in flight."""
        self._in_flight = 0
        self._used_up = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    def check(self) -> None:
        """Raise BudgetUsedUp where a call has been refused before."""
        if self._used_up:
            raise self._refusal()

    def fits(self, worst_usd: float) -> bool:
        """Return whether a call fits beside what is spent and reserved, so that `reserve` need not wait."""
        return self.spent_usd + self.reserved_usd + worst_usd <= self.max_usd

    def reserve_sent(self, worst_usd: float) -> None:
        """Set aside the worst case of what was sent before this budget began, whether it fits or not."""
        self._in_flight += 1
        self.reserved_usd += worst_usd

    async def reserve(self, worst_usd: float) -> None:
        """Set the worst case of one call aside, after waiting for calls in flight where need be.

        Raises:
            BudgetUsedUp: it could exceed the budget.
        """
        while not self.fits(worst_usd):
            if self._used_up or self.spent_usd + worst_usd > self.max_usd:
                self._used_up = True
                self._wake()
                raise self._refusal()
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.check()
        self._in_flight += 1
        self.reserved_usd += worst_usd

    def settle(self, worst_usd: float, cost_usd: float) -> None:
        """Turn a reservation into what the call cost."""
        self._in_flight -= 1
        # Sums of floats leave crumbs, and a call must not wait for a crumb.
        self.reserved_usd = self.reserved_usd - worst_usd if self._in_flight else 0.0
        self.spent_usd += cost_usd
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    def _refusal(self) -> BudgetUsedUp:
        return BudgetUsedUp(
            f"budget of {self.max_usd:g} USD: {self.spent_usd:.4f} USD are spent and the next call could exceed it; "
            "calls in flight were finished, resume with a larger --budget"
        )
