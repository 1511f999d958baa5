"""How many calls are in flight, and how fast new ones go out: as much as the server takes, found out while calling.

1. *Concurrency*: the window doubles per round trip (one more per answer) until the server pushes back (429, 503, 529),
   then halves and grows by about one per round trip (AIMD; Chiu & Jain 1989; Jacobson 1988). It halves once: from then
   on the rate follows the server, and calls in flight follow the rate (Little's law). Lowering both for one pushback
   would hold slow answers to half of what the server allows.
2. *Rate*: at pushback, new calls go out at 0.85 of the rate at which answers came lately, but at no less than half of the
   rate so far (fewer answers may only mean that less was asked). It then grows as exp(0.05 t + 0.02 t²), t seconds since
   the last pushback: by 7 % in the first second, tenfold after ten, so a limit is followed closely and left within some
   twenty seconds of its end. Growth of the window speeds up alike.
3. Pushback to a call that was sent before the last slowing-down says nothing new and slows nothing. Neither does as much of
   it as comes whatever the pace: a provider that is short of machines refuses some of all calls, and whoever slowed down for
   each would soon ask a hundredth of what it takes. One in ten is taken for that, and more where it was seen: a limit refuses
   hardly any of the calls that go out just after a slowing-down to less than what was answered, unless it has fallen meanwhile,
   and then few are answered. So what follows such a slowing-down is waited for, unless most are refused.
4. Where nothing has been answered for a second, a Retry-After holds for everybody, not only for the call that got it.
5. *Given limits*, per minute, are buckets that hold a tenth of a minute's worth and may go into debt, so that one call
   larger than the bucket still passes. Tokens are estimated before a call and corrected by its usage.
6. Given limits are the server's, so the clients of one server may share them (`Allowance`), calls in flight included; what
   a server takes of one model is found out for each model.
7. Whoever waits goes in order of arrival, among the clients of one server in turn.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from exegete.tools.errors import UserError

_START_WINDOW = 32.0
_FIRST_RATE = 10.0
_LEAST_RATE = 0.5
_GOODPUT_SECONDS = 1.0
_TOLERATED = 0.1
"""Share of calls that may be refused lately without slowing down, at least."""
_CALM_SECONDS = 1.2
"""After a slowing-down to 0.85 of what was answered the rate is below that for so long."""
_MOST_REFUSED = 0.6
"""Share of the calls of that time above which there must be a limit, and it has fallen."""
_FEW = 5
"""Refusals that say nothing of a share yet."""
_SURE = 16.0
"""Answers from which how many come per second is known well enough for that."""
_CALM_CALLS = 30
"""Over so many calls at that pace, about, the share that is refused whatever the pace is taken."""
_BUCKET_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask of a server. Raises UserError where a value is not positive."""

    concurrency: int = 256
    """Calls in flight, at most."""
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    """Input and output together."""
    connect_s: float = 10.0
    """To open a connection."""
    total_s: float = 120.0
    """For one attempt, from sending to the last byte."""
    patience_s: float = 600.0
    """For one call with all its attempts; an answered call takes what it takes."""
    attempts: int = 6
    """How often a call is sent while the server fails; being pushed back does not count."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not value > 0:
                raise UserError(f"limits: {name} = {value!r}: expected a number above 0")


class Bucket:
    """Replenishes continuously; may go into debt."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_second = per_minute / 60
        self._capacity = max(1.0, self._per_second * _BUCKET_SECONDS)
        self._level = self._capacity
        self._at = now

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next call may go."""
        if self._per_second == math.inf:
            return 0.0
        self._level = min(self._capacity, self._level + (now - self._at) * self._per_second)
        self._at = now
        least = min(1.0, self._capacity)
        # A hair below is enough: waiting for the exact level can be a wait of zero, for ever.
        return 0.0 if self._level >= least - 1e-9 else (least - self._level) / self._per_second + 1e-6

    def take(self, amount: float) -> None:
        """Take `amount` out, or give it back where it is negative."""
        if self._per_second != math.inf:
            self._level -= amount


@dataclass(slots=True, eq=False)
class _Calm:
    """The time after a slowing-down to less than was answered."""

    until: float
    answered_before: float
    """Per second."""
    answered: int = 0
    refused: int = 0


@dataclass(slots=True)
class Slot:
    """Leave to send one request."""

    tokens: float
    sent: float
    calm: _Calm | None = None
    """The time that it was sent in, where the server was just seen to answer more than is asked."""


class Allowance:
    """What one server may be asked by all clients of one event loop together: calls in flight, and per minute."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        now = clock()
        self.limits = limits
        self.requests = Bucket(limits.requests_per_minute, now)
        self.tokens = Bucket(limits.tokens_per_minute, now)
        self.in_flight = 0
        self._pacers: deque[Pacer] = deque()

    def join(self, pacer: Pacer) -> None:
        """Have `pacer` look again whenever one of the others has come back."""
        self._pacers.append(pacer)

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next call may go; infinite while too many are in flight."""
        if self.in_flight >= self.limits.concurrency:
            return math.inf
        return max(self.requests.wait_s(now), self.tokens.wait_s(now))

    def back(self) -> None:
        """A call has come back: whoever had no turn for longest goes first."""
        self.in_flight -= 1
        self._pacers.rotate(-1)
        for pacer in self._pacers:
            pacer.look_again()


class Pacer:
    """Gives leave to send, in order of arrival, as fast as limits and server allow.

    `allowance`: the limits that are shared with other clients of the same server; its own where left out.
    """

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.monotonic, allowance: Allowance | None = None
    ) -> None:
        self._clock = clock
        now = clock()
        self._allowance = allowance or Allowance(limits, clock)
        self._allowance.join(self)
        self._most = float(limits.concurrency)
        self.window = min(_START_WINDOW, self._most)
        self._threshold = self._most
        self._base_rate = math.inf
        self._slowed = now
        self._next = now
        self._paused_until = now
        self._goodput = 0.0
        self._refused = 0.0
        self._calm: _Calm | None = None
        self._always_refused = 0.0
        self._counted_at = now
        self._started = now
        self._answered = now
        self.in_flight = 0
        self._waiting: deque[tuple[asyncio.Future[Slot], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def slot(self, tokens: float) -> Slot:
        """Wait for leave to send a request of about `tokens` tokens. Give it back by `answered`, `pushed_back` or `failed`."""
        if not self._waiting and self._wait_s(now := self._clock()) <= 0:
            return self._grant(tokens, now)
        turn: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, tokens))
        self._release()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.failed(turn.result())
            raise

    def answered(self, slot: Slot, tokens: float) -> None:
        """The request was answered and took `tokens` tokens in all."""
        now = self._clock()
        self._decay(now)
        self._goodput += 1.0
        self._learn(slot, refused=False)
        self._answered = now
        self._allowance.tokens.take(tokens - slot.tokens)
        if self.window < self._most and self.in_flight >= self.window - 1:
            step = 1.0 if self.window < self._threshold else (1 + (now - self._slowed) ** 2 / 25) / self.window
            self.window = min(self._most, self.window + min(1.0, step))
        self._back()

    def pushed_back(self, slot: Slot, retry_after_s: float | None) -> None:
        """The server asked for fewer requests."""
        now = self._clock()
        self._decay(now)
        self._refused += 1.0
        self._learn(slot, refused=True)
        share = max(_TOLERATED, 0.05 + 1.5 * self._always_refused)
        share = max(share, _MOST_REFUSED) if self._calm else share
        tolerated = self._refused < share * (self._refused + self._goodput)
        if slot.sent >= self._slowed and not tolerated:
            if self._base_rate == math.inf:
                self.window = self._threshold = max(1.0, min(self.window, self.in_flight) / 2)
            self._slow_down(now)
        if retry_after_s and now - self._answered > _GOODPUT_SECONDS:
            self._paused_until = max(self._paused_until, now + retry_after_s)
        self._allowance.tokens.take(-slot.tokens)
        self._back()

    def failed(self, slot: Slot) -> None:
        """No answer came, for a reason that says nothing about pace."""
        self._back()

    def rate(self, now: float | None = None) -> float:
        """Return the requests per second that may go out now; infinite before the first pushback."""
        if self._base_rate == math.inf:
            return math.inf
        t = (self._clock() if now is None else now) - self._slowed
        exponent = 0.05 * t + 0.02 * t * t
        return self._base_rate * math.exp(exponent) if exponent < 20 else math.inf

    def _slow_down(self, now: float) -> None:
        seen = min(_GOODPUT_SECONDS, max(now - self._started, 0.05))
        lately = self._goodput / (_GOODPUT_SECONDS * (1 - math.exp(-seen / _GOODPUT_SECONDS)))
        rate = self.rate(now)
        halved = 0.5 * rate if rate != math.inf else _FIRST_RATE
        self._base_rate = max(_LEAST_RATE, min(0.9 * rate, max(0.85 * lately, halved)))
        sure = lately * _GOODPUT_SECONDS >= _SURE
        self._calm = _Calm(now + _CALM_SECONDS, lately) if sure and self._base_rate <= 0.86 * lately else None
        self._next = max(self._next, now)
        self._slowed = now

    def _learn(self, slot: Slot, refused: bool) -> None:
        """Take the share that was refused in a calm time for what is refused whatever the pace, once later calls come back."""
        calm = self._calm
        if calm is None:
            return
        if slot.calm is calm:
            calm.answered += not refused
            calm.refused += refused
            if calm.refused > _FEW and calm.refused > _MOST_REFUSED * (calm.answered + calm.refused):
                # There is a limit, and it has fallen: what was answered before says nothing of it.
                self._calm = None
                self._goodput = min(self._goodput, calm.answered / max(self._counted_at - self._slowed, 0.05))
        elif slot.sent >= calm.until:
            self._calm, calls = None, calm.answered + calm.refused
            if calls and calm.answered >= 0.4 * _CALM_SECONDS * calm.answered_before:
                weight = 1 - (1 - 1 / _CALM_CALLS) ** calls
                self._always_refused += weight * (calm.refused / calls - self._always_refused)

    def _decay(self, now: float) -> None:
        kept = math.exp((self._counted_at - now) / _GOODPUT_SECONDS)
        self._goodput *= kept
        self._refused *= kept
        self._counted_at = now

    def _back(self) -> None:
        self.in_flight -= 1
        self._allowance.back()

    def look_again(self) -> None:
        """Give leave to those that need not wait any longer."""
        if self._waiting:
            self._release()

    def _wait_s(self, now: float) -> float:
        if self.in_flight >= int(self.window):
            return math.inf
        return max(
            self._paused_until - now,
            self._next - now if self._base_rate != math.inf else 0.0,
            self._allowance.wait_s(now),
        )

    def _grant(self, tokens: float, now: float) -> Slot:
        self.in_flight += 1
        self._allowance.in_flight += 1
        self._allowance.requests.take(1)
        self._allowance.tokens.take(tokens)
        if (rate := self.rate(now)) != math.inf:
            # Timers come late; what they miss may be caught up with, but not in bursts that a server would refuse.
            self._next = max(self._next, now - 0.02) + 1 / rate
        else:
            self._base_rate = math.inf
        return Slot(tokens, now, self._calm if self._calm and now < self._calm.until else None)

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            turn, tokens = self._waiting[0]
            if turn.done():
                self._waiting.popleft()
                continue
            now = self._clock()
            wait = self._wait_s(now)
            if wait > 0:
                if wait != math.inf:
                    self._timer = asyncio.get_running_loop().call_later(wait, self._release)
                return
            self._waiting.popleft()
            turn.set_result(self._grant(tokens, now))
