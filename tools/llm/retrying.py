"""Sending again what may succeed later, for a bounded time.

1. A server that fails (5xx, cut connections, timeouts, replies that are no JSON) is asked `Limits.attempts` times at
   most, after 0.5, 1, 2, … seconds with full jitter.
2. A server that pushes back (429, 503, 529) is asked again until `Limits.patience_s` is over; pacing sees to the rate.
3. Retry-After is a lower bound of the wait, with up to a tenth more so that not all come back at once. One that goes
   beyond the patience ends the call at once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from exegete.tools.llm.faults import Transient
from exegete.tools.llm.pacing import Limits

_MOST_WAIT_S = 60.0
_MOST_PUSHBACK_WAIT_S = 2.0
Answer = TypeVar("Answer")


async def persist(
    attempt: Callable[[], Awaitable[Answer]], limits: Limits, stopping: Callable[[], bool] = lambda: False
) -> Answer:
    """Return what `attempt` returns, called again after each `Transient` while limits allow and `stopping()` is false.

    Raises:
        Transient: the last one, where patience or attempts ran out.
    """
    try:
        return await attempt()
    except Transient as first:
        # Most calls succeed at once: they need not pay for the machinery.
        return await _again(attempt, limits, stopping, first)


async def _again(
    attempt: Callable[[], Awaitable[Answer]], limits: Limits, stopping: Callable[[], bool], first: Transient
) -> Answer:
    failures = 0
    pending: Transient | None = first

    async def replay() -> Answer:
        nonlocal pending
        if pending is not None:
            fault, pending = pending, None
            raise fault
        return await attempt()

    def enough(state: RetryCallState) -> bool:
        nonlocal failures
        failures += not _fault(state).pushback
        late = (state.seconds_since_start or 0.0) + state.upcoming_sleep > limits.patience_s
        return late or failures >= limits.attempts or stopping()

    retrying = AsyncRetrying(retry=retry_if_exception_type(Transient), wait=_wait, stop=enough, reraise=True)
    return await retrying(replay)


def _fault(state: RetryCallState) -> Transient:
    fault = state.outcome.exception() if state.outcome else None
    assert isinstance(fault, Transient)
    return fault


def _wait(state: RetryCallState) -> float:
    # Only delays are drawn here, nothing that a result depends on.
    fault = _fault(state)
    most = _MOST_PUSHBACK_WAIT_S if fault.pushback else _MOST_WAIT_S
    backoff = random.uniform(0, min(most, 0.5 * 2.0 ** min(state.attempt_number - 1, 20)))
    if fault.retry_after_s is None:
        return backoff
    return fault.retry_after_s + min(backoff, 0.1 * fault.retry_after_s + 0.05)
