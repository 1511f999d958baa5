"""A budget in USD, in tokens or in both, that stops new calls before it is exceeded.

1. Before a call is sent its worst case is reserved; afterwards the reservation becomes what the call cost, or the worst
   case itself where no answer came although the provider may have billed one.
2. A call that does not fit beside the reservations of others waits until they are settled, since they mostly cost less.
3. A call that does not fit beside what is spent is refused, and so is every new one after it: those in flight land, the
   rest of the run can be taken up later with more money or tokens.

Whoever keeps a budget of USD alone leaves the tokens out everywhere.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from exegete.tools.errors import UserError


class BudgetUsedUp(UserError):
    """The next call could exceed the budget. Calls in flight land; the run can be resumed with a larger budget."""


class Budget:
    """An amount of USD and of tokens (input and output together), shared by any number of clients of one event loop.

    None of either is no limit of that kind. What is spent and reserved is counted of both in any case.

    Raises:
        UserError: `max_usd` or `max_tokens` is negative or no number.
    """

    def __init__(
        self, max_usd: float | None, spent_usd: float = 0.0, *, max_tokens: float | None = None, spent_tokens: int = 0
    ) -> None:
        for unit, most in (("USD", max_usd), ("tokens", max_tokens)):
            if most is not None and not (math.isfinite(most) and most >= 0):
                raise UserError(f"budget of {most} {unit}: expected a finite number that is not negative")
        self.max_usd = math.inf if max_usd is None else max_usd
        """Infinite where there is no such limit."""
        self.max_tokens = math.inf if max_tokens is None else max_tokens
        self.spent_usd = spent_usd
        """Paid, and what calls without an answer may have cost."""
        self.spent_tokens = spent_tokens
        self.reserved_usd = 0.0
        """Worst case of the calls in flight."""
        self.reserved_tokens = 0
        self._in_flight = 0
        self._refusal: str | None = None
        """Why a call was refused, once one has been."""
        self._waiting: deque[asyncio.Future[None]] = deque()

    def check(self) -> None:
        """Raise BudgetUsedUp where a call has been refused before."""
        if self._refusal is not None:
            raise BudgetUsedUp(self._refusal)

    def fits(self, worst_usd: float, worst_tokens: int = 0) -> bool:
        """Return whether a call fits beside what is spent and reserved, so that `reserve` need not wait."""
        return (
            self.spent_usd + self.reserved_usd + worst_usd <= self.max_usd
            and self.spent_tokens + self.reserved_tokens + worst_tokens <= self.max_tokens
        )

    def reserve_sent(self, worst_usd: float, worst_tokens: int = 0) -> None:
        """Set aside the worst case of what was sent before this budget began, whether it fits or not."""
        self._in_flight += 1
        self.reserved_usd += worst_usd
        self.reserved_tokens += worst_tokens

    async def reserve(self, worst_usd: float, worst_tokens: int = 0) -> None:
        """Set the worst case of one call aside, after waiting for calls in flight where need be.

        Raises:
            BudgetUsedUp: it could exceed the budget; the message says which limit.
        """
        while not self.fits(worst_usd, worst_tokens):
            refusal = self._refusal or self._beyond(worst_usd, worst_tokens)
            if refusal is not None:
                self._refusal = refusal
                self._wake()
                raise BudgetUsedUp(refusal)
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self.check()
        self.reserve_sent(worst_usd, worst_tokens)

    def settle(self, worst_usd: float, cost_usd: float, worst_tokens: int = 0, tokens: int = 0) -> None:
        """Turn a reservation into what the call cost and the tokens it took."""
        self._in_flight -= 1
        # Sums of floats leave crumbs, and a call must not wait for a crumb.
        self.reserved_usd = self.reserved_usd - worst_usd if self._in_flight else 0.0
        self.reserved_tokens -= worst_tokens
        self.spent_usd += cost_usd
        self.spent_tokens += tokens
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    def _beyond(self, worst_usd: float, worst_tokens: int) -> str | None:
        """Return why a call does not fit beside what is spent, None where it does."""
        if self.spent_usd + worst_usd > self.max_usd:
            limit, spent, option = f"{self.max_usd:g} USD", f"{self.spent_usd:.4f} USD", "--budget"
        elif self.spent_tokens + worst_tokens > self.max_tokens:
            limit, spent, option = f"{self.max_tokens:,.0f} tokens", f"{self.spent_tokens:,} tokens", "--budget-tokens"
        else:
            return None
        return (
            f"budget of {limit}: {spent} are spent and the next call could exceed it; "
            f"calls in flight were finished, resume with a larger {option}"
        )
