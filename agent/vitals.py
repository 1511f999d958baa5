"""The vital signs of a run: how far it is, how fast, what its calls come to and cost, and how its scores stand.

1. Whoever does the work tells what happens: a stage begins, advances, ends; records are written; a call goes out and comes
   back. Each of these takes constant time and memory, whatever the number of latents, and may come from any thread.
2. A rate is counted in sixty buckets of a second, so that the last minute can be told from the whole.
3. A running score is Welford's mean and sum of squares (Technometrics 4(3), 1962), for the explanations and for each floor;
   the interval is the normal one at 95 %. It covers what this process has written: after a resume, what came before is in the store.
4. `snapshot` returns all of it at one moment, as plain values that an event log can keep and `exegete status` can read.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from exegete.tools.llm import Reply
    from exegete.tools.store import LatentRecord

MINUTE_S = 60
NORMAL_95 = 1.959964
FEW = 8
"""So many units, or a quarter of what a stage has to do, and its pace says how long the rest takes."""
GLANCE_S = 0.1


class BudgetLike(Protocol):
    """What is read of a budget, as `exegete.tools.llm.Budget`; a limit that is infinite is none."""

    max_usd: float
    spent_usd: float
    reserved_usd: float
    max_tokens: float
    spent_tokens: int
    reserved_tokens: int


@dataclass(frozen=True, slots=True)
class StageVitals:
    """One stage of a run."""

    name: str
    done: int
    total: int
    unit: str
    elapsed_s: float
    rate: float
    """Units a second since the stage began in this process."""
    minute_rate: float
    """Units a second over the last minute."""
    left_s: float | None
    """Seconds to go at the rate of the last minute, or of the whole where that minute saw nothing; None after
    fewer than `FEW` units: of those that are worked on together, the first tells nothing of the others."""


@dataclass(frozen=True, slots=True)
class CallVitals:
    """Calls to one model, or to all of them, since this process began. Every call is in exactly one of the first four."""

    ok: int = 0
    """With a usable reply that was paid for now."""
    cached: int = 0
    """Answered by the journal."""
    failed: Mapping[str, int] = field(default_factory=dict)
    """`Reply.status` → calls, for every status but `ok`; `stopped` where asking raised."""
    in_flight: int = 0
    """Asked and not answered yet, those that wait for their turn included."""
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    """Paid for what was answered in this process."""


@dataclass(frozen=True, slots=True)
class BudgetVitals:
    """What has been spent of a budget, over all processes of the run."""

    max_usd: float | None
    """None where money has no limit."""
    spent_usd: float
    """Paid, and what calls without an answer may have cost."""
    in_flight_usd: float
    """Worst case of the calls in flight."""
    max_tokens: float | None
    spent_tokens: int
    in_flight_tokens: int


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over latents; the interval is None below two of them."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class ScoreVitals:
    """The headline metric of one evaluator so far, beside its floors so far (which are of other latents in part)."""

    metric: str
    own: Mean
    floors: Mapping[str, Mean]
    """Floor → its mean; empty until floors are scored, which is after labeling."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All vital signs at one moment."""

    run: str | None
    elapsed_s: float
    """Since this process began to work on the store."""
    stage: StageVitals | None
    """The stage that is open; None between two."""
    calls: CallVitals
    models: Mapping[str, CallVitals]
    budget: BudgetVitals | None
    """None where there is no limit."""
    scores: Mapping[str, ScoreVitals]
    """Evaluator → its scores."""


class Vitals:
    """Collects the vital signs of a run; every method may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the time in seconds from `clock`."""
        self._clock = clock
        # A signal's handler may look while its own thread counts.
        self._lock = threading.RLock()
        self._last: Snapshot | None = None
        self._began = clock()
        self._run: str | None = None
        self._stages: list[_Stage] = []
        self._calls: dict[str, _Calls] = {}
        self._budget: BudgetLike | None = None
        self._headlines: Mapping[str, str] = {}
        self._means: dict[tuple[str, str | None], RunningMean] = {}

    def run_begun(self, run: str, headlines: Mapping[str, str]) -> None:
        """From now on scores are those of `run`; `headlines`: evaluator → metric that is shown of it."""
        with self._lock:
            self._run, self._headlines, self._means = run, dict(headlines), {}

    def pays_from(self, budget: BudgetLike | None) -> None:
        """Read what is spent from `budget`."""
        with self._lock:
            self._budget = budget

    def stage_begun(self, name: str, total: int, unit: str, done: int = 0) -> None:
        """A stage of `total` units begins, of which `done` were finished earlier."""
        with self._lock:
            self._stages.append(_Stage(name, total, unit, done, self._clock()))

    def advanced(self, count: int) -> None:
        """`count` units of the stage that began last are finished."""
        with self._lock:
            if self._stages:
                self._stages[-1].advance(count, self._clock())

    def stage(self) -> StageVitals | None:
        """Return the stage that began last and has not ended."""
        with self._lock:
            return self._stages[-1].vitals(self._clock()) if self._stages else None

    def stage_ended(self) -> StageVitals | None:
        """The stage that began last has ended; return how it stood."""
        with self._lock:
            return self._stages.pop().vitals(self._clock()) if self._stages else None

    def records(self, records: Sequence[LatentRecord]) -> None:
        """Records of latents, or of floors, have been written: take in their headline scores."""
        with self._lock:
            for record in records:
                for explanation, score in record.scores:
                    if record.chosen in (None, explanation) and self._headlines.get(score.evaluator) == score.metric:
                        self._scored(score.evaluator, score.baseline, score.value)

    def call_out(self, model: str) -> None:
        """A call to `model` is asked."""
        with self._lock:
            self._of(model).in_flight += 1

    def call_in(self, model: str, reply: Reply | None) -> None:
        """A call to `model` has its reply, or will never have one (None)."""
        with self._lock:
            self._of(model).take(reply)

    def snapshot(self) -> Snapshot:
        """Return everything at this moment."""
        with self._lock:
            return self._now()

    def glance(self) -> Snapshot:
        """Return everything at this moment, or what was last seen where somebody counts for longer than a tenth of a second.

        Whoever draws looks in this way: a handler of a signal that interrupted the counting may be waiting for the drawing.
        """
        if self._lock.acquire(timeout=GLANCE_S):
            try:
                self._last = self._now()
            finally:
                self._lock.release()
        return self._last or Vitals(self._clock).snapshot()

    def _now(self) -> Snapshot:
        now = self._clock()
        return Snapshot(
            self._run,
            now - self._began,
            self._stages[-1].vitals(now) if self._stages else None,
            _together(self._calls.values()).vitals(),
            {model: calls.vitals() for model, calls in sorted(self._calls.items())},
            None if self._budget is None else _budget(self._budget),
            self._scores(),
        )

    def _of(self, model: str) -> _Calls:
        return self._calls.setdefault(model, _Calls())

    def _scored(self, evaluator: str, baseline: str | None, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self._means.setdefault((evaluator, baseline), RunningMean()).add(value)

    def _scores(self) -> dict[str, ScoreVitals]:
        own = {name: mean.figure() for (name, baseline), mean in self._means.items() if baseline is None}
        floors: dict[str, dict[str, Mean]] = {}
        for (name, baseline), mean in self._means.items():
            if baseline is not None:
                floors.setdefault(name, {})[baseline] = mean.figure()
        return {name: ScoreVitals(self._headlines[name], own[name], floors.get(name, {})) for name in sorted(own)}


def _budget(budget: BudgetLike) -> BudgetVitals:
    most_usd, most_tokens = (most if math.isfinite(most) else None for most in (budget.max_usd, budget.max_tokens))
    usd, tokens = (budget.spent_usd, budget.reserved_usd), (budget.spent_tokens, budget.reserved_tokens)
    return BudgetVitals(most_usd, *usd, most_tokens, *tokens)


class RunningMean:
    """Mean and variance of a stream of numbers, without keeping them."""

    __slots__ = ("_mean", "_n", "_squares")

    def __init__(self) -> None:
        self._n = 0
        self._mean = self._squares = 0.0

    def add(self, value: float) -> None:
        """Take one number in."""
        self._n += 1
        before = value - self._mean
        self._mean += before / self._n
        self._squares += before * (value - self._mean)

    def figure(self) -> Mean:
        """Return the mean of what came in (at least one number) with its normal 95 % interval."""
        if self._n < 2:
            return Mean(self._mean, None, None, self._n)
        half = NORMAL_95 * math.sqrt(self._squares / (self._n - 1) / self._n)
        return Mean(self._mean, self._mean - half, self._mean + half, self._n)


class Rate:
    """Counts over the last minute, in one bucket a second."""

    def __init__(self, began: float) -> None:
        """Count from `began`, in seconds of the clock that `add` and `per_s` take."""
        self._began = began
        self._seconds = [-1] * MINUTE_S
        self._counts = [0] * MINUTE_S

    def add(self, count: int, now: float) -> None:
        """`count` units are finished."""
        second = int(now - self._began)
        bucket = second % MINUTE_S
        if self._seconds[bucket] != second:
            self._seconds[bucket], self._counts[bucket] = second, 0
        self._counts[bucket] += count

    def per_s(self, now: float) -> float:
        """Return units a second over the last minute, or since the beginning where that is later."""
        elapsed = now - self._began
        second, begun = divmod(elapsed, 1.0)
        recent = zip(self._seconds, self._counts, strict=True)
        counted = sum(count for at, count in recent if at > second - MINUTE_S and at >= 0)
        # The second that is going on has its share only.
        return counted / min(elapsed, MINUTE_S - 1 + begun) if counted and elapsed > 0 else 0.0


class _Stage:
    def __init__(self, name: str, total: int, unit: str, done: int, began: float) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._before = self._done = done
        self._began = began
        self._rate = Rate(began)

    def advance(self, count: int, now: float) -> None:
        self._done += count
        self._rate.add(count, now)

    def vitals(self, now: float) -> StageVitals:
        elapsed = now - self._began
        finished = self._done - self._before
        rate = finished / elapsed if elapsed > 0 else 0.0
        minute = self._rate.per_s(now)
        pace = minute or rate
        enough = finished >= min(FEW, math.ceil((self._total - self._before) / 4))
        left = max(0, self._total - self._done) / pace if pace and enough else None
        return StageVitals(self._name, self._done, self._total, self._unit, elapsed, rate, minute, left)


class _Calls:
    def __init__(self) -> None:
        self.ok = self.cached = self.in_flight = self.input_tokens = self.output_tokens = 0
        self.failed: Counter[str] = Counter()
        self.usd = 0.0

    def take(self, reply: Reply | None) -> None:
        self.in_flight -= 1
        if reply is None:
            self.failed["stopped"] += 1
        elif reply.cached:
            self.cached += 1
        else:
            self.input_tokens += reply.usage.input_tokens
            self.output_tokens += reply.usage.output_tokens
            self.usd += reply.usd
            if reply.status == "ok":
                self.ok += 1
            else:
                self.failed[reply.status] += 1

    def vitals(self) -> CallVitals:
        counts: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "failed"}
        return CallVitals(failed=dict(sorted(self.failed.items())), **counts)


def _together(models: Any) -> _Calls:
    total = _Calls()
    for calls in models:
        for name, value in vars(calls).items():
            setattr(total, name, getattr(total, name) + value)
    return total
